"""Decode the nuclei of 1,000,000 stored tokens, all at once and token by token; and load to train.

    python tests/tools/bench_decode.py
    python tests/tools/bench_decode.py --loader

Ends in one JSON line, whose times are of the processor. The loop over tokens is timed on every 20th
row, must give the same sums, and is scaled up. With --loader: how many tokens one worker decodes,
weighs and batches in a second, of rows by default and of compact ones, and of the weights of the
tail alone, which the loss computes. All rows are random: nuclei of 1 to 100 entries, 28 on average,
24 tail tokens; of compact ones 9 and 9 on average.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from bench import machine, timed
from small_output import random_rows, rows_to_table, write_output

import explore_logits as ex

TOKENS, ROW_TOKENS, EVERY, FAULTS = 1_000_000, 1000, 20, 10_000
LOADED = 50_000  # tokens


def write_rows(
    folder: Path, tokens: int, *, row_tokens: int = 400, tail: int = 24, compact: bool = False
) -> Path:
    """Write an output of random rows that stores its tokens; return its one shard.

    A nucleus covers 0.6 to 0.98, and the tail lies below it.
    """
    rng, size = np.random.default_rng(0), row_tokens
    settings: dict[str, Any] = {"min_p": 0.01} if compact else {"top_p_max": 100, "sampled_n": tail}
    schema = ex.shard_schema(store_tokens=True, compact=compact, settings=settings)
    path = folder / "data" / "part-00000.parquet"
    path.parent.mkdir(parents=True)
    with pq.ParquetWriter(path, schema, compression="zstd") as writer:
        for index in range(max(tokens // size, 1)):
            counts = np.minimum(rng.geometric(1 / (9 if compact else 34), size), 100)
            points = np.minimum(rng.geometric(1 / 9, size), 100) if compact else np.full(size, tail)
            row: dict[str, Any] = {"index": index, "num_tokens": size, "top_counts": counts}
            row["sampled_counts"] = points
            for part, entries in (("top", int(counts.sum())), ("sampled", int(points.sum()))):
                low, high = ex.pack_indices(rng.integers(0, 151_936, entries))
                row |= {f"{part}_indices_low": low, f"{part}_indices_high": high}
                row[f"{part}_logits_quantized"] = rng.integers(0, 65536, entries)
            row["top_max"], row["top_min"] = np.full(size, 20.0), np.full(size, 10.0)
            row["sampled_max"] = rng.uniform(8, 10, size)
            row["sampled_min"] = row["sampled_max"] - rng.uniform(2, 8, size)
            if compact or not tail:
                row |= {f"sampled_{name}": [] for name in ("logits_quantized", "min", "max")}
            row["logsumexp"] = 20.0 + np.log(counts) + rng.uniform(0.02, 0.5, size)
            row["input_ids"] = rng.integers(0, 151_936, 2 * size)
            row["token_positions"] = np.arange(size, 2 * size)
            writer.write_table(schema.empty_table().from_pylist([row], schema))
    return path


def decode_at_once(path: Path) -> tuple[int, dict[int, float]]:
    """Return the number of entries, and a checksum of each row by its index."""
    entries, sums = 0, dict[int, float]()
    for block in ex.iter_blocks(path):
        check = block.top.probs + block.top.ids
        first = block.top.starts[block.row_starts[:-1]]
        sums |= zip(block.index.tolist(), np.add.reduceat(check, first).tolist(), strict=True)
        entries += check.size
    return entries, sums


def sum_by_token(sample: ex.Sample) -> float:
    check = 0.0
    for t in range(sample["num_tokens"]):
        ids, logits = ex.dequantize_top_logits(sample, t)
        probs = ex.logits_to_probs(logits, sample["logsumexp"][t])
        check += float(probs.sum()) + float(ids.sum(dtype=np.int64))
    return check


def measure_decoding(folder: Path) -> dict[str, Any]:
    path = write_rows(folder / "whole", TOKENS, row_tokens=ROW_TOKENS, tail=0)
    at_once_s, (entries, sums) = timed(lambda: decode_at_once(path))
    by_token_s = 0.0
    for block in ex.iter_blocks(path):
        for row in np.flatnonzero(block.index % EVERY == 0):
            sample = ex.Sample(block.row(row))
            seconds, check = timed(lambda sample=sample: sum_by_token(sample))
            assert np.isclose(check, sums[int(block.index[row])], rtol=1e-9)
            by_token_s += EVERY * seconds
    first = folder / "faulty" / "data" / "part-00000.parquet"
    first.parent.mkdir(parents=True)
    pq.write_table(rows_to_table([{**random_rows(1, tokens=4)[0], "num_tokens": 99}]), first)
    for number in range(1, FAULTS):
        shutil.copyfile(first, first.with_name(f"part-{number:05d}.parquet"))
    validate_s, report = timed(lambda: ex.validate_output(folder / "faulty"))
    assert report.counts["length"] >= FAULTS
    rows = random_rows(2000, tokens=20)
    order = np.random.default_rng(0).permutation(len(rows))
    for name, chosen in (("one", rows), ("two", [rows[i] for i in order])):
        write_output(folder / name, chosen, rows_per_shard=500, rows_per_group=500)
    compare_s, seen = timed(lambda: ex.compare_outputs(folder / "one", folder / "two"))
    assert seen.common_rows == len(rows)
    assert not seen.max_divergence
    return {
        "benchmark": "decode", "tokens": TOKENS, "entries": entries,
        "at_once_s": round(at_once_s, 3), "by_token_s": round(by_token_s, 3),
        "ratio": round(by_token_s / at_once_s, 1), "faulty_shards": FAULTS,
        "validate_s": round(validate_s, 2), "compare_permuted_s": round(compare_s, 2),
    }  # fmt: skip


def time_loader(folder: Path) -> int:
    """Return tokens per processor second of a data loader without workers."""
    dataset: Any = ex.LogitIterableDataset(folder)
    loader = torch.utils.data.DataLoader(dataset, batch_size=8, collate_fn=ex.collate_logits)
    positions = (batch["teacher_positions"] for batch in loader)
    seconds, done = timed(lambda: sum(int((p >= 0).sum()) for p in positions))
    return round(done / seconds)


def measure_loader(folder: Path) -> dict[str, Any]:
    torch.set_num_threads(1)
    shard = write_rows(folder / "default", LOADED)
    write_rows(folder / "compact", LOADED, compact=True)
    block = ex.decode_rows(pq.read_table(shard).slice(0, 64))
    tail = block.tail.logits.reshape(len(block.logsumexp), -1) - block.logsumexp[:, None]
    rest = np.exp(ex.sparse_teacher(block)["teacher_log_rest"].astype(np.float64))
    seconds, _ = timed(lambda: ex.weigh_tail(tail, rest))
    return {
        "benchmark": "loader", "tokens_per_cpu_s": time_loader(folder / "default"),
        "tokens_per_cpu_s_compact": time_loader(folder / "compact"),
        "tokens_per_cpu_s_weights_alone": round(len(tail) / seconds),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--loader", action="store_true", help="time a worker of a loader instead")
    measure = measure_loader if parser.parse_args().loader else measure_decoding
    with tempfile.TemporaryDirectory() as place:
        print(json.dumps({**measure(Path(place)), **machine()}))


if __name__ == "__main__":
    main()
