"""What happens at a step: hooks on the user's optimizer put the scales on its rates, and off again.

They are on the user's own optimizer, so that a step counts whoever takes it: a training loop,
``GradScaler``, a framework that was given the optimizer before we came.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch.optim import Optimizer

from densitylr.checkpoint import asked_by_torch
from densitylr.deciding import Decider
from densitylr.facade import Facade
from densitylr.splitting import Scaling

__all__ = ["Stepping"]

SKIPPED = 3
"""Steps skipped in a row after which ``recover`` looks for a collapse without a step."""


class Stepping(Facade):
    """An optimizer whose steps are ``inner``'s, each stage at the scale that a `Decider` has."""

    _decider: Decider

    def _attach(self, stepped: Optimizer, decider: Decider, notice: str) -> None:
        """Begin.

        Args:
            stepped: ``inner``, or what takes the steps inside it.
            decider: what has the scales.
            notice: what the first step is to warn of. Not before: until then a checkpoint may
                come, of a run in which these weights were not trained yet.
        """
        self._notice = notice
        self._decider = decider
        self._scaling = Scaling(stepped)
        self._skipped = 0  # calls of zero_grad without a step
        self._stepping = False
        self._void = False  # the step that runs is none
        for hooks in (stepped._optimizer_step_pre_hooks, stepped._optimizer_step_post_hooks):
            for key in [k for k, hook in hooks.items() if _is_left(hook)]:
                del hooks[key]
        me = weakref.ref(self)
        self._handles = [
            stepped.register_step_pre_hook(_hook(me, "_before_step")),
            stepped.register_step_post_hook(_hook(me, "_after_step")),
        ]
        self._before_zeroing = _hook(me, "_before_zero_grad")

    def _detach(self) -> None:
        """Take the hooks off, and whatever a step that raised has left. May be called again."""
        self._scaling.heal()
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def step(self, closure: Callable[[], float] | None = None) -> Any:  # type: ignore[override]
        """One step of the user's optimizer, each stage at its own scale."""
        try:
            return self.inner.step() if closure is None else self.inner.step(closure)
        finally:
            self._stepping = False
            self._scaling.heal()

    def _before_step(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self._scaling.heal()
        self._void = asked_by_torch()
        if self._void:
            return None
        self._stepping = True
        notice, self._notice = self._notice, ""
        if notice:
            warnings.warn(notice, UserWarning, stacklevel=2)
        inner, *given = args
        if not any(map(callable, (*given, *kwargs.values()))):
            self._decider.probe(stepping=True)
            self._scale()
            return None
        self._scale()
        return (
            (inner, *(self._evaluation(a) if callable(a) else a for a in given)),
            {k: self._evaluation(v) if callable(v) else v for k, v in kwargs.items()},
        )

    def _evaluation(self, closure: Callable[..., Any]) -> Callable[..., Any]:
        """A closure that makes the forward and the gradients of the step it is called in."""

        def evaluate(*args: Any, **kwargs: Any) -> Any:
            self._scaling.restore()  # within the closure, too, the rates are the user's
            result = closure(*args, **kwargs)
            self._decider.probe(stepping=True)
            self._scale()
            return result

        return evaluate

    def _scale(self) -> None:
        scales = self._decider.scales
        if any(s != 1.0 for s in scales.values()):
            groups = self._scaling.optimizer.param_groups
            self._scaling.apply(self._decider.rates.factors(scales, groups))

    def _after_step(self, *_: Any) -> None:
        # A subclass's step that calls its parent's has the hooks of both; the inner ones count.
        if self._void or not self._stepping:
            return
        self._stepping = False
        self._scaling.restore()
        self._skipped = 0
        self._decider.stepped()

    def zero_grad(self, set_to_none: bool = True) -> None:
        # Lightning calls this with a proxy of its own as self: nothing may be set on that.
        self._before_zeroing(self.inner, (), {})
        self.inner.zero_grad(set_to_none)

    def _before_zero_grad(self, *_: Any) -> None:
        # While gradients are not finite GradScaler takes no step, so that no hook is called: for
        # ever, once the parameters are not finite.
        if self._void:
            self._void = False
        elif not self._stepping:  # a closure calls it, too
            self._skipped += 1
            if self._skipped > SKIPPED:
                self._decider.look_without_a_step()


def _hook(controller: weakref.ref[Stepping], method: str) -> Any:
    """An optimizer step hook that does not keep the controller alive, and is never compiled.

    Traced, what it does to the groups would be part of a graph, and would not be done again.
    """

    def hook(optimizer: Optimizer, args: Any, kwargs: Any) -> Any:
        alive = controller()
        if alive is not None:
            return getattr(alive, method)(args, kwargs)
        if method == "_before_step":
            warnings.warn(
                f"the DensityLR of this {type(optimizer).__name__} is gone, as nothing refers to "
                "it, and its rates are left alone from here on: keep it in a variable, or end it "
                "by close()",
                UserWarning,
                stacklevel=2,
            )
        return None

    found: Any = torch.compiler.disable(hook)
    found.controller = controller
    return found


def _is_left(hook: Any) -> bool:
    """Whether it is a hook of a controller that is gone."""
    controller = getattr(hook, "controller", None)
    return isinstance(controller, weakref.ref) and controller() is None
