"""The command line of `extract_logits.py`: exit codes, one-line errors, which stream gets what."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import CHATS, ROOT, TEACHER, Extract

import extract_logits

GOOD = {"--model": TEACHER, "--dataset": CHATS}


def last_line(text: str) -> str:
    return text.strip().splitlines()[-1]


def refuse(capsys: pytest.CaptureFixture[str], tmp_path: Path, options: dict[str, object]) -> str:
    """Run with the given options; it must exit 2 with one line and leave nothing behind."""
    wanted = {**GOOD, "--output": tmp_path / "out", "--cache-dir": tmp_path / "cache", **options}
    argv = [str(part) for pair in wanted.items() for part in pair if part is not True]
    try:
        code: Any = extract_logits.main(argv)
    except SystemExit as stop:
        code = stop.code
    out, err = capsys.readouterr()
    assert code == 2, err
    assert out == ""
    assert "Traceback" not in err
    assert not (tmp_path / "out").exists()
    return last_line(err)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"--model": "./no-such-model"}, ["no-such-model"]),
        ({"--dataset": "./no-such-file.jsonl"}, ["no-such-file.jsonl"]),
        ({"--split": "tset"}, ["tset", "train"]),
        ({"--messages-col": "chat"}, ["chat", "messages"]),
        ({"--index-col": "row_id"}, ["row_id", "messages"]),
        ({"--top-p": "most"}, ["--top-p", "most"]),
        ({"--top-p-max": "256"}, ["--top-p-max", "256", "255"]),
        ({"--sampled-n": "1000000"}, ["--sampled-n", "1000000", "vocabulary"]),
        ({"--device": "tpu"}, ["--device", "tpu"]),
        ({"--batch-thresholds": "{512: 8}"}, ["--batch-thresholds", "{512: 8}"]),
        ({"--subject-col": "topic", "--sample-subject": '{"a": 1}'}, ["topic", "subject"]),
        ({"--full-dataset": True, "--limit": "3"}, ["--full-dataset", "--limit"]),
        ({"--start-offset": "1000000"}, ["--start-offset"]),
        ({"--chat-template": "./no.jinja"}, ["no.jinja"]),
        ({"--limt": "3"}, ["--limt", "is it --limit?"]),
        ({"--ouput=./o": True}, ["there is no option --ouput: is it --output?"]),
        ({"--model": "./teecher"}, ["no such folder"]),
        ({"--index-col": "messages"}, ["not an integer", "--index-col"]),
        ({"--tokenized-dataset": "data/none.parquet"}, ["no such folder or file"]),
        ({"--model": " "}, ["--model is empty"]),
        ({"--dataset": " "}, ["--dataset is empty"]),
        ({"--output": " "}, ["--output is empty"]),
        ({"--model": "weights.gguf"}, ["is GGUF, which is not read"]),
        ({"--model": "m.safetensors"}, ["is a file: give the folder"]),
        ({"--output": "./taken/below"}, ["--output: ", "/taken/below is a file"]),
        ({"--output": "taken/below"}, ["/taken/below is a file"]),
        ({"--output": "./taken/below/it"}, ["--output: ", "/taken/below is a file"]),
        ({"--cache-dir": "m.safetensors"}, ["--cache-dir: ", "/m.safetensors is a file"]),
        ({"--cache-dir": "m.safetensors/x"}, ["--cache-dir: ", "/m.safetensors is a file"]),
    ],
)
def test_a_bad_option_is_one_line_that_names_it(
    options: dict[str, object],
    words: list[str],
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken").mkdir()
    for name in ("weights.gguf", "m.safetensors", "taken/below"):
        (tmp_path / name).write_bytes(b"GGUF")
    message = refuse(capsys, tmp_path, options)
    for word in words:
        assert word in message


def test_a_token_in_the_wrong_place_is_not_printed(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    message = refuse(capsys, tmp_path, {"--output": "hf_abcDEF123456abcDEF"})
    assert "--output '***' is neither" in message


def test_a_folder_without_a_tokenizer_is_said_to_have_none(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text('{"model_type": "llama"}')
    message = refuse(capsys, tmp_path, {"--model": tmp_path / "model"})
    assert "the folder holds none that can be read" in message


@pytest.mark.parametrize(
    ("row", "options", "words"),
    [
        ({"messages": [{"role": "user", "content": "hi"}]}, {}, "2 no_assistant; check --mess"),
        ({"question": "a", "answer": "b"}, {"--max-seq-len": 3}, "2 too_long; raise --max-seq-len"),
    ],
)
def test_nothing_to_extract_comes_with_what_may_help(
    row: dict[str, Any],
    options: dict[str, object],
    words: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    write_chats: Callable[[list[Any]], Path],
) -> None:
    assert words in refuse(capsys, tmp_path, {"--dataset": write_chats([row, row]), **options})


def test_a_broken_line_of_the_source_is_named(
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    write_chats: Callable[[list[Any]], Path],
    chats: list[dict[str, Any]],
) -> None:
    row = {"messages": chats[0]["messages"]}
    source = write_chats([row, row, '{"messages": [', row])
    assert "line 3" in refuse(capsys, tmp_path, {"--dataset": source})


@pytest.mark.parametrize("missing", ["--model", "--dataset", "--output"])
def test_a_missing_option_is_named(missing: str, capsys: pytest.CaptureFixture[str]) -> None:
    options = {"--model": "m", "--dataset": "d", "--output": "./o"}
    del options[missing]
    with pytest.raises(SystemExit) as stop:
        extract_logits.main([part for pair in options.items() for part in pair])
    assert stop.value.code == 2
    message = capsys.readouterr().err.strip()
    assert "\n" not in message
    assert missing in message


def test_help_shows_every_option_in_80_columns(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as stop:
        extract_logits.main(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 80
    for name in extract_logits.ExtractionConfig.__dataclass_fields__:
        assert "--" + name.replace("_", "-") in text


def test_help_is_shown_without_docstrings_too() -> None:
    done = subprocess.run(
        [sys.executable, "-OO", str(ROOT / "extract_logits.py"), "--help"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "--top-p-max" in done.stdout


def test_a_run_writes_one_json_line_and_keeps_the_rest_on_stderr(extract: Extract) -> None:
    done = extract(model=TEACHER, dataset=CHATS, limit=12)
    assert done.code == 0, done.stderr
    assert len(done.stdout.strip().splitlines()) == 1
    said = {"rows", "tokens", "shards", "bytes", "skipped", "seconds", "tokens_per_second"}
    assert set(done.summary) >= {*said, "output"}
    assert "tokens/s" in done.stderr
    assert "buffer" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_run_does_not_end_because_its_log_is_full(tmp_path: Path) -> None:
    words = ["--model", TEACHER, "--dataset", CHATS, "--limit", "2", "--output", tmp_path / "out"]
    with open("/dev/full", "w", encoding="utf-8") as full:
        done = subprocess.run(
            [sys.executable, ROOT / "extract_logits.py", *words, "--cache-dir", tmp_path / "cache"],
            env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
            stderr=full, stdout=subprocess.PIPE, check=False,
        )  # fmt: skip
    assert done.returncode == 0
    assert json.loads(done.stdout)["rows"] == 2
