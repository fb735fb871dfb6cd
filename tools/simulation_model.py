"""A model of training, encoding and k-means on GPUs: a roofline a kernel, the pipeline's slowest part, a ring.

Every number that it takes as given is in simulation_assumptions.py. Times are seconds, bytes bytes, rates a second.

Legend: K words, C features.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import torch
from simulation_assumptions import ASSUMPTIONS, OFF
from torch import nn
from torchvision.models import resnet50
from torchvision.models.resnet import Bottleneck

Values = Mapping[str, float]
VALUES: Values = {name: given.value for name, given in ASSUMPTIONS.items()}
WORDS, FEATURES, POSITIONS, CONV4 = 20_000, 2048, 196, 1024
HALF, SINGLE = 2, 4  # bytes
_UNFUSED = {"norm": "norm", "relu": "ReLU", "add": "addition"}


class Layer(NamedTuple):
    """One operation of the trunk.

    Attributes:
        kind: "convolution", "norm", "relu" or "add".
        flops: of one image forward.
        read: elements that one image's input has.
        written: elements that its output has.
        parameters: that it learns.
        stage: the conv1 to conv5 that it belongs to.
    """

    kind: str
    flops: int
    read: int
    written: int
    parameters: int
    stage: int


class Way(NamedTuple):
    """How a program runs the step.

    Attributes:
        fused: norm, ReLU and addition in one pass, SGD in one kernel: compiled, or a library's own fused layers.
        batch: images a GPU.
        words: K of the words head; 0 for 1000 classes.
        half_head: the head's product on tensor cores, not in float32.
    """

    fused: bool
    batch: int = 256
    words: int = WORDS
    half_head: bool = False


@cache
def layers() -> tuple[Layer, ...]:
    """ResNet-50's operations at 224 pixels, in the order of the forward pass."""
    found: list[Layer] = []
    stage = 1

    def note(module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        read, written = inputs[0][0].numel(), output[0].numel()
        parameters = sum(weight.numel() for weight in module.parameters(recurse=False))
        if isinstance(module, nn.Conv2d):
            flops = 2 * written * module.weight[0].numel()
            found.append(Layer("convolution", flops, read, written, parameters, stage))
        elif isinstance(module, Bottleneck):
            found.append(Layer("add", 0, 2 * written, written, 0, stage))
        else:
            kind = "relu" if isinstance(module, nn.ReLU) else "norm"
            found.append(Layer(kind, 0, read, written, parameters, stage))

    with torch.device("meta"):
        network = resnet50()
        for module in network.modules():
            if isinstance(module, nn.Conv2d | nn.BatchNorm2d | nn.ReLU | Bottleneck):
                module.register_forward_hook(note)  # type: ignore[arg-type]
        map_BCHW = network.relu(network.bn1(network.conv1(torch.empty(1, 3, 224, 224))))
        map_BCHW = network.maxpool(map_BCHW)
        for blocks in (network.layer1, network.layer2, network.layer3, network.layer4):
            stage += 1  # `note` reads it
            map_BCHW = blocks(map_BCHW)
    return tuple(found)


def trunk_parameters() -> int:
    """What ResNet-50 learns without its classifier."""
    return sum(layer.parameters for layer in layers())


def matrix_time(values: Values, gpu: str, flops: float, moved: float, share: float) -> float:
    """A kernel on tensor cores is as slow as the slower of its arithmetic and its memory traffic."""
    tensor = share * 1e12 * values[f"{gpu} tensor"]
    return max(flops / tensor, moved / memory_rate(values, gpu))


def memory_rate(values: Values, gpu: str) -> float:
    """Bytes a second that kernels move."""
    return values["memory reached"] * 1e9 * values[f"{gpu} memory"]


def layer_times(values: Values, gpu: str, way: Way, layer: Layer, *, trains: bool = True) -> tuple[float, float]:
    """Seconds of a batch forward and backward."""
    images = way.batch
    if layer.kind == "convolution":
        moved = HALF * (images * (layer.read + layer.written) + layer.parameters)
        once = matrix_time(values, gpu, images * layer.flops, moved, values["convolution reached"])
        return once, (1 if layer.read == 3 * 224 * 224 else 2) * once  # no gradient of the pixels
    forward, backward = passes(values, way, layer.kind, trains=trains)
    a_pass = HALF * images * layer.written / memory_rate(values, gpu)
    return forward * a_pass, backward * a_pass


def passes(values: Values, way: Way, kind: str, *, trains: bool) -> tuple[float, float]:
    """How often an element of a map goes to or from memory."""
    if way.fused and kind != "norm":  # in the norm's passes; an addition reads its other map
        return (1, 1) if kind == "add" else (0, 0)
    if kind == "norm" and not trains:  # the statistics are known
        return values["norm, frozen"], 0
    return values[f"{_UNFUSED[kind]} forward"], values[f"{_UNFUSED[kind]} backward"]


@dataclass(frozen=True)
class Step:
    """Seconds of one training step on one GPU.

    Attributes:
        forward, backward: of the trunk.
        head: forward and backward of the words head, its norms, the loss.
        optimizer: SGD, and the half copies of autocast.
        targets: look-up and mixing of bags.
        gradients: of the backward pass: seconds after its beginning, bytes that are then ready.
    """

    forward: float
    backward: float
    head: float
    optimizer: float
    targets: float
    gradients: tuple[tuple[float, int], ...]

    def alone(self) -> float:
        """The whole step without other GPUs."""
        return self.forward + self.backward + self.head + self.optimizer + self.targets


def head_flops(batch: int, words: int) -> int:
    """Logits, and the gradients of features and weights."""
    return 3 * 2 * batch * words * FEATURES


def head_time(values: Values, gpu: str, way: Way) -> float:
    """Three products, the norms of the weights, and a few passes over float32 logits."""
    words = way.words or 1000
    flops, weights = head_flops(way.batch, words), words * FEATURES
    if way.half_head or not way.words:
        product = matrix_time(values, gpu, flops, 3 * HALF * weights, values["product reached"])
    else:
        product = flops / (values["float32 reached"] * 1e12 * values[f"{gpu} float32"])
    traffic = (values["head's norms"] * weights if way.words else 0) + 6 * SINGLE * way.batch * words
    return product + traffic / memory_rate(values, gpu)


def step(values: Values, gpu: str, way: Way) -> Step:
    """The training step of ResNet-50 under a head of words or classes."""
    times = [layer_times(values, gpu, way, layer) for layer in layers()]
    weights = (way.words or 1000) * FEATURES
    head = head_time(values, gpu, way)
    after = 2 / 3 * head
    gradients = [(after, SINGLE * weights)]
    for layer, (_, backward) in zip(reversed(layers()), reversed(times), strict=True):
        after += backward
        if layer.parameters:
            gradients.append((after, SINGLE * layer.parameters))
    parameters = trunk_parameters() + weights
    sgd = values["SGD, fused" if way.fused else "SGD, one by one"] * parameters
    copies = values["half copies"] * trunk_parameters()
    return Step(
        forward=sum(forward for forward, _ in times),
        backward=sum(backward for _, backward in times),
        head=head,
        optimizer=(sgd + copies) / memory_rate(values, gpu),
        targets=1e-6 * values["targets"] if way.words else 0,
        gradients=tuple(gradients),
    )


def buckets(gradients: Sequence[tuple[float, int]], size: float) -> Iterator[tuple[float, int]]:
    """As DistributedDataParallel does it: gradients in the order in which they come, until a bucket is full."""
    held = 0
    for ready, count in gradients:
        held += count
        if held >= size:
            yield ready, held
            held = 0
    if held:
        yield gradients[-1][0], held


def ring_time(values: Values, gpu: str, gpus: int, count: float, network: float | None = None) -> float:
    """An all-reduce of so many bytes: 2 (n - 1) steps, each moving an n-th of them at the bus's bandwidth.

    Args:
        values: of the assumptions.
        gpu: a name of the table.
        gpus: n.
        count: bytes of the gradient.
        network: bytes a second of a node; None for the one that is usual with the GPU.
    """
    if gpus == 1:
        return 0.0
    bus = 1e9 * values[f"{gpu} node link"]
    if gpus > values["GPUs a node"]:  # every port carries its own ring, so that a node's ports add up
        bus = min(bus, values["network reached"] * (network or 1e9 * values[f"{gpu} network"]))
    return 2 * (gpus - 1) / gpus * count / bus + 2 * (gpus - 1) * 1e-6 * values["hop"]


def exchanged(values: Values, gpu: str, gpus: int, of: Step, network: float | None = None) -> float:
    """Seconds by which reducing gradients makes a step longer: what backward does not hide, and what it slows."""
    busy = done = 0.0
    for ready, count in buckets(of.gradients, 1e6 * values["bucket"]):
        spent = ring_time(values, gpu, gpus, count, network)
        busy, done = busy + spent, max(done, ready) + spent
    end = of.gradients[-1][0]
    return max(0.0, done - end) + values["slowed by reducing"] * min(busy, end)


def decode_rate(values: Values, gpu: str) -> float:
    """JPEGs a second: the engines, and the cores that do the rest beside them."""
    return values["cores"] * values["thread"] + values[f"{gpu} JPEG engines"] * values["engine"]


class Prediction(NamedTuple):
    """A rate and what it comes from.

    Attributes:
        rate: images a second, of all GPUs.
        parts: seconds an image of each part of the pipeline, which all run at the same time.
        binds: the slowest of them.
    """

    rate: float
    parts: dict[str, float]
    binds: str


def pipeline(gpus: int, parts: dict[str, float]) -> Prediction:
    """What runs side by side is as fast as its slowest part."""
    binds = max(parts, key=lambda name: parts[name])
    return Prediction(gpus / parts[binds], parts, binds)


def input_parts(values: Values, gpu: str, batch: int) -> dict[str, float]:
    """Seconds an image of decoding, of feeding the graph and of the copy to the GPU."""
    return {
        "decoding": 1 / decode_rate(values, gpu),
        "feeding": 1e-3 * values["feeding"] / batch,
        "copy": 1e3 * values["JPEG"] / (1e9 * values[f"{gpu} host link"]),
    }


def view_time(values: Values, gpu: str) -> float:
    """Seconds an image that DALI's kernels take from the GPU."""
    return 1e6 * values["DALI's kernels"] / memory_rate(values, gpu)


def training(values: Values, gpu: str, way: Way, gpus: int = 1, network: float | None = None) -> Prediction:
    """Training with real data."""
    one = step(values, gpu, way)
    took = (one.alone() + exchanged(values, gpu, gpus, one, network)) / way.batch
    launching = 1e-6 * len(layers()) * values[f"launching, {'compiled' if way.fused else 'one by one'}"]
    return pipeline(
        gpus,
        {
            "GPU": took + view_time(values, gpu),
            "launching": launching / way.batch,
            **input_parts(values, gpu, way.batch),
        },
    )


def trunk_time(values: Values, gpu: str, fused: bool, batch: int = 256, last: int = 4) -> float:
    """Seconds an image of the frozen trunk to conv4 (or conv5) in half precision."""
    way = Way(fused, batch)
    kept = [layer for layer in layers() if layer.stage <= last]
    return sum(layer_times(values, gpu, way, layer, trains=False)[0] for layer in kept) / batch


def assign_rate(values: Values, gpu: str, words: int = WORDS, features: int = CONV4) -> float:
    """Images of 196 vectors a second that are given their nearest words."""
    product = values["product reached"] * 1e12 * values[f"{gpu} tensor"]
    return values["assignment reached"] * product / (2 * POSITIONS * words * features)


def encoding(values: Values, gpu: str, fused: bool = True, batch: int = 256) -> Prediction:
    """The pass over the images: trunk, search and the view's kernels share the GPU."""
    took = trunk_time(values, gpu, fused, batch) + 1 / assign_rate(values, gpu) + view_time(values, gpu)
    return pipeline(1, {"GPU": took, **input_parts(values, gpu, batch)})


def kmeans_time(values: Values, gpu: str, vectors: int = 5_120_000, iterations: int = 25) -> float:
    """Seconds of k-means on resident vectors: searches, sums by word, and the sample's way to the GPU."""
    count = vectors * CONV4
    search = vectors / (assign_rate(values, gpu) * POSITIONS)
    sums = SINGLE * count / memory_rate(values, gpu)
    return iterations * (search + sums) + SINGLE * count / (1e9 * values[f"{gpu} host link"])


def beside_teacher(values: Values, gpu: str, way: Way) -> float:
    """Training over the same with the teacher in the loop: its clean view, its trunk and the search, every step."""
    without = training(values, gpu, way)
    took = without.parts["GPU"] + encoding(values, gpu, way.fused, way.batch).parts["GPU"]
    twice = input_parts(values, gpu, way.batch)
    twice["decoding"] *= 2  # the clean view is of the whole image
    return without.rate / pipeline(1, {"GPU": took, **twice}).rate


class Band(NamedTuple):
    """What a figure may be, given how far its assumptions are to be trusted.

    Attributes:
        value: predicted.
        low, high: with every assumption off by its share, as if they were independent.
        assumption: the one that moves it most.
        moves: by what share of the value.
    """

    value: float
    low: float
    high: float
    assumption: str
    moves: float


class _Asked(dict[str, float]):
    """Assumptions that remember which of them were asked for.

    Attributes:
        names: of those.
    """

    def __init__(self, given: Values) -> None:
        super().__init__(given)
        self.names: set[str] = set()

    def __getitem__(self, name: str) -> float:
        self.names.add(name)
        return super().__getitem__(name)


def band(figure: Callable[[Values], float], given: Values = VALUES) -> Band:
    """Move one assumption after another by what it may be off, and add up the squares of the changes."""
    asked = _Asked(given)
    value = figure(asked)
    up = down = 0.0
    largest, most = 0.0, ""
    for name in sorted(asked.names):
        off = OFF[ASSUMPTIONS[name].confidence]
        changes = [figure({**given, name: given[name] * factor}) - value for factor in (1 - off, 1 + off)]
        up += max(0.0, *changes) ** 2
        down += min(0.0, *changes) ** 2
        if (moved := max(map(abs, changes))) > largest:
            largest, most = moved, name
    return Band(value, value - math.sqrt(down), value + math.sqrt(up), most, largest / value if value else 0.0)


def flat(prediction: Prediction) -> dict[str, Any]:
    """A prediction for JSON."""
    return {"images_s": prediction.rate, "binds": prediction.binds, "seconds_an_image": prediction.parts}
