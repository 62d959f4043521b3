"""Section 4 of extract_logits: load a model, run it over conversations, return wanted logits."""

from __future__ import annotations

import functools
import importlib.util
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
    forced_difference,
    largest_difference,
    measure,
    plain_logits,
    tiny_model,
)
from transformers import Qwen2ForCausalLM

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


# --- every family's own logits ---------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_the_plain_forward_one_conversation_at_a_time(family: str) -> None:
    row = measured(family)
    assert row.difference <= TOLERANCE
    assert (row.head, row.layout) == ("chunked", "padded")
    assert row.future <= 1e-6


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("family", ["qwen2", "gemma3_text", "mistral"])
def test_padding_is_right_with_either_attention(family: str, attention: str) -> None:
    row = measure(family, attn_implementation=attention)
    assert (row.layout, row.attention) == ("padded", attention)
    assert row.difference <= TOLERANCE


def test_rows_that_turn_by_other_angles_do_not_share_a_pass(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """LongRoPE switches by the longest row of a pass: 40 tokens are beyond its edge of 32."""
    teacher = Teacher(tiny_model("phi3, longrope"))
    for layout in ("padded", "masked"):
        assert forced_difference(teacher, layout) <= TOLERANCE  # type: ignore[operator]
    monkeypatch.setattr(extract_logits, "rope_edge", lambda config: float("inf"))
    assert forced_difference(teacher, "padded") > 0.1  # type: ignore[operator]


class StretchedQwen2(Qwen2ForCausalLM):
    """A model whose logits depend on the length of the padded row."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        whole = self.model.forward

        def forward(input_ids: Any = None, **kwargs: Any) -> Any:
            outputs = whole(input_ids=input_ids, **kwargs)
            outputs.last_hidden_state = outputs.last_hidden_state * (1 + input_ids.shape[1] / 50)
            return outputs

        self.model.forward = forward  # type: ignore[method-assign]


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


def test_padding_has_a_mask_only_where_the_model_needs_one() -> None:
    teacher = Teacher(CountingQwen2(tiny_model("qwen2").config))
    assert teacher.layout == "masked"
    assert largest_difference(teacher) <= TOLERANCE


def test_where_padding_is_wrong_too_conversations_go_one_at_a_time() -> None:
    teacher = Teacher(StretchedQwen2(tiny_model("qwen2").config))
    assert teacher.layout == "single"
    assert "logits are off by" in teacher.layout_reason
    assert largest_difference(teacher) <= TOLERANCE


def test_a_head_that_cannot_be_run_apart_falls_back_to_the_plain_forward() -> None:
    teacher = Teacher(InseparableQwen2(tiny_model("qwen2").config))
    assert (teacher.head, teacher.layout) == ("forward", "single")
    assert largest_difference(teacher) <= TOLERANCE
    low = Teacher(InseparableQwen2(tiny_model("qwen2").config).to(torch.bfloat16))
    (logits,) = low.iter_logits(*conversations((20,)))
    assert not torch.equal(logits, logits.bfloat16().float())  # not rounded by the head


def test_a_model_without_logits_to_keep_is_handled() -> None:
    class Plain(Qwen2ForCausalLM):
        def forward(  # type: ignore[override]
            self, input_ids: Any, attention_mask: Any = None, use_cache: bool = False
        ) -> Any:
            hidden = self.model(input_ids, attention_mask=attention_mask, use_cache=use_cache)[0]
            return torch.nn.Module.__call__(_Wrap(), self.lm_head(hidden))

    teacher = Teacher(Plain(tiny_model("qwen2").config))
    assert teacher.layout == "padded"
    assert largest_difference(teacher) <= TOLERANCE


class _Wrap(torch.nn.Module):
    def forward(self, logits: torch.Tensor) -> Any:
        from transformers.modeling_outputs import CausalLMOutputWithPast

        return CausalLMOutputWithPast(logits=logits)


def test_router_logits_of_a_checkpoint_that_asks_for_them_do_no_harm() -> None:
    teacher = Teacher(tiny_model("mixtral", output_router_logits=True))
    assert largest_difference(teacher) <= TOLERANCE


def test_logits_that_are_no_numbers_decide_nothing() -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.lm_head.weight[5] = float("nan")
    assert Teacher(model).layout == "padded"


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
    got = torch.cat(list(teacher.iter_logits(sequences, positions)))
    plain = plain_logits(model, sequences[0], positions[0])
    error = float((got - expected).abs().max())
    assert got.dtype == torch.float32
    assert error < 1e-5
    assert float((plain - expected).abs().max()) > 20 * error
    assert teacher.numerics["head_dtype"] == "float32"


@pytest.mark.parametrize("rows", [5, extract_logits.CAST_ROWS - 1, extract_logits.CAST_ROWS + 7])
def test_the_product_by_casting_is_that_of_float64(rows: int) -> None:
    draw = torch.Generator().manual_seed(0)
    hidden = torch.randn(3, 64, generator=draw).bfloat16()
    weight = torch.randn(rows, 64, generator=draw).bfloat16()
    bias = torch.randn(rows, generator=draw).bfloat16()
    expected = hidden.double() @ weight.double().T + bias.double()
    got = float32_product(hidden, weight, bias)
    assert got.dtype == torch.float32
    assert float((got - expected).abs().max()) < 2e-5  # sums near 30 in float32


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_gpu_multiplies_bfloat16_into_float32() -> None:
    device = torch.device("cuda")
    hidden = torch.randn(64, 256, device=device).bfloat16()
    weight = torch.randn(1000, 256, device=device).bfloat16()
    expected = hidden.double() @ weight.double().T
    assert extract_logits.multiplies_into_float32(device, torch.bfloat16)
    assert float((float32_product(hidden, weight, None) - expected).abs().max()) < 1e-3


def test_padding_rows_of_the_vocabulary_never_come_back() -> None:
    model = tiny_model("qwen2")
    with torch.no_grad():
        model.lm_head.weight[90:] *= 100
    teacher = Teacher(model, vocab_size=90)
    sequences, positions = conversations((20, 9), vocab_size=90)
    got = torch.cat(list(teacher.iter_logits(sequences, positions)))
    assert got.shape == (27, 90)
    assert largest_difference(teacher) <= TOLERANCE


def test_a_tokenizer_larger_than_the_model_leaves_the_models_ids() -> None:
    assert Teacher(tiny_model("qwen2"), vocab_size=120).vocab_size == 96


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


def test_a_batch_without_wanted_tokens_gives_nothing() -> None:
    teacher = Teacher(tiny_model("qwen3"))
    sequences, _ = conversations((12, 3))
    assert list(teacher.iter_logits(sequences, [np.zeros(0, np.int32)] * 2)) == []
    assert list(teacher.iter_logits([], [])) == []


def test_the_same_batch_gives_the_same_logits_bit_by_bit() -> None:
    teacher = Teacher(tiny_model("qwen3_moe"))
    once, again = (torch.cat(list(teacher.iter_logits(*conversations()))) for _ in range(2))
    assert torch.equal(once, again)


def test_dropout_is_off_even_in_a_model_that_was_training() -> None:
    model = tiny_model("gpt2", resid_pdrop=0.5).train()
    assert largest_difference(Teacher(model)) <= TOLERANCE


def test_only_wanted_positions_reach_the_head(monkeypatch: pytest.MonkeyPatch) -> None:
    """No logits of all positions are ever there: the head sees chunks, and one token a row."""
    teacher = Teacher(tiny_model("gemma2"))
    seen: list[int] = []

    def product(hidden: torch.Tensor, weight: torch.Tensor, bias: Any) -> torch.Tensor:
        seen.append(len(hidden))
        return float32_product(hidden, weight, bias)

    handle = teacher.model.lm_head.register_forward_pre_hook(
        lambda module, args: seen.append(args[0].shape[0] * args[0].shape[1])
    )
    monkeypatch.setattr(extract_logits, "float32_product", product)
    list(teacher.iter_logits(*conversations(), chunk_tokens=10))
    handle.remove()
    assert max(seen) <= 10


def test_an_id_beyond_the_embedding_is_refused_before_it_runs() -> None:
    teacher = Teacher(tiny_model("qwen2"))
    with pytest.raises(TeacherError, match="token id 96 is beyond the 96 rows"):
        list(teacher.iter_logits([np.array([1, 96], np.int32)], [np.array([1], np.int32)]))


def test_running_out_of_memory_is_told_and_leaves_the_model_usable(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    teacher = Teacher(tiny_model("qwen2"))
    mlp = teacher.model.model.layers[1].mlp

    def forward(*args: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(mlp, "forward", forward)
        with pytest.raises(torch.OutOfMemoryError):
            list(teacher.iter_logits(*conversations()))
    assert largest_difference(teacher) <= TOLERANCE


def test_the_models_own_forward_is_back_when_the_reader_stops_early() -> None:
    teacher = Teacher(tiny_model("qwen2"))
    stream = teacher.iter_logits(*conversations(), chunk_tokens=3)
    next(stream)
    for module in (teacher.model, teacher.model.model, teacher.model.lm_head):
        assert "forward" not in module.__dict__
    del stream
    assert not torch.is_inference_mode_enabled()


def test_weights_kept_on_disk_by_hooks_give_the_same_logits(tmp_path: Path) -> None:
    """accelerate wraps forwards where a model is spread over devices; borrowing must keep them."""
    accelerate = pytest.importorskip("accelerate")
    model = tiny_model("qwen2")
    expected = torch.cat(list(Teacher(model).iter_logits(*conversations())))
    places = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk",
              "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "disk"}  # fmt: skip
    spread = accelerate.dispatch_model(
        model, device_map=places, main_device="cpu", offload_dir=str(tmp_path)
    )
    got = torch.cat(list(Teacher(spread).iter_logits(*conversations())))
    assert float((got - expected).abs().max()) <= TOLERANCE


# --- loading ----------------------------------------------------------------------------------


def test_a_cpu_computes_in_float32_whatever_the_checkpoint_holds(saved_model: Path) -> None:
    teacher = load_teacher(configure(saved_model), vocab_size=90)
    assert (teacher.dtype, teacher.device.type) == (torch.float32, "cpu")
    assert (teacher.vocab_size, teacher.max_seq_len) == (90, 256)
    assert not teacher.model.training
    assert largest_difference(teacher) <= TOLERANCE


def test_the_dtype_and_attention_asked_for_are_used(saved_model: Path) -> None:
    teacher = load_teacher(configure(saved_model, dtype="bfloat16", attn="eager"))
    assert teacher.dtype == torch.bfloat16
    assert teacher.numerics["weights"] == "bfloat16"
    assert teacher.numerics["attention"] == "eager"


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
        ("~/nowhere-at-all", "^--model ~/nowhere-at-all: no such folder$"),
        ("no name of a model/at all/of the Hub", "cannot be loaded"),
        ("a-user/no-model", "^--model a-user/no-model cannot be loaded: .*check --model and --rev"),
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


@pytest.mark.parametrize("attention", ["flash_attention_2", "nonsense"])
def test_attention_that_is_not_installed_is_refused_with_the_remedy(
    saved_model: Path, attention: str
) -> None:
    if importlib.util.find_spec("flash_attn"):
        pytest.skip("flash-attn is installed here")
    with pytest.raises(TeacherError, match="leave --attn at auto"):
        load_teacher(configure(saved_model, attn=attention))


def test_a_length_beyond_the_models_positions_is_refused(saved_model: Path) -> None:
    with pytest.raises(TeacherError, match="--max-seq-len 257 is beyond the 256 positions"):
        load_teacher(configure(saved_model, max_seq_len=257))
    assert load_teacher(configure(saved_model, max_seq_len=256)).max_seq_len == 256


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


def fake_devices(monkeypatch: pytest.MonkeyPatch, *, gpus: int, mps: bool) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)


@pytest.mark.parametrize(
    ("name", "gpus", "mps", "local_rank", "device"),
    [
        ("auto", 0, False, "0", "cpu"),
        ("auto", 0, True, "0", "mps"),
        ("auto", 2, True, "0", "cuda:0"),
        ("auto", 2, False, "3", "cuda:1"),
        ("cuda", 2, False, "1", "cuda:1"),
        ("cuda:1", 2, False, "0", "cuda:1"),
        ("cpu", 2, True, "0", "cpu"),
    ],
)
def test_auto_takes_the_best_device_that_is_there(
    monkeypatch: pytest.MonkeyPatch, name: str, gpus: int, mps: bool, local_rank: str, device: str
) -> None:
    fake_devices(monkeypatch, gpus=gpus, mps=mps)
    monkeypatch.setenv("LOCAL_RANK", local_rank)
    assert str(resolve_device(name)) == device


@pytest.mark.parametrize("name", ["cuda", "cuda:2", "mps", "tpu", "cuda:x", ""])
def test_a_device_that_is_not_there_is_refused_naming_those_that_are(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    fake_devices(monkeypatch, gpus=2 if ":" in name else 0, mps=False)
    with pytest.raises(TeacherError, match=r"not on this machine; there is cpu"):
        resolve_device(name)


def test_the_table_in_the_documentation_is_that_of_this_code() -> None:
    page = Path(__file__).parent.parent / "docs" / "architectures.md"
    lines = [line.split(" | ") for line in page.read_text().splitlines() if " | chunked |" in line]
    documented = {line[0].removeprefix("| "): line[4:6] for line in lines}
    assert list(documented) == [*FAMILIES, *VISION]
    if f"transformers {transformers.__version__}, November" in page.read_text():
        rows = {family: measured(family) for family in documented}
        assert documented == {name: [row.layout, row.attention] for name, row in rows.items()}
