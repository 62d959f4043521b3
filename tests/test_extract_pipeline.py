"""What stands between the teacher's forward passes: nothing that waits for the device."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import pytest
import torch
from architectures import VOCAB, tiny_model
from conftest import ROOT
from processes import run_process

import extract_logits
from extract_logits import Batch, EncodedRow, Teacher, gpu_process_batch

SETTINGS: dict[str, Any] = {"top_p": 0.9, "top_p_max": 20, "sampled_n": 7, "seed": 1}


@pytest.fixture
def no_numbers(monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """A device that knows shapes alone: whoever asks it for a value gets an error.

    `.item()`, `bool(tensor)`, a boolean mask as an index and `nonzero` all need a value.
    """
    for sizes in (extract_logits.WEIGHED_AT_ONCE, extract_logits.HELD_AT_ONCE):
        monkeypatch.setitem(sizes, "meta", sizes["cuda"])
    return torch.device("meta")


def batch_of(*sizes: int) -> Batch:
    draw, rows = np.random.default_rng(0), []
    for index, n in enumerate(sizes):
        ids = draw.integers(0, VOCAB, n).astype(np.int32)
        rows.append(EncodedRow(index, ids, np.arange(1, n, dtype=np.int32)))
    return Batch(rows)


@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral", "gemma3_text", "phi3", "gpt2"])
def test_a_batch_asks_the_device_for_no_value(
    family: str, no_numbers: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also of a model that looks for padding in its ids, which transformers would do."""
    monkeypatch.setattr(extract_logits, "HEAD_CHUNK_BYTES", 4 * VOCAB * 10)
    padding = {"pad_token_id": 0} if family == "gpt2" else {}
    teacher = Teacher(tiny_model(family, **padding))  # checked where there are numbers
    teacher.layout = "padded"
    teacher.model.to(no_numbers)
    teacher.device = no_numbers
    result = gpu_process_batch(teacher, batch_of(9, 20, 14), **SETTINGS)
    assert result.top_ids.device == no_numbers
    assert result.top_ids.shape == (40, 20)
    assert result.sampled_q.shape == (40, 7)
    if family == "gpt2":
        ids = torch.zeros(2, 3, dtype=torch.long, device=no_numbers)
        with pytest.raises((RuntimeError, NotImplementedError)):
            tiny_model("gpt2", **padding).to(no_numbers)(ids)


def test_the_benchmark_of_whole_runs_compares_a_run_with_the_bare_forward() -> None:
    tool = ROOT / "tests/tools/bench_pipeline.py"
    words = ["--conversations", "3", "--repeats", "1", "--batch-tokens", "1024"]
    done = run_process([sys.executable, tool, *words, "--device", "cpu"])
    assert done.code == 0, done.stderr[-3000:]
    found = done.summary["pipeline"]
    assert found.keys() == {"small flat", "small peaked"}
    for figures in found.values():
        assert figures["stored tokens"] > 100
        assert min(figures["forward"], figures["on the device"]) > 0
