"""DensityLR: an optimizer around the user's optimizer, with a learning-rate scale per stage.

Here it is put together, shown and saved. `Facade` makes it an optimizer like any other, `Stepping`
has the hooks on each step, `Decider` makes scales of readings.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.optim import Optimizer

from densitylr.cadence import Cadence, check_every
from densitylr.checkpoint import joined, parted
from densitylr.checks import check_optimizer, check_recover, check_stages
from densitylr.deciding import Decider
from densitylr.diagnosis import diagnose
from densitylr.distributed import alike, find_ranks, is_sharded, stepping_optimizer
from densitylr.history import History
from densitylr.liftoff import LiftOff
from densitylr.monitor import DensityMonitor
from densitylr.policy import LawState, Policy
from densitylr.pretrained import pretrained_stages
from densitylr.pull import Pull
from densitylr.rates import StageRates, startup
from densitylr.records import Diagnosis
from densitylr.recovery import Recovery
from densitylr.stages import Stage, find_stages, untrainable
from densitylr.stepping import Stepping

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["DensityLR"]


class DensityLR(Stepping):
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
            largest rate of any group, or less where that shows itself to be too high, and never
            acts where all rates are equal. ``"warmup"`` starts at 1e-4 of the rates and finds,
            for each stage, the rate at which it comes alive, up to the largest rate of any group.
            ``"free"`` does so without a cap, and goes on raising all rates together while
            gradients pull the weights away from where they began, for up to 100 steps; it wants a
            schedule that decays after that. At a raise of ``"repair"`` the momentum buffers of the
            stage (SGD's and RMSprop's) are divided by its factor, so that it acts on the gradients
            to come.
        stages: the user's own stages, as in `find_stages`.
        every: optimizer steps from one probe to the next: half of that (rounded down) during
            the first 20 steps; after a long time without a decision a twentieth of that time, at
            most ``10 * every``, but not with ``recover``.
        policy: another `Policy` than ``LiftOff(mode)`` with the optimizer's momentum. A ``LiftOff``
            brings its own mode; for others ``mode`` is only a name, but under ``"repair"`` momentum
            is corrected at raises. A policy with ``follows = True`` is given the pull of gradients
            of the stages that it follows.
        pretrained: whether the weights are pretrained; all stages keep their rates then. None:
            decided by a test of the weights; one trained stage is enough, and the first step
            warns of it, unless a state dict of ours has been loaded by then, which knows better.
            A stage of a far too large or small initial spread keeps its rate, too.
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
        law = LiftOff(mode)  # an unknown mode is told first
        check_every(every)
        check_optimizer(optimizer, DensityLR)
        stepping = stepping_optimizer(optimizer)
        self._ranks = find_ranks(model, process_group)
        if recover:
            check_recover(observe_only, self._ranks, divided=stepping is not optimizer)
        self.stages: dict[str, Stage] = find_stages(model, stages)
        check_stages(optimizer, self.stages)
        self.inner = optimizer
        self.mode = mode = policy.mode if isinstance(policy, LiftOff) else mode
        self.every = every
        if policy is None:
            policy = replace(law, **startup(stepping))
        self.policy: Policy = policy
        self._pretrained, self._gains = pretrained_stages(model, self.stages, pretrained)
        free = [name for name in self.stages if name not in self._pretrained]
        state = self.policy.init(free)
        if self._ranks is not None:
            self._ranks.meet(
                alike(
                    self.stages,
                    mode=mode,
                    every=every,
                    observe_only=observe_only,
                    recover=recover,
                    policy=str(policy) if isinstance(policy, LiftOff) else type(policy).__name__,
                    pretrained=", ".join(self._pretrained) or "none",
                )
            )
        rates = StageRates(optimizer, self.stages)
        kept = self._kept_back(*rates.now()) if pretrained is None else ""
        twins = {*free, *untrainable(self.stages)}  # what is frozen may thaw
        monitor = DensityMonitor(
            model, stages, every=None, twins=twins, watching=recover, guard=True
        )
        monitor.ranks = self._ranks
        self._cadence = Cadence(every, steady=recover)
        sharded = any(is_sharded(p) for s in self.stages.values() for p in s.parameters.values())
        pull = None
        if getattr(policy, "follows", False) and not sharded:
            upwards = (g["params"] for g in optimizer.param_groups if g.get("maximize"))
            ascending = {id(p) for group in upwards for p in group}
            pull = Pull(self.stages, free, self._ranks, ascending)
        self._recovery = Recovery(model, optimizer) if recover else None
        decider = Decider(
            monitor,
            rates,
            self.policy,
            state,
            mode=mode,
            cadence=self._cadence,
            stepped=stepping,
            recovery=self._recovery,
            observe_only=observe_only,
            pull=pull,
        )
        self._attach(stepping, decider, kept)
        optimizer._densitylr = weakref.ref(self)  # type: ignore[attr-defined]
        monitor.arm(variety=True)

    # What is shown

    @property
    def scales(self) -> dict[str, float]:
        """The factor now in force on the user's learning rate of each stage."""
        return self._decider.scales

    @property
    def history(self) -> History:
        return self._decider.history

    @property
    def observe_only(self) -> bool:
        """Whether it decides and records, but leaves every rate alone; may be set."""
        return self._decider.observe_only

    @observe_only.setter
    def observe_only(self, value: bool) -> None:
        self._decider.observe(value)

    def diagnose(self) -> list[Diagnosis]:
        """What is, or was, wrong with which stage; an empty list where nothing is.

        ``str()`` of a `Diagnosis` is one sentence.
        """
        return diagnose(
            self.history,
            mode=self.mode,
            frozen=untrainable(self.stages),
            kept=self._kept,
            gains=self._gains,
            observe_only=self.observe_only,
        )

    def close(self) -> None:
        """Take all hooks off the model and the optimizer: plain training from here on."""
        self._detach()
        self._monitor.close()
        if self._decider.pull is not None:
            self._decider.pull.let_go()
        if self._recovery is not None:
            self._recovery.forget()
        if self._ranks is not None:
            self._ranks.close()
        self.inner.__dict__.pop("_densitylr", None)

    def __repr__(self) -> str:
        scaled = ", ".join(f"{n} ×{s:.4g}" for n, s in self.scales.items() if s != 1)
        state = "closed" if self._monitor.closed else scaled or "nothing scaled"
        return f"DensityLR(mode={self.mode!r}, {state})\n{self.inner!r}"

    @property
    def _monitor(self) -> DensityMonitor:
        return self._decider.monitor

    @property
    def _law(self) -> LawState:
        return self._decider.law

    @property
    def _kept(self) -> dict[str, str]:
        """The stages that the policy leaves alone as trained before, with the reason."""
        free = {*self._law.stages, *self._gains}
        return {name: why for name, why in self._pretrained.items() if name not in free}

    def _kept_back(self, rates: Mapping[str, float], ceiling: float) -> str:
        """What to say of stages that ``repair`` would raise, were their weights untrained."""
        kept = [n for n in self._pretrained if n not in self._gains and 0 < rates[n] < ceiling]
        if not kept:
            return ""
        return (
            "the weights look trained, so that low rates may be right and are left alone: "
            f"{', '.join(kept)} ({self._pretrained[kept[0]]}); pass pretrained=False to have them "
            "repaired"
        )

    # Checkpoints

    def state_dict(self) -> dict[str, Any]:
        """The inner optimizer's state dict with our own state, numbers and tensors, beside it.

        The bare optimizer loads it, too. With the weights of the twins that are alive in it, a
        run goes on from it as if it had never stopped. The readings in `history` are not part of
        it, nor are the snapshots of ``recover``: what is loaded is the first one of the run that
        goes on, where it was healthy.
        """
        ours = {**self._decider.state_dict(), "gains": dict(self._gains)}
        return joined(self.inner.state_dict(), ours)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dict of ours or of the bare optimizer.

        Raises:
            ValueError: it is of another mode, of other stages, or of other parameter groups.
                Nothing has been changed then.
        """
        inner, ours = parted(state_dict, self.mode, self.stages)
        self._scaling.heal()
        self.inner.load_state_dict(inner)
        if self._recovery is not None:
            self._recovery.forget()
        if ours is not None:
            self._notice = ""  # which stages are free is known from the run that goes on
            self._gains = ours.get("gains", self._gains)
            self._decider.load_state_dict(ours)
