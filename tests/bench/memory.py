"""What a task takes of the server's memory.

    python tests/bench/memory.py [--tasks N]

Tasks with 400 B of text, without dependencies, all pending, then all claimed, then all completed.
The figure is the rise of `used_memory` per task, with the task's share of every index and its
lock.  Receipts, which live 15 minutes, and the events, which are the same few thousand however
many tasks there are, are deleted before it is read, and shown beside it.

Goal: at most 1 KB for a pending task.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[2]))

import redis
from conftest import BINARIES, Server
from scripts import ROOT, Ours

GOAL = 1024


def used(client: redis.Redis) -> int:
    client.execute_command("MEMORY PURGE")
    return int(client.info("memory")["used_memory"])


def per_task(client: redis.Redis, tasks: int) -> dict[str, tuple[float, float]]:
    """Status -> bytes per task, and bytes of its receipts and events per call."""
    client.flushall()
    ours = Ours(client)
    empty, sizes = used(client), {}
    for step, status in (("create", "pending"), ("claim", "claimed"), ("complete", "completed")):
        for n in range(tasks):
            ours.run(step, n)
        whole = used(client)
        for receipts in iter(lambda: list(client.scan_iter(f"{ROOT}:op:*", 1000)), []):
            client.delete(*receipts)
        client.delete(f"{ROOT}:events")
        kept = used(client)
        sizes[status] = ((kept - empty) / tasks, (whole - kept) / tasks)
    return sizes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tasks", type=int, default=10_000)
    tasks = parser.parse_args().tasks
    for kind, binary in BINARIES.items():
        server = Server(str(binary()))
        try:
            with server.client() as client:
                for status, (kept, passing) in per_task(client, tasks).items():
                    line = f"{kind:8}{status:12}{kept:8.0f} B per task"
                    line += f", and {passing:4.0f} B of receipts and events"
                    print(line + (f" (goal: {GOAL} B)" if status == "pending" else ""))
        finally:
            server.close()


if __name__ == "__main__":
    main()
