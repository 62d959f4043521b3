"""Rows of the shard format with made-up content, for tests that only store and deliver them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import pyarrow as pa

from explore_logits import SCHEMA, pack_indices, quantize_logits

SETTINGS: dict[str, Any] = {
    "format_version": 1, "model": "user/teacher", "model_revision": "0123abcd",
    "dataset": "user/chats", "split": "train", "top_p": 0.98, "top_p_max": 20, "sampled_n": 4,
    "seed": 42, "rows_per_part": 10, "versions": {"torch": "2"},
}  # fmt: skip
MEASURED = (pa.field("_mass", pa.float64()), pa.field("_actual", pa.float64()))


def make_row(index: int, tokens: int | None = None) -> dict[str, Any]:
    """Return one row whose content depends on its index only."""
    rng = np.random.default_rng(index % 2**32)
    tokens = int(rng.integers(3, 12)) if tokens is None else tokens
    counts = rng.integers(1, 21, tokens)
    row = {"index": index, "num_tokens": tokens, "top_counts": counts,
           "logsumexp": rng.normal(size=tokens) + 20, "_mass": 0.99 * tokens,
           "_actual": 0.5 * tokens}  # fmt: skip
    for kind, sizes in (("top", counts), ("sampled", np.full(tokens, 4))):
        ids = pack_indices(rng.integers(0, 2**18, sizes.sum()))
        parts = (*ids, *quantize_logits(rng.normal(size=sizes.sum()), sizes))
        names = ("indices_low", "indices_high", "logits_quantized", "min", "max")
        row |= {f"{kind}_{name}": part for name, part in zip(names, parts, strict=True)}
    return row


def make_rows(indices: Iterable[int], *, tokens: int | None = None) -> pa.Table:
    """Return a table of rows, with what extraction measures of each."""
    rows = [make_row(index, tokens) for index in indices]
    return pa.Table.from_pylist(rows, schema=pa.schema([*SCHEMA, *MEASURED]))


def stored(ids: Iterable[int]) -> dict[int, dict[str, Any]]:
    """Return the rows that a reader of an output finds, by id."""
    return {row["index"]: row for row in make_rows(ids).select(SCHEMA.names).to_pylist()}
