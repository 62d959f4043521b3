"""Compare the teacher with each family's own plain forward, one conversation at a time.

    python tests/architectures.py                 the table of docs/architectures.md
    python tests/architectures.py qwen3 gpt_oss   some rows of it
    python tests/architectures.py --start         what the checks at the start cost a 270M teacher
    python tests/architectures.py --engine vllm   the table of families that vLLM runs

Every family is a tiny model with random weights made in memory, so nothing is downloaded. The
weights are drawn wide enough that attention and recurrent state matter.
"""

from __future__ import annotations

import argparse
import json
import logging
import multiprocessing
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch
from tiny_teachers import tiny_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, Gemma3TextConfig

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import extract_logits
from extract_logits import Teacher

VOCAB = 96
SMALL = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    "max_position_embeddings": 256, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
LOCAL_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
SLIDING = {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]}
GEMMA = {**SLIDING, "query_pre_attn_scalar": 8, "final_logit_softcapping": 5.0}
TIED = {"tie_word_embeddings": True}
LONGROPE = {
    "rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 32,
    "short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [2.0, 3.0, 4.0, 8.0],
}  # fmt: skip
# What a row of the table needs besides SMALL; None takes a key away. The first word is the type.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {}, "llama, tied": TIED, "mistral": {"sliding_window": 16},
    "mixtral": {"num_local_experts": 4, "sliding_window": None},
    "qwen2": {}, "qwen2, tied": TIED, "qwen3": {}, "qwen3_moe": EXPERTS,
    "qwen3_next": {
        **EXPERTS, "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8,
        "linear_value_head_dim": 8, "shared_expert_intermediate_size": 16,
        "layer_types": ["linear_attention", "full_attention"],
    },
    "gemma2": GEMMA, "gemma3_text": GEMMA,
    "cohere": {"logit_scale": 0.25}, "cohere2": {**SLIDING, "logit_scale": 0.25},
    "granite": {"logits_scaling": 4.0, "embedding_multiplier": 3.0, "residual_multiplier": 0.7},
    "gpt2": {}, "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 16},
    "gpt_neox": {}, "gptj": {"rotary_dim": 4},
    "gpt_oss": {**SLIDING, **LOCAL_EXPERTS},
    "phi": {}, "phi3": {},
    "phi3, longrope": {"original_max_position_embeddings": 32, "rope_parameters": LONGROPE},
    "olmo2": {}, "starcoder2": {"sliding_window": 16}, "stablelm": {}, "glm4": {}, "smollm3": {},
    "exaone4": SLIDING, "nemotron": {},
    "deepseek_v3": {
        "num_key_value_heads": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1,
        "topk_group": 1, "moe_intermediate_size": 16, "first_k_dense_replace": 1,
        "kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8,
        "v_head_dim": 8,
    },
    "llama4_text": {
        "num_local_experts": 2, "attention_chunk_size": 16, "intermediate_size_mlp": 48,
        "floor_scale": 16, "attn_temperature_tuning": True, "no_rope_layers": [1, 0],
    },
    "falcon": {"head_dim": None}, "falcon, alibi": {"head_dim": None, "alibi": True}, "bloom": {},
    "mpt": {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 256},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "mamba": {"state_size": 8},
    "mamba2": {"state_size": 8, "num_heads": 8, "head_dim": 8, "n_groups": 2, "chunk_size": 16},
    "recurrent_gemma": {"attention_window_size": 16, "lru_width": 32, "num_hidden_layers": 3},
    "jamba": {"num_experts": 2, "attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 8},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "granitemoehybrid": {
        **LOCAL_EXPERTS, "layer_types": ["mamba", "attention"], "shared_intermediate_size": 16,
        "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1,
        "mamba_chunk_size": 16,
    },
}  # fmt: skip

SECTIONS = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
QWEN = {
    "image_token_id": 95, "video_token_id": 94, "vision_start_token_id": 93,
    "vision_end_token_id": 92, "text_config": {**SMALL, "rope_parameters": SECTIONS},
}  # fmt: skip
EYES = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
EYES |= {"num_hidden_layers": 1, "image_size": 28, "patch_size": 14}
DEEP = {"depth": 1, "hidden_size": 32, "out_hidden_size": 32, "num_heads": 4, "patch_size": 14}
# Vision-language models, run by their text path.
VISION: dict[str, dict[str, Any]] = {
    "gemma3": {
        "text_config": {**SMALL, **SLIDING, "query_pre_attn_scalar": 8},
        "vision_config": {**EYES, "model_type": "siglip_vision_model"}, "image_token_index": 95,
    },
    "qwen2_vl": {**QWEN, "vision_config": {**DEEP, "embed_dim": 32, "mlp_ratio": 2}},
    "qwen2_5_vl": {**QWEN, "vision_config": {**DEEP, "intermediate_size": 48}},
    "qwen3_vl": {
        **QWEN,
        "vision_config": {**DEEP, "intermediate_size": 48, "deepstack_visual_indexes": [0]},
    },
    "mistral3": {
        "text_config": {**SMALL, "model_type": "mistral"},
        "vision_config": {**EYES, "model_type": "pixtral", "head_dim": 8}, "image_token_index": 95,
    },
    "llava": {
        "text_config": {**SMALL, "model_type": "llama"},
        "vision_config": {**EYES, "model_type": "clip_vision_model"}, "image_token_index": 95,
    },
    "smolvlm": {
        "text_config": {**SMALL, "model_type": "llama"}, "vision_config": EYES,
        "image_token_id": 95,
    },
}  # fmt: skip

LENGTHS = (40, 23, 31, 2, 37)


class Row(NamedTuple):
    """One line of the table: differences are the largest of any logit."""

    architecture: str
    padded: float
    masked: float  # padded with a mask
    future: float  # what other tokens at the end change before them, in spreads of the logits
    layout: str  # what the teacher chose by itself
    attention: str
    difference: float  # and how far that is off
    head: str


def tiny_model(family: str, **changes: Any) -> Any:
    """Return a random model of `family` in float32, the same at every call.

    Matrices and convolutions have unit gain, so that every layer matters to the logits.
    """
    torch.manual_seed(0)
    seen = "vision_config" in changes
    settings = VISION.get(family) or ({} if seen else {**SMALL, **FAMILIES.get(family, {})})
    settings = {key: value for key, value in {**settings, **changes}.items() if value is not None}
    config = AutoConfig.for_model(family.split(",")[0], **settings)
    asked: Any = SimpleNamespace(model=family, trust_remote_code=False)
    auto = extract_logits.choose_class(asked, config)
    model = auto.from_config(config, dtype=torch.float32).eval()
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() >= 2:
                weight.normal_(0.0, (weight.numel() / len(weight)) ** -0.5, generator=draw)
    return model


def conversations(
    lengths: tuple[int, ...] = LENGTHS, vocab_size: int = VOCAB
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Return sequences, and for each the positions of all its tokens but the first."""
    draw = np.random.default_rng(7)
    sequences = [draw.integers(0, vocab_size, n).astype(np.int32) for n in lengths]
    return sequences, [np.arange(1, n, dtype=np.int32) for n in lengths]


def plain_logits(model: Any, sequence: np.ndarray, positions: np.ndarray) -> torch.Tensor:
    """Return the model's own logits (N, V) of one conversation, nothing else in the batch."""
    with torch.no_grad():
        logits = model(input_ids=torch.from_numpy(sequence.astype(np.int64))[None]).logits[0]
    return logits[torch.from_numpy(positions.astype(np.int64)) - 1].float()


def own_logprobs(model: Any, ids: list[int]) -> list[float]:
    """Return the log-probabilities that the model gives the tokens of a row but the first."""
    logits = plain_logits(model, np.asarray(ids), np.arange(1, len(ids))).log_softmax(-1)
    return logits.gather(1, torch.tensor(ids)[1:, None]).squeeze(1).tolist()


def largest_difference(teacher: Teacher) -> float:
    """Return the largest difference of the teacher's logits from the plain forward's."""
    rows = conversations(vocab_size=teacher.vocab_size)
    plain = torch.cat([plain_logits(teacher.model, *row) for row in zip(*rows, strict=True)])
    got = torch.cat(list(teacher.iter_logits(*rows, chunk_tokens=16)))
    return float((got - plain[:, : teacher.vocab_size]).abs().max())


def measure(family: str) -> Row:
    """Return the line of one family."""
    teacher = Teacher(tiny_model(family))
    chosen, off = teacher.layout, []
    for layout in ("padded", "masked", chosen):
        teacher.layout = layout
        off.append(largest_difference(teacher))
    probe = teacher._probe(extract_logits.probe_rows(teacher.vocab_size))
    future = extract_logits.foresight(probe, [probe[0]] * 2)
    attention = teacher.numerics["attention"]
    return Row(family, *off[:2], future, chosen, attention, off[2], teacher.head)


def print_table(head: str, rows: list[Any]) -> None:
    """Print rows as Markdown; numbers with one digit."""
    print(f"| {' | '.join(head.split('|'))} |", "|---" * (head.count("|") + 1) + "|", sep="\n")
    for row in rows:
        cells = ("—" if cell is None else cell for cell in row)
        shown = (f"{cell:.0e}" if isinstance(cell, float) else cell for cell in cells)
        print(f"| {' | '.join(shown)} |")


def time_start() -> dict[str, float]:
    """Return CPU seconds of the checks and of four rows, by a model of Gemma 3 270M's shape."""
    config = Gemma3TextConfig(
        vocab_size=262_144, hidden_size=640, intermediate_size=2_048, num_hidden_layers=18,
        num_attention_heads=4, num_key_value_heads=1, head_dim=256,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    started = time.process_time()
    teacher = Teacher(model)
    checked = time.process_time()
    sequences, _ = conversations((60,) * 4, teacher.vocab_size)
    list(teacher.iter_logits(sequences, [np.arange(15, 60, dtype=np.int32)] * 4))
    return {"checks": checked - started, "four rows": time.process_time() - checked}


# What vLLM's attention and experts on a CPU need to be larger than in SMALL.
WIDE = {"vocab_size": 320, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 2}
WIDE |= {"num_key_value_heads": 1, "head_dim": 32}
VLLM: dict[str, dict[str, Any]] = {name: {} for name in (
    "llama", "llama, tied", "mistral", "mixtral", "qwen2", "qwen3", "qwen3_moe", "gemma2",
    "gemma3_text", "granite", "phi3", "olmo2", "starcoder2", "glm4", "smollm3", "gpt_oss", "gpt2",
    "gpt_neox", "cohere", "cohere2", "exaone4",
)}  # fmt: skip
VLLM["qwen3_moe"] = {"moe_intermediate_size": 32}
VLLM["gemma2"] = VLLM["gemma3_text"] = {"query_pre_attn_scalar": 32}
CHUNKS = {"max_num_batched_tokens": 128, "max_num_seqs": 8, "enforce_eager": True}
CHUNKS |= {"distributed_executor_backend": "uni"}


class EngineRow(NamedTuple):
    """A family run by vLLM; the divergences are mean KL(float32 || bfloat16) of a token."""

    architecture: str
    difference: float | None = None  # the largest of any logit in float32; None: it does not run
    divergence: float | None = None
    plain_divergence: float | None = None  # that of transformers
    problem: str = ""


def measure_engine(family: str) -> EngineRow:
    """Return the line of one family; in a process of its own, as vLLM leaves much behind."""
    plain = tiny_model(family, **WIDE, **VLLM[family])
    extract_logits.set_attention(plain, "eager")  # sdpa of transformers 5.19 drops soft-caps
    rows = conversations((250, *LENGTHS), WIDE["vocab_size"])
    want = torch.cat([plain_logits(plain, *row) for row in zip(*rows, strict=True)])
    # transformers is asked instead of another vLLM, which would take twice as long
    extract_logits.VllmTeacher._own_logprobs = lambda _, ids: own_logprobs(plain, ids)

    def by_vllm(folder: str, dtype: str) -> torch.Tensor:
        config = extract_logits.ExtractionConfig(
            model=folder, dataset="d", output="./o", device="cpu", dtype=dtype, engine="vllm",
            engine_args={**CHUNKS, "unchecked": True},
        )  # fmt: skip
        teacher = extract_logits.load_teacher(config)
        got = torch.cat(list(teacher.iter_logits(*rows)))
        teacher.llm.llm_engine.engine_core.shutdown()
        return got

    def divergence(logits: torch.Tensor) -> float:
        log_p, log_q = want.double().log_softmax(-1), logits.double().log_softmax(-1)
        return float((log_p.exp() * (log_p - log_q)).sum(-1).mean())

    difference = None
    with tempfile.TemporaryDirectory() as folder:
        plain.save_pretrained(folder)
        tiny_tokenizer(WIDE["vocab_size"]).save_pretrained(folder)
        try:
            difference = float((by_vllm(folder, "float32") - want).abs().max())
            low = divergence(by_vllm(folder, "bfloat16"))
        except extract_logits.LogitsError as error:
            return EngineRow(family, difference, problem=extract_logits.first_line(error))
    plain.to(torch.bfloat16)
    own = torch.cat([plain_logits(plain, *row) for row in zip(*rows, strict=True)])
    return EngineRow(family, difference, low, divergence(own))


def measure_engines(families: list[str]) -> list[EngineRow]:
    """Return the lines of families, each measured by a process of its own."""
    rows = []
    for family in families:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as apart:
            try:
                rows.append(apart.submit(measure_engine, family).result())
            except BrokenProcessPool as error:
                rows.append(EngineRow(family, problem=str(error)))
        print(family, rows[-1].problem or "ran", file=sys.stderr, flush=True)
    return rows


def main() -> int:
    """Print the table; exit 1 when a difference is above 1e-4."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("families", nargs="*", help="rows; default all")
    parser.add_argument("--start", action="store_true", help="time the checks at the start")
    parser.add_argument("--engine", choices=("transformers", "vllm"), default="transformers")
    args = parser.parse_args()
    if args.start:
        print(json.dumps(time_start()))
        return 0
    rows: list[Any]
    if args.engine == "vllm":
        rows = measure_engines(args.families or list(VLLM))
        head = "architecture|max difference, float32|KL, bfloat16|KL of transformers, bfloat16"
        print_table(head, [row[:-1] for row in rows])
    else:
        logging.getLogger("transformers").setLevel(logging.ERROR)
        rows = [measure(family) for family in args.families or (*FAMILIES, *VISION)]
        head = "architecture|padded|with a mask|later tokens|chosen|attention|max difference|head"
        print_table(head, rows)
    return int(any(row.difference is None or row.difference > 1e-4 for row in rows))


if __name__ == "__main__":
    sys.exit(main())
