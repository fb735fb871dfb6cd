"""Commands from images to shards: shards, index, verify."""

import sys
from dataclasses import asdict
from pathlib import Path

import click

from bowstore.cli.common import PATH, emit


@click.command()
@click.argument("src", type=PATH)
@click.argument("out", type=PATH)
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
    emit(values, "\n".join(report.summary() for report in reports), as_json)


@click.command()
@click.argument("folder", type=PATH)
@click.option("--workers", type=click.IntRange(1), help="Threads; default: one a core.")
def index(folder: Path, workers: int | None) -> None:
    """Index the WebDataset shards in FOLDER that were made elsewhere, so that they can be used as they are."""
    from bowstore.data.index import build_index, known_classes

    built = build_index(folder, classes=known_classes(folder), workers=workers)
    click.echo(f"{folder}: {len(built)} images in {len(built.shards)} shards, fingerprint {built.fingerprint}")


@click.command()
@click.argument("path", type=PATH)
@click.option("--shards", "shards_dir", type=PATH, help="Also join the store with these shards by key.")
@click.option("--repair", is_flag=True, help="Take a store's damaged chunks back, for `bowstore encode` to redo.")
@click.option("--digest", "show_digest", is_flag=True, help="Print a store's digest as the last line.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON alone.")
def verify(path: Path, shards_dir: Path | None, repair: bool, show_digest: bool, as_json: bool) -> None:
    """Check a word store, or a folder of shards, against what was recorded when it was written.

    Names every damaged chunk or shard and leaves with exit code 1 if there is one.
    """
    from bowstore.verify import verify_path

    report = verify_path(path, shards=shards_dir, digest=show_digest, repair=repair)
    emit(report.as_dict(), report.text(), as_json)
    if report.problems:
        sys.exit(1)
