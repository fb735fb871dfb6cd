"""The step: from a batch's tensors to the loss as one module, its optimiser, and how a device is set for it.

Legend: B batch, C channels, H W pixels.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from bowstore.data.views import Batch
from bowstore.errors import TrainingError, UsageError
from bowstore.train.config import OptimConfig, TrainConfig
from bowstore.train.distributed import World
from bowstore.train.tasks.task import Logits, Network, Task

_PADDED_CHANNELS = 4


class Measured(NamedTuple):
    """What one step tells, as tensors on the device.

    Attributes:
        means: the loss, and what else is known of every step: the log has their means.
        scalars: what is found in steps that are logged only.
        features: what the head was given, (B, C) or (B, C, h, w); None where it takes something else.
    """

    means: dict[str, Tensor]
    scalars: dict[str, Tensor]
    features: Tensor | None = None


class Objective(nn.Module):
    """The loss of a batch as one module: DDP and torch.compile see inputs, network, targets and loss as one graph."""

    def __init__(self, task: Task, *, amp: bool) -> None:
        super().__init__()
        self.network = task.network
        self._make, self._loss, self._amp = task.make, task.loss, amp

    def forward(self, images_BCHW: Tensor, *given: Tensor) -> tuple[Tensor, dict[str, Tensor], Logits, Tensor | None]:
        """Loss, what is known beside it, logits and features, of what `Task.bring` gives."""
        mixed = self._amp and images_BCHW.is_cuda
        # Cast first: all that a task makes of the images is copied in the precision that the network begins with.
        images_BCHW = images_BCHW.to(torch.bfloat16 if mixed else torch.float32)
        inputs_BCHW, targets = self._make(images_BCHW, *given)
        with torch.autocast(images_BCHW.device.type, torch.bfloat16, enabled=mixed):
            features = self.network.features(inputs_BCHW)
            logits = self.network.head(features)
        loss, means = self._loss(logits, targets)
        told = tuple(each.detach() for each in logits) if isinstance(logits, tuple) else logits.detach()
        # They are kept for the backward pass anyway: giving them out costs nothing.
        return loss, means, told, features.detach() if isinstance(features, Tensor) else None


def build_objective(task: Task, config: TrainConfig, world: World, *, compiled: bool) -> nn.Module:
    """The objective in the task's modes, behind DDP and torch.compile where they apply; its network is placed."""
    gpu = world.device.type == "cuda"
    task.modes(task.network)
    model: Any = Objective(task, amp=config.runtime.amp)
    if world.size > 1:
        model = DistributedDataParallel(model, device_ids=[world.device.index] if gpu else None)
        # A frozen trunk's statistics stay as they are, and of heads those of rank 0 are saved: no need to send either.
        # Set here: the argument of that name is deprecated in PyTorch 2.14, and 2.10 has no other.
        model.broadcast_buffers = not task.network.frozen
    if compiled:
        # Inductor would lay maps out with channels last, where sums on a CPU are less exact (`models/memory.py`).
        keep = not gpu and task.network.memory_format(world.device) == torch.contiguous_format
        model = torch.compile(model, dynamic=False, options={"layout_optimization": False} if keep else None)
    return model  # type: ignore[no-any-return]


def train_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, task: Task, batch: Batch, rate: float, *, logged: bool = False
) -> Measured:
    """One step of SGD on one batch by `build_objective` of the task; `logged` asks for the task's scalars, too.

    Raises:
        TrainingError: the step cannot be compiled.
    """
    for group in optimizer.param_groups:
        group["lr"] = rate
    tensors = task.bring(batch)
    try:
        loss, means, logits, features = model(*tensors)
    except RuntimeError as error:
        if not type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            raise
        said = " ".join(str(error).split())[:200]
        raise TrainingError(f"the step cannot be compiled ({said}); set runtime.compile to false") from error
    scalars = {}
    if logged and task.scalars:
        with torch.no_grad():
            scalars = task.scalars(logits, task.make(*tensors)[1])
    # Copies: a task may give out a parameter itself, which the step is about to change.
    measured = Measured(_copies({"loss": loss, **means}), _copies(scalars), features)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()
    return measured


def _copies(values: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in values.items()}


def build_optimizer(network: Network, optim: OptimConfig) -> torch.optim.SGD:
    """SGD with weight decay on weights; never on gamma, on batch norm and biases as configured.

    A backbone that is frozen as a whole has no part in it. Single parameters that no gradient reaches do, as ever:
    checkpoints count them.
    """
    decayed: list[nn.Parameter] = []
    free: list[nn.Parameter] = []
    for name, parameter in (network.head if network.frozen else network).named_parameters():
        small = parameter.ndim <= 1
        exempt = name.endswith("gamma") or (small and not optim.decay_norm_and_bias)
        (free if exempt else decayed).append(parameter)
    groups = [{"params": decayed, "weight_decay": optim.weight_decay}, {"params": free, "weight_decay": 0.0}]
    return torch.optim.SGD(
        [group for group in groups if group["params"]],
        lr=optim.lr,
        momentum=optim.momentum,
        nesterov=optim.nesterov and optim.momentum > 0,
        fused=True,  # one pass over weights, gradients and momenta, on a CPU too
    )


def forget_momenta(optimizer: torch.optim.Optimizer, parameters: Iterable[nn.Parameter]) -> None:
    """Set the momenta of parameters that begin anew to zero: a fused step takes all of a group or none."""
    for parameter in parameters:
        for value in optimizer.state.get(parameter, {}).values():
            if isinstance(value, Tensor):
                value.zero_()


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load a state, each momentum laid out in memory as its parameter, as fused steps take for granted.

    The state may come from another kind of device, where the same network lies otherwise: unasked, a fused step on a
    GPU fails then, and one on a CPU adds each momentum to other weights than its own.

    Raises:
        ValueError: it is of other groups of parameters.
    """
    optimizer.load_state_dict(state)
    for parameter, values in optimizer.state.items():
        for name, value in values.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                values[name] = torch.empty_like(parameter).copy_(value)


@contextmanager
def tuned(device: torch.device, *, amp: bool) -> Iterator[None]:
    """A GPU set for training inside the block, and as it was behind it; nothing on a CPU.

    cuDNN tries out its algorithms (shapes never change). With `amp`, the float32 products that are left, those of the
    heads, are TF32: off by 5e-4 where bfloat16 was by 1e-2, and as fast. Work goes to a stream of high priority,
    because the decoder's kernels run beside it; always to the same one, because memory is kept for the stream that it
    was first taken for.
    """
    if device.type != "cuda":
        yield
        return
    cudnn, products = torch.backends.cudnn, torch.backends.cuda.matmul
    before, precision = (cudnn.benchmark, products.fp32_precision), torch.get_float32_matmul_precision()
    outside = torch.cuda.current_stream(device)
    stream = _first_stream(device)
    stream.wait_stream(outside)
    try:
        cudnn.benchmark = True
        if amp:
            # By the older of two settings, which sets both: inductor still asks for it here and there, and PyTorch
            # makes an error of that where only the other was set (its issue 166387).
            torch.set_float32_matmul_precision("high")
        with torch.cuda.stream(stream):
            yield
    finally:
        outside.wait_stream(stream)
        torch.set_float32_matmul_precision(precision)
        cudnn.benchmark, products.fp32_precision = before


@cache
def _first_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device, priority=-1)  # type: ignore[no-untyped-call]


class PaddedConv2d(nn.Conv2d):
    """A convolution of three channels run as one of four, the fourth zero: tensor cores read whole vectors then.

    Weights keep their shape, and files their names.
    """

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """As the convolution that it stands for."""
        missing = _PADDED_CHANNELS - self.in_channels
        pad = (0, 0, 0, 0, 0, missing)
        padded_BCHW, weight = nn.functional.pad(images_BCHW, pad), nn.functional.pad(self.weight, pad)
        return self._conv_forward(padded_BCHW, weight, self.bias)  # type: ignore[no-any-return]


def pad_stem(network: Network) -> None:
    """Put a `PaddedConv2d` with the same weights in the place of the convolution that takes the images.

    Raises:
        UsageError: it is of another kind, or there are several.
    """
    backbone = network.backbone
    found = [(path, module) for path, module in backbone.named_modules() if getattr(module, "in_channels", 0) == 3]
    if len(found) != 1 or type(found[0][1]) is not nn.Conv2d or found[0][1].padding_mode != "zeros":
        raise UsageError(
            f"runtime.pad_stem: {backbone.arch} has no single plain convolution that takes the images; set it to false"
        )
    ((path, conv),) = found
    padded = PaddedConv2d(
        conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding, conv.dilation,
        bias=conv.bias is not None, device="meta",
    )  # fmt: skip
    padded.weight, padded.bias = conv.weight, conv.bias
    parent, _, name = path.rpartition(".")
    setattr(backbone.get_submodule(parent), name, padded)
