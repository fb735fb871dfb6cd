"""Training on augmented images, and the test on clean ones: what protocols that train have in common.

Legend: B samples of a rank's batch, C channels, H W pixels, K classes, H heads, T places of a ranking, M test images.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bowstore.data.pipeline import clean_batches
from bowstore.data.views import CleanView
from bowstore.errors import DataError
from bowstore.evaluate.features import Extraction, variation, warn_of_collapse
from bowstore.evaluate.protocol import DataSets, LabelledSplit
from bowstore.models.backbone import Backbone
from bowstore.models.pooling import Tap
from bowstore.progress import Progress
from bowstore.train.config import OptimConfig
from bowstore.train.distributed import World
from bowstore.train.schedule import learning_rate

TOP = 5
_LOOKED_AT = 64  # images whose features are checked before anything is trained
_READ_STEPS = 50  # between two looks at the loss, which wait for the device
Batches = Iterator[tuple[Tensor, NDArray[np.int64]]]


def wait_for_images(data: DataSets, world: World) -> None:
    """Wait for all ranks until each has its images, however long they take to arrive: a collective would time out."""
    for split in data.splits.values() if world.size > 1 else ():
        split.open()
    world.assembled()


def check_features(
    backbone: Backbone, taps: Mapping[str, Tap], split: LabelledSplit, view: CleanView, world: World, *, batch: int
) -> None:
    """Look at the features of a few images, on rank 0, before anything is trained.

    Raises:
        DataError: NaN or infinity, with the image's name.
    """
    if not world.first:
        return
    few = replace(split, rows=split.rows[:_LOOKED_AT], labels=split.labels[:_LOOKED_AT])
    how = Extraction(backbone=backbone, view=view, taps=taps, batch=min(batch, _LOOKED_AT), device=world.device)
    features = how.features(few, what="features of the first test images")
    shares = {str(taps[name]): variation(values_Md) for name, values_Md in features.items()}
    warn_of_collapse("features of the first test images", shares, len(few))


def fit(
    batches: Batches,
    losses_of: Callable[[Tensor, Tensor], Tensor],
    optimizer: torch.optim.Optimizer,
    optim: OptimConfig,
    *,
    of_a_pass: int,
    world: World,
    what: str,
) -> NDArray[np.float64]:
    """Train for all steps of a schedule; the mean losses of each pass, (passes, H).

    Args:
        batches: as `augmented` gives them, one a step.
        losses_of: losses (H,) of images (B, C, H, W) float32 and labels (B,); what is learned is their sum.
        optimizer: a group's `share`, where it has one, multiplies its learning rate.
        optim: the schedule, in steps.
        of_a_pass: steps of one pass over the images.
        world: this process's place.
        what: name of the training for progress and messages.

    Raises:
        DataError: a loss that diverges.
    """
    steps = optim.epochs
    unread: list[Tensor] = []
    read: list[NDArray[np.float64]] = []  # of this pass
    passes: list[NDArray[np.float64]] = []
    with Progress(what, steps * optim.batch, shown=world.first) as progress:
        for step, (images_BCHW, labels) in enumerate(batches):
            world.at(step)
            rate = learning_rate(step, optim, of_a_pass)
            for group in optimizer.param_groups:
                group["lr"] = rate * group.get("share", 1.0)
            label_B = torch.from_numpy(labels).to(world.device, non_blocking=True)
            losses = losses_of(images_BCHW.float(), label_B)
            optimizer.zero_grad(set_to_none=True)
            losses.sum().backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            unread.append(losses.detach())
            done = step + 1
            ends = done % of_a_pass == 0 or done == steps
            if ends or done % _READ_STEPS == 0:
                read.extend(torch.stack(unread).double().cpu().numpy())
                unread = []
                if not np.isfinite(read).all():
                    raise DataError(
                        f"{what}: the loss is not finite at step {done} of {steps} (lr {rate:.3g}): the features are "
                        "too large, or the weights are broken"
                    )
            if ends:
                passes.append(np.mean(read, axis=0))
                read = []
            progress.advance(optim.batch, note=f"loss {np.mean(passes[-1]):.3f}" if ends else "")
    return np.array(passes)


def count_hits(
    logits_of: Callable[[Tensor], Sequence[Tensor]],
    split: LabelledSplit,
    view: CleanView,
    *,
    heads: int,
    classes: int,
    batch: int,
    world: World,
) -> NDArray[np.int64]:
    """Test images whose class is among the first places of each head's ranking, (H, T), cumulated over the places.

    Ranks share the images. T is 5, or as many as there are classes.

    Args:
        logits_of: logits (B, K) of each head, of images (B, C, H, W) float32; in eval mode.
        split: the test images.
        view: how they are seen.
        heads: H.
        classes: K.
        batch: images a forward pass.
        world: this process's place.
    """
    top = min(TOP, classes)
    hits_HT = torch.zeros(heads, top, dtype=torch.int64, device=world.device)
    rows, labels = split.rows[world.rank :: world.size], split.labels[world.rank :: world.size]
    start = 0
    with torch.no_grad(), Progress("test", len(rows), shown=world.first) as progress:
        made = clean_batches(split.open(), view, rows, batch=batch, device=world.device) if len(rows) else ()
        for rows_B, images_BCHW in made:
            stop = start + len(rows_B)
            label_B = torch.from_numpy(labels[start:stop].astype(np.int64)).to(world.device)
            for head, logits_BK in enumerate(logits_of(images_BCHW.float())):
                ranked_BT = logits_BK.topk(top, dim=1).indices
                hits_HT[head] += (ranked_BT == label_B[:, None]).sum(dim=0)
            start = stop
            progress.advance(len(rows_B))
    found = torch.stack(world.gathered(hits_HT)).sum(dim=0).cumsum(dim=1)
    return found.cpu().numpy()


def shares(hits_T: NDArray[np.int64], images: int, classes: int, name: str = "") -> dict[str, float]:
    """Shares of images, of cumulated hits: top1 and, with more than five classes, top5; a head's name stands behind."""
    behind = f"_{name}" if name else ""
    return {f"top{top}{behind}": float(hits_T[top - 1] / images) for top in (1, TOP) if top < classes}
