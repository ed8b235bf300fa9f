"""The network that a config asks for, and what tells two networks apart."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torchvision
from omegaconf import MISSING
from torch import nn

from experiments.train.tasks.fresh import mlp, reader

__all__ = ["ModelConfig", "build_model", "fingerprint"]


@dataclass
class ModelConfig:
    name: str = MISSING  # resnet18 | mlp | reader
    width: float = 1.0  # share of the usual channels


def build_model(config: ModelConfig) -> nn.Module:
    """torchvision's ResNet-18 from scratch, ten classes, for images of one channel; or the network
    of a fresh task.
    """
    if config.name != "resnet18":
        return mlp() if config.name == "mlp" else reader()
    planes = max(1, round(64 * config.width))
    model = torchvision.models.resnet18(weights=None, num_classes=10)
    if planes != 64:
        model = _narrow_resnet(planes)
    model.conv1 = nn.Conv2d(1, planes, kernel_size=7, stride=2, padding=3, bias=False)
    nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
    return model


def _narrow_resnet(planes: int) -> nn.Module:
    """The same network with ``planes`` instead of 64 channels in the first stage."""

    class Narrow(torchvision.models.ResNet):  # type: ignore[misc]
        def _make_layer(
            self, block: type[nn.Module], width: int, blocks: int, stride: int = 1, **kwargs: bool
        ) -> nn.Module:
            if width == 64:  # the first stage: conv1 and bn1 are built for 64 channels
                self.inplanes = planes
            return super()._make_layer(block, width * planes // 64, blocks, stride, **kwargs)

    model = Narrow(torchvision.models.resnet.BasicBlock, [2, 2, 2, 2], num_classes=10)
    model.bn1 = nn.BatchNorm2d(planes)
    model.fc = nn.Linear(8 * planes, 10)
    return model


def fingerprint(model: nn.Module) -> str:
    """SHA-256 of every parameter and buffer, bit for bit."""
    digest = hashlib.sha256()
    for name, value in model.state_dict().items():
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
