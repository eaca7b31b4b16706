"""Task tables: what is read of a document, and that nothing but a changed cell ever changes."""

from __future__ import annotations

import difflib
import re
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt

import mosaic_queue as mq

# The columns, words and oddities of the files that people keep.
FOURTEEN = """# Tasks — demo v0.0.1

| id | status | description | issue | repo | branch | depends_on | blocks | agent | started_at \
| completed_at | estimate | used | notes |
|---|---|---|---|---|---|---|---|---|---|---|---|---|---|
| D-1 | not-started | Trace the path: a → b | TASKS:P1 | r | fix/x | | D-2 | | | | 15K | | |
| D-2 | not-started | Write the failing test of #37 | TASKS:P1 | r | fix/x | D-1 | | | | | 5K | | |
"""
NINE = """# Tasks — Control

> Single-writer: orchestrator only.
>
> **Mission:** control-20260506
> **Schema:** `| id | status | description | issue | agent | branch | depends_on | notes |`
> **Status values:** `not-started` | `in-progress` | `done`

## Milestone 1 — Foundation

| id | status | description | issue | agent | branch | depends_on | estimate | notes |
| --- | --- | --- | --- | --- | --- | --- | --- | --- |
| M-1 | not-started | Write `docs/PRD.md` with goals. | — | sonnet | docs/prd | — | 5K | Anchor. |
| M-2 | needs-qa | Write `docs/B.md`. | — | haiku | docs/b | M-1 | 3K | Apart. |

**Estimate:** ~8K tokens

## Milestone 2 — Runtime

| id | status | description | issue | agent | branch | depends_on | estimate | notes |
| --- | --- | --- | --- | --- | --- | --- | --- | --- |
"""
NASTY = """\ufeff| ID | **Status** | Title | Depends on |
|:--|--:|:-:|---|
| `A-1` | **Done** | a \\| b | |
| [A-2](https://x/2) | In Progress | `x \\| y` and \\<br> | `A-1`,A-3 |
A-3 | not_started | no bars around
| A-4 | blocked |
| A-5 | failed | one | A-1 | two | many |

```markdown
| id | status |
|---|---|
| F-1 | done |
```

    | id | status |
    |---|---|
    | F-2 | done |

> quoted:
> | status | id |
> |---|---|
> | done | Q-1 |
> > | status | id |
> > |---|---|
> > | done | Q-2 |

- in a list

  | id | status | title |
  |---|---|---|
  | L-1 | done | a<br>b |

1. | id | status |
   |----|--------|
   | N-1 | done |

| Workstream | ID | Status |
|---|---|---|
| one | W-1 | accepted |
| two | W-2 | proposed |

| name | note |
|---|---|
| x | y |

<!--
| id | status |
|---|---|
| H-1 | done |
-->

text before a table
| id | status |
|---|---|
| T-1 | done |
# a heading ends it
| not | a row |
"""
SAMPLES = {"fourteen": FOURTEEN, "nine": NINE, "nasty": NASTY}


def rows(board: mq.Board) -> list[mq.Row]:
    return [row for table in board.tables for row in table.rows]


def ids(text: str) -> list[str]:
    return [row.task for row in rows(mq.read_board(text))]


@pytest.mark.parametrize("text", SAMPLES.values(), ids=SAMPLES)
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r", "mixed", "none"])
def test_what_is_not_edited_keeps_its_bytes(text: str, end: str) -> None:
    """Whatever its line ends are; and it is read alike."""
    if end == "mixed":
        parts = text.splitlines()
        changed = "".join(line + ("\r\n", "\n")[at % 2] for at, line in enumerate(parts))
    else:
        changed = text.rstrip("\n") if end == "none" else text.replace("\n", end)
    board = mq.read_board(changed)
    assert board.text() == changed
    assert [row.cells for row in rows(board)] == [row.cells for row in rows(mq.read_board(text))]


def test_tables_are_found_wherever_they_stand() -> None:
    found = ids(NASTY)
    assert found == ["A-1", "A-2", "A-3", "A-4", "A-5", "Q-1", "Q-2", "L-1", "N-1", "T-1"]
    board = mq.read_board(NASTY)
    first = {row.task: row.cells for row in board.tables[0].rows}
    nothing = {"title": "", "depends_on": ""}
    assert first == {
        "A-1": {"status": "done", "title": "a | b", "depends_on": ""},
        "A-2": {"status": "in-progress", "title": "`x | y` and <br>", "depends_on": "A-1 A-3"},
        "A-3": {"status": "not-started", "title": "no bars around", "depends_on": ""},
        "A-4": {"status": "blocked", **nothing},
        "A-5": {"status": "failed", "title": "one", "depends_on": "A-1"},
    }
    listed = next(row for row in rows(board) if row.task == "L-1")
    assert listed.cells["title"] == "a\nb"


def test_tables_of_something_else_are_left_alone_and_told() -> None:
    apart = mq.read_board(NASTY).apart
    assert list(apart.values()) == [
        "no task table: its status words are accepted, proposed",
        "no task table: it has no id and status column",
    ]
    assert [NASTY.split("\n")[line] for line in apart] == [
        "| Workstream | ID | Status |",
        "| name | note |",
    ]


def test_a_description_without_a_title_is_the_text_of_a_task() -> None:
    assert set(mq.read_board(NINE).tables[0].columns) == {"id", "status", "text", "depends_on"}
    both = mq.read_board("|id|status|title|description|\n|-|-|-|-|\n")
    assert set(both.tables[0].columns) == {"id", "status", "title", "description"}
    no_id = mq.read_board("|task|status|description|\n|-|-|-|\n")
    assert set(no_id.tables[0].columns) == {"id", "status", "text"}


@pytest.mark.parametrize("text", SAMPLES.values(), ids=SAMPLES)
def test_one_cell_changes_and_no_byte_beside_it(text: str) -> None:
    """Every cell of every row, set to a short and to a long value."""
    for at in range(len(rows(mq.read_board(text)))):
        for value in ("done", "not-started and quite a lot more | than that\nin two lines"):
            for column in rows(mq.read_board(text))[at].cells:
                board = mq.read_board(text)
                table = next(t for t in board.tables if rows(board)[at] in t.rows)
                row = rows(board)[at]
                if column == "status" and value != "done":
                    value = "in-progress"
                board.put(table, row, column, value)
                now = rows(mq.read_board(board.text()))
                wanted = mq.meaning(column, mq.escape_cell(value))
                assert now[at].cells == {**rows(mq.read_board(text))[at].cells, column: wanted}
                others = [row.cells for i, row in enumerate(now) if i != at]
                before = rows(mq.read_board(text))
                assert others == [row.cells for i, row in enumerate(before) if i != at]
                lines = list(zip(text.split("\n"), board.text().split("\n"), strict=True))
                changed = [pair for pair in lines if pair[0] != pair[1]]
                assert len(changed) <= 1
                for old, new in changed:
                    spans = difflib.SequenceMatcher(None, old, new, False).get_opcodes()
                    assert new.startswith(old[: spans[0][2]])


PADDED = """\
| id   | status      | description |
| ---- | ----------- | ----------- |
| P-10 | not-started | short       |
| P-11 | done        | 語          |
| P-12 | failed      | —           |
"""


def edited(text: str, task: str, column: str, value: str) -> list[str]:
    """The lines that an edit changes, as they are then."""
    board = mq.read_board(text)
    table = board.tables[0]
    board.put(table, next(row for row in table.rows if row.task == task), column, value)
    pairs = zip(text.split("\n"), board.text().split("\n"), strict=True)
    return [new for old, new in pairs if old != new]


@pytest.mark.parametrize(
    ("text", "task", "column", "value", "line"),
    [
        (PADDED, "P-10", "status", "done", "| P-10 | done        | short       |"),
        (PADDED, "P-11", "status", "in-progress", "| P-11 | in-progress | 語          |"),
        (PADDED, "P-11", "text", "an 語", "| P-11 | done        | an 語       |"),
        (PADDED, "P-10", "text", "much too long", "| P-10 | not-started | much too long |"),
        (PADDED, "P-10", "text", "", "| P-10 | not-started |             |"),
        ("|id|status|\n|-|-|\n|a|done|\n", "a", "status", "failed", "|a|failed|"),
        ("|id|status|title|\n|-|-|-|\n|a|done|x|\n", "a", "title", "x\\", "|a|done|x\\ |"),
        ("|id|status|title|\n|-|-|-|\na|done\n", "a", "title", "x", "a|done| x "),
        ("title|id|status\n-|-|-\nx|a|done\n", "a", "title", "# 1", "| # 1|a|done"),
    ],
)
def test_padding_stays_where_it_fits(
    text: str, task: str, column: str, value: str, line: str
) -> None:
    assert edited(text, task, column, value) == [line]


@pytest.mark.parametrize(
    ("text", "values", "after"),
    [
        (PADDED, {"id": "P", "status": "done", "text": "x"}, f"| P    | done {'':6} | x {'':9} |"),
        ("|id|status|\n|-|-|\n", {"id": "a", "status": "done"}, "| a | done |"),
        ("> |id|status|\n> |-|-|\n> |a|done|", {"id": "b", "status": "done"}, "> |b|done|"),
        ("id|status\n-|-\na|done", {"id": "b", "status": "done"}, "|b|done|"),
    ],
)
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_a_new_row_comes_after_the_last(
    text: str, values: dict[str, str], after: str, end: str
) -> None:
    text = text.replace("\n", end)
    board = mq.read_board(text)
    board.append(board.tables[0], values)
    final = end if text.endswith(end) else ""
    assert board.text() == text.removesuffix(end) + end + after + final
    assert ids(board.text()) == [*ids(text), values["id"]]


def test_padding_a_table_again_is_no_change() -> None:
    """A formatter in a commit hook changes widths, and nothing that is read."""
    plain = re.sub(r" *\| *", "|", PADDED).replace("----|", "---|")
    wide = PADDED.replace(" | ", "      | ")
    assert plain != PADDED
    for text in (plain, wide):
        cells = [(row.task, row.cells) for row in rows(mq.read_board(text))]
        assert cells == [(row.task, row.cells) for row in rows(mq.read_board(PADDED))]


# -- beside markdown-it, and generated --


def all_cells(text: str) -> list[list[str]]:
    """The body cells of every table, as markdown-it reads them."""
    found: list[list[str]] = []
    head = False
    for token in MarkdownIt("commonmark").enable("table").parse(text.removeprefix("\ufeff")):
        head = (head or token.type == "thead_open") and token.type != "thead_close"
        if token.type == "tr_open" and not head:
            found.append([])
        elif token.type == "inline" and found and token.level > 3 and not head:
            found[-1].append(token.content)
    return found


def our_cells(text: str) -> list[list[str]]:
    board = mq.read_board(text)
    found = []
    for table in board.tables:
        for row in table.rows:
            _, cells = mq.split_row(board.lines[row.line], table.quotes)
            cells = [cell.strip().replace("\\|", "|") for cell in cells][: table.size]
            found.append(cells + [""] * (table.size - len(cells)))
    return found


words = st.text(alphabet="ab|\\`-: <>*_é語\"'/", max_size=12)
lines = st.one_of(
    st.builds("|".join, st.lists(words, min_size=1, max_size=5)),
    st.builds("| {} | {} | {} |".format, words, words, words),
    st.sampled_from(
        ["", "|---|---|---|", "-|-|-", "|id|status|title|", "> |id|status|title|", "> |-|-|-|",
         "> |a|done|b|", "```", "~~~", "    |a|done|", "- x", "  |a|done|b|", "# h", "---", "<!--",
         "-->", "<div>", "|a|done|b|", "|b|done|c|", "1. |id|status|title|", "   |-|-|-|",
         "   |a|done|", ">> |a|done|b|", "|a -> b|done|c|", "|a --> b|done|", "|a|not-started|"]
    ),
)  # fmt: skip
documents = st.builds(
    lambda parts, end: end.join(parts),
    st.lists(lines, max_size=25),
    st.sampled_from(["\n", "\r\n"]),
)


@settings(max_examples=100, deadline=None)
@given(documents)
def test_any_document_keeps_its_bytes_and_is_read_as_markdown_it_reads_it(text: str) -> None:
    """Each row that we see is one that markdown-it sees, with the same cells."""
    board = mq.read_board(text)
    assert board.text() == text
    seen = all_cells(text)
    at = 0
    for cells in our_cells(text):
        at = next((i for i in range(at, len(seen)) if seen[i] == cells), -1) + 1
        assert at, (cells, seen)


@settings(max_examples=100, deadline=None)
@given(documents, st.data())
def test_any_edit_reads_back_and_changes_nothing_else(text: str, data: st.DataObject) -> None:
    prefix = "|id|status|title|\n|---|---|---|\n|x1|done|one|\n"
    board = mq.read_board(prefix + text)
    row = data.draw(st.sampled_from([one for one in rows(board) if one.task]))
    column = data.draw(st.sampled_from(sorted(row.cells)))
    value = data.draw(words | st.text(max_size=20))
    value = value.replace("\x00", "") if column == "title" else "done"
    before = [dict(one.cells) for one in rows(board)]
    at = next(i for i, one in enumerate(rows(board)) if one is row)
    table = next(table for table in board.tables if any(one is row for one in table.rows))
    board.put(table, row, column, value)
    after = [one.cells for one in rows(mq.read_board(board.text()))]
    before[at][column] = mq.meaning(column, mq.escape_cell(value))
    assert after == before


@settings(max_examples=100, deadline=None)
@given(st.text() | words)
def test_every_value_has_a_cell(value: str) -> None:
    cell = mq.escape_cell(value)
    assert not re.search(r"(?<!\\)\||[\r\n]", cell)
    assert not mq.CONTROL.search(cell)
    shown = mq.CONTROL.sub(lambda found: mq.printable(found[0]), value.strip())
    assert mq.normal(mq.unescape_cell(cell)) == mq.normal(shown)


@pytest.mark.parametrize(
    "value", ["curl \\\n -d", "a\\\\\nb", "\\<br>", "<br>\n<br/>", "a\\|b\n", "\\\n\\<BR>\\"]
)
def test_a_backslash_before_a_line_break_is_kept(value: str) -> None:
    assert mq.unescape_cell(mq.escape_cell(value)) == value.strip()


def test_a_long_table_is_read_in_time() -> None:
    """50,000 rows: markdown-it is spared what changes no structure."""
    text = FOURTEEN + "".join(
        f"| X-{at} | done | a -> b | | | | | | | | | 5K | | |\n" for at in range(50_000)
    )
    board = mq.read_board(text)
    assert len(rows(board)) == 50_002
    assert board.text() == text
    _, kept = mq.structure(board.lines)
    assert len(kept) < 20


@pytest.mark.parametrize(
    "line",
    [
        " " * 200_000,
        "|" + "-" * 200_000 + "x",
        "| A | " + "[" * 60_000 + " | |",
        "| A | " + "[x](" * 20_000 + " | |",
        "| " + "*" * 200_000 + " | done | |",
        "| " + "\u00e9" * 150 + " | " + "\u4e2d" * 150 + " | |",
        "|" * 100_000,
        "> " * 50_000,
        "Mission:" + " " * 200_000 + "x",
    ],
    ids=lambda line: line[:10],
)
def test_a_hostile_line_costs_no_more_than_its_length(line: str) -> None:
    for text in (f"|id|status|title|\n|-|-|-|\n|a|done|x|\n{line}\n|b|done|x|\n", line + "\n"):
        began = time.process_time()
        board = mq.read_board(text)
        assert time.process_time() - began < 2
        assert board.text() == text
        looked_at = [word for row in rows(board) for word in (row.task, row.cells["status"])]
        assert all(len(word.encode()) < 210 for word in looked_at)


TICKED = """\
| # | Task | Done |
|---|------|------|
| 1 | one  | x    |
| 2 | two  |      |
| 3 | tre  | yes  |
"""


def test_a_column_of_ticks_is_a_status() -> None:
    board = mq.read_board(TICKED)
    cells = {row.task: row.cells["status"] for row in rows(board)}
    assert cells == {"1": "done", "2": "not-started", "3": "done"}
    assert edited(TICKED, "2", "status", "done") == ["| 2 | two  | x    |"]
    assert edited(TICKED, "1", "status", "not-started") == ["| 1 | one  |      |"]
    (line,) = edited(TICKED, "2", "status", "in-progress")
    again = mq.read_board(TICKED.replace("| 2 | two  |      |", line))
    assert {row.task: row.cells["status"] for row in rows(again)} == cells | {"2": "in-progress"}
    dates = TICKED.replace("x   ", "2026-05-01")
    assert not mq.read_board(dates).tables
