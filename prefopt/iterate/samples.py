"""A round's samples: drawn from the policy as it is, written once with where they came from. K completions of a prompt."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from prefopt.data.records import Example, Text
from prefopt.errors import DataError, OutputError
from prefopt.files import parse_json
from prefopt.generate import Decoding, generate
from prefopt.iterate.folder import write_lines
from prefopt.models.causal_lm import CausalLMPolicy
from prefopt.models.fingerprint import fingerprint
from prefopt.streams import epoch_order
from prefopt.tasks import Training

FILE = "samples.jsonl"
# Rounds in which equal samples are drawn again; a prompt that needs more is left out.
_ATTEMPTS = 20


@dataclass(frozen=True)
class Row:
    """A prompt with K different completions that are labelled together.

    Args:
        id: `round-01:17`, unique in a loop.
        prompt_id: of the task's row that the prompt was taken from.
        prompt: text or conversation.
        completions: K texts without EOS.
        prompt_ids: tokens.
        completion_ids: K sequences of tokens, EOS included where it was drawn.
    """

    id: str
    prompt_id: str
    prompt: Text
    completions: tuple[str, ...]
    prompt_ids: tuple[int, ...]
    completion_ids: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Origin:
    """Where samples came from; stands in every line, so that a line says it wherever it is copied to.

    Args:
        policy: hash of the policy's trainable weights (`policy_hash`).
        temperature, top_p, max_new_tokens: of sampling.
        seed: of the draws.
    """

    policy: str
    temperature: float
    top_p: float
    max_new_tokens: int
    seed: int


def policy_hash(policy: CausalLMPolicy) -> str:
    """The content of a policy's trainable weights (its adapters' under LoRA), heads included; 16 hex digits."""
    return fingerprint(SimpleNamespace(config=SimpleNamespace(to_dict=dict), state_dict=policy.trainable_state))


def choose_prompts(training: Training, count: int, number: int, seed: int) -> list[Example]:
    """The prompts of round `number` (from 1): the next `count` rows in the seed's order of epochs."""
    rows = training.examples
    chosen: list[Example] = []
    position = (number - 1) * count
    while len(chosen) < count:
        epoch, begin = divmod(position + len(chosen), len(rows))
        order = epoch_order(len(rows), seed, epoch)
        chosen += [rows[i] for i in order[begin : begin + count - len(chosen)]]
    return chosen


def draw_rows(
    policy: CausalLMPolicy,
    prompts: Sequence[Example],
    texts: Mapping[str, Text],
    origin: Origin,
    *,
    samples: int,
    eos_ids: Sequence[int],
    name: str,
    on_progress: Callable[[int, int], None] | None = None,
) -> list[Row]:
    """Rows of different completions, in the order of their prompts; a prompt whose samples stay equal is left out.

    Completions that differ in white space alone are equal: nobody could prefer one. They are drawn again together, so the
    completions of a row are independent samples given that they differ.

    Args:
        texts: prompts as text by the id of their example.
        samples: K.
        name: of the round; begins the ids.

    Raises:
        DataError: no prompt has different samples: the policy has collapsed.
    """
    policy.train(False)
    decoding = Decoding(origin.max_new_tokens, origin.temperature, origin.top_p)
    generator = torch.Generator().manual_seed(origin.seed)
    found: dict[int, Row] = {}
    for _ in range(_ATTEMPTS):
        missing = [i for i in range(len(prompts)) if i not in found]
        if not missing:
            break
        drawn = generate(
            policy, [prompts[i].prompt_ids for i in missing], decoding, generator, eos_ids=eos_ids, samples_per_prompt=samples,
            on_progress=on_progress,
        )  # fmt: skip
        for place, i in enumerate(missing):
            own = [sample.ids for sample in drawn[place * samples : (place + 1) * samples]]
            said = tuple(policy.tokenizer.decode(ids, skip_special_tokens=True) for ids in own)
            if len({text.strip() for text in said}) == samples:
                prompt = prompts[i]
                found[i] = Row(f"{name}:{i + 1}", prompt.id, texts[prompt.id], said, tuple(prompt.prompt_ids), tuple(own))
    if not found:
        raise DataError(
            f"{name}: the {samples} samples of each of {len(prompts)} prompts were equal {_ATTEMPTS} times, so nothing can be "
            "compared. The policy has collapsed: train it less, raise --temperature, or start from another model."
        )
    return [found[i] for i in sorted(found)]


def write_rows(folder: Path, rows: Sequence[Row], origin: Origin) -> None:
    """folder/samples.jsonl, whole or not at all."""
    write_lines(folder / FILE, [{**asdict(row), "sampling": asdict(origin)} for row in rows])


def read_rows(folder: Path, origin: Origin | None = None) -> list[Row]:
    """The inverse.

    Args:
        origin: what the samples must have been drawn from; None takes them as they are.

    Raises:
        OutputError: the file cannot be read, or holds samples of another policy or other draws.
    """
    path = folder / FILE
    rows = []
    for number, text in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            line: dict[str, Any] = parse_json(text)
            own = Origin(**line["sampling"])
            prompt = line["prompt"] if isinstance(line["prompt"], str) else tuple(line["prompt"])
            ids = tuple(map(tuple, line["completion_ids"]))
            rows.append(Row(line["id"], line["prompt_id"], prompt, tuple(line["completions"]), tuple(line["prompt_ids"]), ids))
        except (ValueError, KeyError, TypeError) as error:
            raise OutputError(f"{path}:{number}: not a row of samples ({error}). Restore it, or delete {folder}.") from error
        if origin is not None and own != origin:
            raise OutputError(
                f"{path}:{number}: drawn from {own}, but this run is at {origin}. Another machine or version gives other "
                f"weights: go on where the loop began, or delete {folder}."
            )
    return rows
