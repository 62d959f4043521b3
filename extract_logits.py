"""Run a teacher over a chat dataset once and keep its distributions as small Parquet shards.

    dataset → prepare_dataset → ConversationDataset → TokenBudgetBatchSampler → DataLoader
            → gpu_process_batch → AsyncPostProcessor → StreamingHFUploader → Hub or folder

Row token j is the distribution from which the j-th extracted assistant token is predicted: its
nucleus (the top tokens covering top_p, at most K), M tokens drawn from the rest without
replacement, and the log-sum-exp.

Letters: S sequence length, N extracted tokens, V vocabulary size, K nucleus cap (--top-p-max),
M tail samples per token (--sampled-n), B sequences in a batch.

    python extract_logits.py --model Qwen/Qwen3-8B --dataset user/chats --output user/chats-logits
    python extract_logits.py --model ./teacher --dataset chats.jsonl --output ./logits --resume

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
import base64
import contextlib
import copy
import errno
import functools
import hashlib
import heapq
import importlib.metadata
import importlib.util
import io
import itertools
import json
import logging
import math
import multiprocessing
import random
import re
import shlex
import shutil
import tempfile
import threading
import time
import zlib
from array import array
from collections import Counter, deque
from collections.abc import Callable, Collection, Container, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import (
    MISSING,
    Field,
    asdict,
    astuple,
    dataclass,
    field,
    fields,
    replace,
)
from datetime import timedelta
from email.utils import parsedate_to_datetime
from inspect import signature
from pathlib import Path
from typing import IO, Any, Protocol, TypeVar, cast, get_args, get_type_hints

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from explore_logits import (
    CONFIG_FILE,
    FORMAT_VERSION,
    MAX_TOKEN_ID,
    METADATA_SETTINGS,
    TEMPLATE_FILE,
    ConversationColumns,
    ConversationError,
    EncodedConversation,
    FormatError,
    LogitsError,
    OneLineParser,
    conversation_settings,
    date_of_today,
    encode_row,
    first_line,
    format_mask_preview,
    load_chat_template,
    load_tokenizer,
    log_hub_once,
    open_source,
    outlive_readers,
    pack_indices,
    prints_time,
    read_lengths,
    read_lengths_settings,
    resolve_columns,
    shard_schema,
    source_columns,
    source_id,
    source_revision,
)

try:
    import fcntl
except ImportError:  # Windows: runs that share a cache are not noticed
    fcntl = None  # type: ignore[assignment]

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


class ConfigError(LogitsError):
    """An option is wrong or two do not go together; met before anything runs (exit 2)."""


class DataError(LogitsError):
    """The dataset cannot be read as conversations; met while it is prepared (exit 2)."""


class TeacherError(LogitsError):
    """The model cannot be loaded or its logits cannot be used (exit 2)."""


class HubError(LogitsError):
    """The Hub refused or was out of reach; what could not be delivered is kept locally (exit 4).

    Attributes:
        stored: what is known of the output, and of the files kept, as the run's summary has it.
    """

    stored: Mapping[str, Any] = {}


# --------------------------------------------------------------------------------------------------
# 0 Config
# --------------------------------------------------------------------------------------------------


def parse_limits(text: str) -> dict[str, int]:
    """Parse a JSON object of non-negative integers by group name, such as {"math": 20000}."""
    value = json.loads(text)
    if not isinstance(value, dict) or not all(
        isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in value.values()
    ):
        raise ValueError("must be a JSON object of non-negative integers")
    return dict(value)


def parse_thresholds(text: str) -> dict[int, int]:
    """Parse {"length": conversations per batch}: JSON keys are strings, lengths are integers."""
    value = {int(length): n for length, n in parse_limits(text).items()}
    if not value or min(value) < 1 or min(value.values()) < 1:
        raise ValueError("needs lengths and batch sizes of at least 1")
    return value


def parse_texts(text: str) -> dict[str, str]:
    """Parse a JSON object of names and values, such as {"account": "llm", "qos": "high"}."""
    value = json.loads(text)
    if not isinstance(value, dict):
        raise ValueError("must be a JSON object")
    return {str(name): str(setting) for name, setting in value.items()}


def option(default: Any, help_text: str, *, group: str, **checks: Any) -> Any:
    """Declare one option; its dataclass field is the only place that holds default, help and range.

    `checks`: `low`, `high` (inclusive), `above` (exclusive), `choices`, `parse` (text to value).
    """
    metadata = {"help": help_text, "group": group, **checks}
    if default is MISSING:
        return field(metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(kw_only=True)
class ExtractionConfig:
    """Every option of a run; field names are option names with underscores, "off" is None.

    Raises:
        ConfigError: a value is out of range or two options contradict each other.
    """

    model: str = option(MISSING, "Hub id or local folder of the teacher", group="teacher")
    revision: str | None = option(None, "model revision: branch, tag or commit", group="teacher")
    trust_remote_code: bool = option(False, "run model code from the Hub", group="teacher")
    device: str = option("auto", "cuda, cuda:N, mps or cpu; auto is the best", group="teacher")
    dtype: str = option(
        "auto",
        "of weights and forward; auto is the checkpoint's on a GPU, float32 on a CPU",
        group="teacher",
        choices=("auto", "float32", "bfloat16", "float16"),
    )
    attn: str = option("auto", "eager, sdpa, flash_attention_2, …", group="teacher")
    tensor_parallel: bool = option(
        False,
        "split the teacher over all processes of a torchrun, which work as one",
        group="teacher",
    )

    dataset: str = option(
        MISSING, "Hub id, or a .jsonl, .json, .parquet, .csv file or folder", group="dataset"
    )
    subset: str | None = option(None, "dataset configuration", group="dataset")
    split: str = option("train", "dataset split", group="dataset")
    streaming: bool = option(False, "never hold the whole source in memory", group="dataset")
    messages_col: str | None = option(
        None, "column of chat messages; usual names are found", group="dataset"
    )
    user_col: str = option("question", "user column of single-turn data", group="dataset")
    assistant_col: str = option("answer", "assistant column of single-turn data", group="dataset")
    system_col: str | None = option(None, "system column of single-turn data", group="dataset")
    index_col: str | None = option(
        None, "column of unique integer ids (default: the row number)", group="dataset"
    )

    limit: int | None = option(
        None, "conversations of the whole job, over all resumed runs", group="selection", low=1
    )
    start_offset: int = option(0, "source rows to pass over first", group="selection", low=0)
    random_sample: bool = option(
        False, "take rows at random, by --seed, where a limit leaves some out", group="selection"
    )
    subject_col: str | None = option(
        None, "column of group names for --sample-subject", group="selection"
    )
    sample_subject: dict[str, int] | None = option(
        None,
        'conversations per group, JSON: {"math": 20000, "*": 6000}; "" is the empty group',
        group="selection",
        parse=parse_limits,
    )
    full_dataset: bool = option(
        False, "take every row; refuses options that leave some out", group="selection"
    )
    seed: int = option(
        42, "of the selection and of the tail", group="selection", low=0, high=2**63 - 1
    )

    length_col: str | None = option(
        None, "column with lengths in tokens, of --tokenized-dataset or the source", group="lengths"
    )
    tokenized_dataset: str | None = option(
        None, "lengths by compute_lengths.py: file, folder or Hub id", group="lengths"
    )
    max_seq_len: int | None = option(
        None,
        "skip longer conversations, in tokens (default: the model's maximum)",
        group="lengths",
        low=2,
    )

    chat_template: str | None = option(
        None, "Jinja file used instead of the tokenizer's template", group="conversation"
    )
    include_think: bool = option(
        False, "extract think tags that only the template inserts, too", group="conversation"
    )
    include_end: bool = option(
        False, "extract what the template appends after the turn's end, too", group="conversation"
    )
    verify_mask: bool = option(
        False,
        "show the extracted tokens of some rows first; on a terminal, ask",
        group="conversation",
    )

    top_p: float = option(
        0.98, "probability that the nucleus covers", group="extraction", above=0, high=1
    )
    top_p_max: int = option(
        100, "K: nucleus tokens kept at most", group="extraction", low=1, high=255
    )
    sampled_n: int = option(24, "M: tokens drawn from the rest", group="extraction", low=0)
    logit_bits: int = option(
        16, "resolution of a stored logit in bits", group="extraction", low=4, high=16
    )
    store_tokens: bool = option(
        False, "add the columns input_ids and token_positions", group="extraction"
    )
    reference_extraction: bool = option(
        False, "extract by the plain code that reads as the definition", group="extraction"
    )

    batch_thresholds: dict[int, int] | None = option(
        None,
        'conversations per batch up to a length, JSON: {"512": 8, "1024": 4}',
        group="batches",
        parse=parse_thresholds,
    )
    max_batch_size: int | None = option(
        None, "conversations per batch at most", group="batches", low=1
    )
    max_batch_tokens: int | None = option(
        None, "tokens per batch at most, padding counted", group="batches", low=1
    )

    output: str = option(
        MISSING, "Hub repo user/name, or a folder (begins with . / ~ or exists)", group="output"
    )
    private: bool = option(False, "create the Hub repo private", group="output")
    upload_every: int = option(500, "conversations per shard", group="output", low=1)
    upload_size_mb: float | None = option(
        None, "close a shard at this encoded size instead, in MB", group="output", above=0
    )
    cache_dir: str = option(
        ".logit_extraction_cache", "local state: shards under way, pending rows", group="output"
    )

    plan: bool = option(
        False, "print rows, tokens, bytes, shards and hours; write nothing", group="run"
    )
    plan_tokens: float | None = option(
        None, "plan for so many stored tokens, such as 1e12, of which the dataset is a sample",
        group="run", above=0,
    )  # fmt: skip
    plan_rate: float | None = option(
        None, "plan with so many stored tokens a second of one worker, not the probe's",
        group="run", above=0,
    )  # fmt: skip
    plan_price: float | None = option(
        None, "plan with this price of a worker's hour", group="run", above=0
    )
    resume: bool = option(False, "continue; with nothing to continue, start", group="run")
    force_restart: bool = option(False, "discard recorded progress and start over", group="run")
    max_runtime_minutes: float | None = option(
        None, "stop in time, keep everything, exit 75", group="run", above=0
    )
    rank: int | None = option(None, "this worker (default: the launcher's)", group="run", low=0)
    world_size: int | None = option(
        None, "number of workers (default: the launcher's)", group="run", low=1
    )

    executor: str | None = option(
        None,
        "let datatrove run the job as tasks: local, slurm or ray (extra scale)",
        group="executor",
        choices=("local", "slurm", "ray"),
    )
    tasks: int | None = option(
        None, "tasks, each a worker; what is done stays done when given again", group="executor",
        low=1,
    )  # fmt: skip
    workers: int | None = option(
        None, "tasks that run at the same time (default: all)", group="executor", low=1
    )
    gpus_per_task: int | None = option(
        None, "GPUs of a task (default: 1 on slurm and ray, what is there if local)",
        group="executor", low=0,
    )  # fmt: skip
    cpus_per_task: int = option(4, "CPUs of a task, slurm and ray", group="executor", low=1)
    mem_per_cpu_gb: int = option(
        4, "memory of a CPU, slurm and ray, in GB", group="executor", low=1
    )
    executor_logs: str | None = option(
        None, "shared folder of logs and marks of done tasks (default: in --cache-dir)",
        group="executor",
    )  # fmt: skip
    slurm_partition: str | None = option(None, "partition to submit to", group="executor")
    slurm_time: str = option("24:00:00", "time limit of a task", group="executor")
    slurm_setup: str | None = option(
        None, "shell command before a task (default: this Python's environment)", group="executor"
    )
    slurm_options: dict[str, str] | None = option(
        None, 'further options of sbatch, JSON: {"account": "llm", "qos": "high"}',
        group="executor", parse=parse_texts,
    )  # fmt: skip

    def __post_init__(self) -> None:
        for entry in fields(self):
            check_option(entry.name, getattr(self, entry.name), entry.metadata)
        self._check_pairs()

    def _check_pairs(self) -> None:
        for name in ("model", "dataset", "output"):
            if not getattr(self, name).strip():
                raise ConfigError(f"--{name} is empty: give a Hub id, or ./ for this folder")
        if self.resume and self.force_restart:
            raise ConfigError("--resume continues and --force-restart discards: give one of them")
        if (self.sample_subject is None) != (self.subject_col is None):
            raise ConfigError("--sample-subject and --subject-col need each other: give both")
        if (self.rank is None) != (self.world_size is None):
            raise ConfigError("--rank and --world-size need each other: give both")
        if self.rank is not None and self.world_size is not None and self.rank >= self.world_size:
            raise ConfigError(
                f"--rank {self.rank} is not below --world-size {self.world_size}: count from 0"
            )
        self._check_full_dataset()
        self._check_executor()

    def _check_executor(self) -> None:
        if (self.executor is None) != (self.tasks is None):
            raise ConfigError("--executor and --tasks need each other: give both")
        if self.executor is None:
            return
        single = {
            "--rank": self.rank is not None, "--plan": self.plan,
            "--verify-mask": self.verify_mask, "--tensor-parallel": self.tensor_parallel,
        }  # fmt: skip
        for flag in [flag for flag, given in single.items() if given]:
            raise ConfigError(f"--executor starts tasks, {flag} is for a single run: drop one")
        if self.force_restart:
            raise ConfigError(
                "--force-restart would discard rows with every task that is started again: empty "
                "the output yourself, or give another --output"
            )
        if self.executor == "slurm" and self.slurm_partition is None:
            raise ConfigError("--executor slurm needs --slurm-partition: `sinfo` names those there")

    def _check_full_dataset(self) -> None:
        selecting = {
            "--limit": self.limit, "--sample-subject": self.sample_subject,
            "--start-offset": self.start_offset, "--random-sample": self.random_sample,
        }  # fmt: skip
        given = [flag for flag, value in selecting.items() if value not in (None, False, 0)]
        if self.full_dataset and given:
            raise ConfigError(f"--full-dataset takes every row: drop {' and '.join(given)}")


def check_option(name: str, value: Any, checks: Mapping[str, Any]) -> None:
    """Raise ConfigError when a value is outside the range or the choices of its option."""
    if value is None:
        return
    flag = "--" + name.replace("_", "-")
    choices = checks.get("choices")
    if choices and value not in choices:
        raise ConfigError(f"{flag} {value}: choose one of {', '.join(choices)}")
    low, high, above = checks.get("low"), checks.get("high"), checks.get("above")
    if low is not None and value < low:
        raise ConfigError(f"{flag} {value}: must be at least {low}")
    if above is not None and not value > above:
        raise ConfigError(f"{flag} {value}: must be above {above}")
    if high is not None and not value <= high:
        raise ConfigError(f"{flag} {value}: must be at most {high}")


# --------------------------------------------------------------------------------------------------
# 1 Dataset
# --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class EncodedRow:
    """One conversation as the teacher sees it."""

    index: int
    input_ids: npt.NDArray[np.int32]  # (S,)
    token_positions: npt.NDArray[np.int32]  # (N,) ascending, each >= 1: the tokens to predict


@dataclass(frozen=True)
class SkippedRow:
    """One conversation that gives no row, with the reason that it is counted under."""

    index: int
    reason: str
    detail: str = ""


@dataclass(frozen=True)
class RowEncoder:
    """Turns a source row into token ids and the positions to extract; the same in every process."""

    tokenizer: Any
    chat_template: str
    columns: ConversationColumns
    include_think: bool = False
    include_end: bool = False
    max_seq_len: int | None = None  # tokens
    date: str | None = None  # that a template is told which asks for the time

    def encode(self, row: Mapping[str, Any], index: int) -> EncodedRow | SkippedRow:
        """Render, tokenize and align one conversation; one that cannot be used says why."""
        try:
            encoded = self.align(row, max_tokens=self.max_seq_len)
        except ConversationError as error:
            return SkippedRow(index, error.reason, str(error))
        if self.max_seq_len is not None and encoded.input_ids.size > self.max_seq_len:
            return too_long(index, encoded.input_ids.size, self.max_seq_len)
        return EncodedRow(index, encoded.input_ids, encoded.token_positions)

    def align(
        self, row: Mapping[str, Any], *, max_tokens: int | None = None
    ) -> EncodedConversation:
        """Return a conversation with its text and the tokens to extract, however long it is.

        Only text that surely has more than `max_tokens` tokens is refused.

        Raises:
            ConversationError: it cannot be used.
        """
        return encode_row(
            row,
            self.columns,
            self.tokenizer,
            chat_template=self.chat_template,
            include_think=self.include_think,
            include_end=self.include_end,
            date=self.date,
            max_tokens=max_tokens,
        )


def too_long(index: int, length: int, max_seq_len: int) -> SkippedRow:
    """Say that a conversation of `length` tokens is above the limit."""
    return SkippedRow(index, "too_long", f"{length} tokens, --max-seq-len is {max_seq_len}")


class ConversationDataset(torch.utils.data.Dataset[EncodedRow | SkippedRow]):
    """The prepared conversations in source order, encoded when they are asked for."""

    def __init__(self, prepared: PreparedDataset, encoder: RowEncoder) -> None:
        self.prepared = prepared
        self.encoder = encoder

    def __len__(self) -> int:
        return self.prepared.indices.size

    def __getitem__(self, position: int) -> EncodedRow | SkippedRow:
        return self.__getitems__([position])[0]

    def __getitems__(self, positions: Sequence[int]) -> list[EncodedRow | SkippedRow]:
        """Encode several conversations; the source is read once for all of them."""
        prepared = self.prepared
        if prepared.encoded is not None:
            return [prepared.encoded[position] for position in positions]
        rows = prepared.source.__getitems__(prepared.numbers[positions].tolist())
        indices = prepared.indices[positions].tolist()
        return [self.encoder.encode(*pair) for pair in zip(rows, indices, strict=True)]


class WorkerTask(torch.utils.data.Dataset[Any]):
    """What a worker process of a `DataLoader` makes of each batch that its sampler hands over.

    A refusal is returned, not raised: torch would put the worker's traceback into its message.
    """

    def __init__(self, make: Callable[[list[Any]], Any]) -> None:
        self.make = make

    def __getitems__(self, items: list[Any] | LogitsError) -> Any:
        if isinstance(items, LogitsError):
            return items
        try:
            return self.make(items)
        except LogitsError as error:
            return error


class StopRequested(Exception):
    """The run was told to stop while rows were read; nothing is wrong, and it can be resumed."""


def run_ahead(
    make: Callable[[list[Any]], Any],
    batches: Iterable[list[Any]],
    *,
    processes: int,
    should_stop: Callable[[], bool] = lambda: False,
) -> Iterator[Any]:
    """Yield `make(batch)` of every batch, in order, made ahead in worker processes (0: in this).

    `batches` is read in this process, and only so far ahead as keeps the workers busy.

    Raises:
        LogitsError: what `make` or `batches` raised, as itself, after all that came before.
        StopRequested: `should_stop` said so.
    """
    if processes:  # each conversation is tokenized by itself, so threads would only warn at a fork
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    loader: torch.utils.data.DataLoader[Any] = torch.utils.data.DataLoader(
        WorkerTask(make),
        batch_sampler=end_with_error(batches),
        collate_fn=pass_through,
        num_workers=processes,
        prefetch_factor=4 if processes else None,
        worker_init_fn=leave_signals_to_parent if processes else None,
        # A fork server would stand between worker and run, and die of a signal to the group.
        multiprocessing_context="fork" if processes and sys.platform == "linux" else None,
    )
    results = iter(loader)
    try:
        for made in results:
            if isinstance(made, LogitsError):
                raise made
            if should_stop():
                raise StopRequested
            yield made
    finally:  # the last reference: the workers end now, not when a traceback is collected
        del loader, results


def end_with_error(batches: Iterable[Any]) -> Iterator[Any]:
    """Yield batches and, where reading them is refused, the refusal as the last one.

    An error that leaves a sampler would tear down the workers before their rows have come.
    """
    try:
        yield from batches
    except LogitsError as error:
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


MOST_WORKERS = 16  # processes that tokenize, each about 100,000 tokens a second


def worker_processes(rows: int) -> int:
    """Return how many processes are worth starting for that many rows; 0 is this one."""
    if rows < 512:
        return 0
    return max(1, min(MOST_WORKERS, count_processors() - 1))


def count_processors() -> int:
    """Return how many processors this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


# --------------------------------------------------------------------------------------------------
# 2 Prepare
# --------------------------------------------------------------------------------------------------

INDEX_LIMIT = 2**31  # the index column is int32


@dataclass(frozen=True)
class PreparedDataset:
    """The conversations of a job, or of one window of a stream, and what is known of them."""

    source: Any  # source[number] -> row
    numbers: npt.NDArray[np.int64]  # (n,) row number in `source`, ascending
    indices: npt.NDArray[np.int64]  # (n,) id in the output
    lengths: npt.NDArray[np.int64]  # (n,) tokens of the rendered conversation
    num_tokens: npt.NDArray[np.int64] | None = None  # (n,) tokens to extract, where known
    skipped: list[SkippedRow] = field(default_factory=list)
    encoded: list[EncodedRow] | None = None  # (n,) where the rows were encoded already

    def take(self, places: npt.NDArray[Any]) -> PreparedDataset:
        """Return the rows at some places, which are positions or a mask."""
        return replace(
            self,
            numbers=self.numbers[places],
            indices=self.indices[places],
            lengths=self.lengths[places],
            num_tokens=None if self.num_tokens is None else self.num_tokens[places],
        )


def prepare_dataset(
    config: ExtractionConfig,
    source: Any,
    encoder: RowEncoder,
    *,
    should_stop: Callable[[], bool] = lambda: False,
) -> PreparedDataset:
    """Select the conversations of this worker and find their lengths.

    Args:
        config: the options of selection, lengths and workers.
        source: a map-style `datasets.Dataset`.
        encoder: measures the lengths that no option gives.
        should_stop: asked between rows.

    Raises:
        DataError: no such column, bad ids, lengths that do not belong to this job, nothing left.
        StopRequested: `should_stop` said so.
    """
    rows = select_dataset(config, source, encoder)
    return add_lengths(config, ConversationDataset(rows, encoder), should_stop)


def select_dataset(config: ExtractionConfig, source: Any, encoder: RowEncoder) -> PreparedDataset:
    """Select the conversations of this worker; lengths that no option gives stay 0.

    Raises:
        DataError, SourceError: no such column, bad ids, nothing left.
    """
    indices = read_source_indices(source, encoder.columns)
    groups = None
    if config.subject_col is not None:
        groups = [
            group_name(value) for value in read_column(source, config.subject_col).to_pylist()
        ]
    numbers = select_rows(indices, groups, config)
    if not numbers.size:
        raise DataError(
            f"{config.dataset}: none of its {indices.size} rows is selected; "
            "see --start-offset, --limit and --sample-subject"
        )
    lengths, num_tokens = find_lengths(config, source, encoder, numbers, indices[numbers])
    used = [name for name in source.column_names if name in encoder.columns.needed()]
    known = np.zeros_like(numbers) if lengths is None else lengths
    rows = PreparedDataset(
        source.select_columns(used), numbers, indices[numbers], known, num_tokens
    )
    if config.world_size is None:
        return rows
    workers = divide_rows(rows.indices, lengths, config.world_size)
    return rows.take(workers == config.rank)


def read_column(source: Any, column: str) -> pa.ChunkedArray:
    """Return a column of the source; one that is missing is an error that names those there are."""
    if column not in source.column_names:
        raise DataError(f"no column {column!r}; there are {', '.join(source.column_names)}")
    return source.select_columns([column]).with_format("arrow")[:].column(column)


def read_source_indices(source: Any, columns: ConversationColumns) -> npt.NDArray[np.int64]:
    """Return the id of every row of the source: its number, or what the index column holds.

    Raises:
        SourceError: an id is no integer or does not fit int32; names the first.
        DataError: an id occurs twice.
    """
    column = columns.index
    if column is None:
        if len(source) > INDEX_LIMIT:
            raise DataError(f"{len(source)} rows: row numbers above int32 cannot be stored")
        return np.arange(len(source))
    values = read_column(source, column)
    if len(values) and not (pa.types.is_integer(values.type) and values.null_count == 0):
        for number, value in enumerate(values):
            source_id({column: value.as_py()}, number, columns)
    ids = values.to_numpy()
    outside = np.flatnonzero((ids < -INDEX_LIMIT) | (ids >= INDEX_LIMIT))
    if outside.size:
        source_id({column: int(ids[outside[0]])}, int(outside[0]), columns)
    check_unique(ids, column)
    return ids.astype(np.int64)


def check_unique(ids: npt.NDArray[Any], column: str) -> None:
    """Raise DataError at the lowest id that occurs more than once."""
    unique, counts = np.unique(ids, return_counts=True)
    if unique.size < ids.size:
        raise repeated_index(int(unique[counts > 1][0]), column)


def repeated_index(value: int, column: str) -> DataError:
    """Return the refusal of an id that occurs more than once."""
    return DataError(
        f"--index-col {column}: {value} occurs more than once, ids must be unique; "
        "leave the option out to use row numbers"
    )


def mix_hash(values: npt.NDArray[np.int64], *, seed: int) -> npt.NDArray[np.uint64]:
    """Map integers to 64 well-mixed bits, the same on every machine (SplitMix64 finaliser).

    Source: Steele, Lea and Flood, "Fast splittable pseudorandom number generators", 2014.
    """
    with np.errstate(over="ignore"):
        z = values.astype(np.uint64) + np.uint64(seed) * np.uint64(0x9E3779B97F4A7C15)
        z += np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.asarray(z ^ (z >> np.uint64(31)))


def worker_of(indices: npt.NDArray[np.int64], world_size: int) -> npt.NDArray[np.int64]:
    """Return which worker a conversation belongs to: a pure function of its index."""
    return (mix_hash(indices, seed=0) % np.uint64(world_size)).astype(np.int64)


def deal_by_length(
    indices: npt.NDArray[np.int64], lengths: npt.NDArray[np.int64], world_size: int
) -> npt.NDArray[np.int64]:
    """Return which worker each conversation of a job belongs to: shares of equal length.

    Dealt out longest first, to and fro, so that shares differ by about one conversation. Depends on
    the job as a whole, not on the order of its rows.
    """
    order = np.lexsort((indices, mix_hash(indices, seed=0), -lengths))
    turn, place = np.divmod(np.arange(indices.size), world_size)
    workers = np.empty_like(indices)
    workers[order] = np.where(turn % 2 == 0, place, world_size - 1 - place)
    return workers


def divide_rows(
    indices: npt.NDArray[np.int64], lengths: npt.NDArray[np.int64] | None, world_size: int
) -> npt.NDArray[np.int64]:
    """Return the worker of each selected conversation: by its length where that is given, else by
    its index alone.
    """
    if lengths is None:
        return worker_of(indices, world_size)
    return deal_by_length(indices, lengths, world_size)


def select_rows(
    indices: npt.NDArray[np.int64], groups: Sequence[str] | None, config: ExtractionConfig
) -> npt.NDArray[np.int64]:
    """Return the row numbers of the job, ascending: a pure function of the source and the options.

    Rows are taken in source order, or with `random_sample` in an order that depends on the seed
    and the row's index only. A group that `sample_subject` does not name has the limit of "*";
    without "*" it has none.
    """
    numbers = np.arange(min(config.start_offset, indices.size), indices.size)
    if config.random_sample:
        numbers = numbers[np.argsort(mix_hash(indices[numbers], seed=config.seed), kind="stable")]
    if groups is not None:
        allowed = GroupLimits(config.sample_subject or {})
        numbers = numbers[[allowed.take(groups[number]) for number in numbers.tolist()]]
    return np.sort(numbers[: config.limit])


def group_name(value: Any) -> str:
    """Return the name of a row's group as --sample-subject spells it; null is the empty group."""
    return "" if value is None else str(value)


class GroupLimits:
    """Counts conversations by group and says which are still within the limits."""

    def __init__(self, limits: Mapping[str, int]) -> None:
        self.limits = limits
        self.counts: Counter[str] = Counter()

    def take(self, group: str) -> bool:
        """Count one row of the group; False when its group is full."""
        limit = self.limits.get(group, self.limits.get("*"))
        self.counts[group] += 1
        return limit is None or self.counts[group] <= limit


def find_lengths(
    config: ExtractionConfig,
    source: Any,
    encoder: RowEncoder,
    numbers: npt.NDArray[np.int64],
    indices: npt.NDArray[np.int64],
) -> tuple[npt.NDArray[np.int64] | None, npt.NDArray[np.int64] | None]:
    """Return lengths and tokens to extract of selected rows as far as the options give them."""
    if config.tokenized_dataset is not None:
        return join_lengths(config, encoder, indices)
    if config.length_col is not None:
        return read_length_column(source, config.length_col)[numbers], None
    return None, None


def add_lengths(
    config: ExtractionConfig, dataset: ConversationDataset, should_stop: Callable[[], bool]
) -> PreparedDataset:
    """Check the lengths that were given, or measure them; leave out what is not usable."""
    rows, encoder = dataset.prepared, dataset.encoder
    positions = np.arange(rows.numbers.size)
    lengths, num_tokens = rows.lengths, rows.num_tokens
    skipped: dict[int, SkippedRow] = {}
    if config.tokenized_dataset is not None:
        skipped = check_lengths(config, dataset, lengths, should_stop)
    elif config.length_col is None:
        lengths, num_tokens, skipped = measure_rows(dataset, positions, should_stop)
    if encoder.max_seq_len is not None:
        for at in np.flatnonzero(lengths > encoder.max_seq_len).tolist():
            skipped[at] = too_long(int(rows.indices[at]), int(lengths[at]), encoder.max_seq_len)
    keep = np.ones(positions.size, bool)
    keep[list(skipped)] = False
    return replace(
        rows, lengths=lengths, num_tokens=num_tokens, skipped=list(skipped.values())
    ).take(keep)


def read_length_column(source: Any, column: str) -> npt.NDArray[np.int64]:
    """Return the lengths that a column of the source holds: positive integers, in tokens."""
    values = read_column(source, column)
    if not pa.types.is_integer(values.type) or values.null_count:
        raise DataError(f"--length-col {column}: holds {values.type} or nulls, not integers")
    lengths = values.to_numpy().astype(np.int64)
    if lengths.size and int(lengths.min()) < 1:
        number = int(np.argmin(lengths))
        raise DataError(
            f"--length-col {column}: row {number} holds {lengths[number]}, lengths start at 1; "
            "leave the option out to have them measured"
        )
    return lengths


def join_lengths(
    config: ExtractionConfig, encoder: RowEncoder, indices: npt.NDArray[np.int64]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64] | None]:
    """Return lengths and tokens to extract of the conversations from --tokenized-dataset.

    Rows are joined on `index`. Lengths are 0 where a conversation cannot be used; the tokens to
    extract are None where the dataset does not hold them.

    Raises:
        SourceError: the lengths dataset cannot be read.
        DataError: it was measured for another job, or lacks conversations of this one.
    """
    name = config.tokenized_dataset or ""
    found = read_lengths(name, length_col=config.length_col or "length")
    wanted = measure_settings(config, encoder)
    differences = describe_differences(found.settings, wanted) if found.settings else []
    if differences:
        raise DataError(
            f"--tokenized-dataset {name} was measured for another job: {'; '.join(differences)}; "
            "run compute_lengths.py for this one, or leave the option out"
        )
    order = np.argsort(found.index)
    places = np.searchsorted(found.index, indices, sorter=order)
    rows = order[np.minimum(places, order.size - 1)] if order.size else np.zeros(0, np.int64)
    present = found.index[rows] == indices if order.size else np.zeros(indices.size, bool)
    if not present.all():
        raise DataError(
            f"--tokenized-dataset {name} lacks {int((~present).sum())} of the "
            f"{indices.size} conversations, such as index {int(indices[~present][0])}: "
            "run compute_lengths.py on the whole dataset, or leave the option out"
        )
    return found.length[rows], None if found.num_tokens is None else found.num_tokens[rows]


SPOT_CHECKS = 16  # conversations whose length is measured again, spread over the job


def check_lengths(
    config: ExtractionConfig,
    dataset: ConversationDataset,
    lengths: npt.NDArray[np.int64],
    should_stop: Callable[[], bool],
) -> dict[int, SkippedRow]:
    """Measure what a lengths dataset calls unusable, and a few conversations more.

    Returns:
        The reasons of those that cannot be used, by position.

    Raises:
        DataError: the lengths are not those of this source, template and tokenizer.
    """
    spots = np.linspace(0, lengths.size - 1, min(SPOT_CHECKS, lengths.size), dtype=np.int64)
    positions = np.union1d(np.flatnonzero(lengths == 0), spots)
    whole = ConversationDataset(dataset.prepared, replace(dataset.encoder, max_seq_len=None))
    measured, _, skipped = measure_rows(whole, positions, should_stop)
    for at in np.flatnonzero(measured != lengths[positions])[:1].tolist():
        position = positions[at]
        raise DataError(
            f"--tokenized-dataset {config.tokenized_dataset} says {lengths[position]} tokens for "
            f"index {dataset.prepared.indices[position]}, there are {measured[at]}: "
            "run compute_lengths.py again, or leave the option out"
        )
    return skipped


def measure_settings(config: ExtractionConfig, encoder: RowEncoder) -> dict[str, Any]:
    """Return what the lengths of this job depend on, as compute_lengths.py records it.

    Of a dataset on the Hub no commit is compared: most commits change no row.
    """
    local = os.path.exists(os.path.expanduser(config.dataset))
    return {
        **conversation_settings(config, encoder.columns, encoder.chat_template),
        "template_date": encoder.date,
        "dataset_revision": source_revision(config.dataset) if local else None,
    }


def describe_differences(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """Say where recorded settings differ from those of this job.

    Names of local files and folders are compared as full paths, and that of the dataset not at all
    where the recorded revision, a digest of the files, agrees. A revision or date that one of the
    two does not name is not compared, nor a branch with a commit.
    """
    revision = wanted["dataset_revision"]
    same_files = revision is not None and found.get("dataset_revision") == revision
    differences = []
    for name, value in wanted.items():
        other = found.get(name)
        if name.endswith(("_revision", "_date")) and (
            None in (other, value) or is_commit(other) != is_commit(value)
        ):
            continue
        if name == "dataset" and same_files:
            continue
        if name in ("model", "dataset") and full_path(other) == full_path(value):
            continue
        if other != value:
            differences.append(f"{name} {other!r}, here {value!r}")
    return differences


def is_commit(revision: Any) -> bool:
    """Tell whether a revision is a full commit id, which names the same content for ever."""
    return isinstance(revision, str) and re.fullmatch("[0-9a-f]{40}", revision) is not None


def full_path(name: Any) -> Any:
    """Return the full path of a local file or folder; any other name as it is."""
    path = os.path.expanduser(name) if isinstance(name, str) else None
    return os.path.realpath(path) if path is not None and os.path.exists(path) else name


MEASURE_ROWS = 64  # conversations that a worker encodes at a time


def measure_rows(
    dataset: ConversationDataset,
    positions: npt.NDArray[np.int64],
    should_stop: Callable[[], bool],
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], dict[int, SkippedRow]]:
    """Render and tokenize conversations in worker processes, keeping the counts only.

    Returns:
        lengths (n,) and tokens to extract (n,), both 0 where a conversation cannot be used, and
        the reasons for those by position.
    """
    processes = worker_processes(positions.size)
    if positions.size:
        logger.info("measuring %d conversations in %d processes", positions.size, max(1, processes))
    chunks = [positions[at : at + MEASURE_ROWS] for at in range(0, positions.size, MEASURE_ROWS)]
    counts = np.zeros((2, positions.size), np.int64)
    skipped: dict[int, SkippedRow] = {}
    measured = run_ahead(
        functools.partial(count_tokens, dataset),
        [chunk.tolist() for chunk in chunks],
        processes=processes,
        should_stop=should_stop,
    )
    with tqdm(
        total=positions.size, unit="row", desc="measuring", leave=False, dynamic_ncols=True,
        disable=not sys.stderr.isatty(),
    ) as bar:  # fmt: skip
        for number, (chunk, (found, reasons)) in enumerate(zip(chunks, measured, strict=True)):
            counts[:, number * MEASURE_ROWS :][:, : chunk.size] = found
            skipped |= reasons
            bar.update(chunk.size)
    return counts[0], counts[1], skipped


def count_tokens(
    dataset: ConversationDataset, positions: list[int]
) -> tuple[npt.NDArray[np.int64], dict[int, SkippedRow]]:
    """Encode conversations and return their lengths and tokens to extract, (2, n), and skips."""
    rows = dataset.__getitems__(positions)
    skipped = {
        position: row
        for position, row in zip(positions, rows, strict=True)
        if isinstance(row, SkippedRow)
    }
    sizes = [
        (0, 0) if isinstance(row, SkippedRow) else (row.input_ids.size, row.token_positions.size)
        for row in rows
    ]
    return np.asarray(sizes, np.int64).reshape(-1, 2).T, skipped


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


def stream_rows(
    config: ExtractionConfig, source: Any, columns: ConversationColumns
) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """Yield (index, row) of the selected rows of a stream, in its order.

    Gives the same rows as `select_rows`. Memory does not grow with what the rows hold: with an
    index column it keeps four bytes per id, with `random_sample` a first pass sixteen per row.
    """
    if config.random_sample:
        indices, groups = scan_stream(config, source, columns)
        chosen = select_rows(indices, groups, config)
        yield from pick_rows(source, chosen, indices[chosen])
        return
    limits, seen, taken = GroupLimits(config.sample_subject or {}), IdSet(), 0
    for number, row in enumerate(source):
        index = source_id(row, number, columns)
        if columns.index is not None and not seen.add(index):
            raise repeated_index(index, columns.index)
        if number < config.start_offset:
            continue
        if config.subject_col is None or limits.take(group_name(row.get(config.subject_col))):
            yield index, row
            taken += 1
        if taken == config.limit:
            return


def scan_stream(
    config: ExtractionConfig, source: Any, columns: ConversationColumns
) -> tuple[npt.NDArray[np.int64], list[str] | None]:
    """Read the ids and the group names of a whole stream, once, before a random selection."""
    ids = array("q")
    groups: list[str] = []
    for number, row in enumerate(source):
        ids.append(source_id(row, number, columns))
        if config.subject_col is not None:
            groups.append(sys.intern(group_name(row.get(config.subject_col))))
    indices = np.frombuffer(ids, np.int64)
    if columns.index is not None:
        check_unique(indices, columns.index)
    return indices, None if config.subject_col is None else groups


def pick_rows(
    source: Any, numbers: npt.NDArray[np.int64], indices: npt.NDArray[np.int64]
) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """Yield (index, row) of the rows of a stream with these numbers, which must ascend."""
    rows = enumerate(source)
    for wanted, index in zip(numbers.tolist(), indices.tolist(), strict=True):
        yield index, next(row for number, row in rows if number == wanted)


STREAM_WINDOW = 2048  # rows of a stream that are sorted into batches together


def prepare_windows(
    config: ExtractionConfig,
    source: Any,
    encoder: RowEncoder,
    *,
    should_stop: Callable[[], bool] = lambda: False,
) -> Iterator[PreparedDataset]:
    """Yield the job as one prepared dataset, or a stream as one per window of rows.

    Raises:
        DataError, StopRequested: as `prepare_dataset` does.
    """
    if not config.streaming:
        yield prepare_dataset(config, source, encoder, should_stop=should_stop)
        return
    if config.tokenized_dataset or config.length_col:
        logger.warning("a stream is measured as it comes: lengths computed before are not used")
    encoded = itertools.chain.from_iterable(
        run_ahead(
            functools.partial(encode_rows, encoder),
            chunk_rows(stream_share(config, source, encoder, should_stop), MEASURE_ROWS),
            processes=worker_processes(config.limit or STREAM_WINDOW),
            should_stop=should_stop,
        )
    )
    while window := list(itertools.islice(encoded, STREAM_WINDOW)):
        yield keep_window(window)


@dataclass(frozen=True)
class StoppableRows:
    """The rows of a stream, which may take hours to pass over, until the run is told to stop."""

    source: Any
    should_stop: Callable[[], bool]

    def __iter__(self) -> Iterator[Mapping[str, Any]]:
        for row in self.source:
            if self.should_stop():
                raise StopRequested
            yield row


def stream_share(
    config: ExtractionConfig, source: Any, encoder: RowEncoder, should_stop: Callable[[], bool]
) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """Yield (index, row) of this worker's part of the selected rows, with the columns it uses."""
    names = source_columns(source)
    if config.subject_col is not None and config.subject_col not in names:
        raise DataError(f"no column {config.subject_col!r}; there are {', '.join(names)}")
    used = encoder.columns.needed() | {config.subject_col}
    if source.column_names is not None:  # what is not decoded costs no time
        source = source.select_columns([name for name in names if name in used])
    for index, row in stream_rows(config, StoppableRows(source, should_stop), encoder.columns):
        if worker_of(np.asarray([index]), config.world_size or 1)[0] == (config.rank or 0):
            yield index, {name: value for name, value in row.items() if name in used}


def chunk_rows(rows: Iterable[Any], size: int) -> Iterator[list[Any]]:
    """Yield rows in lists of `size`, the last one shorter."""
    left = iter(rows)
    while chunk := list(itertools.islice(left, size)):
        yield chunk


def encode_rows(
    encoder: RowEncoder, rows: Sequence[tuple[int, Mapping[str, Any]]]
) -> list[EncodedRow | SkippedRow]:
    """Encode rows of a stream, in a worker process."""
    return [encoder.encode(row, index) for index, row in rows]


def keep_window(window: Sequence[EncodedRow | SkippedRow]) -> PreparedDataset:
    """Return a window of a stream as a prepared dataset of rows that are encoded already."""
    rows = [row for row in window if isinstance(row, EncodedRow)]
    return PreparedDataset(
        source=None,
        numbers=np.arange(len(rows)),
        indices=np.asarray([row.index for row in rows], np.int64),
        lengths=np.asarray([row.input_ids.size for row in rows], np.int64),
        num_tokens=np.asarray([row.token_positions.size for row in rows], np.int64),
        skipped=[row for row in window if isinstance(row, SkippedRow)],
        encoded=rows,
    )


# --------------------------------------------------------------------------------------------------
# 3 Batches
# --------------------------------------------------------------------------------------------------

# On CUDA a probe begins there. A CPU runs 12 layers of width 768 as fast in batches of 1,024 tokens
# as of 8,192, and slower in larger ones; see docs/benchmarks.md.
DEFAULT_BATCH_TOKENS = {"cuda": 16384, "mps": 8192, "cpu": 4096}
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
    skipped: list[SkippedRow] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        """Extracted tokens N of the whole batch."""
        return sum(row.token_positions.size for row in self.rows)

    @classmethod
    def collate(cls, rows: Sequence[EncodedRow | SkippedRow]) -> Batch:
        """Part the rows that the teacher sees from those that are skipped."""
        return cls(
            [row for row in rows if isinstance(row, EncodedRow)],
            [row for row in rows if isinstance(row, SkippedRow)],
        )

    def halves(self) -> tuple[Batch, Batch]:
        """Split the batch for a device that cannot hold it whole; skipped rows go first."""
        middle = len(self.rows) // 2
        return Batch(self.rows[:middle], self.skipped), Batch(self.rows[middle:])


class TokenBudgetBatchSampler(torch.utils.data.Sampler[list[int]]):
    """Batches of conversations of like length, longest first, as many as the limits allow.

    Under a budget of tokens a batch is closed early, but not below 8,192 tokens, where more than
    1.5% of it would be padding: a large budget for few conversations mixes long and short ones.

    The plan depends on the lengths and the limits alone, not on what is done: a resumed run forms
    the same batches, so its forward passes have the same shapes and round alike. Batches that
    are done are left out; one that is partly done is run whole again.

    Args:
        lengths: (n,) tokens of each conversation.
        max_batch_tokens: conversations times longest length at most; a single longer conversation
            still makes a batch of its own.
        max_batch_size: conversations at most.
        thresholds: length up to which a number of conversations goes into a batch; above the
            largest length, one.
        done: (n,) bool, what need not be run again.
    """

    def __init__(
        self,
        lengths: npt.ArrayLike,
        *,
        max_batch_tokens: int | None = None,
        max_batch_size: int | None = None,
        thresholds: Mapping[int, int] | None = None,
        done: npt.NDArray[np.bool_] | None = None,
    ) -> None:
        self.lengths = np.asarray(lengths, np.int64)
        self.max_batch_tokens = max_batch_tokens
        self.max_batch_size = max_batch_size
        self.thresholds = sorted((int(k), int(n)) for k, n in (thresholds or {}).items())
        self.batches = [
            batch for batch in self._plan() if done is None or not bool(done[batch].all())
        ]

    def _plan(self) -> list[npt.NDArray[np.int64]]:
        order = np.argsort(-self.lengths, kind="stable")
        sums = np.concatenate(([0], np.cumsum(self.lengths[order])))
        batches, start = [], 0
        while start < order.size:
            size = self._size_at(int(self.lengths[order[start]]))
            if self.max_batch_tokens is not None and not self.thresholds:
                size = self._without_padding(sums[start : start + size + 1])
            batches.append(order[start : start + size])
            start += size
        return batches

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
        return (batch.tolist() for batch in self.batches)


def make_sampler(
    config: ExtractionConfig,
    prepared: PreparedDataset,
    *,
    device_type: str,
    done: npt.NDArray[np.bool_],
    found_tokens: int | None = None,
) -> TokenBudgetBatchSampler:
    """Plan the batches of a prepared dataset under the options.

    Without a budget in them it is `found_tokens`, or else the device's default.
    """
    budget = config.max_batch_tokens
    if budget is None and config.batch_thresholds is None:
        default = DEFAULT_BATCH_TOKENS.get(device_type, DEFAULT_BATCH_TOKENS["cpu"])
        budget = found_tokens or default
    return TokenBudgetBatchSampler(
        prepared.lengths,
        max_batch_tokens=budget,
        max_batch_size=config.max_batch_size,
        thresholds=config.batch_thresholds,
        done=done,
    )


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
    spent = seconds_at(budget) if budget == start else math.inf
    while spent < LONG_BATCH_S and budget < MOST_BATCH_TOKENS:
        spent = seconds_at(2 * budget)
        budget *= 1 if math.isinf(spent) else 2
    return budget


def longest_batch(rows: int, length: int, vocab_size: int) -> Batch:
    """Return a batch of arbitrary conversations of one length, all tokens of them wanted."""
    ids = np.random.default_rng(0).integers(0, vocab_size, (rows, max(2, length)), np.int32)
    wanted = np.arange(1, ids.shape[1], dtype=np.int32)
    return Batch([EncodedRow(number, row, wanted) for number, row in enumerate(ids)])


def load_batches(dataset: ConversationDataset, sampler: TokenBudgetBatchSampler) -> Iterator[Batch]:
    """Yield the batches of the plan, read and encoded ahead of the teacher where it pays.

    Three quarters of the processors do so, where the teacher is that fast: others launch its
    kernels, pack and encode.
    """
    processes = 0 if dataset.prepared.encoded is not None else worker_processes(len(dataset))
    processes = min(processes, max(1, count_processors() * 3 // 4))
    yield from run_ahead(functools.partial(read_batch, dataset), sampler, processes=processes)


def read_batch(dataset: ConversationDataset, positions: list[int]) -> Batch:
    """Encode the conversations of a batch, in a worker process."""
    return Batch.collate(dataset.__getitems__(positions))


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
    limit = max_positions(model_config)
    if limit is not None and config.max_seq_len is not None and config.max_seq_len > limit:
        raise TeacherError(
            f"--max-seq-len {config.max_seq_len} is beyond the {limit} positions of "
            f"{config.model}; give at most {limit}"
        )
    try:
        model = load_model(config, model_config, device)
        teacher = Teacher(model, vocab_size=vocab_size, forced_attention=config.attn != "auto")
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
    path = Path(source).expanduser()
    local = source.startswith((".", "/", "~")) or path.exists()
    whole = any((path / name).exists() for name in WEIGHT_FILES)
    if source.endswith(".gguf") or (local and not whole and any(path.glob("*.gguf"))):
        raise TeacherError(
            f"--model {source} is GGUF, which is not read: give the checkpoint that it was made "
            "from, or convert it by AutoModelForCausalLM.from_pretrained(folder, gguf_file=name)"
            ".save_pretrained(other) of transformers, and the same with its AutoTokenizer"
        )
    if local:
        if not path.is_dir():
            why = "is a file: give the folder of it" if path.exists() else "no such folder"
            raise TeacherError(f"--model {source}: {why}")
        source = str(path)
    with loading_errors(config):
        if file := find_file(source, "adapter_config.json", revision):
            if whole or not (local or find_file(source, "config.json", revision) is None):
                raise TeacherError(
                    f"--model {config.model} has an adapter beside a whole model: give a folder "
                    "without adapter_config.json, or one with the adapter alone"
                )
            described = json.loads(Path(file).read_text(encoding="utf-8"))
            adapter, source = source, str(described.get("base_model_name_or_path"))
            revision = described.get("revision") or "main"
    if adapter is not None and importlib.util.find_spec("peft") is None:
        raise TeacherError(
            f"--model {config.model} is an adapter of {source}: pip install peft, or give a folder "
            "with the merged weights (merge_and_unload of peft)"
        )
    options = {"pretrained_model_name_or_path": source, "revision": revision}
    return {**options, "trust_remote_code": config.trust_remote_code}, adapter


def tokenizer_source(config: ExtractionConfig) -> tuple[str, str | None]:
    """Return model and revision that the tokenizer is of: an adapter may leave it to its base."""
    options, adapter = locate_model(config)
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

    options, _ = locate_model(config)
    with loading_errors(config):
        found = AutoConfig.from_pretrained(**options)
        choose_class(config, found)
        quantization = quantization_of(found)
        if quantization is not None:
            quantizer = AutoHfQuantizer.from_config(copy.deepcopy(quantization), pre_quantized=True)
            quantizer.validate_environment(device_map=None, weights_only=True)
    return found


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
        check_weights(model, info, read_headers(options), quantization_of(model_config))
        return model if adapter is None else merge_adapter(model, adapter, config.revision)


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
    """Return what a checkpoint holds, by name; nothing of one that is not in safetensors."""
    from safetensors import safe_open

    source, revision = options["pretrained_model_name_or_path"], options["revision"]
    single, index = (find_file(source, name, revision) for name in WEIGHT_FILES[:2])
    names = [WEIGHT_FILES[0]]
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
    model: Any, info: Mapping[str, Any], stored: Stored, quantization: Any = None
) -> None:
    """Refuse a model whose weights are not all those of its checkpoint.

    Args:
        quantization: what transformers applied while it loaded.

    Raises:
        TeacherError: the checkpoint lacks weights, holds some that belong to the model and are not
            used, stores them in a precision that nothing scales, or has another head.
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
    check_head(model, stored)


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
    """Return the model with a trained adapter added to its weights."""
    import warnings

    import peft

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        merged = peft.PeftModel.from_pretrained(model, adapter, revision=revision)
        merged = merged.merge_and_unload()
    for warning in caught:
        if "adapter keys" in str(warning.message):
            raise TeacherError(str(warning.message).splitlines()[0])
    return merged


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
        for module in model.modules():  # to look for padding, only to warn, waits for the device
            if hasattr(module, "warn_if_padding_and_no_attention_mask"):
                module.warn_if_padding_and_no_attention_mask = lambda *ids_and_mask: None
        self.body: Any = None
        self.head = self.layout = self.layout_reason = ""
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
        edge = rope_edge(self.model.config)
        runs = itertools.groupby(range(len(lengths)), key=lambda i: lengths[i] > edge)
        return [list(run) for _, run in runs]

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


def rope_edge(config: Any) -> float:
    """Return the length beyond which the model turns every row of a batch by other angles.

    LongRoPE chooses its short or long factors by the longest row, so a short conversation beside
    a long one would get other logits than alone.
    """
    rope = getattr(config.get_text_config(), "rope_parameters", None) or {}
    for part in (rope, *(value for value in rope.values() if isinstance(value, dict))):
        if part.get("rope_type") == "longrope":
            return float(part.get("original_max_position_embeddings") or math.inf)
    return math.inf


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


def in_group() -> bool:
    """Tell whether this process is one of several that run one teacher."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def agree(flag: bool) -> bool:
    """Return the first process's `flag` in every process of the group; alone, one's own."""
    if not in_group():
        return flag
    told = torch.tensor([flag], dtype=torch.uint8)
    torch.distributed.broadcast(told, src=0)
    return bool(told.item())


def leave_group() -> None:
    """Disconnect from the group, if there is one."""
    if in_group():
        torch.distributed.destroy_process_group()


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
    top_counts: torch.Tensor  # (N,) int32, nucleus size, 1..K
    sampled_ids: torch.Tensor  # (N, M) int32, in the order drawn
    sampled_logits: torch.Tensor  # (N, M) float32
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
    sampled_q: Any  # (N, M) int32, 0..65535
    sampled_min: Any  # (N,) float32
    sampled_max: Any  # (N,) float32
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
    options |= {"seed": seed, "reference": reference}
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
        reference: extract by the definition.

    Returns:
        Tensors on the device of `logits`; on the CPU where that is mps, which has no float64.

    Raises:
        ConfigError: the vocabulary has fewer than M tokens outside a full nucleus.
    """
    check_candidates(logits.shape[1], top_p_max=top_p_max, sampled_n=sampled_n)
    if logits.device.type == "mps":
        logits, index, position = logits.cpu(), index.cpu(), position.cpu()
    states = row_states(index, position, seed=seed)
    count, vocab = logits.shape
    held = min(vocab, BLOCK * (max(top_p_max, HELD_BLOCKS) + sampled_n)) + vocab // BLOCK
    at_once = REFERENCE_AT_ONCE // vocab if reference else HELD_AT_ONCE[logits.device.type] // held
    extract = extract_by_definition if reference else extract_by_blocks
    sizes: dict[str, Any] = {"top_p": top_p, "top_p_max": top_p_max, "sampled_n": sampled_n}
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

    Equal to `extract_by_definition` in everything but the tail, which has the same law. The k
    blocks with the largest maxima hold the k largest logits: any logit elsewhere has k larger ones,
    or equal ones of lower id. All that is in them is summed in float64, which leaves the errors of
    float32 sums to what weighs least: 1e-9 of the log-sum-exp as a rule, 5e-9 at worst.
    """
    k = min(max(top_p_max, HELD_BLOCKS), logits.shape[1])
    maxima, sums = weigh_blocks(logits)  # (N, C)
    weights = maxima.double() + sums.double().log_()
    blocks = top_k_ids(maxima, k).sort(-1).values  # (N, <= k), ascending as ids are
    held = gather_blocks(logits, blocks)  # (N, <= k, BLOCK) float32
    at = top_k_ids(held.flatten(1), k)
    top = held.flatten(1).gather(1, at).double()  # (N, k)
    top_ids = blocks.gather(1, at // BLOCK) * BLOCK + at % BLOCK
    held.flatten(1).scatter_(1, at, float("-inf"))
    maxima, sums = sum_blocks(held.double())
    weights.scatter_(1, blocks, maxima + sums.log_())  # without the k largest
    logsumexp = torch.logaddexp(weights.logsumexp(-1), top.logsumexp(-1))
    counts = count_nucleus(top[:, :top_p_max], logsumexp, top_p=top_p)
    sampled_ids, complete = sample_tail(
        logits, states, weights, top=top, top_ids=top_ids, counts=counts, sampled_n=sampled_n
    )
    usable = logsumexp.isfinite() & complete
    top_ids = top_ids[:, :top_p_max]
    return collect_tokens(logits, logsumexp, top_ids, counts, sampled_ids, usable, top_p_max)


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


def gather_blocks(logits: torch.Tensor, blocks: torch.Tensor) -> torch.Tensor:
    """Return the logits of each block, (N, C) ids to (N, C, BLOCK) float32, padded with -inf."""
    whole, *last = split_blocks(logits)
    rows = torch.arange(blocks.shape[0], device=blocks.device).unsqueeze(1)
    if whole.is_contiguous() and not last:  # one copy per block, four times as fast on a CPU
        number = (blocks + rows * whole.shape[1]).flatten()
        return whole.view(-1, BLOCK).index_select(0, number).view(*blocks.shape, BLOCK).float()
    values = whole[rows, blocks.clamp(max=whole.shape[1] - 1)].float()
    if last:
        values = torch.where((blocks == whole.shape[1]).unsqueeze(2), last[0].float(), values)
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
    return ExtractedTokens(
        logsumexp, top_ids.int(), top, counts.int(), sampled_ids.int(), sampled, usable
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
    """Return standard exponential variables, float64, above 0, a function of state and counter.

    The k-th output of SplitMix64 started at the row's state.
    """
    bits = shift_right(mix64_(states + (counters + 1) * SPLITMIX_STEP), 11)  # 53 random bits
    return bits.double().add_(0.5).mul_(-(2.0**-53)).log1p_().neg_()


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
        actual_logits=actual_logits,
        usable=tokens.usable,
    )


def quantize_rows(
    values: torch.Tensor, counts: torch.Tensor | None = None, *, bits: int = 16
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Quantize the first entries of each row over their own range, as `quantize_logits` does.

    Args:
        values: (N, C) float32.
        counts: (N,) entries per row; None: all. What lies beyond becomes 0.
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

MASS_COLUMN = "_mass"  # sum over the row's tokens of the probability in the nucleus
ACTUAL_COLUMN = "_actual"  # sum over the row's tokens of the probability of the actual token


@dataclass(frozen=True)
class PackedBatch:
    """Rows in the shard schema plus the two figure columns, and what was left out."""

    table: pa.Table
    unusable: list[EncodedRow]  # NaN, +inf or too few finite logits at some token
    shared: bool  # several conversations went through the teacher together


def packed_schema(schema: pa.Schema) -> pa.Schema:
    """Append the figure columns, which describe rows until they are in a shard."""
    for name in (MASS_COLUMN, ACTUAL_COLUMN):
        schema = schema.append(pa.field(name, pa.float64()))
    return schema


def cpu_postprocess_batch(result: Any, batch: Batch, *, schema: pa.Schema) -> PackedBatch:
    """Turn a batch's result on the host into Arrow rows, without a loop over tokens.

    Rows with a token whose logits cannot be used are left out of the table and returned as they
    are: in one packed pass NaN reaches the neighbours, so the caller may try them alone.
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
    tail = sizes * result.sampled_ids.shape[1]
    probability = np.exp(result.actual_logits[tokens] - result.logsumexp[tokens])
    top_low, top_high = pack_ids(result.top_ids[tokens][nucleus], top_sizes)
    tail_low, tail_high = pack_ids(result.sampled_ids[tokens].reshape(-1), tail)
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
        "sampled_logits_quantized": as_list(result.sampled_q[tokens].reshape(-1), tail, np.uint16),
        **pack_tail_range(result, tokens, sizes),
        "logsumexp": as_list(result.logsumexp[tokens], sizes, np.float64),
        "input_ids": as_lists([row.input_ids for row in rows]),
        "token_positions": as_lists([row.token_positions for row in rows]),
        MASS_COLUMN: pa.array(sum_rows(result.nucleus_mass[tokens], ends)),
        ACTUAL_COLUMN: pa.array(sum_rows(probability, ends)),
    }


def pack_tail_range(
    result: Any, tokens: slice | npt.NDArray[np.bool_], sizes: npt.NDArray[np.int64]
) -> dict[str, pa.Array]:
    """Build `sampled_min` and `sampled_max`: one entry per token, none where M is 0."""
    if result.sampled_ids.shape[1] == 0:
        tokens, sizes = slice(0), np.zeros_like(sizes)
    return {
        "sampled_min": as_list(result.sampled_min[tokens], sizes, np.float32),
        "sampled_max": as_list(result.sampled_max[tokens], sizes, np.float32),
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
# 7 Shards
# --------------------------------------------------------------------------------------------------

SHARD_NAME = re.compile(r"data/(?:\d+/)?part-(?:w(?P<rank>\d+)-)?(?P<number>\d+)\.parquet")
SHARDS_PER_FOLDER = 9_000  # the Hub takes 10,000 entries a folder
METADATA_ROWS = b"logits.rows"  # JSON: what resume and the card need, so that no data is read
ROW_GROUP_ROWS = 64
CLOSING_AT_ONCE = 2  # shards that get their last rows and their name beside the loop
GROUPS_AHEAD = 4  # row groups that a thread encodes or that wait for it, 10 MB of rows at most
ROW_GROUP_TOKENS = 8192  # about 1.6 MB encoded: what random access to one row reads at most
SETTINGS_FREE_TO_CHANGE = {"attn", "versions"}  # differ between machines, not between jobs
UNSUPPORTED = {errno.EBADF, errno.EINVAL, errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}


def shard_name(number: int, *, rank: int = 0, world_size: int = 1) -> str:
    """Return the path of a shard in the output; workers never share a name."""
    worker = f"w{rank:02d}-" if world_size > 1 else ""
    return f"data/part-{worker}{number:05d}.parquet"


def plain_name(path: str) -> str:
    """Return the name of a shard wherever `choose_folders` has put it."""
    return f"data/{path.rpartition('/')[2]}"


def choose_folders(names: Iterable[str], files: Iterable[str]) -> dict[str, str]:
    """Return where new shards go: into data/ until that is full, then data/001/ and so on."""
    held = Counter(path.rpartition("/")[0] for path in files)
    folders = itertools.chain(["data"], (f"data/{n:03d}" for n in itertools.count(1)))
    folder = next(folders)
    places = {}
    for name in names:
        while held[folder] >= SHARDS_PER_FOLDER:
            folder = next(folders)
        held[folder] += 1
        places[name] = f"{folder}/{name.rpartition('/')[2]}"
    return places


@dataclass(frozen=True)
class Figures:
    """Sums over rows, so that sums of shards add up; the card shows their quotients."""

    rows: int = 0
    tokens: int = 0
    nucleus_tokens: int = 0  # ids stored in the nuclei
    capped_tokens: int = 0  # tokens whose nucleus has all K ids
    measured_tokens: int = 0  # tokens of the rows that came with `_mass` and `_actual`
    mass: float = 0.0  # probability inside the nucleus, summed over measured tokens
    actual: float = 0.0  # probability of the token that is really there, summed likewise

    def __add__(self, other: Figures) -> Figures:
        return Figures(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))


@dataclass(frozen=True)
class MeasuredRows:
    """A table of rows with what a shard has to know of each."""

    table: pa.Table
    indices: list[int]
    figures: list[Figures]
    sizes: list[int]  # bytes before encoding, the same in whatever table a row stands


def measure_table(table: pa.Table, *, nucleus_cap: int) -> MeasuredRows:
    """Return a table with the figures of its rows, with or without `_mass` and `_actual`."""
    counts = table["top_counts"].combine_chunks()
    ends = np.cumsum(pc.list_value_length(counts).to_numpy())
    values = counts.flatten().to_numpy()
    tokens = table["num_tokens"].to_pylist()
    measured = {MASS_COLUMN, ACTUAL_COLUMN} <= set(table.column_names)
    unknown = [0.0] * len(tokens)
    columns = (
        tokens,
        sum_rows(values, ends).astype(np.int64).tolist(),
        sum_rows(values == nucleus_cap, ends).astype(np.int64).tolist(),
        tokens if measured else [0] * len(tokens),
        table[MASS_COLUMN].to_pylist() if measured else unknown,
        table[ACTUAL_COLUMN].to_pylist() if measured else unknown,
    )
    figures = [Figures(1, *row) for row in zip(*columns, strict=True)]
    return MeasuredRows(table, table["index"].to_pylist(), figures, row_sizes(table).tolist())


def row_sizes(table: pa.Table) -> npt.NDArray[np.int64]:
    """Return the bytes that each row's values and list offsets take, (rows,)."""
    sizes = np.zeros(table.num_rows, np.int64)
    for column in table.columns:
        if pa.types.is_list(column.type):
            width = column.type.value_type.bit_width // 8
            sizes += 4 + width * pc.list_value_length(column).to_numpy()
        elif pa.types.is_binary(column.type):
            sizes += 4 + pc.binary_length(column).to_numpy()
        else:
            sizes += column.type.bit_width // 8
    return sizes


@dataclass(frozen=True)
class ShardNotes:
    """What the footer of a shard tells without its data being read."""

    indices: npt.NDArray[np.int32]  # (rows,) ids of its conversations
    mass: npt.NDArray[np.float32]  # (rows,) sum over each row's tokens, NaN: not measured
    actual: npt.NDArray[np.float32]  # (rows,)
    figures: Figures
    settings: dict[str, Any]  # of the run that wrote it; {} when a stranger did
    footer_bytes: int


@dataclass(frozen=True)
class LocalShard:
    """A complete Parquet file in the cache: a shard to deliver, or pending rows."""

    path: Path
    notes: ShardNotes
    size: int

    @functools.cached_property
    def sha256(self) -> str:
        """Of the content, read when it is first asked for: in the upload thread as a rule."""
        return hash_file(self.path)

    @property
    def name(self) -> str:
        """The path it has, or would have, in the output."""
        return f"data/{self.path.name.removeprefix('backup_')}"


def encode_row_notes(rows: list[tuple[int, Figures]]) -> bytes:
    """Return the JSON of `METADATA_ROWS` from each row's id and figures."""

    def pack(values: list[float], dtype: str) -> str:
        return base64.b64encode(np.asarray(values, dtype).tobytes()).decode()

    def measured(name: str) -> list[float]:
        return [getattr(row, name) if row.measured_tokens else math.nan for _, row in rows]

    notes = {
        "figures": asdict(sum((row for _, row in rows), Figures())),
        "index": pack([index for index, _ in rows], "<i4"),
        "mass": pack(measured("mass"), "<f4"),
        "actual": pack(measured("actual"), "<f4"),
    }
    return json.dumps(notes).encode()


def decode_notes(footer: pq.FileMetaData) -> ShardNotes:
    """Return the notes in a footer: the inverse of `encode_row_notes`, and the settings.

    Raises:
        FormatError: the file was not written by `ShardWriter`.
    """
    metadata = footer.metadata or {}
    try:
        notes = json.loads(metadata[METADATA_ROWS])
        index, mass, actual = (
            np.frombuffer(base64.b64decode(notes[name], validate=True), dtype)
            for name, dtype in (("index", "<i4"), ("mass", "<f4"), ("actual", "<f4"))
        )
        figures = Figures(**notes["figures"])
        settings = json.loads(metadata[METADATA_SETTINGS])
    except (KeyError, TypeError, ValueError) as error:
        raise FormatError(f"its metadata lacks the notes of this extractor ({error!r})") from error
    if not footer.num_rows == figures.rows == index.size == mass.size == actual.size:
        raise FormatError("its metadata contradicts its rows")
    return ShardNotes(index, mass, actual, figures, settings, footer.serialized_size)


def read_footer(source: Path | pa.BufferReader) -> pq.FileMetaData:
    """Read the footer of a file, or of the last bytes of one.

    Raises:
        FormatError: truncated, or not Parquet.
    """
    try:
        return pq.read_metadata(source)
    except (OSError, pa.ArrowException) as error:
        raise FormatError(f"not a complete Parquet file ({error})") from error


def read_local_shard(path: Path) -> LocalShard:
    """Read a cached file's footer.

    Raises:
        FormatError: truncated, not Parquet, or not written by `ShardWriter`.
    """
    return LocalShard(path, decode_notes(read_footer(path)), path.stat().st_size)


def hash_file(path: Path) -> str:
    """Return the sha256 of a file's content, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def iter_rows(shard: LocalShard) -> Iterator[tuple[int, pa.Table]]:
    """Yield id and table of each row, with `_mass` and `_actual` where they were measured."""
    table = pq.read_table(shard.path)
    for number, index in enumerate(shard.notes.indices.tolist()):
        row = table.slice(number, 1)
        for name, values in ((MASS_COLUMN, shard.notes.mass), (ACTUAL_COLUMN, shard.notes.actual)):
            if not math.isnan(values[number]):
                row = row.append_column(name, pa.array([values[number]], pa.float64()))
        yield index, row


def drop_rows(shard: LocalShard, done: Container[int], schema: pa.Schema) -> LocalShard | None:
    """Rewrite a cached shard without some rows; None when no row is left, and no file."""
    cap = int(shard.notes.settings.get("top_p_max", 255))
    writer = ShardWriter(shard.path.parent, schema, nucleus_cap=cap, name="rest")
    for index, row in iter_rows(shard):
        if index not in done:
            writer.add(row)
    if writer.rows:
        return writer.close(shard.path)
    writer.discard()
    shard.path.unlink()
    return None


def list_setting_changes(there: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """List the settings that make two runs different jobs, as "name: value there, value now"."""
    normal = json.loads(json.dumps(dict(now)))
    names = sorted((there.keys() | normal.keys()) - SETTINGS_FREE_TO_CHANGE)
    return [
        f"{name}: {there.get(name)!r} there, {normal.get(name)!r} now"
        for name in names
        if there.get(name) != normal.get(name)
    ]


@contextmanager
def where_supported() -> Iterator[None]:
    """Pass over what a file system cannot: many a network's locks no folder, or syncs none."""
    try:
        yield
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise


def sync_directory(folder: Path) -> None:
    """Make renames inside a folder survive a power loss, where the system can."""
    if os.name == "nt":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        with where_supported():
            os.fsync(handle)
    finally:
        os.close(handle)


def write_durably(path: Path, content: bytes | Path) -> None:
    """Replace a file so that, whatever happens, it holds the old content or the new one.

    A `Path` is a file whose content is durable already: it is linked where that is possible.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.unlink(missing_ok=True)
    try:
        if isinstance(content, bytes) or not link_file(content, temporary):
            with temporary.open("wb") as file:
                if isinstance(content, bytes):
                    file.write(content)
                else:
                    copy_file(content, file)
                file.flush()
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    sync_directory(path.parent)


def link_file(source: Path, target: Path) -> bool:
    """Give a file a second name; False where the file system cannot."""
    try:
        os.link(source, target)
    except OSError:
        return False
    return True


def copy_file(source: Path, target: IO[bytes]) -> None:
    """Append a file's content to an open one."""
    with source.open("rb") as file:
        shutil.copyfileobj(file, target, 1 << 20)


@contextmanager
def storage_errors(place: str) -> Iterator[None]:
    """Turn an OSError (full disk, no permission) into a HubError that says what to do."""
    try:
        yield
    except OSError as error:
        if isinstance(error, LogitsError):
            raise
        reason = error.strerror or str(error)
        raise HubError(
            f"cannot write {place}: {reason}; make room or fix it, then continue with --resume "
            "(what the output lists is safe)"
        ) from error


MAGIC = b"PAR1"  # begins and ends a Parquet file


@dataclass(frozen=True)
class RowGroup:
    """One encoded row group, as a file of its own holds it right behind the magic number."""

    rows: int
    pages: memoryview
    metadata: bytes  # of the row group, in Thrift's compact protocol


class ShardWriter:
    """Encode rows into one Parquet file, row group by row group, under a temporary name.

    The bytes depend on the rows, their order and the schema only. Row groups are encoded in
    `encode_threads()` threads, where pyarrow lets go of the interpreter, and appended in order by
    another; what fails there is raised by the next call. Memory holds `GROUPS_AHEAD` row groups for
    each thread and the one that fills.
    """

    def __init__(
        self, folder: Path, schema: pa.Schema, *, nucleus_cap: int, name: str = "under-way"
    ) -> None:
        self._temporary = folder / f"{name}.parquet.tmp"
        self._schema = schema
        self._nucleus_cap = nucleus_cap
        self._content = (JoinedGroups if groups_join(schema) else GroupsOfOneWriter)(schema)
        self._file: IO[bytes] | None = None
        self._group: list[tuple[pa.Table, int]] = []  # tables and places of rows in them
        self._group_tokens = self._group_size = 0
        self._added_bytes = 0  # of all rows, before encoding
        self._written = (0, 0)  # bytes of the row groups on disk: encoded, and before
        self._notes: list[tuple[int, Figures]] = []
        self._ahead = GROUPS_AHEAD * encode_threads()
        self._encoder = ThreadPoolExecutor(encode_threads(), thread_name_prefix="encode")
        self._appender = ThreadPoolExecutor(1, thread_name_prefix="append")
        self._appending: deque[Future[None]] = deque()

    @property
    def rows(self) -> int:
        """Rows added so far."""
        return len(self._notes)

    @property
    def encoded_bytes(self) -> int:
        """Bytes on disk, plus the rows still in memory at the ratio of those written."""
        encoded, before = self._written
        ratio = encoded / before if before else 0.9
        return encoded + int(ratio * (self._added_bytes - before))

    def reaches(self, size_bytes: float) -> bool:
        """Tell whether the file is that large; by its rows alone, however fast it is encoded."""
        encoded, before = self._written
        most = encoded + 1.5 * (self._added_bytes - before)
        if most < size_bytes:  # random values get a quarter larger, none more
            return False
        self._wait(groups=0)
        return self.encoded_bytes >= size_bytes

    def add(self, rows: pa.Table) -> None:
        """Append the rows of a table, with or without `_mass` and `_actual`."""
        measured = measure_table(rows, nucleus_cap=self._nucleus_cap)
        for place in range(rows.num_rows):
            self.add_row(measured, place)

    def add_row(self, rows: MeasuredRows, place: int) -> None:
        """Append one of some rows; nothing is computed or copied here."""
        figures = rows.figures[place]
        self._notes.append((rows.indices[place], figures))
        self._group.append((rows.table, place))
        self._group_tokens += figures.tokens
        self._group_size += rows.sizes[place]
        self._added_bytes += rows.sizes[place]
        if len(self._group) == ROW_GROUP_ROWS or self._group_tokens >= ROW_GROUP_TOKENS:
            self._hand_over()

    def _hand_over(self) -> None:
        """Let the threads encode the group once no more than `_ahead` wait for them."""
        self._wait(groups=self._ahead - 1)
        encoding = self._encoder.submit(self._encode, self._group)
        self._appending.append(self._appender.submit(self._append, encoding, self._group_size))
        self._group, self._group_tokens, self._group_size = [], 0, 0

    def _wait(self, *, groups: int) -> None:
        """Wait until at most so many groups are under way; raise what failed."""
        while len(self._appending) > groups:
            self._appending.popleft().result()

    def _encode(self, rows: list[tuple[pa.Table, int]]) -> Any:
        table = pa.concat_tables(join_rows(rows, self._schema.names)).combine_chunks()
        return self._content.encode(table.cast(self._schema))

    def _append(self, encoding: Future[Any], size: int) -> None:
        group = encoding.result()
        if self._file is None:
            self._file = self._temporary.open("wb")
            self._content.begin(self._file)
        self._content.append(group)
        self._written = (self._file.tell(), self._written[1] + size)

    def finish(self, path: Path) -> Future[LocalShard]:
        """Let the threads complete the file, which then gets its name; raise what failed before."""
        if self._group:
            self._hand_over()
        return self._appender.submit(self._finish, path)

    def close(self, path: Path) -> LocalShard:
        """Finish the file and wait until it has its name."""
        return self.finish(path).result()

    def _finish(self, path: Path) -> LocalShard:
        """Write the footer and rename the file once its bytes are on the disk."""
        self._wait(groups=0)  # all are done: their thread is this one
        self._encoder.shutdown()
        if self._file is None:
            raise ValueError("a shard needs a row")
        self._content.end({METADATA_ROWS: encode_row_notes(self._notes)})
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        path.parent.mkdir(parents=True, exist_ok=True)
        os.replace(self._temporary, path)
        sync_directory(path.parent)
        self._appender.shutdown(wait=False)
        return read_local_shard(path)

    def discard(self) -> None:
        """Forget the file under way; after a failed write there is nothing to finish."""
        self._encoder.shutdown(cancel_futures=True)
        self._appender.shutdown(cancel_futures=True)
        with contextlib.suppress(OSError):
            if self._file is not None:
                self._file.close()
            self._temporary.unlink(missing_ok=True)


def encode_threads() -> int:
    """Return how many row groups are encoded at once: a third of the processors, 8 at most.

    One encodes about 200,000 tokens a second.
    """
    return max(1, min(8, count_processors() // 3))


def join_rows(rows: list[tuple[pa.Table, int]], names: list[str]) -> list[pa.Table]:
    """Return some columns of rows, given as tables and places, in as few tables as they allow."""
    parts: list[tuple[pa.Table, int, int]] = []  # table, first row, number of rows
    for table, place in rows:
        if parts and parts[-1][0] is table and sum(parts[-1][1:]) == place:
            parts[-1] = (table, parts[-1][1], parts[-1][2] + 1)
        else:
            parts.append((table, place, 1))
    return [table.slice(first, count).select(names) for table, first, count in parts]


class GroupsOfOneWriter:
    """A Parquet file whose row groups pyarrow encodes one after the other."""

    def __init__(self, schema: pa.Schema) -> None:
        self.schema = schema
        self.options = writer_options(schema)
        self.writer: Any = None

    def begin(self, file: IO[bytes]) -> None:
        """Write to this file, which is empty."""
        self.writer = pq.ParquetWriter(file, self.schema, **self.options)

    def encode(self, table: pa.Table) -> Any:
        """Do what can be done of a row group in any thread, beside others."""
        return table

    def append(self, group: Any) -> None:
        """Write what `encode` returned."""
        self.writer.write_table(group, row_group_size=group.num_rows)

    def end(self, metadata: Mapping[bytes, bytes]) -> None:
        """Write the footer, with more metadata than the schema has."""
        self.writer.add_key_value_metadata(dict(metadata))
        self.writer.close()


class JoinedGroups(GroupsOfOneWriter):
    """The same file to the byte, its row groups encoded apart and joined."""

    file: IO[bytes]

    def begin(self, file: IO[bytes]) -> None:
        self.file = file
        self.rows = 0
        self.row_groups: list[bytes] = []  # metadata
        file.write(MAGIC)

    def encode(self, table: pa.Table) -> RowGroup:
        sink = pa.BufferOutputStream()
        with pq.ParquetWriter(sink, self.schema, **self.options) as writer:
            writer.write_table(table, row_group_size=table.num_rows)
        file = sink.getvalue()
        footer, start = split_footer(file)
        pages = memoryview(file)[len(MAGIC) : start]
        return RowGroup(table.num_rows, pages, take_row_group(footer))

    def append(self, group: RowGroup) -> None:
        behind = self.file.tell() - len(MAGIC)
        moved = move_row_group(group.metadata, by=behind, number=len(self.row_groups))
        self.file.write(group.pages)
        self.row_groups.append(moved)
        self.rows += group.rows

    def end(self, metadata: Mapping[bytes, bytes]) -> None:
        empty = encode_footer(self.schema, self.options, metadata)
        footer = fill_footer(empty, rows=self.rows, row_groups=self.row_groups)
        self.file.write(footer + len(footer).to_bytes(4, "little") + MAGIC)


@functools.cache
def groups_join(schema: pa.Schema) -> bool:
    """Tell whether joined row groups are what this pyarrow writes by itself, to the byte.

    A release that puts more into a footer than is moved here costs threads then, and no shard.
    """
    wanted = write_sample(GroupsOfOneWriter(schema))
    try:
        joined = write_sample(JoinedGroups(schema))
    except (LookupError, ValueError):  # of a footer that cannot be walked
        joined = b""
    if joined != wanted:
        logger.warning(
            "pyarrow %s writes Parquet in a way that is not known here: one thread encodes",
            pa.__version__,
        )
    return joined == wanted


def write_sample(content: GroupsOfOneWriter) -> bytes:
    """Return a file of 20 small row groups."""
    row = {field_.name: [sample_value(field_.type)] * 3 for field_ in content.schema}
    table = pa.table(row, schema=content.schema)
    sink = io.BytesIO()
    content.begin(sink)
    for number in range(20):  # 15 and more are counted in another way
        content.append(content.encode(table.slice(0, 1 + number % 3)))
    content.end({METADATA_ROWS: b"20 row groups"})
    return sink.getvalue()


def sample_value(kind: pa.DataType) -> Any:
    """Return a value of a type."""
    if pa.types.is_list(kind):
        return [sample_value(kind.value_type)] * 2
    return pa.scalar("7").cast(kind).as_py()


def encode_footer(
    schema: pa.Schema, options: dict[str, Any], metadata: Mapping[bytes, bytes]
) -> bytes:
    """Return the footer of a file with this metadata and no row group."""
    sink = pa.BufferOutputStream()
    with pq.ParquetWriter(sink, schema, **options) as writer:
        writer.add_key_value_metadata(dict(metadata))
    return split_footer(sink.getvalue())[0]


def split_footer(file: pa.Buffer) -> tuple[bytes, int]:
    """Return the Thrift bytes of a Parquet file's footer and where they start."""
    end = len(file) - len(MAGIC) - 4
    start = end - int.from_bytes(file[end : end + 4], "little")
    return bytes(file[start:end]), start


# Thrift's compact protocol, as far as footers need it: pyarrow encodes a file in one thread and
# cannot join files. Numbers and types of fields: parquet.thrift in apache/parquet-format.
I16, I32, I64, BINARY, LIST, STRUCT = 4, 5, 6, 8, 9, 12
FIXED_BYTES = {1: 0, 2: 0, 3: 1, 7: 8}  # of true, false, byte, double
ROWS_FIELD, ROW_GROUPS_FIELD = 3, 4  # of FileMetaData


def read_varint(data: bytes, at: int) -> tuple[int, int]:
    """Return an unsigned integer of variable length and where it ends."""
    value = shift = 0
    while data[at] & 0x80:
        value |= (data[at] & 0x7F) << shift
        shift += 7
        at += 1
    return value | data[at] << shift, at + 1


def encode_varint(value: int) -> bytes:
    """Return an unsigned integer in variable length: the inverse of `read_varint`."""
    parts = bytearray()
    while value > 0x7F:
        parts.append(value & 0x7F | 0x80)
        value >>= 7
    parts.append(value)
    return bytes(parts)


def read_list(data: bytes, at: int) -> tuple[int, int, int]:
    """Return the size and the type of a list and where its first element starts."""
    size, kind = data[at] >> 4, data[at] & 15
    if size < 15:
        return size, kind, at + 1
    size, at = read_varint(data, at + 1)
    return size, kind, at


def encode_list_head(size: int, kind: int) -> bytes:
    """Return what comes before the elements of a list: the inverse of `read_list`."""
    return bytes([size << 4 | kind]) if size < 15 else bytes([0xF0 | kind]) + encode_varint(size)


def read_field(data: bytes, at: int, before: int) -> tuple[int, int, int]:
    """Return number and type of a struct's next field and where its value starts; type 0: none."""
    step, kind = data[at] >> 4, data[at] & 15
    if step or not kind:
        return before + step, kind, at + 1
    number, at = read_varint(data, at + 1)
    return number >> 1, kind, at


def skip_value(data: bytes, at: int, kind: int) -> int:
    """Return where a value ends."""
    if kind in (I16, I32, I64):
        while data[at] & 0x80:
            at += 1
        return at + 1
    if kind == BINARY:
        size, at = read_varint(data, at)
        return at + size
    if kind == LIST:
        size, inner, at = read_list(data, at)
        for _ in range(size):
            at = skip_value(data, at, inner)
        return at
    if kind == STRUCT:
        number, inner, at = read_field(data, at, 0)
        while inner:
            at = skip_value(data, at, inner)
            number, inner, at = read_field(data, at, number)
        return at
    return at + FIXED_BYTES[kind]


Edit = Any  # bytes instead of a value; a function of an integer; of fields by number: their edits


def edit_value(data: bytes, at: int, kind: int, edit: Edit, out: bytearray) -> int:
    """Append a value to `out` as edited, each element of a list alike; return where it ends."""
    if isinstance(edit, bytes):
        out += edit
        return skip_value(data, at, kind)
    if kind == STRUCT:
        return edit_struct(data, at, edit, out)
    if kind == LIST:
        size, inner, first = read_list(data, at)
        out += data[at:first]
        at = first
        for _ in range(size):
            at = edit_value(data, at, inner, edit, out)
        return at
    value, at = read_varint(data, at)
    value = edit(value >> 1 ^ -(value & 1))
    out += encode_varint(value << 1 if value >= 0 else ~(value << 1))
    return at


def edit_struct(data: bytes, at: int, edits: Mapping[int, Edit], out: bytearray) -> int:
    """Append a struct to `out` with some fields edited; return where it ends."""
    copied = at
    number, kind, at = read_field(data, at, 0)
    while kind:
        if number in edits:
            out += data[copied:at]
            copied = at = edit_value(data, at, kind, edits[number], out)
        else:
            at = skip_value(data, at, kind)
        number, kind, at = read_field(data, at, number)
    out += data[copied:at]
    return at


def take_row_group(footer: bytes) -> bytes:
    """Return the metadata of the only row group of a file, from its footer."""
    number, kind, at = read_field(footer, 0, 0)
    while number != ROW_GROUPS_FIELD:
        at = skip_value(footer, at, kind)
        number, kind, at = read_field(footer, at, number)
    _, _, first = read_list(footer, at)
    return footer[first : skip_value(footer, first, STRUCT)]


def move_row_group(metadata: bytes, *, by: int, number: int) -> bytes:
    """Return the metadata of a file's first row group as that of a later one, `by` bytes on."""

    def shift(offset: int) -> int:
        return offset + by if offset else 0  # 0: there is none

    places = {9: shift, 10: shift, 11: shift}  # of data, index and dictionary pages
    edits = {1: {2: shift, 3: places}, 5: shift, 7: lambda _: number}
    moved = bytearray()
    edit_struct(metadata, 0, edits, moved)
    return bytes(moved)


def fill_footer(empty: bytes, *, rows: int, row_groups: list[bytes]) -> bytes:
    """Return the footer of a file without rows as that of one with these row groups."""
    groups = encode_list_head(len(row_groups), STRUCT) + b"".join(row_groups)
    filled = bytearray()
    edits = {ROWS_FIELD: encode_varint(rows << 1), ROW_GROUPS_FIELD: groups}
    edit_struct(empty, 0, edits, filled)
    return bytes(filled)


DICTIONARY_BITS = 13  # up to 8,192 levels of a logit a dictionary is smaller than differences
DICTIONARY_VOCAB = 2**16  # tail ids of larger vocabularies repeat too seldom for a dictionary


def writer_options(schema: pa.Schema) -> dict[str, Any]:
    """Return the options of a writer that serve these columns best and that every reader knows.

    `python tests/storage_table.py` measures them. Splitting the bytes of ids and quantized logits
    too would save another tenth, but DuckDB before 2.0 refuses that. Statistics of ids and logits
    would only make the footer larger.
    """
    encodings = choose_encodings(schema)
    return {
        "compression": "zstd",
        "compression_level": 2,
        "use_dictionary": [leaf for leaf, how in encodings.items() if how == "DICTIONARY"],
        "column_encoding": {leaf: how for leaf, how in encodings.items() if how != "DICTIONARY"},
        "write_statistics": ["index", "num_tokens"],
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
        "sampled_indices_low": "DICTIONARY" if small_vocab else "PLAIN",
        "sampled_logits_quantized": "DICTIONARY" if few_levels else "DELTA_BINARY_PACKED",
    }
    encodings = {}
    for field_ in schema:
        is_list = pa.types.is_list(field_.type)
        leaf = f"{field_.name}.list.element" if is_list else field_.name
        floats = is_list and pa.types.is_floating(field_.type.value_type)
        encodings[leaf] = by_name.get(field_.name, "BYTE_STREAM_SPLIT" if floats else "PLAIN")
    return encodings


def nearest_folder(path: Path, *, flag: str) -> Path:
    """Return the part of a folder's path that is there already.

    Raises:
        ConfigError: it is a file.
    """
    place = path.resolve()
    nearest = next(part for part in (place, *place.parents) if part.exists())
    if not nearest.is_dir():
        raise ConfigError(f"{flag}: {nearest} is a file; name a folder, or remove the file")
    return nearest


def lock_file(path: Path) -> IO[str]:
    """Hold a lock as long as the returned file is open; a dead process holds nothing.

    Raises:
        ConfigError: a live process has it.
    """
    file = path.open("a+")
    try:
        if fcntl is not None:
            with where_supported():
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        holder = file.read().strip() or "?"
        file.close()
        raise ConfigError(
            f"process {holder} is writing to the same output with the cache {path.parent}: wait "
            "for it or stop it (several workers need their own --rank and --world-size)"
        ) from None
    file.truncate(0)
    file.write(str(os.getpid()))
    file.flush()
    if hasattr(os, "register_at_fork"):  # or a worker that outlives us would keep the lock
        os.register_at_fork(after_in_child=file.close)
    return file


class ShardCache:
    """The local state of one output and worker: shards to deliver, pending rows, one lock.

    `part-*.parquet` wait for delivery, `backup_part-*.parquet` could not be delivered,
    `pending/pending-*.parquet` hold rows that fill no shard yet. Files are complete or named
    `*.tmp`; others that cannot be read are set aside as `unreadable_*` and their rows extracted
    again.
    """

    def __init__(self, cache_dir: str | Path, key: str) -> None:
        self.folder = Path(cache_dir).expanduser() / key
        with storage_errors(str(self.folder)):
            nearest_folder(self.folder, flag="--cache-dir")
            self.pending_folder.mkdir(parents=True, exist_ok=True)
            self._lock = lock_file(self.folder / "lock")
            for leftover in self.folder.rglob("*.tmp"):
                leftover.unlink()

    @property
    def pending_folder(self) -> Path:
        return self.folder / "pending"

    def paths(self) -> list[Path]:
        """Return the files: shards that wait for delivery by part number, then pending rows."""
        shards = [*self.folder.glob("part-*.parquet"), *self.folder.glob("backup_part-*.parquet")]
        shards.sort(key=lambda path: path.name.removeprefix("backup_"))
        return shards + sorted(self.pending_folder.glob("pending-*.parquet"))

    def shards(self) -> list[LocalShard]:
        """Return the shards that wait for delivery, failed ones included, by part number."""
        return self._read(self.folder)

    def pending(self) -> list[LocalShard]:
        """Return the files of pending rows, oldest first."""
        return self._read(self.pending_folder)

    def _read(self, folder: Path) -> list[LocalShard]:
        found = []
        for path in self.paths():
            if path.parent != folder:
                continue
            try:
                found.append(read_local_shard(path))
            except FormatError as error:
                logger.warning("set aside %s, its rows are extracted again: %s", path, error)
                path.rename(path.with_name(f"unreadable_{path.name}"))
        return found

    def shard_path(self, name: str) -> Path:
        """Return where a shard of the output waits for delivery."""
        return self.folder / Path(name).name

    def next_pending_path(self) -> Path:
        """Return an unused name for pending rows."""
        names = " ".join(path.name for path in self.pending_folder.iterdir())
        numbers = [int(number) for number in re.findall(r"pending-(\d+)\.parquet", names)]
        return self.pending_folder / f"pending-{max(numbers, default=-1) + 1:05d}.parquet"

    def make_backup(self, shard: LocalShard) -> LocalShard:
        """Mark a shard as one that could not be delivered."""
        if shard.path.name.startswith("backup_"):
            return shard
        path = shard.path.with_name(f"backup_{shard.path.name}")
        os.replace(shard.path, path)
        return replace(shard, path=path)

    def make_pending(self, shard: LocalShard) -> LocalShard:
        """Turn a shard that cannot be delivered as it is into pending rows."""
        path = self.next_pending_path()
        os.replace(shard.path, path)
        return replace(shard, path=path)

    def discard(self) -> None:
        """Remove every shard and pending row."""
        for path in self.paths():
            path.unlink()

    def close(self) -> None:
        """Release the lock."""
        self._lock.close()


# --------------------------------------------------------------------------------------------------
# 8 Hub
# --------------------------------------------------------------------------------------------------

RETRY_WAITS_S = (1, 2, 4, 8, 16, 32, 60)  # with jitter; a Retry-After that is longer wins
PASSING_STATUS = {408, 409, 412, 425, 429}  # and every 5xx
REQUEST_TIMEOUT_S = 120.0  # the Hub itself ends a commit after 60
COMMITS_PER_HOUR = 120  # the Hub allows 128 per repository
COMMIT_BURST = 30  # of these at once
MOST_RESERVED = 80  # commits an hour kept for bursts, or for the last commits of many workers
UPLOAD_BYTES_PER_S = 5e6  # what the first upload is expected to reach, before one is measured
MAX_WAITING_SHARDS = 4  # closed shards that wait for delivery before the run has to wait
CHECKPOINT_NAME = re.compile(r"checkpoint(?:-w\d+)?\.json")


class OutOfReachError(HubError):
    """Every try failed in a way that can pass: later tries, or the next run, may succeed."""


class PassingError(Exception):
    """A request failed in a way that can pass; met inside the retry loop only."""

    def __init__(self, message: str, *, retry_after_s: float = 0.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


@dataclass(frozen=True)
class ListedFile:
    """A file as the output lists it."""

    size: int
    sha256: str | None  # None: the listing does not tell
    version: str | None = None  # changes with the content; None: the listing does not tell


class Destination(Protocol):
    """Where shards go. Requests raise PassingError (try again) or HubError (no use)."""

    name: str
    detects_changes: bool  # a commit fails when somebody else has changed the output

    def exists(self) -> bool:
        """Tell whether it is there, and readable."""

    def open(self) -> None:
        """Make sure that it can be written, or made."""

    def create(self) -> None:
        """Make it where it does not exist, before the first commit."""

    def turn(self) -> contextlib.AbstractContextManager[None]:
        """Hold off other workers from listing to commit, where a commit would not notice them."""

    def list_files(self) -> dict[str, ListedFile]:
        """Return the files by path, as of one moment."""

    def read(self, path: str, start: int = 0, size: int | None = None) -> bytes:
        """Return bytes of a file that the last listing holds; all of them by default."""

    def holds(self, path: str, local: Path, sha256: str) -> bool:
        """Tell whether a listed file has the content of a local one."""

    def commit(self, message: str, add: Mapping[str, Path | bytes], delete: Iterable[str]) -> None:
        """Add and remove files at once; a shard that is there already is never replaced unless
        `delete` names it."""


class FolderDestination:
    """A local folder. A commit is a row of renames, the checkpoint last."""

    detects_changes = False

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder).expanduser()
        self.name = str(folder)
        self._has_turn = False

    def exists(self) -> bool:
        return self.folder.is_dir()

    def open(self) -> None:
        """Refuse a folder that cannot be made; it is made with the first commit, not before."""
        with storage_errors(self.name):
            nearest = nearest_folder(self.folder / "data", flag="--output")
            if not os.access(nearest, os.W_OK | os.X_OK):
                raise PermissionError(errno.EACCES, f"no right to write in {nearest}")

    def create(self) -> None:
        """Leave that to the first commit."""

    def list_files(self) -> dict[str, ListedFile]:
        with storage_errors(self.name):
            data = self.folder / "data"
            paths = [*self.folder.glob("*"), *data.glob("*"), *data.glob("*/*")]
            return {
                path.relative_to(self.folder).as_posix(): ListedFile(path.stat().st_size, None)
                for path in sorted(paths)
                if path.is_file() and not path.name.endswith((".tmp", ".lock"))
            }

    def read(self, path: str, start: int = 0, size: int | None = None) -> bytes:
        with storage_errors(self.name), (self.folder / path).open("rb") as file:
            file.seek(start)
            return file.read(size)

    def holds(self, path: str, local: Path, sha256: str) -> bool:
        with storage_errors(self.name):
            return hash_file(self.folder / path) == sha256

    def commit(self, message: str, add: Mapping[str, Path | bytes], delete: Iterable[str]) -> None:
        removed = set(delete)
        with self.turn(), storage_errors(self.name):
            for path in add:
                (self.folder / path).parent.mkdir(parents=True, exist_ok=True)
            for path in add:
                there = path not in removed and (self.folder / path).exists()
                if there and SHARD_NAME.fullmatch(path):
                    raise PassingError(f"{path} has appeared in {self.name}")
            for path in sorted(removed):  # first, or a crash would leave old rows beside new ones
                (self.folder / path).unlink(missing_ok=True)
            for path, content in add.items():
                write_durably(self.folder / path, content)

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Let one worker at a time list and commit; one that has its turn keeps it."""
        if self._has_turn or fcntl is None:
            yield
            return
        with storage_errors(self.name):
            self.folder.mkdir(parents=True, exist_ok=True)
            handle = lock_folder(self.folder)
        self._has_turn = True
        try:
            yield
        finally:
            self._has_turn = False
            os.close(handle)


def lock_folder(folder: Path) -> int:
    """Wait for the lock on a folder; closing the returned handle releases it.

    Network file systems lock no folders: there it is a file of its own.
    """
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
    except OSError as error:
        os.close(handle)
        if error.errno not in UNSUPPORTED:
            raise
        handle = os.open(folder / "commit.lock", os.O_RDWR | os.O_CREAT, 0o666)
        with where_supported():
            fcntl.flock(handle, fcntl.LOCK_EX)
    return handle


class HubDestination:
    """A dataset repository of the Hub; a commit is one of git, on top of the commit listed last."""

    detects_changes = True

    def __init__(
        self,
        repo: str,
        *,
        private: bool = False,
        endpoint: str | None = None,
        token: str | None = None,
    ) -> None:
        from huggingface_hub import HfApi

        self.name = repo
        self._private = private
        self._api = HfApi(endpoint=endpoint, token=token)
        self._head: str | None = None
        self._there = True  # as far as is known

    def exists(self) -> bool:
        return self._find() is not None

    def _find(self) -> Any:
        """Return what the Hub says of the repository, None when it has none of that name."""
        from huggingface_hub.errors import RepositoryNotFoundError

        with hub_errors(self.name):
            try:
                return self._api.repo_info(self.name, repo_type="dataset")
            except RepositoryNotFoundError:
                return None

    def open(self) -> None:
        """Make sure that the token may write to the repository; `create` makes one.

        Raises:
            ConfigError: `--private`, but it exists and is public.
        """
        info = self._find()
        self._there = info is not None
        with hub_errors(self.name):
            if info is None and self._api.token is False:
                raise HubError(explain_status(401, self.name))
            if info is None:
                self._api.whoami()  # refuses a token that is none
                return
            self._api.auth_check(self.name, repo_type="dataset", write=True)
        if self._private and not info.private:
            raise ConfigError(
                f"{self.name} exists and is public: make it private in its settings on the Hub, or "
                "leave out --private"
            )

    def create(self) -> None:
        """Create the repository where it does not exist."""
        if self._there:
            return
        with hub_errors(self.name):
            self._api.create_repo(
                self.name, repo_type="dataset", private=self._private, exist_ok=True
            )
        self._there = True

    def turn(self) -> contextlib.AbstractContextManager[None]:
        """Hold off nobody: a commit on another parent than the one listed is refused."""
        return contextlib.nullcontext()

    def list_files(self) -> dict[str, ListedFile]:
        from huggingface_hub.hf_api import RepoFile

        if not self._there:
            return {}
        with hub_errors(self.name):
            head = self._api.repo_info(self.name, repo_type="dataset").sha
            tree = self._api.list_repo_tree(
                self.name, repo_type="dataset", recursive=True, revision=head
            )
            files = {
                entry.path: ListedFile(
                    entry.size, entry.lfs.sha256 if entry.lfs else None, entry.blob_id
                )
                for entry in tree
                if isinstance(entry, RepoFile)
            }
        self._files, self._head = files, head
        return dict(files)

    def read(self, path: str, start: int = 0, size: int | None = None) -> bytes:
        from huggingface_hub import get_session, hf_hub_url
        from huggingface_hub.utils import build_hf_headers, hf_raise_for_status

        url = hf_hub_url(
            self.name, path, repo_type="dataset", revision=self._head, endpoint=self._api.endpoint
        )
        wanted = self._files[path].size - start if size is None else size
        if wanted <= 0:
            return b""
        headers = build_hf_headers(token=self._api.token)
        headers["Range"] = f"bytes={start}-{start + wanted - 1}"
        with hub_errors(self.name):
            answer = get_session().get(url, headers=headers, timeout=REQUEST_TIMEOUT_S)
            hf_raise_for_status(answer)
        if len(answer.content) != wanted:
            raise PassingError(f"{path} came short: {len(answer.content)} of {wanted} bytes")
        return answer.content

    def holds(self, path: str, local: Path, sha256: str) -> bool:
        return self._files[path].sha256 == sha256

    def commit(self, message: str, add: Mapping[str, Path | bytes], delete: Iterable[str]) -> None:
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete, get_session
        from huggingface_hub.utils import disable_progress_bars

        disable_progress_bars()  # the run has its own
        operations: list[Any] = [
            *(CommitOperationDelete(path) for path in delete if path not in add),
            *(CommitOperationAdd(path, content) for path, content in add.items()),
        ]
        with hub_errors(self.name):
            get_session().timeout = REQUEST_TIMEOUT_S  # none by default: a dead line would hang
            info = self._api.create_commit(
                self.name,
                operations,
                commit_message=message,
                repo_type="dataset",
                parent_commit=self._head,
            )
        self._head = info.oid


def hide_tokens(text: str) -> str:
    """Replace access tokens, whoever echoed them."""
    from huggingface_hub import get_token

    if token := get_token():
        text = text.replace(token, "***")
    return re.sub(r"\b(hf|api_org)_\w{6,}", "***", text)


class HideTokens(logging.Filter):
    """Replace access tokens in every record that a handler writes."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Rewrite the record, keep it."""
        record.msg, record.args = hide_tokens(record.getMessage()), None
        return True


@contextmanager
def log_beside_bar() -> Iterator[None]:
    """Let log lines pass by a progress bar, without tokens."""
    with logging_redirect_tqdm():
        for handler in logging.getLogger().handlers:  # the bar's own have no filter
            if not any(isinstance(kept, HideTokens) for kept in handler.filters):
                handler.addFilter(HideTokens())
        yield


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
    except LocalTokenNotFoundError:
        raise HubError(explain_status(401, repo)) from None
    except OfflineModeIsEnabled:
        raise HubError(
            f"cannot reach {repo}: HF_HUB_OFFLINE is set; unset it, or give a folder as --output"
        ) from None
    except HfHubHTTPError as error:
        raise explain_refusal(error.response, error.server_message or "", repo) from None
    except (HTTPError, OSError, json.JSONDecodeError) as error:  # lines, proxies, Xet's own
        raise PassingError(hide_tokens(f"{repo}: {type(error).__name__}: {error}")) from None
    except RuntimeError as error:  # of a transfer: LFS wraps what happened, Xet raises it bare
        raise PassingError(hide_tokens(f"{repo}: {error} {error.__cause__ or ''}")) from None


def explain_refusal(response: Any, said: str, repo: str) -> PassingError | HubError:
    """Return the error that an answer of the Hub means."""
    status = response.status_code
    said = hide_tokens(" ".join(said.split()))[:300]
    if status in PASSING_STATUS or status >= 500 or "LFS pointer" in said:
        return PassingError(
            f"{repo}: HTTP {status} {said}".rstrip(),
            retry_after_s=read_retry_after(response.headers, limited=status == 429),
        )
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


def read_retry_after(headers: Mapping[str, str], *, limited: bool) -> float:
    """Return how long an answer asks to wait, in seconds; a minute at a limit that does not say."""
    value = headers.get("Retry-After", "").strip()
    if value.isdigit():
        return float(value)
    with contextlib.suppress(TypeError, ValueError):
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    if match := re.search(r"r=0;\s*t=(\d+)", headers.get("RateLimit", "")):
        return float(match[1])
    return 60.0 if limited else 0.0


class CommitPace:
    """Keep under the Hub's limit of commits per repository and hour, bursts included.

    All workers together get what is left of the hour's commits once a burst, or one last commit
    of each worker, is reserved. More workers than a burst has commits begin one after another.
    """

    def __init__(self, *, workers: int = 1, rank: int = 0) -> None:
        reserved = min(max(COMMIT_BURST, workers), MOST_RESERVED)
        self._interval_s = 3600 * workers / (COMMITS_PER_HOUR - reserved)
        self.per_hour = COMMITS_PER_HOUR - reserved  # of all workers
        self._burst_s = self._interval_s * (max(1, COMMIT_BURST // workers) - 1)
        self._next_s = -math.inf
        if workers > COMMIT_BURST:
            self._next_s = time.monotonic() + self._interval_s * (rank + 1) / workers

    def take(self) -> float:
        """Count one commit; return the seconds to wait before it."""
        now_s = time.monotonic()
        self._next_s = max(self._next_s, now_s - self._burst_s) + self._interval_s
        return max(0.0, self._next_s - self._interval_s - now_s)


def is_local_output(output: str) -> bool:
    """Tell whether `--output` means a folder rather than a Hub repository."""
    return output.startswith((".", "/", "~")) or (output != "" and Path(output).is_dir())


def open_destination(
    output: str, *, private: bool = False, endpoint: str | None = None, token: str | None = None
) -> Destination:
    """Return the destination that `--output` names, not opened yet.

    Raises:
        ConfigError: it names neither a folder nor a repository.
    """
    if is_local_output(output) or Path(output).is_file():
        return FolderDestination(output)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", output):
        raise ConfigError(
            f"--output {output!r} is neither user/name (a Hub dataset) nor a folder that exists or "
            f"starts with . / ~: write ./{output} for a folder"
        )
    return HubDestination(output, private=private, endpoint=endpoint, token=token)


def read_recorded_settings(output: str, *, stop: Stop | None = None) -> dict[str, Any]:
    """Return extraction_config.json of an output, {} when there is none that can be read.

    Raises:
        HubError: the output refused or was out of reach.
    """
    destination = open_destination(output)
    if not retry(destination.exists, stop=stop):
        return {}
    if CONFIG_FILE not in retry(destination.list_files, stop=stop):
        return {}
    try:
        settings = json.loads(retry(lambda: destination.read(CONFIG_FILE), stop=stop))
    except ValueError:
        return {}
    return settings if isinstance(settings, dict) else {}


def read_cached_settings(config: ExtractionConfig) -> dict[str, Any]:
    """Return the settings of the rows that wait in this job's cache, {} when there are none."""
    key = cache_key(config.output, rank=config.rank or 0, world_size=config.world_size or 1)
    for path in sorted((Path(config.cache_dir).expanduser() / key).rglob("*.parquet")):
        with contextlib.suppress(FormatError):
            return decode_notes(read_footer(path)).settings
    return {}


def cache_key(
    output: str, *, rank: int = 0, world_size: int = 1, endpoint: str | None = None
) -> str:
    """Return the folder name of the local state of one output and worker."""
    hub = endpoint or os.environ.get("HF_ENDPOINT", "")
    local = is_local_output(output)
    place = str(Path(output).expanduser().resolve()) if local else f"{hub} {output}"
    digest = hashlib.sha256(place.encode()).hexdigest()[:12]
    label = re.sub(r"[^\w.-]+", "-", output.rstrip("/"))[-40:].strip("-.")
    worker = f"-w{rank:02d}" if world_size > 1 else ""
    return f"{label}-{digest}{worker}"


class Stop(Protocol):
    """What ends waiting: a `threading.Event`, or a signal seen by `PolledStop`."""

    def is_set(self) -> bool: ...

    def wait(self, timeout: float) -> object: ...


class PolledStop:
    """Asks again and again whether to stop, since a signal handler must not set an event."""

    def __init__(self, stopping: Callable[[], bool]) -> None:
        self.is_set = stopping

    def wait(self, timeout: float) -> None:
        """Wait for so many seconds, or until told to stop."""
        end = time.monotonic() + timeout
        while not self.is_set() and (left := end - time.monotonic()) > 0:
            time.sleep(min(left, 0.2))


def retry(request: Callable[[], T], *, stop: Stop | None = None, further_tries: int = 0) -> T:
    """Return what the request returns, trying again with growing waits while it can pass.

    Raises:
        OutOfReachError: the last try failed too, or `stop` was set.
        HubError: the request was refused.
    """
    stop = stop or threading.Event()
    for wait_s in (*RETRY_WAITS_S, *[RETRY_WAITS_S[-1]] * further_tries, None):
        try:
            return request()
        except PassingError as error:
            if wait_s is None or stop.is_set():
                raise OutOfReachError(f"{error}; when it can be reached again: --resume") from None
            pause_s = max(error.retry_after_s, wait_s * random.uniform(0.75, 1.25))
            logger.warning("%s; trying again in %.0f s", error, pause_s)
            stop.wait(pause_s)
    raise AssertionError("the last try returns or raises")


class RangedFile(io.RawIOBase):
    """A listed file as a seekable stream of range reads, so that Parquet reads one column."""

    def __init__(self, destination: Destination, path: str, size: int) -> None:
        super().__init__()
        self._destination, self._path, self._size = destination, path, size
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        self._position = base + offset
        return self._position

    def readinto(self, buffer: Any) -> int:
        size = min(len(buffer), self._size - self._position)
        if size <= 0:
            return 0
        start = self._position
        data = retry(lambda: self._destination.read(self._path, start, size))
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)


def read_listed_notes(
    destination: Destination,
    path: str,
    size: int,
    *,
    footer_bytes: int | None = None,
    stop: Stop | None = None,
) -> ShardNotes:
    """Read the notes of a listed shard: its footer, or its `index` column if a stranger wrote it.

    Raises:
        FormatError: it is not complete.
    """
    wanted = min(size, (footer_bytes or (64 << 10)) + 8)
    tail = retry(lambda: destination.read(path, size - wanted, wanted), stop=stop)
    needed = int.from_bytes(tail[-8:-4], "little") + 8
    if tail[-4:] == b"PAR1" and wanted < needed <= size:
        tail = retry(lambda: destination.read(path, size - needed, needed), stop=stop)
    footer = read_footer(pa.BufferReader(tail))
    try:
        return decode_notes(footer)
    except FormatError:
        return read_index_column(RangedFile(destination, path, size), footer)


def read_index_column(file: RangedFile, footer: pq.FileMetaData) -> ShardNotes:
    """Return the notes of a shard that has none, from its columns `index` and `num_tokens`."""
    try:
        table = pq.ParquetFile(file, metadata=footer).read(columns=["index", "num_tokens"])
        index = table["index"].to_numpy().astype(np.int32)
        tokens = int(table["num_tokens"].to_numpy().sum())
        settings = json.loads((footer.metadata or {}).get(METADATA_SETTINGS, b"{}"))
    except (OSError, pa.ArrowException, KeyError, ValueError) as error:
        raise FormatError(f"its columns index and num_tokens cannot be read ({error})") from error
    unknown = np.full(index.size, np.nan, np.float32)
    figures = Figures(rows=index.size, tokens=tokens)
    return ShardNotes(index, unknown, unknown, figures, settings, footer.serialized_size)


@dataclass(frozen=True)
class ShardRecord:
    """What checkpoint.json says about one listed shard."""

    bytes: int
    sha256: str | None
    footer_bytes: int
    figures: Figures
    ids: str | None = None  # `encode_ids` of its conversations, where many workers have to know


def encode_ids(ids: npt.NDArray[Any]) -> str:
    """Pack the ids of conversations, in no order, into one or two bytes each."""
    steps = np.diff(np.sort(ids.astype(np.int64)), prepend=0)
    return base64.b64encode(zlib.compress(steps.astype("<i8").tobytes(), 9)).decode()


def decode_ids(text: str) -> npt.NDArray[np.int64]:
    """Undo `encode_ids`; the ids ascend.

    Raises:
        ValueError: the text is damaged.
    """
    try:
        return np.cumsum(np.frombuffer(zlib.decompress(base64.b64decode(text)), "<i8"))
    except zlib.error as error:
        raise ValueError(f"damaged ids: {error}") from error


def encode_checkpoint(settings: Mapping[str, Any], records: Mapping[str, ShardRecord]) -> bytes:
    """Return checkpoint.json; equal records give equal bytes."""
    total = sum((record.figures for record in records.values()), Figures())
    content = {
        "settings": dict(settings),
        "rows": total.rows,
        "tokens": total.tokens,
        "shards": {
            name: {k: v for k, v in asdict(records[name]).items() if (k, v) != ("ids", None)}
            for name in sorted(records)
        },
    }
    return json.dumps(content, indent=1, sort_keys=True).encode() + b"\n"


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint says of the shards of one worker."""

    settings: dict[str, Any] = field(default_factory=dict)
    records: dict[str, ShardRecord] = field(default_factory=dict)  # by shard path


def decode_checkpoint(data: bytes) -> Checkpoint:
    """Undo `encode_checkpoint`.

    Raises:
        FormatError: it is not one; the shards themselves tell all that it would.
    """
    try:
        content = json.loads(data)
        records = {
            name: ShardRecord(**{"sha256": None, **record, "figures": Figures(**record["figures"])})
            for name, record in content["shards"].items()
        }
        return Checkpoint(dict(content["settings"]), records)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise FormatError(f"not a checkpoint ({error!r})") from error


@dataclass
class OutputState:
    """What the output lists, and which conversations are done by that."""

    files: dict[str, ListedFile] = field(default_factory=dict)
    records: dict[str, ShardRecord] = field(default_factory=dict)  # by shard path
    done: set[int] = field(default_factory=set)
    settings: list[dict[str, Any]] = field(default_factory=list)  # of each listed shard
    checkpoints: dict[str, tuple[ListedFile, Checkpoint]] = field(default_factory=dict)

    def shards(self) -> list[str]:
        """Return the paths of the listed shards."""
        return sorted(filter(SHARD_NAME.fullmatch, self.files))

    def figures(self) -> Figures:
        """Return the sums over every listed shard."""
        return sum((record.figures for record in self.records.values()), Figures())


def read_checkpoints(
    destination: Destination, state: OutputState, *, stop: Stop | None = None
) -> dict[str, tuple[ShardRecord, Checkpoint]]:
    """Return the records of listed shards that agree with the listing, and whose they are.

    A checkpoint is read again only where the listing does not show that it is the same.
    """
    records: dict[str, tuple[ShardRecord, Checkpoint]] = {}
    for path in sorted(filter(CHECKPOINT_NAME.fullmatch, state.files)):
        listed = state.files[path]
        there, checkpoint = state.checkpoints.get(path, (None, Checkpoint()))
        if there != listed or listed.version is None:
            data = retry(functools.partial(destination.read, path), stop=stop)
            try:
                checkpoint = decode_checkpoint(data)
            except FormatError as error:
                logger.warning("ignored %s in %s: %s", path, destination.name, error)
                checkpoint = Checkpoint()
            state.checkpoints[path] = listed, checkpoint
        records |= {name: (record, checkpoint) for name, record in checkpoint.records.items()}
    return {
        name: (record, checkpoint)
        for name, (record, checkpoint) in records.items()
        if name in state.files
        and state.files[name].size == record.bytes
        and state.files[name].sha256 in (None, record.sha256)
    }


def notes_of_record(record: ShardRecord, settings: dict[str, Any]) -> ShardNotes | None:
    """Return what a footer would tell, where a checkpoint's record tells it, too."""
    if record.ids is None:
        return None
    try:
        ids = decode_ids(record.ids).astype(np.int32)
    except ValueError:
        return None
    if ids.size != record.figures.rows:
        return None
    unknown = np.full(ids.size, np.nan, np.float32)
    return ShardNotes(ids, unknown, unknown, record.figures, settings, record.footer_bytes)


def learn_shards(
    destination: Destination,
    state: OutputState,
    names: Sequence[str],
    *,
    keep_ids: bool = False,
    stop: Stop | None = None,
) -> None:
    """Add to `state` which conversations some listed shards hold.

    Where the listing shows that a checkpoint's record is of this very shard and the record holds
    the ids, no request is made for the shard; else its footer is read.

    Raises:
        HubError: the output is out of reach, or lists a shard that is not complete.
    """
    known = read_checkpoints(destination, state, stop=stop)

    def read(name: str) -> ShardNotes:
        listed, hint = state.files[name], None
        if name in known:
            record, checkpoint = known[name]
            notes = notes_of_record(record, checkpoint.settings)
            if notes is not None and listed.sha256 is not None:
                return notes
            hint = record.footer_bytes
        try:
            return read_listed_notes(destination, name, listed.size, footer_bytes=hint, stop=stop)
        except FormatError as error:
            raise ConfigError(
                f"{name} in {destination.name} is damaged: {error}; delete it and continue with "
                "--resume, its rows are extracted again"
            ) from error

    with ThreadPoolExecutor(8) as pool:
        for name, notes in zip(names, pool.map(read, names), strict=True):
            listed = state.files[name]
            sha256 = listed.sha256 or (known[name][0].sha256 if name in known else None)
            ids = encode_ids(notes.indices) if keep_ids else None
            state.records[name] = ShardRecord(
                listed.size, sha256, notes.footer_bytes, notes.figures, ids
            )
            if twice := state.done.intersection(notes.indices.tolist()):
                logger.warning("%s repeats %d rows of other shards", name, len(twice))
            state.done.update(notes.indices.tolist())
            state.settings.append(notes.settings)


def read_output(
    destination: Destination, *, keep_ids: bool = False, stop: Stop | None = None
) -> OutputState:
    """List the output and read which conversations its shards hold.

    Raises:
        HubError: the output is out of reach, or lists a shard that is not complete.
    """
    state = OutputState(retry(destination.list_files, stop=stop))
    learn_shards(destination, state, state.shards(), keep_ids=keep_ids, stop=stop)
    return state


CARD_LINE = "<!-- Below this line the card is yours: updates keep it. -->"
CARD_OWNED_KEYS = ("configs", "pretty_name", "size_categories", "source_datasets")  # of the YAML
CARD_SIZES = {10**3: "n<1K", 10**4: "1K<n<10K", 10**5: "10K<n<100K", 10**6: "100K<n<1M"}
CARD_TEXT = """\
# {title}

The distributions of `{model}` over the assistant tokens of `{dataset}` (split `{split}`), for
distillation. One row is one conversation; row token `j` is the distribution from which its `j`-th
assistant token is predicted: the nucleus, a sample of the rest drawn without replacement, and the
log-sum-exp over the whole vocabulary, so that `exp(logit - logsumexp)` is a probability.

{figures}

## Load

```python
import numpy as np
from datasets import load_dataset

row = next(iter(load_dataset("{output}", split="train", streaming=True)))
low, counts = np.asarray(row["top_indices_low"], np.int64), np.asarray(row["top_counts"])
bits = np.unpackbits(np.frombuffer(row["top_indices_high"], np.uint8), bitorder="little")
high = (bits[0::2] + 2 * bits[1::2].astype(np.int64))[: low.size]
ids = low | high << 16
vmin, vmax = np.repeat(row["top_min"], counts), np.repeat(row["top_max"], counts)
logits = np.asarray(row["top_logits_quantized"]) / 65535 * (vmax - vmin) + vmin
probs = np.exp(logits - np.repeat(row["logsumexp"], counts))
print("first token:", ids[: counts[0]], probs[: counts[0]])
```

## Settings

{settings}

## Columns

Lists hold all tokens of a row one after another; `top_counts` says how many nucleus entries each
token has. An id is `low | high << 16`, `high` packed two bits an id, first id lowest. A logit is
`q / 65535 * (max - min) + min`, by token.

{schema}
"""


def make_card(
    output: str,
    settings: Mapping[str, Any],
    *,
    figures: Figures,
    shards: int,
    size_bytes: int,
    nested: bool = False,
    previous: str = "",
) -> str:
    """Return README.md: what the dataset is, with figures, above what a person wrote.

    Of `previous`, what stands below `CARD_LINE` is kept, or all text of a card that lacks it, and
    the YAML keys that are not `CARD_OWNED_KEYS`. A card whose YAML is broken is left alone.
    """
    import yaml

    match = re.match(r"---\s*\n(.*?)\n---\s*(?:\n|$)", previous, re.DOTALL)
    try:
        kept = dict((yaml.safe_load(match[1]) if match else None) or {})
    except (yaml.YAMLError, ValueError, TypeError) as error:
        logger.warning("the card of %s is not updated, its YAML is broken: %s", output, error)
        return previous
    front = describe_card(settings, figures, nested=nested)
    front |= {key: value for key, value in kept.items() if key not in CARD_OWNED_KEYS}
    schema = shard_schema(store_tokens=bool(settings.get("store_tokens")))
    body = CARD_TEXT.format(
        title=front["pretty_name"],
        output=output,
        model=settings.get("model"),
        dataset=settings.get("dataset"),
        split=settings.get("split"),
        figures=format_figures(figures, shards=shards, size_bytes=size_bytes),
        settings=format_table({k: json.dumps(v) for k, v in settings.items() if v is not None}),
        schema=format_table({column.name: str(column.type) for column in schema}),
    )
    text = previous[match.end() :] if match else previous
    head, line, below = text.partition(CARD_LINE)
    below = below if line else f"\n\n{head}".rstrip() + "\n"
    yaml_text = yaml.safe_dump(front, sort_keys=False, allow_unicode=True)
    return f"---\n{yaml_text}---\n\n{body}\n{CARD_LINE}{below}"


def describe_card(
    settings: Mapping[str, Any], figures: Figures, *, nested: bool = False
) -> dict[str, Any]:
    """Return the YAML of a card: what the Hub's viewer and search and `load_dataset` read."""
    source = str(settings.get("dataset"))
    size = next((name for bound, name in CARD_SIZES.items() if figures.rows < bound), "1M<n<10M")
    path: Any = ["data/*.parquet", "data/*/*.parquet"] if nested else "data/*.parquet"
    files = [{"split": "train", "path": path}]
    is_repo = re.fullmatch(r"\w[\w.-]*/[\w.-]+", source) and not Path(source).exists()
    return {
        "pretty_name": f"Logits of {settings.get('model')} on {source}",
        "tags": ["logits", "distillation", "knowledge-distillation"],
        "task_categories": ["text-generation"],
        "size_categories": [size],
        "configs": [{"config_name": "default", "data_files": files}],
    } | ({"source_datasets": [source]} if is_repo else {})


def format_figures(figures: Figures, *, shards: int, size_bytes: int) -> str:
    """Return the table of what was measured."""
    tokens, measured = max(1, figures.tokens), figures.measured_tokens
    rows = {
        "conversations": f"{figures.rows:,}",
        "tokens": f"{figures.tokens:,}",
        "shards": f"{shards:,} ({size_bytes / 1e6:,.1f} MB)",
        "bytes per token": f"{size_bytes / tokens:.1f}",
        "mean nucleus": f"{figures.nucleus_tokens / tokens:.1f} tokens",
        "nuclei of the largest size allowed": f"{figures.capped_tokens / tokens:.2%}",
    }
    if measured:
        rows["probability covered by the nucleus"] = f"{figures.mass / measured:.4f} on average"
        rows["probability of the actual token"] = f"{figures.actual / measured:.4f} on average"
    return format_table(rows)


def format_table(rows: Mapping[str, str]) -> str:
    """Return a two-column Markdown table."""
    cells = [f"| {name} | {value} |".replace("\n", " ") for name, value in rows.items()]
    return "\n".join(["| | |", "|---|---|", *cells])


@dataclass(frozen=True)
class ResumeInfo:
    """What an earlier run has left: nothing of it needs to be extracted again."""

    done: npt.NDArray[np.int64]  # ascending ids inside shards that the output lists
    pending: npt.NDArray[np.int64]  # ascending ids kept in the cache, not listed yet
    next_part: int
    shards: int  # that the output lists


class PendingRows:
    """Rows of a pending file that are in no shard yet."""

    def __init__(self, shard: LocalShard, taken: Container[int]) -> None:
        self.shard = shard
        self.left = [i for i in shard.notes.indices.tolist() if i not in taken]

    def draw(self, writer: ShardWriter, is_full: Callable[[], bool]) -> None:
        """Add rows to a writer until it is full."""
        left = set(self.left)
        for index, row in iter_rows(self.shard):
            if is_full():
                break
            if index in left:
                left.discard(index)
                writer.add(row)
        self.left = [index for index in self.left if index in left]

    @property
    def bytes_left(self) -> int:
        """What the rows that are left take of the file, about."""
        return self.shard.size * len(self.left) // self.shard.notes.indices.size


@dataclass(frozen=True)
class ClosedShard:
    """A shard that is full and has, or is about to get, its name in the cache."""

    file: Future[LocalShard]
    writer: ShardWriter | None = None

    @classmethod
    def of(cls, shard: LocalShard) -> ClosedShard:
        """Return a file that is complete as one of those that may not be."""
        file: Future[LocalShard] = Future()
        file.set_result(shard)
        return cls(file)

    def wait(self) -> LocalShard:
        """Return the complete file.

        Raises:
            OSError: it could not be written; half of it is removed.
        """
        try:
            return self.file.result()
        except OSError:
            if self.writer is not None:
                logger.warning("%d rows have to be extracted again", self.writer.rows)
                self.writer.discard()
            raise

    @property
    def size(self) -> int:
        """Bytes of the file, or of what is written of it."""
        return self.file.result().size if self.writer is None else self.writer.encoded_bytes


class StreamingHFUploader:
    """Collect rows into shards and deliver them, in the background, to a folder or a Hub dataset.

    Rows are done when a shard that the output lists holds them. Until then they are in the cache,
    except the rows of the shard under way, which `save_pending_locally` puts there.

    Args:
        output: Hub dataset `user/name`, or a folder (`is_local_output`).
        schema: of the shards, settings in its metadata (`explore_logits.shard_schema`).
        settings: what identifies the job; resuming with others is refused.
        chat_template: stored beside the shards.
        upload_every: rows per shard, unless `upload_size_mb` (encoded bytes / 10^6) is given.
        at_once: how many of the workers run at the same time; by default all.
        stopping: asked while waiting for room; once true, waiting ends and shards stay cached.
        late: asked when an upload has failed; once true, it is not tried again in this run.
        endpoint, token: of the Hub; by default those of the environment and of `hf auth login`.

    Raises:
        ConfigError: the output holds shards and neither `resume` nor `force_restart` is given, or
            the settings differ, or a live process uses the same cache.
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
        upload_every: int = 500,
        upload_size_mb: float | None = None,
        private: bool = False,
        resume: bool = False,
        force_restart: bool = False,
        rank: int = 0,
        world_size: int = 1,
        at_once: int | None = None,
        stopping: Callable[[], bool] = lambda: False,
        late: Callable[[], bool] = lambda: False,
        endpoint: str | None = None,
        token: str | None = None,
    ) -> None:
        self._destination = open_destination(
            output, private=private, endpoint=endpoint, token=token
        )
        self._schema = schema
        self._settings = dict(settings)
        self._nucleus_cap = int(settings.get("top_p_max", 255))
        self._chat_template = chat_template
        self._upload_every = upload_every
        self._limit_bytes = None if upload_size_mb is None else upload_size_mb * 1e6
        self._rank, self._world_size = rank, world_size
        self._stopping = stopping
        at_once = min(at_once or world_size, world_size)
        self._max_waiting = MAX_WAITING_SHARDS * at_once  # workers share the pace
        self._pending: list[PendingRows] = []  # fill up the next shards
        self._closed: deque[ClosedShard] = deque()  # in the cache, not flushed
        self._waiting: deque[ClosedShard] = deque()  # handed to the upload thread, not delivered
        self._lock = threading.Lock()  # of _waiting, which both threads change
        self._backups: list[LocalShard] = []
        self._removals: set[str] = set()  # shards of a discarded job, gone with the first commit
        self._discarded: dict[str, ListedFile] = {}  # what a discarded job has left, of peers too
        self._refused = False  # an upload, and so would be every other
        self._in_doubt = True  # the output may differ from what we know
        self._side: dict[str, bytes] = {}  # what the output's small files hold
        self._stop = threading.Event()
        self._end_of_tries = PolledStop(lambda: self._stop.is_set() or late())
        self._hurry = threading.Event()
        self._pace = CommitPace(workers=at_once, rank=rank % at_once)
        self._slowest_upload_s = 0.0
        self._uploads: list[Future[None]] = []
        with contextlib.ExitStack() as undo:
            key = cache_key(output, rank=rank, world_size=world_size, endpoint=endpoint)
            self._cache = ShardCache(cache_dir, key)
            undo.callback(self._cache.close)
            stop = PolledStop(stopping)
            retry(self._destination.open, stop=stop)
            self._state = read_output(self._destination, keep_ids=world_size > 1, stop=stop)
            self._begin(resume=resume, force_restart=force_restart)
            undo.pop_all()
        self._writer = self._open_writer()
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="upload")

    # -- start

    def _begin(self, *, resume: bool, force_restart: bool) -> None:
        """Decide what of the earlier runs counts."""
        if force_restart:
            self._cache.discard()
            self._removals = {name for name in self._state.shards() if self._may_remove(name)}
            self._discarded = dict(self._state.files)
            self._state = OutputState(self._state.files)
        held = [name for name in self._state.records if not self._is_of_peer(name)]
        shards, pending = self._cache.shards(), self._cache.pending()
        left = [*shards, *pending]
        if not (resume or force_restart) and (held or left):
            there = [f"already holds {count_of(held, 'shard')}"] if held else []
            if left:
                there.append(f"has {count_of(left, 'file')} not delivered in {self._cache.folder}")
            raise ConfigError(
                f"{self._destination.name} {' and '.join(there)}: continue with --resume, or start "
                "over with --force-restart"
            )
        self._compare_settings([*self._state.settings, *(shard.notes.settings for shard in left)])
        self._next_number = self._find_next_number(shards)
        self._taken = set(self._state.done)  # ids that need no row any more
        self._kept = pending + self._adopt_shards(shards)  # files of pending rows
        self._remove_delivered()
        self._unloaded: list[PendingRows] = []
        for shard in self._kept:
            self._unloaded.append(PendingRows(shard, self._taken))
            self._taken.update(self._unloaded[-1].left)

    def _may_remove(self, name: str) -> bool:
        """Tell whether starting over is this worker's to remove a shard."""
        return self._is_own(name) or (self._rank == 0 and not self._is_of_peer(name))

    def _is_of_peer(self, name: str) -> bool:
        """Tell whether another worker of this job gives such names."""
        match = SHARD_NAME.fullmatch(name)
        rank = int(match["rank"]) if match and match["rank"] else self._rank
        return rank != self._rank and rank < self._world_size

    def _is_own(self, name: str) -> bool:
        """Tell whether only this worker gives such names."""
        match = SHARD_NAME.fullmatch(name)
        return match is not None and plain_name(name) == self._shard_name(int(match["number"]))

    def _shard_name(self, number: int) -> str:
        return shard_name(number, rank=self._rank, world_size=self._world_size)

    def _find_next_number(self, cached: list[LocalShard]) -> int:
        """Return the part number after those of the output and of the cache."""
        names = [*self._state.records, *(shard.name for shard in cached)]
        own = [SHARD_NAME.fullmatch(name) for name in names if self._is_own(name)]
        return max((int(match["number"]) for match in own if match), default=-1) + 1

    def _compare_settings(self, found: Iterable[Mapping[str, Any]]) -> None:
        """Refuse shards of another job.

        Raises:
            ConfigError: the settings differ; lists them.
        """
        for settings in found:
            changes = list_setting_changes(settings, self._settings) if settings else []
            if changes:
                raise ConfigError(
                    f"{self._destination.name} was begun with other settings: "
                    f"{'; '.join(changes)}. Use the same ones, another --output, or "
                    "--force-restart to discard it"
                )

    def _adopt_shards(self, shards: list[LocalShard]) -> list[LocalShard]:
        """Deliver shards of the cache, or forget them if listed; return what only holds rows."""
        listed = {plain_name(path) for path in self._state.shards()}
        pending = []
        for shard in shards:
            indices = shard.notes.indices.tolist()
            if self._state.done.issuperset(indices):
                shard.path.unlink()
            elif self._taken.isdisjoint(indices) and shard.name not in listed:
                self._closed.append(ClosedShard.of(shard))
                self._taken.update(indices)
            else:
                pending.append(self._cache.make_pending(shard))
        return pending

    def create_output(self) -> None:
        """Create the Hub repository where it does not exist; without it the first upload does.

        Raises:
            HubError: the Hub refused or was out of reach.
        """
        retry(self._destination.create, stop=PolledStop(self._stopping))

    # -- rows in

    def get_resume_info(self) -> ResumeInfo:
        """Return which conversations need no extraction, and where numbering goes on."""
        return ResumeInfo(
            np.asarray(sorted(self._state.done), np.int64),
            np.asarray(sorted(self._taken - self._state.done), np.int64),
            self._next_number,
            len(self._state.records),
        )

    def load_pending_into_buffer(self) -> int:
        """Take the rows that earlier runs left in the cache into the next shards; return how many.

        Their files stay until a listed shard holds the rows.
        """
        self._pending += [rows for rows in self._unloaded if rows.left]
        self._unloaded = []
        loaded = sum(len(rows.left) for rows in self._pending)
        while self._is_full(self._pending):
            self._close_shard()
        return loaded

    def add_sample(self, rows: pa.Table | pa.RecordBatch) -> None:
        """Add rows of the schema, with or without the float64 columns `_mass` and `_actual`.

        A row whose id is done, pending or added already is ignored. A shard that gets full is
        closed in the cache; `flush` hands it to the upload.

        Raises:
            HubError: an upload was refused, or the disk is full.
        """
        self._raise_failure()
        table = pa.Table.from_batches([rows]) if isinstance(rows, pa.RecordBatch) else rows
        measured = measure_table(table, nucleus_cap=self._nucleus_cap)
        for place, index in enumerate(measured.indices):
            if index in self._taken:
                continue
            self._taken.add(index)
            with self._writing():
                self._writer.add_row(measured, place)
                full = self._is_full(self._pending)
            if full:
                self._close_shard()

    def _is_full(self, pending: list[PendingRows]) -> bool:
        """Tell whether the shard under way is full with some pending rows."""
        if self._limit_bytes is None:
            return self._fill(pending) >= 1
        return self._writer.reaches(self._limit_bytes - sum(rows.bytes_left for rows in pending))

    def _fill(self, pending: list[PendingRows]) -> float:
        """Return about how full the shard under way is with some pending rows."""
        if self._limit_bytes is None:
            rows = self._writer.rows + sum(len(rows.left) for rows in pending)
            return rows / self._upload_every
        size = self._writer.encoded_bytes + sum(rows.bytes_left for rows in pending)
        return size / self._limit_bytes

    def buffer_fill(self) -> float:
        """Return how full the shard under way is, 0..1."""
        return min(1.0, self._fill(self._pending))

    def _open_writer(self) -> ShardWriter:
        name = f"under-way-{self._next_number:05d}"
        return ShardWriter(
            self._cache.folder, self._schema, nucleus_cap=self._nucleus_cap, name=name
        )

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Drop the shard under way when its file cannot be written: half of it serves nobody."""
        try:
            with storage_errors(str(self._cache.folder)):
                yield
        except HubError:
            logger.warning("%d rows have to be extracted again", self._writer.rows)
            self._writer.discard()
            self._writer = self._open_writer()
            raise

    def _close_shard(self) -> None:
        """Let the shard under way, filled up with pending rows, be closed beside what goes on."""
        with self._lock:
            files = [shard.file for shard in (*self._waiting, *self._closed)]
        wait([file for file in files if not file.done()][: 1 - CLOSING_AT_ONCE])
        with self._writing():
            for rows in self._pending:
                rows.draw(self._writer, lambda: self._is_full([]))
            self._pending = [rows for rows in self._pending if rows.left]
            if not self._writer.rows:
                return
            path = self._cache.shard_path(self._shard_name(self._next_number))
            self._closed.append(ClosedShard(self._writer.finish(path), self._writer))
        self._next_number += 1
        self._writer = self._open_writer()

    def save_pending_locally(self) -> int:
        """Keep the rows of the shard under way in the cache; return how many.

        Raises:
            HubError: the disk is full; the rows are extracted again by the next run.
        """
        rows = self._writer.rows
        if rows:
            with self._writing():
                self._writer.close(self._cache.next_pending_path())
            self._writer = self._open_writer()
        return rows

    # -- shards out

    def should_flush(self) -> bool:
        """Tell whether a shard is full and waits for `flush`."""
        return bool(self._closed)

    def is_uploading(self) -> bool:
        """Tell whether an upload is under way."""
        return any(not upload.done() for upload in self._uploads)

    def expected_upload_s(self) -> float:
        """Return the seconds that a final flush may take now, by its bytes and earlier uploads."""
        if not self._destination.detects_changes:
            return self._slowest_upload_s
        with self._lock:
            waiting = [*self._waiting, *self._closed]
        size = sum(shard.size for shard in waiting) + self._writer.encoded_bytes
        by_earlier_s = self._slowest_upload_s * (len(waiting) + 1)
        return max(by_earlier_s, 2.0 + size / UPLOAD_BYTES_PER_S)

    def flush(self, final: bool = False) -> None:
        """Hand full shards to the upload, waiting while too many wait there already.

        With `final`, also close the shard under way, wait until everything is delivered, and try
        once more what failed before. Returns early once `stopping` says so.

        Raises:
            HubError: an upload was refused.
        """
        self._raise_failure()
        while final and (self._writer.rows or self._pending):
            self._close_shard()
        while self._closed:
            if not self._wait_until(lambda: len(self._waiting) < self._max_waiting):
                return
            self._submit([self._closed.popleft()])
        if final:
            self._finish()

    def _finish(self) -> None:
        """Wait for every upload, then try backups again, then what no shard carried."""
        self._hurry.set()
        if not self._wait_until(lambda: not self.is_uploading()):
            return
        backups, self._backups = self._backups, []
        self._submit([ClosedShard.of(shard) for shard in backups], final=True)
        self._wait_until(lambda: not self.is_uploading())

    def _wait_until(self, condition: Callable[[], bool]) -> bool:
        """Wait for a condition that uploads bring about; False when told to stop before."""
        while not condition():
            if self._stopping():
                return False
            wait([upload for upload in self._uploads if not upload.done()], timeout=0.2)
            self._raise_failure()
        self._raise_failure()
        return True

    def _raise_failure(self) -> None:
        """Raise what an upload raised."""
        finished = [upload for upload in self._uploads if upload.done()]
        self._uploads = [upload for upload in self._uploads if not upload.done()]
        for upload in finished:
            upload.result()

    def _submit(self, shards: list[ClosedShard], *, final: bool = False) -> None:
        with self._lock:
            self._waiting.extend(shards)
        self._uploads.append(self._executor.submit(self._deliver, final=final))

    def _deliver(self, *, final: bool) -> None:
        """Deliver what waits, in one commit; runs in the upload thread."""
        if self._refused or not (self._waiting or final):
            return  # nothing gets through, or all went with an earlier one
        if self._destination.detects_changes:
            self._hurry.wait(self._pace.take())
        with self._lock:
            waiting = list(self._waiting)
        shards: list[LocalShard] = []
        started_s = time.monotonic()
        try:
            with storage_errors(str(self._cache.folder)):
                shards += [shard.wait() for shard in waiting]
            retry(
                lambda: self._commit(shards, final=final),
                stop=self._end_of_tries,
                further_tries=min(self._world_size - 1, 20),  # they get into each other's way
            )
        except OutOfReachError as error:
            if self._stop.is_set():
                return
            kept = f"kept {len(shards)} shards in {self._cache.folder}" if shards else "no update"
            logger.warning("%s: %s", kept, error)
            with storage_errors(str(self._cache.folder)):
                self._backups += [self._cache.make_backup(shard) for shard in shards]
        except LogitsError:
            self._refused = True
            raise
        with self._lock:
            for _ in waiting:
                self._waiting.popleft()
        self._slowest_upload_s = max(self._slowest_upload_s, time.monotonic() - started_s)

    def _commit(self, shards: list[LocalShard], *, final: bool) -> None:
        """Make the output list some shards; every try looks at what the one before has left.

        Rows that another worker has delivered meanwhile are taken out of `shards` first. Nobody
        can add others before the commit: a folder has turns, and the Hub refuses a commit on
        another parent than the one looked at.
        """
        self._destination.create()
        with self._destination.turn():
            others_count = final and self._world_size > 1  # for the card
            if self._in_doubt or others_count or not self._destination.detects_changes:
                self._look_again(shards)
            if others_count:
                found = read_checkpoints(self._destination, self._state, stop=self._stop)
                self._state.records |= {name: record for name, (record, _) in found.items()}
            self._add(shards, final=final)

    def _add(self, shards: list[LocalShard], *, final: bool) -> None:
        """Commit what the output does not list yet of some shards, and the small files."""
        listed = {
            plain_name(path): path for path in self._state.shards() if path not in self._removals
        }
        shards[:] = self._without_done(shards, listed)
        landed = [shard for shard in self._backups if shard.name in listed]
        new = [shard for shard in shards if shard.name not in listed]
        kept = self._state.files.keys() - self._removals
        places = listed | choose_folders([shard.name for shard in new], kept)
        records = self._state.records | {
            places[shard.name]: make_record(shard, keep_ids=self._world_size > 1)
            for shard in (*shards, *landed)
        }
        side = {
            path: content
            for path, content in self._side_files(records, final=final).items()
            if self._side.get(path) != content
        }
        removals = self._removals & self._state.files.keys()
        if new or side or removals:
            self._in_doubt = True
            files = {places[shard.name]: shard.path for shard in new} | side
            self._destination.commit(describe_commit(new), files, removals)
        self._in_doubt = False
        self._side |= side
        self._state.records = records
        self._note_delivery([*shards, *landed], places)

    def _without_done(
        self, shards: list[LocalShard], listed: Mapping[str, str]
    ) -> list[LocalShard]:
        """Take the rows that shards of others hold out of the shards that are not listed."""
        left = []
        for shard in shards:
            done = self._state.done.intersection(shard.notes.indices.tolist())
            if done and shard.name not in listed:
                logger.warning(
                    "%d rows of %s were delivered by another worker", len(done), shard.name
                )
                with storage_errors(str(self._cache.folder)):
                    rest = drop_rows(shard, done, self._schema)
                left += [rest] if rest is not None else []
            else:
                left.append(shard)
        return left

    def _look_again(self, shards: list[LocalShard]) -> None:
        """List the output again: learn what others have added, and that nobody writes our parts."""
        self._state.files = files = self._destination.list_files()
        if gone := sorted(self._state.records.keys() - files.keys()):
            raise HubError(
                f"{gone[0]} ({len(gone)} in all) has gone from {self._destination.name}: put it "
                "back, or not, and continue with --resume, which extracts again what is missing"
            )
        self._side = {
            path: self._destination.read(path)
            for path in self._side_files(self._state.records, final=True)
            if path in files
        }
        ours = {shard.name: shard for shard in (*shards, *self._backups)}
        known = self._state.records.keys() | self._removals
        added = [name for name in self._state.shards() if name not in known]
        for name in filter(self._is_own, added):
            shard = ours.get(plain_name(name))
            if shard is None or not self._destination.holds(name, shard.path, shard.sha256):
                raise HubError(
                    f"{name} in {self._destination.name} was written by another run: two runs "
                    "write the same output; stop one, then continue with --resume"
                )
        self._learn([name for name in added if not self._is_own(name)])

    def _learn(self, names: list[str]) -> None:
        """Take note of the rows that others have delivered."""
        files, state = self._state.files, self._state
        names = [name for name in names if files[name] != self._discarded.get(name)]
        seen = len(state.settings)
        if names:
            keep_ids = self._world_size > 1
            learn_shards(self._destination, state, names, keep_ids=keep_ids, stop=self._stop)
            self._compare_settings(state.settings[seen:])

    def _side_files(self, records: Mapping[str, ShardRecord], *, final: bool) -> dict[str, bytes]:
        """Return the small files that go with a commit, the checkpoint last.

        Of several workers, each updates the card at its end only: every one sees the checkpoints of
        those before it, and the last one all.
        """
        own = {name: record for name, record in records.items() if self._is_own(name)}
        worker = f"-w{self._rank:02d}" if self._world_size > 1 else ""
        files = {
            CONFIG_FILE: encode_settings(self._settings),
            TEMPLATE_FILE: self._chat_template.encode(),
        }
        if final or self._world_size == 1 or "README.md" not in self._side:
            files["README.md"] = make_card(
                self._destination.name,
                self._settings,
                figures=sum((record.figures for record in records.values()), Figures()),
                shards=len(records),
                size_bytes=sum(record.bytes for record in records.values()),
                nested=any(path.count("/") > 1 for path in records),
                previous=self._side.get("README.md", b"").decode(errors="replace"),
            ).encode()
        return files | {f"checkpoint{worker}.json": encode_checkpoint(self._settings, own)}

    def _note_delivery(self, shards: list[LocalShard], places: Mapping[str, str]) -> None:
        """Forget the local copies of what the output lists now."""
        self._removals = set()
        for shard in shards:
            self._state.files[places[shard.name]] = ListedFile(shard.size, shard.sha256)
            self._state.done.update(shard.notes.indices.tolist())
            shard.path.unlink()
        delivered = {shard.name for shard in shards}
        self._backups = [shard for shard in self._backups if shard.name not in delivered]
        self._remove_delivered()

    def _remove_delivered(self) -> None:
        """Remove pending files whose rows are all in listed shards."""
        left = []
        for shard in self._kept:
            if self._state.done.issuperset(shard.notes.indices.tolist()):
                shard.path.unlink()
            else:
                left.append(shard)
        self._kept = left

    # -- end

    def summary(self) -> dict[str, Any]:
        """Return rows, tokens, shards, bytes of what the output lists, and files not delivered."""
        figures = self._state.figures()
        return {
            "rows": figures.rows,
            "tokens": figures.tokens,
            "shards": len(self._state.records),
            "bytes": sum(record.bytes for record in self._state.records.values()),
            "undelivered": [str(path) for path in self._cache.paths()],
        }

    def shutdown(self) -> None:
        """Stop after the request under way, keep the rows of the shard under way, free the cache.

        Nothing waits for retries. Failures are logged, so that the first one stays the one raised.
        """
        self._stop.set()
        self._hurry.set()
        self._executor.shutdown(wait=True, cancel_futures=True)
        unfinished = [shard.wait for shard in (*self._waiting, *self._closed)]
        for complete in (*unfinished, self.save_pending_locally):
            with log_failure(), storage_errors(str(self._cache.folder)):
                complete()
        if left := self._cache.paths():
            logger.warning("%s kept in %s for --resume", count_of(left, "file"), self._cache.folder)
        self._cache.close()


@contextmanager
def log_failure() -> Iterator[None]:
    """Log a HubError where another one may be on its way."""
    try:
        yield
    except HubError as error:
        logger.warning("%s", error)


def encode_settings(settings: Mapping[str, Any]) -> bytes:
    """Return extraction_config.json."""
    return json.dumps(dict(settings), indent=1, sort_keys=True).encode() + b"\n"


def describe_commit(shards: list[LocalShard]) -> str:
    """Return the message of a commit."""
    if not shards:
        return "Update checkpoint and card"
    rows = sum(shard.notes.figures.rows for shard in shards)
    return f"Add {', '.join(shard.name for shard in shards)} ({rows} rows)"


def count_of(things: Collection[Any], word: str) -> str:
    """Return "1 shard" or "2 shards"."""
    return f"{len(things):,} {word}{'' if len(things) == 1 else 's'}"


def make_record(shard: LocalShard, *, keep_ids: bool = False) -> ShardRecord:
    """Return what checkpoint.json says about a shard."""
    notes = shard.notes
    ids = encode_ids(notes.indices) if keep_ids else None
    return ShardRecord(shard.size, shard.sha256, notes.footer_bytes, notes.figures, ids)


# --------------------------------------------------------------------------------------------------
# 9 Stop
# --------------------------------------------------------------------------------------------------


HANG_UP: signal.Signals | None = getattr(signal, "SIGHUP", None)  # None on Windows


class GracefulInterrupt:
    """Within the context, a first SIGINT or SIGTERM asks to stop and a second leaves at once.

    SIGHUP, of a terminal that is gone, asks to stop too, where `nohup` does not have it ignored; it
    often comes twice. Leaving at once is safe: every file is complete or has a temporary name.
    Outside the main thread, where Python allows no signal handlers, nothing is installed.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self._previous: dict[int, Any] = {}

    @property
    def stopping(self) -> bool:
        """Whether a signal has come."""
        return self.signal is not None

    @property
    def exit_code(self) -> int:
        """128 + the signal: 130 Ctrl-C, 143 SIGTERM, 129 SIGHUP; 0 when none has come."""
        return 0 if self.signal is None else 128 + self.signal

    def __enter__(self) -> GracefulInterrupt:
        if threading.current_thread() is threading.main_thread():
            numbers = [signal.SIGINT, signal.SIGTERM]
            if HANG_UP is not None and signal.getsignal(HANG_UP) != signal.SIG_IGN:
                numbers.append(HANG_UP)
            for number in numbers:
                self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}

    def _receive(self, number: int, _: object) -> None:
        if self.signal is not None and number != HANG_UP:
            os._exit(128 + number)
        if self.signal is not None:
            return
        self.signal = number
        with contextlib.suppress(OSError):  # the same Ctrl-C may have ended a `tee`
            os.write(2, b"\nstopping after this batch; once more to leave at once\n")


def process_age_s() -> float:
    """Return the seconds since this process started, 0.0 where the system does not tell."""
    try:
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        uptime_s = float(Path("/proc/uptime").read_text().split()[0])
    except (OSError, ValueError, IndexError):
        return 0.0
    return max(0.0, uptime_s - ticks / os.sysconf("SC_CLK_TCK"))


class TimedShutdown:
    """Tell when to stop so that the work ends within a number of minutes.

    Time is kept for the step between two calls of `due` (the longest so far) and for the final
    upload.

    Args:
        minutes: the limit; None: never due.
        elapsed_s: time already spent, such as `process_age_s()`.
        upload_s: asked for the seconds that delivering what waits would take now.
    """

    def __init__(
        self,
        minutes: float | None,
        *,
        elapsed_s: float = 0.0,
        upload_s: Callable[[], float] = lambda: 0.0,
    ) -> None:
        self._limit_s = math.inf if minutes is None else minutes * 60
        self._started_s = time.monotonic() - elapsed_s
        self._upload_s = upload_s
        self._longest_step_s = 0.0
        self._last_call_s: float | None = None

    def left_s(self) -> float:
        """Return the seconds until the limit, negative beyond it, infinite without one."""
        return self._limit_s - (time.monotonic() - self._started_s)

    def due(self) -> bool:
        """Tell whether one more step could end too late; call it once a step."""
        now_s = time.monotonic()
        if self._last_call_s is not None:
            self._longest_step_s = max(self._longest_step_s, now_s - self._last_call_s)
        self._last_call_s = now_s
        return self.left_s() <= self._longest_step_s + self._upload_s()

    def begin_step(self) -> None:
        """Count the step from now: what came before, such as loading a model, is done once."""
        self._last_call_s = time.monotonic()


# --------------------------------------------------------------------------------------------------
# 10 Run
# --------------------------------------------------------------------------------------------------

EXIT_BAD_INPUT, EXIT_UNDELIVERED, EXIT_RUNTIME = 2, 4, 75
HOPELESS_ROWS = 3  # first conversations that may be NaN, each by itself, before the run gives up


@dataclass(frozen=True)
class Job:
    """What a run works on: everything that is known before the teacher's weights are loaded."""

    config: ExtractionConfig
    source: Any
    encoder: RowEncoder
    vocab_size: int
    settings: dict[str, Any]
    schema: pa.Schema


def open_job(config: ExtractionConfig, *, stop: Stop | None = None) -> Job:
    """Open tokenizer, template and source, and refuse what cannot work before it costs time."""
    recorded = find_recorded_settings(config, stop=stop)
    config, dataset_revision = pin_revisions(config, recorded)
    resolve_device(config.device)
    model_config = load_model_config(config)
    source_model, revision = tokenizer_source(config)
    tokenizer = load_tokenizer(
        source_model, revision=revision, trust_remote_code=config.trust_remote_code
    )
    template = load_chat_template(config.chat_template, tokenizer)
    source = open_source(
        config.dataset,
        subset=config.subset,
        split=config.split,
        streaming=config.streaming,
        revision=dataset_revision,
    )
    columns = resolve_columns(
        source_columns(source),
        messages_col=config.messages_col,
        user_col=config.user_col,
        assistant_col=config.assistant_col,
        system_col=config.system_col,
        index_col=config.index_col,
    )
    encoder = RowEncoder(
        tokenizer,
        template,
        columns,
        config.include_think,
        config.include_end,
        config.max_seq_len or max_positions(model_config),
        choose_date(config, template, recorded),
    )
    vocab_size = check_vocabulary(config, tokenizer)
    settings = describe_settings(config, encoder, model_config, vocab_size)
    settings["dataset_revision"] = dataset_revision or source_revision(config.dataset)
    schema = shard_schema(store_tokens=config.store_tokens, settings=settings)
    return Job(config, source, encoder, vocab_size, settings, schema)


def find_recorded_settings(config: ExtractionConfig, *, stop: Stop | None = None) -> dict[str, Any]:
    """Return the settings that a job was begun with: of its output, else of its cache, else {}."""
    several = (config.world_size or 1) > 1  # where one worker may have begun before another
    if config.plan or not (config.resume or (several and not config.force_restart)):
        return {}
    recorded = read_recorded_settings(config.output, stop=stop)
    return recorded or read_cached_settings(config)


def choose_date(config: ExtractionConfig, template: str, recorded: Mapping[str, Any]) -> str | None:
    """Return the date that a template is told which asks for the time: that of the job's start.

    A job starts when its lengths are measured, where that is done before.
    """
    if not prints_time(template):
        return None
    if recorded:
        return recorded.get("template_date")
    lengths = read_lengths_settings(config.tokenized_dataset) if config.tokenized_dataset else {}
    return lengths.get("template_date") or date_of_today()


def pin_revisions(
    config: ExtractionConfig, recorded: Mapping[str, Any]
) -> tuple[ExtractionConfig, str | None]:
    """Hold a run to one commit of model and source, a resumed one to those that it began with.

    Returns:
        The configuration with the model's commit as its revision, and the commit of the source;
        for local files, and where nobody knows it, what was asked for and None.
    """
    revision, dataset_revision = config.revision, None
    if revision is None and recorded.get("model") == config.model:
        revision = recorded.get("model_revision")
    revision = find_commit(config.model, revision, kind="model") or revision
    if not Path(config.dataset).expanduser().exists():
        if recorded.get("dataset") == config.dataset:
            dataset_revision = recorded.get("dataset_revision")
        dataset_revision = find_commit(config.dataset, dataset_revision, kind="dataset")
    return replace(config, revision=revision), dataset_revision


def find_commit(repo: str, revision: str | None, *, kind: str) -> str | None:
    """Return the commit that a revision of a Hub repository is: from the Hub, else its cache.

    Models do not tell which commit they were loaded from in every version of transformers.
    """
    if is_commit(revision):
        return revision
    if repo.startswith((".", "/", "~")) or Path(repo).exists():
        return None
    from huggingface_hub import HfApi, try_to_load_from_cache

    with contextlib.suppress(HubError, PassingError, ValueError), hub_errors(repo):
        return HfApi().repo_info(repo, repo_type=kind, revision=revision, timeout=30).sha
    with contextlib.suppress(ValueError):
        cached = try_to_load_from_cache(repo, "config.json", revision=revision, repo_type=kind)
        return Path(cached).parent.name if isinstance(cached, str) else None
    return None


def check_vocabulary(config: ExtractionConfig, tokenizer: Any) -> int:
    """Return V, the ids that a row may hold; rows of the head beyond it never enter.

    They end with the tokenizer's highest id, or before where the format does: a row with such an
    id is skipped as `id_too_large`.
    """
    vocab_size = min(max(tokenizer.get_vocab().values()), MAX_TOKEN_ID) + 1
    check_candidates(vocab_size, top_p_max=config.top_p_max, sampled_n=config.sampled_n)
    return vocab_size


def describe_settings(
    config: ExtractionConfig, encoder: RowEncoder, model_config: Any, vocab_size: int
) -> dict[str, Any]:
    """Return what a shard says of itself: JSON values, the same on every machine but `versions`."""
    kept = "top_p top_p_max sampled_n seed logit_bits store_tokens max_seq_len"
    return {
        "format_version": FORMAT_VERSION,
        **conversation_settings(config, encoder.columns, encoder.chat_template),
        "template_date": encoder.date,
        **{name: getattr(config, name) for name in kept.split()},
        "dtype": resolve_dtype(config, model_config),
        "vocab_size": vocab_size,
        "versions": {
            name: importlib.metadata.version(name)
            for name in ("torch", "transformers", "datasets", "pyarrow")
        },
    }


def run_extraction(config: ExtractionConfig) -> dict[str, Any]:
    """Extract everything that is asked for and not stored yet.

    Returns:
        The summary that `main` prints: what the output holds, what this run did, and `exit_code`.

    Raises:
        LogitsError: bad options, input, teacher or output; nothing is half-written.
    """
    if config.executor is not None:
        return run_tasks(config)
    if not config.tensor_parallel:
        return run_alone(config)
    join_group(config)
    summary = run_alone(config)
    leave_group()
    return summary


def run_alone(config: ExtractionConfig) -> dict[str, Any]:
    """Run the job as the only process that reads and writes."""
    with GracefulInterrupt() as interrupt:
        try:
            return run_until(config, interrupt)
        except OutOfReachError as error:  # a signal ends the waiting for the Hub
            if not interrupt.stopping:
                raise
            return {**error.stored, "output": config.output, "exit_code": interrupt.exit_code}


def run_until(config: ExtractionConfig, interrupt: GracefulInterrupt) -> dict[str, Any]:
    """Extract until all is done, the time is over or a signal comes; return the summary."""
    started = time.monotonic()
    job = open_job(config, stop=PolledStop(lambda: interrupt.stopping))
    if config.verify_mask and not confirm_masks(job):
        raise ConfigError("stopped at --verify-mask: nothing was extracted")
    if config.plan:
        return plan_until(job, interrupt)
    if in_group() and torch.distributed.get_rank():  # the first process alone writes
        Extraction(job, RowKeeper(), lambda: False).extract()
        return {"exit_code": 0}
    deadline = TimedShutdown(
        config.max_runtime_minutes,
        elapsed_s=process_age_s(),
        upload_s=lambda: uploader.expected_upload_s(),
    )
    uploader = open_uploader(
        job, stopping=lambda: interrupt.stopping, late=lambda: deadline.left_s() <= 0
    )
    with end_of_upload(uploader):
        uploader.load_pending_into_buffer()
        run = Extraction(
            job,
            uploader,
            lambda: interrupt.stopping or deadline.due(),
            begin_step=deadline.begin_step,
        )
        complete = run.extract()
        if complete or not interrupt.stopping:
            uploader.flush(final=True)
        else:
            uploader.save_pending_locally()
    stored = uploader.summary()
    code = exit_code(stored, complete, interrupt.signal)
    return run.summary(stored, code, time.monotonic() - started)


@contextmanager
def end_of_upload(uploader: StreamingHFUploader) -> Iterator[None]:
    """Shut the uploader down at the end; a refusal takes along what is stored nevertheless."""
    try:
        try:
            yield
        finally:
            uploader.shutdown()
    except HubError as error:
        error.stored = uploader.summary()
        raise


def open_uploader(
    job: Job, *, stopping: Callable[[], bool], late: Callable[[], bool]
) -> StreamingHFUploader:
    """Open the output; one that holds other settings, or anything without --resume, is refused."""
    config = job.config
    return StreamingHFUploader(
        config.output,
        schema=job.schema,
        settings=job.settings,
        chat_template=job.encoder.chat_template,
        cache_dir=config.cache_dir,
        upload_every=config.upload_every,
        upload_size_mb=config.upload_size_mb,
        private=config.private,
        resume=config.resume,
        force_restart=config.force_restart,
        rank=config.rank or 0,
        world_size=config.world_size or 1,
        at_once=config.workers,
        stopping=stopping,
        late=late,
    )


def exit_code(stored: Mapping[str, Any], complete: bool, stop_signal: int | None) -> int:
    """Return how the process ends, once everything that could be done is done."""
    if stop_signal is not None and not (complete and not stored["undelivered"]):
        return 128 + stop_signal
    if stored["undelivered"]:
        return EXIT_UNDELIVERED
    return 0 if complete else EXIT_RUNTIME


def confirm_masks(job: Job, *, rows: int = 3) -> bool:
    """Show the first conversations with the extracted tokens marked; on a terminal, ask."""
    for encoded in itertools.islice(encode_usable(job), rows):
        preview = format_mask_preview(
            encoded,
            job.encoder.tokenizer,
            color=sys.stderr.isatty() and "NO_COLOR" not in os.environ,
        )
        sys.stderr.write(preview + "\n\n")
    if not (sys.stdin is not None and sys.stdin.isatty() and sys.stderr.isatty()):
        return True
    sys.stderr.write("extract these tokens? [Y/n] ")
    sys.stderr.flush()
    return sys.stdin.readline().lower() in ("\n", "y\n", "yes\n")  # the end of input is no answer


def encode_usable(job: Job) -> Iterator[EncodedConversation]:
    """Yield the first conversations of the source, passing over those that cannot be used."""
    for number, row in enumerate(job.source):
        try:
            yield job.encoder.align(row)
        except ConversationError as error:
            logger.warning("row %d cannot be used: %s", number, error)


class Extraction:
    """One pass of the teacher over the rows that are not stored yet."""

    def __init__(
        self,
        job: Job,
        uploader: StreamingHFUploader | RowKeeper,
        should_stop: Callable[[], bool],
        *,
        begin_step: Callable[[], None] = lambda: None,
    ) -> None:
        self.job = job
        self.uploader = uploader
        self.should_stop = should_stop
        self.begin_step = begin_step
        resumed = uploader.get_resume_info()
        self.done = np.union1d(resumed.done, resumed.pending)
        if in_group():
            told = [self.done]
            torch.distributed.broadcast_object_list(told, device=torch.device("cpu"))
            self.done = told[0]
        self.skipped: dict[int, str] = {}
        self.suspects: list[EncodedRow] = []
        self.rows = self.tokens = self.unusable = 0
        self.largest = 0  # padded tokens that a batch may have once one did not fit; 0: no limit
        self.found_tokens: int | None = None  # by the probe: padded tokens of a batch
        self.teacher: Teacher | None = None
        self.bar: tqdm[Any] | None = None

    def extract(self) -> bool:
        """Run to the end or until told to stop; True when no row is left."""
        pack = functools.partial(fetch_and_pack, schema=self.job.schema)
        post = AsyncPostProcessor(pack, self.deliver)
        try:
            with log_beside_bar():
                complete = self.extract_windows(post)
                post.flush()
        finally:
            post.shutdown()
            if self.bar is not None:
                self.bar.close()
        alone = self.job.config.world_size in (None, 1)  # one worker of many may have no row
        if complete and alone and not (self.rows or self.done.size):
            raise DataError(f"nothing to extract: {explain_skips(self.skipped)}")
        return complete

    def extract_windows(self, post: AsyncPostProcessor) -> bool:
        """Run the job window by window; False when told to stop before its end."""
        job = self.job
        windows = prepare_windows(job.config, job.source, job.encoder, should_stop=self.should_stop)
        try:
            for prepared in windows:
                self.skip(prepared.skipped)
                if not self.extract_window(prepared, post):
                    return False
        except StopRequested:
            return False
        return True

    def extract_window(self, prepared: PreparedDataset, post: AsyncPostProcessor) -> bool:
        """Run what is left of a prepared dataset; False when told to stop before its end."""
        if agree(self.should_stop()):
            return False
        for batch in self.remaining_batches(prepared):
            if agree(self.should_stop()):
                return False
            self.submit(batch, post)
            self.retry_alone(post)
        post.flush()
        self.retry_alone(post)
        return True

    def submit(self, batch: Batch, post: AsyncPostProcessor) -> None:
        """Run a batch and hand what comes of it to the thread that packs."""
        for part, result in self.process(batch):
            post.submit(part, result)

    def retry_alone(self, post: AsyncPostProcessor) -> None:
        """Run suspects one by one, so that only the conversation that is at fault is left out."""
        while self.suspects:
            self.submit(Batch([self.suspects.pop()]), post)

    def remaining_batches(self, prepared: PreparedDataset) -> Iterator[Batch]:
        """Yield the batches that hold a row still to do; loads the teacher when one does."""
        done = np.isin(prepared.indices, self.done)
        if done.all():
            return
        if self.teacher is None:
            self.uploader.create_output()  # not before the conversations are known to be usable
            self.teacher = load_teacher(self.job.config, vocab_size=self.job.vocab_size)
            self.begin_step()
        sampler = self.plan_batches(prepared, done)
        if self.bar is None:
            self.bar = open_bar(
                self.job.config.limit if self.job.config.streaming else int((~done).sum())
            )
        yield from load_batches(ConversationDataset(prepared, self.job.encoder), sampler)

    def plan_batches(
        self, prepared: PreparedDataset, done: npt.NDArray[np.bool_]
    ) -> TokenBudgetBatchSampler:
        """Form the batches; where nothing limits them, CUDA's memory is tried out once a run."""
        assert self.teacher is not None
        config, device = self.job.config, self.teacher.device
        limited = config.max_batch_tokens or config.max_batch_size or config.batch_thresholds
        if device.type == "cuda" and not in_group() and not limited and self.found_tokens is None:
            self.found_tokens = find_batch_tokens(
                self.run_with_headroom,
                length=int(prepared.lengths.max()),
                vocab_size=self.teacher.vocab_size,
                start=DEFAULT_BATCH_TOKENS["cuda"],
            )
            logger.info("batches of up to %d tokens fit %s", self.found_tokens, device)
        return make_sampler(
            config, prepared, device_type=device.type, done=done, found_tokens=self.found_tokens
        )

    def run_with_headroom(self, batch: Batch) -> None:
        """Run a batch to its end with memory to spare, and give back what the device keeps."""
        assert self.teacher is not None
        torch.cuda.empty_cache()
        spare = torch.empty(PROBE_HEADROOM_BYTES, dtype=torch.uint8, device=self.teacher.device)
        self.forward(batch).to_host()
        del spare

    def process(self, batch: Batch) -> Iterator[tuple[Batch, GPUBatchResult]]:
        """Run a batch through the teacher, in halves where the device cannot hold it whole."""
        self.skip(batch.skipped)
        if not batch.rows:
            return
        size = len(batch.rows) * max(row.input_ids.size for row in batch.rows)
        if not 0 < self.largest < size or len(batch.rows) == 1:
            with contextlib.suppress(torch.OutOfMemoryError):
                result = self.forward(batch)
                yield batch, result
                return
            self.largest = self.halve(batch, size)  # here, as the exception holds the tensors
        for half in batch.halves():
            yield from self.process(replace(half, skipped=[]))

    def forward(self, batch: Batch) -> GPUBatchResult:
        """Run one batch: the teacher's logits at the wanted positions, reduced on its device."""
        config = self.job.config
        return gpu_process_batch(
            self.teacher,
            batch,
            top_p=config.top_p,
            top_p_max=config.top_p_max,
            sampled_n=config.sampled_n,
            seed=config.seed,
            logit_bits=config.logit_bits,
            reference=config.reference_extraction,
        )

    def halve(self, batch: Batch, size: int) -> int:
        """Free what failed to fit and return the size that batches are held to from now on."""
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
        return size // 2

    def deliver(self, packed: PackedBatch) -> None:
        """Hand finished rows to the uploader, and shards to the output when they are full."""
        self.sort_out(packed)
        table = packed.table
        done = is_among(self.done, table["index"].to_numpy())
        if done.any():
            table = table.filter(pa.array(~done))
        if table.num_rows:
            self.uploader.add_sample(table)
        self.rows += table.num_rows
        self.tokens += int(np.sum(table["num_tokens"].to_numpy()))
        if self.uploader.should_flush():
            self.uploader.flush()
        self.show(table.num_rows)

    def sort_out(self, packed: PackedBatch) -> None:
        """Skip conversations without usable logits, or keep them to be tried alone."""
        if packed.shared:
            self.suspects += packed.unusable
            return
        self.skip(
            SkippedRow(row.index, "unusable_logits", "NaN, infinite or too few finite logits")
            for row in packed.unusable
        )
        self.unusable += len(packed.unusable)
        if self.unusable >= HOPELESS_ROWS and not (self.rows or self.done.size):
            raise TeacherError(
                f"the first {self.unusable} conversations gave no usable logits (NaN or infinite): "
                "try --dtype float32 or --attn eager"
            )

    def skip(self, rows: Iterable[SkippedRow]) -> None:
        """Count rows that give nothing, each once, and name them in the log."""
        for row in rows:
            if row.index not in self.skipped:
                self.skipped[row.index] = row.reason
                logger.warning("skipped conversation %d: %s %s", row.index, row.reason, row.detail)

    def show(self, rows: int) -> None:
        """Advance the bar: rows, tokens/s, buffer fill, an arrow while an upload is under way."""
        if self.bar is None:
            return
        self.bar.update(rows)
        seconds = max(1e-9, float(self.bar.format_dict["elapsed"]))
        arrow = " ⬆" if self.uploader.is_uploading() else ""
        self.bar.set_postfix_str(
            f"{self.tokens / seconds:,.0f} tokens/s, buffer "
            f"{self.uploader.buffer_fill():.0%}{arrow}",
            refresh=False,
        )

    def summary(self, stored: Mapping[str, Any], code: int, seconds: float) -> dict[str, Any]:
        """Return the figures of the run and of the output, as JSON values."""
        return {
            **stored,
            "new_rows": self.rows,
            "new_tokens": self.tokens,
            "skipped": dict(Counter(self.skipped.values())),
            "seconds": round(seconds, 3),
            "tokens_per_second": round(self.tokens / max(seconds, 1e-9), 1),
            "output": self.job.config.output,
            "exit_code": code,
        }


def open_bar(total: int | None) -> tqdm[Any]:
    """Show the progress bar on stderr; into a file it is written seldom."""
    terminal = sys.stderr.isatty()
    sized = not terminal or os.get_terminal_size(sys.stderr.fileno()).columns > 0
    return tqdm(
        total=total,
        unit="row",
        file=sys.stderr,
        mininterval=0.2 if terminal else 10,
        dynamic_ncols=sized,
        ncols=None if sized else 80,  # some terminals of containers say 0, and tqdm nothing then
        nrows=None if sized else 24,
    )


def fetch_and_pack(batch: Batch, result: GPUBatchResult, *, schema: pa.Schema) -> PackedBatch:
    """Bring a result to the host in one transfer and pack it; runs beside the next forward."""
    return cpu_postprocess_batch(result.to_host(), batch, schema=schema)


def is_among(known: npt.NDArray[np.int64], ids: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
    """Tell which ids are among known ones, which ascend; takes no longer where these are many."""
    if not known.size:
        return np.zeros(ids.size, bool)
    places = np.minimum(np.searchsorted(known, ids), known.size - 1)
    return np.asarray(known[places] == ids)


SKIP_REMEDIES = {
    "too_long": "raise --max-seq-len",
    "refused_by_template": "give another --chat-template",
    "no_tokens": "give another --chat-template",
}


def explain_skips(skipped: Mapping[int, str]) -> str:
    """Say how many conversations were skipped for which reason, and what helps most of them."""
    counts = Counter(skipped.values())
    if not counts:
        return "no conversation was selected"
    remedy = SKIP_REMEDIES.get(
        counts.most_common(1)[0][0], "check --messages-col, or --user-col and --assistant-col"
    )
    reasons = ", ".join(f"{n} {reason}" for reason, n in sorted(counts.items()))
    return f"skipped {reasons}; {remedy}"


# Tasks --------------------------------------------------------------------------------------------

NO_OTHER_JOB = {  # options that change how tasks run, not what they store
    "batch_thresholds",
    "cache_dir",
    "cpus_per_task",
    "device",
    "executor",
    "executor_logs",
    "gpus_per_task",
    "max_batch_size",
    "max_batch_tokens",
    "max_runtime_minutes",
    "mem_per_cpu_gb",
    "private",
    "resume",
    "slurm_options",
    "slurm_partition",
    "slurm_setup",
    "slurm_time",
    "workers",
}


class TaskError(LogitsError):
    """A task has not stored all of its part; met in its log. The next start runs it again."""


class ExtractTask:
    """One task of a datatrove pipeline: a worker's part of the job."""

    name = "extract logits"

    def __init__(self, options: dict[str, Any]) -> None:
        self.options = options
        self.folder = os.getcwd()
        self.submitter = os.getpid()

    def __call__(self, data: Any, rank: int, world_size: int) -> None:
        """Extract and store the part of one rank.

        Raises:
            LogitsError: not all of it is stored; the task counts as failed.
        """
        alone = os.environ.get("DATATROVE_EXECUTOR") == "LOCAL"
        if os.path.isdir(self.folder):
            os.chdir(self.folder)
        if alone:
            share_machine(self.options["workers"] or world_size)
        config = ExtractionConfig(**self.options, rank=rank, world_size=world_size, resume=True)
        with log_to_datatrove():
            summary = run_extraction(config)
        code = summary["exit_code"]
        if alone and code == 128 + signal.SIGTERM and os.getpid() != self.submitter:
            os._exit(code)  # the pool that sent it waits for the process to end
        if code:
            raise TaskError(
                f"task {rank} stored {summary['new_rows']} rows and ended with exit code {code}: "
                "start the same command again"
            )


def share_machine(workers: int) -> None:
    """Give this process of a pool a GPU and CPUs of its own, where there are enough."""
    from multiprocess import current_process

    number = (current_process()._identity or (1,))[-1]
    os.environ["LOCAL_RANK"] = str(number)
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // workers))


@contextmanager
def log_to_datatrove() -> Iterator[None]:
    """Write what is logged into the log of the task."""
    from datatrove.utils.logging import logger as task_log

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            task_log.log(record.levelname, "{}", hide_tokens(record.getMessage()))

    handler = Handler(logging.INFO)
    level, propagate = logger.level, logger.propagate
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    logger.propagate = False  # that log goes to the terminal, too
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        logger.propagate = propagate


def run_tasks(config: ExtractionConfig) -> dict[str, Any]:
    """Let datatrove run the tasks that are not done; on Slurm, submit them.

    Returns:
        The summary that `main` prints: what the output holds, and how many tasks are left.

    Raises:
        ConfigError: datatrove or the engine is missing, or the output holds another job.
    """
    try:
        import datatrove.executor  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            f"--executor needs datatrove ({error}): pip install 'logit-extraction[scale]'"
        ) from error
    job = open_job(replace(config, device="auto"))
    destination = open_destination(config.output, private=config.private)
    retry(destination.open)
    retry(destination.create)
    folder = task_folder(config)
    shards = OutputState(retry(destination.list_files)).shards()
    if shards and not config.resume and not folder.is_dir():
        raise ConfigError(
            f"{config.output} already holds {count_of(shards, 'shard')}: continue with --resume, "
            "or give another --output"
        )
    executor = make_executor(config, folder, job.config.revision, skip_completed=bool(shards))
    left = executor.get_incomplete_ranks()
    logger.info("%d of %d tasks to run, their logs are in %s", len(left), config.tasks, folder)
    with engine(config) if left else contextlib.nullcontext():
        try:
            executor.run()
        except LogitsError as error:
            logger.error("%s", error)
    submitted = len(left) if config.executor == "slurm" else 0
    left = executor.get_incomplete_ranks(skip_completed=True)
    stored = read_output(destination)
    return {
        "rows": stored.figures().rows,
        "tokens": stored.figures().tokens,
        "shards": len(stored.records),
        "bytes": sum(record.bytes for record in stored.records.values()),
        "tasks": config.tasks,
        "tasks_left": len(left),
        "tasks_submitted": submitted,
        "logs": str(folder),
        "output": config.output,
        "exit_code": EXIT_RUNTIME if left and not submitted else 0,
    }


def task_folder(config: ExtractionConfig) -> Path:
    """Return where the logs and the marks of done tasks of this very job are."""
    options = {
        entry.name: getattr(config, entry.name)
        for entry in fields(config)
        if entry.name not in NO_OTHER_JOB and getattr(config, entry.name) != entry.default
    }
    text = json.dumps(options, sort_keys=True)
    digest = hashlib.sha256(text.encode()).hexdigest()[:8]
    place = Path(config.executor_logs or Path(config.cache_dir) / "tasks").expanduser().absolute()
    return place / f"{cache_key(config.output)}-{digest}"


def make_executor(
    config: ExtractionConfig, folder: Path, revision: str | None, *, skip_completed: bool
) -> Any:
    """Return datatrove's executor of the job; classes it pickles come from the module by name."""
    from datatrove.executor import (
        LocalPipelineExecutor,
        RayPipelineExecutor,
        SlurmPipelineExecutor,
    )

    from extract_logits import ExtractTask  # not __main__'s, which no other process has

    own = {"executor", "tasks", "resume", "rank", "world_size"}
    options = {name: value for name, value in asdict(config).items() if name not in own}
    common = {
        "pipeline": [ExtractTask({**options, "revision": revision})],
        "tasks": config.tasks,
        "workers": config.workers or -1,
        "logging_dir": str(folder),
        "skip_completed": skip_completed,
    }
    if config.executor == "local":
        return LocalPipelineExecutor(**common)
    common |= {
        "cpus_per_task": config.cpus_per_task,
        "mem_per_cpu_gb": config.mem_per_cpu_gb,
        "gpus_per_task": 1 if config.gpus_per_task is None else config.gpus_per_task,
    }
    if config.executor == "ray":
        return RayPipelineExecutor(**common)
    return SlurmPipelineExecutor(
        **common,
        time=config.slurm_time,
        partition=config.slurm_partition,
        job_name="extract-logits",
        qos=None,
        env_command=config.slurm_setup or describe_environment(),
        sbatch_args={"signal": "USR1@90", **(config.slurm_options or {})},
    )


def describe_environment() -> str:
    """Return the shell command, one line, that gives a task this Python and these scripts."""
    here = Path(__file__).resolve().parent
    return (
        f"export PATH={shlex.quote(str(Path(sys.executable).parent))}:$PATH "
        f"PYTHONPATH={shlex.quote(str(here))}:$PYTHONPATH"
    )


@contextmanager
def engine(config: ExtractionConfig) -> Iterator[None]:
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
            f"--executor ray needs Ray ({error}): pip install 'logit-extraction[scale]'"
        ) from error
    path = os.pathsep.join([str(Path(__file__).resolve().parent), os.environ.get("PYTHONPATH", "")])
    environment = {"env_vars": {"PYTHONPATH": path}}
    try:
        ray.init(address="auto", runtime_env=environment)
    except ConnectionError:
        ray.init(runtime_env=environment, include_dashboard=False)
    try:
        check_cluster(config, ray.cluster_resources())
        yield
    finally:
        ray.shutdown()


def check_cluster(config: ExtractionConfig, there: Mapping[str, float]) -> None:
    """Refuse tasks for which a Ray cluster would wait for ever."""
    wanted = {
        "CPU": config.cpus_per_task,
        "GPU": 1 if config.gpus_per_task is None else config.gpus_per_task,
        "memory": config.cpus_per_task * config.mem_per_cpu_gb * 2**30,
    }
    for name, amount in wanted.items():
        if there.get(name, 0) < amount:
            raise ConfigError(
                f"a task wants {amount:,} {name}, the whole Ray cluster has "
                f"{there.get(name, 0):,.0f}: see --gpus-per-task, --cpus-per-task, --mem-per-cpu-gb"
            )


# Plan ---------------------------------------------------------------------------------------------

PLAN_ROWS = 1000  # conversations measured where no lengths are given
PROBE_BATCHES = 8
PROBE_S = 120.0  # no further batch is begun after that


class RowKeeper:
    """Keeps rows in memory in place of an uploader; nothing is ever stored."""

    def __init__(self) -> None:
        self.tables: list[pa.Table] = []

    def create_output(self) -> None:
        """Nothing is written."""

    def get_resume_info(self) -> ResumeInfo:
        """Tell that there is no row yet."""
        none = np.zeros(0, np.int64)
        return ResumeInfo(none, none, next_part=0, shards=0)

    def add_sample(self, rows: pa.Table) -> None:
        """Keep rows."""
        self.tables.append(rows)

    def should_flush(self) -> bool:
        """Never: there is no shard."""
        return False

    def flush(self, final: bool = False) -> None:
        """Do nothing: there is no shard."""

    def is_uploading(self) -> bool:
        """Never: there is no upload."""
        return False

    def buffer_fill(self) -> float:
        """Return 0: there is no shard to fill."""
        return 0.0


@dataclass(frozen=True)
class Sample:
    """Conversations that stand for a whole job."""

    rows: PreparedDataset
    selected: int  # conversations of the job, usable or not
    share: float  # of them in `rows` or skipped beside it; 1 when every length is known


@dataclass(frozen=True)
class Probe:
    """What the teacher took for some batches, and what came of them."""

    batches: int
    rows: int
    tokens: int  # of the whole conversations, those that turned out not to be usable too
    stored_tokens: int
    s: float
    s_per_token: float  # of all batches, each as fast as the probed one nearest in length
    token_bytes: float  # of a shard, per stored token
    shard_bytes: float  # of a shard, before its first token


def plan_until(job: Job, interrupt: GracefulInterrupt) -> dict[str, Any]:
    """Plan the job, or return with the signal's exit code when told to stop."""
    try:
        with log_beside_bar():
            plan = plan_extraction(job, should_stop=lambda: interrupt.stopping)
    except StopRequested:
        return {"output": job.config.output, "exit_code": interrupt.exit_code}
    return {**plan, "exit_code": 0}


def plan_extraction(job: Job, *, should_stop: Callable[[], bool] = lambda: False) -> dict[str, Any]:
    """Estimate what a run would read, store and take, from lengths and a probe of the teacher.

    Nothing is written, neither to the output nor to the cache. What an output holds already is
    not subtracted. With several workers the figures are those of the whole job.

    Returns:
        `rows`, `tokens` of whole conversations, `stored_tokens` of which distributions are kept,
        `bytes` on disk, `shards`, `commits` at most, `hours` of all workers at the probe's rate or
        the given one, `share`, what one worker does of it, `limits` of the Hub that are met, and
        what they were found from.

    Raises:
        DataError: nothing to extract.
        StopRequested: `should_stop` said so.
    """
    workers = job.config.world_size or 1
    job = replace(job, config=replace(job.config, rank=None, world_size=None))
    sample = sample_job(job, should_stop)
    if not sample.rows.indices.size:
        skipped = {row.index: row.reason for row in sample.rows.skipped}
        raise DataError(f"nothing to extract: {explain_skips(skipped)}")
    probe = probe_teacher(job, sample.rows, should_stop)
    plan = describe_plan(job, sample, probe)
    plan |= describe_shares(job.config, plan, workers)
    return {**plan, "output": job.config.output}


def describe_plan(job: Job, sample: Sample, probe: Probe) -> dict[str, Any]:
    """Return the figures of a whole job from those of a sample and a probe."""
    rows = round(sample.rows.indices.size / sample.share)
    tokens = round(int(sample.rows.lengths.sum()) / sample.share)
    if sample.rows.num_tokens is None:
        stored_tokens = round(tokens * probe.stored_tokens / probe.tokens)
    else:
        stored_tokens = round(int(sample.rows.num_tokens.sum()) / sample.share)
    rate = job.config.plan_rate or stored_tokens / (tokens * probe.s_per_token)
    if job.config.plan_tokens is not None:
        times = job.config.plan_tokens / stored_tokens
        rows, tokens, stored_tokens = (round(times * n) for n in (rows, tokens, stored_tokens))
    data_bytes = probe.token_bytes * stored_tokens
    shards = count_shards(job.config, rows, data_bytes)
    skipped = Counter(row.reason for row in sample.rows.skipped)
    return {
        "plan": True,
        "rows": rows,
        "tokens": tokens,
        "stored_tokens": stored_tokens,
        "bytes": round(data_bytes + shards * probe.shard_bytes),
        "shards": shards,
        "commits": shards + 1,
        "hours": round(stored_tokens / rate / 3600, 4),
        "stored_tokens_per_second": round(rate, 1),
        "bytes_per_stored_token": round(probe.token_bytes, 1),
        "assumed": describe_assumptions(job.config),
        "skipped": {reason: round(n / sample.share) for reason, n in sorted(skipped.items())},
        "measured_rows": round(sample.selected * sample.share),
        "selected_rows": sample.selected,
        "probe": {name: getattr(probe, name) for name in ("batches", "rows", "stored_tokens", "s")},
    }


def describe_assumptions(config: ExtractionConfig) -> str:
    """Say which figures of a plan were given, not measured."""
    given = ["--plan-tokens"] if config.plan_tokens is not None else []
    given += ["--plan-rate"] if config.plan_rate is not None else []
    return f", and {' and '.join(given)}, which nobody has measured" if given else ""


FILES_PER_REPOSITORY = 100_000  # what the Hub recommends at most
REPOSITORY_COMMITS = 5_000  # beyond, a repository of the Hub gets slow


def describe_shares(
    config: ExtractionConfig, plan: Mapping[str, Any], workers: int
) -> dict[str, Any]:
    """Return what one of several workers does of a plan, its cost, and the limits that it meets."""
    hours = plan["hours"] / workers
    share: dict[str, Any] = {
        name: math.ceil(plan[name] / workers)
        for name in ("rows", "stored_tokens", "bytes", "shards")
    }
    found: dict[str, Any] = {
        "workers": workers,
        "commits": plan["shards"] + workers,
        "share": {**share, "hours": round(hours, 4)},
        "limits": [],
    }
    if config.plan_price is not None:
        found["cost"] = round(plan["hours"] * config.plan_price, 2)
    if plan["rows"] > INDEX_LIMIT:
        found["limits"].append(
            f"{plan['rows']:,} rows, where ids end at {INDEX_LIMIT:,}: divide the dataset over "
            f"{-(-plan['rows'] // INDEX_LIMIT)} outputs"
        )
    if not is_local_output(config.output):
        commits, limits = describe_limits(plan, workers=workers, hours=hours)
        found |= {"commits": commits, "limits": [*found["limits"], *limits]}
    return found


def describe_limits(
    plan: Mapping[str, Any], *, workers: int, hours: float
) -> tuple[int, list[str]]:
    """Return the commits that deliver a plan to the Hub at most, and what of its limits is met."""
    paced = CommitPace(workers=workers).per_hour * hours
    commits = math.ceil(min(plan["shards"], COMMIT_BURST + paced)) + workers
    shards, size_mb = plan["shards"], plan["bytes"] / 1e6
    limits = []
    if shards > FILES_PER_REPOSITORY - 100:
        repositories = -(-shards // (FILES_PER_REPOSITORY - 100))
        limits.append(
            f"{shards:,} shards, where a repository should hold {FILES_PER_REPOSITORY:,} files: "
            f"give --upload-size-mb {math.ceil(size_mb / FILES_PER_REPOSITORY * 1.1):,}, or divide "
            f"the dataset over {repositories} outputs (--start-offset and --limit)"
        )
    elif shards > SHARDS_PER_FOLDER:
        folders = -(-shards // SHARDS_PER_FOLDER)
        limits.append(f"{shards:,} shards go into {folders} folders below data/, by themselves")
    if commits > REPOSITORY_COMMITS:
        limits.append(
            f"{commits:,} commits, where a repository gets slow beyond {REPOSITORY_COMMITS:,}: "
            "larger shards, or several outputs"
        )
    if shards / commits > MAX_WAITING_SHARDS:
        limits.append(
            f"{shards / commits:,.0f} shards a commit, as the Hub takes no more commits an hour; "
            f"beyond {MAX_WAITING_SHARDS * workers:,} that wait, a worker stops for them: give "
            "--upload-size-mb"
        )
    if workers > MOST_RESERVED:
        limits.append(
            f"the last commits of {workers:,} workers alone take "
            f"{workers / COMMITS_PER_HOUR:,.1f} hours: use fewer workers an output"
        )
    return commits, limits


def count_shards(config: ExtractionConfig, rows: int, data_bytes: float) -> int:
    """Return how many shards the rows fill, the last one partly."""
    if config.upload_size_mb is None:
        return -(-rows // config.upload_every)
    return max(1, math.ceil(data_bytes / (config.upload_size_mb * 1e6)))


def sample_job(job: Job, should_stop: Callable[[], bool]) -> Sample:
    """Return the job's conversations with their lengths: all where lengths are given, else some.

    A sample depends on the rows' ids only. A stream is read once, to count its rows.
    """
    config, encoder = job.config, job.encoder
    if config.streaming:
        return sample_stream(job, should_stop)
    rows = select_dataset(config, job.source, encoder)
    selected = rows.indices.size
    if config.tokenized_dataset is None and config.length_col is None and selected > PLAN_ROWS:
        order = np.argsort(mix_hash(rows.indices, seed=1), kind="stable")
        rows = rows.take(np.sort(order[:PLAN_ROWS]))
    share = rows.indices.size / max(1, selected)
    dataset = ConversationDataset(rows, encoder)
    return Sample(add_lengths(config, dataset, should_stop), selected, share)


def sample_stream(job: Job, should_stop: Callable[[], bool]) -> Sample:
    """Read a stream once and encode a sample of its rows."""
    logger.info("reading the stream once to count its conversations")
    kept: list[tuple[int, int, Mapping[str, Any]]] = []  # a heap, the largest hash on top
    selected = 0
    for index, row in stream_share(job.config, job.source, job.encoder, should_stop):
        selected += 1
        entry = (-int(mix_hash(np.asarray([index]), seed=1)[0]), index, row)
        (heapq.heappush if selected <= PLAN_ROWS else heapq.heappushpop)(kept, entry)
    chosen = [(index, row) for _, index, row in kept]
    encoded = run_ahead(
        functools.partial(encode_rows, job.encoder),
        chunk_rows(chosen, MEASURE_ROWS),
        processes=worker_processes(len(chosen)),
        should_stop=should_stop,
    )
    window = keep_window(list(itertools.chain.from_iterable(encoded)))
    return Sample(window, selected, len(chosen) / max(1, selected))


def probe_teacher(job: Job, rows: PreparedDataset, should_stop: Callable[[], bool]) -> Probe:
    """Run a few batches of all lengths the way a run does, and time them."""
    keeper = RowKeeper()
    run = Extraction(job, keeper, should_stop)
    run.teacher = load_teacher(job.config, vocab_size=job.vocab_size)
    sampler = run.plan_batches(rows, np.zeros(rows.indices.size, bool))
    weights = np.asarray([rows.lengths[batch].sum() for batch in sampler.batches])
    middles = (np.cumsum(weights) - weights / 2) / weights.sum()  # (batches,) share before each
    picks = spread_picks(middles)
    sampler.batches = [sampler.batches[at] for at in (0, *picks)]
    batches = load_batches(ConversationDataset(rows, job.encoder), sampler)
    seconds = time_batches(run, keeper, batches)
    if not keeper.tables:
        raise TeacherError(
            f"{job.config.model}: the probe gave no usable logits (NaN or infinite): "
            "try --dtype float32 or --attn eager"
        )
    table = pa.concat_tables(keeper.tables)
    picks = picks[: seconds.size]
    tokens = weights[picks]
    nearest = nearest_pick(middles, picks)
    token_bytes, shard_bytes = measure_shard(job, table)
    return Probe(
        seconds.size,
        table.num_rows,
        int(tokens.sum()),
        int(np.sum(table["num_tokens"].to_numpy())),
        round(float(seconds.sum()), 3),
        float(np.sum(weights * (seconds / tokens)[nearest]) / weights.sum()),
        token_bytes,
        shard_bytes,
    )


def time_batches(
    run: Extraction, keeper: RowKeeper, batches: Iterable[Batch]
) -> npt.NDArray[np.float64]:
    """Return the seconds of batches, until the time of a probe is up.

    The first one, which should be the longest, is not counted: it shows whether the device holds
    it, and what is done once is done then.
    """
    seconds = []
    started = time.monotonic()
    for number, batch in enumerate(batches):
        if run.should_stop():
            raise StopRequested
        spent = time_batch(run, batch)
        if number == 0:
            keeper.tables.clear()
            continue
        seconds.append(spent)
        if time.monotonic() - started > PROBE_S:
            break
    return np.asarray(seconds)


def spread_picks(middles: npt.NDArray[np.float64]) -> list[int]:
    """Choose batches that stand for equal shares of the tokens, far from each other first."""
    order = [4, 1, 6, 2, 0, 5, 3, 7]  # the first few are spread, too, when time runs out
    shares = (np.asarray(order) + 0.5) / PROBE_BATCHES
    nearest = np.abs(middles[:, None] - shares).argmin(axis=0)
    return list(dict.fromkeys(nearest.tolist()))


def nearest_pick(middles: npt.NDArray[np.float64], picks: list[int]) -> npt.NDArray[np.int64]:
    """Return for every batch which of the picked ones is nearest in length."""
    return np.abs(middles[:, None] - middles[picks]).argmin(axis=1)


def time_batch(run: Extraction, batch: Batch) -> float:
    """Run a batch to its packed rows; return the seconds it took."""
    post = AsyncPostProcessor(functools.partial(fetch_and_pack, schema=run.job.schema), run.deliver)
    started = time.monotonic()
    try:
        run.submit(batch, post)
        post.flush()
        run.retry_alone(post)
        post.flush()
    finally:
        post.shutdown()
    return time.monotonic() - started


def measure_shard(job: Job, table: pa.Table) -> tuple[float, float]:
    """Encode rows as a shard; return the bytes per stored token, and those before the first."""
    sizes = []
    for rows in (table.num_rows, 1):
        with tempfile.TemporaryDirectory() as folder:
            writer = ShardWriter(Path(folder), job.schema, nucleus_cap=job.config.top_p_max)
            for at in range(rows):
                writer.add(table.slice(at, 1))
            sizes.append(writer.close(Path(folder) / "shard.parquet").size)
    tokens = table["num_tokens"].to_numpy()
    if table.num_rows == 1:
        return sizes[0] / int(tokens[0]), 0.0
    token_bytes = (sizes[0] - sizes[1]) / int(tokens[1:].sum())
    return token_bytes, max(0.0, sizes[1] - token_bytes * int(tokens[0]))


def format_plan(plan: Mapping[str, Any]) -> str:
    """Lay out a plan as a table for people."""
    share, workers = plan["share"], plan["workers"]
    lines = {
        "rows": f"{plan['rows']:,}",
        "tokens": f"{plan['tokens']:,}",
        "stored tokens": f"{plan['stored_tokens']:,}",
        "bytes on disk": f"{plan['bytes']:,} ({plan['bytes_per_stored_token']} a stored token)",
        "shards": f"{plan['shards']:,}",
        "commits": f"at most {plan['commits']:,}",
        "hours": format_hours(plan["hours"]),
        "stored tokens/s": f"{plan['stored_tokens_per_second']:,} of one worker",
        "skipped": ", ".join(f"{n:,} {reason}" for reason, n in plan["skipped"].items()) or "none",
        "found from": (
            f"the lengths of {plan['measured_rows']:,} of {plan['selected_rows']:,} conversations, "
            f"{plan['probe']['batches']} batches of the teacher{plan['assumed']}"
        ),
    }
    if workers > 1:
        lines[f"each of {workers:,}"] = (
            f"{share['rows']:,} rows, {share['stored_tokens']:,} stored tokens, "
            f"{share['bytes']:,} bytes, {share['shards']:,} shards, {format_hours(share['hours'])}"
            " hours"
        )
    if "cost" in plan:
        lines["cost"] = f"{plan['cost']:,.2f}, of the hours alone"
    table = [f"{name:>16}  {value}" for name, value in lines.items()]
    return "\n".join([*table, *(f"{'limit':>16}  {text}" for text in plan["limits"])])


def format_hours(hours: float) -> str:
    """Return hours, short ones in seconds too."""
    return f"{hours:,.2f}" if hours >= 0.1 else f"{hours:.4f} ({hours * 3600:.0f} s)"


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
    groups: dict[str, Any] = {}
    hints = get_type_hints(ExtractionConfig)
    for entry in fields(ExtractionConfig):
        name = entry.metadata["group"]
        if name not in groups:
            groups[name] = parser.add_argument_group(name)
        flag = "--" + entry.name.replace("_", "-")
        if hints[entry.name] is bool:
            groups[name].add_argument(flag, action="store_true", help=entry.metadata["help"])
        else:
            groups[name].add_argument(flag, **argument_of(entry, hints[entry.name]))
    return parser


def argument_of(entry: Field[Any], hint: Any) -> dict[str, Any]:
    """Return the `add_argument` keywords of an option that takes a value."""
    kinds = [kind for kind in (get_args(hint) or (hint,)) if kind is not type(None)]
    parse = entry.metadata.get("parse")
    help_text, last_word = entry.metadata["help"], entry.name.rpartition("_")[2]
    required = entry.default is MISSING
    if not required and entry.default is not None:
        help_text += " (default: %(default)s)"
    return {
        "type": checked(parse) if parse else kinds[0],
        "choices": entry.metadata.get("choices"),
        "required": required,
        "default": None if required else entry.default,
        "metavar": {int: "N", float: "X"}.get(kinds[0], "JSON" if parse else last_word.upper()),
        "help": help_text,
    }


def checked(parse: Callable[[str], Any]) -> Callable[[str], Any]:
    """Wrap a parser of JSON options so that argparse shows what is wrong with the text."""

    def parse_or_refuse(text: str) -> Any:
        try:
            return parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"{text!r} is not usable: {error}") from error

    return parse_or_refuse


def parse_args(argv: Sequence[str] | None = None) -> ExtractionConfig:
    """Read the command line; `argv` None is the process's own.

    Raises:
        ConfigError: a value is out of range or options contradict each other.
        SystemExit: 2 for unknown options or text that is not a value, 0 after --help.
    """
    options = vars(build_parser().parse_args(argv))
    if options["rank"] is None and options["world_size"] is None:
        environment = dict(os.environ) if options["executor"] is None else {}
        if options["tensor_parallel"]:  # all processes of a torchrun are one worker
            environment.pop("RANK", None)
        options["rank"], options["world_size"] = launched_as(environment)
    return ExtractionConfig(**options)


LAUNCHERS = {  # variables of rank and number of workers
    "torchrun": ("RANK", "WORLD_SIZE"),
    "a Slurm array from 0": ("SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_COUNT"),
    "SkyPilot": ("SKYPILOT_NODE_RANK", "SKYPILOT_NUM_NODES"),
}


def launched_as(environment: Mapping[str, str]) -> tuple[int | None, int | None]:
    """Return rank and number of workers by the launcher's environment; None without a launcher.

    Raises:
        ConfigError: what a launcher has set is no such pair of numbers.
    """
    for launcher, names in LAUNCHERS.items():
        if not all(name in environment for name in names):
            continue
        rank, world_size = (environment[name] for name in names)
        if not (rank.isdigit() and world_size.isdigit() and int(rank) < int(world_size)):
            raise ConfigError(
                f"{names[0]}={rank} and {names[1]}={world_size}, set by {launcher}, are no worker "
                "and number of workers: give --rank and --world-size"
            )
        return int(rank), int(world_size)
    return None, None


TALKATIVE = {  # loggers of libraries, and what is worth a line of theirs
    "httpx": logging.WARNING,  # a line for every request
    "httpx2": logging.WARNING,
    "torchao": logging.ERROR,  # kernels for other devices that could not be loaded
    "torch.utils._pytree": logging.ERROR,  # what torchao does that torch will not like one day
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code.

    The last line on stdout is one JSON object, unless the input was refused (exit code 2).
    """
    outlive_readers("stdout", "stderr")
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S"
    )
    for name, level in TALKATIVE.items():
        logging.getLogger(name).setLevel(level)
    for handler in logging.getLogger().handlers:
        handler.addFilter(HideTokens())
    try:
        config = parse_args(argv)
        log_hub_once()
        summary = run_or_refuse(config)
    except LogitsError as error:
        sys.stderr.write(f"extract_logits.py: {hide_tokens(str(error))}\n")
        return EXIT_BAD_INPUT
    if summary.keys() == {"exit_code"}:
        return int(summary["exit_code"])  # a process that only follows another
    if "error" in summary:
        sys.stderr.write(f"extract_logits.py: {summary['error']}\n")
    if "plan" in summary:
        sys.stdout.write(format_plan(summary) + "\n")
    print(json.dumps(summary))  # noqa: T201
    return int(summary["exit_code"])


def run_or_refuse(config: ExtractionConfig) -> dict[str, Any]:
    """Run; where the Hub or the disk refuses, return a summary that holds the `error`."""
    try:
        return run_extraction(config)
    except HubError as error:
        return {
            **error.stored,
            "output": config.output,
            "error": hide_tokens(str(error)),
            "exit_code": EXIT_UNDELIVERED,
        }


if __name__ == "__main__":
    sys.exit(main())
