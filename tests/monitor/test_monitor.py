"""The monitor sees every stage once a reading and leaves no trace in the training."""

from __future__ import annotations

import copy
import gc
import io
import math
import pickle
import warnings
import weakref
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from densitylr import Baseline, DensityMonitor
from densitylr.monitor.layers import WatchedLayer
from densitylr.monitor.measure import SampleBuffer


def mlp() -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 3)
    )


def hooks_of(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def baseline_of(model: nn.Module, twins: tuple[str, ...]) -> Baseline:
    """One with the twins of these layers only."""
    baseline = Baseline.capture(model, pretrained=False)
    for name in baseline.twins.keys() - set(twins):
        baseline.twins[name] = None
    return baseline


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Sizes of what was measured, in order."""
    sizes: list[int] = []
    plain = WatchedLayer.read

    def counting(
        layer: WatchedLayer, args: Any, kwargs: Any, a: Tensor, to: SampleBuffer, **asked: bool
    ) -> None:
        plain(layer, args, kwargs, a, to, **asked)
        if asked["due"]:
            sizes.append(to.sizes[layer.row])

    monkeypatch.setattr(WatchedLayer, "read", counting)
    return sizes


Trained = tuple[list[float], list[Tensor], Tensor]


def train(model: nn.Module, steps: int, seed: int = 3, momentum: float = 0.9) -> Trained:
    torch.manual_seed(seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=momentum)
    losses = []
    for _ in range(steps):
        x = torch.randn(12, 6)
        loss = nn.functional.cross_entropy(model(x), (x[:, 0] > 0).long())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    tensors = [t.detach().clone() for t in (*model.parameters(), *model.buffers())]
    return losses, tensors, torch.get_rng_state()


def assert_identical(plain: Trained, seen: Trained) -> None:
    """Two results of `train`: losses, parameters and buffers, random state."""
    assert plain[0] == seen[0]
    assert all(torch.equal(a, b) for a, b in zip(plain[1], seen[1], strict=True))
    assert torch.equal(plain[2], seen[2])


def test_training_is_the_same_bit_for_bit() -> None:
    bare, watched = mlp(), mlp()
    watched.load_state_dict(bare.state_dict())
    plain = train(bare, 12)
    with DensityMonitor(watched, every=2) as monitor:
        seen = train(watched, 12)
    assert_identical(plain, seen)
    assert len(monitor.history) == 6


@pytest.mark.parametrize("recurrent", [False, True])
def test_dropout_inside_and_spectral_norm_are_not_disturbed(recurrent: bool) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gru = nn.GRU(2, 8, 2, dropout=0.4 if recurrent else 0.0, batch_first=True)
            self.head = nn.utils.parametrizations.spectral_norm(nn.Linear(8, 2))

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.gru(x.reshape(len(x), 3, 2))[0][:, -1])

    bare = Net()
    watched = Net()
    watched.load_state_dict(bare.state_dict())
    plain = train(bare, 6)
    with DensityMonitor(watched, every=1) as monitor:
        seen = train(watched, 6)
    assert_identical(plain, seen)
    assert len(set(monitor.history.series("head", "rms"))) == 6


def test_a_reading_is_every_so_many_forwards(measured: list[int]) -> None:
    model = mlp()
    with DensityMonitor(model, every=5) as monitor:
        train(model, 11)
        assert len(measured) == 2 * 3
        assert monitor.history.steps.tolist() == [0, 5, 10]
    train(model, 6)
    assert len(measured) == 2 * 3
    assert monitor.history.series("0", "displacement")[0] == 0
    assert monitor.history.series("0", "displacement")[1] > 0


def test_numbers_of_a_stage_are_means_over_its_layers() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2))
    x = torch.randn(10, 4)
    model[0].register_forward_hook(lambda m, a, out: hidden.append(out.detach()))
    hidden: list[Tensor] = []
    with DensityMonitor(model, {"all": "*"}) as monitor:
        out = model(x).detach()
    seen = monitor.history.readings[0].stages["all"]
    parts = [hidden[0].double().numpy(), out.double().numpy()]
    assert seen.count == sum(p.size for p in parts) == 100
    assert seen.mean == pytest.approx(np.mean([p.mean() for p in parts]), abs=1e-9)
    assert seen.rms == pytest.approx(np.mean([np.sqrt((p**2).mean()) for p in parts]))
    near = [(np.abs(p) <= 0.1 * np.sqrt((p**2).mean())).mean() for p in parts]
    assert seen.near_zero == seen.untrained == pytest.approx(np.mean(near))
    assert seen.near_zero_present == seen.near_zero
    assert seen.histogram.sum() == 100


def test_evaluation_and_no_grad_are_not_read(measured: list[int]) -> None:
    model = mlp()
    x = torch.randn(8, 6)
    with DensityMonitor(model, every=1) as monitor:
        model.eval()(x)
        model.train()
        with torch.no_grad():
            model(x)
        with torch.inference_mode():
            model(x)
        assert not measured
        assert monitor.step == 0
        model(x)
        assert len(measured) == 2
        assert len(monitor.history) == 1


def test_an_armed_monitor_waits_for_a_training_forward(measured: list[int]) -> None:
    model = mlp()
    monitor = DensityMonitor(model, every=None)
    x = torch.randn(8, 6)
    model(x)
    assert not measured  # on arm only
    monitor.arm()
    assert monitor.collect(0) is None
    model.eval()(x)
    with torch.no_grad():
        model.train()(x)
    assert monitor.collect(0) is None
    model(x)
    reading = monitor.collect(7)
    assert reading is not None
    assert reading.step == 7
    assert monitor.collect(7) is None
    model(x)
    assert len(measured) == 2


def test_a_shared_layer_is_read_at_its_first_call() -> None:
    layer = nn.Linear(4, 4)
    model = nn.Sequential(layer, nn.ReLU(), layer)
    x = torch.randn(9, 4)
    with DensityMonitor(model) as monitor:
        model(x)
    seen = monitor.history.readings[0].stages["0"]
    assert seen.count == 36
    assert seen.mean == pytest.approx(layer(x).mean().item(), abs=1e-6)


class Checkpointed(nn.Module):
    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.first, self.second, self.reentrant = nn.Linear(6, 8), nn.Linear(8, 3), reentrant

    def forward(self, x: Tensor) -> Tensor:
        hidden = checkpoint(self.first, x.requires_grad_(), use_reentrant=self.reentrant)
        return self.second(torch.relu(hidden))


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_is_read_once(reentrant: bool, measured: list[int]) -> None:
    model = Checkpointed(reentrant)
    monitor = DensityMonitor(model, every=None)
    for step in range(3):
        monitor.arm()
        model(torch.randn(5, 6)).sum().backward()
        reading = monitor.collect(step)
        assert reading is not None
        assert [s.count for s in reading.stages.values()] == [40, 15]
        model(torch.randn(5, 6)).sum().backward()  # not armed
    assert sorted(measured) == [15] * 3 + [40] * 3


class Odd(nn.Module):
    """A weight layer with an output of any kind."""

    def __init__(self, wrap: object) -> None:
        super().__init__()
        self.weight, self.wrap = nn.Parameter(torch.randn(4, 4)), wrap

    def forward(self, x: Tensor) -> object:
        return self.wrap(x @ self.weight)  # type: ignore[operator]


@pytest.mark.parametrize(
    ("wrap", "count"),
    [
        (lambda y: (y, y), 12),
        (lambda y: [None, {"deep": y}], 12),
        (lambda y: {"logits": y, "aux": y.sum()}, 12),
        (lambda y: y.sum(), 1),
        (lambda y: y[0, 0], 1),
        (lambda y: None, 0),
        (lambda y: y.argmax(-1), 0),
        (lambda y: torch.complex(y, y), 0),
        (lambda y: y[:0], 0),
        (lambda y: y.transpose(0, 1), 12),
        (lambda y: y.bfloat16(), 12),
    ],
)
def test_outputs_of_any_kind(wrap: object, count: int) -> None:
    model = nn.Sequential(nn.Linear(4, 4), Odd(wrap))
    with DensityMonitor(model) as monitor:
        for _ in range(2):
            model(torch.randn(3, 4))
    seen = monitor.history.readings[0].stages["1"]
    assert seen.count == count
    assert math.isnan(seen.displacement) == (count == 0)
    assert monitor.history.readings[0].stages["0"].displacement == 0


def test_an_empty_batch_is_not_a_reading_of_anything() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    with DensityMonitor(model, every=1) as monitor:
        model(torch.zeros(0, 4))
        assert len(monitor.history) == 0
        model(torch.randn(3, 4))
    assert [s.count for s in monitor.history.readings[0].stages.values()] == [12, 6]


def test_a_stage_that_is_skipped_is_unread_at_that_reading() -> None:
    class Sometimes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.use = nn.Linear(4, 4), nn.Linear(4, 4), True

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x)) if self.use else self.a(x)

    model = Sometimes()
    with DensityMonitor(model, every=1) as monitor:
        for use in (True, False, True):
            model.use = use
            model(torch.randn(5, 4))
    assert monitor.history.series("b", "count").tolist() == [20, 0, 20]
    assert np.isnan(monitor.history.series("b", "displacement")).tolist() == [False, True, False]
    assert monitor.history.series("a", "count").tolist() == [20, 20, 20]


def test_what_is_not_finite_warns_once_and_is_never_averaged() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2))
    x = torch.randn(6, 4)
    x[2, 1] = math.nan
    with DensityMonitor(model, every=1) as monitor:
        with pytest.warns(RuntimeWarning) as caught:
            model(x)
        assert [str(w.message).split(" activations")[0] for w in caught] == [
            "0: 8 of 48",
            "1: 2 of 12",
        ]
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model(x)
    seen = monitor.history.readings[1].stages["0"]
    assert (seen.count, seen.nonfinite) == (40, 8)
    clean = model[0](x[[0, 1, 3, 4, 5]]).detach()
    assert seen.mean == pytest.approx(clean.mean().item(), abs=1e-6)
    assert seen.displacement == 0


def test_all_nan_is_unread_but_counted() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2))
    with DensityMonitor(model) as monitor, pytest.warns(RuntimeWarning, match="NaN or infinite"):
        model(torch.full((3, 4), math.nan))
    seen = monitor.history.readings[0].stages["0"]
    assert (seen.count, seen.nonfinite) == (0, 24)
    assert math.isnan(seen.displacement)
    assert math.isnan(seen.mean)


def test_close_is_final_and_may_be_repeated() -> None:
    model = mlp()
    assert hooks_of(model) == 0
    with DensityMonitor(model) as monitor:
        assert hooks_of(model) == 4
        model(torch.randn(3, 6))
    monitor.close()
    assert hooks_of(model) == 0
    assert "closed" in repr(monitor)
    with pytest.raises(RuntimeError, match="this DensityMonitor is closed"):
        monitor.arm()
    assert len(monitor.history) == 1


def test_close_inside_a_forward() -> None:
    model = mlp()
    monitor = DensityMonitor(model, every=1)
    model[2].register_forward_hook(lambda *_: monitor.close())
    model(torch.randn(3, 6))
    model(torch.randn(3, 6))
    assert hooks_of(model) == 1


@pytest.mark.parametrize("every", [0, -1, 2.0, True, "5"])
def test_a_bad_number_of_steps_hooks_nothing(every: object) -> None:
    model = mlp()
    with pytest.raises(ValueError, match="every must be a positive number of steps"):
        DensityMonitor(model, every=every)  # type: ignore[arg-type]
    assert hooks_of(model) == 0


def test_a_monitor_is_freed_with_its_last_reference(measured: list[int]) -> None:
    model = mlp()
    monitor = DensityMonitor(model, every=1)
    model(torch.randn(4, 6)).sum().backward()
    gone = weakref.ref(monitor)
    del monitor
    gc.collect()
    assert gone() is None
    measured.clear()
    model(torch.randn(4, 6))  # its hooks are inert
    assert not measured


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "save"])
def test_a_copied_model_is_inert(way: str, measured: list[int]) -> None:
    model = mlp()
    with DensityMonitor(model, every=1) as monitor:
        model(torch.randn(4, 6))
        if way == "deepcopy":
            copied = copy.deepcopy(model)
        elif way == "pickle":
            copied = pickle.loads(pickle.dumps(model))
        else:
            file = io.BytesIO()
            torch.save(model, file)
            file.seek(0)
            copied = torch.load(file, weights_only=False)
        again = copy.deepcopy(copied)
        measured.clear()
        copied.train()(torch.randn(4, 6))
        again.train()(torch.randn(4, 6))
        assert not measured
        assert monitor.step == 1
        assert len(monitor.history) == 1
        model(torch.randn(4, 6))
        assert len(measured) == 2


def test_autocast_is_read_with_its_twin() -> None:
    model = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 8))
    with DensityMonitor(model) as monitor, torch.autocast("cpu", dtype=torch.bfloat16):
        model(torch.randn(20, 16))
    for seen in monitor.history.readings[0].stages.values():
        assert (seen.estimator, seen.displacement) == ("twin", 0)


def test_a_forward_that_raises_does_not_end_the_watch() -> None:
    model = mlp()
    with DensityMonitor(model, every=1) as monitor:
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            model(torch.randn(4, 5))
        model(torch.randn(4, 6))
    assert monitor.history.steps.tolist() == [0]
    assert monitor.history.readings[0].stages["0"].count == 64


def test_compiled_model_gives_the_same_readings() -> None:
    x = torch.randn(8, 6)
    model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3))
    monitor = DensityMonitor(model, every=None)
    compiled = torch.compile(model, backend="eager")
    readings = []
    for call in (model, compiled):
        monitor.arm()
        call(x)
        readings.append(monitor.collect(0))
    assert readings[0] is not None
    assert readings[0] == readings[1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_default_dtype_is_nothing_to_the_statistics(dtype: torch.dtype) -> None:
    model, x = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3)), torch.randn(8, 6)
    readings = []
    for default in (torch.float32, dtype):
        torch.set_default_dtype(default)
        try:
            with DensityMonitor(model, every=None) as monitor:
                monitor.arm()
                model(x)
                readings.append(monitor.collect(0))
        finally:
            torch.set_default_dtype(torch.float32)
    assert readings[0] is not None
    assert readings[0] == readings[1]


@pytest.mark.parametrize("twins", [("0", "1"), ("1",), ()])
def test_each_reading_is_as_by_a_new_monitor(twins: tuple[str, ...]) -> None:
    """Whatever was kept of earlier ones: of other shapes, other layouts, of as many outputs."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 12, 3, padding=1), nn.ReLU(inplace=True), nn.Conv2d(12, 4, 3)
    )
    with torch.no_grad():
        for p in model[0].parameters():
            p[::3] = 0  # silent channels
    shapes = [(8, 2, 8, 8), (8, 2, 8, 8), (3, 2, 8, 8), (2, 2, 16, 16), (8, 2, 8, 8), (4, 2, 16, 8)]
    layouts = [torch.contiguous_format, torch.channels_last] * 3
    baseline = baseline_of(model, twins)
    kept = DensityMonitor(model, every=None, baseline=baseline, watching=True)
    for step, (shape, layout) in enumerate(zip(shapes, layouts, strict=True)):
        with torch.no_grad():
            model[0].weight.mul_(1.1)
        own = baseline_of(model, twins)
        new = DensityMonitor(model, every=None, baseline=own, watching=True)
        new.load_state_dict(kept.state_dict())
        kept.forget_peaks()
        for monitor in (kept, new):
            monitor.arm()
        model = model.to(memory_format=layout)
        model(torch.randn(shape).contiguous(memory_format=layout))
        assert kept.collect(step) == new.collect(step)
        new.close()


def test_a_first_batch_of_nan_is_no_reference() -> None:
    """Nor once the twins have been released after it."""
    model = nn.Sequential(nn.Linear(4, 40), nn.Linear(40, 30))
    monitor = DensityMonitor(model, every=1)
    with pytest.warns(RuntimeWarning, match="NaN or infinite"):
        model(torch.full((8, 4), math.nan))
    monitor.release_twin("0")
    for _ in range(2):
        model(torch.randn(8, 4))
    assert np.isnan(monitor.history.series("0", "displacement")).tolist() == [True, False, False]
    assert monitor.history.series("0", "displacement")[1] == 0
    assert np.isnan(monitor.history.series("1", "displacement")).tolist() == [True, False, False]
    assert monitor.history.readings[-1].stages["0"].estimator == "first-probe"


def test_a_ragged_batch_is_read_as_its_rows() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    parts = [torch.randn(3, 4), torch.randn(5, 4)]
    with DensityMonitor(model, every=1) as ragged:
        model(torch.nested.nested_tensor(parts, layout=torch.jagged))
    with DensityMonitor(model, every=1) as plain:
        model(torch.cat(parts))
    assert ragged.history.readings == plain.history.readings
    assert ragged.history.series("0", "displacement").tolist() == [0.0]


class Part(nn.Module):
    """A layer whose outputs lie in memory with gaps, or all in one place."""

    def __init__(self, first: int) -> None:
        super().__init__()
        self.weight, self.first = nn.Parameter(torch.randn(4, 12)), first

    def forward(self, x: Tensor) -> Tensor:
        out = x @ self.weight
        return out[:, self.first : self.first + 5] if self.first else out[:, :1].expand(-1, 5)


@pytest.mark.parametrize("watching", [False, True])
@pytest.mark.parametrize("twins", [("0", "1"), ()])
def test_outputs_with_gaps_in_memory(watching: bool, twins: tuple[str, ...]) -> None:
    model = nn.Sequential(Part(0), nn.Linear(5, 2))
    baseline = baseline_of(model, twins)
    with DensityMonitor(model, every=1, baseline=baseline, watching=watching) as monitor:
        for first in (3, 0, 7, 3, 0):
            model[0].first = first
            x = torch.randn(9, 4)
            output = model[0](x)
            model(x)
            seen = monitor.history.readings[-1].stages["0"]
            assert seen.count == 45
            assert seen.mean == pytest.approx(output.mean().item(), abs=1e-6)


@pytest.mark.parametrize("twins", [("0", "2"), ()])
def test_a_sparse_batch_is_read_as_a_dense_one(twins: tuple[str, ...]) -> None:
    model = nn.Sequential(nn.Linear(4, 300), nn.ReLU(), nn.Linear(300, 3))
    x = torch.randn(2000, 4).relu()
    found = []
    for batch in (x, x.to_sparse()):
        with DensityMonitor(model, every=1, baseline=baseline_of(model, twins)) as monitor:
            model(batch)
        found.append(monitor.history.readings[0].stages["0"])
    dense, sparse = found
    assert sparse.count == dense.count
    assert sparse.rms == pytest.approx(dense.rms, rel=1e-5)
    assert sparse.displacement == pytest.approx(0, abs=1e-3)


def test_the_guard_keeps_the_peak_of_the_first_stage_over_all_forwards() -> None:
    model = mlp()
    monitor = DensityMonitor(model, every=None, guard=True)
    expected: list[float] = []
    for _ in range(3):
        sizes = [0.5, 30.0, 2.0]
        monitor.arm()
        for size in sizes:
            output = model[0](size * torch.randn(12, 6))
            expected.append(float(output.detach().double().square().mean().sqrt()))
            model[4](torch.randn(12, 16))
        reading = monitor.collect(len(expected))
        assert reading is not None
        assert reading.stages["0"].peak_rms == pytest.approx(max(expected[-3:]), rel=1e-6)
        # It is the first forward that the rest is read of.
        assert reading.stages["0"].rms == pytest.approx(expected[-3], rel=1e-6)
        assert math.isnan(reading.stages["4"].peak_rms)
        assert math.isnan(reading.stages["0"].example_variance)


def test_the_peak_of_a_stage_is_that_of_its_layers_that_are_watched() -> None:
    model = nn.Sequential(mlp(), nn.Linear(3, 2))
    monitor = DensityMonitor(model, stages={"body": "0", "head": "1"}, every=None, guard=True)
    monitor.arm()
    x = torch.randn(12, 6)
    first = model[0][0](x)
    model(100 * x)
    model(x)
    reading = monitor.collect(0)
    assert reading is not None
    assert reading.stages["body"].peak_rms > 50 * float(first.detach().square().mean().sqrt())
    with torch.no_grad():
        model[0][0].weight[0, 0] = math.inf
    monitor.arm()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model(x)
        reading = monitor.collect(1)
    assert reading is not None
    assert math.isinf(reading.stages["body"].peak_rms)


def test_peaks_go_through_a_state_dict() -> None:
    model = mlp()
    monitors = [DensityMonitor(model, every=None, guard=True) for _ in range(2)]
    for monitor in monitors:
        monitor.arm()
    model(50 * torch.randn(12, 6))
    resumed = DensityMonitor(model, every=None, guard=True)
    resumed.load_state_dict(monitors[0].state_dict())
    resumed.arm()
    monitors[1].arm()
    model(torch.randn(12, 6))
    readings = [monitor.collect(1) for monitor in (resumed, monitors[1])]
    assert readings[0] is not None
    assert readings[1] is not None
    assert readings[0].stages["0"].peak_rms == readings[1].stages["0"].peak_rms > 10


@pytest.mark.parametrize("sizes", [(8, 64), (64, 8), (7, 60)])
def test_no_output_near_zero_is_no_displacement_whatever_was_read(sizes: tuple[int, int]) -> None:
    model = nn.Sequential(nn.Linear(6, 16))
    with torch.no_grad():
        model[0].bias.fill_(-20.0)
    with DensityMonitor(model, every=1, baseline=baseline_of(model, ())) as monitor:
        for n in sizes:
            model(torch.randn(n, 6))
    assert monitor.history.series("0", "near_zero").tolist() == [0.0, 0.0]
    assert monitor.history.series("0", "displacement").tolist() == [0.0, 0.0]


def test_the_guard_is_where_the_data_come_in_whatever_was_registered_first() -> None:
    class Backwards(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head, self.body = nn.Linear(16, 3), nn.Linear(6, 16)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.body(x))

    model = Backwards()
    monitor = DensityMonitor(model, every=None, guard=True)
    for size in (1.0, 40.0):
        monitor.arm()
        model(torch.randn(12, 6))
        model(size * torch.randn(12, 6))
        reading = monitor.collect(0)
        assert reading is not None
        assert math.isnan(reading.stages["head"].peak_rms)
    assert reading.stages["body"].peak_rms > 10 * reading.stages["body"].rms


def test_a_watched_layer_that_was_not_called_at_a_reading_has_no_peak() -> None:
    model = nn.Sequential(nn.Linear(6, 16), nn.Linear(16, 3))
    monitor = DensityMonitor(model, {"both": ["0", "1"]}, every=None, guard=True)
    monitor.arm()
    model(torch.randn(12, 6))
    monitor.collect(0)
    monitor.arm()
    model[1](torch.randn(12, 16))
    reading = monitor.collect(1)
    assert reading is not None
    assert math.isfinite(reading.stages["both"].rms)
    assert math.isnan(reading.stages["both"].peak_rms)


def test_between_readings_one_layer_is_looked_at_and_no_more(
    monkeypatch: pytest.MonkeyPatch, measured: list[int]
) -> None:
    looked: list[str] = []
    plain = WatchedLayer.read

    def counting(layer: WatchedLayer, *rest: Any, **asked: bool) -> None:
        looked.append(layer.name)
        assert asked["watched"]
        plain(layer, *rest, **asked)

    model = mlp()
    monitor = DensityMonitor(model, every=None, guard=True)
    monitor.arm()
    model(torch.randn(12, 6))
    monitor.collect(0)
    monkeypatch.setattr(WatchedLayer, "read", counting)
    measured.clear()
    for _ in range(4):
        model(torch.randn(12, 6))
    assert looked == ["0"] * 4
    assert measured == []


@pytest.mark.parametrize(
    ("armed", "watching", "kept"), [(False, False, False), (True, False, True), (False, True, True)]
)
def test_the_memory_of_answers_is_freed_with_the_twins(
    armed: bool, watching: bool, kept: bool
) -> None:
    """But for what a reading has begun to keep, or peaks."""
    model = mlp()
    monitor = DensityMonitor(model, every=None, watching=watching)
    monitor.arm()
    model(torch.randn(12, 6))
    monitor.collect(0)
    (buffer,) = monitor._buffers.values()
    gone = weakref.ref(buffer)
    rows = len(buffer.rows)
    del buffer
    if armed:
        monitor.arm()
    monitor.release_twin("0")
    gc.collect()
    assert (gone() is not None) == kept
    monitor.arm()
    model(torch.randn(12, 6))
    monitor.collect(1)
    assert len(next(iter(monitor._buffers.values())).rows) == (rows if kept else rows - 1)


@pytest.mark.parametrize("where", ["read", "collect"])
def test_a_failure_of_ours_ends_the_watching_and_nothing_else(
    where: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    bare, watched = mlp(), mlp()
    watched.load_state_dict(bare.state_dict())
    plain = train(bare, 12)
    calls: list[int] = []

    def broken(*_: object, **__: object) -> None:
        calls.append(1)
        raise ZeroDivisionError("of ours")

    monitor = DensityMonitor(watched, every=2)
    handed = len(monitor._handles)
    if where == "read":
        monkeypatch.setattr(WatchedLayer, "read", broken)
    else:
        monkeypatch.setattr(monitor, "collect", broken)
    with caplog.at_level("INFO", "densitylr"):
        seen = train(watched, 12)
    assert_identical(plain, seen)
    assert handed == 4
    assert len(calls) == 1
    assert monitor.closed
    assert hooks_of(watched) == 0
    (record,) = caplog.records
    assert record.levelname == "ERROR"
    assert "nothing is watched any more; training goes on" in record.getMessage()
    assert record.exc_info is not None
    assert isinstance(record.exc_info[1], ZeroDivisionError)
    assert len(monitor.history) == 0


def test_a_warning_that_is_to_be_raised_is_raised() -> None:
    model = mlp()
    with DensityMonitor(model, every=1) as monitor:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with pytest.raises(RuntimeWarning, match="NaN or infinite"):
                model(torch.full((4, 6), math.nan))
        assert not monitor.closed
