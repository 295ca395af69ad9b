"""`prefopt iterate`: sample from the policy, have the samples labelled, learn from the labels, and again."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cyclopts import App

from losses.declaration import read_options
from losses.suggestions import suggest_option
from prefopt import algorithms
from prefopt.cli.flags import (
    Flag,
    check_values,
    hyper_flags,
    import_flag,
    import_paths,
    make_command,
    option_flags,
    option_values,
    parameter_defaults,
)
from prefopt.cli.lookup import find_algorithm
from prefopt.cli.train import SAVE_EVERY
from prefopt.errors import ConfigError
from prefopt.iterate import LoopOptions, iterate
from prefopt.machine import standard_console
from prefopt.options import build_options

_RUN, _LOOP, _UPDATE, _DEFAULT = "Run", "Loop", "--update", "dpo"
_HELP = """Rounds of feedback: sample completions from the policy, have them labelled, update the policy on the labels.

--update names what learns. An offline loss (dpo, ipo, kto, sft, ...) trains on the labelled samples. An on-policy one \
(ppo, rloo, grpo, ...) maximises a reward model that is trained anew in every round on all labels so far. The budget \
(--max-steps, --epochs) is a round's.

--labeller reward labels by what --reward names, through the label model of --labels: --reward true --labels bt, --reward \
my_judge.py:score --labels deterministic, --reward MODEL_FOLDER --labels soft. --labeller people writes a page to vote on and \
stops; --resume --votes FILE goes on.

Every round leaves its samples (with the hash of the policy and how they were drawn), labels, rows that --data reads, metrics \
and policy in its folder. A loop that was killed goes on with --resume; no label is lost or asked for twice."""
# A round is measured at its end.
_IDLE = frozenset({"checkpoints"})


def build(tokens: Sequence[str]) -> App:
    """`iterate`, with the hyper-parameters of the algorithm that `--update` names.

    Raises:
        ConfigError: an algorithm that does not exist or cannot be trained alone, or more than one.
    """
    algorithms.import_files(import_paths(tokens))
    algorithm = _algorithm(tokens)
    own = _own_flags(algorithm)
    flags = [*_loop_flags(), *_run_flags(), *own.values(), *_option_flags()]

    def run(
        *,
        output_dir: Path | None = None,
        seed: int = 0,
        resume: bool = False,
        overwrite: bool = False,
        votes: Path | None = None,
        imports: tuple[str, ...] = (),
        **values: Any,
    ) -> None:
        if output_dir is None:
            raise ConfigError("name the folder of this loop: prefopt iterate --output-dir FOLDER.")
        setting = check_values(
            algorithm.setting(**{name: values[flag.name] for name, flag in own.items() if flag.name in values})
        )
        loop = LoopOptions(**{name: values[name] for name in read_options(LoopOptions, _LOOP) if name in values})
        iterate(
            setting, build_options(values, save_every=SAVE_EVERY), loop, output_dir, seed=seed, imports=imports, votes=votes,
            resume=resume, overwrite=overwrite, console=standard_console(),
        )  # fmt: skip

    app = App("iterate", version_flags=(), default_parameter=parameter_defaults(), help_format="plaintext", help=_HELP)
    app.default(make_command(run, flags, _LOOP))
    return app


def explain_unknown(tokens: Sequence[str], option: str) -> str:
    """What to do about an option that the loop and its update do not have."""
    algorithm = _algorithm(tokens)
    name = option.lstrip("-").partition("=")[0].replace("-", "_")
    flags = [*_loop_flags(), *_run_flags(), *_own_flags(algorithm).values(), *_option_flags()]
    hint = suggest_option(name, [flag.name for flag in flags])
    return (
        f"iterate with --update {algorithm.name} has no option {option.partition('=')[0]}{hint}. "
        f"`prefopt iterate --update {algorithm.name} --help` lists them."
    )


def _algorithm(tokens: Sequence[str]) -> algorithms.Algorithm:
    asked = option_values(tokens, _UPDATE) or [_DEFAULT]
    if len(asked) > 1:
        raise ConfigError(f"{_UPDATE} takes one loss, got {' and '.join(asked)}. Their sum is one: {'+'.join(asked)}.")
    algorithm = find_algorithm(asked[0])
    if algorithms.family(algorithm.loss) == "rewards":
        raise ConfigError(
            f"{_UPDATE} {asked[0]} trains a reward model and no policy; it is what on-policy updates (ppo, rloo) train first: "
            "see --reward-loss."
        )
    return algorithm


def _own_flags(algorithm: algorithms.Algorithm) -> dict[str, Flag]:
    """The algorithm's flags by hyper-parameter; one that the loop has too is spelled with the algorithm's name before it."""
    taken = {flag.name for flag in _loop_flags()}
    prefix = "".join(char if char.isalnum() else "_" for char in algorithm.name)
    return {
        flag.name: Flag(f"{prefix}_{flag.name}", flag.annotation, flag.default, flag.help, flag.group)
        if flag.name in taken
        else flag
        for flag in hyper_flags(algorithm)
    }


def _loop_flags() -> list[Flag]:
    update = "What learns: a loss, or a weighted sum of losses (`prefopt losses`)."
    declared = read_options(LoopOptions, _LOOP).values()
    return [
        Flag("update", str, _DEFAULT, update, _LOOP),
        *(Flag(option.name, option.annotation, option.default, option.help, _LOOP) for option in declared),
    ]


def _run_flags() -> list[Flag]:
    return [
        Flag("output_dir", Path | None, None, "Folder of this loop (required): a folder for each round, and a summary.", _RUN),
        Flag("seed", int, 0, "Of prompts, samples, label noise, sides of the page and training.", _RUN),
        Flag("resume", bool, False, "Go on with what the folder holds, with more --rounds if you like.", _RUN),
        Flag("overwrite", bool, False, "Delete the loop that the folder holds.", _RUN),
        Flag("votes", Path | None, None, "Votes of people, as the page saved them, for the round that waits for them.", _RUN),
        import_flag(_RUN),
    ]


def _option_flags() -> list[Flag]:
    return [flag for flag in option_flags(save_every=SAVE_EVERY) if flag.name not in _IDLE]
