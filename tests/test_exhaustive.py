"""Every order of two agents, a reaper and the clock; `python tests/exhaustive.py` goes deeper."""

from __future__ import annotations

import pytest
from conftest import Server, one_engine
from exhaustive import Exhaustion, report

server = one_engine()


@pytest.mark.long
def test_every_order_to_a_depth_of_seven(server: Server) -> None:
    made = Exhaustion(server)
    assert report(made, seconds=600, depth=7) == 0
    assert len(made.seen) > 3000
    ops = "next claim start heartbeat release complete fail reap turn"
    assert {one for one in ops.split() if made.accepted[f"{one} OK"] == 0} == set()
    codes = {one.split()[1] for one in made.refused}
    assert codes >= {"HELD", "BLOCKED", "NOT_DUE", "WRONG_STATUS", "NOT_OWNER"}
