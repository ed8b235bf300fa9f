"""The statistics of a tensor against a slow and obvious reference in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from densitylr.density import BINS, COLUMNS, EDGES, TAU, measure, near_zero_count, rms

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
COUNTS = COLUMNS[:6]


def run(a: Tensor, rms0: Tensor) -> dict[str, float | np.ndarray]:
    out = torch.full((len(COLUMNS) + BINS,), -7.0, dtype=torch.float64)
    measure(a, rms0, out)
    numbers: dict[str, float | np.ndarray] = dict(zip(COLUMNS, out.tolist(), strict=False))
    numbers["histogram"] = out[len(COLUMNS) :].numpy()
    return numbers


def reference(a: Tensor, rms0: Tensor) -> dict[str, float | np.ndarray]:
    """One element at a time. Thresholds are rounded to float32, as a tensor of rms0 has them."""
    finite = [float(x) for x in a.detach().flatten().tolist() if math.isfinite(x)]
    n = len(finite)
    scale = np.float32(rms0.item())
    edges = [np.float32(e) * scale for e in EDGES]
    mean = math.fsum(finite) / n if n else 0.0
    square = math.fsum(x * x for x in finite) / n if n else 0.0
    variance = math.fsum((x - mean) ** 2 for x in finite) / n if n else 0.0
    histogram = np.zeros(BINS)
    for x in finite:
        histogram[sum(abs(x) > edge for edge in edges)] += 1
    return {
        "count": n,
        "nonfinite": a.numel() - n,
        "near_zero": sum(abs(x) <= np.float32(TAU) * scale for x in finite),
        "near_zero_absolute": sum(abs(x) <= np.float32(0.05) for x in finite),
        "near_zero_present": sum(abs(x) <= TAU * math.sqrt(square) for x in finite),
        "exactly_zero": sum(x == 0 for x in finite),
        "mean": mean,
        "std": math.sqrt(variance),
        "rms": math.sqrt(square),
        "rms0": float(scale),
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


def assert_equal_to_reference(a: Tensor, rms0: Tensor) -> None:
    seen, true = run(a, rms0), reference(a, rms0)
    largest = max((abs(x) for x in a.double().flatten().tolist() if math.isfinite(x)), default=0)
    for name in COUNTS:
        if name == "near_zero_present":
            continue
        assert seen[name] == true[name], name
    np.testing.assert_array_equal(seen["histogram"], true["histogram"])
    # The threshold here is itself a float32 result: an element may lie within its rounding.
    edge = TAU * true["rms"]
    close = sum(
        math.isfinite(x) and abs(abs(x) - edge) <= 1e-6 * edge
        for x in a.double().flatten().tolist()
    )
    assert abs(seen["near_zero_present"] - true["near_zero_present"]) <= close
    # Sums are in float64, but a float64 tensor is first rounded to float32.
    for name in ("mean", "std", "rms"):
        assert seen[name] == pytest.approx(true[name], rel=1e-7, abs=1e-7 * largest), name
    assert seen["rms0"] == true["rms0"]
    assert seen["reference_count"] == seen["reference_near_zero"] == -7.0  # left alone


@given(tensors(), st.sampled_from([0.0, 1e-3, 0.5, 1.0, 3.7]))
@example(torch.tensor([0.1, -0.1, 0.10000002, 0.0999999]), 1.0)
@example(torch.zeros(5), 0.0)
@example(torch.tensor([]), 1.0)
@example(torch.tensor([math.nan, math.inf, -math.inf]), 1.0)
@example(torch.tensor([0.05, -0.05, 0.050000004]), 0.5)
@example(torch.tensor(2.5), 1.0)
def test_measure(a: Tensor, scale: float) -> None:
    assert_equal_to_reference(a, torch.tensor(scale))


@given(tensors(), st.sampled_from([1e-3, 0.5, 1.0, 3.7]))
def test_every_finite_element_is_in_one_bin(a: Tensor, scale: float) -> None:
    seen = run(a, torch.tensor(scale))
    assert seen["histogram"].sum() == seen["count"]
    assert seen["count"] + seen["nonfinite"] == a.numel()
    # TAU is an edge: the bins up to it hold what is near zero.
    near = int(np.searchsorted(EDGES, TAU)) + 1
    assert EDGES[near - 1] == TAU
    assert seen["histogram"][:near].sum() == seen["near_zero"]


@given(tensors(), st.sampled_from([0.0, 1e-3, 0.5, 1.0, 3.7]))
def test_twin_and_layer_are_counted_alike(a: Tensor, scale: float) -> None:
    """Equal tensors must give equal counts, or the displacement at the start is not zero."""
    count, near = near_zero_count(a, torch.tensor(scale))
    seen = run(a, torch.tensor(scale))
    assert (count.dtype, near.dtype) == (torch.int64, torch.int64)
    assert (int(count), int(near)) == (seen["count"], seen["near_zero"])


@given(tensors())
def test_rms_ignores_what_is_not_finite(a: Tensor) -> None:
    assert rms(a).dtype == torch.float32
    assert rms(a).item() == pytest.approx(reference(a, torch.tensor(1.0))["rms"], rel=1e-7)


def test_large_activations_have_a_finite_rms() -> None:
    """A run on its way to infinity passes values whose squares a float32 cannot hold."""
    a = torch.tensor([3e30, -3e30, 1.0, 0.0])
    assert rms(a).item() == pytest.approx(3e30 / math.sqrt(2))
    assert_equal_to_reference(a, rms(a))
    assert run(a, torch.tensor(1.0))["near_zero_present"] == 2


def test_counts_are_exact_beyond_a_float32_counter() -> None:
    a = torch.ones(1, dtype=torch.float16).expand(2**24 + 3)
    seen = run(a, torch.tensor(1.0))
    assert seen["count"] == 2**24 + 3
    assert seen["rms"] == pytest.approx(1)
    assert seen["exactly_zero"] == 0
    assert seen["histogram"].sum() == 2**24 + 3


def test_a_tensor_with_gradient_is_read_without_a_graph() -> None:
    a = torch.randn(4, requires_grad=True)
    out = torch.zeros(len(COLUMNS) + BINS, dtype=torch.float64)
    measure(a, rms(a), out)
    assert not out.requires_grad
    assert not rms(a).requires_grad
