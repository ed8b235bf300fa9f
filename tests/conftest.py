"""One thread, fixed seeds, quick hypothesis runs without deadlines; what goes wrong is raised."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, settings

from densitylr.controller import loop

torch.set_num_threads(1)
settings.register_profile(
    "densitylr",
    deadline=None,
    max_examples=40,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.load_profile("densitylr")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _strict(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing that goes wrong inside the control loop is swallowed."""
    monkeypatch.setattr(loop, "STRICT", True)
