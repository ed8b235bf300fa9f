"""What a `DensityLR` adds to the state dict of its optimizer, and how it is found there again."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Collection, Mapping
from typing import Any

__all__ = ["STATE_KEY", "asked_by_torch", "joined", "parted"]

STATE_KEY = "densitylr"
"""In a state dict: ours."""


_TORCH = "torch.distributed.checkpoint.state_dict"
_FRAMES = 16


def asked_by_torch() -> bool:
    """Whether ``get_optimizer_state_dict`` or one of its kind is at work.

    They take of a state dict what they know, ``state`` and ``param_groups``, by name, and drop
    the rest without a word. And they take a step, at rates and gradients of zero, where an
    optimizer has no state yet. Only the callers tell.
    """
    frame = sys._getframe(1)
    for _ in range(_FRAMES):
        if frame.f_globals.get("__name__") == _TORCH:
            return True
        if frame.f_back is None:
            return False
        frame = frame.f_back
    return False


def joined(inner: Mapping[str, Any], ours: Mapping[str, Any]) -> dict[str, Any]:
    """The inner optimizer's state dict with ours beside it; the bare optimizer loads it, too."""
    # torch.distributed.checkpoint takes a tuple as one value, and does not ask for the same keys
    # at loading: a fresh DensityLR has other twins and decisions.
    return {**inner, STATE_KEY: (ours,)}


def parted(
    state_dict: Mapping[str, Any], mode: str, stages: Collection[str]
) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """The inner optimizer's state dict and ours; None, with a warning, without any.

    To be called where the user's call arrives.

    Args:
        state_dict: what `joined` has made, or the state dict of a bare optimizer.
        mode: of the `DensityLR` that it is for.
        stages: the names of its stages.

    Raises:
        ValueError: it is of another mode or of other stages.
    """
    inner = {key: value for key, value in state_dict.items() if key != STATE_KEY}
    if STATE_KEY not in state_dict:
        whose = "it is a bare optimizer's"
        if asked_by_torch():
            whose += (
                ", or came through get_optimizer_state_dict, which drops ours: save "
                "optimizer.state_dict() beside it"
            )
        warnings.warn(
            f"the state dict has no DensityLR state ({whose}): the scales stay as they are",
            UserWarning,
            stacklevel=3,
        )
        return inner, None
    (found,) = state_dict[STATE_KEY]
    if found["mode"] != mode:
        raise ValueError(f"the state dict is of mode {found['mode']!r}, this DensityLR of {mode!r}")
    unknown = found["law"].keys() - stages
    if unknown:
        raise ValueError(f"the state dict has stages {sorted(unknown)}, this model {list(stages)}")
    return inner, found
