"""Registries of what varies (sources, tasks, protocols), and the plugins that add to them.

A registry knows names without importing anything: its own modules by a table, those of installed packages by their
entry points. What a workspace names under `plugins:` is imported when a registry is first asked.
"""

import importlib
import importlib.util
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache, partial
from hashlib import sha256
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, TypeVar

from bowstore.errors import UsageError, nearest
from bowstore.files import check_plain_file

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint


@dataclass(frozen=True)
class Plugin:
    """Base of what registries hold.

    Attributes:
        name: what commands and configurations call it.
    """

    name: str


T = TypeVar("T", bound=Plugin)


class _Entry(NamedTuple):
    origin: str  # where it comes from, for messages
    load: Callable[[], object]


class Registry(Generic[T]):
    """Values of one kind by their names: bowstore's own, those of installed packages and those of the workspace."""

    def __init__(self, what: str, group: str, kind: type[T], own: Mapping[str, str]) -> None:
        """State what there is; nothing is imported.

        Args:
            what: what messages call a value, for example "task".
            group: of the entry points of installed packages, for example "bowstore.tasks".
            kind: class of the values.
            own: bowstore's own values, as "package.module:ATTRIBUTE" by name.
        """
        self._what, self._group, self._kind = what, group, kind
        self._own = {name: _Entry("bowstore itself", partial(attribute, path)) for name, path in own.items()}

    def names(self) -> tuple[str, ...]:
        """All names, bowstore's own first; modules of bowstore and of installed packages are not imported for it.

        Raises:
            UsageError: two values of one name, or a plugin that cannot be used.
        """
        return tuple(self._entries())

    def values(self) -> list[T]:
        """All values, in the order of `names`."""
        return [self._load(name, entry) for name, entry in self._entries().items()]

    def get(self, name: str) -> T:
        """The value of that name.

        Raises:
            UsageError: there is none, two have that name, or a plugin cannot be used.
        """
        entries = self._entries()
        if name not in entries:
            hint = nearest(name, entries)
            raise UsageError(f"no {self._what} {name!r}; {hint and hint + ' '}there are {', '.join(entries)}")
        return self._load(name, entries[name])

    def _entries(self) -> dict[str, _Entry]:
        entries = dict(self._own)
        for point in _installed(self._group):
            package = point.dist.name if point.dist else point.value
            self._put(entries, point.name, _Entry(f"the installed package {package}", point.load))
        for origin, module in _modules():
            for value in vars(module).values():
                if isinstance(value, self._kind):
                    self._put(entries, value.name, _Entry(origin, partial(_same, value)))
        return entries

    def _put(self, entries: dict[str, _Entry], name: str, entry: _Entry) -> None:
        there = entries.setdefault(name, entry)
        # A module may hold another's value, which it imported; that is no second one.
        if there is not entry and self._load(name, there) is not self._load(name, entry):
            raise UsageError(
                f"{self._what} {name!r} comes twice, from {there.origin} and from {entry.origin}; rename one, or leave "
                f"it out"
            )

    def _load(self, name: str, entry: _Entry) -> T:
        value = _imported(entry.origin, entry.load)
        if isinstance(value, self._kind) and value.name == name:
            return value
        found = f"{value.name!r}" if isinstance(value, self._kind) else f"of type {type(value).__name__}"
        raise UsageError(
            f"{self._what} {name!r} of {entry.origin} is {found}; correct its entry point in {self._group}"
        )


def attribute(path: str) -> Any:
    """What "module:NAME" means; the module is imported for it."""
    module, _, name = path.partition(":")
    return getattr(importlib.import_module(module), name)


def called(function: str | Callable[..., Any]) -> Callable[..., Any]:
    """The function itself; that of "module:name" is imported now.

    Raises:
        UsageError: it cannot be imported.
    """
    return _imported(function, partial(attribute, function)) if isinstance(function, str) else function


def _same(value: object) -> object:
    return value


@cache
def _installed(group: str) -> tuple["EntryPoint", ...]:
    from importlib.metadata import entry_points  # 20 ms that `bowstore --help` need not wait

    return tuple(sorted(entry_points(group=group), key=lambda point: (point.name, point.value)))


class Named(NamedTuple):
    """Plugins as a workspace names them; goes to worker processes.

    Attributes:
        plugins: files, relative to the folder, or names of modules.
        folder: the workspace's, absolute.
    """

    plugins: tuple[str, ...]
    folder: str


_named = Named((), "")


def use_plugins(named: Named) -> None:
    """Let registries know what these plugins hold, and no others; they are imported when a registry is asked."""
    global _named
    _named = named


def plugins_in_use() -> Named:
    """What was last given to `use_plugins`, for worker processes."""
    return _named


def _modules() -> Iterator[tuple[str, ModuleType]]:
    """Each plugin of the workspace: what messages call it, and its module."""
    for name in dict.fromkeys(_named.plugins):
        if name.endswith(".py"):
            module = _file_module(name, Path(_named.folder, name).resolve())
        else:
            module = _named_module(name)
        if not any(isinstance(value, Plugin) for value in vars(module).values()):
            raise UsageError(
                f"plugin {name} holds no source, task or protocol: give one of its module-level names a Kind, or take "
                f"it out of plugins:"
            )
        yield f"plugin {name}", module


def _file_module(name: str, path: Path) -> ModuleType:
    # The digest keeps files of one name apart; dataclasses and pydantic look their module up in sys.modules.
    module_name = f"bowstore_plugin_{path.stem}_{sha256(os.fsencode(path)).hexdigest()[:12]}"
    if module_name in sys.modules:
        return sys.modules[module_name]
    if not path.exists():
        raise UsageError(f"plugin {name} is not there ({path}); correct plugins: in the workspace file")
    check_plain_file(path)
    spec = importlib.util.spec_from_file_location(module_name, path)
    assert spec, "its name ends in .py"
    assert spec.loader, "as every file's"
    module = sys.modules[module_name] = importlib.util.module_from_spec(spec)
    try:
        _imported(f"plugin {name}", partial(spec.loader.exec_module, module))
    except BaseException:
        del sys.modules[module_name]
        raise
    return module


def _named_module(name: str) -> ModuleType:
    try:
        there = name in sys.modules or importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):  # of its package; an empty part of the name
        there = False
    if not there:
        raise UsageError(f"plugin {name} is no module that is installed; install it, or name its file, as in {name}.py")
    return _imported(f"plugin {name}", partial(importlib.import_module, name))


R = TypeVar("R")


def _imported(origin: str, load: Callable[[], R]) -> R:
    """What an import gives; what goes wrong in code of others becomes one line."""
    try:
        return load()
    except (Exception, SystemExit) as error:
        if origin == "bowstore itself":
            raise
        raise UsageError(
            f"{origin} cannot be imported: {_place(error)}{type(error).__name__}: {error}; correct it, or take it out"
        ) from error


def _place(error: BaseException) -> str:
    """File and line where an import went wrong: the innermost that belongs to no library of Python's own."""
    if isinstance(error, SyntaxError):
        return f"{error.filename}, line {error.lineno}: "
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename != __file__]
    outside = [frame for frame in frames if "importlib" not in frame.filename]
    return f"{outside[-1].filename}, line {outside[-1].lineno}: " if outside else ""
