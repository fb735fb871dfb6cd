"""Feature vectors and vocabularies to assign, by kind: from plain random to hostile; and real ones."""

import io
import tarfile
from itertools import islice

import torch
from PIL import Image
from shard_sets import real_data
from torch import Tensor
from torchvision.models import resnet18
from torchvision.transforms.v2 import functional as tvf

KINDS = (
    "normal",
    "relu",
    "whole numbers",
    "duplicates",
    "near duplicates",
    "outliers",
    "large",
    "small",
    "zeros",
    "far",
)


def make_vectors(kind: str, n: int, d: int, k: int, seed: int) -> tuple[Tensor, Tensor]:
    """Features (n, d) and words (k, d), float32.

    Whole numbers make exact ties, near duplicates differ in the last bit, outliers are words a thousand times larger
    than the rest, far features lie beyond what half precision can hold beside the words.
    """
    generator = torch.Generator().manual_seed(seed)
    features, words = torch.randn(n, d, generator=generator), torch.randn(k, d, generator=generator)
    pick_N, half = torch.randint(k, (n,), generator=generator), k // 2
    match kind:
        case "relu":
            features, words = features.relu() + 0.5, words.relu() + 0.5
        case "whole numbers":
            features, words = (features * 2).round(), (words * 2).round()
        case "duplicates":
            words[half : 2 * half] = words[:half]
            features = words[pick_N] + 0.1 * features
        case "near duplicates":
            words[half : 2 * half] = torch.nextafter(words[:half], torch.tensor(torch.inf))
            features = words[pick_N] + 0.1 * features
        case "outliers":
            words[::7] *= 1000
            features = words[pick_N] + features
        case "large":
            features, words = 1e15 * features, 1e15 * words
        case "small":
            features, words = 1e-15 * features, 1e-15 * words
        case "zeros":
            features, words = torch.zeros(n, d), torch.zeros(k, d)
        case "far":
            features = 1e9 * features
    return features, words


def real_vectors(images: int, k: int) -> tuple[Tensor, Tensor]:
    """Vectors (N, 256) of photographs at conv4 of a ResNet-18, and k others of them as words."""
    pictures = []
    with tarfile.open(real_data("imagenet-sample-250.tar")) as tar:
        for member in islice((m for m in tar if m.name.endswith(".JPEG")), images):
            file = tar.extractfile(member)
            assert file is not None
            image = Image.open(io.BytesIO(file.read())).convert("RGB").resize((128, 128))
            pictures.append(tvf.normalize(tvf.to_dtype(tvf.pil_to_tensor(image), scale=True), [0.45] * 3, [0.225] * 3))
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        network = resnet18()  # in training mode: without the statistics of data its features would hardly differ
        maps_Bchw = torch.stack(pictures)
        for name, child in network.named_children():
            maps_Bchw = child(maps_Bchw)
            if name == "layer3":
                break
        vectors = maps_Bchw.permute(0, 2, 3, 1).reshape(-1, maps_Bchw.shape[1])
        vectors = vectors[torch.randperm(len(vectors))]
    return vectors[k:], vectors[:k].clone()
