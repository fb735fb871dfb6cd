"""The commands that copy whole stores, shards and runs: push, pull."""

from pathlib import Path

import click

from bowstore.cli.common import PATH, TEXT, emit


@click.command()
@click.argument("path", type=PATH)
@click.argument("url", type=PATH, metavar="URL")
@click.option("--licence", type=TEXT, required=True, help="Under which others may use it, as in 'CC BY 4.0'.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON alone.")
def push(path: Path, url: Path, licence: str, as_json: bool) -> None:
    """Copy the word store, folder of shards or run PATH to URL: s3://, gs://, hf://, or another that fsspec writes.

    \b
    bowstore push data/words.zarr s3://bucket/words.zarr --licence 'CC BY 4.0'
    bowstore push data/shards hf://datasets/NAME/REPOSITORY/shards --licence 'CC0 1.0'

    URL/bowstore.json, with the length and digest of every file, is written last: with it, the copy is whole. Run again,
    an interrupted push goes on. What URL holds of something else is left as it is.
    """  # noqa: D301 - click reads the backspace as "do not wrap"
    from bowstore.config import load_workspace
    from bowstore.copies import push_path

    report = push_path(path, url, licence=licence, storage=load_workspace().storage)
    emit(report.as_dict(), report.text(), as_json)


@click.command()
@click.argument("url", type=PATH, metavar="URL")
@click.argument("path", type=PATH)
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON alone.")
def pull(url: Path, path: Path, as_json: bool) -> None:
    """Copy what `bowstore push` put at URL to the folder PATH; every file is compared with its digest.

    \b
    bowstore pull https://example.org/words.zarr data/words.zarr

    URL may be an https:// one that serves the same files. Run again, an interrupted pull goes on.
    """  # noqa: D301 - click reads the backspace as "do not wrap"
    from bowstore.config import load_workspace
    from bowstore.copies import pull_path

    report = pull_path(url, path, storage=load_workspace().storage)
    emit(report.as_dict(), report.text(), as_json)
