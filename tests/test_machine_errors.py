"""What the machine could not do is never taken for damage: the command stops, and nothing is repaired or dropped."""

import errno
import os
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import zarr.storage
from click.testing import CliRunner
from PIL import Image
from shard_sets import ShardMaker, encode_jpeg, textured_image, write_store

from bowstore.cli import main
from bowstore.config import ModelConfig
from bowstore.data import images, shard_check
from bowstore.data.sources import packed, plain_pickle, walk
from bowstore.errors import BusyError, DataError, MissingError, UsageError, is_machine_error
from bowstore.models import layouts, library
from bowstore.models.registry import build_backbone
from bowstore.verify import verify_path
from bowstore.words.store.nearest import load_nearest
from bowstore.words.store.store import open_store

NO_ACCESS = PermissionError(errno.EACCES, "Permission denied")
BAD_DISK = OSError(errno.EIO, "Input/output error")
FULL_TABLE = OSError(errno.EMFILE, "Too many open files")
NO_ROOM = RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 64 bytes")


def failing(error: BaseException) -> Callable[..., Any]:
    def fail(*args: Any, **kwargs: Any) -> Any:
        raise error

    return fail


@pytest.mark.parametrize("error", [
    NO_ACCESS, BAD_DISK, FULL_TABLE, NO_ROOM, MemoryError(), RuntimeError("std::bad_alloc"),
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
])  # fmt: skip
def test_errors_of_the_machine(error: BaseException) -> None:
    assert is_machine_error(error)


@pytest.mark.parametrize("error", [
    FileNotFoundError(errno.ENOENT, "x"), IsADirectoryError(errno.EISDIR, "x"), NotADirectoryError(errno.ENOTDIR, "x"),
    OSError("image file is truncated"), OSError(-2), ValueError("x"), RuntimeError("Zstd error"), EOFError(),
    MissingError("x"), BusyError("x"), UsageError("not enough memory"), tarfile.ReadError("x"), KeyError("x"),
])  # fmt: skip
def test_errors_that_are_not_the_machines(error: BaseException) -> None:
    assert not is_machine_error(error)


@pytest.mark.parametrize("error", [NO_ACCESS, BAD_DISK, FULL_TABLE])
def test_a_chunk_of_words_that_could_not_be_read_is_not_taken_back(
    make_shard_set: ShardMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: OSError
) -> None:
    store = write_store(tmp_path / "words.zarr", make_shard_set(40))
    files = {path: path.read_bytes() for path in store.rglob("*") if path.is_file()}
    original = zarr.storage._local._get

    def get(path: Path, *args: Any) -> Any:
        if "block3/words/c/" in path.as_posix():
            raise error
        return original(path, *args)

    with monkeypatch.context() as patch:
        patch.setattr(zarr.storage._local, "_get", get)
        for call in (lambda: verify_path(store, repair=True), lambda: open_store(store).load_words()):
            with pytest.raises(type(error)) as raised:
                call()
            assert raised.value is error
        result = CliRunner().invoke(main, ["verify", str(store), "--repair"])
        assert (result.exit_code, result.stderr.splitlines()[-1].split(";")[0]) == (1, f"Error: {error.strerror}")
    assert {path: path.read_bytes() for path in store.rglob("*") if path.is_file() and path in files} == files
    assert verify_path(store).sound


@pytest.mark.parametrize("error", [NO_ACCESS, BAD_DISK, FULL_TABLE])
def test_a_shard_that_could_not_be_read_is_not_set_aside(
    make_shard_set: ShardMaker, monkeypatch: pytest.MonkeyPatch, error: OSError
) -> None:
    root = make_shard_set(40, per_shard=20).root
    before = {path.name: path.read_bytes() for path in root.iterdir()}
    original = shard_check.scan_shard

    def scan(path: Path, *args: Any, **kwargs: Any) -> Any:
        if path.name == "train-000001.tar":
            raise error
        return original(path, *args, **kwargs)

    monkeypatch.setattr(shard_check, "scan_shard", scan)
    report = verify_path(root, repair=True, workers=1)
    assert not report.sound
    assert [(problem.kind, problem.message) for problem in report.problems] == [
        ("unread", f"shard {root / 'train-000001.tar'} cannot be read ({error.strerror})")
    ]
    assert report.repairs == [
        f"{root}: nothing was repaired: 1 shards (train-000001.tar) cannot be read now, damaged or not; see to the "
        f"disk, the mount and the permissions, and run the same again"
    ]
    assert {path.name: path.read_bytes() for path in root.iterdir()} == before


@pytest.mark.parametrize("error", [MemoryError(), BAD_DISK])
def test_an_image_that_could_not_be_decoded_for_want_of_memory_is_not_left_out(
    monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    data = encode_jpeg(textured_image(1, 32, 32))
    assert images.prepare(data).height == 32
    for where in ("load", "getexif"):
        with monkeypatch.context() as patch:
            patch.setattr(Image.Image if where == "getexif" else images.JpegImageFile, where, failing(error))
            with pytest.raises(type(error)) as raised:
                images.prepare(data)
            assert raised.value is error


def test_weights_and_pickles_that_did_not_fit_into_memory_are_not_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.save({"weight": torch.zeros(2)}, tmp_path / "w.pt")
    backbone = build_backbone(ModelConfig(arch="wrn-10-1"))
    with monkeypatch.context() as patch:
        patch.setattr(torch, "load", failing(NO_ROOM))
        with pytest.raises(RuntimeError, match="can't allocate memory"):
            layouts.load_foreign(backbone, layouts.read_weights(tmp_path / "w.pt"))
    with monkeypatch.context() as patch:
        patch.setattr(library, "_torchvision_network", failing(NO_ROOM))
        with pytest.raises(RuntimeError, match="can't allocate memory"):
            library.library_backbone("torchvision:resnet18")
    with monkeypatch.context() as patch:
        patch.setattr(plain_pickle._PlainUnpickler, "load", failing(MemoryError()))
        with pytest.raises(MemoryError):
            plain_pickle.read_plain_pickle(b"x", Path("batch"))
    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", failing(BAD_DISK))
        with pytest.raises(OSError, match="Input/output error"):
            load_nearest(tmp_path / "n.npz")


def test_a_source_that_could_not_be_read_is_not_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An archive is not taken for one of another kind, nor a file for no file."""
    (tmp_path / "a.tar").write_bytes(b"")
    with monkeypatch.context() as patch:
        patch.setattr(tarfile, "open", failing(BAD_DISK))
        with pytest.raises(DataError, match=r"cannot read .*a\.tar: .*Input/output error; make it readable"):
            packed.read_packed(tmp_path / "a.tar", ["a/b"])
    (tmp_path / "a.tar").unlink()
    (tmp_path / "loop.jpg").symlink_to("loop.jpg")
    with os.scandir(tmp_path) as entries:
        (loop,) = entries
        assert not walk._is_file(loop)

    class Entry:
        path, name = str(tmp_path / "b.jpg"), "b.jpg"
        is_file = is_dir = staticmethod(failing(BAD_DISK))

    for ask in (walk._is_file, walk._is_folder):
        with pytest.raises(DataError, match=r"cannot read .*b\.jpg: Input/output error; make it readable, or move it"):
            ask(Entry())  # type: ignore[arg-type]


@pytest.mark.parametrize(("error", "line"), [
    (MemoryError(), "Error: the machine's memory is full (MemoryError); lower the batch, or end what else uses it"),
    (NO_ROOM, f"Error: the machine's memory is full ({NO_ROOM}); lower the batch, or end what else uses it"),
    (torch.OutOfMemoryError("CUDA out of memory. Tried\nmore"),
     "Error: the GPU's memory is full (CUDA out of memory. Tried); lower the batch, or end what else uses it"),
])  # fmt: skip
def test_a_command_without_memory_says_so_in_one_line(
    monkeypatch: pytest.MonkeyPatch, error: Exception, line: str
) -> None:
    monkeypatch.setattr("bowstore.verify.verify_path", failing(error))
    result = CliRunner().invoke(main, ["verify", "x"])
    assert (result.exit_code, result.stderr) == (1, f"{line}\n")
