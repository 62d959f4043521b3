"""What the tools share: where things are, time, peak memory, tables in Markdown."""

from __future__ import annotations

import json
import os
import platform
import re
import sys
import time
from collections.abc import Callable
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


def cpu_seconds(work: Callable[[], Any]) -> float:
    """Return the processor seconds that some work takes: other jobs hardly matter."""
    start = time.process_time()
    work()
    return time.process_time() - start


def run_apart(*command: object, env: dict[str, str] | None = None) -> Any:
    """Run a Python program to its end in a process of its own; return its last line, as JSON."""
    done = run_process([sys.executable, *command], timeout_s=3600, env=env, stderr=None)
    if done.code:
        sys.exit(f"ended with {done.code}: {' '.join(map(str, command))}")
    return json.loads(done.stdout.splitlines()[-1])


def machine() -> dict[str, Any]:
    import numpy
    import torch

    path = Path("/proc/cpuinfo")
    models = re.findall(r"model name\s*: (.+)", path.read_text()) if path.exists() else []
    return {
        "cpu": models[0] if models else platform.processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0],
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": numpy.__version__,
    }


def print_head(*names: str) -> None:
    print_row(*names)
    print("|" + "---|" * len(names), flush=True)


def print_row(*cells: object) -> None:
    """Print a line of a Markdown table, at once."""
    print("|", " | ".join(map(str, cells)), "|", flush=True)
