"""The command line of explore_logits: what it prints, its exit codes, and its light import."""

import json
import sys
from pathlib import Path

import pytest
from conftest import CHATS, ROOT, TEACHER, run_script
from processes import run_code, run_process
from small_output import STORED, random_rows, write_output

import explore_logits as explore

SETTINGS = STORED | {"model": str(TEACHER), "dataset": str(CHATS)}
HEAVY = ("torch", "transformers", "datasets", "matplotlib", "huggingface_hub", "jinja2", "pandas")
MISSING = [
    ("matplotlib", "e.plot_nucleus_sizes(s)", f"pip install -e '{ROOT}[viz]'"),
    ("torch", "e.LogitIterableDataset(d)", "pip install torch"),
]


@pytest.fixture(scope="module")
def output(tmp_path_factory):
    rows = random_rows(10, settings=SETTINGS, tokens=30)
    return write_output(tmp_path_factory.mktemp("cli"), rows, settings=SETTINGS)


def test_importing_and_reading_need_the_standard_library_numpy_and_pyarrow_only(output):
    lines = run_code(
        f"import sys, explore_logits as e; print([m for m in {HEAVY} if m in sys.modules]);"
        f"name = {str(output)!r}; s = e.get_sample(name, 3);"
        "e.decode_top_tokens(s, 0); e.print_sample_info(s); e.validate_output(name);"
        f"print([m for m in {HEAVY[:-1]} if m in sys.modules])",  # pyarrow looks for pandas
        cwd=ROOT,
    ).stdout.splitlines()
    assert lines[0] == lines[-1] == "[]"


def test_a_missing_package_is_named_with_what_brings_it(output):
    said = run_code(
        f"import sys, explore_logits as e\nd = {str(output)!r}\ns = e.get_sample(d)\n"
        f"for module, call, _ in {MISSING}:\n"
        "    sys.modules[module] = None\n"
        "    try:\n        eval(call)\n"
        "    except e.LogitsError as error:\n        print(error)\n",
        cwd=ROOT,
    ).stdout.splitlines()
    for line, (module, _, remedy) in zip(said, MISSING, strict=True):
        assert f"{module} is needed" in line
        assert remedy in line


def test_rows_are_numbers_lists_and_ranges_and_a_bad_command_line_exits_2(capsys):
    assert explore.row_list("2-4,9,-1") == [2, 3, 4, 9, -1]
    for words in ("out --sample 5-2", "out --sample 0-99999999", "out --top 0"):
        with pytest.raises(SystemExit) as caught:
            explore.parse_args(words.split())
        assert caught.value.code == 2
        assert "explore-logits: error" in capsys.readouterr().err


def test_what_cannot_be_done_exits_2(output, tmp_path, capsys, caplog, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for words, message in (
        ("--sample 10", "10 rows, there is no row 10"),
        ("--html .", "cannot write .: Is a directory"),
        ("--plot a.xyz", "'xyz' is not supported"),
    ):
        assert explore.main([str(output), *words.split()]) == 2
        assert message in caplog.messages[-1]
        assert not capsys.readouterr().out
        assert [*tmp_path.iterdir()] == []


def test_the_last_line_is_one_json_object_whatever_was_asked(output, tmp_path, capsys):
    page, picture = tmp_path / "new" / "page.html", tmp_path / "plot"
    for words, sections in (
        (f"--sample 0-3 --stats --html {page} --plot {picture}", 4),
        (f"--validate --html {page}", 1),
        (f"--stats --html {page}", 0),
        ("--sample 1,-1 --top 4", 0),
        ("--conversation 4 --token 0", 0),
    ):
        assert explore.main([str(output), *words.split()]) == 0
        summary = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert (summary["output"], summary["rows"]) == (str(output), 10)
        assert page.read_text(encoding="utf-8").count("<section id=") == sections
    assert Path(f"{picture}.png").stat().st_size > 5000, "a picture without a kind is PNG"
    words = ["--validate", "--stats", "--max-samples", "1", "--compare", str(output)]
    assert explore.main([str(output), *words]) == 0
    *shown, last = capsys.readouterr().out.splitlines()
    for said in ("valid: 2 shards, 10 rows", "covered by nucleus", "rows in common      10 of 10"):
        assert said in "\n".join(shown), "what is asked for together is done together"
    summary = json.loads(last)
    assert (summary["violations"], summary["comparison"]["common_rows"]) == ({}, 10)
    assert summary["rows"] == 1, "rows and tokens are those of the figures"
    assert summary["tokens"] < summary["comparison"]["tokens"]


def test_the_script_runs_where_the_terminal_knows_ascii_only(output):
    done = run_script("explore_logits.py", output, "--stats", PYTHONIOENCODING="ascii", LC_ALL="C")
    assert done.passed()["rows"] == 10


FULL = "explore-logits: cannot write the result: No space left on device; make room\n"


def test_a_reader_that_stops_early_is_no_error_and_a_full_disk_is_one(output):
    command = f"set -o pipefail; '{sys.executable}' explore_logits.py '{output}' --validate"
    for place, end in (("| true", (0, "", "")), ("> /dev/full", (2, "", FULL))):
        done = run_process(["bash", "-c", f"{command} {place}"], cwd=ROOT)
        assert (done.code, done.stdout, done.stderr) == end
