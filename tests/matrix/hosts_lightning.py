"""DensityCallback in a Lightning Trainer: flat rates as without it, starved ones as in a loop."""

from __future__ import annotations

import logging
import tempfile
import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from densitylr import DensityLR, Sink
from tests.matrix.cells import Cell, need
from tests.support.fixed import batches, loss_of, net, one_step, same

DATA = batches(24)
# About runs as tiny as these, and the Trainer's own call of torch.utils._pytree.
ADVICE = (
    "The 'train_dataloader' does not have many workers",
    "`isinstance.treespec, LeafSpec.` is deprecated",
)
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bf16-mixed": {"precision": "bf16-mixed"},
    "bf16-true": {"precision": "bf16-true"},
    "16-mixed": {"precision": "16-mixed"},
    "clipping": {"gradient_clip_val": 0.1},
    "accumulation": {"accumulate_grad_batches": 3},
}


def cells() -> list[Cell]:
    kinds: dict[str, dict[str, bool]] = {
        "automatic": {},
        "manual": {"manual": True},
        "DensityLR from configure_optimizers": {"wrap": True},
    }
    rows = {"flat rates": _flat, "a starved stage": _starved}
    return [
        Cell("lightning", f"{kind}, {name}", column, partial(run, **how, **options))
        for kind, how in kinds.items()
        for name, run in rows.items()
        for column, options in OPTIONS.items()
    ]


def optimizer_of(model: nn.Sequential, factor: float) -> torch.optim.Optimizer:
    """The first stage with ``factor`` of the rate."""
    groups = [
        {"params": list(model[:3].parameters()), "lr": 0.1 * factor},
        {"params": list(model[3:].parameters())},
    ]
    return torch.optim.SGD(groups, lr=0.1, momentum=0.9)


def looped(factor: float, sinks: Sequence[Sink] = ()) -> tuple[nn.Module, DensityLR]:
    """A run in a loop of one's own."""
    model = net()
    optimizer = DensityLR(optimizer_of(model, factor), model, every=4)
    for sink in sinks:
        optimizer.history.subscribe(sink)
    for batch in DATA:
        one_step(model, optimizer, batch)
    return model, optimizer


def _fitted(
    factor: float, callbacks: Sequence[Any], *, manual: bool = False, wrap: bool = False, **run: Any
) -> Any:
    pl = need("lightning.pytorch", "lightning")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)

    class Module(pl.LightningModule):
        automatic_optimization = not manual

        def __init__(self) -> None:
            super().__init__()
            self.net = net()

        def training_step(self, batch: Any, _: int) -> Tensor:
            loss = loss_of(self.net, batch)
            if manual:
                self.optimizers().zero_grad()
                self.manual_backward(loss)
                self.optimizers().step()
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            inner = optimizer_of(self.net, factor)
            return DensityLR(inner, self.net, every=4) if wrap else inner

    module = Module()
    if run.get("precision") == "16-mixed":  # the Trainer itself takes it on a GPU only
        plugins = need("lightning.pytorch.plugins.precision")
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        run = {"plugins": [plugins.MixedPrecision("16-mixed", "cpu", scaler)]}
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        for advice in ADVICE:
            warnings.filterwarnings("ignore", message=advice)
        trainer = pl.Trainer(
            **{
                "accelerator": "cpu",
                "devices": 1,
                "max_epochs": 1,
                "logger": False,
                "enable_progress_bar": False,
                "enable_model_summary": False,
                "enable_checkpointing": False,
                "default_root_dir": Path(folder),
                "callbacks": list(callbacks),
                **run,
            }
        )
        trainer.fit(module, torch.utils.data.DataLoader(DATA, batch_size=None))
    return module.cpu()


def _callback(wrap: bool) -> Any:
    need("lightning", "lightning")
    from densitylr.integrations.lightning import DensityCallback

    return DensityCallback(verbose=False) if wrap else DensityCallback(verbose=False, every=4)


def _flat(manual: bool = False, wrap: bool = False, **options: Any) -> str | None:
    density = _callback(wrap)
    refused = need("lightning.pytorch.utilities.exceptions").MisconfigurationException
    try:
        bare = _fitted(1.0, [], manual=manual, **options)
    except refused as error:
        return f"by Lightning itself: {error}"
    ours = _fitted(1.0, [density], manual=manual, wrap=wrap, **options)
    assert same(bare, ours)
    assert len(density.optimizers[0].history)
    return None


def _starved(manual: bool = False, wrap: bool = False, **options: Any) -> str | None:
    refused = _flat(manual, wrap, **options)
    if refused:
        return refused
    density = _callback(wrap)
    module = _fitted(1e-4, [density], manual=manual, wrap=wrap, **options)
    (optimizer,) = density.optimizers
    scale = optimizer.history.series(optimizer.history.stages[0], "scale")[-1]
    if "accumulate_grad_batches" in options:
        assert scale >= 4.0  # one raise at least in its eight steps
    else:
        assert scale > 100
    if not options:
        assert same(module.net, looped(1e-4)[0])
    return None
