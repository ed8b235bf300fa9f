"""Small training runs inside other people's loops, each with rates of the caller's choice."""

from __future__ import annotations

import copy
import importlib
import random
import warnings
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from tests.matrix.cells import need

FLAT = (0.01, 0.01, 0.01)
STARVED = (1e-7, 0.01, 0.01)


def seed(value: int = 0) -> None:
    torch.manual_seed(value)
    random.seed(value)


def task(examples: int = 256) -> tuple[Tensor, Tensor]:
    x = torch.randn(examples, 20, generator=torch.Generator().manual_seed(7))
    return x, (x[:, 0] > 0).long() + (x[:, 1] > 0).long()


def mlp() -> nn.Sequential:
    """Three stages: 0, 2, 4."""
    seed(1)
    return nn.Sequential(
        nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 3)
    )


def layers(model: nn.Module) -> list[list[nn.Parameter]]:
    """The parameters of each of its three stages."""
    return [list(c.parameters()) for c in model.children() if any(True for _ in c.parameters())]


def groups(model: nn.Module, rates: Sequence[float]) -> list[dict[str, Any]]:
    return [{"params": p, "lr": r} for p, r in zip(layers(model), rates, strict=True)]


# fastai


def fastai() -> ModuleType:
    with warnings.catch_warnings():
        # On import fastai uses what torch and pandas have deprecated since.
        warnings.filterwarnings("ignore", r"`torch\.jit\.script")
        warnings.filterwarnings("ignore", "The 'mode.chained_assignment' option is deprecated")
        need("fastai", "fastai")
        return importlib.import_module("fastai.basics")


class Examples(list):  # type: ignore[type-arg]
    def new_empty(self) -> Examples:
        """What an exported learner keeps of its data."""
        return Examples()


def learner(opt_func: Any, cbs: Sequence[Any] = (), *, path: Path | str = ".", **options: Any):
    """A quiet learner over `mlp` and `task`, its batches always in the same order."""
    basics = fastai()
    from fastai.callback.progress import ProgressCallback

    seed()
    data = Examples(zip(*task(), strict=True))
    loaders = [basics.DataLoader(data, bs=32, num_workers=0, device="cpu") for _ in range(2)]
    options = {"splitter": layers, **options}
    made = basics.Learner(
        basics.DataLoaders(*loaders, device="cpu"),
        mlp(),
        loss_func=nn.CrossEntropyLoss(),
        opt_func=opt_func,
        cbs=list(cbs),
        path=Path(path),
        **options,
    )
    made.remove_cb(ProgressCallback)
    made.logger = lambda _: None
    return made


# Hugging Face


def bert() -> nn.Module:
    """A small untrained transformer; its stages are the embeddings, three layers, pooler, head."""
    transformers = need("transformers", "huggingface")
    seed(1)
    config = transformers.BertConfig(
        vocab_size=32,
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=16,
        num_labels=2,
    )
    return transformers.BertForSequenceClassification(config)


def sentences(examples: int = 256) -> list[dict[str, Tensor]]:
    """Whether more than two of twelve tokens are among the first few."""
    tokens = torch.randint(2, 32, (examples, 12), generator=torch.Generator().manual_seed(3))
    labels = ((tokens < 8).sum(1) > 2).long()
    return [
        {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": label}
        for ids, label in zip(tokens, labels, strict=True)
    ]


def halves(model: nn.Module, rates: Sequence[float]) -> list[dict[str, Any]]:
    """The first layer at one rate, all others at another."""
    first = list(model.bert.encoder.layer[0].parameters())
    own = {id(p) for p in first}
    rest = [p for p in model.parameters() if id(p) not in own]
    return [{"params": p, "lr": r} for p, r in zip((first, rest), rates, strict=True)]


def trainer(
    folder: Path, callbacks: Sequence[Any] = (), optimizer: Any = None, **arguments: Any
) -> Any:
    """A quiet ``Trainer`` of 24 steps; ``optimizer`` makes one from the model."""
    transformers = need("transformers", "huggingface")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    model = bert()
    options = {
        "max_steps": 24,
        "learning_rate": 3e-3,
        "per_device_train_batch_size": 32,
        "logging_steps": 8,
        "save_strategy": "no",
        **arguments,
    }
    made = transformers.Trainer(
        model=model,
        args=transformers.TrainingArguments(
            str(folder), use_cpu=True, report_to=[], disable_tqdm=True, **options
        ),
        train_dataset=sentences(),
        callbacks=list(callbacks),
        optimizers=(None if optimizer is None else optimizer(model), None),
    )
    made.remove_callback(transformers.PrinterCallback)
    return made


# accelerate


def forget_accelerator() -> None:
    """accelerate's settings, precision and accumulation, are those of the process."""
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(True)
    GradientState._reset_state()


class AccelerateRun:
    """`mlp` under accelerate: what ``prepare`` returns, and what it was given.

    Args:
        rates: one for each stage.
        wrap: made of the optimizer and the model.
        late: it is made of what is prepared already.
        **options: as for ``Accelerator``.
    """

    def __init__(
        self, rates: Sequence[float] = FLAT, wrap: Any = None, *, late: bool = False, **options: Any
    ) -> None:
        need("accelerate", "huggingface")
        from accelerate import Accelerator

        self.accelerator = Accelerator(cpu=True, **options)
        model = mlp()
        self.inner = torch.optim.AdamW(groups(model, rates))
        self.density = wrap(self.inner, model) if wrap is not None and not late else None
        data = torch.utils.data.TensorDataset(*task())
        optimizer = self.density or self.inner
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 24)
        loader = torch.utils.data.DataLoader(data, batch_size=32)
        self.model, self.optimizer, self.schedule, self.loader = self.accelerator.prepare(
            model, optimizer, schedule, loader
        )
        if wrap is not None and late:
            self.density = wrap(self.optimizer.optimizer, model)

    def train(self, epochs: int = 2) -> AccelerateRun:
        for _ in range(epochs):
            for x, y in self.loader:
                with self.accelerator.accumulate(self.model):
                    loss = nn.functional.cross_entropy(self.model(x), y)
                    self.accelerator.backward(loss)
                    if self.accelerator.sync_gradients:
                        self.accelerator.clip_grad_norm_(self.model.parameters(), 1.0)
                    self.optimizer.step()
                    self.schedule.step()
                    self.optimizer.zero_grad()
        return self


# timm


def vit() -> nn.Module:
    """A ViT for 12 × 12 images of one channel; its stages are patch_embed, three blocks, head."""
    timm = need("timm", "timm")
    seed(1)
    return timm.create_model(
        "vit_tiny_patch16_224",
        pretrained=False,
        img_size=12,
        patch_size=4,
        in_chans=1,
        embed_dim=32,
        depth=3,
        num_heads=2,
        num_classes=2,
    )


def images(examples: int = 256) -> tuple[Tensor, Tensor]:
    """Is the left half brighter than the right?"""
    x = torch.randn(examples, 1, 12, 12, generator=torch.Generator().manual_seed(7))
    return x, (x[..., :6].mean((1, 2, 3)) > x[..., 6:].mean((1, 2, 3))).long()


class TimmRun:
    """`vit` under layer decay and a cosine schedule of timm's, a step a batch.

    Args:
        layer_decay: the factor from each layer to the one before.
        wrap: made of the optimizer and the model before the scheduler is.
    """

    def __init__(self, layer_decay: float, wrap: Any = None, *, opt: str = "adamw") -> None:
        need("timm", "timm")
        from timm.optim import Lookahead, create_optimizer_v2
        from timm.scheduler import CosineLRScheduler

        self.model = vit()
        name = opt.removeprefix("lookahead_")
        self.inner = create_optimizer_v2(
            self.model, name, lr=3e-3, weight_decay=0.05, layer_decay=layer_decay
        )
        self.density = wrap(self.inner, self.model) if wrap is not None else None
        self.optimizer = self.density or self.inner
        if name != opt:  # as create_optimizer_v2 does it
            self.optimizer = Lookahead(self.optimizer)
        self.schedule = CosineLRScheduler(
            self.optimizer, t_initial=40, warmup_t=4, warmup_lr_init=1e-5, t_in_epochs=False
        )
        self.updates = 0
        self.rates: list[list[float]] = []

    def train(self, until: int = 24) -> TimmRun:
        x, y = images()
        self.model.train()
        while self.updates < until:
            rows = torch.arange(32) + 32 * self.updates % len(x)
            nn.functional.cross_entropy(self.model(x[rows]), y[rows]).backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.updates += 1
            self.schedule.step_update(self.updates)
            self.rates.append([group["lr"] for group in self.optimizer.param_groups])
        return self

    def state_dict(self) -> dict[str, Any]:
        parts = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        return copy.deepcopy({**parts, "updates": self.updates})

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.updates = state["updates"]
        self.schedule.step_update(self.updates)
