"""How torch's threads wait is set where nobody has said it."""

from __future__ import annotations

import os

import pytest

from deploy.openmp_tuning import SPIN_COUNT, tune_openmp


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({}, SPIN_COUNT),
        ({"GOMP_SPINCOUNT": "7"}, "7"),
        ({"OMP_WAIT_POLICY": "ACTIVE"}, None),
    ],
    ids=["nothing", "a count", "a policy"],
)
def test_threads_spin_for_a_short_while_unless_the_environment_has_decided(
    before: dict[str, str], after: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.setenv(name, "")  # so that what is set here does not stay
        monkeypatch.delenv(name)
    for name, value in before.items():
        monkeypatch.setenv(name, value)
    tune_openmp()
    assert os.environ.get("GOMP_SPINCOUNT") == after
