"""Read, decode, check and picture compressed teacher logits.

    shards (Parquet, local or Hub) ──open──► sample ──decode──► ids, logits, probabilities
                                                └──align with the text──► tables, HTML, plots

This file is also the ground floor of the suite: it holds the format (schema, pack, unpack,
quantize, dequantize) and the conversation alignment (which tokens are the assistant's), and
`compute_lengths` and `extract_logits` import both from here. Importing it needs the standard
library, numpy and pyarrow only.

Letters: S sequence length, N extracted tokens, V vocabulary size, K nucleus cap, M tail samples
per token, B sequences in a batch.

    python explore_logits.py OUTPUT --sample 3
    python explore_logits.py OUTPUT --validate
"""

from __future__ import annotations

import os
import signal
import sys

# As a script and as an installed command: Ctrl-C while libraries load leaves without a traceback.
if __name__ == "__main__" or sys.argv[0].endswith("explore-logits"):
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))

import argparse
import base64
import contextlib
import difflib
import errno
import functools
import hashlib
import html
import importlib
import importlib.util
import io
import itertools
import json
import logging
import lzma
import math
import re
import shutil
import tempfile
import textwrap
import unicodedata
import zlib
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import datetime
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, NoReturn

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

__all__ = [
    "SCHEMA",
    "LogitIterableDataset",
    "LogitsError",
    "NucleusSizeStats",
    "analyze_nucleus_sizes",
    "analyze_token_probabilities",
    "collate_logits",
    "compare_outputs",
    "compute_bytes_per_token_stats",
    "compute_dataset_stats",
    "decode_top_tokens",
    "dequantize_all_logits",
    "dequantize_logits",
    "dequantize_sampled_logits",
    "dequantize_top_logits",
    "distillation_loss",
    "execute_analysis",
    "export_axolotl",
    "export_distillkit",
    "flat_positions",
    "get_nucleus_probability_mass",
    "get_sample",
    "iter_samples",
    "load_extraction_config",
    "load_logit_dataset",
    "load_tokenizer",
    "logits_to_probs",
    "open_text",
    "pack_indices",
    "plot_logit_distribution",
    "plot_nucleus_size_analysis",
    "plot_nucleus_sizes",
    "plot_nucleus_vs_sampled",
    "print_dataset_stats",
    "print_sample_info",
    "print_top_tokens",
    "quantize_logits",
    "quick_explore",
    "render_page",
    "unpack_indices",
    "validate_output",
    "visualize_conversation_probabilities",
]


def __dir__() -> list[str]:
    """Let completion in a notebook offer what a notebook needs; everything else can be imported."""
    return [*__all__]


log = logging.getLogger("explore_logits")


class LogitsError(Exception):
    """Anything the user can act on: bad input, a bad file, a refused request. Shown as one line."""

    def __str__(self) -> str:
        return show_line(super().__str__())


class FormatError(LogitsError):
    """A file or an array is not in the shard format; met when reading foreign or damaged shards."""


EXTRAS: dict[str | None, tuple[str, ...]] = {"viz": ("matplotlib", "seaborn", "termcolor")}


def import_extra(module: str, extra: str | None = None) -> Any:
    """Import a package that only some functions need; when missing, name what brings it."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        package = module.split(".")[0]
        if (error.name or "").split(".")[0] != package:
            raise
        # The project is on no index, so its extras come from its own folder where that is known.
        folder = Path(__file__).resolve().parent
        beside = extra is not None and (folder / "pyproject.toml").is_file()
        brings = f"-e '{folder}[{extra}]'" if beside else " ".join(EXTRAS.get(extra, (package,)))
        raise LogitsError(f"{package} is needed for this: pip install {brings}") from error


def plural(count: int, noun: str) -> str:
    """Write a count and its noun: `1 token`, `2,000 tokens`."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def show_line(text: str) -> str:
    """Write text from anywhere on one line, without what acts on a terminal or opens the Hub."""
    return hide_tokens(show_text(re.sub(r"\s*\n\s*", " ", text.strip())))


def hide_tokens(text: str) -> str:
    """Replace access tokens of the Hub, whoever echoed them."""
    hub = sys.modules.get("huggingface_hub")
    if hub is not None and (token := hub.get_token()):
        text = text.replace(token, "***")
    return re.sub(r"\b(hf|api_org)_\w{6,}", "***", text)


def first_line(error: BaseException) -> str:
    """Return the first line of what an error says, or its type when it says nothing."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


# --------------------------------------------------------------------------------------------------
# 1 Format
# --------------------------------------------------------------------------------------------------

FORMAT_VERSION = 1
MAX_TOKEN_ID = 2**18 - 1  # 16 bits in *_indices_low, 2 in *_indices_high
METADATA_VERSION = b"logits.format_version"
METADATA_SETTINGS = b"logits.extraction"  # JSON object: the settings of the run
METADATA_PART = b"logits.part"  # JSON object: number, ids, skipped conversations and sums of a part
METADATA_LENGTHS = b"logits.lengths"  # JSON object: what a lengths file was measured with

_U16_LIST = pa.list_(pa.uint16())
_F32_LIST = pa.list_(pa.float32())
_I32_LIST = pa.list_(pa.int32())

SCHEMA = pa.schema(
    [
        ("index", pa.int32()),
        ("num_tokens", pa.int32()),
        ("top_indices_low", _U16_LIST),
        ("top_indices_high", pa.binary()),
        ("top_logits_quantized", _U16_LIST),
        ("top_counts", pa.list_(pa.uint8())),
        ("top_min", _F32_LIST),
        ("top_max", _F32_LIST),
        ("sampled_indices_low", _U16_LIST),
        ("sampled_indices_high", pa.binary()),
        ("sampled_logits_quantized", _U16_LIST),
        ("sampled_min", _F32_LIST),
        ("sampled_max", _F32_LIST),
        ("logsumexp", pa.list_(pa.float64())),
    ]
)
TOKEN_FIELDS = (pa.field("input_ids", _I32_LIST), pa.field("token_positions", _I32_LIST))
LENGTHS_SCHEMA = pa.schema(
    [("index", pa.int32()), ("length", pa.int32()), ("num_tokens", pa.int32())]
)


def shard_schema(
    *, store_tokens: bool = False, settings: Mapping[str, Any] | None = None
) -> pa.Schema:
    """Return the schema of a shard, with the settings of the run in its key-value metadata.

    `store_tokens` appends `input_ids` and `token_positions` (`TOKEN_FIELDS`). `settings` is stored
    as JSON with sorted keys, so equal settings give equal bytes.
    """
    schema = pa.schema([*SCHEMA, *TOKEN_FIELDS]) if store_tokens else SCHEMA
    if settings is None:
        return schema
    return schema.with_metadata(
        {
            METADATA_VERSION: str(FORMAT_VERSION).encode(),
            METADATA_SETTINGS: json.dumps(dict(settings), sort_keys=True).encode(),
        }
    )


def pack_indices(ids: npt.ArrayLike) -> tuple[npt.NDArray[np.uint16], bytes]:
    """Split token ids into their low 16 bits and their packed bits 16-17.

    Args:
        ids: (n,) integers in 0..262,143, any number of tokens flattened.

    Returns:
        `low`, (n,) uint16, and `high`, ceil(n / 4) bytes: four ids a byte, the first in bits 0-1,
        zero padded.

    Raises:
        FormatError: an id is negative or above 262,143; nothing is ever wrapped.
    """
    full = np.asarray(ids).reshape(-1)
    if full.size == 0:
        return np.zeros(0, np.uint16), b""
    if not np.issubdtype(full.dtype, np.integer):
        raise FormatError(f"token ids must be integers, got {full.dtype}")
    if int(full.min()) < 0 or int(full.max()) > MAX_TOKEN_ID:
        bad = int(full.max()) if int(full.max()) > MAX_TOKEN_ID else int(full.min())
        raise FormatError(
            f"token id {bad} does not fit the format, which holds ids 0..{MAX_TOKEN_ID}"
        )
    low = (full & 0xFFFF).astype(np.uint16)
    bits = np.zeros(-(-full.size // 4) * 4, np.uint8)
    bits[: full.size] = full >> 16
    quads = bits.reshape(-1, 4)
    high = quads[:, 0] | quads[:, 1] << 2 | quads[:, 2] << 4 | quads[:, 3] << 6
    return low, high.astype(np.uint8).tobytes()


def unpack_indices(
    low: npt.ArrayLike, high: bytes | npt.NDArray[np.uint8], counts: npt.ArrayLike | None = None
) -> Any:
    """Join packed token ids again: the inverse of `pack_indices`.

    Args:
        low: (n,) low 16 bits.
        high: ceil(n / 4) bytes of bits 16-17.
        counts: ids per token; when given, must sum to n.

    Returns:
        (n,) int32, or with `counts` a list of one int32 array per token.

    Raises:
        FormatError: `high` or `counts` does not match `low`.
    """
    low16 = np.asarray(low, np.uint16).reshape(-1)
    packed = np.frombuffer(high, np.uint8)
    if packed.size != -(-low16.size // 4):
        raise FormatError(
            f"{low16.size} ids need {-(-low16.size // 4)} high bytes, found {packed.size}"
        )
    quads = np.empty((packed.size, 4), np.int32)
    for slot in range(4):
        quads[:, slot] = (packed >> (2 * slot)) & 3
    full = low16.astype(np.int32) | (quads.reshape(-1)[: low16.size] << 16)
    if counts is None:
        return full
    per_token = np.asarray(counts, np.int64).reshape(-1)
    if int(per_token.sum()) != full.size:
        raise FormatError(f"counts sum to {int(per_token.sum())}, but there are {full.size} ids")
    return np.split(full, np.cumsum(per_token)[:-1]) if per_token.size else []


def quantize_logits(
    logits: npt.ArrayLike, counts: npt.ArrayLike | None = None, *, bits: int = 16
) -> tuple[npt.NDArray[np.uint16], npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Quantize logits to 16 bits over each token's own range.

    `q = round((x - min) / (max - min) * 65535)`, and 0 where all are equal. With `bits` below 16
    only 2**bits of the 65,536 levels occur (the end points always do), so files compress better.

    Args:
        logits: (n,) finite logits, the tokens flattened.
        counts: logits per token, each at least 1; None: all belong to one token.
        bits: resolution kept, 4..16.

    Returns:
        (n,) uint16, and the per-token minimum and maximum, float32.

    Raises:
        FormatError: a logit is not finite; names it.
    """
    values = np.asarray(logits, np.float32).reshape(-1)
    strange = np.flatnonzero(~np.isfinite(values))
    if strange.size:
        raise FormatError(
            f"logit {strange[0]} of {values.size} is {values[strange[0]]}: only finite ones are "
            "stored, so leave the token out"
        )
    per_token = np.asarray([values.size] if counts is None else counts, np.int64).reshape(-1)
    if values.size == 0:
        return np.zeros(0, np.uint16), np.zeros(0, np.float32), np.zeros(0, np.float32)
    starts = np.concatenate(([0], np.cumsum(per_token)[:-1]))
    vmin = np.minimum.reduceat(values, starts)
    vmax = np.maximum.reduceat(values, starts)
    low = np.repeat(vmin.astype(np.float64), per_token)
    span = np.repeat(vmax.astype(np.float64) - vmin.astype(np.float64), per_token)
    part = np.divide(values - low, span, out=np.zeros_like(low), where=span > 0)
    levels = 2**bits - 1
    quantized = np.rint(np.rint(part * levels) * (65535 / levels))
    return quantized.astype(np.uint16), vmin, vmax


def dequantize_logits(
    q: npt.ArrayLike, vmin: npt.ArrayLike, vmax: npt.ArrayLike
) -> npt.NDArray[np.float64]:
    """Undo `quantize_logits`: `q / 65535 * (max - min) + min`, float64, broadcast over arrays."""
    low = np.asarray(vmin, np.float64)
    high = np.asarray(vmax, np.float64)
    return np.asarray(q, np.float64) / 65535 * (high - low) + low


# --------------------------------------------------------------------------------------------------
# 2 Source
# --------------------------------------------------------------------------------------------------
#
#     open_source ──row──► read_conversation ──► messages, tools, arguments of the template

Messages = list[dict[str, Any]]
Span = tuple[int, int]


class ConversationError(LogitsError):
    """One conversation cannot be used; the run counts it under `reason` and goes on."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(reason, message)  # both, so that it survives the way out of a process
        self.reason = reason

    def __str__(self) -> str:
        return show_line(str(self.args[1]))


class SourceError(LogitsError):
    """The dataset cannot be opened or read; met before the first conversation is."""


class TemplateError(LogitsError):
    """The template or tokenizer gives no way to find the assistant's tokens; no row could work."""


# Columns ------------------------------------------------------------------------------------------

MESSAGE_COLUMNS = ("messages", "conversations", "conversation")
PAIR_COLUMNS = (  # usual names of a question and its answer
    *itertools.product(("prompt",), ("completion", "response", "chosen")),
    *itertools.product(("instruction",), ("output", "response")),
)
CONTEXT_COLUMN = "input"  # beside Alpaca's `instruction`: what the instruction is about


@dataclass(frozen=True)
class ConversationColumns:
    """Which columns of the source hold the conversation: messages, a question and answer, or text.

    `user` and `assistant` may hold text or lists of messages; `context` is added to the user's
    text, `system` comes before everything.
    """

    messages: str | None = None
    user: str | None = None
    assistant: str | None = None
    system: str | None = None
    index: str | None = None
    context: str | None = None
    text: str | None = None

    def settings(self) -> dict[str, str | None]:
        """Return the columns under the names that a run's settings give them."""
        return {f"{name}_col": value for name, value in asdict(self).items()}

    def needed(self) -> set[str]:
        """Return all columns of the source that a conversation is read from."""
        named = {name for name in asdict(self).values() if name is not None}
        return named | {"tools", "chat_template_kwargs"}

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> ConversationColumns:
        """Take the columns out of a run's settings; those of version 0.1 name idle ones, too."""
        columns = cls(*(settings.get(name) for name in cls().settings()))
        if columns.messages is None or "text_col" in settings:
            return columns
        return cls(columns.messages, index=columns.index)


def resolve_columns(
    names: Iterable[str],
    *,
    messages_col: str | None = None,
    user_col: str = "question",
    assistant_col: str = "answer",
    system_col: str | None = None,
    index_col: str | None = None,
    text_col: str | None = None,
) -> ConversationColumns:
    """Decide which columns hold the conversation; every option that is given is used or refused.

    In this order: `text_col`; `messages_col`; `user_col` with `assistant_col` where they were
    changed from their defaults; a column with a usual name (`MESSAGE_COLUMNS`); those two columns
    as they are by default; usual pairs (`PAIR_COLUMNS`).

    Raises:
        SourceError: a named column is not there, two options exclude each other, or there is
            nothing usual; names the columns there are.
    """
    have = list(names)
    pair = (user_col, assistant_col)
    asked = pair != ("question", "answer")
    given = {"--text-col": text_col, "--messages-col": messages_col, "--system-col": system_col,
             "--index-col": index_col}  # fmt: skip
    if asked:
        given |= {"--user-col": user_col, "--assistant-col": assistant_col}
    for flag, name in given.items():
        if name is not None and name not in have:
            raise SourceError(f"no column {name!r} ({flag}); the dataset has {', '.join(have)}")
    ways = [flag for flag in ("--text-col", "--messages-col", "--user-col") if given.get(flag)]
    if len(ways) > 1:
        raise SourceError(f"{' and '.join(ways)} exclude each other: give one of them")
    if text_col is not None:
        if system_col is not None:
            raise SourceError("--system-col belongs to a conversation, not to --text-col")
        return ConversationColumns(text=text_col, index=index_col)
    usual = next((name for name in MESSAGE_COLUMNS if name in have), None)
    if messages_col or (usual and not asked):
        return ConversationColumns(messages_col or usual, system=system_col, index=index_col)
    for user, assistant in (pair,) if asked else (pair, *PAIR_COLUMNS):
        if user in have and assistant in have:
            context = CONTEXT_COLUMN if user == "instruction" and CONTEXT_COLUMN in have else None
            return ConversationColumns(None, user, assistant, system_col, index_col, context)
    raise SourceError(
        f"no conversations: neither a column {', '.join(MESSAGE_COLUMNS)} (--messages-col) nor "
        f"{user_col!r} with {assistant_col!r} (--user-col, --assistant-col) or a usual pair such "
        f"as prompt with completion (--text-col for plain text); the dataset has {', '.join(have)}"
    )


def source_id(row: Mapping[str, Any], number: int, columns: ConversationColumns) -> int:
    """Return the `index` of a row: its number in the source, or the value of the index column.

    Raises:
        SourceError: the value is not an integer of 32 bits; names row and value.
    """
    if columns.index is None:
        return number
    value = row.get(columns.index)
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, (int, np.integer)):
        raise SourceError(
            f"row {number}: {columns.index!r} is {value!r:.40}, not an integer (--index-col)"
        )
    if not -(2**31) <= int(value) < 2**31:
        raise SourceError(f"row {number}: {columns.index!r} is {value}: over 32 bits (--index-col)")
    return int(value)


# Opening ------------------------------------------------------------------------------------------
#
# JSON is read here, line by line, whether streamed or not: nulls stay what they were written as,
# and a bad line is named when it is met. Everything else is read by `datasets`.

_KINDS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}
_COMPRESSED = (".gz", ".zst", ".bz2", ".xz")
_ROWS_LOOKED_AT = 5000  # for the columns of JSON, which names none beforehand


def open_source(
    dataset: str,
    *,
    subset: str | None = None,
    split: str = "train",
    streaming: bool = False,
    revision: str | None = None,
    integers: Sequence[str | None] = (),
) -> Any:
    """Open one split of a chat dataset: a `datasets.Dataset`, or a `Stream` of its rows.

    Args:
        dataset: Hub id, or a local .jsonl, .json, .parquet or .csv file (also compressed), a folder
            of them, or a folder written by `save_to_disk`.
        subset: configuration of a Hub dataset.
        split: name of the split; `train[:100]` slices too when not streaming.
        streaming: never hold the source in memory or write it to a cache.
        revision: branch, tag or commit of a Hub dataset.
        integers: columns of CSV files that hold integers; all others are read as text.

    Raises:
        SourceError: nothing there, no such split (names those there are), an unreadable file
            (names file and line or column), the Hub out of reach.
    """
    datasets, path = import_extra("datasets"), Path(dataset).expanduser()
    how: dict[str, Any] = {"split": split, "streaming": streaming}
    if not path.exists():
        if dataset.startswith((".", "/", "~")) or _kind_of(path) is not None:
            raise SourceError(f"dataset {dataset!r}: no such file or folder")
        with _load_errors(dataset, split=split, subset=subset):
            loaded = datasets.load_dataset(dataset, name=subset, revision=revision, **how)
        return Stream(loaded, dataset) if streaming else loaded
    if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
        loaded = datasets.load_from_disk(str(path))
        splits = loaded if isinstance(loaded, dict) else {"train": loaded}
        chosen = _choose_split(str(path), split, splits)
        return Stream(chosen.to_iterable_dataset(), str(path)) if streaming else chosen
    files = _choose_split(str(path), split, _find_files(path, subset))
    kind = _kind_of(Path(files[0]))
    if kind == "json":
        return _open_json(files, str(path), **how)
    columns = _table_columns(files, str(kind))
    if kind == "csv":  # cells as they are written: 007, 1.50 and NA are text, an empty one is null
        kinds = {name: "int64" if name in integers else "string" for name in columns}
        features = datasets.Features({n: datasets.Value(of_n) for n, of_n in kinds.items()})
        how |= {"keep_default_na": False, "na_values": [""], "features": features}
    with _load_errors(str(path)):
        name = re.split(r"[\[+]", split)[0]
        loaded = datasets.load_dataset(kind, data_files={name: files}, **how)
    return Stream(loaded, str(path)) if streaming else loaded


def _kind_of(path: Path) -> str | None:
    """Return the kind of a file by its name, None when it is no known one."""
    suffixes = [s for s in path.suffixes if s not in _COMPRESSED]
    return _KINDS.get(suffixes[-1]) if suffixes else None


def _find_files(path: Path, subset: str | None) -> Mapping[str, Sequence[str]]:
    """Return the files of a local dataset by split."""
    found = [path] if path.is_file() else sorted(f for f in path.rglob("*") if f.is_file())
    found = [file for file in found if _kind_of(file)]
    if not found:
        what = "unknown kind of file, expected" if path.is_file() else "no file in this folder is"
        raise SourceError(f"dataset {str(path)!r}: {what} {', '.join(_KINDS)}")
    if ".zst" in {file.suffix for file in found} and not importlib.util.find_spec("zstandard"):
        raise SourceError(f"dataset {str(path)!r}: pip install zstandard to read it")
    if path.is_file() and path.stat().st_size == 0:
        raise SourceError(f"dataset {str(path)!r}: the file is empty")
    if path.is_file():
        return {"train": [str(path)]}
    with _load_errors(str(path), subset=subset):
        builder = import_extra("datasets").load_dataset_builder(str(path), name=subset)
    return {str(name): list(files) for name, files in builder.config.data_files.items()}


def _choose_split(dataset: str, split: str, splits: Mapping[str, Any]) -> Any:
    """Return what is under the name of a split, which may go on with a slice."""
    name = re.split(r"[\[+]", split)[0]
    if name not in splits:
        names = ", ".join(splits)
        raise SourceError(f"dataset {dataset!r} has no split {split!r}; it has {names} (--split)")
    return splits[name]


def _table_columns(files: Sequence[str], kind: str) -> list[str]:
    """Return the columns of tables, which all of them must have."""
    columns: list[list[str]] = []
    for file in files:
        try:
            columns += [
                pq.read_schema(file).names if kind == "parquet"
                else list(import_extra("pandas").read_csv(file, nrows=0, dtype=str).columns)
            ]  # fmt: skip
        except (*_read_faults(), pa.ArrowException) as error:
            raise SourceError(f"dataset {file!r} cannot be read: {_why(error)}") from error
        _check_columns(files[0], columns[0], file, columns[-1])
    return columns[0]


def _check_columns(first: str, columns: Iterable[str], file: str, others: Iterable[str]) -> None:
    """Refuse a file that has other columns than the first one."""
    if other := ", ".join(sorted(set(columns) ^ set(others))):
        raise SourceError(
            f"dataset {file!r} and {Path(first).name} have different columns ({other}); give one "
            "of the files, or a folder of like ones"
        )


def _open_json(files: Sequence[str], name: str, *, split: str, streaming: bool) -> Any:
    """Open JSON files; in a map-style source what is no plain column is of type Json."""
    datasets, given = import_extra("datasets"), {"files": tuple(files)}  # a list means shards
    if streaming:
        rows = datasets.IterableDataset.from_generator(_json_objects, gen_kwargs=given)
        return Stream(rows, name, {})
    kinds: dict[str, str] = {}
    for _, row in itertools.islice(read_json(files), _ROWS_LOOKED_AT):
        for column, value in row.items():
            known = kinds.setdefault(column, "null")
            if not _fits(value, known):
                fitting = (kind for kind in ("int64", "string", "json") if _fits(value, kind))
                kinds[column] = next(fitting) if known == "null" else "json"
    if not kinds:
        raise SourceError(f"dataset {name!r} has no rows")
    kinds = {column: "json" if kind == "null" else kind for column, kind in kinds.items()}
    types = {"json": datasets.Json(), **{k: datasets.Value(k) for k in ("int64", "string")}}
    stats = [(file, os.stat(file).st_mtime_ns, os.stat(file).st_size) for file in files]
    key = hashlib.sha256(json.dumps([stats, kinds]).encode()).hexdigest()
    with _load_errors(name):
        rows = datasets.Dataset.from_generator(
            _json_cells, datasets.Features({c: types[kind] for c, kind in kinds.items()}),
            fingerprint=key[:32], gen_kwargs={**given, "kinds": kinds},
        )  # fmt: skip
    if "[" not in split:
        return rows
    (part,) = datasets.ReadInstruction.from_spec(split).to_absolute(
        {split.split("[")[0]: len(rows)}
    )
    return rows.select(range(part.from_ or 0, len(rows) if part.to is None else part.to))


def _json_objects(files: Sequence[str]) -> Iterator[dict[str, Any]]:
    return (row for _, row in read_json(files))


def _json_cells(files: Sequence[str], kinds: Mapping[str, str]) -> Iterator[dict[str, Any]]:
    """Yield the rows of JSON files for columns of these kinds; "json" takes text that holds it."""
    for place, row in read_json(files):
        for column, value in row.items():
            kind = kinds.get(column, "null")
            if kind == "json":
                row[column] = None if value is None else json.dumps(value)
            elif not _fits(value, kind):
                why = f"column {column!r} is {value!r:.60}, which does not fit the first rows"
                raise SourceError(f"{place}: {why}; --streaming reads it")
        yield {column: row.get(column) for column in kinds}


def _fits(value: Any, kind: str) -> bool:
    """Tell whether a column of a kind can hold a value; text is none with half a surrogate pair."""
    if value is None or kind == "json":
        return True
    if kind == "string":
        return isinstance(value, str) and is_unicode(value)
    return kind == "int64" and type(value) is int and -(2**63) <= value < 2**63


def read_json(files: Sequence[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the place ("dataset 'a.jsonl', line 3") and the object of each row of JSON files.

    They hold an object a line, blank lines are passed over, or (.json) an array of objects, and may
    be compressed.

    Raises:
        SourceError: a line is not a JSON object or no text, a file is cut, or begins with other
            columns than the first one; names file and line.
    """
    faults: tuple[type[Exception], ...] = (*_read_faults(), RecursionError)
    first: list[str] | None = None
    for file in files:
        number, what = 0, f"dataset {file!r}"
        try:
            with import_extra("fsspec").open(
                file, "rt", encoding="utf-8-sig", compression="infer"
            ) as lines:
                is_array, rows = False, lines
                if ".json" in Path(file).suffixes:
                    whole = lines.read()
                    is_array = whole.lstrip().startswith("[")
                    rows = json.loads(whole) if is_array else whole.splitlines()
                for number, row in enumerate(rows, 1):
                    if not is_array and not row.strip():
                        continue
                    row = row if is_array else json.loads(row)
                    if not isinstance(row, dict):
                        raise ValueError("not an object")
                    if first is None or number == 1:
                        first = first or list(row)
                        _check_columns(files[0], first, file, row)
                    yield f"{what}, {'row' if is_array else 'line'} {number}", row
        except faults as error:
            cut = not isinstance(error, (ValueError, RecursionError))
            number += cut or isinstance(error, UnicodeDecodeError)
            where = (
                f", line {number}:"
                if number and ".json" not in Path(file).suffixes
                else " cannot be read:"
            )
            why = f"{_why(error)}: the file is damaged" if cut else _why(error)
            raise SourceError(f"{what}{where} {why}") from None


def _read_faults() -> tuple[type[Exception], ...]:
    """Return what reading damaged files raises, decompression included."""
    found: list[type[Exception]] = [OSError, EOFError, ValueError, zlib.error, lzma.LZMAError]
    with contextlib.suppress(ImportError):
        found.append(importlib.import_module("zstandard").ZstdError)
    return tuple(found)


def _why(error: BaseException) -> str:
    """Say in a line why a file cannot be read."""
    if isinstance(error, UnicodeDecodeError):
        return "the text is not UTF-8 (is it UTF-16? write it as UTF-8)"
    if isinstance(error, RecursionError):
        return "not JSON that can be read: it is nested too deeply"
    return f"not JSON ({error})" if isinstance(error, ValueError) else first_line(error)


def is_unicode(text: str) -> bool:
    """Tell whether text can be written at all: JSON escapes can hold half a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


@dataclass(frozen=True)
class Stream:
    """Rows of a source one after the other; what goes wrong on the way is a `SourceError`.

    Has of a `datasets.IterableDataset` what the scripts use.

    Attributes:
        rows: the dataset.
        name: of the source, for messages.
        written: {} where the rows are as they were written, so that no null is Arrow's.
    """

    rows: Any
    name: str
    written: Mapping[str, Any] | None = None

    @property
    def column_names(self) -> list[str] | None:
        """The columns, None where no schema says."""
        names: list[str] | None = self.rows.column_names
        return names

    @property
    def features(self) -> Any:
        """The type of each column by `datasets`, None where nobody knows."""
        return self.rows.features if self.written is None else self.written

    def __iter__(self) -> Iterator[dict[str, Any]]:
        with _load_errors(self.name):
            yield from self.rows

    def take(self, count: int) -> Stream:
        """Return the first rows."""
        return replace(self, rows=self.rows.take(count))

    def select_columns(self, names: Sequence[str]) -> Stream:
        """Return only these columns of each row."""
        return replace(self, rows=self.rows.select_columns(list(names)))


@contextlib.contextmanager
def _load_errors(name: str, *, split: str = "", subset: str | None = None) -> Iterator[None]:
    """Turn what `datasets` raises into one line that says what to do."""
    datasets = import_extra("datasets")
    noisy = logging.getLogger("datasets.packaged_modules")  # tells by a traceback what is raised
    level = noisy.level
    noisy.setLevel(logging.CRITICAL)
    faults: tuple[type[Exception], ...] = (
        *(datasets.exceptions.DatasetsError, RuntimeError, TypeError, KeyError, ImportError),
        *_read_faults(),
    )
    try:
        yield
    except faults as error:
        raise _explain_load(name, split, subset, error) from error
    finally:
        noisy.setLevel(level)


def _explain_load(name: str, split: str, subset: str | None, error: BaseException) -> SourceError:
    """Say in one line why a dataset could not be opened and what to change."""
    kind, why = type(error).__name__, " ".join(str(error).split()) or type(error).__name__
    cause = error
    while (inner := cause.__cause__ or cause.__context__) is not None:
        cause = inner
        if isinstance(cause, SourceError):  # of our own reader, inside a builder
            return cause
    if found := re.search(r"Should be one of \[(.*?)\]|Available splits: \[(.*?)\]", str(error)):
        names = ", ".join(re.findall(r"'([^']+)'", found.group(1) or found.group(2)))
        return SourceError(f"dataset {name!r} has no split {split!r}; it has {names} (--split)")
    if "BatchSize must be greater than 0" in str(cause) or "corresponds to no data" in why:
        return SourceError(f"dataset {name!r} has no rows")
    if "BuilderConfig" in why or "Config name is missing" in why:
        return SourceError(f"dataset {name!r}, --subset {subset}: {why}")
    if Path(name).expanduser().exists():
        return SourceError(f"dataset {name!r} cannot be read: {first_line(cause)}")
    if kind in ("DatasetNotFoundError", "DataFilesNotFoundError"):
        why += " (is the name right, and are you logged in? hf auth login)"
    return SourceError(
        f"dataset {name!r} cannot be opened: {why}; no file or folder here has this name either"
    )


def source_revision(
    dataset: str, revision: str | None = None, *, kind: str = "dataset"
) -> str | None:
    """Name the version of a source or model: the commit on the Hub, a digest of local files.

    The digest covers the names and the whole content of files up to 1 GB together; of more, names,
    sizes and 16 places of each file, so that it stays cheap.

    Args:
        dataset: Hub id, or a local file or folder.
        revision: branch, tag or commit on the Hub.
        kind: "dataset" or "model", for the Hub.

    Returns:
        None when the Hub does not say.
    """
    path = Path(dataset).expanduser()
    if not path.exists():
        hub = import_extra("huggingface_hub")
        try:
            return str(hub.HfApi().repo_info(dataset, revision=revision, repo_type=kind).sha)
        except (hub.errors.HTTPError, OSError, ValueError):
            return None
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    files = [file for file in files if file.is_file() and not file.name.startswith(".")]
    whole = sum(file.stat().st_size for file in files) <= 2**30
    digest = hashlib.sha256()
    for file in files:
        size = file.stat().st_size
        digest.update(f"{file.relative_to(path).as_posix()}:{size}:".encode())
        with file.open("rb") as data:
            if whole or size <= 2**20:
                while block := data.read(2**20):
                    digest.update(block)
                continue
            for n in range(16):
                data.seek((size - 2**16) * n // 15)
                digest.update(data.read(2**16))
    return "sha256:" + digest.hexdigest()


def is_digest(revision: Any) -> bool:
    """Tell whether a revision is a digest of local files; those of version 0.1 were shorter."""
    return isinstance(revision, str) and re.fullmatch("sha256:[0-9a-f]{64}", revision) is not None


def source_columns(dataset: Any) -> list[str]:
    """Return the column names of an open source; a stream without a schema shows its first rows'.

    Raises:
        SourceError: the source has no rows.
    """
    names = dataset.column_names or dict.fromkeys(name for row in dataset.take(16) for name in row)
    if not names:
        raise SourceError("the dataset has no rows")
    return list(names)


def without_idle_columns(source: Any, columns: ConversationColumns) -> Any:
    """Leave out what no conversation is read from, such as images: decoding it costs time.

    A stream without a schema stays as it is: not all its rows have the same columns.
    """
    if not source.column_names:
        return source
    return source.select_columns([n for n in source.column_names if n in columns.needed()])


# Rows to messages ---------------------------------------------------------------------------------

_ROLES = {
    **dict.fromkeys(("human", "prompter"), "user"),
    **dict.fromkeys(("gpt", "chatgpt", "bot", "model", "ai", "function_call", "tool_call"),
                    "assistant"),
    **dict.fromkeys(("observation", "function", "function_response", "tool_response"), "tool"),
    **{role: role for role in ("user", "assistant", "system", "tool", "developer")},
}  # fmt: skip
_REASONING_KEYS = ("reasoning_content", "thinking", "reasoning")
_ANY_OBJECT = object()  # stands for a feature that nobody knows


def without_padding(value: Any, feature: Any) -> Any:
    """Return a value of a row as JSON would hold it, without the nulls that Arrow put there.

    A struct of Arrow has all its keys in every row; the `feature` of `datasets` says what is one.
    `_ANY_OBJECT`: nobody knows, so every null of an object is taken for padding.
    """
    unknown = feature is _ANY_OBJECT
    if isinstance(value, Mapping):
        struct = feature if isinstance(feature, Mapping) else {}
        return {
            key: without_padding(item, feature if unknown else struct.get(key))
            for key, item in value.items()
            if item is not None or not (unknown or key in struct)
        }
    if isinstance(value, (list, tuple, np.ndarray)):
        inner = feature[0] if isinstance(feature, list) else getattr(feature, "feature", None)
        return [without_padding(item, feature if unknown else inner) for item in value]
    return value.item() if isinstance(value, np.generic) else value


def read_cell(row: Mapping[str, Any], name: str, features: Mapping[str, Any] | None) -> Any:
    """Return what a column of a row holds, without Arrow's nulls."""
    try:
        feature = _ANY_OBJECT if features is None else features.get(name)
        return without_padding(row.get(name), feature)
    except RecursionError:
        raise ConversationError("malformed", f"column {name!r} is nested too deeply") from None


def _parsed_json(value: Any) -> Any:
    """Parse a string that holds a JSON list or object; return anything else as it is."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        with contextlib.suppress(ValueError, RecursionError):
            return json.loads(value)
    return value


def read_conversation(
    row: Mapping[str, Any],
    columns: ConversationColumns,
    features: Mapping[str, Any] | None = None,
) -> Messages:
    """Return the chat messages of a row: dicts with `role`, `content` and what else the row gives.

    Both dialects are understood (`role`/`content` and `from`/`value`), messages stored as a JSON
    string too, a question and an answer as text or as messages. Content given as a list of parts is
    joined, parts of reasoning become `reasoning_content`. `features` are the source's, see
    `without_padding`; without them every null of an object is taken for Arrow's.

    Raises:
        ConversationError: "null", "empty", "malformed" or "not_text" (images, audio).
    """
    cells = {name: read_cell(row, name, features) for name in columns.needed()}
    if columns.messages is not None:
        messages = _read_messages(cells[columns.messages], columns.messages)
    else:
        messages = _read_pair(cells, columns)
    system = cells.get(columns.system or "")
    if columns.system and system is not None and system == system and str(system).strip():
        text = _cell_text(system, columns.system)
        if messages[0]["role"] != "system":
            messages = [{"role": "system", "content": text}, *messages]
        elif messages[0].get("content") != text:
            why = f"column {columns.system!r} and a system message of its own differ (--system-col)"
            raise ConversationError("malformed", f"the conversation has {why}")
    answers = [m for m in messages if m["role"] == "assistant"]
    said = [m.get(key) for m in answers for key in ("content", "tool_calls", *_REASONING_KEYS)]
    if answers and not any(s.strip() if isinstance(s, str) else s for s in said):
        raise ConversationError("empty", "the assistant says nothing")
    return messages


def _read_messages(value: Any, column: str) -> Messages:
    """Read a cell that holds a list of messages, also as JSON, or a struct of lists."""
    value = _parsed_json(value)
    if value is None:
        raise ConversationError("null", f"column {column!r} is null")
    if isinstance(value, dict):  # a struct of lists: what `datasets` makes of a list of structs
        lists = [each for each in value.values() if isinstance(each, list)]
        if len(lists) < len(value) or len({len(each) for each in lists}) > 1:
            why = "is one object, or lists of different length, not a list of messages"
            raise ConversationError("malformed", f"column {column!r} {why}")
        value = [dict(zip(value, each, strict=True)) for each in zip(*lists, strict=True)]
    if not isinstance(value, list):
        raise ConversationError("malformed", f"column {column!r} is no list of messages")
    if not value:
        raise ConversationError("empty", "the conversation has no messages")
    return [_read_message(message) for message in value]


def _read_pair(cells: Mapping[str, Any], columns: ConversationColumns) -> Messages:
    """Build the messages of a row with a question and an answer, each text or messages."""
    found: list[Messages] = []
    for role, column in (("assistant", columns.assistant), ("user", columns.user)):
        value = cells[str(column)]
        if isinstance(value, list) and value and isinstance(value[0], dict):
            messages = [_read_message(message) for message in value]
            if role == "assistant" and messages[0]["role"] != "assistant":
                return messages  # the whole conversation, as preference data has it in `chosen`
        else:
            text = _cell_text(value, str(column))
            context = cells.get(columns.context or "") if role == "user" else None
            if context is not None and str(context).strip():
                text += f"\n\n{_cell_text(context, str(columns.context))}"
            messages = [{"role": role, "content": text}]
        found.insert(0, messages)
    return [*found[0], *found[1]]


def _cell_text(value: Any, column: str) -> str:
    """Return a cell as text; numbers are written out."""
    if value is None or value != value or (isinstance(value, str) and not value.strip()):
        reason = "empty" if isinstance(value, str) else "null"
        raise ConversationError(reason, f"column {column!r} is {reason}")
    if not isinstance(value, (str, int, float)):
        raise ConversationError("malformed", f"column {column!r} holds {type(value).__name__}")
    return str(value)


def _read_message(value: Any) -> dict[str, Any]:
    """Bring one message of either dialect to `role` and `content`, other keys kept.

    Keys that are null are left out, as transformers does: many templates would write "None".
    """
    if not isinstance(value, dict):
        raise ConversationError("malformed", f"a message is {type(value).__name__}, not an object")
    message = {key: item for key, item in value.items() if item is not None}
    role = message.pop("role", None) or message.pop("from", None)
    if not isinstance(role, str):
        raise ConversationError("malformed", "a message has no role")
    role = _ROLES.get(role.strip().lower(), role)
    content = message.pop("content", None)
    content = message.pop("value", None) if content is None else content
    calls = _parsed_json(message.pop("tool_calls", None))
    if isinstance(calls, list) and calls:
        message["tool_calls"] = calls
    content, reasoning = _content_text(content, role)
    if reasoning:
        if any(message.get(key) not in (None, "", reasoning) for key in _REASONING_KEYS):
            raise ConversationError("malformed", "a message gives its reasoning twice")
        message["reasoning_content"] = reasoning
    if content is not None:
        return {"role": role, "content": content, **message}
    if "tool_calls" not in message and not any(message.get(key) for key in _REASONING_KEYS):
        raise ConversationError("null", f"a {role} message has no content")
    return {"role": role, **message}


def _content_text(content: Any, role: str) -> tuple[Any, str]:
    """Return content as text, and the reasoning among its parts.

    The structured result of a tool stays as it is.
    """
    if content is None or isinstance(content, str):
        return content, ""
    if not isinstance(content, list):
        if role == "tool":
            return content, ""
        raise ConversationError("malformed", f"the content of a {role} message is {content!r:.60}")
    said, reasons = [], []
    for part in content:
        part = {"text": part} if isinstance(part, str) else part
        kind = part.get("type", "text") if isinstance(part, dict) else ""
        text = part.get("text", part.get(kind)) if isinstance(part, dict) else None
        if kind in ("text", "input_text", "output_text") and isinstance(text, str):
            said.append(text)
        elif kind in ("reasoning", "thinking") and role == "assistant" and isinstance(text, str):
            reasons.append(text)
        elif role == "tool":
            return content, ""
        else:
            raise ConversationError("not_text", f"a {role} message holds more than text")
    return "".join(said) if said or not reasons else None, "".join(reasons)


def read_tools(
    row: Mapping[str, Any], features: Mapping[str, Any] | None = None
) -> list[dict[str, Any]] | None:
    """Return the tool schemas of a row's `tools` column (a list or a JSON string), None without."""
    tools = _parsed_json(read_cell(row, "tools", features))
    if not tools or isinstance(tools, str):
        return None
    if isinstance(tools, list):
        tools = [_parsed_json(tool) for tool in tools]
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise ConversationError("malformed", "column 'tools' is no list of tool schemas")
    return tools


def read_template_kwargs(
    row: Mapping[str, Any], features: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Return a row's own arguments of the template (an object or JSON), {} without."""
    name = "chat_template_kwargs"
    given = _parsed_json(read_cell(row, name, features)) or {}
    try:
        if not isinstance(given, dict):
            raise TemplateError(f"no object: {given!r:.60}")
        return check_template_kwargs(given)
    except TemplateError as error:
        raise ConversationError("malformed", f"column {name!r}: {error}") from None


def check_template_kwargs(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return arguments of a template.

    Raises:
        TemplateError: one has the name of something that the template is given anyway.
    """
    taken = {"messages", "tools", "documents", "add_generation_prompt"} & given.keys()
    if taken:
        raise TemplateError(f"{min(taken)!r} is no argument to give: every template gets it anyway")
    return dict(given)


# --------------------------------------------------------------------------------------------------
# 3 Conversation
# --------------------------------------------------------------------------------------------------
#
# From messages to token positions, by one rendering:
#
#     template ──marks at its loops──► rendering: text, and which message wrote which run of it
#              ──probe, once──► generation prompt, ends of turns, inserted think tags
#     runs of the assistant, cut by what the probe saw ──► spans ──tokenize, overlap──► positions
#
# A template that writes nothing while it passes over the messages is read by replacing what a turn
# says: what both renderings share before and after delimits the turn.

_THINK = r"(?:seed:)?(?:think(?:ing)?|thought|reason(?:ing)?)"
_OPEN = rf"(?:<\|?{_THINK}\|?>|\[THINK\]|◁think▷|<\|START_THINKING\|>|<\|channel>thought\n)"
_CLOSE = rf"(?:</{_THINK}>|\[/THINK\]|◁/think▷|<\|END_THINKING\|>|<channel\|>)"
_THINK_TAG = re.compile(f"{_OPEN}|{_CLOSE}", re.IGNORECASE)
_EMPTY_THINK = re.compile(rf"\s*(?:{_OPEN}\s*)?{_CLOSE}\s*", re.IGNORECASE)
_OPEN_THINK = re.compile(rf"\s*{_OPEN}\s*", re.IGNORECASE)


# Tokenizer and template ---------------------------------------------------------------------------


def load_tokenizer(
    model: str,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
    local_files_only: bool = False,
) -> Any:
    """Load the tokenizer of a model, Hub id or local folder, with the chat template beside it.

    Raises:
        LogitsError: there is none, it needs a package or `--trust-remote-code`, or the Hub is out
            of reach.
    """
    folder = Path(model).expanduser()
    if folder.is_file():
        raise LogitsError(
            f"model {model!r} is a file: give the folder that holds it together with config.json "
            "and the tokenizer, or a Hub id"
        )
    if model.startswith((".", "/", "~")) and not folder.exists():
        raise LogitsError(f"model {model!r}: no such folder")
    where = str(folder) if folder.is_dir() else model
    how = {"revision": revision, "local_files_only": local_files_only}
    transformers = import_extra("transformers")
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            where, trust_remote_code=trust_remote_code, **how
        )
    except (
        *(ImportError, OSError, ValueError, LookupError, RuntimeError, TypeError, AttributeError),
        *(SyntaxError, AssertionError),  # of code that comes with a model
    ) as error:
        raise LogitsError(_explain_tokenizer(model, folder, error)) from error
    if type(tokenizer).__name__.startswith("MistralCommon"):
        raise LogitsError(
            f"model {model!r} has only tekken.json, whose tokenizer (mistral-common) gives neither "
            "a chat template nor character offsets; use a copy that holds tokenizer.json"
        )
    if not getattr(tokenizer, "chat_template", None):
        beside = importlib.import_module("transformers.utils").cached_file(
            where, "chat_template.json", _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False, **how,
        )  # fmt: skip
        if beside is not None:
            tokenizer.chat_template = _read_template(Path(beside), "chat_template.json")
    return tokenizer


def _explain_tokenizer(model: str, folder: Path, error: BaseException) -> str:
    """Say why a tokenizer cannot be loaded and what to do."""
    if isinstance(error, ImportError):
        said = str(error).replace("`", " ")
        found = re.search(
            r"pip install (?:-U )?([\w.-]+)|'([\w.-]+)'|requires the (\w+) library", said
        )
        package = next(filter(None, found.groups()), said).lower() if found else said
        why = f"needs the package {package}: pip install {package}"
        return f"the tokenizer of model {model!r} {why}"
    if "trust_remote_code" in str(error):
        return f"the tokenizer of model {model!r} runs code of its own: --trust-remote-code"
    if (folder / "tekken.json").is_file() and importlib.util.find_spec("mistral_common") is None:
        return f"model {model!r}: its tekken.json needs mistral-common: pip install mistral-common"
    while (inner := error.__cause__ or error.__context__) is not None:
        error = inner
    if folder.is_dir():
        return (
            f"no tokenizer for model {model!r}: the folder holds none that can be read "
            f"({first_line(error)}); copy the files of the tokenizer into it"
        )
    return (
        f"no tokenizer for model {model!r}: {first_line(error)} (is the name right, and are you "
        "logged in? hf auth login); no folder here has this name either"
    )


def load_chat_template(path: str | None, tokenizer: Any) -> str:
    """Return the Jinja source of a chat template: of the file, else the tokenizer's own.

    The file may also be a `chat_template.json`, which holds the source as a JSON string.

    Raises:
        TemplateError: no such file, no template in the tokenizer, or not valid Jinja.
    """
    if path is None:
        source = _own_template(tokenizer)
    else:
        source = _one_template(_read_template(Path(path).expanduser(), f"--chat-template {path!r}"))
    jinja2, where = import_extra("jinja2"), repr(path) if path else "of the tokenizer"
    try:
        _compile_marked(source)
    except jinja2.TemplateSyntaxError as error:
        raise TemplateError(
            f"chat template {where}, line {error.lineno}: {error.message}; "
            "give a corrected one with --chat-template"
        ) from error
    except (RecursionError, MemoryError, SyntaxError) as error:
        raise TemplateError(
            f"chat template {where} is nested too deeply to be compiled; give another one with "
            "--chat-template"
        ) from error
    return source


def _read_template(path: Path, name: str) -> Any:
    """Read a template file; JSON is unwrapped as transformers writes it."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise TemplateError(f"{name} cannot be read: {first_line(error)}") from error
    if path.suffix != ".json":
        return text
    with contextlib.suppress(ValueError, KeyError, TypeError, RecursionError):
        found = json.loads(text)["chat_template"]
        if isinstance(found, list):
            return {each["name"]: each["template"] for each in found}
        if isinstance(found, (str, dict)):
            return found
    raise TemplateError(f'{name} is no JSON object with a string "chat_template"')


def _own_template(tokenizer: Any) -> str:
    template = getattr(tokenizer, "chat_template", None)
    if not template:
        raise TemplateError(
            f"the tokenizer {getattr(tokenizer, 'name_or_path', '')!r} has no chat template; "
            "give one with --chat-template FILE (or --text-col for plain text)"
        )
    return _one_template(template)


def _one_template(template: Any) -> str:
    """Join named templates to one by the rule of transformers: `tool_use` where tools are given."""
    if not isinstance(template, Mapping):
        return str(template)
    if "default" not in template:
        raise TemplateError(
            f"the tokenizer's chat templates are called {', '.join(template)}, none of them "
            "default; give one with --chat-template FILE"
        )
    if "tool_use" not in template:
        return str(template["default"])
    with_tools, plain = (template[name].removesuffix("\n") for name in ("tool_use", "default"))
    # each begins on a line of its own, as it does alone: blocks are trimmed and stripped there
    return f"{{%+ if tools is not none %}}\n{with_tools}{{%+ else %}}\n{plain}{{%+ endif %}}"


def hash_template(source: str) -> str:
    """Return the SHA-256 of a chat template, by which runs are compared."""
    return hashlib.sha256(source.encode()).hexdigest()


def date_of_today() -> str:
    """Return the date here and now as YYYY-MM-DD."""
    return datetime.now().astimezone().date().isoformat()


# Rendering with marks -----------------------------------------------------------------------------


class Rendering(NamedTuple):
    """A rendered conversation: `runs` tell which message wrote what, None: the template itself."""

    text: str
    runs: list[tuple[int, int, int | None]]  # start, end, number of the message
    marked: list[Span]  # inside {% generation %} … {% endgeneration %}, ascending


class _Marks:
    """What a marked template calls while it renders one conversation.

    It also bounds the work of a template, which comes from strangers: in steps and characters, not
    in seconds, so that every machine refuses the same conversations.
    """

    def __init__(self, chat: Messages, used: str) -> None:
        self.number_of = {id(message): number for number, message in enumerate(chat)}
        self.edge = next(chr(c) for c in range(0xE000, 0xF8FF) if chr(c) not in used)
        self.under_way: set[str] = set()
        self.work_left = 10**8 + 10**4 * len(chat)  # a million steps, some 100 more a message

    def spend(self, work: int) -> None:
        """Count work.

        Raises:
            SecurityError: it is too much.
        """
        self.work_left -= work
        if self.work_left < 0:
            raise import_extra("jinja2").exceptions.SecurityError(
                "it loops for too long or writes too much"
            )

    def mark(self, kind: str, *values: Any) -> str:
        """Return the mark of a loop that is at one of `values`; of no values, that it is over."""
        self.spend(100)
        at = next((self.number_of[id(v)] for v in values if id(v) in self.number_of), "")
        if at == "" and kind not in self.under_way | {"+", "-"}:
            return ""  # a loop over something else
        (self.under_way.discard if at == "" else self.under_way.add)(kind)
        return f"{self.edge}{kind}:{at}{self.edge}"

    def split(self, out: str) -> Rendering:
        """Cut the marks out of what a template wrote."""
        text: list[str] = []
        runs: list[tuple[int, int, int | None]] = []
        marked: list[Span] = []
        loops: list[tuple[str, int]] = []  # those under way, and the message that each is at
        place = 0
        for number, piece in enumerate(out.split(self.edge)):
            if number % 2 == 0:
                owner = loops[-1][1] if loops else None
                if piece and runs and runs[-1][2] == owner:
                    runs[-1] = (runs[-1][0], place + len(piece), owner)
                elif piece:
                    runs.append((place, place + len(piece), owner))
                text.append(piece)
                place += len(piece)
                continue
            kind, _, at = piece.partition(":")
            if kind == "+":
                marked.append((place, place))
            elif kind == "-":
                marked[-1:] = [(a, place) for a, _ in marked[-1:]]
            else:
                depth = next((n for n, (loop, _) in enumerate(loops) if loop == kind), len(loops))
                loops[depth:] = [(kind, int(at))] if at else []
        return Rendering("".join(text), runs, marked)


@lru_cache(maxsize=64)
def _compile_marked(source: str, *, inside: bool = True) -> tuple[Any, bool]:
    """Compile a template that calls `_Marks.mark` where it comes to an item of a loop, and after.

    No loop is marked where the template captures what it writes (macros, blocks of `set`, filters):
    there a mark could change the text. `{% generation %}` is, with `inside`; the second value tells
    whether there is such a place.
    """
    import_extra("transformers")
    utils = importlib.import_module("transformers.utils.chat_template_utils")
    jinja2 = import_extra("jinja2")
    nodes, count = jinja2.nodes, itertools.count()

    class AddMarks(jinja2.visitor.NodeTransformer):  # type: ignore[name-defined]
        loops: tuple[tuple[str, list[str]], ...] = ()
        captured = found_inside = False

        def mark(self, kind: str, *names: str) -> Any:
            given = [nodes.Const(kind), *(nodes.Name(name, "load") for name in names)]
            call = nodes.EnvironmentAttribute("mark"), [nodes.ContextReference(), *given]
            return nodes.Output([nodes.Call(*call, [], None, None)])

        def visit_For(self, node: Any) -> Any:
            kind = "" if self.captured else str(next(count))
            names = [name.name for name in node.target.find_all(nodes.Name)] or [node.target.name]
            outer = self.loops
            self.loops = (*outer, (kind, names))
            node.body = [self.mark(kind, *names), *self.visit_all(node.body)]
            self.loops = outer
            node.else_ = self.visit_all(node.else_)
            return node if self.captured else [node, self.mark(kind)]

        def visit_all(self, body: list[Any]) -> list[Any]:
            return self.generic_visit(nodes.Scope(body)).body

        def capture(self, node: Any) -> Any:
            before, self.captured = self.captured, True
            node = self.generic_visit(node)
            self.captured = before
            return node

        visit_Macro = visit_FilterBlock = visit_AssignBlock = capture

        def visit_CallBlock(self, node: Any) -> Any:
            if getattr(node.call.node, "name", "") != "_generation_support":
                return self.capture(node)
            self.found_inside |= self.captured
            body = nodes.Scope(self.visit_all(node.body))
            return [self.mark("+"), body, self.mark("-")] if inside or not self.captured else body

        def visit_Assign(self, node: Any) -> Any:
            if self.captured or not self.loops or not isinstance(node.node, nodes.Getitem):
                return node
            kind, names = self.loops[-1]  # {% set message = messages[i] %}
            number = node.node.arg
            if isinstance(number, nodes.Getattr):  # messages[loop.index0]
                number = number.node if number.attr == "index0" else None
            known = isinstance(number, nodes.Name) and number.name in (*names, "loop")
            if not known or not isinstance(node.target, nodes.Name):
                return node
            return [node, self.mark(kind, node.target.name)]

    # of an empty template: to compile this one unbound would compute its constants, however large
    environment = _bound_work(utils._compile_jinja_template("").environment.overlay())
    marker = AddMarks()
    tree = marker.visit(environment.parse(source))
    return environment.from_string(tree), marker.found_inside


def _bound_work(environment: Any) -> Any:  # noqa: C901 - one small function for each way
    """Have the sandbox count what can take long or much memory: loops, products, widths."""
    filters, call = import_extra("jinja2").pass_context, environment.call

    def spend(context: Any, work: int) -> None:
        context.parent["_marks"].spend(work)

    def mark(context: Any, *given: Any) -> str:
        return str(context.parent["_marks"].mark(*given))

    def width(text: str, given: Iterable[Any]) -> int:
        """Return what the widths in a format, or those given where it asks for them, come to."""
        found = [
            int(n) for spec in re.findall(r"[%:][^%:{}]*", text) for n in re.findall(r"\d+", spec)
        ]
        asks = re.search(r"%[^a-zA-Z%]*\*|:[^}]*\{", text)
        return sum(found) + sum(abs(n) for n in given if asks and isinstance(n, int))

    def binop(context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "+" and isinstance(left, str):
            spend(context, len(left) // 100 if len(left) < 10**6 else len(left))
        elif operator == "%" and isinstance(left, str):
            spend(context, width(left, right if isinstance(right, tuple) else (right,)))
        elif operator == "*":
            sizes = [len(v) for v in (left, right) if hasattr(v, "__len__")]
            times = [abs(int(v)) for v in (left, right) if not hasattr(v, "__len__")]
            spend(context, math.prod(sizes + times) if sizes else 0)
        elif operator == "**":
            spend(context, int(abs(left)).bit_length() * int(abs(right)))
        return environment.binop_table[operator](left, right)

    def bounded_call(context: Any, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        if function is mark:
            return mark(*args)
        bound = getattr(function, "__wrapped__", function)  # the sandbox wraps str.format
        text, name = getattr(bound, "__self__", None), getattr(bound, "__name__", "")
        if isinstance(text, str) and name in ("format", "format_map"):
            spend(context, width(text, (*args, *kwargs.values())))
        elif isinstance(text, str) and name in ("center", "ljust", "rjust", "zfill", "expandtabs"):
            spend(context, sum(abs(n) for n in args if isinstance(n, int)))
        return call(context, function, *args, **kwargs)

    def bounded_filter(name: str) -> Any:
        plain = environment.filters[name]

        def bounded(context: Any, value: Any, *args: Any, **kwargs: Any) -> Any:
            given = (*args, *kwargs.values())
            widths = (n for n in given if isinstance(n, int))
            spend(context, width(str(value), given) if name == "format" else sum(map(abs, widths)))
            return plain(value, *args, **kwargs)

        return filters(bounded)

    environment.mark = mark
    environment.intercepted_binops = frozenset(("+", "%", "*", "**"))
    environment.call_binop, environment.call = binop, bounded_call
    own = {name: bounded_filter(name) for name in ("format", "center", "indent")}
    environment.filters = {**environment.filters, **own}
    return environment


@dataclass(frozen=True)
class ChatTemplate:
    """A template with what a short probe conversation showed about it.

    Attributes:
        source: Jinja source.
        given: what the template is given beside messages: special tokens, and its arguments.
        added: the tokenizer's added tokens, blank ones left out; longest first.
        date: told to a template that asks for the time, YYYY-MM-DD; None: the real time.
        parts: content must be given as a list of text parts.
        loops: the template writes a message when it comes to it in a loop; else see `_replaced`.
        marked: `{% generation %}` markers are there and cover the assistant's content.
        prompt: the generation prompt, such as "<|im_start|>assistant\\n".
        tails: what the template writes after what an assistant says; longest first.
        inserted: think tags that it writes where the data has none; longest first.
    """

    source: str
    given: Mapping[str, Any]
    added: tuple[str, ...] = ()
    date: str | None = None
    parts: bool = False
    loops: bool = True
    marked: bool = False
    prompt: str = ""
    tails: tuple[str, ...] = ()
    inserted: tuple[str, ...] = ()

    @cached_property
    def tokens(self) -> re.Pattern[str]:
        """Match one or more added tokens back to back, with the blanks before them."""
        return re.compile(r"\s*(?:" + ("|".join(map(re.escape, self.added)) or "(?!)") + ")+")

    @property
    def ends(self) -> tuple[str, ...]:
        """What ends a turn, such as "<|im_end|>"; longest first."""
        found = {tail[: self.through_tokens(tail)].strip() for tail in self.tails}
        return tuple(sorted(filter(None, found), key=len, reverse=True))

    def through_tokens(self, tail: str) -> int:
        """Return how much of a tail is the turn's end: its first tokens, else all but blanks."""
        found = self.tokens.match(tail)
        return found.end() if found else len(tail.rstrip())

    def moment(self) -> datetime:
        """Return the time to tell a template: one for all renderings that are compared."""
        return datetime.fromisoformat(self.date) if self.date else datetime.now()

    def render(
        self, messages: Messages, tools: Any = None, *, prompt: bool = False, moment: Any = None
    ) -> Rendering:
        """Render a conversation; `prompt` appends the generation prompt.

        The reasoning of a message is offered under each name that templates read, as transformers
        does from 5.22 on, so that every version writes the same text.

        Raises:
            ConversationError: "refused_by_template".
        """
        chat = [_as_given(message, parts=self.parts) for message in messages]
        used = json.dumps([chat, tools, self.given], ensure_ascii=False, default=str) + self.source
        jinja2, moment = import_extra("jinja2"), moment or self.moment()

        def write(*, inside: bool) -> Rendering:
            marks = _Marks(chat, used)
            return marks.split(
                _compile_marked(self.source, inside=inside)[0].render(
                    **{"strftime_now": moment.strftime, "documents": None, **self.given},
                    messages=chat, tools=tools, add_generation_prompt=prompt, _marks=marks,
                )
            )  # fmt: skip

        try:
            rendering = write(inside=True)
            if _compile_marked(self.source)[1]:  # marks where they might change what is written
                plain = write(inside=False)
                rendering = rendering if rendering.text == plain.text else plain
            return rendering
        except (jinja2.TemplateError, RecursionError, MemoryError, SyntaxError, TypeError,
                ValueError, LookupError, AttributeError, ArithmeticError) as error:  # fmt: skip
            sandbox = isinstance(error, jinja2.exceptions.SecurityError)
            who = "the sandbox of templates refuses" if sandbox else "the template says"
            why = f"{who}: {first_line(error)}"
            raise ConversationError("refused_by_template", why) from error


def _as_given(message: Mapping[str, Any], *, parts: bool) -> dict[str, Any]:
    """Copy a message, its reasoning under each of the names that templates read.

    `parts`: wrap string content the way templates of vision models want it.
    """
    said = next((message[key] for key in _REASONING_KEYS if message.get(key) is not None), None)
    reasoning = {} if said is None else {"reasoning_content": said}
    given = {**({} if said is None else {"thinking": said}), **message, **reasoning}
    if parts and isinstance(content := message.get("content"), str):
        given["content"] = [{"type": "text", "text": content}]
    return given


# What a plain conversation shows of a template ----------------------------------------------------


def prepare_template(
    tokenizer: Any,
    chat_template: str | None = None,
    *,
    template_kwargs: Mapping[str, Any] | None = None,
    date: str | None = None,
) -> ChatTemplate:
    """Probe a template once per tokenizer, template and arguments; later calls are free.

    Raises:
        TemplateError: the template never shows what an assistant says.
    """
    source = chat_template if chat_template is not None else _own_template(tokenizer)
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    given = json.dumps({**special, **(template_kwargs or {})}, sort_keys=True)
    return _probe_template(tokenizer, source, given, len(tokenizer), date)


@lru_cache(maxsize=64)
def _probe_template(
    tokenizer: Any, source: str, given: str, _size: int, date: str | None
) -> ChatTemplate:
    added = {*tokenizer.get_added_vocab(), *tokenizer.all_special_tokens}
    added = {token for token in added if token.strip("\u2581 \t\n\r")}  # Gemma adds line breaks
    longest_first = tuple(sorted(added, key=lambda token: (-len(token), token)))
    plain = ChatTemplate(source, json.loads(given), longest_first, date)
    why = ""
    try:
        plain.render([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}])
    except ConversationError as error:
        why = f" ({error})"
        if isinstance(error.__cause__, import_extra("jinja2").exceptions.SecurityError):
            raise TemplateError(
                f"the chat template cannot be used{why}; see --chat-template"
            ) from error
    for loops, parts, opening in itertools.product((True, False), (False, True), ((), ("system",))):
        template = replace(plain, parts=parts, loops=loops)
        facts = _probe_turns(template, opening)
        if facts is not None:
            return replace(template, **facts)
    raise TemplateError(
        "the chat template does not show what the assistant says in a plain conversation of two "
        f"messages, so its tokens cannot be found{why}; give another one with --chat-template FILE"
    )


def _probe_turns(template: ChatTemplate, opening: tuple[str, ...]) -> dict[str, Any] | None:
    """Learn generation prompt, markers, ends of turns and inserted tags; None: not shown."""
    says = [chr(0xE100 + n) * 3 for n in range(5)]
    roles = (*opening, "user", "assistant", "user", "assistant")
    chat: Messages = [{"role": r, "content": s} for r, s in zip(roles, says, strict=False)]
    n = len(opening) + 1  # the first answer
    render = functools.partial(_try_render, template, moment=template.moment())
    shown = [r for r in (render(chat[:k]) for k in (n + 1, len(chat))) if r]
    if not shown or says[n] not in shown[0].text:
        return None
    asked, before = (render(chat[:n], prompt=p) for p in (True, False))
    prompt = ""
    if asked and before:  # what follows the messages, but for what follows them anyway
        end = max([b for _, b, who in asked.runs if who is not None], default=0)
        end = end if asked.text[end:].strip() else _shared_prefix(asked.text, before.text)
        after = before.text[end:] if before.text.startswith(asked.text[:end]) else ""
        prompt = asked.text[end:].removesuffix(after)
    turns = []
    for text, runs, _ in shown:
        if not template.loops:  # what stands after the message before is the turn's
            runs = [(text.find(says[n - 1]) + len(says[n - 1]), len(text), n)]
        turns += [
            text[a:b].partition(says[who])[::2]
            for a, b, who in runs
            if who in (n, n + 2) and says[who] in text[a:b]
        ]
    if not turns:
        return None
    if not template.loops:  # a tail ends where the next header begins: by what both renderings have
        ends = [found.end() if (found := template.tokens.match(tail)) else 0 for _, tail in turns]
        common = _shared_prefix(turns[0][1], turns[-1][1]) if len(turns) > 1 else len(turns[0][1])
        turns = [
            (head, tail[: common or end]) for (head, tail), end in zip(turns, ends, strict=True)
        ]
    if not prompt.strip() and turns[0][0].strip():
        prompt = turns[0][0]
    bare = _bare(prompt)
    heads = {head.removeprefix(bare) for head, _ in turns if head.startswith(bare)}
    text, _, marked = shown[0]
    return {
        "prompt": prompt,
        "marked": any(says[n] in text[a:b] for a, b in marked),
        "tails": tuple(sorted({tail for _, tail in turns}, key=len, reverse=True)),
        "inserted": tuple(sorted(filter(_THINK_TAG.search, heads), key=len, reverse=True)),
    }


def _bare(prompt: str) -> str:
    """Return a generation prompt without the think tags that it ends in."""
    return re.sub(rf"{_OPEN}\s*(?:{_CLOSE}\s*)?\Z", "", prompt, flags=re.IGNORECASE)


def _try_render(template: ChatTemplate, messages: Messages, **how: Any) -> Rendering | None:
    """Render, or return None where the template refuses."""
    try:
        return template.render(messages, **how)
    except ConversationError:
        return None


def _shared_prefix(one: str, two: str) -> int:
    """Return the length of the longest common prefix."""
    low, high = 0, min(len(one), len(two))
    while low < high:  # slices compare at memory speed, a loop over characters does not
        middle = (low + high + 1) // 2
        if one[low:middle] == two[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


# Which characters are the assistant's -------------------------------------------------------------


@dataclass(frozen=True)
class RenderedConversation:
    """A conversation as text, and the character spans of it that are extracted.

    Attributes:
        text: what the template writes.
        spans: ascending and disjoint.
        way: how they were found: "generation" (the template's own markers), "loop" (what it wrote
            when it came to a message), "replacing" (what changes with what the turn says).
        end_of_turn: what was taken to end a turn, None if nothing was.
        notes: what the template was given and does not show, see `warn_once`.
    """

    text: str
    spans: list[Span]
    way: str
    end_of_turn: str | None
    notes: tuple[str, ...] = ()


def render_conversation(
    messages: Messages,
    template: ChatTemplate,
    *,
    tools: Any = None,
    include_think: bool = False,
    include_end: bool = False,
    turns: str = "all",
    check: Callable[[str], None] | None = None,
) -> RenderedConversation:
    """Render a conversation and find what the assistant itself would have to write.

    That is: from the end of the generation prompt through the end-of-turn token of every assistant
    turn (`turns="last"`: of the last one) whose `weight` is not 0, tool calls and shown reasoning
    included. Think tags that the template inserts on its own come with `include_think`, what
    follows the end of the turn with `include_end`. `check` may refuse the text before turns are
    looked for.

    Raises:
        ConversationError: "no_assistant", "refused_by_template".
    """
    answers = [n for n, message in enumerate(messages) if message.get("role") == "assistant"]
    if not answers:
        roles = ", ".join(sorted({str(message.get("role")) for message in messages}))
        raise ConversationError("no_assistant", f"no message is the assistant's: roles {roles}")
    wanted = {n for n in (answers if turns == "all" else answers[-1:])
              if messages[n].get("weight", 1) != 0}  # fmt: skip
    moment = template.moment()
    chat, rendering = _render_dialects(messages, template, tools, moment)
    if check is not None:
        check(rendering.text)
    reader = _TurnReader(template, chat, tools, rendering, moment, include_think, include_end)
    text, way = rendering.text, "generation" if template.marked else "loop"
    found = reader.turns(wanted) if template.loops else []
    if not template.loops or reader.doubts(wanted, found):
        found, way = reader.replaced_turns(wanted), "replacing"
    spans = _merged(span for _, span in found)
    end = next((e for e in template.ends for a, b in spans if e in text[a:b]), None)
    return RenderedConversation(text, spans, way, end, reader.notes())


def _render_dialects(
    messages: Messages, template: ChatTemplate, tools: Any, moment: Any
) -> tuple[Messages, Rendering]:
    """Render the conversation in the first way of writing it that the template takes.

    Templates differ in these: arguments of tool calls as an object, or as JSON text; content that a
    message lacks left out, null where the template asks for that (others would print "None"), or
    empty.
    """
    contents: list[dict[str, Any]] = [{}]
    if any("content" not in message for message in messages):
        asks = re.search(r"content['\"]?\]? is (?:not )?none", template.source)
        contents += [{"content": None}, {"content": ""}] if asks else [{"content": ""}]
    calls = any(message.get("tool_calls") for message in messages)
    refusals = []
    for content, as_text in itertools.product(contents, (False, True) if calls else (False,)):
        chat = [_with_arguments({**content, **message}, as_text=as_text) for message in messages]
        try:
            return chat, template.render(chat, tools, moment=moment)
        except ConversationError as error:
            refusals.append(error)
    raise refusals[0]


def _with_arguments(message: dict[str, Any], *, as_text: bool) -> dict[str, Any]:
    """Return a message with the arguments of its tool calls as JSON text or as an object."""

    def convert(call: Any) -> Any:
        if not isinstance(call, Mapping):
            return call
        if isinstance(call.get("function"), Mapping):
            return {**call, "function": convert(call["function"])}
        arguments = call.get("arguments")
        if as_text and arguments is not None and not isinstance(arguments, str):
            return {**call, "arguments": json.dumps(arguments, ensure_ascii=False)}
        return {**call, "arguments": _parsed_json(arguments)} if "arguments" in call else dict(call)

    if not message.get("tool_calls"):
        return message
    return {**message, "tool_calls": [convert(call) for call in message["tool_calls"]]}


def _merged(spans: Iterable[Span]) -> list[Span]:
    """Sort spans, drop empty ones, join those that touch."""
    joined: list[Span] = []
    for start, end in sorted(spans):
        if joined and start <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(end, joined[-1][1]))
        elif end > start:
            joined.append((start, end))
    return joined


@dataclass(frozen=True)
class _TurnReader:
    """Cuts the turns of a rendered conversation to what the assistant writes of them.

    What takes a rendering to find out is alike for all turns of a kind, and found for one of them.
    """

    template: ChatTemplate
    chat: Messages
    tools: Any
    rendering: Rendering
    moment: Any
    include_think: bool
    include_end: bool
    found: dict[tuple[Any, ...], str] = field(default_factory=dict)

    def turns(self, wanted: set[int]) -> list[tuple[int, Span]]:
        """Cut the runs of text that the assistant's messages wrote; number of message and span."""
        text, runs, marked = self.rendering
        template, spans = self.template, []
        begun: set[int] = set()
        for a, b, number in runs:
            if number not in wanted or not text[a:b].strip():
                continue
            first = bisect_left(marked, (a, 0))
            inside = [s for s in marked[first : bisect_left(marked, (b + 1, 0))] if s[1] <= b]
            if template.marked and not inside:
                continue
            start, end, is_first = a, b, number not in begun
            if is_first:
                start += self.header_length(number, text[a:b])
                begun.add(number)
            if template.marked:
                start, end = max(start, inside[0][0]), inside[-1][1]
                end += self.closing_after(start, end, b)
            elif self.chat[number].get("tool_calls"):
                end += self.closing_of_calls(number, a, b, first=is_first)
            spans.append((number, self.cut(number, start, end, a)))
        last = max(n for n, message in enumerate(self.chat) if message["role"] == "assistant")
        if template.marked and self.include_end and last in begun:
            after = max(b for _, b, who in runs if who is not None)
            spans += [(last, span) for span in marked if span[0] >= after]
        return spans

    def header_length(self, number: int, said: str) -> int:
        """Return how much of a turn's text the generation prompt gives."""
        bare = _bare(self.template.prompt)
        prompt = bare if self.template.marked else self.template.prompt
        for given in (prompt, bare):
            if given and said.startswith(given):
                return len(given)
        if not prompt:
            return 0
        before = self.chat[number - 1] if number else {}
        told = (
            tuple(key for key, value in m.items() if value) for m in (before, self.chat[number])
        )
        kind = ("header", *told, before.get("role"), said[:40])
        if kind not in self.found:
            how = {"tools": self.tools, "moment": self.moment, "prompt": True}
            asked = _try_render(self.template, self.chat[:number], **how)
            text = asked.text if asked else ""
            longest = range(min(len(text), len(said), len(prompt) + 256), 0, -1)  # short, headers
            shared = next((n for n in longest if text.endswith(said[:n])), 0)
            self.found[kind] = said[:shared]
        header = self.found[kind]
        return len(header) if header.strip() and said.startswith(header) else 0

    def closing_after(self, start: int, end: int, limit: int) -> int:
        """Return the length of the end-of-turn token right after a template's own markers."""
        text, added = self.rendering.text, self.template.added
        written = start + len(text[start:end].rstrip())
        if self.include_end or text.endswith(added, start, written):
            return 0
        after = text[end:limit]
        blanks = len(after) - len(after.lstrip())
        token = next((t for t in added if after.startswith(t, blanks)), "")
        return blanks + len(token) if token else 0

    def closing_of_calls(self, number: int, a: int, b: int, *, first: bool) -> int:
        """Return how much of what closes a turn with calls stands in the text of the next one.

        That is what also follows the calls where the conversation stops there.
        """
        message, said = self.chat[number], self.rendering.text[a:b][-40:]
        kind = ("closing", first, *sorted(key for key, value in message.items() if value))
        if kind not in self.found:
            silent = {"content": ""} if message.get("content") else {}
            how = {"tools": self.tools, "moment": self.moment}
            chat = [*self.chat[:number], {**message, **silent}]
            stopped = _try_render(self.template, chat, **how) or Rendering("", [], [])
            own = [stopped.text[x:y] for x, y, who in stopped.runs if who == number]
            self.found[kind] = own[-1].rpartition(said)[2] if own and said in own[-1] else ""
        more = self.found[kind]
        return _shared_prefix(more, self.rendering.text[b : b + len(more)]) if more.strip() else 0

    def cut(self, number: int, start: int, end: int, base: int) -> Span:
        """Leave out what follows the end of the turn, and inserted think tags at its start."""
        text, template = self.rendering.text, self.template
        if not self.include_end:
            end = self.turn_end(start, end)
        if not self.include_think:
            header = _bare(template.prompt)
            if template.marked or not text.startswith(header, base):
                base = start
            base = min(start, base + len(header)) if base < start else start
            inserted = self.inserted_think(text[base:end], self.chat[number])
            start = max(start, base + inserted)
        return start, max(start, end)

    def turn_end(self, start: int, end: int) -> int:
        """Return where a turn ends in `start`..`end`: after its last token, or the known tail."""
        text, template = self.rendering.text, self.template
        tail = next((t for t in template.tails if t and text.endswith(t, start, end)), "")
        if "\n" in tail.strip():
            return end - len(tail) + template.through_tokens(tail)
        written = start + len(text[start:end].rstrip())
        if text.endswith(template.added, start, written):
            return written
        return end - len(tail) + len(tail.rstrip())

    def inserted_think(self, said: str, message: Mapping[str, Any]) -> int:
        """Return the length of the think tags that a turn starts with and its data lacks."""
        content = message.get("content")
        content = content if isinstance(content, str) else ""
        if not _EMPTY_THINK.match(content):
            tags = [tag for tag in self.template.inserted if _EMPTY_THINK.match(tag)]
            known = next((tag for tag in tags if said.startswith(tag)), None)
            if known is not None:
                return len(known)
            if found := _EMPTY_THINK.match(said):
                return len(found.group().rstrip())
        reasons = any(str(message.get(key) or "").strip() for key in _REASONING_KEYS)
        found = None if reasons or _THINK_TAG.search(content) else _OPEN_THINK.match(said)
        return found.end() if found else 0

    def doubts(self, wanted: set[int], spans: Iterable[tuple[int, Span]]) -> bool:
        """Tell whether the loops do not say who wrote what in this conversation.

        A template may write the next message while it is at this one, or copies of messages: then
        what others say stands in a span, or what the assistant says where no turn of it is.
        """
        text, runs, _ = self.rendering
        shown = {number for a, b, number in runs if text[a:b].strip()}
        for number in wanted - shown:
            content = self.chat[number].get("content")
            if isinstance(content, str) and content.strip() and content.strip() in text:
                return True
        for number, (start, end) in spans:
            own = repr(self.chat[number])
            for message in itertools.takewhile(
                lambda m: m.get("role") != "assistant",
                itertools.islice(self.chat, number + 1, None),
            ):
                said = str(message.get("content") or "").strip()
                if len(said) > 2 and said in text[start:end] and repr(said)[1:-1] not in own:
                    return True
        return False

    def replaced_turns(self, wanted: set[int]) -> list[tuple[int, Span]]:
        """Find turns where loops do not show them: by what changes with what a turn says."""
        text, template, spans = self.rendering.text, self.template, []
        mark = next(chr(c) for c in range(0xE000, 0xF8FF) if chr(c) not in text) * 3
        floor = 0
        for number, message in enumerate(self.chat):
            if message.get("role") != "assistant":
                continue
            said = _replaced(message, mark)
            chat = [*self.chat[:number], said, *self.chat[number + 1 :]]
            other = _try_render(template, chat, tools=self.tools, moment=self.moment)
            if other is None or mark not in other.text:
                continue  # the template does not show the turn
            first = _shared_prefix(text, other.text)
            rest, changed = text[first:], other.text[first:]
            end = len(text) - _shared_prefix(rest[::-1], changed[::-1])
            prompt = template.prompt
            place = text.rfind(prompt, floor, first) if prompt else -1
            between = text[place + len(prompt) : first]
            near = place >= 0 and not _THINK_TAG.sub("", template.tokens.sub("", between)).strip()
            start = place + len(prompt) if near else first
            tail = next((t for t in template.tails if t and text.startswith(t, end)), "")
            floor = end + len(tail)
            if number in wanted:
                spans.append((number, self.cut(number, start, floor, start)))
        return spans

    def notes(self) -> tuple[str, ...]:
        """Say what was given and does not show: messages, calls, tools."""
        text, found = self.rendering.text, []
        shown = {number for a, b, number in self.rendering.runs if text[a:b].strip()}
        for number, message in enumerate(self.chat if self.template.loops else []):
            functions = (_function_of(call) for call in message.get("tool_calls") or ())
            names = [str(function.get("name") or "") for function in functions]
            said = str(message.get("content") or "").strip()
            if any(name and name not in text for name in names):
                note = "the tool calls of an assistant message"
            elif said and number not in shown:
                note = f"a {message.get('role')} message"
            else:
                continue
            if note not in found and (names or said not in text):
                found.append(note)
        if self.tools and not _shows_tools(
            self.template.source, json.dumps(self.template.given), self.template.parts
        ):
            found.append("the tools")
        return tuple(found)


def _function_of(call: Any) -> Mapping[str, Any]:
    """Return name and arguments of a tool call, which may be wrapped as a `function`."""
    function = call.get("function", call) if isinstance(call, Mapping) else {}
    return function if isinstance(function, Mapping) else {}


def _replaced(message: Mapping[str, Any], mark: str) -> dict[str, Any]:
    """Copy a message with the mark for all that it says."""
    said = {key: mark for key in ("content", *_REASONING_KEYS) if message.get(key)}
    calls = message.get("tool_calls")
    if not calls:
        return {**message, "content": mark, **said}
    marked = []
    for call in calls:
        function = dict(_function_of(call))
        given = function.get("arguments")
        function["arguments"] = (
            dict.fromkeys(given, mark) if given and isinstance(given, Mapping) else mark
        )
        marked.append({**call, "function": function} if "function" in call else function)
    return {**message, **said, "tool_calls": marked}


@lru_cache(maxsize=64)
def _shows_tools(source: str, given: str, parts: bool) -> bool:
    """Tell whether a template writes the tools that it is given."""
    name = chr(0xE200) * 3
    tool = {"type": "function", "function": {"name": name, "description": "", "parameters": {}}}
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    template = ChatTemplate(source, json.loads(given), parts=parts)
    shown = _try_render(template, chat, tools=[tool])
    return shown is None or name in shown.text or "\\ue200" in shown.text


@lru_cache(maxsize=64)
def warn_once(note: str) -> None:
    """Log what a chat template does not show of what it is given, once a process."""
    log.warning(
        "the chat template does not show %s: it is no part of what the teacher reads "
        "(--chat-template)", show_line(note)
    )  # fmt: skip


# Tokens -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class EncodedConversation:
    """A conversation as tokens, and which of them are extracted.

    Attributes:
        text: the rendered conversation.
        input_ids: (S,) int32.
        token_positions: (N,) int32, ascending, each at least 1: the extracted tokens' places in
            `input_ids`. The first token of all is predicted from nothing and never extracted.
        way: how the spans were found, see `RenderedConversation`; "text" for plain text.
        end_of_turn: what was taken to end a turn, None if nothing was.
        notes: what the template was given and does not show, for `warn_once`.
    """

    text: str
    input_ids: npt.NDArray[np.int32]
    token_positions: npt.NDArray[np.int32]
    way: str
    end_of_turn: str | None
    notes: tuple[str, ...] = ()


def encode_conversation(
    messages: Messages,
    tokenizer: Any,
    *,
    chat_template: str | None = None,
    tools: Any = None,
    include_think: bool = False,
    include_end: bool = False,
    turns: str = "all",
    template_kwargs: Mapping[str, Any] | None = None,
    date: str | None = None,
    max_tokens: int | None = None,
) -> EncodedConversation:
    """Tokenize a conversation and find the tokens that the assistant itself would have to write.

    A token belongs to the assistant when any of its characters does. The function depends on its
    arguments only; it may run in any process.

    Args:
        messages: as `read_conversation` returns them.
        tokenizer: of transformers, fast or slow.
        chat_template: Jinja source, None for the tokenizer's own.
        tools: tool schemas for the template.
        include_think: extract think tags that the template inserts and the data does not hold, too.
        include_end: extract what the template appends after the end-of-turn token, too.
        turns: "all" turns of the assistant, or the "last" one.
        template_kwargs: arguments of the template.
        date: YYYY-MM-DD, for a template that prints the date; None: the real time.
        max_tokens: refuse text of which a first piece has more than twice as many; what is nearer
            is returned, however long it turns out.

    Raises:
        ConversationError: "no_assistant", "refused_by_template", "no_tokens", "unaligned",
            "malformed", "too_long".
        TemplateError: no conversation could work with this template or tokenizer.
    """
    template = prepare_template(
        tokenizer, chat_template, template_kwargs=template_kwargs, date=date
    )
    rendered = render_conversation(
        messages, template, tools=tools, include_think=include_think, include_end=include_end,
        turns=turns, check=lambda text: _check_text(text, tokenizer, max_tokens),
    )  # fmt: skip
    ids, starts, ends = tokenize_with_offsets(rendered.text, tokenizer)
    positions = token_positions_of(rendered.spans, starts, ends)
    if positions.size == 0:
        why = "the template shows nothing that the assistant says in a turn that counts"
        raise ConversationError("no_tokens", why)
    return EncodedConversation(
        rendered.text, ids, positions, rendered.way, rendered.end_of_turn, rendered.notes
    )


def encode_text(text: str, tokenizer: Any, *, max_tokens: int | None = None) -> EncodedConversation:
    """Tokenize plain text as the tokenizer does by itself; every token after the first counts.

    Raises:
        ConversationError: "no_tokens", "malformed", "too_long".
    """
    _check_text(text, tokenizer, max_tokens)
    ids = np.asarray(tokenizer(text, verbose=False)["input_ids"], np.int32).reshape(-1)
    if ids.size < 2:
        raise ConversationError("no_tokens", "the text has no second token to predict")
    return EncodedConversation(text, ids, np.arange(1, ids.size, dtype=np.int32), "text", None)


def _check_text(text: str, tokenizer: Any, max_tokens: int | None) -> None:
    """Refuse what is no text, and what is far too long, by a first piece of it.

    A piece may have other tokens at its end than the whole has there, but never twice as many.
    """
    if not is_unicode(text):
        why = "half a surrogate pair (\\ud800 to \\udfff) is no text"
        raise ConversationError("malformed", why)
    if max_tokens is None or len(text) <= 32 * max_tokens:
        return
    piece = tokenizer(text[: 32 * max_tokens], add_special_tokens=False, verbose=False)
    if (found := len(piece["input_ids"])) > 2 * max_tokens:
        first = f"{found:,} tokens in the first {32 * max_tokens:,} characters"
        raise ConversationError("too_long", f"{first}, at most {max_tokens} fit")


@dataclass(frozen=True)
class ConversationEncoder:
    """Turns a source row into token ids and the positions to extract; the same in every process.

    Attributes:
        tokenizer: the teacher's.
        chat_template: Jinja source, "" where `columns` name plain text.
        columns: from `resolve_columns`.
        include_think, include_end, turns, template_kwargs, date: see `encode_conversation`; a row's
            own `chat_template_kwargs` go over `template_kwargs`.
        features: of the source's columns, see `without_padding`; None where nobody knows.
    """

    tokenizer: Any
    chat_template: str
    columns: ConversationColumns
    include_think: bool = False
    include_end: bool = False
    turns: str = "all"
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    date: str | None = None
    features: Mapping[str, Any] | None = None

    @classmethod
    def of(
        cls, settings: Mapping[str, Any], tokenizer: Any, chat_template: str
    ) -> ConversationEncoder:
        """Return the encoder that a run's settings describe."""
        return cls(
            tokenizer,
            chat_template,
            ConversationColumns.of(settings),
            bool(settings.get("include_think")),
            bool(settings.get("include_end")),
            str(settings.get("turns") or "all"),
            settings.get("template_kwargs") or {},
            settings.get("template_date"),
        )

    def for_source(self, source: Any) -> ConversationEncoder:
        """Return an encoder that knows where the rows of an open source hold Arrow's nulls."""
        if source.features is None:
            return self
        needed = self.columns.needed() & source.features.keys()
        return replace(self, features={name: source.features[name] for name in needed})

    def encode(
        self, row: Mapping[str, Any], *, max_tokens: int | None = None
    ) -> EncodedConversation:
        """Return the row's tokens and those to extract, however long it is.

        Only what is far beyond `max_tokens` is refused.

        Raises:
            ConversationError: it cannot be used.
        """
        if self.columns.text is not None:
            text = _cell_text(row.get(self.columns.text), self.columns.text)
            return encode_text(text, self.tokenizer, max_tokens=max_tokens)
        own = read_template_kwargs(row, self.features)
        return encode_conversation(
            read_conversation(row, self.columns, self.features), self.tokenizer,
            chat_template=self.chat_template, tools=read_tools(row, self.features),
            include_think=self.include_think, include_end=self.include_end, turns=self.turns,
            template_kwargs={**self.template_kwargs, **own}, date=self.date, max_tokens=max_tokens,
        )  # fmt: skip

    def settings(self) -> dict[str, Any]:
        """Return what decides which tokens a row has, as runs and lengths record it."""
        return {
            **self.columns.settings(),
            "chat_template_sha256": hash_template(self.chat_template),
            "include_think": self.include_think,
            "include_end": self.include_end,
            "turns": self.turns,
            "template_kwargs": dict(self.template_kwargs) or None,
            "template_date": self.date,
        }


class Conversations(NamedTuple):
    """An open source and the encoder of its rows."""

    source: Any
    encoder: ConversationEncoder


def open_conversations(
    options: Any,
    *,
    tokenizer: Any = None,
    date: str | None = None,
    dataset_revision: str | None = None,
) -> Conversations:
    """Open tokenizer, template, source and columns as the options of a script name them.

    Args:
        options: model, revision, trust_remote_code, dataset, subset, split, streaming, the columns
            (`messages_col` …), chat_template, template_kwargs, include_think, include_end, turns.
        tokenizer: the model's, when it is loaded already.
        date: that a template is told which asks for the time; None: today's.
        dataset_revision: commit of a Hub dataset.

    Raises:
        LogitsError: one of them cannot be used, or two options exclude each other.
    """
    tokenizer = tokenizer or load_tokenizer(
        options.model, revision=options.revision, trust_remote_code=options.trust_remote_code
    )
    source = open_source(
        options.dataset, subset=options.subset, split=options.split, streaming=options.streaming,
        revision=dataset_revision,
        integers=(options.index_col, getattr(options, "length_col", None)),
    )  # fmt: skip
    names = source_columns(source)
    columns = resolve_columns(
        names, messages_col=options.messages_col, user_col=options.user_col,
        assistant_col=options.assistant_col, system_col=options.system_col,
        index_col=options.index_col, text_col=options.text_col,
    )  # fmt: skip
    if columns.text is not None:
        of_templates = ("chat_template", "template_kwargs", "include_think", "include_end")
        idle = [name for name in of_templates if getattr(options, name)]
        idle += ["turns"] if options.turns != "all" else []
        if idle:
            flags = " and ".join("--" + name.replace("_", "-") for name in idle)
            raise TemplateError(f"{flags}: --text-col uses no chat template")
        return Conversations(source, ConversationEncoder(tokenizer, "", columns))
    if "system" in names and columns.system is None:
        log.warning("the column 'system' is not used; --system-col system uses it")
    source_text = load_chat_template(options.chat_template, tokenizer)
    given = check_template_kwargs(options.template_kwargs or {})
    template = prepare_template(tokenizer, source_text, template_kwargs=given)
    if not template.ends:
        warn_once("an end of the assistant's turn")
    if unread := [name for name in given if name not in template.source]:
        warn_once(f"the argument {unread[0]!r}")
    asks_time = "strftime_now" in source_text
    encoder = ConversationEncoder(
        tokenizer, source_text, columns, options.include_think, options.include_end, options.turns,
        given, (date or date_of_today()) if asks_time else None,
    ).for_source(source)  # fmt: skip
    for row in itertools.islice(without_idle_columns(source, columns), 8):
        with contextlib.suppress(ConversationError):
            for note in encoder.encode(row).notes:
                warn_once(note)
    return Conversations(source, encoder)


def conversation_settings(config: Any, encoder: ConversationEncoder) -> dict[str, Any]:
    """Return what decides which tokens each conversation has, as runs and lengths record it.

    Args:
        config: of a script: model, revision, dataset, subset, split.
        encoder: of the run.
    """
    return {
        "model": config.model,
        "model_revision": config.revision,
        "dataset": config.dataset,
        "subset": config.subset,
        "split": config.split,
        **encoder.settings(),
    }


def token_positions_of(
    spans: Sequence[Span], starts: npt.NDArray[np.int64], ends: npt.NDArray[np.int64]
) -> npt.NDArray[np.int32]:
    """Return the positions of tokens that overlap character spans, position 0 left out.

    A token without characters of its own counts where it lies inside a span.
    """
    length = max([0, *ends.tolist(), *(b for _, b in spans)]) + 1
    wanted = np.zeros(length, bool)
    for a, b in spans:
        wanted[a:b] = True
    before = np.concatenate(([0], np.cumsum(wanted)))  # wanted characters before each place
    inside = before[np.maximum(ends, starts + 1)] > before[starts]
    inside[:1] = False
    return np.flatnonzero(inside).astype(np.int32)


def tokenize_with_offsets(
    text: str, tokenizer: Any
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Tokenize rendered text, which holds its special tokens already.

    Returns:
        ids (S,) int32; start and end of each token in characters (S,) int64.

    Raises:
        ConversationError: "unaligned": a tokenizer without offsets does not spell the text.
    """
    fast = bool(getattr(tokenizer, "is_fast", False))
    encoded = tokenizer(
        text, add_special_tokens=False, return_offsets_mapping=fast, verbose=False,
        return_attention_mask=False, return_token_type_ids=False,
    )  # fmt: skip
    ids = np.asarray(encoded["input_ids"], np.int32).reshape(-1)
    spans = encoded["offset_mapping"] if fast else _spell_tokens(text, ids.tolist(), tokenizer)
    offsets = np.asarray(spans, np.int64).reshape(-1, 2)
    return ids, offsets[:, 0], offsets[:, 1]


def _spell_tokens(text: str, ids: list[int], tokenizer: Any) -> list[Span]:
    """Find where each token lies by decoding: tokens that share a character share its place."""
    spans: list[Span] = []
    place, first = 0, 0

    def spell(stop: int) -> str | None:
        """Return the text that the tokens from `first` on stand for, where it is found next."""
        these = ids[first:stop]
        decoded = tokenizer.decode(
            these, skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        pieces = "".join(tokenizer.convert_ids_to_tokens(these)).replace("\u2581", " ")
        # decoding drops leading blanks in some families
        spellings = (decoded, f" {decoded}", "" if "\ufffd" in decoded else pieces)
        return next((s for s in spellings if s and text.startswith(s, place)), None)

    for number in range(len(ids)):
        spelled = spell(number + 1)
        if spelled is None:
            continue
        if "\ufffd" in spelled and number + 1 < len(ids) and spell(number + 2) == spelled:
            continue  # the character itself, of which the next token is another byte
        spans += [(place, place + len(spelled))] * (number + 1 - first)
        place, first = place + len(spelled), number + 1
    if first < len(ids) or place != len(text):
        raise ConversationError(
            "unaligned",
            f"the tokenizer {type(tokenizer).__name__} gives no character offsets and its tokens "
            f"do not spell the text (from {text[place : place + 20]!r} on); use its fast version",
        )
    return spans


def format_mask_preview(
    encoded: EncodedConversation, tokenizer: Any, *, color: bool = False, max_run_chars: int = 800
) -> str:
    """Lay out a conversation with its extracted tokens marked, for a person to check.

    Args:
        encoded: from `encode_conversation`.
        tokenizer: the one that encoded it.
        color: mark by terminal colours; else by ⟦ and ⟧.
        max_run_chars: longer stretches are cut in the middle, which is said.

    Returns:
        A line of counts, then the text. What would act on a terminal is made visible.
    """
    extracted = np.zeros(encoded.input_ids.size, bool)
    extracted[encoded.token_positions] = True
    bounds = np.flatnonzero(np.diff(extracted)) + 1
    before, after = ("\x1b[30;42m", "\x1b[0m") if color else ("⟦", "⟧")
    body, half = [], max_run_chars // 2
    for ids, marked in zip(
        np.split(encoded.input_ids, bounds), np.split(extracted, bounds), strict=True
    ):
        run = tokenizer.decode(ids.tolist())
        if (left := len(run) - 2 * half) > 0:
            run = f"{run[:half]} … {left:,} characters … {run[-half:]}"
        lines = show_text(run).split("\n")
        body.append("\n".join(f"{before}{x}{after}" if marked[0] else x for x in lines))
    ways = {
        "generation": "the template's markers",
        "loop": "what the template writes for each message",
        "replacing": "what changes with what the assistant says",
        "text": "all of the text",
    }
    end = "none found" if encoded.end_of_turn is None else repr(encoded.end_of_turn)
    return (
        f"{int(extracted.sum())} of {extracted.size} tokens extracted; "
        f"found by {ways[encoded.way]}; end of turn: {end}\n" + "".join(body)
    )


# --------------------------------------------------------------------------------------------------
# 4 Output
# --------------------------------------------------------------------------------------------------
#
#     name ──open_store──► files ──LogitDataset──► rows by number ──decode_rows──► TokenBlock
#                                                                    one row of it: Sample


class OpenError(LogitsError):
    """An output cannot be opened, or is too big or too strange to be read safely."""


class RowError(OpenError, IndexError):
    """The output has no such row, or the row no such token."""


TAIL_COLUMNS = tuple(name for name in SCHEMA.names if name.startswith("sampled_"))
TOKEN_COLUMNS = tuple(field.name for field in TOKEN_FIELDS)
OPTIONAL_COLUMNS = ("index", "num_tokens", *TAIL_COLUMNS, *TOKEN_COLUMNS)
READ_COLUMNS = (*SCHEMA.names, *TOKEN_COLUMNS)
CONFIG_FILE = "extraction_config.json"
TEMPLATE_FILE = "chat_template.jinja"
PARTS_PER_FOLDER = 9000  # the Hub takes 10,000 entries a folder
SETTING_RANGES = {
    "top_p": (0, 1),
    "top_p_max": (1, 255),
    "sampled_n": (0, MAX_TOKEN_ID),
    "logit_bits": (4, 16),
    "vocab_size": (1, MAX_TOKEN_ID + 1),
}
SETTING_TEXTS = (
    *("model", "model_revision", "dataset", "dataset_revision", "subset", "split"),
    *("messages_col", "user_col", "assistant_col", "system_col", "index_col"),
)
# What all rows of an output have in common; versions and attention may differ between machines.
RUN_SETTINGS = (*SETTING_RANGES, *SETTING_TEXTS, "seed", "include_think", "include_end", "min_p")
MAX_TEXT_BYTES = 16 * 2**20  # settings and templates are kilobytes
MAX_GROUP_BYTES = 2 * 2**30  # a row group that says it decodes to more is refused, not tried
MAX_GROUP_VALUES = 2**28
_SPLITS = "train|validation|valid|dev|test|eval"
_SPLIT_NAME = re.compile(rf"(?:^|/)({_SPLITS})(?=/|-[0-9]|\.parquet$)")
_SHARD = re.compile(rf"(?:data/)?(?:[0-9]{{3}}/|(?:{_SPLITS})/)?[^/]+\.parquet")
_CHECKPOINT = re.compile(r"checkpoint(-w[0-9]+)?\.json")


def part_path(number: int) -> str:
    """Return where the file of a part is in an output."""
    folder = f"{number // PARTS_PER_FOLDER:03d}/" if number >= PARTS_PER_FOLDER else ""
    return f"data/{folder}part-{number:05d}.parquet"


# Files --------------------------------------------------------------------------------------------


class Store:
    """Files by path, wherever fsspec reads them: in a folder, or a Hub dataset at one commit."""

    def __init__(self, name: str, files: Any, root: str, *, inside: Sequence[str] = ()) -> None:
        """Take the files of `root`; those that links lead out of the folders `inside` are none."""
        self.name, self.files, self.root, self.inside = name, files, root, tuple(inside)

    @property
    def on_hub(self) -> bool:
        """Say whether every read is a request."""
        return "file" not in self.files.protocol

    def list_files(self, *, depth: int | None = None) -> dict[str, int]:
        """Return the size in bytes of every file, at most so many levels down, by path."""
        with self._errors():
            found = self.files.find(self.root, maxdepth=depth, detail=True)
        sizes = {path[len(self.root) + 1 :]: int(entry["size"]) for path, entry in found.items()}
        return {path: size for path, size in sizes.items() if self._is_inside(path)}

    def open(self, path: str) -> Any:
        """Open a file to read by ranges; nothing is fetched ahead or kept."""
        if not self._is_inside(path):
            raise OpenError(f"{path} leads outside {self.name} and is not read")
        with self._errors():
            return self.files.open(f"{self.root}/{path}", "rb", cache_type="none")

    def list_checkpoints(self) -> list[str]:
        """Return the names of the workers' checkpoints."""
        return sorted(path for path in self.list_files(depth=1) if _CHECKPOINT.fullmatch(path))

    def read_text(self, path: str) -> str | None:
        """Return a small text file; None when there is no such file."""
        try:
            with self.open(path) as file:
                data = file.read(MAX_TEXT_BYTES + 1)
        except (FileNotFoundError, NotADirectoryError):
            return None
        if len(data) > MAX_TEXT_BYTES:
            raise OpenError(f"{self.name}: {path} is larger than {MAX_TEXT_BYTES >> 20} MiB")
        return bytes(data).decode("utf-8", "replace")

    def _is_inside(self, path: str) -> bool:
        real = os.path.realpath(f"{self.root}/{path}") if self.inside else ""
        return not self.inside or any(Path(real).is_relative_to(f) for f in self.inside)

    def _errors(self) -> contextlib.AbstractContextManager[None]:
        return hub_errors(self.name) if self.on_hub else contextlib.nullcontext()


def open_store(name: str | Path) -> Store:
    """Find where an output is: a folder, or a dataset repository on the Hub.

    Raises:
        OpenError: neither is there.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        root = path.resolve()
        # The Hub's local cache keeps snapshots as links to ../../blobs.
        snapshots = next((p for p in root.parents if p.name == "snapshots"), None)
        inside = [str(root), *([str(snapshots.parent / "blobs")] if snapshots else [])]
        return Store(str(path), import_extra("fsspec").filesystem("file"), str(root), inside=inside)
    text = str(name)
    for prefix in ("hf://datasets/", "https://huggingface.co/datasets/"):
        text = text.removeprefix(prefix)
    repo, _, revision = text.partition("@")
    local = text.startswith((".", "/", "~")) or text.endswith(".parquet")
    if local or not re.fullmatch(r"[\w.-]+/[\w.-]+", repo):
        raise OpenError(f"no such folder or file: {name}")
    hub = import_extra("huggingface_hub")
    with hub_errors(repo):
        commit = hub.HfApi().dataset_info(repo, revision=revision or None).sha
    return Store(repo, hub.HfFileSystem(), f"datasets/{repo}@{commit}")


def open_files(files: Sequence[str | Path]) -> tuple[Store, dict[str, int]]:
    """Return a store that holds Parquet files named one by one, and their sizes in that order."""
    if not files:
        raise OpenError("the list of files is empty")
    paths = [Path(file).expanduser().absolute() for file in files]
    for file, path in zip(files, paths, strict=True):
        if not path.is_file():
            raise OpenError(f"no such file: {file}")
    if len(set(paths)) < len(paths):
        raise OpenError("the list names a file twice")
    root = os.path.commonpath([path.parent for path in paths])
    name = str(files[0]) if len(files) == 1 else f"{len(files)} files"
    sizes = {path.relative_to(root).as_posix(): path.stat().st_size for path in paths}
    return Store(name, import_extra("fsspec").filesystem("file"), root), sizes


def transfer_errors(*others: type[Exception]) -> tuple[type[Exception], ...]:
    """Return what the Hub's client raises when a transfer fails, if it is loaded, and `others`."""
    errors = sys.modules.get("huggingface_hub.errors")
    return (errors.HTTPError, *others) if errors is not None else others


@contextlib.contextmanager
def hub_errors(name: str) -> Iterator[None]:
    """Turn what the Hub's client raises into an `OpenError`; a missing file stays what it is."""
    errors = import_extra("huggingface_hub.errors")
    try:
        yield
    except errors.RepositoryNotFoundError as error:
        raise OpenError(
            f"no dataset {name!r} on the Hub and no such folder; a private one needs a token"
        ) from error
    except FileNotFoundError:
        raise
    except transfer_errors(OSError) as error:
        raise OpenError(f"{name} cannot be read from the Hub: {first_line(error)}") from error


@contextlib.contextmanager
def parquet_errors(name: str) -> Iterator[None]:
    """Turn what pyarrow raises on a damaged file into a `FormatError` that names the file."""
    try:
        yield
    except transfer_errors() as error:
        raise OpenError(f"{name} cannot be read from the Hub: {first_line(error)}") from error
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise FormatError(f"{name} cannot be read as Parquet: {error}") from error


def load_logit_dataset(
    name: str | Path | Sequence[str | Path], split: str = "train", streaming: bool = True
) -> LogitDataset:
    """Open an output for reading: nothing but file names is read until a row is asked for.

    Args:
        name: a folder, a Parquet file, a list of Parquet files, or a dataset on the Hub
            (`user/name`, `user/name@revision`).
        split: `train` for what `extract_logits.py` writes.
        streaming: read from the Hub by byte ranges, row group by row group; False downloads the
            shards into the Hub's local cache first. Files at hand are never copied.

    Raises:
        OpenError: no such output, no Parquet files in it, or no such split; a folder that only
            holds outputs is refused with their names.
    """
    files = [name] if isinstance(name, (str, Path)) else name
    if not isinstance(files, Sequence) or not all(isinstance(f, (str, Path)) for f in files):
        raise OpenError(
            "an output is a folder, a Parquet file, a list of Parquet files, or user/name on the "
            f"Hub; not {name!r:.40} ({describe_type(name)})"
        )
    if not isinstance(name, (str, Path)):
        return LogitDataset(*open_files(files))
    if Path(name).expanduser().is_file():
        return LogitDataset(*open_files([name]))
    store = open_store(name)
    shards = find_shards(store, split)
    if store.on_hub and not streaming:
        wanted = [*shards, CONFIG_FILE, TEMPLATE_FILE, "checkpoint*.json"]
        commit = store.root.rpartition("@")[2]
        with hub_errors(store.name):
            folder = import_extra("huggingface_hub").snapshot_download(
                store.name, repo_type="dataset", revision=commit, allow_patterns=wanted
            )
        store = open_store(folder)
    return LogitDataset(store, shards)


def find_shards(store: Store, split: str) -> dict[str, int]:
    """Choose the Parquet files of a split, with their sizes, in order of their numbers.

    Files under `data/` win over others; a file whose name or folder is no split's belongs to
    `train`. What lies further down is another output's.
    """
    files = store.list_files(depth=None if store.on_hub else 3)
    found = [path for path in files if _SHARD.fullmatch(path)]
    found = [path for path in found if path.startswith("data/")] or found
    if not found:
        raise OpenError(f"{store.name} holds no Parquet files{_outputs_below(store)}")
    splits: dict[str, list[str]] = {}
    for path in found:
        named = _SPLIT_NAME.search(path)
        splits.setdefault(named[1] if named else "train", []).append(path)
    if split not in splits:
        raise OpenError(f"{store.name} has no split {split!r}; it has {', '.join(sorted(splits))}")
    return {path: files[path] for path in sorted(splits[split], key=_shard_order)}


def _outputs_below(store: Store) -> str:
    """Name the outputs in the folders below; an empty text where there are none."""
    files = store.list_files(depth=None if store.on_hub else 5)
    folders = {os.path.dirname(path) for path in files if path.endswith(".parquet")}
    folders = {re.sub(r"(/data)?(/[0-9]{3})?$", "", folder) for folder in folders} - {""}
    own = sorted(folder for folder in folders if f"{folder}/{CONFIG_FILE}" in files)
    names = [f"{store.name}/{folder}" for folder in own or sorted(folders)]
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return f" itself; name one of those below: {', '.join(names[:5])}{more}" if names else ""


def _shard_order(path: str) -> tuple[list[tuple[int, int | str]], str]:
    """Sort key that reads runs of digits in a file's name as numbers."""
    runs = filter(None, re.split(r"([0-9]+)", os.path.basename(path)))
    return [(0, int(run)) if run.isdigit() else (1, run) for run in runs], path


# Rows by number -----------------------------------------------------------------------------------


class LogitDataset:
    """The rows of an output, in shard order; each is read from its own row group alone.

    Iterating, `[i]` and `[a:b]` give rows as stored (a dictionary by column); `get_sample` decodes.
    Which shard a row is in follows from the output's checkpoints, else from the footers of the
    shards before it. Footers are kept; of the data, only the last row group.
    """

    def __init__(self, store: Store, sizes: Mapping[str, int]) -> None:
        self.name = store.name
        self.store = store
        self.shards = list(sizes)
        self.sizes = dict(sizes)  # bytes of each shard
        self._files: dict[int, Any] = {}
        self._kept: tuple[tuple[int, int], pa.Table] | None = None

    def __reduce__(self) -> Any:
        return LogitDataset, (self.store, self.sizes)  # another process opens files of its own

    def __len__(self) -> int:
        return sum(self.count_rows(shard) for shard in range(len(self.shards)))

    def __repr__(self) -> str:
        return f"LogitDataset({self.name!r}, {plural(len(self.shards), 'shard')})"

    def __getitem__(self, i: int | slice) -> Any:
        if isinstance(i, slice):
            return self.read_rows(range(*i.indices(len(self)))).to_pylist()
        return self.read_rows([check_row_number(i)]).to_pylist()[0]

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for table in self.iter_tables():
            yield from table.to_pylist()

    @property
    def settings(self) -> dict[str, Any]:
        """Settings of the run, from the first shard's metadata; empty when it holds none."""
        return parse_settings(self.metadata(0).get(METADATA_SETTINGS, b"{}"), self.shards[0])

    @property
    def column_names(self) -> list[str]:
        """Columns of the first shard."""
        return list(self.file(0).schema_arrow.names)

    @cached_property
    def words(self) -> tuple[Any, str]:
        """The teacher's tokenizer, found from the settings; or None and why it is not there."""
        try:
            return find_tokenizer(load_extraction_config(self)), ""
        except LogitsError as error:
            return None, str(error)

    def file(self, shard: int) -> Any:
        """Return the opened `pyarrow.parquet.ParquetFile` of a shard; only its footer is read."""
        if shard not in self._files:
            name = self.shards[shard]
            with parquet_errors(name):
                file = pq.ParquetFile(
                    self.store.open(name),
                    pre_buffer=self.store.on_hub,
                    thrift_string_size_limit=2**26,
                    page_checksum_verification=True,
                )
                file.schema_arrow.names  # noqa: B018 - read here, where a bad one is reported
            self._files[shard] = file
            if self._listed.get(name, file.metadata.num_rows) != file.metadata.num_rows:
                self._listed.clear()  # the list is of other files: believe the footers alone
        return self._files[shard]

    def metadata(self, shard: int) -> dict[bytes, bytes]:
        """Return the key-value metadata of a shard's footer.

        The Arrow schema holds a copy of those alone that were there when the file was opened.
        """
        return self.file(shard).metadata.metadata or {}

    def part(self, shard: int) -> dict[str, Any]:
        """Return what a shard says of the part it is; empty in files of version 0.1.

        Raises:
            FormatError: it is no JSON object with the entries of a part.
        """
        text = self.metadata(shard).get(METADATA_PART)
        return {} if text is None else parse_part(text, self.shards[shard])

    def readable_file(self, shard: int) -> Any:
        """Return an opened shard whose rows may be read beside those of the others.

        Raises:
            FormatError: they are of a later format, or of another run than a shard read before.
        """
        file, metadata = self.file(shard), self.metadata(shard)
        version = metadata.get(METADATA_VERSION, b"")
        if version.isdigit() and int(version) > FORMAT_VERSION:
            raise FormatError(
                f"{self.shards[shard]} is in format {int(version)}, formats up to {FORMAT_VERSION} "
                "can be read here: use a later logit-extraction"
            )
        first = next(iter(self._files))  # opened
        texts = [self.metadata(n).get(METADATA_SETTINGS, b"{}") for n in (first, shard)]
        differ = texts[0] != texts[1] and run_differences(*map(peek_settings, texts))
        if differ:
            raise FormatError(
                f"{self.shards[first]} and {self.shards[shard]} are of two runs, which differ in "
                f"{', '.join(differ)}: open the files of each by themselves"
            )
        return file

    def count_rows(self, shard: int) -> int:
        """Return the rows of a shard, from a checkpoint or its footer."""
        listed = self._listed.get(self.shards[shard]) if shard not in self._files else None
        return int(self.file(shard).metadata.num_rows) if listed is None else listed

    @cached_property
    def _listed(self) -> dict[str, int]:
        """Rows of the shards that a checkpoint lists at their present size."""
        try:
            records = read_checkpoints(self.store)
        except LogitsError:
            return {}
        sizes = self.sizes
        rows = {path: r["rows"] for path, r in records.items() if r["bytes"] == sizes.get(path)}
        return rows if all(type(n) is int and n >= 0 for n in rows.values()) else {}

    def read_rows(self, rows: Sequence[int] | npt.NDArray[np.int64]) -> pa.Table:
        """Return rows by number (negative: from the end), in the order asked for.

        Each row group that holds some of them is read once.

        Raises:
            RowError: there is no such row.
        """
        wanted = np.asarray(rows, np.int64)
        shards, offsets = self._locate(wanted)
        keys, places = [], []
        for shard in np.unique(shards).tolist():
            metadata = self.file(shard).metadata
            sizes = [metadata.row_group(g).num_rows for g in range(metadata.num_row_groups)]
            mine = np.flatnonzero(shards == shard)
            groups = np.searchsorted(to_starts(sizes), offsets[mine], side="right") - 1
            for group in np.unique(groups).tolist():
                at = mine[groups == group]
                table = self._read_group(shard, group)
                keys.append(table.take(pa.array(offsets[at] - to_starts(sizes)[group])))
                places.append(at)
        if not keys:
            return pa.schema([*SCHEMA, *TOKEN_FIELDS]).empty_table()
        if len(keys) == 1 and places[0].size == 1:
            return keys[0]
        return pa.concat_tables(keys).take(pa.array(np.argsort(np.concatenate(places))))

    def _locate(self, rows: npt.NDArray[np.int64]) -> tuple[Any, Any]:
        """Return the shard of each row, and its number there."""
        while True:
            listed = len(self._listed)
            wanted = np.where(rows < 0, rows + len(self), rows) if (rows < 0).any() else rows
            starts, most = [0], int(wanted.max(initial=-1))
            for shard in range(len(self.shards)):
                if starts[-1] <= most:
                    starts.append(starts[-1] + self.count_rows(shard))
            if most >= starts[-1] or wanted.min(initial=0) < 0:
                row = int(rows[(wanted < 0) | (wanted >= starts[-1])][0])
                raise RowError(f"{self.name} has {plural(len(self), 'row')}, there is no row {row}")
            shards = np.searchsorted(starts, wanted, side="right") - 1
            for shard in np.unique(shards).tolist():
                self.file(shard)
            if len(self._listed) == listed:  # else opening a file showed that the list is wrong
                return shards, wanted - np.asarray(starts)[shards]

    def iter_tables(
        self, columns: Sequence[str] = READ_COLUMNS, *, rows: int = 64
    ) -> Iterator[pa.Table]:
        """Yield the rows in order, at most `rows` at a time, reading only `columns`."""
        for shard in range(len(self.shards)):
            yield from self.iter_shard(shard, columns, rows=rows)

    def iter_shard(
        self, shard: int, columns: Sequence[str] = READ_COLUMNS, *, rows: int = 64
    ) -> Iterator[pa.Table]:
        """Yield the rows of one shard in order, at most `rows` at a time."""
        file = self.readable_file(shard)
        known = [name for name in columns if name in file.schema_arrow.names]
        for group in range(file.metadata.num_row_groups):
            check_group_size(file.metadata.row_group(group), self.shards[shard])
        with parquet_errors(self.shards[shard]):
            for batch in file.iter_batches(rows, columns=known):
                table = pa.Table.from_batches([batch])
                yield table.replace_schema_metadata(file.schema_arrow.metadata)

    def _read_group(self, shard: int, group: int) -> pa.Table:
        if self._kept is None or self._kept[0] != (shard, group):
            file = self.readable_file(shard)
            check_group_size(file.metadata.row_group(group), self.shards[shard])
            known = [name for name in READ_COLUMNS if name in file.schema_arrow.names]
            with parquet_errors(self.shards[shard]):
                self._kept = (shard, group), file.read_row_group(group, columns=known)
        return self._kept[1]


def check_group_size(group: Any, name: str) -> None:
    """Refuse a row group whose footer announces more than is safe to decode at once.

    Raises:
        OpenError: more than `MAX_GROUP_BYTES` or, in one column, `MAX_GROUP_VALUES`.
    """
    columns = [group.column(i) for i in range(group.num_columns)]
    size = max(group.total_byte_size, sum(column.total_uncompressed_size for column in columns))
    values = max((column.num_values for column in columns), default=0)
    if size > MAX_GROUP_BYTES or values > MAX_GROUP_VALUES:
        raise OpenError(
            f"{name}: a row group of {size:,} bytes and {values:,} values is not read at once; "
            "write the file again with smaller row groups"
        )


# What an output says of itself --------------------------------------------------------------------


def load_extraction_config(name: str | Path | LogitDataset) -> dict[str, Any]:
    """Return the settings of the run that wrote an output.

    They are read from `extraction_config.json`, else from the metadata of the first shard.

    Args:
        name: the output, by name or opened.

    Raises:
        OpenError: there is no such output, or it says nothing about its run.
    """
    dataset = as_output(name)
    text = dataset.store.read_text(CONFIG_FILE)
    settings = dataset.settings if text is None else parse_settings(text.encode(), CONFIG_FILE)
    if not settings:
        raise OpenError(f"{dataset.name} has no {CONFIG_FILE} and no settings in its shards")
    return settings


def parse_object(text: bytes | str, name: str, what: str) -> dict[str, Any]:
    """Parse a JSON object that an output holds.

    Raises:
        FormatError: it is none.
    """
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{name}: {what} are not JSON: {first_line(error)}") from error
    if not isinstance(value, dict):
        raise FormatError(f"{name}: {what} are no JSON object")
    return value


def parse_settings(text: bytes, name: str) -> dict[str, Any]:
    """Parse the settings of a run, whose known entries must be of the right kind.

    Raises:
        FormatError: they are not; names the entry.
    """
    settings = parse_object(text, name, "the settings")
    for entry, (low, high) in SETTING_RANGES.items():
        value = settings.get(entry)
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if value is not None and not (number and low <= value <= high):
            raise FormatError(f"{name}: {entry} is {value!r:.40}, not a number in {low}..{high}")
    for entry in SETTING_TEXTS:
        if not isinstance(settings.get(entry), (str, type(None))):
            raise FormatError(f"{name}: {entry} is {settings[entry]!r:.40}, not text")
    return settings


@lru_cache(maxsize=64)
def peek_settings(text: bytes) -> dict[str, Any]:
    """Return the settings of a run where they can be read, else nothing."""
    try:
        return parse_settings(text, "")
    except FormatError:
        return {}


def run_differences(one: Mapping[str, Any], two: Mapping[str, Any]) -> list[str]:
    """Return the settings in which two shards cannot be of one output."""
    return sorted(n for n in RUN_SETTINGS if n in one and n in two and one[n] != two[n])


PART_FIGURES = ("number", "conversations", "rows", "tokens", "nucleus", "capped")


def parse_part(text: bytes, name: str) -> dict[str, Any]:
    """Parse what a shard says of its part: whole numbers, the hash of its ids, who gave no row.

    Raises:
        FormatError: an entry is missing or of another kind; names it.
    """
    part = parse_object(text, name, "the figures of the part")
    for entry in PART_FIGURES:
        if type(part.get(entry)) is not int or part[entry] < 0:
            raise FormatError(f"{name}: {entry} of the part is {part.get(entry)!r:.40}")
    skipped = part.setdefault("skipped", {})
    if not isinstance(skipped, dict) or not all(re.fullmatch("-?[0-9]{1,10}", k) for k in skipped):
        raise FormatError(f"{name}: skipped conversations of the part are {skipped!r:.40}")
    if not isinstance(part.get("ids"), str):
        raise FormatError(f"{name}: ids of the part are {part.get('ids')!r:.40}")
    return part


def hash_ids(ids: npt.ArrayLike) -> str:
    """Return what `logits.part` says of the ids of a part's conversations, in selection order."""
    return hashlib.sha256(np.asarray(ids, "<i8").tobytes()).hexdigest()[:16]


def read_checkpoints(store: Store) -> dict[str, dict[str, Any]]:
    """Return what the checkpoints of all workers list: `bytes`, `rows` and more, by shard.

    Raises:
        FormatError: one is no checkpoint.
    """
    records: dict[str, dict[str, Any]] = {}
    for name in store.list_checkpoints():
        try:
            content = json.loads(store.read_text(name) or "{}")
            if "parts" in content:
                columns = content["parts"]
                for row in zip(*columns.values(), strict=True):
                    record = dict(zip(columns, row, strict=True))
                    records[part_path(record["number"])] = {"bytes": None, "rows": None, **record}
            else:  # version 0.1
                for path, entry in content["shards"].items():
                    rows = entry.get("figures", {}).get("rows")
                    records[path] = {"bytes": entry["bytes"], "rows": rows}
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise FormatError(f"{name} is no checkpoint with a list of shards") from error
    return records


def count_skipped(dataset: LogitDataset) -> Counter[str]:
    """Count, by reason, the conversations that gave no row, as far as the shards say."""
    parts = (dataset.part(shard) for shard in range(len(dataset.shards)))
    return Counter(str(reason) for part in parts for reason in part.get("skipped", {}).values())


@dataclass(frozen=True)
class RunLimits:
    """What the settings of a run say about its rows; the widest where they do not say."""

    top_p: float = 0.0
    top_p_max: int = 255
    sampled_n: int | None = None
    logit_bits: int = 16
    vocab_size: int = MAX_TOKEN_ID + 1
    store_tokens: bool = False

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> RunLimits:
        """Take the limits out of a run's settings."""
        names = [entry.name for entry in fields(cls) if settings.get(entry.name) is not None]
        return cls(**{name: settings[name] for name in names})


# An output, or rows at hand -----------------------------------------------------------------------


def describe_type(value: Any) -> str:
    """Say what kind of thing was passed instead of what was needed."""
    return f"a {type(value).__name__}" if value is not None else "None"


def as_output(name: Any) -> LogitDataset:
    """Open an output unless it is open already."""
    return name if isinstance(name, LogitDataset) else load_logit_dataset(name)


def as_rows(dataset: Any) -> Any:
    """Return an opened output, a `pyarrow.Table`, or something that gives rows as dictionaries."""
    files = isinstance(dataset, (list, tuple)) and len(dataset) > 0
    if isinstance(dataset, (str, Path)) or (files and isinstance(dataset[0], (str, Path))):
        return load_logit_dataset(dataset)
    if isinstance(dataset, Sample):
        raise LogitsError("a dataset is needed here, not a sample")
    if isinstance(dataset, Mapping):
        return [dataset]
    if hasattr(dataset, "with_format"):  # of `datasets`; what was passed stays as it is
        return dataset.with_format(None)
    if not hasattr(dataset, "__iter__") and not isinstance(dataset, pa.Table):
        raise LogitsError(
            "a dataset is an output by name, what load_logit_dataset returns, or rows; not "
            f"{describe_type(dataset)}"
        )
    return dataset


def check_row_number(i: Any) -> int:
    """Refuse what is no row number."""
    if isinstance(i, (bool, np.bool_)) or not isinstance(i, (int, np.integer)):
        raise RowError(
            f"a row number is an integer, not {i!r:.40} ({describe_type(i)}); iter_samples gives "
            "many rows, conversation= takes the id of one in the source"
        )
    return int(i)


def get_sample(dataset: Any, i: int = 0, *, conversation: int | None = None) -> Sample:
    """Decode row `i`, without reading the rows before it and without changing `dataset`.

    Args:
        dataset: what `load_logit_dataset` returns, or a name it takes; or rows at hand: a
            `datasets.Dataset`, a `pyarrow.Table`, a list. A stream has to be read from its start.
        i: row number; negative counts from the end where the end is known.
        conversation: choose by `index`, the id in the source, instead.

    Returns:
        Read like a dictionary: `index`, `num_tokens` (N); by token: `top_indices`,
        `top_logits_quantized`, `sampled_indices`, `sampled_logits_quantized` (lists of N arrays),
        `top_counts`, `top_min`, `top_max`, `sampled_min`, `sampled_max`, `logsumexp` (N,); and
        `input_ids` (S,) and `token_positions` (N,) where the output stores them. Decode the logits
        with `dequantize_top_logits` and its siblings.

    Raises:
        RowError: there is no such row.
        FormatError: the row does not hold what the format says.
    """
    rows = as_rows(dataset)
    if conversation is not None:
        numbers = row_numbers(rows)
        if conversation not in numbers:
            raise RowError(f"none of the {len(numbers):,} rows is of conversation {conversation!r}")
        i = numbers[conversation]
    i = check_row_number(i)
    if isinstance(rows, LogitDataset):
        return Sample(decode_rows(rows.read_rows([i]), first_row=i), rows)
    return Sample(decode_rows(_row_at_hand(rows, i), first_row=i))


def _row_at_hand(rows: Any, i: int) -> pa.Table:
    if not hasattr(rows, "__len__"):
        found = list(itertools.islice(iter(rows), i, i + 1)) if i >= 0 else []
        if not found:
            raise RowError(f"the stream has no row {i}; a stream cannot be read from its end")
        return rows_table(found)
    size = len(rows)
    if not -size <= i < size:
        raise RowError(f"the dataset has {plural(size, 'row')}, there is no row {i}")
    return rows.slice(i % size, 1) if isinstance(rows, pa.Table) else rows_table([rows[i]])


def iter_samples(dataset: Any, *, max_samples: int | None = None) -> Iterator[Sample]:
    """Decode the rows of a dataset in order, at most `max_samples` of them; see `get_sample`."""
    rows = as_rows(dataset)
    output = rows if isinstance(rows, LogitDataset) else None
    for block in iter_blocks(rows, max_samples=max_samples):
        for row in range(block.index.size):
            yield Sample(block.row(row), output)


def iter_blocks(dataset: Any, *, max_samples: int | None = None) -> Iterator[TokenBlock]:
    """Decode any kind of dataset, some dozens of rows at a time."""
    done = 0
    for table in iter_tables(dataset, max_samples=max_samples):
        yield decode_rows(table, first_row=done)
        done += table.num_rows


def iter_tables(
    dataset: Any,
    columns: Sequence[str] = READ_COLUMNS,
    *,
    max_samples: int | None = None,
    rows: int = 64,
) -> Iterator[pa.Table]:
    """Yield the rows of any kind of dataset in order as small tables of `columns`."""
    if max_samples is not None and max_samples < 0:
        raise LogitsError(f"max_samples={max_samples}: 0 rows or more, or None for all of them")
    dataset, left = as_rows(dataset), max_samples
    if isinstance(dataset, LogitDataset):
        tables = dataset.iter_tables(columns, rows=rows)
    elif isinstance(dataset, pa.Table):
        known = [name for name in columns if name in dataset.column_names]
        batches = dataset.select(known).to_batches(max_chunksize=rows)
        tables = (pa.Table.from_batches([batch]) for batch in batches)
    else:
        source = iter(dataset)
        chunks = iter(lambda: list(itertools.islice(source, rows)), [])
        tables = (rows_table(chunk) for chunk in chunks)
    for table in tables:
        if left is not None and table.num_rows >= left:
            yield table.slice(0, left)
            return
        left = None if left is None else left - table.num_rows
        yield table


def rows_table(rows: Sequence[Mapping[str, Any]]) -> pa.Table:
    """Turn rows as dictionaries by column into a table with the format's types."""
    if isinstance(rows[0], Mapping) and "top_indices" in rows[0]:
        raise FormatError("the rows are samples, decoded already: use them as they are")
    try:
        known = [field for field in (*SCHEMA, *TOKEN_FIELDS) if field.name in rows[0]]
        return pa.Table.from_pylist([dict(row) for row in rows], schema=pa.schema(known))
    except (pa.ArrowException, TypeError, ValueError, OverflowError) as error:
        raise FormatError(f"the rows are not in the shard format: {first_line(error)}") from error


def row_numbers(dataset: Any) -> dict[int, int]:
    """Return the row number of each conversation, reading only the column `index`."""
    kind = SCHEMA.field("index")
    parts = [read_column(table, kind) for table in iter_tables(dataset, [kind.name], rows=4096)]
    indices = np.concatenate(parts or [np.zeros(0, np.int32)])
    return {int(index): row for row, index in enumerate(indices)}


# Lengths measured before --------------------------------------------------------------------------


@dataclass(frozen=True)
class Lengths:
    """A lengths dataset; rows with length 0 are conversations that cannot be used."""

    index: npt.NDArray[np.int64]
    length: npt.NDArray[np.int64]
    num_tokens: npt.NDArray[np.int64] | None  # None in a file that has no such column
    settings: dict[str, Any]  # what it was measured with; empty where the file does not say


def read_lengths_settings(name: str) -> dict[str, Any]:
    """Return what a lengths dataset was measured with, {} where it does not say.

    Raises:
        SourceError: no such file.
    """
    store, paths = open_lengths(name)
    path = paths[-1]
    with store.open(path) as file, parquet_errors(path):
        return parse_lengths_settings(pq.read_schema(file), path)


def parse_lengths_settings(schema: pa.Schema, path: str) -> dict[str, Any]:
    """Return what a lengths file says that it was measured with."""
    with contextlib.suppress(ValueError, RecursionError):
        settings = json.loads((schema.metadata or {}).get(METADATA_LENGTHS, b"{}"))
        if isinstance(settings, dict):
            return settings
    name = METADATA_LENGTHS.decode()
    raise SourceError(f"{path}: its metadata {name} are damaged; measure the lengths again")


def open_lengths(name: str) -> tuple[Store, list[str]]:
    """Return where a lengths dataset is, and its files in order."""
    if Path(name).expanduser().is_file():
        store, sizes = open_files([name])
        return store, list(sizes)
    store = open_store(name)
    files = sorted(path for path in store.list_files() if path.endswith(".parquet"))
    if not files:
        raise SourceError(f"lengths {name!r}: no Parquet file there; compute_lengths.py makes one")
    return store, files


def read_lengths(name: str, *, length_col: str = "length") -> Lengths:
    """Read a lengths dataset: a Parquet file, a folder of them, or a Hub id.

    Args:
        name: the file, folder or id.
        length_col: the column of lengths, when others made the dataset.

    Raises:
        SourceError: no such file, a column is missing or holds no integers, or an index occurs
            twice.
    """
    store, paths = open_lengths(name)
    wanted = ["index", length_col]
    parts, settings = [], {}
    for path in paths:
        with store.open(path) as file, parquet_errors(path):
            table = pq.read_table(file)
        missing = [column for column in wanted if column not in table.column_names]
        if missing:
            raise SourceError(f"lengths {name!r} have no column {' and no '.join(missing)}")
        settings = parse_lengths_settings(table.schema, path)
        known = wanted + [c for c in ("num_tokens",) if c in table.column_names]
        for column in known:
            if not pa.types.is_integer(kind := table.schema.field(column).type):
                why = f"column {column!r} holds {kind}, not integers"
                raise SourceError(f"lengths {name!r}: {why}; compute_lengths.py makes them")
        parts.append(table.select(known))
    table = pa.concat_tables(parts, promote_options="default")
    if any(column.null_count for column in table.columns):
        raise SourceError(f"lengths {name!r} hold null values")
    columns = [table[c].to_numpy().astype(np.int64) for c in table.column_names]
    if np.unique(columns[0]).size != columns[0].size:
        raise SourceError(f"lengths {name!r}: an index occurs twice")
    if any((column < 0).any() for column in columns[1:]):
        raise SourceError(f"lengths {name!r} hold a negative number; compute_lengths.py makes them")
    if (np.abs(columns[0].astype(np.float64)) > 2**31).any():
        raise SourceError(f"lengths {name!r}: an index is over 32 bits")
    return Lengths(columns[0], columns[1], columns[2] if len(columns) > 2 else None, settings)


# Decoding -----------------------------------------------------------------------------------------

LogitPair = tuple[npt.NDArray[np.int32], npt.NDArray[np.float64]]


@dataclass(frozen=True, eq=False)
class Entries:
    """Ids and logits stored of T tokens, nucleus or tail, flattened.

    Token t owns the entries `starts[t]:starts[t + 1]`.
    """

    starts: npt.NDArray[np.int64]  # (T + 1,)
    ids: npt.NDArray[np.int32]  # (n,)
    q: npt.NDArray[np.uint16]  # (n,)
    low: npt.NDArray[np.float32]  # (T,), zeros where nothing is stored
    high: npt.NDArray[np.float32]  # (T,)
    logsumexp: npt.NDArray[np.float64]  # (T,)
    bits: int = 16  # resolution kept by the quantization

    @property
    def counts(self) -> npt.NDArray[np.int64]:
        """Entries of each token, (T,)."""
        return np.diff(self.starts)

    @property
    def owner(self) -> npt.NDArray[np.int64]:
        """Token of each entry, (n,)."""
        return np.repeat(np.arange(self.low.size), self.counts)

    @cached_property
    def logits(self) -> npt.NDArray[np.float64]:
        """Every logit, (n,)."""
        counts = self.counts
        return dequantize_logits(self.q, np.repeat(self.low, counts), np.repeat(self.high, counts))

    @cached_property
    def log_probs(self) -> npt.NDArray[np.float64]:
        """Log-probability of every entry, (n,)."""
        return self.logits - np.repeat(self.logsumexp, self.counts)

    @cached_property
    def probs(self) -> npt.NDArray[np.float64]:
        """Probability of every entry, (n,)."""
        return np.exp(self.log_probs)

    @cached_property
    def mass(self) -> npt.NDArray[np.float64]:
        """Probability of all entries of each token, (T,)."""
        return sum_runs(self.probs, self.starts)

    @property
    def error(self) -> npt.NDArray[np.float64]:
        """How far a logit of each token can be off by quantization, in nats, (T,).

        Half of a step that is kept; and where those steps do not divide the 65,536 levels of the
        format evenly, half of one of its levels more.
        """
        steps = 2**self.bits - 1
        uneven = 0.5 / 65535 if 65535 % steps else 0.0
        return (0.5 / steps + uneven) * (self.high.astype(np.float64) - self.low)

    def of_tokens(self, first: int, last: int) -> Entries:
        """Return the entries of some consecutive tokens, as views."""
        starts = self.starts[first : last + 1]
        part = slice(int(starts[0]), int(starts[-1]))
        tokens = slice(first, last)
        return replace(
            self, starts=starts - starts[0], ids=self.ids[part], q=self.q[part],
            low=self.low[tokens], high=self.high[tokens], logsumexp=self.logsumexp[tokens],
        )  # fmt: skip


@dataclass(frozen=True, eq=False)
class TokenBlock:
    """Some whole rows, decoded at once: R rows of T tokens in all, everything flattened.

    Row r owns tokens `row_starts[r]:row_starts[r + 1]`.
    """

    index: npt.NDArray[np.int64]  # (R,)
    row_starts: npt.NDArray[np.int64]  # (R + 1,)
    top: Entries
    tail: Entries
    logsumexp: npt.NDArray[np.float64]  # (T,)
    tokens: tuple[list[npt.NDArray[np.int32]], list[npt.NDArray[np.int32]]] | None = None

    @property
    def num_tokens(self) -> npt.NDArray[np.int64]:
        """Tokens of each row, (R,)."""
        return np.diff(self.row_starts)

    @property
    def first_probs(self) -> npt.NDArray[np.float64]:
        """Probability of each token's likeliest entry, (T,)."""
        return np.exp(self.top.high.astype(np.float64) - self.logsumexp)

    def tokens_at(self, first: int, last: int) -> TokenBlock:
        """Return some consecutive tokens of one row, without their text, as views."""
        row = int(np.searchsorted(self.row_starts, first, side="right")) - 1
        return TokenBlock(
            self.index[row : row + 1],
            np.array([0, last - first]),
            self.top.of_tokens(first, last),
            self.tail.of_tokens(first, last),
            self.logsumexp[first:last],
        )

    def row(self, row: int) -> TokenBlock:
        """Return one row as a block of its own, as views."""
        first, last = self.row_starts[row : row + 2].tolist()
        block = replace(self.tokens_at(first, last), index=self.index[row : row + 1])
        tokens = self.tokens and ([self.tokens[0][row]], [self.tokens[1][row]])
        return replace(block, tokens=tokens)


class Sample(Mapping[str, Any]):
    """One row, decoded: a view of a block of one row, read like a dictionary; see `get_sample`."""

    def __init__(self, block: TokenBlock, output: LogitDataset | None = None) -> None:
        self.block, self.output = block, output
        names = [*SAMPLE_VIEWS, *(TOKEN_COLUMNS if block.tokens is not None else ())]
        self._values: dict[str, Any] = dict.fromkeys(names)  # None until asked for

    def __getitem__(self, name: str) -> Any:
        if self._values[name] is None:
            if name in TOKEN_COLUMNS and self.block.tokens is not None:
                self._values[name] = self.block.tokens[TOKEN_COLUMNS.index(name)][0]
            else:
                self._values[name] = SAMPLE_VIEWS[name](self.block)
        return self._values[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __repr__(self) -> str:
        tokens = plural(self["num_tokens"], "token")
        return f"<sample of conversation {self['index']}: {tokens}, {', '.join(self)}>"


SAMPLE_VIEWS: dict[str, Callable[[TokenBlock], Any]] = {
    "index": lambda block: int(block.index[0]),
    "num_tokens": lambda block: int(block.row_starts[1]),
    "top_indices": lambda block: cut(block.top.ids, block.top.starts),
    "top_counts": lambda block: block.top.counts.astype(np.int32),
    "top_logits_quantized": lambda block: cut(block.top.q, block.top.starts),
    "top_min": lambda block: block.top.low,
    "top_max": lambda block: block.top.high,
    "sampled_indices": lambda block: cut(block.tail.ids, block.tail.starts),
    "sampled_logits_quantized": lambda block: cut(block.tail.q, block.tail.starts),
    "sampled_min": lambda block: block.tail.low,
    "sampled_max": lambda block: block.tail.high,
    "logsumexp": lambda block: block.logsumexp,
}


class Ragged(NamedTuple):
    """A list column, flattened: row r holds `values[starts[r]:starts[r + 1]]`."""

    values: Any  # (n,)
    starts: npt.NDArray[np.int64]  # (R + 1,)

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """Values in each row, (R,)."""
        return np.diff(self.starts)


class Fault(NamedTuple):
    """Something in a row of a table that the format does not allow."""

    row: int  # in the table
    rule: str
    message: str


def to_starts(lengths: npt.ArrayLike) -> npt.NDArray[np.int64]:
    """Return where each of the consecutive runs begins, and where the last ends."""
    return np.concatenate(([0], np.cumsum(np.asarray(lengths, np.int64)))).astype(np.int64)


def cut(values: npt.NDArray[Any], starts: npt.NDArray[np.int64]) -> list[npt.NDArray[Any]]:
    """Cut a flat array into the runs that begin at `starts`."""
    return [values[a:b] for a, b in itertools.pairwise(starts.tolist())]


def sum_runs(
    values: npt.NDArray[np.float64], starts: npt.NDArray[np.int64]
) -> npt.NDArray[np.float64]:
    """Sum each run of a flat array, empty ones to 0."""
    filled = starts[:-1] < starts[1:]
    sums = np.zeros(starts.size - 1)
    if filled.any():
        sums[filled] = np.add.reduceat(values, starts[:-1][filled])
    return sums


def read_column(table: pa.Table, field: pa.Field) -> Any:
    """Return a column of the format as numpy: an array, or `Ragged` for lists and bytes.

    Nulls become 0 or empty; `null_faults` finds them.

    Raises:
        FormatError: the column is missing, of another type, or holds values out of its range.
    """
    if field.name not in table.column_names:
        needed = ", ".join(name for name in SCHEMA.names if name not in OPTIONAL_COLUMNS)
        raise FormatError(
            f"no column {field.name!r}; a row of logits needs {needed} "
            "(is this an output of extract_logits.py?)"
        )
    try:
        array = table.column(field.name).combine_chunks()
        array = array if array.type == field.type else array.cast(field.type)
    except (pa.ArrowException, TypeError) as error:
        raise FormatError(f"column {field.name!r} is not {field.type}: {error}") from error
    if pa.types.is_binary(field.type):
        lengths = pc.fill_null(pc.binary_length(array), 0).to_numpy(zero_copy_only=False)
        joined = b"".join(value or b"" for value in array.to_pylist())
        return Ragged(np.frombuffer(joined, np.uint8), to_starts(lengths))
    if not pa.types.is_list(field.type):
        return pc.fill_null(array, 0).to_numpy(zero_copy_only=False)
    lengths = pc.fill_null(pc.list_value_length(array), 0).to_numpy(zero_copy_only=False)
    values = pc.list_flatten(array)
    values = pc.fill_null(values, 0) if values.null_count else values
    return Ragged(values.to_numpy(zero_copy_only=False), to_starts(lengths))


def read_columns(table: pa.Table) -> tuple[dict[str, Any], list[Fault]]:
    """Return the format's columns as numpy, missing optional ones filled in, and what is wrong."""
    rows = table.num_rows
    columns: dict[str, Any] = {}
    for kind in (*SCHEMA, *TOKEN_FIELDS):
        if kind.name in table.column_names or kind.name not in OPTIONAL_COLUMNS:
            columns[kind.name] = read_column(table, kind)
        elif kind.name in TAIL_COLUMNS:
            columns[kind.name] = Ragged(np.zeros(0, np.uint8), np.zeros(rows + 1, np.int64))
    columns.setdefault("num_tokens", columns["top_counts"].lengths)
    return columns, [*null_faults(table), *shape_faults(columns)]


def null_faults(table: pa.Table) -> list[Fault]:
    """Find rows that hold a null, alone or inside a list."""
    faults = []
    for name in table.column_names:
        column = table.column(name).combine_chunks()
        missing = column.is_null().to_numpy(zero_copy_only=False).copy()
        inner = pc.list_flatten(column) if pa.types.is_nested(column.type) else None
        if inner is not None and inner.null_count:
            parents = pc.list_parent_indices(column).to_numpy(zero_copy_only=False)
            missing[parents[inner.is_null().to_numpy(zero_copy_only=False)]] = True
        message = f"{name} holds a null"
        faults += [Fault(int(row), "null", message) for row in np.flatnonzero(missing)]
    return faults


def shape_faults(columns: Mapping[str, Any]) -> list[Fault]:
    """Find rows whose lists do not have the lengths that their counts ask for."""
    n = columns["num_tokens"].astype(np.int64)
    counts = columns["top_counts"]
    tail = columns["sampled_indices_low"].lengths
    wanted = dict.fromkeys(("top_counts", "top_min", "top_max", "logsumexp"), n)
    for name in ("top_indices_low", "top_logits_quantized"):
        wanted[name] = np.diff(to_starts(counts.values)[counts.starts])
    wanted["top_indices_high"] = -(-columns["top_indices_low"].lengths // 4)
    wanted["sampled_logits_quantized"] = tail
    wanted["sampled_indices_high"] = -(-tail // 4)
    for name in ("sampled_min", "sampled_max"):
        wanted[name] = np.where((tail == 0) & (columns[name].lengths == 0), 0, n)
    if "token_positions" in columns:
        wanted["token_positions"] = n
    faults = [
        Fault(int(row), "length", f"{name} holds {lengths[row]} values, not {asked[row]}")
        for name, asked in wanted.items()
        for lengths in [columns[name].lengths]
        for row in np.flatnonzero(lengths != asked)
    ]
    uneven = np.flatnonzero(tail % np.maximum(n, 1) != 0)
    message = "{} tail entries do not divide evenly among {} tokens"
    return faults + [Fault(int(row), "length", message.format(tail[row], n[row])) for row in uneven]


def decode_rows(table: pa.Table, *, first_row: int = 0) -> TokenBlock:
    """Decode all rows of a table at once, without a loop over tokens.

    Args:
        table: rows in the shard format; columns of another width are converted when nothing is
            lost, optional ones may be missing. Its metadata says to how many bits logits were kept.
        first_row: number of the table's first row, for messages.

    Raises:
        FormatError: names the row and what is wrong with it.
    """
    columns, faults = read_columns(table)
    for fault in faults[:1]:
        raise FormatError(f"row {first_row + fault.row}: {fault.message}")
    return build_block(columns, first_row, kept_bits(table))


def kept_bits(table: pa.Table) -> int:
    """Return the resolution of a table's logits; all of it where the table does not say."""
    text = (table.schema.metadata or {}).get(METADATA_SETTINGS, b"{}")
    return RunLimits.of(peek_settings(text)).logit_bits


def build_block(columns: Mapping[str, Any], first_row: int, bits: int) -> TokenBlock:
    """Assemble a block from columns whose lengths agree."""
    counts, per_row = columns["top_counts"], columns["top_counts"].lengths
    sizes = {
        "top": counts.values,
        "sampled": np.repeat(
            columns["sampled_indices_low"].lengths // np.maximum(per_row, 1), per_row
        ),
    }
    entries = {}
    for part, size in sizes.items():
        low, high = columns[f"{part}_indices_low"], columns[f"{part}_indices_high"]
        ranges = np.zeros((2, counts.values.size), np.float32)
        for ends, name in zip(ranges, (f"{part}_min", f"{part}_max"), strict=True):
            ends[np.repeat(columns[name].lengths > 0, per_row)] = columns[name].values
        pairs = zip(cut(low.values, low.starts), cut(high.values, high.starts), strict=True)
        ids = [unpack_indices(*pair) for pair in pairs]  # each row's high bits start on a byte
        entries[part] = Entries(
            to_starts(size),
            np.concatenate(ids or [np.zeros(0, np.int32)]),
            columns[f"{part}_logits_quantized"].values,
            ranges[0],
            ranges[1],
            columns["logsumexp"].values,
            bits,
        )
    numbers = np.arange(first_row, first_row + per_row.size)
    tokens = None
    if all(name in columns for name in TOKEN_COLUMNS):
        texts, positions = (columns[name] for name in TOKEN_COLUMNS)
        tokens = cut(texts.values, texts.starts), cut(positions.values, positions.starts)
    return TokenBlock(
        columns.get("index", numbers).astype(np.int64),
        counts.starts,
        entries["top"],
        entries["sampled"],
        columns["logsumexp"].values,
        tokens,
    )


# --------------------------------------------------------------------------------------------------
# 5 Probabilities
# --------------------------------------------------------------------------------------------------


class Prediction(NamedTuple):
    """A token that the teacher might have said."""

    id: int
    text: str
    logit: float
    probability: float


def as_sample(sample: Any) -> Sample:
    """Return a sample; a row as stored is decoded.

    Raises:
        LogitsError: it is something else; says what to pass.
    """
    if isinstance(sample, Sample):
        return sample
    if isinstance(sample, Mapping) and "top_indices_low" in sample:
        return get_sample(sample)
    raise LogitsError(
        f"a sample is needed, as get_sample(dataset, i) returns it, not {describe_type(sample)}"
    )


def check_token(sample: Sample, t: Any) -> int:
    """Return a token's number, counted from the start; refuse one that the sample does not have."""
    n = sample["num_tokens"]
    if isinstance(t, (bool, np.bool_)) or not isinstance(t, (int, np.integer)):
        raise RowError(f"a token's number is an integer, not {t!r:.40} ({describe_type(t)})")
    if not -n <= t < n:
        raise RowError(
            f"row with index {sample['index']} has {plural(n, 'token')}, there is no token {t}"
        )
    return int(t) % n


def check_tokenizer(tokenizer: Any) -> Any:
    """Refuse what is no tokenizer; None is one that knows no words."""
    if tokenizer is None or hasattr(tokenizer, "convert_ids_to_tokens"):
        return tokenizer
    raise LogitsError(
        f"tokenizer={tokenizer!r:.60} is {describe_type(tokenizer)}: pass what "
        "load_tokenizer('MODEL') returns"
    )


def dequantize_top_logits(sample: Mapping[str, Any], t: int | None = None) -> LogitPair:
    """Return the nucleus of token `t`: ids and logits, by descending logit.

    With `t` None, those of all tokens, flattened; token t owns `top_counts[t]` of them.

    Raises:
        RowError: the sample has no token `t`.
    """
    return _decode_entries(as_sample(sample), "top", t)


def dequantize_sampled_logits(sample: Mapping[str, Any], t: int | None = None) -> LogitPair:
    """Return the tail sample of token `t`: ids and logits, in the order drawn.

    With `t` None, those of all tokens, flattened, the same number for each.
    """
    return _decode_entries(as_sample(sample), "tail", t)


def dequantize_all_logits(sample: Mapping[str, Any], t: int) -> LogitPair:
    """Return everything stored of token `t`: ids and logits, the nucleus first, then the tail."""
    sample = as_sample(sample)
    ids, logits = dequantize_top_logits(sample, t)
    tail_ids, tail_logits = dequantize_sampled_logits(sample, t)
    return np.concatenate([ids, tail_ids]), np.concatenate([logits, tail_logits])


def _decode_entries(sample: Sample, part: str, t: int | None) -> LogitPair:
    entries: Entries = getattr(sample.block, part)
    if t is not None:
        t = check_token(sample, t)
        entries = entries.of_tokens(t, t + 1)
    return entries.ids, entries.logits


def logits_to_probs(
    logits: npt.ArrayLike, logsumexp: float | npt.ArrayLike | None = None
) -> npt.NDArray[np.float64]:
    """Return probabilities in float64.

    With `logsumexp` (over the full vocabulary, as stored) they are the teacher's own and sum to
    less than 1 over what is stored; without it they are made to sum to 1.
    """
    values = np.asarray(logits, np.float64)
    if logsumexp is not None:
        return np.exp(values - np.asarray(logsumexp, np.float64))
    weights = np.exp(values - values.max(initial=-np.inf))
    return weights / weights.sum()


def get_nucleus_probability_mass(sample: Mapping[str, Any], t: int | None = None) -> Any:
    """Return the probability that the nucleus of token `t` covers; `t` None: of all, (N,)."""
    sample = as_sample(sample)
    mass = sample.block.top.mass
    return mass if t is None else float(mass[check_token(sample, t)])


def decode_top_tokens(
    sample: Mapping[str, Any], t: int, tokenizer: Any = None, *, k: int = 10
) -> list[Prediction]:
    """Return the teacher's `k` likeliest tokens at token `t`, likeliest first.

    Args:
        sample: from `get_sample`.
        t: number of the token in the row.
        tokenizer: gives the tokens' text; `#id` stands there without one.
        k: how many, as far as the nucleus goes.
    """
    sample = as_sample(sample)
    t = check_token(sample, t)
    ids, logits = dequantize_top_logits(sample, t)
    logsumexp = sample["logsumexp"][t]
    return make_predictions(ids[:k], logits[:k], logsumexp, check_tokenizer(tokenizer))


def make_predictions(
    ids: npt.NDArray[Any], logits: npt.NDArray[Any], logsumexp: npt.ArrayLike, tokenizer: Any
) -> list[Prediction]:
    """Put ids (n,), logits (n,) and log-sum-exp (n,), or one for all, together with their text."""
    probs = logits_to_probs(logits, logsumexp).tolist()
    rows = zip(ids.tolist(), token_texts(ids, tokenizer), logits.tolist(), probs, strict=True)
    return [Prediction(*row) for row in rows]


# Text of tokens -----------------------------------------------------------------------------------


def token_texts(ids: npt.ArrayLike, tokenizer: Any = None) -> list[str]:
    """Return what each token writes; without a tokenizer, and for ids it does not know, `#id`.

    Bytes that are no whole character show as `⟨F0 9F⟩`, a leading space is kept.
    """
    unique, inverse = np.unique(np.asarray(ids, np.int64), return_inverse=True)
    texts = [_token_text(token, tokenizer) for token in unique.tolist()]
    return [texts[i] for i in inverse.reshape(-1).tolist()]


def _token_text(token: int, tokenizer: Any) -> str:
    if tokenizer is None or token >= len(tokenizer):
        return f"#{token}"
    text = str(tokenizer.decode([token]))
    piece = tokenizer.convert_ids_to_tokens(token)
    if piece is None:
        return f"#{token}"
    if "\ufffd" in text:
        data = piece_bytes(str(piece))
        return text if data is None else show_bytes(data)
    return f" {text}" if str(piece).startswith("▁") and not text.startswith(" ") else text


def piece_bytes(piece: str) -> bytes | None:
    """Return the bytes of a byte-level or byte-fallback vocabulary entry; None for other kinds."""
    if re.fullmatch(r"<0x[0-9A-Fa-f]{2}>", piece):
        return bytes([int(piece[3:5], 16)])
    table = byte_alphabet()
    return bytes(table[c] for c in piece) if all(c in table for c in piece) else None


@functools.cache
def byte_alphabet() -> dict[str, int]:
    """Return the byte that each character of a byte-level vocabulary stands for.

    Source: GPT-2's `bytes_to_unicode`; printable bytes stand for themselves, the others for the
    characters from U+0100 on.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    table = {chr(byte): byte for byte in printable}
    return table | {chr(0x100 + i): byte for i, byte in enumerate(others)}


def show_bytes(data: bytes) -> str:
    """Decode UTF-8 with what is no whole character as `⟨F0 9F⟩`."""
    return re.sub(
        r"[\udc80-\udcff]+",
        lambda run: "⟨" + " ".join(f"{ord(c) - 0xDC00:02X}" for c in run[0]) + "⟩",
        data.decode("utf-8", "surrogateescape"),
    )


def join_characters(texts: Sequence[str]) -> list[str]:
    """Write characters that several tokens make up together at the last of these tokens.

    A run of tokens of bytes alone that make whole characters together, such as `⟨F0 9F⟩`,
    `⟨98 80⟩`, becomes empty texts and the character; every other text stays.
    """
    joined, some_bytes = list(texts), re.compile(r"(.*)⟨([0-9A-F]{2}(?: [0-9A-F]{2})*)⟩", re.S)
    for start in range(len(texts)):
        first = some_bytes.fullmatch(joined[start])
        data = bytes.fromhex(first[2]) if first else b""
        for end in range(start + 1, min(start + 4, len(texts)) if first else 0):
            more = some_bytes.fullmatch(joined[end])
            if more is None or more[1]:
                break
            data += bytes.fromhex(more[2])
            with contextlib.suppress(UnicodeDecodeError):
                whole = (first[1] if first else "") + data.decode("utf-8")
                joined[start : end + 1] = [""] * (end - start) + [whole]
                break
    return joined


# Probability and rank of a given token ------------------------------------------------------------


class TokenScores(NamedTuple):
    """What a block says of one given token at each position, (T,) each."""

    log_probability: npt.NDArray[np.float64]  # of the token, or the most that it can be
    exact: npt.NDArray[np.bool_]  # False: `log_probability` is an upper bound
    rank: npt.NDArray[np.int64]  # from 1; outside the nucleus the least that it can be
    in_nucleus: npt.NDArray[np.bool_]
    in_tail: npt.NDArray[np.bool_]


def score_tokens(block: TokenBlock, actual: npt.NDArray[Any]) -> TokenScores:
    """Find the probability and rank of the token that is really there, at each position.

    Exact for stored tokens. One that is not stored has at most the smallest nucleus logit, and at
    most the probability that nucleus and tail sample leave over: the smaller of the two is given.
    Stored tail tokens above it raise the least rank of a tail token.

    Args:
        block: T tokens.
        actual: (T,) ids.
    """
    log_prob = unstored_bound(block)
    places = []
    for entries in (block.tail, block.top):  # the nucleus has the last word
        hits = np.flatnonzero(entries.ids == actual[entries.owner])
        place = np.full(actual.size, -1, np.int64)
        place[entries.owner[hits]] = hits
        log_prob[place >= 0] = entries.log_probs[place[place >= 0]]
        places.append(place)
    tail, top = places
    in_nucleus, in_tail = top >= 0, (tail >= 0) & (top < 0)
    rank = np.where(in_nucleus, top - block.top.starts[:-1], block.top.counts) + 1
    owner = block.tail.owner
    q = block.tail.q
    above = in_tail[owner] & (q > q[tail[owner]] if q.size else False)
    rank += np.bincount(owner[above], minlength=actual.size)
    return TokenScores(log_prob, in_nucleus | in_tail, rank, in_nucleus, in_tail)


def unstored_bound(block: TokenBlock) -> npt.NDArray[np.float64]:
    """Return the largest log-probability that a token stored nowhere can have, (T,)."""
    stored = sum(part.mass * np.exp(-part.error) for part in (block.top, block.tail))
    left = np.log(np.maximum(1 - stored, np.finfo(np.float64).tiny))
    return np.minimum(left, block.top.low - block.logsumexp)


# --------------------------------------------------------------------------------------------------
# 6 Beside the text
# --------------------------------------------------------------------------------------------------


class AlignmentError(LogitsError):
    """A row and a conversation do not belong together; met when text is put beside logits."""


@dataclass(frozen=True)
class TokenAnalysis:
    """One extracted token of a conversation and what the teacher thought of it."""

    t: int
    id: int
    text: str
    probability: float  # an upper bound unless `exact`
    log_probability: float
    exact: bool
    rank: int  # the least possible unless `where` is "nucleus"
    where: str  # "nucleus", "tail" or "not stored"
    nucleus_size: int
    nucleus_mass: float
    predictions: list[Prediction]
    tail: list[Prediction]


@dataclass(frozen=True)
class ConversationAnalysis:
    """A conversation as the teacher saw it.

    `pieces` is the whole rendered conversation, one piece a token: its text, and the number of the
    token in `tokens`, None where nothing was extracted.
    """

    index: int
    tokens: list[TokenAnalysis]
    pieces: list[tuple[str, int | None]]
    model: str = ""
    note: str = ""

    @property
    def mean_log_probability(self) -> float:
        """Mean log-probability of the extracted tokens, bounds taken as they are; 0 for none."""
        return float(np.mean([token.log_probability for token in self.tokens] or [0.0]))

    @property
    def typical_probability(self) -> str:
        """The geometric mean of the tokens' probabilities, with `≤` where some are bounds."""
        bound = "" if all(token.exact for token in self.tokens) else "≤ "
        return f"{bound}{math.exp(self.mean_log_probability):.1%}"

    def to_pandas(self) -> Any:
        """Return one row per extracted token as a `pandas.DataFrame`."""
        names = [f.name for f in fields(TokenAnalysis) if f.name not in ("predictions", "tail")]
        rows = [[getattr(token, name) for name in names] for token in self.tokens]
        return import_extra("pandas").DataFrame(rows, columns=names)

    def _repr_html_(self) -> str:
        page = html.escape(visualize_conversation_probabilities(self, return_html=True))
        style = "width:100%;height:32rem;border:1px solid #8884;border-radius:6px"
        return f'<iframe srcdoc="{page}" sandbox="allow-scripts" style="{style}"></iframe>'


def analyze_token_probabilities(
    sample: Mapping[str, Any],
    conversation: Sequence[Mapping[str, Any]] | None,
    tokenizer: Any,
    chat_template: str | None = None,
    *,
    k: int = 5,
    **options: Any,
) -> ConversationAnalysis:
    """Put a row beside its conversation, token by token.

    Args:
        sample: from `get_sample`.
        conversation: chat messages; None takes the tokens that the row itself stores.
        tokenizer: the teacher's.
        chat_template: Jinja source; the tokenizer's own when None.
        k: predictions kept for each token.
        options: of `encode_conversation` (tools, include_think, include_end), as in the run.

    Raises:
        AlignmentError: conversation and row do not have the same number of extracted tokens.
        ConversationError: the conversation cannot be rendered.
    """
    sample, tokenizer = as_sample(sample), check_tokenizer(tokenizer)
    if conversation is None:
        ids, positions = stored_tokens(sample)
    elif isinstance(conversation, (str, int)) or not all(
        isinstance(message, Mapping) for message in conversation
    ):
        raise LogitsError(
            "conversation is a list of messages such as {'role': 'user', 'content': 'Hi'}, not "
            f"{conversation!r:.60}; execute_analysis finds it by row or by id"
        )
    else:
        messages = [dict(message) for message in conversation]
        encoded = encode_conversation(messages, tokenizer, chat_template=chat_template, **options)
        ids, positions = encoded.input_ids, encoded.token_positions
    return align_tokens(sample, ids, positions, tokenizer, k=k)


def align_tokens(
    sample: Sample, ids: npt.NDArray[Any], positions: npt.NDArray[Any], tokenizer: Any, *, k: int
) -> ConversationAnalysis:
    """Put a row beside a tokenized conversation, ids (S,) and extracted positions (N,)."""
    check_alignment(sample, ids, positions)
    owner = {int(position): t for t, position in enumerate(positions)}
    pieces = [(text, owner.get(i)) for i, text in enumerate(token_texts(ids, tokenizer))]
    tokens = analyze_tokens(sample.block, ids[positions], tokenizer, k=k)
    return ConversationAnalysis(sample["index"], tokens, pieces)


def stored_tokens(
    sample: Mapping[str, Any],
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]:
    """Return the conversation's ids and the positions of the row's tokens among them.

    Raises:
        AlignmentError: the row does not store them.
    """
    if any(name not in sample for name in TOKEN_COLUMNS):
        raise AlignmentError(
            "the row does not store its text (--store-tokens), so the conversation is needed"
        )
    ids, positions = (sample[name] for name in TOKEN_COLUMNS)
    if positions.size and not 0 <= int(positions.min()) <= int(positions.max()) < ids.size:
        raise FormatError(f"row with index {sample['index']}: token_positions leave input_ids")
    return ids, positions


def check_alignment(
    sample: Mapping[str, Any], ids: npt.NDArray[Any], positions: npt.NDArray[Any]
) -> None:
    """Refuse a conversation whose extracted tokens are not as many as the row's.

    Raises:
        AlignmentError: names both counts.
    """
    if positions.size != sample["num_tokens"]:
        raise AlignmentError(
            f"row with index {sample['index']} holds {plural(sample['num_tokens'], 'token')}, but "
            f"its conversation has {positions.size} to extract ({ids.size} in all): another "
            "conversation, tokenizer, chat template or --include-think/--include-end"
        )


def analyze_tokens(
    block: TokenBlock, actual: npt.NDArray[Any], tokenizer: Any, *, k: int
) -> list[TokenAnalysis]:
    """Describe every token of a block, given the ids (T,) that are really there."""
    scores = score_tokens(block, actual)
    where = np.where(scores.in_nucleus, "nucleus", np.where(scores.in_tail, "tail", "not stored"))
    top, tail, lists = block.top, block.tail, []
    kept = np.arange(top.ids.size) - np.repeat(top.starts[:-1], top.counts) < k
    for ids, logits, counts in (
        (top.ids[kept], top.logits[kept], np.minimum(top.counts, k)),
        (tail.ids, tail.logits, tail.counts),
    ):
        flat = make_predictions(ids, logits, np.repeat(block.logsumexp, counts), tokenizer)
        lists.append([flat[a:b] for a, b in itertools.pairwise(to_starts(counts).tolist())])
    return [
        TokenAnalysis(
            t=t,
            id=int(actual[t]),
            text=text,
            probability=float(np.exp(scores.log_probability[t])),
            log_probability=float(scores.log_probability[t]),
            exact=bool(scores.exact[t]),
            rank=int(scores.rank[t]),
            where=str(where[t]),
            nucleus_size=int(top.counts[t]),
            nucleus_mass=float(top.mass[t]),
            predictions=lists[0][t],
            tail=lists[1][t],
        )
        for t, text in enumerate(token_texts(actual, tokenizer))
    ]


# The text behind an output ------------------------------------------------------------------------


class TextSource:
    """The conversations behind an output, tokenized as the run did.

    Teacher, template and source are found from the output's settings; the source dataset is opened
    when the first conversation is asked for.
    """

    def __init__(
        self, settings: Mapping[str, Any], *, tokenizer: Any, chat_template: str | None = None
    ) -> None:
        self.settings = settings
        self.tokenizer = tokenizer
        self.chat_template = chat_template

    @cached_property
    def source(self) -> Any:
        """The source dataset, opened at the run's revision.

        Raises:
            SourceError: it cannot be opened, or it is not what the run read.
        """
        if not self.settings.get("dataset"):
            raise SourceError("the output does not say which dataset it was made from")
        name = str(self.settings["dataset"])
        recorded = self.settings.get("dataset_revision")
        if is_digest(recorded) and source_revision(name) != recorded:
            raise SourceError(
                f"dataset {name!r} has changed since the run, so its text may not be what the "
                "teacher read; bring back the file of then, or name what to read (--dataset)"
            )
        return open_source(
            name,
            subset=self.settings.get("subset"),
            split=str(self.settings.get("split") or "train"),
            revision=recorded,
            integers=[self.settings.get("index_col")],
        )

    @cached_property
    def encoder(self) -> ConversationEncoder:
        """Turns rows of the source into the tokens that the run had.

        Raises:
            TemplateError: the chat template is not the run's.
        """
        template = self.chat_template
        if template is None:
            text_only = bool(self.settings.get("text_col"))
            template = "" if text_only else load_chat_template(None, self.tokenizer)
        if self.settings.get("chat_template_sha256") not in (None, hash_template(template)):
            raise TemplateError(
                "the chat template is not the one that the run used, so its tokens cannot be found "
                f"again; bring back {TEMPLATE_FILE} of the output"
            )
        encoder = ConversationEncoder.of(self.settings, self.tokenizer, template)
        return encoder.for_source(self.source)

    @cached_property
    def _rows(self) -> Any:
        """Row of each conversation in the source, by id."""
        column = self.encoder.columns.index
        if column is None:
            return range(len(self.source))
        return {int(value): row for row, value in enumerate(self.source[column])}

    def encode(self, index: int) -> EncodedConversation:
        """Tokenize the conversation with this `index` and find its extracted tokens.

        Raises:
            SourceError: the source has no such conversation, or is not the run's.
            ConversationError: it cannot be rendered.
        """
        if index not in self._rows:
            raise SourceError(f"{self.settings['dataset']} has no conversation {index}")
        try:
            return self.encoder.encode(self.source[self._rows[index]])
        except ConversationError as error:
            why = f"{error} in {self.settings['dataset']}: is it the run's (--dataset)?"
            raise ConversationError(error.reason, why) from error

    def actual_tokens(self, block: TokenBlock) -> list[npt.NDArray[Any] | None]:
        """Return the ids of each row's extracted tokens, None where row and text do not match."""
        found: list[npt.NDArray[Any] | None] = []
        for index, n in zip(block.index.tolist(), block.num_tokens.tolist(), strict=True):
            ids = None
            if index in self._rows:
                with contextlib.suppress(ConversationError):
                    encoded = self.encode(index)
                    ids = encoded.input_ids[encoded.token_positions]
            found.append(ids if ids is not None and ids.size == n else None)
        return found


def find_tokenizer(
    settings: Mapping[str, Any], *, model: str | None = None, trust_remote_code: bool = False
) -> Any:
    """Load the tokenizer of the teacher that a run's settings name, or from where it is now."""
    name = model or settings.get("model")
    if not name:
        raise OpenError("the output does not say which model it was made with (--model, model=)")
    revision = None if model else settings.get("model_revision")
    answers = Path(str(name)).expanduser().exists() or hub_answers(str(name))
    try:
        return load_tokenizer(
            str(name),
            revision=revision,
            trust_remote_code=trust_remote_code,
            local_files_only=not answers,
        )
    except LogitsError as error:
        what, remedy = str(error), "--model, model= says where it is now"
        if settings.get("trust_remote_code") and not trust_remote_code:
            remedy = "the run trusted its code: --trust-remote-code, trust_remote_code=True"
        elif not answers:
            what = f"the Hub is out of reach and no tokenizer of {name} is in its cache here"
        raise LogitsError(f"{what}; {remedy}") from error


def hub_answers(model: str) -> bool:
    """Ask the Hub once; its client would ask for each file six times, and wait in between."""
    hub = import_extra("huggingface_hub")
    try:
        hub.HfApi().model_info(model, timeout=10)
    except (hub.errors.HfHubHTTPError, ValueError):
        return True  # with a refusal, which loading tells best
    except (hub.errors.HTTPError, OSError):
        return False
    return True


def open_text(
    output: str | Path | LogitDataset,
    *,
    model: str | None = None,
    dataset: str | None = None,
    tokenizer: Any = None,
    trust_remote_code: bool = False,
) -> TextSource:
    """Find the teacher's tokenizer, the chat template and the source of an output by itself.

    Args:
        output: by name, or opened.
        model: where the teacher is now, if not where the run found it.
        dataset: where the conversations are now, if not where the run found them.
        tokenizer: the teacher's, when it is loaded already.
        trust_remote_code: run code that the teacher's tokenizer brings along.

    Raises:
        LogitsError: the output does not name them, or they are not there.
    """
    output = as_output(output)
    settings = load_extraction_config(output)
    if check_tokenizer(tokenizer) is None:
        tokenizer = find_tokenizer(settings, model=model, trust_remote_code=trust_remote_code)
    if dataset:
        settings = {**settings, "dataset": dataset, "dataset_revision": None}
    template = output.store.read_text(TEMPLATE_FILE)
    return TextSource(settings, tokenizer=tokenizer, chat_template=template or None)


def analyze_row(
    output: LogitDataset, row: int, text: TextSource, *, k: int = 5
) -> ConversationAnalysis:
    """Put row `row` of an output beside its conversation, stored with it or read from the source.

    Raises:
        AlignmentError: the conversation does not have as many extracted tokens as the row.
    """
    sample = get_sample(output, row)
    if sample.block.tokens is not None:
        ids, positions = stored_tokens(sample)
    else:
        try:
            encoded = text.encode(sample["index"])
        except SourceError as error:
            raise SourceError(
                f"{error}; --dataset, dataset= says where the conversations are now"
            ) from error
        ids, positions = encoded.input_ids, encoded.token_positions
    analysis = align_tokens(sample, ids, positions, text.tokenizer, k=k)
    return replace(analysis, model=str(text.settings.get("model") or ""))


def analyze_missing(output: LogitDataset, text: TextSource, index: int) -> ConversationAnalysis:
    """Show a conversation of the source that the output does not hold, as not extracted."""
    note = "this conversation is not in the output"
    for shard in range(len(output.shards)):
        reason = output.part(shard).get("skipped", {}).get(str(index))
        if reason is not None:
            note = f"this conversation gave no row: {reason}"
    try:
        encoded = text.encode(index)
    except ConversationError as error:
        return ConversationAnalysis(index, [], [], note=f"{note}: {error}")
    pieces: list[tuple[str, int | None]] = [
        (piece, None) for piece in token_texts(encoded.input_ids, text.tokenizer)
    ]
    return ConversationAnalysis(index, [], pieces, note=note)


def execute_analysis(
    logit_dataset_id: str | Path | LogitDataset,
    sample_index: int = 0,
    *,
    conversation: int | None = None,
    model: str | None = None,
    dataset: str | None = None,
    tokenizer: Any = None,
    trust_remote_code: bool = False,
    k: int = 5,
) -> ConversationAnalysis:
    """Put one row of an output beside its conversation; everything is found from the output.

    Args:
        logit_dataset_id: the output, by name or opened.
        sample_index: row number.
        conversation: choose by `index` in the source instead; one that was not extracted is shown
            as such.
        model, dataset, tokenizer, trust_remote_code: see `open_text`.
        k: predictions kept for each token.
    """
    output = as_output(logit_dataset_id)
    text = open_text(
        output, model=model, dataset=dataset, tokenizer=tokenizer,
        trust_remote_code=trust_remote_code,
    )  # fmt: skip
    if conversation is None:
        return analyze_row(output, check_row_number(sample_index), text, k=k)
    row = row_numbers(output).get(conversation)
    if row is None:
        return analyze_missing(output, text, conversation)
    return analyze_row(output, row, text, k=k)


# --------------------------------------------------------------------------------------------------
# 7 Show
# --------------------------------------------------------------------------------------------------


SURPRISE_LEVELS = (0.9, 0.5, 0.2, 0.05, 0.01, 0.001)  # level i: at least this probable; then 6
_UNSEEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u00ad\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\ud800-\udfff]"
)


def show_text(text: str) -> str:
    """Make characters visible that would not show, or would act on a terminal or a page.

    Line breaks and tabs stay. Control characters become their pictures (␛), direction marks,
    zero-width characters and lone surrogates become `⟨U+202E⟩`. Joiners inside words stay as they
    are part of scripts and emoji.
    """

    def picture(found: re.Match[str]) -> str:
        code = ord(found[0])
        if code < 0x20:
            return chr(0x2400 + code)
        return "␡" if code == 0x7F else f"⟨U+{code:04X}⟩"

    return _UNSEEN.sub(picture, text)


def show_token(text: str) -> str:
    """Write a token on one line, with its spaces and line breaks visible."""
    return show_text(text).replace("\n", "↵").replace("\t", "⇥").replace(" ", "·")


def surprise_level(probability: float) -> int:
    """Return 0 for a token the teacher expected to 6 for one it all but excluded."""
    return sum(probability < bound for bound in SURPRISE_LEVELS)


def show_probability(probability: float, exact: bool) -> str:
    """Write a probability in percent, with `≤` where it is a bound."""
    return f"{'' if exact else '≤'}{probability:.{1 if probability >= 0.01 else 2}%}"


# Terminal -----------------------------------------------------------------------------------------


def colours_wanted() -> bool:
    """Say whether the terminal shows colours: a terminal, or FORCE_COLOR; never with NO_COLOR."""
    if os.environ.get("NO_COLOR") or not (os.environ.get("FORCE_COLOR") or sys.stdout.isatty()):
        return False
    return importlib.util.find_spec("termcolor") is not None


def screen_width() -> int | None:
    """Return at how many columns lines are broken; None in pipes, whose text stays as it is."""
    if os.environ.get("COLUMNS", "").isdigit() or sys.stdout.isatty():
        return max(shutil.get_terminal_size().columns, 40)
    return None


def count_columns(text: str) -> int:
    """Return how many columns of a terminal a text takes: two for wide characters."""
    wide = sum(unicodedata.east_asian_width(c) in "WF" for c in text)
    return len(text) + wide - sum(unicodedata.combining(c) > 0 for c in text)


def break_lines(text: str, width: int | None) -> set[int]:
    """Return the places in a text before which a line has to be broken, never inside of a word.

    A space at such a place goes; scripts that write without spaces may be broken anywhere.
    """
    places: set[int] = set()
    column = 0
    for word in re.finditer(r"\n|[ \t]*[^\s]+|[ \t]+", text) if width else ():
        size = count_columns(word[0])
        if word[0] == "\n":
            column = 0
        elif column and column + size > (width or 0) and word[0].strip():
            places.add(word.start())
            column = count_columns(word[0].lstrip())
        else:
            column += size
    return places


def wrap_text(text: str) -> str:
    """Break the lines of a text for the terminal, further ones indented."""
    width = screen_width()
    if width is None:
        return text
    how: Any = {"break_long_words": False, "break_on_hyphens": False, "subsequent_indent": "    "}
    return "\n".join(textwrap.fill(line, width, **how) for line in text.split("\n"))


def paint(text: str, colour: str, *attributes: str) -> str:
    """Colour text for the terminal, line by line, where colours are wanted."""
    if not colour or not colours_wanted():
        return text
    termcolor = import_extra("termcolor", "viz")
    return "\n".join(
        termcolor.colored(line, colour, attrs=list(attributes), force_color=True) if line else line
        for line in text.split("\n")
    )


def draw_bar(share: float, width: int = 30) -> str:
    """Draw a share of 1 as a bar of block characters, in eighths."""
    eighths = round(min(max(share, 0), 1) * width * 8)
    return "█" * (eighths // 8) + ("▏▎▍▌▋▊▉"[eighths % 8 - 1] if eighths % 8 else "")


def print_sample_info(sample: Mapping[str, Any]) -> None:
    """Print what a sample holds: tokens, nucleus sizes and the probability they cover."""
    sample = as_sample(sample)
    block = sample.block
    print(f"conversation {sample['index']}: {plural(sample['num_tokens'], 'token')}")
    if not sample["num_tokens"]:
        return
    counts, mass, first = block.top.counts, block.top.mass, block.first_probs
    sizes = f"{counts.min()} to {plural(counts.max(), 'token')}, median {np.median(counts):g}"
    drawn = plural(block.tail.counts.max(), "token")
    print(f"  nucleus     {sizes}, mean {counts.mean():.1f}")
    print(f"  it covers   {mass.min():.1%} to {mass.max():.1%}, mean {mass.mean():.1%}")
    print(f"  likeliest   {first.min():.1%} to {first.max():.1%}, mean {first.mean():.1%}")
    print(f"  tail        {drawn}, worth {block.tail.mass.mean():.2%} on average")
    if "input_ids" in sample:
        print(f"  text        {plural(sample['input_ids'].size, 'token')} stored with it")


def print_top_tokens(
    sample: Mapping[str, Any], t: int, tokenizer: Any = None, *, k: int = 10
) -> None:
    """Print the teacher's `k` likeliest tokens at token `t`, with bars, and the actual token.

    Args:
        sample: from `get_sample`.
        t: number of the token in the row.
        tokenizer: gives the words; None finds the teacher's from the output that the sample is of.
        k: how many.
    """
    sample = as_sample(sample)
    if check_tokenizer(tokenizer) is None:
        tokenizer = show_missing_words(sample)
    show_token_table(sample, t, tokenizer, k=k)


def show_missing_words(sample: Sample) -> Any:
    """Return the tokenizer of the output that a sample is of, or None and print why."""
    if sample.output is None:
        return None
    tokenizer, why = sample.output.words
    if why:
        print(wrap_text(f"ids only: {why}"))
    return tokenizer


def show_token_table(
    sample: Sample, t: int, tokenizer: Any, *, k: int, actual: TokenAnalysis | None = None
) -> None:
    """Print what `print_top_tokens` does; a row that stores its text tells the actual token."""
    t = check_token(sample, t)
    predictions = decode_top_tokens(sample, t, tokenizer, k=k)
    if actual is None and sample.block.tokens is not None:
        ids, positions = stored_tokens(sample)
        (actual,) = analyze_tokens(sample.block.tokens_at(t, t + 1), ids[positions[t : t + 1]],
                                   tokenizer, k=1)  # fmt: skip
    there = ""
    if actual is not None:
        rank = f"rank {'' if actual.where == 'nucleus' else '≥ '}{actual.rank}"
        chance = show_probability(actual.probability, actual.exact)
        there = f"; it is {show_token(actual.text)}, {chance}, {rank}"
    size, mass = sample["top_counts"][t], get_nucleus_probability_mass(sample, t)
    print(wrap_text(f"token {t}: nucleus of {size} covering {mass:.1%}{there}"))
    texts = [shorten(show_token(prediction.text)) for prediction in predictions]
    widest = max(map(count_columns, texts))
    room = min(30, (screen_width() or 80) - widest - 19)
    for rank_here, (text, prediction) in enumerate(zip(texts, predictions, strict=True), 1):
        bar = paint(draw_bar(prediction.probability, max(room, 1)), "cyan")
        text += " " * (widest - count_columns(text))
        print(f"  {rank_here:3}  {text}  {prediction.probability:7.2%}  {bar}".rstrip())


def shorten(text: str, most: int = 24) -> str:
    """Cut a text for a table."""
    return text if len(text) <= most else text[: most - 1] + "…"


def print_dataset_stats(dataset: Any) -> None:
    """Print the figures of a dataset: `DatasetStats`, or what `compute_dataset_stats` takes."""
    stats = dataset if isinstance(dataset, DatasetStats) else compute_dataset_stats(dataset)
    print(f"{stats}\nnuclei by size in tokens")
    counts = np.add.reduceat(stats.nucleus.histogram, SIZE_CLASSES)
    for low, high, count in zip(SIZE_CLASSES, (*SIZE_CLASSES[1:], 256), counts, strict=True):
        label = f"{low}" if high == low + 1 else f"{low} to {high - 1}"
        if count:
            print(f"  {label:>10} {count:>12,}  {paint(draw_bar(count / counts.max()), 'cyan')}")


SIZE_CLASSES = (1, 2, 3, 5, 9, 17, 33, 65, 129)


def quick_explore(
    name: str | Path | LogitDataset,
    sample_index: int = 0,
    *,
    tokenizer: Any = None,
    tokens: int = 3,
) -> Sample:
    """Print what an output is, one of its rows and the row's first tokens; return the sample.

    Args:
        name: the output, by name or opened.
        sample_index: row number.
        tokenizer: gives the words; None finds the teacher's from the output.
        tokens: how many of the row's tokens to show.
    """
    dataset = as_output(name)
    print(wrap_text(describe_run(dataset)))
    sample = get_sample(dataset, sample_index)
    print_sample_info(sample)
    if check_tokenizer(tokenizer) is None:
        tokenizer = show_missing_words(sample)
    count = min(tokens, sample["num_tokens"])
    print(f"its first {plural(count, 'token')}:")
    for t in range(count):
        show_token_table(sample, t, tokenizer, k=5)
    return sample


def describe_run(dataset: LogitDataset) -> str:
    """Say in one line how large an output is and how it was made."""
    settings = dataset.settings
    size = f"{plural(len(dataset), 'row')} in {plural(len(dataset.shards), 'shard')}"
    skipped = count_skipped(dataset)
    if skipped:
        reasons = ", ".join(f"{reason} {n:,}" for reason, n in skipped.most_common())
        size += f", {plural(skipped.total(), 'conversation')} without a row ({reasons})"
    known = [name for name in ABOUT_RUN if settings.get(name) is not None]
    parts = [f"{name} {settings[name]!s:.100}" for name in known]
    return show_text(", ".join([f"{dataset.name}: {size}", *parts]))


ABOUT_RUN = ("model", "dataset", "split", "top_p", "top_p_max", "sampled_n", "seed", "dtype")
PAINT: tuple[tuple[str, ...], ...] = (  # by surprise level
    ("",),
    ("",),
    ("cyan",),
    ("yellow",),
    ("yellow", "bold"),
    ("magenta", "bold"),
    ("magenta", "bold", "reverse"),
)


def visualize_conversation_probabilities(
    analysis: ConversationAnalysis, return_html: bool = False
) -> str:
    """Return the conversation with each extracted token coloured by its probability.

    Coloured terminal text, or with `return_html` a self-contained page that loads nothing. Where
    the terminal has no colours, tokens below 50% carry their probability in braces.
    """
    check_analysis(analysis)
    if return_html:
        return render_page([analysis])
    count = plural(len(analysis.tokens), "token")
    likely = f"typical probability of a token {analysis.typical_probability}"
    facts = [f"conversation {analysis.index}: {count} by the teacher"]
    facts += [likely if analysis.tokens else "not extracted", *filter(None, [analysis.note])]
    return f"{wrap_text(show_text(', '.join(facts)))}\n{paint_legend()}\n\n{paint_text(analysis)}"


def check_analysis(analysis: Any) -> None:
    """Refuse what is no analysis, and say what to pass."""
    if not isinstance(analysis, ConversationAnalysis):
        raise LogitsError(
            "an analysis is needed, what analyze_token_probabilities returns, not "
            f"{type(analysis).__name__}"
        )


def paint_text(analysis: ConversationAnalysis) -> str:
    """Colour the text of a conversation for the terminal, its lines broken between words."""
    coloured = colours_wanted()
    shown, styles = [], []
    texts = join_characters([text for text, _ in analysis.pieces])
    before: list[TokenAnalysis] = []  # that the character which comes takes, too
    for text, (_, t) in zip(texts, analysis.pieces, strict=True):
        tokens = [*before, *([analysis.tokens[t]] if t is not None else [])]
        before = [] if text else tokens
        probability = math.prod(token.probability for token in tokens)
        level = surprise_level(probability)
        text = show_text(text)
        if text and not coloured and level > 1:
            body = text.rstrip("\n")
            mark = show_probability(probability, all(token.exact for token in tokens))
            text = f"{body}{{{mark}}}{text[len(body) :]}"
        shown.append(text)
        styles.append(PAINT[level] if tokens else ("dark_grey",))
    places, at, parts = break_lines("".join(shown), screen_width()), 0, []
    for text, style in zip(shown, styles, strict=True):
        inside = [place - at for place in sorted(places) if at <= place < at + len(text)]
        for place in reversed(inside):
            text = f"{text[:place]}\n{text[place:].removeprefix(' ')}"
        parts.append(paint(text, *style))
        at += len(shown[len(parts) - 1])
    return "".join(parts)


def paint_legend() -> str:
    """Say what the colours, or the braces, mean."""
    if not colours_wanted():
        return "{3.1%}: what the teacher gave the token before it, where below 50%"
    words = [paint(f"{100 * b:g}%+", *PAINT[i]) for i, b in enumerate(SURPRISE_LEVELS) if i]
    least = paint(f"less than {100 * SURPRISE_LEVELS[-1]:g}%", *PAINT[-1])
    boxes = "  ".join([*words, least, paint("not extracted", "dark_grey")])
    return f"probability that the teacher gave the token that is there:\n{boxes}"


# Markup -------------------------------------------------------------------------------------------


@functools.cache
def page_templates() -> Any:
    """Return the environment whose templates escape, and make visible, everything from the data."""
    jinja2 = import_extra("jinja2")
    parts = {"page": PAGE, "facts": FACTS, "histogram": HISTOGRAM, "stats": STATS}
    return jinja2.Environment(
        loader=jinja2.DictLoader(parts),
        autoescape=True,
        finalize=lambda value: show_text(value) if type(value) is str else value,
        trim_blocks=True,
        undefined=jinja2.StrictUndefined,
    )


def render(template: str, **values: Any) -> Any:
    """Fill in a template; what comes out is markup, which other templates take as it is."""
    markup = import_extra("markupsafe").Markup
    return markup(page_templates().get_template(template).render(**values))


def step_path(shares: Iterable[float], height: int) -> str:
    """Return shares of 1 as the SVG path of bars that are one unit wide."""
    steps = "".join(f"V{round(height - height * float(share), 2)}h1" for share in shares)
    return f"M0 {height}{steps}V{height}Z"


FACTS = """\
<table><caption>{{ title }}</caption>
{%- for label, value in facts %}<tr><th style='text-align:left'>{{ label }}</th>\
<td style='text-align:right'>{{ value }}</td></tr>{% endfor %}</table>"""

HISTOGRAM = """\
<figure style="margin:.75rem 0;max-width:60rem"><svg viewBox="0 0 {{ last }} 60" \
preserveAspectRatio="none" style="width:100%;height:5rem" role="img" \
aria-label="histogram of nucleus sizes"><path d="{{ path }}" fill="#3b82c4"/></svg>\
<figcaption style="display:flex;justify-content:space-between;gap:1rem"><span>1</span>\
<span>number of tokens by nucleus size (log scale, {{ "{:,}".format(highest) }} at the highest)\
</span><span>{{ last }}</span></figcaption></figure>"""

STATS = """\
<section><h2>The whole data set</h2>
<dl>{% for label, value in facts %}<div><dt>{{ label }}</dt><dd>{{ value }}</dd></div>\
{% endfor %}</dl>
{{ histogram }}</section>"""


def histogram_svg(histogram: npt.NDArray[np.int64]) -> Any:
    """Draw the histogram of nucleus sizes, its heights by logarithm, as inline SVG."""
    used = np.flatnonzero(histogram)
    if not used.size:
        return ""
    last, highest = int(used[-1]), int(histogram.max())
    heights = np.log1p(histogram[1 : last + 1]) / np.log1p(highest)
    return render("histogram", last=last, highest=highest, path=step_path(heights, 60))


PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="{{ policy }}">
<title>{{ title }}</title>
<style>{{ css }}</style>
</head>
<body>
<main>
<h1>{{ title }}</h1>
{% if about %}<p class="dim">{{ about }}</p>{% endif %}
{% if sections|length > 1 %}
<nav>{% for part in sections %}<a href="#s{{ loop.index0 }}">conversation {{ part.index }}</a>\
{% endfor %}</nav>
{% endif %}
{% if sections %}
<div class="legend"><span class="of">Probability that the teacher gave the token that is there\
</span>{% for bound in bounds %}<span class="b{{ loop.index0 }}">≥ {{ bound }}</span>{% endfor %}\
<span class="b{{ bounds|length }}">&lt; {{ bounds[-1] }}</span>\
<span class="bound">not stored: at most this</span><span class="out">not extracted</span></div>
<p class="dim">Point at, tap or focus a token for its predictions; arrow keys move, Esc closes.</p>
{% endif %}
{{ stats }}
{% for part in sections %}
<section id="s{{ loop.index0 }}" data-s="{{ loop.index0 }}">
<h2>Conversation {{ part.index }}</h2>
<p class="dim">{{ part.facts|join(" · ") }}</p>
{% if part.path %}
<figure><svg class="spark" data-n="{{ part.count }}" viewBox="0 0 {{ part.count }} 40" \
preserveAspectRatio="none" role="img" aria-label="nucleus size along the conversation">\
<path class="area" d="{{ part.path }}"/><line class="now" x1="0" x2="0" y1="0" y2="40" \
visibility="hidden"/></svg><div class="axis"><span>token 0</span>\
<span>nucleus size, 1 to {{ part.peak }}</span><span>token {{ part.count - 1 }}</span>\
</div></figure>
{% endif %}
<div class="text" dir="auto">\
{% for piece in part.pieces %}{% if piece.kind == "out" %}<span class="out">{{ piece.text }}</span>\
{% else %}{{ piece.before }}<span class="{{ piece.kind }}" data-t="{{ piece.t }}" tabindex=\
"{{ 0 if piece.t == 0 else -1 }}">{{ piece.text }}</span>{{ piece.after }}{% endif %}{% endfor %}\
</div>
</section>
{% endfor %}
</main>
<div id="pop" role="tooltip" hidden></div>
<script type="application/json" id="data">{{ data }}</script>
<script>{{ script }}</script>
</body>
</html>
"""

PAGE_CSS = """
:root {
  --bg: #ffffff; --fg: #1b1f24; --dim: #5f6a75; --line: #d5dbe1; --card: #f5f7f9;
  --bar: #0b62a8; --mark: #b3261e; --focus: #0b62a8;
  --b1: #fff3e2; --b2: #fee0b8; --b3: #fdc27e; --b4: #fb9a42; --b5: #c04c00; --b6: #7a2503;
  --t5: #ffffff; --t6: #ffffff;
}
@media (prefers-color-scheme: dark) {
  :root {
    --bg: #14171b; --fg: #e4e8ec; --dim: #98a3ae; --line: #363d45; --card: #1d2126;
    --bar: #5aa9e6; --mark: #ff9a8f; --focus: #8cc8ff;
    --b1: #2b2417; --b2: #463417; --b3: #6b4a14; --b4: #86570c; --b5: #f0a03c; --b6: #ffdf9e;
    --t5: #14171b; --t6: #14171b;
  }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--bg); color: var(--fg);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
main { max-width: 60rem; margin: 0 auto; padding: 1.5rem 1rem 16rem; }
h1 { font-size: 1.5rem; margin: 0 0 .25rem; }
h2 { font-size: 1.15rem; margin: 2rem 0 .25rem; }
p { margin: .25rem 0 .75rem; }
a { color: var(--bar); }
.dim, figcaption { color: var(--dim); font-size: .875rem; }
nav { display: flex; flex-wrap: wrap; gap: .25rem .9rem; margin: .75rem 0; font-size: .9rem; }
.legend { display: flex; flex-wrap: wrap; gap: .35rem .5rem; align-items: center;
  margin: .75rem 0; font-size: .85rem; }
.legend span.of { border: 0; padding: 0; }
.legend span { padding: .1rem .45rem; border-radius: 3px; border: 1px solid var(--line); }
.text { white-space: pre-wrap; overflow-wrap: anywhere; unicode-bidi: isolate; line-height: 1.85;
  border: 1px solid var(--line); border-radius: 6px; padding: .75rem 1rem; margin: .5rem 0;
  font-family: ui-monospace, "SFMono-Regular", Menlo, Consolas, "DejaVu Sans Mono", monospace;
  font-size: .92rem; }
.out { color: var(--dim); }
.tok { border-radius: 2px; cursor: pointer; padding: .12em 0; box-shadow: inset -1px 0 var(--bg); }
.b1 { background: var(--b1); } .b2 { background: var(--b2); } .b3 { background: var(--b3); }
.b4 { background: var(--b4); }
.b5 { background: var(--b5); color: var(--t5); } .b6 { background: var(--b6); color: var(--t6); }
.bound { text-decoration: underline dotted 2px; text-underline-offset: .2em; }
.tok:hover, .tok:focus, .tok.on { outline: 2px solid var(--focus); outline-offset: 0; }
figure { margin: .75rem 0; }
svg { display: block; width: 100%; overflow: visible; }
.spark { height: 3.5rem; cursor: pointer; border-bottom: 1px solid var(--line); }
.area { fill: var(--bar); opacity: .85; }
.now { stroke: var(--mark); stroke-width: 2; vector-effect: non-scaling-stroke; }
.axis { display: flex; justify-content: space-between; color: var(--dim); font-size: .8rem; }
dl { display: grid; grid-template-columns: repeat(auto-fill, minmax(9rem, 1fr)); gap: .5rem;
  margin: .75rem 0; }
dl div { background: var(--card); border: 1px solid var(--line); border-radius: 6px;
  padding: .4rem .7rem; }
dt { color: var(--dim); font-size: .8rem; } dd { margin: 0; font-size: 1.1rem; }
#pop { position: absolute; z-index: 5; overflow-y: auto; width: min(38rem, calc(100% - 1rem));
  background: var(--card); border: 1px solid var(--line); border-radius: 8px;
  padding: .6rem .8rem; font-size: .85rem;
  box-shadow: 0 4px 18px #0005; }
#pop code { font-size: 1rem; font-weight: 600; overflow-wrap: anywhere; }
#pop .both { display: grid; grid-template-columns: repeat(auto-fit, minmax(15rem, 1fr));
  gap: 0 1.5rem; }
#pop .row { display: grid; grid-template-columns: minmax(3rem, 7rem) 1fr 3.8rem; gap: .5rem;
  align-items: center; }
#pop .row bdi { overflow: hidden; text-overflow: ellipsis; white-space: nowrap; text-align: left;
  font-family: ui-monospace, Menlo, Consolas, "DejaVu Sans Mono", monospace; }
#pop .row.real bdi { color: var(--mark); font-weight: 600; }
#pop .bar { height: .65rem; background: var(--bar); border-radius: 2px; min-width: 1px; }
#pop .num { text-align: right; font-variant-numeric: tabular-nums; }
#pop h3 { font-size: .8rem; margin: .5rem 0 .1rem; color: var(--dim); font-weight: 600; }
"""

PAGE_SCRIPT = """
"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const pop = document.getElementById("pop");
let pinned = null, shown = null;

function make(parent, tag, name, text) {
  const node = document.createElement(tag);
  if (name) node.className = name;
  if (text !== undefined) node.textContent = text;
  parent.append(node);
  return node;
}
function percent(p) {
  if (p > 0 && p < 1e-5) return (100 * p).toExponential(1) + "%";
  return (p >= 0.01 ? (100 * p).toFixed(1) : (100 * p).toPrecision(2)) + "%";
}
function rows(parent, title, list, real) {
  const part = make(parent, "div");
  if (list.length) make(part, "h3", "", title);
  for (const [text, id, p] of list) {
    const row = make(part, "div", id === real ? "row real" : "row");
    make(row, "bdi", "", text).title = "id " + id;
    make(make(row, "div"), "div", "bar").style.width = 100 * Math.min(1, p) + "%";
    make(row, "span", "num", percent(p));
  }
  return part;
}
function token(node) {
  return data[+node.closest("section").dataset.s][+node.dataset.t];
}
function fill(node) {
  const it = token(node), most = it.e ? "" : "\\u2264 ";
  const least = it.w === "nucleus" ? "" : "\\u2265 ";
  pop.replaceChildren();
  const head = make(pop, "div");
  make(make(head, "code"), "bdi", "", it.x);
  make(head, "span", "dim", "  id " + it.i + ", token " + node.dataset.t);
  make(pop, "div", "facts", "p " + most + percent(it.p) + ", log p " + most + it.l.toFixed(3) +
    ", rank " + least + it.r + (it.w === "nucleus" ? "" : ", " + (it.w === "tail" ?
    "in the tail sample" : "not stored")));
  make(pop, "div", "dim", "nucleus of " + it.n + (it.n === 1 ? " token" : " tokens") +
    " covering " + percent(it.m));
  const both = make(pop, "div", "both");
  rows(both, "Likeliest", it.top, it.i);
  const tail = rows(both, "Tail sample, in the order drawn", it.tail, it.i);
  if (it.s > it.tail.length) make(tail, "div", "dim", "and " + (it.s - it.tail.length) + " more");
}
function place(node) {
  const boxes = [...node.getClientRects()].filter(box => box.height);
  const first = boxes[0] || node.getBoundingClientRect(), last = boxes[boxes.length - 1] || first;
  const wide = document.documentElement.clientWidth, high = document.documentElement.clientHeight;
  pop.style.maxHeight = "";
  const above = first.top - 14, below = high - last.bottom - 14, wanted = pop.offsetHeight;
  const under = wanted <= below || below >= above;
  pop.style.maxHeight = Math.max(96, under ? below : above) + "px";
  const left = Math.max(8, Math.min(first.left, wide - pop.offsetWidth - 8));
  pop.style.left = left + scrollX + "px";
  const top = under ? last.bottom + 6 : first.top - pop.offsetHeight - 6;
  pop.style.top = scrollY + top + "px";
}
function show(node) {
  if (shown) { shown.classList.remove("on"); shown.removeAttribute("aria-describedby"); }
  shown = node;
  if (!node) { pop.hidden = true; return; }
  fill(node);
  pop.hidden = false;
  place(node);
  node.classList.add("on");
  node.setAttribute("aria-describedby", "pop");
  const line = node.closest("section").querySelector(".now");
  if (line) {
    for (const x of ["x1", "x2"]) line.setAttribute(x, +node.dataset.t + 0.5);
    line.removeAttribute("visibility");
  }
}
function move(node, key) {
  const all = [...node.closest(".text").querySelectorAll(".tok")], at = all.indexOf(node);
  if (key === "ArrowRight") return all[at + 1];
  if (key === "ArrowLeft") return all[at - 1];
  if (key === "Home") return all[0];
  if (key === "End") return all[all.length - 1];
  const step = key === "ArrowDown" ? 1 : -1, from = node.getClientRects()[0];
  let best = null, score = Infinity, line = 0;
  for (let i = at + step; all[i]; i += step) {
    const box = all[i].getClientRects()[0], down = step * (box.top - from.top);
    if (down < 4) continue;
    if (best && down > line + 4) break;
    const aside = Math.abs(box.left - from.left);
    if (aside < score) { best = all[i]; score = aside; }
    line = down;
  }
  return best;
}
function focus(node) {
  if (!node) return;
  for (const old of node.closest(".text").querySelectorAll('.tok[tabindex="0"]')) old.tabIndex = -1;
  node.tabIndex = 0;
  node.focus();
}
document.addEventListener("mouseover", event => {
  const node = event.target.closest(".tok");
  if (node && !pinned) show(node);
});
document.addEventListener("mouseout", event => {
  if (!pinned && event.target.closest(".tok")) show(document.activeElement.closest(".tok"));
});
document.addEventListener("focusin", event => {
  const node = event.target.closest(".tok");
  if (node) { pinned = null; show(node); }
});
document.addEventListener("focusout", () => { if (!pinned) show(null); });
document.addEventListener("click", event => {
  const node = event.target.closest(".tok"), spark = event.target.closest(".spark");
  if (spark) {
    const box = spark.getBoundingClientRect(), n = +spark.dataset.n;
    const at = Math.min(n - 1, Math.floor(n * (event.clientX - box.left) / box.width));
    const wanted = spark.closest("section").querySelector('.tok[data-t="' + at + '"]');
    if (wanted) { wanted.scrollIntoView({block: "center"}); focus(wanted); }
  } else if (node) {
    const again = pinned === node;
    focus(node);
    pinned = again ? null : node;
    show(again ? null : node);
  } else if (!event.target.closest("#pop")) {
    pinned = null;
    show(null);
  }
});
document.addEventListener("keydown", event => {
  const node = event.target.closest(".tok");
  if (event.key === "Escape") { pinned = null; show(null); }
  if (!node || event.ctrlKey || event.metaKey || event.altKey) return;
  if (["ArrowRight", "ArrowLeft", "ArrowUp", "ArrowDown", "Home", "End"].includes(event.key)) {
    event.preventDefault();
    focus(move(node, event.key));
  }
});
function follow() {
  const at = /^#s([0-9]+)-t([0-9]+)$/.exec(location.hash);
  const node = at && document.querySelector("#s" + at[1] + ' .tok[data-t="' + at[2] + '"]');
  if (node) { node.scrollIntoView({block: "center"}); focus(node); }
}
addEventListener("hashchange", follow);
follow();
"""


# The page -----------------------------------------------------------------------------------------


def escape_json(value: Any) -> str:
    """Write JSON that may stand in a script element whatever text it holds."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return re.sub("[<>&\u2028\u2029\ud800-\udfff]", lambda c: f"\\u{ord(c[0]):04x}", text)


def render_page(
    analyses: Sequence[ConversationAnalysis],
    *,
    title: str = "What the teacher expected",
    about: str = "",
    stats: DatasetStats | None = None,
) -> str:
    """Return a self-contained page of several conversations: one file, no network, both themes.

    `page.html#s1-t40` opens it at token 40 of the second conversation.

    Args:
        analyses: the conversations, in the order shown.
        title: heading and window title.
        about: a line under the heading.
        stats: figures put before the conversations.
    """
    for analysis in analyses if isinstance(analyses, (list, tuple)) else [analyses]:
        check_analysis(analysis)
    markup = import_extra("markupsafe").Markup
    digest = base64.b64encode(hashlib.sha256(PAGE_SCRIPT.encode()).digest()).decode()
    page = render(
        "page",
        # Even a mistake in escaping could not run: only this very script may.
        policy=f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'",
        title=title,
        about=about,
        bounds=[f"{100 * bound:g}%" for bound in SURPRISE_LEVELS],
        stats=stats.to_html() if stats is not None else "",
        sections=[page_section(analysis) for analysis in analyses],
        css=markup(PAGE_CSS),
        data=markup(escape_json([[token_data(token) for token in a.tokens] for a in analyses])),
        script=markup(PAGE_SCRIPT),
    )
    return str(page)


TAIL_SHOWN = 6  # tail tokens listed in the page; how many more there are is said


def token_data(token: TokenAnalysis) -> dict[str, Any]:
    """Return what the page shows when a token is chosen, under short names."""
    entries = {
        name: [[show_token(p.text), p.id, round_to(p.probability)] for p in predictions]
        for name, predictions in (("top", token.predictions), ("tail", token.tail[:TAIL_SHOWN]))
    }
    return {
        "x": show_token(token.text),
        "i": token.id,
        "p": round_to(token.probability),
        "l": round_to(token.log_probability, 6),
        "e": int(token.exact),
        "r": token.rank,
        "w": token.where,
        "n": token.nucleus_size,
        "m": round_to(token.nucleus_mass),
        "s": len(token.tail),
        **entries,
    }


def round_to(value: float, digits: int = 4) -> float:
    """Round to significant digits; what is not finite becomes the nearest number JSON has."""
    if not math.isfinite(value):
        return 0.0 if math.isnan(value) else math.copysign(sys.float_info.max, value)
    return float(f"{value:.{digits}g}")


def page_section(analysis: ConversationAnalysis) -> dict[str, Any]:
    """Return what the page shows of one conversation: its figures, its sparkline, its text."""
    tokens = analysis.tokens
    facts = [plural(len(tokens), "token") if tokens else "not extracted"]
    sizes, peak = [token.nucleus_size for token in tokens], 0
    if tokens:
        peak = max(sizes)
        first = sum(token.rank == 1 for token in tokens) / len(tokens)
        facts.append(f"typical probability {analysis.typical_probability}")
        facts.append(f"{first:.0%} are the teacher's first choice")
    return {
        "index": analysis.index,
        "facts": [*facts, *filter(None, (analysis.model, analysis.note))],
        "count": len(tokens),
        "peak": peak,
        "path": step_path((size / peak for size in sizes), 40) if tokens else "",
        "pieces": list(page_pieces(analysis)),
    }


def page_pieces(analysis: ConversationAnalysis) -> Iterator[dict[str, Any]]:
    """Yield the text of a conversation; neighbours that were not extracted share a piece.

    Spaces before a token and the line break after it are left out of its box: where a line wraps
    they would hang there as a coloured stub.
    """
    for extracted, run in itertools.groupby(
        analysis.pieces, key=lambda piece: piece[1] is not None
    ):
        if not extracted:
            yield {"kind": "out", "text": "".join(text for text, _ in run)}
            continue
        for text, t in run:
            token = analysis.tokens[t or 0]
            before = re.match(r" *(?=[^ \n])", text)
            body = text[before.end() if before else 0 :]
            after = "\n" if body.endswith("\n") else ""
            body = body.replace("\n", "↵\n").removesuffix(after)
            body = body.replace(" ", "\u00a0") if not body.strip(" ") else body
            kind = f"tok b{surprise_level(token.probability)}" + ("" if token.exact else " bound")
            yield {"kind": kind, "t": t, "before": before[0] if before else "",
                   "text": body or "∅", "after": after}  # fmt: skip


def write_page(path: str | Path, page: str) -> None:
    """Write a page under a temporary name and rename it.

    Raises:
        LogitsError: it cannot be written there.
    """
    with writing(path) as target:
        temporary = target.with_name(target.name + ".tmp")
        try:
            temporary.write_text(page, encoding="utf-8")
            temporary.replace(target)
        finally:
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def writing(path: str | Path) -> Iterator[Path]:
    """Make the folder of a file that is written for the user; say in one line where that fails."""
    target = Path(path).expanduser()
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        yield target
    except OSError as error:
        raise LogitsError(f"cannot write {path}: {error.strerror or error}") from error


# Plots --------------------------------------------------------------------------------------------


@contextlib.contextmanager
def plot_style() -> Iterator[tuple[Any, Any]]:
    """Yield pyplot and the colour-blind-safe palette, with the house style while it lasts."""
    pyplot = import_extra("matplotlib.pyplot", "viz")
    seaborn = import_extra("seaborn", "viz")
    style = {"axes.titlesize": 11, "axes.labelsize": 10, "figure.dpi": 110, "font.size": 10}
    with pyplot.rc_context(), seaborn.axes_style("whitegrid"), pyplot.rc_context(style):
        yield pyplot, seaborn.color_palette("colorblind")


def finish_figure(pyplot: Any, figure: Any) -> Any:
    """Take a figure out of pyplot's hands, so that a notebook shows it once, as a result."""
    figure.tight_layout()
    pyplot.close(figure)
    return figure


def plot_logit_distribution(sample: Mapping[str, Any], t: int = 0, *, tokenizer: Any = None) -> Any:
    """Plot what is stored of token `t`: the nucleus by rank, then the tail sample.

    Args:
        sample: from `get_sample`.
        t: number of the token in the row.
        tokenizer: gives the words; None finds the teacher's from the output that the sample is of.
    """
    sample = as_sample(sample)
    if check_tokenizer(tokenizer) is None and sample.output is not None:
        tokenizer, _ = sample.output.words
    ids, logits = dequantize_top_logits(sample, t)
    _, tail = dequantize_sampled_logits(sample, t)
    total = float(sample["logsumexp"][t])
    with plot_style() as (pyplot, colours):
        figure, axes = pyplot.subplots(figsize=(7, 4))
        ranks = np.arange(1, ids.size + 1)
        axes.plot(
            ranks,
            logits,
            "o-",
            ms=4,
            color=colours[0],
            label=f"nucleus, {plural(ids.size, 'token')}",
        )
        if tail.size:
            behind = ids.size + np.arange(1, tail.size + 1)
            label = f"tail sample, {plural(tail.size, 'token')} (ranks unknown)"
            axes.plot(behind, np.sort(tail)[::-1], "^", ms=5, color=colours[1], label=label)
        axes.axhline(total, color=colours[7], ls="--", lw=1, label="log-sum-exp (probability 1)")
        likeliest = decode_top_tokens(sample, t, tokenizer, k=5)
        names = [f"{100 * p.probability:5.1f}%  {plain_label(p.text)}" for p in likeliest]
        frame = {"facecolor": "white", "edgecolor": "0.8", "boxstyle": "round"}
        axes.text(
            0.98,
            0.86,
            "\n".join(names),
            va="top",
            ha="right",
            ma="left",
            bbox=frame,
            transform=axes.transAxes,
            family=["monospace", "sans-serif"],
        )
        axes.set(xlabel="rank in the nucleus, then the tail sample", ylabel="logit (nats)")
        axes.margins(y=0.12)
        axes.set_title(f"Token {t}: {get_nucleus_probability_mass(sample, t):.1%} in the nucleus")
        axes.legend()
        return finish_figure(pyplot, figure)


def plain_label(text: str) -> str:
    """Return a token as a label that matplotlib takes literally, at most 20 characters long."""
    shown = show_token(text).replace("$", r"\$")
    return shown if len(shown) <= 20 else shown[:19] + "…"


def plot_nucleus_vs_sampled(sample: Mapping[str, Any], t: int | None = None) -> Any:
    """Plot the log-probabilities of nucleus entries against the tail sample's.

    Those of token `t`, or of all tokens of the sample.
    """
    sample = as_sample(sample)
    which = plural(sample["num_tokens"], "token") if t is None else f"token {t}"
    parts = []
    for name, decode, group in (
        ("nucleus", dequantize_top_logits, "top_indices"),
        ("tail sample", dequantize_sampled_logits, "sampled_indices"),
    ):
        _, logits = decode(sample, t)
        sizes = [ids.size for ids in sample[group]]
        totals = np.repeat(sample["logsumexp"], sizes) if t is None else sample["logsumexp"][t]
        parts.append((name, logits - totals))
    low = min((values.min() for _, values in parts if values.size), default=-1.0)
    edges = np.linspace(min(low, -1.0), 0, 61)
    with plot_style() as (pyplot, colours):
        figure, axes = pyplot.subplots(figsize=(7, 4))
        for (name, values), colour, hatch in zip(parts, colours, ("", "//"), strict=False):
            axes.hist(
                values,
                edges,
                color=colour,
                alpha=0.6,
                hatch=hatch,
                edgecolor=colour,
                label=f"{name}, {values.size:,} entries",
            )
        axes.set(xlabel="log-probability (nats)", ylabel="entries", yscale="log")
        axes.set_title(f"Conversation {sample['index']}: what is stored of {which}")
        axes.legend(loc="upper left")
        return finish_figure(pyplot, figure)


def plot_nucleus_sizes(sample: Mapping[str, Any]) -> Any:
    """Plot nucleus size, and the probability that the nucleus covers, along a sample."""
    block = as_sample(sample).block
    tokens = np.arange(block.top.counts.size)
    with plot_style() as (pyplot, colours):
        figure, (upper, lower) = pyplot.subplots(
            2, 1, figsize=(8, 4.6), sharex=True, height_ratios=(3, 2)
        )
        edges = np.arange(tokens.size + 1) - 0.5
        heights = np.append(block.top.counts, block.top.counts[-1:])
        upper.fill_between(edges, heights, step="post", color=colours[0], linewidth=0)
        upper.set(ylabel="nucleus size (tokens)", ylim=(0, None))
        upper.set_title(f"Conversation {sample['index']}: nucleus along the text")
        mass = block.top.mass
        lower.plot(tokens, 100 * mass, ".", ms=4, color=colours[1])
        lower.set(ylabel="covered (%)", xlabel="token of the row", ylim=(0, 104))
        return finish_figure(pyplot, figure)


def plot_nucleus_size_analysis(stats: Any, *, max_samples: int | None = None) -> Any:
    """Plot how nucleus sizes are distributed over an output: counts, and the share up to a size.

    Args:
        stats: `NucleusSizeStats`, or what `analyze_nucleus_sizes` takes.
        max_samples: rows to read at most.
    """
    if not isinstance(stats, NucleusSizeStats):
        stats = analyze_nucleus_sizes(stats, max_samples)
    sizes = np.arange(1, max(stats.max, 1) + 1)
    counts = stats.histogram[1 : sizes.size + 1]
    with plot_style() as (pyplot, colours):
        figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 3.8))
        left.bar(sizes, counts, width=1.0, color=colours[0], linewidth=0)
        left.set(xlabel="nucleus size (tokens)", ylabel="tokens", yscale="log")
        left.set_title(f"{plural(stats.tokens, 'token')} of {plural(stats.rows, 'row')}")
        share = 100 * to_starts(counts) / max(stats.tokens, 1)
        right.step(np.arange(share.size), share, where="post", color=colours[0])
        for q, colour, marker in ((50, colours[1], "o"), (95, colours[3], "^")):
            size = stats.percentile(q)
            right.plot([size], [q], marker, ms=9, color=colour, label=f"{q}% within {size:g}")
        right.set(xlabel="nucleus size (tokens)", ylabel="nuclei up to it (%)", ylim=(0, 101))
        right.set_title(f"mean {stats.mean:.1f}, standard deviation {stats.std:.1f}")
        right.legend(loc="lower right")
        return finish_figure(pyplot, figure)


# --------------------------------------------------------------------------------------------------
# 8 Check
# --------------------------------------------------------------------------------------------------


PERCENTILES = (1, 5, 25, 50, 75, 95, 99)


class Figures:
    """Figures by label; `str` and, in a notebook, the value itself show them as a table."""

    title: ClassVar[str]

    def facts(self) -> list[tuple[str, str]]:
        """Return the figures as pairs of label and text."""
        raise NotImplementedError

    def __str__(self) -> str:
        return "\n".join(f"{label:26} {value:>14}" for label, value in self.facts())

    def _repr_html_(self) -> str:
        return str(render("facts", title=self.title, facts=self.facts()))


@dataclass(frozen=True, eq=False)
class NucleusSizeStats(Figures):
    """How many tokens the nuclei hold; everything follows exactly from the histogram."""

    title = "Nucleus size"

    histogram: npt.NDArray[np.int64]  # (256,) tokens by nucleus size
    rows: int

    @property
    def tokens(self) -> int:
        """Tokens counted."""
        return int(self.histogram.sum())

    @property
    def min(self) -> int:
        """Smallest size."""
        return int(np.flatnonzero(self.histogram)[0]) if self.tokens else 0

    @property
    def max(self) -> int:
        """Largest size."""
        return int(np.flatnonzero(self.histogram)[-1]) if self.tokens else 0

    @property
    def mean(self) -> float:
        """Mean size, from exact integer sums."""
        return int(self.histogram @ np.arange(256)) / max(self.tokens, 1)

    @property
    def std(self) -> float:
        """Standard deviation over all tokens (not a sample's), from exact integer sums."""
        n, sizes = max(self.tokens, 1), np.arange(256)
        total, squares = int(self.histogram @ sizes), int(self.histogram @ sizes**2)
        return math.sqrt(n * squares - total * total) / n

    @property
    def percentiles(self) -> dict[int, int]:
        """The usual percentiles, by number."""
        return {q: self.percentile(q) for q in PERCENTILES}

    def percentile(self, q: float) -> int:
        """Return percentile `q`: the smallest size that so many percent do not exceed."""
        place = max(math.ceil(q / 100 * self.tokens), 1)
        return int(np.searchsorted(np.cumsum(self.histogram), place)) if self.tokens else 0

    def facts(self) -> list[tuple[str, str]]:
        """Return the figures as pairs of label and text."""
        named = [(f"percentile {q}", f"{value:g}") for q, value in self.percentiles.items()]
        return [
            ("rows", f"{self.rows:,}"),
            ("tokens", f"{self.tokens:,}"),
            ("smallest", str(self.min)),
            ("largest", str(self.max)),
            ("mean", f"{self.mean:.2f}"),
            ("standard deviation", f"{self.std:.2f}"),
            *named,
        ]

    def _repr_html_(self) -> str:
        return super()._repr_html_() + str(histogram_svg(self.histogram))


def analyze_nucleus_sizes(
    name_or_dataset: Any, max_samples: int | None = None, device: str | None = None
) -> NucleusSizeStats:
    """Count nucleus sizes in one pass that reads nothing but `top_counts`.

    Args:
        name_or_dataset: an output by name, or any dataset that `get_sample` takes.
        max_samples: rows to read at most.
        device: count on this torch device (`cuda`, `mps`) in large batches; the result is the same.

    Raises:
        LogitsError: torch or the device is not there.
    """
    histogram, rows = np.zeros(256, np.int64), 0
    kind = SCHEMA.field("top_counts")
    for table in iter_tables(name_or_dataset, [kind.name], max_samples=max_samples, rows=8192):
        rows += table.num_rows
        sizes = read_column(table, kind).values
        if device is None:
            histogram += np.bincount(sizes, minlength=256)
            continue
        torch = import_extra("torch")
        try:
            moved = torch.from_numpy(sizes).to(device).int()
        except (RuntimeError, AssertionError) as error:
            raise LogitsError(f"cannot count on device {device!r}: {first_line(error)}") from error
        histogram += torch.bincount(moved, minlength=256).cpu().numpy()
    return NucleusSizeStats(histogram, rows)


# Whole outputs ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class BytesPerTokenStats(Figures):
    """What a stored token costs, column by column."""

    title = "Bytes per token"

    tokens: int
    total_bytes: int
    column_bytes: dict[str, int]
    in_memory: bool = False  # True: of tables without files, so not compressed

    @property
    def bytes_per_token(self) -> float:
        """Bytes of everything, footers included, by token."""
        return self.total_bytes / max(self.tokens, 1)

    def facts(self) -> list[tuple[str, str]]:
        """Return the figures as pairs of label and text, dearest column first."""
        dearest = sorted(self.column_bytes.items(), key=lambda item: -item[1])
        rows = [(name, f"{size / max(self.tokens, 1):.1f} B") for name, size in dearest]
        return [("bytes per token", f"{self.bytes_per_token:.1f} B"), *rows]


def compute_bytes_per_token_stats(dataset: Any) -> BytesPerTokenStats:
    """Measure what a token costs, from file sizes and footers and the column `top_counts`."""
    dataset = as_rows(dataset)
    kind = SCHEMA.field("top_counts")
    in_files = isinstance(dataset, LogitDataset)
    columns: Counter[str] = Counter()
    tokens = 0
    for table in iter_tables(dataset, [kind.name] if in_files else READ_COLUMNS, rows=1024):
        tokens += read_column(table, kind).values.size
        if not in_files:
            columns.update({name: table.column(name).nbytes for name in table.column_names})
    if not in_files:
        return BytesPerTokenStats(tokens, columns.total(), dict(columns), in_memory=True)
    for shard, name in enumerate(dataset.shards):
        with parquet_errors(name):
            columns.update(stored_bytes(dataset.file(shard).metadata))
    return BytesPerTokenStats(tokens, sum(dataset.sizes.values()), dict(columns))


def stored_bytes(metadata: Any) -> dict[str, int]:
    """Return the compressed bytes of each column of a Parquet file, from its footer."""
    sizes: Counter[str] = Counter()
    for group in range(metadata.num_row_groups):
        for number in range(metadata.num_columns):
            column = metadata.row_group(group).column(number)
            sizes[column.path_in_schema.split(".")[0]] += column.total_compressed_size
    return dict(sizes)


@dataclass(frozen=True)
class DatasetStats(Figures):
    """What an output holds, over all tokens that were read.

    Shares are of all tokens, means over tokens. What concerns the actual token (the one that the
    conversation goes on with) is of the `known` tokens, None when the rows do not say which it is.
    """

    title = "Logits"

    rows: int
    tokens: int
    nucleus: NucleusSizeStats
    mean_mass: float  # probability that the nucleus covers
    min_mass: float
    mean_tail_mass: float  # probability of the tail sample
    mean_first: float  # probability of the likeliest token
    capped: float | None  # share of nuclei that K cut before they covered top_p
    known: int = 0
    agreement: float | None = None  # the actual token is the likeliest
    in_nucleus: float | None = None
    in_tail: float | None = None
    bounded: int = 0  # known tokens that are not stored, whose probability is a bound
    mean_log_probability: float | None = None  # of the actual token; bounds taken as they are
    bytes_per_token: float | None = None

    def facts(self) -> list[tuple[str, str]]:
        """Return the figures as pairs of label and text."""
        sizes = self.nucleus.percentiles
        facts = [
            ("rows", f"{self.rows:,}"),
            ("tokens", f"{self.tokens:,}"),
            ("nucleus size, mean", f"{self.nucleus.mean:.1f}"),
            ("nucleus size, median", f"{sizes[50]:g}"),
            ("nucleus size, 99%", f"{sizes[99]:g}"),
            ("covered by nucleus", f"{self.mean_mass:.2%}"),
            ("covered at least", f"{self.min_mass:.2%}"),
            ("covered by tail", f"{self.mean_tail_mass:.2%}"),
            ("likeliest token", f"{self.mean_first:.1%}"),
        ]
        shares = (
            ("cut by the cap", self.capped),
            ("actual is likeliest", self.agreement),
            ("actual in nucleus", self.in_nucleus),
            ("actual in tail", self.in_tail),
        )
        facts += [(label, f"{share:.2%}") for label, share in shares if share is not None]
        if self.mean_log_probability is not None:
            least = "≥ " if self.bounded else ""
            perplexity = f"{least}{math.exp(-self.mean_log_probability):.3f}"
            facts.append(("perplexity of the text", perplexity))
        if self.bytes_per_token is not None:
            facts.append(("bytes per token", f"{self.bytes_per_token:.1f}"))
        return facts

    def to_html(self) -> Any:
        """Return the figures and the histogram of nucleus sizes as markup for `render_page`."""
        histogram = histogram_svg(self.nucleus.histogram)
        return render("stats", facts=self.facts(), histogram=histogram)

    def _repr_html_(self) -> str:
        return super()._repr_html_() + str(histogram_svg(self.nucleus.histogram))


def compute_dataset_stats(
    dataset: Any,
    *,
    max_samples: int | None = None,
    actual_tokens: Callable[[TokenBlock], Sequence[npt.NDArray[Any] | None]] | None = None,
) -> DatasetStats:
    """Measure sizes, covered probability and agreement with the text, in one pass.

    Args:
        dataset: an output by name, or any dataset that `get_sample` takes.
        max_samples: rows to read at most.
        actual_tokens: gives the extracted tokens' ids for each row of a block, None where they are
            unknown; by default what the rows store themselves (`--store-tokens`).

    Raises:
        FormatError: a row is not in the shard format.
    """
    dataset = as_rows(dataset)
    limits = RunLimits.of(dataset.settings if isinstance(dataset, LogitDataset) else {})
    sums: Counter[str] = Counter()
    histogram, least = np.zeros(256, np.int64), 1.0
    for block in iter_blocks(dataset, max_samples=max_samples):
        histogram += np.bincount(block.top.counts, minlength=256)
        mass = block.top.mass
        least = min(least, float(mass.min(initial=1.0)))
        sums.update(sum_block(block, limits))
        rows = (actual_tokens or stored_actual_tokens)(block)
        sums.update(sum_agreement(block, rows))
    tokens, known = max(int(histogram.sum()), 1), sums["known"]
    about_text = {name: sums[name] / known if known else None for name in AGREEMENT}
    cost = None
    if isinstance(dataset, LogitDataset) and max_samples is None:
        cost = compute_bytes_per_token_stats(dataset).bytes_per_token
    return DatasetStats(
        rows=int(sums["rows"]),
        tokens=int(histogram.sum()),
        nucleus=NucleusSizeStats(histogram, int(sums["rows"])),
        mean_mass=sums["mass"] / tokens,
        min_mass=least,
        mean_tail_mass=sums["tail"] / tokens,
        mean_first=sums["first"] / tokens,
        capped=sums["capped"] / tokens if limits.top_p else None,
        known=int(known),
        bounded=int(sums["bounded"]),
        bytes_per_token=cost,
        **about_text,
    )


AGREEMENT = ("agreement", "in_nucleus", "in_tail", "mean_log_probability")


def sum_block(block: TokenBlock, limits: RunLimits) -> dict[str, Any]:
    """Sum over a block what `DatasetStats` averages.

    A nucleus of K ids counts as cut unless it surely reached top_p: few end there by themselves.
    """
    mass = block.top.mass
    covered = mass >= limits.top_p + mass_tolerance(block)
    return {
        "rows": block.index.size,
        "mass": float(mass.sum()),
        "tail": float(block.tail.probs.sum()),
        "first": float(block.first_probs.sum()),
        "capped": int((~covered & (block.top.counts >= limits.top_p_max)).sum()),
    }


def mass_tolerance(block: TokenBlock) -> npt.NDArray[np.float64]:
    """Return how far each nucleus' decoded mass can be off: half a step, and float32's share."""
    return block.top.mass * np.expm1(block.top.error) + 2e-5


def stored_actual_tokens(block: TokenBlock) -> list[npt.NDArray[Any] | None]:
    """Return the ids of each row's extracted tokens where the rows store their text."""
    if block.tokens is None:
        return [None] * block.index.size
    pairs = zip(*block.tokens, strict=True)
    return [
        ids[positions] if positions.size and positions.max() < ids.size else None
        for ids, positions in pairs
    ]


def sum_agreement(block: TokenBlock, rows: Sequence[npt.NDArray[Any] | None]) -> dict[str, Any]:
    """Sum what is said about the actual tokens of a block, over the tokens that are known."""
    pairs = zip(block.num_tokens, rows, strict=True)
    ids = [np.full(n, -1) if row is None else row for n, row in pairs]
    actual = np.concatenate(ids or [np.zeros(0, np.int64)])
    known = actual >= 0
    if not known.any():
        return {"known": 0}
    scores = score_tokens(block, actual)
    return {
        "known": int(known.sum()),
        "agreement": int((known & scores.in_nucleus & (scores.rank == 1)).sum()),
        "in_nucleus": int(scores.in_nucleus.sum()),
        "in_tail": int(scores.in_tail.sum()),
        "bounded": int((known & ~scores.exact).sum()),
        "mean_log_probability": float(scores.log_probability[known].sum()),
    }


# Validation ---------------------------------------------------------------------------------------


class Violation(NamedTuple):
    """A place in an output that breaks the format; row and token count from 0 within the shard."""

    shard: str
    row: int | None
    token: int | None
    rule: str
    message: str

    def __str__(self) -> str:
        place = "".join(
            f", {name} {number}"
            for name, number in (("row", self.row), ("token", self.token))
            if number is not None
        )
        return f"{self.shard}{place}: {self.rule}: {show_text(self.message)}"


@dataclass
class ValidationReport:
    """What `validate_output` found; `violations` keeps the first of each rule in each shard."""

    name: str
    shards: int = 0
    rows: int = 0
    tokens: int = 0
    counts: Counter[str] = field(default_factory=Counter)  # violations by rule, all of them
    violations: list[Violation] = field(default_factory=list)
    parts: dict[str, dict[str, Any]] = field(default_factory=dict)  # what shards say they are
    _alike: Counter[tuple[str, str]] = field(default_factory=Counter)

    @property
    def ok(self) -> bool:
        """True when every rule holds everywhere."""
        return not self.counts

    def add(
        self,
        shard: str,
        rule: str,
        message: str,
        *,
        row: int | None = None,
        token: int | None = None,
    ) -> None:
        """Count a violation and keep it unless its rule has many in this shard already."""
        violation = Violation(shard, row, token, rule, message)
        self.counts[rule] += 1
        self._alike[shard, rule] += 1
        if self._alike[shard, rule] <= MAX_REPORTED:
            self.violations.append(violation)

    def __str__(self) -> str:
        counts = ((self.shards, "shard"), (self.rows, "row"), (self.tokens, "token"))
        seen = ", ".join(plural(*count) for count in counts)
        if self.ok:
            return f"{self.name}: valid: {seen}"
        total = self.counts.total()
        kinds = ", ".join(f"{rule} {n:,}" for rule, n in self.counts.most_common())
        lines = [str(violation) for violation in self.violations]
        found = plural(total, "violation")
        return "\n".join([*lines, f"{self.name}: {found} ({kinds}) in {seen}"])


MACHINE_SETTINGS = {"attn", "versions"}  # may differ between the machines of one run
MAX_REPORTED = 10  # violations shown of each rule in each shard


def validate_output(name: str | Path | Sequence[str | Path] | LogitDataset) -> ValidationReport:
    """Check every row of every shard of an output against the rules of the format.

    Checked are: the files can be read; columns, types and metadata; one run's settings
    throughout; list lengths; ids in range and never twice for a token; order, quantization and
    finite ranges; the nucleus covers top_p or is cut by the cap, and is no larger than needed; no
    tail token above the nucleus; probabilities that sum to 1 at most; positions of stored tokens;
    no conversation twice; what parts say of themselves; the shards that checkpoints list.

    Raises:
        OpenError: there is no such output; what is wrong inside it is reported, not raised.
    """
    dataset = as_output(name)
    report = ValidationReport(dataset.name, shards=len(dataset.shards))
    config = validate_config(dataset, report)
    places: list[tuple[str, npt.NDArray[np.int64], int]] = []
    for shard in dataset.shards:
        alone = LogitDataset(dataset.store, {shard: dataset.sizes[shard]})
        alone._listed = {}  # its footer counts
        found: list[npt.NDArray[np.int64]] = []
        sums: Counter[str] = Counter(tokens=0, nucleus=0, capped=0)
        skipped = np.zeros(0, np.int64)
        try:
            settings = validate_footer(alone, config, report)
            config = config or settings
            validate_shard(alone, RunLimits.of(settings), report, found, sums)
            index = np.concatenate(found or [np.zeros(0, np.int64)])
            skipped = validate_part(alone, settings, index, sums, report)
        except LogitsError as error:
            row = sum(part.size for part in found)
            report.add(shard, "unreadable", str(error), row=row or None)
        places.append((shard, np.concatenate([*found, skipped]), sum(p.size for p in found)))
    validate_unique(places, report)
    validate_checkpoints(dataset, report)
    return report


def validate_config(dataset: LogitDataset, report: ValidationReport) -> dict[str, Any]:
    """Read the output's own settings file, if it has one."""
    try:
        text = dataset.store.read_text(CONFIG_FILE)
        return parse_settings(text.encode(), CONFIG_FILE) if text is not None else {}
    except LogitsError as error:
        report.add(CONFIG_FILE, "settings", str(error))
        return {}


def validate_footer(
    dataset: LogitDataset, config: Mapping[str, Any], report: ValidationReport
) -> dict[str, Any]:
    """Check columns and metadata of one shard; return the settings to check its rows by."""
    shard, schema = dataset.shards[0], dataset.file(0).schema_arrow

    add = functools.partial(report.add, shard)
    stores = any(name in schema.names for name in TOKEN_COLUMNS)
    wanted = shard_schema(store_tokens=stores)
    if schema.names != wanted.names:
        add("columns", f"has {', '.join(schema.names)}; wanted {', '.join(wanted.names)}")
    for kind in wanted:
        if kind.name in schema.names and not schema.field(kind.name).type.equals(kind.type):
            add("type", f"{kind.name} is {schema.field(kind.name).type}, not {kind.type}")
    version = dataset.metadata(0).get(METADATA_VERSION)
    if version != str(FORMAT_VERSION).encode():
        add("metadata", f"format version is {version!r}, not {FORMAT_VERSION}")
    settings: dict[str, Any] = {}
    try:
        settings = dataset.settings
        if not settings:
            add("metadata", "holds no settings of its run")
    except FormatError as error:
        add("settings", str(error))
    names = (settings.keys() & config.keys()) - MACHINE_SETTINGS
    differ = [name for name in names if settings[name] != config[name]]
    if differ:
        add("settings", f"differs from the rest of the output in {', '.join(sorted(differ))}")
    if not len(dataset) and METADATA_PART not in dataset.metadata(0):
        add("empty", "holds no rows")
    return settings


def validate_shard(
    dataset: LogitDataset,
    limits: RunLimits,
    report: ValidationReport,
    found: list[npt.NDArray[np.int64]],
    sums: Counter[str],
) -> None:
    """Check the rows of one shard, append their indices to `found` and add up their figures."""
    shard, first = dataset.shards[0], 0
    for table in dataset.iter_tables():
        columns, faults = read_columns(table)
        for fault in faults:
            report.add(shard, fault.rule, fault.message, row=first + fault.row)
        bad = {fault.row for fault in faults}
        good = np.array([row for row in range(table.num_rows) if row not in bad], np.int64)
        sound = read_columns(table.take(good))[0] if bad else columns
        block = build_block(sound, first, limits.logit_bits)
        validate_block(block, limits, report, shard=shard, rows=first + good)
        found.append(np.asarray(columns.get("index", np.zeros(0)), np.int64))
        first += table.num_rows
        report.rows += table.num_rows
        report.tokens += int(block.num_tokens.sum())
        counts = columns["top_counts"].values.astype(np.int64)
        capped = int((counts == limits.top_p_max).sum())
        sums.update(tokens=counts.size, nucleus=int(counts.sum()), capped=capped)


def validate_block(
    block: TokenBlock,
    limits: RunLimits,
    report: ValidationReport,
    *,
    shard: str,
    rows: npt.NDArray[np.int64],
) -> None:
    """Check decoded rows; `rows` are their numbers in the shard."""
    for number in np.flatnonzero(block.num_tokens == 0):
        report.add(shard, "length", "the row holds no tokens", row=int(rows[number]))
    with np.errstate(all="ignore"):  # whatever a damaged file holds
        groups = (entry_rules, range_rules, mass_rules, text_rules)
        rules = [rule for group in groups for rule in group(block, limits)]
    for rule in rules:
        tokens = np.flatnonzero(rule.broken)
        for token in tokens[:MAX_REPORTED]:
            row = int(np.searchsorted(block.row_starts, token, side="right")) - 1
            message = rule.message.format(*(values[token] for values in rule.values))
            at = int(token - block.row_starts[row])
            report.add(shard, rule.name, message, row=int(rows[row]), token=at)
        if tokens.size > MAX_REPORTED:
            report.counts[rule.name] += tokens.size - MAX_REPORTED


# The rules of a token -----------------------------------------------------------------------------


class Rule(NamedTuple):
    """A rule checked on every token of a block; `message` is filled in with `values[i][token]`."""

    name: str
    broken: npt.NDArray[np.bool_]  # (T,)
    message: str
    values: tuple[npt.NDArray[Any], ...] = ()


def any_in_run(
    flags: npt.NDArray[np.bool_], starts: npt.NDArray[np.int64]
) -> npt.NDArray[np.bool_]:
    """Say of each run of a flat array whether any of its flags is set."""
    return np.diff(to_starts(flags)[starts]) > 0


def entry_rules(block: TokenBlock, limits: RunLimits) -> Iterator[Rule]:
    """Yield the rules on counts, ids and their order."""
    counts, cap = block.top.counts, limits.top_p_max
    bad = (counts < 1) | (counts > cap)
    yield Rule("count", bad, f"nucleus of {{}} tokens, allowed are 1 to {cap}", (counts,))
    tail, drawn = block.tail.counts, limits.sampled_n
    if drawn is not None:
        yield Rule("tail count", tail != drawn, f"{{}} tail tokens instead of {drawn}", (tail,))
    vocab = limits.vocab_size
    high = any_in_run(block.top.ids >= vocab, block.top.starts)
    high |= any_in_run(block.tail.ids >= vocab, block.tail.starts)
    yield Rule("id", high, f"a token id beyond the vocabulary of {vocab}")
    yield Rule("duplicate", repeated_ids(block), "a token id occurs twice")
    if not block.top.q.size:
        return
    same = np.diff(np.repeat(np.arange(counts.size), counts)) == 0
    rising = np.append(same & (np.diff(block.top.q.astype(np.int32)) > 0), False)
    yield Rule("order", any_in_run(rising, block.top.starts), "nucleus logits ascend")
    level = np.repeat(block.top.low == block.top.high, counts)
    ties = np.append(same & (np.diff(block.top.ids) < 0), False) & level
    yield Rule("ties", any_in_run(ties, block.top.starts), "equal logits, but ids do not ascend")


def repeated_ids(block: TokenBlock) -> npt.NDArray[np.bool_]:
    """Say of each token whether an id occurs twice in its nucleus and tail sample."""
    keys, _, _ = known_entries(block)
    broken = np.zeros(block.logsumexp.size, bool)
    broken[keys[1:][np.diff(keys) == 0] >> 18] = True
    return broken


def range_rules(block: TokenBlock, limits: RunLimits) -> Iterator[Rule]:
    """Yield the rules on quantization ranges and levels, for nucleus and tail."""
    steps = 2**limits.logit_bits - 1
    for part, q, starts, low, high in (
        ("nucleus", block.top.q, block.top.starts, block.top.low, block.top.high),
        ("tail", block.tail.q, block.tail.starts, block.tail.low, block.tail.high),
    ):
        some = np.diff(starts) > 0
        finite = np.isfinite(low) & np.isfinite(high)
        message = f"{part} range is {{:g}} to {{:g}}"
        yield Rule("range", some & ~(finite & (low <= high)), message, (low, high))
        ends = any_in_run(q == 0, starts) & any_in_run(q == 65535, starts)
        unspanned = some & finite & (low < high) & ~ends
        flat = some & (low == high) & any_in_run(q != 0, starts)
        message = f"{part} levels do not span the range {{:g}} to {{:g}}"
        yield Rule("quantization", unspanned | flat, message, (low, high))
        grid = np.rint(np.rint(q * (steps / 65535)) * (65535 / steps))
        fine = any_in_run(grid != q, starts)
        yield Rule("resolution", fine, f"{part} levels are finer than logit_bits")
    above = (block.tail.counts > 0) & (block.tail.high > block.top.low)
    message = "a tail logit of {:g} above the nucleus, which ends at {:g}"
    yield Rule("tail", above, message, (block.tail.high, block.top.low))


def mass_rules(block: TokenBlock, limits: RunLimits) -> Iterator[Rule]:
    """Yield the rules on the log-sum-exp and on probabilities."""
    lse, top_p, counts = block.logsumexp, limits.top_p, block.top.counts
    least = block.top.high - 1e-4 * np.maximum(1, np.abs(block.top.high))
    message = "log-sum-exp {:g} beside a logit of {:g}"
    sound = np.isfinite(lse) & (lse >= least)
    yield Rule("logsumexp", ~sound, message, (lse, block.top.high))
    probs, mass = block.top.probs, block.top.mass
    tolerance = mass_tolerance(block)
    tail = block.tail.mass
    tail_off = np.expm1(block.tail.error)
    slack = 2 * tolerance + tail * tail_off
    yield Rule("sum", mass + tail > 1 + slack, "probabilities sum to {:.6f}", (mass + tail,))
    short = (mass < top_p - tolerance) & (counts < limits.top_p_max)
    message = f"nucleus of {{}} covers {{:.6f}}, less than top_p {top_p:g}"
    yield Rule("mass", short & (counts < limits.vocab_size), message, (counts, mass))
    rest = mass.copy()
    rest[counts > 0] -= probs[block.top.starts[1:][counts > 0] - 1]
    needless = (rest > top_p + tolerance) & (counts > 1) & (top_p > 0)
    yield Rule("minimal", needless, "covers {:.6f} even without its last token", (rest,))


def text_rules(block: TokenBlock, limits: RunLimits) -> Iterator[Rule]:
    """Yield the rules on stored text; a broken row is named by its first token."""
    lost, foreign, unsorted = np.zeros((3, block.logsumexp.size), bool)
    firsts = block.row_starts[:-1]
    if block.tokens is None:
        lost[firsts[block.num_tokens > 0]] = limits.store_tokens
    else:
        for first, ids, positions in zip(firsts, *block.tokens, strict=True):
            if positions.size:
                foreign[first] = ((ids < 0) | (ids >= limits.vocab_size)).any()
                inside = (positions >= 1) & (positions < ids.size)
                unsorted[first] = not inside.all() or (np.diff(positions) <= 0).any()
    yield Rule("text", lost, "input_ids and token_positions are missing")
    yield Rule("text", foreign, "input_ids leave the vocabulary")
    yield Rule("positions", unsorted, "token_positions do not ascend inside input_ids")


def validate_unique(
    places: Sequence[tuple[str, npt.NDArray[np.int64], int]], report: ValidationReport
) -> None:
    """Report conversations that occur twice, naming the second place.

    Args:
        places: shard, its conversations, and how many of them have rows, which come first.
        report: gets what is wrong.
    """
    indices = np.concatenate([found for _, found, _ in places] or [np.zeros(0, np.int64)])
    order = np.argsort(indices, kind="stable")
    again = np.sort(order[1:][np.diff(indices[order]) == 0])
    starts = to_starts([found.size for _, found, _ in places])
    for place in again:
        number = int(np.searchsorted(starts, place, side="right")) - 1
        shard, _, rows = places[number]
        row = int(place - starts[number])
        message = f"conversation {indices[place]} is there already"
        report.add(shard, "twice", message, row=row if row < rows else None)


def validate_checkpoints(dataset: LogitDataset, report: ValidationReport) -> None:
    """Report shards that the output's checkpoints list otherwise than they are."""
    if not dataset.store.list_checkpoints():
        return
    try:
        records = read_checkpoints(dataset.store)
    except LogitsError as error:
        report.add(str(error).split()[0], "checkpoint", str(error))
        return
    for path in sorted(records.keys() | dataset.sizes.keys()):
        there, size = dataset.sizes.get(path), records.get(path, {}).get("bytes")
        if there != size:
            message = f"{there or 'no'} bytes, but the checkpoint lists {size or 'none'}"
            report.add(path, "checkpoint", message)
        elif path in report.parts:
            part, record = report.parts[path], records[path]
            names = ("number", "ids", "conversations", "rows", "tokens", "nucleus", "capped")
            differ = [n for n in names if n in record and record[n] != part[n]]
            if differ:
                found = ", ".join(f"{name} {record[name]!s:.20}" for name in differ)
                report.add(path, "checkpoint", f"the checkpoint lists {found}; it says otherwise")


def validate_part(
    dataset: LogitDataset,
    settings: Mapping[str, Any],
    index: npt.NDArray[np.int64],
    sums: Mapping[str, int],
    report: ValidationReport,
) -> npt.NDArray[np.int64]:
    """Check what a shard says of the part that it is; return who it says gave no row.

    The hash of the ids tells whether these conversations, in this order, were selected. Where some
    gave no row their places are known only if ids ascend: in the order of a source whose rows are
    numbered.

    Args:
        dataset: the shard alone.
        settings: of its run.
        index: conversations of its rows.
        sums: `tokens`, `nucleus` and `capped`, counted from its rows.
        report: gets what is wrong.
    """
    shard = dataset.shards[0]
    add = functools.partial(report.add, shard, "part")
    try:
        part = dataset.part(0)
    except FormatError as error:
        add(str(error))
        return np.zeros(0, np.int64)
    if not part:
        if settings.get("rows_per_part") is not None:
            report.add(shard, "metadata", "does not say which part it is")
        return np.zeros(0, np.int64)
    report.parts[shard] = part
    if part_path(part["number"]) != shard and part_path(part["number"]) != f"data/{shard}":
        add(f"is part {part['number']}, whose file is {part_path(part['number'])}")
    for name, count in {"rows": index.size, **sums}.items():
        if part[name] != count:
            add(f"says {part[name]:,} of {name}, holds {count:,}")
    skipped = np.array([int(i) for i in part["skipped"]], np.int64)
    if index.size + skipped.size != part["conversations"]:
        parts = f"{plural(index.size, 'row')} and {skipped.size:,} skipped"
        add(f"{parts} are not the {plural(part['conversations'], 'conversation')} selected")
    ascending = settings.get("index_col") is None and not settings.get("random_sample")
    if not skipped.size or ascending:
        selected = np.sort(np.append(index, skipped)) if skipped.size else index
        if ascending and (np.diff(index) <= 0).any():
            add("rows are not in the order of their selection")
        elif hash_ids(selected) != part["ids"]:
            add("the conversations, or their order, are not those that were selected")
    return skipped


# Comparison ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Comparison:
    """Two outputs, row by row where both hold the conversation.

    `divergence` is KL(first ‖ second) in nats, for each token the least that what is stored
    allows: tokens that only the second leaves out count with the most that they can have. Figures
    are None where no token could be compared.
    """

    rows: tuple[int, int]
    common_rows: int
    unequal_rows: int  # in common, but with another number of tokens
    tokens: int
    mean_divergence: float | None
    max_divergence: float | None
    same_first: float | None  # share of tokens with the same likeliest token
    max_logsumexp: float | None  # largest difference
    largest: list[tuple[float, int, int]]  # divergence, conversation, token; largest first

    def __str__(self) -> str:
        lines = [
            f"rows in common      {self.common_rows:,} of {self.rows[0]:,} and {self.rows[1]:,}",
            f"of another length   {self.unequal_rows:,}",
            f"tokens compared     {self.tokens:,}",
        ]
        if not self.tokens:
            return "\n".join([*lines, "nothing to compare: no token is in both"])
        lines += [
            f"KL, mean and max    {self.mean_divergence:.3g} and {self.max_divergence:.3g} nats",
            f"same likeliest      {self.same_first:.3%}",
            f"log-sum-exp differs by {self.max_logsumexp:.3g} at most",
        ]
        worst = [f"  {kl:.4g} nats: conversation {i}, token {t}" for kl, i, t in self.largest]
        return "\n".join([*lines, "largest differences", *worst] if worst else lines)


COMPARED_TOKENS = 2**17  # of the first output, held at once beside those of the second


def compare_outputs(first: Any, second: Any, *, largest: int = 10) -> Comparison:
    """Compare the distributions of two outputs over the conversations that both hold.

    Args:
        first, second: outputs by name or opened by `load_logit_dataset`, or rows at hand.
        largest: how many of the most different tokens to name.
    """
    one, two = as_rows(first), as_rows(second)
    known = row_numbers(two)
    sums: Counter[str] = Counter()
    worst: list[tuple[float, int, int]] = []
    peak = 0.0
    for a, b in iter_common(one, two, known, sums):
        divergence = bound_divergence(a, b)
        same = int((a.top.ids[a.top.starts[:-1]] == b.top.ids[b.top.starts[:-1]]).sum())
        sums.update({"tokens": divergence.size, "kl": float(divergence.sum()), "same": same})
        peak = max(peak, float(np.abs(a.logsumexp - b.logsumexp).max(initial=0)))
        chosen = np.argsort(-divergence, kind="stable")[:largest]
        rows = np.searchsorted(a.row_starts, chosen, side="right") - 1
        tokens = chosen - a.row_starts[rows]
        here = zip(divergence[chosen], a.index[rows], tokens, strict=True)
        worst += [(float(kl), int(i), int(t)) for kl, i, t in here if kl > 0]
        worst = sorted(worst, key=lambda item: -item[0])[:largest]
    count = sums["tokens"]
    return Comparison(
        rows=(sums["rows"], len(known)),
        common_rows=sums["common"],
        unequal_rows=sums["unequal"],
        tokens=count,
        mean_divergence=sums["kl"] / count if count else None,
        max_divergence=(worst[0][0] if worst else 0.0) if count else None,
        same_first=sums["same"] / count if count else None,
        max_logsumexp=peak if count else None,
        largest=worst,
    )


def iter_common(
    one: Any, two: Any, known: Mapping[int, int], sums: Counter[str]
) -> Iterator[tuple[TokenBlock, TokenBlock]]:
    """Yield the rows of two outputs that can be compared, as blocks of the same rows.

    Many rows of the second are read together, so that its row groups are read seldom in whatever
    order they are.

    Args:
        one, two: the outputs.
        known: row number in `two` by conversation.
        sums: `rows` of `one`, those in `common` and those of them that are `unequal` are added.
    """

    def pair(tables: list[pa.Table]) -> Iterator[tuple[TokenBlock, TokenBlock]]:
        table = pa.concat_tables(tables)
        index = read_column(table, SCHEMA.field("index")).tolist()
        sums["rows"] += len(index)
        common = [row for row, conversation in enumerate(index) if conversation in known]
        sums["common"] += len(common)
        if not common:
            return
        wanted = [known[index[row]] for row in common]
        if isinstance(two, LogitDataset):
            other = two.read_rows(wanted)
        else:
            other = pa.concat_tables([_row_at_hand(two, row) for row in wanted])
        a, b = decode_rows(table.take(common)), decode_rows(other)
        equal = np.flatnonzero(a.num_tokens == b.num_tokens)
        sums["unequal"] += len(common) - equal.size
        if equal.size < len(common):
            a = decode_rows(table.take(np.array(common)[equal]))
            b = decode_rows(other.take(equal))
        yield a, b

    waiting: list[pa.Table] = []
    tokens = 0
    for table in iter_tables(one):
        waiting.append(table)
        tokens += read_column(table, SCHEMA.field("top_counts")).values.size
        if tokens >= COMPARED_TOKENS:
            yield from pair(waiting)
            waiting, tokens = [], 0
    if waiting:
        yield from pair(waiting)


def bound_divergence(a: TokenBlock, b: TokenBlock) -> npt.NDArray[np.float64]:
    """Return the least KL(a ‖ b) in nats that the stored entries allow, (T,).

    The vocabulary is cut into the ids whose probability is known in `a`, and known in `b` or in
    a's nucleus, and one cell for the rest. Where `b` does not store an id, it counts with the most
    that it can have there. Merging cells and raising b's probabilities both lower the divergence;
    what remains is the error of quantization.
    """
    keys_a, probs_a, top_a = known_entries(a)
    keys_b, probs_b, _ = known_entries(b)
    place = np.minimum(np.searchsorted(keys_b, keys_a), max(keys_b.size - 1, 0))
    shared = keys_b[place] == keys_a if keys_b.size else np.zeros(keys_a.size, bool)
    cells = shared | top_a
    owner = keys_a[cells] >> 18
    p = probs_a[cells]
    most = np.exp(unstored_bound(b))[owner]
    q = np.where(shared[cells], probs_b[place[cells]], most)
    n = a.logsumexp.size
    tiny = np.finfo(np.float64).tiny
    terms = p * (np.log(np.maximum(p, tiny)) - np.log(np.maximum(q, tiny)))
    rest_p = np.maximum(1 - np.bincount(owner, p, n), 0)
    known_q = np.bincount(owner, q * shared[cells], n)
    off = np.maximum(b.top.error, b.tail.error)
    rest_q = np.clip(1 - known_q * np.exp(-off), 1e-9, 1)
    rest = rest_p * (np.log(np.maximum(rest_p, tiny)) - np.log(rest_q))
    return np.maximum(np.bincount(owner, terms, n) + rest, 0)


def known_entries(
    block: TokenBlock,
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64], npt.NDArray[np.bool_]]:
    """Return all stored entries sorted by `token << 18 | id`: key, probability, in the nucleus."""
    tokens = np.arange(block.logsumexp.size, dtype=np.int64)
    top = np.repeat(tokens, block.top.counts) << 18 | block.top.ids
    tail = np.repeat(tokens, block.tail.counts) << 18 | block.tail.ids
    keys = np.concatenate([top, tail])
    order = np.argsort(keys)
    probs = np.concatenate([block.top.probs, block.tail.probs])[order]
    return keys[order], probs, np.arange(keys.size)[order] < top.size


# --------------------------------------------------------------------------------------------------
# 9 Train
# --------------------------------------------------------------------------------------------------
#
#     shards ──LogitIterableDataset──► rows ──collate_logits──► batch ──student──► logits
#                  └─ weigh_tail: how many tokens                       └─► distillation_loss
#                     each tail token stands for
#
# Everything here rests on one identity. For any function g of a token, the sum of g over the
# vocabulary is expected to be the sum over the nucleus plus the weighted sum over the tail sample.


DIVERGENCES = ("forward_kl", "reverse_kl", "jsd")
TAILS = ("unbiased", "renormalized", "ghost", "ignore")
LEAST_LOG_REST = -100.0  # of the mass outside the nucleus, which rounding may bring below 0
TEACHER_COLUMNS = {  # of a row: dtype, and what fills the batch where a token has fewer entries
    "teacher_ids": (np.int64, 0),
    "teacher_log_probs": (np.float32, LEAST_LOG_REST),
    "teacher_log_weights": (np.float32, 0.0),
    "teacher_mask": (np.bool_, False),  # entries there are
    "teacher_tail_mask": (np.bool_, False),  # those of them that were sampled
}
IGNORED_LABEL = -100  # what PyTorch's cross-entropy leaves out
MAX_LOG_TERM = 60.0  # of a reverse KL's weighted term, which might overflow float32


# Weights of the tail ------------------------------------------------------------------------------

QUADRATURE_DROP = 20.0  # the integrand is followed until it has fallen by this factor's logarithm
LEAST_UNDRAWN = 1e-12  # share of the tail below which the sample is taken to hold all of it
LEAST_LOG_SHARE = -600.0  # below it a weight is inversely proportional to the probability


def weigh_tail(
    log_probs: npt.ArrayLike, rest: npt.ArrayLike, *, nodes: int | None = None
) -> npt.NDArray[np.float64]:
    """Return the logarithm of how many tokens of the vocabulary each tail token stands for.

    With these weights w, and 1 for each nucleus token, the weighted sum of any function over what
    is stored is an unbiased estimate of its sum over the vocabulary. The weight of a token i of the
    sample S is P(S | i is drawn first) / P(S): how much likelier the others are to make up the
    sample once i is out. Both are integrals over the time of an exponential race, so that w_i =
    E[1 / (1 - exp(-p_i t))] for t with a density proportional to exp(-c t) Π_j (1 - exp(-p_j t)), c
    being the mass that was not drawn. That density is concave in log t once its logarithm is taken,
    and is summed there by the trapezoidal rule.

    Args:
        log_probs: (T, M) log-probabilities of the tail sample; its order does not matter.
        rest: (T,) probability outside the nucleus. Where the sample holds all of it, or more by
            rounding, every weight is 1.
        nodes: of the quadrature; None takes as many as each density needs for an error of 1e-6.

    Returns:
        (T, M) float64, each at least 0.

    Source: Murthy (1957), Ordered and unordered estimators in sampling without replacement;
    Kool, van Hoof and Welling (2020), Estimating gradients for discrete random variables by
    sampling without replacement, ICLR, section 3.2 and appendix B.
    """
    probs = np.asarray(log_probs, np.float64)
    weights = np.zeros(probs.shape)
    if probs.size == 0:
        return weights
    shares = probs.T - np.log(np.asarray(rest, np.float64))  # (M, T)
    undrawn = 1 - np.exp(shares).sum(axis=0)
    open_ = np.flatnonzero(undrawn >= LEAST_UNDRAWN)
    shares, undrawn = shares[:, open_], undrawn[open_]
    held = np.exp(np.maximum(shares, LEAST_LOG_SHARE))
    first, last, needed = bracket_race(held, undrawn)
    order = np.argsort(needed)
    for start in range(0, order.size, 64):  # 64 tokens' integrands stay in the cache
        part = order[start : start + 64]
        count = nodes or int(needed[part].max())
        steps = np.arange(count)[:, None] / (count - 1)
        log_times = first[part] + (last - first)[part] * steps  # (n, t)
        found = integrate_weights(held[:, part], undrawn[part], log_times)
        found += np.maximum(LEAST_LOG_SHARE - shares[:, part], 0)
        weights[open_[part]] = np.maximum(found, 0.0).T
    return weights


def integrate_weights(
    probs: npt.NDArray[np.float64],
    undrawn: npt.NDArray[np.float64],
    log_times: npt.NDArray[np.float64],
) -> npt.NDArray[np.float64]:
    """Return log-weights (M, t), given shares of the tail (M, t) and equidistant nodes (n, t)."""
    times = np.exp(log_times)
    arrived = -np.expm1(-probs[:, None, :] * times)  # (M, n, t)
    density = log_times - undrawn * times + np.log(arrived).sum(axis=0)
    density = np.exp(density - density.max(axis=0))
    density /= density.sum(axis=0)
    return np.log((density / arrived).sum(axis=1))


def bracket_race(
    probs: npt.NDArray[np.float64], undrawn: npt.NDArray[np.float64]
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64], npt.NDArray[np.int64]]:
    """Return between which log-times (T,) the integrand is worth summing, and at how many nodes.

    Its slope in log t is 1 + Σ φ(p_j t) - c t with φ(x) = x / (e^x - 1) in (0, 1]; so the mode has
    c t in [1, 1 + M], and is found by bisection. Leftwards φ only grows, which bounds the fall on
    that side by the slope at the mode (less the factor that a weight takes out); rightwards the
    fall is at least that of a gamma density. The curvature at the mode gives the spacing.
    """
    low = -np.log(undrawn)
    high = low + np.log1p(probs.shape[0])
    for _ in range(6):
        middle = (low + high) / 2
        waiting = probs * np.exp(middle)
        slope = (waiting / np.expm1(np.minimum(waiting, 700))).sum(axis=0)
        rising = 1 + slope > undrawn * np.exp(middle)
        low, high = np.where(rising, middle, low), np.where(rising, high, middle)
    waiting = probs * np.exp(high)
    slopes = waiting / np.expm1(np.minimum(waiting, 700))
    at_mode = 1 + slopes.sum(axis=0)
    least = np.maximum(at_mode - slopes.max(axis=0), 1)
    fall = QUADRATURE_DROP / least
    first = low - fall - np.minimum(1, np.sqrt(2 * fall)) - np.log(at_mode / least)
    last = high + np.log1p((QUADRATURE_DROP + np.sqrt(2 * at_mode * QUADRATURE_DROP)) / at_mode)
    curvature = at_mode + (slopes * (slopes + waiting - 1)).sum(axis=0)
    spacing = np.minimum(0.36, 0.8 / np.sqrt(curvature))
    return first, last, np.ceil((last - first) / spacing).astype(np.int64) + 1


# Rows to train on ---------------------------------------------------------------------------------


def sparse_teacher(block: TokenBlock, *, weigh: bool = True) -> dict[str, npt.NDArray[Any]]:
    """Return what is stored of each token as padded arrays, nucleus first and tail last.

    Args:
        block: T tokens.
        weigh: compute the weights of the tail, about half of the work; False leaves the column
            `teacher_log_weights` out, and `distillation_loss` then refuses `tail="unbiased"`.

    Returns:
        `TEACHER_COLUMNS`, (T, E) each, and `teacher_log_rest` (T,) float32, the logarithm of the
        probability outside the nucleus.

    Raises:
        FormatError: the tokens have tails of different sizes.
    """
    size = int(block.tail.counts.max(initial=0))
    if (block.tail.counts != size).any():
        raise FormatError("the tail samples of one output differ in size")
    shape = (block.tail.counts.size, size)
    tail = block.tail.logits.reshape(shape) - block.logsumexp[:, None]
    rest = 1 - block.top.mass
    rest = np.maximum(np.maximum(rest, np.exp(tail).sum(axis=1)), np.exp(LEAST_LOG_REST))
    counts = block.top.counts
    there = np.arange(int(counts.max(initial=0))) < counts[:, None]  # (T, K)
    ids, probs = np.zeros(there.shape, np.int32), np.full(there.shape, LEAST_LOG_REST, np.float32)
    ids[there] = block.top.ids
    probs[there] = block.top.logits - np.repeat(block.logsumexp, counts)
    teacher = {
        "teacher_ids": np.concatenate([ids, block.tail.ids.reshape(shape)], axis=1),
        "teacher_log_probs": np.concatenate([probs, tail], axis=1, dtype=np.float32),
        "teacher_mask": np.concatenate([there, np.ones(shape, np.bool_)], axis=1),
        "teacher_tail_mask": np.zeros((shape[0], there.shape[1] + size), np.bool_),
        "teacher_log_rest": np.log(rest).astype(np.float32),
    }
    teacher["teacher_tail_mask"][:, there.shape[1] :] = True
    if weigh:
        weights = np.zeros(teacher["teacher_ids"].shape, np.float32)
        weights[:, there.shape[1] :] = weigh_tail(tail, rest)
        teacher["teacher_log_weights"] = weights
    return teacher


class LogitIterableDataset:
    """Rows of an output to train on; to torch it is an `IterableDataset`.

    Each item is one conversation as a dictionary of numpy arrays: `index`, `input_ids` (S,) int32,
    `labels` (S,) int64 with -100 where nothing was extracted, `teacher_positions` (N,) of the
    extracted tokens in `input_ids`, and of each of them `TEACHER_COLUMNS` (N, E) and
    `teacher_log_rest` (N,). `collate_logits` makes batches.

    With a seed, the shards are put in random order, and the rows inside each shard; another epoch
    (`set_epoch`) gives another order. The rows are then divided into equal runs, first over ranks
    and then over the workers of a data loader, so that one worker reads only the shards of its
    run, and holds one at a time as it is stored. Rows that do not divide among the ranks are left
    out of that epoch, so that all ranks take equally many steps. As the dataset divides itself,
    nothing else must: accelerate and transformers' `Trainer` do, unless the loader is kept from
    them (docs/distillation.md).

    `state_dict` and `load_state_dict` go on where an epoch was left. They are of the one process
    that gives rows out: of this one under a `DataLoader` without workers; of each worker under
    `torchdata.stateful_dataloader`, which calls them there by itself.
    """

    def __init__(
        self,
        dataset: str | Path | Sequence[str | Path] | LogitDataset,
        *,
        seed: int | None = 0,
        rank: int | None = None,
        world_size: int | None = None,
        max_seq_len: int | None = None,
        weigh: bool = True,
        text: TextSource | None = None,
    ) -> None:
        """Open an output; nothing is read yet.

        Args:
            dataset: a folder, files, or a dataset on the Hub.
            seed: of the order; None keeps the order of the output.
            rank, world_size: this process's part; from the environment (RANK, WORLD_SIZE) if None.
            max_seq_len: cut longer conversations at this many tokens; one that has nothing
                extracted before that stays, with N = 0, so that ranks keep in step.
            weigh: compute the weights that `tail="unbiased"` needs; see `sparse_teacher`.
            text: where the conversations come from when the output does not store their tokens;
                None finds tokenizer, template and source from the output's settings.

        Raises:
            LogitsError: the rank is not below the world size, or torch is missing.
            OpenError: there is no such output.
        """
        torch = import_extra("torch")
        self.output = as_output(dataset)
        self.seed, self.max_seq_len, self.weigh, self.text = seed, max_seq_len, weigh, text
        self.rank = int(os.environ.get("RANK", 0)) if rank is None else rank
        self.world_size = int(os.environ.get("WORLD_SIZE", 1)) if world_size is None else world_size
        self._from_environment = world_size is None and self.world_size > 1
        if not 0 <= self.rank < self.world_size:
            raise LogitsError(f"rank {self.rank} is not in 0..{self.world_size - 1}")
        torch.utils.data.IterableDataset.register(type(self))  # so that no import needs torch
        # Shared memory, for workers that live on: the epoch, and whether there are workers.
        self._shared = torch.zeros(2, dtype=torch.int64).share_memory_()
        self._rows = 0  # given out in this pass by this very object, or to be passed over
        self._workers: int | None = None  # of the state that the next pass goes on from

    def __getstate__(self) -> dict[str, Any]:
        self._refuse_second_division()
        return self.__dict__

    def __len__(self) -> int:
        """Return the rows that this rank has in an epoch."""
        return len(self.output) // self.world_size

    @property
    def epoch(self) -> int:
        """Number of the epoch, from 0; it only changes the order."""
        return int(self._shared[0])

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of another epoch, from its start; workers that are running see it."""
        if epoch != self.epoch:
            self._rows, self._workers, self._shared[1] = 0, None, 0
        self._shared[0] = epoch

    def __iter__(self) -> Iterator[dict[str, Any]]:
        self._refuse_second_division()
        worker = import_extra("torch.utils.data").get_worker_info()
        number, workers = (worker.id, worker.num_workers) if worker else (0, 0)
        if self._workers not in (None, workers):
            raise LogitsError(
                f"the state is of {plural(self._workers or 0, 'worker')}, there are {workers}: "
                "rows are divided among workers, so go on with as many"
            )
        self._rows = 0 if self._workers is None else self._rows
        self._workers = None  # the pass after this one is whole again
        if worker is not None:  # files that the main process has open are not for two
            self._shared[1] = 1
            self.output = LogitDataset(self.output.store, self.output.sizes)
        first, last = self.row_range(number, max(workers, 1))
        for shard, rows in self.iter_runs(first + self._rows, last, epoch=self.epoch):
            for item in self.read_rows(shard, rows):
                self._rows += 1
                yield item

    def _refuse_second_division(self) -> None:
        """Refuse to divide rows by the environment's ranks where accelerate may divide again."""
        state = getattr(sys.modules.get("accelerate.state"), "PartialState", None)
        if self._from_environment and getattr(state, "_shared_state", None):
            raise LogitsError(
                f"accelerate runs {self.world_size} processes and divides the rows of a loader "
                "that it prepares, as this dataset does: give rank=0, world_size=1 for such a "
                "loader, or this process's rank and world_size for one that is kept from it"
            )

    def row_range(self, worker: int = 0, workers: int = 1) -> tuple[int, int]:
        """Return which run of an epoch's order, first and past the last, a worker of this rank has.

        The runs of the ranks are equally long, those of a rank's workers up to one row.
        """
        share = len(self)
        start = self.rank * share
        return start + share * worker // workers, start + share * (worker + 1) // workers

    def iter_runs(
        self, first: int, last: int, *, epoch: int
    ) -> Iterator[tuple[int, npt.NDArray[np.int64]]]:
        """Yield the shards, and the rows in them, from `first` to `last` of an epoch's order."""
        shards = np.arange(len(self.output.shards))
        if self.seed is not None:
            np.random.default_rng([self.seed, epoch]).shuffle(shards)
        begin = 0
        for shard in shards.tolist():
            end = begin + self.output.count_rows(shard)
            if begin < last and end > first:
                rows = np.arange(end - begin)
                if self.seed is not None:
                    np.random.default_rng([self.seed, epoch, shard]).shuffle(rows)
                yield shard, rows[max(first - begin, 0) : last - begin]
            begin = end

    def read_rows(
        self, shard: int, rows: npt.NDArray[np.int64], *, at_once: int = 16
    ) -> Iterator[dict[str, Any]]:
        """Yield rows of a shard to train on."""
        tables = self.output.iter_shard(shard, rows=256)
        table = pa.concat_tables(tables).combine_chunks()  # taking rows joins chunks every time
        for first in range(0, rows.size, at_once):
            block = decode_rows(table.take(pa.array(rows[first : first + at_once])))
            teacher = sparse_teacher(block, weigh=self.weigh)
            for row in range(block.index.size):
                yield self.training_row(block, row, teacher)

    def training_row(
        self, block: TokenBlock, row: int, teacher: Mapping[str, npt.NDArray[Any]]
    ) -> dict[str, Any]:
        """Put one row's tokens beside its part of the block's teacher.

        Raises:
            AlignmentError: the conversation has another number of extracted tokens.
        """
        first, last = block.row_starts[row : row + 2].tolist()
        sample = {"index": int(block.index[row]), "num_tokens": last - first}
        if block.tokens is not None:
            sample |= {name: block.tokens[i][row] for i, name in enumerate(TOKEN_COLUMNS)}
        ids, positions = self.row_tokens(sample)
        check_alignment(sample, ids, positions)
        kept = int(np.searchsorted(positions, self.max_seq_len or ids.size))
        ids, positions = ids[: self.max_seq_len], positions[:kept]
        labels = np.full(ids.size, IGNORED_LABEL, np.int64)
        labels[positions] = ids[positions]
        return {
            "index": sample["index"],
            "input_ids": ids,
            "labels": labels,
            "teacher_positions": positions,
            **{name: values[first : first + kept] for name, values in teacher.items()},
        }

    def row_tokens(
        self, sample: Mapping[str, Any]
    ) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]:
        """Return a row's tokens and extracted positions: stored, or rendered again."""
        if all(name in sample for name in TOKEN_COLUMNS):
            return stored_tokens(sample)
        if self.text is None:
            self.text = open_text(self.output)
        encoded = self.text.encode(sample["index"])
        return encoded.input_ids, encoded.token_positions

    def state_dict(self) -> dict[str, Any]:
        """Return where this epoch stands, as plain numbers.

        Raises:
            LogitsError: workers of a plain `DataLoader` give the rows out, which do not tell.
        """
        worker = import_extra("torch.utils.data").get_worker_info()
        if worker is None and self._shared[1]:
            raise LogitsError(
                "workers have given out the rows: use torchdata's StatefulDataLoader, whose own "
                "state_dict asks them, or a DataLoader with num_workers=0"
            )
        workers = worker.num_workers if worker else 0
        return {**self._identity(), "epoch": self.epoch, "workers": workers, "rows": self._rows}

    def _identity(self) -> dict[str, Any]:
        """Return what must be the same for a state to fit."""
        return {
            "seed": self.seed,
            "rank": self.rank,
            "world_size": self.world_size,
            "dataset_rows": len(self.output),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from where `state_dict` was taken, once: the pass after the next is whole again.

        Raises:
            LogitsError: the state is of another seed, rank, world size or output; one of another
                number of workers is refused when the next pass starts.
        """
        for name, value in self._identity().items():
            if state[name] != value:
                raise LogitsError(f"the state is of {name} {state[name]}, this is {value}")
        self._shared[0], self._shared[1] = state["epoch"], 0
        self._rows, self._workers = state["rows"], state["workers"]


def collate_logits(rows: Sequence[Mapping[str, Any]], *, pad_id: int = 0) -> dict[str, Any]:
    """Make a batch of torch tensors from rows of `LogitIterableDataset`.

    The first dimension of every tensor is the conversation, so that a batch may be cut along it,
    as accelerate does; the second is the token, padded on the right.

    Args:
        rows: B of them.
        pad_id: fills `input_ids`.

    Returns:
        `input_ids`, `attention_mask`, `labels` (B, S) int64; `index` (B,); `teacher_positions`
        (B, T), the position whose output predicts each extracted token, -1 for padding;
        `TEACHER_COLUMNS` (B, T, E); `teacher_log_rest` (B, T).
    """
    torch = import_extra("torch")
    sizes = [(row["input_ids"].size, *row["teacher_ids"].shape) for row in rows]
    longest, tokens, entries = np.max(sizes, axis=0).tolist()
    flat, deep = (len(rows), tokens), (len(rows), tokens, entries)
    batch = {
        "input_ids": np.full((len(rows), longest), pad_id, np.int64),
        "attention_mask": np.zeros((len(rows), longest), np.int64),
        "labels": np.full((len(rows), longest), IGNORED_LABEL, np.int64),
        "index": np.array([row["index"] for row in rows], np.int64),
        "teacher_positions": np.full(flat, -1, np.int64),
        "teacher_log_rest": np.full(flat, LEAST_LOG_REST, np.float32),
    }
    for name, (kind, fill) in TEACHER_COLUMNS.items():
        if name in rows[0]:
            batch[name] = np.full(deep, fill, kind)
    for i, (row, (s, n, e)) in enumerate(zip(rows, sizes, strict=True)):
        batch["input_ids"][i, :s], batch["attention_mask"][i, :s] = row["input_ids"], 1
        batch["labels"][i, :s] = row["labels"]
        batch["teacher_positions"][i, :n] = row["teacher_positions"] - 1
        batch["teacher_log_rest"][i, :n] = row["teacher_log_rest"]
        for name in TEACHER_COLUMNS.keys() & batch.keys():
            batch[name][i, :n, :e] = row[name]
    return {name: torch.from_numpy(values) for name, values in batch.items()}


def flat_positions(batch: Mapping[str, Any]) -> Any:
    """Return which of the B * S flattened positions predict the batch's extracted tokens, (N,).

    For models that can compute logits at chosen positions only: `distillation_loss` takes the
    logits (N, V) of just these, in this order.
    """
    positions = batch["teacher_positions"]
    rows, length = batch["input_ids"].shape
    starts = import_extra("torch").arange(rows, device=positions.device)[:, None] * length
    return (positions + starts)[positions >= 0]


# The loss -----------------------------------------------------------------------------------------


def distillation_loss(
    student_logits: Any,
    batch: Mapping[str, Any],
    *,
    divergence: str = "forward_kl",
    temperature: float = 1.0,
    tail: str = "unbiased",
    reduction: str = "mean",
    chunk_tokens: int = 1024,
) -> Any:
    """Return the divergence of the student from the stored teacher, in nats, times temperature².

    What is estimated, with p the teacher, q the student, both at `temperature`:

    - `forward_kl` Σ p log(p / q), `reverse_kl` Σ q log(q / p), `jsd` the mean of the two KL
      divergences to (p + q) / 2.

    How the tail is counted:

    - `unbiased`: every sampled token counts as `teacher_log_weights` says. At temperature 1 the
      value and its gradient are unbiased for all three divergences (no other `tail` is); sums that
      are known exactly (Σ q log q, the part of the JSD where p is 0) are taken exactly. At another
      temperature the normaliser Σ p^(1/T) is itself estimated, and a logarithm or quotient of an
      estimate is biased: there is no unbiased form, and what is computed is consistent in M.
    - `renormalized`: the sampled tokens are scaled to the mass outside the nucleus. Biased.
    - `ghost`: all tokens outside the nucleus are one; no tail sample is used at temperature 1.
      Exact for that coarser vocabulary, so never more than the true divergence.
    - `ignore`: only nucleus terms; the sum is left as it is, not scaled to 1. Biased.

    The reverse KL needs log p where nothing is stored. There p is taken to be the tail's mean, and
    sampled tokens correct it, without bias under `unbiased` but with a deviation that is large
    where q exceeds p by far; tokens that the teacher excludes count as that mean.

    The softmax runs over all V entries of the student: one with more than the teacher's (padding
    of its embedding) learns to leave them out; one with fewer cannot hold the teacher.

    Args:
        student_logits: (B, S, V), or (N, V) for only the positions of `flat_positions(batch)`.
        batch: from `collate_logits`, on the same device.
        divergence: `forward_kl`, `reverse_kl` or `jsd`.
        temperature: of both distributions.
        tail: `unbiased`, `renormalized`, `ghost` or `ignore`.
        reduction: `mean` over the N tokens, `sum`, or `none` for (N,).
        chunk_tokens: tokens at once; (chunk_tokens, V) float32 is what the loss needs beside one
            gradient as large as the logits at those N positions.

    Raises:
        LogitsError: an option is none of the choices; logits and batch do not fit together; the
            batch lacks what `tail` needs; the teacher has ids of V or more.

    Source: Kool, van Hoof and Welling (2020) for the weights; Hinton, Vinyals and Dean (2015) for
    the factor temperature²; Anshumann et al. (2025), Sparse Logit Sampling, ACL, for ghost tokens
    and for the rival that samples with replacement.
    """
    check_choice("divergence", divergence, DIVERGENCES)
    check_choice("tail", tail, TAILS)
    check_choice("reduction", reduction, ("mean", "sum", "none"))
    if not 0 < temperature < math.inf:
        raise LogitsError(f"temperature {temperature} is not positive")
    flat, where = flatten_student(student_logits, batch)
    there = batch["teacher_positions"] >= 0
    names = [*TEACHER_COLUMNS, "teacher_log_rest"]
    stored = {name: batch[name][there] for name in names if name in batch}
    teacher = temper_teacher(stored, temperature, tail, vocab=flat.shape[-1])
    losses = rowwise_loss().apply(
        flat, where, teacher, divergence, temperature, max(chunk_tokens, 1)
    )
    if reduction == "none":
        return losses
    return losses.sum() if reduction == "sum" else losses.sum() / max(losses.numel(), 1)


def flatten_student(logits: Any, batch: Mapping[str, Any]) -> tuple[Any, Any]:
    """Return logits as (n, V), and which rows of them (N,) are the extracted tokens'.

    Raises:
        LogitsError: the shape is not that of the batch.
    """
    torch = import_extra("torch")
    if logits.dim() == 2:
        count = int((batch["teacher_positions"] >= 0).sum())
        if logits.shape[0] != count:
            raise LogitsError(f"{logits.shape[0]} rows of student logits for {count} tokens")
        return logits, torch.arange(count, device=logits.device)
    if logits.shape[:2] != batch["input_ids"].shape:
        raise LogitsError(
            f"student logits of shape {tuple(logits.shape)} are not at the positions of "
            f"input_ids {tuple(batch['input_ids'].shape)}"
        )
    return logits.reshape(-1, logits.shape[-1]), flat_positions(batch)


def check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    """Refuse a value that is none of the choices."""
    if value not in choices:
        raise LogitsError(f"{name} {value!r} is none of {', '.join(choices)}")


def temper_teacher(
    stored: Mapping[str, Any], temperature: float, tail: str, *, vocab: int
) -> dict[str, Any]:
    """Return the teacher at a temperature and the weight of each entry, as `token_losses` reads it.

    Args:
        stored: `TEACHER_COLUMNS` (N, E) and `teacher_log_rest` (N,).
        temperature: divides the log-probabilities, which are normalised again.
        tail: see `distillation_loss`.
        vocab: entries of the student.

    Returns:
        `ids`, `log_probs`, `log_weights` (N, E), -inf weights for what does not count, `nucleus`
        (N, E), `log_rest` (N,), `log_mean` (N,) the mean of log p that stands for what is not
        stored, and `ghost`, whether the tail is one token.
    """
    torch = import_extra("torch")
    check_entries(stored, tail, vocab)
    sampled = stored["teacher_mask"] & stored["teacher_tail_mask"]
    nucleus = stored["teacher_mask"] & ~sampled
    log_rest = stored["teacher_log_rest"].float()
    log_probs = stored["teacher_log_probs"].float()
    weights = stored.get("teacher_log_weights")
    if tail == "renormalized" or weights is None:  # scaled to what is outside the nucleus
        scale = log_rest - masked_logsumexp(log_probs, sampled)
        weights = scale[:, None].expand_as(log_probs).masked_fill(~sampled, 0)
    log_weights = weights.float()
    outside = (vocab - nucleus.sum(-1)).clamp(min=1).log()  # (N,)
    if temperature != 1:
        log_probs = log_probs / temperature
        spread = outside + (log_rest - outside) / temperature  # as if the tail were all equal
        in_tail = masked_logsumexp(log_probs + log_weights, sampled)
        in_tail = torch.where(sampled.any(-1), in_tail, spread)
        total = torch.logaddexp(masked_logsumexp(log_probs, nucleus), in_tail)
        log_probs, log_rest = log_probs - total[:, None], in_tail - total
    counted = nucleus if tail in ("ghost", "ignore") else nucleus | sampled
    return {
        "ids": stored["teacher_ids"],
        "log_probs": log_probs,
        "log_weights": log_weights.masked_fill(~counted, -math.inf),
        "nucleus": nucleus,
        "log_rest": log_rest,
        "log_mean": log_rest - outside,
        "ghost": tail == "ghost",
    }


def check_entries(stored: Mapping[str, Any], tail: str, vocab: int) -> None:
    """Refuse a batch that lacks what a `tail` needs, or has ids that the student does not."""
    if tail == "unbiased" and "teacher_log_weights" not in stored:
        raise LogitsError("tail='unbiased' needs the weights that weigh=False has left out")
    there = stored["teacher_mask"]
    if (
        tail in ("unbiased", "renormalized")
        and not (there & stored["teacher_tail_mask"]).any(-1).all()
    ):
        raise LogitsError(f"tail={tail!r} needs a tail sample (--sampled-n); take ghost or ignore")
    if there.numel() and int(stored["teacher_ids"].max()) >= vocab:
        raise LogitsError(f"the teacher has ids beyond the student's {vocab} logits")


def masked_logsumexp(values: Any, mask: Any) -> Any:
    """Return log Σ exp over the entries of each row that a mask selects; -inf for none."""
    return values.masked_fill(~mask, -math.inf).logsumexp(-1)


@functools.cache
def rowwise_loss() -> Any:
    """Return the autograd function behind `distillation_loss`, made when torch is first needed.

    Its forward pass computes the gradient too, chunk by chunk: nothing of size (N, V) is kept but
    that gradient, in the student's own dtype (float32 for a float16 student, whose gradient may
    underflow before the scaler of its optimizer has seen it).
    """
    torch = import_extra("torch")
    function: Any = torch.autograd.Function

    class RowwiseLoss(function):
        @staticmethod
        def forward(  # type: ignore[no-untyped-def]
            ctx, flat, where, teacher, divergence, temperature, chunk_tokens
        ) -> Any:
            wide = torch.promote_types(flat.dtype, torch.float32)  # float64 stays, for gradcheck
            losses = torch.zeros(where.numel(), dtype=wide, device=flat.device)
            wanted = ctx.needs_input_grad[0]
            kept = torch.float32 if flat.dtype == torch.float16 else flat.dtype
            gradient = flat.new_empty((where.numel() if wanted else 0, flat.shape[-1]), dtype=kept)
            for first in range(0, where.numel(), chunk_tokens):
                part = slice(first, first + chunk_tokens)
                with torch.enable_grad():
                    logits = flat[where[part]].detach().to(wide).requires_grad_(wanted)
                    chunk = {
                        name: value[part] if torch.is_tensor(value) else value
                        for name, value in teacher.items()
                    }
                    values = token_losses(logits / temperature, chunk, divergence)
                    values = values * temperature**2
                    if wanted:
                        gradient[part] = torch.autograd.grad(values.sum(), logits)[0].to(kept)
                losses[part] = values.detach()
            ctx.save_for_backward(gradient, where)
            ctx.like, ctx.chunk_tokens = flat.new_empty(0), chunk_tokens
            ctx.rows = flat.shape[0]
            return losses

        @staticmethod
        def backward(ctx, outer) -> Any:  # type: ignore[no-untyped-def]
            gradient, where = ctx.saved_tensors
            full = ctx.like.new_zeros((ctx.rows, gradient.shape[-1]))
            for first in range(0, where.numel(), ctx.chunk_tokens):
                part = slice(first, first + ctx.chunk_tokens)
                scaled = gradient[part] * outer[part, None].to(gradient.dtype)
                full[where[part]] = scaled.to(full.dtype)
            return full, None, None, None, None, None

    return RowwiseLoss


def token_losses(logits: Any, teacher: Mapping[str, Any], divergence: str) -> Any:
    """Return the divergence (n,) at each of some tokens from float logits (n, V)."""
    functional = import_extra("torch.nn.functional")
    total = logits.logsumexp(-1, keepdim=True)  # (n, 1)
    log_q = logits.gather(1, teacher["ids"]) - total  # (n, E)
    counted = teacher["log_weights"] > -math.inf
    log_w = teacher["log_weights"].masked_fill(~counted, 0).to(log_q.dtype)
    log_p = teacher["log_probs"].masked_fill(~counted, 0).to(log_q.dtype)
    log_q = log_q.masked_fill(~counted, 0)
    if teacher["ghost"]:
        return ghost_losses(logits, log_p, log_q, teacher, divergence)
    if divergence == "forward_kl":
        terms = (log_w + log_p).exp() * (log_p - log_q)
        return terms.masked_fill(~counted, 0).sum(-1)
    if divergence == "jsd":
        terms = (log_w + log_p).exp() * jsd_above_none(log_p - log_q)
        return terms.masked_fill(~counted, 0).sum(-1) + math.log(2) / 2
    log_mean = teacher["log_mean"].to(log_q.dtype)[:, None]
    bounded = functional.log_softmax(logits, -1).clamp(min=-1e4)  # a student's -inf: 0 log 0 is 0
    entropy = (functional.softmax(logits, -1) * bounded).sum(-1)
    terms = (log_w + log_q).clamp(max=MAX_LOG_TERM).exp() * (log_mean - log_p)
    return entropy - log_mean[:, 0] + terms.masked_fill(~counted, 0).sum(-1)


def jsd_above_none(log_ratio: Any) -> Any:
    """Return (j(p, q) - j(0, q)) / p, j being a token's term of the JSD, p / q = exp(log_ratio).

    j(0, q) = q log 2 / 2 is summed over the vocabulary exactly; what is left is about proportional
    to p, so that sampling it by p costs little.
    """
    torch = import_extra("torch")
    softplus = torch.nn.functional.softplus
    bounded = log_ratio.clamp(-10, 80)  # below it, log(1 + x) / x = 1 - x / 2 to 1e-9
    student = torch.where(
        log_ratio > -10,
        softplus(bounded) * (-bounded).exp(),
        1 - log_ratio.clamp(max=-10).exp() / 2,
    )
    return (math.log(2) - softplus(-log_ratio) - student) / 2


def ghost_losses(
    logits: Any, log_p: Any, log_q: Any, teacher: Mapping[str, Any], divergence: str
) -> Any:
    """Return the divergence (n,) between two distributions over the nucleus and one token more."""
    torch = import_extra("torch")
    nucleus = teacher["nucleus"]
    columns = teacher["ids"].masked_fill(~nucleus, logits.shape[-1])  # what is not there goes last
    left = append_column(logits).scatter(1, columns, -math.inf)[:, : logits.shape[-1]]
    ghost_q = left.logsumexp(-1, keepdim=True) - logits.logsumexp(-1, keepdim=True)
    ghost_q = ghost_q.clamp(
        min=LEAST_LOG_REST
    )  # nothing is left where the nucleus is the vocabulary
    ghost_p = teacher["log_rest"].to(ghost_q.dtype)[:, None]
    log_p = torch.cat([log_p, ghost_p], 1)
    log_q = torch.cat([log_q, ghost_q], 1)
    there = torch.cat([nucleus, torch.ones_like(ghost_p, dtype=torch.bool)], 1)
    if divergence == "forward_kl":
        terms = log_p.exp() * (log_p - log_q)
    elif divergence == "reverse_kl":
        terms = log_q.exp() * (log_q - log_p)
    else:
        terms = log_p.exp() * jsd_above_none(log_p - log_q) + log_q.exp() * (math.log(2) / 2)
    return terms.masked_fill(~there, 0).sum(-1)


def append_column(logits: Any) -> Any:
    """Append a column of zeros, where indices that mean nothing can point."""
    return import_extra("torch.nn.functional").pad(logits, (0, 1))


# Other trainers' formats --------------------------------------------------------------------------
#
# Both hold a fixed number of entries a token and no weights, so only the nucleus goes into them.


def export_axolotl(
    dataset: str | Path | LogitDataset,
    folder: str | Path,
    *,
    k: int = 64,
    at: str = "predicting",
    text: TextSource | None = None,
) -> int:
    """Write an output as the tokenized dataset that axolotl's knowledge distillation trains on.

    Columns: `input_ids`, `attention_mask`, `labels`, and at each of the S positions
    `target_token_ids`, `target_logprobs` and `target_mask`, k values each; -1e9 and mask 0 where
    there is nothing. Log-probabilities are the teacher's own over the whole vocabulary.

    Args:
        dataset: the output.
        folder: a new one for the Parquet files, one for each 256 rows.
        k: nucleus entries kept of each token.
        at: `predicting` puts a distribution at the position that predicts, as the trainer since
            its Liger kernel (2025) expects; `predicted` at the token itself, as the one before,
            which shifted.
        text: see `LogitIterableDataset`.

    Returns:
        The number of rows.

    Raises:
        LogitsError: `k` is below 1, or something is in the folder.

    Source: axolotl, src/axolotl/integrations/kd: collator.py for the columns, kernels/liger.py
    and trainer.py for the positions.
    """
    check_choice("at", at, ("predicting", "predicted"))
    target = check_export(folder, k)
    back = int(at == "predicting")
    rows = (axolotl_row(row, k, back=back) for row in export_rows(dataset, text))
    return write_export(rows, target)


def axolotl_row(row: Mapping[str, Any], k: int, *, back: int) -> dict[str, npt.NDArray[Any]]:
    """Return the columns of one row, distributions `back` positions before their token."""
    size = row["input_ids"].size
    targets: dict[str, Any] = {
        "target_token_ids": np.zeros((size, k), np.int32),
        "target_logprobs": np.full((size, k), -1e9, np.float32),
        "target_mask": np.zeros((size, k), np.int8),
    }
    entries = top_entries(row, k, empty=-1e9)
    for name, values in zip(targets, entries, strict=True):
        targets[name][row["teacher_positions"] - back] = values
    return {
        "input_ids": row["input_ids"],
        "attention_mask": np.ones(size, np.int8),
        "labels": row["labels"],
        **targets,
    }


def export_distillkit(
    dataset: str | Path | LogitDataset,
    folder: str | Path,
    *,
    k: int = 64,
    text: TextSource | None = None,
) -> int:
    """Write an output as the offline teacher dataset of DistillKit (`teacher.kind: dataset`).

    Columns: `input_ids` and `labels` (S,); at each of the S - 1 positions that predict something
    `compressed_logprobs`, k float32 by descending value as bytes, and `bytepacked_indices`, the ids
    at ceil(log2 V) bits each, the highest bit first. `compression_config.yaml` beside them is what
    `teacher.logprob_compressor` has to say (k = exact_k: nothing is approximated). Where nothing
    was extracted the distribution is the text's next token alone; entries beyond the nucleus have
    log-probability -100.

    Args:
        dataset: the output.
        folder: a new one for the Parquet files, one for each 256 rows, and the configuration.
        k: nucleus entries kept of each token.
        text: see `LogitIterableDataset`.

    Returns:
        The number of rows.

    Raises:
        LogitsError: `k` is below 1, or something is in the folder.

    Source: arcee-ai/DistillKit, distillkit/sample_common.py (schema), compression/config.py, and
    compression/bitpack.py and monotonic_logprobs.py for the bytes.
    """
    output = as_output(dataset)
    vocab = int(load_extraction_config(output).get("vocab_size") or MAX_TOKEN_ID + 1)
    bits = max((vocab - 1).bit_length(), 1)
    target = check_export(folder, k)
    lines = (f"d: {vocab}", f"k: {k}", f"exact_k: {k}", "exact_dtype: float32", *DISTILLKIT_PLAIN)
    rows = (distillkit_row(row, k, bits=bits) for row in export_rows(output, text))
    return write_export(rows, target, texts={"compression_config.yaml": "\n".join(lines) + "\n"})


def distillkit_row(row: Mapping[str, Any], k: int, *, bits: int) -> dict[str, npt.NDArray[Any]]:
    """Return the columns of one row."""
    ids = np.zeros((row["input_ids"].size - 1, k), np.int32)
    log_probs = np.full(ids.shape, LEAST_LOG_REST, np.float32)
    ids[:, 0], log_probs[:, 0] = row["input_ids"][1:], 0
    where = row["teacher_positions"] - 1
    ids[where], log_probs[where], _ = top_entries(row, k, empty=LEAST_LOG_REST)
    return {
        "input_ids": row["input_ids"].astype(np.uint64),
        "labels": row["labels"],
        "compressed_logprobs": log_probs.astype("<f4").view(np.uint8),
        "bytepacked_indices": pack_bits(ids, bits),
    }


DISTILLKIT_PLAIN = (
    "polynomial_terms: null",
    "term_dtype: float32",
    "residual_bins: []",
    "delta_encoding: false",
    "error_diffusion: false",
    "normalize_t: false",
)


def export_rows(
    dataset: str | Path | LogitDataset, text: TextSource | None
) -> Iterator[dict[str, Any]]:
    """Yield every row of an output in its order, without weights."""
    rows: Any = LogitIterableDataset(
        dataset, seed=None, rank=0, world_size=1, weigh=False, text=text
    )
    yield from rows


def top_entries(
    row: Mapping[str, Any], k: int, *, empty: float
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32], npt.NDArray[np.int8]]:
    """Return ids, log-probabilities and mask (N, k) of each token's k likeliest nucleus entries."""
    there = (row["teacher_mask"] & ~row["teacher_tail_mask"])[:, :k]
    width = there.shape[1]
    ids = np.zeros((there.shape[0], k), np.int32)
    log_probs = np.full(ids.shape, empty, np.float32)
    mask = np.zeros(ids.shape, np.int8)
    ids[:, :width] = np.where(there, row["teacher_ids"][:, :width], 0)
    log_probs[:, :width] = np.where(there, row["teacher_log_probs"][:, :width], empty)
    mask[:, :width] = there
    return ids, log_probs, mask


def pack_bits(ids: npt.NDArray[np.int32], bits: int) -> npt.NDArray[np.uint8]:
    """Pack each row of ids (n, k) into a stream of `bits` bits an id, the highest bit first."""
    wide = np.unpackbits(ids.astype(">u4").view(np.uint8).reshape(*ids.shape, 4), axis=-1)
    return np.packbits(wide[..., 32 - bits :].reshape(ids.shape[0], -1), axis=-1)


def check_export(folder: str | Path, k: int) -> Path:
    """Return the folder of an export, which must be new, as a file of another would be read too.

    Raises:
        LogitsError: something is there, or `k` is no number of entries.
    """
    if isinstance(k, bool) or not isinstance(k, (int, np.integer)) or k < 1:
        raise LogitsError(f"k={k!r}: an export keeps at least 1 entry of each token")
    path = Path(folder).expanduser()
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise LogitsError(f"{folder} is not empty: name a new folder for the export")
    return path


def write_export(
    rows: Iterable[Mapping[str, npt.NDArray[Any]]],
    folder: Path,
    *,
    texts: Mapping[str, str] | None = None,
    at_once: int = 256,
) -> int:
    """Write rows of one- and two-dimensional arrays as Parquet files of (nested) lists.

    The folder appears when everything is in it, with `texts` by name of file.
    """
    source, count = iter(rows), 0
    with writing(folder), tempfile.TemporaryDirectory(dir=folder.parent, prefix=".export-") as made:
        new = Path(made) / "export"
        new.mkdir()
        for number in itertools.count():
            chunk = list(itertools.islice(source, at_once))
            if not chunk:
                break
            columns = {name: nested_lists([row[name] for row in chunk]) for name in chunk[0]}
            path = new / f"data_{number}.parquet"
            pq.write_table(pa.table(columns), path, compression="zstd")
            count += len(chunk)
        for name, text in (texts or {}).items():
            (new / name).write_text(text, encoding="utf-8")
        new.replace(folder)
    return count


def nested_lists(arrays: Sequence[npt.NDArray[Any]]) -> pa.Array:
    """Return one list an array, of lists where the arrays have two dimensions."""
    values = pa.array(np.concatenate([array.reshape(-1) for array in arrays]))
    if arrays[0].ndim == 2:
        width = arrays[0].shape[1]
        starts = np.arange(sum(array.shape[0] for array in arrays) + 1) * width
        values = pa.ListArray.from_arrays(pa.array(starts, pa.int32()), values)
    starts = to_starts([array.shape[0] for array in arrays])
    return pa.ListArray.from_arrays(pa.array(starts, pa.int32()), values)


# --------------------------------------------------------------------------------------------------
# 10 CLI
# --------------------------------------------------------------------------------------------------


EXIT_CODES = (
    "exit codes: 0 all went well; 1 a bug (traceback); 2 bad usage or an output that cannot be "
    "opened; 3 --validate found violations, or --compare nothing to compare"
)
CHECK_FAILED = 3


class OneLineParser(argparse.ArgumentParser):
    """A parser whose refusals are one line, like every other error."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse; an option that is none is named first, with the one that looks like it."""
        for word in sys.argv[1:] if args is None else args:
            flag = word.partition("=")[0]
            known = self._option_string_actions
            if flag == "--":
                break
            if re.match(r"--\w", flag) and not any(name.startswith(flag) for name in known):
                like = "".join(difflib.get_close_matches(flag, known, 1))
                self.error(f"there is no option {flag}" + (f": is it {like}?" if like else ""))
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        """Print what is wrong and exit 2."""
        self.exit(2, f"{self.prog}: error: {message} (see --help)\n")


class LenientFile(io.FileIO):
    """Drops what cannot be written: into a closed pipe, a full disk, a terminal that is gone."""

    def write(self, data: Any) -> int:
        """Write what can be written; returns as if all had been."""
        try:
            written = super().write(data)
        except OSError:
            written = None
        return len(data) if written is None else written


def outlive_readers(*names: str) -> None:
    """Let the process's own `stdout` or `stderr` drop what nobody can take.

    So no work ends because its log is full or its terminal gone. A stream in place of the
    process's own, such as a notebook's, stays as it is.
    """
    for name in names:
        stream = getattr(sys, name)
        if stream is None:  # closed by who started us; no other file may get its number
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
        elif stream is getattr(sys, f"__{name}__") and _raw_file(stream) is io.FileIO:
            stream.flush()
            file = LenientFile(stream.fileno(), "w", closefd=False)
            text = io.TextIOWrapper(
                io.BufferedWriter(file),
                encoding=stream.encoding,
                errors=stream.errors,
                line_buffering=True,
            )
            setattr(sys, name, text)


def log_hub_once() -> None:
    """Keep huggingface_hub from writing every line of its log twice: itself, and through ours."""
    import_extra("huggingface_hub.utils.logging")
    logging.getLogger("huggingface_hub").handlers.clear()


def _raw_file(stream: Any) -> type:
    """Return the kind of file below a text stream."""
    return type(getattr(stream.buffer, "raw", stream.buffer))


def row_list(text: str) -> list[int]:
    """Parse row numbers such as `3`, `0,5` or `0-4`; a leading minus counts from the end."""
    rows: list[int] = []
    for part in text.split(","):
        found = re.fullmatch(r"(-?[0-9]{1,10})(?:-([0-9]{1,10}))?", part.strip())
        if found is None:
            raise argparse.ArgumentTypeError(f"{part!r} is no row number or range")
        first, last = int(found[1]), int(found[2] or found[1])
        if last < first or last - first >= 1000:
            raise argparse.ArgumentTypeError(f"{part!r} is no range of 1 to 1000 rows")
        rows += range(first, last + 1)
    return rows


def positive_int(text: str) -> int:
    """Parse an integer of at least 1."""
    if not re.fullmatch(r"0*[1-9][0-9]{0,9}", text):
        raise argparse.ArgumentTypeError(f"{text!r} is no integer of at least 1")
    return int(text)


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = OneLineParser(
        prog="explore-logits",
        usage="%(prog)s OUTPUT [options]",
        description="Look at an output of extract-logits: a folder, or a dataset on the Hub.",
        epilog=EXIT_CODES,
    )
    add = parser.add_argument
    add("output", metavar="OUTPUT", help="folder, Parquet file or Hub dataset")
    add("--split", default="train", help="split of OUTPUT (default: %(default)s)")
    what = parser.add_argument_group("what to show (default: --sample 0)")
    add = what.add_argument
    add("--sample", type=row_list, metavar="ROWS", help="rows, such as 3 or 0,5 or 0-4")
    add("--conversation", type=int, metavar="ID", help="the row of this index in the source")
    add("--token", type=int, metavar="T", help="predictions at this token of the row")
    add("--html", metavar="FILE", help="write the rows, and with --stats those, as one page")
    add("--plot", metavar="FILE", help="write a picture of the nucleus sizes (extra viz)")
    add("--plots", metavar="DIR", help="write every plot, of the first row shown, as PNG")
    add("--stats", action="store_true", help="sizes, covered probability, bytes per token")
    add("--validate", action="store_true", help="check every row against the format")
    add("--compare", metavar="OTHER", help="compare the distributions with another output's")
    how = parser.add_argument_group("how")
    add = how.add_argument
    add("--top", type=positive_int, default=5, metavar="K", help="predictions a token (default: 5)")
    add("--max-samples", type=positive_int, metavar="N", help="rows read by --stats at most")
    add("--text", action="store_true", help="--stats: read the source too, for the agreement")
    add("--model", help="where the teacher's tokenizer is now (default: as the run had it)")
    add("--dataset", help="where the conversations are now (default: as the run had it)")
    add("--trust-remote-code", action="store_true", help="run code of the teacher's tokenizer")
    return parser


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line; a bad one exits 2."""
    return build_parser().parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line: what was asked for on stdout, a JSON object as its last line."""
    outlive_readers("stderr")
    logging.basicConfig(format="%(message)s", level=logging.INFO, stream=sys.stderr)
    logging.getLogger("huggingface_hub").propagate = False  # it writes its lines by itself
    args = parse_args(argv)
    if isinstance(sys.stdout, io.TextIOWrapper):
        if not sys.stdout.isatty() and not os.environ.get("PYTHONIOENCODING"):
            sys.stdout.reconfigure(encoding="utf-8")  # whatever the locale: nobody looks yet
        sys.stdout.reconfigure(errors="replace")  # a terminal that has no block characters
    try:
        summary, code = run_commands(args)
        print(json.dumps(summary))
        sys.stdout.flush()
    except LogitsError as error:
        log.error("explore-logits: %s", show_text(str(error)))
        return 2
    except OSError as error:
        if error.errno not in (errno.EPIPE, errno.ENOSPC):
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if error.errno == errno.EPIPE:  # the reader, such as head, has seen enough
            return 0
        log.error("explore-logits: cannot write the result: %s; make room", error.strerror)
        return 2
    return code


def run_commands(args: argparse.Namespace) -> tuple[dict[str, Any], int]:
    """Do what the command line asks for; return what goes into the last line and the exit code."""
    dataset = load_logit_dataset(args.output, args.split)
    summary: dict[str, Any] = {"output": args.output, "shards": len(dataset.shards)}
    code = 0
    if args.validate:
        report = validate_output(dataset)
        print(wrap_text(str(report)))
        summary |= {"rows": report.rows, "tokens": report.tokens}
        summary["violations"] = dict(report.counts)
        code = code if report.ok else CHECK_FAILED
    if args.compare:
        comparison = compare_outputs(dataset, args.compare)
        print(wrap_text(str(comparison)))
        summary |= asdict(comparison)
        code = code if comparison.tokens else CHECK_FAILED
    if not (args.validate or args.compare):
        summary["rows"] = len(dataset)
    if code and args.validate and not report.ok:
        return summary, code  # what breaks the rules is not summed up
    return summary | show_output(dataset, args), code


def show_output(dataset: LogitDataset, args: argparse.Namespace) -> dict[str, Any]:
    """Show figures, rows and pictures that were asked for; return what they add to the summary."""
    summary: dict[str, Any] = {}
    stats = show_stats(dataset, args) if args.stats else None
    if stats is not None:
        summary |= {"tokens": stats.tokens, "bytes_per_token": stats.bytes_per_token}
    rows = chosen_rows(dataset, args)
    if rows or args.conversation is not None:
        summary |= show_rows(dataset, rows, args, stats)
    elif args.html:
        write_rows_page(args.html, dataset, [], stats)
        summary["html"] = args.html
    if args.plot:
        figure = plot_nucleus_size_analysis(dataset, max_samples=args.max_samples)
        summary["plot"] = save_figure(figure, args.plot)
    if args.plots:
        summary["plots"] = write_plots(dataset, rows[0] if rows else 0, Path(args.plots))
    return summary


def chosen_rows(dataset: LogitDataset, args: argparse.Namespace) -> list[int]:
    """Return the rows to show: those asked for, and row 0 when nothing else is."""
    if args.conversation is not None:
        row = row_numbers(dataset).get(args.conversation)
        return [row] if row is not None else []
    other = any((args.stats, args.plot, args.plots, args.validate, args.compare))
    if args.sample is None and other and args.token is None:
        return []
    return args.sample if args.sample is not None else [0]


def show_stats(dataset: LogitDataset, args: argparse.Namespace) -> DatasetStats:
    """Print the figures of an output."""
    text = open_asked_text(dataset, args) if args.text else None
    stats = compute_dataset_stats(
        dataset,
        max_samples=args.max_samples,
        actual_tokens=text.actual_tokens if text else None,
    )
    print_dataset_stats(stats)
    return stats


def show_rows(
    dataset: LogitDataset, rows: list[int], args: argparse.Namespace, stats: DatasetStats | None
) -> dict[str, Any]:
    """Print rows beside their text, or by token ids where there is none, and write their page."""
    text, why = find_text(dataset, args)
    if text is None and (args.html or not rows):
        raise LogitsError(f"the text is needed for this: {why}")
    samples = [get_sample(dataset, row) for row in rows]  # one that is not there is refused first
    analyses = []
    if text is not None:
        analyses = [analyze_row(dataset, row, text, k=args.top) for row in rows]
        if not rows:
            analyses = [analyze_missing(dataset, text, args.conversation)]
    else:
        log.warning("explore-logits: showing ids only: %s", show_text(str(why)))
    if args.html:
        write_rows_page(args.html, dataset, analyses, stats)
        return {"sample": rows, "html": args.html}
    for seen in analyses:
        print(visualize_conversation_probabilities(seen), end="\n\n")
    for number, sample in enumerate(samples):
        show_tokens(sample, args, text, analyses[number] if analyses else None)
    return {"sample": rows}


def write_rows_page(
    path: str,
    dataset: LogitDataset,
    analyses: Sequence[ConversationAnalysis],
    stats: DatasetStats | None,
) -> None:
    """Write the page of chosen rows, with the figures of the output where there are any."""
    about = describe_run(dataset)
    write_page(path, render_page(analyses, about=about, stats=stats))


def open_asked_text(dataset: LogitDataset, args: argparse.Namespace) -> TextSource:
    """Open the text behind an output, where the command line says it is now."""
    return open_text(
        dataset,
        model=args.model,
        dataset=args.dataset,
        trust_remote_code=args.trust_remote_code,
    )


def find_text(
    dataset: LogitDataset, args: argparse.Namespace
) -> tuple[TextSource | None, LogitsError | None]:
    """Open the text behind an output if it can be found, and say why not."""
    try:
        return open_asked_text(dataset, args), None
    except LogitsError as error:
        return None, error


def show_tokens(
    sample: Sample,
    args: argparse.Namespace,
    text: TextSource | None,
    analysis: ConversationAnalysis | None,
) -> None:
    """Print what a sample holds and its most surprising tokens, or the one asked for."""
    print_sample_info(sample)
    if analysis is not None:
        surprise = np.array([token.log_probability for token in analysis.tokens])
        why = "that the teacher expected least"
    else:
        surprise = sample.block.first_probs
        why = "of which the teacher was least sure"
    chosen = [args.token] if args.token is not None else sorted(np.argsort(surprise)[:3].tolist())
    if args.token is None and chosen:
        print(f"the {plural(len(chosen), 'token')} {why}:")
    for t in chosen:
        t = check_token(sample, t)
        print()
        actual = analysis.tokens[t] if analysis is not None else None
        tokenizer = text.tokenizer if text else None
        show_token_table(sample, t, tokenizer, k=args.top, actual=actual)


def save_figure(figure: Any, path: str | Path) -> str:
    """Write a figure as the kind of picture that the file's name says, else PNG; return the name.

    Raises:
        LogitsError: there is no such kind, or it cannot be written there.
    """
    path = path if Path(path).suffix else f"{path}.png"
    with writing(path) as target:
        try:
            figure.savefig(target)
            return str(path)
        except ValueError as error:  # a format that matplotlib does not know
            raise LogitsError(f"cannot write {path}: {first_line(error)}") from error


def write_plots(dataset: LogitDataset, row: int, folder: Path) -> list[str]:
    """Write every plot as PNG into a folder; return the files."""
    sample = get_sample(dataset, row)
    widest = int(np.argmax(sample["top_counts"])) if sample["num_tokens"] else 0
    figures = {
        "logit_distribution": plot_logit_distribution(sample, widest),
        "nucleus_vs_sampled": plot_nucleus_vs_sampled(sample),
        "nucleus_sizes": plot_nucleus_sizes(sample),
        "nucleus_size_analysis": plot_nucleus_size_analysis(dataset),
    }
    return [save_figure(figure, folder / f"{name}.png") for name, figure in figures.items()]


if __name__ == "__main__":
    sys.exit(main())
