"""ImageNet in small: the same images in each of the layouts that people have it in."""

import io
import tarfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from scipy.io import savemat
from source_sets import tiny_image, write_file, write_members

DEVKIT = "ILSVRC2012_devkit_t12"
# Ids are in another order than WNIDs, as in the real devkit; n00001740 and n04000000 have children.
IDS = {"n01440764": 3, "n01443537": 1, "n02084071": 4, "n03000134": 2}
NAMES = {
    "n01440764": "tench, Tinca tinca",
    "n01443537": "goldfish, Carassius auratus",
    "n02084071": "dog, domestic dog, Canis familiaris",
    "n03000134": "chainlink fence",
}
TRUTH = (4, 1, 1, 2, 3)  # ids of val's images
WNID_OF = {number: wnid for wnid, number in IDS.items()}


def meta_mat(ids: Mapping[str, int] = IDS) -> bytes:
    """meta.mat with the fields of the real one; its classes are the synsets without children."""
    fields = "ILSVRC2012_ID WNID words gloss num_children children wordnet_height num_train_images".split()
    rows = [(number, wnid, NAMES.get(wnid, wnid), "gloss", 0, [], 0, 1300) for wnid, number in ids.items()]
    rows += [
        (len(ids) + place, wnid, "above", "gloss", 2, [1, 2], 3, 0)
        for place, wnid in enumerate(("n04000000", "n00001740"), start=1)
    ]
    synsets = np.empty((len(rows), 1), [(name, object) for name in fields])
    for place, row in enumerate(rows):
        synsets[place, 0] = tuple(np.array(v, np.uint8) if isinstance(v, list) else v for v in row)
    file = io.BytesIO()
    savemat(file, {"synsets": synsets}, do_compression=True)
    return file.getvalue()


@dataclass
class ImageNet:
    """Images to be laid out: train by WNID and file name, val in the order of the ground truth, test."""

    train: dict[str, dict[str, bytes]] = field(default_factory=dict)
    val: list[bytes] = field(default_factory=list)
    test: list[bytes] = field(default_factory=list)
    truth: tuple[int, ...] = TRUTH
    ids: dict[str, int] = field(default_factory=lambda: dict(IDS))

    @property
    def val_wnids(self) -> list[str]:
        wnid_of = {number: wnid for wnid, number in self.ids.items()}
        return [wnid_of[number] for number in self.truth]


def small_imagenet() -> ImageNet:
    """Four classes, eleven images in train, five in val, two in test."""
    train: dict[str, dict[str, bytes]] = {}
    for place, wnid in enumerate(IDS):
        train[wnid] = {f"{wnid}_{number}.JPEG": tiny_image(10 * place + number) for number in range(3)}
    del train["n03000134"]["n03000134_1.JPEG"]
    return ImageNet(train, [tiny_image(50 + n) for n in range(len(TRUTH))], [tiny_image(60), tiny_image(61)])


def val_name(place: int, split: str = "val") -> str:
    return f"ILSVRC2012_{split}_{place + 1:08d}.JPEG"


def tar_bytes(members: Mapping[str, bytes]) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.GNU_FORMAT) as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return file.getvalue()


def write_archives(root: Path, images: ImageNet, parts: str = "train val devkit") -> Path:
    """As image-net.org gives it out; the class tars stand in no order."""
    if "train" in parts:
        tars = [(f"{wnid}.tar", tar_bytes(found)) for wnid, found in reversed(images.train.items())]
        write_members(root / "ILSVRC2012_img_train.tar", tars)
    if "val" in parts:
        write_members(root / "ILSVRC2012_img_val.tar", [(val_name(n), data) for n, data in enumerate(images.val)])
    if "test" in parts:
        members = [(val_name(n, "test"), data) for n, data in enumerate(images.test)]
        write_members(root / "ILSVRC2012_img_test_v10102019.tar", members)
    if "devkit" in parts:
        write_devkit_archive(root / f"{DEVKIT}.tar.gz", images)
    return root


def write_devkit_archive(path: Path, images: ImageNet, **files: bytes) -> Path:
    """The devkit's archive, or other bytes under the names `meta_mat` and `truth`."""
    truth = "".join(f"{number}\n" for number in images.truth).encode()
    contents = {
        f"{DEVKIT}/readme.txt": b"read me",
        f"{DEVKIT}/data/._meta.mat": b"mac",
        f"{DEVKIT}/data/meta.mat": files.get("meta_mat", meta_mat(images.ids)),
        f"{DEVKIT}/data/ILSVRC2012_validation_ground_truth.txt": files.get("truth", truth),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:gz") as archive:
        for name, data in contents.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def write_folders(root: Path, images: ImageNet) -> Path:
    """train/ and val/ by class."""
    for wnid, found in images.train.items():
        for name, data in found.items():
            write_file(root / "train" / wnid / name, data)
    for place, (wnid, data) in enumerate(zip(images.val_wnids, images.val, strict=True)):
        write_file(root / "val" / wnid / val_name(place), data)
    return root


def write_kaggle(root: Path, images: ImageNet) -> Path:
    """As Kaggle's archive extracts."""
    below = root / "ILSVRC/Data/CLS-LOC"
    write_folders(below, ImageNet(images.train, truth=()))
    for split, found in (("val", images.val), ("test", images.test)):
        for place, data in enumerate(found):
            write_file(below / split / val_name(place, split), data)
    for name in ("ILSVRC/Annotations/CLS-LOC/val/1.xml", "ILSVRC/ImageSets/CLS-LOC/val.txt", "LOC_train_solution.csv"):
        write_file(root / name, "x")
    lines = [
        f"{val_name(place)[:-5]},{wnid} 85 1 499 272 {wnid} 1 2 3 4 \n" for place, wnid in enumerate(images.val_wnids)
    ]
    write_file(root / "LOC_val_solution.csv", "ImageId,PredictionString\n" + "".join(reversed(lines)))
    write_file(root / "LOC_synset_mapping.txt", "".join(f"{wnid} {NAMES.get(wnid, wnid)}\n" for wnid in images.ids))
    return root


def write_tiny(root: Path, images: ImageNet) -> Path:
    """As tiny-imagenet-200.zip extracts."""
    for wnid, found in images.train.items():
        for name, data in found.items():
            write_file(root / "train" / wnid / "images" / name, data)
        write_file(root / "train" / wnid / f"{wnid}_boxes.txt", "".join(f"{name}\t0\t0\t62\t62\n" for name in found))
    lines = ""
    for place, (wnid, data) in enumerate(zip(images.val_wnids, images.val, strict=True)):
        write_file(root / f"val/images/val_{place}.JPEG", data)
        lines += f"val_{place}.JPEG\t{wnid}\t0\t32\t44\t62\n"
    write_file(root / "val/val_annotations.txt", lines)
    for place, data in enumerate(images.test):
        write_file(root / f"test/images/test_{place}.JPEG", data)
    write_file(root / "wnids.txt", "".join(f"{wnid}\n" for wnid in reversed(images.ids)))
    write_file(root / "words.txt", "".join(f"{wnid}\t{name}\n" for wnid, name in {"n00001740": "x", **NAMES}.items()))
    return root
