"""The plots: each returns a figure that says what it shows, in units, and leaves nothing behind."""

import re

import numpy as np
import pytest
from matplotlib import pyplot
from small_output import SETTINGS, Vocabulary, random_rows

import explore_logits as explore

pyplot.switch_backend("Agg")
ROWS = random_rows(12, tokens=40, seed=3)
SAMPLE = max(explore.iter_samples(ROWS), key=lambda s: s["num_tokens"])
NO_TAIL = explore.get_sample(random_rows(2, settings=SETTINGS | {"sampled_n": 0}), 1)
ONE_TOKEN = explore.get_sample(random_rows(1, tokens=1))
HOSTILE = Vocabulary(["$\\frac{1}{0}$ _^ " + "x" * 50] * 600)
PLOTS = {
    "logits": lambda: explore.plot_logit_distribution(SAMPLE, 3, tokenizer=HOSTILE),
    "nucleus against tail": lambda: explore.plot_nucleus_vs_sampled(SAMPLE),
    "nucleus against tail of a token": lambda: explore.plot_nucleus_vs_sampled(SAMPLE, 2),
    "no tail": lambda: explore.plot_nucleus_vs_sampled(NO_TAIL),
    "sizes": lambda: explore.plot_nucleus_sizes(SAMPLE),
    "sizes of one token": lambda: explore.plot_nucleus_sizes(ONE_TOKEN),
    "size analysis of an output": lambda: explore.plot_nucleus_size_analysis(ROWS, max_samples=5),
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("plot", PLOTS.values(), ids=PLOTS.keys())
def test_a_plot_returns_a_figure_with_labelled_axes(plot, tmp_path):
    figure = plot()
    assert pyplot.get_fignums() == []  # a notebook shows it once, as the result
    figure.savefig(tmp_path / "plot.png")
    assert np.ptp(pyplot.imread(tmp_path / "plot.png")[..., :3]) > 0.5
    labels = [axis.get_xlabel() + axis.get_ylabel() for axis in figure.axes]
    assert all(labels)
    assert re.search(r"\((nats|tokens|%)\)", " ".join(labels))


def test_the_plotted_sizes_are_the_samples():
    figure = explore.plot_nucleus_sizes(SAMPLE)
    assert figure.axes[0].patches[0].get_data().values == pytest.approx(SAMPLE["top_counts"])
    covered = figure.axes[1].lines[0].get_ydata()
    assert covered == pytest.approx(100 * explore.get_nucleus_probability_mass(SAMPLE))
