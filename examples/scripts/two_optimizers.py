"""One network, an optimizer for its body and one for its head. Ill: the body's rate is tiny."""

import sys

import torch
from torch import nn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh())
        self.head = nn.Linear(64, 4)

    def forward(self, x):
        return self.head(self.body(x))


def main(ill):
    torch.manual_seed(0)
    net = Net()
    body = torch.optim.SGD(net.body.parameters(), lr=1e-7 if ill else 0.1, momentum=0.9)
    head = torch.optim.Adam(net.head.parameters(), lr=1e-2)
    for _ in range(150):
        x = torch.randn(64, 16)
        loss = nn.functional.cross_entropy(net(3 * x), x[:, :4].argmax(1))
        body.zero_grad()
        head.zero_grad()
        loss.backward()
        body.step()
        head.step()
    print(repr(loss.item()))


if __name__ == "__main__":
    main("--ill" in sys.argv)
