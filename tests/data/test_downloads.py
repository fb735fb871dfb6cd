"""Downloads with torchvision's downloaders, from a server on loopback: what arrives, and what is said when not."""

import hashlib
import io
import tarfile
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from click.testing import CliRunner
from source_sets import cifar10_files, cifar100_files, list_splits, tiny_image, write_cifar
from voc_devkit import write_devkit

from bowstore.cli import main
from bowstore.data import downloads
from bowstore.data.downloads import DOWNLOADS, fetch
from bowstore.data.sources import find_source
from bowstore.errors import BowstoreError, BusyError, UsageError
from bowstore.files import exclusive_lock


class _Server(ThreadingHTTPServer):
    """Serves a folder; `requests` counts, `cut` and `stall` make it fail."""

    requests = 0
    cut = False
    stall = False
    daemon_threads = False  # they are waited for at the end

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), partial(_Handler, directory=str(folder)))
        self.over = threading.Event()


class _Handler(SimpleHTTPRequestHandler):
    server: _Server

    def do_GET(self) -> None:
        self.server.requests += 1
        if self.server.stall:
            self.server.over.wait(10)
        else:
            super().do_GET()

    def copyfile(self, source: object, outputfile: object) -> None:
        data = source.read()  # type: ignore[attr-defined]
        outputfile.write(data[: len(data) // 2] if self.server.cut else data)  # type: ignore[attr-defined]

    def log_message(self, *_arguments: object) -> None:
        pass


@pytest.fixture
def served(tmp_path: Path) -> Path:
    folder = tmp_path / "served"
    folder.mkdir()
    return folder


@pytest.fixture
def server(served: Path) -> Iterator[_Server]:
    with _Server(served) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.over.set()
        server.shutdown()
        thread.join()


def _url(server: _Server, name: str = "") -> str:
    return f"http://127.0.0.1:{server.server_port}/{name}"


def _md5(path: Path) -> str:
    return hashlib.md5(path.read_bytes()).hexdigest()


def _tar(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w:gz" if path.suffix == ".tgz" else "w") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


@pytest.fixture
def cifar10(served: Path, server: _Server, monkeypatch: pytest.MonkeyPatch) -> Path:
    from torchvision.datasets import CIFAR10

    archive = write_cifar(served / CIFAR10.filename, CIFAR10.base_folder, cifar10_files())
    monkeypatch.setattr(CIFAR10, "url", _url(server, archive.name))
    monkeypatch.setattr(CIFAR10, "tgz_md5", _md5(archive))
    return archive


def test_cifar10(cifar10: Path, server: _Server, tmp_path: Path) -> None:
    (path,) = fetch("cifar10", tmp_path / "data")
    assert path.read_bytes() == cifar10.read_bytes()
    assert (find_source(path).kind, [len(split.images) for split in list_splits(path)]) == ("cifar10", [15, 3])
    seen = server.requests
    assert fetch("cifar10", tmp_path / "data") == [path]
    assert server.requests == seen
    assert [item.name for item in (tmp_path / "data").iterdir() if not item.name.endswith(".lock")] == [path.name]


def test_cifar100(served: Path, server: _Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torchvision.datasets import CIFAR100

    archive = write_cifar(served / CIFAR100.filename, CIFAR100.base_folder, cifar100_files())
    monkeypatch.setattr(CIFAR100, "url", _url(server, archive.name))
    monkeypatch.setattr(CIFAR100, "tgz_md5", _md5(archive))
    (path,) = fetch("cifar100", tmp_path)
    assert find_source(path).kind == "cifar100"


def test_voc2007(served: Path, server: _Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torchvision.datasets import voc

    root = write_devkit(tmp_path / "made")
    later = tmp_path / "data/VOCdevkit/VOC2012"  # it stays
    later.mkdir(parents=True)
    parts = {"2007": "trainval", "2007-test": "test"}
    for key, part in parts.items():
        ids = (root / f"ImageSets/Main/{part}.txt").read_text().split()
        files = [*root.glob(f"ImageSets/Main/*{part}.txt"), *(root / f"JPEGImages/{image}.jpg" for image in ids)]
        members = {str(path.relative_to(tmp_path / "made")): path.read_bytes() for path in files}
        archive = _tar(served / f"{part}.tar", members)
        entry = {**voc.DATASET_YEAR_DICT[key], "url": _url(server, archive.name), "md5": _md5(archive)}
        monkeypatch.setitem(voc.DATASET_YEAR_DICT, key, entry)
    (path,) = fetch("voc2007", tmp_path / "data")
    assert path == tmp_path / "data/VOCdevkit/VOC2007"
    assert {split.name: len(split.images) for split in list_splits(path)} == {"train": 24, "test": 15}
    assert find_source(tmp_path / "data").kind == "voc"


@pytest.fixture
def imagenette(served: Path, server: _Server, monkeypatch: pytest.MonkeyPatch) -> Path:
    from torchvision.datasets import Imagenette

    names = {f"imagenette2/{split}/n01440764/{n}.JPEG": n for split in ("train", "val") for n in range(2)}
    archive = _tar(served / "imagenette2.tgz", {name: tiny_image(n) for name, n in names.items()})
    monkeypatch.setitem(Imagenette._ARCHIVES, "full", (_url(server, archive.name), _md5(archive)))
    return archive


def test_imagenette(imagenette: Path, tmp_path: Path) -> None:
    (path,) = fetch("imagenette", tmp_path / "data")
    assert [(split.name, len(split.images)) for split in list_splits(path)] == [("train", 2), ("val", 2)]


def test_places365(served: Path, server: _Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torchvision.datasets import Places365

    lists = {
        "categories_places365.txt": b"/a/airfield 0\n",
        "places365_train_standard.txt": b"/a/airfield/00000001.jpg 0\n",
        "places365_val.txt": b"Places365_val_00000001.jpg 0\n",
    }
    devkit = _tar(served / "devkit.tar", lists)
    train = _tar(served / "train.tar", {"data_256/a/airfield/00000001.jpg": tiny_image(1)})
    val = _tar(served / "val.tar", {"val_256/Places365_val_00000001.jpg": tiny_image(2)})
    md5 = {name: hashlib.md5(data).hexdigest() for name, data in lists.items()}
    monkeypatch.setattr(Places365, "_BASE_URL", _url(server))
    monkeypatch.setitem(Places365._DEVKIT_META, "standard", (devkit.name, _md5(devkit)))
    categories = "categories_places365.txt"
    monkeypatch.setattr(Places365, "_CATEGORIES_META", (categories, md5[categories]))
    for split, name in (("train-standard", "places365_train_standard.txt"), ("val", "places365_val.txt")):
        monkeypatch.setitem(Places365._FILE_LIST_META, split, (name, md5[name]))
    monkeypatch.setitem(Places365._IMAGES_META, ("train-standard", True), (train.name, _md5(train)))
    monkeypatch.setitem(Places365._IMAGES_META, ("val", True), (val.name, _md5(val)))
    fetch("places365", tmp_path / "data")
    splits = list_splits(tmp_path / "data")
    assert [(split.name, split.classes, len(split.images)) for split in splits] == [
        ("train", ("a/airfield",), 1),
        ("val", ("a/airfield",), 1),
    ]


def _failure(name: str, folder: Path) -> str:
    with pytest.raises(BowstoreError) as caught:
        fetch(name, folder)
    assert len(str(caught.value).splitlines()) == 1
    assert not (folder / DOWNLOADS[name].results[0]).exists()
    return str(caught.value)


def test_failures_are_one_line_and_leave_nothing(
    cifar10: Path, server: _Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torchvision.datasets import CIFAR10

    data = tmp_path / "data"
    server.cut = True
    remedy = "; see to the network and the disk, and run the same command again"
    assert _failure("cifar10", data) == f"cannot download cifar10 to {data}: File not found or corrupted{remedy}"
    server.cut = False
    with monkeypatch.context() as patch:
        patch.setattr(CIFAR10, "url", _url(server, "gone"))
        assert "cannot download cifar10 to" in (said := _failure("cifar10", data))
        assert "HTTP Error 404: File not found" in said
    with monkeypatch.context() as patch:
        patch.setattr(CIFAR10, "url", "http://127.0.0.1:9/closed")
        assert "Connection refused" in _failure("cifar10", data)
    with monkeypatch.context() as patch:
        patch.setattr(CIFAR10, "tgz_md5", "0" * 32)
        assert "File not found or corrupted" in _failure("cifar10", data)
    (path,) = fetch("cifar10", data)
    assert path.read_bytes() == cifar10.read_bytes()


def test_a_silent_server_is_given_up(
    cifar10: Path, server: _Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(downloads, "_STALL_SECONDS", 0.1)
    server.stall = True
    assert "timed out" in _failure("cifar10", tmp_path / "data")


def test_a_half_extracted_archive_does_not_pass_for_a_whole_one(imagenette: Path, tmp_path: Path) -> None:
    """A run killed while it extracted leaves a folder that torchvision would take as it is."""
    half = tmp_path / "data/.download-imagenette/imagenette2/train/n01440764/0.JPEG"
    half.parent.mkdir(parents=True)
    half.write_bytes(b"half")
    (path,) = fetch("imagenette", tmp_path / "data")
    assert [len(split.images) for split in list_splits(path)] == [2, 2]
    assert (path / "train/n01440764/0.JPEG").read_bytes() == tiny_image(0)


def test_names_that_cannot_be_downloaded(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"ImageNet has no public download: register at image-net\.org, and fetch I"):
        fetch("imagenet", tmp_path)
    with pytest.raises(UsageError, match=r"no download 'mnist'; there are cifar10, cifar100, voc2007, voc2012, imag"):
        fetch("mnist", tmp_path)
    assert not list(tmp_path.iterdir())


def test_places_that_cannot_hold_it(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(BowstoreError, match=r"cannot download cifar10 to .*file: .*(File exists|Not a directory)"):
        fetch("cifar10", tmp_path / "file")
    with (
        exclusive_lock(tmp_path / ".download-cifar10.lock", "x"),
        pytest.raises(BusyError, match=r"is in use by process \d+ on"),
    ):
        fetch("cifar10", tmp_path)


def test_the_command(cifar10: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["data", "download", "cifar10", str(tmp_path)])
    assert result.exit_code == 0
    assert f"{tmp_path}/cifar-10-python.tar.gz; next: bowstore shards {tmp_path}/cifar-10" in result.stdout
    result = CliRunner().invoke(main, ["data", "download", "imagenet", str(tmp_path)])
    assert (result.exit_code, len(result.stderr.splitlines())) == (2, 1)
