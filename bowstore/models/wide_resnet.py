"""Wide residual networks (Zagoruyko and Komodakis, 2016), pre-activation form.

Facts of the paper's recipes: groups of (depth - 4) / 6 blocks of widths 16k, 32k, 64k; strides 1, 2, 2 on CIFAR and
2, 2, 2 on MiniImageNet; batch norm and ReLU before pooling.
"""

from collections import OrderedDict

from torch import Tensor, nn


class Block(nn.Module):
    """Pre-activation basic block: (BN, ReLU, 3x3) twice, with a 1x1 shortcut where the shape changes."""

    def __init__(self, c_in: int, c_out: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(c_in)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, 1, 1, bias=False)
        self.shortcut = nn.Conv2d(c_in, c_out, 1, stride, bias=False) if stride != 1 or c_in != c_out else None
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x_BChw: Tensor) -> Tensor:
        """Residual sum, (B, c_out, h / stride, w / stride)."""
        out = self.relu(self.bn1(x_BChw))
        # The shortcut of a changed shape starts from the activated map, as in the original.
        shortcut = x_BChw if self.shortcut is None else self.shortcut(out)
        out = self.conv2(self.relu(self.bn2(self.conv1(out))))
        return out + shortcut  # type: ignore[no-any-return]


class Group(nn.Sequential):
    """`blocks` blocks of one width; the first has the stride."""

    def __init__(self, c_in: int, c_out: int, *, stride: int, blocks: int) -> None:
        super().__init__(*(Block(c_in if n == 0 else c_out, c_out, stride if n == 0 else 1) for n in range(blocks)))


def wide_resnet_stages(
    depth: int, width: int, strides: tuple[int, int, int]
) -> tuple["OrderedDict[str, nn.Module]", dict[str, int]]:
    """Stages conv1, block1, block2, block3 of WRN-depth-width and their widths.

    The last batch norm and ReLU belong to block3, so that its map is what is pooled.
    """
    blocks = (depth - 4) // 6
    widths = (16, 16 * width, 32 * width, 64 * width)
    stages: OrderedDict[str, nn.Module] = OrderedDict(conv1=nn.Conv2d(3, widths[0], 3, 1, 1, bias=False))
    for number, stride in enumerate(strides, start=1):
        group: nn.Module = Group(widths[number - 1], widths[number], stride=stride, blocks=blocks)
        if number == 3:
            group = nn.Sequential(OrderedDict(group=group, bn=nn.BatchNorm2d(widths[3]), relu=nn.ReLU(inplace=True)))
        stages[f"block{number}"] = group
    for stage in stages.values():
        for module in stage.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return stages, dict(zip(stages, widths, strict=True))


class WideResNet(nn.Sequential):
    """WRN-depth-width: images (B, 3, H, W) to pooled features (B, 64 width); `net.block2` and the others are stages."""

    def __init__(self, depth: int, width: int, strides: tuple[int, int, int] = (1, 2, 2)) -> None:
        super().__init__(wide_resnet_stages(depth, width, strides)[0])

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """Mean over the cells of the last map, (B, 64 width)."""
        map_BChw = images_BCHW
        for stage in self:
            map_BChw = stage(map_BChw)
        return map_BChw.mean((2, 3))
