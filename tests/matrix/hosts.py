"""Other people's training loops: with us and without, ill, interrupted, and what they log."""

from __future__ import annotations

import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from densitylr import DensityLR
from tests.matrix.cells import Cell, UnavailableError, need
from tests.support import host_runs

STAGE = "bert.encoder.layer.0"


class Run:
    """One training run: its model, the starved stage's name, and what ours is known by there."""

    model: nn.Module
    density: DensityLR | None
    stage = "0"

    def train(self, folder: Path | None = None) -> None:
        """To the end, from the checkpoint in ``folder`` if that is given."""
        raise NotImplementedError

    def train_half(self, folder: Path) -> None:
        """Half of it, and a checkpoint in ``folder``; `train` may be called afterwards."""
        raise NotImplementedError

    def logged(self) -> dict[str, float]:
        """What the host's own log says of the starved stage's scale and near-zero density."""
        raise UnavailableError("it logs nothing by itself: DensityLR.history has the readings")


class TrainerRun(Run):
    stage = STAGE

    def __init__(self, ill: bool, ours: bool, folder: Path, given: bool) -> None:
        need("transformers", "huggingface")
        from densitylr.integrations.huggingface import DensityCallback

        rates = (1e-7, 3e-3) if ill else (3e-3, 3e-3)

        def optimizer(model: nn.Module) -> Any:
            made = torch.optim.AdamW(host_runs.halves(model, rates))
            return DensityLR(made, model) if given and ours else made

        self._callback = DensityCallback()
        self._made = host_runs.trainer(
            folder,
            [self._callback] if ours else [],
            optimizer,
            save_strategy="steps",
            save_steps=6,
            lr_scheduler_type="cosine",
        )
        self.model, self._folder = self._made.model, folder

    @property
    def density(self) -> DensityLR | None:  # type: ignore[override]
        return self._callback.controller

    def train(self, folder: Path | None = None) -> None:
        host_runs.seed()
        checkpoint = None if folder is None else str(folder / "checkpoint-6")
        self._made.train(resume_from_checkpoint=checkpoint)

    def train_half(self, folder: Path) -> None:
        assert folder == self._folder  # it saves as it goes; `train` does both

    def logged(self) -> dict[str, float]:
        last = self._made.state.log_history[-2]
        names = ("near_zero", "scale")
        return {name: last[f"densitylr/{name}/{self.stage}"] for name in names}


class AccelerateRun(Run):
    def __init__(self, ill: bool, ours: bool, folder: Path) -> None:
        rates = host_runs.STARVED if ill else host_runs.FLAT
        self._made = host_runs.AccelerateRun(rates, DensityLR if ours else None)
        self.model, self.density = self._made.model, self._made.density

    def train(self, folder: Path | None = None) -> None:
        if folder is not None:
            self._made.accelerator.load_state(folder)
        self._made.train()

    def train_half(self, folder: Path) -> None:
        self._made.train(1)
        self._made.accelerator.save_state(folder)


class FastaiRun(Run):
    def __init__(self, ill: bool, ours: bool, folder: Path, name: str) -> None:
        host_runs.fastai()
        from fastai import optimizer

        from densitylr.integrations.fastai import DensityCallback

        wrapper = partial(optimizer.OptimWrapper, opt=torch.optim.AdamW)
        made = {"Adam": optimizer.Adam, "ranger": optimizer.ranger, "OptimWrapper": wrapper}[name]
        self._callback = DensityCallback(("near_zero", "scale"))
        cbs = [self._callback] if ours else []
        self._learn = host_runs.learner(made, cbs, path=folder)
        self._rates = slice(1e-7, 0.02) if ill else 0.02
        self.model = self._learn.model

    @property
    def density(self) -> DensityLR | None:  # type: ignore[override]
        return self._callback.controller

    def train(self, folder: Path | None = None) -> None:
        if folder is not None:
            self._learn.load(folder / "half")
        self._learn.fit_one_cycle(3, self._rates)

    def train_half(self, folder: Path) -> None:
        self._learn.fit(1, self._rates)
        self._learn.save(folder / "half")

    def logged(self) -> dict[str, float]:
        names = list(self._learn.recorder.metric_names)[1:-1]
        last = dict(zip(names, self._learn.recorder.values[-1], strict=True))
        return {name: last[f"{self.stage} {name}"] for name in ("near_zero", "scale")}


class TimmRun(Run):
    stage = "patch_embed"

    def __init__(self, ill: bool, ours: bool, folder: Path, opt: str) -> None:
        self._made = host_runs.TimmRun(0.02 if ill else 1.0, DensityLR if ours else None, opt=opt)
        self.model, self.density = self._made.model, self._made.density

    def train(self, folder: Path | None = None) -> None:
        if folder is not None:
            self._made.load_state_dict(torch.load(folder / "half.pt", weights_only=True))
        self._made.train()

    def train_half(self, folder: Path) -> None:
        self._made.train(4)
        torch.save(self._made.state_dict(), folder / "half.pt")


ROWS: dict[str, Callable[[bool, bool, Path], Run]] = {
    "Hugging Face Trainer, callback": partial(TrainerRun, given=False),
    "Hugging Face Trainer, optimizers=": partial(TrainerRun, given=True),
    "accelerate": AccelerateRun,
    "fastai, Adam": partial(FastaiRun, name="Adam"),
    "fastai, ranger": partial(FastaiRun, name="ranger"),
    "fastai, OptimWrapper": partial(FastaiRun, name="OptimWrapper"),
    "timm, AdamW": partial(TimmRun, opt="adamw"),
    "timm, Lookahead": partial(TimmRun, opt="lookahead_adamw"),
}


def cells() -> list[Cell]:
    columns = {
        "flat rates: bit for bit": _bit_for_bit,
        "starved stage repaired": _repaired,
        "resumed = never stopped": _resumed,
        "in its log": _logged,
    }
    return [
        Cell("hosts", row, column, partial(check, make))
        for row, make in ROWS.items()
        for column, check in columns.items()
    ]


@contextmanager
def _folders() -> Iterator[tuple[Path, Path]]:
    with tempfile.TemporaryDirectory() as name, warnings.catch_warnings():
        # On load fastai names a class of numpy's by its old name.
        warnings.filterwarnings("ignore", "numpy.core is deprecated", DeprecationWarning)
        folders = Path(name, "a"), Path(name, "b")
        for folder in folders:
            folder.mkdir()
        yield folders
        if "accelerate" in sys.modules:
            host_runs.forget_accelerator()


def _same(a: Run, b: Run) -> bool:
    pairs = zip(a.model.state_dict().values(), b.model.state_dict().values(), strict=True)
    return all(torch.equal(x, y) for x, y in pairs)


def _bit_for_bit(make: Callable[..., Run]) -> None:
    with _folders() as (one, two):
        bare, ours = make(False, False, one), make(False, True, two)
        for run in (bare, ours):
            run.train()
        assert _same(bare, ours)
        assert ours.density is not None
        assert len(ours.density.history) > 5


def _repaired(make: Callable[..., Run]) -> None:
    with _folders() as (one, _):
        ours = make(True, True, one)
        ours.train()
        assert ours.density is not None
        assert ours.stage in [d.stage for d in ours.density.diagnose() if d.kind == "starved"]
        assert ours.density.scales[ours.stage] > 100


def _resumed(make: Callable[..., Run]) -> None:
    with _folders() as (one, two):
        whole, resumed = make(True, True, one), make(True, True, two)
        whole.train_half(one)
        whole.train()
        resumed.train(one)
        assert _same(whole, resumed)
        assert whole.density is not None
        assert resumed.density is not None
        assert whole.density.history.decisions == resumed.density.history.decisions


def _logged(make: Callable[..., Run]) -> None:
    with _folders() as (one, _):
        ours = make(True, True, one)
        ours.train()
        assert ours.density is not None
        history = ours.density.history
        assert ours.logged() == {
            name: history.series(ours.stage, name)[-1] for name in ("near_zero", "scale")
        }
