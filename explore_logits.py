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
import copy
import csv
import difflib
import errno
import functools
import glob
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
import multiprocessing
import operator
import re
import shutil
import tempfile
import traceback
import unicodedata
import zlib
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import MISSING, Field, asdict, dataclass, field, fields, replace
from datetime import datetime
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, NoReturn, get_args, get_type_hints

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
    "distillation_loss_from_hidden",
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
        found = importlib.import_module(module)
        if sys.modules.get("huggingface_hub"):  # imported by now, perhaps by this one
            limit_waiting()
        return found
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


def count_processors() -> int:
    """Return how many processors this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


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


def describe_type(value: Any) -> str:
    """Say what kind of thing was passed instead of what was needed."""
    kind = type(value).__name__
    return f"{'an' if kind[0] in 'aeiouAEIOU' else 'a'} {kind}" if value is not None else "None"


def as_integer(value: Any) -> int | None:
    """Return an integer of Python, numpy or torch as `int`; None for anything else, bools too."""
    with contextlib.suppress(TypeError):
        return None if isinstance(value, (bool, np.bool_)) else operator.index(value)
    return None


def check_name(name: Any) -> str:
    """Return a path or Hub id as text; refuse what is neither."""
    if not isinstance(name, (str, os.PathLike)):
        raise LogitsError(f"a path or Hub id is needed, not {name!r:.40} ({describe_type(name)})")
    return os.fspath(name)


def local_path(name: str | Path) -> Path:
    """Return the path that a name means here, `~` included.

    Raises:
        LogitsError: it is none, or the home of nobody.
    """
    path = os.path.expanduser(check_name(name))
    if path.startswith("~"):
        raise LogitsError(f"{name!s}: nobody of that name has a home here")
    try:
        os.stat(path)
    except (OSError, ValueError) as error:
        if isinstance(error, ValueError) or error.errno == errno.ENAMETOOLONG:
            why = getattr(error, "strerror", "") or first_line(error)
            raise LogitsError(f"{path!r:.60} is no path and no Hub id: {why}") from None
    return Path(path)


class Lines:
    """Takes what a progress bar writes where there is no terminal: a line for each time."""

    def write(self, text: str) -> None:
        """Write the bar on a line of its own."""
        if line := text.strip():
            sys.stderr.write(f"{line}\n")

    def flush(self) -> None:
        """Write what is held back."""
        sys.stderr.flush()


def open_bar(total: int | None, unit: str = "row") -> Any:
    """Show the progress on stderr: a bar on a terminal, a line a minute in a file."""
    terminal = sys.stderr.isatty()
    sized = not terminal or os.get_terminal_size(sys.stderr.fileno()).columns > 0
    return import_extra("tqdm").tqdm(
        total=total,
        unit=unit,
        file=sys.stderr if terminal else Lines(),
        mininterval=0.2 if terminal else 60,
        dynamic_ncols=sized,
        ncols=None if sized else 80,  # some terminals of containers say 0, and tqdm nothing then
        nrows=None if sized else 24,
    )


CONNECT_S, READ_S = 20.0, 30.0  # time-outs of a request: of the line, of the next bytes
HUB_TIMEOUT_S = 8.0  # of what is asked once: to connect, between two pieces of an answer
COMMIT_S = 90.0  # until a commit is answered: the Hub itself ends it after 60
ANSWER_BYTES = 64 * 2**20  # the Hub's own answers are smaller


@lru_cache(maxsize=1)
def limit_waiting() -> None:
    """Bound what the Hub's client waits for and holds: it has no limits of its own."""
    http = importlib.import_module("huggingface_hub.utils._http")
    httpx: Any = getattr(http, "httpx2", getattr(http, "httpx", None))  # by its version

    def be_patient_with_commits(request: Any) -> None:
        if "/commit/" in request.url.path:
            request.extensions["timeout"] = {**request.extensions["timeout"], "read": COMMIT_S}

    def bound_answer(response: Any) -> None:
        path = response.request.url.path
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", response.request.headers.get("Range", ""))
        is_file = not path.startswith("/api/") or path.startswith("/api/resolve-cache/")
        if is_file and response.status_code < 400 and not asked:
            return  # it is read piece by piece
        most = max(ANSWER_BYTES, int(asked[2]) - int(asked[1]) + 1 if asked else 0)
        content = bytearray()
        for block in response.iter_bytes():
            content += block
            if len(content) > most:
                said = f"the answer to {path} is larger than {most:,} bytes"
                raise httpx.DecodingError(said, request=response.request)
        response._content = bytes(content)

    def make_client() -> Any:
        client = http.default_client_factory()
        client.timeout = httpx.Timeout(READ_S, connect=CONNECT_S)
        hooks = client.event_hooks
        client.event_hooks = {
            "request": [*hooks["request"], be_patient_with_commits],
            "response": [*hooks["response"], bound_answer],
        }
        return client

    with contextlib.suppress(AttributeError):  # of another version: its own limits have to do
        known = http._GLOBAL_CLIENT_FACTORY is http.default_client_factory  # else others set limits
        if known and httpx is not None:
            http.set_client_factory(make_client)


def transfer_errors() -> tuple[type[Exception], ...]:
    """Return what the Hub's client raises when a request fails, if it is loaded."""
    errors = sys.modules.get("huggingface_hub.errors")
    return (errors.HTTPError, errors.OfflineModeIsEnabled) if errors is not None else ()


def hub_answers(repo: str, kind: str = "model") -> bool:
    """Ask the Hub about a repository, once: its client asks for each file six times, and waits."""
    hub = import_extra("huggingface_hub")
    try:
        hub.HfApi().repo_info(repo, repo_type=kind, timeout=HUB_TIMEOUT_S)
    except transfer_errors() as error:
        return hasattr(error, "response")  # a refusal, which loading tells best
    except OSError:
        return False
    except (ValueError, LookupError, TypeError, AttributeError):
        pass  # what is no name, too, loading tells best
    return True


# --------------------------------------------------------------------------------------------------
# 1 Format
# --------------------------------------------------------------------------------------------------

FORMAT_VERSION = 2  # of compact rows; version 1 is the same without them, and still written
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
POINTS_FIELD = pa.field("sampled_counts", pa.list_(pa.uint8()))  # the last column of compact rows
ALL_FIELDS = (*SCHEMA, *TOKEN_FIELDS, POINTS_FIELD)
LENGTHS_SCHEMA = pa.schema(
    [("index", pa.int32()), ("length", pa.int32()), ("num_tokens", pa.int32())]
)


def shard_schema(
    *,
    store_tokens: bool = False,
    compact: bool = False,
    settings: Mapping[str, Any] | None = None,
) -> pa.Schema:
    """Return the schema of a shard, with the settings of the run in its key-value metadata.

    `store_tokens` appends `input_ids` and `token_positions` (`TOKEN_FIELDS`), `compact`, for rows
    of `--min-p`, `sampled_counts` after them. `settings` is stored as JSON with sorted keys, so
    equal settings give equal bytes.
    """
    further = [*(TOKEN_FIELDS if store_tokens else ()), *([POINTS_FIELD] if compact else ())]
    schema = pa.schema([*SCHEMA, *further])
    if settings is None:
        return schema
    return schema.with_metadata(
        {
            METADATA_VERSION: str(format_version(compact=compact)).encode(),
            METADATA_SETTINGS: json.dumps(dict(settings), sort_keys=True).encode(),
        }
    )


def format_version(*, compact: bool) -> int:
    """Return the lowest version whose readers understand such rows."""
    return FORMAT_VERSION if compact else 1


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


def as_array(values: Any, kind: type[np.generic], what: str) -> npt.NDArray[Any]:
    """Return numbers as an array.

    Raises:
        FormatError: numpy cannot take them; says what to pass.
    """
    try:
        return np.asarray(values, kind)
    except (TypeError, ValueError, OverflowError, RuntimeError) as error:  # the last is torch's
        raise FormatError(
            f"{what} must be numbers that numpy takes, not {describe_type(values)}: "
            f"{first_line(error)}"
        ) from None


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
    low16 = as_array(low, np.uint16, "low bits").reshape(-1)
    if not isinstance(high, (bytes, bytearray, memoryview, np.ndarray)):
        raise FormatError(f"high bits are bytes, not {describe_type(high)}")
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
    per_token = as_array(counts, np.int64, "counts").reshape(-1)
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
        FormatError: a logit is not finite; names it. Or `counts` or `bits` do not fit.
    """
    values = as_array(logits, np.float32, "logits").reshape(-1)
    if (kept := as_integer(bits)) is None or not 4 <= kept <= 16:
        raise FormatError(f"bits={bits!r:.40}: an integer in 4..16 is needed")
    strange = np.flatnonzero(~np.isfinite(values))
    if strange.size:
        raise FormatError(
            f"logit {strange[0]} of {values.size} is {values[strange[0]]}: only finite ones are "
            "stored, so leave the token out"
        )
    counts = [values.size] if counts is None else counts
    per_token = as_array(counts, np.int64, "counts").reshape(-1)
    if per_token.sum() != values.size or (values.size and per_token.min() < 1):
        raise FormatError(f"counts of at least 1 that sum to {values.size} logits are needed")
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
    low, high = as_array(vmin, np.float64, "vmin"), as_array(vmax, np.float64, "vmax")
    return as_array(q, np.float64, "q") / 65535 * (high - low) + low


# --------------------------------------------------------------------------------------------------
# 2 Source
# --------------------------------------------------------------------------------------------------
#
#     open_source ──row──► read_conversation ──► messages, tools, arguments of the template

Messages = list[dict[str, Any]]
Span = tuple[int, int]


class ConversationError(LogitsError):
    """One conversation cannot be used; the run counts it under `reason` and goes on.

    From the source: null, empty, malformed, not_text (images, audio). From the template and the
    tokenizer: no_assistant, refused_by_template, no_tokens, unaligned, too_long.
    """

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
CONTEXT_COLUMNS = ("input", "context")  # what an `instruction` is about, in Alpaca and Dolly


@dataclass(frozen=True)
class ConversationColumns:
    """Which columns of the source hold the conversation: messages, question and answer, or text."""

    messages: str | None = None
    user: str | None = None  # text, or a list of messages
    assistant: str | None = None  # as `user`
    system: str | None = None  # comes before everything
    index: str | None = None
    context: str | None = None  # is added to the user's text
    text: str | None = None

    def settings(self) -> dict[str, str | None]:
        """Return the columns under the names that a run's settings give them."""
        return {f"{name}_col": column for name, column in vars(self).items()}

    def needed(self) -> set[str]:
        """Return all columns of the source that a conversation is read from."""
        named = {column for column in vars(self).values() if column is not None}
        return named | {"tools", "chat_template_kwargs"}

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> ConversationColumns:
        """Take the columns out of a run's settings; those of version 0.1 name idle ones, too."""
        columns = cls(*(settings.get(name) for name in cls().settings()))
        old = columns.messages is not None and "text_col" not in settings
        return cls(columns.messages, index=columns.index) if old else columns


def resolve_columns(names: Iterable[str], **options: str | None) -> ConversationColumns:
    """Decide which columns hold the conversation; every option that is given is used or refused.

    In this order: `text_col`; `messages_col`; `user_col` with `assistant_col` where they were
    changed from "question" and "answer"; `MESSAGE_COLUMNS`; those two; `PAIR_COLUMNS`. Raises
    SourceError that names the columns there are.
    """
    have, given = list(names), {n: column for n, column in options.items() if column is not None}
    pair = given.pop("user_col", "question"), given.pop("assistant_col", "answer")
    asked = pair != ("question", "answer")
    given |= dict(zip(("user_col", "assistant_col"), pair, strict=True)) if asked else {}
    for name, column in given.items():
        if column not in have:
            there = ", ".join(have)
            raise SourceError(f"no column {column!r} ({flag_of(name)}); the dataset has {there}")
    ways = [flag_of(name) for name in ("text_col", "messages_col", "user_col") if name in given]
    if len(ways) > 1:
        raise SourceError(f"{' and '.join(ways)} exclude each other: give one of them")
    text, system, index = (given.get(f"{kind}_col") for kind in ("text", "system", "index"))
    if text is not None:
        if system is not None:
            raise SourceError("--system-col belongs to a conversation, not to --text-col")
        return ConversationColumns(text=text, index=index)
    usual = next((name for name in MESSAGE_COLUMNS if name in have and not asked), None)
    if messages := given.get("messages_col") or usual:
        return ConversationColumns(messages, system=system, index=index)
    for user, assistant in (pair,) if asked else (pair, *PAIR_COLUMNS):
        if user in have and assistant in have:
            about = (name for name in CONTEXT_COLUMNS if user == "instruction" and name in have)
            return ConversationColumns(None, user, assistant, system, index, next(about, None))
    raise SourceError(
        f"no conversations: neither a column {', '.join(MESSAGE_COLUMNS)} (--messages-col) nor "
        "'question' with 'answer' (--user-col, --assistant-col) or a usual pair such as prompt "
        f"with completion (--text-col for plain text); the dataset has {', '.join(have)}"
    )


def source_id(row: Mapping[str, Any], number: int, columns: ConversationColumns) -> int:
    """Return the `index` of a row: its number in the source, or the value of the index column."""
    if columns.index is None:
        return number
    value = row.get(columns.index)
    if (whole := as_integer(value)) is None or not -(2**31) <= whole < 2**31:
        why = (
            f"{columns.index!r} is {value!r:.40}, not an integer of 32 bits; leave --index-col out"
        )
        raise SourceError(f"row {number}: {why} to use row numbers")
    return whole


# Opening ------------------------------------------------------------------------------------------
#
# JSON and CSV are read here, row by row, local or on the Hub, streamed or not: nulls and numbers
# stay as they were written, and a bad line is named when it is met. The rest `datasets` reads.

FIRST_ROWS = 1000  # that tell the columns where no schema does: a key may be left out of some rows
_FILE = re.compile(r"\.(jsonl?|csv|parquet)(?:\.(?:gz|zst|bz2|xz))?$")
_HUB_FILE = re.compile(r"hf://datasets/(.+?)@([0-9a-f]{40})/(.+)")


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

    `dataset` is a Hub id (with its `subset` and `revision`), a local .jsonl, .json, .parquet or
    .csv file, also compressed, a folder of them, or one written by `save_to_disk`. With `streaming`
    it is never held in memory or written to a cache, without it `split` may slice: `train[:100]`.
    Columns of CSV files in `integers` hold such, all others are read as text. Raises SourceError,
    which names the splits there are, file and line, or that the Hub is out of reach and its cache
    holds no such dataset or another commit of it.
    """
    datasets, path = import_extra("datasets"), local_path(dataset)
    logging.getLogger("datasets.packaged_modules").setLevel(logging.CRITICAL)  # logs and raises
    asked, as_written = {part.partition("[")[0] for part in split.split("+")}, False
    name = min(asked)
    if streaming and name != split:
        raise SourceError(f"--split {split}: a stream is not sliced; leave out --streaming")
    with _reading(dataset, split, subset):
        if path.exists():
            splits = _find_splits(path, subset)
        elif dataset.startswith((".", "/", "~")) or _FILE.search(dataset):
            raise SourceError(f"dataset {dataset!r}: no such file or folder")
        else:
            splits = _find_splits_of_hub(dataset, subset, split, streaming, revision)
            name = split if split in splits else name
        if name not in splits or (len(asked) > 1 and name != split):
            raise ValueError(f"Available splits: {[*splits]}")  # as `datasets` says it
        if not isinstance(rows := splits[name], list):
            is_table = isinstance(rows, datasets.Dataset)
            rows = rows.to_iterable_dataset() if streaming and is_table else rows
        elif _kind_of_file((rows := _like_files(rows))[0]) == "parquet":
            how = {"split": name, "streaming": streaming, "name": _fingerprint(rows)}
            how["features"] = _unite_types(rows)
            rows = [glob.escape(os.path.abspath(file)) for file in rows]
            rows = datasets.load_dataset("parquet", data_files={name: rows}, **how)
        elif streaming:
            given = {"files": tuple(rows), "integers": tuple(integers)}  # lists mean shards
            rows = datasets.IterableDataset.from_generator(read_rows, gen_kwargs=given)
            as_written = True
        else:
            rows = _tabulate(rows, integers)
        if streaming:
            return Stream(rows, dataset, as_written)
        if name == split:
            return rows
        parts = datasets.ReadInstruction.from_spec(split).to_absolute({name: len(rows)})
        slices = (range(len(rows))[part.from_ : part.to] for part in parts)
        return rows.select(list(itertools.chain(*slices)))


@contextlib.contextmanager
def _cache_alone() -> Iterator[None]:
    """Let nothing be asked of the Hub; `load_dataset` has no option that all of it obeys."""
    constants = import_extra("huggingface_hub.constants")
    constants.HF_HUB_OFFLINE, before = True, constants.HF_HUB_OFFLINE
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def _find_splits_of_hub(
    dataset: str, subset: str | None, split: str, streaming: bool, revision: str | None
) -> Mapping[str, Any]:
    """Return the files of a dataset on the Hub by split, or the split where they are not read here.

    Files of the split are fetched, but for a stream. Raises SourceError where the Hub is out of
    reach and its cache has the dataset at another commit.
    """
    datasets = import_extra("datasets")
    answers = not datasets.config.HF_HUB_OFFLINE and hub_answers(dataset, "dataset")
    asked = [part.partition("[")[0] for part in split.split("+")]
    with contextlib.nullcontext() if answers else _cache_alone():
        splits = _list_files_of_hub(dataset, subset, revision, answers)
        if not splits:
            how = {"split": split, "streaming": streaming, "revision": revision}
            return {split: datasets.load_dataset(dataset, name=subset, **how)}
        if len(asked) > 1 and "[" not in split and {*asked} <= splits.keys():
            splits[split] = [file for part in asked for file in splits[part]]
            asked = [split]
        if not (answers and streaming):
            splits |= {name: _fetch(splits[name]) for name in {*asked} & splits.keys()}
        return splits


def _list_files_of_hub(
    dataset: str, subset: str | None, revision: str | None, answers: bool
) -> dict[str, list[str]]:
    """Return the JSON and CSV files of a dataset on the Hub by split, nothing of other datasets.

    What the Hub lists is kept for when it is out of reach.
    """
    datasets = import_extra("datasets")
    if not answers and not is_exact(revision):
        revision = cached_commit(dataset, revision) or revision
    known = None if answers else _kept(dataset, subset, revision)
    if known:
        return dict(known)
    builder = datasets.load_dataset_builder(dataset, name=subset, revision=revision)
    if not answers:
        if revision not in (None, builder.hash):
            raise SourceError(
                f"dataset {dataset!r}: the Hub is out of reach, and its cache here holds commit "
                f"{builder.hash}, not {revision}: run once where the Hub answers"
            )
        info = json.loads(Path(builder.cache_dir, "dataset_info.json").read_text())
        if known is not None or info.get("builder_name") not in ("json", "csv"):
            return {}
        # where `datasets` has left all of them
        path = _cache_of_hub(dataset, "dataset") / "snapshots" / builder.hash
        plain = _reads_plainly(datasets.load_dataset_builder(str(path), name=subset))
        return dict(_find_splits(path, subset)) if plain else {}
    splits = {str(split): list(each) for split, each in (builder.config.data_files or {}).items()}
    ours = _reads_plainly(builder) and all(
        _HUB_FILE.fullmatch(file) and _kind_of_file(file) not in ("", "parquet")
        for file in itertools.chain(*splits.values())
    )
    splits = splits if ours else {}
    _keep(splits, dataset, subset, builder.hash)
    return splits


def _reads_plainly(builder: Any) -> bool:
    """Tell whether no README.md of a dataset says how its files are read, such as by `sep`."""
    known, own = vars(builder.config), vars(type(builder.config)())
    changed = {name for name in known if known[name] != own[name]}
    return changed <= {"name", "version", "data_dir", "data_files", "description"}


def _fetch(files: Sequence[str]) -> list[str]:
    """Return where files of the Hub are in its cache here, to which they are brought."""
    hub = import_extra("huggingface_hub")

    def fetch(file: str) -> str:
        if not (found := _HUB_FILE.fullmatch(file)):
            return file
        repo, commit, name = found.groups()
        return str(hub.hf_hub_download(repo, name, repo_type="dataset", revision=commit))

    with ThreadPoolExecutor(8) as pool:
        return list(pool.map(fetch, files))


def _cache_of_hub(repo: str, kind: str) -> Path:
    """Return the folder of a repository in the Hub's cache here."""
    name = import_extra("huggingface_hub.file_download").repo_folder_name
    cache = import_extra("huggingface_hub.constants").HF_HUB_CACHE
    return Path(cache, name(repo_id=repo, repo_type=kind))


def cached_commit(repo: str, revision: str | None = None, *, kind: str = "dataset") -> str | None:
    """Return the commit that a branch of a repository is (None: main), as last told here."""
    branch = revision or "main"
    places = [_cache_of_hub(repo, kind) / "refs" / branch]
    places += [_kept_file((repo, branch))] if kind == "dataset" else []
    with contextlib.suppress(OSError, ValueError):
        told = [place for place in places if place.is_file()]
        newest = max(told, key=lambda place: place.stat().st_mtime)
        return newest.read_text().strip('"')
    return None


def _kept_file(key: Sequence[Any]) -> Path:
    name = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:32]
    return Path(import_extra("datasets").config.HF_DATASETS_CACHE, "rows", f"{name}.json")


def _keep(told: Any, *key: Any) -> None:
    """Keep what the Hub told of a dataset, for when it is out of reach."""
    with contextlib.suppress(OSError), whole_file(_kept_file(key)) as part:
        part.write_text(json.dumps(told))


def _kept(*key: Any) -> Any:
    """Return what was kept, None where nothing was."""
    with contextlib.suppress(OSError, ValueError):
        return json.loads(_kept_file(key).read_text())
    return None


def _kind_of_file(name: str) -> str:
    """Return "jsonl", "json", "csv" or "parquet", "" for anything else."""
    found = _FILE.search(name)
    return found[1] if found else ""


def _find_splits(path: Path, subset: str | None) -> Mapping[str, Any]:
    """Return the files of a local dataset by split, or its tables where it was saved as such."""
    datasets, name = import_extra("datasets"), f"dataset {str(path)!r}"
    saved = (path / "state.json").is_file() or (path / "dataset_dict.json").is_file()
    if subset is not None and (saved or path.is_file()):
        raise SourceError(f"{name} is a file or a saved dataset: it has no --subset {subset}")
    if saved:
        tables = datasets.load_from_disk(str(path))
        tables = tables if isinstance(tables, dict) else {"train": tables}
        return {split: table.with_format(None) for split, table in tables.items()}
    inside = sorted(path.rglob("[!.]*"))  # nothing of a file
    files = [file for file in inside if file.is_file()] if path.is_dir() else [path]
    kinds = {_kind_of_file(file.name) for file in files}
    if not any(kinds):
        what = "unknown kind of file, expected" if path.is_file() else "no file in this folder is"
        raise SourceError(f"{name}: {what} .jsonl, .json, .parquet, .csv")
    if path.is_file():
        return {"train": [str(path)]}
    folder = os.path.abspath(path)  # `.` has no name by itself
    if glob.has_magic(folder) or "::" in folder:  # other folders could be meant, too
        raise SourceError(f"{name}: a path with *, ?, [ or :: is read as a pattern: rename it")
    found = datasets.load_dataset_builder(folder, name=subset).config.data_files
    splits = {str(split): list(each) for split, each in found.items()}
    taken = {_kind_of_file(file) for each in splits.values() for file in each}
    if "" in taken:
        raise SourceError(f"{name}: most of its files are no .jsonl, .json, .parquet, .csv")
    # it takes the files of one kind; what else is .json may be about the others
    for kind in sorted(kinds - {*taken, "json", ""}):
        log.warning("%s: its .%s files are not read, give them apart", name, kind)
    read = {*map(os.path.realpath, itertools.chain(*splits.values()))}
    idle = [
        str(file.relative_to(path))
        for file in inside
        if not is_hidden(file.relative_to(path))
        if (file.is_symlink() and file.is_dir())
        or (_kind_of_file(file.name) in taken and os.path.realpath(file) not in read)
    ]
    readme = path / "README.md"
    if idle and not (readme.is_file() and b"data_files" in readme.read_bytes()):
        what = "which name no split as others do (train-…), or are links to folders"
        few = show_line(", ".join(idle[:3])) + (", …" if len(idle) > 3 else "")
        log.warning("%s: not read: %s, %s (%s)", name, plural(len(idle), "file"), what, few)
    return splits


def _like_files(files: Sequence[str]) -> list[str]:
    """Return the files that hold rows, of those read together: all have the same columns.

    Columns of Parquet files hold the same, too: `datasets` makes 007 a number where others hold
    such.
    """
    columns: dict[str, list[str]] = {file: [] for file in files}
    types: dict[Any, tuple[str, str]] = {}  # what a column holds, and the file that said so
    if _HUB_FILE.fullmatch(files[0]):  # a request each, and a stream may end before most of them
        return list(files)
    for file in files:
        with _reading(file):
            if _kind_of_file(file) != "parquet":
                first = itertools.islice(read_rows([file]), FIRST_ROWS)
                columns[file] = [*dict.fromkeys(name for row in first for name in row)]
                continue
            if not (schema := _read_types(file)):
                continue
            columns[file] = schema.names
            for entry in schema:
                for place, kind in _list_types(entry.name, entry.type):
                    expected, other = types.setdefault(place, (kind, file))
                    if kind != expected:
                        raise SourceError(
                            f"dataset {file!r}: column {'.'.join(place)} holds {kind}, that of "
                            f"{Path(other).name} {expected}; write both alike, or give one file"
                        )
    full = [file for file in files if columns[file]]
    if not full:
        raise SourceError(f"dataset {files[0]!r} has no rows")
    is_json = _kind_of_file(full[0]).startswith("json")  # where a key may be left out
    optional = ConversationColumns().needed() if is_json else set()
    for file in full:
        if other := ", ".join(sorted(({*columns[full[0]]} ^ {*columns[file]}) - optional)):
            raise SourceError(
                f"dataset {file!r} and {Path(full[0]).name} have different columns ({other}); "
                "give one of the files, or a folder of like ones"
            )
    return full


def _read_types(file: str) -> pa.Schema | None:
    """Return the types of a Parquet file, without what is about its storing; None: it has no rows.

    A column that holds nulls alone has the type of nulls: of text that is missing, pandas makes
    numbers.
    """
    types = []
    with pq.ParquetFile(file) as table:
        footer, schema = table.metadata, table.schema_arrow
    chunks = [footer.row_group(n) for n in range(footer.num_row_groups)]
    told = [chunk.column(n) for chunk in chunks for n in range(footer.num_columns)]
    sound = {c.path_in_schema for c in told
             if not c.statistics or c.statistics.null_count != c.num_values}  # fmt: skip
    for entry in schema:
        kind = entry.type.value_type if pa.types.is_dictionary(entry.type) else entry.type
        kind = pa.string() if "string" in str(kind) and not kind.num_fields else kind
        types.append((entry.name, kind if kind.num_fields or entry.name in sound else pa.null()))
    return pa.schema(types) if footer.num_rows else None


def _unite_types(files: Sequence[str]) -> Any:
    """Return the features of Parquet files where the first does not tell, for it holds nulls."""
    first = _read_types(files[0])
    if first is None or not any(re.search(r"(^|: )null\b", str(kind)) for kind in first.types):
        return None
    schemas = [first, *filter(None, map(_read_types, files[1:]))]
    united = pa.unify_schemas(schemas, promote_options="permissive")
    return import_extra("datasets").Features.from_arrow_schema(united)


def _list_types(name: str, kind: pa.DataType, *above: str) -> Iterator[tuple[Any, str]]:
    """Yield what a column and the fields in it hold, text or else; nothing for nulls.

    Whole columns of numbers are alike: pandas makes floats of integers beside a null. Other
    types `datasets` casts without loss, or refuses.
    """
    for entry in map(kind.field, range(kind.num_fields)):
        is_list = kind.num_fields == 1 and not pa.types.is_struct(kind)
        yield from _list_types("[]" if is_list else entry.name, entry.type, *above, name)
    if not kind.num_fields and not pa.types.is_null(kind):
        plain = "text" if "string" in str(kind) else "no text"
        if pa.types.is_integer(kind) or pa.types.is_floating(kind):
            plain = "integer" if pa.types.is_integer(kind) and above else "number"
        yield (*above, name), plain


def read_rows(
    files: Sequence[str], integers: Sequence[str | None] = ()
) -> Iterator[dict[str, Any]]:
    """Yield the rows of JSON files (an object a line, or an array of them) and CSV files.

    Files may be compressed; blank lines are passed over. A cell of a CSV is text, or null when
    empty. Raises SourceError with file and line.
    """
    number = 0

    def decode(data: Any) -> Iterator[str]:
        nonlocal number
        number = 1  # of the line that is read, which may fail
        for line in iter(data.readline, b""):
            yield line.decode("utf-8-sig" if number == 1 else "utf-8")
            number += 1
        number -= 1

    _read_faults()  # imports, which a reader that is closed halfway is not to wait for
    for file in files:
        number = 0
        packed = None if file.endswith(".zst") else "infer"  # fsspec reads no lines of zstd
        try:
            place, path = import_extra("fsspec").filesystem("file"), os.path.abspath(file)
            if _HUB_FILE.fullmatch(file):
                place, path = import_extra("huggingface_hub").HfFileSystem(), file
            with place.open(path, "rb", compression=packed) as data:
                if packed is None:
                    data = io.BufferedReader(pa.CompressedInputStream(pa.PythonFile(data), "zstd"))
                lines, is_csv = decode(data), _kind_of_file(file) == "csv"
                yield from _read_csv(lines, integers) if is_csv else _read_json(lines)
        except _read_faults() as error:
            said = next((said for kind, said in _WHY.items() if isinstance(error, kind)), "")
            passing = getattr(error, "errno", None) or isinstance(error, transfer_errors())
            passing = passing or "memory" in str(error)  # of zstd's --long
            damaged = "" if passing else ": the file is damaged"
            why = said.format(error) or first_line(error) + damaged
            raise SourceError(f"dataset {file!r}, line {number}: {why}") from None


_WHY: dict[type[Exception], str] = {  # why a file of text cannot be read
    UnicodeDecodeError: "the text is not UTF-8 (is it UTF-16 or Latin-1? write it as UTF-8)",
    RecursionError: "not JSON that can be read: it is nested too deeply",
    csv.Error: "not CSV ({})",
    ValueError: "not JSON ({})",
}


def _read_json(lines: Iterator[str]) -> Iterator[dict[str, Any]]:
    lines = filter(str.strip, lines)
    first = next(lines, "")
    is_array = first.lstrip().startswith("[")
    rows = filter(None, itertools.chain([first], lines))
    for row in json.loads(first + "".join(lines)) if is_array else map(json.loads, rows):
        if not isinstance(row, dict):
            raise ValueError(f"{row!r:.40} is not an object")
        yield row


def _read_csv(lines: Iterator[str], integers: Sequence[str | None]) -> Iterator[dict[str, Any]]:
    csv.field_size_limit(2**31 - 1)
    table = csv.DictReader(lines, strict=True)
    names = table.fieldnames or []
    for cells in table:
        count, columns = len(names) + len(cells.pop(None, None) or ()), len(set(names))
        if count > columns:
            raise csv.Error(f"{count} cells under {columns} different columns")
        row: dict[str, Any] = {name: cell or None for name, cell in cells.items()}
        for name in row.keys() & set(integers):
            if row[name] and re.fullmatch(r"\s*-?\d+\s*", row[name]):
                row[name] = int(row[name])
        yield row


def _tabulate(files: Sequence[str], integers: Sequence[str | None]) -> Any:
    """Return JSON and CSV files as a table in the cache of `datasets`.

    Columns of anything but text or integers are JSON there, decoded here when they are read:
    `datasets` does so by a reader that rounds numbers and drops half pairs of surrogates.
    """
    datasets = import_extra("datasets")
    cache = Path(datasets.config.HF_DATASETS_CACHE)
    path = cache / "rows" / f"{_fingerprint(files, *integers)}.arrow"
    if not path.exists():
        kinds: dict[str, set[str]] = {}
        for row in read_rows(files, integers):
            for name, value in row.items():
                kinds.setdefault(name, set()).update([] if value is None else [_kind_of(value)])
        one = {name: min(found) if len(found) == 1 else "json" for name, found in kinds.items()}
        types = {n: datasets.Value(k if k == "int64" else "string") for n, k in one.items()}
        schema = datasets.Features(types).arrow_schema
        encoded = [name for name, kind in one.items() if kind == "json"]
        schema = schema.with_metadata({**schema.metadata, b"json": json.dumps(encoded)})
        with whole_file(path) as part, pa.ipc.new_stream(str(part), schema) as table:
            rows = read_rows(files, integers)
            while batch := list(itertools.islice(rows, 1000)):
                for row in batch:
                    row |= {name: _json_cell(row[name]) for name in encoded if name in row}
                table.write_batch(pa.RecordBatch.from_pylist(batch, schema))
    with pa.ipc.open_stream(str(path)) as stored:
        encoded = json.loads(stored.schema.metadata[b"json"])
    decode = functools.partial(_decode_json, encoded)
    return datasets.Dataset.from_file(str(path)).with_transform(decode)


def _fingerprint(files: Sequence[str], *options: str | None) -> str:
    """Return a name for what is cached of files: of others of the same path and time, another."""
    stats = [(os.path.abspath(file), os.stat(file)) for file in files]
    seen = [(file, s.st_size, s.st_mtime_ns, s.st_ctime_ns) for file, s in stats]
    return hashlib.sha256(json.dumps([2, seen, options]).encode()).hexdigest()[:32]


def _decode_json(encoded: Sequence[str], batch: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
    return {
        name: [cell and json.loads(cell) for cell in cells] if name in encoded else cells
        for name, cells in batch.items()
    }


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Give a name to write to; what stands there in the end appears as `path`, whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}-{os.urandom(4).hex()}")
    try:
        yield part
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def _kind_of(value: Any) -> str:
    if isinstance(value, str) and is_unicode(value):  # no table holds half a surrogate pair
        return "string"
    return "int64" if type(value) is int and -(2**63) <= value < 2**63 else "json"


def _json_cell(value: Any) -> str | None:
    text = None if value is None else json.dumps(value, ensure_ascii=False)
    return text if text is None or is_unicode(text) else json.dumps(value)


def is_unicode(text: str) -> bool:
    """Tell whether text can be written at all: JSON escapes can hold half a surrogate pair."""
    return text.isascii() or not re.search("[\ud800-\udfff]", text)


@dataclass(frozen=True)
class Stream:
    """Rows of a source one after the other; what goes wrong on the way is a `SourceError`."""

    rows: Any  # `datasets.IterableDataset`, of which this has what the scripts use
    name: str
    as_written: bool = False  # no null of an object is Arrow's padding

    @property
    def column_names(self) -> Any:
        """The columns, None where no schema says."""
        return self.rows.column_names

    @property
    def features(self) -> Any:
        """The type of each column by `datasets`, None where nobody knows."""
        return {} if self.as_written else self.rows.features

    def __iter__(self) -> Iterator[dict[str, Any]]:
        with _reading(self.name):
            yield from self.rows

    def take(self, count: int) -> Stream:
        """Return the first rows."""
        return replace(self, rows=self.rows.take(count))

    def select_columns(self, names: Sequence[str]) -> Stream:
        """Return only these columns of each row."""
        return replace(self, rows=self.rows.select_columns(list(names)))


@lru_cache(maxsize=1)
def _read_faults() -> tuple[type[Exception], ...]:
    """Return what the readers of all kinds of files raise."""
    found: list[type[Exception]] = [OSError, EOFError, ValueError, TypeError, KeyError, ImportError]
    found += [RuntimeError, zlib.error, lzma.LZMAError, csv.Error, pa.ArrowException]
    found += [importlib.import_module("datasets").exceptions.DatasetsError]
    found += [importlib.import_module("yaml").YAMLError]  # of a README.md
    found += transfer_errors()
    return tuple(found)


@contextlib.contextmanager
def _reading(name: str, split: str = "", subset: str | None = None) -> Iterator[None]:
    """Turn what readers raise into one line that says what to do."""
    try:
        yield
    except _read_faults() as error:
        cause, why = root_cause(error), " ".join(str(error).split()) or type(error).__name__
        known = r"(?:Should be one of|Available splits:|configs:|Available:) \[(.*?)\]"
        if found := re.search(known, why):
            names = ", ".join(re.findall(r"'([^']+)'", found[1]))
            what, given = ("subset", subset) if "onfig" in why else ("split", split)
            why = f" has no {what} {given!r}; it has {names} (--{what})"
            why = why if given is not None else f" has subsets: give one of {names} (--subset)"
        elif "BatchSize must be greater than 0" in str(cause) or "corresponds to no data" in why:
            why = " has no rows"
        elif local_path(name).exists():
            # of a folder, only the reader of `datasets` knows at which file it was
            at = [frame.f_locals.get("file") for frame, _ in traceback.walk_tb(cause.__traceback__)]
            name = next((file for file in reversed(at) if isinstance(file, str)), name)
            said = " ".join(str(cause).split()) or type(cause).__name__
            readme = "its README.md: " if type(cause).__module__.startswith("yaml") else ""
            why = f" cannot be read: {readme}{said:.300}"
        else:
            if type(error).__name__ in ("DatasetNotFoundError", "DataFilesNotFoundError"):
                why += " (is the name right, and are you logged in? hf auth login)"
            why = f" cannot be opened: {why}; no file or folder here has this name either"
        raise SourceError(f"dataset {name!r}{why}") from error


def root_cause(error: BaseException) -> BaseException:
    """Return the first of a chain of errors, as far as the chain is meant to be shown."""
    while inner := error.__cause__ or (None if error.__suppress_context__ else error.__context__):
        error = inner
    return error


def source_revision(
    dataset: str, revision: str | None = None, *, kind: str = "dataset"
) -> str | None:
    """Name the version of a source (or model: `kind`): a commit, or a digest of local files.

    It covers their whole content up to 1 GB together; of more, names, sizes and 16 places of each,
    so that it stays cheap. Hidden files and folders, such as .git and .cache of a download, are no
    part of it, nor what `datasets` caches in a saved dataset. None when neither the Hub nor its
    cache says.
    """
    path = local_path(dataset)
    if not path.exists():
        hub = import_extra("huggingface_hub")
        try:
            commit = str(hub.HfApi().repo_info(dataset, revision=revision, repo_type=kind).sha)
        except (hub.errors.HTTPError, OSError, ValueError):
            return cached_commit(dataset, revision, kind=kind)
        if kind == "dataset":  # it is read by the commit, of which the Hub's cache keeps no branch
            _keep(commit, dataset, revision or "main")
        return commit
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    files = [file for file in files if file.is_file() and not is_hidden(file.relative_to(path))]
    files = [file for file in files if not re.fullmatch(r"cache-.*\.arrow", file.name)]
    sizes = [file.stat().st_size for file in files]
    digest = hashlib.sha256()
    for file, size in zip(files, sizes, strict=True):
        name = f"{file.relative_to(path).as_posix()}:{size}:"
        digest.update(name.encode(errors="surrogateescape"))
        whole = sum(sizes) <= 2**30 or size <= 2**20
        spread = ((size - 2**16) * n // 15 for n in range(16))
        with file.open("rb") as data:
            for place in range(0, size, 2**16) if whole else spread:
                data.seek(place)
                digest.update(data.read(2**16))
    return "sha256:" + digest.hexdigest()


def is_hidden(path: Path) -> bool:
    """Tell whether a file or a folder that it is in has a name with a dot before it."""
    return any(part.startswith(".") for part in path.parts)


def refuse_inside(options: ConversationOptions, **places: str) -> None:
    """Refuse to write into the folder of the model or the dataset: it would be another one then.

    Args:
        places: folders that are written to, by the option that names each.

    Raises:
        ConfigError: names both.
    """
    for (name, place), kind in itertools.product(places.items(), ("model", "dataset")):
        folder = Path(os.path.realpath(local_path(given := getattr(options, kind))))
        written = Path(os.path.realpath(local_path(place)))
        inside = folder.is_dir() and written.is_relative_to(folder)
        if inside and not is_hidden(written.relative_to(folder)):
            raise ConfigError(
                f"{flag_of(name)} {place} is inside --{kind} {given}, which would be another one "
                "with these files in it: give a folder outside"
            )


def source_columns(dataset: Any) -> list[str]:
    """Return the column names of an open source; those of its first rows where no schema says."""
    first = () if dataset.column_names else dataset.take(FIRST_ROWS)
    names = dataset.column_names or dict.fromkeys(name for row in first for name in row)
    if not names:
        raise SourceError(f"dataset {getattr(dataset, 'name', '')!r} has no rows")
    return list(names)


def without_idle_columns(source: Any, columns: ConversationColumns) -> Any:
    """Leave out what no conversation is read from, such as images: decoding it costs time."""
    if not source.column_names:  # a stream without a schema: not all its rows have the same ones
        return source
    return source.select_columns([n for n in source.column_names if n in columns.needed()])


# Rows to messages ---------------------------------------------------------------------------------

_ROLES = {name: role for role, names in {
    "user": "user human prompter",
    "assistant": "assistant gpt chatgpt bot model ai function_call tool_call",
    "tool": "tool observation function function_response tool_response",
    "system": "system",
    "developer": "developer",
}.items() for name in names.split()}  # fmt: skip
_INSTRUCTORS = ("system", "developer")
_PARTS = {"text": "text", "input_text": "text", "output_text": "text",
          "reasoning": "reasoning", "thinking": "reasoning"}  # fmt: skip
_REASONING_KEYS = ("reasoning_content", "thinking", "reasoning")
_ANY_OBJECT = object()  # stands for a feature that nobody knows


class Chat(NamedTuple):
    """What a row of the source holds for the template."""

    messages: Messages
    tools: list[dict[str, Any]] | None = None
    template_kwargs: Mapping[str, Any] = {}


def read_conversation(
    row: Mapping[str, Any],
    columns: ConversationColumns,
    features: Mapping[str, Any] | None = None,
) -> Chat:
    """Return the chat of a row: messages with `role`, `content` and what else the row gives.

    Both dialects are understood (`role`/`content` and `from`/`value`), a question and an answer as
    text or as messages, and all but text as a JSON string too. Content given as a list of parts is
    joined, parts of reasoning become `reasoning_content`. `features`: see `without_padding`.
    """
    cells: dict[str, Any] = {}
    for name in columns.needed():
        try:
            feature = _ANY_OBJECT if features is None else features.get(name)
            cells[name] = without_padding(row.get(name), feature)
        except RecursionError:
            raise ConversationError("malformed", f"column {name!r} is nested too deeply") from None
    if columns.messages is not None:
        messages = _read_messages(cells[columns.messages], columns.messages)
    else:
        messages = _read_pair(cells, columns)
    if text := _cell_text(cells, columns.system, needed=False):
        if messages[0]["role"] != "system":
            messages = [{"role": "system", "content": text}, *messages]
        elif messages[0].get("content") != text:
            why = f"column {columns.system!r} and a system message of its own differ (--system-col)"
            raise ConversationError("malformed", f"the conversation has {why}")
    answers = [m for m in messages if m["role"] == "assistant"]
    said = [m.get(key) for m in answers for key in ("content", "tool_calls", *_REASONING_KEYS)]
    if answers and not any(s.strip() if isinstance(s, str) else s for s in said):
        raise ConversationError("empty", "the assistant says nothing")
    tools = _read_objects(cells["tools"], "column 'tools'") or None
    try:
        given = check_template_kwargs(_parsed_json(cells["chat_template_kwargs"]) or {})
    except TemplateError as error:
        raise ConversationError("malformed", f"column 'chat_template_kwargs': {error}") from None
    return Chat(messages, tools, given)


def without_padding(value: Any, feature: Any) -> Any:
    """Return a value of a row as JSON would hold it, without the nulls that Arrow put there.

    A struct of Arrow has all its keys in every row; the `feature` of `datasets` says what is one.
    Where nobody knows (`_ANY_OBJECT`), every null of an object is taken for padding.
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


def check_template_kwargs(given: Any) -> dict[str, Any]:
    """Return arguments of a template, or raise TemplateError where they cannot be such."""
    if not isinstance(given, Mapping):
        raise TemplateError(f"no object: {given!r:.60}")
    if taken := {"messages", "tools", "documents", "add_generation_prompt"} & given.keys():
        raise TemplateError(f"{min(taken)!r} is no argument to give: every template gets it anyway")
    return dict(given)


def _parsed_json(value: Any) -> Any:
    """Parse a string that holds a JSON list or object; return anything else as it is."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        with contextlib.suppress(ValueError, RecursionError):
            return json.loads(value)
    return value


def _read_objects(value: Any, what: str) -> list[dict[str, Any]]:
    """Read a list of objects, also as JSON or each as JSON; [] where there is none."""
    value = _parsed_json(value)
    if not value or (isinstance(value, str) and value.strip().lower() in ("", "null", "none")):
        return []
    value = [*map(_parsed_json, value)] if isinstance(value, list) else value
    if not isinstance(value, list) or not all(isinstance(each, dict) for each in value):
        raise ConversationError("malformed", f"{what}: no list of objects: {value!r:.60}")
    return value


def _read_messages(value: Any, column: str) -> Messages:
    """Read a cell that holds a list of messages, also as JSON, or a struct of lists."""
    value, why = _parsed_json(value), "is no list of messages"
    if value is None:
        raise ConversationError("null", f"column {column!r} is null")
    if isinstance(value, dict):  # a struct of lists: what `datasets` makes of a list of structs
        sizes = {len(each) if isinstance(each, list) else None for each in value.values()}
        if len(sizes) < 2 and None not in sizes:
            rows = zip(*value.values(), strict=True)
            value = [dict(zip(value, each, strict=True)) for each in rows]
        why = "is one object, or lists of different length, not a list of messages"
    if not isinstance(value, list):
        raise ConversationError("malformed", f"column {column!r} {why}")
    if not value:
        raise ConversationError("empty", "the conversation has no messages")
    return [_read_message(message) for message in value]


def _read_pair(cells: Mapping[str, Any], columns: ConversationColumns) -> Messages:
    """Build the messages of a row with a question and an answer, each text or messages."""
    found: Messages = []
    for role, column in (("assistant", columns.assistant), ("user", columns.user)):
        value = cells[str(column)]
        if isinstance(value, list) and value and isinstance(value[0], dict):
            messages = _read_messages(value, str(column))
        elif found and found[0]["role"] not in ("assistant", "tool"):
            return found  # the whole conversation, as preference data has it in `chosen`
        else:
            text = _cell_text(cells, column)
            if role == "user" and (context := _cell_text(cells, columns.context, needed=False)):
                text += f"\n\n{context}"
            messages = [{"role": role, "content": text}]
        found = _join_prompt(messages, found) if found else messages
    return found


def _join_prompt(prompt: Messages, answer: Messages) -> Messages:
    """Put before an answer what of its prompt it does not hold; it may be a whole conversation."""
    first = answer[0]["role"]
    if first in ("assistant", "tool"):
        return prompt + answer
    if first in _INSTRUCTORS:
        return answer
    lead = [*itertools.takewhile(lambda message: message["role"] in _INSTRUCTORS, prompt)]
    asked, said = (
        [(message["role"], str(message.get("content")).strip()) for message in messages]
        for messages in (prompt[len(lead) :], answer)
    )
    again = next(n for n in range(len(asked), -1, -1) if asked[len(asked) - n :] == said[:n])
    kept = prompt[len(lead) : len(prompt) - again]
    if not again and asked and (asked[-1][0] != "assistant" or asked[0] == said[0]):
        kept = []  # the same question in other words, or the same conversation again
    return [*lead, *kept, *answer]


def _cell_text(cells: Mapping[str, Any], column: str | None, *, needed: bool = True) -> str:
    """Return a cell as text, numbers written out; "" for nothing where that may be."""
    value = cells.get(str(column))
    if value is None or value != value or (isinstance(value, str) and not value.strip()):
        if not needed:
            return ""
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
    calls = _read_objects(message.pop("tool_calls", None), "the tool calls of a message")
    if old := message.pop("function_call", None):  # the one call, as OpenAI had it at first
        (call,) = _read_objects([old], "the function call of a message")
        calls = [*calls, {"type": "function", "function": call}]
    message |= {"tool_calls": calls} if calls else {}
    if not isinstance(weight := message.get("weight", 1), (int, float)):
        raise ConversationError("malformed", f"a weight is no number: {weight!r:.60}")
    content, reasoning = _content_text(content, role)
    if reasoning:
        if any(message.get(key) not in (None, "", reasoning) for key in _REASONING_KEYS):
            raise ConversationError("malformed", "a message gives its reasoning twice")
        message["reasoning_content"] = reasoning
    if content is None and not any(map(message.get, ("tool_calls", *_REASONING_KEYS))):
        raise ConversationError("null", f"a message of the {role} has no content")
    return {"role": role, **({} if content is None else {"content": content}), **message}


def _content_text(content: Any, role: str) -> tuple[Any, str]:
    """Return content as text (the structured result of a tool as it is), and reasoning parts."""
    if content is None or isinstance(content, str):
        return content, ""
    said: dict[str, list[str]] = {"text": [], "reasoning": []}
    listed = isinstance(content, list)
    for part in content if listed else [content]:
        part = {"text": part} if isinstance(part, str) else part
        known = part if isinstance(part, dict) else {}
        kind = known.get("type", "text" if known.keys() == {"text"} else None)
        text = known.get("text", known.get(kind))
        into = _PARTS.get(str(kind)) if listed and isinstance(text, str) else None
        if into is None or (into == "reasoning" and role != "assistant"):
            if role == "tool":
                return content, ""
            why = f"a message of the {role} holds more than text: {part!r:.60}"
            raise ConversationError("not_text" if listed else "malformed", why)
        said[into].append(str(text))
    text, reasoning = map("".join, said.values())
    return text if said["text"] or not reasoning else None, reasoning


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

_THINK = r"(?:\w+:)?(?:think(?:ing)?|thought|reason(?:ing)?)(?::\w+)?"
_OPEN = rf"(?:<\|?{_THINK}\|?>|\[THINK\]|◁think▷|<\|START_THINKING\|>|<\|channel>thought\n)"
_CLOSE = rf"(?:</{_THINK}>|\[/THINK\]|◁/think▷|<\|END_THINKING\|>|<channel\|>)"
_THINK_TAG = re.compile(f"{_OPEN}|{_CLOSE}", re.IGNORECASE)
_EMPTY_THINK = re.compile(rf"\s*(?:{_OPEN}\s*)?{_CLOSE}\s*", re.IGNORECASE)


# Tokenizer and template ---------------------------------------------------------------------------


def load_tokenizer(
    model: str,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> Any:
    """Load the tokenizer of a model with the chat template beside it.

    Args:
        model: Hub id or local folder.
        revision: branch, tag or commit on the Hub.
        trust_remote_code: run code that the tokenizer brings along.

    Where the Hub is out of reach, what its local cache holds is taken.

    Raises:
        LogitsError: there is none, or it needs a package or `--trust-remote-code`.
    """
    folder, model = local_path(model), check_name(model)
    if folder.is_file() or (model.startswith((".", "/", "~")) and not folder.exists()):
        why = "no such folder; give the one that holds config.json and the tokenizer, or a Hub id"
        raise LogitsError(f"model {model!r}: {why}")
    where = str(folder) if folder.is_dir() else model
    away = not folder.is_dir() and not hub_answers(model)
    how: dict[str, Any] = {"revision": revision, "local_files_only": away}
    auto = import_extra("transformers").AutoTokenizer
    try:
        tokenizer = auto.from_pretrained(where, trust_remote_code=trust_remote_code, **how)
    except Exception as error:  # it may run code of its own
        why = f"the Hub is out of reach and no tokenizer of {model} is in its cache here"
        away = away and isinstance(error, OSError)
        raise LogitsError(why if away else _explain_tokenizer(model, folder, error)) from error
    if type(tokenizer).__name__.startswith("MistralCommon"):
        why = "mistral-common's tokenizer gives neither a chat template nor character offsets"
        raise LogitsError(f"model {model!r}: {why}; use a copy that holds tokenizer.json")
    if not getattr(tokenizer, "chat_template", None):
        raises = (
            "_raise_exceptions_for_missing_entries",
            "_raise_exceptions_for_connection_errors",
        )
        how |= dict.fromkeys(raises, False)
        find = importlib.import_module("transformers.utils").cached_file
        if (beside := find(where, "chat_template.json", **how)) is not None:
            where = f"the chat_template.json of model {model!r}"
            tokenizer.chat_template = _read_template(Path(beside), where)
    return tokenizer


_NEEDS = re.compile(  # how transformers and the code of tokenizers name packages that they lack
    r"`pip install (?:-U )?([^`]+)`|requires the (\w+) library|install ([\w-]+) to use|"
    r"No module named '(?!transformers_modules)([\w-]+)"
)
_NEEDED_BY = {"tekken.json": "mistral-common", "tokenizer.model": "sentencepiece"}


def _explain_tokenizer(model: str, folder: Path, error: BaseException) -> str:
    """Say why a tokenizer cannot be loaded and what to do."""
    cause = root_cause(error)
    said, why = f"{error} {cause}", f"{type(cause).__name__}: {first_line(cause)}"
    found = _NEEDS.search(said)
    packages = next(filter(None, found.groups())).lower().split() if found else []
    if not (folder / "tokenizer.json").is_file():  # then others are tried, and theirs is named
        packages = [p for name, p in _NEEDED_BY.items() if (folder / name).is_file()] or packages
    modules = {package: re.split(r"\W", package.replace("-", "_"))[0] for package in packages}
    if missing := " ".join(p for p, m in modules.items() if importlib.util.find_spec(m) is None):
        return f"the tokenizer of model {model!r} needs {missing}: pip install {missing}"
    if "trust_remote_code" in said:
        return f"the tokenizer of model {model!r} runs code of its own: --trust-remote-code"
    if isinstance(error, ImportError):
        return f"the code of the tokenizer of model {model!r} does not fit the packages here: {why}"
    return f"no tokenizer for model {model!r}: " + (
        f"the folder holds none that can be read ({why}); copy the files of the tokenizer into it"
        if folder.is_dir()
        else f"{why} (is the name right, and are you logged in? hf auth login); no folder here has "
        "this name either"
    )


def load_chat_template(path: str | None, tokenizer: Any) -> str:
    """Return the Jinja source of a chat template: of the file, else the tokenizer's own.

    The file may be a `chat_template.json`, too. Of named templates it is `default`, and `tool_use`
    where tools are given, as transformers has it. Raises TemplateError.
    """
    if path is not None:
        source, where = _read_template(local_path(path), f"--chat-template {path!r}"), repr(path)
    elif source := getattr(tokenizer, "chat_template", None):
        where = "of the tokenizer"
    else:
        why = f"the tokenizer {getattr(tokenizer, 'name_or_path', '')!r} has no chat template"
        remedy = "give one with --chat-template FILE (or --text-col for plain text)"
        raise TemplateError(f"{why}; {remedy}")
    if isinstance(source, Mapping):
        if "default" not in source:
            why = f"chat templates are called {', '.join(source)}, none of them default"
            raise TemplateError(f"the tokenizer's {why}; give one with --chat-template FILE")
        plain, with_tools = source["default"], source.get("tool_use")
        # each begins on a line of its own, as it does alone: blocks are trimmed and stripped there
        source = plain if with_tools is None else (
            "{%+ if tools is not none %}\n" + with_tools.removesuffix("\n")
            + "{%+ else %}\n" + plain.removesuffix("\n") + "{%+ endif %}"
        )  # fmt: skip
    syntax_error = import_extra("jinja2").TemplateSyntaxError
    try:
        _compile_marked(source)
    except (syntax_error, RecursionError, MemoryError, SyntaxError) as error:
        why = " is nested too deeply to be compiled"
        if isinstance(error, syntax_error):
            why = f", line {error.lineno}: {error.message}"
        remedy = "give another one with --chat-template"
        raise TemplateError(f"chat template {where}{why}; {remedy}") from error
    return str(source)


def _read_template(path: Path, name: str) -> Any:
    """Read a template file; JSON is unwrapped as transformers writes it."""
    try:
        with path.open(encoding="utf-8-sig") as file:
            text = file.read(MAX_TEXT_BYTES + 1)
    except (OSError, UnicodeDecodeError) as error:
        raise TemplateError(f"{name} cannot be read: {first_line(error)}") from error
    if len(text) > MAX_TEXT_BYTES:
        raise TemplateError(f"{name} is no template: it is larger than {MAX_TEXT_BYTES >> 20} MiB")
    try:
        given = json.loads(text)
    except (ValueError, RecursionError):
        given = None
        if path.suffix != ".json":
            return text
    with contextlib.suppress(KeyError, TypeError):
        found = given["chat_template"]
        if isinstance(found, list):
            return {each["name"]: each["template"] for each in found}
        if isinstance(found, (str, dict)):
            return found
    raise TemplateError(f'{name} is no JSON object with a string "chat_template"')


def hash_template(source: str) -> str:
    """Return the SHA-256 of a chat template, by which runs are compared."""
    return hashlib.sha256(source.encode()).hexdigest()


def date_of_today() -> str:
    """Return the date here and now as YYYY-MM-DD."""
    return datetime.now().astimezone().date().isoformat()


# Rendering with marks -----------------------------------------------------------------------------


def _names_called(message: Mapping[str, Any]) -> list[Any]:
    calls = [c for c in message.get("tool_calls") or () if isinstance(c, Mapping)]
    return [dict(call.get("function") or call).get("name") for call in calls]


class Rendering(NamedTuple):
    """A rendered conversation: `runs` tell which message wrote what, None: the template itself."""

    text: str
    runs: list[tuple[int, int, int | None]]  # start, end, number of the message
    marked: list[Span]  # inside {% generation %} … {% endgeneration %}, ascending

    def shown(self) -> set[int | None]:
        """Return the messages that wrote more than blanks."""
        return {number for a, b, number in self.runs if self.text[a:b].strip()}

    def last_told(self, messages: Messages) -> Rendering:
        """Give the last message what a template writes of it when its loop is over."""
        last, after = len(messages) - 1, self.runs[-2:]
        if [who for *_, who in after] != [last - 1, None] or last in self.shown():
            return self
        start, end, _ = after[1]
        says = [messages[-1].get("content"), *_names_called(messages[-1])]
        told = any(said and str(said).strip() in self.text[start:end] for said in says)
        return self._replace(runs=[*self.runs[:-1], (start, end, last)]) if told else self

    def marks(self, said: str) -> bool:
        """Tell whether some text stands inside the markers."""
        return any(said in self.text[a:b] for a, b in self.marked)


class _Marks:
    """What a marked template calls while it renders one conversation.

    It bounds the work of a template, which comes from strangers, in steps and characters: not in
    seconds, so that every machine refuses the same conversations.
    """

    def __init__(self, chat: Messages, used: str) -> None:
        self.number_of = {id(message): number for number, message in enumerate(chat)}
        self.edge = next(chr(c) for c in range(0xE000, 0xF8FF) if chr(c) not in used)
        self.loops: list[tuple[str, int]] = []  # those under way, and the message that each is at
        self.work_left = 10**8 + 10**4 * len(chat)  # a million steps, some 100 more a message

    def spend(self, work: int) -> None:
        self.work_left -= work
        if self.work_left < 0:
            why = "it loops for too long or writes too much"
            raise import_extra("jinja2").exceptions.SecurityError(why)

    def mark(self, kind: str, *values: Any) -> str:
        """Return a mark where a loop comes to another message, or is over (no `values`).

        The loop "" is only counted; "+" and "-" open and close what {% generation %} marks.
        """
        self.spend(100)
        if kind in ("", "+", "-"):
            return kind and f"{self.edge}{kind}{self.edge}"
        at = next((self.number_of[id(v)] for v in values if id(v) in self.number_of), None)
        depth = next((n for n, loop in enumerate(self.loops) if loop[0] == kind), len(self.loops))
        before, self.loops[depth:] = self.loops[-1:], [] if at is None else [(kind, at)]
        now = self.loops[-1:]
        return "" if now == before else f"{self.edge}{now[0][1] if now else ''}{self.edge}"

    def split(self, out: str) -> Rendering:
        """Cut the marks out of what a template wrote."""
        text, place, owner = [], 0, None
        runs: list[tuple[int, int, int | None]] = []
        marked: list[Span] = []
        for number, piece in enumerate(out.split(self.edge)):
            if number % 2 == 0:
                joins = bool(runs) and runs[-1][2] == owner
                start = runs.pop()[0] if joins else place
                text.append(piece)
                place += len(piece)
                runs += [(start, place, owner)] if place > start else []
            elif piece == "+":
                marked.append((place, place))
            elif piece == "-":
                marked[-1:] = [(a, place) for a, _ in marked[-1:]]
            else:
                owner = int(piece) if piece else None
        return Rendering("".join(text), runs, marked)


@lru_cache(maxsize=64)
def _compile_marked(source: str, *, inside: bool = True) -> tuple[Any, bool]:
    """Compile a template that calls `_Marks.mark` where it comes to an item of a loop, and after.

    No loop is marked where the template captures what it writes (macros, blocks of `set`, filters):
    there a mark could change the text. `{% generation %}` is, with `inside`; the second value tells
    whether there is such a place.
    """
    utils = import_extra("transformers.utils.chat_template_utils")
    jinja2 = import_extra("jinja2")
    nodes, count = jinja2.nodes, itertools.count()

    class AddMarks(jinja2.visitor.NodeTransformer):  # type: ignore[name-defined]
        loops: tuple[tuple[str, list[str]], ...] = ()
        captured = found_inside = False

        def mark(self, kind: str, *names: str) -> Any:
            given = [nodes.Const(kind), *(nodes.Name(name, "load") for name in names)]
            call = nodes.Call(nodes.EnvironmentAttribute("mark"), given, [], None, None)
            return nodes.Output([call])

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
            """Mark `{% set message = messages[i] %}`, also by `messages[loop.index0]`."""
            self.generic_visit(node)
            if self.captured or not self.loops or not isinstance(node.node, nodes.Getitem):
                return node
            kind, names = self.loops[-1]
            number = node.node.arg
            number = number.node if getattr(number, "attr", "") == "index0" else number
            known = isinstance(number, nodes.Name) and number.name in (*names, "loop")
            if not known or not isinstance(node.target, nodes.Name):
                return node
            return [node, self.mark(kind, node.target.name)]

        def visit_Concat(self, node: Any) -> Any:  # as a sum, which the sandbox can count
            texts = (nodes.Filter(part, "_str", [], [], None, None) for part in node.nodes)
            return self.generic_visit(functools.reduce(nodes.Add, texts))

    # of an empty template: to compile this one unbound would compute its constants, however large
    environment = _bound_work(utils._compile_jinja_template("").environment)
    marker = AddMarks()
    tree = marker.visit(environment.parse(source))
    return environment.from_string(tree), marker.found_inside


# What may write far more than it is given, by how large that is and by the numbers beside it.
_AMPLIFIERS = {"*", "replace", "join", "sum", "center", "ljust", "rjust", "zfill", "expandtabs",
               "indent", "wordwrap", "tojson", "batch", "slice", "urlize", "to_bytes"}  # fmt: skip
# What writes a list as text: one that holds another twice may be larger than it looks.
_WRITERS = {"string", "upper", "lower", "capitalize", "title", "trim", "escape", "e", "forceescape",
            "striptags", "pprint", "urlencode", "wordcount", "_str", ""}  # fmt: skip


def _bound_work(plain: Any) -> Any:
    """Return the sandbox with its operators, filters and methods counted by what they write."""
    environment, jinja2 = plain.overlay(), import_extra("jinja2")

    def count(context: Any, name: str, *values: Any) -> None:
        work = _written(name, values)
        context.parent["_marks"].spend(work if work > 10**6 else work // 100)

    def spend(context: Any, name: str, args: Any, kwargs: Mapping[str, Any]) -> list[Any]:
        args = [list(value) if isinstance(value, Iterator) else value for value in args]
        count(context, name, *args, *kwargs.values())
        return args

    def binop(context: Any, operator: str, left: Any, right: Any) -> Any:
        count(context, operator, left, right)
        return plain.binop_table[operator](left, right)

    def call(context: Any, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        if function is environment.mark:
            return context.parent["_marks"].mark(*args)
        method = getattr(function, "__wrapped__", function)  # the sandbox wraps str.format
        given: Sequence[Any] = args
        if isinstance(owner := getattr(method, "__self__", None), (str, bytes, int)):
            given = spend(context, method.__name__, (owner, *args), kwargs)[1:]
        return plain.call(context, function, *given, **kwargs)

    def bounded(name: str) -> Any:
        def run(context: Any, *args: Any, **kwargs: Any) -> Any:
            value, *more = spend(context, name, args, kwargs)
            return plain.call_filter(name, value, more, kwargs, context)

        return jinja2.pass_context(run)

    def show(context: Any, value: Any) -> Any:
        if isinstance(value, (list, tuple, Mapping)):
            count(context, "", value)
        return value

    environment.mark = object()
    environment.finalize = jinja2.pass_context(show)
    environment.intercepted_binops = frozenset(("+", "%", "*", "**"))
    environment.call_binop, environment.call = binop, call
    plain.filters["_str"] = str
    own = {n: bounded(n) for n in plain.filters if n in {*_AMPLIFIERS, *_WRITERS, "format"}}
    environment.filters = {**plain.filters, **own}
    environment.globals = {k: v for k, v in plain.globals.items() if k != "lipsum"}
    return environment


def _written(name: str, values: Sequence[Any]) -> int:
    """Return about how many characters or items an operation writes, at most."""
    sized = [v for v in values if hasattr(v, "__len__")]
    if name == "+" or (name == "*" and not sized):
        return sum(map(len, sized))
    if name in _AMPLIFIERS:
        return math.prod(max(1, abs(v) if isinstance(v, int) else _size(v)) for v in values)
    if name in _WRITERS:
        return _size(values[0])
    first, *others = values
    if name == "**":
        return int(abs(first)).bit_length() * int(abs(others[0]))
    if name not in ("%", "format", "format_map") or not isinstance(first, str):
        return 0
    # by the widths in the format, or given beside it, and by what is put into it
    others = [*others[0]] if len(others) == 1 and isinstance(others[0], tuple) else others
    widths = sum(map(int, re.findall(r"\d+", "".join(re.findall(r"[%:][^%:{}]*", first)))))
    if re.search(r"%[^a-zA-Z%]*\*|:[^}]*\{", first):
        widths += sum(abs(n) for n in others if isinstance(n, int))
    return widths + (first.count("%") + first.count("{")) * sum(map(_size, others))


def _size(value: Any) -> int:
    """Return about how many characters it takes to write a value; of over a million items, many."""
    size, seen, items = 0, 0, [value]
    while items and seen < 10**6:
        item = items.pop()
        if isinstance(item, (Mapping, list, tuple)):
            items += [*item, *item.values()] if isinstance(item, Mapping) else item
            seen += len(item)
        size += len(item) if hasattr(item, "__len__") else 1
    return 10**12 if items else size


@dataclass(frozen=True)
class ChatTemplate:
    """A template with what a short probe conversation showed about it."""

    source: str  # Jinja
    given: Mapping[str, Any]  # beside messages: special tokens, and the template's arguments
    added: tuple[str, ...]  # the tokenizer's added tokens, blank ones left out; longest first
    tokens: re.Pattern[str]  # one or more of them back to back, with the blanks before them
    moment: datetime  # told to a template that asks for the time
    parts: bool = False  # content must be given as a list of text parts
    loops: bool = True  # it writes a message when it comes to it in a loop; else `replaced_turns`
    shows_tools: bool = True
    marked: bool = False  # `{% generation %}` markers cover the assistant's content
    prompt: str = ""  # the generation prompt, such as "<|im_start|>assistant\n"
    tails: tuple[str, ...] = ()  # what it writes after what an assistant says; longest first
    inserted: tuple[str, ...] = ()  # think tags that it writes where the data has none; the same
    closing: str = ""  # the token by which what follows a turn ends it, where it does not itself

    @cached_property
    def header(self) -> str:
        """The generation prompt without the think tags that it ends in."""
        return re.sub(rf"{_OPEN}\s*(?:{_CLOSE}\s*)?\Z", "", self.prompt, flags=re.IGNORECASE)

    @property
    def ends(self) -> tuple[str, ...]:
        """What ends a turn, such as "<|im_end|>"; longest first."""
        found = {tail[: self.through_tokens(tail)].strip() for tail in (*self.tails, self.closing)}
        return tuple(sorted(filter(None, found), key=len, reverse=True))

    def through_tokens(self, tail: str) -> int:
        """Return how much of a tail is the turn's end: its first tokens, else all but blanks."""
        found = self.tokens.match(tail)
        return found.end() if found else len(tail.rstrip())

    def render(self, messages: Messages, tools: Any = None, *, prompt: bool = False) -> Rendering:
        """Render a conversation; `prompt` appends the generation prompt.

        The reasoning of a message is offered under each name that templates read, as transformers
        does from 5.22 on, so that every version writes the same text.
        """
        chat = []
        for message in messages:
            said = [message[key] for key in _REASONING_KEYS if message.get(key) is not None]
            named = {"thinking": said[0]} | message | {"reasoning_content": said[0]} if said else {}
            chat.append({**(named or message)})
            if self.parts and isinstance(message.get("content"), str):
                chat[-1]["content"] = [{"type": "text", "text": message["content"]}]
        used = json.dumps([chat, tools, self.given], ensure_ascii=False, default=str) + self.source
        clock = {"strftime_now": self.moment.strftime, "documents": None}
        given = {**clock, **self.given, "messages": chat, "tools": tools}

        def write(*, inside: bool) -> Rendering:
            template, marks = _compile_marked(self.source, inside=inside)[0], _Marks(chat, used)
            out = template.render(**given, add_generation_prompt=prompt, _marks=marks)
            return marks.split(out)

        jinja2 = import_extra("jinja2")
        try:
            rendering = write(inside=True)
            if _compile_marked(self.source)[1]:  # marks where they might change what is written
                plain = write(inside=False)
                rendering = rendering if rendering.text == plain.text else plain
            return rendering if prompt else rendering.last_told(messages)
        except (jinja2.TemplateError, RecursionError, MemoryError, SyntaxError, TypeError,
                ValueError, LookupError, AttributeError, ArithmeticError) as error:  # fmt: skip
            sandbox = isinstance(error, jinja2.exceptions.SecurityError)
            who = "the sandbox of templates refuses" if sandbox else "the template says"
            why = f"{who}: {first_line(error)}"
            raise ConversationError("refused_by_template", why) from error

    def try_render(self, messages: Messages, tools: Any = None, **how: bool) -> Rendering | None:
        """Render, or return None where the template refuses."""
        try:
            return self.render(messages, tools, **how)
        except ConversationError:
            return None


# What a plain conversation shows of a template ----------------------------------------------------


def prepare_template(
    tokenizer: Any,
    chat_template: str | None = None,
    *,
    template_kwargs: Mapping[str, Any] | None = None,
    date: str | None = None,
) -> ChatTemplate:
    """Probe a template once per tokenizer, template and arguments; later calls are free.

    Raises TemplateError where it never shows what an assistant says.
    """
    source = load_chat_template(None, tokenizer) if chat_template is None else chat_template
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    given = json.dumps({**special, **(template_kwargs or {})}, sort_keys=True)
    return _probe_template(tokenizer, source, given, len(tokenizer), date or date_of_today())


@lru_cache(maxsize=64)
def _probe_template(tokenizer: Any, source: str, given: str, _size: int, date: str) -> ChatTemplate:
    found = {*tokenizer.get_added_vocab(), *tokenizer.all_special_tokens}
    found = {token for token in found if token.strip("\u2581 \t\n\r")}  # Gemma adds line breaks
    added = tuple(sorted(found, key=lambda token: (-len(token), token)))
    tokens = re.compile(r"\s*(?:" + ("|".join(map(re.escape, added)) or "(?!)") + ")+")
    moment = datetime.fromisoformat(date)
    plain, why = ChatTemplate(source, json.loads(given), added, tokens, moment), ""
    ways: Iterable[Any] = itertools.product((True, False), (False, True), ((), ("system",)))
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    try:
        plain.render(chat)
    except ConversationError as error:
        why = f" ({error})"
        hostile = isinstance(error.__cause__, import_extra("jinja2").exceptions.SecurityError)
        ways = () if hostile else ways
    name = chr(0xE200) * 3
    tool = {"type": "function", "function": {"name": name, "description": "", "parameters": {}}}
    for loops, parts, opening in ways:
        template = replace(plain, parts=parts, loops=loops)
        if facts := _probe_turns(template, opening):
            asked = template.try_render(chat, [tool])
            shows = asked is None or name in asked.text or "\\ue200" in asked.text
            return replace(template, shows_tools=shows, **facts)
    raise TemplateError(
        f"the chat template cannot be used{why}: it does not show what the assistant says in a "
        "plain conversation of two messages; give another one with --chat-template FILE"
    )


def _probe_turns(template: ChatTemplate, opening: tuple[str, ...]) -> dict[str, Any] | None:
    """Learn generation prompt, markers, ends of turns and inserted tags; None: not shown."""
    says = [chr(0xE100 + n) * 3 for n in range(5)]
    roles = (*opening, "user", "assistant", "user", "assistant")
    chat: Messages = [{"role": r, "content": s} for r, s in zip(roles, says, strict=False)]
    n = len(opening) + 1  # the first answer
    shown = [r for r in (template.try_render(chat[:k]) for k in (n + 1, len(chat))) if r]
    if not shown or says[n] not in shown[0].text:
        return None
    asked, before = (template.try_render(chat[:n], prompt=p) for p in (True, False))
    prompt = ""
    if asked and before:  # what follows the messages, but for what follows them anyway
        end = max([b for _, b, who in asked.runs if who is not None], default=0)
        tells = end and asked.text[end:].strip()
        end = end if tells else _shared_prefix(asked.text, before.text)
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
        tails = [tail for _, tail in turns]
        common = _shared_prefix(tails[0], tails[-1]) if len(tails) > 1 else len(tails[0])
        ends = [found.end() if (found := template.tokens.match(tail)) else 0 for tail in tails]
        turns = [(h, tail[: common or end]) for (h, tail), end in zip(turns, ends, strict=True)]
    if not prompt.strip() and turns[0][0].strip():
        prompt = turns[0][0]
    closing = ""
    for text, runs, _ in shown if template.loops else []:
        end = max((b for _, b, who in runs if who == n), default=len(text))
        token = next((token for token in template.added if text.startswith(token, end)), "")
        alone = text[end:].strip() == token != prompt.strip()
        if alone or token not in text[: text.find(says[n - 1])]:  # else it begins other turns
            closing = closing or token
    header = replace(template, prompt=prompt).header
    heads = {head.removeprefix(header) for head, _ in turns if head.startswith(header)}
    return {
        "prompt": prompt,
        "marked": shown[0].marks(says[n]),
        "tails": tuple(sorted({tail for _, tail in turns}, key=len, reverse=True)),
        "inserted": tuple(sorted(filter(_THINK_TAG.search, heads), key=len, reverse=True)),
        "closing": "" if any(tail.strip() for _, tail in turns) else closing,
    }


def _shared_prefix(one: str, two: str) -> int:
    differ = (n for n, (x, y) in enumerate(zip(one, two, strict=False)) if x != y)
    return next(differ, min(len(one), len(two)))


# Which characters are the assistant's -------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Choice:
    """Which tokens of a conversation are extracted, and what else its template is given."""

    include_think: bool = False  # think tags that the template inserts and the data lacks, too
    include_end: bool = False  # what the template appends after the end-of-turn token, too
    turns: str = "all"  # of the assistant, or the "last" one
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    date: str | None = None  # YYYY-MM-DD, for a template that prints the date; None: today's


_EVERY_TURN = Choice()


@dataclass(frozen=True)
class RenderedConversation:
    """A conversation as text, and the character spans of it that are extracted."""

    text: str
    spans: list[Span]  # ascending and disjoint
    way: str  # how they were found, see `WAYS`
    end_of_turn: str | None = None  # what was taken to end a turn, None if nothing was
    notes: tuple[str, ...] = ()  # what the template was given and does not show, see `warn_once`


WAYS = {
    "generation": "the template's markers",
    "loop": "what the template writes for each message",
    "replacing": "what changes with what the assistant says",
    "text": "all of the text",
}


def render_conversation(
    messages: Messages,
    template: ChatTemplate,
    *,
    tools: Any = None,
    choice: Choice = _EVERY_TURN,
    check: Callable[[str], None] | None = None,
) -> RenderedConversation:
    """Render a conversation and find what the assistant itself would have to write.

    That is: from the end of the generation prompt through the end-of-turn token of every assistant
    turn that is chosen and whose `weight` is not 0, tool calls and shown reasoning included.
    `check` may refuse the text before turns are looked for.
    """
    answers = [n for n, message in enumerate(messages) if message.get("role") == "assistant"]
    if not answers:
        roles = ", ".join(sorted({str(message.get("role")) for message in messages}))
        raise ConversationError("no_assistant", f"no message is the assistant's: roles {roles}")
    answers = answers if choice.turns == "all" else answers[-1:]
    wanted = {n for n in answers if messages[n].get("weight", 1) != 0}
    chat, rendering = _render_dialects(messages, template, tools)
    text = rendering.text
    if check is not None:
        check(text)
    reader = _TurnReader(template, chat, tools, rendering, choice)
    if not template.marked and reader.switches_markers(answers):
        template = replace(template, marked=True)
        reader = replace(reader, template=template)
    found, way = reader.turns(wanted), "generation" if template.marked else "loop"
    if not template.loops or reader.doubts(wanted, found):
        found, way = reader.replaced_turns(wanted), "replacing"
    spans: list[Span] = []  # ascending, joined where they touch
    for start, end in sorted(span for _, span in found if span[1] > span[0]):
        if spans and start <= spans[-1][1]:
            start, end = spans[-1][0], max(end, spans.pop()[1])
        spans.append((start, end))
    end_of_turn = next((e for e in template.ends for a, b in spans if e in text[a:b]), None)
    return RenderedConversation(text, spans, way, end_of_turn, reader.notes())


def _render_dialects(
    messages: Messages, template: ChatTemplate, tools: Any
) -> tuple[Messages, Rendering]:
    """Render the conversation in the first way of writing it that the template takes.

    They differ in the arguments of tool calls, an object or JSON text, and in content that is
    lacking: left out, null where the template asks for that (others would print "None"), or empty.
    """
    contents: list[dict[str, Any]] = [{}]
    if any("content" not in message for message in messages):
        asks = re.search(r"content['\"]?\]? is (?:not )?none", template.source)
        contents += [{"content": None}, {"content": ""}] if asks else [{"content": ""}]

    def as_text(given: Any) -> Any:
        is_text = given is None or isinstance(given, str)
        return given if is_text else json.dumps(given, ensure_ascii=False)

    refusals = []
    calls = any(message.get("tool_calls") for message in messages)
    ways = (_parsed_json, as_text) if calls else (_parsed_json,)
    for content, rewrite in itertools.product(contents, ways):
        chat = [_with_arguments({**content, **message}, rewrite) for message in messages]
        try:
            return chat, template.render(chat, tools)
        except ConversationError as error:
            refusals.append(error)
    raise refusals[0]


def _with_arguments(message: dict[str, Any], rewrite: Callable[[Any], Any]) -> dict[str, Any]:
    """Return a message with the arguments of its tool calls rewritten."""

    def change(call: Any) -> Any:
        if not isinstance(call, Mapping):
            return call
        if isinstance(call.get("function"), Mapping):
            return {**call, "function": change(call["function"])}
        return {**call, "arguments": rewrite(call["arguments"])} if "arguments" in call else call

    calls = message.get("tool_calls")
    return {**message, "tool_calls": [*map(change, calls)]} if calls else message


@dataclass(frozen=True)
class _TurnReader:
    """Cuts the turns of a rendered conversation to what the assistant writes of them."""

    template: ChatTemplate
    chat: Messages
    tools: Any
    rendering: Rendering
    choice: Choice
    found: dict[Any, str] = field(default_factory=dict)  # by another rendering, for a kind of turn

    @cached_property
    def said(self) -> list[str]:
        """What each message says, as text."""
        return [str(message.get("content") or "").strip() for message in self.chat]

    def switches_markers(self, answers: Sequence[int]) -> bool:
        """Tell whether markers that the probe does not meet cover answers here.

        That is by a field of the messages, such as `trained`; where a boolean or number leaves all
        of them out, the markers are met with its opposite.
        """
        if "endgeneration" not in self.template.source:
            return False
        says = {self.said[n] for n in answers} - {""}
        other = [
            {k: not v if isinstance(v, (int, float)) else v for k, v in message.items()}
            for message in self.chat
        ]
        ways = [self.rendering, other != self.chat and self.template.try_render(other, self.tools)]
        return any(way.marks(said) for way in ways if way for said in says)

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
            begun.add(number)
            if is_first:
                start += self.header_length(number, a, b)
            if template.marked:
                start, end = max(start, inside[0][0]), inside[-1][1]
                if not self.choice.include_end and self.written(start, end) is None:
                    found = template.tokens.match(text, end, b)  # right after the markers
                    end = found.end() if found else end
            elif self.chat[number].get("tool_calls"):
                end += self.closing_of_calls(number, a, b, first=is_first)
            if not template.marked and text.startswith(template.closing, b):
                end = max(end, b + len(template.closing))
            spans.append((number, self.cut(number, start, end, a)))
        last = max(n for n, message in enumerate(self.chat) if message["role"] == "assistant")
        if template.marked and self.choice.include_end and last in begun:
            after = max(b for _, b, who in runs if who is not None)
            spans += [(last, span) for span in marked if span[0] >= after]
        return spans

    def header_length(self, number: int, a: int, b: int) -> int:
        """Return how much of a turn's text the generation prompt gives."""
        template, before, said = self.template, self.rendering.text[:a], self.rendering.text[a:b]
        prompt = template.header if template.marked else template.prompt
        for given in (prompt, template.header):
            if given and said.startswith(given):
                return len(given)
            if given.strip() and number == 0 and given in said:  # a default system message before
                return said.index(given) + len(given)
        if not prompt:
            return 0
        if (named := self.named_header(number, said)) is not None:
            return named
        near = [{}, *self.chat][number : number + 2]  # the message before, if any, and this one
        told = [tuple(key for key, value in message.items() if value) for message in near]
        kind = ("header", *told, near[0].get("role"), said[:40])
        if kind not in self.found:
            asked = template.try_render(self.chat[:number], self.tools, prompt=True)
            text = asked.text if asked else ""
            longest = range(min(len(text), len(said), len(prompt) + 256), 0, -1)  # short, headers
            given = said[: next((n for n in longest if text.endswith(said[:n])), 0)]
            if not given.strip():  # the prompt goes on otherwise: whole tokens and lines are given
                given = text[a:] if text.startswith(before) else prompt
                given = said[: _shared_prefix(given, said)]
                whole = [token.end() for token in template.tokens.finditer(given)]
                given = given if given == said else given[: max(given.rfind("\n") + 1, 0, *whole)]
            self.found[kind] = given
        header = self.found[kind]
        if not header.strip() or not said.startswith(header):
            return 0
        more = template.header if said.startswith(template.header, len(header)) else ""
        return len(header + more)

    @cached_property
    def unnamed(self) -> _TurnReader | None:
        """The same conversation, whose assistant has no `name`; None where that is refused."""
        chat = [
            {k: v for k, v in message.items() if k != "name" or message["role"] != "assistant"}
            for message in self.chat
        ]
        rendering = self.template.try_render(chat, self.tools)
        return rendering and replace(self, chat=chat, rendering=rendering)

    def named_header(self, number: int, said: str) -> int | None:
        """Return the length of a header that holds the speaker's `name`; None: it holds none.

        The generation prompt has no name: the turn without it ends in the same words.
        """
        if not self.chat[number].get("name") or not (plain := self.unnamed):
            return None
        text, runs, _ = plain.rendering
        a, b = next(((x, y) for x, y, who in runs if who == number), (0, 0))
        rest = text[a + plain.header_length(number, a, b) : b]
        return len(said) - len(rest) if rest and said.endswith(rest) else None

    def closing_of_calls(self, number: int, a: int, b: int, *, first: bool) -> int:
        """Return how much of the next turn's text closes this one's calls.

        That is what also follows the calls where the conversation stops there.
        """
        message, said = self.chat[number], self.rendering.text[a:b][-40:]
        kind = ("closing", first, *sorted(key for key, value in message.items() if value))
        if kind not in self.found:
            silent = {"content": ""} if message.get("content") else {}
            chat = [*self.chat[:number], {**message, **silent}]
            stopped = self.template.try_render(chat, self.tools) or Rendering("", [], [])
            own = [stopped.text[x:y] for x, y, who in stopped.runs if who == number]
            self.found[kind] = own[-1].rpartition(said)[2] if own and said in own[-1] else ""
        more = self.found[kind]
        return _shared_prefix(more, self.rendering.text[b : b + len(more)]) if more.strip() else 0

    def written(self, start: int, end: int) -> int | None:
        """Return where an added token ends that a stretch of text ends in, but for blanks."""
        text = self.rendering.text
        written = start + len(text[start:end].rstrip())
        return written if text.endswith(self.template.added, start, written) else None

    def cut(self, number: int, start: int, end: int, base: int) -> Span:
        """Leave out what follows the end of the turn, and inserted think tags at its start."""
        text, template = self.rendering.text, self.template
        if not self.choice.include_end:  # the end is the last token, or what the known tail says
            tail = next((t for t in template.tails if t and text.endswith(t, start, end)), "")
            written = self.written(start, end)
            if written is None or "\n" in tail.strip():
                written = end - len(tail) + template.through_tokens(tail)
            end = written
        if not self.choice.include_think:
            if not template.marked and text.startswith(template.header, base):
                base = min(start, base + len(template.header))
            else:
                base = start
            start = max(start, base + self.inserted_think(text[base:end], self.chat[number]))
        return start, max(start, end)

    def inserted_think(self, said: str, message: Mapping[str, Any]) -> int:
        """Return the length of the think tags that a turn starts with and its data lacks."""
        tag = next((t for t in self.template.inserted if said.startswith(t.rstrip())), "")
        content = given if isinstance(given := message.get("content"), str) else ""
        if not tag and (found := _EMPTY_THINK.match(said)):  # where no plain conversation has any
            tag = found[0].removesuffix(content[: len(content) - len(content.lstrip())])
        if _EMPTY_THINK.match(tag):
            own = bool(_EMPTY_THINK.match(content))
        else:
            reasons = [str(message.get(key) or "").strip() for key in _REASONING_KEYS]
            own = any(reasons) or bool(_THINK_TAG.search(content))
        return 0 if own else _shared_prefix(tag, said)  # blanks after it may be trimmed

    def doubts(self, wanted: set[int], spans: Iterable[tuple[int, Span]]) -> bool:
        """Tell whether the loops do not say who wrote what in this conversation.

        A template may write the next message while it is at this one, or copies of messages: then
        what others say stands in a span, or what the assistant says where no turn of it is.
        """
        text, said = self.rendering.text, self.said
        if any(said[n] and said[n] in text for n in wanted - self.rendering.shown()):
            return True
        for number, (start, end) in spans:
            for n in range(number + 1, len(self.chat)):
                if self.chat[n].get("role") == "assistant":
                    break
                own = repr(said[n])[1:-1] in repr(self.chat[number])
                if len(said[n]) > 2 and said[n] in text[start:end] and not own:
                    return True
        return False

    def replaced_turns(self, wanted: set[int]) -> list[tuple[int, Span]]:
        """Find turns where loops do not show them: by what changes with what a turn says."""
        text, template, spans = self.rendering.text, self.template, []
        mark = next(chr(c) for c in range(0xE000, 0xF8FF) if chr(c) not in text) * 3
        floor = 0

        def marked(given: Any) -> Any:
            return dict.fromkeys(given, mark) if given and isinstance(given, Mapping) else mark

        for number, message in enumerate(self.chat):
            if message.get("role") != "assistant":
                continue
            said = {key: mark for key in ("content", *_REASONING_KEYS) if message.get(key)}
            said |= {} if message.get("tool_calls") else {"content": mark}
            other_message = {**_with_arguments(message, marked), **said}
            chat = [*self.chat[:number], other_message, *self.chat[number + 1 :]]
            other = template.try_render(chat, self.tools)
            if other is None or not (mark in other.text or json.dumps(mark)[1:-1] in other.text):
                continue  # the template does not show the turn
            first = _shared_prefix(text, other.text)
            end = len(text) - _shared_prefix(text[first:][::-1], other.text[first:][::-1])
            prompt = template.prompt
            place = text.rfind(prompt, floor, first) if prompt else -1
            between = text[place + len(prompt) : first]
            calls = bool(message.get("tool_calls"))  # their markup stands around what was replaced
            near = calls or not _THINK_TAG.sub("", template.tokens.sub("", between)).strip()
            start = place + len(prompt) if place >= 0 and near else first
            ends = [text.find(tail, end) for tail in template.tails if calls and tail.strip()]
            after = min((at for at in ends if at >= 0), default=end)
            if not any(said and said in text[end:after] for said in self.said):
                end = after
            tail = next((t for t in template.tails if t and text.startswith(t, end)), "")
            floor = end + len(tail)
            if number in wanted:
                spans.append((number, self.cut(number, start, floor, start)))
        return spans

    def notes(self) -> tuple[str, ...]:
        """Say what was given and does not show: messages, calls, tools."""
        text, shown, found = self.rendering.text, self.rendering.shown(), []
        for number, message in enumerate(self.chat if self.template.loops else []):
            names = _names_called(message)
            said = self.said[number]
            if any(name and str(name) not in text for name in names):
                found.append("the tool calls of an assistant message")
            elif said and number not in shown and (names or said not in text):
                found.append(f"a message of the {message.get('role')}")
            elif names and said not in text and not _THINK_TAG.search(said):
                found.append("what an assistant says beside tool calls")
        if self.tools and not self.template.shows_tools:
            found.append("the tools")
        return tuple(dict.fromkeys(found))


@lru_cache(maxsize=64)
def warn_once(note: str) -> None:
    """Log what a chat template does not show of what it is given, once a process."""
    log.warning("the chat template does not show %s: it is no part of what the teacher reads "
                "(--chat-template)", show_line(note))  # fmt: skip


# Tokens -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class EncodedConversation(RenderedConversation):
    """A conversation as tokens, and which of them are extracted; never the first of all."""

    input_ids: npt.NDArray[np.int32] = field(kw_only=True)  # (S,)
    token_positions: npt.NDArray[np.int32] = field(kw_only=True)  # (N,) ascending, of those chosen


def encode_conversation(
    messages: Messages,
    tokenizer: Any,
    *,
    chat_template: str | None = None,
    tools: Any = None,
    max_tokens: int | None = None,
    **choice: Any,
) -> EncodedConversation:
    """Tokenize a conversation and find the tokens that the assistant itself would have to write.

    A token belongs to the assistant when any of its characters does. The function depends on its
    arguments only; it may run in any process.

    Args:
        messages, tools: as `read_conversation` returns them.
        tokenizer: of transformers, fast or slow.
        chat_template: Jinja source, None for the tokenizer's own.
        max_tokens: refuse text of which a first piece has more than twice as many; what is nearer
            is returned, however long it turns out.
        choice: fields of `Choice`.
    """
    chosen = Choice(**choice)
    template = prepare_template(
        tokenizer, chat_template, template_kwargs=chosen.template_kwargs, date=chosen.date
    )
    rendered = render_conversation(
        messages, template, tools=tools, choice=chosen,
        check=lambda text: _check_text(text, tokenizer, max_tokens),
    )  # fmt: skip
    ids, starts, ends = tokenize_with_offsets(rendered.text, tokenizer)
    positions = token_positions_of(rendered.spans, starts, ends)
    if positions.size == 0:
        why = "the template shows nothing that the assistant says in a turn that counts"
        raise ConversationError("no_tokens", why)
    return EncodedConversation(**vars(rendered), input_ids=ids, token_positions=positions)


def encode_text(text: str, tokenizer: Any, *, max_tokens: int | None = None) -> EncodedConversation:
    """Tokenize plain text as the tokenizer does by itself; every token after the first counts."""
    _check_text(text, tokenizer, max_tokens)
    ids = np.asarray(tokenizer(text, verbose=False)["input_ids"], np.int32).reshape(-1)
    if ids.size < 2:
        raise ConversationError("no_tokens", "the text has no second token to predict")
    positions = np.arange(1, ids.size, dtype=np.int32)
    span = (0, len(text))
    return EncodedConversation(text, [span], "text", input_ids=ids, token_positions=positions)


def _check_text(text: str, tokenizer: Any, max_tokens: int | None) -> None:
    """Refuse what is no text, and what is far too long, by a first piece of it."""
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
class ConversationEncoder(Choice):
    """Turns a source row into token ids and the positions to extract; the same in every process.

    A row's own `chat_template_kwargs` go over `template_kwargs`.
    """

    tokenizer: Any  # the teacher's
    chat_template: str  # Jinja source, "" where `columns` name plain text
    columns: ConversationColumns
    features: Mapping[str, Any] | None = None  # of the columns, None where nobody knows them

    @classmethod
    def of(
        cls, settings: Mapping[str, Any], tokenizer: Any, chat_template: str
    ) -> ConversationEncoder:
        """Return the encoder that a run's settings describe."""
        names = ("include_think", "include_end", "turns", "template_kwargs")
        choice = {name: settings[name] for name in names if settings.get(name)}
        choice["date"] = settings.get("template_date")
        return cls(tokenizer, chat_template, ConversationColumns.of(settings), **choice)

    def for_source(self, source: Any) -> ConversationEncoder:
        """Return an encoder that knows where the rows of an open source hold Arrow's nulls."""
        known = None if source.features is None else dict(source.features)
        return replace(self, features=known)

    def encode(
        self, row: Mapping[str, Any], *, max_tokens: int | None = None
    ) -> EncodedConversation:
        """Return the row's tokens and those to extract; refuse what is far beyond `max_tokens`."""
        if self.columns.text is not None:
            text = _cell_text(row, self.columns.text)
            return encode_text(text, self.tokenizer, max_tokens=max_tokens)
        chat = read_conversation(row, self.columns, self.features)
        choice = {entry.name: getattr(self, entry.name) for entry in fields(Choice)}
        choice["template_kwargs"] = {**self.template_kwargs, **chat.template_kwargs}
        return encode_conversation(
            chat.messages, self.tokenizer, chat_template=self.chat_template, tools=chat.tools,
            max_tokens=max_tokens, **choice,
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


def open_conversations(
    options: ConversationOptions,
    *,
    tokenizer: Any = None,
    date: str | None = None,
    dataset_revision: str | None = None,
) -> tuple[Any, ConversationEncoder]:
    """Open source and encoder of its rows as the options of a script name them.

    A loaded `tokenizer` is not loaded again; `date` is told to a template that asks for the time
    (None: today's). Raises LogitsError where something cannot be used or two options exclude each
    other.
    """
    if options.revision is not None and local_path(options.model).exists():
        raise ConfigError(f"--revision {options.revision}: a local --model has no revisions")
    tokenizer = tokenizer or load_tokenizer(
        options.model, revision=options.revision, trust_remote_code=options.trust_remote_code
    )
    source = open_source(
        options.dataset, subset=options.subset, split=options.split, streaming=options.streaming,
        revision=dataset_revision,
        integers=(options.index_col, getattr(options, "length_col", None)),
    )  # fmt: skip
    names = source_columns(source)
    kinds = ("messages", "user", "assistant", "system", "index", "text")
    columns = resolve_columns(names, **{f"{k}_col": getattr(options, f"{k}_col") for k in kinds})
    if columns.text is not None:
        of_chat = ("chat_template", "template_kwargs", "turns", "include_think", "include_end")
        default = {entry.name: entry.default for entry in fields(options)}
        idle = [n for n in of_chat if (getattr(options, n) or default[n]) != default[n]]
        if idle:
            flags = " and ".join(map(flag_of, idle))
            raise TemplateError(f"{flags}: --text-col uses no chat template")
        return source, ConversationEncoder(tokenizer, "", columns)
    for name in ("system", "system_prompt") if columns.system is None else ():
        if name in names:
            log.warning("the column %r is not used; --system-col %s uses it", name, name)
    if idle := [name for name in names if name not in columns.needed()]:
        log.info("conversations are read without the columns %s", show_line(", ".join(idle)))
    template = load_chat_template(options.chat_template, tokenizer)
    given = check_template_kwargs(options.template_kwargs or {})
    if not prepare_template(tokenizer, template, template_kwargs=given).ends:
        warn_once("an end of the assistant's turn")
    for name in [name for name in given if name not in template][:1]:
        warn_once(f"the argument {name!r}")
    return source, ConversationEncoder(
        tokenizer, template, columns, include_think=options.include_think,
        include_end=options.include_end, turns=options.turns, template_kwargs=given,
        date=(date or date_of_today()) if "strftime_now" in template else None,
    ).for_source(source)  # fmt: skip


def conversation_settings(
    config: ConversationOptions, encoder: ConversationEncoder
) -> dict[str, Any]:
    """Return what decides which tokens each conversation has, as runs and lengths record it."""
    names = ("model", "dataset", "subset", "split")
    given = {"model_revision": config.revision, **{name: getattr(config, name) for name in names}}
    return given | encoder.settings()


def token_positions_of(
    spans: Sequence[Span], starts: npt.NDArray[np.int64], ends: npt.NDArray[np.int64]
) -> npt.NDArray[np.int32]:
    """Return the positions of tokens that overlap spans, position 0 left out.

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
    """Tokenize rendered text: ids (S,) int32, start and end of each in characters (S,) int64."""
    fast = bool(getattr(tokenizer, "is_fast", False))
    tokenizer = _keep_blanks(tokenizer, len(tokenizer)) if fast else tokenizer
    encoded = tokenizer(
        text, add_special_tokens=False, return_offsets_mapping=fast, verbose=False,
        return_attention_mask=False, return_token_type_ids=False,
    )  # fmt: skip
    ids = np.asarray(encoded["input_ids"], np.int32).reshape(-1)
    spans = encoded["offset_mapping"] if fast else _spell_tokens(text, ids.tolist(), tokenizer)
    offsets = np.asarray(spans, np.int64).reshape(-1, 2)
    eaters = _blank_eaters(tokenizer, len(tokenizer)) if fast else {}
    for at in np.flatnonzero(np.isin(ids, [*eaters])):
        own = eaters[int(ids[at])]
        if (start := text.find(own, *offsets[at])) >= 0:
            offsets[at] = start, start + len(own)
    return ids, offsets[:, 0], offsets[:, 1]


@lru_cache(maxsize=64)
def _keep_blanks(tokenizer: Any, _size: int) -> Any:
    """Return a tokenizer of which the offsets take in the blanks of a token, which some cut off.

    A token that begins before an answer and ends in blanks of it would be no part of it.
    """
    post = getattr(getattr(tokenizer, "backend_tokenizer", None), "post_processor", None)
    if post is None or b'"trim_offsets":true' not in (state := post.__getstate__()):
        return tokenizer
    kept, post = copy.deepcopy((tokenizer, post))  # offsets alone change: ids stay as they are
    post.__setstate__(state.replace(b'"trim_offsets":true', b'"trim_offsets":false'))
    kept.backend_tokenizer.post_processor = post
    return kept


@lru_cache(maxsize=64)
def _blank_eaters(tokenizer: Any, _size: int) -> dict[int, str]:
    """Return the added tokens whose offsets take in blanks beside them, such as those of Phi-3.

    A role header would otherwise be the assistant's where its answer begins with a blank.
    """
    added = tokenizer.added_tokens_decoder.items()
    return {number: token.content for number, token in added if token.lstrip or token.rstrip}


def _spell_tokens(text: str, ids: list[int], tokenizer: Any) -> list[Span]:
    """Find where each token lies by decoding: tokens that share a character share its place."""
    spans: list[Span] = []
    place = first = 0
    as_it_is = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}

    def spell(stop: int) -> str | None:
        """Return the text that the tokens from `first` on stand for, where it is found next."""
        decoded = tokenizer.decode(ids[first:stop], **as_it_is)
        pieces = "".join(tokenizer.convert_ids_to_tokens(ids[first:stop])).replace("\u2581", " ")
        # decoding drops leading blanks in some families
        spellings = (decoded, f" {decoded}", "" if "\ufffd" in decoded else pieces)
        return next((s for s in spellings if s and text.startswith(s, place)), None)

    for stop in range(1, len(ids) + 1):
        spelled = spell(stop)
        if spelled is None:
            continue
        if "\ufffd" in spelled and stop < len(ids) and spell(stop + 1) == spelled:
            continue  # the character itself, of which the next token is another byte
        spans += [(place, place + len(spelled))] * (stop - first)
        place, first = place + len(spelled), stop
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
    """Lay out a conversation with its extracted tokens marked by colour, or else by ⟦ and ⟧.

    Longer stretches are cut in the middle, what would act on a terminal is made visible.
    """
    extracted = np.zeros(encoded.input_ids.size, bool)
    extracted[encoded.token_positions] = True
    bounds = np.flatnonzero(np.diff(extracted)) + 1
    before, after = ("\x1b[30;42m", "\x1b[0m") if color else ("⟦", "⟧")
    body, half = [], max_run_chars // 2
    for number, ids in enumerate(np.split(encoded.input_ids, bounds)):
        run = tokenizer.decode(ids.tolist())
        if (left := len(run) - 2 * half) > 0:
            run = f"{run[:half]} … {left:,} characters … {run[-half:]}"
        lines = show_text(run).split("\n")
        taken = bool(extracted[0]) != bool(number % 2)
        body.append("\n".join(f"{before}{x}{after}" if taken else x for x in lines))
    end = "none found" if encoded.end_of_turn is None else repr(encoded.end_of_turn)
    return (
        f"{int(extracted.sum())} of {extracted.size} tokens extracted; "
        f"found by {WAYS[encoded.way]}; end of turn: {end}\n" + "".join(body)
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
OPTIONAL_COLUMNS = ("index", "num_tokens", *TAIL_COLUMNS, *TOKEN_COLUMNS, POINTS_FIELD.name)
READ_COLUMNS = tuple(field.name for field in ALL_FIELDS)
CONFIG_FILE = "extraction_config.json"
TEMPLATE_FILE = "chat_template.jinja"
PARTS_PER_FOLDER = 9000  # the Hub takes 10,000 entries a folder
ROW_BYTES = 2**18  # of a row of 1,000 tokens; of longer ones, fewer are read and decoded together
MAX_TEXT_BYTES = 16 * 2**20  # settings and templates are kilobytes
_SPLITS = "(train|validation|valid|dev|test|eval)"
_SHARD = re.compile(  # what lies further down is another output's
    rf"(?:data/)?(?:[0-9]{{3}}/|{_SPLITS}/)?(?:{_SPLITS}(?=-[0-9]|\.parquet$))?[^/]*\.parquet"
)


def part_path(number: int) -> str:
    """Return where the file of a part is in an output."""
    folder = f"{number // PARTS_PER_FOLDER:03d}/" if number >= PARTS_PER_FOLDER else ""
    return f"data/{folder}part-{number:05d}.parquet"


# Files --------------------------------------------------------------------------------------------


@dataclass(eq=False)
class Store:
    """Files by path, wherever fsspec reads them: in a folder, or a Hub dataset at one commit.

    Files that links lead out of the folders `inside` are none. `chosen` are files named one by
    one, with their sizes; None: whatever is there.
    """

    name: str
    files: Any
    root: str
    inside: tuple[str, ...] = ()
    chosen: dict[str, int] | None = None

    @property
    def on_hub(self) -> bool:
        """Say whether every read is a request."""
        return "file" not in self.files.protocol

    def list_files(self, *, depth: int = 5) -> dict[str, int]:
        """Return the size in bytes of every file by path; of a folder at most so far down."""
        if self.chosen is not None:
            return self.chosen
        with self.reading(self.name):
            levels = None if self.on_hub else depth  # the Hub lists all by one request
            found = self.files.find(self.root, maxdepth=levels, detail=True)
            sizes = {path[len(self.root) + 1 :]: int(of["size"]) for path, of in found.items()}
        return {path: size for path, size in sizes.items() if self._is_inside(path)}

    def open(self, path: str) -> Any:
        """Open a file to read by ranges; nothing is fetched ahead or kept."""
        return self.files.open(self._locate(path), "rb", cache_type="none")

    def read_footer(self, path: str) -> pq.FileMetaData:
        """Return the metadata of a Parquet file."""
        with contextlib.closing(self.open(path)) as source:
            return pq.ParquetFile(source, thrift_string_size_limit=MAX_FOOTER_BYTES).metadata

    def read_groups(
        self,
        path: str,
        footer: pq.FileMetaData,
        groups: Sequence[int],
        columns: Sequence[str],
        **options: Any,
    ) -> pa.Table:
        """Return those of the columns that a Parquet file has, of some of its row groups.

        No thread of Arrow's is handed what is Python's: one that lets go of it while the
        interpreter ends takes the process down with it.

        Args:
            path: the file in the store.
            footer: its metadata.
            groups: the row groups, by number.
            columns: the columns, by name.
            options: further arguments of `pyarrow.parquet.ParquetFile`.

        Raises:
            FormatError: a column lies outside the file.
        """
        options |= {"metadata": footer, "page_checksum_verification": True}
        known = footer.schema.to_arrow_schema().names
        wanted = [column for column in columns if column in known]
        if not self.on_hub:
            with pa.OSFile(self._locate(path)) as source:
                file = pq.ParquetFile(source, **options)
                alone = multiprocessing.parent_process() is None  # else others have the processors
                return file.read_row_groups(list(groups), wanted, use_threads=alone).select(wanted)
        spans = []
        for group in map(footer.row_group, groups):
            for chunk in map(group.column, range(group.num_columns)):
                if chunk.path_in_schema.split(".")[0] in wanted:
                    start = chunk.data_page_offset
                    if chunk.has_dictionary_page:
                        start = min(start, chunk.dictionary_page_offset)
                    spans.append((start, start + chunk.total_compressed_size))
        with contextlib.closing(self._open_spans(path, spans)) as source:
            file = pq.ParquetFile(source, pre_buffer=False, **options)
            return file.read_row_groups(list(groups), wanted, use_threads=False).select(wanted)

    def _open_spans(self, path: str, spans: Sequence[tuple[int, int]]) -> Any:
        """Open a file of the Hub at some byte ranges, which are fetched at once, near ones as one.

        Raises:
            FormatError: a range lies outside the file.
        """
        merge_ranges = import_extra("fsspec.utils").merge_offset_ranges
        starts, ends = [start for start, _ in spans], [end for _, end in spans]
        _, starts, ends = merge_ranges([path] * len(spans), starts, ends, max_gap=NEAR_BYTES)
        parts = {}
        with self.open(path) as file:
            for start, end in zip(starts, ends, strict=True):
                if not 0 <= start <= end <= file.size:
                    raise FormatError(f"{path} is damaged: a column of it lies outside the file")
                file.seek(start)
                parts[start, end] = file.read(end - start)
        return self.files.open(
            self._locate(path), "rb", cache_type="parts", cache_options={"data": parts}
        )

    def read_text(self, path: str) -> str | None:
        """Return a small text file; None when there is no such file."""
        with self.reading(self.name):
            try:
                with self.open(path) as file:
                    data = bytes(file.read(MAX_TEXT_BYTES + 1))
            except (FileNotFoundError, NotADirectoryError):
                return None
        if len(data) > MAX_TEXT_BYTES:
            raise OpenError(f"{self.name}: {path} is larger than {MAX_TEXT_BYTES >> 20} MiB")
        return data.decode("utf-8", "replace")

    @contextlib.contextmanager
    def reading(self, name: str) -> Iterator[None]:
        """Turn what a disk, pyarrow or the Hub's client raises into a `LogitsError` of one line.

        A damaged file becomes a `FormatError`, whatever else cannot be read an `OpenError`.
        """
        try:
            yield
        except transfer_errors() as error:
            if type(error).__name__ == "RepositoryNotFoundError":
                why = "on the Hub and no such folder; a private one needs a token"
                raise OpenError(f"no dataset {name!r} {why}") from None
            raise OpenError(f"{name} cannot be read from the Hub: {first_line(error)}") from None
        except UnicodeEncodeError:  # of the header that holds it
            remedy = "run `hf auth login`, or set HF_TOKEN"
            raise OpenError(f"{name}: the access token is none: {remedy}") from None
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            if isinstance(error, OSError) and (error.errno is not None or self.on_hub):
                why = error.strerror or first_line(error)
                raise OpenError(f"{name} cannot be read: {why}") from None
            raise FormatError(f"{name} cannot be read as Parquet: {error}") from None
        except (
            *(ValueError, LookupError, TypeError, AttributeError, AssertionError),
            RecursionError,  # of a million brackets
        ) as error:
            if not self.on_hub:
                raise
            said = f"{type(error).__name__}: {first_line(error)}"
            raise OpenError(f"{name}: what answers is not the Hub ({said})") from None

    def _locate(self, path: str) -> str:
        """Return where a file is, or raise OpenError where a link leads out."""
        if not self._is_inside(path):
            raise OpenError(f"{path} leads outside {self.name} and is not read")
        return f"{self.root}/{path}"

    def _is_inside(self, path: str) -> bool:
        real = Path(os.path.realpath(f"{self.root}/{path}")) if self.inside else None
        return real is None or any(real.is_relative_to(folder) for folder in self.inside)


def open_store(name: str | Path | Sequence[str | Path]) -> Store:
    """Find where an output is: a folder, Parquet files, or a dataset repository on the Hub.

    Raises:
        OpenError: nothing is there, or a file is named twice.
    """
    disk = import_extra("fsspec").filesystem("file")
    if not isinstance(name, (str, Path)) or os.path.isfile(os.path.expanduser(name)):
        files = [name] if isinstance(name, (str, Path)) else name
        paths = [Path(os.path.abspath(os.path.expanduser(file))) for file in files]
        missing = [file for file, path in zip(files, paths, strict=True) if not path.is_file()]
        if missing or not files:
            raise OpenError(
                f"no such file: {missing[0]}" if files else "the list of files is empty"
            )
        if len(set(paths)) < len(paths):
            raise OpenError("the list names a file twice")
        root = os.path.commonpath([path.parent for path in paths])
        sizes = {path.relative_to(root).as_posix(): path.stat().st_size for path in paths}
        shown = str(files[0]) if len(files) == 1 else f"{len(files)} files"
        return Store(shown, disk, root, chosen=sizes)
    text = str(name)
    if os.path.isdir(path := os.path.expanduser(text)):
        folder = Path(path).resolve()
        # The Hub's local cache keeps snapshots as links to ../../blobs.
        snapshots = next((p for p in folder.parents if p.name == "snapshots"), None)
        inside = (str(folder), *([str(snapshots.parent / "blobs")] if snapshots else []))
        return Store(path, disk, str(folder), inside)
    for prefix in ("hf://datasets/", "https://huggingface.co/datasets/"):
        text = text.removeprefix(prefix)
    repo, _, revision = text.partition("@")
    if text.startswith((".", "/", "~")) or text.endswith(".parquet") or "/" not in repo:
        raise OpenError(f"no such folder or file: {name!s:.200}")
    hub = import_extra("huggingface_hub")
    try:
        hub.utils.validate_repo_id(repo)
    except ValueError as error:
        said = f"{repo:.200}, and no name of a dataset: {first_line(error)}"
        raise OpenError(f"no such folder or file: {said}") from None
    store = Store(repo, hub.HfFileSystem(), "")
    with store.reading(repo):
        about = hub.HfApi().dataset_info(repo, revision=revision or None, timeout=HUB_TIMEOUT_S)
        if not re.fullmatch("[0-9a-f]{40}", about.sha):
            raise ValueError("no commit")
    return replace(store, root=f"datasets/{repo}@{about.sha}")


def load_logit_dataset(
    name: str | Path | Sequence[str | Path], split: str = "train", streaming: bool = True
) -> LogitDataset:
    """Open an output for reading: nothing but file names is read until a row is asked for.

    Args:
        name: a folder, a Parquet file, a list of Parquet files, or a dataset on the Hub
            (`user/name`, `user/name@revision`).
        split: `train` for what `extract_logits.py` writes; of files that are named, all are read.
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
    store = open_store(name)
    shards = find_shards(store, split) if store.chosen is None else store.chosen
    if store.on_hub and not streaming:
        with store.reading(store.name):
            folder = import_extra("huggingface_hub").snapshot_download(
                store.name,
                repo_type="dataset",
                revision=store.root.rpartition("@")[2],
                allow_patterns=[*shards, CONFIG_FILE, TEMPLATE_FILE, "checkpoint*.json"],
            )
        store = open_store(folder)
    return LogitDataset(store, shards)


def find_shards(store: Store, split: str) -> dict[str, int]:
    """Choose the Parquet files of a split, with their sizes, in order of their numbers.

    Files under `data/` win over others; a file whose name or folder is no split's belongs to
    `train`.

    Raises:
        OpenError: there are none; names the splits, or the outputs in the folders below.
    """
    files = store.list_files()
    found = {path: shard for path in files if (shard := _SHARD.fullmatch(path))}
    found = {path: found[path] for path in found if path.startswith("data/")} or found
    if not found:
        folders = {os.path.dirname(path) for path in files if path.endswith(".parquet")}
        folders = {re.sub(r"(/data)?(/[0-9]{3})?$", "", folder) for folder in folders} - {""}
        below = sorted(name for name in folders if f"{name}/{CONFIG_FILE}" in files)
        names = ", ".join(f"{store.name}/{name}" for name in (below or sorted(folders))[:5])
        remedy = f" itself; name one of those below: {names}" if names else ""
        raise OpenError(f"{store.name} holds no Parquet files{remedy}")
    splits: dict[str, list[str]] = {}
    for path, shard in found.items():
        splits.setdefault(shard[1] or shard[2] or "train", []).append(path)
    if not isinstance(split, str) or split not in splits:
        there = ", ".join(sorted(splits))
        raise OpenError(f"{store.name} has no split {split!r:.40}; it has {there}")
    numbered = {
        (re.sub("[0-9]+", lambda digits: digits[0].zfill(20), os.path.basename(path)), path)
        for path in splits[split]
    }
    return {path: files[path] for _, path in sorted(numbered)}


# Rows by number -----------------------------------------------------------------------------------

PACKED_COLUMNS = ("top_indices_high", "sampled_indices_high")
NEAR_BYTES = 2**18  # fetching so many bytes more is quicker than a request more
MAX_GROUP_BYTES = 2 * 2**30  # a row group that decodes to more is refused, not tried
FREE_GROUP_BYTES = 2**26  # one that decodes to less is never too much, however small its file
MAX_FOOTER_BYTES = 2**26
MAX_EXPANSION = 100  # decoded bytes for each byte of the file; real rows need fewer than 10


class LogitDataset:
    """The rows of an output, in shard order; each is read from its own row group alone.

    Iterating, `[i]` and `[a:b]` give rows as stored (a dictionary by column); `get_sample` decodes.
    Which shard a row is in follows from the output's checkpoints, else from the footers of the
    shards before it. Footers are kept; of the data, only the row groups that were read last.
    """

    def __init__(self, store: Store, sizes: Mapping[str, int]) -> None:
        self.name = store.name
        self.store = store
        self.shards = list(sizes)
        self.sizes = dict(sizes)  # bytes of each shard
        self._footers: dict[int, Any] = {}
        self._kept: tuple[Any, pa.Table] | None = None  # shard and row groups, their rows

    def __reduce__(self) -> Any:
        return LogitDataset, (self.store, self.sizes)  # another process opens files of its own

    def __len__(self) -> int:
        return sum(self.count_rows(shard) for shard in range(len(self.shards)))

    def __repr__(self) -> str:
        return f"LogitDataset({self.name!r}, {plural(len(self.shards), 'shard')})"

    def __getitem__(self, i: int | slice) -> Any:
        if isinstance(i, slice):
            try:
                rows = range(*i.indices(len(self)))
            except (TypeError, ValueError) as error:
                raise RowError(f"rows {i.start}:{i.stop}:{i.step}: {error}") from None
            return self.take(rows).to_pylist()
        return self.take([check_row_number(i)]).to_pylist()[0]

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for table in iter_tables(self):
            yield from table.to_pylist()

    @property
    def settings(self) -> dict[str, Any]:
        """Settings of the run, from the first shard's metadata; empty when it holds none."""
        return parse_settings(self.metadata(0).get(METADATA_SETTINGS, b"{}"), self.shards[0])

    @cached_property
    def words(self) -> tuple[Any, str]:
        """The teacher's tokenizer, found from the settings; or None and why it is not there."""
        try:
            return find_tokenizer(load_extraction_config(self)), ""
        except LogitsError as error:
            return None, str(error)

    def footer(self, shard: int) -> Any:
        """Return the `pyarrow.parquet.FileMetaData` of a shard, which is read once.

        No file stays open: an output may have more of them than a process may hold.

        Raises:
            FormatError: the file is damaged, in a later format, or of another run than the shard
                looked at first.
        """
        if shard in self._footers:
            return self._footers[shard]
        name = self.shards[shard]
        with self.store.reading(name):
            footer = self.store.read_footer(name)
            footer.schema.to_arrow_schema()  # here, where a bad one is reported
        told = footer.metadata or {}
        version = told.get(METADATA_VERSION, b"1")
        if version not in {str(known).encode() for known in range(1, FORMAT_VERSION + 1)}:
            raise FormatError(
                f"{name} is in format {version.decode('utf-8', 'replace'):.20}, "
                f"formats up to {FORMAT_VERSION} can be read here: use a later logit-extraction"
            )
        for first in itertools.islice(self._footers, 1):
            texts = (text.get(METADATA_SETTINGS, b"{}") for text in (self.metadata(first), told))
            one, two = map(peek_settings, texts)
            if one and two and (differ := differing_settings(one, two)):
                raise FormatError(
                    f"{self.shards[first]} and {name} are of two runs, which differ in "
                    f"{', '.join(differ)}: open the files of each by themselves"
                )
        self._footers[shard] = footer
        if self._listed.get(name, footer.num_rows) != footer.num_rows:
            self._listed.clear()  # the list is of other files: believe the footers alone
        return footer

    def metadata(self, shard: int) -> dict[bytes, bytes]:
        """Return the key-value metadata of a shard's footer.

        The Arrow schema holds a copy of those alone that were there when the file was opened.
        """
        return self.footer(shard).metadata or {}

    def part(self, shard: int) -> dict[str, Any]:
        """Return what a shard says of the part it is: counts, the hash of its ids, who gave no row.

        Empty in files of version 0.1.

        Raises:
            FormatError: an entry is missing or of another kind; names it.
        """
        text, name = self.metadata(shard).get(METADATA_PART), self.shards[shard]
        if text is None:
            return {}
        part = {"skipped": {}, **parse_object(text, name, "the figures of the part")}
        right = {entry: type(part.get(entry)) is int and part[entry] >= 0 for entry in PART_FIGURES}
        right["ids"] = isinstance(part.get("ids"), str)
        right["skipped"] = isinstance(part["skipped"], dict) and all(
            re.fullmatch("-?[0-9]{1,10}", key) for key in part["skipped"]
        )
        for entry in (entry for entry, good in right.items() if not good):
            raise FormatError(f"{name}: {entry} of the part is {part.get(entry)!r:.40}")
        return part

    def skipped(self) -> dict[int, str]:
        """Return why conversations that were selected gave no row, as far as the shards say."""
        parts = (self.part(shard).get("skipped", {}) for shard in range(len(self.shards)))
        return {int(index): str(why) for part in parts for index, why in part.items()}

    def count_rows(self, shard: int) -> int:
        """Return the rows of a shard, from a checkpoint or its footer."""
        listed = self._listed.get(self.shards[shard]) if shard not in self._footers else None
        return int(self.footer(shard).num_rows) if listed is None else listed

    @cached_property
    def _listed(self) -> dict[str, int]:
        """Rows of the shards that a checkpoint lists at their present size."""
        try:
            records = read_checkpoints(self.store) or {}
        except LogitsError:
            return {}
        sizes = self.sizes
        rows = {path: r["rows"] for path, r in records.items() if r["bytes"] == sizes.get(path)}
        return rows if all(type(n) is int and n >= 0 for n in rows.values()) else {}

    def take(self, rows: Sequence[int] | npt.NDArray[np.int64]) -> pa.Table:
        """Return rows by number (negative: from the end), in the order asked for.

        Each row group that holds some of them is read once.

        Raises:
            RowError: there is no such row.
        """
        wanted, listed, starts = np.asarray(rows), len(self._listed), [0]
        if wanted.ndim != 1 or (wanted.size and wanted.dtype.kind not in "iu"):
            raise RowError(f"a list of row numbers is needed, such as [0, 1], not {rows!r:.40}")
        wanted = wanted.astype(np.int64)
        if (wanted < 0).any():
            wanted = np.where(wanted < 0, wanted + len(self), wanted)
        for shard in range(len(self.shards)):
            if starts[-1] <= wanted.max(initial=-1):
                starts.append(starts[-1] + self.count_rows(shard))
        for place in np.flatnonzero((wanted < 0) | (wanted >= starts[-1]))[:1]:
            many = plural(len(self), "row")
            raise RowError(f"{self.name} has {many}, there is no row {int(rows[place])}")
        shards = np.searchsorted(starts, wanted, side="right") - 1
        tables, places = [], []
        for shard in np.unique(shards).tolist():
            begins = self._group_starts(shard)
            if len(self._listed) != listed:  # opening the file showed that the list is wrong
                return self.take(rows)
            mine = np.flatnonzero(shards == shard)
            inside = wanted[mine] - starts[shard]
            groups = np.unique(np.searchsorted(begins, inside, side="right") - 1)
            kept = self._kept  # another thread may keep others meanwhile
            if kept is None or kept[0] != (shard, groups.tolist()):
                table = self._read(shard, groups.tolist()).combine_chunks()
                kept = self._kept = (shard, groups.tolist()), table
            held = np.concatenate([np.arange(*begins[g : g + 2]) for g in groups.tolist()])
            tables.append(kept[1].take(pa.array(np.searchsorted(held, inside))))
            places.append(mine)
        if not tables:
            return pa.schema(ALL_FIELDS).empty_table()
        order = pa.array(np.argsort(np.concatenate(places)))
        with self.store.reading(self.name):  # shards may have columns of other kinds
            return pa.concat_tables(tables, promote_options="permissive").take(order)

    def iter_shard(
        self, shard: int, columns: Sequence[str] = READ_COLUMNS, *, rows: int = 64
    ) -> Iterator[pa.Table]:
        """Yield the rows of a shard in order, `rows` at a time at most, fewer where they are long.

        Small row groups are read together: a block of one row each would be decoded half as fast.
        """
        starts, sizes, first = self._group_starts(shard), self._group_sizes(shard, columns), 0
        while first < starts.size - 1:
            fits = min(
                int(np.searchsorted(sums, sums[first] + most, side="right")) - 1
                for sums, most in ((starts, rows), (sizes, rows * ROW_BYTES))
            )
            groups = range(first, max(fits, first + 1))
            yield from cut_table(self._read(shard, groups, columns), rows)
            first = groups.stop

    def _group_starts(self, shard: int) -> npt.NDArray[np.int64]:
        """Return where the row groups of a shard begin, and where the last ends."""
        footer = self.footer(shard)
        return to_starts([footer.row_group(g).num_rows for g in range(footer.num_row_groups)])

    def _group_sizes(self, shard: int, columns: Sequence[str]) -> npt.NDArray[np.int64]:
        """Return the bytes of some columns before each row group of a shard, and in all of them."""
        footer = self.footer(shard)
        groups = map(footer.row_group, range(footer.num_row_groups))
        read = [i for i, path in enumerate(column_paths(footer)) if path.split(".")[0] in columns]
        return to_starts([sum(g.column(i).total_uncompressed_size for i in read) for g in groups])

    def _read(
        self, shard: int, groups: Sequence[int], columns: Sequence[str] = READ_COLUMNS
    ) -> pa.Table:
        """Return the rows of some row groups, whose sizes are looked at first."""
        footer, name = self.footer(shard), self.shards[shard]

        def check(size: int) -> None:
            if size > min(MAX_GROUP_BYTES, max(FREE_GROUP_BYTES, MAX_EXPANSION * self.sizes[name])):
                raise OpenError(
                    f"{name}: a row group that decodes to {size:,} bytes in a file of "
                    f"{self.sizes[name]:,} is not read; write it again with smaller row groups"
                )

        for group in map(footer.row_group, groups):
            # A value takes up to 8 bytes while it is decoded, whatever a dictionary makes of it.
            check(sum(
                max(held.total_compressed_size, held.total_uncompressed_size, 8 * held.num_values)
                for held in map(group.column, range(group.num_columns))
            ))  # fmt: skip
        paths = column_paths(footer)
        with self.store.reading(name):
            table = self.store.read_groups(
                name,
                footer,
                groups,
                columns,
                thrift_string_size_limit=MAX_FOOTER_BYTES,
                # Bytes that many rows share stay shared until their lengths have been looked at.
                read_dictionary=[path for path in PACKED_COLUMNS if path in paths],
            )
        for place, kind in enumerate(table.schema):
            if pa.types.is_dictionary(kind.type):
                packed = table.column(place)
                lengths = (pc.binary_length(c.dictionary).take(c.indices) for c in packed.chunks)
                check(sum(pc.sum(part).as_py() or 0 for part in lengths))
                table = table.set_column(place, kind.name, packed.cast(kind.type.value_type))
        settings = self.metadata(shard).get(METADATA_SETTINGS, b"{}")
        return table.replace_schema_metadata({METADATA_SETTINGS: settings})


# What an output says of itself --------------------------------------------------------------------


def within(low: float, high: float, default: Any = None) -> Any:
    """Declare a setting that is a number in low..high; the default holds where it is not known."""
    return field(default=default, metadata={"range": (low, high)})


@dataclass(frozen=True)
class RunLimits:
    """What the settings of a run say about its rows; the widest where they do not say."""

    top_p: float = within(0, 1, 0.0)
    top_p_max: int = within(1, 255, 255)
    sampled_n: int | None = within(0, MAX_TOKEN_ID)
    min_p: float | None = within(0, 0.5)  # of compact rows
    logit_bits: int = within(4, 16, 16)
    vocab_size: int = within(1, MAX_TOKEN_ID + 1, MAX_TOKEN_ID + 1)
    store_tokens: bool = False

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> RunLimits:
        """Take the limits out of a run's settings."""
        names = [entry.name for entry in fields(cls) if settings.get(entry.name) is not None]
        return cls(**{name: settings[name] for name in names})


SETTING_RANGES = {of.name: of.metadata["range"] for of in fields(RunLimits) if of.metadata}
SETTING_TEXTS = (
    *("model", "model_revision", "dataset", "dataset_revision", "subset", "split", "text_col"),
    *("messages_col", "user_col", "assistant_col", "system_col", "index_col"),
)
NOT_OF_JOB = {"attn", "versions", "numerics", "limit", "options"}  # may differ from run to run
PART_FIGURES = ("number", "conversations", "rows", "tokens", "nucleus", "capped")


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
        if value is not None and not (type(value) in (int, float) and low <= value <= high):
            raise FormatError(f"{name}: {entry} is {value!r:.40}, not a number in {low}..{high}")
    for entry, kind in {**dict.fromkeys(SETTING_TEXTS, str), "template_kwargs": dict}.items():
        if not isinstance(settings.get(entry), (kind, type(None))):
            what = "text" if kind is str else "an object"
            raise FormatError(f"{name}: {entry} is {settings[entry]!r:.40}, not {what}")
    try:
        datetime.fromisoformat(settings.get("template_date") or "2000-01-01")
    except (TypeError, ValueError):
        said = f"{settings['template_date']!r:.40}"
        raise FormatError(f"{name}: template_date is {said}, not a date") from None
    return settings


@lru_cache(maxsize=64)
def peek_settings(text: bytes) -> dict[str, Any]:
    """Return the settings of a run where they can be read, else nothing."""
    try:
        return parse_settings(text, "")
    except FormatError:
        return {}


def differing_settings(one: Mapping[str, Any], two: Mapping[str, Any]) -> list[str]:
    """Name the settings in which two records are of different jobs.

    Local models and datasets are compared by the digest of their content, not by how their path is
    spelled. A revision or date that one of the two does not name is not compared, nor a branch
    with a commit.
    """

    def differs(name: str) -> bool:
        a, b = one.get(name), two.get(name)
        if name.endswith(("_revision", "_date")) and (None in (a, b) or is_exact(a) != is_exact(b)):
            return False
        revision = str(one.get(f"{name}_revision"))
        same = revision == str(two.get(f"{name}_revision")) and revision.startswith("sha256:")
        return a != b and not same

    return sorted(filter(differs, (one.keys() | two.keys()) - NOT_OF_JOB))


def is_exact(revision: Any) -> bool:
    """Tell whether a revision is a commit id or a digest, which names the same content for ever."""
    return isinstance(revision, str) and bool(re.fullmatch("[0-9a-f]{40}|sha256:.*", revision))


def hash_ids(ids: npt.ArrayLike) -> str:
    """Return what `logits.part` says of the ids of a part's conversations, in selection order."""
    return hashlib.sha256(np.asarray(ids, "<i8").tobytes()).hexdigest()[:16]


def read_checkpoints(store: Store) -> dict[str, dict[str, Any]] | None:
    """Return what the checkpoints of all workers list: `bytes`, `rows` and more, by shard.

    None where there are no checkpoints.

    Raises:
        FormatError: one is no checkpoint.
    """
    names = [n for n in store.list_files(depth=1) if re.fullmatch(r"checkpoint(-w\d+)?\.json", n)]
    records: dict[str, dict[str, Any]] = {}
    for name in sorted(names):
        try:
            content = json.loads(store.read_text(name) or "{}")
            if "parts" in content:
                for row in zip(*content["parts"].values(), strict=True):
                    record = dict(zip(content["parts"], row, strict=True))
                    records[part_path(record["number"])] = {"bytes": None, "rows": None, **record}
            else:  # version 0.1
                for path, entry in content["shards"].items():
                    rows = entry.get("figures", {}).get("rows")
                    records[path] = {"bytes": entry["bytes"], "rows": rows}
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise FormatError(f"{name} is no checkpoint with a list of shards") from error
    return records if names else None


# An output, or rows at hand -----------------------------------------------------------------------


def check_number(value: Any, what: str, remedy: str = "") -> int:
    """Refuse what is no number of a row, token or conversation."""
    if (number := as_integer(value)) is None:
        kind = describe_type(value)
        raise RowError(f"{what} is an integer, not {value!r:.40} ({kind}){remedy}")
    return number


def check_count(name: str, value: Any, remedy: str = "") -> int:
    """Refuse what is no number of things, as the argument of this name."""
    number = as_integer(value)
    if number is None or number < 0:
        raise LogitsError(f"{name}={value!r:.40}: an integer of 0 or more is needed{remedy}")
    return number


def check_row_number(i: Any) -> int:
    """Refuse what is no row number."""
    many = "; iter_samples gives many rows, conversation= takes the id of one in the source"
    return check_number(i, "a row number", many)


def as_output(name: Any) -> LogitDataset:
    """Open an output unless it is open already."""
    return name if isinstance(name, LogitDataset) else load_logit_dataset(name)


def as_rows(dataset: Any) -> Any:
    """Return an opened output, a `pyarrow.Table`, or an Arrow view of what is of `datasets`.

    Rows at hand as dictionaries become a table.

    Raises:
        LogitsError: it is something else; says what to pass.
    """
    if isinstance(dataset, (LogitDataset, pa.Table)):
        return dataset
    files = isinstance(dataset, (list, tuple)) and len(dataset) > 0
    if isinstance(dataset, (str, Path)) or (files and isinstance(dataset[0], (str, Path))):
        return load_logit_dataset(dataset)
    what = describe_type(dataset)
    if hasattr(dataset, "with_format"):  # which leaves what was passed as it is
        if isinstance(dataset, Mapping):
            names = ", ".join(map(repr, dataset))
            raise LogitsError(f"{what} holds datasets by split: pass one of them, [{names}]")
        return dataset.with_format("arrow")
    rows: list[Any] = [None]
    if isinstance(dataset, Iterable):
        rows = [dataset] if isinstance(dataset, Mapping) else list(dataset)
    if strange := [row for row in rows if not isinstance(row, Mapping)]:
        what += "" if strange == [None] else f" of {type(strange[0]).__name__}"
        raise LogitsError(
            f"a dataset is an output by name, what load_logit_dataset returns, or rows; not {what}"
        )
    names = rows[0] if rows else SCHEMA.names
    if isinstance(names, Sample):
        raise FormatError("the rows are samples, decoded already: use them as they are")
    try:
        known = [field for field in ALL_FIELDS if field.name in names]
        return pa.Table.from_pylist([dict(row) for row in rows], schema=pa.schema(known))
    except (pa.ArrowException, TypeError, ValueError, OverflowError) as error:
        raise FormatError(f"the rows are not in the shard format: {first_line(error)}") from error


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
        conversation = check_number(conversation, "a conversation's id")
        numbers = row_numbers(rows)
        if conversation not in numbers:
            raise RowError(f"none of the {len(numbers):,} rows is of conversation {conversation}")
        i = numbers[conversation]
    i = check_row_number(i)
    if isinstance(rows, LogitDataset):
        return Sample(decode_rows(rows.take([i]), first_row=i), rows)
    if hasattr(rows, "__len__"):
        size = len(rows)
        if not -size <= i < size:
            raise RowError(f"the dataset has {plural(size, 'row')}, there is no row {i}")
        return Sample(decode_rows(rows[i % size : i % size + 1], first_row=i))
    found = next(itertools.islice(rows.iter(batch_size=1), i, None), None) if i >= 0 else None
    if found is None:
        raise RowError(f"the stream has no row {i}; a stream cannot be read from its end")
    return Sample(decode_rows(found, first_row=i))


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
    if max_samples is not None:
        max_samples = check_count("max_samples", max_samples, ", or None for all rows")
    dataset, left = as_rows(dataset), math.inf if max_samples is None else max_samples
    tables: Iterator[pa.Table]
    if isinstance(dataset, LogitDataset):
        shards = range(len(dataset.shards))
        tables = (t for shard in shards for t in dataset.iter_shard(shard, columns, rows=rows))
    elif isinstance(dataset, pa.Table):
        tables = cut_table(dataset, rows)
    else:
        tables = (t for batch in dataset.iter(batch_size=rows) for t in cut_table(batch, rows))
    for table in tables:
        known = [name for name in columns if name in table.column_names]
        if not known:
            needed = (name for name in columns if name not in OPTIONAL_COLUMNS)
            raise FormatError(missing_column(next(needed, columns[0])))
        table = table.select(known)
        yield table[: int(min(left, table.num_rows))]
        left -= table.num_rows
        if left <= 0:
            return


def column_paths(footer: Any) -> list[str]:
    """Return the paths of a Parquet file's leaf columns, such as `top_min.list.element`."""
    return [footer.schema.column(i).path for i in range(len(footer.schema.names))]


def cut_table(table: pa.Table, rows: int) -> Iterator[pa.Table]:
    """Yield a table in slices of `rows` rows, fewer where they are long."""
    at_once = rows_at_once(table, rows)
    return (table.slice(row, at_once) for row in range(0, table.num_rows, at_once))


def rows_at_once(table: pa.Table, rows: int) -> int:
    """Return how many rows of a table to decode together: `rows`, fewer where they are long."""
    return max(1, min(rows, rows * ROW_BYTES * table.num_rows // max(table.nbytes, 1)))


def row_numbers(dataset: Any) -> dict[int, int]:
    """Return the row number of each conversation, reading only the column `index`."""
    (ids,) = read_integers(dataset, "index")
    return {index: row for row, index in enumerate(ids.tolist())}


def read_integers(dataset: Any, *names: str) -> list[npt.NDArray[np.int64]]:
    """Return columns of one integer a row for all rows of a dataset, reading nothing else."""
    parts = [[np.zeros(0, np.int64)] for _ in names]
    for table in iter_tables(dataset, names, rows=4096):
        for part, name in zip(parts, names, strict=True):
            part.append(read_column(table, SCHEMA.field(name)))
    return [np.concatenate(part) for part in parts]


# Lengths measured before --------------------------------------------------------------------------


@dataclass(frozen=True)
class Lengths:
    """A lengths dataset; rows with length 0 are conversations that cannot be used."""

    index: npt.NDArray[np.int64]
    length: npt.NDArray[np.int64]
    num_tokens: npt.NDArray[np.int64] | None  # None in a file that has no such column
    settings: dict[str, Any]  # what it was measured with; empty where the file does not say


def read_lengths(name: str, *, length_col: str = "length") -> Lengths:
    """Read a lengths dataset: a Parquet file, a folder of them, or a Hub id.

    Args:
        name: the file, folder or id.
        length_col: the column of lengths, when others made the dataset.

    Raises:
        SourceError: no such file, its metadata are damaged, a column is missing or holds no
            integers, or an index occurs twice.
    """
    store, made = open_store(name), "compute_lengths.py makes them"
    paths = [
        path for path in sorted(store.list_files()) if store.chosen or path.endswith(".parquet")
    ]
    if not paths:
        raise SourceError(f"lengths {name!r}: no Parquet file there; {made}")
    tables = []
    for path in paths:
        with store.reading(path):
            footer = store.read_footer(path)
            groups = range(footer.num_row_groups)
            found = store.read_groups(path, footer, groups, ["index", length_col, "num_tokens"])
        if missing := [kind for kind in ("index", length_col) if kind not in found.column_names]:
            raise SourceError(f"lengths {name!r} have no column {' and no '.join(missing)}")
        tables.append(found)
    with store.reading(name):
        table = pa.concat_tables(tables)
    for kind in table.schema:
        if not pa.types.is_integer(kind.type):
            why = f"column {kind.name!r} holds {kind.type}, not integers"
            raise SourceError(f"lengths {name!r}: {why}; {made}")
    try:
        text = (table.schema.metadata or {}).get(METADATA_LENGTHS, b"{}")
        settings = parse_object(text, name, "the settings")
    except FormatError:
        what = f"its metadata {METADATA_LENGTHS.decode()} are damaged"
        raise SourceError(f"{name}: {what}; measure the lengths again") from None
    if any(column.null_count for column in table.columns):
        raise SourceError(f"lengths {name!r} hold null values")
    index, *figures = (column.to_numpy().astype(np.int64) for column in table.columns)
    for wrong, why in (
        (np.unique(index).size != index.size, ": an index occurs twice"),
        (any((column < 0).any() for column in figures), " hold a negative number"),
        ((np.abs(index.astype(np.float64)) > 2**31).any(), ": an index is over 32 bits"),
    ):
        if wrong:
            raise SourceError(f"lengths {name!r}{why}; {made}")
    return Lengths(index, figures[0], figures[1] if len(figures) > 1 else None, settings)


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
    per_token: ClassVar[tuple[str, ...]] = ("low", "high", "logsumexp")
    noun: ClassVar[str] = "token"  # what an entry is

    @property
    def counts(self) -> npt.NDArray[np.int64]:  # (T,)
        return np.diff(self.starts)

    @property
    def owner(self) -> npt.NDArray[np.int64]:  # (n,) token of each entry
        return np.repeat(np.arange(self.low.size), self.counts)

    @cached_property
    def logits(self) -> npt.NDArray[np.float64]:  # (n,)
        counts = self.counts
        return dequantize_logits(self.q, np.repeat(self.low, counts), np.repeat(self.high, counts))

    @cached_property
    def log_probs(self) -> npt.NDArray[np.float64]:  # (n,)
        return self.logits - np.repeat(self.logsumexp, self.counts)

    @cached_property
    def probs(self) -> npt.NDArray[np.float64]:  # (n,)
        return np.exp(self.log_probs)

    @cached_property
    def mass(self) -> npt.NDArray[np.float64]:  # (T,) probability of all entries of a token
        filled, sums = self.counts > 0, np.zeros(self.low.size)
        if filled.any():
            sums[filled] = np.add.reduceat(self.probs, self.starts[:-1][filled])
        return sums

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
        cut_off = {name: getattr(self, name)[first:last] for name in self.per_token}
        return replace(
            self, starts=starts - starts[0], ids=self.ids[part], q=self.q[part], **cut_off
        )


@dataclass(frozen=True)
class Points(Entries):
    """The sample of compact rows: ids without logits, each for an equal share of the rest.

    A logit of it is the one whose probability is that share; an id may occur several times.
    """

    rest: npt.NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))  # (T,)
    min_p: float = 1.0  # every token of the rest has less
    per_token: ClassVar[tuple[str, ...]] = (*Entries.per_token, "rest")
    noun: ClassVar[str] = "point"

    @cached_property
    def logits(self) -> npt.NDArray[np.float64]:
        """The logit that each entry stands for, (n,)."""
        least = np.finfo(np.float64).tiny
        shares = np.maximum(self.rest, least) / np.maximum(self.counts, 1)
        return np.repeat(np.log(shares) + self.logsumexp, self.counts)


@dataclass(frozen=True, eq=False)
class TokenBlock:
    """Some whole rows, decoded at once: R rows of T tokens in all, everything flattened.

    Row r owns tokens `row_starts[r]:row_starts[r + 1]`.
    """

    index: npt.NDArray[np.int64]  # (R,)
    row_starts: npt.NDArray[np.int64]  # (R + 1,)
    top: Entries
    tail: Entries
    tokens: tuple[list[npt.NDArray[np.int32]], list[npt.NDArray[np.int32]]] | None = None

    @property
    def num_tokens(self) -> npt.NDArray[np.int64]:  # (R,)
        return np.diff(self.row_starts)

    @property
    def logsumexp(self) -> npt.NDArray[np.float64]:  # (T,)
        return self.top.logsumexp

    @property
    def first_probs(self) -> npt.NDArray[np.float64]:  # (T,) of each token's likeliest entry, or 0
        probs = np.exp(self.top.high.astype(np.float64) - self.logsumexp)
        return np.where(self.top.counts > 0, probs, 0.0)

    @property
    def first_ids(self) -> npt.NDArray[np.int32]:  # (T,) of each token's likeliest entry, or -1
        firsts = np.append(self.top.ids, -1)[self.top.starts[:-1]]
        return np.where(self.top.counts > 0, firsts, -1)

    @property
    def sound(self) -> npt.NDArray[np.bool_]:  # (T,) the log-sum-exp is one of such logits
        sound = np.isfinite(self.logsumexp)
        for part in known_parts(self):
            high = part.high.astype(np.float64)
            short = self.logsumexp < high - 1e-4 * np.maximum(1, np.abs(high))
            sound &= ~(short & (part.counts > 0))
        return sound

    def place(self, token: int | np.integer[Any]) -> tuple[int, int]:
        """Return the row that a token belongs to, and its number there."""
        row = int(np.searchsorted(self.row_starts, token, side="right")) - 1
        return row, int(token - self.row_starts[row])

    def tokens_at(self, first: int, last: int) -> TokenBlock:
        """Return some consecutive tokens of one row, without their text, as views."""
        row, _ = self.place(first)
        return TokenBlock(
            self.index[row : row + 1],
            np.array([0, last - first]),
            self.top.of_tokens(first, last),
            self.tail.of_tokens(first, last),
        )

    def row(self, row: int) -> TokenBlock:
        """Return one row as a block of its own, as views."""
        first, last = self.row_starts[row : row + 2].tolist()
        tokens = self.tokens and ([self.tokens[0][row]], [self.tokens[1][row]])
        return replace(self.tokens_at(first, last), index=self.index[row : row + 1], tokens=tokens)


class Sample(Mapping[str, Any]):
    """One row, decoded: a view of a block of one row, read like a dictionary; see `get_sample`."""

    def __init__(self, block: TokenBlock, output: LogitDataset | None = None) -> None:
        self.block, self.output = block, output

    @cached_property
    def _values(self) -> dict[str, Any]:
        block = self.block
        values: dict[str, Any] = {"index": int(block.index[0])}
        values["num_tokens"] = int(block.row_starts[1])
        for name, part in (("top", block.top), ("sampled", block.tail)):
            values[f"{name}_indices"] = cut(part.ids, part.starts)
            if name == "top" or isinstance(part, Points):
                values[f"{name}_counts"] = part.counts.astype(np.int32)
            values[f"{name}_logits_quantized"] = cut(part.q, part.starts)
            values |= {f"{name}_min": part.low, f"{name}_max": part.high}
        values["logsumexp"] = block.logsumexp
        if block.tokens is not None:
            values |= {name: of[0] for name, of in zip(TOKEN_COLUMNS, block.tokens, strict=True)}
        return values

    def __getitem__(self, name: str) -> Any:
        return self._values[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __repr__(self) -> str:
        tokens = plural(self["num_tokens"], "token")
        return f"<sample of conversation {self['index']}: {tokens}, {', '.join(self)}>"


class Ragged(NamedTuple):
    """A list column, flattened: row r holds `values[starts[r]:starts[r + 1]]`."""

    values: Any  # (n,)
    starts: npt.NDArray[np.int64]  # (R + 1,)

    @property
    def lengths(self) -> npt.NDArray[np.int64]:  # (R,)
        return np.diff(self.starts)


class Fault(NamedTuple):
    """Something in a row of a table that the format does not allow."""

    row: int  # in the table
    rule: str
    message: str


def to_starts(lengths: npt.ArrayLike) -> npt.NDArray[np.int64]:
    """Return where each of the consecutive runs begins, and where the last ends."""
    return np.concatenate(([0], np.cumsum(np.asarray(lengths, np.int64)))).astype(np.int64)


def cut(values: Any, starts: npt.NDArray[np.int64]) -> list[Any]:
    """Cut a flat array or list into the runs that begin at `starts`."""
    return [values[a:b] for a, b in itertools.pairwise(starts.tolist())]


def read_column(table: pa.Table, field: pa.Field) -> Any:
    """Return a column of the format as numpy: an array, or `Ragged` for lists and bytes.

    Nulls become 0 or empty.

    Raises:
        FormatError: the column is missing, of another type, or holds values out of its range.
    """
    if field.name not in table.column_names:
        raise FormatError(missing_column(field.name))
    try:
        array = table.column(field.name).combine_chunks()
        array = array if array.type == field.type else array.cast(field.type)
    except (pa.ArrowException, TypeError) as error:
        raise FormatError(f"column {field.name!r} is not {field.type}: {error}") from error
    if pa.types.is_binary(field.type):
        pieces = [value or b"" for value in array.to_pylist()]
        return Ragged(np.frombuffer(b"".join(pieces), np.uint8), to_starts([*map(len, pieces)]))
    if not pa.types.is_list(field.type):
        return pc.fill_null(array, 0).to_numpy(zero_copy_only=False)
    lengths = pc.fill_null(pc.list_value_length(array), 0).to_numpy(zero_copy_only=False)
    values = pc.list_flatten(array)
    values = pc.fill_null(values, 0) if values.null_count else values  # a copy only where needed
    return Ragged(values.to_numpy(zero_copy_only=False), to_starts(lengths))


def missing_column(name: str) -> str:
    """Say that rows lack a column, and which they must have."""
    needed = ", ".join(name for name in SCHEMA.names if name not in OPTIONAL_COLUMNS)
    return (
        f"no column {name!r}; a row of logits needs {needed} "
        "(is this an output of extract_logits.py?)"
    )


def read_columns(table: pa.Table) -> tuple[dict[str, Any], list[Fault]]:
    """Return the format's columns as numpy, missing optional ones filled in, and what is wrong.

    Wrong are rows that hold a null, and those whose lists do not have the lengths that their
    counts ask for.
    """
    columns: dict[str, Any] = {}
    faults = []
    for kind in ALL_FIELDS:
        if kind.name in table.column_names or kind.name not in OPTIONAL_COLUMNS:
            columns[kind.name] = read_column(table, kind)
            column = table.column(kind.name).combine_chunks()
            missing = np.flatnonzero(column.is_null().to_numpy(zero_copy_only=False)).tolist()
            inner = pc.list_flatten(column) if pa.types.is_nested(column.type) else column
            if inner is not column and inner.null_count:
                missing += pc.list_parent_indices(column).filter(inner.is_null()).to_pylist()
            faults += [Fault(r, "null", f"{kind.name} holds a null") for r in sorted({*missing})]
        elif kind.name in TAIL_COLUMNS:
            none = np.zeros(table.num_rows + 1, np.int64)
            columns[kind.name] = Ragged(np.zeros(0, np.uint8), none)
    columns.setdefault("num_tokens", columns["top_counts"].lengths)
    n = columns["num_tokens"].astype(np.int64)
    counts, points = columns["top_counts"], columns.get(POINTS_FIELD.name)
    tail, none = columns["sampled_indices_low"].lengths, np.zeros_like(n)
    wanted = dict.fromkeys(("top_counts", "top_min", "top_max", "logsumexp"), n)
    for name in ("top_indices_low", "top_logits_quantized"):
        wanted[name] = np.diff(to_starts(counts.values)[counts.starts])
    wanted["sampled_logits_quantized"] = none if points else tail
    for name in ("sampled_min", "sampled_max"):
        empty = (tail == 0) & (columns[name].lengths == 0)
        wanted[name] = np.where(empty, 0, none if points else n)
    if points:
        wanted[POINTS_FIELD.name] = n
        wanted["sampled_indices_low"] = np.diff(to_starts(points.values)[points.starts])
    else:  # the same number for each token
        wanted["sampled_indices_low"] = tail // np.maximum(n, 1) * np.maximum(n, 1)
    for part in ("top", "sampled"):
        wanted[f"{part}_indices_high"] = -(-columns[f"{part}_indices_low"].lengths // 4)
    if "token_positions" in columns:
        wanted["token_positions"] = n
    for name, asked in wanted.items():
        lengths = columns[name].lengths
        for row in np.flatnonzero(lengths != asked).tolist():
            message = f"{name} holds {lengths[row]} values, not {asked[row]}"
            faults.append(Fault(row, "length", message))
    return columns, faults


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
    settings = peek_settings((table.schema.metadata or {}).get(METADATA_SETTINGS, b"{}"))
    block = build_block(columns, first_row, RunLimits.of(settings))
    ends = sum(part.low.astype(np.float64) + part.high for part in (block.top, block.tail))
    for token in np.flatnonzero(~(block.sound & np.isfinite(ends)))[:1]:
        row, t = block.place(token)
        raise FormatError(
            f"row {first_row + row}: token {t} has a log-sum-exp, or a range of logits, that is "
            "not finite, or a logit above the log-sum-exp"
        )
    return block


def build_block(columns: Mapping[str, Any], first_row: int, limits: RunLimits) -> TokenBlock:
    """Assemble a block from columns whose lengths agree."""
    counts, per_row = columns["top_counts"], columns["top_counts"].lengths
    points = columns.get(POINTS_FIELD.name)

    def entries(part: str, sizes: npt.NDArray[Any]) -> Entries:
        low, high = columns[f"{part}_indices_low"], columns[f"{part}_indices_high"]
        pairs = zip(cut(low.values, low.starts), cut(high.values, high.starts), strict=True)
        ids = [unpack_indices(*pair) for pair in pairs]  # each row's high bits start on a byte
        ranges = np.zeros((2, sizes.size), np.float32)
        for ends, name in zip(ranges, (f"{part}_min", f"{part}_max"), strict=True):
            ends[np.repeat(columns[name].lengths > 0, per_row)] = columns[name].values
        return Entries(
            to_starts(sizes), np.concatenate(ids or [np.zeros(0, np.int32)]),
            columns[f"{part}_logits_quantized"].values, ranges[0], ranges[1],
            columns["logsumexp"].values, limits.logit_bits,
        )  # fmt: skip

    top = entries("top", counts.values)
    if points is None:
        drawn = columns["sampled_indices_low"].lengths // np.maximum(per_row, 1)
        tail = entries("sampled", np.repeat(drawn, per_row))
    else:
        rest, tail = np.maximum(1 - top.mass, 0), entries("sampled", points.values)
        tail = Points(**vars(tail), rest=rest, min_p=limits.min_p or 1.0)
    tokens = None
    if all(name in columns for name in TOKEN_COLUMNS):
        texts, positions = (columns[name] for name in TOKEN_COLUMNS)
        tokens = cut(texts.values, texts.starts), cut(positions.values, positions.starts)
    numbers = np.arange(first_row, first_row + per_row.size)
    index = columns.get("index", numbers).astype(np.int64)
    return TokenBlock(index, counts.starts, top, tail, tokens)


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
    n = sample.block.logsumexp.size
    if not -n <= check_number(t, "a token's number") < n:
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
    return _decode_entries(sample, "top", t)


def dequantize_sampled_logits(sample: Mapping[str, Any], t: int | None = None) -> LogitPair:
    """Return the tail sample of token `t`: ids and logits, in the order drawn.

    With `t` None, those of all tokens, flattened, the same number for each. Of compact rows
    (`--min-p`) ids ascend, one may occur several times, and token t owns `sampled_counts[t]`; their
    logits are not known, each is the one of the share of probability that the entry stands for.
    """
    return _decode_entries(sample, "tail", t)


def dequantize_all_logits(sample: Mapping[str, Any], t: int) -> LogitPair:
    """Return everything stored of token `t`: ids and logits, the nucleus first, then the tail."""
    ids, logits = zip(*(_decode_entries(sample, part, t) for part in ("top", "tail")), strict=True)
    return np.concatenate(ids), np.concatenate(logits)


def _decode_entries(sample: Any, part: str, t: int | None) -> LogitPair:
    sample = as_sample(sample)
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
    values = as_array(logits, np.float64, "logits")
    if logsumexp is not None:
        return np.exp(values - as_array(logsumexp, np.float64, "logsumexp"))
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
    (predictions,) = predict(sample.block.top.of_tokens(t, t + 1), k, check_tokenizer(tokenizer))
    return predictions


def predict(part: Entries, most: int, tokenizer: Any) -> list[list[Prediction]]:
    """Return the first entries of each token, at most so many, with their text."""
    counts = np.minimum(part.counts, most := check_count("k", most))
    kept = np.arange(part.ids.size) - np.repeat(part.starts[:-1], part.counts) < most
    ids, probs = part.ids[kept], part.probs[kept].tolist()
    texts, logits = token_texts(ids, tokenizer), part.logits[kept].tolist()
    return cut([*map(Prediction, ids.tolist(), texts, logits, probs)], to_starts(counts))


# Text of tokens -----------------------------------------------------------------------------------


def token_texts(ids: npt.ArrayLike, tokenizer: Any = None) -> list[str]:
    """Return what each token writes; without a tokenizer, and for ids it does not know, `#id`.

    Bytes that are no whole character show as `⟨F0 9F⟩`, a leading space is kept.
    """
    unique, inverse = np.unique(np.asarray(ids, np.int64), return_inverse=True)
    texts = [_token_text(token, tokenizer) for token in unique.tolist()]
    return [texts[i] for i in inverse.reshape(-1).tolist()]


def _token_text(token: int, tokenizer: Any) -> str:
    known = tokenizer is not None and 0 <= token < len(tokenizer)
    piece = tokenizer.convert_ids_to_tokens(token) if known else None
    if piece is None:
        return f"#{token}"
    text, piece, data = str(tokenizer.decode([token])), str(piece), b""
    if "\ufffd" not in text:
        return f" {text}" if piece.startswith("▁") and not text.startswith(" ") else text
    if re.fullmatch(r"<0x[0-9A-Fa-f]{2}>", piece):  # a byte that a vocabulary falls back to
        data = bytes([int(piece[3:5], 16)])
    elif byte_alphabet().keys() >= {*piece}:
        data = bytes(byte_alphabet()[c] for c in piece)
    shown = re.sub(
        r"[\udc80-\udcff]+",  # bytes that are no whole character
        lambda run: "⟨" + " ".join(f"{ord(c) - 0xDC00:02X}" for c in run[0]) + "⟩",
        data.decode("utf-8", "surrogateescape"),
    )
    return shown or text


@functools.cache
def byte_alphabet() -> dict[str, int]:
    """Return the byte that each character of a byte-level vocabulary stands for."""
    table = import_extra("transformers.convert_slow_tokenizer").bytes_to_unicode()
    return {character: byte for byte, character in table.items()}


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
    """Find the probability and rank of the token (T,) that is really there, at each position.

    Exact for tokens stored with a logit. Another one has at most the smallest nucleus logit, and at
    most the probability that nucleus and tail sample leave over: the smaller of the two is given.
    Stored tail tokens above it raise the least rank of a tail token.
    """
    log_prob = unstored_bound(block)
    places = []
    known = np.zeros(actual.size, bool)
    for entries in (block.tail, block.top):  # the nucleus has the last word
        hits = np.flatnonzero(entries.ids == actual[entries.owner])
        place = np.full(actual.size, -1, np.int64)
        place[entries.owner[hits]] = hits
        if not isinstance(entries, Points):
            known |= place >= 0
            log_prob[place >= 0] = entries.log_probs[place[place >= 0]]
        places.append(place)
    tail, top = places
    in_nucleus, in_tail = top >= 0, (tail >= 0) & (top < 0)
    rank = np.where(in_nucleus, top - block.top.starts[:-1], block.top.counts) + 1
    owner, q = block.tail.owner, block.tail.q
    above = in_tail[owner] & (q > q[tail[owner]] if q.size else False)
    rank += np.bincount(owner[above], minlength=actual.size)
    return TokenScores(log_prob, known, rank, in_nucleus, in_tail)


def unstored_bound(block: TokenBlock) -> npt.NDArray[np.float64]:
    """Return the largest log-probability that a token stored without a logit can have, (T,)."""
    stored = sum(part.mass * np.exp(-part.error) for part in known_parts(block))
    left = np.log(np.maximum(1 - stored, np.finfo(np.float64).tiny))
    if isinstance(block.tail, Points):
        left = np.minimum(left, math.log(block.tail.min_p))
    return np.where(block.top.counts > 0, np.minimum(left, block.top.low - block.logsumexp), left)


def known_parts(block: TokenBlock) -> list[Entries]:
    """Return the entries that are stored with their logits: nucleus and, of plain rows, tail."""
    return [part for part in (block.top, block.tail) if not isinstance(part, Points)]


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
    tail_below: float | None = None  # more than any tail token has, where they have no logits


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
        return f"{bound}{math.exp(min(self.mean_log_probability, 0)):.1%}"

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
        return align_tokens(sample, *stored_tokens(sample), tokenizer, k=k)
    if not isinstance(conversation, Iterable) or not all(
        isinstance(message, Mapping) for message in conversation
    ):
        raise LogitsError(
            "conversation is a list of messages such as {'role': 'user', 'content': 'Hi'}, not "
            f"{conversation!r:.60}; execute_analysis finds it by row or by id"
        )
    if not isinstance(chat_template, (str, type(None))):
        kind = describe_type(chat_template)
        raise LogitsError(f"chat_template is the text of a Jinja template, not {kind}")
    messages = [dict(message) for message in conversation]
    encoded = encode_conversation(messages, tokenizer, chat_template=chat_template, **options)
    return align_tokens(sample, encoded.input_ids, encoded.token_positions, tokenizer, k=k)


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
    if not positions_ascend(ids, positions):
        why = "token_positions do not ascend inside input_ids"
        raise FormatError(f"row with index {sample['index']}: {why}")
    return ids, positions


def positions_ascend(ids: npt.NDArray[Any], positions: npt.NDArray[Any]) -> bool:
    """Say whether positions (N,) ascend from 1 on, before which nothing predicts, to the last."""
    steps = np.diff(positions.astype(np.int64), prepend=0, append=max(ids.size, 1))
    return bool((steps > 0).all())


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
    below = block.tail.min_p if isinstance(block.tail, Points) else None
    figures = (np.exp(scores.log_probability), *scores[:3], where, block.top.counts, block.top.mass)
    columns = (
        range(actual.size),
        actual.tolist(),
        token_texts(actual, tokenizer),
        *(values.tolist() for values in figures),
        predict(block.top, k, tokenizer),
        predict(block.tail, MAX_TOKEN_ID, tokenizer),
        [below] * actual.size,
    )
    return [TokenAnalysis(*row) for row in zip(*columns, strict=True)]


# The text behind an output ------------------------------------------------------------------------


MOVED = "--dataset, dataset= says where the conversations are now"


@dataclass(eq=False)
class TextSource:
    """The conversations behind an output, tokenized as the run did; `open_text` finds it.

    The source dataset is opened when the first conversation is asked for.
    """

    settings: Mapping[str, Any]
    tokenizer: Any
    chat_template: str | None = None  # None: the tokenizer's own

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
        digest = re.fullmatch("sha256:[0-9a-f]{64}", str(recorded))  # version 0.1 had shorter ones
        if digest and not local_path(name).exists():
            raise SourceError(f"the dataset of the run, {name!r}, is not here; {MOVED}")
        if digest and source_revision(name) != recorded:
            raise SourceError(
                f"dataset {name!r} has changed since the run, so its text may not be what the "
                f"teacher read; bring back the file of then, or {MOVED}"
            )
        try:
            return open_source(
                name, subset=self.settings.get("subset"),
                split=str(self.settings.get("split") or "train"), revision=recorded,
                integers=[self.settings.get("index_col")],
            )  # fmt: skip
        except SourceError as error:
            raise SourceError(f"{error}; {MOVED}") from error

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
        if column not in self.source.column_names:
            raise SourceError(f"{self.settings['dataset']} has no column {column!r} of ids")
        return {int(value): row for row, value in enumerate(self.source[column])}

    def encode(self, index: int) -> EncodedConversation:
        """Tokenize the conversation with this `index` and find its extracted tokens.

        Raises:
            SourceError: the source has no such conversation, or is not the run's.
            ConversationError: it cannot be rendered.
        """
        index = check_number(index, "a conversation's id")
        if index not in self._rows:
            raise SourceError(f"{self.settings['dataset']} has no conversation {index}; {MOVED}")
        try:
            return self.encoder.encode(self.source[self._rows[index]])
        except ConversationError as error:
            why = f"{error} in {self.settings['dataset']}: is it the run's (--dataset)?"
            raise ConversationError(error.reason, why) from error

    def actual_tokens(self, block: TokenBlock) -> list[npt.NDArray[Any] | None]:
        """Return the ids of each row's extracted tokens, None where row and text do not match."""
        found: list[npt.NDArray[Any] | None] = []
        for index, n in zip(block.index.tolist(), block.num_tokens.tolist(), strict=True):
            found.append(None)
            with contextlib.suppress(ConversationError):
                encoded = self.encode(index) if index in self._rows else None
                if encoded is not None and encoded.token_positions.size == n:
                    found[-1] = encoded.input_ids[encoded.token_positions]
        return found


def find_tokenizer(
    settings: Mapping[str, Any], *, model: str | None = None, trust_remote_code: bool = False
) -> Any:
    """Load the tokenizer of the teacher that a run's settings name, or from where it is now."""
    name = settings.get("model") if model is None else model
    if not name:
        raise OpenError("the output does not say which model it was made with (--model, model=)")
    try:
        return load_tokenizer(
            name,
            revision=None if model else settings.get("model_revision"),
            trust_remote_code=trust_remote_code,
        )
    except LogitsError as error:
        remedy = "--model, model= says where it is now"
        if settings.get("trust_remote_code") and not trust_remote_code:
            remedy = "the run trusted its code: --trust-remote-code, trust_remote_code=True"
        raise LogitsError(f"{error}; {remedy}") from None


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
    if dataset is not None:
        settings = {**settings, "dataset": check_name(dataset), "dataset_revision": None}
    if check_tokenizer(tokenizer) is None:
        tokenizer = find_tokenizer(settings, model=model, trust_remote_code=trust_remote_code)
    return TextSource(settings, tokenizer, output.store.read_text(TEMPLATE_FILE) or None)


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
        encoded = text.encode(sample["index"])
        ids, positions = encoded.input_ids, encoded.token_positions
    analysis = align_tokens(sample, ids, positions, text.tokenizer, k=k)
    return replace(analysis, model=str(text.settings.get("model") or ""))


def analyze_missing(output: LogitDataset, text: TextSource, index: int) -> ConversationAnalysis:
    """Show a conversation of the source that the output does not hold, as not extracted."""
    skipped, pieces = output.skipped(), []
    note = "this conversation is not in the output"
    if index in skipped:
        note = f"this conversation gave no row: {skipped[index]}"
    try:
        pieces = token_texts(text.encode(index).input_ids, text.tokenizer)
    except ConversationError as error:
        note = f"{note}: {error}"
    return ConversationAnalysis(index, [], [(piece, None) for piece in pieces], note=note)


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
    output, row = as_output(logit_dataset_id), check_row_number(sample_index)
    if conversation is not None:
        conversation = check_number(conversation, "a conversation's id")
    text = open_text(
        output, model=model, dataset=dataset, tokenizer=tokenizer,
        trust_remote_code=trust_remote_code,
    )  # fmt: skip
    if conversation is not None:
        numbers = row_numbers(output)
        if conversation not in numbers:
            return analyze_missing(output, text, conversation)
        row = numbers[conversation]
    return analyze_row(output, row, text, k=k)


# --------------------------------------------------------------------------------------------------
# 7 Show
# --------------------------------------------------------------------------------------------------

SURPRISE_LEVELS = (0.9, 0.5, 0.2, 0.05, 0.01, 0.001)  # level i: at least this probable; then 6
PAINT: list[list[str]] = [  # of each level in the terminal: a colour and its attributes
    [], [], ["cyan"], ["yellow"], ["yellow", "bold"], ["magenta", "bold"],
    ["magenta", "bold", "reverse"],
]  # fmt: skip
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
        return chr(0x2400 + code) if code < 0x20 else f"⟨U+{code:04X}⟩"

    return _UNSEEN.sub(picture, text)


def show_token(text: str, most: int | None = None) -> str:
    """Write a token on one line, its spaces and line breaks visible, at most so many characters."""
    text = show_text(text).replace("\n", "↵").replace("\t", "⇥").replace(" ", "·")
    return text if most is None or len(text) <= most else text[: most - 1] + "…"


def surprise_level(probability: float) -> int:
    """Return 0 for a token the teacher expected to 6 for one it all but excluded."""
    return sum(probability < bound for bound in SURPRISE_LEVELS)


def show_probability(probability: float, exact: bool = True) -> str:
    """Write a probability in percent, with `≤` where it is a bound."""
    text = f"{probability:.1%}" if probability >= 0.01 else f"{100 * probability:.2g}%"
    return text if exact else f"≤{text}"


def show_standing(token: TokenAnalysis) -> str:
    """Write the probability and the rank of the token that is there."""
    rank = token.rank if token.where == "nucleus" else f"≥ {token.rank}"
    return f"{show_probability(token.probability, token.exact)}, rank {rank}"


def list_predictions(
    predictions: Iterable[Prediction],
    actual: int | None = None,
    *,
    bar: int,
    below: float | None = None,
) -> list[str]:
    """Write predictions as lines: number, probability, a bar, the token; `▸` marks the actual.

    Of those whose probability is not known, only that it is `below` something, this is written.
    """
    lines = []
    for number, (token, text, _, probability) in enumerate(predictions, 1):
        whole, eighth = divmod(round(min(max(0, probability), 1) * bar * 8), 8)
        drawn = ("█" * whole + " ▏▎▍▌▋▊▉"[eighth])[:bar]
        mark, chance = "▸" if token == actual else " ", show_probability(probability)
        if below is not None:
            chance, drawn = f"<{show_probability(below)}", ""
        lines.append(f"{mark}{number:2} {chance:>8} {drawn:{bar}} {show_token(text, 24)}")
    return lines


# Terminal -----------------------------------------------------------------------------------------


def colours_wanted() -> bool:
    """Say whether the terminal shows colours: a terminal, or FORCE_COLOR; never with NO_COLOR."""
    if os.environ.get("NO_COLOR") or not (os.environ.get("FORCE_COLOR") or sys.stdout.isatty()):
        return False
    return importlib.util.find_spec("termcolor") is not None


def count_columns(text: str) -> int:
    """Return how many columns of a terminal a text takes: two for wide characters."""
    wide = sum(unicodedata.east_asian_width(c) in "WF" for c in text)
    return len(text) + wide - sum(unicodedata.combining(c) > 0 for c in text)


def break_lines(text: str) -> str:
    """Turn the spaces at which the terminal's lines end into line breaks, never inside of a word.

    In pipes the text stays as it is. So does a word that is longer than a line.
    """
    if not (os.environ.get("COLUMNS", "").isdigit() or sys.stdout.isatty()):
        return text
    width, column, parts = max(shutil.get_terminal_size().columns, 40), 0, []
    for word in re.findall(r"\n| ?[^ \n]*", text):
        size = count_columns(word)
        if word[:1] == " " and word != " " and column + size > width:
            word, column = f"\n{word[1:]}", size - 1
        else:
            column = 0 if word == "\n" else column + size
        parts.append(word)
    return "".join(parts)


def paint(text: str, style: Sequence[str]) -> str:
    """Colour text for the terminal, line by line, where colours are wanted."""
    if not style or not colours_wanted():
        return text
    colored, (colour, *attributes) = import_extra("termcolor", "viz").colored, style
    lines = text.split("\n")
    return "\n".join(line and colored(line, colour, None, attributes, force_color=True)
                     for line in lines)  # fmt: skip


def print_sample_info(sample: Mapping[str, Any]) -> None:
    """Print what a sample holds: tokens, nucleus sizes and the probability they cover."""
    sample = as_sample(sample)
    block, stored = sample.block, ""
    if "input_ids" in sample:
        stored = f", and the {plural(sample['input_ids'].size, 'token')} of its text"
    print(f"conversation {sample['index']}: {plural(sample['num_tokens'], 'token')}{stored}")
    drawn = plural(block.tail.counts.max(initial=0), block.tail.noun)
    for label, values, how in (
        ("nucleus size", block.top.counts, "{:.3g}"),
        ("covered by it", block.top.mass, "{:.1%}"),
        ("likeliest token", block.first_probs, "{:.1%}"),
        (f"tail of {drawn}", block.tail.mass, "{:.2%}"),
    ):
        if values.size:
            low, mean, high = map(how.format, (values.min(), values.mean(), values.max()))
            print(f"  {label:18} {low} to {high}, mean {mean}")


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
    print_token(sample, t, find_words(sample, tokenizer), k=k)


def find_words(sample: Sample, tokenizer: Any) -> Any:
    """Return the tokenizer, None for that of a sample's output; print why there is none."""
    if check_tokenizer(tokenizer) is not None or sample.output is None:
        return tokenizer
    tokenizer, why = sample.output.words
    if why:
        print(break_lines(f"ids only: {why}"))
    return tokenizer


def print_token(
    sample: Sample, t: int, tokenizer: Any, *, k: int, actual: TokenAnalysis | None = None
) -> None:
    """Print what `print_top_tokens` does; a row that stores its text tells the actual token."""
    t = check_token(sample, t)
    if actual is None and sample.block.tokens is not None:
        ids, positions = stored_tokens(sample)
        there = ids[positions[t : t + 1]]
        (actual,) = analyze_tokens(sample.block.tokens_at(t, t + 1), there, tokenizer, k=1)
    size, mass = sample["top_counts"][t], get_nucleus_probability_mass(sample, t)
    line = f"token {t}: nucleus of {size} covering {mass:.1%}"
    if actual is not None:
        line += f"; it is {show_token(actual.text)}, {show_standing(actual)}"
    predictions = decode_top_tokens(sample, t, tokenizer, k=k)
    print(break_lines(line))
    print(*list_predictions(predictions, actual.id if actual else None, bar=16), sep="\n")


def print_dataset_stats(dataset: Any) -> None:
    """Print the figures of a dataset: `DatasetStats`, or what `compute_dataset_stats` takes."""
    print(dataset if isinstance(dataset, DatasetStats) else compute_dataset_stats(dataset))


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
    dataset, tokens = as_output(name), check_count("tokens", tokens)
    print(break_lines(describe_run(dataset)))
    sample = get_sample(dataset, sample_index)
    print_sample_info(sample)
    tokenizer = find_words(sample, tokenizer)
    count = min(tokens, sample["num_tokens"])
    print(f"its first {plural(count, 'token')}:")
    for t in range(count):
        print_token(sample, t, tokenizer, k=5)
    return sample


def describe_run(dataset: LogitDataset) -> str:
    """Say in one line how large an output is and how it was made."""
    parts = [f"{plural(len(dataset), 'row')} in {plural(len(dataset.shards), 'shard')}"]
    if skipped := Counter(dataset.skipped().values()):
        reasons = ", ".join(f"{reason} {n:,}" for reason, n in skipped.most_common())
        parts.append(f"{plural(skipped.total(), 'conversation')} without a row ({reasons})")
    names = ["model", "dataset", "split", "top_p", "top_p_max", "sampled_n", "min_p", "seed"]
    names += ["dtype"]
    known = [name for name in names if dataset.settings.get(name) is not None]
    parts += [f"{name} {dataset.settings[name]!s:.100}" for name in known]
    return show_text(f"{dataset.name}: {', '.join(parts)}")


def visualize_conversation_probabilities(
    analysis: ConversationAnalysis, return_html: bool = False
) -> str:
    """Return the conversation with each extracted token coloured by its probability.

    Coloured terminal text, or with `return_html` a self-contained page that loads nothing. Where
    the terminal has no colours, tokens below 50% carry their probability in braces.
    """
    check_analyses([analysis])
    if return_html:
        return render_page([analysis])
    facts = ", ".join(conversation_facts(analysis))
    head = break_lines(show_text(f"conversation {analysis.index}: {facts}"))
    return f"{head}\n{paint_legend()}\n\n{paint_text(analysis)}"


def check_analyses(analyses: Any) -> list[ConversationAnalysis]:
    """Return analyses, or one, as a list; refuse what are none, and say what to pass."""
    analyses = [*analyses] if isinstance(analyses, (list, tuple)) else [analyses]
    for analysis in analyses:
        if not isinstance(analysis, ConversationAnalysis):
            raise LogitsError(
                "an analysis is needed, what analyze_token_probabilities returns, not "
                f"{describe_type(analysis)}"
            )
    return analyses


def paint_text(analysis: ConversationAnalysis) -> str:
    """Colour the text of a conversation for the terminal, its lines broken between words."""
    coloured, shown, styles = colours_wanted(), [], []
    texts = join_characters([text for text, _ in analysis.pieces])
    before: list[TokenAnalysis] = []  # of the character that comes, which several tokens write
    for text, (_, t) in zip(map(show_text, texts), analysis.pieces, strict=True):
        tokens = [*before, *([analysis.tokens[t]] if t is not None else [])]
        before = [] if text else tokens
        probability = math.prod(token.probability for token in tokens)
        level = surprise_level(probability)
        if text and not coloured and level > 1:
            body = text.rstrip("\n")
            mark = show_probability(probability, all(token.exact for token in tokens))
            text = f"{body}{{{mark}}}{text[len(body) :]}"
        shown.append(text)
        styles.append(PAINT[level] if tokens else ["dark_grey"])
    whole, ends = break_lines("".join(shown)), itertools.accumulate(map(len, shown))
    return "".join(
        paint(whole[end - len(text) : end], style)
        for text, end, style in zip(shown, ends, styles, strict=True)
    )


def paint_legend() -> str:
    """Say what the colours, or the braces, mean."""
    if not colours_wanted():
        return "{3.1%}: what the teacher gave the token before it, where below 50%"
    bounds = [f"{100 * bound:g}%" for bound in SURPRISE_LEVELS]
    words = [f"{bound}+" for bound in bounds] + [f"less than {bounds[-1]}"]
    painted = [paint(word, style) for word, style in zip(words, PAINT, strict=True)][1:]
    boxes = "  ".join([*painted, paint("not extracted", ["dark_grey"])])
    return f"probability that the teacher gave the token that is there:\n{boxes}"


# The page -----------------------------------------------------------------------------------------

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="{{ policy }}">
<title>{{ title }}</title>
<style>{{ css|safe }}</style>
</head>
<body>
<main>
<h1>{{ title }}</h1>
<p class="dim">{{ about }}</p>
{% if analyses|length > 1 %}
<nav>{% for seen in analyses %}<a href="#s{{ loop.index0 }}">conversation {{ seen.index }}</a>
{% endfor %}</nav>
{% endif %}
{% if analyses %}
<p class="legend"><span class="of">Probability that the teacher gave the token that is there</span>
{% for bound in bounds %}<span class="b{{ loop.index0 }}">≥ {{ bound }}</span>
{% endfor %}<span class="b{{ bounds|length }}">&lt; {{ bounds[-1] }}</span>
<span class="bound">not stored: at most this</span> <span class="dim">not extracted</span></p>
<p class="dim">Point at or tap a token for its predictions; arrow keys move, Esc closes.</p>
{% endif %}
{% if stats %}
<section><h2>The whole data set</h2>
<dl>{% for label, value in stats.facts().items() %}\
<div><dt>{{ label }}</dt><dd>{{ value }}</dd></div>{% endfor %}</dl>
</section>
{% endif %}
{% for seen in analyses %}
{% set s = loop.index0 %}
<section id="s{{ s }}">
<h2>Conversation {{ seen.index }}</h2>
<p class="dim">{{ facts(seen)|join(", ") }}{{ ", " if seen.model }}{{ seen.model }}</p>
<div class="text" dir="auto">\
{% for t, kind, before, box, after in pieces(seen) %}{{ before }}{% if kind %}<span \
class="{{ kind }}" id="s{{ s }}-t{{ t }}" data-is="{{ tell(seen.tokens[t]) }}">{{ box }}</span>\
{% endif %}{{ after }}{% endfor %}\
</div>
</section>
{% endfor %}
</main>
<div id="box" role="status" hidden></div>
<script>{{ script|safe }}</script>
</body>
</html>
"""

PAGE_CSS = """
:root {
  --bg: #ffffff; --fg: #1b1f24; --dim: #5f6a75; --line: #d5dbe1; --card: #f5f7f9;
  --bar: #0b62a8; --t5: #ffffff; --t6: #ffffff;
  --b1: #fff3e2; --b2: #fee0b8; --b3: #fdc27e; --b4: #fb9a42; --b5: #c04c00; --b6: #7a2503;
}
@media (prefers-color-scheme: dark) {
  :root {
    --bg: #14171b; --fg: #e4e8ec; --dim: #98a3ae; --line: #363d45; --card: #1d2126;
    --bar: #5aa9e6; --t5: #14171b; --t6: #14171b;
    --b1: #2b2417; --b2: #463417; --b3: #6b4a14; --b4: #86570c; --b5: #f0a03c; --b6: #ffdf9e;
  }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--bg); color: var(--fg); font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 60rem; margin: 0 auto; padding: 1.5rem 1rem; }
h1 { font-size: 1.5rem; margin: 0 0 .25rem; }
h2 { font-size: 1.15rem; margin: 2rem 0 .25rem; }
p, dl { margin: .25rem 0 .75rem; }
a { color: var(--bar); }
.dim, dt { color: var(--dim); font-size: .875rem; overflow-wrap: anywhere; }
nav, .legend { display: flex; flex-wrap: wrap; gap: .35rem .6rem; font-size: .875rem; }
.legend span { padding: 0 .45rem; border-radius: 3px; border: 1px solid var(--line); }
.legend .of { border: 0; padding: 0; }
.text, #box { font: .92rem/1.85 ui-monospace, Menlo, Consolas, "DejaVu Sans Mono", monospace;
  white-space: pre-wrap; overflow-wrap: anywhere; padding: .75rem 1rem; border-radius: 6px;
  border: 1px solid var(--line); }
.text { color: var(--dim); unicode-bidi: isolate; }
.tok { color: var(--fg); border-radius: 2px; cursor: pointer; padding: .12em 0;
  box-shadow: inset -1px 0 var(--bg); scroll-margin: 2rem; }
.b1 { background: var(--b1); } .b2 { background: var(--b2); } .b3 { background: var(--b3); }
.b4 { background: var(--b4); }
.b5 { background: var(--b5); color: var(--t5); } .b6 { background: var(--b6); color: var(--t6); }
.bound { text-decoration: underline dotted 2px; text-underline-offset: .2em; }
.tok.on { outline: 2px solid var(--bar); }
dl { display: grid; gap: .5rem; grid-template-columns: repeat(auto-fill, minmax(9rem, 1fr)); }
dl div { background: var(--card); border-radius: 6px; padding: .4rem .7rem; }
dd { margin: 0; font-size: 1.1rem; }
#box { position: fixed; left: .5rem; right: .5rem; bottom: .5rem; max-height: var(--room);
  overflow: auto; background: var(--card); line-height: 1.35; font-size: .8rem;
  direction: ltr; box-shadow: 0 2px 12px #0004; }
#box::first-line { font-size: 1rem; font-weight: 700; }
#box.above { top: .5rem; bottom: auto; }
@media (min-width: 85rem) {  /* there is room beside the text */
  main { margin-right: 26rem; margin-left: max(0rem, calc(100vw - 88rem) / 2); }
  #box, #box.above { top: 1.5rem; bottom: auto; left: auto; width: 24.5rem; max-height: 92vh;
    right: max(.5rem, calc(100vw - 88rem) / 2); }
}
"""

PAGE_SCRIPT = """
"use strict";
const box = document.getElementById("box"), all = [...document.querySelectorAll(".tok")];
let shown = null, pinned = null;

function show(node) {
  if (shown) shown.classList.remove("on");
  shown = node;
  box.hidden = !node;
  if (!node) return;
  node.classList.add("on");
  box.textContent = node.dataset.is;
  place();
}
function place() {  // on the side of the token that leaves more room
  const {top, bottom} = shown.getBoundingClientRect(), below = innerHeight - bottom;
  box.classList.toggle("above", top > below);
  box.style.setProperty("--room", Math.max(top, below, 120) - 20 + "px");
}
function pin(node) {
  pinned = node;
  if (node) node.scrollIntoView({block: "nearest"});
  show(node);
}
document.addEventListener("mouseover", event => {
  if (!pinned) show(event.target.closest(".tok"));
});
document.addEventListener("click", event => {
  const node = event.target.closest(".tok");
  if (!event.target.closest("#box")) pin(node === pinned ? null : node);
});
document.addEventListener("keydown", event => {
  const step = {ArrowRight: 1, ArrowLeft: -1}[event.key];
  if (event.key === "Escape") pin(null);
  if (!step || event.ctrlKey || event.metaKey || event.altKey) return;
  event.preventDefault();
  pin(all[Math.max(0, Math.min(all.length - 1, shown ? all.indexOf(shown) + step : 0))] || null);
});
function follow() {
  const node = document.getElementById(location.hash.slice(1));
  if (node && node.matches(".tok")) pin(node);
}
addEventListener("scroll", () => { if (shown) place(); });
addEventListener("hashchange", follow);
follow();
"""


def render_page(
    analyses: Sequence[ConversationAnalysis],
    *,
    title: str = "What the teacher expected",
    about: str = "",
    stats: DatasetStats | None = None,
) -> str:
    """Return a self-contained page of several conversations: one file, no network, both themes.

    `page.html#s1-t40` opens it at token 40 of the second conversation. Everything from the data is
    escaped, and made visible.

    Args:
        analyses: the conversations, in the order shown.
        title: heading and window title.
        about: a line under the heading.
        stats: figures put before the conversations.
    """
    analyses = check_analyses(analyses)
    if not isinstance(stats, (Figures, type(None))):
        kind = describe_type(stats)
        raise LogitsError(f"stats are what compute_dataset_stats returns, not {kind}")
    jinja2 = import_extra("jinja2")
    templates = jinja2.Environment(
        autoescape=True,
        finalize=lambda value: show_text(value) if type(value) is str else value,
        trim_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    digest = base64.b64encode(hashlib.sha256(PAGE_SCRIPT.encode()).digest()).decode()
    page = templates.from_string(PAGE).render(
        # Even a mistake in escaping could not run: only this very script may.
        policy=f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'",
        title=title,
        about=about,
        bounds=[f"{100 * bound:g}%" for bound in SURPRISE_LEVELS],
        stats=stats,
        analyses=analyses,
        facts=conversation_facts,
        pieces=page_pieces,
        tell=describe_token,
        css=PAGE_CSS,
        script=PAGE_SCRIPT,
    )
    return str(page)


def conversation_facts(analysis: ConversationAnalysis) -> list[str]:
    """Say how many of a conversation's tokens there are, and how well the teacher foresaw them."""
    facts = ["not extracted"]
    if analysis.tokens:
        first = sum(token.rank == 1 for token in analysis.tokens) / len(analysis.tokens)
        facts = [
            plural(len(analysis.tokens), "token"),
            f"typical probability of a token {analysis.typical_probability}",
            f"{first:.0%} are the teacher's first choice",
        ]
    return [*facts, analysis.note] if analysis.note else facts


def describe_token(token: TokenAnalysis, *, tail: int = 6) -> str:
    """Write what the teacher thought of a token as lines, the first of its tail sample included."""
    drawn = list(dict.fromkeys(token.tail))  # points may hit one twice
    order = "by id" if token.tail_below else "in the order drawn"
    more = f", {tail} of {len(drawn)}" if len(drawn) > tail else ""
    where = "" if token.where == "nucleus" else f", {token.where.replace('tail', 'in the tail')}"
    size = plural(token.nucleus_size, "token")
    lines = [
        show_token(token.text),
        f"id {token.id}, token {token.t}: {show_standing(token)}{where}",
        f"log p {'' if token.exact else '≤ '}{token.log_probability:.3f}; nucleus of {size}"
        f" covering {token.nucleus_mass:.1%}\n",
        "likeliest",
        *list_predictions(token.predictions, token.id, bar=8),
    ]
    if token.tail:
        lines += [f"\ntail sample, {order}{more}"]
    told = list_predictions(drawn[:tail], token.id, bar=8, below=token.tail_below)
    return "\n".join([*lines, *told])


def page_pieces(analysis: ConversationAnalysis) -> Iterator[tuple[int | None, str, str, str, str]]:
    """Yield each piece of the text: token, CSS class, and what stands before, in and after its box.

    Spaces before a token and the line break after it are left out of its box: where a line wraps
    they would hang there as a coloured stub.
    """
    for text, t in analysis.pieces:
        if t is None:
            yield None, "", text, "", ""
            continue
        token = analysis.tokens[t]
        before = re.match(r" *(?=[^ \n])|", text)[0]  # type: ignore[index]  # it always matches
        box = text.removeprefix(before).replace("\n", "↵\n")
        after = "\n" if box.endswith("\n") else ""
        box = box.removesuffix(after)
        kind = f"tok b{surprise_level(token.probability)}{'' if token.exact else ' bound'}"
        yield t, kind, before, (box if box.strip(" ") else box.replace(" ", "\u00a0")) or "∅", after


def write_page(path: str | Path, page: str) -> None:
    """Write a page as UTF-8; one that cannot be written is a `LogitsError`."""
    with writing(path) as target:
        target.write_text(page, encoding="utf-8")


@contextlib.contextmanager
def writing(path: str | Path) -> Iterator[Path]:
    """Make the folder of a file that is written for the user; say in one line where that fails."""
    target = local_path(path)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        yield target
    except OSError as error:
        raise LogitsError(f"cannot write {path}: {error.strerror or error}") from error


# Plots --------------------------------------------------------------------------------------------


@contextlib.contextmanager
def drawing(rows: int = 1, columns: int = 1, **how: Any) -> Iterator[tuple[Any, Any, Any]]:
    """Yield a figure in the house style, its axes and colours that the colour-blind tell apart.

    In the end it is out of pyplot's hands, so that a notebook shows it once, as a result.
    """
    pyplot, seaborn = import_extra("matplotlib.pyplot", "viz"), import_extra("seaborn", "viz")
    style = {"axes.titlesize": 11, "axes.labelsize": 10, "figure.dpi": 110, "font.size": 10}
    with pyplot.rc_context(), seaborn.axes_style("whitegrid"), pyplot.rc_context(style):
        figure, axes = pyplot.subplots(rows, columns, **{"figsize": (7, 4), **how})
        pyplot.close(figure)
        yield figure, axes, seaborn.color_palette("colorblind")
        figure.tight_layout()


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
    best = decode_top_tokens(sample, t, tokenizer, k=5)
    names = [f"{p.probability:6.1%}  {show_token(p.text, 20)}".replace("$", r"\$") for p in best]
    with drawing() as (figure, axes, colours):
        label = f"nucleus, {plural(ids.size, 'token')}"
        axes.plot(np.arange(ids.size) + 1, logits, "o-", ms=4, color=colours[0], label=label)
        if tail.size:
            behind = ids.size + np.arange(tail.size) + 1
            part = sample.block.tail
            unknown = "logits" if isinstance(part, Points) else "ranks"
            label = f"tail sample, {plural(tail.size, part.noun)} ({unknown} unknown)"
            axes.plot(behind, np.sort(tail)[::-1], "^", ms=5, color=colours[1], label=label)
        total = float(sample["logsumexp"][t])
        axes.axhline(total, color=colours[7], ls="--", lw=1, label="log-sum-exp (probability 1)")
        frame = {"facecolor": "white", "edgecolor": "0.8", "boxstyle": "round"}
        place: Any = {"transform": axes.transAxes, "va": "top", "ha": "right", "ma": "left"}
        place |= {"family": ["monospace", "sans-serif"], "bbox": frame}
        axes.text(0.98, 0.86, "\n".join(names), **place)
        axes.set(xlabel="rank in the nucleus, then the tail sample", ylabel="logit (nats)")
        axes.margins(y=0.12)
        axes.set_title(f"Token {t}: {get_nucleus_probability_mass(sample, t):.1%} in the nucleus")
        axes.legend()
    return figure


def plot_nucleus_vs_sampled(sample: Mapping[str, Any], t: int | None = None) -> Any:
    """Plot the log-probabilities of nucleus entries against the tail sample's.

    Those of token `t`, or of all tokens of the sample.
    """
    sample = as_sample(sample)
    block, which = sample.block, plural(sample["num_tokens"], "token")
    if t is not None:
        t = check_token(sample, t)
        block, which = block.tokens_at(t, t + 1), f"token {t}"
    parts = {"nucleus": block.top, "tail sample": block.tail}
    least = min(-1.0, *(part.log_probs.min(initial=0) for part in parts.values()))
    edges = np.linspace(least, 0, 61)
    with drawing() as (figure, axes, colours):
        for (name, part), colour, hatch in zip(parts.items(), colours, ("", "//"), strict=False):
            look = {"color": colour, "edgecolor": colour, "alpha": 0.6, "hatch": hatch}
            label = f"{name}, {plural(part.ids.size, part.noun)}"
            axes.hist(part.log_probs, edges, label=label, **look)
        axes.set(xlabel="log-probability (nats)", ylabel="entries", yscale="log")
        axes.set_title(f"Conversation {sample['index']}: what is stored of {which}")
        axes.legend(loc="upper left")
    return figure


def plot_nucleus_sizes(sample: Mapping[str, Any]) -> Any:
    """Plot nucleus size, and the probability that the nucleus covers, along a sample."""
    sample = as_sample(sample)
    counts, mass = sample.block.top.counts, sample.block.top.mass
    shape: Any = {"figsize": (8, 4.6), "sharex": True, "height_ratios": (3, 2)}
    with drawing(2, 1, **shape) as (figure, (upper, lower), colours):
        upper.stairs(counts, np.arange(counts.size + 1) - 0.5, fill=True, color=colours[0])
        upper.set(ylabel="nucleus size (tokens)", ylim=(0, None))
        upper.set_title(f"Conversation {sample['index']}: nucleus along the text")
        lower.plot(100 * mass, ".", ms=4, color=colours[1])
        lower.set(ylabel="covered (%)", xlabel="token of the row", ylim=(0, 104))
    return figure


def plot_nucleus_size_analysis(stats: Any, *, max_samples: int | None = None) -> Any:
    """Plot how nucleus sizes are distributed over an output: counts, and the share up to a size.

    Args:
        stats: `NucleusSizeStats`, or what `analyze_nucleus_sizes` takes.
        max_samples: rows to read at most.
    """
    if not isinstance(stats, NucleusSizeStats):
        stats = analyze_nucleus_sizes(stats, max_samples)
    least = min(1, stats.min)  # compact rows may have nuclei without a token
    counts = stats.histogram[least : max(stats.max, 1) + 1]
    edges = np.arange(counts.size + 1) + least - 0.5
    with drawing(1, 2, figsize=(10, 3.8)) as (figure, (left, right), colours):
        left.stairs(counts, edges, fill=True, color=colours[0])
        left.set(xlabel="nucleus size (tokens)", ylabel="tokens", yscale="log")
        left.set_title(f"{plural(stats.tokens, 'token')} of {plural(stats.rows, 'row')}")
        shares = 100 * np.cumsum(counts) / max(stats.tokens, 1)
        right.stairs(shares, edges, baseline=None, color=colours[0])
        for q, colour, marker in ((50, colours[1], "o"), (95, colours[3], "^")):
            size = stats.percentile(q)
            right.plot(size, q, marker, ms=9, color=colour, label=f"{q}% within {size}")
        right.set(xlabel="nucleus size (tokens)", ylabel="nuclei up to it (%)", ylim=(0, 101))
        right.set_title(f"mean {stats.mean:.1f}, standard deviation {stats.std:.1f}")
        right.legend(loc="lower right")
    return figure


# --------------------------------------------------------------------------------------------------
# 8 Check
# --------------------------------------------------------------------------------------------------

PERCENTILES = (1, 5, 25, 50, 75, 95, 99)


class Figures:
    """Figures by label; `str` and, in a notebook, the value itself show them as a table."""

    def facts(self) -> dict[str, str]:
        """Return the figures as text, by label."""
        raise NotImplementedError

    def __str__(self) -> str:
        return "\n".join(f"{label:26} {value:>14}" for label, value in self.facts().items())

    def _repr_html_(self) -> str:
        facts = import_extra("pandas").Series(self.facts(), name=type(self).__name__)
        return str(facts.to_frame().to_html())


@dataclass(eq=False)
class NucleusSizeStats(Figures):
    """How many tokens the nuclei hold; everything follows exactly from the histogram.

    `std` is that of all tokens, not of a sample.
    """

    histogram: npt.NDArray[np.int64]  # (256,) tokens by nucleus size
    rows: int

    def __post_init__(self) -> None:
        sizes, used = np.arange(256), np.flatnonzero(self.histogram)
        self.tokens = int(self.histogram.sum())
        self.min, self.max = (int(used[0]), int(used[-1])) if used.size else (0, 0)
        n = max(self.tokens, 1)
        total, squares = int(self.histogram @ sizes), int(self.histogram @ sizes**2)
        self.mean, self.std = total / n, math.sqrt(n * squares - total * total) / n
        self.percentiles = {q: self.percentile(q) for q in PERCENTILES}

    def percentile(self, q: float) -> int:
        """Return percentile `q`: the smallest size that so many percent do not exceed."""
        if not (isinstance(q, (int, float, np.number)) and 0 <= q <= 100):
            raise LogitsError(f"percentile {q!r:.40}: a number from 0 to 100 is needed")
        place = max(math.ceil(q * self.tokens / 100), 1)  # 7 / 100 * 100 is over 7
        return int(np.searchsorted(np.cumsum(self.histogram), place)) if self.tokens else 0

    def facts(self) -> dict[str, str]:
        """Return the figures as text, by label."""
        return {
            "rows": f"{self.rows:,}", "tokens": f"{self.tokens:,}",
            "smallest": str(self.min), "largest": str(self.max),
            "mean": f"{self.mean:.2f}", "standard deviation": f"{self.std:.2f}",
            **{f"percentile {q}": str(size) for q, size in self.percentiles.items()},
        }  # fmt: skip


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
            moved = torch.tensor(sizes, dtype=torch.int64, device=device)
        except (RuntimeError, AssertionError, TypeError) as error:
            raise LogitsError(f"cannot count on device {device!r}: {first_line(error)}") from error
        histogram += torch.bincount(moved, minlength=256).cpu().numpy()
    return NucleusSizeStats(histogram, rows)


# Whole outputs ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class BytesPerTokenStats(Figures):
    """What a stored token costs, column by column, footers included."""

    tokens: int
    total_bytes: int
    column_bytes: dict[str, int]

    @property
    def bytes_per_token(self) -> float:
        """Bytes of the files by token."""
        return self.total_bytes / max(self.tokens, 1)

    def facts(self) -> dict[str, str]:
        """Return the figures as text, dearest column first."""
        dearest = sorted(self.column_bytes.items(), key=lambda item: -item[1])
        columns = {name: f"{size / max(self.tokens, 1):.1f} B" for name, size in dearest}
        return {"bytes per token": f"{self.bytes_per_token:.1f} B", **columns}


def compute_bytes_per_token_stats(dataset: Any) -> BytesPerTokenStats:
    """Measure what a token of an output costs, from file sizes, footers and `top_counts`.

    Args:
        dataset: the output, by name or opened.

    Raises:
        LogitsError: the rows are at hand and in no files.
    """
    dataset = as_rows(dataset)
    if not isinstance(dataset, LogitDataset):
        raise LogitsError("bytes are those of files: pass an output, by name or opened")
    columns: Counter[str] = Counter()
    for shard, name in enumerate(dataset.shards):
        footer = dataset.footer(shard)
        with dataset.store.reading(name):
            for group in map(footer.row_group, range(footer.num_row_groups)):
                for column in map(group.column, range(footer.num_columns)):
                    columns[column.path_in_schema.split(".")[0]] += column.total_compressed_size
    tokens = analyze_nucleus_sizes(dataset).tokens
    return BytesPerTokenStats(tokens, sum(dataset.sizes.values()), dict(columns))


@dataclass(frozen=True, eq=False)
class DatasetStats(Figures):
    """What an output holds, over all tokens that were read.

    Shares are of all tokens, means over tokens. What concerns the actual token (the one that the
    conversation goes on with) is of the `known` tokens, None when the rows do not say which it is.
    """

    rows: int
    tokens: int
    nucleus: NucleusSizeStats
    mean_mass: float  # probability that the nucleus covers
    min_mass: float
    mean_tail_mass: float  # probability of the tail sample
    mean_first: float  # probability of the likeliest token; 0 where there is no nucleus
    capped: float | None  # share of nuclei that K cut before they covered top_p
    known: int = 0
    agreement: float | None = None  # the actual token is the likeliest
    in_nucleus: float | None = None
    in_tail: float | None = None
    bounded: int = 0  # known tokens that are not stored, whose probability is a bound
    mean_log_probability: float | None = None  # of the actual token; bounds taken as they are
    bytes_per_token: float | None = None
    without_nucleus: int = 0  # tokens; `mean_first` and `agreement` are lower bounds if there are

    def facts(self) -> dict[str, str]:
        """Return the figures as text, by label; what is not known is left out."""
        perplexity, least = None, "≥ " if self.without_nucleus else ""
        if self.mean_log_probability is not None:
            perplexity = math.exp(min(-self.mean_log_probability, 700))
        figures = (
            ("rows", self.rows, "{:,}"),
            ("tokens", self.tokens, "{:,}"),
            ("nucleus size, mean", self.nucleus.mean, "{:.1f}"),
            ("nucleus size, median", self.nucleus.percentiles[50], "{}"),
            ("nucleus size, 99%", self.nucleus.percentiles[99], "{}"),
            ("covered by nucleus", self.mean_mass, "{:.2%}"),
            ("covered at least", self.min_mass, "{:.2%}"),
            ("covered by tail", self.mean_tail_mass, "{:.2%}"),
            ("likeliest token", self.mean_first, least + "{:.1%}"),
            ("cut by the cap", self.capped, "{:.2%}"),
            ("actual is likeliest", self.agreement, least + "{:.2%}"),
            ("actual in nucleus", self.in_nucleus, "{:.2%}"),
            ("actual in tail", self.in_tail, "{:.2%}"),
            ("perplexity of the text", perplexity, "≥ {:.3f}" if self.bounded else "{:.3f}"),
            ("bytes per token", self.bytes_per_token, "{:.1f}"),
        )
        return {label: how.format(value) for label, value, how in figures if value is not None}


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
    if actual_tokens is not None and not callable(actual_tokens):
        kind = describe_type(actual_tokens)
        raise LogitsError(f"actual_tokens is open_text(output).actual_tokens, not {kind}")
    in_files = isinstance(dataset, LogitDataset)
    limits = RunLimits.of(dataset.settings if in_files else {})
    sums: Counter[str] = Counter()
    histogram, least = np.zeros(256, np.int64), 1.0
    for block in iter_blocks(dataset, max_samples=max_samples):
        histogram += np.bincount(block.top.counts, minlength=256)
        least = min(least, float(block.top.mass.min(initial=1.0)))
        sums.update(sum_block(block, limits, (actual_tokens or stored_actual_tokens)(block)))
    nucleus, known = NucleusSizeStats(histogram, int(sums["rows"])), int(sums["known"])
    means: dict[str, Any] = {}
    for name in ("mean_mass", "mean_tail_mass", "mean_first", "capped"):
        means[name] = sums[name] / max(nucleus.tokens, 1)
    for name in ("agreement", "in_nucleus", "in_tail", "mean_log_probability"):
        means[name] = sums[name] / known if known else None
    if not limits.top_p:
        means["capped"] = None
    if in_files and max_samples is None:
        means["bytes_per_token"] = compute_bytes_per_token_stats(dataset).bytes_per_token
    return DatasetStats(
        nucleus.rows, nucleus.tokens, nucleus, min_mass=least, known=known,
        bounded=int(sums["bounded"]), without_nucleus=int(histogram[0]), **means,
    )  # fmt: skip


def sum_block(
    block: TokenBlock, limits: RunLimits, rows: Sequence[npt.NDArray[Any] | None]
) -> dict[str, float]:
    """Sum over a block what `DatasetStats` averages, given the ids of each row's actual tokens.

    A nucleus of K ids counts as cut unless it surely reached top_p: few end there by themselves.
    """
    pairs = zip(block.num_tokens, rows, strict=True)
    ids = [np.full(n, -1) if row is None else np.asarray(row, np.int64) for n, row in pairs]
    actual = np.concatenate([np.zeros(0, np.int64), *ids])
    known, scores = actual >= 0, score_tokens(block, actual)
    covered = block.top.mass >= limits.top_p + mass_tolerance(block)
    sums = {
        "rows": block.index.size,
        "mean_mass": block.top.mass.sum(),
        "mean_tail_mass": block.tail.mass.sum(),
        "mean_first": block.first_probs.sum(),
        "capped": (~covered & (block.top.counts >= limits.top_p_max)).sum(),
        "known": known.sum(),
        "agreement": (scores.in_nucleus & (scores.rank == 1)).sum(),
        "in_nucleus": scores.in_nucleus.sum(),
        "in_tail": scores.in_tail.sum(),
        "bounded": (known & ~scores.exact).sum(),
        "mean_log_probability": scores.log_probability[known].sum(),
    }
    return {name: float(total) for name, total in sums.items()}


def mass_tolerance(block: TokenBlock) -> npt.NDArray[np.float64]:
    """Return how far each nucleus' decoded mass can be off: half a step, and float32's share."""
    return block.top.mass * np.expm1(block.top.error) + 2e-5


def stored_actual_tokens(block: TokenBlock) -> list[npt.NDArray[Any] | None]:
    """Return the ids of each row's extracted tokens where the rows store their text."""
    return [
        ids[positions] if positions_ascend(ids, positions) else None
        for ids, positions in zip(*(block.tokens or ([], [])), strict=True)
    ] or [None] * block.index.size


# Validation ---------------------------------------------------------------------------------------


class Violation(NamedTuple):
    """A place in an output that breaks the format; row and token count from 0 within the shard."""

    shard: str
    row: int | None
    token: int | None
    rule: str
    message: str

    def __str__(self) -> str:
        row = f", row {self.row}" if self.row is not None else ""
        token = f", token {self.token}" if self.token is not None else ""
        return f"{self.shard}{row}{token}: {self.rule}: {show_text(self.message)}"


MAX_REPORTED = 10  # violations shown of each rule in each shard


@dataclass
class ValidationReport:
    """What `validate_output` found; `violations` keeps the first of each rule in each shard."""

    name: str
    shards: int = 0
    rows: int = 0
    tokens: int = 0
    counts: Counter[str] = field(default_factory=Counter)  # violations by rule, all of them
    violations: list[Violation] = field(default_factory=list)
    _alike: Counter[tuple[str, str]] = field(default_factory=Counter)

    @property
    def ok(self) -> bool:
        """True when every rule holds everywhere."""
        return not self.counts

    def add(
        self, shard: str, rule: str, message: str, row: int | None = None, token: int | None = None
    ) -> None:
        """Count a violation and keep it unless its rule has many in this shard already."""
        self.counts[rule] += 1
        self._alike[shard, rule] += 1
        if self._alike[shard, rule] <= MAX_REPORTED:
            self.violations.append(Violation(shard, row, token, rule, message))

    def __str__(self) -> str:
        seen = [plural(self.shards, "shard"), plural(self.rows, "row"),
                plural(self.tokens, "token")]  # fmt: skip
        if self.ok:
            return f"{self.name}: valid: {', '.join(seen)}"
        kinds = ", ".join(f"{rule} {n:,}" for rule, n in self.counts.most_common())
        found = f"{plural(self.counts.total(), 'violation')} ({kinds}) in {', '.join(seen)}"
        return "\n".join([*map(str, self.violations), f"{self.name}: {found}"])


def validate_output(name: str | Path | Sequence[str | Path] | LogitDataset) -> ValidationReport:
    """Check every row of every shard of an output against the rules of the format.

    Checked are: the files can be read; columns, types and metadata; one run's settings
    throughout; list lengths; ids in range and never twice for a token; order, quantization and
    finite ranges; the nucleus covers top_p or is cut by the cap, and is no larger than needed; no
    tail token above the nucleus; probabilities that can sum to 1; positions of stored tokens;
    no conversation twice; what parts say of themselves; the shards that checkpoints list.

    Args:
        name: the output, by name or opened.

    Raises:
        OpenError: there is no such output; what is wrong inside it is reported, not raised.
    """
    dataset = as_output(name)
    report = ValidationReport(dataset.name, shards=len(dataset.shards))
    config: dict[str, Any] = {}
    try:
        if (text := dataset.store.read_text(CONFIG_FILE)) is not None:
            config = parse_settings(text.encode(), CONFIG_FILE)
    except LogitsError as error:
        report.add(CONFIG_FILE, "settings", str(error))
    indices, parts = {}, {}
    for shard, size in dataset.sizes.items():
        alone = LogitDataset(dataset.store, {shard: size})
        alone._listed = {}  # its footer counts
        settings, indices[shard], parts[shard] = validate_shard(alone, config, report)
        config = config or settings
    validate_unique(indices, parts, report)
    validate_checkpoints(dataset, parts, report)
    return report


def validate_shard(
    dataset: LogitDataset, config: Mapping[str, Any], report: ValidationReport
) -> tuple[dict[str, Any], npt.NDArray[np.int64], dict[str, Any]]:
    """Check a dataset of one shard; return its settings, the `index` of its rows, and its part."""
    add, index = functools.partial(report.add, dataset.shards[0]), np.zeros(0, np.int64)
    settings: dict[str, Any] = {}
    part: dict[str, Any] = {}
    sums = Counter({"rows": 0, "tokens": 0, "nucleus": 0, "capped": 0})
    try:
        settings = validate_footer(dataset, config, add)
        limits = RunLimits.of(settings)
        for table in iter_tables(dataset):
            first, (columns, faults) = sums["rows"], read_columns(table)
            for fault in faults:
                add(fault.rule, fault.message, row=first + fault.row)
            good = np.setdiff1d(np.arange(table.num_rows), [fault.row for fault in faults])
            sound = read_columns(table.take(good))[0] if faults else columns
            validate_block(build_block(sound, first, limits), limits, add, first + good)
            index = np.append(index, columns.get("index", index[:0]))
            counts = columns["top_counts"].values.astype(np.int64)
            sums.update(rows=table.num_rows, tokens=counts.size, nucleus=int(counts.sum()),
                        capped=int((counts == limits.top_p_max).sum()))  # fmt: skip
        part = validate_part(dataset, settings, index, sums, add)
    except LogitsError as error:
        add("unreadable", str(error), row=sums["rows"] or None)
    report.rows += sums["rows"]
    report.tokens += sums["tokens"]
    return settings, index, part


def validate_footer(
    dataset: LogitDataset, config: Mapping[str, Any], add: Callable[..., None]
) -> dict[str, Any]:
    """Check columns and metadata of one shard; return the settings to check its rows by."""
    schema, metadata = dataset.footer(0).schema.to_arrow_schema(), dataset.metadata(0)
    compact = POINTS_FIELD.name in schema.names
    stores = any(name in schema.names for name in TOKEN_COLUMNS)
    wanted = shard_schema(store_tokens=stores, compact=compact)
    if schema.names != wanted.names:
        add("columns", f"has {', '.join(schema.names)}; wanted {', '.join(wanted.names)}")
    for kind in wanted:
        if kind.name in schema.names and not schema.field(kind.name).type.equals(kind.type):
            add("type", f"{kind.name} is {schema.field(kind.name).type}, not {kind.type}")
    version = metadata.get(METADATA_VERSION)
    if version != (right := str(format_version(compact=compact)).encode()):
        add("metadata", f"format version is {version!r}, not {right!r}")
    settings: dict[str, Any] = {}
    try:
        settings = dataset.settings
        if not settings:
            add("metadata", "holds no settings of its run")
    except FormatError as error:
        add("settings", str(error))
    if settings and config and (differ := differing_settings(settings, config)):
        add("settings", f"differs from the rest of the output in {', '.join(differ)}")
    if not len(dataset) and METADATA_PART not in metadata:
        add("empty", "holds no rows")
    return settings


def validate_block(
    block: TokenBlock, limits: RunLimits, add: Callable[..., None], rows: npt.NDArray[np.int64]
) -> None:
    """Check decoded rows, `rows` by number in the shard; `add` takes what is wrong."""
    for number in np.flatnonzero(block.num_tokens == 0):
        add("length", "the row holds no tokens", row=int(rows[number]))
    with np.errstate(all="ignore"):  # whatever a damaged file holds
        groups = (entry_rules, range_rules, mass_rules, text_rules)
        rules = [rule for group in groups for rule in group(block, limits)]
    for name, broken, message, *values in rules:
        for token in np.flatnonzero(broken):
            row, t = block.place(token)
            told = message.format(*(value[token] for value in values))
            add(name, told, row=int(rows[row]), token=t)


# The rules of a token: name, where it is broken (T,), message, and what is filled in there (T,) ---


def any_in_run(
    flags: npt.NDArray[np.bool_], starts: npt.NDArray[np.int64]
) -> npt.NDArray[np.bool_]:
    """Say of each run of a flat array whether any of its flags is set."""
    return np.diff(to_starts(flags)[starts]) > 0


def entry_rules(block: TokenBlock, limits: RunLimits) -> Iterator[tuple[Any, ...]]:
    """Yield the rules on counts, ids and their order."""
    top, tail, vocab = block.top, block.tail, limits.vocab_size
    least = 0 if isinstance(tail, Points) else 1
    bad = (top.counts < least) | (top.counts > limits.top_p_max)
    message = f"nucleus of {{}} tokens, allowed are {least} to {limits.top_p_max}"
    yield "count", bad, message, top.counts
    if isinstance(tail, Points):
        yield from point_rules(block, tail)
    if limits.sampled_n is not None:
        message = f"{{}} tail tokens instead of {limits.sampled_n}"
        yield "tail count", tail.counts != limits.sampled_n, message, tail.counts
    high = any_in_run(top.ids >= vocab, top.starts) | any_in_run(tail.ids >= vocab, tail.starts)
    yield "id", high, f"a token id beyond the vocabulary of {vocab}"
    keys, twice = known_entries(block)[0], np.zeros(high.size, bool)
    twice[keys[1:][np.diff(keys) == 0] >> 18] = True
    yield "duplicate", twice, "a token id occurs twice"
    if top.q.size:
        same = np.diff(top.owner) == 0
        rising = np.append(same & (np.diff(top.q.astype(np.int32)) > 0), False)
        yield "order", any_in_run(rising, top.starts), "nucleus logits ascend"
        ties = np.append(same & (np.diff(top.ids) < 0), False) & (top.low == top.high)[top.owner]
        yield "ties", any_in_run(ties, top.starts), "equal logits, but ids do not ascend"


def point_rules(block: TokenBlock, points: Points) -> Iterator[tuple[Any, ...]]:
    """Yield the rules on the sample of compact rows, as exact as quantized logits allow."""
    top, min_p, least = block.top, points.min_p, np.full(block.logsumexp.size, np.inf)
    some = top.counts > 0
    least[some] = np.exp((top.low - block.logsumexp)[some])
    message = f"a nucleus token of probability {{:.6f}}, below min_p {min_p:g}"
    yield "threshold", least < min_p * (1 - 1e-5), message, least
    off = mass_tolerance(block)
    few, many = (np.ceil((points.rest + side) / min_p - 1e-6) for side in (-off, off))
    bad = (points.counts < few) | (points.counts > np.maximum(many, 1))
    yield "tail count", bad, "{} points for a rest of {:.6f}", points.counts, points.rest
    falling = (np.diff(points.ids) < 0) & (np.diff(points.owner) == 0)
    message = "the ids of points do not ascend"
    yield "order", any_in_run(np.append(falling, False)[: points.ids.size], points.starts), message
    keys = [part.owner.astype(np.int64) << 18 | part.ids for part in (top, points)]
    twice = any_in_run(np.isin(keys[1], keys[0]), points.starts)
    yield "duplicate", twice, "a point hits a token of the nucleus"


def range_rules(block: TokenBlock, limits: RunLimits) -> Iterator[tuple[Any, ...]]:
    """Yield the rules on quantization ranges and levels, for nucleus and tail."""
    steps = 2**limits.logit_bits - 1
    for name, part in zip(("nucleus", "tail"), known_parts(block), strict=False):
        q, starts, ends = part.q, part.starts, (part.low, part.high)
        some, finite = part.counts > 0, np.isfinite(part.low) & np.isfinite(part.high)
        bad = some & ~(finite & (part.low <= part.high))
        yield "range", bad, f"{name} range is {{:g}} to {{:g}}", *ends
        spans = any_in_run(q == 0, starts) & any_in_run(q == 65535, starts)
        bad = some & finite & (part.low < part.high) & ~spans
        bad |= some & (part.low == part.high) & any_in_run(q != 0, starts)
        yield "quantization", bad, f"{name} levels do not span the range {{:g}} to {{:g}}", *ends
        kept = np.rint(np.rint(q * (steps / 65535)) * (65535 / steps))
        message = f"{name} levels are finer than logit_bits"
        yield "resolution", any_in_run(kept != q, starts), message
    if isinstance(block.tail, Points):
        return
    above = (block.tail.counts > 0) & (block.tail.high > block.top.low)
    message = "a tail logit of {:g} above the nucleus, which ends at {:g}"
    yield "tail", above, message, block.tail.high, block.top.low


def mass_rules(block: TokenBlock, limits: RunLimits) -> Iterator[tuple[Any, ...]]:
    """Yield the rules on the log-sum-exp and on probabilities."""
    top, lse, top_p = block.top, block.logsumexp, limits.top_p
    yield "logsumexp", ~block.sound, "log-sum-exp {:g} is not finite, or below a logit", lse
    mass, tail, tolerance = top.mass, block.tail.mass, mass_tolerance(block)
    slack = 2 * tolerance + tail * np.expm1(block.tail.error)
    yield "sum", mass + tail > 1 + slack, "probabilities sum to {:.6f}", mass + tail
    others = np.maximum(limits.vocab_size - top.counts - block.tail.counts, 0)
    most = mass + tail + others * np.exp(unstored_bound(block))
    yield "sum", most < 1 - slack, "the vocabulary's probabilities sum to {:.6f} at most", most
    short = (mass < top_p - tolerance) & (top.counts < min(limits.top_p_max, limits.vocab_size))
    message = f"nucleus of {{}} covers {{:.6f}}, less than top_p {top_p:g}"
    yield "mass", short, message, top.counts, mass
    rest, some = mass.copy(), top.counts > 0
    rest[some] -= top.probs[top.starts[1:][some] - 1]
    needless = (rest > top_p + tolerance) & (top.counts > 1) & (top_p > 0)
    yield "minimal", needless, "covers {:.6f} even without its last token", rest


def text_rules(block: TokenBlock, limits: RunLimits) -> Iterator[tuple[Any, ...]]:
    """Yield the rules on stored text; a broken row is named by its first token."""
    lost, foreign, unsorted = np.zeros((3, block.logsumexp.size), bool)
    firsts = block.row_starts[:-1]
    if block.tokens is None:
        lost[firsts[block.num_tokens > 0]] = limits.store_tokens
    for first, ids, positions in zip(firsts, *block.tokens, strict=True) if block.tokens else ():
        if positions.size:
            foreign[first] = ((ids < 0) | (ids >= limits.vocab_size)).any()
            unsorted[first] = not positions_ascend(ids, positions)
    yield "text", lost, "input_ids and token_positions are missing"
    yield "text", foreign, "input_ids leave the vocabulary"
    yield "positions", unsorted, "token_positions do not ascend inside input_ids"


# What shards say of each other and of themselves --------------------------------------------------


def validate_part(
    dataset: LogitDataset,
    settings: Mapping[str, Any],
    index: npt.NDArray[np.int64],
    sums: Mapping[str, int],
    add: Callable[..., None],
) -> dict[str, Any]:
    """Check what a shard says of the part that it is, against the rows that it holds; return it.

    The hash of the ids tells whether these conversations, in this order, were selected. Where some
    gave no row their places are known only if ids ascend: in the order of a source whose rows are
    numbered. `sums` are counted from the rows, `index` are their conversations.
    """
    shard, wrong = dataset.shards[0], []
    try:
        part = dataset.part(0)
    except FormatError as error:
        add("part", str(error))
        return {}
    if not part:
        if settings.get("rows_per_part") is not None:
            add("metadata", "does not say which part it is")
        return {}
    path = part_path(part["number"])
    if shard not in (path, path.removeprefix("data/")):
        wrong.append(f"is part {part['number']}, whose file is {path}")
    for name, count in sums.items():
        if part[name] != count:
            wrong.append(f"says {part[name]:,} of {name}, holds {count:,}")
    skipped = np.array([*map(int, part["skipped"])], np.int64)
    if index.size + skipped.size != part["conversations"]:
        both = f"{plural(index.size, 'row')} and {skipped.size:,} skipped"
        selected = plural(part["conversations"], "conversation")
        wrong.append(f"{both} are not the {selected} selected")
    ascending = settings.get("index_col") is None and not settings.get("random_sample")
    if ascending and (np.diff(index) <= 0).any():
        wrong.append("rows are not in the order of their selection")
    elif not skipped.size or ascending:
        ids = np.sort(np.append(index, skipped)) if skipped.size else index
        if hash_ids(ids) != part["ids"]:
            wrong.append("the conversations, or their order, are not those that were selected")
    for message in wrong:
        add("part", message)
    return part


def validate_unique(
    indices: Mapping[str, npt.NDArray[np.int64]],
    parts: Mapping[str, Mapping[str, Any]],
    report: ValidationReport,
) -> None:
    """Report conversations that occur twice, with a row or without, naming the second place."""
    skipped = [np.array([*map(int, part.get("skipped", ()))], np.int64) for part in parts.values()]
    found = [np.append(*pair) for pair in zip(indices.values(), skipped, strict=True)]
    ids, starts, names = np.concatenate(found), to_starts([*map(len, found)]), list(indices)
    again = np.setdiff1d(np.arange(ids.size), np.unique(ids, return_index=True)[1])
    for place, number in zip(again, np.searchsorted(starts, again, side="right") - 1, strict=True):
        row, shard = int(place - starts[number]), names[number]
        told = f"conversation {ids[place]} is there already"
        report.add(shard, "twice", told, row=row if row < indices[shard].size else None)


def validate_checkpoints(
    dataset: LogitDataset, parts: Mapping[str, Mapping[str, Any]], report: ValidationReport
) -> None:
    """Report shards that the output's checkpoints list otherwise than they are."""
    try:
        records = read_checkpoints(dataset.store)
    except LogitsError as error:
        return report.add(str(error).split()[0], "checkpoint", str(error))
    if records is None:
        return None
    for path in sorted(records.keys() | dataset.sizes.keys()):
        there, record = dataset.sizes.get(path), records.get(path, {})
        if there != record.get("bytes"):
            message = f"{there or 'no'} bytes, but the checkpoint lists {record.get('bytes')}"
            report.add(path, "checkpoint", message)
        elif part := parts.get(path):
            names = [name for name in (*PART_FIGURES, "ids") if name in record]
            found = [f"{name} {record[name]!s:.20}" for name in names if record[name] != part[name]]
            if found:
                message = f"the checkpoint lists {', '.join(found)}; it says otherwise"
                report.add(path, "checkpoint", message)
    return None


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
    mean_divergence: float | None = None
    max_divergence: float | None = None
    nuclei: int = 0  # tokens that have a nucleus in both
    same_first: float | None = None  # share of those with the same likeliest token
    max_logsumexp: float | None = None  # largest difference
    largest: Sequence[tuple[float, int, int]] = ()  # divergence, conversation, token

    def __str__(self) -> str:
        lines = [
            f"rows in common      {self.common_rows:,} of {self.rows[0]:,} and {self.rows[1]:,}",
            f"of another length   {self.unequal_rows:,}",
            f"tokens compared     {self.tokens:,}",
        ]
        if not self.tokens:
            return "\n".join([*lines, "nothing to compare: no token is in both"])
        alike = "none" if self.same_first is None else f"{self.same_first:.3%}"
        lines += [
            f"KL, mean and max    {self.mean_divergence:.3g} and {self.max_divergence:.3g} nats",
            f"same likeliest      {alike} of {self.nuclei:,} tokens with a nucleus in both",
            f"log-sum-exp differs by {self.max_logsumexp:.3g} at most",
            *(["largest differences"] if self.largest else []),
        ]
        worst = [f"  {kl:.4g} nats: conversation {i}, token {t}" for kl, i, t in self.largest]
        return "\n".join([*lines, *worst])


COMPARED_TOKENS = 2**17  # held at once of each output


def compare_outputs(first: Any, second: Any, *, largest: int = 10) -> Comparison:
    """Compare the distributions of two outputs over the conversations that both hold.

    Many rows are read together, so that row groups are read seldom in whatever order they are.

    Args:
        first, second: outputs by name or opened by `load_logit_dataset`, or rows at hand.
        largest: how many of the most different tokens to name.
    """
    pair, numbers, largest = [], [], check_count("largest", largest)
    for rows in map(as_rows, (first, second)):
        if not isinstance(rows, LogitDataset):
            tables = [*iter_tables(rows)] or [SCHEMA.empty_table()]
            rows = pa.concat_tables(tables, promote_options="default")
        pair.append(rows)
        numbers.append(read_integers(rows, "index", "num_tokens"))
    (ids, sizes), (other_ids, other_sizes) = numbers
    _, one, two = np.intersect1d(ids, other_ids, return_indices=True)
    one, two = np.array([one, two])[:, np.argsort(one)]  # in the order of the first
    equal = sizes[one] == other_sizes[two]
    ends = np.cumsum(sizes[one[equal]])
    tokens = int(ends[-1]) if ends.size else 0
    seen = Comparison((ids.size, other_ids.size), one.size, int((~equal).sum()), tokens)
    if not tokens:
        return seen
    total, most, nuclei, same, peak = 0.0, 0.0, 0, 0, 0.0
    worst: list[tuple[float, int, int]] = []
    chunks = np.flatnonzero(np.diff(ends // COMPARED_TOKENS)) + 1
    for chunk in zip(np.split(one[equal], chunks), np.split(two[equal], chunks), strict=True):
        a, b = (decode_rows(rows.take(some)) for rows, some in zip(pair, chunk, strict=True))
        divergence = bound_divergence(a, b)
        total, most = total + float(divergence.sum()), max(most, float(divergence.max(initial=0)))
        alike = (a.first_ids == b.first_ids)[(a.first_ids >= 0) & (b.first_ids >= 0)]
        nuclei, same = nuclei + alike.size, same + int(alike.sum())
        peak = max(peak, float(np.abs(a.logsumexp - b.logsumexp).max(initial=0)))
        for token in np.argsort(-divergence, kind="stable")[:largest].tolist():
            row, t = a.place(token)
            worst.append((float(divergence[token]), int(a.index[row]), t))
        worst = sorted(worst, key=lambda item: -item[0])[:largest]
    worst = [item for item in worst if item[0] > 0]
    return replace(seen, mean_divergence=total / tokens, max_divergence=most, nuclei=nuclei,
                   same_first=same / nuclei if nuclei else None, max_logsumexp=peak,
                   largest=worst)  # fmt: skip


def bound_divergence(a: TokenBlock, b: TokenBlock) -> npt.NDArray[np.float64]:
    """Return the least KL(a ‖ b) in nats that the stored entries allow, (T,).

    The vocabulary is cut into the ids whose probability is known in `a`, and known in `b` or in
    a's nucleus, and one cell for the rest. Where `b` does not store an id, it counts with the most
    that it can have there. Merging cells and raising b's probabilities both lower the divergence;
    what remains is the error of quantization.
    """
    keys_a, probs_a, top_a = known_entries(a)
    keys_b, probs_b, _ = known_entries(b)
    place = np.searchsorted(keys_b, keys_a)
    shared = np.append(keys_b, -1)[place] == keys_a  # -1 is no key
    cells = shared | top_a
    owner = keys_a[cells] >> 18
    p = probs_a[cells]
    q = np.exp(unstored_bound(b))[owner]
    q[shared[cells]] = probs_b[place[shared]]
    n, tiny = a.logsumexp.size, np.finfo(np.float64).tiny
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
    parts = known_parts(block)
    keys = np.concatenate([part.owner.astype(np.int64) << 18 | part.ids for part in parts])
    order = np.argsort(keys)
    probs = np.concatenate([part.probs for part in parts])[order]
    return keys[order], probs, order < block.top.ids.size


# --------------------------------------------------------------------------------------------------
# 9 Train
# --------------------------------------------------------------------------------------------------
#
#     shards ──LogitIterableDataset──► rows ──collate_logits──► batch ──student──► logits, or states
#                                       └─export_axolotl, export_distillkit              and a head
#                                                                          └─► distillation_loss
#
# The loss rests on one identity: for any function g of a token, the sum of g over the vocabulary is
# expected to be the sum over the nucleus plus the sum over the tail sample, each of its tokens
# counted as often as `weigh_tail` says.


DIVERGENCES = ("forward_kl", "reverse_kl", "jsd")
TAILS = ("unbiased", "renormalized", "ghost", "ignore")
LEAST_LOG_REST = -100.0  # of the mass outside the nucleus, which rounding may bring below 0
TEACHER_COLUMNS: dict[str, tuple[Any, Any]] = {  # of a row: dtype, and what fills a batch
    "teacher_ids": (np.int64, 0),
    "teacher_log_probs": (np.float32, LEAST_LOG_REST),
    "teacher_mask": (np.bool_, False),  # entries that are there
    "teacher_tail_mask": (np.bool_, False),  # those of them that were sampled
    "teacher_log_rest": (np.float32, LEAST_LOG_REST),  # outside the nucleus; one a token
    "teacher_points": (np.bool_, False),  # the sample is that of a compact row; one a token
}
IGNORED_LABEL = -100  # what PyTorch's cross-entropy leaves out


# Rows ---------------------------------------------------------------------------------------------


def sparse_teacher(block: TokenBlock) -> dict[str, npt.NDArray[Any]]:
    """Return what is stored of T tokens as `TEACHER_COLUMNS` (T, E): the nucleus, then the tail.

    Raises:
        FormatError: the tokens have tails of different sizes, as those of compact rows may.
    """
    points, tail = isinstance(block.tail, Points), block.tail.counts
    if not points and (tail != tail[:1]).any():
        raise FormatError("the tail samples of one output differ in size")
    rest = np.maximum(1 - block.top.mass, block.tail.mass)
    parts = [fill_entries(part) for part in (block.top, block.tail)]
    ids, log_probs, there = zip(*parts, strict=True)
    return {
        "teacher_ids": np.concatenate(ids, axis=1),
        "teacher_log_probs": np.concatenate(log_probs, axis=1, dtype=np.float32),
        "teacher_mask": np.concatenate(there, axis=1),
        "teacher_tail_mask": np.concatenate([np.zeros_like(there[0]), there[1]], axis=1),
        "teacher_log_rest": np.log(np.maximum(rest, np.exp(LEAST_LOG_REST))).astype(np.float32),
        "teacher_points": np.full(tail.size, points),
    }


def fill_entries(part: Entries) -> tuple[npt.NDArray[Any], npt.NDArray[Any], npt.NDArray[np.bool_]]:
    """Return ids and log-probabilities as (T, E), and which of them are there."""
    counts = part.counts
    there = np.arange(int(counts.max(initial=0))) < counts[:, None]
    if there.all():
        return part.ids.reshape(there.shape), part.log_probs.reshape(there.shape), there
    ids, log_probs = np.zeros(there.shape, np.int32), np.full(there.shape, LEAST_LOG_REST)
    ids[there], log_probs[there] = part.ids, part.log_probs
    return ids, log_probs, there


class LogitIterableDataset:
    """Rows of an output to train on; to torch it is an `IterableDataset`.

    Each item is one conversation as a dictionary of numpy arrays: `index`, `input_ids` (S,) int32,
    `labels` (S,) int64 with -100 where nothing was extracted, `teacher_positions` (N,) of the
    extracted tokens in `input_ids`, and of each of them `TEACHER_COLUMNS`, (N, E) or (N,).
    `collate_logits` makes batches.

    With a seed, shards and the rows inside each are in random order, another for each epoch
    (`set_epoch`). They are divided into equal runs over ranks, then over the workers of a data
    loader; a worker reads only the shards of its run and holds one at a time. Rows that do not
    divide among the ranks are left out of that epoch. Nothing else must divide them: accelerate
    and transformers' `Trainer` do, unless the loader is kept from them (docs/distillation.md).
    `as_datasets` is for trainers that divide.

    `state_dict` and `load_state_dict` go on where an epoch was left, in the process that gives
    rows out: this one, or under `torchdata.stateful_dataloader` each worker.
    """

    def __init__(
        self,
        dataset: str | Path | Sequence[str | Path] | LogitDataset,
        *,
        seed: int | None = 0,
        rank: int | None = None,
        world_size: int | None = None,
        max_seq_len: int | None = None,
        batch_size: int | None = None,
        text: TextSource | None = None,
    ) -> None:
        """Open an output; nothing is read yet.

        Args:
            dataset: a folder, files, or a dataset on the Hub.
            seed: of the order; None keeps that of the output.
            rank, world_size: this process's part; from the environment (RANK, WORLD_SIZE) if None.
            max_seq_len: cut longer conversations at this many tokens; one that then has N = 0
                stays, so that ranks keep in step.
            batch_size: of the loader, where it has several workers: each then has whole batches but
                for the last one of all, and there are as many as `len(loader)` says.
            text: of an output that does not store its tokens; None finds tokenizer, template and
                source from the settings.

        Raises:
            LogitsError: the rank is not below the world size, or torch is missing.
            OpenError: there is no such output.
        """
        numbers = {
            "seed": seed, "rank": rank, "world_size": world_size, "max_seq_len": max_seq_len,
            "batch_size": batch_size,
        }  # fmt: skip
        for name, value in numbers.items():
            if value is not None:
                check_count(name, value)
        if not isinstance(text, (TextSource, type(None))):
            raise LogitsError(f"text is what open_text(output) returns, not {describe_type(text)}")
        torch = import_extra("torch")
        self.output = as_output(dataset)
        self.seed, self.max_seq_len, self.text = seed, max_seq_len, text
        self.batch_size = batch_size
        self.rank = launched("RANK", 0) if rank is None else rank
        self.world_size = launched("WORLD_SIZE", 1) if world_size is None else world_size
        self._from_environment = world_size is None and self.world_size > 1
        if not 0 <= self.rank < self.world_size:
            raise LogitsError(f"rank {self.rank} is not in 0..{self.world_size - 1}")
        torch.utils.data.IterableDataset.register(type(self))  # so that no import needs torch
        # In memory that workers share with this process, those too that outlive an epoch.
        self._epoch, self._by_workers = torch.zeros(2, dtype=torch.int64).share_memory_()
        self._skip = 0  # rows that the next pass leaves out, since they were given before
        self._rows: int | None = None  # given in the last pass of this process; None: there is none

    def __getstate__(self) -> dict[str, Any]:
        self._refuse_second_division()
        return self.__dict__

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state
        for number in (self._epoch, self._by_workers):
            number.share_memory_()  # a copy is in memory that no worker would see

    def __len__(self) -> int:
        """Return the rows that this rank has in an epoch."""
        return len(self.output) // self.world_size

    @property
    def epoch(self) -> int:
        """Number of the epoch, from 0; it only changes the order."""
        return int(self._epoch)

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of another epoch, for the passes that begin from now on."""
        if check_count("epoch", epoch) != self.epoch:
            self._skip, self._rows = 0, None if self._rows is None else 0
        self._epoch.fill_(epoch)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        self._refuse_second_division()
        if not len(self) and len(self.output):
            raise LogitsError(
                f"{plural(len(self.output), 'row')} for {self.world_size} processes: none gets any"
            )
        worker = import_extra("torch.utils.data").get_worker_info()
        if worker is not None and self._skip and not self._by_workers:
            raise LogitsError(  # each worker would leave out so many rows of its own
                "the state is of rows given out without workers: finish its epoch with "
                "num_workers=0"
            )
        self._by_workers.fill_(worker is not None)
        if worker is not None:  # files that the main process has open are not for two
            self.output = LogitDataset(self.output.store, self.output.sizes)
        epoch = self.epoch  # of this pass, whichever is chosen while it runs
        place = (worker.id, worker.num_workers) if worker else (0, 1)
        runs = self.iter_runs(epoch, *place, skip=self._skip)
        self._rows, self._skip = self._skip, 0  # the pass after this one is whole again

        def give() -> Iterator[dict[str, Any]]:
            for shard, rows in runs:
                for item in self.read_rows(shard, rows):
                    self._rows = (self._rows or 0) + (epoch == self.epoch)
                    yield item

        return give()

    def _refuse_second_division(self) -> None:
        """Refuse to divide rows by the environment's ranks where accelerate may divide again."""
        state = getattr(sys.modules.get("accelerate.state"), "PartialState", None)
        if self._from_environment and getattr(state, "_shared_state", None):
            raise LogitsError(
                f"accelerate runs {self.world_size} processes and divides the rows of a loader "
                "that it prepares, as this dataset does: give rank=0, world_size=1 for such a "
                "loader, or this process's rank and world_size for one that is kept from it"
            )

    def iter_runs(
        self, epoch: int, worker: int, workers: int, *, skip: int
    ) -> Iterator[tuple[int, npt.NDArray[np.int64]]]:
        """Yield the shards, and the rows in them, that a worker of this rank has in an epoch.

        The runs of the ranks are equally long, those of a rank's workers up to one batch.
        """
        share, size = len(self), self.batch_size or 1
        batches = -(-share // size)
        first, last = (
            self.rank * share + min(batches * w // workers * size, share)
            for w in (worker, worker + 1)
        )
        first += skip
        shards, begin = self.shuffle(epoch, len(self.output.shards)), 0
        for shard in shards.tolist():
            end = begin + self.output.count_rows(shard)
            if begin < last and end > first:
                rows = self.shuffle(epoch, end - begin, shard)
                yield shard, rows[max(first - begin, 0) : last - begin]
            begin = end

    def shuffle(self, epoch: int, count: int, *of: int) -> npt.NDArray[np.int64]:
        """Return the order of an epoch's shards, or of the rows of one of them."""
        order = np.arange(count)
        if self.seed is not None:
            np.random.default_rng([self.seed, epoch, *of]).shuffle(order)
        return order

    def read_rows(self, shard: int, rows: npt.NDArray[np.int64]) -> Iterator[dict[str, Any]]:
        """Yield rows of a shard to train on."""
        if not rows.size:  # a shard may have none
            return
        tables = self.output.iter_shard(shard, rows=256)
        table = pa.concat_tables(tables).combine_chunks()  # taking rows joins chunks every time
        at_once = rows_at_once(table, 16)
        for first in range(0, rows.size, at_once):
            block = decode_rows(table.take(pa.array(rows[first : first + at_once])))
            teacher = sparse_teacher(block)
            for row in range(block.index.size):
                yield self.training_row(block, row, teacher)

    def training_row(
        self, block: TokenBlock, row: int, teacher: Mapping[str, npt.NDArray[Any]]
    ) -> dict[str, Any]:
        """Put one row's tokens, stored or rendered again, beside its part of the block's teacher.

        Raises:
            AlignmentError: the conversation has another number of extracted tokens.
        """
        first, last = block.row_starts[row : row + 2].tolist()
        sample: dict[str, Any] = {"index": int(block.index[row]), "num_tokens": last - first}
        if block.tokens is not None:
            sample |= {name: block.tokens[i][row] for i, name in enumerate(TOKEN_COLUMNS)}
            ids, positions = stored_tokens(sample)
        else:
            self.text = self.text or open_text(self.output)
            encoded = self.text.encode(sample["index"])
            ids, positions = encoded.input_ids, encoded.token_positions
        check_alignment(sample, ids, positions)
        labels = np.full(ids.size, IGNORED_LABEL, np.int64)
        labels[positions] = ids[positions]
        told = {name: values[first:last] for name, values in teacher.items()}
        whole = {"input_ids": ids, "labels": labels, "teacher_positions": positions, **told}
        return {"index": sample["index"], **cut_row(whole, self.max_seq_len)}

    def state_dict(self) -> dict[str, Any]:
        """Return where this epoch stands, as plain numbers.

        Raises:
            LogitsError: no row was given out in this process; workers may have given some. Or
                accelerate is reading rows, which fetches a batch more than it has given out.
        """
        in_worker = import_extra("torch.utils.data").get_worker_info() is not None
        if self._rows is None or (self._by_workers and not in_worker):
            raise LogitsError(
                "no row was given out in this process: with workers, take torchdata's "
                "StatefulDataLoader and its own state_dict, which asks them"
            )
        state = getattr(sys.modules.get("accelerate.state"), "GradientState", None)
        for loader in state().dataloader_references if state and not in_worker else ():
            rows = getattr(loader, "dataset", None)  # this dataset, or accelerate's part of it
            mine = self in (rows, getattr(rows, "dataset", None))
            if mine and not loader.use_stateful_dataloader:
                raise LogitsError(
                    "accelerate's loader is a batch ahead of what it has given out: prepare it "
                    "with DataLoaderConfiguration(use_stateful_dataloader=True) and take its own "
                    "state_dict"
                )
        return {**self._identity(), "epoch": self.epoch, "rows": self._rows}

    def _identity(self) -> dict[str, Any]:
        """Return what must be the same for a state to fit."""
        own = {"seed": self.seed, "rank": self.rank, "world_size": self.world_size}
        return {**own, "dataset_rows": len(self.output), "batch_size": self.batch_size}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from where `state_dict` was taken, once: the pass after the next is whole again.

        Raises:
            LogitsError: the state is of another seed, rank, world size or output.
        """
        for name, value in self._identity().items():
            if state.get(name) != value:
                raise LogitsError(f"the state is of {name} {state.get(name)}, this is {value}")
        worker = import_extra("torch.utils.data").get_worker_info()
        self._epoch.fill_(state["epoch"])
        self._by_workers.fill_(worker is not None)
        self._skip = self._rows = state["rows"]

    def as_datasets(self) -> Any:
        """Return the whole output as a `datasets.IterableDataset`, which TRL's trainers ask for.

        Its shards are those of the output: `datasets` divides, shuffles (`.shuffle`) and resumes
        them as any other. Without its shuffle, every epoch has the order that this one has now.
        """
        datasets = import_extra("datasets")
        whole = LogitIterableDataset(  # no ranks divide it, and its epoch stays
            self.output, seed=self.seed, rank=0, world_size=1, max_seq_len=self.max_seq_len,
            text=self.text,
        )  # fmt: skip
        whole.set_epoch(self.epoch)
        shards = self.shuffle(self.epoch, len(self.output.shards)).tolist()
        return datasets.IterableDataset.from_generator(
            whole._read_shards, gen_kwargs={"shards": shards}
        )

    def _read_shards(self, shards: Sequence[int]) -> Iterator[dict[str, Any]]:
        for shard in shards:
            rows = self.shuffle(self.epoch, self.output.count_rows(shard), shard)
            yield from self.read_rows(shard, rows)


def launched(name: str, otherwise: int) -> int:
    """Return a number that a launcher has set in the environment."""
    value = os.environ.get(name, f"{otherwise}")
    if not value.isdecimal():
        raise LogitsError(f"{name}={value!r:.40} in the environment: give rank and world_size")
    return int(value)


def cut_row(row: Mapping[str, Any], length: int | None) -> dict[str, Any]:
    """Return a row without the tokens from `length` on, and without their teacher."""
    if length is not None and length < 1:
        raise LogitsError(f"of a conversation cut at {length} tokens nothing is left")
    if length is None or row["input_ids"].size <= length:
        return dict(row)
    kept = int(np.searchsorted(row["teacher_positions"], length))
    ends = {"input_ids": length, "labels": length, "teacher_positions": kept}
    ends |= dict.fromkeys(TEACHER_COLUMNS, kept)
    return {name: value[: ends[name]] if name in ends else value for name, value in row.items()}


# Batches ------------------------------------------------------------------------------------------


def collate_logits(
    rows: Sequence[Mapping[str, Any]],
    *,
    pad_id: int = 0,
    max_length: int | None = None,
    pad_to_multiple_of: int | None = None,
    pack: bool = False,
) -> dict[str, Any]:
    """Make a batch of torch tensors from rows of `LogitIterableDataset`.

    The first dimension of every tensor is the sequence, along which accelerate cuts batches; the
    second is the token, padded on the right.

    Args:
        rows: conversations, one a sequence if they are not packed.
        pad_id: fills `input_ids`.
        max_length: cut longer conversations at this many tokens; of packed sequences the most.
        pad_to_multiple_of: make sequences longer, up to a multiple of it.
        pack: put conversations one after the other into the first sequence that has room, all
            into one if there is no `max_length`. `position_ids` keep them apart in place of an
            `attention_mask`: call the model with `use_cache=False`, and check that it does.

    Returns:
        `input_ids`, `attention_mask`, `labels` (B, S) int64; `index` (B,); `teacher_positions`
        (B, T), the position whose output predicts each extracted token, -1 for padding;
        `TEACHER_COLUMNS` (B, T, E) or (B, T). Packed: `position_ids` and `segment_ids` (B, S), the
        number of the conversation in its sequence, -1 for padding; `index` (B, C), -1 for padding.
    """
    torch = import_extra("torch")
    names = {"index", "input_ids", "labels", "teacher_positions", *TEACHER_COLUMNS}
    if not rows or not all(isinstance(row, Mapping) and names <= {*row} for row in rows):
        raise LogitsError(
            "collate_logits takes rows of LogitIterableDataset with all of their columns "
            "(transformers' Trainer needs remove_unused_columns=False)"
        )
    arrays = ({name: np.asarray(row[name]) for name in names} for row in rows)  # of tensors, too
    cut = [cut_row(row, max_length) for row in arrays]
    groups = pack_rows(cut, max_length) if pack else [[row] for row in cut]
    longest, tokens = (
        max(sum(row[name].size for row in group) for group in groups)
        for name in ("input_ids", "teacher_positions")
    )
    longest += -longest % (pad_to_multiple_of or 1)
    text, told = (len(groups), longest), (len(groups), tokens)
    batch: dict[str, npt.NDArray[Any]] = {
        "input_ids": np.full(text, pad_id, np.int64),
        "labels": np.full(text, IGNORED_LABEL, np.int64),
        "position_ids": np.zeros(text, np.int64),
        "segment_ids": np.full(text, -1, np.int64),
        "index": np.full((len(groups), max(map(len, groups))), -1, np.int64),
        "teacher_positions": np.full(told, -1, np.int64),
    }
    for name, (kind, fill) in TEACHER_COLUMNS.items():
        entries = np.max([row[name].shape[1:] for row in cut], axis=0).astype(np.int64)
        batch[name] = np.full((*told, *entries), fill, kind)
    for i, group in enumerate(groups):
        s = n = 0
        for j, row in enumerate(group):
            here = (i, slice(s, s + row["input_ids"].size))
            batch["input_ids"][here], batch["labels"][here] = row["input_ids"], row["labels"]
            batch["segment_ids"][here], batch["index"][i, j] = j, row["index"]
            batch["position_ids"][here] = np.arange(row["input_ids"].size)
            last = n + row["teacher_positions"].size
            batch["teacher_positions"][i, n:last] = row["teacher_positions"] + (s - 1)
            for name in TEACHER_COLUMNS:
                batch[name][i, n:last][..., : row[name].shape[-1]] = row[name]
            s, n = here[1].stop, last
        batch["position_ids"][i, s:] = np.arange(longest - s)  # padding is one more segment
    if not pack:
        batch["attention_mask"] = (batch.pop("segment_ids") >= 0).astype(np.int64)
        batch["index"] = batch["index"][:, 0]
        del batch["position_ids"]
    return {name: torch.from_numpy(values) for name, values in batch.items()}


def pack_rows(rows: Iterable[dict[str, Any]], length: int | None) -> list[list[dict[str, Any]]]:
    """Divide rows into sequences of at most `length` tokens, each the first that has room."""
    groups: list[list[dict[str, Any]]] = []
    room: list[float] = []
    for row in rows:
        size = row["input_ids"].size
        fits = next((i for i, left in enumerate(room) if size <= left), len(groups))
        if fits == len(groups):
            groups.append([])
            room.append(math.inf if length is None else length)
        groups[fits].append(row)
        room[fits] -= size
    return groups


def flat_positions(batch: Mapping[str, Any]) -> Any:
    """Return which of the B * S flattened positions predict the batch's extracted tokens, (N,).

    `distillation_loss` takes the logits (N, V) of just these, in this order.
    """
    positions = batch["teacher_positions"]
    rows, length = batch["input_ids"].shape
    starts = import_extra("torch").arange(rows, device=positions.device)[:, None] * length
    return (positions + starts)[positions >= 0]


# What a tail token stands for ---------------------------------------------------------------------

QUADRATURE_DROP = 20.0  # the integrand is followed until it has fallen by this factor's logarithm
LEAST_UNDRAWN = 1e-12  # share of the tail below which the sample is taken to hold all of it
LEAST_LOG_SHARE = -600.0  # below it a weight is inversely proportional to the probability


def weigh_tail(log_probs: Any, rest: Any, *, nodes: int | None = None) -> Any:
    """Return the logarithm of how many tokens of the vocabulary each tail token stands for.

    With these weights w, and 1 for each nucleus token, the weighted sum of any function over what
    is stored is an unbiased estimate of its sum over the vocabulary. The weight of a token i of the
    sample S is P(S | i is drawn first) / P(S). Both are integrals over the time of an exponential
    race: w_i = E[1 / (1 - exp(-p_i t))] for t with a density proportional to
    exp(-c t) Π_j (1 - exp(-p_j t)), c being the mass that was not drawn, concave in its logarithm
    over log t, where it is summed by the trapezoidal rule.

    Args:
        log_probs: (T, M) log-probabilities of the tail sample, in any order.
        rest: (T,) probability outside the nucleus. Where the sample holds all of it, or more by
            rounding, every weight is 1.
        nodes: of the quadrature; None takes as many as each density needs for an error of 1e-6.

    Returns:
        A tensor (T, M), each at least 0.

    Source: Murthy (1957), Ordered and unordered estimators in sampling without replacement;
    Kool, van Hoof and Welling (2020), Estimating gradients for discrete random variables by
    sampling without replacement, ICLR, section 3.2 and appendix B.
    """
    torch = import_extra("torch")
    log_probs = torch.as_tensor(log_probs)
    shares = widen(log_probs).T
    shares = shares - widen(rest).to(shares.device).log()
    weights = torch.zeros_like(shares)  # (M, T)
    undrawn = 1 - shares.exp().sum(0)
    undecided = ((undrawn >= LEAST_UNDRAWN) & (shares.shape[0] > 0)).nonzero()[:, 0]
    if not undecided.numel():
        return torch.zeros_like(log_probs)
    shares, undrawn = shares[:, undecided], undrawn[undecided]
    held = shares.clamp(min=LEAST_LOG_SHARE).exp()
    first, last, needed = bracket_race(held, undrawn)
    order = needed.argsort()
    # On a processor, the integrands of 64 tokens stay in its cache.
    for part in order.split(64 if shares.device.type == "cpu" else 4096):
        count = nodes or int(needed[part].max())
        steps = torch.linspace(0, 1, count, dtype=shares.dtype, device=shares.device)[:, None]
        log_times = first[part] + (last - first)[part] * steps  # (n, t)
        found = integrate_weights(held[:, part], undrawn[part], log_times)
        found += (LEAST_LOG_SHARE - shares[:, part]).clamp(min=0)
        weights[:, undecided[part]] = found.clamp(min=0)
    return weights.T.to(log_probs)


def widen(values: Any) -> Any:
    """Return a tensor in float64: of a device that has none, such as Apple's, on the processor."""
    values = import_extra("torch").as_tensor(values)
    return (values.cpu() if values.device.type == "mps" else values).double()


def integrate_weights(probs: Any, undrawn: Any, log_times: Any) -> Any:
    """Return log-weights (M, t), given shares of the tail (M, t) and equidistant nodes (n, t)."""
    times = log_times.exp()
    arrived = (-probs[:, None, :] * times).expm1().neg()  # (M, n, t)
    density = (log_times - undrawn * times + arrived.log().sum(0)).softmax(0)
    return (density / arrived).sum(1).log()


def bracket_race(probs: Any, undrawn: Any) -> tuple[Any, Any, Any]:
    """Return between which log-times (T,) the integrand is worth summing, and at how many nodes.

    Its slope in log t is 1 + Σ φ(p_j t) - c t with φ(x) = x / (e^x - 1) in (0, 1]; so the mode has
    c t in [1, 1 + M]. Leftwards φ only grows, which bounds the fall by the slope at the mode (less
    the factor that a weight takes out); rightwards it falls at least as a gamma density. The
    curvature at the mode gives the spacing.
    """
    low = -undrawn.log()
    high = low + math.log1p(probs.shape[0])
    for _ in range(6):
        middle = (low + high) / 2
        waiting = probs * middle.exp()
        rising = 1 + (waiting / waiting.clamp(max=700).expm1()).sum(0) > undrawn * middle.exp()
        low, high = low.where(~rising, middle), high.where(rising, middle)
    waiting = probs * high.exp()
    slopes = waiting / waiting.clamp(max=700).expm1()
    at_mode = 1 + slopes.sum(0)
    least = (at_mode - slopes.amax(0)).clamp(min=1)
    fall = QUADRATURE_DROP / least
    first = low - fall - (2 * fall).sqrt().clamp(max=1) - (at_mode / least).log()
    last = high + ((QUADRATURE_DROP + (2 * at_mode * QUADRATURE_DROP).sqrt()) / at_mode).log1p()
    curvature = at_mode + (slopes * (slopes + waiting - 1)).sum(0)
    spacing = (0.8 / curvature.sqrt()).clamp(max=0.36)
    return first, last, ((last - first) / spacing).ceil().long() + 1


# The loss -----------------------------------------------------------------------------------------

CHUNK_VALUES = 1 << 24  # logits at once, 64 MB; the loss needs about five times that for a while
MAX_LOG_TERM = 60.0  # of a reverse KL's weighted term, which might overflow float32
LEAST_LOG_Q = -1e4  # of what a reverse KL multiplies by q: a student's -inf is 0 log 0


class Student(NamedTuple):
    """Where a student's logits come from."""

    states: Any  # the logits themselves, (B, S, V) or (N, V); with a head, hidden states
    head: Any = None  # (V, H)
    bias: Any = None  # (V,)
    transform: Callable[[Any], Any] | None = None  # what the model does to logits after its head

    @property
    def vocab(self) -> int:
        """Entries of the student's distribution."""
        return int(self.states.shape[-1] if self.head is None else self.head.shape[0])


def distillation_loss(
    student_logits: Any,
    batch: Mapping[str, Any],
    *,
    divergence: str = "forward_kl",
    temperature: float = 1.0,
    tail: str = "unbiased",
    tail_weight: float = 1.0,
    alpha: float = 1.0,
    label_smoothing: float = 0.0,
    weights: Any = None,
    reduction: str = "mean",
    chunk_tokens: int | None = None,
) -> Any:
    """Return the divergence of the student from the stored teacher, in nats, times temperature².

    With p the teacher and q the student, both at `temperature`: `forward_kl` Σ p log(p / q),
    `reverse_kl` Σ q log(q / p), `jsd` the mean of the two KL divergences to (p + q) / 2. The sums
    run over all V entries of the student: one with more than the teacher's (padding of its
    embedding) learns to leave them out; one with fewer cannot hold the teacher.

    How the tail is counted:

    - `unbiased`: every sampled token counts as `weigh_tail` says. At temperature 1 value and
      gradient are unbiased for all three divergences; sums that are known (Σ q log q, the part of
      the JSD where p is 0) are taken exactly. At another the normaliser Σ p^(1/T) is itself
      estimated: there is no unbiased form, and what is computed is consistent in M.
    - `renormalized`: the sampled tokens are scaled to the mass outside the nucleus. Biased.
    - `ghost`: all tokens outside the nucleus are one; no tail sample is used at temperature 1.
      Exact for that coarser vocabulary, so never more than the true divergence.
    - `ignore`: only nucleus terms; the sum is left as it is, not scaled to 1. Biased.

    Compact rows (`--min-p`) have a sample without logits, of which each entry counts as the share
    that it stands for: the forward KL at temperature 1, whose gradient has no bias (its value is
    off by what depends on the teacher alone), and `ghost` and `ignore` at temperature 1.

    The reverse KL takes log p to be the tail's mean where nothing is stored, and sampled tokens
    correct it: without bias under `unbiased`, but with a large deviation where q exceeds p by far.
    Tokens that the teacher excludes count as that mean.

    Args:
        student_logits: (B, S, V), or (N, V) for only the positions of `flat_positions(batch)`.
        batch: from `collate_logits`, on the same device.
        divergence: `forward_kl`, `reverse_kl` or `jsd`.
        temperature: of both distributions.
        tail: `unbiased`, `renormalized`, `ghost` or `ignore`.
        tail_weight: of what the divergence inside the tail adds to the `ghost` one; 1 is the
            divergence itself, more makes the tail heavier.
        alpha: share of the teacher in the loss; the rest is the cross-entropy on the text's own
            tokens, at temperature 1.
        label_smoothing: of that cross-entropy, as PyTorch's.
        weights: of the tokens, (B, T) or (N,); `mean` divides by their sum. A token whose label is
            set to -100 has none, as in other losses.
        reduction: `mean` over the N tokens, `sum`, or `none` for (N,).
        chunk_tokens: tokens at once. None takes 16 million logits; memory for about five times
            that is needed for a while, beside the gradient.

    Raises:
        LogitsError: an option is none of the choices; logits and batch do not fit together; the
            batch lacks what `tail`, the divergence or the temperature needs, or was cast to less
            than float32; the teacher has ids of V or more.

    Source: Kool, van Hoof and Welling (2020) for the weights; Hinton, Vinyals and Dean (2015) for
    the factor temperature²; Anshumann et al. (2025), Sparse Logit Sampling, ACL, for ghost tokens;
    Dasgupta, Cohn and Baldwin (2026), arXiv 2602.20816, for weighing the tail apart.
    """
    torch = import_extra("torch")
    check_choice("divergence", divergence, DIVERGENCES)
    check_choice("tail", tail, TAILS)
    check_choice("reduction", reduction, ("mean", "sum", "none"))
    student = student_logits
    student = student if isinstance(student, Student) else Student(student)
    if not torch.is_tensor(student.states):
        kind = describe_type(student.states)
        raise LogitsError(f"a student's logits are a tensor, as model(...).logits is, not {kind}")
    samples = tail in ("unbiased", "renormalized") and bool(batch["teacher_points"].any())
    if samples and divergence != "forward_kl":
        raise LogitsError(
            f"{divergence} needs the tail's logits, which compact rows (--min-p) leave out: take "
            "forward_kl, or tail='ghost', or rows made without --min-p"
        )
    teacher = read_teacher(batch, student.vocab, tail=tail, temperature=temperature)
    flat, where = flatten_states(student.states, batch)

    def losses_of(logits: Any, part: slice) -> Any:
        told = Teacher(*(values[part] for values in teacher))
        logits = logits if student.transform is None else student.transform(logits)
        hot = logits / temperature if temperature != 1 else logits
        found = 0.0
        if alpha != 0 and tail_weight != 0 and tail != "ghost":
            found = tail_weight * sparse_divergence(hot, told, divergence)
        if alpha != 0 and (tail_weight != 1 or tail == "ghost"):
            share = 1.0 if tail == "ghost" else 1 - tail_weight
            found = found + share * ghost_divergence(hot, told, divergence)
        found = found * (alpha * temperature**2)
        if alpha != 1:
            entropy = torch.nn.functional.cross_entropy(
                logits, told.labels, label_smoothing=label_smoothing, reduction="none"
            )
            found = found + (1 - alpha) * entropy
        return found

    size = max(chunk_tokens or CHUNK_VALUES // student.vocab, 1)
    losses = chunked_losses().apply(flat, student.head, student.bias, where, losses_of, size)
    weights = torch.ones_like(losses) if weights is None else weights
    if weights.shape == batch["teacher_positions"].shape:
        weights = weights[batch["teacher_positions"] >= 0]
    if weights.shape != losses.shape:
        shape, count = tuple(weights.shape), losses.numel()
        raise LogitsError(f"weights of shape {shape} for {count} tokens: give (B, T) or (N,)")
    weights = weights.to(losses) * (teacher.labels != IGNORED_LABEL)
    # A masked token may have an infinite loss, which 0 times is NaN.
    losses, total = torch.where(weights != 0, losses * weights, 0.0), weights.sum()
    if reduction == "none":
        return losses
    # Where nothing is weighed, in a batch without a token for one, there is nothing to learn.
    return losses.sum() if reduction == "sum" else losses.sum() / total.where(total != 0, 1)


def distillation_loss_from_hidden(
    hidden: Any,
    head_weight: Any,
    batch: Mapping[str, Any],
    *,
    head_bias: Any = None,
    transform: Callable[[Any], Any] | None = None,
    **options: Any,
) -> Any:
    """Return `distillation_loss` of the logits `hidden @ head_weight.T`, which never exist at once.

    Chunks of tokens go through head and loss, and once more for the gradient of hidden states, head
    and bias. The head is multiplied in the hidden states' dtype, its gradient summed in float32.

    Args:
        hidden: (B, S, H), or (N, H) for the positions of `flat_positions(batch)`: what the
            student's head is given, so after its last norm.
        head_weight, head_bias: (V, H) and (V,), whole: of a student sharded by FSDP or DeepSpeed,
            what `full_tensor()` or `GatheredParameters` gives.
        batch: from `collate_logits`, on the same device.
        transform: what the model does to the logits after its head, such as a scale or a soft-cap;
            parameters of its own would get no gradient.
        options: of `distillation_loss`.
    """
    head = head_weight.to(hidden.dtype)  # what autocast would do
    bias = None if head_bias is None else head_bias.to(hidden.dtype)
    return distillation_loss(Student(hidden, head, bias, transform), batch, **options)


def check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    """Refuse a value that is none of the choices."""
    if value not in choices:
        raise LogitsError(f"{name} {value!r} is none of {', '.join(choices)}")


def flatten_states(states: Any, batch: Mapping[str, Any]) -> tuple[Any, Any]:
    """Return states as (n, H), and which rows of them (N,) are the extracted tokens'.

    Raises:
        LogitsError: the shape is not that of the batch.
    """
    where = flat_positions(batch)
    if states.dim() == 2:
        if states.shape[0] != where.numel():
            count = where.numel()
            raise LogitsError(f"{states.shape[0]} rows of student logits for {count} tokens")
        return states, import_extra("torch").arange(where.numel(), device=states.device)
    if states.shape[:2] != batch["input_ids"].shape:
        raise LogitsError(
            f"student logits of shape {tuple(states.shape)} are not at the positions of "
            f"input_ids {tuple(batch['input_ids'].shape)}"
        )
    return states.reshape(-1, states.shape[-1]), where


class Teacher(NamedTuple):
    """What the loss reads of N tokens, at its temperature."""

    ids: Any  # (N, E)
    log_probs: Any  # (N, E)
    log_weights: Any  # (N, E), -inf for what does not count
    nucleus: Any  # (N, E) bool
    log_rest: Any  # (N,), of the mass outside the nucleus
    log_mean: Any  # (N,), the mean of log p that stands for what is not stored
    labels: Any  # (N,), the text's own tokens


def read_teacher(
    batch: Mapping[str, Any], vocab: int, *, tail: str, temperature: float = 1.0
) -> Teacher:
    """Return the teacher of a batch, at a temperature, for a student of `vocab` entries.

    Raises:
        LogitsError: the batch lacks what `tail` or the temperature needs, has ids that the
            student does not, or was cast to less than float32.
    """
    torch = import_extra("torch")
    if not 0 < temperature < math.inf:
        raise LogitsError(f"temperature {temperature} is not positive")
    there = batch["teacher_positions"] >= 0
    told = (batch[name][there] for name in TEACHER_COLUMNS)
    ids, log_probs, stored, sampled, log_rest, points = told
    for name in ("teacher_log_probs", "teacher_log_rest"):
        if batch[name].dtype.itemsize < 4:
            raise LogitsError(
                f"{name} was cast to {batch[name].dtype}, as Trainer does under DeepSpeed: keep it "
                "in float32, as _prepare_input of docs/examples/trainer.py does"
            )
    sampled, nucleus = stored & sampled, stored & ~sampled
    drawn, sizes = sampled & ~points[:, None], sampled.sum(-1)
    if temperature != 1 and points.any():
        raise LogitsError(
            f"temperature {temperature:g} needs the tail's logits, which compact rows (--min-p) "
            "leave out: train at temperature 1, or on rows made without --min-p"
        )
    if tail in ("unbiased", "renormalized") and not (points | (sizes > 0)).all():
        raise LogitsError(f"tail={tail!r} needs a tail sample (--sampled-n); take ghost or ignore")
    if ids.numel() and int(ids.max()) >= vocab:
        raise LogitsError(f"the teacher has ids beyond the student's {vocab} logits")
    log_weights = torch.zeros_like(log_probs)
    if tail == "renormalized":
        scale = log_rest - masked_logsumexp(log_probs, sampled)
        log_weights = torch.where(sampled, scale[:, None], 0.0)
    elif drawn.any() and (tail == "unbiased" or temperature != 1):
        if (sizes[~points] != sizes[~points][0]).any():
            raise LogitsError("the tail samples of one batch differ in size")
        rest = widen(log_rest[~points]).exp()
        found = weigh_tail(log_probs[drawn].view(rest.numel(), -1), rest)
        log_weights[drawn] = found.to(log_weights.dtype).reshape(-1)
    outside = (vocab - nucleus.sum(-1)).clamp(min=1).log()  # (N,)
    if temperature != 1:
        log_probs = log_probs / temperature
        alike = outside + (log_rest - outside) / temperature  # as if the tail were all equal
        in_tail = masked_logsumexp(log_probs + log_weights, sampled)
        in_tail = torch.where(sizes > 0, in_tail, alike)
        total = torch.logaddexp(masked_logsumexp(log_probs, nucleus), in_tail)
        log_probs, log_rest = log_probs - total[:, None], in_tail - total
    counted = nucleus if tail in ("ghost", "ignore") else stored
    log_weights = log_weights.masked_fill(~counted, -math.inf)
    labels = batch["labels"].reshape(-1)[flat_positions(batch) + 1]
    return Teacher(ids, log_probs, log_weights, nucleus, log_rest, log_rest - outside, labels)


def masked_logsumexp(values: Any, mask: Any) -> Any:
    """Return log Σ exp over the entries of each row that a mask selects; -inf for none."""
    return values.masked_fill(~mask, -math.inf).logsumexp(-1)


@functools.cache
def chunked_losses() -> Any:
    """Return the autograd function behind the loss, made when torch is first needed.

    It goes through chunks of tokens, forward and again backward, and keeps nothing of either.
    """
    torch = import_extra("torch")
    function: Any = torch.autograd.Function

    def make_logits(flat: Any, head: Any, bias: Any, where: Any) -> tuple[Any, Any]:
        states = flat[where]
        with torch.autocast(flat.device.type, enabled=False):
            logits = torch.nn.functional.linear(states, head, bias) if head is not None else states
        return states, logits.to(torch.promote_types(logits.dtype, torch.float32))

    class ChunkedLosses(function):
        @staticmethod
        def forward(ctx, flat, head, bias, where, losses_of, size) -> Any:  # type: ignore[no-untyped-def]
            ctx.save_for_backward(flat, head, bias, where)
            ctx.losses_of, ctx.size = losses_of, size
            parts = [slice(i, i + size) for i in range(0, max(where.numel(), 1), size)]
            return torch.cat(
                [losses_of(make_logits(flat, head, bias, where[part])[1], part) for part in parts]
            )

        @staticmethod
        @torch.autograd.function.once_differentiable  # the slopes hold no graph
        def backward(ctx, outer) -> Any:  # type: ignore[no-untyped-def]
            flat, head, bias, where = ctx.saved_tensors
            slopes = torch.zeros_like(flat)
            of_head, of_bias = (
                torch.zeros_like(values, dtype=torch.promote_types(values.dtype, torch.float32))
                if needed else None
                for values, needed in zip((head, bias), ctx.needs_input_grad[1:3], strict=True)
            )  # fmt: skip
            for first in range(0, where.numel(), ctx.size):
                part = slice(first, first + ctx.size)
                states, logits = make_logits(flat, head, bias, where[part])
                with torch.enable_grad():
                    losses = ctx.losses_of(logits.requires_grad_(), part)
                    (slope,) = torch.autograd.grad(losses, logits, outer[part])
                if of_bias is not None:
                    of_bias += slope.sum(0)
                if head is not None:
                    slope = slope.to(head.dtype)
                if of_head is not None and of_head.dtype == head.dtype:
                    of_head.addmm_(slope.T, states)
                elif of_head is not None:
                    of_head += slope.T @ states
                slopes[where[part]] = (slope if head is None else slope @ head).to(flat.dtype)
            of_head = of_head if of_head is None else of_head.to(head.dtype)
            return slopes, of_head, of_bias, None, None, None

    return ChunkedLosses


def sparse_divergence(logits: Any, teacher: Teacher, divergence: str) -> Any:
    """Return the divergence (n,) at each of some tokens from float logits (n, V)."""
    functional = import_extra("torch.nn.functional")
    counted = teacher.log_weights > -math.inf
    log_w, log_p, log_q = (
        values.masked_fill(~counted, 0).to(logits.dtype)
        for values in (teacher.log_weights, teacher.log_probs, gather_log_probs(logits, teacher))
    )
    if divergence == "forward_kl":
        constant, terms = 0.0, (log_w + log_p).exp() * (log_p - log_q)
    elif divergence == "jsd":
        constant, terms = math.log(2) / 2, (log_w + log_p).exp() * jsd_above_none(log_p - log_q)
    else:
        log_mean = teacher.log_mean.to(log_q.dtype)
        bounded = functional.log_softmax(logits, -1).clamp(min=LEAST_LOG_Q)
        constant = (functional.softmax(logits, -1) * bounded).sum(-1) - log_mean
        terms = (log_w + log_q).clamp(max=MAX_LOG_TERM).exp() * (log_mean[:, None] - log_p)
    return constant + terms.masked_fill(~counted, 0).sum(-1)


def gather_log_probs(logits: Any, teacher: Teacher) -> Any:
    """Return the student's log-probabilities (n, E) of what is stored."""
    return logits.gather(1, teacher.ids) - logits.logsumexp(-1, keepdim=True)


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


def ghost_divergence(logits: Any, teacher: Teacher, divergence: str) -> Any:
    """Return the divergence (n,) between two distributions over the nucleus and one token more."""
    torch = import_extra("torch")
    row, entry = teacher.nucleus.nonzero(as_tuple=True)
    nothing = logits.new_tensor(-math.inf)
    left = logits.index_put((row, teacher.ids[row, entry]), nothing).logsumexp(-1)
    # Nothing is left where the nucleus is the vocabulary.
    ghost_q = (left - logits.logsumexp(-1)).clamp(min=LEAST_LOG_REST)[:, None]
    ghost_p = teacher.log_rest.to(ghost_q.dtype)[:, None]
    log_p = torch.cat([teacher.log_probs.to(ghost_q.dtype), ghost_p], 1)
    log_q = torch.cat([gather_log_probs(logits, teacher), ghost_q], 1)
    outside = torch.cat([~teacher.nucleus, torch.zeros_like(ghost_p, dtype=torch.bool)], 1)
    log_p, log_q = log_p.masked_fill(outside, 0), log_q.masked_fill(outside, 0)
    if divergence == "forward_kl":
        terms = log_p.exp() * (log_p - log_q)
    elif divergence == "reverse_kl":
        terms = log_q.exp() * (log_q.clamp(min=LEAST_LOG_Q) - log_p)
    else:
        terms = log_p.exp() * jsd_above_none(log_p - log_q) + log_q.exp() * (math.log(2) / 2)
    return terms.masked_fill(outside, 0).sum(-1)


# Other trainers' formats --------------------------------------------------------------------------
#
# Both hold a fixed number of entries a token and no weights, so only the nucleus goes into them.

FILLER_LOG_PROB = -1e-6  # DistillKit takes the logarithm of what is missing, which must be there
DISTILLKIT_CONFIG = """\
d: {vocab}
k: {k}
exact_k: {k}
exact_dtype: float32
polynomial_terms: null
term_dtype: float32
residual_bins: []
delta_encoding: false
error_diffusion: false
normalize_t: false
"""


def export_axolotl(
    dataset: str | Path | LogitDataset,
    folder: str | Path,
    *,
    k: int = 64,
    at: str = "predicting",
    temperature: float = 1.0,
    normalize: bool = False,
    text: TextSource | None = None,
) -> int:
    """Write an output as the tokenized dataset that axolotl's knowledge distillation trains on.

    Columns: `input_ids`, `attention_mask`, `labels`, and at each of the S positions
    `target_token_ids`, `target_logprobs` and `target_mask`, k values each; -1e9 and mask 0 where
    there is nothing. Returns the number of rows; `datasets.load_from_disk` reads the folder.

    Args:
        dataset: the output.
        folder: a new one.
        k: nucleus entries kept of each token.
        at: `predicting` puts a distribution at the position that predicts, as the trainer since
            its Liger kernel (2025) expects; `predicted` at the token, as the one before, which
            shifted.
        temperature: `kd_temperature` of the training: its kernel divides the student's logits by
            it and takes the targets as they are.
        normalize: scale the k probabilities of a token to the sum 1. Else they are the teacher's
            own, over the whole vocabulary (at another temperature estimated, as in the loss).
        text: see `LogitIterableDataset`.

    Raises:
        LogitsError: `k` is below 1, or something is in the folder.

    Source: axolotl, src/axolotl/integrations/kd: collator.py for the columns, kernels/liger.py
    and trainer.py for the positions.
    """
    check_choice("at", at, ("predicting", "predicted"))
    target = check_export(folder, k)

    def convert(row: Mapping[str, Any], top: TopEntries) -> dict[str, npt.NDArray[Any]]:
        size, where = row["input_ids"].size, row["teacher_positions"] - (at == "predicting")
        columns = {
            "input_ids": row["input_ids"],
            "attention_mask": np.ones(size, np.int8),
            "labels": row["labels"],
            "target_token_ids": np.zeros((size, k), np.int32),
            "target_logprobs": np.full((size, k), -1e9, np.float32),
            "target_mask": np.zeros((size, k), np.int8),
        }
        columns["target_token_ids"][where] = top.ids
        columns["target_logprobs"][where] = np.where(top.there, top.log_probs, -1e9)
        columns["target_mask"][where] = top.there
        return columns

    rows = export_rows(dataset, text, k, temperature=temperature, normalize=normalize)
    return write_export(itertools.starmap(convert, rows), target)


def export_distillkit(
    dataset: str | Path | LogitDataset,
    folder: str | Path,
    *,
    k: int = 64,
    max_length: int | None = None,
    labels_at: str = "predicted",
    text: TextSource | None = None,
) -> int:
    """Write an output as the offline teacher dataset of DistillKit (`teacher.kind: dataset`).

    Columns: `input_ids` and `labels`, and at each position that predicts something
    `compressed_logprobs`, k float32 by descending value as bytes, and `bytepacked_indices`, the ids
    at ceil(log2 V) bits each, the highest bit first. `compression_config.yaml` beside them is what
    `teacher.logprob_compressor` has to say (k = exact_k: nothing is approximated). Entries beyond
    the nucleus have log-probability -100 and ids of their own. Where nothing was extracted, or no
    token was likely enough for a nucleus (`--min-p`), the distribution is the text's next token if
    the label there is set, else any other token. Returns the number of rows;
    `datasets.load_from_disk` reads the folder.

    DistillKit's `symmetric_uniform` takes the logarithm of what the k probabilities leave, the
    teacher's and the student's, also where a factor 0 leaves out the result. So the teacher's leave
    1e-6 at least, no id comes twice, and what is left out names no token that a student is sure of.

    Args:
        dataset, folder, k, text: see `export_axolotl`.
        max_length: cut or fill every row to this many tokens, with an `attention_mask`, as
            `prepacked: true` needs. Without it rows are as long as they are, for `pack_logits`.
        labels_at: where labels stand: DistillKit trains on a distribution where the label at its
            own position is set. `predicted`, at the tokens, suits cross-entropy: the first
            distribution of each turn is then left out, and one filler after it is trained on.
            `predicting`, at the position before, suits a divergence alone, and no cross-entropy.

    Raises:
        LogitsError: `k` is below 1, or something is in the folder.

    Source: arcee-ai/DistillKit, distillkit/sample_common.py (schema), compression/config.py,
    compression/bitpack.py and monotonic_logprobs.py for the bytes, trainer.py for the mask.
    """
    check_choice("labels_at", labels_at, ("predicted", "predicting"))
    output = as_output(dataset)
    vocab = RunLimits.of(output.settings).vocab_size
    bits = max((vocab - 1).bit_length(), 1)
    target, k = check_export(folder, k), min(k, vocab)

    def convert(row: Mapping[str, Any], top: TopEntries) -> dict[str, npt.NDArray[Any]]:
        some = top.there.any(1)  # of a compact row, a token may have no nucleus
        labels, where = row["labels"], row["teacher_positions"][some] - 1
        if labels_at == "predicting":
            labels = np.append(labels[1:], IGNORED_LABEL)
        ids, there = np.zeros((2, labels.size - 1, k), np.int32)
        log_probs = np.full(ids.shape, LEAST_LOG_REST)
        ids[:, 0], there[:, 0], log_probs[:, 0] = row["input_ids"][1:], 1, FILLER_LOG_PROB
        found = np.where(top.there, top.log_probs, LEAST_LOG_REST)
        found += np.minimum(FILLER_LOG_PROB - np.log(np.exp(found).sum(1, keepdims=True)), 0)
        ids[where], there[where], log_probs[where] = top.ids[some], top.there[some], found[some]
        others = other_ids(ids, there, vocab)
        told = labels[:-1] != IGNORED_LABEL
        told[where] = True
        ids = np.where(there & told[:, None], ids, others)
        columns = {
            "input_ids": row["input_ids"].astype(np.uint64),
            "labels": labels,
            "compressed_logprobs": log_probs.astype("<f4").view(np.uint8),
            "bytepacked_indices": pack_bits(ids, bits),
        }
        return columns if max_length is None else fit_length(columns, max_length)

    rows = export_rows(output, text, k)
    config = DISTILLKIT_CONFIG.format(vocab=vocab, k=k)
    converted = itertools.starmap(convert, rows)
    return write_export(converted, target, texts={"compression_config.yaml": config})


def fit_length(columns: Mapping[str, npt.NDArray[Any]], length: int) -> dict[str, npt.NDArray[Any]]:
    """Cut columns at a length, or fill them up to it, and say in a mask what is no filling."""
    size = len(columns["bytepacked_indices"])  # the last token predicts nothing
    kept = np.minimum(np.arange(length), size - 1)  # what fills is the last again
    fitted = {name: values[kept] for name, values in columns.items()}
    there = np.arange(length) < size
    fitted["labels"] = np.where(there, fitted["labels"], IGNORED_LABEL)
    return {**fitted, "attention_mask": there.astype(np.int64)}


class TopEntries(NamedTuple):
    """The k likeliest entries (N, k) of the nuclei of N tokens."""

    ids: npt.NDArray[np.int32]  # where there is nothing, the least likely that is stored
    log_probs: npt.NDArray[np.float32]
    there: npt.NDArray[np.bool_]


def export_rows(
    dataset: str | Path | LogitDataset,
    text: TextSource | None,
    k: int,
    *,
    temperature: float = 1.0,
    normalize: bool = False,
) -> Iterator[tuple[dict[str, Any], TopEntries]]:
    """Yield every row of an output in its order, and what k entries a token keep of its teacher."""
    output = as_output(dataset)
    vocab = RunLimits.of(output.settings).vocab_size
    rows: Any = LogitIterableDataset(output, seed=None, rank=0, world_size=1, text=text)
    for row in rows:
        told = read_teacher(collate_logits([row]), vocab, tail="ignore", temperature=temperature)
        ids, log_probs, _, nucleus = (values.numpy() for values in told[:4])
        beyond = ((0, 0), (0, max(k - ids.shape[1], 0)))
        top_ids, kept, there = (
            np.pad(values[:, :k], beyond) for values in (ids, log_probs, nucleus)
        )
        if normalize:
            held = (np.exp(kept) * there).sum(1, keepdims=True)
            kept -= np.log(np.where(held > 0, held, 1))  # of a compact row there may be none
        # An id that stands where nothing is may be counted by who ignores the mask.
        least = np.where(row["teacher_mask"], log_probs, np.inf).argmin(1)[:, None]
        filled = np.where(there, top_ids, np.take_along_axis(ids, least, 1))
        yield row, TopEntries(filled.astype(np.int32), kept, there)


def other_ids(
    ids: npt.NDArray[np.int32], there: npt.NDArray[Any], vocab: int
) -> npt.NDArray[np.int64]:
    """Return for each row of ids (n, k) k that are not among those there, the highest first."""
    numbers = vocab - 1 - ids  # rare tokens have high ids
    row, entry = np.nonzero(there * (numbers < 2 * ids.shape[1]))
    taken = np.zeros((len(ids), min(2 * ids.shape[1], vocab)), np.bool_)
    taken[row, numbers[row, entry]] = True
    return vocab - 1 - taken.argsort(1, kind="stable")[:, : ids.shape[1]]


def pack_bits(ids: npt.NDArray[np.int32], bits: int) -> npt.NDArray[np.uint8]:
    """Pack each row of ids (n, k) into a stream of `bits` bits an id, the highest bit first."""
    wide = np.unpackbits(ids.astype(">u4").view(np.uint8).reshape(*ids.shape, 4), axis=-1)
    return np.packbits(wide[..., 32 - bits :].reshape(ids.shape[0], -1), axis=-1)


def check_export(folder: str | Path, k: int) -> Path:
    """Return the folder of an export, which must be new, as a file of another would be read too.

    Raises:
        LogitsError: something is there, or `k` is no number of entries.
    """
    if (entries := as_integer(k)) is None or not 1 <= entries <= MAX_TOKEN_ID + 1:
        raise LogitsError(f"k={k!r:.40}: an export keeps 1 to {MAX_TOKEN_ID + 1} entries a token")
    path = local_path(folder)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise LogitsError(f"{folder} is not empty: name a new folder for the export")
    return path


def write_export(
    rows: Iterable[Mapping[str, npt.NDArray[Any]]],
    folder: Path,
    *,
    texts: Mapping[str, str] | None = None,
) -> int:
    """Write rows of one- and two-dimensional arrays as `datasets` saves (nested) lists to disk.

    The folder appears when everything is in it, with `texts` by name of file.
    """
    datasets = import_extra("datasets")
    count, writer = 0, None
    with writing(folder), tempfile.TemporaryDirectory(dir=folder.parent, prefix=".export-") as made:
        new, stream = Path(made) / "export", Path(made) / "rows.arrow"
        for chunk in gather_rows(rows):
            table = pa.table({name: nested_lists([r[name] for r in chunk]) for name in chunk[0]})
            writer = writer or pa.ipc.new_stream(stream, table.schema)
            writer.write_table(table)
            count += len(chunk)
        if writer is None:
            raise LogitsError("the output holds no row to export")
        writer.close()
        datasets.Dataset.from_file(str(stream)).save_to_disk(new)
        for name, text in (texts or {}).items():
            (new / name).write_text(text, encoding="utf-8")
        new.replace(folder)
    return count


def gather_rows(
    rows: Iterable[Mapping[str, npt.NDArray[Any]]], *, most: int = 256, most_bytes: int = 2**26
) -> Iterator[list[Mapping[str, npt.NDArray[Any]]]]:
    """Yield rows some hundred at a time, or as many as have that many bytes."""
    chunk, held = [], 0
    for row in rows:
        chunk.append(row)
        held += sum(values.nbytes for values in row.values())
        if len(chunk) == most or held >= most_bytes:
            yield chunk
            chunk, held = [], 0
    if chunk:
        yield chunk


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


class ConfigError(LogitsError):
    """An option is wrong or two do not go together; met before anything runs (exit 2)."""


class OneLineParser(argparse.ArgumentParser):
    """A parser whose refusals are one line, like every other error."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse; an option that is none is named first, with the one that looks like it."""
        known = self._option_string_actions
        for word in itertools.takewhile("--".__ne__, sys.argv[1:] if args is None else args):
            flag = word.partition("=")[0]
            if re.match(r"--\w", flag) and not any(name.startswith(flag) for name in known):
                like = "".join(difflib.get_close_matches(flag, known, 1))
                self.error(f"there is no option {flag}" + (f": is it {like}?" if like else ""))
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        """Print what is wrong and exit 2."""
        self.exit(2, f"{self.prog}: error: {message} (see --help)\n")


def option(default: Any, help_text: str, *, group: str = "", **checks: Any) -> Any:
    """Declare one option; its dataclass field is the only place that holds default, help and range.

    `group` begins a group of options, or goes on with it. `checks`: `low`, `high` (inclusive),
    `above` (exclusive), `choices`, `parse` (text to value). One without default may not be empty.
    """
    return field(default=default, metadata={"help": help_text, "group": group, **checks})


def flag_of(name: str) -> str:
    """Return an option as it is typed."""
    return "--" + name.replace("_", "-")


def json_object(text: str) -> dict[str, Any]:
    """Parse a JSON object."""
    value = json.loads(text)
    if not isinstance(value, dict):
        raise ValueError("must be a JSON object")
    return value


@dataclass(kw_only=True)
class ConversationOptions:
    """The options that say which tokens each conversation has, alike in the scripts.

    Raises:
        ConfigError: a value is out of range.
    """

    model: str = option(MISSING, "Hub id or local folder of the teacher", group="teacher")
    revision: str | None = option(None, "model revision: branch, tag or commit")
    trust_remote_code: bool = option(False, "run model code from the Hub")

    dataset: str = option(
        MISSING, "Hub id, or a .jsonl, .json, .parquet, .csv file or folder", group="dataset"
    )
    subset: str | None = option(None, "dataset configuration")
    split: str = option("train", "dataset split")
    streaming: bool = option(False, "never hold the whole source in memory")
    messages_col: str | None = option(None, "column of chat messages; usual names are found")
    user_col: str = option("question", "user column of single-turn data")
    assistant_col: str = option("answer", "assistant column of single-turn data")
    system_col: str | None = option(None, "column of system messages")
    text_col: str | None = option(None, "column of plain text instead of chat")
    index_col: str | None = option(None, "column of unique integer ids (default: the row number)")

    chat_template: str | None = option(
        None, "Jinja file used instead of the tokenizer's template", group="conversation"
    )
    template_kwargs: dict[str, Any] | None = option(
        None, 'JSON for the template: {"enable_thinking": false}', parse=json_object
    )
    turns: str = option("all", "assistant turns to extract: all or last", choices=("all", "last"))
    include_think: bool = option(False, "extract think tags that only the template inserts, too")
    include_end: bool = option(False, "extract what the template appends after the turn's end, too")

    def __post_init__(self) -> None:
        for entry in fields(self):
            check_option(entry, getattr(self, entry.name))


def check_option(entry: Field[Any], value: Any) -> None:
    """Raise ConfigError when a value is outside the range or the choices of its option."""
    if value is None:
        return
    flag, checks = flag_of(entry.name), entry.metadata
    if entry.default is MISSING and not value.strip():
        raise ConfigError(f"{flag} is empty: give a Hub id, or ./ for this folder")
    if "choices" in checks and value not in checks["choices"]:
        raise ConfigError(f"{flag} {value}: choose one of {', '.join(checks['choices'])}")
    if isinstance(value, float) and math.isinf(value):
        raise ConfigError(f"{flag} {value}: must be a finite number")
    low, high, above = checks.get("low"), checks.get("high"), checks.get("above")
    if low is not None and value < low:
        raise ConfigError(f"{flag} {value}: must be at least {low}")
    if above is not None and not value > above:
        raise ConfigError(f"{flag} {value}: must be above {above}")
    if high is not None and not value <= high:
        raise ConfigError(f"{flag} {value}: must be at most {high}")


def add_options(
    parser: argparse.ArgumentParser, declared: type[Any], *, required: Sequence[str]
) -> None:
    """Add the options that the fields of a dataclass declare, in their groups."""
    groups: dict[str, Any] = {}
    group: Any = parser
    hints = get_type_hints(declared)
    for entry in fields(declared):
        if name := entry.metadata["group"]:
            group = groups.get(name) or groups.setdefault(name, parser.add_argument_group(name))
        if hints[entry.name] is bool:
            how: dict[str, Any] = {"action": "store_true"}
        else:
            how = _argument_of(entry, hints[entry.name])
        text = entry.metadata["help"]
        text += " (default: %(default)s)" if how.get("default") is not None else ""
        needed = {"required": True} if entry.name in required else {}
        group.add_argument(flag_of(entry.name), help=text, **how, **needed)


def _argument_of(entry: Field[Any], hint: Any) -> dict[str, Any]:
    """Return the `add_argument` keywords of an option that takes a value."""
    kind = (get_args(hint) or (hint,))[0]  # of `kind | None`
    parse: Any = entry.metadata.get("parse")

    def parse_or_refuse(text: str) -> Any:
        try:
            return parse(text)
        except (ValueError, RecursionError) as error:
            no_json = isinstance(error, (json.JSONDecodeError, RecursionError))
            why = "is no JSON" if no_json else f"is not usable ({error})"
            wanted = entry.metadata["help"]
            raise argparse.ArgumentTypeError(f"{text!r:.200} {why}; wanted: {wanted}") from error

    last_word = entry.name.rpartition("_")[2]
    return {
        "type": parse_or_refuse if parse else kind,
        "choices": entry.metadata.get("choices"),
        "default": None if entry.default is MISSING else entry.default,
        "metavar": {int: "N", float: "X"}.get(kind, "JSON" if parse else last_word.upper()),
    }


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
        elif stream is getattr(sys, f"__{name}__") and (
            type(getattr(stream.buffer, "raw", stream.buffer)) is io.FileIO
        ):
            stream.flush()
            file = io.BufferedWriter(LenientFile(stream.fileno(), "w", closefd=False))
            how = {"encoding": stream.encoding, "errors": stream.errors}
            setattr(sys, name, io.TextIOWrapper(file, line_buffering=True, **how))


class HideTokens(logging.Filter):
    """Replace access tokens and what acts on a terminal in every record that a handler writes."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Rewrite the record, keep it."""
        lines = record.getMessage().splitlines()
        record.msg, record.args = "\n".join(map(show_line, lines)), None
        return True


def log_safely() -> None:
    """Let all log lines go through the handlers of the program, once, and without tokens."""
    for handler in logging.getLogger().handlers:
        if not any(isinstance(kept, HideTokens) for kept in handler.filters):
            handler.addFilter(HideTokens())
    with contextlib.suppress(ImportError):  # its own handler would write every line again
        importlib.import_module("huggingface_hub.utils.logging")
        logging.getLogger("huggingface_hub").handlers.clear()
    for name in ("httpx", "httpx2"):  # a line for every request
        logging.getLogger(name).setLevel(logging.WARNING)


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
        epilog="exit codes: 0 all went well; 1 a bug (traceback); 2 bad usage or an output that "
        "cannot be opened; 3 --validate found violations, or --compare nothing to compare",
    )
    add = parser.add_argument
    add("output", metavar="OUTPUT", help="folder, Parquet file or Hub dataset")
    add("--split", default="train", help="split of OUTPUT (default: %(default)s)")
    shown = parser.add_argument_group("what to show (default: --sample 0)")
    add = shown.add_mutually_exclusive_group().add_argument
    add("--sample", type=row_list, metavar="ROWS", help="rows, such as 3 or 0,5 or 0-4")
    add("--conversation", type=int, metavar="ID", help="the row of this index in the source")
    add = shown.add_argument
    add("--token", type=int, metavar="T", help="predictions at this token of the row")
    add("--html", metavar="FILE", help="write the rows, and with --stats those, as one page")
    add("--plot", metavar="FILE", help="write a picture of the nucleus sizes (extra viz)")
    add("--stats", action="store_true", help="sizes, covered probability, bytes per token")
    add("--validate", action="store_true", help="check every row against the format")
    add("--compare", metavar="OTHER", help="compare the distributions with another output's")
    add = parser.add_argument_group("how").add_argument
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
    log_safely()
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
        log.error("explore-logits: %s", error)
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
    failed = False
    if args.validate:
        report = validate_output(dataset)
        print(break_lines(str(report)))
        summary |= {"rows": report.rows, "tokens": report.tokens, "violations": report.counts}
    if args.compare:
        comparison = compare_outputs(dataset, args.compare)
        print(break_lines(str(comparison)))
        summary["comparison"] = asdict(comparison)
        failed = not comparison.tokens
    if args.validate and not report.ok:
        return summary, 3  # what breaks the rules is not summed up
    summary.setdefault("rows", len(dataset))
    return summary | show_output(dataset, args), 3 if failed else 0


def show_output(dataset: LogitDataset, args: argparse.Namespace) -> dict[str, Any]:
    """Show figures, rows and pictures that were asked for; return what they add to the summary."""
    summary: dict[str, Any] = {}
    text = functools.cache(lambda: open_text(
        dataset, model=args.model, dataset=args.dataset, trust_remote_code=args.trust_remote_code
    ))  # fmt: skip
    stats, analyses = None, []
    if args.stats:
        actual = text().actual_tokens if args.text else None
        stats = compute_dataset_stats(dataset, max_samples=args.max_samples, actual_tokens=actual)
        print_dataset_stats(stats)
        summary |= {name: getattr(stats, name) for name in ("rows", "tokens", "bytes_per_token")}
    rows = args.sample or []
    if args.conversation is not None:
        rows = [row for row in [row_numbers(dataset).get(args.conversation)] if row is not None]
    elif (
        args.token is not None
        or (args.html and not args.stats)  # a page of nothing
        or not (args.stats or args.plot or args.validate or args.compare)
    ):
        rows = rows or [0]
    if rows or args.conversation is not None:
        analyses = show_rows(dataset, rows, text, args)
        summary["sample"] = rows
    if args.html:
        write_page(args.html, render_page(analyses, about=describe_run(dataset), stats=stats))
        summary["html"] = args.html
    if args.plot:
        figure = plot_nucleus_size_analysis(dataset, max_samples=args.max_samples)
        summary["plot"] = save_figure(figure, args.plot)
    return summary


def show_rows(
    dataset: LogitDataset,
    rows: Sequence[int],
    text: Callable[[], TextSource],
    args: argparse.Namespace,
) -> list[ConversationAnalysis]:
    """Print rows beside their text, or as ids where there is none; those of a page are returned."""
    samples = [get_sample(dataset, row) for row in rows]  # what is not there is refused first
    for sample in samples if args.token is not None else ():
        check_token(sample, args.token)
    tokenizer, analyses = None, []
    try:
        tokenizer = text().tokenizer
    except LogitsError as error:
        if args.html or not rows:
            raise LogitsError(f"the text is needed for this: {error}") from error
        log.warning("explore-logits: showing ids only: %s", error)
    else:
        analyses = [analyze_row(dataset, row, text(), k=args.top) for row in rows]
        if not rows:
            analyses = [analyze_missing(dataset, text(), args.conversation)]
    if args.html:
        return analyses
    for analysis in analyses:
        print(visualize_conversation_probabilities(analysis), end="\n\n")
    for sample, analysis in itertools.zip_longest(samples, analyses[: len(samples)]):
        print_sample_info(sample)
        show_tokens(sample, analysis, tokenizer, args)
    return analyses


def show_tokens(
    sample: Sample, analysis: ConversationAnalysis | None, tokenizer: Any, args: argparse.Namespace
) -> None:
    """Print the token that was asked for, or the most surprising ones of a row."""
    if args.token is not None:
        chosen = [args.token % sample["num_tokens"]]
    else:
        least, why = sample.block.first_probs, "of which the teacher was least sure"
        if analysis is not None:
            least = np.array([token.log_probability for token in analysis.tokens])
            why = "that the teacher expected least"
        chosen = sorted(np.argsort(least)[:3].tolist())
        print(f"the {plural(len(chosen), 'token')} {why}:")
    for t in chosen:
        print()
        print_token(
            sample, t, tokenizer, k=args.top, actual=analysis.tokens[t] if analysis else None
        )


def save_figure(figure: Any, path: str | Path) -> str:
    """Write a figure as the kind of picture that the file's name says, else PNG; return the name.

    Raises:
        LogitsError: there is no such kind, or it cannot be written there.
    """
    path = path if Path(path).suffix else f"{path}.png"
    with writing(path) as target:
        try:
            figure.savefig(target)
        except ValueError as error:  # a format that matplotlib does not know
            raise LogitsError(f"cannot write {path}: {first_line(error)}") from error
    return str(path)


if __name__ == "__main__":
    sys.exit(main())
