"""The command line of explore_logits: what it prints, its exit codes, and its light import."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import CHATS, ROOT, TEACHER, run_script
from processes import run_process
from small_output import SETTINGS, random_rows, write_output

import explore_logits
from explore_logits import build_parser, main, parse_args, row_list

STORED = SETTINGS | {"store_tokens": True, "model": str(TEACHER), "dataset": str(CHATS)}


HEAVY = ("torch", "transformers", "datasets", "pandas", "matplotlib", "seaborn", "huggingface_hub",
         "termcolor", "jinja2", "selenium")  # fmt: skip


PROMISED = (
    "SCHEMA", "pack_indices", "unpack_indices", "quantize_logits", "dequantize_logits",
    "load_logit_dataset", "get_sample", "iter_samples", "load_extraction_config",
    "dequantize_top_logits", "dequantize_sampled_logits", "dequantize_all_logits",
    "logits_to_probs", "get_nucleus_probability_mass", "decode_top_tokens", "print_top_tokens",
    "print_sample_info", "analyze_token_probabilities", "visualize_conversation_probabilities",
    "analyze_nucleus_sizes", "NucleusSizeStats", "compute_dataset_stats", "print_dataset_stats",
    "compute_bytes_per_token_stats", "plot_logit_distribution", "plot_nucleus_vs_sampled",
    "plot_nucleus_sizes", "plot_nucleus_size_analysis", "quick_explore", "execute_analysis",
)  # fmt: skip


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows = random_rows(10, settings=STORED, tokens=30)
    return write_output(tmp_path_factory.mktemp("cli"), rows, settings=STORED)


def run_python(script: str) -> str:
    """Run a program beside the scripts and return what it prints."""
    done = run_process([sys.executable, "-c", script], cwd=ROOT)
    assert done.code == 0, done.stderr
    return done.stdout


# The module itself --------------------------------------------------------------------------------


def test_importing_and_reading_need_the_standard_library_numpy_and_pyarrow_only(
    output: Path,
) -> None:
    heavy = [name for name in HEAVY if name != "pandas"]  # pyarrow looks for it by itself
    lines = run_python(
        f"import sys, explore_logits as e; print([m for m in {HEAVY} if m in sys.modules]);"
        f"name = {str(output)!r}; s = e.get_sample(name, 3);"
        "e.decode_top_tokens(s, 0); e.print_sample_info(s); e.validate_output(name);"
        f"print([m for m in {heavy} if m in sys.modules])"
    ).splitlines()
    assert lines[0] == lines[-1] == "[]"


MISSING = [
    ("matplotlib", "e.plot_nucleus_sizes(s)", f"pip install -e '{ROOT}[viz]'"),
    ("seaborn", "e.plot_nucleus_sizes(s)", f"pip install -e '{ROOT}[viz]'"),
    ("torch", "e.analyze_nucleus_sizes(d, device='cpu')", "pip install torch"),
    ("torch", "e.LogitIterableDataset(d)", "pip install torch"),
    ("torch", "e.distillation_loss(0, {})", "pip install torch"),
    ("huggingface_hub", "e.load_logit_dataset('user/name')", "pip install huggingface_hub"),
    ("transformers", "e.load_tokenizer('user/name')", "pip install transformers"),
    ("datasets", "e.open_source('user/name')", "pip install datasets"),
]


def test_a_missing_package_is_named_with_what_brings_it(output: Path) -> None:
    said = run_python(
        f"import sys, explore_logits as e\nd = {str(output)!r}\ns = e.get_sample(d)\n"
        f"for module, call, _ in {MISSING}:\n"
        "    sys.modules[module] = None\n"
        "    try:\n        eval(call)\n"
        "    except e.LogitsError as error:\n        print(error)\n"
        "    del sys.modules[module]\n"
    ).splitlines()
    for line, (module, _, remedy) in zip(said, MISSING, strict=True):
        assert f"{module} is needed" in line
        assert remedy in line


def test_all_names_of_the_module_exist_and_are_sorted_out() -> None:
    names = explore_logits.__all__
    assert len(set(names)) == len(names)
    assert all(hasattr(explore_logits, name) for name in names)
    assert set(PROMISED) <= set(names)


def test_nothing_is_printed_outside_of_what_prints() -> None:
    tree = ast.parse((ROOT / "explore_logits.py").read_text(encoding="utf-8"))
    printing = {
        function.name
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef)
        for call in ast.walk(function)
        if isinstance(call, ast.Call)
        and isinstance(call.func, ast.Name)
        and call.func.id == "print"
    }
    shows = ("print_", "show_", "find_words", "run_commands", "quick_explore", "main")
    assert all(name.startswith(shows) for name in printing), printing


def test_a_line_of_the_log_neither_acts_on_a_terminal_nor_holds_a_token() -> None:
    shown = explore_logits.show_line(" a\n\x1b[31m b\u202e hf_abcDEF123456 ")
    assert shown == "a ␛[31m b⟨U+202E⟩ ***"


# Arguments ----------------------------------------------------------------------------------------


def test_rows_are_numbers_lists_and_ranges() -> None:
    assert row_list("3") == [3]
    assert row_list("0,5,-1") == [0, 5, -1]
    assert row_list("2-4,9") == [2, 3, 4, 9]


@pytest.mark.parametrize(
    "arguments",
    [[], *(["out", *words.split()] for words in (
        "--sample many", "--sample 5-2", "--sample 0-99999999", "--top 0", "--max-samples -3",
        "--unknown"))],
)  # fmt: skip
def test_a_bad_command_line_exits_2(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        parse_args(arguments)
    assert caught.value.code == 2
    assert "explore-logits: error" in capsys.readouterr().err


def test_the_help_fits_80_columns_and_names_the_exit_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    text = build_parser().format_help()
    assert max(map(len, text.splitlines())) <= 80
    assert "3 --validate found" in text
    for flag in ("--sample", "--html", "--stats", "--validate", "--compare", "--plot"):
        assert flag in text


def test_lines_are_broken_between_words_and_wide_characters_count_twice(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    text = f"{'one ' * 9}two three\nfour {'日本語 ' * 5}五 {'a' * 50}"
    assert explore_logits.break_lines(text).split("\n") == [
        "one one one one one one one one one two",
        "three",
        "four 日本語 日本語 日本語 日本語 日本語",
        "五",
        "a" * 50,
    ]
    monkeypatch.delenv("COLUMNS")
    assert explore_logits.break_lines(text) == text


# Runs ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["./nowhere"], "no such folder or file: ./nowhere"),
        (["{output}", "--sample", "10"], "10 rows, there is no row 10"),
        (["{output}", "--split", "test"], "no split 'test'; it has train"),
        (["{output}", "--token", "999"], "there is no token 999"),
        (["{output}", "--compare", "./nowhere"], "no such folder or file: ./nowhere"),
        (["{output}", "--html", "{folder}"], "cannot write {folder}: Is a directory"),
        (["{output}", "--plot", "{folder}"], "cannot write {folder}.png: Is a directory"),
        (["{output}", "--plot", "{folder}.xyz"], "'xyz' is not supported"),
    ],
)
def test_what_is_not_there_or_cannot_be_written_exits_2_with_one_line(
    output: Path,
    tmp_path: Path,
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    places = {"output": output, "folder": tmp_path / "a"}
    for name in ("a", "a.png"):
        (tmp_path / name).mkdir()
    assert main([part.format(**places) for part in arguments]) == 2
    assert len(caplog.messages) == 1
    assert message.format(**places) in caplog.messages[0]
    assert not capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "a.png"]


def test_the_last_line_is_one_json_object_whatever_was_asked(
    output: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page, picture = tmp_path / "new" / "page.html", tmp_path / "plot"
    said = ""
    for arguments in (
        ["--sample", "1,-1", "--top", "4"],
        ["--stats"],
        ["--validate"],
        ["--compare", str(output)],
        ["--sample", "0-3", "--stats", "--html", str(page), "--plot", str(picture)],
        ["--conversation", "4", "--token", "0"],
    ):
        assert main([str(output), *arguments]) == 0
        shown = capsys.readouterr().out
        summary = json.loads(shown.splitlines()[-1])
        assert summary["output"] == str(output)
        assert summary["rows"] in (10, [10, 10])
        said += shown
        if "--plot" in arguments:
            assert summary["plot"] == f"{picture}.png", "a picture without a kind is PNG"
    text = page.read_text(encoding="utf-8")
    assert text.count("<section id=") == 4
    assert "bytes per token" in text
    assert Path(f"{picture}.png").stat().st_size > 5000
    assert "conversation 1:" in said
    assert "typical probability" in said
    assert set(said) & set("█▏▎▍▌▋▊▉")


def test_the_script_runs_where_the_terminal_knows_ascii_only(output: Path) -> None:
    done = run_script("explore_logits.py", output, "--stats", PYTHONIOENCODING="ascii", LC_ALL="C")
    assert done.code == 0, done.stderr
    assert done.summary["rows"] == 10


def test_a_reader_that_stops_early_is_no_error(output: Path) -> None:
    command = [sys.executable, str(ROOT / "explore_logits.py"), str(output), "--validate"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ}
    ) as process:
        assert process.stdout is not None
        process.stdout.close()
        assert process.stderr is not None
        assert process.stderr.read() == b""
        assert process.wait(timeout=60) == 0


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
    done = run_process(["bash", "-c", command], cwd=ROOT)
    assert (done.code, done.stdout) == (0, "result\n")


def test_a_result_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    with open("/dev/full", "w", encoding="utf-8") as full:
        command = [sys.executable, ROOT / "explore_logits.py", write_output(tmp_path), "--validate"]
        done = run_process(command, stdout=full)
    assert done.code == 2
    assert done.stderr == (
        "explore-logits: cannot write the result: No space left on device; make room\n"
    )
