"""Section 4 of extract_logits: load a model, run it over conversations, return wanted logits."""

from __future__ import annotations

import pytest
from architectures import largest_difference, tiny_model

from extract_logits import Teacher


@pytest.mark.parametrize("family", ["qwen2", "gemma2", "gpt_oss", "opt", "bloom", "mamba2"])
def test_logits_are_those_of_the_plain_forward_one_conversation_at_a_time(family: str) -> None:
    """Float32, tolerance from the promise: 1e-4."""
    assert largest_difference(Teacher(tiny_model(family))) <= 1e-4
