"""Section 4 of extract_logits: load a model, run it over conversations, return wanted logits."""

from __future__ import annotations

import contextlib
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
    LENGTHS,
    Row,
    always_pack,
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
PACKED = (
    "llama", "mistral", "mixtral", "qwen2", "qwen3", "qwen3_moe", "gemma2", "gemma3_text",
    "cohere2", "gpt2", "gpt_neox", "phi3", "olmo2", "starcoder2", "smollm3", "granite",
)  # fmt: skip
NOT_PACKED = (
    "gpt_oss", "opt", "falcon", "bloom", "mpt", "mamba", "mamba2", "qwen3_next", "llama4_text",
    "recurrent_gemma", "jamba", "lfm2", "granitemoehybrid",
)  # fmt: skip


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
    assert row.head == "chunked"
    if family in PACKED:
        assert row.layout == "packed"


@pytest.mark.parametrize("family", NOT_PACKED)
def test_packing_is_refused_where_it_gives_other_logits(family: str) -> None:
    """The check can fail: forced to pack, these families are off by 0.1 or more."""
    row = measured(family)
    if row.packed is not None and row.packed <= TOLERANCE:
        pytest.skip("this version of transformers packs it right")
    assert row.layout == "padded"
    assert row.packed is None or row.packed > 0.1


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("family", ["qwen2", "gemma3_text", "mistral"])
def test_packing_is_right_with_either_attention(family: str, attention: str) -> None:
    row = measure(family, attn_implementation=attention)
    assert row.layout == "packed"
    assert row.difference <= TOLERANCE


def test_the_probe_meets_the_edge_of_a_window_far_longer_than_itself() -> None:
    """Llama 4 counts absolute positions for its attention temperature, in steps of 8,192."""
    row = measure("llama4_text", floor_scale=8192, max_position_embeddings=16384)
    assert row.packed is not None
    assert row.packed <= TOLERANCE  # short conversations never see the mistake
    assert row.layout == "padded"
    assert "at the edge of floor_scale" in row.reason


def test_a_window_that_the_probe_cannot_reach_is_not_packed() -> None:
    """GPT-Neo's local attention is a buffer built once, so making its window short does nothing."""
    teacher = Teacher(tiny_model("gpt_neo"))
    assert teacher.layout == "padded"
    assert "window_size is out of reach" in teacher.layout_reason


@pytest.mark.parametrize(
    ("dtype", "reach"), [(torch.float32, 1e-4), (torch.float16, 0.01), (torch.bfloat16, 0.03)]
)
def test_a_leak_below_rounding_is_a_leak(dtype: torch.dtype, reach: float) -> None:
    """A short convolution of small weights reaches over the seam by less than rounding does."""
    model = tiny_model("lfm2")
    with torch.no_grad():
        model.model.layers[0].conv.conv.weight[..., :-1] *= reach
    teacher = Teacher(model.to(dtype))
    rows = extract_logits.probe_rows(teacher.vocab_size)
    together = teacher._probe(extract_logits.pack_rows, rows)
    assert teacher._differ(together, teacher._probe_alone()) is None
    assert teacher.layout == "padded"
    assert "a conversation changes the next one's logits" in teacher.layout_reason


def test_windows_are_as_before_after_the_probe() -> None:
    model = tiny_model("mistral")
    Teacher(model)
    assert model.config.sliding_window == 16


def test_rows_that_turn_by_other_angles_do_not_share_a_pass(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """LongRoPE switches by the longest row of a pass: 40 tokens are beyond its edge of 32."""
    teacher = Teacher(tiny_model("phi3, longrope"))
    for layout in extract_logits.LAYOUTS:
        assert forced_difference(teacher, layout) <= TOLERANCE  # type: ignore[operator]
    monkeypatch.setattr(extract_logits, "rope_edge", lambda config: float("inf"))
    assert forced_difference(teacher, extract_logits.pad_rows) > 0.1  # type: ignore[operator]


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
            weights = (real / real.sum(1, keepdim=True))[..., None]
            hidden = outputs.last_hidden_state
            outputs.last_hidden_state = hidden + (hidden * weights).sum(1, keepdim=True)
            return outputs

        self.model.forward = forward  # type: ignore[method-assign]


class InseparableQwen2(Qwen2ForCausalLM):
    """A model whose head weighs positions, so that it cannot be run apart from the body."""

    def forward(self, input_ids: Any = None, **kwargs: Any) -> Any:  # type: ignore[override]
        outputs = super().forward(input_ids=input_ids, **kwargs)
        weights = 1 + torch.arange(outputs.logits.shape[1])[None, :, None] / 10
        outputs.logits = outputs.logits * weights
        return outputs


def test_padding_has_a_mask_only_where_the_model_needs_one() -> None:
    teacher = Teacher(PooledQwen2(tiny_model("qwen2").config))
    assert (teacher.layout, teacher.padding) == ("padded", extract_logits.pad_rows_with_mask)
    assert largest_difference(teacher) <= TOLERANCE
    assert Teacher(tiny_model("qwen2")).padding is extract_logits.pad_rows


def test_a_batch_is_not_padded_where_only_packing_is_right() -> None:
    teacher = Teacher(tiny_model("qwen2"))
    teacher.padding = None
    inputs, _ = teacher._lay_out([torch.zeros(200, dtype=torch.long)] * 8)
    assert inputs["input_ids"].shape == (1, 1600)


def test_where_padding_is_wrong_too_conversations_go_one_at_a_time() -> None:
    teacher = Teacher(StretchedQwen2(tiny_model("qwen2").config))
    assert teacher.layout == "single"
    assert "no padding (logits are off by" in teacher.layout_reason
    assert largest_difference(teacher) <= TOLERANCE


def test_a_head_that_cannot_be_run_apart_falls_back_to_the_plain_forward() -> None:
    teacher = Teacher(InseparableQwen2(tiny_model("qwen2").config))
    assert (teacher.head, teacher.layout) == ("forward", "single")
    assert "off by" in teacher.layout_reason
    assert largest_difference(teacher) <= TOLERANCE


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


def test_logits_that_are_no_numbers_do_not_decide_the_layout() -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.lm_head.weight[5] = float("nan")
    assert Teacher(model).layout == "packed"


# --- the head ---------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["qwen2", "gemma2", "cohere", "granite", "phi"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_head_of_a_low_precision_model_is_not_rounded(family: str, dtype: torch.dtype) -> None:
    """Against float64 from the same hidden states; the model's own logits are 100 times as far."""
    model = tiny_model(family).to(dtype)
    teacher = Teacher(model)
    sequences, positions = conversations((20,))
    inputs, flat = extract_logits.probe_inputs(
        extract_logits.pad_rows, [torch.from_numpy(sequences[0].astype(np.int64))]
    )
    hidden, _ = teacher._hidden(inputs, flat)
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
    assert teacher.head_dtype == torch.float32


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


def test_the_format_bounds_the_ids_not_the_padding_rows() -> None:
    size = {"vocab_size": 2**18 + 1, "hidden_size": 8, "head_dim": 2, "intermediate_size": 8}
    model = tiny_model("qwen2", tie_word_embeddings=True, num_hidden_layers=1, **size)
    with pytest.raises(TeacherError, match="262145 token ids; shards hold ids up to 262143"):
        Teacher(model)
    assert Teacher(model, vocab_size=2**18).vocab_size == 2**18


# --- batches ----------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["packed", "padded", "single"])
@pytest.mark.parametrize("chunk_tokens", [1, 7, 1000])
def test_chunks_are_in_row_order_and_as_large_as_asked(layout: str, chunk_tokens: int) -> None:
    teacher = always_pack(Teacher(tiny_model("qwen3")))
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


def test_packing_is_chosen_by_cost_unless_attention_skips_what_is_masked() -> None:
    teacher = Teacher(tiny_model("qwen2", hidden_size=128, num_attention_heads=4))

    def rows(*lengths: int) -> list[torch.Tensor]:
        return [torch.zeros(n, dtype=torch.long) for n in lengths]

    assert teacher._packing_is_cheaper(rows(60, 2, 2, 2, 2))
    assert not teacher._packing_is_cheaper(rows(*[500] * 8))
    teacher.model.config._attn_implementation = "flash_attention_2"
    assert teacher._packing_is_cheaper(rows(*[500] * 8))


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
    described = teacher.describe()
    assert teacher.dtype == torch.bfloat16
    assert (described["dtype"], described["attn"]) == ("bfloat16", "eager")


def test_the_description_is_json_and_names_what_a_shard_must_say(saved_model: Path) -> None:
    described = load_teacher(configure(saved_model)).describe()
    assert json.loads(json.dumps(described)) == described
    assert {
        "model", "model_revision", "dtype", "attn", "layout", "head", "quantization", "vocab_size",
    } <= set(described)  # fmt: skip
    assert described["architecture"] == "Qwen2ForCausalLM"


def test_the_log_says_which_layout_and_why(
    saved_model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="extract_logits"):
        load_teacher(configure(saved_model))
    assert "packed: packed into one row, conversations get the logits they get alone" in caplog.text


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere/at/all", "~/nowhere-at-all"])
def test_a_folder_that_is_not_there_is_named(name: str) -> None:
    with pytest.raises(TeacherError, match=f"^--model {name}: no such folder$"):
        load_teacher(configure(name))


def test_a_hub_model_out_of_reach_is_one_line_with_a_remedy(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(TeacherError, match="check --model and --revision") as caught:
        load_teacher(configure("no-such-user/no-such-model"))
    assert str(caught.value).startswith("--model no-such-user/no-such-model cannot be loaded: ")
    assert "\n" not in str(caught.value)


def test_a_folder_without_a_model_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(TeacherError, match="cannot be loaded") as caught:
        load_teacher(configure(tmp_path))
    assert "\n" not in str(caught.value)


def test_an_unknown_architecture_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "from-the-future"}')
    with pytest.raises(TeacherError, match="from-the-future") as caught:
        load_teacher(configure(tmp_path))
    assert "\n" not in str(caught.value)


def test_code_from_the_hub_is_run_only_when_asked(tmp_path: Path) -> None:
    settings = {"model_type": "own", "auto_map": {"AutoConfig": "own.OwnConfig"}}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    (tmp_path / "own.py").write_text("raise SystemExit('was run')")
    with pytest.raises(TeacherError, match="give --trust-remote-code"):
        load_teacher(configure(tmp_path))


def test_attention_that_is_not_installed_is_refused_with_the_remedy(saved_model: Path) -> None:
    with contextlib.suppress(ImportError):
        import flash_attn  # noqa: F401

        pytest.skip("flash-attn is installed here")
    with pytest.raises(TeacherError, match="leave --attn at auto"):
        load_teacher(configure(saved_model, attn="flash_attention_2"))
    with pytest.raises(TeacherError, match="leave --attn at auto"):
        load_teacher(configure(saved_model, attn="nonsense"))


def test_a_checkpoint_without_a_head_is_no_teacher(tmp_path: Path) -> None:
    tiny_model("qwen2").model.save_pretrained(tmp_path)
    with pytest.raises(TeacherError, match=r"lacks 1 weights of Qwen2ForCausalLM \(lm_head.weight"):
        load_teacher(configure(tmp_path))


def test_a_tied_head_is_not_a_missing_one(tmp_path: Path) -> None:
    tiny_model("qwen2, tied").save_pretrained(tmp_path)
    assert largest_difference(load_teacher(configure(tmp_path))) <= TOLERANCE


def test_a_length_beyond_the_models_positions_is_refused(saved_model: Path) -> None:
    with pytest.raises(TeacherError, match="--max-seq-len 257 is beyond the 256 positions"):
        load_teacher(configure(saved_model, max_seq_len=257))
    load_teacher(configure(saved_model, max_seq_len=256))


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
    lines = [line.split(" | ") for line in page.read_text().splitlines() if " | chunked | " in line]
    documented = {line[0].removeprefix("| "): line[4] for line in lines}
    assert list(documented) == list(FAMILIES)
    if f"transformers {transformers.__version__}" in page.read_text():
        assert documented == {family: measured(family).layout for family in FAMILIES}


def test_lengths_of_the_comparison_cover_one_token_and_windows() -> None:
    """The table's conversations must cross the tiny windows of 16 and include a shortest one."""
    assert min(LENGTHS) == 2
    assert max(LENGTHS) > 32
