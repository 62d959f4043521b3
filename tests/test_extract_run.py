"""Section 10 of `extract_logits.py`: whole runs of `main`, in this process."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import CHATS, TEACHER, Write, chat, rows_of
from huggingface_hub import HfApi
from outputs import Output
from tiny_teachers import tiny_model, tiny_tokenizer

import explore_logits
import extract_logits
from explore_logits import SCHEMA, load_tokenizer


@pytest.fixture
def source(write_chats: Write) -> Path:
    """Thirty conversations in ./chats.jsonl."""
    return write_chats(rows_of(30))


def test_a_run_stores_every_row_and_says_so(extract):
    job = {"model": TEACHER, "dataset": CHATS, "limit": 40, "upload_every": 15}
    done = extract(**job, store_tokens=True)
    output, summary = Output("out"), done.passed()
    rows, paths = output.rows(), output.part_paths().values()
    assert summary["rows"] == len(rows) == 40
    assert summary["tokens"] == sum(row["num_tokens"] for row in rows.values())
    assert summary["shards"] == len(paths) == 3
    assert summary["bytes"] == sum(len(output.read(path)) for path in paths)
    assert (summary["output"], summary["skipped"]) == ("./out", {})
    assert len(done.stdout.splitlines()) == 1
    assert output.table(0).schema.names == [*SCHEMA.names, "input_ids", "token_positions"]
    # batches of another shape and a stream store the same rows
    extract(**job, max_batch_size=1, output="./one").passed()
    extract(**job, streaming=True, max_batch_tokens=6000, output="./stream").passed()
    for others in (Output("one").rows(), Output("stream").rows()):
        assert list(others) == list(rows)
        for index, row in rows.items():
            np.testing.assert_allclose(others[index]["logsumexp"], row["logsumexp"], atol=2e-5)


def test_the_runtime_limit_stops_resumably(extract, source):
    done = extract(limit=8, max_runtime_minutes=0.0001)
    assert (done.code, done.summary["exit_code"]) == (75, 75)
    assert (done.summary["rows"] or 0) < 8  # null: it ended before it knew what the output holds
    assert extract(limit=8, resume=True).code == 0
    assert Output("out").ids() == list(range(8))


def test_a_stop_keeps_the_rows_of_parts_under_way(extract, source, monkeypatch):
    real, seen = extract_logits.gpu_process_batch, list[int]()

    def stop_at_the_third(teacher: Any, batch: Any, **settings: Any) -> Any:
        seen.extend(row.index for row in batch.rows)
        if len(seen) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(teacher, batch, **settings)

    monkeypatch.setattr(extract_logits, "gpu_process_batch", stop_at_the_third)
    job = {"limit": 8, "max_batch_size": 1, "resume": True}
    assert extract(**job).code == 143
    assert extract(**job).passed()["rows"] == 8
    assert sorted(seen) == Output("out").ids() == list(range(8))


def broken_teacher(folder: Path, letter: str | None) -> Path:
    """Save a teacher with a NaN in its norm, or in one row of its embedding."""
    model, tokenizer = tiny_model(300), tiny_tokenizer(300)
    with torch.no_grad():
        if letter is None:
            model.model.norm.weight[0] = float("nan")
        else:
            model.model.embed_tokens.weight[tokenizer(letter)["input_ids"][0]] = float("nan")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("why", ["no_assistant", "unusable_logits"])
def test_nothing_usable_is_an_error_and_not_an_empty_run(why, extract, write_chats, tmp_path):
    """Also where the teacher has run and parts are whole."""
    write_chats([{"messages": chat("yes")[: 1 if why == "no_assistant" else 2]}] * 2)
    job = {} if why == "no_assistant" else {"model": broken_teacher(tmp_path / "all", None)}
    done = extract(**job, upload_every=1, max_batch_size=1)
    assert done.code == 2
    assert f"nothing to extract: skipped 2 {why}" in done.stderr.splitlines()[-1]
    assert not [*Path("out").rglob("*.parquet"), *Path("cache").rglob("*.parquet")]


def test_a_row_with_nan_logits_is_left_out_and_named(extract, write_chats, tmp_path):
    write_chats([{"messages": chat("Q" if n == 5 else "z" * n)} for n in range(1, 13)])
    done = extract(model=broken_teacher(tmp_path / "broken", "Q"), max_batch_size=4)
    assert done.passed()["skipped"] == {"unusable_logits": 1}
    assert done.summary["rows"] == 11
    assert "skipped conversation 4: unusable_logits" in done.stderr
    done = extract(model=broken_teacher(tmp_path / "all", None), max_batch_size=2, output="./no")
    assert (done.code, "no usable logits" in done.stderr) == (2, True)


def test_out_of_memory_halves_the_batch_and_goes_on(extract, source, monkeypatch):
    real, sizes = extract_logits.gpu_process_batch, []

    def small_device(teacher: Any, batch: Any, **settings: Any) -> Any:
        sizes.append(len(batch.rows) * max(row.input_ids.size for row in batch.rows))
        if sizes[-1] > 300:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(teacher, batch, **settings)

    monkeypatch.setattr(extract_logits, "gpu_process_batch", small_device)
    assert extract(max_batch_tokens=1000).passed()["rows"] == 30
    assert 0 < sum(size > 300 for size in sizes) < 4
    assert Output("out").ids() == list(range(30))


def test_bad_conversations_and_their_neighbours(extract, source, monkeypatch):
    """One in each of the first batches spoils its batch: the run goes on and can be resumed."""
    bad: set[int] = set()
    real = extract_logits.cpu_postprocess_batch

    def leak(result: Any, batch: Any, **options: Any) -> Any:
        if len(batch.rows) > 1:
            bad.add(batch.rows[-1].index)
        if bad & {row.index for row in batch.rows}:  # NaN reaches its neighbours
            result.usable = np.zeros_like(result.usable)
        return real(result, batch, **options)

    monkeypatch.setattr(extract_logits, "cpu_postprocess_batch", leak)
    assert extract(limit=12, max_batch_size=6).passed()["rows"] == 12 - len(bad)
    assert len(bad) > 1
    summary = extract(limit=12, max_batch_size=6, resume=True).passed()
    assert (summary["new_rows"], summary["skipped"]) == (0, {"unusable_logits": len(bad)})


@pytest.mark.parametrize(
    "options",
    [{"top_p": "1.0"}, {"top_p_max": 1, "sampled_n": 1, "logit_bits": 4},
     {"sampled_n": 0, "top_p": "1e-9", "store_tokens": True, "include_end": True}],
    ids=str,
)  # fmt: skip
def test_runs_at_the_edge_of_the_settings_and_of_ids_are_valid(options, extract, write_chats):
    ids = [-(2**31), -5, 0, 2**31 - 1]
    write_chats(rows_of(4, id=ids))
    assert extract(index_col="id", **options).code == 0
    assert explore_logits.validate_output("out").ok
    assert Output("out").ids() == ids


def test_a_resumed_run_keeps_to_the_commits_it_began_with(hub, extract, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("datasets.config.HF_ENDPOINT", hub.endpoint)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "data"))
    lines = CHATS.read_text(encoding="utf-8").splitlines()[:6]
    api = HfApi(endpoint=hub.endpoint, token=hub.token)
    api.create_repo("tester/model")
    api.create_repo("tester/chats", repo_type="dataset")
    api.upload_folder(repo_id="tester/model", folder_path=TEACHER)
    source, output = Output("tester/chats", hub), Output("tester/logits", hub)
    source.write("chats.jsonl", "\n".join(lines).encode())
    job = {"model": "tester/model", "dataset": source.name, "output": output.name}
    extract(**job, store_tokens=True, limit=3).passed()
    settings = output.json("extraction_config.json")
    assert settings["model_revision"] == api.model_info("tester/model").sha
    assert settings["dataset_revision"] == api.dataset_info("tester/chats").sha
    source.write("chats.jsonl", "\n".join(lines[::-1]).encode())
    other = {"path_or_fileobj": b"{{ 1 }}", "path_in_repo": "chat_template.jinja"}
    api.upload_file(repo_id="tester/model", **other)
    extract(**job, store_tokens=True, resume=True).passed()
    resumed = output.json("extraction_config.json")
    assert {name for name in settings if resumed[name] != settings[name]} <= {"limit", "options"}
    Path("chats.jsonl").write_text("\n".join(lines), encoding="utf-8")
    assert extract(model=TEACHER, store_tokens=True).code == 0
    assert output.rows() == Output("out").rows()


def test_a_run_resumed_another_day_keeps_the_date(extract, source, model, monkeypatch):
    """That it tells the template."""
    own = (model / "chat_template.jinja").read_text(encoding="utf-8")
    Path("dated.jinja").write_text("{{ strftime_now('%d %B %Y') }}" + own)
    job = {"chat_template": "dated.jinja", "store_tokens": True}
    for day, limit in (("2030-05-09", 2), ("2030-05-10", 4)):
        monkeypatch.setattr(explore_logits, "date_of_today", lambda day=day: day)
        assert extract(**job, limit=limit, resume=True).passed()["rows"] == limit
    tokenizer = load_tokenizer(str(model))
    rows = Output("out").rows().values()
    assert {tokenizer.decode(row["input_ids"])[:11] for row in rows} == {"09 May 2030"}
    assert explore_logits.main(["out", "--sample", "0-3"]) == 0


def test_another_size_of_parts_is_not_passed_over_without_a_word(extract, source, caplog):
    for every, warned in ((2, False), (2, False), (1, True)):
        assert extract(upload_every=every, limit=4, resume=True).code == 0
        assert ("--upload-every 1: the job was begun with 2" in caplog.text) == warned
