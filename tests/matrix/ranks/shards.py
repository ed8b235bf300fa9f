"""Two processes that hold a shard of each weight: fully_shard, and what it is checkpointed with."""

from __future__ import annotations

import tempfile
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from densitylr import DensityLR, find_stages
from densitylr.model import check_untrained
from tests.matrix.ranks.common import (
    FLAT,
    STAGES,
    batch,
    controlled,
    main,
    net,
    on_all,
    ranks_are_identical,
    refused,
    row,
    scaled_is_real_groups,
    sgd,
    unscaled_is_bare,
    user_groups,
)


def shard(model: nn.Module, replicas: int = 0, **policy: Any) -> nn.Module:
    """Two layers' shards of their own, the third one in the root's; so many replicas of them."""
    size = dist.get_world_size()
    if replicas:
        shape, names = (replicas, size // replicas), ("replicas", "shards")
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
    else:
        mesh = init_device_mesh("cpu", (size,))
    for layer in (model[0], model[2]):  # type: ignore[index]
        fully_shard(layer, mesh=mesh, **policy)
    return fully_shard(model, mesh=mesh, **policy)


def as_replicas() -> None:
    """The twins answer as for replicas of the whole model, and the scales are those, too, but for
    the alignment, which shards do not have.
    """
    sharded = controlled(shard, sgd)
    replicas = controlled(DistributedDataParallel, sgd, alignment=1.0)  # no cosine is above
    for own, other in zip(sharded.scales, replicas.scales, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-3, atol=0)
    for run in (sharded, replicas):
        assert isinstance(run.optimizer, DensityLR)
        first, *_, last = (r.stages.values() for r in run.optimizer.history.readings)
        assert [r.estimator for r in first] == ["twin"] * 3
        # The stage with the largest rate has no room: its twin is let go with its first steps.
        assert [r.estimator for r in last][-1] == "last-twin"


def carry(
    folder: str, first: nn.Module, before: DensityLR, second: nn.Module, after: DensityLR
) -> None:
    """Model and optimizer as torch saves them, our own state beside them in a tuple.

    A tuple is one value to torch, so that what is loaded need not have the keys of what is there.
    """
    dcp.save(
        {
            "model": get_model_state_dict(first),
            "optimizer": get_optimizer_state_dict(first, before.inner),
            "densitylr": (before.state_dict()["densitylr"],),
        },
        checkpoint_id=folder,
    )
    state: dict[str, Any] = {
        "model": get_model_state_dict(second),
        "optimizer": get_optimizer_state_dict(second, after),  # the wrapper is as good here
        "densitylr": (None,),
    }
    dcp.load(state, checkpoint_id=folder)
    set_model_state_dict(second, state["model"])
    set_optimizer_state_dict(second, after.inner, state["optimizer"])
    after.load_state_dict({**after.inner.state_dict(), "densitylr": state["densitylr"][0]})


def carried(*given: Any) -> None:
    """`carry`, through a folder that rank 0 makes for both."""
    with tempfile.TemporaryDirectory() as own:
        folders = [own]
        dist.broadcast_object_list(folders)
        carry(folders[0], *given)
        dist.barrier()


def hybrid() -> None:
    """Replicas of shards, a mesh of two dimensions."""
    wrap = partial(shard, replicas=2)
    run = controlled(wrap, sgd)
    scaled_is_real_groups(run, wrap, sgd)
    ranks_are_identical(run)


def zero_gradient() -> None:
    """A stage whose gradients are zero is found from shards, one that is alive on one rank not."""
    model = shard(net())
    opt = DensityLR(sgd(user_groups(model, FLAT)), model, every=1)
    seen = []
    for step, dead in enumerate((0, 1, 2)):
        x, y = batch(step, dist.get_rank())
        opt.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        # All shards zero at one step, those of rank 0 only at the next.
        if dead == 1 or (dead == 2 and dist.get_rank() == 0):
            for parameter in model[2].parameters():  # type: ignore[index]
                parameter.grad.zero_()
        opt.step()
        seen.append([opt.history.readings[-1].stages[s].zero_gradient for s in STAGES])
    assert on_all(seen) == [[[0.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 0.0]]] * 2
    opt.close()


def mixed_precision() -> None:
    """Forward in bfloat16, weights in float32: nothing changes, and twins answer."""
    wrap = partial(shard, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    unscaled_is_bare(wrap, sgd)
    run = controlled(wrap, sgd)
    assert isinstance(run.optimizer, DensityLR)
    first = run.optimizer.history.readings[0]
    assert {r.estimator for r in first.stages.values()} == {"twin"}
    assert {r.displacement for r in first.stages.values()} == {0.0}


class Attention(nn.Module):
    """Layers with a copied twin: one in a shard with others, one in a shard of its own."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.stem = nn.Linear(6, 16)
        self.block = nn.ModuleDict(
            {"attention": nn.MultiheadAttention(16, 2, batch_first=True), "mix": nn.Linear(16, 16)}
        )
        self.rnn = nn.GRU(16, 16, batch_first=True)
        self.head = nn.Linear(16, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.stem(x.unsqueeze(1).expand(-1, 4, -1))
        h = h + self.block["attention"](h, h, h, need_weights=False)[0]
        return self.head(self.rnn(self.block["mix"](h).relu())[0][:, -1])


def estimators() -> None:
    model = Attention()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    fully_shard(model.rnn, mesh=mesh)
    fully_shard(model, mesh=mesh)
    groups = [
        {"params": model.head.parameters(), "lr": 0.1},
        {"params": [p for n, p in model.named_parameters() if "head" not in n], "lr": 1e-3},
    ]
    opt = DensityLR(
        torch.optim.SGD(groups),
        model,
        stages={n: n for n in ("stem", "block", "rnn", "head")},
        every=1,
    )
    for step in range(3):
        x, y = batch(step, dist.get_rank())
        opt.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        opt.step()
    first = opt.history.readings[0].stages
    assert {s: r.estimator for s, r in first.items()} == {
        "stem": "twin",
        "block": "twin",
        "rnn": "first-probe",
        "head": "twin",
    }, {s: r.estimator for s, r in first.items()}
    assert {r.displacement for r in first.values()} == {0.0}
    opt.close()


def pretrained() -> None:
    """The test of the weights says of shards what it says of the whole, trained or not."""

    def trained() -> nn.Module:
        model = net()
        with torch.no_grad():
            model[2].weight += 0.3 * torch.outer(torch.randn(20), torch.randn(40))
        return model

    for make in (net, trained):
        plain, sharded = (find_stages(m) for m in (make(), shard(make())))
        verdicts = [[check_untrained(s) for s in stages.values()] for stages in (plain, sharded)]
        assert verdicts[0] == verdicts[1]
        assert all(check.untrained for check in verdicts[0]) == (make is net)


def tensor_parallel() -> str:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    model = parallelize_module(net(), mesh, {"0": ColwiseParallel()})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return refused(lambda: DensityLR(optimizer, model), "tensor parallelism")


def flat_parameters() -> str:
    model = FullyShardedDataParallel(net(), device_id=torch.device("cpu"))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return refused(lambda: DensityLR(optimizer, model), "use torch.distributed.fsdp.fully_shard")


def recovery() -> str:
    model = shard(net())
    optimizer = sgd(user_groups(model, FLAT))
    return refused(lambda: DensityLR(optimizer, model, recover=True), "recover=True")


if __name__ == "__main__":
    name = "fully_shard, resumed by torch.distributed.checkpoint"
    main(
        {
            **row(name, shard, sgd, carried, recovery),
            "as replicas": as_replicas,
            "hybrid": hybrid,
            "gradients": zero_gradient,
            "precision": mixed_precision,
            "estimators": estimators,
            "pretrained": pretrained,
            "tensor parallel": tensor_parallel,
            "FSDP1": flat_parameters,
        }
    )
