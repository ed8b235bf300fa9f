"""Several processes that train one model: their readings are pooled before a decision is taken.

Each rank reads its own part of the batch. At a reading the ranks exchange their rows of numbers,
once, and every rank pools the same rows in the same order. So all of them take the same decisions,
to the last bit, and their replicas stay identical.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from densitylr.model.stages import Stage

__all__ = [
    "Ranks",
    "RanksError",
    "find_ranks",
    "fingerprint",
    "is_sharded",
    "stepping_optimizer",
    "whole",
]

TIMEOUT = timedelta(minutes=10)
"""How long a rank waits at a reading for the others, which reach it in the same step."""


class RanksError(RuntimeError):
    """The ranks cannot go on together. It is raised, as each alone would train another model."""


class Ranks:
    """The ranks that train one model, as seen from one of them.

    They talk over a process group of their own, on the host, so that nothing comes between the
    exchanges of the training, whatever its devices and backend.

    Args:
        group: the process group whose ranks these are.
        model: the model as the user gave it.
    """

    def __init__(self, group: ProcessGroup, model: nn.Module) -> None:
        self.rank = torch.distributed.get_rank(group)
        self.size = torch.distributed.get_world_size(group)
        self.sharded = any(is_sharded(p) for p in model.parameters())
        self._members = torch.distributed.get_process_group_ranks(group)
        self._replicas = _replicas(model)
        self._group: Any = None

    def check_agreement(self, facts: Mapping[str, str]) -> None:
        """Make the process group, and refuse ranks that would not decide alike. A collective.

        Raises:
            ValueError: a fact, by name, is not the same on all ranks. The group is gone then.
        """
        self._group = torch.distributed.new_group(
            self._members, backend="gloo", timeout=TIMEOUT, use_local_synchronization=True
        )
        found: list[Any] = [None] * self.size
        torch.distributed.all_gather_object(found, dict(facts), group=self._group)
        for rank, other in enumerate(found):
            for name, value in found[0].items():
                if other.get(name) != value:
                    self.close()
                    raise ValueError(
                        f"the {self.size} processes must train one model with the same settings, "
                        f"but {name} is {value} on rank 0 and {other.get(name)} on rank {rank}: "
                        "make the DensityLR after the model is wrapped (DDP hands the weights of "
                        "rank 0 to all), or give each training a process_group of its own"
                    )

    def gather(self, rows: np.ndarray, step: int) -> np.ndarray:
        """The rows of all ranks. A collective.

        Args:
            rows: float64 ``[layers, statistics]`` of this rank.
            step: optimizer steps done.

        Returns:
            float64 ``[ranks, layers, statistics]``.

        Raises:
            RanksError: the ranks are not at the same step, a rank has died or does not come,
                or DDP's ``join`` stands in for ranks that have run out of batches.
        """
        for replica in self._replicas:
            join = replica._join_config
            if join.enable and not join.throw_on_early_termination:
                raise RanksError(
                    "DDP's join stands in for a rank that has run out of batches, but not in the "
                    "exchange of the ranks' densities, where the others would wait for it: give "
                    "all ranks the same number of batches (DistributedSampler does), or use "
                    "join(throw_on_early_termination=True)"
                )
        gathered = self._gather(np.concatenate([[step], rows.ravel()]), step)
        steps = gathered[:, 0].astype(int).tolist()
        if len(set(steps)) > 1:
            raise RanksError(
                f"the ranks must step together, but they have taken {steps} steps: load the same "
                "state dict on all of them, and call step() on all"
            )
        return gathered[:, 1:].reshape(self.size, *rows.shape)

    def sums(self, numbers: np.ndarray | Sequence[float], step: int) -> np.ndarray:
        """The sums over the ranks of so many numbers, float64. A collective."""
        return self._gather(np.asarray(numbers, dtype=np.float64), step).sum(axis=0)

    def close(self) -> None:
        """Destroy the process group; ranks that continue get an error."""
        if self._group is not None and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group(self._group)
        self._group = None

    def _gather(self, own: np.ndarray, step: int) -> np.ndarray:
        """``[ranks, numbers]``, from float64 ``[numbers]`` on each of them."""
        sent = torch.from_numpy(own)
        received = [torch.empty_like(sent) for _ in range(self.size)]
        try:
            torch.distributed.all_gather(received, sent, group=self._group)
        except RuntimeError as error:
            raise RanksError(
                f"rank {self.rank} of {self.size} could not put its densities together with the "
                f"others' at step {step}: a rank has died, has closed its DensityLR, has run out "
                f"of batches, or did not come to this step within {TIMEOUT} ({error})"
            ) from error
        return torch.stack(received).numpy()


def find_ranks(model: nn.Module, process_group: ProcessGroup | None = None) -> Ranks | None:
    """The ranks that train ``model``; None where one process does.

    Args:
        model: the model, wrapped or sharded already.
        process_group: the ranks that train one model on different batches; default: those of
            DDP around ``model``, or all.

    Raises:
        ValueError: the model is divided over processes in a way that hides its weight layers,
            or this rank is not in the group.
    """
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()):
        return None
    replicas = _replicas(model)
    group = replicas[0].process_group if replicas else distributed.group.WORLD
    group = process_group if process_group is not None else group
    if group is None or distributed.get_rank(group) < 0:
        raise ValueError(
            f"this process, rank {distributed.get_rank()}, is not in the process_group it was given"
        )
    if distributed.get_world_size(group) == 1:
        return None
    _check_division(model)
    return Ranks(group, model)


def fingerprint(stages: Mapping[str, Stage], **settings: Any) -> dict[str, str]:
    """What must be the same on all ranks, in words; see `Ranks.check_agreement`."""
    facts = {name: str(value) for name, value in settings.items()}
    for name, stage in stages.items():
        facts[f"what stage {name!r} holds"] = ", ".join((*stage.layers, *stage.parameters))
        own = [p for p in stage.parameters.values() if not is_sharded(p)]
        sums = [float(p.detach().sum(dtype=torch.float64)) for p in own]
        facts[f"the sum of the weights of stage {name!r}"] = f"{sum(sums):.17g}"
    return {"the number and names of the stages": ", ".join(stages), **facts}


def is_sharded(tensor: Tensor) -> bool:
    """Whether each rank holds a part of ``tensor`` only."""
    return hasattr(tensor, "full_tensor")


def whole(tensor: Tensor) -> Tensor:
    """A sharded tensor put together, which is a collective; any other as it is."""
    return tensor.detach().full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def stepping_optimizer(optimizer: Optimizer) -> Optimizer:
    """The optimizer whose groups a step uses: that of this rank's part under ZeRO.

    Raises:
        ValueError: there is none, as DDP's communication hook takes the step.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return optimizer
    from torch.distributed.optim import ZeroRedundancyOptimizer

    if not isinstance(optimizer, ZeroRedundancyOptimizer):
        return optimizer
    own = getattr(optimizer, "optim", None)
    if not isinstance(own, Optimizer):
        raise ValueError(
            "ZeroRedundancyOptimizer(overlap_with_ddp=True) steps within DDP's backward pass, "
            "before the densities of all ranks are known: use overlap_with_ddp=False"
        )
    return own


def _replicas(model: nn.Module) -> list[nn.parallel.DistributedDataParallel]:
    return [m for m in model.modules() if isinstance(m, nn.parallel.DistributedDataParallel)]


def _check_division(model: nn.Module) -> None:
    from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel

    def divided(module: nn.Module, inside: bool) -> Iterator[str]:
        inside = inside or isinstance(module, FSDPModule)
        for parameter in module.parameters(recurse=False):
            if is_sharded(parameter):
                shards = sum(not p.is_replicate() for p in parameter.placements)  # type: ignore
                if shards > 1 or not inside:
                    yield type(module).__name__
        for child in module.children():
            yield from divided(child, inside)

    if any(isinstance(m, FullyShardedDataParallel) for m in model.modules()):
        raise ValueError(
            "FullyShardedDataParallel keeps the weights of several layers in one flat parameter: "
            "use torch.distributed.fsdp.fully_shard"
        )
    layer = next(divided(model, False), None)
    if layer is not None:
        raise ValueError(
            f"the weights of a {layer} are divided over processes by something other than "
            "fully_shard (tensor parallelism), so that each rank sees a part of its outputs only"
        )
