"""The short form of the chaos runs, and faults that it must find; `make chaos` is the long one."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from small_output import random_rows, write_parts

sys.path.insert(0, str(Path(__file__).parent / "tools"))

import chaos


def test_runs_killed_and_disturbed_at_random_give_the_parts_of_undisturbed_ones() -> None:
    command = [sys.executable, chaos.__file__, "--runs", "24", "--seed", "7"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    figures = json.loads(done.stdout.splitlines()[-1])
    assert figures["runs"] >= 24
    assert figures["kills"] >= 5
    assert figures["parts_compared"] > 0
    wrong = ("rows_lost", "rows_twice", "parts_different", "unexpected")
    assert [figures[name] for name in wrong] == [0, 0, 0, []]


@pytest.mark.parametrize(
    ("fault", "wrong"),
    [("none", (0, 0, 0)), ("gone", (8, 0, 1)), ("changed", (8, 0, 1)), ("twice", (0, 8, 0))],
)
def test_what_must_not_be_is_counted(
    tmp_path: Path, fault: str, wrong: tuple[int, int, int]
) -> None:
    ledger = chaos.Ledger("no Hub")
    right = ledger.learn(str(write_parts(tmp_path / "right", random_rows(16))))
    folder = write_parts(tmp_path / "other", random_rows(16))
    first, other = folder / "data/part-00000.parquet", folder / "data/part-00002.parquet"
    if fault == "gone":
        first.unlink()
    elif fault == "changed":
        first.write_bytes(first.read_bytes() + b"?")
    elif fault == "twice":
        shutil.copy(first, other)
        ledger.learn(str(folder))  # as if an undisturbed run had written that
    ledger.compare(str(folder), held=right, needed=right)
    assert (ledger.rows_lost, ledger.rows_twice, ledger.parts_different) == wrong
    assert ledger.wrong() == sum(wrong)
