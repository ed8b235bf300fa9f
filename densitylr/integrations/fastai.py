"""fastai: ``Learner(dls, model, cbs=DensityCallback())``.

fastai's optimizers are no ``torch.optim.Optimizer``: they hold lists of parameters and, beside
them, a dictionary of hyper-parameters each. `DensityOptimizer` is such an optimizer, around the
learner's own, and for the duration of a step gives it finer lists with the rates of each stage.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
from fastai.callback.core import Callback
from fastai.callback.schedule import LRFinder
from fastai.learner import ValueMetric
from fastai.optimizer import Lookahead, Optimizer, OptimWrapper
from fastcore.basics import GetAttr
from fastcore.foundation import L

from densitylr.controller import DensityLR
from densitylr.history import check_series
from densitylr.model import find_stages

__all__ = ["DensityCallback", "DensityOptimizer"]


class _Groups(torch.optim.Optimizer):
    """A fastai optimizer with what `DensityLR` needs: groups that can be split, and step hooks.

    ``param_groups`` are copies, made anew before each step: fastai's hyper-parameters are never
    written to.
    """

    def __init__(self, opt: Optimizer) -> None:
        self.opt = opt
        super().__init__(opt.param_groups, {})
        self.refresh()

    def refresh(self) -> None:
        """Take over the rates, parameters and state that fastai holds now."""
        self.param_groups = self.opt.param_groups
        self.state = self.opt.state

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        lists, hypers = self.opt.param_lists, self.opt.hypers
        self.opt.param_lists = L(group["params"] for group in self.param_groups)
        self.opt.hypers = L(
            {key: value for key, value in group.items() if key != "params"}
            for group in self.param_groups
        )
        try:
            self.opt.step(closure)
        finally:
            self.opt.param_lists, self.opt.hypers = lists, hypers

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.opt.zero_grad()

    def state_dict(self) -> dict[str, Any]:
        return self.opt.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.opt.load_state_dict(state_dict)
        self.refresh()


class DensityOptimizer(Optimizer, GetAttr):
    """A fastai optimizer whose steps are those of another one, with a scale per stage.

    Parameters, hyper-parameters and state are those of ``opt``, live; the hyper-parameters are at
    all times what the learner's schedule has set.

    Args:
        opt: a fastai optimizer, not a ``Lookahead`` or ``OptimWrapper``, which are wrapped from
            within: see `DensityCallback`.
        model: the model, before training.
        **options: as for `DensityLR`.

    Attributes:
        density: the `DensityLR`.
        paused: take the steps of ``opt`` as they are, unwatched.
    """

    _default = "opt"

    def __init__(self, opt: Optimizer, model: torch.nn.Module, **options: Any) -> None:
        self.opt = opt
        self.paused = False
        self._groups = _Groups(opt)
        self.density = DensityLR(self._groups, model, **options)

    @property
    def param_lists(self) -> Any:
        return self.opt.param_lists

    @param_lists.setter
    def param_lists(self, lists: Any) -> None:
        self.opt.param_lists = lists

    def step(self, closure: Any = None) -> None:
        if closure is not None:
            raise NotImplementedError("fastai's optimizers take no closure")
        if self.paused:
            self.opt.step()
        else:
            self._groups.refresh()
            self.density.step()

    def zero_grad(self) -> None:
        self.density.zero_grad()

    def clear_state(self) -> None:
        self.opt.clear_state()

    def state_dict(self) -> dict[str, Any]:
        return self.density.state_dict()

    def load_state_dict(self, sd: dict[str, Any]) -> None:
        # While paused it is the learning-rate finder, which puts things back as they were.
        (self.opt if self.paused else self.density).load_state_dict(sd)


class DensityCallback(Callback):
    """Let the activation density of a learner's model run its learning rates.

    Given to ``Learner(…, cbs=DensityCallback())`` it puts a `DensityLR` around the optimizer
    whenever the learner makes one, whichever ``opt_func`` that is: fastai's own, a
    ``Lookahead`` (``ranger``), or an ``OptimWrapper`` around a torch optimizer. ``slice`` rates,
    ``freeze``, ``unfreeze`` and every ``fit…`` method work as ever, and ``learn.opt.hypers`` is
    what the schedule says. ``learn.save`` and ``learn.load`` carry the scales with the optimizer's
    state. ``learn.lr_find`` runs without us.

    A callback that is added later (``learn.fit(…, cbs=DensityCallback())``) begins with that
    fit, adds no columns to the learner's table, and what ``learn.load`` had read before is lost
    on it. ``to_non_native_fp16``, which trains copies of the parameters, is not supported.

    Args:
        columns: what is shown of each stage after each epoch, in columns of the learner's table,
            and so in whatever reads that table (``CSVLogger``, ``WandbCallback``, …): numbers of
            `History.series`, such as ``"scale"``, ``"rate"`` and ``"near_zero"``.
        **options: as for `DensityLR`.

    Attributes:
        controller: the `DensityLR`, once there is an optimizer.

    Raises:
        ValueError: no such column; and, when there is an optimizer, as `DensityLR`.

    Example::

        learn = Learner(dls, model, loss_func=nn.CrossEntropyLoss(), cbs=DensityCallback())
        learn.fit_one_cycle(1, slice(1e-5, 1e-2))
        print(*learn.density.controller.diagnose(), sep="\\n")
    """

    order = LRFinder.order + 10  # after it: it saves and loads while we are paused
    run_valid = False
    controller: DensityLR | None = None
    _stateattrs = ("controller",)  # tied to its model by hooks: no part of an exported learner

    def __init__(self, columns: Sequence[str] = ("scale",), **options: Any) -> None:
        super().__init__()
        check_series(columns)
        self.columns, self.options = tuple(columns), options

    def after_create(self) -> None:
        made = self.learn.opt_func
        if isinstance(made, OptimWrapper):  # an optimizer, not a way to make one
            self._wrap(made)
        else:
            # create_opt reads the keywords of a partial for its rate.
            given = getattr(made, "keywords", {})
            self.learn.opt_func = functools.partial(self._create, made, **given)
        self.learn.metrics += [
            ValueMetric(functools.partial(self._last, stage, column), f"{stage} {column}")
            for column in self.columns
            for stage in find_stages(self.learn.model, self.options.get("stages"))
        ]

    def before_fit(self) -> None:
        self.learn.opt = self._wrap(self.learn.opt)
        self._pause(any(isinstance(cb, LRFinder) for cb in self.learn.cbs))

    def after_fit(self) -> None:
        self._pause(False)

    def _create(self, opt_func: Any, params: Any, **hypers: Any) -> Any:
        return self._wrap(opt_func(params, **hypers))

    def _wrap(self, opt: Any) -> Any:
        """The optimizer to be used in place of ``opt``; the same if it is wrapped already."""
        if isinstance(opt, Lookahead):
            opt.opt = self._wrap(opt.opt)
        elif isinstance(opt, OptimWrapper):
            if not isinstance(opt.opt, DensityLR):
                self._close()
                opt.opt = DensityLR(opt.opt, self.learn.model, **self.options)
            self.controller = opt.opt
        elif isinstance(opt, Optimizer):
            if not isinstance(opt, DensityOptimizer):
                self._close()
                opt = DensityOptimizer(opt, self.learn.model, **self.options)
            self.controller = opt.density
        else:
            raise TypeError(
                "opt_func must make a fastai Optimizer, a Lookahead or an OptimWrapper; this one "
                f"made a {type(opt).__name__}: for a torch optimizer, pass "
                "opt_func=partial(OptimWrapper, opt=…)"
            )
        return opt

    def _close(self) -> None:
        if self.controller is not None:
            self.controller.close()

    def _pause(self, paused: bool) -> None:
        opt = self.learn.opt.opt if isinstance(self.learn.opt, Lookahead) else self.learn.opt
        if isinstance(opt, DensityOptimizer):
            opt.paused = paused
        elif self.controller is not None:
            self.controller.observe_only = paused or self.options.get("observe_only", False)

    def _last(self, stage: str, name: str) -> float:
        history = self.controller.history if self.controller is not None else None
        return float(history.series(stage, name)[-1]) if history else math.nan
