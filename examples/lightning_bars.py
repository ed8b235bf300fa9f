"""A starved first stage in Lightning, and the one line that repairs it.

``python examples/lightning_bars.py`` trains the same network twice on images of bars in noise,
with a rate for the first convolution that is a thousand times too small: as it is, and with
``callbacks=[DensityCallback()]``. It takes less than half a minute on two cores, and needs
``pip install 'densitylr[lightning]'``.
"""

from __future__ import annotations

import logging
import warnings

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from densitylr.integrations.lightning import DensityCallback


def bars(n: int, seed: int) -> TensorDataset:
    """Images ``[n, 1, 16, 16]`` of one bar in noise, and which of four ways it lies."""
    generator = torch.Generator().manual_seed(seed)
    kind = torch.randint(0, 4, (n,), generator=generator)
    shift = torch.randint(-4, 5, (n, 1, 1), generator=generator)
    row = torch.arange(16).view(1, 16, 1).expand(n, 16, 16) - 8
    column = torch.arange(16).view(1, 1, 16).expand(n, 16, 16) - 8
    distances = torch.stack([row, column, row - column, row + column])
    distance = distances[kind, torch.arange(n)] - shift
    bar = (distance == 0).float()
    return TensorDataset((bar + torch.randn(n, 16, 16, generator=generator))[:, None], kind)


class Bars(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Sequential(nn.Conv2d(1, 32, 5), nn.BatchNorm2d(32), nn.ReLU())
        self.conv2 = nn.Sequential(nn.Conv2d(32, 32, 5), nn.BatchNorm2d(32), nn.ReLU())
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(128, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.conv2(self.conv1(x)))

    def training_step(self, batch: list[Tensor], _: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def test_step(self, batch: list[Tensor], i: int) -> None:
        self.log("accuracy", (self(batch[0]).argmax(1) == batch[1]).float().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        rates = {self.conv1: 1e-5, self.conv2: 1e-5, self.head: 1e-2}
        groups = [{"params": m.parameters(), "lr": lr} for m, lr in rates.items()]
        return torch.optim.SGD(groups, momentum=0.9)


def accuracy(*callbacks: DensityCallback) -> float:
    seed_everything(0, verbose=False)
    module = Bars()
    trainer = Trainer(
        callbacks=list(callbacks),
        accelerator="cpu",
        max_epochs=2,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader(bars(4096, 1), batch_size=64, shuffle=True))
    (result,) = trainer.test(module, DataLoader(bars(1024, 2), batch_size=256), verbose=False)
    return result["accuracy"]


def main() -> None:
    for advice in ("does not have many workers", "LeafSpec"):
        warnings.filterwarnings("ignore", message=f".*{advice}")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    fixed = accuracy()
    print(f"the rates as they are: accuracy {fixed:.3f}", flush=True)
    density = DensityCallback()
    repaired = accuracy(density)
    print(f"with DensityCallback:  accuracy {repaired:.3f}")
    (optimizer,) = density.optimizers
    scales = {s: optimizer.history.series(s, "scale")[-1] for s in optimizer.history.stages}
    print("factors on the rates: ", ", ".join(f"{s} ×{x:.4g}" for s, x in scales.items()))


if __name__ == "__main__":
    main()
