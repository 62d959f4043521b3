"""Section 4 of extract_logits: a teacher is the whole checkpoint and never sees a later token.

Each case that is refused would run to exit code 0 with wrong numbers.
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
from architectures import (
    EYES,
    SMALL,
    VISION,
    VOCAB,
    conversations,
    largest_difference,
    plain_logits,
    tiny_model,
)
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
    """Return the one line by which a teacher is refused."""
    with pytest.raises(TeacherError) as caught:
        load_teacher(configure(folder, **options))
    assert "\n" not in str(caught.value)
    return str(caught.value)


LOOKING: list[tuple[str, dict[str, Any]]] = [
    ("bert", {}), ("gemma3_text", {"use_bidirectional_attention": True}),
    ("paligemma", {  # of which eager attention alone is causal: not what it was trained with
        "text_config": {**SMALL, "model_type": "gemma"}, "image_token_index": 95,
        "vision_config": {**EYES, "model_type": "siglip_vision_model"}, "projection_dim": 32}),
]  # fmt: skip


@pytest.mark.parametrize(("family", "settings"), LOOKING, ids=lambda value: str(value)[:12])
def test_a_model_that_sees_later_tokens_is_refused(family, settings, tmp_path):
    assert "is not causal" in refusal(save(tmp_path, tiny_model(family, **settings)))


def mix_blocks(hidden, real):
    """A diffusion model's layout: a token sees its block of four to the end, and no later one."""
    blocks = torch.arange(hidden.shape[1]) // 4
    same = (blocks[:, None] == blocks[None]).to(hidden.dtype)
    return hidden + (same[None] @ (hidden * real[..., None])) / 4


MIXES = {
    "blocks": mix_blocks,
    "a hundredth of the next": lambda h, real: h + 0.01 * torch.roll(h * real[..., None], -1, 1),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mix", MIXES)
def test_looking_ahead_is_found_however_far_and_in_any_precision(mix, dtype):
    with pytest.raises(TeacherError, match="is not causal"):
        Teacher(mixing_model(tiny_model("qwen2").config, MIXES[mix]).to(dtype))


def in_float8(weights: Weights, *, scales: bool = True) -> None:
    """Store the projections as ModelOpt does."""
    for name in [name for name in weights if name.endswith("proj.weight")]:
        scale = weights[name].abs().max() / 448
        weights[name] = (weights[name] / scale).to(torch.float8_e4m3fn)
        if scales:
            weights[f"{name}_scale"] = scale.clone()


def put(name: str, *shape: int, dtype: Any = None) -> Callable[[Weights], Any]:
    return lambda weights: weights.update({name: torch.ones(shape, dtype=dtype)})


MODELOPT = {"quantization_config": {"quant_method": "modelopt", "quant_algo": "FP8"}}
FP8 = {"quantization_config": {"quant_method": "fp8"}}
LAYER, BUFFER = "model.layers.0.", "model.layers.1.mlp.gate.e_score_correction_bias"
TIED = {"tie_word_embeddings": True}
BESIDE = {  # a module of the model: a scale of the cache, a bias, a shared expert
    LAYER + "self_attn.k_scale": (), "lm_head.bias": (96,),
    "layers.0.self_attn.q_proj.weight_scale": (),
    LAYER + "mlp.shared_expert.up_proj.weight": (8, 8),
}  # fmt: skip
OTHER_SIZE = "of other sizes than config.json says, as vocab_size"
WRONG: list[tuple[str, Callable[[Weights], Any], dict[str, Any], str]] = [
    ("llama", in_float8, MODELOPT, r"does not use.*_scale"),
    ("gpt_oss", in_float8, MODELOPT, r"does not use.*_scale"),
    ("llama", partial(in_float8, scales=False), MODELOPT, r"proj\.weight as F8_E4M3"),
    ("llama", partial(in_float8, scales=False), FP8, ""),
    ("llama", put(LAYER + "mlp.up_proj.weight", 48, 32, dtype=torch.int8), {}, "weight as I8"),
    *(("llama", put(name, *shape), {}, rf"does not use 1 tensors of the checkpoint \({name}")
      for name, shape in BESIDE.items()),
    ("qwen2", lambda w: w.pop("lm_head.weight"), {}, r"lacks 1 weights of Qwen2.*\(lm_head\.w"),
    ("deepseek_v3", lambda w: w.pop(BUFFER), {}, rf"\({BUFFER}"),
    ("llama", lambda w: w.update({"output.weight": w.pop("lm_head.weight")}), TIED, r"\(output\.w"),
    *(("llama", put("lm_head.weight", 100, 32), tied, OTHER_SIZE) for tied in (TIED, {})),
]  # fmt: skip


@pytest.mark.parametrize(("family", "edit", "settings", "says"), WRONG)
def test_a_checkpoint_that_is_not_used_whole_is_refused(family, edit, settings, says, tmp_path):
    folder = save(tmp_path, tiny_model(family), edit, **settings)
    assert re.search(says, refusal(folder))


APART = {
    "model.layers.2.self_attn.q_proj.weight": (32, 32), "mtp.norm.weight": (32,),
    "mtp.layers.0.self_attn.q_proj.weight": (32, 32), "vision_tower.embeddings.weight": (96, 32),
    "model.layers.0.self_attn.rotary_emb.inv_freq": (4,),
    "model.layers.0.self_attn.bias": (1, 1, 8, 8),
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


PLAIN_LORA = {"target_modules": ["q_proj", "up_proj"], "task_type": "CAUSAL_LM", "r": 2}


def save_adapter(
    folder: Path, added: Any, *, tied: bool = False, rows: int | None = None
) -> tuple[Path, Any]:
    """Write an adapter, drawn at random, of ./base with rows added; return it as it was trained."""
    import peft

    model = tiny_model("llama", tie_word_embeddings=tied)
    base = save(folder / "base", tiny_model("llama", tie_word_embeddings=tied))
    if rows is not None:
        model.resize_token_embeddings(rows, mean_resizing=False)
    adapted = peft.get_peft_model(model, added)
    with torch.no_grad():
        for weight in adapted.parameters():
            if weight.requires_grad:
                weight.normal_(0, 0.3)
    adapted.peft_config["default"].base_model_name_or_path = str(base)
    adapted.save_pretrained(folder)
    return folder, adapted.eval()


def test_an_adapter_is_added_to_its_base_or_refused_with_the_remedy(tmp_path, monkeypatch):
    peft = pytest.importorskip("peft", reason="peft loads adapters")
    lora, adapted = save_adapter(tmp_path, peft.LoraConfig(**PLAIN_LORA))
    base = lora / "base"
    found = el.locate_model(configure(lora))
    assert el.tokenizer_source(configure(lora), *found) == (str(base), "main")
    assert el.find_base_revision(configure(lora), str(lora)) == el.source_revision(str(base))
    got, plain = (all_logits(load_teacher(configure(folder))) for folder in (lora, base))
    rows = zip(*conversations(), strict=True)
    want = torch.cat([plain_logits(adapted, *row) for row in rows])
    assert float((got - want).abs().max()) <= TOLERANCE
    assert float((got - plain).abs().max()) > 0.1
    weights = load_file(lora / "adapter_model.safetensors")
    weights.popitem()
    save_file(weights, lora / "adapter_model.safetensors")
    assert "missing adapter keys" in refusal(lora)
    (base / "adapter_config.json").write_text((lora / "adapter_config.json").read_text())
    assert "has an adapter beside a whole model" in refusal(base)
    (base / "adapter_config.json").unlink()
    monkeypatch.setitem(sys.modules, "peft", None)
    assert f"is an adapter of {base}: pip install peft" in refusal(lora)


HEADS = ["embed_tokens", "lm_head"]


@pytest.mark.filterwarnings("ignore")  # peft asks to read about tied weights
@pytest.mark.parametrize(
    ("change", "tied", "rows"),
    [({"target_modules": ["q_proj", "embed_tokens"]}, True, None),
     ({"target_modules": ["q_proj", "lm_head"]}, True, None),
     ({"target_modules": HEADS}, True, None),
     ({"target_modules": ["embed_tokens"], "ensure_weight_tying": True}, True, None),
     ({"modules_to_save": ["embed_tokens"]}, True, None),
     ({"trainable_token_indices": [90]}, True, None), ({}, False, 99),
     ({"modules_to_save": HEADS}, False, 99), ({"modules_to_save": HEADS}, True, 99)],
)  # fmt: skip
def test_an_adapter_gives_what_it_was_trained_to_give(tmp_path, change, tied, rows):
    """Of tied weights one alone may be changed, and a vocabulary may have grown."""
    peft = pytest.importorskip("peft", reason="peft loads adapters")
    lora, adapted = save_adapter(
        tmp_path, peft.LoraConfig(**{**PLAIN_LORA, **change}), tied=tied, rows=rows
    )
    given = [np.array([5, 90, 7, (rows or VOCAB) - 1, 30], np.int32)], [np.arange(1, 5)]
    got = all_logits(load_teacher(configure(lora)), *given)
    want = plain_logits(adapted, given[0][0], given[1][0])
    assert float((got - want).abs().max()) <= TOLERANCE * float(want.std())
    added: Any = SimpleNamespace(get_added_vocab=lambda: {"old": 90, "new": 98, "none": 99})
    unknown = el.find_unknown(added, el.load_model_config(configure(lora)))
    assert unknown == ({99} if rows else {98, 99})


@pytest.mark.filterwarnings("ignore")
def test_an_adapter_that_is_not_added_whole_is_refused(tmp_path):
    peft = pytest.importorskip("peft", reason="peft loads adapters")

    def edit(name: str, **changes: Any) -> Path:
        folder, _ = save_adapter(tmp_path / name, peft.LoraConfig(**PLAIN_LORA))
        file = folder / "adapter_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
        return folder

    said = refusal(edit("tensors", target_modules=["q_proj"]))
    assert re.search(r"no place for \d+ tensors of its adapter \(\S+up_proj.lora_A.weight, …", said)
    assert "no place for 1 options of its adapter (lora_new" in refusal(edit("o", lora_new=2))
    load_teacher(configure(edit("unset", lora_new=None, lora_newer=False)))
    kinds = (
        (peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4), "TUNING; give"),
        (peft.LoraConfig(**PLAIN_LORA, lora_bias=True), "because the base layer has no bias); g"),
        (peft.LoraConfig(**PLAIN_LORA, alora_invocation_tokens=[9]), "not support merging); give"),
    )
    for number, (added, why) in enumerate(kinds):
        said = refusal(save_adapter(tmp_path / str(number), added)[0])
        assert ": peft cannot add its adapter to the weights: " in said
        assert why in said
    folder, _ = save_adapter(tmp_path / "grown", peft.LoraConfig(**PLAIN_LORA), rows=99)
    weights = load_file(folder / "adapter_model.safetensors")
    del weights["base_model.model.lm_head.weight"]
    save_file(weights, folder / "adapter_model.safetensors")
    assert "of 99 tokens, its base has 96" in refusal(folder)
    twice = peft.LoraConfig(**PLAIN_LORA, layer_replication=[[0, 2], [1, 2]])
    assert "off by" in refusal(save_adapter(tmp_path / "twice", twice)[0])
