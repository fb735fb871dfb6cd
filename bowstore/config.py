"""Typed configurations: what they are made of, and the workspace; which file says so.

A configuration is a value: it is resolved once, validated, written into the run directory, and passed on.
Unknown keys are errors that name the nearest known key; values of another type are errors, too.
"""

import difflib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    ValidationError,
    model_validator,
)
from pydantic_core import PydanticCustomError

from bowstore.errors import UsageError, nearest
from bowstore.limits import MAX_BATCH, MAX_COUNT, MAX_FLOAT, MAX_SEED, MAX_THREADS, path_problem, text_problem
from bowstore.plugins import Named, use_plugins
from bowstore.yaml_file import read_yaml, shown

WORKSPACE_FILE = "bowstore.yaml"
CONFIGS = Path("configs")
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def _usable(value: Any) -> Any:
    if isinstance(value, str | Path) and (problem := path_problem(str(value))):
        raise ValueError(f"the path {problem}")
    return value


class Places(tuple[Path, ...]):
    """Paths that are one thing together: folders of shards, word stores of their images."""

    def __str__(self) -> str:
        return ", ".join(map(str, self))


SomePaths = Path | Sequence[Path]


def places(given: str | SomePaths) -> Places:
    """One path, or several."""
    return Places(map(Path, [given] if isinstance(given, str | Path) else given))


def _one_is_a_list(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return value
    if isinstance(value, str | Path):
        return [_usable(value)]
    raise PydanticCustomError("path_type", "Input is not a valid path")


def _as_given(value: tuple[Path, ...]) -> str | list[str]:
    return str(value[0]) if len(value) == 1 else [str(path) for path in value]


def _filled(value: str) -> str:
    if problem := text_problem(value):
        raise ValueError(f"the text {problem}")
    return value


def _different(values: tuple[Any, ...]) -> tuple[Any, ...]:
    if not values or len(set(values)) < len(values):
        raise ValueError(f"{list(values)} must be different ones, one at least")
    return tuple(sorted(values))


# Values are strict: a number is no text, a boolean no number. Only what YAML has no form for is taken from another:
# paths from text, tuples from lists, and of course 1.0 from 1.
T = TypeVar("T")
Listed = Annotated[tuple[T, ...], Field(strict=False)]
# Of values that have no order: whoever gives the same in another one means the same.
Chosen = Annotated[Listed[T], AfterValidator(_different)]
Positive = Annotated[float, Field(gt=0, le=MAX_FLOAT)]
_Mean = Annotated[float, Field(ge=-MAX_FLOAT, le=MAX_FLOAT)]
Triple = Annotated[tuple[_Mean, _Mean, _Mean], Field(strict=False)]
Pair = Annotated[tuple[float, float], Field(strict=False)]
Place = Annotated[Path, Field(strict=False), BeforeValidator(_usable)]
# Written as one path or as a list.
ListedPlaces = Annotated[
    tuple[Place, ...],
    Field(strict=False, min_length=1),
    BeforeValidator(_one_is_a_list),
    AfterValidator(Places),
    PlainSerializer(_as_given, when_used="json"),
]
Text = Annotated[str, AfterValidator(_filled)]
Count = Annotated[int, Field(ge=1, le=MAX_COUNT)]
Seed = Annotated[int, Field(ge=0, le=MAX_SEED)]
Threads = Annotated[int, Field(ge=1, le=MAX_THREADS)]
Compile = bool | Literal["auto"]
Batch = Annotated[int, Field(ge=1, le=MAX_BATCH)]
Side = Annotated[int, Field(ge=8, le=2048)]
ShortSide = Annotated[int, Field(ge=8, le=8192)]
Unit = Annotated[float, Field(ge=0, le=1)]


class Strict(BaseModel):
    """Base of all configurations: frozen, no unknown keys, no value taken for one of another type, finite numbers."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _keys_are_known(cls, values: Any) -> Any:
        known = sorted(cls.model_fields)
        for key in values if isinstance(values, dict) else ():
            if key not in known:
                hint = nearest(str(key), known, cutoff=0.5) or f"known keys: {', '.join(known)}"
                raise PydanticCustomError("unknown_key", "{hint}", {"key": str(key), "hint": hint})
        return values


class OnDevice(Strict):
    """Where something is computed."""

    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="what computes; auto: a GPU if one can be used")


class Computing(OnDevice):
    """With what a network is run over images: the base of every configuration that says so."""

    threads: Threads | None = Field(None, description="decoding threads; null: one a core")
    compile: Compile = Field("auto", description="run the network compiled; auto: where that pays")


class ViewConfig(Strict):
    """What the network sees: the perturbed train view and the clean view share size and normalisation.

    The train view is the paper's g: random crop with scale and aspect distortion, flip, colour jitter, grey,
    CutMix. The clean view resizes the short side to `resize` and crops the centre to `size`; with
    `resize: null` the whole image is resized to `size` x `size`.
    """

    size: Side = Field(224, description="side of the square network input, pixels")
    resize: ShortSide | None = Field(256, description="short side before the clean centre crop, pixels")
    mean: Triple = IMAGENET_MEAN
    std: Annotated[tuple[Positive, Positive, Positive], Field(strict=False)] = IMAGENET_STD
    area: Pair = Field((0.08, 1.0), description="crop area, share of the image")
    ratio: Pair = Field((3 / 4, 4 / 3), description="crop width / height")
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


_Stride = Annotated[int, Field(ge=1, le=8)]


class ModelConfig(Strict):
    """A backbone by name; `bowstore.models.registry` lists the names."""

    arch: Text = "resnet50"
    strides: Annotated[tuple[_Stride, _Stride, _Stride], Field(strict=False)] = Field(
        (1, 2, 2), description="strides of a wide ResNet's three groups"
    )


class ExportConfig(Strict):
    """How a network is written for other code."""

    format: Literal["torchvision", "timm", "safetensors", "detectron2"] = Field(
        "safetensors", description="whose names the tensors get; safetensors: those of the network's own library"
    )


class StorageConfig(Strict):
    """How bytes are read, and where local copies of remote shards and stores lie."""

    read: Literal["auto", "mmap", "pread"] = Field(
        "auto",
        description="mmap: memory maps; pread: one read an image, for network file systems; auto: by the file system",
    )
    read_threads: Threads = Field(16, description="images read at once with pread")
    cache: Place | None = Field(None, description="folder of local copies; null: $BOWSTORE_CACHE, or ~/.cache/bowstore")
    cache_gb: float = Field(200.0, gt=0, le=1e9, description="bound on the cache, 10^9 bytes")
    retries: int = Field(5, ge=0, le=1000, description="further tries of a transfer that fails")
    timeout_s: float = Field(
        30.0, gt=0, le=86400, description="seconds without a byte before a transfer counts as failed"
    )


class Workspace(Strict):
    """Paths and defaults of a workspace (`bowstore.yaml` in the current directory)."""

    shards: ListedPlaces = places("data/shards/train")
    val_shards: Place | None = Field(None, description="null: data/shards/val, or data/shards/test")
    store: ListedPlaces = places("data/words.zarr")
    runs: Place = Path("runs")
    networks: Place = Field(Path("networks"), description="results of networks that are no runs")
    teacher: Text | None = Field(
        None,
        description="run, checkpoint or configuration; null: the newest finished run of a teacher's task, as "
        "rotation is",
    )
    config: Place | None = Field(None, description="configuration of `bowstore train`; null: the recipe's next")
    recipe: Place | None = Field(None, description="recipe of `bowstore run` and `bowstore train`: a file, or its name")
    voc: Place = Field(Path("data/VOCdevkit"), description="VOC devkit, with a folder a year, or the folder of a year")
    plugins: Listed[Text] = Field((), description="files and modules that add sources, tasks and protocols")
    storage: StorageConfig = StorageConfig()


Model = TypeVar("Model", bound=Strict)


def bundled_configs() -> Path:
    """Folder of the configurations that come with bowstore (in a checkout or an installed wheel)."""
    package = Path(__file__).parent
    installed = package / "configs"
    return installed if installed.is_dir() else package.parent / "configs"


def find_config(path: Path, group: str = "") -> Path:
    """The file that a configuration's path means.

    For a bare name or `configs/NAME` where no such file is, that is the workspace's or bowstore's own configuration of
    that name; else, or if there is none either, the path itself. `group` is a folder in `configs/`, as of recipes.
    """
    bare = path.parent == Path()
    if (os.path.lexists(path) and not path.is_dir()) or not (bare or path.parent == CONFIGS / group):
        return path
    names = (path.name, f"{path.name}.yaml")
    folders = ([Path()] if bare else []) + [CONFIGS / group, bundled_configs() / group]
    return next((place for folder in folders for name in names if (place := folder / name).is_file()), path)


def no_such_config(path: Path, group: str = "") -> str:
    """Of a configuration that is not there: the nearest of those that come with bowstore, or all their names."""
    names = sorted(file.stem for file in (bundled_configs() / group).glob("*.yaml"))
    longer = [name for name in names if name.startswith(path.stem)]  # some were renamed to end in _small
    near = [min(longer, key=len)] if longer else difflib.get_close_matches(path.stem, names, n=1)
    if near:
        return f"did you mean {near[0]}, which comes with bowstore and goes by its bare name?"
    return f"those that come with bowstore go by their bare names: {', '.join(names)}"


def load_workspace(folder: Path | None = None) -> Workspace:
    """The workspace of `folder` (default: the current directory), or the defaults where there is no file.

    Registries know its plugins from then on, and those of no workspace that was loaded before.
    """
    path = (folder or Path()) / WORKSPACE_FILE
    # A link to nothing is no reason to go on with the defaults.
    workspace = validate(Workspace, read_yaml(path), str(path)) if os.path.lexists(path) else Workspace()
    use_plugins(Named(workspace.plugins, str(path.parent.absolute())))
    return workspace


# What to write instead, by the kind of pydantic's error.
_REMEDIES = {
    "bool_type": "write true or false",
    "int_type": "write a whole number in decimal digits, without a leading zero",
    "float_type": "write a number such as 0.1 or 1e-3, without a leading zero",
    "finite_number": "write a number such as 0.1 or 1e-3",
    "string_type": "put text that looks like a number, true, false or null in quotes",
    "path_type": "put a path that looks like a number, true, false or null in quotes",
    "string_pattern_mismatch": "use letters, digits and . _ - after the first; --name gives another name",
    "tuple_type": "write a list, as in [1, 2]",
    "model_type": "write a group of keys and values",
}


def validate(model: type[Model], values: dict[str, Any], origin: str) -> Model:
    """Build a configuration; the first problem becomes a one-line `UsageError` that names `origin`."""
    try:
        return model.model_validate(values)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        if first["type"] == "unknown_key":
            key = f"{where}{'.' if where else ''}{first['ctx']['key']}"
            raise UsageError(f"{origin}: unknown configuration key {shown(key)}; {first['msg']}") from error
        problem = first["msg"].removeprefix("Value error, ")
        given = f" (got {shown(first['input'])})" if not isinstance(first["input"], dict) else ""
        remedy = f"; {_REMEDIES[first['type']]}" if first["type"] in _REMEDIES else ""
        raise UsageError(f"{origin}: {where or 'configuration'}: {problem}{given}{remedy}") from error


def dump(config: Strict) -> dict[str, Any]:
    """Plain values (paths as text) of a configuration, for YAML and JSON files."""
    return config.model_dump(mode="json")


def value_differences(
    old: Mapping[str, Any], new: Mapping[str, Any], *, free: Sequence[str] = (), prefix: str = ""
) -> list[str]:
    """In what plain values differ, a phrase each; keys in `free` may."""
    found = []
    for key in sorted((old.keys() | new.keys()).difference(free)):
        before, after = old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(after, dict):
            found += value_differences(before, after, prefix=f"{prefix}{key}.")
        elif before != after:
            found.append(f"{prefix}{key} is {before} there, {after} here")
    return found
