"""Options say what the configuration models say, and hand on what was given, as values."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import click
import pytest
from click.testing import CliRunner
from pydantic import Field

from bowstore.cli import main
from bowstore.cli.options import Command, Fields
from bowstore.config import Batch, Compile, Listed, Pair, Place, Strict, Unit


class Own(Strict):
    """Fields of every form that options have."""

    plain: int = 3
    count: Batch | None = Field(None, description="images at once; null: as many as fit")
    share: Unit = Field(0.5, description="of one")
    warmth: float = Field(1.0, gt=0, lt=2)
    way: Literal["slow", "fast"] = Field("slow", description="way; there are two")
    compiled: Compile = "auto"
    layers: Listed[str] = Field(("conv4", "conv5"), description="layers")
    sides: Pair = (1.0, 2.0)
    where: Place | None = None
    whom: Path | str = Field(description="run or file")
    whiten: bool = False
    flip: bool = Field(True, description="mirrored images")
    inside: dict[str, int] = Field(default_factory=dict)


def own_command(**how: Any) -> click.Command:
    stands = Fields(["given"], model=Own, leave_out=["inside"], **how)
    return Command("own", params=[stands], callback=lambda given: click.echo(json.dumps(given, default=repr)))


def given(*flags: str, **how: Any) -> Any:
    result = CliRunner().invoke(own_command(**how), flags)
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_only_what_was_given_is_handed_on_and_as_values() -> None:
    assert given() == {}
    assert given("--plain", "3", "--no-flip", "--whiten", "--compiled", "true", "--where", "a b", "--whom", "null") == {
        "plain": 3,
        "flip": False,
        "whiten": True,
        "compiled": True,
        "where": "PosixPath('a b')",
        "whom": "null",
    }
    assert given("--layer", "a", "--layer", "b", flags={"layers": "--layer"}) == {"layers": ["a", "b"]}
    assert given("--sides", "0.5", "2", "--compiled", "auto", "--flip") == {
        "sides": [0.5, 2.0],
        "compiled": "auto",
        "flip": True,
    }


def test_help_has_description_default_and_bounds_of_the_field() -> None:
    shown = CliRunner().invoke(own_command(otherwise={"whom": "the newest"}), ["--help"], terminal_width=110).output
    lines = [" ".join(line.split()) for line in shown.splitlines()]
    assert lines[lines.index("Options:") + 1 :] == [
        "--plain INTEGER [default: 3]",
        "--count INTEGER RANGE Images at once. [default: as many as fit] [1<=x<=1048576]",
        "--share FLOAT RANGE Of one. [default: 0.5] [0<=x<=1]",
        "--warmth FLOAT RANGE [default: 1.0] [0<x<2]",
        "--way [slow|fast] Way; there are two. [default: slow]",
        "--compiled [auto|true|false] [default: auto]",
        "--layers TEXT Layers. [default: conv4, conv5]",
        "--sides FLOAT... [default: 1.0, 2.0]",
        "--where PATH",
        "--whom TEXT Run or file. [default: the newest]",
        "--whiten",
        "--flip / --no-flip Mirrored images. [default: true]",
        "--help Show this message and exit.",
    ]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--plain", "1.5"], "'--plain': '1.5' is not a valid integer"),
        (["--count", "0"], "'--count': 0 is not in the range 1<=x<=1048576"),
        (["--share", "nan"], "'--share': 'nan' is no finite number"),
        (["--share", "1.5"], "'--share': 1.5 is not in the range 0<=x<=1"),
        (["--warmth", "2"], "'--warmth': 2.0 is not in the range 0<x<2"),
        (["--sides", "1", "x"], "'--sides': 'x' is not a valid float"),
        (["--way", "other"], "'--way': 'other' is not one of 'slow', 'fast'"),
        (["--compiled", "yes"], "'--compiled': 'yes' is not one of 'auto', 'true', 'false'"),
        (["--layers", ""], "'--layers': '' is empty (is a shell variable not set?)"),
        (["--where", "~/x"], "'--where': '~/x' begins with ~, which only a shell expands"),
        (["--whom", "\udce9"], r"'--whom': '\udce9' is not UTF-8 text"),
    ],
)
def test_bad_values_are_one_line_with_value_and_bound(flags: list[str], message: str) -> None:
    result = CliRunner().invoke(own_command(), flags)
    assert result.exit_code == 2
    assert f"Error: Invalid value for {message}" in result.stderr.splitlines()[-1]


def test_a_field_without_an_option_is_left_out_or_said() -> None:
    with pytest.raises(TypeError, match=r"no option for values of type dict\[str, int\]"):
        CliRunner().invoke(Command("own", params=[Fields(["given"], model=Own)]), ["--help"], catch_exceptions=False)


def commands(
    group: click.Group = main, prefix: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    context = click.Context(group)
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        assert command is not None
        if isinstance(command, click.Group):
            yield from commands(command, (*prefix, name))
        yield (*prefix, name), command


def test_options_of_every_command_are_its_models() -> None:
    """Type, bounds, choices and default of each option of a field, asked of pydantic and not of the adapter."""
    checked = 0
    for words, command in commands():
        options = command.get_params(click.Context(command))
        spelled = [flag for option in options for flag in option.opts if flag.startswith("-")]
        assert len(spelled) == len(set(spelled)), f"{words} has an option twice"
        for stands in (param for param in command.params if isinstance(param, Fields)):
            model = stands.model
            for name, option in stands.options.items():
                field = model.model_fields[name]
                assert option in options
                assert isinstance(option.help, str)
                shown = re.search(r"\[default: (.*)\]", option.help)
                if name not in stands.otherwise and field.default not in (None, False, ()) and not field.is_required():
                    value = field.default if isinstance(field.default, tuple) else (field.default,)
                    assert shown is not None, (words, name)
                    assert shown[1] == ", ".join(str(item).lower() if item is True else str(item) for item in value)
                bounds = {
                    key.replace("exclusiveM", "m"): bound
                    for key, bound in _schema(model, name).items()
                    if key in ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "enum")
                }
                if isinstance(option.type, click.IntRange | click.FloatRange):
                    assert (bounds.get("minimum"), bounds.get("maximum")) == (option.type.min, option.type.max), name
                if isinstance(option.type, click.Choice) and "enum" in bounds:
                    assert list(option.type.choices) == bounds["enum"], (words, name)
                checked += 1
    assert checked > 10


def _schema(model: type[Strict], name: str) -> dict[str, Any]:
    """What JSON schema says of one value of a field."""
    found = model.model_json_schema()["properties"][name]
    found = found.get("items") or found.get("prefixItems", [found])[0]
    for part in found.get("anyOf", []):
        if part.get("type") in ("integer", "number", "string", "array"):
            found = {**part.get("items", part)}
    return dict(found)
