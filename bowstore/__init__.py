"""bowstore: learn image representations by predicting bags of visual words, without a teacher in the loop."""

import os

# Before torch loads its OpenMP runtime: waiting threads must sleep, not spin. Spinning ones take the cores that
# DALI's decoding threads and other processes need (docs/results/threads.md: 5 times slower on two busy cores).
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

__version__ = "0.1.0"
