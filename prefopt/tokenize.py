"""From records to token ids: the boundary between prompt and completion, EOS, truncation, and a report of all three.

K completions share one prompt, token for token. What is scored is decided here by position: `Example.completion_ids`
holds the scored tokens and nothing else, so nothing later looks for pad or EOS ids (they are often the same id).
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import Any, Protocol

from prefopt.data.read_report import DropCounter, LengthCounter, describe_drops
from prefopt.data.records import Example, Message, Record
from prefopt.data.rows import common_prefix, safe
from prefopt.data.token_report import Lengths, TokenReport
from prefopt.errors import ConfigError, DataError

BATCH = 1_000
"""Records that are encoded in one call: enough for the tokenizer's threads, a few megabytes of ids."""


class Tokenizer(Protocol):
    """What is used of a transformers tokenizer."""

    eos_token_id: int | None
    eos_token: str | None
    chat_template: Any

    def __call__(self, text: Any, *, add_special_tokens: bool, return_attention_mask: bool, verbose: bool) -> Any: ...

    def apply_chat_template(self, conversation: Any, *, tokenize: bool, add_generation_prompt: bool) -> Any: ...


@dataclass(frozen=True)
class Tokenized:
    """Examples in the order of their records, and the report."""

    examples: Sequence[Example]
    report: TokenReport


def tokenize(
    records: Sequence[Record], tokenizer: Tokenizer, *, max_length: int, max_completion_length: int | None = None
) -> Tokenized:
    """Turns records into token ids, in memory; `prefopt.data.token_store` keeps them on disk. See `Tokenizing`."""
    work = Tokenizing(tokenizer, max_length=max_length, max_completion_length=max_completion_length)
    return Tokenized(list(work.examples(records)), work.report())


class Tokenizing:
    """Turns records into token ids, batch by batch: memory holds one batch and four bytes per sequence for the report.

    Text: the prompt is what the tokenisations of the prompt and of prompt + completion begin with, for all K
    completions; EOS is appended as an id; a BOS stands in front if the tokenizer adds one. Conversations: the same with
    the chat template's text; the completion ends with the template's end of turn, or with EOS if it has none.

    Truncation: completions are first cut on the right to `max_completion_length`; then the prompt is cut on the left to
    the room that the longest completion of the record leaves, so that all K share it. A leading BOS stays where there is
    room. Without `max_completion_length` a completion may take all but one token of `max_length`: set it when that
    would leave too little prompt (the report shows how many prompts were cut).

    Args:
        tokenizer: of transformers.
        max_length: limit for prompt + completion, in tokens; at least 2.
        max_completion_length: limit for a completion, EOS included; from 1 to max_length - 1.

    Raises:
        ConfigError: a limit out of range, or a tokenizer without EOS.
    """

    def __init__(self, tokenizer: Tokenizer, *, max_length: int, max_completion_length: int | None = None) -> None:
        if max_length < 2:
            raise ConfigError(
                f"max_length is {max_length}; prompt and completion need at least one token each: give 2 or more."
            )
        limit = max_length - 1 if max_completion_length is None else max_completion_length
        if not 1 <= limit < max_length:
            raise ConfigError(
                f"max_completion_length is {limit}; it must be from 1 to max_length - 1 = {max_length - 1}, so that some "
                "prompt stays."
            )
        self._tokenizer, self._eos, self._max_length, self._limit = tokenizer, _eos_id(tokenizer), max_length, limit
        self._ending: str | None = None
        self._bos: tuple[int, ...] | None = None
        self._rows = self._merges = 0
        self._prompts_truncated = self._prompt_cut = self._completions_truncated = self._completion_cut = 0
        self._drops = DropCounter()
        self._lengths: dict[str, array[int]] = {}
        self._baseline = LengthCounter()

    def examples(self, records: Sequence[Record], on_progress: Callable[[int, int], None] | None = None) -> Iterator[Example]:
        """Examples in the order of their records. While one batch becomes examples, the next is encoded in a thread.

        Args:
            records: text or conversations; read once, in order.
            on_progress: called with (done, total) records.

        Raises:
            ConfigError: conversations, but the tokenizer has no chat template.
            DataError: a prompt without any token, or no record left.
        """
        kept = 0
        source = iter(records)
        with ThreadPoolExecutor(1) as thread:
            waiting: tuple[list[_Rendered], Future[list[list[int]]]] | None = None
            while True:
                batch = list(islice(source, BATCH))
                rendered = self._render(batch)
                following = (rendered, thread.submit(self._encode, rendered)) if batch else None
                for row, ids in _grouped(waiting):
                    example = self._example(row, ids)
                    if example is not None:
                        kept += 1
                        yield example
                if waiting is not None and on_progress is not None:
                    on_progress(self._rows - len(batch), len(records))
                if following is None:
                    break
                waiting = following
        if not kept:
            raise DataError(f"no record is left after tokenising. Left out: {describe_drops(self._drops.result())}.")

    def report(self) -> TokenReport:
        """Counts over all examples so far."""
        return TokenReport(
            rows=self._rows,
            kept=len(self._lengths.get("prompt", ())),
            dropped=self._drops.result(),
            prompts_truncated=self._prompts_truncated,
            prompt_tokens_cut=self._prompt_cut,
            completions_truncated=self._completions_truncated,
            completion_tokens_cut=self._completion_cut,
            boundary_merges=self._merges,
            lengths={name: Lengths.of(lengths) for name, lengths in self._lengths.items()},
            length_baseline=self._baseline.result(),
        )

    def _render(self, records: Sequence[Record]) -> list[_Rendered]:
        """Records as texts; those that the chat template refuses are dropped."""
        self._rows += len(records)
        rendered = []
        for record in records:
            if isinstance(record.prompt, str):
                full = tuple(record.prompt + str(text) for text in record.completions)
                rendered.append(_Rendered(record, record.prompt, full, (False,) * len(full)))
                continue
            if self._ending is None:
                self._ending = _end_of_turn(self._tokenizer, record.id)
            try:
                prompt = self._tokenizer.apply_chat_template(list(record.prompt), tokenize=False, add_generation_prompt=True)
                whole = [_conversation(self._tokenizer, record.prompt, text, self._ending) for text in record.completions]
            except _template_errors() as error:
                self._drops.add(f"the chat template refuses the conversation: {safe(error, 80)}", record.id)
                continue
            rendered.append(_Rendered(record, prompt, tuple(text for text, _ in whole), tuple(ended for _, ended in whole)))
        return rendered

    def _encode(self, rows: Sequence[_Rendered]) -> list[list[int]]:
        """Ids of prompt, prompt + completion 0, … of every row, with the BOS of texts."""
        if not rows:
            return []
        if self._bos is None and any(isinstance(row.record.prompt, str) for row in rows):
            self._bos = _leading_special_ids(self._tokenizer)
        ids = _ids(self._tokenizer, [text for row in rows for text in (row.prompt, *row.full)])
        if self._bos:
            leads = [self._lead(row) for row in rows for _ in (row.prompt, *row.full)]
            return [[*lead, *own] for lead, own in zip(leads, ids, strict=True)]
        return ids

    def _lead(self, row: _Rendered) -> tuple[int, ...]:
        """The special tokens that a row begins with: a chat template writes its own."""
        return self._bos or () if isinstance(row.record.prompt, str) else ()

    def _example(self, row: _Rendered, encoded: list[list[int]]) -> Example | None:
        """Finds the boundary, ends and cuts; None when the row is dropped. `encoded`: of the prompt and each whole text."""
        record = row.record
        prompt, *full = encoded
        if not prompt:
            raise DataError(
                f"{record.id}: the prompt has no token, and the tokenizer adds no BOS; a completion needs one before it."
            )
        boundary = min(common_prefix(prompt, ids) for ids in full)
        if boundary == 0:
            self._drops.add("the whole prompt merges with a completion", record.id)
            return None
        self._merges += boundary < len(prompt)
        completions = [ids[boundary:] for ids in full]
        completions = [
            ids if ended or ids[-1:] == [self._eos] else [*ids, self._eos]
            for ids, ended in zip(completions, row.ended, strict=True)
        ]
        if self._same(record, completions, "identical after tokenising"):
            return None
        cut = [ids[: self._limit] for ids in completions]
        if self._same(record, cut, "identical after truncation"):
            return None
        self._completions_truncated += sum(len(ids) > self._limit for ids in completions)
        self._completion_cut += sum(len(ids) - len(short) for ids, short in zip(completions, cut, strict=True))
        prompt = self._cut_prompt(prompt[:boundary], self._max_length - max(map(len, cut)), len(self._lead(row)))
        example = Example(record.id, tuple(prompt), tuple(map(tuple, cut)), record.labels)
        self._measure(example)
        return example

    def _same(self, record: Record, completions: list[list[int]], reason: str) -> bool:
        same = record.labels.ranks is not None and len(completions) == 2 and completions[0] == completions[1]
        if same:
            self._drops.add(reason, record.id)
        return same

    def _cut_prompt(self, prompt: list[int], room: int, lead: int) -> list[int]:
        excess = len(prompt) - room
        if excess <= 0:
            return prompt
        self._prompts_truncated += 1
        self._prompt_cut += excess
        # Many models degrade without the BOS that they were trained with; it stays unless it would be all that stays.
        start = lead if lead < room else 0
        return prompt[:start] + prompt[start + excess :]

    def _measure(self, example: Example) -> None:
        lengths = [len(ids) for ids in example.completion_ids]
        for name, length in zip(("prompt", *_part_names(example)), (len(example.prompt_ids), *lengths), strict=True):
            self._lengths.setdefault(name, array("I")).append(length)
        if example.labels.ranks == (0, 1):
            self._baseline.add(*lengths)


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


def _grouped(encoded: tuple[list[_Rendered], Future[list[list[int]]]] | None) -> Iterator[tuple[_Rendered, list[list[int]]]]:
    """Each row with its own ids, once they are there."""
    if encoded is None:
        return
    rows, future = encoded
    ids = iter(future.result())
    for row in rows:
        yield row, list(islice(ids, 1 + len(row.full)))


def _conversation(tokenizer: Tokenizer, prompt: tuple[Message, ...], completion: Any, ending: str) -> tuple[str, bool]:
    """A whole conversation as text, and whether the template ended it.

    What templates write behind the end of turn is white space; it is cut off, since generation stops before it.
    """
    text: str = tokenizer.apply_chat_template([*prompt, *completion], tokenize=False, add_generation_prompt=False)
    if ending.strip() and text.rstrip().endswith(ending.strip()):
        return text.rstrip(), True
    return text.removesuffix(ending), False


_MARKER = "prefopt"
_PROBE = [Message(role="user", content="Hi"), Message(role="assistant", content=_MARKER)]


def probe(tokenizer: Tokenizer) -> tuple[list[int], str]:
    """What a tokenizer makes of a word, and its chat template of a conversation ("" where it has none or refuses)."""
    ids = _ids(tokenizer, [_MARKER], special=True)[0]
    if not tokenizer.chat_template:
        return ids, ""
    try:
        return ids, tokenizer.apply_chat_template(_PROBE, tokenize=False, add_generation_prompt=False)
    except _template_errors():
        return ids, ""


def _end_of_turn(tokenizer: Tokenizer, record_id: str) -> str:
    """What the chat template writes behind an assistant message, found by rendering one."""
    if not tokenizer.chat_template:
        raise ConfigError(
            f"{record_id} is a conversation, but the tokenizer has no chat template. Use a chat model's tokenizer, set "
            "tokenizer.chat_template, or give the data as text."
        )
    text: str = tokenizer.apply_chat_template(_PROBE, tokenize=False, add_generation_prompt=False)
    _, found, ending = text.rpartition(_MARKER)
    if not found:
        raise ConfigError(
            "the tokenizer's chat template does not write what the assistant says; it cannot be used for training."
        )
    return ending


def _template_errors() -> tuple[type[Exception], ...]:
    # jinja2 is what transformers renders templates with; TypeError and ValueError come from a template's own arithmetic.
    from jinja2 import TemplateError

    return (TemplateError, TypeError, ValueError)
