"""Stages: which modules and which parameters of a model learn together.

A stage is a named part of a model. The outputs of its weight layers are read before any
normalisation or activation, and its parameters share one learning-rate scale.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

__all__ = ["Stage", "find_stages", "untrainable", "unwrap"]

_RESNET = {
    "conv1": ["conv1", "bn1"],
    "conv2_x": ["layer1"],
    "conv3_x": ["layer2"],
    "conv4_x": ["layer3"],
    "conv5_x": ["layer4"],
    "fc": ["fc"],
}
_WEIGHT_LAYERS = (
    nn.Linear,
    nn.Bilinear,
    nn.modules.conv._ConvNd,
    nn.RNNBase,
    nn.Embedding,
    nn.EmbeddingBag,
    nn.MultiheadAttention,
)
# Their parameters may have two dimensions or more, but their outputs are no density to watch.
_NOT_WEIGHT_LAYERS = (nn.LayerNorm, nn.RMSNorm, nn.ParameterList, nn.ParameterDict)


@dataclass(frozen=True)
class Stage:
    """A named part of a model.

    Attributes:
        name: the stage's name, unique in the model.
        modules: qualified names of the modules and single parameters it is made of, as they
            were claimed.
        layers: its weight layers by qualified name, in registration order; never empty.
        parameters: its parameters by qualified name, frozen ones included.
    """

    name: str
    modules: tuple[str, ...]
    layers: Mapping[str, nn.Module]
    parameters: Mapping[str, nn.Parameter]


def unwrap(model: nn.Module) -> nn.Module:
    """The user's own module inside ``DataParallel``, DDP and ``torch.compile`` wrappers."""
    while True:
        if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            inside = model.module
        else:
            inside = getattr(model, "_orig_mod", None)
        if not isinstance(inside, nn.Module):
            return model
        model = inside


def find_stages(
    model: nn.Module, stages: Mapping[str, str | Sequence[str]] | None = None
) -> dict[str, Stage]:
    """Divide a model into ordered stages.

    Without ``stages``, a torchvision-style ResNet becomes ``conv1, conv2_x … conv5_x, fc``.
    Any other model is divided by its own structure: the children of the root are stages, and
    a child that holds at least half of all weight layers is opened into its own children,
    again and again. A module without a weight layer (a norm, an activation) and a parameter
    that an opened module owns itself (a class token) join the stage before them in
    registration order, or the first stage.

    Args:
        model: any module; ``DataParallel``, DDP and compiled wrappers are looked through.
        stages: the user's own division, ``{stage name: [pattern, …]}``. A pattern is a
            qualified module or parameter name, ``fnmatch`` wildcards allowed, and claims
            everything below what it matches; the first stage that claims a parameter gets it.
            Trainable parameters that no pattern claims are an error.

    Returns:
        The stages by name, in the model's order (or the order of ``stages``). Every trainable
        parameter belongs to exactly one of them.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: no weight layer, a lazy module that has not seen its input yet, a pattern
            that matches nothing, a stage without a weight layer, a parameter in no stage.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    model = unwrap(model)
    layers = _weight_layers(model)
    if not layers:
        raise ValueError(
            f"{type(model).__name__} has no weight layer (Linear, Conv, Embedding, attention, "
            "RNN, or a leaf module with a weight of two or more dimensions), so there is no "
            "activation density to watch"
        )
    for name, parameter in model.named_parameters():
        if isinstance(parameter, nn.parameter.UninitializedParameter):
            raise ValueError(
                f"parameter {name!r} is not initialised (a lazy module): run one forward pass "
                "before the stages are taken"
            )
    if stages is not None:
        claims = _claims_of_patterns(model, stages)
    elif _looks_like_resnet(model):
        claims = _claims_of_patterns(model, _RESNET)
    else:
        claims = _claims_of_structure(model, layers)
    return _build(model, layers, claims)


def untrainable(stages: Mapping[str, Stage]) -> list[str]:
    """The names of the stages of which no parameter requires a gradient now."""
    return [
        name
        for name, stage in stages.items()
        if not any(p.requires_grad for p in stage.parameters.values())
    ]


def _weight_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Weight layers by qualified name: known classes, and leaves with a weight matrix."""
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        if any(_inside(name, outer) for outer in found):
            continue
        own = module.parameters(recurse=False)
        children = any(True for child in module.children() for _ in child.parameters())
        leaf = not children and any(p.ndim >= 2 for p in own)
        leaf = leaf and bool(name) and not isinstance(module, _NOT_WEIGHT_LAYERS)
        if isinstance(module, _WEIGHT_LAYERS) or leaf:
            found[name] = module
    return found


def _inside(name: str, outer: str) -> bool:
    """Whether ``name`` is ``outer`` or lies below it; the root ``""`` contains everything."""
    return not outer or name == outer or name.startswith(outer + ".")


def _looks_like_resnet(model: nn.Module) -> bool:
    children = dict(model.named_children())
    needed = {"conv1", "bn1", "layer1", "layer2", "layer3", "layer4", "fc"}
    with_weights = {n for n, c in children.items() if any(True for _ in c.parameters())}
    return (
        needed == with_weights
        and not any(True for _ in model.parameters(recurse=False))
        and all(_weight_layers(children[part]) for part in needed - {"bn1"})
    )


def _claims_of_structure(model: nn.Module, layers: Mapping[str, nn.Module]) -> dict[str, list[str]]:
    """Open the model from the root; returns {stage: qualified names it claims}."""
    total = len(layers)
    order: list[str] = []

    def visit(prefix: str, module: nn.Module) -> None:
        held = sum(_inside(layer, prefix) for layer in layers)
        is_layer = prefix in layers
        if prefix and (is_layer or 2 * held < total or (held == 1 and total > 1)):
            order.append(prefix)
            return
        if is_layer:
            order.append(prefix)
            return
        order.extend(_join(prefix, name) for name, _ in module.named_parameters(recurse=False))
        for name, child in module.named_children():
            if any(True for _ in child.parameters()):
                visit(_join(prefix, name), child)

    visit("", model)
    claims: dict[str, list[str]] = {}
    waiting: list[str] = []
    current = ""
    for name in order:
        if any(_inside(layer, name) for layer in layers):
            current = name or type(model).__name__
            claims[current] = [*waiting, name]
            waiting = []
        elif current:
            claims[current].append(name)
        else:
            waiting.append(name)
    return claims


def _join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name


def _claims_of_patterns(
    model: nn.Module, stages: Mapping[str, str | Sequence[str]]
) -> dict[str, list[str]]:
    if not stages:
        raise ValueError("stages is empty: give at least one {name: [pattern, …]}")
    names = [n for n, _ in model.named_modules() if n]
    names += [n for n, _ in model.named_parameters(remove_duplicate=False)]
    claims: dict[str, list[str]] = {}
    for stage, patterns in stages.items():
        claims[stage] = []
        for pattern in [patterns] if isinstance(patterns, str) else patterns:
            hits = fnmatch.filter(names, pattern)
            if not hits:
                raise ValueError(
                    f"stage {stage!r}: pattern {pattern!r} matches no module or parameter of "
                    f"{type(model).__name__}; its children are "
                    f"{', '.join(n for n, _ in model.named_children())}"
                )
            claims[stage] += hits
    return claims


def _build(
    model: nn.Module, layers: Mapping[str, nn.Module], claims: Mapping[str, Iterable[str]]
) -> dict[str, Stage]:
    parameters: dict[str, dict[str, nn.Parameter]] = {stage: {} for stage in claims}
    owned: dict[str, dict[str, nn.Module]] = {stage: {} for stage in claims}
    for name, module in layers.items():
        first = next(n for n, _ in module.named_parameters())
        owner = _owner(_join(name, first), claims)  # a layer is where its weight is
        if owner is not None:
            owned[owner][name] = module
    homeless = []
    for name, parameter in model.named_parameters():
        owner = _owner(name, claims)
        if owner is not None:
            parameters[owner][name] = parameter
        elif parameter.requires_grad:
            homeless.append(name)
    if homeless:
        raise ValueError(
            f"every trainable parameter must belong to a stage; {len(homeless)} do not, the "
            f"first is {homeless[0]!r}: add a pattern for it to stages"
        )
    for stage in claims:
        if not owned[stage]:
            raise ValueError(
                f"stage {stage!r} has no weight layer of its own, so it has no density to "
                f"watch: it claims {list(claims[stage])}; merge it with a neighbour"
            )
    return {
        stage: Stage(stage, tuple(dict.fromkeys(claims[stage])), owned[stage], parameters[stage])
        for stage in claims
    }


def _owner(name: str, claims: Mapping[str, Iterable[str]]) -> str | None:
    for stage, claimed in claims.items():
        if any(_inside(name, part) for part in claimed):
            return stage
    return None
