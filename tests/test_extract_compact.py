"""Compact rows: every token of at least min_p, and points at equal distances on the rest."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

import extract_logits
from extract_logits import ConfigError, ExtractedTokens, extract_tokens, parse_args


def compact(logits: torch.Tensor, min_p: float, **how: Any) -> ExtractedTokens:
    """Extract compact rows of conversations `first`, `first` + 1, …"""
    index = torch.arange(logits.shape[0]) + how.pop("first", 0)
    usual = {"top_p": 0.98, "top_p_max": 100, "sampled_n": 24, "seed": 7}
    return extract_tokens(logits, index, index + 3, min_p=min_p, **usual | how)


def points(tokens: ExtractedTokens, row: int) -> list[int]:
    """Return the ids that a row's points hit."""
    return tokens.sampled_ids[row, : tokens.sampled_counts[row]].tolist()


def chances(logits: torch.Tensor) -> np.ndarray:
    """Return the probabilities of one row, by numpy."""
    values = logits.double().numpy()
    weights = np.exp(values - values.max())
    return weights / weights.sum()


def normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


SHAPES = {
    "peaked": lambda v: normal(1, v) * 8,
    "natural": lambda v: normal(2, v) * 3,
    "flat": lambda v: torch.linspace(0, 0.01, v),
    "one for all": lambda v: torch.where(torch.arange(v) == 1, 0.0, -math.inf),
    "a rest of 1e-12": lambda v: torch.where(torch.arange(v) == 1, 30.0, 2.0),
    "ties": lambda v: (torch.arange(v) % 5).float() * 2,
    "bfloat16": lambda v: (normal(3, v) * 4).bfloat16(),
    "1e-30": lambda v: torch.where(torch.arange(v) % 7 == 1, 0.0, -69.0),
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("vocab", [2, 64, 5000])
@pytest.mark.parametrize("min_p", [1 / 255, 0.01, 0.5])
def test_a_row_holds_what_the_definition_says(shape: str, vocab: int, min_p: float) -> None:
    """By numpy from the words: ids with p >= T, and ceil(rest / T) points, sorted."""
    logits = SHAPES[shape](vocab).unsqueeze(0)
    p = chances(logits[0])
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
@pytest.mark.parametrize("shape", ["natural", "flat", "peaked", "ties"])
@pytest.mark.parametrize("vocab", [50, 130])
def test_every_token_is_hit_as_often_as_its_probability_says(
    monkeypatch: pytest.MonkeyPatch, shape: str, vocab: int, reference: bool
) -> None:
    """By enumeration: the one random number of a row runs over a fine grid."""
    grid, min_p = 20_000, 0.03
    numbers = (torch.arange(grid, dtype=torch.float64) + 0.5) / grid
    row = SHAPES[shape](vocab)
    p = chances(row)
    hits = np.zeros(vocab)
    at = 0

    def enumerated(states: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
        nonlocal at
        at += len(states)
        return numbers[at - len(states) : at].unsqueeze(1)

    monkeypatch.setattr(extract_logits, "uniform_numbers", enumerated)
    tokens = compact(row.expand(grid, -1), min_p, reference=reference)
    counts = tokens.sampled_counts.numpy()
    assert at == grid
    for column in range(tokens.sampled_ids.shape[1]):
        there = counts > column
        hits += np.bincount(tokens.sampled_ids[:, column].numpy()[there], minlength=vocab)
    tail = p < min_p
    wanted = np.where(tail, p, 0) / p[tail].sum() * counts[0]
    assert np.abs(hits / grid - wanted).max() <= 1.5 / grid * max(1, counts[0])
    assert np.all(hits[~tail] == 0)


def test_numbers_depend_on_seed_conversation_and_position_alone() -> None:
    logits = normal(4, 6, 900)
    whole, other = compact(logits, 0.01), compact(logits, 0.01, seed=8)
    alone = compact(logits[4:5], 0.01, first=4)
    assert points(alone, 0) == points(whole, 4) != points(other, 4)


@pytest.mark.parametrize("reference", [True, False])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_logits_that_mean_nothing_are_not_usable(bad: float, reference: bool) -> None:
    logits = normal(6, 3, 200)
    logits[1, 150] = bad
    logits[2] = -math.inf
    tokens = compact(logits, 0.01, reference=reference)
    assert tokens.usable.tolist() == [True, False, False]
    assert tokens.sampled_counts[1:].tolist() == [0, 0]


@pytest.mark.parametrize("option", ["--top-p 0.98", "--top-p-max 1", "--sampled-n 24"])
def test_options_of_the_other_rows_are_refused_beside_it(option: str) -> None:
    """Their defaults, too."""
    command = ["--model", "m", "--dataset", "d", "--output", "./o", "--min-p", "0.01"]
    with pytest.raises(ConfigError, match="--min-p alone says what is kept"):
        parse_args([*command, *option.split()])
    assert parse_args(command).min_p == 0.01
