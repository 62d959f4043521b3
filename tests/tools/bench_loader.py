"""Time how many tokens one worker decodes, weighs and batches in a second.

    python tests/tools/bench_loader.py [OUTPUT] [--tokens 50000]

Without OUTPUT, an output of random rows is written first: nuclei of 1 to 100 entries, 28 on
average, 24 tail tokens, 400 tokens a conversation; and compact rows, 9 and 9 on average. Ends in
one JSON line: tokens per processor second of one worker for both, and of the weights of the tail,
which the loss computes; the reference in the same run is the quadrature with 1,024 nodes, which
must agree.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch

sys.path[:0] = [str(Path(__file__).resolve().parents[2])]

from explore_logits import (  # noqa: E402 - run as a script, from anywhere
    LogitIterableDataset,
    collate_logits,
    decode_rows,
    pack_indices,
    shard_schema,
    sparse_teacher,
    weigh_tail,
)

ROW_TOKENS, TAIL = 400, 24


def write_rows(folder: Path, tokens: int, *, compact: bool = False) -> Path:
    """Write an output of random rows that stores its tokens."""
    rng = np.random.default_rng(0)
    settings: dict[str, Any] = {"min_p": 0.01} if compact else {"top_p_max": 100, "sampled_n": TAIL}
    schema = shard_schema(store_tokens=True, compact=compact, settings=settings)
    make = compact_row if compact else random_row
    path = folder / "data" / "part-00000.parquet"
    path.parent.mkdir(parents=True)
    with pq.ParquetWriter(path, schema, compression="zstd") as writer:
        for index in range(max(tokens // ROW_TOKENS, 1)):
            writer.write_table(schema.empty_table().from_pylist([make(index, rng)], schema))
    return folder


def random_row(index: int, rng: np.random.Generator) -> dict[str, Any]:
    """Return one row; a nucleus covers 0.6 to 0.98, and the tail lies below it."""
    counts = np.minimum(rng.geometric(1 / 34, ROW_TOKENS), 100)
    row: dict[str, Any] = {"index": index, "num_tokens": ROW_TOKENS, "top_counts": counts}
    for part, size in (("top", int(counts.sum())), ("sampled", ROW_TOKENS * TAIL)):
        low, high = pack_indices(rng.integers(0, 151_936, size))
        row[f"{part}_indices_low"], row[f"{part}_indices_high"] = low, high
        row[f"{part}_logits_quantized"] = rng.integers(0, 65536, size)
    row["top_max"], row["top_min"] = np.full(ROW_TOKENS, 20.0), np.full(ROW_TOKENS, 10.0)
    row["sampled_max"] = rng.uniform(8, 10, ROW_TOKENS)
    row["sampled_min"] = row["sampled_max"] - rng.uniform(2, 8, ROW_TOKENS)
    row["logsumexp"] = 20.0 + np.log(counts) + rng.uniform(0.02, 0.5, ROW_TOKENS)
    row["input_ids"] = rng.integers(0, 151_936, 2 * ROW_TOKENS)
    row["token_positions"] = np.arange(ROW_TOKENS, 2 * ROW_TOKENS)
    return row


def compact_row(index: int, rng: np.random.Generator) -> dict[str, Any]:
    """Return one row whose sample has no logits."""
    row = random_row(index, rng)
    points = np.minimum(rng.geometric(1 / 9, ROW_TOKENS), 100)
    row["top_counts"] = np.minimum(rng.geometric(1 / 9, ROW_TOKENS), 100)
    for part, counts in (("top", row["top_counts"]), ("sampled", points)):
        low, high = pack_indices(rng.integers(0, 151_936, int(counts.sum())))
        row[f"{part}_indices_low"], row[f"{part}_indices_high"] = low, high
    row["top_logits_quantized"] = rng.integers(0, 65536, int(row["top_counts"].sum()))
    row |= {f"sampled_{name}": [] for name in ("logits_quantized", "min", "max")}
    row["logsumexp"] = 20.0 + np.log(row["top_counts"]) + rng.uniform(0.02, 0.5, ROW_TOKENS)
    return {**row, "sampled_counts": points}


def time_loader(folder: Path, *, tokens: int) -> float:
    """Return tokens per processor second of a data loader without workers."""
    dataset: Any = LogitIterableDataset(folder)
    loader = torch.utils.data.DataLoader(dataset, batch_size=8, collate_fn=collate_logits)
    start, done = time.process_time(), 0
    for batch in loader:
        done += int((batch["teacher_positions"] >= 0).sum())
        if done >= tokens:
            break
    return done / (time.process_time() - start)


def time_weights(folder: Path) -> tuple[float, float]:
    """Return tokens per processor second of the weights alone, and their largest error."""
    table = pq.read_table(sorted((folder / "data").glob("*.parquet"))[0]).slice(0, 64)
    block = decode_rows(table)
    teacher = sparse_teacher(block)
    size = int(block.tail.counts.max())
    tail = block.tail.logits.reshape(-1, size) - block.logsumexp[:, None]
    rest = np.exp(teacher["teacher_log_rest"].astype(np.float64))
    start = time.process_time()
    weights = weigh_tail(tail, rest).numpy()
    seconds = time.process_time() - start
    few = slice(0, 2_000)
    error = np.abs(weights[few] - weigh_tail(tail[few], rest[few], nodes=1_024).numpy()).max()
    if error > 1e-6:
        raise SystemExit(f"the quadrature is off by {error}")
    return tail.shape[0] / seconds, float(error)


def main() -> None:
    """Run the benchmark and print its JSON line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", nargs="?", type=Path, help="an output to read instead")
    parser.add_argument("--tokens", type=int, default=50_000)
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as made:
        folder = args.output or write_rows(Path(made) / "default", args.tokens)
        rate = round(time_loader(folder, tokens=args.tokens))
        points = write_rows(Path(made) / "compact", args.tokens, compact=True)
        compact = round(time_loader(points, tokens=args.tokens))
        weights, error = time_weights(folder)
    figures = {
        "benchmark": "loader",
        "tokens_per_cpu_s": rate,
        "tokens_per_cpu_s_compact": compact,
        "tokens_per_cpu_s_weights_alone": round(weights),
        "weight_error": error,
        "numpy": np.__version__,
        "machine": platform.machine(),
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
