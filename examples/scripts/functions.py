"""Functions, argparse, a DataLoader with workers. Ill: a bias so low that no ReLU ever fires."""

import argparse

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset


class Stripes(Dataset):
    """Images with a bright row or column; the label says which."""

    def __len__(self):
        return 512

    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(index)
        image = 0.3 * torch.randn(1, 8, 8, generator=generator)
        label = index % 2
        image[:, 3, :] += 1 - label
        image[:, :, 3] += label
        return image, label


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 8, 3, padding=1)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1)
        self.fc = nn.Linear(8 * 64, 2)

    def forward(self, x):
        x = torch.relu(self.conv1(x))
        x = torch.relu(self.conv2(x))
        return self.fc(x.flatten(1))


def train_epoch(net, loader, opt):
    net.train()
    total = 0.0
    for image, label in loader:
        opt.zero_grad()
        loss = nn.functional.cross_entropy(net(image), label)
        loss.backward()
        opt.step()
        total += loss.item()
    return total / len(loader)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--ill", action="store_true")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--workers", type=int, default=1)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    net = Net()
    if arguments.ill:
        nn.init.constant_(net.conv2.bias, -20.0)
    loader = DataLoader(Stripes(), 32, shuffle=True, num_workers=arguments.workers)
    opt = torch.optim.Adam(net.parameters(), lr=2e-3)
    for _ in range(arguments.epochs):
        loss = train_epoch(net, loader, opt)
    print(repr(loss))


if __name__ == "__main__":
    main()
