"""Values of the command line over those of a configuration file: `--set a.b=c`, and flags."""

from collections.abc import Callable, Iterable, Mapping
from copy import deepcopy
from typing import Any

import yaml

from bowstore.errors import UsageError
from bowstore.yaml_file import problem_of, read_value


def apply_overrides(
    values: dict[str, Any],
    overrides: Iterable[str],
    flags: Mapping[str, Any] | None = None,
    meant: Callable[[str], str] = str,
) -> dict[str, Any]:
    """Return `values` with every `a.b=value` set, and every flag; values of flags are taken as they are.

    Args:
        values: of a file.
        overrides: `a.b=value`.
        flags: values by key.
        meant: the key that a spelling of it means.

    Raises:
        UsageError: not of that form, no value, a key given twice, or a key below a value.
    """
    result: dict[str, Any] = deepcopy(values)
    given: dict[str, str] = {}
    for override in overrides:
        name, equals, text = override.partition("=")
        name = name.strip()
        if not equals or not name:
            raise UsageError(f"--set {override!r} is not of the form key=value, for example optim.lr=0.1")
        if not text.strip():
            raise UsageError(
                f"--set {override!r} has no value (is a shell variable not set?); for null write {name}=null"
            )
        try:
            value = read_value(text)
        except yaml.YAMLError as error:
            raise UsageError(f"--set {override!r}: {text!r} is not a YAML value: {problem_of(error)}") from error
        if isinstance(value, dict):
            raise UsageError(f"--set {override!r}: set the keys of a group one by one, as in {name}.KEY=VALUE")
        _set(result, given, meant(name), value, f"--set {override!r}")
    for name, value in (flags or {}).items():
        said = " ".join(map(str, value)) if isinstance(value, tuple) else value
        _set(result, given, meant(name), value, f"--{name.rpartition('.')[2]} {said}")
    return result


def _set(values: dict[str, Any], given: dict[str, str], name: str, value: Any, what: str) -> None:
    """Set one dotted key in place; `given` holds who has set which."""
    for other in given:
        if name == other or name.startswith(f"{other}.") or other.startswith(f"{name}."):
            raise UsageError(f"{what} and {given[other]} set the same key; give one of them")
    given[name] = what
    *folders, leaf = name.split(".")
    place = values
    for folder in folders:
        if place.get(folder) is None:
            place[folder] = {}
        place = place[folder]
        if not isinstance(place, dict):
            raise UsageError(f"{what}: {folder!r} is a value, not a group of keys")
    place[leaf] = value
