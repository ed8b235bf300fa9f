"""fastai: discriminative rates, ``slice(1e-6, 3e-3)``, on a ResNet-like net trained from scratch.

``pip install 'densitylr[fastai]'``, then ``python examples/fastai_learner.py``. It runs without a
network: the images are bars in noise.
"""

import random

import torch
from fastai.basics import DataLoader, DataLoaders, Learner, accuracy
from fastai.callback.progress import ProgressCallback
from torch import nn

from densitylr.integrations.fastai import DensityCallback

SIZE, CLASSES = 16, 4
RATES = slice(1e-6, 3e-3)


def images(examples: int, seed: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """A horizontal, vertical, falling or rising bar somewhere in a noisy picture."""
    generator = torch.Generator().manual_seed(seed)
    x = 0.7 * torch.randn(examples, 1, SIZE, SIZE, generator=generator)
    y = torch.randint(CLASSES, (examples,), generator=generator)
    starts = torch.randint(SIZE - 5, (examples, 2), generator=generator).tolist()
    steps = ((0, 1), (1, 0), (1, 1), (-1, 1))
    for image, label, (row, column) in zip(x, y.tolist(), starts, strict=True):
        down, right = steps[label]
        top = row + 5 if down < 0 else row
        for i in range(6):
            image[0, top + i * down, column + i * right] += 2.0
    return list(zip(x, y, strict=True))


def block(inputs: int, outputs: int, stride: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()
    )


def train(rates: float | slice, callbacks: list[DensityCallback]) -> float:
    """Accuracy on other images after three epochs of the one-cycle policy."""
    torch.manual_seed(0)
    random.seed(0)  # fastai's loaders shuffle by it
    loaders = DataLoaders(
        DataLoader(images(2000, seed=1), bs=50, shuffle=True, num_workers=0),
        DataLoader(images(1000, seed=2), bs=200, num_workers=0),
        device="cpu",
    )
    model = nn.Sequential(
        block(1, 16, 1),
        block(16, 32, 2),
        block(32, 32, 2),
        nn.Sequential(nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(32, CLASSES)),
    )
    learn = Learner(
        loaders,
        model,
        loss_func=nn.CrossEntropyLoss(),
        metrics=accuracy,
        splitter=lambda m: [list(part.parameters()) for part in m],
        cbs=callbacks,  # the one line
    )
    learn.remove_cb(ProgressCallback)
    learn.fit_one_cycle(3, rates)
    return learn.final_record[2]


def main() -> None:
    flat = train(RATES.stop, [])
    sliced = train(RATES, [])
    callback = DensityCallback()
    repaired = train(RATES, [callback])
    print(f"accuracy: one rate {flat:.3f}, slice {sliced:.3f}, slice with us {repaired:.3f}")
    assert callback.controller is not None
    print(*callback.controller.diagnose(), sep="\n")


if __name__ == "__main__":
    main()
