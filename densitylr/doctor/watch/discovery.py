"""Find the models and optimizers of a running script, in time to see them untrained.

An optimizer is noticed when it is made. From then on a forward hook on all modules waits for the
first training forward of a module that holds its parameters; the smallest module that holds them
all is watched from that very call on. Once everything is found, the hook goes.
"""

from __future__ import annotations

import functools
import gc
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.optim import Optimizer
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)
from torch.utils.hooks import RemovableHandle

from densitylr.controller import DensityLR, with_closures
from densitylr.doctor.script import Call, call_in_script
from densitylr.doctor.watch.observer import ControllerObserver, Observer

__all__ = ["ModelDiscovery"]


class ModelDiscovery:
    """Watches every model that is trained between `attach` and `detach`.

    Args:
        mode: None to observer only; else the mode of a `DensityLR` that is made for each model.
        stepped: called after each optimizer step.

    Attributes:
        observers: one `Observer` a model, in the order of their first training forward.
        notes: sentences on what cannot be followed, and why.
        steps: optimizer steps seen, by the name of the optimizer's class.
        made: where each optimizer was made, by its ``id``.
    """

    def __init__(
        self, mode: str | None = None, stepped: Callable[[], object] = lambda: None
    ) -> None:
        self.mode, self.stepped = mode, stepped
        self.observers: list[Observer] = []
        self.notes: list[str] = []
        self.steps: dict[str, int] = {}
        self.made: dict[int, Call | None] = {}
        self._optimizers: list[weakref.ref[Optimizer]] = []
        self._stepped: weakref.WeakSet[Optimizer] = weakref.WeakSet()
        self._closed_in: weakref.WeakSet[Optimizer] = weakref.WeakSet()  # with a closure, once
        self._stepping: weakref.WeakSet[Optimizer] = weakref.WeakSet()
        self._wanted: set[int] = set()  # ids of parameters that are trained and not yet watched
        self._passed: set[int] = set()  # ids of modules that hold none of them
        self._stale = False  # an optimizer has been made since they were gathered
        self._handles: list[RemovableHandle] = []
        self._looking: RemovableHandle | None = None
        self._init = Optimizer.__init__

    def attach(self) -> None:
        """Begin; torch has been imported, and nothing has been trained yet."""
        made, original = self._made, self._init

        @functools.wraps(original)
        def init(self: Optimizer, *args: Any, **kwargs: Any) -> None:
            made(self)
            original(self, *args, **kwargs)

        Optimizer.__init__ = init  # type: ignore[method-assign]
        # The hook is gone before anything is compiled; the script is not to hear of it.
        warnings.filterwarnings("ignore", r"Using `torch\.compile\(module\)` when there are global")
        self._handles = [
            register_optimizer_step_pre_hook(self._before_step),
            register_optimizer_step_post_hook(self._after_step),
        ]

    def detach(self) -> None:
        """Take every hook off everything; the histories stay."""
        Optimizer.__init__ = self._init  # type: ignore[method-assign]
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._stop_looking()
        for observer in self.observers:
            observer.close()

    def _living(self) -> Iterator[Optimizer]:
        return (found for ref in self._optimizers if (found := ref()) is not None)

    def _made(self, optimizer: Optimizer) -> None:
        if any(known is optimizer for known in self._living()):
            return
        self._optimizers.append(weakref.ref(optimizer))
        self.made[id(optimizer)] = call_in_script()
        self._stale = True  # its parameters come only now
        if self._looking is None:
            self._looking = register_module_forward_pre_hook(self._before_forward)

    def _stop_looking(self) -> None:
        if self._looking is not None:
            self._looking.remove()
            self._looking = None

    # The first forward

    def _before_forward(self, module: nn.Module, args: Any) -> None:
        if torch.compiler.is_compiling() or not (module.training and torch.is_grad_enabled()):
            return
        if self._stale:
            self._gather()
        if id(module) in self._passed:
            return
        if not any(id(p) in self._wanted for p in module.parameters()):
            self._passed.add(id(module))
            return
        try:
            self._watch(module, call_in_script())
        except Exception as error:  # nothing in here may end the script
            self._ignore(module, f"{type(module).__name__}: {_sentence(error)}")

    def _gather(self) -> None:
        """Which parameters are trained and not yet watched."""
        self._stale = False
        self._passed.clear()
        watched = {
            id(p) for w in self.observers for s in w.stages.values() for p in s.parameters.values()
        }
        self._wanted = {id(p) for o in self._living() for p in _parameters(o)} - watched
        for observer in self.observers:
            for optimizer in self._living():
                stages = observer.stages.values()
                if _holds(optimizer, (p for s in stages for p in s.parameters.values())):
                    observer.follow(optimizer, self.made.get(id(optimizer)))
        if not self._wanted:
            self._stop_looking()

    def _watch(self, module: nn.Module, called: Call | None) -> None:
        optimizers = [o for o in self._living() if _holds(o, module.parameters())]
        model = _whole(module, {id(p) for o in optimizers for p in _parameters(o)})
        name = called.function if called is not None and model is module else ""
        self._begin(model, name or type(model).__name__, called, optimizers)
        self._forget_wanted(model)

    def _begin(
        self, model: nn.Module, name: str, called: Call | None, optimizers: list[Optimizer]
    ) -> None:
        names = [observer.name for observer in self.observers]
        if name in names:
            name = f"{name} ({sum(n == name or n.startswith(f'{name} (') for n in names) + 1})"
        own = [c for o in optimizers if (c := _controller(o)) is not None]
        observer: Observer | None = None
        if own:
            observer = ControllerObserver(own[0], model, name, called, own=True)
        elif self.mode is not None:
            observer = self._act(self.mode, model, name, called, optimizers)
        observer = observer or Observer(model, name, called)
        for optimizer in optimizers:
            observer.follow(optimizer, self.made.get(id(optimizer)))
        self.observers.append(observer)

    def _act(
        self,
        mode: str,
        model: nn.Module,
        name: str,
        called: Call | None,
        optimizers: list[Optimizer],
    ) -> Observer | None:
        """A controller, or None and a note where there can be none."""
        try:
            if len(optimizers) != 1:
                raise ValueError(f"{len(optimizers)} optimizers train it, and DensityLR takes one")
            return ControllerObserver(
                DensityLR(optimizers[0], model, mode=mode), model, name, called, own=False
            )
        except ValueError as error:
            self.notes.append(f"{name}: only watched, not run: {error}")
            return None

    def _ignore(self, module: nn.Module, why: str) -> None:
        self.notes.append(f"not watched: {why}")
        self._forget_wanted(module)

    def _forget_wanted(self, model: nn.Module) -> None:
        self._wanted.difference_update(id(p) for p in model.parameters())
        if not self._wanted:
            self._stop_looking()

    # The steps

    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> Any:
        def evaluation(closure: Callable[..., Any]) -> Callable[..., Any]:
            def evaluate(*args: Any, **kwargs: Any) -> Any:
                result = closure(*args, **kwargs)
                self._read(optimizer)
                return result

            return evaluate

        given = with_closures((optimizer, *args[1:]), kwargs, evaluation)
        if optimizer not in self._stepped and not (given and self._expected(optimizer)):
            self._stepped.add(optimizer)
            self._first_step(optimizer)
        self._stepping.add(optimizer)
        if given is None:
            self._read(optimizer)
        return given

    def _read(self, optimizer: Optimizer) -> None:
        """The gradients of a step are there."""
        for observer in self.observers:
            if any(o is optimizer for o in observer.optimizers):
                observer.before_step(optimizer)

    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        # A subclass's step that calls its parent's has the hooks of both; the inner ones count.
        if optimizer not in self._stepping:
            return
        self._stepping.discard(optimizer)
        kind = type(optimizer).__name__
        self.steps[kind] = self.steps.get(kind, 0) + 1
        for observer in self.observers:
            if any(o is optimizer for o in observer.optimizers):
                observer.after_step(optimizer)
        self.stepped()

    def _expected(self, optimizer: Optimizer) -> bool:
        """Whether its first forward may still come, from a closure within its first step."""
        first = optimizer not in self._closed_in
        self._closed_in.add(optimizer)
        return first and any(known is optimizer for known in self._living())

    def _first_step(self, optimizer: Optimizer) -> None:
        """Follow optimizers made without ``__init__``, and find models that were not called."""
        try:
            self._made(optimizer)
            if self._stale:
                self._gather()
            if any(o is optimizer for w in self.observers for o in w.optimizers):
                return
            ids = {id(p) for p in _parameters(optimizer)}
            holders = [m for m in _modules() if any(id(p) in ids for p in m.parameters())]
            if not holders:
                self.notes.append(
                    f"the parameters of {type(optimizer).__name__} are in no module, so that "
                    "there is no density to observer"
                )
                self._wanted -= ids
                return
            held = {id(m): sum(id(p) in ids for p in m.parameters()) for m in holders}
            model = max(holders, key=lambda m: (held[id(m)], -sum(1 for _ in m.modules())))
            name = type(model).__name__
            self._begin(model, name, None, [optimizer])
            self._forget_wanted(model)
            self.notes.append(
                f"{name}: no training forward was seen before the first step, so it was watched "
                "only from there on"
            )
        except Exception as error:  # nothing in here may end the script
            self.notes.append(f"not watched: {type(optimizer).__name__}: {_sentence(error)}")


def _parameters(optimizer: Optimizer) -> Iterator[torch.Tensor]:
    return (p for group in getattr(optimizer, "param_groups", ()) for p in group["params"])


def _holds(optimizer: Optimizer, parameters: Iterable[torch.Tensor]) -> bool:
    ids = {id(p) for p in _parameters(optimizer)}
    return any(id(p) in ids for p in parameters)


def _controller(optimizer: Optimizer) -> DensityLR | None:
    found = vars(optimizer).get("_densitylr")
    return None if found is None else found()


def _modules() -> list[nn.Module]:
    """All modules there are."""
    return [o for o in gc.get_objects() if issubclass(type(o), nn.Module)]


def _whole(module: nn.Module, wanted: set[int]) -> nn.Module:
    """The smallest module, of this one and those around it, with the most wanted parameters.

    A model may be called piece by piece: its layers belong together all the same.
    """
    around: dict[int, list[nn.Module]] = {}
    for outer in _modules():
        for inner in outer.__dict__.get("_modules", {}).values():
            around.setdefault(id(inner), []).append(outer)
    best, most = module, sum(id(p) in wanted for p in module.parameters())
    seen, waiting = {id(module)}, [module]
    for inner in waiting:
        for outer in around.get(id(inner), ()):
            if id(outer) in seen:
                continue
            seen.add(id(outer))
            waiting.append(outer)
            held = sum(id(p) in wanted for p in outer.parameters())
            if held > most:
                best, most = outer, held
    return best


def _sentence(error: Exception) -> str:
    return str(error) or type(error).__name__
