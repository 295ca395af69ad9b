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


class TrainingError(PrefoptError):
    """Training stopped before an update that would have done harm; the message names step and rows."""
