"""A loop at the top of the file. Ill: the first layers have a millionth of the head's rate."""

import sys

import torch
from torch import nn

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 3))
early, late = (1e-7, 1e-1) if "--ill" in sys.argv else (1e-1, 1e-1)
groups = [
    {"params": model[0].parameters(), "lr": early},
    {"params": model[2:].parameters(), "lr": late},
]
optimizer = torch.optim.SGD(groups, lr=late, momentum=0.9)

for _ in range(150):
    x = torch.randn(64, 20)
    y = x[:, :3].argmax(1)
    loss = nn.functional.cross_entropy(model(x), y)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()

print(repr(loss.item()))
