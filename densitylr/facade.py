"""An optimizer that is, to all who look, the one inside it.

Schedulers, ``GradScaler``, training frameworks and checkpoints ask an optimizer for its groups,
its state, its hooks: they get those of the user's own, live.
"""

from __future__ import annotations

from typing import Any

from torch.optim import Optimizer

__all__ = ["Facade"]


class Facade(Optimizer):
    """What of an optimizer has nothing to do with learning rates: all of it is ``inner``'s.

    ``Optimizer.__init__`` is not called: there is nothing of its own to set up.

    Attributes:
        inner: the user's optimizer.
    """

    inner: Optimizer

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        """The user's parameter groups, with the user's rates."""
        return self.inner.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        self.inner.param_groups = groups

    @property
    def state(self) -> Any:  # type: ignore[override]
        """The inner optimizer's state by parameter."""
        return self.inner.state

    @state.setter
    def state(self, state: Any) -> None:
        self.inner.state = state

    @property
    def defaults(self) -> dict[str, Any]:  # type: ignore[override]
        """The inner optimizer's defaults."""
        return self.inner.defaults

    def __getattr__(self, name: str) -> Any:
        # GradScaler must unscale for us: an inner optimizer that does so itself would see
        # scaled gradients twice.
        if name.startswith("__") or name in ("inner", "_step_supports_amp_scaling"):
            raise AttributeError(name)
        return getattr(self.inner, name)

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError(
            "a DensityLR is tied to its model by hooks, so it can be neither copied nor pickled: "
            "save state_dict(), and make a new one for another model"
        )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        self.inner.add_param_group(param_group)

    def register_step_pre_hook(self, hook: Any) -> Any:
        return self.inner.register_step_pre_hook(hook)

    def register_step_post_hook(self, hook: Any) -> Any:
        return self.inner.register_step_post_hook(hook)
