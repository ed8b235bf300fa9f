"""Watching a model learn: hooks on its layers, its untrained baseline, its gradients."""

from densitylr.monitor.baseline import Baseline
from densitylr.monitor.gradients import Alignment, Norms, StageNorms, zero_gradients
from densitylr.monitor.hooks import LayerHook, first_tensor, inert_hook
from densitylr.monitor.layers import Sampler, layer_budget, make_twin
from densitylr.monitor.monitor import DensityMonitor

__all__ = [
    "Alignment",
    "Baseline",
    "DensityMonitor",
    "LayerHook",
    "Norms",
    "Sampler",
    "StageNorms",
    "first_tensor",
    "inert_hook",
    "layer_budget",
    "make_twin",
    "zero_gradients",
]
