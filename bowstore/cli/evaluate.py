"""Commands that evaluate a frozen representation: one for each protocol, made of its settings."""

from functools import partial
from typing import TYPE_CHECKING, Any

import click

from bowstore.cli.common import emit
from bowstore.cli.options import Command, Fields

if TYPE_CHECKING:
    from bowstore.evaluate.protocol import Kind
    from bowstore.plugins import Registry


class _Protocols(click.Group):
    """A command for each protocol: bowstore's own, those of installed packages and of the workspace's plugins."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Names of the protocols."""
        return list(_protocols().names())

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command:
        """The command of one.

        Raises:
            UsageError: there is none of that name.
        """
        return _command(_protocols().get(cmd_name))


def _protocols() -> "Registry[Kind]":
    from bowstore.config import load_workspace
    from bowstore.evaluate.protocols import PROTOCOLS

    load_workspace()  # which names plugins
    return PROTOCOLS


@click.group(name="eval", cls=_Protocols)
def evaluate() -> None:
    """Evaluate a frozen representation: a run, or any network of torchvision and timm with a weights file.

    \b
    bowstore eval knn                                              the newest finished run
    bowstore eval knn --run runs/mine                              a run, a checkpoint or a .safetensors
    bowstore eval knn --arch timm:resnet50 --weights FILE          anybody's network
    bowstore compare runs/mine runs/other                          what was measured, side by side

    Results go to RUN/eval/PROTOCOL.json, of a network that is no run to networks/NAME/eval/PROTOCOL.json.
    """  # noqa: D301 - click reads the backspace as "do not wrap"


def _command(kind: "Kind") -> click.Command:
    from bowstore.evaluate.config import OF_FEATURES, EvalConfig

    own = kind.settings.model_fields  # have one option for both: --seed
    left_out = [*(OF_FEATURES if kind.run else ()), *(name for name in EvalConfig.model_fields if name in own)]
    return Command(
        kind.name,
        help=kind.help,
        callback=partial(_evaluate, kind),
        params=[
            Fields(["settings"], model=kind.settings, flags=kind.flags),
            Fields(["config"], model=EvalConfig, leave_out=left_out),
            click.Option(["--json", "as_json"], is_flag=True, help="Print the result as JSON alone."),
        ],
    )


def _evaluate(kind: "Kind", settings: dict[str, Any], config: dict[str, Any], as_json: bool) -> None:
    from bowstore.config import dump, load_workspace, validate
    from bowstore.evaluate.config import EvalConfig
    from bowstore.evaluate.results import result_table
    from bowstore.evaluate.runner import evaluate
    from bowstore.torchrun import ranks

    asked = validate(kind.settings, settings, f"eval {kind.name}")
    result = evaluate(kind, asked, validate(EvalConfig, config, f"eval {kind.name}"), load_workspace())
    if ranks().first:
        emit(dump(result), result_table(result, result.inputs["run"] or kind.name), as_json)
