"""Every regular expression of the module takes time that grows with its text, not with its square.

The expressions are read from the module's source, so that a new one is tested unasked.
"""

from __future__ import annotations

import ast
import functools
import re
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import mosaic_queue as mq

SIZE = 30_000  # characters: some seconds for a quadratic expression, milliseconds for a linear one
LIMIT = 0.5  # s
USES = ("sub", "split", "search", "match", "fullmatch", "findall", "finditer")
PAIRS = (
    "[]",
    "](",
    "[x](",
    "| ",
    " |",
    "- ",
    "a ",
    "* ",
    "a:",
    ":a@",
    "<br",
    "${a",
    "\\|",
    "~~",
    "(a",
)


def expressions() -> Iterator[tuple[str, str, int]]:
    """How the module uses an expression, the expression, and its flags."""
    tree = ast.parse(Path(mq.__file__).read_text())
    calls = [one for one in ast.walk(tree) if isinstance(one, ast.Call)]
    methods = [one for one in calls if isinstance(one.func, ast.Attribute)]
    compiled: dict[str, ast.Call] = {
        ast.unparse(one.targets[0]): one.value
        for one in ast.walk(tree)
        if isinstance(one, ast.Assign) and isinstance(one.value, ast.Call)
        if ast.unparse(one.value.func) == "re.compile"
    }
    for call in methods:
        on, _, use = ast.unparse(call.func).rpartition(".")
        if use not in USES or (on != "re" and on not in compiled):
            continue
        made = call if on == "re" else compiled[on]
        given = " ".join(ast.unparse(one) for one in [*made.args[1:], *made.keywords])
        names = re.findall(r"\bre\.([A-Z]{2,})\b", given)
        flags = functools.reduce(lambda known, name: known | getattr(re, name), names, 0)
        pattern = made.args[0]
        if isinstance(pattern, ast.JoinedStr):  # a name is filled in
            parts = [one.value if isinstance(one, ast.Constant) else "x" for one in pattern.values]
            yield use, "".join(map(str, parts)), flags
        elif isinstance(pattern, ast.Constant):
            value = pattern.value
            yield use, value.decode() if isinstance(value, bytes) else str(value), flags


def long_texts(pattern: str) -> Iterator[str]:
    """Long texts of what the pattern has, ended by what it has not."""
    plain = re.sub(r"\\[sdwSDWbAZ]|\(\?<?[:!=P]", "", pattern)
    characters = dict.fromkeys(" \n\tax0[(<|*`~_-:.@/\\&?=" + re.sub(r"\w", "", plain))
    starts = ["", *re.findall(r"[A-Za-z]{3,}", plain)[:2], "[", "(", "|", "<!--", "a://"]
    for one in characters:
        for start in starts:
            yield start + one * SIZE + "\x01"
    for pair in PAIRS:
        yield pair * (SIZE // len(pair)) + "\x01"
        yield pair * (SIZE // len(pair)) + "\n" + " " * SIZE + "\x01"


class TooSlowError(Exception):
    pass


def give_up(*_: Any) -> None:
    raise TooSlowError


@pytest.mark.parametrize(("use", "text", "flags"), sorted({*expressions()}))
def test_an_expression_is_linear(use: str, text: str, flags: int) -> None:
    pattern = re.compile(text, flags)
    call = functools.partial(pattern.sub, "") if use == "sub" else getattr(pattern, use)
    before = signal.signal(signal.SIGVTALRM, give_up)
    try:
        for given in long_texts(text):
            signal.setitimer(signal.ITIMER_VIRTUAL, LIMIT)
            found = call(given)
            if use == "finditer":
                list(found)
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)
    except TooSlowError:
        pytest.fail(f"{use} {text} is slow with {given[:20]!r} ... {given[-20:]!r}")
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


def test_the_expressions_of_the_module_are_found() -> None:
    assert len({*expressions()}) > 30
