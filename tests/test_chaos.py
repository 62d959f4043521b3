"""The short form of the chaos runs; `make chaos` is the long one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path


def test_runs_killed_and_disturbed_at_random_lose_no_row_and_double_none() -> None:
    script = Path(__file__).with_name("chaos.py")
    command = [sys.executable, str(script), "--runs", "10", "--seed", "7"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    figures = json.loads(done.stdout.splitlines()[-1])
    assert figures["runs"] >= 10
    assert figures["kills"] >= 3
    assert figures["rows_lost"] == figures["rows_twice"] == figures["rows_different"] == 0
