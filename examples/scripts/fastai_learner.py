# ruff: noqa: B905
"""A fastai Learner on a torch optimizer. Ill: discriminative rates, on a net made from scratch."""

import sys
from functools import partial

import torch
from fastai.callback.schedule import *  # noqa: F403
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.learner import Learner
from fastai.optimizer import OptimWrapper
from fastai.torch_core import params
from torch import nn


def splitter(model):
    return [params(model[0]), params(model[2]), params(model[4])]


def main():
    torch.manual_seed(0)
    x = torch.randn(1024, 20)
    pairs = list(zip(x, x[:, :3].argmax(1)))
    loaders = DataLoaders(DataLoader(pairs, bs=64, shuffle=False), DataLoader(pairs[:64], bs=64))
    model = nn.Sequential(
        nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 3)
    )
    learner = Learner(
        loaders,
        model,
        loss_func=nn.CrossEntropyLoss(),
        opt_func=partial(OptimWrapper, opt=partial(torch.optim.SGD, momentum=0.9)),
        splitter=splitter,
    )
    rate = slice(1e-9, 1e-1) if "--ill" in sys.argv else 1e-1
    with learner.no_bar(), learner.no_logging():
        learner.fit(8, rate)
        print(repr(learner.validate()[0]))


if __name__ == "__main__":
    main()
