"""What macOS and file servers leave in every folder is passed over wherever a folder is listed."""

import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner
from source_sets import tiny_image, write_file
from voc_devkit import write_devkit

from bowstore.cli import main
from bowstore.config import Workspace
from bowstore.data.config import ShardsConfig
from bowstore.data.index import build_index, open_index
from bowstore.data.shards import make_shards
from bowstore.data.sources import list_source
from bowstore.errors import MissingError
from bowstore.evaluate.voc import read_split
from bowstore.runs import result_paths
from bowstore.workspace import find_run, newest_run

APPLE_DOUBLE = b"\0\x05\x16\x07\0\x02\0\0Mac OS X        " + bytes(80)


def _litter(folder: Path) -> None:
    """A ._NAME beside every file below a folder, and thumbnails of a file server."""
    for path in [path for path in folder.rglob("*") if path.is_file()]:
        write_file(path.with_name(f"._{path.name}"), APPLE_DOUBLE)
    for path in [folder, *(path for path in folder.rglob("*") if path.is_dir())]:
        write_file(path / "@eaDir/x.tar/SYNO_THUMB.jpg", tiny_image(1))


def test_a_devkit_from_a_mac(tmp_path: Path) -> None:
    voc = write_devkit(tmp_path)
    splits = {split: read_split(voc, split) for split in ("trainval", "test")}
    _litter(tmp_path)
    for split, expected in splits.items():
        found = read_split(voc, split)  # type: ignore[arg-type]
        assert (found.classes, found.fingerprint) == (expected.classes, expected.fingerprint)
        assert [found.open().name(row) for row in found.rows] == [expected.open().name(row) for row in expected.rows]
    listed = list_source(tmp_path)
    assert [len(split.images) for split in listed.splits] == [24, 15]
    assert "images" not in listed.passed_over.counts


def test_shards_from_a_mac(tmp_path: Path) -> None:
    for number in range(3):
        write_file(tmp_path / f"source/train/ant/{number}.jpg", tiny_image(number))
    make_shards(tmp_path / "source", tmp_path / "out", ShardsConfig(per_shard=2, workers=1))
    before = open_index(tmp_path / "out/train").fingerprint
    _litter(tmp_path / "out")
    done = CliRunner().invoke(main, ["verify", str(tmp_path / "out"), "--deep", "--workers", "1"])
    assert done.exit_code == 0, done.output
    (report,) = make_shards(tmp_path / "source", tmp_path / "out", ShardsConfig(per_shard=2, workers=1))
    assert not report.new
    (tmp_path / "out/train/index.safetensors").unlink()
    assert build_index(tmp_path / "out/train").fingerprint == before
    shutil.rmtree(tmp_path / "out/train")
    write_file(tmp_path / "out/train/._train-000000.tar", APPLE_DOUBLE)
    (report,) = make_shards(tmp_path / "source", tmp_path / "out", ShardsConfig(per_shard=2, workers=1))
    assert report.new


def test_runs_and_results_from_a_mac(tmp_path: Path) -> None:
    for name in ("config.yaml", "backbone.safetensors", "eval/x.json"):
        write_file(tmp_path / "runs/._a" / name, APPLE_DOUBLE)
        write_file(tmp_path / "runs/b" / f"{Path(name).parent}/._{Path(name).name}", APPLE_DOUBLE)
    assert result_paths(tmp_path / "runs/b") == []
    workspace = Workspace(runs=tmp_path / "runs")
    with pytest.raises(MissingError, match=r"runs in .*runs: none"):
        find_run(workspace, "a")
    with pytest.raises(MissingError, match="no finished run in"):
        newest_run(workspace)
