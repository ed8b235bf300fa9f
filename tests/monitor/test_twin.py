"""Untrained twins: the displacement is zero before training and means what it says after it."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from densitylr import Baseline, DensityMonitor, StageReading
from densitylr.monitor import first_tensor, make_twin


def read(model: nn.Module, *inputs: Tensor, monitor: DensityMonitor) -> dict[str, StageReading]:
    monitor.arm()
    model.train()(*inputs)
    reading = monitor.collect(0)
    assert reading is not None
    return reading.stages


class First(nn.Module):
    """A layer and what calls it, as a model."""

    def __init__(self, layer: nn.Module, call: Callable[..., object]) -> None:
        super().__init__()
        self.layer, self.call = layer, call

    def forward(self, x: Tensor) -> object:
        return self.call(self.layer, x)


def plain(layer: nn.Module, x: Tensor) -> object:
    return layer(x)


IMAGE = (6, 8, 9, 10)
LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], Callable[..., object]]] = {
    "linear": (lambda: nn.Linear(8, 16), (32, 8), plain),
    "linear on tokens": (lambda: nn.Linear(8, 16, bias=False), (4, 7, 8), plain),
    "linear on one example": (lambda: nn.Linear(8, 64), (8,), plain),
    "linear by keyword": (lambda: nn.Linear(8, 16), (32, 8), lambda m, x: m(input=x)),
    "wide linear": (lambda: nn.Linear(8, 5 * 64 + 3), (40, 8), plain),
    "conv1d": (lambda: nn.Conv1d(8, 6, 3, padding="same"), (5, 8, 11), plain),
    "conv2d": (lambda: nn.Conv2d(8, 12, 3), IMAGE, plain),
    "conv2d on one example": (lambda: nn.Conv2d(8, 12, 3), IMAGE[1:], plain),
    "wide conv2d": (lambda: nn.Conv2d(8, 2 * 64 + 1, 3, padding=1), IMAGE, plain),
    "conv2d, strided and dilated": (
        lambda: nn.Conv2d(8, 12, (3, 2), stride=(2, 1), dilation=2, padding=(2, 1)),
        IMAGE,
        plain,
    ),
    "conv2d in groups": (lambda: nn.Conv2d(8, 12, 3, groups=4), IMAGE, plain),
    "conv2d by channel": (lambda: nn.Conv2d(8, 8, 3, groups=8, bias=False), IMAGE, plain),
    "conv2d, circular": (
        lambda: nn.Conv2d(8, 12, 3, padding=1, padding_mode="circular"),
        IMAGE,
        plain,
    ),
    "conv2d, reflecting": (
        lambda: nn.Conv2d(8, 12, 3, padding=(2, 1), padding_mode="reflect"),
        IMAGE,
        plain,
    ),
    "conv2d, large": (
        lambda: nn.Conv2d(1, 40, 3, stride=2, padding="valid"),
        (9, 1, 120, 131),
        plain,
    ),
    "conv2d, large and same": (
        lambda: nn.Conv2d(1, 40, (4, 3), padding="same", dilation=2, padding_mode="circular"),
        (9, 1, 61, 70),
        plain,
    ),
    "conv1d, large, in groups": (
        lambda: nn.Conv1d(2, 40, 5, padding=3, groups=2, bias=False),
        (5, 2, 3000),
        plain,
    ),
    "linear on many tokens": (lambda: nn.Linear(2, 40), (9, 50, 30, 2), plain),
    "conv3d": (lambda: nn.Conv3d(2, 4, 2), (3, 2, 4, 5, 6), plain),
    "transposed conv": (lambda: nn.ConvTranspose2d(8, 4, 3, stride=2), IMAGE, plain),
    "gru": (lambda: nn.GRU(8, 6, batch_first=True), (5, 7, 8), plain),
    "lstm, both ways": (lambda: nn.LSTM(8, 6, 2, bidirectional=True), (5, 7, 8), plain),
    "attention": (
        lambda: nn.MultiheadAttention(8, 2, batch_first=True),
        (5, 7, 8),
        lambda m, x: m(x, x, x, need_weights=False),
    ),
    "attention by keyword": (
        lambda: nn.MultiheadAttention(8, 2),
        (5, 7, 8),
        lambda m, x: m(query=x, key=x, value=x),
    ),
}
FIRST_PROBE: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], Callable[..., object]]] = {
    "attention with dropout": (
        lambda: nn.MultiheadAttention(8, 2, dropout=0.5),
        (5, 7, 8),
        lambda m, x: m(x, x, x),
    ),
    "gru with dropout": (lambda: nn.GRU(8, 6, 2, dropout=0.5), (5, 7, 8), plain),
    "bilinear": (lambda: nn.Bilinear(8, 8, 6), (5, 8), lambda m, x: m(x, x)),
    "recurrent cell": (lambda: nn.GRUCell(8, 6), (5, 8), plain),
    "spectral norm": (
        lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(8, 6)),
        (5, 8),
        plain,
    ),
}


def make(name: str) -> tuple[First, Tensor]:
    layer, shape, call = (LAYERS | FIRST_PROBE)[name]
    return First(layer(), call), torch.randn(shape)


@pytest.mark.parametrize("name", LAYERS)
def test_zero_before_training(name: str) -> None:
    model, x = make(name)
    with DensityMonitor(model, every=None) as monitor:
        seen = read(model, x, monitor=monitor)["layer"]
        assert seen.estimator == "twin"
        assert seen.count > 0
        # A part of the rows and channels may be summed in another order than all of them: an
        # output on the very edge of "near zero" could fall on its other side. With these seeds
        # none does.
        assert seen.displacement == 0
        assert seen.near_zero == seen.untrained


@pytest.mark.parametrize("name", LAYERS)
def test_own_change_moves_and_a_change_upstream_does_not(name: str) -> None:
    model, x = make(name)
    with DensityMonitor(model, every=None) as monitor:
        # As if everything upstream had changed: another scale, another place.
        assert read(model, 3 * x + 1, monitor=monitor)["layer"].displacement == 0
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.7)
        assert read(model, x, monitor=monitor)["layer"].displacement > 0.05


@pytest.mark.parametrize("name", FIRST_PROBE)
def test_without_a_twin_the_first_reading_serves(name: str) -> None:
    model, x = make(name)
    with DensityMonitor(model, every=None) as monitor:
        seen = read(model, x, monitor=monitor)["layer"]
        assert (seen.estimator, seen.displacement) == ("first-probe", 0)
        assert read(model, 4 * x, monitor=monitor)["layer"].displacement > 0.05


@pytest.mark.parametrize("name", ["linear", "conv2d", "conv2d in groups", "conv3d", "gru"])
def test_displacement_against_the_definition(name: str) -> None:
    """Full forwards of layer and copy in float64, counted by hand."""
    model, x = make(name)
    untrained = copy.deepcopy(model)
    with DensityMonitor(model, every=None) as monitor:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.3)
        seen = read(model, x, monitor=monitor)["layer"]
    with torch.no_grad():
        now = first_tensor(model.double()(x.double()))
        before = first_tensor(untrained.double()(x.double()))
    assert now is not None
    assert before is not None
    a, b = now.flatten().tolist(), before.flatten().tolist()
    rms0 = math.sqrt(math.fsum(v * v for v in b) / len(b))
    near = [sum(abs(v) <= 0.1 * rms0 for v in values) for values in (a, b)]
    share = [(k + 0.5) / (len(a) + 1) for k in near]
    assert seen.count == len(a)
    assert seen.near_zero == near[0] / len(a)
    assert seen.untrained == near[1] / len(b)
    assert seen.displacement == pytest.approx(abs(math.log(share[0] / share[1])), rel=1e-12)
    assert seen.rms0 == pytest.approx(rms0, rel=1e-5)
    assert seen.displacement > 0.01


def test_embedding() -> None:
    model = nn.Sequential(nn.Embedding(20, 2 * 64, padding_idx=0), nn.Linear(2 * 64, 3))
    tokens = torch.randint(0, 20, (6, 5))
    with DensityMonitor(model, every=None) as monitor:
        seen = read(model, tokens, monitor=monitor)
        assert (seen["0"].estimator, seen["0"].displacement) == ("twin", 0)
        assert seen["0"].count == 6 * 5 * 64
        with torch.no_grad():
            model[0].weight[1:] += 1
        assert read(model, tokens, monitor=monitor)["0"].displacement > 0.05
    # One that rescales its weights as it is called is not copied.
    assert make_twin(nn.Embedding(4, 2, max_norm=1.0)) is None


def test_upstream_training_leaves_the_next_layer_still() -> None:
    model = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 32))
    x = torch.randn(64, 8)
    with DensityMonitor(model, every=None) as monitor:
        with torch.no_grad():
            model[0].weight.mul_(3)
        seen = read(model, x, monitor=monitor)
        assert seen["0"].displacement > 0.3
        assert seen["2"].displacement == 0
    without = Baseline.capture(model, pretrained=True)
    with DensityMonitor(model, every=None, baseline=without) as simple:
        read(model, x, monitor=simple)
        with torch.no_grad():
            model[0].weight.mul_(3)
        # What the twin is for: the simple estimator believes that the second layer learned.
        assert read(model, x, monitor=simple)["2"].displacement > 0.05


def test_a_twin_that_was_released_leaves_its_last_answer() -> None:
    model, x = make("linear")
    monitor = DensityMonitor(model, every=None)
    first = read(model, x, monitor=monitor)["layer"]
    monitor.release_twin("layer")
    later = read(model, 5 * x, monitor=monitor)["layer"]
    assert later.estimator == "last-twin"
    assert (later.untrained, later.rms0) == (first.untrained, first.rms0)
    assert later.displacement > 0.05
    other = DensityMonitor(model, every=None)
    other.release_twin("layer")
    assert read(model, x, monitor=other)["layer"].estimator == "first-probe"


@pytest.mark.parametrize("name", LAYERS)
def test_model_moved_to_another_dtype_after_the_twin_was_made(name: str) -> None:
    model, x = make(name)
    with DensityMonitor(model, every=None) as monitor:
        seen = read(model.double(), x.double(), monitor=monitor)["layer"]
        assert (seen.estimator, seen.displacement) == ("twin", 0)


def test_attention_twin_made_in_evaluation_mode_computes_as_in_training() -> None:
    model, x = make("attention")
    with DensityMonitor(model.eval(), every=None) as monitor:
        assert read(model, x, monitor=monitor)["layer"].displacement == 0


def test_old_style_weight_norm_can_be_watched() -> None:
    gru = nn.GRU(8, 6)
    linear = nn.Linear(8, 4)
    for layer, weight in ((gru, "weight_hh_l0"), (linear, "weight")):
        with pytest.warns(FutureWarning, match="weight_norm"):
            nn.utils.weight_norm(layer, weight)
    for layer in (gru, linear):
        model = First(layer, plain)
        with DensityMonitor(model, every=None) as monitor:
            assert read(model, torch.randn(5, 8), monitor=monitor)["layer"].displacement == 0


@pytest.mark.parametrize(
    ("output", "found"),
    [
        ((None, torch.ones(2)), True),
        ({"a": torch.ones(2, dtype=torch.long), "b": [torch.ones(3)]}, True),
        (torch.ones(2, dtype=torch.bool), False),
        (None, False),
        ("words", False),
        ((), False),
    ],
)
def test_first_tensor(output: object, found: bool) -> None:
    tensor = first_tensor(output)
    assert (tensor is not None) == found
    assert tensor is None or tensor.is_floating_point()
