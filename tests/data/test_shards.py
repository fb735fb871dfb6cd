"""Shards from folders: layout and bytes, quarantine, running on after a stop, refusals."""

import errno
import io
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from left_behind import left_behind
from PIL import Image
from source_sets import list_splits

from bowstore.data import shard_writer
from bowstore.data.config import ShardsConfig
from bowstore.data.index import open_index
from bowstore.data.shard_writer import Record, ShardJob, write_shards
from bowstore.data.shards import make_shards
from bowstore.data.sources import ImageFile, Source
from bowstore.data.verify import verify_folder
from bowstore.errors import BowstoreError, BusyError, DataError, MismatchError, MissingError, UsageError
from bowstore.files import exclusive_lock, file_digest

_TOOL = Path(__file__).parents[2] / "tools" / "make_shards.py"


def _jpeg(seed: int, kind: str = "JPEG", mode: str = "RGB") -> bytes:
    y, x = np.mgrid[0:20, 0:24]
    pixels = np.stack([x * 9, y * 10, np.full_like(x, seed * 20 % 256)], -1).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(file, kind)
    return file.getvalue()


def _write(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """3 classes, 9 good images and 2 bad ones in train, 3 images in val."""
    root = tmp_path / "source"
    for number in range(3):
        for name in ("ant", "bee", "cow"):
            _write(root / "train" / name / f"{number}.JPEG", _jpeg(number))
    _write(root / "train/ant/1.JPEG", _jpeg(4, "PNG"))
    _write(root / "train/bee/1.JPEG", _jpeg(5, mode="CMYK"))
    _write(root / "train/cow/empty.jpg", b"")
    _write(root / "train/cow/page.jpg", b"<html>not found</html>")
    for name in ("ant", "bee", "cow"):
        _write(root / "val" / name / "0.jpg", _jpeg(7))
    return root


def _state(out: Path) -> dict[str, str]:
    """Digest of every file below `out`, but for the lock with its process id."""
    files = sorted(path for path in out.rglob("*") if path.is_file() and path.name != ".lock")
    return {str(path.relative_to(out)): file_digest(path) for path in files}


def _members(out: Path, split: str) -> list[tarfile.TarInfo]:
    members: list[tarfile.TarInfo] = []
    for path in sorted((out / split).glob("*.tar")):
        with tarfile.open(path) as archive:
            members += archive.getmembers()
    return members


def _make(source: Path, out: Path, *, seed: int = 0, per_shard: int = 4, workers: int = 1) -> Any:
    return make_shards(source, out, ShardsConfig(seed=seed, per_shard=per_shard, workers=workers))


def test_folder_and_manifest(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    train, val = _make(source, out)
    assert (train.split, train.found, train.written, train.quarantined, train.shards) == ("train", 11, 9, 2, 3)
    assert (val.split, val.found, val.written, val.quarantined, val.shards) == ("val", 3, 3, 0, 1)
    assert train.changed == {"cmyk": 1, "renamed": 1}
    manifest = json.loads((out / "train/manifest.json").read_text())
    assert manifest["classes"] == ["ant", "bee", "cow"]
    assert manifest["settings"] == {"seed": 0, "per_shard": 4}
    assert manifest["counts"] == {
        "found": 11,
        "written": 9,
        "changed": {"cmyk": 1, "renamed": 1},
        "quarantined": 2,
    }
    for shard in manifest["shards"]:
        path = out / "train" / shard["name"]
        assert (path.stat().st_size, file_digest(path)) == (shard["size_bytes"], shard["digest"])
    assert sum(shard["samples"] for shard in manifest["shards"]) == 9
    assert not list(out.rglob("*.tmp-*"))


def test_quarantine_names_file_and_reason(source: Path, tmp_path: Path) -> None:
    _make(source, tmp_path / "out")
    lines = (tmp_path / "out/train/quarantine.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [
        {"path": "train/cow/empty.jpg", "reason": "empty file"},
        {
            "path": "train/cow/page.jpg",
            "reason": "not an image: a web page (of a login, an error, or about the file), not the file itself; "
            "take its download link",
        },
    ]
    assert (tmp_path / "out/val/quarantine.jsonl").read_text() == ""


def test_members_are_plain_ustar_and_image_comes_first(source: Path, tmp_path: Path) -> None:
    _make(source, tmp_path / "out")
    members = _members(tmp_path / "out", "train")
    assert len(members) == 18
    for image, label in zip(members[::2], members[1::2], strict=True):
        key, _, extension = image.name.partition(".")
        assert extension == ("png" if key == "ant/1" else "jpg")
        assert label.name == f"{key}.cls"
        assert (image.mtime, label.mtime) == (0, 0)
        assert not image.pax_headers
    with open(next((tmp_path / "out/train").glob("*.tar")), "rb") as file:
        assert file.read(265)[257:] == b"ustar\00000"


def test_plain_images_are_kept_and_labels_fit(source: Path, tmp_path: Path) -> None:
    # Imported here because spawned workers import this module, and webdataset imports torch.
    from webdataset.handlers import reraise_exception
    from webdataset.tariterators import group_by_keys, tar_file_expander

    _make(source, tmp_path / "out")
    samples: dict[str, Any] = {}
    for path in sorted((tmp_path / "out/train").glob("*.tar")):
        with open(path, "rb") as file:  # webdataset.WebDataset does not close what it opens
            found = tar_file_expander([{"url": str(path), "stream": file}], handler=reraise_exception)
            samples |= {sample["__key__"]: sample for sample in group_by_keys(found)}
    assert len(samples) == 9
    for key, sample in samples.items():
        name, number = key.split("/")
        assert int(sample["cls"]) == ["ant", "bee", "cow"].index(name)
        if key == "ant/1":
            assert sample["png"] == (source / "train/ant/1.JPEG").read_bytes()
        elif key != "bee/1":
            assert sample["jpg"] == (source / f"train/{name}/{number}.JPEG").read_bytes()
    with Image.open(io.BytesIO(samples["bee/1"]["jpg"])) as image:
        assert image.mode == "RGB"


def test_dalis_own_reader_reads_the_shards(source: Path, tmp_path: Path) -> None:
    from nvidia.dali import fn, pipeline_def

    _make(source, tmp_path / "out")
    tars = sorted((tmp_path / "out/train").glob("*.tar"))

    @pipeline_def(batch_size=9, num_threads=1, device_id=None)  # type: ignore[untyped-decorator]
    def graph() -> object:
        outputs: Any = fn.readers.webdataset(
            paths=[str(path) for path in tars],
            ext=["jpg;jpeg;png;webp", "cls"],
            missing_component_behavior="error",
        )
        return tuple(outputs)

    pipeline = graph()
    pipeline.build()
    images, labels = pipeline.run()
    index = open_index(tmp_path / "out/train")
    for row in range(9):
        assert len(images.at(row)) == index.size[row]
        assert int(bytes(labels.at(row))) == index.label[row]


def test_rows_are_shuffled_once_by_the_seed(source: Path, tmp_path: Path) -> None:
    _make(source, tmp_path / "a", seed=3)
    _make(source, tmp_path / "b", seed=4)
    keys = [list(open_index(tmp_path / name / "train").keys()) for name in "ab"]
    images = list_splits(source)[0].images
    order = np.random.Generator(np.random.Philox(3)).permutation(11)
    assert keys[0] == [images[row].key for row in order if images[row].key not in ("cow/empty", "cow/page")]
    assert keys[0] != keys[1]
    assert sorted(keys[0]) == sorted(keys[1])


def test_images_without_labels(tmp_path: Path) -> None:
    for number in range(3):
        _write(tmp_path / f"source/{number}.png", _jpeg(number, "PNG"))
    (report,) = _make(tmp_path / "source", tmp_path / "out")
    assert (report.split, report.classes, report.written) == ("train", 0, 3)
    assert {member.name.partition(".")[2] for member in _members(tmp_path / "out", "train")} == {"png"}


def test_same_input_same_bytes_with_any_number_of_workers(source: Path, tmp_path: Path) -> None:
    _make(source, tmp_path / "a")
    _make(source, tmp_path / "b", workers=2)
    assert _state(tmp_path / "a") == _state(tmp_path / "b")


def test_a_second_run_does_nothing(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    _make(source, out)
    times = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.name != ".lock"}
    reports = _make(source, out)
    assert [report.new for report in reports] == [False, False]
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.name != ".lock"} == times
    said = " ".join(report.summary() for report in reports)
    assert f"nothing to do; train: 9 of 11 images in 3 shards in {out}/train; 2 changed (1 cmyk, 1 renamed)" in said
    assert f"2 quarantined, see {out}/train/quarantine.jsonl" in said


def test_lost_and_cut_shards_are_written_again(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    _make(source, out)
    state = _state(out)
    (out / "train/train-000001.tar").unlink()
    os.truncate(out / "train/train-000002.tar", 512)
    kept = (out / "train/train-000000.tar").stat().st_mtime_ns
    assert [report.new for report in _make(source, out)] == [True, False]
    assert _state(out) == state
    assert (out / "train/train-000000.tar").stat().st_mtime_ns == kept


@pytest.mark.parametrize("complete", [True, False])
def test_a_finished_shard_that_was_damaged_is_written_again(
    source: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], complete: bool
) -> None:
    """One flipped bit, at the same length."""
    out = tmp_path / "out"
    _make(source, out)
    state = _state(out)
    if not complete:
        (out / "train/manifest.json").unlink()
        (out / "train/train-000002.tar").unlink()
    path = out / "train/train-000000.tar"
    data = bytearray(path.read_bytes())
    data[1000] ^= 4
    path.write_bytes(data)
    _make(source, out)
    assert f"{path} is damaged (its digest is not the recorded one); it is written again\n" in capfd.readouterr().err
    assert _state(out) == state
    assert verify_folder(out / "train", deep=True).problems == []


def test_an_index_that_was_damaged_is_built_again(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    _make(source, out)
    state = _state(out)
    for damage in (Path.unlink, lambda path: path.write_bytes(path.read_bytes()[:-1] + b"?")):
        damage(out / "train/index.safetensors")
        _make(source, out)
        assert _state(out) == state
    assert [report.new for report in _make(source, out)] == [False, False]


def _run_and_die(source: Path, out: Path, after: int) -> None:
    """Make shards, but die by SIGKILL at the call number `after` that makes something durable."""
    calls = iter(range(after))

    def dying(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            if next(calls, None) is None:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args)

        return call

    for name in ("fsync", "replace", "unlink"):
        setattr(os, name, dying(getattr(os, name)))
    sys.stderr = open(os.devnull, "w")
    _make(source, out, per_shard=3)


def test_killed_anywhere_it_runs_on_to_the_same_bytes(tmp_path: Path) -> None:
    """SIGKILL before each fsync, rename and removal in turn."""
    source, whole = tmp_path / "source", tmp_path / "whole"
    for number in range(4):
        _write(source / f"a/{number}.jpg", _jpeg(number))
    _write(source / "a/bad.jpg", b"no image")
    _make(source, whole, per_shard=3)
    expected, manifest = _state(whole), (whole / "train/manifest.json").read_bytes()
    context = multiprocessing.get_context("fork")  # a spawned child would import for seconds, each time
    for after in range(200):
        out = tmp_path / f"killed-{after}"
        child = context.Process(target=_run_and_die, args=(source, out, after))
        child.start()
        child.join(300)
        if child.exitcode == 0:
            assert after > 20, "there must be something to die at"
            return
        assert child.exitcode == -signal.SIGKILL
        left = out / "train/manifest.json"
        assert not left.exists() or left.read_bytes() == manifest
        _make(source, out, per_shard=3)
        assert _state(out) == expected, after
    pytest.fail("the child never came to its end")


def test_a_full_disk_leaves_nothing_half_written(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    real = shard_writer._write_sample
    written = 0

    def write(*arguments: Any) -> None:
        nonlocal written
        written += 1
        if written > 6:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(shard_writer, "_write_sample", write)
        with pytest.raises(OSError, match="No space left on device"):  # the command line knows the remedy
            _make(source, out)
    assert [path.name for path in (out / "train").glob("*") if path.is_file()] == ["train-000000.tar"]
    _make(source, out)
    _make(source, tmp_path / "whole")
    assert _state(out) == _state(tmp_path / "whole")


def test_leftovers_of_the_dead_are_swept_and_of_the_living_kept(source: Path, tmp_path: Path) -> None:
    tar = tmp_path / "out/train/train-000000.tar"
    dead, alive = left_behind(tar), left_behind(tar, process=os.getppid())
    _make(source, tmp_path / "out")
    assert (dead.exists(), alive.exists()) == (False, True)


def test_a_shard_of_bad_images_alone_has_no_tar(source: Path, tmp_path: Path) -> None:
    (train, _) = _make(source, tmp_path / "out", per_shard=1)
    assert (train.shards, train.written) == (9, 9)
    assert len(list((tmp_path / "out/train").glob("*.tar"))) == 9
    assert [report.new for report in _make(source, tmp_path / "out", per_shard=1)] == [False, False]


def test_nothing_decodable(tmp_path: Path) -> None:
    for number in range(3):
        _write(tmp_path / f"source/a/{number}.jpg", b"no image")
    for _ in range(2):
        with pytest.raises(
            DataError, match=r"all 3 images of split train in .* were quarantined; see .*out/train/quarantine\.jsonl"
        ):
            _make(tmp_path / "source", tmp_path / "out")
    assert len((tmp_path / "out/train/quarantine.jsonl").read_text().splitlines()) == 3
    _write(tmp_path / "source/a/4.jpg", _jpeg(1))
    (report,) = _make(tmp_path / "source", tmp_path / "out")
    assert report.written == 1


def test_other_settings_are_refused(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    _make(source, out)
    state = _state(out)
    remedy = r"; take another OUT, or remove .*out/train to make it anew"
    with pytest.raises(MismatchError, match=r"else \(settings\.seed is 0 there, 1 here\)" + remedy):
        _make(source, out, seed=1)
    with pytest.raises(MismatchError, match=r"else \(settings\.per_shard is 4 there, 5 here\)" + remedy):
        _make(source, out, per_shard=5)
    _write(source / "train/ant/new.jpg", _jpeg(1))
    with pytest.raises(
        MismatchError,
        match=r"else \(source\.images is 11 there, 12 here, source\.listing is \w+ there, .*\)" + remedy,
    ):
        _make(source, out)
    assert _state(out) == state


def test_an_interrupted_run_is_compared_too(source: Path, tmp_path: Path) -> None:
    _make(source, tmp_path / "out")
    (tmp_path / "out/train/manifest.json").unlink()
    with pytest.raises(MismatchError, match=r"settings\.seed is 0 there, 1 here"):
        _make(source, tmp_path / "out", seed=1)


def test_other_formats_and_strangers_are_refused(source: Path, tmp_path: Path) -> None:
    _make(source, tmp_path / "a")
    manifest = tmp_path / "a/train/manifest.json"
    manifest.write_text(manifest.read_text().replace('"version": 1', '"version": 9'))
    with pytest.raises(MismatchError, match="version is 9 there, 1 here"):
        _make(source, tmp_path / "a")
    manifest.write_text("[]")
    with pytest.raises(MismatchError, match="format is None there, bowstore-shards here"):
        _make(source, tmp_path / "a")
    _write(tmp_path / "b/train/mine.tar", b"")
    with pytest.raises(
        MismatchError, match=r"holds shards that `bowstore shards` did not write, for example mine\.tar"
    ):
        _make(source, tmp_path / "b")


def test_classes_of_train_bind_val(source: Path, tmp_path: Path) -> None:
    """A class that only train gains changes what val's labels mean."""
    _make(source, tmp_path / "out")
    manifest = tmp_path / "out/val/manifest.json"
    manifest.write_text(manifest.read_text().replace('    "cow"', '    "cat"'))
    with pytest.raises(MismatchError, match="holds shards of other classes, not of these 3"):
        _make(source, tmp_path / "out")


def test_arguments_and_places(source: Path, tmp_path: Path) -> None:
    with pytest.raises(MissingError, match=r"no folder .*nowhere"):
        make_shards(tmp_path / "nowhere", tmp_path / "out")
    for inside in (source, source / "shards"):
        with pytest.raises(UsageError, match=r"lies in the source .*source; shards need a folder outside it"):
            make_shards(source, inside)
    with pytest.raises(UsageError, match=r"the source .*/source/train lies in .*source/train, where shards would go"):
        make_shards(source / "train", source)
    _write(tmp_path / "file", b"")
    with pytest.raises(UsageError, match="file is a file, not a folder; take another name"):
        make_shards(source, tmp_path / "file")
    with pytest.raises(NotADirectoryError, match=r"file"):  # the command line knows the remedy
        make_shards(source, tmp_path / "file/out")
    assert not (tmp_path / "out").exists()


def test_two_runs_at_once(source: Path, tmp_path: Path) -> None:
    with (
        exclusive_lock(tmp_path / "out/.lock", "x"),
        pytest.raises(BusyError, match=r"out is in use by process \d+ on"),
    ):
        _make(source, tmp_path / "out")


def _write_one(root: Path, images: list[ImageFile], advance: Callable[[int], None] = lambda _count: None) -> Record:
    (root / ".parts").mkdir(exist_ok=True)
    job = ShardJob(root, "plan", "train-000000.tar", images)
    (record,) = write_shards(Source(root, "folder"), [job], 1, advance)
    return record


def test_a_source_that_changes_underneath(tmp_path: Path) -> None:
    _write(tmp_path / "a.jpg", _jpeg(1))
    found = (tmp_path / "a.jpg").stat()
    for size, stamp in ((found.st_size + 1, found.st_mtime_ns), (found.st_size, found.st_mtime_ns + 1)):
        with pytest.raises(DataError, match=r"a\.jpg changed after it was listed: the source is changing; run again"):
            _write_one(tmp_path, [ImageFile("a.jpg", "a", -1, size, stamp)])
    with pytest.raises(MissingError, match=r"b\.jpg is not there; bring it there"):
        _write_one(tmp_path, [ImageFile("b.jpg", "b", -1, found.st_size, found.st_mtime_ns)])
    assert not list(tmp_path.glob("*.tar"))


def test_dangling_links_are_quarantined(tmp_path: Path) -> None:
    record = _write_one(tmp_path, [ImageFile("gone.jpg", "gone", -1, -1, 0)])
    assert record.quarantined == [{"path": "gone.jpg", "reason": "link to a file that does not exist"}]


def test_progress_hears_of_every_image(tmp_path: Path) -> None:
    _write(tmp_path / "a.jpg", _jpeg(1))
    found = (tmp_path / "a.jpg").stat()
    images = [ImageFile("a.jpg", f"a{number}", -1, found.st_size, found.st_mtime_ns) for number in range(120)]
    heard: list[int] = []
    _write_one(tmp_path, images, heard.append)
    assert heard == [1] * 120


def _die(*_arguments: object) -> None:
    os._exit(7)


def test_a_dead_worker_is_one_line(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard_writer, "_write_in_worker", _die)
    with pytest.raises(
        BowstoreError, match=r"a worker process died .*finished shards are kept: .* with fewer workers than 2"
    ):
        _make(source, tmp_path / "out", workers=2)


def _tool(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(_TOOL), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_the_tool(source: Path, tmp_path: Path) -> None:
    _make(source, tmp_path / "out")
    done = _tool(source, tmp_path / "out", "--per-shard", 4, "--workers", 1)
    assert done.returncode == 0
    assert "nothing to do; train: 9 of 11 images in 3 shards" in done.stdout
    done = _tool(source, source / "out")
    assert done.returncode == 2
    assert done.stderr.startswith("Error: ")
    assert len(done.stderr.splitlines()) == 1
