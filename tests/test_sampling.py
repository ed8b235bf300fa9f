"""Samples are bounded, even, and views; a channel is told rightly for each of their elements."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from densitylr.sampling import BLOCK_CHANNELS, BUDGET, LEAST, PAIRED, Sampler, tap_budget


def numbered(*shape: int) -> Tensor:
    return torch.arange(int(torch.tensor(shape).prod())).reshape(shape).double()


def test_a_block_is_bounded_and_even() -> None:
    sampler = Sampler(nn.Conv2d(3, 200, 3))
    output = numbered(64, 200, 30, 30)
    block = sampler.block(output)
    assert block.data_ptr() == output.data_ptr()  # a view
    assert block.shape[1] <= BLOCK_CHANNELS
    assert block.numel() <= PAIRED
    rows = torch.unique(block[:, 0, 0, 0] // (200 * 30 * 30))
    assert len(torch.unique(rows.diff())) == 1
    assert len(rows) >= 8
    # However large a row is.
    assert sampler.block(torch.zeros(2, 200, 300, 300)).numel() <= PAIRED
    # A small output is read whole.
    assert Sampler(nn.Linear(3, 5)).block(torch.zeros(7, 5)).shape == (7, 5)


@given(st.integers(1, 5000))
def test_the_budget_of_a_tap(taps: int) -> None:
    budget = tap_budget(taps)
    assert budget == LEAST or BUDGET / 2 < budget * taps <= BUDGET
    assert budget <= tap_budget(max(1, taps - 1))


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
        assert set(sampler.channels(gaps, sample).tolist()) == {-1}


LAYERS = {
    "conv": (lambda: nn.Conv2d(2, 6, 3), (5, 6, 7, 8), 1),
    "wide conv": (lambda: nn.Conv2d(2, 150, 3), (3, 150, 4, 4), 1),
    "conv on one example": (lambda: nn.Conv2d(2, 6, 3), (6, 7, 8), 0),
    "linear": (lambda: nn.Linear(2, 9), (20, 9), 1),
    "tokens": (lambda: nn.Linear(2, 9), (4, 11, 9), 2),
}


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("kind", ["spread", "block"])
@pytest.mark.parametrize("last", [False, True])
def test_channels(name: str, kind: str, last: bool) -> None:
    make, shape, channel = LAYERS[name]
    index = torch.arange(shape[channel]).view(-1, *[1] * (len(shape) - channel - 1))
    output = index.expand(shape).contiguous()
    if last and output.ndim == 4:
        output = output.contiguous(memory_format=torch.channels_last)
    sampler = Sampler(make(), 100)
    sample = getattr(sampler, kind)(output)
    assert sampler.channels(output, sample).tolist() == sample.flatten().tolist()


def test_exact_is_everything() -> None:
    output = numbered(9, 70, 40, 40)
    sampler = Sampler(nn.Conv2d(1, 70, 3), None)
    assert sampler.block(output).shape == output.shape
    assert torch.equal(sampler.spread(output), output.flatten())
