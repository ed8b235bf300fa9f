"""Draw the bundled sample: ``python -m experiments.train.tasks.make_sample ROOT``.

ROOT holds the whole of MNIST.
"""

from __future__ import annotations

import argparse
import gzip
from pathlib import Path

import numpy as np
import torch
from torchvision.datasets import MNIST

from experiments.train.tasks.data import SAMPLE

SEED = 20240607
SIZES = {True: ("train", 10_000), False: ("t10k", 2_000)}


def write_idx(path: Path, values: torch.Tensor) -> None:
    """Write uint8 values as a gzipped IDX file, the format of MNIST's own files."""
    header = bytes([0, 0, 8, values.ndim]) + b"".join(n.to_bytes(4, "big") for n in values.shape)
    body = header + values.to(torch.uint8).numpy().tobytes()
    path.write_bytes(gzip.compress(body, compresslevel=9, mtime=0))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("root", help="a folder with MNIST/raw as torchvision lays it out")
    root = parser.parse_args().root
    raw = SAMPLE / "MNIST" / "raw"
    raw.mkdir(parents=True, exist_ok=True)
    for train, (prefix, size) in SIZES.items():
        whole = MNIST(root, train=train)
        chosen = np.random.default_rng(SEED).permutation(len(whole))[:size]
        write_idx(raw / f"{prefix}-images-idx3-ubyte.gz", whole.data[chosen])
        write_idx(raw / f"{prefix}-labels-idx1-ubyte.gz", whole.targets[chosen])


if __name__ == "__main__":
    main()
