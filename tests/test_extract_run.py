"""The whole way through `extract_logits.main`, in this process, on the embedded teacher."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import CHATS, ROOT, TEACHER
from huggingface_hub import HfApi
from loopback_hub import LoopbackHub
from transformers import AutoModelForCausalLM, AutoTokenizer

import compute_lengths
import explore_logits
import extract_logits
from explore_logits import (
    METADATA_SETTINGS,
    SCHEMA,
    ConversationEncoder,
    dequantize_logits,
    load_chat_template,
    load_logit_dataset,
    load_tokenizer,
    resolve_columns,
    unpack_indices,
)

Extract = Callable[..., tuple[int, dict[str, Any], str]]


@pytest.fixture
def extract(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Extract:
    """Run `main` with a model, a source and an output; returns code, summary and stderr."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)

    def run(
        *args: object, source: Path = CHATS, model: Path = TEACHER, output: str = "out"
    ) -> tuple[int, dict[str, Any], str]:
        capsys.readouterr()
        code = extract_logits.main(
            [
                *("--model", str(model), "--dataset", str(source)),
                *("--output", str(tmp_path / output), "--cache-dir", str(tmp_path / "cache")),
                *map(str, args),
            ]
        )
        out, err = capsys.readouterr()
        lines = out.strip().splitlines()
        return code, json.loads(lines[-1]) if lines else {}, err

    return run


def read_rows(folder: Path) -> pa.Table:
    """Read every shard, sorted by index."""
    parts = [pq.read_table(path) for path in sorted((folder / "data").glob("*.parquet"))]
    return pa.concat_tables(parts).sort_by("index")


def assert_same_rows(one: pa.Table, other: pa.Table) -> None:
    """Same rows; floats to rounding, quantized values within a step, ids but for near ties."""
    assert one["index"].to_pylist() == other["index"].to_pylist()
    for name in SCHEMA.names:
        left, right = one[name].to_pylist(), other[name].to_pylist()
        if name in ("top_min", "top_max", "sampled_min", "sampled_max", "logsumexp"):
            for a, b in zip(left, right, strict=True):
                np.testing.assert_allclose(a, b, atol=2e-5)
        elif name == "top_logits_quantized":
            for a, b in zip(left, right, strict=True):
                assert np.abs(np.asarray(a, int) - np.asarray(b, int)).max(initial=0) <= 1
        elif name.endswith("_low"):
            for a, b in zip(left, right, strict=True):
                assert np.mean(np.asarray(a) != np.asarray(b)) < 0.02, name
        elif not name.startswith("sampled"):
            assert left == right, name


def test_a_run_stores_every_row_and_says_so(extract: Extract, tmp_path: Path) -> None:
    code, summary, err = extract("--limit", 40, "--upload-every", 15, "--store-tokens")
    assert code == 0, err
    table = read_rows(tmp_path / "out")
    assert summary["rows"] == table.num_rows == 40
    assert summary["tokens"] == sum(table["num_tokens"].to_pylist())
    assert summary["shards"] == len(list((tmp_path / "out" / "data").iterdir())) == 3
    assert summary["bytes"] == sum(
        path.stat().st_size for path in (tmp_path / "out" / "data").iterdir()
    )
    assert summary["output"] == str(tmp_path / "out")
    assert summary["tokens_per_second"] > 0
    assert table.schema.names[:14] == SCHEMA.names
    assert table.schema.names[14:] == ["input_ids", "token_positions"]
    for name in ("checkpoint.json", "extraction_config.json", "chat_template.jinja", "README.md"):
        assert (tmp_path / "out" / name).stat().st_size > 0


def test_row_token_j_is_the_distribution_that_predicts_token_j(
    extract: Extract, tmp_path: Path
) -> None:
    assert extract("--limit", 6, "--store-tokens")[0] == 0
    model = AutoModelForCausalLM.from_pretrained(TEACHER, dtype=torch.float32).eval()
    for row in read_rows(tmp_path / "out").to_pylist():
        ids = torch.tensor([row["input_ids"]])
        with torch.inference_mode():
            expected = model(ids).logits[0].double().numpy()
        tops = unpack_indices(row["top_indices_low"], row["top_indices_high"], row["top_counts"])
        quantized = np.split(
            np.asarray(row["top_logits_quantized"]), np.cumsum(row["top_counts"])[:-1]
        )
        for j, position in enumerate(row["token_positions"]):
            before = expected[position - 1]
            assert tops[j][0] == before.argmax()
            logits = dequantize_logits(quantized[j], row["top_min"][j], row["top_max"][j])
            np.testing.assert_allclose(logits, before[tops[j]], atol=5e-4)


def test_files_are_read_without_our_code(extract: Extract, tmp_path: Path) -> None:
    assert extract("--limit", 12)[0] == 0
    import datasets

    files = str(tmp_path / "out" / "data" / "*.parquet")
    loaded = datasets.load_dataset(
        "parquet", data_files=files, split="train", cache_dir=str(tmp_path / "hf")
    )
    shard = next((tmp_path / "out" / "data").iterdir())
    frame = pd.read_parquet(shard)
    assert loaded.num_rows == len(frame) == pq.read_metadata(shard).num_rows == 12
    assert loaded[0]["num_tokens"] == frame["num_tokens"][0]
    settings = json.loads(pq.read_schema(shard).metadata[METADATA_SETTINGS])
    assert settings["top_p"] == 0.98
    assert settings["model"] == str(TEACHER)


def test_batches_of_another_shape_store_the_same_rows(extract: Extract, tmp_path: Path) -> None:
    assert extract("--limit", 30, "--max-batch-size", 1, output="one")[0] == 0
    assert extract("--limit", 30, "--max-batch-tokens", 6000, output="many")[0] == 0
    assert_same_rows(read_rows(tmp_path / "one"), read_rows(tmp_path / "many"))


def test_a_stream_stores_the_same_rows(extract: Extract, tmp_path: Path) -> None:
    chosen = ["--limit", 25, "--start-offset", 3]
    assert extract(*chosen, output="map")[0] == 0
    assert extract(*chosen, "--streaming", output="stream")[0] == 0
    assert_same_rows(read_rows(tmp_path / "map"), read_rows(tmp_path / "stream"))


def test_resume_with_nothing_left_changes_nothing(extract: Extract, tmp_path: Path) -> None:
    assert extract("--limit", 10)[0] == 0
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    code, summary, _ = extract("--limit", 10, "--resume")
    assert (code, summary["rows"], summary["new_rows"]) == (0, 10, 0)
    assert before == {
        path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()
    }


def test_a_larger_limit_resumes_with_the_rows_that_are_missing(
    extract: Extract, tmp_path: Path
) -> None:
    assert extract("--limit", 10)[0] == 0
    code, summary, _ = extract("--limit", 17, "--resume")
    assert (code, summary["rows"], summary["new_rows"]) == (
        0,
        17,
        17,
    )  # the only part is made again
    assert len(set(read_rows(tmp_path / "out")["index"].to_pylist())) == 17


def test_an_output_with_shards_is_refused_without_resume(extract: Extract) -> None:
    assert extract("--limit", 4)[0] == 0
    code, _, err = extract("--limit", 4)
    assert code == 2
    assert "--resume" in err
    assert "--force-restart" in err


def test_other_settings_are_refused_with_the_differences(extract: Extract) -> None:
    assert extract("--limit", 4)[0] == 0
    code, _, err = extract("--limit", 4, "--resume", "--top-p", 0.9)
    assert code == 2
    assert "top_p" in err
    assert "0.98" in err
    assert "0.9" in err


def test_force_restart_starts_over(extract: Extract, tmp_path: Path) -> None:
    assert extract("--limit", 9, "--upload-every", 2)[0] == 0
    code, summary, _ = extract("--limit", 4, "--force-restart", "--top-p", 0.9)
    assert (code, summary["rows"], summary["shards"]) == (0, 4, 1)
    assert read_rows(tmp_path / "out").num_rows == 4


def test_the_runtime_limit_stops_resumably(extract: Extract, tmp_path: Path) -> None:
    code, summary, _ = extract("--limit", 8, "--max-runtime-minutes", 0.0001)
    assert (code, summary["exit_code"]) == (75, 75)
    assert (summary["rows"] or 0) < 8  # null: it ended before it knew what the output holds
    assert extract("--limit", 8, "--resume")[0] == 0
    assert read_rows(tmp_path / "out")["index"].to_pylist() == list(range(8))


def test_unusable_conversations_are_counted_and_named(
    extract: Extract, write_chats: Callable[[list[Any]], Path], chats: list[dict[str, Any]]
) -> None:
    long = [
        {"role": "user", "content": "count"},
        {"role": "assistant", "content": "one two three " * 400},
    ]
    source = write_chats(
        [
            {"messages": chats[0]["messages"]},
            {"messages": []},
            {"messages": None},
            {"messages": [{"role": "user", "content": "is anybody there?"}]},
            {"messages": long},
            {"messages": chats[1]["messages"]},
        ]
    )
    code, summary, err = extract("--max-seq-len", 400, source=source)
    assert code == 0, err
    assert summary["rows"] == 2
    assert sum(summary["skipped"].values()) == 4
    assert summary["skipped"]["too_long"] == 1
    for number in (1, 2, 3, 4):
        assert f"skipped conversation {number}:" in err


def test_nothing_usable_is_an_error_and_not_an_empty_run(
    extract: Extract, write_chats: Callable[[list[Any]], Path], tmp_path: Path
) -> None:
    source = write_chats([{"messages": [{"role": "user", "content": "hello?"}]}] * 3)
    code, _, err = extract(source=source)
    assert code == 2
    assert "nothing to extract" in err
    assert not list((tmp_path / "out").rglob("*.parquet"))


def broken_teacher(folder: Path, token: int | None) -> Path:
    """Save the embedded teacher with a NaN in its norm, or in one row of its embedding."""
    model = AutoModelForCausalLM.from_pretrained(TEACHER, dtype=torch.float32)
    with torch.no_grad():
        if token is None:
            model.model.norm.weight[0] = float("nan")
        else:
            model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.clone())
            model.config.tie_word_embeddings = False
            model.model.embed_tokens.weight[token] = float("nan")
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(TEACHER).save_pretrained(folder)
    return folder


def test_a_row_with_nan_logits_is_left_out_and_named(extract: Extract, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(TEACHER)
    chats = [json.loads(line) for line in CHATS.read_text(encoding="utf-8").splitlines()[:20]]
    texts = [
        set(tokenizer.apply_chat_template(chat["messages"], return_dict=True)["input_ids"])
        for chat in chats
    ]
    token = next(token for token in sorted(texts[5]) if sum(token in text for text in texts) == 1)
    model = broken_teacher(tmp_path / "broken", token)
    code, summary, err = extract("--limit", 20, model=model)
    assert code == 0, err
    assert summary["rows"] == 19
    assert summary["skipped"] == {"unusable_logits": 1}
    assert "skipped conversation 5: unusable_logits" in err


def test_a_teacher_that_gives_only_nan_stops_the_run(extract: Extract, tmp_path: Path) -> None:
    model = broken_teacher(tmp_path / "broken", None)
    code, _, err = extract("--max-batch-size", 2, model=model)
    assert code == 2
    assert "no usable logits" in err


def test_out_of_memory_halves_the_batch_and_goes_on(
    extract: Extract, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = extract_logits.gpu_process_batch
    sizes: list[int] = []

    def small_device(teacher: Any, batch: Any, **settings: Any) -> Any:
        size = len(batch.rows) * max(row.input_ids.size for row in batch.rows)
        sizes.append(size)
        if size > 1000:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(teacher, batch, **settings)

    monkeypatch.setattr(extract_logits, "gpu_process_batch", small_device)
    code, summary, err = extract("--limit", 30, "--max-batch-tokens", 4000)
    assert (code, summary["rows"]) == (0, 30), err
    assert "going on with half" in err
    assert sum(size > 1000 for size in sizes) < 4
    assert read_rows(tmp_path / "out")["index"].to_pylist() == list(range(30))


def test_one_conversation_too_large_for_the_device_names_the_remedy(
    extract: Extract, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_device(*_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(extract_logits, "gpu_process_batch", no_device)
    code, _, err = extract("--limit", 4)
    assert code == 2
    assert "--max-seq-len" in err.strip().splitlines()[-1]


def refuse_logits(monkeypatch: pytest.MonkeyPatch, indices: set[int]) -> None:
    """Make the logits of some conversations unusable, as NaN would."""
    real = extract_logits.cpu_postprocess_batch

    def pack(result: Any, batch: Any, **options: Any) -> Any:
        refused = [
            np.full(row.token_positions.size, row.index in indices, bool) for row in batch.rows
        ]
        result.usable = result.usable & ~np.concatenate(refused)
        return real(result, batch, **options)

    monkeypatch.setattr(extract_logits, "cpu_postprocess_batch", pack)


def test_a_job_with_unusable_rows_can_be_resumed_to_its_end(
    extract: Extract, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse_logits(monkeypatch, {3, 9, 12, 17})
    options = ["--limit", 20, "--max-batch-size", 4]
    assert extract(*options)[0] == 0
    code, summary, err = extract(*options, "--resume")
    assert code == 0, err
    assert (summary["rows"], summary["new_rows"]) == (16, 0)
    assert summary["skipped"] == {"unusable_logits": 4}


def test_one_bad_conversation_in_each_of_the_first_batches_does_not_stop_the_run(
    extract: Extract, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad: set[int] = set()
    real = extract_logits.cpu_postprocess_batch

    def leak(result: Any, batch: Any, **options: Any) -> Any:
        if len(batch.rows) > 1:
            bad.add(batch.rows[-1].index)
        if bad & {row.index for row in batch.rows}:  # NaN reaches its neighbours
            result.usable = np.zeros_like(result.usable)
        return real(result, batch, **options)

    monkeypatch.setattr(extract_logits, "cpu_postprocess_batch", leak)
    code, summary, err = extract("--limit", 12, "--max-batch-size", 6)
    assert code == 0, err
    assert len(bad) > 1
    assert summary["rows"] == 12 - len(bad)


def test_loading_the_teacher_is_no_step_that_the_runtime_limit_keeps_time_for(
    extract: Extract, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [0.0]
    real = extract_logits.load_teacher

    def load_slowly(*args: Any, **options: Any) -> Any:
        clock[0] += 8 * 60
        return real(*args, **options)

    monkeypatch.setattr(extract_logits, "load_teacher", load_slowly)
    monkeypatch.setattr(extract_logits.time, "monotonic", lambda: clock[0])
    code, summary, err = extract("--limit", 5, "--max-runtime-minutes", 15)
    assert (code, summary["rows"]) == (0, 5), err


def test_the_runtime_limit_ends_waiting_for_an_output_out_of_reach(
    extract: Extract, monkeypatch: pytest.MonkeyPatch
) -> None:
    def out_of_reach(*_: Any) -> None:
        raise extract_logits.PassingError("HTTP 503")

    monkeypatch.setattr(extract_logits.Folder, "commit", out_of_reach)
    monkeypatch.setattr(extract_logits, "RETRY_WAITS_S", (100.0,) * 3)
    started = time.monotonic()
    code, summary, err = extract("--limit", 3, "--max-runtime-minutes", 0.2)
    assert code in (4, 75), err
    assert summary["rows"] == 0
    assert time.monotonic() - started < 60


def test_a_refusal_says_where_the_files_are(
    extract: Extract,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def refuse(*_: Any) -> None:
        raise extract_logits.HubError("HTTP 403")

    monkeypatch.setattr(extract_logits.Folder, "commit", refuse)
    assert extract("--limit", 5, "--upload-every", 2)[0] == 4
    (cache,) = (tmp_path / "cache").iterdir()
    assert f"kept in {cache} for --resume" in caplog.text


def test_a_reader_of_the_log_that_is_gone_does_not_change_how_a_signal_ends_the_run(
    tmp_path: Path,
) -> None:
    reading, writing = os.pipe()
    child = subprocess.Popen(
        [
            *(sys.executable, str(ROOT / "extract_logits.py")),
            *("--model", str(TEACHER), "--dataset", str(CHATS), "--output", str(tmp_path / "out")),
            *("--cache-dir", str(tmp_path / "cache"), "--max-batch-size", "1"),
        ],
        stdout=writing,
        stderr=writing,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
    )
    os.close(writing)
    seen = b""
    while b"INFO teacher" not in seen:
        new = os.read(reading, 4096)
        assert new, seen
        seen += new
    os.close(reading)  # the same Ctrl-C has ended a `tee`
    child.send_signal(signal.SIGINT)
    assert child.wait(60) == 130


def test_a_hub_out_of_reach_is_told_to_people_and_to_machines(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    argv = ["--model", str(TEACHER), "--dataset", str(CHATS), "--cache-dir", str(tmp_path)]
    assert extract_logits.main([*argv, "--output", "user/logits"]) == 4
    out, err = capsys.readouterr()
    summary = json.loads(out)
    assert (summary["output"], summary["exit_code"]) == ("user/logits", 4)
    assert (summary["rows"], summary["shards"], summary["new_rows"]) == (None, None, 0)
    assert err.splitlines()[-1] == f"extract_logits.py: {summary['error']}"


def test_a_refused_shard_leaves_the_figures_and_the_names_of_what_is_kept(
    extract: Extract, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commits = []

    def commit(self: extract_logits.Folder, *args: Any) -> None:
        commits.append(args)
        if len(commits) > 1:
            raise extract_logits.HubError("the disk is full")
        take(self, *args)

    take = extract_logits.Folder.commit
    monkeypatch.setattr(extract_logits.Folder, "commit", commit)
    code, summary, err = extract("--limit", 6, "--upload-every", 2, "--max-batch-size", 1)
    assert (code, summary["exit_code"], summary["error"]) == (4, 4, "the disk is full")
    assert (summary["rows"], summary["shards"]) == (2, 1)
    assert all(Path(path).is_relative_to(tmp_path / "cache") for path in summary["undelivered"])
    assert summary["undelivered"]
    assert err.splitlines()[-1].startswith("extract_logits.py: the disk is full; ")
    assert err.splitlines()[-1].endswith("next: the same command with --resume")
    monkeypatch.undo()
    code, summary, err = extract("--limit", 6, "--upload-every", 2, "--resume")
    assert (code, summary["rows"], summary["undelivered"]) == (0, 6, []), err


def test_a_terminal_that_knows_no_width_shows_the_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = os.openpty()  # of 0 columns
    with os.fdopen(writer, "w") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        bar = extract_logits.open_bar(10)
        bar.update(10)
        bar.close()
        shown = b""
        while b"10/10" not in shown:
            assert b"\n" not in shown
            shown += os.read(reader, 4096)
    os.close(reader)


def validate(output: str) -> dict[str, int]:
    """Return the violations that `--validate` counts in an output."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        explore_logits.main([output, "--validate"])
    result: dict[str, int] = json.loads(said.getvalue().splitlines()[-1])["violations"]
    return result


@pytest.mark.parametrize(
    "options",
    [
        ("--sampled-n", 0),
        ("--top-p", "1.0"),
        ("--top-p-max", 1),
        ("--logit-bits", 4),
        ("--top-p-max", 1, "--sampled-n", 1, "--logit-bits", 4),
        ("--sampled-n", 0, "--top-p", "1e-9", "--store-tokens", "--include-end"),
    ],
)
def test_runs_at_the_edge_of_the_settings_are_valid(
    options: tuple[object, ...], extract: Extract
) -> None:
    assert extract("--limit", 12, *options)[0] == 0
    assert validate("out") == {}


def test_any_int32_is_an_id_and_valid(
    extract: Extract, write_chats: Callable[[list[Any]], Path], chats: list[dict[str, Any]]
) -> None:
    ids = [-(2**31), -5, 0, 2**31 - 1]
    rows = [{**chat, "id": i} for chat, i in zip(chats, ids, strict=False)]
    assert extract("--index-col", "id", source=write_chats(rows))[0] == 0
    assert validate("out") == {}
    table = next(load_logit_dataset("out").iter_tables(["index"]))
    assert sorted(table["index"].to_pylist()) == ids


HALF_PAIR = (
    '{"messages": [{"role": "user", "content": "hi \\ud800"}, '
    '{"role": "assistant", "content": "yo \\udc00"}]}'
)


@pytest.mark.parametrize("way", ["stream", "table", "text"])
def test_half_a_surrogate_pair_is_skipped_however_it_is_read(
    way: str,
    extract: Extract,
    write_chats: Callable[[list[Any]], Path],
    chats: list[dict[str, Any]],
) -> None:
    row: Any = HALF_PAIR
    if way == "text":
        row = {"messages": json.dumps(json.loads(HALF_PAIR)["messages"])}
    usable = chats[0]["messages"]
    source = write_chats([{"messages": json.dumps(usable) if way == "text" else usable}, row])
    code, summary, err = extract(*["--streaming"] * (way == "stream"), source=source)
    assert (code, summary["skipped"]) == (0, {"malformed": 1}), err


# Imports once, then runs each line of arguments in a fork of its own.
RUNNER = """
import json, os, sys
import datasets, transformers, extract_logits
for line in sys.stdin:
    child = os.fork()
    if not child:
        code = extract_logits.main(json.loads(line))
        sys.stdout.flush()
        os._exit(code)
    _, status = os.waitpid(child, 0)
    print("code", os.waitstatus_to_exitcode(status), flush=True)
"""


@contextlib.contextmanager
def runner(**env: str) -> Iterator[Callable[..., int]]:
    """Start a process that runs `extract_logits.main` again and again, each time afresh."""
    with subprocess.Popen(
        [sys.executable, "-c", RUNNER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1", **env},
    ) as process:  # fmt: skip

        def run(*args: object) -> int:
            assert process.stdin
            assert process.stdout
            process.stdin.write(json.dumps([str(arg) for arg in args]) + "\n")
            process.stdin.flush()
            return next(int(said[5:]) for said in process.stdout if said.startswith("code "))

        yield run
        assert process.stdin
        process.stdin.close()


def test_a_resumed_run_keeps_to_the_commits_it_began_with(tmp_path: Path) -> None:
    lines = CHATS.read_text(encoding="utf-8").splitlines()[:6]
    with LoopbackHub() as hub, contextlib.ExitStack() as stack:
        run = stack.enter_context(
            runner(
                HF_ENDPOINT=hub.endpoint, HF_TOKEN=hub.token, HF_HUB_OFFLINE="0",
                HF_HOME=str(tmp_path / "hf"), HF_DATASETS_CACHE=str(tmp_path / "data"),
            )
        )  # fmt: skip
        api = HfApi(endpoint=hub.endpoint, token=hub.token)
        api.create_repo("tester/model")
        api.create_repo("tester/chats", repo_type="dataset")
        api.upload_folder(repo_id="tester/model", folder_path=TEACHER)

        def upload_chats(rows: list[str]) -> None:
            api.upload_file(
                repo_id="tester/chats",
                repo_type="dataset",
                path_in_repo="chats.jsonl",
                path_or_fileobj="\n".join(rows).encode(),
            )

        def extract(*args: object) -> int:
            return run(
                *("--model", "tester/model", "--dataset", "tester/chats", "--store-tokens"),
                *("--output", "tester/logits", "--cache-dir", tmp_path / "cache", *args),
            )

        upload_chats(lines)
        assert extract("--limit", 3) == 0
        settings = json.loads(hub.content("tester/logits", "extraction_config.json"))
        assert settings["model_revision"] == api.model_info("tester/model").sha
        assert settings["dataset_revision"] == api.dataset_info("tester/chats").sha

        upload_chats(lines[::-1])
        api.upload_file(
            repo_id="tester/model", path_in_repo="chat_template.jinja", path_or_fileobj=b"{{ 1 }}"
        )
        assert extract("--resume") == 0
        resumed = json.loads(hub.content("tester/logits", "extraction_config.json"))
        for name in ("limit", "options"):  # which a resumed run may raise
            del settings[name], resumed[name]
        assert resumed == settings
        whole = read_outputs(hub, tmp_path)
    tokenizer, columns = load_tokenizer(str(TEACHER)), resolve_columns(["messages"])
    encoder = ConversationEncoder(tokenizer, load_chat_template(None, tokenizer), columns)
    alone = [encoder.encode(json.loads(line)).input_ids for line in lines]
    assert whole == {number: ids.tolist() for number, ids in enumerate(alone)}


def read_outputs(hub: LoopbackHub, folder: Path) -> dict[int, list[int]]:
    """Return the token ids that the Hub output holds for each conversation."""
    found: dict[int, list[int]] = {}
    for name in hub.files("tester/logits"):
        if name.endswith(".parquet"):
            path = folder / Path(name).name
            path.write_bytes(hub.content("tester/logits", name))
            for row in pq.read_table(path, columns=["index", "input_ids"]).to_pylist():
                assert row["index"] not in found
                found[row["index"]] = row["input_ids"]
    return found


@pytest.fixture
def dated(tmp_path: Path) -> Path:
    """Write the teacher's template with the date in front of it."""
    own = (TEACHER / "chat_template.jinja").read_text(encoding="utf-8")
    path = tmp_path / "dated.jinja"
    path.write_text("{{ strftime_now('%d %B %Y') }}" + own, encoding="utf-8")
    return path


@pytest.mark.parametrize("stored", ["shards", "pending rows"])
def test_a_run_resumed_on_another_day_tells_the_template_the_first_ones_date(
    extract: Extract, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dated: Path, stored: str
) -> None:
    options = ("--chat-template", dated, "--store-tokens", "--resume", "--index-col", "id")
    monkeypatch.setattr(explore_logits, "date_of_today", lambda: "2030-05-09")
    if stored == "pending rows":
        uploader = extract_logits.StreamingHFUploader
        monkeypatch.setattr(uploader, "flush", lambda self, **_: self.save_pending_locally())
    argv = ("--model", TEACHER, "--dataset", CHATS, "--output", "./out", "--cache-dir", "cache")
    extract_logits.main([str(arg) for arg in (*argv, "--limit", 2, *options)])
    assert (tmp_path / "out" / "data").exists() == (stored == "shards")
    monkeypatch.undo()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(explore_logits, "date_of_today", lambda: "2030-05-10")
    code, summary, err = extract("--limit", 4, *options)
    assert (code, summary["rows"]) == (0, 4), err
    tokenizer = load_tokenizer(str(TEACHER))
    rows = next(load_logit_dataset("out").iter_tables(["input_ids"]))["input_ids"].to_pylist()
    assert {tokenizer.decode(ids)[:11] for ids in rows} == {"09 May 2030"}
    assert explore_logits.load_extraction_config("out")["template_date"] == "2030-05-09"
    assert explore_logits.main(["out", "--sample", "0-3"]) == 0


def test_lengths_measured_on_another_day_are_those_of_the_run(
    extract: Extract, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dated: Path
) -> None:
    monkeypatch.setattr(explore_logits, "date_of_today", lambda: "2030-05-09")
    options = ("--model", TEACHER, "--dataset", CHATS, "--index-col", "id", "--num-proc", 1)
    options += ("--chat-template", dated, "--output-dir", tmp_path)
    assert compute_lengths.main([str(option) for option in options]) == 0
    lengths = explore_logits.read_lengths(str(tmp_path / "lengths.parquet"))
    monkeypatch.setattr(explore_logits, "date_of_today", lambda: "2030-09-30")
    args = ("--chat-template", dated, "--index-col", "id", "--store-tokens", "--limit", 4)
    code, _, err = extract(*args, "--tokenized-dataset", tmp_path / "lengths.parquet")
    assert code == 0, err
    assert explore_logits.load_extraction_config("out")["template_date"] == "2030-05-09"
    rows = next(load_logit_dataset("out").iter_tables(["index", "input_ids"])).to_pylist()
    by_index = dict(zip(lengths.index.tolist(), lengths.length.tolist(), strict=True))
    assert all(len(row["input_ids"]) == by_index[row["index"]] for row in rows)


def test_a_job_begun_on_another_day_than_its_lengths_says_so(
    extract: Extract, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dated: Path
) -> None:
    args = ("--chat-template", dated, "--limit", 2)
    assert extract(*args)[0] == 0
    monkeypatch.setattr(explore_logits, "date_of_today", lambda: "2030-05-09")
    options = ("--model", TEACHER, "--dataset", CHATS, "--chat-template", dated, "--num-proc", 1)
    compute_lengths.main([str(option) for option in (*options, "--output-dir", tmp_path)])
    args = ("--chat-template", dated, "--limit", 4, "--resume")
    code, _, err = extract(*args, "--tokenized-dataset", tmp_path / "lengths.parquet")
    assert code == 2
    assert "template_date: '2030-05-09' there" in err.splitlines()[-1]
    assert extract(*args)[0] == 0
