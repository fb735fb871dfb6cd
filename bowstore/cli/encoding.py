"""The command that makes word stores: encode."""

import signal
from pathlib import Path
from typing import Any, NoReturn

import click

from bowstore.cli.common import BATCH, COMPILE, COUNT, DEVICES, PATH, SEED, SIZE, TEXT, THREADS, emit

_OWN = "[default: the teacher's own]"


@click.command()
@click.option("--layer", "layers", type=TEXT, multiple=True, help="Layer of the teacher; several in one pass.")
@click.option("--K", "k", type=COUNT, multiple=True, help="Words (up to 65535) of all layers, or of each.")
@click.option(
    "--teacher", type=TEXT, help="Run, file, timm:NAME or torchvision:NAME.  [default: newest finished rotation run]"
)
@click.option("--weights", type=PATH, help="Weights file of a timm or torchvision teacher.  [default: random weights]")
@click.option("--size", type=SIZE, help=f"Side of the clean view, pixels.  {_OWN}")
@click.option("--resize", type=click.IntRange(8), help=f"Short side before the crop, pixels.  {_OWN}")
@click.option(
    "--precision",
    type=click.Choice(["float32", "bfloat16"]),
    default="float32",
    show_default=True,
    help="The teacher's.",
)
@click.option("--shards", "shards_dir", type=PATH, help="Shards to encode.  [default: the workspace's]")
@click.option("--store", type=PATH, help="Word store to write, or its URL.  [default: the workspace's]")
@click.option("--vocabulary", type=PATH, help="Word store whose words are used, instead of k-means.")
@click.option("--append", is_flag=True, help="Add the images that the store lacks, under its own words.")
@click.option("--border", type=click.IntRange(0), default=0, show_default=True, help="Cells to leave out at each side.")
@click.option("--pca", type=COUNT, help="Principal components before k-means.  [default: none]")
@click.option("--whiten", is_flag=True, help="Components of unit variance.")
@click.option("--seed", type=SEED, default=0, show_default=True, help="Of the sample and of k-means.")
@click.option("--sample-per-word", type=COUNT, default=256, show_default=True, help="Vectors a word.")
@click.option("--iterations", type=COUNT, default=25, show_default=True, help="Of k-means.")
@click.option("--batch", type=BATCH, help="Images a batch.  [default: 16, 256 on a GPU]")
@click.option("--threads", type=THREADS, help="Decoding threads.  [default: one a core]")
@COMPILE
@click.option("--device", type=DEVICES, default="auto", show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON alone.")
def encode(
    teacher: str | None,
    shards_dir: Path | None,
    store: Path | None,
    append: bool,
    device: str,
    as_json: bool,
    **values: Any,
) -> None:
    """Quantize the teacher's feature maps of every image over k-means vocabularies, into a word store.

    \b
    bowstore encode --layer conv4 --K 20000                 the newest teacher's words
    bowstore encode --layer conv4 --layer conv5 --K 20000   two layers in one pass
    bowstore encode --append --shards MORE                  images that came later
    torchrun --nproc-per-node 8 -m bowstore encode ...      or the same command on machines that share the folder

    Vocabularies by k-means over sampled vectors, then one pass over all images. An interrupted run goes on.
    `bowstore layers ARCH` lists the layers of a teacher.
    """  # noqa: D301 - click reads the backspace as "do not wrap"
    from bowstore.config import load_workspace, validate
    from bowstore.environment import choose_device
    from bowstore.torchrun import ranks
    from bowstore.train.distributed import beside_others
    from bowstore.words.config import EncodeConfig
    from bowstore.words.encode import encode as run_encode
    from bowstore.workspace import resolve_teacher

    signal.signal(signal.SIGTERM, _interrupted)
    workspace = load_workspace()
    values["teacher"] = resolve_teacher(workspace, teacher)
    config = validate(EncodeConfig, values, "encode")
    with beside_others():
        report = run_encode(
            config,
            shards=shards_dir or workspace.shards,
            store=store or workspace.store,
            append=append,
            device=choose_device(device, ranks().local_rank),
            storage=workspace.storage,
        )
    if report.first:
        emit(report.as_dict(), report.text(), as_json)


def _interrupted(_number: int, _frame: object) -> NoReturn:
    """SIGTERM ends a run as Ctrl-C does: claims are given back at once, and other processes need not wait."""
    signal.signal(
        signal.SIGTERM, signal.SIG_IGN
    )  # torchrun sends it to all when one has ended, which we may know before
    raise KeyboardInterrupt
