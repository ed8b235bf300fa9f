"""A rank that dies between backward and step, and what the other one is told at once."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from densitylr import DensityLR
from tests.matrix.ranks.common import FLAT, batch, net, user_groups

if __name__ == "__main__":
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    model = DistributedDataParallel(net())
    opt = DensityLR(torch.optim.SGD(user_groups(model, FLAT)), model)
    x, y = batch(0, rank)
    torch.nn.functional.cross_entropy(model(x), y).backward()
    if rank == 1:
        os._exit(0)  # without an error, for which the launcher would end the other one, too
    try:
        opt.step()
        found = ("failed", "the step was taken without the other rank")
    except RuntimeError as error:
        told = "rank 0 of 2 could not" in str(error)
        found = ("refused", str(error).split(" (")[0]) if told else ("failed", str(error))
    Path(sys.argv[1]).write_text(json.dumps({"death": found}))
    os._exit(0)
