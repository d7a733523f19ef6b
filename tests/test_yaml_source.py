"""YAML text to values with lines."""

import math
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graftwork.pipelines.spec.yaml_source import SyntaxProblem, dump, parse, scalar


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 0.001),
        ("1.5", 1.5),
        (".5", 0.5),
        ("-3", -3),
        ("+3", 3),
        ("0", 0),
        ("true", True),
        ("false", False),
        ("null", None),
        ("~", None),
        ("", None),
        (".inf", math.inf),
        ("-.inf", -math.inf),
        *((word, word) for word in ("yes", "no", "on", "off", "y", "010", "0x10", "0o7", "12:30")),
        *((word, word) for word in ("12:30:45", "1_000", "2020-01-01", "1e-3x", "0.5.1", "010.5")),
    ],
)
def test_plain_scalars_follow_yaml_1_2(text: str, value: object) -> None:
    assert scalar(text) == value and type(scalar(text)) is type(value)
    assert parse(f"a: {text}").value == {"a": value}


def test_quoted_scalars_are_text() -> None:
    assert parse("a: '1'\nb: \"true\"\nc: |\n  1\n").value == {"a": "1", "b": "true", "c": "1\n"}


def test_keys_are_text() -> None:
    assert parse("1: a\nnull: b\ntrue: c\n").value == {"1": "a", "null": "b", "true": "c"}


def test_lines_point_at_keys_and_items() -> None:
    document = parse("# comment\na:\n  b:\n    - x\n    - c: 1\n      d: 2\n")
    assert document.lines[("a",)] == 2
    assert document.lines[("a", "b")] == 3
    assert document.lines[("a", "b", 0)] == 4
    assert document.lines[("a", "b", 1, "d")] == 6


@pytest.mark.parametrize(
    ("text", "where", "message"),
    [
        ("a:\n\tb: 1\n", "2:1", "tab used for indentation; use spaces"),
        ("a:\n  b:\n \t c: 1\n", "3:2", "tab used for indentation; use spaces"),
        ("a:\tb\n", "1:3", "tab used between words; use spaces"),
        ("a: 1\n  b: 2\n", "2:4", '":" not allowed here; check the indentation, or put the value'),
        ("a:\n  b: 1\n c: 2\n", "3:2", "bad indentation; align this line with its siblings"),
        ("a: 1\nb\nc: 2\n", "3:1", 'expected "key: value"; check the indentation and the colon'),
        ("a: [1, 2\n", "2:1", "not valid YAML: expected ',' or ']'"),
        ("a: 1\n---\nb: 2\n", "2:1", "second document; keep one document per file"),
        ("? [a]\n: 1\n", "1:3", "keys must be plain words"),
        ("a: \x01\n", "1:4", "invalid character; remove it"),
        ('a: "\\UFFFFFFFF"\n', "1:1", "not valid YAML: "),
        ("a: " + "[" * 21 + "]" * 21, "1:23", "nested more than 20 levels deep"),
    ],
)
def test_text_that_cannot_be_read_names_line_and_column(
    text: str, where: str, message: str
) -> None:
    with pytest.raises(SyntaxProblem) as caught:
        parse(text)
    assert (caught.value.where, caught.value.message[: len(message)]) == (where, message)


def test_duplicate_keys_name_both_lines() -> None:
    document = parse("lr: 1\nb: 2\nlr: 3\n")
    assert document.problems == [(3, ("lr",), 'duplicate key "lr" (first at line 1); keep one')]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: !!python/object/apply:os.system [ls]", 'tag not allowed ("!!python/object/apply:'),
        ("a: !!str 1", 'tag not allowed ("!!str")'),
        ("a: ! x", 'tag not allowed ("!")'),
        ("a: &x 1", "anchor (&) not allowed; repeat the value"),
        ("a: *x", "alias (*) not allowed; repeat the value"),
        ("&x a: 1", "anchor (&) not allowed; repeat the value"),
    ],
)
def test_tags_and_references_are_refused(text: str, message: str) -> None:
    assert parse(text).problems[0][2].startswith(message)


@pytest.mark.parametrize(
    "text",
    [
        "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 60)),
        "[" * 100_000,
        "{a: " * 100_000,
        "- " * 100_000,
        "a: " + "x" * 1_000_000,
        "a: " + "9" * 100_000,
    ],
    ids=["laughs", "lists", "mappings", "dashes", "text", "digits"],
)
def test_bombs_end_quickly(text: str) -> None:
    start = time.perf_counter()
    try:
        document = parse(text)
        assert document.problems or document.value
    except SyntaxProblem:
        pass
    assert time.perf_counter() - start < 5


# Specs refuse control characters and line separators, which YAML rewrites as blanks.
NAMES = st.text(st.characters(exclude_categories=("Cs", "Cc", "Zl", "Zp")), max_size=9)
PLAIN = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | NAMES
PLAIN |= st.sampled_from(
    ["1e-3", "010", "yes", "0x10", "12:30", "null", "=", "<<", ".inf", "~", ""]
)


@settings(derandomize=True, max_examples=150, deadline=None)
@given(st.recursive(PLAIN, lambda inner: st.lists(inner) | st.dictionaries(NAMES, inner)))
def test_dumped_values_come_back(value: object) -> None:
    document = parse(dump({"a": value}))
    assert document.value == {"a": value}
    assert not document.problems
