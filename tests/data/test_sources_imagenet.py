"""ImageNet as it is delivered: archives read in place, Kaggle's folders, class folders, Tiny-ImageNet."""

import gzip
import json
import os
import shutil
import tarfile
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
from imagenet_sets import (
    DEVKIT,
    IDS,
    NAMES,
    TRUTH,
    ImageNet,
    meta_mat,
    small_imagenet,
    tar_bytes,
    val_name,
    write_archives,
    write_devkit_archive,
    write_folders,
    write_kaggle,
    write_tiny,
)
from shard_sets import real_data
from source_sets import classes_of, list_splits, shards_of, tiny_image, write_file, write_members

from bowstore.data.config import ShardsConfig
from bowstore.data.shards import make_shards
from bowstore.data.sources import NO_LABEL, find_source, list_source
from bowstore.errors import BowstoreError, CorruptError, DataError, MissingError, UsageError

WNIDS = sorted(IDS)
LABELS = {wnid: label for label, wnid in enumerate(WNIDS)}


@pytest.fixture
def images() -> ImageNet:
    return small_imagenet()


def _expected(images: ImageNet) -> dict[str, dict[str, tuple[bytes, int]]]:
    """Images and labels by key, of train and val."""
    train = {
        f"{wnid}/{name[:-5]}": (data, LABELS[wnid])
        for wnid, found in images.train.items()
        for name, data in found.items()
    }
    val = {
        f"{wnid}/{val_name(place)[:-5]}": (data, LABELS[wnid])
        for place, (wnid, data) in enumerate(zip(images.val_wnids, images.val, strict=True))
    }
    return {"train": train, "val": val}


def _tars(out: Path) -> dict[str, bytes]:
    return {str(path.relative_to(out)): path.read_bytes() for path in sorted(out.rglob("*.tar"))}


def test_every_layout_makes_the_same_shards(images: ImageNet, tmp_path: Path) -> None:
    """Same images, keys, labels and order: the shards are equal to the byte."""
    images.test = []
    layouts: dict[str, tuple[Callable[[Path, ImageNet], Path], str]] = {
        "archives": (write_archives, "imagenet"),
        "folders": (write_folders, "folder"),
        "kaggle": (write_kaggle, "kaggle"),
    }
    made = {}
    for name, (write, kind) in layouts.items():
        source = write(tmp_path / name, images)
        assert find_source(source).kind == kind
        assert shards_of(source, tmp_path / "out" / name, per_shard=4) == _expected(images)
        for split in ("train", "val"):
            assert classes_of(tmp_path / "out" / name / split) == tuple(WNIDS)
        made[name] = _tars(tmp_path / "out" / name)
    assert made["archives"] == made["folders"] == made["kaggle"]
    for name in ("archives", "kaggle"):
        manifest = json.loads((tmp_path / "out" / name / "val/manifest.json").read_text())
        assert (manifest["classes"], manifest["class_names"]) == (WNIDS, [NAMES[wnid] for wnid in WNIDS])
    assert "class_names" not in json.loads((tmp_path / "out/folders/train/manifest.json").read_text())


def test_what_is_extracted_already(images: ImageNet, tmp_path: Path) -> None:
    """Class tars for train, a flat folder for val, the devkit's folder; and mixtures with archives."""
    for wnid, found in images.train.items():
        write_file(tmp_path / "a/train" / f"{wnid}.tar", tar_bytes(found))
        write_file(tmp_path / "b" / f"{wnid}.tar", tar_bytes(found))
    for place, data in enumerate(images.val):
        write_file(tmp_path / "a/ILSVRC2012_img_val" / val_name(place), data)
    write_archives(tmp_path / "a", images, "devkit")
    with tarfile.open(tmp_path / f"a/{DEVKIT}.tar.gz") as archive:
        archive.extractall(tmp_path / "a", filter="data")
    (tmp_path / f"a/{DEVKIT}.tar.gz").unlink()
    write_archives(tmp_path / "b", images, "val devkit")
    write_folders(tmp_path / "c", ImageNet(images.train, truth=()))
    write_archives(tmp_path / "c", images, "val devkit")
    write_folders(tmp_path / "d", ImageNet(images.train, truth=()))
    for place, data in enumerate(images.val):
        write_file(tmp_path / "d/val" / val_name(place), data)
    shutil.copy(write_kaggle(tmp_path / "k", images) / "LOC_val_solution.csv", tmp_path / "d")
    for name in "abcd":
        assert find_source(tmp_path / name).kind == "imagenet"
        assert shards_of(tmp_path / name, tmp_path / "out" / name, per_shard=4) == _expected(images)
    assert (
        _tars(tmp_path / "out/a") == _tars(tmp_path / "out/b") == _tars(tmp_path / "out/c") == _tars(tmp_path / "out/d")
    )


@pytest.mark.parametrize("write", [write_archives, write_folders, write_kaggle, write_tiny])
def test_a_folder_around_it_and_links(
    images: ImageNet, tmp_path: Path, write: Callable[[Path, ImageNet], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    plain = write(tmp_path / "plain", images)
    kind = find_source(plain).kind
    (tmp_path / "linked/set").mkdir(parents=True)
    for path in plain.iterdir():
        (tmp_path / "linked/set" / path.name).symlink_to(path)
    (tmp_path / "far").mkdir()
    (tmp_path / "far/link").symlink_to(plain)
    expected = [(split.name, split.classes, [(i.key, i.label) for i in split.images]) for split in list_splits(plain)]
    for source in (tmp_path / "linked", tmp_path / "far"):
        for named in (None, kind):
            listed = list_source(source, named)
            assert (listed.source.path.parent, listed.source.kind) == (source, kind)
            found = [(split.name, split.classes, [(i.key, i.label) for i in split.images]) for split in listed.splits]
            assert found == expected
            assert listed.passed_over.counts == list_source(plain).passed_over.counts
        assert f"{source} holds all in one folder" in capsys.readouterr().err
    made = shards_of(tmp_path / "linked", tmp_path / "out")
    assert [len(samples) for samples in made.values()] == [len(images) for _, _, images in expected]


def test_test_has_no_labels(images: ImageNet, tmp_path: Path) -> None:
    write_archives(tmp_path / "a", images, "train val devkit test")
    write_kaggle(tmp_path / "k", images)
    write_tiny(tmp_path / "t", images)
    for name in "akt":
        *_, test = list_splits(tmp_path / name)
        assert (test.name, test.classes, {image.label for image in test.images}) == ("test", (), {NO_LABEL})
        assert len(test.images) == len(images.test)


def test_tiny_imagenet(images: ImageNet, tmp_path: Path) -> None:
    found = shards_of(write_tiny(tmp_path / "tiny", images), tmp_path / "out")
    expected = _expected(images)
    assert found["train"] == expected["train"]
    assert found["val"] == {
        f"{wnid}/val_{place}": (images.val[place], LABELS[wnid]) for place, wnid in enumerate(images.val_wnids)
    }
    manifest = json.loads((tmp_path / "out/train/manifest.json").read_text())
    assert (manifest["classes"], manifest["class_names"]) == (WNIDS, [NAMES[wnid] for wnid in WNIDS])
    listed = list_source(tmp_path / "tiny")
    assert listed.passed_over.summary() == "4 files of other kinds (.txt 4)"  # the boxes
    (tmp_path / "tiny/val/val_annotations.txt").unlink()
    with pytest.raises(MissingError, match=r"have no labels without val/val_annotations\.txt, which is not in .*tiny"):
        list_splits(tmp_path / "tiny")


def test_kaggle_without_its_tables(images: ImageNet, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_kaggle(tmp_path / "kaggle", images)
    assert list_source(source).passed_over.counts == {".xml": 1, ".txt": 1, ".csv": 1}
    (source / "LOC_synset_mapping.txt").unlink()
    assert [split.class_names for split in list_splits(source)] == [(), (), ()]
    (source / "LOC_val_solution.csv").unlink()
    with pytest.raises(
        MissingError,
        match=r"the images of .*CLS-LOC/val have no labels without LOC_val_solution\.csv, which is not in .*kaggle; "
        r"fetch it from Kaggle",
    ):
        list_splits(source)
    inside = source / "ILSVRC/Data/CLS-LOC"
    with pytest.raises(
        MissingError,
        match=rf"the images of .*CLS-LOC/val have no labels without {DEVKIT}\.tar\.gz, which is not in .*CLS-LOC; "
        r"fetch it from image-net\.org \(or LOC_val_solution\.csv from Kaggle\), or move val away",
    ):
        list_splits(inside)
    shutil.rmtree(inside / "val")
    capsys.readouterr()
    assert [split.name for split in list_splits(source)] == ["train", "test"]
    assert "CLS-LOC/val, so no split val" in capsys.readouterr().err


def test_parts_that_are_missing(images: ImageNet, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (train,) = list_splits(write_archives(tmp_path / "train", images, "train"))
    assert (train.classes, len(train.images)) == (tuple(WNIDS), 11)
    said = capsys.readouterr().err
    assert "note: there is no ILSVRC2012_img_val.tar in " in said
    assert f"note: there is no {DEVKIT}.tar.gz in " in said
    assert "has images of 4 classes, ILSVRC2012 has 1000" in said
    for parts in ("val", "train val"):
        with pytest.raises(
            MissingError,
            match=rf"the images of .*img_val\.tar have no labels without {DEVKIT}\.tar\.gz, which is not in .*; fetch "
            r"it from image-net\.org \(or LOC_val_solution\.csv from Kaggle\), or move ILSVRC2012_img_val\.tar away",
        ):
            list_splits(write_archives(tmp_path / parts, images, parts))
    (val,) = list_splits(write_archives(tmp_path / "half", images, "val devkit"))
    assert val.classes == tuple(WNIDS)
    assert "note: there is no ILSVRC2012_img_train.tar in " in capsys.readouterr().err
    with pytest.raises(UsageError, match=r"img_train\.tar is one of ImageNet's archives; name the folder that holds"):
        list_splits(tmp_path / "train/ILSVRC2012_img_train.tar")
    with pytest.raises(MissingError, match=r"has no ILSVRC2012_img_train\.tar and no ILSVRC2012_img_val\.tar; fetch"):
        list_splits(write_archives(tmp_path / "devkit", images, "devkit"), "imagenet")
    (tmp_path / "devkit/ILSVRC2012_img_train.tar").symlink_to(tmp_path / "nowhere")
    with pytest.raises(MissingError, match=r"img_train\.tar is not there; bring it there"):
        list_splits(tmp_path / "devkit")
    (tmp_path / "devkit/ILSVRC2012_img_train.tar").unlink()
    os.mkfifo(tmp_path / "devkit/ILSVRC2012_img_train.tar")
    with pytest.raises(DataError, match=r"img_train\.tar is a named pipe and not a file; move it away"):
        list_splits(tmp_path / "devkit")


def test_classes_that_are_missing_keep_their_numbers(images: ImageNet, tmp_path: Path) -> None:
    """A class tar that is not there, and one that holds nothing."""
    del images.train["n01443537"]
    images.train["n02084071"] = {}
    (train, val) = list_splits(write_archives(tmp_path / "with", images))
    assert train.classes == val.classes == tuple(WNIDS)
    assert {image.key[:9]: image.label for image in train.images} == {"n01440764": 0, "n03000134": 3}
    assert train.classes_without_images() == ["n01443537", "n02084071"]
    assert val.classes_without_images() == []
    (train,) = list_splits(write_archives(tmp_path / "without", images, "train"))
    assert (train.classes, train.classes_without_images()) == (("n01440764", "n03000134"), ["n02084071"])


def test_classes_that_the_devkit_does_not_have(images: ImageNet, tmp_path: Path) -> None:
    images.train["n09999999"] = {"n09999999_1.JPEG": tiny_image(1)}
    message = r"has 1 classes that .* does not have: n09999999; all splits must share"
    with pytest.raises(DataError, match=message):
        list_splits(write_archives(tmp_path / "a", images))
    for name, write in (("k", write_kaggle), ("t", write_tiny)):
        with pytest.raises(DataError, match=message):
            list_splits(write(tmp_path / name, images))


def test_ground_truth_of_another_length(images: ImageNet, tmp_path: Path) -> None:
    images.truth = TRUTH[:-1]
    with pytest.raises(
        DataError,
        match=r"img_val\.tar holds 5 images, ILSVRC2012_validation_ground_truth\.txt of .* labels 4: 1 have no label "
        r"there \(ILSVRC2012_val_00000005\.JPEG\); both must be of the same images, so fetch",
    ):
        list_splits(write_archives(tmp_path / "a", images))
    images.truth = (*TRUTH, 1, 2)
    with pytest.raises(
        DataError, match=r"2 labels have no image \(ILSVRC2012_val_00000006, ILSVRC2012_val_00000007\); both must"
    ):
        list_splits(write_archives(tmp_path / "b", images))


def test_archives_that_are_cut_or_damaged(images: ImageNet, tmp_path: Path) -> None:
    train = write_archives(tmp_path, images) / "ILSVRC2012_img_train.tar"
    whole = train.read_bytes()
    with tarfile.open(train) as archive:
        member = archive.getmember("n02084071.tar")
    for size in (0, 100, 512, 700, 5000, len(whole) // 2, member.offset, len(whole.rstrip(b"\0"))):
        os.truncate(train, size)
        with pytest.raises(CorruptError, match=r"img_train\.tar.* is (cut|empty|not a whole tar|no tar).*; fetch"):
            list_splits(tmp_path)
        train.write_bytes(whole)
    second = whole.index(b"n02084071_1.JPEG")  # its header
    for start, fill in (
        (member.offset_data, 255),
        (second, 255),
        (second, 0),
        (second + 130, 57),
        (member.offset_data + member.size - 600, 1),
    ):
        damaged = bytearray(whole)
        damaged[start : start + (512 if fill in (0, 255) else 8)] = bytes([fill]) * (512 if fill in (0, 255) else 8)
        train.write_bytes(damaged)
        with pytest.raises(
            CorruptError,
            match=r"img_train\.tar: n02084071\.tar (is|has a zeroed block).*; fetch",
        ):
            list_splits(tmp_path)
    broken = images.train | {"n02084071": {}}
    tars = [(f"{wnid}.tar", tar_bytes(found)) for wnid, found in broken.items()]
    for cut in (0, 512, 1000):
        write_members(train, [(name, data[:cut] if name == "n02084071.tar" else data) for name, data in tars])
        with pytest.raises(CorruptError, match=rf"n02084071\.tar is (cut|empty).* \(?{cut}.*; fetch"):
            list_splits(tmp_path)


def test_archives_that_hold_something_else(images: ImageNet, tmp_path: Path) -> None:
    train = write_archives(tmp_path, images, "train") / "ILSVRC2012_img_train.tar"
    tars = [(f"{wnid}.tar", tar_bytes(found)) for wnid, found in images.train.items()]
    for extra, message in (
        (("dogs.tar", b""), r"holds 'dogs\.tar', which is no class tar called WNID\.tar, or a second"),
        (("x/n01440764_1.JPEG", b""), r"holds 'x/n01440764_1\.JPEG', which is no class tar called"),
        (("x/n01440764.tar", b""), r"holds 'x/n01440764\.tar', which is no class tar called WNID\.tar, or a second"),
        (
            ("n00000001.tar", tar_bytes({"n01440764_9.JPEG": tiny_image(1)})),
            r"n00000001\.tar holds 1 images that are named after other classes than n00000001: n01440764_9\.JPEG; put",
        ),
        (
            ("n00000001.tar", tar_bytes({"a/1.JPEG": tiny_image(1), "b/1.JPEG": tiny_image(2)})),
            r"n00000001\.tar holds 1 images twice: 1\.JPEG",
        ),
    ):
        write_members(train, [*tars, extra])
        with pytest.raises(DataError, match=message):
            list_splits(tmp_path)
    odd = tar_bytes({"./n00000001_1.JPEG": tiny_image(1), "._n00000001_1.JPEG": b"mac", "list.txt": b"", "x": b"text"})
    write_members(train, [("README", b"x"), ("._n01440764.tar", b"mac"), *tars, ("./set/n00000001.tar", odd)])
    listed = list_source(tmp_path)
    assert listed.splits[0].images[0].key == "n00000001/n00000001_1"
    assert listed.passed_over.counts == {"members of tars that are no images": 3, "hidden or system members of tars": 2}
    with tarfile.open(train, "a") as archive:
        link = tarfile.TarInfo("n09999999.tar")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    with pytest.raises(DataError, match=r"img_train\.tar: member 'n09999999\.tar' at byte \d+ is a symbolic link, not"):
        list_splits(tmp_path)


def test_archives_that_are_packed_or_something_else(images: ImageNet, tmp_path: Path) -> None:
    train = write_archives(tmp_path, images) / "ILSVRC2012_img_train.tar"
    write_members(train, [("n01440764.tar", gzip.compress(tar_bytes({})))])
    with pytest.raises(
        CorruptError, match=r"img_train\.tar: n01440764\.tar is no tar but compressed with gzip; unpack"
    ):
        list_splits(tmp_path)
    train.write_bytes(b"<!DOCTYPE html><html>sign in")
    with pytest.raises(CorruptError, match=r"img_train\.tar is no tar but a web page"):
        list_splits(tmp_path)
    write_file(tmp_path / f"{DEVKIT}.tar.gz", b"<!DOCTYPE html><html>sign in")
    with pytest.raises(CorruptError, match=r"devkit_t12\.tar\.gz is no archive but a web page"):
        list_splits(tmp_path)


def test_devkits_that_are_damaged(images: ImageNet, tmp_path: Path) -> None:
    write_archives(tmp_path, images)
    path = tmp_path / f"{DEVKIT}.tar.gz"
    whole = path.read_bytes()
    for data in (whole[: len(whole) // 2], b"", b"<html>sign in</html>", whole[:100] + b"\xff" * 50 + whole[150:]):
        path.write_bytes(data)
        with pytest.raises(BowstoreError, match=r"devkit_t12\.tar\.gz"):
            list_splits(tmp_path)
    for files, message in (
        ({"meta_mat": b"no matrix"}, r"meta\.mat holds no synsets \(.*\); fetch it anew"),
        ({"meta_mat": meta_mat()[:300]}, r"meta\.mat holds no synsets \(.*\); fetch it anew"),
        ({"meta_mat": meta_mat({"dog": 1})}, r"meta\.mat has dog for a WNID; fetch it anew"),
        ({"meta_mat": meta_mat({})}, r"meta\.mat has no class; fetch it anew"),
        ({"meta_mat": meta_mat({"n00000001": 1, "n00000002": 1})}, r"meta\.mat has an id or a WNID twice"),
        (
            {"truth": b"4\n5\n1\nx\n"},
            r"ground_truth\.txt has 2 ids that meta\.mat does not have: '5' in line 2, 'x' in",
        ),
        ({"truth": b""}, r"ground_truth\.txt has no line; fetch the devkit anew"),
    ):
        write_devkit_archive(path, images, **files)
        with pytest.raises(CorruptError, match=message):
            list_splits(tmp_path)
    path.unlink()
    write_file(tmp_path / f"{DEVKIT}/data/meta.mat", meta_mat())
    with pytest.raises(CorruptError, match=r"devkit_t12 has no data/ILSVRC2012_validation_ground_truth\.txt; fetch"):
        list_splits(tmp_path)


def test_a_split_that_is_there_twice(images: ImageNet, tmp_path: Path) -> None:
    """As after torchvision's datasets.ImageNet, which extracts beside the archives."""
    write_folders(write_archives(tmp_path, images), images)
    with pytest.raises(
        DataError,
        match=r"holds train more than once: ILSVRC2012_img_train\.tar, train; take the archives with --source "
        r"imagenet, class folders with --source folder, or move all but one away",
    ):
        list_splits(tmp_path)
    keys = []
    for kind, counts in (("imagenet", {"images": 16}), ("folder", {".tar": 2, ".gz": 1})):
        listed = list_source(tmp_path, kind)
        assert listed.passed_over.counts == counts
        keys.append([[(image.key, image.label) for image in split.images] for split in listed.splits])
    assert keys[0] == keys[1]


def test_class_tars_beside_the_folders_they_were_extracted_to(images: ImageNet, tmp_path: Path) -> None:
    for wnid, found in images.train.items():
        write_file(tmp_path / "train" / f"{wnid}.tar", tar_bytes(found))
        (tmp_path / "train" / wnid).mkdir()
    assert len(list_splits(tmp_path)[0].images) == 11  # the folders are empty
    write_file(tmp_path / "train/n01440764/n01440764_0.JPEG", tiny_image(0))
    with pytest.raises(DataError, match=r"holds train more than once: train/WNID\.tar, train; take the archives with"):
        list_splits(tmp_path)
    assert [len(list_splits(tmp_path, kind)[0].images) for kind in ("imagenet", "folder")] == [11, 1]


def test_train_without_class_folders(images: ImageNet, tmp_path: Path) -> None:
    for name, write in (("k/ILSVRC/Data/CLS-LOC", write_kaggle), ("t", write_tiny), ("a", write_archives)):
        write(tmp_path / name[0], images)
        (tmp_path / "a/ILSVRC2012_img_train.tar").unlink(missing_ok=True)
        shutil.rmtree(tmp_path / name / "train", ignore_errors=True)
        write_file(tmp_path / name / "train/n01440764_0.JPEG", tiny_image(0))
        with pytest.raises(DataError, match=r"/train holds no class folders called by WNIDs such as n01440764, so its"):
            list_splits(tmp_path / name[0])


def test_an_archive_that_changes_after_listing(images: ImageNet, tmp_path: Path) -> None:
    from bowstore.data.sources import open_source

    listed = list_source(write_archives(tmp_path, images))
    read = open_source(listed.source)
    image = listed.splits[0].images[0]
    assert read(image) == images.train["n01440764"]["n01440764_0.JPEG"]
    os.utime(tmp_path / "ILSVRC2012_img_train.tar", ns=(1, 1))
    with pytest.raises(DataError, match=r"img_train\.tar changed after it was listed: the source is changing"):
        read(image)


def test_running_on_gives_the_same_bytes(images: ImageNet, tmp_path: Path) -> None:
    source, out = write_archives(tmp_path / "source", images), tmp_path / "out"
    make_shards(source, out, ShardsConfig(per_shard=3, workers=1))
    before = _tars(out)
    (out / "train/train-000001.tar").unlink()
    (out / "train/manifest.json").unlink()
    assert [report.new for report in make_shards(source, out, ShardsConfig(per_shard=3, workers=1))] == [True, False]
    assert _tars(out) == before
    assert [report.new for report in make_shards(source, out, ShardsConfig(per_shard=3, workers=1))] == [False, False]


def test_listing_reads_headers_alone(tmp_path: Path) -> None:
    """Memory does not grow with the archive: here one of 2 GB, most of it holes."""
    inner = tar_bytes({f"n01440764_{number}.JPEG": b"" for number in range(3)})
    size = 1 << 30
    path = tmp_path / "ILSVRC2012_img_train.tar"
    with open(path, "wb") as file:
        for wnid in ("n01440764", "n01443537"):
            big = tarfile.TarInfo(f"{wnid}_big.JPEG")
            big.size = size
            outer = tarfile.TarInfo(f"{wnid}.tar")
            outer.size = 512 + size + len(inner)
            file.write(outer.tobuf(tarfile.GNU_FORMAT) + big.tobuf(tarfile.GNU_FORMAT))
            file.seek(size, os.SEEK_CUR)
            file.write(inner.replace(b"n01440764", wnid.encode()) if wnid == "n01440764" else tar_bytes({}))
            if wnid != "n01440764":
                file.seek(len(inner) - 10240, os.SEEK_CUR)
        file.write(bytes(10240))
    tracemalloc.start()
    (train,) = list_splits(tmp_path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(train.images) == 5
    assert peak < 8 << 20


def test_real_photographs(tmp_path: Path) -> None:
    """Twelve photographs of as many classes, in archives and in class folders."""
    images = ImageNet()
    with tarfile.open(real_data("imagenet-sample-250.tar")) as archive:
        for number, info in enumerate(member for member in archive if member.isreg()):
            file = archive.extractfile(info)
            if number == 12 or file is None:
                break
            wnid = info.name.split("/")[1]
            images.train[wnid] = {f"{wnid}_{number}.JPEG": file.read()}
    images.ids = {wnid: 12 - number for number, wnid in enumerate(images.train)}
    images.val = [data for found in images.train.values() for data in found.values()][:5]
    images.truth = (3, 12, 1, 7, 7)
    found = shards_of(write_archives(tmp_path / "a", images), tmp_path / "out/a", per_shard=5)
    assert shards_of(write_folders(tmp_path / "b", images), tmp_path / "out/b", per_shard=5) == found
    assert _tars(tmp_path / "out/a") == _tars(tmp_path / "out/b")
    assert classes_of(tmp_path / "out/a/train") == tuple(sorted(images.train))
    assert [len(samples) for samples in found.values()] == [12, 5]
