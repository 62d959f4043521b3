"""The command line of `extract_logits.py`: exit codes, one-line errors, which stream gets what."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import CHATS, ROOT, TEACHER
from processes import run_process

import extract_logits

GOOD = {"--model": TEACHER, "--dataset": CHATS}


def last_line(text: str) -> str:
    return text.strip().splitlines()[-1]


def refuse(capsys: pytest.CaptureFixture[str], tmp_path: Path, options: dict[str, object]) -> str:
    """Run with the given options; it must exit 2 with one line and leave nothing behind."""
    wanted = {**GOOD, "--output": tmp_path / "out", "--cache-dir": tmp_path / "cache", **options}
    given = {name: value for name, value in wanted.items() if value is not None}
    argv = [str(part) for pair in given.items() for part in pair if part is not True]
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
        *(({name: None}, [name]) for name in ("--model", "--dataset", "--output")),
        *(({name: " "}, [f"{name} is empty"]) for name in ("--model", "--dataset", "--output")),
        ({"--model": "./no-such-model"}, ["no-such-model", "no such folder"]),
        ({"--model": "weights.gguf"}, ["is GGUF, which is not read"]),
        ({"--model": "taken/below"}, ["is a file: give the folder"]),
        ({"--model": "./bare"}, ["the folder holds none that can be read"]),  # no tokenizer
        ({"--dataset": "./no-such-file.jsonl"}, ["no-such-file.jsonl"]),
        ({"--dataset": "broken.jsonl"}, ["line 3"]),
        ({"--dataset": "unanswered.jsonl"}, ["2 no_assistant; check --mess"]),
        ({"--dataset": "qa.jsonl", "--max-seq-len": 3}, ["2 too_long; raise --max-seq-len"]),
        ({"--split": "tset"}, ["tset", "train"]),
        ({"--messages-col": "chat"}, ["chat", "messages"]),
        ({"--index-col": "row_id"}, ["row_id", "messages"]),
        ({"--index-col": "messages"}, ["not an integer", "--index-col"]),
        ({"--top-p-max": "256"}, ["--top-p-max", "256", "255"]),
        ({"--sampled-n": "1000000"}, ["--sampled-n", "1000000", "vocabulary"]),
        ({"--device": "tpu"}, ["--device", "tpu"]),
        ({"--subject-col": "topic", "--sample-subject": '{"a": 1}'}, ["topic", "subject"]),
        ({"--start-offset": "1000000"}, ["--start-offset"]),
        ({"--start-offset": "1000000", "--streaming": True, "--upload-size-mb": 1},
         ["no conversation was selected"]),
        ({"--chat-template": "./no.jinja"}, ["no.jinja"]),
        ({"--tokenized-dataset": "data/none.parquet"}, ["no such folder or file"]),
        ({"--limt": "3"}, ["--limt", "is it --limit?"]),
        ({"--ouput=./o": True}, ["there is no option --ouput: is it --output?"]),
        ({"--output": "hf_abcDEF123456abcDEF"}, ["--output '***' is neither"]),
        ({"--output": "taken/below"}, ["--output: ", "/taken/below is a file"]),
        ({"--output": "./taken/below/it"}, ["--output: ", "/taken/below is a file"]),
        ({"--cache-dir": "taken/below"}, ["--cache-dir: ", "/taken/below is a file"]),
        ({"--cache-dir": "taken/below/x"}, ["--cache-dir: ", "/taken/below is a file"]),
    ],
    ids=str,
)  # fmt: skip
def test_a_bad_option_or_source_is_one_line_that_names_it(
    options: dict[str, object],
    words: list[str],
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    alone, answered = (
        '{"messages": [{"role": "user", "content": "hi"}]}\n',
        '{"question": "a", "answer": "b"}\n',
    )
    for name, content in {
        "weights.gguf": "GGUF", "taken/below": "", "bare/config.json": '{"model_type": "llama"}',
        "broken.jsonl": 2 * answered + '{"question": [\n' + answered,
        "unanswered.jsonl": 2 * alone, "qa.jsonl": 2 * answered,
    }.items():  # fmt: skip
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    message = refuse(capsys, tmp_path, options)
    for word in words:
        assert word in message


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
    done = run_process([sys.executable, "-OO", ROOT / "extract_logits.py", "--help"])
    assert done.code == 0
    assert "--top-p-max" in done.stdout


def test_a_run_does_not_end_because_its_log_is_full(tmp_path: Path) -> None:
    command = [sys.executable, ROOT / "extract_logits.py", "--model", TEACHER]
    command += ["--dataset", CHATS, "--limit", "2", "--output", tmp_path / "out"]
    command += ["--cache-dir", tmp_path / "cache"]
    env = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    with open("/dev/full", "w", encoding="utf-8") as full:
        done = run_process(command, env=env, stderr=full)
    assert done.code == 0
    assert done.summary["rows"] == 2
