"""A loop under accelerate. Ill: a rate that is far too high."""

import sys

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

accelerator = Accelerator(cpu=True)
torch.manual_seed(0)
x = torch.randn(2048, 20)
loader = DataLoader(TensorDataset(x, x[:, :5].sum(1, keepdim=True)), batch_size=64, shuffle=True)
model = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 1))
optimizer = torch.optim.Adam(model.parameters(), lr=3.0 if "--ill" in sys.argv else 3e-3)
model, optimizer, loader = accelerator.prepare(model, optimizer, loader)

for _ in range(4):
    for inputs, targets in loader:
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(inputs), targets)
        accelerator.backward(loss)
        optimizer.step()

accelerator.print(repr(loss.item()))
