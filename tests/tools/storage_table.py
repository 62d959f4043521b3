"""What a stored token costs and is worth: bytes, covered probability, KL of what comes back.

    python tests/storage_table.py             # a minute on one core; ends in one JSON line

The rows are those of the embedded teacher on some of its conversations, where the whole
distribution is at hand to compare with, and rows of a vocabulary of 151,936 made up to look like a
trained model's. Every file is written by the extractor's own `ShardWriter`, read back and compared
before a figure is printed. The figures:

- bytes: size of the shard by its tokens, footer included;
- nucleus, tail: mean probability that they cover;
- KL: mean KL(teacher || reconstruction) in nats. The reconstruction gives nucleus and tail tokens
  their stored probabilities and spreads what is left of 1 evenly over all other tokens;
- bias ± deviation: error, over the tokens, of the teacher's entropy estimated from what is stored:
  the nucleus' part plus the tail's weighed by the unordered-set estimator (Murthy 1957; Kool, van
  Hoof and Welling 2020). It needs a tail.
"""

from __future__ import annotations

import argparse
import functools
import io
import itertools
import json
import math
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import extract_logits as el  # noqa: E402 - run as a script, from anywhere
from explore_logits import (  # noqa: E402
    ConversationEncoder,
    LogitDataset,
    TokenBlock,
    decode_rows,
    iter_blocks,
    load_chat_template,
    load_logit_dataset,
    load_tokenizer,
    resolve_columns,
    shard_schema,
    weigh_tail,
)

TEACHER = ROOT / "tests" / "teacher" / "model"
CHATS = ROOT / "tests" / "teacher" / "conversations.jsonl"
TOP_P, SEED = 0.98, 42
CAPS, DRAWS, BITS = (32, 100, 255), (0, 8, 24, 48), (16, 12, 8, 4)
LARGE_VOCAB = 151_936
ASKED_SAVING = 0.15  # of the bytes of a plain writer, at equal content
LEAST_REST = 1e-9  # probability that the reconstruction leaves to what is not stored


@dataclass(frozen=True)
class Rows:
    """Conversations and the teacher's distributions: what an extraction is made from."""

    name: str
    rows: list[el.EncodedRow]
    logits: torch.Tensor  # (N, V) float32

    @functools.cached_property
    def logsumexp(self) -> np.ndarray:
        """(N,) float64."""
        return np.concatenate([x.double().logsumexp(1).numpy() for x in self.logits.split(256)])

    @functools.cached_property
    def entropy(self) -> np.ndarray:
        """(N,) float64, of each distribution, in nats."""
        parts = [x.double().log_softmax(1) for x in self.logits.split(256)]
        return np.concatenate([-(x.exp() * x).sum(1).numpy() for x in parts])

    def log_probs(self, tokens: slice, ids: np.ndarray) -> np.ndarray:
        """Return the log-probabilities (n, k) of some ids (n, k) of n tokens, float64."""
        found = self.logits[tokens].gather(1, torch.from_numpy(ids))
        return np.asarray(found.double().numpy() - self.logsumexp[tokens, None])


@dataclass(frozen=True)
class Line:
    """One line of the table."""

    top_p_max: int
    sampled_n: int
    logit_bits: int
    bytes_per_token: float
    mean_nucleus: float
    nucleus: float  # covered probability
    tail: float
    kl: float  # nats
    bias: float | None  # of the estimated entropy, nats
    deviation: float | None


# Rows ---------------------------------------------------------------------------------------------


def teacher_rows(count: int) -> Rows:
    """Run the embedded teacher over conversations drawn at random."""
    chats = [json.loads(line) for line in CHATS.read_text(encoding="utf-8").splitlines()]
    chosen = np.random.default_rng(SEED).permutation(len(chats))[:count]
    tokenizer = load_tokenizer(str(TEACHER))
    columns = resolve_columns(list(chats[0]), index_col="id")
    rows = []
    encoder = ConversationEncoder(tokenizer, load_chat_template(None, tokenizer), columns)
    for number in sorted(chosen.tolist()):
        chat = encoder.encode(chats[number])
        rows.append(el.EncodedRow(number, chat.input_ids, chat.token_positions))
    config = el.ExtractionConfig(model=str(TEACHER), dataset=str(CHATS), output="./unused")
    teacher = el.load_teacher(config, vocab_size=len(tokenizer))
    ids, positions = [row.input_ids for row in rows], [row.token_positions for row in rows]
    chunks = list(teacher.iter_logits(ids, positions))
    return Rows("embedded teacher", rows, torch.cat(chunks).float())


def natural_rows(tokens: int, *, vocab: int = LARGE_VOCAB, row_tokens: int = 64) -> Rows:
    """Make up distributions: frequent ids are likely everywhere, a context lifts a few by much.

    A third of them are nearly sure, a fifth are torn between more than 100 tokens.
    """
    generator = torch.Generator().manual_seed(SEED)
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


# Store and read back ------------------------------------------------------------------------------


def extract(source: Rows, *, top_p_max: int, sampled_n: int) -> el.ExtractedTokens:
    """Run the project's extraction over all rows."""
    sizes = [row.token_positions.size for row in source.rows]
    index = torch.from_numpy(np.repeat([row.index for row in source.rows], sizes).astype(np.int64))
    position = np.concatenate([row.token_positions for row in source.rows]).astype(np.int64)
    return el.extract_tokens(
        source.logits,
        index,
        torch.from_numpy(position),
        top_p=TOP_P,
        top_p_max=top_p_max,
        sampled_n=sampled_n,
        seed=SEED,
    )


def write_output(folder: Path, source: Rows, tokens: el.ExtractedTokens, *, bits: int) -> pa.Table:
    """Write a shard as a run does; returns what went into it."""
    settings = {
        "top_p": TOP_P,
        "top_p_max": tokens.top_ids.shape[1],
        "sampled_n": tokens.sampled_ids.shape[1],
        "logit_bits": bits,
        "vocab_size": source.logits.shape[1],
    }
    schema = shard_schema(settings=settings)
    result = el.quantize_tokens(tokens, tokens.top_logits[:, 0], bits=bits).to_host()
    table = el.cpu_postprocess_batch(result, el.Batch(source.rows), schema=schema).table
    (folder / "data").mkdir(parents=True)
    writer = el.ShardWriter(folder, schema, nucleus_cap=settings["top_p_max"])
    for number in range(table.num_rows):
        writer.add(table.slice(number, 1))
    writer.close(folder / "data" / "part-00000.parquet")
    (folder / "extraction_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return table.select(schema.names)


def check_equal(folder: Path, table: pa.Table) -> LogitDataset:
    """Open what was written once it is known to hold the same."""
    back = pq.read_table(folder / "data" / "part-00000.parquet")
    assert back.equals(table), "a shard does not hold what was written"
    return load_logit_dataset(str(folder))


# What it is worth ---------------------------------------------------------------------------------


def measure(source: Rows, tokens: el.ExtractedTokens, *, bits: int) -> Line:
    """Store rows, read them back, compare them with the whole distributions."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "out"
        dataset = check_equal(folder, write_output(folder, source, tokens, bits=bits))
        size = sum(dataset.sizes.values())
        parts = list(compare_blocks(dataset, source, bits=bits))
    kl, errors = (np.concatenate(part) for part in zip(*[part[:2] for part in parts], strict=True))
    nucleus, tail, entries = np.sum([part[2] for part in parts], axis=0) / kl.size
    sampled_n = tokens.sampled_ids.shape[1]
    return Line(
        tokens.top_ids.shape[1], sampled_n, bits, size / kl.size, entries, nucleus, tail,
        float(kl.mean()),
        float(errors.mean()) if sampled_n else None,
        float(errors.std()) if sampled_n else None,
    )  # fmt: skip


def compare_blocks(
    dataset: LogitDataset, source: Rows, *, bits: int
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Yield KL and error of the entropy of some tokens, and sums: nucleus, tail, entries."""
    start = 0
    for block in iter_blocks(dataset):
        tokens = slice(start, start + len(block.logsumexp))
        stored = StoredTokens.of(block, source, tokens)
        stored.check(bits=bits)
        covered = np.array([stored.top.sum(), stored.tail.sum(), (stored.top > 0).sum()])
        exact = source.entropy[tokens]
        yield stored.kl(exact), stored.entropy() - exact, covered
        start = tokens.stop


@dataclass(frozen=True)
class StoredTokens:
    """Some tokens as they come back, padded; probability 0 where there is no entry."""

    top: np.ndarray  # (n, K) probabilities
    top_exact: np.ndarray  # (n, K) the teacher's log-probabilities of the same ids
    tail: np.ndarray  # (n, M)
    tail_exact: np.ndarray  # (n, M)
    vocab: int

    @classmethod
    def of(cls, block: TokenBlock, source: Rows, tokens: slice) -> StoredTokens:
        """Pad the tokens of a block and look up what they were in the source."""
        top_ids, top = pad(block.top.starts, block.top.ids, block.top.probs)
        tail_ids, tail = pad(block.tail.starts, block.tail.ids, block.tail.probs)
        top_exact, tail_exact = (source.log_probs(tokens, ids) for ids in (top_ids, tail_ids))
        return cls(top, top_exact, tail, tail_exact, source.logits.shape[1])

    def check(self, *, bits: int) -> None:
        """Compare every stored entry with the teacher's probability of its id."""
        for stored, want in ((self.top, self.top_exact), (self.tail, self.tail_exact)):
            if stored.size:
                there = stored > 0
                span = np.where(there, want, -np.inf).max(1) - np.where(there, want, np.inf).min(1)
                error = np.where(there, np.abs(np.log(np.where(there, stored, 1)) - want), 0)
                assert (error.max(1) <= span * (0.5 / (2**bits - 1) + 2.0**-16) + 2e-5).all()

    def kl(self, entropy: np.ndarray) -> np.ndarray:
        """Return KL(teacher || reconstruction) of each token, in nats."""
        back = np.concatenate([self.top, self.tail], axis=1)
        p = np.where(back > 0, np.exp(np.concatenate([self.top_exact, self.tail_exact], 1)), 0)
        others = np.maximum(self.vocab - (back > 0).sum(1), 1)
        rest = np.maximum(1 - back.sum(1), LEAST_REST)
        cross = -(p * np.log(np.where(back > 0, back, 1))).sum(1)
        cross -= np.maximum(1 - p.sum(1), 0) * np.log(rest / others)
        return np.asarray(cross + np.log(back.sum(1) + rest) - entropy)

    def entropy(self) -> np.ndarray:
        """Estimate the entropy of each token from nucleus and weighed tail, in nats."""
        total = -(self.top * np.log(np.where(self.top > 0, self.top, 1))).sum(1)
        if not self.tail.size:
            return np.asarray(total)
        rest = np.maximum(1 - self.top.sum(1), self.tail.sum(1))
        weights = np.exp(weigh_tail(np.log(self.tail), rest))
        return np.asarray(total - (weights * self.tail * np.log(self.tail)).sum(1))


def pad(
    starts: np.ndarray, ids: np.ndarray, probabilities: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return (n, widest) ids and probabilities of the tokens; padding: id 0, probability 0."""
    counts = np.diff(starts)
    there = np.arange(int(counts.max(initial=0))) < counts[:, None]
    wide, probs = np.zeros(there.shape, np.int64), np.zeros(there.shape)
    wide[there], probs[there] = ids, probabilities
    return wide, probs


# Encodings ----------------------------------------------------------------------------------------


def encoded_sizes(source: Rows) -> dict[str, float]:
    """Return bytes per token of the defaults, by the ways to write them; all are read back."""
    tokens = extract(source, top_p_max=100, sampled_n=24)
    with tempfile.TemporaryDirectory() as name:
        table = write_output(Path(name) / "out", source, tokens, bits=16)
        shard = Path(name) / "out" / "data" / "part-00000.parquet"
        chosen = el.choose_encodings(table.schema)
        sizes = {"these columns, as written": shard.stat().st_size}
    lists = {leaf for leaf in chosen if leaf.endswith(".list.element")}
    split = {"column_encoding": dict.fromkeys(lists - {"top_counts"}, "BYTE_STREAM_SPLIT")}
    ways: dict[str, dict[str, Any]] = {
        "these columns, bytes of all split": {**split, "use_dictionary": False},
        "these columns, zstd and dictionaries": {"use_dictionary": True},
        "these columns, snappy and dictionaries": {"compression": "snappy"},
    }
    for label, options in ways.items():
        sizes[label] = plain_size(table, **{"compression": "zstd", **options})
    plain = widen(table)
    sizes["float32 and int32, snappy and dictionaries"] = plain_size(plain, compression="snappy")
    return {label: size / len(source.logits) for label, size in sizes.items()}


def plain_size(table: pa.Table, **options: Any) -> int:
    """Return the size of a table as one Parquet file of as many row groups as a shard has."""
    file = io.BytesIO()
    pq.write_table(table, file, row_group_size=el.ROW_GROUP_ROWS, **options)
    assert pq.read_table(pa.BufferReader(file.getvalue())).equals(table)
    return file.tell()


def widen(table: pa.Table) -> pa.Table:
    """Return the same content as a plain writer would keep it: int32 ids, float32 logits."""
    block = decode_rows(table, first_row=0)
    columns = {
        "index": table["index"],
        "top_counts": table["top_counts"],
        "top_ids": regroup(block.top.ids, block.top.starts, block.row_starts),
        "top_logits": regroup(block.top.logits, block.top.starts, block.row_starts, np.float32),
        "sampled_ids": regroup(block.tail.ids, block.tail.starts, block.row_starts),
        "sampled_logits": regroup(
            block.tail.logits, block.tail.starts, block.row_starts, np.float32
        ),
        "logsumexp": table["logsumexp"],
    }
    return pa.table(columns)


def regroup(
    values: np.ndarray, starts: np.ndarray, rows: np.ndarray, dtype: Any = np.int32
) -> pa.Array:
    """Return flat values as one list a row."""
    offsets = pa.array(starts[rows].astype(np.int32))
    return pa.ListArray.from_arrays(offsets, pa.array(values.astype(dtype)))


# Print --------------------------------------------------------------------------------------------


def format_line(line: Line) -> str:
    """Return one row of the Markdown table."""
    estimate = "" if line.bias is None else f"{line.bias:+.4f} ± {line.deviation:.4f}"
    return (
        f"| {line.top_p_max} | {line.sampled_n} | {line.logit_bits} | {line.bytes_per_token:.1f} "
        f"| {line.mean_nucleus:.1f} | {line.nucleus:.2%} | {line.tail:.2%} | {line.kl:.5f} "
        f"| {estimate} |"
    )


def print_lines(source: Rows, caps: tuple[int, ...], draws: tuple[int, ...]) -> list[Line]:
    """Measure and print every combination."""
    print(f"\n{source.name}: {len(source.logits):,} tokens, top_p {TOP_P}\n")
    print("| K | M | bits | bytes a token | nucleus | covers | tail covers | KL | entropy |")
    print("|---|---|---|---|---|---|---|---|---|")
    lines = []
    for top_p_max, sampled_n in itertools.product(caps, draws):
        tokens = extract(source, top_p_max=top_p_max, sampled_n=sampled_n)
        for bits in BITS:
            lines.append(measure(source, tokens, bits=bits))
            print(format_line(lines[-1]), flush=True)
    return lines


def check_lines(lines: list[Line], tokens: int) -> None:
    """Refuse figures that contradict each other: more that is kept costs more and loses less."""
    found = {(x.top_p_max, x.sampled_n, x.logit_bits): x for x in lines}
    for (cap, drawn, bits), line in found.items():
        finer = found.get((cap, drawn, min((b for b in BITS if b > bits), default=0)))
        assert finer is None or finer.bytes_per_token > line.bytes_per_token
        assert finer is None or finer.kl < line.kl + 1e-6
        wider = found.get((min((k for k in CAPS if k > cap), default=0), drawn, bits))
        assert wider is None or wider.nucleus > line.nucleus
        assert wider is None or wider.kl < line.kl or bits < 8  # coarse over a wider range
        if line.deviation is not None and bits >= 8:
            assert abs(line.bias or 0) < 5 * line.deviation / math.sqrt(tokens), line


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--conversations", type=int, default=150)
    parser.add_argument("--tokens", type=int, default=2048, help="made-up tokens")
    args = parser.parse_args()
    torch.set_num_threads(1)
    started = time.perf_counter()
    figures: dict[str, Any] = {"benchmark": "storage", "versions": [np.__version__, pa.__version__]}
    teacher, natural = teacher_rows(args.conversations), natural_rows(args.tokens)
    lines = print_lines(teacher, CAPS, DRAWS)
    check_lines(lines, len(teacher.logits))
    figures["lines"] = [asdict(line) for line in lines]
    lines = print_lines(natural, (100,), (24,))
    figures["made_up"] = [asdict(line) for line in lines]
    for source in (teacher, natural):
        sizes = encoded_sizes(source)
        print(f"\n{source.name}, K 100, M 24, 16 bits\n\n| written as | bytes a token |\n|---|---|")
        print("\n".join(f"| {label} | {size:.1f} |" for label, size in sizes.items()))
        ours, *_ = sizes.values()
        for label in list(sizes)[2:]:
            assert ours < sizes[label], label
        for label in list(sizes)[3:]:
            assert ours <= (1 - ASKED_SAVING) * sizes[label], label
        figures[f"encodings, {source.name}"] = sizes
    figures["seconds"] = round(time.perf_counter() - started, 1)
    print()
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
