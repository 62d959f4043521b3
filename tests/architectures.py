"""Compare the teacher with each family's own plain forward, one conversation at a time.

    python tests/architectures.py            the table of docs/architectures.md
    python tests/architectures.py --json     the same as one JSON line

Every family is a tiny model with random weights made in memory, so nothing is downloaded. The
weights are drawn wide enough that attention and recurrent state matter: with the usual small
initial values a conversation hardly feels the one packed before it.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from extract_logits import Teacher

VOCAB = 96
SMALL = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
SLIDING = {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]}
# what a family's configuration needs besides SMALL
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 16},
    "mixtral": {"num_local_experts": 4, "sliding_window": None},
    "qwen2": {},
    "qwen3": {},
    "qwen3_moe": EXPERTS,
    "qwen3_next": {
        **EXPERTS,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "shared_expert_intermediate_size": 16,
        "layer_types": ["linear_attention", "full_attention"],
    },
    "gemma2": {**SLIDING, "query_pre_attn_scalar": 8, "final_logit_softcapping": 5.0},
    "gemma3_text": {**SLIDING, "query_pre_attn_scalar": 8, "final_logit_softcapping": 5.0},
    "cohere": {"logit_scale": 0.25},
    "cohere2": {**SLIDING, "logit_scale": 0.25},
    "granite": {"logits_scaling": 4.0, "embedding_multiplier": 3.0, "residual_multiplier": 0.7},
    "gpt2": {},
    "gpt_neox": {},
    "gpt_oss": {**SLIDING, "num_local_experts": 4, "num_experts_per_tok": 2},
    "phi": {},
    "phi3": {},
    "olmo2": {},
    "starcoder2": {"sliding_window": 16},
    "stablelm": {},
    "glm4": {},
    "smollm3": {},
    "exaone4": {**SLIDING},
    "nemotron": {},
    "deepseek_v3": {
        "num_key_value_heads": 4,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "moe_intermediate_size": 16,
        "first_k_dense_replace": 1,
        "kv_lora_rank": 8,
        "q_lora_rank": 8,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
    },
    "llama4_text": {
        "num_local_experts": 2,
        "attention_chunk_size": 16,
        "intermediate_size_mlp": 48,
        "floor_scale": 16,
    },
    "falcon": {},
    "bloom": {},
    "mpt": {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 256},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "mamba": {"state_size": 8},
    "mamba2": {"state_size": 8, "num_heads": 8, "head_dim": 8, "n_groups": 2, "chunk_size": 16},
    "recurrent_gemma": {"attention_window_size": 16, "lru_width": 32},
    "jamba": {
        "num_experts": 2,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "mamba_d_state": 8,
        "use_mamba_kernels": False,
    },
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "granitemoehybrid": {
        "layer_types": ["mamba", "attention"],
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "shared_intermediate_size": 16,
        "mamba_n_heads": 8,
        "mamba_d_head": 8,
        "mamba_d_state": 8,
        "mamba_n_groups": 1,
        "mamba_chunk_size": 16,
    },
}


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    architecture: str
    head: str
    layout: str
    difference: float  # largest difference of a logit from the plain forward, layout as chosen
    reason: str


def tiny_model(family: str, **changes: Any) -> Any:
    """Return a random model of `family` in float32, the same at every call."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **{**SMALL, **FAMILIES.get(family, {}), **changes})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    widen(model)
    return model


def widen(model: Any) -> None:
    """Draw matrices of unit gain, so that every layer matters to the logits."""
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() >= 2 and "conv" not in name:
                weight.normal_(0.0, weight.shape[-1] ** -0.5, generator=draw)


def conversations(
    lengths: tuple[int, ...] = (40, 23, 31, 2, 37), vocab_size: int = VOCAB
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


def largest_difference(teacher: Teacher, lengths: tuple[int, ...] = (40, 23, 31, 2, 37)) -> float:
    """Return the largest difference of the teacher's logits from the plain forward's."""
    sequences, positions = conversations(lengths, teacher.vocab_size)
    plain = [plain_logits(teacher.model, *row) for row in zip(sequences, positions, strict=True)]
    got = torch.cat(list(teacher.iter_logits(sequences, positions, chunk_tokens=16)))
    return float((got - torch.cat(plain)[:, : teacher.vocab_size]).abs().max())


def measure(family: str) -> Row:
    """Return the line of one family."""
    teacher = Teacher(tiny_model(family))
    teacher._packing_is_cheaper = lambda rows: True  # type: ignore[method-assign]
    difference = largest_difference(teacher)
    return Row(family, teacher.head, teacher.layout, difference, teacher.layout_reason)


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("families", nargs="*", default=list(FAMILIES))
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    rows = [measure(family) for family in args.families]
    if args.json:
        print(json.dumps([asdict(row) for row in rows]))
        return 0
    print("| architecture | layout | head | max difference | why |\n|---|---|---|---|---|")
    for row in rows:
        print(
            f"| {row.architecture} | {row.layout} | {row.head} | {row.difference:.1e} | {row.reason} |"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
