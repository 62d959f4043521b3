"""What a student learns from what is kept of its teacher, against the bytes that keeping it takes.

    conversations ─► teacher's distributions p, once ─► kept, read back ─► p' ─► student ─► held-out
                                                      (an arm)                              KL

    python tests/tools/frontier.py --picture docs/images/frontier.png     # a quarter of an hour
    python tests/tools/frontier.py --teacher FOLDER --chats FILE …        # another teacher, a Llama

Every arm is an estimate p' of p. The gradient of the forward KL in a student's logits is then
q Σp' - p', so that one loop trains them all; a test compares it with `distillation_loss`. A seed
decides conversations, their order and what is drawn of p; all arms share conversations, order and
the student that they begin with. What the columns are: docs/distillation.md. Results are kept in
`--output` and not made twice. Ends in one JSON line.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from functools import cache, cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import scipy.sparse
import torch
from bench import CHATS, ROOT, TEACHER, print_head, print_row
from storage_table import Rows, Scheme, estimate, plain_size, store, teacher_rows
from torch import Tensor
from transformers import AutoModelForCausalLM

from explore_logits import decode_rows

sys.path.append(str(TEACHER.parent))
from make_conversations import make_training, write_jsonl

FIRST_SEED = 1000  # of the conversations; the teacher was trained on those of another
Figures = dict[str, float]
Told = Callable[[np.ndarray], Tensor]  # tokens to what an arm tells of them, (n, V)


@dataclass(frozen=True)
class Arm:
    """What a student is told of its teacher; neither scheme nor draws: the teacher itself."""

    name: str
    scheme: Scheme | None = None
    draws: int = 0
    systematic: bool = False  # draws at equal distances instead of independent ones
    ghost: bool = False  # what is not kept is one token; else it is left out
    text: bool = False


ARMS = (
    Arm("text", text=True),
    Arm("dense"),
    Arm("100 + 24, 16 bits", Scheme()),
    Arm("100 + 24, 8 bits", Scheme(bits=8)),
    Arm("32 + 24, 8 bits", Scheme(top_p_max=32, bits=8)),
    Arm("100 + 8, 8 bits", Scheme(sampled_n=8, bits=8)),
    *(Arm(f"min-p {t:g}", Scheme(min_p=t, bits=8)) for t in (0.005, 0.01, 0.02, 0.05)),
    *(Arm(f"top {k}{how}", Scheme(1.0, k, 0, 8), ghost=bool(how))
      for k in (16, 64) for how in ("", ", ghost")),
    *(Arm(f"{n} draws", draws=n) for n in (12, 50)),
    *(Arm(f"{n} points", draws=n, systematic=True) for n in (50, 100, 200)),
)  # fmt: skip


@dataclass(frozen=True)
class Setup:
    """Sizes and schedule; the same for every arm."""

    conversations: int = 100
    held_out: int = 80
    epochs: int = 2
    batch: int = 4
    rate: float = 2e-3
    warmup: int = 10
    layers: int = 2  # of the student


# What is kept of a teacher ------------------------------------------------------------------------


def hit(source: Rows, draws: int, seed: int, *, systematic: bool) -> scipy.sparse.csr_array:
    """Return how often draws from the whole distributions hit each token, (N, V)."""
    rng, parts = np.random.default_rng(seed), []
    for tokens in source.slices():
        sums = source.probabilities(tokens).cumsum(1)
        shape = (len(sums), draws)
        at = rng.random(shape)
        if systematic:  # one number a token shifts them all
            at = (at[:, :1] + np.arange(draws)) / draws
        at *= sums[:, -1:]
        ids = torch.searchsorted(torch.from_numpy(sums), torch.from_numpy(at), right=True)
        place = (np.repeat(np.arange(shape[0]), draws), ids.numpy().reshape(-1))
        hits = scipy.sparse.coo_array((np.ones(ids.numel()), place), shape=sums.shape)
        parts.append(hits.tocsr())  # adds up what was hit more than once
    return scipy.sparse.vstack(parts, format="csr")


def hit_bytes(hits: scipy.sparse.csr_array, source: Rows) -> int:
    """Return the size of ids and hits in a Parquet file of the rows' conversations."""
    assert hits.shape[1] <= 1 << 16, "more ids than 16 bits hold"
    columns = {"index": pa.array([row.index for row in source.rows], pa.int32())}
    of_hits, of_tokens = hits.indptr[source.starts], source.starts
    for name, starts, values in (
        ("ids", of_hits, hits.indices.astype(np.uint16)),
        ("hits", of_hits, hits.data.astype(np.uint8)),
        ("counts", of_tokens, np.diff(hits.indptr).astype(np.uint8)),
    ):
        columns[name] = pa.ListArray.from_arrays(starts.astype(np.int32), values)
    return plain_size(pa.table(columns), compression="zstd", compression_level=2)


def keep(source: Rows, arm: Arm, seed: int) -> tuple[Told, float]:
    """Return what an arm tells of tokens, and bytes a token."""
    count, vocab = source.logits.shape
    if arm.scheme is not None:
        table, size = store(source, arm.scheme, seed)
        kept = estimate(decode_rows(table), vocab)
    elif arm.draws:
        hits = hit(source, arm.draws, seed, systematic=arm.systematic)
        kept, size = hits / arm.draws, hit_bytes(hits, source)
    elif arm.text:
        place, size = (np.arange(count), source.actual), 0
        kept = scipy.sparse.coo_array((np.ones(count), place), shape=(count, vocab)).tocsr()
    else:
        return lambda tokens: source.logits[tokens].softmax(-1), 4.0 * vocab
    return lambda tokens: torch.from_numpy(kept[tokens].toarray().astype(np.float32)), size / count


def slope(logits: Tensor, told: Tensor, *, ghost: bool = False) -> Tensor:
    """Return the gradient (n, V) of the forward KL, summed over tokens, in a student's logits."""
    q, total = logits.softmax(-1), told.sum(-1, keepdim=True)
    if not ghost:
        return q * total - told
    outside = told == 0
    rest = (1 - total).clamp(min=0)  # rounding may bring it below
    q_rest = (q * outside).sum(-1, keepdim=True).clamp(min=1e-30)
    return q * (total + rest) - torch.where(outside, rest * q / q_rest, told)


# Students -----------------------------------------------------------------------------------------


def load_student(teacher: Path, layers: int) -> Any:
    """Load some layers of a teacher, at equal distances and the first and last among them."""
    model = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32)
    every = model.model.layers
    kept = np.linspace(0, len(every) - 1, layers).round().astype(int)
    model.model.layers = torch.nn.ModuleList([every[i] for i in kept])
    return model.train()  # it has no dropout


def predict(student: Any, source: Rows, chosen: Sequence[int]) -> tuple[Tensor, Tensor, np.ndarray]:
    """Return what the head is given and says of some conversations' tokens, and their numbers.

    The conversations stand one after the other in one sequence, which Llama keeps apart.
    """
    rows = [source.rows[i] for i in chosen]
    starts = np.cumsum([0] + [row.input_ids.size for row in rows])
    places = [s + row.token_positions - 1 for s, row in zip(starts[:-1], rows, strict=True)]
    ids = torch.from_numpy(np.concatenate([row.input_ids for row in rows]).astype(np.int64))
    positions = torch.cat([torch.arange(row.input_ids.size) for row in rows])
    inputs = {"input_ids": ids[None], "position_ids": positions[None]}
    states = student.model(**inputs, use_cache=False).last_hidden_state[0][np.concatenate(places)]
    logits = states @ student.lm_head.weight[: source.logits.shape[1]].T
    return states, logits, source.tokens_of(chosen)


def iter_batches(source: Rows, setup: Setup, seed: int) -> Iterator[Sequence[int]]:
    rng = np.random.default_rng(seed)
    for _ in range(setup.epochs):
        order = rng.permutation(len(source.rows))
        yield from np.array_split(order, max(len(order) // setup.batch, 1))


def train(begun: Any, source: Rows, told: Told, arm: Arm, setup: Setup, seed: int) -> Any:
    """Train a copy of a student on what an arm tells."""
    student = copy.deepcopy(begun)
    optimizer = torch.optim.AdamW(student.parameters(), setup.rate, betas=(0.9, 0.95), fused=True)
    batches = list(iter_batches(source, setup, seed))
    for step, chosen in enumerate(batches):
        warm = min(1.0, (step + 1) / setup.warmup)
        rate = setup.rate * warm * 0.5 * (1 + np.cos(np.pi * step / len(batches)))
        optimizer.param_groups[0]["lr"] = rate
        _, logits, tokens = predict(student, source, chosen)
        logits.backward(slope(logits.detach(), told(tokens), ghost=arm.ghost) / len(tokens))
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return student


@torch.no_grad()
def evaluate(student: Any, held_out: Rows) -> Figures:
    """Return held-out KL from the teacher, and loss on the text's rarest tenth."""
    actual = torch.from_numpy(held_out.actual.astype(np.int64))
    expected, kl, loss = 0.0, [], []
    for chosen in np.array_split(np.arange(len(held_out.rows)), max(len(held_out.rows) // 8, 1)):
        _, logits, tokens = predict(student, held_out, chosen)
        log_q, log_p = logits.log_softmax(-1), held_out.logits[tokens].log_softmax(-1)
        kl.append((log_p.exp() * (log_p - log_q)).sum(-1))
        loss.append(-log_q.gather(1, actual[tokens, None])[:, 0])
        expected = expected + log_p.exp().sum(0)
    rare = expected[actual].argsort(stable=True)[: max(len(actual) // 10, 1)]
    return {"kl": float(torch.cat(kl).mean()), "rare": float(torch.cat(loss)[rare].mean())}


@torch.no_grad()
def gradient_errors(student: Any, source: Rows, told: Told, arm: Arm, setup: Setup) -> Figures:
    """Return how far the head's gradients are from the dense teacher's before the first step."""
    off, own, true = (torch.zeros(source.logits.shape[1]) for _ in range(3))  # squares by row
    for chosen in itertools.islice(iter_batches(source, setup, 0), 6):
        states, logits, tokens = predict(student, source, chosen)
        right = slope(logits, source.logits[tokens].softmax(-1)).T @ states
        found = slope(logits, told(tokens), ghost=arm.ghost).T @ states
        for sums, values in ((off, found - right), (own, found), (true, right)):
            sums += values.square().sum(-1)
    return {
        "gradient": float((off.sum() / true.sum()).sqrt()),
        "by_row": float((off / own.clamp(min=1e-30)).mean().sqrt()),
    }


# Run ----------------------------------------------------------------------------------------------


class Texts:
    """A teacher's rows: of every seed, and held out."""

    def __init__(self, teacher: Path, setup: Setup, folder: Path, chats: Any = None) -> None:
        self.teacher, self.setup, self.folder = teacher, setup, folder
        folder.mkdir(parents=True, exist_ok=True)
        self.every: Rows | None = None  # None: rows that are made like the embedded ones
        if chats is not None:
            self.every = teacher_rows("all", teacher, chats, len(chats.read_bytes().splitlines()))

    @cached_property
    def held_out(self) -> Rows:
        if self.every:
            return self.every.pick(range(self.setup.held_out))
        return teacher_rows("held out", self.teacher, CHATS, self.setup.held_out)

    def of_seed(self, seed: int) -> Rows:
        count = self.setup.conversations
        if self.every:
            others = range(self.setup.held_out, len(self.every.rows))
            return self.every.pick(sorted(np.random.default_rng(seed).permutation(others)[:count]))
        path = self.folder / f"conversations-{seed}.jsonl"
        write_jsonl(path, make_training(FIRST_SEED + seed, count))
        return teacher_rows(f"seed {seed}", self.teacher, path, count)


def run(texts: Texts, arms: Sequence[Arm], seeds: int) -> dict[str, Any]:
    """Return the figures of every arm, one a seed; what is in the folder is not made again."""
    setup, begun, of_seed = texts.setup, cache(load_student), lru_cache(1)(texts.of_seed)
    path = texts.folder / f"{'-'.join(map(str, asdict(setup).values()))}.json"
    found: dict[str, Figures] = json.loads(path.read_text()) if path.is_file() else {}
    for seed, arm in itertools.product(range(seeds), arms):
        name = f"{arm.name}/{seed}"
        if name in found:
            continue
        source, student = of_seed(seed), begun(texts.teacher, setup.layers)
        told, size = keep(source, arm, seed)
        figures = {"bytes": size, **gradient_errors(student, source, told, arm, setup)}
        student = train(student, source, told, arm, setup, seed)
        found[name] = figures | evaluate(student, texts.held_out)
        path.write_text(json.dumps(found))
        print(name, found[name], file=sys.stderr, flush=True)
    return {
        arm.name: {name: [found[f"{arm.name}/{seed}"][name] for seed in range(seeds)]
                   for name in ("bytes", "gradient", "by_row", "kl", "rare")}
        for arm in arms
    }  # fmt: skip


def compare(figures: dict[str, Any], name: str, arm: str, other: str) -> tuple[float, float]:
    """Return by how much a figure of one arm is above another's, over pairs of one seed."""
    above = np.subtract(figures[arm][name], figures[other][name])
    return float(above.mean()), float(above.std(ddof=1) / len(above) ** 0.5)


def recommend(figures: dict[str, Any], arms: Sequence[Arm]) -> str | None:
    """Return the store of fewest bytes that costs neither KL nor rare tokens a standard error."""
    good = [arm.name for arm in arms if arm.scheme is not None]
    for name in ("kl", "rare"):
        pairs = {arm: compare(figures, name, arm, "dense") for arm in good}
        good = [arm for arm, (mean, error) in pairs.items() if mean <= error]
    return min(good, key=lambda arm: float(np.mean(figures[arm]["bytes"])), default=None)


def print_table(figures: dict[str, Any], best: str | None) -> None:
    """Print every arm as Markdown, differences with the standard errors of pairs."""
    print_head("kept", "bytes a token", "held-out KL", "above dense", "above the recommended",
               "rare tokens' loss", "above dense", "gradient", "by row")  # fmt: skip
    for arm, found in figures.items():
        means = {name: float(np.mean(values)) for name, values in found.items()}
        above = [
            "" if arm == other else "{:+.4f} ± {:.4f}".format(*compare(figures, name, arm, other))
            for name, other in (("kl", "dense"), ("kl", best or "dense"), ("rare", "dense"))
        ]
        print_row(arm, f"{means['bytes']:,.1f}", f"{means['kl']:.4f}", *above[:2],
                  f"{means['rare']:.3f}", above[2], f"{means['gradient']:.1%}",
                  f"{means['by_row']:.0%}")  # fmt: skip


def draw(figures: dict[str, Any], arms: Sequence[Arm], path: Path) -> None:
    """Draw by how much every arm is above the dense one, against its bytes."""
    from matplotlib.figure import Figure

    families: dict[str, list[Arm]] = {}
    for arm in arms:
        if arm.scheme or arm.draws:
            families.setdefault(family(arm), []).append(arm)
    figure = Figure(figsize=(12, 5.4))
    panels = figure.subplots(1, 2, sharex=True)
    for axes, name, title, linear in (
        (panels[0], "kl", "held-out KL", 0.004),
        (panels[1], "rare", "loss on the rarest tenth of the tokens", 0.03),
    ):
        for (label, members), colour in zip(families.items(), COLOURS, strict=False):
            members.sort(key=lambda arm: float(np.mean(figures[arm.name]["bytes"])))
            sizes = [np.mean(figures[arm.name]["bytes"]) for arm in members]
            pairs = [compare(figures, name, arm.name, "dense") for arm in members]
            means, errors = zip(*pairs, strict=True)
            axes.errorbar(sizes, means, errors, label=label, color=colour, marker="o", ms=5,
                          capsize=3, lw=1)  # fmt: skip
            for arm, size, mean in zip(members, sizes, means, strict=True):
                left = arm.systematic or arm.name.endswith("24, 8 bits") or "+ 8" in arm.name
                short = re.sub("min-p |, 8 bits|.*, (?=16)", "", arm.name)
                axes.annotate(short, (size, mean), (-6 if left else 6, 4), color=colour,
                              fontsize=8, textcoords="offset points",
                              ha="right" if left else "left")  # fmt: skip
        top = compare(figures, name, "text", "dense")[0]
        for level, said in ((top, "the text alone, 0 bytes"), (0, "dense, 20,000 bytes")):
            axes.axhline(level, color="#777", ls="--")
            axes.text(6.2, level, said, va="bottom", color="#555", fontsize=8)
        axes.set_yscale("symlog", linthresh=linear)
        axes.set(xscale="log", xlim=(6, 420), xlabel="bytes a token", title=title,
                 ylim=(-1.5 * linear, 3 * top))  # fmt: skip
        axes.set_xticks([10, 20, 50, 100, 200], ["10", "20", "50", "100", "200"])
        axes.grid(color="#eee")
    panels[0].set_ylabel("nats a token above the dense teacher's student")
    figure.legend(*panels[0].get_legend_handles_labels(), fontsize=8, loc="lower center", ncols=6)
    figure.tight_layout(rect=(0, 0.05, 1, 1))
    figure.savefig(path, dpi=90)


COLOURS = ("#4269d0", "#d62728", "#3ca951", "#1f8a8a", "#9467bd", "#8a6d3b")


def family(arm: Arm) -> str:
    """Return what an arm is one size of."""
    if arm.draws:
        return "points on the whole distribution" if arm.systematic else "draws with replacement"
    if arm.scheme and arm.scheme.min_p is not None:
        return "--min-p (compact rows)"
    if arm.scheme and arm.scheme.sampled_n:
        return "nucleus and tail, K + M"
    return "top k and a ghost token" if arm.ghost else "top k"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, default=ROOT / "demo/frontier")
    parser.add_argument("--picture", type=Path, help="where to draw it (extra viz)")
    parser.add_argument("--seeds", type=int, default=8, help="at least 2")
    parser.add_argument("--teacher", type=Path, default=TEACHER, help="folder of a Llama model")
    parser.add_argument("--chats", type=Path, help="its conversations, JSON lines")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="arms, by name; dense is needed")
    for field in fields(Setup):
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=type(field.default),
                            default=field.default)  # fmt: skip
    args = parser.parse_args()
    torch.set_num_threads(1)
    setup = Setup(**{field.name: getattr(args, field.name) for field in fields(Setup)})
    arms = [arm for arm in ARMS if arm.name in (args.only or [arm.name])]
    texts = Texts(args.teacher, setup, args.output, args.chats)
    figures = run(texts, arms, args.seeds)
    best = recommend(figures, arms)
    print_table(figures, best)
    print(f"\nfewest bytes within a standard error of the dense teacher: {best}")
    if args.picture:
        draw(figures, arms, args.picture)
    print(json.dumps({**asdict(setup), "seeds": args.seeds, "recommended": best, "arms": figures}))


if __name__ == "__main__":
    main()
