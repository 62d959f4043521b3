"""The short form of the chaos runs; `make chaos` is the long one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path


def test_runs_killed_and_disturbed_at_random_give_the_parts_of_undisturbed_ones() -> None:
    script = Path(__file__).parent / "tools" / "chaos.py"
    command = [sys.executable, str(script), "--runs", "24", "--seed", "7"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    figures = json.loads(done.stdout.splitlines()[-1])
    assert figures["runs"] >= 24
    assert figures["kills"] >= 5
    assert figures["parts_compared"] > 0
    wrong = ("rows_lost", "rows_twice", "rows_different", "parts_different", "unexpected")
    assert [figures[name] for name in wrong] == [0, 0, 0, 0, []]
