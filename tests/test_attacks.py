"""The attacks of `tools/attacks.py` that cost little and matter most."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent / "tools"))

import attacks

SHORT = [attack for attack in attacks.ATTACKS if attack.short]


@pytest.fixture(scope="module")
def ready(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return attacks.make_output(tmp_path_factory.mktemp("ready"))


@pytest.mark.parametrize("attack", SHORT, ids=lambda attack: f"{attack.script}: {attack.name}")
def test_an_attack_ends_as_it_may(attack: attacks.Attack, ready: Path, tmp_path: Path) -> None:
    verdict = attacks.run_attack(attack, tmp_path / "world", ready, slack=3.0)
    assert not verdict.wrong, verdict.ended.stderr[-3000:]


def test_what_must_not_be_is_found(ready: Path, tmp_path: Path) -> None:
    """A traceback, a token, an escape code, a lost row and a wrong exit are seen."""
    world = attacks.World(tmp_path / "world", ready)
    world.held = {7}
    said = f"Traceback (most recent call last):\n{attacks.TOKEN}\x1b[31m"
    ended = attacks.Ended(1, "", said, 1e9, 1e9)
    wrong = attacks.judge(SHORT[0], world, ended)
    assert [word for word in ("exit 1", "traceback", "raw", "token", " s", "MB", "lost")
            if not any(word in one for one in wrong)] == []  # fmt: skip
