"""The arms of the overhead benchmark: who watches a training step, and the time that takes.

Each arm is timed in two ways. *Direct*: the time spent inside its hooks and, for densitylr, inside
the optimizer's step hooks. *Difference*: a step with it minus a step without, next to each other
in one round; that takes in what it does to caches and allocators, with the noise of a whole step.
"""

from __future__ import annotations

import random
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from densitylr import DensityLR, find_stages
from densitylr.monitor import DensityMonitor, LayerHook, Sampler, layer_budget
from experiments.overhead.watchers import WATCHERS, WandbGradients, forward_hook, installed
from experiments.train.arms import OptimizerConfig, ProfileConfig, build_optimizer, profile_rates
from experiments.train.tasks import (
    GPT,
    LENGTH,
    PIXELS,
    SYMBOLS,
    ModelConfig,
    build_model,
    mlp_deep,
    vit,
)

__all__ = ["CASES", "EVERY_ARM", "Case", "Times", "time_case", "watched"]

NEVER = 10**9
EVERY_ARM = (
    *("bare", "repair", "twins", "recover", "floor"),
    *(name for name in WATCHERS if name != "wandb"),
)
"""All but wandb's, whose processes would disturb the others."""

Times = dict[str, dict[str, list[float]]]
"""Milliseconds of each round, by arm and by what was timed."""


def _image_batch(channels: int, size: int) -> Callable[[int], tuple[Tensor, Tensor]]:
    return lambda n: (torch.randn(n, channels, size, size), torch.randint(0, 10, (n,)))


def _text_batch(n: int) -> tuple[Tensor, Tensor]:
    shape = (n, LENGTH)
    return torch.randint(0, len(SYMBOLS), shape), torch.randint(0, len(SYMBOLS), shape)


@dataclass(frozen=True)
class Case:
    """A model and the batches it is trained on.

    Attributes:
        title: as it is shown.
        build: makes the model, untrained.
        batch: makes inputs and labels of so many examples.
    """

    title: str
    build: Callable[[], nn.Module]
    batch: Callable[[int], tuple[Tensor, Tensor]]


CASES = {
    "mnist": Case(
        "ResNet-18, 28 × 28",
        lambda: build_model(ModelConfig(name="resnet18")),
        _image_batch(1, 28),
    ),
    "cifar": Case(
        "ResNet-18, 3 × 32 × 32",
        lambda: torchvision.models.resnet18(weights=None, num_classes=10),
        _image_batch(3, 32),
    ),
    "vit": Case("ViT, 3 blocks of width 32", vit, _image_batch(1, PIXELS)),
    "transformer": Case("transformer, 12 blocks of width 64", lambda: GPT(64, 12), _text_batch),
    "mlp": Case("MLP, 8 layers of width 64", mlp_deep, _image_batch(1, PIXELS)),
}


@dataclass
class _Arm:
    """One kind of step: what is switched on before it and off after it is not timed."""

    name: str
    model: nn.Module
    optimizer: Any
    clock: _Clock
    begin: Callable[[], Any] = lambda: None
    end: Callable[[], Any] = lambda: None
    close: Callable[[], Any] = lambda: None


@dataclass
class _Clock:
    """Adds up the seconds that functions take."""

    device: torch.device
    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))

    def now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            start = self.now()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds[part] += self.now() - start

        return call


def watched(
    case: Case, device: torch.device, profile: str = "flat", **options: Any
) -> tuple[nn.Module, DensityLR]:
    """The model of a case under DensityLR with SGD; ``options`` are DensityLR's."""
    model, inner = _bare(case, device, profile)
    return model, DensityLR(inner, model, pretrained=False, **options)


def _bare(case: Case, device: torch.device, profile: str) -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    model = case.build().to(device)
    stages = find_stages(model)
    # Under the geometric profile no stage shall lift off, so that its twin stays alive.
    lr = 1e-2 if profile == "flat" else 1e-6
    rates = profile_rates(ProfileConfig(name=profile, ratio=1e-3), lr, stages)
    optimizer = build_optimizer(OptimizerConfig(name="sgd", lr=lr, momentum=0.9), rates, stages)
    return model, optimizer


def _ours(name: str, case: Case, device: torch.device) -> Iterator[_Arm]:
    """Steps without and with a reading."""
    options = {
        "repair": ("flat", {}),
        "twins": ("geometric", {"observe_only": True}),
        "recover": ("flat", {"recover": True}),
    }
    profile, chosen = options[name]
    model, optimizer = watched(case, device, profile, **chosen)  # type: ignore[arg-type]
    clock, loop = _Clock(device), optimizer._loop
    monitor = loop.monitor
    monitor.read = clock.timed("hooks", monitor.read)  # type: ignore[method-assign]
    inner = optimizer.inner
    for hooks in (inner._optimizer_step_pre_hooks, inner._optimizer_step_post_hooks):
        for key, hook in hooks.items():
            hooks[key] = clock.timed("step", hook)

    def quiet() -> None:
        monitor.disarm()
        loop.schedule.due = NEVER

    def probe() -> None:
        loop.schedule.due = NEVER
        monitor.arm()

    yield _Arm(f"{name}, quiet", model, optimizer, clock, quiet)
    yield _Arm(f"{name}, probe", model, optimizer, clock, probe)


def _hooked(
    name: str, model: nn.Module, optimizer: Any, clock: _Clock, hooks: Sequence[Any]
) -> _Arm:
    """Steps with plain forward hooks on the layers."""
    layers = _layers(model)
    handles: list[Any] = []

    def begin() -> None:
        for layer, hook in zip(layers, hooks, strict=True):
            handles.append(layer.register_forward_hook(clock.timed("hooks", hook)))

    def end() -> None:
        while handles:
            handles.pop().remove()

    return _Arm(name, model, optimizer, clock, begin, end)


def _layers(model: nn.Module) -> list[nn.Module]:
    return [layer for stage in find_stages(model).values() for layer in stage.layers.values()]


def _floor(layer: nn.Module, budget: int) -> Callable[..., None]:
    sampler = Sampler(layer, budget)

    def hook(module: nn.Module, args: Any, output: Any) -> None:
        output = output[0] if isinstance(output, tuple) else output
        sampler.spread(output.detach()).sum()

    return hook


def _arms(case: Case, device: torch.device, names: Sequence[str]) -> Iterator[_Arm]:
    model, optimizer = _bare(case, device, "flat")
    layers = _layers(model)
    for name in names:
        if name == "bare":
            yield _Arm(name, model, optimizer, _Clock(device))
        elif name == "floor":
            hooks = [_floor(layer, layer_budget(len(layers))) for layer in layers]
            yield _hooked(name, model, optimizer, _Clock(device), hooks)
        elif name not in WATCHERS:
            yield from _ours(name, case, device)
        elif not installed(name):
            continue
        elif name == "wandb":
            clock = _Clock(device)
            watch = WandbGradients(model, partial(clock.timed, "hooks"))
            yield _Arm(name, model, optimizer, clock, watch.begin, watch.end, watch.close)
        else:
            hooks = [forward_hook(name, model)] * len(layers)
            yield _hooked(name, model, optimizer, _Clock(device), hooks)


def time_case(
    case: Case,
    batch: int,
    rounds: int,
    device: torch.device,
    names: Sequence[str] = EVERY_ARM,
    warm_up: int = 3,
) -> tuple[Times, int]:
    """Train all arms side by side, one step each a round, in shuffled order.

    Args:
        case: model and data.
        batch: examples a step.
        rounds: rounds that count.
        device: where.
        names: arms, from `EVERY_ARM` or ``wandb``; other monitors that are not installed are left
            out.
        warm_up: rounds before, that do not count.

    Returns:
        The milliseconds of each round: ``total`` of a step, and of densitylr's and the hooks'
        own parts ``hooks`` and ``step``; and the number of layers.
    """
    x, y = (t.to(device) for t in case.batch(batch))
    arms = list(_arms(case, device, names))
    times: Times = {arm.name: defaultdict(list) for arm in arms}
    order = list(arms)
    shuffle = random.Random(0)
    try:
        for turn in range(-warm_up, rounds):
            shuffle.shuffle(order)
            for arm in order:
                arm.begin()
                arm.clock.seconds.clear()
                start = arm.clock.now()
                F.cross_entropy(arm.model(x), y).backward()
                arm.optimizer.step()
                arm.optimizer.zero_grad()
                total = arm.clock.now() - start
                arm.end()
                if turn >= 0:
                    times[arm.name]["total"].append(1e3 * total)
                    for part in ("hooks", "step"):
                        times[arm.name][part].append(1e3 * arm.clock.seconds[part])
    finally:
        for arm in arms:
            arm.close()
    return times, len(_layers(arms[0].model))


def idle_call(calls: int = 2000, rounds: int = 9) -> list[float]:
    """Milliseconds that a call of a layer takes longer for a layer's hook with nothing to do."""
    with DensityMonitor(nn.Sequential(nn.Linear(2, 2)), every=None) as monitor:
        plain, hooked, x = nn.Identity(), nn.Identity(), torch.zeros(1)
        hooked.register_forward_hook(LayerHook(monitor, "0"), with_kwargs=True)
        seconds: dict[nn.Module, list[float]] = {plain: [], hooked: []}
        for _ in range(rounds):
            for layer, own in seconds.items():
                start = time.perf_counter()
                for _ in range(calls):
                    layer(x)
                own.append((time.perf_counter() - start) / calls)
    return [1e3 * (b - a) for a, b in zip(seconds[plain], seconds[hooked], strict=True)]
