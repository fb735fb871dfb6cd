"""Is the step compiled? By configuration and length of the run alone, so that a run that goes on does as before.

Legend: C channels, H W pixels.
"""

import torch

from bowstore.models.compiled import flops
from bowstore.progress import say
from bowstore.train.config import TrainConfig
from bowstore.train.distributed import World
from bowstore.train.tasks.task import Task

# On a CPU the compiled step of WRN-10-1 takes 0.87 to 0.92 of the time, and compiling 23 s of a core; WRN-16-2 gains
# nothing, and ResNet-50 less than a tenth for 100 s (docs/results/training-throughput.md).
_WORTHWHILE_FLOPS = 1e14
_NARROW_CHANNELS = 64
_PASSES = 3  # forwards, and backwards to maps and to weights


def compiles(config: TrainConfig, task: Task, steps: int, device: torch.device) -> bool:
    """Whether the step of a run of so many steps, whatever is left of it, is to be compiled.

    As set; with `auto` on a GPU always, and on a CPU where the run is long enough to pay for it.
    """
    setting = config.runtime.compile
    if setting != "auto":
        return setting
    if device.type == "cuda":
        return True
    narrow = max(task.network.backbone.channels.values()) <= _NARROW_CHANNELS
    return narrow and run_flops(config, task, steps) >= _WORTHWHILE_FLOPS


def run_flops(config: TrainConfig, task: Task, steps: int) -> float:
    """Floating-point operations of a whole run, but for its head's: a fact of the configuration, not of the machine."""
    backbone, size = task.network.backbone, config.task.input_side(config.view)
    image = flops(backbone, lambda ghost, images: ghost.feature_maps(images, ghost.layers[-1:]), size)
    passes = 1 if task.network.frozen else _PASSES
    return float(passes * image) * config.optim.batch * task.views * steps


def compiles_here(wanted: bool, world: World) -> bool:
    """Whether all ranks can do it; one that lacks a compiler says so, and all of them train without."""
    problem = compiler_problem(world.device) if wanted else ""
    if problem:
        say(f"not compiled: {problem}; the step runs as it is, more slowly")
    failed = world.any(bool(problem))
    if wanted and not failed and world.first:
        say("the first step is compiled, which takes up to a minute")
    return wanted and not failed


def compiler_problem(device: torch.device) -> str:
    """Why nothing can be compiled here, or nothing: a small function is, with what it needs of compiler and headers.

    A trial, where frozen networks (`bowstore.models.compiled`) only look for the compiler: they are compiled before the
    work, and fall back by themselves; a step is compiled in the midst of training.
    """
    try:
        torch.compile(_probe, dynamic=False)(torch.zeros(64, device=device))
    except (RuntimeError, OSError, ImportError) as error:
        said = " ".join(str(error).split())[:200] or type(error).__name__
        return f"PyTorch's compiler cannot work here ({said})"
    return ""


def _probe(values: torch.Tensor) -> torch.Tensor:
    return values.sin() + 1


def another_way(recorded: bool | None, compiled: bool) -> str:
    """A line for people where a run goes on in another way than that of its checkpoint; empty if it does not."""
    if recorded is None or recorded == compiled:
        return ""
    then, now = ("compiled", "it is not") if recorded else ("not compiled", "it is")
    return (
        f"the step was {then} until this checkpoint, and now {now}: last digits differ from those of a run in one "
        f"piece; runtime.compile decides"
    )
