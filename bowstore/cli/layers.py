"""The command that lists an architecture's layers."""

from pathlib import Path
from typing import Any

import click

from bowstore.cli.common import TEXT, emit
from bowstore.cli.options import command, fields


@command()
@click.argument("arch", type=TEXT)
@fields("view", "bowstore.config:ViewConfig", only=("size",), otherwise={"size": "the network's own"})
@fields("model", "bowstore.config:ModelConfig", only=("strides",))
@click.option("--all", "everything", is_flag=True, help="Every module, not only those two levels deep.")
@click.option(
    "--head", "heads", type=TEXT, multiple=True,
    help="Also what a task's head costs: rotation, location, words, clusters, supervised or linear; repeatable.",
)  # fmt: skip
@click.option("--K", "outputs", type=click.IntRange(1), help="Words or classes of the heads.")
@click.option("--json", "as_json", is_flag=True, help="Print the layers as JSON alone.")
def layers(
    arch: str,
    view: dict[str, int],
    model: dict[str, Any],
    everything: bool,
    heads: tuple[str, ...],
    outputs: int | None,
    as_json: bool,
) -> None:
    """List the layers of ARCH that give words: names, channels, maps, words an image; and what ARCH costs.

    ARCH is timm:NAME, torchvision:NAME, resnet50, wrn-28-10...; nothing is downloaded. Or a run, a checkpoint, a
    .safetensors or a training configuration: its network, for the images that it takes. Multiply-adds are those of
    convolutions and matrix products in a forward pass; a training step takes three times as many. Heads are those that
    the tasks have by default; form pyramid of task words has five such heads.
    """
    from bowstore.config import ModelConfig, load_workspace, validate
    from bowstore.errors import MissingError, UsageError
    from bowstore.models.arch import wide_sizes
    from bowstore.models.layers import describe_layers
    from bowstore.models.record import NetworkRecord
    from bowstore.models.saved import load_backbone
    from bowstore.workspace import resolve_network

    try:
        named = resolve_network(load_workspace(), arch)
    except MissingError:  # then it is an architecture, or a name that nobody knows
        named = arch
    record = load_backbone(named).saved if isinstance(named, Path) else named
    size = view.get("size")
    if isinstance(record, NetworkRecord):
        if model:
            raise UsageError(f"--strides are those that {arch} was trained with; leave them out")
        config, size = record.model, size or record.view.size
    elif model and not wide_sizes(arch):
        raise UsageError(f"--strides are those of a wide ResNet's groups, and {arch} has its own; leave them out")
    else:
        config = validate(ModelConfig, {**model, "arch": arch}, "bowstore layers")
    report = describe_layers(config, size, everything=everything, heads=heads, outputs=outputs)
    emit(report.as_dict(), report.text(), as_json)
