"""What a stored token costs and what it is worth in training, by what is kept of it.

    python tests/tools/storage_table.py       # two minutes of one core; ends in one JSON line
    python tests/tools/storage_table.py --teacher FOLDER --chats FILE …  # another teacher's rows

The whole distribution p is at hand for all rows. Every line is extracted, written and read back by
the project's own code; from what comes back the loss makes an estimate p' of p, and p' - p is what
storage adds to a student's gradient: noise is the root of the mean, over tokens and seeds of the
extraction, of |p' - E p'|², bias that of |E p' - p|², from pairs of seeds. See docs/storage.md.
"""

from __future__ import annotations

import argparse
import functools
import io
import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import scipy.sparse
import torch
from bench import CHATS, TEACHER, print_head, print_row

import extract_logits as el
from explore_logits import TokenBlock, decode_rows, shard_schema, sparse_teacher, weigh_tail

LARGE_VOCAB, MADE_UP = 151_936, 1024  # ids, tokens
SEEDS = 4  # of the extraction


@dataclass(frozen=True)
class Scheme:
    """What is kept of a token."""

    top_p: float = 0.98
    top_p_max: int = 100
    sampled_n: int = 24
    bits: int = 16
    min_p: float | None = None

    def __str__(self) -> str:
        if self.min_p is not None:
            return f"`--min-p {self.min_p:g}`, {self.bits} bits"
        return f"{self.top_p:g}: {self.top_p_max} + {self.sampled_n}, {self.bits} bits"


SCHEMES = (
    *(Scheme(bits=bits) for bits in (16, 8, 4)),
    *(Scheme(top_p_max=k, sampled_n=m) for k, m in ((32, 24), (255, 24), (100, 8), (100, 48))),
    Scheme(sampled_n=0),
    Scheme(top_p=0.9, bits=8),
    *(Scheme(min_p=t, bits=8) for t in (0.004, 0.005, 0.01, 0.02, 0.05)),
    Scheme(min_p=0.01),
)


@dataclass(frozen=True)
class Rows:
    """Conversations and the teacher's distributions: what an extraction is made from."""

    name: str
    rows: list[el.EncodedRow]
    logits: torch.Tensor  # (N, V) float32

    def probabilities(self, tokens: slice) -> np.ndarray:
        """Return whole distributions, float64."""
        return self.logits[tokens].double().softmax(-1).numpy()

    @property
    def starts(self) -> np.ndarray:
        """Where the tokens of each conversation begin, and where the last ends."""
        return np.cumsum([0] + [row.token_positions.size for row in self.rows])

    @property
    def actual(self) -> np.ndarray:
        """What stands in the text, for each token."""
        return np.concatenate([row.input_ids[row.token_positions] for row in self.rows])

    def tokens_of(self, chosen: Sequence[int]) -> np.ndarray:
        """Return the numbers of some conversations' tokens."""
        starts = self.starts
        return np.concatenate([np.arange(starts[i], starts[i + 1]) for i in chosen])

    def pick(self, chosen: Sequence[int]) -> Rows:
        rows = [self.rows[i] for i in chosen]
        return Rows(self.name, rows, self.logits[self.tokens_of(chosen)])

    def slices(self) -> list[slice]:
        """Cut the tokens into runs whose distributions may be held at once."""
        return el.row_slices(len(self.logits), max(1, 2**24 // self.logits.shape[1]))


def encode_rows(job: el.Job, count: int) -> list[el.EncodedRow]:
    """Return the tokens of a job's first conversations, those that can be used."""
    part = next(job.selection.parts(count))
    pairs = zip(part.ids.tolist(), part.read(range(part.ids.size)), strict=True)
    encoded = [job.encoder.encode(row, index) for index, row in pairs]
    return [row for row in encoded if isinstance(row, el.EncodedRow)]


def teacher_rows(name: str, model: Path, chats: Path, count: int) -> Rows:
    """Run a teacher over conversations drawn at random."""
    where = {"model": str(model), "dataset": str(chats), "output": "./unused", "index_col": "id"}
    config = el.ExtractionConfig(**where, limit=count, random_sample=True)
    job = el.open_job(config)
    rows = encode_rows(job, count)
    teacher = el.load_teacher(config, vocab_size=job.vocab_size)
    ids, positions = [row.input_ids for row in rows], [row.token_positions for row in rows]
    return Rows(name, rows, torch.cat(list(teacher.iter_logits(ids, positions))))


def natural_rows(tokens: int, *, vocab: int = LARGE_VOCAB, row_tokens: int = 64) -> Rows:
    """Make up distributions: frequent ids are likely everywhere, a context lifts a few by much.

    A third of them are nearly sure, a fifth are torn between more than 100 tokens.
    """
    generator = torch.Generator().manual_seed(42)
    common = -torch.log(torch.arange(vocab) + 3.0) + 0.7 * torch.randn(vocab, generator=generator)
    frequency = common.softmax(0)
    logits = torch.empty(tokens, vocab)
    for row in logits:
        sure, width = torch.rand(2, generator=generator).tolist()
        lifted = torch.multinomial(frequency, int(2 ** (1 + 7 * width)), generator=generator)
        row.normal_(0, 1.3, generator=generator).add_(common)
        row[lifted] += 3 + 2.5 * torch.rand(len(lifted), generator=generator)
        row[lifted[0]] += 14 * sure**2
        row.mul_(1.25 + 0.6 * sure).add_(20)
    positions = np.arange(1, row_tokens + 1, dtype=np.int32)
    ids = np.zeros(row_tokens + 1, np.int32)
    rows = [el.EncodedRow(index, ids, positions) for index in range(tokens // row_tokens)]
    return Rows(f"made-up rows of {vocab:,} ids", rows, logits)


def store(source: Rows, scheme: Scheme, seed: int) -> tuple[pa.Table, int]:
    """Extract, write as a run does and read back; returns the rows and the size of the file."""
    counts = np.diff(source.starts)
    index = np.repeat([row.index for row in source.rows], counts).astype(np.int64)
    position = np.concatenate([row.token_positions for row in source.rows]).astype(np.int64)
    kept = {"top_p": scheme.top_p, "top_p_max": scheme.top_p_max, "sampled_n": scheme.sampled_n}
    tokens = el.extract_tokens(
        source.logits, torch.from_numpy(index), torch.from_numpy(position), seed=seed,
        min_p=scheme.min_p, **kept,
    )  # fmt: skip
    settings = {"vocab_size": source.logits.shape[1], "logit_bits": scheme.bits}
    settings |= kept if scheme.min_p is None else {"min_p": scheme.min_p}
    schema = shard_schema(compact=scheme.min_p is not None, settings=settings)
    result = el.quantize_tokens(tokens, source.logits[:, 0].float(), bits=scheme.bits).to_host()
    rows = el.cpu_postprocess_batch(result, el.Batch(source.rows), schema=schema).table
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "part-00000.parquet"
        size = el.write_part(path, rows, schema)
        table = pq.read_table(path)
    assert table.equals(rows.select(schema.names)), "a shard does not hold what was written"
    return table, size


def estimate(block: TokenBlock, vocab: int) -> scipy.sparse.csr_array:
    """Return what the loss takes for the teacher's distributions, (N, V)."""
    teacher = sparse_teacher(block)
    weights = np.zeros(teacher["teacher_mask"].shape)
    tail = teacher["teacher_tail_mask"]
    if tail.any() and not teacher["teacher_points"].any():
        shape = (len(tail), -1)
        rest = np.exp(teacher["teacher_log_rest"].astype(np.float64))
        log_probs = torch.from_numpy(teacher["teacher_log_probs"][tail].reshape(shape)).double()
        weights[tail] = weigh_tail(log_probs, torch.from_numpy(rest)).numpy().reshape(-1)
    there = teacher["teacher_mask"]
    values = np.exp(teacher["teacher_log_probs"].astype(np.float64) + weights)[there]
    place = (there.nonzero()[0], teacher["teacher_ids"][there])
    return scipy.sparse.coo_array((values, place), shape=(len(there), vocab)).tocsr()


def measure(source: Rows, scheme: Scheme, gradient: float) -> dict[str, Any]:
    """Store rows by several seeds and compare what comes back with the whole distributions."""
    vocab, count = source.logits.shape[1], len(source.logits)
    stored = [store(source, scheme, seed) for seed in range(SEEDS)]
    blocks = [decode_rows(table) for table, _ in stored]
    guesses = [estimate(block, vocab) for block in blocks]
    products = np.zeros((SEEDS, SEEDS))  # of the errors of two seeds, summed over tokens
    for tokens in source.slices():
        p = source.probabilities(tokens)
        parts = [guess[tokens] for guess in guesses]
        along = np.array([float(part.multiply(p).sum()) for part in parts])
        inner = [[float(one.multiply(two).sum()) for two in parts] for one in parts]
        products += inner - along[:, None] - along + float((p * p).sum())
    error = products.trace() / SEEDS / count
    bias = max((products.sum() - products.trace()) / (SEEDS * (SEEDS - 1)) / count, 0.0)
    top, tail = blocks[0].top, blocks[0].tail
    return {
        "top-p: K + M, bits": str(scheme), "bytes a token": stored[0][1] / count,
        "nucleus": float(top.counts.mean()), "covers": float(top.mass.mean()),
        "sampled": float(tail.counts.mean()), "noise": max(error - bias, 0) ** 0.5 / gradient,
        "bias": bias**0.5 / gradient,
    }  # fmt: skip


def print_lines(source: Rows) -> list[dict[str, Any]]:
    """Measure and print every scheme; shares in percent."""
    whole = [source.probabilities(tokens) for tokens in source.slices()]
    mean = sum(p.sum(0) for p in whole) / len(source.logits)
    gradient = (sum(((p - mean) ** 2).sum() for p in whole) / len(source.logits)) ** 0.5
    del whole
    print(f"\n{source.name}: {len(source.logits):,} tokens, {SEEDS} seeds, a gradient is "
          f"{gradient:.3f}\n")  # fmt: skip
    lines: list[dict[str, Any]] = []
    for scheme in SCHEMES:
        line = measure(source, scheme, gradient)
        if not lines:
            print_head(*line)
        lines.append(line)
        shares = {name: f"{line[name]:.2%}" for name in ("covers", "noise", "bias")}
        means = {name: f"{line[name]:.1f}" for name in ("bytes a token", "nucleus", "sampled")}
        print_row(*(line | shares | means).values())
    return lines


def print_encodings(source: Rows) -> dict[str, float]:
    """Print bytes per token of the defaults, by the ways to write them; all are read back."""
    table, size = store(source, Scheme(), 0)
    wide = widen(table)
    lists = [leaf for leaf in el.choose_encodings(table.schema) if leaf.endswith(".list.element")]
    split = {"column_encoding": dict.fromkeys(lists, "BYTE_STREAM_SPLIT"), "use_dictionary": False}
    sizes = {
        "these columns, as written": size,
        "these columns, bytes of all split": plain_size(table, compression="zstd", **split),
        "these columns, zstd and dictionaries": plain_size(table, compression="zstd"),
        "these columns, snappy and dictionaries": plain_size(table, compression="snappy"),
        "float32 and int32, snappy and dictionaries": plain_size(wide, compression="snappy"),
    }
    print(f"\n{source.name}, K 100, M 24, 16 bits\n")
    print_head("written as", "bytes a token")
    for label, size in sizes.items():
        print_row(label, f"{size / len(source.logits):.1f}")
    return {label: size / len(source.logits) for label, size in sizes.items()}


def plain_size(table: pa.Table, **options: Any) -> int:
    """Return the size of a table as one Parquet file of as many row groups as a shard has."""
    file = io.BytesIO()
    pq.write_table(table, file, row_group_size=el.ROW_GROUP_ROWS, **options)
    assert pq.read_table(pa.BufferReader(file.getvalue())).equals(table)
    return file.tell()


def widen(table: pa.Table) -> pa.Table:
    """Return the same content as a plain writer would keep it: int32 ids, float32 logits."""
    block = decode_rows(table)
    columns = {name: table[name] for name in ("index", "top_counts", "logsumexp")}
    for name, part in (("top", block.top), ("sampled", block.tail)):
        offsets = pa.array(part.starts[block.row_starts].astype(np.int32))
        for kind, values in (("ids", part.ids), ("logits", part.logits.astype(np.float32))):
            columns[f"{name}_{kind}"] = pa.ListArray.from_arrays(offsets, pa.array(values))
    return pa.table(columns)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--conversations", type=int, default=150)
    parser.add_argument("--teacher", type=Path, metavar="FOLDER", help="its rows instead of these")
    parser.add_argument("--chats", type=Path, nargs="+", metavar="FILE", help="for --teacher")
    args = parser.parse_args()
    if (args.teacher is None) != (args.chats is None):
        parser.error("--teacher and --chats need each other: give both")
    torch.set_num_threads(1)
    made = [lambda: teacher_rows("embedded teacher", TEACHER, CHATS, args.conversations)]
    made += [lambda: natural_rows(MADE_UP)]
    if args.teacher:
        read = functools.partial(teacher_rows, model=args.teacher, count=args.conversations)
        made = [functools.partial(read, chats.stem, chats=chats) for chats in args.chats]
    figures: dict[str, Any] = {"benchmark": "storage", "versions": [np.__version__, pa.__version__]}
    for make in made:  # one source at a time: their logits take gigabytes
        source = make()
        figures[source.name] = {"lines": print_lines(source), "encodings": print_encodings(source)}
    print(f"\n{json.dumps(figures)}")


if __name__ == "__main__":
    main()
