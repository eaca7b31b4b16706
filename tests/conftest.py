"""What the tests share: real servers of their own, a queue on an empty one, and the shim.

The shim runs the shipped Lua text with `redis` replaced by a table of the same face, so that a
test can turn the clock, make the k-th call fail, and hold every script to its promise that no
refusal follows a write.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import hashlib
import os
import random
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any
from zlib import crc32

import pytest
import redis

sys.path.insert(0, str(Path(__file__).parent.parent))

import mosaic_queue as mq

# The command as it is installed: a script that imports the module, so that its bytecode is kept.
# Run as a file the module would be compiled at every start, 0.2 s each.
PROGRAM = Path(sys.executable).with_name("mosaic-queue")
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
FOLDER = str(Path(mq.__file__).parent)  # from where a program of a test imports the module

# An operation of this process has a minute: a machine that is busy elsewhere is no dead server.
mq.Queue.__init__.__kwdefaults__["deadline"] = 60


def pytest_xdist_auto_num_workers() -> int:
    """Two a core: many tests wait for a lease to end, or for a process that was killed."""
    return 2 * (os.cpu_count() or 1)


READS = """
TIME GET HGET HMGET HGETALL EXISTS ZCARD ZSCORE ZRANGE ZREVRANGE ZRANGEBYSCORE ZRANK ZREVRANK ZCOUNT
SCARD SMEMBERS SRANDMEMBER SISMEMBER LLEN MGET GETRANGE INFO XRANGE XREVRANGE XLEN PTTL TYPE
"""

SHIM = """
local real, calls, wrote = redis, 0, false
local reads = {%(reads)s}
local redis = {pcall = function(command, ...)
  if command == 'INFO' then return 'uptime_in_seconds:%(uptime)d' end
  return real.pcall(command, ...)
end}
redis.call = function(command, ...)
  calls = calls + 1
  if calls == %(fail_at)d then error('SHIM call ' .. calls .. ' ' .. command .. ' fails') end
  if not reads[command] then wrote = true end
  local reply = real.call(command, ...)
  if command == 'TIME' then return {%(time)s} end
  return reply
end
"""


class Shim:
    """Scripts with a clock that can be turned (`seconds`) or stands in a key of that name
    (`clock`), and a k-th call that fails (`fail_at`, 0: none).  `uptime` (s) is what INFO says to
    `reap`."""

    def __init__(self) -> None:
        self.seconds, self.fail_at, self.uptime = 0, 0, 100_000
        self.clock = ""
        self.shipped = mq.script

    def script(self, name: str) -> mq.Script:
        lua = self.shipped(name)
        first, _, rest = lua.text.partition("\n")
        values = {
            "reads": ", ".join(f"{name} = true" for name in READS.split()),
            "uptime": self.uptime,
            "fail_at": self.fail_at,
            "time": f"tostring(reply[1] + {self.seconds}), reply[2]",
        }
        if self.clock:
            values["time"] = f"real.call('GET', '{self.clock}'), '0'"
        told = "then return reply.refusal end"
        assert rest.count(told) == 1
        late = "then if wrote then error('SHIM refusal after a write') end "
        rest = rest.replace(told, late + "return reply.refusal end")
        text = first + SHIM % values + rest
        sha = hashlib.sha1(text.encode()).hexdigest()
        return dataclasses.replace(lua, text=text, sha=sha)


def redis_server() -> str | None:
    """A redis-server of 7.0 or newer on PATH."""
    path = shutil.which("redis-server")
    if not path:
        return None
    said = subprocess.run([path, "--version"], capture_output=True, text=True, check=True).stdout
    return path if int(said.split("v=")[1].split(".")[0]) >= 7 else None


BINARIES = {"valkey": mq.server_binary}
if redis_server():
    BINARIES["redis"] = redis_server  # type: ignore[assignment]


class Server:
    """A real server without persistence, on a Unix socket in a folder of its own."""

    def __init__(self, binary: str, *options: str) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="mq-test-"))
        self.socket = self.folder / "s"
        self.binary, self.options = binary, options
        self.url = f"unix://{self.socket}"
        self.start()

    def start(self) -> None:
        self.process = subprocess.Popen(
            [
                self.binary,
                "--port",
                "0",
                "--unixsocket",
                str(self.socket),
                "--save",
                "",
                "--dir",
                str(self.folder),
                "--logfile",
                str(self.folder / "log"),
                *self.options,
            ],
        )
        give_up = time.monotonic() + 60
        while True:
            try:
                self.client().ping()
                return
            except (redis.ConnectionError, redis.BusyLoadingError):
                assert time.monotonic() < give_up, (self.folder / "log").read_text()
                time.sleep(0.02)
            except redis.AuthenticationError:
                return

    def client(self, **options: Any) -> redis.Redis:
        of: dict[str, Any] = {"decode_responses": True, "socket_timeout": 60, **options}
        return redis.Redis(unix_socket_path=str(self.socket), **of)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def close(self) -> None:
        self.kill()
        shutil.rmtree(self.folder)


class Container(Server):
    """The same in a container: its socket lies in a folder that both sides see."""

    def start(self) -> None:
        from testcontainers.core.container import DockerContainer

        self.folder.chmod(0o777)
        words = ["--port", "0", "--unixsocket", "/shared/s", "--unixsocketperm", "777"]
        words += ["--save", "", "--dir", "/shared", "--logfile", "/shared/log", *self.options]
        self.container = DockerContainer(self.binary).with_volume_mapping(
            str(self.folder), "/shared", "rw"
        )
        self.container.with_command(" ".join(word or '""' for word in words)).start()
        give_up = time.monotonic() + 60
        while not self.socket.exists():
            assert time.monotonic() < give_up, self.container.get_logs()
            time.sleep(0.05)

    def kill(self) -> None:
        self.container.get_wrapped_container().kill()
        self.container.stop()


def container_engine() -> bool:
    """Whether a container engine answers here."""
    if not (os.environ.get("DOCKER_HOST") or Path("/var/run/docker.sock").exists()):
        return False
    from testcontainers.core.docker_client import DockerClient

    try:
        return bool(DockerClient().client.ping())
    except Exception:  # whatever it is: then the servers are processes of this host alone
        return False


OLDEST = "valkey/valkey:7.2"  # that is taken, tested where a container engine answers
ENGINES: dict[str, Callable[[], Server]] = {
    name: functools.partial(lambda binary: Server(str(binary())), binary)
    for name, binary in BINARIES.items()
}
if container_engine():
    ENGINES[OLDEST] = functools.partial(Container, OLDEST)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Valkey runs all scenarios of the fault tests, others one in eight: the order of effects,
    which they test, is the scripts' own."""

    def thinned(item: pytest.Item) -> bool:
        values = getattr(getattr(item, "callspec", None), "params", {})
        name = getattr(values.get("stage"), "name", "")
        return values.get("server") not in (None, "valkey") and crc32(name.encode()) % 8 != 0

    items[:] = [item for item in items if not thinned(item)]


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="session", params=sorted(ENGINES, reverse=True))
def server(request: pytest.FixtureRequest) -> Iterator[Server]:
    """Valkey, Redis where one is on PATH, and the oldest Valkey where a container engine answers:
    every test that asks for it runs on each."""
    running = ENGINES[request.param]()
    yield running
    running.close()


def one_engine() -> Any:
    """The fixture `server` of a module: what is tested there knows of no engines."""

    @pytest.fixture(scope="module")
    def server() -> Iterator[Server]:
        running = Server(str(BINARIES["valkey"]()))
        yield running
        running.close()

    return server


@pytest.fixture
def db(server: Server) -> Iterator[redis.Redis]:
    """A plain client on the emptied server."""
    with server.client() as client:
        client.flushall()
        yield client


@pytest.fixture
def config(server: Server, db: redis.Redis) -> mq.Config:
    """The configuration of a queue on the emptied server, with default project `p`."""
    return mq.Config(environ={}).set("redis.url", server.url, "test").set("project", "p", "test")


SECRETS = {"boss": "b" * 40, "ci": "c" * 40, "eye": "e" * 40, "other": "o" * 40}
TOKENS = f"""
http:
  tokens:
    - {{name: boss, role: operator, token: {SECRETS["boss"]}}}
    - {{name: ci, role: agent, agent: ci-*, projects: [p], token: {SECRETS["ci"]}}}
    - {{name: eye, role: read, projects: [p], token: {SECRETS["eye"]}}}
    - name: other
      role: agent
      agent: bob
      sha256: {hashlib.sha256(SECRETS["other"].encode()).hexdigest()}
"""


class Process:
    """A process of `serve`, and where it listens."""

    def __init__(self, environ: dict[str, str], folder: Path, *words: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, str(PROGRAM), "serve", "--port", "0", *words],
            env=environ, cwd=folder, text=True, stderr=subprocess.PIPE,
        )  # fmt: skip
        assert self.process.stderr
        said = self.process.stderr.readline()
        found = re.search(r"https?://\S+", said)
        assert found, said + self.process.stderr.read()
        self.url = found[0]

    def stop(self) -> tuple[int, float]:
        began = time.monotonic()
        self.process.terminate()
        self.process.communicate(timeout=30)
        return self.process.returncode, time.monotonic() - began


@pytest.fixture
def environ(server: Server, db: redis.Redis, tmp_path: Path) -> dict[str, str]:
    """The environment of a process with a queue on the emptied server, and nothing else."""
    return {
        "PATH": os.environ["PATH"],
        "HOME": str(tmp_path),
        "XDG_DATA_HOME": str(tmp_path),
        "MOSAIC_VALKEY_URL": server.url,
    }


Serve = Callable[..., Process]


@pytest.fixture
def serve(environ: dict[str, str], tmp_path: Path) -> Iterator[Serve]:
    started: list[Process] = []

    def start(*words: str, tokens: bool = False) -> Process:
        if tokens:
            (tmp_path / "queue.yaml").write_text(TOKENS)
            words = (*words, "--config", str(tmp_path / "queue.yaml"))
        started.append(Process(environ, tmp_path, *words))
        return started[-1]

    yield start
    for one in started:
        one.process.kill()
        one.process.communicate()


@pytest.fixture
async def queue(config: mq.Config) -> AsyncIterator[mq.Queue]:
    async with mq.Queue(config) as opened:
        yield opened


@pytest.fixture
def shim(monkeypatch: pytest.MonkeyPatch) -> Shim:
    """From here on every script of this process runs behind the shim."""
    made = Shim()
    monkeypatch.setattr(mq, "script", made.script)
    return made


async def until(true: Callable[[], Any], limit: float = 60) -> Any:
    """Wait until a condition holds, and return what it says; fails when it does not in time."""
    give_up = time.monotonic() + limit
    while not (found := await true() if asyncio.iscoroutinefunction(true) else true()):
        assert time.monotonic() < give_up, "it did not come true"
        await asyncio.sleep(0.02)
    return found


@contextlib.asynccontextmanager
async def at_work(work: Coroutine[Any, Any, None]) -> AsyncIterator[None]:
    """Something that goes on until it is cancelled here; it may not end before."""
    task = asyncio.create_task(work)
    try:
        yield
        assert not task.done(), task
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


def ask(server: Server, method: str, *args: Any, **named: Any) -> Any:
    """One operation of a queue in this process."""

    async def once() -> Any:
        config = mq.Config(environ={}).set("redis.url", server.url, "t").set("project", "p", "t")
        async with mq.Queue(config) as queue:
            return await getattr(queue, method)(*args, **named)

    return asyncio.run(once())


def free_port() -> int:
    """A port that is free as that of its cluster bus (+10000) is, and neither is among those that
    the kernel hands out to whoever asks meanwhile."""
    while True:
        port = random.randrange(10_240, 22_768)
        with socket.socket() as sock, socket.socket() as bus, contextlib.suppress(OSError):
            sock.bind(("127.0.0.1", port))
            bus.bind(("127.0.0.1", port + 10_000))
            return port


def key_space(server: Server) -> dict[bytes, Any]:
    """Every key and its value, as bytes."""
    with server.client(decode_responses=False) as raw:
        readers = {
            b"string": raw.get,
            b"hash": raw.hgetall,
            b"set": raw.smembers,
            b"zset": lambda key: raw.zrange(key, 0, -1, withscores=True),
            b"list": lambda key: raw.lrange(key, 0, -1),
            b"stream": raw.xrange,
        }
        return {key: readers[raw.type(key)](key) for key in sorted(raw.scan_iter(count=1000))}
