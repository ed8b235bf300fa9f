"""DensityLR: an optimizer around the user's optimizer, with a learning-rate scale per stage."""

from __future__ import annotations

import logging
import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn
from torch.optim import Optimizer

from densitylr.checks import check_optimizer, check_processes, owners
from densitylr.diagnosis import diagnose
from densitylr.gradients import without_gradient
from densitylr.history import History
from densitylr.monitor import DensityMonitor, check_every
from densitylr.policy import LawState, LiftOff, Policy
from densitylr.pretrained import pretrained_stages
from densitylr.records import Decision, Diagnosis
from densitylr.recovery import Recovery
from densitylr.splitting import Scaling
from densitylr.stages import Stage, find_stages

__all__ = ["DensityLR"]

_log = logging.getLogger("densitylr")
STATE_KEY, TWINS_KEY = "densitylr", "densitylr_twins"
"""In a state dict: our numbers, and the tensors of what the taps are compared with."""

EARLY = 20
"""Steps with probes twice as often: what a starved stage loses here it does not get back."""

SKIPPED = 3
"""Steps skipped in a row after which ``recover`` looks for a collapse without a step."""


class DensityLR(Optimizer):
    """Let the activation density of each stage of a model run its learning rate.

    It is used in place of ``optimizer``: in the training loop, by schedulers, by ``GradScaler``,
    in checkpoints. ``param_groups``, ``state`` and ``defaults`` are those of ``optimizer``,
    live, and hold the user's own rates at all times; a stage's scale is on them only while
    a step runs. Stepping ``optimizer`` itself does the same, as long as the ``DensityLR`` is
    referred to.

    Args:
        optimizer: the user's optimizer, built on parameters of ``model``.
        model: the model, before training; make ``DensityLR`` before ``torch.compile(model)``.
        mode: ``"repair"`` (default) raises the rate of stages that stay untrained, up to the
            largest rate of any group, and never acts where all rates are equal. ``"warmup"``
            starts at 1e-4 of the rates and finds, for each stage, the rate at which it comes
            alive, up to the same cap. ``"free"`` does so without a cap.
        stages: the user's own stages, as in `find_stages`.
        every: optimizer steps from one probe to the next; half of that (rounded down) during
            the first 20 steps.
        policy: another `Policy` than ``LiftOff(mode)``; ``mode`` is then only a name.
        pretrained: whether the weights are pretrained; all stages keep their rates then. None:
            decided by a test of the weights; one trained stage is enough. A stage of a far too
            large or small initial spread keeps its rate, too.
        observe_only: decide and record, but leave every rate alone.
        recover: when training collapses, go back to the last healthy state and go on with no
            larger rates than it had; see `densitylr.recovery.Recovery` for the rules and the
            memory. Without a collapse nothing changes. Gradients, the schedule and the
            entries of ``param_groups`` are not taken back.

    Attributes:
        inner: the user's optimizer.
        stages: `Stage` by name.
        history: every reading and decision, a `History`.

    Raises:
        TypeError: ``optimizer`` is not an ``Optimizer``, or ``model`` not a module.
        ValueError: no such mode; an optimizer that misses all of a stage's trainable
            parameters, or is wrapped already; an optimizer that wants one rate for the whole
            model; training in several processes, unless ``observe_only``; ``recover`` with
            ``observe_only``; and as in `find_stages`. Nothing has been changed then.

    Example::

        opt = DensityLR(torch.optim.SGD(groups, lr=1e-2, momentum=0.9), model)
        for x, y in loader:
            loss_fn(model(x), y).backward()
            opt.step()
            opt.zero_grad()
        print(*opt.diagnose(), sep="\\n")
    """

    def __init__(
        self,
        optimizer: Optimizer,
        model: nn.Module,
        *,
        mode: str = "repair",
        stages: Mapping[str, str | Sequence[str]] | None = None,
        every: int = 5,
        policy: Policy | None = None,
        pretrained: bool | None = None,
        observe_only: bool = False,
        recover: bool = False,
    ) -> None:
        # Everything that can fail comes first: nothing is hooked before it has passed.
        law = LiftOff(mode)
        check_every(every)
        check_optimizer(optimizer, DensityLR)
        check_processes(observe_only)
        if recover and observe_only:
            raise ValueError(
                "recover=True goes back to a snapshot, observe_only=True leaves training alone: "
                "choose one"
            )
        self.stages: dict[str, Stage] = find_stages(model, stages)
        self.inner = optimizer
        self.mode = mode
        self.every = every
        self.observe_only = observe_only
        self.policy: Policy = policy if policy is not None else law
        self._owners = owners(optimizer, self.stages)
        self._steps = 0
        self._skipped = 0  # calls of zero_grad without a step
        self._stepping = False
        self._pretrained, self._gains = pretrained_stages(model, self.stages, pretrained)
        rates, ceiling = self._rates()
        free = [name for name in self.stages if name not in self._pretrained]
        self._law: LawState = self.policy.init(free)
        room = [n for n in free if mode != "repair" or 0 < rates[n] < ceiling]
        kept = [n for n in self._pretrained if n not in self._gains and 0 < rates[n] < ceiling]
        if kept and pretrained is None:
            warnings.warn(
                f"{', '.join(kept)}: not an untrained initialisation, so the rate is left alone "
                f"({self._pretrained[kept[0]]}); pass pretrained=False to have it repaired",
                UserWarning,
                stacklevel=2,
            )
        # With no room anywhere one twin, of the layer that moves first, tells slow from still.
        twins = room or free[-1:]
        self._monitor = DensityMonitor(model, stages, every=None, twins=twins, watching=recover)
        self._recovery = Recovery(model, optimizer) if recover else None
        self._scaling = Scaling(optimizer)
        me = weakref.ref(self)
        self._handles = [
            optimizer.register_step_pre_hook(_StepHook(me, "_before_step")),
            optimizer.register_step_post_hook(_StepHook(me, "_after_step")),
        ]
        self._before_zeroing = _StepHook(me, "_before_zero_grad")
        optimizer._densitylr = me  # type: ignore[attr-defined]
        self._monitor.arm()

    # What is shown

    @property
    def scales(self) -> dict[str, float]:
        """The factor now in force on the user's learning rate of each stage."""
        chosen = {} if self.observe_only or not self._handles else self._law.scales
        scales = {name: chosen.get(name, 1.0) for name in self.stages}
        if self._recovery is None or not self._recovery.cap or not self._handles:
            return scales
        rates, _ = self._rates()
        return {n: s * self._recovery.factor(n, rates[n] * s) for n, s in scales.items()}

    @property
    def history(self) -> History:
        return self._monitor.history

    def diagnose(self) -> list[Diagnosis]:
        """What is, or was, wrong with which stage; an empty list where nothing is.

        ``str()`` of a `Diagnosis` is one sentence.
        """
        frozen = [
            name
            for name, stage in self.stages.items()
            if not any(p.requires_grad for p in stage.parameters.values())
        ]
        return diagnose(
            self.history,
            mode=self.mode,
            frozen=frozen,
            gains=self._gains,
            observe_only=self.observe_only,
        )

    def close(self) -> None:
        """Take all hooks off the model and the optimizer: plain training from here on."""
        self._scaling.heal()
        self._monitor.close()
        for handle in self._handles:
            handle.remove()
        self._handles = []
        if self._recovery is not None:
            self._recovery.forget()
        self.inner.__dict__.pop("_densitylr", None)

    def __repr__(self) -> str:
        scaled = ", ".join(f"{n} ×{s:.4g}" for n, s in self.scales.items() if s != 1)
        return f"DensityLR(mode={self.mode!r}, {scaled or 'nothing scaled'})\n{self.inner!r}"

    # The step

    def step(self, closure: Callable[[], float] | None = None) -> Any:  # type: ignore[override]
        """One step of the user's optimizer, each stage at its own scale."""
        try:
            return self.inner.step() if closure is None else self.inner.step(closure)
        finally:
            self._stepping = False
            self._scaling.heal()

    def _before_step(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self._stepping = True
        self._scaling.heal()
        inner, *given = args
        if not any(map(callable, (*given, *kwargs.values()))):
            self._probe()
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
            self._probe()
            self._scale()
            return result

        return evaluate

    def _scale(self) -> None:
        if not self.observe_only:
            scales = self.scales
            if any(s != 1.0 for s in scales.values()):
                self._scaling.apply(self._factors(scales))

    def _after_step(self, *_: Any) -> None:
        self._stepping = False
        self._scaling.restore()
        self._steps += 1
        self._skipped = 0
        if self._recovery is not None:
            self._recovery.stepped()
        self._go_back()
        if self._due() and not self._monitor.closed:
            self._monitor.arm()

    def _due(self) -> bool:
        early = self._steps < EARLY and self._steps % max(1, self.every // 2) == 0
        return early or self._steps % self.every == 0

    def _go_back(self) -> None:
        target = self._recovery.go_back() if self._recovery is not None else None
        if target is not None:
            self._law = target.law.later(self._steps - target.step)
            self._monitor.forget_peaks()

    def _probe(self) -> None:
        reading = self._monitor.collect(self._steps)
        if reading is None:
            return
        reading = without_gradient(reading, self.stages)
        rates, ceiling = self._rates()
        found = self._recovery.look(reading) if self._recovery is not None else None
        decisions: list[Decision] = []
        if found is None:
            if not self._stepping:
                return  # only a collapse is of interest while nothing is trained
            self._law, decisions = self.policy.decide(self._law, reading, rates, ceiling)
        if self._recovery is not None:
            event = self._recovery.see(reading.step, found, rates, self.scales, self._law)
            decisions = [*decisions, event] if event is not None else decisions
        self.history.record(reading, rates, self.scales, decisions)
        for decision in decisions:
            self._say(decision)
        for name, stage in self._law.stages.items():
            if stage.lifted and (self._recovery is None or self._recovery.healthy):
                self._monitor.let_twin_go(name)

    def _say(self, decision: Decision) -> None:
        first = sum(d.stage == decision.stage for d in self.history.decisions) == 1
        starved = self.mode == "repair" and first and decision.kind == "raise"
        _log.log(
            logging.WARNING if starved or decision.kind == "recover" else logging.INFO,
            "%s%s",
            "would have changed " if self.observe_only else "",
            decision,
        )

    def _factors(self, scales: Mapping[str, float]) -> list[list[float]]:
        if [len(g["params"]) for g in self.inner.param_groups] != [len(r) for r in self._owners]:
            self._owners = owners(self.inner, self.stages)
        return [[scales.get(owner or "", 1.0) for owner in row] for row in self._owners]

    def _rates(self) -> tuple[dict[str, float], float]:
        """The user's rate of each stage (its largest), and the largest of all."""
        rates: dict[str, float] = {}
        for group, row in zip(self.inner.param_groups, self._owners, strict=False):
            rate = float(group["lr"])
            members = zip(group["params"], row, strict=False)
            for owner in {o for p, o in members if o in self.stages and p.requires_grad}:
                rates[owner] = max(rate, rates.get(owner, 0.0))
        return {n: rates.get(n, 0.0) for n in self.stages}, max(rates.values(), default=0.0)

    # An optimizer like any other

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

    def zero_grad(self, set_to_none: bool = True) -> None:
        # Lightning calls this with a proxy of its own as self: nothing may be set on that.
        self._before_zeroing(self.inner, (), {})
        self.inner.zero_grad(set_to_none)

    def _before_zero_grad(self, *_: Any) -> None:
        # While gradients are not finite GradScaler takes no step, so that no hook is called: for
        # ever, once the parameters are not finite.
        if not self._stepping:  # a closure calls it, too
            self._skipped += 1
            if self._recovery and self._skipped > SKIPPED and not self._monitor.closed:
                self._probe()
                self._go_back()
                self._monitor.arm()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        self.inner.add_param_group(param_group)
        self._owners = owners(self.inner, self.stages)

    def register_step_pre_hook(self, hook: Any) -> Any:
        return self.inner.register_step_pre_hook(hook)

    def register_step_post_hook(self, hook: Any) -> Any:
        return self.inner.register_step_post_hook(hook)

    def state_dict(self) -> dict[str, Any]:
        """The inner optimizer's state dict with our own state, plain numbers, beside it.

        The bare optimizer loads it, too. Beside the numbers there are the tensors of the twins
        that are still there, so that a resumed run goes on as if it had never stopped.
        """
        state = self.inner.state_dict()
        state[STATE_KEY] = {
            "steps": self._steps,
            "mode": self.mode,
            "law": self._law.to_dict(),
            "history": self.history.state_dict(),
            "gains": dict(self._gains),
        }
        state[TWINS_KEY] = self._monitor.state_dict()
        if self._recovery is not None:
            state[STATE_KEY]["recovery"] = self._recovery.state_dict()
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dict of ours or of the bare optimizer.

        Raises:
            ValueError: it is of another mode or of other stages. Nothing has been changed then.
        """
        ours = state_dict.get(STATE_KEY)
        if ours is None:
            warnings.warn(
                "the state dict has no DensityLR state (it is a bare optimizer's): the scales "
                "start anew",
                UserWarning,
                stacklevel=2,
            )
        else:
            if ours["mode"] != self.mode:
                raise ValueError(
                    f"the state dict is of mode {ours['mode']!r}, this DensityLR of {self.mode!r}"
                )
            unknown = set(ours["law"]) - set(self.stages)
            if unknown:
                raise ValueError(
                    f"the state dict has stages {sorted(unknown)}, this model {list(self.stages)}"
                )
        self._scaling.heal()
        if self._recovery is not None:
            self._recovery.forget()
        own = (STATE_KEY, TWINS_KEY)
        self.inner.load_state_dict({k: v for k, v in state_dict.items() if k not in own})
        if ours is not None:
            self._steps = ours["steps"]
            self._law = LawState.from_dict(ours["law"])
            self._gains = ours.get("gains", self._gains)
            self._monitor.load_state_dict(state_dict.get(TWINS_KEY, {}))
            self.history.load_state_dict(ours["history"])
            if self._recovery is not None and "recovery" in ours:
                self._recovery.load_state_dict(ours["recovery"])
            for name, stage in self._law.stages.items():
                if stage.lifted:
                    self._monitor.let_twin_go(name)
            self._monitor.armed = self._due() and not self._monitor.closed


class _StepHook:
    """An optimizer step hook that does not keep the controller alive."""

    def __init__(self, controller: weakref.ref[DensityLR], method: str) -> None:
        self.controller, self.method = controller, method

    def __call__(self, optimizer: Optimizer, args: Any, kwargs: Any) -> Any:
        controller = self.controller()
        return None if controller is None else getattr(controller, self.method)(args, kwargs)
