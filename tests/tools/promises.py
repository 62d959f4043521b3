"""Check that every promise has a test which runs here, and write docs/promises.md.

    python tests/tools/promises.py

`promises.txt` beside this file holds a promise a line: a sentence, `|`, the tests that prove it as
pytest names them. Ends with exit code 1 where a named test does not exist, where every test of a
promise is skipped on this machine, and where a file of tests proves none.
"""

from __future__ import annotations

import ast
import contextlib
import io
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest

TESTS = Path(__file__).resolve().parent.parent
TABLE = Path(__file__).with_suffix(".txt")
PAGE = TESTS.parent / "docs" / "promises.md"
ELSEWHERE = {"test_extract_vllm.py", "test_extract_kernels.py"}  # where vLLM, or Triton, is
HEAD = """# Promises and their tests

Made by `tests/tools/promises.py` from `tests/tools/promises.txt`: a promise a line, with the tests
that prove it. Those in italics do not run with `make test`, but by a target of their own, or where
vLLM or Triton is installed.
"""


class Promise(NamedTuple):
    """What is promised, and which tests prove it."""

    section: str
    says: str
    tests: list[str]  # "file.py::name"


def read_promises(text: str) -> list[Promise]:
    """Return the promises of a table, in its order."""
    promises, section = [], ""
    for line in filter(None, map(str.strip, text.splitlines())):
        if line.startswith("#"):
            section = line.lstrip("# ")
        else:
            says, _, tests = line.partition("|")
            promises.append(Promise(section, says.strip(), tests.split()))
    return promises


def list_tests(folder: Path = TESTS) -> dict[str, bool]:
    """Return all tests by name, and whether each is marked as slow; nothing is imported."""
    tests = {}
    for path in sorted(folder.glob("test_*.py")):
        text = path.read_text(encoding="utf-8")
        all_slow = "\npytestmark = pytest.mark.slow\n" in text
        for node in ast.parse(text).body:
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                marks = map(ast.unparse, node.decorator_list)
                is_slow = all_slow or any(".slow" in mark for mark in marks)
                tests[f"{path.name}::{node.name}"] = is_slow
    return tests


def find_faults(promises: Sequence[Promise], tests: Iterable[str]) -> list[str]:
    """Say which promises name no test, or one that is not there, and which files prove nothing."""
    there, named = set(tests), {test for promise in promises for test in promise.tests}
    faults = [f"no test: {promise.says}" for promise in promises if not promise.tests]
    faults += [f"{test} is not there" for test in sorted(named - there)]
    files = ({test.partition("::")[0] for test in names} for names in (there, named))
    return faults + [f"{file} proves no promise" for file in sorted(set.difference(*files))]


def find_idle(promises: Sequence[Promise], items: Iterable[Any]) -> list[str]:
    """Say which promises have no test that runs among those that pytest has collected."""
    slow = {test for test, is_slow in list_tests().items() if is_slow}
    running = {f"{i.path.name}::{i.originalname}" for i in items if not is_skipped(i)} | slow
    return [
        f"no test of it runs here: {promise.says}"
        for promise in promises
        if not running & set(promise.tests)
        and not any(test.partition("::")[0] in ELSEWHERE for test in promise.tests)
    ]


def is_skipped(item: Any) -> bool:
    """Tell whether a mark keeps a test from running on this machine."""
    conditions = [mark.args[:1] for mark in item.iter_markers("skipif")]
    return item.get_closest_marker("skip") is not None or any(map(any, conditions))


def make_page(promises: Sequence[Promise]) -> str:
    """Return docs/promises.md."""
    slow, lines, section = list_tests(), [HEAD], ""
    for promise in promises:
        if promise.section != section:
            section = promise.section
            lines.append(f"\n## {section}\n\n| promise | tests |\n|---|---|\n")
        shown = []
        for test in promise.tests:
            file = test.partition("::")[0]
            apart = slow.get(test) or file in ELSEWHERE
            shown.append(f"*`{test}`*" if apart else f"`{test}`")
        lines.append(f"| {promise.says} | {'<br>'.join(shown)} |\n")
    return "".join(lines)


class Collector:
    """Keeps what pytest has collected."""

    items: Sequence[Any] = ()

    def pytest_collection_finish(self, session: Any) -> None:
        """Take over the tests."""
        self.items = session.items


def main() -> int:
    """Check the table and write the page."""
    promises, collector = read_promises(TABLE.read_text(encoding="utf-8")), Collector()
    with contextlib.redirect_stdout(io.StringIO()):
        pytest.main(["--collect-only", "-q", "-p", "no:cacheprovider", str(TESTS)], [collector])
    faults = find_faults(promises, list_tests()) + find_idle(promises, collector.items)
    print(*faults, sep="\n", end="\n" if faults else "")
    if not faults:
        PAGE.write_text(make_page(promises), encoding="utf-8")
        print(f"{len(promises)} promises: {PAGE}")
    return int(bool(faults))


if __name__ == "__main__":
    sys.exit(main())
