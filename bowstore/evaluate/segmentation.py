"""Linear segmentation of VOC2012 (`protocols/segmentation.py`): a classifier of the places of one frozen map.

Images are squashed to a square and seen without augmentation, so that each map is computed once. The logits of the
map's places are upsampled to the masks. An upsampled logit is a weighted mean of logits, first over rows, then over
columns: two products of matrices, which unlike torch's own upsampling give the same digits every time on a GPU, too.
The loss and its gradient are made of one image at a time, as 21 logits a pixel of a batch would take a gigabyte.

Legend: N images, B batch, c channels, h w places of the map, H W pixels of a mask, K classes, P places.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from bowstore.config import Workspace
from bowstore.errors import DataError, UsageError
from bowstore.evaluate.masks import CLASSES, VOID, Listed, Masks, read_listed, read_masks
from bowstore.evaluate.protocol import DataSets, Features, Scores
from bowstore.evaluate.protocols.segmentation import SegmentationSettings
from bowstore.evaluate.voc_layout import FileSplit, of_files, refuse_shared
from bowstore.exact import exact_float32
from bowstore.gpu import resident
from bowstore.models.backbone import Backbone
from bowstore.models.pooling import Tap
from bowstore.progress import Progress

_MAP = "map"
_VOC12 = {False: (1464, 1449), True: (10582, 1449)}  # images in train or trainaug, and val


@dataclass(frozen=True)
class HeadConfig:
    """BatchNorm and a 1x1 convolution, and how they are trained.

    Attributes:
        epochs: passes over the train images.
        batch: images a step; what is left of an epoch's order is not used.
        lr: learning rate of the first step.
        power: the rate falls as (1 - step / steps) ** power.
        momentum: of SGD.
        weight_decay: on all parameters.
        init_std: deviation of the convolution's weights at the start; its bias starts at zero.
        seed: of these weights and of the order of the images.
    """

    epochs: int = 40
    batch: int = 16
    lr: float = 0.01
    power: float = 0.9
    momentum: float = 0.9
    weight_decay: float = 5e-4
    init_std: float = 0.01
    seed: int = 0


def learning_rate(step: int, steps: int, config: HeadConfig) -> float:
    """Learning rate of a step, from 0, of so many in all."""
    return float(config.lr * (1 - step / steps) ** config.power)


def data(settings: SegmentationSettings, _workspace: Workspace) -> DataSets:
    """Train and val images, all their masks read and checked: what can be wrong before an image is decoded.

    Raises:
        MissingError, DataError: as `masks.read_listed` and `masks.read_masks`; fewer train images than a batch; masks
            of void alone.
        MismatchError: images that are in both splits.
    """
    train, val = _listed(settings)
    if len(train) < (batch := HeadConfig().batch):
        raise DataError(f"{train.source} lists {len(train)} images, and a batch has {batch}; list at least {batch}")
    splits = {"train": _split(train, "train"), "val": _split(val, "test")}
    refuse_shared(splits["train"], splits["val"], str(val.source.parent))
    return DataSets(
        splits=splits,
        view={"size": settings.size, "resize": None, "squash": False},
        dataset="voc12" if (len(train), len(val)) == _VOC12[settings.trainaug] else None,
    )


def _listed(settings: SegmentationSettings) -> tuple[Listed, Listed]:
    assert settings.voc is not None, "resolved"
    return read_listed(settings.voc, "trainaug" if settings.trainaug else "train"), read_listed(settings.voc, "val")


def _split(listed: Listed, role: str) -> FileSplit:
    masks = read_masks(listed, None, f"{listed.source.stem} masks")
    if not masks.present_NK.any():
        raise DataError(f"{listed.source}: its masks hold nothing but {VOID} (void); list images with objects")
    return of_files(listed.images, labels=masks.present_NK, classes=CLASSES, fingerprint=masks.fingerprint, role=role)


def map_side(settings: SegmentationSettings) -> int:
    """Places a side of the map that the protocol's id speaks of."""
    return -(-settings.size // settings.stride)


def taps(backbone: Backbone, settings: SegmentationSettings, size: int) -> Mapping[str, Tap]:
    """The whole map of the last stage, or of another layer, as it is.

    Raises:
        UsageError: a layer that the backbone does not have, or a map of another stride than the id says.
    """
    layer = backbone.resolve(settings.layer or backbone.layers[-1])
    rows, columns = backbone.layer_table(size)[layer].grid
    stride = -(-size // rows)  # one number for one map, so that no two ids mean the same
    whole = -(-size // stride) == rows == columns
    if settings.stride != stride or not whole:
        raise UsageError(
            f"{layer} of {backbone.arch} has a map of {rows} x {columns} places of images of {size} pixels, and the "
            f"protocol id says stride {settings.stride}; give {f'--stride {stride}' if whole else 'another --size'}"
        )
    return {_MAP: Tap(layer)}


def score(features: Features, settings: SegmentationSettings) -> Scores:
    """Train the classifier on the maps of the train images; mean intersection over union on all of val.

    Raises:
        DataError: as `train_head`, and as `masks.read_masks`.
    """
    start = time.monotonic()
    device, side, config = torch.device(features.device), map_side(settings), HeadConfig(seed=settings.seed)
    train_Nd, val_Nd = (resident(torch.from_numpy(features[name].taps[_MAP]), device) for name in ("train", "val"))
    train_Nchw, val_Nchw = (maps_Nd.view(len(maps_Nd), -1, side, side) for maps_Nd in (train_Nd, val_Nd))
    learned, compared = _listed(settings)
    size = settings.masks or settings.size
    masks = read_masks(learned, size, "train masks")
    with exact_float32():
        head, losses = train_head(train_Nchw, masks, config=config, device=device)
        masks = read_masks(compared, None if settings.original else size, "val masks")
        confusion_KK = compare(head, val_Nchw, masks, device=device)
    iou_K = intersection_over_union(confusion_KK)
    return Scores(
        metrics={
            "miou": float(np.nanmean(iou_K)),
            "pixel_accuracy": float(np.trace(confusion_KK) / confusion_KK.sum()),
        },
        details={
            "iou": {name: None if np.isnan(iou) else float(iou) for name, iou in zip(CLASSES, iou_K, strict=True)},
            "confusion": confusion_KK,
            "losses": losses,
            "head_seconds": round(time.monotonic() - start, 3),
        },
        settings={"head": asdict(config), "map": list(train_Nchw.shape[1:])},
    )


def train_head(
    maps_Nchw: Tensor, masks: Masks, *, config: HeadConfig, device: torch.device
) -> tuple[nn.Module, list[float]]:
    """The classifier, in eval mode, and the mean loss of each epoch, nats a pixel.

    Args:
        maps_Nchw: float32 or float16, finite; in memory, mapped, or on the device.
        masks: all of one size.
        config: how it is trained.
        device: where.

    Raises:
        DataError: a loss that diverges.
    """
    generator = torch.Generator().manual_seed(config.seed)
    with torch.random.fork_rng(devices=[]):  # what torch draws for its own start is not the caller's
        norm, layer = nn.BatchNorm2d(maps_Nchw.shape[1]), nn.Conv2d(maps_Nchw.shape[1], len(CLASSES), 1)
    nn.init.normal_(layer.weight, std=config.init_std, generator=generator)
    nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
    head = nn.Sequential(norm, layer).to(device).train()
    optimizer = torch.optim.SGD(
        head.parameters(), lr=config.lr, momentum=config.momentum, weight_decay=config.weight_decay
    )
    of_epoch = len(maps_Nchw) // config.batch
    steps, losses = config.epochs * of_epoch, []
    with Progress("segmentation head", config.epochs, "epochs") as progress:
        for epoch in range(config.epochs):
            order_N = torch.randperm(len(maps_Nchw), generator=generator)[: of_epoch * config.batch]
            total = torch.zeros((), device=device)
            for step, rows_B in enumerate(torch.split(order_N, config.batch), epoch * of_epoch):
                optimizer.param_groups[0]["lr"] = learning_rate(step, steps, config)
                maps_Bchw = maps_Nchw[rows_B.to(maps_Nchw.device)].to(device).float()
                logits_BKhw = head(maps_Bchw)
                class_BHW = torch.from_numpy(np.stack([masks[row] for row in rows_B.tolist()])).to(device).long()
                loss, gradient_BKhw = pixel_loss(logits_BKhw.detach(), class_BHW)
                optimizer.zero_grad()
                logits_BKhw.backward(gradient_BKhw)
                optimizer.step()
                total += loss
            losses.append(total.item() / of_epoch)
            if not np.isfinite(losses[-1]):
                raise DataError(
                    f"the loss is {losses[-1]} in epoch {epoch + 1} of {config.epochs}, of maps with values up to "
                    f"{maps_Bchw.abs().max().item():.3g}; look at the network's weights"
                )
            progress.advance(note=f"loss {losses[-1]:.3f}")
    return head.eval(), losses


@lru_cache(maxsize=512)  # images of VOC have a few hundred heights and widths
def interpolation(places: int, pixels: int) -> Tensor:
    """Weights (pixels, places) of linear interpolation in one direction, float64; a place lies amid its pixels.

    As torch's with `align_corners` false: pixels before the first middle, or behind the last, have its value.
    """
    places_11PP = torch.eye(places, dtype=torch.float64)[None, None]
    return F.interpolate(places_11PP, size=(pixels, places), mode="bilinear")[0, 0]


def upsampled(logits_BKhw: Tensor, pixels: Sequence[int]) -> Tensor:
    """Logits (B, K, H, W) of so many pixels (H, W), bilinear."""
    rows_Hh, columns_Ww = (each.to(logits_BKhw) for each in map(interpolation, logits_BKhw.shape[2:], pixels))
    return rows_Hh @ logits_BKhw @ columns_Ww.T


def pixel_loss(logits_BKhw: Tensor, class_BHW: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy of the upsampled logits, nats, mean over pixels that are not void, and its gradient (B, K, h, w).

    Of one image after the other: what autograd holds is several copies of 21 logits a pixel.

    Args:
        logits_BKhw: of the map's places, detached.
        class_BHW: int64, the masks.
    """
    share = 1 / (class_BHW != VOID).sum().clamp(min=1).to(logits_BKhw)
    total, leaf_BKhw = logits_BKhw.new_zeros(()), logits_BKhw.requires_grad_()
    for logits_1Khw, class_1HW in zip(torch.split(leaf_BKhw, 1), torch.split(class_BHW, 1), strict=True):
        pixels_1KHW = upsampled(logits_1Khw, class_1HW.shape[1:])
        # Summed apart from the loss, whose own sum has other digits every time on a GPU.
        loss = share * F.cross_entropy(pixels_1KHW, class_1HW, ignore_index=VOID, reduction="none").sum()
        loss.backward()  # type: ignore[no-untyped-call]
        total += loss.detach()
    assert leaf_BKhw.grad is not None
    return total, leaf_BKhw.grad


@torch.no_grad()
def compare(head: nn.Module, maps_Nchw: Tensor, masks: Masks, *, device: torch.device) -> NDArray[np.int64]:
    """Pixels (K, K) of each true class (row) that were given each class (column), over all images; void left out."""
    classes = len(CLASSES)
    counts = torch.zeros(classes**2, dtype=torch.int64, device=device)
    with Progress("segmentation", len(maps_Nchw)) as progress:
        for row in range(len(maps_Nchw)):
            class_HW = torch.from_numpy(masks[row]).to(device).long()
            (logits_KHW,) = upsampled(head(maps_Nchw[row : row + 1].to(device).float()), class_HW.shape)
            both = (classes * class_HW + logits_KHW.argmax(0))[class_HW != VOID]
            counts += torch.bincount(both, minlength=classes**2)
            progress.advance()
    return counts.reshape(classes, classes).cpu().numpy()


def intersection_over_union(confusion_KK: NDArray[np.int64]) -> NDArray[np.float64]:
    """Of each class (K,): pixels that are it and were given it, over those of either; NaN of classes in no mask.

    A few pixels that are given a class that is not there would else be a zero as heavy as any class.
    """
    true_K, given_K, both_K = confusion_KK.sum(1), confusion_KK.sum(0), confusion_KK.diagonal()
    with np.errstate(invalid="ignore"):
        return np.where(true_K > 0, both_K / (true_K + given_K - both_K), np.nan)
