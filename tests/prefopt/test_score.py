"""`score` against closed forms, finite differences, hand-made gradients and counted forward passes."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from scipy.stats import binomtest
from torch import Tensor

import losses
from losses.registry import register
from losses.types import VOCABULARY, LossOutput
from prefopt.data.records import Example, Labels
from prefopt.errors import ConfigError, DataError
from prefopt.packing import PackedBatch
from prefopt.score import Accuracy, ScoreTable, score, why_not
from prefopt.score_pairs import pair_batches
from prefopt.streams import Budget

# Other tests register losses that break; which of them share this process depends on how the tests are distributed.
BUILT_IN = [name for name in losses.names() if losses.get(name).terms[0].function.__module__.startswith("losses.")]
SCORABLE = [name for name in BUILT_IN if not why_not(losses.get(name).bind())]


def make_examples(count: int = 5, labels: Labels | None = None) -> list[Example]:
    """Pairs whose completions have different lengths, 1 to 5 tokens."""
    generator = torch.Generator().manual_seed(7)
    lengths = torch.randint(1, 6, (count, 2), generator=generator).tolist()
    made = labels or Labels(ranks=(0, 1))
    return [Example(f"row{i}", (1, 2), tuple((3,) * n for n in sizes), made) for i, sizes in enumerate(lengths)]


def draw_logps(examples: Sequence[Example], seed: int) -> dict[str, list[Tensor]]:
    """Float64 token log-probs of both completions by example id."""
    generator = torch.Generator().manual_seed(seed)
    return {
        example.id: [
            -0.2 - 2 * torch.rand(len(ids), generator=generator, dtype=torch.float64) for ids in example.completion_ids
        ]
        for example in examples
    }


@dataclass
class TablePolicy:
    """A policy that looks its log-probs up, and counts how often it is asked.

    The log of the sum of squared probabilities is the log-prob less a tenth of a nat for each token before: weights made of
    the difference (WPO's) differ by pair, and stay as they are when a log-prob is moved, as if they were detached.
    """

    logps: Mapping[str, list[Tensor]]
    calls: int = 0

    def evaluate(self, batch: PackedBatch, needs: Collection[str], *, adapter: str | None = "policy") -> dict[str, Tensor]:
        assert not torch.is_grad_enabled()
        self.calls += 1
        rows = [row for name in batch.ids for row in self.logps[name]]
        logps = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        log_sum_sq = (logps - 0.1 * torch.arange(logps.shape[1])) * batch.mask
        return batch.tensors(needs, {"policy_token_logps": logps, "token_log_sum_sq": log_sum_sq})


@dataclass
class TableReference:
    """Stands for a reference cache."""

    logps: Mapping[str, list[Tensor]]

    def rows(self, examples: Sequence[Example]) -> list[Tensor]:
        return [row for example in examples for row in self.logps[example.id]]


def run(
    wanted: Mapping[str, Any] | Sequence[str],
    *,
    examples: Sequence[Example] | None = None,
    policy: TablePolicy | None = None,
    reference: bool = True,
    budget: Budget | None = None,
) -> ScoreTable:
    """Scores losses by name, or bound losses by label."""
    examples = examples or make_examples()
    policy = policy or TablePolicy(draw_logps(examples, 1))
    bound = wanted if isinstance(wanted, Mapping) else {name: losses.get(name).bind() for name in wanted}
    known: Any = TableReference(draw_logps(examples, 2)) if reference else None
    batches = pair_batches(examples, budget or Budget(batch_size=100), reference=known, dtype=torch.float64)
    return score(policy, bound, batches)  # type: ignore[arg-type]


def sums(examples: Sequence[Example], seed: int) -> Tensor:
    """[P, 2] summed log-probs."""
    table = draw_logps(examples, seed)
    return torch.stack([torch.stack([row.sum() for row in table[example.id]]) for example in examples])


def lengths_of(examples: Sequence[Example]) -> Tensor:
    return torch.tensor([[len(ids) for ids in example.completion_ids] for example in examples], dtype=torch.float64)


def coefficients(table: ScoreTable, label: str) -> Tensor:
    """[P, 2]."""
    pairs = next(found.pairs for found in table.scores if found.label == label)
    return torch.stack([pairs.chosen_coefficient, pairs.rejected_coefficient], -1)


def test_the_coefficient_of_dpo_is_beta_sigmoid_of_the_negative_margin_over_p() -> None:
    """d/d(chosen) of mean -log sigma(beta*(c - r)) = -beta*sigma(-margin)/P; rejected has the opposite sign."""
    examples = make_examples()
    found = run({"dpo": losses.get("dpo").bind(beta=0.3)}, examples=examples)
    log_ratios = sums(examples, 1) - sums(examples, 2)
    margin = 0.3 * (log_ratios[:, 0] - log_ratios[:, 1])
    size = 0.3 * torch.sigmoid(-margin) / 5
    torch.testing.assert_close(coefficients(found, "dpo"), torch.stack([-size, size], -1))
    torch.testing.assert_close(found.log_ratios, log_ratios)
    (dpo,) = found.scores
    torch.testing.assert_close(dpo.pairs.value, -F.logsigmoid(margin))
    torch.testing.assert_close(dpo.pairs.chosen_reward, 0.3 * log_ratios[:, 0])
    assert dpo.objective == pytest.approx(float(-F.logsigmoid(margin).mean()), rel=1e-12)
    expected_norm = float((lengths_of(examples) * size[:, None].square()).sum().sqrt())
    assert dpo.gradient_norm == pytest.approx(expected_norm, rel=1e-12)


@pytest.mark.parametrize("average", [True, False])
def test_the_coefficient_of_ipo_is_twice_the_distance_to_its_target(average: bool) -> None:
    """d/dc of mean (h - 1/(2 tau))^2 is 2(h - 1/(2 tau))/P, over the completion's length where h is a difference of means."""
    examples = make_examples()
    found = run({"ipo": losses.get("ipo").bind(tau=0.2, average_log_prob=average)}, examples=examples)
    scale = lengths_of(examples) if average else torch.ones(5, 2, dtype=torch.float64)
    ratios = (sums(examples, 1) - sums(examples, 2)) / scale
    distance = ratios[:, 0] - ratios[:, 1] - 2.5
    expected = 2 * distance[:, None] * torch.tensor([1.0, -1.0]) / scale / 5
    torch.testing.assert_close(coefficients(found, "ipo"), expected.double())


@pytest.fixture(scope="module")
def differences() -> tuple[ScoreTable, dict[str, Tensor]]:
    """What `score` finds on three pairs, and [P, 2] central differences of each objective: 13 runs for all losses.

    Every token of one completion moves by e/length, its sum by e: the objective moves by e times the coefficient.
    """
    examples = make_examples(3)
    table = draw_logps(examples, 1)
    step = 1e-5

    def objectives(row: int, side: int, change: float) -> Tensor:
        moved = {key: list(value) for key, value in table.items()}
        old = moved[f"row{row}"][side]
        moved[f"row{row}"][side] = old + change / len(old)
        found = run(SCORABLE, examples=examples, policy=TablePolicy(moved)).scores
        return torch.tensor([each.objective for each in found], dtype=torch.float64)

    places = [(row, side) for row in range(3) for side in (0, 1)]
    numeric = torch.stack([(objectives(*place, step) - objectives(*place, -step)) / (2 * step) for place in places], -1)
    analytic = run(SCORABLE, examples=examples)
    labels = [each.label for each in analytic.scores]
    return analytic, dict(zip(labels, numeric.view(-1, 3, 2), strict=True))


@pytest.mark.parametrize("name", SCORABLE)
def test_coefficients_are_finite_differences_of_the_objective(
    name: str, differences: tuple[ScoreTable, dict[str, Tensor]]
) -> None:
    found, numeric = differences
    assert numeric[name].any()
    torch.testing.assert_close(coefficients(found, name), numeric[name], rtol=1e-6, atol=1e-8)


def test_every_loss_together_costs_one_forward_pass_a_micro_batch() -> None:
    """Five pairs in batches of two, micro-batches of one: five forward passes for one loss and for all."""
    budget = Budget(batch_size=2, micro_batch_size=1)
    for wanted in (["dpo"], SCORABLE):
        examples = make_examples()
        policy = TablePolicy(draw_logps(examples, 1))
        found = run(wanted, examples=examples, policy=policy, budget=budget)
        assert len(found.scores) == len(wanted)
        assert (policy.calls, found.timing.forward_passes, found.timing.batches) == (5, 5, 3)


@pytest.mark.parametrize("budget", [Budget(batch_size=2), Budget(batch_size=100, micro_batch_size=2)])
def test_batches_do_not_matter(budget: Budget) -> None:
    """Save to losses whose rows interact, and to those with running statistics, which are of the batches before."""
    needs = {name: losses.get(name).bind().needs for name in SCORABLE if not losses.get(name).coupled}
    plain = [name for name, own in needs.items() if all(VOCABULARY[tensor].source != "state" for tensor in own)]
    whole, split = run(plain), run(plain, budget=budget)
    torch.testing.assert_close(split.cosine, whole.cosine)
    for one, other in zip(whole.scores, split.scores, strict=True):
        assert other.objective == pytest.approx(one.objective, rel=1e-12)
        torch.testing.assert_close(coefficients(split, one.label), coefficients(whole, one.label))


def test_a_loss_is_scored_the_same_alone_and_among_others() -> None:
    together = run(SCORABLE)
    for label in SCORABLE:
        torch.testing.assert_close(coefficients(run([label]), label), coefficients(together, label), rtol=1e-12, atol=0)


def test_without_a_reference_the_policy_is_its_own() -> None:
    """DPO's coefficient is beta/2 for every pair, all its rewards tie, and IPO on sums points where DPO points."""
    bound = {"dpo": losses.get("dpo").bind(), "ipo": losses.get("ipo").bind(average_log_prob=False)}
    found = run({**bound, "cpl": losses.get("cpl").bind()}, reference=False)
    assert found.at_reference
    assert found.log_ratio_accuracy is None
    torch.testing.assert_close(coefficients(found, "dpo"), torch.tensor([[-0.01, 0.01]] * 5, dtype=torch.float64))
    cpl, dpo, _ = found.scores
    assert (dpo.accuracy.share, dpo.accuracy.ties) == (0.5, 5)  # type: ignore[union-attr]
    assert cpl.accuracy.ties == 0  # type: ignore[union-attr]
    assert float(found.cosine[1, 2]) == pytest.approx(1, abs=1e-12)
    assert abs(float(found.cosine[0, 1])) < 0.999


def test_the_cosine_is_taken_over_tokens() -> None:
    """SFT's gradient is -1/(chosen tokens) on each chosen token, DPO's is constant within a completion."""
    examples = make_examples()
    found = run(["sft", "dpo"], examples=examples)
    lengths = lengths_of(examples)
    size = coefficients(found, "dpo")
    dot = (lengths[:, 0] * size[:, 0] * -1).sum()
    norms = (lengths * size.square()).sum().sqrt() * lengths[:, 0].sum().sqrt()
    assert [each.label for each in found.scores] == ["dpo", "sft"]
    assert float(found.cosine[0, 1]) == pytest.approx(float(dot / norms), rel=1e-10)
    assert found.scores[1].accuracy is None
    torch.testing.assert_close(coefficients(found, "sft")[:, 0], torch.full((5,), -1 / float(lengths[:, 0].sum())).double())


def test_a_sum_of_losses_is_the_sum_of_its_parts() -> None:
    found = run(["cpl", "sft", "cpl_bc"])
    by_label = {each.label: each for each in found.scores}
    expected = by_label["cpl"].objective + 1.5 * by_label["sft"].objective
    assert by_label["cpl_bc"].objective == pytest.approx(expected, rel=1e-12)
    parts = coefficients(found, "cpl") + 1.5 * coefficients(found, "sft")
    torch.testing.assert_close(coefficients(found, "cpl_bc"), parts)
    assert by_label["cpl_bc"].accuracy == by_label["cpl"].accuracy


def test_labelled_and_grouped_losses_see_the_same_pairs(new_losses: None) -> None:
    """Both spell DPO's or its unpaired neighbour's equation in other tensors, so coefficients are known."""

    @register("in_groups")
    def in_groups_loss(policy_group_logps: Tensor, reference_group_logps: Tensor, ranks: Tensor) -> LossOutput:
        rewards = 0.1 * (policy_group_logps - reference_group_logps)
        loss = -F.logsigmoid(rewards.gather(-1, ranks[:, :1]) - rewards.gather(-1, ranks[:, 1:])).squeeze(-1)
        return LossOutput(loss, torch.ones_like(loss))

    @register("unpaired")
    def unpaired_loss(policy_logps: Tensor, desirable: Tensor) -> LossOutput:
        loss = torch.where(desirable, -policy_logps, policy_logps)
        good, bad = (mask.to(loss) for mask in (desirable, ~desirable))
        rewards = {"rewards/chosen": (policy_logps.detach(), good), "rewards/rejected": (policy_logps.detach(), bad)}
        return LossOutput(loss, torch.ones_like(loss), rewards)

    examples = make_examples()
    found = run(["dpo", "in_groups", "unpaired"], examples=examples, budget=Budget(batch_size=2))
    torch.testing.assert_close(coefficients(found, "in_groups"), coefficients(found, "dpo"))
    expected = torch.tensor([[-0.1, 0.1]], dtype=torch.float64).expand(5, 2)
    torch.testing.assert_close(coefficients(found, "unpaired"), expected)
    policy = sums(examples, 1)
    unpaired = found.scores[2]
    torch.testing.assert_close(unpaired.pairs.chosen_reward, policy[:, 0])
    torch.testing.assert_close(unpaired.pairs.rejected_reward, policy[:, 1])
    torch.testing.assert_close(unpaired.pairs.value, (policy[:, 1] - policy[:, 0]) / 2)


def test_a_coupled_loss_sees_one_batch_at_a_time(new_losses: None) -> None:
    """L = (c_i - mean of the batch's c)^2: d total / d c_i = 2 (c_i - mean), over the five pairs of all batches."""

    @register("spread", coupled=True)
    def spread_loss(policy_chosen_logps: Tensor) -> LossOutput:
        loss = (policy_chosen_logps - policy_chosen_logps.mean()).square()
        return LossOutput(loss, torch.ones_like(loss))

    examples = make_examples()
    found = run(["spread"], examples=examples, budget=Budget(batch_size=2, micro_batch_size=1))
    chosen = sums(examples, 1)[:, 0]
    centred = torch.cat([part - part.mean() for part in chosen.split(2)])
    torch.testing.assert_close(coefficients(found, "spread")[:, 0], 2 * centred / 5)
    assert found.scores[0].coupled
    assert found.scores[0].objective == pytest.approx(float(centred.square().mean()), rel=1e-12)


def test_pairs_without_gradient_are_counted(new_losses: None) -> None:
    @register("satisfiable")
    def satisfiable_loss(policy_chosen_logps: Tensor, policy_rejected_logps: Tensor) -> LossOutput:
        loss = torch.relu(policy_rejected_logps - policy_chosen_logps)
        return LossOutput(loss, torch.ones_like(loss))

    examples = make_examples()
    gaps = sums(examples, 1) @ torch.tensor([1.0, -1.0], dtype=torch.float64)
    satisfied = int((gaps > 0).sum())
    assert 0 < satisfied < 5
    found = run(["satisfiable", "dpo"], examples=examples)
    assert [each.zero_gradient for each in found.scores] == [0.0, pytest.approx(satisfied / 5)]


def test_a_zero_gradient_has_no_cosine(new_losses: None) -> None:
    @register("flat")
    def flat_loss(policy_chosen_logps: Tensor) -> LossOutput:
        return LossOutput(policy_chosen_logps * 0, torch.ones_like(policy_chosen_logps))

    found = run(["dpo", "flat"])
    assert found.cosine.isnan().tolist() == [[False, True], [True, True]]
    assert found.scores[1].zero_gradient == 1


def test_running_statistics_are_those_of_the_batches_before(new_losses: None) -> None:
    @register("shifted")
    def shifted_loss(policy_chosen_logps: Tensor, reward_shift: Tensor) -> LossOutput:
        loss = policy_chosen_logps - reward_shift
        update = policy_chosen_logps.detach()
        return LossOutput(loss, torch.ones_like(loss), {}, {"reward_shift": (update.sum(), torch.tensor(float(len(update))))})

    examples = make_examples()
    found = run(["shifted"], examples=examples, budget=Budget(batch_size=2))
    chosen = sums(examples, 1)[:, 0]
    shifts = torch.stack([torch.tensor(0.0).double(), *[chosen[:2].mean()] * 2, chosen[:4].mean()])
    torch.testing.assert_close(found.scores[0].pairs.value, chosen - torch.cat([shifts[:1], shifts]))


def test_a_gradient_past_the_log_probs_is_named(new_losses: None) -> None:
    @register("confidence")
    def confidence_loss(policy_chosen_token_logps: Tensor, chosen_token_log_sum_sq: Tensor, chosen_mask: Tensor) -> LossOutput:
        return LossOutput(-policy_chosen_token_logps * chosen_token_log_sum_sq.exp(), chosen_mask)

    @register("detached")
    def detached_loss(policy_chosen_token_logps: Tensor, chosen_token_log_sum_sq: Tensor, chosen_mask: Tensor) -> LossOutput:
        return LossOutput(-policy_chosen_token_logps * chosen_token_log_sum_sq.exp().detach(), chosen_mask)

    found = run(["confidence", "detached"])
    assert "chosen_token_log_sum_sq" in found.scores[0].notes[0]
    assert found.scores[1].notes == ()


def test_losses_that_need_other_data_are_listed_with_the_reason(new_losses: None) -> None:
    @register("with_margins")
    def with_margins_loss(policy_chosen_logps: Tensor, margins: Tensor) -> LossOutput:
        return LossOutput(margins - policy_chosen_logps, torch.ones_like(policy_chosen_logps))

    found = run(["dpo", "ppo", "bradley_terry", "entropy", "kto", "tdpo", "with_margins"])
    assert [each.label for each in found.scores] == ["dpo"]
    assert sorted(found.not_scored) == ["bradley_terry", "entropy", "kto", "ppo", "tdpo", "with_margins"]
    assert "needs rollouts (advantages" in found.not_scored["ppo"]
    assert found.not_scored["bradley_terry"].startswith("needs chosen_rewards, rejected_rewards: not log-probs")
    assert found.not_scored["tdpo"].startswith("needs chosen_token_kls, rejected_token_kls: not log-probs")
    assert found.not_scored["kto"] == why_not(losses.get("kto").bind())
    assert found.not_scored["kto"].startswith("needs completions of other prompts (policy_mismatched_logps")
    assert found.not_scored["with_margins"] == "needs margins, which these pairs do not have"
    with pytest.raises(ConfigError, match=r"no loss can be scored.*ppo needs rollouts"):
        run(["ppo"])


def test_a_loss_for_which_no_pair_counts_is_listed(new_losses: None) -> None:
    @register("nobody")
    def nobody_loss(policy_chosen_logps: Tensor) -> LossOutput:
        return LossOutput(-policy_chosen_logps, torch.zeros_like(policy_chosen_logps))

    found = run(["dpo", "nobody"])
    assert found.not_scored == {"nobody": "no pair counts: the weights of nobody sum to 0"}
    assert found.cosine.shape == (1, 1)


def test_labels_and_scores_of_the_pairs_reach_the_losses() -> None:
    """Soft label p: DPO's chosen coefficient is -beta*(p - sigma(margin))/P."""
    labels = Labels(ranks=(0, 1), soft_label=0.8, scores=(3.0, 1.0))
    examples = make_examples(labels=labels)
    found = run(
        {"dpo": losses.get("dpo").bind(), "scored": losses.get("ppo_offline").bind(advantage="score")}, examples=examples
    )
    log_ratios = sums(examples, 1) - sums(examples, 2)
    margin = 0.1 * (log_ratios[:, 0] - log_ratios[:, 1])
    torch.testing.assert_close(coefficients(found, "dpo")[:, 0], -0.1 * (0.8 - torch.sigmoid(margin)) / 5)
    # Pair-centred scores are +1 and -1, which is what labels say.
    torch.testing.assert_close(coefficients(found, "scored"), coefficients(run(["ppo_offline"]), "ppo_offline"))


@pytest.mark.parametrize(
    ("examples", "message"),
    [
        ([replace(make_examples(1)[0], completion_ids=((3,),))], "row0 is no pair"),
        ([replace(make_examples(1)[0], labels=Labels(ranks=(1, 0)))], "row0 is no pair"),
        ([*make_examples(1, Labels(ranks=(0, 1), margin=1.0)), *make_examples(1)], "row0 has no margin"),
    ],
)
def test_rows_that_are_no_uniform_pairs_are_refused(examples: list[Example], message: str) -> None:
    with pytest.raises(DataError, match=message):
        next(pair_batches(examples, Budget()))


def test_errors_name_the_loss(new_losses: None) -> None:
    @register("cut_off")
    def cut_off_loss(policy_chosen_logps: Tensor) -> LossOutput:
        return LossOutput(policy_chosen_logps.detach(), torch.ones_like(policy_chosen_logps))

    with pytest.raises(ConfigError, match=r"strange: .*label_smoothing is 0.7"):
        run({"strange": losses.get("dpo").bind(label_smoothing=0.7)})
    with pytest.raises(ConfigError, match="cut_off is not connected"):
        run(["cut_off"])
    with pytest.raises(DataError, match="no pair to score"):
        score(TablePolicy({}), {"dpo": losses.get("dpo").bind()}, [])  # type: ignore[arg-type]


def test_accuracy_counts_ties_half_and_carries_wilsons_interval() -> None:
    found = Accuracy.of(torch.tensor([1.0, 2.0, -1.0, 0.0, math.nan, 0.0]))
    assert found is not None
    assert (found.share, found.ties, found.pairs) == (3 / 5, 2, 5)
    expected = binomtest(3, 5).proportion_ci(method="wilson")
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=1e-4)
    odd = Accuracy.of(torch.tensor([1.0, 0.0, -1.0]))
    assert odd is not None
    assert odd.low == pytest.approx(binomtest(1, 3).proportion_ci(method="wilson").low, abs=1e-4)
    assert odd.high == pytest.approx(binomtest(2, 3).proportion_ci(method="wilson").high, abs=1e-4)
    assert Accuracy.of(torch.full((3,), math.nan)) is None
