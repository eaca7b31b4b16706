"""How fast a queue is drained, and what a task costs, beside the queues that others run.

    python tests/bench/drain.py --install        BullMQ, taskiq, arq, ... into a cache folder
    python tests/bench/drain.py [--quick] [--sides a,b] [--json FILE] [--svg FILE]

All sides that are installed work in turns on one server: it is emptied, filled in the side's own
way, and drained by 1, 2 or 4 processes that do 1, 10 or 50 tasks at once.  A task does nothing, so
that what is measured is the queue.  What happens from the first tenth of the tasks to the last is
counted: starts are not.  CPU is that of the server and of the workers, round trips are what the
server reads from its sockets, bytes what it reads and writes, all of them for each task.

`floor` is bare Lua that does the least over our own connection: no events, fences of sessions,
dependencies, lanes or receipts.  `ours in tens` asks for ten tasks at a time, by one worker where
the others have ten.  rq and celery do one task at a time in a process.  Figures of one run compare
sides; two runs do not compare.

Linux only: the CPU of a process is read from /proc.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import socket
import statistics
import struct
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from html import escape
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from conftest import BINARIES, Server

HERE = Path(__file__).parent
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "mosaic-queue-bench"
SIDES = {  # what is installed for each; "" is this interpreter, "node" BullMQ of npm
    "floor": "",
    "ours": "",
    "ours in tens": "",
    "BullMQ Node": "node",
    "bullmq-py": "bullmq",
    "taskiq": "taskiq taskiq-redis",
    "arq": "arq",
    "saq": "saq[redis] typing_extensions",
    "streaq": "streaq",
    "celery": "celery[redis]",
    "rq": "rq",
}
ONE_BY_ONE = ("celery", "rq")
SLOW = {"rq": 4, "streaq": 2, "celery": 2}  # how many times fewer tasks they get
SHAPES = {  # by appendfsync: processes, and how many tasks at once in each
    "no": [(1, 1), (1, 10), (1, 50), (2, 50), (4, 50)],
    "always": [(1, 1), (1, 10), (1, 50)],
}
QUICK = {"no": [(1, 10)]}
MEASURES = ("tasks/s", "server us", "client us", "round trips", "bytes in", "bytes out")
GIVE_UP = 120  # s for one drain
Key = tuple[str, str, int, int]  # side, appendfsync, processes, tasks at once


def folder_of(side: str) -> Path:
    """Where a side is installed."""
    return CACHE / ("node" if SIDES[side] == "node" else SIDES[side].split()[0].partition("[")[0])


def install() -> None:
    """Install each side into a folder of its own: their dependencies contradict each other."""
    for side, packages in SIDES.items():
        folder = folder_of(side)
        if packages == "node" and shutil.which("npm"):
            folder.mkdir(parents=True, exist_ok=True)
            command = ["npm", "install", "--prefix", str(folder), "bullmq", "ioredis"]
            subprocess.run(command, check=False, stdout=subprocess.DEVNULL)
        elif packages and packages != "node":
            subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
            pip = [str(folder / "bin" / "pip"), "install", "-q", *packages.split(), "hiredis"]
            subprocess.run(pip, check=False)


def command_of(side: str, what: str, number: int) -> list[str] | None:
    """The command of a worker; None where the side is not installed."""
    name = side.replace(" ", "_").replace("-", "_")
    if SIDES[side] == "node":
        if not (folder_of(side) / "node_modules" / "bullmq").is_dir() or not shutil.which("node"):
            return None
        program = shutil.copy(HERE / "drain_worker.mjs", folder_of(side))
        return ["node", str(program), what, str(number)]
    python = folder_of(side) / "bin" / "python" if SIDES[side] else Path(sys.executable)
    worker = [str(HERE / "drain_worker.py"), name, what, str(number)]
    return [str(python), *worker] if python.exists() else None


def cpu_of(process: subprocess.Popen[Any]) -> float:
    """Seconds that a process has worked, with the children that have ended."""
    fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
    return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")


class Bench:
    """One server, and the drains on it."""

    def __init__(self) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        binary = str(BINARIES["valkey"]())
        options = ("--port", str(port), "--bind", "127.0.0.1", "--appendonly", "yes")
        self.server = Server(binary, *options, "--appendfsync", "no")
        self.client = self.server.client()
        self.url = f"redis://127.0.0.1:{port}"
        self.counts = self.server.folder / "counts"

    def start(self, side: str, what: str, number: int, slot: int = 0) -> subprocess.Popen[Any]:
        """A worker that is ready to begin."""
        command = command_of(side, what, number)
        assert command, side
        environ = {"DRAIN_URL": self.url, "DRAIN_SLOT": str(slot), "DRAIN_COUNTS": str(self.counts)}
        with (self.server.folder / "worker.log").open("ab") as log:
            process = subprocess.Popen(
                command, env=os.environ | environ, stdin=-1, stdout=-1, stderr=log
            )
        assert process.stdout
        assert process.stdout.readline() == b"ready\n", f"{side} does not start: {log.name}"
        return process

    def snapshot(self, workers: Iterable[subprocess.Popen[Any]]) -> dict[str, float]:
        """What has been spent so far, by measure; "tasks/s" are seconds."""
        info = self.client.info()
        return {
            "tasks/s": time.perf_counter(),
            "server us": 1e6 * (info["used_cpu_user"] + info["used_cpu_sys"]),
            "client us": 1e6 * sum(map(cpu_of, workers)),
            "round trips": info["total_reads_processed"],
            "bytes in": info["total_net_input_bytes"],
            "bytes out": info["total_net_output_bytes"],
        }

    def until(self, tasks: int) -> int:
        """Wait until so many tasks are done; how many are."""
        give_up = time.monotonic() + GIVE_UP
        while (done := sum(row[0] for row in struct.iter_unpack("q", self.read()))) < tasks:
            if time.monotonic() > give_up:
                raise TimeoutError(f"{done} of {tasks} tasks in {GIVE_UP} s")
            time.sleep(0.002)
        return done

    def read(self) -> bytes:
        return self.counts.read_bytes()

    def drain(self, key: Key, tasks: int) -> dict[str, float]:
        """Fill, drain, and say what each task took."""
        side, fsync, processes, concurrency = key
        self.client.flushall()
        self.client.config_set("appendfsync", "no")
        self.counts.write_bytes(bytes(8 * processes))
        filling = self.start(side, "fill", tasks)
        filling.communicate(b"go\n", timeout=GIVE_UP)
        assert filling.returncode == 0, side
        self.client.config_set("appendfsync", fsync)
        workers = [self.start(side, "drain", concurrency, slot) for slot in range(processes)]
        try:
            for worker in workers:
                assert worker.stdin
                worker.stdin.write(b"go\n")
                worker.stdin.flush()
            first = self.until(tasks // 10)
            before = self.snapshot(workers)
            self.until(tasks)
            after = self.snapshot(workers)
        finally:
            for worker in workers:
                worker.kill()
            for worker in workers:
                worker.communicate()
        count = tasks - first
        spent = {name: (after[name] - before[name]) / count for name in MEASURES}
        return spent | {"tasks/s": 1 / spent["tasks/s"]}


def measure(
    sides: Iterable[str], shapes_of: Mapping[str, Any], tasks: int, rounds: int
) -> dict[Key, Any]:
    """The drains of all sides in turns: by key the measures of each round."""
    keys: list[Key] = [
        (side, fsync, *shape)
        for fsync, shapes in shapes_of.items()
        for shape in shapes
        for side in sides
        if side not in ONE_BY_ONE or shape == shapes[0] or shape[0] > 1
    ]
    found: dict[Key, Any] = {}
    bench = Bench()
    try:
        for number in range(rounds):
            for key in keys:
                try:
                    spent = bench.drain(key, tasks // SLOW.get(key[0], 1))
                except (TimeoutError, AssertionError, subprocess.TimeoutExpired) as problem:
                    print(*key, type(problem).__name__, problem, file=sys.stderr)
                    continue
                found.setdefault(key, []).append(spent)
                said = f"round {number + 1}: {key}: {spent['tasks/s']:.0f} tasks/s"
                print(said, file=sys.stderr, flush=True)
    finally:
        bench.server.close()
    return found


def machine() -> str:
    """On what this was measured."""
    model = [
        line.partition(": ")[2]
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    load = os.getloadavg()[0]
    return (
        f"{len(model)} x {model[0] if model else platform.machine()}, Python "
        f"{platform.python_version()}, load {load:.1f} at the end"
    )


def table(found: Mapping[Key, list[dict[str, float]]]) -> str:
    """Medians, with the range of tasks/s, as a table in Markdown."""
    lines = [
        "| fsync | processes x at once | side | tasks/s (least to most) | "
        + " | ".join(MEASURES[1:]) + " |",
        "|---|---|---|---|" + "---|" * len(MEASURES[1:]),
    ]  # fmt: skip
    for (side, fsync, processes, concurrency), rounds in found.items():
        per_s = [one["tasks/s"] for one in rounds]
        cells = [f"{statistics.median(per_s):,.0f} ({min(per_s):,.0f} to {max(per_s):,.0f})"]
        for name in MEASURES[1:]:
            middle = statistics.median(one[name] for one in rounds)
            cells.append(f"{middle:.2f}" if name == "round trips" else f"{middle:,.0f}")
        shape = f"{processes} x {concurrency if side not in ONE_BY_ONE else 1}"
        lines.append(f"| {fsync} | {shape} | {side} | {' | '.join(cells)} |")
    return "\n".join(lines)


INK, MUTED, OURS, OTHERS = "#1f2328", "#59636e", "#0969da", "#afb8c1"


def panel(
    title: str, rows: list[tuple[str, float, float, float]], left: int
) -> tuple[list[str], int]:
    """Bars with their ranges, the longest first, and their height."""
    most = max(row[3] for row in rows)
    parts = [f'<text x="{left}" y="20" font-weight="600" fill="{INK}">{escape(title)}</text>']
    for number, (side, middle, least, greatest) in enumerate(rows):
        y, scale = 34 + 22 * number, 230 / most
        color = OURS if side.startswith("ours") else OTHERS
        start, line = left + 100, y + 8
        parts += [
            f'<text x="{start - 8}" y="{y + 12}" text-anchor="end" fill="{INK}">{side}</text>',
            f'<rect x="{start}" y="{y}" width="{middle * scale:.1f}" height="16" fill="{color}"/>',
            f'<line x1="{start + least * scale:.1f}" x2="{start + greatest * scale:.1f}" '
            f'y1="{line}" y2="{line}" stroke="{INK}"/>',
            f'<text x="{start + greatest * scale + 6:.1f}" y="{y + 12}" fill="{MUTED}">'
            f"{middle:,.0f}</text>",
        ]
    return parts, 34 + 22 * len(rows) + 10


def picture(found: Mapping[Key, list[dict[str, float]]]) -> str:
    """Tasks a second as each side does best, and what a task costs the server there."""
    best: dict[str, list[dict[str, float]]] = {}
    for (side, fsync, *_), rounds in found.items():
        now = best.get(side, rounds)
        if fsync == "no":
            middles = [statistics.median(x["tasks/s"] for x in one) for one in (rounds, now)]
            best[side] = rounds if middles[0] >= middles[1] else now
    parts: list[str] = []
    heights = []
    for number, (name, title) in enumerate(
        {"tasks/s": "Tasks a second", "server us": "CPU of the server, us a task"}.items()
    ):
        rows = [
            (side, statistics.median(values), min(values), max(values))
            for side, rounds in best.items()
            for values in [[one[name] for one in rounds]]
        ]
        rows.sort(key=lambda row: row[1], reverse=name == "tasks/s")
        drawn, height = panel(title, rows, 8 + 430 * number)
        parts += drawn
        heights.append(height)
    said = "The best of 1, 2 and 4 processes with 1, 10 and 50 tasks at once; medians and ranges."
    height = max(heights) + 24
    parts.append(f'<text x="8" y="{height - 12}" fill="{MUTED}">{said}</text>')
    size = f'width="860" height="{height}" viewBox="0 0 860 {height}"'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif" font-size="12">\n'
        f'<rect width="100%" height="100%" fill="#ffffff"/>\n' + "\n".join(parts) + "\n</svg>\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--install", action="store_true", help="install the peers, and end")
    parser.add_argument("--quick", action="store_true", help="one shape, few tasks, one round")
    parser.add_argument("--sides", help="only these, between commas")
    parser.add_argument("--fsync", default="no,always", help="appendfsync, between commas")
    parser.add_argument("--tasks", type=int, default=4000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures; or read them")
    parser.add_argument("--svg", type=Path, metavar="FILE", help="write the plot")
    given = parser.parse_args()
    if given.install:
        install()
        return
    chosen = given.sides.split(",") if given.sides else SIDES
    sides = [side for side in chosen if command_of(side, "drain", 1)]
    if given.json and given.json.exists():
        found = {tuple(key): rounds for key, rounds in json.loads(given.json.read_text())}
    else:
        tasks, rounds = (1000, 1) if given.quick else (given.tasks, given.rounds)
        shapes = {fsync: SHAPES[fsync] for fsync in given.fsync.split(",")}
        found = measure(sides, QUICK if given.quick else shapes, tasks, rounds)
        if given.json:
            given.json.write_text(json.dumps(list(found.items())))
    print(table(found))
    print(f"\n{machine()}; median of {given.rounds if not given.quick else 1}")
    if given.svg:
        given.svg.write_text(picture(found))


if __name__ == "__main__":
    main()
