"""The command that writes a network for other code: export."""

from pathlib import Path
from typing import Any

import click

from bowstore.cli.common import PATH, emit
from bowstore.cli.options import command, fields


@command()
@click.argument("paths", type=PATH, nargs=-1, required=True, metavar="[RUN] OUT")
@fields("given", "bowstore.config:ExportConfig")
@click.option("--json", "as_json", is_flag=True, help="Print what was written as JSON alone.")
def export(paths: tuple[Path, ...], given: dict[str, Any], as_json: bool) -> None:
    """Write the network of RUN, without its classifier, to the file OUT under names that other code loads.

    RUN is a run, a checkpoint or a backbone.safetensors.  [default: newest finished run]  OUT ends with .pth or .pt
    (a state dict) or .safetensors, or .pkl for Detectron2; an earlier export is replaced. What it prints loads the
    network:

    \b
    bowstore export OUT.pth --format torchvision
      import torch, torchvision
      net = torchvision.models.resnet50()
      net.fc = torch.nn.Identity()
      net.load_state_dict(torch.load("OUT.pth"))

    \b
    bowstore export OUT.pth --format timm
      import torch, timm
      net = timm.create_model("resnet50", num_classes=0)
      net.load_state_dict(torch.load("OUT.pth"))

    Detectron2 reads residual networks from a .pkl; what is printed belongs into its configuration:

    \b
    bowstore export OUT.pkl --format detectron2

    No library has wide residual networks: their definition is written beside OUT, as wide_resnet.py.
    """  # noqa: D301 - click reads the backspace as "do not wrap"
    from bowstore.config import ExportConfig, load_workspace, validate
    from bowstore.errors import UsageError
    from bowstore.models.export import export_network
    from bowstore.workspace import find_run, newest_run

    if len(paths) > 2:
        raise UsageError(f"export takes a run and a file, not {len(paths)} paths; leave out {paths[2]}")
    workspace = load_workspace()
    run = find_run(workspace, paths[0]) if len(paths) == 2 else newest_run(workspace)
    exported = export_network(run, paths[-1], validate(ExportConfig, given, "export"))
    emit(exported.as_dict(), exported.text(), as_json)
