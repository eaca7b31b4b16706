"""Captures: what agents found out is told to OpenBrain, by whatever way that answers or does not.

The receiver is a real HTTP server that answers as the test says: a status, after a while, never.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import http.server
import json
import os
import socket
import subprocess
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import conftest
import pytest
import redis
from conftest import PROGRAM, Server, at_work, one_engine

import mosaic_queue as mq

pytestmark = pytest.mark.anyio
LIMIT = 30  # s for what takes a moment
TOKEN = "s3cret-token"
ROOT = "mosaic:queue:project:{p}"


server = one_engine()


class Receiver(http.server.ThreadingHTTPServer):
    """An OpenBrain; `answers` are the statuses of the next calls, then 201: 0 never answers."""

    daemon_threads = True

    def __init__(self, port: int = 0) -> None:
        super().__init__(("127.0.0.1", port), Handler)
        self.answers: list[int] = []
        self.always = 201
        self.slow = 0.0  # s before each answer
        self.endless, self.sent = False, 0  # an answer that has no end, and its bytes so far
        self.encodings: list[str] = []
        self.ended = threading.Event()
        self.asked: list[dict[str, Any]] = []  # every call
        self.taken: list[dict[str, Any]] = []  # those that were answered 201
        self.thread = threading.Thread(target=self.serve_forever, args=(0.02,))
        self.thread.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def texts(self) -> list[str]:
        return [one["content"] for one in self.taken]

    def close(self) -> None:
        self.ended.set()
        self.shutdown()
        self.server_close()
        self.thread.join()


class Handler(http.server.BaseHTTPRequestHandler):
    server: Receiver
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        thought = json.loads(body)
        thought["path"], thought["token"] = self.path, self.headers["Authorization"]
        self.server.asked.append(thought)
        status = self.server.answers.pop(0) if self.server.answers else self.server.always
        self.server.ended.wait(self.server.slow if status else 60)
        if status == 201:
            self.server.taken.append(thought)
        answer = {"id": f"t-{len(self.server.taken)}", "detail": f"echo {thought['token']}"}
        self.server.encodings.append(self.headers["Accept-Encoding"])
        with contextlib.suppress(OSError):
            if self.server.endless:
                self.send_response(status)
                self.end_headers()
                while not self.server.ended.is_set():
                    self.wfile.write(b"[" * 65536)
                    self.server.sent += 65536
                return
            self.send_response(status or 500)
            if 300 <= status < 400:
                self.send_header("Location", "http://127.0.0.1:1/")
            content = json.dumps(answer).encode()
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def brain() -> Iterator[Receiver]:
    running = Receiver()
    yield running
    running.close()


@pytest.fixture
def capturing(config: mq.Config, brain: Receiver, monkeypatch: pytest.MonkeyPatch) -> mq.Config:
    monkeypatch.setattr(mq, "FOLLOW_EVERY", 0.1)
    config.set("openbrain.url", brain.url + "/", "test").set("openbrain.token", TOKEN, "test")
    return config.set("openbrain.autoCapture", True, "test")


@contextlib.asynccontextmanager
async def following(queue: mq.Queue) -> AsyncIterator[mq.OpenBrain]:
    follower = mq.OpenBrain(queue)
    async with at_work(mq.follow(queue, follower)):
        yield follower


until = functools.partial(conftest.until, limit=LIMIT)


async def create(queue: mq.Queue, *names: str, project: str = "p") -> None:
    rows: list[Any] = [{"mission": "m", "title": "a task", "taskId": name} for name in names]
    await queue.create_all(rows, project=project)


@contextlib.asynccontextmanager
async def in_step(queue: mq.Queue, db: redis.Redis) -> AsyncIterator[mq.OpenBrain]:
    """A follower that has come to the last change."""
    async with following(queue) as follower:
        await until(lambda: at_present(db))
        yield follower


def at_present(db: redis.Redis) -> bool:
    """Whether the follower has come to the last change."""
    cursor = db.hget(ROOT, "follow:openbrain")
    return bool(cursor) and cursor.split()[0] == db.hget(ROOT, "rev")


# ---- what is told ----


async def test_findings_become_thoughts(
    queue: mq.Queue, db: redis.Redis, capturing: mq.Config, brain: Receiver
) -> None:
    await create(queue, "A", "B", "C")
    await queue.note("A", "from before")
    long = "ü" * 20_000
    async with in_step(queue, db):
        await queue.claim("A", "alice")
        await queue.note("A", "needs a key\nof mine", agent="bob")
        await queue.fail("A", agent="alice", reason="no key")
        await queue.complete("B", force=True, summary=long)
        await queue.complete("C", force=True)
        await until(lambda: len(brain.taken) == 3)
        await until(lambda: at_present(db))
    note, failure, done = brain.taken
    assert {one["path"] for one in brain.asked} == {"/v1/thoughts"}
    assert {one["token"] for one in brain.asked} == {f"Bearer {TOKEN}"}
    assert {one["source"] for one in brain.asked} == {"mosaic-queue"}
    epoch = db.hget(ROOT, "epoch")
    assert note["content"] == "needs a key\nof mine"
    assert note["metadata"] == {
        "project": "p",
        "mission": "m",
        "task": "A",
        "agent": "bob",
        "op": "note",
        "fence": failure["metadata"]["fence"],
        "rev": 6,
        "idempotencyKey": f"p:{epoch}:6",
    }
    assert failure["content"] == "no key"
    assert (failure["metadata"]["op"], failure["metadata"]["agent"]) == ("fail", "alice")
    assert failure["metadata"]["fence"] > 0
    assert done["content"] == long
    assert len({one["metadata"]["idempotencyKey"] for one in brain.taken}) == 3


async def test_a_follower_goes_on_where_the_last_one_was(
    queue: mq.Queue, db: redis.Redis, capturing: mq.Config, brain: Receiver
) -> None:
    """Also with what happened while none ran; a new project is told from its first change."""
    await create(queue, "A")
    async with in_step(queue, db):
        pass
    await queue.note("A", "while nobody followed")
    async with following(queue):
        await until(lambda: brain.texts() == ["while nobody followed"])
        await queue.create_all([{"mission": "m", "title": "t", "taskId": "Q"}], project="q")
        await queue.note("q/Q", "in a new project")
        everywhere = mq.Config(dict(capturing.values), {})
        everywhere.values.pop("project")
    async with mq.Queue(everywhere) as other, following(other) as follower:
        follower.there = []
        await until(lambda: brain.texts()[1:] == ["in a new project"])


# ---- how it answers ----


@pytest.mark.parametrize("status", [500, 429])
async def test_what_passes_is_tried_again(
    queue: mq.Queue, db: redis.Redis, capturing: mq.Config, brain: Receiver, status: int
) -> None:
    """In order, and none is lost or told twice that was taken."""
    await create(queue, "A")
    async with in_step(queue, db):
        brain.answers = [201, status, status, 201, status]
        for n in range(6):
            await queue.note("A", f"note {n}")
        await until(lambda: len(brain.taken) == 6)
    assert brain.texts() == [f"note {n}" for n in range(6)]
    assert len(brain.asked) == 9


async def test_what_it_will_never_take_is_set_aside(
    queue: mq.Queue,
    db: redis.Redis,
    capturing: mq.Config,
    brain: Receiver,
    capsys: pytest.CaptureFixture[str],
) -> None:
    await create(queue, "A")
    async with in_step(queue, db) as follower:
        brain.answers = [422, 201, 422]
        for n in range(4):
            await queue.note("A", f"note {n}")
        await until(lambda: len(brain.asked) == 4 and at_present(db))
    assert brain.texts() == ["note 1", "note 3"]
    assert follower.aside == 2
    said = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    aside = [line for line in said if line["event"] == "set aside"]
    assert [line["count"] for line in aside] == [1, 2]
    assert aside[0]["metadata"]["task"] == "A"
    assert TOKEN not in json.dumps(said)


@pytest.mark.parametrize("status", [401, 403, 404, 301])
async def test_what_a_person_has_to_set_right(
    queue: mq.Queue,
    db: redis.Redis,
    capturing: mq.Config,
    brain: Receiver,
    status: int,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """It is said loudly, asked again ever more seldom, and told everything once it is right."""
    await create(queue, "A")
    async with in_step(queue, db):
        brain.always = status
        await queue.note("A", "kept")
        await until(lambda: brain.asked)
        await asyncio.sleep(2)
        assert len(brain.asked) <= 3
        brain.always = 201
        await until(lambda: brain.texts() == ["kept"])
    said = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    first = next(line for line in said if line["event"] == "error")
    assert first["code"] == "UNFIT"
    assert str(status) in first["message"]
    assert ("openbrain.token" if status in (401, 403) else "openbrain.url") in first["hint"]
    assert TOKEN not in json.dumps(said)


async def test_one_that_never_answers_is_no_burden(
    queue: mq.Queue,
    db: redis.Redis,
    capturing: mq.Config,
    brain: Receiver,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The queue and another follower go on meanwhile; when it answers again it gets all."""
    monkeypatch.setattr(mq, "CAPTURE_WITHIN", 1.0)
    await create(queue, "A")
    brain.always = 0
    manifests = asyncio.create_task(mq.follow(queue, mq.Manifests(tmp_path)))
    async with in_step(queue, db):
        for n in range(50):
            await queue.note("A", f"note {n}")
        await until(lambda: brain.asked)
        rev = int(db.hget(ROOT, "rev") or 0)
        path = tmp_path / "p" / "project.jsonl"
        await until(lambda: path.exists() and json.loads(path.read_text())["cursor"] == rev)
        assert brain.taken == []
        brain.always = 201
        await until(lambda: len(brain.taken) == 50)
    manifests.cancel()
    assert brain.texts() == [f"note {n}" for n in range(50)]


async def test_a_slow_one_gets_all(
    queue: mq.Queue, db: redis.Redis, capturing: mq.Config, brain: Receiver
) -> None:
    await create(queue, "A")
    brain.slow = 0.2
    async with in_step(queue, db):
        for n in range(5):
            await queue.note("A", f"note {n}")
        await until(lambda: len(brain.taken) == 5)


async def test_one_that_is_away_and_comes_back(
    queue: mq.Queue, db: redis.Redis, capturing: mq.Config, brain: Receiver
) -> None:
    """Followers come and go meanwhile; the cursor stays in Valkey, and its events with it."""
    await create(queue, "A")
    async with in_step(queue, db):
        pass
    port = brain.server_address[1]
    brain.close()
    for n in range(3):
        async with following(queue):
            await queue.note("A", f"note {n}")
            await asyncio.sleep(0.2)
    again = Receiver(port)
    try:
        async with following(queue):
            await until(lambda: len(again.taken) == 3)
    finally:
        again.close()
    assert again.texts() == ["note 0", "note 1", "note 2"]


async def test_killed_while_it_tells(
    queue: mq.Queue, db: redis.Redis, capturing: mq.Config, brain: Receiver
) -> None:
    """At least once: a repeat carries the same key."""
    await create(queue, "A")
    async with in_step(queue, db):
        pass
    for n in range(30):
        await queue.note("A", f"note {n}")
    brain.slow = 0.02
    while not at_present(db):
        async with following(queue):
            seen = len(brain.asked)
            await until(lambda: len(brain.asked) > seen + 3 or at_present(db))  # noqa: B023
    keys = [one["metadata"]["idempotencyKey"] for one in brain.taken]
    assert len(set(keys)) == 30
    assert list(dict.fromkeys(brain.texts())) == [f"note {n}" for n in range(30)]


# ---- configuration and status ----


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("openbrain.url", "", "OPENBRAIN_URL, is missing"),
        ("openbrain.url", "brain:8000", "OPENBRAIN_URL"),
        ("openbrain.url", "ftp://brain", "OPENBRAIN_URL"),
        ("openbrain.token", "two words", "OPENBRAIN_TOKEN"),
        ("openbrain.url", "${NOWHERE}", "openbrain.url needs ${NOWHERE}"),
    ],
)
async def test_what_is_missing_is_named(
    capturing: mq.Config, key: str, value: str, said: str
) -> None:
    capturing.set(key, value, "file")
    with pytest.raises(mq.ConfigError) as refused:
        await mq.watch_all(mq.Queue(capturing))
    assert said in refused.value.message
    assert "two words" not in refused.value.message


async def test_status_says_that_nobody_captures(
    queue: mq.Queue, db: redis.Redis, capturing: mq.Config, brain: Receiver
) -> None:
    await create(queue, "A")
    found = await mq.status(queue, project="p")
    assert found["projects"][0]["captures"] is False
    assert "no monitor runs that captures" in mq.status_text(found)
    async with in_step(queue, db):
        found = await mq.status(queue, project="p")
    assert found["projects"][0]["captures"] is True
    assert "captures" not in mq.status_text(found)
    capturing.values.pop("openbrain.autoCapture")
    assert "captures" not in (await mq.status(queue, project="p"))["projects"][0]


# ---- by hand ----


def by_hand(
    server: Server, folder: Path, *words: str, **environ: str
) -> subprocess.CompletedProcess[str]:
    base = {"PATH": os.environ["PATH"], "HOME": str(folder), "MOSAIC_VALKEY_URL": server.url}
    return subprocess.run(
        [str(PROGRAM), "capture", *words],
        env=base | environ, cwd=folder, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip


async def test_capture_by_hand(
    queue: mq.Queue, server: Server, brain: Receiver, tmp_path: Path
) -> None:
    await create(queue, "A")
    there = {"OPENBRAIN_URL": brain.url, "OPENBRAIN_TOKEN": TOKEN}
    done = by_hand(server, tmp_path, "it", "leaks", "--task", "p/A", "--agent", "al", **there)
    assert (done.returncode, done.stdout, done.stderr) == (0, "t-1\n", "")
    (thought,) = brain.taken
    assert thought["content"] == "it leaks"
    facts = {name: thought["metadata"][name] for name in ("project", "mission", "task", "agent")}
    assert facts == {"project": "p", "mission": "m", "task": "A", "agent": "al"}
    done = by_hand(server, tmp_path, "more", "--json", **there)
    assert json.loads(done.stdout) == {"v": 1, "id": "t-2"}


@pytest.mark.parametrize(
    ("answer", "exit_status", "said"),
    [(401, 6, "openbrain.token"), (500, 6, "answers 500"), (422, 2, "does not take this thought")],
)
async def test_capture_that_is_refused(
    server: Server, brain: Receiver, tmp_path: Path, answer: int, exit_status: int, said: str
) -> None:
    brain.always = answer
    there = {"OPENBRAIN_URL": brain.url, "OPENBRAIN_TOKEN": TOKEN}
    done = by_hand(server, tmp_path, "it leaks", **there)
    assert done.returncode == exit_status
    assert said in done.stderr
    assert TOKEN not in done.stderr


def test_capture_without_a_receiver(server: Server, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    done = by_hand(server, tmp_path, "x", OPENBRAIN_URL=f"http://u:pw@127.0.0.1:{port}")
    assert done.returncode == 6
    assert "UNREACHABLE: OpenBrain at http://u:***@127.0.0.1" in done.stderr
    done = by_hand(server, tmp_path, "x")
    assert done.returncode == 2
    assert "openbrain.url, or $OPENBRAIN_URL, is missing" in done.stderr


@pytest.mark.parametrize("status", [201, 400, 503])
async def test_an_answer_without_an_end(
    queue: mq.Queue,
    db: redis.Redis,
    capturing: mq.Config,
    brain: Receiver,
    status: int,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """64 KiB of it are read, as it is: it is asked for without an encoding."""
    brain.endless, brain.always = True, status
    await create(queue, "A")
    async with in_step(queue, db) as follower:
        await queue.note("A", "found")
        await until(lambda: brain.taken or follower.aside or capsys.readouterr().err)
    assert set(brain.encodings) == {"identity"}
    await until(lambda: brain.sent)
    assert brain.sent < 16 * 2**20 * len(brain.asked)
