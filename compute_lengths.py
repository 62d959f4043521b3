"""Measure every conversation of a chat dataset in tokens, so that teacher batches can be full.

    dataset ──batches──► render, tokenize (processes) ──► index, length, num_tokens ──► Parquet
                                                                                        └──► Hub

`length` S counts the whole rendered conversation, `num_tokens` N the tokens that extraction would
store. The rendering is extraction's own code. A conversation that cannot be used keeps its row,
with both counts 0, so that a join on `index` finds every row of the source.

    python compute_lengths.py --model Qwen/Qwen3-8B --dataset user/chats
    python compute_lengths.py --model ./teacher --dataset chats.jsonl --output ./lengths

Exit codes: 0 measured and stored; 1 a bug; 2 bad usage or input; 130, 143 interrupted.
"""

from __future__ import annotations

import os
import signal
import sys

# As a script and as an installed command: Ctrl-C while libraries load leaves without a traceback.
if __name__ == "__main__" or sys.argv[0].endswith("compute-lengths"):
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))

import json
import logging
import multiprocessing
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from explore_logits import (
    LENGTHS_SCHEMA,
    METADATA_LENGTHS,
    ConfigError,
    ConversationEncoder,
    ConversationError,
    ConversationOptions,
    LogitsError,
    OneLineParser,
    SourceError,
    add_options,
    conversation_settings,
    count_processors,
    first_line,
    import_extra,
    local_path,
    log_safely,
    open_bar,
    open_conversations,
    option,
    outlive_readers,
    refuse_inside,
    source_id,
    source_revision,
    warn_once,
    whole_file,
    without_idle_columns,
)

__all__ = [
    "LengthsConfig",
    "LengthsError",
    "compute_lengths",
    "get_transform_fn",
    "main",
    "parse_args",
]

log = logging.getLogger("compute_lengths")


class LengthsError(LogitsError):
    """A worker died, or the result cannot be stored (exit 2)."""


# --------------------------------------------------------------------------------------------------
# 0 Config
# --------------------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class LengthsConfig(ConversationOptions):
    """Every option; field names are option names with underscores, "off" is None."""

    batch_size: int = option(1000, "conversations a process takes at a time", group="work", low=1)
    num_proc: int | None = option(None, "processes (default: CPUs)", low=1)

    output: str | None = option(
        None, "folder (./lengths) or Hub dataset repo (user/name)", group="output"
    )
    output_dir: str = option("data/lengths", "folder of the result")
    filename: str = option("lengths.parquet", "name of the result")
    output_repo: str | None = option(None, "Hub dataset repo user/name to push to")
    push_to_hub: bool = option(False, "push the result to --output-repo")
    private: bool = option(False, "create the Hub repo private")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.output is not None:
            if self.output_repo or self.output_dir != "data/lengths":
                raise ConfigError("--output excludes --output-dir and --output-repo")
            if self.output.startswith((".", "/", "~")) or Path(self.output).is_dir():
                self.output_dir = self.output
            else:
                self.output_repo, self.push_to_hub = self.output, True
        if self.push_to_hub != (self.output_repo is not None):
            raise ConfigError("--push-to-hub and --output-repo need each other: give both or none")
        if self.private and not self.push_to_hub:
            raise ConfigError("--private makes a Hub repo private: it needs --push-to-hub")
        if Path(self.filename).name != self.filename or not self.filename.endswith(".parquet"):
            raise ConfigError(f"--filename {self.filename!r}: must be a plain name in .parquet")
        refuse_inside(self, output_dir=self.output_dir)


# --------------------------------------------------------------------------------------------------
# 1 Measure
# --------------------------------------------------------------------------------------------------

PRELOADED = ["datasets", "transformers.models.auto.tokenization_auto",
             "transformers.utils.chat_template_utils", "compute_lengths"]  # fmt: skip
MEASURED = (*LENGTHS_SCHEMA.names, "reason", "detail", "notes")
Batch = Mapping[str, Sequence[Any]]
Measured = dict[str, list[Any]]


def get_transform_fn(encoder: ConversationEncoder) -> Callable[[Batch, Sequence[int]], Measured]:
    """Build the function that measures a batch of rows.

    It takes a batch as `Dataset.map(batched=True, with_indices=True)` gives it: columns, and the
    numbers of the rows in the source. It returns the columns `index`, `length`, `num_tokens`,
    `reason` (None, or why the conversation cannot be used, in a word), `detail` (in a sentence) and
    `notes` (what the template does not show).
    """

    def measure(row: Mapping[str, Any], number: int) -> tuple[Any, ...]:
        index = source_id(row, number, encoder.columns)
        try:
            encoded = encoder.encode(row)
        except ConversationError as error:
            return index, 0, 0, error.reason, str(error), []
        sizes = encoded.input_ids.size, encoded.token_positions.size
        return index, *sizes, None, None, list(encoded.notes)

    def transform(batch: Batch, numbers: Sequence[int]) -> Measured:
        rows = [dict(zip(batch, cells, strict=True)) for cells in zip(*batch.values(), strict=True)]
        measured = [measure(row, number) for number, row in enumerate(rows, numbers[0])]
        return dict(zip(MEASURED, map(list, zip(*measured, strict=True)), strict=True))

    return transform


def measure_source(
    source: Any, encoder: ConversationEncoder, *, batch_size: int, workers: int | None = None
) -> Iterator[Measured]:
    """Measure all batches of a source, in order, in `workers` processes (None: one each CPU)."""
    source = without_idle_columns(source, encoder.columns)
    table = source if hasattr(source, "__len__") else None  # read in the workers; streams here
    workers = workers or count_processors()
    batches: Iterable[tuple[int, Batch | int]] = stream_batches(source, batch_size)
    if table is not None:
        batches = [(n, min(batch_size, len(table) - n)) for n in range(0, len(table), batch_size)]
        workers = min(workers, len(batches))
    if workers <= 1:
        _start_worker(encoder, table, ignore_signals=False)
        yield from (_measure_batch(*batch) for batch in batches)
        return
    method = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
    context = multiprocessing.get_context(method)  # plain fork would copy the parent's threads
    if method == "forkserver":
        context.set_forkserver_preload(PRELOADED)  # seconds of imports, once instead of per worker
    pool = ProcessPoolExecutor(workers, context, _start_worker, (encoder, table))
    waiting: deque[Future[Measured]] = deque()  # few are under way at a time
    try:
        for batch in batches:
            waiting.append(pool.submit(_measure_batch, *batch))
            if len(waiting) > 2 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except (BrokenProcessPool, ConnectionError) as error:  # or it died while it started
        raise LengthsError(
            "a worker process died, perhaps for lack of memory: lower --num-proc or --batch-size"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def stream_batches(source: Any, size: int) -> Iterator[tuple[int, Batch]]:
    """Yield the number of the first row and the columns of consecutive batches of a stream."""
    rows, start = iter(source), 0
    while batch := list(islice(rows, size)):
        names = dict.fromkeys(name for row in batch for name in row)
        yield start, {name: [row.get(name) for row in batch] for name in names}
        start += len(batch)


_worker: tuple[Callable[[Batch, Sequence[int]], Measured], Any]  # of this process


def _start_worker(encoder: ConversationEncoder, table: Any, *, ignore_signals: bool = True) -> None:
    global _worker
    if ignore_signals:  # the parent decides what Ctrl-C does
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _worker = get_transform_fn(encoder), table


def _measure_batch(start: int, batch: Batch | int) -> Measured:
    """Measure a batch, or so many rows of the table that the process has."""
    transform, table = _worker
    return transform(table[start : start + batch] if isinstance(batch, int) else batch, [start])


@dataclass(frozen=True)
class MeasuredSource:
    """The lengths of all rows, and why rows were left out."""

    index: npt.NDArray[np.int32]
    length: npt.NDArray[np.int32]
    num_tokens: npt.NDArray[np.int32]
    skipped: dict[str, int]  # reason → rows

    @property
    def usable(self) -> npt.NDArray[np.bool_]:
        """Tell for each row whether its conversation can be used."""
        return self.num_tokens > 0


def collect(batches: Iterable[Measured], *, total: int | None = None) -> MeasuredSource:
    """Gather measured batches, with a progress bar; log the first row of every reason to skip."""
    parts = [np.zeros((3, 0), np.int32)]
    skipped: Counter[str] = Counter()
    with open_bar(total) as bar:
        for batch in batches:
            for index, reason, detail, notes in zip(
                *(batch[name] for name in ("index", "reason", "detail", "notes")), strict=True
            ):
                for note in notes:
                    warn_once(note)
                if reason is not None and reason not in skipped:
                    log.warning("index %d cannot be used (%s): %s", index, reason, detail)
                skipped.update([reason] if reason is not None else [])
            parts.append(np.array([batch[c] for c in LENGTHS_SCHEMA.names], np.int32))
            bar.update(len(batch["index"]))
    index, length, num_tokens = np.concatenate(parts, axis=1)
    measured = MeasuredSource(index, length, num_tokens, dict(skipped))
    values, counts = np.unique(measured.index, return_counts=True)
    if (counts > 1).any():
        raise SourceError(f"index {values[counts > 1][0]} occurs twice (--index-col)")
    if not measured.usable.any():
        raise SourceError(f"no conversation can be used: {format_skipped(skipped) or 'no rows'}")
    return measured


def format_skipped(skipped: Mapping[str, int]) -> str:
    """Write "12 refused_by_template, 3 null"."""
    return ", ".join(f"{count:,} {reason}" for reason, count in sorted(skipped.items()))


# --------------------------------------------------------------------------------------------------
# 2 Write
# --------------------------------------------------------------------------------------------------


def find_revisions(config: LengthsConfig) -> dict[str, str | None]:
    """Name the versions of model and dataset; with `conversation_settings` all lengths depend on.

    Extraction compares both with its own.
    """
    return {
        "model_revision": config.revision or source_revision(config.model, kind="model"),
        "dataset_revision": source_revision(config.dataset),
    }


def write_lengths(measured: MeasuredSource, settings: Mapping[str, Any], path: Path) -> None:
    """Write the lengths as Parquet, whole or not at all, with `settings` in the metadata."""
    metadata = {METADATA_LENGTHS: json.dumps(dict(settings), sort_keys=True).encode()}
    table = pa.table(
        [measured.index, measured.length, measured.num_tokens],
        schema=LENGTHS_SCHEMA.with_metadata(metadata),
    )
    try:
        with whole_file(path) as part:
            pq.write_table(table, part, compression="zstd")
    except OSError as error:
        raise LengthsError(f"cannot write {path}: {error.strerror or error}") from error


CARD = """---
configs:
- config_name: default
  data_files:
  - split: train
    path: data/lengths.parquet
---
# Lengths of {dataset}

Tokens of every conversation of `{dataset}` ({split}), rendered with the chat template of `{model}`:
`index` (row), `length` (whole conversation), `num_tokens` (what the assistant wrote). Rows with 0
cannot be used. {rows:,} rows, {total:,} tokens.

```python
from datasets import load_dataset

lengths = load_dataset("{repo}", split="train")
```
"""
PUSH_WAITS_S = (1, 2, 4, 8)  # a commit is not retried by the client


def push_lengths(
    config: LengthsConfig, measured: MeasuredSource, settings: Mapping[str, Any], path: Path
) -> None:
    """Push the file and a card to the Hub in one commit; a refusal says where the file is kept."""
    hub, repo = import_extra("huggingface_hub"), config.output_repo
    total = int(measured.length.sum(dtype=np.int64))
    card = CARD.format(**settings, rows=measured.index.size, total=total, repo=repo)
    files = {"data/lengths.parquet": str(path), "README.md": card.encode()}
    operations = [hub.CommitOperationAdd(*file) for file in files.items()]
    where, api = {"repo_id": repo, "repo_type": "dataset"}, hub.HfApi()
    for wait_s in (*PUSH_WAITS_S, None):
        try:
            api.create_repo(**where, private=config.private, exist_ok=True)
            api.create_commit(**where, commit_message="Add lengths", operations=operations)
            return
        except (hub.errors.HfHubHTTPError, OSError, ValueError) as error:
            status = getattr(getattr(error, "response", None), "status_code", None) or 503
            passing = status in (408, 409, 412, 429) or status >= 500
            if not passing or wait_s is None or isinstance(error, ValueError):
                why = f"cannot push to {repo}: {first_line(error)}; kept as {path}"
                raise LengthsError(why) from error
            log.warning("the Hub did not take the commit (%s), trying again", first_line(error))
            time.sleep(wait_s)


# --------------------------------------------------------------------------------------------------
# 3 Report
# --------------------------------------------------------------------------------------------------

PERCENTILES = (1, 5, 10, 25, 50, 75, 90, 95, 99, 100)


def find_percentiles(values: npt.NDArray[np.int32]) -> dict[str, int]:
    """Return exact percentiles by name: the smallest value that many percent do not exceed."""
    found = np.percentile(values, PERCENTILES, method="inverted_cdf")
    return {f"p{p}": int(v) for p, v in zip(PERCENTILES, found, strict=True)}


def format_histogram(values: npt.NDArray[np.int32], *, width: int = 40) -> str:
    """Draw a histogram with bins that double, with the share up to each bin's end."""
    counts = np.bincount(np.frexp(values)[1])  # bin b holds 2**(b-1) .. 2**b - 1
    lines, seen = [], 0
    for b in range(int(np.flatnonzero(counts)[0]), counts.size):
        count = int(counts[b])
        seen += count
        bar = "#" * round(width * count / int(counts.max()))
        low, high = 2 ** (b - 1), 2**b - 1
        lines.append(f"{low:>9,}-{high:<9,} {bar:<{width}} {count:>10,}  {seen / len(values):7.2%}")
    return "\n".join(lines)


def format_report(measured: MeasuredSource) -> str:
    """Write the counts, the percentiles and the histogram of the lengths."""
    used = measured.usable
    skipped = f"; skipped: {format_skipped(measured.skipped)}" if measured.skipped else ""
    lines = [f"{int(used.sum()):,} of {used.size:,} conversations can be used{skipped}", ""]
    lines.append(f"{'':>12}" + "".join(f"{f'p{p}':>9}" for p in PERCENTILES))
    for name, values in (("length", measured.length), ("num_tokens", measured.num_tokens)):
        found = find_percentiles(values[used]).values()
        lines.append(f"{name:>12}" + "".join(f"{value:>9,}" for value in found))
    lines += ["", "length in tokens, conversations, share up to here"]
    return "\n".join([*lines, format_histogram(measured.length[used])])


# --------------------------------------------------------------------------------------------------
# 4 CLI
# --------------------------------------------------------------------------------------------------


def compute_lengths(config: LengthsConfig) -> tuple[MeasuredSource, Path]:
    """Measure a dataset and store the result; return both. Raises LogitsError."""
    revisions = find_revisions(config)
    source, encoder = open_conversations(config, dataset_revision=revisions["dataset_revision"])
    total = len(source) if hasattr(source, "__len__") else None
    log.info("measuring %s rows of %s", "all" if total is None else f"{total:,}", config.dataset)
    batches = measure_source(source, encoder, batch_size=config.batch_size, workers=config.num_proc)
    measured = collect(batches, total=total)
    for what, place in (("dataset", config.dataset), ("model", config.model)):
        before = str(revisions[f"{what}_revision"])  # a commit of the Hub stays what it is
        if before.startswith("sha256:") and source_revision(place, kind=what) != before:
            raise SourceError(f"the {what} has changed while it was measured; measure it again")
    settings = conversation_settings(config, encoder) | revisions
    path = local_path(config.output_dir) / config.filename
    write_lengths(measured, settings, path)
    log.info("wrote %s", path)
    if config.push_to_hub:
        push_lengths(config, measured, settings, path)
        log.info("pushed to %s", config.output_repo)
    return measured, path


def parse_args(argv: Sequence[str] | None = None) -> LengthsConfig:
    """Parse the command line; a wrong value ends the program with code 2 or is a ConfigError."""
    about = (__doc__ or "").split("\n\n")
    usage = "%(prog)s --model M --dataset D [options]"
    parser = OneLineParser("compute-lengths", usage, about[0], about[-1].strip())
    add_options(parser, LengthsConfig, required=("model", "dataset"))
    return LengthsConfig(**vars(parser.parse_args(argv)))


def interrupt(number: int, _: object) -> NoReturn:
    """End whatever is waited for."""
    raise KeyboardInterrupt(number)


def main(argv: Sequence[str] | None = None) -> int:
    """Run from the command line and return the exit code."""
    outlive_readers("stdout", "stderr")
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s", stream=sys.stderr)
    log_safely()
    began = time.monotonic()
    try:
        config = parse_args(argv)
        measured, path = compute_lengths(config)
    except LogitsError as error:
        log.error("%s", error)
        return 2
    except KeyboardInterrupt as signalled:
        log.error("interrupted, nothing written")
        return 128 + next(iter(signalled.args), signal.SIGINT)
    used = measured.usable
    columns = {"length": measured.length, "num_tokens": measured.num_tokens}
    summary = {
        "rows": int(used.size), "usable": int(used.sum()), "skipped": measured.skipped,
        **{f"total_{name}": int(n.sum(dtype=np.int64)) for name, n in columns.items()},
        **{name: find_percentiles(n[used]) for name, n in columns.items()},
        "output": str(path), "repo": config.output_repo,
        "seconds": round(time.monotonic() - began, 2),
    }  # fmt: skip
    sys.stdout.write(f"{format_report(measured)}\n{json.dumps(summary)}\n")
    return 0


if __name__ == "__main__" or sys.argv[0].endswith("compute-lengths"):
    for number in (signal.SIGINT, signal.SIGTERM):  # main says what became of it
        signal.signal(number, interrupt)
if __name__ == "__main__":
    sys.exit(main())
