"""What a section of the GPU check imports of the packages that a GPU machine may lack."""

import ast
import builtins
import importlib.util
import sys
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import bowstore.cli  # noqa: F401 - looking for one of its modules loads it, which must not begin within itself

LACKING = ("nvidia.dali", "zarr", "numcodecs", "faiss", "webdataset", "pydantic", "tensorboard")
OURS = ("bowstore", "gpu_")


@contextmanager
def only(there: Collection[str]) -> Iterator[set[str]]:
    """Hide the packages of `LACKING` but for these, as if they were not installed.

    Modules of this project that are loaded already load nothing again: what their top levels need of `LACKING` is read
    from their sources, and collected in the set.
    """
    hidden = tuple(name for name in LACKING if name not in there)
    found: set[str] = set()
    real = builtins.__import__

    def importing(name: str, globals: Any = None, locals: Any = None, fromlist: Any = (), level: int = 0) -> Any:
        if level == 0 and name.startswith(OURS) and str((globals or {}).get("__name__", "")).startswith(OURS):
            found.update(*(needed(each) for each in (name, *(f"{name}.{part}" for part in fromlist or ()))))
        return real(name, globals, locals, fromlist, level)

    finders = [_Blind(finder, hidden) for finder in sys.meta_path]
    loaded = {name: sys.modules.pop(name) for name in list(sys.modules) if _is_of(name, hidden)}
    try:
        with patch.object(sys, "meta_path", finders), patch.object(builtins, "__import__", importing):
            yield found
    finally:
        sys.modules.update(loaded)


@dataclass(frozen=True)
class _Blind:
    """A finder of modules that finds none of these packages."""

    finder: Any
    hidden: tuple[str, ...]

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        return None if _is_of(name, self.hidden) else self.finder.find_spec(name, path, target)


def _is_of(module: str, packages: Collection[str]) -> bool:
    return any(f"{module}.".startswith((f"{package}.", f"torch.utils.{package}.")) for package in packages)


@cache
def needed(module: str) -> frozenset[str]:
    """The packages of `LACKING` that a module needs to be loaded, itself included."""
    found: set[str] = set()
    seen, waiting = set(), [module]
    while waiting:
        if (name := waiting.pop()) in seen:
            continue
        seen.add(name)
        found |= {package for package in LACKING if _is_of(name, [package])}
        if name.startswith(OURS):
            waiting += _top_level(name)
    return frozenset(found)


def _top_level(name: str) -> list[str]:
    """What the source of a module imports as it is loaded, outside functions and type checks."""
    parent, _, _ = name.rpartition(".")
    try:
        found = importlib.util.find_spec(name)
    except ModuleNotFoundError:  # the parent is a module: `name` is something in it
        return []
    if found is None or not found.origin or not found.origin.endswith(".py"):
        return []
    imports = [parent] if parent else []
    for node in ast.parse(Path(found.origin).read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Import):
            imports += [each.name for each in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            imports += [node.module, *(f"{node.module}.{each.name}" for each in node.names)]
    return imports
