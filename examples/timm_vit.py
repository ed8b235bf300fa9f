"""timm: a ViT trained from scratch under a layer decay that is meant for fine-tuning.

``pip install 'densitylr[timm]'``, then ``python examples/timm_vit.py``. It runs without a network.
"""

import timm
import torch
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from torch import nn

from densitylr import DensityLR

SIZE, STEPS = 16, 300


def images(examples: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Stripes in noise, at any phase: horizontal, vertical, or along one of the diagonals?"""
    generator = torch.Generator().manual_seed(seed)
    label = torch.randint(4, (examples,), generator=generator)
    phase = 2 * torch.pi * torch.rand(examples, 1, 1, generator=generator)
    directions = torch.tensor([[1, 0], [0, 1], [1, 1], [1, -1]])[label]
    rows, columns = torch.meshgrid(torch.arange(SIZE), torch.arange(SIZE), indexing="ij")
    along = directions[:, 0, None, None] * rows + directions[:, 1, None, None] * columns
    stripes = torch.sin(torch.pi / 2 * along + phase)
    noise = torch.randn(examples, SIZE, SIZE, generator=generator)
    return (stripes + noise).unsqueeze(1), label


def train(layer_decay: float, controlled: bool) -> tuple[float, DensityLR | None]:
    """Accuracy on other images."""
    torch.manual_seed(0)
    model = timm.create_model(
        "vit_tiny_patch16_224",
        pretrained=False,
        img_size=SIZE,
        patch_size=4,
        in_chans=1,
        embed_dim=48,
        depth=4,
        num_heads=3,
        num_classes=4,
    )
    optimizer = create_optimizer_v2(
        model, "adamw", lr=2e-3, weight_decay=0.05, layer_decay=layer_decay
    )
    density = DensityLR(optimizer, model) if controlled else None  # the one line
    optimizer = density or optimizer
    schedule = CosineLRScheduler(optimizer, t_initial=STEPS, warmup_t=10, t_in_epochs=False)
    x, y = images(32 * STEPS // 2, seed=1)
    for update in range(STEPS):
        rows = torch.arange(32) + 32 * update % len(x)
        nn.functional.cross_entropy(model(x[rows]), y[rows]).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step_update(update + 1)
    x, y = images(1000, seed=2)
    with torch.no_grad():
        right = (model.eval()(x).argmax(1) == y).float().mean()
    return float(right), density


def main() -> None:
    flat, _ = train(1.0, controlled=False)
    starved, _ = train(0.02, controlled=False)
    repaired, density = train(0.02, controlled=True)
    print(f"accuracy: no decay {flat:.3f}, layer decay {starved:.3f}, with us {repaired:.3f}")
    assert density is not None
    print(*density.diagnose(), sep="\n")


if __name__ == "__main__":
    main()
