"""The command line: `prefopt train | compare | evaluate | tune | rerun | bundle | iterate | report |
judge | label | power | plan | cite | data | control | losses | laws | doctor`.

Commands are imported only when they are called, so that help does not wait for torch.
"""

from __future__ import annotations

import errno
import importlib
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from cyclopts import App, CycloptsError, UnknownOptionError

from prefopt import __version__
from prefopt.errors import PrefoptError, Stopped
from prefopt.stopping import telling

FAILED, USAGE, INTERRUPTED = 1, 2, 130
# A disk, a quota, and the largest file that is allowed.
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

_HELP = "prefopt compares preference-optimization algorithms: same rows, same order, same reference, one trainer."
_EXAMPLES = """Examples:
  prefopt train ipo --help                                   what IPO is, and every flag
  prefopt train dpo:1.0+sft:0.2 --dpo-beta 0.3 --output-dir runs/sum   any weighted sum of losses is a loss
  prefopt compare dpo ipo cpl --output-dir runs/first        three algorithms in the built-in exact world
  prefopt train dpo --data pairs.jsonl --model MODEL_FOLDER --lora 8 --output-dir runs/dpo
  prefopt data inspect pairs.jsonl                           what would be read, and what left out
  prefopt laws my_loss --import my_loss.py                   a loss of your own under the laws

Every command takes --debug: it shows the traceback of an error."""


@dataclass(frozen=True)
class _Command:
    """A sub-command that is imported when it is called. `module.build(tokens)` makes its App."""

    help: str
    module: str


_COMMANDS = {
    "train": _Command("Train one algorithm and measure the policy.", "prefopt.cli.train"),
    "compare": _Command("Train several algorithms on several seeds and write the report.", "prefopt.cli.compare"),
    "evaluate": _Command("Measure policies that were trained anywhere, or samples.", "prefopt.cli.evaluate"),
    "tune": _Command("Choose every algorithm's numbers by equally many trials.", "prefopt.cli.tune"),
    "bundle": _Command("Pack a finished comparison as one archive to publish.", "prefopt.cli.bundle"),
    "rerun": _Command("Train a cell of a comparison once more, and say whether the same came out.", "prefopt.cli.rerun"),
    "iterate": _Command("Sample, label and learn in rounds, by a reward or by people.", "prefopt.cli.iterate"),
    "score": _Command("Score pairs by many losses on one forward pass: values, rewards, gradients.", "prefopt.cli.score"),
    "report": _Command("Make report.html anew from the results of a comparison.", "prefopt.cli.report"),
    "judge": _Command("Win rates of samples under judges: models, functions, people.", "prefopt.cli.judge"),
    "label": _Command("Label pairs by a language model or a reward: data that any algorithm trains on.", "prefopt.cli.label"),
    "power": _Command("What seeds and prompts can show, before a run.", "prefopt.cli.power"),
    "plan": _Command("Will a model fit on so many GPUs, by which setting, and how long it takes.", "prefopt.cli.plan"),
    "cite": _Command("Methods paragraph and BibTeX of what a comparison used.", "prefopt.cli.cite"),
    "data": _Command("Look at preference data.", "prefopt.cli.data"),
    "control": _Command("Make offline data of simulated control tasks, or look at it.", "prefopt.cli.control"),
    "losses": _Command("List the losses by family, or show one whole: equation, data, flags, paper.", "prefopt.cli.losses"),
    "laws": _Command("Check a loss against the laws that every loss obeys.", "prefopt.cli.laws"),
    "doctor": _Command("Show versions, devices and which extras are installed.", "prefopt.cli.doctor"),
}

# What a command does that is called again after an interruption.
_AGAIN = {
    "train": "with --resume goes on from the newest checkpoint",
    "iterate": "with --resume goes on with what is not finished",
    "compare": "goes on with what is not finished",
    "tune": "goes on with the trials that are missing",
    "label": "goes on with the labels that are missing",
    "control": "goes on with the shards that are missing",
}

_ONE_PROCESS = (
    "a launcher has started several processes (WORLD_SIZE is above 1), and prefopt {} is one process: start it without the "
    "launcher. Of prefopt's commands, train --strategy ddp and fsdp2 run under one."
)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command line; the process's arguments by default.

    Returns:
        The exit code: 0, 1 for a training that failed or a law that is broken, 2 for what the user can mend, 130 when
        interrupted, 128 + n after signal n. Errors that are not the user's are raised.
    """
    tokens = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in tokens
    tokens = [token for token in tokens if token != "--debug"]
    wanted = next((token for token in tokens if not token.startswith("-")), "")
    if wanted in _AGAIN and wanted != "train" and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        print(f"error: {_ONE_PROCESS.format(wanted)}", file=sys.stderr)
        return USAGE
    again = f"The same command {_AGAIN.get(wanted, 'starts again')}."
    try:
        with telling(f"interrupted. {again}"):
            code = _build(wanted, tokens)(tokens, exit_on_error=False, print_error=False)
        return code if isinstance(code, int) else 0
    except KeyboardInterrupt:
        print(f"interrupted. {again}", file=sys.stderr)
        return INTERRUPTED
    except Stopped as error:
        print(f"{error} {again}", file=sys.stderr)
        return error.exit_code
    except CycloptsError as error:
        if debug:
            raise
        print(f"error: {_usage_message(error, wanted, tokens)}", file=sys.stderr)
        return USAGE
    except Exception as error:
        found = _outcome(error, again)
        if debug or found is None:
            raise
        code, message = found
        print(f"error: {message}", file=sys.stderr)
        return code


def _build(wanted: str, tokens: Sequence[str]) -> App:
    app = App(
        "prefopt", help=_HELP, help_epilogue=_EXAMPLES, help_format="plaintext", version=__version__,
        result_action="return_value", suppress_keyboard_interrupt=False,
    )  # fmt: skip
    for name, command in _COMMANDS.items():
        sub = importlib.import_module(command.module).build(tokens) if name == wanted else App(name, version_flags=())
        sub.help_epilogue = ""
        sub.help = sub.help or command.help
        app.command(sub)
    return app


def _outcome(error: Exception, again: str) -> tuple[int, str] | None:
    """The exit code and message of an error that the user can do something about; None for all others.

    Only a command that imported a package can raise its errors, so none is imported here.
    """
    if isinstance(error, PrefoptError):
        return error.exit_code, str(error)
    registry = sys.modules.get("losses.registry")
    if registry is not None and isinstance(error, registry.UnknownName | registry.RegistrationError):
        return USAGE, str(error)
    if _is_full_disk(error):
        return FAILED, f"the disk is full: {error}. Free space. {again}"
    memory = sys.modules.get("prefopt.memory")
    if memory is not None and memory.is_out_of_memory(error):
        return FAILED, f"{memory.explain(error)} {again}"
    return None


def _is_full_disk(error: Exception) -> bool:
    if isinstance(error, OSError):
        return error.errno in _FULL
    # Its writers are in Rust, and have an exception of their own.
    safetensors = sys.modules.get("safetensors")
    own = safetensors is not None and isinstance(error, safetensors.SafetensorError)
    return own and any(f"(os error {number})" in str(error) for number in _FULL)


def _usage_message(error: CycloptsError, wanted: str, tokens: Sequence[str]) -> str:
    """What cyclopts says, or what the command knows better about an option that it does not have."""
    if isinstance(error, UnknownOptionError) and error.token.source == "cli" and wanted in _COMMANDS:
        explain = getattr(sys.modules[_COMMANDS[wanted].module], "explain_unknown", None)
        if explain is not None:
            return explain(tokens, error.token.keyword or error.token.value)
    place = f" {wanted}" if wanted in _COMMANDS else ""
    return f"{' '.join(str(error).split())} `prefopt{place} --help` lists what there is."
