"""Bad input: each is refused in one sentence that names the value and what is accepted.

A refusal changes nothing: every case compares the key space before and after.  What is at
exactly its limit is accepted, and metadata comes back equal.
"""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import pytest
import redis
from conftest import BINARIES, PROGRAM, Server, free_port, key_space

import mosaic_queue as mq

pytestmark = pytest.mark.anyio
KIB = 1024
DAY = 24 * 3600


def check(refused: mq.Refused, code: str, *parts: str) -> None:
    """The refusal has this code, is one printable sentence and contains these parts."""
    assert refused.code == code, refused
    for part in parts:
        assert part in refused.message
    assert len(refused.message) < 600
    assert refused.message.isprintable()


async def refusal(server: Server, call: Callable[[], Any]) -> mq.Refused:
    """The refusal of a call, after a look that it changed nothing."""
    before = key_space(server)
    with pytest.raises(mq.Refused) as refused:
        await call()
    assert key_space(server) == before
    return refused.value


@pytest.fixture
async def busy(queue: mq.Queue) -> mq.Queue:
    """A queue with T1 pending and T2 held by alice."""
    await queue.create("p", "m", "T1", title="one")
    await queue.create("p", "m", "T2", title="two")
    await queue.claim("T2", "alice", session="s1")
    return queue


# ---- ids ----

BAD_IDS: dict[str, Any] = {
    "empty": "",
    "braces": "{a}",
    "a brace": "a}b",
    "colon": "a:b",
    "two slashes": "a/b/c",
    "space": "a b",
    "space before": " a",
    "129 characters": "x" * 129,
    "emoji": "🦊",
    "accent": "é",
    "NUL": "a\0",
    "newline": "a\n",
    "dot first": ".a",
    "dash first": "-a",
    "wildcard": "a*",
    "escape": "\x1b[2Ja",
    "bidi": "a\u202eb",
    "full width": "\uff41",
    "lone surrogate": "a\ud800",
    "number": 7,
    "true": True,
    "list": ["a"],
}
ID_PLACES: dict[str, Callable[[mq.Queue, Any], Any]] = {
    "create project": lambda q, bad: q.create(bad, "m", "T9", title="t"),
    "create mission": lambda q, bad: q.create("p", bad, "T9", title="t"),
    "create task": lambda q, bad: q.create("p", "m", bad, title="t"),
    "create lane": lambda q, bad: q.create("p", "m", "T9", title="t", lane=bad),
    "create dependency": lambda q, bad: q.create("p", "m", "T9", title="t", dependencies=[bad]),
    "get task": lambda q, bad: q.get(bad),
    "get project": lambda q, bad: q.get("T1", project=bad),
    "claim agent": lambda q, bad: q.claim("T1", bad),
    "claim session": lambda q, bad: q.claim("T1", "alice", session=bad),
    "complete task": lambda q, bad: q.complete(bad),
    "list mission": lambda q, bad: q.list(mission=bad),
    "list agent": lambda q, bad: q.list(agent=bad),
    "list lane": lambda q, bad: q.list(lane=bad),
    "status project": lambda q, bad: mq.status(q, project=bad),
    "policy project": lambda q, bad: q.policy(project=bad, apply=True),
}
# Where an empty text is the same as none given.
EMPTY_IS_NONE = {"claim agent", "get project", "status project", "policy project"}


@pytest.mark.parametrize("place", ID_PLACES)
async def test_ids(server: Server, busy: mq.Queue, place: str) -> None:
    for name, bad in BAD_IDS.items():
        refused = await refusal(server, lambda bad=bad: ID_PLACES[place](busy, bad))
        check(refused, "INVALID", "accepted: ", "a letter or digit")
        if isinstance(bad, str) and bad.isalnum() and len(bad) < 40:
            assert bad in refused.message, name


@pytest.mark.parametrize("good", ["a", "7", "x" * 128, "A.b_c@d-e", "a--", "1..2"])
async def test_good_ids(queue: mq.Queue, good: str) -> None:
    await queue.create(good, good, good, title="t")
    task = await queue.claim(f"{good}/{good}", good, session=good)
    assert (task["id"], task["claimedBy"]) == (f"{good}/{good}", good)


async def test_a_lane_that_nobody_declared(server: Server, busy: mq.Queue) -> None:
    for call in (
        lambda: busy.create("p", "m", "T9", title="t", lane="nightly"),
        lambda: busy.list(lane="nightly"),
    ):
        check(await refusal(server, call), "INVALID", "nightly", "any", "coding", "planning")


async def test_a_new_task_of_another_project_than_its_call(server: Server, busy: mq.Queue) -> None:
    new = {"project": "other", "mission": "m", "taskId": "T9", "title": "t"}
    refused = await refusal(server, lambda: busy.create_all([new], project="p"))
    check(refused, "INVALID", "other", "accepted: p")


async def test_two_names_of_a_project_that_differ(server: Server, busy: mq.Queue) -> None:
    refused = await refusal(server, lambda: busy.get("p/T1", project="other"))
    check(refused, "INVALID", "other", "accepted: p")


# ---- numbers ----

BAD_TTLS = [
    0, -1, 7 * DAY + 1, 8 * DAY, 10**30, float("nan"), float("inf"), 1e3, 1.5,
    "3600", "soon", "", "1e3", True, False, [60], {"s": 60},
]  # fmt: skip


@pytest.mark.parametrize("ttl", BAD_TTLS, ids=repr)
async def test_ttl(server: Server, busy: mq.Queue, ttl: Any) -> None:
    for call in (
        lambda: busy.claim("T1", "bob", ttl=ttl),
        lambda: busy.heartbeat("T2", ttl=ttl),
        lambda: busy.create("p", "m", "T9", title="t", max_runtime=ttl),
    ):
        check(await refusal(server, call), "INVALID", "accepted: ", "1 to 604800")


@pytest.mark.parametrize("ttl", [1, 60, 7 * DAY])
async def test_good_ttl(busy: mq.Queue, ttl: int) -> None:
    assert (await busy.claim("T1", "bob", ttl=ttl))["claimTTL"] == ttl


NUMBERS: dict[str, Callable[[mq.Queue, Any], Any]] = {
    "0 to 604800": lambda q, n: q.create("p", "m", "T9", title="t", delay=n),
    "from 0 to 604800": lambda q, n: q.release("T2", delay=n),
    " 0 to 604800": lambda q, n: q.fail("T2", reason="r", retry_delay=n),
    "1 to 1000": lambda q, n: q.list(limit=n),
    "0 to 999999999999999": lambda q, n: q.complete("T2", fence=n),
}


@pytest.mark.parametrize("accepted", NUMBERS)
async def test_other_numbers(server: Server, busy: mq.Queue, accepted: str) -> None:
    for bad in (-1, 10**15, 1e3, "7", True):
        refused = await refusal(server, lambda bad=bad: NUMBERS[accepted](busy, bad))
        check(refused, "INVALID", accepted.removeprefix("from ").strip())


# ---- texts ----

Place = tuple[int, Callable[[mq.Queue, Any], Any]]
TEXTS: dict[str, Place] = {
    "title": (500, lambda q, t: q.create("p", "m", "T9", title=t)),
    "description": (64 * KIB, lambda q, t: q.create("p", "m", "T9", title="t", description=t)),
    "progress": (4 * KIB, lambda q, t: q.heartbeat("T2", progress=t)),
    "checkpoint": (64 * KIB, lambda q, t: q.heartbeat("T2", checkpoint=t)),
    "summary": (64 * KIB, lambda q, t: q.complete("T2", summary=t)),
    "release reason": (4 * KIB, lambda q, t: q.release("T2", reason=t)),
    "fail reason": (4 * KIB, lambda q, t: q.fail("T2", reason=t)),
    "delete reason": (4 * KIB, lambda q, t: q.delete("T1", reason=t)),
}


def sized(size: int) -> str:
    """A text of so many bytes, half of its characters of two bytes."""
    return "é" * (size // 3) + "x" * (size - size // 3 * 2)


@pytest.mark.parametrize("name", TEXTS)
async def test_texts(server: Server, busy: mq.Queue, name: str) -> None:
    limit, call = TEXTS[name]
    shown = name.split()[-1]
    refused = await refusal(server, lambda: call(busy, sized(limit + 1)))
    check(refused, "TOO_LARGE", shown, f"{limit + 1} bytes", f"up to {limit}")
    for bad, accepted in (
        ("a\0b", "without NUL"),
        ("a\ud800b", "without lone surrogates"),
        (7, "text"),
        (["a"], "text"),
        (b"bytes", "text"),
    ):
        check(await refusal(server, lambda bad=bad: call(busy, bad)), "INVALID", shown, accepted)
    await call(busy, sized(limit))


async def test_an_empty_title(server: Server, busy: mq.Queue) -> None:
    refused = await refusal(server, lambda: busy.create("p", "m", "T9", title=""))
    check(refused, "INVALID", "title", "not empty")


async def test_texts_come_back_as_they_were(busy: mq.Queue) -> None:
    text = "\x1b[31mred\x1b[0m \u202eesrever\n\t\r\x7f 🦊 \ufeff"
    await busy.create("p", "m", "T9", title=text, description=text)
    await busy.claim("T9", "alice")
    await busy.heartbeat("T9", progress=text, checkpoint=text)
    task = await busy.get("T9")
    assert [task[k] for k in ("title", "description", "progress", "checkpoint")] == [text] * 4


# ---- metadata ----


def nested(levels: int, inner: Any = None) -> dict[str, Any]:
    """An object whose innermost object or list is at this level."""
    value: Any = {} if inner is None else inner
    for _ in range(levels - 1):
        value = {"a": value}
    return value


METADATA: dict[str, Any] = {
    "empty": {},
    "empty inside": {"list": [], "object": {}, "null": None, "text": ""},
    "numbers": {"big": 2**70, "negative": -(2**63) - 1, "float": 0.1, "one": 1.0, "huge": 1e300},
    "booleans": {"yes": True, "no": False, "zero": 0, "one": 1},
    "unicode": {"🦊é": "\u202e ファイル \x1b[0m\n\u2028", "": "empty key"},
    "escapes": {"quote\"\\": "\\u0041 </script> \\n"},
    "lists": {"a": [[], [[]], {}, [None, 1, "x"]]},
    "100 levels": nested(100),
    "100 levels of lists": {"a": json.loads("[" * 99 + "]" * 99)},
}  # fmt: skip


@pytest.mark.parametrize("name", METADATA)
async def test_metadata_comes_back_equal(busy: mq.Queue, name: str) -> None:
    await busy.create("p", "m", "T9", title="t", metadata=METADATA[name])
    for task in (await busy.get("T9"), await busy.claim("T9", "alice")):
        told = task["metadata"]
        assert told == METADATA[name]
        assert json.dumps(told) == json.dumps(METADATA[name])  # 1, 1.0 and true are equal


BAD_METADATA: dict[str, tuple[Any, str, str]] = {
    "list": ([], "INVALID", "a JSON object"),
    "text": ("{}", "INVALID", "a JSON object"),
    "number": (7, "INVALID", "a JSON object"),
    "true": (True, "INVALID", "a JSON object"),
    "1 MB": ({"a": "x" * 10**6}, "TOO_LARGE", "up to 65536"),
    "101 levels": (nested(101), "INVALID", "up to 100"),
    "101 levels of lists": ({"a": json.loads("[" * 100 + "]" * 100)}, "INVALID", "up to 100"),
    "100,000 levels": (nested(100_000), "INVALID", "up to 100"),
    "NaN": ({"a": float("nan")}, "INVALID", "NaN"),
    "Infinity": ({"a": [float("inf")]}, "INVALID", "NaN and Infinity"),
    "lone surrogate": ({"a": "\udfff"}, "INVALID", "surrogates"),
    "lone surrogate in a key": ({"\udfff": 1}, "INVALID", "surrogates"),
    "not JSON": ({"a": {1, 2}}, "INVALID", "JSON"),
    "bytes": ({"a": b"x"}, "INVALID", "JSON"),
    "a number beyond 4,300 digits": ({"a": 10**5000}, "INVALID", "accepted"),
}


@pytest.mark.parametrize("name", BAD_METADATA)
async def test_bad_metadata(server: Server, busy: mq.Queue, name: str) -> None:
    bad, code, accepted = BAD_METADATA[name]
    refused = await refusal(server, lambda: busy.create("p", "m", "T9", title="t", metadata=bad))
    check(refused, code, "metadata", accepted)


async def test_metadata_at_the_limit(server: Server, busy: mq.Queue) -> None:
    """Measured as it is stored, without blanks between the parts."""

    def of_size(size: int) -> dict[str, str]:
        return {"a": "x" * (size - len('{"a":""}'))}

    limit = 64 * KIB
    bad = of_size(limit + 1)
    refused = await refusal(server, lambda: busy.create("p", "m", "T9", title="t", metadata=bad))
    check(refused, "TOO_LARGE", "metadata", f"{limit + 1} bytes")
    await busy.create("p", "m", "T9", title="t", metadata=of_size(limit))
    assert (await busy.get("T9"))["metadata"] == of_size(limit)


async def test_a_deep_list_as_metadata(server: Server, busy: mq.Queue) -> None:
    deep: Any = []
    for _ in range(100_000):
        deep = [deep]
    refused = await refusal(server, lambda: busy.create("p", "m", "T9", title="t", metadata=deep))
    check(refused, "INVALID", "metadata", "a JSON object")


# ---- words, flags, ids of calls, cursors, lists ----

OTHERS: dict[str, tuple[Callable[[mq.Queue], Any], str, tuple[str, ...]]] = {
    "status": (lambda q: q.list(status="done"), "INVALID", ("done", *mq.STATUSES)),
    "status list": (lambda q: q.list(status=["pending"]), "INVALID", mq.STATUSES),
    "priority": (
        lambda q: q.create("p", "m", "T9", title="t", priority="urgent"),
        "INVALID",
        ("urgent", *mq.PRIORITIES),
    ),
    "priority case": (lambda q: q.list(priority="High"), "INVALID", ("High", *mq.PRIORITIES)),
    "force": (lambda q: q.complete("T2", force="yes"), "INVALID", ("yes", "true or false")),
    "retry": (lambda q: q.fail("T2", reason="r", retry=0), "INVALID", ("0", "true or false")),
    "apply": (lambda q: q.policy(apply=1), "INVALID", ("1", "true or false")),
    "op empty": (lambda q: q.complete("T2", op=""), "INVALID", ("op", "1 to 128")),
    "op space": (lambda q: q.complete("T2", op="a b"), "INVALID", ("a b", "1 to 128")),
    "op long": (lambda q: q.complete("T2", op="x" * 129), "INVALID", ("op", "1 to 128")),
    "op NUL": (lambda q: q.complete("T2", op="a\0"), "INVALID", ("op", "1 to 128")),
    "cursor": (lambda q: q.list(cursor="?"), "INVALID", ("?", "the cursor of the last answer")),
    "cursor form": (lambda q: q.list(cursor="ready:any,x,y"), "INVALID", ("ready:any,x,y",)),
    "cursor index": (lambda q: q.list(cursor="nothing,1,T1"), "INVALID", ("nothing,1,T1",)),
    "cursor escape": (lambda q: q.list(cursor="\x1b[2J"), "INVALID", ("cursor",)),
    "cursor long": (lambda q: q.list(cursor="x" * 601), "TOO_LARGE", ("cursor", "600")),
    "dependencies text": (
        lambda q: q.create("p", "m", "T9", title="t", dependencies="T1"),
        "INVALID",
        ("T1", "a list of taskIds"),
    ),
    "201 dependencies": (
        lambda q: q.create("p", "m", "T9", title="t", dependencies=[f"T{i}" for i in range(201)]),
        "TOO_LARGE",
        ("201", "up to 200"),
    ),
    "unknown dependency": (
        lambda q: q.create("p", "m", "T9", title="t", dependencies=["T8"]),
        "NOT_FOUND",
        ("p/T8", "T9"),
    ),
    "itself": (
        lambda q: q.create("p", "m", "T9", title="t", dependencies=["T9"]),
        "CYCLE",
        ("T9",),
    ),
    "exists": (lambda q: q.create("p", "m", "T1", title="t"), "EXISTS", ("p/T1", "pending")),
    "no task": (lambda q: q.get("T9"), "NOT_FOUND", ("p/T9",)),
    "no project": (lambda q: q.get("other/T9"), "NOT_FOUND", ("other",)),
    "unknown field": (
        lambda q: q.create_all([{"mission": "m", "taskId": "T9", "titel": "t"}], project="p"),
        "INVALID",
        ("titel", "accepted"),
    ),
    "another field": (
        lambda q: q.create_all(
            [{"mission": "m", "taskId": "T9", "title": "t", "lanes": "x"}], project="p"
        ),
        "INVALID",
        ("lanes", "lane", "priority"),
    ),
    "no tasks": (lambda q: q.create_all([], project="p"), "TOO_LARGE", ("0", "1 to 200")),
    "201 tasks": (
        lambda q: q.create_all(
            [{"mission": "m", "taskId": f"N{i}", "title": "t"} for i in range(201)], project="p"
        ),
        "TOO_LARGE",
        ("201", "1 to 200"),
    ),
    "twice in a call": (
        lambda q: q.create_all([{"mission": "m", "taskId": "N", "title": "t"}] * 2, project="p"),
        "EXISTS",
        ("N twice",),
    ),
    "a cycle": (
        lambda q: q.create_all(
            [
                {"mission": "m", "taskId": "N1", "title": "t", "dependencies": ["N2"]},
                {"mission": "m", "taskId": "N2", "title": "t", "dependencies": ["N1"]},
            ],
            project="p",
        ),
        "CYCLE",
        ("N1", "N2"),
    ),
}


@pytest.mark.parametrize("name", OTHERS)
async def test_the_rest(server: Server, busy: mq.Queue, name: str) -> None:
    call, code, parts = OTHERS[name]
    check(await refusal(server, lambda: call(busy)), code, *parts)


async def test_an_unknown_argument_is_a_bug_of_the_caller(server: Server, busy: mq.Queue) -> None:
    before = key_space(server)
    with pytest.raises(TypeError, match="speed"):
        await busy.claim("T1", "alice", speed=3)
    assert key_space(server) == before


# ---- the command line ----

T9 = ("create", "p", "m", "T9", "--title", "t")
COMMANDS: dict[tuple[str, ...], tuple[int, tuple[str, ...]]] = {
    ("claim", "T1", "--ttl", "0"): (2, ("ttl is '0'", "1 to 604800")),
    ("claim", "T1", "--ttl", "-1"): (2, ("ttl is '-1'", "1 to 604800")),
    ("claim", "T1", "--ttl", "691200"): (2, ("ttl is '691200'", "1 to 604800")),
    ("claim", "T1", "--ttl", "nan"): (2, ("ttl is 'nan'", "1 to 604800")),
    ("claim", "T1", "--ttl", "1e3"): (2, ("ttl is '1e3'", "1 to 604800")),
    ("claim", "T1", "--ttl", "0x10"): (2, ("ttl is '0x10'", "1 to 604800")),
    ("claim", "T1", "--ttl", " 7 "): (2, ("ttl is ' 7 '", "1 to 604800")),
    ("claim", "T1", "--ttl", "1_000"): (2, ("ttl is '1_000'", "1 to 604800")),
    ("claim", "T1", "--ttl", "true"): (2, ("ttl is 'true'", "1 to 604800")),
    ("claim", "T1", "--ttl", ""): (2, ("ttl is ''", "1 to 604800")),
    ("claim", "T1", "--ttl", "9" * 5000): (2, ("ttl is '999", "1 to 604800")),
    ("claim", "a b"): (2, ("task is 'a b'", "accepted")),
    ("claim", "T1", "--agent", "a b"): (2, ("agent", "a b", "accepted")),
    ("show", "{a}"): (2, ("task is '{a}'", "accepted")),
    ("show", "\x1b[2J"): (2, (r"\x1b[2J", "accepted")),
    ("list", "--status", "done"): (2, ("status is 'done'", "in-progress")),
    ("list", "--limit", "0"): (2, ("limit is '0'", "1 to 1000")),
    ("list", "--project", "a b"): (2, ("project", "a b", "accepted")),
    (*T9, "--metadata", "[]"): (2, ("metadata is '[]'", "a JSON object")),
    (*T9, "--metadata", "null"): (2, ("metadata is 'null'", "a JSON object")),
    (*T9, "--metadata", "{"): (2, ("metadata is '{'", "a JSON object")),
    (*T9, "--metadata", '{"a": NaN}'): (2, ("metadata", "NaN")),
    (*T9, "--metadata", '{"a": 1e400}'): (2, ("metadata", "Infinity")),
    (*T9, "--metadata", "[" * 50_000): (2, ("metadata", "a JSON object")),
    (*T9, "--metadata", '{"a":' * 101 + "1" + "}" * 101): (2, ("metadata", "up to 100")),
    (*T9, "--metadata", '{"a":' * 20_000 + "1" + "}" * 20_000): (2, ("metadata",)),
    (*T9, "--metadata", '{"a": ' + "9" * 5000 + "}"): (2, ("metadata",)),
    (*T9, "--priority", "urgent"): (2, ("priority is 'urgent'", "critical")),
    (*T9, "--dependency", "a,b"): (2, ("dependencies is 'a,b'", "accepted")),
    ("create", "p", "m", "T9", "--title", "x" * 501): (2, ("501 bytes", "up to 500")),
    ("create", "p", "m", "T9", "--title", "a\udc80"): (2, ("title", "surrogates")),
    ("create", "p", "m", "a/b", "--title", "t"): (2, ("taskId", "a/b", "accepted")),
    ("create", "p", "m"): (2, ("--title",)),
    ("create", "p", "m", "T9"): (2, ("--title",)),
    ("fail", "T2"): (2, ("--reason",)),
    ("claim",): (2, ("taskId",)),
    ("claim", "T1", "T2"): (3, ("project T1",)),
    ("claim", "p", "T1", "T2"): (2, ("T2",)),
    ("claim", "T1", "--tll", "3"): (2, ("--tll",)),
    ("claim", "T1", "--tt", "3"): (2, ("--tt",)),
    ("clam", "T1"): (2, ("clam", "claim")),
    ("server", "restart"): (2, ("restart", "status", "stop")),
    ("show", "T7"): (3, ("p/T7",)),
}


@pytest.mark.parametrize("words", COMMANDS, ids=lambda words: " ".join(words)[:40])
def test_command_lines(
    server: Server,
    db: redis.Redis,
    words: tuple[str, ...],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("MOSAIC_VALKEY_URL", server.url)
    monkeypatch.setenv("MOSAIC_PROJECT", "p")
    monkeypatch.chdir(tmp_path)
    assert mq.main(["create", "p", "m", "T1", "--title", "one"]) == 0
    assert mq.main(["create", "p", "m", "T2", "--title", "two"]) == 0
    capsys.readouterr()
    before = key_space(server)
    status, parts = COMMANDS[words]
    assert mq.main(words) == status
    out, err = capsys.readouterr()
    assert out == ""
    sentence, *hint = err.splitlines()
    assert sentence.isprintable()
    for part in parts:
        assert part in sentence
    assert len(hint) <= 1
    assert key_space(server) == before


# ---- tools ----

TOOLS: list[tuple[str, dict[str, Any], str, tuple[str, ...]]] = [
    ("queue_claim", {"task": "T1", "ttl": 0}, "INVALID", ("ttl", "1 to 604800")),
    ("queue_claim", {"task": "T1", "ttl": "60"}, "INVALID", ("ttl", "60", "1 to 604800")),
    ("queue_claim", {"task": "T1", "ttl": 1.5}, "INVALID", ("ttl", "1 to 604800")),
    ("queue_claim", {"task": "T1", "ttl": True}, "INVALID", ("ttl", "1 to 604800")),
    ("queue_claim", {"task": "a b"}, "INVALID", ("a b", "accepted")),
    ("queue_claim", {"task": "T1", "agent": "{x}"}, "INVALID", ("{x}", "accepted")),
    ("queue_claim", {"task": ["T1"]}, "INVALID", ("T1", "accepted")),
    ("queue_claim", {"task": None}, "INVALID", ("task",)),
    ("queue_claim", {}, "INVALID", ("task",)),
    ("queue_claim", {"task": "T1", "speed": 3}, "INVALID", ("speed", "ttl")),
    ("queue_claim", {"task": "T1", "fence": 3}, "INVALID", ("fence", "ttl")),
    ("queue_list", {"status": "done"}, "INVALID", ("done", "in-progress")),
    ("queue_list", {"limit": "25"}, "INVALID", ("limit", "1 to 1000")),
    ("queue_create", {"mission": "m", "task": "T9"}, "INVALID", ("title",)),
    (
        "queue_create",
        {"mission": "m", "task": "T9", "title": "t", "metadata": "{x"},
        "INVALID",
        ("metadata", "a JSON object"),
    ),
    (
        "queue_create",
        {"mission": "m", "task": "T9", "title": "x" * 501},
        "TOO_LARGE",
        ("501", "500"),
    ),
]


@pytest.mark.parametrize(("tool", "arguments", "code", "parts"), TOOLS)
async def test_tools(
    server: Server,
    busy: mq.Queue,
    tool: str,
    arguments: dict[str, Any],
    code: str,
    parts: tuple[str, ...],
) -> None:
    from mcp import Client

    before = key_space(server)
    async with Client(mq.mcp_server(busy), mode="legacy") as client:
        result = await client.call_tool(tool, arguments)
    assert result.is_error
    text = result.content[0].text
    assert text.startswith(f"{code}: ")
    for part in parts:
        assert part in text.splitlines()[0]
    assert key_space(server) == before


# ---- the scripts themselves ----
#
# Another program may call them: what has to hold in the data holds in the Lua.


def call(client: redis.Redis, name: str, **arguments: str | bytes) -> Any:
    """A script's reply to these arguments; the rest is ''.  For `create`: one new task."""
    lua = mq.script(name)
    argv = [arguments.pop(arg, "") for arg in (*lua.args, *lua.each)]
    assert not arguments
    return client.eval(lua.text, 1, "mosaic:queue:project:{p}", *argv)


NEW = {"task": "T9", "mission": "m", "title": "t", "priority": "medium", "lane": "any"}
CLAIM = {"task": "T1", "agent": "bob"}
LUA_IDS = [
    "", "{a}", "a:b", "a/b", "a b", "x" * 129, "🦊", "é", "a\0", "a\n", "\n", ".a", "-a", "a\tb",
]  # fmt: skip
LUA_CASES: list[tuple[str, dict[str, Any], str, str]] = [
    # "" is none: create makes the id, and takes the mission of a single one.
    *(
        ("create", NEW | {name: bad}, "INVALID", f"{said} is not an id")
        for name, said in (("task", "taskId"), ("mission", "mission"))
        for bad in LUA_IDS
        if bad
    ),
    *(("claim", CLAIM | {"task": bad}, "INVALID", "taskId is not an id") for bad in LUA_IDS),
    *(("claim", CLAIM | {"agent": bad}, "INVALID", "agent is not an id") for bad in LUA_IDS),
    *(("get", {"task": bad}, "INVALID", "taskId is not an id") for bad in LUA_IDS),
    *(("delete", {"task": bad}, "INVALID", "taskId is not an id") for bad in LUA_IDS),
    *(
        ("claim", CLAIM | {"ttl": bad}, "INVALID", "a whole number from 1 to 604800")
        for bad in (
            "0",
            "-1",
            "691200",
            "nan",
            "inf",
            "1e3",
            " 7 ",
            "0x10",
            "7\n",
            "1.0",
            "٣",
            "9" * 400,
            "soon",
        )
    ),
    *(
        ("heartbeat", {"task": "T2", "ttl": bad}, "INVALID", "from 1 to 604800")
        for bad in ("0", "nan", "1e3", "0x10")
    ),
    *(
        (name, {"task": "T2", "reason": "r", "delay": bad}, "INVALID", "from 0 to 604800")
        for name in ("release", "fail")
        for bad in ("-1", "nan", "604801", "1e3")
    ),
    ("fail", {"task": "T2", "retryDelay": "nan"}, "INVALID", "from 0 to 604800"),
    ("create", NEW | {"delay": "nan"}, "INVALID", "delay is nan"),
    ("create", NEW | {"maxRuntime": "0"}, "INVALID", "maxRuntime is 0"),
    ("create", NEW | {"maxRuntime": "nan"}, "INVALID", "maxRuntime is nan"),
    ("create", NEW | {"title": "x" * 501}, "TOO_LARGE", "501 bytes"),
    ("create", NEW | {"title": "a\0b"}, "INVALID", "NUL"),
    ("create", NEW | {"title": ""}, "INVALID", "title"),
    ("create", NEW | {"description": "x" * 65537}, "TOO_LARGE", "65537 bytes"),
    ("create", NEW | {"description": "a\0"}, "INVALID", "NUL"),
    ("create", NEW | {"metadata": "x" * 65537}, "TOO_LARGE", "65537 bytes"),
    ("create", NEW | {"priority": ""}, "INVALID", "critical, high, medium, low"),
    ("create", NEW | {"priority": "urgent"}, "INVALID", "urgent"),
    ("create", NEW | {"lane": ""}, "INVALID", "lane"),
    ("create", NEW | {"lane": "nightly"}, "INVALID", "nightly"),
    ("create", NEW | {"lane": "any coding"}, "INVALID", "any coding"),
    ("create", NEW | {"lane": "coding=4"}, "INVALID", "coding=4"),
    ("create", NEW | {"dependencies": "a:b"}, "INVALID", "dependency is not an id"),
    ("create", NEW | {"policy": "claimTTL nan"}, "INVALID", "claimTTL is nan"),
    ("create", NEW | {"policy": "claimTTL 0"}, "INVALID", "claimTTL is 0"),
    ("create", NEW | {"policy": "colour 3"}, "INVALID", "colour"),
    ("create", NEW | {"lanes": "a:b=1"}, "INVALID", "lane is not an id"),
    ("create", NEW | {"lanes": "coding=0"}, "INVALID", "coding.maxConcurrent is 0"),
    ("policy", {"apply": "1", "lanes": "coding=nan"}, "INVALID", "coding.maxConcurrent is nan"),
    ("policy", {"apply": "1", "policy": "maxRetries 1e3"}, "INVALID", "maxRetries is 1e3"),
    ("heartbeat", {"task": "T2", "progress": "x" * 4097}, "TOO_LARGE", "4097 bytes"),
    ("heartbeat", {"task": "T2", "checkpoint": "x" * 65537}, "TOO_LARGE", "65537 bytes"),
    ("heartbeat", {"task": "T2", "progress": "a\0"}, "INVALID", "NUL"),
    ("complete", {"task": "T2", "summary": "x" * 65537}, "TOO_LARGE", "65537 bytes"),
    ("complete", {"task": "T2", "summary": "\0"}, "INVALID", "NUL"),
    ("fail", {"task": "T2", "reason": "x" * 4097}, "TOO_LARGE", "4097 bytes"),
    ("release", {"task": "T2", "reason": "\0"}, "INVALID", "NUL"),
    ("delete", {"task": "T1", "reason": "x" * 4097}, "TOO_LARGE", "4097 bytes"),
    ("list", {"limit": "nan"}, "INVALID", "limit is nan"),
    ("list", {"limit": "1001"}, "INVALID", "1 to 1000"),
    ("list", {"limit": "5", "status": "done"}, "INVALID", "status is done"),
    ("list", {"limit": "5", "lane": "any coding"}, "INVALID", "any coding"),
]


def test_the_limits_hold_in_lua(server: Server, db: redis.Redis) -> None:
    call(db, "create", **NEW | {"task": "T1"})
    call(db, "create", **NEW | {"task": "T2"})
    call(db, "claim", task="T2", agent="alice")
    wrong = []
    for name, arguments, code, part in LUA_CASES:
        before = key_space(server)
        reply = call(db, name, **arguments)
        if reply[0] != code or part not in reply[1] or key_space(server) != before:
            wrong.append(f"{name} {str(arguments)[:200]}: {str(reply)[:200]}")
            call(db, "delete", task="T9", force="1")
    assert not wrong, "\n".join(wrong)


def test_a_refusal_in_lua_is_valid_utf8(server: Server, db: redis.Redis) -> None:
    """A sentence that was cut inside a character could not be read by any client."""
    call(db, "create", **NEW | {"task": "T1"})
    for bad in ("é" * 60, "x" + "é" * 60, "🦊" * 40, b"\xff\xfe"):
        for name, arguments in (
            ("create", NEW | {"task": bad}),
            ("create", NEW | {"priority": bad}),
            ("create", NEW | {"lane": bad}),
            ("claim", CLAIM | {"ttl": bad}),
            ("list", {"limit": "5", "status": bad}),
            ("list", {"limit": "5", "cursor": bad}),
        ):
            assert call(db, name, **arguments)[0] == "INVALID"


def test_200_dependencies_and_no_more_in_lua(server: Server, db: redis.Redis) -> None:
    for i in range(201):
        call(db, "create", **NEW | {"task": f"D{i}"})
    ids = [f"D{i}" for i in range(201)]
    before = key_space(server)
    reply = call(db, "create", **NEW | {"dependencies": " ".join(ids)})
    assert reply[0] == "TOO_LARGE"
    assert "201 dependencies" in reply[1]
    assert key_space(server) == before
    assert call(db, "create", **NEW | {"dependencies": " ".join(ids[:200])})[0] == "OK"


# ---- servers ----


def run(*words: str, home: Path, **environ: str) -> subprocess.CompletedProcess[str]:
    """A command line in an environment of its own."""
    clean = {name: os.environ[name] for name in ("PATH", "LANG") if name in os.environ}
    clean |= {"HOME": str(home), "XDG_DATA_HOME": str(home)} | environ
    return subprocess.run(
        [sys.executable, str(PROGRAM), *words],
        capture_output=True, text=True, env=clean, cwd=home, timeout=60, check=False,
    )  # fmt: skip


@pytest.fixture
def valkey() -> Iterator[Callable[..., Server]]:
    """Servers with options of their own, for where the engine does not matter."""
    running: list[Server] = []

    def start(*options: str) -> Server:
        running.append(Server(str(BINARIES["valkey"]()), *options))
        return running[-1]

    yield start
    for server in running:
        server.close()


@pytest.mark.parametrize(
    ("url", "parts"),
    [
        ("http://localhost", ("'http'", "redis", "unix", "valkey")),
        ("localhost:6379", ("localhost:6379", "redis")),
        ("redis:/localhost", ("***", "valkeys")),
        ("REDIS://localhost", ("REDIS", "redis")),
        ("redis://localhost:port", ("'***'", "host:port")),
        ("redis://localhost:99999", ("redis://localhost:99999", "host:port")),
        ("redis+sentinel://localhost/main", ("redis+sentinel://localhost/main", "host:port")),
        ("http://bob:hunter2@localhost", ("'http'",)),
        ("bob:hunter2@localhost", ("scheme",)),
        ("redis://bob:hunter2@localhost:port", ("'***'", "host:port")),
        ("redis://bob:hunter2/x@localhost", ("URL",)),
        ("redis+sentinel://bob:hunter2@localhost:port/main", ("'***'",)),
    ],
)
def test_a_url_that_is_none(
    url: str, parts: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert mq.main(["list", "--project", "p", "--url", url]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "hunter" not in err
    sentence = err.splitlines()[0]
    assert sentence.startswith("INVALID: URL")
    for part in parts:
        assert part in sentence


@pytest.mark.parametrize("form", [(), ("--json",)])
def test_a_wrong_password_is_never_printed(
    valkey: Callable[..., Server], tmp_path: Path, form: tuple[str, ...]
) -> None:
    port = free_port()
    server = valkey("--port", str(port))
    server.client().config_set("requirepass", "sesame")
    for url in (
        f"redis://:hunter2@127.0.0.1:{port}",
        f"redis://bob:hunter2@127.0.0.1:{port}/0",
        f"unix://{server.socket}?password=hunter2",
        f"redis://127.0.0.1:{port}",
        server.url,
    ):
        done = run("status", "--url", url, *form, home=tmp_path)
        assert done.returncode == 6, done.stderr
        assert "hunter2" not in done.stdout + done.stderr
        assert "Traceback" not in done.stderr
        assert "UNREACHABLE" in done.stderr
        assert "check user and password" in done.stderr
    for url in (f"redis://:sesame@127.0.0.1:{port}", f"unix://{server.socket}?password=sesame"):
        done = run("status", "--url", url, *form, home=tmp_path)
        assert done.returncode == 0, done.stderr
        assert "sesame" not in done.stdout + done.stderr
        assert ("list of processes" in done.stderr) is not bool(form)


def test_a_host_that_cannot_be_reached(tmp_path: Path) -> None:
    """Refused, silent, unknown: each is said in 5 s, and eight Pythons take some time to start,
    on a busy machine even more."""
    with closing(socket.socket()) as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen(8)
        urls = {
            f"redis://:hunter2@127.0.0.1:{free_port()}": "connect",
            f"redis://:hunter2@127.0.0.1:{silent.getsockname()[1]}": "",
            "redis://:hunter2@no-such-host.invalid:6379": "no-such-host.invalid",
            f"unix://{tmp_path}/none": "none",
        }
        commands = ("list --project p", "create p m T1 --title t")
        told: dict[tuple[str, str], tuple[float, Any]] = {}

        def ask(url: str, command: str) -> None:
            began = time.monotonic()
            done = run(*command.split(), "--json", "--url", url, home=tmp_path)
            told[url, command] = time.monotonic() - began, done

        cases = [(url, command) for url in urls for command in commands]
        threads = [threading.Thread(target=ask, args=case) for case in cases]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    slow = []
    for (url, command), (took, done) in told.items():
        part = urls[url]
        assert done.returncode == 6, (url, done.stderr)
        error = json.loads(done.stderr)["error"]
        assert error["code"] == "UNREACHABLE"
        assert part in error["message"].lower()
        assert error["hint"]
        assert "hunter2" not in done.stderr
        assert "Traceback" not in done.stderr
        if took > 25:
            slow.append(f"{command} {url}: {took:.1f} s")
    assert not slow


async def test_a_server_that_evicts_is_unfit(valkey: Callable[..., Server], tmp_path: Path) -> None:
    server = valkey("--maxmemory-policy", "allkeys-lru")
    done = run("create", "p", "m", "T1", "--title", "t", "--url", server.url, home=tmp_path)
    assert done.returncode == 6
    for part in ("UNFIT", "allkeys-lru", "noeviction", "--unsafe"):
        assert part in done.stderr
    assert key_space(server) == {}
    words = ("create", "p", "m", "T1", "--title", "t", "--unsafe")
    assert run(*words, "--url", server.url, home=tmp_path).returncode == 0
    config = mq.Config(environ={}).set("redis.url", server.url, "test")
    async with mq.Queue(config) as queue:
        with pytest.raises(mq.Refused, match="accepted: noeviction") as refused:
            await queue.list()
        assert refused.value.code == "UNFIT"


class OldServer:
    """A proxy to a real server that says it is of version 6.2."""

    def __init__(self, server: Server, folder: Path) -> None:
        self.server, self.path = server, folder / "old"
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(str(self.path))
        self.listener.listen(8)
        threading.Thread(target=self.serve, daemon=True).start()

    def serve(self) -> None:
        while True:
            try:
                client, _ = self.listener.accept()
            except OSError:
                return
            upstream = socket.socket(socket.AF_UNIX)
            upstream.connect(str(self.server.socket))
            for pair in ((client, upstream), (upstream, client)):
                threading.Thread(target=self.pump, args=pair, daemon=True).start()

    @staticmethod
    def pump(source: socket.socket, target: socket.socket) -> None:
        """Bytes as they come; a version is replaced by one of the same length."""
        with suppress(OSError), source, target:
            while data := source.recv(1 << 20):
                target.sendall(re.sub(rb"((?:redis|valkey)_version:)\d\.\d", rb"\g<1>6.2", data))


async def test_a_server_that_is_too_old_is_unfit(server: Server, db: redis.Redis) -> None:
    old = OldServer(server, server.folder)
    try:
        config = mq.Config(environ={}).set("redis.url", f"unix://{old.path}", "test")
        before = key_space(server)
        async with mq.Queue(config) as queue:
            with pytest.raises(mq.Refused, match=r"6\.2.*accepted: Valkey 7\.2") as refused:
                await queue.create("p", "m", "T1", title="t")
            assert refused.value.code == "UNFIT"
        assert key_space(server) == before
        async with mq.Queue(config, unsafe=True) as queue:
            await queue.create("p", "m", "T1", title="t")
    finally:
        old.listener.close()
        old.path.unlink()


# ---- users that may not do everything ----


@pytest.fixture
def user(server: Server, db: redis.Redis) -> Iterator[Callable[..., str]]:
    """Makes a user with these rules; the URL to log in with."""

    def make(name: str, *rules: str) -> str:
        db.execute_command("ACL", "SETUSER", name, "reset", "on", ">sesame", *rules)
        return f"unix://{name}@{server.socket}?password=sesame"

    yield make
    for name in db.acl_users():
        if name != "default":
            db.acl_deluser(name)


ONE_PROJECT = ("~mosaic:queue:project:{p}*", "&mosaic:queue:project:{p}*", "+@all", "-@dangerous")


async def test_a_user_that_sees_one_project(
    server: Server, db: redis.Redis, user: Callable[..., str]
) -> None:
    url = user("alice", *ONE_PROJECT)
    config = mq.Config(environ={}).set("redis.url", url, "test").set("project", "p", "test")
    async with mq.Queue(config) as queue:
        for i in range(1, 5):
            await queue.create("p", "m", f"T{i}", title="t")
        await queue.create("p", "m", "T5", title="t", dependencies=["T1"])
        await queue.claim("T1", "alice", ttl=60)
        await queue.start("T1")
        await queue.heartbeat("T1", progress="half")
        assert (await queue.complete("T1", summary="done"))["freed"] == ["T5"]
        await queue.claim("T2", "alice")
        await queue.release("T2")
        await queue.claim("T3", "alice")
        assert (await queue.fail("T3", reason="broken", retry=False))["status"] == "failed"
        await queue.delete("T4")
        assert (await queue.get("p/T5"))["status"] == "pending"
        assert len((await queue.list())["tasks"]) == 4
        assert (await queue.reap())["reaped"] == []
        await queue.policy(apply=True)
        status = await mq.status(queue)
        assert status["server"]["version"] == "unknown"
        assert status["server"]["evictionPolicy"] == "unknown"
        assert status["projects"][0]["tasks"]["completed"] == 1
        assert "sesame" not in json.dumps(status)
        for call in (
            lambda: queue.create("other", "m", "T1", title="t"),
            lambda: queue.get("other/T1"),
        ):
            refused = await refusal(server, call)
            assert refused.code == "UNFIT"
            assert "ACL" in refused.message + refused.hint
            assert "sesame" not in refused.message
    assert db.smembers(mq.REGISTRY) == set()


async def test_a_user_that_sees_one_project_reaps(
    server: Server, db: redis.Redis, user: Callable[..., str], shim: Any
) -> None:
    """INFO, which `reap` reads, is among the dangerous commands."""
    url = user("alice", *ONE_PROJECT)
    config = mq.Config(environ={}).set("redis.url", url, "test").set("project", "p", "test")
    async with mq.Queue(config) as queue:
        await queue.create("p", "m", "T1", title="t")
        await queue.claim("T1", "alice", ttl=1)
        shim.seconds = 100
        assert (await queue.claim("T1", "bob"))["claimedBy"] == "bob"


async def test_a_user_with_no_rights(
    server: Server, db: redis.Redis, user: Callable[..., str], tmp_path: Path
) -> None:
    url = user("nobody")
    for words in (
        ("create", "p", "m", "T1", "--title", "t"),
        ("list", "--project", "p"),
        ("list",),
        ("status",),
    ):
        before = key_space(server)
        done = run(*words, "--url", url, home=tmp_path)
        assert done.returncode == 6, (words, done.stdout)
        assert "\nUNFIT: " in done.stderr
        assert "permissions" in done.stderr
        assert "sesame" not in done.stderr
        assert "Traceback" not in done.stderr
        assert key_space(server) == before
