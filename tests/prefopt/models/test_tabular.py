"""The table: at the reference to the last digit, the distribution that it says, free where it trains, and one policy of the
protocol like any other."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from prefopt import algorithms
from prefopt.cell import run_cell
from prefopt.data.exact_world import ExactWorld, WorldConfig, expected, kl
from prefopt.data.records import Example
from prefopt.errors import ConfigError
from prefopt.generate import Decoding, generate
from prefopt.models.tabular import TabularPolicy, build_tabular
from prefopt.optimization import Optimization
from prefopt.options import DataOptions, EvaluationOptions, ModelOptions, Options
from prefopt.packing import Sampling, flat_roles, pack
from prefopt.reference import ReferenceCache
from prefopt.streams import Budget
from prefopt.tasks.exact import TABULAR, ExactTask

WORLD = ExactWorld(WorldConfig.tabular(seed=3))
LAYOUT = WORLD.layout
EOS = LAYOUT.eos


def every_completion(prompts: int = len(WORLD.prompts)) -> list[Example]:
    """All completions of each prompt as one group."""
    ids = [tuple(row[:length]) for row, length in zip(LAYOUT.ids.tolist(), LAYOUT.lengths.tolist(), strict=True)]
    return [Example(f"prompt:{g}", WORLD.prompt_ids[g], tuple(ids)) for g in range(prompts)]


def shaken(heads: tuple[str, ...] = ()) -> TabularPolicy:
    """A policy away from its start."""
    policy, _ = build_tabular(WORLD, WORLD.source_next_logps, heads=heads)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        policy.logits += torch.randn(policy.logits.shape, generator=generator, dtype=torch.float64)
        if policy.values is not None:
            policy.values += torch.randn(policy.values.shape, generator=generator, dtype=torch.float64)
    return policy


def test_it_starts_at_the_reference_and_the_reference_stays() -> None:
    policy, reference = build_tabular(WORLD, WORLD.source_next_logps)
    batch = pack(every_completion(), roles=flat_roles, dtype=torch.float64)
    own = policy.rows(batch, ["token_logps", "policy_kls"], reference=reference)
    assert torch.equal(own["token_logps"], reference.token_logps(batch))
    assert own["policy_kls"].abs().max() < 1e-12
    logps = LAYOUT.path_sums(WORLD.source_next_logps)
    assert kl(WORLD.sequence_logps(policy.next_logps()), logps).abs().max() < 1e-14
    before = reference.token_logps(batch)
    with torch.no_grad():
        policy.logits.mul_(0.5)
    assert torch.equal(reference.token_logps(batch), before)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probs_of_packed_groups_are_those_of_the_table(temperature: float) -> None:
    policy = shaken()
    batch = pack(every_completion(), roles=flat_roles, dtype=torch.float64, sampling=Sampling(temperature))
    found = policy.rows(batch, ["token_logps", "entropies"])
    table = (policy.logits / temperature).log_softmax(-1).unflatten(0, (len(WORLD.prompts), -1))
    assert torch.allclose(found["token_logps"].view(len(WORLD.prompts), -1, LAYOUT.limit), LAYOUT.path_values(table))
    entropy = -(table.exp() * table).sum(-1)
    expected_rows = entropy[:, LAYOUT.prefix_of_token] * LAYOUT.mask
    assert torch.allclose(found["entropies"].view_as(expected_rows), expected_rows)


def test_a_value_stands_before_each_token() -> None:
    policy = shaken(heads=("value",))
    assert policy.values is not None
    batch = pack(every_completion(2), roles=flat_roles, dtype=torch.float64)
    found = policy.rows(batch, ["values"])["values"].view(2, -1, LAYOUT.limit)
    table = policy.values.unflatten(0, (len(WORLD.prompts), -1)).squeeze(-1)
    assert torch.equal(found, table[:2, LAYOUT.prefix_of_token] * LAYOUT.mask)
    (gradient,) = torch.autograd.grad(found.sum(), policy.values)
    assert gradient.sum() == 2 * LAYOUT.mask.sum()


def test_the_gradient_is_one_hot_minus_probabilities_at_the_visited_prefixes() -> None:
    """d log p(a | s) / d logits = e_a - p, and nothing elsewhere: completion (1, EOS) of prompt 2 visits two prefixes."""
    policy = shaken()
    batch = pack([Example("x", WORLD.prompt_ids[2], ((1, EOS),))], roles=flat_roles, dtype=torch.float64)
    policy.rows(batch, ["token_logps"])["token_logps"].sum().backward()
    gradient = policy.logits.grad
    assert gradient is not None
    rows = 2 * LAYOUT.prefixes + torch.tensor([0, 1 + 1])  # the empty prefix; then "b", the second of length 1
    wanted = torch.zeros_like(gradient)
    wanted[rows] = -policy.logits[rows].softmax(-1).detach()
    wanted[rows, torch.tensor([1, EOS])] += 1
    assert torch.allclose(gradient, wanted)


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_samples_follow_the_table(temperature: float) -> None:
    """Counts of all 40 completions of two prompts against their probabilities: chi-square, five standard errors."""
    policy = shaken()
    count = 4000
    drawn = generate(
        policy, WORLD.prompt_ids[:2], Decoding(LAYOUT.limit, temperature, batch_size=1024), torch.Generator().manual_seed(0),
        eos_ids=(EOS,), samples_per_prompt=count,
    )  # fmt: skip
    table = (policy.logits.detach() / temperature).log_softmax(-1).unflatten(0, (len(WORLD.prompts), -1))
    probabilities = WORLD.sequence_logps(table)[:2].exp()
    seen = torch.tensor([LAYOUT.index(sample.ids) for sample in drawn]).view(2, count)
    counts = torch.stack([row.bincount(minlength=LAYOUT.completions) for row in seen])
    wanted = count * probabilities
    statistic = ((counts - wanted).square() / wanted).sum(-1)
    freedom = LAYOUT.completions - 1
    assert (statistic < freedom + 5 * (2 * freedom) ** 0.5).all()
    assert all(sample.finished == (sample.ids[-1] == EOS) for sample in drawn)


def test_top_p_draws_inside_its_nucleus() -> None:
    policy = shaken()
    drawn = generate(
        policy, WORLD.prompt_ids, Decoding(LAYOUT.limit, top_p=0.5), torch.Generator().manual_seed(0), eos_ids=(EOS,),
        samples_per_prompt=8,
    )  # fmt: skip
    supports = torch.cat([s.support for s in drawn if s.support is not None])
    examples = [Example(str(i), WORLD.prompt_ids[i // 8], (sample.ids,)) for i, sample in enumerate(drawn)]
    batch = pack(examples, roles=flat_roles, dtype=torch.float64, sampling=Sampling(1.0, supports))
    logps = policy.rows(batch, ["token_logps"])["token_logps"]
    assert logps.min() > -10, "a drawn token lies outside of its own nucleus"


def test_another_worlds_prompt_and_a_longer_completion_are_refused() -> None:
    policy = shaken()
    with pytest.raises(ConfigError, match=r"has no prompt \(9, 9\)"):
        policy.hidden(pack([Example("x", (9, 9), ((0, EOS),))], roles=flat_roles))
    too_long = pack([Example("x", WORLD.prompt_ids[0], ((0,) * (LAYOUT.limit + 1),))], roles=flat_roles)
    with pytest.raises(ConfigError, match=f"ends at {LAYOUT.limit} tokens, got {LAYOUT.limit + 1}"):
        policy.hidden(too_long)
    with pytest.raises(ConfigError, match="sample with a limit of 3"):
        generate(policy, WORLD.prompt_ids, Decoding(64), torch.Generator(), eos_ids=(EOS,))
    with pytest.raises(ConfigError, match="no head 'reward'"):
        build_tabular(WORLD, WORLD.source_next_logps, heads=("reward",))


def test_the_cache_of_references_knows_tables_apart(tmp_path: Path) -> None:
    _, one = build_tabular(WORLD, WORLD.source_next_logps)
    _, same = build_tabular(WORLD, WORLD.source_next_logps, heads=("value",))
    _, other = build_tabular(WORLD, WORLD.source_next_logps.flip(0))
    assert one.weights == same.weights != other.weights
    examples = every_completion(1)
    first = ReferenceCache(one, tmp_path).rows(examples)
    again = ReferenceCache(same, tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(first, again.rows(examples), strict=True))
    assert again.computed_tokens == 0


def test_save_writes_tables_and_world(tmp_path: Path) -> None:
    policy = shaken(heads=("value",))
    policy.save(tmp_path / "policy")
    found = load_file(tmp_path / "policy" / "table.safetensors")
    assert found.keys() == {"logits", "values"}
    assert torch.equal(found["logits"], policy.logits)
    assert WorldConfig(**json.loads((tmp_path / "policy" / "world.json").read_text())).seed == WORLD.config.seed
    other, _ = build_tabular(WORLD, WORLD.source_next_logps, heads=("value",))
    other.load_trainable_state(found)
    assert torch.equal(other.next_logps(), policy.next_logps())


class SmallTask(ExactTask):
    """The small world with its own source as the reference: no language model is trained."""

    def __init__(self, options: Options, cache: Path) -> None:
        super().__init__(options, cache)
        self.world = WORLD
        self.max_new_tokens = LAYOUT.limit
        self.eos_ids = (EOS,)

    reference_next_logps = WORLD.source_next_logps  # type: ignore[assignment]


@pytest.mark.parametrize("name", ["dpo", "kto", "tdpo", "sft"])
def test_offline_losses_train_a_table_through_a_cell(name: str, tmp_path: Path) -> None:
    """Pairs, labels and full-vocabulary KLs: the same streams and the same loop as for a language model."""
    options = Options(
        data=DataOptions(pairs=256), model=ModelOptions(model=TABULAR),
        budget=Budget(batch_size=64, epochs=100, max_steps=40, micro_batch_tokens=1 << 20),
        optimization=Optimization(learning_rate=0.05), evaluation=EvaluationOptions(checkpoints=1),
    )  # fmt: skip
    task = SmallTask(options, tmp_path)
    start = float(expected(WORLD.rewards, task.reference_logps).mean())
    cell = run_cell(task, algorithms.get(name).setting(), options, 0, label=name, cache=tmp_path).cell
    assert cell.final["reward"] > start + 0.05
    assert 0.01 < cell.final["kl"] < 5


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (ModelOptions(model="gpt2"), "brings its own language model"),
        (ModelOptions(model=TABULAR, lora=4), "a table has no layers"),
    ],
)
def test_models_that_the_exact_world_does_not_have_are_refused(model: Any, said: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=said):
        ExactTask(Options(model=model), tmp_path)
