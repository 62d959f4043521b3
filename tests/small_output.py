"""Write small outputs that obey the format, from random distributions, without a model.

The distributions are like a teacher's: most positions nearly sure, some torn between many tokens.
`write_parts` makes a whole output folder, `write_output` one of version 0.1.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

import explore_logits as explore

Row = Mapping[str, Any]
SETTINGS: dict[str, Any] = {
    "format_version": 1, "model": "tests/teacher", "model_revision": None,
    "dataset": "tests/teacher/conversations.jsonl", "dataset_revision": None, "subset": None,
    "split": "train", "messages_col": "messages", "user_col": "question",
    "assistant_col": "answer", "system_col": None, "index_col": None,
    "chat_template_sha256": None,  # not known: write_output is given any template
    "include_think": False, "include_end": False, "top_p": 0.98, "top_p_max": 100,
    "sampled_n": 24, "seed": 42, "logit_bits": 16, "store_tokens": False, "max_seq_len": None,
    "dtype": "float32", "attn": "sdpa", "vocab_size": 600, "versions": {},
}  # fmt: skip
STORED: dict[str, Any] = SETTINGS | {"store_tokens": True}


def random_logits(rng: np.random.Generator, tokens: int, vocab: int) -> np.ndarray:
    """Return (tokens, vocab) float32 logits whose sharpness varies from sure to torn."""
    sharpness = rng.choice([0.6, 2.0, 4.0, 9.0], size=(tokens, 1))
    return (rng.standard_normal((tokens, vocab)) * sharpness).astype(np.float32)


def extract_row(
    logits: np.ndarray, settings: Row, rng: np.random.Generator, *, index: int
) -> dict[str, Any]:
    """Extract one row from its logits by the definition, token by token, in float64."""
    tops, tails, wide = [], [], logits.astype(np.float64)
    peak = wide.max(axis=1)
    logsumexp = peak + np.log(np.exp(wide - peak[:, None]).sum(axis=1))
    for row, total in zip(wide, logsumexp, strict=True):
        order = np.lexsort((np.arange(row.size), -row))
        covered = np.cumsum(np.exp(row[order] - total))
        size = int(np.searchsorted(covered, settings["top_p"] - 1e-15) + 1)
        size = max(1, min(size, settings["top_p_max"], row.size))
        rest = order[size:]
        race = row[rest] + rng.gumbel(size=rest.size)
        tops.append(order[:size])
        tails.append(rest[np.argsort(-race)][: settings["sampled_n"]])
    return {
        "index": index, "num_tokens": len(tops), **pack_entries("top", tops, logits, settings),
        "top_counts": [ids.size for ids in tops],
        **pack_entries("sampled", tails, logits, settings), "logsumexp": logsumexp.tolist(),
    }  # fmt: skip


def pack_entries(
    part: str, ids: Sequence[np.ndarray], logits: np.ndarray, settings: Row
) -> dict[str, Any]:
    """Pack one part, nucleus or tail, of every token."""
    flat = np.concatenate(ids)
    counts = np.array([part.size for part in ids])
    values = logits[np.repeat(np.arange(len(ids)), counts), flat]
    low, high = explore.pack_indices(flat)
    q, vmin, vmax = explore.quantize_logits(values, counts, bits=settings["logit_bits"])
    return {
        f"{part}_indices_low": low.tolist(), f"{part}_indices_high": high,
        f"{part}_logits_quantized": q.tolist(), f"{part}_min": vmin.tolist(),
        f"{part}_max": vmax.tolist(),
    }  # fmt: skip


def random_rows(
    count: int, *, settings: Row = SETTINGS, seed: int = 0, tokens: int = 12
) -> list[dict[str, Any]]:
    """Return rows of 1 to `tokens` tokens each, with the text's tokens when settings ask."""
    rng = np.random.default_rng(seed)
    rows = []
    for index in range(count):
        size = int(rng.integers(1, tokens + 1))
        logits = random_logits(rng, size, settings["vocab_size"])
        row = extract_row(logits, settings, rng, index=index)
        if settings["store_tokens"]:  # a prompt of three tokens and an answer drawn from the logits
            answer = (logits.astype(np.float64) + rng.gumbel(size=logits.shape)).argmax(axis=1)
            ids = np.concatenate([rng.integers(0, logits.shape[1], 3), answer]).tolist()
            row |= {"input_ids": ids, "token_positions": [*range(3, len(ids))]}
        rows.append(row)
    return rows


class Vocabulary:
    """A tokenizer whose first tokens are these texts; the others are words."""

    def __init__(self, texts: Sequence[str]) -> None:
        self.texts = texts

    def __len__(self) -> int:
        return SETTINGS["vocab_size"]

    def decode(self, ids: Sequence[int]) -> str:
        return self.texts[ids[0]] if ids[0] < len(self.texts) else f" w{ids[0]}"

    def convert_ids_to_tokens(self, token: int) -> str:
        return f"<{token}>"


def rows_to_table(rows: Sequence[Row], *, settings: Row = SETTINGS) -> pa.Table:
    """Return rows as a table with the schema and metadata of a shard."""
    how = {"store_tokens": settings["store_tokens"], "compact": "min_p" in settings}
    return pa.Table.from_pylist([*rows], schema=explore.shard_schema(**how, settings=settings))


def write_output(
    folder: Path, rows: Sequence[Row] | None = None, *, settings: Row = SETTINGS,
    rows_per_shard: int = 8, rows_per_group: int = 3, chat_template: str = "",
) -> Path:  # fmt: skip
    """Write an output folder as version 0.1 laid it out, several row groups to a shard."""
    rows = random_rows(20, settings=settings) if rows is None else rows
    (folder / "data").mkdir(parents=True, exist_ok=True)
    for part, first in enumerate(range(0, len(rows), rows_per_shard)):
        table = rows_to_table(rows[first : first + rows_per_shard], settings=settings)
        path = folder / "data" / f"part-{part:05d}.parquet"
        pq.write_table(table, path, row_group_size=rows_per_group, compression="zstd")
    (folder / "extraction_config.json").write_text(json.dumps(dict(settings)))
    (folder / "chat_template.jinja").write_text(chat_template)
    return folder


def write_parts(
    folder: Path, rows: Sequence[Row] | None = None, *, settings: Row = SETTINGS,
    skipped: Mapping[int, str] | None = None, rows_per_part: int = 8, first_part: int = 0,
    workers: int = 1,
) -> Path:  # fmt: skip
    """Write an output folder in parts, each with what it says of itself, and the checkpoints.

    Ids ascend; `skipped` is the reason by id of those that were selected and give no row.
    """
    settings = {**settings, "rows_per_part": rows_per_part}
    rows = random_rows(20, settings=settings) if rows is None else rows
    by_id, skipped = {row["index"]: row for row in rows}, skipped or {}
    selected = sorted([*by_id, *skipped])
    records: list[dict[str, Any]] = []
    for number, first in enumerate(range(0, len(selected), rows_per_part), first_part):
        ids = selected[first : first + rows_per_part]
        here = [by_id[i] for i in ids if i in by_id]
        counts = np.array([count for row in here for count in row["top_counts"]], np.int64)
        capped = int((counts == settings.get("top_p_max", 256)).sum())
        part = {
            "number": number, "ids": explore.hash_ids(ids), "conversations": len(ids),
            "skipped": {str(i): skipped[i] for i in ids if i in skipped}, "rows": len(here),
            "tokens": counts.size, "nucleus": int(counts.sum()), "capped": capped,
            "mass": 0.9 * counts.size, "actual": 0.5 * counts.size,
        }  # fmt: skip
        table = rows_to_table(here, settings=settings)
        metadata = {**table.schema.metadata, explore.METADATA_PART: json.dumps(part).encode()}
        path = folder / explore.part_path(number)
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(table.replace_schema_metadata(metadata), path, row_group_size=3)
        records.append({**part, "bytes": path.stat().st_size})
    for worker in range(workers):
        mine = [record for record in records if record["number"] % workers == worker]
        write_checkpoint(folder, mine, "" if workers == 1 else f"-w{worker:02d}")
    (folder / "extraction_config.json").write_text(json.dumps(settings))
    return folder


def write_checkpoint(folder: Path, records: Sequence[Row], suffix: str) -> None:
    """Write the checkpoint of a worker: what its parts say of themselves, by columns."""
    names = ("number", "ids", "conversations", "rows", "tokens", "bytes", "nucleus", "capped",
             "mass", "actual")  # fmt: skip
    parts = {name: [record[name] for record in records] for name in names}
    skipped = {str(record["number"]): record["skipped"].values() for record in records}
    reasons = {number: Counter(whys) for number, whys in skipped.items() if whys}
    content = {"format_version": 1, "parts": parts, "skipped": reasons}
    (folder / f"checkpoint{suffix}.json").write_text(json.dumps(content))
