"""Decode the nuclei of 1,000,000 stored tokens, all at once and token by token.

    python tests/tools/bench_decode.py [--tokens 1000000] [--faults 10000]

Writes one shard of random rows, reads it back and prints one JSON line, whose times are of the
processor, so that other jobs hardly matter: seconds for the million tokens by whole rows (ids,
logits and probabilities), and for the same by a loop over tokens, which is timed on every 20th row
and scaled up. Both must give the same sums before a time is printed. Then seconds for
`validate_output` of as many faulty shards, of which each holds one row, and for `compare_outputs`
of two outputs of 2,000 rows in different orders.
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS.parent), str(TESTS)]

from small_output import random_rows, rows_to_table, write_output  # noqa: E402 - as below

from explore_logits import (  # noqa: E402 - run as a script, from anywhere
    FormatError,
    Sample,
    compare_outputs,
    dequantize_top_logits,
    iter_blocks,
    logits_to_probs,
    pack_indices,
    shard_schema,
    validate_output,
)

ROW_TOKENS = 1000


def write_shard(path: Path, tokens: int) -> None:
    """Write rows of 1,000 tokens whose nuclei hold 1 to 100 entries, 28 on average, and no tail."""
    rng = np.random.default_rng(0)
    schema = shard_schema(settings={"top_p": 0.98, "top_p_max": 100, "sampled_n": 0})
    with pq.ParquetWriter(path, schema, compression="zstd") as writer:
        for index in range(tokens // ROW_TOKENS):
            counts = np.minimum(rng.geometric(1 / 34, ROW_TOKENS), 100)
            entries = int(counts.sum())
            low, high = pack_indices(rng.integers(0, 151_936, entries))
            ranges = rng.normal(10, 3, (2, ROW_TOKENS)).astype(np.float32)
            row = {
                "index": index, "num_tokens": ROW_TOKENS, "top_indices_low": low,
                "top_indices_high": high, "top_logits_quantized": rng.integers(0, 65536, entries),
                "top_counts": counts, "top_min": ranges.min(axis=0), "top_max": ranges.max(axis=0),
                "sampled_indices_high": b"", "logsumexp": ranges.max(axis=0) + 0.1,
                **{f"sampled_{n}": [] for n in ("indices_low", "logits_quantized", "min", "max")},
            }  # fmt: skip
            writer.write_table(pa.Table.from_pylist([row], schema=schema))


def decode_at_once(path: Path) -> tuple[float, float, int]:
    """Return seconds, a checksum of all rows, and the number of entries."""
    start, check, entries = time.process_time(), 0.0, 0
    for block in iter_blocks(path):
        check += float(block.top.probs.sum()) + float(block.top.ids.sum(dtype=np.int64))
        entries += block.top.ids.size
    return time.process_time() - start, check, entries


def decode_by_token(path: Path, every: int) -> tuple[float, float]:
    """Return seconds per row and a checksum, from a loop over the tokens of every so many rows."""
    seconds, check, rows = 0.0, 0.0, 0
    for block in iter_blocks(path):
        chosen = [row for row, index in enumerate(block.index) if index % every == 0]
        samples = [Sample(block.row(row)) for row in chosen]
        start = time.process_time()
        for sample in samples:
            for t in range(sample["num_tokens"]):
                ids, logits = dequantize_top_logits(sample, t)
                check += float(logits_to_probs(logits, sample["logsumexp"][t]).sum())
                check += float(ids.sum(dtype=np.int64))
        seconds += time.process_time() - start
        rows += len(samples)
    return seconds / max(rows, 1), check


def check_sum(path: Path, every: int) -> float:
    """Return the checksum of every so many rows, decoded at once."""
    total = 0.0
    for block in iter_blocks(path):
        owner = np.repeat(np.arange(block.index.size), block.num_tokens)
        kept = np.repeat((block.index % every == 0)[owner], block.top.counts)
        total += float(block.top.probs[kept].sum())
        total += float(block.top.ids[kept].sum(dtype=np.int64))
    return total


def time_validation(folder: Path, faults: int) -> float:
    """Return the seconds that it takes to validate an output of faulty shards."""
    table = rows_to_table([{**random_rows(1, tokens=4)[0], "num_tokens": 99}])
    first = folder / "data" / "part-00000.parquet"
    first.parent.mkdir(parents=True)
    pq.write_table(table, first)
    for number in range(1, faults):
        shutil.copyfile(first, first.with_name(f"part-{number:05d}.parquet"))
    start = time.process_time()
    report = validate_output(folder)
    seconds = time.process_time() - start
    if report.counts["length"] < faults:
        raise FormatError(f"{report.counts} of {faults} faults were found")
    return seconds


def time_comparison(folder: Path) -> float:
    """Return the seconds that it takes to compare two outputs of other orders."""
    rows = random_rows(2000, tokens=20)
    order = np.random.default_rng(0).permutation(len(rows))
    for name, chosen in (("one", rows), ("two", [rows[i] for i in order])):
        write_output(folder / name, chosen, rows_per_shard=500, rows_per_group=500)
    start = time.process_time()
    seen = compare_outputs(folder / "one", folder / "two")
    if seen.common_rows != len(rows) or seen.max_divergence:
        raise FormatError(f"equal outputs differ: {seen}")
    return time.process_time() - start


def main() -> None:
    """Run the benchmark and print its JSON line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=1_000_000)
    parser.add_argument("--faults", type=int, default=10_000, help="shards to validate")
    args = parser.parse_args()
    tokens = args.tokens
    every = 20 if tokens >= 100_000 else 1
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "part-00000.parquet"
        write_shard(path, tokens)
        at_once, _, entries = decode_at_once(path)
        per_row, check = decode_by_token(path, every)
        if not np.isclose(check, check_sum(path, every), rtol=1e-9):
            raise FormatError("the two ways do not decode the same")
        validating = time_validation(Path(folder) / "faulty", args.faults)
        comparing = time_comparison(Path(folder))
    by_token = per_row * (tokens / ROW_TOKENS)
    print(json.dumps({
        "benchmark": "decode", "tokens": tokens, "entries": entries, "at_once_s": round(at_once, 3),
        "by_token_s": round(by_token, 3), "ratio": round(by_token / at_once, 1),
        "faulty_shards": args.faults, "validate_s": round(validating, 2),
        "compare_permuted_s": round(comparing, 2), "python": platform.python_version(),
        "numpy": np.__version__, "machine": platform.machine(),
    }))  # fmt: skip


if __name__ == "__main__":
    main()
