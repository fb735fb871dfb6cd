"""Training, top to bottom: set-up and the loop; `bowstore.train.step` is the step.

Legend: B batch.
"""

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch

from bowstore.config import dump
from bowstore.data.index import Index, open_index
from bowstore.data.pipeline import train_batches
from bowstore.data.plan import Plan, Schedule, plans
from bowstore.data.reader import ShardReader, fetched
from bowstore.errors import BowstoreError, MismatchError
from bowstore.files import exclusive_lock, sweep_temporary
from bowstore.models import saved
from bowstore.progress import say
from bowstore.runs import BACKBONE_FILE, CHECKPOINT_FOLDER, is_finished, write_lineage
from bowstore.train import checkpoint as ckpt
from bowstore.train.compiling import another_way, compiles, compiles_here
from bowstore.train.config import TrainConfig, learned
from bowstore.train.distributed import World, joined
from bowstore.train.health import diverged, unsound
from bowstore.train.metrics import Meter, RunLog, last_logged, paused
from bowstore.train.probe import OpenProbe, Probe, Probing
from bowstore.train.rundir import check_run, check_start, write_config, write_environment
from bowstore.train.schedule import (
    images_in_use,
    learning_rate,
    step_seed,
    steps_per_epoch,
    total_steps,
    without_effect,
)
from bowstore.train.step import (
    build_objective,
    build_optimizer,
    forget_momenta,
    load_optimizer,
    pad_stem,
    train_step,
    tuned,
)
from bowstore.train.stopping import interrupts, stop_signal
from bowstore.train.tasks.task import Network, Task, build_task
from bowstore.train.watch import Course, Features, Watch

T = TypeVar("T")
_STOPPED_EXIT_CODE = 143
_ASK_EVERY_STEPS = 8


@dataclass(frozen=True)
class TrainReport:
    """What a finished run was.

    Attributes:
        run: its directory.
        steps: total number of steps.
        images_per_second: rate of this sitting, over all ranks, without its first steps.
        wait_share: share of the time spent waiting for images.
        last: the last logged metrics; empty when the run had been finished before.
        first: whether this process is rank 0, which prints the report.
    """

    run: Path
    steps: int
    images_per_second: float
    wait_share: float
    last: dict[str, float] = field(default_factory=dict)
    first: bool = True

    def as_dict(self) -> dict[str, Any]:
        """Plain values for --json."""
        return {
            "run": str(self.run),
            "steps": self.steps,
            "images_per_second": self.images_per_second,
            "wait_share": self.wait_share,
            "metrics": self.last,
        }

    def text(self) -> str:
        """A few lines for people."""
        if not self.last:
            return f"{self.run}: finished already ({self.steps} steps); take another --name to train again"
        metrics = ", ".join(f"{name} {value:.4g}" for name, value in self.last.items())
        rate = f"{self.images_per_second:.0f} images/s ({100 * self.wait_share:.1f} % of the time waiting for images)"
        measured = self.images_per_second > 0  # not in a sitting of a few steps
        return f"{self.run}: {self.steps} steps{f', {rate}' if measured else ''}\n{metrics}"


def train(config: TrainConfig, runs: Path, *, resume: bool = False, probe: OpenProbe | None = None) -> TrainReport:
    """Train one configuration to its end, going on from the newest checkpoint where there is one.

    Args:
        config: with `shards` and what the task takes from the workspace resolved.
        runs: folder of run directories.
        resume: go on in a run directory that holds another configuration.
        probe: measures the network as `config.runtime.probe` asks (`bowstore.evaluate.probe.probe_of`).

    Raises:
        BusyError: another process trains in the run directory.
        MismatchError: the directory holds another configuration, or the data changed since its checkpoint.
        TrainingError: the run diverged.
    """
    assert config.shards is not None, "the command line resolves shards"
    assert (probe is None) == (config.runtime.probe is None), "of the configuration: `probe_of`"
    run = runs / config.name
    with ExitStack() as stack:
        # --- who and where
        world = stack.enter_context(joined(config.runtime.device))
        _on_first(world, partial(_claim, run, config, stack, resume=resume))
        probes = _on_first(world, partial(probe, world.device)) if probe else None
        stack.enter_context(tuned(world.device, amp=config.runtime.amp))

        # --- data
        index = open_index(config.shards, config.runtime.storage)
        schedule = data_schedule(config, index, world)
        steps = total_steps(config.optim, schedule.steps_per_pass)

        # --- network, optimiser, state
        task = build_task(config, index, world)
        world.assembled()  # collectives that come too early would time out
        network = placed_network(task, config, world)
        optimizer = build_optimizer(network, config.optim)
        meter = Meter(world.device)
        begun = _start(run, config, steps, optimizer, meter, task, world, resume=resume)
        start, first = begun.step, begun.step or 0
        _same_start(first, task, config, world)
        if first >= steps or (start is None and is_finished(run)):
            return _finish(run, config, task, world, TrainReport(run, steps, 0.0, 0.0, first=world.first))
        compiled = compiles_here(compiles(config, task, steps, world.device), world)
        model = build_objective(task, config, world, compiled=compiled)
        if world.first:
            _record(run, config, task, world, begun, probes, compiled=compiled)

        # --- the loop
        local = fetched(index, images=schedule.images, whole=True, display=world.first)
        world.assembled()  # however long the shards take to arrive on some machine
        batches = train_batches(
            ShardReader(local),
            config.view,
            plans(schedule, index, config.view, start=first, stop=steps),
            batch=schedule.rank_batch,
            device=world.device,
            threads=config.runtime.threads,
            hw_load=config.runtime.hw_decoder_load,
            ahead=task.ahead,
        )
        log = None
        if world.first:
            log = RunLog(
                config,
                run,
                task.constants,
                _watch(task, config, schedule, begun),
                first=first,
                logged=begun.logged,
                steps_per_pass=schedule.steps_per_pass,
            )
            stack.callback(log.close)
        probing = _probing(probes, task, config, schedule, world)
        stop_requested = stack.enter_context(stop_signal())
        keep = config.runtime.keep_checkpoints
        kept = ckpt.Checkpoints(run, keep=keep, start=start, slower=begun.slower, writes=world.first)
        stack.enter_context(interrupts(kept, world))
        for step, batch in enumerate(meter.waiting_for(batches), start=first):
            world.at(step)
            rate = learning_rate(step, config.optim, schedule.steps_per_pass)
            if task.renewal and task.renewal.due(step):
                with paused(meter, log):
                    forget_momenta(optimizer, task.renewal.renew(step))
            torch.manual_seed(step_seed(config.seed, step, world.rank))
            done = step + 1
            logging = done % config.runtime.log_every_steps == 0 or done == steps
            measured = train_step(model, optimizer, task, batch, rate, logged=logging)
            meter.count(config.optim.batch, measured.means)
            if log:
                log.watch.features.add(done, measured.features)
            # Ranks must agree on when to stop; asking costs an all-reduce, so many ranks ask every few steps.
            stopping = (world.size == 1 or done % _ASK_EVERY_STEPS == 0) and world.any(stop_requested())
            saving = done % config.runtime.checkpoint_every_steps == 0 or done == steps or stopping
            if logging or saving or kept.unproven:  # the only place that waits for the device
                wrong = unsound(network, optimizer, meter, kept, world, saving=saving)
                if wrong:
                    raise diverged(wrong, done, rate, kept, world)
            if logging:
                values = meter.read(world, measured.scalars)
                order = keys_digest(batch.plan, index, schedule, world)
                probed = probing.at(done, network.backbone, partial(paused, meter, log))
                if log:
                    log.write(done, {**values, "lr": rate}, order, probed)
            if log:
                log.progress.advance(config.optim.batch)
            if saving:
                if log:
                    log.sync()
                kept.save(_state(config, done, optimizer, meter, task, world, log, compiled=compiled))
            if stopping:
                if world.first:
                    say(f"stopped by a signal at step {done} of {steps}; run the command again to go on")
                raise SystemExit(_STOPPED_EXIT_CODE)
        kept.proved()  # nothing follows that could prove it
        report = TrainReport(run, steps, *meter.rates(), last=log.last if log else {}, first=world.first)
        return _finish(run, config, task, world, report)


def keys_digest(plan: Plan, index: Index, schedule: Schedule, world: World) -> str:
    """16 hex digits over which key stands where in the step's global batch; the same for any number of ranks."""
    place_B = np.arange(len(plan.rows), dtype=np.uint64) + np.uint64(schedule.rank * schedule.rank_batch)
    mine = (index.key_hash[plan.rows] * (2 * place_B + np.uint64(1))).sum(dtype=np.uint64)
    return f"{world.wrapping_sum(int(mine)):016x}"


def _on_first(world: World, act: Callable[[], T]) -> T | None:
    """What rank 0 gets of something that may be refused; the others leave quietly if it is."""
    refusal: BowstoreError | None = None
    result = None
    if world.first:
        try:
            result = act()
        except BowstoreError as error:
            refusal = error
    if world.any(refusal is not None):
        raise refusal or SystemExit(1)
    return result


def _claim(run: Path, config: TrainConfig, stack: ExitStack, *, resume: bool) -> None:
    """Lock and check the run directory."""
    stack.enter_context(exclusive_lock(run / ".lock", f"run directory {run}"))
    check_run(run, config, resume=resume)


def data_schedule(config: TrainConfig, index: Index, world: World) -> Schedule:
    """The order of a run over the rows it may use.

    Raises:
        UsageError: the batch does not fit the images or the ranks.
    """
    return Schedule(images_in_use(config, len(index)), config.optim.batch, config.seed, world.rank, world.size)


def placed_network(task: Task, config: TrainConfig, world: World) -> Network:
    """The task's network on its device, as it lies there in memory, with the stem that the configuration asks for."""
    if config.runtime.pad_stem:
        pad_stem(task.network)
    return task.network.to(world.device).to(memory_format=task.network.memory_format(world.device))


class _Start(NamedTuple):
    """Where a run begins: what its newest checkpoint says, if there is one."""

    step: int | None = None
    logged: int | None = None  # the last step that was logged by then
    compiled: bool | None = None  # whether the step was; None if it does not say
    slower: bool = False  # whether the run goes on at a lower rate than the checkpoint came with
    features: Mapping[str, Any] = MappingProxyType({})  # what rank 0 had kept of them


def _start(
    run: Path,
    config: TrainConfig,
    steps: int,
    optimizer: torch.optim.Optimizer,
    meter: Meter,
    task: Task,
    world: World,
    *,
    resume: bool,
) -> _Start:
    """Load the newest checkpoint, once found the run's own."""
    state = saved.newest_checkpoint(run, shown=world.first)
    check_start(run, state, config, steps, resume=resume, shown=world.first)
    if state is None:
        return _Start()
    slower = state["config"]["optim"]["lr"] > config.optim.lr
    step = _restore(state, optimizer, meter, task, run)
    return _Start(step, last_logged(state), state.get("compiled"), slower=slower, features=state.get("watch") or {})


def _restore(state: dict[str, Any], optimizer: torch.optim.Optimizer, meter: Meter, task: Task, run: Path) -> int:
    """Load a checkpoint into network, optimiser and meter; return its step."""
    if state["inputs"] != task.inputs:
        names = sorted(state["inputs"].keys() | task.inputs.keys())
        changed = [name for name in names if state["inputs"].get(name) != task.inputs.get(name)]
        raise MismatchError(
            f"{' and '.join(changed)} changed since the checkpoint of {run} was written; restore them, or train "
            f"under another --name"
        )
    saved.load_weights(task.network.backbone, state["backbone"], str(run))
    saved.load_weights(task.network.head, state["head"], str(run))
    values = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    try:
        load_optimizer(optimizer, state["optimizer"])
    except ValueError as error:
        raise MismatchError(
            f"the optimiser's parameter groups in the checkpoint of {run} are others ({error}); "
            f"optim.decay_norm_and_bias cannot change within a run: train under another --name"
        ) from error
    for group, fresh in zip(optimizer.param_groups, values, strict=True):
        group.update(fresh)  # --resume with new values means the new ones
    if task.renewal and "renewal" in state:
        task.renewal.load_state_dict(state["renewal"])
    if "meter" in state:  # older checkpoints have none: the means of the next line of the log begin with it
        meter.restore(state["meter"])
    return int(state["step"])


def _record(
    run: Path, config: TrainConfig, task: Task, world: World, begun: _Start, probe: Probe | None, *, compiled: bool
) -> None:
    """What the run directory says from the beginning, and lines for people."""
    if line := another_way(begun.compiled, compiled):
        say(line)
    for line in without_effect(config):
        say(f"warning: of the configuration without effect: {line}")
    write_config(run, config)
    write_environment(run, world, task.inputs, compiled=compiled, probe=probe.record if probe else None)
    write_lineage(run, name=config.name, task=config.task.name, inputs=task.inputs, targets=task.lineage)
    sweep_temporary(run / CHECKPOINT_FOLDER)
    (run / BACKBONE_FILE).unlink(missing_ok=True)  # of a shorter schedule: this run is not finished


def _same_start(first: int, task: Task, config: TrainConfig, world: World) -> None:
    """Refuse ranks that would train something else, each with what its own machine holds."""
    for value, what in (
        (str(first), f"starts at step {first}, others elsewhere: all ranks need the same runs folder"),
        (str(task.inputs), "has other images or targets than the others: all machines need the same copies"),
        (str(learned(config)), "has another configuration than the others: all machines need the same files"),
    ):
        if not world.same(value):
            raise MismatchError(f"rank {world.rank} {what}")


def _watch(task: Task, config: TrainConfig, schedule: Schedule, begun: _Start) -> Watch:
    """That of rank 0, whose features alone are looked at."""
    course = _course(task, config, schedule)
    features = Features(task.network.backbone.features, task.views * schedule.rank_batch, course)
    features.restore(begun.features)
    return Watch(task.dead, features, course)


def _probing(probe: Probe | None, task: Task, config: TrainConfig, schedule: Schedule, world: World) -> Probing:
    """As `runtime.probe` has it."""
    asked = config.runtime.probe
    return Probing(probe, _course(task, config, schedule, epochs=asked.every_epochs) if asked else None, world)


def _course(task: Task, config: TrainConfig, schedule: Schedule, *, epochs: int = 1) -> Course:
    """Where the lines of the log stand, so many epochs taken as one."""
    return Course(
        epoch_steps=epochs * steps_per_epoch(config.optim, schedule.steps_per_pass),
        log_every_steps=config.runtime.log_every_steps,
        steps=total_steps(config.optim, schedule.steps_per_pass),
        **({"renewed": task.renewal.due} if task.renewal else {}),
    )


def _state(
    config: TrainConfig,
    step: int,
    optimizer: Any,
    meter: Meter,
    task: Task,
    world: World,
    log: RunLog | None,
    *,
    compiled: bool,
) -> dict[str, Any]:
    """All that a run needs to go on; every rank has a part in it."""
    return {
        "step": step,
        "config": dump(config),
        "inputs": task.inputs,
        "backbone": dict(task.network.backbone.state_dict()),
        "head": dict(task.network.head.state_dict()),
        "optimizer": optimizer.state_dict(),
        "meter": meter.state(world),
        "watch": log.watch.features.state() if log else {},
        **({"renewal": task.renewal.state_dict()} if task.renewal else {}),
        "compiled": compiled,
    }


def _finish(run: Path, config: TrainConfig, task: Task, world: World, report: TrainReport) -> TrainReport:
    if world.first and not is_finished(run):
        saved.save_backbone(run / BACKBONE_FILE, task.network.backbone, saved.network_of(dump(config), config.name))
    world.barrier()
    return report
