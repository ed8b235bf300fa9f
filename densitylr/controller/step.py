"""Hooks on the user's optimizer: before a step its rates are scaled, after it they are put back.

They are on the user's own optimizer, so that a step counts whoever takes it: a training loop,
``GradScaler``, a framework that was given the optimizer before the controller was made.
"""

from __future__ import annotations

import sys
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch.optim import Optimizer

from densitylr.controller.loop import ControlLoop
from densitylr.controller.param_groups import ScaledGroups, StageRates

__all__ = ["StepHooks", "called_from_dcp", "with_closures"]

SKIPPED = 3
"""Steps skipped in a row after which ``recover`` looks for a collapse without a step."""

_TORCH = "torch.distributed.checkpoint.state_dict"
_FRAMES = 16


class StepHooks:
    """The hooks of one optimizer. They do not keep this object, nor the control loop, alive.

    Args:
        optimizer: what takes the steps: the user's optimizer, or the one inside it. loop: what
        decides on scales. rates: the user's rates by stage. notice: what the first step is to warn
        of. Not before: until then a checkpoint may be loaded,
            of a run in which these weights were not trained yet.
    """

    def __init__(
        self, optimizer: Optimizer, loop: ControlLoop, rates: StageRates, notice: str
    ) -> None:
        self.optimizer, self.loop, self.rates, self.notice = optimizer, loop, rates, notice
        self.groups = ScaledGroups(optimizer)
        self.stepping = False
        self._skipped = 0  # calls of zero_grad without a step
        self._void = False  # the step that runs is none
        for hooks in (optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks):
            for key in [k for k, hook in hooks.items() if _is_left(hook)]:
                del hooks[key]
        me = weakref.ref(self)
        self._handles = [
            optimizer.register_step_pre_hook(_hook(me, StepHooks.before, warn=True)),
            optimizer.register_step_post_hook(_hook(me, StepHooks.after)),
        ]

    def close(self) -> None:
        """Take the hooks off, and whatever a step that raised has left. May be called again."""
        self.groups.heal()
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def end(self) -> None:
        """Whatever became of the step, it is over: the user's rates again."""
        self.stepping = False
        self.groups.heal()

    def before(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Just before a step."""
        self.groups.heal()
        self._void = self._may_be_void() and called_from_dcp()
        if self._void:
            return None
        self.stepping = True
        notice, self.notice = self.notice, ""
        if notice:
            warnings.warn(notice, UserWarning, stacklevel=3)
        given = with_closures(args, kwargs, self._evaluation)
        if given is None:
            self.loop.before_step()
        self._scale()
        return given

    def after(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Just after a step."""
        # A subclass's step that calls its parent's has the hooks of both; the inner ones count.
        if self._void or not self.stepping:
            return
        self.stepping = False
        self.groups.restore()
        self._skipped = 0
        self.loop.after_step()

    def before_zero_grad(self) -> None:
        """Gradients are about to be cleared.

        While gradients are not finite ``GradScaler`` takes no step, so that no hook is called: for
        ever, once the parameters are not finite.
        """
        if self._void:
            self._void = False
        elif not self.stepping:  # a closure calls it, too
            self._skipped += 1
            if self._skipped > SKIPPED:
                self.loop.without_a_step()

    def _evaluation(self, closure: Callable[..., Any]) -> Callable[..., Any]:
        """A closure that makes the forward and the gradients of the step it is called in."""

        def evaluate(*args: Any, **kwargs: Any) -> Any:
            self.groups.restore()  # within the closure, too, the rates are the user's
            result = closure(*args, **kwargs)
            if isinstance(result, (float, torch.Tensor)):
                self.loop.loss = result.detach() if isinstance(result, torch.Tensor) else result
            self.loop.before_step()
            self._scale()
            return result

        return evaluate

    def _scale(self) -> None:
        if self.loop.scaled:
            scales, groups = self.loop.scales, self.optimizer.param_groups
            self.groups.apply(self.rates.factors(scales, groups))

    def _may_be_void(self) -> bool:
        """Whether the step could be torch's, to make a state: there is none, and rates are zero."""
        groups = self.optimizer.param_groups
        return not self.optimizer.state and all(float(group["lr"]) == 0 for group in groups)


def with_closures(
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    evaluation: Callable[[Callable[..., Any]], Callable[..., Any]],
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """The arguments of a step with each closure in them wrapped; None where there is none.

    Args:
        args: of the step, the optimizer first.
        kwargs: of the step.
        evaluation: makes the wrapper of a closure.
    """
    optimizer, *given = args
    if not any(map(callable, (*given, *kwargs.values()))):
        return None
    return (
        (optimizer, *(evaluation(a) if callable(a) else a for a in given)),
        {k: evaluation(v) if callable(v) else v for k, v in kwargs.items()},
    )


def called_from_dcp() -> bool:
    """Whether ``get_optimizer_state_dict`` of torch.distributed.checkpoint, or one of its kind, is
    at work.

    They take of a state dict what they know, ``state`` and ``param_groups``, by name, and drop the
    rest without a warning. And they take a step, at rates and gradients of zero, where an optimizer
    has no state yet. Only the callers tell.
    """
    frame = sys._getframe(1)
    for _ in range(_FRAMES):
        if frame.f_globals.get("__name__") == _TORCH:
            return True
        if frame.f_back is None:
            return False
        frame = frame.f_back
    return False


def _hook(hooks: weakref.ref[StepHooks], method: Callable[..., Any], *, warn: bool = False) -> Any:
    """An optimizer step hook that does not keep the controller alive, and is never compiled.

    Traced, what it does to the groups would be part of a graph, and would not be done again.
    """

    def hook(optimizer: Optimizer, args: Any, kwargs: Any) -> Any:
        alive = hooks()
        if alive is not None:
            return method(alive, args, kwargs)
        if warn:
            warnings.warn(
                f"the DensityLR of this {type(optimizer).__name__} is gone, as nothing refers to "
                "it, and its rates are left alone from here on: keep it in a variable, or end it "
                "by close()",
                UserWarning,
                stacklevel=2,
            )
        return None

    found: Any = torch.compiler.disable(hook)
    found.controller = hooks
    return found


def _is_left(hook: Any) -> bool:
    """Whether it is a hook of a controller that is gone."""
    controller = getattr(hook, "controller", None)
    return isinstance(controller, weakref.ref) and controller() is None
