"""Runs that one process and a pair of processes make alike; as a script, one process of the pair.

    python parallel_scenarios.py compare FOLDER PORT PORT      under the environment of torchrun
    python parallel_scenarios.py killed|stuck|failing FOLDER

Results are FOLDER/<strategy>/<scenario>.safetensors (the trained weights) and .json (the metrics), written by rank 0.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import shutil
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from safetensors.torch import save_file
from torch import Tensor

from prefopt import algorithms, checkpoint
from prefopt.algorithms import Setting
from prefopt.data.exact_world import ExactWorld, WorldConfig
from prefopt.data.records import Example
from prefopt.errors import DataError, PrefoptError, Stopped
from prefopt.models.causal_lm import CausalLMPolicy, FrozenReference, build_policy
from prefopt.models.lora import LoRA
from prefopt.models.packed import head_names
from prefopt.optimization import Logging, Optimization
from prefopt.options import ParallelOptions
from prefopt.parallel.choice import open_strategy
from prefopt.parallel.strategy import Strategy
from prefopt.recovery import Recovery
from prefopt.reference import ReferenceCache
from prefopt.rollouts import Workshop, online, rollouts
from prefopt.streams import Budget, OfflineStream, Stream
from prefopt.trainer import FitResult, fit

WORLD = ExactWorld(WorldConfig(seed=1, prompts=5, symbols=5, max_completion_length=6))
STEPS, SAVE_EVERY = 20, 8
TIMEOUT = 20.0
# 9 rollouts in batches of 4: the last minibatch of a buffer has one row, so that a rank goes without.
ROLLOUTS = {"rollout_size": 9, "max_new_tokens": 4}
MORE: dict[str, dict[str, Any]] = {"ppo": {**ROLLOUTS, "kl_target": 0.5, "scale_scores": "running", "stop_kl": 0.02}}


@dataclass(frozen=True)
class Scenario:
    """One run."""

    algorithm: str
    lora: bool = False
    dtype: torch.dtype = torch.float64
    checkpointing: bool = False
    reference_pass: str = "ahead"
    temperature: float = 1.0
    steps: int = STEPS

    @property
    def name(self) -> str:
        parts = [self.algorithm, "lora" if self.lora else "full", str(self.dtype).removeprefix("torch.")]
        more = ["checkpointing"] if self.checkpointing else []
        more += [self.reference_pass] if self.reference_pass != "ahead" else []
        return "-".join([*parts, *more, *([f"t{self.temperature}"] if self.temperature != 1 else [])])


HEADLINE = ("dpo", "kto", "aot", "ppo")
EXACT = [Scenario(name, lora) for name in HEADLINE for lora in (False, True)]
FLOAT32 = [Scenario(name, dtype=torch.float32) for name in HEADLINE]
OTHERS = [
    Scenario("dpo", lora=True, checkpointing=True, steps=10),
    Scenario("dpo", checkpointing=True, steps=10),
    Scenario("ipo", lora=True, reference_pass="in-loop", steps=10),
    Scenario("bco", steps=10),
    Scenario("tdpo", steps=10),
    Scenario("tdpo", lora=True, steps=10),
    Scenario("online_dpo", temperature=0.7, steps=10),
    Scenario("plackett_luce", steps=10),
]


def build(scenario: Scenario, setting: Setting) -> tuple[CausalLMPolicy, FrozenReference]:
    """The same weights at every call."""
    torch.manual_seed(0)
    config = WORLD.model_config()
    config.hidden_size, config.intermediate_size, config.num_attention_heads, config.num_key_value_heads = 24, 32, 2, 1
    config.head_dim, config.max_position_embeddings = 12, 64
    model = transformers.AutoModelForCausalLM.from_config(config).to(scenario.dtype)
    for parameter in model.parameters():
        if parameter.dim() >= 2:
            torch.nn.init.normal_(parameter, std=0.2)
    return build_policy(
        model, WORLD.tokenizer, lora=LoRA(4, 8) if scenario.lora else None, heads=head_names(setting.loss.needs),
        checkpointing=scenario.checkpointing,
    )  # fmt: skip


def rows(count: int = 40) -> list[Example]:
    """Pairs of ragged lengths."""
    generator = torch.Generator().manual_seed(3)

    def ids(least: int, most: int) -> tuple[int, ...]:
        length = int(torch.randint(least, most + 1, (), generator=generator))
        return tuple(torch.randint(0, 5, (length,), generator=generator).tolist())

    return [Example(f"row:{i}", WORLD.prompt_ids[i % 5] + ids(0, 9), (ids(1, 7), ids(1, 7))) for i in range(count)]


def count_a(prompts: Sequence[Any], completions: Sequence[str]) -> Tensor:
    """More a and shorter is better."""
    return torch.tensor(
        [text.count("a") - 0.3 * len(text) + 0.1 * len(p) for p, text in zip(prompts, completions, strict=True)]
    )


def stream_of(
    scenario: Scenario, setting: Setting, policy: CausalLMPolicy, reference: FrozenReference, strategy: Strategy
) -> Stream:
    if not setting.algorithm.on_policy:
        budget = Budget(
            7, 0, 60, epochs=100, max_steps=scenario.steps, seed=1,
            reference_pass=scenario.reference_pass,  # type: ignore[arg-type]
        )  # fmt: skip
        return OfflineStream(
            rows(), kind=setting.algorithm.stream, budget=budget, needs=setting.loss.needs,
            reference=ReferenceCache(reference), dtype=policy.dtype, strategy=strategy,
        )  # fmt: skip
    examples = [Example(f"prompt:{i}", WORLD.prompt_ids[i % 5], ()) for i in range(11)]
    advantage = setting.algorithm.loss.advantage
    workshop = Workshop(
        policy, reference, count_a, examples, {e.id: WORLD.layout.text(e.prompt_ids) for e in examples},
        Budget(4, 0, 40, epochs=100, max_steps=scenario.steps, seed=1), (WORLD.layout.eos,), 6, setting.loss.needs,
        None if advantage is None else partial(advantage, **setting.advantage_options), policy.dtype, strategy,
    )  # fmt: skip
    make = online if setting.algorithm.online else rollouts
    kinds = [setting.algorithm.stream] if setting.algorithm.online else []
    return make(workshop, *kinds, **setting.stream_options)  # type: ignore[operator, no-any-return]


def run(
    scenario: Scenario,
    strategy: Strategy,
    *,
    folder: Path | None = None,
    resume: bool = False,
    save_every: int = 0,
    **more: Any,
) -> tuple[CausalLMPolicy, FitResult]:
    """`fit` from the start of the scenario, or from the newest checkpoint."""
    hyper = dict(MORE.get(scenario.algorithm, {}))
    if scenario.temperature != 1:
        hyper |= {"temperature": scenario.temperature, "rollout_size": 12, "max_new_tokens": 4}
    setting = algorithms.get(scenario.algorithm).setting(**hyper)
    policy, reference = build(scenario, setting)
    stream = stream_of(scenario, setting, policy, reference, strategy)
    result = fit(
        policy, setting.loss, stream, Optimization(learning_rate=3e-3, clip_norm=0.5, weight_decay=0.01),
        logging=Logging(1, save_every, keep=9), folder=folder, resume=resume, strategy=strategy, **more,
    )  # fmt: skip
    return policy, result


def main(folder: Path, ports: Sequence[str]) -> None:
    for name, port in zip(("ddp", "fsdp2"), ports, strict=True):
        (folder / name).mkdir(exist_ok=True)
        os.environ["MASTER_PORT"] = port  # of its own: the first store may not be gone yet
        with open_strategy(ParallelOptions(name, 300)) as strategy:  # type: ignore[arg-type]
            for scenario in (*EXACT, *FLOAT32, *OTHERS):
                write(folder / name / scenario.name, run(scenario, strategy), strategy)
            for algorithm in HEADLINE:
                resumes(folder, algorithm, strategy)
            signalled(folder / name, strategy)
            if name == "fsdp2":
                starved(folder / name, strategy)


def signalled(folder: Path, strategy: Strategy) -> None:
    """Rank 1 alone gets a signal, in step 3; what each rank made of it, and the run that goes on from there."""
    scenario = Scenario("dpo")

    def signal_one() -> dict[str, float]:
        if not strategy.leads:
            os.kill(os.getpid(), signal.SIGUSR1)
        return {}

    try:
        run(scenario, strategy, folder=folder / "signalled", evaluate=signal_one, evaluate_at=[3])
        told: dict[str, Any] = {"finished": True}
    except Stopped as stopped:
        told = {"step": stopped.step, "number": stopped.number}
    (folder / f"signalled-rank-{strategy.communicator.rank}.json").write_text(json.dumps(told))
    write(folder / "signalled-resumed", run(scenario, strategy, folder=folder / "signalled", resume=True), strategy)


def starved(folder: Path, strategy: Strategy) -> None:
    """Rank 1 can write no file when the first checkpoint is due."""
    unlimited, turns = resource.getrlimit(resource.RLIMIT_FSIZE), iter((1, 0))

    def limit() -> dict[str, float]:
        if next(turns) and not strategy.leads:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # an error instead of an end
            resource.setrlimit(resource.RLIMIT_FSIZE, (100, unlimited[1]))
        else:
            resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
        return {}

    with (folder / "starved-said").open("w") if strategy.leads else contextlib.nullcontext() as file:
        found = run(
            Scenario("dpo"), strategy, folder=folder / "starved", save_every=SAVE_EVERY, evaluate=limit, evaluate_at=[7, 12],
            recovery=Recovery(on_failed_save="continue"), console=file and Console(file=file, width=300),
        )  # fmt: skip
    write(folder / "starved-run", found, strategy)


def one_fails(how: str, folder: Path) -> None:
    """Rank 1 dies, sleeps for good or raises in step 3 of a run; what rank 0 says of it goes to standard error."""
    with open_strategy(ParallelOptions("ddp", TIMEOUT)) as strategy:

        def fail() -> dict[str, float]:
            if not strategy.leads:
                if how == "killed":
                    os.kill(os.getpid(), signal.SIGKILL)
                if how == "stuck":
                    time.sleep(1000)
                raise DataError("row 7 is spoilt")
            return {}

        run(Scenario("dpo"), strategy, evaluate=fail, evaluate_at=[3])


def resumes(folder: Path, algorithm: str, strategy: Strategy) -> None:
    """From two processes to two, and from one (whose checkpoints the test left there) to two; and checkpoints for the test."""
    scenario, own = Scenario(algorithm), folder / strategy.name
    run(scenario, strategy, folder=own / f"{algorithm}-whole", save_every=SAVE_EVERY)
    if strategy.leads:
        shutil.copytree(own / f"{algorithm}-whole", own / f"{algorithm}-cut")
        cut(own / f"{algorithm}-cut")
    strategy.lead(lambda: None)
    write(own / f"{algorithm}-two-to-two", run(scenario, strategy, folder=own / f"{algorithm}-cut", resume=True), strategy)
    single = folder / "single" / f"{algorithm}-{strategy.name}"
    write(own / f"{algorithm}-one-to-two", run(scenario, strategy, folder=single, resume=True), strategy)


def cut(folder: Path) -> None:
    """Leaves a finished run's first checkpoint, after step 8, as if it had been killed before the next one."""
    found = checkpoint.list_checkpoints(folder)
    for later in found[1:]:
        shutil.rmtree(later)


def write(path: Path, found: tuple[CausalLMPolicy, FitResult], strategy: Strategy) -> None:
    if strategy.leads:
        save_file({name: value.clone() for name, value in found[0].trainable_state().items()}, f"{path}.safetensors")
        path.with_name(f"{path.name}.json").write_text(json.dumps(found[1].lines))


if __name__ == "__main__":
    torch.set_num_threads(1)
    try:
        main(Path(sys.argv[2]), sys.argv[3:]) if sys.argv[1] == "compare" else one_fails(sys.argv[1], Path(sys.argv[2]))
    except PrefoptError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        os._exit(error.exit_code)
