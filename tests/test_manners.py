"""The project's promises about itself: headers tell the truth, tables agree with the code.

`python tests/test_manners.py` writes the README's tables anew.
"""

from __future__ import annotations

import ast
import bisect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import mosaic_queue as mq

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
SCRIPTS = sorted(p for p in (ROOT / "lua/v1").glob("*.lua") if p.stem not in mq.PRELUDE)
PRELUDE = "".join((ROOT / f"lua/v1/{part}.lua").read_text() for part in mq.PRELUDE)


def functions() -> dict[str, str]:
    """The prelude's functions by name, with their text."""
    found = re.findall(r"^local function (\w+)(.*?)^end$", PRELUDE, re.MULTILINE | re.DOTALL)
    return {name: re.sub(r"--.*", "", body) for name, body in found}


def reached(text: str) -> set[str]:
    """The names of the prelude's functions that a text calls, by whatever way."""
    known, names, todo = functions(), set(), [text]
    while todo:
        for name in re.findall(r"\b(\w+)\(", todo.pop()):
            if name in known and name not in names:
                names.add(name)
                todo.append(known[name])
    return names


def code(path: Path) -> str:
    return re.sub(r"--.*", "", path.read_text())


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_header_tells_the_truth(path: Path) -> None:
    """Name, arguments and refusals of the header are those of the code."""
    text, body = path.read_text(), code(path)
    assert text.startswith(f"-- {path.name} -- ")
    for entry in ("State", "Args", "Returns", "Rejects", "Emits"):
        assert mq.header(text, entry), f"{path.name} has no {entry}"
    names = reached(body)
    whole = body + "".join(functions()[name] for name in names)
    used = set(re.findall(r"\barg\.(\w+)", whole)) | set(re.findall(r"\bnew\.(\w+)", body))
    args = {*mq.header(text, "Args"), *mq.header(text, "Each")}
    assert {arg for arg in args if arg not in used} == set(), "arguments that nobody reads"
    own = set(re.findall(r"\barg\.(\w+)", body))
    assert own <= args, "arguments that the header does not have"
    rejects = set(re.findall(r"reject\('(\w+)'", whole))
    optional = {"NOT_FOUND"} if path.stem == "restore" else set()  # it makes the project
    assert set(mq.header(text, "Rejects")) == rejects - optional
    if "no-writes" in mq.header(text, "Flags"):
        assert "write(" not in re.sub(r"local function.*?\nend", "", body)


def test_refusal_codes_are_a_closed_list() -> None:
    lua = PRELUDE + "".join(path.read_text() for path in SCRIPTS)
    codes = set(re.findall(r"reject\('(\w+)'", lua))
    assert codes <= set(mq.CODES)
    module = Path(mq.__file__).read_text()
    assert {*codes, *re.findall(r'Refused\(\s*"(\w+)"', module)} <= set(mq.CODES)


def test_key_dictionary_is_complete() -> None:
    """Every key that a script makes stands in the dictionary at the top of the prelude."""
    lua = PRELUDE + "".join(path.read_text() for path in SCRIPTS)
    kinds = set(re.findall(r"key\('(\w+)'", lua)) | set(re.findall(r"root \.\. ':(\w+)", lua))
    listed = set(re.findall(r"^--   <root>:(\w+)", PRELUDE, re.MULTILINE))
    assert kinds <= listed


def test_every_script_is_an_operation() -> None:
    module = Path(mq.__file__).read_text()
    for path in SCRIPTS:
        assert re.search(rf'\b(?:call|_change|_claim)[(,]\s*"{path.stem}"', module), path.stem


def test_import_brings_no_third_party_package() -> None:
    program = (
        "import sys; import mosaic_queue; "
        "print(*{m.split('.')[0] for m in sys.modules} & {'redis','mcp','anyio','yaml','asyncio'})"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == ""


def test_arguments_are_all_in_use() -> None:
    used = {name for of in mq.OPERATIONS.values() for name in of.parameters}
    assert used == set(mq.ARGUMENTS)


def test_a_task_has_the_fields_of_the_table() -> None:
    """In the same order; what no status shows is the hash's own."""
    assert [*mq.Task.__annotations__] == [name for name, one in mq.FIELDS.items() if one.shown]


def test_sections_stand_in_the_order_of_the_docstring() -> None:
    module = Path(mq.__file__).read_text()
    banners = re.findall(r"^# ==== ([A-Z ]+?) =+$", module, re.MULTILINE)
    docstring = mq.__doc__ or ""
    listed = re.findall(r"^    ([A-Z]+(?: [A-Z]+)?)  +\w", docstring, re.MULTILINE)
    assert banners == listed


def names_bound(node: ast.stmt) -> list[str]:
    """The names that a statement binds, in a tuple too."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return [node.name]
    targets = getattr(node, "targets", [getattr(node, "target", None)])
    return [
        one.id for target in filter(None, targets) for one in ast.walk(target)
        if isinstance(one, ast.Name) and isinstance(one.ctx, ast.Store)
    ]  # fmt: skip


SOURCES = sorted([Path(mq.__file__), *(ROOT / "tests").rglob("*.py")])


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_no_name_is_bound_twice(path: Path) -> None:
    """A second one of a name would take the place of the first without a word from any linter."""
    body = [one for one in ast.parse(path.read_text()).body if not isinstance(one, ast.AugAssign)]
    names = [name for node in body for name in names_bound(node)]
    assert sorted({name for name in names if names.count(name) > 1}) == []


def test_no_chapter_names_a_later_one() -> None:
    """What a chapter needs stands above it, so that a reader who goes on reading has met it."""
    text = Path(mq.__file__).read_text()
    starts = [i for i, line in enumerate(text.splitlines(), 1) if line.startswith("# ==== ")]
    body = ast.parse(text).body
    home: dict[str, int] = {}
    for node in body:
        for name in names_bound(node):
            home.setdefault(name, bisect.bisect(starts, node.lineno))
    later = []
    for node in body:
        here = bisect.bisect(starts, node.lineno)
        inner = list(ast.walk(node))
        own = {one.arg for one in inner if isinstance(one, ast.arg)}
        own |= {one.id for one in inner
                if isinstance(one, ast.Name) and isinstance(one.ctx, ast.Store)}  # fmt: skip
        own |= {one.name for one in inner if isinstance(one, ast.FunctionDef)} - set(home)
        for one in inner:
            if isinstance(one, ast.Name) and one.id not in own and home.get(one.id, 0) > here:
                later.append(f"line {one.lineno}: {one.id}")
    assert later == []


def test_the_machine_is_drawn_with_its_statuses() -> None:
    """The picture in the docstring has every status, and scripts move between no others."""
    picture = (mq.__doc__ or "").partition("The module has three parts")[0]
    assert all(status in picture for status in mq.STATUSES)
    words = {"any", "gone", "project", "with", "force", "also", "resume", "of", "the", "same"}
    for path in SCRIPTS:
        state = " ".join(mq.header(path.read_text(), "State")).replace("(unchanged)", "")
        for part in re.findall(r"[\w-]+(?= ->)|(?<=-> )[\w-]+", state):
            assert part in {*mq.STATUSES, *words, "-"}, (path.name, part)


def commands_table() -> str:
    rows = ["| command | what it does | MCP tool |", "|---|---|---|"]
    for of in mq.OPERATIONS.values():
        tool = f"`queue_{of.name}`" if of.tool else ""
        if of.tool == "orchestrator":
            tool += " (orchestrator)"
        rows.append(f"| `{of.command}` | {of.summary} | {tool} |")
    return "\n".join(rows)


def refusals_table() -> str:
    rows = ["| code | exit | HTTP | what to do |", "|---|---|---|---|"]
    for code, outcome in mq.CODES.items():
        refused = mq.Refused(code, "").about("", {"task": "TASK"}, mq.SHELL)
        rows.append(f"| {code} | {outcome.exit} | {outcome.http} | {refused.hint} |")
    return "\n".join(rows)


def words_table() -> str:
    """The meanings of status words; of other languages the first word each."""
    what = {
        "open": "pending, or waiting for dependencies",
        "under way": "claimed; where the queue knows of no claim: blocked by hand",
        "in review": "the same",
        "finished": "completed",
        "set aside": "blocked by hand, with the word as the reason",
        "blocked": "blocked by hand",
        "failed": "a dead letter",
        "deleted": "the queue has no such task any more",
    }
    rows = ["| meaning | in the queue | words |", "|---|---|---|"]
    for meaning, task in what.items():
        english, *others = (words.get(meaning, "") for words in mq.STATUS_WORDS.values())
        known = [*english.split(","), *(words.partition(",")[0] for words in others)]
        signs = [*mq.SIGNS.get(meaning, "")]
        boxes = [f"`[{box}]`" for box, of in mq.BOXES.items() if of == meaning]
        said = [" ".join(word.split()) for word in known if word.strip()]
        rows.append(f"| {meaning} | {task} | {', '.join([*said, *signs, *boxes])} |")
    return "\n".join(rows)


TABLES = {"commands": commands_table, "refusals": refusals_table, "words": words_table}


@pytest.mark.parametrize("name", TABLES)
def test_readme_tables_are_made_from_the_code(name: str) -> None:
    found = re.search(rf"<!-- {name} -->\n(.*?)\n?<!-- /{name} -->", README.read_text(), re.DOTALL)
    assert found
    assert found[1] == TABLES[name](), "run python tests/test_manners.py"


if __name__ == "__main__":
    text = README.read_text()
    for name, made in TABLES.items():
        text = re.sub(
            rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)",
            lambda found, made=made: f"{found[1]}{made()}\n{found[2]}",
            text,
            flags=re.DOTALL,
        )
    README.write_text(text)
