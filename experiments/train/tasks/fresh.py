"""Two tasks and two networks that no constant was chosen on, and that need no download."""

from __future__ import annotations

import random

import torch
from torch import Tensor, nn

__all__ = ["brackets", "digits", "mlp", "reader"]

LENGTH = 40
SYMBOLS = "()[]ab"
DEPTHS = 10  # classes: nesting depth 0 … 9


def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The digits of scikit-learn (E. Alpaydin and C. Kaynak, 1998), one in five for testing.

    Returns:
        Images float32 ``[n, 1, 8, 8]``, standardised, and labels int64 ``[n]``, of the training
        and of the test set.

    Raises:
        FileNotFoundError: scikit-learn, which brings them, is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise FileNotFoundError(
            "the digits come with scikit-learn, which is not installed: pip install scikit-learn"
        ) from error
    bunch = load_digits()
    x = torch.tensor(bunch.images, dtype=torch.float32).unsqueeze(1)
    x = (x - x.mean()) / x.std()
    return _split(x, torch.tensor(bunch.target, dtype=torch.int64))


def brackets(n: int = 8000) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Strings of two kinds of brackets and letters, to be sorted by how deep they are nested.

    Every string is balanced, and every depth from 0 to 9 equally frequent.

    Args:
        n: strings, of which one in five is for testing.

    Returns:
        Symbols int64 ``[n, 40]`` and depths int64 ``[n]``, of the training and of the test set.
    """
    draw = random.Random(0)
    made = [_string(draw, i % DEPTHS) for i in range(n)]
    x = torch.tensor([[SYMBOLS.index(c) for c in text] for text in made])
    return _split(x, torch.tensor([i % DEPTHS for i in range(n)]))


def _string(draw: random.Random, depth: int) -> str:
    """A balanced string of `LENGTH` symbols whose brackets are nested ``depth`` deep, no more."""
    text: list[str] = []
    open_: list[str] = []
    reached = 0

    def fits(now: int, deepest: int) -> bool:
        """Whether the way to the depth, if it is not behind, and back to 0 has room."""
        needed = now if deepest == depth else 2 * depth - now
        return needed <= LENGTH - len(text) - 1

    while len(text) < LENGTH:
        now = len(open_)
        choices = ["letter"] * fits(now, reached)
        choices += ["open"] * (2 * (now < depth and fits(now + 1, max(reached, now + 1))))
        choices += ["close"] * (now > 0 and fits(now - 1, reached))
        what = draw.choice(choices)
        if what == "letter":
            text.append(draw.choice("ab"))
        elif what == "open":
            open_.append(draw.choice("(["))
            text.append(open_[-1])
            reached = max(reached, len(open_))
        else:
            text.append({"(": ")", "[": "]"}[open_.pop()])
    return "".join(text)


def _split(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    cut = len(x) * 4 // 5
    return x[order[:cut]], y[order[:cut]], x[order[cut:]], y[order[cut:]]


def mlp() -> nn.Module:
    """Six hidden layers of 96 units and no normalisation, He initialisation."""
    layers: list[nn.Module] = [nn.Flatten()]
    before = 64
    for _ in range(6):
        layers += [nn.Linear(before, 96), nn.ReLU()]
        before = 96
    return _he(nn.Sequential(*layers, nn.Linear(before, 10)))


class _Transposed(nn.Module):
    """``[n, length, channels]`` to ``[n, channels, length]``."""

    def forward(self, x: Tensor) -> Tensor:
        return x.transpose(1, 2)


def reader() -> nn.Module:
    """An embedding and four one-dimensional convolutions, the mean over the string to the head."""
    layers: list[nn.Module] = [nn.Embedding(len(SYMBOLS), 24), _Transposed()]
    before = 24
    for width in (32, 48, 64, 64):
        layers += [nn.Conv1d(before, width, 5, padding=2), nn.ReLU()]
        before = width
    pooled = [nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(before, DEPTHS)]
    return _he(nn.Sequential(*layers, *pooled))


def _he(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv1d):
            nn.init.kaiming_normal_(module.weight)
            nn.init.zeros_(module.bias)  # type: ignore[arg-type]
    return model
