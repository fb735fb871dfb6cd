"""The command that shows words: words."""

from pathlib import Path
from typing import Any

import click

from bowstore.cli.common import PATH, emit
from bowstore.cli.options import command, fields


@command()
@click.argument("store", type=PATH, required=False)
@click.option("--shards", type=PATH, help="Shards that hold the images.  [default: the workspace's]")
@click.option("--out", type=PATH, default=Path("words.html"), show_default=True, help="Page to write.")
@fields("given", "bowstore.report.config:Wish", flags={"words": "--word", "per_gallery": "--words"})
@click.option("--json", "as_json", is_flag=True, help="Print what is shown as JSON alone.")
def words(store: Path | None, shards: Path | None, out: Path, given: dict[str, Any], as_json: bool) -> None:
    """Write a page that shows the words of STORE: their nearest images, how they are used, what goes with them.

    \b
    bowstore words                          random, most and least frequent words of the workspace's store
    bowstore words --word 123 --word 7      these words, larger

    One HTML file that needs nothing else. STORE may be a URL.  [default: the workspace's]
    """  # noqa: D301 - click reads the backspace as "do not wrap"
    from bowstore.config import load_workspace, validate
    from bowstore.report.config import Wish
    from bowstore.report.page import write_words_page
    from bowstore.workspace import only_store

    workspace, wish = load_workspace(), validate(Wish, given, "words")
    place = store or only_store(workspace, "name the one whose words are shown, as STORE")
    report = write_words_page(place, shards or workspace.shards, out, wish, workspace.storage)
    emit(report.as_dict(), report.text(), as_json)
