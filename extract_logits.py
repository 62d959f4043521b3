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
locally; 75 stopped by the runtime limit, resumable; 130/143 stopped by a signal, resumable.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from typing import Any

import numpy as np
import numpy.typing as npt

from explore_logits import LogitsError, pack_indices

__all__ = ["ConfigError", "ExtractionConfig", "pack_indices"]


class ConfigError(LogitsError):
    """An option is wrong or two do not go together; met before anything runs (exit 2)."""


class DataError(LogitsError):
    """The dataset cannot be read as conversations; met while it is prepared (exit 2)."""


class TeacherError(LogitsError):
    """The model cannot be loaded or its logits cannot be used (exit 2)."""


class HubError(LogitsError):
    """The Hub refused or was out of reach; what could not be delivered is kept locally (exit 4)."""


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
        None, "column of the source that holds lengths in tokens", group="lengths"
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
    resume: bool = option(False, "continue; with nothing to continue, start", group="run")
    force_restart: bool = option(False, "discard recorded progress and start over", group="run")
    max_runtime_minutes: float | None = option(
        None, "stop in time, keep everything, exit 75", group="run", above=0
    )
    rank: int | None = option(None, "this worker (default: the launcher's)", group="run", low=0)
    world_size: int | None = option(
        None, "number of workers (default: the launcher's)", group="run", low=1
    )

    def __post_init__(self) -> None:
        for entry in fields(self):
            check_option(entry.name, getattr(self, entry.name), entry.metadata)
        self._check_pairs()

    def _check_pairs(self) -> None:
        if self.resume and self.force_restart:
            raise ConfigError("--resume continues and --force-restart discards: give one of them")
        if (self.sample_subject is None) != (self.subject_col is None):
            raise ConfigError("--sample-subject and --subject-col need each other: give both")
        if self.length_col and self.tokenized_dataset:
            raise ConfigError("--length-col and --tokenized-dataset both give lengths: drop one")
        if (self.rank is None) != (self.world_size is None):
            raise ConfigError("--rank and --world-size need each other: give both")
        if self.rank is not None and self.world_size is not None and self.rank >= self.world_size:
            raise ConfigError(
                f"--rank {self.rank} is not below --world-size {self.world_size}: count from 0"
            )
        self._check_full_dataset()

    def _check_full_dataset(self) -> None:
        selecting = {
            "--limit": self.limit, "--sample-subject": self.sample_subject,
            "--start-offset": self.start_offset, "--random-sample": self.random_sample,
        }  # fmt: skip
        given = [flag for flag, value in selecting.items() if value]
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

# --------------------------------------------------------------------------------------------------
# 2 Prepare
# --------------------------------------------------------------------------------------------------

# --------------------------------------------------------------------------------------------------
# 3 Batches
# --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class EncodedRow:
    """One conversation as the teacher sees it."""

    index: int
    input_ids: npt.NDArray[np.int32]  # (S,)
    token_positions: npt.NDArray[np.int32]  # (N,) ascending, each >= 1: the tokens to predict


@dataclass(frozen=True)
class Batch:
    """The conversations that go through the teacher together; tokens in row order, flattened."""

    rows: list[EncodedRow]

    @property
    def num_tokens(self) -> int:
        """Extracted tokens N of the whole batch."""
        return sum(row.token_positions.size for row in self.rows)


# --------------------------------------------------------------------------------------------------
# 4 Teacher
# --------------------------------------------------------------------------------------------------

# --------------------------------------------------------------------------------------------------
# 5 Extraction
# --------------------------------------------------------------------------------------------------

# --------------------------------------------------------------------------------------------------
# 6 Pack
# --------------------------------------------------------------------------------------------------

# --------------------------------------------------------------------------------------------------
# 7 Shards
# --------------------------------------------------------------------------------------------------

# --------------------------------------------------------------------------------------------------
# 8 Hub
# --------------------------------------------------------------------------------------------------

# --------------------------------------------------------------------------------------------------
# 9 Stop
# --------------------------------------------------------------------------------------------------

# --------------------------------------------------------------------------------------------------
# 10 Run
# --------------------------------------------------------------------------------------------------

# --------------------------------------------------------------------------------------------------
# 11 CLI
# --------------------------------------------------------------------------------------------------
