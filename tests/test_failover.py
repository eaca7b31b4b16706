"""What a failover must not lose; `python tests/failover.py` counts what it may."""

from __future__ import annotations

import pytest
from failover import CASES, outcome

pytestmark = pytest.mark.long


@pytest.mark.parametrize("name", CASES)
def test_what_enough_replicas_have_is_kept(name: str) -> None:
    found = outcome(name, CASES[name][2], seconds=0.5)
    assert found.wrong == []
    assert (found.lost, found.twice, found.done) == ({}, 0, 0)
    assert found.told > 20, "hardly anything was tried"


def test_a_failover_without_waiting_grants_no_fence_twice() -> None:
    found = outcome("Sentinel, primary stopped and back", 0, seconds=0.5)
    assert found.wrong == []
    assert found.lost["claim"] > 0, "nothing was lost, so nothing was tried"
