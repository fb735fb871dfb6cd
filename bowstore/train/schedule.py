"""Durations, learning rates and seeds as pure functions of the step."""

import numpy as np

from bowstore.config import ModelConfig
from bowstore.train.config import OptimConfig, TrainConfig


def images_in_use(config: TrainConfig, rows: int) -> int:
    """How many of an index's rows a run takes, from the first."""
    return min(rows, config.images or rows)


def steps_per_epoch(optim: OptimConfig, steps_per_pass: int) -> int:
    """Steps of one epoch: as configured (the paper's 2000), or one pass over the images."""
    return optim.steps_per_epoch or steps_per_pass


def total_steps(optim: OptimConfig, steps_per_pass: int) -> int:
    """Steps of the whole run."""
    return optim.epochs * steps_per_epoch(optim, steps_per_pass)


def learning_rate(step: int, optim: OptimConfig, steps_per_pass: int) -> float:
    """Rate of step `step` (from 0): linear warm-up, then a factor after each milestone epoch."""
    epoch = step / steps_per_epoch(optim, steps_per_pass)
    if epoch < optim.warmup_epochs:
        return optim.lr * (step + 1) / (optim.warmup_epochs * steps_per_epoch(optim, steps_per_pass))
    return float(optim.lr * optim.factor ** sum(epoch >= milestone for milestone in optim.milestones))


def without_effect(config: TrainConfig) -> list[str]:
    """What a configuration says and its run never does, in lines for people."""
    optim, lines = config.optim, []
    if late := [milestone for milestone in optim.milestones if milestone >= optim.epochs]:
        lines.append(f"optim.milestones {late} lie at or past the end of {optim.epochs} epochs: lr does not fall there")
    if early := [milestone for milestone in optim.milestones if milestone < optim.warmup_epochs]:
        lines.append(
            f"optim.milestones {early} lie within the {optim.warmup_epochs:g} epochs of warm-up: lr falls only after it"
        )
    if optim.warmup_epochs > optim.epochs:
        lines.append(
            f"optim.warmup_epochs {optim.warmup_epochs:g} are more than the {optim.epochs} epochs of the run: its rate "
            f"never reaches optim.lr"
        )
    if config.model.strides != ModelConfig().strides and not config.model.arch.startswith("wrn-"):
        lines.append(f"model.strides are those of a wide ResNet: {config.model.arch} has its own")
    return lines


def step_seed(seed: int, step: int, rank: int) -> int:
    """Seed, 64 bits, of what the network draws in one step on one rank (dropout, stochastic depth).

    Seeded with it before each step, torch's generators carry nothing from step to step: a run that goes on draws
    what it would have drawn, and each rank draws masks of its own. What is drawn for samples comes from the plan.
    """
    return int(np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)[0])
