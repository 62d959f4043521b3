"""Section 6 of `extract_logits.py`: results become Arrow rows, beside the next forward."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import oracle
import pytest

import extract_logits
from explore_logits import shard_schema
from extract_logits import AsyncPostProcessor, Batch, EncodedRow, GPUBatchResult


def random_batch(rng: np.random.Generator, sizes: list[int]) -> Batch:
    """Return conversations of sizes[i] extracted tokens each, at ascending places."""
    rows = []
    for number, size in enumerate(sizes):
        length = size + int(rng.integers(1, 30))
        positions = 1 + np.sort(rng.choice(length - 1, size, replace=False))
        ids = rng.integers(0, 2**18, length)
        rows.append(EncodedRow(17 * number - 5, ids.astype(np.int32), positions.astype(np.int32)))
    return Batch(rows)


def random_result(rng: np.random.Generator, n: int, k: int, m: int) -> GPUBatchResult:
    """Return a host result of n tokens; entries beyond a token's count hold other numbers."""
    parts: dict[str, Any] = {}
    for part, width in (("top", k), ("sampled", m)):
        parts[f"{part}_ids"] = rng.integers(0, 2**18, (n, width)).astype(np.int32)
        parts[f"{part}_q"] = rng.integers(0, 65536, (n, width)).astype(np.int32)
        for end in ("min", "max"):
            parts[f"{part}_{end}"] = rng.normal(size=n).astype(np.float32)
    logsumexp = rng.normal(20, 2, n)
    return GPUBatchResult(
        **parts, logsumexp=logsumexp, nucleus_mass=rng.uniform(0.9, 1, n),
        top_counts=rng.integers(1, k + 1, n).astype(np.int32),
        sampled_counts=np.full(n, m, np.int32), usable=np.ones(n, bool),
        actual_logits=(logsumexp - rng.exponential(3, n)).astype(np.float32),
    )  # fmt: skip


@pytest.mark.parametrize(("k", "m"), [(1, 0), (7, 1), (255, 24)])
@pytest.mark.parametrize(
    ("sizes", "bad"),
    [([1, 1, 1], []), ([], []), *(([3, 1, 40, 2, 6], bad) for bad in ([], [1, 3, 4], [0, 1]))],
)
def test_packing_loses_nothing_of_a_batch(sizes, bad, k, m):
    """Rows with an unusable token are left out and handed back."""
    rng = np.random.default_rng([k, m, *sizes, *bad])
    batch, result = random_batch(rng, sizes), random_result(rng, sum(sizes), k, m)
    starts = np.cumsum([0, *sizes])
    for row in bad:
        token = int(rng.integers(starts[row], starts[row + 1]))
        result.usable[token] = False
        result.logsumexp[token] = result.actual_logits[token] = np.nan
    schema = shard_schema(store_tokens=True)
    packed = extract_logits.cpu_postprocess_batch(result, batch, schema=schema)
    assert packed.table.select(schema.names).schema.equals(schema, check_metadata=True)
    assert [row.index for row in packed.unusable] == [batch.rows[row].index for row in bad]
    good = [n for n in range(len(sizes)) if n not in bad]
    for n, record in zip(good, packed.table.to_pylist(), strict=True):
        tokens, conversation = slice(starts[n], starts[n + 1]), batch.rows[n]
        chances = np.exp(result.actual_logits[tokens] - result.logsumexp[tokens])
        sums = (record.pop("_mass"), record.pop("_actual"))
        assert sums == pytest.approx((result.nucleus_mass[tokens].sum(), chances.sum()), rel=1e-6)
        row = oracle.unpack_row(record, oracle.Settings(sampled_n=m))
        assert (row["index"], row["num_tokens"]) == (conversation.index, sizes[n])
        assert row["input_ids"] == conversation.input_ids.tolist()
        assert row["token_positions"] == conversation.token_positions.tolist()
        assert row["logsumexp"] == result.logsumexp[tokens].tolist()
        for t in range(sizes[n]):
            at, count = starts[n] + t, result.top_counts[starts[n] + t]
            for kind, entries, size in (
                ("top", row["top"][t], count),
                ("sampled", row["tail"][t], m),
            ):
                ids, q, low, high = (getattr(result, f"{kind}_{part}")[at]
                                     for part in ("ids", "q", "min", "max"))  # fmt: skip
                assert (entries.ids, entries.q) == (ids[:size].tolist(), q[:size].tolist())
                assert not size or (entries.low, entries.high) == (low, high)


def test_depth_results_are_processed_beside_the_caller_and_submit_waits_for_more():
    gates = [threading.Event() for _ in range(3)]
    meeting = threading.Barrier(3, timeout=30)

    def process(number: int) -> bool:
        if number < 2:
            meeting.wait()
        return gates[number].wait(timeout=30)

    delivered: list[bool] = []
    post = AsyncPostProcessor(process, delivered.append, depth=2)
    post.submit(0)
    post.submit(1)
    meeting.wait()  # both wait for this thread
    threading.Timer(0.1, gates[0].set).start()
    post.submit(2)
    assert gates[0].is_set()
    assert delivered == [True]
    threading.Timer(0.05, lambda: [gate.set() for gate in gates]).start()
    post.flush()  # of two that are under way
    post.shutdown()
    assert delivered == [True] * 3


@pytest.mark.parametrize("by", ["submit", "flush", "delivery"])
def test_an_error_in_the_background_or_of_delivery_is_raised_in_the_loop(by):
    def divide(number: float) -> float:
        return 1 / number

    delivered: list[float] = []
    post = AsyncPostProcessor(divide, divide if by == "delivery" else delivered.append, depth=1)
    post.submit(1)
    post.submit(float("inf") if by == "delivery" else 0)
    with pytest.raises(ZeroDivisionError):
        post.submit(2) if by == "submit" else post.flush()
    assert delivered == ([] if by == "delivery" else [1.0])
    post.shutdown()  # drops what was not delivered
