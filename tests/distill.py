"""Distil the embedded teacher into students a quarter of its size, and compare what they learn.

    conversations ──extract_logits.py──► shards ──LogitIterableDataset──► student ──► held-out KL
                       ours, top-k                 equal steps, seeds, order

Arms: cross-entropy on the text; the k likeliest tokens alone, k for equal bytes; random sampling
with replacement, as many draws as give equal bytes (Anshumann et al. 2025); nucleus and tail under
every `tail`; the dense teacher. Every arm sees the same conversations in the same order, from the
same initial weights. Bytes are those of the shards on disk, without the text's own tokens.

    python tests/distill.py --output demo/distill          # everything; a quarter of an hour
    python tests/distill.py --bias                         # bias and deviation of the estimators

Ends in one JSON line; the table before it is what docs/distillation.md shows.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path[:0] = [str(ROOT), str(HERE), str(HERE / "teacher")]

from make_conversations import make_held_out, make_training, write_jsonl  # noqa: E402
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM  # noqa: E402

from explore_logits import (  # noqa: E402 - run as a script, from anywhere
    LogitIterableDataset,
    collate_logits,
    compute_bytes_per_token_stats,
    distillation_loss,
    load_logit_dataset,
)

TEACHER = HERE / "teacher" / "model"
VOCAB = 5_000  # entries of the tokenizer; the teacher's further rows are padding
Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Setup:
    """Sizes and schedule; the same for every arm."""

    conversations: int = 600
    held_out: int = 200
    steps: int = 150
    batch_size: int = 8
    seeds: int = 3
    peak_rate: float = 6e-3
    warmup_steps: int = 20


# ---------------------------------------------------------------------------------------------
# 1 Shards
# ---------------------------------------------------------------------------------------------


def extract(folder: Path, chats: Path, *options: object) -> Path:
    """Run the extraction as a user would, unless its output is there already."""
    if not (folder / "checkpoint.json").is_file():
        command: list[object] = [sys.executable, ROOT / "extract_logits.py", "--model", TEACHER]
        command += ["--dataset", chats, "--index-col", "id", "--store-tokens"]
        command += ["--upload-every", 300, "--cache-dir", folder.parent / "cache"]
        command += ["--output", folder.absolute(), *options]
        subprocess.run(list(map(str, command)), check=True, stdout=subprocess.DEVNULL)
    return folder


def teacher_bytes(folder: Path) -> float:
    """Return bytes per token on disk, without the columns that hold the text."""
    stats = compute_bytes_per_token_stats(load_logit_dataset(folder))
    text = sum(stats.column_bytes.get(name, 0) for name in ("input_ids", "token_positions"))
    return (stats.total_bytes - text) / stats.tokens


def mean_entries(folder: Path) -> float:
    """Return how many entries a token has on average, nucleus and tail."""
    rows = (row["teacher_mask"] for row in LogitIterableDataset(folder, seed=None, weigh=False))
    counts = np.concatenate([mask.sum(axis=1) for mask in rows])
    return float(counts.mean())


def extract_all(work: Path, setup: Setup) -> dict[str, Path]:
    """Write the conversations, and the shards of nucleus and tail, and of top-k at equal bytes."""
    chats = work / "conversations.jsonl"
    if not chats.is_file():
        work.mkdir(parents=True, exist_ok=True)
        write_jsonl(chats, make_training(3, setup.conversations))
    ours = extract(work / "nucleus_and_tail", chats)
    k = min(round(mean_entries(ours)), 255)
    first = teacher_bytes(extract(work / f"top_{k}", chats, *top_k_options(k)))
    fitted = min(max(round(k * teacher_bytes(ours) / first), 1), 255)
    return {"ours": ours, "top_k": extract(work / f"top_{fitted}", chats, *top_k_options(fitted))}


def top_k_options(k: int) -> list[object]:
    """Return the options that store the k likeliest tokens and nothing else."""
    return ["--top-p", 1.0, "--top-p-max", k, "--sampled-n", 0]


# ---------------------------------------------------------------------------------------------
# 2 Arms
# ---------------------------------------------------------------------------------------------


def load_teacher() -> LlamaForCausalLM:
    """Load the embedded teacher in float32."""
    teacher: LlamaForCausalLM = AutoModelForCausalLM.from_pretrained(TEACHER, dtype=torch.float32)
    return teacher.eval()


def make_student(teacher: LlamaForCausalLM, seed: int) -> LlamaForCausalLM:
    """Make an untrained Llama with a quarter of the teacher's weights."""
    torch.manual_seed(seed)
    shape = LlamaConfig(
        vocab_size=teacher.config.vocab_size,
        hidden_size=56,
        intermediate_size=160,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=1_024,
        tie_word_embeddings=True,
        pad_token_id=teacher.config.pad_token_id,
        eos_token_id=teacher.config.eos_token_id,
        bos_token_id=None,
    )
    return LlamaForCausalLM(shape)


def wanted_logits(model: LlamaForCausalLM, batch: Batch) -> Tensor:
    """Return float32 logits (N, V) at the extracted positions, for the tokenizer's entries."""
    hidden = model.model(input_ids=batch["input_ids"], use_cache=False).last_hidden_state
    flat = hidden.reshape(-1, hidden.shape[-1])[batch["teacher_positions"]]
    return model.lm_head(flat)[:, :VOCAB].float()


def actual_tokens(batch: Batch) -> Tensor:
    """Return the tokens (N,) that the text holds at the extracted positions."""
    return batch["labels"].reshape(-1)[batch["teacher_positions"] + 1]


def sample_with_replacement(logits: Tensor, draws: int, batch: Batch) -> Batch:
    """Return a batch whose teacher is the frequencies of draws from the dense one.

    A conversation's draws are the same whenever it comes, as if they had been stored.
    """
    generator = torch.Generator().manual_seed(int(batch["index"].sum()))
    drawn = torch.multinomial(logits.softmax(-1), draws, replacement=True, generator=generator)
    drawn = drawn.sort(-1).values
    first = torch.ones_like(drawn, dtype=torch.bool)
    first[:, 1:] = drawn[:, 1:] != drawn[:, :-1]
    group = first.cumsum(-1) - 1  # (N, draws): which distinct token
    counts = torch.zeros_like(drawn).scatter_add_(1, group, torch.ones_like(drawn))
    ids = torch.zeros_like(drawn).scatter_(1, group, drawn)
    width = int(group.max()) + 1
    counts, ids = counts[:, :width], ids[:, :width]
    there = counts > 0
    return {
        "teacher_positions": batch["teacher_positions"],
        "teacher_ids": ids,
        "teacher_log_probs": (counts.clamp(min=1) / draws).log(),
        "teacher_log_weights": torch.zeros(ids.shape),
        "teacher_mask": there,
        "teacher_tail_mask": torch.zeros_like(there),
        "teacher_log_rest": torch.full((ids.shape[0],), -27.0),
    }


def draws_for_bytes(teacher: LlamaForCausalLM, folder: Path, target: float) -> int:
    """Return how many draws with replacement fill as many bytes, at 3 for each distinct token."""
    rows = list(LogitIterableDataset(folder, seed=0, weigh=False))[:64]
    with torch.no_grad():
        probs = wanted_logits(teacher, collate_logits(rows)).double().softmax(-1)
    low, high = 1, 1 << 16
    while high - low > 1:
        middle = (low + high) // 2
        distinct = -torch.expm1(middle * torch.log1p(-probs.clamp(max=1 - 1e-12))).sum(-1).mean()
        low, high = (middle, high) if 3 * float(distinct) <= target else (low, middle)
    return low


ARMS = {
    "text": "cross-entropy on the text",
    "top-k": "top-k alone",
    "top-k, ghost": "top-k and a ghost token",
    "with replacement": "sampled with replacement",
    "ignore": "nucleus, tail ignored",
    "ghost": "nucleus and a ghost token",
    "renormalized": "nucleus and tail, renormalized",
    "unbiased": "nucleus and tail, unbiased",
    "dense": "the dense teacher",
}


def arm_loss(arm: str, logits: Tensor, batch: Batch, dense: Tensor | None, draws: int) -> Tensor:
    """Return the training loss of one arm."""
    if arm == "text":
        return torch.nn.functional.cross_entropy(logits, actual_tokens(batch))
    if arm == "dense":
        assert dense is not None
        log_p = dense.log_softmax(-1)
        return (log_p.exp() * (log_p - logits.log_softmax(-1))).sum(-1).mean()
    if arm == "with replacement":
        assert dense is not None
        batch, tail = sample_with_replacement(dense, draws, batch), "ignore"
    elif arm.startswith("top-k"):
        tail = "ghost" if arm.endswith("ghost") else "ignore"
    else:
        tail = arm
    loss: Tensor = distillation_loss(logits, batch, tail=tail)
    return loss


def iter_batches(folder: Path, setup: Setup, seed: int) -> Iterator[Batch]:
    """Yield the batches of as many epochs as the steps take."""
    dataset: Any = LogitIterableDataset(folder, seed=seed)
    step = 0
    for epoch in range(setup.steps):
        dataset.set_epoch(epoch)
        loader = torch.utils.data.DataLoader(
            dataset, batch_size=setup.batch_size, collate_fn=collate_logits
        )
        for batch in loader:
            yield batch
            step += 1
            if step == setup.steps:
                return


def train(
    arm: str, folder: Path, teacher: LlamaForCausalLM, setup: Setup, *, seed: int, draws: int
) -> tuple[LlamaForCausalLM, float]:
    """Train a student; return it and its processor seconds per step, loading included."""
    student = make_student(teacher, seed)
    optimizer = torch.optim.AdamW(student.parameters(), lr=setup.peak_rate, betas=(0.9, 0.95))
    started_s = time.process_time()
    for step, batch in enumerate(iter_batches(folder, setup, seed)):
        warm = min(1.0, (step + 1) / setup.warmup_steps)
        rate = setup.peak_rate * warm * 0.5 * (1 + np.cos(np.pi * step / setup.steps))
        optimizer.param_groups[0]["lr"] = rate
        dense = None
        if arm in ("dense", "with replacement"):
            with torch.no_grad():
                dense = wanted_logits(teacher, batch)
        loss = arm_loss(arm, wanted_logits(student, batch), batch, dense, draws)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return student, (time.process_time() - started_s) / setup.steps


# ---------------------------------------------------------------------------------------------
# 3 Evaluation
# ---------------------------------------------------------------------------------------------


@torch.no_grad()
def held_out_logits(
    teacher: LlamaForCausalLM, work: Path, setup: Setup
) -> list[tuple[Batch, Tensor]]:
    """Return batches of held-out conversations with the dense teacher's log-probabilities."""
    chats = work / "held_out.jsonl"
    write_jsonl(chats, make_held_out()[: setup.held_out])
    folder = extract(work / "held_out", chats, "--sampled-n", 0, "--top-p-max", 1)
    rows = list(LogitIterableDataset(folder, seed=None, weigh=False))
    batches = [collate_logits(rows[i : i + 16]) for i in range(0, len(rows), 16)]
    return [(batch, wanted_logits(teacher, batch).log_softmax(-1)) for batch in batches]


@torch.no_grad()
def evaluate(model: LlamaForCausalLM, held_out: Sequence[tuple[Batch, Tensor]]) -> dict[str, float]:
    """Return held-out KL from the teacher, loss on the text, and calibration error."""
    kl, loss, sure, right = [], [], [], []
    for batch, log_p in held_out:
        log_q = wanted_logits(model, batch).log_softmax(-1)
        actual = actual_tokens(batch)
        kl.append((log_p.exp() * (log_p - log_q)).sum(-1))
        loss.append(-log_q.gather(1, actual[:, None])[:, 0])
        top = log_q.max(-1)
        sure.append(top.values.exp())
        right.append((top.indices == actual).float())
    return {
        "kl": float(torch.cat(kl).mean()),
        "loss": float(torch.cat(loss).mean()),
        "calibration_error": calibration_error(torch.cat(sure).numpy(), torch.cat(right).numpy()),
        "agreement": float(torch.cat(right).mean()),
    }


def calibration_error(sure: np.ndarray, right: np.ndarray, bins: int = 15) -> float:
    """Return the mean gap between confidence and accuracy, over bins of equal count."""
    order = np.argsort(sure)
    parts = zip(np.array_split(sure[order], bins), np.array_split(right[order], bins), strict=True)
    return float(sum(abs(s.mean() - r.mean()) * s.size for s, r in parts) / sure.size)


# ---------------------------------------------------------------------------------------------
# 4 Run, table, picture
# ---------------------------------------------------------------------------------------------


def run(work: Path, setup: Setup, arms: Sequence[str]) -> dict[str, Any]:
    """Train and evaluate every arm with every seed; results are kept and not made twice."""
    torch.set_num_threads(1)
    teacher = load_teacher()
    folders = extract_all(work, setup)
    sizes = {name: teacher_bytes(folder) for name, folder in folders.items()}
    draws = draws_for_bytes(teacher, folders["ours"], sizes["ours"])
    held_out = held_out_logits(teacher, work, setup)
    kept = work / "results.json"
    results: dict[str, dict[str, float]] = json.loads(kept.read_text()) if kept.is_file() else {}
    for seed in range(setup.seeds):
        for arm in arms:
            name = f"{arm}/{seed}"
            if name in results:
                continue
            folder = folders["top_k" if arm.startswith("top-k") else "ours"]
            student, step_s = train(arm, folder, teacher, setup, seed=seed, draws=draws)
            results[name] = {**evaluate(student, held_out), "step_s": step_s}
            kept.write_text(json.dumps(results))
            print(name, {k: round(v, 4) for k, v in results[name].items()}, file=sys.stderr)
    weights = make_student(teacher, 0).num_parameters() / teacher.num_parameters()
    return {
        "arms": {arm: summarize(arm, results, setup, sizes) for arm in arms},
        "teacher": evaluate(teacher, held_out),
        "student_share": weights,
        "k": int(folders["top_k"].name.removeprefix("top_")),
        "draws": draws,
        "bytes_per_token": sizes,
        **vars(setup),
        "machine": platform.machine(),
    }


def summarize(
    arm: str, results: Mapping[str, Mapping[str, float]], setup: Setup, sizes: Mapping[str, float]
) -> dict[str, Any]:
    """Return mean and standard deviation over the seeds of every figure of an arm."""
    rows = [results[f"{arm}/{seed}"] for seed in range(setup.seeds)]
    figures: dict[str, Any] = {
        name: [float(np.mean([row[name] for row in rows])), deviation([row[name] for row in rows])]
        for name in rows[0]
    }
    fixed = {"text": 0.0, "dense": 4.0 * VOCAB}
    shards = sizes["top_k" if arm.startswith("top-k") else "ours"]
    figures["bytes_per_token"] = fixed.get(arm, shards)
    return figures


def deviation(values: Sequence[float]) -> float:
    """Return the sample standard deviation, 0 for a single value."""
    return float(np.std(values, ddof=1)) if len(values) > 1 else 0.0


def print_table(report: Mapping[str, Any]) -> None:
    """Print the comparison as Markdown."""
    print("| trained on | bytes/token | held-out KL | held-out loss | calibration error | s/step |")
    print("|---|---|---|---|---|---|")
    for arm, figures in report["arms"].items():
        cells = [
            f"{figures[name][0]:.4f} ± {figures[name][1]:.4f}"
            for name in ("kl", "loss", "calibration_error")
        ]
        size = f"{figures['bytes_per_token']:,.0f}"
        print(f"| {ARMS[arm]} | {size} | {' | '.join(cells)} | {figures['step_s'][0]:.3f} |")


def print_distance(report: Mapping[str, Any]) -> None:
    """Print how much of the way from the text alone to the dense teacher each arm goes."""
    arms = report["arms"]
    start, end = arms["text"]["kl"][0], arms["dense"]["kl"][0]
    for arm in arms:
        share = (start - arms[arm]["kl"][0]) / (start - end)
        part = arms[arm]["bytes_per_token"] / arms["dense"]["bytes_per_token"]
        print(f"{ARMS[arm]}: {share:.0%} of the way in held-out KL, {part:.2%} of the bytes")


def draw(report: Mapping[str, Any], path: Path) -> None:
    """Draw held-out KL and loss of every arm."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    arms = list(report["arms"])[::-1]
    figure, panels = pyplot.subplots(1, 2, figsize=(9, 3.6), sharey=True)
    for axes, name, title in zip(
        panels, ("kl", "loss"), ("KL from the teacher", "loss on the text"), strict=True
    ):
        pairs = [report["arms"][arm][name] for arm in arms]
        colours = ["#4269d0" if arm == "unbiased" else "#9aa5b1" for arm in arms]
        axes.barh(
            range(len(arms)), [p[0] for p in pairs], xerr=[p[1] for p in pairs], color=colours
        )
        low = min(p[0] for p in pairs)
        axes.set_xlim(left=0.8 * low)
        axes.set(xlabel="nats per held-out token", title=title)
        axes.set_yticks(range(len(arms)), [ARMS[arm] for arm in arms])
    figure.tight_layout()
    figure.savefig(path, dpi=90)


def print_bias(draws: int) -> None:
    """Print bias and deviation of every estimator as Markdown."""
    from sparse_batches import ROWS, estimate, make_batch, teacher_row

    print("| row | divergence | tail | true | bias | deviation | gradient off by |")
    print("|---|---|---|---|---|---|---|")
    for kind in ROWS:
        batch = make_batch(teacher_row(kind, 1_000).repeat(draws, 1))
        for divergence in ("forward_kl", "jsd", "reverse_kl"):
            for tail in ("unbiased", "renormalized", "ghost", "ignore"):
                found = estimate(kind, divergence, tail, draws=draws, batch=batch)
                error = 1.96 * found.deviation / draws**0.5
                print(
                    f"| {kind} | {divergence} | {tail} | {found.true:.4f} | "
                    f"{found.bias:+.5f} ± {error:.5f} | {found.deviation:.5f} | "
                    f"{found.gradient_bias:.1%} |"
                )


def main() -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=ROOT / "demo" / "distill")
    parser.add_argument("--picture", type=Path, help="where to draw it (extra viz)")
    parser.add_argument("--arms", nargs="*", default=list(ARMS), choices=list(ARMS))
    for name, value in vars(Setup()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    parser.add_argument("--bias", action="store_true", help="the estimators' table, no training")
    parser.add_argument("--draws", type=int, default=4_000, help="tails for --bias")
    args = parser.parse_args()
    if args.bias:
        print_bias(args.draws)
        return
    setup = Setup(**{name: getattr(args, name) for name in vars(Setup())})
    report = run(args.output, setup, args.arms)
    print_table(report)
    if {"text", "dense"} <= set(args.arms):
        print_distance(report)
    if args.picture:
        args.picture.parent.mkdir(parents=True, exist_ok=True)
        draw(report, args.picture)
    print(json.dumps(report))


if __name__ == "__main__":
    main()
