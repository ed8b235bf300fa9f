"""Saved at any step, loaded in a new process, and gone on with as if it had never stopped.

One new process loads the checkpoints of all runs, goes on from each and saves what came out.
"""

from __future__ import annotations

import functools
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from densitylr import DensityLR
from tests.matrix.cells import Cell, UnavailableError
from tests.support.fixed import batches, net, numbers_of, one_step

__all__ = ["cells"]

STEPS = 14
KINDS: dict[str, dict[str, Any]] = {
    "repair": {},
    "warmup": {"mode": "warmup"},
    "free": {"mode": "free"},
    "repair, recover": {"recover": True},
}


class Recurrent(nn.Module):
    """A GRU and a convolution between linear layers: twins of each kind."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.lift = nn.Linear(1, 4)
        self.conv = nn.Conv1d(4, 8, 3, padding=1, bias=False)
        self.gru = nn.GRU(8, 8, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        lifted = torch.tanh(self.lift(x[..., None])).transpose(1, 2)
        result: torch.Tensor = self.head(self.gru(self.conv(lifted).transpose(1, 2))[0][:, -1])
        return result


MODELS: dict[str, Callable[[], nn.Module]] = {"linear": net, "recurrent": Recurrent}


def cells() -> list[Cell]:
    found = []
    for kind in KINDS:
        for model in MODELS:
            run = functools.partial(_resumed, kind, model)
            found.append(Cell("checkpoints", kind, f"{model}, any step, new process", run))
        for name, try_it in (
            ("bare → ours", _from_bare),
            ("ours → bare", _to_bare),
            ("distributed.checkpoint", _distributed_checkpoint),
        ):
            found.append(Cell("checkpoints", kind, name, functools.partial(try_it, kind)))
    return found


def start(
    kind: str, model: str, weights: Mapping[str, Any] | None = None
) -> tuple[nn.Module, DensityLR]:
    """The beginning of a run, or of its continuation: the first layers with next to no rate.

    ``weights`` are loaded first, so that no twin can be made of the model's own.
    """
    made = MODELS[model]()
    if weights is not None:
        made.load_state_dict(weights)
    parameters = list(made.parameters())
    groups = [{"params": parameters[:4], "lr": 1e-6}, {"params": parameters[4:]}]
    inner = torch.optim.SGD(groups, lr=0.1, momentum=0.9)
    return made, DensityLR(inner, made, every=2, pretrained=False, **KINDS[kind])


def go_on(model: nn.Module, optimizer: Optimizer, first: int) -> None:
    for batch in batches(STEPS)[first:]:
        one_step(model, optimizer, batch)


def outcome(model: nn.Module, optimizer: DensityLR) -> dict[str, Any]:
    return {"model": model.state_dict(), "optimizer": optimizer.state_dict()}


def main(folder: Path) -> None:
    """Go on from each checkpoint of a folder; the new process."""
    done = {}
    for file in sorted(folder.glob("*.pt")):
        kind, name, step = file.stem.split(";")
        saved = torch.load(file, weights_only=True)
        model, optimizer = start(kind, name, saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        go_on(model, optimizer, int(step))
        done[file.stem] = outcome(model, optimizer)
    torch.save(done, folder / "done")


@functools.cache
def _resume_all() -> tuple[Mapping[str, Any], Mapping[str, Any], Mapping[str, int]]:
    """Outcomes of the runs that never stopped, and of those that did; live twins at each save."""
    straight, twins = {}, {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for kind in KINDS:
            for model in MODELS:
                made, optimizer = start(kind, model)
                for step, batch in enumerate(batches(STEPS)):
                    label = f"{kind};{model};{step}"
                    torch.save(outcome(made, optimizer), folder / f"{label}.pt")
                    layers = optimizer._loop.monitor._layers.values()
                    twins[label] = sum(layer.twin is not None for layer in layers)
                    one_step(made, optimizer, batch)
                straight[f"{kind};{model}"] = outcome(made, optimizer)
        subprocess.run([sys.executable, "-m", "tests.matrix.checkpoints", name], check=True)
        return straight, torch.load(folder / "done", weights_only=True), twins


def _resumed(kind: str, model: str) -> None:
    straight, resumed, twins = _resume_all()
    run = f"{kind};{model}"
    expected = numbers_of(_without_peaks(straight[run]))
    scales = straight[run]["optimizer"]["densitylr"][0]["policy"]["scales"].values()
    assert any(scale not in (1.0, 1e-4) for scale in scales), "nothing happened"
    assert any(twins[f"{run};{step}"] for step in range(1, STEPS)), "no twin was saved"
    for step in range(STEPS):
        found = numbers_of(_without_peaks(resumed[f"{run};{step}"]))
        assert found == expected, f"saved at step {step}"


def _without_peaks(outcome: Mapping[str, Any]) -> Mapping[str, Any]:
    """The peaks between two readings are no part of a checkpoint that is saved there."""
    (ours,) = outcome["optimizer"]["densitylr"]
    recovery = ours.get("recovery", {"first": None, "recent": []})
    for reading in filter(None, [recovery["first"], *recovery["recent"]]):
        for seen in reading["stages"].values():
            del seen["peak_rms"]
    return outcome


def _trained(kind: str) -> tuple[nn.Module, DensityLR]:
    model, optimizer = start(kind, "linear")
    go_on(model, optimizer, STEPS - 5)
    return model, optimizer


def _state(optimizer: Optimizer) -> Any:
    state = optimizer.state_dict()
    return numbers_of({key: state[key] for key in ("state", "param_groups")})


def _from_bare(kind: str) -> None:
    _, optimizer = _trained(kind)
    bare = optimizer.inner.state_dict()
    _, fresh = start(kind, "linear")
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        fresh.load_state_dict(bare)
    assert ["no DensityLR state" in str(w.message) for w in told] == [True]
    assert _state(fresh) == _state(optimizer)


def _to_bare(kind: str) -> None:
    _, optimizer = _trained(kind)
    groups = [{"params": [p.detach().clone() for p in g["params"]]} for g in optimizer.param_groups]
    bare = torch.optim.SGD(groups, lr=1.0)
    bare.load_state_dict(optimizer.state_dict())
    assert _state(bare) == _state(optimizer)
    assert bare.state


def _distributed_checkpoint(kind: str) -> None:
    """As a Stateful object, into a fresh optimizer whose own state has other twins in it."""
    try:
        import torch.distributed.checkpoint as dcp
    except ImportError as error:
        raise UnavailableError(str(error)) from error
    if not torch.distributed.is_available():
        raise UnavailableError("torch was built without distributed")
    model, optimizer = _trained(kind)
    before = numbers_of(outcome(model, optimizer))
    with tempfile.TemporaryDirectory() as name, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch: there is one process
        dcp.save({"model": model, "optimizer": optimizer}, checkpoint_id=name)
        other, fresh = start(kind, "linear", model.state_dict())
        go_on(other, fresh, STEPS - 1)  # torch loads state only where there is some
        dcp.load({"model": other, "optimizer": fresh}, checkpoint_id=name)
    assert numbers_of(outcome(other, fresh)) == before
    go_on(model, optimizer, STEPS - 2)
    go_on(other, fresh, STEPS - 2)
    assert numbers_of(outcome(other, fresh)) == numbers_of(outcome(model, optimizer))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
