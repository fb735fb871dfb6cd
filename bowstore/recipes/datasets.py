"""Finds the images of a table's recipe by the name of their data set: shards, images, or a download. Loads no torch.

A data set has the name of the folder that its shards stage writes: `data/cifar10` is that of cifar10.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, cast

from bowstore.config import StorageConfig, Workspace
from bowstore.data.downloads import BY_HAND, DOWNLOADS
from bowstore.data.index import open_index
from bowstore.data.records import read_manifest
from bowstore.data.table import INDEX_FILE
from bowstore.errors import BowstoreError, MissingError, UsageError, nearest
from bowstore.evaluate.splits import has_classes_of
from bowstore.recipes.file import load_recipe
from bowstore.recipes.images import DownloadStage, ShardsStage
from bowstore.recipes.plan import Plan, make_plan
from bowstore.recipes.stage import DONE, fingerprint
from bowstore.remote import RemoteFolder, is_remote, url_of


class Supply(NamedTuple):
    """Where a data set comes from: overrides of the recipe; or why there is none, and what to do."""

    overrides: tuple[str, ...] = ()
    absent: str = ""


def placed(
    recipe: Path,
    workspace: Workspace,
    overrides: Sequence[str] = (),
    *,
    seed: int | None = None,
    folder: Path | None = None,
) -> Plan:
    """A recipe in a workspace, with images of a data set that are there in place of their download (`supply`).

    So that a recipe and `reproduce`, whose runs lie in the same places, take the same images. Of shards that have no
    data set's name, as `data/shards`, nobody can tell that they are the same: they are made as the recipe says.

    Raises:
        MissingError, UsageError: as `load_recipe` and `make_plan`.
    """
    plan = make_plan(load_recipe(recipe, overrides), workspace, seed=seed, folder=folder)
    found: list[str] = []
    for name, stage in shard_stages(plan).items():
        images = plan.stages.get(str(cast(ShardsStage, plan.stages[stage]).images))
        if name in DOWNLOADS and isinstance(images, DownloadStage) and images.state() != DONE:
            found += supply(plan, name, stage, None, fetch=False).overrides
    if not found:
        return plan
    return make_plan(load_recipe(recipe, [*overrides, *found]), workspace, seed=seed, folder=folder)


def shard_stages(plan: Plan) -> dict[str, str]:
    """The stages that make shards, by the name of their data set."""
    stages = {name: stage for name, stage in plan.stages.items() if isinstance(stage, ShardsStage)}
    return {(stage.out or stage.shards.src or Path(name)).name: name for name, stage in stages.items()}


def describe_data(plan: Plan) -> tuple[dict[str, str], list[str]]:
    """What test images are, by the name of their column in tables; and a line on each data set that is there."""
    labels, lines = {}, []
    for name, stage in shard_stages(plan).items():
        splits = cast(ShardsStage, plan.stages[stage]).splits
        there = {
            role: open_index(folder, plan.workspace.storage)
            for role, folder in splits.items()
            if is_remote(folder) or fingerprint(folder)
        }
        if not there:
            continue
        index = next(iter(there.values()))
        known = has_classes_of(name, index)
        for split in there.values():
            column = split.fingerprint[:8]
            labels[column] = f"{name} ({column})" if known else f"images that are not {name} ({column})"
        sizes = " and ".join(f"{len(split)} {role}" for role, split in there.items())
        other = "" if known else f", whose {len(index.classes)} classes are not those of {name}: not this table"
        lines.append(f"{name}: {sizes} images{other}")
    return labels, lines


def named_data(given: Sequence[str], names: Sequence[str]) -> dict[str, Path]:
    """What --data says, by data set.

    Raises:
        UsageError: no such data set, one given twice, or a path that does not say which of several it is.
        MissingError: a path that is not there.
    """
    found: dict[str, Path] = {}
    for text in given:
        name, equals, path = text.partition("=")
        if not equals or (name not in names and Path(text).exists()):
            name, path = names[0] if len(names) == 1 else "", text
        if name not in names:
            hint = nearest(name, names) or f"write {' or '.join(f'{it}=PATH' for it in names)}"
            raise UsageError(f"--data {text} names no data set of the table; {hint}")
        if name in found:
            raise UsageError(f"--data names {name} twice; give one of {found[name]} and {path}")
        if not path or not (is_remote(path) or Path(path).exists()):
            raise MissingError(f"--data {text}: {path or 'the path'} is not there; name shards or images of {name}")
        found[name] = Path(path) if is_remote(path) else Path(path).absolute()
    return found


def supply(plan: Plan, name: str, stage: str, given: Path | None, *, fetch: bool) -> Supply:
    """Find a data set: what was named; what is there already; what lies in data/ or is the workspace's; a download.

    Args:
        plan: the recipe, as it stands in its file.
        name: the data set's.
        stage: the one that makes its shards.
        given: shards or images that were named.
        fetch: whether to download what is not there, now: it is asked for before any other work.
    """
    shards = cast(ShardsStage, plan.stages[stage])
    if given:
        return _use(stage, given, plan.workspace.storage)
    if shards.state() == DONE:
        return Supply()
    data, download = Path("data").absolute(), DOWNLOADS.get(name)
    results = download.results if download and len(download.results) == 1 else ()
    for place in (data / name, *(data / result for result in results)):
        if place.exists():
            return _use(stage, place, plan.workspace.storage)
    workspace, *more = plan.workspace.shards
    if not more and not is_remote(workspace) and (workspace / INDEX_FILE).exists() and workspace.name == "train":
        if has_classes_of(name, open_index(workspace)):
            return _use(stage, workspace.parent.absolute(), plan.workspace.storage)
    images = plan.stages.get(str(shards.images))
    if isinstance(images, DownloadStage):
        try:
            if fetch and images.state() != DONE:
                images.make()
            return Supply()
        except BowstoreError as error:
            why, file = str(error).partition(";")[0], results[0] if results else name
            fetched = f"fetch it where there is a network, `bowstore data download {name} data`, and"
            return Supply(absent=f"{why}; {fetched} {_put(name, file)}")
    if shards.source.exists():
        return Supply()
    return Supply(absent=f"{BY_HAND.get(name, f'nobody makes images of {name}')}; {_put(name, name)}")


def _put(name: str, file: str) -> str:
    return f"put it into data/{file}, or name it: --data {name}=PATH"


def _use(stage: str, place: Path, storage: StorageConfig) -> Supply:
    """Shards as they are, whatever they were made with, or images.

    Raises:
        MissingError: a URL of anything but a folder of shards.
    """
    if is_remote(place) and not RemoteFolder(place / "train", storage).exists(INDEX_FILE):
        url = url_of(place)
        raise MissingError(f"{url} holds no shards (no train/{INDEX_FILE}); name their folder, or fetch images first")
    if not is_remote(place) and place.name == "train" and (place / INDEX_FILE).exists():
        place = place.parent
    if not is_remote(place) and not (place / "train" / INDEX_FILE).exists():
        return Supply((f"stages.{stage}.images=null", f"stages.{stage}.shards.src={_quoted(place)}"))
    return Supply((f"stages.{stage}.out={_quoted(place)}", *_as_made(stage, place)))


def _as_made(stage: str, place: Path) -> list[str]:
    manifest = None if is_remote(place) else read_manifest(place / "train")
    made = manifest.settings if manifest else {}
    return [f"stages.{stage}.shards.{key}={made[key]}" for key in ("seed", "per_shard") if key in made]


def _quoted(place: Path) -> str:
    return "'" + str(place).replace("'", "''") + "'"
