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

import contextlib
import copy
import itertools
import json
import logging
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import MISSING, dataclass, field, fields
from inspect import signature
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from explore_logits import MAX_TOKEN_ID, LogitsError, pack_indices

__all__ = [
    "ConfigError",
    "ExtractedTokens",
    "ExtractionConfig",
    "GPUBatchResult",
    "Teacher",
    "TeacherError",
    "extract_tokens",
    "gpu_process_batch",
    "load_teacher",
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

HEAD_CHUNK_BYTES = 256 * 2**20  # float32 logits of one chunk
CAST_ROWS = 16_384  # vocabulary rows cast to float32 at a time where no kernel accumulates into it
PROBE_LENGTHS = (7, 19)  # tokens; lengths that share no divisor with each other or with a window
PROBE_WINDOW = 5  # stands in for a model's window during the probe, so that its edge is met
WINDOWS = ("sliding_window", "attention_chunk_size", "window_size", "floor_scale")
# Largest disagreement of two layouts, in units of the logits' spread, that is still rounding. A
# wrong layout is off by 0.1 to 1; rounding in a deep bfloat16 model reaches a few hundredths.
ROUNDING = {torch.float32: 1e-3, torch.float16: 0.02, torch.bfloat16: 0.1}


class HeadDiffersError(Exception):
    """Internal: this model's head cannot be called apart from its body."""


def load_teacher(config: ExtractionConfig, *, vocab_size: int | None = None) -> Teacher:
    """Load the model of `config`, check how it can be run, and say so in the log.

    Args:
        config: `model`, `revision`, `trust_remote_code`, `device`, `dtype`, `attn` and
            `max_seq_len` are read.
        vocab_size: the tokenizer's highest id + 1; rows of the model beyond it are padding.

    Raises:
        TeacherError: there is no such model, or it cannot run as asked; one line with the remedy.
    """
    device = resolve_device(config.device)
    model = load_model(config, device)
    teacher = Teacher(model, vocab_size=vocab_size)
    limit = teacher.max_seq_len
    if limit is not None and config.max_seq_len is not None and config.max_seq_len > limit:
        raise TeacherError(
            f"--max-seq-len {config.max_seq_len} is beyond the {limit} positions of "
            f"{config.model}; give at most {limit}"
        )
    logging.getLogger(__name__).info(
        "teacher %s on %s, %s, attention %s; head %s; %s: %s",
        config.model,
        teacher.device,
        str(teacher.dtype).removeprefix("torch."),
        model.config._attn_implementation,
        teacher.head,
        teacher.layout,
        teacher.layout_reason,
    )
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


def load_model(config: ExtractionConfig, device: torch.device) -> Any:
    """Return the causal LM on `device`, in eval mode, every weight from the checkpoint.

    Raises:
        TeacherError: it cannot be found or loaded as asked, or the checkpoint lacks weights.
    """
    from transformers import AutoModelForCausalLM

    source = config.model
    if source.startswith((".", "/", "~")) or Path(source).is_dir():
        source = str(Path(source).expanduser())
        if not Path(source).is_dir():
            raise TeacherError(f"--model {config.model}: no such folder")
    options: dict[str, Any] = {
        "revision": config.revision or "main",
        "trust_remote_code": config.trust_remote_code,
        "dtype": "float32" if config.dtype == "auto" and device.type == "cpu" else config.dtype,
        "output_loading_info": True,
    }
    if config.attn != "auto":
        options["attn_implementation"] = config.attn
    with loading_errors(config):
        loaded: Any = AutoModelForCausalLM.from_pretrained(source, **options)
    model, info = loaded
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise TeacherError(
            f"--model {config.model}: the checkpoint lacks {len(missing)} weights of "
            f"{type(model).__name__} ({missing[0]}, …); it is no causal language model"
        )
    return model.eval().to(device)


@contextmanager
def loading_errors(config: ExtractionConfig) -> Iterator[None]:
    """Turn what transformers raises while it loads into one TeacherError with the remedy."""
    try:
        yield
    except (OSError, ValueError, ImportError, RuntimeError) as error:
        text = str(error)
        said = text.strip().splitlines()[0] if text.strip() else type(error).__name__
        if "trust_remote_code" in text:
            remedy = "the model brings its own code: read it, then give --trust-remote-code"
        elif "flash" in text.lower():
            remedy = "install it, or leave --attn at auto"
        elif "gated" in text.lower() or "401" in text:
            remedy = "accept its terms on the Hub and log in with `hf auth login`"
        else:
            remedy = "check --model and --revision, and the network if it is on the Hub"
        raise TeacherError(f"--model {config.model} cannot be loaded: {said} ({remedy})") from error


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

    Args:
        hidden: (n, H); weight: (V, H); bias: (V,) or None.
    """
    if weight.dtype == torch.float32:
        return torch.nn.functional.linear(hidden.float(), weight, bias)
    logits = torch.empty(hidden.shape[0], weight.shape[0], device=hidden.device)  # (n, V) float32
    for start in range(0, weight.shape[0], CAST_ROWS):
        rows = weight[start : start + CAST_ROWS].float()
        logits[:, start : start + CAST_ROWS] = hidden.float() @ rows.T
    return logits if bias is None else logits + bias.float()


class Teacher:
    """A causal LM that returns float32 logits of chosen positions, whatever its family.

    Not thread safe: the model's own forward is borrowed while logits are computed.

    Attributes:
        device, dtype: of the model.
        vocab_size: V, the ids that have logits.
        max_seq_len: positions the model has, None without a limit.
        layout: how several conversations go through together: "packed", "padded" or "single".
        layout_reason: why, for the log.
        head: "chunked" (logits of wanted positions only) or "forward" (of all positions).
    """

    def __init__(self, model: Any, *, vocab_size: int | None = None) -> None:
        """Check on `model` itself how its head and several conversations at once can be run."""
        self.model = model.eval()
        self.device: torch.device = model.device
        self.dtype: torch.dtype = model.dtype
        self.max_seq_len = max_positions(model.config)
        self.vocab_size = usable_vocabulary(model, vocab_size)
        for name in ("output_router_logits", "output_hidden_states", "output_attentions"):
            if getattr(model.config, name, False):
                setattr(model.config, name, False)  # memory that nothing here reads
        self.body: Any = None
        self.head, self.head_reason = self._choose_head()
        self.layout, self.layout_reason = self._choose_layout()

    def describe(self) -> dict[str, Any]:
        """Return what identifies the teacher and how it runs, as JSON values."""
        config = self.model.config
        quantization: Any = getattr(config, "quantization_config", None)
        if hasattr(quantization, "to_dict"):
            quantization = quantization.to_dict()
        return {
            "model": getattr(config, "_name_or_path", ""),
            "model_revision": getattr(config, "_commit_hash", None),
            "architecture": type(self.model).__name__,
            "device": str(self.device),
            "dtype": str(self.dtype).removeprefix("torch."),
            "attn": getattr(config, "_attn_implementation", None),
            "layout": self.layout,
            "layout_reason": self.layout_reason,
            "head": self.head,
            "quantization": json.loads(json.dumps(quantization, default=str)),
            "vocab_size": self.vocab_size,
            "max_seq_len": self.max_seq_len,
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
        self._check_ids(sequences)
        size = chunk_tokens or max(1, HEAD_CHUNK_BYTES // (4 * self.vocab_size))
        for part in self._parts([len(ids) for ids in sequences]):
            rows = [torch.from_numpy(np.asarray(sequences[i], np.int64)) for i in part]
            wanted = [torch.from_numpy(np.asarray(token_positions[i], np.int64)) - 1 for i in part]
            if any(len(positions) for positions in wanted):
                packed = self.layout == "packed" and self._packing_is_cheaper(rows)
                inputs, starts = pack_rows(rows) if packed else pad_rows(rows)
                yield from self._chunks(inputs, flatten(wanted, starts), size)

    def _check_ids(self, sequences: Sequence[npt.NDArray[np.int32]]) -> None:
        rows = self.model.get_input_embeddings().weight.shape[0]
        highest = max((int(ids.max()) for ids in sequences if len(ids)), default=0)
        if highest >= rows:
            raise TeacherError(
                f"token id {highest} is beyond the {rows} rows of the model's embedding: "
                "tokenizer and model do not belong together"
            )

    def _parts(self, lengths: list[int]) -> list[list[int]]:
        """Split a batch into runs of rows that may share a forward pass."""
        if self.layout == "single":
            return [[i] for i in range(len(lengths))]
        edge = rope_edge(self.model.config)
        runs = itertools.groupby(range(len(lengths)), key=lambda i: lengths[i] > edge)
        return [list(run) for _, run in runs]

    def _packing_is_cheaper(self, rows: list[torch.Tensor]) -> bool:
        """Compare one packed row with padded ones: linear layers and squares of attention.

        Attention of variable length skips what packing masks; any other computes it.
        """
        if "flash" in str(self.model.config._attn_implementation):
            return True
        # 24 H² operations a token and layer in the linear part, 4 S H in attention
        linear = 6 * (getattr(self.model.config.get_text_config(), "hidden_size", None) or 1024)
        total, longest = sum(len(row) for row in rows), max(len(row) for row in rows)
        return total * (linear + total) < len(rows) * longest * (linear + longest)

    def _chunks(
        self, inputs: dict[str, Any], flat: torch.Tensor, size: int
    ) -> Iterator[torch.Tensor]:
        """Yield the logits at the flat positions (N,) of one forward pass, `size` at a time."""
        if self.head == "forward":
            yield from self._plain_logits(inputs, flat).split(size)
            return
        hidden, outputs = self._hidden(inputs, flat)
        for chunk in hidden.split(size):
            yield self._head_logits(chunk, outputs)

    @torch.inference_mode()
    def _plain_logits(self, inputs: dict[str, Any], flat: torch.Tensor) -> torch.Tensor:
        """Return (N, V) float32 from the model's plain forward over all positions."""
        logits = self.model(**self._on_device(inputs), use_cache=False).logits
        logits = logits.reshape(-1, logits.shape[-1])
        return logits[flat.to(logits.device), : self.vocab_size].float().to(self.device)

    @torch.inference_mode()
    def _hidden(self, inputs: dict[str, Any], flat: torch.Tensor) -> tuple[torch.Tensor, Any]:
        """Run the body; return the wanted hidden states (N, H) and the body's output object.

        The model's own forward calls the body, so every argument that the family passes to it is
        there; its head sees one position a row.
        """
        forward = self.body.forward
        kept: list[Any] = []

        def body(*args: Any, **kwargs: Any) -> Any:
            outputs = forward(*args, **kwargs)
            kept.append(outputs)
            return with_hidden(outputs, outputs.last_hidden_state[:, :1])

        with swapped_forward(self.body, body):
            self.model(**self._on_device(inputs), use_cache=False)
        if len(kept) != 1:
            raise HeadDiffersError(f"the forward calls its body {len(kept)} times")
        hidden = kept[0].last_hidden_state  # (B, S, H)
        hidden = hidden.reshape(-1, hidden.shape[-1])
        hidden = hidden[flat.to(hidden.device)]  # (N, H)
        return hidden, with_hidden(kept[0], hidden[None, :1])

    @torch.inference_mode()
    def _head_logits(
        self, hidden: torch.Tensor, outputs: Any, *, own_product: bool = False
    ) -> torch.Tensor:
        """Return (n, V) float32 logits of hidden states (n, H) by the model's own forward.

        A stub that returns `hidden` stands in for the body, so that soft-caps and scales apply.
        Where the head is a plain linear layer its product is done in float32, over V rows only,
        unless `own_product` asks for the layer as it is.
        """

        def body(*args: Any, **kwargs: Any) -> Any:
            return with_hidden(outputs, hidden[None])

        head = self.model.get_output_embeddings()

        def product(states: torch.Tensor) -> torch.Tensor:
            bias = None if head.bias is None else head.bias[: self.vocab_size]
            return float32_product(states[0], head.weight[: self.vocab_size], bias)[None]

        ids = torch.zeros(1, len(hidden), dtype=torch.long, device=self.device)
        with contextlib.ExitStack() as stack:
            stack.enter_context(swapped_forward(self.body, body))
            if is_plain_linear(head) and not own_product:
                stack.enter_context(swapped_forward(head, product))
            logits = self.model(input_ids=ids, use_cache=False).logits
        return logits[0, :, : self.vocab_size].float().to(self.device)

    def _on_device(self, inputs: dict[str, Any]) -> dict[str, Any]:
        return {k: None if v is None else v.to(self.device) for k, v in inputs.items()}

    def _choose_head(self) -> tuple[str, str]:
        """Find the body that leaves the head's logits as they are when a stub stands in for it."""
        inputs, flat = probe_inputs(pad_rows, [probe_rows(self.vocab_size)[1]])
        plain = self._plain_logits(inputs, flat)
        reason = "no body apart from its head"
        for body in (self.model.base_model, self.model.get_decoder()):
            if body is self.model:
                continue
            self.body = body
            try:
                hidden, outputs = self._hidden(inputs, flat)
                for own_product in (True, False):
                    logits = self._head_logits(hidden, outputs, own_product=own_product)
                    off = disagreement(logits, plain)
                    if not off <= self._rounding():
                        raise HeadDiffersError(f"logits of the head alone are off by {off:.2g}")
            except (HeadDiffersError, AttributeError, TypeError, ValueError) as error:
                reason = str(error)
                continue
            return "chunked", "the head alone gives the logits of the whole model"
        self.body = None
        return "forward", reason

    def _rounding(self) -> float:
        return ROUNDING.get(self.dtype, 0.1)

    def _choose_layout(self) -> tuple[str, str]:
        """Compare layouts with one conversation at a time; return the fastest that is right."""
        if self.head == "forward":
            return "single", f"all positions' logits at once ({self.head_reason})"
        packed = self._layout_problem(pack_rows)
        if packed is None:
            return "packed", "conversations packed into one row get the logits they get alone"
        padded = self._layout_problem(pad_rows)
        if padded is None:
            return "padded", f"packing is not right here: {packed}; right padding is"
        return "single", f"packing is not right here: {packed}; nor is right padding: {padded}"

    def _layout_problem(self, layout: Callable[..., Any]) -> str | None:
        """Return what is wrong when probe conversations share a pass laid out so, None if nothing.

        A probe of a few dozen tokens never meets the edge of a window of thousands, so it runs
        once more for each window with that window made a few tokens long.
        """
        if layout is pack_rows and "position_ids" not in signature(self.model.forward).parameters:
            return "the model takes no position_ids"
        full = self._probe_alone()
        problem = self._probe_problem(layout, full)
        for name in self._windows():
            with shrunken(self.model, name):
                alone = self._probe_alone()
                if layout is pack_rows and not disagreement(alone, full) > self._rounding():
                    problem = problem or f"{name} cannot be reached by a short probe"
                problem = problem or self._probe_problem(layout, alone, f" at the edge of {name}")
        return problem

    def _windows(self) -> list[str]:
        """Return the names of the model's windows that are shorter than its longest input."""
        limit = self.max_seq_len or math.inf
        return [name for name in WINDOWS if any(w < limit for w in windows(self.model, name))]

    def _probe_alone(self) -> torch.Tensor:
        """Return the logits of the probe conversations, one at a time, all positions flattened."""
        rows = probe_rows(self.vocab_size)
        return torch.cat([self._probe(pad_rows, [row]) for row in rows])

    def _probe(self, layout: Callable[..., Any], rows: list[torch.Tensor]) -> torch.Tensor:
        inputs, flat = probe_inputs(layout, rows)
        hidden, outputs = self._hidden(inputs, flat)
        return self._head_logits(hidden, outputs)

    def _probe_problem(
        self, layout: Callable[..., Any], alone: torch.Tensor, where: str = ""
    ) -> str | None:
        """Compare the probe laid out so with `alone`, and with another first conversation."""
        rows = probe_rows(self.vocab_size)
        try:
            together = self._probe(layout, rows)
            rows[0] = rows[0].flip(0)
            second = slice(len(rows[0]), None)
            leak = disagreement(self._probe(layout, rows)[second], together[second])
        except (TypeError, ValueError, HeadDiffersError) as error:
            return f"the model refuses it{where} ({str(error).strip().splitlines()[0]})"
        if not leak <= self._rounding() / 10:
            return f"a conversation changes the next one's logits by {leak:.2g}{where}"
        off = disagreement(together, alone)
        if not off <= self._rounding():
            return f"logits are off by {off:.2g}{where}"
        return None


def probe_rows(vocab_size: int) -> list[torch.Tensor]:
    """Return the two short conversations of the start-up checks: arbitrary but fixed ids."""
    draw = np.random.default_rng(0)
    return [torch.from_numpy(draw.integers(0, vocab_size, n)) for n in PROBE_LENGTHS]


def probe_inputs(
    layout: Callable[..., Any], rows: list[torch.Tensor]
) -> tuple[dict[str, Any], torch.Tensor]:
    """Lay out `rows` and return the inputs and the flat positions of all their tokens."""
    inputs, starts = layout(rows)
    return inputs, flatten([torch.arange(len(row)) for row in rows], starts)


def flatten(positions: list[torch.Tensor], starts: list[int]) -> torch.Tensor:
    """Return the positions of each row, counted from where the row starts, as one tensor (N,)."""
    return torch.cat([row + start for row, start in zip(positions, starts, strict=True)])


def pad_rows(rows: list[torch.Tensor]) -> tuple[dict[str, Any], list[int]]:
    """Return the inputs (B, S) of right-padded rows and where each row starts when flattened."""
    longest = max(len(row) for row in rows)
    ids = torch.zeros(len(rows), longest, dtype=torch.long)
    mask = torch.zeros(len(rows), longest, dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = row
        mask[i, : len(row)] = 1
    needed = any(len(row) < longest for row in rows)
    inputs = {"input_ids": ids, "attention_mask": mask if needed else None}
    return inputs, [i * longest for i in range(len(rows))]


def pack_rows(rows: list[torch.Tensor]) -> tuple[dict[str, Any], list[int]]:
    """Return the inputs (1, T) of all rows one after the other, and where each row starts.

    Positions restart with each conversation. There must be no mask: with one, even all ones, the
    model would not look for the restarts.
    """
    starts = [0, *itertools.accumulate(len(row) for row in rows)][:-1]
    positions = torch.cat([torch.arange(len(row)) for row in rows])
    inputs = {
        "input_ids": torch.cat(rows)[None],
        "position_ids": positions[None],
        "attention_mask": None,
    }
    return inputs, starts


def disagreement(logits: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the largest error of a position, as a share of the spread of its logits."""
    same = (logits == expected) | (logits.isnan() & expected.isnan())
    error = torch.where(same, 0.0, logits - expected).square().mean(-1).sqrt()  # (N,)
    return float((error / expected.std(-1).clamp_min(1e-6)).max())


def window_holders(model: Any, name: str) -> list[Any]:
    """Return the modules and configurations whose attribute `name` is a window in tokens."""
    modules = list(model.modules())
    configs = [getattr(module, "config", None) for module in modules]
    configs.append(model.config.get_text_config())
    unique = {id(holder): holder for holder in (*modules, *configs) if holder is not None}
    return [h for h in unique.values() if is_window(getattr(h, name, None))]


def is_window(value: Any) -> bool:
    """Say whether `value` is a number of tokens."""
    return isinstance(value, int | float) and not isinstance(value, bool) and value > 0


def windows(model: Any, name: str) -> set[int]:
    """Return the different lengths that the window `name` has in the model."""
    return {getattr(holder, name) for holder in window_holders(model, name)}


@contextmanager
def shrunken(model: Any, name: str) -> Iterator[None]:
    """Make the window `name` a few tokens long everywhere inside the block."""
    before = [(holder, getattr(holder, name)) for holder in window_holders(model, name)]
    for holder, _ in before:
        setattr(holder, name, PROBE_WINDOW)
    try:
        yield
    finally:
        for holder, value in before:
            setattr(holder, name, value)


def is_plain_linear(head: Any) -> bool:
    """Say whether `head` is an unquantized linear layer whose weights are really here."""
    return type(head) is torch.nn.Linear and head.weight.device.type != "meta"


def usable_vocabulary(model: Any, vocab_size: int | None) -> int:
    """Return V: ids that the tokenizer knows and the model has a logit for.

    Raises:
        TeacherError: there are more than the format can name.
    """
    head = model.get_output_embeddings()
    rows = int(model.config.get_text_config().vocab_size if head is None else head.weight.shape[0])
    usable = rows if vocab_size is None else min(rows, vocab_size)
    if usable > MAX_TOKEN_ID + 1:
        raise TeacherError(
            f"the model has {usable} token ids; shards hold ids up to {MAX_TOKEN_ID} only"
        )
    return usable


def max_positions(config: Any) -> int | None:
    """Return how many positions the model has, None when its configuration names no limit."""
    text = config.get_text_config()
    for name in ("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length"):
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
    position = np.concatenate(positions)
    actual = np.concatenate([row.input_ids[row.token_positions] for row in batch.rows])
    columns = torch.from_numpy(np.stack([index, position, actual]).astype(np.int64))
    parts, start = [], 0
    for logits in teacher.iter_logits([row.input_ids for row in batch.rows], positions):
        if start == 0:
            columns = columns.to(logits.device, non_blocking=True)
        chunk = columns[:, start : start + logits.shape[0]]
        tokens = extract_tokens(
            logits,
            chunk[0],
            chunk[1],
            top_p=top_p,
            top_p_max=top_p_max,
            sampled_n=sampled_n,
            seed=seed,
            reference=reference,
        )
        at_actual = logits.gather(1, chunk[2].unsqueeze(1)).squeeze(1).float()
        parts.append(quantize_tokens(tokens, at_actual, bits=logit_bits))
        start += logits.shape[0]
    return concatenate(parts)


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
        logits,
        logsumexp,
        top_ids,
        counts,
        drawn.indices,
        complete=drawn.values.isfinite().all(-1),
        top_p_max=top_p_max,
    )


def collect_tokens(
    logits: torch.Tensor,
    logsumexp: torch.Tensor,
    top_ids: torch.Tensor,
    counts: torch.Tensor,
    sampled_ids: torch.Tensor,
    *,
    complete: torch.Tensor,
    top_p_max: int,
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
