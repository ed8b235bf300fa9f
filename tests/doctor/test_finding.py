"""Models and optimizers are found by themselves, in time, and are left as they were."""

from __future__ import annotations

import gc
import sys
import types
import weakref
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.modules import module as torch_module
from torch.optim import optimizer as torch_optimizer

from densitylr import DensityLR, DensityMonitor
from densitylr.doctor.report.advice import advise
from densitylr.doctor.report.page import page
from densitylr.doctor.report.report import report
from densitylr.doctor.report.terminal import sparkline, text
from densitylr.doctor.report.verdicts import states, verdict
from densitylr.doctor.watch.discovery import ModelDiscovery
from tests.support.fixed import batches, hooks_of, loss_of, net, one_step, same

RATES = {"0": 1e-7, "3": 0.1, "5": 0.1}


@pytest.fixture
def finder() -> Iterator[ModelDiscovery]:
    found = ModelDiscovery()
    found.attach()
    yield found
    found.detach()


def sgd(model: nn.Module, rates: dict[str, float] | float = 0.1) -> torch.optim.SGD:
    if isinstance(rates, float):
        return torch.optim.SGD(model.parameters(), lr=rates, momentum=0.9)
    groups = [{"params": model.get_submodule(n).parameters(), "lr": r} for n, r in rates.items()]
    groups[0]["params"] = [*model[0].parameters(), *model[1].parameters()]
    return torch.optim.SGD(groups, lr=0.1, momentum=0.9)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 60) -> None:
    for batch in batches(steps):
        one_step(model, optimizer, batch)


def words(finder: ModelDiscovery) -> list[dict[str, str]]:
    return [{s.stage: s.word for s in states(watch)} for watch in finder.observers]


class Own(torch.optim.SGD):
    def step(self, closure: object = None) -> object:
        return super().step(closure)  # type: ignore[arg-type]


def test_a_step_within_a_step_is_one(finder: ModelDiscovery) -> None:
    assert sgd(net())  # whose class has torch's hooks from now on
    model = net()
    train(model, Own(model.parameters(), lr=0.1), 20)
    (watch,) = finder.observers
    assert watch.steps == 20
    assert finder.steps == {"Own": 20}


def test_nothing_is_left_behind() -> None:
    before = torch.optim.Optimizer.__init__
    found = ModelDiscovery()
    found.attach()
    model = net()
    train(model, sgd(model), 3)
    assert hooks_of(model)
    found.detach()
    assert torch.optim.Optimizer.__init__ is before
    assert not torch_module._global_forward_pre_hooks
    assert not torch_optimizer._global_optimizer_pre_hooks
    assert not torch_optimizer._global_optimizer_post_hooks
    assert hooks_of(model) == 0


def test_the_hook_on_all_modules_is_there_only_while_something_is_looked_for(
    finder: ModelDiscovery,
) -> None:
    model = net()
    model(batches(1)[0][0])
    assert not torch_module._global_forward_pre_hooks
    optimizer = sgd(model)
    assert torch_module._global_forward_pre_hooks
    train(model, optimizer, 1)
    assert not torch_module._global_forward_pre_hooks


def test_training_is_the_same_bit_for_bit_and_the_first_forward_is_read(
    finder: ModelDiscovery,
) -> None:
    model, bare = net(), net()
    train(model, sgd(model, RATES))
    state = torch.get_rng_state()
    finder.detach()
    train(bare, sgd(bare, RATES))
    assert same(model, bare)
    assert torch.equal(torch.get_rng_state(), state)
    (watch,) = finder.observers
    assert watch.history.steps[0] == 0
    assert watch.steps == 60
    inner = sgd(bare := net(), RATES)
    own = DensityLR(inner, bare, observe_only=True)
    train(bare, own)
    assert watch.history.steps.tolist() == own.history.steps.tolist()
    assert watch.history.decisions == own.history.decisions != []
    # What both have a twin for, they see alike.
    for number in ("near_zero", "untrained", "displacement", "rms", "rate", "alignment"):
        seen, expected = (h.series("0", number) for h in (watch.history, own.history))
        assert np.array_equal(seen, expected, equal_nan=True)
    assert [d for d in watch.diagnose() if d.stage == "0"] == [
        d for d in own.diagnose() if d.stage == "0"
    ]


def test_the_starved_stage_and_the_lines_that_mend_it(finder: ModelDiscovery) -> None:
    model = net()
    groups = sgd(model, RATES).param_groups
    optimizer = torch.optim.SGD(groups, lr=0.1)
    train(model, optimizer)
    (watch,) = finder.observers
    found = states(watch)
    assert {s.stage: s.word for s in found} == {"0": "starved", "3": "learning", "5": "learning"}
    assert "1 of 3 stages needs help: 0 is starved" in verdict(watch, found)
    (advice,) = advise(watch, found)
    wrap, rates = advice.remedies
    finder.detach()
    model = net()  # as at the top of the script, where the lines go
    optimizer = sgd(model, RATES)
    names = {"optimizer": optimizer, "model": model}
    exec(rates.code, names)
    assert [g["lr"] for g in optimizer.param_groups] == [0.1, 0.1, 0.1]
    exec(wrap.code, names)
    assert isinstance(names["optimizer"], DensityLR)


def test_a_few_steps_are_too_few_to_be_sure(finder: ModelDiscovery) -> None:
    model = net()
    train(model, sgd(model, RATES), 19)
    assert words(finder)[0]["0"] == "unsure"
    assert "19 steps are too few to be sure" in states(finder.observers[0])[0].evidence


def test_a_model_called_piece_by_piece_is_one_model(finder: ModelDiscovery) -> None:
    model = net()
    optimizer = sgd(model)
    for x, y in batches(3):
        for layer in model:
            x = layer(x)
        nn.functional.cross_entropy(x, y).backward()
        optimizer.step()
    (watch,) = finder.observers
    assert list(watch.stages) == ["0", "3", "5"]
    assert watch.history.steps[0] == 0


def test_only_what_is_trained_is_watched(finder: ModelDiscovery) -> None:
    student, teacher, other = net(), net(), net()
    both = nn.ModuleDict({"student": student, "teacher": teacher})
    optimizer, second = sgd(student), torch.optim.Adam(other.parameters())
    for x, _ in batches(3):
        loss = (both["student"](x) - both["teacher"](x).detach()).square().mean()
        (loss + other(x).square().mean()).backward()
        optimizer.step()
        second.step()
    assert len(finder.observers) == 2
    assert {
        id(p) for w in finder.observers for s in w.stages.values() for p in s.parameters.values()
    } == {id(p) for m in (student, other) for p in m.parameters()}


def test_a_model_that_is_dropped_is_not_kept_and_its_diagnosis_stays(
    finder: ModelDiscovery,
) -> None:
    for _ in range(2):
        model = net()
        train(model, sgd(model, RATES), 40)
    gone = [weakref.ref(model), weakref.ref(model[0].weight)]
    del model
    gc.collect()
    assert all(ref() is None for ref in gone)
    assert [found["0"] for found in words(finder)] == ["starved", "starved"]
    assert len({watch.name for watch in finder.observers}) == 2


def test_a_new_optimizer_takes_over(finder: ModelDiscovery) -> None:
    model = net()
    train(model, sgd(model, RATES), 10)
    train(model, sgd(model, 0.05), 10)
    (watch,) = finder.observers
    rates = watch.history.series("0", "rate")
    assert (rates[0], rates[-1]) == (1e-7, 0.05)
    assert watch.steps > 15


def test_an_optimizer_of_two_halves(finder: ModelDiscovery) -> None:
    model = net()
    halves = [
        torch.optim.SGD(model[:3].parameters(), lr=1e-9),
        torch.optim.Adam(model[3:].parameters(), 1e-2),
    ]
    for batch in batches(60):
        loss_of(model, batch).backward()
        for half in halves:
            half.step()
            half.zero_grad()
    (watch,) = finder.observers
    assert watch.steps == 60
    assert {t.kind for t in watch.trainers} == {"SGD", "Adam"}
    # A rate of Adam says nothing about one of SGD: the twin does.
    assert not watch.history.decisions
    assert words(finder)[0]["0"] == "starved"
    assert all("DensityLR(" not in r.code for a in advise(watch, states(watch)) for r in a.remedies)


def test_what_a_closure_trains(finder: ModelDiscovery) -> None:
    model = net()
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=2)
    for batch in batches(5):

        def closure(batch=batch):
            optimizer.zero_grad()
            loss = loss_of(model, batch)
            loss.backward()
            return loss

        optimizer.step(closure)
    (watch,) = finder.observers
    assert watch.steps == 5
    assert len(watch.history)
    assert not finder.notes


def test_a_compiled_model_is_read() -> None:
    finder = ModelDiscovery()
    finder.attach()
    model = net()
    compiled = torch.compile(model, backend="eager")
    train(compiled, sgd(model, RATES), 40)
    finder.detach()
    (watch,) = finder.observers
    assert watch.history.steps[0] == 0
    assert len(watch.history) > 10
    assert words(finder)[0]["0"] == "starved"


def test_what_is_never_called_as_a_module_is_watched_from_its_first_step(
    finder: ModelDiscovery,
) -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for x, _ in batches(3):
        x = nn.functional.linear(x, model[0].weight, model[0].bias)
        nn.functional.linear(x, model[2].weight, model[2].bias).square().mean().backward()
        optimizer.step()
    assert "no training forward was seen before the first step" in finder.notes[0]
    assert "no training forward of its layers was seen" in verdict(finder.observers[0], [])


def test_parameters_of_no_module(finder: ModelDiscovery) -> None:
    weight = nn.Parameter(torch.randn(3))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    weight.square().sum().backward()
    optimizer.step()
    assert "in no module" in finder.notes[0]
    found = report(finder, "python x.py", "")
    assert "no model could be watched" in found.headline


def test_what_is_no_torch_optimizer_is_said_to_be_none(
    finder: ModelDiscovery, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "fastai.optimizer", raising=False)
    assert "made no torch optimizer" in report(finder, "python x.py", "").headline
    monkeypatch.setitem(sys.modules, "fastai.optimizer", types.ModuleType("fastai.optimizer"))
    assert "OptimWrapper" in report(finder, "python x.py", "").headline


def test_a_probe_that_fails_ends_the_watching_and_not_the_training(
    finder: ModelDiscovery, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("no such thing under vmap")

    model, bare = net(), net()
    optimizer = sgd(model)
    with monkeypatch.context() as patch:
        patch.setattr("densitylr.controller.loop.STRICT", False)
        patch.setattr(DensityMonitor, "read", broken)
        train(model, optimizer, 10)
    finder.detach()
    train(bare, sgd(bare), 10)
    assert same(model, bare)
    (note,) = finder.observers[0].notes
    assert "no such thing under vmap" in note
    assert "the training went on" in note


def test_nan_is_told_and_warns_nobody(finder: ModelDiscovery) -> None:
    model = net()
    optimizer = sgd(model)
    train(model, optimizer, 10)
    with torch.no_grad():
        model[3].weight.fill_(torch.nan)
    train(model, optimizer, 10)  # warnings are errors here
    assert words(finder)[0]["3"] == "non-finite"


def test_a_controller_of_the_script_is_shown_as_it_is(finder: ModelDiscovery) -> None:
    model = net()
    own = DensityLR(sgd(model, RATES), model)
    train(model, own, 80)
    (watch,) = finder.observers
    assert watch.history is own.history
    assert "your script has a DensityLR already" in watch.notes[0]
    assert words(finder)[0]["0"] == "repaired"


def test_acting() -> None:
    found = ModelDiscovery("repair")
    found.attach()
    model = net()
    train(model, sgd(model, RATES), 80)
    found.detach()
    bare = net()
    with_hands = DensityLR(sgd(bare, RATES), bare)
    train(bare, with_hands, 80)
    assert same(model, bare)
    assert words(found)[0]["0"] == "repaired"


def test_acting_where_it_cannot(monkeypatch: pytest.MonkeyPatch) -> None:
    found = ModelDiscovery("repair")
    found.attach()
    model = net()
    halves = [sgd(model[:3]), sgd(model[3:])]
    loss_of(model, batches(1)[0]).backward()
    for half in halves:
        half.step()
    found.detach()
    assert "only watched, not run: 2 optimizers train it" in found.notes[0]
    assert not found.observers[0].acting


def test_left_out_and_frozen(finder: ModelDiscovery) -> None:
    model = net()
    model[3].requires_grad_(False)
    optimizer = torch.optim.SGD(model[5].parameters(), lr=0.1)
    train(model, optimizer, 40)
    assert words(finder)[0] == {"0": "left out", "3": "frozen", "5": "learning"}
    mend = advise(finder.observers[0], states(finder.observers[0]))[0].remedies[0]
    exec(mend.code, {"optimizer": optimizer, "model": model})
    assert len(optimizer.param_groups) == 2


def test_what_looks_trained_is_not_judged(finder: ModelDiscovery) -> None:
    model = net()
    train(model, sgd(model), 40)
    finder.observers.clear()
    again = nn.Sequential(*model)
    train(again, sgd(again, RATES), 40)
    assert set(words(finder)[0].values()) == {"not judged"}
    assert "not judged" in verdict(finder.observers[0], states(finder.observers[0]))


@pytest.mark.filterwarnings("ignore:the weights look trained")
@pytest.mark.parametrize("mode", [None, "repair"])
def test_low_rates_of_trained_weights_are_no_illness(mode: str | None) -> None:
    model = net()
    train(model, sgd(model), 80)
    found = ModelDiscovery(mode)
    found.attach()
    again = nn.Sequential(*model)
    train(again, sgd(again, {"0": 1e-8, "3": 1e-8, "5": 1e-7}), 60)
    found.detach()
    (watch,) = found.observers
    assert set(words(found)[0].values()) == {"not judged"}
    assert watch.diagnose() == []
    assert advise(watch, states(watch)) == []


def test_where_all_rates_are_too_low_the_largest_is_no_remedy(finder: ModelDiscovery) -> None:
    model = net()
    train(model, sgd(model, {"0": 1e-9, "3": 1e-7, "5": 1e-7}), 120)
    assert set(words(finder)[0].values()) == {"starved"}
    (advice,) = advise(finder.observers[0], states(finder.observers[0]))
    assert 'mode="free"' in advice.remedies[0].code
    assert "1e-05" in advice.remedies[1].code


def test_the_page_stands_alone(finder: ModelDiscovery, monkeypatch: pytest.MonkeyPatch) -> None:
    model = net()
    train(model, sgd(model, RATES))
    found = report(finder, "python <b>.py", "")
    html = page(found, {found.models[0].name: "history.npz"})
    assert "&lt;b&gt;.py" in html
    assert "<b>.py" not in html
    assert "http" not in html.replace("http-equiv", "")
    assert html.count('class="stage"') == 3
    for advice in found.models[0].advice:
        assert f"{advice.word}: {', '.join(advice.stages)}" in html
    monkeypatch.setitem(sys.modules, "densitylr.plots", None)
    monkeypatch.delattr("densitylr.plots", raising=False)
    assert "Without matplotlib there are no pictures" in page(
        found, {found.models[0].name: "history.npz"}
    )


@pytest.mark.parametrize("width", [60, 80, 120])
def test_the_terminal_keeps_to_its_width(finder: ModelDiscovery, width: int) -> None:
    model = net()
    train(model, sgd(model, RATES))
    said = text(report(finder, "python train.py", ""), width)
    code = {
        line
        for p in report(finder, "", "").models
        for a in p.advice
        for r in a.remedies
        for line in r.code.splitlines()
    }
    assert all(len(line) <= width for line in said.splitlines() if line.strip() not in code)


def test_sparkline() -> None:
    assert sparkline([0.0, 0.5, 1.0]) == "▁▅█"
    assert sparkline([1.0, float("nan"), 1.0]) == "█ █"
    assert sparkline([0.0, 0.0]) == "▁▁"
    assert len(sparkline(np.arange(1000.0))) == 16
