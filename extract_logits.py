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
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from explore_logits import LogitsError, pack_indices

__all__ = [
    "ConfigError",
    "ExtractedTokens",
    "ExtractionConfig",
    "GPUBatchResult",
    "extract_tokens",
    "gpu_process_batch",
    "pack_indices",
    "quantize_rows",
]


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

# A token's random numbers are SplitMix64 of (seed, index, position, counter): the counter is the
# vocabulary id, so neither batch nor chunk nor worker can change them. int64 products wrap alike on
# every device. Source: Steele, Lea, Flood, "Fast splittable pseudorandom number generators", 2014.
SPLITMIX_STEP = 0x9E3779B97F4A7C15 - 2**64  # the constants as int64, which is what torch has
SPLITMIX_FACTORS = (0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64)

REFERENCE_ROWS = 8  # rows at a time of the plain implementation: 10 MB per float64 temporary
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


@dataclass(frozen=True)
class GPUBatchResult:
    """All that is kept of one batch, quantized; tensors on the device, or numpy after `to_host`."""

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
        """Return the same as numpy arrays, by one device-to-host transfer."""
        tensors = {f.name: getattr(self, f.name) for f in fields(self)}
        names = sorted(tensors, key=lambda name: -tensors[name].element_size())  # keeps alignment
        parts = [tensors[name].contiguous().view(torch.uint8).flatten() for name in names]
        buffer = torch.cat(parts).cpu().numpy()
        arrays, start = {}, 0
        for name, part in zip(names, parts, strict=True):
            raw = buffer[start : start + part.numel()]
            dtype = torch.empty(0, dtype=tensors[name].dtype).numpy().dtype
            arrays[name] = raw.view(dtype).reshape(tuple(tensors[name].shape))
            start += part.numel()
        return GPUBatchResult(**arrays)


Tokens = TypeVar("Tokens", ExtractedTokens, GPUBatchResult)


def gpu_process_batch(
    teacher: Any, batch: Batch, *, top_p: float, top_p_max: int, sampled_n: int, seed: int,
    logit_bits: int = 16, reference: bool = False,
) -> GPUBatchResult:
    """Run the teacher on a batch and keep nucleus, tail and log-sum-exp of every wanted position.

    The logits come and go in chunks of positions, so nothing grows with batch times vocabulary.
    """
    positions = [row.token_positions for row in batch.rows]
    index = np.repeat([row.index for row in batch.rows], [p.size for p in positions])
    position = np.concatenate(positions)
    actual = np.concatenate([row.input_ids[row.token_positions] for row in batch.rows])
    columns = torch.from_numpy(np.stack([index, position, actual]).astype(np.int64))
    parts, start = [], 0
    for logits in teacher.iter_logits([row.input_ids for row in batch.rows], positions):
        if start == 0:
            columns = columns.to(logits.device, non_blocking=True)
        chunk = columns[:, start : start + logits.shape[0]]
        tokens = extract_tokens(
            logits, chunk[0], chunk[1], top_p=top_p, top_p_max=top_p_max, sampled_n=sampled_n,
            seed=seed, reference=reference,
        )
        at_actual = logits.gather(1, chunk[2].unsqueeze(1)).squeeze(1).float()
        parts.append(quantize_tokens(tokens, at_actual, bits=logit_bits))
        start += logits.shape[0]
    return concatenate(parts)


def extract_tokens(
    logits: torch.Tensor, index: torch.Tensor, position: torch.Tensor, *, top_p: float,
    top_p_max: int, sampled_n: int, seed: int, reference: bool = False,
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
        reference: take the plain implementation.

    Raises:
        ConfigError: the vocabulary has fewer than M tokens outside a full nucleus.
    """
    check_candidates(logits.shape[1], top_p_max=top_p_max, sampled_n=sampled_n)
    states = row_states(index, position, seed=seed)
    return concatenate(
        [
            extract_by_definition(
                logits[rows], states[rows], top_p=top_p, top_p_max=top_p_max, sampled_n=sampled_n
            )
            for rows in row_slices(logits.shape[0], REFERENCE_ROWS)
        ]
    )


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
    in_nucleus = torch.arange(top_ids.shape[1], device=logits.device) < counts.unsqueeze(1)
    keys.scatter_(1, top_ids, keys.gather(1, top_ids).masked_fill_(in_nucleus, float("-inf")))
    drawn = keys.topk(sampled_n)
    return collect_tokens(
        logits, logsumexp, top_ids, counts, drawn.indices,
        complete=drawn.values.isfinite().all(-1), top_p_max=top_p_max,
    )


def collect_tokens(
    logits: torch.Tensor, logsumexp: torch.Tensor, top_ids: torch.Tensor, counts: torch.Tensor,
    sampled_ids: torch.Tensor, *, complete: torch.Tensor, top_p_max: int,
) -> ExtractedTokens:
    """Look up the logits of the chosen ids, and make rows that cannot be used harmless."""
    usable = logsumexp.isfinite() & complete
    missing = top_p_max - top_ids.shape[1]  # K may exceed the vocabulary
    top_ids = torch.nn.functional.pad(top_ids, (0, missing))
    return ExtractedTokens(
        logsumexp=logsumexp,
        top_ids=top_ids.int(),
        top_logits=finite(logits.gather(1, top_ids)),
        top_counts=counts.int(),
        sampled_ids=sampled_ids.int(),
        sampled_logits=finite(logits.gather(1, sampled_ids)),
        usable=usable,
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
    bits = values.float().add(0.0).view(torch.int32)  # + 0.0 makes -0.0 and 0.0 one value
    order = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # integers in the order of the floats
    last_first = torch.arange(columns - 1, -1, -1, device=values.device)
    keys = (order.long() << 31) | last_first
    best = keys.topk(min(k, columns)).values
    return (columns - 1) - (best & 0x7FFFFFFF)


def finite(values: torch.Tensor) -> torch.Tensor:
    """Return float32 values with 0 in place of NaN and infinities."""
    return values.float().nan_to_num(0.0, posinf=0.0, neginf=0.0)


def row_slices(rows: int, size: int) -> list[slice]:
    """Cut 0..rows into slices of at most `size`; no rows give one empty slice."""
    return [slice(start, min(start + size, rows)) for start in range(0, max(rows, 1), size)]


def concatenate(parts: list[Tokens]) -> Tokens:
    """Join results row after row."""
    if len(parts) == 1:
        return parts[0]
    names = [f.name for f in fields(parts[0])]
    return type(parts[0])(**{n: torch.cat([getattr(p, n) for p in parts]) for n in names})


def row_states(index: torch.Tensor, position: torch.Tensor, *, seed: int) -> torch.Tensor:
    """Hash (seed, index, position) into the (N, 1) int64 states of the rows' random streams."""
    state = mix64(torch.full_like(index, seed) + SPLITMIX_STEP)
    state = mix64((state ^ index) + SPLITMIX_STEP)
    return mix64((state ^ position) + SPLITMIX_STEP).unsqueeze(1)


def exponential_clocks(states: torch.Tensor, counters: torch.Tensor) -> torch.Tensor:
    """Return standard exponential variables, float64, above 0, a function of state and counter.

    The k-th output of SplitMix64 started at the row's state.
    """
    bits = shift_right(mix64(states + (counters + 1) * SPLITMIX_STEP), 11)  # 53 random bits
    return bits.double().add_(0.5).mul_(-(2.0**-53)).log1p_().neg_()


def mix64(z: torch.Tensor) -> torch.Tensor:
    """Scramble int64 values, one to one: the finalizer of SplitMix64."""
    z = (z ^ shift_right(z, 30)) * SPLITMIX_FACTORS[0]
    z = (z ^ shift_right(z, 27)) * SPLITMIX_FACTORS[1]
    return z ^ shift_right(z, 31)


def shift_right(z: torch.Tensor, bits: int) -> torch.Tensor:
    """Shift int64 values right as if they were unsigned."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)


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
        logsumexp=tokens.logsumexp, nucleus_mass=probabilities.masked_fill_(beyond, 0).sum(-1),
        top_ids=tokens.top_ids, top_q=top_q, top_counts=tokens.top_counts,
        top_min=top_min, top_max=top_max,
        sampled_ids=tokens.sampled_ids, sampled_q=sampled_q,
        sampled_min=sampled_min, sampled_max=sampled_max,
        actual_logits=actual_logits, usable=tokens.usable,
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


def column_numbers(values: torch.Tensor) -> torch.Tensor:
    """Return 0, 1, … for the columns of a matrix, on its device."""
    return torch.arange(values.shape[1], device=values.device)


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
