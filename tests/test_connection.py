"""The way to Valkey: what a URL says, one connection for all calls, Sentinels, servers that lie."""

from __future__ import annotations

import asyncio
import contextlib
import resource
import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
import redis
from conftest import BINARIES, PROGRAM, Server, free_port, one_engine, until

import mosaic_queue as mq

pytestmark = pytest.mark.anyio
server = one_engine()


def queue_at(url: str, deadline: float = 60) -> mq.Queue:
    config = mq.Config(environ={}).set("redis.url", url, "test").set("project", "p", "test")
    return mq.Queue(config, deadline=deadline)


# ---- URLs ----


@pytest.mark.parametrize(
    ("url", "place", "rest"),
    [
        ("redis://", ("", "localhost", 6379), {}),
        ("valkey://h:1/3", ("", "h", 1), {"db": 3}),
        ("redis://:p%40ss@h", ("", "h", 6379), {"password": "p@ss"}),
        ("redis://bob:a:b@[::1]:7/0?db=2", ("", "::1", 7), {"user": "bob", "db": 2}),
        ("redis://h?username=bob&password=x%26y", ("", "h", 6379), {"password": "x&y"}),
        ("unix:///run/a@b/s?db=1", ("/run/a@b/s", "", 0), {"db": 1}),
        ("unix://bob@/run/s?password=x", ("/run/s", "", 0), {"user": "bob", "password": "x"}),
        ("redis+sentinel://bob:x@a:1,b:2/main", ("", "a", 1), {"service": "main"}),
        ("redis+cluster://a:1,b:2", ("", "a", 1), {}),
    ],
)
def test_what_a_url_says(url: str, place: tuple[str, str, int], rest: dict[str, Any]) -> None:
    address = mq.parse_url(url)
    assert address.places[0] == place
    for name, value in rest.items():
        assert getattr(address, name) == value


@pytest.mark.parametrize(
    "url",
    [
        "redis://h?sslmode=off", "redis://h?socket_timeout=3", "redis://h?hunter2",
        "redis://h?pass%77ord=hunter2", "redis://h/x", "redis://h:0", "redis://a,b", "unix://",
        "unix://host/path", "redis://h?db=-1", "redis+sentinel://a/main", "redis://h?ssl_keyfile=x",
        "rediss://h?ssl_ca_certs=/no/such/file",
    ],
)  # fmt: skip
def test_a_url_that_cannot_be_understood(url: str) -> None:
    with pytest.raises(mq.Refused) as refused:
        mq.parse_url(url)
    assert refused.value.code == "INVALID"
    assert "accepted: " in refused.value.message
    assert "hunter2" not in refused.value.message


# ---- one connection ----


async def test_calls_share_one_connection_and_follow_each_other(
    server: Server, db: redis.Redis
) -> None:
    """50 calls at once are few writes; each gets its own answer."""
    async with queue_at(server.url) as queue:
        rows: list[Any] = [{"mission": "m", "taskId": f"T{i}", "title": str(i)} for i in range(50)]
        await queue.create_all(rows, project="p")
        before = db.info("stats")["total_reads_processed"]
        clients = db.info("clients")["connected_clients"]
        tasks = await asyncio.gather(*(queue.get(f"T{i}") for i in range(50)))
        assert [task["title"] for task in tasks] == [str(i) for i in range(50)]
        assert db.info("stats")["total_reads_processed"] - before <= 25
        assert db.info("clients")["connected_clients"] == clients


async def test_a_caller_that_goes_takes_no_answer_of_another(
    server: Server, db: redis.Redis
) -> None:
    async with queue_at(server.url) as queue:
        await queue.create("p", "m", "T1", title="one")
        await queue.create("p", "m", "T2", title="two")
        for _ in range(20):
            first = asyncio.create_task(queue.get("T1"))
            second = asyncio.create_task(queue.get("T2"))
            await asyncio.sleep(0)
            first.cancel()
            assert (await second)["title"] == "two"
            with contextlib.suppress(asyncio.CancelledError):
                await first


async def test_many_at_once_when_the_connection_is_lost(server: Server, db: redis.Redis) -> None:
    """All of them are sent again over a new one."""
    async with queue_at(server.url) as queue:
        rows: list[Any] = [{"mission": "m", "taskId": f"T{i}", "title": "t"} for i in range(50)]
        await queue.create_all(rows, project="p")
        for i in range(0, 50, 10):
            calls = [
                asyncio.create_task(queue.claim(f"T{i + n}", f"a{n}")) for n in range(10)
            ]  # fmt: skip
            await asyncio.sleep(0)
            db.client_kill_filter(_type="normal", skipme=True)
            claimed = await asyncio.gather(*calls)
            assert [task["claimedBy"] for task in claimed] == [f"a{n}" for n in range(10)]
        events = db.xlen("mosaic:queue:project:{p}:events")
        assert events == 100


async def test_what_a_queue_has_begun_ends_with_it(server: Server, db: redis.Redis) -> None:
    """A listener for those who have gone, a call that blocks, a listener to what is published."""
    queue = queue_at(server.url)
    others = asyncio.all_tasks()
    queue.link.ears = mq.Ears(queue.link)
    await queue.create("p", "m", "T1", title="t", delay=3600)
    waiting = asyncio.create_task(queue.next("a", wait=30))
    told = asyncio.create_task(anext(aiter(queue.link.messages("mosaic:*"))))
    assert await told == ""
    while not db.info("clients")["blocked_clients"]:
        await asyncio.sleep(0.01)
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    await queue.close()
    assert asyncio.all_tasks() == others
    assert len(db.client_list()) == 1


async def test_a_password_and_a_database(server: Server, db: redis.Redis) -> None:
    db.config_set("requirepass", "se:s@me")
    try:
        async with queue_at(f"{server.url}?password=se:s@me&db=3") as queue:
            await queue.create("p", "m", "T1", title="t")
        with server.client(db=3, password="se:s@me") as third:
            assert third.exists("mosaic:queue:project:{p}:task:T1")
    finally:
        server.client(password="se:s@me").config_set("requirepass", "")


# ---- TLS: a proxy with a certificate of its own in front of a server that has none ----


@pytest.fixture
async def tls(server: Server, tmp_path: Path) -> AsyncIterator[tuple[int, Path]]:
    """The port of the proxy, and its certificate."""
    certificate, key = tmp_path / "c.pem", tmp_path / "k.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj",
         "/CN=localhost", "-addext", "subjectAltName=DNS:localhost", "-out", certificate,
         "-keyout", key],
        check=True, capture_output=True,
    )  # fmt: skip
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificate, key)

    async def pump(source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await source.read(1 << 16):
                target.write(data)
            target.close()

    async def serve(client: asyncio.StreamReader, back: asyncio.StreamWriter) -> None:
        replies, out = await asyncio.open_unix_connection(str(server.socket))
        await asyncio.gather(pump(client, out), pump(replies, back))

    proxy = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=context)
    yield proxy.sockets[0].getsockname()[1], certificate
    proxy.close()


async def test_tls(tls: tuple[int, Path], db: redis.Redis) -> None:
    port, certificate = tls
    async with queue_at(f"rediss://localhost:{port}?ssl_ca_certs={certificate}") as queue:
        assert (await queue.create("p", "m", "T1", title="t"))["status"] == "pending"
    async with queue_at(f"valkeys://localhost:{port}?ssl_cert_reqs=none") as queue:
        assert (await queue.get("T1"))["status"] == "pending"
    async with queue_at(f"rediss://localhost:{port}", deadline=1) as queue:
        with pytest.raises(mq.Refused, match="certificate") as refused:
            await queue.get("T1")
        assert refused.value.code == "UNREACHABLE"


# ---- Sentinels, clusters ----


async def test_sentinels_name_the_primary(tmp_path: Path) -> None:
    """And the next one, when the first has become a replica."""
    binary = str(BINARIES["valkey"]())
    ports = [free_port() for _ in range(3)]
    with contextlib.ExitStack() as stack:
        first, second = (Server(binary, "--port", str(port)) for port in ports[:2])
        stack.callback(first.close)
        stack.callback(second.close)
        (tmp_path / "sentinel.conf").write_text(
            f"port {ports[2]}\nsentinel monitor main 127.0.0.1 {ports[0]} 1\n"
        )
        process = subprocess.Popen(
            [binary, str(tmp_path / "sentinel.conf"), "--sentinel"], stdout=subprocess.DEVNULL
        )
        stack.callback(process.wait)
        stack.callback(process.kill)
        sentinel = redis.Redis(port=ports[2])
        stack.callback(sentinel.close)

        def ready() -> bool:
            with contextlib.suppress(redis.ConnectionError):
                return bool(sentinel.ping())
            return False

        await until(ready)
        places = f"127.0.0.1:{free_port()},127.0.0.1:{ports[2]}"
        async with queue_at(f"redis+sentinel://{places}/main") as queue:
            await queue.create("p", "m", "T1", title="t")
            assert first.client().exists("mosaic:queue:project:{p}:task:T1")
            second.client().replicaof("127.0.0.1", ports[0])
            await until(lambda: second.client().exists("mosaic:queue:project:{p}:task:T1"))
            second.client().replicaof("NO", "ONE")
            first.client().replicaof("127.0.0.1", ports[1])
            sentinel.execute_command("SENTINEL", "REMOVE", "main")
            sentinel.execute_command("SENTINEL", "MONITOR", "main", "127.0.0.1", ports[1], 1)
            assert (await queue.claim("T1", "alice"))["claimedBy"] == "alice"
            assert second.client().hget("mosaic:queue:project:{p}:task:T1", "claimedBy") == "alice"
        async with queue_at(f"redis+sentinel://{places}/other", deadline=1) as queue:
            with pytest.raises(mq.Refused, match="know no other") as refused:
                await queue.get("T1")
            assert refused.value.code == "UNREACHABLE"


@pytest.mark.parametrize("url", ["redis+cluster://127.0.0.1:%d", "redis+sentinel://127.0.0.1:%d/m"])
async def test_a_cluster_that_cannot_be_reached(url: str) -> None:
    async with queue_at(url % free_port(), deadline=0.5) as queue:
        with pytest.raises(mq.Refused, match="127") as refused:
            await queue.get("T1")
    assert (refused.value.code, refused.value.hint != "") == ("UNREACHABLE", True)


async def test_a_server_that_is_no_cluster(server: Server, db: redis.Redis) -> None:
    port = free_port()
    plain = Server(str(BINARIES["valkey"]()), "--port", str(port))
    try:
        async with queue_at(f"redis+cluster://127.0.0.1:{port}", deadline=0.5) as queue:
            with pytest.raises(mq.Refused, match="cluster support disabled") as refused:
                await queue.get("T1")
        assert refused.value.code == "UNFIT"
    finally:
        plain.close()


# ---- servers that lie ----


class Liar:
    """A socket that answers HELLO, and then everything with the same bytes, for ever if need be."""

    def __init__(self, folder: Path) -> None:
        self.path, self.answer, self.endless = folder / "liar", b"", b""
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(str(self.path))
        self.listener.listen(64)
        threading.Thread(target=self.accept, daemon=True).start()

    def accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self.listener.accept()
                threading.Thread(target=self.serve, args=(client,), daemon=True).start()

    def serve(self, client: socket.socket) -> None:
        with contextlib.suppress(OSError), client:
            while data := client.recv(1 << 16):
                client.sendall(b"+OK\r\n" if b"HELLO" in data else self.answer)
                while self.endless and b"HELLO" not in data:
                    client.sendall(self.endless)


@pytest.fixture
def liar(tmp_path: Path) -> Iterator[Liar]:
    made = Liar(tmp_path)
    yield made
    made.endless = b""
    made.listener.close()


LIES = {
    "another protocol": (b"HTTP/1.1 400 Bad Request\r\n\r\n", b""),
    "an endless bulk": (b"$2147483647\r\n", b"x" * (1 << 20)),
    # hiredis makes room for all that are announced: ten times as many take it 17 s of one core.
    "an endless array": (b"*214748364\r\n", b"*1\r\n" * 65536),
    "brackets": (b"*1\r\n" * 200_000, b""),
    "a push that nobody asked for": (b">2\r\n+message\r\n+x\r\n", b""),
    "half an answer": (b"$100\r\nabc", b""),
    "silence": (b"", b""),
}


@pytest.mark.parametrize("lie", LIES)
async def test_a_server_that_lies_is_unreachable(liar: Liar, lie: str) -> None:
    """In the time that a call has, and in bounded memory."""
    liar.answer, liar.endless = LIES[lie]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    async with queue_at(f"unix://{liar.path}", deadline=1) as queue:
        with pytest.raises(mq.Refused) as refused:
            await queue.get("p/T1")
    assert refused.value.code == "UNREACHABLE"
    assert refused.value.message.isprintable()
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown * (1 if sys.platform == "darwin" else 1024) < 3 * mq.MOST


def test_the_command_line_imports_no_client_of_redis(server: Server, db: redis.Redis) -> None:
    program = (
        "import sys, mosaic_queue as mq; mq.main(sys.argv[1:]);"
        " print(*sorted({'redis', 'yaml', 'anyio', 'pydantic'} & set(sys.modules)))"
    )
    python = PROGRAM.with_name("python")
    for words in (["status"], ["create", "p", "m", "T1", "--title", "t"], ["claim", "p/T1"]):
        done = subprocess.run(
            [python, "-c", program, *words, "--url", server.url], capture_output=True, text=True,
            cwd="/", check=True,
        )  # fmt: skip
        assert done.stdout.splitlines()[-1] == ""
