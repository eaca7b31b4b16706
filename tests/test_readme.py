"""The README: its console blocks run in the order in which they stand, as one newcomer types them.

A line that begins with `$ ` is a command; the lines below it are what it prints.  `...` stands for
anything, and times, lengths of time, paths and ages are as they come.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

README = Path(__file__).parent.parent / "README.md"
PROGRAM = Path(sys.executable).parent / "mosaic-queue"
COMES = {  # what is another each time
    r"\.\.\.": r"(?s:.*?)",
    r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ": r"\S+",
    r"\(\d+ \w+ (?:ago|from now)\)": r"\(\d+ \w+ (?:ago|from now)\)",
    r"/home/me/site": r"\S+",
    r"\b\d+ s\b": r"\d+ s",
    r" +": r" +",
}


def commands(text: str) -> list[tuple[str, list[str]]]:
    """The commands of all console blocks, each with the lines that it prints."""
    found: list[tuple[str, list[str]]] = []
    for block in re.findall(r"^```console\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        for line in block.splitlines():
            if line.startswith("$ "):
                found.append((line[2:], []))
            else:
                found[-1][1].append(line)
    return found


def pattern(lines: list[str]) -> str:
    """What a command has to print, as a regular expression."""
    parts = re.split(f"({'|'.join(COMES)})", "\n".join(lines))
    comes = [
        next((to for what, to in COMES.items() if re.fullmatch(what, part)), re.escape(part))
        for part in parts
    ]
    return "".join(comes).replace("\\\n", r"\s*") + r"\s*"


@pytest.fixture
def home(tmp_path: Path) -> Iterator[dict[str, str]]:
    """The environment of a newcomer who has installed the program; Valkey comes with it."""
    path = f"{PROGRAM.parent}:{os.environ['PATH']}"
    environ = {"PATH": path, "HOME": str(tmp_path), "LANG": "C.UTF-8", "USER": "me"}
    yield environ
    subprocess.run([PROGRAM, "server", "stop"], env=environ, cwd=tmp_path, check=False,
                   capture_output=True)  # fmt: skip


def test_its_console_blocks_run_in_order(home: dict[str, str], tmp_path: Path) -> None:
    told = commands(README.read_text())
    assert len(told) > 20
    exports = ""
    for command, lines in told:
        done = subprocess.run(
            ["bash", "-c", exports + command], env=home, cwd=tmp_path, text=True, timeout=60,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False,
        )  # fmt: skip
        exports += f"{command}\n" * command.startswith("export ")
        out = re.sub(r"^mosaic-queue: a private Valkey lives in .*\n", "", done.stdout)
        assert "Traceback" not in out
        refused = any(re.match(r"[A-Z_]+: ", line) for line in lines)
        assert (done.returncode == 0) != refused, f"{command}\n{out}"
        assert re.fullmatch(pattern(lines), out), f"{command}\n{out}\n{pattern(lines)}"


def test_its_commands_are_commands() -> None:
    """Every `mosaic-queue` line of every block names a command and flags that there are."""
    import shlex

    import mosaic_queue as mq

    blocks = re.findall(r"^```(?:bash|console)\n(.*?)^```", README.read_text(), re.M | re.S)
    lines = [line for block in blocks for line in block.splitlines()]
    named = [found[1] for line in lines if (found := re.match(r"(?:\$ )?mosaic-queue (.*)", line))]
    assert len(named) > 40
    for line in named:
        words = shlex.split(re.split(r" \|\| | > ", line)[0], comments=True)
        if words[0] != "help":
            of, rest = mq.operation_of(words)
            mq.make_parser(of, "mosaic-queue").parse_args(rest)


def test_its_contents_list_names_every_chapter() -> None:
    text = re.sub(r"^```.*?^```", "", README.read_text(), flags=re.M | re.S)
    head, _, body = text.partition("\n## ")
    links = dict(re.findall(r"\[([^]]+)\]\(#([^)]+)\)", head))
    chapters = re.findall(r"^##+ (.*)$", "## " + body, re.M)
    assert [*links] == chapters
    for name, anchor in links.items():
        assert anchor == re.sub(r"[^a-z0-9 _-]", "", name.lower()).replace(" ", "-")
    for anchor in re.findall(r"\]\(#([^)]+)\)", body):
        assert anchor in links.values(), anchor


def test_every_guarantee_names_its_test() -> None:
    """Where a cell of the table of guarantees says yes, a test of that name stands behind it."""
    part = README.read_text().partition("## What it guarantees")[2].partition("\n## ")[0]
    rows = [line.strip("| ").split(" | ") for line in part.splitlines() if line.startswith("| ")]
    named = set(re.findall(r"`(test_\w+)`", part))
    code = "".join(path.read_text() for path in Path(__file__).parent.glob("test_*.py"))
    assert named - set(re.findall(r"^(?:async )?def (test_\w+)", code, re.MULTILINE)) == set()
    bare = [cell for row in rows[1:] for cell in row[1:] if "yes" in cell and "`test_" not in cell]
    assert (len(rows) > 5, bare) == (True, [])
