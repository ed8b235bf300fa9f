"""The statistics of a tensor against a slow and obvious reference in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from densitylr.history import BINS, EDGES, OCTAVES, TAU
from densitylr.monitor.measure import near_zero_below
from densitylr.monitor.measure.statistics import Scratch, measure, summarise
from densitylr.monitor.measure.statistics import _tally as tally

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
COUNTS = ("count", "nonfinite", "near_zero")
MOMENTS = ("mean", "rms")

Numbers = dict[str, float | np.ndarray]


def rows_of(tensors: list[Tensor]) -> tuple[Tensor, np.ndarray]:
    """One row each, as float32, padded with NaN."""
    sizes = np.array([a.numel() for a in tensors])
    values = torch.full((len(tensors), max(sizes.max(), 1)), math.nan)
    for row, a in zip(values, tensors, strict=True):
        row[: a.numel()] = a.detach().reshape(-1).float()
    return values, sizes


def run(tensors: list[Tensor], rms0: list[float], untrained: list[int]) -> list[Numbers]:
    values, sizes = rows_of(tensors)
    found = measure(values, torch.tensor(rms0), torch.tensor(untrained))
    numbers = summarise(found.double().numpy(), sizes)
    return [{name: column[i] for name, column in numbers.items()} for i in range(len(tensors))]


def run_one(a: Tensor, rms0: float) -> Numbers:
    return run([a], [rms0], [-1])[0]


def reference(a: Tensor, rms0: float) -> Numbers:
    """One element at a time; ratios and thresholds are rounded to float32, as they are there."""
    values = [np.float32(x) for x in a.detach().double().flatten().tolist()]
    finite = [x for x in values if np.isfinite(x)]
    n = len(finite)
    exact = [float(x) for x in finite]
    mean = math.fsum(exact) / n if n else 0.0
    square = math.fsum(x * x for x in exact) / n if n else 0.0
    with np.errstate(all="ignore"):
        inverse = np.float32(1) / max(np.float32(0.1) * np.float32(rms0), np.float32(1e-37))
        ratios = [np.float32(abs(x) * inverse) for x in finite]
        edges = [np.float32(edge / 0.1) for edge in EDGES]
    histogram = np.zeros(BINS)
    for ratio in ratios:
        histogram[sum(ratio >= edge for edge in edges)] += 1
    return {
        "count": n,
        "nonfinite": len(values) - n,
        "near_zero": sum(ratio < 1 for ratio in ratios),
        "near_zero_present": sum(abs(x) <= 0.1 * math.sqrt(square) for x in exact),
        "mean": mean,
        "rms": math.sqrt(square),
        "histogram": histogram,
    }


VALUES = st.one_of(
    st.floats(-8, 8, width=16),
    st.sampled_from([0.0, -0.0, 0.1, -0.1, 0.05, 0.5, 1.0, math.nan, math.inf, -math.inf]),
)


@st.composite
def tensors(draw: st.DrawFn) -> Tensor:
    """Any shape, stride and dtype; a few strange values among many."""
    shape = tuple(draw(st.lists(st.integers(0, 4), min_size=1, max_size=4)))
    few = draw(st.lists(VALUES, min_size=1, max_size=12))
    dtype = draw(st.sampled_from(DTYPES))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    a = torch.randn(shape, generator=generator).mul(draw(st.sampled_from([1e-3, 1.0, 30.0])))
    flat = a.flatten()
    for i, value in enumerate(few[: flat.numel()]):
        flat[i] = value
    a = flat.reshape(shape).to(dtype)
    layout = draw(st.sampled_from(["plain", "transposed", "strided", "channels-last", "expanded"]))
    if layout == "transposed":
        return a.transpose(0, -1)
    if layout == "strided":
        return a[..., ::2]
    if layout == "channels-last" and a.ndim == 4:
        return a.to(memory_format=torch.channels_last)
    return a.unsqueeze(0).expand(2, *shape) if layout == "expanded" else a


def assert_equal(seen: Numbers, a: Tensor, rms0: float) -> None:
    true = reference(a, rms0)
    for name in COUNTS:
        assert seen[name] == true[name], name
    np.testing.assert_array_equal(seen["histogram"], true["histogram"])
    # The threshold here is itself a float32 result: an element may lie within its rounding.
    finite = [abs(x) for x in a.double().flatten().tolist() if math.isfinite(np.float32(x))]
    edge = 0.1 * true["rms"]
    close = sum(abs(x - edge) <= 1e-6 * edge for x in finite)
    assert abs(seen["near_zero_present"] - true["near_zero_present"]) <= close
    # Sums are in float64.
    largest = max(finite, default=0)
    for name in MOMENTS:
        assert seen[name] == pytest.approx(true[name], rel=1e-7, abs=1e-7 * largest), name


SCALES = [0.0, 1e-3, 0.5, 1.0, 3.7]


@given(tensors(), st.sampled_from(SCALES))
@example(torch.tensor([0.1, -0.1, 0.10000002, 0.0999999]), 1.0)
@example(torch.zeros(5), 0.0)
@example(torch.tensor([]), 1.0)
@example(torch.tensor([math.nan, math.inf, -math.inf]), 1.0)
@example(torch.tensor([0.05, -0.05, 0.050000004]), 0.5)
@example(torch.tensor(2.5), 1.0)
@example(torch.tensor([1e-44, 1e-39, 1e-30, -1e-44]), 1.0)
@example(torch.tensor([3e38, -3e38, 1e30]), 1e-30)
def test_measure(a: Tensor, scale: float) -> None:
    seen = run_one(a, scale)
    assert_equal(seen, a, scale)
    assert seen["rms0"] == np.float32(scale)


@given(st.lists(st.tuples(tensors(), st.sampled_from(SCALES)), min_size=1, max_size=5))
def test_rows_are_measured_apart(rows: list[tuple[Tensor, float]]) -> None:
    together = run([a for a, _ in rows], [scale for _, scale in rows], [-1] * len(rows))
    for seen, (a, scale) in zip(together, rows, strict=True):
        assert_equal(seen, a, scale)


@given(tensors(), tensors())
def test_the_untrained_rms_is_the_twins_or_the_first_of_its_own(a: Tensor, b: Tensor) -> None:
    layer, twin, alone, known = run([a, b, a, a], [2.0, 5.0, math.nan, 3.0], [1, 1, -1, -1])
    for seen, of in ((layer, b), (twin, b), (alone, a)):
        if reference(of, 1.0)["count"]:
            assert seen["rms0"] == pytest.approx(reference(of, 1.0)["rms"], rel=1e-6)
        else:
            assert math.isnan(seen["rms0"])
    assert known["rms0"] == 3.0


@given(tensors(), st.sampled_from([1e-3, 0.5, 1.0, 3.7]))
def test_every_finite_element_is_in_one_bin(a: Tensor, scale: float) -> None:
    seen = run_one(a, scale)
    assert seen["histogram"].sum() == seen["count"]
    assert seen["count"] + seen["nonfinite"] == a.numel()
    # TAU is an edge: the bins up to it hold what is near zero.
    near = EDGES.index(TAU) + 1
    assert seen["histogram"][:near].sum() == seen["near_zero"]


def test_edges_are_four_an_octave() -> None:
    assert (TAU, OCTAVES) == (0.1, (-5, 6))
    assert len(EDGES) == BINS - 1 == 45
    assert list(EDGES) == sorted(EDGES)
    ratios = np.array(EDGES) / 0.1
    for octave in range(-5, 6):
        assert ((ratios >= 2.0**octave) & (ratios < 2.0 ** (octave + 1))).sum() == 4


@given(tensors())
def test_equal_tensors_give_equal_counts(a: Tensor) -> None:
    """Or the displacement at the start would not be zero."""
    layer, twin = run([a, a.clone()], [math.nan, math.nan], [1, 1])
    assert (layer["count"], layer["near_zero"]) == (twin["count"], twin["near_zero"])


def test_large_activations_have_a_finite_rms() -> None:
    """A run on its way to infinity passes values whose squares a float32 cannot hold."""
    a = torch.tensor([3e30, -3e30, 1.0, 0.0])
    assert run_one(a, 1.0)["rms"] == pytest.approx(3e30 / math.sqrt(2))
    assert run_one(a, 1.0)["near_zero_present"] == 2


def test_counts_are_exact_beyond_a_float32_counter() -> None:
    seen = run_one(torch.full((2**24 + 3,), 0.04), 1.0)
    assert seen["count"] == seen["near_zero"] == 2**24 + 3
    assert seen["near_zero_present"] == 0
    assert seen["rms"] == pytest.approx(0.04)
    assert seen["histogram"].sum() == 2**24 + 3


@given(st.lists(st.tuples(st.integers(1, 4), st.integers(1, 40)), min_size=1, max_size=5))
def test_memory_is_shared_by_shapes(shapes: list[tuple[int, int]]) -> None:
    memory = torch.full((2 * 4 * 40,), math.nan)
    scratches = {shape: Scratch(*shape, memory) for shape in shapes}
    for seed, shape in enumerate(shapes):
        values = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        fresh = measure(values.clone(), torch.ones(shape[0]))
        assert torch.equal(fresh, measure(values, torch.ones(shape[0]), None, scratches[shape]))


@given(st.lists(st.integers(0, 40), max_size=60))
def test_codes_are_counted_alike_on_every_device(codes: list[int]) -> None:
    given_ = torch.tensor(codes, dtype=torch.int32)
    expected = [codes.count(i) for i in range(41)]
    assert tally(given_, 41).tolist() == expected
    # A device that is not the processor takes the other way, which a meta tensor cannot count.
    assert tally(given_.to("meta"), 41).shape == (41,)


@given(tensors(), st.sampled_from(SCALES), st.sampled_from([0.05, 0.2]))
def test_another_threshold_for_a_study_of_it(a: Tensor, scale: float, share: float) -> None:
    """Counts of the histogram move along, and all is as before once it is over."""
    before = run_one(a, scale)
    with near_zero_below(share):
        seen = run_one(a, scale)
    values = [abs(np.float32(x)) for x in a.detach().double().flatten().tolist()]
    finite = [x for x in values if np.isfinite(x)]
    with np.errstate(all="ignore"):
        inverse = np.float32(1) / max(np.float32(share) * np.float32(scale), np.float32(1e-37))
        assert seen["near_zero"] == sum(np.float32(x * inverse) < 1 for x in finite)
    again = run_one(a, scale)
    np.testing.assert_equal(again, before)
