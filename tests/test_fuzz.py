"""Whatever comes in from outside ends in an answer or a refusal: no other exception, no end of a
process that lives on, no hang, and nothing has changed behind a refusal.

Hypothesis makes what comes in of words that are meant and words that are not; `FUZZ=2000` in the
environment tries so many of each, and others each time.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import hypothesis.strategies as st
import pytest
import redis
from conftest import Server, key_space, one_engine
from hypothesis import HealthCheck, given, settings
from test_http import Process
from test_mcp import Pipe, piped
from test_replies import Answers

import mosaic_queue as mq

server = one_engine()
EXAMPLES = int(os.environ.get("FUZZ", "20"))
fuzzed = settings(
    max_examples=EXAMPLES, deadline=None, derandomize="FUZZ" not in os.environ, database=None,
    suppress_health_check=list(HealthCheck),
)  # fmt: skip
LIMIT = 10  # s

odd = st.sampled_from(
    ["", " ", "-", "--", "--json", "\x00", "\x1b[2J", "\u202e", "\ud800", "é" * 300, "../../x",
     "{}", "null", "-1", "0", "9" * 30, "1e9", "nan", "T1/T1", "p/T1", "p/", "/T1", "*", "a b",
     "x" * 70_000]
)  # fmt: skip
ids = st.sampled_from(["T1", "T2", "T3", "p/T1", "alice", "m", "p", "q"])
values = st.one_of(ids, ids, odd, st.text(max_size=20), st.integers().map(str))
anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | values,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(values, inner, max_size=4),
    max_leaves=8,
)


@pytest.fixture
def full(server: Server, db: redis.Redis) -> None:
    """A project with something to work on, in this process's environment."""

    async def fill() -> None:
        config = mq.Config(environ={}).set("redis.url", server.url, "test")
        async with mq.Queue(config) as queue:
            for task, on in (("T1", []), ("T2", ["T1"]), ("T3", [])):
                await queue.create("p", "m", task, title="a task", dependencies=on)
            await queue.claim("T3", "alice", project="p")

    asyncio.run(fill())


def settle(server: Server, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Live in a home of one's own, beside that server."""
    environ = {"HOME": home, "MOSAIC_VALKEY_URL": server.url, "MOSAIC_PROJECT": "p"}
    for name, value in environ.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.chdir(home)


def command(*words: str) -> tuple[int, str]:
    """The exit status of a command in this process, and what it says of what is wrong."""
    out, err = (io.TextIOWrapper(io.BytesIO(), "utf-8", "backslashreplace") for _ in range(2))
    began = time.monotonic()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = mq.main([*words])
        except SystemExit as end:  # --help
            status = int(end.code or 0)
    assert time.monotonic() - began < LIMIT, words
    err.flush()
    said = err.buffer.getvalue().decode()  # type: ignore[attr-defined]
    assert status in (0, 2, 3, 4, 5, 6, 7), (words, status, said)
    assert status not in (2, 3, 4, 6) or said, words
    return status, said


OFFERED = sorted(
    (of for of in mq.OPERATIONS.values() if not of.local and of.name != "reap"),
    key=lambda of: of.name,
)


@st.composite
def command_lines(draw: st.DrawFn) -> list[str]:
    """A command with most of its arguments, some of them odd, in any order."""
    of = draw(st.sampled_from(OFFERED))
    places = [one for one in of.parameters.values() if one.kind is not one.KEYWORD_ONLY]
    words = [draw(values) for one in places if one.name != "agent"]
    for name in draw(st.lists(st.sampled_from(sorted(of.parameters)), max_size=4, unique=True)):
        if name not in ("wait",):
            words += [mq.flag(name), draw(values)]
    words = draw(st.permutations(words)) if draw(st.integers(0, 3)) == 0 else words
    return [*of.command.split(), *words]


def test_command_lines(
    server: Server, full: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settle(server, tmp_path, monkeypatch)

    @fuzzed
    @given(command_lines())
    def each(words: list[str]) -> None:
        before = key_space(server)
        status, _ = command(*words)
        assert status not in (2, 3, 4) or key_space(server) == before, words

    each()


files = st.one_of(
    st.text(max_size=200),
    st.lists(st.lists(values.filter(lambda word: len(word) < 400), max_size=5), max_size=8).map(
        lambda rows: (
            "| id | status | title |\n|---|---|---|\n"
            + "\n".join("| " + " | ".join(row) + " |" for row in rows)
        )
    ),
    anything.map(lambda tree: json.dumps(tree)),
    st.dictionaries(
        st.sampled_from([*mq.KEYS, "redis", "lanes", "tasks"]), anything, max_size=4
    ).map(json.dumps),
)
READERS: dict[str, Callable[[Path], list[str]]] = {
    "TASKS.md": lambda path: ["sync", str(path)],
    "queue.yaml": lambda path: ["list", "--config", str(path)],
    "export.jsonl": lambda path: ["import", str(path)],
    "tasks.jsonl": lambda path: ["create", "--from", str(path)],
    ".mosaic/queue.yaml": lambda path: ["trust"],
    ".mosaic/orchestrator/mission.json": lambda path: ["mission", "status"],
}


@pytest.mark.parametrize("name", READERS)
def test_files(
    name: str, server: Server, full: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settle(server, tmp_path, monkeypatch)
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)

    @fuzzed
    @given(files)
    def each(text: str) -> None:
        path.write_bytes(
            text.encode(errors="surrogateescape" if "\ud800" not in text else "replace")
        )
        command(*READERS[name](path))

    each()


@fuzzed
@given(
    st.sampled_from(
        ["redis://", "rediss://", "unix://", "redis+sentinel://", "redis+cluster://", ""]
    ),
    st.text(max_size=30) | values,
    st.text(max_size=30) | values,
)
def test_urls(scheme: str, user: str, rest: str) -> None:
    """They are understood or refused, and none is shown with what may be its password."""
    url = f"{scheme}{user}:hunter2@{rest}"
    with contextlib.suppress(mq.Refused):
        mq.parse_url(url)
    assert "hunter2" not in mq.mask_url(url)


# ---- servers of ours ----


def test_messages_of_mcp(server: Server, full: None, tmp_path: Path) -> None:
    """Every line may be refused; the server answers the next."""
    environ = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "MOSAIC_VALKEY_URL": server.url}
    tools = [f"queue_{of.name}" for of in OFFERED if of.tool == "default"]
    calls = st.fixed_dictionaries(
        {"name": st.sampled_from(tools) | values},
        optional={"arguments": st.dictionaries(st.sampled_from(["task", "agent", "project", "title",
                  "mission", "reason", "text", "limit", "metadata"]) | values, anything)},
    )  # fmt: skip
    messages = st.one_of(
        st.fixed_dictionaries({"method": st.just("tools/call"), "id": st.just(1), "params": calls}),
        st.fixed_dictionaries({}, optional={
            "method": values, "id": anything, "params": anything, "result": anything}),
        anything,
    )  # fmt: skip

    with piped(environ | {"MOSAIC_PROJECT": "p"}, tmp_path) as pipe:
        number = iter(range(1000, 10**9))

        @fuzzed
        @given(messages)
        def each(message: Any) -> None:
            message = {"jsonrpc": "2.0", **message} if isinstance(message, dict) else message
            mine = next(number)
            pipe.send(json.dumps(message).encode())
            pipe.send({"jsonrpc": "2.0", "id": mine, "method": "ping"})
            until_answered(pipe, mine)

        each()


def until_answered(pipe: Pipe, number: int) -> None:
    give_up = time.monotonic() + LIMIT
    while pipe.receive(LIMIT).get("id") != number:
        assert time.monotonic() < give_up, "no answer in time"


def test_requests(server: Server, full: None, tmp_path: Path) -> None:
    """A refusal is a problem document, and has changed nothing."""
    environ = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "MOSAIC_VALKEY_URL": server.url}
    process = Process(environ, tmp_path)
    places = sorted(place for of in OFFERED for place in mq.places_of(of))
    client = httpx2.Client(base_url=process.url, timeout=LIMIT)

    @fuzzed
    @given(st.sampled_from(places), st.lists(ids, min_size=2, max_size=2), anything, values)
    def each(place: tuple[str, str], words: list[str], body: Any, query: str) -> None:
        method, path = place
        path = path.format(project="p", task=words[0])
        content = json.dumps(body).encode() if method != "GET" else None
        before = key_space(server)
        said = client.request(
            method, path, content=content, params={words[1]: query[:50].encode(errors="replace")},
            headers={"content-type": "application/json"},
        )  # fmt: skip
        assert said.status_code != 500, (method, path, body, said.text)
        if said.status_code >= 400:
            assert said.json()["code"] in mq.CODES, said.text
            assert key_space(server) == before, (method, path, body)

    try:
        each()
    finally:
        client.close()
        process.process.kill()
        process.process.communicate()


# ---- a server that lies ----

parts = st.one_of(
    st.sampled_from(["OK", "REPEATED", "SUPERSEDED", "NOTHING", "HELD", "INVALID", "taskId\tT1",
                     "taskId\tT1\trev\t1", "status\tpending\tpriority\thigh", "{", "{}",
                     "[1]", ""]),
    st.text(max_size=20), st.integers(), st.none(),
)  # fmt: skip
replies = st.recursive(parts, lambda inner: st.lists(inner, max_size=9), max_leaves=20)


def packed(value: Any) -> bytes:
    """A value as RESP has it."""
    if value is None:
        return b"$-1\r\n"
    if isinstance(value, int):
        return b":%d\r\n" % value if abs(value) < 2**63 else b"$1\r\n1\r\n"
    if isinstance(value, list):
        return b"*%d\r\n" % len(value) + b"".join(map(packed, value))
    data = value.encode(errors="replace")
    return b"$%d\r\n%s\r\n" % (len(data), data)


class Replies(Answers):
    """A server that answers every script with the reply of the moment."""

    reply = b""

    def answer(self) -> bytes:
        return self.reply


READS: dict[str, dict[str, Any]] = {
    "get": {"task": "p/T1"}, "claim": {"task": "p/T1", "agent": "a"}, "list": {"project": "p"},
    "next": {"agent": "a", "project": "p"}, "complete": {"task": "p/T1"},
    "release": {"task": "p/T1"}, "events": {"project": "p"}, "create": {
        "project": "p", "mission": "m", "task": "T1", "title": "t"},
}  # fmt: skip


@fuzzed
@given(st.sampled_from(sorted(READS)), replies | st.lists(parts, min_size=7, max_size=7))
def test_replies(liar: Replies, name: str, reply: Any) -> None:
    liar.reply = packed(reply)
    config = mq.Config(environ={}).set("redis.url", f"unix://{liar.path}", "test")

    async def ask() -> None:
        async with mq.Queue(config, deadline=0.1) as queue:
            async with asyncio.timeout(LIMIT):
                await getattr(queue, name)(**READS[name])

    with contextlib.suppress(mq.Refused):
        asyncio.run(ask())


@pytest.fixture(scope="module")
def liar(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Replies]:
    made = Replies(tmp_path_factory.mktemp("liar"))
    yield made
    made.listener.close()
