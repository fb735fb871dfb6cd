"""Residual networks for Detectron2: what its checkpointer reads, and what its configuration has to say.

Names are those that its own converter of torchvision's networks writes, and MoCo's.
"""

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from bowstore.config import ViewConfig
from bowstore.models.arch import OF_BASIC_BLOCKS, V1


def detectron2_name(name: str) -> str:
    """Its name for a tensor of torchvision's: conv1 and bn1 are the stem, layerN is res(N + 1).

    Batch norms belong to their convolutions: bnX is convX.norm; downsample.0 and .1 are shortcut and shortcut.norm.
    """
    if stage := re.match(r"layer(\d)\.", name):
        name = f"res{int(stage[1]) + 1}.{name[stage.end() :]}"
    else:
        name = f"stem.{name}"
    name = re.sub(r"\bbn(\d)\.", r"conv\1.norm.", name)
    return name.replace("downsample.0.", "shortcut.").replace("downsample.1.", "shortcut.norm.")


def detectron2_model(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """What is pickled, of tensors under torchvision's names: NumPy arrays.

    Its checkpointer finds the backbone's place in a detector by these names' ends (`matching_heuristics`).
    """
    arrays = {detectron2_name(name): tensor.detach().cpu().contiguous().numpy() for name, tensor in state.items()}
    return {"model": arrays, "__author__": "bowstore", "matching_heuristics": True}


def detectron2_lines(arch: str, view: ViewConfig, out: str) -> tuple[str, ...]:
    """Python that tells a configuration `cfg` of its what network that is, and what images it takes.

    Args:
        arch: name of a residual network, as torchvision has it, or ending with `V1`.
        view: says how images were normalised.
        out: the file.
    """
    depth = int(re.findall(r"\d+", arch)[0])
    resnets: dict[str, Any] = {"DEPTH": depth, "STRIDE_IN_1X1": arch.endswith(V1)}
    if arch in OF_BASIC_BLOCKS:
        resnets["RES2_OUT_CHANNELS"] = 64
    if groups := re.search(r"_(\d+)x(\d+)d", arch):
        resnets |= {"NUM_GROUPS": int(groups[1]), "WIDTH_PER_GROUP": int(groups[2])}
    elif arch.startswith("wide"):
        resnets["WIDTH_PER_GROUP"] = 128
    mean, std = ([round(255 * value, 3) for value in values] for values in (view.mean, view.std))
    return (
        f'cfg.MODEL.WEIGHTS = "{out}"',
        *(f"cfg.MODEL.RESNETS.{name} = {value}" for name, value in resnets.items()),
        f"cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD = {mean}, {std}",
        'cfg.INPUT.FORMAT = "RGB"',
    )
