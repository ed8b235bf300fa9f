"""Other people's monitors in the overhead benchmark: fastai's, Composer's, Weights & Biases'."""

from __future__ import annotations

import importlib.metadata
import tempfile
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn

__all__ = ["WATCHERS", "WandbGradients", "forward_hook", "installed", "versions"]

_PACKAGES = {"fastai": "fastai", "fastai-cpu": "fastai", "composer": "mosaicml", "wandb": "wandb"}
WATCHERS = tuple(_PACKAGES)


def installed(name: str) -> bool:
    """Whether a watcher can be measured."""
    return _PACKAGES[name] in versions()


def versions() -> dict[str, str]:
    """The versions of the watchers' packages, of those that are installed."""
    found = {}
    for package in dict.fromkeys(_PACKAGES.values()):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def forward_hook(name: str, model: nn.Module) -> Callable[..., Any]:
    """What an arm registers on a layer: fastai's ``ActivationStats(with_hist=True)``, on the
    layer's device or the CPU, or Composer's ``ActivationMonitor``, without its logger.
    """
    if name == "composer":
        from composer.callbacks import ActivationMonitor

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of an interval below ten batches
            monitor = ActivationMonitor(interval="1ba")
        monitor.create_module_names(model)
        return partial(monitor.forward_hook, _Nowhere(), 0)
    from fastai.callback.hook import ActivationStats, Hook

    cpu = name == "fastai-cpu"
    stats = ActivationStats(with_hist=True, cpu=cpu)
    return Hook(nn.Identity(), stats.hook, stats.is_forward, stats.detach, cpu).hook_fn


class _Nowhere:
    """A Composer logger without a destination."""

    destinations = ()

    def log_metrics(self, metrics: Any) -> None:
        """Forget them."""


class WandbGradients:
    """What ``wandb.watch(model, log="gradients", log_freq=1)`` does at a step, in an offline run of
    which nothing is kept. Its processes work beside ours until `close`.

    Args:
        model: the model.
        timed: wraps what is called for each gradient, and the commit of a step.
    """

    def __init__(
        self, model: nn.Module, timed: Callable[[Callable[..., Any]], Callable[..., Any]]
    ) -> None:
        import wandb
        from wandb.integration.torch.wandb_torch import TorchHistory

        self._folder = tempfile.TemporaryDirectory()
        settings = wandb.Settings(silent=True, console="off", x_disable_stats=True)
        self._run = wandb.init(
            mode="offline", dir=self._folder.name, project="overhead", settings=settings
        )
        self._model = model
        self._history = TorchHistory()
        log = timed(self._history.log_tensor_stats)
        self._history.log_tensor_stats = log  # type: ignore[method-assign]
        self._commit = timed(self._run.log)

    def begin(self) -> None:
        self._history.add_log_gradients_hook(self._model, log_freq=1)

    def end(self) -> None:
        self._history.unhook_all()
        self._commit({})

    def close(self) -> None:
        """End the run and wandb's processes."""
        import wandb

        self._run.finish()
        wandb.teardown()
        self._folder.cleanup()
