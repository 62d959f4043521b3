"""`--plan` and `--verify-mask` of `extract_logits.py`: what a run would do, before it does."""

from __future__ import annotations

import io
import itertools
import os
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import CHATS, TEACHER, Write, chat

import extract_logits
from extract_logits import ExtractionConfig, Job, open_job, plan_extraction, sample_job


@pytest.fixture
def make_job(model: Path, write_chats: Write) -> Callable[..., Job]:
    """Open jobs of a random teacher of 300 tokens and 400 short conversations."""
    sizes = np.random.default_rng(2).lognormal(3, 0.8, 400).astype(int).clip(1, 300)
    source = write_chats([{"messages": chat("x" * size)} for size in sizes])
    files = {"model": str(model), "dataset": str(source), "output": "./out"}
    return lambda **options: open_job(ExtractionConfig(**files, plan=True, **options))


def test_a_plan_foretells_the_run_and_writes_nothing(extract, tmp_path):
    job = {"model": TEACHER, "dataset": CHATS, "upload_every": 5, "max_batch_tokens": 1024}
    planned = extract(**job, limit=12, plan=True)
    assert list(tmp_path.iterdir()) == []
    foretold, stored = planned.summary, extract(**job, limit=12).summary
    assert foretold["rows"] == stored["rows"] == 12
    assert foretold["stored_tokens"] == stored["tokens"]
    assert foretold["shards"] == stored["shards"] == 3
    assert foretold["commits"] == 4
    assert foretold["bytes"] == pytest.approx(stored["bytes"], rel=0.05)
    assert extract(**job, limit=12, plan=True).code == 0  # it does not look at the output


def test_a_sample_stands_for_a_large_job(make_job, monkeypatch):
    """100 of 400 rows; the sample is fixed by the ids, so the deviation never flickers."""
    exact = sample_job(make_job(), lambda: False)
    monkeypatch.setattr(extract_logits, "PLAN_ROWS", 100)
    sample, other = (sample_job(make_job(streaming=s), lambda: False) for s in (True, False))
    assert (sample.selected, sample.measured) == (400, 100)
    assert {row.index for row in sample.encoded} == {row.index for row in other.encoded}
    planned = plan_extraction(make_job(streaming=True))
    assert (planned["rows"], planned["measured_rows"]) == (exact.rows, 100)
    assert planned["tokens"] == pytest.approx(exact.tokens, rel=0.2)


def test_several_workers_share_the_hours_of_the_whole_job(make_job):
    planned = plan_extraction(make_job(limit=40, plan_rate=10.0, rank=3, world_size=4))
    assert planned["rows"] == 40
    assert planned["hours"] == pytest.approx(planned["stored_tokens"] / 36_000, rel=0.01)
    assert planned["hours_each"] == pytest.approx(planned["hours"] / 4, rel=0.01)


def test_processes_of_one_teacher_end_the_probe_after_the_same_batch(make_job, monkeypatch):
    """Or one of them would wait for the others in a batch that they do not run."""
    answers = itertools.cycle([False, True])  # of the first process: go on, it is enough
    monkeypatch.setattr(extract_logits, "agree", lambda _: next(answers))
    assert plan_extraction(make_job())["probe"]["batches"] == 1


@pytest.fixture
def job(tmp_path: Path, model: Path, write_chats: Write) -> Job:
    """Six conversations, of which the first two cannot be used."""
    chats = [[], chat("")[:1], *(chat(f"ANSWER-{n}") for n in range(2, 6))]
    files = {"model": model, "dataset": write_chats([{"messages": each} for each in chats])}
    files |= {"output": tmp_path / "out", "cache_dir": tmp_path / "cache"}
    options = {name: str(path) for name, path in files.items()}
    return open_job(ExtractionConfig(**options, verify_mask=True))


def test_the_first_usable_conversations_are_shown(job, capsys):
    assert extract_logits.confirm_masks(job)
    out, err = capsys.readouterr()
    assert out == ""
    assert [f"ANSWER-{n}" in err for n in range(2, 6)] == [True, True, True, False]
    assert "[Y/n]" not in err


@pytest.mark.parametrize(("answer", "goes_on"), [("\n", True), ("n\n", False), ("", False)])
def test_on_a_terminal_the_answer_decides(job, answer, goes_on, tmp_path, monkeypatch):
    for name in ("stdin", "stderr"):
        terminal = io.StringIO(2 * answer)
        terminal.isatty = lambda: True  # type: ignore[method-assign]
        monkeypatch.setattr(sys, name, terminal)
    assert extract_logits.confirm_masks(job) == goes_on
    if not goes_on:  # and it leaves nothing behind
        with pytest.raises(extract_logits.ConfigError, match="--verify-mask"):
            extract_logits.run_extraction(job.config)
        assert not {"out", "cache"} & set(os.listdir(tmp_path))
