"""What the tools share: where things are, time, peak memory, tables in Markdown."""

from __future__ import annotations

import json
import os
import platform
import re
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parent.parent
ROOT = TESTS.parent
TEACHER, CHATS = TESTS / "teacher" / "model", TESTS / "teacher" / "conversations.jsonl"
sys.path[:0] = [str(ROOT), str(TESTS)]  # a tool is started from anywhere
os.environ.setdefault("HF_HUB_DISABLE_XET", "1")  # the loopback Hub speaks plain LFS

from processes import run_process  # noqa: E402 - beside the tests


def peak_bytes(pid: int | str = "self", name: str = "VmHWM") -> int:
    """Return a process's peak of memory, 0 where it has gone, or VmRSS, what it holds; Linux alone.

    `ru_maxrss` would count what its parent held before the exec.
    """
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    found = re.search(rf"{name}:\s+(\d+)", status)
    return 1024 * int(found[1]) if found else 0


def timed(
    work: Callable[[], Any], clock: Callable[[], float] = time.process_time
) -> tuple[float, Any]:
    """Return the seconds that some work takes, of the processor unless told otherwise; its result.

    Other jobs hardly matter to those of the processor.
    """
    start = clock()
    found = work()
    return clock() - start, found


def best_in_turn(
    works: Mapping[str, Callable[[], Any]], times: int, clock: Callable[[], float]
) -> dict[str, float]:
    """Return the best seconds of each, taken in turn."""
    rounds = [{name: timed(work, clock)[0] for name, work in works.items()} for _ in range(times)]
    return {name: min(seconds[name] for seconds in rounds) for name in works}


def run_apart(*command: object, env: dict[str, str] | None = None) -> Any:
    """Run a Python program to its end in a process of its own; return its last line, as JSON."""
    done = run_process([sys.executable, *command], timeout_s=3600, env=env, stderr=None)
    if done.code:
        sys.exit(f"ended with {done.code}: {' '.join(map(str, command))}")
    return json.loads(done.stdout.splitlines()[-1])


def machine() -> dict[str, Any]:
    import numpy
    import torch

    models = re.findall(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text())
    return {
        "cpu": models[:1], "cores": os.cpu_count(), "load": os.getloadavg()[0],
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(), "torch": torch.__version__,
        "numpy": numpy.__version__,
    }  # fmt: skip


def print_head(*names: str) -> None:
    print_row(*names)
    print("|" + "---|" * len(names), flush=True)


def print_row(*cells: object) -> None:
    """Print a line of a Markdown table, at once."""
    print("|", " | ".join(map(str, cells)), "|", flush=True)
