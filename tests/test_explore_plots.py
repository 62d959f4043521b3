"""The plots: each returns a figure that says what it shows, in units, and leaves nothing behind."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
from small_output import SETTINGS, random_rows

import explore_logits as explore
from explore_logits import get_sample, plot_nucleus_sizes, plot_nucleus_vs_sampled

matplotlib.use("Agg")
ROWS = random_rows(12, tokens=40, seed=3)
SAMPLE = max((get_sample(ROWS, row) for row in range(12)), key=lambda s: s["num_tokens"])
NO_TAIL = get_sample(random_rows(2, settings=SETTINGS | {"sampled_n": 0}), 1)
ONE_TOKEN = get_sample(random_rows(1, tokens=1), 0)
PLOTS: dict[str, Callable[[], Any]] = {
    "logits": lambda: explore.plot_logit_distribution(SAMPLE, 3),
    "nucleus against tail": lambda: plot_nucleus_vs_sampled(SAMPLE),
    "nucleus against tail of a token": lambda: plot_nucleus_vs_sampled(SAMPLE, 2),
    "no tail": lambda: plot_nucleus_vs_sampled(NO_TAIL),
    "sizes": lambda: plot_nucleus_sizes(SAMPLE),
    "sizes of one token": lambda: plot_nucleus_sizes(ONE_TOKEN),
    "size analysis of an output": lambda: explore.plot_nucleus_size_analysis(ROWS, max_samples=5),
}


@pytest.fixture(autouse=True)
def _no_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


@pytest.mark.parametrize("plot", PLOTS.values(), ids=PLOTS.keys())
def test_a_plot_returns_a_figure_with_labelled_axes(
    plot: Callable[[], Any], tmp_path: Path
) -> None:
    from matplotlib import pyplot

    figure = plot()
    assert pyplot.get_fignums() == []  # a notebook shows it once, as the result
    figure.savefig(tmp_path / "plot.png")
    assert np.ptp(pyplot.imread(tmp_path / "plot.png")[..., :3]) > 0.5
    labels = [axis.get_xlabel() + axis.get_ylabel() for axis in figure.axes]
    assert all(labels)
    assert re.search(r"\((nats|tokens|%)\)", " ".join(labels))


def test_the_plotted_sizes_are_the_samples() -> None:
    figure = plot_nucleus_sizes(SAMPLE)
    assert figure.axes[0].patches[0].get_data().values == pytest.approx(SAMPLE["top_counts"])
    covered = figure.axes[1].lines[0].get_ydata()
    assert covered == pytest.approx(100 * explore.get_nucleus_probability_mass(SAMPLE))


def test_hostile_text_is_a_label_like_any_other(tmp_path: Path) -> None:
    class Vocabulary:
        def __len__(self) -> int:
            return 600

        def decode(self, ids: list[int]) -> str:
            return "$\\frac{1}{0}$ _^ \x1b" + "x" * 50

        def convert_ids_to_tokens(self, token: int) -> str:
            return "x"

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the font has no picture of an escape
        figure = explore.plot_logit_distribution(SAMPLE, 0, tokenizer=Vocabulary())
        figure.savefig(tmp_path / "plot.png")
