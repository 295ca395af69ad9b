"""From records to token ids: the boundary between prompt and completion, EOS, truncation, and a report of all three.

K completions share one prompt, token for token. What is scored is decided here by position: `Example.completion_ids`
holds the scored tokens and nothing else, so nothing later looks for pad or EOS ids (they are often the same id).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import numpy as np

from prefopt.data.read_report import DropCounter, Dropped, LengthBaseline, describe_drops
from prefopt.data.records import Example, Message, Record
from prefopt.data.rows import common_prefix, safe
from prefopt.errors import ConfigError, DataError


class Tokenizer(Protocol):
    """What is used of a transformers tokenizer."""

    eos_token_id: int | None
    eos_token: str | None
    chat_template: Any

    def __call__(self, text: Any, *, add_special_tokens: bool, return_attention_mask: bool, verbose: bool) -> Any: ...

    def apply_chat_template(self, conversation: Any, *, tokenize: bool, add_generation_prompt: bool) -> Any: ...


@dataclass(frozen=True)
class Lengths:
    """Quantiles of a length in tokens."""

    mean: float
    p50: float
    p90: float
    p99: float
    max: int

    @classmethod
    def of(cls, lengths: Sequence[int]) -> Lengths:
        p50, p90, p99 = (float(q) for q in np.quantile(lengths, (0.5, 0.9, 0.99)))
        return cls(float(np.mean(lengths)), p50, p90, p99, max(lengths))


@dataclass(frozen=True)
class TokenReport:
    """What tokenising found.

    Args:
        rows: records that came in.
        kept: examples that came out.
        dropped: the difference, by reason.
        prompts_truncated, prompt_tokens_cut: prompts cut on the left, and the tokens that went.
        completions_truncated, completion_tokens_cut: completions cut on the right (their EOS goes too), and the tokens.
        boundary_merges: records where the tokenizer merges the end of the prompt with the beginning of a completion, so
            that the end of the prompt is scored with the completions.
        lengths: of what came out, EOS included, by part: prompt; chosen and rejected; completion; completion 0, 1, … of
            rankings.
        length_baseline: in tokens, over pairs; None without pairs.
    """

    rows: int
    kept: int
    dropped: tuple[Dropped, ...]
    prompts_truncated: int
    prompt_tokens_cut: int
    completions_truncated: int
    completion_tokens_cut: int
    boundary_merges: int
    lengths: Mapping[str, Lengths]
    length_baseline: LengthBaseline | None

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Tokenized:
    """Examples in the order of their records, and the report."""

    examples: list[Example]
    report: TokenReport


def tokenize(
    records: Sequence[Record], tokenizer: Tokenizer, *, max_length: int, max_completion_length: int | None = None
) -> Tokenized:
    """Turns records into token ids.

    Text: the prompt is what the tokenisations of the prompt and of prompt + completion begin with, for all K
    completions; EOS is appended as an id; a BOS stands in front if the tokenizer adds one. Conversations: the same with
    the chat template's text; the completion ends with the template's end of turn, or with EOS if it has none.

    Truncation: completions are first cut on the right to `max_completion_length`; then the prompt is cut on the left to
    the room that the longest completion of the record leaves, so that all K share it. A leading BOS stays where there is
    room. Without `max_completion_length` a completion may take all but one token of `max_length`: set it when that
    would leave too little prompt (the report shows how many prompts were cut).

    Args:
        records: text or conversations.
        tokenizer: of transformers.
        max_length: limit for prompt + completion, in tokens; at least 2.
        max_completion_length: limit for a completion, EOS included; from 1 to max_length - 1.

    Raises:
        ConfigError: a limit out of range; a tokenizer without EOS, or without a chat template where one is needed.
        DataError: a prompt without any token, or no record left.
    """
    if max_length < 2:
        raise ConfigError(f"max_length is {max_length}; prompt and completion need at least one token each: give 2 or more.")
    limit = max_length - 1 if max_completion_length is None else max_completion_length
    if not 1 <= limit < max_length:
        raise ConfigError(
            f"max_completion_length is {limit}; it must be from 1 to max_length - 1 = {max_length - 1}, so that some prompt "
            "stays."
        )
    work = _Work(len(records), _eos_id(tokenizer), max_length, limit)
    rendered = list(_render(records, tokenizer, work))
    bos = _leading_special_ids(tokenizer) if any(isinstance(r.record.prompt, str) for r in rendered) else ()
    for row, prompt_ids, full_ids in _encode(rendered, tokenizer):
        lead = bos if isinstance(row.record.prompt, str) else ()
        example = work.example(row, [*lead, *prompt_ids], [[*lead, *ids] for ids in full_ids], len(lead))
        if example is not None:
            work.examples.append(example)
    if not work.examples:
        raise DataError(f"no record is left after tokenising. Left out: {describe_drops(work.drops.result())}.")
    return Tokenized(work.examples, work.report())


def check_vocabulary(examples: Iterable[Example], vocab_size: int) -> None:
    """Checks that every id has a row in the model's embedding.

    Args:
        examples: tokenised records.
        vocab_size: rows of the embedding.

    Raises:
        DataError: the first id that is out of range, with its record.
    """
    for example in examples:
        top = max(max(example.prompt_ids), *(max(ids) for ids in example.completion_ids))
        if top >= vocab_size:
            raise DataError(
                f"{example.id}: token id {top}, but the model's embedding has {vocab_size} rows. Use the model's own "
                "tokenizer, or resize the embedding."
            )


@dataclass(frozen=True)
class _Rendered:
    """A record as the texts to encode. `ended`: which texts end with the chat template's own end of turn."""

    record: Record
    prompt: str
    full: tuple[str, ...]
    ended: tuple[bool, ...]


class _Work:
    """Counts while examples are made."""

    def __init__(self, rows: int, eos: int, max_length: int, limit: int) -> None:
        self.rows, self.eos, self.max_length, self.limit = rows, eos, max_length, limit
        self.examples: list[Example] = []
        self.drops = DropCounter()
        self.merges = 0
        self.prompts_truncated = self.prompt_cut = self.completions_truncated = self.completion_cut = 0

    def example(self, row: _Rendered, prompt: list[int], full: list[list[int]], lead: int) -> Example | None:
        """Finds the boundary, ends and cuts. `lead`: how many special tokens the prompt begins with. None: dropped."""
        record = row.record
        if not prompt:
            raise DataError(
                f"{record.id}: the prompt has no token, and the tokenizer adds no BOS; a completion needs one before it."
            )
        boundary = min(common_prefix(prompt, ids) for ids in full)
        if boundary == 0:
            self.drops.add("the whole prompt merges with a completion", record.id)
            return None
        self.merges += boundary < len(prompt)
        completions = [ids[boundary:] for ids in full]
        completions = [
            ids if ended or ids[-1:] == [self.eos] else [*ids, self.eos]
            for ids, ended in zip(completions, row.ended, strict=True)
        ]
        if self._same(record, completions, "identical after tokenising"):
            return None
        cut = [ids[: self.limit] for ids in completions]
        if self._same(record, cut, "identical after truncation"):
            return None
        self.completions_truncated += sum(len(ids) > self.limit for ids in completions)
        self.completion_cut += sum(len(ids) - len(short) for ids, short in zip(completions, cut, strict=True))
        prompt = self._cut_prompt(prompt[:boundary], self.max_length - max(map(len, cut)), lead)
        return Example(record.id, tuple(prompt), tuple(map(tuple, cut)), record.labels)

    def _same(self, record: Record, completions: list[list[int]], reason: str) -> bool:
        same = record.labels.ranks is not None and len(completions) == 2 and completions[0] == completions[1]
        if same:
            self.drops.add(reason, record.id)
        return same

    def _cut_prompt(self, prompt: list[int], room: int, lead: int) -> list[int]:
        excess = len(prompt) - room
        if excess <= 0:
            return prompt
        self.prompts_truncated += 1
        self.prompt_cut += excess
        # Many models degrade without the BOS that they were trained with; it stays unless it would be all that stays.
        start = lead if lead < room else 0
        return prompt[:start] + prompt[start + excess :]

    def report(self) -> TokenReport:
        parts: dict[str, list[int]] = {"prompt": [len(example.prompt_ids) for example in self.examples]}
        for example in self.examples:
            for name, ids in zip(_part_names(example), example.completion_ids, strict=True):
                parts.setdefault(name, []).append(len(ids))
        pairs = ((len(e.completion_ids[0]), len(e.completion_ids[1])) for e in self.examples if e.labels.ranks == (0, 1))
        return TokenReport(
            rows=self.rows,
            kept=len(self.examples),
            dropped=self.drops.result(),
            prompts_truncated=self.prompts_truncated,
            prompt_tokens_cut=self.prompt_cut,
            completions_truncated=self.completions_truncated,
            completion_tokens_cut=self.completion_cut,
            boundary_merges=self.merges,
            lengths={name: Lengths.of(lengths) for name, lengths in parts.items()},
            length_baseline=LengthBaseline.of(pairs),
        )


def _part_names(example: Example) -> tuple[str, ...]:
    if example.labels.ranks == (0, 1):
        return ("chosen", "rejected")
    count = len(example.completion_ids)
    return ("completion",) if count == 1 else tuple(f"completion {i}" for i in range(count))


def _eos_id(tokenizer: Tokenizer) -> int:
    if tokenizer.eos_token_id is None:
        raise ConfigError(
            "the tokenizer has no EOS token, so no completion could end; set tokenizer.eos_token to the token that ends a text."
        )
    return tokenizer.eos_token_id


def _ids(tokenizer: Tokenizer, texts: list[str], *, special: bool = False) -> list[list[int]]:
    # verbose=False: lengths are checked here, so the tokenizer's warning about its own maximum says nothing new.
    encoded = tokenizer(texts, add_special_tokens=special, return_attention_mask=False, verbose=False)
    return list(encoded["input_ids"])


def _leading_special_ids(tokenizer: Tokenizer) -> tuple[int, ...]:
    """What the tokenizer puts before a text (BOS or nothing). What it puts behind is not used: EOS is appended here."""
    plain, special = _ids(tokenizer, ["a"])[0], _ids(tokenizer, ["a"], special=True)[0]
    starts = [i for i in range(len(special) - len(plain) + 1) if special[i : i + len(plain)] == plain]
    if not plain or not starts:
        raise ConfigError(
            "the tokenizer encodes a text differently when it adds special tokens, so the prompt's beginning is unknown."
        )
    return tuple(special[: starts[0]])


def _encode(rows: list[_Rendered], tokenizer: Tokenizer) -> Iterator[tuple[_Rendered, list[int], list[list[int]]]]:
    """(row, prompt ids, ids of prompt + completion for each completion), without special tokens of the tokenizer's own."""
    if not rows:
        return
    ids = iter(_ids(tokenizer, [text for row in rows for text in (row.prompt, *row.full)]))
    for row in rows:
        yield row, next(ids), [next(ids) for _ in row.full]


def _render(records: Sequence[Record], tokenizer: Tokenizer, work: _Work) -> Iterator[_Rendered]:
    ending: str | None = None
    for record in records:
        if isinstance(record.prompt, str):
            full = tuple(record.prompt + str(text) for text in record.completions)
            yield _Rendered(record, record.prompt, full, (False,) * len(full))
            continue
        if ending is None:
            ending = _end_of_turn(tokenizer, record.id)
        try:
            prompt = tokenizer.apply_chat_template(list(record.prompt), tokenize=False, add_generation_prompt=True)
            whole = [_conversation(tokenizer, record.prompt, text, ending) for text in record.completions]
        except _template_errors() as error:
            work.drops.add(f"the chat template refuses the conversation: {safe(error, 80)}", record.id)
            continue
        yield _Rendered(record, prompt, tuple(text for text, _ in whole), tuple(ended for _, ended in whole))


def _conversation(tokenizer: Tokenizer, prompt: tuple[Message, ...], completion: Any, ending: str) -> tuple[str, bool]:
    """A whole conversation as text, and whether the template ended it.

    What templates write behind the end of turn is white space; it is cut off, since generation stops before it.
    """
    text: str = tokenizer.apply_chat_template([*prompt, *completion], tokenize=False, add_generation_prompt=False)
    if ending.strip() and text.rstrip().endswith(ending.strip()):
        return text.rstrip(), True
    return text.removesuffix(ending), False


def _end_of_turn(tokenizer: Tokenizer, record_id: str) -> str:
    """What the chat template writes behind an assistant message, found by rendering one."""
    if not tokenizer.chat_template:
        raise ConfigError(
            f"{record_id} is a conversation, but the tokenizer has no chat template. Use a chat model's tokenizer, set "
            "tokenizer.chat_template, or give the data as text."
        )
    marker = "prefopt"
    messages = [Message(role="user", content="Hi"), Message(role="assistant", content=marker)]
    text: str = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=False)
    _, found, ending = text.rpartition(marker)
    if not found:
        raise ConfigError(
            "the tokenizer's chat template does not write what the assistant says; it cannot be used for training."
        )
    return ending


def _template_errors() -> tuple[type[Exception], ...]:
    # jinja2 is what transformers renders templates with; TypeError and ValueError come from a template's own arithmetic.
    from jinja2 import TemplateError

    return (TemplateError, TypeError, ValueError)
