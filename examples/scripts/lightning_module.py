# ruff: noqa: B905
"""A LightningModule and a Trainer. Ill: rates that shrink a hundredfold from stage to stage."""

import sys
import warnings

import lightning
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

warnings.filterwarnings("ignore", module="lightning")


class Classifier(lightning.LightningModule):
    def __init__(self, ill):
        super().__init__()
        self.ill = ill
        self.first = nn.Linear(20, 64)
        self.second = nn.Linear(64, 64)
        self.last = nn.Linear(64, 3)

    def training_step(self, batch, _):
        x, y = batch
        x = torch.relu(self.first(x))
        x = torch.relu(self.second(x))
        self.loss = nn.functional.cross_entropy(self.last(x), y)
        return self.loss

    def configure_optimizers(self):
        rates = (1e-7, 1e-1, 1e-1) if self.ill else (1e-1, 1e-1, 1e-1)
        parts = (self.first, self.second, self.last)
        groups = [{"params": p.parameters(), "lr": r} for p, r in zip(parts, rates)]
        return torch.optim.SGD(groups, lr=0.1, momentum=0.9)


def main():
    lightning.seed_everything(0, verbose=False)
    x = torch.randn(1024, 20)
    loader = DataLoader(TensorDataset(x, x[:, :3].argmax(1)), batch_size=64, shuffle=True)
    model = Classifier("--ill" in sys.argv)
    trainer = lightning.Trainer(
        max_epochs=8,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, loader)
    print(repr(model.loss.item()))


if __name__ == "__main__":
    main()
