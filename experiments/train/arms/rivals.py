"""Rivals that find the learning rate of a whole model by themselves, as their authors advise;
and those that take rates by layer and normalise each layer's step.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterable, Iterator
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

__all__ = ["LAYERWISE", "RIVALS", "evaluation_mode", "layerwise", "rival"]

_SOURCES = {
    "prodigy": ("prodigyopt", "Prodigy"),
    "dadapt-adam": ("dadaptation", "DAdaptAdam"),
    "dadapt-sgd": ("dadaptation", "DAdaptSGD"),
    "schedule-free": ("schedulefree", "AdamWScheduleFree"),
    "dog": ("dog", "DoG"),
    "ldog": ("dog", "LDoG"),
}
RIVALS = tuple(_SOURCES)
LAYERWISE = ("lars", "lamb")

_models: WeakKeyDictionary[Optimizer, ref[nn.Module]] = WeakKeyDictionary()
_averagers: WeakKeyDictionary[Optimizer, Any] = WeakKeyDictionary()


def rival(name: str, model: nn.Module) -> Optimizer:
    """An optimizer over all trainable parameters of ``model``, in one group.

    ``prodigy``: K. Mishchenko and A. Defazio, "Prodigy: An Expeditiously Adaptive
    Parameter-Free Learner" (2023), ``lr=1``. ``dadapt-adam``, ``dadapt-sgd``: A. Defazio and
    K. Mishchenko, "Learning-Rate-Free Learning by D-Adaptation" (2023), ``lr=1``.
    ``schedule-free``: A. Defazio et al., "The Road Less Scheduled" (2024); free of a schedule,
    not of a rate, for which its default of 0.0025 stands in. ``dog``, ``ldog``: M. Ivgi,
    O. Hinder and Y. Carmon, "DoG is SGD's Best Friend" (2023), as a whole and by parameter
    tensor, with the first distance they advise (1e-4 with batch normalisation, 1e-6 without) and
    the polynomial-decay averaging that they ask to be compared with.

    Everything else is at the default of the package. No schedule is set.

    Args:
        name: one of `RIVALS`.
        model: the model, before training.

    Raises:
        ValueError: no such name.
        ImportError: the package is not installed.
    """
    if name not in _SOURCES:
        raise ValueError(f"a rival is one of {', '.join(RIVALS)}, got {name!r}")
    package, kind = _SOURCES[name]
    module = _package(name, package)
    options = {}
    if package == "dog":
        batch_norm = any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules())
        options["reps_rel"] = 1e-4 if batch_norm else 1e-6
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer: Any = getattr(module, kind)(trained, **options)
    if package == "dog":
        averager = module.PolynomialDecayAverager(model)
        optimizer.register_step_post_hook(lambda *_: averager.step())
        _averagers[optimizer] = averager
    if package == "schedulefree":
        optimizer.train()
    _models[optimizer] = ref(model)
    return optimizer


def layerwise(name: str, groups: list[dict[str, Any]], weight_decay: float = 0.0) -> Optimizer:
    """An optimizer that scales each weight's step by the weight's own norm.

    ``lars``: Y. You, I. Gitman and B. Ginsburg, "Large Batch Training of Convolutional Networks"
    (2017); as pytorch_optimizer has it biases and gains, which are no matrices, go by the plain
    rate. ``lamb``: Y. You et al., "Large Batch Optimization for Deep Learning: Training BERT in 76
    minutes" (2020). Both at their defaults but for rates and decay.

    Args:
        name: one of `LAYERWISE`.
        groups: parameter groups, each with its ``lr``.
        weight_decay: of all groups.

    Raises:
        ImportError: the package is not installed.
    """
    module = _package(name, "pytorch_optimizer")
    kind = {"lars": module.LARS, "lamb": module.Lamb}[name]
    optimizer: Optimizer = kind(groups, weight_decay=weight_decay)
    return optimizer


def _package(name: str, package: str) -> Any:
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ImportError(
            f"the rival {name!r} needs the package {package!r}, which is not installed: "
            "pip install 'densitylr[rivals]'"
        ) from error


@contextlib.contextmanager
def evaluation_mode(optimizer: Optimizer, inputs: Iterable[Tensor] = ()) -> Iterator[None]:
    """Put the weights that a rival wants to be judged by into the model, and take them out again.

    Training goes on bit for bit as if nothing had been evaluated. Optimizers that train the
    weights they are judged by are left alone.

    Args:
        optimizer: any optimizer.
        inputs: training batches on which Schedule-Free's batch-norm statistics are taken anew,
            as its authors advise (they suggest 50): the recorded ones belong to other weights.
    """
    averager = _averagers.get(optimizer)
    schedule_free: Any = optimizer if type(optimizer).__name__.endswith("ScheduleFree") else None
    model = _models[optimizer]() if optimizer in _models else None
    if model is None or (averager is None and schedule_free is None):
        yield
        return
    kept = {name: value.detach().clone() for name, value in model.state_dict().items()}
    try:
        if averager is not None:
            model.load_state_dict(averager.averaged_model.state_dict())
        else:
            schedule_free.eval()
            _take_statistics(model, inputs)
        yield
    finally:
        if schedule_free is not None:
            schedule_free.train()
        model.load_state_dict(kept)


def _take_statistics(model: nn.Module, inputs: Iterable[Tensor]) -> None:
    was = {module: module.training for module in model.modules()}
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    with torch.random.fork_rng(devices=list(devices)), torch.no_grad():
        model.train()
        for x in inputs:
            model(x)
    for module, training in was.items():
        module.training = training
