"""Signals and the runtime limit."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from functools import partial
from typing import IO

import pytest
from conftest import ROOT
from processes import Child, run_code, run_process

import extract_logits
from extract_logits import GracefulInterrupt, TimedShutdown


@pytest.fixture(autouse=True)
def terminal() -> Iterator[None]:
    """Run as in a terminal, also where nohup has started the tests."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]
)
def test_a_first_signal_asks_to_stop(number, code):
    before = signal.getsignal(number)
    with GracefulInterrupt() as interrupt:
        assert (interrupt.stopping, interrupt.exit_code) == (False, 0)
        os.kill(os.getpid(), number)
        time.sleep(0.01)
        assert (interrupt.stopping, interrupt.exit_code) == (True, code)
    assert signal.getsignal(number) is before


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_second_signal_leaves_at_once(number, code):
    def work(output: IO[str]) -> None:
        with GracefulInterrupt() as interrupt:
            for _ in range(2):
                os.kill(os.getpid(), number)
                time.sleep(0.1)
                output.write(f"{interrupt.stopping}\n")

    assert Child(work).finish() == (code, "True\n")


def test_a_lost_terminal_asks_once_and_does_not_stop_what_nohup_started():
    for handler, stops in ((signal.SIG_DFL, True), (signal.SIG_IGN, False)):
        signal.signal(signal.SIGHUP, handler)
        with GracefulInterrupt() as interrupt:
            for _ in range(2):
                os.kill(os.getpid(), signal.SIGHUP)
                time.sleep(0.01)
            assert interrupt.stopping == stops


def test_the_deadline_keeps_time_for_one_more_step_and_the_final_upload(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(extract_logits.time, "monotonic", lambda: clock[0])
    upload_s = [0.0]
    deadline = TimedShutdown(8, upload_s=lambda: upload_s[0])
    assert deadline.end_s == 480
    for second in range(0, 450, 30):  # steps of 30 s
        clock[0] = second
        assert not deadline.due()
    upload_s[0] = 31.0  # 60 s are left
    assert deadline.due()
    upload_s[0] = 0.0
    assert not deadline.due()
    clock[0] = 450
    assert deadline.due()
    assert not TimedShutdown(None).due()


def test_where_there_is_nothing_to_save_the_deadline_and_a_signal_end_waiting():
    with GracefulInterrupt() as interrupt:
        with pytest.raises(KeyboardInterrupt), interrupt.leaving_at_once(time.monotonic() + 0.05):
            time.sleep(60)
        assert interrupt.exit_code == 0
        with interrupt.leaving_at_once(time.monotonic() + 0.05):
            pass
        time.sleep(0.1)  # the alarm was of that place alone
        threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGTERM)).start()
        with pytest.raises(KeyboardInterrupt), interrupt.leaving_at_once():
            time.sleep(60)
        assert interrupt.exit_code == 143
        with pytest.raises(KeyboardInterrupt), interrupt.leaving_at_once():
            time.sleep(60)  # a signal that came before


class SignallingLock:
    """Stands for a lock; a signal comes the moment that it is taken."""

    acquire = __enter__ = staticmethod(partial(os.kill, os.getpid(), signal.SIGTERM))

    def __init__(self) -> None:
        self.released = False

    def release(self, *_: object) -> None:
        self.released = True

    __exit__ = release


def test_a_signal_leaves_no_lock_of_a_library_held(monkeypatch):
    """Else threads that deliver wait for logging's lock, and nothing ends."""
    lock, logger = SignallingLock(), logging.getLogger("nobody asked this one before")

    def log_and_wait() -> None:
        with monkeypatch.context() as patch:
            patch.setattr(logging, "_lock", lock)
            logger.isEnabledFor(logging.DEBUG)
        time.sleep(60)

    with GracefulInterrupt() as interrupt:
        with pytest.raises(KeyboardInterrupt), interrupt.leaving_at_once():
            log_and_wait()
        assert (lock.released, interrupt.exit_code) == (True, 143)


def test_waiting_for_a_lock_is_ended_by_a_signal_and_by_the_deadline():
    with GracefulInterrupt() as interrupt:
        with pytest.raises(KeyboardInterrupt), interrupt.leaving_at_once(time.monotonic() + 0.05):
            threading.Event().wait(60)
        assert interrupt.exit_code == 0
        threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGTERM)).start()
        with pytest.raises(KeyboardInterrupt), interrupt.leaving_at_once():
            threading.Event().wait(60)
        assert interrupt.exit_code == 143


def test_a_signal_on_the_way_in_ends_waiting_too(monkeypatch):
    too_late = property(lambda _: os.kill(os.getpid(), signal.SIGTERM))
    monkeypatch.setattr(GracefulInterrupt, "stopping", too_late)
    with (
        GracefulInterrupt() as interrupt,
        pytest.raises(KeyboardInterrupt),
        interrupt.leaving_at_once(),
    ):
        raise AssertionError("nobody would end what is waited for here")


@pytest.mark.parametrize("script", ["extract_logits", "compute_lengths", "explore_logits"])
def test_ctrl_c_while_libraries_load_leaves_without_a_traceback(script, tmp_path):
    """And the first is started as pip installs it."""
    path = ROOT / f"{script}.py"
    if script == "extract_logits":
        path = tmp_path / "extract-logits"
        path.write_text("from extract_logits import main\nraise SystemExit(main())\n")
    interrupt = "import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(60)\n"
    (tmp_path / "numpy.py").write_text(interrupt, encoding="utf-8")  # loaded in its place
    env = {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    done = run_process([sys.executable, path, "--help"], env=env)
    assert (done.code, done.stderr) == (130, "")


INTERRUPTED = """
import os, signal, sys, extract_logits as x
x.run_extraction = lambda config: {"exit_code": 0, "rows": 1, "tokens": 2, "bytes": 3}
describe = x.describe_end
x.describe_end = lambda summary: os.kill(os.getpid(), signal.SIGINT) or describe(summary)
sys.argv = ["x", "--model", "m", "--dataset", "d", "--output", "./o"]
sys.exit(x.main())
"""


def test_ctrl_c_while_the_end_is_told_changes_nothing():
    done = run_code(INTERRUPTED, cwd=ROOT)
    assert (done.code, done.summary["exit_code"]) == (0, 0)
    assert done.stderr.startswith("done: 1 row, 2 tokens")
