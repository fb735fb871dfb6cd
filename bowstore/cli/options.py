"""Options of commands out of the fields of configuration models: type, bounds, choices, default and help, said once.

`fields` stands among a command's options for those of a model, which is looked up when the command is used or asked
for --help: `bowstore --help` loads no pydantic. The command gets the values of the flags that were given, and no
others: what was not given is for the model to say.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

import click
from click.core import ParameterSource

from bowstore.cli.common import PATH, TEXT, Number, Setting, Whole
from bowstore.plugins import attribute

if TYPE_CHECKING:
    from pydantic import BaseModel
    from pydantic.fields import FieldInfo

F = TypeVar("F", bound=Callable[..., Any])


class Fields(click.Argument):
    """Stands among the parameters of a `Command` for the options of a model's fields.

    Args:
        param_decls: the command's argument that gets the values.
        model: the model, or "module:NAME" of it.
        only: names of fields, in the order of --help; none: all.
        leave_out: names of fields that get no option.
        flags: how options are spelled that do not have the field's name with dashes; several spellings with spaces
            between them.
        types: of options whose values the field's type does not bound, as names in a registry.
        otherwise: what goes for fields that were not given, where it is not the model that says so.
    """

    def __init__(
        self,
        param_decls: Sequence[str],
        *,
        model: "type[BaseModel] | str",
        only: Sequence[str] = (),
        leave_out: Sequence[str] = (),
        flags: Mapping[str, str] | None = None,
        types: "Mapping[str, click.ParamType[Any]] | None" = None,
        otherwise: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(param_decls, required=False, expose_value=False)
        self._source, self._only, self._leave_out = model, only, leave_out
        self.flags, self.types, self.otherwise = flags or {}, types or {}, otherwise or {}

    @cached_property
    def model(self) -> "type[BaseModel]":
        """The model, loaded now if it has not been."""
        model: type[BaseModel] = attribute(self._source) if isinstance(self._source, str) else self._source
        return model

    @cached_property
    def options(self) -> dict[str, click.Option]:
        """The option of each field."""
        known = self.model.model_fields
        own = self.model.__annotations__  # come first, and then those of its bases
        names = self._only or sorted((n for n in known if n not in self._leave_out), key=lambda n: n not in own)
        return {name: self._option(name, known[name]) for name in names}

    def _option(self, name: str, field: "FieldInfo") -> click.Option:
        flags = self.flags.get(name, f"--{name.replace('_', '-')}").split()
        value = partial(
            click.Option,
            help=_help(field, self.otherwise.get(name)),
            expose_value=False,
            callback=partial(_keep, str(self.name), name),
        )
        # A name of its own: two models of one command may have a field of the same name, of which one has no option.
        names = [f"{self.name}_{name}", *flags]
        bare, notes = _bare(field.annotation, field.metadata)
        if bare is bool:
            off = [f"{flag}/--no-{flag[2:]}" for flag in flags]
            return value([names[0], *(off if field.default else flags)], is_flag=True, default=None)
        if get_origin(bare) is not tuple:
            return value(names, type=self.types.get(name) or option_type(bare, notes))
        first, *others = get_args(bare)
        if others == [Ellipsis]:
            return value(names, type=option_type(first), multiple=True)
        return value(names, type=option_type(first), nargs=1 + len(others))


class Command(click.Command):
    """A command whose parameters may hold `Fields`; each becomes a dictionary of the values that were given."""

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        """The parameters, with the options of models in their places."""
        placed = super().get_params(ctx)
        return [option for it in placed for option in (it.options.values() if isinstance(it, Fields) else [it])]

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse; with no flag at all, the dictionaries are empty."""
        ctx.params.update({str(it.name): {} for it in self.params if isinstance(it, Fields)})
        return super().parse_args(ctx, args)


command = partial(click.command, cls=Command)


def fields(given: str, model: str, **how: Any) -> Callable[[F], F]:
    """Options of a model's fields, as a decorator of a command's function, whose argument `given` has their values.

    Args:
        given: name of the argument, a dictionary by the names of fields.
        model: "module:NAME".
        how: as for `Fields`.
    """
    return click.argument(given, cls=Fields, model=model, **how)


def _keep(given: str, name: str, context: click.Context, option: click.Parameter, value: Any) -> None:
    if context.get_parameter_source(str(option.name)) not in (None, ParameterSource.DEFAULT):
        context.params[given][name] = value


def _help(field: "FieldInfo", otherwise: str | None) -> str:
    """The field's description as a sentence, and its default; "; null: ..." at the end says what null stands for."""
    text, _, null = (field.description or "").partition("; null: ")
    default = otherwise or null or ("" if field.is_required() else _shown(field.default))
    return f"{text[:1].upper()}{text[1:]}{'.' if text else ''}{f'  [default: {default}]' if default else ''}"


def _shown(default: Any) -> str:
    if isinstance(default, tuple):
        return ", ".join(_shown(item) for item in default)
    return "" if default is None or default is False else "true" if default is True else str(default)


def _bare(annotation: Any, metadata: Sequence[Any] = ()) -> tuple[Any, list[Any]]:
    """A type without its annotations and None, and what the annotations say of it."""
    notes = list(metadata)
    while True:
        if get_origin(annotation) is Annotated:
            annotation, *more = get_args(annotation)
            notes += [item for note in more for item in getattr(note, "metadata", [note])]
        elif get_origin(annotation) in (Union, UnionType) and NoneType in get_args(annotation):
            annotation = Union[tuple(part for part in get_args(annotation) if part is not NoneType)]  # noqa: UP007
        else:
            return annotation, notes


def option_type(annotation: Any, metadata: Sequence[Any] = ()) -> "click.ParamType[Any]":
    """The type of an option for values of a field: the one place that says how a constraint reads on a command line.

    Args:
        annotation: the field's type.
        metadata: its constraints, as pydantic has them.

    Raises:
        TypeError: there is no option for such values; leave the field out.
    """
    bare, notes = _bare(annotation, metadata)
    parts = set(get_args(bare)) if get_origin(bare) in (Union, UnionType) else {bare}
    if parts == {bool, Literal["auto"]}:
        return Setting()
    if get_origin(bare) is Literal:
        return click.Choice(get_args(bare))
    if bare in (int, float):
        said = {key: getattr(note, key) for note in notes for key in ("ge", "gt", "le", "lt") if hasattr(note, key)}
        if not said:
            return click.INT if bare is int else click.FLOAT
        low, high = said.get("ge", said.get("gt")), said.get("le", said.get("lt"))
        return (Whole if bare is int else Number)(low, high, "gt" in said, "lt" in said)
    if parts == {Path}:
        return PATH
    if str in parts:  # what a text means, a path or a model's value, is for the command to say
        return TEXT
    raise TypeError(f"no option for values of type {bare}")
