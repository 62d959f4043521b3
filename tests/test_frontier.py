"""The short form of the frontier, what its students are told, and how; `make frontier` is long."""

import sys

import numpy as np
import pytest
import torch
from conftest import ROOT
from sparse_batches import make_row, randn

from explore_logits import collate_logits, decode_rows, distillation_loss

sys.path.append(str(ROOT / "tests/tools"))
import frontier
from storage_table import Rows, natural_rows, store

ARMS = {arm.name: arm for arm in frontier.ARMS}
TAILS = {"100 + 24, 8 bits": "unbiased", "min-p 0.01": "unbiased", "top 16": "ignore"}


@pytest.mark.parametrize(("name", "tail"), [*TAILS.items(), ("top 16, ghost", "ghost")])
def test_the_slope_is_the_gradient_of_the_loss(name, tail):
    made_up, arm = natural_rows(64, vocab=600), ARMS[name]
    batch = collate_logits([make_row(decode_rows(store(made_up, arm.scheme, 3)[0]))])
    student = randn(64, 600, seed=0).requires_grad_()
    loss = distillation_loss(student, batch, tail=tail, reduction="sum")
    (wanted,) = torch.autograd.grad(loss, student)
    told, _ = frontier.keep(made_up, arm, 3)
    found = frontier.slope(student.detach(), told(np.arange(64)), ghost=arm.ghost)
    torch.testing.assert_close(found, wanted, atol=2e-6, rtol=1e-4)


def test_points_hit_a_token_as_often_as_it_is_likely_and_draws_do_on_average():
    one = 3 * randn(1, 600, seed=0)
    many = Rows("one row", [], one.repeat(2_000, 1))
    p = many.probabilities(slice(0, 1))[0]
    points = frontier.hit(many, 50, 0, systematic=True).toarray()
    assert (points.sum(1) == 50).all()
    assert np.abs(points - 50 * p).max() < 1
    draws = frontier.hit(many, 50, 0, systematic=False).toarray()
    assert (draws.sum(1) == 50).all()
    # 600 means of 2,000 counts, within 6 standard errors: a chance of 1e-5, most are rare hits
    errors = np.maximum(np.sqrt(50 * p * (1 - p) / 2_000), 1 / 2_000)
    for hits in (draws, points):
        assert (np.abs(hits.mean(0) - 50 * p) < 6 * errors).all()
    assert draws[:, p.argmax()].std() > 2 * points[:, p.argmax()].std()


def test_students_of_few_steps_rank_the_text_behind_the_teacher(tmp_path, monkeypatch, capsys):
    setup = frontier.Setup(conversations=16, held_out=8, batch=2, warmup=2)
    arms = [ARMS[name] for name in ("text", "12 draws", "min-p 0.005", "dense")]
    texts = frontier.Texts(frontier.TEACHER, setup, tmp_path)
    figures = frontier.run(texts, arms, 2)
    monkeypatch.setattr(frontier, "train", None)
    assert frontier.run(texts, arms, 2) == figures, "what is kept is not made again"
    gap = np.subtract(figures["text"]["kl"], figures["dense"]["kl"])
    assert (gap > 0.02).all(), figures
    compact = np.subtract(figures["min-p 0.005"]["kl"], figures["dense"]["kl"])
    assert (np.abs(compact) < 0.3 * gap).all(), figures
    for name in ("gradient", "by_row"):
        text, draws, points, dense = (np.mean(figures[arm.name][name]) for arm in arms)
        assert 0 == dense < points < draws < text, (name, figures)
    sizes = [np.mean(figures[arm.name]["bytes"]) for arm in arms]
    assert sizes == sorted(sizes)
    frontier.print_table(figures, frontier.recommend(figures, arms))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + len(arms)
    assert {line.count("|") for line in lines} == {10}
