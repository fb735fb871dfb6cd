"""Which kind a source is, what a manifest says of it, and the commands `shards` and `data`."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from imagenet_sets import small_imagenet, write_archives, write_kaggle, write_tiny
from source_sets import cifar10_files, cifar100_files, list_splits, tiny_image, write_cifar, write_file, write_members
from voc_devkit import write_devkit

from bowstore.cli import main
from bowstore.data.config import ShardsConfig
from bowstore.data.shards import make_shards
from bowstore.data.sources import KINDS, find_source
from bowstore.errors import DataError, MismatchError, MissingError, UsageError


def _folder(root: Path) -> Path:
    write_file(root / "train/ant/1.jpg", tiny_image(1))
    write_file(root / "val/ant/1.jpg", tiny_image(2))
    return root


def _all_kinds(root: Path) -> dict[str, list[Path]]:
    """Sources of every kind that can be told by its layout."""
    _folder(root / "folder")
    write_file(root / "flat/1.jpg", tiny_image(1))
    tens = write_cifar(root / "ten/cifar-10-python.tar.gz", "cifar-10-batches-py", cifar10_files())
    for name, data in cifar100_files().items():
        write_file(root / "hundred/cifar-100-python" / name, data)
    for split in ("train", "val", "test"):
        write_file(root / f"mini/{split}.csv", f"filename,label\n{split}.jpg,{split}\n")
        write_file(root / f"mini/images/{split}.jpg", tiny_image(1))
    voc = write_devkit(root / "pascal", trainval=10, test=10, classes=("red",))
    write_members(root / "pascal/VOCtrainval_06-Nov-2007.tar", [("VOCdevkit/VOC2007/JPEGImages/1.jpg", b"")])
    write_file(root / "places/train_places205.csv", "a/b/1.jpg 0\n")
    write_file(root / "places/images256/a/b/1.jpg", tiny_image(1))
    write_members(root / "wds/train-0.tar", [("1.jpg", tiny_image(1))])
    write_members(root / "split/val/0.tar", [("1.jpg", tiny_image(1))])
    write_members(root / "folder/all.tar", [("1.jpg", tiny_image(1))])  # beside train/ and val/, which are meant
    small = small_imagenet()
    archives = write_archives(root / "ilsvrc", small)
    kaggle = write_kaggle(root / "kaggle", small)
    tiny = write_tiny(root / "tiny", small)
    return {
        "imagenet": [archives],
        "kaggle": [kaggle],
        "tinyimagenet": [tiny],
        "folder": [root / "folder", root / "folder/train", root / "flat"],
        "cifar10": [tens, tens.parent],
        "cifar100": [root / "hundred", root / "hundred/cifar-100-python"],
        "miniimagenet": [root / "mini"],
        "voc": [root / "pascal", voc.parent, voc],
        "places205": [root / "places"],
        "webdataset": [root / "wds", root / "split", root / "wds/train-0.tar"],
    }


def test_the_kind_is_found_by_the_layout(tmp_path: Path) -> None:
    sources = _all_kinds(tmp_path)
    assert set(sources) == set(KINDS.names()) - {"list"}
    for kind, paths in sources.items():
        for path in paths:
            assert find_source(path).kind == kind, path
            assert list_splits(path)
    assert find_source(tmp_path / "flat", listed=True).kind == "list"
    assert find_source(tmp_path / "mini", "folder").kind == "folder"


def test_sources_of_no_kind_and_of_several(tmp_path: Path) -> None:
    write_file(tmp_path / "empty/notes.txt", "x")
    with pytest.raises(
        DataError,
        match=r"no images in .*empty \(looked for class folders or images, \*\.tar, the archives of ImageNet and "
        r"CIFAR, the lists of MiniImageNet and Places, a VOC devkit\), which holds 1 files of other kinds \(\.txt 1\); "
        r"unpack what is packed, name the folder that images or tars lie in, or its kind with --source; ",
    ):
        list_splits(tmp_path / "empty")
    write_file(tmp_path / "mixed/ant/1.jpg", tiny_image(1))
    write_members(tmp_path / "mixed/0.tar", [("1.jpg", tiny_image(1))])
    with pytest.raises(
        DataError,
        match=r"mixed may be folder and webdataset; say which with --source folder or --source webdataset; `bow",
    ):
        list_splits(tmp_path / "mixed")
    assert len(list_splits(tmp_path / "mixed", "folder")) == len(list_splits(tmp_path / "mixed", "webdataset")) == 1
    with pytest.raises(UsageError, match=r"notes\.txt is a file, not a folder of images; unpack it and name the f"):
        list_splits(tmp_path / "empty/notes.txt")
    with pytest.raises(MissingError, match=r"no folder .*gone; name the one that holds train/"):
        list_splits(tmp_path / "gone")
    with pytest.raises(
        UsageError, match=r"no kind of source 'zip'; there are folder, list, imagenet, kaggle, tinyimage"
    ):
        list_splits(tmp_path / "mixed", "zip")


def test_options_of_other_kinds_are_refused(tmp_path: Path) -> None:
    _folder(tmp_path)
    with pytest.raises(UsageError, match=r"source folder takes no --list; leave it out, or take --source list"):
        list_splits(tmp_path, "folder", lists=["a.txt"])
    with pytest.raises(UsageError, match=r"--label-field is 'class'; class folders tell labels, so give none \(all"):
        list_splits(tmp_path, label_field="class")


def _manifest(out: Path) -> dict[str, object]:
    value: dict[str, object] = json.loads((out / "train/manifest.json").read_text())["source"]
    return value


def test_manifests_say_the_kind_unless_it_is_folder(tmp_path: Path) -> None:
    """Manifests of folders stay as they were before there were kinds."""
    source = _folder(tmp_path / "source")
    make_shards(source, tmp_path / "a", ShardsConfig(workers=1))
    assert set(_manifest(tmp_path / "a")) == {"images", "size_bytes", "listing"}
    lists = [str(write_file(tmp_path / "list.txt", "train/ant/1.jpg 1\n"))]
    make_shards(source, tmp_path / "b", ShardsConfig(workers=1, lists=lists))
    assert set(_manifest(tmp_path / "b")) == {"images", "size_bytes", "listing", "kind", "labels"}
    assert _manifest(tmp_path / "b")["kind"] == "list"
    with pytest.raises(MismatchError, match=r"b/train holds .*source\.kind is list there, None here, .*; take anoth"):
        make_shards(source, tmp_path / "b", ShardsConfig(workers=1))
    with pytest.raises(MismatchError, match=r"a/train holds .*source\.kind is None there, list here, .*; take another"):
        make_shards(source, tmp_path / "a", ShardsConfig(workers=1, lists=lists))
    write_file(tmp_path / "list.txt", "train/ant/1.jpg 2\n")
    with pytest.raises(MismatchError, match=r"b/train holds shards of something else \(source\.labels is \w+ there"):
        make_shards(source, tmp_path / "b", ShardsConfig(workers=1, lists=lists))


def _run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def test_the_shards_command(tmp_path: Path) -> None:
    source = _folder(tmp_path / "source")
    listed = write_file(tmp_path / "list.csv", "filename,breed\ntrain/ant/1.jpg,pug\n")
    result = _run(
        "shards", source, tmp_path / "out", "--source", "list", "--list", listed, "--label-field", "breed", "--json"
    )
    assert result.exit_code == 0, result.output
    (report,) = json.loads(result.stdout)
    assert (report["split"], report["written"], report["classes"]) == ("train", 1, 1)
    result = _run("shards", source, tmp_path / "out", "--source", "zip")
    assert result.exit_code == 2
    assert "'zip' is not one of 'folder', 'list', 'imagenet'" in result.output
    result = _run("shards", tmp_path, tmp_path / "out", "--source", "voc")
    assert (result.exit_code, len(result.stderr.splitlines())) == (1, 1)
    assert "holds no JPEGImages and ImageSets/Main" in result.stderr
    text = _run("shards", "--help").output
    assert all(kind in text for kind in KINDS.names())


def test_the_data_command() -> None:
    text = _run("data")
    assert text.exit_code == 0
    value = json.loads(_run("data", "--json").stdout)
    assert [kind["name"] for kind in value["sources"]] == list(KINDS.names())
    for kind in value["sources"]:
        assert kind["example"].startswith("bowstore shards ")
        assert f"$ {kind['example']}" in text.stdout
        assert " ".join(kind["expects"].split()[:3]) in " ".join(text.stdout.split())
    assert [item["name"] for item in value["downloads"]] == [
        "cifar10",
        "cifar100",
        "voc2007",
        "voc2012",
        "imagenette",
        "places365",
    ]
    assert set(value["by_hand"]) == {"imagenet", "miniimagenet", "places205"}
    assert max(map(len, text.stdout.splitlines())) <= 110
