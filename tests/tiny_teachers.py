"""Random teachers and tokenizers of any vocabulary size, small enough to make in a test.

The tokenizer knows the 256 bytes, then `<unused-…>` entries that no text reaches, and the two
ChatML markers as its highest ids, so that real conversations use the whole range of ids.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ message['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def tiny_tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    """Return a byte tokenizer whose highest id is vocab_size - 1, with a ChatML template."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    unused = [f"<unused-{i}>" for i in range(len(letters), vocab_size - 2)]
    vocab = {token: i for i, token in enumerate([*letters, *unused])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [AddedToken(f"<|im_{at}|>", special=True) for at in ("start", "end")]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", chat_template=CHATML
    )


def tiny_model(
    vocab_size: int, *, padding: int = 0, twins: int = 0, seed: int = 0
) -> LlamaForCausalLM:
    """Return a Llama of two layers and width 16; two float32 forwards of it agree to 1e-6.

    Not a Qwen2: that family's own tokenizer class adds a token to whatever was saved.

    Args:
        padding: embedding rows beyond the tokenizer's highest id, with the largest logits of all.
        twins: pairs of ids (i, i + twins) whose logits are equal bit by bit.
    """
    generator = torch.Generator().manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab_size + padding, hidden_size=16, intermediate_size=32,
        num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        max_position_embeddings=512, tie_word_embeddings=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" not in name:
                weight.copy_(0.2 * torch.randn(weight.shape, generator=generator))
        model.model.embed_tokens.weight.mul_(5.0)
        head = model.lm_head.weight
        head.mul_(5.0)  # a row of logits spreads by 4 nats: a normed state of width 16 is 4 long
        head[vocab_size:].mul_(3.0)
        head[twins : 2 * twins] = head[:twins]
    return model


def save_teacher(folder: Path, vocab_size: int, **options: Any) -> Path:
    """Write a random teacher with its tokenizer the way the Hub keeps them."""
    tiny_model(vocab_size, **options).save_pretrained(folder)
    tiny_tokenizer(vocab_size).save_pretrained(folder)
    return folder
