"""A short storm, in every run; `python tests/storm.py` is the long one, with restarts."""

from __future__ import annotations

from conftest import Shim
from storm import storm


def test_a_short_storm(shim: Shim) -> None:
    """Leases are ended from here, behind the shim: the server has been up for too short a time
    to do it for the monitors."""
    assert storm(8, agents=12, restarts=0, grace=False) == []
