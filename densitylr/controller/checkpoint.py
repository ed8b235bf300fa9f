"""What a `DensityLR` adds to the state dict of its optimizer, and how it is found there again."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from densitylr.controller.step import called_from_dcp

__all__ = ["STATE_KEY", "add_state", "split_state"]

STATE_KEY = "densitylr"
"""In a state dict: ours."""


def add_state(inner: Mapping[str, Any], ours: Mapping[str, Any]) -> dict[str, Any]:
    """The inner optimizer's state dict with ours beside it; the bare optimizer loads it, too."""
    # torch.distributed.checkpoint takes a tuple as one value, and does not ask for the same keys
    # at loading: a fresh DensityLR has other twins and decisions.
    return {**inner, STATE_KEY: (ours,)}


def split_state(state_dict: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """The inner optimizer's state dict and ours; None, with a warning, without any.

    To be called where the user's call arrives.

    Args:
        state_dict: what `add_state` has made, or the state dict of a bare optimizer.

    Raises:
        ValueError: what stands in the place of ours is no state of a `DensityLR`.
    """
    inner = {key: value for key, value in state_dict.items() if key != STATE_KEY}
    if STATE_KEY not in state_dict:
        whose = "it is a bare optimizer's"
        if called_from_dcp():
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
    found = state_dict[STATE_KEY]
    if not (isinstance(found, (tuple, list)) and len(found) == 1 and isinstance(found[0], dict)):
        raise ValueError(
            f"the entry {STATE_KEY!r} of the state dict is no state of a DensityLR: it is a "
            f"{type(found).__name__}"
        )
    return inner, found[0]
