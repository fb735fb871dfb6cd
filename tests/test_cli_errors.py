"""Faults of the file system, as a user meets them: one line with the path and the remedy."""

import errno
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from shard_sets import ShardMaker

from bowstore.cli import main
from bowstore.data.pipeline import _undecodable
from bowstore.errors import CorruptError
from bowstore.models.layouts import load_foreign
from bowstore.words import verify as words_verify
from bowstore.words.verify import VerifyReport


@pytest.mark.parametrize(
    ("number", "remedy"),
    [
        (errno.ENOTDIR, "a file lies where a folder is needed: name another path, or move the file away"),
        (errno.EISDIR, "a folder lies where a file is needed: name another path, or move the folder away"),
        (errno.EROFS, "name a path on a disk that can be written"),
        (errno.EACCES, "give yourself the permission, or name another path"),
        (errno.ENOSPC, "free some space and run the command again: it goes on where it stopped"),
    ],
)
def test_system_errors_say_what_to_do(monkeypatch: pytest.MonkeyPatch, number: int, remedy: str) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number), "/data/words")

    monkeypatch.setattr("bowstore.verify.verify_path", fail)
    result = CliRunner().invoke(main, ["verify", "x"])
    assert result.exit_code == 1
    assert result.stderr.startswith("Error: ")
    assert "(/data/words); " in result.stderr
    assert remedy in result.stderr
    assert result.stderr.count("\n") == 1


def test_a_store_below_a_file_says_so(make_shard_set: ShardMaker, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    where = ["--shards", str(make_shard_set(4).root), "--store", str(tmp_path / "file/x.zarr")]
    result = CliRunner().invoke(main, ["encode", "--teacher", "resnet18", "--layer", "conv4", "--K", "4", *where])
    assert result.exit_code == 1
    assert "a file lies where a folder is needed" in result.stderr


def test_repair_that_cannot_write_still_tells_the_damage(
    make_shard_set: ShardMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> int:
        raise OSError(errno.EROFS, "Read-only file system")

    (tmp_path / "zarr.json").touch()
    report = VerifyReport(tmp_path, problems=["chunk 1 is damaged"], damaged={"conv4": [1]})
    monkeypatch.setattr(words_verify, "verify", lambda *_: report)
    monkeypatch.setattr(words_verify, "discard_damaged", fail)
    result = CliRunner().invoke(main, ["verify", str(tmp_path), "--repair"])
    assert result.exit_code == 1
    assert "chunk 1 is damaged" in result.output
    assert f"nothing was taken back: {tmp_path} cannot be written (Read-only file system)" in result.output


def test_shards_that_are_not_there_are_not_asked_to_be_indexed(tmp_path: Path) -> None:
    result = CliRunner().invoke(
        main, ["encode", "--teacher", "resnet18", "--shards", str(tmp_path / "nope"), "--layer", "conv4", "--K", "4"]
    )
    assert f"no folder {tmp_path / 'nope'}; name the one that holds the shards" in result.stderr


def test_messages_of_libraries_are_not_passed_on(tmp_path: Path) -> None:
    class Bytes:
        def read(self, rows: np.ndarray) -> list[np.ndarray]:
            return [np.frombuffer(b"no image", np.uint8) for _ in rows]

        def name(self, row: int) -> str:
            return f"image{row}"

    text = _undecodable(Bytes(), np.arange(1))  # type: ignore[arg-type]
    assert text.startswith("image 'image0' cannot be decoded (no format that Pillow knows); remove it")
    (tmp_path / "rand.pth").write_bytes(np.random.default_rng(0).bytes(3000))
    with pytest.raises(CorruptError) as caught:
        load_foreign(torch.nn.Linear(1, 1), tmp_path / "rand.pth")  # type: ignore[arg-type]
    assert "weights_only" not in str(caught.value)
