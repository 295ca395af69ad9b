"""Shared supervised stages: they learn, and are trained once for the same content."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import losses
from prefopt import stages
from prefopt.data.exact_world import ExactWorld, WorldConfig
from prefopt.data.records import Example, Labels
from prefopt.errors import ConfigError
from prefopt.models.causal_lm import CausalLMPolicy
from prefopt.models.fingerprint import fingerprint
from prefopt.models.lora import LoRA
from prefopt.optimization import Optimization
from prefopt.packing import flat_roles, pack
from prefopt.rewards import RewardModelScorer
from prefopt.stages import Stage, content_key, examples_key, held_out_facts, reward_loss, reward_model, supervised_start
from prefopt.streams import Budget

WORLD = ExactWorld(WorldConfig.tabular())
EOS = WORLD.layout.eos
A, B, C = 0, 1, 2


def build_model(seed: int = 0) -> transformers.PreTrainedModel:
    torch.manual_seed(seed)
    config = WORLD.model_config()
    config.max_position_embeddings = 32
    return transformers.AutoModelForCausalLM.from_config(config)


def preferring_a(count: int, seed: int = 0) -> list[Example]:
    """Chosen begins with a, rejected with b; what follows is random: separable by one token."""
    generator = torch.Generator().manual_seed(seed)
    rest = torch.randint(0, 3, (count, 2), generator=generator).tolist()
    rows = [
        Example(f"{seed}:{i}", (C, i % 3), ((A, r[0], EOS), (B, r[1], EOS)), Labels(ranks=(0, 1))) for i, r in enumerate(rest)
    ]
    return list(rows)


@pytest.fixture
def trainings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Losses of the runs that really trained."""
    names: list[str] = []
    fit = stages.fit

    def counted(policy: Any, loss: losses.BoundLoss, *args: Any, **kwargs: Any) -> Any:
        names.append(loss.name)
        return fit(policy, loss, *args, **kwargs)

    monkeypatch.setattr(stages, "fit", counted)
    return names


def start(model: Any, cache: Path, examples: list[Example] | None = None, **changes: Any) -> Stage:
    given = {
        "both": False,
        "budget": Budget(batch_size=16, epochs=6),
        "optimization": Optimization(learning_rate=1e-2),
        **changes,
    }
    policy = CausalLMPolicy(model, WORLD.tokenizer)
    return supervised_start(policy, fingerprint(model), examples or preferring_a(64), cache=cache, **given)


def nll(model: Any, side: int) -> float:
    """Mean negative log-prob of a chosen (0) or rejected (1) token of rows that were not trained on."""
    rows = [Example(e.id, e.prompt_ids, e.completion_ids[side : side + 1]) for e in preferring_a(64, seed=9)]
    with torch.no_grad():
        logps = CausalLMPolicy(model, WORLD.tokenizer).rows(pack(rows, roles=flat_roles), ["token_logps"])["token_logps"]
    return -float(logps.mean())


def weights_of(model: Any) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def test_the_supervised_start_learns_what_it_is_shown(tmp_path: Path) -> None:
    """Chosen completions become likely; with `both`, rejected ones too."""
    untrained = build_model()
    chosen, both = build_model(), build_model()
    stage = start(chosen, tmp_path)
    twice = start(both, tmp_path, both=True)
    assert nll(chosen, 0) < 0.7 * nll(untrained, 0)
    assert nll(chosen, 1) > nll(untrained, 1)
    assert nll(both, 1) < 0.8 * nll(untrained, 1)
    assert (stage.facts["steps"], twice.facts["steps"]) == (24, 48)
    assert twice.tokens == 6 * sum(len(e.prompt_ids) + len(ids) for e in preferring_a(64) for ids in e.completion_ids)
    assert stage.facts["loss"] < nll(untrained, 0)
    assert stage.tokens == 6 * sum(len(e.prompt_ids) + len(e.completion_ids[0]) for e in preferring_a(64))
    assert not stage.cached


def test_an_equal_start_is_not_trained_again(tmp_path: Path, trainings: list[str]) -> None:
    first, second = build_model(), build_model()
    stage, again = start(first, tmp_path), start(second, tmp_path)
    assert trainings == ["sft"]
    for name, value in weights_of(first).items():
        assert torch.equal(second.state_dict()[name], value)
    assert again.cached
    assert again.seconds == 0
    assert (tmp_path / "sft" / stage.key / "weights.safetensors").stat().st_mode & 0o044 == 0o044
    assert (again.key, again.tokens, again.facts) == (stage.key, stage.tokens, stage.facts)


CHANGES: dict[str, dict[str, Any]] = {
    "optimization": {"optimization": Optimization(learning_rate=2e-2)},
    "budget": {"budget": Budget(batch_size=16, epochs=5)},
    "seed": {"budget": Budget(batch_size=16, epochs=6, seed=1)},
    "both": {"both": True},
    "rows": {"examples": preferring_a(64, seed=1)},
    "order": {"examples": preferring_a(64)[::-1]},
}


@pytest.mark.parametrize("what", CHANGES)
def test_any_other_content_is_trained(what: str, tmp_path: Path, trainings: list[str]) -> None:
    stage = start(build_model(), tmp_path)
    other = start(build_model(), tmp_path, **CHANGES[what])
    assert trainings == ["sft", "sft"]
    assert other.key != stage.key
    assert not other.cached


def test_other_weights_are_trained(tmp_path: Path, trainings: list[str]) -> None:
    start(build_model(), tmp_path)
    start(build_model(seed=1), tmp_path)
    assert trainings == ["sft", "sft"]


def test_an_unfinished_stage_is_not_taken_for_a_finished_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A crash while weights are written: nothing under the stage's key, and the next run trains."""

    def crash(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(stages, "save_file", crash)
        with pytest.raises(KeyboardInterrupt):
            start(build_model(), tmp_path)
    assert not start(build_model(), tmp_path).cached


def damage_weights(folder: Path) -> None:
    content = bytearray((folder / "weights.safetensors").read_bytes())
    content[-3] ^= 1
    (folder / "weights.safetensors").write_bytes(content)


def damage_facts(folder: Path) -> None:
    (folder / "stage.json").write_text((folder / "stage.json").read_text()[:-9])


def lose_weights(folder: Path) -> None:
    (folder / "weights.safetensors").unlink()


@pytest.mark.parametrize("harm", [damage_weights, damage_facts, lose_weights])
@pytest.mark.fault(6, 7)
def test_a_damaged_stage_is_trained_again(tmp_path: Path, trainings: list[str], harm: Callable[[Path], None]) -> None:
    """A flipped bit would be loaded silently, and shared by every cell."""
    first, second, third = build_model(), build_model(), build_model()
    stage = start(first, tmp_path)
    harm(tmp_path / "sft" / stage.key)
    with pytest.warns(UserWarning, match="damaged stage in the cache"):
        again = start(second, tmp_path)
    assert not again.cached
    assert start(third, tmp_path).cached
    assert trainings == ["sft", "sft"]
    for name, value in weights_of(first).items():
        assert torch.equal(second.state_dict()[name], value)
        assert torch.equal(third.state_dict()[name], value)


def test_two_processes_that_finish_the_same_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second to finish finds the folder taken, keeps it, and leaves no scratch folder."""
    done = start(build_model(), tmp_path)
    folder = tmp_path / "sft" / done.key
    (folder / "stage.json").rename(tmp_path / "hidden.json")
    replace = stages.os.replace

    def late(staged: Path, target: Path) -> None:
        (tmp_path / "hidden.json").rename(folder / "stage.json")
        replace(staged, target)

    monkeypatch.setattr(stages.os, "replace", late)
    second = start(build_model(), tmp_path)
    assert not second.cached
    assert [path.name for path in (tmp_path / "sft").iterdir()] == [done.key]
    monkeypatch.undo()
    assert start(build_model(), tmp_path).cached


def rewards(cache: Path, model: Any = None, **changes: Any) -> tuple[RewardModelScorer, Stage]:
    given: dict[str, Any] = {
        "train": preferring_a(64), "held_out": preferring_a(40, seed=7), "lora": None, "max_length": 16,
        "budget": Budget(batch_size=16, epochs=5), "optimization": Optimization(learning_rate=1e-2),
        "max_completion_length": 8, "loss": reward_loss("bradley_terry"), **changes,
    }  # fmt: skip
    return reward_model(
        model or build_model(), WORLD.tokenizer, given.pop("train"), given.pop("held_out"), cache=cache, **given
    )


@pytest.mark.parametrize("lora", [None, LoRA(r=4, alpha=8)])
def test_the_reward_model_learns_a_separable_preference(lora: LoRA | None, tmp_path: Path) -> None:
    """Held-out pairs are right, text is scored as rows are, and the training completions' mean is zero."""
    scorer, stage = rewards(tmp_path, lora=lora)
    assert len(stage.facts["right"]) / 40 > 0.95
    assert stage.facts["quality"]["accuracy"] == pytest.approx(len(stage.facts["right"]) / 40)
    assert stage.facts["quality"]["pairs"] == 40
    assert stage.facts["train_rows"] == 64
    assert float(scorer.score(preferring_a(64)).mean()) == pytest.approx(0, abs=1e-5)
    assert abs(stage.facts["offset"]) > 1e-4
    scores = scorer(["ca", "ca"], ["ab", "bb"])
    assert scores[0] > scores[1] + 1
    by_rows = scorer.score([Example("x", (C, A), ((A, B, EOS), (B, B, EOS)))])
    torch.testing.assert_close(scores, by_rows[0])


def fewer_bs(count: int, seed: int = 0) -> list[Example]:
    """Lists of four: the fewer b, the better; they stand in any order."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for i in range(count):
        order = torch.randperm(4, generator=generator).tolist()
        ids = tuple((*[B] * bs, *[A] * (3 - bs), EOS) for bs in order)
        rows.append(Example(f"{seed}:{i}", (C, i % 3), ids, Labels(ranks=tuple(order))))
    return rows


@pytest.mark.parametrize("name", ["plackett_luce", "pairwise_ranking", "rank_utility"])
def test_a_reward_model_learns_from_ranked_lists(name: str, tmp_path: Path, trainings: list[str]) -> None:
    """Its record counts every pair of a held-out list; a row is right when its whole order is."""
    scorer, stage = rewards(tmp_path, train=fewer_bs(64), held_out=fewer_bs(16, seed=7), loss=reward_loss(name))
    assert trainings == [name]
    assert stage.facts["quality"]["pairs"] == 16 * 6
    assert stage.facts["quality"]["accuracy"] > 0.9
    assert len(stage.facts["right"]) > 8
    assert float(scorer.score(fewer_bs(64)).mean()) == pytest.approx(0, abs=1e-5)


def soft(probability: float, margin: float | None = None) -> list[Example]:
    labels = Labels(ranks=(0, 1), soft_label=probability, margin=margin)
    return [Example(row.id, row.prompt_ids, row.completion_ids, labels) for row in preferring_a(64)]


def test_soft_labels_margins_and_centring_reach_the_loss(tmp_path: Path) -> None:
    """The gap settles where the loss with that label and margin is least; centring pulls a pair's sum to zero."""
    given = {"budget": Budget(batch_size=64, epochs=30)}
    for margin in (None, 2.0):
        scores = rewards(tmp_path, train=soft(0.7, margin), **given)[0].score(preferring_a(64))
        gap, m = (scores[:, 0] - scores[:, 1]).mean(), margin or 0.0
        assert float(0.7 * torch.sigmoid(m - gap)) == pytest.approx(float(0.3 * torch.sigmoid(m + gap)), abs=0.02)
    sums = []
    for coefficient in (0.0, 1.0):
        loss = reward_loss("bradley_terry", center_coef=coefficient)
        scorer, stage = rewards(tmp_path, train=soft(0.7), loss=loss, **given)
        sums.append(float((scorer.score(preferring_a(64)) + stage.facts["offset"]).sum(1).abs().mean()))
    assert sums[1] < 0.2 * sums[0]


@pytest.mark.parametrize(
    ("name", "hyper", "message"),
    [
        ("dpo", {}, "'dpo' does not train a reward model; these do: bradley_terry"),
        ("hydra_sft", {}, "'hydra_sft' does not train a reward model"),
        ("plackett_luce", {"center_coef": 0.1}, "reward_loss plackett_luce: .*center_coef"),
        ("bradley_tery", {}, "did you mean 'bradley_terry'"),
    ],
)
def test_other_losses_are_refused(name: str, hyper: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        reward_loss(name, **hyper)


def test_an_equal_reward_model_gives_equal_scores_from_the_cache(tmp_path: Path, trainings: list[str]) -> None:
    for lora in (None, LoRA(r=4, alpha=8)):
        scorer, stage = rewards(tmp_path, lora=lora)
        torch.manual_seed(99)
        again, cached = rewards(tmp_path, lora=lora)
        assert cached.cached
        assert cached.facts == stage.facts
        assert torch.equal(again.score(preferring_a(30, seed=3)), scorer.score(preferring_a(30, seed=3)))
    assert trainings == ["bradley_terry", "bradley_terry"]
    rewards(tmp_path, train=preferring_a(63))
    assert len(trainings) == 3


def test_global_generator_does_not_change_a_reward_model(tmp_path: Path) -> None:
    """The head's first weights follow from the budget's seed alone."""
    models = [build_model(), build_model()]
    found = []
    for number, model in enumerate(models):
        torch.manual_seed(number)
        found.append(rewards(tmp_path / str(number), model)[0].score(preferring_a(10)))
    assert torch.equal(found[0], found[1])


def test_record_of_held_out_rows() -> None:
    """Which rows are right (a tie is not), and nothing for no rows."""

    class Fixed(RewardModelScorer):
        def __init__(self) -> None:
            pass

        def lists(self, examples: Any) -> tuple[Tensor, ...]:
            return torch.tensor([[1.0, 0.5], [0.0, 2.0], [1.0, 1.0]]).unbind()

    pairs = preferring_a(3)
    facts = held_out_facts(Fixed(), pairs)
    assert facts["right"] == [pairs[0].id]
    assert facts["quality"]["accuracy"] == 0.5
    assert held_out_facts(Fixed(), []) == {"right": [], "quality": None}


def test_keys_follow_content() -> None:
    rows = preferring_a(4)
    renamed = [Example("other", e.prompt_ids, e.completion_ids) for e in rows]
    assert examples_key(rows) == examples_key(renamed)
    moved = [Example("x", (C,), ((A, B),)), Example("x", (C, A), ((B,),))]
    assert examples_key(moved[:1]) != examples_key(moved[1:])
    together = [Example("x", (C,), ((A,), (B,)))]
    apart = [Example("x", (C,), ((A,),)), Example("y", (C,), ((B,),))]
    assert examples_key(together) != examples_key(apart)
    assert examples_key(soft(0.7)) == examples_key(soft(0.9))
    assert examples_key(soft(0.7), labels=True) != examples_key(soft(0.9), labels=True)
    assert content_key("a", {"x": 1, "y": 2}) == content_key("a", {"y": 2, "x": 1})
    assert content_key("a", None) != content_key("a", 0)
