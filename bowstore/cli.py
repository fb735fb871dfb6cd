"""The command line: parse, resolve a configuration, call one function, print its result.

Heavy imports stay inside the commands, so that `bowstore --help` answers at once. Results go to stdout, progress
and messages to stderr; a user's mistake is one line and an exit code (2 for usage, 1 for failure).
"""

import errno
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from bowstore import __version__
from bowstore.errors import BowstoreError

_PATH = click.Path(path_type=Path)


class _Group(click.Group):
    """Turns errors that users can meet into one line and an exit code; `--debug` shows the traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except BowstoreError as error:
            if ctx.params.get("debug"):
                raise
            _fail(str(error), error.exit_code)
        except OSError as error:
            if ctx.params.get("debug"):
                raise
            _fail(_os_error(error), 1)
        except ModuleNotFoundError as error:
            if error.name != "faiss" or ctx.params.get("debug"):
                raise
            _fail("FAISS is not installed; pip install 'bowstore[cpu]', or 'bowstore[gpu]' on a GPU machine", 1)
        except RuntimeError as error:
            if type(error).__name__ != "OutOfMemoryError" or ctx.params.get("debug"):
                raise
            _fail(f"the GPU's memory is full ({str(error).splitlines()[0]}); lower the batch", 1)
        except KeyboardInterrupt:
            _fail("interrupted; run the command again to go on", 130)


def _fail(message: str, code: int) -> None:
    click.echo(f"Error: {' '.join(message.split())}", err=True)
    sys.exit(code)


def _os_error(error: OSError) -> str:
    where = f" ({error.filename})" if error.filename else ""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"the disk is full{where}; free some space and run the command again: it goes on where it stopped"
    return f"{error.strerror or error}{where}"


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="bowstore")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def main(debug: bool) -> None:
    """Learn image representations without labels by predicting bags of visual words.

    \b
    bowstore shards IMAGES data/shards          images to WebDataset shards
    bowstore train --config CONFIG              the teacher (rotation prediction)
    bowstore encode --layer conv4 --K 20000     its feature maps to words, once, into a store
    bowstore train                              BoWNet on the words, with no teacher in the loop
    bowstore eval voc07                         how good the representation is

    The current directory is the workspace; `bowstore init` writes its bowstore.yaml.
    """  # noqa: D301 - click reads the backspace as "do not wrap"


@main.command()
@click.argument("folder", type=_PATH, default=Path())
@click.option(
    "--recipe", type=click.Choice(["cifar10", "imagenette", "imagenet"]), help="Copy a recipe's configurations too."
)
def init(folder: Path, recipe: str | None) -> None:
    """Write bowstore.yaml (paths and defaults of a workspace) into FOLDER."""
    from bowstore.workspace import init_workspace

    for path in init_workspace(folder, recipe):
        click.echo(path)


@main.command()
@click.argument("src", type=_PATH)
@click.argument("out", type=_PATH)
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of the one global shuffle.")
@click.option("--per-shard", type=click.IntRange(1), default=4096, show_default=True, help="Images a shard.")
@click.option("--workers", type=click.IntRange(1), help="Processes; default: one a core.")
@click.option("--json", "as_json", is_flag=True, help="Print the reports as JSON alone.")
def shards(src: Path, out: Path, seed: int, per_shard: int, workers: int | None, as_json: bool) -> None:
    """Turn class folders below SRC (train/, val/ or test/) into WebDataset shards in OUT.

    Every image is decoded once; what cannot be decoded is set aside with its reason in OUT/SPLIT/quarantine.jsonl.
    A second run does nothing, an interrupted one goes on.
    """
    from bowstore.data.shards import make_shards

    reports = make_shards(src, out, seed=seed, per_shard=per_shard, workers=workers)
    values = [{**asdict(report), "folder": str(report.folder)} for report in reports]
    _print(values, "\n".join(report.summary() for report in reports), as_json)


@main.command()
@click.argument("folder", type=_PATH)
@click.option("--workers", type=click.IntRange(1), help="Threads; default: one a core.")
def index(folder: Path, workers: int | None) -> None:
    """Index the WebDataset shards in FOLDER that were made elsewhere, so that they can be used as they are."""
    from bowstore.data.index import build_index, known_classes

    built = build_index(folder, classes=known_classes(folder), workers=workers)
    click.echo(f"{folder}: {len(built)} images in {len(built.shards)} shards, fingerprint {built.fingerprint}")


@main.command()
@click.argument("path", type=_PATH)
@click.option("--shards", "shards_dir", type=_PATH, help="Also join the store with these shards by key.")
@click.option("--repair", is_flag=True, help="Take a store's damaged chunks back, for `bowstore encode` to redo.")
@click.option("--digest", "show_digest", is_flag=True, help="Print a store's digest as the last line.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON alone.")
def verify(path: Path, shards_dir: Path | None, repair: bool, show_digest: bool, as_json: bool) -> None:
    """Check a word store, or a folder of shards, against what was recorded when it was written.

    Names every damaged chunk or shard and leaves with exit code 1 if there is one.
    """
    from bowstore.verify import verify_path

    report = verify_path(path, shards=shards_dir, digest=show_digest, repair=repair)
    _print(report.as_dict(), report.text(), as_json)
    if report.problems:
        sys.exit(1)


@main.command()
@click.option("--layer", required=True, help="Layer of the teacher: conv1 ... conv5, or block1 ... block3.")
@click.option("--K", "k", type=click.IntRange(1), required=True, help="Number of visual words, at most 65535.")
@click.option("--teacher", help="Run, checkpoint or .safetensors file.  [default: newest finished rotation run]")
@click.option("--shards", "shards_dir", type=_PATH, help="Shards to encode.  [default: the workspace's]")
@click.option("--store", type=_PATH, help="Word store to write.  [default: the workspace's]")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of the sample and of k-means.")
@click.option("--sample-per-word", type=click.IntRange(1), default=256, show_default=True, help="Vectors a word.")
@click.option("--iterations", type=click.IntRange(1), default=25, show_default=True, help="Of k-means.")
@click.option("--batch", type=click.IntRange(1), help="Images a batch.  [default: 64, 256 on a GPU]")
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON alone.")
def encode(
    layer: str, k: int, teacher: str | None, shards_dir: Path | None, store: Path | None, as_json: bool, **how: Any
) -> None:
    """Quantize the teacher's feature map of every image over a k-means vocabulary, into a word store.

    Vocabulary by k-means over sampled vectors, then one pass over all images. An interrupted run goes on.
    """
    from bowstore.config import load_workspace
    from bowstore.environment import choose_device
    from bowstore.words.encode import encode as run_encode
    from bowstore.workspace import resolve_teacher

    workspace = load_workspace()
    how["device"] = choose_device(how["device"])
    report = run_encode(
        teacher=resolve_teacher(workspace, teacher),
        shards=shards_dir or workspace.shards,
        store=store or workspace.store,
        layer=layer,
        k=k,
        **how,
    )
    _print(report.as_dict(), report.text(), as_json)


@main.command()
@click.option("--config", type=_PATH, help="YAML file.  [default: the workspace's, or the teacher's student]")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override, for example optim.lr=0.1.")
@click.option("--name", help="Name of the run directory.  [default: the configuration's]")
@click.option("--shards", "shards_dir", type=_PATH, help="Shards to train on.")
@click.option("--store", type=_PATH, help="Word store to train on.")
@click.option("--seed", type=click.IntRange(0), help="Seed of weights, order and augmentation.")
@click.option("--resume", is_flag=True, help="Go on in a run directory that holds another configuration.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON alone.")
def train(
    config: Path | None,
    overrides: tuple[str, ...],
    name: str | None,
    shards_dir: Path | None,
    store: Path | None,
    seed: int | None,
    resume: bool,
    as_json: bool,
) -> None:
    """Train a teacher (task rotation) or BoWNet (task words); under torchrun, on many devices.

    A run that was interrupted goes on from its newest checkpoint when the same command is given again.
    """
    from bowstore.config import load_workspace
    from bowstore.train.loop import train as run_train
    from bowstore.workspace import resolve_train

    flags = {"name": name, "shards": shards_dir, "seed": seed}
    overrides += tuple(f"{key}={json.dumps(str(value))}" for key, value in flags.items() if value is not None)
    workspace = load_workspace()
    report = run_train(resolve_train(workspace, config, overrides, store=store), workspace.runs, resume=resume)
    if report.first:
        _print(report.as_dict(), report.text(), as_json)


@main.group(name="eval")
def evaluate() -> None:
    """Evaluate a frozen representation; results go to RUN/eval/PROTOCOL.json."""


def _run_options(command: Any) -> Any:
    """Options that every evaluation has."""
    for option in (
        click.option("--json", "as_json", is_flag=True, help="Print the result as JSON alone."),
        click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True),
        click.option("--batch", type=click.IntRange(1), default=128, show_default=True, help="Images a batch."),
        click.option("--random", "random_init", is_flag=True, help="The run's network at its random initialisation."),
        click.option("--run", "name", help="Run, checkpoint or .safetensors.  [default: newest finished run]"),
    ):
        command = option(command)
    return command


@evaluate.command()
@_run_options
@click.option("--train", "train_shards", type=_PATH, help="Labelled train shards.  [default: the workspace's]")
@click.option("--test", "test_shards", type=_PATH, help="Labelled test shards.  [default: the workspace's]")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of the order of training.")
@click.option("--standardise", is_flag=True, help="Standardise features (another protocol id).")
def linear(
    name: str | None, random_init: bool, train_shards: Path | None, test_shards: Path | None, as_json: bool, **how: Any
) -> None:
    """Linear classifier on frozen pooled features (the paper's CIFAR-100 and MiniImageNet protocol)."""
    from bowstore.config import load_workspace
    from bowstore.evaluate.run import evaluate_run_linear
    from bowstore.workspace import val_shards

    workspace = load_workspace()
    result = evaluate_run_linear(
        _run_path(workspace, name),
        train=train_shards or workspace.shards,
        test=test_shards or val_shards(workspace),
        random_init=random_init,
        **how,
    )
    _print(result.as_dict(), result.text(), as_json)


@evaluate.command()
@_run_options
@click.option("--voc", type=_PATH, help="VOC devkit folder (VOC2007).  [default: the workspace's]")
@click.option("--costs", type=click.Choice(["fair", "vissl", "obow"]), default="fair", show_default=True)
@click.option("--layer", "layers", multiple=True, help="Layers.  [default: the last two stages]")
@click.option("--jobs", type=click.IntRange(1), help="Parallel SVM fits.  [default: one a core]")
def voc07(name: str | None, random_init: bool, voc: Path | None, as_json: bool, **how: Any) -> None:
    """Linear SVMs on frozen features of VOC2007, 20 classes, mean average precision (the paper's Table 4)."""
    from bowstore.config import load_workspace
    from bowstore.evaluate.run import evaluate_run_voc07

    workspace = load_workspace()
    result = evaluate_run_voc07(_run_path(workspace, name), voc=voc or workspace.voc, random_init=random_init, **how)
    _print(result.as_dict(), result.text(), as_json)


def _run_path(workspace: Any, name: str | None) -> Path:
    from bowstore.workspace import find_run, newest_run

    return find_run(workspace, name) if name else newest_run(workspace)


@main.command()
@click.option("--out", type=_PATH, default=Path("demo"), show_default=True, help="Folder of the demo's workspace.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON alone.")
def demo(out: Path, seed: int, as_json: bool) -> None:
    """The whole job on rendered images: random, RotNet and BoWNet side by side, in minutes on two cores."""
    from bowstore.demo import run_demo

    result = run_demo(out, seed=seed)
    _print(result.as_dict(), result.text(), as_json)


@main.group()
def bench() -> None:
    """What each stage can do on this machine."""


@bench.command(name="train")
@click.option("--config", type=_PATH, help="YAML file.  [default: as for `bowstore train`]")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override, for example optim.batch=64.")
@click.option("--store", type=_PATH, help="Word store.")
@click.option("--steps", type=click.IntRange(5), default=30, show_default=True, help="Timed steps a round.")
@click.option("--rounds", type=click.IntRange(1), default=5, show_default=True, help="Interleaved rounds.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON alone.")
def bench_train(
    config: Path | None, overrides: tuple[str, ...], store: Path | None, steps: int, rounds: int, as_json: bool
) -> None:
    """Training with the loader over the same step on resident data, interleaved; written to RUNS/bench/train.json."""
    from bowstore.bench import bench_training
    from bowstore.config import load_workspace
    from bowstore.workspace import resolve_train

    workspace = load_workspace()
    resolved = resolve_train(workspace, config, overrides, store=store)
    result = bench_training(resolved, workspace.runs / "bench" / "train.json", steps=steps, rounds=rounds)
    _print(result.as_dict(), result.text(), as_json)


def _print(value: Any, text: str, as_json: bool) -> None:
    """One result on stdout: the table, or with --json the object alone."""
    click.echo(json.dumps(value, indent=2) if as_json else text)


if __name__ == "__main__":
    main()
