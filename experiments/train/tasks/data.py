"""MNIST as two tensors, from the bundled sample, a local folder or torchvision's download."""

from __future__ import annotations

import gzip
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from omegaconf import MISSING
from torch import Tensor
from torchvision.datasets import MNIST

from experiments.train.tasks.fresh import brackets, digits

__all__ = ["SAMPLE", "DataConfig", "Dataset", "load"]

SAMPLE = Path(__file__).parent / "mnist_sample"
MEAN, STD = 0.1307, 0.3081  # of the pixels of MNIST's training images, in 0 … 1


@dataclass
class DataConfig:
    name: str = MISSING  # mnist-sample | mnist | digits | brackets
    root: str = "data"
    batch_size: int = 64
    holdout: float = 0.0  # share of the training set held out, and evaluated on (10,000 at most)


@dataclass(frozen=True)
class Dataset:
    """Images float32 ``[n, 1, 28, 28]``, standardised (``[n, 1, 8, 8]`` of the digits; symbols
    int64 ``[n, length]`` of the brackets), and labels int64 ``[n]``.
    """

    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor


def load(config: DataConfig) -> Dataset:
    """Load the data that the config names.

    With ``holdout`` that share of the training set, the same for every seed, is set aside, and
    (at most 10,000 of) its images stand in for the test set, which is not touched.

    Raises:
        FileNotFoundError: there is no such data here and it cannot be downloaded.
    """
    data = _load(config)
    if not config.holdout:
        return data
    n = len(data.train_x)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(0))
    cut = n - round(config.holdout * n)
    kept, held = order[:cut], order[cut : cut + 10_000]
    return Dataset(data.train_x[kept], data.train_y[kept], data.train_x[held], data.train_y[held])


def _load(config: DataConfig) -> Dataset:
    if config.name in ("digits", "brackets"):
        return Dataset(*(digits() if config.name == "digits" else brackets()))
    if config.name == "mnist-sample":
        with tempfile.TemporaryDirectory() as root:
            raw = Path(root) / "MNIST" / "raw"
            raw.mkdir(parents=True)
            for packed in (SAMPLE / "MNIST" / "raw").glob("*.gz"):
                with gzip.open(packed) as source, open(raw / packed.stem, "wb") as target:
                    shutil.copyfileobj(source, target)
            return _tensors(MNIST(root, train=True), MNIST(root, train=False))
    try:
        parts = [MNIST(config.root, train=train, download=True) for train in (True, False)]
    except (RuntimeError, OSError) as error:
        raise FileNotFoundError(
            f"MNIST is not in {config.root!r} and cannot be downloaded ({error}): give a folder "
            "that holds MNIST/raw with data.root=FOLDER, or use the bundled sample with "
            "data=mnist_sample"
        ) from error
    return _tensors(*parts)


def _tensors(train: MNIST, test: MNIST) -> Dataset:
    def images(part: MNIST) -> Tensor:
        return ((part.data.float() / 255 - MEAN) / STD).unsqueeze(1)

    return Dataset(
        images(train),
        train.targets.to(torch.int64),
        images(test),
        test.targets.to(torch.int64),
    )
