"""Gradient accumulation, autocast, a schedule. Ill: the optimizer was not given the encoder."""

import sys

import torch
from torch import nn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = nn.Linear(20, 128)
        self.norm = nn.LayerNorm(128)
        self.middle = nn.Linear(128, 128)
        self.head = nn.Linear(128, 3)

    def forward(self, x):
        x = torch.relu(self.norm(self.encoder(x)))
        return self.head(torch.relu(self.middle(x)))


def main():
    torch.manual_seed(0)
    model = Net()
    trained = [*model.middle.parameters(), *model.head.parameters()]
    optimizer = torch.optim.AdamW(
        trained if "--ill" in sys.argv else model.parameters(),
        lr=3e-3,
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-2, total_steps=80)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    for _ in range(80):
        for _ in range(4):
            x = torch.randn(32, 20)
            with torch.autocast("cpu", torch.bfloat16):
                loss = nn.functional.cross_entropy(model(x), x[:, :3].argmax(1)) / 4
            scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(trained, 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
    print(repr(loss.item()))


if __name__ == "__main__":
    main()
