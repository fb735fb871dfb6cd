"""VOC07+12 detection (`protocols/voc0712_detection.py`): fine-tune Faster R-CNN, go on after a stop, test it.

Legend: B images of this rank's batch, N test images, D detections, K classes.
"""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from bowstore.environment import cores_per_rank
from bowstore.errors import MismatchError, TrainingError, UsageError
from bowstore.evaluate.detection_ap import THRESHOLDS, Detections, average_precisions
from bowstore.evaluate.detection_images import Draw, Images, Shown, loaded, train_draws
from bowstore.evaluate.detector import build_detector
from bowstore.evaluate.protocol import DataSets, Network, Scores
from bowstore.evaluate.protocols.voc0712_detection import DetectionSettings, Schedule
from bowstore.evaluate.voc_boxes import BoxedSplit
from bowstore.files import exclusive_lock
from bowstore.models.saved import load_weights, newest_checkpoint
from bowstore.models.weights import weights_sha256
from bowstore.progress import Progress, say
from bowstore.train.checkpoint import Checkpoints
from bowstore.train.distributed import World
from bowstore.train.schedule import step_seed
from bowstore.train.step import load_optimizer

MOMENTUM, WEIGHT_DECAY = 0.9, 1e-4  # Detectron2's; no decay of batch norm
_LOG_EVERY = 20  # iterations
_MOST = 100  # detections an image


def run(network: Network, data: DataSets, settings: DetectionSettings, world: World) -> Scores:
    """Fine-tune the network as a detector, and measure it; checkpoints lie in the network's folder until then.

    Raises:
        UsageError: another kind of network than a residual one; a number of ranks that the batch cannot be shared by.
        MismatchError: the folder holds an evaluation of other weights, images or settings.
        DataError: an image that cannot be decoded.
        TrainingError: the loss is not finite.
    """
    plan, train, test = settings.plan, data["train"], data["test"]
    assert isinstance(train, BoxedSplit), "of `voc_boxes.data`"
    assert isinstance(test, BoxedSplit)
    if plan.batch % world.size:
        shared = ", ".join(str(size) for size in range(1, plan.batch + 1) if plan.batch % size == 0)
        raise UsageError(f"{world.size} ranks cannot share {plan.batch} images an iteration; start one of {shared}")
    inputs = {
        "weights_sha256": weights_sha256(network.backbone.state_dict()),
        "protocol": plan.id,
        "seed": str(settings.seed),
        **{name: str(value) for name, value in data.inputs.items()},
    }
    with torch.random.fork_rng(devices=[world.device] if world.device.type == "cuda" else []):
        torch.manual_seed(settings.seed)
        detector = build_detector(network.backbone, network.view, plan, len(train.classes), world)
        course = Course(detector, plan, inputs, world)
        workers = settings.workers if settings.workers is not None else 0 if settings.small else cores_per_rank()
        fit(course, train, settings, network.folder, workers)
        settle(course, train, settings, workers)
        found = detect(detector, test, plan, world, workers)
    precision_KT = average_precisions(found, test.objects, len(test.classes))
    at = {f"AP{round(100 * THRESHOLDS[place])}": precision_KT[:, place] for place in (0, 5)}
    shares = {**at, "AP": precision_KT.mean(axis=1)}
    return Scores(
        metrics={name: float(share_K.mean()) for name, share_K in shares.items()},
        details={
            "by_class": {
                name: {metric: float(share_K[k]) for metric, share_K in shares.items()}
                for k, name in enumerate(test.classes)
            },
            "curve": course.curve,
            "detections": len(found.scores),
        },
        settings={
            **asdict(plan),
            "momentum": MOMENTUM,
            "weight_decay": WEIGHT_DECAY,
            "workers": workers,
            "trained_parameters": sum(each.numel() for each in detector.parameters() if each.requires_grad),
        },
    )


@dataclass
class Course:
    """A detector while it is trained, and what is known of its course.

    Attributes:
        detector: as it is tested.
        plan: how it is trained.
        inputs: what the numbers depend on, by name.
        world: the ranks.
        done: iterations.
        curve: means of the losses, a value of each every `_LOG_EVERY` iterations.
    """

    detector: Any
    plan: Schedule
    inputs: Mapping[str, str]
    world: World
    done: int = 0
    curve: list[dict[str, float]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.optimizer = build_optimizer(self.detector, self.plan)
        self._sums: dict[str, float | Tensor] = {}
        self._since = 0

    def count(self, losses: Mapping[str, Tensor]) -> None:
        """Note an iteration; nothing waits for the device."""
        for name, loss in losses.items():
            self._sums[name] = self._sums.get(name, 0.0) + loss.detach().double()
        self.done += 1
        self._since += 1

    def log(self) -> dict[str, float]:
        """The means since the last time, over all ranks."""
        means = {name: value / self._since for name, value in self._means().items()}
        self._sums, self._since = {}, 0
        self.curve.append({"iteration": self.done, "loss": sum(means.values()), **means})
        return self.curve[-1]

    def _means(self) -> dict[str, float]:
        """The sums, as their means over all ranks."""
        if not self._sums:
            return {}
        device = self.world.device
        values = [torch.as_tensor(value, dtype=torch.float64, device=device) for value in self._sums.values()]
        return dict(zip(self._sums, self.world.mean(torch.stack(values)).tolist(), strict=True))

    def state(self) -> dict[str, Any]:
        """All that is needed to go on, as a checkpoint holds it."""
        return {
            "step": self.done,
            "config": asdict(self.plan),
            "inputs": dict(self.inputs),
            "backbone": dict(self.detector.state_dict()),
            "head": {},
            "optimizer": self.optimizer.state_dict(),
            "curve": self.curve,
            "sums": self._means(),
            "since": self._since,
        }

    def restore(self, state: Mapping[str, Any], folder: Path) -> None:
        """Go on from a checkpoint.

        Raises:
            MismatchError: it is of other weights, images or settings.
        """
        if state["inputs"] != self.inputs:
            changed = [name for name, value in self.inputs.items() if state["inputs"].get(name) != value]
            raise MismatchError(
                f"{folder} holds an unfinished evaluation with another {' and '.join(changed)}; restore that, or "
                "remove the folder to begin anew"
            )
        load_weights(self.detector, state["backbone"], str(folder))
        load_optimizer(self.optimizer, state["optimizer"])
        self.done, self.curve = int(state["step"]), list(state["curve"])
        self._sums, self._since = dict(state["sums"]), int(state["since"])


def build_optimizer(detector: nn.Module, plan: Schedule) -> torch.optim.SGD:
    """SGD with momentum, and weight decay on all that is trained but batch norm."""
    norms = {
        id(weight) for module in detector.modules() if isinstance(module, _BatchNorm) for weight in module.parameters()
    }
    trained = [weight for weight in detector.parameters() if weight.requires_grad]
    groups = [
        {"params": [weight for weight in trained if id(weight) not in norms], "weight_decay": WEIGHT_DECAY},
        {"params": [weight for weight in trained if id(weight) in norms], "weight_decay": 0.0},
    ]
    return torch.optim.SGD(groups, lr=plan.rate, momentum=MOMENTUM, fused=True)


def fit(course: Course, train: BoxedSplit, settings: DetectionSettings, folder: Path | None, workers: int) -> None:
    """Train to the end of the schedule, from the newest checkpoint in `folder` where there is one.

    Raises:
        BusyError: another process is at it.
        MismatchError, DataError, TrainingError: as `run`.
    """
    plan, world, detector = course.plan, course.world, course.detector.train()
    with ExitStack() as stack:
        kept = stack.enter_context(_resumed(course, folder))
        draws = islice(train_draws(train, plan, settings.seed, start=course.done), plan.iterations - course.done)
        model = detector
        if world.size > 1:
            gpu = world.device.type == "cuda"
            model = DistributedDataParallel(detector, device_ids=[world.device.index] if gpu else None)
            model.broadcast_buffers = False  # batch norm has the same statistics everywhere
        progress = Progress("detection", plan.iterations, "iterations", done=course.done, shown=world.first)
        stack.enter_context(progress)
        for batch in loaded(Images(train, plan.longest), _shared(draws, world), workers):
            loss = _step(course, model, batch, settings.seed)
            last = course.done == plan.iterations
            logging = course.done % _LOG_EVERY == 0 or last
            saving = course.done % settings.checkpoint_every == 0 or last
            if logging or saving or (kept and kept.unproven):
                _refuse_non_finite(loss, course, folder)
                if kept:
                    kept.proved()
            progress.advance(1, note=f"loss {course.log()['loss']:.4f}" if logging else "")
            if saving and kept:
                kept.save(course.state())
        if kept:
            kept.proved()  # nothing follows that could prove the last one


def _step(course: Course, model: Any, batch: list[Shown], seed: int) -> Tensor:
    """One iteration; its loss."""
    world, optimizer = course.world, course.optimizer
    world.at(course.done)
    for group in optimizer.param_groups:
        group["lr"] = course.plan.rate_at(course.done)
    torch.manual_seed(step_seed(seed, course.done, world.rank))  # which proposals are sampled
    losses: dict[str, Any] = model(*_placed(batch, world.device))
    loss = sum(losses.values())
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()
    course.count(losses)
    return loss.detach()  # type: ignore[no-any-return]


def _refuse_non_finite(loss: Tensor, course: Course, folder: Path | None) -> None:
    value = course.world.mean(loss.double()).item()
    if not np.isfinite(value):
        raise TrainingError(
            f"{course.plan.id}: the loss is {value} at iteration {course.done} (rate "
            f"{course.plan.rate_at(course.done - 1):g}); see that the network's features are sound, then remove "
            f"{folder} and begin anew, or with another --seed"
        )


@contextmanager
def _resumed(course: Course, folder: Path | None) -> Iterator[Checkpoints | None]:
    """The checkpoints of this sitting, the newest one loaded; an interrupt says what it cost."""
    if folder is None:
        yield None
        return
    with ExitStack() as stack:
        if course.world.first:
            stack.enter_context(exclusive_lock(folder / ".lock", f"the evaluation in {folder}"))
        state = newest_checkpoint(folder, shown=course.world.first)
        if state:
            course.restore(state, folder)
            if course.world.first:
                say(f"going on from iteration {course.done} of {course.plan.iterations}")
        if not course.world.same(str(course.done)):
            raise MismatchError(
                f"rank {course.world.rank} starts at iteration {course.done}, others elsewhere: all ranks need the "
                f"same folder {folder}"
            )
        kept = Checkpoints(folder, keep=1, start=course.done if state else None, writes=course.world.first)
        try:
            yield kept
        except KeyboardInterrupt as error:
            if not course.world.first:
                raise
            raise KeyboardInterrupt(kept.interrupted()) from error


def settle(course: Course, train: BoxedSplit, settings: DetectionSettings, workers: int) -> None:
    """Take the statistics of batch norm anew, as plain means over train batches of the final weights ("precise")."""
    plan, world, detector = course.plan, course.world, course.detector.train()
    norms = [module for module in detector.modules() if isinstance(module, _BatchNorm) and module.training]
    momenta = [module.momentum for module in norms]
    for module in norms:
        module.reset_running_stats()
        module.momentum = None  # plain means
    draws = islice(train_draws(train, plan, settings.seed, start=plan.iterations), plan.precise)
    with torch.no_grad():
        for number, batch in enumerate(loaded(Images(train, plan.longest), _shared(draws, world), workers)):
            torch.manual_seed(step_seed(settings.seed, plan.iterations + number, world.rank))
            detector(*_placed(batch, world.device))
    for module, momentum in zip(norms, momenta, strict=True):
        module.momentum = momentum


def detect(detector: Any, test: BoxedSplit, plan: Schedule, world: World, workers: int) -> Detections:
    """Detections of all test images, in their own pixels, on every rank: 56 bytes each, at most 100 an image."""
    rows = range(world.rank, len(test), world.size)
    draws = [[Draw(row, plan.test_side)] for row in rows]
    most = _MOST * -(-len(test) // world.size)
    found_D7 = torch.full((most, 7), torch.nan, dtype=torch.float64)
    filled = 0
    detector.eval()
    progress = Progress("detection, test", len(rows), shown=world.first)
    with torch.no_grad(), progress:
        for (shown,) in loaded(Images(test, plan.longest), draws, workers):
            (image,), _ = _placed([shown], world.device)
            (found,) = detector([image])
            height, width = test.sizes[shown.row].tolist()
            scale = torch.tensor([width / image.shape[2], height / image.shape[1]] * 2, dtype=torch.float64)
            boxes_D4 = found["boxes"].cpu().double() * scale
            label_D, score_D = found["labels"].cpu().double() - 1, found["scores"].cpu().double()
            columns = [torch.full_like(score_D, shown.row)[:, None], label_D[:, None], score_D[:, None], boxes_D4]
            found_D7[filled : filled + len(score_D)] = torch.cat(columns, dim=1)
            filled += len(score_D)
            progress.advance(1)
    all_D7 = torch.cat(world.gathered(found_D7.to(world.device))).cpu().numpy()
    all_D7 = all_D7[~np.isnan(all_D7[:, 0])]
    return Detections(
        images=all_D7[:, 0].astype(np.int64),
        boxes=all_D7[:, 3:],
        labels=all_D7[:, 1].astype(np.int64),
        scores=all_D7[:, 2],
    )


def _shared(draws: Iterator[list[Draw]], world: World) -> Iterator[list[Draw]]:
    """This rank's part of each batch."""
    return (batch[world.rank :: world.size] for batch in draws)


def _placed(batch: list[Shown], device: torch.device) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    """Images from 0 to 1 and their targets on the device."""
    images = [shown.image.to(device, non_blocking=True).float().div_(255) for shown in batch]
    return images, [{name: value.to(device) for name, value in shown.target.items()} for shown in batch]
