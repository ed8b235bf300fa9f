"""What the networks learn: digits of 14 × 14 pixels, and a text that is made up on the spot."""

from __future__ import annotations

import functools
import random

import torch
import torch.nn.functional as F

from experiments.train.tasks.data import DataConfig, Dataset, load

__all__ = ["LENGTH", "PIXELS", "SYMBOLS", "task"]

PIXELS = 14
LENGTH = 32
SYMBOLS = "abcdefghijklmnopqrstuvwxyz .,()0123456789"


@functools.cache
def task(name: str) -> Dataset:
    """``digits``: the bundled MNIST images, each 2 × 2 pixels averaged, ``[n, 1, 14, 14]``.
    ``text``: symbols ``[n, 32]`` and for each the next one, of a made-up language.
    """
    if name == "text":
        return _text()
    data = load(DataConfig(name="mnist-sample"))
    return Dataset(
        F.avg_pool2d(data.train_x, 2), data.train_y, F.avg_pool2d(data.test_x, 2), data.test_y
    )


def _text(seed: int = 0, sentences: int = 6000) -> Dataset:
    """Sentences of a small grammar: agreement at a distance, brackets that close, sums that add up.

    A fifth of the windows, none of which overlaps a window of the rest, are the test set.
    """
    draw = random.Random(seed)
    syllables = ["ka", "to", "mi", "re", "su", "lo", "ne", "vi", "da", "pu"]
    words = ["".join(draw.choices(syllables, k=draw.choice((2, 2, 3)))) for _ in range(60)]
    nouns, verbs, others = words[:24], words[24:42], words[42:]

    def phrase(depth: int) -> str:
        plural = draw.random() < 0.5
        noun = draw.choice(nouns) + ("s" if plural else "")
        inside = f" ({phrase(depth - 1)})" if depth and draw.random() < 0.2 else ""
        verb = draw.choice(verbs) + ("" if plural else "t")
        return f"{noun}{inside} {verb} {draw.choice(others)}"

    def total() -> str:
        a, b = draw.randrange(10), draw.randrange(10)
        return f"{a}, {b}, {a + b}"

    text = " ".join(f"{total() if draw.random() < 0.2 else phrase(1)}." for _ in range(sentences))
    codes = torch.tensor([SYMBOLS.index(c) for c in text])
    windows = codes[: (len(codes) - 1) // LENGTH * LENGTH].view(-1, LENGTH)
    following = codes[1 : 1 + windows.numel()].view(-1, LENGTH)
    cut = len(windows) * 4 // 5
    return Dataset(windows[:cut], following[:cut], windows[cut:], following[cut:])
