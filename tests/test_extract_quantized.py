"""A teacher that is quantized on disk: transformers loads it, and its own logits are stored."""

from __future__ import annotations

import numpy as np
import oracle
import pytest
import torch
from conftest import TEACHER, extract_chats
from test_extract_teacher import configure
from transformers import AutoModelForCausalLM, AutoTokenizer

from explore_logits import iter_samples, load_logit_dataset
from extract_logits import load_teacher

pytest.importorskip("torchao", reason="torchao quantizes the teacher")


def test_the_logits_are_those_of_the_quantized_teacher_and_the_numerics_say_so(tmp_path):
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    quantized, bits8 = tmp_path / "quantized", TorchAoConfig(Int8WeightOnlyConfig())
    how = {"dtype": torch.float32, "quantization_config": bits8}
    AutoModelForCausalLM.from_pretrained(TEACHER, **how).save_pretrained(quantized)
    AutoTokenizer.from_pretrained(TEACHER).save_pretrained(quantized)
    output = extract_chats(tmp_path, "--model", quantized, "--limit", 3, "--store-tokens")
    numerics = load_teacher(configure(quantized)).numerics
    assert numerics["quantization"]["quant_method"] == "torchao"
    assert "torchao" in numerics["versions"]
    models = [oracle.load_reference(str(folder))[0] for folder in (quantized, TEACHER)]
    for sample in iter_samples(load_logit_dataset(output)):
        before, ids = torch.tensor(sample["token_positions"]) - 1, list(sample["input_ids"])
        # 5,000 entries of the tokenizer; the rows beyond are padding
        logits = (oracle.full_forward(model, ids)[before, :5_000].double() for model in models)
        own, plain = (np.abs(sample["logsumexp"] - x.logsumexp(-1).numpy()).max() for x in logits)
        assert own < 1e-4
        assert plain > 1e-3, "8 bits would not be noticed"
