"""`DensityLR`: an optimizer around the user's optimizer, with a learning-rate scale per stage."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.optim import Optimizer

from densitylr.controller.checkpoint import add_state, split_state
from densitylr.controller.checks import check_mode, check_optimizer, check_recover, check_stages
from densitylr.controller.loop import ControlLoop
from densitylr.controller.param_groups import StageRates, build_up_of
from densitylr.controller.step import StepHooks
from densitylr.diagnosis import diagnose
from densitylr.history import Diagnosis, History, check_every
from densitylr.model import (
    Stage,
    WeightChecks,
    find_ranks,
    fingerprint,
    stepping_optimizer,
    untrainable,
)
from densitylr.monitor import Baseline
from densitylr.policy import BuildUp, Policy
from densitylr.recovery import Recovery

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["DensityLR"]


class DensityLR(Optimizer):
    """Control the learning rate of each stage of a model by its activation density.

    It is used in place of ``optimizer``: in the training loop, by schedulers, by ``GradScaler``,
    in checkpoints. ``param_groups``, ``state`` and ``defaults`` are those of ``optimizer``, live,
    and hold the user's own rates at all times; a stage's scale is on them only while a step runs.
    You may also call ``optimizer.step()`` directly, as long as you keep a reference to the
    ``DensityLR``.

    Args:
        optimizer: the user's optimizer, built on parameters of ``model``.
        model: the model, before training; of a compiled model, make ``DensityLR`` before it is
            first called.
        mode: a policy by its short name. ``"repair"`` (`densitylr.policy.Repair`, default) raises
            the rate of stages that stay untrained, up to the largest rate of any group, or less
            where that shows itself to be too high, and never acts where all rates are equal.
            ``"warmup"`` (`densitylr.policy.Warmup`) starts at 1e-4 of the rates and finds, for each
            stage, the rate at which it begins to learn, up to the largest rate of any group.
            ``"free"`` (`densitylr.policy.Free`) does so without a cap, and goes on raising all
            rates together while gradients point away from the first weights, for up to 100 steps;
            it wants a schedule that decays after that.
        stages: the user's own stages, as in `densitylr.find_stages`.
        every: optimizer steps from one reading to the next: half of that (rounded down) during the
            first 20 steps; after a long time without a decision a twentieth of that time, at most
            ``10 * every``, but not with ``recover``.
        policy: any `densitylr.policy.Policy`, in place of ``mode``.
        pretrained: whether the weights are pretrained; all stages keep their rates then. None:
            decided by a test of the weights; one trained stage is enough, and the first step warns
            of it, unless a DensityLR state dict is loaded first, which records which stages were
            untrained. A stage of a far too large or small initial spread keeps its rate, too.
        observe_only: decide and record, but leave every rate alone.
        recover: when training collapses, go back to the last healthy state and go on with no
            larger rates than it had; see `densitylr.recovery.Recovery` for the rules and the
            memory. Without a collapse nothing changes. Gradients, the schedule and the entries of
            ``param_groups`` are not taken back.
        baseline: the model as it was before training, where that is not what it is now; see
            `densitylr.Baseline`. ``stages`` and ``pretrained`` are those it was captured with.
        process_group: the ranks that train this model on different batches; default: DDP's, or
            all. Each of them makes a ``DensityLR``, after DDP or ``fully_shard``, and steps it.

    Attributes:
        inner: the user's optimizer.
        stages: `densitylr.Stage` by name.
        policy: what decides.
        history: every reading and decision, a `densitylr.History`.

    Raises:
        TypeError: ``optimizer`` is not an ``Optimizer``, ``model`` not a module, or ``policy`` not
            a policy.
        ValueError: no such mode; an optimizer that misses all of a stage's trainable parameters, or
            is wrapped already; an optimizer that wants one rate for the whole model; ranks that
            differ in settings, stages or weights; a model divided over processes by anything but
            DDP and ``fully_shard``; ``recover`` with ``observe_only`` or a sharded state; and as in
            `densitylr.find_stages`. Nothing has been changed then.

    Example::

        opt = DensityLR(torch.optim.SGD(groups, lr=1e-2, momentum=0.9), model)
        for x, y in loader:
            loss_fn(model(x), y).backward()
            opt.step()
            opt.zero_grad()
        print(*opt.diagnose(), sep="\\n")
    """

    # `Optimizer.__init__` is not called: there is nothing of its own to set up.
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
        baseline: Baseline | None = None,
        process_group: ProcessGroup | None = None,
    ) -> None:
        # Everything that can fail comes first: nothing is hooked before it has passed.
        self.policy: Policy = check_mode(mode, policy)
        check_every(every)
        check_optimizer(optimizer, DensityLR)
        stepped = stepping_optimizer(optimizer)
        ranks = find_ranks(model, process_group)
        if recover:
            check_recover(observe_only, ranks, divided=stepped is not optimizer)
        if baseline is None:
            baseline = Baseline.capture(model, stages, pretrained=pretrained)
        self.stages: dict[str, Stage] = baseline.stages
        check_stages(optimizer, self.stages)
        self.inner = optimizer
        self.every = every
        self._checks = baseline.checks
        if ranks is not None:
            ranks.check_agreement(
                fingerprint(
                    self.stages,
                    policy=repr(self.policy),
                    every=every,
                    observe_only=observe_only,
                    recover=recover,
                    pretrained=", ".join(self._checks.excluded) or "none",
                )
            )
        rates = StageRates(optimizer, self.stages, build_up_of(stepped))
        notice = "" if pretrained is not None else self._kept_back(rates)
        upwards = (group["params"] for group in optimizer.param_groups if group.get("maximize"))
        self._loop = ControlLoop(
            model,
            baseline,
            rates,
            self.policy,
            every=every,
            optimizer=stepped,
            recovery=Recovery(model, optimizer) if recover else None,
            observe_only=observe_only,
            ranks=ranks,
            ascending={id(p) for group in upwards for p in group},
        )
        self._hooks = StepHooks(stepped, self._loop, rates, notice)
        optimizer._densitylr = weakref.ref(self)  # type: ignore[attr-defined]

    # What is shown

    @property
    def scales(self) -> dict[str, float]:
        """The factor now in force on the user's learning rate of each stage."""
        return self._loop.scales

    @property
    def history(self) -> History:
        """Every reading and decision."""
        return self._loop.history

    @property
    def excluded(self) -> dict[str, str]:
        """The stages that the policy leaves alone as trained before, with the reason."""
        return self._checks.trained

    @property
    def build_up(self) -> BuildUp:
        """What makes the optimizer's first steps smaller or larger, for `densitylr.simulate`."""
        return self._hooks.rates.build_up

    @property
    def observe_only(self) -> bool:
        """Whether it decides and records, but leaves every rate alone; may be set."""
        return self._loop.observe_only

    @observe_only.setter
    def observe_only(self, value: bool) -> None:
        self._loop.observe(value)

    def diagnose(self) -> list[Diagnosis]:
        """What is, or was, wrong with which stage; an empty list where nothing is.

        ``str()`` of a `densitylr.Diagnosis` is one sentence.
        """
        return diagnose(
            self.history,
            within_user_rates=self.policy.within_user_rates,
            frozen=untrainable(self.stages),
            excluded=self.excluded,
            bad_gains=self._checks.bad_gains,
            observe_only=self.observe_only,
        )

    def close(self) -> None:
        """Take all hooks off the model and the optimizer: plain training from here on."""
        self._hooks.close()
        self._loop.close()
        self.inner.__dict__.pop("_densitylr", None)

    def __repr__(self) -> str:
        scaled = ", ".join(f"{n} ×{s:.4g}" for n, s in self.scales.items() if s != 1)
        state = "closed" if self._loop.monitor.closed else scaled or "nothing scaled"
        return f"DensityLR({self.policy!r}, {state})\n{self.inner!r}"

    # Steps

    def step(self, closure: Callable[[], float] | None = None) -> Any:  # type: ignore[override]
        """One step of the user's optimizer, each stage at its own scale."""
        try:
            return self.inner.step() if closure is None else self.inner.step(closure)
        finally:
            self._hooks.end()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients, as the user's optimizer does."""
        # Lightning calls this with a proxy of its own as self: nothing may be set on that.
        self._hooks.before_zero_grad()
        self.inner.zero_grad(set_to_none)

    def before_zero_grad(self) -> None:
        """To be called before gradients are cleared by other means than `zero_grad`.

        With ``recover`` a collapse is looked for where steps are skipped for long.
        """
        self._hooks.before_zero_grad()

    def observe_loss(self, loss: Any) -> None:
        """Pass the loss of the step to come to the policy; for policies that need one.

        Args:
            loss: a number, or a tensor with one element; it is not kept on its graph.
        """
        self._loop.loss = loss.detach() if hasattr(loss, "detach") else float(loss)

    # Everything else of an optimizer is the user's own: schedulers, GradScaler, frameworks and
    # checkpoints ask for its groups, its state, its hooks.

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
        """Add a group to the user's optimizer."""
        self.inner.add_param_group(param_group)

    def register_step_pre_hook(self, hook: Any) -> Any:
        """Register it on the user's optimizer."""
        return self.inner.register_step_pre_hook(hook)

    def register_step_post_hook(self, hook: Any) -> Any:
        """Register it on the user's optimizer."""
        return self.inner.register_step_post_hook(hook)

    # Checkpoints

    def state_dict(self) -> dict[str, Any]:
        """The inner optimizer's state dict with our own state, numbers and tensors, beside it.

        The bare optimizer loads it, too. With the weights of the twins that are alive in it, a run
        goes on from it as if it had never stopped. The readings in `history` are not part of it,
        nor are the snapshots of ``recover``: what is loaded is the first one of the run that goes
        on, where it was healthy.
        """
        checks = {
            "excluded": dict(self._checks.excluded),
            "bad_gains": dict(self._checks.bad_gains),
        }
        return add_state(self.inner.state_dict(), {**self._loop.state_dict(), "checks": checks})

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dict of ours or of the bare optimizer.

        Raises:
            ValueError: it is damaged, of another policy, of other stages, or of other parameter
                groups. Nothing has been changed then.
        """
        inner, ours = split_state(state_dict)
        apply = checks = None
        if ours is not None:
            apply, checks = self._loop.prepare(ours), WeightChecks.restored(ours.get("checks"))
            known = sorted([*ours["policy"]["scales"], *checks.excluded])
            if known != sorted(self.stages):
                raise ValueError(
                    f"the state dict is damaged: it has scales, or reasons for none, of {known}, "
                    f"this model has stages {list(self.stages)}"
                )
        self._hooks.groups.heal()
        self.inner.load_state_dict(inner)
        if self._loop.recovery is not None:
            self._loop.recovery.forget()
        if apply is not None and checks is not None:
            self._hooks.notice = ""  # which stages are untrained is known from the run
            self._checks = checks
            apply()

    def _kept_back(self, rates: StageRates) -> str:
        """A warning about stages that ``repair`` would raise if their weights were untrained."""
        now = rates.now()
        kept = [n for n in self._checks.trained if 0 < now[n].lr < now[n].max_lr]
        if not kept:
            return ""
        return (
            "the weights look trained, so that low rates may be right and are left alone: "
            f"{', '.join(kept)} ({self._checks.trained[kept[0]]}); pass pretrained=False to have "
            "them repaired"
        )
