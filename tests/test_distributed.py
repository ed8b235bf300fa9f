"""The rows of the ranks, put together, are those of the concatenated batch."""

from __future__ import annotations

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
from densitylr.density import BINS, TABLE, measure, summarise, variety
from densitylr.distributed import alike, combine, find_ranks, is_sharded, stepping_optimizer, whole
from densitylr.gradients import without_gradient
from densitylr.probe import UNKEPT
from densitylr.stages import find_stages
from tests.fixed import batches, loss_of, net
from tests.readings import reading

AT = {name: i for i, name in enumerate(TABLE)}


def rms(a: Tensor) -> float:
    return float(a.double().square().mean().sqrt())


def near_zero(a: Tensor, scale: float) -> int:
    found = measure(a.reshape(1, -1).clone(), torch.tensor([scale]), torch.tensor([-1]))
    return int(summarise(found.numpy(), np.array([a.numel()]))["near_zero"][0])


def row(a: Tensor, rms0: float, reference: Tensor | None = None, peak: float = 0.0) -> np.ndarray:
    """What a rank sends of a tap, peak and variety included; zeros where it read nothing."""
    out = np.zeros(len(TABLE) + BINS)
    if a.numel():
        found = measure(a.reshape(1, -1).clone(), torch.tensor([rms0]), torch.tensor([-1]))
        numbers = summarise(found.numpy(), np.array([a.numel()]))
        for name in set(TABLE) & set(numbers):
            out[AT[name]] = numbers[name][0]
        out[len(TABLE) :] = numbers["histogram"][0]
        own = a if reference is None else reference
        out[AT["reference_count"]] = own.isfinite().sum()
        out[AT["reference_near_zero"]] = near_zero(own, rms0)
        out[AT["dormant"]] = 0.25
        out[AT["estimator"]] = 3
        out[AT["variety"]] = variety(a)
    out[AT["peak"]] = peak
    return out


parts = st.lists(st.integers(0, 12), min_size=1, max_size=5).filter(any)


@given(sizes=parts, seed=st.integers(0, 99), shift=st.sampled_from([0.0, -3.0, 100.0]))
def test_any_split_of_a_batch_gives_the_numbers_of_the_batch(
    sizes: list[int], seed: int, shift: float
) -> None:
    """But for near zero against the present RMS, and variety, which have a scale of each rank."""
    generator = torch.Generator().manual_seed(seed)
    batch = torch.randn(sum(sizes), 7, generator=generator) + shift
    batch[torch.rand(batch.shape, generator=generator) < 0.1] = 0
    batch[torch.rand(batch.shape, generator=generator) < 0.02] = torch.nan
    rms0 = 0.8
    together = row(batch, rms0)
    put = combine(np.stack([[row(part, rms0)] for part in batch.split(sizes)]))[0]
    own = [AT["near_zero_present"], AT["variety"]]
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
    put = combine(np.stack(rows))[0]
    near = [near_zero(a, rms(t)) for a, t in zip(batches, twins, strict=True) if a.numel()]
    near0 = [near_zero(t, rms(t)) for t in twins if t.numel()]
    assert put[AT["near_zero"]] == sum(near)
    assert put[AT["reference_near_zero"]] == sum(near0)
    everything = torch.cat(twins).double()
    assert put[AT["rms0"]] == pytest.approx(float(everything.square().mean().sqrt()), rel=1e-6)


@given(sizes=parts, seed=st.integers(0, 99))
def test_variety_is_that_within_the_ranks_that_have_enough_examples(
    sizes: list[int], seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    batches = [torch.randn(n, 7, generator=generator) * (1 + i) + 1 for i, n in enumerate(sizes)]
    put = combine(np.stack([[row(a, 1.0)] for a in batches]))[0][AT["variety"]]
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
    np.testing.assert_array_equal(combine(rows)[:, AT["peak"]], [3.0, np.nan, np.inf])


def test_a_rank_that_keeps_no_peak_leaves_the_others_theirs() -> None:
    rows = np.stack(
        [[row(torch.ones(2), 1.0, peak=p) for p in peaks] for peaks in ([-1.0, -1.0], [3.0, -1.0])]
    )
    np.testing.assert_array_equal(combine(rows)[:, AT["peak"]], [3.0, UNKEPT])


def test_a_tap_that_no_rank_has_read_stays_empty() -> None:
    put = combine(np.zeros((3, 2, len(TABLE) + BINS)))
    assert not np.delete(put, [AT["variety"], AT["dormant"]], axis=1).any()


class Echo:
    """Ranks that all read the same as this one."""

    def __init__(self, size: int = 3, sharded: bool = False) -> None:
        self.size, self.sharded = size, sharded
        self.steps: list[int] = []

    def combined(self, rows: np.ndarray, step: int) -> np.ndarray:
        self.steps.append(step)
        return combine(np.stack([rows] * self.size))

    def total(self, numbers: list[int], step: int) -> list[int]:
        return [self.size * n for n in numbers]


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
        for number in ("near_zero", "mean", "std", "rms", "rms0", "exactly_zero"):
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
        def total(self, numbers: list[int], step: int) -> list[int]:
            return [n + elsewhere for n in numbers]

    stages = find_stages(net())
    for stage in stages.values():
        for parameter in stage.parameters.values():
            parameter.grad = torch.zeros_like(parameter)
    seen = without_gradient(
        reading(5, dict.fromkeys(stages, 0.0)),
        stages,
        Others(sharded=True),  # type: ignore[arg-type]
    )
    assert {s.zero_gradient for s in seen.stages.values()} == {0.0 if elsewhere else 1.0}


def test_what_must_be_alike_tells_weights_stages_and_settings_apart() -> None:
    def facts(model: nn.Module, stages: Mapping[str, str] | None = None, every: int = 5) -> object:
        return alike(find_stages(model, stages), every=every)

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
    assert DensityLR(optimizer, model)._monitor.ranks is None


def test_a_job_of_one_process_is_as_one_without_ranks() -> None:
    code = """
import torch
import torch.distributed as dist
from tests.fixed import net
from densitylr import DensityLR
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
model = net()
opt = DensityLR(torch.optim.SGD(model.parameters(), lr=0.1), model, recover=True)
assert opt._monitor.ranks is None
dist.destroy_process_group()
"""
    subprocess.run([sys.executable, "-c", code], check=True)
