"""Fixtures that several test files share."""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import settings
from loopback_hub import LoopbackHub
from outputs import Output
from processes import Finished, run_process

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("HF_HUB_DISABLE_XET", "1")  # the loopback Hub speaks plain LFS
settings.register_profile("any machine", deadline=None)  # a busy one is slow, not wrong
settings.load_profile("any machine")

ROOT = Path(__file__).resolve().parent.parent
TEACHER = ROOT / "tests" / "teacher" / "model"
CHATS = ROOT / "tests" / "teacher" / "conversations.jsonl"


def chat(answer: str, question: str = "?") -> list[dict[str, str]]:
    """Return a conversation of one question and one answer."""
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def rows_of(count: int, **columns: list[Any]) -> list[dict[str, Any]]:
    """Return source rows whose answers begin with their number and differ in length."""
    return [
        {"messages": chat(f"{n}" + "z" * (n % 7)), **{c: v[n] for c, v in columns.items()}}
        for n in range(count)
    ]


def run_script(name: str, *args: object, cwd: Path | None = None, **env: str) -> Finished:
    """Run one of the three scripts as a user would, in a process of its own."""
    alone = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **env}
    return run_process([sys.executable, ROOT / name, *args], cwd=cwd or ROOT, env=alone)


def extract_chats(folder: Path, *options: object) -> Path:
    """Extract the embedded teacher's logits of its conversations; return the output's folder."""
    import extract_logits

    words = ["--model", TEACHER, "--dataset", CHATS, "--index-col", "id", *options]
    words += ["--cache-dir", folder / "cache", "--output", folder / "logits"]
    assert extract_logits.main([str(word) for word in words]) == 0
    return folder / "logits"


@pytest.fixture(scope="session")
def chats() -> list[dict[str, Any]]:
    """The embedded conversations."""
    return [json.loads(line) for line in CHATS.read_text(encoding="utf-8").splitlines()]


Write = Callable[[list[Any]], Path]


@pytest.fixture
def write_chats(tmp_path: Path) -> Write:
    """Write rows to a .jsonl file; a str goes in as it is."""

    def write(rows: list[Any]) -> Path:
        path = tmp_path / "chats.jsonl"
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        return path

    return write


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random teacher of 300 tokens: a run with it takes a tenth of a second."""
    from tiny_teachers import save_teacher

    return save_teacher(tmp_path_factory.mktemp("tiny") / "model", 300)


@pytest.fixture(autouse=True)
def logging_lock() -> Iterator[None]:
    """Fail where a signal has left logging's lock held: later requests would wait for ever."""
    yield
    assert not logging._lock._is_owned()


Extract = Callable[..., Finished]


@pytest.fixture
def extract(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, model: Path
) -> Extract:
    """Run `main` in this process: the tiny teacher, ./chats.jsonl into ./out, cache in ./cache.

    Keywords are options, `resume=True` a bare one, None one that is left out.
    """
    import extract_logits

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    usual = {"model": model, "dataset": "chats.jsonl", "output": "./out", "cache_dir": "cache"}

    def run(*args: object, **options: Any) -> Finished:
        capsys.readouterr()
        words = list(map(str, args))
        for name, value in {**usual, **options}.items():
            if value is not None and value is not False:
                words.append("--" + name.replace("_", "-"))
                words += [] if value is True else [str(value)]
        try:
            code: Any = extract_logits.main(words)
        except SystemExit as stop:
            code = stop.code
        return Finished(code, *capsys.readouterr())

    return run


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[LoopbackHub]:
    """A loopback Hub, which is the Hub of this process; waits between tries are short."""
    import huggingface_hub.constants as constants

    import extract_logits  # here: what tests the explorer alone starts without torch

    monkeypatch.setattr(extract_logits, "RETRY_WAITS_S", (0.02,) * 6)
    short = SimpleNamespace(sleep=lambda s: time.sleep(min(s, 0.02)), time=time.time)
    monkeypatch.setattr("huggingface_hub.utils._http.time", short)
    with LoopbackHub() as server:
        template = server.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        for module in (constants, importlib.import_module("huggingface_hub.file_download")):
            monkeypatch.setattr(module, "HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)
        monkeypatch.setattr(constants, "ENDPOINT", server.endpoint)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_ENDPOINT", server.endpoint)
        monkeypatch.setenv("HF_TOKEN", server.token)
        yield server


@pytest.fixture
def folder(tmp_path: Path) -> Output:
    """An output in ./out, which is not there yet."""
    return Output(tmp_path / "out")


@pytest.fixture(params=["folder", "hub"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Output:
    """An output: a folder that is not there yet, or a repository of a loopback Hub."""
    if request.param == "folder":
        return Output(tmp_path / "out")
    return Output("tester/logits", request.getfixturevalue("hub"))


def load_example(name: str) -> Any:
    """Import a program of docs/examples."""
    spec: Any = importlib.util.spec_from_file_location(name, ROOT / f"docs/examples/{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
