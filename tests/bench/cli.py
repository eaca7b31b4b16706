"""How long a command takes, beside what nobody can avoid.

    python tests/bench/cli.py [--runs N] [--pyz FILE]

`--help` beside `python -c pass`; `list --json` of 25 tasks and `claim` beside a Python that imports
redis and sends a PING; `status` over 1,000 projects.  The least of alternating runs, so that a
busy machine makes all of them slow or none.  Goals: --help about 50 ms; a command at most 0.75
times `import redis` + PING; from the zipapp at most 40 ms more; the status within 0.3 s.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[2]))

from conftest import Server
from scripts import Ours

import mosaic_queue as mq

GOAL = 0.75
PROJECTS = 1000


async def fill_projects(url: str) -> None:
    """A pending task in each of many projects."""
    config = mq.Config(environ={}).set("redis.url", url, "bench")
    rows = [{"mission": "m", "taskId": "T", "title": "a task"}]
    async with mq.Queue(config) as queue:
        for at in range(PROJECTS):
            await queue.create_all(rows, project=f"p{at:04}")  # type: ignore[arg-type]


def least(commands: dict[str, list[str]], runs: int) -> dict[str, float]:
    """The shortest time of each command, in ms.  Each has to succeed; {n} is the run's number."""
    shortest = dict.fromkeys(commands, float("inf"))
    with tempfile.TemporaryDirectory() as folder:
        environ = {"PATH": os.environ["PATH"], "HOME": folder}
        for n in range(runs):
            for name, words in commands.items():
                command = [word.replace("{n}", f"{n:05}") for word in words]
                began = time.perf_counter()
                subprocess.run(command, env=environ, cwd=folder, check=True, capture_output=True)
                took = (time.perf_counter() - began) * 1000
                shortest[name] = min(shortest[name], took)
    return shortest


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--pyz", help="a zipapp to compare with", metavar="FILE")
    runs, pyz = vars(parser.parse_args()).values()
    server = Server(mq.server_binary())
    try:
        with server.client() as client:
            ours = Ours(client)
            ours.run("create", *range(max(25, runs)))
        asyncio.run(fill_projects(server.url))
        # As the console script does: the module is imported, and so compiled once.
        called = f"import sys; sys.path.insert(0, {str(Path(mq.__file__).parent)!r}); "
        program = [sys.executable, "-c", called + "import mosaic_queue; mosaic_queue.main()"]
        ping = f"import redis; redis.Redis(unix_socket_path={str(server.socket)!r}).ping()"
        where = ["--url", server.url]
        claim = ["claim", "bench", "T{n}", "--agent", "a", "--json", *where]
        listing = ["list", "--project", "bench", "--json", *where]
        commands = {
            "python -c pass": [sys.executable, "-c", "pass"],
            "--help": [*program, "--help"],
            "import redis + PING": [sys.executable, "-c", ping],
            "list --json": [*program, *listing],
            "claim --json": [*program, *claim],
            "status of many": [*program, "status", "--json", *where],
        }
        if pyz:
            commands["zipapp, list --json"] = [sys.executable, str(Path(pyz).resolve()), *listing]
        ms = least(commands, runs)
    finally:
        server.close()
    for name, took in ms.items():
        print(f"{name:22}{took:8.1f} ms")
    print(f"--help / python -c pass             {ms['--help'] / ms['python -c pass']:5.2f}")
    for name in ("list --json", "claim --json"):
        ratio = ms[name] / ms["import redis + PING"]
        print(f"{name:12} / import redis + PING  {ratio:5.2f} (goal: {GOAL})")
    print(
        f"status over {PROJECTS:,} projects, s     {ms['status of many'] / 1000:7.2f} (goal: 0.3)"
    )
    if pyz:
        more = ms["zipapp, list --json"] - ms["list --json"]
        print(f"zipapp, list --json, more by        {more:5.1f} ms (goal: 40)")


if __name__ == "__main__":
    main()
