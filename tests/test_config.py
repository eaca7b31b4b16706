"""Configuration: where each value comes from, what is refused, what is never shown.

A file is read in full before anything is done, so a misspelt key costs a sentence and not a
night with the wrong limits.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import redis
from conftest import Server, key_space

import mosaic_queue as mq

anyio = pytest.mark.anyio

# As the PRD has it, to the letter.
PRD = """\
redis:
  url: redis://localhost:6379
defaults:
  claimTTL: 3600
  maxRetries: 3
  deadLetterAfter: 3
lanes:
  planning:
    maxConcurrent: 2
  coding:
    maxConcurrent: 4
watchdog:
  interval: 60
openbrain:
  url: ${OPENBRAIN_URL}  # required — no default
  autoCapture: false
"""


class Files:
    """A user's file and a checkout with a project's file, in a folder of their own."""

    def __init__(self, folder: Path) -> None:
        self.home, self.checkout = folder / "home", folder / "checkout"
        self.inside = self.checkout / "src" / "deep"
        self.inside.mkdir(parents=True)
        self.home.mkdir()
        self.environ = {"MOSAIC_HOME": str(self.home), "HOME": str(folder)}

    def user(self, text: str) -> Files:
        (self.home / "queue.yaml").write_text(text)
        return self

    def project(self, text: str) -> Files:
        """A project's file that its user trusts."""
        (self.checkout / ".mosaic").mkdir(exist_ok=True)
        (self.checkout / ".mosaic" / "queue.yaml").write_text(text)
        (self.home / "queue.yaml").touch()
        with (self.home / "queue.yaml").open("r+") as own:
            if "trust:" not in own.read():
                own.write(f"trust: [{self.checkout}]\n")
        return self

    def load(self, flags: dict[str, Any] | None = None, **environ: str) -> mq.Config:
        return mq.load_config(None, flags, self.environ | environ, self.inside)


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return Files(tmp_path)


Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def command(
    files: Files, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Command:
    """A command line in the checkout; its exit status, stdout and stderr."""
    for name in ("MOSAIC_QUEUE_CONFIG", "OPENBRAIN_URL", *mq.ENVIRONMENT.values()):
        monkeypatch.delenv(name, raising=False)
    for name, value in files.environ.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(files.inside)

    def run(*words: str) -> tuple[int, str, str]:
        status = mq.main(words)
        return status, *capsys.readouterr()

    return run


# ---- the PRD's file ----


def test_the_prds_file_loads_as_it_stands(files: Files) -> None:
    config = files.user(PRD).load()
    expected = {
        "redis.url": "redis://localhost:6379",
        "defaults.claimTTL": 3600,
        "defaults.maxRetries": 3,
        "defaults.deadLetterAfter": 3,
        "lanes.planning.maxConcurrent": 2,
        "lanes.coding.maxConcurrent": 4,
        "watchdog.interval": 60,
        "openbrain.autoCapture": False,
    }
    assert {key: config[key] for key in expected} == expected
    numbers, lanes = config.policy()
    assert numbers == "claimTTL 3600 maxRetries 3 deadLetterAfter 3"
    assert lanes == "planning=2 coding=4"


def test_only_the_use_of_an_unset_variable_is_an_error(files: Files) -> None:
    config = files.user(PRD).load()
    with pytest.raises(mq.ConfigError) as refused:
        config["openbrain.url"]
    for part in ("queue.yaml", "openbrain.url", "${OPENBRAIN_URL}"):
        assert part in refused.value.message
    assert files.load(OPENBRAIN_URL="http://brain")["openbrain.url"] == "http://brain"


def test_the_prds_file_serves_a_command(
    files: Files, command: Command, server: Server, db: redis.Redis
) -> None:
    files.user(PRD)
    url = ("--url", server.url)
    status, _, err = command("create", "web", "launch", "T1", "--title", "Page", *url)
    assert (status, err) == (0, "")
    status, out, _ = command("config")
    assert status == 0
    assert "${OPENBRAIN_URL}, which is not set" in out


# ---- who wins ----


def test_precedence_is_user_file_project_file_environment_flag(files: Files) -> None:
    files.user("project: of-user\nmission: of-user\nagent: of-user\nlane: of-user\n")
    files.project("project: of-project\nmission: of-project\nlane: of-project\n")
    flags = {"agent": "of-flag", "mission": None}
    config = files.load(flags, MOSAIC_PROJECT="of-env", MOSAIC_AGENT="of-env")
    assert {key: config[key] for key in ("project", "mission", "lane", "agent")} == {
        "project": "of-env",
        "mission": "of-project",
        "lane": "of-project",
        "agent": "of-flag",
    }
    assert config.source("project") == "$MOSAIC_PROJECT"
    assert config.source("mission") == str(files.checkout / ".mosaic" / "queue.yaml")
    assert config.source("agent") == "flag"
    assert config.source("manifests") == "default"


@pytest.mark.parametrize("source", ["--config", "$MOSAIC_QUEUE_CONFIG", "$MOSAIC_HOME", "$HOME"])
def test_a_users_file_is_found(source: str, tmp_path: Path) -> None:
    folder = tmp_path / (".config/mosaic" if source == "$HOME" else "elsewhere")
    folder.mkdir(parents=True)
    file = folder / "queue.yaml"
    file.write_text("mission: found")
    environ = {"HOME": str(tmp_path)}
    if source == "$MOSAIC_QUEUE_CONFIG":
        environ["MOSAIC_QUEUE_CONFIG"] = str(file)
    elif source == "$MOSAIC_HOME":
        environ["MOSAIC_HOME"] = str(folder)
    path = str(file) if source == "--config" else None
    assert mq.load_config(path, {}, environ, tmp_path)["mission"] == "found"


def test_a_named_file_has_to_be_there(tmp_path: Path) -> None:
    missing = tmp_path / "no.yaml"
    for path, environ in (
        (str(missing), {}),
        (None, {"MOSAIC_QUEUE_CONFIG": str(missing)}),
    ):
        with pytest.raises(mq.Refused, match=r"no\.yaml cannot be read"):
            mq.load_config(path, {}, environ, tmp_path)


def test_an_empty_file_and_empty_parts_say_nothing(files: Files) -> None:
    assert files.user("").load()["project"] is None
    config = files.user("redis:\ndefaults:\n  claimTTL:\nlanes:\n  coding:\n").load()
    assert config["defaults.claimTTL"] == 3600
    assert config.policy() == ("", "")


# ---- variables ----


@pytest.mark.parametrize(
    ("text", "environ", "value"),
    [
        ("redis://${HOST}:6379", {"HOST": "h"}, "redis://h:6379"),
        ("redis://${HOST:-localhost}", {}, "redis://localhost"),
        ("redis://${HOST:-localhost}", {"HOST": "h"}, "redis://h"),
        ("${SCHEME:-redis}://${HOST:-localhost}", {"HOST": "h"}, "redis://h"),
        ("${URL:-}", {}, ""),
        ("redis://a$b", {}, "redis://a$b"),
    ],
)
def test_variables_are_filled_in(
    files: Files, text: str, environ: dict[str, str], value: str
) -> None:
    assert files.user(f"redis:\n  url: {text}").load(**environ)["redis.url"] == value


def test_a_variable_takes_the_type_of_its_key(files: Files) -> None:
    files.user("defaults:\n  claimTTL: ${TTL}\nopenbrain:\n  autoCapture: ${CAPTURE:-true}\n")
    config = files.load(TTL="90", CAPTURE="false")
    assert config["defaults.claimTTL"] == 90
    assert config["openbrain.autoCapture"] is False
    with pytest.raises(mq.ConfigError, match=r"defaults\.claimTTL is 'soon'"):
        files.load(TTL="soon")["defaults.claimTTL"]


# ---- what is refused ----


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("projekt: web", ("projekt", "did you mean project?")),
        ("defaults:\n  claimTtl: 60", ("defaults.claimTtl", "did you mean defaults.claimTTL?")),
        ("redis:\n  uri: redis://h", ("redis.uri", "did you mean redis.url?")),
        ("openbrain:\n  tokn: x", ("openbrain.tokn", "did you mean openbrain.token?")),
        ("lanes:\n  coding:\n    maxConcurent: 3", ("lanes.coding", "maxConcurrent")),
        ("lanes:\n  'a b':\n    maxConcurrent: 3", ("lanes.a b",)),
        ("defaults:\n  claimTTL: soon", ("defaults.claimTTL", "'soon'", "accepted")),
        ("defaults:\n  claimTTL: 1.5", ("defaults.claimTTL", "1.5", "accepted")),
        ("defaults:\n  claimTTL: true", ("defaults.claimTTL", "True", "accepted")),
        ("defaults:\n  maxRetries: -1", ("defaults.maxRetries", "-1", "accepted: 0 to")),
        ("embedded: 1", ("embedded", "1", "accepted")),
        ("embedded: 'no'", ("embedded", "'no'", "accepted")),
        ("project: 7", ("project", "7", "accepted")),
        ("project: [a]", ("project", "['a']", "accepted")),
        ("redis: redis://localhost", ("redis is str", "a mapping of keys")),
        ("lanes:\n  coding: 4", ("lanes.coding is int", "a mapping of keys")),
        ("files: TASKS.md", ("files", "TASKS.md", "accepted")),
        ("- a\n- b", ("the file is", "a mapping of keys")),
        ("a: [", ("queue.yaml cannot be read", "line 1")),
        ("a: b: c", ("queue.yaml cannot be read", "line 1")),
        ("!!python/object/apply:os.system ['true']", ("cannot be read",)),
    ],
)
def test_a_wrong_file_is_refused_in_one_sentence(
    files: Files, command: Command, text: str, parts: tuple[str, ...]
) -> None:
    files.user(text)
    status, out, err = command("config")
    assert (status, out) == (2, "")
    assert err.startswith("INVALID: ")
    first = err.splitlines()[0]
    assert str(files.home / "queue.yaml") in first
    for part in parts:
        assert part in first


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("redis:\n  url: redis://evil:6379", "redis.url"),
        ("embedded: false", "embedded"),
        ("openbrain:\n  token: t", "openbrain.token"),
        ("openbrain:\n  url: http://evil", "openbrain.url"),
        ("postgres:\n  url: postgres://evil", "postgres.url"),
        ("http:\n  tokens: [t]", "http.tokens"),
        ("defaults:\n  claimTTL: 1", "defaults.claimTTL"),
        ("lanes:\n  coding:\n    maxConcurrent: 1000", "lanes.coding.maxConcurrent"),
        ("agent: somebody-else", "agent"),
        ("mission: ${AWS_SECRET_ACCESS_KEY}", "mission"),
        ("files: ['${HOME}/TASKS.md']", "files"),
    ],
)
def test_a_cloned_repository_chooses_no_server_token_limit_or_variable(
    files: Files, text: str, key: str
) -> None:
    with pytest.raises(mq.ConfigError) as refused:
        files.project(text).load(AWS_SECRET_ACCESS_KEY="secret")
    message = refused.value.message
    assert str(files.checkout / ".mosaic" / "queue.yaml") in message
    assert f"{key} may not" in message
    assert "secret" not in message.replace("SECRET", "")


def test_the_nearest_project_file_counts(files: Files) -> None:
    files.project("project: outer\nmission: outer\n")
    (files.inside / ".mosaic").mkdir()
    (files.inside / ".mosaic" / "queue.yaml").write_text("project: inner")
    config = files.load()
    assert (config["project"], config["mission"]) == ("inner", None)


@pytest.mark.parametrize("name", ["a b", "a/b", "{a}", "é", ".a", "x" * 129])
def test_a_project_that_is_no_id_is_refused_with_its_source(
    files: Files, command: Command, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv("MOSAIC_PROJECT", name)
    status, _, err = command("status")
    assert status == 2
    assert "project ($MOSAIC_PROJECT) is " in err


# ---- what is never shown ----

SECRETS = """\
redis:
  url: redis://bob:hunter2@localhost:6379
openbrain:
  token: hunter2
postgres:
  url: postgres://bob:hunter2@db/record
http:
  tokens: [hunter2, hunter2b]
"""


@pytest.mark.parametrize("form", [(), ("--json",)])
def test_config_masks_secrets(files: Files, command: Command, form: tuple[str, ...]) -> None:
    files.user(SECRETS)
    status, out, err = command("config", *form)
    assert (status, err) == (0, "")
    assert "hunter2" not in out
    for shown in ("redis://bob:***@localhost:6379", "postgres://bob:***@db/record"):
        assert shown in out
    if form:
        shown = json.loads(out)["config"]
        assert shown["openbrain.token"]["value"] == "***"
        assert shown["http.tokens"]["value"] == "***"
        assert shown["redis.url"]["source"].endswith("queue.yaml")


@pytest.mark.parametrize(
    "url",
    [
        "redis://:hunter2@localhost",
        "redis://bob:hunter2@localhost:6379/0",
        "redis://bob:hunt@hunter2@localhost",
        "redis://bob:hunt/hunter2@localhost",
        "unix:///run/s?password=hunter2",
        "unix:///run/s?db=0&password=hunter2&username=bob",
        "redis+sentinel://bob:hunter2@a:1,b:2/main",
    ],
)
def test_every_form_of_a_url_is_masked(files: Files, command: Command, url: str) -> None:
    """redis-py takes a password before the host and, for a socket, as `?password=`."""
    files.user(f"redis:\n  url: {url}")
    _, out, err = command("config")
    assert "hunter2" not in out + err


@pytest.mark.parametrize(
    "url",
    [
        "redis://bob:hun\nter2@localhost", "//bob:hunter2@host", "redis://bob:hunter2", "hunter2",
        "host=db password=hunter2", "unix:///s?pass%77ord=hunter2", "postgres://db?hunter2",
        "postgres://db/r?sslpassword=hunter2&sslmode=require", "http://brain/?token=hunter2",
        "http://brain/?api_key=hunter2#hunter2", "redis://bob:/hunter2@h:1/0?db=hunter2@h",
        "redis://bob:hunter2?x@h", "redis://hunter2 @h", "bob:hunter2@h:1", "redis://h/0?db=1;p=hunter2",
    ],
)  # fmt: skip
def test_what_is_not_known_to_be_no_secret_is_not_shown(url: str) -> None:
    assert "hunter2" not in mq.mask_url(url)
    assert "ter2" not in mq.mask_url(url)


@pytest.mark.parametrize(
    "url",
    [
        "redis://localhost", "redis://bob@localhost:6379/0", "unix:///run/user/0/s?db=2",
        "redis+sentinel://a:1,b:2/main", "rediss://[::1]:6380/1", "localhost:6379",
        "postgresql://alice@db.example.org:5432/record?sslmode=verify-full",
    ],
)  # fmt: skip
def test_what_is_no_secret_is_shown(url: str) -> None:
    assert mq.mask_url(url) == url


def test_a_variable_with_a_secret_is_masked(files: Files, command: Command) -> None:
    files.user("redis:\n  url: redis://bob:${PASSWORD:-hunter2}@localhost\n")
    _, out, err = command("config")
    assert "hunter2" not in out + err


@pytest.mark.parametrize(
    "text",
    ["openbrain:\n  token: [hunter2]", "http:\n  tokens: hunter2",
     "redis:\n  url: ['redis://bob:hunter2@h']", "redis: redis://bob:hunter2@h"],
)  # fmt: skip
def test_a_secret_of_the_wrong_type_is_refused_without_showing_it(
    files: Files, command: Command, text: str
) -> None:
    files.user(text)
    status, out, err = command("config")
    assert status == 2
    assert "hunter2" not in out + err


# ---- the policy ----


def test_policy_is_what_a_file_sets_and_no_more(files: Files) -> None:
    assert files.load().policy() == ("", "")
    lanes = "lanes:\n  review:\n    maxConcurrent: 1\n"
    files.user("defaults:\n  maxRetries: 5\n  mcpTTL: 60\n" + lanes)
    assert files.load().policy() == ("maxRetries 5", "review=1")


def made(server: Server, **values: Any) -> mq.Queue:
    """A queue of project `p` whose configuration has these keys, `__` for a dot."""
    config = mq.Config(environ={}).set("redis.url", server.url, "test").set("project", "p", "test")
    for name, value in values.items():
        config.set(name.replace("__", "."), value, "queue.yaml")
    return mq.Queue(config)


@anyio
async def test_the_first_create_stores_the_policy(server: Server, db: redis.Redis) -> None:
    async with made(server, defaults__maxRetries=5, lanes__coding__maxConcurrent=2) as queue:
        await queue.create("p", "m", "T1", title="t")
        policy = await queue.policy()
        assert policy["maxRetries"] == 5
        assert policy["claimTTL"] == 3600
        assert policy["lanes"] == {"any": None, "planning": None, "coding": 2}
        assert policy["storedAt"] > 0
        assert policy["differs"] == []


@anyio
async def test_a_create_without_a_policy_leaves_room_for_the_first_that_has_one(
    server: Server, db: redis.Redis
) -> None:
    async with made(server) as queue:
        await queue.create("p", "m", "T1", title="t")
        assert "storedAt" not in await queue.policy()
    async with made(server, defaults__claimTTL=60) as queue:
        await queue.create("p", "m", "T2", title="t")
        assert (await queue.policy())["claimTTL"] == 60
    async with made(server, defaults__claimTTL=90) as queue:
        await queue.create("p", "m", "T3", title="t")
        assert (await queue.policy())["claimTTL"] == 60


@anyio
async def test_status_and_policy_show_what_differs_and_apply_ends_it(
    server: Server, db: redis.Redis
) -> None:
    async with made(server, defaults__maxRetries=5) as queue:
        await queue.create("p", "m", "T1", title="t")
    same = {"defaults__claimTTL": 3600}
    other = {"defaults__maxRetries": 1, "lanes__coding__maxConcurrent": 1}
    async with made(server, **same, **other) as queue:
        expected = ["maxRetries", "lanes.coding.maxConcurrent"]
        assert (await queue.policy())["differs"] == expected
        assert (await mq.status(queue))["projects"][0]["policy"]["differs"] == expected
        applied = await queue.policy(apply=True)
        assert (applied["maxRetries"], applied["lanes"]["coding"]) == (1, 1)
        assert applied["differs"] == []
        assert (await mq.status(queue))["projects"][0]["policy"]["differs"] == []
    async with made(server) as queue:
        assert (await queue.policy())["maxRetries"] == 1


def test_the_commands_show_it_too(
    files: Files, command: Command, server: Server, db: redis.Redis
) -> None:
    at = ("--url", server.url, "--project", "p")
    assert command("create", "p", "m", "T1", "--title", "t", *at)[0] == 0
    files.user("defaults:\n  deadLetterAfter: 9\nlanes:\n  review:\n    maxConcurrent: 2\n")
    assert "differs" in command("status", *at)[1]
    assert "deadLetterAfter" in command("status", *at)[1]
    assert "deadLetterAfter, lanes.review.maxConcurrent" in command("policy", *at)[1]
    status, out, _ = command("policy", "--apply", "--json", *at)
    assert (status, json.loads(out)["deadLetterAfter"]) == (0, 9)
    assert json.loads(out)["lanes"]["review"] == 2
    assert "differs" not in command("status", *at)[1]


@anyio
async def test_a_lane_is_never_taken_away(server: Server, db: redis.Redis) -> None:
    async with made(server, lanes__review__maxConcurrent=2) as queue:
        await queue.create("p", "m", "T1", title="t", lane="review")
    async with made(server, lanes__coding__maxConcurrent=1) as queue:
        lanes = (await queue.policy(apply=True))["lanes"]
        assert {"any", "planning", "coding", "review"} == set(lanes)
        assert lanes["coding"] == 1


@anyio
@pytest.mark.parametrize(("more", "fits"), [(29, True), (30, False)])
async def test_a_project_has_at_most_32_lanes(
    server: Server, db: redis.Redis, more: int, fits: bool
) -> None:
    """any, planning and coding are three of them."""
    async with made(server, **{f"lanes__lane{i}__maxConcurrent": 1 for i in range(more)}) as queue:
        before = key_space(server)
        if fits:
            assert len((await queue.policy(apply=True))["lanes"]) == 32
            return
        for call in (queue.policy(apply=True), queue.create("p", "m", "T1", title="t")):
            with pytest.raises(mq.Refused, match="33 lanes; accepted: up to 32") as refused:
                await call
            assert refused.value.code == "TOO_LARGE"
        after = key_space(server)
        after.pop(mq.REGISTRY.encode(), None)  # a name there is a hint, and no project
        assert after == before


@anyio
@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("defaults__claimTTL", 0),
        ("defaults__claimTTL", 8 * 24 * 3600),
        ("defaults__deadLetterAfter", 0),
        ("defaults__retryDelay", 8 * 24 * 3600),
        ("lanes__coding__maxConcurrent", 0),
        ("lanes__coding__maxConcurrent", 10**7),
    ],
)
async def test_limits_out_of_range_are_refused(
    server: Server, db: redis.Redis, key: str, value: int
) -> None:
    async with made(server, **{key: value}) as queue:
        before = key_space(server)
        with pytest.raises(mq.Refused, match=f"is {value}; accepted") as refused:
            await queue.policy(apply=True)
        assert refused.value.code == "INVALID"
        assert key_space(server) == before
