"""`iterate`: rounds of sampling, labelling and learning, each of which lies on disk and is not done twice.

    output/iterate.json            what the loop is
    output/start.json              the policy before the first round
    output/round-01/samples.jsonl  what was drawn, from which weights and how
                    labels.jsonl   what the labeller said, row by row
                    label.html     the page of people who label
                    rows.jsonl     the same as training data for --data
                    training/      metrics and checkpoints of the update
                    policy/        the policy after it
                    round.json     counts and metrics: written last, it says that the round is finished
    output/summary.json, rounds.png

What is there is not made again; a round's random numbers depend on the seed and its number alone. So a loop that was killed at
any moment and resumed is, bit by bit, the loop that was not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from rich.console import Console

from prefopt.algorithms import Setting
from prefopt.errors import ConfigError
from prefopt.iterate.folder import claimed, round_name
from prefopt.iterate.labels import check_label_model
from prefopt.iterate.options import LoopOptions
from prefopt.iterate.rounds import Outcome, Rounds
from prefopt.iterate.summary import print_rounds, write_summary
from prefopt.iterate.update import POLICY_FOLDER
from prefopt.models.hydra import BASED
from prefopt.options import Options, default_cache

# What may differ when a loop goes on: more rounds, and how labels are asked for, not which.
_FREE = frozenset({"rounds", "label_batch", "accept_missing"})


def iterate(
    setting: Setting,
    options: Options,
    loop: LoopOptions,
    output: Path,
    *,
    seed: int = 0,
    imports: Sequence[str] = (),
    votes: Path | None = None,
    cache: Path | None = None,
    resume: bool = False,
    overwrite: bool = False,
    console: Console | None = None,
) -> Outcome:
    """Runs the rounds that are not finished, or as far as people have voted.

    An offline loss trains on the round's labelled samples. An on-policy one samples for itself and maximises a reward model
    that is trained anew in every round, on all labels so far. Each round has its own optimizer and schedule; the budget is of
    one round.

    Args:
        setting: the update's algorithm with its hyper-parameters.
        options: data, model, reward (of the labeller), label model, budget.
        loop: rounds, samples, labeller, reference.
        output: the loop's folder.
        seed: of prompts, samples, label noise and training.
        imports: users' files with losses, for the record.
        votes: of people, for the round that waits for them.
        cache: of shared starts, reward models and reference log-probs.
        resume: go on with what the folder holds.
        overwrite: delete what it holds.
        console: for people; None is silent.

    Raises:
        PrefoptError: bad options, votes or output folder; or a reward that failed, after which the loop can be resumed.
    """
    _check(setting, options, loop, votes)
    console = console or Console(quiet=True)
    name = setting.algorithm.name
    fixed = {key: value for key, value in asdict(loop).items() if key not in _FREE}
    own = {"update": name, "hyper": dict(setting.hyper), "seed": seed, "imports": [*imports], "loop": fixed}
    with claimed(output, {**own, **options.as_dict()}, resume=resume, overwrite=overwrite):
        outcome = Rounds(setting, options, loop, output, seed, cache or default_cache(), console).run(votes)
        if outcome.rounds:
            write_summary(output, outcome.start, outcome.rounds)
            print_rounds(outcome.start, outcome.rounds, console)
            policy = output / round_name(len(outcome.rounds)) / POLICY_FOLDER
            console.print(f"policy: {policy}", highlight=False, soft_wrap=True, markup=False)
    return outcome


def _check(setting: Setting, options: Options, loop: LoopOptions, votes: Path | None) -> None:
    check_label_model(options.data.labels, options.data.label_temperature, loop.samples_per_prompt)
    if options.model.hydra in BASED:
        raise ConfigError(
            f"--hydra {options.model.hydra} freezes its reward model, but a loop trains it anew in every round: trunk or off."
        )
    if not options.logging.save_every:
        raise ConfigError("save_every is 0, but a round starts from the checkpoint of the one before: give 1 or more.")
    if votes is not None and loop.labeller != "people":
        raise ConfigError(f"votes are of --labeller people, but the labeller is {loop.labeller!r}.")
    if loop.keep_rows and setting.algorithm.on_policy:
        raise ConfigError(f"keep_rows is of offline losses; {setting.algorithm.name}'s reward model sees all labels anyway.")
