"""`fit`: the one training loop. It knows losses, batches and a policy protocol; nothing of language, sampling or data sets."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from losses.registry import BoundLoss, BoundTerm
from losses.types import VOCABULARY, LossOutput
from prefopt import checkpoint
from prefopt.communicator import Communicator, SingleProcess
from prefopt.coupled import coupled_objectives
from prefopt.errors import ConfigError, OutputError, TrainingError
from prefopt.metrics import Meter
from prefopt.models.protocol import Batch, Policy, trainable_parameters
from prefopt.optimization import Logging, Optimization, build_optimizer
from prefopt.runlog import RunLog
from prefopt.streams import Stream


@dataclass
class FitResult:
    """What a run leaves behind besides the policy.

    Args:
        steps: optimizer updates made, earlier parts of a resumed run included.
        tokens: tokens encoded with gradient.
        seconds: of this process, in the loop, evaluations excluded.
        lines: every metrics line, earlier parts included.
    """

    steps: int = 0
    tokens: int = 0
    seconds: float = 0.0
    lines: list[dict[str, Any]] = field(default_factory=list)


def fit(
    policy: Policy,
    loss: BoundLoss,
    stream: Stream,
    optimization: Optimization | None = None,
    *,
    logging: Logging | None = None,
    folder: Path | None = None,
    resume: bool = False,
    evaluate: Callable[[], Mapping[str, float]] | None = None,
    evaluate_at: Sequence[int] = (),
    communicator: Communicator | None = None,
    console: Console | None = None,
    title: str = "training",
) -> FitResult:
    """Trains `policy` on `stream` by `loss`, in place.

    Args:
        policy: a causal LM, a control policy, or anything else with the protocol.
        loss: with its hyper-parameters.
        stream: yields the micro-batches of each update.
        optimization: learning rate, schedule, clipping; None takes the defaults.
        logging: intervals of log lines and checkpoints; None takes the defaults.
        folder: for metrics.jsonl and checkpoints; None keeps everything in memory.
        resume: go on from the newest good checkpoint in `folder`, if there is one.
        evaluate: called after the steps in `evaluate_at`; its numbers enter metrics.jsonl as `eval/<name>`.
        evaluate_at: step counts; 0 is before the first update.
        communicator: reductions over ranks; a single process by default.
        console: where progress and messages go; None is silent.
        title: of the progress bar.

    Raises:
        TrainingError: a loss or gradient is not finite, or the first loss is not the one that policy = reference gives;
            the update was not made.
        OutputError: `folder` holds checkpoints and `resume` is off.
        ConfigError: the checkpoint to resume from was written by another loss, optimizer or length of run.
    """
    optimization, logging = optimization or Optimization(), logging or Logging()
    run = _Run(policy, loss, stream, optimization, logging, folder, communicator or SingleProcess(), _sayer(console))
    if resume:
        run.restore()
    elif folder is not None and checkpoint.list_checkpoints(folder):
        raise OutputError(f"{folder} holds checkpoints of an earlier run: resume it, or name another folder.")
    log = RunLog(folder, title, stream.total_steps, start=run.step, console=console)
    run.result.lines.extend(log.earlier)
    with log:
        if run.step == 0:
            run.evaluate(log, evaluate, evaluate_at)
        for micro_batches in stream:
            run.update(micro_batches)
            run.after_update(log)
            run.evaluate(log, evaluate, evaluate_at)
            if folder is not None and logging.save_every and _due(run.step, logging.save_every, stream.total_steps):
                run.save()
    return run.result


class _Run:
    """The state of one run: what a checkpoint holds."""

    def __init__(
        self,
        policy: Policy,
        loss: BoundLoss,
        stream: Stream,
        optimization: Optimization,
        logging: Logging,
        folder: Path | None,
        communicator: Communicator,
        say: Callable[[str], None],
    ) -> None:
        self.policy, self.loss, self.stream, self.optimization = policy, loss, stream, optimization
        self.logging, self.folder, self.communicator, self.say = logging, folder, communicator, say
        self.parameters = trainable_parameters(policy)
        if not self.parameters:
            raise ConfigError("the policy has no trainable parameter: every weight is frozen.")
        self.optimizer = build_optimizer(policy, optimization)
        self.meter = Meter()
        self.step = 0
        # name -> (sum, count) of running statistics that losses update, such as BCO's reward shift
        self.running: dict[str, tuple[float, float]] = {}
        self.result = FitResult()
        self._timer = 0.0

    def update(self, micro_batches: Sequence[Batch]) -> None:
        """One optimizer update from all micro-batches of a step: forward, loss, backward, check, step."""
        begin = time.perf_counter()
        self.policy.train(True)
        scale = self.optimization.rate(self.step, self.stream.total_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = self.optimization.learning_rate * group["lr_scale"] * scale
        total = self._backward(micro_batches)
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.optimization.clip_norm or math.inf)
        if not bool(torch.isfinite(total) & torch.isfinite(norm)):
            self._refuse(micro_batches, total, norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.meter.add_value("loss", total)
        self.meter.add_value("grad_norm", norm)
        for name, metric in self.stream.metrics().items():
            self.meter.add(name, metric)
        self.step += 1
        self.result.steps = self.step
        self.result.tokens += sum(batch.tokens for batch in micro_batches)
        self._timer += time.perf_counter() - begin

    def _backward(self, micro_batches: Sequence[Batch]) -> Tensor:
        """Accumulates the gradient of the whole step's objective, and returns its value without gradient."""
        plain = [term for term in self.loss.terms if not term.coupled]
        coupled = [term for term in self.loss.terms if term.coupled]
        weights = self._global_weights(plain, micro_batches)
        surrogates = coupled_objectives(coupled, self._given, self.policy, micro_batches, self.communicator, self._record)
        values: list[Tensor] = list(surrogates.values)
        anchors: list[Tensor] = []
        for index, batch in enumerate(micro_batches):
            tensors = self._tensors(batch, self.loss.terms)
            objectives = []
            for term in plain:
                output = term(tensors)
                objectives.append(term.coefficient * (output.loss * output.weight).sum() / weights[term.name])
                self._record(term, output)
            if self.step == 0 and plain:
                anchors.append(self._anchor(plain, batch, tensors, weights))
            values.extend(value.detach() for value in objectives)
            objective = torch.stack([*objectives, *surrogates.objectives(index, tensors)]).sum()
            objective.backward()
        total = self.communicator.sum(torch.stack([value.detach() for value in values]).sum())
        if anchors and not any(torch.isnan(anchor) for anchor in anchors):
            self._check_first_loss(total - sum(surrogates.values), torch.stack(anchors).sum(), micro_batches)
        return total

    def _global_weights(self, terms: Sequence[BoundTerm], micro_batches: Sequence[Batch]) -> dict[str, Tensor]:
        """Each term's weight summed over all micro-batches and ranks, before any forward pass: weights never depend on
        policy values, so the loss on zeros yields them."""
        totals: dict[str, Tensor] = {}
        for batch in micro_batches:
            for term in terms:
                zeros = {name: torch.zeros(_shape(name, batch)) for name in term.needs if VOCABULARY[name].source == "policy"}
                given = self._given(batch, term.needs | term.optional)
                device = next((value.device for value in given.values()), torch.device("cpu"))
                with torch.no_grad():
                    weight = term({**{k: v.to(device) for k, v in zeros.items()}, **given}).weight.double().sum()
                totals[term.name] = totals.get(term.name, 0.0) + weight
        totals = {name: self.communicator.sum(total) for name, total in totals.items()}
        for name, total in totals.items():
            if not total > 0:
                raise TrainingError(
                    f"step {self.step + 1}: the weights of {name!r} sum to {float(total)}; no row of this step counts."
                )
        return totals

    def _given(self, batch: Batch, names: frozenset[str]) -> dict[str, Tensor]:
        """What batch and running statistics provide, on the parameters' device."""
        wanted = {name for name in names if VOCABULARY[name].source not in ("policy", "state")}
        device = self.parameters[0].device
        given = {name: value.to(device) for name, value in batch.tensors(wanted).items()}
        for name in names:
            if VOCABULARY[name].source == "state":
                total, count = self.running.get(name, (0.0, 0.0))
                given[name] = torch.tensor(total / count if count else 0.0, device=device)
        return given

    def _tensors(self, batch: Batch, terms: Sequence[BoundTerm]) -> dict[str, Tensor]:
        needs = frozenset().union(*(term.needs for term in terms))
        optional = frozenset().union(*(term.optional for term in terms))
        from_policy = {name for name in needs if VOCABULARY[name].source == "policy"}
        return {**self._given(batch, needs | optional), **self.policy.evaluate(batch, from_policy)}

    def _record(self, term: BoundTerm, output: LossOutput) -> None:
        for name, metric in output.metrics.items():
            self.meter.add(name, metric)
        if len(self.loss.terms) > 1:
            self.meter.add(f"loss/{term.name}", (output.loss, output.weight))
        for name, (total, count) in output.updates.items():
            old = self.running.get(name, (0.0, 0.0))
            added = self.communicator.sum(torch.stack([total.detach().double(), count.detach().double()])).tolist()
            self.running[name] = (old[0] + added[0], old[1] + added[1])

    def _anchor(
        self, terms: Sequence[BoundTerm], batch: Batch, tensors: Mapping[str, Tensor], weights: Mapping[str, Tensor]
    ) -> Tensor:
        """The objective with policy := reference (or := the sampling policy on rollouts); NaN where neither is known."""
        swapped = dict(tensors)
        for name in tensors:
            if VOCABULARY[name].source == "policy" and name.startswith("policy_"):
                candidates = [name.replace("policy_", source) for source in ("old_", "reference_")]
                found = batch.tensors(candidates)
                if not found:
                    return torch.tensor(math.nan)
                swapped[name] = found[candidates[0] if candidates[0] in found else candidates[1]].to(tensors[name])
        with torch.no_grad():
            outputs = [(term, term(swapped)) for term in terms]
            return torch.stack([t.coefficient * (o.loss * o.weight).sum() / weights[t.name] for t, o in outputs]).sum().double()

    def _check_first_loss(self, got: Tensor, expected: Tensor, micro_batches: Sequence[Batch]) -> None:
        value, anchor = float(got), float(self.communicator.sum(expected))
        if getattr(self.policy, "dropout", False):
            self.say("dropout is on: the first loss is not compared with the loss of policy = reference.")
            return
        tolerance = _first_loss_tolerance(self.parameters[0]) * (1 + abs(anchor))
        if math.isfinite(value) and not abs(value - anchor) <= tolerance:
            self.optimizer.zero_grad(set_to_none=True)
            raise TrainingError(
                f"the first loss is {value:.6g}, but with policy = reference it is {anchor:.6g} (tolerance {tolerance:.1g}). "
                "Before the first update the two must agree. Likely causes: the reference log-probs belong to other weights or "
                "another tokenisation, dropout is active, the adapter does not start at zero, or policy and reference differ "
                "in precision. "
                f"Rows: {_some_ids(micro_batches)}."
            )

    def _refuse(self, micro_batches: Sequence[Batch], total: Tensor, norm: Tensor) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        raise TrainingError(
            f"step {self.step + 1}: the {'loss' if not torch.isfinite(total) else 'gradient'} is not finite "
            f"(loss {float(total):.6g}, gradient norm {float(norm):.6g}); no update was made. "
            f"Rows: {_some_ids(micro_batches)}. Lower the learning rate, or look at these rows."
        )

    def after_update(self, log: RunLog) -> None:
        """Writes a log line when one is due."""
        last = self.step == self.stream.total_steps
        if _due(self.step, self.logging.log_every, self.stream.total_steps):
            steps = self.logging.log_every if not last else (self.step - 1) % self.logging.log_every + 1
            line = {"step": self.step, "learning_rate": self.optimizer.param_groups[0]["lr"], "tokens": self.result.tokens}
            line |= self.meter.read(self.communicator)
            self.result.seconds += self._timer
            log.write(line, {"time/seconds_per_step": self._timer / steps, "time/elapsed": self.result.seconds})
            self.result.lines.append(line)
            self._timer = 0.0
        log.advance(self.step)

    def evaluate(self, log: RunLog, evaluate: Callable[[], Mapping[str, float]] | None, at: Sequence[int]) -> None:
        """Runs the evaluation when one is due, without touching generators or gradients."""
        if evaluate is None or self.step not in at:
            return
        generators = checkpoint.generator_state()
        self.policy.train(False)
        with torch.no_grad():
            line = {"step": self.step} | {f"eval/{name}": value for name, value in evaluate().items()}
        checkpoint.load_generator_state(generators)
        log.write(line, {})
        self.result.lines.append(line)

    def save(self) -> None:
        assert self.folder is not None
        tree = {
            "policy": self.policy.trainable_state(),
            "optimizer": checkpoint.optimizer_state(self.optimizer),
            "generators": checkpoint.generator_state(),
            "stream": self.stream.state_dict(),
            "meter": self.meter.state_dict(),
            "running": {name: list(pair) for name, pair in self.running.items()},
            "step": self.step,
            "tokens": self.result.tokens,
            "run": self._description(),
        }
        checkpoint.save(self.folder, self.step, tree, keep=self.logging.keep)

    def _description(self) -> dict[str, Any]:
        """What a checkpoint and the run that resumes from it must have in common."""
        return {
            "loss": self.loss.name,
            "hyper-parameters": {name: repr(value) for name, value in self.loss.hyper.items()},
            "optimization": asdict(self.optimization),
            "number of steps": self.stream.total_steps,
        }

    def restore(self) -> None:
        if self.folder is None:
            raise ConfigError("resume needs the run's output folder.")
        found = checkpoint.load_latest(self.folder, self.say)
        if found is None:
            self.say("nothing to resume: no checkpoint yet, starting from the first step.")
            return
        step, tree = found
        own = self._description()
        if tree["run"] != own:
            differing = ", ".join(sorted(name for name in own if tree["run"].get(name) != own[name]))
            raise ConfigError(
                f"the checkpoint in {self.folder} was written by a run with another {differing}; resume with the same options, "
                "or name another folder."
            )
        self.policy.load_trainable_state(tree["policy"])
        checkpoint.load_optimizer_state(self.optimizer, tree["optimizer"])
        self.stream.load_state_dict(tree["stream"])
        self.meter.load_state_dict(tree["meter"])
        self.running = {name: (pair[0], pair[1]) for name, pair in tree["running"].items()}
        self.step = self.result.steps = tree["step"]
        self.result.tokens = tree["tokens"]
        checkpoint.load_generator_state(tree["generators"])
        self.say(f"resumed after step {step}.")


def _sayer(console: Console | None) -> Callable[[str], None]:
    return (lambda text: None) if console is None else lambda text: console.print(text, highlight=False, soft_wrap=True)


def _first_loss_tolerance(parameter: Tensor) -> float:
    if parameter.device.type == "cuda" or parameter.dtype in (torch.bfloat16, torch.float16):
        return 5e-2  # bf16 kernels under another packing move a sequence's log-prob by about 1e-2 nats
    return 1e-8 if parameter.dtype == torch.float64 else 1e-3


def _shape(name: str, batch: Batch) -> tuple[int, ...]:
    sizes = batch.sizes
    return tuple(sizes[letter] for letter in VOCABULARY[name].shape)


def _some_ids(micro_batches: Sequence[Batch], most: int = 8) -> str:
    ids = [row for batch in micro_batches for row in batch.ids]
    return ", ".join(ids[:most]) + (f" and {len(ids) - most} more" if len(ids) > most else "")


def _due(step: int, every: int, total: int) -> bool:
    return step == total or (every > 0 and step % every == 0)
