"""Ranks that do not do the same: fewer batches on one, a step that one does not take."""

from __future__ import annotations

from datetime import timedelta
from unittest import mock

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from densitylr import DensityLR
from tests.matrix.ranks.common import (
    FLAT,
    STARVED,
    main,
    net,
    on_all,
    refused,
    same,
    step_of,
    user_groups,
    whole_weights,
)

SHORT = timedelta(seconds=2)


def joined() -> str:
    """DDP's join, in which a rank that has run out has others' exchanges mirrored for it."""
    model = DistributedDataParallel(net())
    opt = DensityLR(torch.optim.SGD(user_groups(model, FLAT)), model)

    def epoch() -> None:
        with model.join():
            for step in range(4 - dist.get_rank()):
                step_of(model, opt, step)

    reason = refused(epoch, "DDP's join stands in")
    opt.close()
    return reason


def ended_together() -> None:
    """The join that ends the epoch of all ranks where the first one runs out."""
    model = DistributedDataParallel(net())
    opt = DensityLR(torch.optim.SGD(user_groups(model, STARVED), momentum=0.9), model)
    taken = []

    def epoch() -> None:
        with model.join(throw_on_early_termination=True):
            for step in range(12 - 4 * dist.get_rank()):
                step_of(model, opt, step)
                taken.append(step)

    refused(epoch, "exhausted")
    assert on_all(len(taken)) == [8, 8]
    weights, scales = on_all(whole_weights(model)), on_all(opt.scales)
    assert same(weights[0], weights[1])
    assert scales[0] == scales[1] != dict.fromkeys(scales[0], 1.0)
    opt.close()


def late() -> str:
    """A rank that does not come to a step: the other one is told, in the time it was given."""
    model = DistributedDataParallel(net())
    with mock.patch("densitylr.model.ranks.TIMEOUT", SHORT):
        opt = DensityLR(torch.optim.SGD(user_groups(model, FLAT)), model)
        reason = [""]
        if dist.get_rank() == 0:
            reason = [refused(opt.step, "rank 0 of 2 could not")]
    dist.broadcast_object_list(reason)
    opt.close()
    return reason[0].split(" (")[0]


if __name__ == "__main__":
    main({"join": joined, "ended together": ended_together, "late": late})
