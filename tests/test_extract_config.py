"""Section 0 of `extract_logits.py`: one dataclass is the truth for every option."""

from __future__ import annotations

from dataclasses import fields
from typing import Any, get_args, get_type_hints

import pytest

from extract_logits import ConfigError, ExtractionConfig, parse_args

REQUIRED = {"model": "m", "dataset": "d", "output": "./o"}
TASKS = {"executor": "local", "tasks": 3}
ARGV = ["--model", "m", "--dataset", "d", "--output", "./o"]

# An option's text on the command line and the value that it means; what it needs beside it.
SAMPLES: dict[str, tuple[str, Any]] = {
    "executor": ("local", "local"), "dtype": ("bfloat16", "bfloat16"), "engine": ("vllm", "vllm"),
    "turns": ("last", "last"), "rank": ("0", 0), "engine_args": ('{"seed": 1}', {"seed": 1}),
    "executor_options": ('{"time": "1:00"}', {"time": "1:00"}),
    "template_kwargs": ('{"a": 1}', {"a": 1}),
    "batch_thresholds": ('{"512": 8, "1024": 4}', {512: 8, 1024: 4}),
    "sample_subject": ('{"math": 20, "": 3, "*": 0}', {"math": 20, "": 3, "*": 0}),
}  # fmt: skip
PARTNERS = {
    "executor": "--tasks 2", "tasks": "--executor local", "sample_subject": "--subject-col s",
    "subject_col": "--sample-subject {}", "engine_args": "--engine vllm",
    "rank": "--world-size 8", "world_size": "--rank 1",
}  # fmt: skip


def make(**options: Any) -> ExtractionConfig:
    return ExtractionConfig(**{**REQUIRED, **options})


@pytest.mark.parametrize("name", [entry.name for entry in fields(ExtractionConfig)])
def test_every_option_reaches_its_field_with_its_type(name):
    hint = get_type_hints(ExtractionConfig)[name]
    flag = "--" + name.replace("_", "-")
    plain = {bool: ("", True), str: ("text", "text"), int: ("7", 7), float: ("0.5", 0.5)}
    text, value = SAMPLES[name] if name in SAMPLES else plain[(get_args(hint) or [hint])[0]]
    argv = [*ARGV, flag, *([text] if text else []), *PARTNERS.get(name, "").split()]
    assert parse_args(ARGV) == ExtractionConfig(**REQUIRED)
    found = getattr(parse_args(argv), name)
    assert (found, type(found)) == (value, type(value))


@pytest.mark.parametrize(
    ("name", "inside", "outside"),
    [
        ("top_p", [1e-9, 0.5, 1], [0, -0.1, 1.0001, float("nan")]),
        ("top_p_max", [1, 255], [0, 256]), ("sampled_n", [0, 1000], [-1]),
        ("min_p", [1 / 255, 0.5], [0.001, 0.6, -1.0, float("nan")]),
        ("logit_bits", [4, 16], [3, 17]), ("limit", [1, 2**31], [0, -5, 10**30]),
        ("start_offset", [0, 10**9], [-1]), ("seed", [0, 2**63 - 1], [-1, 2**63]),
        ("max_seq_len", [2], [1, 0]), ("max_batch_size", [1], [0]), ("max_batch_tokens", [1], [0]),
        ("upload_every", [1], [0, 10**30]), ("upload_size_mb", [0.5], [0, -1, float("nan")]),
        ("max_runtime_minutes", [0.01], [0, -1]), ("dtype", ["float16"], ["float8", ""]),
    ],
)  # fmt: skip
def test_a_value_is_taken_up_to_its_bounds_and_refused_beyond(name, inside, outside):
    for value in inside:
        assert getattr(make(**{name: value}), name) == value
    flag = "--" + name.replace("_", "-")
    for value in outside:
        with pytest.raises(ConfigError, match=f"{flag} {value}"):
            make(**{name: value})


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"resume": True, "force_restart": True}, "--resume --force-restart"),
        ({"sample_subject": {"a": 1}}, "--sample-subject --subject-col"),
        ({"rank": 0}, "--rank --world-size"),
        ({"rank": 2, "world_size": 2}, "--rank --world-size 2"),
        ({"full_dataset": True, "limit": 5}, "--full-dataset --limit"),
        ({"engine_args": {}}, "--engine vllm"),
        ({"engine": "vllm", "tensor_parallel": True}, "tensor_parallel_size"),
        ({"engine": "vllm", "attn": "sdpa"}, "--attn sdpa --engine transformers"),
        ({"engine": "vllm", "engine_args": {"max_model_len": 9}}, "--max-seq-len"),
        ({"executor": "local"}, "--tasks"), ({**TASKS, "plan": True}, "--plan"),
        ({**TASKS, "force_restart": True}, "empty output"),
        ({"length_col": "n", "streaming": True}, "--length-col --streaming --tokenized-dataset"),
        ({"dataset": "."}, "--output ./o --dataset"),
        ({"model": "..", "output": "u/n", "cache_dir": "c"}, "--cache-dir c --model .."),
    ],
)  # fmt: skip
def test_options_that_contradict_each_other_are_refused(options, named):
    with pytest.raises(ConfigError) as refusal:
        make(**options)
    assert all(word in str(refusal.value) for word in named.split())
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("flag", "text"),
    [("--batch-thresholds", "{512: 8}"), ("--batch-thresholds", '{"512": true}'),
     ("--sample-subject", '{"math": -1}'), ("--limit", "1.5"), ("--dtype", "float8")],
)  # fmt: skip
def test_a_value_that_cannot_be_read_exits_2_with_one_line_that_names_it(flag, text, capsys):
    with pytest.raises(SystemExit) as stop:
        parse_args([*ARGV, flag, text])
    message = capsys.readouterr().err
    assert stop.value.code == 2
    assert message.count("\n") == 1
    assert flag in message
    assert text in message
