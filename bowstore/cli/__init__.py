"""The command line: parse, resolve a configuration, call one function, print its result.

Heavy imports stay inside the commands, so that `bowstore --help` answers at once. Results go to stdout, progress
and messages to stderr; a user's mistake is one line and an exit code (2 for usage, 1 for failure).
"""

import click

from bowstore import __version__
from bowstore.cli.bench import bench
from bowstore.cli.common import Group
from bowstore.cli.compare import compare
from bowstore.cli.copies import pull, push
from bowstore.cli.data import data_group, index, shards, verify
from bowstore.cli.encoding import encode
from bowstore.cli.evaluate import evaluate
from bowstore.cli.export import export
from bowstore.cli.gallery import words
from bowstore.cli.jobs import train
from bowstore.cli.layers import layers
from bowstore.cli.recipes import demo, init, run
from bowstore.cli.reproduce import reproduce


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="bowstore")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def main(debug: bool) -> None:
    """Learn image representations without labels by predicting bags of visual words.

    \b
    bowstore init --recipe imagenet             a workspace: its paths, and what follows what
    bowstore shards IMAGES data/shards          images to WebDataset shards
    bowstore train                              the teacher (rotation prediction)
    bowstore encode --layer conv4 --K 20000     its feature maps to words, once, into a store
    bowstore words --out words.html             a page to look at the words
    bowstore train                              BoWNet on the words, with no teacher in the loop
    bowstore eval voc07                         how good the representation is
    bowstore compare runs/a runs/b              what was measured, side by side
    bowstore export net.pth --format timm       the network for other code
    bowstore push data/words.zarr s3://...      a whole store, its shards, or a run, for others; `pull` fetches it
    bowstore run                                the whole of a recipe; interrupted, it goes on
    bowstore reproduce table1 --small           the paper's tables, and whether its claims hold here

    The current directory is the workspace.
    """  # noqa: D301 - click reads the backspace as "do not wrap"


COMMANDS = (
    init, data_group, shards, index, verify, layers, encode, words, train, evaluate, compare, export, push, pull, run,
    reproduce, demo, bench,
)  # fmt: skip
for command in COMMANDS:
    main.add_command(command)
