"""Jobs on a Ray cluster, which has to share the folders that they read and write. Needs the extra `ray`."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from types import ModuleType
from typing import Any

from prefopt.errors import ConfigError, OutputError
from prefopt.executors.protocol import R, T, WorkerLost

# Results go through files; only jobs and their failures pass through Ray's store, whose least is 75 MiB.
_STORE_BYTES = 100 << 20


def load_ray() -> ModuleType:
    """The package, told to report nothing to anybody.

    Raises:
        ConfigError: the extra is not installed.
    """
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    # A small model's cell runs where it would without Ray: earlier versions hide the GPUs from jobs that reserve none.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    try:
        import ray
    except ImportError as error:
        raise ConfigError(
            "--executor ray needs the 'ray' extra, here and on every worker: pip install -e '.[ray]'; or leave --executor out."
        ) from error
    return ray


class RayCluster:
    """Runs every job in a process of its own on some machine of the cluster, in a folder of the same name as here.

    Args:
        address: HOST:PORT of the cluster's head, or auto for the one that this machine is part of; empty starts one on this
            machine, which ends with the executor. A cluster that this process is connected to already is used as it is.
        most: jobs at once; None leaves that to the cluster.
        whole: a job takes a GPU or, where no machine has one, a whole machine. Else it takes a CPU core.

    Raises:
        ConfigError: the extra is not installed, or there is no such cluster.
    """

    def __init__(self, address: str, most: int | None, *, whole: bool) -> None:
        self._ray = load_ray()
        self._ours = not self._ray.is_initialized()
        if self._ours:
            self._connect(address, most)
        self.slots = sys.maxsize if most is None else most
        # A cluster's head often offers nothing itself.
        machines = [node["Resources"] for node in self._ray.nodes() if node["Alive"] and node["Resources"].get("CPU")]
        gpus = any(machine.get("GPU") for machine in machines)
        self._needs = {
            "num_cpus": 1 if gpus or not whole else min((int(machine["CPU"]) for machine in machines), default=1),
            "num_gpus": int(whole and gpus),
        }
        # max_calls: a process of its own for every job. max_retries: who submits says that a worker was lost, and retries.
        self._remote = self._ray.remote(max_calls=1, max_retries=0, **self._needs)(_in_folder)

    def _connect(self, address: str, most: int | None) -> None:
        quiet: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
        local = {"num_cpus": most, "include_dashboard": False, "object_store_memory": _STORE_BYTES}
        try:
            self._ray.init(address=address or "local", **quiet, **({} if address else local))
        # Ray raises bare ones too, as when a busy machine does not start a cluster within its half minute.
        except Exception as error:
            raise ConfigError(
                f"--ray-address {address or 'is not given, and a cluster on this machine did not start'}: "
                f"{_line(error)} Name HOST:PORT of a running cluster, or auto on one of its machines."
            ) from error

    def submit(self, function: Callable[[T], R], job: T) -> Future[R]:
        """As the protocol."""
        outcome: Future[R] = Future()
        self._remote.remote(os.getcwd(), function, job).future().add_done_callback(partial(self._settle, outcome))
        return outcome

    def _settle(self, outcome: Future[R], done: Future[R]) -> None:
        error = done.exception()
        if error is None:
            outcome.set_result(done.result())
        elif isinstance(error, self._ray.exceptions.RayTaskError):
            outcome.set_exception(error.cause)
        elif isinstance(error, self._ray.exceptions.RayError):
            outcome.set_exception(WorkerLost(_line(error)))
        else:
            outcome.set_exception(error)

    def __enter__(self) -> RayCluster:
        return self

    def __exit__(self, *_: object) -> None:
        if self._ours:
            self._ray.shutdown()


def _line(error: Exception) -> str:
    """The first line of what it says."""
    return (str(error) or type(error).__name__).splitlines()[0]


def _in_folder(folder: str, function: Callable[[T], R], job: T) -> R:
    """In a worker: paths of a study may be relative."""
    try:
        os.chdir(folder)
    except OSError as error:
        raise OutputError(
            f"{folder}, where the study was started, is not on the machine of a worker; start it in a folder that all share."
        ) from error
    return function(job)
