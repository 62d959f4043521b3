"""Section 4 of extract_logits: vLLM as the engine, without vLLM; with it: test_extract_vllm.py."""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import test_extract_teacher
import torch
from architectures import conversations, own_logprobs, plain_logits, tiny_model
from safetensors.torch import load_file, save_file

import extract_logits as el
from extract_logits import Teacher, TeacherError, VllmTeacher, load_teacher

configure = partial(test_extract_teacher.configure, engine="vllm")


class StandIn:
    """Gives the states that a model of transformers has, as vLLM does."""

    def __init__(self, model):
        self.model, self.calls = model, []
        config = SimpleNamespace(
            model_config=SimpleNamespace(max_model_len=256, quantization=None),
            cache_config=SimpleNamespace(cache_dtype="auto"),
        )
        self.llm_engine = SimpleNamespace(vllm_config=config)

    @torch.no_grad()
    def states(self, ids):
        return self.model.model(input_ids=ids[None]).last_hidden_state[0]

    def encode(self, prompts, *, pooling_task, use_tqdm):
        rows = [torch.tensor(prompt["prompt_token_ids"]) for prompt in prompts]
        self.calls.append([len(row) for row in rows])
        return [SimpleNamespace(outputs=SimpleNamespace(data=self.states(row))) for row in rows]


@pytest.fixture
def engine(monkeypatch, tmp_path) -> StandIn:
    """Let a model of transformers, saved in ./model, stand for vLLM, which is installed."""
    model = tiny_model("llama")
    model.save_pretrained(tmp_path / "model")
    stand_in = StandIn(model)
    vllm: Any = ModuleType("vllm")
    vllm.__spec__, vllm.__version__ = SimpleNamespace(name="vllm"), "0"
    monkeypatch.setitem(sys.modules, "vllm", vllm)
    monkeypatch.setattr(VllmTeacher, "_own_logprobs", lambda _, ids: own_logprobs(model, ids))
    monkeypatch.setattr(el, "start_vllm", lambda arguments: stand_in)
    return stand_in


@pytest.mark.parametrize("family", ["llama, tied", *el.VLLM_FAMILIES])
def test_the_head_apart_is_that_of_the_whole_model(family, tmp_path):
    tiny_model(family).save_pretrained(tmp_path)
    whole = Teacher(tiny_model(family))
    config = configure(tmp_path, engine="transformers")
    head = el.load_head(config, el.load_model_config(config), torch.device("cpu"))
    apart = VllmTeacher.__new__(VllmTeacher)
    with pytest.raises(AttributeError, match="arguments"):  # where vLLM would start
        Teacher.__init__(apart, head)
    inputs = {"input_ids": torch.arange(20, 50)[None], "attention_mask": None}
    states, outputs, _ = whole._hidden(inputs, torch.arange(30))
    apart.layout = ""
    same = apart._head_logits(states, apart._outputs)
    assert torch.equal(same, whole._head_logits(states, outputs))


def test_conversations_go_in_windows_up_to_the_last_wanted_token(engine, tmp_path, monkeypatch):
    teacher = load_teacher(configure(tmp_path / "model"))
    assert teacher.numerics["versions"]["vllm"] == "0"
    assert json.loads(json.dumps(teacher.numerics))["layout"] == "vllm"
    sequences, positions = conversations()
    positions = [at[: len(at) // 2 + 1] for at in positions]
    positions[1] = positions[1][:0]
    monkeypatch.setattr(el, "FEED_BYTES", 75 * 32 * 4)
    engine.calls.clear()
    got = torch.cat(list(teacher.iter_logits(sequences, positions, chunk_tokens=7)))
    rows = [row for row in zip(sequences, positions, strict=True) if len(row[1])]
    want = torch.cat([plain_logits(engine.model, *row) for row in rows])
    assert engine.calls == [[20], [16, 1, 19]], "windows of 40 + 23 and 31 + 2 + 37 tokens"
    torch.testing.assert_close(got, want, atol=1e-5, rtol=0)


def test_states_that_do_not_fit_the_head_or_see_later_tokens_are_refused(
    engine, tmp_path, monkeypatch
):
    right, config = engine.states, configure(tmp_path / "model")
    for wrong in (lambda s: s * 1.5, lambda s: s.roll(1, 0), lambda s: s[1:]):
        monkeypatch.setattr(engine, "states", lambda ids, wrong=wrong: wrong(right(ids)))
        with pytest.raises(TeacherError, match=r"do not fit the head|states of"):
            load_teacher(config)
    monkeypatch.setattr(VllmTeacher, "_refuse_wrong_states", lambda *_: None)
    monkeypatch.setattr(engine, "states", lambda ids: right(ids) + right(ids.flip(0)))
    with pytest.raises(TeacherError, match="in vLLM it is not causal"):
        load_teacher(config)


@pytest.mark.parametrize(
    ("family", "asked", "remedy"),
    [("gptj", {}, {"engine_args": {"unchecked": True}}),
     ("phi3, longrope", {}, {"max_seq_len": 32}),
     ("llama", {"max_seq_len": 257}, {"max_seq_len": 256})],
)  # fmt: skip
def test_a_family_that_was_not_compared_needs_a_word(family, asked, remedy, engine, tmp_path):
    """And rows of more positions, or of other angles than a pass of vLLM has, are refused."""
    tiny_model(family).save_pretrained(tmp_path)
    with pytest.raises(TeacherError):
        el.load_model_config(configure(tmp_path, **asked))
    el.load_model_config(configure(tmp_path, **{**asked, **remedy}))


def test_a_quantized_head_is_refused(engine, tmp_path):
    config, file = configure(tmp_path / "model"), tmp_path / "model" / "model.safetensors"
    weights = load_file(file)
    low = weights["lm_head.weight"].to(torch.float8_e4m3fn)
    for more in ({"lm_head.weight_scale": torch.ones(96, 1)}, {"lm_head.weight": low}):
        save_file({**weights, **more}, file, {"format": "pt"})
        with pytest.raises(TeacherError, match="the head is quantized"):
            load_teacher(config)


def test_the_families_that_are_let_in_are_those_of_the_table():
    text = (Path(__file__).parent.parent / "docs" / "architectures.md").read_text()
    table = text.partition("\n## vLLM\n")[2].partition("\n## ")[0]
    lines = [line.split(" | ") for line in table.splitlines() if line.startswith("| ")][1:]
    right = [name for name, off, *_ in lines if off != "—" and float(off) < 1e-4]
    assert {name.strip("| ").split(",")[0] for name in right} == set(el.VLLM_FAMILIES)
