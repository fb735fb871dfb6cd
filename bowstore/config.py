"""Typed configurations: YAML files, `--set a.b=c` overrides, and the workspace file.

A configuration is a value: it is resolved once, validated, written into the run directory, and passed on.
Unknown keys are errors that name the nearest known key.
"""

import difflib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from bowstore.errors import MissingError, UsageError

WORKSPACE_FILE = "bowstore.yaml"
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
Triple = tuple[float, float, float]
Positive = Annotated[float, Field(gt=0)]
Unit = Annotated[float, Field(ge=0, le=1)]


class Strict(BaseModel):
    """Base of all configurations: frozen, no unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class ViewConfig(Strict):
    """What the network sees: the perturbed train view and the clean view share size and normalisation.

    The train view is the paper's g: random crop with scale and aspect distortion, flip, colour jitter, grey,
    CutMix. The clean view resizes the short side to `resize` and crops the centre to `size`; with
    `resize: null` the whole image is resized to `size` x `size`.
    """

    size: int = Field(224, ge=8, le=2048, description="side of the square network input, pixels")
    resize: int | None = Field(256, ge=8, description="short side before the clean centre crop, pixels")
    mean: Triple = IMAGENET_MEAN
    std: tuple[Positive, Positive, Positive] = IMAGENET_STD
    area: tuple[float, float] = Field((0.08, 1.0), description="crop area, share of the image")
    ratio: tuple[float, float] = Field((3 / 4, 4 / 3), description="crop width / height")
    flip: bool = True
    brightness: Unit = 0.4
    contrast: Unit = 0.4
    saturation: Unit = 0.4
    hue: Annotated[float, Field(ge=0, le=0.5)] = 0.1
    grey: Unit = Field(0.2, description="probability of a grey image")
    cutmix: bool = True

    @model_validator(mode="after")
    def _ranges(self) -> Self:
        low, high = self.area
        if not 0 < low <= high <= 1:
            raise ValueError(f"area {low}..{high} must satisfy 0 < low <= high <= 1")
        low, high = self.ratio
        if not 0 < low <= high:
            raise ValueError(f"ratio {low}..{high} must satisfy 0 < low <= high")
        if self.resize is not None and self.resize < self.size:
            raise ValueError(f"resize {self.resize} must be at least size {self.size}")
        return self


class ModelConfig(Strict):
    """A backbone by name; `bowstore.models.registry` lists the names."""

    arch: str = "resnet50"
    strides: tuple[int, int, int] = Field((1, 2, 2), description="strides of a wide ResNet's three groups")


class WordsConfig(Strict):
    """Targets of the words task (paper, Eq. 3 and 4) and the cosine head's scale (Eq. 5)."""

    store: Path | None = Field(None, description="word store; null: the workspace's")
    layer: str | None = Field(None, description="layer of the store; null: its only one")
    form: Literal["count", "binary"] = "count"
    gamma: float = Field(1.0, gt=0, description="initial scale of the cosine logits")


class RotationConfig(Strict):
    """The rotation task's head: one more group of residual blocks before pooling (paper, section 4)."""

    blocks: int | None = Field(None, ge=1, description="its residual blocks; null: those of the backbone's last group")


class OptimConfig(Strict):
    """SGD with step decay. Epochs are of `steps_per_epoch` steps, or one pass over the images when null."""

    batch: int = Field(256, ge=4, description="images a step, over all ranks")
    epochs: int = Field(140, ge=1)
    steps_per_epoch: int | None = Field(None, ge=1)
    lr: float = Field(0.03, gt=0)
    milestones: tuple[int, ...] = Field((), description="epochs after which lr is multiplied by factor")
    factor: float = Field(0.1, gt=0, le=1)
    warmup_epochs: float = Field(0.0, ge=0)
    momentum: float = Field(0.9, ge=0, lt=1)
    nesterov: bool = True
    weight_decay: float = Field(1e-4, ge=0)
    decay_norm_and_bias: bool = Field(True, description="weight decay on batch norm and biases; never on gamma")

    @model_validator(mode="after")
    def _increasing(self) -> Self:
        if list(self.milestones) != sorted(set(self.milestones)):
            raise ValueError(f"milestones {self.milestones} must increase")
        return self


class StorageConfig(Strict):
    """How bytes are read, and where local copies of remote shards and stores lie."""

    read: Literal["auto", "mmap", "pread"] = Field(
        "auto",
        description="mmap: memory maps; pread: one read an image, for network file systems; auto: by the file system",
    )
    read_threads: int = Field(16, ge=1, description="images read at once with pread")
    cache: Path | None = Field(None, description="folder of local copies; null: $BOWSTORE_CACHE, or ~/.cache/bowstore")
    cache_gb: float = Field(200.0, gt=0, description="bound on the cache, 10^9 bytes")
    retries: int = Field(5, ge=0, description="further tries of a transfer that fails")
    timeout_s: float = Field(30.0, gt=0, description="seconds without a byte before a transfer counts as failed")


class EncodeConfig(Strict):
    """How words are made: the teacher, its layers, the vocabulary (paper, Eq. 1 and 2)."""

    teacher: Path | str = Field(description="run, checkpoint or exported backbone; or timm:NAME, torchvision:NAME...")
    weights: Path | None = Field(None, description="weights file of an architecture; null: random, from seed")
    size: int | None = Field(None, ge=8, le=2048, description="side of the clean view, pixels; null: the teacher's")
    resize: int | None = Field(None, ge=8, description="short side before the crop, pixels; null: the teacher's")
    precision: Literal["float32", "bfloat16"] = Field("float32", description="of the teacher; words are always exact")
    layers: tuple[str, ...] = Field((), description="layers that are encoded in one pass")
    k: tuple[int, ...] = Field((), description="words of each layer; one number for all of them")
    border: int = Field(0, ge=0, description="cells left out at each side of the map")
    pca: int | None = Field(None, ge=1, description="principal components before k-means; null: none")
    whiten: bool = Field(False, description="components of unit variance; goes with pca")
    vocabulary: Path | None = Field(None, description="word store whose vocabulary is used; null: one is made")
    seed: int = Field(0, ge=0, description="of the sample and of k-means")
    sample_per_word: int = Field(256, ge=1, description="feature vectors sampled for each word")
    iterations: int = Field(25, ge=1, description="of k-means")
    batch: int | None = Field(None, ge=1, description="images a batch; null: 16, 256 on a GPU")
    threads: int | None = Field(None, ge=1, description="decoding threads; null: cores a process")


class RuntimeConfig(Strict):
    """How to run; none of it changes what is learned beyond rounding."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    amp: bool = Field(True, description="bfloat16 autocast on a GPU")
    compile: bool = Field(True, description="torch.compile on a GPU")
    threads: int | None = Field(None, ge=1, description="decoding threads; null: cores a rank")
    hw_decoder_load: Unit = Field(0.65, description="share of the JPEGs that a GPU's hardware decoder takes")
    targets: Literal["auto", "resident", "host", "streamed"] = Field(
        "auto", description="where the words lie: on the device, in host memory, on disk; auto: by their size"
    )
    storage: StorageConfig | None = Field(None, description="null: the workspace's")
    log_every_steps: int = Field(50, ge=1)
    checkpoint_every_steps: int = Field(1000, ge=1)
    keep_checkpoints: int = Field(2, ge=1)


class TrainConfig(Strict):
    """One training run: the RotNet teacher (`task: rotation`) or BoWNet (`task: words`)."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="folder below runs/")
    task: Literal["rotation", "words"]
    seed: int = Field(0, ge=0, lt=2**32)
    shards: Path | None = Field(None, description="shards with their index; null: the workspace's")
    images: int | None = Field(None, ge=1, description="use at most so many, the first rows")
    view: ViewConfig = ViewConfig()
    model: ModelConfig = ModelConfig()
    rotation: RotationConfig = RotationConfig()
    words: WordsConfig = WordsConfig()
    optim: OptimConfig = OptimConfig()
    runtime: RuntimeConfig = RuntimeConfig()
    student: str | None = Field(None, description="configuration that trains on this teacher's words")

    @model_validator(mode="after")
    def _one_target(self) -> Self:
        if self.task == "rotation" and self.view.cutmix:
            raise ValueError("view.cutmix must be false for task rotation: a mixed image has no one rotation")
        return self


class Workspace(Strict):
    """Paths and defaults of a workspace (`bowstore.yaml` in the current directory)."""

    shards: Path = Path("data/shards/train")
    val_shards: Path | None = Field(None, description="null: data/shards/val, or data/shards/test")
    store: Path = Path("data/words.zarr")
    runs: Path = Path("runs")
    teacher: str | None = Field(None, description="run or checkpoint; null: the newest finished rotation run")
    config: Path | None = Field(None, description="configuration of `bowstore train`; null: the teacher's student")
    voc: Path = Field(Path("data/VOCdevkit/VOC2007"), description="VOC devkit folder of `bowstore eval voc07`")
    storage: StorageConfig = StorageConfig()


Model = TypeVar("Model", bound=Strict)


def load_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML mapping (safe loader).

    Raises:
        MissingError: no such file; the message lists the configurations that come with bowstore.
        UsageError: not YAML, or not a mapping.
    """
    try:
        value: Any = yaml.safe_load(path.read_text())
    except FileNotFoundError as error:
        known = ", ".join(sorted(p.name for p in bundled_configs().glob("*.yaml")))
        raise MissingError(f"no configuration file {path}; those that come with bowstore: {known}") from error
    except (yaml.YAMLError, UnicodeDecodeError, IsADirectoryError) as error:
        raise UsageError(f"{path} is not a YAML file: {' '.join(str(error).split())}") from error
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise UsageError(f"{path} holds a {type(value).__name__}, not a mapping of keys to values")
    return dict(value)


def bundled_configs() -> Path:
    """Folder of the configurations that come with bowstore (in a checkout or an installed wheel)."""
    package = Path(__file__).parent
    installed = package / "configs"
    return installed if installed.is_dir() else package.parent / "configs"


def find_config(path: Path) -> Path:
    """The file itself, or the bundled configuration of that name."""
    return (
        path
        if path.exists()
        else next(
            (p for p in (bundled_configs() / path.name, bundled_configs() / f"{path.name}.yaml") if p.is_file()), path
        )
    )


def load_train_config(path: Path, overrides: Sequence[str] = ()) -> TrainConfig:
    """Load and validate a training configuration; `overrides` are `a.b=value` with YAML values."""
    values = load_yaml(find_config(path))
    values.setdefault("name", path.stem)
    return validate(TrainConfig, apply_overrides(values, overrides), str(path))


def load_workspace(folder: Path | None = None) -> Workspace:
    """The workspace of `folder` (default: the current directory), or the defaults where there is no file."""
    path = (folder or Path()) / WORKSPACE_FILE
    return validate(Workspace, load_yaml(path), str(path)) if path.exists() else Workspace()


def apply_overrides(values: dict[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """Return `values` with every `a.b=value` set; values are read as YAML."""
    result: dict[str, Any] = _copy(values)
    for override in overrides:
        name, equals, text = override.partition("=")
        if not equals or not name:
            raise UsageError(f"--set {override!r} is not of the form key=value, for example optim.lr=0.1")
        *folders, leaf = name.strip().split(".")
        place = result
        for folder in folders:
            place = place.setdefault(folder, {})
            if not isinstance(place, dict):
                raise UsageError(f"--set {override!r}: {folder!r} is a value, not a group of keys")
        try:
            place[leaf] = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise UsageError(f"--set {override!r}: {text!r} is not a YAML value") from error
    return result


def _copy(value: Any) -> Any:
    return {key: _copy(item) for key, item in value.items()} if isinstance(value, dict) else value


def validate(model: type[Model], values: dict[str, Any], origin: str) -> Model:
    """Build a configuration; the first problem becomes a one-line `UsageError` that names `origin`."""
    try:
        return model.model_validate(values)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        if first["type"] == "extra_forbidden":
            known = _known_keys(model, first["loc"][:-1])
            near = difflib.get_close_matches(str(first["loc"][-1]), known, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(known)}"
            raise UsageError(f"{origin}: unknown configuration key {where!r}; {hint}") from error
        given = f" (got {first['input']!r})" if not isinstance(first["input"], dict) else ""
        raise UsageError(f"{origin}: {where or 'configuration'}: {first['msg']}{given}") from error


def _known_keys(model: type[Strict], folders: Sequence[int | str]) -> list[str]:
    for folder in folders:
        annotation = model.model_fields[str(folder)].annotation
        options = (annotation, *get_args(annotation))
        model = next(o for o in options if isinstance(o, type) and issubclass(o, Strict))
    return sorted(model.model_fields)


def dump(config: Strict) -> dict[str, Any]:
    """Plain values (paths as text) of a configuration, for YAML and JSON files."""
    return config.model_dump(mode="json")
