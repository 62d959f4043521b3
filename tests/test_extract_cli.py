"""The command line of `extract_logits.py`: exit codes, one-line errors, which stream gets what."""

from __future__ import annotations

import shutil

import pytest
from conftest import CHATS, TEACHER, run_script


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"model": None}, "--model"), ({"output": " "}, "--output is empty"),
        ({"model": "./no-such-model"}, "no such folder"),
        *(({name: 300 * "x"}, "too long") for name in ("model", "dataset", "output", "cache_dir")),
        ({"model": "weights.gguf"}, "is GGUF, which is not read"),
        ({"model": "./bare"}, "the folder holds none that can be read"),  # no tokenizer
        ({"dataset": "broken.jsonl"}, "line 2"),
        ({"dataset": "unanswered.jsonl"}, "2 no_assistant; check --mess"),
        ({"split": "tset"}, "tset"), ({"messages_col": "chat"}, "chat"),
        ({"index_col": "messages"}, "not an integer"), ({"device": "tpu"}, "--device tpu"),
        ({"top_p_max": 256}, "--top-p-max 256"), ({"sampled_n": 1000000}, "--sampled-n 1000000"),
        ({"start_offset": 1000000}, "--start-offset"),
        ({"start_offset": 1000000, "streaming": True}, "no conversation was selected"),
        ({"chat_template": "./no.jinja"}, "no.jinja"), ({"limt": 3}, "--limt: is it --limit?"),
        ({"tokenized_dataset": "data/none.parquet"}, "no such folder or file"),
        ({"output": "hf_abcDEF123456abcDEF"}, "--output '***' is neither"),
        ({"output": "./taken/below/it"}, "--output: "),
    ],
    ids=str,
)  # fmt: skip
def test_a_bad_option_or_source_is_one_line_that_names_it(options, said, extract, tmp_path):
    """And it leaves nothing behind."""
    alone = '{"messages": [{"role": "user", "content": "hi"}]}\n'
    answered = '{"question": "a", "answer": "b"}\n'
    files = {"taken/below": "", "bare/config.json": '{"model_type": "llama"}'}
    files |= {"weights.gguf": "GGUF", "broken.jsonl": answered + '{"question": [\n' + answered}
    files |= {"unanswered.jsonl": 2 * alone}
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    done = extract(**{"model": TEACHER, "dataset": CHATS, **options})
    assert (done.code, done.stdout) == (2, "")
    assert said in done.stderr.strip().splitlines()[-1]
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("cached", [True, False])
def test_a_hub_out_of_reach_is_asked_once_and_its_cache_used(cached, tmp_path):
    """Its client would ask for each file six times, and wait for half a minute."""
    if cached:
        folder = tmp_path / "hub" / "models--someone--model"
        shutil.copytree(TEACHER, folder / "snapshots" / ("0" * 40))
        (folder / "refs").mkdir()
        (folder / "refs" / "main").write_text("0" * 40)
    words = ("--model", "someone/model", "--dataset", CHATS, "--limit", 2, "--output", "./logits")
    away = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0"}
    away["HF_HUB_CACHE"] = str(tmp_path / "hub")
    done = run_script("extract_logits.py", *words, cwd=tmp_path, **away)
    assert done.code == (0 if cached else 2), done.stderr
    assert "Retry" not in done.stderr
    assert ("the Hub is out of reach" in done.stderr) == (not cached), done.stderr


def test_a_job_that_the_hub_does_not_show_ends_in_4_with_a_summary(hub, tmp_path):
    hub.fault("GET /api/datasets", status=401, count=99)
    words = ("--output", "user/logits", "--resume")
    done = run_script("extract_logits.py", *words, cwd=tmp_path, HF_HUB_OFFLINE="0")
    assert (done.code, done.summary["exit_code"]) == (4, 4), done.stderr
    assert done.stderr.splitlines()[-1].startswith("extract_logits.py: user/logits: HTTP 401")
