"""A signal is judged by the rates that it would choose."""

from __future__ import annotations

import math
from typing import Any

import pytest

from experiments.gauntlet.law.signals import chosen, judged

TIMES = (0.1, 0.3, 1.0, 3.0)
ACCURACY = (0.5, 0.7, 0.9, 0.6)


def runs(net: str, **signals: tuple[float | None, ...]) -> list[dict[str, Any]]:
    return [
        {
            "net": net,
            "optimizer": "sgd",
            "times": times,
            "accuracy": ACCURACY[i],
            "signals": {name: values[i] for name, values in signals.items()},
        }
        for i, times in enumerate(TIMES)
    ]


@pytest.mark.parametrize(
    ("values", "sign", "place"),
    [
        ([4.0, 3.0, 2.0, 1.0], 1.0, 2),
        ([4.0, 3.0, math.nan, 1.0], 1.0, 2),  # a run that diverged was not too low
        ([4.0, 1.0, 4.0, 4.0], 1.0, 1),  # a loop would stop there
        ([9.0, 9.0, 9.0, 9.0], 1.0, 3),
        ([1.0, 2.0, 3.0, 4.0], -1.0, 2),
    ],
)
def test_the_first_rate_that_is_not_called_too_low(
    values: list[float], sign: float, place: int
) -> None:
    assert chosen(values, 2.5, sign) == place


def test_the_threshold_is_chosen_on_the_tuning_networks_and_judged_on_the_others() -> None:
    falls, rises, blind = (4.0, 3.0, 1.0, None), (1.0, 2.0, 5.0, 6.0), (1.0, 1.0, 1.0, 1.0)
    late = (4.0, 1.0, 1.0, 1.0)  # on the other network it falls too early
    records = runs("mine", good=falls, up=rises, blind=blind)
    records += runs("other", good=late, up=rises, blind=blind)
    found = {j.signal: j for j in judged(records, ["mine"])}
    assert list(found) == ["up", "good", "blind"]
    assert (found["good"].tuning, found["good"].others) == pytest.approx((0.0, 20.0))
    assert (found["up"].tuning, found["up"].others) == pytest.approx((0.0, 0.0))
    assert found["blind"].tuning == pytest.approx(40.0)
