"""Section 4 of extract_logits: load a model, run it over conversations, return wanted logits."""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import architectures
import numpy as np
import pytest
import torch
import transformers
from architectures import FAMILIES, conversations, largest_difference, plain_logits, tiny_model
from transformers import Qwen2ForCausalLM

import extract_logits as el
from extract_logits import ExtractionConfig, Teacher, TeacherError, load_teacher

TOLERANCE = 1e-4  # of a float32 logit, the promise for every family
measured = functools.cache(architectures.measure)  # one row of the table for all tests


def configure(model: Any, **options: Any) -> ExtractionConfig:
    return ExtractionConfig(
        model=str(model), dataset="d.jsonl", output="./o", device="cpu", **options
    )


def all_logits(teacher: Teacher, *rows: Any) -> torch.Tensor:
    """Return the logits (N, V) of rows, else of all that the families are measured with."""
    return torch.cat(list(teacher.iter_logits(*(rows or conversations()))))


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_the_plain_forward_one_conversation_at_a_time(family):
    row = measured(family)
    assert row.difference <= TOLERANCE
    assert (row.head, row.layout) == ("chunked", "padded")
    assert row.future <= 1e-6


def mixing_model(config: Any, mix: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> Any:
    """Return a Qwen2 whose head sees `mix(hidden, real)`; `real` (B, S) is 0 for padding."""
    model = Qwen2ForCausalLM(config)
    whole = model.model.forward

    def forward(input_ids: Any = None, attention_mask: Any = None, **kwargs: Any) -> Any:
        outputs = whole(input_ids=input_ids, attention_mask=attention_mask, **kwargs)
        real = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        hidden = outputs.last_hidden_state
        outputs.last_hidden_state = mix(hidden, real.to(hidden.dtype))
        return outputs

    model.model.forward = forward
    return model


class InseparableQwen2(Qwen2ForCausalLM):
    """A model whose head weighs positions, so that it cannot be run apart from the body."""

    def forward(self, input_ids=None, **kwargs):
        outputs = super().forward(input_ids=input_ids, **kwargs)
        weights = 1 + torch.arange(outputs.logits.shape[1])[None, :, None] / 10
        outputs.logits *= weights
        return outputs


@pytest.mark.parametrize(
    ("kind", "head", "layout"),
    [
        # the first depends on how many tokens a row has, the other on the length with padding
        (lambda h, real: h * (1 + real.sum(1)[:, None, None] / 50), "chunked", "masked"),
        (lambda h, real: h * (1 + h.shape[1] / 50), "chunked", "single"),
        (InseparableQwen2, "forward", "single"),
    ],
)  # fmt: skip
def test_where_padding_is_wrong_too_conversations_go_one_at_a_time(kind, head, layout):
    """A mask is there only where it is needed; a head that cannot be run apart runs inside."""
    config = tiny_model("qwen2").config
    teacher = Teacher(kind(config) if isinstance(kind, type) else mixing_model(config, kind))
    assert (teacher.head, teacher.layout) == (head, layout)
    assert largest_difference(teacher) <= TOLERANCE
    if head == "forward":  # nor does it round in 16 bits
        low = all_logits(Teacher(kind(config).to(torch.bfloat16)))
        assert not torch.equal(low, low.bfloat16().float())


CAPS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "qwen2": lambda x: x, "gemma2": lambda x: 5.0 * torch.tanh(x / 5.0), "cohere": lambda x: x / 4,
}  # fmt: skip


@pytest.mark.parametrize("family", CAPS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_head_of_a_low_precision_model_is_not_rounded(family, dtype):
    """Against float64 from the same hidden states; the model's own logits are 100 times as far."""
    model = tiny_model(family).to(dtype)
    teacher = Teacher(model)
    sequences, positions = conversations((20,))
    row = torch.from_numpy(sequences[0].astype(np.int64))
    inputs = el.pad_rows([row], teacher.device, masked=False)
    hidden, *_ = teacher._hidden(inputs, torch.arange(len(row)))
    head = copy.deepcopy(model.lm_head).double().requires_grad_(False)
    expected = CAPS[family](head(hidden.double()))[:-1]
    got = all_logits(teacher, sequences, positions)
    plain = plain_logits(model, sequences[0], positions[0])
    error = float((got - expected).abs().max())
    assert got.dtype == torch.float32
    assert error < 1e-5
    assert float((plain - expected).abs().max()) > 20 * error
    assert teacher.numerics["head_dtype"] == "float32"


@pytest.mark.parametrize("rows", [5, el.CAST_ROWS + 7])
def test_the_product_by_casting_is_that_of_float64(rows):
    """And a GPU, where there is one, multiplies 16 bits into float32."""
    draw = torch.Generator().manual_seed(0)
    shapes = ((3, 64), (rows, 64), (rows,))
    hidden, weight, bias = (torch.randn(s, generator=draw).bfloat16() for s in shapes)
    expected = hidden.double() @ weight.double().T + bias.double()
    for device in ("cpu", *(["cuda"] if torch.cuda.is_available() else [])):
        got = el.float32_product(hidden.to(device), weight.to(device), bias.to(device)).cpu()
        assert got.dtype == torch.float32
        near = {"cpu": 2e-5, "cuda": 1e-3}[device]  # of sums near 30
        assert float((got - expected).abs().max()) < near


def test_padding_rows_of_the_vocabulary_never_come_back():
    model = tiny_model("qwen2")
    with torch.no_grad():
        model.lm_head.weight[90:] *= 100
    teacher = Teacher(model, vocab_size=90)
    assert all_logits(teacher, *conversations((20, 9), vocab_size=90)).shape == (27, 90)
    assert largest_difference(teacher) <= TOLERANCE
    assert Teacher(model, vocab_size=120).vocab_size == 96  # a tokenizer larger than the model


def test_a_forward_that_does_not_end_leaves_the_model_as_it_was(monkeypatch):
    teacher = Teacher(tiny_model("qwen2"))

    def forward(*args):
        raise torch.OutOfMemoryError("CUDA out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(teacher.model.model.layers[1].mlp, "forward", forward)
        with pytest.raises(torch.OutOfMemoryError):
            all_logits(teacher)
    next(teacher.iter_logits(*conversations(), chunk_tokens=3))  # its reader stops
    assert not torch.is_inference_mode_enabled()
    assert largest_difference(teacher) <= TOLERANCE


def test_a_teacher_runs_as_asked_else_in_float32_and_says_how(tmp_path):
    """A checkpoint in bfloat16 with padding rows beyond id 89, on a CPU."""
    tiny_model("qwen2").to(torch.bfloat16).save_pretrained(tmp_path)
    teacher = load_teacher(configure(tmp_path), vocab_size=90)
    assert (teacher.dtype, teacher.device.type) == (torch.float32, "cpu")
    assert (teacher.vocab_size, teacher.max_seq_len) == (90, 256)
    assert not teacher.model.training
    assert largest_difference(teacher) <= TOLERANCE
    numerics = teacher.numerics
    assert json.loads(json.dumps(numerics)) == numerics
    assert numerics["architecture"] == "Qwen2ForCausalLM"
    assert numerics["versions"]["transformers"] == transformers.__version__
    assert {"weights", "quantization", "attention", "experts", "layout", "head"} < set(numerics)
    asked = {"dtype": "bfloat16", "attn": "eager", "max_seq_len": 256}
    numerics = load_teacher(configure(tmp_path, **asked)).numerics
    assert (numerics["weights"], numerics["attention"]) == ("bfloat16", "eager")
    with pytest.raises(TeacherError, match="--max-seq-len 257 is beyond the 256 positions"):
        load_teacher(configure(tmp_path, max_seq_len=257))


def test_code_beside_a_model_does_not_run_unasked(tmp_path):
    own = {"model_type": "own", "auto_map": {"AutoConfig": "own.OwnConfig"}}
    (tmp_path / "config.json").write_text(json.dumps(own))
    (tmp_path / "own.py").write_text("raise SystemExit('was run')")
    with pytest.raises(TeacherError, match="give --trust-remote-code"):
        load_teacher(configure(tmp_path))


def test_auto_takes_the_best_device_that_is_there(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "3")
    for gpus, mps, device in ((0, False, "cpu"), (0, True, "mps"), (2, True, "cuda:1")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda gpus=gpus: gpus > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda gpus=gpus: gpus)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda mps=mps: mps)
        assert str(el.resolve_device("auto")) == device


def test_the_table_in_the_documentation_is_that_of_this_code():
    page = Path(__file__).parent.parent / "docs" / "architectures.md"
    lines = [line.split(" | ") for line in page.read_text().splitlines() if " | chunked |" in line]
    documented = {line[0].removeprefix("| "): line[4:6] for line in lines}
    assert list(documented) == [*FAMILIES, *architectures.VISION]
    if f"transformers {transformers.__version__}, November" in page.read_text():
        rows = {family: measured(family) for family in documented}
        assert documented == {name: [row.layout, row.attention] for name, row in rows.items()}
