"""What a reader is told to do next, on every surface, and text that looks like markup of ours.

A hint names only what its reader can call: a shell its commands, an agent the tools that it is
offered.  What users wrote stands in every sentence as they wrote it.
"""

from __future__ import annotations

import inspect
import itertools
import json
import re
import shlex
from collections.abc import Callable, Mapping
from typing import Any

import httpx2
import pytest
import redis
from conftest import Server, one_engine
from mcp import Client

import mosaic_queue as mq

pytestmark = pytest.mark.anyio
server = one_engine()

TOOL_SETS = ("default", "orchestrator")
CALLERS = {
    "everybody": mq.Caller(),
    "agent": mq.Caller("ci", "", "agent", ("p",), "alice"),
    "reader": mq.Caller("eye", "", "read"),
}
TEXT = "@1@ {x} %s \\1 @1700000000000@ $(id) `id`"
AGENT = "a@99999999999999999999@b"
TASK = "1@1700000000000@x"
FORGED = ("2023-11-14", "1970-01-01")  # the times that these would be, if they were read as such
FACTS = {"task": "p/T1", "project": "p", "agent": "alice", "mission": "m", "reason": "why"}


def readers() -> Mapping[str, mq.Reader]:
    """Every surface with what it offers."""
    of_http = {f"http {name}": mq.http_reader(caller) for name, caller in CALLERS.items()}
    return {"shell": mq.SHELL, **{name: mq.tool_reader(name) for name in TOOL_SETS}, **of_http}


# ---- the table ----


def refusals() -> list[mq.Refused]:
    """Every code of every operation, in every case that the table knows."""
    cases = {word for key in mq.STEPS for word in key.split(" ")[1:]} - mq.OPERATIONS.keys()
    cases |= {" ".join(key.split(" ")[1:]) for key in mq.STEPS} - mq.OPERATIONS.keys() | {""}
    made = []
    for code, operation, case in itertools.product(mq.CODES, mq.OPERATIONS, sorted(cases)):
        refused = mq.Refused(code, "no", case=case)
        refused.operation, refused.facts = operation, dict(FACTS)
        made.append(refused)
    return made


def require_command(hint: str) -> None:
    """A hint of a shell names a command line that the parser takes."""
    call = hint[hint.index("mosaic-queue") :]
    words = shlex.split(call)[1:]
    of, rest = mq.operation_of(words)
    mq.make_parser(of, "mosaic-queue").parse_args(rest)


def require_tool(hint: str, tool_set: str) -> None:
    """A hint of a tool names one that is offered, with arguments that it takes."""
    assert not any(word in hint for word in ("mosaic-queue", " --", "$")), hint
    found = re.search(r"queue_(\w+) (\{.*\})$", hint)
    assert ("queue_" in hint) == bool(found), hint
    if found:
        of = mq.OPERATIONS[found[1]]
        assert of.tool in ("default", tool_set), hint
        given = json.loads(found[2])
        schema = mq.input_schema(of, mq.Config(environ={}).set("project", "p", "test"))
        assert set(schema["required"]) <= given.keys() <= schema["properties"].keys(), hint


def require_request(hint: str, caller: mq.Caller) -> None:
    """A hint of HTTP names a request that is served, to this caller too."""
    assert not any(word in hint for word in ("mosaic-queue", " --", "$", "queue_")), hint
    found = re.search(r"\b(GET|POST|PATCH|DELETE) (/[^\s?]+)(\?\S+| \{.*\})?$", hint)
    assert ("/api/" in hint) == bool(found), hint
    if found:
        places = {
            (method, path.format(project="p", task="T1")): of
            for of in mq.served_operations()
            for method, path in mq.places_of(of)
        }
        caller.require(places[found[1], found[2]], {"project": "p", "agent": "alice"})


def test_no_hint_names_what_its_reader_cannot_call() -> None:
    seen = set()
    for refused in refusals():
        for name, reader in readers().items():
            refused.reader = reader
            hint = refused.hint
            may_stay = refused.code == "INVALID" or name == "http reader"
            assert hint or may_stay, (refused, refused.operation, name)
            if (name, hint) in seen:
                continue
            seen.add((name, hint))
            if name.startswith("http "):
                require_request(hint, CALLERS[name.removeprefix("http ")])
            elif name != "shell":
                require_tool(hint, name)
            elif ": mosaic-queue" in hint:
                require_command(hint)
    assert len(seen) > 60


def test_the_table_knows_no_key_that_nobody_asks_for() -> None:
    lua = "".join(path.read_text() for path in mq.lua_folder().glob("*.lua"))
    source = lua + inspect.getsource(mq)
    for key in mq.STEPS:
        code, *rest = key.split(" ")
        assert code in mq.CODES
        case = " ".join(word for word in rest if word not in mq.OPERATIONS)
        if case and case not in mq.STATUSES:
            assert f"'{case}'" in lua or f'case="{case}"' in source, key
    for steps in mq.STEPS.values():
        for step in filter(lambda step: step.call, steps):
            operation, *names = step.call.split()
            taken = mq.OPERATIONS[operation].parameters
            assert {re.split(r"[?=]", name)[0] for name in names} <= taken.keys(), step


@pytest.mark.parametrize(
    ("code", "operation", "case", "tool_set", "hint"),
    [
        ("HELD", "claim", "", "default", 'take another: queue_next {"project":"p"}'),
        ("NOT_DUE", "claim", "", "default", 'take another: queue_next {"project":"p"}'),
        ("HELD", "delete", "", "orchestrator", "delete it when nobody holds it; see who does: "
         'queue_explain {"task":"p/T1"}'),
        ("PAUSED", "next", "", "default", "wait until somebody lets claims through again"),
        ("PAUSED", "next", "", "orchestrator", "wait, or let claims through again: queue_unpause "
         '{"project":"p"}'),
        ("WRONG_STATUS", "redrive", "pending", "orchestrator", "see the dead letters: queue_list "
         '{"project":"p","status":"failed"}'),
        ("STALE_SESSION", "complete", "", "default", "if that session is gone, take over what it "
         'left, then repeat this: queue_claim {"task":"p/T1","resume":true}'),
    ],
)  # fmt: skip
def test_an_agent_is_told_one_whole_call(
    code: str, operation: str, case: str, tool_set: str, hint: str
) -> None:
    refused = mq.Refused(code, "no", case=case)
    refused.operation, refused.facts = operation, {"task": "p/T1", "project": "p"}
    refused.reader = mq.tool_reader(tool_set)
    assert refused.hint == hint


def test_a_person_is_told_the_command_as_it_was_typed() -> None:
    refused = mq.Refused("HELD", "no")
    refused.facts = {"project": "p", "agent": "alice"}
    refused.reader = mq.shell_reader("mosaic queue")
    assert refused.hint == "take another: mosaic queue next --project p --agent alice"
    assert mq.Refused("INVALID", "no", "mosaic-queue x").hint == "mosaic-queue x"


# ---- text that looks like markup ----

OF_THE_QUEUE = sorted(name for name, of in mq.OPERATIONS.items() if not of.local)


def value_of(name: str, parameter: inspect.Parameter) -> Any:
    """A hostile value for an argument of this name, as far as its kind allows."""
    argument = mq.ARGUMENTS[name]
    ids = {"lane": "any", "project": "p", "agent": AGENT}
    return {
        "id": ids.get(name, TASK), "task": TASK, "text": TEXT, "int": max(argument.low, 1),
        "duration": max(argument.low, 1),
        "bool": parameter.default is not True, "word": (*argument.words, "")[0],
        "words": list(argument.words[:1]), "ids": [TASK], "json": {TEXT: TEXT},
        "op": TEXT.split()[0],
    }[argument.kind]  # fmt: skip


def hostile(of: mq.Operation, needed: bool) -> dict[str, Any]:
    """Arguments of an operation: those that it needs, or as many as fit together."""
    given = {}
    for name, parameter in of.parameters.items():
        wanted = parameter.default is parameter.empty or name in ("task", "agent", "project")
        leave_out = ("op", "wait", "cursor", "dependencies", "clear", "session", "if_rev", "fence")
        if wanted or not (needed or name in leave_out):
            given[name] = value_of(name, parameter)
    return given


def setting(server: Server) -> None:
    """A project in which most can be refused, with hostile names wherever one may choose them."""
    import conftest

    def ask(method: str, *args: Any, **named: Any) -> Any:
        return conftest.ask(server, method, *args, **named)

    ask("create", "p", TASK, TASK, title=TEXT, description=TEXT, metadata={TEXT: TEXT})
    ask("claim", TASK, AGENT)
    ask("heartbeat", TASK, progress=TEXT, checkpoint=TEXT)
    ask("create", "p", TASK, "B", title=TEXT, dependencies=[TASK])
    ask("create", "p", TASK, "H", title=TEXT)
    ask("block", "H", reason=TEXT)
    ask("create", "p", TASK, "C", title=TEXT, lane="coding")


def require_untouched(said: str) -> None:
    assert not any(word in said for word in (*FORGED, "Traceback", "\0")), said


@pytest.mark.parametrize("needed", [True, False])
@pytest.mark.parametrize("name", OF_THE_QUEUE)
async def test_every_tool_leaves_text_as_it_was_written(
    server: Server, config: mq.Config, name: str, needed: bool
) -> None:
    import anyio

    await anyio.to_thread.run_sync(setting, server)
    of = mq.OPERATIONS[name]
    async with mq.Queue(config, session="s") as queue:
        for task in (TASK, "B", "H", "none"):
            given = hostile(of, needed) | ({"task": task} if "task" in of.parameters else {})
            try:
                answer = await of.call(queue, **given)
            except mq.Refused as refused:
                require_untouched(f"{refused} {refused.hint}")
            else:
                require_untouched(json.dumps(answer, ensure_ascii=False))
            if not of.tool:
                continue
            async with Client(mq.mcp_server(queue, "orchestrator"), mode="legacy") as client:
                shown = {mq.camel(key): value for key, value in given.items()
                         if mq.ARGUMENTS[key].tool}  # fmt: skip
                result = await client.call_tool("queue_" + name, shown)
                require_untouched(result.content[0].text)


@pytest.mark.parametrize("name", [of.name for of in mq.served_operations()])
async def test_every_request_leaves_text_as_it_was_written(
    server: Server, config: mq.Config, name: str
) -> None:
    import anyio

    await anyio.to_thread.run_sync(setting, server)
    of = mq.OPERATIONS[name]
    async with mq.Queue(config) as queue:
        app = mq.HttpServer(queue, "test").app()
        transport = httpx2.ASGITransport(app=app)
        async with httpx2.AsyncClient(transport=transport, base_url="http://test") as one:
            for task in (TASK, "B", "H", "none"):
                given = hostile(of, needed=True) | {"project": "p", "task": task}
                for method, path in mq.places_of(of):
                    rest = {mq.camel(key): value for key, value in given.items()
                            if "{" + key + "}" not in path and key in of.parameters}  # fmt: skip
                    how = {"params": rest} if method in ("GET", "DELETE") else {"json": rest}
                    answer = await one.request(method, path.format_map(given), **how)
                    assert answer.status_code < 500, answer.text
                    require_untouched(answer.text)


@pytest.mark.parametrize("name", OF_THE_QUEUE)
def test_every_command_leaves_text_as_it_was_written(
    server: Server,
    db: redis.Redis,
    name: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    setting(server)
    of = mq.OPERATIONS[name]
    monkeypatch.setenv("MOSAIC_PROJECT", "p")
    for task in (TASK, "B", "H", "none"):
        given = hostile(of, needed=True) | ({"task": task} if "task" in of.parameters else {})
        line = mq.command_line("mosaic-queue", name, given)
        status = mq.main([*shlex.split(line)[1:], "--url", server.url])
        out, err = capsys.readouterr()
        assert status != 1, err
        require_untouched(out + err)


async def test_who_is_called_like_a_time_holds_a_task_like_anybody(
    queue: mq.Queue, db: redis.Redis
) -> None:
    await queue.create("p", "m", "T1", title="t")
    await queue.claim("T1", AGENT)
    with pytest.raises(mq.Refused, match=f"is held by {AGENT} since 20") as refused:
        await queue.claim("T1", "bob")
    assert re.search(r"since \d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ \(\d+ s ago\)", refused.value.message)
    assert refused.value.hint == "take another: mosaic-queue next --project p --agent bob"


async def test_a_full_lane_names_its_holder(queue: mq.Queue, db: redis.Redis) -> None:
    queue.config.set("lanes.coding.maxConcurrent", 1, "test")
    for task in ("T1", "T2"):
        await queue.create("p", "m", task, title="t", lane="coding")
    await queue.claim("T1", AGENT)
    why = (await queue.next("bob", lane="coding"))["why"]
    assert why == f"lane coding has its 1 held tasks: T1 of {AGENT}"


Refusing = Callable[[mq.Queue], Any]


@pytest.mark.parametrize(
    ("session", "agent", "case"),
    [("one", "alice", "yours"), ("two", "alice", "session"), ("two", "bob", "")],
)
async def test_a_held_task_knows_whose_it_is(
    config: mq.Config, session: str, agent: str, case: str
) -> None:
    async with mq.Queue(config, session="one") as one, mq.Queue(config, session=session) as other:
        await one.create("p", "m", "T1", title="t")
        await one.claim("T1", "alice")
        with pytest.raises(mq.Refused) as refused:
            await other.claim("T1", agent)
        assert (refused.value.code, refused.value.case) == ("HELD", case)
