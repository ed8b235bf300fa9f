"""Ways to write a training loop; in none of them may anything tell that the wrapper is there.

Each way trains four times: bare and under the policy with one flat rate, which must be equal bit
for bit; with real parameter groups and with such scales, which must be equal, too. And each reading
must have been read once, from one forward in training mode.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from densitylr import DensityLR, find_stages
from tests.matrix.cells import Cell
from tests.matrix.nets import Checkpointed, difference, no_norm
from tests.support.fixed import Fixed, batches, loss_of, net

__all__ = ["cells"]

STEPS = 7
SCALES = (0.25, 2.0, 1.0, 0.5)
Batch = tuple[Tensor, Tensor]


def _adam(groups: Any) -> Optimizer:
    return torch.optim.AdamW(groups, lr=0.01, fused=True)


def _sgd(groups: Any) -> Optimizer:
    return torch.optim.SGD(groups, lr=0.05, momentum=0.9)


@dataclass(frozen=True)
class Way:
    """``train`` takes a model and an optimizer through `STEPS` batches."""

    train: Callable[[nn.Module, Optimizer], None]
    make: Callable[[], nn.Module] = net
    optimizer: Callable[[Any], Optimizer] = _sgd
    rows: int = 16  # of the one forward that is read
    seen: tuple[int, ...] = tuple(range(STEPS))  # steps with a reading


def cells() -> list[Cell]:
    return [
        Cell("training loop", name, column, functools.partial(run, way))
        for name, way in WAYS.items()
        for column, run in (("flat rates", _flat), ("scaled", _scaled))
    ]


def _flat(way: Way) -> None:
    runs = []
    for wrap in (False, True):
        model = way.make()
        inner = way.optimizer(model.parameters())
        optimizer: Any = DensityLR(inner, model, every=2) if wrap else inner
        torch.manual_seed(4)
        way.train(model, optimizer)
        runs.append((model, inner, torch.get_rng_state()))
    assert (found := difference(runs[1][:2], runs[0][:2])) is None, found
    assert torch.equal(runs[0][2], runs[1][2])
    assert difference(runs[1][:2], (way.make(), runs[1][1])) is not None, "nothing was trained"
    _read_once(way, optimizer)


def _scaled(way: Way) -> None:
    runs = []
    for wrap in (False, True):
        model = way.make()
        stages = find_stages(model)
        scales = dict(zip(stages, SCALES, strict=False))
        groups: Any = [{"params": list(s.parameters.values())} for s in stages.values()]
        inner = way.optimizer([p for g in groups for p in g["params"]] if wrap else groups)
        if not wrap:
            for group, scale in zip(inner.param_groups, scales.values(), strict=True):
                group["lr"] *= scale
        optimizer: Any = DensityLR(inner, model, policy=Fixed(scales), every=2) if wrap else inner
        way.train(model, optimizer)
        runs.append((model, inner))
    assert (found := difference(runs[1], runs[0])) is None, found
    _read_once(way, optimizer)


def _read_once(way: Way, optimizer: DensityLR) -> None:
    """A reading at every step (every second is early doubled), each of one forward."""
    steps = optimizer.history.steps.tolist()
    assert steps == list(way.seen), steps
    for name, stage in optimizer.stages.items():
        assert all(isinstance(layer, nn.Linear) for layer in stage.layers.values())
        width = sum(layer.out_features for layer in stage.layers.values())
        counts = {r.stages[name].count for r in optimizer.history.readings}
        assert counts == {way.rows * width}, (name, counts)


# The ways


def _each(step: Callable[[nn.Module, Optimizer, Batch, int], None]) -> Any:
    def train(model: nn.Module, optimizer: Optimizer) -> None:
        for i, batch in enumerate(batches(STEPS)):
            step(model, optimizer, batch, i)

    return train


def _update(optimizer: Optimizer, loss: Tensor) -> None:
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def _plain(model: nn.Module, optimizer: Optimizer, batch: Batch, i: int) -> None:
    _update(optimizer, loss_of(model, batch))


def _scaler(model: nn.Module, optimizer: Optimizer, unscale: bool = True) -> None:
    """The third step is skipped, as a gradient is infinite."""
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for i, batch in enumerate(batches(STEPS)):
        optimizer.zero_grad()
        scaler.scale(loss_of(model, batch)).backward()
        if i == 2:
            next(model.parameters()).grad.view(-1)[0] = torch.inf
        if unscale:
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
    assert scaler.get_scale() == 512


def _autocast(model: nn.Module, optimizer: Optimizer, batch: Batch, i: int) -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = loss_of(model, batch)
    _update(optimizer, loss)


def _accumulation(model: nn.Module, optimizer: Optimizer, batch: Batch, i: int) -> None:
    for part in range(4):
        (loss_of(model, (batch[0][part::4], batch[1][part::4])) / 4).backward()
    optimizer.step()
    optimizer.zero_grad()


def _clipping(model: nn.Module, optimizer: Optimizer, batch: Batch, i: int) -> None:
    optimizer.zero_grad()
    loss_of(model, batch).backward()
    nn.utils.clip_grad_norm_(model.parameters(), 0.5)
    nn.utils.clip_grad_value_(model.parameters(), 0.1)
    optimizer.step()


def _closure(model: nn.Module, optimizer: Optimizer) -> None:
    """What a closure reads is decided upon in the step that calls it."""
    for batch in batches(STEPS):

        def closure(batch: Batch = batch) -> float:
            optimizer.zero_grad()
            loss = loss_of(model, batch)
            loss.backward()
            return loss.item()

        assert isinstance(optimizer.step(closure), float)


def _keeping_grads(model: nn.Module, optimizer: Optimizer, batch: Batch, i: int) -> None:
    optimizer.zero_grad(set_to_none=False)
    loss_of(model, batch).backward()
    optimizer.step()


def _model_zeroes(model: nn.Module, optimizer: Optimizer, batch: Batch, i: int) -> None:
    model.zero_grad()
    loss_of(model, batch).backward()
    optimizer.step()


def _evaluating(model: nn.Module, optimizer: Optimizer, batch: Batch, i: int) -> None:
    """Evaluation in every mode, with other batches, before the forward that counts."""
    other = torch.randn(5, 6, generator=torch.Generator().manual_seed(i))
    model.eval()
    model(other)
    with torch.inference_mode():
        model(other)
    model.train()
    with torch.no_grad():
        model(other)
    with torch.inference_mode():
        model(other)
    _plain(model, optimizer, batch, i)


def _functional(model: nn.Module, optimizer: Optimizer, batch: Batch, i: int) -> None:
    """`functional_call` on the model's own parameters."""
    state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    answer = torch.func.functional_call(model, state, (batch[0],))
    _update(optimizer, nn.functional.cross_entropy(answer, batch[1]))


def _transformed(model: nn.Module, optimizer: Optimizer, batch: Batch, i: int) -> None:
    """`torch.func.grad` of a functional call."""

    def loss(parameters: dict[str, Tensor]) -> Tensor:
        answer = torch.func.functional_call(model, parameters, (batch[0],))
        return nn.functional.cross_entropy(answer, batch[1])

    parameters = dict(model.named_parameters())
    for name, gradient in torch.func.grad(loss)(parameters).items():
        parameters[name].grad = gradient
    optimizer.step()


def _forward_mode(model: nn.Module, optimizer: Optimizer, batch: Batch, i: int) -> None:
    """`torch.func.jvp` beside the forward that is trained on; it is read first."""

    def answer(x: Tensor) -> Tensor:
        result: Tensor = model(x)
        return result

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch's of its own torch.jit
        torch.func.jvp(answer, (batch[0],), (torch.ones_like(batch[0]),))
    _plain(model, optimizer, batch, i)


def _per_sample(model: nn.Module, optimizer: Optimizer, batch: Batch, i: int) -> None:
    """Per-sample gradients by `torch.func.vmap`, beside the forward that is trained on."""
    parameters = {n: p.detach() for n, p in model.named_parameters()}

    def loss(parameters: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        answer = torch.func.functional_call(model, parameters, (x[None],))
        return nn.functional.cross_entropy(answer, y[None])

    _plain(model, optimizer, batch, i)
    torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))(parameters, *batch)


def _penalty(model: nn.Module, optimizer: Optimizer, batch: Batch, i: int) -> None:
    """A gradient penalty: backward through backward."""
    x = batch[0].clone().requires_grad_()
    loss = loss_of(model, (x, batch[1]))
    (slope,) = torch.autograd.grad(loss, x, create_graph=True)
    _update(optimizer, loss + slope.square().sum())


def _by_hand(model: nn.Module, optimizer: Optimizer, batch: Batch, i: int) -> None:
    parameters = list(model.parameters())
    gradients = torch.autograd.grad(loss_of(model, batch), parameters)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient
    optimizer.step()


def _double(model: nn.Module, optimizer: Optimizer, batch: Batch, i: int) -> None:
    _plain(model, optimizer, (batch[0].double(), batch[1]), i)


def _half(model: nn.Module, optimizer: Optimizer, batch: Batch, i: int) -> None:
    _plain(model, optimizer, (batch[0].bfloat16(), batch[1]), i)


WAYS = {
    "plain": Way(_each(_plain)),
    "GradScaler, a step skipped": Way(_scaler, seen=tuple(range(STEPS - 1))),
    "GradScaler, fused": Way(
        functools.partial(_scaler, unscale=False), optimizer=_adam, seen=tuple(range(STEPS - 1))
    ),
    "bfloat16 autocast": Way(_each(_autocast)),
    "bfloat16 parameters": Way(_each(_half), make=lambda: no_norm().bfloat16()),
    "float64": Way(_each(_double), make=lambda: net().double()),
    "gradient accumulation": Way(_each(_accumulation), rows=4),
    "clipping": Way(_each(_clipping)),
    "zero_grad(set_to_none=False)": Way(_each(_keeping_grads)),
    "model.zero_grad()": Way(_each(_model_zeroes)),
    "evaluation in between": Way(_each(_evaluating)),
    "checkpointing": Way(_each(_plain), make=lambda: Checkpointed(False)),
    "checkpointing, reentrant": Way(_each(_plain), make=lambda: Checkpointed(True)),
    "functional_call": Way(_each(_functional)),
    "torch.func.grad": Way(_each(_transformed), make=no_norm),
    "torch.func.vmap beside": Way(_each(_per_sample), make=no_norm),
    "torch.func.jvp beside": Way(_each(_forward_mode), make=no_norm),
    "gradient penalty": Way(_each(_penalty), make=no_norm),
    "autograd.grad by hand": Way(_each(_by_hand)),
    "closure": Way(_closure),
}
