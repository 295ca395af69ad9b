"""Where jobs run: in this process, in processes of this machine, or on a Ray cluster, all behind one protocol."""

from __future__ import annotations

from prefopt.executors.placement import ExecutorName, Placement
from prefopt.executors.protocol import Executor, WorkerLost

__all__ = ["Executor", "ExecutorName", "Placement", "WorkerLost"]
