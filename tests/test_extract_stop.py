"""Signals and the runtime limit."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from typing import IO

import pytest
from processes import Child

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
    """But SIGHUP does not where nohup has started the run."""
    before = signal.getsignal(number)
    with GracefulInterrupt() as interrupt:
        assert (interrupt.stopping, interrupt.exit_code) == (False, 0)
        os.kill(os.getpid(), number)
        time.sleep(0.01)
        assert (interrupt.stopping, interrupt.exit_code) == (True, code)
    assert signal.getsignal(number) is before
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with GracefulInterrupt() as interrupt:
        os.kill(os.getpid(), signal.SIGHUP)
        assert not interrupt.stopping


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_second_signal_leaves_at_once(number, code):
    def work(output: IO[str]) -> None:
        with GracefulInterrupt() as interrupt:
            for _ in range(2):
                os.kill(os.getpid(), number)
                time.sleep(0.1)
                output.write(f"{interrupt.stopping}\n")

    assert Child(work).finish() == (code, "True\n")


def test_the_deadline_keeps_time_for_one_more_step_and_the_final_upload(monkeypatch):
    clock, upload_s = [0.0], [0.0]
    monkeypatch.setattr(extract_logits.time, "monotonic", lambda: clock[0])
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


@pytest.mark.parametrize("wait", [time.sleep, threading.Event().wait], ids=["sleep", "lock"])
def test_where_there_is_nothing_to_save_the_deadline_and_a_signal_end_waiting(wait):
    with GracefulInterrupt() as interrupt:
        with pytest.raises(KeyboardInterrupt), interrupt.leaving_at_once(time.monotonic() + 0.05):
            wait(60)
        assert interrupt.exit_code == 0
        with interrupt.leaving_at_once(time.monotonic() + 0.05):
            pass
        time.sleep(0.1)  # the alarm was of that place alone
        threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGTERM)).start()
        with pytest.raises(KeyboardInterrupt), interrupt.leaving_at_once():
            wait(60)
        assert interrupt.exit_code == 143
        with pytest.raises(KeyboardInterrupt), interrupt.leaving_at_once():
            wait(60)  # a signal that came before
