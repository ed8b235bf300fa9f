"""A damaged state dict is refused, with nothing changed, or it is one to go on from."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch
from torch import nn

from densitylr import DensityLR
from tests.support.fixed import batches, net, numbers_of, one_step, same, same_state

REMOVED = object()
VALUES = (None, "x", -1, math.nan, 10**30, [], REMOVED)
DONE = 12
Path = tuple[Any, ...]

pytestmark = pytest.mark.filterwarnings("ignore:.*are NaN or infinite:RuntimeWarning")


def begin(mode: str, recover: bool) -> tuple[nn.Module, DensityLR]:
    """A run whose first stage is starved, in the midst of what is still to be decided."""
    model = net()
    groups = [{"params": model[:3].parameters(), "lr": 1e-5}, {"params": model[3:].parameters()}]
    inner = torch.optim.SGD(groups, lr=0.1, momentum=0.9)
    options = {"mode": mode, "recover": recover}
    return model, DensityLR(inner, model, every=2, pretrained=False, **options)  # type: ignore[arg-type]


def places(state: Any, path: Path = ()) -> Iterator[Path]:
    """Where something is in a state dict: every container and every leaf."""
    if isinstance(state, Mapping):
        parts = state.items()
    elif isinstance(state, (list, tuple)):
        parts = enumerate(state)
    else:
        return
    for key, value in parts:
        yield (*path, key)
        yield from places(value, (*path, key))


def one_of_each_kind(paths: Iterator[Path]) -> Iterator[Path]:
    """Without those that differ from an earlier one by a stage, a layer or an index only."""
    seen = set()
    for path in paths:
        kind = tuple("*" if str(key).isdigit() else key for key in path)
        if kind not in seen:
            seen.add(kind)
            yield path


def put(state: Any, path: Path, value: Any) -> Any:
    """A copy of a state dict with another value in one place."""
    if not path:
        return value
    if isinstance(state, tuple):
        return tuple(put(list(state), path, value))
    key, *rest = path
    changed: Any = copy.copy(state)
    if value is REMOVED and not rest:
        del changed[key]
    else:
        changed[key] = put(state[key], tuple(rest), value)
    return changed


def everything(model: nn.Module, optimizer: DensityLR) -> Any:
    """All that a state dict may change, in a form that compares, NaN included."""
    held = numbers_of({**optimizer.state_dict(), "model": model.state_dict()})
    return repr((held, optimizer.scales, optimizer.excluded))


@pytest.mark.parametrize("recover", [False, True])
@pytest.mark.parametrize("mode", ["repair", "warmup", "free"])
def test_a_damaged_state_dict_is_refused_or_can_be_gone_on_from(mode: str, recover: bool) -> None:
    data = batches(DONE + 40)
    source, trained = begin(mode, recover)
    for batch in data[:DONE]:
        one_step(source, trained, batch)
    assert trained.history.decisions
    saved = copy.deepcopy(trained.state_dict())
    weights = copy.deepcopy(source.state_dict())
    (ours,) = saved["densitylr"]
    # Each state is loaded in the midst of a run, which goes on from it. What this one refuses is to
    # be refused by another one, too, which is not to be changed.
    (tried_model, tried), (model, optimizer), (untouched, twin) = (
        begin(mode, recover) for _ in range(3)
    )
    for batch in data[: DONE - 5]:
        one_step(tried_model, tried, batch)
        one_step(model, optimizer, batch)
        one_step(untouched, twin, batch)
    before = everything(model, optimizer)
    groups, decisions = optimizer.param_groups, optimizer.history.decisions
    refused = loaded = 0
    for path in one_of_each_kind(places(ours)):
        for value in VALUES:
            state = {**saved, "densitylr": (put(ours, path, value),)}
            try:
                tried.load_state_dict(state)
            except ValueError:
                refused += 1
                with pytest.raises(ValueError, match=r"."):
                    optimizer.load_state_dict(state)
                continue
            loaded += 1
            tried_model.load_state_dict(weights)
            go_on(tried_model, tried, data, f"{value!r} at {path}")
        assert everything(model, optimizer) == before, path
    assert refused > 200
    assert loaded > 20
    assert optimizer.param_groups is groups
    assert optimizer.history.decisions is decisions
    for batch in data[DONE : DONE + 5]:
        one_step(model, optimizer, batch)
        one_step(untouched, twin, batch)
        assert same(model, untouched)
    assert same_state(optimizer, twin)
    assert optimizer.scales == twin.scales
    assert optimizer.history.decisions == twin.history.decisions


def go_on(model: nn.Module, optimizer: DensityLR, data: Any, what: str) -> None:
    try:
        for batch in data[DONE : DONE + 20]:
            one_step(model, optimizer, batch)
            assert all(0 <= scale < math.inf for scale in optimizer.scales.values())
        optimizer.diagnose()
        optimizer.state_dict()
    except Exception as error:
        raise AssertionError(f"with {what}: {error}") from error
