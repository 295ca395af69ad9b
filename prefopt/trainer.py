"""`fit`: the one training loop. It knows losses, batches and a policy protocol; nothing of language, sampling or data sets."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from losses.registry import BoundLoss, BoundTerm
from losses.types import VOCABULARY, LossOutput, Max, Metric
from prefopt import checkpoint
from prefopt.coupled import coupled_objectives
from prefopt.errors import ConfigError, OutputError, Stopped, TrainingError
from prefopt.first_loss import anchor_loss, check_first_loss
from prefopt.guard import NotFiniteError, UpdateGuard
from prefopt.memory import Halver, explained
from prefopt.metrics import Meter
from prefopt.models.protocol import Batch, Policy, trainable_parameters
from prefopt.optimization import Logging, Optimization, build_optimizer
from prefopt.parallel.strategy import Strategy
from prefopt.prefetch import Feed
from prefopt.recovery import Recovery
from prefopt.runlog import RunLog
from prefopt.snapshots import Parts, Progress, Snapshots
from prefopt.stopping import listening
from prefopt.streams import Stream


@dataclass
class FitResult:
    """What a run leaves behind besides the policy.

    Args:
        steps: optimizer updates made, earlier parts of a resumed run included.
        tokens: tokens encoded with gradient.
        seconds: of this process, in the loop: making batches (rollouts included) and training; no evaluations, no writing.
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
    recovery: Recovery | None = None,
    folder: Path | None = None,
    resume: bool = False,
    evaluate: Callable[[], Mapping[str, float]] | None = None,
    evaluate_at: Sequence[int] = (),
    strategy: Strategy | None = None,
    console: Console | None = None,
    title: str = "training",
    starts_at_reference: bool = True,
) -> FitResult:
    """Trains `policy` on `stream` by `loss`, in place.

    Args:
        policy: a causal LM, or anything else with the protocol.
        loss: with its hyper-parameters.
        stream: yields the micro-batches of each update.
        optimization: learning rate, schedule, clipping; None takes the defaults.
        logging: intervals of log lines and checkpoints; None takes the defaults.
        recovery: what is done about trouble; None takes the defaults.
        folder: for metrics.jsonl and checkpoints; None keeps everything in memory.
        resume: go on from the newest good checkpoint in `folder`, if there is one.
        evaluate: called after the steps in `evaluate_at`; its numbers enter metrics.jsonl as `eval/<name>`.
        evaluate_at: step counts; 0 is before the first update.
        strategy: how the run is spread over processes; every one of them calls `fit` with an equal policy and a stream that has
            the same strategy. One process by default. Afterwards each holds the whole trained policy, and rank 0 alone `lines`.
        console: where progress and messages go; None is silent.
        title: of the progress bar.
        starts_at_reference: False for a policy that has moved away from its reference already, as in later rounds of a loop:
            then the first loss is not checked.

    Raises:
        TrainingError: a loss or gradient is not finite, the first loss is not the one that policy = reference gives, or
            memory is not enough; the update was not made. On a GPU what is not finite is found at the next log line,
            checkpoint or evaluation, and no update was made in between.
        OutputError: `folder` holds checkpoints and `resume` is off, or cannot be written.
        ConfigError: the checkpoint to resume from was written by another loss, optimizer or length of run, or the processes
            see different checkpoints.
        Stopped: SIGINT, SIGTERM or SIGUSR1 came, the step was finished and a checkpoint written.
    """
    optimization, logging, recovery = optimization or Optimization(), logging or Logging(), recovery or Recovery()
    strategy = strategy or Strategy()
    console = console if strategy.leads else None
    run = _Run(policy, loss, stream, optimization, logging, recovery, folder, strategy, _sayer(console))
    run.anchored = starts_at_reference
    if resume:
        run.restore()
    elif folder is not None and checkpoint.list_checkpoints(folder):
        raise OutputError(f"{folder} holds checkpoints of an earlier run: resume it, or name another folder.")
    patient, own = recovery.on_failed_save == "continue", folder if strategy.leads else None
    log = RunLog(own, title, stream.total_steps, start=run.step, console=console, patient=patient)
    run.result.lines.extend(log.earlier)
    # A reward model may be trained in the middle of an evaluation, which has gradients off.
    echo = _LAUNCHER_ECHO if strategy.communicator.world_size > 1 else 0.0
    with log, run.snapshots, torch.enable_grad(), listening(folder is not None, echo) as request:
        run.resume_clock()
        if run.step == 0:
            run.evaluate(log, evaluate, evaluate_at)
        while (micro_batches := run.feed.next()) is not None:
            with explained(f"{title}, step {run.step + 1}", micro_batches, divisible=strategy.communicator.world_size == 1):
                run.update(micro_batches)
            run.feed.prefetch()  # before anything waits for the device
            run.after_update(log)
            run.evaluate(log, evaluate, evaluate_at)
            due = logging.save_every and _due(run.step, logging.save_every, stream.total_steps)
            # A signal may reach one rank only, or two ranks in different steps.
            asked = int(run.communicator.max(torch.tensor(request.number)))
            if folder is not None and (due or asked):
                run.save()
            if asked:
                run.snapshots.wait()
                raise Stopped(asked, run.step, stream.total_steps)
        run.guard.check()
        run.count_tokens()
    strategy.release(policy)
    return run.result


# Seconds in which a launcher has passed a signal on to its processes.
_LAUNCHER_ECHO = 3.0


class _Run:
    """The state of one run: what a checkpoint holds."""

    def __init__(
        self,
        policy: Policy,
        loss: BoundLoss,
        stream: Stream,
        optimization: Optimization,
        logging: Logging,
        recovery: Recovery,
        folder: Path | None,
        strategy: Strategy,
        say: Callable[[str], None],
    ) -> None:
        self.policy, self.loss, self.stream, self.optimization = policy, loss, stream, optimization
        self.logging, self.folder, self.strategy, self.say = logging, folder, strategy, say
        self.communicator = strategy.communicator
        self.recovery, self.halver = recovery, Halver(recovery.on_out_of_memory == "halve", say)
        if recovery.on_out_of_memory == "halve" and self.communicator.world_size > 1:
            raise ConfigError("on_out_of_memory halve is of one process: of several, those with room would wait for ever.")
        if not any(parameter.requires_grad for parameter in trainable_parameters(policy)):
            raise ConfigError("the policy has no trainable parameter: every weight is frozen.")
        strategy.prepare(policy)
        self.parameters = trainable_parameters(policy)
        self.device = self.parameters[0].device
        self.optimizer = build_optimizer(policy, optimization)
        # A CPU has its numbers at once; a GPU is asked for them where a log line waits for it anyway.
        # To skip a step, its numbers must be known before the next one.
        deferred = self.device.type != "cpu" and not recovery.skip_bad_steps
        self.guard = UpdateGuard(self.optimizer, self.device, deferred=deferred, folder=folder if strategy.leads else None)
        self.skipped = 0  # updates left out, because their loss or gradient was not finite
        self.feed = Feed(stream, self.device)
        self.meter = Meter()
        run = {
            "loss": loss.name,
            "hyper-parameters": {name: repr(value) for name, value in loss.hyper.items()},
            "optimization": asdict(optimization),
            "number of steps": stream.total_steps,  # as planned: rollouts may leave out some of them on the way
        }
        patient = recovery.on_failed_save == "continue"
        parts = Parts(policy, self.optimizer, self.feed, self.meter)
        self.snapshots = Snapshots(folder, parts, run, strategy, logging=logging, patient=patient, say=say)
        self.step = 0
        # name -> [2] sum and count of running statistics that losses update, such as BCO's reward shift
        self.running: dict[str, Tensor] = {}
        # What this step adds to them. No micro-batch may see what another one adds, so it waits for the step's end.
        self._added: dict[str, Tensor] = {}
        # This step's metrics, one of each micro-batch, for streams that go by them.
        self._reported: dict[str, list[Metric]] = {}
        self.result = FitResult()
        self._tokens = 0  # of this rank, not yet in the result
        self._states = sorted(n for n in loss.needs | loss.optional if VOCABULARY[n].source == "state")
        self._plain = [term for term in loss.terms if not term.coupled]
        self._coupled = [term for term in loss.terms if term.coupled]
        self._from_policy = frozenset(name for name in loss.needs if VOCABULARY[name].source == "policy")
        self._in_training = False
        self.anchored = True  # the first loss is compared with that of policy = reference
        self._began = time.perf_counter()
        self._timer = 0.0

    def update(self, micro_batches: Sequence[Batch]) -> None:
        """One optimizer update from all micro-batches of a step: forward, loss, backward, check, step."""
        if not self._in_training:
            self.policy.train(True)
            # A stream of rollouts switches to evaluation mode when it samples; others leave the policy alone.
            self._in_training = self.feed.ahead
        scale = self.optimization.rate(self.step, self.stream.total_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = self.optimization.learning_rate * group["lr_scale"] * scale
        self.strategy.at_step(self.step + 1)
        take_back = self._reports() if self.recovery.skip_bad_steps else None
        micro_batches, (total, weights) = self.halver.run(micro_batches, self._backward, self._reports)
        norm = self.strategy.clip(self.parameters, self.optimization.clip_norm or math.inf)
        try:
            self.guard.watch(self.step + 1, micro_batches, total, norm, weights)
            self.optimizer.step()
            self.meter.add_value("loss", total)
            self.meter.add_value("grad_norm", norm)
            made = True
        except NotFiniteError as error:
            self._skip(error, take_back)
            made = False
        finally:
            self.optimizer.zero_grad(set_to_none=True)
        if self.recovery.skip_bad_steps:
            self.meter.add("skipped_steps", Max(torch.tensor([float(self.skipped)])))
        for name, metric in self.stream.metrics().items():
            self.meter.add(name, metric)
        if made:
            self.stream.after_update(self._reported)
        self._reported = {}
        self.step += 1
        self.result.steps = self.step
        self._tokens += sum(batch.tokens for batch in micro_batches if batch.ids)

    def _reports(self) -> Callable[[], None]:
        """Takes back what a step that is not made has told the meter and the running statistics, and its gradient."""
        meter, running = self.meter.state_dict(), dict(self.running)

        def take_back() -> None:
            self.optimizer.zero_grad(set_to_none=True)
            self.meter.load_state_dict(meter)
            self.running, self._added, self._reported = running, {}, {}

        return take_back

    def _skip(self, error: NotFiniteError, take_back: Callable[[], None] | None) -> None:
        """Leaves an update out, or raises the error when no more may be."""
        if take_back is None or self.skipped >= self.recovery.skip_bad_steps:
            raise error
        take_back()
        self.skipped += 1
        most = self.recovery.skip_bad_steps
        self.say(f"step {error.step}: {error.what}; left out ({self.skipped} of at most {most}). {error.where}")

    def _backward(self, micro_batches: Sequence[Batch]) -> tuple[Tensor, dict[str, Tensor]]:
        """Accumulates the gradient of the whole step's objective; returns its value and each term's weight, no gradient."""
        # One micro-batch on one process is the whole step: its weights are the global ones, and its rows are all there are.
        whole = len(micro_batches) == 1 and self.communicator.world_size == 1
        plain, coupled = (self.loss.terms, ()) if whole else (self._plain, self._coupled)
        weights = {} if whole else self._global_weights(plain, micro_batches)
        surrogates = coupled_objectives(
            coupled, self._given, self.policy, micro_batches, self.communicator, self._record_shared
        )
        # In one type, also on a rank that has no rows in this step.
        values: list[Tensor] = [torch.zeros((), dtype=torch.float64, device=self.device)]
        anchors: list[Tensor] = []
        for index, batch in enumerate(micro_batches):
            tensors = self._tensors(batch, last=index == len(micro_batches) - 1)
            outputs = [(term, _output(term, tensors)) for term in plain] if batch.ids else []
            if whole:
                weights = {term.name: output.weight.detach().double().sum() for term, output in outputs}
            objectives = [t.coefficient * (out.loss * out.weight).sum() / weights[t.name] for t, out in outputs]
            for term, output in outputs:
                self._record(term, output)
            if self.step == 0 and self.anchored and outputs:
                anchors.append(anchor_loss(plain, batch, tensors, weights).to(self.device, torch.float64))
            values.extend(value.detach() for value in objectives)
            parts = [*objectives, *surrogates.objectives(index, tensors)]
            if not batch.ids:  # it has no rows: a pass beside those of the other ranks, whose gradient is zero
                parts = [value.sum() for name, value in tensors.items() if name in self._from_policy]
            (parts[0] if len(parts) == 1 else torch.stack(parts).sum()).backward()
        self._fold_updates()
        total = self.communicator.sum(torch.stack(values).sum())
        if self.step == 0 and self.anchored and plain:
            anchor = torch.stack([torch.zeros((), dtype=torch.float64, device=self.device), *anchors]).sum()
            self._check_first_loss(total, self.communicator.sum(anchor), micro_batches)
        # Every rank has the coupled terms of all ranks.
        return total + sum(surrogates.values), {**weights, **surrogates.weights}

    def _global_weights(self, terms: Sequence[BoundTerm], micro_batches: Sequence[Batch]) -> dict[str, Tensor]:
        """Each term's weight summed over all micro-batches and ranks, before any forward pass: weights never depend on
        policy values, so the loss on zeros yields them."""
        totals = {term.name: torch.zeros((), dtype=torch.float64, device=self.device) for term in terms}
        for batch in micro_batches:
            for term in terms if batch.ids else ():
                given = self._given(batch, term.needs | term.optional)
                zeros = {name: torch.zeros(_shape(name, batch), device=self.device) for name in term.needs & self._from_policy}
                with torch.no_grad():
                    weight = _output(term, {**zeros, **given}).weight.double().sum()
                totals[term.name] = totals[term.name] + weight
        return dict(zip(totals, self.communicator.sum(torch.stack([*totals.values()])).unbind(), strict=True)) if totals else {}

    def _check_first_loss(self, got: Tensor, anchor: Tensor, micro_batches: Sequence[Batch]) -> None:
        if torch.isnan(anchor):  # neither a reference nor a sampling policy is known
            return
        if getattr(self.policy, "dropout", False):
            self.say("dropout is on: the first loss is not compared with the loss of policy = reference.")
            return
        try:
            check_first_loss(got, anchor, self.parameters[0], _ids(micro_batches))
        except TrainingError:
            self.optimizer.zero_grad(set_to_none=True)
            raise

    def _given(self, batch: Batch, names: frozenset[str]) -> dict[str, Tensor]:
        """What batch and running statistics provide, on the parameters' device."""
        wanted = names - self._from_policy
        given = {name: value.to(self.device) for name, value in batch.tensors(wanted).items()}
        for name in wanted:
            if VOCABULARY[name].source == "state":
                given[name] = self._running_mean(name)
        return given

    def _running_mean(self, name: str) -> Tensor:
        """Scalar; 0 before anything was seen."""
        if name not in self.running:
            return torch.zeros((), device=self.device)
        total, count = self.running[name]
        return torch.where(count > 0, total / count, 0.0).float()

    def _tensors(self, batch: Batch, *, last: bool) -> dict[str, Tensor]:
        given = self._given(batch, self.loss.needs | self.loss.optional)
        return {**given, **self.strategy.evaluate(batch, self._from_policy, last=last)}

    def _record(self, term: BoundTerm, output: LossOutput) -> None:
        for name, metric in output.metrics.items():
            self.meter.add(name, metric)
            self._reported.setdefault(name, []).append(metric)
        if len(self.loss.terms) > 1:
            self.meter.add(f"loss/{term.name}", (output.loss, output.weight))
        for name, (total, count) in output.updates.items():
            added = torch.stack([value.detach().double().to(self.device) for value in (total, count)])
            self._added[name] = self._added[name] + added if name in self._added else added

    def _record_shared(self, term: BoundTerm, output: LossOutput) -> None:
        """As `_record`, for an output that every rank has: it counts on rank 0 alone."""
        share = float(self.strategy.leads)
        updates = {name: (total * share, count * share) for name, (total, count) in output.updates.items()}
        metrics = {n: m if isinstance(m, Max) else (m[0], m[1] * share) for n, m in output.metrics.items()}
        self._record(term, replace(output, weight=output.weight * share, metrics=metrics, updates=updates))

    def _fold_updates(self) -> None:
        """Adds what the step's terms report to the running statistics, summed over ranks."""
        for name in self._states:
            own = self._added.get(name, torch.zeros(2, dtype=torch.float64, device=self.device))
            added = self.communicator.sum(own)
            self.running[name] = self.running[name] + added if name in self.running else added
        self._added = {}

    def resume_clock(self) -> None:
        """Goes on counting training time."""
        self._began = time.perf_counter()

    def settle(self) -> None:
        """Waits for the device, refuses what was not finite, and stops the clock until `resume_clock`."""
        self.guard.check()
        self.count_tokens()
        self._timer += time.perf_counter() - self._began

    def count_tokens(self) -> None:
        """Brings the result's tokens up to date, those of all ranks; they do it together."""
        self.result.tokens += int(self.communicator.sum(torch.tensor(self._tokens)))
        self._tokens = 0

    def after_update(self, log: RunLog) -> None:
        """Writes a log line when one is due."""
        last = self.step == self.stream.total_steps
        if _due(self.step, self.logging.log_every, self.stream.total_steps):
            self.settle()
            every = self.logging.log_every or self.stream.total_steps
            steps = every if not last else (self.step - 1) % every + 1
            line = {"step": self.step, "learning_rate": self.optimizer.param_groups[0]["lr"], "tokens": self.result.tokens}
            line |= self.meter.read(self.communicator)
            self.result.seconds += self._timer
            log.write(line, {"time/seconds_per_step": self._timer / steps, "time/elapsed": self.result.seconds})
            self.result.lines.append(line)
            self._timer = 0.0
            self.resume_clock()
        log.advance(self.step)

    def evaluate(self, log: RunLog, evaluate: Callable[[], Mapping[str, float]] | None, at: Sequence[int]) -> None:
        """Runs the evaluation when one is due, without touching generators or gradients."""
        if evaluate is None or self.step not in at:
            return
        self.settle()
        generators = checkpoint.generator_state()
        self.policy.train(False)
        self._in_training = False
        with torch.no_grad(), self.strategy.whole(self.policy):
            line = {"step": self.step} | {f"eval/{name}": value for name, value in evaluate().items()}
        checkpoint.load_generator_state(generators)
        log.write(line, {})
        self.result.lines.append(line)
        self.resume_clock()

    def save(self) -> None:
        """Writes a checkpoint."""
        self.settle()
        self.snapshots.save(Progress(self.step, self.result.tokens, self.skipped, dict(self.running)))
        self.resume_clock()

    def restore(self) -> None:
        """Goes on from the newest good checkpoint, if there is one."""
        if (found := self.snapshots.restore()) is not None:
            self.step = self.result.steps = found.step
            self.result.tokens, self.skipped = found.tokens, found.skipped
            self.running = {name: pair.to(self.device) for name, pair in found.running.items()}


def _output(term: BoundTerm, tensors: Mapping[str, Tensor]) -> LossOutput:
    """A term's loss. What it says about its data or options is a message for the user, as from the rest of the loop."""
    try:
        return term(tensors)
    except ValueError as error:
        raise TrainingError(str(error)) from error


def _sayer(console: Console | None) -> Callable[[str], None]:
    return (lambda text: None) if console is None else lambda text: console.print(text, highlight=False, soft_wrap=True)


def _shape(name: str, batch: Batch) -> tuple[int, ...]:
    sizes = batch.sizes
    return tuple(sizes[letter] for letter in VOCABULARY[name].shape)


def _ids(micro_batches: Sequence[Batch]) -> list[str]:
    return [row for batch in micro_batches for row in batch.ids]


def _due(step: int, every: int, total: int) -> bool:
    return step == total or (every > 0 and step % every == 0)
