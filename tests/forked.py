"""Child processes that start with everything imported: real processes, in milliseconds."""

from __future__ import annotations

import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from typing import IO


class Child:
    """A fork of this process that does some work, writes text and leaves.

    Args:
        work: gets a stream to write to; an int that it returns is the exit code.
    """

    def __init__(self, work: Callable[[IO[str]], int | None]) -> None:
        reader, writer = os.pipe()
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid == 0:
            os.close(reader)
            os.setpgid(0, 0)  # a Ctrl-C at the terminal is ours to pass on
            self._work(work, writer)
        os.close(writer)
        self.output = os.fdopen(reader)
        self._status: int | None = None

    @staticmethod
    def _work(work: Callable[[IO[str]], int | None], writer: int) -> None:
        code = 1
        try:
            with os.fdopen(writer, "w", buffering=1) as stream:
                code = work(stream) or 0
        except BaseException:
            traceback.print_exc()
            raise
        finally:
            os._exit(code)

    def ended(self) -> bool:
        """Tell whether the child has ended."""
        if self._status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self._status = os.waitstatus_to_exitcode(status)
        return self._status is not None

    def send(self, number: int) -> None:
        """Send a signal, if the child still lives."""
        if not self.ended():
            os.kill(self.pid, number)

    def wait(self, timeout_s: float = 120.0) -> int:
        """Return the exit code, negative for a signal; kill the child at the timeout."""
        end = time.monotonic() + timeout_s
        while not self.ended():
            if time.monotonic() > end:
                os.kill(self.pid, signal.SIGKILL)
            time.sleep(0.005)
        assert self._status is not None
        return self._status

    def finish(self) -> tuple[int, str]:
        """Return the exit code and what the child wrote."""
        with self.output:
            text = self.output.read()
        return self.wait(), text
