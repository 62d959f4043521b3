"""Section 4 of extract_logits: load a model, run it over conversations, return wanted logits."""

from __future__ import annotations

import functools
import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from architectures import (
    FAMILIES,
    VISION,
    Row,
    conversations,
    largest_difference,
    measure,
    plain_logits,
    tiny_model,
)
from transformers import Qwen2ForCausalLM
from transformers.modeling_outputs import CausalLMOutput

import extract_logits
from extract_logits import (
    ExtractionConfig,
    Teacher,
    TeacherError,
    float32_product,
    load_teacher,
    resolve_device,
)

TOLERANCE = 1e-4  # of a float32 logit, the promise for every family


@pytest.fixture(scope="module")
def saved_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen2 checkpoint in bfloat16, with padding rows beyond id 89."""
    folder = tmp_path_factory.mktemp("model")
    tiny_model("qwen2").to(torch.bfloat16).save_pretrained(folder)
    return folder


@functools.cache
def measured(family: str) -> Row:
    """One row of the table for all tests."""
    return measure(family)


def configure(model: Any, **options: Any) -> ExtractionConfig:
    return ExtractionConfig(
        model=str(model), dataset="d.jsonl", output="./o", device="cpu", **options
    )


def all_logits(teacher: Teacher, *rows: Any, **options: Any) -> torch.Tensor:
    """Return the logits (N, V) of rows, else of all that the families are measured with."""
    return torch.cat(list(teacher.iter_logits(*(rows or conversations()), **options)))


# --- every family's own logits ---------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_the_plain_forward_one_conversation_at_a_time(family: str) -> None:
    row = measured(family)
    assert row.difference <= TOLERANCE
    assert (row.head, row.layout) == ("chunked", "padded")
    assert row.future <= 1e-6


class PooledQwen2(Qwen2ForCausalLM):
    """A model that looks at all tokens of a row that a mask does not hide, later ones too."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        whole = self.model.forward

        def forward(input_ids: Any = None, attention_mask: Any = None, **kwargs: Any) -> Any:
            outputs = whole(input_ids=input_ids, attention_mask=attention_mask, **kwargs)
            real = torch.ones_like(input_ids) if attention_mask is None else attention_mask
            hidden = outputs.last_hidden_state
            outputs.last_hidden_state = self.mix(hidden, real.to(hidden.dtype))
            return outputs

        self.model.forward = forward  # type: ignore[method-assign]

    def mix(self, hidden: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
        """Return what the head sees of (B, S, H); `real` (B, S) is 0 where there is padding."""
        weights = (real / real.sum(1, keepdim=True))[..., None]
        return hidden + (hidden * weights).sum(1, keepdim=True)


class StretchedQwen2(PooledQwen2):
    """A model whose logits depend on the length of the padded row."""

    def mix(self, hidden: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
        return hidden * (1 + hidden.shape[1] / 50)


class CountingQwen2(PooledQwen2):
    """A causal model whose logits depend on how many tokens a row has."""

    def mix(self, hidden: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
        return hidden * (1 + real.sum(1)[:, None, None] / 50)


class InseparableQwen2(Qwen2ForCausalLM):
    """A model whose head weighs positions, so that it cannot be run apart from the body."""

    def forward(self, input_ids: Any = None, **kwargs: Any) -> Any:  # type: ignore[override]
        outputs = super().forward(input_ids=input_ids, **kwargs)
        weights = 1 + torch.arange(outputs.logits.shape[1])[None, :, None] / 10
        outputs.logits = outputs.logits * weights
        return outputs


class PlainQwen2(Qwen2ForCausalLM):
    """A model whose forward knows no `logits_to_keep`, as code beside a checkpoint may be."""

    def forward(  # type: ignore[override]
        self, input_ids: Any, attention_mask: Any = None, use_cache: bool = False
    ) -> Any:
        hidden = self.model(input_ids, attention_mask=attention_mask, use_cache=use_cache)[0]
        return CausalLMOutput(logits=self.lm_head(hidden))


@pytest.mark.parametrize(
    ("kind", "head", "layout"),
    [(CountingQwen2, "chunked", "masked"), (StretchedQwen2, "chunked", "single"),
     (InseparableQwen2, "forward", "single"), (PlainQwen2, "chunked", "padded")],
)  # fmt: skip
def test_where_padding_is_wrong_too_conversations_go_one_at_a_time(
    kind: Any, head: str, layout: str
) -> None:
    """A mask is there only where it is needed; a head that cannot be run apart runs inside."""
    teacher = Teacher(kind(tiny_model("qwen2").config))
    assert (teacher.head, teacher.layout) == (head, layout)
    assert largest_difference(teacher) <= TOLERANCE


# --- the head ---------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["qwen2", "gemma2", "cohere", "granite", "phi"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_head_of_a_low_precision_model_is_not_rounded(family: str, dtype: torch.dtype) -> None:
    """Against float64 from the same hidden states; the model's own logits are 100 times as far."""
    model = tiny_model(family).to(dtype)
    teacher = Teacher(model)
    sequences, positions = conversations((20,))
    row = torch.from_numpy(sequences[0].astype(np.int64))
    inputs = extract_logits.pad_rows([row], teacher.device, masked=False)
    hidden, *_ = teacher._hidden(inputs, torch.arange(len(row)))
    expected = hidden.double() @ model.lm_head.weight.detach().double().T
    if model.lm_head.bias is not None:
        expected = expected + model.lm_head.bias.detach().double()
    expected = {
        "gemma2": lambda x: 5.0 * torch.tanh(x / 5.0),
        "cohere": lambda x: x * 0.25,
        "granite": lambda x: x / 4.0,
    }.get(family, lambda x: x)(expected)[:-1]
    got = all_logits(teacher, sequences, positions)
    plain = plain_logits(model, sequences[0], positions[0])
    error = float((got - expected).abs().max())
    assert got.dtype == torch.float32
    assert error < 1e-5
    assert float((plain - expected).abs().max()) > 20 * error
    assert teacher.numerics["head_dtype"] == "float32"


@pytest.mark.parametrize("rows", [5, extract_logits.CAST_ROWS + 7])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_the_product_by_casting_is_that_of_float64(device: str, rows: int) -> None:
    """And a GPU multiplies 16 bits into float32."""
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    draw = torch.Generator().manual_seed(0)
    hidden, weight, bias = (
        torch.randn(shape, generator=draw).bfloat16().to(device)
        for shape in ((3, 64), (rows, 64), (rows,))
    )
    expected = hidden.double() @ weight.double().T + bias.double()
    got = float32_product(hidden, weight, bias)
    assert got.dtype == torch.float32
    near = {"cpu": 2e-5, "cuda": 1e-3}[device]  # of sums near 30
    assert float((got - expected).abs().max()) < near


def test_padding_rows_of_the_vocabulary_never_come_back() -> None:
    model = tiny_model("qwen2")
    with torch.no_grad():
        model.lm_head.weight[90:] *= 100
    teacher = Teacher(model, vocab_size=90)
    assert all_logits(teacher, *conversations((20, 9), vocab_size=90)).shape == (27, 90)
    assert largest_difference(teacher) <= TOLERANCE
    assert Teacher(model, vocab_size=120).vocab_size == 96  # a tokenizer larger than the model


# --- batches ----------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["padded", "masked", "single"])
@pytest.mark.parametrize("chunk_tokens", [1, 7, 1000])
def test_chunks_are_in_row_order_and_as_large_as_asked(layout: str, chunk_tokens: int) -> None:
    teacher = Teacher(tiny_model("qwen3"))
    teacher.layout = layout
    sequences, _ = conversations((12, 30, 5))
    positions = [np.array(p, np.int32) for p in ([1, 11], [4, 5, 29], [])]
    chunks = list(teacher.iter_logits(sequences, positions, chunk_tokens=chunk_tokens))
    expected = [plain_logits(teacher.model, *row) for row in zip(sequences, positions, strict=True)]
    assert max(len(chunk) for chunk in chunks) <= chunk_tokens
    assert float((torch.cat(chunks) - torch.cat(expected)).abs().max()) <= TOLERANCE
    assert list(teacher.iter_logits(sequences, [np.zeros(0, np.int32)] * 3)) == []


def test_a_forward_that_does_not_end_leaves_the_model_as_it_was(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    teacher = Teacher(tiny_model("qwen2"))

    def forward(*args: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(teacher.model.model.layers[1].mlp, "forward", forward)
        with pytest.raises(torch.OutOfMemoryError):
            all_logits(teacher)
    next(teacher.iter_logits(*conversations(), chunk_tokens=3))  # its reader stops
    assert not torch.is_inference_mode_enabled()
    assert largest_difference(teacher) <= TOLERANCE


def test_weights_kept_on_disk_by_hooks_give_the_same_logits(tmp_path: Path) -> None:
    """accelerate wraps forwards where a model is spread over devices; borrowing must keep them."""
    accelerate = pytest.importorskip("accelerate")
    model = tiny_model("qwen2")
    expected = all_logits(Teacher(model))
    places = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk",
              "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "disk"}  # fmt: skip
    spread = accelerate.dispatch_model(
        model, device_map=places, main_device="cpu", offload_dir=str(tmp_path)
    )
    assert float((all_logits(Teacher(spread)) - expected).abs().max()) <= TOLERANCE


# --- loading ----------------------------------------------------------------------------------


def test_a_cpu_computes_in_float32_whatever_the_checkpoint_holds(saved_model: Path) -> None:
    teacher = load_teacher(configure(saved_model), vocab_size=90)
    assert (teacher.dtype, teacher.device.type) == (torch.float32, "cpu")
    assert (teacher.vocab_size, teacher.max_seq_len) == (90, 256)
    assert not teacher.model.training
    assert largest_difference(teacher) <= TOLERANCE


def test_the_dtype_attention_and_length_asked_for_are_used(saved_model: Path) -> None:
    asked = configure(saved_model, dtype="bfloat16", attn="eager", max_seq_len=256)
    teacher = load_teacher(asked)
    assert teacher.numerics["weights"] == "bfloat16"
    assert teacher.numerics["attention"] == "eager"
    with pytest.raises(TeacherError, match="--max-seq-len 257 is beyond the 256 positions"):
        load_teacher(configure(saved_model, max_seq_len=257))
    with pytest.raises(TeacherError, match="leave --attn at auto"):
        load_teacher(configure(saved_model, attn="nonsense"))


def test_the_numerics_are_json_and_the_log_says_them(
    saved_model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="extract_logits"):
        numerics = load_teacher(configure(saved_model)).numerics
    assert json.loads(json.dumps(numerics)) == numerics
    assert numerics["architecture"] == "Qwen2ForCausalLM"
    assert numerics["versions"]["transformers"] == transformers.__version__
    assert {"weights", "quantization", "attention", "experts", "layout", "head"} < set(numerics)
    assert "in float32, attention sdpa, head chunked in float32; padded: padded on" in caplog.text


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("./nowhere", "^--model ./nowhere: no such folder$"),
        ("no name of a model/at all/of the Hub", "cannot be loaded"),
        ("a-user/no-model", "^--model a-user/no-model cannot be loaded: the Hub is out of reach"),
        ("{}", "model_type"),  # from here on the config.json of a folder
        ('{"model_type": "from-the-future"}', "from-the-future"),
        ('{"model_type": "own", "auto_map": {"AutoConfig": "own.OwnConfig"}}',
         "give --trust-remote-code"),
    ],
)  # fmt: skip
def test_a_model_that_cannot_be_loaded_is_one_line(
    name: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    if name.startswith("{"):
        (tmp_path / "config.json").write_text(name)
        (tmp_path / "own.py").write_text("raise SystemExit('was run')")
    with pytest.raises(TeacherError, match=message) as caught:
        load_teacher(configure(tmp_path if name.startswith("{") else name))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "gpus", "mps", "local_rank", "device"),
    [
        ("auto", 0, False, "0", "cpu"), ("auto", 0, True, "0", "mps"),
        ("auto", 2, True, "0", "cuda:0"), ("auto", 2, False, "3", "cuda:1"),
        ("cuda:1", 2, False, "0", "cuda:1"), ("cpu", 2, True, "0", "cpu"),
    ],
)  # fmt: skip
def test_auto_takes_the_best_device_that_is_there(
    monkeypatch: pytest.MonkeyPatch, name: str, gpus: int, mps: bool, local_rank: str, device: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    monkeypatch.setenv("LOCAL_RANK", local_rank)
    assert str(resolve_device(name)) == device


def test_the_table_in_the_documentation_is_that_of_this_code() -> None:
    page = Path(__file__).parent.parent / "docs" / "architectures.md"
    lines = [line.split(" | ") for line in page.read_text().splitlines() if " | chunked |" in line]
    documented = {line[0].removeprefix("| "): line[4:6] for line in lines}
    assert list(documented) == [*FAMILIES, *VISION]
    if f"transformers {transformers.__version__}, November" in page.read_text():
        rows = {family: measured(family) for family in documented}
        assert documented == {name: [row.layout, row.attention] for name, row in rows.items()}


def test_a_head_that_cannot_be_run_apart_falls_back_to_the_plain_forward() -> None:
    teacher = Teacher(InseparableQwen2(tiny_model("qwen2").config))
    assert (teacher.head, teacher.layout) == ("forward", "single")
    assert largest_difference(teacher) <= TOLERANCE
    low = Teacher(InseparableQwen2(tiny_model("qwen2").config).to(torch.bfloat16))
    (logits,) = low.iter_logits(*conversations((20,)))
    assert not torch.equal(logits, logits.bfloat16().float())  # not rounded by the head


@pytest.mark.parametrize(
    ("family", "positions"),
    [("qwen2", 300), ("gpt2", 300), ("mpt", 256), ("bloom", None), ("mamba2", None)],
)
def test_the_longest_conversation_is_read_from_the_configuration(
    family: str, positions: int | None
) -> None:
    """BLOOM's linear biases and a recurrent state have no last position."""
    named = {"max_position_embeddings": positions if family in ("qwen2", "gpt2") else None}
    assert extract_logits.max_positions(tiny_model(family, **named).config) == positions
