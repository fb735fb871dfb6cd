"""The command that shows words: words."""

from pathlib import Path

import click

from bowstore.cli.common import PATH, SEED, TEXT, emit

_KEPT = 16  # nearest images of a word that a store keeps


@click.command()
@click.argument("store", type=PATH, required=False)
@click.option("--shards", "shards_dir", type=PATH, help="Shards that hold the images.  [default: the workspace's]")
@click.option("--layer", type=TEXT, help="Layer of the store.  [default: all that are complete]")
@click.option("--out", type=PATH, default=Path("words.html"), show_default=True, help="Page to write.")
@click.option("--word", "named", type=click.IntRange(0), multiple=True, help="Show only this word, larger; repeatable.")
@click.option("--words", type=click.IntRange(1, 100), default=16, show_default=True, help="Words a gallery.")
@click.option("--examples", type=click.IntRange(1, _KEPT), help="Images a word.  [default: 8, with --word 16]")
@click.option("--seed", type=SEED, default=0, show_default=True, help="Of the random words.")
@click.option("--reencoded", is_flag=True, help="The shards hold other encodings of the store's images.")
@click.option("--json", "as_json", is_flag=True, help="Print what is shown as JSON alone.")
def words(
    store: Path | None,
    shards_dir: Path | None,
    layer: str | None,
    out: Path,
    named: tuple[int, ...],
    words: int,
    examples: int | None,
    seed: int,
    reencoded: bool,
    as_json: bool,
) -> None:
    """Write a page that shows the words of STORE: their nearest images, how they are used, what goes with them.

    \b
    bowstore words                          random, most and least frequent words of the workspace's store
    bowstore words --word 123 --word 7      these words, larger

    One HTML file that needs nothing else. STORE may be a URL.  [default: the workspace's]
    """  # noqa: D301 - click reads the backspace as "do not wrap"
    from bowstore.config import load_workspace
    from bowstore.report.page import write_words_page
    from bowstore.report.words import Wish

    workspace = load_workspace()
    report = write_words_page(
        store or workspace.store,
        shards_dir or workspace.shards,
        out,
        Wish(layer=layer, words=named, per_gallery=words, examples=examples, seed=seed, reencoded=reencoded),
        workspace.storage,
    )
    emit(report.as_dict(), report.text(), as_json)
