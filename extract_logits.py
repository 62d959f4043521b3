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
from collections.abc import Callable
from dataclasses import MISSING, dataclass, field
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


def ranged_int(low: int, high: int | None = None) -> Callable[[str], int]:
    """Return a parser of integers in low..high that names the range when it refuses."""

    def parse(text: str) -> int:
        value = int(text)
        if value < low or (high is not None and value > high):
            raise ValueError(f"must be {low}..{high}" if high is not None else f"at least {low}")
        return value

    parse.__name__ = f"integer {low}..{high}" if high is not None else f"integer of at least {low}"
    return parse


def positive_float(text: str) -> float:
    """Parse a finite number above zero."""
    value = float(text)
    if not 0 < value < float("inf"):
        raise ValueError("must be above 0")
    return value


def probability(text: str) -> float:
    """Parse a number in (0, 1]."""
    value = float(text)
    if not 0 < value <= 1:
        raise ValueError("must be above 0 and at most 1")
    return value


def json_limits(text: str) -> dict[str, int]:
    """Parse a JSON object of non-negative integers by group name, such as {"math": 20000}."""
    value = json.loads(text)
    if not isinstance(value, dict) or not all(
        isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in value.values()
    ):
        raise ValueError("must be a JSON object of non-negative integers")
    return dict(value)


def json_thresholds(text: str) -> dict[int, int]:
    """Parse {"length": conversations per batch}; JSON keys are strings, lengths are integers."""
    value = {int(length): n for length, n in json_limits(text).items()}
    if not value or any(n < 1 for n in value.values()) or any(length < 1 for length in value):
        raise ValueError("needs lengths and batch sizes of at least 1")
    return value


def option(
    default: Any, help_text: str, *, group: str, parse: Callable[[str], Any] | None = None,
    choices: tuple[str, ...] | None = None,
) -> Any:
    """Declare one option: the dataclass field is the only place that holds its default and help."""
    metadata = {"help": help_text, "group": group, "parse": parse, "choices": choices}
    if default is MISSING:
        return field(metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(kw_only=True)
class ExtractionConfig:
    """Every option of a run; field names are option names with underscores, "off" is None.

    Raises:
        ConfigError: a value is out of range or two options contradict each other.
    """

    model: str = option(MISSING, "teacher: Hub id or local folder", group="teacher")
    revision: str | None = option(None, "model revision: branch, tag or commit", group="teacher")
    trust_remote_code: bool = option(False, "run model code from the Hub", group="teacher")
    device: str = option("auto", "cuda, cuda:N, mps or cpu; auto: the best there is", group="teacher")
    dtype: str = option(
        "auto", "weights and forward; auto: the checkpoint's on a GPU, float32 on a CPU",
        group="teacher", choices=("auto", "float32", "bfloat16", "float16"),
    )
    attn: str = option("auto", "attention: auto, eager, sdpa, flash_attention_2, …", group="teacher")

    dataset: str = option(MISSING, "Hub id, or a local .jsonl, .json, .parquet, .csv file or folder", group="dataset")
    subset: str | None = option(None, "dataset configuration", group="dataset")
    split: str = option("train", "dataset split", group="dataset")
    streaming: bool = option(False, "never hold the whole source in memory", group="dataset")
    messages_col: str | None = option(None, "column of chat messages; found by itself when it has a usual name", group="dataset")
    user_col: str = option("question", "user column of single-turn data", group="dataset")
    assistant_col: str = option("answer", "assistant column of single-turn data", group="dataset")
    system_col: str | None = option(None, "system column of single-turn data", group="dataset")
    index_col: str | None = option(None, "column of unique integer ids (default: row number)", group="dataset")

    limit: int | None = option(None, "conversations of the whole job, over all resumed runs", group="selection", parse=ranged_int(1))
    start_offset: int = option(0, "skip this many source rows first", group="selection", parse=ranged_int(0))
    random_sample: bool = option(False, "choose --limit rows at random (by --seed) instead of the first", group="selection")
    subject_col: str | None = option(None, "column of group names for --sample-subject", group="selection")
    sample_subject: dict[str, int] | None = option(None, 'conversations per group, JSON: {"math": 20000, "*": 6000}; "" is the empty group', group="selection", parse=json_limits)
    full_dataset: bool = option(False, "take every row; refuses the options that select", group="selection")
    seed: int = option(42, "seed of selection and of the tail samples", group="selection", parse=ranged_int(0, 2**63 - 1))

    length_col: str | None = option(None, "column of the source that holds lengths in tokens", group="lengths")
    tokenized_dataset: str | None = option(None, "lengths made by compute_lengths.py: file, folder or Hub id; joined on index", group="lengths")
    max_seq_len: int | None = option(None, "skip longer conversations, in tokens (default: the model's maximum)", group="lengths", parse=ranged_int(2))

    chat_template: str | None = option(None, "Jinja file to use instead of the tokenizer's template", group="conversation")
    include_think: bool = option(False, "extract think tags that the template inserts, too", group="conversation")
    include_end: bool = option(False, "extract what the template appends after the end-of-turn token, too", group="conversation")
    verify_mask: bool = option(False, "show the first conversations with the extracted tokens marked; on a terminal, ask", group="conversation")

    top_p: float = option(0.98, "probability that the nucleus covers", group="extraction", parse=probability)
    top_p_max: int = option(100, "K: nucleus tokens kept at most", group="extraction", parse=ranged_int(1, 255))
    sampled_n: int = option(24, "M: tokens drawn from outside the nucleus", group="extraction", parse=ranged_int(0))
    logit_bits: int = option(16, "bits of resolution kept in a quantized logit", group="extraction", parse=ranged_int(4, 16))
    store_tokens: bool = option(False, "add the columns input_ids and token_positions", group="extraction")
    reference_extraction: bool = option(False, "extract with the plain implementation that reads as the definition", group="extraction")

    batch_thresholds: dict[int, int] | None = option(None, 'conversations per batch up to a length, JSON: {"512": 8, "1024": 4}', group="batches", parse=json_thresholds)
    max_batch_size: int | None = option(None, "conversations per batch at most", group="batches", parse=ranged_int(1))
    max_batch_tokens: int | None = option(None, "tokens per batch at most, padding counted", group="batches", parse=ranged_int(1))

    output: str = option(MISSING, "Hub dataset repo user/name, or a folder (starts with . / ~ or exists)", group="output")
    private: bool = option(False, "create the Hub repo private", group="output")
    upload_every: int = option(500, "conversations per shard", group="output", parse=ranged_int(1))
    upload_size_mb: float | None = option(None, "close a shard at this encoded size instead, in MB", group="output", parse=positive_float)
    cache_dir: str = option(".logit_extraction_cache", "local state: shards under way, pending rows", group="output")

    plan: bool = option(False, "probe some rows, print rows, tokens, bytes, shards, hours; write nothing", group="run")
    resume: bool = option(False, "continue; with nothing to continue, start", group="run")
    force_restart: bool = option(False, "discard recorded progress and start over", group="run")
    max_runtime_minutes: float | None = option(None, "stop in time, keep everything, exit 75", group="run", parse=positive_float)
    rank: int | None = option(None, "this worker's number (default: the launcher's environment, else 0)", group="run", parse=ranged_int(0))
    world_size: int | None = option(None, "number of workers (default: the launcher's environment, else 1)", group="run", parse=ranged_int(1))


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
