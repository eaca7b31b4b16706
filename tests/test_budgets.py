"""What an agent pays: tokens of the tools, of the instructions, and of a page of tasks.

Counted with o200k by bpe-openai, which brings its tables along.  Everything is read
off the wire of a real server process, so that nothing is counted but what a model sees.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bpe_openai
import pytest
import redis
from conftest import PROGRAM, Server, one_engine
from mcp import Client, StdioServerParameters

import mosaic_queue as mq

pytestmark = pytest.mark.anyio
DEFAULT = [
    "queue_create", "queue_list", "queue_get", "queue_claim", "queue_next", "queue_start",
    "queue_heartbeat", "queue_release", "queue_complete", "queue_fail", "queue_note",
    "queue_status", "queue_explain",
]  # fmt: skip
ORCHESTRATOR = [
    "queue_assign", "queue_update", "queue_block", "queue_unblock", "queue_redrive",
    "queue_reopen", "queue_delete", "queue_pause", "queue_unpause",
]  # fmt: skip
READS = {"queue_list", "queue_get", "queue_status", "queue_explain"}
Count = Callable[..., list[int]]


@pytest.fixture(scope="session")
def tokens() -> Count:
    """Counts the o200k tokens of each text."""
    encoding = bpe_openai.get_encoding("o200k_base")

    def count(*texts: str) -> list[int]:
        return [len(encoding.encode(text)) for text in texts]

    assert count("hello world") == [2]
    return count


server = one_engine()


@pytest.fixture
def connect(server: Server, db: redis.Redis, tmp_path: Path) -> Callable[..., Client]:
    """A client of a new server process, without a default project: its schemas are the longest."""

    def make(*words: str) -> Client:
        environ = {"PATH": os.environ["PATH"], "HOME": str(tmp_path)}
        environ["XDG_DATA_HOME"] = str(tmp_path)
        program = [str(PROGRAM), "mcp", "--url", server.url, *words]
        return Client(
            StdioServerParameters(command=sys.executable, args=program, env=environ, cwd=tmp_path),
            mode="legacy",
            read_timeout_seconds=60,
        )

    return make


def as_sent(tool: Any) -> str:
    """What of a tool a client puts before its model."""
    shown = {"name": tool.name, "description": tool.description, "inputSchema": tool.input_schema}
    return json.dumps(shown, ensure_ascii=False, separators=(",", ":"))


async def test_the_default_tools_cost_1500_tokens_at_most(
    connect: Callable[..., Client], tokens: Count
) -> None:
    async with connect() as client:
        tools = (await client.list_tools()).tools
    assert [tool.name for tool in tools] == DEFAULT
    costs = dict(zip(DEFAULT, tokens(*map(as_sent, tools)), strict=True))
    (together,) = tokens("[" + ",".join(map(as_sent, tools)) + "]")
    assert together <= 1500, f"{together} tokens: {costs}"


async def test_what_a_model_may_get_wrong_has_a_description(
    connect: Callable[..., Client],
) -> None:
    async with connect("--tools", "orchestrator") as client:
        for tool in (await client.list_tools()).tools:
            for name, schema in tool.input_schema["properties"].items():
                plain = name in ("title", "description", "progress", "checkpoint", "reason",
                                 "summary", "text", "project", "metadata")  # fmt: skip
                assert plain or "enum" in schema.get("items", schema) or schema.get("description")


async def test_instructions_are_below_1_kb_and_name_real_tools(
    connect: Callable[..., Client],
) -> None:
    async with connect() as client:
        said = client.instructions or ""
        names = {tool.name for tool in (await client.list_tools()).tools}
    assert 0 < len(said.encode()) < 1024
    mentioned = {word.strip(".,;:()") for word in said.split() if word.startswith("queue_")}
    assert {"queue_next", "queue_complete", "queue_fail"} <= mentioned <= names


async def test_hints_say_what_a_tool_may_do(connect: Callable[..., Client]) -> None:
    """A client asks its user before what destroys, and lets what only reads pass."""
    async with connect("--tools", "orchestrator") as client:
        tools = (await client.list_tools()).tools
    for tool in tools:
        hints = tool.annotations
        assert tool.title
        assert hints is not None
        assert hints.read_only_hint is (tool.name in READS), tool.name
        assert hints.destructive_hint is (tool.name == "queue_delete"), tool.name
        assert isinstance(hints.idempotent_hint, bool)
        assert hints.open_world_hint is False


async def test_the_orchestrators_tools_come_on_top(connect: Callable[..., Client]) -> None:
    async with connect("--tools", "orchestrator") as client:
        names = [tool.name for tool in (await client.list_tools()).tools]
    assert sorted(names) == sorted(DEFAULT + ORCHESTRATOR)


TITLES = [
    "Init: pnpm monorepo, TypeScript strict, ESLint, vitest",
    "Valkey connection module with health check",
    "CLI wiring for create, list, show, claim, release",
    "Unit tests for claim atomicity and state transitions",
    "README, package.json bin entry, npm publish prep",
]


async def test_a_page_of_25_tasks_costs_700_tokens_at_most(
    connect: Callable[..., Client], tokens: Count
) -> None:
    """A mission as the PRD has it: ids like MQ-007, one line each, some held, some waiting."""
    async with connect() as client:
        for n in range(25):
            new = {"project": "mosaic", "mission": "bootstrap", "task": f"MQ-{n:03}"}
            new |= {"title": TITLES[n % 5], "priority": mq.PRIORITIES[n % 4]}
            new |= {"lane": "coding" if n % 3 else "planning"}
            if n >= 20:
                new |= {"dependencies": [f"MQ-{n - 1:03}"]}
            assert not (await client.call_tool("queue_create", new)).is_error
        for n in range(5):
            of = {"project": "mosaic", "task": f"MQ-{n:03}", "agent": f"claude-{n}"}
            assert not (await client.call_tool("queue_claim", of)).is_error
        page = await client.call_tool("queue_list", {"project": "mosaic"})
    assert page.structured_content is None
    (text,) = [one.text for one in page.content]
    assert len(text.splitlines()) == 26
    (cost,) = tokens(text)
    assert cost <= 700, f"{cost} tokens:\n{text}"
