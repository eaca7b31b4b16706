"""Everything at once on one project, everything killed, and a checker that has seen it all.

    python tests/chaos.py [--minutes N] [--seed S] [--seconds S] [--keep]

Agents on every surface (commands, MCP over stdio and HTTP, REST, Python, `run`), a TASKS.md that
somebody edits and SQL edits of the record share one project.  Meanwhile agents, monitors, `serve`
and Valkey are killed, processes are stopped past their leases, a proxy before Valkey drops,
delays and repeats what is sent and loses replies, memory is full, the project is paused.  Clocks
of clients are wrong by hours, and half of the processes are of the commit before.

Then it is quiet, and the agents finish what there is.  Every call and answer is in a history;
`history.judge` says whether they can be explained, by each other and by the event stream, and
`doctor` finds nothing.  A run takes about `--seconds` of storm and as long of calm, with a seed of
its own that is printed; `--minutes` runs one after the other.  What one decides follows from its
seed, when it comes does not; --keep leaves history, events and logs of a run, which `--judge
FOLDER` judges again.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1]))

import asyncpg
import httpx2
import redis
from conftest import BINARIES, Server, Shim, free_port
from history import Recorder, judge, read_history, told_of
from invariants import event, problems

import mosaic_queue as mq

HERE = Path(mq.__file__).parent
TTL, CAP, LIMIT = 4, 3, 20  # s of a lease; held tasks of lane coding; s for an answer
OPEN = 12  # tasks that there are to do at a time
OTHERS = ("file:", "sql:", "run-")  # who write no history


class NoAnswer(Exception):
    """A call whose answer never came."""


# ---- programs ----

PROGRAM = """
import sys, time
real = time.time
time.time = lambda: real() + {offset}
sys.path.insert(0, {folder!r})
import mosaic_queue as mq
sys.exit(mq.main())
"""


def commit_before(into: Path) -> Path | None:
    """The program as the commit before has it; None where there is no history of commits."""
    words = ["git", "-C", str(HERE), "archive", "HEAD~1", "mosaic_queue.py", "lua"]
    packed = subprocess.run(words, capture_output=True)
    if packed.returncode:
        return None
    into.mkdir()
    subprocess.run(["tar", "-x", "-C", str(into)], input=packed.stdout, check=True)
    return into


# ---- the way to Valkey ----


class Proxy:
    """A socket that leads to the server, and what it does to what passes."""

    def __init__(self, target: Path, folder: Path, rng: random.Random) -> None:
        self.target, self.socket, self.rng = target, folder / "proxy", rng
        self.fault = ""
        self.open: set[asyncio.StreamWriter] = set()

    async def __aenter__(self) -> Proxy:
        self.listener = await asyncio.start_unix_server(self.connected, str(self.socket))
        return self

    async def __aexit__(self, *_: object) -> None:
        self.listener.close()
        self.cut()

    def cut(self) -> None:
        """Close every connection at once."""
        for writer in self.open:
            writer.close()

    async def connected(self, client: asyncio.StreamReader, back: asyncio.StreamWriter) -> None:
        server: asyncio.StreamWriter | None = None
        with contextlib.suppress(OSError, asyncio.CancelledError):
            replies, server = await asyncio.open_unix_connection(str(self.target))
            self.open |= {back, server}
            ways = [asyncio.create_task(self.pump(client, server, "commands")),
                    asyncio.create_task(self.pump(replies, back, "replies"))]  # fmt: skip
            await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
            for way in ways:
                way.cancel()
        for writer in (back, server):
            if writer:
                self.open.discard(writer)
                writer.close()

    async def pump(
        self, source: asyncio.StreamReader, target: asyncio.StreamWriter, what: str
    ) -> None:
        with contextlib.suppress(OSError):
            while data := await source.read(1 << 16):
                hit = self.fault and self.rng.random() < 0.3
                if hit and self.fault == "delay":
                    await asyncio.sleep(self.rng.uniform(0, 1.5))
                elif hit and (self.fault, what) in (("lose", "replies"), ("drop", "commands")):
                    return
                elif hit and self.fault == "repeat" and what == "commands":
                    await self.send_too(data)
                target.write(data)
                await target.drain()

    async def send_too(self, data: bytes) -> None:
        """The same commands on a connection of its own, whose replies nobody reads."""
        if b"EVALSHA" in data:
            replies, server = await asyncio.open_unix_connection(str(self.target))
            server.write(data)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(replies.read(1), 0.2)
            server.close()


# ---- surfaces: an operation and its arguments become a call, the answer a task ----


def task_in(said: Any) -> dict[str, Any]:
    """The task of an answer; {} for none."""
    tasks = said.get("tasks", [said])
    return dict(tasks[0]) if tasks else {}


class Python:
    fences = True

    def __init__(self, storm: Storm, agent: str, rng: random.Random) -> None:
        self.queue = mq.Queue(storm.config(agent), session=secrets.token_hex(8), deadline=6)

    async def call(self, op: str, given: dict[str, Any]) -> dict[str, Any]:
        return task_in(await getattr(self.queue, op)(**given))

    async def close(self) -> None:
        await self.queue.close()


class Commands:
    fences = True

    def __init__(self, storm: Storm, agent: str, rng: random.Random) -> None:
        self.storm, self.agent, self.rng = storm, agent, rng

    async def call(self, op: str, given: dict[str, Any]) -> dict[str, Any]:
        of, words, flags = mq.OPERATIONS[op], [], ["--json", "--agent", self.agent]
        for name, parameter in of.parameters.items():
            value = given.get(name)
            if value is None or name == "agent":
                continue
            if name in ("task", "text") or (op == "create" and name in ("project", "mission")):
                words.append(str(value))
            elif parameter.default is False or value is True:
                flags += [f"--{name}"] if value else []
            elif isinstance(value, list):
                flags += [word for one in value for word in ("--dependency", one)]
            else:
                flags += [f"--{name.replace('_', '-')}", str(value)]
        process = await self.storm.spawn(self.agent, of.command, *words, *flags)
        if self.rng.random() < 0.05:
            await asyncio.sleep(self.rng.uniform(0, 0.4))
            self.storm.end(process, "command")
        out, err = await process.communicate()
        if process.returncode in (0, 5):
            return task_in(json.loads(out))
        if process.returncode in (-9, 1):
            raise NoAnswer(err.decode())
        said = json.loads(err.splitlines()[-1])["error"]
        raise mq.Refused(said["code"], said["message"])

    async def close(self) -> None:
        pass


class Tools:
    """An MCP server over stdio, started anew when it has died."""

    fences = False

    def __init__(self, storm: Storm, agent: str, rng: random.Random) -> None:
        self.storm, self.agent = storm, agent
        self.process: asyncio.subprocess.Process | None = None

    async def begin(self) -> None:
        words = ("mcp", "--tools", "orchestrator")
        self.process = await self.storm.spawn(self.agent, *words)
        self.storm.killable[self.agent] = self.process
        hello = {"name": "chaos", "version": "1"}
        await self.ask("initialize", protocolVersion="2025-06-18", capabilities={},
                       clientInfo=hello)  # fmt: skip
        self.send({"method": "notifications/initialized"})

    def send(self, message: dict[str, Any]) -> None:
        assert self.process
        assert self.process.stdin
        self.process.stdin.write(json.dumps({"jsonrpc": "2.0", **message}).encode() + b"\n")

    async def ask(self, method: str, **params: Any) -> dict[str, Any]:
        number = secrets.randbelow(1 << 30)
        self.send({"id": number, "method": method, "params": params})
        assert self.process
        assert self.process.stdout
        while line := await self.process.stdout.readline():
            said = json.loads(line)
            if said.get("id") == number and "method" not in said:
                return dict(said)
        raise NoAnswer("the server has ended")

    async def call(self, op: str, given: dict[str, Any]) -> dict[str, Any]:
        if self.process is None or self.process.returncode is not None:
            await self.begin()
        try:
            async with asyncio.timeout(LIMIT):
                said = await self.ask("tools/call", name=f"queue_{op}", arguments=mq_names(given))
        except (TimeoutError, OSError) as problem:
            raise NoAnswer(str(problem)) from None
        return result_of(said)

    async def close(self) -> None:
        if self.process:
            self.storm.end(self.process, "")


def mq_names(given: dict[str, Any]) -> dict[str, Any]:
    return {mq.camel(name): value for name, value in given.items() if value is not None}


def result_of(said: dict[str, Any]) -> dict[str, Any]:
    """The task in a result of MCP; raises the refusal in it."""
    if "result" not in said:
        raise NoAnswer(str(said))
    text = said["result"]["content"][0]["text"]
    if said["result"].get("isError"):
        code, _, sentence = text.partition(": ")
        raise mq.Refused(code, sentence)
    # What is no task is said in words, and so is a lost lease, beside the answer.
    found = text.find("{")
    if found < 0:
        return {}
    return task_in(json.JSONDecoder().raw_decode(text[found:])[0])


class Rest:
    fences = True

    def __init__(self, storm: Storm, agent: str, rng: random.Random) -> None:
        self.client = httpx2.AsyncClient(base_url=storm.served, timeout=LIMIT)

    async def send(self, method: str, path: str, body: Any) -> Any:
        try:
            said = await self.client.request(method, path, json=body)
            return said, said.json()
        except (httpx2.HTTPError, ValueError) as problem:
            await asyncio.sleep(0.3)
            raise NoAnswer(str(problem)) from None

    async def call(self, op: str, given: dict[str, Any]) -> dict[str, Any]:
        call = {"project": "p", **given}
        if "task" in given and op != "create":
            call["task"] = f"p/{given['task']}"
        elif op == "create":
            call["taskId"] = call.pop("task")
        method, path, *body = mq.http_call(op, call).split(" ", 2)
        said, answer = await self.send(method, path, json.loads(body[0]) if body else None)
        if said.is_success:
            return task_in(answer)
        if "code" not in answer:
            raise NoAnswer(str(answer))
        raise mq.Refused(answer["code"], answer["detail"])

    async def close(self) -> None:
        await self.client.aclose()


class ToolsOfHttp(Rest):
    fences = False

    async def call(self, op: str, given: dict[str, Any]) -> dict[str, Any]:
        given = {"project": "p", **given}
        params = {"name": f"queue_{op}", "arguments": mq_names(given)}
        message = {"jsonrpc": "2.0", "id": 1, "method": "tools/call", "params": params}
        self.client.headers["accept"] = "application/json, text/event-stream"
        _, answer = await self.send("POST", "/mcp", message)
        return result_of(answer)


SURFACES: list[Callable[[Storm, str, random.Random], Any]] = [
    Python, Python, Commands, Commands, Tools, Tools, Rest, ToolsOfHttp,
]  # fmt: skip
NAMELESS = ("unblock", "redrive", "reopen")  # operations that name no agent


# ---- the storm ----


class Storm:
    def __init__(self, seed: int, seconds: float, folder: Path) -> None:
        self.rng, self.seconds, self.folder = random.Random(seed), seconds, folder
        options = ("--appendonly", "yes", "--appendfsync", "always")
        self.server = Server(str(BINARIES["valkey"]()), *options)
        self.recorder = Recorder(folder / "history")
        older = commit_before(folder / "before")
        self.versions = [HERE, older] if older else [HERE]
        self.port = free_port()
        self.served = f"http://127.0.0.1:{self.port}"
        self.log = open(folder / "log", "wb")  # noqa: SIM115
        self.killable: dict[str, asyncio.subprocess.Process] = {}
        self.processes: list[asyncio.subprocess.Process] = []
        self.did: Counter[str] = Counter()
        self.lanes: dict[str, str] = {}
        self.calm = self.over = False
        self.postgres = ""

    def config(self, agent: str = "") -> mq.Config:
        config = mq.Config(environ={}).set("project", "p", "chaos")
        config.set("redis.url", f"unix://{self.folder / 'proxy'}", "chaos")
        config.set("lanes.coding.maxConcurrent", CAP, "chaos")
        config.set("defaults.maxRetries", 5, "chaos").set("defaults.retryDelay", 0, "chaos")
        return config.set("agent", agent, "chaos") if agent else config

    async def spawn(self, agent: str, *words: str) -> asyncio.subprocess.Process:
        """A process of one of the versions, whose clock is wrong."""
        values = {"folder": str(self.rng.choice(self.versions)),
                  "offset": self.rng.choice([0, 0, 7200, -7200, 90_000])}  # fmt: skip
        environ = {"PATH": os.environ["PATH"], "HOME": str(self.folder), "MOSAIC_PROJECT": "p",
                   "MOSAIC_VALKEY_URL": f"unix://{self.folder / 'proxy'}", "MOSAIC_AGENT": agent,
                   "MOSAIC_QUEUE_CONFIG": str(self.folder / "queue.yaml")}  # fmt: skip
        pipe = asyncio.subprocess.PIPE
        is_command = words[0] not in ("mcp", "monitor", "serve", "run")
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-c", PROGRAM.format_map(values), *words, env=environ,
            cwd=self.folder, stdin=pipe, stdout=pipe if is_command or words[0] == "mcp" else None
            or self.log, stderr=pipe if is_command else self.log, limit=1 << 22,
        )  # fmt: skip
        self.processes.append(process)
        return process

    def end(self, process: asyncio.subprocess.Process, what: str) -> None:
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            self.did.update([f"kill {what}"] if what else [])

    # ---- agents ----

    async def agent(self, name: str, surface: Any, rng: random.Random) -> None:
        mine: dict[str, int] = {}
        while not self.over:
            op, given = self.choose(rng, name, mine, surface.fences)
            try:
                await self.call(op, given, name, surface, mine)
            except mq.Refused as problem:
                gone = ("NOT_", "STALE", "WRONG") if op != "start" else ("NOT_", "STALE")
                if problem.code.startswith(gone):
                    mine.pop(given.get("task", ""), None)
            except NoAnswer:
                pass
            await asyncio.sleep(rng.uniform(0, 0.3))

    async def call(
        self, op: str, given: dict[str, Any], name: str, surface: Any, mine: dict[str, int]
    ) -> None:
        told = {"next": "claim", "heartbeat": "progress"}.get(op, op)
        if op not in (*NAMELESS, "get", "create"):
            given = {"agent": name, **given}
        nameless = "agent" not in given and isinstance(surface, Rest)
        who = mq.user_at_host() if nameless else name
        more = {"fence": given["fence"]} if given.get("fence") else {}
        with self.recorder.call(told, given.get("task", ""), who, **more) as answer:
            task = await surface.call(op, given)
            answer |= told_of(task) if task else {"code": "NOTHING"}
        if not task:
            return
        if told == "claim":
            mine[answer["taskId"]] = task["fence"]
        elif told in ("complete", "fail", "release", "block"):
            mine.pop(answer["taskId"], None)

    def choose(
        self, rng: random.Random, name: str, mine: dict[str, int], fences: bool
    ) -> tuple[str, dict[str, Any]]:
        """What an agent does next: it works on what it holds, or looks for work; now and then
        something that a good agent would not do."""
        dice = rng.random()
        if mine and (self.calm or dice < 0.8):
            task = rng.choice(sorted(mine))
            ops = ["start", "heartbeat", "heartbeat", "complete", "complete", "complete", "fail",
                   "release", "block"]  # fmt: skip
            op = "complete" if self.calm else rng.choice(ops)
            given = {"task": task, "fence": mine[task] if fences else None}
            return op, given | ARGUMENTS.get(op, {})
        if self.calm or dice < 0.9:
            lane = rng.choice([None, "coding"])
            return "next", {"lane": lane, "ttl": TTL, "wait": 1, "resume": self.calm or None}
        task = rng.choice(sorted(self.lanes))
        op = rng.choice(
            ["claim", "complete", "note", "get", "unblock", "redrive", "reopen", "create"]
        )
        if op == "create":
            task = f"{name}-{rng.randrange(10_000)}"
            self.lanes[task] = lane = rng.choice(["any", "coding"])
            return op, {"project": "p", "mission": "m", "task": task, "title": "t", "lane": lane}
        return op, {"task": task, **ARGUMENTS.get(op, {})}

    async def feed(self, queue: mq.Queue) -> None:
        """A batch of tasks; a third waits for the one before it."""
        while not self.calm:
            with contextlib.suppress(mq.Refused):
                counts = (await mq.status(queue, project="p"))["projects"][0]["tasks"]
                for n in range(max(OPEN - counts["pending"] - counts["blocked"], 0)):
                    task = f"T{len(self.lanes)}"
                    on = [self.rng.choice(sorted(self.lanes))] if n % 3 == 2 else []
                    await self.create(queue, task, on)
            await asyncio.sleep(0.3)

    async def create(self, queue: mq.Queue, task: str, on: list[str]) -> None:
        self.lanes[task] = lane = self.rng.choice(["any", "coding"])
        with self.recorder.call("create", task, queue.actor) as answer:
            named: dict[str, Any] = {"title": "a task", "lane": lane, "dependencies": on}
            answer |= told_of(await queue.create("p", "m", task, **named))

    # ---- people ----

    async def edit_file(self) -> None:
        """Somebody who completes, renames and adds rows in an editor that knows no lock."""
        path, n = self.folder / "TASKS.md", 0
        while not self.calm:
            await asyncio.sleep(self.rng.uniform(0.5, 2))
            lines = path.read_text().splitlines()
            at = self.rng.randrange(2, len(lines)) if len(lines) > 2 else 0
            cells = lines[at].split("|")
            if at and len(cells) == 5 and self.rng.random() < 0.6:
                cells[2] = self.rng.choice([" done ", cells[2]])
                cells[3] = f" edited {n} "
                lines[at] = "|".join(cells)
            else:
                lines.append(f"| F{n} | not-started | from the file |")
            n += 1
            path.write_text("\n".join(lines) + "\n")

    async def edit_record(self) -> None:
        """Somebody who completes and renames in SQL."""
        while not self.calm:
            await asyncio.sleep(self.rng.uniform(0.5, 2))
            task = self.rng.choice(sorted(self.lanes))
            change = self.rng.choice(["status = 'completed'", "title = 'renamed'"])
            with contextlib.suppress(asyncpg.PostgresError, OSError):
                db = await asyncpg.connect(
                    self.postgres, server_settings={"search_path": "mosaic_queue"}
                )
                try:
                    await db.execute(
                        f"update tasks set {change} where task_id = $1 and gone is null", task
                    )
                finally:
                    db.terminate()

    # ---- faults ----

    async def keep(self, name: str, *words: str) -> None:
        """A process that is started again whenever it has ended."""
        while not self.over:
            process = self.killable[name] = await self.spawn(name, *words)
            await process.wait()

    async def rage(self, proxy: Proxy, db: redis.Redis, queue: mq.Queue) -> None:
        """One fault after the other until the time is over; then nothing is wrong any more."""
        until = time.monotonic() + self.seconds
        faults = [*["kill"] * 4, "stop", "stop", "drop", "delay", "lose", "lose", "repeat", "cut",
                  "memory", "pause"]  # fmt: skip
        restarts = [until - self.seconds * part for part in (0.8, 0.5)]
        while time.monotonic() < until:
            await asyncio.sleep(self.rng.uniform(0.2, 1))
            fault, span = self.rng.choice(faults), self.rng.uniform(0.3, 2)
            if restarts and time.monotonic() > restarts[0]:
                restarts.pop(0)
                fault = "restart"
            self.did.update([fault] if fault != "kill" else [])
            await self.strike(fault, span, proxy, db, queue)
        self.calm, proxy.fault = True, ""

    async def strike(
        self, fault: str, span: float, proxy: Proxy, db: redis.Redis, queue: mq.Queue
    ) -> None:
        name = self.rng.choice(sorted(self.killable) or [""])
        process = self.killable.get(name)
        if fault == "kill" and process:
            self.end(process, name.rstrip("0123456789-"))
        elif fault == "stop" and process and process.returncode is None:
            process.send_signal(signal.SIGSTOP)
            await asyncio.sleep(self.rng.choice([span, 1.5 * TTL]))
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(signal.SIGCONT)
        elif fault == "cut":
            proxy.cut()
        elif fault == "memory":
            with contextlib.suppress(redis.RedisError):
                await asyncio.to_thread(db.config_set, "maxmemory", 1)
                await asyncio.sleep(span)
                await asyncio.to_thread(db.config_set, "maxmemory", 0)
        elif fault == "pause":
            with contextlib.suppress(mq.Refused):
                await queue.pause(project="p")
                await asyncio.sleep(span)
            await settle(lambda: queue.unpause(project="p"))
        elif fault == "restart":
            await asyncio.to_thread(self.server.kill)
            await asyncio.sleep(span / 2)
            await asyncio.to_thread(self.server.start)
        elif fault in ("drop", "delay", "lose", "repeat"):
            proxy.fault = fault
            await asyncio.sleep(span)
            proxy.fault = ""

    async def reap(self) -> None:
        """Leases are ended from here, as by a server that has been up for long; the monitors'
        grace after each restart would last longer than the run."""
        config = self.config().set("redis.url", self.server.url, "chaos")
        async with mq.Queue(config) as queue:
            while not self.over:
                with contextlib.suppress(mq.Refused):
                    await queue.reap(project="p")
                await asyncio.sleep(0.5)

    # ---- from beginning to end ----

    async def run(self) -> list[str]:
        """What is wrong in the end."""
        from test_record import Cluster

        record = Cluster()
        self.postgres = record.of("postgres")
        given = {"files": ["TASKS.md"], "watchdog": {"interval": 1}}
        given |= {"postgres": {"url": self.postgres}}
        (self.folder / "queue.yaml").write_text(json.dumps(given))
        (self.folder / "TASKS.md").write_text("| id | status | title |\n|---|---|---|\n")
        try:
            queue = mq.Queue(self.config(), deadline=20)
            async with Proxy(self.server.socket, self.folder, self.rng) as proxy, queue:
                await self.create(queue, "T0", [])
                return await self.act(proxy, queue)
        finally:
            record.close()

    async def act(self, proxy: Proxy, queue: mq.Queue) -> list[str]:
        surfaces = []
        run = ["run", "--agent", "run-0", "--loop", "--wait", "60", "--ttl", str(TTL)]
        run += ["--", "sh", "-c", "sleep 0.2; exit $(($$ % 7 == 0))"]
        work = [self.reap(), self.keep("serve", "serve", "--port", str(self.port))]
        work += [self.keep(f"monitor-{n}", "monitor") for n in range(2)]
        work += [self.keep("run-0", *run)]
        people = [self.feed(queue), self.edit_file(), self.edit_record()]
        for n, make in enumerate(SURFACES):
            rng = random.Random(self.rng.random())
            surfaces.append(make(self, f"{make.__name__.lower()}-{n}", rng))
            work.append(self.agent(f"{make.__name__.lower()}-{n}", surfaces[-1], rng))
        tasks = [asyncio.create_task(one) for one in work]
        editing = [asyncio.create_task(one) for one in people]
        try:
            await self.rage(proxy, self.server.client(), queue)
            await asyncio.gather(*editing)
            left = await self.finish(queue)
        finally:
            self.over = True
            for process in self.processes:
                self.end(process, "")
            for task in (*tasks, *editing):
                task.cancel()
            ended = await asyncio.gather(*tasks, return_exceptions=True)
            for surface in surfaces:
                await surface.close()
        failed = [repr(one) for one in ended if isinstance(one, Exception)]
        return [*left, *failed, *await self.judge(queue)]

    async def finish(self, queue: mq.Queue) -> list[str]:
        """Let the agents finish what there is; people unblock and redrive."""
        give_up = time.monotonic() + 90
        while time.monotonic() < give_up:
            counts = (await mq.status(queue, project="p"))["projects"][0]["tasks"]
            if counts["completed"] == sum(counts.values()):
                return []
            for status, op in (("failed", "redrive"), ("blocked", "unblock")):
                for task in (await queue.list(status=status, limit=100))["tasks"]:
                    await self.tell(queue, op, task["taskId"])
            await asyncio.sleep(0.5)
        return [f"after 90 s of calm: {counts}"]

    async def tell(self, queue: mq.Queue, op: str, task: str) -> None:
        """A call of a person."""
        with contextlib.suppress(mq.Refused), self.recorder.call(op, task, queue.actor) as answer:
            made: Any = await getattr(queue, op)(f"p/{task}")
            answer |= told_of(task_in(made))

    async def judge(self, queue: mq.Queue) -> list[str]:
        await queue.reap(project="p")
        for task in self.lanes:
            await self.tell(queue, "get", task)
        doctor = await mq.doctor(queue, project="p")
        wrong = [f"doctor: {said}" for said in doctor["findings"] if "append-only" not in said]
        db = self.server.client()
        wrong += problems(db, "p")
        (self.folder / "events").write_text(
            json.dumps(db.xrange("mosaic:queue:project:{p}:events"))
        )
        (self.folder / "lanes").write_text(json.dumps(self.lanes))
        self.log.flush()
        said = (self.folder / "log").read_text(errors="replace")
        if "Traceback" in said:
            wrong.append("a process says:\n" + said[said.index("Traceback") :][:3000])
        return wrong + judge_again(self.folder)

    def close(self) -> None:
        self.recorder.file.close()
        self.log.close()
        self.server.close()


async def settle(call: Callable[[], Any]) -> None:
    """Make a call until it is not refused."""
    while True:
        with contextlib.suppress(mq.Refused):
            return await call()
        await asyncio.sleep(0.2)


ARGUMENTS: dict[str, dict[str, Any]] = {
    "heartbeat": {"progress": "on it"}, "fail": {"reason": "bad luck", "delay": 0},
    "block": {"reason": "ask"}, "note": {"text": "seen"}, "claim": {"ttl": TTL},
    "reopen": {"reason": "again"},
}  # fmt: skip


def judge_again(folder: Path) -> list[str]:
    """What the checker says of a history and its events."""
    calls = read_history(folder / "history")
    rows = json.loads((folder / "events").read_text())
    events = [event(entry, ["e", fields["e"]]) for entry, fields in rows]
    others = {one.agent for one in events if one.agent.startswith(OTHERS)}
    lanes = json.loads((folder / "lanes").read_text())
    codes = Counter(call.code or "no answer" for call in calls)
    ops = Counter(one.op for one in events)
    print(f"{len(calls)} calls: {dict(codes.most_common())}")
    print(f"{len(events)} events: {dict(ops.most_common())}")
    return judge(calls, events, {"coding": CAP}, lanes, others)


def chaos(seed: int, seconds: float, keep: bool = False) -> list[str]:
    """One run; what is wrong in the end."""
    folder = Path(tempfile.mkdtemp(prefix="mq-chaos-"))
    began, shipped = time.monotonic(), mq.script
    mq.script = Shim().script  # type: ignore[assignment]
    print(f"seed {seed}, {seconds:.0f} s of storm; {folder}", flush=True)
    storm = Storm(seed, seconds, folder)
    try:
        wrong = asyncio.run(storm.run())
    finally:
        mq.script = shipped
        storm.close()
    print(f"{time.monotonic() - began:.0f} s; {dict(storm.did.most_common())}")
    for one in wrong:
        print("WRONG:", one)
    print("nothing is wrong" if not wrong else f"{len(wrong)} things are wrong", flush=True)
    if not (wrong or keep):
        shutil.rmtree(folder)
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--minutes", type=float, default=0)
    parser.add_argument("--seconds", type=float, default=40)
    parser.add_argument("--seed", type=int, default=secrets.randbelow(10**6))
    parser.add_argument("--keep", action="store_true")
    parser.add_argument("--judge", type=Path)
    given = parser.parse_args()
    if given.judge:
        wrong = judge_again(given.judge)
        print(*wrong, sep="\n")
        return bool(wrong)
    until, seed, bad = time.monotonic() + 60 * given.minutes, given.seed, 0
    while True:
        bad += bool(chaos(seed, given.seconds, given.keep))
        seed += 1
        if time.monotonic() >= until:
            return bad > 0


if __name__ == "__main__":
    sys.exit(main())
