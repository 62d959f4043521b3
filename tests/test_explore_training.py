"""Rows to train on: what they hold, their order, how they are divided, going on from a state."""

from __future__ import annotations

import itertools
import json
import os
import pickle
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from conftest import CHATS, ROOT, TEACHER, run_script
from small_output import SETTINGS, random_rows, rows_to_table, write_output
from torch.utils.data import DataLoader, IterableDataset

import explore_logits
from explore_logits import (
    FormatError,
    LogitIterableDataset,
    LogitsError,
    collate_logits,
    dequantize_all_logits,
    distillation_loss,
    get_sample,
    load_logit_dataset,
    open_text,
)

STORED: dict[str, Any] = {**SETTINGS, "store_tokens": True}


@pytest.fixture
def output(tmp_path: Path) -> Path:
    """Return an output of 20 rows in three shards that stores its tokens."""
    return write_output(tmp_path / "out", random_rows(20, settings=STORED), settings=STORED)


@pytest.fixture(scope="session")
def extracted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the embedded teacher's logits of 24 conversations, without their tokens."""
    folder = tmp_path_factory.mktemp("extracted")
    done = run_script(
        "extract_logits.py",
        *("--model", TEACHER, "--dataset", CHATS, "--index-col", "id", "--limit", 24),
        *("--upload-every", 10, "--cache-dir", folder / "cache", "--output", folder / "logits"),
    )
    assert done.code == 0, done.stderr
    return folder / "logits"


def indices(dataset: Any) -> list[int]:
    """Return the conversations that a dataset yields, in order."""
    return [row["index"] for row in dataset]


def loader_indices(loader: Any) -> list[int]:
    """Return the conversations that a loader yields, in order."""
    return [index for batch in loader for index in batch["index"].tolist()]


def test_a_row_holds_the_text_and_everything_stored_of_each_token(output: Path) -> None:
    dataset = load_logit_dataset(output)
    for i, row in enumerate(LogitIterableDataset(output, seed=None)):
        sample = get_sample(dataset, i)
        assert row["index"] == sample["index"]
        np.testing.assert_array_equal(row["input_ids"], sample["input_ids"])
        extracted = np.flatnonzero(row["labels"] != -100)
        np.testing.assert_array_equal(extracted, sample["token_positions"])
        np.testing.assert_array_equal(row["labels"][extracted], row["input_ids"][extracted])
        for t in range(sample["num_tokens"]):
            ids, logits = dequantize_all_logits(sample, t)
            there = row["teacher_mask"][t]
            np.testing.assert_array_equal(row["teacher_ids"][t][there], ids)
            log_probs = logits - sample["logsumexp"][t]
            np.testing.assert_allclose(row["teacher_log_probs"][t][there], log_probs, atol=1e-5)
            assert row["teacher_tail_mask"][t].sum() == SETTINGS["sampled_n"]
            in_nucleus = there & ~row["teacher_tail_mask"][t]
            assert in_nucleus.sum() == sample["top_counts"][t]
            assert (row["teacher_log_weights"][t][in_nucleus] == 0).all()
            mass = np.exp(row["teacher_log_probs"][t][in_nucleus], dtype=np.float64).sum()
            assert np.exp(row["teacher_log_rest"][t]) == pytest.approx(1 - mass, abs=2e-6)


def test_a_batch_points_each_token_at_the_position_that_predicts_it(output: Path) -> None:
    rows = list(LogitIterableDataset(output, seed=None))[:5]
    batch = collate_logits(rows, pad_id=7)
    count, longest = batch["input_ids"].shape
    assert (count, longest) == (5, max(row["input_ids"].size for row in rows))
    predicted = batch["teacher_positions"] + 1
    actual = torch.cat(
        [torch.from_numpy(row["input_ids"][row["teacher_positions"]]) for row in rows]
    )
    assert (batch["input_ids"].reshape(-1)[predicted] == actual).all()
    assert (batch["labels"].reshape(-1)[predicted] == actual).all()
    assert (
        int((batch["labels"] != -100).sum()) == predicted.numel() == batch["teacher_ids"].shape[0]
    )
    assert (batch["input_ids"][batch["attention_mask"] == 0] == 7).all()
    assert batch["teacher_ids"].dtype == torch.int64


def test_without_a_seed_rows_come_in_the_order_of_the_output(output: Path) -> None:
    assert indices(LogitIterableDataset(output, seed=None)) == list(range(20))


def test_a_seed_and_an_epoch_fix_an_order_that_holds_every_row_once(output: Path) -> None:
    dataset = LogitIterableDataset(output, seed=3)
    first = indices(dataset)
    assert sorted(first) == list(range(20))
    assert first != list(range(20))
    assert indices(LogitIterableDataset(output, seed=3)) == first
    assert indices(LogitIterableDataset(output, seed=4)) != first
    dataset.set_epoch(1)
    second = indices(dataset)
    assert sorted(second) == sorted(first)
    assert second != first


@pytest.mark.parametrize(("world", "workers"), [(1, 3), (3, 1), (2, 2), (4, 3)])
def test_ranks_and_workers_divide_the_rows_evenly(output: Path, world: int, workers: int) -> None:
    seen: Counter[int] = Counter()
    sizes = []
    for rank in range(world):
        dataset: Any = LogitIterableDataset(output, rank=rank, world_size=world)
        runs = [dataset.row_range(worker, workers) for worker in range(workers)]
        mine = [
            (shard, row)
            for first, last in runs
            for shard, rows in dataset.iter_runs(first, last, epoch=0)
            for row in rows.tolist()
        ]
        sizes.append(len(mine))
        seen.update(8 * shard + row for shard, row in mine)
    assert len(set(sizes)) == 1, "every rank takes as many steps"
    assert sizes[0] == 20 // world
    assert set(seen.values()) == {1}, "no row goes to two ranks"


@pytest.mark.parametrize("workers", [0, 2])
def test_a_data_loader_gives_every_row_once(output: Path, workers: int) -> None:
    dataset: Any = LogitIterableDataset(output, seed=5)
    assert isinstance(dataset, IterableDataset)
    assert isinstance(dataset, LogitIterableDataset)
    loader: Any = DataLoader(dataset, batch_size=3, num_workers=workers, collate_fn=collate_logits)
    assert sorted(loader_indices(loader)) == list(range(20))


def test_workers_that_live_on_see_the_next_epoch(output: Path) -> None:
    dataset: Any = LogitIterableDataset(output, seed=5)
    loader: Any = DataLoader(
        dataset, batch_size=3, num_workers=1, collate_fn=collate_logits, persistent_workers=True
    )
    first = loader_indices(loader)
    dataset.set_epoch(1)
    assert loader_indices(loader) != first


@pytest.mark.parametrize(("workers", "batches"), [(0, 0), (0, 3), (0, 7), (2, 1), (2, 5)])
def test_a_state_goes_on_with_exactly_what_was_left(
    output: Path, workers: int, batches: int
) -> None:
    def make(dataset: Any) -> Any:
        return DataLoader(dataset, batch_size=3, num_workers=workers, collate_fn=collate_logits)

    whole = loader_indices(make(LogitIterableDataset(output, seed=2)))
    dataset: Any = LogitIterableDataset(output, seed=2)
    given = loader_indices(itertools.islice(make(dataset), batches))
    state = json.loads(
        json.dumps(dataset.state_dict(batches=batches, batch_size=3, num_workers=workers))
    )
    again: Any = LogitIterableDataset(output, seed=2)
    again.load_state_dict(state)
    left = loader_indices(make(again))
    assert sorted(given + left) == sorted(whole)
    if workers < 2:
        assert given + left == whole
    again.set_epoch(1)
    assert sorted(loader_indices(make(again))) == sorted(whole), "the next epoch is a whole one"


def test_a_state_can_be_taken_inside_the_loop(output: Path) -> None:
    dataset: Any = LogitIterableDataset(output, seed=2)
    rows: Iterator[dict[str, Any]] = iter(dataset)
    before = [next(rows)["index"] for _ in range(11)]
    again: Any = LogitIterableDataset(output, seed=2)
    again.load_state_dict(dataset.state_dict())
    assert before + indices(again) == indices(LogitIterableDataset(output, seed=2))


def test_a_pass_that_was_broken_off_is_not_continued_unasked(output: Path) -> None:
    dataset: Any = LogitIterableDataset(output, seed=2)
    whole = indices(dataset)
    rows = iter(dataset)
    assert [next(rows)["index"] for _ in range(5)] == whole[:5]
    assert indices(dataset) == whole


def test_a_state_of_another_seed_or_of_more_workers_is_refused(output: Path) -> None:
    dataset: Any = LogitIterableDataset(output, seed=2)
    state = dataset.state_dict(batches=4, batch_size=2, num_workers=3)
    with pytest.raises(LogitsError, match="seed 2"):
        LogitIterableDataset(output, seed=1).load_state_dict(state)
    dataset.load_state_dict(state)
    with pytest.raises(LogitsError, match="3 or more workers"):
        next(iter(dataset))


def test_a_dataset_travels_to_a_process_that_was_started_anew(output: Path) -> None:
    dataset: Any = LogitIterableDataset(output, seed=2, max_seq_len=9)
    copy = pickle.loads(pickle.dumps(dataset))
    assert isinstance(copy, IterableDataset)
    assert indices(copy) == indices(dataset)


def test_long_conversations_are_cut_with_their_teacher(output: Path) -> None:
    whole = {row["index"]: row for row in LogitIterableDataset(output)}
    for row in LogitIterableDataset(output, max_seq_len=6):
        size = row["input_ids"].size
        assert size <= 6
        kept = row["teacher_positions"].size
        assert 0 < kept == row["teacher_ids"].shape[0] == row["teacher_log_rest"].size
        assert row["teacher_positions"].max() < size
        np.testing.assert_array_equal(row["input_ids"], whole[row["index"]]["input_ids"][:size])
    assert not list(LogitIterableDataset(output, max_seq_len=3)), "prompts alone teach nothing"


def test_tokens_that_are_not_stored_are_rendered_again(extracted: Path) -> None:
    dataset: Any = LogitIterableDataset(extracted, seed=0)
    text = open_text(extracted)
    rows = list(dataset)
    assert len(rows) == 24
    for row in rows[:6]:
        encoded = text.encode(row["index"])
        np.testing.assert_array_equal(row["input_ids"], encoded.input_ids)
        np.testing.assert_array_equal(row["teacher_positions"], encoded.token_positions)


def test_the_teacher_itself_has_no_divergence_from_its_stored_logits(extracted: Path) -> None:
    from transformers import AutoModelForCausalLM

    teacher: Any = AutoModelForCausalLM.from_pretrained(TEACHER, dtype=torch.float32)
    loader: Any = DataLoader(
        LogitIterableDataset(extracted), batch_size=8, collate_fn=collate_logits
    )
    batch = next(iter(loader))
    with torch.no_grad():
        logits = teacher(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]
        ).logits[..., :5000]
    for divergence in ("forward_kl", "jsd"):
        for tail in ("unbiased", "ghost", "renormalized"):
            each = distillation_loss(
                logits, batch, divergence=divergence, tail=tail, reduction="none"
            )
            assert float(each.abs().max()) < 1e-3, (divergence, tail)
    shifted = {**batch, "teacher_positions": batch["teacher_positions"] - 1}
    assert float(distillation_loss(logits, shifted, tail="ghost")) > 1, "an offset would be seen"


def test_tails_of_different_sizes_in_one_output_are_refused(tmp_path: Path) -> None:
    folder = write_output(tmp_path / "out", random_rows(8, settings=STORED), settings=STORED)
    other = {**STORED, "sampled_n": 5}
    rows = random_rows(8, settings=other, seed=1)
    mixed = random_rows(4, settings=STORED) + rows[:4]
    path = folder / "data" / "part-00000.parquet"
    pq.write_table(rows_to_table(mixed, settings=STORED), path)
    with pytest.raises(FormatError, match="differ in size"):
        list(LogitIterableDataset(folder, seed=None))


def test_a_rank_outside_the_world_is_refused(output: Path) -> None:
    with pytest.raises(LogitsError, match=r"rank 2 is not in 0\.\.1"):
        LogitIterableDataset(output, rank=2, world_size=2)


def test_rank_and_world_size_come_from_the_environment(
    output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    dataset: Any = LogitIterableDataset(output)
    assert dataset.row_range() == (10, 20)


def test_the_names_are_there_without_torch_and_using_them_says_what_is_missing() -> None:
    script = (
        "import sys; sys.modules['torch'] = None\n"
        "from explore_logits import LogitIterableDataset, LogitsError, distillation_loss\n"
        "for use in (lambda: LogitIterableDataset('x'), lambda: distillation_loss(0, {})):\n"
        "    try: use()\n"
        "    except LogitsError as error: print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, check=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.stdout.count("torch is needed for this") == 2
    assert {"LogitIterableDataset", "distillation_loss"} <= set(explore_logits.__all__)
