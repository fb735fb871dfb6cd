"""The threads that take whole batches through the teacher.

On a CPU each computes on one core. That is as fast as spreading every operation over all cores, and the results do not
depend on their number: how a convolution is cut up for threads changes its rounding, and words are kept for good.

On a GPU all is put on one stream, by two threads: while one waits for its results, the work of the other lies behind
it, and the GPU waits for neither.
"""

from concurrent.futures import ThreadPoolExecutor

import torch

from bowstore.environment import cores_per_rank

_GPU_WORKERS = 2


def compute_workers(device: torch.device) -> int:
    """Their number."""
    return _GPU_WORKERS if device.type == "cuda" else cores_per_rank()


def workers(count: int) -> ThreadPoolExecutor:
    """The threads, each with as many threads an operation as are set (`cpu_threads`).

    A new thread asks for that number at its first parallel loop, which comes after its first convolution: that one
    would be spread over all cores, and round as it does there. (Compiled networks have no such loop at all.)
    """
    return ThreadPoolExecutor(count, "teacher", initializer=torch.get_num_threads)
