"""Whole runs in worlds that do them harm, in little: `make chaos` and `make attacks` are long."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent / "tools"))

import attacks

SHORT = [attack for attack in attacks.ATTACKS if attack.short]


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


@pytest.fixture(scope="module")
def ready(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return attacks.make_output(tmp_path_factory.mktemp("ready"))


@pytest.mark.parametrize("attack", SHORT, ids=lambda attack: f"{attack.script}: {attack.name}")
def test_an_attack_ends_as_it_may(attack: attacks.Attack, ready: Path, tmp_path: Path) -> None:
    """Those of the register that cost little and matter most."""
    verdict = attacks.run_attack(attack, tmp_path / "world", ready, seed=1, slack=3.0)
    assert not verdict.wrong, verdict.ended.stderr[-3000:]


def test_what_must_not_be_is_found(ready: Path, tmp_path: Path) -> None:
    """A traceback, a token, an escape code, a lost row and a wrong exit are seen."""
    world = attacks.World(tmp_path / "world", ready, 0)
    world.held = {7}
    said = f"Traceback (most recent call last):\n{attacks.TOKEN}\x1b[31m"
    ended = attacks.Ended(1, "", said, 1e9, 1e9)
    wrong = attacks.judge(SHORT[0], world, ended)
    for word in ("exit 1", "traceback", "raw", "token", " s", "MB", "lost"):
        assert any(word in one for one in wrong), word
