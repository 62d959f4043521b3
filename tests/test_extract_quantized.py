"""A teacher that is quantized on disk: transformers loads it, and its own logits are stored."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TEACHER, extract_chats
from transformers import AutoModelForCausalLM, AutoTokenizer

from explore_logits import iter_samples, load_logit_dataset
from extract_logits import ExtractionConfig, load_teacher

pytest.importorskip("torchao", reason="torchao quantizes the teacher")
VOCAB = 5_000  # entries of the tokenizer; the rows beyond are padding


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save the embedded teacher with its linear layers in 8 bits."""
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    folder = tmp_path_factory.mktemp("quantized")
    model = AutoModelForCausalLM.from_pretrained(
        TEACHER, dtype=torch.float32, quantization_config=TorchAoConfig(Int8WeightOnlyConfig())
    )
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(TEACHER).save_pretrained(folder)
    return folder


@torch.no_grad()
def own_logsumexp(folder: Path, input_ids: list[int], positions: list[int]) -> np.ndarray:
    """Return the log-sum-exp (N,) of a model's plain forward pass before each position."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    logits = model(torch.tensor([input_ids])).logits[0, torch.tensor(positions) - 1, :VOCAB]
    return logits.double().logsumexp(-1).numpy()


def test_the_logits_are_those_of_the_quantized_teacher_and_the_numerics_say_so(
    quantized: Path, tmp_path: Path
) -> None:
    output = extract_chats(tmp_path, "--model", quantized, "--limit", 3, "--store-tokens")
    config = ExtractionConfig(model=str(quantized), dataset="d.jsonl", output="./o")
    numerics = load_teacher(config).numerics
    assert numerics["quantization"]["quant_method"] == "torchao"
    assert "torchao" in numerics["versions"]
    for sample in iter_samples(load_logit_dataset(output)):
        text = list(sample["input_ids"]), list(sample["token_positions"])
        stored = np.asarray(sample["logsumexp"])
        np.testing.assert_allclose(stored, own_logsumexp(quantized, *text), atol=1e-4)
        plain = own_logsumexp(TEACHER, *text)
        assert np.abs(stored - plain).max() > 1e-3, "8 bits would not be noticed"
