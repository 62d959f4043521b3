"""The command line of explore_logits: what it prints, its exit codes, and its light import."""

import ast
import json
import sys
from pathlib import Path

import pytest
from conftest import CHATS, ROOT, TEACHER, run_script
from processes import run_code, run_process
from small_output import STORED, random_rows, write_output

import explore_logits
from explore_logits import build_parser, main, parse_args, row_list

SETTINGS = STORED | {"model": str(TEACHER), "dataset": str(CHATS)}
HEAVY = ("torch", "transformers", "datasets", "pandas", "matplotlib", "seaborn", "huggingface_hub",
         "termcolor", "jinja2", "selenium")  # fmt: skip
MISSING = [
    ("matplotlib", "e.plot_nucleus_sizes(s)", f"pip install -e '{ROOT}[viz]'"),
    ("torch", "e.LogitIterableDataset(d)", "pip install torch"),
    ("huggingface_hub", "e.load_logit_dataset('user/name')", "pip install huggingface_hub"),
    ("transformers", "e.load_tokenizer('user/name')", "pip install transformers"),
    ("datasets", "e.open_source('user/name')", "pip install datasets"),
]


@pytest.fixture(scope="module")
def output(tmp_path_factory):
    rows = random_rows(10, settings=SETTINGS, tokens=30)
    return write_output(tmp_path_factory.mktemp("cli"), rows, settings=SETTINGS)


def test_importing_and_reading_need_the_standard_library_numpy_and_pyarrow_only(output):
    heavy = [name for name in HEAVY if name != "pandas"]  # pyarrow looks for it by itself
    lines = run_code(
        f"import sys, explore_logits as e; print([m for m in {HEAVY} if m in sys.modules]);"
        f"name = {str(output)!r}; s = e.get_sample(name, 3);"
        "e.decode_top_tokens(s, 0); e.print_sample_info(s); e.validate_output(name);"
        f"print([m for m in {heavy} if m in sys.modules])",
        cwd=ROOT,
    ).stdout.splitlines()
    assert lines[0] == lines[-1] == "[]"


def test_the_names_that_are_offered_exist_and_are_few():  # which they are: test_explore_open.py
    names = explore_logits.__all__
    assert dir(explore_logits) == sorted(names)
    assert len({*names}) == len(names) < 50
    assert [name for name in names if not hasattr(explore_logits, name)] == []


def test_nothing_is_printed_outside_of_what_prints():
    tree = ast.parse((ROOT / "explore_logits.py").read_text(encoding="utf-8"))
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    printing = {function.name for function in functions for node in ast.walk(function)
                if isinstance(node, ast.Name) and node.id == "print"}  # fmt: skip
    shows = ("print_", "show_", "find_words", "run_commands", "quick_explore", "main")
    assert "print_token" in printing
    assert {name for name in printing if not name.startswith(shows)} == set()


def test_a_missing_package_is_named_with_what_brings_it(output):
    said = run_code(
        f"import sys, explore_logits as e\nd = {str(output)!r}\ns = e.get_sample(d)\n"
        f"for module, call, _ in {MISSING}:\n"
        "    sys.modules[module] = None\n"
        "    try:\n        eval(call)\n"
        "    except e.LogitsError as error:\n        print(error)\n"
        "    del sys.modules[module]\n",
        cwd=ROOT,
    ).stdout.splitlines()
    for line, (module, _, remedy) in zip(said, MISSING, strict=True):
        assert f"{module} is needed" in line
        assert remedy in line


def test_rows_are_numbers_lists_and_ranges_and_a_bad_command_line_exits_2(capsys):
    assert row_list("3") == [3]
    assert row_list("0,5,-1") == [0, 5, -1]
    assert row_list("2-4,9") == [2, 3, 4, 9]
    for words in ("", "out --sample many", "out --sample 5-2", "out --sample 0-99999999",
                  "out --top 0", "out --sample 3 --conversation 3"):  # fmt: skip
        with pytest.raises(SystemExit) as caught:
            parse_args(words.split())
        assert caught.value.code == 2
        assert "explore-logits: error" in capsys.readouterr().err


def test_the_help_fits_80_columns_and_options_show_what_they_take(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    text = build_parser().format_help()
    assert max(map(len, text.splitlines())) <= 80
    assert "3 --validate found" in text
    parser = explore_logits.OneLineParser()
    explore_logits.add_options(parser, explore_logits.ConversationOptions, required=())
    for value in ("math=3", "[1]", "[" * 100_000):
        with pytest.raises(SystemExit):
            parser.parse_args(["--template-kwargs", value])
        (line,) = capsys.readouterr().err.splitlines()
        assert 'wanted: JSON for the template: {"enable_thinking": false}' in line
        assert len(line) < 500


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("./nowhere", "no such folder or file: ./nowhere"),
        ("OUT --sample 10", "10 rows, there is no row 10"),
        ("OUT --split test", "no split 'test'; it has train"),
        ("OUT --token 999", "there is no token 999"),
        ("OUT --html a.png", "cannot write a.png: Is a directory"),
        ("OUT --plot a", "cannot write a.png: Is a directory"),
        ("OUT --plot a.xyz", "'xyz' is not supported"),
    ],
)
def test_what_cannot_be_done_exits_2(output, words, message, tmp_path, capsys, caplog, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("a.png").mkdir()
    assert main([word.replace("OUT", str(output)) for word in words.split()]) == 2
    (said,) = caplog.messages
    assert message in said
    assert not capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


def test_the_last_line_is_one_json_object_whatever_was_asked(output, tmp_path, capsys):
    page, picture = tmp_path / "new" / "page.html", tmp_path / "plot"
    everything = f"--sample 0-3 --stats --html {page} --plot {picture}"
    for words in ("--sample 1,-1 --top 4", "--stats", "--validate", f"--compare {output}",
                  everything, "--conversation 4 --token 0"):  # fmt: skip
        assert main([str(output), *words.split()]) == 0
        summary = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert summary["output"] == str(output)
        assert summary["rows"] == 10
        assert summary.get("plot", f"{picture}.png") == f"{picture}.png"
    assert page.read_text(encoding="utf-8").count("<section id=") == 4
    for words, sections in (("--validate", 1), ("--stats", 0)):
        assert main([str(output), *words.split(), "--html", str(page)]) == 0
        assert page.read_text(encoding="utf-8").count("<section id=") == sections
    capsys.readouterr()
    words = ["--validate", "--stats", "--max-samples", "1", "--compare", str(output)]
    assert main([str(output), *words]) == 0
    shown = capsys.readouterr().out
    for said in ("valid: 2 shards, 10 rows", "covered by nucleus", "rows in common      10 of 10"):
        assert said in shown, "what is asked for together is done together"
    summary = json.loads(shown.splitlines()[-1])
    assert (summary["violations"], summary["comparison"]["common_rows"]) == ({}, 10)
    assert summary["rows"] == 1, "rows and tokens are those of the figures"
    assert summary["tokens"] < summary["comparison"]["tokens"]
    assert Path(f"{picture}.png").stat().st_size > 5000, "a picture without a kind is PNG"


def test_the_script_runs_where_the_terminal_knows_ascii_only(output):
    done = run_script("explore_logits.py", output, "--stats", PYTHONIOENCODING="ascii", LC_ALL="C")
    assert done.code == 0, done.stderr
    assert done.summary["rows"] == 10


FULL = "explore-logits: cannot write the result: No space left on device; make room\n"
VALIDATE = f"'{sys.executable}' explore_logits.py OUT --validate"
WRITE_TO_BOTH = """
import sys, explore_logits
explore_logits.outlive_readers("stdout", "stderr")
for _ in range(3):
    print("log" * 5000, file=sys.stderr, flush=True)
print("result")
"""


@pytest.mark.parametrize(
    ("command", "end"),
    [
        (f"set -o pipefail; {VALIDATE} | true", (0, "", "")),  # a reader stops early: no error
        (f"{VALIDATE} > /dev/full", (2, "", FULL)),
        *((f"sleep 0.05; exec '{sys.executable}' -c '{WRITE_TO_BOTH}' {way}", (0, "result\n", ""))
          for way in ("2> /dev/full", "2>&-", "2> >(true)")),
    ],
)  # fmt: skip
def test_what_nobody_can_take_is_dropped_but_for_the_result(output, command, end):
    done = run_process(["bash", "-c", command.replace("OUT", f"'{output}'")], cwd=ROOT)
    assert (done.code, done.stdout, done.stderr) == end
