"""The command that lists an architecture's layers."""

import click

from bowstore.cli.common import TEXT, emit
from bowstore.cli.options import command, fields


@command()
@click.argument("arch", type=TEXT)
@fields("view", "bowstore.config:ViewConfig", only=("size",), otherwise={"size": "the network's own"})
@click.option("--all", "everything", is_flag=True, help="Every module, not only those two levels deep.")
@click.option("--json", "as_json", is_flag=True, help="Print the layers as JSON alone.")
def layers(arch: str, view: dict[str, int], everything: bool, as_json: bool) -> None:
    """List the layers of ARCH that give words: names, channels, maps, words an image.

    ARCH is timm:NAME, torchvision:NAME, resnet50, wrn-28-10...; nothing is downloaded.
    """
    from bowstore.models.layers import describe_layers

    report = describe_layers(arch, view.get("size"), everything=everything)
    emit(report.as_dict(), report.text(), as_json)
