"""What the pictures show: axes, lines, colours and markers, not pixels."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

pytest.importorskip("matplotlib")

from matplotlib.figure import Figure

from densitylr import plots
from densitylr.history import BINS, EDGES, TAU, Decision, History, Reading, StageReading

ALL = (plots.density_heatmaps, plots.near_zero, plots.rates, plots.overview)


def made_up(stages: int, readings: int, rates: bool = True) -> History:
    """A history in which the first stage is raised twice, then lifts off."""
    rng = np.random.default_rng(0)
    names = [f"stage{i}" for i in range(stages)]
    decisions = {
        1: Decision(5, "stage0", "raise", 1.0, 4.0, 1e-3, 4e-3),
        2: Decision(10, "stage0", "raise", 4.0, 16.0, 4e-3, 16e-3),
        3: Decision(15, "stage0", "lift-off", 16.0, 16.0, 16e-3, 16e-3),
        4: Decision(20, "stage0", "lower", 16.0, 8.0, 16e-3, 8e-3),
    }
    history = History()
    scale = 1.0
    for i in range(readings):
        seen = {}
        for name in names:
            counts = rng.integers(0, 1000, BINS)
            near = float(counts[: EDGES.index(TAU) + 1].sum() / counts.sum())
            seen[name] = StageReading(near, 0.08, 0.1, "twin", near, 0.0, 1.0, 1.0, 1000, 0, counts)
        taken = [decisions[i]] if i in decisions else []
        scale = taken[0].scale if taken else scale
        history.record(
            Reading(5 * i, seen),
            dict.fromkeys(names, 1e-3) if rates else None,
            {n: scale if n == "stage0" else 1.0 for n in names},
            taken,
        )
    return history


def markers(axes, marker):
    return [line for line in axes.lines if line.get_marker() == marker]


@pytest.mark.parametrize("draw", ALL)
@pytest.mark.parametrize(("stages", "readings"), [(1, 1), (1, 2), (6, 12), (16, 3)])
def test_draws_any_number_of_stages_and_readings(draw, stages, readings, tmp_path):
    figure = draw(made_up(stages, readings))
    assert isinstance(figure, Figure)
    figure.savefig(tmp_path / "figure.png", dpi=20)


@pytest.mark.parametrize("draw", ALL)
def test_an_empty_history_is_refused_with_the_rule_and_the_value(draw):
    with pytest.raises(ValueError, match="at least one reading, got 0"):
        draw(History())
    with pytest.raises(ValueError, match="at least one reading, got 0"):
        plots.density_heatmap(History(), "stage0")


def test_unknown_or_no_stages():
    history = made_up(2, 3)
    with pytest.raises(KeyError, match="no stage 'head'"):
        plots.density_heatmap(history, "head")
    with pytest.raises(ValueError, match="at least one stage"):
        plots.density_heatmaps(history, [])


def test_heatmap_colours_are_the_log_density_however_many_were_read():
    history = made_up(2, 8)
    for reading in history.readings[4:]:
        counts = reading.stages["stage1"].histogram
        counts *= 16
    axes = plots.density_heatmap(history, "stage1").axes[0]
    (mesh,) = axes.collections
    counts = history.histogram("stage1").T
    octaves = np.diff(np.log2(EDGES))
    widths = np.array([octaves[0], *octaves, octaves[-1]])
    density = counts / counts.sum(0) / widths[:, None]
    drawn = mesh.get_array()
    assert drawn.shape == (BINS, 8)
    assert np.array_equal(drawn.mask, counts == 0)
    colours = mesh.norm(drawn)
    least = np.log(1e-4)
    expected = (np.log(np.maximum(density, 1e-4)) - least) / (np.log(density.max()) - least)
    assert np.allclose(colours.compressed(), expected[counts > 0])


def test_heatmap_axes_threshold_bins_and_decisions():
    axes, bar = plots.density_heatmap(made_up(2, 8), "stage0").axes
    assert axes.get_xlabel() == "optimizer step"
    assert "untrained RMS" in axes.get_ylabel()
    assert axes.get_yscale() == "log"
    assert "log" in bar.get_ylabel()
    bounds = axes.collections[0].get_coordinates()[:, 0, 1]
    assert np.allclose(bounds[1:-1], EDGES)
    assert bounds[0] < EDGES[0]
    assert bounds[-1] > EDGES[-1]
    dashed = [line for line in axes.lines if line.get_linestyle() == "--"]
    assert [line.get_ydata()[0] for line in dashed] == [TAU]
    vertical = [line.get_xdata()[0] for line in axes.lines if line not in dashed]
    assert vertical == [5, 10, 15, 20]


def test_cells_are_centred_on_uneven_steps():
    history = History()
    source = made_up(1, 1).readings[0].stages
    for step in (0, 10, 40):
        history.record(Reading(step, source))
    mesh = plots.density_heatmap(history, "stage0").axes[0].collections[0]
    assert mesh.get_coordinates()[0, :, 0].tolist() == [-5, 5, 25, 55]


def test_grid_shares_one_colour_scale_and_one_bar():
    figure = plots.density_heatmaps(made_up(5, 4))
    panels = [axes for axes in figure.axes if axes.get_title()]
    assert [axes.get_title() for axes in panels] == [f"stage{i}" for i in range(5)]
    assert len(figure.axes) == 6
    assert len({id(axes.collections[0].norm) for axes in panels}) == 1
    chosen = plots.density_heatmaps(made_up(5, 4), ["stage3", "stage1"])
    assert [axes.get_title() for axes in chosen.axes[:2]] == ["stage3", "stage1"]


def test_near_zero_has_a_line_a_dotted_reference_and_lift_off():
    history = made_up(3, 8)
    (axes,) = plots.near_zero(history).axes
    named = [line for line in axes.lines if not line.get_label().startswith("_")]
    assert [line.get_label() for line in named] == history.stages
    assert np.array_equal(named[1].get_ydata(), history.series("stage1", "near_zero"))
    references = [line for line in axes.lines if np.all(np.asarray(line.get_ydata()) == 0.08)]
    assert len(references) == 3
    (dot,) = markers(axes, "o")
    assert list(dot.get_xdata()) == [15]
    assert dot.get_ydata()[0] == history.series("stage0", "near_zero")[3]
    assert not markers(axes, "^")


def test_rates_are_the_effective_rates_with_every_decision_marked():
    history = made_up(2, 8)
    upper, lower = plots.rates(history).axes
    assert upper.get_ylabel() == "effective learning rate"
    assert upper.get_yscale() == "log"
    effective = [1e-3, 4e-3, 16e-3, 16e-3, 8e-3, 8e-3, 8e-3, 8e-3]
    assert np.allclose(upper.lines[0].get_ydata(), effective)
    for axes, values in ((upper, np.array(effective)), (lower, np.array(effective) * 1e3)):
        for marker, at in (("^", [1, 2]), ("o", [3]), ("v", [4])):
            (line,) = markers(axes, marker)
            assert list(line.get_xdata()) == [5 * i for i in at]
            assert np.allclose(line.get_ydata(), values[at])


def test_a_history_without_rates_says_so(tmp_path):
    figure = plots.rates(made_up(2, 4, rates=False))
    assert [text.get_text() for text in figure.axes[0].texts] == ["no rates were recorded"]
    figure.savefig(tmp_path / "figure.png", dpi=20)


def test_decisions_from_before_the_first_reading_are_left_out():
    history = History()
    early = Decision(3, "stage0", "lift-off", 1.0, 1.0, 1e-3, 1e-3)
    history.record(Reading(100, made_up(1, 1).readings[0].stages), decisions=[early])
    assert not markers(plots.near_zero(history).axes[0], "o")
    assert len(plots.density_heatmap(history, "stage0").axes[0].lines) == 1


def test_overview_holds_all_panels():
    figure = plots.overview(made_up(6, 8))
    labels = [axes.get_ylabel() for axes in figure.axes]
    assert sum(bool(axes.get_title()) for axes in figure.axes) == 6
    for part in ("near-zero density", "effective learning rate", "scale"):
        assert any(label.startswith(part) for label in labels)


def test_no_pyplot():
    code = "import sys, densitylr.plots; assert 'matplotlib.pyplot' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
