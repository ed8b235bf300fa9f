"""Ten networks, small enough for one core, that have as little in common as we could manage."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from experiments.train.tasks.model import ModelConfig, build_model
from experiments.train.tasks.small_data import LENGTH, PIXELS, SYMBOLS

__all__ = ["NETS", "TASKS", "build"]

Activation = Callable[[], nn.Module]


def _mlp(widths: list[int], activation: Activation, dropout: float) -> nn.Module:
    layers: list[nn.Module] = [nn.Flatten()]
    before = PIXELS * PIXELS
    for width in widths:
        layers += [nn.Linear(before, width), activation()]
        layers += [nn.Dropout(dropout)] if dropout else []
        before = width
    return nn.Sequential(*layers, nn.Linear(before, 10))


def _kaiming(model: nn.Module) -> nn.Module:
    """He et al. (2015): without a norm, torch's default would let the signal fade with depth."""
    for parameter in model.parameters():
        if parameter.ndim >= 2:
            nn.init.kaiming_normal_(parameter)
    return model


def mlp_shallow(activation: Activation = nn.ReLU, dropout: float = 0.0) -> nn.Module:
    return _mlp([128], activation, dropout)


def mlp_deep(activation: Activation = nn.ReLU, dropout: float = 0.0) -> nn.Module:
    return _kaiming(_mlp([64] * 7, activation, dropout))


def _cnn(norm: bool, activation: Activation, dropout: float) -> nn.Module:
    layers: list[nn.Module] = []
    before = 1
    for width, stride in ((12, 1), (16, 2), (24, 1), (32, 2)):
        layers.append(nn.Conv2d(before, width, 3, stride, padding=1, bias=not norm))
        layers += [nn.BatchNorm2d(width)] if norm else []
        layers.append(activation())
        before = width
    layers += [nn.Dropout(dropout)] if dropout else []
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(before, 10))


def cnn_plain(activation: Activation = nn.ReLU, dropout: float = 0.0) -> nn.Module:
    return _kaiming(_cnn(False, activation, dropout))


def cnn_bn(activation: Activation = nn.ReLU, dropout: float = 0.0) -> nn.Module:
    return _cnn(True, activation, dropout)


def resnet18_narrow() -> nn.Module:
    return build_model(ModelConfig(name="resnet18", width=0.125))


def resnet18() -> nn.Module:
    return build_model(ModelConfig(name="resnet18"))


class _Block(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, width: int, heads: int, causal: bool, activation: Activation) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 2 * width), activation(), nn.Linear(2 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        n, t, width = x.shape
        parts = self.qkv(self.norm1(x)).view(n, t, 3, self.heads, width // self.heads)
        q, k, v = parts.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        x = x + self.proj(mixed.transpose(1, 2).reshape(n, t, width))
        return x + self.mlp(self.norm2(x))


class _ViT(nn.Module):
    """Patches of 7 × 2 pixels, a class token, and the mean over all tokens to the head."""

    def __init__(self, width: int, depth: int, activation: Activation) -> None:
        super().__init__()
        self.patch = nn.Conv2d(1, width, (7, 2), (7, 2))
        self.token = nn.Parameter(torch.randn(1, 1, width) * 0.02)
        self.position = nn.Parameter(torch.randn(1, 1 + PIXELS, width) * 0.02)
        self.blocks = nn.Sequential(
            *(_Block(width, 4, causal=False, activation=activation) for _ in range(depth))
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patch(x).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.token.expand(len(x), -1, -1), tokens], 1) + self.position
        return self.head(self.norm(self.blocks(tokens)).mean(1))


def vit(activation: Activation = nn.GELU) -> nn.Module:
    return _ViT(32, 3, activation)


class _Mixing(nn.Module):
    """An MLP-Mixer block: over tokens, then over channels."""

    def __init__(self, tokens: int, width: int, activation: Activation) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.tokens = nn.Sequential(nn.Linear(tokens, 32), activation(), nn.Linear(32, tokens))
        self.channels = nn.Sequential(
            nn.Linear(width, 2 * width), activation(), nn.Linear(2 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.tokens(self.norm1(x).transpose(1, 2)).transpose(1, 2)
        return x + self.channels(self.norm2(x))


class _Mixer(nn.Module):
    def __init__(self, width: int, depth: int, activation: Activation) -> None:
        super().__init__()
        self.patch = nn.Conv2d(1, width, 2, 2)
        tokens = (PIXELS // 2) ** 2
        self.blocks = nn.Sequential(*(_Mixing(tokens, width, activation) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patch(x).flatten(2).transpose(1, 2)
        return self.head(self.norm(self.blocks(tokens)).mean(1))


def mixer(activation: Activation = nn.GELU) -> nn.Module:
    return _Mixer(32, 3, activation)


class _Recurrent(nn.Module):
    """Two GRU layers that read an image row by row."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.GRU(PIXELS, width, batch_first=True)
        self.second = nn.GRU(width, width, batch_first=True)
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        rows, _ = self.first(x.squeeze(1))
        rows, _ = self.second(rows)
        return self.head(rows[:, -1])


def gru() -> nn.Module:
    return _Recurrent(64)


class GPT(nn.Module):
    """Decoder-only transformer over symbols; ``[n, t]`` to logits ``[n, symbols, t]``."""

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.symbols = nn.Embedding(len(SYMBOLS), width)
        self.places = nn.Embedding(LENGTH, width)
        self.blocks = nn.Sequential(
            *(_Block(width, 4, causal=True, activation=nn.GELU) for _ in range(depth))
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, len(SYMBOLS))
        for table in (self.symbols, self.places):
            nn.init.normal_(table.weight, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.symbols(x) + self.places(torch.arange(x.shape[1], device=x.device))
        return self.head(self.norm(self.blocks(hidden))).transpose(1, 2)


def gpt() -> nn.Module:
    return GPT(48, 3)


NETS: dict[str, Callable[..., nn.Module]] = {
    f.__name__: f
    for f in (
        mlp_shallow,
        mlp_deep,
        cnn_plain,
        cnn_bn,
        resnet18_narrow,
        resnet18,
        vit,
        mixer,
        gru,
        gpt,
    )
}
TASKS = {name: "text" if name == "gpt" else "digits" for name in NETS}


def build(name: str, seed: int, **options: object) -> nn.Module:
    """A network by name, its weights drawn from ``seed``; the global random state is set by it."""
    torch.manual_seed(seed)
    return NETS[name](**options)
