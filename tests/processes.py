"""Processes that tests start. Each ends: at the latest with its time."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import IO, Any


@dataclass(frozen=True)
class Finished:
    """A process that has run to its end."""

    code: int
    stdout: str
    stderr: str

    @property
    def summary(self) -> dict[str, Any]:
        """The JSON object on the last line of stdout."""
        return dict(json.loads(self.stdout.strip().splitlines()[-1]))

    def passed(self) -> dict[str, Any]:
        """Return the summary of a process that has done all that was asked for."""
        assert self.code == 0, self.stderr
        return self.summary


def run_process(
    command: Iterable[object], *, timeout_s: float = 300.0, env: dict[str, str] | None = None,
    **options: Any,
) -> Finished:  # fmt: skip
    """Run a command as the leader of a process group; `env` is added to that of this process.

    What it says goes to files: a pipe would be open as long as any process that it has started.

    Raises:
        AssertionError: it did not end in time; says where every Python of the group stood.
    """
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        streams = {"stdin": subprocess.DEVNULL, "stdout": out, "stderr": err}
        process = subprocess.Popen(
            list(map(str, command)), start_new_session=True, **{**streams, **options},
            env={**os.environ, "PYTHONFAULTHANDLER": "1", **(env or {})},
        )  # fmt: skip
        in_time = True
        try:
            process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            in_time = False
            os.killpg(process.pid, signal.SIGABRT)
            time.sleep(5)  # to say where it stands
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        said = []
        for file in (out, err):
            file.seek(0)
            said.append(file.read().decode(errors="replace"))
    assert in_time, f"no end in {timeout_s:.0f} s: {process.args}\n{said[1][-20000:]}"
    return Finished(process.returncode, *said)


def run_code(code: str, *words: object, **options: Any) -> Finished:
    """Run a program, which has to succeed, in a fresh Python; options are of `run_process`."""
    done = run_process([sys.executable, "-c", code, *words], **options)
    assert done.code == 0, done.stderr
    return done


class Child:
    """A fork of this process: starts in milliseconds, with everything imported.

    Args:
        work: gets a stream to write to; an int that it returns is the exit code.
    """

    def __init__(self, work: Callable[[IO[str]], int | None]) -> None:
        reader, writer = os.pipe()
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid == 0:
            code = 1
            try:
                os.close(reader)
                os.setpgid(0, 0)  # a Ctrl-C at the terminal is ours to pass on
                with os.fdopen(writer, "w", buffering=1) as stream:
                    code = work(stream) or 0
            except BaseException:
                traceback.print_exc()
                raise
            finally:
                os._exit(code)
        os.close(writer)
        self.output = os.fdopen(reader)
        self._status: int | None = None

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
                os.killpg(self.pid, signal.SIGKILL)
            time.sleep(0.005)
        assert self._status is not None
        return self._status

    def finish(self) -> tuple[int, str]:
        """Return the exit code and what the child wrote, once it has left."""
        with self.output:
            code = self.wait()
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)  # what it has left behind holds the pipe open
            return code, self.output.read()
