"""Strategies of hypothesis for what a parser may be given: anything, and what was valid once."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from typing import Any

from hypothesis import strategies as st

HOSTILE = (
    "NaN", "Infinity", "-Infinity", "1e999", "9" * 5000, "1" + "0" * 400, "-1", "-0.0", "0.5", "1e308", "true", "null",
    "[" * 400 + "]" * 400, "[" * 900 + "]" * 900, '{"a":' * 900 + "1" + "}" * 900, "[" * 100_000, "{}", "[]",
    "[[]]", '""', '"../x"', "[null]", '"\\ud83d"', '"\\u0000"', '"' + "x" * 5000 + '"', '"a\\nb\\u2028c"', '"<b>$"',
    "9007199254740993", '"' + "(" * 300 + '"', '"' + "-" * 900 + 'a"', '{"kind": "learned"}', "01", "'a'",
)  # fmt: skip
"""JSON, or nearly, that has broken readers of it."""

ANY_TEXT = st.text(st.characters(), max_size=40)
"""With surrogates that stand alone and characters that end a line."""

PIECES = st.one_of(
    ANY_TEXT,
    st.sampled_from(
        (
            "", "0", "-1", "9" * 5000, "1e999", "nan", "inf", "x", ":", ",", "=", "'",
            '"', "(", ")", "[" * 300, "-" * 900, "\0",
            "\n", "\u2028", "\ud83d", "٣", "²", "None", "#", "/", "..", "{[]: 1}", "a" * 5000, "GB", "min(", "//0", "%",
            " ",
        )
    ),
)  # fmt: skip


@st.composite
def edited_text(draw: st.DrawFn, valid: str) -> str:
    """A valid text in which parts are replaced, left out, or said twice."""
    text = valid
    for _ in range(draw(st.integers(1, 3))):
        start = draw(st.integers(0, len(text)))
        end = min(len(text), start + draw(st.sampled_from((0, 1, 1, 4, 64))))
        text = text[:start] + draw(st.one_of(PIECES, st.just(text[start:end] * 2))) + text[end:]
    return text


@st.composite
def edited_bytes(draw: st.DrawFn, valid: bytes) -> bytes:
    """Valid bytes in which parts are replaced or left out."""
    content = valid
    for _ in range(draw(st.integers(1, 3))):
        start = draw(st.integers(0, len(content)))
        end = min(len(content), start + draw(st.sampled_from((0, 1, 8, 64))))
        content = content[:start] + draw(st.binary(max_size=16)) + content[end:]
    return content


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | ANY_TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(ANY_TEXT, inner, max_size=3),
    max_leaves=8,
)


@st.composite
def edited_json(draw: st.DrawFn, valid: Any) -> str:
    """The text of valid JSON with the right keys and other values: of another type, from another place, hostile, left
    out, said twice, under another name, or one list deeper."""
    values, holes = copy.deepcopy(valid), []
    for _ in range(draw(st.integers(1, 3))):
        places = list(_places(values))
        if not places:
            break
        holder, key = places[draw(st.integers(0, len(places) - 1))]
        match draw(st.sampled_from(("hostile", "hostile", "any", "moved", "dropped", "twice", "renamed", "wrapped"))):
            case "hostile" | "twice" as how:
                before = (
                    f"{json.dumps(holder[key])}, {json.dumps(key)}: " if how == "twice" and type(key) is str else ""
                )
                holder[key] = f"@{len(holes)}@"
                holes.append(before + draw(st.sampled_from(HOSTILE)))
            case "any":
                holder[key] = draw(JSON)
            case "moved":
                other, name = places[draw(st.integers(0, len(places) - 1))]
                holder[key] = copy.deepcopy(other[name])
            case "renamed" if type(key) is str:
                holder[draw(ANY_TEXT)] = holder.pop(key)
            case "wrapped":
                holder[key] = [holder[key]]
            case _:
                del holder[key]
    text = json.dumps(values)
    for number in reversed(range(len(holes))):  # a later one may hold an earlier one
        text = text.replace(f'"@{number}@"', holes[number])
    return text


def _places(values: Any) -> Iterator[tuple[Any, Any]]:
    items = values.items() if isinstance(values, dict) else enumerate(values) if isinstance(values, list) else ()
    for key, value in items:
        yield values, key
        yield from _places(value)


def given_of(valid: Any) -> st.SearchStrategy[Any]:
    """What a parser of this kind of text may be given: a text or bytes, or JSON where ``valid`` is neither."""
    if isinstance(valid, str):
        return edited_text(valid) | edited_text(valid) | ANY_TEXT
    if isinstance(valid, bytes):
        return edited_bytes(valid) | edited_bytes(valid) | st.binary(max_size=40)
    anything = JSON.map(json.dumps) | st.sampled_from(HOSTILE) | ANY_TEXT
    return edited_json(valid) | edited_json(valid) | edited_json(valid) | anything
