"""What `DensityLR` can be put around, and with which settings. Nothing is changed here."""

from __future__ import annotations

import warnings
from collections.abc import Mapping

import torch
from torch.optim import Optimizer

from densitylr.model import Ranks, Stage
from densitylr.policy import MODES, Policy

__all__ = ["check_mode", "check_optimizer", "check_recover", "check_stages"]


def check_optimizer(optimizer: Optimizer, wrapper_class: type[Optimizer]) -> None:
    """Refuse what a scale per stage cannot be put on; to be called where the user's call arrives.

    Args:
        optimizer: what the user gave.
        wrapper_class: what it is to be wrapped in, and must not be already.

    Raises:
        TypeError: it is no ``Optimizer``.
        ValueError: it is wrapped already, wants one rate for the whole model, is a wrapper
            without step hooks, or has a group without a rate.
    """
    if not isinstance(optimizer, Optimizer):
        raise TypeError(
            f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}"
        )
    wrapper = vars(optimizer).get("_densitylr")
    if isinstance(optimizer, wrapper_class):
        raise ValueError("the optimizer is a DensityLR already")
    if wrapper is not None and wrapper() is not None:
        raise ValueError(f"this {type(optimizer).__name__} has a DensityLR already")
    name = type(optimizer).__name__
    # Optimizer.__init__ sets this; torch's own step hooks depend on it.
    if "_optimizer_state_dict_pre_hooks" not in vars(optimizer):
        raise ValueError(
            f"{name} is a wrapper that never called Optimizer.__init__, so its step has no hooks "
            "to go by: put DensityLR around the optimizer inside it, best before that is wrapped"
        )
    if name.startswith(("Prodigy", "DAdapt")):
        raise ValueError(
            f"{name} estimates one learning rate for the whole model; a scale per stage would "
            "be undone by its next estimate"
        )
    if isinstance(optimizer, torch.optim.LBFGS):
        raise ValueError(
            "LBFGS takes a single parameter group, so stages cannot have rates of their own"
        )
    if isinstance(optimizer, torch.optim.Rprop):
        raise ValueError(
            "Rprop reads the rate at its first step only and keeps a step size of its own for "
            "each weight from then on; a scale on the rate would change nothing"
        )
    if "ScheduleFree" in name:
        warnings.warn(
            f"{name}: a raised rate stays in its averaging weights after the stage has lifted off",
            UserWarning,
            stacklevel=3,
        )
    for i, group in enumerate(optimizer.param_groups):
        if "lr" not in group:
            raise ValueError(f"param_groups[{i}] of {name} has no 'lr' to scale")
        if not isinstance(group["lr"], (float, int, torch.Tensor)):
            raise ValueError(
                f"param_groups[{i}] of {name} has lr={group['lr']!r}, which is no number to scale: "
                "give it a learning rate"
            )


def check_stages(optimizer: Optimizer, stages: Mapping[str, Stage]) -> None:
    """Refuse an optimizer that cannot train a stage; later, stages may be added as they thaw.

    Raises:
        ValueError: the optimizer misses all trainable parameters of a stage, or of the model.
    """
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    parameters = [p for stage in stages.values() for p in stage.parameters.values()]
    if any(p.requires_grad for p in parameters) and held.isdisjoint(map(id, parameters)):
        raise ValueError(
            "the optimizer holds no parameter of this model: it was made for another one, or for "
            "a copy"
        )
    for stage in stages.values():
        trainable = {n: p for n, p in stage.parameters.items() if p.requires_grad}
        if trainable and not any(id(p) in held for p in trainable.values()):
            raise ValueError(
                f"the optimizer holds none of the {len(trainable)} trainable parameters of stage "
                f"{stage.name!r} (the first is {next(iter(trainable))!r}): add them to it, or "
                "freeze them with requires_grad_(False)"
            )


def check_recover(observe_only: bool, ranks: Ranks | None, divided: bool) -> None:
    """Refuse ``recover=True`` where there is nothing whole to go back to.

    Args:
        observe_only: training is to be left alone.
        ranks: the processes that train the model, if there are several.
        divided: each of them holds a part of the optimizer's state.

    Raises:
        ValueError: as above.
    """
    if observe_only:
        raise ValueError(
            "recover=True goes back to a snapshot, observe_only=True leaves training alone: "
            "choose one"
        )
    if ranks is not None and (ranks.sharded or divided):
        raise ValueError(
            "recover=True goes back to a snapshot of the whole state, of which each process "
            "holds a part only under fully_shard and ZeroRedundancyOptimizer"
        )


def check_mode(mode: str, policy: Policy | None) -> Policy:
    """The policy that is meant.

    Args:
        mode: its short name, where ``policy`` is None.
        policy: it.

    Raises:
        ValueError: no such mode.
        TypeError: ``policy`` is no policy.
    """
    if mode not in MODES:
        raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")
    if policy is None:
        return MODES[mode]()
    if not isinstance(policy, Policy):
        raise TypeError(
            f"policy must be a densitylr.policy.Policy, got {type(policy).__name__}: derive its "
            "class from Policy"
        )
    return policy
