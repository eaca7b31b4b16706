"""What makes a client, a session or a shell know the program: entries in the files of MCP
clients, the text at the start of a session, completion, and the screen of a supervisor.

Whether the real clients take the entries is shown by `tests/clients.py`.
"""

from __future__ import annotations

import fcntl
import json
import os
import plistlib
import pty
import select
import stat
import struct
import subprocess
import termios
import time
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import redis
from conftest import PROGRAM, Server, one_engine

import mosaic_queue as mq

OWN = {  # where each client reads its servers, and under which key
    "claude": (".claude.json", "mcpServers"),
    "codex": (".codex/config.toml", "mcp_servers"),
    "gemini": (".gemini/settings.json", "mcpServers"),
    "opencode": (".config/opencode/opencode.json", "mcp"),
}


server = one_engine()


@pytest.fixture
def environ(server: Server, db: redis.Redis, tmp_path: Path) -> dict[str, str]:
    return {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "MOSAIC_VALKEY_URL": server.url}


Tell = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def tell(environ: dict[str, str], tmp_path: Path) -> Tell:
    """Runs the program in a process of its own."""

    def run(*words: str, **more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(PROGRAM), *words], env=environ | more, cwd=tmp_path, text=True, timeout=60,
            capture_output=True, check=False,
        )  # fmt: skip

    return run


def tree_of(path: Path) -> dict[str, Any]:
    """What a client reads."""
    return (
        tomllib.loads(path.read_text()) if path.suffix == ".toml" else json.loads(path.read_text())
    )


# ---- entries in the files of clients ----


@pytest.mark.parametrize("client", OWN)
def test_an_entry_is_written_where_the_client_reads_it(
    tell: Tell, tmp_path: Path, server: Server, client: str
) -> None:
    done = tell("mcp-config", client, "--write", "--project", "web", "--agent", "al")
    assert done.returncode == 0, done.stderr
    name, key = OWN[client]
    path = tmp_path / name
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    entry = tree_of(path)[key]["mosaic"]
    words = ["mcp", "--project", "web", "--agent", "al"]
    if client == "opencode":
        assert entry["command"] == [str(PROGRAM), *words]
    else:
        assert [entry["command"], *entry["args"]] == [str(PROGRAM), *words]
    # Which queue it is must not depend on what the client hands on.
    environ = entry["environment" if client == "opencode" else "env"]
    assert environ == {"MOSAIC_VALKEY_URL": server.url}
    again = tell("mcp-config", client, "--write", "--project", "web", "--agent", "al")
    assert (again.returncode, again.stdout.strip()) == (0, "")
    assert "unchanged" in again.stderr
    assert [one.name for one in path.parent.iterdir() if ".bak" in one.name] == []


@pytest.mark.parametrize("client", [*OWN, "generic"])
def test_without_write_it_is_printed_and_nothing_is_touched(
    tell: Tell, tmp_path: Path, client: str
) -> None:
    done = tell("mcp-config", client)
    assert done.returncode == 0
    read = tomllib.loads if client == "codex" else json.loads
    key = OWN.get(client, ("", "mcpServers"))[1]
    assert "mosaic" in read(done.stdout)[key]
    assert list(tmp_path.iterdir()) == []


FILES = {
    ".claude.json": '{\n    "numStartups": 7,\n    "mcpServers": {"other": {"command": "x"}},\n'
    '    "projects": {"/a b": {"é": [1, 2.50, null]}}\n}\n',
    ".codex/config.toml": '# mine\nmodel = "gpt-5" # why\n\n[mcp_servers.other]\ncommand = "x"\n\n'
    '[mcp_servers.mosaic]\ncommand = "old"\nargs = []\nstartup_timeout_sec = 3\n\n'
    '[projects."/a b"]\ntrust_level = "trusted"\n',
    ".gemini/settings.json": '{"security": {"folderTrust": {"enabled": false}}}',
    ".config/opencode/opencode.json": '{\n\t"$schema": "https://opencode.ai/config.json",\n'
    '\t"theme": "x"\n}',
}


@pytest.mark.parametrize("client", OWN)
def test_everything_else_in_the_file_stays(tell: Tell, tmp_path: Path, client: str) -> None:
    name, key = OWN[client]
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(FILES[name])
    path.chmod(0o640)
    before = tree_of(path)
    shown = tell("mcp-config", client, "--write", "--dry-run")
    assert shown.returncode == 0
    assert "+" in shown.stdout
    assert path.read_text() == FILES[name]
    assert tell("mcp-config", client, "--write").returncode == 0
    after = tree_of(path)
    after[key].pop("mosaic")
    before.setdefault(key, {}).pop("mosaic", None)
    assert after == before
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    if client == "codex":
        assert path.read_text().startswith('# mine\nmodel = "gpt-5" # why\n')
    (backup,) = (one for one in path.parent.iterdir() if ".bak" in one.name)
    assert backup.read_text() == FILES[name]
    assert stat.S_IMODE(backup.stat().st_mode) == 0o600


def test_a_link_is_followed(tell: Tell, tmp_path: Path) -> None:
    real = tmp_path / "dotfiles.json"
    real.write_text("{}")
    link = tmp_path / ".claude.json"
    link.symlink_to(real)
    assert tell("mcp-config", "claude", "--write").returncode == 0
    assert link.is_symlink()
    assert "mosaic" in json.loads(real.read_text())["mcpServers"]


@pytest.mark.parametrize(
    ("client", "content", "said"),
    [
        ("claude", "{ // mine\n}", "is not JSON without comments"),
        ("claude", "[]", "with an object mcpServers"),
        ("claude", '{"mcpServers": 3}', "with an object mcpServers"),
        ("claude", '{"mcpServers": null}', "with an object mcpServers"),
        ("claude", '{"a": ', "is not JSON"),
        ("codex", "a = = 1", "is not TOML"),
        ("codex", "mcp_servers = 3", "with an object mcp_servers"),
    ],
)
def test_a_file_that_cannot_be_merged_is_left_alone(
    tell: Tell, tmp_path: Path, client: str, content: str, said: str
) -> None:
    path = tmp_path / OWN[client][0]
    path.parent.mkdir(exist_ok=True)
    path.write_text(content)
    done = tell("mcp-config", client, "--write")
    assert done.returncode == 2
    assert said in done.stderr
    assert f"hint: mosaic-queue mcp-config {client} prints" in done.stderr
    assert path.read_text() == content
    assert [one.name for one in path.parent.iterdir()] == [path.name]


def test_a_file_that_is_not_utf_8_is_left_alone(tell: Tell, tmp_path: Path) -> None:
    (tmp_path / ".claude.json").write_bytes(b'{"a": "\xff"}')
    done = tell("mcp-config", "claude", "--write")
    assert done.returncode == 2
    assert "is not UTF-8" in done.stderr


def test_no_password_reaches_a_clients_file(tell: Tell, tmp_path: Path) -> None:
    url = "redis://al:hunter2@localhost:1"
    done = tell("mcp-config", "claude", "--write", MOSAIC_VALKEY_URL=url)
    assert done.returncode == 2
    assert "hunter2" not in done.stdout + done.stderr
    assert "the URL has a password" in done.stderr
    assert not (tmp_path / ".claude.json").exists()
    # In the configuration it is the client's server that reads it.
    (tmp_path / "queue.yaml").write_text(f"redis:\n  url: {url}\n")
    config = str(tmp_path / "queue.yaml")
    done = tell("mcp-config", "claude", "--config", config, MOSAIC_VALKEY_URL="")
    assert done.returncode == 0, done.stderr
    assert "hunter2" not in done.stdout
    assert json.loads(done.stdout)["mcpServers"]["mosaic"]["args"][-2:] == ["--config", config]


def test_codex_is_told_which_variables_to_hand_on(tell: Tell, tmp_path: Path) -> None:
    (tmp_path / "queue.yaml").write_text("redis:\n  url: redis://${QUEUE_HOST}:6379\n")
    config = str(tmp_path / "queue.yaml")
    more = {"MOSAIC_VALKEY_URL": "", "QUEUE_HOST": "h"}
    done = tell("mcp-config", "codex", "--config", config, **more)
    assert tomllib.loads(done.stdout)["mcp_servers"]["mosaic"]["env_vars"] == ["QUEUE_HOST"]


def test_a_generic_client_needs_a_file(tell: Tell, tmp_path: Path) -> None:
    assert "need --file" in tell("mcp-config", "generic", "--write").stderr
    for name, key in ((".cursor/mcp.json", "mcpServers"), (".vscode/mcp.json", "servers")):
        assert tell("mcp-config", "generic", "--write", "--file", name).returncode == 0
        assert "mosaic" in json.loads((tmp_path / name).read_text())[key]
    assert tell("mcp-config", "emacs").returncode == 2


def test_the_answer_for_programs(tell: Tell, tmp_path: Path) -> None:
    told = json.loads(tell("mcp-config", "claude", "--write", "--json").stdout)
    assert (told["v"], told["written"], told["file"]) == (1, True, str(tmp_path / ".claude.json"))
    assert "mosaic" in told["entry"]["command"]


# ---- the start of a session ----


def test_prime_says_what_is_held_what_is_ready_and_the_loop(tell: Tell) -> None:
    for name in ("T1", "T2"):
        tell("create", "web", "launch", name, "--title", f"do {name}")
    tell("claim", "T1", "--agent", "al")
    said = tell("prime", "--agent", "al").stdout
    assert "Task queue of project web: 1 pending, 1 claimed." in said
    assert "You are al and hold 1:\n- web/T1 claimed: do T1\n" in said
    assert "- web/T2 medium: do T2\n" in said
    assert "queue_next" in said
    assert len(said) < 1500
    by_session = tell("prime", CLAUDE_CODE_SESSION_ID="al").stdout
    assert by_session == said
    assert "You are" not in tell("prime").stdout


def test_prime_on_an_empty_queue_and_on_a_dead_one(tell: Tell) -> None:
    assert "The loop" in tell("prime").stdout
    done = tell("prime", MOSAIC_VALKEY_URL="redis://127.0.0.1:1")
    assert (done.returncode, done.stdout) == (6, "")


# ---- completion ----


def completions(tell: Tell, line: str, **more: str) -> list[str]:
    """What a shell offers for a line."""
    given = {"_ARGCOMPLETE": "1", "COMP_LINE": line, "COMP_POINT": str(len(line))}
    given |= {"_ARGCOMPLETE_SHELL": "bash", "_ARGCOMPLETE_STDOUT_FILENAME": "/dev/stdout"}
    return [word.strip() for word in tell(**given, **more).stdout.split("\v") if word]


def test_commands_words_and_ids_are_completed(tell: Tell) -> None:
    tell("create", "web", "launch", "T1", "--title", "a")
    tell("create", "api", "launch", "U1", "--title", "a")
    assert {"claim", "create", "complete"} <= set(completions(tell, "mosaic-queue c"))
    assert completions(tell, "mosaic-queue show T") == ["T1"]
    assert set(completions(tell, "mosaic-queue show ")) >= {"T1", "U1"}
    assert completions(tell, "mosaic-queue list --project w") == ["web"]
    assert completions(tell, "mosaic-queue list --status f") == ["failed"]
    assert completions(tell, "mosaic-queue show web/") == ["web/T1"]
    assert completions(tell, "mosaic-queue show --project api U") == ["U1"]
    assert completions(tell, "mosaic-queue list --project web --lane p") == ["planning"]
    assert completions(tell, "mosaic-queue show web ") == ["T1"]
    assert completions(tell, "mosaic-queue --project api claim U") == ["U1"]
    assert completions(tell, "mosaic-queue next --lane c") == ["coding"]
    tell("claim", "web/T1", "--agent", "alice")
    assert completions(tell, "mosaic-queue list --agent a") == ["alice"]
    dead = {"MOSAIC_VALKEY_URL": "redis://127.0.0.1:1"}
    assert completions(tell, "mosaic-queue show T", **dead) == []


def test_completion_starts_no_server(tell: Tell, tmp_path: Path) -> None:
    assert completions(tell, "mosaic-queue show T", MOSAIC_VALKEY_URL="") == []
    assert list(tmp_path.iterdir()) == []


def test_bash_reads_what_completion_prints(
    tell: Tell, environ: dict[str, str], tmp_path: Path
) -> None:
    """The whole way: a bash that evaluates it and asks for the words of a line."""
    tell("create", "web", "launch", "T1", "--title", "a")
    folder = tmp_path / "bin"
    folder.mkdir()
    program = folder / "mosaic-queue"
    program.write_text(f'#!/bin/sh\nexec {PROGRAM} "$@"\n')
    program.chmod(0o755)
    script = (
        'eval "$(mosaic-queue completion bash)"; COMP_WORDS=(mosaic-queue show T); COMP_CWORD=2; '
        'COMP_LINE="mosaic-queue show T"; COMP_POINT=${#COMP_LINE}; COMP_TYPE=9; '
        '_python_argcomplete mosaic-queue; echo "${COMPREPLY[@]}"'
    )
    path = f"{folder}:{environ['PATH']}"
    done = subprocess.run(
        ["bash", "-c", script], env=environ | {"PATH": path}, text=True, capture_output=True,
        timeout=60, check=False,
    )  # fmt: skip
    assert done.stdout.split() == ["T1"], done.stderr


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_every_shell_has_its_text(tell: Tell, shell: str) -> None:
    done = tell("completion", shell)
    assert done.returncode == 0
    assert "mosaic-queue" in done.stdout
    assert tell("completion", "tcsh").returncode == 2


# ---- status --watch ----


class Terminal:
    """A program on a terminal of its own."""

    def __init__(self, environ: dict[str, str], *words: str, rows: int = 24, columns: int = 60):
        self.parent, child = pty.openpty()
        fcntl.ioctl(child, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
        self.settings = termios.tcgetattr(child)
        self.process = subprocess.Popen(
            [str(PROGRAM), *words], env=environ | {"TERM": "xterm"}, stdin=child, stdout=child,
            stderr=child, start_new_session=True,
        )  # fmt: skip
        self.child, self.seen = child, b""

    def until(self, text: bytes, limit: float = 60) -> None:
        """Read until the text has appeared since the last call."""
        give_up = time.monotonic() + limit
        while text not in self.seen:
            assert time.monotonic() < give_up, self.seen
            if select.select([self.parent], [], [], 0.2)[0]:
                self.seen += os.read(self.parent, 65536)
        self.seen = self.seen.partition(text)[2]

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.parent)
        os.close(self.child)


@pytest.fixture
def terminal(environ: dict[str, str]) -> Iterator[Callable[..., Terminal]]:
    opened: list[Terminal] = []

    def start(*words: str, **more: int) -> Terminal:
        opened.append(Terminal(environ, *words, **more))
        return opened[-1]

    yield start
    for one in opened:
        one.close()


def test_watch_redraws_and_ends_on_q(tell: Tell, terminal: Callable[..., Terminal]) -> None:
    tell("create", "web", "launch", "T1", "--title", "a")
    screen = terminal("status", "--watch")
    screen.until(b"\x1b[?1049h")
    screen.until(b"project web: 1 pending")
    tell("claim", "T1", "--agent", "al")
    screen.until(b"project web: 1 claimed")
    os.write(screen.parent, b"q")
    screen.until(b"\x1b[?1049l")
    assert screen.process.wait(60) == 0
    assert termios.tcgetattr(screen.child) == screen.settings


def test_watch_fits_the_screen(tell: Tell, terminal: Callable[..., Terminal]) -> None:
    for n in range(6):
        tell("create", f"p{n}", "launch", "T1", "--title", "x" * 200)
    screen = terminal("status", "--watch", rows=5, columns=30)
    screen.until(b"\x1b[?2026h\x1b[H")
    screen.until(b"\x1b[J", 30)
    os.write(screen.parent, b"q")
    screen.until(b"\x1b[?1049l")
    assert screen.process.wait(60) == 0


def test_a_frame_has_no_more_lines_and_columns_than_the_screen(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "30")
    monkeypatch.setenv("LINES", "5")
    mq.draw("\n".join(f"{n} " + "字" * 40 for n in range(20)))
    frame = capsys.readouterr().out
    lines = frame.split("\r\n")
    assert len(lines) == 5
    assert all(mq.width(line.split("\x1b[K")[0].split("\x1b[H")[-1]) <= 30 for line in lines)


def test_watch_ends_quietly_on_ctrl_c_and_outlives_valkey(
    server: Server, tell: Tell, terminal: Callable[..., Terminal]
) -> None:
    screen = terminal("status", "--watch", "--url", "redis://127.0.0.1:1")
    screen.until(b"UNREACHABLE")
    screen.until(b"\x1b[H")  # the next frame
    screen.process.send_signal(2)  # a terminal that is given ^C may drop what it has to show
    screen.until(b"\x1b[?1049l")
    assert screen.process.wait(60) == 0
    assert termios.tcgetattr(screen.child) == screen.settings


def test_watch_needs_a_terminal(tell: Tell) -> None:
    done = tell("status", "--watch")
    assert done.returncode == 2
    assert "needs a terminal" in done.stderr


# ---- files of a project, hooks, AGENTS.md ----


@pytest.mark.parametrize(
    ("client", "name", "key"),
    [
        ("claude", ".mcp.json", "mcpServers"),
        ("gemini", ".gemini/settings.json", "mcpServers"),
        ("opencode", "opencode.json", "mcp"),
        ("vscode", ".vscode/mcp.json", "servers"),
    ],
)
def test_an_entry_of_a_project(
    tell: Tell, tmp_path: Path, client: str, name: str, key: str
) -> None:
    assert tell("mcp-config", client, "--scope", "project", "--write").returncode == 0
    assert "mosaic" in tree_of(tmp_path / name)[key]


def test_who_reads_no_file_of_a_project_is_told(tell: Tell, tmp_path: Path) -> None:
    for client in ("codex", "generic"):
        done = tell("mcp-config", client, "--scope", "project", "--write")
        assert (done.returncode, "hint: --file" in done.stderr) == (2, True)
    assert tell("mcp-config", "vscode", "--write").returncode == 0
    assert list(tmp_path.glob("**/Code/User/mcp.json"))
    assert tell("mcp-config").returncode == 2


def test_a_hook_is_entered_once_and_beside_the_others(tell: Tell, tmp_path: Path) -> None:
    path = tmp_path / ".claude" / "settings.json"
    path.parent.mkdir()
    other = {"matcher": "startup", "hooks": [{"type": "command", "command": "date"}]}
    path.write_text(json.dumps({"model": "x", "hooks": {"SessionStart": [other], "Stop": []}}))
    before = path.read_text()
    words = ("mcp-config", "claude", "--hook", "--project")
    assert "+" in tell(*words, "web", "--dry-run").stdout
    assert path.read_text() == before
    for project in ("web", "web", "app"):
        assert tell(*words, project, "--write").returncode == 0
    tree = tree_of(path)
    assert (tree["model"], tree["hooks"]["Stop"]) == ("x", [])
    first, own = tree["hooks"]["SessionStart"]
    assert first == other
    assert own["hooks"][0]["command"].endswith("prime --project app")
    assert len(list(path.parent.glob("*.bak"))) >= 1
    done = subprocess.run(own["hooks"][0]["command"], shell=True, capture_output=True, text=True)
    assert (done.returncode, "The loop" in done.stdout) == (0, True), done.stderr
    assert tell("mcp-config", "codex", "--hook").returncode == 2


def test_agents_md_is_written_once_and_keeps_the_rest(tell: Tell, tmp_path: Path) -> None:
    path = tmp_path / "AGENTS.md"
    path.write_text("# Mine\nno newline")
    assert "queue_next" in tell("mcp-config", "--agents-md").stdout
    assert path.read_text() == "# Mine\nno newline"
    for _ in range(2):
        assert tell("mcp-config", "--agents-md", "--write").returncode == 0
    text = path.read_text()
    assert text.startswith("# Mine\nno newline\n\n<!-- mosaic-queue -->\n## Tasks\n")
    assert text.count("queue_next") == 1
    path.write_text(text.replace("queue_next", "queue_other") + "after\n")
    assert tell("mcp-config", "--agents-md", "--write").returncode == 0
    assert path.read_text() == text + "after\n"
    path.write_text("<!-- mosaic-queue -->\n")
    assert tell("mcp-config", "--agents-md", "--write").returncode == 2
    assert tell("mcp-config", "--agents-md", "--write", "--file", "CLAUDE.md").returncode == 0
    assert "queue_next" in (tmp_path / "CLAUDE.md").read_text()


# ---- the monitor as a service ----


def test_a_unit_of_systemd(tell: Tell, tmp_path: Path, server: Server) -> None:
    done = tell("service", "systemd", "--assign")
    assert done.returncode == 0
    assert list(tmp_path.iterdir()) == []
    lines = done.stdout.splitlines()
    assert f"ExecStart={PROGRAM} monitor --assign" in lines
    assert f"Environment=MOSAIC_VALKEY_URL={server.url}" in lines
    assert "KillMode=process" in lines  # a private Valkey that the unit started lives on
    done = tell("service", "systemd", "--write")
    assert "systemctl --user enable --now mosaic-queue" in done.stderr
    unit = tmp_path / ".config/systemd/user/mosaic-queue.service"
    assert "monitor\n" in unit.read_text()
    assert json.loads(tell("service", "systemd", "--write", "--json").stdout)["written"] is False


def test_words_of_a_unit_mean_nothing_to_systemd() -> None:
    words = ['a b"c', "50%", "$HOME", "back\\slash"]
    _, text = mq.unit_of("systemd", words, {"X": "$a % b"})
    assert 'ExecStart="a b\\"c" 50%% $$HOME "back\\\\slash"\n' in text
    assert 'Environment="X=$a %% b"\n' in text
    with pytest.raises(mq.Refused):
        mq.unit_of("systemd", ["a\nExecStart=b"], {})


def test_a_plist_of_launchd(tell: Tell) -> None:
    facts = plistlib.loads(tell("service", "launchd").stdout.encode())
    assert facts["ProgramArguments"] == [str(PROGRAM), "monitor"]
    assert (facts["KeepAlive"], facts["AbandonProcessGroup"]) == (True, True)


def test_no_password_reaches_a_unit(tell: Tell) -> None:
    done = tell("service", "systemd", MOSAIC_VALKEY_URL="redis://al:hunter2@localhost:1")
    assert (done.returncode, "hunter2" in done.stdout + done.stderr) == (2, False)
    assert tell("service", "upstart").returncode == 2


def test_keys_scroll_and_choose_a_project(tell: Tell, terminal: Callable[..., Terminal]) -> None:
    for project in ("app", "web"):
        tell("create", project, "launch", "T1", "--title", "a")
    tell("complete", "web/T1", "--force")
    screen = terminal("status", "--watch", rows=12, columns=80)
    screen.until(b"app: 1 ready, 0 held; last hour 0 completed, 0 failed")
    screen.until(b"web: 0 ready, 0 held; last hour 1 completed, 0 failed")
    screen.until(b"lines 1 to ")
    os.write(screen.parent, b"jj")
    screen.until(b"lines 3 to ")
    os.write(screen.parent, b"k")
    screen.until(b"lines 2 to ")
    os.write(screen.parent, b"p")
    screen.until(b"of project app")
    os.write(screen.parent, b"p")
    screen.until(b"of project web")
    os.write(screen.parent, b"q")
    assert screen.process.wait(60) == 0


@pytest.mark.parametrize("rows", [1, 2, 3, 5, 40])
def test_a_screen_counts_what_it_cuts(rows: int) -> None:
    head, rest = [f"project {n}" for n in range(4)], [f"line {n}" for n in range(10)]
    lines = mq.screen_lines(head, rest, rows, 0)
    assert len(lines) <= max(2, rows)
    if rows > len(head) + 1:
        assert lines[: len(head)] == head
    assert ("of 10" in lines[-1]) == (rows < 15)
