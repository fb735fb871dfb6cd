"""Configuration files: a strict part of YAML, in which a value is what it looks like, or is refused.

Plain scalars are those of YAML 1.2's core schema, less its numbers that can be read in two ways: `true`, `false`,
`null` and decimal numbers (`10`, `0.1`, `1e-3`) have a type, everything else is text. So `on`, `1:30`, `010`, `0x10`
and dates, which YAML 1.1 reads as a boolean, numbers and dates, stay what was written; a field that wants a number
refuses them. Keys are text, and each stands once in its mapping.
"""

import re
import stat
from pathlib import Path
from typing import Any

import yaml

from bowstore.errors import MissingError, UsageError

_MAX_BYTES = 1 << 18  # a configuration has about a thousand
_MAX_DEPTH = 32  # levels of nesting
_MAX_VALUES = 10_000  # aliases count as often as they are used
_MAX_DIGITS = 80  # more are beyond every bound, as a float too
_MAX_SHOWN = 80  # characters of a value in a message

_NULL, _BOOL, _INT, _FLOAT, _TEXT, _LIST, _MAPPING, _MERGE = (
    f"tag:yaml.org,2002:{name}" for name in ("null", "bool", "int", "float", "str", "seq", "map", "merge")
)
# A number with a leading zero is text: YAML 1.1 and 1.2 disagree on what it is.
_PLAIN = {
    _NULL: re.compile(r"(?:~|null|Null|NULL|)\Z"),
    _BOOL: re.compile(r"(?:true|True|TRUE|false|False|FALSE)\Z"),
    _INT: re.compile(r"[-+]?(?:0|[1-9][0-9]*)\Z"),
    _FLOAT: re.compile(r"[-+]?(?:(?:0|[1-9][0-9]*)(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][-+]?[0-9]+)?\Z"),
    _MERGE: re.compile(r"<<\Z"),
}


class _Loader(yaml.SafeLoader):
    """PyYAML's parser with these scalars and a bound on nesting; it is used to compose nodes, never to build values."""

    yaml_implicit_resolvers: dict[Any, Any] = {}  # noqa: RUF012 - PyYAML's table of the class

    def __init__(self, stream: str | bytes) -> None:
        super().__init__(stream)
        self._depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """Compose one node; PyYAML does so recursively, and would run into Python's own bound."""
        self._depth += 1
        if self._depth > _MAX_DEPTH:
            raise yaml.MarkedYAMLError(
                problem=f"values are nested more than {_MAX_DEPTH} deep", problem_mark=self.get_mark()
            )
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node


class _Dumper(yaml.SafeDumper):
    """PyYAML's emitter with these scalars: text that this reader would take for something else is quoted."""

    yaml_implicit_resolvers: dict[Any, Any] = {}  # noqa: RUF012 - PyYAML's table of the class


for _tag, _pattern in _PLAIN.items():
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(_tag, _pattern, None)


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a file that holds one mapping.

    Returns:
        Its values: None, bool, int, float, text, lists and mappings of them.

    Raises:
        MissingError: no such file.
        UsageError: not a regular file, too large, not YAML, not a mapping, or more of YAML than this reads.
        OSError: it cannot be read.
    """
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):  # a pipe would be waited for
            what = "a folder" if stat.S_ISDIR(status.st_mode) else "a pipe or a device"
            raise UsageError(f"{path} is {what}, not a configuration; name a YAML file")
        if status.st_size > _MAX_BYTES:
            raise UsageError(
                f"{path} has {status.st_size} bytes, and a configuration at most {_MAX_BYTES}; name a YAML file"
            )
        content = path.read_bytes()
    except FileNotFoundError as error:
        raise MissingError(f"no file {path}") from error
    try:
        value = _value_of(content)
    except yaml.YAMLError as error:
        raise UsageError(f"{path} is not a YAML file: {problem_of(error)}") from error
    if not isinstance(value, dict | None):
        raise UsageError(f"{path} holds {shown(value)}, not a mapping of keys to values; write lines of `key: value`")
    return value or {}


def read_value(text: str) -> Any:
    """A value of the command line, by the rules of a file.

    Lists, mappings and quoted texts are parsed; anything else is one scalar as it stands: in it, `#` begins no comment.

    Raises:
        yaml.YAMLError: the text begins as a list, mapping or quoted text, and is none.
    """
    text = text.strip()
    return _value_of(text) if text.startswith(("[", "{", '"', "'")) else _scalar(text, _plain_tag(text))


def write_yaml(values: dict[str, Any]) -> bytes:
    """Values as a file that `read_yaml` gives back."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False).encode()


def problem_of(error: yaml.YAMLError) -> str:
    """What is wrong and where, in one line."""
    if isinstance(error, yaml.MarkedYAMLError) and error.problem and error.problem_mark:
        mark = error.problem_mark
        return f"{error.problem} (line {mark.line + 1}, column {mark.column + 1})"
    if isinstance(error, yaml.reader.ReaderError):
        why = f"is not {error.encoding.upper()}" if error.encoding != "unicode" else "is a control character"
        return f"character {error.character:#04x} at position {error.position} {why}"
    return " ".join(str(error).split())


def shown(value: Any) -> str:
    """A value for messages, of bounded length."""
    text = repr(value)
    return text if len(text) <= _MAX_SHOWN else f"{text[: _MAX_SHOWN - 3]}..."


def _value_of(content: str | bytes) -> Any:
    node = yaml.compose(content, Loader=_Loader)
    return None if node is None else _Values().of(node)


class _Values:
    """Turns nodes into values; an alias is the value again, as often as it stands."""

    def __init__(self) -> None:
        self._count = 0
        self._open: list[yaml.Node] = []  # the nodes around this one, to see one that holds itself

    def of(self, node: yaml.Node) -> Any:
        """The value of a node."""
        self._count += 1
        if self._count > _MAX_VALUES:
            raise _problem(f"more than {_MAX_VALUES} values", node)
        if any(node is outer for outer in self._open):
            raise _problem("an alias (*name) stands for a value that it is part of", node)
        if isinstance(node, yaml.ScalarNode):
            return _scalar(_text(node), node.tag, node)
        if node.tag not in (_LIST, _MAPPING):
            raise _problem(f"tag {node.tag} is not read; leave it out", node)
        self._open.append(node)
        value = self._mapping(node) if isinstance(node, yaml.MappingNode) else [self.of(item) for item in node.value]
        self._open.pop()
        return value

    def _mapping(self, node: yaml.MappingNode) -> dict[str, Any]:
        result: dict[str, Any] = {}
        merged: dict[str, Any] = {}
        lines: dict[str, int] = {}
        for key_node, value_node in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise _problem("a key is a list or a mapping; keys are names", key_node)
            key = _text(key_node)
            if key in lines:
                raise _problem(f"key {shown(key)} stands twice, first in line {lines[key]}; remove one", key_node)
            lines[key] = key_node.start_mark.line + 1
            if key_node.tag == _MERGE:
                merged = self._merged(value_node)
            else:
                result[key] = self.of(value_node)
        return {**merged, **result}

    def _merged(self, node: yaml.Node) -> dict[str, Any]:
        """What the key `<<` brings in: of several mappings, the first that has a key."""
        value = self.of(node)
        result: dict[str, Any] = {}
        for part in reversed(value if isinstance(value, list) else [value]):
            if not isinstance(part, dict):
                raise _problem(f"<< merges mappings, not {shown(part)}", node)
            result |= part
        return result


def _scalar(text: str, tag: str, node: yaml.Node | None = None) -> Any:
    if tag in (_TEXT, _MERGE):
        return text
    if tag != _plain_tag(text):  # only a tag that was written can differ
        raise _problem(f"tag {tag} is not read; leave it out, or put text in quotes", node)
    if tag == _NULL:
        return None
    if tag == _BOOL:
        return text.lower() == "true"
    return int(text) if tag == _INT and len(text) <= _MAX_DIGITS else float(text)


def _plain_tag(text: str) -> str:
    """The tag of a plain scalar."""
    return next((tag for tag, pattern in _PLAIN.items() if pattern.match(text)), _TEXT)


def _text(node: yaml.ScalarNode) -> str:
    """A scalar's text; a pair of surrogates, JSON's escape of an emoji for one, becomes the character it means."""
    try:
        return str(node.value).encode("utf-16-le", "surrogatepass").decode("utf-16-le")
    except UnicodeDecodeError as error:
        raise _problem(f"{shown(node.value)} holds half of a surrogate pair, which is no character", node) from error


def _problem(text: str, node: yaml.Node | None) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=text, problem_mark=node.start_mark if node else None)
