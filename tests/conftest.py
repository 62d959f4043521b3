"""Fixtures that several test files share."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from loopback_hub import LoopbackHub

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("HF_HUB_DISABLE_XET", "1")  # the loopback Hub speaks plain LFS

ROOT = Path(__file__).resolve().parent.parent
TEACHER = ROOT / "tests" / "teacher" / "model"
CHATS = ROOT / "tests" / "teacher" / "conversations.jsonl"


@dataclass(frozen=True)
class Finished:
    """A script that has run to its end."""

    code: int
    stdout: str
    stderr: str

    @property
    def summary(self) -> dict[str, Any]:
        """The JSON object on the last line of stdout."""
        result: dict[str, Any] = json.loads(self.stdout.strip().splitlines()[-1])
        return result


def run_script(name: str, *args: object, cwd: Path | None = None, **env: str) -> Finished:
    """Run one of the three scripts as a user would, in a process of its own."""
    done = subprocess.run(
        [sys.executable, str(ROOT / name), *map(str, args)],
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=300,
        cwd=cwd or ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **env},
        check=False,
    )
    return Finished(done.returncode, done.stdout, done.stderr)


@pytest.fixture(scope="session")
def chats() -> list[dict[str, Any]]:
    """The embedded conversations."""
    return [json.loads(line) for line in CHATS.read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def write_chats(tmp_path: Path) -> Callable[[list[Any]], Path]:
    """Write rows to a .jsonl file; a str goes in as it is."""

    def write(rows: list[Any]) -> Path:
        path = tmp_path / "chats.jsonl"
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        return path

    return write


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[LoopbackHub]:
    """A loopback Hub; waits of the extractor between tries are short, the client's own too."""
    import extract_logits  # here: what tests the explorer alone starts without torch

    monkeypatch.setattr(extract_logits, "RETRY_WAITS_S", (0.02,) * 6)
    short = SimpleNamespace(sleep=lambda s: time.sleep(min(s, 0.02)), time=time.time)
    monkeypatch.setattr("huggingface_hub.utils._http.time", short)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    with LoopbackHub() as server:
        yield server
