"""The doctor decides what ``DensityLR(observe_only=True)`` decides."""

from __future__ import annotations

import pytest

from tests.doctor.equivalence import CONFIGURATIONS, both, differences


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("what", dict.fromkeys(CONFIGURATIONS), ids=str)
def test_the_doctor_decides_alike(what: object) -> None:
    assert differences(what) == []


@pytest.mark.filterwarnings("ignore")
def test_there_is_something_to_decide() -> None:
    controller, observer = both(CONFIGURATIONS[1])
    assert len(controller.history.decisions) > 5
    assert observer.history.decisions == controller.history.decisions
