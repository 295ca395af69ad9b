"""DPO, IPO, CPL, offline PPO-clip and PPO side by side in the exactly solvable world, 3 seeds.

python -m benchmarks.exact
"""

from __future__ import annotations

import argparse
from pathlib import Path

from prefopt.compare import compare
from prefopt.machine import standard_console
from prefopt.optimization import Optimization
from prefopt.options import DataOptions, EvaluationOptions, Options, SupervisedOptions
from prefopt.streams import Budget
from prefopt.study import Entry, Study

ALGORITHMS = ("dpo", "ipo", "cpl", "ppo_offline", "ppo")


def exact_study() -> Study:
    """3 seeds, 400 updates of 64 pairs (or rollouts); PPO pays for KL what DPO's beta charges."""
    options = Options(
        data=DataOptions(pairs=8192),
        budget=Budget(batch_size=64, epochs=100, max_steps=400, micro_batch_tokens=1 << 20),
        optimization=Optimization(learning_rate=3e-4),
        supervised=SupervisedOptions(reward_epochs=2, reward_learning_rate=1e-3, reward_batch_size=64),
        evaluation=EvaluationOptions(checkpoints=8),
    )
    entries = [Entry(name, {"rollout_size": 256, "kl_coef": 0.1} if name == "ppo" else {}, name) for name in ALGORITHMS]
    return Study(entries, (0, 1, 2), options, title="The exactly solvable world", preset="exact")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output-dir", type=Path, default=Path("runs/bench/exact"))
    asked = parser.parse_args()
    compare(exact_study(), asked.output_dir, overwrite=True, console=standard_console())


if __name__ == "__main__":
    main()
