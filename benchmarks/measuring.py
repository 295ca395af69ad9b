"""What the benchmarks measure with: the machine's matmul rate, how busy other processes keep it, peak memory, tables.

Two rules hold for every benchmark. Nothing is compared that did not run turn by turn on the same machine, and a time is
shown beside what the machine could do in that minute: a shared or throttled machine is visible instead of averaged in.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import math
import multiprocessing
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from rich.table import Table as RichTable

from prefopt.machine import peak_memory_mb, standard_console

BUSY_LIMIT = 0.05
"""A timing during which other processes used more than this share of the machine is dropped, counted and printed."""

_PACKAGES = ("prefopt", "torch", "transformers", "trl", "peft", "datasets", "accelerate")


def matmul_rate(seconds: float = 0.5, *, device: str = "cpu", size: int = 0, dtype: torch.dtype | None = None) -> float:
    """GFLOP/s of square matrix products: the median over as many as fit into `seconds`, at least 3.

    Args:
        seconds: about how long to measure; a warm-up product comes on top.
        device: "cpu", or "cuda".
        size: of the matrices; 0 takes 1024 on a CPU and 8192 on a GPU.
        dtype: None takes float32 on a CPU and bfloat16 on a GPU, which are what training uses there.
    """
    on_gpu = torch.device(device).type == "cuda"
    size = size or (8192 if on_gpu else 1024)
    dtype = dtype or (torch.bfloat16 if on_gpu else torch.float32)
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    product = left @ right
    rates: list[float] = []
    end = synchronized_time(device) + seconds
    while len(rates) < 3 or time.perf_counter() < end:
        begin = synchronized_time(device)
        torch.matmul(left, right, out=product)
        rates.append(2 * size**3 / (synchronized_time(device) - begin) / 1e9)
    return statistics.median(rates)


def synchronized_time(device: str = "cpu") -> float:
    """`time.perf_counter()` once the device has finished what it was given, in seconds."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


class Busy:
    """The share of all processors' time that others used between `start` and `stop`, or inside a `with` block.

    "Others" are all processes but this one and its ended children; time stolen by the host counts as theirs.

    Attributes:
        seconds: wall time in between.
        share: 0 to 1, over all processors; None where the system does not tell (no /proc/stat). The kernel counts in
            steps of 10 ms, so spans under about 0.5 s say little: put a loop of short steps into one span.
    """

    def __init__(self) -> None:
        self.seconds = math.nan
        self.share: float | None = None

    def start(self) -> Busy:
        """Begins a span; an earlier one is forgotten."""
        self._machine, self._own = _machine_seconds(), _own_seconds()
        self._begin = time.perf_counter()
        return self

    def elapsed(self) -> float:
        """Seconds since `start`."""
        return time.perf_counter() - self._begin

    def stop(self) -> Busy:
        """Ends the span and fills the attributes."""
        self.seconds = self.elapsed()
        now, own = _machine_seconds(), _own_seconds() - self._own
        if now is not None and self._machine is not None:
            total, used = (after - before for after, before in zip(now, self._machine, strict=True))
            self.share = max(0.0, used - own) / total if total > 0 else 0.0
        return self

    def __enter__(self) -> Busy:
        return self.start()

    def __exit__(self, *error: object) -> None:
        self.stop()

    @property
    def disturbed(self) -> bool:
        """Whether others used more than `BUSY_LIMIT`; False where that is not known."""
        return self.share is not None and self.share > BUSY_LIMIT


def _machine_seconds() -> tuple[float, float] | None:
    """(all, not idle) processor seconds since boot."""
    stat = Path("/proc/stat")
    if not stat.exists():
        return None
    # user nice system idle iowait irq softirq steal; the guest columns after them are contained in user and nice.
    ticks = [int(field) for field in stat.read_text().splitlines()[0].split()[1:9]]
    hertz = os.sysconf("SC_CLK_TCK")
    return sum(ticks) / hertz, (sum(ticks) - ticks[3] - ticks[4]) / hertz


def _own_seconds() -> float:
    """Processor seconds of this process and of children that have ended."""
    spent = os.times()
    return spent.user + spent.system + spent.children_user + spent.children_system


@dataclass(frozen=True)
class Peak:
    """What a function needed in a process of its own.

    Args:
        mb: most resident memory of the process, in MB, interpreter and libraries included.
        device_mb: most memory that torch allocated on the GPU, in MB; None without one.
        value: what the function returned.
        error: "" or why there is no value: out of memory, killed, or the exception's text; `mb` is then NaN.
    """

    mb: float
    device_mb: float | None
    value: Any
    error: str = ""


def peak_memory_of(function: Callable[..., Any], /, *arguments: Any, keep_free_mb: float = 1024.0, **keywords: Any) -> Peak:
    """Runs `function` in a fresh interpreter and reads that process's own peak.

    The process is ended before it takes the machine's last memory: what does not fit is a result, not an accident.

    Args:
        function: of a module's top level, so that the new process can import it.
        arguments, keywords: must pickle; so must the result (return numbers, not tensors).
        keep_free_mb: memory that has to stay available to the rest of the machine.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_measured, args=(sender, function, arguments, keywords))
    process.start()
    # The parent's copy has to go, or a killed child would never be seen as the end of the pipe.
    sender.close()
    peak = None
    try:
        # Memory fills at some GB/s: a look every 20 ms comes in time.
        while peak is None and not receiver.poll(0.02):
            if (free := available_memory_mb()) < keep_free_mb:
                process.kill()
                peak = Peak(math.nan, None, None, f"does not fit: ended when {free:.0f} MB were left to the machine")
        if peak is None:
            peak = receiver.recv()
    except EOFError:
        process.join()
        killed = "killed, most likely for memory" if process.exitcode in (-9, 137) else "ended without an answer"
        peak = Peak(math.nan, None, None, f"{killed} (exit code {process.exitcode})")
    process.join()
    return peak


def _measured(sender: Connection, function: Callable[..., Any], arguments: Sequence[Any], keywords: Mapping[str, Any]) -> None:
    try:
        value = function(*arguments, **keywords)
    # Whatever happens in there belongs into the table of the parent.
    except Exception as error:
        sender.send(Peak(math.nan, None, None, f"{type(error).__name__}: {error}"))
        return
    device_mb = torch.cuda.max_memory_allocated() / 2**20 if torch.cuda.is_available() else None
    sender.send(Peak(peak_memory_mb(), device_mb, value))


def available_memory_mb() -> float:
    """Memory that a new process could use without swapping, in MB; infinite where the system does not tell."""
    found = Path("/proc/meminfo")
    if found.exists():
        for line in found.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) / 1024
    return math.inf


@dataclass(frozen=True)
class Spread:
    """A number that was measured several times; NaN throughout when it never was."""

    median: float
    low: float
    high: float
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        if not values:
            return cls(math.nan, math.nan, math.nan, 0)
        return cls(statistics.median(values), min(values), max(values), len(values))

    def text(self, form: str = ".2f") -> str:
        """`median (low to high)`, or the number alone when it was measured once; "-" when it never was."""
        if not self.count:
            return "-"
        if self.count == 1:
            return format(self.median, form)
        return f"{self.median:{form}} ({self.low:{form}} to {self.high:{form}})"


class Table:
    """Rows that are printed as they will be read, and written as they were measured.

    A cell is a string, a number, a `Spread` or None (printed "-"). `forms` gives a column its number format.
    """

    def __init__(self, title: str, *, forms: Mapping[str, str] | None = None, note: str = "") -> None:
        self.title, self.note = title, note
        self.forms = dict(forms or {})
        self.rows: list[dict[str, Any]] = []

    def add(self, **cells: Any) -> None:
        """One row; columns appear in the order in which rows name them first."""
        self.rows.append(cells)

    def print(self) -> None:
        """To standard output."""
        columns = list(dict.fromkeys(name for row in self.rows for name in row))
        table = RichTable(title=self.title, title_justify="left", caption=self.note or None, caption_justify="left")
        for name in columns:
            table.add_column(name.replace("_", " "))
        for row in self.rows:
            table.add_row(*(self._cell(name, row.get(name)) for name in columns))
        standard_console().print(table, highlight=False)

    def _cell(self, name: str, value: Any) -> str:
        form = self.forms.get(name, ".3g")
        if isinstance(value, Spread):
            return value.text(form)
        if isinstance(value, float):
            return "-" if math.isnan(value) else format(value, form)
        return "-" if value is None else str(value)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        rows = [{k: asdict(v) if isinstance(v, Spread) else v for k, v in row.items()} for row in self.rows]
        return {"title": self.title, "note": self.note, "rows": rows}


def write_json(path: Path | None, benchmark: str, tables: Sequence[Table], **more: Any) -> None:
    """Writes tables, the machine and `more` (settings, raw measurements) to `path`; None writes nothing. NaN becomes null."""
    if path is None:
        return
    content = {
        "benchmark": benchmark,
        "machine": describe_machine(),
        "tables": [table.as_dict() for table in tables],
        **more,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(without_nan(content), indent=1, default=str) + "\n")


def without_nan(value: Any) -> Any:
    """JSON has no NaN and no infinity; other programs refuse files that hold them."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(item) for item in value]
    return value


def describe_machine() -> dict[str, Any]:
    """What somebody needs to know to compare numbers: the class of machine, versions, date; nothing that names a host."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "memory_gb": round(memory, 1),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": {name: version for name in _PACKAGES if (version := _version(name)) is not None},
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    for line in info.read_text().splitlines() if info.exists() else []:
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def print_machine() -> None:
    """One line above the tables."""
    machine = describe_machine()
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    where = machine["gpu"] or f"{machine['processor']}, {machine['cores']} cores, {machine['torch_threads']} threads"
    print(f"{where}, {machine['memory_gb']} GB; Python {machine['python']}; {versions}; {machine['date']}")
