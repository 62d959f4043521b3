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

import argparse
import base64
import contextlib
import functools
import hashlib
import html
import importlib
import importlib.util
import itertools
import json
import math
import os
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

__all__ = [
    "FORMAT_VERSION",
    "MAX_TOKEN_ID",
    "SCHEMA",
    "AlignmentError",
    "ConversationAnalysis",
    "FormatError",
    "LogitDataset",
    "LogitsError",
    "OpenError",
    "Prediction",
    "RowError",
    "TokenAnalysis",
    "TokenBlock",
    "analyze_token_probabilities",
    "decode_rows",
    "decode_top_tokens",
    "dequantize_all_logits",
    "dequantize_logits",
    "dequantize_sampled_logits",
    "dequantize_top_logits",
    "get_nucleus_probability_mass",
    "get_sample",
    "iter_samples",
    "load_extraction_config",
    "load_logit_dataset",
    "logits_to_probs",
    "pack_indices",
    "plot_logit_distribution",
    "plot_nucleus_sizes",
    "plot_nucleus_vs_sampled",
    "print_sample_info",
    "print_top_tokens",
    "quantize_logits",
    "render_page",
    "shard_schema",
    "unpack_indices",
    "visualize_conversation_probabilities",
]


class LogitsError(Exception):
    """Anything the user can act on: bad input, a bad file, a refused request. Shown as one line."""


class FormatError(LogitsError):
    """A file or an array is not in the shard format; met when reading foreign or damaged shards."""


# --------------------------------------------------------------------------------------------------
# 1 Format
# --------------------------------------------------------------------------------------------------

FORMAT_VERSION = 1
MAX_TOKEN_ID = 2**18 - 1  # 16 bits in *_indices_low, 2 in *_indices_high
METADATA_VERSION = b"logits.format_version"
METADATA_SETTINGS = b"logits.extraction"  # JSON object: the settings of the run

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


def shard_schema(
    *, store_tokens: bool = False, settings: Mapping[str, Any] | None = None
) -> pa.Schema:
    """Return the schema of a shard, with the settings of the run in its key-value metadata.

    `store_tokens` appends `input_ids` and `token_positions` (`TOKEN_FIELDS`). `settings` is stored
    as JSON with sorted keys, so equal settings give equal bytes.
    """
    schema = SCHEMA
    if store_tokens:
        for field in TOKEN_FIELDS:
            schema = schema.append(field)
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


def unpack_indices(low: npt.ArrayLike, high: bytes, counts: npt.ArrayLike | None = None) -> Any:
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
    """
    values = np.asarray(logits, np.float32).reshape(-1)
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
# 2 Conversation
# --------------------------------------------------------------------------------------------------

# --------------------------------------------------------------------------------------------------
# 3 Open
# --------------------------------------------------------------------------------------------------


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
MAX_TEXT_BYTES = 16 * 2**20  # settings and templates are kilobytes
MAX_GROUP_BYTES = 2 * 2**30  # a row group that says it decodes to more is refused, not tried
MAX_GROUP_VALUES = 2**28
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_HUB_PREFIXES = ("hf://datasets/", "https://huggingface.co/datasets/")
_SPLIT_NAME = re.compile(r"(?:^|[/_.-])(train|validation|valid|dev|test|eval)(?=[/_.-])")


def import_extra(module: str, extra: str | None = None) -> Any:
    """Import a package that only some functions need; when missing, name what brings it."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        package = module.split(".")[0]
        if (error.name or "").split(".")[0] != package:
            raise
        brings = f"'logit-extraction[{extra}]'" if extra else package
        raise LogitsError(f"{package} is needed for this: pip install {brings}") from error


class LocalStore:
    """The files of an output in a folder; nothing outside the folder is ever read."""

    def __init__(self, root: Path) -> None:
        self.name = str(root)
        self.root = root.resolve()
        # The Hub's local cache keeps snapshots as links to ../../blobs.
        blobs = self.root.parent.parent / "blobs"
        self._allowed = [self.root, *([blobs] if self.root.parent.name == "snapshots" else [])]

    def list_files(self) -> dict[str, int]:
        """Return the size in bytes of every Parquet file, by path relative to the folder."""
        return {
            path.relative_to(self.root).as_posix(): path.stat().st_size
            for path in sorted(self.root.rglob("*.parquet"))
            if path.is_file() and self._inside(path)
        }

    def open(self, path: str) -> Any:
        """Open a file to read by ranges."""
        full = self.root / path
        if not self._inside(full):
            raise OpenError(f"{path} leads outside {self.name} and is not read")
        return pa.OSFile(str(full))

    def _inside(self, path: Path) -> bool:
        return any(path.resolve().is_relative_to(folder) for folder in self._allowed)


class FileStore:
    """Parquet files named one by one."""

    def __init__(self, files: Sequence[str | Path]) -> None:
        self.name = str(files[0]) if len(files) == 1 else f"{len(files)} files"
        self._files = [str(Path(file).expanduser()) for file in files]

    def list_files(self) -> dict[str, int]:
        """Return the size in bytes of every file that was named."""
        for file in self._files:
            if not Path(file).is_file():
                raise OpenError(f"no such file: {file}")
        return {file: Path(file).stat().st_size for file in self._files}

    def open(self, path: str) -> Any:
        """Open a file to read by ranges."""
        return pa.OSFile(path)


class HubStore:
    """The files of a dataset repository on the Hub, read by byte ranges at one commit."""

    def __init__(self, repo: str, *, revision: str | None = None) -> None:
        hub = import_extra("huggingface_hub")
        self.name = repo
        self._fs = hub.HfFileSystem()
        try:
            commit = hub.HfApi().dataset_info(repo, revision=revision).sha
        except hub.errors.RepositoryNotFoundError as error:
            raise OpenError(
                f"no dataset {repo!r} on the Hub and no such folder; a private one needs a token"
            ) from error
        except (hub.errors.HfHubHTTPError, OSError) as error:
            raise OpenError(f"the Hub did not answer for {repo!r}: {error}") from error
        self._root = f"datasets/{repo}@{commit}"

    def list_files(self) -> dict[str, int]:
        """Return the size in bytes of every file, by path in the repository."""
        found = self._fs.find(self._root, detail=True)
        return {path[len(self._root) + 1 :]: int(entry["size"]) for path, entry in found.items()}

    def open(self, path: str) -> Any:
        """Open a file to read by ranges; nothing is fetched ahead or kept."""
        return self._fs.open(f"{self._root}/{path}", "rb", cache_type="none")

    def download(self, files: Sequence[str]) -> LocalStore:
        """Fetch files and the run's settings into the Hub's local cache."""
        hub = import_extra("huggingface_hub")
        wanted = [*files, CONFIG_FILE, TEMPLATE_FILE]
        commit = self._root.rpartition("@")[2]
        folder = hub.snapshot_download(
            self.name, repo_type="dataset", revision=commit, allow_patterns=wanted
        )
        return LocalStore(Path(folder))


Store = LocalStore | FileStore | HubStore


class LogitDataset:
    """The rows of an output, in shard order; each is read from its own row group alone.

    Iterating and `[i]` give rows as stored (a dictionary by column); `get_sample` decodes. A
    shard's footer is read when a row in or behind it is asked for, and kept; of the data, only the
    last row group.
    """

    def __init__(self, store: Store, shards: Sequence[str]) -> None:
        self.name = store.name
        self.store = store
        self.shards = list(shards)
        self._files: list[Any] = []
        self._starts = [0]  # first row of every opened shard, then the end of the last
        self._kept: tuple[tuple[int, int], pa.Table] | None = None

    def __len__(self) -> int:
        self.file(len(self.shards) - 1)
        return self._starts[-1]

    def __repr__(self) -> str:
        return f"LogitDataset({self.name!r}, {len(self.shards)} shards)"

    def __getitem__(self, i: int) -> dict[str, Any]:
        return dict(self.read_row(i).to_pylist()[0])

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for table in self.iter_tables():
            yield from table.to_pylist()

    @property
    def settings(self) -> dict[str, Any]:
        """Settings of the run, from the first shard's metadata; empty when it holds none."""
        return table_settings(self.file(0).schema_arrow.metadata, self.shards[0])

    @property
    def column_names(self) -> list[str]:
        """Columns of the first shard."""
        return list(self.file(0).schema_arrow.names)

    def file(self, shard: int) -> Any:
        """Return the opened `pyarrow.parquet.ParquetFile` of a shard."""
        while len(self._files) <= shard:
            opened = open_parquet(self.store, self.shards[len(self._files)])
            self._files.append(opened)
            self._starts.append(self._starts[-1] + opened.metadata.num_rows)
        return self._files[shard]

    def locate_row(self, i: int) -> tuple[int, int]:
        """Return the shard that holds row `i` (negative: from the end) and its row there."""
        number = i if i >= 0 else i + len(self)
        for shard in range(len(self.shards)):
            self.file(shard)
            if 0 <= number < self._starts[shard + 1]:
                return shard, number - self._starts[shard]
        raise RowError(f"{self.name} has {len(self)} rows, there is no row {i}")

    def read_row(self, i: int) -> pa.Table:
        """Return row `i` as a table of one row, reading one row group and no more."""
        shard, offset = self.locate_row(i)
        metadata = self.file(shard).metadata
        for group in range(metadata.num_row_groups):
            size = metadata.row_group(group).num_rows
            if offset < size:
                return self._read_group(shard, group).slice(offset, 1)
            offset -= size
        raise FormatError(f"{self.shards[shard]}: its footer counts more rows than it has")

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
        file = self.file(shard)
        known = [name for name in columns if name in file.schema_arrow.names]
        for group in range(file.metadata.num_row_groups):
            check_group_size(file.metadata.row_group(group), self.shards[shard])
        with parquet_errors(self.shards[shard]):
            for batch in file.iter_batches(rows, columns=known):
                table = pa.Table.from_batches([batch])
                yield table.replace_schema_metadata(file.schema_arrow.metadata)

    def _read_group(self, shard: int, group: int) -> pa.Table:
        if self._kept is None or self._kept[0] != (shard, group):
            file = self.file(shard)
            check_group_size(file.metadata.row_group(group), self.shards[shard])
            known = [name for name in READ_COLUMNS if name in file.schema_arrow.names]
            with parquet_errors(self.shards[shard]):
                self._kept = (shard, group), file.read_row_group(group, columns=known)
        return self._kept[1]


@contextlib.contextmanager
def parquet_errors(name: str) -> Iterator[None]:
    """Turn what pyarrow raises on a damaged file into a `FormatError` that names the file."""
    try:
        yield
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise FormatError(f"{name} cannot be read as Parquet: {error}") from error


def open_parquet(store: Store, path: str) -> Any:
    """Open a shard of a store; only its footer is read."""
    with parquet_errors(path):
        return pq.ParquetFile(
            store.open(path), pre_buffer=isinstance(store, HubStore), thrift_string_size_limit=2**26
        )


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


def table_settings(metadata: Mapping[bytes, bytes] | None, name: str) -> dict[str, Any]:
    """Return the run's settings from Parquet key-value metadata; empty when there are none."""
    return parse_settings((metadata or {}).get(METADATA_SETTINGS, b"{}"), name)


def parse_settings(text: bytes, name: str) -> dict[str, Any]:
    """Parse the settings of a run, a JSON object."""
    try:
        settings = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{name}: the settings are not JSON: {error}") from error
    if not isinstance(settings, dict):
        raise FormatError(f"{name}: the settings are no JSON object")
    return settings


def open_store(name: str | Path) -> Store:
    """Find where an output is: a folder, a Parquet file, or a dataset repository on the Hub."""
    text = str(name)
    path = Path(text).expanduser()
    if path.is_dir():
        return LocalStore(path)
    if path.is_file():
        return FileStore([path])
    for prefix in _HUB_PREFIXES:
        text = text.removeprefix(prefix)
    repo, _, revision = text.partition("@")
    if text.startswith((".", "/", "~")) or not _HUB_ID.fullmatch(repo):
        raise OpenError(f"no such folder or file: {name}")
    return HubStore(repo, revision=revision or None)


def find_shards(files: Iterable[str], name: str, split: str) -> list[str]:
    """Choose the Parquet files of a split, in order of shard number.

    Files under `data/` win over others; a file whose path names no split belongs to `train`.
    """
    parquet = [path for path in files if path.endswith(".parquet")]
    parquet = [path for path in parquet if path.startswith("data/")] or parquet
    if not parquet:
        raise OpenError(f"{name} holds no Parquet files")
    splits: dict[str, list[str]] = {}
    for path in parquet:
        found = _SPLIT_NAME.search(path)
        splits.setdefault(found[1] if found else "train", []).append(path)
    if split not in splits:
        raise OpenError(f"{name} has no split {split!r}; it has {', '.join(sorted(splits))}")
    return sorted(splits[split], key=natural_key)


def natural_key(path: str) -> list[tuple[int, int | str]]:
    """Sort key that reads runs of digits as numbers."""
    return [
        (0, int(part)) if part.isdigit() else (1, part)
        for part in re.split(r"([0-9]+)", path)
        if part
    ]


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
        OpenError: no such output, no Parquet files in it, or no such split.
    """
    if not isinstance(name, (str, Path)):
        if not name:
            raise OpenError("the list of files is empty")
        store: Store = FileStore(name)
        return LogitDataset(store, list(store.list_files()))
    store = open_store(name)
    if isinstance(store, FileStore):
        return LogitDataset(store, list(store.list_files()))
    shards = find_shards(store.list_files(), store.name, split)
    if isinstance(store, HubStore) and not streaming:
        store = store.download(shards)
    return LogitDataset(store, shards)


def read_text(store: Store, path: str) -> str | None:
    """Return a small text file of an output; None when the output has no such file."""
    try:
        with store.open(path) as file:
            data = file.read(MAX_TEXT_BYTES + 1)
    except (FileNotFoundError, NotADirectoryError):
        return None
    if len(data) > MAX_TEXT_BYTES:
        raise OpenError(f"{store.name}: {path} is larger than {MAX_TEXT_BYTES >> 20} MiB")
    return bytes(data).decode("utf-8", "replace")


def load_extraction_config(name: str | Path | LogitDataset) -> dict[str, Any]:
    """Return the settings of the run that wrote an output.

    They are read from `extraction_config.json`, else from the metadata of the first shard.

    Raises:
        OpenError: there is no such output, or it says nothing about its run.
    """
    dataset = name if isinstance(name, LogitDataset) else load_logit_dataset(name)
    text = read_text(dataset.store, CONFIG_FILE)
    settings = dataset.settings if text is None else parse_settings(text.encode(), CONFIG_FILE)
    if not settings:
        raise OpenError(f"{dataset.name} has no {CONFIG_FILE} and no settings in its shards")
    return settings


def as_dataset(dataset: Any) -> Any:
    """Open what is a name, or a list of files; return anything else as it is."""
    files = isinstance(dataset, (list, tuple)) and isinstance(dataset[:1], (list, tuple))
    if isinstance(dataset, (str, Path)):
        return load_logit_dataset(dataset)
    if files and dataset and all(isinstance(file, (str, Path)) for file in dataset):
        return load_logit_dataset(dataset)
    return dataset


def get_sample(dataset: Any, i: int = 0) -> dict[str, Any]:
    """Decode row `i`, without reading the rows before it and without changing `dataset`.

    Args:
        dataset: what `load_logit_dataset` returns, or a name it takes; a `datasets.Dataset`, a
            `pyarrow.Table`, a list of rows. A `datasets.IterableDataset` works too, but has to
            be read from its start.
        i: row number; negative counts from the end where the end is known.

    Returns:
        `index`, `num_tokens` (N); by token: `top_indices`, `top_logits_quantized`,
        `sampled_indices`, `sampled_logits_quantized` (lists of N arrays), `top_counts`,
        `top_min`, `top_max`, `sampled_min`, `sampled_max`, `logsumexp` (N,); and `input_ids` (S,)
        and `token_positions` (N,) where the output stores them. Decode the logits with
        `dequantize_top_logits` and its siblings.

    Raises:
        RowError: there is no such row.
        FormatError: the row does not hold what the format says.
    """
    return block_samples(decode_rows(read_row(as_dataset(dataset), i), first_row=i))[0]


def iter_samples(dataset: Any, *, limit: int | None = None) -> Iterator[dict[str, Any]]:
    """Decode the rows of a dataset in order, at most `limit` of them; see `get_sample`."""
    for block in iter_blocks(dataset, limit=limit):
        yield from block_samples(block)


def read_row(dataset: Any, i: int) -> pa.Table:
    """Return row `i` of any kind of dataset as a table of one row."""
    if isinstance(dataset, LogitDataset):
        return dataset.read_row(i)
    if isinstance(dataset, Mapping) and i == 0:
        return rows_table([dataset])
    if hasattr(dataset, "skip") and not hasattr(dataset, "__len__"):
        return read_stream(dataset, i)
    size = len(dataset)
    if not -size <= i < size:
        raise RowError(f"the dataset has {size} rows, there is no row {i}")
    if isinstance(dataset, pa.Table):
        return dataset.slice(i % size, 1)
    if hasattr(dataset, "with_format"):
        return dataset.with_format("arrow")[i % size : i % size + 1]
    return rows_table([dataset[i]])


def read_stream(dataset: Any, i: int) -> pa.Table:
    """Return row `i` of a `datasets.IterableDataset`, which is read from its start."""
    found = list(iter_tables(dataset.skip(i).take(1))) if i >= 0 else []
    if not found or not found[0].num_rows:
        raise RowError(f"the stream has no row {i}; a stream cannot be read from its end")
    return found[0]


def iter_tables(
    dataset: Any, columns: Sequence[str] = READ_COLUMNS, *, limit: int | None = None
) -> Iterator[pa.Table]:
    """Yield the rows of any kind of dataset in order as small tables of `columns`."""
    left = limit
    for table in _all_tables(as_dataset(dataset), columns):
        if left is not None and table.num_rows >= left:
            yield table.slice(0, left)
            return
        left = None if left is None else left - table.num_rows
        yield table


def _all_tables(dataset: Any, columns: Sequence[str], *, rows: int = 64) -> Iterator[pa.Table]:
    if isinstance(dataset, LogitDataset):
        yield from dataset.iter_tables(columns, rows=rows)
    elif isinstance(dataset, pa.Table):
        known = [name for name in columns if name in dataset.column_names]
        for batch in dataset.select(known).to_batches(max_chunksize=rows):
            yield pa.Table.from_batches([batch])
    elif hasattr(dataset, "with_format"):
        names = dataset.column_names
        known = [name for name in columns if names is None or name in names]
        narrow = dataset if names is None else dataset.select_columns(known)
        yield from narrow.with_format("arrow").iter(batch_size=rows)
    else:
        source = iter([dataset] if isinstance(dataset, Mapping) else dataset)
        while chunk := list(itertools.islice(source, rows)):
            yield rows_table(chunk)


def rows_table(rows: Sequence[Mapping[str, Any]]) -> pa.Table:
    """Turn rows as dictionaries by column into a table with the format's types."""
    fields = [field for field in (*SCHEMA, *TOKEN_FIELDS) if field.name in rows[0]]
    try:
        return pa.Table.from_pylist([dict(row) for row in rows], schema=pa.schema(fields))
    except (pa.ArrowException, TypeError, ValueError, OverflowError) as error:
        raise FormatError(f"the rows are not in the shard format: {error}") from error


# --------------------------------------------------------------------------------------------------
# 4 Decode
# --------------------------------------------------------------------------------------------------

LogitPair = tuple[npt.NDArray[np.int32], npt.NDArray[np.float64]]


@dataclass(frozen=True, eq=False)
class TokenBlock:
    """Some whole rows, decoded at once: R rows of T tokens in all, everything flattened.

    Row r owns tokens `row_starts[r]:row_starts[r + 1]`; token t owns the nucleus entries
    `top_starts[t]:top_starts[t + 1]` and the tail entries `tail_starts[t]:tail_starts[t + 1]`.
    """

    index: npt.NDArray[np.int64]  # (R,)
    row_starts: npt.NDArray[np.int64]  # (R + 1,)
    top_starts: npt.NDArray[np.int64]  # (T + 1,)
    top_ids: npt.NDArray[np.int32]  # (sum of nucleus sizes,)
    top_q: npt.NDArray[np.uint16]  # the same
    top_min: npt.NDArray[np.float32]  # (T,)
    top_max: npt.NDArray[np.float32]  # (T,)
    tail_starts: npt.NDArray[np.int64]  # (T + 1,)
    tail_ids: npt.NDArray[np.int32]  # (T * M,) where M is the same for all
    tail_q: npt.NDArray[np.uint16]  # the same
    tail_min: npt.NDArray[np.float32]  # (T,), zeros where M is 0
    tail_max: npt.NDArray[np.float32]  # (T,)
    logsumexp: npt.NDArray[np.float64]  # (T,)
    tokens: tuple[list[npt.NDArray[np.int32]], list[npt.NDArray[np.int32]]] | None = None

    @property
    def num_tokens(self) -> npt.NDArray[np.int64]:
        """Tokens of each row, (R,)."""
        return np.diff(self.row_starts)

    @property
    def top_counts(self) -> npt.NDArray[np.int64]:
        """Nucleus size of each token, (T,)."""
        return np.diff(self.top_starts)

    @property
    def tail_counts(self) -> npt.NDArray[np.int64]:
        """Tail entries of each token, (T,)."""
        return np.diff(self.tail_starts)

    def top_logits(self) -> npt.NDArray[np.float64]:
        """Dequantize every nucleus entry."""
        counts = self.top_counts
        return dequantize_logits(
            self.top_q, np.repeat(self.top_min, counts), np.repeat(self.top_max, counts)
        )

    def top_probs(self) -> npt.NDArray[np.float64]:
        """Return the probability of every nucleus entry."""
        return logits_to_probs(self.top_logits(), np.repeat(self.logsumexp, self.top_counts))

    def tail_probs(self) -> npt.NDArray[np.float64]:
        """Return the probability of every tail entry."""
        return logits_to_probs(self.tail_logits(), np.repeat(self.logsumexp, self.tail_counts))

    def tail_logits(self) -> npt.NDArray[np.float64]:
        """Dequantize every tail entry."""
        counts = self.tail_counts
        return dequantize_logits(
            self.tail_q, np.repeat(self.tail_min, counts), np.repeat(self.tail_max, counts)
        )


class Ragged(NamedTuple):
    """A list column, flattened: row r holds `values[starts[r]:starts[r + 1]]`."""

    values: Any  # (n,)
    starts: npt.NDArray[np.int64]  # (R + 1,)

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """Values in each row, (R,)."""
        return np.diff(self.starts)


class Fault(NamedTuple):
    """Something in a table that the format does not allow."""

    row: int  # in the table
    token: int | None
    rule: str
    message: str


def to_starts(lengths: npt.ArrayLike) -> npt.NDArray[np.int64]:
    """Return where each of the consecutive runs begins, and where the last ends."""
    return np.concatenate(([0], np.cumsum(np.asarray(lengths, np.int64)))).astype(np.int64)


def read_column(table: pa.Table, field: pa.Field) -> Any:
    """Return a column of the format as numpy: an array, or `Ragged` for lists and bytes.

    Raises:
        FormatError: the column is missing, of another type, or holds values out of its range.
    """
    if field.name not in table.column_names:
        needed = ", ".join(name for name in SCHEMA.names if name not in OPTIONAL_COLUMNS)
        raise FormatError(f"no column {field.name!r}; a row of logits needs {needed}")
    column = table.column(field.name)
    array = pa.concat_arrays(column.chunks) if column.num_chunks != 1 else column.chunk(0)
    if pa.types.is_binary(field.type):
        return read_bytes(array, field.name)
    if not pa.types.is_list(field.type):
        return to_numpy(array, field)
    kinds = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
    if not any(kind(array.type) for kind in kinds):
        raise FormatError(f"column {field.name!r} is {array.type}, not {field.type}")
    lengths = pc.fill_null(pc.list_value_length(array), 0).to_numpy(zero_copy_only=False)
    return Ragged(to_numpy(pc.list_flatten(array), field), to_starts(lengths))


def read_bytes(array: pa.Array, name: str) -> Ragged:
    """Return a binary column as bytes of all rows, flattened."""
    if not (pa.types.is_binary(array.type) or pa.types.is_large_binary(array.type)):
        raise FormatError(f"column {name!r} is {array.type}, not binary")
    lengths = pc.fill_null(pc.binary_length(array), 0).to_numpy(zero_copy_only=False)
    joined = b"".join(value or b"" for value in array.to_pylist())
    return Ragged(np.frombuffer(joined, np.uint8), to_starts(lengths))


def to_numpy(array: pa.Array, field: pa.Field) -> npt.NDArray[Any]:
    """Convert numbers to the format's type, nulls to 0; a value that does not fit is refused."""
    wanted = getattr(field.type, "value_type", field.type)
    try:
        if array.null_count:
            array = pc.fill_null(array, 0)
        if array.type != wanted:
            array = array.cast(wanted, safe=not pa.types.is_floating(wanted))
    except pa.ArrowException as error:
        raise FormatError(f"column {field.name!r} is not {field.type}: {error}") from error
    return array.to_numpy(zero_copy_only=False)


def read_columns(table: pa.Table) -> dict[str, Any]:
    """Return the format's columns as numpy; optional ones that are missing are filled in."""
    rows = table.num_rows
    columns = {}
    for field in (*SCHEMA, *TOKEN_FIELDS):
        if field.name in table.column_names or field.name not in OPTIONAL_COLUMNS:
            columns[field.name] = read_column(table, field)
        elif field.name in TAIL_COLUMNS:
            columns[field.name] = Ragged(np.zeros(0, np.uint8), np.zeros(rows + 1, np.int64))
    columns.setdefault("num_tokens", columns["top_counts"].lengths)
    return columns


def null_faults(table: pa.Table) -> list[Fault]:
    """Find rows that hold a null, alone or inside a list."""
    faults = []
    for name in table.column_names:
        column = table.column(name)
        missing = column.is_null().to_numpy()
        if pa.types.is_nested(column.type):
            inner = column.combine_chunks()
            nulls = pc.list_flatten(inner).is_null().to_numpy(zero_copy_only=False)
            parents = pc.list_parent_indices(inner).to_numpy(zero_copy_only=False)
            missing[parents[nulls]] = True
        message = f"{name} holds a null"
        faults += [Fault(int(row), None, "null", message) for row in np.flatnonzero(missing)]
    return faults


def shape_faults(columns: Mapping[str, Any]) -> list[Fault]:
    """Find rows whose lists do not have the lengths that their counts ask for."""
    n = columns["num_tokens"].astype(np.int64)
    counts = columns["top_counts"]
    entries = to_starts(counts.values)[counts.starts]
    tail = columns["sampled_indices_low"].lengths
    wanted = dict.fromkeys(("top_counts", "top_min", "top_max", "logsumexp"), n)
    for name in ("top_indices_low", "top_logits_quantized"):
        wanted[name] = np.diff(entries)
    wanted["top_indices_high"] = -(-columns["top_indices_low"].lengths // 4)
    wanted["sampled_logits_quantized"] = tail
    wanted["sampled_indices_high"] = -(-tail // 4)
    for name in ("sampled_min", "sampled_max"):
        wanted[name] = np.where((tail == 0) & (columns[name].lengths == 0), 0, n)
    if "token_positions" in columns:
        wanted["token_positions"] = n
    faults = [
        Fault(int(row), None, "length", f"{name} holds {lengths[row]} values, not {asked[row]}")
        for name, asked in wanted.items()
        for lengths in [columns[name].lengths]
        for row in np.flatnonzero(lengths != asked)
    ]
    uneven = np.flatnonzero(tail % np.maximum(n, 1) != 0)
    message = "{} tail entries do not divide evenly among {} tokens"
    return faults + [
        Fault(int(row), None, "length", message.format(tail[row], n[row])) for row in uneven
    ]


def unpack_rows(low: Ragged, high: Ragged) -> npt.NDArray[np.int32]:
    """Join the packed ids of many rows at once; each row's high bits start on a byte."""
    slot = np.arange(low.values.size) - np.repeat(low.starts[:-1], low.lengths)
    byte = np.repeat(high.starts[:-1], low.lengths) + (slot >> 2)
    bits = high.values[byte] >> ((slot & 3) << 1).astype(np.uint8) & 3
    return low.values.astype(np.int32) | bits.astype(np.int32) << 16


def decode_rows(table: pa.Table, *, first_row: int = 0) -> TokenBlock:
    """Decode all rows of a table at once, without a loop over tokens.

    Args:
        table: rows in the shard format; columns of another width are converted when nothing is
            lost, optional ones may be missing.
        first_row: number of the table's first row, for messages.

    Raises:
        FormatError: names the row and what is wrong with it.
    """
    columns = read_columns(table)
    for fault in (null_faults(table) or shape_faults(columns))[:1]:
        raise FormatError(f"row {first_row + fault.row}: {fault.message}")
    return build_block(columns, first_row)


def build_block(columns: Mapping[str, Any], first_row: int) -> TokenBlock:
    """Assemble a block from columns whose lengths agree."""
    counts = columns["top_counts"]
    per_row = counts.lengths
    tail_low = columns["sampled_indices_low"]
    tail_sizes = np.repeat(tail_low.lengths // np.maximum(per_row, 1), per_row)
    tail_range = {}
    for name in ("sampled_min", "sampled_max"):
        tail_range[name] = np.zeros(counts.values.size, np.float32)
        tail_range[name][np.repeat(columns[name].lengths > 0, per_row)] = columns[name].values
    numbers = np.arange(first_row, first_row + per_row.size)
    tokens = None
    if all(name in columns for name in TOKEN_COLUMNS):
        ids, positions = (columns[name] for name in TOKEN_COLUMNS)
        tokens = cut(ids.values, ids.starts), cut(positions.values, positions.starts)
    return TokenBlock(
        index=columns.get("index", numbers).astype(np.int64),
        row_starts=counts.starts,
        top_starts=to_starts(counts.values),
        top_ids=unpack_rows(columns["top_indices_low"], columns["top_indices_high"]),
        top_q=columns["top_logits_quantized"].values,
        top_min=columns["top_min"].values,
        top_max=columns["top_max"].values,
        tail_starts=to_starts(tail_sizes),
        tail_ids=unpack_rows(tail_low, columns["sampled_indices_high"]),
        tail_q=columns["sampled_logits_quantized"].values,
        tail_min=tail_range["sampled_min"],
        tail_max=tail_range["sampled_max"],
        logsumexp=columns["logsumexp"].values,
        tokens=tokens,
    )


def iter_blocks(dataset: Any, *, limit: int | None = None) -> Iterator[TokenBlock]:
    """Decode any kind of dataset, some dozens of rows at a time."""
    done = 0
    for table in iter_tables(dataset, limit=limit):
        yield decode_rows(table, first_row=done)
        done += table.num_rows


def block_samples(block: TokenBlock) -> list[dict[str, Any]]:
    """Cut a block into samples, one a row; the arrays are views."""
    return [block_sample(block, row) for row in range(block.index.size)]


def block_sample(block: TokenBlock, row: int) -> dict[str, Any]:
    """Return row `row` of a block as a sample."""
    first, last = block.row_starts[row], block.row_starts[row + 1]
    top, tail = block.top_starts[first : last + 1], block.tail_starts[first : last + 1]
    sample = {
        "index": int(block.index[row]),
        "num_tokens": int(last - first),
        "top_indices": cut(block.top_ids, top),
        "top_counts": np.diff(top).astype(np.int32),
        "top_logits_quantized": cut(block.top_q, top),
        "top_min": block.top_min[first:last],
        "top_max": block.top_max[first:last],
        "sampled_indices": cut(block.tail_ids, tail),
        "sampled_logits_quantized": cut(block.tail_q, tail),
        "sampled_min": block.tail_min[first:last],
        "sampled_max": block.tail_max[first:last],
        "logsumexp": block.logsumexp[first:last],
    }
    if block.tokens is not None:
        sample |= {name: block.tokens[i][row] for i, name in enumerate(TOKEN_COLUMNS)}
    return sample


def sample_block(sample: Mapping[str, Any]) -> TokenBlock:
    """Return a sample as a block of one row: the inverse of `block_sample`, less its tokens."""
    flat: dict[str, Any] = {
        name: np.concatenate(sample[name]) if sample[name] else np.zeros(0, kind)
        for name, kind in (
            ("top_indices", np.int32),
            ("top_logits_quantized", np.uint16),
            ("sampled_indices", np.int32),
            ("sampled_logits_quantized", np.uint16),
        )
    }
    return TokenBlock(
        index=np.array([sample["index"]]),
        row_starts=np.array([0, sample["num_tokens"]]),
        top_starts=to_starts([ids.size for ids in sample["top_indices"]]),
        top_ids=flat["top_indices"],
        top_q=flat["top_logits_quantized"],
        top_min=sample["top_min"],
        top_max=sample["top_max"],
        tail_starts=to_starts([ids.size for ids in sample["sampled_indices"]]),
        tail_ids=flat["sampled_indices"],
        tail_q=flat["sampled_logits_quantized"],
        tail_min=sample["sampled_min"],
        tail_max=sample["sampled_max"],
        logsumexp=sample["logsumexp"],
    )


def cut(values: npt.NDArray[Any], starts: npt.NDArray[np.int64]) -> list[npt.NDArray[Any]]:
    """Cut a flat array into the runs that begin at `starts`."""
    return [values[a:b] for a, b in itertools.pairwise(starts.tolist())]


def dequantize_top_logits(sample: Mapping[str, Any], t: int | None = None) -> LogitPair:
    """Return the nucleus of token `t`: ids and logits, by descending logit.

    With `t` None, those of all tokens, flattened; token t owns `top_counts[t]` of them.

    Raises:
        RowError: the sample has no token `t`.
    """
    return _dequantize(sample, "top", t)


def dequantize_sampled_logits(sample: Mapping[str, Any], t: int | None = None) -> LogitPair:
    """Return the tail sample of token `t`: ids and logits, in the order drawn.

    With `t` None, those of all tokens, flattened, the same number for each.
    """
    return _dequantize(sample, "sampled", t)


def dequantize_all_logits(sample: Mapping[str, Any], t: int) -> LogitPair:
    """Return everything stored of token `t`: ids and logits, the nucleus first, then the tail."""
    ids, logits = dequantize_top_logits(sample, t)
    tail_ids, tail_logits = dequantize_sampled_logits(sample, t)
    return np.concatenate([ids, tail_ids]), np.concatenate([logits, tail_logits])


def _dequantize(sample: Mapping[str, Any], part: str, t: int | None) -> LogitPair:
    if t is None:
        block = sample_block(sample)
        if part == "top":
            return block.top_ids, block.top_logits()
        return block.tail_ids, block.tail_logits()
    check_token(sample, t)
    q, vmin, vmax = (sample[f"{part}_{name}"][t] for name in ("logits_quantized", "min", "max"))
    return sample[f"{part}_indices"][t], dequantize_logits(q, vmin, vmax)


def check_token(sample: Mapping[str, Any], t: int) -> None:
    """Refuse a token number that the sample does not have."""
    n = sample["num_tokens"]
    if not -n <= t < n:
        raise RowError(f"row with index {sample['index']} has {n} tokens, there is no token {t}")


# --------------------------------------------------------------------------------------------------
# 5 Probabilities
# --------------------------------------------------------------------------------------------------


class Prediction(NamedTuple):
    """A token that the teacher might have said."""

    id: int
    text: str
    logit: float
    probability: float


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
    if t is None:
        block = sample_block(sample)
        return sum_runs(block.top_probs(), block.top_starts)
    _, logits = dequantize_top_logits(sample, t)
    return float(logits_to_probs(logits, sample["logsumexp"][t]).sum())


def sum_runs(
    values: npt.NDArray[np.float64], starts: npt.NDArray[np.int64]
) -> npt.NDArray[np.float64]:
    """Sum each run of a flat array, empty ones to 0."""
    filled = starts[:-1] < starts[1:]
    sums = np.zeros(starts.size - 1)
    if filled.any():
        sums[filled] = np.add.reduceat(values, starts[:-1][filled])
    return sums


def token_texts(ids: npt.ArrayLike, tokenizer: Any = None) -> list[str]:
    """Return what each token writes; without a tokenizer, and for ids it does not know, `#id`.

    Bytes that are no whole character show as `⟨F0 9F⟩`, a leading space is kept.
    """
    unique, inverse = np.unique(np.asarray(ids, np.int64), return_inverse=True)
    texts = [token_text(token, tokenizer) for token in unique.tolist()]
    return [texts[i] for i in inverse.reshape(-1).tolist()]


def token_text(token: int, tokenizer: Any) -> str:
    """Return what one token writes; see `token_texts`."""
    if tokenizer is None or token >= len(tokenizer):
        return f"#{token}"
    text = str(tokenizer.decode([token]))
    piece = tokenizer.convert_ids_to_tokens(token)
    if piece is None:
        return f"#{token}"
    if "\ufffd" in text:
        return show_bytes(piece_bytes(str(piece)), text)
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


def show_bytes(data: bytes | None, text: str) -> str:
    """Decode UTF-8 with what is no whole character as `⟨F0 9F⟩`; `text` when there are no bytes."""
    if data is None:
        return text
    shown = data.decode("utf-8", "surrogateescape")
    return re.sub(
        r"[\udc80-\udcff]+",
        lambda run: "⟨" + " ".join(f"{ord(c) - 0xDC00:02X}" for c in run[0]) + "⟩",
        shown,
    )


def decode_top_tokens(
    sample: Mapping[str, Any], t: int, tokenizer: Any = None, *, k: int = 10
) -> list[Prediction]:
    """Return the teacher's `k` likeliest tokens at token `t`, likeliest first.

    Without a tokenizer the text is `#id`.
    """
    ids, logits = dequantize_top_logits(sample, t)
    probs = logits_to_probs(logits[:k], sample["logsumexp"][t])
    texts = token_texts(ids[:k], tokenizer)
    rows = zip(ids[:k].tolist(), texts, logits[:k].tolist(), probs.tolist(), strict=True)
    return [Prediction(*row) for row in rows]


# --------------------------------------------------------------------------------------------------
# 6 Statistics
# --------------------------------------------------------------------------------------------------

# --------------------------------------------------------------------------------------------------
# 7 Align with text
# --------------------------------------------------------------------------------------------------


class AlignmentError(LogitsError):
    """A row and a conversation do not belong together; met when text is put beside logits."""


class TokenScores(NamedTuple):
    """What a block says of one given token at each position, (T,) each."""

    log_probability: npt.NDArray[np.float64]  # of the token, or the most that it can be
    exact: npt.NDArray[np.bool_]  # False: `log_probability` is an upper bound
    rank: npt.NDArray[np.int64]  # from 1; outside the nucleus the least that it can be
    in_nucleus: npt.NDArray[np.bool_]
    in_tail: npt.NDArray[np.bool_]


def find_entries(
    wanted: npt.NDArray[Any], ids: npt.NDArray[Any], starts: npt.NDArray[np.int64]
) -> npt.NDArray[np.int64]:
    """Return where in the flat `ids` each token's wanted id is, (T,); -1 where it is not stored."""
    owner = np.repeat(np.arange(wanted.size), np.diff(starts))
    hits = np.flatnonzero(ids == wanted[owner])
    found = np.full(wanted.size, -1, np.int64)
    found[owner[hits]] = hits
    return found


def score_tokens(
    block: TokenBlock, actual: npt.NDArray[Any], *, logit_bits: int = 16
) -> TokenScores:
    """Find the probability and rank of the token that is really there, at each position.

    Exact for stored tokens. One that is not stored has at most the smallest nucleus logit, and at
    most the probability that nucleus and tail sample leave over: the smaller of the two is given.
    Stored tail tokens above it raise the least rank of a tail token.

    Args:
        block: T tokens.
        actual: (T,) ids.
        logit_bits: resolution kept; what quantization may have hidden is added to the bound.
    """
    top = find_entries(actual, block.top_ids, block.top_starts)
    tail = find_entries(actual, block.tail_ids, block.tail_starts)
    in_nucleus, in_tail = top >= 0, (tail >= 0) & (top < 0)
    log_prob = unstored_bound(block, logit_bits)
    tail_logits = block.tail_logits()
    log_prob[in_tail] = tail_logits[tail[in_tail]] - block.logsumexp[in_tail]
    log_prob[in_nucleus] = block.top_logits()[top[in_nucleus]] - block.logsumexp[in_nucleus]
    rank = block.top_counts + 1
    rank[in_nucleus] = (top - block.top_starts[:-1])[in_nucleus] + 1
    owner = np.repeat(np.arange(actual.size), block.tail_counts)
    above = in_tail[owner] & (block.tail_q > block.tail_q[tail[owner]] if tail.size else False)
    rank += np.bincount(owner[above], minlength=actual.size)
    return TokenScores(log_prob, in_nucleus | in_tail, rank, in_nucleus, in_tail)


def unstored_bound(block: TokenBlock, logit_bits: int = 16) -> npt.NDArray[np.float64]:
    """Return the largest log-probability that a token stored nowhere can have, (T,)."""
    half_step = 0.5 / (2**logit_bits - 1)
    top_slack = np.exp(-half_step * (block.top_max.astype(np.float64) - block.top_min))
    tail_slack = np.exp(-half_step * (block.tail_max.astype(np.float64) - block.tail_min))
    stored = sum_runs(block.top_probs(), block.top_starts) * top_slack
    stored += sum_runs(block.tail_probs(), block.tail_starts) * tail_slack
    left = np.log(np.maximum(1 - stored, np.finfo(np.float64).tiny))
    return np.minimum(left, block.top_min - block.logsumexp)


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

    def to_pandas(self) -> Any:
        """Return one row per extracted token as a `pandas.DataFrame`."""
        pandas = import_extra("pandas")
        names = [f.name for f in fields(TokenAnalysis) if f.name not in ("predictions", "tail")]
        rows = [[getattr(token, name) for name in names] for token in self.tokens]
        return pandas.DataFrame(rows, columns=names)

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
    top_k: int = 5,
    logit_bits: int = 16,
    **options: Any,
) -> ConversationAnalysis:
    """Put a row beside its conversation, token by token.

    Args:
        sample: from `get_sample`.
        conversation: chat messages; None takes the tokens that the row itself stores.
        tokenizer: the teacher's.
        chat_template: Jinja source; the tokenizer's own when None.
        top_k: predictions kept for each token.
        logit_bits: see `score_tokens`.
        options: of `encode_conversation` (tools, include_think, include_end), as in the run.

    Raises:
        AlignmentError: conversation and row do not have the same number of extracted tokens.
        ConversationError: the conversation cannot be rendered.
    """
    if conversation is None:
        ids, positions = stored_tokens(sample)
    else:
        raise NotImplementedError
    check_alignment(sample, ids, positions)
    tokens = analyze_tokens(sample, ids[positions], tokenizer, top_k=top_k, logit_bits=logit_bits)
    owner: dict[int, int] = {int(position): t for t, position in enumerate(positions)}
    texts = token_texts(ids, tokenizer)
    pieces = [(text, owner.get(i)) for i, text in enumerate(texts)]
    return ConversationAnalysis(sample["index"], tokens, pieces)


def stored_tokens(
    sample: Mapping[str, Any],
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]:
    """Return the conversation's ids and the positions of the row's tokens among them."""
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
            f"row with index {sample['index']} holds {sample['num_tokens']} tokens, but its "
            f"conversation has {positions.size} to extract ({ids.size} in all): another "
            "conversation, tokenizer, chat template or --include-think/--include-end"
        )


def analyze_tokens(
    sample: Mapping[str, Any],
    actual: npt.NDArray[Any],
    tokenizer: Any,
    *,
    top_k: int = 5,
    logit_bits: int = 16,
) -> list[TokenAnalysis]:
    """Describe every token of a sample, given the ids (N,) that are really there."""
    block = sample_block(sample)
    scores = score_tokens(block, actual, logit_bits=logit_bits)
    mass = sum_runs(block.top_probs(), block.top_starts)
    texts = token_texts(actual, tokenizer)
    where = np.where(scores.in_nucleus, "nucleus", np.where(scores.in_tail, "tail", "not stored"))
    predictions, tails = decode_predictions(block, tokenizer, top_k=top_k)
    return [
        TokenAnalysis(
            t=t,
            id=int(actual[t]),
            text=texts[t],
            probability=float(np.exp(scores.log_probability[t])),
            log_probability=float(scores.log_probability[t]),
            exact=bool(scores.exact[t]),
            rank=int(scores.rank[t]),
            where=str(where[t]),
            nucleus_size=int(block.top_counts[t]),
            nucleus_mass=float(mass[t]),
            predictions=predictions[t],
            tail=tails[t],
        )
        for t in range(len(texts))
    ]


def decode_predictions(
    block: TokenBlock, tokenizer: Any, *, top_k: int
) -> tuple[list[list[Prediction]], list[list[Prediction]]]:
    """Return the `top_k` likeliest tokens and the tail sample of every token, with their text."""
    slot = np.arange(block.top_ids.size) - np.repeat(block.top_starts[:-1], block.top_counts)
    kept = slot < top_k
    lists = []
    for ids, logits, counts in (
        (block.top_ids[kept], block.top_logits()[kept], np.minimum(block.top_counts, top_k)),
        (block.tail_ids, block.tail_logits(), block.tail_counts),
    ):
        probs = logits_to_probs(logits, np.repeat(block.logsumexp, counts))
        texts = token_texts(ids, tokenizer)
        rows = zip(ids.tolist(), texts, logits.tolist(), probs.tolist(), strict=True)
        flat = [Prediction(*row) for row in rows]
        lists.append([flat[a:b] for a, b in itertools.pairwise(to_starts(counts).tolist())])
    return lists[0], lists[1]


# --------------------------------------------------------------------------------------------------
# 8 Tables and HTML
# --------------------------------------------------------------------------------------------------


SURPRISE_LEVELS = (0.9, 0.5, 0.2, 0.05, 0.01, 0.001)  # level i: at least this probable; then 6
_UNSEEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u00ad\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\ud800-\udfff]"
)


def show_text(text: str) -> str:
    """Make characters visible that would not show, or would act on a terminal or a page.

    Line breaks and tabs stay. Control characters become their pictures (␛), direction marks,
    zero-width characters and lone surrogates become `⟨U+202E⟩`. Joiners inside words stay as they
    are part of scripts and emoji.
    """

    def picture(found: re.Match[str]) -> str:
        code = ord(found[0])
        if code in (0x200C, 0x200D):
            return found[0]
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


def show_probability(token: TokenAnalysis) -> str:
    """Write a probability in percent, with `≤` where it is a bound."""
    return (
        f"{'' if token.exact else '≤'}{token.probability:.{1 if token.probability >= 0.01 else 2}%}"
    )


def colours_wanted() -> bool:
    """Say whether the terminal shows colours: a terminal, or FORCE_COLOR; never with NO_COLOR."""
    if os.environ.get("NO_COLOR") or importlib.util.find_spec("termcolor") is None:
        return False
    return bool(os.environ.get("FORCE_COLOR")) or sys.stdout.isatty()


def paint(text: str, colour: str, *attributes: str) -> str:
    """Colour text for the terminal, line by line, where colours are wanted."""
    if not colour or not colours_wanted():
        return text
    termcolor = import_extra("termcolor", "viz")
    return "\n".join(
        termcolor.colored(line, colour, attrs=list(attributes), force_color=True) if line else line
        for line in text.split("\n")
    )


def print_sample_info(sample: Mapping[str, Any]) -> None:
    """Print what a sample holds: tokens, nucleus sizes and the probability they cover."""
    block = sample_block(sample)
    print(f"conversation {sample['index']}: {sample['num_tokens']} tokens")
    if not sample["num_tokens"]:
        return
    counts, mass = block.top_counts, sum_runs(block.top_probs(), block.top_starts)
    tail, first = sum_runs(block.tail_probs(), block.tail_starts), first_probs(block)
    sizes = f"{counts.min()} to {counts.max()} tokens, median {np.median(counts):g}"
    print(f"  nucleus     {sizes}, mean {counts.mean():.1f}")
    print(f"  it covers   {mass.min():.1%} to {mass.max():.1%}, mean {mass.mean():.1%}")
    print(f"  likeliest   {first.min():.1%} to {first.max():.1%}, mean {first.mean():.1%}")
    print(f"  tail        {block.tail_counts.max()} tokens, worth {tail.mean():.2%} on average")
    if "input_ids" in sample:
        print(f"  text        {sample['input_ids'].size} tokens stored with it")


def first_probs(block: TokenBlock) -> npt.NDArray[np.float64]:
    """Return the probability of each token's likeliest entry, (T,)."""
    return np.exp(block.top_max.astype(np.float64) - block.logsumexp)


def print_top_tokens(
    sample: Mapping[str, Any], t: int, tokenizer: Any = None, *, k: int = 10
) -> None:
    """Print the teacher's `k` likeliest tokens at token `t`, with bars."""
    predictions = decode_top_tokens(sample, t, tokenizer, k=k)
    size, mass = sample["top_counts"][t], get_nucleus_probability_mass(sample, t)
    print(f"token {t}: nucleus of {size} covering {mass:.1%}")
    width = max(len(show_token(prediction.text)) for prediction in predictions)
    for rank, prediction in enumerate(predictions, 1):
        text = show_token(prediction.text).ljust(width)
        bar = draw_bar(prediction.probability)
        print(f"  {rank:3}  {text}  {prediction.probability:7.2%}  {paint(bar, 'cyan')}")


def draw_bar(share: float, width: int = 30) -> str:
    """Draw a share of 1 as a bar of block characters, in eighths."""
    eighths = round(min(max(share, 0), 1) * width * 8)
    return "█" * (eighths // 8) + ("▏▎▍▌▋▊▉"[eighths % 8 - 1] if eighths % 8 else "")


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
    if return_html:
        return render_page([analysis])
    heading = f"conversation {analysis.index}: {len(analysis.tokens)} tokens by the teacher"
    likely = math.exp(analysis.mean_log_probability)
    facts = f"typical probability of a token {likely:.1%}" if analysis.tokens else "not extracted"
    note = f"\n{show_text(analysis.note)}" if analysis.note else ""
    text = "".join(paint_piece(analysis, text, t) for text, t in analysis.pieces)
    return f"{heading}, {facts}{note}\n{paint_legend()}\n\n{text}"


def paint_piece(analysis: ConversationAnalysis, text: str, t: int | None) -> str:
    """Colour one piece for the terminal, or mark it where there are no colours."""
    shown = show_text(text)
    if t is None:
        return paint(shown, "dark_grey")
    token = analysis.tokens[t]
    level = surprise_level(token.probability)
    if not colours_wanted():
        mark = f"{{{show_probability(token)}}}" if level > 1 else ""
        body = shown.rstrip("\n")
        return f"{body}{mark}{shown[len(body) :]}"
    return paint(shown, *PAINT[level])


def paint_legend() -> str:
    """Say in one line what the colours, or the braces, mean."""
    if not colours_wanted():
        return "{3.1%}: probability of the token before it, where below 50%"
    words = [paint(f"{100 * b:g}%+", *PAINT[i]) for i, b in enumerate(SURPRISE_LEVELS) if i]
    least = paint(f"less than {100 * SURPRISE_LEVELS[-1]:g}%", *PAINT[-1])
    return "  ".join([*words, least, paint("not extracted", "dark_grey")])


PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<title>{title}</title>
<style>{css}</style>
</head>
<body>
<main>
{body}
</main>
<div id="pop" role="tooltip" hidden></div>
<script type="application/json" id="data">{data}</script>
<script>{script}</script>
</body>
</html>
"""

PAGE_CSS = """
:root {
  --bg: #ffffff; --fg: #1b1f24; --dim: #5f6a75; --line: #d5dbe1; --card: #f5f7f9;
  --bar: #0b62a8; --mark: #b3261e; --focus: #0b62a8;
  --b1: #fff3e2; --b2: #fee0b8; --b3: #fdc27e; --b4: #fb9a42; --b5: #d95f0e; --b6: #8c2d04;
  --t5: #ffffff; --t6: #ffffff;
}
@media (prefers-color-scheme: dark) {
  :root {
    --bg: #14171b; --fg: #e4e8ec; --dim: #98a3ae; --line: #363d45; --card: #1d2126;
    --bar: #5aa9e6; --mark: #ff9a8f; --focus: #8cc8ff;
    --b1: #2b2417; --b2: #463417; --b3: #6b4a14; --b4: #96620f; --b5: #f0a03c; --b6: #ffdf9e;
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
#pop { position: absolute; z-index: 5; width: min(23rem, calc(100vw - 1rem));
  background: var(--card); border: 1px solid var(--line); border-radius: 8px;
  padding: .6rem .8rem; font-size: .85rem;
  box-shadow: 0 4px 18px #0005; }
#pop code { font-size: 1rem; font-weight: 600; overflow-wrap: anywhere; }
#pop .row { display: grid; grid-template-columns: minmax(3rem, 9rem) 1fr 4.2rem; gap: .5rem;
  align-items: center; }
#pop .row bdi { overflow: hidden; text-overflow: ellipsis; white-space: nowrap;
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
  return (p >= 0.01 ? (100 * p).toFixed(1) : (100 * p).toPrecision(2)) + "%";
}
function rows(title, list, real) {
  if (!list.length) return;
  make(pop, "h3", "", title);
  for (const [text, id, p] of list) {
    const row = make(pop, "div", id === real ? "row real" : "row");
    make(row, "bdi", "", text).title = "id " + id;
    make(make(row, "div"), "div", "bar").style.width = 100 * Math.min(1, p) + "%";
    make(row, "span", "num", percent(p));
  }
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
  rows("Likeliest", it.top, it.i);
  rows("Tail sample, in the order drawn", it.tail.slice(0, 6), it.i);
  if (it.tail.length > 6) make(pop, "div", "dim", "and " + (it.tail.length - 6) + " more");
}
function place(node) {
  const box = node.getClientRects()[0] || node.getBoundingClientRect();
  const wide = document.documentElement.clientWidth;
  const left = Math.max(8, Math.min(box.left, wide - pop.offsetWidth - 8));
  const below = box.bottom + pop.offsetHeight + 8 < innerHeight || box.top < pop.offsetHeight + 8;
  pop.style.left = left + scrollX + "px";
  pop.style.top = scrollY + (below ? box.bottom + 6 : box.top - pop.offsetHeight - 6) + "px";
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
  if (line) for (const x of ["x1", "x2"]) line.setAttribute(x, +node.dataset.t + 0.5);
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
"""


def escape_json(value: Any) -> str:
    """Write JSON that may stand in a script element whatever text it holds."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return re.sub("[<>&\u2028\u2029\ud800-\udfff]", lambda c: f"\\u{ord(c[0]):04x}", text)


def render_page(
    analyses: Sequence[ConversationAnalysis],
    *,
    title: str = "What the teacher expected",
    stats: str = "",
) -> str:
    """Return a self-contained page of several conversations: one file, no network, both themes.

    Args:
        analyses: the conversations, in the order shown.
        title: heading and window title.
        stats: markup put before the conversations, such as `DatasetStats.to_html()`.
    """
    digest = base64.b64encode(hashlib.sha256(PAGE_SCRIPT.encode()).digest()).decode()
    # Even a mistake in escaping could not run: only this very script may.
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    sections = [render_sample(analysis, number) for number, analysis in enumerate(analyses)]
    heading = escape(title)
    body = [f"<h1>{heading}</h1>", render_nav(analyses), render_legend(), stats, *sections]
    return PAGE.format(
        policy=policy,
        title=heading,
        css=PAGE_CSS,
        body="\n".join(part for part in body if part),
        data=escape_json([[token_data(token) for token in a.tokens] for a in analyses]),
        script=PAGE_SCRIPT,
    )


def escape(text: str) -> str:
    """Escape text of any origin for a page."""
    return html.escape(show_text(text))


def token_data(token: TokenAnalysis) -> dict[str, Any]:
    """Return what the page shows when a token is chosen, under short names."""
    entries = {
        name: [[show_token(p.text), p.id, round_to(p.probability)] for p in predictions]
        for name, predictions in (("top", token.predictions), ("tail", token.tail))
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
        **entries,
    }


def round_to(value: float, digits: int = 4) -> float:
    """Round to significant digits; what is not finite becomes the nearest number JSON has."""
    return float(f"{np.nan_to_num(value):.{digits}g}")


def render_nav(analyses: Sequence[ConversationAnalysis]) -> str:
    """Link to each conversation when there are several."""
    if len(analyses) < 2:
        return ""
    links = [f'<a href="#s{i}">conversation {a.index}</a>' for i, a in enumerate(analyses)]
    return f"<nav>{''.join(links)}</nav>"


def render_legend() -> str:
    """Explain colours, underline and keys."""
    labels = [f"{100 * bound:g}%" for bound in SURPRISE_LEVELS]
    boxes = [f'<span class="b{level}">≥ {label}</span>' for level, label in enumerate(labels)]
    boxes.append(f'<span class="b{len(labels)}">&lt; {labels[-1]}</span>')
    boxes.append('<span class="bound">not stored: at most this</span>')
    boxes.append('<span class="out">not extracted</span>')
    keys = "Point at, tap or focus a token for its predictions; arrow keys move, Esc closes."
    return (
        f'<div class="legend">Probability of the token that is there {"".join(boxes)}</div>'
        f'<p class="dim">{keys}</p>'
    )


def render_sample(analysis: ConversationAnalysis, number: int) -> str:
    """Return the section of one conversation: its figures, its sparkline, its text."""
    tokens = analysis.tokens
    facts = [f"{len(tokens)} tokens" if tokens else "not extracted"]
    if tokens:
        facts.append(f"typical probability {math.exp(analysis.mean_log_probability):.1%}")
        first = sum(token.rank == 1 for token in tokens) / len(tokens)
        facts.append(f"{first:.0%} are the teacher's first choice")
    facts += [escape(text) for text in (analysis.model, analysis.note) if text]
    return (
        f'<section id="s{number}" data-s="{number}">\n<h2>Conversation {analysis.index}</h2>\n'
        f'<p class="dim">{" · ".join(facts)}</p>\n{render_sparkline(tokens)}'
        f'<div class="text" dir="auto">{render_pieces(analysis)}</div>\n</section>'
    )


def render_pieces(analysis: ConversationAnalysis) -> str:
    """Return the text of a conversation as spans; neighbours that were not extracted share one."""
    parts = []
    first = True
    for extracted, run in itertools.groupby(
        analysis.pieces, key=lambda piece: piece[1] is not None
    ):
        if not extracted:
            parts.append(f'<span class="out">{"".join(escape(text) for text, _ in run)}</span>')
            continue
        for text, t in run:
            token = analysis.tokens[t or 0]
            level = surprise_level(token.probability)
            kind = f"tok b{level}" + ("" if token.exact else " bound")
            shown = escape(text).replace("\n", "↵\n") or "∅"
            parts.append(
                f'<span class="{kind}" data-t="{t}" tabindex="{0 if first else -1}">{shown}</span>'
            )
            first = False
    return "".join(parts)


def render_sparkline(tokens: Sequence[TokenAnalysis]) -> str:
    """Draw the nucleus size along a conversation."""
    if not tokens:
        return ""
    sizes = [token.nucleus_size for token in tokens]
    peak, n = max(sizes), len(sizes)
    path = "".join(f"V{round(40 - 40 * size / peak, 2)}h1" for size in sizes)
    return (
        f'<figure><svg class="spark" data-n="{n}" viewBox="0 0 {n} 40" '
        f'preserveAspectRatio="none" role="img" aria-label="nucleus size along the conversation">'
        f'<path class="area" d="M0 40{path}V40Z"/><line class="now" x1="-9" x2="-9" y1="0" '
        f'y2="40"/></svg><div class="axis"><span>token 0</span><span>nucleus size, 1 to {peak}'
        f"</span><span>token {n - 1}</span></div></figure>\n"
    )


def write_page(path: str | Path, page: str) -> None:
    """Write a page under a temporary name and rename it."""
    target = Path(path).expanduser()
    temporary = target.with_name(target.name + ".tmp")
    temporary.write_text(page, encoding="utf-8")
    temporary.replace(target)


# --------------------------------------------------------------------------------------------------
# 9 Plots
# --------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def plot_style() -> Iterator[tuple[Any, Any]]:
    """Yield pyplot and the colour-blind-safe palette, with the house style while it lasts."""
    seaborn = import_extra("seaborn", "viz")
    pyplot = import_extra("matplotlib.pyplot", "viz")
    style = {"axes.titlesize": 11, "axes.labelsize": 10, "figure.dpi": 110, "font.size": 10}
    with pyplot.rc_context(), seaborn.axes_style("whitegrid"), pyplot.rc_context(style):
        yield pyplot, seaborn.color_palette("colorblind")


def finish_figure(pyplot: Any, figure: Any) -> Any:
    """Take a figure out of pyplot's hands, so that a notebook shows it once, as a result."""
    figure.tight_layout()
    pyplot.close(figure)
    return figure


def plot_logit_distribution(sample: Mapping[str, Any], t: int = 0, *, tokenizer: Any = None) -> Any:
    """Plot what is stored of token `t`: the nucleus by rank, then the tail sample."""
    ids, logits = dequantize_top_logits(sample, t)
    _, tail = dequantize_sampled_logits(sample, t)
    total = float(sample["logsumexp"][t])
    with plot_style() as (pyplot, colours):
        figure, axes = pyplot.subplots(figsize=(7, 4))
        ranks = np.arange(1, ids.size + 1)
        axes.plot(ranks, logits, "o-", ms=4, color=colours[0], label=f"nucleus, {ids.size} tokens")
        if tail.size:
            behind = ids.size + np.arange(1, tail.size + 1)
            label = f"tail sample, {tail.size} tokens (ranks unknown)"
            axes.plot(behind, np.sort(tail)[::-1], "^", ms=5, color=colours[1], label=label)
        axes.axhline(total, color=colours[7], ls="--", lw=1, label="log-sum-exp (probability 1)")
        for prediction in decode_top_tokens(sample, t, tokenizer, k=3):
            place = (int(np.flatnonzero(ids == prediction.id)[0]) + 1, prediction.logit)
            label = plain_label(prediction.text)
            axes.annotate(label, place, xytext=(6, 4), textcoords="offset points", fontsize=9)
        axes.set(xlabel="rank in the nucleus, then the tail sample", ylabel="logit (nats)")
        axes.set_title(f"Token {t}: {get_nucleus_probability_mass(sample, t):.1%} in the nucleus")
        axes.legend()
        return finish_figure(pyplot, figure)


def plain_label(text: str) -> str:
    """Return a token as a label that matplotlib takes literally, at most 20 characters long."""
    shown = show_token(text).replace("$", r"\$")
    return shown if len(shown) <= 20 else shown[:19] + "…"


def plot_nucleus_vs_sampled(sample: Mapping[str, Any]) -> Any:
    """Plot the log-probabilities of all nucleus entries of a sample against its tail sample's."""
    block = sample_block(sample)
    parts = [
        ("nucleus", block.top_logits() - np.repeat(block.logsumexp, block.top_counts)),
        ("tail sample", block.tail_logits() - np.repeat(block.logsumexp, block.tail_counts)),
    ]
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
        axes.set_title(
            f"Conversation {sample['index']}: what is stored of {sample['num_tokens']} tokens"
        )
        axes.legend(loc="upper left")
        return finish_figure(pyplot, figure)


def plot_nucleus_sizes(sample: Mapping[str, Any]) -> Any:
    """Plot nucleus size, and the probability that the nucleus covers, along a sample."""
    block = sample_block(sample)
    tokens = np.arange(block.top_counts.size)
    with plot_style() as (pyplot, colours):
        figure, (upper, lower) = pyplot.subplots(
            2, 1, figsize=(8, 4.6), sharex=True, height_ratios=(3, 2)
        )
        upper.bar(tokens, block.top_counts, width=1.0, color=colours[0])
        upper.set(ylabel="nucleus size (tokens)")
        upper.set_title(f"Conversation {sample['index']}: nucleus along the text")
        mass = sum_runs(block.top_probs(), block.top_starts)
        lower.plot(tokens, 100 * mass, ".", ms=4, color=colours[1])
        lower.set(ylabel="covered (%)", xlabel="token of the row", ylim=(None, 100.5))
        return finish_figure(pyplot, figure)


# --------------------------------------------------------------------------------------------------
# 10 Training
# --------------------------------------------------------------------------------------------------

# --------------------------------------------------------------------------------------------------
# 11 CLI
# --------------------------------------------------------------------------------------------------


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line; a bad one exits 2."""
    parser = argparse.ArgumentParser(
        prog="explore-logits",
        description="Look at an output of extract-logits: a folder, or a dataset on the Hub.",
    )
    parser.add_argument("output", metavar="OUTPUT", help="folder, Parquet file or Hub dataset")
    parser.add_argument("--split", default="train", help="split of OUTPUT (default: %(default)s)")
    parser.add_argument("--sample", type=int, default=0, metavar="ROW", help="row to show")
    parser.add_argument("--token", type=int, metavar="T", help="token of the row to show in full")
    parser.add_argument("--top", type=int, default=5, metavar="K", help="predictions per token")
    parser.add_argument("--model", help="teacher to take the tokenizer from (default: the run's)")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    args = parse_args(argv)
    try:
        dataset = load_logit_dataset(args.output, args.split)
        sample = get_sample(dataset, args.sample)
        print_sample_info(sample)
        tokens = [args.token] if args.token is not None else range(min(5, sample["num_tokens"]))
        for t in tokens:
            print_top_tokens(sample, t, k=args.top)
    except LogitsError as error:
        print(f"explore-logits: {error}", file=sys.stderr)
        return 2
    print(json.dumps({"output": args.output, "rows": len(dataset), "sample": args.sample}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
