"""Commands of README, docs and configurations work as typed: their options, configurations and keys; and links lead."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest

from bowstore.cli import main
from bowstore.recipes.file import load_recipe
from bowstore.train.config import load_train_config

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))
MADE_UP = {"mine.yaml", "recipe.yaml", "RECIPE", "TABLE", "NAME", "finetune"}
_COMMAND = re.compile(r"(?:.*\s)?bowstore ([a-z].*)")
_REMARK = re.compile(r"\s#\s.*|,\s.*|\s{3,}.*|\s\(.*|(?:--set )?\.\.\.")


def commands(text: str) -> Iterator[list[str]]:
    """Arguments of each command in indented lines, in headers of configurations, and in code within a sentence."""
    text = text.replace("\\\n", " ")
    lines = re.findall(r"^(?: {4}|# Command:|# {6,})(.*)", text, re.MULTILINE)
    lines += [code for code in re.findall(r"`([^`\n]+)`", text) if re.match(r"(torchrun|taskset|bowstore) ", code)]
    for part in (part for line in lines for part in re.split(r"\s(?:&&?|;)\s", line)):
        if found := _COMMAND.fullmatch(re.sub(r"\s#\s.*", "", part)):
            yield shlex.split(_REMARK.sub("", found[1]))


def parsed(arguments: list[str]) -> dict[str, Any]:
    """What a command makes of its options; placeholders for numbers stand for 0."""
    command: click.Command = main
    context = click.Context(main)
    rest = ["0" if text in "SN" else text for text in arguments]
    while isinstance(command, click.Group) and rest and rest[0] not in MADE_UP and not rest[0].startswith("-"):
        found = command.get_command(context, name := rest.pop(0))
        assert found is not None, f"no command {name}"
        command = found
    if isinstance(command, click.Group) or not rest:
        return {}
    values = command.make_context(str(command.name), rest).params
    return values | values.get("given", {})


@pytest.mark.parametrize("page", [*PAGES, *CONFIGS], ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_are_those_of_today(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # what is named without a path comes with bowstore
    for arguments in commands(page.read_text(encoding="utf-8")):
        try:
            given = parsed(arguments)
            overrides = given.get("overrides", ())
            if isinstance(config := given.get("config"), Path):
                load_train_config(config, overrides)
            if (teacher := given.get("teacher", "")).endswith(".yaml"):
                load_train_config(Path(teacher))
            recipe = str(given.get("recipe") or given.get("table") or "RECIPE")
            if recipe not in MADE_UP:
                load_recipe(Path(f"{recipe}_small" if given.get("small") else recipe), overrides)
        except Exception as error:
            raise AssertionError(f"{page.name}: bowstore {shlex.join(arguments)}: {error}") from error


def anchors(page: Path) -> set[str]:
    """Of its headings, as a browser has them."""
    headings = re.findall(r"^#+ (.*)", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_links_lead_somewhere() -> None:
    for page in PAGES:
        for target, anchor in re.findall(r"\]\((?!https?:)([^)#]*)(?:#([^)]+))?\)", page.read_text(encoding="utf-8")):
            path = page.parent / target if target else page
            assert path.exists(), f"{page.name}: {target}"
            assert not anchor or anchor in anchors(path), f"{page.name}: {target}#{anchor}"
