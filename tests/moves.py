"""``python -m tests.moves``: how far one follows a reading, a step, a diagnosis through the files.

Files are those of densitylr in which a function is called. A move is a call, or a return, between
two of them: from the nearest function of densitylr that is waiting to the one that begins, and
back. Where torch calls a hook, and no function of densitylr is waiting, there is no move.

The first stage is starved, and what is wrong with it is asked for at the end. Of 40 steps, each
from the forward to the end of ``optimizer.step()``, the one with a reading and the one without
that have the most moves are shown.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import torch
import torchvision
from torch import nn

from densitylr import DensityLR
from tests.support import ROOT, host_runs

HERE = str(ROOT / "densitylr")


@dataclass
class Trail:
    """The files entered, and the number of moves between them, while something is done."""

    files: set[str] = field(default_factory=set)
    moves: int = 0

    def see(self, frame: FrameType, event: str, _: Any) -> None:
        file = frame.f_code.co_filename
        if event not in ("call", "return") or not file.startswith(HERE):
            return
        self.files.add(file)
        waiting = frame.f_back
        while waiting is not None and not waiting.f_code.co_filename.startswith(HERE):
            waiting = waiting.f_back
        self.moves += waiting is not None and waiting.f_code.co_filename != file


def trail(act: Callable[..., object], *arguments: object) -> Trail:
    found = Trail()
    sys.setprofile(found.see)
    try:
        act(*arguments)
    finally:
        sys.setprofile(None)
    return found


def step(model: nn.Module, opt: DensityLR, inputs: torch.Tensor) -> None:
    opt.zero_grad()
    nn.functional.cross_entropy(model(inputs), torch.arange(len(inputs)) % 3).backward()
    opt.step()


def show(name: str, model: nn.Module, groups: list[dict[str, Any]], inputs: torch.Tensor) -> None:
    opt = DensityLR(torch.optim.SGD(groups, momentum=0.9), model)
    found: dict[str, list[Trail]] = {"a reading": [], "a step without": []}
    for _ in range(40):
        before = len(opt.history.steps)
        seen = trail(step, model, opt, inputs)
        found["a reading" if len(opt.history.steps) > before else "a step without"].append(seen)
    found["diagnose()"] = [trail(opt.diagnose)]
    for what, trails in found.items():
        most = max(trails, key=lambda seen: seen.moves)
        print(f"{name:<12}{what:<16}{len(most.files):>3} files{most.moves:>5} moves")


def main() -> None:
    torch.set_num_threads(1)
    mlp = host_runs.mlp()
    show("MLP", mlp, host_runs.groups(mlp, host_runs.STARVED), torch.randn(32, 20))
    net = torchvision.models.resnet18(num_classes=3)
    first = {"params": [*net.conv1.parameters(), *net.bn1.parameters()], "lr": 1e-7}
    rest = [p for name, p in net.named_children() if name not in ("conv1", "bn1")]
    groups = [first, {"params": nn.ModuleList(rest).parameters(), "lr": 0.01}]
    show("ResNet-18", net, groups, torch.randn(32, 3, 32, 32))


if __name__ == "__main__":
    main()
