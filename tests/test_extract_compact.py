"""Compact rows: every token of at least min_p, and points at equal distances on the rest."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy.special import softmax

import extract_logits as el


def compact(logits: torch.Tensor, min_p: float, **how: Any) -> el.ExtractedTokens:
    """Extract compact rows of conversations `first`, `first` + 1, …"""
    index = torch.arange(logits.shape[0]) + how.pop("first", 0)
    usual = {"top_p": 0.98, "top_p_max": 100, "sampled_n": 24, "seed": 7}
    return el.extract_tokens(logits, index, index + 3, min_p=min_p, **usual | how)


def points(tokens: el.ExtractedTokens, row: int) -> list[int]:
    """Return the ids that a row's points hit."""
    return tokens.sampled_ids[row, : tokens.sampled_counts[row]].tolist()


def normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


SHAPES = {
    "peaked": lambda v: normal(1, v) * 8,
    "natural": lambda v: normal(2, v) * 3,
    "flat": lambda v: torch.linspace(0, 0.01, v),
    "masked": lambda v: torch.where(torch.arange(v) % 3 == 1, -math.inf, normal(2, v) * 3),
    "a rest of 1e-12": lambda v: torch.where(torch.arange(v) == 1, 30.0, 2.0),
    "ties": lambda v: (torch.arange(v) % 5).float() * 2,
    "bfloat16": lambda v: (normal(3, v) * 4).bfloat16(),
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("vocab", [2, 64, 5000])
@pytest.mark.parametrize("min_p", [1 / 255, 0.01, 0.5])
def test_a_row_holds_what_the_definition_says(shape, vocab, min_p):
    """By numpy from the words: ids with p >= T, and ceil(rest / T) points, sorted."""
    logits = SHAPES[shape](vocab).unsqueeze(0)
    p = softmax(logits[0].double().numpy())
    kept = np.flatnonzero(p >= min_p * (1 - 1e-11))
    rest = math.fsum(np.delete(p, kept))
    for reference in (True, False):
        tokens = compact(logits, min_p, reference=reference)
        assert tokens.usable[0]
        assert tokens.top_counts[0] == kept.size
        ids = tokens.top_ids[0, : kept.size].tolist()
        assert ids == sorted(kept.tolist(), key=lambda i: (-float(logits[0, i]), i))
        drawn = points(tokens, 0)
        assert len(drawn) == math.ceil(rest / min_p * (1 - 1e-9))
        assert drawn == sorted(drawn)
        assert not set(drawn) & set(ids)
        assert np.all(p[drawn] > 0)
        assert tokens.sampled_logits.shape == (1, 0)


@pytest.mark.parametrize("reference", [True, False])
@pytest.mark.parametrize("shape", ["natural", "flat", "masked", "ties"])
@pytest.mark.parametrize(("vocab", "grid"), [(50, 2000), (130, 2000), (9001, 200), (151_936, 20)])
def test_every_token_is_hit_as_often_as_it_is_likely(monkeypatch, shape, vocab, grid, reference):
    """By enumeration: over a grid of a row's one number, points are at equal distances.

    So of the ids up to any one, as many points hit as their probability says, but for one.
    """
    min_p = 0.03
    numbers = iter([(n + 0.5) / grid for n in range(grid)])
    row = SHAPES[shape](vocab)
    p = softmax(row.double().numpy())

    def enumerated(states, _):
        return torch.tensor([[next(numbers)] for _ in states], dtype=torch.float64)

    monkeypatch.setattr(el, "uniform_numbers", enumerated)
    tokens = compact(row.expand(grid, -1), min_p, reference=reference)
    assert not list(numbers)
    there = np.arange(tokens.sampled_ids.shape[1]) < tokens.sampled_counts.numpy()[:, None]
    hits = np.bincount(tokens.sampled_ids.numpy()[there], minlength=vocab)
    tail = np.where(p < min_p, p, 0)
    wanted = tail.cumsum() / tail.sum() * there.sum()
    assert np.abs(hits.cumsum() - wanted).max() <= 1
    assert np.all(hits[tail == 0] == 0)


def test_numbers_depend_on_seed_conversation_and_position_alone():
    logits = normal(4, 6, 900)
    whole, other = compact(logits, 0.01), compact(logits, 0.01, seed=8)
    alone = compact(logits[4:5], 0.01, first=4)
    assert points(alone, 0) == points(whole, 4) != points(other, 4)


@pytest.mark.parametrize("reference", [True, False])
def test_logits_that_mean_nothing_are_not_usable(reference):
    logits = normal(6, 4, 200)
    logits[1, 150], logits[2], logits[3, 150] = math.nan, -math.inf, math.inf
    tokens = compact(logits, 0.01, reference=reference)
    assert tokens.usable.tolist() == [True, False, False, False]
    assert tokens.sampled_counts[1:].tolist() == [0, 0, 0]


def test_options_of_the_other_rows_are_refused_beside_it():
    """Their defaults, too."""
    command = ["--model", "m", "--dataset", "d", "--output", "./o", "--min-p", "0.01"]
    for option in ("--top-p 0.98", "--top-p-max 1", "--sampled-n 24"):
        with pytest.raises(el.ConfigError, match="--min-p alone says what is kept"):
            el.parse_args([*command, *option.split()])
    assert el.parse_args(command).min_p == 0.01
