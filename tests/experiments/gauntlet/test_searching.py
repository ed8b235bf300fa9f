"""How the search is judged, against scipy's ranks and a loop over made-up runs."""

from __future__ import annotations

import json
import random
import statistics
from pathlib import Path
from typing import Any

import pytest
from scipy.stats import rankdata

from experiments.gauntlet.cells import parse_arm, read
from experiments.gauntlet.pack import pack
from experiments.gauntlet.verdict import compare_rules, judge, mean_ranks, searches
from experiments.gauntlet.verdict.searching import FORMER
from tests.experiments.gauntlet.records import record

Record = dict[str, Any]


def made_up(seed: int, lead: float = 0.0) -> list[Record]:
    draw = random.Random(seed)
    records = [record(steps=150, accuracy=draw.random())]  # of another suite: another length
    for net in ("gru", "mlp_deep", "cnn_bn"):
        for s in (0, 1):
            common = {"net": net, "seed": s, "steps": 300}
            records.append(record(accuracy=draw.random(), optimizer="adamw", **common))
            for start in (1e-4, 1.0):
                accuracy = draw.random() + lead
                free = {"optimizer": "adamw", "arm": "free", "start": start, **common}
                records.append(record(accuracy=accuracy, **free))
            for rival in ("prodigy", "dog"):
                own = {"optimizer": "adamw", "arm": rival, **common}
                records.append(record(accuracy=round(draw.random(), 1), **own))
    return records


@pytest.mark.parametrize("seed", range(5))
def test_ranks_and_losses_are_those_of_a_loop(seed: int) -> None:
    records = made_up(seed)
    arms = ("free", "prodigy", "dog")
    table = []
    for net in ("gru", "mlp_deep", "cnn_bn"):
        means = [
            statistics.fmean(r["accuracy"] for r in records if r["net"] == net and r["arm"] == a)
            for a in arms
        ]
        table.append(rankdata([-m for m in means]))
    expected = {a: statistics.fmean(row[i] for row in table) for i, a in enumerate(arms)}
    assert mean_ranks(records) == pytest.approx(expected)
    for cell in searches(records):
        own = [
            r
            for r in records
            if r["net"] == cell.net and r["arm"] == "free" and r["start"] == cell.start
        ]
        flat = [r for r in records if r["net"] == cell.net and r["arm"] == "fixed"]
        flat = [r for r in flat if r["steps"] == 300]
        lost = statistics.fmean(r["accuracy"] for r in flat)
        lost -= statistics.fmean(r["accuracy"] for r in own)
        assert cell.lost == pytest.approx(lost)
    assert len(searches(records)) == 6


@pytest.mark.parametrize(("lead", "holds"), [(2.0, True), (-2.0, False)])
def test_the_demand_holds_or_fails(lead: float, holds: bool) -> None:
    found = next(j for j in judge(made_up(0, lead)) if j.demand.startswith("free"))
    assert found.holds is holds


def test_without_rivals_a_small_loss_decides_nothing() -> None:
    records = [r for r in made_up(0, 2.0) if r["arm"] in ("free", "fixed")]
    found = next(j for j in judge(records) if j.demand.startswith("free"))
    assert found.holds is None


def test_an_arm_with_constants() -> None:
    assert parse_arm("repair(lift_off=0.1, every=10)") == ("repair", {"lift_off": 0.1, "every": 10})
    assert parse_arm("free(speed=1e-2)") == ("free", {"speed": 0.01})
    assert parse_arm("repair(tau=0.2)") == ("repair", {"tau": 0.2})


@pytest.mark.parametrize(
    "arm", ["repair()", "mend(delta=1)", "repair(mode=1)", "repair(colour=1)", "repair(delta=x)"]
)
def test_no_such_arm(arm: str) -> None:
    with pytest.raises(ValueError, match="got") as error:
        parse_arm(arm)
    assert arm in str(error.value)


def test_rules_are_compared_in_the_cells_they_share() -> None:
    records = made_up(1)
    rule = [
        dict(r, arm="other", accuracy=r["accuracy"] - 0.5) for r in records if r["net"] == "gru"
    ]
    rule = [r for r in rule if r["steps"] == 300 and r["start"] == 1e-4]
    kept = [r for r in records if r["arm"] in ("fixed", "free") and r["optimizer"] == "adamw"]
    kept = [dict(r, arm=FORMER) if r["arm"] == "free" else r for r in kept]
    found = compare_rules([*kept, *rule])
    assert list(found) == [FORMER, "other"]  # the worse one last
    assert (found[FORMER].cells, found["other"].cells) == (12, 2)
    losses = []
    for seed in (0, 1):
        flat, own = (
            next(
                r["accuracy"]
                for r in records
                if (r["net"], r["arm"], r["seed"], r["start"], r["optimizer"])
                == ("gru", arm, seed, start, "adamw")
            )
            for arm, start in (("fixed", 1.0), ("free", 1e-4))
        )
        losses.append(flat - own)
    assert found["other"].reference == pytest.approx(statistics.fmean(losses))
    assert found["other"].lost == pytest.approx(statistics.fmean(losses) + 0.5)
    assert found["other"].worst == pytest.approx(max(losses) + 0.5)


def test_packed_cells_do_not_depend_on_their_order(tmp_path: Path) -> None:
    lines = [json.dumps(r) for r in made_up(2)]
    for name, order in (("a", lines), ("b", [*lines[::-1], lines[0], '{"cut off'])):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(order))
        assert pack(tmp_path / f"{name}.jsonl", tmp_path / f"{name}.jsonl.gz") == len(lines)
    packed = [tmp_path / f"{name}.jsonl.gz" for name in "ab"]
    assert packed[0].read_bytes() == packed[1].read_bytes()
    assert read(packed[0]) == read(tmp_path / "a.jsonl")
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(ValueError, match="no finished cell"):
        pack(tmp_path / "empty.jsonl", tmp_path / "c.gz")
