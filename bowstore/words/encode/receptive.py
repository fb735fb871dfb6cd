"""How much of the image a cell of a feature map sees, from gradients.

Legend: H W pixels of the clean view, h w cells of the map.
"""

import torch

from bowstore.models.backbone import Backbone

_IMAGES = 2
_EFFECTIVE_SHARE = 0.9


def receptive_field(backbone: Backbone, layer: str, size: int) -> dict[str, int]:
    """The receptive field of a middle cell, measured with the network as it is on images of noise.

    Args:
        backbone: frozen, in eval mode.
        layer: one of its layers.
        size: side of the clean view, pixels.

    Returns:
        Sides of squares around the middle of the cell, in pixels of the clean view, cut to its size: `whole`, beyond
        which no pixel moves the cell, and `effective`, which holds nine tenths of the squared gradient: what the cell
        mostly sees.
    """
    device = next(backbone.parameters()).device
    generator = torch.Generator().manual_seed(0)
    images_BCHW = torch.randn(_IMAGES, 3, size, size, generator=generator).to(device).requires_grad_()
    with torch.enable_grad():
        map_Bchw = backbone.feature_maps(images_BCHW, [layer])[layer]
        row, column = map_Bchw.shape[2] // 2, map_Bchw.shape[3] // 2
        seen = map_Bchw[:, :, row, column].float().square().sum()
    (gradient_BCHW,) = torch.autograd.grad(seen, images_BCHW)
    energy_HW = gradient_BCHW.double().square().sum((0, 1)).cpu()
    middle = [(at + 0.5) * size / cells - 0.5 for at, cells in ((row, map_Bchw.shape[2]), (column, map_Bchw.shape[3]))]
    y, x = ((torch.arange(size) - at).abs() for at in middle)
    ring_HW = torch.maximum(y[:, None], x[None, :]).ceil().long()  # distance from the middle of the cell
    share = torch.bincount(ring_HW.flatten(), weights=energy_HW.flatten()).cumsum(0)
    if not share[-1] > 0:
        return {"whole": size, "effective": size}
    share = share / share[-1]
    rings = int((energy_HW > 0).long().mul(ring_HW).max()), int((share < _EFFECTIVE_SHARE).sum())
    return {name: min(2 * ring + 1, size) for name, ring in zip(("whole", "effective"), rings, strict=True)}
