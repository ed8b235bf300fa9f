"""Which modules and parameters make a stage."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torchvision.models import VisionTransformer, resnet18

from densitylr import find_stages
from densitylr.model.stages import Stage, unwrap


def assert_partition(model: nn.Module, stages: dict[str, Stage]) -> None:
    """Every trainable parameter in exactly one stage, every stage with a layer of its own."""
    owners: dict[int, list[str]] = {}
    for stage in stages.values():
        assert stage.layers, stage.name
        for parameter in stage.parameters.values():
            owners.setdefault(id(parameter), []).append(stage.name)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert len(owners.get(id(parameter), [])) == 1, name
    layers = [layer for stage in stages.values() for layer in stage.layers]
    assert len(layers) == len(set(layers))


def test_resnet_has_the_stages_of_the_paper() -> None:
    model = resnet18()
    stages = find_stages(model)
    assert list(stages) == ["conv1", "conv2_x", "conv3_x", "conv4_x", "conv5_x", "fc"]
    assert_partition(model, stages)
    assert sum(len(s.parameters) for s in stages.values()) == len(list(model.parameters()))
    assert set(stages["conv1"].parameters) == {"conv1.weight", "bn1.weight", "bn1.bias"}
    assert list(stages["conv1"].layers) == ["conv1"]
    assert all(n.startswith("layer3.") for n in stages["conv4_x"].parameters)
    # Two blocks of two convolutions, and the projection of the shortcut.
    assert [len(s.layers) for s in stages.values()] == [1, 4, 5, 5, 5, 1]
    assert not any(
        isinstance(t, nn.BatchNorm2d) for s in stages.values() for t in s.layers.values()
    )
    assert stages["fc"].layers["fc"] is model.fc


def test_a_resnet_with_another_part_is_not_taken_for_one() -> None:
    model = resnet18()
    model.extra = nn.Linear(3, 3)
    stages = find_stages(model)
    assert "extra" in stages
    assert "conv2_x" not in stages
    assert_partition(model, stages)


def test_wrappers_are_looked_through() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
    assert unwrap(nn.DataParallel(model)) is model
    assert unwrap(torch.compile(model)) is model
    assert list(find_stages(nn.DataParallel(model))) == ["0", "2"]


def test_mlp_norms_join_the_layer_before_them() -> None:
    model = nn.Sequential(
        nn.BatchNorm1d(4), nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2)
    )
    stages = find_stages(model)
    assert {n: s.modules for n, s in stages.items()} == {"1": ("0", "1", "2"), "4": ("4",)}
    assert_partition(model, stages)


def test_a_child_with_half_of_the_layers_is_opened() -> None:
    trunk = nn.Sequential(
        *[nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)) for _ in range(3)]
    )
    model = nn.Sequential()
    model.add_module("stem", nn.Linear(4, 4))
    model.add_module("trunk", trunk)
    model.add_module("head", nn.Linear(4, 2))
    stages = find_stages(model)
    assert list(stages) == ["stem", "trunk.0", "trunk.1", "trunk.2", "head"]
    assert list(stages["trunk.1"].layers) == ["trunk.1.0", "trunk.1.2"]
    assert_partition(model, stages)


def test_single_layers_as_models() -> None:
    for model in (nn.Linear(2, 3), nn.Conv2d(1, 2, 3), nn.GRU(2, 3), nn.Embedding(4, 2)):
        stages = find_stages(model)
        assert list(stages) == [type(model).__name__]
        assert_partition(model, stages)
    one = nn.Sequential(nn.Sequential(nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2))))
    assert list(find_stages(one)) == ["0.0.0"]
    assert_partition(one, find_stages(one))


def test_vision_transformer() -> None:
    model = VisionTransformer(
        image_size=8, patch_size=4, num_layers=4, num_heads=2, hidden_dim=8, mlp_dim=16
    )
    stages = find_stages(model)
    assert_partition(model, stages)
    assert next(iter(stages)) == "conv_proj"
    assert list(stages)[-1] == "heads"
    assert sum("encoder_layer_" in name for name in stages) == 4
    # The class token stands before every layer and joins the first stage.
    assert "class_token" in stages["conv_proj"].parameters
    assert any(
        isinstance(t, nn.MultiheadAttention) for s in stages.values() for t in s.layers.values()
    )


class GruOnRows(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gru = nn.GRU(28, 8, num_layers=2, batch_first=True)
        self.head = nn.Linear(8, 10)
        self.temperature = nn.Parameter(torch.ones(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.gru(x)[0][:, -1]) * self.temperature


def test_recurrent_net_and_a_parameter_of_the_root() -> None:
    model = GruOnRows()
    stages = find_stages(model)
    assert list(stages) == ["gru", "head"]
    assert "temperature" in stages["gru"].parameters
    assert_partition(model, stages)


def test_transformer() -> None:
    model = nn.Sequential()
    model.add_module("tokens", nn.Embedding(10, 8))
    model.add_module(
        "encoder",
        nn.TransformerEncoder(
            nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 3, enable_nested_tensor=False
        ),
    )
    model.add_module("head", nn.Linear(8, 10))
    stages = find_stages(model)
    assert [*stages] == ["tokens", *(f"encoder.layers.{i}" for i in range(3)), "head"]
    attention = stages["encoder.layers.0"].layers
    assert "encoder.layers.0.self_attn" in attention
    assert "encoder.layers.0.self_attn.out_proj" not in attention  # attention is read whole
    assert_partition(model, stages)


def test_shared_weights_belong_to_the_first_who_has_them() -> None:
    shared = nn.Linear(4, 4)
    model = nn.Sequential(shared, nn.ReLU(), shared, nn.ReLU(), nn.Linear(4, 2))
    assert list(find_stages(model)) == ["0", "4"]
    assert_partition(model, find_stages(model))
    tied = nn.Sequential(nn.Embedding(6, 4), nn.Linear(4, 6))
    tied[1].weight = tied[0].weight
    stages = find_stages(tied)
    assert set(stages["0"].parameters) == {"0.weight"}
    assert set(stages["1"].parameters) == {"1.bias"}
    assert_partition(tied, stages)


def test_an_unknown_leaf_with_a_matrix_is_a_weight_layer_but_a_norm_is_not() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.matrix = nn.Parameter(torch.randn(3, 3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x @ self.matrix

    model = nn.Sequential(Own(), nn.LayerNorm([2, 3]), nn.RMSNorm([2, 3]), Own())
    stages = find_stages(model)
    assert {n: s.modules for n, s in stages.items()} == {"0": ("0", "1", "2"), "3": ("3",)}


def test_a_list_of_parameters_is_no_layer_as_nobody_calls_it() -> None:
    model = nn.Sequential()
    model.add_module("a", nn.Linear(2, 2))
    model.add_module("prompts", nn.ParameterList([nn.Parameter(torch.randn(3, 2))]))
    model.add_module("b", nn.Linear(2, 2))
    stages = find_stages(model)
    assert list(stages) == ["a", "b"]
    assert "prompts.0" in stages["a"].parameters


def test_frozen_parameters_are_listed_but_need_no_stage() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[0].requires_grad_(False)
    assert list(find_stages(model, {"head": "1"})) == ["head"]
    assert "0.weight" in find_stages(model)["0"].parameters


def test_patterns() -> None:
    model = resnet18()
    stages = find_stages(model, {"first": ["conv1", "bn1"], "rest": ["layer*"], "head": "fc"})
    assert list(stages) == ["first", "rest", "head"]
    assert_partition(model, stages)
    # The first stage that claims a parameter gets it.
    greedy = find_stages(model, {"head": ["fc.*"], "all": "*"})
    assert set(greedy["head"].parameters) == {"fc.weight", "fc.bias"}
    assert list(greedy["head"].layers) == ["fc"]
    assert not {n for n in greedy["all"].parameters if n.startswith("fc.")}
    assert_partition(model, greedy)


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ({"a": ["0"], "b": ["nothing*"]}, r"stage 'b': pattern 'nothing\*' matches no module"),
        ({"a": ["0"]}, r"4 do not, the first is '1\.weight'"),
        ({"a": ["0"], "b": ["1"], "c": ["2"]}, r"stage 'b' has no weight layer of its own"),
        ({"a": ["*"], "b": ["2"]}, r"stage 'b' has no weight layer of its own"),
        ({}, "stages is empty"),
    ],
)
def test_patterns_that_make_no_stages(stages: dict[str, list[str]], message: str) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2), nn.Linear(2, 2))
    with pytest.raises(ValueError, match=message):
        find_stages(model, stages)


def test_models_without_density() -> None:
    with pytest.raises(TypeError, match=r"must be a torch\.nn\.Module, got int"):
        find_stages(3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="Sequential has no weight layer"):
        find_stages(nn.Sequential(nn.ReLU(), nn.BatchNorm2d(3)))
    with pytest.raises(ValueError, match="Identity has no weight layer"):
        find_stages(nn.Identity())
    with pytest.raises(ValueError, match=r"'1\.weight' is not initialised \(a lazy module\)"):
        find_stages(nn.Sequential(nn.Linear(2, 2), nn.LazyLinear(3)))


LEAVES = {
    "linear": lambda: nn.Linear(2, 2),
    "conv": lambda: nn.Conv1d(2, 2, 1),
    "bare": lambda: nn.Linear(2, 2, bias=False),
    "norm": lambda: nn.LayerNorm([2, 2]),
    "relu": nn.ReLU,
    "frozen": lambda: nn.Linear(2, 2).requires_grad_(False),
    "attention": lambda: nn.MultiheadAttention(2, 1),
    "gru": lambda: nn.GRU(2, 2),
}
SHAPES = st.recursive(
    st.sampled_from(sorted(LEAVES)),
    lambda children: st.tuples(st.booleans(), st.lists(children, min_size=1, max_size=4)),
    max_leaves=14,
)


def build(shape: object) -> nn.Module:
    if isinstance(shape, str):
        return LEAVES[shape]()
    own, children = shape  # type: ignore[misc]
    module = nn.Sequential(*[build(child) for child in children])
    if own:
        module.register_parameter("token", nn.Parameter(torch.zeros(1, 2)))
    return module


@given(SHAPES)
def test_any_nesting_is_divided_exactly(shape: object) -> None:
    model = build(shape)
    has_layer = any(
        isinstance(m, nn.Linear | nn.Conv1d | nn.MultiheadAttention | nn.GRU)
        for m in model.modules()
    )
    if not has_layer:
        with pytest.raises(ValueError, match="has no weight layer"):
            find_stages(model)
        return
    stages = find_stages(model)
    assert_partition(model, stages)
    # The division depends on the structure alone.
    assert list(find_stages(build(shape))) == list(stages)
