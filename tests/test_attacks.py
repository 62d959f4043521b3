"""Odd input and odd circumstances: what broke once, or looked as if it would."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import CHATS, ROOT, TEACHER
from huggingface_hub import HfApi
from loopback_hub import LoopbackHub
from small_output import write_output

import compute_lengths
import explore_logits
import extract_logits
from explore_logits import (
    ConversationEncoder,
    SourceError,
    load_chat_template,
    load_logit_dataset,
    load_tokenizer,
    open_source,
    resolve_columns,
)

Extract = Callable[..., tuple[int, dict[str, Any], str]]
HALF_PAIR = (
    '{"messages": [{"role": "user", "content": "hi \\ud800"}, '
    '{"role": "assistant", "content": "yo \\udc00"}]}'
)


@pytest.fixture
def extract(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Extract:
    """Run `main` on the embedded teacher; returns exit code, summary and stderr."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)

    def run(*args: object, source: Path = CHATS, output: str = "./out") -> Any:
        capsys.readouterr()
        options = ("--model", TEACHER, "--dataset", source, "--output", output)
        code = extract_logits.main([str(arg) for arg in (*options, "--cache-dir", "cache", *args)])
        out, err = capsys.readouterr()
        assert len(out.splitlines()) == (code != 2)
        return code, json.loads(out) if out else {}, err

    return run


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


def test_a_path_that_names_a_split_is_no_split(extract: Extract, tmp_path: Path) -> None:
    assert extract("--limit", 3, output="./test_run/eval/out")[0] == 0
    out = tmp_path / "test_run" / "eval" / "out"
    shard = out / "data" / "part-00000.parquet"
    for name in (out, out / "data", shard, [shard]):
        assert len(load_logit_dataset(name)) == 3


@pytest.mark.parametrize("streaming", [True, False])
def test_half_a_surrogate_pair_is_skipped_however_it_is_read(
    streaming: bool,
    extract: Extract,
    write_chats: Callable[[list[Any]], Path],
    chats: list[dict[str, Any]],
) -> None:
    source = write_chats([{"messages": chats[0]["messages"]}, HALF_PAIR])
    code, summary, err = extract(*["--streaming"] * streaming, source=source)
    assert (code, summary["skipped"]) == (0, {"malformed": 1}), err


def test_messages_kept_as_json_text_with_half_a_surrogate_pair_are_skipped(
    extract: Extract, write_chats: Callable[[list[Any]], Path], chats: list[dict[str, Any]]
) -> None:
    texts = [
        json.dumps(chats[0]["messages"]),
        json.dumps(json.loads(HALF_PAIR)["messages"]),
        "[" * 100_000,
    ]
    code, summary, err = extract(source=write_chats([{"messages": text} for text in texts]))
    assert (code, summary["skipped"]) == (0, {"malformed": 2}), err


@pytest.mark.parametrize("streaming", [True, False])
@pytest.mark.parametrize("name", ["chats.jsonl", "chats.json", "chats.csv"])
def test_a_byte_order_mark_is_no_part_of_the_data(
    name: str, streaming: bool, tmp_path: Path
) -> None:
    row = {"question": "a", "answer": "b"}
    text = {
        ".jsonl": json.dumps(row) + "\r\n",
        ".json": json.dumps([row]),
        ".csv": "question,answer\r\na,b\r\n",
    }[Path(name).suffix]
    path = tmp_path / name
    path.write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert list(open_source(str(path), streaming=streaming)) == [row]


@pytest.mark.parametrize("streaming", [True, False])
def test_words_in_a_csv_are_words(streaming: bool, tmp_path: Path) -> None:
    path = tmp_path / "chats.csv"
    path.write_text("question,answer\nsodium?,NA\nany?,None\nempty?,\n", encoding="utf-8")
    rows = list(open_source(str(path), streaming=streaming))
    assert [row["answer"] for row in rows] == ["NA", "None", None]


@pytest.mark.parametrize("streaming", [False, True])
def test_numbers_in_a_csv_keep_their_spelling(streaming: bool, tmp_path: Path) -> None:
    path = tmp_path / "chats.csv"
    rows = [(10, "007", "1"), (11, "1.50", ""), (12, "7", "2"), (13, "True", "03")]
    lines = ["id,answer,question", *(",".join(map(str, row)) for row in rows)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    found = list(open_source(str(path), streaming=streaming, integers=["id"]))
    assert [(row["id"], row["answer"], row["question"] or "") for row in found] == rows


@pytest.mark.parametrize(("name", "text"), [("e.json", "[]"), ("h.csv", "question,answer\n")])
def test_a_source_without_rows_is_said_to_have_none(name: str, text: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    with pytest.raises(SourceError, match="has no rows"):
        open_source(str(path))


def test_parquet_without_rows_is_said_to_have_none(tmp_path: Path) -> None:
    path = tmp_path / "none.parquet"
    pq.write_table(pa.table({"question": pa.array([], pa.string())}), path)
    with pytest.raises(SourceError, match="has no rows"):
        open_source(str(path))


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


@pytest.mark.parametrize("option", ["--output", "--cache-dir"])
@pytest.mark.parametrize("place", ["taken", "taken/below"])
def test_a_file_where_a_folder_should_be_is_refused_in_one_line(
    extract: Extract, tmp_path: Path, option: str, place: str
) -> None:
    (tmp_path / "taken").write_text("not yours")
    code, _, err = extract(option, f"./{place}")
    assert code == 2
    last = err.splitlines()[-1]
    assert f"{option}: {tmp_path / 'taken'} is a file" in last
    assert (tmp_path / "taken").read_text() == "not yours"


def test_a_file_named_like_a_repository_is_no_repository(extract: Extract, tmp_path: Path) -> None:
    (tmp_path / "user").mkdir()
    (tmp_path / "user" / "name").write_text("not yours")
    code, _, err = extract(output="user/name")
    assert code == 2
    assert "is a file" in err.splitlines()[-1]


@pytest.mark.parametrize("name", ["model", "dataset", "output"])
def test_an_empty_name_is_refused(extract: Extract, name: str) -> None:
    code, _, err = extract(f"--{name}", " ")
    assert code == 2
    assert f"--{name} is empty" in err.splitlines()[-1]


@pytest.mark.parametrize("name", ["model", "dataset"])
def test_an_empty_name_is_refused_by_lengths(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    argv = ["--model", str(TEACHER), "--dataset", str(CHATS), "--output-dir", str(tmp_path)]
    assert compute_lengths.main([*argv, f"--{name}", ""]) == 2
    assert f"--{name} is empty" in caplog.text


def test_a_file_as_the_model_is_named_with_the_remedy(extract: Extract, tmp_path: Path) -> None:
    for name, remedy in (
        ("model.gguf", "is GGUF, which is not read"),
        ("m.safetensors", "is a file: give the folder"),
    ):
        (tmp_path / name).write_bytes(b"GGUF")
        code, _, err = extract("--model", tmp_path / name)
        assert code == 2
        assert remedy in err.splitlines()[-1]


def test_no_token_of_the_hub_is_logged_beside_the_bar(capsys: pytest.CaptureFixture[str]) -> None:
    root = logging.getLogger()
    kept, stream = root.handlers[:], logging.StreamHandler()
    try:
        root.handlers = [stream]
        with extract_logits.log_beside_bar():
            logging.getLogger("any").warning("Authorization: Bearer %s", "hf_abcdefghijkl")
        assert root.handlers == [stream]
    finally:
        root.handlers = kept
    assert "Authorization: Bearer ***" in capsys.readouterr().err


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


@pytest.mark.parametrize("installed", [False, True])
@pytest.mark.parametrize("script", ["extract_logits", "compute_lengths", "explore_logits"])
def test_ctrl_c_while_libraries_load_leaves_without_a_traceback(
    script: str, installed: bool, tmp_path: Path
) -> None:
    path = ROOT / f"{script}.py"
    if installed:
        path = tmp_path / script.replace("_", "-")
        path.write_text(f"from {script} import main\nraise SystemExit(main())\n")
    slow = "import pathlib, time\npathlib.Path(__file__).with_name('loading').touch()\n"
    (tmp_path / "numpy.py").write_text(slow + "time.sleep(60)\n", encoding="utf-8")
    with subprocess.Popen(
        [sys.executable, str(path), "--help"], stderr=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])},
    ) as process:  # fmt: skip
        while not (tmp_path / "loading").exists():
            assert process.poll() is None
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=30)
    assert (process.returncode, err) == (130, "")


WRITE_TO_BOTH = """
import sys, explore_logits
explore_logits.outlive_readers("stdout", "stderr")
for _ in range(3):
    print("log" * 5000, file=sys.stderr, flush=True)
print("result")
"""


@pytest.mark.parametrize("way", ["2> /dev/full", "2>&-", "2> >(true)"])
def test_what_nobody_can_take_is_dropped(way: str) -> None:
    command = f"sleep 0.05; exec {sys.executable} -c '{WRITE_TO_BOTH}' {way}"
    done = subprocess.run(
        ["bash", "-c", command], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (0, "result\n")


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


def test_a_result_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    with open("/dev/full", "w", encoding="utf-8") as full:
        done = subprocess.run(
            [sys.executable, ROOT / "explore_logits.py", write_output(tmp_path), "--validate"],
            stdout=full, stderr=subprocess.PIPE, text=True, check=False,
        )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr == (
        "explore-logits: cannot write the result: No space left on device; make room\n"
    )
