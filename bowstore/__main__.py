"""`python -m bowstore` is `bowstore`."""

from bowstore.cli import main

if __name__ == "__main__":
    main()
