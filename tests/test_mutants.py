"""The tool that plants faults: its table fits the scripts, and what it says of a fault is so."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent / "tools"))

from mutants import FAULTS, check_faults, parse_faults, try_faults

TABLE = parse_faults(FAULTS)


def test_every_fault_of_the_table_can_be_planted() -> None:
    check_faults(TABLE)
    assert len(TABLE) == len({fault.says for fault in TABLE}) == 60
    assert {fault.script for fault in TABLE} == {
        "explore_logits", "compute_lengths", "extract_logits"
    }  # fmt: skip


def test_a_fault_is_caught_and_one_that_nothing_tests_survives() -> None:
    wraps, bits = (f for f in TABLE if f.says.startswith(("ids from 262,144", "the high bits")))
    assert wraps.tests == bits.tests == ("test_explore_format.py",)
    caught = {
        verdict.caught_by for verdict in try_faults([wraps, bits], "-k", "outside_the_format")
    }
    assert caught == {
        "test_explore_format.py::test_an_id_outside_the_format_is_refused_by_name",
        "",
    }


def test_a_table_that_no_longer_fits_is_refused() -> None:
    with pytest.raises(SystemExit, match="holds 0 times, not once"):
        check_faults([replace(TABLE[0], old="no such text")])
    with pytest.raises(SystemExit, match=r"holds \d+ times, not once: 'return'"):
        check_faults([replace(TABLE[0], old="return")])
    with pytest.raises(SystemExit, match=r"no tests/test_gone\.py"):
        check_faults([replace(TABLE[0], tests=("test_gone.py",))])
