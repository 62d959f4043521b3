"""Distil the embedded teacher into students a quarter of its size, and compare what they learn.

    conversations ──extract_logits.py──► shards ──LogitIterableDataset──► student ──► held-out KL
                       ours, top-k                 equal steps, seeds, order

Arms: cross-entropy on the text; the k likeliest tokens alone, k for equal bytes; random sampling
with replacement, as many draws as give equal bytes (Anshumann et al. 2025); nucleus and tail under
every `tail`; the dense teacher. Every arm sees the same conversations in the same order, from the
same initial weights. Bytes are those of the shards on disk, without the text's own tokens.

    python tests/distill.py --output demo/distill          # everything; half an hour
    python tests/distill.py --bias                         # bias and deviation of the estimators

Results are kept in the output and not made twice. Ends in one JSON line; the table before it is
what docs/distillation.md shows.
"""

from __future__ import annotations

import argparse
import functools
import json
import multiprocessing
import platform
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
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
    flat_positions,
    load_logit_dataset,
)

TEACHER = HERE / "teacher" / "model"
VOCAB = 5_000  # entries of the tokenizer; the teacher's further rows are padding
DRAW_BYTES = 3  # a distinct token that was drawn: 17 bits of id, 7 of count
Batch = dict[str, Tensor]
Row = dict[str, Any]


@dataclass(frozen=True)
class Setup:
    """Sizes and schedule; the same for every arm."""

    conversations: int = 600
    held_out: int = 150
    steps: int = 1_500
    batch_size: int = 4
    seeds: int = 3
    peak_rate: float = 6e-3
    warmup_steps: int = 40

    def name_run(self, arm: str, seed: int) -> str:
        """Name a student by all that decides what it becomes, so that no other's result is kept."""
        schedule = f"{self.steps}x{self.batch_size}, {self.peak_rate:g}, {self.warmup_steps}"
        return f"{arm}/{seed}/{self.conversations}+{self.held_out}/{schedule}"


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
    rows = (row["teacher_mask"] for row in LogitIterableDataset(folder, seed=None))
    counts = np.concatenate([mask.sum(axis=1) for mask in rows])
    return float(counts.mean())


def extract_all(work: Path, setup: Setup) -> dict[str, Path]:
    """Write the conversations, and the shards of nucleus and tail, and of top-k at equal bytes."""
    work = work / f"{setup.conversations}+{setup.held_out}"
    chats = work / "conversations.jsonl"
    if not chats.is_file():
        work.mkdir(parents=True, exist_ok=True)
        write_jsonl(chats, make_training(3, setup.conversations))
        write_jsonl(work / "held_out.jsonl", make_held_out()[: setup.held_out])
    ours = extract(work / "nucleus_and_tail", chats)
    k = min(round(mean_entries(ours)), 255)
    tried = extract(work / "tried", chats, *top_k_options(k), "--limit", 100)
    fitted = min(max(round(k * teacher_bytes(ours) / teacher_bytes(tried)), 1), 255)
    top_k = extract(work / f"top_{fitted}", chats, *top_k_options(fitted))
    held_out = work / "held_out.jsonl"
    return {
        "ours": ours,
        "top_k": top_k,
        "held_out": extract(work / "held_out", held_out, "--sampled-n", 0, "--top-p-max", 1),
    }


def top_k_options(k: int) -> list[object]:
    """Return the options that store the k likeliest tokens and nothing else."""
    return ["--top-p", 1.0, "--top-p-max", k, "--sampled-n", 0]


# ---------------------------------------------------------------------------------------------
# 2 Models, and the rival: sampling with replacement
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
    flat = hidden.reshape(-1, hidden.shape[-1])[flat_positions(batch)]
    return model.lm_head(flat)[:, :VOCAB].float()


def actual_tokens(batch: Batch) -> Tensor:
    """Return the tokens (N,) that the text holds at the extracted positions."""
    return batch["labels"].reshape(-1)[flat_positions(batch) + 1]


def draws_for_bytes(probs: Tensor, target: float) -> int:
    """Return how many draws from (N, V) probabilities fill `target` bytes a token on average."""
    low, high = 1, 1 << 16
    while high - low > 1:
        middle = (low + high) // 2
        distinct = -torch.expm1(middle * torch.log1p(-probs.clamp(max=1 - 1e-12))).sum(-1).mean()
        low, high = (middle, high) if DRAW_BYTES * float(distinct) <= target else (low, middle)
    return low


def draw_frequencies(probs: Tensor, draws: int, generator: torch.Generator) -> Row:
    """Return the frequencies of draws with replacement from (N, V), as the columns of a row."""
    drawn = torch.multinomial(probs, draws, replacement=True, generator=generator)
    drawn = drawn.sort(-1).values
    first = torch.ones_like(drawn, dtype=torch.bool)
    first[:, 1:] = drawn[:, 1:] != drawn[:, :-1]
    group = first.cumsum(-1) - 1  # (N, draws): which distinct token
    counts = torch.zeros_like(drawn).scatter_add_(1, group, torch.ones_like(drawn))
    ids = torch.zeros_like(drawn).scatter_(1, group, drawn)
    width = int(group.max()) + 1
    counts, ids = counts[:, :width], ids[:, :width]
    return {
        "teacher_ids": ids.numpy(),
        "teacher_log_probs": (counts.clamp(min=1) / draws).log().numpy(),
        "teacher_mask": (counts > 0).numpy(),
        "teacher_tail_mask": np.zeros(ids.shape, np.bool_),
        "teacher_log_rest": np.full(ids.shape[0], -27.0, np.float32),
        "teacher_points": np.zeros(ids.shape[0], np.bool_),
    }


@torch.no_grad()
def store_draws(teacher: LlamaForCausalLM, folder: Path, draws: int) -> dict[int, Row]:
    """Return by conversation what sampling its teacher with replacement would have stored."""
    stored = {}
    for row in LogitIterableDataset(folder, seed=None):
        probs = wanted_logits(teacher, collate_logits([row])).softmax(-1)
        generator = torch.Generator().manual_seed(row["index"])
        stored[row["index"]] = draw_frequencies(probs, draws, generator)
    return stored


@torch.no_grad()
def count_draws(teacher: LlamaForCausalLM, folder: Path) -> int:
    """Return how many draws of 64 conversations' teachers fill as many bytes as an output's."""
    rows = [row for row, _ in zip(LogitIterableDataset(folder), range(64), strict=False)]
    probs = wanted_logits(teacher, collate_logits(rows)).double().softmax(-1)
    return draws_for_bytes(probs, teacher_bytes(folder))


# ---------------------------------------------------------------------------------------------
# 3 Arms
# ---------------------------------------------------------------------------------------------

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
TAIL_OF = {"top-k": "ignore", "top-k, ghost": "ghost", "with replacement": "ignore"}


def arm_loss(arm: str, logits: Tensor, batch: Batch, dense: Tensor | None = None) -> Tensor:
    """Return the training loss of one arm; `dense` is the teacher's logits for the dense one."""
    if arm == "text":
        return torch.nn.functional.cross_entropy(logits, actual_tokens(batch))
    if dense is not None:
        log_p = dense.log_softmax(-1)
        return (log_p.exp() * (log_p - logits.log_softmax(-1))).sum(-1).mean()
    loss: Tensor = distillation_loss(logits, batch, tail=TAIL_OF.get(arm, arm))
    return loss


def iter_batches(
    folder: Path, setup: Setup, seed: int, *, stored: Mapping[int, Row] | None = None
) -> Iterator[Batch]:
    """Yield the batches of as many epochs as the steps take; `stored` replaces their teacher."""

    def collate(rows: list[Row]) -> Batch:
        return collate_logits([{**row, **(stored or {}).get(row["index"], {})} for row in rows])

    dataset: Any = LogitIterableDataset(folder, seed=seed)
    loader = torch.utils.data.DataLoader(dataset, setup.batch_size, collate_fn=collate)
    step = 0
    for epoch in range(setup.steps):
        dataset.set_epoch(epoch)
        for batch in loader:
            yield batch
            step += 1
            if step == setup.steps:
                return


def train(
    arm: str, student: LlamaForCausalLM, batches: Iterator[Batch], setup: Setup, teacher: Any
) -> float:
    """Train a student; return its processor seconds per step, loading included."""
    optimizer = torch.optim.AdamW(student.parameters(), lr=setup.peak_rate, betas=(0.9, 0.95))
    started_s = time.process_time()
    for step, batch in enumerate(batches):
        warm = min(1.0, (step + 1) / setup.warmup_steps)
        rate = setup.peak_rate * warm * 0.5 * (1 + np.cos(np.pi * step / setup.steps))
        optimizer.param_groups[0]["lr"] = rate
        dense = None
        if arm == "dense":
            with torch.no_grad():
                dense = wanted_logits(teacher, batch)
        arm_loss(arm, wanted_logits(student, batch), batch, dense).backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return (time.process_time() - started_s) / setup.steps


# ---------------------------------------------------------------------------------------------
# 4 Evaluation
# ---------------------------------------------------------------------------------------------


@torch.no_grad()
def held_out_logits(teacher: LlamaForCausalLM, folder: Path) -> list[tuple[Batch, Tensor]]:
    """Return batches of held-out conversations with the dense teacher's log-probabilities."""
    rows = list(LogitIterableDataset(folder, seed=None))
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
        "accuracy": float(torch.cat(right).mean()),
    }


def calibration_error(sure: np.ndarray, right: np.ndarray, bins: int = 15) -> float:
    """Return the mean gap between confidence and accuracy, over bins of equal count."""
    order = np.argsort(sure)
    parts = zip(np.array_split(sure[order], bins), np.array_split(right[order], bins), strict=True)
    return float(sum(abs(s.mean() - r.mean()) * s.size for s, r in parts) / sure.size)


# ---------------------------------------------------------------------------------------------
# 5 Run
# ---------------------------------------------------------------------------------------------


@functools.cache
def open_work(work: Path, setup: Setup) -> dict[str, Any]:
    """Return what every arm needs: shards, teacher, held-out distributions, number of draws."""
    torch.set_num_threads(1)
    folders, teacher = extract_all(work, setup), load_teacher()
    return {
        "folders": folders,
        "teacher": teacher,
        "held_out": held_out_logits(teacher, folders["held_out"]),
        "draws": count_draws(teacher, folders["ours"]),
    }


@functools.cache
def stored_draws(work: Path, setup: Setup) -> dict[int, Row]:
    """Return the rival's teacher of every conversation."""
    made = open_work(work, setup)
    return store_draws(made["teacher"], made["folders"]["ours"], made["draws"])


def run_arm(work: Path, setup: Setup, arm: str, seed: int) -> dict[str, float]:
    """Train and evaluate one student."""
    made = open_work(work, setup)
    folder = made["folders"]["top_k" if arm.startswith("top-k") else "ours"]
    stored = stored_draws(work, setup) if arm == "with replacement" else None
    batches = iter_batches(folder, setup, seed, stored=stored)
    student = make_student(made["teacher"], seed)
    step_s = train(arm, student, batches, setup, made["teacher"])
    return {**evaluate(student, made["held_out"]), "step_s": step_s}


def run(work: Path, setup: Setup, arms: Sequence[str], jobs: int) -> dict[str, Any]:
    """Train and evaluate every arm with every seed, several at a time; what is there is kept."""
    made = open_work(work, setup)
    kept = work / "results.json"
    results: dict[str, dict[str, float]] = json.loads(kept.read_text()) if kept.is_file() else {}
    pairs = [(arm, seed) for seed in range(setup.seeds) for arm in arms]
    wanted = [pair for pair in pairs if setup.name_run(*pair) not in results]
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=jobs, mp_context=spawn) as pool:
        running = {
            pool.submit(run_arm, work, setup, *pair): setup.name_run(*pair) for pair in wanted
        }
        for done in as_completed(running):
            results[running[done]] = done.result()
            kept.write_text(json.dumps(results))
            print(running[done], results[running[done]], file=sys.stderr)
    sizes = {name: teacher_bytes(made["folders"][name]) for name in ("ours", "top_k")}
    student = make_student(made["teacher"], 0)
    return {
        "arms": {arm: summarize(arm, results, setup, sizes) for arm in arms},
        "teacher": evaluate(made["teacher"], made["held_out"]),
        "student_share": student.num_parameters() / made["teacher"].num_parameters(),
        "k": int(made["folders"]["top_k"].name.removeprefix("top_")),
        "draws": made["draws"],
        **vars(setup),
        "machine": platform.machine(),
    }


def summarize(
    arm: str, results: Mapping[str, Mapping[str, float]], setup: Setup, sizes: Mapping[str, float]
) -> dict[str, Any]:
    """Return mean and standard deviation over the seeds of every figure of an arm."""
    rows = [results[setup.name_run(arm, seed)] for seed in range(setup.seeds)]
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


# ---------------------------------------------------------------------------------------------
# 6 Tables and picture
# ---------------------------------------------------------------------------------------------

FIGURES = {"kl": "held-out KL", "loss": "held-out loss", "calibration_error": "calibration error"}


def print_table(report: Mapping[str, Any]) -> None:
    """Print the comparison as Markdown."""
    print(f"| trained on | bytes/token | {' | '.join(FIGURES.values())} | s/step |")
    print("|---|---|---|---|---|---|")
    for arm, figures in report["arms"].items():
        cells = [f"{figures[name][0]:.4f} ± {figures[name][1]:.4f}" for name in FIGURES]
        size = f"{figures['bytes_per_token']:,.0f}"
        print(f"| {ARMS[arm]} | {size} | {' | '.join(cells)} | {figures['step_s'][0]:.3f} |")
    cells = [f"{report['teacher'][name]:.4f}" for name in FIGURES]
    print(f"| (the teacher itself) | | {' | '.join(cells)} | |")


def print_distance(report: Mapping[str, Any]) -> None:
    """Print how much of the way from the text alone to the dense teacher each arm goes."""
    arms = report["arms"]
    start, end = arms["text"]["kl"][0], arms["dense"]["kl"][0]
    for arm in arms:
        share = (start - arms[arm]["kl"][0]) / (start - end)
        part = arms[arm]["bytes_per_token"] / arms["dense"]["bytes_per_token"]
        print(f"{ARMS[arm]}: {share:.0%} of the way in held-out KL, {part:.2%} of the bytes")


def draw(report: Mapping[str, Any], path: Path) -> None:
    """Draw held-out KL, loss and calibration error of every arm."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    arms = list(report["arms"])[::-1]
    colours = ["#4269d0" if arm == "unbiased" else "#9aa5b1" for arm in arms]
    figure, panels = pyplot.subplots(1, 3, figsize=(11, 3.6), sharey=True)
    titles = ("KL from the teacher", "loss on the text", "calibration error")
    units = ("nats per held-out token", "nats per held-out token", "probability")
    for axes, name, title, unit in zip(panels, FIGURES, titles, units, strict=True):
        means, errors = zip(*(report["arms"][arm][name] for arm in arms), strict=True)
        axes.errorbar(means, range(len(arms)), xerr=errors, fmt="none", ecolor="#444", capsize=3)
        axes.scatter(means, range(len(arms)), c=colours, s=45, zorder=3)
        axes.set(xlabel=unit, title=title)
        axes.set_yticks(range(len(arms)), [ARMS[arm] for arm in arms])
        axes.locator_params(axis="x", nbins=3)
        axes.grid(axis="x", color="#ddd")
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=90)


def print_bias(draws: int) -> None:
    """Print bias and deviation of every estimator as Markdown."""
    from sparse_batches import ROWS, estimate, estimate_with_replacement, make_batch, teacher_row

    print("| row | divergence | tail | true | bias | deviation | gradient: bias | deviation |")
    print("|---|---|---|---|---|---|---|---|")
    for kind in ROWS:
        batch = make_batch(teacher_row(kind, 1_000).repeat(draws, 1))
        found = {
            (divergence, tail): estimate(kind, divergence, tail, draws=draws, batch=batch)
            for divergence in ("forward_kl", "jsd", "reverse_kl")
            for tail in ("unbiased", "renormalized", "ghost", "ignore")
        }
        entries = float(batch["teacher_mask"].sum() / draws)
        for drawn in (24, draws_of(teacher_row(kind, 1_000), entries)):
            name = f"{drawn} draws with replacement"
            found["forward_kl", name] = estimate_with_replacement(kind, drawn, repeats=draws)
        for (divergence, tail), made in found.items():
            error = 1.96 * made.deviation / draws**0.5
            print(
                f"| {kind} | {divergence} | {tail} | {made.true:.4f} | "
                f"{made.bias:+.5f} ± {error:.5f} | {made.deviation:.5f} | "
                f"{made.gradient_bias:.1%} | {made.gradient_deviation:.1%} |"
            )


def draws_of(teacher: Tensor, entries: float) -> int:
    """Return how many draws take the bytes of so many entries: 4.25 each and 25 for the token."""
    return draws_for_bytes(teacher[None].double().softmax(-1), 4.25 * entries + 25)


def main() -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=ROOT / "demo" / "distill")
    parser.add_argument("--picture", type=Path, help="where to draw it (extra viz)")
    parser.add_argument("--arms", nargs="*", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--jobs", type=int, default=2, help="students trained at a time")
    for name, value in vars(Setup()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    parser.add_argument("--bias", action="store_true", help="the estimators' table, no training")
    parser.add_argument("--draws", type=int, default=2_000, help="tails for --bias")
    args = parser.parse_args()
    if args.bias:
        print_bias(args.draws)
        return
    setup = Setup(**{name: getattr(args, name) for name in vars(Setup())})
    report = run(args.output, setup, args.arms, args.jobs)
    print_table(report)
    if {"text", "dense"} <= set(args.arms):
        print_distance(report)
    if args.picture:
        draw(report, args.picture)
    print(json.dumps(report))


if __name__ == "__main__":
    main()
