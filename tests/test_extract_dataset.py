"""Section 1 of `extract_logits.py`: source rows become token ids, in worker processes."""

from __future__ import annotations

import functools
import json
import os
import pickle
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import numpy as np
import pytest
from tiny_teachers import save_teacher, tiny_tokenizer

import extract_logits
from explore_logits import LogitsError, TemplateError, encode_conversation, resolve_columns
from extract_logits import (
    Batch,
    ConversationDataset,
    EncodedRow,
    ExtractionConfig,
    PreparedDataset,
    RowEncoder,
    SkippedRow,
    StopRequested,
    TokenBudgetBatchSampler,
    WorkerTask,
    prepare_dataset,
    read_batch,
    run_ahead,
)

ROOT = Path(__file__).resolve().parent.parent
TOKENIZER = tiny_tokenizer(300)
CONFIG = ExtractionConfig(model="m", dataset="d", output="./o")


def chat(text: str) -> dict[str, Any]:
    return {
        "messages": [
            {"role": "user", "content": text},
            {"role": "assistant", "content": text.upper()},
        ]
    }


def encoder_of(row: dict[str, Any], **options: Any) -> RowEncoder:
    return RowEncoder(TOKENIZER, TOKENIZER.chat_template, resolve_columns(list(row)), **options)


def prepared_of(rows: list[dict[str, Any]]) -> PreparedDataset:
    numbers = np.arange(len(rows))
    return PreparedDataset(datasets.Dataset.from_list(rows), numbers, numbers + 100, numbers)


def times_ten(items: list[int]) -> list[int]:
    return [10 * item for item in items]


def refuse_three(items: list[int]) -> list[int]:
    if 3 in items:
        raise TemplateError("no assistant's tokens to be found: give --chat-template")
    return [10 * item for item in items]


def fail_at_three(items: list[int]) -> list[int]:
    return [1 // (item - 3) for item in items]


def test_a_row_is_encoded_as_the_format_says() -> None:
    row = chat("hello")
    encoded = encoder_of(row).encode(row, 7)
    wanted = encode_conversation(row["messages"], TOKENIZER)
    assert isinstance(encoded, EncodedRow)
    assert encoded.index == 7
    np.testing.assert_array_equal(encoded.input_ids, wanted.input_ids)
    np.testing.assert_array_equal(encoded.token_positions, wanted.token_positions)
    text = TOKENIZER.decode(encoded.input_ids[encoded.token_positions])
    assert text == "HELLO<|im_end|>"


def test_a_conversation_without_assistant_is_skipped_with_its_reason() -> None:
    row = {"messages": [{"role": "user", "content": "anyone?"}]}
    skipped = encoder_of(row).encode(row, 3)
    assert isinstance(skipped, SkippedRow)
    assert (skipped.index, skipped.reason) == (3, "no_assistant")


def test_a_conversation_above_the_limit_is_skipped_and_one_at_the_limit_is_not() -> None:
    row = chat("hello")
    whole = encoder_of(row).encode(row, 0)
    assert isinstance(whole, EncodedRow)
    size = whole.input_ids.size
    assert isinstance(encoder_of(row, max_seq_len=size).encode(row, 0), EncodedRow)
    skipped = encoder_of(row, max_seq_len=size - 1).encode(row, 0)
    assert isinstance(skipped, SkippedRow)
    assert skipped.reason == "too_long"
    assert str(size) in skipped.detail
    assert str(size - 1) in skipped.detail


def test_the_dataset_gives_each_position_its_row_and_index() -> None:
    rows = [chat(f"number {n}") for n in range(5)]
    dataset = ConversationDataset(prepared_of(rows), encoder_of(rows[0]))
    assert len(dataset) == 5
    for position in (4, 0, 2):
        one, many = dataset[position], dataset.__getitems__([1, position])[1]
        for encoded in (one, many):
            assert isinstance(encoded, EncodedRow)
            assert encoded.index == 100 + position
            assert f"NUMBER {position}" in TOKENIZER.decode(encoded.input_ids)


def test_a_plain_data_loader_drives_dataset_and_sampler() -> None:
    import torch

    rows = [chat("x" * n) for n in (3, 9, 1, 5)]
    prepared = prepare_dataset(CONFIG, datasets.Dataset.from_list(rows), encoder_of(rows[0]))
    loader: Any = torch.utils.data.DataLoader(
        ConversationDataset(prepared, encoder_of(rows[0])),
        batch_sampler=TokenBudgetBatchSampler(prepared.lengths, max_batch_size=3),
        collate_fn=Batch.collate,
    )
    assert [[row.index for row in batch.rows] for batch in loader] == [[1, 3, 0], [2]]


@pytest.mark.parametrize("processes", [0, 2])
def test_batches_come_back_in_order_and_lazily(processes: int) -> None:
    asked: list[int] = []

    def batches() -> Any:
        for n in range(100):
            asked.append(n)
            yield [n, n + 1000]

    made = run_ahead(times_ten, batches(), processes=processes)
    first = [next(made) for _ in range(5)]
    assert first == [[10 * n, 10 * (n + 1000)] for n in range(5)]
    assert len(asked) <= 5 + 4 * max(processes, 1) + 1
    made.close()


@pytest.mark.parametrize("processes", [0, 2])
def test_a_refusal_in_a_worker_reaches_the_caller_as_itself(processes: int) -> None:
    made = run_ahead(refuse_three, [[1], [2], [3], [4]], processes=processes)
    assert next(made) == [10]
    assert next(made) == [20]
    with pytest.raises(LogitsError) as refusal:
        next(made)
    assert type(refusal.value) is TemplateError
    assert str(refusal.value) == "no assistant's tokens to be found: give --chat-template"


@pytest.mark.parametrize("processes", [0, 2])
def test_a_bug_in_a_worker_keeps_its_type(processes: int) -> None:
    with pytest.raises(ZeroDivisionError):
        list(run_ahead(fail_at_three, [[1], [3]], processes=processes))


def test_reading_ahead_stops_when_told_to() -> None:
    answers = iter([False, False, True])
    made = run_ahead(
        times_ten, [[n] for n in range(9)], processes=0, should_stop=lambda: next(answers)
    )
    assert [next(made), next(made)] == [[0], [10]]
    with pytest.raises(StopRequested):
        next(made)


def start_script(path: Path, text: str) -> subprocess.Popen[str]:
    """Start a script in a process group of its own, as a terminal or a batch system does."""
    path.write_text(textwrap.dedent(text))
    return subprocess.Popen(
        [sys.executable, str(path)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)])},
    )  # fmt: skip


def test_signals_to_the_whole_group_stop_no_worker_and_print_nothing(tmp_path: Path) -> None:
    """As Ctrl-C on a terminal and a batch system's SIGTERM do: every process gets the signal."""
    process = start_script(
        tmp_path / "reads.py",
        """
        import os, signal, sys, time
        from extract_logits import run_ahead

        def slow(items):
            time.sleep(0.02)
            return [(n, os.getpid()) for n in items]

        stopped = []
        for one in (signal.SIGINT, signal.SIGTERM):
            signal.signal(one, lambda number, frame: stopped.append(number))
        seen, workers = [], set()
        for (n, worker), in run_ahead(slow, [[n] for n in range(40)], processes=2):
            seen.append(n)
            workers.add(worker)
            if n == 4:
                print("ready", flush=True)
                while len(stopped) < 2:
                    time.sleep(0.01)
        print(seen == list(range(40)), len(workers), flush=True)
        """,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    os.killpg(process.pid, signal.SIGINT)
    os.killpg(process.pid, signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert out == "True 2\n"
    assert err == ""
    assert process.returncode == 0


def test_workers_end_with_a_run_that_fails_while_they_work(tmp_path: Path) -> None:
    process = start_script(
        tmp_path / "fails.py",
        """
        import os
        from extract_logits import run_ahead

        def who(items):
            return os.getpid()

        def fail(made):
            print(next(made), next(made), flush=True)
            raise RuntimeError("a bug")

        fail(run_ahead(who, ([n] for n in range(10**6)), processes=2))
        """,
    )
    out, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert err.strip().endswith("RuntimeError: a bug")
    assert not alive(out)


def test_workers_end_with_a_run_that_is_killed(tmp_path: Path) -> None:
    process = start_script(
        tmp_path / "dies.py",
        """
        import os, signal
        from extract_logits import run_ahead

        def who(items):
            return os.getpid()

        made = run_ahead(who, ([n] for n in range(10**6)), processes=2)
        print(next(made), next(made), flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
        """,
    )
    out, _ = process.communicate(timeout=60)
    end = time.monotonic() + 20  # a worker looks for its parent every five seconds
    while alive(out) and time.monotonic() < end:
        time.sleep(0.1)
    assert not alive(out)


def test_ctrl_c_on_a_terminal_stops_a_run_with_workers_cleanly(tmp_path: Path) -> None:
    save_teacher(tmp_path / "model", 300)
    chats = (json.dumps(chat(f"{n} {'x' * (n % 60)}")) + "\n" for n in range(2000))
    (tmp_path / "chats.jsonl").write_text("".join(chats))
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "extract_logits.py"), "--model", str(tmp_path / "model"),
         "--dataset", str(tmp_path / "chats.jsonl"), "--output", str(tmp_path / "out"),
         "--cache-dir", str(tmp_path / "cache"), "--max-batch-size", "4"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    assert process.stderr is not None
    seen = ""
    while "INFO teacher" not in seen:  # the next thing is to start the workers that load batches
        line = process.stderr.readline()
        assert line, seen
        seen += line
    assert "in 0 processes" not in seen
    time.sleep(0.3)
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 130, err
    assert json.loads(out.splitlines()[-1])["exit_code"] == 130
    assert "Traceback" not in seen + err
    assert "stopping after this batch" in err


def test_what_a_worker_gets_can_be_sent_to_another_process() -> None:
    """Where processes are not forked, their task travels as bytes."""
    rows = [chat("hello")]
    dataset = ConversationDataset(prepared_of(rows), encoder_of(rows[0]))
    task = WorkerTask(functools.partial(read_batch, dataset))
    batch = pickle.loads(pickle.dumps(task)).__getitems__([0])
    np.testing.assert_array_equal(batch.rows[0].input_ids, dataset[0].input_ids)
    error = pickle.loads(pickle.dumps(TemplateError("no: see --chat-template")))
    assert str(error) == "no: see --chat-template"


def alive(pids: str) -> list[int]:
    """Return which of two processes run; one that nobody has waited for yet does not."""
    assert len(set(pids.split())) == 2
    stats = {pid: Path(f"/proc/{pid}/stat") for pid in pids.split()}
    return [
        int(pid)
        for pid, stat in stats.items()
        if stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"
    ]


def test_few_rows_need_no_processes_and_many_need_no_more_than_sixteen() -> None:
    assert extract_logits.worker_processes(0) == 0
    assert extract_logits.worker_processes(511) == 0
    assert 1 <= extract_logits.worker_processes(10**9) <= 16


@pytest.mark.parametrize(
    ("processors", "measuring", "beside"),
    [(1, 1, 1), (2, 1, 1), (8, 7, 6), (16, 15, 12), (99, 16, 16)],
)
def test_all_processors_but_one_measure_and_three_quarters_work_beside_the_teacher(
    processors: int, measuring: int, beside: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    used = []

    def note(make: Any, batches: Any, *, processes: int, **_: Any) -> Iterator[Any]:
        used.append(processes)
        return iter(())

    class Rows:
        prepared = SimpleNamespace(encoded=None)

        def __len__(self) -> int:
            return 10**6

    monkeypatch.setattr(extract_logits, "count_processors", lambda: processors)
    monkeypatch.setattr(extract_logits, "run_ahead", note)
    assert extract_logits.worker_processes(10**6) == measuring
    assert list(extract_logits.load_batches(Rows(), [])) == []
    assert used == [beside]
