"""Whose bytes are these?  Files of a cloned repository and of another user of the host.

The attacker's side is real: links, FIFOs and devices on a real file system, files of a second
uid, git repositories.  Every command runs in a process of its own, with a bound on its memory.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import redis
from conftest import Server, one_engine

import mosaic_queue as mq

PROGRAM = [sys.executable, str(Path(mq.__file__))]
NOBODY = 65534
HERE = ".mosaic/orchestrator"

server = one_engine()
as_root = pytest.mark.skipif(os.getuid() != 0, reason="only root can be another user as well")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A clone of a repository, with a file outside of it."""
    folder = tmp_path / "clone"
    (folder / HERE).mkdir(parents=True)
    (folder / "docs").mkdir()
    (folder / ".git").mkdir()
    (tmp_path / "home").mkdir()
    return folder


Tell = Callable[..., "subprocess.CompletedProcess[str]"]


def bounded() -> None:
    """A process that takes more memory than this has read what it should not have."""
    resource.setrlimit(resource.RLIMIT_AS, (2 << 30, 2 << 30))


def without_room() -> None:
    """A process that can make files and write nothing into them."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))


@pytest.fixture
def tell(server: Server, db: redis.Redis, folder: Path) -> Tell:
    """Runs a command line in the clone."""
    home = str(folder.parent / "home")
    environ = {"PATH": os.environ["PATH"], "HOME": home, "MOSAIC_VALKEY_URL": server.url}
    environ |= {"MOSAIC_PROJECT": "p"}

    def run(*words: str, **more: Any) -> subprocess.CompletedProcess[str]:
        given = {"cwd": folder, "preexec_fn": bounded, **more}
        given["env"] = environ | more.get("env", {})
        done = subprocess.run(
            [*PROGRAM, *words], text=True, timeout=60, capture_output=True, check=False,
            stdin=subprocess.DEVNULL, **given,
        )  # fmt: skip
        assert "Traceback" not in done.stderr, done.stderr
        return done

    return run


# ---- files that are none, or not ours ----

BOARD = "| id | status | description |\n|---|---|---|\n| B1 | not-started | x |\n"
TASK = '{"taskId": "C1", "mission": "m", "title": "t"}\n'
EXPORT = '{"v": 1, "project": "p"}\n'
PLACES: dict[str, tuple[str, str, tuple[str, ...]]] = {  # file, good content, command
    "mission.json": (f"{HERE}/mission.json", '{"mission_id": "m-1"}', ("mission", "status")),
    "session.lock": (f"{HERE}/session.lock", '{"session_id": "s"}', ("mission", "status")),
    "TASKS.md": ("docs/TASKS.md", BOARD, ("sync", "docs/TASKS.md")),
    "import": ("web.jsonl", EXPORT, ("import", "web.jsonl")),
    "restore": ("web.jsonl", EXPORT, ("restore", "--from", "web.jsonl")),
    "manifests": ("kept/p/project.json", EXPORT, ("restore", "--from", "kept")),
    "create": ("new.jsonl", TASK, ("create", "--from", "new.jsonl")),
    "--config": ("own.yaml", "project: p\n", ("config", "--config", "own.yaml")),
    "a client's": ("mcp.json", "{}", ("mcp-config", "generic", "--write", "--file", "mcp.json")),
}


def a_fifo(file: Path, good: str) -> None:
    os.mkfifo(file)


def a_device(file: Path, good: str) -> None:
    file.symlink_to("/dev/zero")


def a_folder(file: Path, good: str) -> None:
    file.mkdir()


def a_link_to_itself(file: Path, good: str) -> None:
    file.symlink_to(file.name)


def endless(file: Path, good: str) -> None:
    with file.open("wb") as out:
        out.truncate(5 << 30)


def of_another_user(file: Path, good: str) -> None:
    file.write_text(good)
    os.chown(file, NOBODY, NOBODY)


BAD_FILES = [a_fifo, a_device, a_folder, a_link_to_itself, endless]


def require_refused(done: subprocess.CompletedProcess[str], file: Path) -> None:
    assert done.returncode == 2, (done.returncode, done.stdout, done.stderr)
    assert done.stderr.startswith("INVALID: "), done.stderr
    assert file.name in done.stderr.splitlines()[0]


@pytest.mark.parametrize(
    "words",
    [
        ("sync", "docs/TASKS.md"),
        ("trust",),
        ("mission", "init"),
        ("mcp-config", "generic", "--write", "--file", "mcp.json"),
        ("mcp-config", "--agents-md", "--write"),
    ],
    ids=" ".join,
)
def test_a_disk_that_takes_nothing_is_told(
    tell: Tell, folder: Path, words: tuple[str, ...]
) -> None:
    tell("create", "p", "m", "T1", "--title", "t")
    (folder / "docs/TASKS.md").write_text(BOARD)
    (folder / ".mosaic/queue.yaml").write_text("project: p\n")
    done = tell(*words, preexec_fn=without_room)
    assert done.returncode == 6, done
    assert "cannot be written: File too large" in done.stderr


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("bad", [*BAD_FILES, pytest.param(of_another_user, marks=as_root)])
def test_what_is_no_file_of_ours_is_refused_at_once(
    tell: Tell, folder: Path, place: str, bad: Callable[[Path, str], None]
) -> None:
    name, good, words = PLACES[place]
    if (place, bad) == ("restore", a_folder):
        return  # which is one of manifests then
    (folder / HERE / "mission.json").write_text('{"mission_id": "m-1"}')
    file = folder / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.unlink(missing_ok=True)
    bad(file, good)
    require_refused(tell(*words), file)


@pytest.mark.parametrize("place", [place for place in PLACES if place not in ("--config",)])
@pytest.mark.parametrize("by", ["the file", "its folder"])
def test_a_link_out_of_the_repository_is_not_followed(
    tell: Tell, folder: Path, place: str, by: str
) -> None:
    """Neither read nor written, whoever owns what it leads to."""
    name, good, words = PLACES[place]
    (folder / HERE / "mission.json").write_text('{"mission_id": "m-1"}')
    file = folder / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.unlink(missing_ok=True)
    outside = folder.parent / "outside"
    outside.mkdir()
    (outside / file.name).write_text(good)
    if by == "the file":
        file.symlink_to(outside / file.name)
    elif file.parent == folder:
        (folder / "sub").symlink_to(outside)
        words = tuple(f"sub/{file.name}" if word == file.name else word for word in words)
    else:
        for one in file.parent.iterdir():
            (outside / one.name).write_bytes(one.read_bytes())
            one.unlink()
        file.parent.rmdir()
        file.parent.symlink_to(outside)
    done = tell(*words)
    assert done.returncode == 2, done.stdout
    assert "outside of" in done.stderr
    assert str(outside) in done.stderr, "the hint names the file itself"
    assert (outside / file.name).read_text() == good


def test_a_link_inside_of_the_repository_is_followed(tell: Tell, folder: Path) -> None:
    (folder / "BOARD.md").write_text(BOARD)
    (folder / "docs/TASKS.md").symlink_to("../BOARD.md")
    assert tell("sync", "docs/TASKS.md").returncode == 0
    assert tell("complete", "B1", "--force").returncode == 0
    assert tell("sync", "docs/TASKS.md").returncode == 0
    assert "done" in (folder / "BOARD.md").read_text()
    assert (folder / "docs/TASKS.md").is_symlink()


def test_ones_own_configuration_may_be_a_link(tell: Tell, folder: Path) -> None:
    """As managers of dotfiles make them."""
    home = folder.parent / "home"
    (home / ".config/mosaic").mkdir(parents=True)
    (home / "dotfiles.yaml").write_text("project: linked\n")
    (home / ".config/mosaic/queue.yaml").symlink_to(home / "dotfiles.yaml")
    done = tell("config", "--json", env={"MOSAIC_PROJECT": ""})
    assert json.loads(done.stdout)["config"]["project"]["value"] == "linked"


# ---- YAML ----

BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{b}: &{b} [{','.join(['*' + a] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)
BAD_YAML = {
    "aliases": BOMB,
    "one alias": "project: &a web\nmission: *a\n",
    "deep": "[" * 20_000,
    "deep keys": "{a: " * 8_000,
    "large": "a: 1\n" * 1_000_000,
    "a set": "project: !!set {a}\n",
    "binary": "project: !!binary aGk=\n",
    "python": "!!python/object/apply:os.system ['true']",
    "an int of many digits": "watchdog: {interval: " + "9" * 5000 + "}\n",
    "a hex of many digits": "watchdog: {interval: 0x" + "f" * 5000 + "}\n",
    "a float out of range": "watchdog: {interval: 1" + ":59" * 5000 + ".0}\n",
    "no text": "\x00\x01",
    "a list as a key": "? [a]\n: b\n",
    "infinity": "watchdog: {interval: .inf}\n",
}


@pytest.mark.parametrize("name", BAD_YAML)
def test_yaml_that_is_no_configuration_is_a_sentence_at_once(
    tell: Tell, folder: Path, name: str
) -> None:
    file = folder / "own.yaml"
    file.write_text(BAD_YAML[name])
    require_refused(tell("config", "--config", "own.yaml"), file)


def test_a_date_is_text(tell: Tell, folder: Path) -> None:
    """As missions are called."""
    (folder / "own.yaml").write_text("mission: 2026-03-12\n")
    done = tell("config", "--config", "own.yaml", "--json")
    assert json.loads(done.stdout)["config"]["mission"]["value"] == "2026-03-12"


@pytest.mark.parametrize(
    "text",
    [
        "openbrain: {token: hunter2\n",
        "openbrain:\n  token: hunter2: x\n",
        "openbrain: hunter2\n",
        "redis: {url: redis://u:hunter2@h\n",
        "hunter2",
        "a: !hunter2 x\n",
        "a: *hunter2\n",
        "a: 'hunter2\n",
        "a: |hunter2\n",
        'a: "\\hunter2"\n',
        "http: {tokens: {a: hunter2}}\n",
        "redis: [hunter2]\n",
    ],
)
def test_an_error_shows_where_and_never_what(tell: Tell, folder: Path, text: str) -> None:
    (folder / "own.yaml").write_text(text)
    done = tell("config", "--config", "own.yaml")
    require_refused(done, folder / "own.yaml")
    assert "hunter2" not in done.stdout + done.stderr


# ---- what a repository may set ----

EVIL = "project: prod\nmission: theirs\nfiles: [docs/TASKS.md]\n"


@pytest.fixture
def clone(folder: Path) -> Path:
    """A real clone of a real repository with a file of the project."""
    origin = folder.parent / "origin"
    (origin / ".mosaic").mkdir(parents=True)
    (origin / ".mosaic/queue.yaml").write_text(EVIL)
    (origin / "TASKS.md").write_text(BOARD)
    run = {"check": True, "capture_output": True, "cwd": origin}
    who = ("-c", "user.name=a", "-c", "user.email=a@b")
    for words in (["init", "-q"], ["add", "."], ["commit", "-qm", "x"]):
        subprocess.run(["git", *who, *words], **run)
    clone = folder.parent / "cloned"
    subprocess.run(["git", "clone", "-q", str(origin), str(clone)], **run)
    return clone


def settings(tell: Tell, folder: Path, **more: str) -> dict[str, Any]:
    done = tell("config", "--json", cwd=folder, env={"MOSAIC_PROJECT": "", **more})
    assert done.returncode == 0, done.stderr
    config = json.loads(done.stdout)["config"]
    return {key: config[key]["value"] for key in ("project", "mission", "files")}


NOTHING = {"project": None, "mission": None, "files": []}
ALL = {"project": "prod", "mission": "theirs", "files": ["docs/TASKS.md"]}


def test_a_repository_sets_nothing_until_its_user_trusts_it(tell: Tell, clone: Path) -> None:
    assert settings(tell, clone) == NOTHING
    done = tell("next", cwd=clone, env={"MOSAIC_PROJECT": ""})
    file = clone / ".mosaic/queue.yaml"
    said = f"{file} is not trusted, so that it sets no project, mission, files"
    assert done.returncode == 2
    assert f"no project is named; {said}" in done.stderr
    assert "mosaic-queue trust" in done.stderr
    done = tell("trust", cwd=clone / ".git")
    assert (done.returncode, '  project: "prod"' in done.stdout) == (0, True)
    assert settings(tell, clone) == ALL
    assert tell("status", cwd=clone).stderr == ""
    file.write_text(EVIL + "lane: coding\n")
    assert settings(tell, clone) == NOTHING, "it is another file now"
    file.write_text(EVIL)
    assert settings(tell, clone) == ALL
    assert tell("trust", "--revoke", cwd=clone).returncode == 0
    assert settings(tell, clone) == NOTHING


def test_an_agent_in_a_clone_is_told_what_its_user_can_do(tell: Tell, clone: Path) -> None:
    hello = {"protocolVersion": "2025-06-18", "capabilities": {},
             "clientInfo": {"name": "x", "version": "1"}}  # fmt: skip
    call = {"name": "queue_next", "arguments": {}}
    lines = [
        {"jsonrpc": "2.0", "id": 1, "method": "initialize", "params": hello},
        {"jsonrpc": "2.0", "method": "notifications/initialized"},
        {"jsonrpc": "2.0", "id": 2, "method": "tools/call", "params": call},
    ]
    server = subprocess.Popen(
        [*PROGRAM, "mcp"], cwd=clone, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        env={"PATH": os.environ["PATH"], "HOME": str(clone.parent / "home")},
    )  # fmt: skip
    assert server.stdin
    assert server.stdout
    print(*map(json.dumps, lines), sep="\n", file=server.stdin, flush=True)
    server.stdout.readline()
    answer = json.loads(server.stdout.readline())["result"]
    server.stdin.close()
    assert server.wait(60) == 0
    server.stdout.close()
    assert answer["isError"]
    assert "is not trusted, so that it sets no project" in answer["content"][0]["text"]


def test_the_same_file_elsewhere_is_another_one(tell: Tell, clone: Path) -> None:
    assert tell("trust", cwd=clone).returncode == 0
    other = clone.rename(clone.with_name("elsewhere"))
    assert settings(tell, other) == NOTHING


def test_a_project_that_is_named_otherwise_needs_no_trust(tell: Tell, clone: Path) -> None:
    """But the repository's board is kept in step with it only where the repository is trusted."""
    more = {"MOSAIC_PROJECT": "prod"}
    assert settings(tell, clone, **more) == NOTHING | {"project": "prod"}
    assert "sets no mission, files" in tell("status", cwd=clone, env=more).stderr
    (clone / ".mosaic/queue.yaml").write_text("project: prod\n")
    assert tell("status", cwd=clone, env=more).stderr == ""


@pytest.mark.parametrize(
    ("trust", "sets"),
    [
        ("[prod]", ALL),
        ("[other]", NOTHING),
        ("[{parent}]", ALL),
        ("[{clone}/]", ALL),
        ("[{clone}x]", NOTHING),
        ("[~/../cloned]", ALL),
        ("[~]", NOTHING),
    ],
)
def test_ones_own_configuration_may_trust_folders_and_projects(
    tell: Tell, clone: Path, trust: str, sets: dict[str, Any]
) -> None:
    own = clone.parent / "home/.config/mosaic/queue.yaml"
    own.parent.mkdir(parents=True)
    own.write_text("trust: " + trust.format(clone=clone, parent=clone.parent))
    assert settings(tell, clone) == sets


def test_a_project_is_trusted_with_all_the_others_that_a_file_names(
    tell: Tell, clone: Path
) -> None:
    own = clone.parent / "home/.config/mosaic/queue.yaml"
    own.parent.mkdir(parents=True)
    own.write_text("trust: [prod]")
    text = "project: prod\nfiles: [{path: TASKS.md, project: bank}]\n"
    (clone / ".mosaic/queue.yaml").write_text(text)
    assert settings(tell, clone) == NOTHING
    own.write_text("trust: [prod, bank]")
    assert settings(tell, clone)["project"] == "prod"


def test_a_commit_completes_nothing_of_another_project(
    tell: Tell, server: Server, clone: Path
) -> None:
    """The monitor in a clone keeps no board of it in step."""
    tell("create", "prod", "m", "B1", "--title", "t")
    tell("claim", "prod/B1", "--agent", "alice")
    (clone / "TASKS.md").write_text(BOARD.replace("not-started", "done"))
    (clone / ".mosaic/queue.yaml").write_text("project: prod\nfiles: [TASKS.md]\n")
    monitor = subprocess.Popen(
        [*PROGRAM, "monitor"], cwd=clone, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE, text=True,
        env={"PATH": os.environ["PATH"], "HOME": str(clone.parent / "home"),
             "MOSAIC_VALKEY_URL": server.url},
    )  # fmt: skip
    assert monitor.stderr
    assert "is not trusted" in monitor.stderr.readline()
    while '"lead"' not in monitor.stderr.readline():
        pass
    monitor.terminate()
    monitor.communicate(timeout=60)
    assert json.loads(tell("show", "prod/B1", "--json").stdout)["tasks"][0]["status"] == "claimed"


@as_root
@pytest.mark.parametrize("text", ["project: prod\n", BOMB])
def test_a_file_of_another_user_stops_nobody(tell: Tell, folder: Path, text: str) -> None:
    """As /tmp/.mosaic/queue.yaml of another user, above the folders of all."""
    theirs = folder.parent / ".mosaic/queue.yaml"
    (folder / ".mosaic").rename(folder / "x")
    theirs.parent.mkdir()
    theirs.write_text(text)
    for one in (theirs, theirs.parent):
        os.chown(one, NOBODY, NOBODY)
    done = tell("list")
    assert (done.returncode, "belongs to another user" in done.stderr) == (0, True)
    assert tell("trust").returncode == 2
    assert settings(tell, folder) == NOTHING


@as_root
def test_files_of_others_count_in_a_folder_that_is_trusted(tell: Tell, folder: Path) -> None:
    """As in a container that works as root in a folder of its host."""
    (folder / "docs/TASKS.md").write_text(BOARD)
    (folder / ".mosaic/queue.yaml").write_text("project: theirs\n")
    for one in (folder, *folder.rglob("*")):
        os.chown(one, NOBODY, NOBODY)
    assert tell("sync", "docs/TASKS.md").returncode == 2
    own = folder.parent / "home/.config/mosaic/queue.yaml"
    own.parent.mkdir(parents=True)
    own.write_text(f"trust: [{folder}]\n")
    assert tell("sync", "docs/TASKS.md", env={"MOSAIC_PROJECT": ""}).returncode == 0
    assert tell("complete", "theirs/B1", "--force").returncode == 0
    assert tell("sync", "docs/TASKS.md", env={"MOSAIC_PROJECT": ""}).returncode == 0
    assert "done" in (folder / "docs/TASKS.md").read_text()
    assert (folder / "docs/TASKS.md").stat().st_uid == NOBODY
    (folder / "out.md").symlink_to("/etc/passwd")
    assert "outside of" in tell("sync", "out.md").stderr


@pytest.mark.parametrize("bad", [*BAD_FILES, "aliases", "deep", "large", "link"])
def test_a_broken_file_of_a_repository_stops_no_command(tell: Tell, folder: Path, bad: Any) -> None:
    file = folder / ".mosaic/queue.yaml"
    if bad == "link":
        outside = folder.parent / "secret"
        outside.write_text("project: hunter2\n")
        file.symlink_to(outside)
    elif isinstance(bad, str):
        file.write_text(BAD_YAML[bad])
    else:
        bad(file, "")
    done = tell("list")
    assert done.returncode == 0
    assert f"mosaic-queue: {file} is left out: " in done.stderr
    assert "hunter2" not in done.stderr
    assert tell("trust").returncode == 2


# ---- who may do what to whom ----

WHOM = ("your tasks", "what others hold", "your files", "your secrets and servers")
MAY: dict[str, tuple[tuple[str, str], ...]] = {  # each cell with the test that holds it
    "another user of the host": (
        ("nothing: the private server answers its own user alone, and one in its place is not used",
         "test_private_server.test_a_server_of_another_user_is_not_talked_to"),
        ("nothing there; a `serve` without tokens, on loopback, obeys every user of the host",
         "test_http.test_an_address_of_the_network_needs_tokens"),
        ("nothing: his files, folders and locks are not used, and stop no command",
         "test_trust.test_a_file_of_another_user_stops_nobody"),
        ("nothing: folders and files are for you alone, whatever the umask",
         "test_private_server.test_only_its_user_may_enter"),
    ),
    "a repository": (
        ("what its board and `.mosaic/queue.yaml` say, once you trust that file as it is",
         "test_trust.test_a_repository_sets_nothing_until_its_user_trusts_it"),
        ("give back what the session held that its `session.lock` names, when that is dead",
         "test_mission.test_only_the_session_of_the_lock_gives_anything_back"),
        ("nothing outside of it: no link leads out, and no FIFO, device or size stops a command",
         "test_trust.test_a_link_out_of_the_repository_is_not_followed"),
        ("nothing: it names no server, token, limit or variable",
         "test_config.test_a_cloned_repository_chooses_no_server_token_limit_or_variable"),
    ),
    "a tenant of your Valkey": (
        ("all that his ACL lets him write; an ACL of one project reaches no other",
         "test_bad_input.test_a_user_that_sees_one_project"),
        ("the same; what he forges is told, and ends no command of another project",
         "test_forged.test_no_forged_key_ends_a_command_in_a_traceback"),
        ("nothing: text of a task steers no terminal and names no file",
         "test_cli.test_tables_escape_what_could_steer_a_terminal"),
        ("nothing: a URL is shown without its password",
         "test_config.test_every_form_of_a_url_is_masked"),
    ),
    "an agent": (
        ("what its tools are for: the default ones pause, delete and purge nothing",
         "test_mcp.test_tools"),
        ("nothing under its own name; a name is no password to who runs as your user",
         "test_trust.test_an_agent_ends_no_claim_of_another"),
        ("all that your user may: it is a process of yours",
         "test_run.test_the_command_knows_its_task"),
        ("what it finds in your files; `run` hands it no token and no password",
         "test_run.test_the_command_gets_no_password_of_ours"),
    ),
    "a token of `serve`": (
        ("by its role: read, agent or operator, in its projects",
         "test_http.test_what_a_token_may_do"),
        ("as the agent it is made for; an operator's as you",
         "test_http.test_a_session_of_another_token_is_refused"),
        ("nothing", "test_http.test_bad_requests_are_problems"),
        ("nothing: it is kept as a digest",
         "test_http.test_a_token_is_shown_once_and_kept_as_a_digest"),
    ),
    "a database role": (
        ("ask for edits of `tasks`, where it has rights there; the queue decides",
         "test_record.test_edits"),
        ("end it by a status that it asks for, as an operator does", "test_record.test_edits"),
        ("nothing", "test_record.test_the_record_never_holds_a_wish"),
        ("nothing: the record itself is written by its owner alone",
         "test_record.test_the_record_never_holds_a_wish"),
    ),
}  # fmt: skip


def trust_table() -> str:
    rows = [f"| may do to | {' | '.join(WHOM)} |", "|---" * (len(WHOM) + 1) + "|"]
    rows += [
        f"| **{actor}** | {' | '.join(text for text, _ in cells)} |" for actor, cells in MAY.items()
    ]
    return "\n".join(rows)


def test_the_readme_says_who_may_do_what_to_whom() -> None:
    """And each cell has its test."""
    folder = Path(__file__).parent
    readme = (folder.parent / "README.md").read_text()
    assert f"<!-- trust -->\n{trust_table()}\n<!-- /trust -->" in readme
    for cells in MAY.values():
        assert len(cells) == len(WHOM)
        for _, test in cells:
            module, name = test.split(".")
            assert f"def {name}(" in (folder / f"{module}.py").read_text(), test


def test_an_agent_ends_no_claim_of_another(tell: Tell) -> None:
    tell("create", "p", "m", "T1", "--title", "t")
    tell("claim", "p/T1", "--agent", "alice")
    before = tell("show", "p/T1", "--json").stdout
    for words in (("complete",), ("fail", "--reason", "x"), ("release",), ("heartbeat",)):
        done = tell(words[0], "p/T1", *words[1:], "--agent", "mallory")
        assert (done.returncode, done.stderr[:10]) == (4, "NOT_OWNER:"), done.stderr
    assert tell("show", "p/T1", "--json").stdout == before
