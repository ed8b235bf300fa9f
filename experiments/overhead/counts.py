"""What of the overhead can be counted: copies, graphs, memory, losses, the error of the sample."""

from __future__ import annotations

import gc
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters
from torch.overrides import TorchFunctionMode, resolve_name
from torch.utils._python_dispatch import TorchDispatchMode

from densitylr import Baseline, DensityLR, DensityMonitor, History, find_stages
from densitylr.history import TAU
from experiments.overhead.arms import Case, watched
from experiments.train.tasks import DataConfig, ModelConfig, build_model, load

__all__ = ["compiled", "copies", "growth", "identical_losses", "sample_error"]


class _Transfers(TorchFunctionMode):
    """Counts calls that bring a tensor, whole or as a Python number, to the host."""

    NAMES = ("torch.Tensor.cpu", "torch.Tensor.tolist")

    def __init__(self) -> None:
        super().__init__()
        self.copies = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.copies += resolve_name(func) in self.NAMES
        return func(*args, **(kwargs or {}))


class _Scalars(TorchDispatchMode):
    """Counts what ``item``, ``bool`` and ``float`` come down to."""

    def __init__(self) -> None:
        super().__init__()
        self.reads = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.reads += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def copies(case: Case, batch: int, device: torch.device) -> dict[str, int]:
    """Copies to the host in one reading, and single numbers.

    The shapes have been seen before: of a new shape it is looked up once which channels are read.

    Returns:
        ``copies`` and ``scalars`` from the first hook to the reading; ``still``: copies in a whole
        step with a reading at which no stage moves, so that gradients are read: for any that is not
        zero, and for the alignment.
    """
    model, optimizer = watched(case, device, observe_only=True)
    x, y = (part.to(device) for part in case.batch(batch))
    monitor = optimizer._loop.monitor
    for _ in range(2):
        monitor.arm()
        with _Transfers() as transfers, _Scalars() as scalars:
            model(x)
            monitor.collect(0)
    model, optimizer = watched(case, device, "geometric", observe_only=True)
    for _ in range(3):  # before the first step no gradient is looked at
        optimizer._loop.schedule.due = 0
        optimizer._loop.monitor.arm()
        optimizer.zero_grad()
        with _Transfers() as whole:
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
    return {
        "copies": transfers.copies,
        "scalars": scalars.reads,
        "still": whole.copies,
        "devices": 1,
    }


def compiled(steps: int = 20) -> dict[str, int]:
    """Graphs, breaks and compilations after the first, of a model under ``torch.compile``."""
    torch._dynamo.reset()
    counters.clear()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Linear(16, 3))
    optimizer = DensityLR(torch.optim.SGD(model.parameters(), lr=0.02), model, pretrained=False)
    backend = CompileCounterWithBackend("eager")
    call = torch.compile(model, backend=backend)
    graphs = []
    for _ in range(steps):
        x = torch.randn(16, 6)
        F.cross_entropy(call(x), x[:, :3].argmax(1)).backward()
        optimizer.step()
        optimizer.zero_grad()
        graphs.append(backend.frame_count)
    breaks = sum(counters["graph_break"].values())
    probes = len(optimizer.history)
    torch._dynamo.reset()
    return {
        "graphs": graphs[0],
        "breaks": breaks,
        "recompilations": graphs[-1] - graphs[0],
        "probes": probes,
    }


def growth(steps: int = 40_000, budget: int = 64) -> dict[str, int]:
    """Python objects alive once the history has been thinned: after all steps and half of them.

    They are counted where the history is equally long. Bytes are not compared: the interpreter's
    own pools fill for tens of thousands of steps, whoever runs.
    """
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4))
    monitor = DensityMonitor(model, every=10)
    monitor.history = History(budget)
    x = torch.randn(4, 4)
    alive: dict[int, int] = {}
    try:
        for step in range(steps):
            model(x)
            # Full just before it is thinned: counted for the first time in each half.
            half = 2 * step // steps
            if half not in alive and step > steps // 4 and len(monitor.history) == budget:
                gc.collect()
                alive[half] = len(gc.get_objects())
    finally:
        monitor.close()
    largest = len(monitor.history)
    return {"steps": steps, "budget": budget, "largest": largest, "objects": alive[1] - alive[0]}


def identical_losses(case: Case, batch: int, steps: int, device: torch.device) -> dict[str, Any]:
    """Whether losses and weights of a run with densitylr are those of one without, bit for bit."""
    found = []
    for on in (False, True):
        model, optimizer = watched(case, device)
        if not on:
            optimizer.close()
        torch.manual_seed(1)
        losses = []
        for _ in range(steps):
            x, y = (t.to(device) for t in case.batch(batch))
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        found.append((losses, [p.detach().clone() for p in model.parameters()]))
    (plain, weights), (seen, theirs) = found
    same = all(torch.equal(a, b) for a, b in zip(weights, theirs, strict=True))
    return {"steps": steps, "losses": plain == seen, "weights": same}


def sample_error(
    device: torch.device, trained: int = 40, batch: int = 64, batches: int = 12
) -> list[dict[str, Any]]:
    """The error of the sample in ``near_zero``, beside what the exact number does by itself.

    ResNet-18 on the bundled MNIST sample, untrained and after some steps of SGD. The
    monitor, and a hook that reads every output, read the same forwards of ``batches`` batches.

    Returns:
        For each state and stage: the mean of the exact number, the root mean square of sampled −
        exact, and the standard deviation of the exact number from batch to batch.
    """
    data = load(DataConfig(name="mnist-sample"))
    torch.manual_seed(0)
    model = build_model(ModelConfig(name="resnet18")).to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9)
    untwinned = Baseline.capture(model, pretrained=True)
    monitor, exact_shares = DensityMonitor(model, every=None, baseline=untwinned), _Exact(model)
    order = torch.randperm(len(data.train_x))

    def forward(turn: int) -> tuple[Tensor, Tensor]:
        at = order[(torch.arange(batch) + turn * batch) % len(order)]
        return model(data.train_x[at].to(device)), data.train_y[at].to(device)

    found, turn = [], 0
    for state, steps in (("untrained", 0), (f"after {trained} steps", trained)):
        for _ in range(steps):
            F.cross_entropy(*forward(turn)).backward()
            optimizer.step()
            optimizer.zero_grad()
            turn += 1
        numbers: list[list[list[float]]] = []
        for _ in range(batches):
            monitor.arm()
            forward(turn)
            turn += 1
            reading = monitor.collect(turn)
            assert reading is not None
            near_zero = [seen.near_zero for seen in reading.stages.values()]
            numbers.append([near_zero, exact_shares.by_stage()])
        sampled, exact = np.array(numbers).transpose(1, 2, 0)
        for i, stage in enumerate(monitor.stages):
            found.append(
                {
                    "state": state,
                    "stage": stage,
                    "exact": float(exact[i].mean()),
                    "error": float(np.sqrt(np.mean((sampled[i] - exact[i]) ** 2))),
                    "noise": float(exact[i].std(ddof=1)),
                }
            )
    monitor.close()
    exact_shares.close()
    return found


class _Exact:
    """The near-zero share of every output of each layer, against its RMS at the first forward."""

    def __init__(self, model: nn.Module) -> None:
        self.stages = find_stages(model)
        self.rms0: dict[str, Tensor] = {}
        self.shares: dict[str, float] = {}
        layers = {n: layer for s in self.stages.values() for n, layer in s.layers.items()}
        self.handles = [
            layer.register_forward_hook(partial(self._look, name)) for name, layer in layers.items()
        ]

    def _look(self, name: str, layer: nn.Module, args: Any, a: Tensor) -> None:
        if layer.training:
            a = a.detach().double().abs()
            rms0 = self.rms0.setdefault(name, a.square().mean().sqrt())
            self.shares[name] = float((a < TAU * rms0).double().mean())

    def by_stage(self) -> list[float]:
        """The mean over the layers of each stage, at the last forward."""
        own = self.shares
        return [float(np.mean([own[n] for n in s.layers])) for s in self.stages.values()]

    def close(self) -> None:
        for handle in self.handles:
            handle.remove()
