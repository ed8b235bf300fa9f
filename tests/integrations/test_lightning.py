"""One callback in a real Trainer: as a plain loop with DensityLR, and as no callback at all."""

from __future__ import annotations

import csv
import gc
import importlib
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from densitylr import DensityLR
from tests.support.fixed import Fixed, batches, loss_of, net, one_step, same

pl = pytest.importorskip("lightning.pytorch")
integration = importlib.import_module("densitylr.integrations.lightning")
DensityCallback = integration.DensityCallback

pytestmark = [
    # Advice about the tiny runs here: one process loads the data, in memory; few batches.
    pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:The number of training batches .* is smaller than"),
    # The Trainer's own call of torch.utils._pytree.
    pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated"),
]

DATA = batches(24)


class Module(pl.LightningModule):
    """The net of the other tests, its first stage with ``factor`` of the rate."""

    def __init__(self, factor: float = 1e-4, optimizer: str = "sgd", size: int = 24) -> None:
        super().__init__()
        self.net = net()
        self.factor, self.kind, self.size = factor, optimizer, size
        self.losses: list[float] = []
        self.rates: list[list[float]] = []

    def optimizer_of(self, factor: float) -> torch.optim.Optimizer:
        lr = 0.1 if self.kind == "sgd" else 0.01
        groups = [
            {"params": list(self.net[:3].parameters()), "lr": lr * factor},
            {"params": list(self.net[3:].parameters())},
        ]
        if self.kind == "sgd":
            return torch.optim.SGD(groups, lr=lr, momentum=0.9)
        return torch.optim.AdamW(groups, lr=lr)

    def configure_optimizers(self) -> Any:
        return self.optimizer_of(self.factor)

    def training_step(self, batch: Any, _: int) -> Tensor:
        loss = loss_of(self.net, batch)
        self.losses.append(loss.item())
        self.rates.append([g["lr"] for g in self.optimizers().param_groups])
        return loss

    def train_dataloader(self) -> Any:
        return torch.utils.data.DataLoader(DATA[: self.size], batch_size=None)


class Wrapping(Module):
    def configure_optimizers(self) -> Any:
        return DensityLR(self.optimizer_of(self.factor), self, every=4)


class Manual(Module):
    automatic_optimization = False

    def training_step(self, batch: Any, _: int) -> None:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        loss = loss_of(self.net, batch)
        self.losses.append(loss.item())
        self.manual_backward(loss)
        optimizer.step()


class Scheduled(Module):
    def configure_optimizers(self) -> Any:
        optimizer = self.optimizer_of(self.factor)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 24)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }


def trainer(folder: Path, *callbacks: Any, **options: Any) -> Any:
    defaults: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": 1,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "log_every_n_steps": 1,
        "default_root_dir": folder,
    }
    if options.get("plugins") == "16-mixed":
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        plugin = pl.plugins.precision.MixedPrecision("16-mixed", "cpu", scaler)
        options = {**options, "plugins": [plugin]}
    return pl.Trainer(callbacks=list(callbacks), **{**defaults, **options})


def fitted(module: Any, folder: Path, *callbacks: Any, **options: Any) -> Any:
    trainer(folder, *callbacks, **options).fit(module)
    return module


def looped(factor: float = 1e-4, optimizer: str = "sgd", **options: Any) -> tuple[Any, DensityLR]:
    """The same run in a loop of one's own."""
    module = Module(factor, optimizer)
    wrapped = DensityLR(module.optimizer_of(factor), module, every=4, **options)
    for batch in DATA:
        one_step(module.net, wrapped, batch)
    return module, wrapped


# As if it were not there


# The Trainer itself takes fp16 on a GPU only; this is what it does there.
FP16 = {"plugins": "16-mixed"}
PRECISIONS = [{}, {"precision": "bf16-mixed"}, {"precision": "bf16-true"}, FP16]
# Lightning refuses these in manual optimization.
AUTOMATIC = [{"gradient_clip_val": 0.1}, {"accumulate_grad_batches": 3}]


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        *((kind, options) for kind in (Module, Scheduled) for options in PRECISIONS + AUTOMATIC),
        *((Manual, options) for options in PRECISIONS),
    ],
)
def test_flat_rates_train_bit_for_bit_as_without(
    tmp_path: Path, optimizer: str, kind: Any, options: Any
) -> None:
    density = DensityCallback(every=4)
    bare = fitted(kind(1.0, optimizer), tmp_path, **options)
    ours = fitted(kind(1.0, optimizer), tmp_path, density, **options)
    assert bare.losses == ours.losses
    assert same(bare, ours)
    (wrapped,) = density.optimizers
    steps = 24 // options.get("accumulate_grad_batches", 1)
    assert wrapped.history.steps.tolist() == [
        s for s in range(steps) if s % 4 == 0 or (s < 20 and s % 2 == 0)
    ]
    assert wrapped.history.decisions == []


# As in a loop of one's own


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("kind", [Module, Manual, Wrapping])
def test_a_repaired_run_is_that_of_a_plain_loop(tmp_path: Path, optimizer: str, kind: Any) -> None:
    density = DensityCallback() if kind is Wrapping else DensityCallback(every=4)
    module = fitted(kind(optimizer=optimizer), tmp_path, density)
    (wrapped,) = density.optimizers
    plain, reference = looped(optimizer=optimizer)
    assert same(plain, module)
    assert reference.history.decisions
    assert wrapped.history.decisions == reference.history.decisions
    assert wrapped.history.readings == reference.history.readings
    if kind is not Manual:  # within the training step, too, the rates are the user's
        own = [g["lr"] for g in reference.param_groups]
        assert module.rates == [own] * len(DATA)


def test_schedules_and_the_monitor_of_rates_see_the_user_s(tmp_path: Path) -> None:
    traces = []
    for callbacks in ((), (DensityCallback(every=4),)):
        logger = pl.loggers.CSVLogger(tmp_path, name=f"{len(callbacks)}")
        rates = pl.callbacks.LearningRateMonitor("step")
        fitted(Scheduled(), tmp_path, rates, *callbacks, logger=logger)
        traces.append(rates.lrs)
    assert traces[0] == traces[1]
    assert all(len(set(lrs)) > 1 for lrs in map(tuple, logged_rates(tmp_path / "0")))


def logged_rates(folder: Path) -> list[list[float]]:
    (path,) = folder.glob("*/metrics.csv")
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    names = [name for name in rows[0] if name.startswith("lr-")]
    return [[float(row[name]) for row in rows if row[name]] for name in names]


@pytest.mark.parametrize("options", [{"precision": "bf16-mixed"}, FP16, {"gradient_clip_val": 0.5}])
def test_a_starved_stage_is_raised_under_precision_and_clipping(
    tmp_path: Path, options: Any
) -> None:
    density = DensityCallback(every=4)
    fitted(Module(), tmp_path, density, **options)
    (wrapped,) = density.optimizers
    assert {d.stage for d in wrapped.history.decisions} == {"net.0"}
    assert wrapped.history.series("net.0", "scale")[-1] > 100


def test_16_mixed_on_the_cpu_is_bf16_by_lightning_s_own_rule(tmp_path: Path) -> None:
    density = DensityCallback(every=4)
    with pytest.warns(UserWarning, match="precision='bf16-mixed'. instead"):
        fitted(Module(), tmp_path, density, precision="16-mixed")
    assert density.optimizers[0].history.decisions


# Checkpoints

# The resumed runs here save nothing, and say so by having no ModelCheckpoint.
unsaved = pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks used")


@pytest.mark.parametrize("kind", [Module, Wrapping])
@pytest.mark.parametrize("factor", [1.0, 1e-4])
@pytest.mark.parametrize("stop", [1, 2, 5])
@unsaved
def test_a_resumed_run_is_the_one_that_never_stopped(
    tmp_path: Path, kind: Any, factor: float, stop: int
) -> None:
    def callback() -> Any:
        return DensityCallback() if kind is Wrapping else DensityCallback(every=4)

    whole, density = kind(factor, size=3), callback()
    fitted(whole, tmp_path, density, max_epochs=8)
    saving = pl.callbacks.ModelCheckpoint(tmp_path, save_last=True, save_top_k=0)
    first = kind(factor, size=3)
    fitted(first, tmp_path, callback(), saving, max_epochs=stop, enable_checkpointing=True)
    torch.manual_seed(77)
    second, after = kind(factor, size=3), callback()
    for layer in second.net:
        if hasattr(layer, "reset_parameters"):
            layer.reset_parameters()  # another start than the run's own
    resumed = trainer(tmp_path, after, max_epochs=8)
    # Without a warning, although Lightning restores the weights before configure_optimizers.
    resumed.fit(second, ckpt_path=tmp_path / "last.ckpt", weights_only=True)
    assert resumed.global_step == 24
    assert first.losses + second.losses == whole.losses
    assert same(whole, second)
    one, other = density.optimizers[0].history, after.optimizers[0].history
    assert one.decisions == other.decisions
    assert bool(one.decisions) == (factor != 1.0)
    assert other.readings == [r for r in one.readings if r.step >= 3 * stop]


@unsaved
def test_checkpoints_go_both_ways(tmp_path: Path) -> None:
    """From a run without the callback to one with it, and back."""
    for i, (before, after) in enumerate((([], [DensityCallback()]), ([DensityCallback()], []))):
        folder = tmp_path / str(i)
        saving = pl.callbacks.ModelCheckpoint(folder, save_last=True, save_top_k=0)
        fitted(Module(1.0), folder, *before, saving, enable_checkpointing=True)
        module = Module(1.0)
        resumed = trainer(folder, *after, max_epochs=2)
        resumed.fit(module, ckpt_path=folder / "last.ckpt", weights_only=True)
        assert len(module.losses) == len(DATA)


def test_after_a_fit_that_was_refused_there_is_no_state_to_save(tmp_path: Path) -> None:
    density = DensityCallback(mode="hot")
    with pytest.raises(ValueError, match="mode must be one of"):
        fitted(Module(), tmp_path, density)
    assert density.state_dict() == {}  # an OnExceptionCheckpoint asks for it
    assert density.optimizers == []


# Loggers, progress bar, what is printed


def test_loggers_get_every_reading(tmp_path: Path) -> None:
    density = DensityCallback(every=4)
    logger = pl.loggers.CSVLogger(tmp_path)
    fitted(Module(), tmp_path, density, logger=logger)
    history = density.optimizers[0].history
    with open(Path(logger.log_dir) / "metrics.csv", newline="") as file:
        rows = {int(row["step"]): row for row in csv.DictReader(file) if "step" in row}
    for number in ("near_zero", "untrained", "displacement", "rms", "nonfinite", "rate", "scale"):
        for stage in history.stages:
            for step, value in zip(history.steps, history.series(stage, number), strict=True):
                assert float(rows[step][f"densitylr/{number}/{stage}"]) == value


def test_the_progress_bar_shows_the_stage_that_moved_least(tmp_path: Path) -> None:
    density, shown = DensityCallback(every=4), []

    class Watching(pl.Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            shown.append(trainer.progress_bar_metrics.get("least_moved"))

    fitted(Module(), tmp_path, density, Watching())
    history = density.optimizers[0].history
    moved = [min(s.displacement for s in r.stages.values()) for r in history.readings]
    assert list(dict.fromkeys(v for v in shown if v is not None)) == pytest.approx(
        list(dict.fromkeys(moved))[: len(set(shown) - {None})]
    )


@pytest.mark.parametrize("verbose", [True, False])
def test_the_diagnosis_is_printed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], verbose: bool
) -> None:
    density = DensityCallback(every=4, verbose=verbose)
    fitted(Module(), tmp_path, density)
    said = [f"densitylr: {d}" for d in density.optimizers[0].diagnose()]
    assert said
    printed = [x for x in capsys.readouterr().out.splitlines() if x.startswith("densitylr: ")]
    assert printed == (said if verbose else [])


# Beginnings and ends


def test_after_a_fit_nothing_is_left_on_model_and_optimizer(tmp_path: Path) -> None:
    density, module = DensityCallback(every=4), Module()
    run = trainer(tmp_path, density)
    run.fit(module)
    assert not any(m._forward_hooks for m in module.modules())
    (inner,) = run.strategy.optimizers
    assert type(inner) is torch.optim.SGD
    assert not inner._optimizer_step_pre_hooks
    assert "_densitylr" not in vars(inner)
    assert len(density.optimizers[0].history)
    gone = weakref.ref(density.optimizers[0])
    density.optimizers = []
    gc.collect()
    assert gone() is None


def test_a_training_step_that_raises_leaves_nothing(tmp_path: Path) -> None:
    class Raising(Module):
        def training_step(self, batch: Any, i: int) -> Tensor:
            if i == 9:
                raise ZeroDivisionError
            return super().training_step(batch, i)

    density, module = DensityCallback(policy=Fixed({"net.0": 4.0}), every=4), Raising()
    run = trainer(tmp_path, density)
    with pytest.raises(ZeroDivisionError):
        run.fit(module)
    assert not any(m._forward_hooks for m in module.modules())
    assert [g["lr"] for g in run.strategy.optimizers[0].param_groups] == module.rates[0]


def test_sinks_get_every_reading_of_each_fit(tmp_path: Path) -> None:
    class Sink:
        def __init__(self) -> None:
            self.steps: list[int] = []

        def write(self, reading: Any, *_: Any) -> None:
            self.steps.append(reading.step)

        def close(self) -> None: ...

    sink = Sink()
    density = DensityCallback(every=4, sinks=[sink])
    for _ in range(2):
        fitted(Module(), tmp_path, density)
    assert sink.steps == 2 * density.optimizers[0].history.steps.tolist()


def test_several_optimizers_are_the_user_s_to_wrap(tmp_path: Path) -> None:
    class Two(Manual):
        wrap = False

        def configure_optimizers(self) -> Any:
            first, rest = self.net[:3], self.net[3:]
            optimizers = [torch.optim.SGD(part.parameters(), lr=0.1) for part in (first, rest)]
            if self.wrap:
                parts = zip(optimizers, (first, rest), strict=True)
                return [DensityLR(o, part, every=4) for o, part in parts]
            return optimizers

        def training_step(self, batch: Any, _: int) -> None:
            loss = loss_of(self.net, batch)
            for optimizer in self.optimizers():
                optimizer.zero_grad()
            self.manual_backward(loss)
            for optimizer in self.optimizers():
                optimizer.step()

    with pytest.raises(ValueError, match=r"returns 2 optimizers.*DensityLR\(optimizer, part\)"):
        fitted(Two(), tmp_path, DensityCallback())
    module, density = Two(), DensityCallback()
    module.wrap = True
    logger = pl.loggers.CSVLogger(tmp_path)
    fitted(module, tmp_path, density, logger=logger)
    assert [list(o.stages) for o in density.optimizers] == [["0"], ["3", "5"]]
    with open(Path(logger.log_dir) / "metrics.csv", newline="") as file:
        names = next(csv.reader(file))
    assert {"densitylr/0/scale/0", "densitylr/1/scale/5"} <= set(names)


def test_arguments_for_a_wrapper_that_is_there_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="returns a DensityLR already: give it mode, every there"):
        fitted(Wrapping(), tmp_path, DensityCallback("free", every=4))


@pytest.mark.parametrize("kind", [Module, Manual])
def test_a_collapse_is_recovered_from(tmp_path: Path, kind: Any) -> None:
    class Spoiled(kind):  # type: ignore[misc, valid-type]
        def training_step(self, batch: Any, i: int) -> Any:
            x, y = batch
            return super().training_step((x * torch.nan if i == 9 else x, y), i)

    density, module = DensityCallback(every=4, recover=True), Spoiled(1.0)
    with pytest.warns(RuntimeWarning, match="NaN or infinite"):
        fitted(module, tmp_path, density)
    assert [d.kind for d in density.optimizers[0].history.decisions].count("recover") == 1
    assert all(torch.isfinite(p).all() for p in module.parameters())


def test_a_proxy_of_the_wrapper_counts_nothing_on_itself(tmp_path: Path) -> None:
    """In manual optimization `self.optimizers()` is one; zero_grad through it is ours."""

    class WrappingManual(Manual):
        def configure_optimizers(self) -> Any:
            return DensityLR(self.optimizer_of(1.0), self, every=4, recover=True)

    density = DensityCallback()
    fitted(WrappingManual(), tmp_path, density)
    (wrapped,) = density.optimizers
    _, reference = looped(1.0, recover=True)
    assert wrapped.history.readings == reference.history.readings
    assert wrapped.history.decisions == reference.history.decisions


def test_the_older_name_of_lightning_takes_it_too(tmp_path: Path) -> None:
    older = pytest.importorskip("pytorch_lightning")
    parts = {k: v for k, v in vars(Module).items() if not k.startswith("__")}

    def start(self: Any) -> None:
        older.LightningModule.__init__(self)
        self.net, self.factor, self.kind, self.size = net(), 1e-4, "sgd", 24
        self.losses, self.rates = [], []

    module = type("Older", (older.LightningModule,), {**parts, "__init__": start})()
    density = DensityCallback(every=4)
    older.Trainer(
        callbacks=[density],
        accelerator="cpu",
        max_epochs=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        default_root_dir=tmp_path,
    ).fit(module)
    plain, reference = looped()
    assert same(plain.net, module.net)
    assert density.optimizers[0].history.decisions == reference.history.decisions
