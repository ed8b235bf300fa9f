"""DensityLR: an optimizer around the user's optimizer, with a learning-rate scale per stage."""

from __future__ import annotations

import logging
import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.optim import Optimizer

from densitylr.cadence import Cadence, check_every
from densitylr.checks import check_optimizer, check_stages, owners
from densitylr.diagnosis import diagnose
from densitylr.distributed import alike, find_ranks, stepping_optimizer
from densitylr.gradients import without_gradient
from densitylr.history import History
from densitylr.monitor import DensityMonitor
from densitylr.policy import LawState, LiftOff, Policy
from densitylr.pretrained import pretrained_stages
from densitylr.records import Decision, Diagnosis
from densitylr.recovery import Recovery
from densitylr.splitting import Scaling
from densitylr.stages import Stage, find_stages

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["DensityLR"]

_log = logging.getLogger("densitylr")
STATE_KEY = "densitylr"
"""In a state dict: ours."""

UNREAD = 10
"""Steps without a reading, when one is due, after which the user is told."""

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
        model: the model, before training; of a compiled model, make ``DensityLR`` before it is
            first called.
        mode: ``"repair"`` (default) raises the rate of stages that stay untrained, up to the
            largest rate of any group, and never acts where all rates are equal. ``"warmup"``
            starts at 1e-4 of the rates and finds, for each stage, the rate at which it comes
            alive, up to the same cap. ``"free"`` does so without a cap.
        stages: the user's own stages, as in `find_stages`.
        every: optimizer steps from one probe to the next: half of that (rounded down) during
            the first 20 steps; more, up to ten times as many, where nothing has been decided
            for long (a twentieth of that time). With ``recover`` it is never more.
        policy: another `Policy` than ``LiftOff(mode)``; ``mode`` is then only a name.
        pretrained: whether the weights are pretrained; all stages keep their rates then. None:
            decided by a test of the weights; one trained stage is enough. A stage of a far too
            large or small initial spread keeps its rate, too.
        observe_only: decide and record, but leave every rate alone.
        recover: when training collapses, go back to the last healthy state and go on with no
            larger rates than it had; see `densitylr.recovery.Recovery` for the rules and the
            memory. Without a collapse nothing changes. Gradients, the schedule and the
            entries of ``param_groups`` are not taken back.
        process_group: the ranks that train this model on different batches; default: DDP's, or
            all. Each of them makes a ``DensityLR``, after DDP or ``fully_shard``, and steps it.

    Attributes:
        inner: the user's optimizer.
        stages: `Stage` by name.
        history: every reading and decision, a `History`.

    Raises:
        TypeError: ``optimizer`` is not an ``Optimizer``, or ``model`` not a module.
        ValueError: no such mode; an optimizer that misses all of a stage's trainable
            parameters, or is wrapped already; an optimizer that wants one rate for the whole
            model; ranks that differ in settings, stages or weights; a model divided over
            processes by anything but DDP and ``fully_shard``; ``recover`` with
            ``observe_only`` or a sharded state; and as in `find_stages`. Nothing has been
            changed then.

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
        process_group: ProcessGroup | None = None,
    ) -> None:
        # Everything that can fail comes first: nothing is hooked before it has passed.
        law = LiftOff(mode)
        check_every(every)
        check_optimizer(optimizer, DensityLR)
        stepping = stepping_optimizer(optimizer)
        if recover and observe_only:
            raise ValueError(
                "recover=True goes back to a snapshot, observe_only=True leaves training alone: "
                "choose one"
            )
        self._ranks = find_ranks(model, process_group)
        if recover and self._ranks and (self._ranks.sharded or stepping is not optimizer):
            raise ValueError(
                "recover=True goes back to a snapshot of the whole state, of which each process "
                "holds a part only under fully_shard and ZeroRedundancyOptimizer"
            )
        self.stages: dict[str, Stage] = find_stages(model, stages)
        self.inner = optimizer
        self.mode = mode
        self.every = every
        self._cadence = Cadence(every, steady=recover)
        self.observe_only = observe_only
        self.policy: Policy = policy if policy is not None else law
        check_stages(optimizer, self.stages)
        self._owners = owners(optimizer, self.stages)
        self._steps = 0
        self._skipped = 0  # calls of zero_grad without a step
        self._unread = 0  # steps since a reading was asked for
        self._stepping = False
        self._pretrained, self._gains = pretrained_stages(model, self.stages, pretrained)
        if self._ranks is not None:
            self._ranks.meet(
                alike(
                    self.stages,
                    mode=mode,
                    every=every,
                    observe_only=observe_only,
                    recover=recover,
                    policy=type(self.policy).__name__,
                    pretrained=", ".join(self._pretrained) or "none",
                )
            )
        rates, ceiling = self._rates()
        free = [name for name in self.stages if name not in self._pretrained]
        self._law: LawState = self.policy.init(free)
        kept = [n for n in self._pretrained if n not in self._gains and 0 < rates[n] < ceiling]
        if kept and pretrained is None:
            warnings.warn(
                f"{', '.join(kept)}: not an untrained initialisation, so the rate is left alone "
                f"({self._pretrained[kept[0]]}); pass pretrained=False to have it repaired",
                UserWarning,
                stacklevel=2,
            )
        # Which twins are of use is known once the schedule has set the rates of a first step;
        # what is frozen may thaw.
        self._twins_due = True
        twins = {*free, *self._frozen()}
        self._monitor = DensityMonitor(model, stages, every=None, twins=twins, watching=recover)
        self._monitor.ranks = self._ranks
        self._recovery = Recovery(model, optimizer) if recover else None
        self._stepping_optimizer = stepping
        self._scaling = Scaling(stepping)
        me = weakref.ref(self)
        self._handles = [
            stepping.register_step_pre_hook(_hook(me, "_before_step")),
            stepping.register_step_post_hook(_hook(me, "_after_step")),
        ]
        self._before_zeroing = _hook(me, "_before_zero_grad")
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
        return diagnose(
            self.history,
            mode=self.mode,
            frozen=self._frozen(),
            gains=self._gains,
            observe_only=self.observe_only,
        )

    def _frozen(self) -> list[str]:
        return [
            name
            for name, stage in self.stages.items()
            if not any(p.requires_grad for p in stage.parameters.values())
        ]

    def close(self) -> None:
        """Take all hooks off the model and the optimizer: plain training from here on."""
        self._scaling.heal()
        self._monitor.close()
        for handle in self._handles:
            handle.remove()
        self._handles = []
        if self._recovery is not None:
            self._recovery.forget()
        if self._ranks is not None:
            self._ranks.close()
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
        return self._steps >= self._cadence.due

    def _go_back(self) -> None:
        target = self._recovery.go_back() if self._recovery is not None else None
        if target is not None:
            self._law = target.law.later(self._steps - target.step)
            self._monitor.forget_peaks()

    def _probe(self) -> None:
        reading = self._monitor.collect(self._steps)
        if reading is None:
            self._miss()
            return
        self._unread = 0
        reading = without_gradient(reading, self.stages, self._ranks)
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
        self._cadence.looked(reading.step, bool(decisions))
        self.history.record(reading, rates, self.scales, decisions)
        for decision in decisions:
            self._say(decision)
        if self._twins_due and ceiling > 0:
            self._twins_due = False
            self._let_idle_twins_go(rates, ceiling)
        for name, stage in self._law.stages.items():
            if stage.lifted and (self._recovery is None or self._recovery.healthy):
                self._monitor.let_twin_go(name)

    def _miss(self) -> None:
        """Tell the user, once, when nothing is read although it is due."""
        self._unread += self._monitor.armed and self._stepping
        if self._unread == UNREAD:
            warnings.warn(
                f"{UNREAD} steps were taken without a training forward of the model that DensityLR "
                "was given, so nothing is read and no rate is changed; is it a copy that is "
                "trained, is it in evaluation mode, or was it compiled and called before "
                "DensityLR was made (then call torch.compiler.reset() first)?",
                UserWarning,
                stacklevel=2,
            )

    def _let_idle_twins_go(self, rates: Mapping[str, float], ceiling: float) -> None:
        free = list(self._law.stages)
        room = [n for n in free if self.mode != "repair" or 0 < rates[n] < ceiling]
        # With no room anywhere one twin, of the layer that moves first, tells slow from still.
        for name in set(self.stages) - {*(room or free[-1:]), *self._frozen()}:
            self._monitor.let_twin_go(name)

    def _say(self, decision: Decision) -> None:
        if self._ranks is not None and self._ranks.rank:
            return  # once is enough
        first = sum(d.stage == decision.stage for d in self.history.decisions) == 1
        starved = self.mode == "repair" and first and decision.kind == "raise"
        _log.log(
            logging.WARNING if starved or decision.kind == "recover" else logging.INFO,
            "%s%s",
            "would have changed " if self.observe_only else "",
            decision,
        )

    def _factors(self, scales: Mapping[str, float]) -> list[list[float]]:
        owned = {
            id(p): owner
            for group, row in self._owned_groups()
            for p, owner in zip(group["params"], row, strict=True)
        }
        return [
            [scales.get(owned[id(p)] or "", 1.0) for p in group["params"]]
            for group in self._stepping_optimizer.param_groups
        ]

    def _owned_groups(self) -> list[tuple[dict[str, Any], list[str | None]]]:
        """The user's parameter groups, each with the stages of its parameters."""
        groups = self.inner.param_groups
        if [len(g["params"]) for g in groups] != [len(row) for row in self._owners]:
            self._owners = owners(self.inner, self.stages)  # a group was added
        return list(zip(groups, self._owners, strict=True))

    def _rates(self) -> tuple[dict[str, float], float]:
        """The user's rate of each stage (its largest), and the largest of all."""
        rates: dict[str, float] = {}
        for group, row in self._owned_groups():
            rate = float(group["lr"])
            members = zip(group["params"], row, strict=True)
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

    def register_step_pre_hook(self, hook: Any) -> Any:
        return self.inner.register_step_pre_hook(hook)

    def register_step_post_hook(self, hook: Any) -> Any:
        return self.inner.register_step_post_hook(hook)

    def state_dict(self) -> dict[str, Any]:
        """The inner optimizer's state dict with our own state, numbers and tensors, beside it.

        The bare optimizer loads it, too. With the weights of the twins that are alive in it, a
        run goes on from it as if it had never stopped; the readings in `history`, and the
        snapshots and peaks of ``recover``, are not part of it.
        """
        ours = {
            "steps": self._steps,
            "due": self._cadence.due,
            "decided": self._cadence.decided,
            "first": self._cadence.first,
            "twins_due": self._twins_due,
            "mode": self.mode,
            "law": self._law.to_dict(),
            "history": self.history.state_dict(),
            "taps": self._monitor.state_dict(),
            "gains": dict(self._gains),
        }
        if self._recovery is not None:
            ours["recovery"] = self._recovery.state_dict()
        # torch.distributed.checkpoint takes a tuple as one value, and does not ask for the same
        # keys at loading: a fresh DensityLR has other twins and decisions.
        return {**self.inner.state_dict(), STATE_KEY: (ours,)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dict of ours or of the bare optimizer.

        Raises:
            ValueError: it is of another mode or of other stages. Nothing has been changed then.
        """
        ours = state_dict.get(STATE_KEY)
        if isinstance(ours, tuple):  # it was a dictionary once
            (ours,) = ours
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
        self.inner.load_state_dict({k: v for k, v in state_dict.items() if k != STATE_KEY})
        if ours is not None:
            self._steps = ours["steps"]
            self._cadence.due = ours.get("due", self._steps)
            self._cadence.decided = ours.get("decided", self._steps)
            self._cadence.first = ours.get("first", 0)
            self._law = LawState.from_dict(ours["law"])
            self._twins_due = ours.get("twins_due", True)
            self._gains = ours.get("gains", self._gains)
            self.history.load_state_dict(ours["history"])
            if self._recovery is not None and "recovery" in ours:
                self._recovery.load_state_dict(ours["recovery"])
            self._monitor.load_state_dict(ours.get("taps", {}))
            waiting = [n for n, s in self._law.stages.items() if not s.lifted]
            for name in self._law.stages.keys() - waiting:
                self._monitor.let_twin_go(name)
            if waiting and "taps" not in ours:
                warnings.warn(
                    f"the state dict was saved without untrained twins: {', '.join(waiting)} will "
                    "be compared with the weights this DensityLR was made with",
                    UserWarning,
                    stacklevel=2,
                )
            self._monitor.armed = self._due() and not self._monitor.closed


def _hook(controller: weakref.ref[DensityLR], method: str) -> Any:
    """An optimizer step hook that does not keep the controller alive, and is never compiled.

    Traced, what it does to the groups would be part of a graph, and would not be done again.
    """

    def hook(optimizer: Optimizer, args: Any, kwargs: Any) -> Any:
        alive = controller()
        return None if alive is None else getattr(alive, method)(args, kwargs)

    return torch.compiler.disable(hook)
