"""Faster R-CNN on the fourth stage of a residual network (C4), of torchvision's parts with Detectron2's settings.

Where torchvision differs, Detectron2 is followed: anchors are not rounded; proposals are pooled with half-pixel shifts
("aligned"); box losses are L1, divided by all sampled anchors and proposals; the last layers start smaller. The fifth
stage, shared by nobody, is the box head, with a batch norm behind it.

Legend: B images of this rank, C H W of an image, c channels, A anchors, R proposals, K classes.
"""

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops import roi_align

from bowstore.config import ViewConfig
from bowstore.errors import UsageError
from bowstore.evaluate.protocols.voc0712_detection import Schedule
from bowstore.models.backbone import Backbone
from bowstore.models.library import LibraryBackbone
from bowstore.train.distributed import World

STRIDE = 16  # of conv4
_STAGES = ("conv2", "conv3", "conv4", "conv5")
_LAYERS = ("layer1", "layer2", "layer3", "layer4")
_STEMS = (("conv1", "bn1", "act1", "maxpool"), ("conv1", "bn1", "relu", "maxpool"))
_SHAPES = (0.5, 1.0, 2.0)  # of anchors, height / width
_ANCHOR_SAMPLES = 256  # of an image, that the proposals are trained on
_BOX_WEIGHTS = (10.0, 10.0, 5.0, 5.0)


def build_detector(backbone: Backbone, view: ViewConfig, plan: Schedule, classes: int, world: World) -> GeneralizedRCNN:
    """The detector on its device, its new layers drawn from torch's global generator; it takes over the backbone.

    In training mode it gives losses by name of images (list of (3, H, W), from 0 to 1, resized) and their boxes; in
    eval mode boxes (left, top, right, bottom, pixels of the image that it was given), labels (from 1) and scores.

    Args:
        backbone: a residual network.
        view: its normalisation.
        plan: frozen stages, sizes and numbers.
        classes: K.
        world: batch norm is synchronised over its ranks.

    Raises:
        UsageError: another kind of network.
    """
    stem, *stages = residual_stages(backbone)
    trunk = Trunk([stem, *stages[:3]], channels=backbone.channels["conv4"], frozen=plan.frozen)
    width = backbone.channels["conv5"]
    head = OrderedDict(res5=stages[3], norm=nn.BatchNorm2d(width), mean=nn.AdaptiveAvgPool2d(1), flat=nn.Flatten())
    predictor = FastRCNNPredictor(width, classes + 1)
    for layer, deviation in ((predictor.cls_score, 0.01), (predictor.bbox_pred, 0.001)):
        nn.init.normal_(layer.weight, std=deviation)
        nn.init.zeros_(layer.bias)
    proposals = _Proposals(
        Anchors((plan.anchors,), (_SHAPES,)), RPNHead(trunk.out_channels, len(plan.anchors) * len(_SHAPES)),
        fg_iou_thresh=0.7, bg_iou_thresh=0.3, batch_size_per_image=_ANCHOR_SAMPLES, positive_fraction=0.5,
        pre_nms_top_n={"training": plan.kept_in_training[0], "testing": plan.kept_in_test[0]},
        post_nms_top_n={"training": plan.kept_in_training[1], "testing": plan.kept_in_test[1]}, nms_thresh=0.7,
    )  # fmt: skip
    heads = _Heads(
        AlignedPool(plan.pooled), nn.Sequential(head), predictor, fg_iou_thresh=0.5, bg_iou_thresh=0.5,
        batch_size_per_image=plan.samples, positive_fraction=0.25, bbox_reg_weights=_BOX_WEIGHTS,
        score_thresh=0.05, nms_thresh=0.5, detections_per_img=100,
    )  # fmt: skip
    detector = GeneralizedRCNN(trunk, proposals, heads, _Normalised(view))
    if world.size > 1:
        detector = synchronised(detector, world.device)
    return detector.to(world.device)


def residual_stages(backbone: Backbone) -> list[nn.Module]:
    """Stem (with its pooling), conv2, conv3, conv4 and conv5 of a residual network, cut from it.

    Raises:
        UsageError: it has no such stages.
    """
    root: Any = backbone.root()
    if isinstance(backbone, LibraryBackbone):
        table = backbone.layer_table(backbone.image_size)
        stem = next((names for names in _STEMS if all(hasattr(root, name) for name in names)), ())
        if stem and [table[name].module for name in _STAGES if name in table] == list(_LAYERS):
            return [nn.Sequential(*(getattr(root, name) for name in stem)), *(getattr(root, name) for name in _LAYERS)]
    elif set(_STAGES) <= set(backbone.layers):
        return [nn.Sequential(root["conv1"], root["pool1"]), *(root[name] for name in _STAGES)]
    raise UsageError(
        f"{backbone.arch} has no stages conv1 to conv5 of a residual network, of which detection makes trunk and box "
        "head; evaluate a network of resnet18, resnet34, resnet50 or the like, or timm:resnet50"
    )


class Trunk(nn.Module):
    """Stem, conv2, conv3 and conv4, of which the first stay as they are: weights, statistics, and in eval mode."""

    def __init__(self, stages: Sequence[nn.Module], *, channels: int, frozen: int) -> None:
        super().__init__()
        self.frozen, self.trained = nn.Sequential(*stages[:frozen]), nn.Sequential(*stages[frozen:])
        self.frozen.requires_grad_(False)
        self.out_channels = channels

    def train(self, mode: bool = True) -> "Trunk":
        """Set the mode of what is trained."""
        super().train(mode)
        self.frozen.eval()
        return self

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """Map of conv4, (B, c, H / 16, W / 16)."""
        with torch.no_grad():
            map_BChw = self.frozen(images_BCHW)
        return self.trained(map_BChw)  # type: ignore[no-any-return]


class Anchors(AnchorGenerator):  # type: ignore[misc]
    """Anchors of exact sizes."""

    def generate_anchors(self, scales: Any, aspect_ratios: Any, *args: Any, **kwargs: Any) -> Tensor:
        """As torchvision's, without rounding to whole pixels: corners around zero, (A, 4)."""
        height = torch.tensor(aspect_ratios, dtype=torch.float32).sqrt()[:, None] * torch.tensor(scales)
        width = torch.tensor(scales).square() / height
        return torch.stack([-width, -height, width, height], dim=-1).reshape(-1, 4) / 2


class _Proposals(RegionProposalNetwork):  # type: ignore[misc]
    """The proposals' losses as Detectron2 has them."""

    def compute_loss(
        self, objectness: Tensor, pred_bbox_deltas: Tensor, labels: list[Tensor], regression_targets: list[Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Cross-entropy and L1 of the sampled anchors, divided by how many there may be at most."""
        positive, negative = (torch.cat(masks).bool() for masks in self.fg_bg_sampler(labels))
        either, most = positive | negative, _ANCHOR_SAMPLES * len(labels)
        wanted = torch.cat(labels)[either]
        scores = F.binary_cross_entropy_with_logits(objectness.flatten()[either], wanted, reduction="sum")
        boxes = F.l1_loss(pred_bbox_deltas[positive], torch.cat(regression_targets)[positive], reduction="sum")
        return scores / most, boxes / most


class AlignedPool(nn.Module):
    """Square maps of proposals, of as many samples as cells lie below, all coordinates moved by half a pixel."""

    def __init__(self, side: int) -> None:
        super().__init__()
        self.side = side

    def forward(self, maps: dict[str, Tensor], boxes: list[Tensor], _shapes: Any) -> Tensor:
        """(R, c, side, side), of the one map and of boxes in pixels, a tensor an image."""
        return roi_align(  # type: ignore[no-any-return]
            maps["0"], boxes, self.side, spatial_scale=1 / STRIDE, sampling_ratio=0, aligned=True
        )


class _Heads(RoIHeads):  # type: ignore[misc]
    """The box head's losses as Detectron2 has them."""

    def forward(
        self, features: dict[str, Tensor], proposals: list[Tensor], image_shapes: Any, targets: Any = None
    ) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
        """Detections, or losses in training."""
        if not self.training:
            return super().forward(features, proposals, image_shapes)  # type: ignore[no-any-return]
        proposals, _, labels, wanted = self.select_training_samples(proposals, targets)
        pooled = self.box_head(self.box_roi_pool(features, proposals, image_shapes))
        scores_RK, deltas_R4K = self.box_predictor(pooled)
        label_R = torch.cat(labels)
        (positive,) = torch.where(label_R > 0)
        chosen = deltas_R4K.unflatten(1, (-1, 4))[positive, label_R[positive]]
        boxes = F.l1_loss(chosen, torch.cat(wanted)[positive], reduction="sum") / len(label_R)
        return [], {"loss_classifier": F.cross_entropy(scores_RK, label_R), "loss_box_reg": boxes}


class _Normalised(GeneralizedRCNNTransform):  # type: ignore[misc]
    """Images by the network's own mean and deviation, padded with zeros to multiples of the map's stride."""

    def __init__(self, view: ViewConfig) -> None:
        super().__init__(0, 0, list(view.mean), list(view.std), size_divisible=STRIDE)

    def resize(self, image: Tensor, target: Any = None) -> tuple[Tensor, Any]:
        """As they are: they come resized."""
        return image, target


# --- batch norm over several ranks


def synchronised(network: nn.Module, device: torch.device) -> Any:
    """The network with all batch norms taking their statistics over the images of all ranks."""
    if device.type != "cpu":
        return nn.SyncBatchNorm.convert_sync_batchnorm(network)  # type: ignore[no-untyped-call]
    for module in network.modules():
        if type(module) is nn.BatchNorm2d:
            module.__class__ = SyncedOnCpu
    return network


class SyncedOnCpu(nn.BatchNorm2d):
    """What PyTorch's SyncBatchNorm computes, which has no kernels for CPUs."""

    def forward(self, input: Tensor) -> Tensor:
        """Normalise by mean and deviation over all ranks; in eval mode by the running ones."""
        if not self.training:
            return super().forward(input)
        x_BChw = input.double()  # differences of large sums
        own = torch.cat(
            [x_BChw.sum((0, 2, 3)), x_BChw.square().sum((0, 2, 3)), x_BChw.new_tensor([input[:, 0].numel()])]
        )
        total = _Sum.apply(own)
        count = total[-1].detach()
        mean, square = (total[:-1] / count).chunk(2)
        variance = square - mean.square()
        self._track(mean.detach(), variance.detach() * count / (count - 1))
        scale = self.weight / (variance + self.eps).sqrt()
        out_BChw: Tensor = x_BChw * scale[:, None, None] + (self.bias - mean * scale)[:, None, None]
        return out_BChw.to(input.dtype)

    def _track(self, mean: Tensor, variance: Tensor) -> None:
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        self.num_batches_tracked += 1
        share = 1 / int(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean.float(), share)
        self.running_var.lerp_(variance.float(), share)


class _Sum(torch.autograd.Function):
    """Sum over the ranks; so is its gradient."""

    @staticmethod
    def forward(_ctx: Any, values: Tensor) -> Tensor:
        """On every rank."""
        values = values.clone()
        dist.all_reduce(values)
        return values

    @staticmethod
    def backward(_ctx: Any, *gradients: Tensor) -> Tensor:
        """The same of gradients."""
        (gradient,) = gradients
        return _Sum.forward(_ctx, gradient)
