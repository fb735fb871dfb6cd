"""docs/house.md says which file does what: it names every module, and none that is not there."""

import re
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parents[1]
BY_FOLDER = ("bowstore/cli", "bowstore/benchmarks", "bowstore/data/sources")  # whose modules are of one kind each


def test_the_house_names_its_modules() -> None:
    text = (ROOT / "docs/house.md").read_text(encoding="utf-8")
    named = Counter(name.rpartition("/")[2] for name in re.findall(r"`([a-z_0-9/]+\.py)`", text))
    modules = [path for room in ("bowstore", "tools") for path in (ROOT / room).rglob("[!_]*.py")]
    there = Counter(path.name for path in modules)
    due = Counter(path.name for path in modules if path.parent.relative_to(ROOT).as_posix() not in BY_FOLDER)
    assert named - there == Counter(), "names modules that are not there"
    assert due - named == Counter(), "does not name all"
    assert all(f"`{Path(room).name}/`" in text for room in BY_FOLDER)
