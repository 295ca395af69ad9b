"""Win rates of a text comparison: samples against the reference's and the data's chosen completions, by every judge."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from prefopt.data.records import Example, Text
from prefopt.files import write_json
from prefopt.generate import Decoding, generate
from prefopt.judges import PairJudge, judge_samples
from prefopt.judges.lengths import token_length
from prefopt.models.causal_lm import CausalLMPolicy
from prefopt.report.schema import Metric, PromptRow
from prefopt.stages import content_key, examples_key

CHOSEN, REFERENCE = "chosen", "reference"
_FORMAT = ".1%"


def win_key(opponent: str, judge: str, temperature: float = 1.0, *, controlled: bool = False) -> str:
    """The metric of a win rate; it ends in the judge's name, by which the report finds the judge's record."""
    at = "" if temperature == 1 else f"@{temperature:g}"
    return f"win{at}_{opponent}{'_lc' if controlled else ''}/{judge}"


def win_metrics(judges: Sequence[str], temperatures: Sequence[float]) -> tuple[Metric, ...]:
    """The columns of `Contest.measure`."""
    made = []
    for judge in judges:
        for temperature in temperatures:
            at = "" if temperature == 1 else f" at temperature {temperature:g}"
            for opponent in (REFERENCE, CHOSEN):
                label, what = f"wins over {opponent}, {judge}{at}", f"samples preferred to {_WORDS[opponent]}{at}"
                made.append(Metric(win_key(opponent, judge, temperature), label, "up", _FORMAT, note=what))
            key = win_key(REFERENCE, judge, temperature, controlled=True)
            note = f"samples preferred to {_WORDS[REFERENCE]}{at}, at equal lengths (a logistic regression on the log ratio)"
            made.append(Metric(key, f"wins over reference at equal length, {judge}{at}", "up", _FORMAT, note=note))
    return tuple(made)


_WORDS = {REFERENCE: "the reference's on the same prompts", CHOSEN: "the data's chosen completions, cut at the samples' limit"}


@dataclass(frozen=True)
class Contest:
    """What samples are measured against.

    Args:
        prompts: N test prompts, tokenised.
        texts: N, the same as text.
        chosen: N completions that people preferred, cut at the samples' limit.
        judges: by name.
        max_new_tokens: the limit.
        eos_ids: tokens that end a completion.
        cache: folder of the reference's samples.
        reference_key: content address of the reference's weights and tokenizer.
    """

    prompts: Sequence[Example]
    texts: Sequence[Text]
    chosen: Sequence[str]
    judges: Mapping[str, PairJudge]
    max_new_tokens: int
    eos_ids: Sequence[int]
    cache: Path
    reference_key: str

    def measure(
        self,
        policy: CausalLMPolicy,
        reference: Callable[[], CausalLMPolicy],
        samples: Sequence[str],
        temperatures: Sequence[float],
        seed: int,
    ) -> tuple[dict[str, float], list[PromptRow]]:
        """Every win rate, and a row for each judge, opponent and prompt at temperature 1.

        Args:
            policy: whose samples are drawn at the temperatures other than 1.
            reference: makes the reference, where its samples are not in the cache.
            samples: N completions of the policy at temperature 1.
            temperatures: 0 takes the most likely tokens.
            seed: of the draws; all policies of a seed share them.
        """
        found: dict[str, float] = {}
        rows: list[PromptRow] = []
        for temperature in temperatures:
            ours = samples if temperature == 1 else self.sample(policy, temperature, seed)
            own, own_rows = self.compare(ours, reference, temperature, seed, policy.tokenizer)
            found |= own
            rows += own_rows if temperature == 1 else []
        return found, rows

    def compare(
        self, ours: Sequence[str], reference: Callable[[], CausalLMPolicy], temperature: float, seed: int, tokenizer: Any
    ) -> tuple[dict[str, float], list[PromptRow]]:
        """The win rates of N completions, wherever they come from, against opponents at this temperature; and their rows."""
        found: dict[str, float] = {}
        rows: list[PromptRow] = []
        opponents = {REFERENCE: self.reference_samples(reference, temperature, seed), CHOSEN: self.chosen}
        for opponent, theirs in opponents.items():
            judged = judge_samples(self.judges, self.texts, ours, theirs, length=token_length(tokenizer), unit="tokens")
            for judge, verdicts in judged.verdicts.items():
                summary, name = judged.summary(judge), win_key(opponent, judge, temperature)
                found[name] = summary.win_rate.rate
                if opponent == REFERENCE and summary.length_controlled is not None:
                    found[win_key(opponent, judge, temperature, controlled=True)] = summary.length_controlled.rate
                columns = (self.prompts, verdicts.shares.tolist(), judged.lengths[:, 0].tolist())
                rows += [
                    PromptRow("", seed, prompt.id, name, share, length=float(length))
                    for prompt, share, length in zip(*columns, strict=True)
                ]
        return found, rows

    def only(self, places: Sequence[int]) -> Contest:
        """The contest on some of its prompts."""
        return replace(
            self,
            prompts=[self.prompts[i] for i in places],
            texts=[self.texts[i] for i in places],
            chosen=[self.chosen[i] for i in places],
        )

    def sample(self, policy: CausalLMPolicy, temperature: float, seed: int) -> list[str]:
        """N completions."""
        drawn = generate(
            policy, [prompt.prompt_ids for prompt in self.prompts], Decoding(self.max_new_tokens, temperature),
            torch.Generator().manual_seed(seed), eos_ids=self.eos_ids,
        )  # fmt: skip
        return [policy.tokenizer.decode(sample.ids, skip_special_tokens=True) for sample in drawn]

    def reference_samples(self, reference: Callable[[], CausalLMPolicy], temperature: float, seed: int) -> list[str]:
        """The reference's completions: drawn once for all cells of a seed."""
        key = content_key(
            "reference samples", self.reference_key, examples_key(self.prompts), self.max_new_tokens, temperature, seed
        )
        file = self.cache / "samples" / f"{key}.json"
        if file.exists():
            return list(json.loads(file.read_text(encoding="utf-8")))
        texts = self.sample(reference(), temperature, seed)
        write_json(file, texts)
        return texts
