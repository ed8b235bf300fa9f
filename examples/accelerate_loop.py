"""accelerate: `DensityLR` goes through ``prepare`` with everything else.

``pip install 'densitylr[huggingface]'``, then ``python examples/accelerate_loop.py``. It runs
without a network.
"""

import torch
from accelerate import Accelerator
from torch import nn

from densitylr import DensityLR

BASE, STEPS = 3e-3, 400


def task(examples: int, seed: int) -> torch.utils.data.TensorDataset:
    """Four classes: the sign of a product of two inputs, and that of a third input."""
    x = torch.randn(examples, 16, generator=torch.Generator().manual_seed(seed))
    return torch.utils.data.TensorDataset(x, (x[:, 0] * x[:, 1] > 0) + 2 * (x[:, 2] > 0).long())


def train(factor: float, controlled: bool) -> tuple[float, DensityLR | None]:
    """Accuracy on other examples; each layer learns at ``factor`` times the rate of the next."""
    torch.manual_seed(0)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = nn.Sequential(
        nn.Sequential(nn.Linear(16, 64), nn.LayerNorm(64), nn.ReLU()),
        nn.Sequential(nn.Linear(64, 64), nn.LayerNorm(64), nn.ReLU()),
        nn.Sequential(nn.Linear(64, 64), nn.LayerNorm(64), nn.ReLU()),
        nn.Linear(64, 4),
    )
    groups = [
        {"params": part.parameters(), "lr": BASE * factor ** (3 - i)}
        for i, part in enumerate(model)
    ]
    optimizer = torch.optim.AdamW(groups)
    density = DensityLR(optimizer, model) if controlled else None  # before prepare
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(density or optimizer, STEPS)
    loader = torch.utils.data.DataLoader(task(6400, seed=1), batch_size=32, shuffle=True)
    net, prepared, schedule, loader = accelerator.prepare(
        model, density or optimizer, schedule, loader
    )
    for _ in range(4):
        for x, y in loader:
            with accelerator.accumulate(net):
                loss = nn.functional.cross_entropy(net(x), y)
                accelerator.backward(loss)
                prepared.step()
                schedule.step()
                prepared.zero_grad()
    x, y = task(2000, seed=2).tensors
    with torch.no_grad():
        right = (net.eval()(x).argmax(1) == y).float().mean()
    return float(right), density


def main() -> None:
    flat, _ = train(1.0, controlled=False)
    starved, _ = train(0.01, controlled=False)
    repaired, density = train(0.01, controlled=True)
    print(f"accuracy: one rate {flat:.3f}, layer-wise rates {starved:.3f}, with us {repaired:.3f}")
    assert density is not None
    print(*density.diagnose(), sep="\n")


if __name__ == "__main__":
    main()
