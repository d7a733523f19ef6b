"""YAML text -> plain values, with the line of every key.

The subset is small on purpose: one document, no tags, anchors or aliases, no duplicate keys,
bounded depth and size. Plain scalars follow YAML 1.2: `yes`, `on`, `010`, `0x10` and `12:30` are
text, `1e-3` is a number. The text is read as a stream of events, so that nothing recurses or is
multiplied before a limit is checked.
"""

import re
from dataclasses import dataclass, field
from typing import Any

import yaml

Path = tuple[str | int, ...]
"""Keys and list positions that lead from the document to a value."""

MAX_DEPTH = 20
MAX_NODES = 100_000

INTEGER = re.compile(r"[-+]?(0|[1-9][0-9]*)\Z")
FLOAT = re.compile(
    r"[-+]?(\.[0-9]+|(0|[1-9][0-9]*)(\.[0-9]*)?)([eE][-+]?[0-9]+)?\Z"
    r"|[-+]?\.(inf|Inf|INF)\Z|\.(nan|NaN|NAN)\Z"
)
WORDS = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL"), None),
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
}


class SyntaxProblem(Exception):
    """The text is not YAML of the accepted subset and cannot be read further.

    Args:
        where: `LINE:COLUMN`, both from 1.
        message: what is wrong; what to do.
    """

    def __init__(self, where: str, message: str) -> None:
        super().__init__(where, message)
        self.where, self.message = where, message


@dataclass(frozen=True)
class Document:
    """A document as plain values.

    Args:
        value: dict, list, str, int, float, bool or None.
        lines: path -> line (from 1) of the key, or of the list item.
        problems: (line, path, message) of what was read but is not allowed.
    """

    value: Any
    lines: dict[Path, int]
    problems: list[tuple[int, Path, str]]


def scalar(text: str) -> Any:
    """The value of an unquoted scalar: None, bool, int, float or the text itself."""
    if text in WORDS:
        return WORDS[text]
    if INTEGER.match(text):
        # Beyond 400 digits the number is out of every range, and int() may refuse to read it.
        return int(text) if len(text) < 400 else float(text)
    if FLOAT.match(text):
        return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
    return text


def parse(text: str) -> Document:
    """Read one YAML document.

    Args:
        text: the document.

    Returns:
        Its values, lines, and problems that did not stop the reading.

    Raises:
        SyntaxProblem: the text cannot be read further.
    """
    builder = _Builder()
    try:
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            builder.add(event)
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        column = error.position - text.rfind("\n", 0, error.position)
        raise SyntaxProblem(f"{line}:{column}", "invalid character; remove it") from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{mark.line + 1}:{mark.column + 1}" if mark else "1:1"
        raise SyntaxProblem(where, _plain_words(error, text)) from error
    except (ValueError, OverflowError) as error:
        # PyYAML lets these through for escapes and version numbers out of range.
        raise SyntaxProblem("1:1", f"not valid YAML: {error}") from error
    return Document(builder.root, builder.lines, builder.problems)


def _plain_words(error: yaml.MarkedYAMLError, text: str) -> str:
    """PyYAML's message in words that need no knowledge of its grammar."""
    problem = error.problem or "cannot be read"
    if "'\\t'" in problem and error.problem_mark:
        line = text.splitlines()[error.problem_mark.line]
        if not line[: error.problem_mark.column].strip():
            return "tab used for indentation; use spaces"
        return "tab used between words; use spaces"
    if problem.startswith("expected <block end>"):
        return "bad indentation; align this line with its siblings"
    if problem.startswith("mapping values are not allowed"):
        return '":" not allowed here; check the indentation, or put the value in quotes'
    if problem.startswith("could not find expected ':'"):
        return 'expected "key: value"; check the indentation and the colon'
    return f"not valid YAML: {problem}" + (f" ({error.context})" if error.context else "")


@dataclass
class _Open:
    """A mapping or list whose end has not been read yet."""

    value: dict[str, Any] | list[Any]
    path: Path
    key: str | None = None
    key_lines: dict[str, int] = field(default_factory=dict)


class _Builder:
    """Builds the values from parser events."""

    def __init__(self) -> None:
        self.root: Any = None
        self.lines: dict[Path, int] = {(): 1}
        self.problems: list[tuple[int, Path, str]] = []
        self._open: list[_Open] = []
        self._nodes = 0
        self._documents = 0

    def add(self, event: yaml.Event) -> None:
        if isinstance(event, yaml.DocumentStartEvent):
            self._documents += 1
            if self._documents > 1:
                raise _stop(event, "second document; keep one document per file")
        elif isinstance(event, (yaml.SequenceEndEvent, yaml.MappingEndEvent)):
            self._open.pop()
        elif isinstance(event, yaml.NodeEvent):
            self._node(event)

    def _node(self, event: yaml.NodeEvent) -> None:
        self._nodes += 1
        if self._nodes > MAX_NODES:
            raise _stop(event, f"more than {MAX_NODES} values; make the document smaller")
        parent = self._open[-1] if self._open else None
        if parent and isinstance(parent.value, dict) and parent.key is None:
            self._key(parent, event)
            return
        path = self._path(parent)
        line = event.start_mark.line + 1
        self.lines.setdefault(path, line)
        self._refuse_references(event, path, line)
        value = self._value(event)
        if parent is None:
            self.root = value
            self.lines[()] = line
        elif isinstance(parent.value, list):
            parent.value.append(value)
        else:
            parent.value[str(parent.key)] = value
            parent.key = None
        if isinstance(value, (dict, list)) and isinstance(event, yaml.CollectionStartEvent):
            if len(self._open) >= MAX_DEPTH:
                raise _stop(event, f"nested more than {MAX_DEPTH} levels deep")
            self._open.append(_Open(value, path))

    def _key(self, parent: _Open, event: yaml.NodeEvent) -> None:
        """Take the event as the next key of an open mapping."""
        line = event.start_mark.line + 1
        if not isinstance(event, yaml.ScalarEvent):
            raise _stop(event, "keys must be plain words")
        key = event.value
        path = (*parent.path, key)
        self._refuse_references(event, path, line)
        if key in parent.key_lines:
            first = parent.key_lines[key]
            message = f'duplicate key "{key}" (first at line {first}); keep one'
            self.problems.append((line, path, message))
        parent.key_lines.setdefault(key, line)
        self.lines[path] = line
        parent.key = key

    def _refuse_references(self, event: yaml.NodeEvent, path: Path, line: int) -> None:
        """Note tags, anchors and aliases, none of which the subset has."""
        if isinstance(event, yaml.AliasEvent):
            self.problems.append((line, path, "alias (*) not allowed; repeat the value"))
        elif event.anchor:
            self.problems.append((line, path, "anchor (&) not allowed; repeat the value"))
        tag = getattr(event, "tag", None)
        if tag:
            shown = tag.replace("tag:yaml.org,2002:", "!!")
            self.problems.append((line, path, f'tag not allowed ("{shown}"); write a plain value'))

    def _path(self, parent: _Open | None) -> Path:
        if parent is None:
            return ()
        if isinstance(parent.value, list):
            return (*parent.path, len(parent.value))
        return (*parent.path, str(parent.key))

    def _value(self, event: yaml.NodeEvent) -> Any:
        if isinstance(event, yaml.MappingStartEvent):
            return {}
        if isinstance(event, yaml.SequenceStartEvent):
            return []
        if isinstance(event, yaml.ScalarEvent):
            return scalar(event.value) if event.implicit[0] else event.value
        return None


def _stop(event: yaml.Event, message: str) -> SyntaxProblem:
    mark = event.start_mark
    return SyntaxProblem(f"{mark.line + 1}:{mark.column + 1}", message)


class _Dumper(yaml.SafeDumper):
    """Quotes text that either YAML 1.1 or `scalar` would read as something else."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


# A copy first: PyYAML would otherwise extend the table of SafeDumper itself.
_Dumper.yaml_implicit_resolvers = {k: list(v) for k, v in _Dumper.yaml_implicit_resolvers.items()}
_Dumper.add_implicit_resolver("tag:yaml.org,2002:int", INTEGER, list("-+0123456789"))
_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", FLOAT, list("-+.0123456789"))


def dump(value: Any) -> str:
    """YAML text that `parse` reads back as the same value; keys keep their order."""
    return yaml.dump(
        value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, default_flow_style=None
    )
