"""The command that makes word stores: encode."""

from pathlib import Path
from typing import Any

import click

from bowstore.cli.common import PATH, emit, interrupt_on_sigterm
from bowstore.cli.options import command, fields


@command()
@fields(
    "given",
    "bowstore.words.encode.config:EncodeConfig",
    flags={"layers": "--layer", "num_words": "--K", "teacher": "--teacher --arch"},
    otherwise={"teacher": "the newest finished run of a teacher's task, as rotation is"},
)
@click.option(
    "--shards", type=PATH, multiple=True, help="Shards to encode, of all folders given.  [default: the workspace's]"
)
@click.option("--store", type=PATH, help="Word store to write.  [default: the workspace's]")
@click.option("--append", is_flag=True, hidden=True)
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON alone.")
def encode(given: dict[str, Any], shards: tuple[Path, ...], store: Path | None, append: bool, as_json: bool) -> None:
    """Quantize the teacher's feature maps of every image over k-means vocabularies, into a word store.

    \b
    bowstore encode                                         the next words of the workspace's recipe
    bowstore encode --layer conv4 --K 20000                 the newest teacher's words
    bowstore encode --layer conv4 --layer conv5 --K 20000   two layers in one pass
    bowstore encode --vocabulary OLD --shards MORE --store NEW   images that came later, under the same words
    torchrun --nproc-per-node 8 -m bowstore encode ...      on many devices, or machines

    Vocabularies by k-means over sampled vectors, then one pass over all images. Run again, it continues.
    `bowstore layers ARCH` lists the layers of a teacher.
    """  # noqa: D301 - click reads the backspace as "do not wrap"
    from bowstore.config import load_workspace, validate
    from bowstore.errors import UsageError
    from bowstore.recipes.next import next_encoding, workspace_plan
    from bowstore.train.distributed import beside_others
    from bowstore.words.encode.config import EncodeConfig
    from bowstore.words.encode.encode import encode as run_encode
    from bowstore.workspace import only_store, resolve_teacher

    interrupt_on_sigterm()
    with beside_others():  # from here on: under torchrun a mistake of the call is told once, not by every rank
        if append:
            raise UsageError(
                "stores do not grow by --append any more; give the new images a store of their own, under the same "
                "words (bowstore encode --vocabulary OLD --shards MORE --store NEW), and train on both (bowstore train "
                "--shards FIRST --shards MORE --store OLD --store NEW)"
            )
        workspace = load_workspace()
        if workspace.recipe and not (given.get("layers") or given.get("vocabulary")):
            stage = next_encoding(workspace_plan(workspace, "--layer LAYER"))
            shards, store = shards or stage.shards, store or stage.place
            given = {**stage.given, **given}
        teacher = resolve_teacher(workspace, given.get("teacher"), seed=given.get("seed"))
        report = run_encode(
            validate(EncodeConfig, {**given, "teacher": teacher}, "encode"),
            shards=shards or workspace.shards,
            store=store or only_store(workspace, "name the one to write by --store"),
            storage=workspace.storage,
        )
    if report:
        emit(report.as_dict(), report.text(), as_json)
