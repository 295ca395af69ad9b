"""`fit` on tiny models: accumulation, resume, coupled losses, running statistics, refusals, and a policy that is no LM."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import losses
from losses.types import LossOutput
from prefopt import algorithms, checkpoint, trainer
from prefopt.data.records import Example
from prefopt.errors import ConfigError, OutputError, TrainingError
from prefopt.guard import UpdateGuard
from prefopt.models.causal_lm import CausalLMPolicy, FrozenReference
from prefopt.models.fingerprint import fingerprint
from prefopt.models.packed import head_names
from prefopt.optimization import Logging, Optimization
from prefopt.packing import PackedBatch
from prefopt.reference import ReferenceCache
from prefopt.streams import Budget, OfflineStream
from prefopt.trainer import fit

VOCABULARY = 29


def tiny_policy(dtype: torch.dtype = torch.float32, heads: tuple[str, ...] = (), seed: int = 0) -> CausalLMPolicy:
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=24,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    model = transformers.AutoModelForCausalLM.from_config(config).to(dtype)
    for parameter in model.parameters():
        if parameter.dim() >= 2:
            torch.nn.init.normal_(parameter, std=0.2)
    return CausalLMPolicy(model, tokenizer=None, heads=heads)


def tiny_reference(dtype: torch.dtype = torch.float32, seed: int = 0) -> ReferenceCache:
    policy = tiny_policy(dtype, seed=seed)
    return ReferenceCache(FrozenReference(policy, fingerprint(policy.model)))


def pairs(count: int, seed: int = 0) -> list[Example]:
    generator = torch.Generator().manual_seed(seed)

    def ids(longest: int) -> tuple[int, ...]:
        length = int(torch.randint(1, longest + 1, (), generator=generator))
        return tuple(torch.randint(0, VOCABULARY, (length,), generator=generator).tolist())

    return [Example(f"pairs.jsonl:{i + 1}", ids(12), (ids(8), ids(8))) for i in range(count)]


def offline_run(
    name: str,
    *,
    micro: int = 0,
    dtype: torch.dtype = torch.float32,
    batch: int = 8,
    steps: int = 5,
    clip: float = 1.0,
    **hyper: Any,
) -> tuple[CausalLMPolicy, Any]:
    setting = algorithms.get(name).setting(**hyper)
    policy = tiny_policy(dtype, heads=head_names(setting.loss.needs))
    stream = OfflineStream(
        pairs(24),
        kind=setting.algorithm.stream,
        budget=Budget(batch_size=batch, micro_batch_size=micro, max_steps=steps, epochs=10),
        needs=setting.loss.needs,
        reference=tiny_reference(dtype),
        dtype=dtype,
    )
    result = fit(policy, setting.loss, stream, Optimization(learning_rate=1e-2, clip_norm=clip), logging=Logging(log_every=1))
    return policy, result


@pytest.mark.parametrize("name", ["dpo", "ipo", "cpl", "cpl_bc", "ppo_offline", "sft"])
def test_accumulation_does_not_change_the_update(name: str) -> None:
    """1x8, 2x4 and 8x1 give the same parameters after 5 steps to 1e-10 in float64, and the same logged metrics."""
    reference, result = offline_run(name, micro=8, dtype=torch.float64)
    for micro in (4, 1):
        other, other_result = offline_run(name, micro=micro, dtype=torch.float64)
        for key, value in reference.trainable_state().items():
            torch.testing.assert_close(other.trainable_state()[key], value, atol=1e-10, rtol=0)
        # Before the first update every margin is zero up to rounding, so its sign says nothing: compare from step 2 on.
        for first, second in zip(result.lines[1:], other_result.lines[1:], strict=True):
            assert first == pytest.approx(second, rel=1e-8, abs=1e-10)


def record_gradients(policy: CausalLMPolicy) -> dict[str, Tensor]:
    """Fills itself with each parameter's gradient as the last micro-batch leaves it."""
    grads: dict[str, Tensor] = {}
    for key, parameter in policy.named_parameters():
        parameter.register_post_accumulate_grad_hook(lambda p, key=key: grads.__setitem__(key, p.grad.clone()))
    return grads


@pytest.mark.parametrize("name", ["dpo", "ipo", "ppo_offline"])
def test_accumulation_gradient_in_float32(name: str) -> None:
    """float32: one step's gradient (read off a momentum-free first update's state) agrees to 1e-5 relative."""
    moments = []
    for micro in (8, 4, 1):
        setting = algorithms.get(name).setting()
        policy = tiny_policy()
        stream = OfflineStream(
            pairs(24), kind="pairs", budget=Budget(batch_size=8, micro_batch_size=micro, max_steps=1),
            reference=tiny_reference(),
        )  # fmt: skip
        grads = record_gradients(policy)
        fit(policy, setting.loss, stream, Optimization(clip_norm=0))
        moments.append(torch.cat([grad.flatten() for _, grad in sorted(grads.items())]))
    for other in moments[1:]:
        assert (other - moments[0]).norm() <= 1e-5 * moments[0].norm()


def test_first_dpo_loss_is_log_2_and_chosen_rises() -> None:
    _, result = offline_run("dpo", steps=12)
    assert result.lines[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert result.lines[-1]["rewards/margins"] > 0.1


def test_training_in_the_middle_of_an_evaluation() -> None:
    """An evaluation runs without gradients; a reward model that it trains when it is first needed has them all the same."""
    policy = tiny_policy()
    inner = tiny_policy(heads=("reward",))
    before = inner.heads["reward"].weight.clone()

    def evaluate() -> dict[str, float]:
        assert not torch.is_grad_enabled()
        budget = Budget(batch_size=4, max_steps=1)
        fit(inner, losses.get("bradley_terry").bind(), OfflineStream(pairs(4), kind="pairs", budget=budget))
        assert not torch.is_grad_enabled()
        return {"done": 1.0}

    stream = OfflineStream(pairs(8), kind="pairs", budget=Budget(batch_size=4), reference=tiny_reference())
    fit(policy, losses.get("dpo").bind(), stream, evaluate=evaluate, evaluate_at=(1,))
    assert not torch.equal(inner.heads["reward"].weight, before)


@pytest.mark.fault(26)
def test_a_wrong_reference_stops_at_the_first_step() -> None:
    """Reference log-probs of other weights: the error names the likely causes, and no parameter has moved."""
    setting = algorithms.get("dpo").setting()
    policy = tiny_policy()
    before = {key: value.clone() for key, value in policy.trainable_state().items()}
    reference = tiny_reference(seed=1)
    stream = OfflineStream(pairs(24), kind="pairs", budget=Budget(batch_size=8), reference=reference)
    with pytest.raises(TrainingError, match="reference log-probs belong to other weights"):
        fit(policy, setting.loss, stream)
    for key, value in policy.trainable_state().items():
        assert value.equal(before[key])


@pytest.mark.fault(10)
def test_a_non_finite_gradient_stops_before_the_update() -> None:
    """A NaN weight: the message names the step and the rows; every other parameter is as it was."""
    setting = algorithms.get("cpl").setting()
    policy = tiny_policy()
    stream = OfflineStream(pairs(8), kind="pairs", budget=Budget(batch_size=4, max_steps=4))
    with torch.no_grad():
        next(iter(policy.model.parameters()))[0, 0] = math.nan
    before = {key: value.clone() for key, value in policy.trainable_state().items()}
    with pytest.raises(TrainingError, match=r"step 1: the (loss|gradient) is not finite.*pairs\.jsonl:"):
        fit(policy, setting.loss, stream)
    for key, value in policy.trainable_state().items():
        assert torch.equal(value.nan_to_num(), before[key].nan_to_num())


# Losses that exist for these tests alone; the registry is process-wide, so they carry a prefix.


@losses.register("trainer_test_rank", coupled=True)
def trainer_test_rank_loss(
    policy_chosen_logps: Tensor, policy_rejected_logps: Tensor, chosen_lengths: Tensor, *, slope: float = 0.3
) -> LossOutput:
    """Every pair's margin against the batch's mean margin: rows interact.

    Args:
        slope: of the hinge.
    """
    margin = slope * (policy_chosen_logps - policy_rejected_logps)
    return LossOutput(
        torch.nn.functional.softplus(margin.mean() - margin) - margin, chosen_lengths.to(margin) / chosen_lengths.to(margin)
    )


@losses.register("trainer_test_rank_weightless", coupled=True)
def trainer_test_rank_weightless_loss(policy_chosen_logps: Tensor, policy_rejected_logps: Tensor) -> LossOutput:
    """No row counts, and rows interact."""
    return LossOutput(policy_chosen_logps - policy_rejected_logps.mean(), torch.zeros_like(policy_chosen_logps))


@losses.register("trainer_test_shift")
def trainer_test_shift_loss(
    policy_chosen_logps: Tensor, reference_chosen_logps: Tensor, policy_rejected_logps: Tensor, reward_shift: Tensor
) -> LossOutput:
    """Uses and feeds a running mean."""
    reward = policy_chosen_logps - reference_chosen_logps
    loss = torch.nn.functional.softplus(reward_shift - reward) + 0 * policy_rejected_logps
    updates = {"reward_shift": (policy_chosen_logps.detach().sum(), torch.tensor(float(len(reward))))}
    return LossOutput(loss, torch.ones_like(loss), {"shift": (reward_shift.expand(1), torch.ones(1))}, updates)


@losses.register("trainer_test_weightless")
def trainer_test_weightless_loss(policy_chosen_logps: Tensor) -> LossOutput:
    """No row counts."""
    return LossOutput(policy_chosen_logps, torch.zeros_like(policy_chosen_logps))


@pytest.mark.parametrize("name", ["trainer_test_rank", "kto", "aot"])
def test_coupled_losses_do_not_depend_on_micro_batches(name: str) -> None:
    """The loss is evaluated once over the whole step: 8x1 equals 1x8, which plain accumulation would not give."""
    whole, whole_result = offline_run(name, micro=8, dtype=torch.float64)
    for micro in (4, 1):
        parts, parts_result = offline_run(name, micro=micro, dtype=torch.float64)
        for key, value in whole.trainable_state().items():
            torch.testing.assert_close(parts.trainable_state()[key], value, atol=1e-10, rtol=0)
        # Before the first update every margin is zero up to rounding, so its sign says nothing: compare from step 2 on.
        for first, second in zip(whole_result.lines[1:], parts_result.lines[1:], strict=True):
            assert first == pytest.approx(second, rel=1e-8, abs=1e-10)


@pytest.mark.parametrize(("micro", "passes"), [(8, 1), (4, 4)])
def test_a_coupled_loss_on_one_micro_batch_takes_one_forward_pass(
    micro: int, passes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With two micro-batches in the step, each is encoded twice."""
    made = []
    evaluate = CausalLMPolicy.evaluate

    def counted(policy: CausalLMPolicy, batch: PackedBatch, needs: Collection[str]) -> dict[str, Tensor]:
        made.append(batch)
        return evaluate(policy, batch, needs)

    monkeypatch.setattr(CausalLMPolicy, "evaluate", counted)
    offline_run("trainer_test_rank", micro=micro, steps=1)
    assert len(made) == passes


@pytest.mark.parametrize("micro", [8, 2])
def test_a_coupled_step_in_which_no_row_counts_is_refused(micro: int) -> None:
    with pytest.raises(TrainingError, match=r"the weights of 'trainer_test_rank_weightless' sum to 0\.0; no row"):
        offline_run("trainer_test_rank_weightless", micro=micro, steps=1)


def test_running_statistics_are_folded_by_the_trainer() -> None:
    """The shift is 0 in step 1 and afterwards the mean of everything seen before."""
    _, result = offline_run("trainer_test_shift", steps=3)
    shifts = [line["shift"] for line in result.lines]
    assert shifts[0] == 0
    assert shifts[1] < 0
    assert shifts[2] != shifts[1]


@pytest.mark.parametrize("name", ["trainer_test_shift", "bco"])
def test_running_statistics_do_not_depend_on_micro_batches(name: str) -> None:
    """No micro-batch sees what another one of its step adds: 8x1, 4x2 and 1x8 give the same parameters and metrics."""
    whole, result = offline_run(name, micro=8, dtype=torch.float64)
    for micro in (4, 1):
        parts, parts_result = offline_run(name, micro=micro, dtype=torch.float64)
        for key, value in whole.trainable_state().items():
            torch.testing.assert_close(parts.trainable_state()[key], value, atol=1e-10, rtol=0)
        for first, second in zip(result.lines[1:], parts_result.lines[1:], strict=True):
            assert first == pytest.approx(second, rel=1e-8, abs=1e-10)


@dataclass(frozen=True)
class ControlBatch:
    """Two segments of states and actions a pair, with nothing of language about them."""

    observations: Tensor  # [2P, T, D]
    actions: Tensor  # [2P, T]
    ids: tuple[str, ...]

    @property
    def sizes(self) -> dict[str, int]:
        return {"P": len(self.ids), "T": self.actions.shape[1]}

    @property
    def tokens(self) -> int:
        return self.actions.numel()

    def tensors(self, names: Collection[str]) -> dict[str, Tensor]:
        ones = torch.ones(len(self.ids), self.actions.shape[1])
        return {name: ones for name in names if name in ("chosen_mask", "rejected_mask")}


class ControlPolicy(torch.nn.Module):
    """A categorical MLP behind the policy protocol."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = torch.nn.Sequential(torch.nn.Linear(3, 16), torch.nn.Tanh(), torch.nn.Linear(16, 4))

    def evaluate(self, batch: ControlBatch, needs: Collection[str], *, adapter: str | None = "policy") -> dict[str, Tensor]:
        logps = self.net(batch.observations).log_softmax(-1).gather(-1, batch.actions.unsqueeze(-1)).squeeze(-1)
        half = len(batch.ids)
        both = {"policy_chosen_token_logps": logps[:half], "policy_rejected_token_logps": logps[half:]}
        return {name: both[name] for name in needs}

    def parameter_groups(self) -> list[dict[str, Any]]:
        return [{"params": list(self.parameters()), "lr_scale": 1.0, "decay": False}]

    def trainable_state(self) -> dict[str, Tensor]:
        return dict(self.named_parameters())

    def load_trainable_state(self, state: Mapping[str, Tensor]) -> None:
        self.load_state_dict(dict(state))

    def save(self, folder: Path) -> None:
        raise AssertionError("not used")


class ControlStream:
    """Steps of one micro-batch: action 2 is preferred everywhere."""

    total_steps = 30

    def __iter__(self):  # type: ignore[no-untyped-def]
        generator = torch.Generator().manual_seed(0)
        for _ in range(self.total_steps):
            observations = torch.randn(8, 5, 3, generator=generator)
            actions = torch.cat([torch.full((4, 5), 2), torch.randint(0, 2, (4, 5), generator=generator)])
            yield [ControlBatch(observations, actions, ("a", "b", "c", "d"))]

    def metrics(self) -> dict[str, Any]:
        return {}

    def after_update(self, metrics: Any) -> None:
        pass

    def state_dict(self) -> Any:
        return {}

    def load_state_dict(self, state: Any) -> None:
        pass


def test_a_control_policy_trains_through_the_same_fit() -> None:
    """CPL on segments of states and actions: no loss or trainer line knows the difference."""
    policy = ControlPolicy()
    result = fit(
        policy, losses.get("cpl").bind(), ControlStream(), Optimization(learning_rate=3e-2), logging=Logging(log_every=1)
    )
    assert result.lines[-1]["loss"] < 0.8 * result.lines[0]["loss"]
    assert policy.net(torch.zeros(1, 3)).argmax().item() == 2


class Slow(OfflineStream):
    """A stream that leaves time to be killed."""

    pause = 0.0

    def __iter__(self) -> Iterator[list[PackedBatch]]:
        for step in super().__iter__():
            time.sleep(self.pause)
            yield step


def resumable(name: str, folder: Path, pause: float = 0.0) -> None:
    """Twenty steps on one thread, from the newest checkpoint in the folder on."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    budget = Budget(batch_size=4, max_steps=20, epochs=10)
    stream = Slow(pairs(24), kind="pairs", budget=budget, reference=tiny_reference())
    stream.pause = pause
    logging = Logging(log_every=3, save_every=2)
    loss = algorithms.get(name).setting().loss
    fit(tiny_policy(), loss, stream, Optimization(learning_rate=1e-2), logging=logging, folder=folder, resume=True)
    torch.set_num_threads(threads)


def launch(name: str, folder: Path, pause: float = 0.0) -> subprocess.Popen[bytes]:
    """`resumable` in a process of its own."""
    code = f"""
        import sys
        from pathlib import Path
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        import test_trainer
        test_trainer.resumable({name!r}, Path({str(folder)!r}), {pause})
    """
    return subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], env={**os.environ, "OMP_NUM_THREADS": "1"})


@pytest.mark.parametrize("name", ["dpo", "cpl_bc"])
@pytest.mark.fault(2)
def test_kill_9_and_resume_equals_the_uninterrupted_run(name: str, tmp_path: Path) -> None:
    """SIGKILL in mid-run, then the same command again: metrics are equal bit for bit but for timings, weights too."""
    from prefopt.runlog import read_lines

    resumable(name, tmp_path / "whole")
    process = launch(name, tmp_path / "cut", pause=0.1)
    deadline = time.monotonic() + 60
    while not [p for p in checkpoint.list_checkpoints(tmp_path / "cut") if int(p.name.split("-")[1]) >= 6]:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    resumable(name, tmp_path / "cut")
    assert read_lines(tmp_path / "cut") == read_lines(tmp_path / "whole")
    assert [line["step"] for line in read_lines(tmp_path / "cut")] == [3, 6, 9, 12, 15, 18, 20]
    (_, whole), (_, cut) = (checkpoint.load(tmp_path / run / "checkpoint-20") for run in ("whole", "cut"))
    for key, value in whole["policy"].items():
        assert cut["policy"][key].equal(value)


def test_metrics_are_valid_json_lines(tmp_path: Path) -> None:
    setting = algorithms.get("sft").setting()
    stream = OfflineStream(pairs(8), kind="completions", budget=Budget(batch_size=4))
    fit(
        tiny_policy(),
        setting.loss,
        stream,
        logging=Logging(log_every=1),
        folder=tmp_path,
        evaluate=lambda: {"x": 1.0},
        evaluate_at=(0, 2),
    )
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 1, 2, 2]
    assert "eval/x" in lines[0]
    assert "eval/x" in lines[-1]


@pytest.mark.fault(15)
def test_a_folder_with_checkpoints_is_resumed_or_refused(tmp_path: Path) -> None:
    """A new run in an old run's folder, or a resumed one with another learning rate, must not mix two runs."""

    def run(resume: bool, rate: float = 1e-3) -> Any:
        stream = OfflineStream(pairs(8), kind="completions", budget=Budget(batch_size=4))
        loss = algorithms.get("sft").setting().loss
        return fit(
            tiny_policy(), loss, stream, Optimization(rate), logging=Logging(save_every=1), folder=tmp_path, resume=resume
        )

    run(resume=False)
    with pytest.raises(OutputError, match="holds checkpoints of an earlier run"):
        run(resume=False)
    with pytest.raises(ConfigError, match="another optimization"):
        run(resume=True, rate=2e-3)
    assert run(resume=True).steps == 2


class Poisoned(OfflineStream):
    """One step's reference log-probs are not numbers."""

    poisoned_step = 3

    def __iter__(self) -> Iterator[list[PackedBatch]]:
        for number, step in enumerate(super().__iter__(), start=1):
            if number == self.poisoned_step:
                rows = {name: values * math.nan for name, values in step[0].rows.items()}
                step = [replace(step[0], rows=rows), *step[1:]]
            yield step


class Ahead(OfflineStream):
    """A fixed data set, asked for a step before the last one is trained; says which steps were asked for."""

    prefetchable = True

    def __iter__(self) -> Iterator[list[PackedBatch]]:
        for step in super().__iter__():
            self.asked = self._step
            yield step


def short_run(stream_type: type[OfflineStream], **options: Any) -> tuple[CausalLMPolicy, Any]:
    """Ten steps of DPO at one learning rate; `steps`, its hyper-parameters and `fit`'s options can be set."""
    policy, setting = tiny_policy(), algorithms.get("dpo").setting(**options.pop("hyper", {}))
    budget = Budget(batch_size=4, micro_batch_size=2, max_steps=options.pop("steps", 10), epochs=10)
    stream = stream_type(pairs(24), kind="pairs", budget=budget, reference=tiny_reference())
    optimization = Optimization(learning_rate=1e-2, schedule="constant", warmup=0)
    return policy, fit(policy, setting.loss, stream, optimization, **options)


def test_what_a_loss_says_about_its_options_is_an_error_for_the_user() -> None:
    """A share that is none: the loss's own message, as the kind of error that is shown without a traceback."""
    with pytest.raises(TrainingError, match=r"dpo_loss: label_smoothing is 0\.7"):
        short_run(OfflineStream, hyper={"label_smoothing": 0.7})


def equal_weights(first: CausalLMPolicy, second: CausalLMPolicy) -> bool:
    others = second.trainable_state()
    return all(value.equal(others[key]) for key, value in first.trainable_state().items())


@pytest.fixture
def deferred(monkeypatch: pytest.MonkeyPatch) -> None:
    """The guard as it is on a GPU."""
    monkeypatch.setattr(
        trainer,
        "UpdateGuard",
        lambda optimizer, device, deferred, folder: UpdateGuard(optimizer, device, deferred=True, folder=folder),
    )


@pytest.mark.usefixtures("deferred")
@pytest.mark.parametrize(
    "options",
    [
        {"logging": Logging(log_every=5)},
        {"logging": Logging(log_every=0, save_every=5)},
        {"logging": Logging(log_every=0), "evaluate": dict, "evaluate_at": (4,)},
    ],
)
@pytest.mark.fault(10)
def test_a_deferred_check_stops_all_updates_and_names_the_first_bad_step(options: dict[str, Any], tmp_path: Path) -> None:
    """Step 3 is bad and found at a log line, checkpoint or evaluation later: the weights are those of two steps."""
    policy = tiny_policy()
    budget = Budget(batch_size=4, micro_batch_size=2, max_steps=10, epochs=10)
    stream = Poisoned(pairs(24), kind="pairs", budget=budget, reference=tiny_reference())
    optimization = Optimization(learning_rate=1e-2, schedule="constant", warmup=0)
    good = OfflineStream(pairs(24), kind="pairs", budget=budget, reference=tiny_reference())
    third = ", ".join(row for batch in list(good)[2] for row in batch.ids)
    with pytest.raises(TrainingError, match=f"step 3: the loss is not finite.*Rows: {third}"):
        fit(policy, algorithms.get("dpo").setting().loss, stream, optimization, folder=tmp_path, **options)
    assert stream.state_dict()["step"] >= 4
    assert equal_weights(policy, short_run(OfflineStream, steps=2)[0])
    assert not checkpoint.list_checkpoints(tmp_path)
    assert (tmp_path / "metrics.jsonl").read_text() == ""


def test_deferring_the_check_changes_no_number(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    at_once, first = short_run(OfflineStream)
    request.getfixturevalue("deferred")
    later, second = short_run(OfflineStream)
    assert equal_weights(at_once, later)
    assert first.lines == second.lines


@pytest.mark.parametrize("deferred", [False, True])
@pytest.mark.fault(10)
def test_a_skipped_update_leaves_the_optimizer_alone(deferred: bool) -> None:
    """Infinite gradient in step 2: neither moments nor step counts move, then or in the good step after it."""
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([weight], lr=0.1, fused=True)
    guard = UpdateGuard(optimizer, weight.device, deferred=deferred)

    def step(number: int, norm: float) -> None:
        weight.grad = torch.full((3,), norm)
        batch = ControlBatch(torch.ones(2, 5, 3), torch.ones(2, 5), (f"row:{number}",))
        guard.watch(number, [batch], torch.tensor(1.0), torch.tensor(norm), {"dpo": torch.tensor(2.0)})
        optimizer.step()

    step(1, 1.0)
    before = {name: value.clone() for name, value in optimizer.state[weight].items()} | {"weight": weight.detach().clone()}

    def two_more_steps() -> None:
        step(2, math.inf)
        step(3, 1.0)
        guard.check()

    with pytest.raises(TrainingError, match=r"step 2: the gradient is not finite.*row:2\."):
        two_more_steps()
    after = {**optimizer.state[weight], "weight": weight.detach()}
    assert before.keys() == after.keys()
    assert all(value.equal(after[name]) for name, value in before.items())


@pytest.mark.parametrize("micro", [4, 2])
def test_a_step_in_which_no_row_counts_is_refused(micro: int) -> None:
    """The weights are zero: with one micro-batch known after the forward pass, with two before it."""
    stream = OfflineStream(pairs(8), kind="pairs", budget=Budget(batch_size=4, micro_batch_size=micro))
    with pytest.raises(TrainingError, match=r"step 1: the weights of 'trainer_test_weightless' sum to 0\.0; no row"):
        fit(tiny_policy(), losses.get("trainer_test_weightless").bind(), stream)


def test_steps_are_made_ahead_where_the_stream_allows_it(tmp_path: Path) -> None:
    """When step k is evaluated, step k+1 has been asked for; the numbers are those of a stream that is not asked ahead."""
    budget = Budget(batch_size=4, micro_batch_size=2, max_steps=10, epochs=10)
    stream = Ahead(pairs(24), kind="pairs", budget=budget, reference=tiny_reference())
    asked = []

    def evaluate() -> dict[str, float]:
        asked.append(stream.asked)
        return {}

    loss, optimization = algorithms.get("dpo").setting().loss, Optimization(learning_rate=1e-2, schedule="constant", warmup=0)
    policy = tiny_policy()
    fit(policy, loss, stream, optimization, evaluate=evaluate, evaluate_at=(1, 5, 10))
    assert asked == [2, 6, 10]
    assert equal_weights(policy, short_run(OfflineStream)[0])


@pytest.mark.fault(3)
def test_a_run_that_is_a_step_ahead_resumes_where_it_was(tmp_path: Path) -> None:
    """A checkpoint holds the position of the step that was trained, not of the one that was fetched."""

    def stop() -> dict[str, float]:
        raise KeyboardInterrupt

    options: dict[str, Any] = {"folder": tmp_path / "cut", "logging": Logging(log_every=2, save_every=2)}
    with pytest.raises(KeyboardInterrupt):
        short_run(Ahead, evaluate=stop, evaluate_at=(5,), **options)
    assert checkpoint.load(tmp_path / "cut" / "checkpoint-4")[1]["stream"] == {"step": 4}
    resumed, cut = short_run(Ahead, resume=True, **options)
    uninterrupted, whole = short_run(Ahead, **options | {"folder": tmp_path / "whole"})
    assert cut.lines == whole.lines
    assert equal_weights(resumed, uninterrupted)
