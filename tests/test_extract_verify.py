"""`--verify-mask` of `extract_logits.py`: see the extracted tokens before anything runs."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import chat

import extract_logits
from extract_logits import ConfigError, ExtractionConfig, Job, confirm_masks, open_job


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def job(tmp_path: Path, model: Path, write_chats: Callable[[list[Any]], Path]) -> Job:
    """Six conversations, of which the first two cannot be used."""
    chats: list[Any] = [[], chat("")[:1], *(chat(f"ANSWER-{n}") for n in range(2, 6))]
    source = write_chats([{"messages": messages} for messages in chats])
    places = {"output": str(tmp_path / "out"), "cache_dir": str(tmp_path / "cache")}
    config = ExtractionConfig(model=str(model), dataset=str(source), verify_mask=True, **places)
    return open_job(config)


def test_the_first_usable_conversations_are_shown(
    job: Job, capsys: pytest.CaptureFixture[str]
) -> None:
    assert confirm_masks(job)
    out, err = capsys.readouterr()
    assert out == ""
    assert [f"ANSWER-{n}" in err for n in range(2, 6)] == [True, True, True, False]
    assert "[Y/n]" not in err


@pytest.mark.parametrize(
    ("answer", "goes_on"), [("\n", True), ("YES\n", True), ("n\n", False), ("", False)]
)
def test_on_a_terminal_the_answer_decides(
    job: Job, answer: str, goes_on: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    screen = Terminal()
    monkeypatch.setattr(sys, "stdin", Terminal(answer))
    monkeypatch.setattr(sys, "stderr", screen)
    assert confirm_masks(job) == goes_on
    assert screen.getvalue().endswith("[Y/n] ")
    if not goes_on:  # and it leaves nothing behind
        monkeypatch.setattr(sys, "stdin", Terminal(answer))
        with pytest.raises(ConfigError, match="--verify-mask"):
            extract_logits.run_extraction(job.config)
        assert not {"out", "cache"} & set(os.listdir(tmp_path))
