"""The commands on shards and stores that lie on an HTTP server and in S3: the same words, keys and metrics."""

import dataclasses
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import yaml
from click.testing import CliRunner, Result
from servers import serve, serve_s3, upload
from shard_sets import ShardMaker

from bowstore.cli import main
from bowstore.config import StorageConfig
from bowstore.data.index import Index, open_index
from bowstore.data.reader import ShardReader, fetched, read_mode
from bowstore.errors import BowstoreError, CorruptError, UsageError
from bowstore.models.saved import network_of, save_backbone
from bowstore.runs import read_metrics

SPLITS = ("train", "val")
VIEW = {"size": 16, "resize": 16}
MODEL = {"arch": "wrn-10-1", "strides": [2, 2, 1]}
TRAIN = {
    "name": "local",
    "task": "words",
    "view": VIEW,
    "model": MODEL,
    "optim": {"batch": 16, "epochs": 1, "steps_per_epoch": 2},
    "runtime": {"log_every_steps": 1, "threads": 1, "device": "cpu"},
}


@pytest.fixture
def workspace(make_shard_set: ShardMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A workspace with a teacher, a configuration, and in `there` what will be served: shards/train and shards/val."""
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    make_shard_set(48, per_shard=12, folder="there/shards/train")
    make_shard_set(16, per_shard=16, folder="there/shards/val", first=48)
    teacher = {"name": "t", "task": "rotation", "view": {**VIEW, "cutmix": False}, "model": MODEL}
    network = network_of(teacher, "test")
    save_backbone(Path("teacher.safetensors"), network.fresh(), network)
    Path("train.yaml").write_text(yaml.safe_dump(TRAIN))
    storage = {"cache": str(tmp_path / "cache"), "retries": 1, "timeout_s": 20}
    Path("bowstore.yaml").write_text(yaml.safe_dump({"shards": "there/shards/train", "storage": storage}))
    return tmp_path


@contextmanager
def served(protocol: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The URL of a server that has what lies in `there` now."""
    if protocol == "http":
        with serve(Path("there")) as server:
            yield server.url
    else:
        with serve_s3(monkeypatch) as endpoint:
            upload(endpoint, Path("there"), "folder")
            yield "s3://bucket/folder"


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(a) for a in arguments])


def call(*arguments: object) -> str:
    result = invoke(*arguments)
    assert result.exit_code == 0, result.output
    return result.stdout


def encode(store: str, *arguments: object) -> None:
    command = ["encode", "--layer", "block3", "--K", 8, "--iterations", 2, "--teacher", "teacher.safetensors"]
    call(*command, "--device", "cpu", "--store", store, *arguments)


def learned(name: str) -> list[tuple[object, ...]]:
    """What a run saw and learned: the digest of its keys, and its loss."""
    return [(line["step"], line["order"], line["loss"]) for line in read_metrics(Path("runs") / name)]


@pytest.mark.parametrize("protocol", ["http", "s3"])
def test_remote_shards_and_store_give_the_same_words_and_run(
    workspace: Path, monkeypatch: pytest.MonkeyPatch, protocol: str
) -> None:
    encode("there/words.zarr")
    call("train", "--config", "train.yaml", "--store", "there/words.zarr")
    with served(protocol, monkeypatch) as url:
        encode("copy.zarr", "--shards", f"{url}/shards/train")
        digests = [call("verify", store, "--digest").splitlines()[-1] for store in ("there/words.zarr", "copy.zarr")]
        assert digests[0] == digests[1]
        places = ["--shards", f"{url}/shards/train", "--store", f"{url}/words.zarr"]
        call("train", "--config", "train.yaml", "--name", "remote", *places)
        assert learned("remote") == learned("local")
        assert len(learned("remote")) == 2
        assert yaml.safe_load(Path("runs/remote/config.yaml").read_text())["task"]["store"].startswith(f"{protocol}:")
        assert "48 images in 4 shards" in call("verify", f"{url}/shards/train")
        assert "no problem found" in call("verify", f"{url}/words.zarr", "--shards", f"{url}/shards/train")


def test_remote_workspace(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything by bowstore.yaml: train shards and store there, and the test shards found beside the train shards."""
    encode("there/words.zarr")
    with served("http", monkeypatch) as url:
        settings = yaml.safe_load(Path("bowstore.yaml").read_text())
        settings |= {"shards": f"{url}/shards/train", "store": f"{url}/words.zarr"}
        Path("bowstore.yaml").write_text(yaml.safe_dump(settings))
        call("train", "--config", "train.yaml")
        report = json.loads(call("eval", "linear", "--run", "runs/local", "--device", "cpu", "--json"))
        assert report["settings"]["images"] == {"train": 48, "test": 16}
        result = invoke("encode", "--layer", "block3", "--K", 8, "--teacher", "teacher.safetensors")
        assert result.exit_code == 2
        line = f"Error: {url}/words.zarr is on another machine; encode into a --store on this machine and copy it"
        assert f"{line} there by `bowstore push STORE URL`\n" in result.stderr
        for command in (["shards", "there"], ["index"]):
            result = invoke(*command, f"{url}/new")
            assert (result.exit_code, result.stderr.count("/new is on another machine; ")) == (2, 1)
        result = invoke("verify", f"{url}/words.zarr", "--repair")
        assert result.exit_code == 2
        assert "run `bowstore verify --repair` where it lies" in result.stderr
        result = invoke("verify", f"{url}/nothing")
        assert result.exit_code == 1
        assert f"Error: {url}/nothing/index.safetensors is not there (404)" in result.stderr


def test_remote_copy_that_rots_is_found_and_fetched_again(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with served("http", monkeypatch) as url:
        call("verify", f"{url}/shards/train")
        (copy,) = workspace.glob("cache/remote/*/train-000001.tar")
        stat, data = copy.stat(), bytearray(copy.read_bytes())
        data[1000] ^= 1
        copy.write_bytes(data)
        os.utime(copy, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # the disk's fault: nobody wrote
        result = invoke("verify", f"{url}/shards/train")
        assert result.exit_code == 1
        assert "train-000001.tar" in result.stdout
        assert "1 damaged copies were removed" in call("verify", f"{url}/shards/train", "--repair")
        assert "no problem found" in call("verify", f"{url}/shards/train")
        original = Path("there/shards/train/train-000002.tar")
        original.write_bytes(original.read_bytes()[:-1] + b"x")
        next(workspace.glob("cache/remote/*/train-000002.tar")).unlink()
        result = invoke("verify", f"{url}/shards/train")
        assert f"{url}/shards/train/train-000002.tar is not the file that was recorded" in result.stdout
        assert result.exit_code == 1


def opened(url: str, workspace: Path, cache_bytes: float, **values: object) -> Index:
    storage = StorageConfig(cache=workspace / "small", cache_gb=cache_bytes / 1e9, retries=0, **values)
    return open_index(Path(url), storage)


def test_remote_set_larger_than_the_cache_is_read_in_order_but_not_trained_on(
    workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    local = ShardReader(open_index(Path("there/shards/train")))
    expected = [data.tobytes() for data in local.read(np.arange(48))]
    largest = max(path.stat().st_size for path in Path("there/shards/train").glob("*.tar"))
    with served("http", monkeypatch) as url:
        index = opened(f"{url}/shards/train", workspace, 3.9 * largest)
        assert read_mode(index) == "pread"
        source = ShardReader(fetched(index))
        for start in range(0, 48, 8):
            rows = np.arange(start, start + 8)
            assert [data.tobytes() for data in source.read(rows)] == expected[start : start + 8]
            here = sum(path.stat().st_size for path in workspace.glob("small/**/*") if path.is_file())
            assert here <= 3.9 * largest + 5000  # and the records and locks, which are small
        with pytest.raises(UsageError, match=r"^data set http.*/shards/train has .* MB, and the cache .* may hold"):
            fetched(index, whole=True)
        del source  # it has two tars open
        fetched(index, images=24, whole=True)  # these do fit
        with pytest.raises(UsageError, match="holds fewer than three of them; raise it"):
            ShardReader(opened(f"{url}/shards/train", workspace, 2.9 * largest))


def test_remote_tars_in_use_stay(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {split: sum(p.stat().st_size for p in Path(f"there/shards/{split}").glob("*.tar")) for split in SPLITS}
    with served("http", monkeypatch) as url:
        for way in ("mmap", "pread"):
            index = opened(f"{url}/shards/train", workspace, sum(sizes.values()) - 1, read=way)
            source = ShardReader(fetched(index))
            source.read(np.arange(48))
            other = opened(f"{url}/shards/val", workspace, sum(sizes.values()) - 1)
            with pytest.raises(BowstoreError, match="in use; wait for the other runs to end"):
                fetched(other)
            del source
            fetched(other)
            assert len(list(workspace.glob("small/remote/*/*.tar"))) < 5


def test_remote_tar_that_left_the_cache_is_fetched_again(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with served("http", monkeypatch) as url:
        index = opened(f"{url}/shards/train", workspace, 1e9, read="mmap")
        before = [data.tobytes() for data in ShardReader(fetched(index)).read(np.arange(48))]
        for path in workspace.glob("small/remote/*/*.tar"):
            path.unlink()
        assert [data.tobytes() for data in ShardReader(index).read(np.arange(48))] == before


def test_remote_index_of_other_shards_is_noticed(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with served("http", monkeypatch) as url:
        index = opened(f"{url}/shards/train", workspace, 1e9)
        (folder,) = index.folders
        wrong = folder._replace(shards=(folder.shards[0]._replace(digest="0" * 32), *folder.shards[1:]))
        with pytest.raises(CorruptError, match=r"train-000000\.tar is not the file that was recorded"):
            fetched(dataclasses.replace(index, folders=(wrong,)))
