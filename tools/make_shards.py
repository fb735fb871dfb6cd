"""Write image folders as WebDataset shards: the script behind `make shards SRC=... OUT=...`."""

import argparse
import sys
from pathlib import Path

from bowstore.data.shards import make_shards
from bowstore.errors import BowstoreError
from bowstore.progress import say


def main() -> int:
    """Parse the command line, write the shards; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", type=Path, metavar="SRC", help="folder with train/, val/, or class folders")
    parser.add_argument("out", type=Path, metavar="OUT", help="folder for the shards of each split")
    parser.add_argument("--seed", type=int, default=0, help="of the one global shuffle (default 0)")
    parser.add_argument("--per-shard", type=int, default=4096, help="images in a shard (default 4096)")
    parser.add_argument("--workers", type=int, help="processes (default: one a core)")
    given = parser.parse_args()
    try:
        make_shards(given.source, given.out, seed=given.seed, per_shard=given.per_shard, workers=given.workers)
    except BowstoreError as error:
        say(f"error: {error}")
        return error.exit_code
    except KeyboardInterrupt:
        say("interrupted; finished shards are kept: run the same command again to go on")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
