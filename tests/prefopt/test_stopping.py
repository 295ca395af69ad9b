"""A signal ends a run after its step, with a checkpoint; a second one ends it at once."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import textwrap
import threading
from pathlib import Path
from typing import Any

import pytest

from prefopt import trainer
from prefopt.checkpoint import list_checkpoints
from prefopt.errors import Stopped
from prefopt.stopping import SIGNALS, listening, telling

GRIDWORLD = (
    "train", "dpo", "--data", "control:gridworld", "--segment-length", 4, "--pairs", 40, "--batch-size", 10, "--epochs", 1,
    "--eval-pairs", 20, "--checkpoints", 1, "--learning-rate", 0.01, "--log-every", 1,
)  # fmt: skip


@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.fault(8)
def test_a_signal_ends_a_run_after_its_step_and_resuming_hides_it(
    number: int, cli: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert cli(*GRIDWORLD, "--output-dir", tmp_path / "whole").code == 0
    update = trainer._Run.update

    def signalled(self: Any, micro_batches: Any) -> None:
        update(self, micro_batches)
        if self.step == 2:
            signal.raise_signal(number)

    with monkeypatch.context() as patch:
        patch.setattr(trainer._Run, "update", signalled)
        stopped = cli(*GRIDWORLD, "--output-dir", tmp_path / "parts")
    assert stopped.code == 128 + number
    assert "after step 2 of 4, with a checkpoint. The same command with --resume goes on" in stopped.err
    assert [path.name for path in list_checkpoints(tmp_path / "parts")] == ["checkpoint-2"]
    resumed = cli(*GRIDWORLD, "--output-dir", tmp_path / "parts", "--resume")
    assert resumed.code == 0, resumed.err
    names = [name for name in ("result.json", "metrics.jsonl") if (tmp_path / "whole" / name).exists()]
    assert names
    whole, parts = ((tmp_path / name / "metrics.jsonl").read_text() for name in ("whole", "parts"))
    strip = [[part.split(', "time/')[0] for part in text.splitlines()] for text in (whole, parts)]
    assert strip[0] == strip[1]


def test_signals_keep_their_meaning_outside_a_run_and_in_threads() -> None:
    before = [signal.getsignal(number) for number in SIGNALS]
    with listening(False):
        assert [signal.getsignal(number) for number in SIGNALS] == before
    with listening(True) as request:
        assert [signal.getsignal(number) for number in SIGNALS] == [request.receive] * len(SIGNALS)
    assert [signal.getsignal(number) for number in SIGNALS] == before
    seen: list[Any] = []

    def in_a_thread() -> None:
        with listening(True):
            seen.extend(signal.getsignal(number) for number in SIGNALS)

    thread = threading.Thread(target=in_a_thread)
    thread.start()
    thread.join()
    assert seen == before


@pytest.mark.fault(8)
def test_a_second_signal_ends_the_process_at_once(tmp_path: Path) -> None:
    program = """
        import os, signal, time
        from prefopt.stopping import listening
        with listening(True):
            os.kill(os.getpid(), signal.SIGTERM)
            print("still here", flush=True)
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(60)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, timeout=30)
    assert done.returncode == -signal.SIGTERM
    assert done.stdout == "still here\n"
    assert "SIGTERM: stopping after this step; again to stop at once." in done.stderr


@pytest.mark.fault(8)
@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1"])
def test_outside_of_the_loop_a_signal_ends_the_command_and_says_how_to_go_on(name: str) -> None:
    """As while data is read or a shared stage is trained: Python alone would end without a word."""
    number = getattr(signal, name)
    program = f"""
        import os, prefopt.cli
        prefopt.cli._build = lambda *_: lambda *_, **__: os.kill(os.getpid(), {int(number)})
        prefopt.cli.main(["train", "dpo"])
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, timeout=60)
    assert done.returncode == -number
    assert done.stderr == f"{name}: interrupted. The same command with --resume goes on from the newest checkpoint.\n"


def test_handlers_of_others_are_left_alone() -> None:
    before = [signal.getsignal(number) for number in SIGNALS]
    with telling("x"), listening(True):
        pass
    assert [signal.getsignal(number) for number in SIGNALS] == before
    taken = signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    try:
        with telling("x"):
            assert signal.getsignal(signal.SIGUSR1) == signal.SIG_IGN
        assert signal.getsignal(signal.SIGUSR1) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGUSR1, taken)


def test_it_comes_back_from_a_worker_as_it_was() -> None:
    error = pickle.loads(pickle.dumps(Stopped(signal.SIGTERM, 3, 9)))
    assert (error.exit_code, str(error)) == (143, "stopped by signal 15 after step 3 of 9, with a checkpoint.")
    assert os.name != "posix" or error.number == 15
