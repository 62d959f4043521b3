"""Whole runs in worlds that do them harm, in little: `make chaos` and `make attacks` are long."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest
from processes import run_process
from small_output import random_rows, write_parts

sys.path.insert(0, str(Path(__file__).parent / "tools"))

import attacks
import chaos

SHORT = [attack for attack in attacks.ATTACKS if attack.short]


def test_runs_killed_and_disturbed_at_random_give_the_parts_of_undisturbed_ones():
    command = [sys.executable, chaos.__file__, "--runs", "24", "--seed", "7"]
    done = run_process(command, timeout_s=500)
    assert done.code == 0, done.stdout + done.stderr[-4000:]
    figures = done.summary
    assert figures["runs"] >= 24
    assert figures["kills"] >= 5
    assert figures["parts_compared"] > 0
    wrong = ("rows_lost", "rows_twice", "parts_different", "unexpected")
    assert [figures[name] for name in wrong] == [0, 0, 0, []]


def test_what_a_round_may_not_leave_is_counted(tmp_path):
    ledger = chaos.Ledger("no Hub")
    right = ledger.learn(str(write_parts(tmp_path / "right", random_rows(16))))
    folder = write_parts(tmp_path / "other", random_rows(16))
    parts = [folder / f"data/part-0000{number}.parquet" for number in range(3)]
    shutil.copy(parts[1], parts[2])
    ledger.learn(str(folder))  # as if an undisturbed run had written that
    parts[0].write_bytes(parts[0].read_bytes() + b"?")
    ledger.compare(str(folder), held=right, needed=right)
    assert (ledger.rows_lost, ledger.rows_twice, ledger.parts_different) == (8, 8, 1)
    assert ledger.wrong() == 17


@pytest.fixture(scope="module")
def ready(tmp_path_factory):
    return attacks.make_output(tmp_path_factory.mktemp("ready"))


@pytest.mark.parametrize("attack", SHORT, ids=lambda attack: f"{attack.script}: {attack.name}")
def test_an_attack_ends_as_it_may(attack, ready, tmp_path):
    ended = attacks.run_attack(attack, tmp_path / "world", ready, slack=3.0)
    assert not ended.wrong, ended.stderr[-3000:]


def test_what_must_not_be_is_found(ready, tmp_path):
    """A traceback, a token, an escape code, a lost row and a wrong exit are seen."""
    world = attacks.World(tmp_path / "world", ready)
    world.held = {7}
    said = f"Traceback (most recent call last):\n{attacks.TOKEN}\x1b[31m"
    ended = attacks.Ended(1, "", said, 1e9, 1e9)
    wrong = attacks.judge(SHORT[0], world, ended)
    assert [word for word in ("exit 1", "traceback", "raw", "token", " s", "MB", "lost")
            if not any(word in one for one in wrong)] == []  # fmt: skip
