"""docs/house.md is one screen that names every room of the package and every module above the rooms."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "bowstore"
PAGE = (ROOT / "docs/house.md").read_text(encoding="utf-8")


def test_the_house_fits_one_screen() -> None:
    lines = PAGE.splitlines()
    assert len(lines) <= 60
    assert max(map(len, lines)) <= 130


def test_the_house_names_its_rooms_and_what_stands_above_them() -> None:
    rooms = {f"{path.parent.name}/" for path in PACKAGE.rglob("__init__.py")}
    modules = {path.name for path in PACKAGE.glob("[!_]*.py")}
    assert {room for room in rooms if room not in PAGE} == set()
    named = set(re.findall(r"([a-z_0-9]+\.py)\b", PAGE))
    assert named == modules


def test_the_first_line_of_each_module_says_what_is_in_it() -> None:
    for path in (path for room in ("bowstore", "tools") for path in (ROOT / room).rglob("[!_]*.py")):
        first = (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").partition("\n")[0]
        assert first.endswith((".", "?", ":", ";", ",")), path
