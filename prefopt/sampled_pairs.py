"""Preference pairs that are two samples of a policy, labelled by a known reward. P pairs.

Samples are kept on disk by content, without labels: label models share them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import Tensor

from prefopt.data.exact_world.labels import LabelModel
from prefopt.data.records import Example, Labels
from prefopt.data.store_files import content_address, new_folder, open_folder
from prefopt.errors import DataError
from prefopt.generate import Decoding, generate
from prefopt.models.causal_lm import CausalLMPolicy
from prefopt.models.fingerprint import fingerprint

_FILE = "pairs.jsonl"
# Rounds in which equal samples are drawn again; a policy that needs more has collapsed.
_ROUNDS = 20
_COINS = 1


@dataclass(frozen=True)
class Prompt:
    """A prompt as text and as tokens; `id` names it within its data set."""

    id: str
    text: str
    ids: tuple[int, ...]


@dataclass(frozen=True)
class SampledPair:
    """Two different completions of a prompt: `prompt` is its place among the prompts, `texts` are without EOS."""

    prompt: int
    ids: tuple[tuple[int, ...], tuple[int, ...]]
    texts: tuple[str, str]


def sampled_pairs(
    policy: CausalLMPolicy,
    prompts: Sequence[Prompt],
    count: int,
    decoding: Decoding,
    *,
    eos_ids: Sequence[int],
    seed: int,
    cache: Path,
    console: Console | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> list[SampledPair]:
    """`count` pairs: a uniformly drawn prompt, and two samples of it that differ; from the cache where they were drawn before.

    Args:
        policy: with its adapter as it stands.
        prompts: to draw from, with replacement.
        decoding: temperature and limit.
        eos_ids: tokens that end a completion.
        seed: of prompts and samples.
        cache: folder of all caches.
        console: for a message when the cache is damaged.
        on_progress: called with (done, total) samples.

    Raises:
        DataError: two samples of a prompt stay equal: the policy has collapsed.
    """
    address = content_address(
        fingerprint(policy.model), [p.ids for p in prompts], [count, seed, *eos_ids], asdict(decoding), "pairs 1"
    )
    folder = cache / "sampled" / address
    if open_folder(folder, "sampled pairs", console) is None:
        drawn = _draw(policy, prompts, count, decoding, eos_ids, seed, on_progress)
        with new_folder(folder) as draft:
            (draft.path / _FILE).write_text("".join(json.dumps(row) + "\n" for row in drawn), encoding="utf-8")
            draft.facts = {"pairs": count}
    with (folder / _FILE).open(encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    decode = partial(policy.tokenizer.decode, skip_special_tokens=True)
    return [
        SampledPair(row["prompt"], (tuple(one), tuple(other)), (decode(one), decode(other)))
        for row in rows
        for one, other in [row["ids"]]
    ]


def _draw(
    policy: CausalLMPolicy,
    prompts: Sequence[Prompt],
    count: int,
    decoding: Decoding,
    eos_ids: Sequence[int],
    seed: int,
    on_progress: Callable[[int, int], None] | None,
) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(seed)
    places = torch.randint(len(prompts), (count,), generator=generator).tolist()
    ids: dict[int, list[tuple[int, ...]]] = {}
    for _ in range(_ROUNDS):
        missing = [row for row in range(count) if row not in ids]
        if not missing:
            return [{"prompt": place, "ids": ids[row]} for row, place in enumerate(places)]
        drawn = generate(
            policy, [prompts[places[row]].ids for row in missing], decoding, generator, eos_ids=eos_ids, samples_per_prompt=2,
            on_progress=on_progress,
        )  # fmt: skip
        sides = zip(missing, drawn[::2], drawn[1::2], strict=True)
        ids |= {row: [one.ids, other.ids] for row, one, other in sides if one.ids != other.ids}
    row = next(row for row in range(count) if row not in ids)
    raise DataError(
        f"prompt {prompts[places[row]].id}: its two samples were equal {_ROUNDS} times. The policy has collapsed: train the "
        "start less, or raise max_completion_length."
    )


def label_pairs(
    pairs: Sequence[SampledPair], prompts: Sequence[Prompt], rewards: Tensor, labels: LabelModel, *, seed: int, name: str
) -> list[Example]:
    """Pairs as examples, the preferred completion first.

    Args:
        pairs: P.
        prompts: that the pairs were drawn from.
        rewards: [P, 2] of the first and the second sample.
        labels: how a reward gap becomes a label.
        seed: of the labels.
        name: of the data set; begins the ids.
    """
    gaps = (rewards[:, 0] - rewards[:, 1]).double()
    if labels.name == "soft":
        first_wins, soft = gaps >= 0, labels.probability(gaps.abs(), torch.zeros_like(gaps)).tolist()
    else:
        longer = torch.tensor([len(pair.ids[0]) - len(pair.ids[1]) for pair in pairs], dtype=torch.float64)
        # A stream of its own: from the samples' generator, coins would go with prompts.
        coins = torch.from_numpy(np.random.default_rng((seed, _COINS)).random(len(pairs)))
        first_wins, soft = coins < labels.probability(gaps, longer), [None] * len(pairs)
    return [
        Example(
            f"{name}:{row}", prompts[pair.prompt].ids, pair.ids if first else pair.ids[::-1],
            Labels(ranks=(0, 1), soft_label=probability),
        )
        for row, (pair, first, probability) in enumerate(zip(pairs, first_wins.tolist(), soft, strict=True))
    ]  # fmt: skip
