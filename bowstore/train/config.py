"""What a training run is told: the task, the schedule, and how to run. Loads no torch."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from bowstore.config import (
    Computing,
    Count,
    Listed,
    ModelConfig,
    Place,
    Positive,
    Seed,
    StorageConfig,
    Strict,
    Text,
    Unit,
    ViewConfig,
    bundled_configs,
    dump,
    find_config,
    validate,
    value_differences,
)
from bowstore.errors import MissingError
from bowstore.limits import MAX_BATCH, MAX_FLOAT
from bowstore.overrides import apply_overrides
from bowstore.progress import say
from bowstore.torchrun import ranks
from bowstore.yaml_file import read_yaml


class WordsConfig(Strict):
    """Targets of the words task (paper, Eq. 3 and 4) and the cosine head's scale (Eq. 5)."""

    store: Place | None = Field(None, description="word store; null: the workspace's")
    layer: Text | None = Field(None, description="layer of the store; null: its only one")
    form: Literal["count", "binary"] = "count"
    reencoded: bool = Field(
        False, description="the shards hold other encodings of the store's images (resized, compressed anew)"
    )
    gamma: Positive = Field(1.0, description="initial scale of the cosine logits")


class RotationConfig(Strict):
    """The rotation task's head: one more group of residual blocks before pooling (paper, section 4)."""

    blocks: int | None = Field(
        None, ge=1, le=100, description="its residual blocks; null: those of the backbone's last group"
    )


class OptimConfig(Strict):
    """SGD with step decay. Epochs are of `steps_per_epoch` steps, or one pass over the images when null."""

    batch: int = Field(256, ge=4, le=MAX_BATCH, description="images a step, over all ranks")
    epochs: Count = 140
    steps_per_epoch: Count | None = None
    lr: Positive = 0.03
    milestones: Listed[Count] = Field((), description="epochs after which lr is multiplied by factor")
    factor: float = Field(0.1, gt=0, le=1)
    warmup_epochs: float = Field(0.0, ge=0)
    momentum: float = Field(0.9, ge=0, lt=1)
    nesterov: bool = True
    weight_decay: float = Field(1e-4, ge=0, le=MAX_FLOAT)
    decay_norm_and_bias: bool = Field(True, description="weight decay on batch norm and biases; never on gamma")

    @model_validator(mode="after")
    def _increasing(self) -> Self:
        if list(self.milestones) != sorted(set(self.milestones)):
            raise ValueError(f"milestones {self.milestones} must increase")
        return self


class RuntimeConfig(Computing):
    """How to run; none of it changes what is learned beyond rounding.

    The step is compiled on a GPU, and on a CPU where the run is long enough to pay for it, unless `compile` says else.
    """

    amp: bool = Field(True, description="bfloat16 autocast on a GPU")
    pad_stem: bool = Field(False, description="run the first convolution on four channels, for a GPU's tensor cores")
    hw_decoder_load: Unit = Field(0.65, description="share of the JPEGs that a GPU's hardware decoder takes")
    targets: Literal["auto", "resident", "host", "streamed"] = Field(
        "auto", description="where the words lie: on the device, in host memory, on disk; auto: by their size"
    )
    storage: StorageConfig | None = Field(None, description="null: the workspace's")
    log_every_steps: Count = 50
    checkpoint_every_steps: Count = 1000
    keep_checkpoints: Count = 2


class TrainConfig(Strict):
    """One training run: the RotNet teacher (`task: rotation`) or BoWNet (`task: words`)."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="folder below runs/")
    task: Literal["rotation", "words"]
    seed: Seed = Field(0, description="of weights, order and augmentation")
    shards: Place | None = Field(None, description="shards with their index; null: the workspace's")
    images: Count | None = Field(None, description="use at most so many, the first rows")
    view: ViewConfig = ViewConfig()
    model: ModelConfig = ModelConfig()
    rotation: RotationConfig = RotationConfig()
    words: WordsConfig = WordsConfig()
    optim: OptimConfig = OptimConfig()
    runtime: RuntimeConfig = RuntimeConfig()
    student: Text | None = Field(None, description="configuration that trains on this teacher's words")

    @model_validator(mode="after")
    def _one_target(self) -> Self:
        if self.task == "rotation" and self.view.cutmix:
            raise ValueError("view.cutmix must be false for task rotation: a mixed image has no one rotation")
        return self


def load_train_config(path: Path, overrides: Sequence[str] = (), flags: Mapping[str, Any] | None = None) -> TrainConfig:
    """Load and validate a training configuration; where its file is not `path` itself, a line says which it is.

    Args:
        path: a file, or the name of one (`find_config`).
        overrides: `a.b=value`, with values as in a file.
        flags: values by key, as `a.b`; taken as they are.

    Raises:
        MissingError: no such file; the message lists the configurations that come with bowstore.
        UsageError: a file, key or value that cannot be used.
    """
    found = find_config(path)
    if found != path and ranks().first:
        origin = ", which comes with bowstore" if found.parent == bundled_configs() else ""
        say(f"configuration {path}: {found}{origin}")
    try:
        values = read_yaml(found)
    except MissingError as error:
        known = ", ".join(sorted(p.name for p in bundled_configs().glob("*.yaml")))
        raise MissingError(
            f"no configuration file {path}; those that come with bowstore go by their bare names: {known}"
        ) from error
    values.setdefault("name", path.stem)
    return validate(TrainConfig, apply_overrides(values, overrides, flags), str(path))


def differences(old: TrainConfig, new: TrainConfig) -> list[str]:
    """In what two runs differ that decides what is learned, a phrase each; how they are run may change within one."""
    return value_differences(dump(old), dump(new), free=("runtime", "student"))
