"""Two replicas under DistributedDataParallel, with a plain and with a ZeRO optimizer."""

from __future__ import annotations

from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel

from densitylr import DensityLR, DensityMonitor
from tests.matrix.ranks.common import (
    FLAT,
    STAGES,
    STARVED,
    Groups,
    batch,
    main,
    net,
    on_all,
    refused,
    row,
    same,
    sgd,
    step_of,
    train,
    user_groups,
)


def zero(groups: Groups) -> torch.optim.Optimizer:
    return ZeroRedundancyOptimizer(groups, torch.optim.Adam, lr=0.1)


def carry(first: nn.Module, before: DensityLR, second: nn.Module, after: DensityLR) -> None:
    second.load_state_dict(first.state_dict())
    after.load_state_dict(before.state_dict())


def carry_zero(first: nn.Module, before: DensityLR, second: nn.Module, after: DensityLR) -> None:
    """As torch does it: put together on rank 0, which hands it to the others."""
    second.load_state_dict(first.state_dict())
    before.consolidate_state_dict(to=0)
    state = [before.state_dict() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(state)
    assert state[0] is not None
    after.load_state_dict(state[0])


def reads_the_whole_batch() -> None:
    """Counts and moments of two ranks are those of one process with all examples."""
    model, alone = DistributedDataParallel(net()), net()
    groups = user_groups(model, STARVED)
    opt = DensityLR(sgd(groups), model, every=1, observe_only=True)
    with DensityMonitor(alone, every=1) as monitor:
        for step in range(3):
            parts = [batch(step, rank) for rank in range(2)]
            alone.load_state_dict(model.module.state_dict())
            alone(torch.cat([x for x, _ in parts]))
            step_of(model, opt, step)
    assert len(opt.history) == len(monitor.history) == 3
    for stage in STAGES:
        for number in ("count", "mean", "rms", "rms0"):
            left, right = (h.series(stage, number) for h in (opt.history, monitor.history))
            torch.testing.assert_close(torch.tensor(left), torch.tensor(right))
    # Near zero is counted by each rank against its own twin, as one process does against one.
    for stage in STAGES:
        moved, whole = (h.series(stage, "displacement") for h in (opt.history, monitor.history))
        assert moved[0] == whole[0] == 0
        assert abs(moved - whole).max() < 0.1
    opt.close()


class Sometimes(nn.Module):
    """Two branches, of which a rank may take one only."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.stem = nn.Linear(6, 40)
        self.branch = nn.Linear(40, 40)
        self.head = nn.Linear(40, 3)

    def forward(self, x: Tensor, both: bool) -> Tensor:
        h = self.stem(x).relu()
        return self.head(self.branch(h).relu() if both else h)


def branch_of_one_rank() -> None:
    """A layer that one rank calls, and the other does not; the next step the other way round."""
    model = DistributedDataParallel(Sometimes(), find_unused_parameters=True)
    opt = DensityLR(torch.optim.SGD(model.parameters(), lr=0.05), model, every=1)
    for step in range(6):
        x, y = batch(step, dist.get_rank())
        opt.zero_grad()
        both = dist.get_rank() == step % 2
        nn.functional.cross_entropy(model(x, both), y).backward()
        opt.step()
    assert opt.history.series("branch", "count").tolist() == [
        40 * (48 - 16 * (s % 2)) for s in range(6)
    ]
    assert opt.history.series("stem", "count").tolist() == [40 * 80] * 6
    readings = on_all(repr(opt.history.readings))
    assert readings[0] == readings[1]
    opt.close()


def each_for_itself() -> None:
    """Two trainings in one job: each with a group of its own rank decides for itself."""
    rank = dist.get_rank()
    groups = [dist.new_group([rank]) for rank in range(2)]
    model, alone = net(), DistributedDataParallel(net(), process_group=groups[rank])
    inner = sgd(user_groups(model, FLAT))
    other = groups[1 - rank]
    refused(lambda: DensityLR(inner, model, process_group=other), "is not in the process_group")
    runs = [
        train(model, DensityLR(inner, model, every=1, process_group=groups[rank]), range(3)),
        train(alone, DensityLR(sgd(user_groups(alone, FLAT)), alone, every=1), range(3)),
    ]
    for run in runs:
        assert isinstance(run.optimizer, DensityLR)
        counts = on_all(run.optimizer.history.series("0", "count").tolist())
        assert counts == [[40 * 48] * 3, [40 * 32] * 3]
        weights = on_all(run.weights)
        assert not same(weights[0], weights[1])


def other_weights() -> str:
    """Made before DDP has handed out the weights of rank 0."""
    torch.manual_seed(dist.get_rank())
    model = nn.Sequential(nn.Linear(6, 40), nn.ReLU(), nn.Linear(40, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return refused(lambda: DensityLR(optimizer, model), "the sum of the weights of stage")


def other_steps() -> str:
    """A checkpoint that one rank only has loaded."""
    model = DistributedDataParallel(net())
    opt = DensityLR(sgd(user_groups(model, FLAT)), model, every=1)
    run = partial(train, model, opt, range(1))
    run()
    state = opt.state_dict()
    run()
    if dist.get_rank() == 1:
        opt.load_state_dict(state)
    reason = refused(run, "the ranks must step together")
    opt.close()
    return reason


def recovery_of_a_sharded_state() -> str:
    model = DistributedDataParallel(net())
    optimizer = zero(user_groups(model, FLAT))
    return refused(lambda: DensityLR(optimizer, model, recover=True), "recover=True")


def step_within_backward() -> str:
    """ZeRO that overlaps its step with DDP's backward pass."""
    model = DistributedDataParallel(net())
    optimizer = ZeroRedundancyOptimizer(
        model.parameters(), torch.optim.SGD, overlap_with_ddp=True, lr=0.1
    )
    return refused(lambda: DensityLR(optimizer, model), "overlap_with_ddp=False")


def recovers() -> None:
    """``recover`` leaves a healthy training alone, in several processes as in one."""
    left, right = DistributedDataParallel(net()), DistributedDataParallel(net())
    opt = DensityLR(sgd(user_groups(left, FLAT)), left, recover=True)
    ours = train(left, opt, range(8))
    assert same(ours.weights, train(right, sgd(user_groups(right, FLAT)), range(8)).weights)
    peaks = on_all(opt.history.series("0", "peak_rms").tolist())
    assert peaks[0] == peaks[1]
    opt.close()


def collapses() -> None:
    """At a rate far too high all ranks go back together, and stay identical."""
    model = DistributedDataParallel(net())
    groups = [{"params": list(model.parameters()), "lr": 3.0}]
    opt = DensityLR(torch.optim.SGD(groups, momentum=0.9), model, recover=True, every=2)
    with_nan = train(model, opt, range(60))
    kinds = on_all([(d.step, d.kind) for d in opt.history.decisions])
    assert kinds[0] == kinds[1]
    assert any(kind == "recover" for _, kind in kinds[0]), kinds
    weights = on_all(with_nan.weights)
    assert same(weights[0], weights[1])
    opt.close()


if __name__ == "__main__":
    main(
        {
            **row("DDP", DistributedDataParallel, sgd, carry, recovers),
            **row(
                "DDP, ZeroRedundancyOptimizer",
                DistributedDataParallel,
                zero,
                carry_zero,
                recovery_of_a_sharded_state,
            ),
            "overlap": step_within_backward,
            "reading": reads_the_whole_batch,
            "branch": branch_of_one_rank,
            "collapse": collapses,
            "own groups": each_for_itself,
            "other weights": other_weights,
            "other steps": other_steps,
        }
    )
