"""Write images as WebDataset shards: the script behind `make shards SRC=... OUT=...` (`bowstore shards`)."""

import sys

from bowstore.cli import main

if __name__ == "__main__":
    main(["shards", *sys.argv[1:]])
