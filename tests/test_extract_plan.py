"""`--plan` of `extract_logits.py`: what a run would read, store and take; nothing is written."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import CHATS, TEACHER, chat

import extract_logits
from extract_logits import (
    Batch,
    ExtractionConfig,
    TeacherError,
    open_job,
    plan_extraction,
    sample_job,
)


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory, model: Path) -> dict[str, str]:
    """A random teacher of 300 tokens and 400 short conversations."""
    folder = tmp_path_factory.mktemp("small")
    sizes = np.random.default_rng(2).lognormal(3, 0.8, 400).astype(int).clip(1, 300).tolist()
    lines = [json.dumps({"messages": chat("x" * size), "size": size + 40}) for size in sizes]
    (folder / "chats.jsonl").write_text("\n".join(lines) + "\n")
    return {"model": str(model), "dataset": str(folder / "chats.jsonl")}


@pytest.fixture
def make(small: dict[str, str]) -> Callable[..., ExtractionConfig]:
    def configure(**options: Any) -> ExtractionConfig:
        return ExtractionConfig(**{**small, "output": "./out", "plan": True, **options})

    return configure


@pytest.fixture
def plan(make: Callable[..., ExtractionConfig]) -> Callable[..., dict[str, Any]]:
    return lambda **options: plan_extraction(open_job(make(**options)))


def test_a_plan_foretells_the_run_and_writes_nothing(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    argv = ["--model", str(TEACHER), "--dataset", str(CHATS), "--output", "./out"]
    argv += ["--limit", "12", "--upload-every", "5", "--max-batch-tokens", "1024"]
    assert extract_logits.main([*argv, "--plan"]) == 0
    lines = capsys.readouterr().out.strip().splitlines()
    foretold = json.loads(lines[-1])
    assert list((tmp_path / "here").iterdir()) == []

    assert extract_logits.main(argv) == 0
    stored = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert foretold["rows"] == stored["rows"] == 12
    assert foretold["stored_tokens"] == stored["tokens"]
    assert foretold["shards"] == stored["shards"] == 3
    assert foretold["commits"] == 4
    assert foretold["bytes"] == pytest.approx(stored["bytes"], rel=0.05)
    assert foretold["output"] == "./out"
    table = "\n".join(lines[:-1])
    for word in ("rows", "stored tokens", "bytes on disk", "shards", "commits", "hours"):
        assert word in table
    assert f"{foretold['stored_tokens']:,}" in table
    assert extract_logits.main([*argv, "--plan"]) == 0  # it does not look at the output


@pytest.mark.parametrize("streaming", [False, True])
def test_a_sample_stands_for_a_large_job(
    streaming: bool, make: Callable[..., ExtractionConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    """100 of 400 rows; the sample is fixed by the ids, so the deviation never flickers."""
    exact = sample_job(open_job(make()), lambda: False)
    monkeypatch.setattr(extract_logits, "PLAN_ROWS", 100)
    job = open_job(make(streaming=streaming))
    sample = sample_job(job, lambda: False)
    assert (sample.selected, sample.measured) == (400, 100)
    again = sample_job(open_job(make()), lambda: False)
    ids = [row.index for row in sample.encoded]
    assert sorted(ids) == [row.index for row in again.encoded]
    planned = plan_extraction(job)
    assert planned["rows"] == exact.rows
    assert planned["measured_rows"] == 100
    assert planned["tokens"] == pytest.approx(exact.tokens, rel=0.2)


def test_several_workers_share_the_hours_of_the_whole_job(
    plan: Callable[..., dict[str, Any]],
) -> None:
    planned = plan(limit=40, plan_rate=10.0, rank=3, world_size=4)
    assert planned["rows"] == 40
    assert planned["hours"] == pytest.approx(planned["stored_tokens"] / 36_000, rel=0.01)
    assert planned["hours_each"] == pytest.approx(planned["hours"] / 4, rel=0.01)


def test_a_batch_that_does_not_fit_is_halved_and_one_without_usable_logits_refused(
    plan: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    real, most = extract_logits.Extraction.forward, 700

    def small_device(run: extract_logits.Extraction, batch: Batch) -> Any:
        if len(batch.rows) * max(row.input_ids.size for row in batch.rows) > most:
            raise torch.OutOfMemoryError("out of memory")
        host = real(run, batch).to_host()
        host.usable[:] = most == 700
        return SimpleNamespace(to_host=lambda: host)

    monkeypatch.setattr(extract_logits.Extraction, "forward", small_device)
    assert plan(limit=20, max_batch_tokens=1400)["rows"] == 20
    assert "going on with half of that" in caplog.text
    most = 1400
    with pytest.raises(TeacherError, match="no usable logits"):
        plan(limit=4)
