"""The zipapp, built from this checkout: what is in it, which Pythons it lets in, how it unpacks.

Nothing is skipped where a Python is missing: the tests go over those that are there, and the one
that runs them always is.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import time
import tomllib
import urllib.request
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).parent.parent
MINORS = (11, 12, 13, 14)
NATIVE = (
    "_cffi_backend", "asyncpg/pgproto/pgproto", "asyncpg/protocol/protocol",
    "asyncpg/protocol/record", "hiredis/hiredis", "pydantic_core/_pydantic_core", "rpds/rpds",
    "yaml/_yaml",
)  # fmt: skip
IMPORTS_ALL = """
import importlib, pathlib, sys
site = pathlib.Path(sys.argv[1])
sys.path[:] = [str(site)] + [p for p in sys.path if not p.endswith("-packages")]
native = [str(file.relative_to(site)) for file in site.rglob("*.so")]
for name in native:
    importlib.import_module(name.split(".")[0].replace("/", "."))
for name in "hiredis mcp.server.stdio mcp.server.streamable_http_manager mcp.client.stdio " \\
        "mcp.client.streamable_http uvicorn asyncpg markdown_it".split():
    importlib.import_module(name)
import yaml
assert yaml.__with_libyaml__
print(len(native))
"""


def pythons() -> dict[tuple[int, ...], str]:
    """A Python of each version that is here: on PATH, of pyenv, and the one that runs this."""
    folders = [Path(folder) for folder in os.environ["PATH"].split(os.pathsep)]
    folders += sorted(Path("~/.pyenv/versions").expanduser().glob("*/bin"))
    found = [
        path for folder in folders for path in folder.glob("python[23]*")
        if re.fullmatch(r"python[23]\.\d+", path.name)
    ]  # fmt: skip
    those = {}
    for python in [sys.executable, *map(str, found)]:
        asked = "import sys; sys.stdout.write('%d %d' % sys.version_info[:2])"
        said = subprocess.run([python, "-c", asked], capture_output=True, text=True, check=False)
        if said.returncode == 0:  # pyenv has names for Pythons that are not chosen
            those.setdefault(tuple(int(n) for n in said.stdout.split()), python)
    return those


PYTHONS = pythons()
FIT = [python for version, python in PYTHONS.items() if (3, 11) <= version <= (3, 14)]
UNFIT = [python for version, python in PYTHONS.items() if not (3, 11) <= version <= (3, 14)]


@pytest.fixture(scope="module")
def builds(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two builds at once, from two folders and with two umasks."""
    folder = tmp_path_factory.mktemp("zipapp")
    copy = folder / "a copy"
    shutil.copytree(REPOSITORY / "zipapp", copy / "zipapp")
    shutil.copytree(REPOSITORY / "lua", copy / "lua")
    for name in ("mosaic_queue.py", "pyproject.toml", "README.md"):
        shutil.copy(REPOSITORY / name, copy)
    environ = os.environ | {"PYTHON": sys.executable}
    running = []
    for source, umask, output in (REPOSITORY, 0o022, "one"), (copy, 0o077, "two"):
        command = [source / "zipapp/build.sh", "--output", folder / f"{output}.pyz"]
        running.append(
            subprocess.Popen(
                command, env=environ, umask=umask, text=True,
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            )
        )  # fmt: skip
    for process in running:
        said, _ = process.communicate()
        assert process.returncode == 0, said
        assert re.search(r"\.pyz: \d+\.\d MB, unpacked \d+\.\d MB, sha256 [0-9a-f]{64}\n", said)
    return folder / "one.pyz", folder / "two.pyz"


CLIENT = """
from mosaic_queue import Queue, Refused, Task, load_config
async def work() -> str:
    async with Queue(load_config()) as queue:
        task: Task = await queue.claim("T1", "alice", project="web")
        try:
            await queue.complete({task}, project="web", summary=task["title"])
        except Refused as no:
            return no.code + no.hint
        return task["taskId"]
"""


def test_the_wheel_is_typed_and_carries_its_licence(tmp_path: Path) -> None:
    """A client of the installed wheel passes mypy --strict, and a wrong argument does not."""
    pip = [sys.executable, "-m", "pip", "-q", "--disable-pip-version-check"]
    subprocess.run([*pip, "wheel", "--no-deps", "-w", tmp_path, REPOSITORY], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (text,) = (name for name in archive.namelist() if name.endswith("LICENSE"))
        assert b"MIT License" in archive.read(text)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv"], check=True)
    python = tmp_path / "venv/bin/python"
    subprocess.run([*pip, "--python", python, "install", "--no-deps", wheel], check=True)
    for task, expected in ("task['taskId']", 0), ("task['fence']", 1):
        (tmp_path / "client.py").write_text(CLIENT.replace("{task}", task))
        done = subprocess.run(
            [sys.executable, "-m", "mypy", "--strict", "--python-executable", python, "client.py"],
            cwd=tmp_path, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == expected, done.stdout
        assert ('"int"; expected "str"' in done.stdout) is bool(expected)


@pytest.fixture(scope="module")
def pyz(builds: tuple[Path, Path]) -> Path:
    return builds[0]


@pytest.fixture(scope="module")
def unpacked(pyz: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tree of the Python that runs this; who changes it works on a copy."""
    base = tmp_path_factory.mktemp("unpacked")
    assert run(pyz, "version", SHIV_ROOT=base).returncode == 0
    return tree_in(base / "mosaic-queue")


@pytest.fixture
def root(unpacked: Path, tmp_path: Path) -> Path:
    """A $SHIV_ROOT with a tree of this build in it, last used two days ago."""
    shutil.copytree(unpacked.parent, tmp_path / "mosaic-queue", copy_function=os.link)
    (tmp_path / "mosaic-queue").chmod(0o700)
    age(tree_in(tmp_path / "mosaic-queue"), 2)
    return tmp_path


def start(
    pyz: Path, *words: str, python: str = sys.executable, **environ: Any
) -> subprocess.Popen[str]:
    clean = {"PATH": os.environ["PATH"], "HOME": "/proc/nowhere"}
    return subprocess.Popen(
        [python, str(pyz), *words], env=clean | {k: str(v) for k, v in environ.items()}, text=True,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def run(pyz: Path, *words: str, **more: Any) -> subprocess.CompletedProcess[str]:
    process = start(pyz, *words, **more)
    out, err = process.communicate(timeout=120)
    return subprocess.CompletedProcess(words, process.returncode, out, err)


def tree_in(root: Path) -> Path:
    """The one tree in an unpack root, which holds nothing else but the lock."""
    assert root.stat().st_mode & 0o777 == 0o700
    tree, lock = sorted(root.iterdir())
    assert lock.name == "lock"
    assert re.fullmatch(r"[0-9a-f]{16}-cpython-3\d+", tree.name)
    return tree


def age(path: Path, days: float) -> None:
    then = time.time() - days * 24 * 3600
    os.utime(path, (then, then))


def hook(folder: Path, text: str) -> Path:
    """A folder for PYTHONPATH that runs the text in every Python that starts."""
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(text)
    return folder


# ---- what is in it ----


def test_two_builds_are_equal(builds: tuple[Path, Path]) -> None:
    one, two = builds
    assert one.read_bytes() == two.read_bytes()


def test_it_holds_what_is_used_and_no_more(pyz: Path) -> None:
    assert pyz.stat().st_size <= 25e6
    with zipfile.ZipFile(pyz) as archive:
        assert sum(entry.file_size for entry in archive.infolist()) <= 70e6
        names = [name.removeprefix("site-packages/") for name in archive.namelist()]
    for native in NATIVE:
        versions = [n for n in names if n.startswith(f"{native}.cpython-")]
        assert [n.split(".cpython-")[1].split("-")[0] for n in sorted(versions)] == [
            f"3{minor}" for minor in MINORS
        ]
    libraries = [name for name in names if name.endswith(".so")]
    assert len(libraries) == len(NATIVE) * len(MINORS) + 1, "one more is for all Pythons"
    assert "mosaic_queue_lua/v1/plumbing.lua" in names
    assert sum(name.endswith("/valkey-server") for name in names) == 1
    unwanted = re.compile(
        r"(^|/)(tests?|__pycache__|sboms)/|(^|/)test_|\.(pyc|pyi|pyx|pxd|h|c)$|/(RECORD|WHEEL|"
        r"INSTALLER|REQUESTED|direct_url\.json)$|^(valkey|pycparser|cffi|pip|setuptools)/"
    )
    assert [name for name in names if unwanted.search(name)] == []


def test_the_lock_pins_every_dependency_for_every_platform() -> None:
    text = (REPOSITORY / "zipapp/requirements.lock").read_text()
    entries = text.replace("\\\n", " ").splitlines()
    assert all(re.match(r"[a-z0-9-]+==\S+ .*--hash=sha256:[0-9a-f]{64}", one) for one in entries)
    assert "://" not in text
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    for dependency in project["dependencies"]:
        name = re.split(r"[\[<>=~! ]", dependency)[0].lower()
        assert any(one.startswith(f"{name}==") for one in entries), f"zipapp/lock.sh: {name}"


# ---- which host it runs on ----


@pytest.mark.parametrize("python", FIT)
def test_it_runs_on_each_python(pyz: Path, tmp_path: Path, python: str) -> None:
    said = run(pyz, "version", python=python, HOME=tmp_path)
    assert (said.returncode, said.stderr) == (0, "")
    tree = tree_in(tmp_path / ".shiv/mosaic-queue")
    site = tree / "site-packages"
    command = [python, "-c", IMPORTS_ALL, str(site)]
    assert subprocess.check_output(command, text=True) == f"{len(NATIVE) + 1}\n"
    # Nothing is left to compile: a tree that can only be read is as fast.
    tag = re.sub(r".*-cpython", "cpython", tree.name)
    for source in site.rglob("*.py"):
        assert (source.parent / f"__pycache__/{source.stem}.{tag}.pyc").exists(), source


@pytest.mark.parametrize("python", UNFIT or [sys.executable])
def test_another_python_is_refused_in_a_sentence(pyz: Path, tmp_path: Path, python: str) -> None:
    if not UNFIT:  # what they would see is tested below, without one
        pyz = for_another(pyz, tmp_path / "other.pyz")
    said = run(pyz, "version", python=python, HOME=tmp_path / "home")
    assert (said.returncode, said.stdout) == (2, "")
    assert re.fullmatch(r"mosaic-queue\.pyz runs on CPython 3\.11, 3\.12.*\n", said.stderr)
    assert not (tmp_path / "home").exists()


def for_another(pyz: Path, made: Path) -> Path:
    """The front of the zipapp, as a build for a Mac or, there, for Linux would have it."""
    with zipfile.ZipFile(pyz) as archive, zipfile.ZipFile(made, "w") as other:
        main = archive.read("__main__.py").decode()
        platform = "linux-x86_64" if sys.platform == "darwin" else "macos-arm64"
        changed = re.sub(r'^PLATFORM = "[^"]*"', f'PLATFORM = "{platform}"', main, flags=re.M)
        assert changed != main
        other.writestr("__main__.py", changed)
    return made


def test_another_platform_is_refused_in_a_sentence(pyz: Path, tmp_path: Path) -> None:
    said = run(for_another(pyz, tmp_path / "other.pyz"), "version", HOME=tmp_path / "home")
    assert (said.returncode, said.stdout) == (2, "")
    assert said.stderr.startswith("mosaic-queue.pyz runs on CPython 3.11, 3.12, 3.13 and 3.14 for ")
    assert said.stderr.count("\n") == 1
    assert not (tmp_path / "home").exists()


@pytest.fixture
def front(pyz: Path, tmp_path: Path) -> dict[str, Any]:
    """The names of the zipapp's __main__.py."""
    with zipfile.ZipFile(pyz) as archive:
        (tmp_path / "front.py").write_bytes(archive.read("__main__.py"))
    return runpy.run_path(str(tmp_path / "front.py"))


@pytest.mark.parametrize("changed", [
    ("cpython", (3, 10, 13)), ("cpython", (3, 15, 0)), ("cpython", (2, 7, 18)),
    ("pypy", (3, 11, 13)), ("cpython", (3, 13, 1), "t"), ("cpython", (3, 12, 1), "d"),
    ("cpython", (3, 12, 1), "", "freebsd-amd64"), ("cpython", (3, 12, 1), "", "win32-?"),
    ("cpython", (3, 12, 1), "", "linux-x86_64-32-bit"),
    ("cpython", (3, 12, 1), "", None, "musl 0"), ("cpython", (3, 12, 1), "", None, "glibc 2.17"),
    ("cpython", (3, 12, 1), "", None, "darwin 19.6.0"),
])  # fmt: skip
def test_whom_the_front_refuses(front: dict[str, Any], changed: tuple[Any, ...]) -> None:
    host = front["host"]()
    assert front["refusal"](*host) is None
    faked = [new or old for new, old in zip(changed, host, strict=False)]
    said = front["refusal"](*faked, *host[len(faked) :])
    assert re.fullmatch(r"mosaic-queue\.pyz runs on CPython 3\.11, .*; \S+ is \S+ \S+ for .*", said)


def test_whom_the_front_lets_in(front: dict[str, Any]) -> None:
    _, _, _, platform, libc = front["host"]()
    for minor in MINORS:
        assert front["refusal"]("cpython", (3, minor, 0), "", platform, libc) is None


def test_the_smoke_test_passes(pyz: Path) -> None:
    environ = os.environ | {"PYTHON": sys.executable}
    smoke = [REPOSITORY / "zipapp/smoke.sh", pyz]
    done = subprocess.run(smoke, env=environ, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith("smoke: ok\n")


# ---- how it unpacks ----


def test_it_serves_the_board(pyz: Path, tmp_path: Path) -> None:
    url = f"unix://{tmp_path}/nobody"  # the page needs no queue
    process = start(pyz, "serve", "--port", "0", XDG_DATA_HOME=tmp_path, MOSAIC_VALKEY_URL=url)
    try:
        assert process.stderr
        line = next(line for line in process.stderr if "http://" in line)
        with urllib.request.urlopen(line.split()[-1] + "/") as page:
            assert page.read().startswith(b"<!doctype html>")
    finally:
        process.kill()
        process.communicate()


@pytest.mark.long
def test_20_first_runs_at_once_unpack_once(pyz: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    counting = hook(tmp_path / "hook", f"""
import compileall
real = compileall.compile_dir
def counted(*words, **more):
    open({str(log)!r}, "a").write("once ")
    return real(*words, **more)
compileall.compile_dir = counted
""")  # fmt: skip
    more = {"SHIV_ROOT": tmp_path / "root", "PYTHONPATH": counting}
    running = [start(pyz, "version", **more) for _ in range(20)]
    for process in running:
        out, err = process.communicate(timeout=120)
        assert (process.returncode, err) == (0, "")
        assert out.startswith("mosaic-queue ")
    assert log.read_text() == "once "
    tree_in(tmp_path / "root/mosaic-queue")


@pytest.mark.long
def test_an_unpacking_that_was_killed_is_made_good(pyz: Path, tmp_path: Path) -> None:
    killing = hook(tmp_path / "hook", """
import os, zipfile
real, calls = zipfile.ZipFile.extract, []
def extract(*words, **more):
    calls.append(1)
    if len(calls) == 700:
        os.kill(os.getpid(), 9)
    return real(*words, **more)
zipfile.ZipFile.extract = extract
""")  # fmt: skip
    root = tmp_path / "mosaic-queue"
    assert run(pyz, "version", SHIV_ROOT=tmp_path, PYTHONPATH=killing).returncode == -9
    (half,) = root.glob("*.tmp")
    assert not half.with_suffix("").exists()
    said = run(pyz, "version", SHIV_ROOT=tmp_path)
    assert (said.returncode, said.stderr) == (0, "")
    tree_in(root)


def test_no_home_to_write_to(pyz: Path, tmp_path: Path) -> None:
    said = run(pyz, "version", TMPDIR=tmp_path)
    assert (said.returncode, said.stderr) == (0, "")
    tree_in(tmp_path / f"mosaic-queue-{os.geteuid()}")


def test_where_it_looks(front: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def set_all(**environ: str) -> list[str]:
        for name in ("SHIV_ROOT", "HOME", "XDG_CACHE_HOME", "TMPDIR"):
            monkeypatch.setenv(name, environ.get(name, ""))
        return list(front["roots"]())

    mine = f"mosaic-queue-{os.geteuid()}"
    last = [f"/tmp/{mine}", f"/var/tmp/{mine}"]
    assert set_all(HOME="/h", XDG_CACHE_HOME="/c", TMPDIR="/t") == [
        "/h/.shiv/mosaic-queue", "/c/mosaic-queue", f"/t/{mine}", *last
    ]  # fmt: skip
    assert set_all(HOME="/h", SHIV_ROOT="~/s") == ["/h/s/mosaic-queue"], "and nowhere else"
    assert set_all(HOME="no/path", XDG_CACHE_HOME="nor/this") == last


def test_a_folder_of_somebody_else_is_not_used(pyz: Path, root: Path) -> None:
    folder = root / "mosaic-queue"
    for mode in (0o777, 0o770, 0o755):
        folder.chmod(mode)
        said = run(pyz, "version", SHIV_ROOT=root)
        assert (said.returncode, said.stdout) == (2, "")
        why = "is not a folder of this user's alone"
        assert said.stderr == f"mosaic-queue.pyz cannot be unpacked to {folder}: {why}\n"
    folder.chmod(0o700)
    assert run(pyz, "version", SHIV_ROOT=root).returncode == 0
    folder.rename(root / "elsewhere")
    folder.symlink_to("elsewhere")
    assert run(pyz, "version", SHIV_ROOT=root).returncode == 2
    if os.geteuid() == 0:
        folder.unlink()
        (root / "elsewhere").rename(folder)
        os.chown(folder, 65534, 65534)
        assert run(pyz, "version", SHIV_ROOT=root).returncode == 2


# ---- what it leaves ----


@pytest.fixture
def held(root: Path) -> Iterator[Path]:
    """An old tree with a process in it that goes on."""
    tree = root / "mosaic-queue" / ("b" * 16 + "-cpython-312")
    tree.mkdir()
    folder = os.open(tree, os.O_RDONLY)
    fcntl.flock(folder, fcntl.LOCK_SH)
    yield tree
    os.close(folder)


def test_trees_unused_for_30_days_are_removed(pyz: Path, root: Path, held: Path) -> None:
    folder = root / "mosaic-queue"
    (own,) = [path for path in folder.glob("*-cpython-*") if path != held]

    def make(name: str, days: float) -> Path:
        (folder / name / "site-packages").mkdir(parents=True)
        (folder / name / "site-packages/module.py").touch()
        age(folder / name, days)
        return folder / name

    age(held, 40)
    gone = [make("a" * 16 + "-cpython-311", 31), make("c" * 16 + "-cpython-311.old", 0),
            make("d" * 16 + "-cpython-311.tmp", 0)]  # fmt: skip
    stays = [own, held, make("e" * 16 + "-cpython-311", 29), make("mine", 99), make("f" * 64, 99),
             make("ab-cpython-311", 99)]  # fmt: skip
    outside = make("../" + "a" * 16 + "-cpython-311", 99)
    (folder / ("9" * 16 + "-cpython-311")).symlink_to(outside)

    with (folder / "lock").open("w") as lock:  # somebody else unpacks
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert run(pyz, "version", SHIV_ROOT=root).returncode == 0
    assert all(path.exists() for path in [*gone, *stays])

    age(own, 2)
    said = run(pyz, "version", SHIV_ROOT=root)
    assert (said.returncode, said.stderr) == (0, "")
    assert not any(path.exists() for path in gone)
    assert all(path.exists() for path in [*stays, outside / "site-packages/module.py"])

    # Once a day is enough.
    noted = own.stat().st_mtime_ns
    old = make("a" * 16 + "-cpython-311", 31)
    assert run(pyz, "version", SHIV_ROOT=root).returncode == 0
    assert old.exists()
    assert own.stat().st_mtime_ns == noted


def test_a_running_program_keeps_its_tree(pyz: Path, root: Path) -> None:
    own = tree_in(root / "mosaic-queue")
    server = subprocess.Popen(
        [sys.executable, str(pyz), "mcp"], env={"HOME": str(root), "SHIV_ROOT": str(root)},
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    assert server.stdin is not None
    assert server.stdout is not None
    hello = {"protocolVersion": "2025-06-18", "capabilities": {},
             "clientInfo": {"name": "t", "version": "1"}}  # fmt: skip
    request = {"jsonrpc": "2.0", "id": 1, "method": "initialize", "params": hello}
    server.stdin.write(json.dumps(request).encode() + b"\n")
    server.stdin.flush()
    assert json.loads(server.stdout.readline())["id"] == 1
    folder = os.open(own, os.O_RDONLY)
    with pytest.raises(BlockingIOError):
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    server.communicate()
    fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.close(folder)
