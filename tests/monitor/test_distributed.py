"""The rows of the ranks, put together, are those of the concatenated batch."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Mapping

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from densitylr import DensityLR, DensityMonitor
from densitylr.history import BINS
from densitylr.model import (
    find_ranks,
    find_stages,
    fingerprint,
    is_sharded,
    stepping_optimizer,
    whole,
)
from densitylr.monitor import zero_gradients
from densitylr.monitor.layers import example_variance
from densitylr.monitor.measure import COLUMN, pool_layers, pool_ranks
from densitylr.monitor.measure.statistics import TABLE, measure, summarise
from tests.support.fixed import batches, loss_of, net


def rms(a: Tensor) -> float:
    return float(a.double().square().mean().sqrt())


def near_zero(a: Tensor, scale: float) -> int:
    found = measure(a.reshape(1, -1).clone(), torch.tensor([scale]), torch.tensor([-1]))
    return int(summarise(found.numpy(), np.array([a.numel()]))["near_zero"][0])


def row(a: Tensor, rms0: float, reference: Tensor | None = None, peak: float = 0.0) -> np.ndarray:
    """What a rank sends of a layer, peak and variance included; zeros where it read nothing."""
    out = np.zeros(len(TABLE) + BINS)
    if a.numel():
        found = measure(a.reshape(1, -1).clone(), torch.tensor([rms0]), torch.tensor([-1]))
        numbers = summarise(found.numpy(), np.array([a.numel()]))
        for name in set(TABLE) & set(numbers):
            out[COLUMN[name]] = numbers[name][0]
        out[len(TABLE) :] = numbers["histogram"][0]
        own = a if reference is None else reference
        out[COLUMN["reference_count"]] = own.isfinite().sum()
        out[COLUMN["reference_near_zero"]] = near_zero(own, rms0)
        out[COLUMN["estimator"]] = 3
        out[COLUMN["example_variance"]] = example_variance(a)
    out[COLUMN["peak_rms"]] = peak
    return out


parts = st.lists(st.integers(0, 12), min_size=1, max_size=5).filter(any)


@given(sizes=parts, seed=st.integers(0, 99), shift=st.sampled_from([0.0, -3.0, 100.0]))
def test_any_split_of_a_batch_gives_the_numbers_of_the_batch(
    sizes: list[int], seed: int, shift: float
) -> None:
    """But for near zero against the present RMS, and variance, which have a scale of each rank."""
    generator = torch.Generator().manual_seed(seed)
    batch = torch.randn(sum(sizes), 7, generator=generator) + shift
    batch[torch.rand(batch.shape, generator=generator) < 0.1] = 0
    batch[torch.rand(batch.shape, generator=generator) < 0.02] = torch.nan
    rms0 = 0.8
    together = row(batch, rms0)
    put = pool_ranks(np.stack([[row(part, rms0)] for part in batch.split(sizes)]))[0]
    own = [COLUMN["near_zero_present"], COLUMN["example_variance"]]
    torch.testing.assert_close(
        torch.from_numpy(np.delete(put, own)), torch.from_numpy(np.delete(together, own))
    )


@given(sizes=parts, seed=st.integers(0, 99))
def test_with_a_scale_of_their_own_shares_are_those_of_all_outputs(
    sizes: list[int], seed: int
) -> None:
    """Each rank counts against its own twin; the reference is the counting by hand."""
    generator = torch.Generator().manual_seed(seed)
    batches = [torch.randn(n, 7, generator=generator) * (1 + i) for i, n in enumerate(sizes)]
    twins = [batch + 0.1 * torch.randn(batch.shape, generator=generator) for batch in batches]
    rows = [[row(a, rms(twin), twin)] for a, twin in zip(batches, twins, strict=True)]
    put = pool_ranks(np.stack(rows))[0]
    near = [near_zero(a, rms(t)) for a, t in zip(batches, twins, strict=True) if a.numel()]
    near0 = [near_zero(t, rms(t)) for t in twins if t.numel()]
    assert put[COLUMN["near_zero"]] == sum(near)
    assert put[COLUMN["reference_near_zero"]] == sum(near0)
    everything = torch.cat(twins).double()
    assert put[COLUMN["rms0"]] == pytest.approx(float(everything.square().mean().sqrt()), rel=1e-6)


def of_one_layer(**numbers: float) -> float:
    """The displacement of a stage with one layer."""
    table = np.zeros((1, len(TABLE) + BINS))
    for name, value in numbers.items():
        table[0, COLUMN[name]] = value
    return float(pool_layers({"a": 1}, table)["a"]["displacement"])


@given(
    st.integers(1, 10**6),
    st.integers(1, 10**6),
    st.floats(0, 1),
    st.floats(0, 1),
)
def test_displacement_is_the_same_whichever_sample_is_the_larger(
    n: int, n0: int, share: float, share0: float
) -> None:
    """Half a count more, of the smaller sample, is added to both shares."""
    k, k0 = round(share * n), round(share0 * n0)
    now = {"count": n, "near_zero": k, "reference_count": n0, "reference_near_zero": k0}
    turned = {"count": n0, "near_zero": k0, "reference_count": n, "reference_near_zero": k}
    m = min(n, n0)
    expected = abs(math.log((k / n * m + 0.5) / (m + 1)) - math.log((k0 / n0 * m + 0.5) / (m + 1)))
    assert of_one_layer(**now) == pytest.approx(expected, rel=1e-9, abs=1e-12)
    assert of_one_layer(**turned) == pytest.approx(of_one_layer(**now), rel=1e-9, abs=1e-12)


def test_no_output_near_zero_of_few_is_as_of_many() -> None:
    """Nothing near zero any more, in a part of the outputs that were read with the twin."""
    seen = {"near_zero": 0, "reference_near_zero": 800, "reference_count": 10_000}
    assert of_one_layer(count=100, **seen) == pytest.approx(math.log(8.5 / 0.5))
    assert of_one_layer(count=10_000, **seen) == pytest.approx(math.log(800.5 / 0.5))


def test_the_numbers_of_a_stage_are_means_over_its_layers_that_were_read() -> None:
    stages = {"first": 2, "second": 3}
    table = np.zeros((5, len(TABLE) + BINS))
    table[:, COLUMN["peak_rms"]] = [-1.0, 4.0, -1.0, 2.0, math.nan]
    table[:, COLUMN["estimator"]] = [3, 1, 0, 2, 2]
    counts = [10, 30, 0, 20, 40]
    for name in ("count", "reference_count"):
        table[:, COLUMN[name]] = counts
    table[:, COLUMN["near_zero"]] = [1, 6, 0, 10, 10]
    table[:, COLUMN["reference_near_zero"]] = [1, 3, 0, 10, 20]
    table[:, COLUMN["mean"]] = [1.0, 3.0, 99.0, -1.0, 5.0]
    table[:, COLUMN["nonfinite"]] = [0, 2, 7, 0, 1]
    table[:, len(TABLE)] = counts
    found = pool_layers(stages, table)
    first, second = found["first"], found["second"]
    assert (first["count"], first["nonfinite"], second["count"]) == (40, 2, 60)
    assert second["nonfinite"] == 8
    assert (first["estimator"], second["estimator"]) == ("mixed", "last-twin")
    assert first["near_zero"] == pytest.approx((0.1 + 0.2) / 2)
    assert second["near_zero"] == pytest.approx((0.5 + 0.25) / 2)
    assert first["untrained"] == pytest.approx((0.1 + 0.1) / 2)
    assert (first["mean"], second["mean"]) == (2.0, 2.0)
    assert first["peak_rms"] == 4.0  # of the layer that is watched
    assert second["peak_rms"] == math.inf  # that of one was not finite
    assert first["displacement"] == pytest.approx(math.log(6.5 / 3.5) / 2)
    assert first["histogram"][0] == 40


@given(sizes=parts, seed=st.integers(0, 99))
def test_example_variance_is_that_within_the_ranks_that_have_enough_examples(
    sizes: list[int], seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    batches = [torch.randn(n, 7, generator=generator) * (1 + i) + 1 for i, n in enumerate(sizes)]
    put = pool_ranks(np.stack([[row(a, 1.0)] for a in batches]))[0][COLUMN["example_variance"]]
    told = [a.double() for a in batches if len(a) >= 8]
    if not told:
        assert np.isnan(put)
        return
    variance = sum(a.var(0, correction=0).mean() * a.numel() for a in told)
    square = sum(a.square().sum() for a in told)
    assert put == pytest.approx(float(variance / square), rel=1e-5)


def test_the_peak_is_the_largest_and_not_finite_where_one_was_not() -> None:
    rows = np.stack(
        [
            [row(torch.ones(2), 1.0, peak=p) for p in peaks]
            for peaks in ([1.0, 4.0, 2.0], [3.0, np.nan, np.inf])
        ]
    )
    np.testing.assert_array_equal(pool_ranks(rows)[:, COLUMN["peak_rms"]], [3.0, np.nan, np.inf])


def test_a_rank_that_keeps_no_peak_leaves_the_others_theirs() -> None:
    rows = np.stack(
        [[row(torch.ones(2), 1.0, peak=p) for p in peaks] for peaks in ([-1.0, -1.0], [3.0, -1.0])]
    )
    np.testing.assert_array_equal(pool_ranks(rows)[:, COLUMN["peak_rms"]], [3.0, -1.0])


def test_a_layer_that_no_rank_has_read_stays_empty() -> None:
    put = pool_ranks(np.zeros((3, 2, len(TABLE) + BINS)))
    assert not np.delete(put, [COLUMN["example_variance"]], axis=1).any()


class Echo:
    """Ranks that all read the same as this one."""

    def __init__(self, size: int = 3, sharded: bool = False) -> None:
        self.size, self.sharded = size, sharded
        self.steps: list[int] = []

    def gather(self, rows: np.ndarray, step: int) -> np.ndarray:
        self.steps.append(step)
        return np.stack([rows] * self.size)

    def sums(self, numbers: list[int], step: int) -> np.ndarray:
        return self.size * np.array(numbers, dtype=float)


def test_a_monitor_whose_ranks_read_alike_reads_their_numbers_and_all_their_outputs() -> None:
    model = net()
    alone, together = (DensityMonitor(model, every=None) for _ in range(2))
    together.ranks = Echo()  # type: ignore[assignment]
    for monitor in (alone, together):
        monitor.arm()
    loss_of(model, batches(1)[0])
    own, all_of_them = alone.collect(4), together.collect(4)
    assert own is not None
    assert all_of_them is not None
    for name, seen in own.stages.items():
        more = all_of_them.stages[name]
        assert more.count == 3 * seen.count
        np.testing.assert_array_equal(more.histogram, 3 * seen.histogram)
        for number in ("near_zero", "near_zero_present", "mean", "rms", "rms0", "displacement"):
            assert getattr(more, number) == pytest.approx(getattr(seen, number))


def test_a_rank_that_has_read_nothing_meets_the_others_all_the_same() -> None:
    monitor = DensityMonitor(net(), every=None)
    monitor.ranks = ranks = Echo()  # type: ignore[assignment]
    assert monitor.collect(0) is None
    assert ranks.steps == []  # it was not armed, and no other rank was
    monitor.arm()
    assert monitor.collect(1) is None
    assert monitor.armed
    assert ranks.steps == [1]


@pytest.mark.parametrize("elsewhere", [False, True])
def test_shards_of_gradients_are_zero_where_those_of_all_ranks_are(elsewhere: bool) -> None:
    class Others(Echo):
        def sums(self, numbers: list[int], step: int) -> np.ndarray:
            return np.array(numbers, dtype=float) + elsewhere

    stages = find_stages(net())
    for stage in stages.values():
        for parameter in stage.parameters.values():
            parameter.grad = torch.zeros_like(parameter)
    numbers = {name: {"displacement": 0.0, "estimator": "twin"} for name in stages}
    seen = zero_gradients(5, numbers, stages, Others(sharded=True))  # type: ignore[arg-type]
    assert seen == (set() if elsewhere else {"0", "3", "5"})


def test_what_must_be_alike_tells_weights_stages_and_settings_apart() -> None:
    def facts(model: nn.Module, stages: Mapping[str, str] | None = None, every: int = 5) -> object:
        return fingerprint(find_stages(model, stages), every=every)

    other = net()
    with torch.no_grad():
        other[3].bias[0] += 1e-6  # type: ignore[index]
    divided = {"a": "[01]", "b": "[35]"}
    assert facts(net()) == facts(net())
    assert facts(net()) != facts(other)
    assert facts(net()) != facts(net(), divided)
    assert facts(net()) != facts(net(), every=4)


def test_in_one_process_there_are_no_ranks_and_nothing_is_sharded() -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    assert find_ranks(model) is None
    assert stepping_optimizer(optimizer) is optimizer
    weight = model[0].weight
    assert not is_sharded(weight)
    assert whole(weight) is weight
    assert DensityLR(optimizer, model)._loop.monitor.ranks is None


def test_a_job_of_one_process_is_as_one_without_ranks() -> None:
    code = """
import torch
import torch.distributed as dist
from tests.support.fixed import net
from densitylr import DensityLR
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
model = net()
opt = DensityLR(torch.optim.SGD(model.parameters(), lr=0.1), model, recover=True)
assert opt._loop.monitor.ranks is None
dist.destroy_process_group()
"""
    subprocess.run([sys.executable, "-c", code], check=True)
