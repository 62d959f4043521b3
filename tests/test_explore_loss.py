"""The weights of the tail, and the distillation loss against the dense loss.

Random checks compare means of thousands of draws with the truth, in standard errors. A mean of
2,000 draws beyond 4.5 of them has a chance of 7e-6; some 40 such checks are made, so a false alarm
comes in about one of 3,000 changes of the seed, and the seeds are fixed.
"""

import itertools
from typing import ClassVar

import numpy as np
import pytest
import sparse_batches as sparse
import torch
from sparse_batches import ROWS, dense_loss, make_batch, randn, teacher_row
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import explore_logits as explore
from explore_logits import DIVERGENCES, TAILS, distillation_loss, weigh_tail


def batch_of(kinds, vocab=200, **settings):
    """Return a batch of different tokens of these kinds."""
    rows = [teacher_row(kind, vocab, seed=i) for i, kind in enumerate(kinds)]
    return make_batch(torch.stack(rows), **settings)


def assert_same_gradients(found, wanted, leaves, **tolerances):
    """Fail where two losses, or lists of them, have other gradients; weighed one by one."""
    outer = randn(*found.shape, seed=11) if found.shape else None
    grads = [torch.autograd.grad(loss, leaves, outer) for loss in (found, wanted)]
    for one, two in zip(*grads, strict=True):
        assert one.dtype == two.dtype
        torch.testing.assert_close(one.float(), two.float(), **tolerances)


def set_probability(probs, sample):
    """Return the probability of drawing a set without replacement, over all orders of it."""
    total = 0.0
    for order in itertools.permutations(sample):
        mass, chance = probs.sum(), 1.0
        for i in order:
            chance *= probs[i] / mass
            mass -= probs[i]
        total += chance
    return total


def every_tail(teacher, nucleus, size):
    """Return a batch of every tail sample there is of one row, and the probability of each."""
    log_p = teacher.double().log_softmax(-1).numpy()
    order = np.argsort(-log_p)
    rest = np.exp(log_p[order[nucleus:]])
    tails = [list(chosen) for chosen in itertools.combinations(range(rest.size), size)]
    chances = np.array([set_probability(rest, tail) for tail in tails])
    zeros = np.zeros(chances.size)
    top, tail = (
        sparse.exact_entries(np.full(zeros.size, width), ids, log_p[ids], zeros)
        for width, ids in (
            (nucleus, np.tile(order[:nucleus], zeros.size)),
            (size, order[nucleus:][tails].reshape(-1)),
        )
    )
    block = explore.TokenBlock(np.zeros(1, int), np.array([0, zeros.size]), top, tail)
    return explore.collate_logits([sparse.make_row(block)]), chances


@pytest.mark.parametrize("spread", [0.1, 1.0, 3.0, 8.0])
def test_weights_are_those_of_brute_force_enumeration(spread):
    rng = np.random.default_rng(int(spread * 10))
    for rest in np.repeat([1e-6, 0.02, 0.9], 8):
        vocab = int(rng.integers(3, 9))
        probs = np.exp(rng.standard_normal(vocab) * spread)
        probs *= rest / probs.sum()
        chosen = rng.choice(vocab, int(rng.integers(1, min(vocab, 6))), replace=False).tolist()
        whole = set_probability(probs, chosen)
        wanted = []
        for i in chosen:  # drawn first, and then the others of all that is left
            left = np.where(np.arange(vocab) == i, 0, probs)
            wanted.append(np.log(set_probability(left, [j for j in chosen if j != i]) / whole))
        found = weigh_tail(np.log(probs[chosen])[None], [rest])[0].numpy()
        np.testing.assert_allclose(found, wanted, atol=1e-7)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize(("nucleus", "size"), [(2, 1), (2, 3), (0, 4), (5, 2)])
def test_the_mean_over_every_sample_is_the_dense_loss_and_gradient(divergence, nucleus, size):
    teacher, student = 2 * randn(9, seed=nucleus + size), randn(9, seed=99).double()
    batch, chances = every_tail(teacher, nucleus, size)
    assert chances.sum() == pytest.approx(1)
    student = student.repeat(chances.size, 1).requires_grad_()
    losses = distillation_loss(student, batch, divergence=divergence, reduction="none")
    mean = (losses * torch.from_numpy(chances)).sum()
    (gradient,) = torch.autograd.grad(mean, student)
    one = student[0].detach().requires_grad_()
    true = dense_loss(one[None], teacher.double()[None], divergence).sum()
    assert float(mean.detach()) == pytest.approx(float(true.detach()), abs=3e-6), "float32 columns"
    (wanted,) = torch.autograd.grad(true, one)
    np.testing.assert_allclose(gradient.sum(0), wanted, atol=3e-6)


def test_probabilities_down_to_exp_minus_1000_neither_underflow_nor_give_nan():
    spread = np.linspace(-1000, -3, 24)
    found = weigh_tail(np.stack([spread, spread / 2, spread / 100]), [0.1, 0.1, 0.999]).numpy()
    assert np.isfinite(found).all()
    assert (found >= 0).all()
    # What is never drawn again stands for as much mass, however improbable it is by itself.
    masses = found[0][:10] + spread[:10]
    np.testing.assert_allclose(masses, masses[0], atol=1e-3)
    whole = np.log([[0.01, 0.02, 0.03]] * 2)  # rounding may leave more than there is
    assert (weigh_tail(whole, [0.06, 0.05]) == 0).all(), "the sample is the whole tail"


def test_many_more_nodes_give_the_same_weights():
    rng = np.random.default_rng(3)
    shares = rng.standard_normal((60, 24)) * rng.choice([0.3, 2, 6, 15], (60, 1)) - 12
    rest = np.exp(shares).sum(1) * rng.choice([1.0001, 1.1, 3, 100], 60)
    few, many = weigh_tail(shares, rest), weigh_tail(shares, rest, nodes=1024)
    np.testing.assert_allclose(few, many, atol=1e-6)


@pytest.mark.parametrize("kind", ROWS)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_value_and_gradient_are_unbiased_at_temperature_1(kind, divergence):
    found = sparse.estimate(kind, divergence, "unbiased")
    assert max(map(abs, found.sigmas)) < 4.5


def test_a_bias_is_seen_and_that_of_the_ghost_is_never_above():
    for tail in ("renormalized", "ghost", "ignore"):
        assert abs(sparse.estimate("natural", "forward_kl", tail).sigmas[0]) > 10
    for kind, divergence in itertools.product(ROWS, DIVERGENCES):
        assert sparse.estimate(kind, divergence, "ghost", draws=2).bias <= 1e-9


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_all_ways_agree_with_the_dense_loss_when_all_is_stored(divergence, tail, temperature):
    wide = 40 if divergence == "reverse_kl" else 48  # entries that only the student has
    teacher, student = randn(7, 40, seed=1), randn(7, wide, seed=2).double().requires_grad_()
    sampled = 24 if tail in ("unbiased", "renormalized") else 0
    batch = make_batch(teacher, top_p=1.0, top_p_max=40 - sampled, sampled_n=sampled)
    how = {"divergence": divergence, "tail": tail, "temperature": temperature}
    found = distillation_loss(student, batch, **how, reduction="none")
    padded = torch.nn.functional.pad(teacher, (0, wide - 40), value=-1e4)
    true = dense_loss(student, padded.double(), divergence, temperature)
    torch.testing.assert_close(found, true, atol=2e-5, rtol=0)
    assert_same_gradients(found, true, [student], atol=4e-5, rtol=0)


def test_chunks_reductions_layouts_and_weights_of_tokens_give_the_same_loss():
    batch = batch_of(9 * ["natural"], 300)
    grid = randn(1, 10, 300, seed=4).requires_grad_()
    each = distillation_loss(grid, batch, reduction="none", chunk_tokens=4)
    flat = distillation_loss(grid[0, :9], batch, reduction="none")
    assert each.shape == (9,)
    torch.testing.assert_close(each, flat)
    torch.testing.assert_close(distillation_loss(grid, batch), each.mean())
    torch.testing.assert_close(distillation_loss(grid, batch, reduction="sum"), each.sum())
    weights = torch.tensor([[0.0, 1.0, 2.0, 0.5, 0.0, 0.0, 0.0, 0.0, 0.0]])
    summed = (each * weights[0]).sum()
    for given in (weights, weights[0].bfloat16()):
        for reduction, wanted in (("mean", summed / 3.5), ("sum", summed)):
            found = distillation_loss(grid, batch, weights=given, reduction=reduction)
            torch.testing.assert_close(found, wanted)
    assert float(distillation_loss(grid.detach(), batch, weights=torch.zeros(9))) == 0, "not NaN"
    (gradient,) = torch.autograd.grad(each.sum(), grid)
    assert (gradient[0, 9] == 0).all(), "the last position predicts nothing"
    assert (gradient[0, :9].abs().sum(-1) > 0).all()


def test_a_reverse_kl_pushes_padding_away_too():
    batch = make_batch(randn(4, 40, seed=1), top_p=1.0, top_p_max=16, sampled_n=24)
    student = torch.zeros(4, 64, requires_grad=True)
    distillation_loss(student, batch, divergence="reverse_kl").backward()
    assert (student.grad[:, 40:] > 0).all(), "a step down the gradient lowers them"


USUAL = randn(3, 60, seed=6)
EXTREMES = {
    "flat": 0 * USUAL,
    "sure": 1e3 * USUAL,
    "padding cut off": torch.nn.functional.pad(USUAL, (0, 4), value=-torch.inf),
    "excludes the nucleus": USUAL.masked_fill(torch.arange(60) < 30, -torch.inf),
}


@pytest.mark.parametrize("kind", EXTREMES)
def test_what_is_sure_excluded_or_improbable_gives_finite_losses_and_gradients(kind):
    plain = batch_of(ROWS, 60, top_p_max=20)
    teacher = torch.full((3, 60), -700.0)  # whose tails floating point can hardly hold
    teacher[:, 0], teacher[1, 1:4], teacher[2] = 0.0, -5.0, torch.linspace(0, -1500, 60)
    tiny = make_batch(teacher, top_p=0.5, top_p_max=4, sampled_n=20)
    divergences = ("reverse_kl",) if kind.startswith("excludes") else DIVERGENCES
    for batch, *way in itertools.product((plain, tiny), divergences, TAILS, (0.5, 1.0, 4.0)):
        student = EXTREMES[kind].clone().requires_grad_()
        how = dict(zip(("divergence", "tail", "temperature"), way, strict=True))
        loss = distillation_loss(student, batch, **how)
        (gradient,) = torch.autograd.grad(loss, student)
        assert torch.isfinite(loss), way
        assert torch.isfinite(gradient).all(), way
        assert not gradient[:, 60:].any()
        if kind == "padding cut off" and way[0] != "reverse_kl":  # whose stand-in spreads over it
            torch.testing.assert_close(loss.detach(), distillation_loss(USUAL, batch, **how))


def test_what_does_not_fit_the_batch_or_is_no_choice_is_refused():
    batch = make_batch(teacher_row("flat", 200)[None])
    none = make_batch(teacher_row("natural", 200)[None], top_p_max=20, sampled_n=0)
    for given, shape, options, message in (
        (batch, (1, 3, 200), {}, r"shape \(1, 3, 200\) are not at the positions"),
        (batch, (2, 200), {}, "2 rows of student logits for 1 token"),
        (batch, (1, 20), {}, "beyond the student's 20 logits"),
        (batch, (1, 200), {"weights": torch.tensor(0.5)}, r"weights of shape \(\) for 1 token"),
        (batch, (1, 200), {"weights": torch.ones(1, 2)}, r"give \(B, T\) or \(N,\)"),
        (none, (1, 200), {}, "--sampled-n"),
    ):
        with pytest.raises(explore.LogitsError, match=message):
            distillation_loss(torch.zeros(shape), given, **options)


BFLOAT = {"atol": 3e-3, "rtol": 3e-2}


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("options", [{}, {"tail": "ghost", "temperature": 2.0, "alpha": 0.5}])
@pytest.mark.parametrize(("dtype", "near"), [("float32", {}), ("bfloat16", BFLOAT)])
def test_from_hidden_states_loss_and_gradients_are_those_of_the_logits(
    divergence, options, dtype, near
):
    kind, batch = getattr(torch, dtype), batch_of(7 * ["natural"])
    hidden = randn(1, 8, 16, seed=0).to(kind).requires_grad_()
    head, bias = (randn(*shape, seed=1).requires_grad_() for shape in ((200, 16), (200,)))
    how = {"divergence": divergence, "weights": torch.linspace(0.1, 2, 7), "reduction": "none"}
    how |= options
    logits = torch.nn.functional.linear(hidden, head.to(kind), bias.to(kind)).float()
    wanted = distillation_loss(torch.tanh(logits / 5) * 5, batch, **how)
    found = explore.distillation_loss_from_hidden(
        hidden, head, batch, head_bias=bias, transform=lambda x: torch.tanh(x / 5) * 5,
        chunk_tokens=3, **how,
    )  # fmt: skip
    torch.testing.assert_close(found, wanted)
    assert found.dtype == torch.float32
    (slope,) = torch.autograd.grad(found.sum(), hidden, create_graph=True)
    assert not slope.requires_grad, "a second derivative would be that of the head alone"
    assert_same_gradients(found, wanted, [hidden, head, bias], **near)


def test_the_texts_own_cross_entropy_is_pytorchs_and_mixes_by_alpha():
    batch = batch_of(6 * ["natural"])
    batch["labels"] = torch.randint(0, 200, (1, 7), generator=torch.Generator().manual_seed(1))
    logits = randn(1, 7, 200, seed=2).requires_grad_()
    actual = batch["labels"][0, 1:]
    entropy = torch.nn.functional.cross_entropy(logits[0, :6], actual, label_smoothing=0.1)
    only_text = distillation_loss(logits, batch, alpha=0.0, label_smoothing=0.1, temperature=2.0)
    torch.testing.assert_close(only_text, entropy)
    mixed = distillation_loss(logits, batch, alpha=0.7, label_smoothing=0.1)
    wanted = 0.7 * distillation_loss(logits, batch) + 0.3 * entropy
    torch.testing.assert_close(mixed, wanted)
    assert_same_gradients(mixed, wanted, [logits])
    never = logits.detach().index_fill(2, batch["teacher_ids"][0, 0, :1], -torch.inf)
    assert torch.isfinite(distillation_loss(never, batch, alpha=0.0)), "0 of an infinite KL is 0"
    each = distillation_loss(logits, batch, alpha=0.5, reduction="none")
    batch["labels"][0, 1:4] = -100
    masked = distillation_loss(logits, batch, alpha=0.5)
    torch.testing.assert_close(masked, each[3:].mean())
    assert_same_gradients(masked, each[3:].mean(), [logits])


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_a_ghost_is_one_token_in_place_of_all_that_are_in_no_nucleus(divergence, temperature):
    teacher, student = randn(4, 40, seed=1), randn(4, 40, seed=2).requires_grad_()
    batch = make_batch(teacher, top_p=1.0, top_p_max=16, sampled_n=24)
    top = teacher.topk(16).indices

    def merge(logits):
        log_p = (logits / temperature).log_softmax(-1)
        rest = log_p.scatter(1, top, -torch.inf).logsumexp(-1, keepdim=True)
        return torch.cat([log_p.gather(1, top), rest], 1)

    how = {"divergence": divergence, "temperature": temperature, "tail": "ghost"}
    found = distillation_loss(student, batch, **how)
    wanted = dense_loss(merge(student), merge(teacher), divergence).mean() * temperature**2
    torch.testing.assert_close(found, wanted)
    assert_same_gradients(found, wanted, [student])


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_the_tail_can_be_weighed_apart_from_what_a_ghost_sees(divergence):
    batch = make_batch(randn(4, 40, seed=1), top_p=1.0, top_p_max=16, sampled_n=24)
    student = randn(4, 40, seed=2)
    whole = distillation_loss(student, batch, divergence=divergence)
    ghost = distillation_loss(student, batch, divergence=divergence, tail="ghost")
    for weight in (0.0, 1.0, 3.0):
        found = distillation_loss(student, batch, divergence=divergence, tail_weight=weight)
        torch.testing.assert_close(found, ghost + weight * (whole - ghost))
    assert float(whole - ghost) > 0.01, "this teacher's tail could not be seen"


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of tensors used inside it that are alive together, at most."""

    most = 0
    found: ClassVar = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        found = dict(self.found)
        for storage in [t.untyped_storage() for t in tree_leaves(made) if torch.is_tensor(t)]:
            found[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.found = {k: v for k, v in found.items() if not v[0].expired()}
        self.most = max(self.most, sum(size for _, size in self.found.values()))
        return made


def test_from_hidden_states_no_more_is_held_than_some_chunks_and_the_gradients():
    tokens, vocab, size = 128, 20_000, 8
    batch = make_batch(teacher_row("natural", 200).repeat(tokens, 1))
    hidden = randn(tokens, size, seed=1).requires_grad_()
    head = randn(vocab, size, seed=2).requires_grad_()
    found = {}
    for chunk in (4, tokens):
        with LiveBytes() as counted:
            loss = explore.distillation_loss_from_hidden(hidden, head, batch, chunk_tokens=chunk)
            loss.backward()
        found[chunk] = counted.most
    logits = 4 * tokens * vocab
    assert found[4] < logits / 2
    assert found[tokens] > 2 * logits, "what the chunks save could not be seen"


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("tail", TAILS)
def test_a_masked_token_with_an_infinite_loss_changes_nothing(divergence, tail):
    batch, logits = batch_of(4 * ["natural"]), randn(4, 256, seed=4)
    labels, weights = batch["labels"].clone(), torch.ones(4)
    labels[0, 1], weights[0] = -100, 0
    excluded = logits.clone()
    excluded[0, batch["teacher_ids"][0, 0, 0]] = -torch.inf  # of the nucleus
    for told, how in (({**batch, "labels": labels}, {}), (batch, {"weights": weights})):
        found = []
        for given in (logits, excluded):
            given = given.clone().requires_grad_()
            loss = distillation_loss(given, told, divergence=divergence, tail=tail, **how)
            found += [loss, *torch.autograd.grad(loss, given)]
        torch.testing.assert_close(found[2:], found[:2])


def test_a_teacher_that_was_cast_below_float32_is_refused():
    batch, logits = batch_of(["natural"]), randn(1, 256, seed=4)
    for name, dtype in (("teacher_log_probs", torch.bfloat16), ("teacher_log_rest", torch.float16)):
        with pytest.raises(explore.LogitsError, match=f"{name} .* {dtype}.*_prepare_input"):
            distillation_loss(logits, {**batch, name: batch[name].to(dtype)})
    distillation_loss(logits, {**batch, "teacher_log_probs": batch["teacher_log_probs"].double()})
