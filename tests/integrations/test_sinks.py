"""What each sink has written, read back by the host itself, is what the history holds."""

from __future__ import annotations

import copy
import csv
import gc
import math
import pickle
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from densitylr import Decision, DensityLR, DensityMonitor, History, Reading
from densitylr.history import EDGES, TAU, scalars
from densitylr.integrations.csv import CSVSink
from tests.support.fixed import batches, net, one_step
from tests.support.hosts import curves_in, events, expected, metrics_of, stored
from tests.support.readings import reading, stage_reading


class Recorder:
    """A sink that keeps what it was given; it raises at step ``fails``."""

    def __init__(self, fails: int | None = None) -> None:
        self.fails = fails
        self.rows: list[tuple[Any, ...]] = []
        self.closed = 0

    def write(self, reading: Any, rates: Any, scales: Any, decisions: Any) -> None:
        self.rows.append((reading, dict(rates), dict(scales), list(decisions)))
        if reading.step == self.fails:
            raise OSError("no space left on device")

    def close(self) -> None:
        self.closed += 1


def starved(seed: int = 1) -> tuple[torch.nn.Module, DensityLR]:
    model = net()
    groups = [
        {"params": list(model[:3].parameters()), "lr": 1e-5},
        {"params": list(model[3:].parameters())},
    ]
    return model, DensityLR(torch.optim.SGD(groups, lr=0.1, momentum=0.9), model, every=4)


def repaired(*sinks: Any, steps: int = 24) -> DensityLR:
    """A starved run, repaired, with sinks."""
    model, wrapped = starved()
    for sink in sinks:
        wrapped.history.subscribe(sink)
    for batch in batches(steps):
        one_step(model, wrapped, batch)
    assert wrapped.history.decisions
    return wrapped


# The contract


def test_a_sink_gets_what_is_recorded_when_it_is_recorded() -> None:
    history, sink = History(budget=16), Recorder()
    history.record(reading(0, {"a": 0.0}))
    history.subscribe(sink)
    decision = Decision(1, "a", "raise", 1.0, 4.0, 1e-3, 4e-3)
    for step in range(1, 200):
        history.record(
            reading(step, {"a": 0.1}), {"a": 0.1}, {"a": 2.0}, [decision] if step == 1 else []
        )
        assert sink.rows[-1][0].step == step
    assert len(history) <= 16
    assert [row[0].step for row in sink.rows] == list(range(1, 200))
    assert sink.rows[0][1:] == ({"a": 0.1}, {"a": 2.0}, [decision])
    history.unsubscribe(sink)
    history.unsubscribe(sink)
    history.record(reading(200, {"a": 0.1}))
    assert len(sink.rows) == 199
    assert sink.closed == 0


def test_a_sink_that_fails_is_let_go_with_one_warning_and_training_is_what_it_was() -> None:
    bad, good = Recorder(fails=4), Recorder()
    with pytest.warns(RuntimeWarning, match="Recorder failed at step 4 .* no space left") as seen:
        wrapped = repaired(bad, good)
    assert len([w for w in seen if w.category is RuntimeWarning]) == 1
    assert [row[0].step for row in bad.rows] == [0, 2, 4]
    assert [row[0].step for row in good.rows] == wrapped.history.steps.tolist()
    alone = repaired()
    assert alone.history.decisions == wrapped.history.decisions
    for mine, theirs in zip(alone.inner.param_groups, wrapped.inner.param_groups, strict=True):
        for p, q in zip(mine["params"], theirs["params"], strict=True):
            assert torch.equal(p, q)


def test_a_keyboard_interrupt_in_a_sink_is_one() -> None:
    class Slow(Recorder):
        def write(self, *_: Any) -> None:
            raise KeyboardInterrupt

    history = History()
    history.subscribe(Slow())
    with pytest.raises(KeyboardInterrupt):
        history.record(reading(0, {"a": 0.0}))


def test_sinks_keep_nothing_alive_and_are_in_no_checkpoint_and_no_copy(tmp_path: Path) -> None:
    sink = Recorder()
    sink.unpicklable = lambda: None  # type: ignore[attr-defined]
    wrapped = repaired(sink, CSVSink(tmp_path / "density.csv"))
    history = wrapped.history
    for copied in (copy.deepcopy(history), pickle.loads(pickle.dumps(history))):
        written = len(sink.rows)
        copied.record(reading(99, {"0": 0.0, "3": 0.0, "5": 0.0}))
        assert len(sink.rows) == written
        assert len(copied) == len(history) + 1
    pickle.dumps(wrapped.state_dict())
    alive = weakref.ref(wrapped)
    del wrapped
    gc.collect()
    assert alive() is None


def test_steps_go_on_after_a_checkpoint_is_loaded(tmp_path: Path) -> None:
    """The run had gone on past the checkpoint: those rows are written anew, not twice."""
    whole, parts = CSVSink(tmp_path / "whole.csv"), tmp_path / "parts.csv"
    model, wrapped = starved()
    wrapped.history.subscribe(whole)
    wrapped.history.subscribe(CSVSink(parts))
    data = batches(40)
    for batch in data[:20]:
        one_step(model, wrapped, batch)
    saved = copy.deepcopy(wrapped.state_dict())
    for batch in data[20:33]:
        one_step(model, wrapped, batch)
    model, resumed = starved()
    resumed.load_state_dict(saved)
    resumed.history.subscribe(CSVSink(parts))
    for batch in data[20:]:
        one_step(model, resumed, batch)
    with open(parts, newline="") as file:
        steps = [int(row["step"]) for row in csv.DictReader(file) if row["stage"] == "0"]
    assert steps == sorted(set(steps))
    assert steps[-1] == 36
    assert steps == [*(s for s in range(0, 20, 2)), 20, 24, 28, 32, 36]


def test_scalars_leave_gaps_where_nothing_was_read() -> None:
    seen = stage_reading(displacement=math.nan, rms=math.inf)
    found = scalars(Reading(3, {"a": seen}), {"a": 0.1}, {}, prefix="p")
    assert found == {
        "p/near_zero/a": seen.near_zero,
        "p/untrained/a": seen.untrained,
        "p/nonfinite/a": 0.0,
        "p/rate/a": 0.1,
    }


# CSV


def test_csv_is_the_table_of_the_history(tmp_path: Path) -> None:
    wrapped = repaired(CSVSink(tmp_path / "sink.csv"))
    wrapped.history.to_csv(tmp_path / "history.csv")
    assert (tmp_path / "sink.csv").read_bytes() == (tmp_path / "history.csv").read_bytes()


def test_csv_goes_on_in_a_file_with_blank_lines(tmp_path: Path) -> None:
    for name in ("plain", "blank"):
        path = tmp_path / f"{name}.csv"
        repaired(CSVSink(path))
        if name == "blank":
            path.write_bytes(b"\r\n" + path.read_bytes() + b"\r\n\r\n")
        repaired(CSVSink(path))
    assert (tmp_path / "blank.csv").read_bytes() == (tmp_path / "plain.csv").read_bytes()


def test_csv_refuses_a_file_that_is_something_else(tmp_path: Path) -> None:
    path = tmp_path / "notes.csv"
    path.write_text("name,age\nada,36\n")
    with pytest.raises(ValueError, match=r"no table of readings.*'name', 'age'"):
        CSVSink(path)
    assert path.read_text() == "name,age\nada,36\n"


def test_csv_of_a_bare_monitor_has_no_rates(tmp_path: Path) -> None:
    model = net()
    with DensityMonitor(model, every=1) as monitor:
        monitor.history.subscribe(CSVSink(tmp_path / "sink.csv"))
        for x, _ in batches(3):
            model(x)
    with open(tmp_path / "sink.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 9
    assert {row["rate"] for row in rows} == {""}


# TensorBoard


@pytest.mark.parametrize("own", [False, True])
def test_tensorboard(tmp_path: Path, own: bool) -> None:
    board = pytest.importorskip("densitylr.integrations.tensorboard")
    writer = None if own else torch.utils.tensorboard.SummaryWriter(tmp_path)
    sink = board.TensorBoardSink(tmp_path if own else writer)
    history = repaired(sink).history
    sink.close()
    sink.close()
    if writer is not None:
        writer.add_scalar("loss", 1.0, 7)  # still open
        writer.close()
    found = events(tmp_path)
    read, wanted = curves_in(found), expected(history)
    if writer is not None:
        assert read.pop(("loss", 7)) == 1.0
    assert read.keys() == wanted.keys()
    for key, value in wanted.items():
        assert read[key] == np.float32(value), key
    for stage in history.stages:
        drawn = found.Histograms(f"densitylr/density/{stage}")
        assert [event.step for event in drawn] == history.steps.tolist()
        for event, counts in zip(drawn, history.histogram(stage), strict=True):
            value = event.histogram_value
            filled = dict(zip(value.bucket_limit, value.bucket, strict=True))
            near = sum(n for limit, n in filled.items() if limit <= TAU)
            assert near == counts[: EDGES.index(TAU) + 1].sum()
            assert sum(filled.values()) == value.num == counts.sum()
    said = {
        (tag.removesuffix("/text_summary"), event.step): event.tensor_proto.string_val[0].decode()
        for tag in found.Tags()["tensors"]
        for event in found.Tensors(tag)
    }
    assert said == {
        (f"densitylr/decisions/{d.stage}", d.step): f"{d.kind}: {d.reason}"
        for d in history.decisions
    }


def test_tensorboard_hides_what_a_resumed_run_writes_anew(tmp_path: Path) -> None:
    board = pytest.importorskip("densitylr.integrations.tensorboard")
    for steps, displacement in ((range(0, 30, 5), 0.1), (range(15, 45, 5), 0.2)):
        sink, history = board.TensorBoardSink(tmp_path), History()
        history.subscribe(sink)
        for step in steps:
            history.record(reading(step, {"a": displacement}))
        sink.close()
    read = events(tmp_path).Scalars("densitylr/displacement/a")
    assert [event.step for event in read] == list(range(0, 45, 5))
    assert [round(event.value, 3) for event in read] == [0.1] * 3 + [0.2] * 6


# Weights & Biases, offline


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], Any]:
    """Starts a run that calls nobody, in a folder of its own."""
    wandb = pytest.importorskip("wandb")
    for name, value in {
        "WANDB_MODE": "offline",
        "WANDB_SILENT": "true",
        "WANDB_ERROR_REPORTING": "false",
        "WANDB_CONSOLE": "off",
        "WANDB_DIR": str(tmp_path),
        "WANDB_CACHE_DIR": str(tmp_path / "cache"),
        "WANDB_CONFIG_DIR": str(tmp_path / "config"),
        "WANDB_DATA_DIR": str(tmp_path / "data"),
    }.items():
        monkeypatch.setenv(name, value)
    return lambda: wandb.init(
        project="density", dir=str(tmp_path), settings=wandb.Settings(x_disable_stats=True)
    )


def test_wandb_leaves_the_user_s_steps_alone(tmp_path: Path, offline: Callable[[], Any]) -> None:
    module = pytest.importorskip("densitylr.integrations.wandb")
    run = offline()
    model, wrapped = starved()
    wrapped.history.subscribe(module.WandbSink())
    for i, batch in enumerate(batches(24)):
        one_step(model, wrapped, batch)
        run.log({"loss": float(i)}, step=10 * i)
    run.finish()
    history, rows = wrapped.history, stored(tmp_path)
    assert [(row["_step"], row["loss"]) for row in rows if "loss" in row] == [
        (10 * i, float(i)) for i in range(24)
    ]
    read = [row for row in rows if "densitylr/step" in row]
    assert [row["densitylr/step"] for row in read] == history.steps.tolist()
    for (name, step), value in expected(history).items():
        (row,) = (r for r in read if r["densitylr/step"] == step)
        assert row[name] == value
    for stage in history.stages:
        for row, counts in zip(read, history.histogram(stage), strict=True):
            drawn = f"densitylr/density/{stage}"
            assert row[f"{drawn}.values"] == counts.tolist()
            assert row[f"{drawn}.bins"][1:-1] == pytest.approx(EDGES)
    text = "\n".join(row.get("densitylr/decisions", "") for row in read)
    assert all(d.reason in text for d in history.decisions)


def test_wandb_keeps_every_decision_between_two_of_the_user_s_logs(
    tmp_path: Path, offline: Callable[[], Any]
) -> None:
    module = pytest.importorskip("densitylr.integrations.wandb")
    run = offline()
    wrapped = repaired(module.WandbSink(run))
    assert run.step == 0
    run.log({"loss": 1.0})
    assert run.step == 1
    run.finish()
    (row,) = stored(tmp_path)
    assert row["loss"] == 1.0
    assert row["densitylr/step"] == wrapped.history.steps[-1]
    assert all(d.reason in row["densitylr/decisions"] for d in wrapped.history.decisions)


def test_wandb_commits_where_it_is_told_to(tmp_path: Path, offline: Callable[[], Any]) -> None:
    module = pytest.importorskip("densitylr.integrations.wandb")
    run = offline()
    wrapped = repaired(module.WandbSink(commit=True))
    run.finish()
    rows = stored(tmp_path)
    assert [row["densitylr/step"] for row in rows] == wrapped.history.steps.tolist()
    texts = [row["densitylr/decisions"] for row in rows if "densitylr/decisions" in row]
    assert sum(len(text.splitlines()) for text in texts) == len(wrapped.history.decisions)


def test_wandb_wants_a_run() -> None:
    module = pytest.importorskip("densitylr.integrations.wandb")
    with pytest.raises(ValueError, match=r"call wandb\.init first"):
        module.WandbSink()


# MLflow, in a local file

# What its own tables say to a newer SQLAlchemy.
noload = pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy:DeprecationWarning")


@pytest.fixture
def tracking(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    mlflow = pytest.importorskip("mlflow")
    mlflow.set_tracking_uri(f"sqlite:///{tmp_path / 'mlflow.db'}")
    mlflow.create_experiment("density", artifact_location=str(tmp_path / "artifacts"))
    mlflow.set_experiment("density")
    return mlflow


@noload
def test_mlflow(tracking: Any) -> None:
    module = pytest.importorskip("densitylr.integrations.mlflow")
    with tracking.start_run() as run:
        history = repaired(module.MLflowSink()).history
    client = tracking.MlflowClient()
    assert metrics_of(run.info.run_id) == expected(history)
    tags = client.get_run(run.info.run_id).data.tags
    assert {k: v for k, v in tags.items() if k.startswith("densitylr.")} == {
        f"densitylr.decision.{d.step}.{d.stage}": f"{d.kind}: {d.reason}" for d in history.decisions
    }


@noload
def test_mlflow_takes_any_stage_name_and_any_number_of_stages(tracking: Any) -> None:
    module = pytest.importorskip("densitylr.integrations.mlflow")
    names = ["öl: a*b", *(f"layers.{i}" for i in range(400))]
    decisions = [Decision(5, n, "raise", 1.0, 4.0, 1e-3, 4e-3) for n in names]
    with tracking.start_run() as run:
        module.MLflowSink(run.info.run_id).write(
            reading(5, dict.fromkeys(names, 0.25)), {}, {}, decisions
        )
    data = tracking.MlflowClient().get_run(run.info.run_id).data
    assert data.metrics["densitylr/displacement/öl_ a_b"] == 0.25
    assert len(data.metrics) == 5 * len(names)
    assert sum(tag.startswith("densitylr.decision.5.") for tag in data.tags) == len(names)


@noload
def test_mlflow_wants_a_run(tracking: Any) -> None:
    module = pytest.importorskip("densitylr.integrations.mlflow")
    with pytest.raises(ValueError, match=r"call mlflow\.start_run first"):
        module.MLflowSink()
