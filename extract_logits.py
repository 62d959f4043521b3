"""Run a teacher over a chat dataset once and keep its distributions as small Parquet shards.

    dataset → prepare_dataset → ConversationDataset → TokenBudgetBatchSampler → gpu_process_batch
            → AsyncPostProcessor → StreamingHFUploader → Hub or folder

Row token j is the distribution from which the j-th extracted assistant token is predicted: its
nucleus (the top tokens covering top_p, at most K), M tokens drawn from the rest without
replacement, and the log-sum-exp.

A shard is a part of the job that is fixed from the start: part p holds the conversations
selection[p*E : (p+1)*E] in that order, whoever computes them, whenever. A part is done when the
output lists it. Resume, several workers and lost machines all follow from that.

Letters: S sequence length, N extracted tokens, V vocabulary size, K nucleus cap (--top-p-max),
M tail samples per token (--sampled-n), B sequences in a batch, E conversations per part.

    python extract_logits.py --model Qwen/Qwen3-8B --dataset user/chats --output user/chats-logits
    python extract_logits.py --output user/chats-logits --resume

Exit codes: 0 all is stored; 1 a bug; 2 bad usage or input; 4 the Hub refused, shards are kept
locally; 75 stopped by the runtime limit, resumable; 129/130/143 stopped by a signal, resumable.
"""

from __future__ import annotations

import os
import signal
import sys

# As a script and as an installed command: Ctrl-C while libraries load leaves without a traceback.
if __name__ == "__main__" or sys.argv[0].endswith("extract-logits"):
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))

import argparse
import contextlib
import copy
import errno
import functools
import hashlib
import importlib
import importlib.metadata
import importlib.util
import itertools
import json
import logging
import math
import multiprocessing
import pickle
import random
import re
import shlex
import shutil
import tempfile
import threading
import time
from array import array
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from datetime import datetime, timedelta
from inspect import signature
from pathlib import Path
from types import FrameType
from typing import (
    TYPE_CHECKING,
    Any,
    NoReturn,
    TypeAlias,
    TypeVar,
    cast,
)

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from tqdm.contrib.logging import logging_redirect_tqdm

from explore_logits import (
    CONFIG_FILE,
    MAX_TOKEN_ID,
    METADATA_PART,
    METADATA_SETTINGS,
    NOT_OF_JOB,
    PARTS_PER_FOLDER,
    TEMPLATE_FILE,
    ConfigError,
    ConversationColumns,
    ConversationEncoder,
    ConversationError,
    ConversationOptions,
    FormatError,
    Lengths,
    LogitsError,
    OneLineParser,
    add_options,
    cached_commit,
    conversation_settings,
    count_processors,
    differing_settings,
    first_line,
    flag_of,
    format_mask_preview,
    format_version,
    hash_ids,
    hide_tokens,
    hub_answers,
    is_exact,
    json_object,
    limit_waiting,
    load_tokenizer,
    local_path,
    log_safely,
    open_bar,
    open_conversations,
    option,
    outlive_readers,
    pack_indices,
    parse_settings,
    part_path,
    plural,
    read_lengths,
    refuse_inside,
    shard_schema,
    show_line,
    source_columns,
    source_id,
    source_revision,
    warn_once,
)


class ImportedWhenUsed:
    """Stands for a module until an attribute of it is asked for: options are refused before."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __getattr__(self, attribute: str) -> Any:
        module = globals()[self.name] = importlib.import_module(self.name)
        return getattr(module, attribute)


if TYPE_CHECKING:
    import torch
else:
    torch = ImportedWhenUsed("torch")

__all__ = [
    "AsyncPostProcessor",
    "ConfigError",
    "ConversationDataset",
    "DataError",
    "ExtractedTokens",
    "ExtractionConfig",
    "GPUBatchResult",
    "GracefulInterrupt",
    "HubError",
    "StreamingHFUploader",
    "Teacher",
    "TeacherError",
    "TimedShutdown",
    "TokenBudgetBatchSampler",
    "cpu_postprocess_batch",
    "extract_tokens",
    "gpu_process_batch",
    "load_teacher",
    "main",
    "pack_indices",
    "parse_args",
    "prepare_dataset",
    "quantize_rows",
    "run_extraction",
]

logger = logging.getLogger("extract_logits")
T = TypeVar("T")


class DataError(LogitsError):
    """The dataset cannot be read as conversations; met while it is prepared (exit 2)."""


class TeacherError(LogitsError):
    """The model cannot be loaded or its logits cannot be used (exit 2)."""


class HubError(LogitsError):
    """The Hub refused or was out of reach; what could not be delivered is kept locally (exit 4)."""


class StopRequested(Exception):
    """The run was told to stop; nothing is wrong, and it can be resumed."""


def never() -> bool:
    """Return False: nobody asks to stop."""
    return False


def stop_if(should_stop: Callable[[], bool]) -> None:
    """Raise StopRequested where the run was told to stop."""
    if should_stop():
        raise StopRequested


# --------------------------------------------------------------------------------------------------
# 0 Config
# --------------------------------------------------------------------------------------------------


def parse_limits(text: str) -> dict[str, int]:
    """Parse a JSON object of non-negative integers by group name, such as {"math": 20000}."""
    value = json_object(text)
    if not all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in value.values()):
        raise ValueError('must be a JSON object of non-negative integers: {"math": 20000}')
    return value


def parse_thresholds(text: str) -> dict[int, int]:
    """Parse {"length": conversations per batch}: JSON keys are strings, lengths are integers."""
    value = {int(length): n for length, n in parse_limits(text).items()}
    if not value or min(value) < 1 or min(value.values()) < 1:
        raise ValueError("needs lengths and batch sizes of at least 1")
    return value


ENGINE_OWN = {  # arguments of vLLM that follow from other options
    **{n: f"it is {flag_of(n)}" for n in ("model", "revision", "dtype", "trust_remote_code")},
    "max_model_len": "it is --max-seq-len",
    **dict.fromkeys(
        ("runner", "convert", "pooler_config", "enable_prefix_caching", "tokenizer"),
        "the extraction sets it, drop it",
    ),
}
NOT_BESIDE_MIN_P = ("top_p", "top_p_max", "sampled_n")


@dataclass(kw_only=True)
class ExtractionConfig(ConversationOptions):
    """Every option of a run; field names are option names with underscores, "off" is None.

    Raises:
        ConfigError: a value is out of range or two options contradict each other.
    """

    device: str = option("auto", "cuda, cuda:N, mps or cpu; auto is the best", group="teacher")
    dtype: str = option(
        "auto",
        "of weights and forward; auto is the checkpoint's on a GPU, float32 on a CPU",
        choices=("auto", "float32", "bfloat16", "float16"),
    )
    attn: str = option("auto", "eager, sdpa, flash_attention_2, …")
    engine: str = option(
        "transformers",
        "what runs the teacher's layers (extra vllm, in an environment of its own)",
        choices=("transformers", "vllm"),
    )
    engine_args: dict[str, Any] | None = option(
        None,
        'for vLLM, JSON: {"tensor_parallel_size": 8}, "unchecked": true for families not compared',
        parse=json_object,
    )
    tensor_parallel: bool = option(
        False, "split the teacher over all processes of a torchrun, which work as one"
    )

    limit: int | None = option(
        None, "conversations of the whole job, over all resumed runs", group="selection",
        low=1, high=2**31,
    )  # fmt: skip
    start_offset: int = option(0, "source rows to pass over first", low=0)
    random_sample: bool = option(
        False, "take rows at random, by --seed, where a limit leaves some out"
    )
    subject_col: str | None = option(None, "column of group names for --sample-subject")
    sample_subject: dict[str, int] | None = option(
        None,
        'conversations per group, JSON: {"math": 20000, "*": 6000}; "" is the empty group',
        parse=parse_limits,
    )
    full_dataset: bool = option(False, "take every row; refuses options that leave some out")
    seed: int = option(42, "of the selection and of the tail", low=0, high=2**63 - 1)

    length_col: str | None = option(
        None, "column with lengths in tokens, of --tokenized-dataset or the source", group="lengths"
    )
    tokenized_dataset: str | None = option(
        None, "lengths by compute_lengths.py: file, folder or Hub id"
    )
    max_seq_len: int | None = option(
        None, "skip longer conversations, in tokens (default: the model's maximum)", low=2
    )

    verify_mask: bool = option(
        False, "show the extracted tokens of some rows first; on a terminal, ask",
        group="conversation",
    )  # fmt: skip

    top_p: float = option(
        0.98, "probability that the nucleus covers", group="extraction", above=0, high=1
    )
    top_p_max: int = option(100, "K: nucleus tokens kept at most", low=1, high=255)
    sampled_n: int = option(24, "M: tokens drawn from the rest", low=0)
    min_p: float | None = option(
        None,
        "compact rows instead: every token of at least this probability, and a systematic sample "
        "of the rest, ids only",
        low=1 / 255,
        high=0.5,
    )
    logit_bits: int = option(16, "resolution of a stored logit in bits", low=4, high=16)
    store_tokens: bool = option(False, "add the columns input_ids and token_positions")
    reference_extraction: bool = option(
        False, "extract by the plain code that reads as the definition"
    )

    batch_thresholds: dict[int, int] | None = option(
        None,
        'conversations per batch up to a length, JSON: {"512": 8, "1024": 4}',
        group="batches",
        parse=parse_thresholds,
    )
    max_batch_size: int | None = option(None, "conversations per batch at most", low=1)
    max_batch_tokens: int | None = option(None, "tokens per batch at most, padding counted", low=1)

    output: str = option(
        MISSING, "Hub repo user/name, or a folder (begins with . / ~ or exists)", group="output"
    )
    private: bool = option(False, "create the Hub repo private")
    upload_every: int = option(
        500, "conversations per shard (part), fixed for a job", low=1, high=2**31 - 1
    )
    upload_size_mb: float | None = option(
        None,
        "about this size per shard instead, in MB: conversations per part are computed once",
        above=0,
        high=1e6,
    )
    cache_dir: str = option(
        ".logit_extraction_cache", "local state: shards under way, pending rows"
    )

    plan: bool = option(
        False, "print rows, tokens, bytes, shards and hours; write nothing", group="run"
    )
    plan_tokens: float | None = option(
        None,
        "plan for so many stored tokens, such as 1e12, of which the dataset is a sample",
        above=0,
        high=1e18,
    )
    plan_rate: float | None = option(
        None, "plan with so many stored tokens a second of one worker, not the probe's", above=0
    )
    resume: bool = option(
        False, "continue; with nothing to continue, start; with --output alone, as recorded there"
    )
    force_restart: bool = option(False, "discard recorded progress and start over")
    max_runtime_minutes: float | None = option(
        None, "stop in time, keep everything, exit 75", above=0
    )
    rank: int | None = option(None, "this worker (default: the launcher's)", low=0)
    world_size: int | None = option(None, "number of workers (default: the launcher's)", low=1)

    executor: str | None = option(
        None,
        "let datatrove run the job as tasks: local, slurm or ray (extra scale)",
        group="executor",
        choices=("local", "slurm", "ray"),
    )
    tasks: int | None = option(
        None, "tasks, each a worker; what is done stays done when given again", low=1
    )
    workers: int | None = option(
        None, "tasks that run at the same time (default: what the machine or cluster holds)", low=1
    )
    executor_options: dict[str, Any] | None = option(
        None,
        'arguments of datatrove\'s executor, JSON: {"partition": "gpu", "time": "24:00:00"}',
        parse=json_object,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_pairs()

    def _check_pairs(self) -> None:
        """Refuse options that need or exclude each other."""
        if self.resume and self.force_restart:
            raise ConfigError("--resume continues and --force-restart discards: give one of them")
        pairs = ("sample_subject", "subject_col"), ("rank", "world_size"), ("executor", "tasks")
        for one, other in pairs:
            if (getattr(self, one) is None) != (getattr(self, other) is None):
                raise ConfigError(f"{flag_of(one)} and {flag_of(other)} need each other: give both")
        if self.rank is not None and self.world_size is not None and self.rank >= self.world_size:
            raise ConfigError(
                f"--rank {self.rank} is not below --world-size {self.world_size}: count from 0"
            )
        selecting = self._given("limit", "sample_subject", "start_offset", "random_sample")
        if self.full_dataset and selecting:
            raise ConfigError(f"--full-dataset takes every row: drop {' and '.join(selecting)}")
        if self.executor is not None:
            for flag in self._given("rank", "plan", "verify_mask", "tensor_parallel"):
                raise ConfigError(f"--executor starts tasks, {flag} is for a single run: drop one")
            if self.force_restart:
                raise ConfigError(
                    "--force-restart would discard rows with every task that is started again: "
                    "empty the output yourself, or give another --output"
                )
        if self.length_col is not None and self.streaming and self.tokenized_dataset is None:
            raise ConfigError(
                "--length-col of the source is read before its rows, which --streaming does not: "
                "leave one of them out, or give --tokenized-dataset"
            )
        written = {"output": self.output} if is_local(self.output) else {}
        refuse_inside(self, **written, cache_dir=self.cache_dir)
        self._check_engine()
        for flag in self._given(*NOT_BESIDE_MIN_P) if self.min_p is not None else ():
            refuse_beside_min_p(flag)

    def _given(self, *names: str) -> list[str]:
        """Return which of some options are not what they are by default."""
        default = {entry.name: entry.default for entry in fields(self)}
        return [flag_of(name) for name in names if getattr(self, name) != default[name]]

    def _check_engine(self) -> None:
        """Refuse what only the other engine understands."""
        if self.engine != "vllm":
            if self.engine_args is not None:
                raise ConfigError("--engine-args are vLLM's: give --engine vllm with them")
            return
        if self.tensor_parallel:
            raise ConfigError(
                "--tensor-parallel is of --engine transformers: give --engine-args "
                "'{\"tensor_parallel_size\": N}' and start one process"
            )
        if self.attn != "auto":
            raise ConfigError(f"--attn {self.attn} is of --engine transformers: drop it")
        for name in sorted(set(self.engine_args or {}) & ENGINE_OWN.keys()):
            raise ConfigError(f"--engine-args {name}: {ENGINE_OWN[name]}")


def refuse_beside_min_p(flag: str) -> NoReturn:
    """Raise ConfigError for an option that says how much a row of the other kind keeps."""
    raise ConfigError(
        f"--min-p alone says what is kept, {flag} has no meaning beside it: drop one of the two"
    )


# --------------------------------------------------------------------------------------------------
# 1 Select
# --------------------------------------------------------------------------------------------------
#
# The selection is the list of conversations in an order that only the source and the options
# decide. Parts are slices of it.

INDEX_LIMIT = 2**31  # the index column is int32
Row = Mapping[str, Any]


@dataclass(frozen=True)
class PartRows:
    """One part of the job as it stands in the source."""

    number: int
    ids: npt.NDArray[np.int64]  # (n,) ids of its conversations, in the order of the selection
    source: Any  # of its rows: map-style, or a list of them
    numbers: npt.NDArray[np.int64] | None = None  # (n,) of its rows in a map-style source

    def read(self, places: Sequence[int]) -> Sequence[Row]:
        """Return source rows by their places among the conversations."""
        if self.numbers is None:
            return [self.source[at] for at in places]
        rows = self.source.__getitems__(self.numbers[np.asarray(places, np.int64)].tolist())
        return cast(Sequence[Row], rows)

    def rows(self) -> list[tuple[int, Row]]:
        """Return id and source row of each conversation."""
        return list(zip(self.ids.tolist(), self.read(range(self.ids.size)), strict=True))


@dataclass(frozen=True)
class Selection:
    """The conversations of a job, in order.

    Attributes:
        source: a map-style dataset, or an iterable one that is streamed.
        columns: where its conversations are.
        numbers, ids: (n,) row number in the source and id of each; None: a stream tells as it goes.
        config: the options of selection and workers.
    """

    source: Any
    columns: ConversationColumns
    config: ExtractionConfig
    numbers: Sequence[int] | npt.NDArray[np.int64] | None = None
    ids: Sequence[int] | npt.NDArray[np.int64] | None = None

    def __len__(self) -> int:
        """Return the conversations of the job; of a stream its limit, which it may not reach."""
        return (self.config.limit or 0) if self.ids is None else len(self.ids)

    def parts(
        self, rows_per_part: int, should_stop: Callable[[], bool] = never
    ) -> Iterator[PartRows]:
        """Yield this worker's parts in order, read when they are asked for.

        Raises:
            StopRequested: `should_stop` said so.
        """
        rank, world_size = self.config.rank or 0, self.config.world_size or 1
        stream = select_stream(self.source, self.columns, self.config, should_stop)
        for number in itertools.count():
            if self.ids is None or self.numbers is None:
                pairs = list(itertools.islice(stream, rows_per_part))
                ids = np.asarray([index for index, _ in pairs], np.int64)
                part = PartRows(number, ids, [row for _, row in pairs])
            else:
                at = slice(number * rows_per_part, (number + 1) * rows_per_part)
                numbers = np.asarray(self.numbers[at], np.int64)
                part = PartRows(number, np.asarray(self.ids[at], np.int64), self.source, numbers)
            stop_if(should_stop)
            if not part.ids.size:
                return
            if number % world_size == rank:
                yield part


def prepare_dataset(
    config: ExtractionConfig, source: Any, columns: ConversationColumns
) -> Selection:
    """Select the conversations of a job: a pure function of the source and the options.

    In source order after --start-offset, or with --random-sample in an order that depends on the
    seed and the ids only; then by the limits of groups and of the job. A higher --limit appends.

    Raises:
        DataError, SourceError: no such column, bad or repeated ids, nothing left.
    """
    names = source_columns(source)
    of_source = [config.subject_col, None if config.tokenized_dataset else config.length_col]
    if absent := [name for name in of_source if name is not None and name not in names]:
        raise DataError(f"no column {absent[0]!r}; there are {', '.join(names)}")
    used = columns.needed() | {config.subject_col, config.length_col}
    if source.column_names is not None:  # what is not decoded costs no time
        source = source.select_columns([name for name in names if name in used])
    if config.streaming:
        return Selection(source, columns, config)
    ids = read_source_ids(source, columns)
    numbers: Sequence[int] | npt.NDArray[np.int64] = range(config.start_offset, len(source))
    if config.random_sample:
        numbers = order_at_random(ids[config.start_offset :], config.seed) + config.start_offset
    if config.sample_subject is not None:
        groups = read_values(source, config.subject_col or "")
        limits = GroupLimits(config.sample_subject)
        if missing := limits.find_missing(groups):
            raise ConfigError(missing)
        kept = (number for number in numbers if limits.take(groups[int(number)]))
        numbers = np.fromiter(itertools.islice(kept, config.limit), np.int64)
    numbers = numbers[: config.limit]
    if not len(numbers):
        raise DataError(
            f"{config.dataset}: none of its {len(source)} rows is selected; "
            "see --start-offset, --limit and --sample-subject"
        )
    of_numbers = isinstance(numbers, range) and isinstance(ids, range)
    chosen = numbers if of_numbers else np.asarray(ids)[np.asarray(numbers)]
    return Selection(source, columns, config, numbers, chosen)


def read_column(source: Any, column: str) -> pa.ChunkedArray:
    """Return a column of a map-style source as its table holds it: JSON is text there."""
    return source.select_columns([column]).with_format("arrow")[:].column(column)


def read_values(source: Any, column: str) -> list[Any]:
    """Return a column of a map-style source as a stream gives it."""
    values: list[Any] = source.select_columns([column])[:][column]
    return values


def read_source_ids(source: Any, columns: ConversationColumns) -> range | npt.NDArray[np.int64]:
    """Return the id of every row of the source: its number, or what the index column holds.

    Raises:
        SourceError: an id is no integer or does not fit int32; names the first.
        DataError: an id occurs twice.
    """
    column = columns.index
    if column is None:
        if len(source) > INDEX_LIMIT:
            raise DataError(f"{len(source)} rows: row numbers above int32 cannot be stored")
        return range(len(source))
    values = read_column(source, column)
    if len(values) and not (pa.types.is_integer(values.type) and values.null_count == 0):
        for number, value in enumerate(read_values(source, column)):
            source_id({column: value}, number, columns)
    ids = values.to_numpy()
    for number in np.flatnonzero((ids < -INDEX_LIMIT) | (ids >= INDEX_LIMIT))[:1].tolist():
        source_id({column: int(ids[number])}, number, columns)
    ascending = np.sort(ids)
    for at in np.flatnonzero(ascending[1:] == ascending[:-1])[:1].tolist():
        raise repeated_id(int(ascending[at]), column)
    return ids.astype(np.int64)


def repeated_id(value: int, column: str) -> DataError:
    """Return the refusal of an id that occurs more than once."""
    return DataError(
        f"--index-col {column}: {value} occurs more than once, ids must be unique; "
        "leave the option out to use row numbers"
    )


def order_at_random(ids: range | npt.NDArray[np.int64], seed: int) -> npt.NDArray[np.int64]:
    """Return the places of ids in the order of a hash of seed and id; ties as they come."""
    return np.argsort(mix_hash(np.asarray(ids, np.int64), seed=seed), kind="stable")


def mix_hash(values: npt.NDArray[np.int64], *, seed: int) -> npt.NDArray[np.uint64]:
    """Map integers to 64 well-mixed bits, the same on every machine: SplitMix64, as the tail's."""
    steps = (torch.tensor(seed) + 1) * SPLITMIX_STEP  # an int64, which wraps
    return mix64_(torch.tensor(values) + steps).numpy().view(np.uint64)


class GroupLimits:
    """Counts conversations by group and says which are still within the limits.

    A group that the limits do not name has that of "*"; without "*" it has none. Null is the empty
    group.
    """

    def __init__(self, limits: Mapping[str, int]) -> None:
        self.limits = limits
        self.counts: Counter[str] = Counter()

    def take(self, value: Any) -> bool:
        """Count one row of the group; False when its group is full."""
        group = self.name_of(value)
        limit = self.limits.get(group, self.limits.get("*"))
        self.counts[group] += 1
        return limit is None or self.counts[group] <= limit

    @staticmethod
    def name_of(value: Any) -> str:
        return "" if value is None else str(value)

    def find_missing(self, groups: Iterable[Any]) -> str:
        """Say which limit is of a group that no row is of: a misspelt one would do nothing."""
        there = sorted(set(map(self.name_of, groups)))
        names = ", ".join(map(repr, there[:10])) + (", …" if len(there) > 10 else "")
        missing = sorted(self.limits.keys() - {"*", *there})
        why = "no row is of the group"
        return f"--sample-subject: {why} {missing[0]!r}; there are {names}" if missing else ""


def select_stream(
    source: Any,
    columns: ConversationColumns,
    config: ExtractionConfig,
    should_stop: Callable[[], bool],
) -> Iterator[tuple[int, Row]]:
    """Yield (id, row) of the selected rows of a stream: those that `prepare_dataset` selects.

    In source order one row is in memory, and four bytes of each id of an index column. At random
    the stream is read twice and the chosen rows wait in a temporary file.
    """

    def rows() -> Iterator[tuple[int, Row]]:
        seen = IdSet()
        for number, row in enumerate(source):
            stop_if(should_stop)  # passing over rows may take hours
            index = source_id(row, number, columns)
            if columns.index is not None and not seen.add(index):
                raise repeated_id(index, columns.index)
            if number >= config.start_offset:
                yield index, row

    if config.random_sample:
        return shuffle_stream(rows, config)
    limits = GroupLimits(config.sample_subject or {})

    def within() -> Iterator[tuple[int, Row]]:
        yield from (p for p in rows() if limits.take(p[1].get(config.subject_col or "")))
        if missing := limits.find_missing(limits.counts):  # known when all is extracted
            logger.warning(missing)

    return itertools.islice(within(), config.limit)


def shuffle_stream(
    rows: Callable[[], Iterator[tuple[int, Row]]], config: ExtractionConfig
) -> Iterator[tuple[int, Row]]:
    """Yield the rows of a stream at random: one pass for the ids, one for the rows needed."""
    ids, groups, limits = array("q"), [], GroupLimits(config.sample_subject or {})
    for index, row in rows():
        ids.append(index)
        if config.sample_subject is not None:
            groups.append(row.get(config.subject_col or ""))
    order = order_at_random(np.frombuffer(ids, np.int64), config.seed)
    if groups:
        if missing := limits.find_missing(groups):
            raise ConfigError(missing)
        order = np.asarray([at for at in order.tolist() if limits.take(groups[at])], np.int64)
    order = order[: config.limit]
    wanted = np.sort(order)
    starts = np.zeros(order.size, np.int64)
    with storage_errors(tempfile.gettempdir()), tempfile.TemporaryFile() as file:  # our own pickles
        chosen = iter(wanted.tolist())
        following, found = next(chosen, None), 0
        for at, pair in enumerate(rows()):
            if at == following and pair[0] == ids[at]:
                starts[found], found = file.tell(), found + 1
                pickle.dump(pair, file, pickle.HIGHEST_PROTOCOL)
                following = next(chosen, None)
        if found < order.size:
            raise DataError(
                f"{config.dataset} gave other rows when it was read again: it has changed; begin "
                "again, or leave out --streaming"
            )
        for place in np.searchsorted(wanted, order).tolist():
            file.seek(int(starts[place]))
            yield pickle.load(file)


class IdSet:
    """A set of int32 ids in four bytes each, however they are spread."""

    RECENT = 2**16  # ids held in a hash set before they are merged

    def __init__(self) -> None:
        self.recent: set[int] = set()
        self.merged = np.zeros(0, np.int32)  # ascending

    def add(self, value: int) -> bool:
        """Add an id; False when it was there already."""
        at = int(np.searchsorted(self.merged, value))
        if value in self.recent or (at < self.merged.size and int(self.merged[at]) == value):
            return False
        self.recent.add(value)
        if len(self.recent) == self.RECENT:
            new = np.fromiter(self.recent, np.int32, self.RECENT)
            self.merged = np.sort(np.concatenate([self.merged, new]), kind="stable")
            self.recent.clear()
        return True


@dataclass(frozen=True)
class KnownLengths:
    """Lengths computed before, by conversation."""

    name: str
    index: npt.NDArray[np.int64]  # ascending
    length: npt.NDArray[np.int64]  # tokens of the rendered conversation; 0: cannot be used
    num_tokens: npt.NDArray[np.int64] | None = None  # tokens to extract

    def places(self, ids: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Return where conversations are.

        Raises:
            DataError: one is missing.
        """
        places = np.minimum(np.searchsorted(self.index, ids), max(0, self.index.size - 1))
        missing = self.index[places] != ids if self.index.size else np.ones(ids.size, bool)
        if missing.any():
            raise DataError(
                f"{self.name} lacks {int(missing.sum())} of {ids.size} conversations, such as "
                f"index {int(ids[missing][0])}: run compute_lengths.py on the whole dataset, or "
                "leave the option out"
            )
        return places

    def check(self, index: int, length: int) -> None:
        """Raise DataError when a conversation turns out to have another length."""
        known = int(self.length[self.places(np.asarray([index]))][0])
        if known != length and self.name != "--length-col":  # nobody knows what a column counts
            raise DataError(
                f"{self.name} says {known} tokens for index {index}, there are {length}: "
                "run compute_lengths.py again, or leave the option out"
            )


def find_lengths(
    config: ExtractionConfig,
    settings: Mapping[str, Any],
    selection: Selection,
    measured: Lengths | None = None,
) -> KnownLengths | None:
    """Return the lengths that the options give: `measured`, else of a column of the source.

    Raises:
        DataError: it was measured for another job, or a length column holds no lengths.
    """
    if measured is not None:
        name = f"--tokenized-dataset {config.tokenized_dataset}"
        wanted = {key: settings.get(key) for key in measured.settings}
        if differences := list_differences(measured.settings, wanted):
            raise DataError(
                f"{name} was measured for another job: {'; '.join(differences)}; run "
                "compute_lengths.py for this one, or leave the option out"
            )
        order = np.argsort(measured.index)
        stored = None if measured.num_tokens is None else measured.num_tokens[order]
        return KnownLengths(name, measured.index[order], measured.length[order], stored)
    if config.length_col is None or selection.ids is None:
        return None
    values = read_column(selection.source, config.length_col)
    if not pa.types.is_integer(values.type) or values.null_count:
        raise DataError(f"--length-col {config.length_col}: holds {values.type} or nulls")
    lengths = values.to_numpy().astype(np.int64)[np.asarray(selection.numbers)]
    for at in np.flatnonzero(lengths < 1)[:1].tolist():
        raise DataError(
            f"--length-col {config.length_col}: index {selection.ids[at]} holds {lengths[at]}, "
            "lengths start at 1; leave the option out to have them measured"
        )
    order = np.argsort(np.asarray(selection.ids))
    return KnownLengths("--length-col", np.asarray(selection.ids)[order], lengths[order])


def list_differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    """Say where two records of settings make different jobs."""
    names = differing_settings(there, here)
    return [f"{name}: {there.get(name)!r} there, {here.get(name)!r} now" for name in names]


# --------------------------------------------------------------------------------------------------
# 2 Read
# --------------------------------------------------------------------------------------------------

WINDOW_ROWS = 4096  # conversations that are sorted by length together, in whole parts
WINDOW_TOKENS = 2_000_000  # or so many tokens: their rows wait in about 1 GB until parts are whole
CHUNK_ROWS = 64  # conversations that a worker process encodes at a time
MOST_WORKERS = 16  # processes that tokenize, each about 100,000 tokens a second
STUCK_S = 1800  # without a chunk of theirs; a chunk takes a second, and a minute at its worst


@dataclass(frozen=True)
class EncodedRow:
    """One conversation as the teacher sees it."""

    index: int
    input_ids: npt.NDArray[np.int32]  # (S,)
    token_positions: npt.NDArray[np.int32]  # (N,) ascending, each >= 1: the tokens to predict
    notes: tuple[str, ...] = ()  # what the template was given and does not show


@dataclass(frozen=True)
class SkippedRow:
    """One conversation that gives no row, with the reason that it is counted under."""

    index: int
    reason: str
    detail: str = ""


@dataclass(frozen=True)
class RowEncoder:
    """Turns a source row into token ids and the positions to extract; the same in every process."""

    conversation: ConversationEncoder
    max_seq_len: int | None = None  # tokens
    unknown: frozenset[int] = frozenset()  # ids of added tokens that the model has no row for

    def encode(self, row: Row, index: int) -> EncodedRow | SkippedRow:
        """Render, tokenize and align one conversation; one that cannot be used says why."""
        try:
            encoded = self.conversation.encode(row, max_tokens=self.max_seq_len)
        except ConversationError as error:
            return SkippedRow(index, error.reason, str(error))
        size, highest = encoded.input_ids.size, int(encoded.input_ids.max(initial=0))
        if self.max_seq_len is not None and size > self.max_seq_len:
            why = f"{size} tokens, --max-seq-len is {self.max_seq_len}"
            return SkippedRow(index, "too_long", why)
        if highest > MAX_TOKEN_ID:
            why = f"token id {highest}, the format ends at {MAX_TOKEN_ID}"
            return SkippedRow(index, "id_too_large", why)
        if highest in self.unknown:
            why = f"the model has no row for token id {highest}, which the tokenizer adds"
            return SkippedRow(index, "id_too_large", why)
        return EncodedRow(index, encoded.input_ids, encoded.token_positions, encoded.notes)

    def encode_all(
        self, rows: Sequence[tuple[int, Row | SkippedRow]]
    ) -> list[EncodedRow | SkippedRow]:
        """Encode rows with their ids; what is skipped already stays so."""
        return [
            row if isinstance(row, SkippedRow) else self.encode(row, index) for index, row in rows
        ]


@dataclass
class Window:
    """Whole parts that are sorted into batches together: what is left to do of them."""

    rows: list[EncodedRow] = field(default_factory=list)
    skipped: list[SkippedRow] = field(default_factory=list)
    tokens: int = 0

    def add(self, rows: Iterable[EncodedRow | SkippedRow], lengths: KnownLengths | None) -> None:
        """Take in what became of some conversations, unless they are not of the lengths known."""
        for row in rows:
            if isinstance(row, SkippedRow):
                self.skipped.append(row)
                continue
            for note in row.notes:
                warn_once(note)
            self.rows.append(row)
            self.tokens += row.input_ids.size
            if lengths is not None:
                lengths.check(row.index, row.input_ids.size)


class ConversationDataset:
    """The windows of a job: its parts that are not done, read in order and encoded ahead.

    Each conversation is tokenized once, in worker processes where there are enough of them. One
    path for map-style sources and streams; memory holds a window and what is encoded ahead of it.

    Args:
        selection: from `prepare_dataset`.
        encoder: of the conversations.
        rows_per_part: E.
        begin_part: called with number and ids of each part when it is read; returns the ids that
            are still to be extracted. By default all are.
        lengths: known before; what is too long by them is not tokenized.
        should_stop: asked between rows; raises StopRequested out of the iteration.
    """

    def __init__(
        self,
        selection: Selection,
        encoder: RowEncoder,
        *,
        rows_per_part: int,
        begin_part: Callable[[int, npt.NDArray[np.int64]], Sequence[int]] = lambda _, ids: (
            ids.tolist()
        ),
        lengths: KnownLengths | None = None,
        should_stop: Callable[[], bool] = never,
    ) -> None:
        self.selection = selection
        self.encoder = encoder
        self.rows_per_part = rows_per_part
        self.begin_part = begin_part
        self.lengths = lengths
        self.should_stop = should_stop

    def __iter__(self) -> Iterator[Window]:
        ends: deque[bool] = deque()  # of each chunk under way: whether it ends its part
        chunks = self._chunks(ends)
        first = next(chunks, None)
        if first is None:  # all is done: no process is started
            return
        encoded = run_ahead(  # in a group: `should_stop` and `begin_part` are asked in one order
            self.encoder.encode_all,
            itertools.chain([first], chunks),
            processes=agree(worker_processes(len(self.selection) or WINDOW_ROWS)),
            ahead=2 * WINDOW_ROWS // CHUNK_ROWS,
            should_stop=self.should_stop,
        )
        window = Window()
        for rows in encoded:
            window.add(rows, self.lengths)
            held = max(len(window.rows), len(window.skipped))
            if ends.popleft() and (held >= WINDOW_ROWS or window.tokens >= WINDOW_TOKENS):
                yield window
                window = Window()
        if window.rows or window.skipped:
            yield window

    def _chunks(self, ends: deque[bool]) -> Iterator[list[tuple[int, Row | SkippedRow]]]:
        """Read what is left of each part in chunks, and note which of them end a part."""
        for part in self.selection.parts(self.rows_per_part, self.should_stop):
            left = set(self.begin_part(part.number, part.ids))
            places = [at for at, index in enumerate(part.ids.tolist()) if index in left]
            for start in range(0, len(places), CHUNK_ROWS):
                chunk = places[start : start + CHUNK_ROWS]
                ends.append(start + CHUNK_ROWS >= len(places))
                yield list(zip(part.ids[chunk].tolist(), self._read(part, chunk), strict=True))

    def _read(self, part: PartRows, places: list[int]) -> list[Row | SkippedRow]:
        """Read rows, but those that are too long by the lengths known before."""
        limit = self.encoder.max_seq_len
        if self.lengths is None or limit is None:
            return list(part.read(places))
        ids = part.ids[places]
        lengths = self.lengths.length[self.lengths.places(ids)]
        rows: list[Row | SkippedRow] = [
            SkippedRow(int(index), "too_long", f"{length} tokens, --max-seq-len is {limit}")
            for index, length in zip(ids, lengths.tolist(), strict=True)
        ]
        short = np.flatnonzero(lengths <= limit).tolist()
        for at, row in zip(short, part.read([places[at] for at in short]), strict=True):
            rows[at] = row
        return rows


class WorkerTask:
    """What a worker process of a `DataLoader` makes of each batch that its sampler hands over.

    A refusal is returned, not raised: torch would put the worker's traceback into its message.
    """

    def __init__(self, make: Callable[[Any], Any]) -> None:
        self.make = make

    def __getitems__(self, items: Any) -> Any:
        if isinstance(items, Exception):
            return items
        try:
            return self.make(items)
        except LogitsError as error:
            return error


def run_ahead(
    make: Callable[[Any], Any],
    batches: Iterable[Any],
    *,
    processes: int,
    ahead: int = 1,
    should_stop: Callable[[], bool] = never,
) -> Iterator[Any]:
    """Yield `make(batch)` of every batch, in order, made ahead in worker processes (0: in this).

    `batches` is read in this process, about `ahead` of them before they are needed.

    Raises:
        LogitsError, StopRequested: what `make` or `batches` raised, after all that came before, or
            `should_stop` said so.
        RuntimeError: a worker process was killed, or none gives anything (`explain_want`).
    """
    if not processes:
        for batch in batches:
            stop_if(should_stop)
            yield make(batch)
        return
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # threads would only warn at a fork
    loader: Any = torch.utils.data.DataLoader(
        cast(Any, WorkerTask(make)),
        batch_sampler=cast(Any, end_with_error(batches)),
        collate_fn=pass_through,
        num_workers=processes,
        prefetch_factor=max(2, -(-ahead // processes)),
        worker_init_fn=leave_signals_to_parent,
        timeout=STUCK_S,
        # A fork server would stand between worker and run, and die of a signal to the group.
        multiprocessing_context="fork" if sys.platform == "linux" else None,
    )
    others, failure = {*multiprocessing.active_children()}, ""
    results = iter(loader)
    try:
        for made in results:
            if isinstance(made, Exception):
                raise made
            stop_if(should_stop)
            yield made
    except RuntimeError as error:
        if "DataLoader" not in str(error):
            raise
        failure = str(error)  # without the traceback, which holds on to the workers
    finally:  # the last reference: the workers end now, not when a traceback is collected
        del loader, results
        for stuck in {*multiprocessing.active_children()} - others:
            stuck.kill()  # the end of this process would wait for it
            stuck.join()
    if failure:
        raise RuntimeError(failure)


def end_with_error(batches: Iterable[Any]) -> Iterator[Any]:
    """Yield batches and, where reading them is refused, the refusal as the last one.

    An error that leaves a sampler would tear down the workers before their rows have come.
    """
    try:
        yield from batches
    except (LogitsError, StopRequested) as error:
        yield error


def pass_through(made: Any) -> Any:
    """Return what was made as it is: the collate function of `run_ahead`."""
    return made


def leave_signals_to_parent(_: int) -> None:
    """Make a worker outlive the signals that its whole group gets: the run still needs its rows.

    Ctrl-C on a terminal, its loss and the SIGTERM of a batch system reach every process of a group.
    A worker ends when its parent ends it or is gone.
    """
    for number in filter(None, (signal.SIGINT, HANG_UP)):
        signal.signal(number, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # not on macOS, where a SIGTERM to the group ends the run
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=wait_for_end, daemon=True).start()


def wait_for_end() -> None:
    """End this process at a SIGTERM from the run that started it, and at no other."""
    parent = multiprocessing.parent_process()
    while parent and signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent.pid:
        pass
    os._exit(0)


def worker_processes(rows: int) -> int:
    """Return how many processes are worth starting for that many rows; 0 is this one."""
    if rows < 512:
        return 0
    return max(1, min(MOST_WORKERS, count_processors() * 3 // 4))


# --------------------------------------------------------------------------------------------------
# 3 Batches
# --------------------------------------------------------------------------------------------------

# On CUDA a probe begins there. A CPU runs batches of 1,024 tokens as fast as larger ones, and then
# its bar moves and a signal is answered within seconds.
DEFAULT_BATCH_TOKENS = {"cuda": 16384, "mps": 8192, "cpu": 1024}
MOST_BATCH_TOKENS = 131_072
LONG_BATCH_S = 2.0  # a batch that takes this long hides every launch; a longer one delays a stop
PROBE_HEADROOM_BYTES = 2**30  # kept free in the probe: results on their way, fragmentation
DEFAULT_BATCH_SIZE = 256
MOST_PADDING = 0.015  # of a batch; where few conversations are alike, batches get smaller
PADDED_ANYWAY_TOKENS = 8192  # down to this size, which keeps a device busy


@dataclass(frozen=True)
class Batch:
    """The conversations that go through the teacher together; tokens in row order, flattened."""

    rows: list[EncodedRow]

    @property
    def padded_tokens(self) -> int:
        """Tokens that the teacher computes, padding counted."""
        return len(self.rows) * max(row.input_ids.size for row in self.rows)

    def halves(self) -> tuple[Batch, Batch]:
        """Split the batch for a device that cannot hold it whole."""
        middle = len(self.rows) // 2
        return Batch(self.rows[:middle]), Batch(self.rows[middle:])


class TokenBudgetBatchSampler:
    """Batches of conversations of like length, longest first, as many as the limits allow.

    Under a budget of tokens a batch is closed early, but not below 8,192 tokens, where more than
    1.5% of it would be padding: a large budget for few conversations mixes long and short ones.

    Args:
        lengths: (n,) tokens of each conversation.
        max_batch_tokens: conversations times longest length at most; a single longer conversation
            still makes a batch of its own.
        max_batch_size: conversations at most.
        thresholds: length up to which a number of conversations goes into a batch; above the
            largest length, one.
    """

    def __init__(
        self,
        lengths: npt.ArrayLike,
        *,
        max_batch_tokens: int | None = None,
        max_batch_size: int | None = None,
        thresholds: Mapping[int, int] | None = None,
    ) -> None:
        self.lengths = np.asarray(lengths, np.int64)
        self.max_batch_tokens = max_batch_tokens
        self.max_batch_size = max_batch_size
        self.thresholds = sorted((int(k), int(n)) for k, n in (thresholds or {}).items())
        self.batches = list(self._plan())

    def _plan(self) -> Iterator[list[int]]:
        order = np.argsort(-self.lengths, kind="stable")
        sums = np.concatenate(([0], np.cumsum(self.lengths[order])))
        start = 0
        while start < order.size:
            size = self._size_at(int(self.lengths[order[start]]))
            if self.max_batch_tokens is not None and not self.thresholds:
                size = self._without_padding(sums[start : start + size + 1])
            yield order[start : start + size].tolist()
            start += size

    def _without_padding(self, sums: npt.NDArray[np.int64]) -> int:
        """Return how many of the next conversations, of these running sums, go together."""
        padded = (sums[1] - sums[0]) * np.arange(1, sums.size)
        real = sums[1:] - sums[0]
        fits = (padded <= PADDED_ANYWAY_TOKENS) | (padded - real <= MOST_PADDING * padded)
        return max(1, int(fits.sum()))

    def _size_at(self, length: int) -> int:
        """Return how many conversations of at most `length` tokens go into one batch."""
        limits = [self.max_batch_size or DEFAULT_BATCH_SIZE]
        if self.max_batch_tokens is not None:
            limits.append(self.max_batch_tokens // max(1, length))
        if self.thresholds:
            limits.append(next((n for top, n in self.thresholds if length <= top), 1))
        return max(1, min(limits))

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self.batches)


def token_budget_batches(
    config: ExtractionConfig, rows: Sequence[EncodedRow], max_batch_tokens: int
) -> Iterator[Batch]:
    """Yield a window's batches under the options, or else under a budget of tokens."""
    default = None if config.batch_thresholds else max_batch_tokens
    sampler = TokenBudgetBatchSampler(
        [row.input_ids.size for row in rows],
        max_batch_tokens=config.max_batch_tokens or default,
        max_batch_size=config.max_batch_size,
        thresholds=config.batch_thresholds,
    )
    return (Batch([rows[at] for at in batch]) for batch in sampler)


def find_batch_tokens(
    run_batch: Callable[[Batch], Any], *, length: int, vocab_size: int, start: int
) -> int:
    """Return the padded tokens that the device holds in a batch of the longest conversations.

    Doubled from `start` while memory allows and a batch takes less than two seconds, or halved
    until one fits. Powers of two, so that a resumed run on a like device forms the same batches.

    Args:
        run_batch: runs a batch to its end; out of memory, it raises `torch.OutOfMemoryError`.
        length: tokens of the longest conversation.
    """

    def seconds_at(budget: int) -> float:
        batch = longest_batch(max(1, budget // length), length, vocab_size)
        started = time.monotonic()
        with contextlib.suppress(torch.OutOfMemoryError):
            run_batch(batch)
            return time.monotonic() - started
        return math.inf

    budget = start
    while math.isinf(seconds_at(budget)):  # the first one that fits also pays what is paid once
        if budget <= length:
            return budget
        budget //= 2
    if budget < start:  # twice as many did not fit
        return budget
    spent = seconds_at(budget)
    while spent < LONG_BATCH_S and budget < MOST_BATCH_TOKENS:
        spent = seconds_at(2 * budget)
        if math.isinf(spent):
            return budget
        budget *= 2
    return budget


def longest_batch(rows: int, length: int, vocab_size: int) -> Batch:
    """Return a batch of arbitrary conversations of one length, all tokens of them wanted."""
    ids = np.random.default_rng(0).integers(0, vocab_size, (rows, max(2, length)), np.int32)
    wanted = np.arange(1, ids.shape[1], dtype=np.int32)
    return Batch([EncodedRow(number, row, wanted) for number, row in enumerate(ids)])


# --------------------------------------------------------------------------------------------------
# 4 Teacher
# --------------------------------------------------------------------------------------------------

HEAD_CHUNK_BYTES = 256 * 2**20  # float32 logits of one chunk
CUDA_CHUNKS = 3  # such chunks at once on CUDA, where 300 launches a chunk cost more than its memory
CAST_ROWS = 16_384  # vocabulary rows cast to float32 at a time where no kernel accumulates into it
PROBE_TOKENS, PROBE_SHORT = 11, 4  # lengths of the probe's rows
PROBE_CUTS = (7, 10)  # from here on tokens change; blocks of one size end at one of them at most
# Disagreement, in units of the spread of a position's logits, that is still rounding: the largest
# position's in float32, the median's in low precision, where a flipped choice of experts throws
# single positions off. Seen: 2e-6, and 0.05 in bfloat16 at 48 layers; a wrong layout: 0.3 to 2.
ROUNDING = {"float32": 1e-3, "float16": 0.02, "bfloat16": 0.1}
# What later tokens may change where a row is rounded alike whatever its neighbours are. Seen: 0,
# in Qwen3-Next 2e-7, as float32 experts change their groups.
FORESIGHT = 1e-5
WEIGHT_FILES = (  # as transformers looks for them
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
# What older checkpoints hold and newer models compute: not weights.
CONSTANT = re.compile(
    r"(inv_freq|masked_bias|position_ids|causal_mask|(cos|sin)_cached|\.version)$"
)
EMBEDDING = re.compile(r"\b(embed_tokens|lm_head)(\.base_layer)?\.weight$")  # as peft knows them
LOADING_FAULTS = (  # what transformers and safetensors raise over a model that they cannot load
    OSError, ValueError, ImportError, RuntimeError, AttributeError, TypeError, LookupError,
    AssertionError,
)  # fmt: skip
GROUP_PATIENCE = timedelta(days=1)  # how long processes of a group wait for one another


def load_teacher(config: ExtractionConfig, *, vocab_size: int | None = None) -> Teacher:
    """Load the model of `config`, prove that it is one to store, and say in the log how it runs.

    Args:
        config: `model`, `revision`, `trust_remote_code`, `device`, `dtype`, `attn`,
            `tensor_parallel` and `max_seq_len` are read.
        vocab_size: the tokenizer's highest id + 1; rows of the model beyond it are padding.

    Raises:
        TeacherError: there is no such model, or its logits are not to be had as asked or not to be
            stored; one line with the remedy.
    """
    device = resolve_device(config.device)
    model_config = load_model_config(config)
    try:
        teacher = make_teacher(config, model_config, device, vocab_size)
    except torch.OutOfMemoryError as error:
        raise TeacherError(
            f"--model {config.model} leaves no room on {device} for even one short conversation; "
            "use a larger GPU or --dtype bfloat16"
        ) from error
    except TeacherError as error:
        if f"{error}".startswith("--model"):
            raise
        raise TeacherError(f"--model {config.model}: {error}") from error
    runs = [teacher.numerics[name] for name in ("weights", "attention", "head", "head_dtype")]
    text = "teacher %s on %s in %s, attention %s, head %s in %s; %s: %s"
    layout = (teacher.layout, teacher.layout_reason)
    logger.info(text, config.model, teacher.device, *runs, *layout)
    return teacher


def make_teacher(
    config: ExtractionConfig, model_config: Any, device: torch.device, vocab_size: int | None
) -> Teacher:
    """Return the teacher by the engine that is asked for."""
    if config.engine == "vllm":
        head = load_head(config, model_config, device)
        return VllmTeacher(
            head, engine_arguments(config, model_config, head), vocab_size=vocab_size
        )
    model = load_model(config, model_config, device)
    return Teacher(model, vocab_size=vocab_size, forced_attention=config.attn != "auto")


def resolve_device(name: str) -> torch.device:
    """Return the device called `name`; auto is this process's GPU, else mps, else cpu.

    Raises:
        TeacherError: the device is not a device or is not there.
    """
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    mps = torch.backends.mps.is_available()
    if name == "auto":
        name = "cuda" if gpus else "mps" if mps else "cpu"
    if name == "cuda" and gpus:
        name = f"cuda:{int(os.environ.get('LOCAL_RANK', '0')) % gpus}"
    there = ["cpu", *(["mps"] if mps else []), *(f"cuda:{n}" for n in range(gpus))]
    if name not in there:
        raise TeacherError(f"--device {name}: not on this machine; there is {', '.join(there)}")
    return torch.device(name)


def locate_model(config: ExtractionConfig) -> tuple[dict[str, Any], str | None]:
    """Return where the weights are, as keywords of `from_pretrained`, and the adapter upon them.

    Raises:
        TeacherError: it is a folder that is not there, GGUF, or an adapter without `peft`.
    """
    source, revision, adapter = config.model, config.revision or "main", None
    path = local_path(source)
    local = is_local(source)
    whole = any((path / name).exists() for name in WEIGHT_FILES)
    if source.endswith(".gguf") or (local and not whole and any(path.glob("*.gguf"))):
        raise TeacherError(
            f"--model {source} is GGUF, which is not read: give the checkpoint that it was made "
            "from, or convert it by AutoModelForCausalLM.from_pretrained(folder, gguf_file=name)"
            ".save_pretrained(other) of transformers, and the same with its AutoTokenizer"
        )
    if local and not path.is_dir():
        why = "is a file: give the folder of it" if path.exists() else "no such folder"
        raise TeacherError(f"--model {source}: {why}")
    source = find_folder(source, revision)
    with loading_errors(config):
        if file := find_file(source, "adapter_config.json", revision):
            if whole or not (local or find_file(source, "config.json", revision) is None):
                raise TeacherError(
                    f"--model {config.model} has an adapter beside a whole model: give a folder "
                    "without adapter_config.json, or one with the adapter alone"
                )
            adapter, (base, revision) = source, read_base(file)
            if is_local(base) and not local_path(base).is_dir():
                raise TeacherError(
                    f"--model {config.model} is an adapter of {base}: no such folder from here; "
                    "give its full path in adapter_config.json"
                )
            source = find_folder(base, revision)
    if adapter is not None and importlib.util.find_spec("peft") is None:
        raise TeacherError(
            f"--model {config.model} is an adapter of {source}: pip install peft, or give a folder "
            "with the merged weights (merge_and_unload of peft)"
        )
    options = {"pretrained_model_name_or_path": source, "revision": revision}
    return {**options, "trust_remote_code": config.trust_remote_code}, adapter


def read_base(file: str) -> tuple[str, str]:
    """Return name and revision of the model that an adapter is of, by its adapter_config.json."""
    described = json.loads(Path(file).read_text(encoding="utf-8"))
    return str(described.get("base_model_name_or_path")), described.get("revision") or "main"


def find_base_revision(config: ExtractionConfig, adapter: str) -> str | None:
    """Return the commit of the model that an adapter is of, or the digest of its files."""
    file = find_file(adapter, "adapter_config.json", config.revision)
    base, revision = read_base(str(file))
    return source_revision(base) if is_local(base) else find_commit(base, revision, kind="model")


def find_folder(model: str, revision: str) -> str:
    """Return the folder of a model that is here, or in the Hub's cache where the Hub is away.

    Raises:
        TeacherError: the Hub is out of reach, and its cache does not hold the model.
    """
    if is_local(model):
        return str(local_path(model))
    if hub_answers(model):
        return model
    from huggingface_hub import try_to_load_from_cache

    for name in ("config.json", "adapter_config.json"):
        if isinstance(file := try_to_load_from_cache(model, name, revision=revision), str):
            return str(Path(file).parent)
    why = "the Hub is out of reach and no such model is in its cache here"
    raise TeacherError(f"--model {model} cannot be loaded: {why}")


def tokenizer_source(
    config: ExtractionConfig, options: Mapping[str, Any], adapter: str | None
) -> tuple[str, str | None]:
    """Return model and revision that the tokenizer is of: an adapter may leave it to its base.

    Args:
        options, adapter: of `locate_model`.
    """
    if adapter is None or find_file(adapter, "tokenizer_config.json", config.revision):
        return config.model, config.revision
    return options["pretrained_model_name_or_path"], options["revision"]


def find_file(source: str, name: str, revision: str | None) -> str | None:
    """Return the path of a model's file in its folder or in the Hub's cache, None without one."""
    from transformers.utils import cached_file

    quiet = ("missing_entries", "gated_repo", "connection_errors")
    options: Any = {f"_raise_exceptions_for_{name}": False for name in quiet}
    path: str | None = cached_file(source, name, revision=revision, **options)
    return path


def load_model_config(config: ExtractionConfig) -> Any:
    """Return the model's configuration, of its base where it is an adapter, without its weights.

    Whatever the configuration tells of a teacher that cannot run is refused here.

    Raises:
        TeacherError: there is no such model, or it cannot be a teacher.
    """
    from transformers import AutoConfig
    from transformers.quantizers import AutoHfQuantizer

    options, adapter = locate_model(config)
    with loading_errors(config):
        found = AutoConfig.from_pretrained(**options)
        choose_class(config, found)
        if adapter is not None:
            add_rows(config, found.get_text_config(), adapter)
        quantization = quantization_of(found)
        if quantization is not None and config.engine == "transformers":
            quantizer = AutoHfQuantizer.from_config(copy.deepcopy(quantization), pre_quantized=True)
            quantizer.validate_environment(device_map=None, weights_only=True)
    limit = max_positions(found)
    if limit is not None and config.max_seq_len is not None and config.max_seq_len > limit:
        raise TeacherError(
            f"--max-seq-len {config.max_seq_len} is beyond the {limit} positions of "
            f"{config.model}; give at most {limit}"
        )
    if config.engine == "vllm":
        check_vllm(config, found)
    return found


def add_rows(config: ExtractionConfig, text_config: Any, adapter: str) -> None:
    """Let the configuration of a base have as many tokens as an adapter that brings its own."""
    stored = read_headers({"pretrained_model_name_or_path": adapter, "revision": config.revision})
    rows = [shape[0] for name, (_, shape, _) in stored.items() if EMBEDDING.search(name)]
    if rows and rows[0] != text_config.vocab_size:
        if len(rows) == 1 and not text_config.tie_word_embeddings:
            raise TeacherError(
                f"--model {config.model} is an adapter of {rows[0]} tokens, its base has "
                f"{text_config.vocab_size}, and it lacks either embedding or head of those added; "
                "give a whole model"
            )
        text_config.vocab_size = rows[0]


def choose_class(config: ExtractionConfig, model_config: Any) -> Any:
    """Return the class of transformers by which the model reads text and writes text."""
    import transformers

    own = (getattr(model_config, "auto_map", None) or {}) if config.trust_remote_code else {}
    if not getattr(model_config, "is_encoder_decoder", False):
        for name in ("CausalLM", "ImageTextToText", "MultimodalLM"):
            choice: Any = getattr(transformers, f"AutoModelFor{name}")
            if choice.__name__ in own or type(model_config) in choice._model_mapping:
                return choice
    raise TeacherError(
        f"--model {config.model} is a {model_config.model_type}: transformers "
        f"{transformers.__version__} has no causal language model of that kind; give one that "
        "continues text"
    )


def quantization_of(model_config: Any) -> Any:
    """Return the quantization that transformers will apply, None where it knows none."""
    from transformers.quantizers import AutoHfQuantizer

    parts = (model_config, model_config.get_text_config())
    found = next((q for part in parts if (q := getattr(part, "quantization_config", None))), None)
    return found if found and AutoHfQuantizer.supports_quant_method(found) else None


def resolve_dtype(config: ExtractionConfig, model_config: Any) -> str:
    """Return the name of the dtype that the weights will have; "auto" when only they know."""
    if config.dtype != "auto":
        return config.dtype
    if resolve_device(config.device).type == "cpu" and quantization_of(model_config) is None:
        return "float32"
    named = getattr(model_config, "dtype", None) or model_config.get_text_config().dtype
    return str(named or "auto").removeprefix("torch.")


def resolve_attention(config: ExtractionConfig, dtype: str, device: torch.device) -> str | None:
    """Return the attention to ask for; auto is FlashAttention where it is installed and can run.

    None leaves it to transformers: sdpa where the family has it, else eager.
    """
    from transformers.utils import is_flash_attn_2_available

    if config.attn != "auto":
        return config.attn
    low = dtype in ("float16", "bfloat16") and device.type == "cuda"
    return "flash_attention_2" if low and is_flash_attn_2_available() else None


def load_model(config: ExtractionConfig, model_config: Any, device: torch.device) -> Any:
    """Return the language model on `device`, every weight as the checkpoint has it.

    Raises:
        TeacherError: it cannot be found or loaded as asked, or not all of the checkpoint is used.
    """
    options, adapter = locate_model(config)
    dtype = resolve_dtype(config, model_config)
    attention = resolve_attention(config, dtype, device)
    auto = choose_class(config, model_config)
    load = functools.partial(auto.from_pretrained, **options, dtype=dtype, output_loading_info=True)
    with loading_errors(config):
        try:
            model, info = place_weights(config, device, load, attn_implementation=attention)
        except (ValueError, ImportError):
            if config.attn != "auto" or attention is None:
                raise
            model, info = place_weights(config, device, load)  # the family has no such attention
        stored = read_headers(options)
        check_weights(model, info, quantization=quantization_of(model_config), stored=stored)
        check_precision(stored, quantization_of(model_config))
        check_head(model, stored)
        if adapter is None:
            return model
        rows = model_config.get_text_config().vocab_size
        if rows != model.config.get_text_config().vocab_size:
            model.resize_token_embeddings(rows, mean_resizing=False)
        return merge_adapter(model, adapter, config.revision)


def place_weights(
    config: ExtractionConfig, device: torch.device, load: Callable[..., Any], **options: Any
) -> tuple[Any, dict[str, Any]]:
    """Return the model on `device`, or over all GPUs when one is too small, and what was loaded."""
    from transformers.utils import is_accelerate_available

    if config.tensor_parallel:
        from transformers.distributed import DistributedConfig

        model, info = load(distributed_config=DistributedConfig(tp_plan="auto"), **options)
        return model, info
    if device.type == "cpu" or not is_accelerate_available():
        model, info = load(**options)
        return model.to(device), info
    alone = (config.world_size or int(os.environ.get("WORLD_SIZE", "1"))) == 1
    try:
        loaded: tuple[Any, dict[str, Any]] = load(device_map={"": device}, **options)
        return loaded
    except torch.OutOfMemoryError:
        if not (alone and config.device in ("auto", "cuda") and torch.cuda.device_count() > 1):
            raise
    torch.cuda.empty_cache()
    room = {n: int(0.9 * torch.cuda.mem_get_info(n)[0]) for n in range(torch.cuda.device_count())}
    model, info = load(device_map="auto", max_memory=room, **options)
    if {"cpu", "disk"} & {str(place) for place in model.hf_device_map.values()}:
        raise TeacherError(f"--model {config.model} does not fit the {len(room)} GPUs together")
    return model, info


@contextmanager
def loading_errors(config: ExtractionConfig) -> Iterator[None]:
    """Turn what transformers raises while it loads into one TeacherError with the remedy."""
    from huggingface_hub.errors import StrictDataclassError
    from safetensors import SafetensorError

    try:
        yield
    except (*LOADING_FAULTS, SafetensorError, StrictDataclassError) as error:
        text = f"{error}".lower()
        if isinstance(error, torch.OutOfMemoryError):
            remedy = "use a larger GPU, --dtype bfloat16, or let one process see all GPUs"
        elif "trust_remote_code" in text:
            remedy = "it brings its own code: read that, then give --trust-remote-code"
        elif "gated" in text or "401" in text:
            remedy = "accept its terms on the Hub and log in with `hf auth login`"
        elif "gguf" in config.model.lower():
            remedy = "GGUF is not read: give the checkpoint that it was made from"
        elif config.attn != "auto" and re.search("flash|attn|attention|kernels", text):
            remedy = "install that attention, or leave --attn at auto"
        elif "ignore_mismatched_sizes" in text:
            remedy = "tensors are packed, or of other sizes than config.json says, as vocab_size"
        elif isinstance(error, ImportError):
            remedy = "install the package that is named"
        elif isinstance(error, OSError):
            remedy = "check --model and --revision, and the network when it is on the Hub"
        else:
            version = importlib.metadata.version("transformers")
            remedy = f"transformers {version} cannot load it as it is"
        raise TeacherError(
            f"--model {config.model} cannot be loaded: {first_line(error)} ({remedy})"
        ) from error


Stored = Mapping[str, tuple[str, tuple[int, ...], str]]  # of a tensor: file, shape, dtype as F32


def read_headers(options: Mapping[str, Any]) -> Stored:
    """Return what a checkpoint or adapter holds, by name; nothing where it is no safetensors."""
    from safetensors import safe_open

    source, revision = options["pretrained_model_name_or_path"], options["revision"]
    single, index = (find_file(source, name, revision) for name in WEIGHT_FILES[:2])
    names = [WEIGHT_FILES[0] if single else "adapter_model.safetensors"]
    if index and not single:
        parts = json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"]
        names = sorted(set(parts.values()))
    found = {}
    for path in filter(None, (find_file(source, name, revision) for name in names)):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 - it is no mapping
                part = file.get_slice(name)
                found[name] = (path, tuple(part.get_shape()), str(part.get_dtype()))
    return found


def check_weights(
    model: Any, info: Mapping[str, Any], *, stored: Stored, quantization: Any
) -> None:
    """Refuse a model whose weights are not all those of its checkpoint.

    Args:
        quantization: what transformers applied while it loaded.

    Raises:
        TeacherError: the checkpoint lacks weights, or holds some that belong to the model and are
            not used.
    """
    kind, version = type(model).__name__, importlib.metadata.version("transformers")
    wrong = {name for name, *_ in info["mismatched_keys"]}  # where transformers only warns
    own = model.state_dict() if quantization is None else dict(model.named_parameters())
    missing = sorted((wrong | set(info["missing_keys"])) & set(own))
    if missing:
        raise TeacherError(
            f"the checkpoint lacks {len(missing)} weights of {kind} ({missing[0]}, …); give a "
            f"whole causal language model, quantized as transformers {version} reads in its "
            "config.json, or not at all"
        )
    unused = sorted(name for name in info["unexpected_keys"] if belongs(model, name, stored))
    if unused:
        raise TeacherError(
            f"{kind} of transformers {version} does not use {len(unused)} tensors of the "
            f"checkpoint ({unused[0]}, …), so its logits would be wrong; give a checkpoint that it "
            "reads whole, such as one in bfloat16"
        )


def check_precision(stored: Stored, quantization: Any) -> None:
    """Refuse a checkpoint that stores weights in a precision that nothing scales."""
    version = importlib.metadata.version("transformers")
    scaled = {name.rpartition(".")[0] for name in stored if "scale" in name.rpartition(".")[2]}
    for name, (_, shape, dtype) in stored.items():
        packed = dtype[0] in "IU" and name.endswith("weight") and len(shape) == 2
        lost = dtype.startswith("F8") and name.rpartition(".")[0] not in scaled
        if lost or (quantization is None and (packed or dtype.startswith("F8"))):
            raise TeacherError(
                f"it stores {name} as {dtype}, and nothing in config.json that transformers "
                f"{version} knows, or beside it, says how to scale that; give a checkpoint in "
                "bfloat16"
            )


def belongs(model: Any, name: str, stored: Stored) -> bool:
    """Tell whether a tensor that the model does not use belongs to it nevertheless.

    It does beside or below a module that the model has. Towers, and prediction layers beyond the
    model's own, stand by themselves: below the model, its body, or a list of layers.
    """
    modules = dict(model.named_modules())
    splits = []
    for parts in (name.split("."), [model.base_model_prefix, *name.split(".")]):
        depth = next(n for n in range(len(parts) - 1, -1, -1) if ".".join(parts[:n]) in modules)
        splits.append((depth, modules[".".join(parts[:depth])], parts[depth:]))
    _, module, rest = max(splits, key=lambda split: split[0])
    shape = next((shape for key, (_, shape, _) in stored.items() if name.endswith(key)), ())
    mask = rest[-1] == "bias" and len(shape) == 4
    if CONSTANT.search(name) or mask or isinstance(module, torch.nn.ModuleList):
        return False
    if len(rest) == 1:
        return rest[0] not in dict(module.named_buffers(recurse=False))
    if not any(module is top for top in (model, model.base_model, model.get_decoder())):
        return True
    head = model.get_output_embeddings()  # its own may have another name
    return len(rest) == 2 and len(shape) == 2 and head is not None and shape[0] == len(head.weight)


def check_head(model: Any, stored: Stored) -> None:
    """Compare some rows of the loaded head with the checkpoint's, where it has one."""
    from safetensors import safe_open

    head = model.get_output_embeddings()
    if head is None or not is_plain_linear(head) or hasattr(head.weight, "placements"):
        return
    (name,) = (f"{key}.weight" for key, module in model.named_modules() if module is head)
    leaf = "." + ".".join(name.split(".")[-2:])
    wrapped = [key for key in stored if key.endswith(leaf) and key.count(".") <= 2]
    names = [name] if name in stored else wrapped
    for key in names:
        file, shape, _ = stored[key]
        with safe_open(file, "pt") as opened:
            rows = [0, shape[0] // 2, shape[0] - 1]
            part = opened.get_slice(key)
            own = torch.cat([part[row : row + 1] for row in rows]).to(head.weight)
        if shape == tuple(head.weight.shape) and torch.equal(own, head.weight.detach()[rows]):
            return
    if names:
        raise TeacherError(
            f"the head of the loaded model is not {names[0]} of the checkpoint; set "
            "tie_word_embeddings in its config.json as it was trained with"
        )


def merge_adapter(model: Any, adapter: str, revision: str | None) -> Any:
    """Return the model with a trained adapter added to its weights, all of it and as trained.

    Raises:
        TeacherError: peft does not know all of the adapter, or cannot add it.
    """
    import warnings

    import peft

    ids = probe_rows(model.config.get_text_config().vocab_size)[0][None].to(model.device)
    with warnings.catch_warnings(record=True) as caught, torch.no_grad():
        warnings.simplefilter("always")
        adapted = peft.PeftModel.from_pretrained(model, adapter, revision=revision)
        # once more for what has no place, of which the first time tells nothing
        unused = adapted.load_adapter(adapter, "default", revision=revision).unexpected_keys
        pair = model.get_output_embeddings(), model.get_input_embeddings()
        head, embedding = (getattr(layer, "base_layer", layer) for layer in pair)
        if (head, embedding) != pair and getattr(head, "weight", None) is embedding.weight:
            # tied: what is added to one of them would be added to both
            head.weight = torch.nn.Parameter(head.weight.clone(), requires_grad=False)
            model.config.tie_word_embeddings = False
        want = model(input_ids=ids, use_cache=False).logits[0].float()
        settings: Any = adapted.peft_config["default"]
        try:
            merged = adapted.merge_and_unload()
        except torch.OutOfMemoryError:
            raise
        except LOADING_FAULTS as error:
            why = "" if isinstance(error, AttributeError) else f" ({first_line(error).rstrip('.')})"
            raise TeacherError(
                f"peft cannot add its adapter to the weights: {settings.peft_type.value}{why}; "
                "give a plain LoRA, or a whole model"
            ) from error
        got = merged(input_ids=ids, use_cache=False).logits[0].float()
    check_adapter(settings, find_file(adapter, "adapter_config.json", revision), unused, caught)
    off = float(disagreement(got, want).median())
    kind = "any" if applied_quantization(merged) else str(merged.dtype).removeprefix("torch.")
    if not off <= ROUNDING.get(kind, 0.1):
        raise TeacherError(
            f"its adapter added to the weights gives logits that are off by {off:.1g} of their "
            "spread, as where weights are quantized or layers share them; give a whole model, or "
            "in adapter_config.json a base that is not quantized"
        )
    return merged


def check_adapter(settings: Any, file: str | None, unused: list[str], caught: list[Any]) -> None:
    """Refuse an adapter of which `peft` does not know a tensor, or an option that is set.

    Args:
        settings, file: its options as `peft` knows them, and as they are written.
        unused: names of tensors without a place.
        caught: warnings of `peft`.
    """
    for warning in caught:
        if "adapter keys" in str(warning.message):
            raise TeacherError(str(warning.message).splitlines()[0])
    written = json.loads(Path(str(file)).read_text(encoding="utf-8"))
    unknown = sorted(name for name in written if written[name] and not hasattr(settings, name))
    lost = [name for name in unused if ".modules_to_save." not in name]  # of these it writes two
    for kind, names in (("tensors", lost), ("options", unknown)):
        if names:
            raise TeacherError(
                f"peft {importlib.metadata.version('peft')} has no place for {len(names)} {kind} "
                f"of its adapter ({names[0]}, …), so its logits would be wrong; "
                "pip install -U peft, or give a whole model"
            )


def applied_quantization(model: Any) -> dict[str, Any] | None:
    """Return how the loaded weights are quantized, None where they are plain numbers."""
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is None or getattr(quantizer.quantization_config, "dequantize", False):
        return None
    described = quantizer.quantization_config.to_dict()
    found: dict[str, Any] = json.loads(json.dumps(described, default=str, sort_keys=True))
    return found


@contextmanager
def swapped_forward(module: Any, forward: Callable[..., Any]) -> Iterator[None]:
    """Let `module(...)` call `forward` inside the block; a hook put there before comes back."""
    before = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if before is None:
            del module.forward
        else:
            module.forward = before


def with_hidden(outputs: Any, hidden: torch.Tensor) -> Any:
    """Return a copy of a base model's output object whose last hidden state is `hidden`."""
    changed = copy.copy(outputs)
    changed.last_hidden_state = hidden
    return changed


def float32_product(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """Return `hidden @ weight.T + bias` in float32: products and sums never rounded below it.

    A head that is tied to the embedding may be on another device than the last layer.

    Args:
        hidden: (n, H), of the weight's dtype.
        weight: (V, H).
        bias: (V,) or None.
    """
    hidden = hidden.to(weight.device)
    bias = None if bias is None else bias.to(weight.device)
    if weight.dtype == torch.float32:
        return torch.nn.functional.linear(hidden.float(), weight, bias)
    if multiplies_into_float32(weight.device, weight.dtype):
        logits = torch.mm(hidden, weight.T, out_dtype=torch.float32)
    else:
        logits = torch.empty(len(hidden), len(weight), device=weight.device)  # (n, V) float32
        wide = hidden.float()
        for start in range(0, len(weight), CAST_ROWS):
            rows = weight[start : start + CAST_ROWS].float()
            torch.mm(wide, rows.T, out=logits[:, start : start + CAST_ROWS])
    return logits if bias is None else logits.add_(bias)


def sharded_product(hidden: torch.Tensor, weight: Any, bias: Any) -> torch.Tensor:
    """Return `float32_product` of a weight and bias (DTensors) whose rows many processes share."""
    from torch.distributed.tensor import DTensor, Shard

    part = float32_product(hidden, weight.to_local(), None if bias is None else bias.to_local())
    shape, stride = torch.Size([len(hidden), len(weight)]), (len(weight), 1)
    place = {"device_mesh": weight.device_mesh, "placements": [Shard(1)], "run_check": False}
    return DTensor.from_local(part, **place, shape=shape, stride=stride).full_tensor()


@functools.cache
def multiplies_into_float32(device: torch.device, dtype: torch.dtype) -> bool:
    """Say whether `torch.mm` here returns float32 from low-precision factors (CUDA does)."""
    square = torch.zeros(16, 16, device=device, dtype=dtype)
    try:
        torch.mm(square, square, out_dtype=torch.float32)
    except (RuntimeError, TypeError):
        return False
    return True


class Teacher:
    """A causal LM that returns float32 logits of chosen positions, whatever its family.

    Not thread safe: the model's own forward is borrowed while logits are computed.

    Attributes:
        device, dtype: of the model.
        vocab_size: V, the ids that have logits.
        max_seq_len: positions the model has, None without a limit.
        layout: how conversations share a pass: "padded" on the right without a mask, "masked" with
            one, or "single", one at a time.
        layout_reason: why, for the log.
        head: "chunked" (apart from the body, at the wanted positions) or "forward" (with it).
        numerics: what really runs, as JSON values.
    """

    def __init__(
        self, model: Any, *, vocab_size: int | None = None, forced_attention: bool = False
    ) -> None:
        """Find out on `model` itself how it runs, and that no token sees a later one.

        Args:
            forced_attention: refuse another attention than the model was loaded with.

        Raises:
            TeacherError: it is not causal, or its attention is not what its configuration says.
        """
        self.model = model.eval()
        here = (weight.device for weight in model.parameters())
        self.device = next(device for device in here if device.type != "meta")
        self.dtype: torch.dtype = model.dtype
        self.max_seq_len = max_positions(model.config)
        head = model.get_output_embeddings()
        text = model.config.get_text_config()
        rows = text.vocab_size if head is None else head.weight.shape[0]
        self.vocab_size = min(rows, MAX_TOKEN_ID + 1, vocab_size or rows)
        self._can_keep = "logits_to_keep" in signature(model.forward).parameters
        for name in ("output_router_logits", "output_hidden_states", "output_attentions"):
            if getattr(model.config, name, False):
                setattr(model.config, name, False)  # memory that nothing here reads
        model.config.return_dict = text.return_dict = True  # a checkpoint of old may ask for tuples
        for module in model.modules():  # to look for padding, only to warn, waits for the device
            if hasattr(module, "warn_if_padding_and_no_attention_mask"):
                module.warn_if_padding_and_no_attention_mask = lambda *ids_and_mask: None
        self.body: Any = None
        self.head = self.layout = self.layout_reason = ""
        self.batch_tokens: int | None = None  # where the engine knows it
        alone = self._settle_attention(forced_attention)
        self._settle_layout(alone)
        self.numerics = self._describe()

    def _describe(self) -> dict[str, Any]:
        config, here = self.model.config, importlib.metadata
        text = config.get_text_config()
        sizes: Counter[str] = Counter()
        for weight in self.model.parameters():
            sizes[str(weight.dtype).removeprefix("torch.")] += weight.numel()
        quantization = applied_quantization(self.model)
        names = ["torch", "transformers", str((quantization or {}).get("quant_method"))]
        names += ["triton", "kernels", "flash-attn"] if self.device.type == "cuda" else []
        versions = {}
        for name in names:
            with contextlib.suppress(here.PackageNotFoundError):
                versions[name] = here.version(name)
        plain = is_plain_linear(self.model.get_output_embeddings())
        return {
            "architecture": type(self.model).__name__,
            "device": self.device.type,
            "weights": sizes.most_common(1)[0][0],
            "quantization": quantization,
            "attention": text._attn_implementation,
            "experts": getattr(text, "_experts_implementation", None),
            "layout": self.layout,
            "head": self.head,
            "head_dtype": "float32" if plain else str(self.dtype).removeprefix("torch."),
            "versions": versions,
        }

    def iter_logits(
        self,
        sequences: Sequence[npt.NDArray[np.int32]],
        token_positions: Sequence[npt.NDArray[np.int32]],
        *,
        chunk_tokens: int | None = None,
    ) -> Iterator[torch.Tensor]:
        """Yield the logits that predict the tokens at `token_positions`, in row order, flattened.

        The logits of token position p are the model's output at position p - 1. The same call
        gives the same logits; another composition of the batch changes them by rounding.

        Args:
            sequences: B arrays (S,) of token ids.
            token_positions: B arrays (N,) of positions in the sequence, each in 1..S-1.
            chunk_tokens: rows of a yielded tensor at most; default: what fits 256 MB.

        Yields:
            (n, V) float32 on the teacher's device; the n sum to the number of token positions.

        Raises:
            TeacherError: a token id has no row in the model's embedding.
            torch.OutOfMemoryError: the batch is too large for the device.
        """
        self._check_ids(sequences, token_positions)
        at_once = HEAD_CHUNK_BYTES * (CUDA_CHUNKS if self.device.type == "cuda" else 1)
        size = chunk_tokens or max(1, at_once // (4 * self.vocab_size))
        for part in self._parts([len(ids) for ids in sequences]):
            rows = [torch.from_numpy(np.asarray(sequences[i], np.int64)) for i in part]
            wanted = [torch.from_numpy(np.asarray(token_positions[i], np.int64)) - 1 for i in part]
            if any(len(positions) for positions in wanted):
                yield from self._logits(rows, wanted, size)

    def _check_ids(self, sequences: Sequence[Any], token_positions: Sequence[Any]) -> None:
        """Refuse ids that the embedding lacks, and wanted tokens that the head lacks."""
        rows = self.model.get_input_embeddings().weight.shape[0]
        wanted = [ids[at] for ids, at in zip(sequences, token_positions, strict=True)]
        pairs = ((sequences, rows, "embedding"), (wanted, self.vocab_size, "head"))
        for arrays, limit, of in pairs:
            highest = max((int(ids.max()) for ids in arrays if len(ids)), default=0)
            if highest >= limit:
                raise TeacherError(
                    f"token id {highest} is beyond the {limit} rows of the model's {of}: "
                    "tokenizer and model do not belong together"
                )

    def _parts(self, lengths: list[int]) -> list[list[int]]:
        """Split a batch into runs of rows that may share a forward pass."""
        if self.layout == "single":
            return [[i] for i in range(len(lengths))]
        edges = rope_edges(self.model.config)
        beyond = [sum(length > edge for edge in edges) for length in lengths]
        return [list(run) for _, run in itertools.groupby(range(len(lengths)), beyond.__getitem__)]

    def _logits(
        self, rows: list[torch.Tensor], wanted: list[torch.Tensor], size: int
    ) -> Iterator[torch.Tensor]:
        """Yield the logits at the wanted positions of rows in one pass, `size` at a time."""
        inputs = pad_rows(rows, self.device, masked=self.layout == "masked")
        width = inputs["input_ids"].shape[1]
        flat = torch.cat([at + i * width for i, at in enumerate(wanted)])
        if self.head == "forward":
            yield from self._plain_logits(inputs, flat).split(size)
            return
        hidden, outputs, _ = self._hidden(inputs, flat)
        for chunk in hidden.split(size):
            yield self._head_logits(chunk, outputs)

    def _plain_logits(
        self, inputs: dict[str, Any], flat: torch.Tensor, *, own: bool = False
    ) -> torch.Tensor:
        """Return (N, V) float32 from the model's forward, at positions (N,) of one row.

        Args:
            own: by the model's own head, whatever it rounds to.
        """
        head = nullcontext() if own else self._float32_head()
        with torch.inference_mode(), known_padding(), head:
            if self._can_keep:
                inputs = {**inputs, "logits_to_keep": send(flat, self.device)}
                flat = torch.arange(len(flat))
            logits = self.model(**inputs, use_cache=False).logits[0]
            return logits[flat.to(logits.device), : self.vocab_size].float().to(self.device)

    def _hidden(
        self, inputs: dict[str, Any], flat: torch.Tensor, *, whole: bool = False
    ) -> tuple[torch.Tensor, Any, torch.Tensor]:
        """Run the body; return the wanted hidden states (N, H), its output object and the logits.

        The model's own forward calls the body, so every argument that the family passes to it is
        there; its head sees one position a row, or with `whole` all of them.
        """
        forward = self.body.forward
        kept: list[Any] = []

        def body(*args: Any, **kwargs: Any) -> Any:
            outputs = forward(*args, **kwargs)
            kept.append(outputs)
            if whole:
                return outputs
            return with_hidden(outputs, outputs.last_hidden_state[:, :1])

        with torch.inference_mode(), swapped_forward(self.body, body), known_padding():
            logits = self.model(**inputs, use_cache=False).logits
            if len(kept) != 1:
                raise ValueError(f"the forward calls its body {len(kept)} times")
            hidden = kept[0].last_hidden_state  # (B, S, H)
            hidden = hidden.reshape(-1, hidden.shape[-1])
            hidden = hidden[send(flat, hidden.device)]  # (N, H)
            return hidden, with_hidden(kept[0], hidden[None, :1]), logits

    def _head_logits(self, hidden: torch.Tensor, outputs: Any) -> torch.Tensor:
        """Return (n, V) float32 logits of hidden states (n, H) by the model's own forward.

        A stub that returns `hidden` stands in for the body, so that soft-caps and scales apply.
        """

        def body(*args: Any, **kwargs: Any) -> Any:
            return with_hidden(outputs, hidden[None])

        ids = torch.zeros(1, len(hidden), dtype=torch.long, device=self.device)
        with torch.inference_mode(), swapped_forward(self.body, body), self._float32_head():
            logits = self.model(input_ids=ids, use_cache=False).logits
            return logits[0, :, : self.vocab_size].float().contiguous().to(self.device)

    def _float32_head(self) -> AbstractContextManager[None]:
        """Let a plain linear head multiply in float32, over V rows only, inside the block."""
        head = self.model.get_output_embeddings()

        def product(states: torch.Tensor) -> torch.Tensor:
            flat = states.reshape(-1, states.shape[-1])
            if hasattr(head.weight, "placements"):
                logits = sharded_product(flat, head.weight, head.bias)
            else:
                bias = None if head.bias is None else head.bias[: self.vocab_size]
                logits = float32_product(flat, head.weight[: self.vocab_size], bias)
            return logits.reshape(*states.shape[:-1], -1)

        return swapped_forward(head, product) if is_plain_linear(head) else nullcontext()

    def _settle_attention(self, forced: bool) -> torch.Tensor:
        """Choose head and attention on one row; return its logits (S, V).

        Eager attention is what the configuration says, but in Falcon, where it adds alibi twice.
        Where another differs from it by more than rounding, it runs instead.
        """
        text = self.model.config.get_text_config()
        chosen, cap = text._attn_implementation, getattr(text, "attn_logit_softcapping", None)
        trusted = "sdpa" if getattr(text, "alibi", False) else "eager"
        inputs = pad_rows(probe_rows(self.vocab_size)[:1], self.device, masked=False)
        want: Any = None
        if chosen not in (None, trusted):
            before = set_attention(self.model, trusted)
            with contextlib.suppress(*LOADING_FAULTS):  # not every family can
                want = self._plain_logits(
                    inputs, torch.arange(PROBE_CUTS[0], PROBE_TOKENS), own=True
                )
            for config, name in before:
                config._attn_implementation_internal = name
        try:
            plain, alone = self._choose_head(inputs)
            problem = "" if want is None else self._problem([plain[PROBE_CUTS[0] :]], [want])
        except torch.OutOfMemoryError:
            raise
        except LOADING_FAULTS as error:
            if want is None:
                raise TeacherError(
                    f"it does not run: {first_line(error)}; try --dtype float32"
                ) from error
            problem = first_line(error)
        if cap is not None and (chosen == "sdpa" or not (forced or chosen == "eager")):
            problem = f"attn_logit_softcapping {cap} may be left out"
        if not problem:
            return alone
        if forced:
            raise TeacherError(
                f"--attn {chosen} is not what the configuration says: {problem}, against "
                f"{trusted}; leave --attn at auto"
            )
        with contextlib.suppress(*LOADING_FAULTS):
            self.layout = "single"
            self._refuse_foresight()  # a prefix model is none without its prefix
        logger.info("attention %s instead of %s: %s", trusted, chosen, problem)
        set_attention(self.model, trusted)
        return self._choose_head(inputs)[1]

    def _choose_head(self, inputs: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
        """Find the body that leaves the logits of a row as they are when a stub stands in for it.

        Positions go backwards, so that a head to which they matter is found out.

        Returns:
            The row's logits (S, V) by the model's own forward, and in the way that was chosen.
        """
        flat = torch.arange(inputs["input_ids"].shape[1] - 1, -1, -1)
        children = [self.model.base_model, self.model.get_decoder(), *self.model.children()]
        self.head = "chunked"
        for self.body in {id(c): c for c in children if c is not self.model}.values():
            try:
                hidden, outputs, logits = self._hidden(inputs, flat, whole=True)
                plain = logits[0, :, : self.vocab_size].float().to(self.device)
                apart = self._head_logits(hidden, outputs).flip(0)
            except torch.OutOfMemoryError:
                raise
            except LOADING_FAULTS:  # not what the forward calls, or not what its head reads
                continue
            if not self._problem([apart], [plain]):
                return plain, apart
        self.body, self.head = None, "forward"
        flat = flat.flip(0)
        return self._plain_logits(inputs, flat, own=True), self._plain_logits(inputs, flat)

    def _settle_layout(self, alone: torch.Tensor) -> None:
        """Take the first layout that gives probe rows what they get alone, and try its future."""
        row, short, *others = probe_rows(self.vocab_size)
        want = [alone, self._probe([short])[0]]
        problem = "its head cannot be run apart from its body"
        for layout in ("padded", "masked") if self.head == "chunked" else ():
            self.layout = layout
            try:
                got = self._probe([row, short, *others])
            except torch.OutOfMemoryError:
                raise
            except LOADING_FAULTS as error:
                problem = f"the model refuses padding: {first_line(error)}"
                continue
            problem = self._problem(got[:2], want)
            if not problem:
                self.layout_reason = "padded on the right, conversations get what they get alone"
                return self._refuse_foresight(got)
        self.layout, self.layout_reason = "single", problem
        return self._refuse_foresight()

    def _refuse_foresight(self, got: list[torch.Tensor] | None = None) -> None:
        """Refuse a model whose logits of the probe's rows, `got`, depend on later tokens."""
        got = got or self._probe(probe_rows(self.vocab_size))
        off, limit = foresight(got, [got[0]] * len(PROBE_CUTS)), FORESIGHT
        if off > limit:
            # rounding may depend on the place in the batch, and in mixtures of experts on the
            # neighbours: then the first row, where nothing changes, changes as well
            again = self._probe(probe_rows(self.vocab_size, turn=3))
            off = min(off, foresight(got, again[2:]))
            limit = FORESIGHT if torch.equal(again[0], got[0]) else self._rounding()
        if not off <= limit:
            raise TeacherError(
                f"{type(self.model).__name__} is not causal: other tokens at the end change the "
                f"logits before them by {off:.1g} of their spread, so what is stored would have "
                "seen the answer; give a causal language model"
            )

    def _probe(self, rows: list[torch.Tensor]) -> list[torch.Tensor]:
        """Return the logits (n, V) of rows of the probe as far as none of their tokens changes."""
        sizes = [*(len(row) for row in rows[:2]), *PROBE_CUTS[: max(0, len(rows) - 2)]]
        logits: list[torch.Tensor] = []
        for part in self._parts([len(row) for row in rows]):
            wanted = [torch.arange(sizes[i]) for i in part]
            logits += self._logits([rows[i] for i in part], wanted, sum(sizes))
        return list(torch.cat(logits).split(sizes))

    def _rounding(self) -> float:
        return ROUNDING.get(str(self.dtype).removeprefix("torch."), 0.1)

    def _problem(self, logits: list[torch.Tensor], expected: list[torch.Tensor]) -> str:
        """Say how far the worst row is off, nothing when that is rounding."""
        errors = [disagreement(*pair) for pair in zip(logits, expected, strict=True)]
        low = self.dtype != torch.float32
        off = max(float(error.median() if low else error.max()) for error in errors)
        return "" if off <= self._rounding() else f"logits are off by {off:.1g} of their spread"


def set_attention(model: Any, name: str) -> list[tuple[Any, Any]]:
    """Let a model compute its attention in another way; return configurations and ways before."""
    configs = {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}
    before = [
        (config, config._attn_implementation_internal)
        for config in configs.values()
        if hasattr(config, "_attn_implementation_internal")
    ]
    for config, _ in before:
        config._attn_implementation_internal = name
    return before


def probe_rows(vocab_size: int, *, turn: int = 2) -> list[torch.Tensor]:
    """Return the rows of the start-up checks: arbitrary but fixed ids.

    A row, a shorter one, and the first again with other tokens from each of PROBE_CUTS on. The ids
    are from the middle of the vocabulary, as those that mean an image stand at its ends.
    """
    low, count = vocab_size // 4, max(4, vocab_size // 2)
    draw = np.random.default_rng(0)
    row, short = (
        torch.from_numpy(low + draw.integers(0, count, n)) for n in (PROBE_TOKENS, PROBE_SHORT)
    )
    other = low + (row - low + count // turn) % count
    return [row, short, *(torch.cat([row[:cut], other[cut:]]) for cut in PROBE_CUTS)]


def foresight(logits: list[torch.Tensor], others: list[torch.Tensor]) -> float:
    """Return how far logits of `probe_rows` are from others that differ by later tokens only."""
    pairs = zip(logits[2:], others, strict=True)
    return max(float(disagreement(got, want[: len(got)]).max()) for got, want in pairs)


def disagreement(logits: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    """Return the error of each position (S,) as a share of the spread of its logits.

    Infinite and undefined logits agree with their like; they are no matter of layout.
    """
    same = (logits == expected) | (logits.isnan() & expected.isnan())
    error = torch.where(same, 0.0, logits - expected).square().mean(-1).sqrt()
    return error / expected.std(-1).nan_to_num(1.0).clamp_min(1e-6)


def pad_rows(rows: list[torch.Tensor], device: torch.device, *, masked: bool) -> dict[str, Any]:
    """Return the inputs (B, S) of rows padded on the right, on the device.

    A causal model sees nothing to the right, so it needs no mask, and without one attention runs
    in its fastest kernel.
    """
    pad = functools.partial(torch.nn.utils.rnn.pad_sequence, batch_first=True)
    mask = send(pad([torch.ones_like(row) for row in rows]), device) if masked else None
    return {"input_ids": send(pad(rows), device), "attention_mask": mask}


@contextmanager
def known_padding() -> Iterator[None]:
    """Answer from the host what transformers asks the device in every forward without a mask.

    No conversations are packed; asking the device would wait for all that was launched before, and
    leave it idle until the next launch.
    """
    import transformers.masking_utils as masks

    masking_utils: Any = masks
    ask = masking_utils.find_packed_sequence_indices
    masking_utils.find_packed_sequence_indices = lambda position_ids: None
    try:
        yield
    finally:
        masking_utils.find_packed_sequence_indices = ask


def send(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copy a tensor to a device without waiting for what runs there.

    A copy from memory that is not pinned waits for everything that was launched before it.
    """
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def is_plain_linear(head: Any) -> bool:
    """Say whether `head` is an unquantized linear layer of which weights, or rows, are here."""
    if type(head) is not torch.nn.Linear:
        return False
    weight = head.weight
    by_rows = [str(place) for place in getattr(weight, "placements", ())] == ["S(0)"]
    whole = type(weight) is torch.nn.Parameter or by_rows
    return whole and weight.is_floating_point() and weight.device.type != "meta"


def max_positions(config: Any) -> int | None:
    """Return how many positions the model has, None when its configuration names no limit."""
    text = config.get_text_config()
    for name in ("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length"):
        with contextlib.suppress(NotImplementedError):  # so XLNet says that it has none
            value = getattr(text, name, None)
            if isinstance(value, int) and value > 0:
                return value
    return None


def rope_edges(config: Any) -> list[float]:
    """Return the lengths beyond which the model turns every row of a batch by other angles.

    LongRoPE chooses its short or long factors by the longest row, so a short conversation beside
    a long one would get other logits than alone.
    """
    rope = getattr(config.get_text_config(), "rope_parameters", None) or {}
    parts = (rope, *(value for value in rope.values() if isinstance(value, dict)))
    longs = [part for part in parts if part.get("rope_type") == "longrope"]
    return sorted(float(part.get("original_max_position_embeddings") or math.inf) for part in longs)


# vLLM as the engine: it runs the layers, and `Teacher` all that follows.

VLLM_FAMILIES = (  # model types of which docs/architectures.md has a line
    "llama",
    "mistral",
    "mixtral",
    "qwen2",
    "qwen3",
    "qwen3_moe",
    "gemma2",
    "gemma3_text",
    "granite",
    "phi3",
    "glm4",
    "gpt_oss",
    "gpt2",
    "cohere",
    "exaone4",
)
NORM_IN_HEAD = ("mimo", "step3p5")  # vLLM norms these where it multiplies by the head
FEED_BYTES = 512 * 2**20  # hidden states that one call of vLLM brings to the host
FEED_TOKENS = {"cuda": 65_536}  # and tokens, so that a stop need not wait for long
CUDA_SPARE = 0.05  # of a GPU's memory, for what no one counts
CHECKED_TOKENS = 64  # of the text that vLLM gives its own log-probabilities of
PLAIN_FLOATS = ("BF16", "F16", "F32", "F64")  # as safetensors calls what needs no scale


def check_vllm(config: ExtractionConfig, model_config: Any) -> None:
    """Refuse, before anything is loaded, a teacher whose layers vLLM cannot run as they are.

    Raises:
        TeacherError: vLLM is not installed, or the family is not one that was compared.
    """
    kind, arguments = model_config.model_type, config.engine_args or {}
    if importlib.util.find_spec("vllm") is None:
        raise TeacherError(
            "--engine vllm needs vLLM: install the extra vllm (pip install -e '.[vllm]') in an "
            "environment of its own, since it brings its own torch and transformers"
        )
    if kind in NORM_IN_HEAD:
        raise TeacherError(
            f"--engine vllm: {kind} has its last norm in the head there, so its states are not "
            "what the head reads; use --engine transformers"
        )
    if kind not in VLLM_FAMILIES and arguments.get("unchecked") is not True:
        raise TeacherError(
            f"--engine vllm was not compared with transformers on {kind}, only on "
            f"{', '.join(VLLM_FAMILIES)}; use --engine transformers, or --engine-args "
            "'{\"unchecked\": true}' to rely on the check at the start"
        )
    if locate_model(config)[1] is not None:
        raise TeacherError(
            f"--model {config.model} is an adapter, which --engine vllm does not add: give a "
            "folder with the merged weights (merge_and_unload of peft)"
        )
    edge = min(rope_edges(model_config), default=math.inf)
    longest = config.max_seq_len or max_positions(model_config)
    if math.isfinite(edge) and (longest is None or longest > edge):
        raise TeacherError(
            f"--engine vllm turns all conversations as the longest, beyond {edge:.0f} tokens: give "
            f"--max-seq-len {edge:.0f} at most, or --engine transformers"
        )


def load_head(config: ExtractionConfig, model_config: Any, device: torch.device) -> Any:
    """Return the language model without its layers: embedding, last norm and head.

    Raises:
        TeacherError: the checkpoint has no such head in plain numbers.
    """
    options, _ = locate_model(config)
    dtype, bare = resolve_dtype(config, model_config), copy.deepcopy(model_config)
    text = bare.get_text_config()
    text.num_hidden_layers = 0
    if "layer_types" in vars(text):  # in some families it is a property
        text.layer_types = []
    for part in (bare, text):
        part.__dict__.pop("quantization_config", None)  # that of the layers
    load = choose_class(config, model_config).from_pretrained
    with loading_errors(config):
        model, info = load(**options, config=bare, dtype=dtype, output_loading_info=True)
        stored = read_headers(options)
    ends = (model.get_output_embeddings(), model.get_input_embeddings())
    names = {name.split(".")[-1] for name, module in model.named_modules() if module in ends}
    for key, (_, _, kind) in stored.items():
        *_, module, leaf = ["", *key.split(".")]
        if module in names and not (leaf in ("weight", "bias") and kind in PLAIN_FLOATS):
            raise TeacherError(
                f"the head is quantized ({key}, {kind}), which --engine vllm does not read; give a "
                "checkpoint with a head in bfloat16, or --engine transformers"
            )
    check_weights(model, info, stored=stored, quantization=quantization_of(model_config))
    check_head(model, stored)
    return model.to(device)


def engine_arguments(config: ExtractionConfig, model_config: Any, head: Any) -> dict[str, Any]:
    """Return the arguments of vLLM's `LLM`, those that the user gave last."""
    options, _ = locate_model(config)
    found = {
        "model": options["pretrained_model_name_or_path"],
        "trust_remote_code": config.trust_remote_code,
        "dtype": str(head.dtype).removeprefix("torch."),
        "max_model_len": config.max_seq_len or max_positions(model_config),
        "enable_prefix_caching": False,
        "disable_log_stats": True,
    }
    if not is_local(config.model):
        found["revision"] = found["tokenizer_revision"] = config.revision
    if head.device.type == "cuda":  # the head and its chunks of logits are beside vLLM's share
        weights = sum(weight.nbytes for weight in head.parameters())
        total = torch.cuda.get_device_properties(head.device).total_memory
        needed = (weights + 2 * CUDA_CHUNKS * HEAD_CHUNK_BYTES) / total
        found["gpu_memory_utilization"] = round(1 - CUDA_SPARE - needed, 3)
    given = {k: v for k, v in (config.engine_args or {}).items() if k != "unchecked"}
    return found | given


def own_logprobs(arguments: dict[str, Any], ids: list[int]) -> list[float]:
    """Return the log-probabilities that vLLM itself gives of all ids but the first."""
    from vllm import LLM, SamplingParams

    sampling = SamplingParams(max_tokens=1, prompt_logprobs=0)
    (output,) = LLM(**arguments).generate([{"prompt_token_ids": ids}], sampling, use_tqdm=False)
    entries = zip(ids[1:], output.prompt_logprobs[1:], strict=True)
    return [float(entry[i].logprob) for i, entry in entries]


class VllmTeacher(Teacher):
    """A teacher whose layers vLLM runs.

    Its embedding of every token of a prompt, without pooling, is the state after the last norm:
    what the head reads. vLLM schedules the conversations of a window as it likes.
    """

    def __init__(self, head: Any, arguments: dict[str, Any], *, vocab_size: int | None) -> None:
        """Start vLLM, and prove that its states are those of the head and see no later token.

        Args:
            head: the language model without layers.
            arguments: of vLLM's `LLM`.

        Raises:
            TeacherError: vLLM cannot run it, or not so that its states fit the head.
        """
        self.arguments = arguments
        super().__init__(head, vocab_size=vocab_size)
        self.max_seq_len = self.llm.llm_engine.vllm_config.model_config.max_model_len
        text = head.config.get_text_config()
        self.batch_tokens = min(
            FEED_BYTES // (text.hidden_size * self.dtype.itemsize),
            FEED_TOKENS.get(self.device.type, 8_192),
        )

    def _settle_attention(self, forced: bool) -> torch.Tensor:
        """Choose the head; there is no attention in it."""
        inputs = pad_rows(probe_rows(self.vocab_size)[:1], self.device, masked=False)
        _, alone = self._choose_head(inputs)
        if self.head != "chunked":
            raise TeacherError(
                "its head cannot be run apart from its body, which --engine vllm needs; use "
                "--engine transformers"
            )
        self._outputs = self._hidden(inputs, torch.zeros(1, dtype=torch.long))[1]
        return alone

    def _settle_layout(self, alone: torch.Tensor) -> None:
        """Start vLLM and check its states."""
        self.layout, self.layout_reason = "vllm", "it schedules conversations by itself"
        draw = np.random.default_rng(1)
        low, count = self.vocab_size // 4, max(4, self.vocab_size // 2)
        length = min(CHECKED_TOKENS, self.arguments["max_model_len"] or CHECKED_TOKENS)
        ids = (low + draw.integers(0, count, length - 1)).tolist()
        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
        os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")  # stdout has the summary
        with engine_errors():
            own = self._own_logprobs(ids)
            self.llm = start_vllm(self.arguments)
        self._refuse_wrong_states(ids, torch.tensor(own))
        self._refuse_foresight()

    def _own_logprobs(self, ids: list[int]) -> list[float]:
        """Ask vLLM in a process of its own, so that its memory is free again."""
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as apart:
            return apart.submit(own_logprobs, self.arguments, ids).result()

    def _refuse_wrong_states(self, ids: list[int], own: torch.Tensor) -> None:
        """Compare states times head with the log-probabilities that vLLM gives itself."""
        row = torch.tensor(ids)
        kept, self.vocab_size = self.vocab_size, self.model.get_output_embeddings().weight.shape[0]
        logits = torch.cat(list(self._logits([row], [torch.arange(len(ids) - 1)], len(ids)))).cpu()
        self.vocab_size = kept
        found = logits.log_softmax(-1).gather(1, row[1:, None]).squeeze(1)
        error = (found - own).abs() / logits.std(-1).clamp_min(1e-6)
        off = float(error.max() if self.dtype == torch.float32 else error.median())
        if not off <= self._rounding():
            raise TeacherError(
                f"vLLM's states do not fit the head: log-probabilities are off by {off:.1g} of the "
                "logits' spread from its own prompt_logprobs; use --engine transformers"
            )

    def _refuse_foresight(self, got: list[torch.Tensor] | None = None) -> None:
        """Refuse layers whose states depend on later tokens; rounding may, as vLLM schedules."""
        row, _, *changed = got or self._probe(probe_rows(self.vocab_size))
        if problem := self._problem(changed, [row[: len(part)] for part in changed]):
            raise TeacherError(
                f"in vLLM it is not causal: with other tokens at the end {problem}, so what is "
                "stored would have seen the answer; use --engine transformers"
            )

    def _parts(self, lengths: list[int]) -> list[list[int]]:
        """Split a batch into windows, whose hidden states the host holds."""
        width = self.model.config.get_text_config().hidden_size * self.dtype.itemsize
        parts: list[list[int]] = []
        room = 0
        for i, length in enumerate(lengths):
            if not parts or length * width > room:
                parts.append([])
                room = FEED_BYTES
            parts[-1].append(i)
            room -= length * width
        return parts

    def _logits(
        self, rows: list[torch.Tensor], wanted: list[torch.Tensor], size: int
    ) -> Iterator[torch.Tensor]:
        """Yield the logits at the wanted positions, `size` at a time; nothing runs after those."""
        asked = [
            (row[: int(at.max()) + 1], at) for row, at in zip(rows, wanted, strict=True) if len(at)
        ]
        prompts = [{"prompt_token_ids": row.tolist()} for row, _ in asked]
        with engine_errors():
            outputs = self.llm.encode(prompts, pooling_task="token_embed", use_tqdm=False)
        states = []
        for (row, at), output in zip(asked, outputs, strict=True):
            found, output.outputs = output.outputs.data, None  # (S, H)
            if len(found) != len(row):
                raise TeacherError(f"vLLM gave {len(found)} states of {len(row)} tokens")
            states.append(found[at])
        for chunk in torch.cat(states).split(size):
            yield self._head_logits(send(chunk.to(self.dtype), self.device), self._outputs)

    def _describe(self) -> dict[str, Any]:
        import vllm

        described = super()._describe()
        config = self.llm.llm_engine.vllm_config
        quantization = {
            "quant_method": config.model_config.quantization,
            "kv_cache": config.cache_config.cache_dtype,
        }
        plain = quantization == {"quant_method": None, "kv_cache": "auto"}
        return described | {
            "quantization": None if plain else quantization,
            "attention": "vllm",
            "experts": "vllm",
            "versions": described["versions"] | {"vllm": vllm.__version__},
        }


def start_vllm(arguments: dict[str, Any]) -> Any:
    """Return vLLM as an engine that gives the state of every token after the last norm."""
    from vllm import LLM
    from vllm.config import PoolerConfig

    pooler = {"task": "token_embed", "tok_pooling_type": "ALL", "use_activation": False}
    overrides = {"head_dtype": "model"}  # else states are float32, twice as large
    return LLM(
        **{**arguments, "hf_overrides": overrides | arguments.get("hf_overrides", {})},
        runner="pooling",
        convert="embed",
        pooler_config=PoolerConfig(**pooler),
    )


@contextmanager
def engine_errors() -> Iterator[None]:
    """Turn what vLLM raises into one TeacherError; the cause is in its log."""
    try:
        yield
    except TeacherError:
        raise
    except Exception as error:  # its errors have no class in common
        raise TeacherError(
            f"vLLM {type(error).__name__}: {first_line(error)} (its log above says more; what it "
            "takes is given by --engine-args)"
        ) from error


def join_group(config: ExtractionConfig) -> int:
    """Connect the processes that torchrun has started for one teacher; return this one's number.

    All of them run the same loop over the same batches; the first one writes.

    Raises:
        ConfigError: torchrun has not started this process.
    """
    if not {"RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR"} <= os.environ.keys():
        raise ConfigError(
            "--tensor-parallel needs torchrun: torchrun --nproc-per-node 8 extract_logits.py …"
        )
    device = resolve_device(config.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group(
            "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=GROUP_PATIENCE
        )
    return torch.distributed.get_rank()


def agree(value: T) -> T:
    """Return the first process's value in every process of the group; alone, one's own."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return value
    told: list[Any] = [value]
    torch.distributed.broadcast_object_list(told, src=0, device=torch.device("cpu"))
    return cast(T, told[0])


# --------------------------------------------------------------------------------------------------
# 5 Extraction
# --------------------------------------------------------------------------------------------------

# A token's random numbers are SplitMix64 of (seed, index, position, counter): the counter is the
# vocabulary id, so neither batch nor chunk nor worker can change them. int64 products wrap alike on
# every device. Source: Steele, Lea, Flood, "Fast splittable pseudorandom number generators", 2014.
SPLITMIX_STEP = 0x9E3779B97F4A7C15 - 2**64  # the constants as int64, which is what torch has
SPLITMIX_FACTORS = (0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64)

REFERENCE_AT_ONCE = 2**20  # logits per float64 temporary of the plain implementation: 8 MB
LOWEST = -3.4028234663852886e38  # for a maximum of -inf: -inf minus -inf would be NaN
BLOCK = 64  # vocabulary ids per block of the fast path; a number in the kernel, too
WEIGHED_AT_ONCE = {"cpu": 2**17, "cuda": 2**24}  # logits in its first look: 0.5 MB, 64 MB
HELD_AT_ONCE = {"cpu": 2**19, "cuda": 2**24}  # and in its second: temporaries of 4, 128 MB at most
BLOCK_STREAM = 2**32  # random counters of blocks start here, above every vocabulary id
HELD_BLOCKS = 100  # of a row, at least, get the second look and float64, however small K is
SPARE_BLOCKS = 4  # float32 weights misplace a block by more than this once in 1e20 tokens
POINT_STREAM = 2**33  # the counter of a token's one number for its points
POINT_SLACK = 1e-12  # relative: what is at the threshold but for rounding is kept, and 1 / 255 fits
NUCLEUS_SLACK = 1e-13  # rounding of a float64 sum of 255 probabilities; decides exact ties only


@dataclass(frozen=True)
class ExtractedTokens:
    """What is kept of N teacher distributions; entries beyond `top_counts` are finite, no more.

    A row is not usable where its log-sum-exp is not finite (the logits hold NaN or +inf, or nothing
    but -inf), or where masks of -inf leave fewer than M tokens outside the nucleus. Such a row's
    ids are valid and its logits finite, but mean nothing.
    """

    logsumexp: torch.Tensor  # (N,) float64, over the full vocabulary
    top_ids: torch.Tensor  # (N, K) int32, by descending logit, ties: lower id first
    top_logits: torch.Tensor  # (N, K) float32
    top_counts: torch.Tensor  # (N,) int32, nucleus size, 1..K; of compact rows 0..K
    sampled_ids: torch.Tensor  # (N, M) int32, in the order drawn; of compact rows: of points
    sampled_logits: torch.Tensor  # (N, M) float32; of compact rows (N, 0)
    sampled_counts: torch.Tensor  # (N,) int32, how many of the sampled ids count: M, or the points
    usable: torch.Tensor  # (N,) bool


@dataclass
class GPUBatchResult:
    """All that is kept of one batch, quantized; tensors on the device, or numpy after `to_host`."""

    ready = cast(Any, None)  # the CUDA event behind the last kernel; no annotation, so no field

    logsumexp: Any  # (N,) float64
    nucleus_mass: Any  # (N,) float64, probability inside the nucleus
    top_ids: Any  # (N, K) int32
    top_q: Any  # (N, K) int32, 0..65535
    top_counts: Any  # (N,) int32
    top_min: Any  # (N,) float32
    top_max: Any  # (N,) float32
    sampled_ids: Any  # (N, M) int32
    sampled_q: Any  # (N, M) int32, 0..65535; of compact rows (N, 0)
    sampled_min: Any  # (N,) float32
    sampled_max: Any  # (N,) float32
    sampled_counts: Any  # (N,) int32
    actual_logits: Any  # (N,) float32, logit of the token that is really there
    usable: Any  # (N,) bool

    def to_host(self) -> GPUBatchResult:
        """Return the same as numpy arrays, by one device-to-host transfer.

        On CUDA it waits for this batch alone, not for what was launched after it, so another
        thread can fetch a batch while the next one runs.
        """
        tensors = {f.name: getattr(self, f.name) for f in fields(self)}
        names = sorted(tensors, key=lambda name: -tensors[name].element_size())  # keeps alignment
        buffer = fetch_bytes([tensors[name] for name in names], self.ready)
        arrays, start = {}, 0
        for name in names:
            tensor = tensors[name]
            raw = buffer[start : start + tensor.nbytes]
            dtype = torch.empty(0, dtype=tensor.dtype).numpy().dtype
            arrays[name] = raw.view(dtype).reshape(tuple(tensor.shape))
            start += tensor.nbytes
        return GPUBatchResult(**arrays)


def fetch_bytes(tensors: list[torch.Tensor], ready: Any) -> npt.NDArray[np.uint8]:
    """Return the bytes of tensors one after the other, by one transfer, once `ready` has passed."""

    def joined() -> torch.Tensor:
        return torch.cat([t.contiguous().view(torch.uint8).flatten() for t in tensors])

    if ready is None:
        return joined().cpu().numpy()
    stream = copy_stream(tensors[0].device)
    stream.wait_event(ready)
    with torch.cuda.stream(stream):
        source = joined()
        host = torch.empty(source.shape, dtype=torch.uint8, pin_memory=True)
        host.copy_(source, non_blocking=True)
    stream.synchronize()
    return host.numpy()


COPY_STREAMS = threading.local()


def copy_stream(device: torch.device) -> Any:
    """Return the CUDA stream on which this thread copies from a device, always the same one.

    Memory stays with the stream that it was first used on: with a new one for each batch, torch
    would come to keep 32 copies of the largest result.
    """
    streams = COPY_STREAMS.__dict__
    if str(device) not in streams:
        streams[str(device)] = torch.cuda.Stream(device)
    return streams[str(device)]


def gpu_process_batch(
    teacher: Any,
    batch: Batch,
    *,
    top_p: float,
    top_p_max: int,
    sampled_n: int,
    seed: int,
    min_p: float | None = None,
    logit_bits: int = 16,
    reference: bool = False,
) -> GPUBatchResult:
    """Run the teacher on a batch and keep nucleus, tail and log-sum-exp of every wanted position.

    The logits come and go in chunks of positions, so nothing grows with batch times vocabulary.
    """
    positions = [row.token_positions for row in batch.rows]
    index = np.repeat([row.index for row in batch.rows], [p.size for p in positions])
    actual = np.concatenate([row.input_ids[row.token_positions] for row in batch.rows])
    columns = torch.from_numpy(
        np.stack([index, np.concatenate(positions), actual]).astype(np.int64)
    )
    options: dict[str, Any] = {"top_p": top_p, "top_p_max": top_p_max, "sampled_n": sampled_n}
    options |= {"min_p": min_p, "seed": seed, "reference": reference}
    parts, start = [], 0
    for logits in teacher.iter_logits([row.input_ids for row in batch.rows], positions):
        if start == 0:
            columns = send(columns, logits.device)
        chunk = columns[:, start : start + logits.shape[0]]
        tokens = extract_tokens(logits, chunk[0], chunk[1], **options)
        actual_logits = logits.gather(1, chunk[2].unsqueeze(1)).squeeze(1).float()
        actual_logits = actual_logits.to(tokens.logsumexp.device)
        parts.append(quantize_tokens(tokens, actual_logits, bits=logit_bits))
        start += logits.shape[0]
        del logits  # before the next chunk is made
    result = concatenate(parts)
    if result.logsumexp.is_cuda:
        result.ready = torch.cuda.current_stream(result.logsumexp.device).record_event()
    return result


def extract_tokens(
    logits: torch.Tensor,
    index: torch.Tensor,
    position: torch.Tensor,
    *,
    top_p: float,
    top_p_max: int,
    sampled_n: int,
    seed: int,
    min_p: float | None = None,
    reference: bool = False,
) -> ExtractedTokens:
    """Keep nucleus, tail sample and log-sum-exp of each row of logits.

    Args:
        logits: (N, V) bfloat16, float16 or float32; never modified.
        index: (N,) int64, id of the conversation.
        position: (N,) int64, position in it of the token that the row predicts.
        top_p: probability that the nucleus covers, in (0, 1]; 1: every token that is possible.
        top_p_max: K, nucleus tokens at most.
        sampled_n: M, tokens drawn from outside the nucleus.
        seed: the tail is a function of (seed, index, position) and the logits.
        min_p: T, compact rows instead: all tokens of at least this probability, and points on the
            rest at equal distances of at most T; the three sizes above mean nothing then.
        reference: extract by the definition.

    Returns:
        Tensors on the device of `logits`; on the CPU where that is mps, which has no float64.

    Raises:
        ConfigError: the vocabulary has fewer than M tokens outside a full nucleus.
    """
    if min_p is None:
        check_candidates(logits.shape[1], top_p_max=top_p_max, sampled_n=sampled_n)
    if logits.device.type == "mps":
        logits, index, position = logits.cpu(), index.cpu(), position.cpu()
    states = row_states(index, position, seed=seed)
    count, vocab = logits.shape
    sizes: dict[str, Any] = {"top_p": top_p, "top_p_max": top_p_max, "sampled_n": sampled_n}
    extract: Callable[..., ExtractedTokens]
    extract = extract_by_definition if reference else extract_by_blocks
    looks = top_p_max, sampled_n
    if min_p is not None:
        sizes = {"min_p": min_p}
        extract = extract_compact_by_definition if reference else extract_compact
        looks = most_tokens(min_p), most_tokens(min_p) // 4  # points are few where text is natural
    held = min(vocab, BLOCK * (max(looks[0], HELD_BLOCKS) + looks[1])) + vocab // BLOCK
    at_once = REFERENCE_AT_ONCE // vocab if reference else HELD_AT_ONCE[logits.device.type] // held
    slices = row_slices(count, max(1, at_once))
    return concatenate([extract(logits[rows], states[rows], **sizes) for rows in slices])


def check_candidates(vocab_size: int, *, top_p_max: int, sampled_n: int) -> None:
    """Refuse a tail sample that a full nucleus would leave too few tokens for.

    Raises:
        ConfigError: K + M exceeds the vocabulary.
    """
    left = vocab_size - min(top_p_max, vocab_size)
    if sampled_n > left:
        raise ConfigError(
            f"--sampled-n {sampled_n} is more than the {left} tokens that --top-p-max {top_p_max} "
            f"leaves of a vocabulary of {vocab_size}; lower one of the two"
        )


def extract_by_definition(
    logits: torch.Tensor, states: torch.Tensor, *, top_p: float, top_p_max: int, sampled_n: int
) -> ExtractedTokens:
    """Extract as the definition reads, in float64 over the whole vocabulary: the reference.

    The tail is the Gumbel-max trick: the M largest of logit + noise outside the nucleus.
    """
    exact = logits.double()  # (N, V)
    logsumexp = exact.logsumexp(-1)
    top_ids = top_k_ids(logits, top_p_max)  # (N, K)
    counts = count_nucleus(exact.gather(1, top_ids), logsumexp, top_p=top_p)
    vocabulary = torch.arange(logits.shape[1], device=logits.device)
    keys = exact - exponential_clocks(states, vocabulary).log_()  # Gumbel noise is -log(Exp(1))
    in_nucleus = column_numbers(top_ids) < counts.unsqueeze(1)
    keys.scatter_(1, top_ids, keys.gather(1, top_ids).masked_fill_(in_nucleus, float("-inf")))
    drawn = keys.topk(sampled_n)
    usable = logsumexp.isfinite() & drawn.values.isfinite().all(-1)
    return collect_tokens(logits, logsumexp, top_ids, counts, drawn.indices, usable, top_p_max)


def extract_by_blocks(
    logits: torch.Tensor, states: torch.Tensor, *, top_p: float, top_p_max: int, sampled_n: int
) -> ExtractedTokens:
    """Extract with one read of the logits and a second look at the few blocks that matter.

    Equal to `extract_by_definition` in everything but the tail, which has the same law.
    """
    weights, top, top_ids, logsumexp = read_blocks(logits, max(top_p_max, HELD_BLOCKS))
    counts = count_nucleus(top[:, :top_p_max], logsumexp, top_p=top_p)
    sampled_ids, complete = sample_tail(
        logits, states, weights, top=top, top_ids=top_ids, counts=counts, sampled_n=sampled_n
    )
    usable = logsumexp.isfinite() & complete
    top_ids = top_ids[:, :top_p_max]
    return collect_tokens(logits, logsumexp, top_ids, counts, sampled_ids, usable, top_p_max)


def read_blocks(
    logits: torch.Tensor, k: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the weights of the blocks without the k largest logits, these, and log-sum-exp.

    The k blocks with the largest maxima hold the k largest logits: any logit elsewhere has k larger
    ones, or equal ones of lower id. All that is in them is summed in float64, which leaves the
    errors of float32 sums to what weighs least: 1e-9 of the log-sum-exp as a rule, 5e-9 at worst.

    Returns:
        (N, C) float64 log-sum-exp of each block without them; (N, k) float64 in descending order
        and (N, k) int64 ids; (N,) float64 log-sum-exp of the row.
    """
    k = min(k, logits.shape[1])
    maxima, sums = weigh_blocks(logits)  # (N, C)
    weights = maxima.double() + sums.double().log_()
    blocks = top_k_ids(maxima, k).sort(-1).values  # (N, <= k), ascending as ids are
    held = gather_blocks(logits, blocks)  # (N, <= k, BLOCK) float32
    at = top_k_ids(held.flatten(1), k)
    top = held.flatten(1).gather(1, at).double()  # (N, k)
    top_ids = blocks.gather(1, at // BLOCK) * BLOCK + at % BLOCK
    top_ids.clamp_(max=logits.shape[1] - 1)  # padding is above the NaN of a CPU, which is negative
    held.flatten(1).scatter_(1, at, float("-inf"))
    maxima, sums = sum_blocks(held.double())
    weights.scatter_(1, blocks, maxima + sums.log_())
    logsumexp = torch.logaddexp(weights.logsumexp(-1), top.logsumexp(-1))
    return weights, top, top_ids, logsumexp


def extract_compact_by_definition(
    logits: torch.Tensor, states: torch.Tensor, *, min_p: float
) -> ExtractedTokens:
    """Extract compact rows as their definition reads, in float64 over the whole vocabulary."""
    logsumexp = logits.double().logsumexp(-1)
    usable = logsumexp.isfinite()
    chances = (logits.double() - logsumexp.unsqueeze(1)).exp_()  # (N, V)
    top_ids = top_k_ids(logits, most_tokens(min_p))
    kept = chances >= min_p * (1 - POINT_SLACK)
    rest = chances.masked_fill_(kept | ~usable.unsqueeze(1), 0)
    sums = rest.cumsum(-1)
    points, drawn = spread_points(states, sums[:, -1], min_p=min_p)
    sampled_ids = torch.searchsorted(sums, points, right=True)
    return collect_points(logits, logsumexp, top_ids, kept.sum(-1), sampled_ids, drawn, usable)


def extract_compact(logits: torch.Tensor, states: torch.Tensor, *, min_p: float) -> ExtractedTokens:
    """Extract compact rows with one read: points are found among the blocks, then inside theirs.

    Equal to `extract_compact_by_definition`, but that a point may fall to the neighbour where it
    lies on the edge between two tokens. Blocks are laid out by float32 sums, which moves the
    probability that a token is hit by 1e-7 of it at most; inside a block all is float64.

    Source: Madow, "On the theory of systematic sampling, II", 1949.
    """
    most = most_tokens(min_p)
    weights, top, top_ids, logsumexp = read_blocks(logits, max(most, HELD_BLOCKS))
    usable = logsumexp.isfinite()
    chances = (top - logsumexp.unsqueeze(1)).exp_()
    kept = chances >= min_p * (1 - POINT_SLACK)
    counts = kept.sum(-1)
    rest = (weights - logsumexp.unsqueeze(1)).exp_()  # (N, C)
    rest.scatter_add_(1, top_ids // BLOCK, chances.masked_fill_(kept, 0))
    rest.masked_fill_(~usable.unsqueeze(1), 0)
    ends = rest.cumsum(-1)
    points, drawn = spread_points(states, ends[:, -1], min_p=min_p)
    blocks = torch.searchsorted(ends, points, right=True).clamp_(max=ends.shape[1] - 1)
    wanted = column_numbers(points) < drawn.unsqueeze(1)
    rows, block = wanted.nonzero()[:, 0], blocks[wanted]
    values = gather_blocks(logits, block, rows).double()  # (points of all rows, BLOCK)
    cut = torch.where(kept, top, float("inf")).amin(-1)  # the smallest logit that is kept
    values.masked_fill_(values >= cut[rows].unsqueeze(1), float("-inf"))
    inside = values.softmax(-1).cumsum(-1)  # of the block: against the row, it may underflow
    before = ends[rows, block] - rest[rows, block]
    share = (points[wanted] - before) / rest[rows, block]
    place = below(inside[:, -1] * share.clamp_(0, 1), inside[:, -1]).unsqueeze(1)
    at = torch.searchsorted(inside, place, right=True).squeeze(1)
    sampled_ids = blocks.masked_scatter(wanted, block * BLOCK + at)
    return collect_points(logits, logsumexp, top_ids[:, :most], counts, sampled_ids, drawn, usable)


def most_tokens(min_p: float) -> int:
    """Return how many tokens, and how many points, there are at most: 2..255."""
    return math.floor((1 + POINT_SLACK) / min_p)


def spread_points(
    states: torch.Tensor, total: torch.Tensor, *, min_p: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return points at equal distances of at most min_p on 0..total, (N, P) float64, ascending.

    And how many of a row count, (N,): as few as possible. One uniform number a row shifts them.
    """
    most = math.ceil((1 - POINT_SLACK) / min_p)
    drawn = (total * ((1 - POINT_SLACK) / min_p)).ceil_().clamp_(max=most)
    first = uniform_numbers(states, torch.full_like(states, POINT_STREAM))
    numbers = torch.arange(most, device=states.device)
    points = (first + numbers) * (total / drawn.clamp(min=1)).unsqueeze(1)
    return below(points, total.unsqueeze(1)), drawn.int()


def below(values: torch.Tensor, limit: torch.Tensor) -> torch.Tensor:
    """Return the values, and what rounding put at the limit or beyond as the next below it."""
    return torch.minimum(values, torch.nextafter(limit, torch.zeros_like(limit)))


def collect_points(
    logits: torch.Tensor,
    logsumexp: torch.Tensor,
    top_ids: torch.Tensor,
    counts: torch.Tensor,
    sampled_ids: torch.Tensor,
    drawn: torch.Tensor,
    usable: torch.Tensor,
) -> ExtractedTokens:
    """Look up the logits that are kept of compact rows, and make rows without use harmless."""
    no_ids = top_ids[:, :0]
    tokens = collect_tokens(logits, logsumexp, top_ids, counts, no_ids, usable, top_ids.shape[1])
    sampled_ids = sampled_ids.clamp(max=logits.shape[1] - 1).int()
    sampled_ids.masked_fill_(column_numbers(sampled_ids) >= drawn.unsqueeze(1), 0)
    return replace(tokens, sampled_ids=sampled_ids, sampled_counts=drawn)


def weigh_blocks(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what `sum_blocks` does of each block of vocabulary ids, in one read of (N, V)."""
    if logits.is_cuda and (read := read_kernel(logits.device)) is not None:
        return read(logits)
    parts = [sum_blocks(values) for values in split_blocks(logits)]
    return torch.cat([m for m, _ in parts], 1), torch.cat([s for _, s in parts], 1)


def sum_blocks(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the maximum of each block and its sum of exp(logit - maximum), (N, C) each.

    Against its own maximum no block underflows, however small it is.

    Args:
        values: (N, C, W) logits; float64 ones are summed in float64, all others in float32.
    """
    rows, count, width = values.shape
    dtype = torch.promote_types(values.dtype, torch.float32)
    maxima, sums = values.new_empty(2, rows, count, dtype=dtype)
    step = max(1, WEIGHED_AT_ONCE[values.device.type] // (count * width))
    buffer = values.new_empty(min(step, rows), count, width, dtype=dtype)
    for at in row_slices(rows, step):
        chunk, top = values[at], maxima[at]
        shifted = buffer[: len(chunk)]
        top[:] = chunk.amax(-1)
        torch.sub(chunk, top.clamp(min=LOWEST).unsqueeze(2), out=shifted)
        torch.sum(shifted.exp_(), -1, out=sums[at])
    return maxima, sums


def split_blocks(logits: torch.Tensor) -> list[torch.Tensor]:
    """Return the blocks as (N, C, 64): a view of the whole ones, and a ragged last one padded."""
    whole, rest = divmod(logits.shape[1], BLOCK)
    parts = []
    if whole:
        parts.append(logits[:, : whole * BLOCK].unflatten(1, (whole, BLOCK)))
    if rest:
        last = logits[:, whole * BLOCK :].unsqueeze(1)
        parts.append(torch.nn.functional.pad(last, (0, BLOCK - rest), value=float("-inf")))
    return parts


def gather_blocks(
    logits: torch.Tensor, blocks: torch.Tensor, rows: torch.Tensor | None = None
) -> torch.Tensor:
    """Return the logits of blocks, float32, padded with -inf.

    Numbers of (N, C) blocks, some of each row, give (N, C, BLOCK); (n,) blocks of as many `rows`
    give (n, BLOCK).
    """
    whole, *last = split_blocks(logits)
    if rows is None:
        rows = torch.arange(blocks.shape[0], device=blocks.device).unsqueeze(1)
    if whole.is_contiguous() and not last:  # one copy per block, four times as fast on a CPU
        number = (blocks + rows * whole.shape[1]).flatten()
        return whole.view(-1, BLOCK).index_select(0, number).view(*blocks.shape, BLOCK).float()
    values = whole[rows, blocks.clamp(max=whole.shape[1] - 1)].float()
    if last:
        tail = last[0][rows, 0].float()
        values = torch.where((blocks == whole.shape[1]).unsqueeze(-1), tail, values)
    return values


def sample_tail(
    logits: torch.Tensor,
    states: torch.Tensor,
    weights: torch.Tensor,
    *,
    top: torch.Tensor,
    top_ids: torch.Tensor,
    counts: torch.Tensor,
    sampled_n: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw M tokens without replacement from outside the nucleus, in order.

    The Gumbel-max trick is a race: token i arrives after Exp(1) / p_i, the first M win. Here the k
    largest race one by one and all others in blocks, by the blocks' weights; a block's clock is the
    first arrival in it, so the first M tokens are in the first M blocks or among the k. The order
    inside a block comes from its tokens' own clocks, set so that the first one arrives with the
    block: when is independent of who, and as clocks have no memory, the others' delays after the
    first are unchanged. All in logarithms, so nothing underflows.

    Args:
        weights: (N, C) float64, log-sum-exp of each block without the k largest; float32 accuracy
            is enough, since a few spare blocks run and all that run are weighed again.
        top: (N, k) float64, the k largest logits in order.
        top_ids: (N, k) int64, their ids.
        counts: (N,) how many of them are the nucleus.

    Returns:
        (N, M) int64 ids, and (N,) bool: there were M possible tokens.

    Source: Kool, van Hoof, Welling, "Stochastic beams and where to find them", 2019, for the
    sampling of maxima before what they are the maxima of.
    """
    first = BLOCK_STREAM + column_numbers(weights)
    noise = exponential_clocks(states, first).log_()  # (N, C) float64
    runners = min(sampled_n + SPARE_BLOCKS, weights.shape[1])
    blocks = (noise - weights).topk(runners, largest=False, sorted=False).indices
    ids = blocks.unsqueeze(2) * BLOCK + torch.arange(BLOCK, device=blocks.device)
    values = gather_blocks(logits, blocks)  # (N, runners, BLOCK)
    last, last_id = top[:, -1:, None], top_ids[:, -1:, None]
    apart = (values < last) | ((values == last) & (ids > last_id))  # not one of the k largest
    values = values.masked_fill(~apart, float("-inf")).double()
    start = (noise.gather(1, blocks) - values.logsumexp(-1)).unsqueeze(2)  # (N, runners, 1)
    clocks = exponential_clocks(states.unsqueeze(2), ids).log_().sub_(values)
    delay = (clocks - clocks.amin(-1, keepdim=True)).neg_().expm1_().neg_().log_()
    arrival = torch.logaddexp(start, delay + clocks)
    arrival = arrival.masked_fill_(values == float("-inf"), float("inf")).flatten(1)
    left = top.masked_fill(column_numbers(top) < counts.unsqueeze(1), float("-inf"))
    alone = exponential_clocks(states, top_ids).log_().sub_(left)  # (N, k)
    drawn = torch.cat([arrival, alone], 1).topk(sampled_n, largest=False)
    ids = torch.cat([ids.flatten(1), top_ids], 1)
    sampled_ids = ids.gather(1, drawn.indices).clamp_(max=logits.shape[1] - 1)
    return sampled_ids, drawn.values.isfinite().all(-1)


def collect_tokens(
    logits: torch.Tensor,
    logsumexp: torch.Tensor,
    top_ids: torch.Tensor,
    counts: torch.Tensor,
    sampled_ids: torch.Tensor,
    usable: torch.Tensor,
    top_p_max: int,
) -> ExtractedTokens:
    """Look up the logits of the chosen ids, and make rows that cannot be used harmless."""
    missing = top_p_max - top_ids.shape[1]  # K may exceed the vocabulary
    top_ids = torch.nn.functional.pad(top_ids, (0, missing))
    top, sampled = (
        logits.gather(1, ids).float().nan_to_num(0.0, posinf=0.0, neginf=0.0)
        for ids in (top_ids, sampled_ids)
    )
    drawn = torch.full_like(counts, sampled_ids.shape[1]).int()
    return ExtractedTokens(
        logsumexp, top_ids.int(), top, counts.int(), sampled_ids.int(), sampled, drawn, usable
    )


def count_nucleus(
    top_logits: torch.Tensor, logsumexp: torch.Tensor, *, top_p: float
) -> torch.Tensor:
    """Return the length of the shortest prefix whose probability is at least top_p, at least 1.

    At top_p = 1 the sum reaches 1 where rounding pleases; there every possible token counts, so
    that none is lost.

    Args:
        top_logits: (N, K) float64, descending.
        logsumexp: (N,) float64.
    """
    possible = (top_logits > float("-inf")).sum(-1)
    if top_p >= 1:
        return possible.clamp_(min=1)
    reached = (top_logits - logsumexp.unsqueeze(1)).exp_().cumsum(-1)  # (N, K) float64
    short = (reached < top_p - NUCLEUS_SLACK).sum(-1)
    return torch.minimum(short + 1, possible).clamp_(min=1)


def top_k_ids(values: torch.Tensor, k: int) -> torch.Tensor:
    """Return the columns of the k largest values of each row, descending, ties: lower column first.

    `torch.topk` leaves ties open, and bfloat16 rows tie across rank 100 more often than not. So
    value and column become one integer key, and keys are never equal.

    Args:
        values: (N, C) bfloat16, float16 or float32, C up to 2**31.

    Returns:
        (N, min(k, C)) int64.
    """
    columns = values.shape[1]
    k = min(k, columns)
    bits = (values.float() + 0.0).view(torch.int32)  # + 0.0 makes -0.0 and 0.0 one value
    order = bits.bitwise_xor_((bits >> 31).bitwise_and_(0x7FFFFFFF))  # in the order of the floats
    last_first = torch.arange(columns - 1, -1, -1, device=values.device)
    keys = order.long().bitwise_left_shift_(31).bitwise_or_(last_first)
    if keys.device.type == "cpu":  # numpy selects with vector instructions, five times as fast
        start = columns - k
        best = np.partition(keys.numpy(), start, axis=1)[:, start:] if start else keys.numpy()
        largest = torch.from_numpy(np.sort(best, axis=1)).flip(1)
    else:
        largest = keys.topk(k).values
    return (columns - 1) - (largest & 0x7FFFFFFF)


def column_numbers(values: torch.Tensor) -> torch.Tensor:
    """Return 0, 1, … for the columns of a matrix, on its device."""
    return torch.arange(values.shape[1], device=values.device)


def row_slices(rows: int, size: int) -> list[slice]:
    """Cut 0..rows into slices of at most `size`; no rows give one empty slice."""
    return [slice(start, min(start + size, rows)) for start in range(0, max(rows, 1), size)]


def concatenate(parts: list[T]) -> T:
    """Join results of one kind row after row."""
    if len(parts) == 1:
        return parts[0]
    names = [f.name for f in fields(cast(Any, parts[0]))]
    return type(parts[0])(**{n: torch.cat([getattr(p, n) for p in parts]) for n in names})


def row_states(index: torch.Tensor, position: torch.Tensor, *, seed: int) -> torch.Tensor:
    """Hash (seed, index, position) into the (N, 1) int64 states of the rows' random streams."""
    state = mix64_(torch.full_like(index, seed) + SPLITMIX_STEP)
    state = mix64_((state ^ index) + SPLITMIX_STEP)
    return mix64_((state ^ position) + SPLITMIX_STEP).unsqueeze(1)


def exponential_clocks(states: torch.Tensor, counters: torch.Tensor) -> torch.Tensor:
    """Return standard exponential variables, float64, above 0, a function of state and counter."""
    return uniform_numbers(states, counters).neg_().log1p_().neg_()


def uniform_numbers(states: torch.Tensor, counters: torch.Tensor) -> torch.Tensor:
    """Return numbers between 0 and 1, float64: the k-th output of SplitMix64 from a row's state."""
    bits = shift_right(mix64_(states + (counters + 1) * SPLITMIX_STEP), 11)  # 53 random bits
    return bits.double().add_(0.5).mul_(2.0**-53)


def mix64_(z: torch.Tensor) -> torch.Tensor:
    """Scramble int64 values in place, one to one: the finalizer of SplitMix64."""
    z.bitwise_xor_(shift_right(z, 30)).mul_(SPLITMIX_FACTORS[0])
    z.bitwise_xor_(shift_right(z, 27)).mul_(SPLITMIX_FACTORS[1])
    return z.bitwise_xor_(shift_right(z, 31))


def shift_right(z: torch.Tensor, bits: int) -> torch.Tensor:
    """Shift int64 values right as if they were unsigned."""
    return (z >> bits).bitwise_and_((1 << (64 - bits)) - 1)


def quantize_tokens(
    tokens: ExtractedTokens, actual_logits: torch.Tensor, *, bits: int
) -> GPUBatchResult:
    """Quantize nucleus and tail of each token and add up the nucleus' probability."""
    top_q, top_min, top_max = quantize_rows(tokens.top_logits, tokens.top_counts, bits=bits)
    sampled_q, sampled_min, sampled_max = quantize_rows(tokens.sampled_logits, bits=bits)
    beyond = column_numbers(tokens.top_logits) >= tokens.top_counts.unsqueeze(1)
    beyond |= ~tokens.usable.unsqueeze(1)
    probabilities = (tokens.top_logits.double() - tokens.logsumexp.unsqueeze(1)).exp_()
    return GPUBatchResult(
        logsumexp=tokens.logsumexp,
        nucleus_mass=probabilities.masked_fill_(beyond, 0).sum(-1),
        top_ids=tokens.top_ids,
        top_q=top_q,
        top_counts=tokens.top_counts,
        top_min=top_min,
        top_max=top_max,
        sampled_ids=tokens.sampled_ids,
        sampled_q=sampled_q,
        sampled_min=sampled_min,
        sampled_max=sampled_max,
        sampled_counts=tokens.sampled_counts,
        actual_logits=actual_logits,
        usable=tokens.usable,
    )


def quantize_rows(
    values: torch.Tensor, counts: torch.Tensor | None = None, *, bits: int = 16
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Quantize the first entries of each row over their own range, as `quantize_logits` does.

    Args:
        values: (N, C) float32.
        counts: (N,) entries per row; None: all. What lies beyond becomes 0, as all of no entries.
        bits: resolution kept, 4..16.

    Returns:
        (N, C) int32 in 0..65535, and the rows' minima and maxima, (N,) float32.
    """
    rows, width = values.shape
    if width == 0:
        return values.int(), values.new_zeros(rows), values.new_zeros(rows)
    last = width if counts is None else counts.unsqueeze(1)
    inside = column_numbers(values) < last
    low = values.masked_fill(~inside, float("inf")).amin(-1)
    high = values.masked_fill(~inside, float("-inf")).amax(-1)
    if counts is not None:  # a compact row may have no nucleus
        low, high = low.masked_fill_(counts == 0, 0), high.masked_fill_(counts == 0, 0)
    span = (high.double() - low.double()).unsqueeze(1)
    part = (values.double() - low.double().unsqueeze(1)) / span
    part = torch.where(inside & (span > 0), part, 0.0)
    levels = 2**bits - 1
    quantized = (part * levels).round_().mul_(65535 / levels).round_()
    return quantized.int(), low, high


# The read on a GPU: plain torch makes four passes over the logits there, this makes one.

tl: Any = None  # triton.language, once `read_kernel` has found it


@functools.cache
def read_kernel(device: torch.device) -> Callable[[Any], Any] | None:
    """Return `weigh_blocks` as one Triton kernel, None where it does not run or is not right."""
    global tl
    try:
        import triton
        import triton.language as tl

        jitted = triton.jit(weigh_kernel)

        def read(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            logits = logits if logits.stride(1) == 1 else logits.contiguous()
            (rows, vocab), group = logits.shape, 32
            count = -(-vocab // BLOCK)
            maxima, sums = torch.empty(2, rows, count, device=logits.device)
            with torch.cuda.device_of(logits):
                jitted[(rows * -(-count // group),)](
                    logits, logits.stride(0), maxima, sums, vocab, count, GROUP=group
                )
            return maxima, sums

        trial = torch.linspace(-9, 9, 2 * 300, device=device).view(2, 300)
        padded = torch.nn.functional.pad(trial, (0, 20), value=float("-inf"))
        want = sum_blocks(padded.unflatten(1, (5, BLOCK)))
        for ours, theirs in zip(read(trial), want, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=0)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # noqa: BLE001 - whatever Triton and its compiler raise
        logger.warning("logits are read by plain torch, slower: no kernel, %s", first_line(error))
        return None
    return read


def weigh_kernel(logits, row_stride, maxima, sums, vocab, count, GROUP: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return maximum and sum of 32 blocks of one row: `sum_blocks`.

    In loads of 16 bytes, where rows begin at multiples of 16 values. A NaN need not reach the
    maximum, but it always reaches the sum. Kernels see no constants of this module.
    """
    groups = tl.cdiv(count, GROUP)  # neighbours in launch order are neighbours in memory
    row = (tl.program_id(0) // groups).to(tl.int64)  # rows times vocabulary exceeds 32 bits
    block = tl.program_id(0) % groups * GROUP + tl.arange(0, GROUP)
    ids = block[:, None] * 64 + tl.arange(0, 64)[None, :]
    values = tl.load(logits + row * row_stride + ids, mask=ids < vocab, other=float("-inf"))
    values = values.to(tl.float32)
    top = tl.max(values, axis=1)
    floor = tl.maximum(top, -3.4028234663852886e38)
    total = tl.sum(tl.exp(values - floor[:, None]), axis=1)
    tl.store(maxima + row * count + block, top, mask=block < count)
    tl.store(sums + row * count + block, total, mask=block < count)


# --------------------------------------------------------------------------------------------------
# 6 Pack
# --------------------------------------------------------------------------------------------------

# Sums over a row's tokens that describe it until it is in a part: of the probability in the
# nucleus, and of that of the token that is really there.
FIGURE_COLUMNS = ("_mass", "_actual")


@dataclass(frozen=True)
class PackedBatch:
    """Rows in the shard schema plus the two figure columns, and what was left out."""

    table: pa.Table
    unusable: list[EncodedRow]  # NaN, +inf or too few finite logits at some token
    shared: bool = False  # several conversations went through the teacher together
    too_large: Batch | None = None  # its result did not fit beside others on the device


def packed_schema(schema: pa.Schema) -> pa.Schema:
    """Append the figure columns, which describe rows until they are in a shard."""
    for name in FIGURE_COLUMNS:
        schema = schema.append(pa.field(name, pa.float64()))
    return schema


def cpu_postprocess_batch(result: Any, batch: Batch, *, schema: pa.Schema) -> PackedBatch:
    """Turn a batch's result on the host into Arrow rows, without a loop over tokens.

    Rows with a token whose logits cannot be used are left out of the table and returned as they
    are: NaN may come from a neighbour in the batch, so the caller may try them alone.
    """
    sizes = np.asarray([row.token_positions.size for row in batch.rows], np.int64)
    starts = np.cumsum(sizes) - sizes
    good = np.logical_and.reduceat(result.usable, starts) if sizes.size else np.zeros(0, bool)
    rows = [row for row, usable in zip(batch.rows, good, strict=True) if usable]
    tokens = slice(None) if good.all() else np.repeat(good, sizes)  # all: nothing is copied
    columns = pack_columns(result, tokens, sizes[good], rows)
    wanted = packed_schema(schema)
    table = pa.Table.from_arrays([columns[name] for name in wanted.names], schema=wanted)
    unusable = [row for row, usable in zip(batch.rows, good, strict=True) if not usable]
    return PackedBatch(table, unusable, shared=len(batch.rows) > 1)


def pack_columns(
    result: Any,
    tokens: slice | npt.NDArray[np.bool_],
    sizes: npt.NDArray[np.int64],
    rows: Sequence[EncodedRow],
) -> dict[str, pa.Array]:
    """Build every column from the tokens that are kept; `sizes` are the tokens of each row."""
    counts = result.top_counts[tokens]
    nucleus = np.arange(result.top_ids.shape[1]) < counts[:, None]
    ends = np.cumsum(sizes)
    spent = np.concatenate(([0], np.cumsum(counts)))  # nucleus entries before each token
    top_sizes = np.diff(spent[np.concatenate(([0], ends))])
    drawn = result.sampled_counts[tokens]
    points = np.arange(result.sampled_ids.shape[1]) < drawn[:, None]
    tail = sum_rows(drawn, ends).astype(np.int64)
    ranged, range_sizes, stored = tokens, sizes, tail
    if not result.sampled_q.shape[1]:  # no tail, or points: no logits of it
        ranged, range_sizes, stored = slice(0), np.zeros_like(sizes), np.zeros_like(tail)
    probability = np.exp(result.actual_logits[tokens] - result.logsumexp[tokens])
    top_low, top_high = pack_ids(result.top_ids[tokens][nucleus], top_sizes)
    tail_low, tail_high = pack_ids(result.sampled_ids[tokens][points], tail)
    return {
        "index": pa.array([row.index for row in rows], pa.int32()),
        "num_tokens": pa.array(sizes, pa.int32()),
        "top_indices_low": top_low,
        "top_indices_high": top_high,
        "top_logits_quantized": as_list(result.top_q[tokens][nucleus], top_sizes, np.uint16),
        "top_counts": as_list(counts, sizes, np.uint8),
        "top_min": as_list(result.top_min[tokens], sizes, np.float32),
        "top_max": as_list(result.top_max[tokens], sizes, np.float32),
        "sampled_indices_low": tail_low,
        "sampled_indices_high": tail_high,
        "sampled_logits_quantized": as_list(
            result.sampled_q[tokens].reshape(-1), stored, np.uint16
        ),
        "sampled_min": as_list(result.sampled_min[ranged], range_sizes, np.float32),
        "sampled_max": as_list(result.sampled_max[ranged], range_sizes, np.float32),
        "logsumexp": as_list(result.logsumexp[tokens], sizes, np.float64),
        "input_ids": as_lists([row.input_ids for row in rows]),
        "token_positions": as_lists([row.token_positions for row in rows]),
        "sampled_counts": as_list(drawn, sizes, np.uint8),
        "_mass": pa.array(sum_rows(result.nucleus_mass[tokens], ends)),
        "_actual": pa.array(sum_rows(probability, ends)),
    }


def pack_ids(ids: npt.NDArray[Any], sizes: npt.NDArray[np.int64]) -> tuple[pa.Array, pa.Array]:
    """Pack flattened ids row by row: the low halves as lists, the high bits as one blob a row."""
    parts = np.split(ids, np.cumsum(sizes)[:-1]) if sizes.size else []
    high = pa.array([pack_indices(part)[1] for part in parts], pa.binary())
    return as_list(ids & 0xFFFF, sizes, np.uint16), high


def as_list(values: npt.NDArray[Any], sizes: npt.NDArray[np.int64], dtype: Any) -> pa.Array:
    """View flattened values as an Arrow list array of the given list sizes."""
    offsets = np.concatenate(([0], np.cumsum(sizes))).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values.astype(dtype)))


def as_lists(arrays: Sequence[npt.NDArray[np.int32]]) -> pa.Array:
    """Join one int32 array per row into an Arrow list array."""
    joined = np.concatenate([np.zeros(0, np.int32), *arrays])
    return as_list(joined, np.asarray([array.size for array in arrays], np.int64), np.int32)


def sum_rows(values: npt.NDArray[Any], ends: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """Add up per-token values row by row, float64; `ends` are the rows' last tokens plus one."""
    starts = np.concatenate(([0], ends[:-1])).astype(np.int64)
    filled, sums = ends > starts, np.zeros(ends.size)
    if filled.any():
        sums[filled] = np.add.reduceat(values.astype(np.float64), starts[filled])
    return sums


class AsyncPostProcessor:
    """Fetches and packs results in background threads while the teacher goes on.

    Args:
        process: called with what was submitted, in as many threads as results are under way.
        deliver: called with each outcome, in order, in the thread of the caller of `submit` and
            `flush`, so what it feeds needs no lock.
        depth: results under way at most; `submit` waits beyond.
    """

    def __init__(
        self, process: Callable[..., Any], deliver: Callable[[Any], None], *, depth: int = 2
    ) -> None:
        self.deliver = deliver
        self.process = process
        self.depth = depth
        self.pending: deque[Future[Any]] = deque()
        self.executor = ThreadPoolExecutor(max_workers=depth, thread_name_prefix="pack")

    def submit(self, *work: Any) -> None:
        """Hand over a result; raises what an earlier one raised."""
        while len(self.pending) >= self.depth or (self.pending and self.pending[0].done()):
            self.deliver(self.pending.popleft().result())
        self.pending.append(self.executor.submit(self.process, *work))

    def flush(self) -> None:
        """Wait until all that was submitted is delivered."""
        while self.pending:
            self.deliver(self.pending.popleft().result())

    def shutdown(self) -> None:
        """End the threads; what was not delivered is dropped."""
        self.pending.clear()
        self.executor.shutdown(wait=True, cancel_futures=True)


# --------------------------------------------------------------------------------------------------
# 7 Parts
# --------------------------------------------------------------------------------------------------

PART_NAME = re.compile(r"data/(?:\d+/)?part-(?:w\d+-)?\d{5,9}\.parquet")  # w: of version 0.1
CACHED_NAME = re.compile(r"(?:(?:backup_)?part|pending)-\d{5,9}\.parquet")
CHECKPOINT_NAME = re.compile(r"checkpoint(?:-w\d+)?\.json")
ROW_GROUP_TOKENS = 8192  # about 1.6 MB encoded: what random access to one row reads at most
ROW_GROUP_ROWS = 64
NO_PART = (  # what reading something else as a part raises
    *(pa.ArrowException, OSError, LookupError, ValueError, TypeError, AttributeError),
    RecursionError,
)
UNSUPPORTED = {errno.EBADF, errno.EINVAL, errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}


@dataclass(frozen=True)
class PartRecord:
    """What is known of a part without its rows: in its metadata, in checkpoints, for the card."""

    number: int
    ids: str  # `hash_ids` of the conversations selected for it
    conversations: int
    rows: int
    tokens: int
    nucleus: int  # ids stored in the nuclei
    capped: int  # tokens whose nucleus has all K ids
    mass: float  # probability inside the nucleus, summed over tokens
    actual: float  # probability of the token that is really there, summed likewise
    bytes: int = 0  # of the file
    skipped: Mapping[str, int] = field(default_factory=dict)  # conversations without a row


COLUMNS_OF_RECORDS = [entry.name for entry in fields(PartRecord) if entry.name != "skipped"]


@dataclass
class Part:
    """A part under way: what is selected for it, what is there, what is still to come."""

    number: int
    ids: list[int]
    left: set[int]
    skipped: dict[int, str] = field(default_factory=dict)
    tables: list[pa.Table] = field(default_factory=list)

    @property
    def rows(self) -> int:
        """Rows that are there."""
        return sum(table.num_rows for table in self.tables)

    def table(self, schema: pa.Schema) -> pa.Table:
        """Return its rows in the order of the selection, whatever order they came in."""
        rows = pa.concat_tables([packed_schema(schema).empty_table(), *self.tables])
        place = {index: at for at, index in enumerate(self.ids)}
        order = np.argsort([place[index] for index in rows["index"].to_pylist()])
        return rows.take(order.astype(np.int64))

    def describe(self, rows: pa.Table, nucleus_cap: int) -> dict[str, Any]:
        """Return the JSON that the metadata of its file holds."""
        counts = pc.list_flatten(rows["top_counts"].combine_chunks()).to_numpy()
        record = PartRecord(
            self.number,
            hash_ids(self.ids),
            len(self.ids),
            rows.num_rows,
            int(np.sum(rows["num_tokens"].to_numpy())),
            int(np.sum(counts, dtype=np.int64)),
            int(np.count_nonzero(counts == nucleus_cap)),
            float(np.sum(rows["_mass"].to_numpy())),
            float(np.sum(rows["_actual"].to_numpy())),
        )
        skipped = {str(index): self.skipped[index] for index in self.ids if index in self.skipped}
        return {**asdict(record), "skipped": skipped}


def read_record(description: Any, size: int = 0) -> PartRecord:
    """Return the record that a part's metadata describes.

    Raises:
        TypeError, ValueError: it describes none.
    """
    described = dict(description)
    values = {**described, "bytes": size}
    values = {name: values[name] for name in COLUMNS_OF_RECORDS}
    for name, value in values.items():
        wanted = {"ids": (str,), "mass": (int, float), "actual": (int, float)}.get(name, (int,))
        fits = isinstance(value, wanted) and not isinstance(value, bool)
        if not fits or not (isinstance(value, str) or 0 <= value < 2**63):  # nor is NaN
            raise ValueError(f"{name} is {value!r:.40}")
    reasons = Counter(str(reason) for reason in dict(described.get("skipped", {})).values())
    return PartRecord(**values, skipped=dict(reasons))


def write_part(path: Path, rows: pa.Table, schema: pa.Schema) -> int:
    """Write rows as a Parquet file that appears whole, its digest before it; return its bytes.

    The content depends on rows and schema alone.
    """

    def write(file: Path) -> None:
        ends = np.cumsum(rows["num_tokens"].to_numpy())
        with pq.ParquetWriter(file, schema, **writer_options(schema)) as writer:
            table, start = rows.select(schema.names).cast(schema), 0
            while start < table.num_rows:
                before = int(ends[start - 1]) if start else 0
                enough = int(np.searchsorted(ends, before + ROW_GROUP_TOKENS)) + 1
                stop = min(enough, start + ROW_GROUP_ROWS, table.num_rows)
                writer.write_table(table.slice(start, stop - start), row_group_size=stop - start)
                start = stop
        digest_path(path).write_text(digest_file(file))

    write_whole(path, write)
    return path.stat().st_size


def digest_path(path: Path) -> Path:
    """Return where the digest of a cached file is."""
    return path.with_name(f"{path.name}.sha256")


def digest_file(path: Path) -> str:
    """Return the SHA-256 of a file's content."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def remove_cached(path: Path) -> None:
    """Remove a cached file and its digest."""
    path.unlink(missing_ok=True)
    digest_path(path).unlink(missing_ok=True)


def read_metadata(source: Path | pa.BufferReader) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return what a part's footer says of it, and the settings of its run.

    Raises:
        NO_PART: it is none.
    """
    metadata = pq.read_metadata(source).metadata or {}
    described = json.loads(metadata[METADATA_PART])
    read_record(described)
    return described, dict(json.loads(metadata[METADATA_SETTINGS]))


DICTIONARY_BITS = 13  # up to 8,192 levels of a logit a dictionary is smaller than differences
DICTIONARY_VOCAB = 2**16  # tail ids of larger vocabularies repeat too seldom for a dictionary


def writer_options(schema: pa.Schema) -> dict[str, Any]:
    """Return the options of a writer that serve these columns best and that every reader knows.

    Splitting the bytes of ids and quantized logits too would save another tenth, but DuckDB before
    2.0 refuses that. Statistics of ids and logits would only make the footer larger.
    """
    encodings = choose_encodings(schema)
    return {
        "compression": "zstd",
        "compression_level": 2,
        "use_dictionary": [leaf for leaf, how in encodings.items() if how == "DICTIONARY"],
        "column_encoding": {leaf: how for leaf, how in encodings.items() if how != "DICTIONARY"},
        "write_statistics": ["index", "num_tokens"],
        "write_page_index": True,  # the Hub's viewer uses it
        "write_page_checksum": True,  # 4 bytes a page, which readers here verify
    }


def choose_encodings(schema: pa.Schema) -> dict[str, str]:
    """Return the Parquet encoding of each leaf column, by the settings that the schema carries.

    Quantized logits of 16 bits fill most of the levels: differences of neighbours are shortest.
    With few levels, and for ids, dictionaries are. Floats compress once their bytes are split.
    """
    settings = json.loads((schema.metadata or {}).get(METADATA_SETTINGS, b"{}"))
    few_levels = settings.get("logit_bits", 16) <= DICTIONARY_BITS
    small_vocab = (settings.get("vocab_size") or 0) <= DICTIONARY_VOCAB
    by_name = {
        "top_indices_low": "DICTIONARY",
        "top_logits_quantized": "DICTIONARY" if few_levels else "DELTA_BINARY_PACKED",
        "top_counts": "DICTIONARY",
        "sampled_counts": "DICTIONARY",
        "sampled_indices_low": "DICTIONARY" if small_vocab else "PLAIN",
        "sampled_logits_quantized": "DICTIONARY" if few_levels else "DELTA_BINARY_PACKED",
    }
    encodings = {}
    for column in schema:
        is_list = pa.types.is_list(column.type)
        leaf = f"{column.name}.list.element" if is_list else column.name
        floats = is_list and pa.types.is_floating(column.type.value_type)
        encodings[leaf] = by_name.get(column.name, "BYTE_STREAM_SPLIT" if floats else "PLAIN")
    return encodings


def write_whole(path: Path, write: Callable[[Path], Any]) -> None:
    """Make a file appear whole: temporary name, fsync, rename, fsync of its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = f"{os.getpid()}-{os.urandom(4).hex()}"  # containers on one disk share process ids
    temporary = path.with_name(f".{path.name}.{writer}.tmp")
    try:
        write(temporary)
        sync(temporary)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    if os.name != "nt":
        sync(path.parent)


def sync(path: Path) -> None:
    """Bring a file or the names in a folder to the disk, where the file system can."""
    handle = os.open(path, os.O_RDWR if path.is_file() else os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise
    finally:
        os.close(handle)


@contextmanager
def storage_errors(place: str) -> Iterator[None]:
    """Turn an OSError (full disk, no permission) into a HubError that says what to do."""
    try:
        yield
    except (OSError, pa.ArrowException, UnicodeEncodeError) as error:  # the last: of a name
        reason = getattr(error, "strerror", None) or first_line(error)
        if file := getattr(error, "filename", None):
            reason += f" ({file})"
        raise HubError(
            f"cannot write {place}: {reason}; make room or fix it, then continue with --resume "
            "(what the output lists is safe)"
        ) from error


def encode_json(content: Any) -> bytes:
    """Return JSON; equal content gives equal bytes."""
    return json.dumps(content, indent=1, sort_keys=True).encode() + b"\n"


def encode_checkpoint(job: str, records: Iterable[PartRecord]) -> bytes:
    """Return checkpoint.json: a list for each figure of the parts, which ascend."""
    known = sorted(records, key=lambda record: record.number)
    columns = {name: [getattr(record, name) for record in known] for name in COLUMNS_OF_RECORDS}
    skipped = {str(record.number): dict(record.skipped) for record in known if record.skipped}
    lines = [f"  {json.dumps(name)}: {json.dumps(values)}" for name, values in columns.items()]
    head = f'{{\n "format_version": 1,\n "job": {json.dumps(job)},\n "parts": {{\n'
    return (head + ",\n".join(lines) + f'\n }},\n "skipped": {json.dumps(skipped)}\n}}\n').encode()


def decode_checkpoint(data: bytes) -> tuple[str, dict[int, PartRecord]]:
    """Undo `encode_checkpoint`; what is not understood tells nothing."""
    try:
        content = json.loads(data)
        columns = [content["parts"][name] for name in COLUMNS_OF_RECORDS]
        skipped = {int(number): reasons for number, reasons in content["skipped"].items()}
        records = {}
        for values in zip(*columns, strict=True):
            described = dict(zip(COLUMNS_OF_RECORDS, values, strict=True))
            record = read_record(described, described["bytes"])
            reasons = {str(r): int(n) for r, n in skipped.get(record.number, {}).items()}
            records[record.number] = replace(record, skipped=reasons)
        return str(content["job"]), records
    except NO_PART:
        return "", {}


# --------------------------------------------------------------------------------------------------
# 8 Output
# --------------------------------------------------------------------------------------------------

RETRY_WAITS_S = (1, 2, 4, 8, 16, 32, 60)  # with jitter; a Retry-After that is longer wins
LONGEST_WAIT_S = 900.0  # whatever an answer asks for
PASSING_STATUS = {408, 409, 412, 425, 429}  # and every 5xx
REQUEST_S = 300.0  # of a whole request with its redirects and the client's own tries
LEFTOVER_S = 86_400.0  # age of a temporary file that nobody writes any more
GRACE_S = 2.0  # that a request has even when the run was told to stop
SLOWEST_UPLOAD_BYTES_PER_S = 200_000  # a commit slower than this is begun again
SMALL_FILE_BYTES = 32 * 2**20  # checkpoints, settings and cards are smaller
MOST_WAITING = 8  # parts on the disk that wait for delivery, or those of a window, which become
# whole at about the same time: with more of them the run has to wait
CLOSING_AT_ONCE = 6  # parts in memory that are encoded or wait for it
ENCODE_THREADS = 4  # each about 190,000 tokens a second
LOCK_WAIT_S = 6.0  # a process that was killed may have children that hold its lock a little longer


class OutOfReachError(HubError):
    """Every try failed in a way that can pass: later tries, or the next run, may succeed."""


class PassingError(Exception):
    """A request failed in a way that can pass; met inside `retry` only."""

    def __init__(self, message: str, *, retry_after_s: float = 0.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class Folder:
    """A destination that is a local folder: a commit is a row of renames, the checkpoint last.

    What the methods promise is what every destination does; its requests raise PassingError (try
    again) or HubError (no use).
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder, self.name = local_path(folder), str(folder)

    def open(self) -> None:
        """Make sure that it can be written, or made with the first commit."""
        with storage_errors(self.name):
            nearest = nearest_folder(self.folder / "data", flag="--output")
            if not os.access(nearest, os.W_OK | os.X_OK):
                raise PermissionError(errno.EACCES, f"no right to write in {nearest}")

    def create(self) -> None:
        """Get it ready for a commit: here, remove what processes left that were killed long ago."""
        for leftover in (self.folder / "data").rglob(".*.tmp"):
            with contextlib.suppress(OSError):  # others of the job clean up as well
                if time.time() - leftover.stat().st_mtime > LEFTOVER_S:
                    leftover.unlink()

    def list(self, paths: Iterable[str] | None = None) -> dict[str, int]:
        """Return the bytes of each file, or of those of some paths that are there now."""
        with storage_errors(self.name):
            found = itertools.chain(*map(self.folder.glob, ("*", "data/*", "data/*/*.parquet")))
            files = found if paths is None else map(self.folder.joinpath, paths)
            return {
                file.relative_to(self.folder).as_posix(): file.stat().st_size
                for file in files
                if file.suffix != ".tmp" and file.is_file()
            }

    def read(self, path: str, last: int = 0) -> bytes:
        """Return a small file, or so many of the last bytes of any."""
        with storage_errors(self.name), (self.folder / path).open("rb") as file:
            if last:
                file.seek(-min(last, os.fstat(file.fileno()).st_size), os.SEEK_END)
            return file.read(SMALL_FILE_BYTES)

    def commit(
        self, message: str, add: Mapping[str, Path | bytes], delete: Iterable[str] = ()
    ) -> None:
        """Remove and add files, all or nothing or the last one last; again changes nothing."""
        with storage_errors(self.name):
            for path in delete:  # first, or a crash would leave old rows beside new ones
                (self.folder / path).unlink(missing_ok=True)
            for path, content in add.items():
                write_whole(self.folder / path, functools.partial(put_content, content))


def put_content(content: Path | bytes, target: Path) -> None:
    """Write bytes, or the content of a file: by another name for it where that is possible."""
    if isinstance(content, bytes):
        target.write_bytes(content)
        return
    try:
        os.link(content, target)
    except OSError:
        shutil.copyfile(content, target)


def nearest_folder(path: Path, *, flag: str) -> Path:
    """Return the part of a folder's path that is there already.

    Raises:
        ConfigError: it is a file.
    """
    place = Path(os.path.realpath(path))  # Path.resolve raises where links lead in a ring
    nearest = next(part for part in (place, *place.parents) if part.exists())
    if not nearest.is_dir():
        raise ConfigError(f"{flag}: {nearest} is a file; name a folder, or remove the file")
    return nearest


class Hub:
    """A dataset repository of the Hub: a commit is one of git."""

    def __init__(self, repo: str, *, private: bool = False) -> None:
        from huggingface_hub import HfApi
        from huggingface_hub.utils import disable_progress_bars, validate_repo_id

        try:
            validate_repo_id(repo)
        except ValueError as error:
            raise ConfigError(f"--output {repo!r}: {first_line(error)}") from None
        limit_waiting()
        disable_progress_bars()  # the run has its own
        self.name, self.private, self.there = repo, private, False
        self.api = HfApi()

    def open(self) -> None:
        """Make sure that the token may write to the repository; `create` makes one.

        Raises:
            ConfigError: `--private`, but it exists and is public.
        """
        from huggingface_hub.errors import RepositoryNotFoundError

        with hub_errors(self.name):
            try:
                info = self.api.repo_info(self.name, repo_type="dataset")
            except RepositoryNotFoundError:
                self.api.whoami()  # refuses a token that is none
                return
            self.there = True
            self.api.auth_check(self.name, repo_type="dataset", write=True)
        if self.private and not info.private:
            raise ConfigError(
                f"{self.name} exists and is public: make it private in its settings on the Hub, or "
                "leave out --private"
            )

    def create(self) -> None:
        if not self.there:
            with hub_errors(self.name):
                self.api.create_repo(
                    self.name, repo_type="dataset", private=self.private, exist_ok=True
                )
            self.there = True

    def list(self, paths: Iterable[str] | None = None) -> dict[str, int]:
        from huggingface_hub.errors import RepositoryNotFoundError
        from huggingface_hub.hf_api import RepoFile

        with hub_errors(self.name), contextlib.suppress(RepositoryNotFoundError):
            if paths is None:
                found = self.api.list_repo_tree(self.name, recursive=True, repo_type="dataset")
            else:
                found = self.api.get_paths_info(self.name, [*paths], repo_type="dataset")
            return {file.path: file.size for file in found if isinstance(file, RepoFile)}
        return {}

    def read(self, path: str, last: int = 0) -> bytes:
        from huggingface_hub import get_session, hf_hub_url
        from huggingface_hub.utils import build_hf_headers, hf_raise_for_status

        url = hf_hub_url(self.name, path, repo_type="dataset", endpoint=self.api.endpoint)
        headers = build_hf_headers() | {"Accept-Encoding": "identity"}
        if last:
            headers["Range"] = f"bytes=-{last}"
        content = bytearray()
        with hub_errors(self.name), get_session().stream("GET", url, headers=headers) as answer:
            if answer.status_code == 416:  # there are no last bytes of an empty file
                return b""
            if answer.status_code >= 400:
                answer.read()
            hf_raise_for_status(answer)
            for block in answer.iter_bytes():
                content += block
                if len(content) > SMALL_FILE_BYTES:
                    break
        return bytes(content[:SMALL_FILE_BYTES])

    def commit(
        self, message: str, add: Mapping[str, Path | bytes], delete: Iterable[str] = ()
    ) -> None:
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete

        gone = {*delete} - add.keys()
        if gone:  # what is not there any more, as of a commit whose answer was lost, is refused
            gone &= self.list(gone).keys()
        operations: list[Any] = [
            *map(CommitOperationDelete, sorted(gone)),
            *(CommitOperationAdd(path, content) for path, content in add.items()),
        ]
        with hub_errors(self.name):
            self.api.create_commit(
                self.name, operations, commit_message=message, repo_type="dataset"
            )


Destination: TypeAlias = Folder | Hub


@contextmanager
def hub_errors(repo: str) -> Iterator[None]:
    """Turn what the Hub client raises into PassingError or HubError, without tokens."""
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HTTPError,
        LocalTokenNotFoundError,
        OfflineModeIsEnabled,
    )

    try:
        yield
    except (LogitsError, PassingError):
        raise
    except LocalTokenNotFoundError:
        raise HubError(explain_status(401, repo)) from None
    except OfflineModeIsEnabled:
        raise HubError(
            f"cannot reach {repo}: HF_HUB_OFFLINE is set; unset it, or give a folder as --output"
        ) from None
    except HfHubHTTPError as error:
        raise explain_refusal(error.response, error.server_message or "", repo) from None
    except (HTTPError, OSError, RuntimeError) as error:  # lines, proxies; a transfer, its cause
        why = f"{type(error).__name__}: {first_line(error)} {error.__cause__ or ''}"
        raise PassingError(f"{repo}: {why}".rstrip()) from None
    except UnicodeEncodeError:  # of the header that holds it
        raise HubError(
            f"{repo}: the access token is none: run `hf auth login`, or set HF_TOKEN"
        ) from None
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise PassingError(  # JSON of somebody else
            f"{repo}: the answer is not the Hub's ({type(error).__name__}: {first_line(error)})"
        ) from None


def explain_refusal(response: Any, said: str, repo: str) -> PassingError | HubError:
    """Return the error that an answer of the Hub means."""
    from huggingface_hub.utils import parse_ratelimit_headers

    status = response.status_code
    said = " ".join(said.split())[:300]
    if status in PASSING_STATUS or status >= 500 or "LFS pointer" in said:
        limit = parse_ratelimit_headers(response.headers)
        asked = response.headers.get("Retry-After", "").strip()
        wait_s = float(asked) if asked.isdigit() else 60.0 if status == 429 else 0.0
        if limit is not None and limit.remaining == 0:
            wait_s = float(limit.reset_in_seconds)
        message = f"{repo}: HTTP {status} {said}".rstrip()
        return PassingError(message, retry_after_s=min(wait_s, LONGEST_WAIT_S))
    return HubError(explain_status(status, repo, said))


def explain_status(status: int, repo: str, said: str = "") -> str:
    """Return what a status that no retry heals means, and the remedy."""
    remedy = {
        401: "the Hub does not know you: run `hf auth login`, or set HF_TOKEN",
        403: f"your token may not write to {repo}: run `hf auth login` with one that has the write "
        "permission, or give another --output",
        404: f"{repo} is not there, or not for you: check the name in --output, and `hf auth "
        "whoami`",
    }.get(status, "the Hub refused the request")
    return f"{repo}: HTTP {status}, {remedy}" + (f" (it said: {said})" if said else "")


def retry(
    request: Callable[[], T], should_stop: Callable[[], bool] = never, *, limit_s: float = REQUEST_S
) -> T:
    """Return what the request returns, trying again with growing waits while it can pass.

    A request has `limit_s` seconds. Where it takes longer, or `should_stop` says so, nobody waits
    for it any more: it goes on in a thread that ends with the process.

    Raises:
        OutOfReachError: the last try failed too, or `should_stop` said so.
        HubError: the request was refused.
    """
    for wait_s in (*RETRY_WAITS_S, None):
        try:
            return bounded(request, should_stop, limit_s)
        except PassingError as error:
            message = show_line(str(error))
            if wait_s is not None and not should_stop():
                pause_s = max(error.retry_after_s, wait_s * random.uniform(0.75, 1.25))
                logger.warning("%s; trying again in %.0f s", message, pause_s)
                if not wait_until(should_stop, pause_s):
                    continue
            raise OutOfReachError(f"{message}; when it can be reached again: --resume") from None
    raise AssertionError("the last try returns or raises")


def bounded(request: Callable[[], T], should_stop: Callable[[], bool], limit_s: float) -> T:
    """Run a request in a thread of its own, and wait for it no longer than is right."""
    outcome: Future[T] = Future()

    def run() -> None:
        try:
            outcome.set_result(request())
        except BaseException as error:  # noqa: BLE001 - raised in the thread that waits
            outcome.set_exception(error)

    threading.Thread(target=run, daemon=True, name="request").start()
    wait_until(outcome.done, min(GRACE_S, limit_s))
    wait_until(lambda: outcome.done() or should_stop(), limit_s)
    if not outcome.done():
        told = "told to stop while the Hub was asked"
        raise PassingError(told if should_stop() else f"no answer within {limit_s:.0f} s")
    return outcome.result()


def wait_until(condition: Callable[[], bool], limit_s: float) -> bool:
    """Wait until a condition holds, a signal handler's included; False when it takes too long."""
    end, pause_s = time.monotonic() + limit_s, 0.001
    while not condition():
        if time.monotonic() >= end:
            return False
        time.sleep(min(pause_s, max(0.0, end - time.monotonic())))
        pause_s = min(0.1, 2 * pause_s)
    return True


def is_local(name: str) -> bool:
    """Tell whether a model, dataset or output is a file or folder here rather than on the Hub."""
    return name.startswith((".", "/", "~")) or (name != "" and local_path(name).exists())


def open_destination(output: str, *, private: bool = False) -> Destination:
    """Return the destination that `--output` names, not opened yet.

    Raises:
        ConfigError: it names neither a folder nor a repository.
    """
    if not output.isprintable() or not (output.isascii() or is_local(output)):
        raise ConfigError(f"--output {output!r} is no name for a Hub dataset or a folder")
    if is_local(output):
        return Folder(output)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", output):
        raise ConfigError(
            f"--output {output!r} is neither user/name (a Hub dataset) nor a folder that exists or "
            f"starts with . / ~: write ./{output} for a folder"
        )
    return Hub(output, private=private)


def read_settings(
    destination: Destination, listed: Collection[str], should_stop: Callable[[], bool] = never
) -> dict[str, Any]:
    """Return extraction_config.json of an output, else what a part holds of it, else {}.

    Raises:
        ConfigError: it is not readable.
        HubError: the output refused or was out of reach.
    """
    if CONFIG_FILE not in listed:
        for path in sorted(filter(PART_NAME.fullmatch, listed)):
            with contextlib.suppress(*NO_PART):
                return read_footer(destination, path, should_stop)[1]
        return {}
    text = retry(lambda: destination.read(CONFIG_FILE), should_stop)
    kinds = {"rows_per_part": int, "limit": int, "numerics": dict, "options": dict}
    try:
        settings = parse_settings(text, destination.name)
        for name, kind in kinds.items():
            if type(value := settings.get(name)) not in (kind, type(None)):
                raise FormatError(f"{destination.name}: {name} is {value!r:.40}")
        if not 0 < (rows := settings.get("rows_per_part") or 1) < 2**31:
            raise FormatError(f"{destination.name}: rows_per_part is {rows}")
        return settings
    except FormatError as error:
        raise ConfigError(
            f"{CONFIG_FILE} is damaged ({error}): remove it (the parts hold the settings, too) and "
            "continue with --resume"
        ) from None


def read_footer(
    destination: Destination, path: str, should_stop: Callable[[], bool] = never
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return what a part of an output says of itself, and the settings of its run.

    Raises:
        NO_PART: it is none.
        HubError: the output refused or was out of reach.
    """

    def read_end(size: int) -> bytes:
        return retry(lambda: destination.read(path, size), should_stop)

    end = read_end(1 << 16)
    size = int.from_bytes(end[-8:-4], "little") + 8
    if end[-4:] == b"PAR1" and len(end) < size <= SMALL_FILE_BYTES:
        end = read_end(size)
    return read_metadata(pa.BufferReader(end))


def cache_key(output: str) -> str:
    """Return the folder name of the local state of one output."""
    local = is_local(output)
    hub = os.environ.get("HF_ENDPOINT", "")
    place = os.path.realpath(local_path(output)) if local else f"{hub} {output}"
    label = re.sub(r"[^\w.-]+", "-", place)[-40:].strip("-.")
    return f"{label}-{hashlib.sha256(place.encode()).hexdigest()[:12]}"


NUMERICS_OF_JOB = ("architecture", "weights", "quantization")  # the other ones may differ


def job_digest(settings: Mapping[str, Any]) -> str:
    """Return what stands for a job: equal where rows of one may stand beside rows of another.

    The names of local models and datasets do not count where digests of their content do.
    """
    kept = {name: value for name, value in settings.items() if name not in NOT_OF_JOB}
    for name in ("model", "dataset"):
        if str(settings.get(f"{name}_revision")).startswith("sha256:"):
            kept.pop(name, None)
    return hashlib.sha256(encode_json(kept)).hexdigest()[:16]


def compare_settings(there: Mapping[str, Any], here: Mapping[str, Any], place: str) -> None:
    """Refuse to go on with another job.

    Raises:
        ConfigError: lists what differs.
    """
    if not there:
        return
    changes = list_differences(there, here)
    before, now = there.get("limit"), here.get("limit")  # parts hold none
    if "limit" in there and now is not None and (before is None or now < before):
        changes.append(f"limit: {before or 'none'} there, {now} now, which would drop rows")
    if changes:
        raise ConfigError(
            f"{place} was begun with other settings: {'; '.join(changes)}. Use the same ones, "
            "another --output, or --force-restart to discard it"
        )


CARD_LINE = "<!-- Below this line the card is yours: updates keep it. -->"
CARD_OWNED_KEYS = ("configs", "pretty_name", "source_datasets")  # of the YAML
CARD = """\
# {{ title }}

The distributions of {{ settings.model }} over the assistant tokens of {{ settings.dataset }} (split
{{ settings.split }}), for distillation. One row is one conversation; row token `j` is the
distribution from which its `j`-th assistant token is predicted:
{%- if settings.min_p %} every id of probability {{ settings.min_p }} or more, a systematic sample
of the rest, ids only, of which each entry stands for an equal share of what the others leave of 1,
{%- else %} the nucleus, a sample of the rest drawn without replacement,
{%- endif %} and the log-sum-exp over the whole vocabulary, so that `exp(logit - logsumexp)` is a
probability.{% if settings.min_p %} Such rows are a third of the size and made for one use: the
forward KL divergence at temperature 1, whose gradient they give without bias.{% endif %}
{% macro table(rows) %}
| | |
|---|---|
{% for name, value in rows.items() -%}
| {{ name }} | {{ value }} |
{% endfor -%}
{% endmacro %}
{{ table({
  "conversations": "{:,}".format(stored.rows),
  "tokens": "{:,}".format(stored.tokens),
  "shards": "{:,} ({:,.1f} MB)".format(stored.shards, stored.bytes / 1e6),
  "bytes per token": "%.1f" | format(stored.bytes / tokens),
  "mean nucleus": "%.1f tokens" | format(records | sum("nucleus") / tokens),
  "nuclei of the largest size allowed": "{:.2%}".format(records | sum("capped") / tokens),
  "probability covered by the nucleus": "%.4f on average" | format(records | sum("mass") / tokens),
  "probability of the actual token": "%.4f on average" | format(records | sum("actual") / tokens),
}) }}
## Load

```python
import numpy as np
from datasets import load_dataset

row = next(iter(load_dataset({{ output | tojson | safe }}, split="train", streaming=True)))
low, counts = np.asarray(row["top_indices_low"], np.int64), np.asarray(row["top_counts"])
bits = np.unpackbits(np.frombuffer(row["top_indices_high"], np.uint8), bitorder="little")
high = (bits[0::2] + 2 * bits[1::2].astype(np.int64))[: low.size]
ids = low | high << 16
vmin, vmax = np.repeat(row["top_min"], counts), np.repeat(row["top_max"], counts)
logits = np.asarray(row["top_logits_quantized"]) / 65535 * (vmax - vmin) + vmin
probs = np.exp(logits - np.repeat(row["logsumexp"], counts))
print("first token:", ids[: counts[0]], probs[: counts[0]])
{%- if settings.min_p %}
points, rest = row["sampled_counts"][0], 1 - probs[: counts[0]].sum()
print("of the rest:", row["sampled_indices_low"][:points], "each", rest / max(points, 1))
{%- endif %}
```

## Settings
{{ table(settings) }}
## Columns

Lists hold all tokens of a row one after another; `top_counts` says how many nucleus entries each
token has{% if settings.min_p %}, `sampled_counts` how many of the sample
{%- endif %}. An id is `low | high << 16`, `high` packed two bits an id, first id lowest. A logit is
`q / 65535 * (max - min) + min`, by token.
"""


def make_card(
    output: str,
    settings: Mapping[str, Any],
    records: Iterable[PartRecord],
    previous: str = "",
) -> str:
    """Return README.md: what the dataset is, with figures, above what a person wrote.

    Of `previous`, what stands below `CARD_LINE` is kept, or all text of a card that lacks it, and
    the YAML keys that are not `CARD_OWNED_KEYS`. A card whose YAML is broken is left alone.
    """
    import jinja2
    import yaml

    match = re.match(r"---\s*\n(.{0,65536}?)\n---\s*(?:\n|$)", previous, re.DOTALL)
    try:
        kept = dict((yaml.safe_load(match[1]) if match else None) or {})
    except (yaml.YAMLError, ValueError, TypeError, RecursionError) as error:
        logger.warning(
            "the card of %s is not updated, its YAML is broken: %s", output, first_line(error)
        )
        return previous
    text = previous[match.end() :] if match and kept else previous  # rules of Markdown are no YAML
    head, line, below = text.partition(CARD_LINE)
    below = below if line else f"\n\n{head}".rstrip() + "\n"
    known = list(records)
    front, stored = describe_card(settings, known), count_stored(known)
    body = jinja2.Environment(autoescape=True).from_string(CARD)
    shown = body.render(
        title=table_cell(front["pretty_name"]),
        output=output,
        settings={
            name: table_cell(value)
            for name, value in settings.items()
            if value is not None and name != "options"  # paths of a machine
        },
        records=known,
        stored=stored,
        tokens=max(1, stored["tokens"]),
    )
    front |= {key: value for key, value in kept.items() if key not in CARD_OWNED_KEYS}
    yaml_text = yaml.safe_dump(front, sort_keys=False, allow_unicode=True)
    return f"---\n{yaml_text}---\n\n{shown}\n{CARD_LINE}{below}"


def table_cell(value: Any) -> str:
    """Return a value as text that stands in a cell of a Markdown table and acts on nothing."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return re.sub(r"([|`\\*_\[\]])", r"\\\1", " ".join(show_line(text).split()))[:500]


def describe_card(settings: Mapping[str, Any], records: Sequence[PartRecord]) -> dict[str, Any]:
    """Return the YAML of a card: what the Hub's viewer and search and `load_dataset` read."""
    source = str(settings.get("dataset"))
    nested = any(record.number >= PARTS_PER_FOLDER for record in records)
    path: Any = ["data/*.parquet", "data/*/*.parquet"] if nested else "data/*.parquet"
    name = show_line(f"Logits of {settings.get('model')} on {source}")
    return {
        "pretty_name": " ".join(re.sub("[<>]", " ", name).split())[:200],
        "tags": ["logits", "distillation", "knowledge-distillation"],
        "task_categories": ["text-generation"],
        "configs": [{"config_name": "default", "data_files": [{"split": "train", "path": path}]}],
    } | ({} if is_local(source) else {"source_datasets": [source]})


def count_stored(records: Iterable[PartRecord]) -> dict[str, Any]:
    """Return the figures of an output that every summary gives, summed over its parts."""
    known = list(records)
    sums = {
        name: sum(getattr(part, name) for part in known) for name in ("rows", "tokens", "bytes")
    }
    skipped: Counter[str] = sum((Counter(part.skipped) for part in known), Counter())
    return {**sums, "shards": len(known), "skipped": dict(skipped)}


@dataclass(frozen=True)
class ClosedPart:
    """A whole part in the cache that the output does not list yet."""

    path: Path
    record: PartRecord
    failed: bool = False  # every try of this run to deliver it


class StreamingHFUploader:
    """Collect rows into parts and deliver these, in the background, to a folder or a Hub dataset.

        begin_part → add_sample, skip … → (the last one closes the part) → flush

    A part that the output lists is done. Until then it is in the cache: whole as
    `part-00017.parquet`, or `backup_part-…` once every try to deliver it has failed; its first rows
    as `pending/pending-00017.parquet` when a run ends in the middle. Nothing is locked in the
    output: whoever writes a part twice writes the same name with the same content.

    Args:
        output: Hub dataset `user/name`, or a folder (`is_local`).
        schema: of the parts, settings in its metadata (`explore_logits.shard_schema`).
        settings: of the job; resuming with others is refused.
        chat_template: stored beside the parts.
        rank, world_size: this worker; it writes a checkpoint of its own.
        stopping: asked while waiting; once true, waiting ends and everything stays cached.
        deadline: the time (`time.monotonic()`) after which a failed delivery is not tried again.

    Raises:
        ConfigError: the output or the cache holds parts and neither `resume` nor `force_restart` is
            given, or of another job, or a live process is the same worker on the same cache.
        HubError: the output refused or was out of reach.
    """

    def __init__(
        self,
        output: str,
        *,
        schema: pa.Schema,
        settings: Mapping[str, Any],
        chat_template: str = "",
        cache_dir: str | Path = ".logit_extraction_cache",
        private: bool = False,
        resume: bool = False,
        force_restart: bool = False,
        rank: int = 0,
        world_size: int = 1,
        stopping: Callable[[], bool] = never,
        deadline: Callable[[], float] = lambda: math.inf,
    ) -> None:
        self.destination = open_destination(output, private=private)
        self.schema, self.job = schema, job_digest(settings)
        self.settings = json.loads(json.dumps(dict(settings)))  # as what it is compared with
        self.nucleus_cap = int(settings.get("top_p_max", 256))
        self.chat_template = chat_template
        self.rank, self.world_size = rank, world_size
        self.checkpoint = checkpoint_path(rank, world_size)
        self.stopping, self.deadline = stopping, deadline
        self.folder = local_path(cache_dir) / cache_key(output)
        self.parts: dict[int, Part] = {}  # under way
        self.part_of: dict[int, Part] = {}  # by conversation that is still to come
        self.closing: dict[int, Future[ClosedPart]] = {}  # being encoded
        self.waiting: dict[int, ClosedPart] = {}  # to be delivered
        self.listed: dict[int, PartRecord | None] = {}  # parts of the output; None: not known yet
        self.mine: set[int] = set()  # those that this worker's checkpoint tells of
        self.recorded: Mapping[str, Any] = {}  # settings that the output was begun with
        self.delivered = self.carded = 0  # parts of this run; of them, those that its card tells of
        self.slowest_s = 0.0  # commit so far
        self.shut = False
        self.encoder = ThreadPoolExecutor(ENCODE_THREADS, thread_name_prefix="encode")
        self.courier = ThreadPoolExecutor(1, thread_name_prefix="upload")
        self.delivery: Future[None] = Future()  # the last one asked for
        self.delivery.set_result(None)
        self._ask(self.destination.open)
        with contextlib.ExitStack() as undo:
            self.file_lock = self._lock_cache()
            undo.callback(self.file_lock.release)
            listed = self._ask(self.destination.list)
            self.removals = self._begin(listed, resume=resume, force_restart=force_restart)
            kept = {path: size for path, size in listed.items() if path not in self.removals}
            jobs = self._read_checkpoints(kept)
            if not force_restart and self.listed and jobs and not jobs & {self.job, ""}:
                raise ConfigError(
                    f"the checkpoints in {output} are of another job than {CONFIG_FILE} and the "
                    "options say: remove that file, and continue with the options that the job was "
                    "begun with"
                )
            undo.pop_all()

    # -- start

    def _lock_cache(self) -> Any:
        """Hold this worker's place in the cache.

        Raises:
            ConfigError: a live process has it, or works there as one of another number of workers.
        """
        import filelock

        with storage_errors(str(self.folder)):
            nearest_folder(self.folder, flag="--cache-dir")
            (self.folder / "pending").mkdir(parents=True, exist_ok=True)
            name = f"worker-{self.rank:03d}-of-{self.world_size:03d}.lock"
            lock = filelock.FileLock(self.folder / name)
            same_number = f"-of-{self.world_size:03d}.lock"
            try:
                lock.acquire(timeout=LOCK_WAIT_S)
                for other in self.folder.glob("worker-*.lock"):  # would share parts with this one
                    if not other.name.endswith(same_number):
                        filelock.FileLock(other).acquire(timeout=LOCK_WAIT_S).lock.release()
            except filelock.Timeout:
                lock.release()
                raise ConfigError(
                    f"another process is writing to the same output with the cache {self.folder}: "
                    "wait for it, stop it, or give another --cache-dir (several workers need their "
                    "own --rank and the same --world-size)"
                ) from None
        return lock

    def _begin(self, listed: Mapping[str, int], *, resume: bool, force_restart: bool) -> set[str]:
        """Decide what of the earlier runs counts; return what goes with the first commit.

        Raises:
            ConfigError: output or cache hold what was not to be continued, or another job.
        """
        parts = {path for path in listed if PART_NAME.fullmatch(path) and self._is_own(path)}
        waiting = self._cached()
        for leftover in self.folder.rglob(".*.tmp"):  # of a process that was killed
            if re.search(r"-\d+\.parquet", leftover.name) and self._is_own(leftover.stem):
                leftover.unlink(missing_ok=True)
        if force_restart:
            for path in waiting:
                remove_cached(path)
            checkpoints = {path for path in listed if CHECKPOINT_NAME.fullmatch(path)}
            others = {checkpoint_path(rank, self.world_size) for rank in range(1, self.world_size)}
            mine = checkpoints - others if self.rank == 0 else {self.checkpoint} & checkpoints
            return parts | mine
        if not resume and (parts or waiting):
            there = [f"already holds {plural(len(parts), 'shard')}"] if parts else []
            if waiting:
                there.append(f"has {plural(len(waiting), 'file')} not delivered in {self.folder}")
            raise ConfigError(
                f"{self.destination.name} {' and '.join(there)}: continue with --resume, or start "
                "over with --force-restart"
            )
        settings = read_settings(self.destination, listed, self._no_more_tries)
        compare_settings(settings, self.settings, self.destination.name)
        for path in waiting:
            with contextlib.suppress(*NO_PART):  # it is set aside when it is needed
                kept = read_metadata(path)[1]
                compare_settings(kept, self.settings, str(path))
                settings = settings or kept
        self.recorded = settings
        return set()

    def _is_own(self, path: str | Path) -> bool:
        """Tell whether a file holds a part of this worker."""
        return number_of(path) % self.world_size == self.rank

    def _read_checkpoints(self, files: Mapping[str, int]) -> set[str]:
        """Learn from a listing and its checkpoints which parts are there; return the jobs named."""
        for number in map(number_of, filter(PART_NAME.fullmatch, files)):
            if part_path(number) in files:
                self.listed.setdefault(number, None)
        jobs = set()
        for path in sorted(filter(CHECKPOINT_NAME.fullmatch, files)):
            job, records = decode_checkpoint(self._ask(self.destination.read, path))
            jobs.add(job)
            for number in records.keys() & self.listed.keys() if job == self.job else ():
                if files.get(part_path(number)) == records[number].bytes:  # else its footer tells
                    self._note(records[number], own=path == self.checkpoint)
        return jobs

    def _note(self, record: PartRecord, *, own: bool) -> None:
        """Remember a part of the output; of two records the later selection counts."""
        known = self.listed[record.number]
        if known is None or known.conversations <= record.conversations:
            self.listed[record.number] = record
        if own:
            self.mine.add(record.number)

    def _known(self) -> dict[int, PartRecord]:
        """Return what is known of the parts that the output lists."""
        return {number: record for number, record in list(self.listed.items()) if record}

    def _is_done(self, number: int, ids: str) -> bool:
        """Tell whether the output lists a part for these conversations."""
        if number not in self.listed:
            return False
        if getattr(self.listed[number], "ids", None) != ids:
            self._read_metadata(number)
        return getattr(self.listed[number], "ids", None) == ids

    def _read_metadata(self, number: int) -> None:
        """Learn from a listed part itself what no checkpoint tells."""
        path = part_path(number)
        try:
            described, settings = read_footer(self.destination, path, self._no_more_tries)
            record, of_job = read_record(described), job_digest(settings) == self.job
        except NO_PART as error:
            logger.warning("%s is not whole, it is made again: %s", path, first_line(error))
            return
        if of_job and record.number == number:
            sizes = self._ask(self.destination.list, [path])
            self._note(replace(record, bytes=sizes.get(path, 0)), own=self._is_own(path))

    def discard_strays(self) -> None:
        """Let the last commit remove what is listed beyond the parts of the job, all of them begun.

        A discarded job had more parts, and one of its workers was stopped before it removed them;
        or a person copied one. Its rows would be there twice.
        """
        busy = {*self.closing, *self.waiting}  # before `listed`, where delivered ones are at once
        unknown = [number for number, record in list(self.listed.items()) if record is None]
        for number in unknown:
            path = part_path(number)
            if self._is_own(path) and number not in busy:
                self._read_metadata(number)
                if self.listed[number] is None:
                    logger.warning("%s is no part of this job: it is removed", path)
                    self.removals.add(path)

    def settle(self, numerics: Mapping[str, Any]) -> None:
        """Record what really ran, once the teacher is loaded.

        Raises:
            ConfigError: the output was begun with weights of another kind.
        """
        numerics = json.loads(json.dumps(dict(numerics)))
        before, now = (
            {name: found[name] for name in NUMERICS_OF_JOB if name in found}
            for found in (self.recorded.get("numerics") or {}, numerics)
        )
        if before and (changes := list_differences(before, now)):
            raise ConfigError(
                f"{self.destination.name} was begun with another teacher: {'; '.join(changes)}. "
                "Use the same, another --output, or --force-restart to discard it"
            )
        self.settings = {**self.settings, "numerics": numerics}  # threads may be reading it

    def create_output(self) -> None:
        """Create the Hub repository where it does not exist; without it the first commit does.

        Raises:
            HubError: the Hub refused or was out of reach.
        """
        self._ask(self.destination.create)

    def get_resume_info(self) -> dict[str, Any]:
        """Return what need not be extracted again, as far as is known without reading it.

        Returns:
            `parts`: what is known of those that the output lists, by number; numbers of parts in
            the cache: `waiting`, whole and not delivered, and `pending`, of which there are rows.
        """
        pending = sorted(number_of(path) for path in self._cached("pending/pending-*.parquet"))
        return {"parts": self._known(), "waiting": sorted(self.waiting), "pending": pending}

    def load_pending_into_buffer(self) -> int:
        """Queue the whole parts that the cache holds for delivery; return how many.

        Pending rows are taken in when their part begins. A file whose checksums are wrong is set
        aside, and its rows are extracted again.
        """
        for path in [*self._cached("part-*.parquet"), *self._cached("backup_part-*.parquet")]:
            found = self._read_cached(path, rows=False)
            if found is None:
                continue
            record = read_record(found[1], path.stat().st_size)
            is_done = self._is_done(record.number, record.ids)  # looks at what is listed
            there = self.listed.get(record.number)
            is_shorter = there is not None and record.conversations < there.conversations
            if record.number in self.waiting or is_done or is_shorter:  # of a lower --limit
                remove_cached(path)
            else:
                self.waiting[record.number] = ClosedPart(path, record)
        return len(self.waiting)

    def _cached(self, *patterns: str) -> list[Path]:
        """Return what the cache holds of this worker's parts: whole ones, then rows of others.

        The files of other workers on this machine are theirs to deliver and to remove.
        """
        patterns = patterns or ("part-*.parquet", "backup_part-*.parquet", "pending/*.parquet")
        found = itertools.chain(*(sorted(self.folder.glob(pattern)) for pattern in patterns))
        named = [path for path in found if CACHED_NAME.fullmatch(path.name)]
        return [path for path in named if self._is_own(path)]

    def _read_cached(self, path: Path, *, rows: bool = True) -> tuple[Any, dict[str, Any]] | None:
        """Read rows and description of a file of the cache; one that is damaged is set aside."""
        try:
            described, _ = read_metadata(path)
            if digest_path(path).read_text() != digest_file(path):
                raise ValueError("its digest is another")
            return pq.read_table(path) if rows else None, described
        except NO_PART as error:
            logger.warning("set aside %s, its rows come again: %s", path, first_line(error))
        with storage_errors(str(self.folder)):
            path.rename(path.with_name(f"unreadable_{path.name}"))
        return None

    # -- rows in

    def begin_part(self, number: int, ids: npt.ArrayLike) -> list[int]:
        """Open a part; return which of its conversations are still to be extracted.

        None are where the output lists it, or the cache holds it whole. Rows that the cache holds
        of it are taken in.
        """
        wanted = np.asarray(ids, np.int64).tolist()
        digest = hash_ids(wanted)
        if number in self.closing:
            self._collect()
        closed = self.waiting.get(number)
        pending = self.folder / "pending" / f"pending-{number:05d}.parquet"
        if self._is_done(number, digest):
            with contextlib.suppress(OSError):
                remove_cached(pending)  # another machine has gone on with it
            return []
        if closed is not None and closed.record.ids == digest:
            return []
        if closed is not None:  # of a lower --limit: made again, once nobody delivers it
            wait_until(lambda: self.delivery.done() or self._no_more_tries(), math.inf)
            self._forget(closed)
        part = self.parts[number] = Part(number, wanted, set(wanted))
        self.part_of |= dict.fromkeys(wanted, part)
        for path in self._cached(f"pending/pending-{number:05d}.parquet"):
            if (found := self._read_cached(path)) is not None:
                rows, described = found
                self.add_sample(rows.cast(packed_schema(self.schema)))
                for index, reason in described["skipped"].items():
                    self.skip(int(index), str(reason))
        return [index for index in wanted if index in part.left]

    def add_sample(self, rows: pa.Table) -> None:
        """Add rows of parts under way, in any order; others, and what came before, is ignored.

        A part whose last conversation comes is closed.
        """
        rows = rows.select(packed_schema(self.schema).names)
        places: dict[int, list[int]] = {}
        for at, index in enumerate(rows["index"].to_pylist()):
            if (part := self.part_of.pop(index, None)) is not None:
                part.left.discard(index)
                places.setdefault(part.number, []).append(at)
        for number, chosen in places.items():
            self.parts[number].tables.append(rows.take(np.asarray(chosen, np.int64)))
            self._close_whole(self.parts[number])

    def skip(self, index: int, reason: str) -> None:
        """Go on without a conversation that gives no row."""
        if (part := self.part_of.pop(index, None)) is not None:
            part.left.discard(index)
            part.skipped[index] = reason
            self._close_whole(part)

    def _close_whole(self, part: Part) -> None:
        """Let a thread encode a part when nothing is left of it."""
        if not part.left:
            del self.parts[part.number]
            name = f"part-{part.number:05d}"
            self.closing[part.number] = self.encoder.submit(self._write, part, name)

    def _write(self, part: Part, name: str, *, whole: bool = True) -> ClosedPart:
        """Write a part, or its first rows, into the cache."""
        rows = part.table(self.schema)
        described = part.describe(rows, self.nucleus_cap)
        settings = {  # but what a later --limit changes
            k: v for k, v in self.settings.items() if k not in ("limit", "options")
        }
        metadata = {METADATA_SETTINGS: settings, METADATA_PART: described}
        texts = {key: json.dumps(value, sort_keys=True) for key, value in metadata.items()}
        schema = self.schema if whole else packed_schema(self.schema)
        schema = schema.with_metadata({**self.schema.metadata, **texts})
        path = self.folder / f"{name}.parquet"
        with storage_errors(str(self.folder)):
            size = write_part(path, rows, schema)
        return ClosedPart(path, read_record(described, size))

    def buffer_fill(self) -> float:
        """Return how much of the parts under way is there, 0..1."""
        there = sum(len(part.ids) - len(part.left) for part in self.parts.values())
        return there / max(1, sum(len(part.ids) for part in self.parts.values()))

    def save_pending_locally(self) -> int:
        """Keep the rows of parts under way in the cache; return how many.

        Raises:
            HubError: the disk is full; the rows are extracted again by the next run.
        """
        kept = [part for part in self.parts.values() if part.rows or part.skipped]
        for part in kept:
            self._write(part, f"pending/pending-{part.number:05d}", whole=False)
        return sum(part.rows for part in kept)

    # -- parts out

    def should_flush(self) -> bool:
        """Tell whether a part is whole and waits for `flush`."""
        return bool(self.closing)

    def is_uploading(self) -> bool:
        """Tell whether a delivery is under way."""
        return not self.delivery.done()

    def expected_upload_s(self) -> float:
        """Return the seconds that delivering what waits may take now, by earlier commits."""
        return 2 * self.slowest_s if self._untried() or self.closing else self.slowest_s

    def _untried(self) -> list[ClosedPart]:
        """Return the parts that wait for their first delivery."""
        return [part for part in list(self.waiting.values()) if not part.failed]

    def flush(self, final: bool = False) -> None:
        """Hand whole parts to the delivery, waiting while too many wait there already.

        With `final`, wait until everything is delivered, and try once more what failed before.
        Returns early once `stopping` says so.

        Raises:
            HubError: the output refused, or the disk is full.
        """
        self._collect(left=0 if final else CLOSING_AT_ONCE)
        if final or self._untried():
            self.delivery = self.courier.submit(self._deliver, self.delivery, last=final)

        def enough() -> bool:
            untried = [part.record.tokens for part in self._untried()]
            return not final and (len(untried) < MOST_WAITING or sum(untried) < WINDOW_TOKENS)

        wait_until(lambda: enough() or self.delivery.done() or self.stopping(), math.inf)
        if self.delivery.done():
            self.delivery.result()

    def _collect(self, *, left: int = 0) -> None:
        """Take over the parts that are encoded, waiting while more than `left` are not.

        Raises:
            HubError: one could not be written.
        """
        for number, closing in list(self.closing.items()):
            if closing.done() or len(self.closing) > left:
                self.waiting[number] = closing.result()
                del self.closing[number]

    def _deliver(self, before: Future[None], *, last: bool, again: bool = False) -> None:
        """Make the output list what waits, in one commit; the local copies go after that only.

        Runs in the thread that uploads, one delivery after the other, none after a refusal.
        """
        before.result()
        begun = time.monotonic()
        last = last and not self.stopping()
        waiting = dict(sorted(self.waiting.items()))
        parts = {n: part for n, part in waiting.items() if last or not part.failed}
        size = sum(part.record.bytes for part in parts.values())
        removed = set(self.removals)
        try:
            content = self._ask(self._content, parts, last)
            if content or removed:
                message = f"Add {plural(len(parts), 'part')}" if parts else "Update card"
                limit_s = REQUEST_S + size / SLOWEST_UPLOAD_BYTES_PER_S
                self._ask(self.destination.create)
                commit = self.destination.commit
                self._ask(commit, message, content, sorted(removed), limit_s=limit_s)
                self._ask(self._see, parts)
        except OutOfReachError as error:
            if not self._no_more_tries():
                self._keep(parts, error)
            return
        self.slowest_s = max(self.slowest_s, time.monotonic() - begun)
        self.removals -= removed
        for number, part in parts.items():
            self.listed[number] = part.record
            self.mine.add(number)
            self._forget(part)
        self.delivered += len(parts)
        if "README.md" in content:
            self.carded = self.delivered
            if last and not again and self.world_size > 1:  # what others have committed meanwhile
                self._deliver(before, last=True, again=True)

    def _no_more_tries(self) -> bool:
        return self.shut or self.stopping() or time.monotonic() >= self.deadline()

    def _ask(self, request: Callable[..., T], *args: Any, limit_s: float = REQUEST_S) -> T:
        """Return what a request returns, trying again until the run has to end (`retry`)."""
        return retry(functools.partial(request, *args), self._no_more_tries, limit_s=limit_s)

    def _see(self, parts: Mapping[int, ClosedPart]) -> None:
        """Make sure that the output lists what was committed: a listing may be a little late."""
        wanted = {part_path(number) for number in parts}
        if wanted and (missing := wanted - self.destination.list(wanted).keys()):
            raise PassingError(f"{self.destination.name} does not list {min(missing)} yet")

    def _keep(self, parts: Mapping[int, ClosedPart], error: HubError) -> None:
        """Leave parts that could not be delivered in the cache, as what they are."""
        kept = f"kept {plural(len(parts), 'part')} in {self.folder}" if parts else "no new card"
        logger.warning("%s: %s", kept, error)
        for number, part in parts.items():
            path = self.folder / f"backup_{part.path.name.removeprefix('backup_')}"
            with storage_errors(str(self.folder)):
                os.replace(digest_path(part.path), digest_path(path))
                os.replace(part.path, path)
            self.waiting[number] = replace(part, path=path, failed=True)

    def _forget(self, part: ClosedPart) -> None:
        """Remove a whole part from the cache, and its first rows."""
        number = part.record.number
        self.waiting.pop(number, None)
        for path in (part.path, *self._cached(f"pending/pending-{number:05d}.parquet")):
            with contextlib.suppress(OSError):
                remove_cached(path)

    def _content(self, parts: Mapping[int, ClosedPart], last: bool) -> dict[str, Path | bytes]:
        """Return the files of a commit, the checkpoint last; none where nothing changes."""
        if not parts and not (last and (self.delivered > self.carded or self._holds_all())):
            return {}
        card = self._card(parts) if last or (self.world_size == 1 and not self.carded) else {}
        if not parts:
            return card
        new = {number: part.record for number, part in parts.items()}
        records = {n: record for n, record in self._known().items() if n in self.mine} | new
        content: dict[str, Path | bytes] = {part_path(n): part.path for n, part in parts.items()}
        numerics = {k: v for k, v in self.recorded.items() if k == "numerics"}
        content[CONFIG_FILE] = encode_json(numerics | self.settings)  # a run may need no teacher
        if self.chat_template:
            content[TEMPLATE_FILE] = self.chat_template.encode()
        return content | card | {self.checkpoint: encode_checkpoint(self.job, records.values())}

    def _holds_all(self) -> bool:
        """Tell whether no part is missing before the last one that is known of."""
        known = self._known()
        return bool(known) and len(known) == max(known) + 1

    def _card(self, parts: Mapping[int, ClosedPart]) -> dict[str, Path | bytes]:
        """Return the card with the figures of all workers, above what a person wrote into it.

        Nothing where it is there already, or what is there cannot be kept.
        """
        files = self.destination.list()
        if self.world_size > 1:
            self._read_checkpoints(files)
        previous = self.destination.read("README.md") if "README.md" in files else b""
        if len(previous) == SMALL_FILE_BYTES:
            logger.warning("the card of %s is too large to be updated", self.destination.name)
            return {}
        records = self._known() | {number: part.record for number, part in parts.items()}
        as_recorded = {} if parts or self.delivered else self.recorded  # no row is of this run
        card = make_card(
            self.destination.name,
            {**self.settings, **as_recorded},
            [record for _, record in sorted(records.items())],
            previous.decode(errors="replace"),
        ).encode()
        return {} if card == previous else {"README.md": card}

    # -- end

    def holds_rows(self) -> bool:
        """Tell whether there is a row of this job anywhere: in the output, the cache, or memory."""
        self._collect()
        records = [*self._known().values(), *(part.record for part in self.waiting.values())]
        return any(record.rows for record in records) or any(p.rows for p in self.parts.values())

    def discard(self) -> None:
        """Remove what the cache holds of this worker's parts: a job that gives no row at all."""
        self._collect()
        self.waiting.clear()
        for path in self._cached():
            remove_cached(path)

    def summary(self) -> dict[str, Any]:
        """Return rows, tokens, shards and bytes of what the output lists, and what is kept here."""
        undelivered = [str(path) for path in self._cached()]
        return {**count_stored(self._known().values()), "undelivered": undelivered}

    def shutdown(self) -> None:
        """Keep the rows of parts under way, end the threads, free the cache.

        A request under way is hardly waited for; when it succeeds later, the next run finds that
        out. Failures are logged, so that the first one stays the one raised.
        """
        self.shut = True
        self.courier.shutdown(cancel_futures=True)
        for keep in (self._collect, self.save_pending_locally):
            try:
                keep()
            except HubError as error:
                logger.warning("%s", error)
        self.encoder.shutdown(cancel_futures=True)
        if left := self._cached():
            logger.warning("%s kept in %s for --resume", plural(len(left), "file"), self.folder)
        self.file_lock.release()


def checkpoint_path(rank: int, world_size: int) -> str:
    """Return where the checkpoint of a worker is in an output."""
    return "checkpoint.json" if world_size == 1 else f"checkpoint-w{rank:02d}.json"


def number_of(path: str | Path) -> int:
    """Return the part number in a name."""
    return int(re.findall(r"-(\d+)\.parquet", str(path))[-1])


# --------------------------------------------------------------------------------------------------
# 9 Stop
# --------------------------------------------------------------------------------------------------

HANG_UP: signal.Signals | None = getattr(signal, "SIGHUP", None)  # None on Windows
ALARM: signal.Signals | None = getattr(signal, "SIGALRM", None)
# Modules that take a lock in one bytecode and say how it is given back in the next: what a signal
# raises between the two leaves it held, and every other thread waits for ever.
LOCKING_MODULES = frozenset({"logging", "threading", "tqdm"})
WAIT_FOR_LOCK_S, LOCK_WAITS = 0.005, 20  # longer in the same place is waiting, which has to end


class GracefulInterrupt:
    """Within the context, a first SIGINT or SIGTERM asks to stop and a second leaves at once.

    SIGHUP, of a terminal that is gone, asks to stop too, where `nohup` does not have it ignored; it
    often comes twice. Leaving at once is safe: every file is complete or has a temporary name.
    While there is nothing to save (`leaving_at_once`), the first signal interrupts whatever is
    waited for, and so does the deadline.
    Outside the main thread, where Python allows no signal handlers, nothing is installed.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self._at_once = False
        self._lock_waits = 0
        self._previous: dict[int, Any] = {}

    @property
    def stopping(self) -> bool:
        """Whether a signal has come."""
        return self.signal is not None

    @property
    def exit_code(self) -> int:
        """128 + the signal: 130 Ctrl-C, 143 SIGTERM, 129 SIGHUP; 0 when none has come."""
        return 0 if self.signal is None else 128 + self.signal

    @contextmanager
    def leaving_at_once(self, end_s: float = math.inf) -> Iterator[None]:
        """Raise KeyboardInterrupt here at a first signal, or at a time of `time.monotonic`."""
        handled = bool(self._previous)
        timed = handled and ALARM is not None
        self._lock_waits = 0
        try:
            self._at_once = handled  # before the question, or a signal between them does nothing
            if handled and self.stopping:
                raise KeyboardInterrupt
            if timed and math.isfinite(end_s):
                signal.setitimer(signal.ITIMER_REAL, max(1e-3, end_s - time.monotonic()))
            yield
        finally:
            self._at_once = False
            if timed:
                signal.setitimer(signal.ITIMER_REAL, 0.0)

    def __enter__(self) -> GracefulInterrupt:
        if threading.current_thread() is threading.main_thread():
            numbers = [signal.SIGINT, signal.SIGTERM, *([ALARM] if ALARM else [])]
            if HANG_UP is not None and signal.getsignal(HANG_UP) != signal.SIG_IGN:
                numbers.append(HANG_UP)
            for number in numbers:
                self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if number == ALARM:
            if self._at_once:
                self._leave(frame)
            return
        if self.signal is not None and number != HANG_UP:
            os._exit(128 + number)
        if self.signal is not None:
            return
        self.signal = number
        if self._at_once:
            self._leave(frame)
            return
        with contextlib.suppress(OSError):  # the same Ctrl-C may have ended a `tee`
            os.write(2, b"\nstopping after this batch; once more to leave at once\n")

    def _leave(self, frame: FrameType | None) -> None:
        """Raise KeyboardInterrupt, or have the alarm ask again where a lock may just be taken."""
        module = "" if frame is None else str(frame.f_globals.get("__name__"))
        locking = module.partition(".")[0] in LOCKING_MODULES and self._lock_waits < LOCK_WAITS
        if not locking or ALARM is None:
            raise KeyboardInterrupt
        self._lock_waits += 1
        signal.setitimer(signal.ITIMER_REAL, WAIT_FOR_LOCK_S)


class TimedShutdown:
    """Tell when to stop so that the work ends within a number of minutes from now.

    Time is kept for the step between two calls of `due` (the longest so far) and for what has to be
    delivered.

    Args:
        minutes: the limit; None: never due.
        upload_s: asked for the seconds that delivering what waits would take now.
    """

    def __init__(
        self, minutes: float | None, *, upload_s: Callable[[], float] = lambda: 0.0
    ) -> None:
        self.end_s = math.inf if minutes is None else time.monotonic() + minutes * 60
        self.upload_s = upload_s
        self._longest_step_s = 0.0
        self._last_call_s: float | None = None

    def due(self) -> bool:
        """Tell whether one more step could end too late; call it once a step."""
        now_s = time.monotonic()
        if self._last_call_s is not None:
            self._longest_step_s = max(self._longest_step_s, now_s - self._last_call_s)
        self._last_call_s = now_s
        return self.end_s - now_s <= self._longest_step_s + self.upload_s()

    def begin_step(self) -> None:
        """Count the step from now: what came before, such as loading, is done once."""
        self._last_call_s = time.monotonic()


# --------------------------------------------------------------------------------------------------
# 10 Run
# --------------------------------------------------------------------------------------------------

EXIT_BAD_INPUT, EXIT_UNDELIVERED, EXIT_RUNTIME = 2, 4, 75
HOPELESS_ROWS = 3  # first conversations that may be NaN, each by itself, before the run gives up
SAMPLED_ROWS = 256  # whose lengths decide the conversations per part under --upload-size-mb
# Options of a machine or of one run, which a resumed one does not take from the record.
LOCAL_OPTIONS = {
    "trust_remote_code",  # nobody's code runs because a file of an output says so
    *("cache_dir", "device", "force_restart", "max_runtime_minutes", "output", "private", "rank"),
    *("executor", "executor_options", "plan", "plan_rate", "plan_tokens", "resume", "tasks"),
    *("tensor_parallel", "verify_mask", "workers", "world_size"),
}
PATH_OPTIONS = {"model", "dataset", "chat_template", "tokenized_dataset"}  # recorded in full


@dataclass(frozen=True)
class Job:
    """What a run works on: everything that is known before the teacher's weights are loaded."""

    config: ExtractionConfig
    selection: Selection
    encoder: RowEncoder
    lengths: KnownLengths | None
    vocab_size: int
    settings: dict[str, Any]
    schema: pa.Schema

    @property
    def rows_per_part(self) -> int:
        """E, fixed when the job began."""
        return int(self.settings["rows_per_part"])


def open_job(config: ExtractionConfig, should_stop: Callable[[], bool] = never) -> Job:
    """Open tokenizer, template and source, and refuse what cannot work before it costs time."""
    open_destination(config.output)  # refuses what is no name of one
    recorded = find_recorded_settings(config, should_stop)
    pinned = pin_revisions(config, recorded)
    config = replace(config, revision=pinned["model"])
    resolve_device(config.device)
    model_config = load_model_config(config)
    options, adapter = locate_model(config)
    name, revision = tokenizer_source(config, options, adapter)
    tokenizer = load_tokenizer(name, revision=revision, trust_remote_code=config.trust_remote_code)
    measured = None
    if config.tokenized_dataset is not None:
        measured = read_lengths(config.tokenized_dataset, length_col=config.length_col or "length")
    # Where a template asks for the date, it is that of the job's first step.
    begun = recorded or (measured.settings if measured else {})
    source, conversation = open_conversations(
        config,
        tokenizer=tokenizer,
        date=begun.get("template_date"),
        dataset_revision=pinned["dataset"],
    )
    limit = config.max_seq_len or max_positions(model_config)
    encoder = RowEncoder(conversation, limit, find_unknown(tokenizer, model_config))
    vocab_size = check_vocabulary(config, tokenizer)
    selection = prepare_dataset(config, source, conversation.columns)
    settings = describe_settings(config, encoder, model_config, vocab_size)
    for kind, commit in pinned.items():
        settings[f"{kind}_revision"] = commit or source_revision(getattr(config, kind))
    if adapter is not None:
        settings["base_revision"] = find_base_revision(config, adapter)
    settings["rows_per_part"] = recorded.get("rows_per_part") or choose_rows_per_part(
        selection, encoder
    )
    every = settings["rows_per_part"]
    if (
        recorded
        and config.upload_size_mb is None
        and config.upload_every not in (every, ExtractionConfig.upload_every)
    ):
        logger.warning("--upload-every %d: the job was begun with %d", config.upload_every, every)
    lengths = find_lengths(config, settings, selection, measured)
    schema = shard_schema(
        store_tokens=config.store_tokens, compact=config.min_p is not None, settings=settings
    )
    return Job(config, selection, encoder, lengths, vocab_size, settings, schema)


def find_recorded_settings(
    config: ExtractionConfig, should_stop: Callable[[], bool]
) -> dict[str, Any]:
    """Return the settings that a job was begun with: of its output, else of its cache, else {}."""
    several = (config.world_size or 1) > 1  # where one worker may have begun before another
    if config.plan or not (config.resume or (several and not config.force_restart)):
        return {}
    destination = open_destination(config.output)
    listed = retry(destination.list, should_stop)
    if recorded := read_settings(destination, listed, should_stop):
        return recorded
    cache = local_path(config.cache_dir) / cache_key(config.output)
    for path in sorted(cache.rglob("*.parquet")):
        with contextlib.suppress(*NO_PART):
            return read_metadata(path)[1]
    return {}


def pin_revisions(config: ExtractionConfig, recorded: Mapping[str, Any]) -> dict[str, str | None]:
    """Hold a run to one commit of model and source, a resumed one to those that it began with.

    Returns:
        Both commits; for local files, and where nobody knows it, what was asked for.
    """
    pinned = {"model": config.revision, "dataset": None}
    for kind, asked in list(pinned.items()):
        name = getattr(config, kind)
        if not is_local(name):
            if asked is None and recorded.get(kind) == name:
                asked = recorded.get(f"{kind}_revision")
            pinned[kind] = find_commit(name, asked, kind=kind) or asked
    return pinned


def find_commit(repo: str, revision: str | None, *, kind: str) -> str | None:
    """Return the commit that a revision of a Hub repository is: from the Hub, else its cache.

    Models do not tell which commit they were loaded from in every version of transformers.
    """
    if is_exact(revision):
        return revision
    from huggingface_hub import HfApi

    def ask() -> str | None:
        with hub_errors(repo):
            return HfApi().repo_info(repo, repo_type=kind, revision=revision).sha

    with contextlib.suppress(HubError, PassingError, ValueError):
        return bounded(ask, never, 60.0)
    return cached_commit(repo, revision, kind=kind)


def find_unknown(tokenizer: Any, model_config: Any) -> frozenset[int]:
    """Return the ids of tokens that were added to a tokenizer, and not to its model."""
    rows = getattr(model_config.get_text_config(), "vocab_size", None) or MAX_TOKEN_ID + 1
    return frozenset(i for i in tokenizer.get_added_vocab().values() if i >= rows)


def check_vocabulary(config: ExtractionConfig, tokenizer: Any) -> int:
    """Return V, the tokenizer's highest id plus one; rows of the head beyond it are padding.

    Ids that the format does not hold are no part of it: a row that spells one is skipped.
    """
    vocab_size = min(max(tokenizer.get_vocab().values()), MAX_TOKEN_ID) + 1
    if config.min_p is None:
        check_candidates(vocab_size, top_p_max=config.top_p_max, sampled_n=config.sampled_n)
    return vocab_size


def describe_settings(
    config: ExtractionConfig, encoder: RowEncoder, model_config: Any, vocab_size: int
) -> dict[str, Any]:
    """Return what an output says of itself: JSON values, on every machine the same but `versions`.

    Its `options` are what `--resume` with `--output` alone goes on with.
    """
    kept = ["seed", "logit_bits", "store_tokens", "max_seq_len", "limit", "start_offset", "engine"]
    kept += ["random_sample", "subject_col", "sample_subject"]
    kept += NOT_BESIDE_MIN_P if config.min_p is None else ["min_p"]
    options = {
        entry.name: absolute(value) if entry.name in PATH_OPTIONS else value
        for entry in fields(config)
        if entry.name not in LOCAL_OPTIONS
        and (value := getattr(config, entry.name)) != entry.default
    }
    return {
        "format_version": format_version(compact=config.min_p is not None),
        **conversation_settings(config, encoder.conversation),
        **{name: getattr(config, name) for name in kept},
        "dtype": resolve_dtype(config, model_config),
        "vocab_size": vocab_size,
        "versions": {
            name: importlib.metadata.version(name)
            for name in ("torch", "transformers", "datasets", "pyarrow")
        },
        "options": options,
    }


def absolute(name: str) -> str:
    """Return the full path of what is a file or folder here; the name of anything else as it is."""
    return os.path.abspath(local_path(name)) if is_local(name) else name


def choose_rows_per_part(selection: Selection, encoder: RowEncoder) -> int:
    """Return E: --upload-every, or what makes parts of about --upload-size-mb.

    That is found from some conversations over the whole job, --limit aside, and what a token takes
    on real teachers at these K and M; see docs/storage.md.
    """
    config = selection.config
    if config.upload_size_mb is None:
        return config.upload_every
    every = replace(config, limit=None, rank=None, world_size=None)
    whole = prepare_dataset(every, selection.source, selection.columns)
    tokens = [1]  # where no conversation can be used
    for part in itertools.islice(whole.parts(len(whole) or SAMPLED_ROWS), 1):
        at = np.linspace(0, part.ids.size - 1, min(SAMPLED_ROWS, part.ids.size)).astype(np.int64)
        encoded = [encoder.encode(row, 0) for row in part.read(at.tolist())]
        sizes = [row.token_positions.size for row in encoded if isinstance(row, EncodedRow)]
        tokens = sizes or tokens
    token_bytes = 20 + 3.6 * config.top_p_max * config.logit_bits / 16 + 4 * config.sampled_n
    if config.min_p is not None:
        token_bytes = 11 / math.sqrt(config.min_p)
    row_bytes = token_bytes * max(1.0, float(np.mean(tokens)))
    return max(1, min(2**31 - 1, round(config.upload_size_mb * 1e6 / row_bytes)))


def run_extraction(config: ExtractionConfig) -> dict[str, Any]:
    """Extract everything that is asked for and not stored yet.

    Returns:
        The summary that `main` prints: what the output holds, what this run did, and `exit_code`.

    Raises:
        LogitsError: bad options, input, teacher or output; nothing is half-written.
    """
    limit_waiting()
    if config.executor is not None:
        return run_tasks(config)
    summary = None
    with GracefulInterrupt() as interrupt:
        leads = not config.tensor_parallel or join_group(config) == 0
        try:
            summary = run_until(config, interrupt, leads=leads)
        except (OutOfReachError, StopRequested) as error:
            if not interrupt.stopping:
                raise error
        except KeyboardInterrupt:  # a signal or the deadline: it ends all waiting
            pass
        except RuntimeError as error:
            raise explain_want(error) from None
        if config.tensor_parallel:
            torch.distributed.destroy_process_group()
        code = interrupt.exit_code or EXIT_RUNTIME
        return summary or (nothing_done(config.output, code) if leads else {"exit_code": code})


def summarize(
    stored: Mapping[str, Any], output: str, code: int, *, tokens: int = 0, seconds: float = 0.0,
    **more: Any,
) -> dict[str, Any]:  # fmt: skip
    """Return what `main` prints of a run: the figures of the output, and its own."""
    return {
        **stored,
        **more,
        "seconds": round(seconds, 3),
        "tokens_per_second": round(tokens / max(seconds, 1e-9), 1),
        "output": output,
        "exit_code": code,
    }


def nothing_done(output: str, code: int) -> dict[str, Any]:
    """Return the summary of a run that ended before it knew what the output holds."""
    unknown = dict.fromkeys(("rows", "tokens", "shards", "bytes"))
    return summarize(unknown, output, code, skipped={}, new_rows=0, new_tokens=0)


def explain_want(error: RuntimeError) -> HubError:
    """Return what helps where the system gives no thread or kills a process; else raise."""
    if "can't start new thread" in str(error):
        return HubError(
            "the system gives no more threads: raise the limit of processes (ulimit -u), then "
            "continue with --resume"
        )
    if "DataLoader timed out" in str(error):  # a fork may come at a bad moment of a thread
        return HubError(
            f"the processes that tokenize gave nothing for {STUCK_S / 60:.0f} minutes: continue "
            "with --resume"
        )
    if "DataLoader worker" in str(error):  # torch says so wherever the run just is
        return HubError(
            f"a process that tokenizes was killed ({first_line(error)}), mostly for want of "
            "memory: continue with --resume"
        )
    raise error


def run_until(
    config: ExtractionConfig, interrupt: GracefulInterrupt, *, leads: bool = True
) -> dict[str, Any]:
    """Extract until all is done, the time is over or a signal comes; return the summary."""
    started = time.monotonic()
    deadline = TimedShutdown(config.max_runtime_minutes)
    with interrupt.leaving_at_once(deadline.end_s):
        job = open_job(config, lambda: interrupt.stopping or time.monotonic() >= deadline.end_s)
        if config.verify_mask and not agree(not leads or confirm_masks(job)):
            raise ConfigError("stopped at --verify-mask: nothing was extracted")
        if config.plan:
            with log_beside_bar():
                plan = plan_extraction(job, lambda: interrupt.stopping)
            return {**(plan if leads else {}), "exit_code": 0}
    output: StreamingHFUploader | Follower = Follower()
    if leads:
        as_given = ("cache_dir", "private", "resume", "force_restart")
        output = StreamingHFUploader(
            config.output,
            schema=job.schema,
            settings=job.settings,
            chat_template=job.encoder.conversation.chat_template,
            rank=config.rank or 0,
            world_size=config.world_size or 1,
            stopping=lambda: interrupt.stopping,
            deadline=lambda: deadline.end_s,
            **{name: getattr(config, name) for name in as_given},
        )
    deadline.upload_s = output.expected_upload_s
    run = Extraction(
        job,
        output,
        lambda: interrupt.stopping or deadline.due(),
        deadline.begin_step,
        lambda: interrupt.leaving_at_once(deadline.end_s),
    )
    complete, failure = False, None
    try:
        output.load_pending_into_buffer()
        complete = run.extract()
        output.flush(final=True)
    except HubError as error:
        failure = error
    except RuntimeError as error:
        failure = explain_want(error)
    finally:
        output.shutdown()
    stored = output.summary()
    code = exit_code(stored, complete, interrupt.signal)
    if failure is not None and not interrupt.stopping:
        code, stored = EXIT_UNDELIVERED, {**stored, "error": hide_tokens(str(failure))}
    if not leads:  # another process prints the summary, but does not know what went wrong here
        if "error" in stored:
            logger.error("%s", stored["error"])
        return {"exit_code": code}
    return summarize(
        stored,
        config.output,
        code,
        skipped=dict(run.skipped | Counter(stored["skipped"])),
        new_rows=run.rows,
        new_tokens=run.tokens,
        tokens=run.tokens,
        seconds=time.monotonic() - started,
    )


class Follower:
    """Stands for the output where another process of the group writes it, and where none is."""

    def begin_part(self, number: int, ids: npt.ArrayLike) -> list[int]:
        """Return all ids."""
        return np.asarray(ids, np.int64).tolist()

    def summary(self) -> dict[str, Any]:
        """Return that nothing is stored here."""
        return {**count_stored([]), "undelivered": []}

    def nothing(self, *_: Any, **__: Any) -> Any:
        """Do nothing."""
        return 0

    add_sample: Callable[..., Any] = nothing
    skip = settle = create_output = load_pending_into_buffer = flush = should_flush = nothing
    discard_strays = nothing
    is_uploading = buffer_fill = expected_upload_s = holds_rows = discard = shutdown = nothing


def exit_code(stored: Mapping[str, Any], complete: bool, stop_signal: int | None) -> int:
    """Return how the process ends, once everything that could be done is done."""
    left = [Path(path).name for path in stored["undelivered"]]
    if complete:  # pending rows are of parts beyond --limit then
        left = [name for name in left if not name.startswith("pending-")]
    if stop_signal is not None and not (complete and not left):
        return 128 + stop_signal
    if any(name.startswith("backup_") for name in left) or (complete and left):
        return EXIT_UNDELIVERED
    return 0 if complete else EXIT_RUNTIME


def confirm_masks(job: Job, *, rows: int = 3) -> bool:
    """Show the first conversations with the extracted tokens marked; on a terminal, ask."""
    encoder, color = job.encoder.conversation, sys.stderr.isatty() and "NO_COLOR" not in os.environ
    parts = (part.rows() for part in job.selection.parts(CHUNK_ROWS))
    for index, row in itertools.chain.from_iterable(parts):
        if not rows:
            break
        try:
            encoded = encoder.encode(row)
        except ConversationError as error:
            logger.warning("conversation %d cannot be used: %s", index, error)
            continue
        preview = format_mask_preview(encoded, encoder.tokenizer, color=color)
        sys.stderr.write(preview + "\n\n")
        rows -= 1
    if not (sys.stdin is not None and sys.stdin.isatty() and sys.stderr.isatty()):
        return True
    sys.stderr.write("extract these tokens? [Y/n] ")
    sys.stderr.flush()
    return sys.stdin.readline().lower() in ("\n", "y\n", "yes\n")  # the end of input is no answer


@contextmanager
def log_beside_bar() -> Iterator[None]:
    """Let log lines pass by a progress bar, without tokens."""
    with logging_redirect_tqdm():
        log_safely()  # the bar's own handlers have no filter
        yield


class Extraction:
    """One pass of the teacher over the parts that are not stored yet."""

    def __init__(
        self,
        job: Job,
        output: StreamingHFUploader | Follower,
        should_stop: Callable[[], bool] = never,
        begin_step: Callable[[], None] = lambda: None,
        nothing_to_save: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        self.job = job
        self.output = output
        self.should_stop = should_stop
        self.begin_step = begin_step
        self.nothing_to_save = nothing_to_save  # while within: a signal ends whatever is waited for
        self.post = AsyncPostProcessor(
            functools.partial(fetch_and_pack, schema=job.schema), self.deliver
        )
        self.again: list[Batch] = []  # did not fit, or may be unusable for a neighbour's sake
        self.skipped: Counter[str] = Counter()
        self.rows = self.tokens = self.unusable = self.batches = 0
        self.most_tokens = 0  # that a batch may have, padded, by what has fitted; 0: not tried
        self.teacher: Teacher | None = None
        self.bar: Any = None

    def extract(self) -> bool:
        """Run to the end or until told to stop; True when no conversation is left.

        Raises:
            DataError: not one conversation of the job could be used; says why not.
        """
        job = self.job
        windows = ConversationDataset(
            job.selection,
            job.encoder,
            rows_per_part=job.rows_per_part,
            begin_part=lambda number, ids: agree(self.output.begin_part(number, ids)),
            lengths=job.lengths,
            should_stop=self.stops,
        )
        try:
            with log_beside_bar():
                for window in windows:
                    self.skip(window.skipped)
                    for batch in self.batches_of(window):
                        stop_if(self.stops)
                        self.submit(batch)
                    self.finish_window()
        except StopRequested:
            self.post.flush()
            return False
        finally:
            self.close()
        alone = job.config.world_size in (None, 1)  # one worker of many may have no row
        if alone and not agree(bool(self.rows or self.output.holds_rows())):
            self.output.discard()
            raise DataError(f"nothing to extract: {explain_skips(self.skipped)}")
        self.output.discard_strays()
        return True

    def close(self) -> None:
        """End the packing threads and the bar."""
        self.post.shutdown()
        if self.bar is not None:
            self.bar.close()

    def stops(self) -> bool:
        """Tell whether to stop; one answer for all processes of a group."""
        return bool(agree(self.should_stop()))

    def batches_of(self, window: Window) -> Iterator[Batch]:
        """Yield the batches of a window; loads the teacher when there is one."""
        if not window.rows:
            return
        config, job = self.job.config, self.job
        if self.teacher is None:
            self.output.create_output()  # not before the conversations are known to be usable
            with self.nothing_to_save():
                self.teacher = load_teacher(config, vocab_size=job.vocab_size)
            self.output.settle(self.teacher.numerics)
            if not isinstance(self.output, Follower):  # in a group one shows it, in a probe none
                self.bar = open_bar(len(job.selection) or None)
            self.find_batch_size(window)
            self.begin_step()
        tokens = self.most_tokens or self.teacher.batch_tokens
        tokens = tokens or DEFAULT_BATCH_TOKENS.get(self.teacher.device.type, 1024)
        yield from token_budget_batches(config, window.rows, tokens)

    def find_batch_size(self, window: Window) -> None:
        """Where nothing limits batches, try out what CUDA's memory holds, once a run."""
        assert self.teacher is not None
        config, device = self.job.config, self.teacher.device
        limited = config.max_batch_tokens or config.max_batch_size or config.batch_thresholds
        if device.type != "cuda" or config.tensor_parallel or limited or self.teacher.batch_tokens:
            return
        self.most_tokens = find_batch_tokens(
            self.run_with_headroom,
            length=max(row.input_ids.size for row in window.rows),
            vocab_size=self.teacher.vocab_size,
            start=DEFAULT_BATCH_TOKENS["cuda"],
        )
        logger.info("batches of up to %d tokens fit %s", self.most_tokens, device)

    def run_with_headroom(self, batch: Batch) -> None:
        """Run a batch to its end with memory to spare, and give back what the device keeps."""
        assert self.teacher is not None
        torch.cuda.empty_cache()
        spare = torch.empty(PROBE_HEADROOM_BYTES, dtype=torch.uint8, device=self.teacher.device)
        self.forward(batch).to_host()
        del spare

    def submit(self, batch: Batch) -> None:
        """Run a batch and hand its result to a packing thread; in halves where it does not fit."""
        if 0 < self.most_tokens < batch.padded_tokens and len(batch.rows) > 1:
            for half in batch.halves():
                self.submit(half)
            return
        result = None
        with contextlib.suppress(torch.OutOfMemoryError):
            result = self.forward(batch)
        if result is None:  # here, as the exception holds the tensors
            self.halve(batch)
            self.submit(batch)
            return
        self.post.submit(batch, result)
        self.batches += 1
        if self.batches == 1:
            self.begin_step()  # the first batch compiles and allocates

    def forward(self, batch: Batch) -> GPUBatchResult:
        """Run one batch: the teacher's logits at the wanted positions, reduced on its device."""
        config = self.job.config
        try:
            return gpu_process_batch(
                self.teacher,
                batch,
                top_p=config.top_p,
                top_p_max=config.top_p_max,
                sampled_n=config.sampled_n,
                seed=config.seed,
                min_p=config.min_p,
                logit_bits=config.logit_bits,
                reference=config.reference_extraction,
            )
        except TeacherError:
            stop_if(self.stops)  # Ctrl-C at a terminal reaches the processes of vLLM, too
            raise

    def halve(self, batch: Batch) -> None:
        """Hold batches to half the size of one that did not fit."""
        size = batch.padded_tokens
        if self.job.config.tensor_parallel:  # the others are in the middle of the same pass
            raise TeacherError(
                f"out of memory at {size} tokens a batch: lower --max-batch-tokens below {size}"
            )
        if len(batch.rows) == 1:
            raise TeacherError(
                f"out of memory on conversation {batch.rows[0].index} of {size} tokens by itself: "
                f"lower --max-seq-len below {size} or use a larger device"
            )
        torch.cuda.empty_cache()
        logger.warning("out of memory at %d tokens a batch: going on with half of that", size)
        self.most_tokens = size // 2

    def finish_window(self) -> None:
        """Wait for the results of a window, and run again what may do better in smaller batches."""
        self.post.flush()
        while self.again:
            self.submit(self.again.pop())
            self.post.flush()

    def deliver(self, packed: PackedBatch) -> None:
        """Hand finished rows to the output, and parts to its thread when they are whole.

        Conversations without usable logits are skipped, once they were run by themselves.
        """
        if packed.too_large is not None:
            self.halve(packed.too_large)
            self.again += packed.too_large.halves()
        elif packed.shared:
            self.again += [Batch([row]) for row in packed.unusable]
        else:
            why = ("unusable_logits", "NaN, infinite or too few finite logits")
            self.skip(SkippedRow(row.index, *why) for row in packed.unusable)
            self.unusable += len(packed.unusable)
        if self.unusable >= HOPELESS_ROWS and not self.rows:
            raise TeacherError(
                f"the first {self.unusable} conversations gave no usable logits (NaN or infinite): "
                "try --dtype float32 or --attn eager"
            )
        self.output.add_sample(packed.table)
        self.rows += packed.table.num_rows
        self.tokens += int(np.sum(packed.table["num_tokens"].to_numpy()))
        if self.rows and self.output.should_flush():  # a job without any row leaves no output
            self.output.flush()
        if self.bar is not None:
            self.bar.update(packed.table.num_rows)
            rate = self.tokens / max(1e-9, float(self.bar.format_dict["elapsed"]))
            arrow = " ⬆" if self.output.is_uploading() else ""
            buffer = self.output.buffer_fill()
            self.bar.set_postfix_str(f"{rate:,.0f} tokens/s, buffer {buffer:.0%}{arrow}", False)

    def skip(self, rows: Iterable[SkippedRow]) -> None:
        """Count rows that give nothing, and name them in the log and to the output."""
        for row in rows:
            self.skipped[row.reason] += 1
            logger.warning("skipped conversation %d: %s %s", row.index, row.reason, row.detail)
            self.output.skip(row.index, row.reason)


def fetch_and_pack(batch: Batch, result: GPUBatchResult, *, schema: pa.Schema) -> PackedBatch:
    """Bring a result to the host in one transfer and pack it; runs beside the next forward."""
    with contextlib.suppress(torch.OutOfMemoryError):
        return cpu_postprocess_batch(result.to_host(), batch, schema=schema)
    return PackedBatch(packed_schema(schema).empty_table(), [], too_large=batch)


SKIP_REMEDIES = {
    "too_long": "raise --max-seq-len where the model has more positions",
    "id_too_large": "give a model and a tokenizer that belong together",
    "refused_by_template": "give another --chat-template",
    "no_tokens": "give another --chat-template",
}


def explain_skips(skipped: Counter[str]) -> str:
    """Say how many conversations were skipped for which reason, and what helps most of them."""
    if not skipped:
        return "no conversation was selected"
    remedy = SKIP_REMEDIES.get(
        skipped.most_common(1)[0][0], "check --messages-col, or --user-col and --assistant-col"
    )
    reasons = ", ".join(f"{n} {reason}" for reason, n in sorted(skipped.items()))
    return f"skipped {reasons}; {remedy}"


# Tasks --------------------------------------------------------------------------------------------


class ExtractTask:
    """One task of a datatrove pipeline: a worker's parts of the job."""

    name = "extract logits"

    def __init__(self, options: dict[str, Any]) -> None:
        self.options = options
        self.folder = os.getcwd()
        self.submitter = os.getpid()

    def __call__(self, data: Any, rank: int, world_size: int) -> None:
        """Extract and store the parts of one rank.

        Raises:
            LogitsError: not all of it is stored; the task counts as failed.
        """
        if os.path.isdir(self.folder):
            os.chdir(self.folder)
        pooled = os.environ.get("DATATROVE_EXECUTOR") == "LOCAL"
        if pooled:  # a GPU and CPUs of its own, where there are enough
            from multiprocess import current_process

            os.environ["LOCAL_RANK"] = str((current_process()._identity or (1,))[-1])
            if "OMP_NUM_THREADS" not in os.environ:
                torch.set_num_threads(max(1, (os.cpu_count() or 1) // self.options["workers"]))
        config = ExtractionConfig(**self.options, rank=rank, world_size=world_size, resume=True)
        with log_to_datatrove():
            summary = run_extraction(config)
        code = summary["exit_code"]
        if pooled and code == 128 + signal.SIGTERM and os.getpid() != self.submitter:
            os._exit(code)  # the pool that sent it waits for the process to end
        if code:
            raise LogitsError(
                f"task {rank} ended with exit code {code} after {summary.get('new_rows', 0)} rows "
                f"{summary.get('error', '')}: start the same command again"
            )


@contextmanager
def log_to_datatrove() -> Iterator[None]:
    """Write what is logged into the log of the task, which goes to the terminal, too."""
    from datatrove.utils.logging import logger as task_log

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            task_log.log(record.levelname, "{}", show_line(record.getMessage()))

    handler, before = Handler(), (logger.level, logger.propagate)
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    logger.propagate = False
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.level, logger.propagate = before


def run_tasks(config: ExtractionConfig) -> dict[str, Any]:
    """Let datatrove run the job as tasks; on Slurm, submit them.

    Every start runs every task: one whose parts are all listed ends after one request, and no mark
    of a file system can say that rows are there which are not.

    Returns:
        The summary that `main` prints: what the output holds, and how many tasks are left.

    Raises:
        ConfigError: datatrove or the engine is missing, or the output holds another job.
    """
    try:
        import datatrove.executor  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            f"--executor needs datatrove ({error}): pip install datatrove, or this project with "
            "its extra scale"
        ) from error
    destination = open_destination(config.output, private=config.private)
    retry(destination.open)
    listed = retry(destination.list)
    logs = local_path(config.cache_dir).absolute() / "tasks" / cache_key(config.output)
    if any(map(PART_NAME.fullmatch, listed)) and not config.resume and not logs.is_dir():
        raise ConfigError(
            f"{config.output} already holds shards: continue with --resume, or give another "
            "--output"
        )
    retry(destination.create)
    executor = make_executor(config, logs / f"{datetime.now():%Y%m%d-%H%M%S}-{os.getpid()}")
    before = count_stored(read_all_records(destination))
    began, failed = time.monotonic(), None
    with engine(config, executor):
        try:
            executor.run()
        except (LogitsError, RuntimeError) as error:
            failed = hide_tokens(first_line(error))
    submitted = config.tasks if config.executor == "slurm" and not failed else 0
    left = 0 if submitted else len(executor.get_incomplete_ranks(skip_completed=True))
    seconds, stored = time.monotonic() - began, count_stored(read_all_records(destination))
    return summarize(
        stored,
        config.output,
        EXIT_RUNTIME if left or failed else 0,
        tokens=stored["tokens"] - before["tokens"],
        seconds=seconds,
        tasks=config.tasks,
        tasks_left=left,
        tasks_submitted=submitted,
        logs=str(executor.logging_dir.path),
        **({"error": failed} if failed else {}),
    )


def read_all_records(destination: Destination) -> list[PartRecord]:
    """Return what the checkpoints of an output say of the parts that it lists."""
    listed = retry(destination.list)
    numbers = {number_of(path) for path in listed if PART_NAME.fullmatch(path)}
    job = job_digest(read_settings(destination, listed))
    known: dict[int, PartRecord] = {}
    for path in filter(CHECKPOINT_NAME.fullmatch, listed):
        of_job, records = decode_checkpoint(retry(functools.partial(destination.read, path)))
        known |= records if of_job == job else {}
    return [known[number] for number in numbers & known.keys()]


def make_executor(config: ExtractionConfig, logs: Path) -> Any:
    """Return datatrove's executor of the job, with --executor-options as its arguments.

    Raises:
        ConfigError: it has no such argument, or lacks one.
    """
    import datatrove.executor as engines

    from extract_logits import ExtractTask  # not __main__'s, which no other process has

    kind = getattr(engines, f"{str(config.executor).capitalize()}PipelineExecutor")
    own = {"executor", "executor_options", "tasks", "resume", "rank", "world_size", "workers"}
    options = {name: value for name, value in asdict(config).items() if name not in own}
    workers = config.workers or -1
    if config.executor == "local" and not config.workers:  # a GPU for each, or four processors
        workers = torch.cuda.device_count() or max(1, count_processors() // 4)
    arguments: dict[str, Any] = {
        "pipeline": [ExtractTask({**options, "workers": max(1, workers)})],
        "tasks": config.tasks,
        "workers": workers,
        "logging_dir": str(logs),
        "skip_completed": False,
    }
    if config.executor != "local":
        arguments |= {"cpus_per_task": 4, "mem_per_cpu_gb": 4, "gpus_per_task": 1}
    if config.executor == "slurm":
        python, here = Path(sys.executable).parent, Path(__file__).resolve().parent
        arguments |= {
            "job_name": "extract-logits",
            "qos": None,
            "env_command": (  # one line that gives a task this Python and these scripts
                f"export PATH={shlex.quote(str(python))}:$PATH "
                f"PYTHONPATH={shlex.quote(str(here))}:$PYTHONPATH"
            ),
            "sbatch_args": {"signal": "USR1@90"},
        }
    arguments |= config.executor_options or {}
    try:
        return kind(**arguments)
    except TypeError as error:  # names what is missing, or not known
        names = ", ".join(signature(kind).parameters)
        raise ConfigError(f"--executor-options: {error}; it takes {names}") from error


@contextmanager
def engine(config: ExtractionConfig, executor: Any) -> Iterator[None]:
    """Connect to the Ray cluster that is there, or start one on this machine; else do nothing.

    Raises:
        ConfigError: Ray or Slurm is not installed, or the cluster is too small for a task.
    """
    if config.executor == "slurm" and shutil.which("sbatch") is None:
        raise ConfigError("--executor slurm: there is no sbatch here; run it on a login node")
    if config.executor != "ray":
        yield
        return
    try:
        import ray
    except ImportError as error:
        raise ConfigError(
            f"--executor ray needs Ray ({error}): pip install ray, or this project with its extra "
            "scale"
        ) from error
    path = os.pathsep.join([str(Path(__file__).resolve().parent), os.environ.get("PYTHONPATH", "")])
    environment = {"env_vars": {"PYTHONPATH": path}}
    try:
        ray.init(address="auto", runtime_env=environment)
    except ConnectionError:
        ray.init(runtime_env=environment, include_dashboard=False)
    try:
        there = ray.cluster_resources()
        wanted = {
            "CPU": executor.cpus_per_task,
            "GPU": getattr(executor, "gpus_per_task", 0),
            "memory": executor.cpus_per_task * executor.mem_per_cpu_gb * 2**30,
        }
        for name, amount in wanted.items():
            if there.get(name, 0) < amount:  # Ray would wait for ever
                raise ConfigError(
                    f"a task wants {amount:,} {name}, the whole Ray cluster has "
                    f"{there.get(name, 0):,.0f}: give --executor-options with cpus_per_task, "
                    "gpus_per_task, mem_per_cpu_gb"
                )
        yield
    finally:
        ray.shutdown()


# Plan ---------------------------------------------------------------------------------------------

PLAN_ROWS = 1000  # conversations measured where no lengths are given
PROBE_BATCHES = 8
PROBE_S = (3.0, 30.0)  # after that, or this share of the job, no further batch is begun:
PROBE_SHARE = 0.03
COMMITS_PER_HOUR = 120  # the Hub allows 128 per repository
FILES_PER_REPOSITORY = 100_000  # what the Hub recommends at most


@dataclass(frozen=True)
class Sample:
    """Conversations that stand for a whole job, and its figures by them."""

    encoded: list[EncodedRow]
    measured: int  # conversations that were looked at
    selected: int
    rows: int  # of the whole job, as everything below
    tokens: int
    stored_tokens: int
    skipped: Mapping[str, int]


def plan_extraction(job: Job, should_stop: Callable[[], bool] = never) -> dict[str, Any]:
    """Estimate what a run would read, store and take, from lengths and a probe of the teacher.

    Nothing is written, neither to the output nor to the cache. What an output holds already is
    not subtracted. With several workers the figures are those of the whole job.

    Returns:
        `rows`, `tokens` of whole conversations, `stored_tokens` of which distributions are kept,
        `bytes` on disk, `shards`, `commits` at most, `hours` of all workers at the probe's rate or
        the given one, `limits` that are met, and what they were found from.

    Raises:
        DataError: nothing to extract.
        StopRequested: `should_stop` said so.
    """
    config = job.config
    workers = config.world_size or 1
    whole = replace(config, rank=None, world_size=None)
    job = replace(job, config=whole, selection=replace(job.selection, config=whole))
    sample = sample_job(job, should_stop)
    if not sample.rows:
        raise DataError(f"nothing to extract: {explain_skips(Counter(sample.skipped))}")
    probe = probe_teacher(job, sample, should_stop)
    times = 1.0 if config.plan_tokens is None else config.plan_tokens / sample.stored_tokens
    rows, tokens, stored = (
        round(times * n) for n in (sample.rows, sample.tokens, sample.stored_tokens)
    )
    rate = config.plan_rate or probe["rate"]
    shards = math.ceil(times * sample.selected / job.rows_per_part)
    hours = stored / rate / 3600
    size = probe["token_bytes"] * stored + probe["shard_bytes"] * shards
    paced = math.ceil(COMMITS_PER_HOUR * (1 + hours / workers))  # an hour's worth may come at once
    given = [f"--plan-{n}" for n in ("tokens", "rate") if getattr(config, f"plan_{n}") is not None]
    limits = [f"{rows:,} rows, where ids end at {INDEX_LIMIT:,}"] if rows > INDEX_LIMIT else []
    if shards > FILES_PER_REPOSITORY:
        limits.append(
            f"{shards:,} shards, where a repository should hold {FILES_PER_REPOSITORY:,} files: "
            f"give --upload-every {math.ceil(job.rows_per_part * shards / FILES_PER_REPOSITORY)} "
            "or more"
        )
    return {
        "plan": True,
        "rows": rows,
        "tokens": tokens,
        "stored_tokens": stored,
        "bytes": round(size),
        "shards": shards,
        "commits": min(shards, paced) + workers,
        "hours": round(hours, 4),
        "workers": workers,
        "hours_each": round(hours / workers, 4),
        "stored_tokens_per_second": round(rate, 1),
        "bytes_per_stored_token": round(probe["token_bytes"], 1),
        "assumed": f", and {' and '.join(given)}, which nobody has measured" if given else "",
        "skipped": dict(sample.skipped),
        "measured_rows": sample.measured,
        "selected_rows": sample.selected,
        "probe": {name: probe[name] for name in ("batches", "rows", "stored_tokens", "s")},
        "limits": limits,
        "output": config.output,
    }


def sample_job(job: Job, should_stop: Callable[[], bool]) -> Sample:
    """Encode some conversations, and scale their figures up; exact where lengths are given."""
    encoder, selection = job.encoder, job.selection
    chosen, selected = choose_sample(selection, should_stop)
    done = run_ahead(
        encoder.encode_all,
        [chosen[at : at + CHUNK_ROWS] for at in range(0, len(chosen), CHUNK_ROWS)],
        processes=worker_processes(len(chosen)),
        should_stop=should_stop,
    )
    rows = list(itertools.chain.from_iterable(done))
    encoded = [row for row in rows if isinstance(row, EncodedRow)]
    for note in itertools.chain.from_iterable(row.notes for row in encoded):
        warn_once(note)
    skipped = Counter(row.reason for row in rows if isinstance(row, SkippedRow))
    tokens = sum(row.input_ids.size for row in encoded)
    stored = sum(row.token_positions.size for row in encoded)
    share = len(chosen) / max(1, selected)
    sample = Sample(
        encoded,
        len(chosen),
        selected,
        rows=round(len(encoded) / share),
        tokens=round(tokens / share),
        stored_tokens=round(stored / share),
        skipped={reason: round(n / share) for reason, n in sorted(skipped.items())},
    )
    if job.lengths is None or selection.ids is None or not encoded:
        return sample
    places = job.lengths.places(np.asarray(selection.ids))
    lengths = job.lengths.length[places]
    too_long = lengths > (encoder.max_seq_len or lengths.max())
    usable = (lengths > 0) & ~too_long
    total = int(lengths[usable].sum())
    kept = round(total * stored / tokens)
    if job.lengths.num_tokens is not None:
        kept = int(job.lengths.num_tokens[places][usable].sum())
    left_out = {"too_long": int(too_long.sum()), "unusable": int((lengths == 0).sum())}
    return replace(
        sample,
        measured=len(lengths),
        rows=int(usable.sum()),
        tokens=total,
        stored_tokens=kept,
        skipped={reason: n for reason, n in left_out.items() if n},
    )


def choose_sample(
    selection: Selection, should_stop: Callable[[], bool]
) -> tuple[list[tuple[int, Row]], int]:
    """Return (id, row) of some conversations, which depend on ids only, and how many there are.

    A stream is read once, to count its rows.
    """
    if selection.ids is not None:
        (whole,) = selection.parts(len(selection))
        places = np.sort(order_at_random(whole.ids, seed=1)[:PLAN_ROWS]).tolist()
        ids = whole.ids[places].tolist()
        return list(zip(ids, whole.read(places), strict=True)), len(selection)
    logger.info("reading the stream once to count its conversations")
    best: list[tuple[int, tuple[int, Row]]] = []
    selected = 0
    for part in selection.parts(PLAN_ROWS, should_stop):
        selected += part.ids.size
        best += zip(mix_hash(part.ids, seed=1).tolist(), part.rows(), strict=True)
        best = sorted(best, key=lambda entry: entry[0])[:PLAN_ROWS]
    return sorted((pair for _, pair in best), key=lambda pair: pair[0]), selected


def probe_teacher(job: Job, sample: Sample, should_stop: Callable[[], bool]) -> dict[str, Any]:
    """Run a few batches of all lengths the way a run does, and time them.

    The first one, the longest, is not counted: it shows whether the device holds it, and what is
    done once is done then.
    """
    tables: list[pa.Table] = []
    keeper = Follower()
    keeper.add_sample = tables.append
    run = Extraction(job, keeper, should_stop)
    try:
        batches = list(run.batches_of(Window(sample.encoded)))
        weights = np.asarray([sum(row.input_ids.size for row in batch.rows) for batch in batches])
        middles = (np.cumsum(weights) - weights / 2) / weights.sum()  # share of tokens before each
        order = [4, 1, 6, 2, 0, 5, 3, 7]  # the first few are spread, too, when time runs out
        shares = (np.asarray(order) + 0.5) / PROBE_BATCHES
        picks = list(dict.fromkeys(np.abs(middles[:, None] - shares).argmin(axis=0).tolist()))
        run.submit(batches[0])
        run.finish_window()
        tables.clear()
        seconds: list[float] = []
        started = time.monotonic()
        for at in picks:
            stop_if(run.stops)
            begun = time.monotonic()
            run.submit(batches[at])
            run.finish_window()
            seconds.append(time.monotonic() - begun)
            pace = sum(seconds) / int(weights[picks[: len(seconds)]].sum())
            enough_s = np.clip(PROBE_SHARE * pace * sample.tokens, *PROBE_S)
            if agree(time.monotonic() - started > enough_s):  # the others run the same batches
                break
    finally:
        run.close()
    table = pa.concat_tables(tables)
    if not table.num_rows:
        raise TeacherError(
            f"{job.config.model}: the probe gave no usable logits (NaN or infinite): "
            "try --dtype float32 or --attn eager"
        )
    token_bytes, shard_bytes = measure_shard(job, table)
    return {
        "batches": len(seconds),
        "rows": table.num_rows,
        "stored_tokens": int(np.sum(table["num_tokens"].to_numpy())),
        "s": round(sum(seconds), 3),
        "rate": sample.stored_tokens / (sample.tokens * pace),
        "token_bytes": token_bytes,
        "shard_bytes": shard_bytes,
    }


def measure_shard(job: Job, table: pa.Table) -> tuple[float, float]:
    """Encode rows as a part; return the bytes per stored token, and those before the first."""
    sizes = []
    for rows in (table, table.slice(0, 1)):
        with storage_errors(tempfile.gettempdir()), tempfile.TemporaryDirectory() as folder:
            sizes.append(write_part(Path(folder) / "part.parquet", rows, job.schema))
    tokens = table["num_tokens"].to_numpy()
    if table.num_rows == 1:
        return sizes[0] / int(tokens[0]), 0.0
    token_bytes = (sizes[0] - sizes[1]) / int(tokens[1:].sum())
    return token_bytes, max(0.0, sizes[1] - token_bytes * int(tokens[0]))


def format_plan(plan: Mapping[str, Any]) -> str:
    """Lay out a plan as a table for people."""
    hours = plan["hours"]
    lines = {
        "rows": f"{plan['rows']:,}",
        "tokens": f"{plan['tokens']:,}",
        "stored tokens": f"{plan['stored_tokens']:,}",
        "bytes on disk": f"{plan['bytes']:,} ({plan['bytes_per_stored_token']} a stored token)",
        "shards": f"{plan['shards']:,}",
        "commits": f"at most {plan['commits']:,}",
        "hours": f"{hours:,.2f}" if hours >= 0.1 else f"{hours:.4f} ({hours * 3600:.0f} s)",
        "stored tokens/s": f"{plan['stored_tokens_per_second']:,} of one worker",
        "skipped": ", ".join(f"{n:,} {reason}" for reason, n in plan["skipped"].items()) or "none",
        "found from": (
            f"the lengths of {plan['measured_rows']:,} of {plan['selected_rows']:,} conversations, "
            f"{plan['probe']['batches']} batches of the teacher{plan['assumed']}"
        ),
    }
    if plan["workers"] > 1:
        lines[f"each of {plan['workers']:,}"] = f"{plan['hours_each']:,.2f} hours"
    table = [f"{name:>16}  {value}" for name, value in lines.items()]
    return "\n".join([*table, *(f"{'limit':>16}  {text}" for text in plan["limits"])])


# --------------------------------------------------------------------------------------------------
# 11 CLI
# --------------------------------------------------------------------------------------------------


def build_parser() -> argparse.ArgumentParser:
    """Build the parser from the fields of `ExtractionConfig`, grouped in the order of the data."""
    parser = OneLineParser(
        prog="extract-logits",
        usage="%(prog)s --model M --dataset D --output O [options]",
        description="Run a teacher over a chat dataset once; keep its distributions as shards.",
        epilog=f"exit codes: {(__doc__ or '').partition('Exit codes: ')[2].strip()}",
    )
    add_options(parser, ExtractionConfig, required=("output",))  # --resume knows the others
    return parser


def parse_args(argv: Sequence[str] | None = None) -> ExtractionConfig:
    """Read the command line; `argv` None is the process's own.

    With --resume and neither model nor dataset, every option that is not given is what the output
    records.

    Raises:
        ConfigError: a value is out of range or options contradict each other.
        SystemExit: 2 for unknown options or text that is not a value, 0 after --help.
    """
    parser = build_parser()
    options = vars(parser.parse_args(argv))
    missing = [name for name in ("model", "dataset") if options[name] is None]
    if missing and options["resume"]:  # what is given comes last, and wins
        typed = sys.argv[1:] if argv is None else argv
        options = vars(parser.parse_args([*recorded_words(options["output"]), *typed]))
    elif options["min_p"] is not None:  # a default that was given is refused, too
        given = vars(build_parser_of_given().parse_args(argv))
        for name in NOT_BESIDE_MIN_P:
            if name in given:
                refuse_beside_min_p(flag_of(name))
    if missing and not options["resume"]:
        parser.error(f"the following arguments are required: --{', --'.join(missing)}")
    if options["rank"] is None and options["world_size"] is None:
        environment = dict(os.environ) if options["executor"] is None else {}
        if options["tensor_parallel"]:  # all processes of a torchrun are one worker
            environment.pop("RANK", None)
        options["rank"], options["world_size"] = launched_as(environment)
    return ExtractionConfig(**options)


def build_parser_of_given() -> argparse.ArgumentParser:
    """Return a parser whose result holds only what was given."""
    parser = build_parser()
    for action in parser._actions:
        action.default = argparse.SUPPRESS
    return parser


def recorded_words(output: str) -> list[str]:
    """Return the options that an output records, as they would be typed.

    Raises:
        ConfigError: it records none.
        HubError: it is out of reach.
    """
    destination = open_destination(output)
    settings = read_settings(destination, retry(destination.list))
    options = settings.get("options")
    if not isinstance(options, dict) or not {"model", "dataset"} <= options.keys():
        raise ConfigError(
            f"{output} records no job that --resume could continue by itself: give --model and "
            "--dataset"
        )
    names = {entry.name for entry in fields(ExtractionConfig)} - LOCAL_OPTIONS
    words = []
    for name, value in options.items():
        if name in names:
            text = value if isinstance(value, str) else json.dumps(value)
            words.append(flag_of(name) if value is True else f"{flag_of(name)}={text}")
    return words


LAUNCHERS = (  # variables of rank and number of workers, from the outermost launcher to the inner
    ("a Slurm array", "SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_COUNT"),
    ("SkyPilot", "SKYPILOT_NODE_RANK", "SKYPILOT_NUM_NODES"),
    ("srun", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS"),
    ("torchrun", "RANK", "WORLD_SIZE"),
)


def launched_as(environment: Mapping[str, str]) -> tuple[int | None, int | None]:
    """Return rank and number of workers by the launchers' environment; None without one.

    Launchers are nested: a torchrun of 8 processes on each of 4 SkyPilot nodes is 32 workers. A
    torchrun that spans machines counts them itself.

    Raises:
        ConfigError: what a launcher has set is no such pair of numbers.
    """
    spans = environment.get("GROUP_WORLD_SIZE", "1") not in ("", "0", "1")
    rank, world_size, found = 0, 1, False
    for launcher, *names in LAUNCHERS:
        if not all(name in environment for name in names):
            continue
        if spans and launcher in ("SkyPilot", "srun"):
            continue
        inner, size = (environment[name] for name in names)
        first = environment.get("SLURM_ARRAY_TASK_MIN", "0") if launcher == "a Slurm array" else "0"
        usable = all(value.isdecimal() for value in (inner, size, first))
        if not usable or not 0 <= int(inner) - int(first) < int(size):
            raise ConfigError(
                f"{names[0]}={inner} and {names[1]}={size}, set by {launcher}, are no worker "
                "and number of workers: give --rank and --world-size"
            )
        rank, world_size = rank * int(size) + int(inner) - int(first), world_size * int(size)
        found = True
    return (rank, world_size) if found else (None, None)


TALKATIVE = {  # loggers of libraries, and what is worth a line of theirs
    "filelock": logging.WARNING,
    "torchao": logging.ERROR,  # kernels for other devices that could not be loaded
    "torch.utils._pytree": logging.ERROR,  # what torchao does that torch will not like one day
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code.

    The last line on stdout is one JSON object, unless the input was refused (exit code 2); the last
    one on stderr is for a person.
    """
    outlive_readers("stdout", "stderr")
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S"
    )
    for name, level in TALKATIVE.items():
        logging.getLogger(name).setLevel(level)
    log_safely()
    config = None
    try:
        config = parse_args(argv)
        if "SLURM_LOCALID" in os.environ:  # a GPU of its own for each task of a node
            os.environ.setdefault("LOCAL_RANK", os.environ["SLURM_LOCALID"])
        summary = run_extraction(config)
    except HubError as error:
        output = build_parser_of_given().parse_args(argv).output
        summary = {**nothing_done(output, EXIT_UNDELIVERED), "error": hide_tokens(str(error))}
    except LogitsError as error:
        sys.stderr.write(f"extract_logits.py: {hide_tokens(str(error))}\n")
        return EXIT_BAD_INPUT
    if argv is None:  # a Ctrl-C from here on changes nothing any more
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    if "plan" in summary:
        sys.stdout.write(format_plan(summary) + "\n")
    if summary.keys() != {"exit_code"}:  # else one of a group that another process speaks for
        print(json.dumps(summary))  # noqa: T201
        sys.stdout.flush()
        sys.stderr.write(describe_end(summary) + "\n")
    if argv is None:
        requests = [thread for thread in threading.enumerate() if thread.name == "request"]
        for thread in requests:  # one that writes a file has its time
            thread.join(GRACE_S)
        # the Hub's client would hold us up, and threads of a group once aborted at the very end
        in_group = config is not None and config.tensor_parallel
        if in_group or any(thread.is_alive() for thread in requests):
            sys.stderr.flush()
            os._exit(int(summary["exit_code"]))
    return int(summary["exit_code"])


def describe_end(summary: Mapping[str, Any]) -> str:
    """Say in one line how a run ended: rows, tokens, bytes, place, and what to type next."""
    code, output = summary["exit_code"], summary.get("output", "")
    known = summary.get("rows") is not None
    if "error" in summary:
        kept = summary.get("undelivered")
        further = f"; {plural(len(kept), 'file')} kept in {Path(kept[0]).parent}" if kept else ""
        further += "; next: the same command with --resume" if known else ""
        return f"extract_logits.py: {summary['error']}{further}"
    if "plan" in summary or not known:
        return "stopped before anything was extracted" if code else "planned; nothing was written"
    held = f"{plural(summary['rows'], 'row')}, {plural(summary['tokens'], 'token')}"
    there = f"{held}, {summary['bytes'] / 1e6:,.1f} MB in {output}"
    if code == 0:
        return f"done: {there}; next: python explore_logits.py {shlex.quote(str(output))}"
    return f"not done: {there}; next: the same command with --resume"


if __name__ == "__main__":
    sys.exit(main())
