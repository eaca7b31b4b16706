"""`serve`: real clients against a real process, over REST and MCP."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import signal
import ssl
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
import redis
from conftest import PROGRAM, SECRETS, Process, Serve, Server, key_space, one_engine
from mcp import Client

import mosaic_queue as mq

pytestmark = pytest.mark.anyio
server = one_engine()


@contextlib.asynccontextmanager
async def client(process: Process, token: str = "") -> AsyncIterator[httpx2.AsyncClient]:
    headers = {"authorization": f"Bearer {SECRETS[token]}"} if token else {}
    async with httpx2.AsyncClient(base_url=process.url, headers=headers, timeout=60) as one:
        yield one


TASKS = "/api/projects/p/tasks"


async def create(one: httpx2.AsyncClient, *names: str, **more: Any) -> None:
    for name in names:
        new = {"taskId": name, "mission": "m", "title": "t", **more}
        made = await one.post(TASKS, json=new)
        assert made.status_code == 201, made.text


# ---- how soon it answers ----


async def test_a_kept_connection_does_not_wait_for_the_second_part(serve: Serve) -> None:
    times = []
    async with client(serve()) as one:
        for _ in range(30):
            began = time.perf_counter()
            assert (await one.get("/healthz")).is_success
            times.append(time.perf_counter() - began)
    # Where the body waits for the acknowledgement of the head, each takes 40 ms and more.
    assert min(times[10:]) < 0.03


async def test_the_page_is_sent_packed_and_once(serve: Serve) -> None:
    async with client(serve()) as one:
        plain = await one.get("/", headers={"accept-encoding": "identity"})
        packed = await one.get("/", headers={"accept-encoding": "gzip"})
        assert plain.text == packed.text == mq.BOARD_PAGE
        assert "content-encoding" not in plain.headers
        assert packed.headers["content-encoding"] == "gzip"
        assert int(packed.headers["content-length"]) < len(mq.BOARD_PAGE) / 2
        again = await one.get("/", headers={"if-none-match": packed.headers["etag"]})
        assert (again.status_code, again.content) == (304, b"")


def test_a_server_that_cannot_start_says_no_address(
    environ: dict[str, str], tmp_path: Path
) -> None:
    (tmp_path / "no.pem").write_text("no certificate")
    words = [sys.executable, str(PROGRAM), "serve", "--port", "0", "--tls-cert", "no.pem"]
    done = subprocess.run(
        words, env=environ, cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert done.returncode
    assert "https://127.0.0.1:" not in done.stderr


# ---- the life of a task ----


async def test_a_task_from_its_creation_to_its_end(serve: Serve) -> None:
    async with client(serve()) as one:
        new = {"taskId": "T1", "mission": "m", "title": "t", "metadata": {"a": []}}
        made = await one.post(TASKS, json=new)
        assert (made.status_code, made.headers["location"]) == (201, f"{TASKS}/T1")
        assert (await one.get(made.headers["location"])).json()["metadata"] == {"a": []}
        offer = await one.post("/api/projects/p/next", json={"agent": "a1"})
        assert offer.json()["tasks"][0]["claimedBy"] == "a1"
        refused = await one.post(f"{TASKS}/T1/claim", json={"agent": "a2"})
        assert refused.headers["content-type"] == "application/problem+json"
        told = refused.json()
        assert (refused.status_code, told["code"]) == (409, "HELD")
        assert told["hint"] == 'take another: POST /api/projects/p/next {"agent":"a2"}'
        done = await one.post(f"{TASKS}/T1/complete", json={"agent": "a1", "summary": "did"})
        assert done.json()["status"] == "completed"
        page = (await one.get("/api/projects/p/events")).json()
        assert [event["op"] for event in page["events"]] == ["create", "claim", "complete"]
        status = (await one.get("/api/projects/p")).json()
        assert status["projects"][0]["tasks"]["completed"] == 1


async def test_many_at_once_all_or_none(serve: Serve) -> None:
    async with client(serve()) as one:
        rows = [{"taskId": f"T{i}", "mission": "m", "title": "t"} for i in range(3)]
        assert len((await one.post(TASKS, json=rows)).json()["tasks"]) == 3
        assert (await one.post(TASKS, json=[rows[0]])).status_code == 409
        assert (await one.post(TASKS, json=[])).json()["code"] == "INVALID"
        listed = await one.get(TASKS, params={"status": "pending", "limit": "2"})
        assert (len(listed.json()["tasks"]), listed.json()["total"]) == (2, 3)


async def test_a_change_by_patch_names_what_it_saw(serve: Serve) -> None:
    async with client(serve()) as one:
        await create(one, "T1", description="long")
        tag = (await one.get(f"{TASKS}/T1")).headers["etag"]
        assert (await one.get(f"{TASKS}/T1", headers={"if-none-match": tag})).status_code == 304
        changes = {"title": "new", "description": None}
        patched = await one.patch(f"{TASKS}/T1", json=changes, headers={"if-match": tag})
        assert (patched.json()["title"], "description" in patched.json()) == ("new", False)
        stale = await one.patch(f"{TASKS}/T1", json={"title": "x"}, headers={"if-match": tag})
        assert (stale.status_code, stale.json()["code"]) == (409, "STALE_REV")
        done = await one.patch(f"{TASKS}/T1", json={"status": "completed"})
        assert done.json()["status"] == "completed"
        wrong = await one.patch(f"{TASKS}/T1", json={"fence": 5})
        assert (wrong.status_code, wrong.json()["code"]) == (400, "INVALID")


@pytest.mark.parametrize(("method", "path"), [("PATCH", "T1"), ("POST", "T1/update")])
async def test_what_has_acted_is_not_stale_when_it_is_sent_again(
    serve: Serve, method: str, path: str
) -> None:
    async with client(serve()) as one:
        await create(one, "T1")
        tag = (await one.get(f"{TASKS}/T1")).headers["etag"]
        headers = {"if-match": tag, "idempotency-key": "abc"}
        for _ in range(2):
            done = await one.request(
                method, f"{TASKS}/{path}", json={"title": "new"}, headers=headers
            )
            assert done.is_success, done.text
        page = (await one.get("/api/projects/p/events")).json()
        assert [event["op"] for event in page["events"]] == ["create", "update"]
        headers["idempotency-key"] = "other"
        stale = await one.request(method, f"{TASKS}/{path}", json={"title": "x"}, headers=headers)
        assert (stale.status_code, stale.json()["code"]) == (409, "STALE_REV")


async def test_a_repeated_call_acts_once(serve: Serve) -> None:
    async with client(serve()) as one:
        await create(one, "T1", "T2")
        key = {"idempotency-key": "abc"}
        first, again = [
            (await one.post("/api/projects/p/next", json={"agent": "a"}, headers=key)).json()
            for _ in range(2)
        ]
        assert first["tasks"][0]["fence"] == again["tasks"][0]["fence"]


async def test_a_client_that_goes_away_leaves_nothing_claimed(serve: Serve) -> None:
    process = serve()
    async with client(process) as one:
        await create(one, "T0", delay=3600)
        ask = {"agent": "a", "wait": 60}
        with pytest.raises(httpx2.TimeoutException):
            await one.post("/api/projects/p/next", json=ask, timeout=0.5)
        await create(one, "T1")
        await asyncio.sleep(0.3)
        assert (await one.get(f"{TASKS}/T1")).json()["status"] == "pending"


async def test_who_waits_gets_the_task_that_comes(serve: Serve) -> None:
    async with client(serve()) as one:
        await create(one, "T0", delay=3600)
        ask = {"agent": "a", "wait": 30}
        waiting = asyncio.create_task(one.post("/api/projects/p/next", json=ask))
        await asyncio.sleep(0.3)
        await create(one, "T1")
        assert (await waiting).json()["tasks"][0]["taskId"] == "T1"


async def test_many_wait_on_one_connection_and_one_token_wakes_one(
    config: mq.Config, db: redis.Redis
) -> None:
    async with mq.Queue(config) as queue:
        queue.link.ears = mq.Ears(queue.link)
        await queue.create("p", "m", "T0", title="t", delay=3600)
        waiting = [asyncio.create_task(queue.next(f"a{i}", wait=30)) for i in range(50)]
        await asyncio.sleep(1)
        assert db.info("clients")["blocked_clients"] == 1
        waiting[0].cancel()  # it has waited longest, and will use no token
        for i in range(1, 50):
            await queue.create("p", "m", f"T{i}", title="t")
        offers = await asyncio.gather(*waiting[1:])
        assert len({offer["tasks"][0]["taskId"] for offer in offers}) == 49
        assert not queue.link.ears.waiting


async def test_a_stop_answers_who_waits(serve: Serve) -> None:
    process = serve()
    async with client(process) as one:
        await create(one, "T0", delay=3600)
        ask = {"agent": "a", "wait": 600}
        waiting = asyncio.create_task(one.post("/api/projects/p/next", json=ask))
        await asyncio.sleep(0.3)
        status, took = await asyncio.to_thread(process.stop)
        assert (status, took < 10) == (0, True)
        assert (await waiting).status_code == 503


# ---- events ----


async def test_events_as_a_stream_go_on_where_they_were(serve: Serve) -> None:
    async with client(serve()) as one:
        await create(one, "T1")
        headers = {"accept": "text/event-stream", "last-event-id": "0"}
        seen: list[str] = []
        async with one.stream("GET", "/api/projects/p/events", headers=headers) as stream:
            assert stream.headers["content-type"].startswith("text/event-stream")
            lines = stream.aiter_lines()
            async for line in lines:
                seen += [line] if line.startswith("id:") else []
                if len(seen) == 1 and line == "":
                    await create(one, "T2")
                if len(seen) == 2:
                    break
        assert seen == ["id: 1", "id: 2"]
        headers["last-event-id"] = "1"
        async with one.stream("GET", "/api/projects/p/events", headers=headers) as stream:
            async for line in stream.aiter_lines():
                assert line == "id: 2"
                break


async def test_events_of_all_projects_go_on_from_a_moment(serve: Serve) -> None:
    async def read(since: str, most: int) -> tuple[list[str], str]:
        seen: list[str] = []
        headers = {"accept": "text/event-stream", "last-event-id": since}
        async with one.stream("GET", "/api/events", headers=headers) as stream:
            async for line in stream.aiter_lines():
                if line.startswith("data:"):
                    event = json.loads(line[5:])
                    seen.append(f"{event['project']}/{event['task']}")
                if line.startswith("id:") and len(seen) >= most:
                    return seen, line[4:]
        raise AssertionError("it ended")

    async with client(serve()) as one:
        await create(one, "T1")
        new = {"taskId": "Q1", "mission": "m", "title": "t"}
        await one.post("/api/projects/q/tasks", json=new)
        seen, moment = await read("0", 2)
        assert sorted(seen) == ["p/T1", "q/Q1"]
        await create(one, "T2")
        assert (await read(moment, 1))[0] == ["p/T2"]


async def test_who_does_not_read_is_dropped(
    config: mq.Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mq, "READ_WITHIN", 0.2)
    async with mq.Queue(config) as queue:
        await queue.create("p", "m", "T1", title="t")
        app = mq.HttpServer(queue, "127.0.0.1").app()
        sent: list[Any] = []

        async def receive() -> Any:
            await asyncio.Event().wait()

        async def send(message: Any) -> None:
            sent.append(message)
            if message["type"] == "http.response.body":
                await asyncio.Event().wait()

        headers = [(b"host", b"127.0.0.1"), (b"accept", b"text/event-stream")]
        path = "/api/projects/p/events"
        scope = {"type": "http", "method": "GET", "path": path, "raw_path": path.encode(),
                 "query_string": b"since=0", "headers": headers, "client": ("127.0.0.1", 1),
                 "asgi": {"version": "3.0", "spec_version": "2.4"}, "http_version": "1.1",
                 "root_path": "", "scheme": "http", "server": ("127.0.0.1", 1)}  # fmt: skip
        async with asyncio.timeout(20):
            await app(scope, receive, send)
        assert [message["type"] for message in sent] == [
            "http.response.start", "http.response.body"]  # fmt: skip


# ---- who may do what ----


async def test_without_a_token_that_is_known_nothing_is_done(serve: Serve, server: Server) -> None:
    process = serve(tokens=True)
    before = key_space(server)
    async with client(process) as one:
        assert (await one.get("/healthz")).status_code == 200
        for headers in ({}, {"authorization": "Bearer nosuchtoken"}, {"authorization": "x"}):
            for path in (TASKS, "/metrics", "/openapi.json", "/nowhere", "/mcp"):
                refused = await one.post(path, json={}, headers=headers)
                assert refused.status_code in (401, 429), path
        for _ in range(20):
            refused = await one.get(TASKS, headers={"authorization": "Bearer guess"})
        assert (refused.status_code, refused.headers["retry-after"]) == (429, "60")
    assert key_space(server) == before


MAY: list[tuple[str, str, str, Any, int]] = [
    ("eye", "GET", TASKS, None, 200),
    ("eye", "POST", f"{TASKS}/T1/claim", {"agent": "eye"}, 403),
    ("eye", "GET", "/api/projects/secret/tasks", None, 404),
    ("eye", "GET", "/api/projects/secret/events", None, 404),
    ("eye", "GET", "/api/projects/p/tasks/secret%2FS1", None, 404),
    ("ci", "POST", f"{TASKS}/T1/claim", {"agent": "ci-7"}, 200),
    ("ci", "POST", f"{TASKS}/T1/claim", {"agent": "bob"}, 403),
    ("ci", "POST", f"{TASKS}/T1/claim", {}, 400),
    ("ci", "POST", f"{TASKS}/T1/complete", {"agent": "ci-7", "force": True}, 403),
    ("ci", "DELETE", f"{TASKS}/T1", None, 403),
    ("ci", "PATCH", f"{TASKS}/T1", {"status": "completed"}, 403),
    ("ci", "POST", "/api/projects/secret/next", {"agent": "ci-7"}, 404),
    ("ci", "POST", "/api/projects/p/pause", {}, 403),
    ("other", "POST", f"{TASKS}/T1/claim", {}, 200),
    ("boss", "DELETE", f"{TASKS}/T1", None, 200),
    ("boss", "GET", "/api/projects/secret/tasks", None, 200),
]


async def test_what_a_token_may_do(serve: Serve) -> None:
    process = serve(tokens=True)
    async with client(process, "boss") as boss:
        new = {"taskId": "S1", "mission": "m", "title": "t"}
        await boss.post("/api/projects/secret/tasks", json=new)
        for token, method, path, body, status in MAY:
            await create(boss, "T1")
            async with client(process, token) as one:
                answer = await one.request(method, path, json=body)
                assert answer.status_code == status, (token, method, path, answer.text)
                shown = (await one.get("/api/projects")).json()["projects"]
                names = [row["project"] for row in shown]
                assert ("secret" in names) == (token in ("boss", "other"))
            await boss.delete(f"{TASKS}/T1", params={"force": "true"})


async def test_a_session_of_another_token_is_refused(serve: Serve) -> None:
    process = serve(tokens=True)
    async with client(process, "boss") as boss, client(process, "other") as bob:
        await create(boss, "T1")
        await boss.post(f"{TASKS}/T1/claim", json={"agent": "bob"})
        refused = await bob.post(f"{TASKS}/T1/complete", json={})
        assert refused.json()["code"] == "STALE_SESSION"


async def test_every_call_of_an_agent_renews_what_it_holds(serve: Serve) -> None:
    process = serve(tokens=True)
    async with client(process, "boss") as boss, client(process, "other") as bob:
        await create(boss, "T1")
        await bob.post(f"{TASKS}/T1/claim", json={"ttl": 100})
        before = (await boss.get(f"{TASKS}/T1")).json()["leaseExpiresAt"]
        give_up = time.monotonic() + 40
        while (await boss.get(f"{TASKS}/T1")).json()["leaseExpiresAt"] == before:
            assert time.monotonic() < give_up
            await bob.get(TASKS)
            await asyncio.sleep(0.5)


def test_an_address_of_the_network_needs_tokens(environ: dict[str, str], tmp_path: Path) -> None:
    words = [sys.executable, str(PROGRAM), "serve", "--host", "0.0.0.0", "--port", "0"]
    done = subprocess.run(words, env=environ, cwd=tmp_path, text=True, capture_output=True)
    assert done.returncode == 2
    assert "mosaic-queue token NAME" in done.stderr


def test_a_token_is_shown_once_and_kept_as_a_digest(
    environ: dict[str, str], tmp_path: Path
) -> None:
    words = [sys.executable, str(PROGRAM), "token", "ci"]
    done = subprocess.run(words, env=environ, cwd=tmp_path, text=True, capture_output=True)
    made, _, lines = done.stdout.partition("\n")
    assert hashlib.sha256(made.encode()).hexdigest() in lines
    (tmp_path / "q.yaml").write_text(lines)
    (caller,) = mq.callers_from(mq.load_config(str(tmp_path / "q.yaml"), environ={}))
    assert (caller.name, caller.role, caller.agent) == ("ci", "agent", "ci")


# ---- what is no request of ours ----


BAD: list[tuple[str, str, dict[str, Any], int]] = [
    ("GET", TASKS, {"headers": {"host": "evil.example"}}, 403),
    ("GET", TASKS, {"headers": {"origin": "http://evil.example"}}, 403),
    ("GET", TASKS, {"headers": {"sec-fetch-site": "cross-site"}}, 403),
    ("POST", "/mcp", {"headers": {"host": "evil.example"}, "json": {}}, 403),
    ("PUT", TASKS, {"json": {}}, 405),
    ("GET", "/nowhere", {}, 404),
    ("GET", f"{TASKS}/..%2f..%2fetc", {}, 404),
    ("GET", f"{TASKS}/a b", {}, 400),
    ("GET", f"{TASKS}?limit=x", {}, 400),
    ("GET", TASKS, {"headers": {"accept": "text/html, image/png"}}, 406),
    ("DELETE", f"{TASKS}/T1", {"headers": {"if-match": "yes"}}, 400),
    ("GET", f"{TASKS}?nosuch=1", {}, 400),
    ("POST", TASKS, {"content": b"{", "headers": {"content-type": "application/json"}}, 400),
    ("POST", TASKS, {"content": b"\xff", "headers": {"content-type": "application/json"}}, 400),
    ("POST", TASKS, {"content": b"[" * 100_000,
                     "headers": {"content-type": "application/json"}}, 400),
    ("POST", TASKS, {"content": b"a=b", "headers": {"content-type": "text/plain"}}, 415),
    ("POST", TASKS, {"json": "text"}, 400),
    ("POST", TASKS, {"json": [[]]}, 400),
    ("POST", TASKS, {"json": {"taskId": "T1"}}, 400),
    ("POST", TASKS, {"json": {"taskId": "x" * 200, "mission": "m", "title": "t"}}, 400),
    ("POST", TASKS, {"content": b" " * (5 << 20),
                     "headers": {"content-type": "application/json"}}, 413),
]  # fmt: skip


async def test_bad_requests_are_problems(serve: Serve, server: Server) -> None:
    process = serve()
    before = key_space(server)
    async with client(process) as one:
        for method, path, how, status in BAD:
            answer = await one.request(method, path, **how)
            assert answer.status_code == status, (method, path, how, answer.text)
            assert answer.headers["content-type"] == "application/problem+json"
            assert answer.headers["x-content-type-options"] == "nosniff"
            if status == 405:
                assert answer.headers["allow"] == "GET, POST"
    assert key_space(server) == before


# ---- what is told of the server ----


async def test_metrics_ready_and_the_document(serve: Serve, db: redis.Redis) -> None:
    async with client(serve()) as one:
        await create(one, "T1")
        assert (await one.get("/readyz")).json()["ok"]
        db.config_set("maxmemory", 1)
        full = await one.get("/readyz")
        db.config_set("maxmemory", 0)
        assert (full.status_code, "memory is full" in full.text) == (503, True)
        text = (await one.get("/metrics")).text
        assert 'mosaic_queue_tasks{project="p",status="pending"} 1' in text
        assert 'mosaic_queue_call_seconds_count{operation="create",outcome="ok"} 1' in text
        document = (await one.get("/openapi.json")).json()
        for of in mq.served_operations():
            for method, path in mq.places_of(of):
                assert method.lower() in document["paths"][path], (of.name, method, path)


async def test_a_server_that_is_away_makes_it_not_ready(serve: Serve) -> None:
    """Whoever watches it is told what is wrong, not that it has a bug."""
    async with client(serve("--url", "redis://127.0.0.1:1")) as one:
        for place in ("/readyz", "/metrics"):
            answer = await one.get(place)
            assert (answer.status_code, answer.json()["code"]) == (503, "UNREACHABLE"), place
        assert (await one.get("/healthz")).json() == {"ok": True}


async def test_the_page_of_the_document_names_every_place(serve: Serve) -> None:
    async with client(serve()) as one:
        page = await one.get("/openapi")
        assert page.headers["content-type"].startswith("text/html")
        for path in (await one.get("/openapi.json")).json()["paths"]:
            assert f"<td>{path}</td>" in page.text


def test_over_tls(serve: Serve, tmp_path: Path) -> None:
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    words = "openssl req -x509 -newkey ed25519 -nodes -days 2 -subj /CN=localhost"
    more = ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(cert)]
    subprocess.run([*words.split(), *more], check=True, capture_output=True)
    process = serve("--tls-cert", str(cert), "--tls-key", str(key))
    assert process.url.startswith("https://")
    trusts = ssl.create_default_context(cafile=str(cert))
    assert httpx2.get(process.url + "/healthz", verify=trusts).json() == {"ok": True}
    with pytest.raises(httpx2.ConnectError):
        httpx2.get(process.url + "/healthz")


# ---- MCP ----


@pytest.mark.parametrize("mode", ["legacy", "2026-07-28", "auto"])
async def test_an_agent_does_a_task_over_http(serve: Serve, mode: str) -> None:
    process = serve()
    async with Client(process.url + "/mcp", mode=mode) as agent:
        new = {"project": "p", "mission": "m", "task": "T1", "title": "t"}
        assert not (await agent.call_tool("queue_create", new)).is_error
        claim = {"project": "p", "task": "T1", "agent": "a1"}
        task = json.loads((await agent.call_tool("queue_claim", claim)).content[0].text)
        assert (task["claimedBy"], task["claimTTL"]) == ("a1", 3600)
        assert not (await agent.call_tool("queue_complete", claim)).is_error
        refused = await agent.call_tool("queue_claim", claim)
        said = refused.content[0].text
        assert 'next: it is done: take another: queue_next {"project":"p"' in said


async def test_another_host_is_told_where_to_name_it(serve: Serve) -> None:
    async with client(serve()) as one:
        for header in ({"host": "evil.example"}, {"origin": "http://evil.example"}):
            told = (await one.get(TASKS, headers=header)).json()
            hint = "whoever runs this server can name the host under http.hosts"
            assert (told["code"], told["hint"]) == ("NOT_OWNER", hint)


async def test_without_tokens_who_acts_as_an_agent_names_it(serve: Serve) -> None:
    process = serve()
    async with Client(process.url + "/mcp", mode="legacy") as agent, client(process) as one:
        await create(one, "T1")
        refused = await agent.call_tool("queue_claim", {"task": "p/T1"})
        assert refused.is_error
        assert "INVALID: claim acts as an agent, and this call names none" in str(refused.content)
        assert "name yourself with the argument agent" in str(refused.content)
        await one.post(f"{TASKS}/T1/claim", json={"agent": "a1"})
        told = await one.post(f"{TASKS}/T1/complete", json={})
        assert (told.status_code, told.json()["code"]) == (400, "INVALID")
        freed = await one.post(f"{TASKS}/T1/release", json={"force": True})
        assert freed.json()["status"] == "pending"


async def test_over_http_the_calls_of_a_named_agent_renew(serve: Serve) -> None:
    process = serve()
    async with Client(process.url + "/mcp", mode="legacy") as agent, client(process) as one:
        said = " ".join(str(agent.instructions).split())
        assert "you need no heartbeats" not in said
        assert "call queue_heartbeat before leaseExpiresAt" in said
        await create(one, "T1")
        await agent.call_tool("queue_claim", {"task": "p/T1", "agent": "a1", "ttl": 100})
        before = (await one.get(f"{TASKS}/T1")).json()["leaseExpiresAt"]
        give_up = time.monotonic() + 40
        while (await one.get(f"{TASKS}/T1")).json()["leaseExpiresAt"] == before:
            assert time.monotonic() < give_up
            # One that it does not hold: the call itself renews nothing.
            await agent.call_tool("queue_start", {"task": "p/T2", "agent": "a1"})
            await asyncio.sleep(0.5)


def test_clients_get_an_entry_without_the_token(environ: dict[str, str], tmp_path: Path) -> None:
    for name in mq.CLIENTS:
        words = [str(PROGRAM), "mcp-config", name, "--http", "http://h:8377", "--json"]
        done = subprocess.run(
            [sys.executable, *words], env=environ | {"MOSAIC_QUEUE_TOKEN": "hunter2"},
            cwd=tmp_path, text=True, capture_output=True,
        )  # fmt: skip
        entry = json.loads(done.stdout)["entry"]
        assert entry["url"] == "http://h:8377/mcp"
        assert "command" not in entry
        assert "MOSAIC_QUEUE_TOKEN" in str(entry)
        assert "hunter2" not in done.stdout
    words = [str(PROGRAM), "mcp-config", "claude", "--http", "h:8377"]
    done = subprocess.run(
        [sys.executable, *words], env=environ, cwd=tmp_path, text=True, capture_output=True
    )
    assert (done.returncode, "http(s)://HOST:PORT" in done.stderr) == (2, True)


async def test_under_the_path_of_a_proxy(serve: Serve) -> None:
    """It takes its path away before it hands a request on."""
    process = serve("--root-path", "/q")
    async with client(process) as one:
        assert (await one.get("/healthz")).status_code == 200
        new = {"taskId": "T1", "mission": "m", "title": "t"}
        made = await one.post(TASKS, json=new)
        assert made.headers["location"] == f"/q{TASKS}/T1"
    async with Client(process.url + "/mcp") as agent:
        assert (await agent.list_tools()).tools


def test_signals_end_it_cleanly(serve: Serve) -> None:
    process = serve()
    process.process.send_signal(signal.SIGINT)
    _, err = process.process.communicate(timeout=20)
    assert (process.process.returncode, "Traceback" in err) == (0, False)
