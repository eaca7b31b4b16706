"""A short run of everything at once, with a fresh seed; `python tests/chaos.py` is the long one."""

from __future__ import annotations

import secrets

from chaos import chaos


def test_a_short_chaos() -> None:
    assert chaos(secrets.randbelow(10**6), seconds=15) == []
