"""How long a call of a tool takes over MCP, beside a tool that adds two numbers.

    python tests/bench/calls.py [--rounds N] [--calls N]

Both servers speak over their standard streams, on the same SDK and Python; ours has its private
server, which writes each change to the disk.  Calls are made one after the other, in turns of the
two servers; p50 of all of them.

Goal: claim, complete and list within 1.5 times the trivial tool.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from clients import Home, Peer
from start import TRIVIAL, fill_queue

GOAL = 1.5
PROGRAM = [str(Path(sys.executable).with_name("mosaic-queue"))]


def peer_of(home: Home, stack: Any, words: list[str]) -> Peer:
    """A client of an MCP server that has been greeted."""
    process = stack.enter_context(home.started(*words, stdin=subprocess.PIPE))
    peer = Peer(process)
    who = {"name": "bench", "version": "1"}
    peer.ask("initialize", protocolVersion="2025-11-25", capabilities={}, clientInfo=who)
    peer.tell("notifications/initialized")
    return peer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--calls", type=int, default=200)
    given = parser.parse_args()
    home = Home(PROGRAM, Path("/nonexistent"))
    ms: dict[str, list[float]] = {}

    def call(peer: Peer, title: str, name: str, **arguments: Any) -> None:
        began = time.perf_counter()
        answer = peer.ask("tools/call", name=name, arguments=arguments)
        ms.setdefault(title, []).append((time.perf_counter() - began) * 1000)
        assert not answer.get("isError"), answer

    try:
        fill_queue(home, PROGRAM)
        trivial = home.path / "trivial.py"
        trivial.write_text(TRIVIAL)
        with contextlib.ExitStack() as stack:
            bare = peer_of(home, stack, [sys.executable, str(trivial)])
            ours = peer_of(home, stack, [*PROGRAM, "mcp", "--project", "web"])
            for n in range(given.rounds * given.calls):
                task = f"T{n}"
                call(bare, "trivial", "add", a=n, b=1)
                call(ours, "claim", "queue_claim", task=task, agent="a")
                call(ours, "complete", "queue_complete", task=task, agent="a", summary="done")
                call(ours, "list of 25", "queue_list", status="pending")
                call(ours, "get", "queue_get", task=task)
            for peer in (bare, ours):
                assert peer.process.stdin
                peer.process.stdin.close()
    finally:
        home.close()
    base = statistics.median(ms["trivial"])
    for title, took in ms.items():
        middle = statistics.median(took)
        print(f"{title:12}{middle:8.2f} ms{middle / base:8.2f} times (goal: {GOAL})")


if __name__ == "__main__":
    main()
