"""bowstore: learn image representations by predicting bags of visual words, without a teacher in the loop."""

import os

# Before torch loads its OpenMP runtime: a waiting thread spins briefly, then sleeps. The default spins for
# milliseconds, on cores that DALI's decoding threads and other processes need (docs/results/threads.md).
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

__version__ = "0.1.0"
