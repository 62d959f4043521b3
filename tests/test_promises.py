"""Every promise has a test that runs, and docs/promises.md says which."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent / "tools"))

from promises import PAGE, TABLE, find_faults, find_idle, list_tests, make_page, read_promises

PROMISES = read_promises(TABLE.read_text(encoding="utf-8"))


def test_every_promise_has_a_test_that_runs(request):
    tests, items = list_tests(), request.session.items
    assert find_faults(PROMISES, tests) == []
    assert PAGE.read_text(encoding="utf-8") == make_page(PROMISES), "run tests/tools/promises.py"
    files = {name.partition("::")[0] for name in tests}
    whole = files - {item.path.name for item in items} <= {"test_extract_vllm.py", "test_dist.py"}
    if whole and not request.config.option.keyword:  # what was collected tells what is skipped
        assert find_idle(PROMISES, items) == []


def test_what_is_not_proved_is_found(request):
    here = f"{Path(__file__).name}::test_what_is_not_proved_is_found"
    promises = read_promises(f"# One\na | {here}_gone\nb |\nc | {here}\n")
    assert find_faults(promises, {here, "test_other.py::test_it"}) == [
        "no test: b", f"{here}_gone is not there", "test_other.py proves no promise"
    ]  # fmt: skip
    item = request.node
    assert find_idle(promises[2:], [item]) == []
    item.add_marker(pytest.mark.skipif(True, reason="as if something were missing"))
    assert find_idle(promises[2:], [item]) == ["no test of it runs here: c"]
