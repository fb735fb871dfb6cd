"""Commands from images to shards: data, shards, index, verify."""

import shlex
import sys
import textwrap
from pathlib import Path
from typing import Any

import click

from bowstore.cli.common import PATH, TEXT, THREADS, Registered, emit
from bowstore.cli.options import command, fields
from bowstore.data.sources import KINDS

_WIDTH = 110


@click.group("data", invoke_without_command=True)
@click.option("--json", "as_json", is_flag=True, help="Print the kinds and downloads as JSON alone.")
@click.pass_context
def data_group(context: click.Context, as_json: bool) -> None:
    """Show what `bowstore shards` reads: kinds of sources, what each expects on disk, what can be downloaded."""
    if context.invoked_subcommand:
        return
    from bowstore.config import load_workspace
    from bowstore.data.downloads import BY_HAND, DOWNLOADS

    load_workspace()
    value = {
        "sources": [{"name": kind.name, "expects": kind.expects, "example": kind.example} for kind in KINDS.values()],
        "downloads": [{"name": item.name, "what": item.what, "shards": item.shards} for item in DOWNLOADS.values()],
        "by_hand": BY_HAND,
    }
    lines = ["Sources of `bowstore shards SRC OUT` (the kind is found out, or named by --source):"]
    for kind in KINDS.values():
        lines += ["", *_entry(kind.name, kind.expects), f"    $ {kind.example}"]
    lines += ["", "Downloads, `bowstore data download NAME DIR`:", ""]
    for item in DOWNLOADS.values():
        lines += _entry(item.name, item.what)
    lines += ["", "To be had by hand:", ""]
    for name, how in BY_HAND.items():
        lines += _entry(name, how)
    emit(value, "\n".join(lines), as_json)


def _entry(name: str, text: str) -> list[str]:
    indent = " " * 16
    return textwrap.wrap(f"  {name:<13} {text}", _WIDTH, subsequent_indent=indent, break_on_hyphens=False)


@data_group.command("download")
@click.argument("name", type=TEXT)
@click.argument("folder", type=PATH, metavar="DIR")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON alone.")
def download(name: str, folder: Path, as_json: bool) -> None:
    """Fetch the data set NAME into DIR with torchvision's downloader; `bowstore data` lists the names."""
    from bowstore.data.downloads import DOWNLOADS, fetch

    paths = [str(path) for path in fetch(name, folder)]
    command = DOWNLOADS[name].shards.replace("DIR", shlex.quote(str(folder)))
    emit({"name": name, "paths": paths, "shards": command}, f"{', '.join(paths)}; next: {command}", as_json)


@command()
@click.argument("src", type=PATH)
@click.argument("out", type=PATH)
@fields("given", "bowstore.data.config:ShardsConfig", flags={"lists": "--list"}, types={"source": Registered(KINDS)})
@click.option("--json", "as_json", is_flag=True, help="Print the reports as JSON alone.")
def shards(src: Path, out: Path, given: dict[str, Any], as_json: bool) -> None:
    """Turn the images of SRC into WebDataset shards in OUT.

    \b
    SRC may be
      folder        class folders, in train/, val/ or test/
      list          any folder, with --list
      imagenet      the archives of ILSVRC2012, read in place
      kaggle        ImageNet as Kaggle gives it out
      tinyimagenet  tiny-imagenet-200
      cifar10       the Python archive, packed or extracted; cifar100 likewise
      miniimagenet  images/ with train.csv, val.csv and test.csv
      voc           a VOC devkit
      places205     images with the lists of Places205 or Places365
      webdataset    *.tar made elsewhere
    `bowstore data` shows what each expects.

    Every image is decoded once; what cannot be decoded is set aside with its reason in OUT/SPLIT/quarantine.jsonl.
    The report ends with what in SRC became no image, and with classes without images. A second run does nothing;
    after an interruption it continues.
    """  # noqa: D301 - click reads the backspace as "do not wrap"
    from bowstore.config import load_workspace, validate
    from bowstore.data.config import ShardsConfig
    from bowstore.data.shards import make_shards
    from bowstore.data.shards_report import closing_line
    from bowstore.remote import local_only

    load_workspace()
    local_only(out, "write into a local folder, then copy it there")
    reports = make_shards(src, out, validate(ShardsConfig, given, "shards"))
    lines = [*(report.summary() for report in reports), closing_line(reports)]
    emit([report.as_dict() for report in reports], "\n".join(lines), as_json)


@click.command()
@click.argument("folder", type=PATH)
@click.option(
    "--image-ext", "image_ext", type=TEXT, multiple=True, metavar="EXT", help="Extension of the image, as in 0.jpg."
)
@click.option(
    "--label-field", type=TEXT, metavar="NAME", help="Field of the .json member that is the label; `none` for none."
)
@click.option("--workers", type=THREADS, help="Processes; default: up to one a core.")
def index(folder: Path, image_ext: tuple[str, ...], label_field: str | None, workers: int | None) -> None:
    """Index the WebDataset shards in FOLDER that were made elsewhere, so that they can be used as they are.

    Where samples hold several images, --image-ext says which to take; given twice, the first that is there. The
    label is a whole number in .cls, in .json (label, cls, class, target, or --label-field), or in .txt where every
    sample of every tar has one there (else those are captions). Images without a readable header are left out and
    listed in FOLDER/quarantine.jsonl.
    """
    from bowstore.data.index import build_index
    from bowstore.data.records import known_classes
    from bowstore.data.scan import ScanSettings
    from bowstore.remote import local_only

    local_only(folder, "index the shards where they lie, and copy the index there too")
    settings = ScanSettings(tuple(extension.lower().lstrip(".") for extension in image_ext), label_field)
    built = build_index(folder, classes=known_classes(folder), settings=settings, workers=workers)
    labelled = int((built.label >= 0).sum())
    click.echo(
        f"{folder}: {len(built)} images in {len(built.shards)} shards, {labelled} with a label, "
        f"fingerprint {built.fingerprint}"
    )


@click.command()
@click.argument("path", type=PATH)
@click.option(
    "--shards", type=PATH, multiple=True, help="Also join the store with these shards, of all folders given, by key."
)
@click.option("--reencoded", is_flag=True, help="They hold other encodings of the store's images: join by key alone.")
@click.option("--deep", is_flag=True, help="Decode every image of shards, too.")
@click.option("--repair", is_flag=True, help="Make good what can be made good, and say what to run for the rest.")
@click.option("--digest", "show_digest", is_flag=True, help="Print a store's digest as the last line.")
@click.option("--workers", type=THREADS, help="Processes for shards; default: up to one a core.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON alone.")
def verify(
    path: Path,
    shards: tuple[Path, ...],
    reencoded: bool,
    deep: bool,
    repair: bool,
    show_digest: bool,
    workers: int | None,
    as_json: bool,
) -> None:
    """Check a word store, a folder of shards, or a run, against what was recorded when it was written.

    Names what is damaged by chunk, by shard, member and byte, or by file, and leaves with exit code 1 if anything is.
    --repair of a store takes damaged chunks back, for `bowstore encode` to redo. --repair of shards builds a stale
    index anew; sets damaged shards aside, for `bowstore shards` to write them again; and leaves images that cannot
    be decoded out of the index of shards made elsewhere.
    """
    from bowstore.config import load_workspace
    from bowstore.verify import verify_path

    report = verify_path(
        path,
        shards=shards or None,
        reencoded=reencoded,
        digest=show_digest,
        deep=deep,
        repair=repair,
        workers=workers,
        storage=load_workspace().storage,
    )
    emit(report.as_dict(), report.text(), as_json)
    if not report.sound:
        sys.exit(1)
