"""Evaluations of a run on disk: which network, which protocol, where the result goes."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bowstore.config import Compile, StorageConfig, dump
from bowstore.data.index import open_index
from bowstore.environment import choose_device
from bowstore.evaluate.linear import LinearConfig, evaluate_linear
from bowstore.evaluate.protocol import Result, result_table
from bowstore.evaluate.splits import known_dataset, share_no_class
from bowstore.evaluate.svm import CostList
from bowstore.evaluate.voc import evaluate_voc07
from bowstore.models.saved import LoadedBackbone, load_backbone
from bowstore.progress import say
from bowstore.runs import results_folder


@dataclass(frozen=True)
class Evaluated:
    """One evaluation and the name it goes by."""

    name: str
    result: Result

    def as_dict(self) -> dict[str, Any]:
        """Plain values for --json: the result file's content."""
        return dump(self.result)

    def text(self) -> str:
        """The table, beside the paper's figures where there are some."""
        return result_table(self.result, self.name)


def evaluate_run_linear(
    path: Path,
    *,
    train: Path,
    test: Path | None,
    by_default: bool = False,
    random_init: bool = False,
    standardise: bool = False,
    seed: int = 0,
    batch: int = 128,
    device: str = "auto",
    compile: Compile = "auto",
    storage: StorageConfig | None = None,
) -> Evaluated:
    """Linear probe of a run, checkpoint or exported network; writes `eval/<protocol>.json` beside it.

    Args:
        path: what to evaluate.
        train: labelled shards.
        test: labelled shards; None holds a tenth of each train class out, under another protocol id.
        by_default: nobody named `test`: if its classes are others than those of `train`, a tenth is held out.
        random_init: evaluate the same network at its random initialisation (the run's own seed).
        standardise: standardise features by the train split; has its own protocol id.
        seed: of the linear layer and its order.
        batch: images a forward pass.
        device: auto, cpu or cuda.
        compile: run the network compiled; auto decides by the number of images.
        storage: how shards are read, and where copies of remote ones lie.
    """
    indexes = open_index(train, storage), open_index(test, storage) if test else None
    if by_default and indexes[1] and share_no_class(indexes[0], indexes[1]):
        say(
            f"{test} holds other classes than {train}: a tenth of each train class is held out and tested on, under a "
            "protocol id of its own; --test names a test split of the same classes"
        )
        test, indexes = None, (indexes[0], None)
    loaded, name, out = _load(path, random_init)
    result = evaluate_linear(
        loaded.backbone,
        train=train,
        test=test,
        view=loaded.saved.view,
        out=out,
        config=LinearConfig(seed=seed, standardise=standardise, held_out=test is None),
        dataset=known_dataset(*indexes),
        run=name,
        batch=batch,
        device=choose_device(device),
        compile=compile,
        storage=storage,
    )
    return Evaluated(name, result)


def evaluate_run_voc07(
    path: Path,
    *,
    voc: Path,
    random_init: bool = False,
    costs: CostList = "fair",
    layers: tuple[str, ...] = (),
    jobs: int | None = None,
    batch: int = 128,
    device: str = "auto",
    compile: Compile = "auto",
) -> Evaluated:
    """VOC07 linear SVMs of a run, checkpoint or exported network; writes `eval/voc07-svm-<costs>.json` beside it.

    Args:
        path: what to evaluate.
        voc: devkit folder (VOC2007).
        random_init: evaluate the same network at its random initialisation (the run's own seed).
        costs: cost list, by the public code that uses it.
        layers: which maps; none for the last two stages.
        jobs: parallel fits; None for one a core.
        batch: images a forward pass.
        device: auto, cpu or cuda.
        compile: run the network compiled; auto decides by the number of images.
    """
    loaded, name, out = _load(path, random_init)
    result = evaluate_voc07(
        loaded.backbone,
        voc=voc,
        view=loaded.saved.view,
        out=out,
        costs=costs,
        layers=layers or None,
        jobs=jobs,
        run=name,
        batch=batch,
        device=choose_device(device),
        compile=compile,
    )
    return Evaluated(name, result)


def _load(path: Path, random_init: bool) -> tuple[LoadedBackbone, str, Path]:
    """The network, its name, and the folder that takes its results."""
    loaded, out = load_backbone(path), results_folder(path, random_init=random_init)
    if not random_init:
        return loaded, loaded.saved.name, out
    return replace(loaded, backbone=loaded.saved.fresh().eval()), f"{loaded.saved.name} (random)", out
