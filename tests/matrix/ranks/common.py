"""What every rank does alike: the model, its batches, training, and the report."""

from __future__ import annotations

import json
import sys
import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from densitylr import DensityLR, Repair
from tests.matrix.cells import refusal

Groups = list[dict[str, Any]]
Wrap = Callable[[nn.Module], nn.Module]
Make = Callable[[Groups], torch.optim.Optimizer]
Carry = Callable[[nn.Module, DensityLR, nn.Module, DensityLR], None]
Check = Callable[[], str | None]

STAGES = ("0", "2", "4")
STARVED = {"0": 3e-3, "2": 3e-3, "4": 0.3}
FLAT = dict.fromkeys(STAGES, 0.05)


def net() -> nn.Sequential:
    """Three stages: 0, 2 and 4; the same weights on every rank."""
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Linear(6, 40), nn.ReLU(), nn.Linear(40, 20), nn.ReLU(), nn.Linear(20, 3)
    )


def batch(step: int, rank: int) -> tuple[Tensor, Tensor]:
    """A rank's own examples, more of them on rank 0."""
    generator = torch.Generator().manual_seed(1000 * step + rank)
    x = torch.randn(48 - 16 * rank, 6, generator=generator)
    return x, (x[:, 0] > 0).long() + (x[:, 1] > 1).long()


def step_of(model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> float:
    x, y = batch(step, dist.get_rank())
    optimizer.zero_grad()
    loss = nn.functional.cross_entropy(model(x), y)
    loss.backward()
    optimizer.step()
    return loss.item()


def user_groups(model: nn.Module, rates: Mapping[str, float]) -> Groups:
    """One group a rate, as a user would make them: stages of one rate share a group."""
    inside = getattr(model, "module", model)
    groups: dict[float, list[nn.Parameter]] = {}
    for stage in STAGES:
        groups.setdefault(rates[stage], []).extend(inside[int(stage)].parameters())
    return [{"params": params, "lr": rate} for rate, params in groups.items()]


def stage_groups(model: nn.Module, rates: Mapping[str, float]) -> Groups:
    """One real group a stage."""
    inside = getattr(model, "module", model)
    return [{"params": list(inside[int(s)].parameters()), "lr": rates[s]} for s in STAGES]


@dataclass
class Run:
    """Weights and losses after training, and the scales of each step."""

    weights: dict[str, Tensor]
    losses: list[float]
    scales: list[dict[str, float]]
    optimizer: torch.optim.Optimizer


def whole_weights(model: nn.Module) -> dict[str, Tensor]:
    state = getattr(model, "module", model).state_dict()
    return {k: (v.full_tensor() if hasattr(v, "full_tensor") else v) for k, v in state.items()}


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    steps: range,
    scales: Sequence[Mapping[str, float]] | None = None,
) -> Run:
    """Train; with ``scales``, the rates of real groups are multiplied by those of each step.

    Where one grows, what the weights are moving by is kept: a buffer of gradients is divided.
    """
    used, losses = [], []
    bare = [group["lr"] for group in optimizer.param_groups]
    stepped = getattr(optimizer, "optim", optimizer)  # ZeroRedundancyOptimizer's own
    for i, step in enumerate(steps):
        for group, rate, stage in zip(optimizer.param_groups, bare, STAGES, strict=False):
            if scales is not None:
                group["lr"] = rate * scales[i][stage]
                before = scales[i - 1][stage] if i else 1.0
                for parameter in group["params"] if scales[i][stage] > before else ():
                    buffer = stepped.state.get(parameter, {}).get("momentum_buffer")
                    if buffer is not None:
                        buffer.mul_(before / scales[i][stage])
        losses.append(step_of(model, optimizer, step))
        if isinstance(optimizer, DensityLR):
            used.append(optimizer.scales)
    return Run(whole_weights(model), losses, used, optimizer)


def same(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def on_all(value: Any) -> list[Any]:
    """What each rank gives, in their order."""
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found


def refused(act: Callable[[], object], because: str) -> str:
    """The sentence with which ``act`` is refused, which must be the one that is meant."""
    reason = refusal(act)
    assert because in reason, reason
    return reason


def unscaled_is_bare(wrap: Wrap, make: Make, steps: int = 12) -> None:
    """With one flat rate nothing is changed, bit for bit."""
    ours, bare = wrap(net()), wrap(net())
    wrapped = DensityLR(make(user_groups(ours, FLAT)), ours)
    left = train(ours, wrapped, range(steps))
    right = train(bare, make(user_groups(bare, FLAT)), range(steps))
    assert len(wrapped.history) > 3
    assert left.losses == right.losses
    assert same(left.weights, right.weights)
    wrapped.close()


def controlled(wrap: Wrap, make: Make, steps: int = 24, **constants: float) -> Run:
    """Starved rates under DensityLR; ``constants`` of ``repair`` other than its own."""
    model = wrap(net())
    optimizer = make(user_groups(model, STARVED))
    policy = Repair(**constants)  # type: ignore[arg-type]
    run = train(model, DensityLR(optimizer, model, policy=policy), range(steps))
    assert max(s["0"] for s in run.scales) > 10, run.scales
    assert any(s["0"] != s["2"] for s in run.scales), "no group was split"
    return run


def scaled_is_real_groups(run: Run, wrap: Wrap, make: Make) -> None:
    """What was done under our scales is what groups with those rates do, bit for bit."""
    model = wrap(net())
    optimizer = make(stage_groups(model, STARVED))
    real = train(model, optimizer, range(len(run.scales)), run.scales)
    assert real.losses == run.losses
    assert same(real.weights, run.weights)


def ranks_are_identical(run: Run) -> None:
    """Different losses, but the same weights, scales, readings and decisions everywhere."""
    assert isinstance(run.optimizer, DensityLR)
    history = run.optimizer.history
    losses = on_all(run.losses)
    assert losses[0] != losses[1], "the ranks were given the same batches"
    assert len(history.decisions) > 1
    for name, own in {
        "scales": run.scales,
        "decisions": history.decisions,
        "readings": history.readings,
        "what is said": [str(d) for d in run.optimizer.diagnose()],
    }.items():
        everywhere = on_all(repr(own))  # in which NaN is equal to NaN
        assert everywhere[0] == everywhere[1], f"{name} differ"
    weights = on_all(run.weights)
    assert same(weights[0], weights[1])


def resumed_is_real_groups(
    wrap: Wrap,
    make: Make,
    carry: Carry,
    steps: int = 12,
) -> None:
    """Half of the steps, a checkpoint, another model that goes on: as real groups all the way.

    Args:
        carry: hands a checkpoint of the first model and optimizer to the second ones.
    """
    first, second = wrap(net()), wrap(net())
    before = DensityLR(make(user_groups(first, STARVED)), first)
    half = train(first, before, range(steps))
    after = DensityLR(make(user_groups(second, STARVED)), second)
    carry(first, before, second, after)
    assert after.scales == before.scales != dict.fromkeys(STAGES, 1.0)
    rest = train(second, after, range(steps, 2 * steps))
    assert len(set(map(str, on_all((half.scales, rest.scales))))) == 1
    model = wrap(net())
    optimizer = make(stage_groups(model, STARVED))
    real = train(model, optimizer, range(2 * steps), half.scales + rest.scales)
    assert real.losses == half.losses + rest.losses
    assert same(real.weights, rest.weights)


def sgd(groups: Groups) -> torch.optim.Optimizer:
    return torch.optim.SGD(groups, momentum=0.9)


def row(name: str, wrap: Wrap, make: Make, carry: Carry, recover: Check) -> dict[str, Check]:
    """The checks of one row of the table, by ``"row: column"``."""
    runs: list[Run] = []

    def scaled() -> None:
        runs.append(controlled(wrap, make))
        scaled_is_real_groups(runs[0], wrap, make)

    return {
        f"{name}: unscaled = bare": partial(unscaled_is_bare, wrap, make),
        f"{name}: scaled = real groups": scaled,
        f"{name}: ranks identical": lambda: ranks_are_identical(runs[0]),
        f"{name}: resume": partial(resumed_is_real_groups, wrap, make, carry),
        f"{name}: recover=True": recover,
    }


def main(checks: Mapping[str, Check]) -> None:
    """Run each check on all ranks and write ``{name: [kind, reason]}`` to the file in argv.

    A check returns None, or the sentence with which it was refused. All ranks go through all of
    them; the first to fail on any rank ends it, as the others may be waiting for one another.
    """
    dist.init_process_group("gloo")
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    found: dict[str, tuple[str, str]] = {}
    for name, check in checks.items():
        try:
            reason = check()
            found[name] = ("passed", "") if reason is None else ("refused", reason)
        except Exception:
            found[name] = ("failed", traceback.format_exc())
        everywhere = on_all(found[name])
        failed = [
            f"rank {r}: {why}" for r, (kind, why) in enumerate(everywhere) if kind == "failed"
        ]
        if failed:
            found[name] = ("failed", "\n".join(failed))
        if dist.get_rank() == 0:
            Path(sys.argv[1]).write_text(json.dumps(found))
        if failed:
            break
    dist.destroy_process_group()
