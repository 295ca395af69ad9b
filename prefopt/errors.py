"""Errors that users can act on. The command line prints their message alone and exits with `exit_code`."""


class PrefoptError(Exception):
    """Base of all errors that say what was expected, what was got and what to do."""

    exit_code = 1


class ConfigError(PrefoptError):
    """An unknown name, an option out of range or options that contradict each other."""

    exit_code = 2


class DataError(PrefoptError):
    """Data that cannot be used; the message names file and row."""

    exit_code = 2


class HubError(PrefoptError):
    """A hub could not be reached, or does not have what was asked for; the message names the local alternative."""

    exit_code = 2


class OutputError(PrefoptError):
    """An output folder that holds another run, or cannot be written."""

    exit_code = 2


class SaveError(OutputError):
    """A checkpoint could not be written.

    Args:
        what: happened.
    """

    def __init__(self, what: str) -> None:
        super().__init__(what)
        self.what = what

    def __str__(self) -> str:
        return f"{self.what} Free space and resume; --on-failed-save continue goes on without such checkpoints."


class TrainingError(PrefoptError):
    """Training stopped before an update that would have done harm; the message names step and rows."""


class DistributedError(PrefoptError):
    """Another process of the run died, is stuck or ended by an error; the message names its rank and where it was."""


class Stopped(PrefoptError):
    """A signal came; the step was finished and a checkpoint written.

    Args:
        number: of the signal.
        step, total: updates made, and planned.
    """

    def __init__(self, number: int, step: int, total: int) -> None:
        super().__init__(number, step, total)  # as pickle gives them back to a parent process
        self.number, self.step, self.total = number, step, total

    @property
    def exit_code(self) -> int:  # type: ignore[override]
        """As shells say it."""
        return 128 + self.number

    def __str__(self) -> str:
        return f"stopped by signal {self.number} after step {self.step} of {self.total}, with a checkpoint."
