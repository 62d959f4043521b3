"""Section 4 of extract_logits: a teacher is the whole checkpoint and never sees a later token.

Each refused case once ran to exit 0 with wrong numbers, or was refused though it was right.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from architectures import EYES, SMALL, VISION, largest_difference, tiny_model
from safetensors.torch import load_file, save_file
from test_extract_teacher import TOLERANCE, all_logits, configure, mixing_model

import extract_logits as el
from extract_logits import Teacher, TeacherError, load_teacher

Weights = dict[str, torch.Tensor]


def save(folder: Path, model: Any, edit: Callable[[Weights], Any] = len, **settings: Any) -> Path:
    """Write a checkpoint, then change its tensors and settings."""
    model.save_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    edit(weights)
    weights = {name: weight.contiguous() for name, weight in weights.items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    described = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**described, **settings}))
    return folder


def refusal(folder: Path, **options: Any) -> str:
    """Return the one line by which a teacher is refused, after its name."""
    with pytest.raises(TeacherError) as caught:
        load_teacher(configure(folder, **options))
    text = str(caught.value)
    assert text.startswith(f"--model {folder}")
    assert "\n" not in text
    return text.removeprefix(f"--model {folder}")


BOTH_WAYS = {"use_bidirectional_attention": True}
LOOKING: list[tuple[str, dict[str, Any]]] = [
    ("bert", {}),
    ("xlnet", {"d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 48, "d_head": 8,
               "max_position_embeddings": None}),
    ("gemma3_text", BOTH_WAYS),
    # of these two eager attention alone is causal: not what they were trained with
    ("gemma3", {"text_config": {**VISION["gemma3"]["text_config"], **BOTH_WAYS}}),
    ("paligemma", {
        "text_config": {**SMALL, "model_type": "gemma"}, "image_token_index": 95,
        "vision_config": {**EYES, "model_type": "siglip_vision_model"}, "projection_dim": 32}),
]  # fmt: skip


@pytest.mark.parametrize(("family", "settings"), LOOKING, ids=lambda value: str(value)[:12])
def test_a_model_that_sees_later_tokens_is_refused(family, settings, tmp_path):
    said = refusal(save(tmp_path, tiny_model(family, **settings)))
    assert "is not causal: other tokens at the end change the logits before them by" in said


def mix_row(hidden, real):
    """All tokens of a row that a mask does not hide."""
    weights = (real / real.sum(1, keepdim=True))[..., None]
    return hidden + (hidden * weights).sum(1, keepdim=True)


def mix_blocks(hidden, real):
    """A diffusion model's layout: a token sees its block of four to the end, and no later one."""
    blocks = torch.arange(hidden.shape[1]) // 4
    same = (blocks[:, None] == blocks[None]).to(hidden.dtype)
    return hidden + (same[None] @ (hidden * real[..., None])) / 4


def mix_next(hidden, real):
    """A hundredth of the next token, and no more."""
    return hidden + 0.01 * torch.roll(hidden * real[..., None], -1, 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mix", [mix_row, mix_blocks, mix_next])
def test_looking_ahead_is_found_however_far_and_in_any_precision(mix, dtype):
    with pytest.raises(TeacherError, match="is not causal"):
        Teacher(mixing_model(tiny_model("qwen2").config, mix).to(dtype))


def test_experts_that_flip_in_low_precision_are_no_foresight(monkeypatch):
    """Where neighbours change a row by rounding, all rows change so: none has seen its future."""
    real, draw = Teacher._probe, torch.Generator().manual_seed(0)

    def noisy(self, rows):
        return [x + 0.02 * torch.randn(x.shape, generator=draw) for x in real(self, rows)]

    monkeypatch.setattr(Teacher, "_probe", noisy)
    assert Teacher(tiny_model("mixtral").to(torch.bfloat16)).layout == "padded"


def in_float8(weights: Weights, *, scales: bool = True) -> None:
    """Store the projections as ModelOpt does."""
    for name in [name for name in weights if name.endswith("proj.weight")]:
        scale = weights[name].abs().max() / 448
        weights[name] = (weights[name] / scale).to(torch.float8_e4m3fn)
        if scales:
            weights[f"{name}_scale"] = scale.clone()
            weights[name.removesuffix("weight") + "input_scale"] = torch.tensor(1.0)


def put(name: str, *shape: int, dtype: Any = None) -> Callable[[Weights], Any]:
    return lambda weights: weights.update({name: torch.ones(shape, dtype=dtype)})


def rename_head(new: str) -> Callable[[Weights], Any]:
    return lambda weights: weights.update({new: weights.pop("lm_head.weight")})


MODELOPT = {"quantization_config": {"quant_method": "modelopt", "quant_algo": "FP8"}}
FP8 = {"quantization_config": {"quant_method": "fp8"}}
LAYER, BUFFER = "model.layers.0.", "model.layers.1.mlp.gate.e_score_correction_bias"
UP = LAYER + "mlp.up_proj.weight"
BESIDE = {  # a module of the model: a scale of the cache, a norm, a bias, a shared expert, …
    LAYER + "self_attn.k_scale": (), LAYER + "self_attn.q_norm.weight": (8,),
    "layers.0.self_attn.q_proj.weight_scale": (), "lm_head.bias": (96,),
    LAYER + "mlp.shared_expert.up_proj.weight": (8, 8),
}  # fmt: skip
OTHER_SIZE = "of other sizes than config.json says, as vocab_size"
WRONG: list[tuple[str, Callable[[Weights], Any], dict[str, Any], str]] = [
    *((family, in_float8, MODELOPT, r"does not use.*_scale")
      for family in ("llama", "mixtral", "qwen3_moe", "gpt_oss", "qwen2_5_vl")),
    ("llama", in_float8, {}, r"does not use.*_scale"),
    ("llama", partial(in_float8, scales=False), MODELOPT, r"proj\.weight as F8_E4M3"),
    ("llama", partial(in_float8, scales=False), FP8, ""),
    ("llama", put(UP, 48, 32, dtype=torch.int8), {}, r"up_proj\.weight as I8"),
    *(("llama", put(name, *shape), {}, rf"does not use 1 tensors of the checkpoint \({name}")
      for name, shape in BESIDE.items()),
    ("qwen2", lambda w: w.pop("lm_head.weight"), {}, r"lacks 1 weights of Qwen2.*\(lm_head\.w"),
    ("deepseek_v3", lambda w: w.pop(BUFFER), {}, rf"\({BUFFER}"),
    *(("llama", rename_head(name), {"tie_word_embeddings": True}, rf"\({name}|the head ")
      for name in ("language_model.lm_head.weight", "output.weight")),
    *(("llama", put("lm_head.weight", 100, 32), {"tie_word_embeddings": tied}, OTHER_SIZE)
      for tied in (True, False)),
]  # fmt: skip


@pytest.mark.parametrize(("family", "edit", "settings", "says"), WRONG)
def test_a_checkpoint_that_is_not_used_whole_is_refused(family, edit, settings, says, tmp_path):
    folder = save(tmp_path, tiny_model(family), edit, **settings)
    assert re.search(says, refusal(folder))


APART = {
    "model.layers.2.self_attn.q_proj.weight": (32, 32),
    "mtp.layers.0.self_attn.q_proj.weight": (32, 32), "mtp.norm.weight": (32,),
    "model.visual.blocks.0.weight": (8, 8), "vision_tower.embeddings.weight": (96, 32),
    "v_head.summary.weight": (1, 32), "model.layers.0.self_attn.rotary_emb.inv_freq": (4,),
    "model.layers.0.self_attn.bias": (1, 1, 8, 8), "model.layers.0.self_attn.masked_bias": (),
    "model.version": (1,),
}  # fmt: skip
WHOLE: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("llama", {name: torch.ones(shape) for name, shape in APART.items()}, {}),
    ("llama", {}, MODELOPT),  # plain weights of an unknown quantization
    ("gemma3_text", {"lm_head.weight": torch.eye(96, 32)}, {}),  # tied
    *((family, {}, {}) for family in VISION),
]


@pytest.mark.parametrize(("family", "more", "settings"), WHOLE, ids=lambda value: str(value)[:12])
def test_towers_tied_heads_and_what_belongs_to_no_module_are_no_fault(
    family, more, settings, tmp_path
):
    folder = save(tmp_path, tiny_model(family), lambda weights: weights.update(more), **settings)
    teacher = load_teacher(configure(folder), vocab_size=90)
    assert (teacher.head, teacher.layout) == ("chunked", "padded")
    assert largest_difference(teacher) <= TOLERANCE
    assert (teacher.numerics["weights"], teacher.numerics["quantization"]) == ("float32", None)


def test_float8_with_the_scales_that_its_configuration_names_is_read(tmp_path):
    """Transformers multiplies it out on a CPU, and the numerics say that it did."""

    def in_blocks(weights):
        for name in [name for name in weights if name.endswith("proj.weight")]:
            rows, columns = weights[name].shape
            blocks = weights[name].reshape(rows // 16, 16, columns // 16, 16)
            scale = blocks.abs().amax((1, 3)) / 448
            low = (blocks / scale[:, None, :, None]).to(torch.float8_e4m3fn)
            weights[name] = low.reshape(rows, columns)
            weights[f"{name}_scale_inv"] = scale

    settings = {"quant_method": "fp8", "weight_block_size": [16, 16]}
    folder = save(tmp_path, tiny_model("llama"), in_blocks, quantization_config=settings)
    try:
        teacher = load_teacher(configure(folder, dtype="float32"))
    except TeacherError as error:
        if "'NoneType' object has no attribute 'get'" in str(error):
            pytest.skip("this version of transformers fails to")
        raise
    assert (teacher.numerics["weights"], teacher.numerics["quantization"]) == ("float32", None)
    plain = tiny_model("llama").model.layers[0].mlp.up_proj.weight.detach()
    read = teacher.model.model.layers[0].mlp.up_proj.weight.detach()
    assert 0 < float((read - plain).abs().max()) < 0.07 * float(plain.abs().max())
    assert largest_difference(teacher) <= TOLERANCE


def test_a_head_that_transformers_loads_otherwise_is_refused(tmp_path, monkeypatch):
    """As versions did that tied whatever the configuration said, or drew a resized head anew."""
    real = el.place_weights

    def tie(*args, **options):
        model, info = real(*args, **options)
        model.lm_head.weight = model.model.embed_tokens.weight
        return model, info

    monkeypatch.setattr(el, "place_weights", tie)
    said = refusal(save(tmp_path, tiny_model("llama")))
    assert "the head of the loaded model is not lm_head.weight of the checkpoint" in said


def test_a_soft_cap_of_attention_is_never_left_out(tmp_path):
    folder = save(tmp_path, tiny_model("gemma2", attn_logit_softcapping=2.0))
    teacher = load_teacher(configure(folder))
    assert teacher.numerics["attention"] == "eager"
    eager = load_teacher(configure(folder, attn="eager"))
    assert torch.equal(all_logits(teacher), all_logits(eager))
    assert "leave --attn at auto" in refusal(folder, attn="sdpa")


def test_attention_that_differs_from_eager_gives_way_or_is_refused_when_forced():
    """As if a version of transformers lost the sinks of a family on its way to the kernel."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    def wrong(*args, scaling, **options):
        return AttentionInterface()["sdpa"](*args, scaling=2 * scaling, **options)

    AttentionInterface.register("wrong", wrong)
    AttentionMaskInterface.register("wrong", sdpa_mask)
    model = tiny_model("llama")
    el.set_attention(model, "wrong")
    with pytest.raises(TeacherError, match=r"--attn wrong .* leave --attn at auto"):
        Teacher(model, forced_attention=True)
    teacher = Teacher(model)
    assert teacher.numerics["attention"] == "eager"
    assert largest_difference(teacher) <= TOLERANCE
    assert Teacher(tiny_model("llama"), forced_attention=True).numerics["attention"] == "sdpa"


def test_ids_beyond_the_format_do_not_refuse_a_teacher_that_has_them():
    size = {"vocab_size": 2**18 + 64, "hidden_size": 8, "head_dim": 2, "intermediate_size": 8}
    model = tiny_model("qwen2", tie_word_embeddings=True, num_hidden_layers=1, **size)
    teacher = Teacher(model, vocab_size=2**18 + 1)
    assert teacher.vocab_size == 2**18
    ids = np.array([5, 2**18, 7, 2**18 - 1], np.int32)
    chunks = list(teacher.iter_logits([ids], [np.array([2, 3], np.int32)]))
    assert [chunk.shape for chunk in chunks] == [(2, 2**18)]
    with pytest.raises(TeacherError, match="token id 262144 is beyond the 262144 rows"):
        list(teacher.iter_logits([ids], [np.array([1], np.int32)]))
    tokenizer: Any = SimpleNamespace(get_vocab=lambda: {"a": 5, "<image_soft_token>": 2**18})
    assert el.check_vocabulary(configure("m"), tokenizer) == 2**18


def test_an_adapter_is_added_to_its_base(tmp_path):
    peft = pytest.importorskip("peft", reason="peft loads adapters")
    base, lora = save(tmp_path / "base", tiny_model("llama")), tmp_path / "lora"
    added = peft.LoraConfig(r=2, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(tiny_model("llama"), added)
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_" in name:
                weight.normal_(0, 0.3)
    adapted.peft_config["default"].base_model_name_or_path = str(base)
    adapted.save_pretrained(lora)
    found = el.locate_model(configure(lora))
    assert el.tokenizer_source(configure(lora), *found) == (str(base), "main")
    assert el.find_base_revision(configure(lora), str(lora)) == el.source_revision(str(base))
    got, plain = (all_logits(load_teacher(configure(folder))) for folder in (lora, base))
    want = all_logits(Teacher(adapted.merge_and_unload()))
    assert float((got - want).abs().max()) <= TOLERANCE
    assert float((got - plain).abs().max()) > 0.1
    weights = load_file(lora / "adapter_model.safetensors")
    weights.popitem()
    save_file(weights, lora / "adapter_model.safetensors")
    assert "missing adapter keys" in refusal(lora)


def test_an_adapter_needs_peft_and_stands_beside_no_whole_model(tmp_path, monkeypatch):
    """Whether the latter is added would depend on whether peft is installed."""
    base, lora = save(tmp_path / "base", tiny_model("llama")), tmp_path / "lora"
    lora.mkdir()
    settings = {"peft_type": "LORA", "base_model_name_or_path": str(base), "r": 2}
    for folder in (lora, base):
        (folder / "adapter_config.json").write_text(json.dumps(settings))
    monkeypatch.setitem(sys.modules, "peft", None)
    assert f"is an adapter of {base}: pip install peft" in refusal(lora)
    assert "has an adapter beside a whole model" in refusal(base)
    (lora / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "./none"}))
    assert "is an adapter of ./none: no such folder" in refusal(lora)


class OnMps(torch.Tensor):
    """A CPU tensor that says it is elsewhere, and mixes with tensors there only."""

    device = torch.device("mps")

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        flat = [x for arg in args for x in (arg if isinstance(arg, list | tuple) else [arg])]
        if any(type(x) is torch.Tensor for x in flat):
            raise RuntimeError("Expected all tensors on one device")
        with torch._C.DisableTorchFunctionSubclass():
            got = function(*args, **(kwargs or {}))
        if not isinstance(got, torch.Tensor):
            return got
        name = getattr(function, "__name__", "")
        leaves = name == "cpu" or (name == "to" and str(args[1]) == "cpu")
        return got.as_subclass(torch.Tensor if leaves else cls)


def test_a_head_on_another_device_than_the_last_layer_multiplies_there():
    """A tied head stays with the embedding, on the first GPU; the last norm is on another."""
    hidden, weight = torch.randn(3, 8), torch.randn(20, 8)
    far = hidden.as_subclass(OnMps)
    with pytest.raises(RuntimeError, match="one device"):
        torch.nn.functional.linear(far, weight)
    got = el.float32_product(far, weight, None)
    assert type(got) is torch.Tensor
    assert torch.equal(got, hidden @ weight.T)


def test_logits_on_mps_are_extracted_on_the_cpu_with_the_actual_tokens(monkeypatch):
    def send(tensor, device):
        return tensor.as_subclass(OnMps) if device.type == "mps" else tensor

    def extract_on(kind):
        chunks = (chunk.as_subclass(kind) for chunk in logits.split(4))
        teacher = SimpleNamespace(iter_logits=lambda *_: chunks)
        options = {"top_p": 0.9, "top_p_max": 20, "sampled_n": 5, "seed": 1}
        return vars(el.gpu_process_batch(teacher, batch, **options).to_host())

    monkeypatch.setattr(el, "send", send)
    logits = torch.randn(6, 300, generator=torch.Generator().manual_seed(0))
    batch = el.Batch([el.EncodedRow(4, np.arange(7, dtype=np.int32), np.arange(1, 7))])
    near, far = extract_on(torch.Tensor), extract_on(OnMps)
    for name, value in near.items():
        np.testing.assert_array_equal(value, far[name], err_msg=name)
