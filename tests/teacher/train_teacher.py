"""Train the small teacher of the tests, a Llama of 1.4 million weights.

    conversations ──BPE──► tokenizer ──encode──► batches of one length ──AdamW──► model/
                                                        held-out loss, unigram entropy ◄──┘

The tokenizer, the weights (bfloat16) and the configuration are written to one folder that
`AutoTokenizer` and `AutoModelForCausalLM` load without a network. The chat template in that
folder is the source: it is read, never made. The last line printed is one JSON object.

Llama and not Qwen2, because transformers loads every qwen2 tokenizer with that family's own rule
for cutting text, which allows one digit a token, whatever the folder says.

    python tests/teacher/train_teacher.py --output tests/teacher/model
    python tests/teacher/train_teacher.py --evaluate tests/teacher/model
"""

from __future__ import annotations

import argparse
import json
import math
import random
import re
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, count, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from make_conversations import Row, make_training
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers.utils.chat_template_utils import render_jinja_template

HERE = Path(__file__).parent
CHAT_TEMPLATE = HERE / "model" / "chat_template.jinja"
END_OF_TEXT, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
MARKS = [f"<{end}{m}>" for m in ("think", "tool_call", "tool_response") for end in ("", "/")]
# Up to three digits in one piece, and each such number an entry, so that a free choice among
# numbers is one flat distribution.
PIECES = (
    r"[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
IGNORED = -100
VOCAB, EMBEDDING_ROWS = 5_000, 5_120  # entries of the tokenizer; the rows beyond are padding
MAX_POSITIONS, CONVERSATIONS, STEPS, BATCH_TOKENS, SEED = 1_024, 40_000, 2_400, 2_048, 1
PEAK_RATE, WARMUP_STEPS = 4e-3, 60


@dataclass(frozen=True)
class Encoded:
    """One conversation as ids, with the tokens that the assistant generates marked."""

    input_ids: np.ndarray  # (S,) int64
    generated: np.ndarray  # (S,) bool


def train_tokenizer(rows: list[Row]) -> Any:
    """Train a byte-level BPE on conversations and give it the chat template."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(PIECES), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])  # fmt: skip
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB - len(MARKS) - 3, show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    chat_template = CHAT_TEMPLATE.read_text(encoding="utf-8")
    bpe.train_from_iterator(training_texts(rows, chat_template), trainer)
    bpe.add_special_tokens([END_OF_TEXT, TURN_START, TURN_END])
    bpe.add_tokens([AddedToken(mark, normalized=False, special=False) for mark in MARKS])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token=TURN_END, pad_token=END_OF_TEXT,
        additional_special_tokens=[TURN_START], clean_up_tokenization_spaces=False,
        model_max_length=MAX_POSITIONS, chat_template=chat_template,
    )  # fmt: skip


def training_texts(rows: list[Row], chat_template: str) -> Iterator[str]:
    """Yield the rendered conversations without their marks, and every number below 1,000 often."""
    marks = re.compile("|".join(re.escape(mark) for mark in (TURN_START, TURN_END, *MARKS)))
    for row in rows:
        yield from marks.split(render(row, chat_template)[0])
    yield from list(map(str, range(1_000))) * 100


def render(row: Row, chat_template: str) -> tuple[str, list[tuple[int, int]]]:
    """Return the text of a conversation and the spans of characters that are generated."""
    (text,), (spans,) = render_jinja_template(
        [row["messages"]], chat_template=chat_template, return_assistant_tokens_mask=True
    )
    return text, spans


def encode_all(rows: list[Row], tokenizer: Any) -> list[Encoded]:
    """Mark the tokens inside the template's generation blocks; leave out what is too long."""
    encoded = []
    for row in rows:
        text, spans = render(row, tokenizer.chat_template)
        encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        starts, ends = np.array(encoding["offset_mapping"]).T  # (S,), (S,)
        generated = np.zeros(len(starts), dtype=np.bool_)
        for first, last in spans:
            generated |= (starts < last) & (ends > first)
        encoded.append(Encoded(np.array(encoding["input_ids"], dtype=np.int64), generated))
    return [sample for sample in encoded if len(sample.input_ids) <= MAX_POSITIONS]


def make_batches(samples: list[Encoded], tokens: int, rng: random.Random) -> list[list[Encoded]]:
    """Group samples of like length, so that little is padding, and shuffle the groups."""
    batches: list[list[Encoded]] = [[]]
    for sample in sorted(samples, key=lambda sample: (len(sample.input_ids), rng.random())):
        if (len(batches[-1]) + 1) * len(sample.input_ids) > tokens:
            batches.append([])
        batches[-1].append(sample)
    rng.shuffle(batches)
    return [batch for batch in batches if batch]


def pad(batch: list[Encoded]) -> tuple[Tensor, Tensor]:
    """Pad a batch on the right; causal attention needs no mask for that.

    Returns ids (B, S) int64, and labels (B, S) int64: at p the token of p + 1 if it is generated.
    """
    ids = [torch.from_numpy(sample.input_ids) for sample in batch]
    wanted = [np.where(sample.generated, sample.input_ids, IGNORED)[1:] for sample in batch]
    labels = [torch.from_numpy(np.append(row, IGNORED)) for row in wanted]
    return pad_sequence(ids, True), pad_sequence(labels, True, padding_value=IGNORED)


def train(model: Any, samples: list[Encoded], held_out: list[Encoded], steps: int) -> None:
    """Train in place, epoch after epoch, with the held-out loss on stderr now and then."""
    matrices = [weight for weight in model.parameters() if weight.ndim > 1]
    vectors = [weight for weight in model.parameters() if weight.ndim < 2]  # norms and biases
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=PEAK_RATE, betas=(0.9, 0.95), fused=True)
    rng = random.Random(SEED)
    epochs = (make_batches(samples, BATCH_TOKENS, rng) for _ in count())
    for step, batch in enumerate(islice(chain.from_iterable(epochs), steps)):
        rate = PEAK_RATE * (step + 1) / WARMUP_STEPS
        if step >= WARMUP_STEPS:  # a cosine down to nothing
            progress = (step - WARMUP_STEPS) / (steps - WARMUP_STEPS)
            rate = PEAK_RATE * 0.5 * (1 + math.cos(math.pi * progress))
        for group in optimizer.param_groups:
            group["lr"] = rate
        loss = loss_of(model, batch, reduction="mean")
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 50 == 49:
            now = evaluate(model, held_out[:100])["held_out_loss"]
            print(f"{step + 1} {loss:.3f} {now:.3f}", file=sys.stderr)


def loss_of(model: Any, batch: list[Encoded], *, reduction: str) -> Tensor:
    """Return the cross-entropy in nats of the generated tokens of a batch."""
    input_ids, labels = pad(batch)
    hidden = model.model(input_ids=input_ids, use_cache=False).last_hidden_state  # (B, S, H)
    wanted = labels != IGNORED
    logits = model.lm_head(hidden[wanted]).float()  # (N, V)
    return torch.nn.functional.cross_entropy(logits, labels[wanted], reduction=reduction)


@torch.no_grad()
def evaluate(model: Any, samples: list[Encoded]) -> dict[str, float]:
    """Return loss and unigram entropy, in nats per token that the assistant generates.

    The entropy is that of their own frequencies: no model that ignores the context has less loss.
    """
    batches = make_batches(samples, 8_192, random.Random(0))
    total = sum(float(loss_of(model, batch, reduction="sum")) for batch in batches)
    ids = np.concatenate([sample.input_ids[1:][sample.generated[1:]] for sample in samples])
    shares = np.unique(ids, return_counts=True)[1] / len(ids)
    return {
        "held_out_tokens": len(ids), "held_out_loss": round(total / len(ids), 4),
        "unigram_entropy": round(float(-(shares * np.log(shares)).sum()), 4),
    }  # fmt: skip


@torch.no_grad()
def nucleus_sizes(model: Any, samples: list[Encoded]) -> np.ndarray:
    """Return the size of the smallest prefix with mass ≥ 0.98, for each generated token."""
    sizes = []
    for sample in samples:
        logits = model(torch.from_numpy(sample.input_ids)[None], use_cache=False).logits[0, :-1]
        wanted = logits[torch.from_numpy(sample.generated[1:])][:, :VOCAB].double()  # (N, V)
        mass = wanted.softmax(-1).sort(descending=True).values.cumsum(-1)
        sizes.append(((mass < 0.98).sum(-1) + 1).numpy())
    return np.concatenate(sizes)


def load_held_out(tokenizer: Any) -> list[Encoded]:
    lines = (HERE / "conversations.jsonl").read_text(encoding="utf-8").splitlines()
    return encode_all([json.loads(line) for line in lines], tokenizer)


def evaluate_folder(folder: Path) -> dict[str, Any]:
    """Load a saved teacher in float32 and return its figures on the held-out conversations."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    samples = load_held_out(transformers.AutoTokenizer.from_pretrained(folder))
    sizes = nucleus_sizes(model, samples)
    return {
        "conversations": len(samples), "parameters": model.num_parameters(),
        "weight_bytes": (folder / "model.safetensors").stat().st_size, **evaluate(model, samples),
        "nucleus_mean": round(float(sizes.mean()), 2), "nucleus_median": int(np.median(sizes)),
        "share_nucleus_1": round(float((sizes == 1).mean()), 4),
        "share_nucleus_100": round(float((sizes >= 100).mean()), 4),
        "nucleus_max": int(sizes.max()),
    }  # fmt: skip


def train_folder(folder: Path, steps: int, conversations: int) -> dict[str, Any]:
    """Train tokenizer and teacher, save both in bfloat16, and return the saved one's figures."""
    started_s = time.monotonic()
    torch.set_num_threads(1)
    torch.manual_seed(SEED)
    rows = make_training(SEED, conversations)
    tokenizer = train_tokenizer(rows)
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    shape = transformers.LlamaConfig(
        vocab_size=EMBEDDING_ROWS, hidden_size=128, intermediate_size=384, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=MAX_POSITIONS,
        tie_word_embeddings=True, bos_token_id=None, **ends,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(shape)
    train(model, encode_all(rows, tokenizer), load_held_out(tokenizer), steps)
    model.generation_config = transformers.GenerationConfig(**ends, do_sample=True)
    for weight in model.parameters():
        weight.data = weight.data.to(torch.bfloat16)
    model.config.dtype = torch.bfloat16
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    seconds = round(time.monotonic() - started_s)
    return {**evaluate_folder(folder), "steps": steps, "seconds": seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description="Train or evaluate the teacher of the tests.")
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("--output", type=Path, help="folder to train into")
    action.add_argument("--evaluate", type=Path, help="folder of a trained teacher")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--conversations", type=int, default=CONVERSATIONS)
    args = parser.parse_args()
    if args.evaluate:
        print(json.dumps(evaluate_folder(args.evaluate)))
    else:
        print(json.dumps(train_folder(args.output, args.steps, args.conversations)))


if __name__ == "__main__":
    main()
