"""The choice of an executor, as the flags of a command name it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Literal, get_args

from prefopt.errors import ConfigError
from prefopt.executors.processes import Processes, ThisProcess
from prefopt.executors.protocol import Executor
from prefopt.executors.ray_cluster import RayCluster, load_ray

ExecutorName = Literal["processes", "ray"]


@dataclass(frozen=True)
class Placement:
    """Where the cells of a study run.

    Args:
        executor: processes of this machine, or a Ray cluster.
        workers: side by side; None chooses by task and machine, 0 runs all in this process.
        ray_address: HOST:PORT of a cluster, or auto; empty starts one on this machine.

    Raises:
        ConfigError: values that contradict each other, or the extra of the executor is not installed.
    """

    executor: ExecutorName = "processes"
    workers: int | None = None
    ray_address: str = ""

    def __post_init__(self) -> None:
        if self.executor not in get_args(ExecutorName):
            raise ConfigError(f"executor is {self.executor!r}; expected {' or '.join(get_args(ExecutorName))}.")
        if self.workers is not None and self.workers < 0:
            raise ConfigError(f"workers is {self.workers}; expected 0 or more processes.")
        if self.executor == "ray":
            if self.workers == 0:
                raise ConfigError("--workers 0 runs cells in this process, and --executor ray elsewhere: drop one of them.")
            load_ray()
        elif self.ray_address:
            raise ConfigError(f"--ray-address {self.ray_address} is of --executor ray: add it, or leave the address out.")

    def side_by_side(self, *, tiny: bool, cells: int) -> int:
        """Processes on this machine that share its cores; 0 where cells do not share them.

        Args:
            tiny: models are bound by launch overhead and run on a thread each; others get the whole machine.
            cells: how many there are.
        """
        if self.executor == "ray":
            return 0
        if self.workers is not None:
            return self.workers
        return max(1, min(os.cpu_count() or 1, cells)) if tiny else 1

    def start(self, *, tiny: bool, cells: int) -> Executor:
        """The executor; arguments as of `side_by_side`.

        Raises:
            ConfigError: there is no such cluster.
        """
        if self.executor == "ray":
            return RayCluster(self.ray_address, self.workers, whole=not tiny)
        workers = self.side_by_side(tiny=tiny, cells=cells)
        return Processes(workers) if workers else ThisProcess()
