"""Compact rows made by the extractor from logits at hand, as an output of one shard."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from explore_logits import hash_ids, part_path, shard_schema
from extract_logits import (
    Batch,
    EncodedRow,
    PackedBatch,
    cpu_postprocess_batch,
    extract_tokens,
    quantize_tokens,
    write_part,
)

SIZES: dict[str, Any] = {"top_p": 0.98, "top_p_max": 100, "sampled_n": 24}


def make_settings(vocab: int, min_p: float | None, bits: int = 16, seed: int = 7) -> dict[str, Any]:
    """Return what an output says of such rows."""
    kept = SIZES if min_p is None else {"min_p": min_p}
    settings = {"model": "none", "dataset": "none", "split": "train", "store_tokens": True}
    settings |= {"vocab_size": vocab, "logit_bits": bits, "seed": seed, "rows_per_part": 100}
    return {"format_version": 1 if min_p is None else 2, **settings, **kept}


def make_table(
    logits: torch.Tensor, sizes: list[int], *, min_p: float | None, bits: int = 16, seed: int = 7
) -> pa.Table:
    """Return rows of `sizes` tokens each, of (N, V) logits; conversations 0, 1, …

    The actual tokens are ids 0, 1, … of the vocabulary.
    """
    rows = []
    for index, size in enumerate(sizes):
        ids = np.arange(size + 1, dtype=np.int32) % logits.shape[1]
        rows.append(EncodedRow(index, ids, np.arange(1, size + 1, dtype=np.int32)))
    index = torch.from_numpy(np.repeat(np.arange(len(sizes)), sizes))
    position = torch.from_numpy(np.concatenate([row.token_positions for row in rows])).long()
    tokens = extract_tokens(logits, index, position, seed=seed, min_p=min_p, **SIZES)
    actual = logits.gather(1, (position % logits.shape[1]).unsqueeze(1)).squeeze(1).float()
    result = quantize_tokens(tokens, actual, bits=bits).to_host()
    settings = make_settings(logits.shape[1], min_p, bits, seed)
    schema = shard_schema(store_tokens=True, compact=min_p is not None, settings=settings)
    packed: PackedBatch = cpu_postprocess_batch(result, Batch(rows), schema=schema)
    assert not packed.unusable
    return packed.table


def write_output(folder: Path, table: pa.Table) -> Path:
    """Write rows as an output of one part; return the folder."""
    metadata = table.schema.metadata
    names = [name for name in table.column_names if not name.startswith("_")]
    rows = table.select(names)
    counts = np.concatenate([np.zeros(0), *rows["top_counts"].to_pylist()])
    settings = json.loads(metadata[b"logits.extraction"])
    part = {
        "number": 0, "ids": hash_ids(rows["index"].to_pylist()),
        "conversations": rows.num_rows, "rows": rows.num_rows, "tokens": counts.size,
        "nucleus": int(counts.sum()),
        "capped": int((counts == settings.get("top_p_max", 256)).sum()),
        "mass": float(np.sum(table["_mass"])), "actual": float(np.sum(table["_actual"])),
        "skipped": {},
    }  # fmt: skip
    schema = pa.schema(rows.schema, {**metadata, b"logits.part": json.dumps(part).encode()})
    path = folder / part_path(0)
    path.parent.mkdir(parents=True)
    write_part(path, rows.replace_schema_metadata(schema.metadata), schema)
    path.with_name(f"{path.name}.sha256").unlink()
    (folder / "extraction_config.json").write_text(json.dumps(settings))
    return folder
