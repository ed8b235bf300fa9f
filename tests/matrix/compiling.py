"""``torch.compile`` of the model, of the step, and of both.

A model that is watched must be one graph without breaks, compiled once: nothing that a reading, a
twin or a scale does may have it compiled again. Its readings, decisions and numbers must be those
of the run without a compiler. A step must be compiled no more often than the bare optimizer's.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters
from torch.utils.checkpoint import checkpoint

from densitylr import DensityLR, DensityMonitor, find_stages
from tests.matrix.cells import Cell, UnavailableError
from tests.matrix.compiled import CompiledRun, close_parameters, same_readings
from tests.support.fixed import Fixed, batches, net

__all__ = ["cells"]

SCALES = (0.25, 2.0, 1.5, 0.5)
STEPS = 12


class Mixed(nn.Module):
    """Attention and a transposed convolution: layers whose twins are called whole."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.first = nn.Linear(1, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.up = nn.ConvTranspose1d(8, 8, 3)
        self.last = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        tokens = torch.tanh(self.first(x[..., None]))
        tokens = tokens + self.attention(tokens, tokens, tokens, need_weights=False)[0]
        wide = self.up(tokens.transpose(1, 2), [tokens.shape[1] + 2])
        result: Tensor = self.last(wide.mean(2))
        return result


class Around(nn.Module):
    """`net` without batch norm, called in a way of its own."""

    def __init__(self, call: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.stem = nn.Linear(6, 8)
        self.body = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 8), nn.Tanh())
        self.head = nn.Linear(8, 3)
        self.call = call

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.head(self.call(self.body, self.stem(x)))
        return result


def _autocast(body: nn.Module, x: Tensor) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result: Tensor = body(x)
    return result.float()


MODELS: dict[str, Callable[[], nn.Module]] = {
    "model": net,
    "attention": Mixed,
    "autocast inside": lambda: Around(_autocast),
    "checkpointed": lambda: Around(lambda b, x: checkpoint(b, x, use_reentrant=False)),
    "checkpointed, reentrant": lambda: Around(lambda b, x: checkpoint(b, x, use_reentrant=True)),
}


def cells() -> list[Cell]:
    """Every row with the backends that compile no code; a few with the one that does."""
    found = []
    for section, backends, rows in (
        ("compiling", ("eager", "aot_eager"), tuple(ROWS)),
        ("compiling to machine code", ("inductor",), MACHINE_CODE),
    ):
        for row in rows:
            for backend in backends:
                found.append(Cell(section, row, backend, functools.partial(ROWS[row], backend)))
    return found


def _fixed(make: Callable[[], nn.Module]) -> Fixed:
    return Fixed(dict(zip(find_stages(make()), SCALES, strict=False)))


def _model(
    make: Callable[[], nn.Module],
    backend: str,
    after: bool = False,
    in_place: bool = False,
    **options: Any,
) -> None:
    """One graph, whatever is read; and what the run without a compiler reads and learns."""
    _check_backend(backend)
    options["policy"] = _fixed(make)
    eager = CompiledRun(make, **options)
    ours = CompiledRun(make, backend, model=True, after=after, in_place=in_place, **options)
    assert {graphs for graphs, _ in ours.seen} == {1}, f"graphs by step: {ours.seen}"
    assert not counters["graph_break"]
    same_readings(ours.readings, eager.readings)
    close_parameters(ours.model, eager.model, 1e-3 if make is MODELS["autocast inside"] else 1e-5)


def _varied(backend: str) -> None:
    """Graphs for other shapes and for evaluation are those that the bare model needs, too."""
    _check_backend(backend)
    seen = []
    for wrap in (False, True):
        torch._dynamo.reset()
        counters.clear()
        model = net()
        graphs = CompileCounterWithBackend(backend)
        call = torch.compile(model, backend=graphs, fullgraph=True)
        optimizer: Any = torch.optim.SGD(model.parameters(), lr=0.02)
        if wrap:
            optimizer = DensityLR(optimizer, model, every=2)
        counts, expected = [], []
        for step, (x, y) in enumerate(batches(6)):
            rows = 16 - 2 * (step % 3)
            nn.functional.cross_entropy(call(x[:rows]), y[:rows]).backward()
            optimizer.step()
            model.eval()
            call(x[:5])
            model.train()
            counts.append(graphs.frame_count)
            expected.append(rows * 16)
        seen.append(counts)
    assert seen[0] == seen[1], f"graphs: bare {seen[0]}, ours {seen[1]}"
    assert optimizer.history.series("0", "count").tolist() == expected


def _lift_off(backend: str) -> None:
    """Lift-off lets twins go, one after the other: that is no reason to compile again."""
    _check_backend(backend)
    ours = CompiledRun(net, backend, model=True, mode="free", steps=24)
    kinds = [d.kind for d in ours.optimizer.history.decisions]
    assert kinds.count("lift-off") >= 2
    assert {graphs for graphs, _ in ours.seen} == {1}


def _late(backend: str) -> str | None:
    """Nothing calls a hook that came after the graph was made: that is said, not suffered."""
    _check_backend(backend)
    torch._dynamo.reset()
    model = net()
    compiled = torch.compile(model, backend=backend)
    (x, y), *rest = batches(STEPS)
    compiled(x)
    optimizer = DensityLR(torch.optim.SGD(model.parameters(), lr=0.02), model, pretrained=False)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for x, y in rest:
            nn.functional.cross_entropy(compiled(x), y).backward()
            optimizer.step()
    if len(optimizer.history):
        return None
    (reason,) = [str(w.message) for w in told if "nothing is read" in str(w.message)]
    torch.compiler.reset()
    for x, y in rest[:3]:
        nn.functional.cross_entropy(compiled(x), y).backward()
        optimizer.step()
    assert len(optimizer.history)
    return reason


def _step(backend: str, both: bool) -> None:
    """The step's graphs are as many as the bare optimizer's, and their numbers right."""
    _check_backend(backend)
    eager = CompiledRun(net, policy=_fixed(net))
    bare = CompiledRun(net, backend, model=both, step=True, wrap=False)
    ours = CompiledRun(net, backend, model=both, step=True, policy=_fixed(net))
    assert ours.seen == bare.seen, f"graphs {ours.seen}, bare {bare.seen}"
    same_readings(ours.readings, eager.readings)
    close_parameters(ours.model, eager.model)


def _search(backend: str) -> None:
    """Rates that move compile a step again only when parts are divided: once a stage and rate.

    Where the backend makes a constant of every number, as it does with a bare optimizer's rate,
    it is whenever rates change, and once for each way in which stages share a scale.
    """
    _check_backend(backend)
    ours = CompiledRun(net, backend, step=True, mode="free", steps=24)
    decisions = ours.optimizer.history.decisions
    last = max(d.step for d in decisions)
    compiled = [steps for _, steps in ours.seen]
    assert len(decisions) > 2 * len(ours.optimizer.stages)
    rows = {tuple(scales.values()) for _, _, scales in ours.optimizer.history.observations()}
    divisions = {tuple(row.index(scale) for scale in row) for row in rows}
    if backend == "aot_eager":
        assert compiled[-1] <= len(rows) + len(divisions)
    else:
        assert compiled[-1] <= 2 + 2 * len(ours.optimizer.stages)
    assert len(set(compiled[last + 2 :])) == 1


def _monitor(backend: str) -> None:
    """Eyes that count forwards by themselves."""
    _check_backend(backend)
    readings = []
    for compiled in (False, True):
        torch._dynamo.reset()
        model = net()
        graphs = CompileCounterWithBackend(backend)
        call = torch.compile(model, backend=graphs, fullgraph=True) if compiled else model
        with DensityMonitor(model, every=2) as monitor:
            for x, y in batches(5):
                nn.functional.cross_entropy(call(x), y).backward()
        assert graphs.frame_count == int(compiled)
        readings.append(monitor.history.readings)
    assert [r.step for r in readings[0]] == [0, 2, 4]
    same_readings(readings[1], readings[0])


@functools.cache
def _works(backend: str) -> str:
    """Why a backend does not work here at all; empty if it does."""
    try:
        torch.compile(lambda x: x.sin() + 1, backend=backend)(torch.ones(2))
    except Exception as error:
        return f"{backend}: {str(error).splitlines()[0]}"
    return ""


def _check_backend(backend: str) -> None:
    if _works(backend):
        raise UnavailableError(_works(backend))


ROWS: dict[str, Callable[[str], str | None]] = {
    **{name: functools.partial(_model, make) for name, make in MODELS.items()},
    "in place, model.compile()": functools.partial(_model, net, in_place=True),
    "wrapper made after compile": functools.partial(_model, net, after=True),
    "wrapper made after the first call": _late,
    "model, recover": functools.partial(_model, net, recover=True),
    "shapes, evaluation": _varied,
    "step": functools.partial(_step, both=False),
    "model and step": functools.partial(_step, both=True),
    "a search, model": _lift_off,
    "a search, step": _search,
    "DensityMonitor alone": _monitor,
}
MACHINE_CODE = ("model", "attention", "checkpointed", "model and step")
