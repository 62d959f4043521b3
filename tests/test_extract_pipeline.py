"""What stands between the teacher's forward passes: nothing that waits for the device."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from architectures import VOCAB, tiny_model

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


def teacher_on(device: torch.device, family: str) -> Teacher:
    """Return a teacher that was checked where there are numbers, then moved."""
    teacher = Teacher(tiny_model(family))
    teacher.layout = "padded"
    teacher.model.to(device)
    teacher.device = device
    return teacher


def batch_of(*sizes: int) -> Batch:
    draw = np.random.default_rng(0)
    return Batch(
        [
            EncodedRow(
                index, draw.integers(0, VOCAB, n).astype(np.int32), np.arange(1, n, dtype=np.int32)
            )
            for index, n in enumerate(sizes)
        ]
    )


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral", "gemma3_text", "phi3"])
def test_a_batch_asks_the_device_for_no_value(
    family: str, no_numbers: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(extract_logits, "HEAD_CHUNK_BYTES", 4 * VOCAB * 10)
    teacher = teacher_on(no_numbers, family)
    result = gpu_process_batch(teacher, batch_of(9, 20, 14), **SETTINGS)
    assert result.top_ids.device == no_numbers
    assert result.top_ids.shape == (40, 20)
    assert result.sampled_q.shape == (40, 7)


def test_a_model_that_looks_for_padding_in_its_ids_is_kept_from_it(
    no_numbers: torch.device,
) -> None:
    model = tiny_model("gpt2", pad_token_id=0)
    teacher = Teacher(tiny_model("gpt2", pad_token_id=0))
    teacher.layout = "padded"
    for one in (model, teacher.model):
        one.to(no_numbers)
    with pytest.raises((RuntimeError, NotImplementedError)):  # what transformers itself would do
        model(torch.zeros(2, 3, dtype=torch.long, device=no_numbers))
    teacher.device = no_numbers
    result = gpu_process_batch(teacher, batch_of(9, 20, 14), **SETTINGS)
    assert result.top_ids.shape == (40, 20)


def test_a_value_asked_for_is_noticed(no_numbers: torch.device) -> None:
    logits = torch.zeros(3, 200, device=no_numbers)
    for ask in (
        lambda: logits.sum().item(),
        lambda: logits[logits > 0],
        lambda: bool((logits > 0).any()),
        lambda: logits.nonzero(),
    ):
        with pytest.raises((RuntimeError, NotImplementedError)):
            ask()


@pytest.mark.parametrize("sizes", [(9, 20, 14), (12,)])
def test_knowing_that_nothing_is_packed_leaves_the_logits_as_they_are(
    sizes: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher, batch = Teacher(tiny_model("gemma3_text")), batch_of(*sizes)
    known = gpu_process_batch(teacher, batch, **SETTINGS)
    monkeypatch.setattr(extract_logits, "known_padding", lambda: torch.inference_mode())
    asked = gpu_process_batch(teacher, batch, **SETTINGS)
    assert torch.equal(known.top_q, asked.top_q)
    assert torch.equal(known.logsumexp, asked.logsumexp)


def test_each_packing_thread_copies_on_one_stream_of_its_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made: list[torch.device] = []

    def make(device: torch.device) -> object:
        made.append(device)
        return object()

    monkeypatch.setattr(torch.cuda, "Stream", make)
    device, meeting = torch.device("cuda:0"), threading.Barrier(2, timeout=30)

    def fetch(_: int) -> Any:
        meeting.wait()
        return extract_logits.copy_stream(device)

    with ThreadPoolExecutor(2) as threads:
        streams = list(threads.map(fetch, range(10)))
    assert len(set(streams)) == 2
    assert made == [device, device]
