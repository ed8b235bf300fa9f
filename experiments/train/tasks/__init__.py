"""What is learned, and by what: data sets, and the networks that are trained on them."""

from experiments.train.tasks.data import DataConfig, Dataset, load
from experiments.train.tasks.model import ModelConfig, build_model, fingerprint
from experiments.train.tasks.small_data import LENGTH, PIXELS, SYMBOLS, task
from experiments.train.tasks.small_networks import GPT, NETS, TASKS, build, mlp_deep, vit

__all__ = [
    "GPT",
    "LENGTH",
    "NETS",
    "PIXELS",
    "SYMBOLS",
    "TASKS",
    "DataConfig",
    "Dataset",
    "ModelConfig",
    "build",
    "build_model",
    "fingerprint",
    "load",
    "mlp_deep",
    "task",
    "vit",
]
