"""Few-shot classification by cosine prototypes on frozen, pooled features (paper 4.1.2)."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from bowstore.config import Count, Listed, Place, Seed, Strict, Text, Workspace
from bowstore.data.index import Index, open_index
from bowstore.errors import UsageError
from bowstore.evaluate.classes import ALL, class_lists, find_classes, has_classes, in_order, list_name, read_classes
from bowstore.evaluate.episodes import draw_episodes, episode_accuracy, mean_and_interval
from bowstore.evaluate.protocol import DataSets, Features, Kind, Protocol, Scores
from bowstore.evaluate.results import INTERVAL
from bowstore.evaluate.splits import check_labels, labelled
from bowstore.progress import say_once
from bowstore.workspace import shards_beside, val_shards

_MAX_DRAWN = 1 << 26  # images of all episodes, repeated ones too: 2 GB while they are drawn
# The split that a list is one of: the paper's data set, and how many classes and images that split has.
_SPLITS = {"cifar-fs-test": ("cifar100", 100, 10_000), "miniimagenet-test": ("miniimagenet", 20, 12_000)}


class FewShotSettings(Strict):
    """What a user sets of few-shot episodes."""

    test: Place | None = Field(None, description="labelled shards with the classes; null: test or val of the workspace")
    classes: Listed[Text] = Field(
        (),
        description="names with commas between them, a file with a name a line, all, or one of the lists "
        "cifar-fs-test and miniimagenet-test; null: the list of the data set if it has one, else all",
    )
    ways: int = Field(5, ge=2, le=1000, description="classes an episode")
    shots: Annotated[tuple[Count, ...], Field(strict=False, min_length=1)] = Field(
        (1, 5, 10, 50), description="exemplars a class, more than once for several"
    )
    queries: Count = Field(15, description="queries a class")
    episodes: int = Field(2000, ge=2, le=100_000, description="how many; the more, the narrower the interval")
    seed: Seed = Field(0, description="of the episodes")

    @model_validator(mode="after")
    def _drawable(self) -> Self:
        if any(more <= fewer for fewer, more in zip(self.shots, self.shots[1:], strict=False)):
            raise ValueError(f"shots {', '.join(map(str, self.shots))} must ascend; each once, smallest first")
        if (drawn := self.episodes * self.ways * self.images) > _MAX_DRAWN:
            raise ValueError(
                f"{self.episodes} episodes of {self.ways} ways and {self.images} images a class show {drawn} images, "
                f"more than {_MAX_DRAWN}; take fewer episodes"
            )
        return self

    @property
    def images(self) -> int:
        """Images of a class that an episode of the most shots needs."""
        return self.queries + self.shots[-1]


def describe(settings: FewShotSettings) -> Protocol:
    """Ways, shots and classes are in the id; queries, episodes and seed change only how near the mean is known.

    Of classes that only the data will say, the id says no more than that.
    """
    classes = list_name(settings.classes) if settings.classes else "by-default"
    shots = "-".join(map(str, settings.shots))
    middle = settings.shots[min(1, len(settings.shots) - 1)]
    return Protocol(
        id=f"fewshot/{settings.ways}way-{shots}shot/{classes}",
        version=1,
        description=f"{settings.ways}-way episodes on pooled features, cosine to the mean of {shots} exemplars",
        headline=_metric(middle),
    )


def _metric(shots: int) -> str:
    return f"{shots}-shot"


def resolve(settings: FewShotSettings, workspace: Workspace) -> FewShotSettings:
    """The workspace's shards where none are named, and the names of the classes."""
    test = settings.test or _test_shards(workspace)
    index = open_index(test, workspace.storage)
    names = read_classes(settings.classes or [_default_list(index, test)])
    return settings.model_copy(update={"test": test, "classes": names})


def _test_shards(workspace: Workspace) -> Path:
    """As `val_shards`, but test before val: the novel classes of MiniImageNet are in its test split."""
    for path in () if workspace.val_shards else shards_beside(workspace, "test", "val"):
        if (open_index(path, workspace.storage).label >= 0).all():  # ImageNet's test images have no labels
            return path
    return val_shards(workspace)


def _default_list(index: Index, test: Path) -> str:
    for name, (_, classes, _) in _SPLITS.items():
        listed = class_lists()[name]
        if len(index.classes) == classes and has_classes(listed, index.classes):
            others = f"; --classes all takes all {classes}" if classes > len(listed) else ""
            say_once(f"episodes of the {len(listed)} classes {name} of {test}{others}")
            return name
    return ALL


def data(settings: FewShotSettings, workspace: Workspace) -> DataSets:
    """The images of the classes, class by class, each in the order of the key hashes, whatever shards they lie in.

    Raises:
        DataError: images without labels.
        UsageError: classes that are not there, fewer than the ways, or with too few images.
    """
    assert settings.test, "resolved"
    index = open_index(settings.test, workspace.storage)
    label_N = np.asarray(index.label)
    check_labels("test", label_N)
    images_K = np.bincount(label_N, minlength=len(index.classes))
    there = index.classes or tuple(map(str, range(len(images_K))))
    names: Sequence[str] = settings.classes
    if list_name(names) == ALL:
        names = in_order([name for name, images in zip(there, images_K, strict=True) if images])
    places_C = find_classes(names, there, str(settings.test), lambda: _where_else(names, workspace))
    _check_sizes(settings, names, images_K[places_C])
    number_K = np.full(len(images_K), -1)
    number_K[places_C] = np.arange(len(names))
    number_N = number_K[label_N]
    rows = np.lexsort((index.key_hash, number_N))[-images_K[places_C].sum() :]
    split = replace(labelled(index, rows), labels=number_N[rows], classes=tuple(there[place] for place in places_C))
    paper = _SPLITS.get(list_name(settings.classes))
    known = paper and paper[1:] == (len(index.classes), len(index))
    return DataSets(splits={"test": split}, dataset=paper[0] if paper and known else None)


def _where_else(names: Sequence[str], workspace: Workspace) -> str:
    """What to do where classes are missing: the workspace's shards that have them all, if there are some."""
    for path in shards_beside(workspace, "train", "val", "test"):
        if has_classes(names, open_index(path, workspace.storage).classes):
            return f"{path} has them all: --test {path}"
    lists = ", ".join([ALL, *class_lists()])
    return f"--classes takes names of its classes, a file or a list ({lists}), and --test other shards"


def _check_sizes(settings: FewShotSettings, names: Sequence[str], images_C: NDArray[np.integer]) -> None:
    """Refuse what no episode can be drawn from."""
    if len(names) < settings.ways:
        fewer = f"--ways {len(names)}, " if len(names) > 1 else ""
        raise UsageError(
            f"an episode of {settings.ways} ways needs as many classes, and {settings.test} gives {len(names)}; take "
            f"{fewer}more --classes or other shards by --test"
        )
    least = int(images_C.argmin())
    if (images := int(images_C[least])) < settings.images:
        spare = images - settings.queries
        fewer = f"--shots up to {spare}, " if spare > 0 else "fewer --queries and --shots, " if images > 1 else ""
        raise UsageError(
            f"class {names[least]} has {images} images in {settings.test}, and {settings.shots[-1]} shots with "
            f"{settings.queries} queries need {settings.images}; take {fewer}other --classes or other shards by --test"
        )


def score(features: Features, settings: FewShotSettings) -> Scores:
    """Mean accuracy of the episodes by the number of shots, and half the width of its 95 % interval."""
    split = features["test"]
    images_C = np.bincount(split.labels)
    first_C = images_C.cumsum() - images_C  # the images come class by class
    classes_EW, places_EWI = draw_episodes(
        images_C, ways=settings.ways, images=settings.images, episodes=settings.episodes, seed=settings.seed
    )
    rows_EWI = first_C[classes_EW][..., None] + places_EWI
    accuracy = episode_accuracy(split.taps["pooled"], rows_EWI, queries=settings.queries, shots=settings.shots)
    found = {_metric(shots): mean_and_interval(each_E) for shots, each_E in zip(settings.shots, accuracy, strict=True)}
    return Scores(
        metrics={metric: mean for metric, (mean, _) in found.items()},
        details={INTERVAL: {metric: half for metric, (_, half) in found.items()}},
        settings={"classes": list(split.classes)},
    )


KIND = Kind(
    name="fewshot",
    help="Few-shot episodes by cosine prototypes on frozen pooled features (the paper's Tables 1 to 3).",
    settings=FewShotSettings,
    describe=describe,
    resolve=resolve,
    data=data,
    score=score,
)
