# ruff: noqa: B905
"""A generator and a discriminator, and an EMA copy. Ill: the generator's rate is far too low."""

import copy
import sys

import torch
from torch import nn

torch.manual_seed(0)
G = nn.Sequential(
    nn.Linear(8, 64), nn.LeakyReLU(0.2), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 2)
)
D = nn.Sequential(
    nn.Linear(2, 64), nn.LeakyReLU(0.2), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 1)
)
ema = copy.deepcopy(G).requires_grad_(False)
opt_d = torch.optim.Adam(D.parameters(), lr=2e-3, betas=(0.5, 0.99))
opt_g = torch.optim.Adam(
    G.parameters(), lr=1e-10 if "--ill" in sys.argv else 2e-3, betas=(0.5, 0.99)
)
bce = nn.BCEWithLogitsLoss()
one, zero = torch.ones(64, 1), torch.zeros(64, 1)

for _ in range(150):
    angle = torch.rand(64) * 6.2832
    real = 2 * torch.stack([angle.cos(), angle.sin()], 1)
    fake = G(torch.randn(64, 8))

    loss_d = bce(D(real), one) + bce(D(fake.detach()), zero)
    opt_d.zero_grad()
    loss_d.backward()
    opt_d.step()

    loss_g = bce(D(fake), one)
    opt_g.zero_grad()
    loss_g.backward()
    opt_g.step()
    with torch.no_grad():
        for slow, fast in zip(ema.parameters(), G.parameters()):
            slow.lerp_(fast, 0.01)

print(repr((loss_d.item(), loss_g.item())))
