"""The weights of the tail, and the distillation loss against the dense loss.

Random checks compare means of thousands of draws with the truth, in standard errors. A mean of
2,000 draws beyond 4.5 of them has a chance of 7e-6; some 40 such checks are made, so a false alarm
comes in about one of 3,000 changes of the seed, and the seeds are fixed.
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from sparse_batches import (
    ROWS,
    dense_loss,
    estimate,
    exact_block,
    make_batch,
    student_row,
    teacher_row,
)

from explore_logits import (
    DIVERGENCES,
    TAILS,
    LogitsError,
    distillation_loss,
    sparse_teacher,
    weigh_tail,
)

LIMIT = 4.5  # standard errors


def brute_force_weights(probs: np.ndarray, chosen: list[int]) -> np.ndarray:
    """Return log-weights from the probability of the sample over all orders of drawing it."""

    def probability(left: np.ndarray, sample: list[int]) -> float:
        total = 0.0
        for order in itertools.permutations(sample):
            mass, chance = left.sum(), 1.0
            for i in order:
                chance *= left[i] / mass
                mass -= left[i]
            total += chance
        return total

    whole = probability(probs, chosen)
    weights = []
    for i in chosen:
        without = probs.copy()
        without[i] = 0
        weights.append(probability(without, [j for j in chosen if j != i]) / whole)
    return np.log(weights)


@pytest.mark.parametrize("spread", [0.1, 1.0, 3.0, 8.0])
def test_weights_are_those_of_brute_force_enumeration(spread: float) -> None:
    rng = np.random.default_rng(int(spread * 10))
    for _ in range(25):
        vocab = int(rng.integers(3, 9))
        size = int(rng.integers(1, min(vocab, 6)))
        probs = np.exp(rng.standard_normal(vocab) * spread)
        probs *= rng.choice([1e-6, 0.02, 0.9]) / probs.sum()
        chosen = rng.choice(vocab, size, replace=False).tolist()
        if 1 - probs[chosen].sum() / probs.sum() < 1e-7:
            continue  # differences of such numbers are what enumeration itself cannot tell
        found = weigh_tail(np.log(probs[chosen])[None], [probs.sum()])[0]
        np.testing.assert_allclose(found, brute_force_weights(probs, chosen), atol=1e-7)


def test_a_single_tail_token_stands_for_the_whole_residual() -> None:
    found = weigh_tail([[np.log(0.001)], [np.log(0.02)]], [0.05, 0.03])
    np.testing.assert_allclose(found[:, 0], np.log([50, 1.5]), rtol=1e-7)


def test_weights_are_one_when_the_sample_is_the_whole_tail() -> None:
    probs = np.array([[0.01, 0.02, 0.03]])
    assert (weigh_tail(np.log(probs), [0.06]) == 0).all()
    assert (weigh_tail(np.log(probs), [0.05]) == 0).all(), "rounding may leave more than there is"


def test_probabilities_down_to_exp_minus_1000_neither_underflow_nor_give_nan() -> None:
    spread = np.linspace(-1000, -3, 24)
    found = weigh_tail(np.stack([spread, spread / 2, spread / 100]), [0.1, 0.1, 0.999])
    assert np.isfinite(found).all()
    assert (found >= 0).all()
    # What is never drawn again stands for as much mass, however improbable it is by itself.
    masses = found[0][:10] + spread[:10]
    np.testing.assert_allclose(masses, masses[0], atol=1e-3)


def test_many_more_nodes_give_the_same_weights() -> None:
    rng = np.random.default_rng(3)
    shares = rng.standard_normal((60, 24)) * rng.choice([0.3, 2, 6, 15], (60, 1)) - 12
    rest = np.exp(shares).sum(1) * rng.choice([1.0001, 1.1, 3, 100], 60)
    few, many = weigh_tail(shares, rest), weigh_tail(shares, rest, nodes=1024)
    np.testing.assert_allclose(few, many, atol=1e-6)


@pytest.mark.parametrize("kind", ROWS)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_value_and_gradient_are_unbiased_at_temperature_1(kind: str, divergence: str) -> None:
    found = estimate(kind, divergence, "unbiased")
    value, slope = found.sigmas()
    assert abs(value) < LIMIT
    assert abs(slope) < LIMIT


def test_the_other_ways_to_count_the_tail_are_seen_to_be_biased() -> None:
    batch = make_batch(teacher_row("natural", 1_000).repeat(2_000, 1))
    for tail in ("renormalized", "ghost", "ignore"):
        found = estimate("natural", "forward_kl", tail, batch=batch)
        assert abs(found.sigmas()[0]) > 10, f"{tail}: this test could not tell a bias"


def test_the_ghost_token_never_exceeds_the_true_divergence() -> None:
    for kind, divergence in itertools.product(ROWS, DIVERGENCES):
        found = estimate(kind, divergence, "ghost", draws=2)
        assert found.bias <= 1e-9


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_all_ways_agree_with_the_dense_loss_when_the_whole_vocabulary_is_stored(
    divergence: str, tail: str, temperature: float
) -> None:
    teacher = torch.randn(7, 40, generator=torch.Generator().manual_seed(1))
    student = torch.randn(7, 40, generator=torch.Generator().manual_seed(2)).double()
    sampled = 24 if tail in ("unbiased", "renormalized") else 0
    batch = make_batch(teacher, top_p=1.0, top_p_max=40 - sampled, sampled_n=sampled)
    found = distillation_loss(
        student, batch, divergence=divergence, tail=tail, temperature=temperature, reduction="none"
    )
    true = dense_loss(student, teacher.double(), divergence, temperature)
    np.testing.assert_allclose(found.numpy(), true.numpy(), atol=2e-5)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_gradients_pass_gradcheck(divergence: str, tail: str, temperature: float) -> None:
    teacher = torch.stack([teacher_row(kind, 24) for kind in ROWS])
    batch = make_batch(teacher, top_p_max=9, sampled_n=4)
    student = torch.stack([student_row(row) for row in teacher]).double().requires_grad_()

    def loss(logits: torch.Tensor) -> torch.Tensor:
        return distillation_loss(
            logits,
            batch,
            divergence=divergence,
            tail=tail,
            temperature=temperature,
            reduction="none",
            chunk_tokens=2,
        )

    assert torch.autograd.gradcheck(loss, (student,), atol=1e-6)


def test_the_gradient_is_that_of_the_dense_loss_when_everything_is_stored() -> None:
    teacher = torch.randn(5, 30, generator=torch.Generator().manual_seed(1))
    batch = make_batch(teacher, top_p=1.0, top_p_max=30, sampled_n=0)
    for divergence in DIVERGENCES:
        student = torch.randn(5, 30, generator=torch.Generator().manual_seed(2)).requires_grad_()
        loss = distillation_loss(student, batch, divergence=divergence, tail="ignore")
        (found,) = torch.autograd.grad(loss, student)
        true = dense_loss(student, teacher, divergence).mean()
        np.testing.assert_allclose(found, torch.autograd.grad(true, student)[0], atol=1e-6)


def test_chunks_reductions_and_layouts_give_the_same_loss() -> None:
    teacher = torch.stack([teacher_row("natural", 300, seed=i) for i in range(9)])
    batch = make_batch(teacher)
    grid = torch.randn(1, 10, 300, generator=torch.Generator().manual_seed(4)).requires_grad_()
    each = distillation_loss(grid, batch, reduction="none", chunk_tokens=4)
    flat = distillation_loss(grid[0, :9], batch, reduction="none")
    assert each.shape == (9,)
    torch.testing.assert_close(each, flat)
    torch.testing.assert_close(distillation_loss(grid, batch), each.mean())
    torch.testing.assert_close(distillation_loss(grid, batch, reduction="sum"), each.sum())
    (gradient,) = torch.autograd.grad(each.sum(), grid)
    assert (gradient[0, 9] == 0).all(), "the last position predicts nothing"
    assert (gradient[0, :9].abs().sum(-1) > 0).all()


def test_half_precision_logits_are_widened_before_anything_is_summed() -> None:
    teacher = teacher_row("natural", 2_000)[None]
    batch = make_batch(teacher)
    student = student_row(teacher[0])[None].bfloat16().requires_grad_()
    loss = distillation_loss(student, batch)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, distillation_loss(student.float(), batch))
    loss.backward()
    assert student.grad is not None
    assert student.grad.dtype == torch.bfloat16


def test_students_that_are_sure_or_wrong_give_finite_losses_and_gradients() -> None:
    batch = make_batch(torch.stack([teacher_row(kind, 200) for kind in ROWS]), top_p_max=20)
    for scale, divergence, tail in itertools.product((0, 1e3), DIVERGENCES, TAILS):
        student = scale * torch.randn(3, 200, generator=torch.Generator().manual_seed(6))
        student.requires_grad_()
        loss = distillation_loss(student, batch, divergence=divergence, tail=tail)
        (gradient,) = torch.autograd.grad(loss, student)
        assert torch.isfinite(loss), (scale, divergence, tail)
        assert torch.isfinite(gradient).all(), (scale, divergence, tail)


def test_an_empty_batch_costs_nothing() -> None:
    batch = make_batch(teacher_row("flat", 200)[None])
    none: dict[str, Any] = {n: v[:, :0] for n, v in batch.items() if n.startswith("teacher")}
    student = torch.zeros(1, 2, 200, requires_grad=True)
    loss = distillation_loss(student, {**batch, **none})
    loss.backward()
    assert float(loss.detach()) == 0


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"divergence": "kl"}, "forward_kl"),
        ({"tail": "topk"}, "renormalized"),
        ({"reduction": "avg"}, "mean"),
    ],
)
def test_a_word_that_is_no_choice_is_refused_with_the_choices(
    options: dict[str, Any], named: str
) -> None:
    batch = make_batch(teacher_row("flat", 200)[None])
    with pytest.raises(LogitsError, match=named):
        distillation_loss(torch.zeros(1, 200), batch, **options)


def test_without_a_tail_sample_unbiased_is_refused_and_the_rest_is_not() -> None:
    batch = make_batch(teacher_row("natural", 200)[None], top_p_max=20, sampled_n=0)
    with pytest.raises(LogitsError, match="--sampled-n"):
        distillation_loss(torch.zeros(1, 200), batch)
    for tail in ("ghost", "ignore"):
        for temperature in (1.0, 2.0):
            loss = distillation_loss(torch.zeros(1, 200), batch, tail=tail, temperature=temperature)
            assert torch.isfinite(loss)


def test_a_student_with_a_smaller_vocabulary_is_refused() -> None:
    batch = make_batch(teacher_row("flat", 200)[None])
    with pytest.raises(LogitsError, match="beyond the student's 20 logits"):
        distillation_loss(torch.zeros(1, 20), batch)


def test_quantized_shards_give_the_weights_of_exact_logits_within_their_rounding() -> None:
    block = exact_block(torch.stack([teacher_row(kind, 500) for kind in ROWS]))
    teacher = sparse_teacher(block)
    there = teacher["teacher_mask"]
    mass = np.exp(teacher["teacher_log_probs"] + teacher["teacher_log_weights"])
    assert abs((mass * there).sum(1) - 1).max() < 0.2, "about 1 in sum, exactly so on average"
