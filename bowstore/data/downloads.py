"""Public data sets fetched with torchvision's own downloaders, which also compare checksums.

What is fetched lies in `DIR/.download-NAME` until whole; then it moves to DIR under its published name. A run that
was stopped goes on with the archives that are whole.
"""

import os
import shutil
import socket
import tarfile
import urllib.error
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from bowstore.errors import BowstoreError, UsageError
from bowstore.files import exclusive_lock

_STALL_SECONDS = 60.0


@dataclass(frozen=True)
class Download:
    """A data set that can be fetched.

    Attributes:
        name: what `bowstore data download` calls it.
        what: contents and size, in one line.
        results: files and folders that it leaves, relative to the target folder.
        shards: command that makes shards of them; DIR stands for the target folder.
        fetch: brings the results into a folder.
    """

    name: str
    what: str
    results: tuple[str, ...]
    shards: str
    fetch: Callable[[Path], None]


def _torchvision() -> Any:
    from torchvision import datasets  # two seconds, for those alone that download

    return datasets


def _fetch_cifar(folder: Path, name: str) -> None:
    datasets = _torchvision()
    found = getattr(datasets, name)
    # The archive alone: torchvision's class would extract and unpickle it.
    datasets.utils.download_url(found.url, folder, found.filename, found.tgz_md5)


def _fetch_voc(folder: Path, year: str, parts: tuple[str, ...]) -> None:
    for part in parts:
        _torchvision().VOCDetection(folder, year=year, image_set=part, download=True)


def _fetch_imagenette(folder: Path) -> None:
    _torchvision().Imagenette(folder, split="train", size="full", download=True)


def _fetch_places365(folder: Path) -> None:
    for split in ("train-standard", "val"):
        _torchvision().Places365(folder, split=split, small=True, download=True)


DOWNLOADS: dict[str, Download] = {
    download.name: download
    for download in (
        Download(
            name="cifar10",
            what="CIFAR-10, 60,000 images of 32 px, 0.2 GB",
            results=("cifar-10-python.tar.gz",),
            shards="bowstore shards DIR/cifar-10-python.tar.gz data/shards",
            fetch=partial(_fetch_cifar, name="CIFAR10"),
        ),
        Download(
            name="cifar100",
            what="CIFAR-100, 60,000 images of 32 px, 0.2 GB",
            results=("cifar-100-python.tar.gz",),
            shards="bowstore shards DIR/cifar-100-python.tar.gz data/shards",
            fetch=partial(_fetch_cifar, name="CIFAR100"),
        ),
        Download(
            name="voc2007",
            what="Pascal VOC 2007, trainval and test, 9,963 images, 0.9 GB",
            results=("VOCdevkit/VOC2007",),
            shards="bowstore shards DIR/VOCdevkit/VOC2007 data/shards",
            fetch=partial(_fetch_voc, year="2007", parts=("trainval", "test")),
        ),
        Download(
            name="voc2012",
            what="Pascal VOC 2012, trainval, 17,125 images and their masks, 2 GB",
            results=("VOCdevkit/VOC2012",),
            shards="bowstore shards DIR/VOCdevkit/VOC2012 data/shards",
            fetch=partial(_fetch_voc, year="2012", parts=("trainval",)),
        ),
        Download(
            name="imagenette",
            what="Imagenette, 10 classes of ImageNet, 13,394 photographs, 1.6 GB",
            results=("imagenette2",),
            shards="bowstore shards DIR/imagenette2 data/shards",
            fetch=_fetch_imagenette,
        ),
        Download(
            name="places365",
            what="Places365-Standard at 256 px, 1.8 million images, 26 GB",
            results=("data_256_standard", "val_256", "places365_train_standard.txt", "places365_val.txt"),
            shards="bowstore shards DIR data/shards",
            fetch=_fetch_places365,
        ),
    )
}

BY_HAND: dict[str, str] = {
    "imagenet": "ImageNet has no public download: register at image-net.org, and fetch ILSVRC2012_img_train.tar, "
    "ILSVRC2012_img_val.tar and ILSVRC2012_devkit_t12.tar.gz into one folder; they need not be extracted",
    "miniimagenet": "MiniImageNet is made of ImageNet by the split of Ravi and Larochelle (2017): images/ with "
    "train.csv, val.csv and test.csv",
    "places205": "Places205 is given out by its authors at places.csail.mit.edu: extract imagesPlaces205_resize.tar.gz "
    "and trainvalsplit_places205.tar.gz into one folder",
}


def fetch(name: str, folder: Path) -> list[Path]:
    """Download a data set, unless it lies there already.

    Args:
        name: in `DOWNLOADS`.
        folder: where it goes; made if it is not there.

    Returns:
        The files and folders that hold it.

    Raises:
        UsageError: a name that cannot be downloaded; says how to come by the data set where that is known.
        BusyError: another process downloads it to the same place.
        BowstoreError: the network, the server or the disk failed, or a checksum is wrong.
    """
    if name not in DOWNLOADS:
        if name in BY_HAND:
            raise UsageError(f"{BY_HAND[name]}; then run `bowstore shards`")
        raise UsageError(f"no download {name!r}; there are {', '.join(DOWNLOADS)}")
    download = DOWNLOADS[name]
    results = [folder / result for result in download.results]
    with _one_line_errors(name, folder), exclusive_lock(folder / f".download-{name}.lock", str(folder)):
        if not all(path.exists() for path in results):
            _fetch(download, folder)
    return results


def _fetch(download: Download, folder: Path) -> None:
    staging = folder / f".download-{download.name}"
    if staging.is_symlink():
        raise BowstoreError(f"{staging} is a link, and bowstore downloads there and clears it; move it away")
    staging.mkdir(parents=True, exist_ok=True)
    for path in staging.iterdir():
        # torchvision takes a folder that was extracted half for a whole one
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
    download.fetch(staging)
    for result in download.results:
        if not (folder / result).exists():
            (folder / result).parent.mkdir(exist_ok=True)
            os.rename(staging / result, folder / result)
    shutil.rmtree(staging)


@contextmanager
def _one_line_errors(name: str, folder: Path) -> Iterator[None]:
    """Turn what torchvision, the network and the disk raise into one line; a server that is silent ends, too."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(_STALL_SECONDS)
    try:
        yield
    except BowstoreError:
        raise
    except (OSError, RuntimeError, EOFError, ValueError, zlib.error, tarfile.TarError) as error:
        if isinstance(error, urllib.error.HTTPError):
            error.close()  # it holds the connection
        reason = " ".join(str(error).split()) or type(error).__name__
        raise BowstoreError(
            f"cannot download {name} to {folder}: {reason.rstrip('.')}; see to the network and the disk, and run the "
            "same command again"
        ) from error
    finally:
        socket.setdefaulttimeout(before)
