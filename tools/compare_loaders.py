"""bowstore's train view against other loaders: the same images, the same augmentation, the same number of cores.

    python tools/compare_loaders.py --shards data/shards/train --json

Five loaders make normalised batches of the full train view (random crop, flip, jitter, grey, CutMix):

    bowstore         the loader of `bowstore train`
    dali_reader      DALI's own WebDataset reader, random crop, resize, paste and normalisation; jitter by numba
    torchvision      torchvision's DataLoader on image files, PIL transforms
    torchvision_v2   the same with decode_jpeg and v2 transforms on tensors
    webdataset       the webdataset package's loader, PIL transforms

All run in one process tree, one after the other in interleaved rounds, each with as many threads or workers as
there are cores; a loader's batches that were made ahead are drained before its clock starts. The ratio of a round
is bowstore's rate over the other's in the same round; medians count.
"""

import io
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from nvidia.dali import Pipeline, fn, types
from PIL import Image
from torch.utils.data import DataLoader, Dataset, RandomSampler, default_collate
from torchvision import transforms as pil
from torchvision.io import ImageReadMode, decode_image, read_file
from torchvision.transforms import v2

from bowstore.config import ViewConfig
from bowstore.data.colour import colour_matrices
from bowstore.data.cutmix import paste, paste_inputs
from bowstore.data.index import Index, open_index
from bowstore.data.pipeline import train_batches
from bowstore.data.plan import Schedule, plans
from bowstore.data.reader import ShardReader
from bowstore.environment import cores, library_versions
from bowstore.errors import BowstoreError, UsageError
from bowstore.progress import Progress

Loader = Iterator[Any]
_AHEAD = 2  # batches that every loader may make ahead, per worker


def bowstore_loader(index: Index, view: ViewConfig, batch: int, workers: int, files: list[Path]) -> Loader:
    """What `bowstore train` uses."""
    schedule = Schedule(len(index), batch, seed=0)
    steps = plans(schedule, index, view, start=0, stop=sys.maxsize)
    return train_batches(ShardReader(index), view, steps, batch=batch, device=torch.device("cpu"), threads=workers)


def dali_reader_loader(index: Index, view: ViewConfig, batch: int, workers: int, files: list[Path]) -> Loader:
    """DALI reads the tars, draws the crop and does the rest; flip, jitter and CutMix by a plan, as in bowstore."""
    schedule = Schedule(len(index), batch, seed=0)
    steps = plans(schedule, index, view, start=0, stop=sys.maxsize)

    def numbers() -> list[np.ndarray]:
        plan = next(steps)
        return [plan.mirror, colour_matrices(plan), *paste_inputs(plan, view.size).values()]

    pipe = Pipeline(batch_size=batch, num_threads=workers, device_id=None, prefetch_queue_depth=_AHEAD, seed=0)
    tars = [str(index.root / entry.name) for entry in index.shards]
    with pipe:
        encoded = fn.readers.webdataset(
            paths=tars,
            ext=["jpg;jpeg;png;webp"],
            missing_component_behavior="error",
            random_shuffle=True,
            initial_fill=4096,
        )
        mirror, matrices, in_ids, anchors, shapes = fn.external_source(source=numbers, num_outputs=5, batch=True)
        images = fn.decoders.image_random_crop(
            encoded, random_area=view.area, random_aspect_ratio=view.ratio, output_type=types.RGB
        )
        images = fn.flip(fn.resize(images, size=[view.size, view.size], antialias=True), horizontal=mirror)
        images = paste(jitter(images, matrices), {"in_ids": in_ids, "anchors": anchors, "shapes": shapes}, view.size)
        scale = {"mean": [255 * value for value in view.mean], "std": [255 * value for value in view.std]}
        images = fn.crop_mirror_normalize(images, crop=(view.size, view.size), output_layout="HWC", **scale)
        pipe.set_outputs(images)
    while True:
        (output,) = pipe.run()
        yield torch.utils.dlpack.from_dlpack(output.as_tensor()).permute(0, 3, 1, 2)


def jitter(images: Any, matrices: Any) -> Any:
    """Colour jitter in a CPU graph: a third of its time if done by `color_twist`, a few percent by one matrix an image.

    Images HWC uint8 and their matrices (3, 4) to images HWC uint8.
    """
    return fn.reshape(_operator()(images, matrices), layout="HWC")


@cache
def _operator() -> Any:
    """The operator, one for all graphs of a process: each one made anew would be compiled anew, for a second."""
    from numba import njit
    from nvidia.dali.plugin.numba import NumbaFunction

    compiled = njit(fastmath=True)(apply_matrix)

    def run(out: Any, image: Any, matrix: Any) -> None:
        compiled(out, image, matrix)

    return NumbaFunction(
        run_fn=run,
        setup_fn=_set_up,
        in_types=[types.UINT8, types.FLOAT],
        out_types=[types.UINT8],
        ins_ndim=[3, 2],
        outs_ndim=[3],
    )


def _set_up(outs: Any, ins: Any) -> None:  # compiled by DALI's plugin: the output has the input's shape
    for sample in range(len(outs[0])):
        for axis in range(3):
            outs[0][sample][axis] = ins[0][sample][axis]


def apply_matrix(out: Any, image: Any, matrix: Any) -> None:
    """Write M rgb + o, rounded and clipped, of every pixel: `image` and `out` uint8 (H, W, 3), `matrix` float32 (3, 4).

    One flat loop over contiguous bytes, with every coefficient in a register, is what the compiler vectorises.
    """
    source, target = image.reshape(image.size), out.reshape(out.size)
    half, low, high = np.float32(0.5), np.float32(0), np.float32(255)
    rr, rg, rb, ro = matrix[0, 0], matrix[0, 1], matrix[0, 2], matrix[0, 3] + half
    gr, gg, gb, go = matrix[1, 0], matrix[1, 1], matrix[1, 2], matrix[1, 3] + half
    br, bg, bb, bo = matrix[2, 0], matrix[2, 1], matrix[2, 2], matrix[2, 3] + half
    for pixel in range(image.size // 3):
        place = 3 * pixel
        red, green, blue = np.float32(source[place]), np.float32(source[place + 1]), np.float32(source[place + 2])
        target[place] = np.uint8(np.int32(min(max(rr * red + rg * green + rb * blue + ro, low), high)))
        target[place + 1] = np.uint8(np.int32(min(max(gr * red + gg * green + gb * blue + go, low), high)))
        target[place + 2] = np.uint8(np.int32(min(max(br * red + bg * green + bb * blue + bo, low), high)))


class Files(Dataset[tuple[torch.Tensor, int]]):
    """Image files through a transform."""

    def __init__(
        self, files: list[Path], read: Callable[[Path], Any], transform: Callable[[Any], torch.Tensor]
    ) -> None:
        self.files, self.read, self.transform = files, read, transform

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, item: int) -> tuple[torch.Tensor, int]:
        return self.transform(self.read(self.files[item])), 0


class Mixed:
    """Collate, then CutMix with one box for the whole batch (torchvision's own)."""

    def __init__(self) -> None:
        self.mix = v2.CutMix(num_classes=2)

    def __call__(self, samples: list[tuple[torch.Tensor, int]]) -> torch.Tensor:
        """One batch (B, C, H, W)."""
        images, labels = default_collate(samples)
        mixed: torch.Tensor = self.mix(images, labels)[0]
        return mixed


def read_pil(path: Path) -> Any:
    """RGB image, decoded by Pillow."""
    with Image.open(path) as image:
        return image.convert("RGB")


def read_tensor(path: Path) -> torch.Tensor:
    """RGB uint8 tensor, decoded by torchvision."""
    return decode_image(read_file(str(path)), mode=ImageReadMode.RGB)


def pil_transform(view: ViewConfig) -> Any:
    """The train view in torchvision's PIL transforms."""
    return pil.Compose(
        [
            pil.RandomResizedCrop(view.size, scale=view.area, ratio=view.ratio),
            pil.RandomHorizontalFlip(),
            pil.ColorJitter(view.brightness, view.contrast, view.saturation, view.hue),
            pil.RandomGrayscale(view.grey),
            pil.ToTensor(),
            pil.Normalize(view.mean, view.std),
        ]
    )


def tensor_transform(view: ViewConfig) -> Any:
    """The train view in torchvision's v2 transforms."""
    return v2.Compose(
        [
            v2.RandomResizedCrop(view.size, scale=view.area, ratio=view.ratio, antialias=True),
            v2.RandomHorizontalFlip(),
            v2.ColorJitter(view.brightness, view.contrast, view.saturation, view.hue),
            v2.RandomGrayscale(view.grey),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(view.mean, view.std),
        ]
    )


def _data_loader(data: Files, batch: int, workers: int) -> Loader:
    sampler = RandomSampler(data, replacement=True, num_samples=10**12)
    return iter(
        DataLoader(
            data,
            batch,
            sampler=sampler,
            num_workers=workers,
            collate_fn=Mixed(),
            prefetch_factor=_AHEAD,
            drop_last=True,
        )
    )


def torchvision_loader(index: Index, view: ViewConfig, batch: int, workers: int, files: list[Path]) -> Loader:
    """DataLoader over image files, decoded and transformed by Pillow."""
    return _data_loader(Files(files, read_pil, pil_transform(view)), batch, workers)


def torchvision_v2_loader(index: Index, view: ViewConfig, batch: int, workers: int, files: list[Path]) -> Loader:
    """DataLoader over image files, decoded and transformed as tensors."""
    return _data_loader(Files(files, read_tensor, tensor_transform(view)), batch, workers)


def webdataset_loader(index: Index, view: ViewConfig, batch: int, workers: int, files: list[Path]) -> Loader:
    """The webdataset package: shards resampled, shuffled in a buffer, decoded by Pillow."""
    import webdataset as wds

    tars = [str(index.root / entry.name) for entry in index.shards]
    data = (
        wds.WebDataset(tars, resampled=True, shardshuffle=False, nodesplitter=None)
        .shuffle(1000)
        .decode("pilrgb", handler=wds.reraise_exception)
        .to_tuple("jpg;jpeg;png;webp")
        .map_tuple(pil_transform(view))
        .map(_labelled)
        .batched(batch, collation_fn=Mixed(), partial=False)
    )
    return iter(wds.WebLoader(data, batch_size=None, num_workers=workers, prefetch_factor=_AHEAD))


def _labelled(sample: tuple[torch.Tensor]) -> tuple[torch.Tensor, int]:
    return sample[0], 0


LOADERS: dict[str, Callable[..., Loader]] = {
    "bowstore": bowstore_loader,
    "dali_reader": dali_reader_loader,
    "torchvision": torchvision_loader,
    "torchvision_v2": torchvision_v2_loader,
    "webdataset": webdataset_loader,
}


def rate(loader: Loader, batches: int, drain: int, batch: int) -> float:
    """Images/s over `batches` batches, after `drain` that may have been made ahead.

    Ends once the loader has had time to make its batches ahead again, so that it takes no core from the next one.
    """
    for _ in range(drain):
        next(loader)
    begun = time.perf_counter()
    for _ in range(batches):
        next(loader)
    seconds = time.perf_counter() - begun
    time.sleep(1.25 * seconds * drain / batches)
    return batches * batch / seconds


def compare(
    shards: Path, view: ViewConfig, names: list[str], *, batch: int, workers: int, batches: int, rounds: int
) -> dict[str, Any]:
    """Interleaved rounds of all loaders; rates, and bowstore's ratio over each."""
    index = open_index(shards)
    if len(index) < batch:
        raise UsageError(f"{shards} holds {len(index)} images, fewer than one batch of {batch}; lower --batch")
    with tempfile.TemporaryDirectory() as folder:
        files = _unpack(index, Path(folder))
        loaders = {name: LOADERS[name](index, view, batch, workers, files) for name in names}
        drain = (_AHEAD + 1) * workers + 1
        rates: dict[str, list[float]] = {name: [] for name in names}
        with Progress("compare loaders", (rounds + 1) * len(names), "timings") as progress:
            for number in range(rounds + 1):
                for name, loader in loaders.items():
                    measured = rate(loader, batches if number else 2, drain, batch)
                    if number:  # the first round warms workers, allocators and the page cache
                        rates[name].append(measured)
                    progress.advance(note=f"{name} {measured:.0f} images/s")
    return _result(rates, index, view, batch=batch, workers=workers, batches=batches)


def _unpack(index: Index, folder: Path) -> list[Path]:
    """The images as files, for the loaders that read files."""
    reader, paths = ShardReader(index), []
    for row in range(len(index)):
        (data,) = reader.read(np.array([row]))
        path = folder / f"{row:07d}.{Image.open(io.BytesIO(data.tobytes())).format.lower()}"
        path.write_bytes(data.tobytes())
        paths.append(path)
    return paths


def _result(rates: dict[str, list[float]], index: Index, view: ViewConfig, **settings: int) -> dict[str, Any]:
    ours = rates.get("bowstore", [])
    result: dict[str, Any] = {
        "protocol": "bench/compare_loaders",
        "protocol_version": 1,
        "device": f"cpu, {cores()} cores",
        "versions": library_versions(),
        "inputs": {"shards": index.fingerprint},
        "images": len(index),
        "mean_image_bytes": float(index.size.mean()),
        "view": view.model_dump(),
        **settings,
        "images_per_second": rates,
    }
    for name, theirs in rates.items():
        if name != "bowstore" and ours:
            ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
            result[f"ratio_over_{name}"] = statistics.median(ratios)
            result[f"ratios_over_{name}"] = ratios
    return result


def table(result: dict[str, Any]) -> str:
    """Lines for people."""
    lines = [f"{'images/s, batch ' + str(result['batch']):24}{'median':>9}{'min':>9}{'max':>9}{'bowstore over it':>26}"]
    for name, values in result["images_per_second"].items():
        ratios = result.get(f"ratios_over_{name}")
        ratio = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})" if ratios else ""
        lines.append(f"{name:24}{statistics.median(values):9.0f}{min(values):9.0f}{max(values):9.0f}{ratio:>26}")
    return "\n".join(lines)


@click.command()
@click.option("--shards", type=click.Path(path_type=Path), required=True, help="Folder of indexed shards.")
@click.option("--size", type=click.IntRange(8), default=224, show_default=True, help="Side of the view, pixels.")
@click.option("--batch", type=click.IntRange(4), default=64, show_default=True)
@click.option("--workers", type=click.IntRange(1), help="Threads or processes of each loader.  [default: one a core]")
@click.option("--batches", type=click.IntRange(1), default=16, show_default=True, help="Timed batches a round.")
@click.option("--rounds", type=click.IntRange(1), default=7, show_default=True)
@click.option("--loader", "chosen", type=click.Choice(list(LOADERS)), multiple=True, help="Only these.  [default: all]")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON alone.")
def main(
    shards: Path,
    size: int,
    batch: int,
    workers: int | None,
    batches: int,
    rounds: int,
    chosen: tuple[str, ...],
    as_json: bool,
) -> None:
    """Full train view on the same images: bowstore and four other loaders."""
    view = ViewConfig(size=size, resize=max(size, 256))
    names = list(dict.fromkeys(("bowstore", *chosen))) if chosen else list(LOADERS)
    try:
        result = compare(shards, view, names, batch=batch, workers=workers or cores(), batches=batches, rounds=rounds)
    except BowstoreError as error:
        click.echo(f"Error: {error}", err=True)
        sys.exit(error.exit_code)
    click.echo(json.dumps(result, indent=2) if as_json else table(result))


if __name__ == "__main__":
    main()
