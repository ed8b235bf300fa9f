"""Samples are bounded, even, and views."""

from __future__ import annotations

import math

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from densitylr.monitor.layers import Sampler, even_stride, layer_budget


def numbered(*shape: int) -> Tensor:
    return torch.arange(int(torch.tensor(shape).prod())).reshape(shape).double()


def test_a_block_is_bounded_and_even() -> None:
    sampler = Sampler(nn.Conv2d(3, 200, 3))
    output = numbered(64, 200, 30, 30)
    block = sampler.block(output)
    assert block.data_ptr() == output.data_ptr()  # a view
    assert 32 < block.shape[1] <= 64
    assert 2**15 < block.numel() <= 2**16
    rows = torch.unique(block[:, 0, 0, 0] // (200 * 30 * 30))
    assert len(torch.unique(rows.diff())) == 1
    assert len(rows) >= 8
    # However large a row is.
    assert sampler.block(torch.zeros(2, 200, 300, 300)).numel() <= 2**16
    # A small output is read whole.
    assert Sampler(nn.Linear(3, 5)).block(torch.zeros(7, 5)).shape == (7, 5)


@given(st.integers(1, 5000))
def test_the_budget_of_a_layer(layers: int) -> None:
    budget = layer_budget(layers)
    assert budget == 2**12 or 2**16 < budget * layers <= 2**17
    assert budget <= layer_budget(max(1, layers - 1))


@given(st.integers(1, 10**6), st.integers(1, 10**5))
def test_an_even_stride_is_the_smallest_that_fits_and_is_coprime(size: int, most: int) -> None:
    found = even_stride(size, most)
    assert -(-size // found) <= most
    assert math.gcd(found, size) == 1
    for smaller in range(max(1, -(-size // most)), found):
        assert math.gcd(smaller, size) > 1


@given(
    st.lists(st.integers(1, 12), min_size=1, max_size=4),
    st.integers(1, 400),
    st.sampled_from(["plain", "channels last", "transposed"]),
)
def test_a_spread_sample_visits_everything_alike(
    shape: list[int], budget: int, layout: str
) -> None:
    output = numbered(*shape)
    if layout == "channels last" and len(shape) == 4:
        output = output.contiguous(memory_format=torch.channels_last)
    if layout == "transposed":
        output = output.transpose(0, -1)
    sample = Sampler(nn.Identity(), budget).spread(output)
    assert sample.numel() == len(set(sample.tolist())) <= budget
    assert sample.untyped_storage().data_ptr() == output.untyped_storage().data_ptr()
    if output.numel() <= budget:
        assert sorted(sample.tolist()) == sorted(output.flatten().tolist())
    again = Sampler(nn.Identity(), budget)
    for _ in range(2):  # the second from what is remembered
        assert torch.equal(again.spread(output + 1), sample + 1)


def test_a_spread_sample_keeps_to_no_column() -> None:
    """49 of 14 × 14 positions is every 4th; a stride of 4 would see 4 of 16 columns only."""
    output = numbered(64, 3, 16, 16)
    sample = Sampler(nn.Conv2d(1, 3, 3), len(output.flatten()) // 4).spread(output)
    columns = torch.bincount((sample % 16).long(), minlength=16)
    assert columns.min() > 0.9 * columns.max()


def test_a_sample_of_an_output_with_gaps_is_right_every_time() -> None:
    whole = numbered(6, 10, 5)
    gaps = whole[:, :7]
    sampler = Sampler(nn.Linear(2, 5), 50)
    for _ in range(2):
        sample = sampler.spread(gaps)
        assert set(sample.tolist()) <= set(gaps.flatten().tolist())
        assert len(set(sample.tolist())) == sample.numel() > 50 / 3
