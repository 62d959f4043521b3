"""Time how many tokens one worker decodes, weighs and batches in a second.

    python tests/tools/bench_loader.py

The rows are random: nuclei of 1 to 100 entries, 28 on average, 24 tail tokens, 400 tokens a
conversation; and compact ones, 9 and 9 on average. Ends in one JSON line: tokens per processor
second of one worker for both, and of the weights of the tail, which the loss computes and which
must be those of the quadrature with 1,024 nodes.
"""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from bench import machine

from explore_logits import (
    LogitIterableDataset,
    collate_logits,
    decode_rows,
    pack_indices,
    shard_schema,
    sparse_teacher,
    weigh_tail,
)

TOKENS = 50_000


def write_rows(
    folder: Path, tokens: int, *, row_tokens: int = 400, tail: int = 24, compact: bool = False
) -> Path:
    """Write an output of random rows that stores its tokens; return its one shard."""
    rng = np.random.default_rng(0)
    settings: dict[str, Any] = {"min_p": 0.01} if compact else {"top_p_max": 100, "sampled_n": tail}
    schema = shard_schema(store_tokens=True, compact=compact, settings=settings)
    path = folder / "data" / "part-00000.parquet"
    path.parent.mkdir(parents=True)
    with pq.ParquetWriter(path, schema, compression="zstd") as writer:
        for index in range(max(tokens // row_tokens, 1)):
            row = {"index": index, **random_row(rng, row_tokens, tail, compact)}
            writer.write_table(schema.empty_table().from_pylist([row], schema))
    return path


def random_row(rng: np.random.Generator, tokens: int, tail: int, compact: bool) -> dict[str, Any]:
    """Return one row; a nucleus covers 0.6 to 0.98, and the tail lies below it."""
    counts = np.minimum(rng.geometric(1 / (9 if compact else 34), tokens), 100)
    points = np.minimum(rng.geometric(1 / 9, tokens), 100) if compact else np.full(tokens, tail)
    row: dict[str, Any] = {"num_tokens": tokens, "top_counts": counts, "sampled_counts": points}
    for part, size in (("top", int(counts.sum())), ("sampled", int(points.sum()))):
        low, high = pack_indices(rng.integers(0, 151_936, size))
        row[f"{part}_indices_low"], row[f"{part}_indices_high"] = low, high
        row[f"{part}_logits_quantized"] = rng.integers(0, 65536, size)
    row["top_max"], row["top_min"] = np.full(tokens, 20.0), np.full(tokens, 10.0)
    row["sampled_max"] = rng.uniform(8, 10, tokens)
    row["sampled_min"] = row["sampled_max"] - rng.uniform(2, 8, tokens)
    if compact or not tail:
        row |= {f"sampled_{name}": [] for name in ("logits_quantized", "min", "max")}
    row["logsumexp"] = 20.0 + np.log(counts) + rng.uniform(0.02, 0.5, tokens)
    row["input_ids"] = rng.integers(0, 151_936, 2 * tokens)
    return row | {"token_positions": np.arange(tokens, 2 * tokens)}


def time_loader(folder: Path) -> int:
    """Return tokens per processor second of a data loader without workers."""
    dataset: Any = LogitIterableDataset(folder)
    loader = torch.utils.data.DataLoader(dataset, batch_size=8, collate_fn=collate_logits)
    start, done = time.process_time(), 0
    for batch in loader:
        done += int((batch["teacher_positions"] >= 0).sum())
    return round(done / (time.process_time() - start))


def time_weights(path: Path) -> tuple[int, float]:
    """Return tokens per processor second of the weights alone, and their largest error."""
    block = decode_rows(pq.read_table(path).slice(0, 64))
    tail = block.tail.logits.reshape(len(block.logsumexp), -1) - block.logsumexp[:, None]
    rest = np.exp(sparse_teacher(block)["teacher_log_rest"].astype(np.float64))
    start = time.process_time()
    weights = weigh_tail(tail, rest).numpy()
    seconds = time.process_time() - start
    few = slice(0, 2_000)
    error = np.abs(weights[few] - weigh_tail(tail[few], rest[few], nodes=1_024).numpy()).max()
    assert error < 1e-6, f"the quadrature is off by {error}"
    return round(len(tail) / seconds), float(error)


def main() -> None:
    """Run the benchmark and print its JSON line."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as made:
        default, compact = Path(made) / "default", Path(made) / "compact"
        shard = write_rows(default, TOKENS)
        write_rows(compact, TOKENS, compact=True)
        weights, error = time_weights(shard)
        print(json.dumps({
            "benchmark": "loader", "tokens_per_cpu_s": time_loader(default),
            "tokens_per_cpu_s_compact": time_loader(compact),
            "tokens_per_cpu_s_weights_alone": weights, "weight_error": error, **machine(),
        }))  # fmt: skip


if __name__ == "__main__":
    main()
