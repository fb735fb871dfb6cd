"""What the simulated step takes as given: each number with its unit, its source and how far it is to be trusted.

Bytes are of 10^9 a GB. FAISS, DALI and the like are meant in the versions that docs/results name.
"""

from typing import Literal, NamedTuple

# By how much a number of each confidence may be off, as a share of it: read in a primary source or measured,
# read in a secondary one or a small step from a primary one, an estimate.
OFF = {"high": 0.05, "medium": 0.15, "low": 0.3}


class Assumption(NamedTuple):
    """One number that the model takes as given.

    Attributes:
        value: in `unit`.
        unit: of it.
        confidence: a key of `OFF`.
        source: where it comes from.
    """

    value: float
    unit: str
    confidence: Literal["high", "medium", "low"]
    source: str


_SHEET = "NVIDIA's data sheet"
_EXAMPLES = "NVIDIA DeepLearningExamples, PyTorch ResNet50v1.5 README (container 21.03)"
_DALI = "NVIDIA/DALI pull request 6445, Hopper, hw_decoder_load 0.12, 70 threads: 21,567 images/s"

# Per GPU: the largest dense bfloat16 rate (float16 where there is none), that of float32 outside tensor cores, memory,
# bus bandwidth of an all-reduce of eight in a node (nccl-tests' measure), the node's network, the link to the host.
ASSUMPTIONS = {
    "H100 tensor": Assumption(989, "TFLOP/s", "high", f"{_SHEET}, SXM, dense"),
    "H100 float32": Assumption(67, "TFLOP/s", "high", f"{_SHEET}, SXM"),
    "H100 memory": Assumption(3350, "GB/s", "high", f"{_SHEET}, SXM"),
    "H100 node link": Assumption(460, "GB/s", "medium", "nccl-tests on 8 H100 SXM5, busbw 460-480: docs.alayanew.com"),
    "H100 network": Assumption(400, "GB/s", "high", "DGX H100 user guide: eight ports of 400 Gb/s"),
    "H100 host link": Assumption(55, "GB/s", "low", "PCIe 5.0 x16, from memory"),
    "H100 JPEG engines": Assumption(7, "engines", "low", "from memory; A100's five are in NVIDIA's blog of nvJPEG"),
    "A100 tensor": Assumption(312, "TFLOP/s", "high", f"{_SHEET}, SXM, dense"),
    "A100 float32": Assumption(19.5, "TFLOP/s", "high", f"{_SHEET}, SXM"),
    "A100 memory": Assumption(2039, "GB/s", "high", f"{_SHEET}, SXM, 80 GB"),
    "A100 node link": Assumption(230, "GB/s", "medium", "nccl-tests on 8 A100 SXM4, busbw 230-250: docs.alayanew.com"),
    "A100 network": Assumption(200, "GB/s", "high", "DGX A100 user guide: eight ports of 200 Gb/s"),
    "A100 host link": Assumption(25, "GB/s", "low", "PCIe 4.0 x16, from memory"),
    "A100 JPEG engines": Assumption(5, "engines", "high", "NVIDIA's blog on the hardware JPEG decoder of A100"),
    "L4 tensor": Assumption(121, "TFLOP/s", "high", f"{_SHEET}, dense"),
    "L4 float32": Assumption(30.3, "TFLOP/s", "high", _SHEET),
    "L4 memory": Assumption(300, "GB/s", "high", _SHEET),
    "L4 node link": Assumption(10, "GB/s", "low", "PCIe 4.0 x16 through the host, no NVLink"),
    "L4 network": Assumption(12.5, "GB/s", "medium", "a cloud machine of eight with 100 Gb/s"),
    "L4 host link": Assumption(25, "GB/s", "low", "PCIe 4.0 x16, from memory"),
    "L4 JPEG engines": Assumption(4, "engines", "medium", f"{_SHEET}: 4 JPEG decoders"),
    # Only to check the model with.
    "V100 tensor": Assumption(125, "TFLOP/s", "high", f"{_SHEET}, SXM2, float16"),
    "V100 memory": Assumption(900, "GB/s", "high", f"{_SHEET}, SXM2"),
    "RTX PRO 6000 tensor": Assumption(504, "TFLOP/s", "medium", "NVIDIA's Blackwell white paper, dense, from memory"),
    "RTX PRO 6000 memory": Assumption(1792, "GB/s", "high", _SHEET),
    # What programs reach of those.
    "copy reached": Assumption(0.9, "share", "high", "copy on one H100: 3.0 TB/s of 3.35"),
    "memory reached": Assumption(0.8, "share", "medium", "less than a copy: norms are sums over all pixels too"),
    "product reached": Assumption(0.81, "share", "high", "8192 x 8192 x 8192 in bfloat16 on one H100: 798 of 989"),
    "float32 reached": Assumption(0.75, "share", "medium", "float32 products at 50 TFLOP/s on one H100"),
    "convolution reached": Assumption(
        0.573, "share", "low", f"fitted, so that one V100 trains on 1,178 images/s: {_EXAMPLES}, 1,156 and 1,200"
    ),
    "assignment reached": Assumption(
        0.5, "share of the product", "low", "half of cuBLAS: the search's epilogue costs a quarter, its tiles the rest"
    ),
    # Passes over a map in memory for every element, reads and writes together.
    "norm forward": Assumption(3, "passes", "high", "statistics read it; normalising reads and writes"),
    "norm backward": Assumption(5, "passes", "high", "sums read both maps; the gradient reads both and writes"),
    "ReLU forward": Assumption(2, "passes", "high", "in place; none once fused into normalising"),
    "ReLU backward": Assumption(3, "passes", "high", "reads map and gradient, writes; none once fused"),
    "addition forward": Assumption(3, "passes", "high", "reads two, writes one; one read once fused"),
    "addition backward": Assumption(3, "passes", "high", "two gradients become one; one read once fused"),
    "norm, frozen": Assumption(2, "passes", "medium", "one in, one out; compiled with ReLU and addition in the same"),
    # Parameters: bytes read and written of each in a step.
    "SGD, one by one": Assumption(44, "bytes a parameter", "high", "decay 12, momentum 8 + 12, step 12, in float32"),
    "SGD, fused": Assumption(20, "bytes a parameter", "high", "reads three, writes two, in float32"),
    "half copies": Assumption(12, "bytes a parameter", "high", "autocast: weights to bfloat16, gradients back"),
    "head's norms": Assumption(28, "bytes a weight", "medium", "norms read it; their gradient reads it and adds"),
    "targets": Assumption(100, "µs a step", "low", "a dozen small kernels, 100,000 words gathered"),
    # The input pipeline.
    "JPEG": Assumption(110, "kB", "high", "mean of ImageNet's training images"),
    "engine": Assumption(1000, "images/s", "medium", "A100 through DALI, all hardware: 5,000 on five, DALI issue 5362"),
    "thread": Assumption(271, "images/s", "medium", f"{_DALI}, less what the engines do"),
    "cores": Assumption(16, "threads a GPU", "high", "the machine of design.md, section 3"),
    "DALI's kernels": Assumption(5, "MB an image", "low", "resize, jitter, paste, normalise: counted in the graph"),
    "feeding": Assumption(2.6, "ms a batch", "medium", "plan 0.3 and external_source without copies 2.3, on one core"),
    # The host: DeepLearningExamples' forward pass of one image takes 10.4 ms on a V100's host of 2017, 171 operations.
    "launching, one by one": Assumption(60, "µs an operation", "low", "30 forward on newer cores, as much backward"),
    "launching, compiled": Assumption(30, "µs an operation", "low", "half as many kernels, and no Python between them"),
    # Many GPUs.
    "GPUs a node": Assumption(8, "GPUs", "high", "DGX and HGX machines"),
    "network reached": Assumption(0.85, "share", "medium", "nccl-tests between nodes reach 80 to 90 % of the ports"),
    "hop": Assumption(5, "µs", "low", "a step of a ring"),
    "bucket": Assumption(26.2, "MB", "high", "DistributedDataParallel: bucket_cap_mb 25"),
    "slowed by reducing": Assumption(0.15, "share", "low", "NCCL's blocks take some of the multiprocessors"),
}
