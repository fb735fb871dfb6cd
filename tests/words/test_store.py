import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import xxhash
import zarr
from left_behind import left_behind
from numpy.typing import NDArray

from bowstore.errors import BusyError, CorruptError, MismatchError, MissingError, UsageError
from bowstore.words.store.arrays import array_digest, remove, sweep_leftovers
from bowstore.words.store.join import join_rows
from bowstore.words.store.layer import LayerSpec, chunk_rows
from bowstore.words.store.nearest import NearestSearch
from bowstore.words.store.statistics import word_statistics
from bowstore.words.store.store import Store, open_store
from bowstore.words.store.verify import digest, discard_damaged, verify
from bowstore.words.store.writer import StoreWriter, create_store, store_lock

N, GRID, K, C = 70, (3, 2), 11, 4
KEYS = [f"img{i:04d}" for i in range(N)]


@dataclass
class Keys:
    names: list[str]
    fingerprint: str = "f" * 32

    @property
    def key_hash(self) -> NDArray[np.uint64]:
        return np.array([xxhash.xxh3_64_intdigest(name.encode()) for name in self.names], np.uint64)

    @property
    def digest(self) -> NDArray[np.uint64]:
        return np.array([xxhash.xxh3_64_intdigest(f"image of {name}".encode()) for name in self.names], np.uint64)

    def key(self, row: int) -> str:
        return self.names[row]


def spec(**values: object) -> LayerSpec:
    base: dict[str, object] = {
        "teacher": {"arch": "wrn-10-1", "layer": "block3", "weights_sha256": "0" * 64, "name": "r"},
        "view": {"size": 16, "resize": 16, "squash": False, "mean": [0, 0, 0], "std": [1, 1, 1]},
        "vocabulary": {"seed": 0},
        "num_words": K,
        "grid": GRID,
        "channels": C,
    }
    return LayerSpec(**{**base, **values})  # type: ignore[arg-type]


def some_words(seed: int = 0) -> NDArray[np.uint16]:
    return np.random.default_rng(seed).integers(0, K, (N, *GRID)).astype(np.uint16)


def some_vocabulary() -> NDArray[np.float32]:
    return np.random.default_rng(1).normal(size=(K, C)).astype(np.float32)


def finish(writer: StoreWriter, words: NDArray[np.uint16], layer: str = "conv4") -> None:
    for chunk in np.flatnonzero(writer.layer(layer).chunk_digests() == 0).tolist():
        writer.write_chunk(layer, chunk, words[writer.layer(layer).rows(chunk)])
    search, what = NearestSearch(K), writer.layer(layer)
    search.add_batch(np.arange(N), words.reshape(N, -1), some_distances(words))
    writer.mark_complete(layer, word_statistics([words], what.num_words), search.result())


def some_distances(words: NDArray[np.uint16]) -> NDArray[np.float32]:
    return np.random.default_rng(2).random((N, words[0].size)).astype(np.float32)


def begin(path: Path, keys: Keys | None = None) -> StoreWriter:
    keys = keys or Keys(KEYS)
    writer = create_store(path, fingerprint=keys.fingerprint, key_hash_N=keys.key_hash, image_digest_N=keys.digest)
    writer.add_layer("conv4", spec(), some_vocabulary())
    return writer


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("store") / "words.zarr"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("bowstore.words.store.layer.MIN_CHUNK_BYTES", 1)
        patch.setattr("bowstore.words.store.layer.CHUNK_STEP_ROWS", 20)
        finish(begin(path), some_words())
    return path


@pytest.fixture
def path(sound: Path, tmp_path: Path, small_chunks: int) -> Path:
    """A sound store of one layer in four chunks, to do with as one likes."""
    return Path(shutil.copytree(sound, tmp_path / "words.zarr"))


def test_reads_back_what_was_written(path: Path) -> None:
    store = open_store(path, "conv4")
    assert len(store) == N
    assert store.layers == ("conv4",)
    assert np.array_equal(store.load_words(), some_words())
    assert store.load_words().dtype == np.uint16
    assert np.array_equal(store.vocabulary("conv4"), some_vocabulary())
    assert store.layer().read_array("document_frequency")[3] == (some_words() == 3).any(axis=(1, 2)).sum()
    assert store.layer().attributes["teacher"]["arch"] == "wrn-10-1"


def test_plain_zarr_reads_it(path: Path) -> None:
    group = zarr.open_group(path, mode="r")
    words = group["conv4/words"]
    assert isinstance(words, zarr.Array)
    assert np.array_equal(np.asarray(words[:]), some_words())
    assert words.fill_value == 65535
    metadata = json.loads((path / "conv4/words/zarr.json").read_text())
    assert metadata["codecs"][-1]["configuration"]["checksum"] is True
    assert group.attrs["format_version"] == 3


def test_chunks_hold_a_mebibyte_or_the_whole_small_set() -> None:
    assert chunk_rows(1_281_167, (14, 14)) == 3072
    assert 2 * 14 * 14 * 3072 >= 1 << 20 > 2 * 14 * 14 * 1536
    assert chunk_rows(1_281_167, (7, 7)) == 12288
    assert chunk_rows(500, (14, 14)) == 500


def test_size_is_two_bytes_a_location_and_two_hashes(tmp_path: Path) -> None:
    images, grid, k = 6000, (14, 14), 65535  # the worst case: all ids, evenly used
    keys = np.random.default_rng(0).integers(1, 2**63, images).astype(np.uint64)
    writer = create_store(tmp_path / "s", fingerprint="f", key_hash_N=keys, image_digest_N=keys)
    layer = writer.add_layer("conv4", spec(num_words=k, grid=grid, channels=1), np.zeros((k, 1), np.float32))
    words = np.random.default_rng(0).integers(0, k, (images, *grid)).astype(np.uint16)
    for chunk in range(layer.chunks):
        writer.write_chunk("conv4", chunk, words[layer.rows(chunk)])
    parts = [tmp_path / "s" / name for name in ("conv4/words", "conv4/chunk_digest", "key_hash", "image_digest")]
    stored = sum(f.stat().st_size for part in parts for f in part.rglob("*") if f.is_file())
    assert stored / images <= 2 * 14 * 14 + 8 + 8 + 1


def test_refuses_what_is_no_store(tmp_path: Path) -> None:
    with pytest.raises(MissingError, match=r"no word store .*none\.zarr; `bowstore encode"):
        open_store(tmp_path / "none.zarr")
    with pytest.raises(MismatchError, match="is no Zarr group"):
        open_store(tmp_path)
    zarr.create_group(tmp_path / "other.zarr")
    with pytest.raises(MismatchError, match="not a bowstore word store"):
        open_store(tmp_path / "other.zarr")
    (tmp_path / "file").write_bytes(b"x")
    with pytest.raises(MismatchError, match="is no Zarr group"):
        open_store(tmp_path / "file")
    with pytest.raises(UsageError, match="exists already"):
        create_store(
            tmp_path / "file", fingerprint="f", key_hash_N=Keys(KEYS).key_hash, image_digest_N=Keys(KEYS).digest
        )


def test_refuses_another_format_version(path: Path) -> None:
    zarr.open_group(path, mode="r+").attrs.update({"format_version": 7})
    with pytest.raises(MismatchError, match=r"format version 7 \(written by bowstore .*\), this one reads 3"):
        open_store(path)


def test_refuses_an_incomplete_layer_and_says_how_far_it_is(tmp_path: Path, small_chunks: int) -> None:
    writer = begin(tmp_path / "s")
    writer.write_chunk("conv4", 1, some_words()[20:40])
    message = r"'conv4' .* is not complete: 1 of 4 chunks are written; run `bowstore encode` again"
    with pytest.raises(MismatchError, match=message):
        open_store(tmp_path / "s")
    assert any("1 of 4 chunks" in line for line in verify(tmp_path / "s").problems)
    with pytest.raises(UsageError, match="'conv4' has 1 of 4 chunks"):
        writer.mark_complete("conv4", word_statistics([some_words()], K), NearestSearch(K).result())


def test_a_second_layer_leaves_the_first_usable(path: Path) -> None:
    writer = StoreWriter(path)
    writer.add_layer("conv5", spec(grid=(1, 2)), some_vocabulary())
    store = open_store(path)
    assert store.layers == ("conv4",)
    assert np.array_equal(store.load_words(), some_words())
    with pytest.raises(MismatchError, match="0 of 4 chunks"):
        open_store(path, "conv5")
    with pytest.raises(MissingError, match="no layer 'conv3'; its layers: conv4"):
        open_store(path, "conv3")
    finish(writer, some_words(2)[:, :1], "conv5")
    assert set(open_store(path).layers) == {"conv4", "conv5"}
    with pytest.raises(UsageError, match="has 2 layers, name one; its layers: conv4, conv5"):
        open_store(path).load_words()


def test_a_layer_whose_creation_was_interrupted_is_made_anew(path: Path) -> None:
    writer = StoreWriter(path)
    writer.add_layer("conv5", spec(grid=(1, 2)), some_vocabulary())
    zarr.open_group(path, mode="r+").attrs.update({"layers": ["conv4"]})  # killed before it was listed
    writer = StoreWriter(path)
    assert writer.names == ("conv4",)
    assert verify(path).sound
    writer.add_layer("conv5", spec(grid=(3, 2)), some_vocabulary())
    finish(writer, some_words(2), "conv5")
    assert np.array_equal(open_store(path).load_words("conv5"), some_words(2))


def test_write_chunk_refuses_wrong_words(tmp_path: Path, small_chunks: int) -> None:
    writer = begin(tmp_path / "s")
    with pytest.raises(UsageError, match=r"conv4/words/c/0/0/0 \(rows 0-19\) takes uint16 \(20, 3, 2\)"):
        writer.write_chunk("conv4", 0, some_words()[:19])
    with pytest.raises(UsageError, match="word 11 is not below K = 11"):
        writer.write_chunk("conv4", 0, np.full((20, *GRID), K, np.uint16))
    assert not writer.layer("conv4").chunk_digests().any()


DAMAGE: dict[str, Callable[[bytes], bytes | None]] = {
    "deleted": lambda raw: None,
    "truncated": lambda raw: raw[: len(raw) // 2],
    "one byte short": lambda raw: raw[:-1],
    "bit flipped": lambda raw: raw[: len(raw) // 2] + bytes([raw[len(raw) // 2] ^ 4]) + raw[len(raw) // 2 + 1 :],
    "tail zeroed": lambda raw: raw[:-20] + bytes(20),
    "empty": lambda raw: b"",
    "doubled": lambda raw: raw + raw,
}


@pytest.mark.parametrize("name", DAMAGE)
@pytest.mark.parametrize("chunk", [0, 3])
def test_damaged_chunk_is_named_and_can_be_written_again(path: Path, name: str, chunk: int) -> None:
    before, file = digest(path), path / f"conv4/words/c/{chunk}/0/0"
    damaged = DAMAGE[name](file.read_bytes())
    file.unlink() if damaged is None else file.write_bytes(damaged)
    rows = f"{20 * chunk}-{min(20 * chunk + 19, N - 1)}"
    with pytest.raises(CorruptError, match=rf"conv4/words/c/{chunk}/0/0 \(rows {rows}\) of word store"):
        open_store(path).load_words()
    report = verify(path)
    assert len(report.problems) == 1
    assert f"conv4/words/c/{chunk}/0/0 (rows {rows})" in report.problems[0]
    assert report.damaged == {"conv4": [chunk]}
    assert discard_damaged(path, report) == 1
    with pytest.raises(MismatchError, match="3 of 4 chunks"):
        open_store(path)
    finish(StoreWriter(path), some_words())
    assert digest(path) == before
    assert verify(path).sound


def test_all_damage_of_a_layer_is_found_and_what_can_be_is_taken_back(path: Path) -> None:
    before = digest(path)
    (path / "conv4/words/c/0/0/0").write_bytes(b"")
    shutil.rmtree(path / "conv4/words/c/1")
    (path / "conv4/words/c/1/0/0").mkdir(parents=True)
    (path / "conv4/chunk_digest/c/2").write_bytes(b"x")
    (path / "conv4/document_frequency/c/0").write_bytes(b"x")
    report = verify(path)
    assert len(report.problems) == 4
    assert report.damaged == {"conv4": [0, 1, 2]}
    assert discard_damaged(path, report) == 3
    finish(StoreWriter(path), some_words())
    assert digest(path) == before
    assert verify(path).sound


def test_counts_are_made_anew(path: Path) -> None:
    (path / "conv4/document_frequency/c/0").write_bytes(b"x")
    report = verify(path)
    assert report.damaged == {"conv4": []}
    assert discard_damaged(path, report) == 0
    with pytest.raises(MismatchError, match="4 of 4 chunks"):
        open_store(path)
    finish(StoreWriter(path), some_words())
    assert verify(path).sound


def test_swapped_chunks_are_found(path: Path) -> None:
    first, second = path / "conv4/words/c/0/0/0", path / "conv4/words/c/1/0/0"
    raw = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(raw)  # both decode, both checksums hold
    with pytest.raises(CorruptError, match="differs from its recorded digest"):
        open_store(path).load_words()
    assert verify(path).damaged == {"conv4": [0, 1]}


@pytest.mark.parametrize("name", ["key_hash/c/0", "conv4/vocabulary/c/0/0", "conv4/document_frequency/c/0"])
@pytest.mark.parametrize("deleted", [True, False])
def test_other_damaged_arrays_are_named(path: Path, name: str, deleted: bool) -> None:
    if deleted:
        (path / name).unlink()
    else:
        (path / name).write_bytes((path / name).read_bytes()[:-3])
    report = verify(path)
    assert len(report.problems) == 1
    assert f"array {name.split('/c/')[0]} of word store" in report.problems[0]


@pytest.mark.parametrize("name", ["zarr.json", "conv4/zarr.json", "conv4/words/zarr.json", "key_hash/zarr.json"])
@pytest.mark.parametrize("content", ["", "[]", "{", '{"zarr_format": 3, "node_type": "array"}'])
def test_damaged_metadata_is_one_line(path: Path, name: str, content: str) -> None:
    (path / name).write_text(content)
    report = verify(path)
    assert not report.sound
    assert str(path) in report.problems[0]
    assert "\n" not in report.problems[0]


def test_missing_attribute_is_one_line(path: Path) -> None:
    zarr.open_group(path, mode="r+").attrs.update({"dataset": {"images": N}})
    with pytest.raises(CorruptError, match=r"word store .* cannot be read \('fingerprint'\)"):
        open_store(path)
    with pytest.raises(CorruptError, match=r"word store .* cannot be read \('fingerprint'\)"):
        StoreWriter(path)


def test_missing_metadata_is_found(path: Path) -> None:
    (path / "conv4/chunk_digest/zarr.json").unlink()
    with pytest.raises(CorruptError, match=r"layer 'conv4' .* \(array conv4/chunk_digest is missing\)"):
        open_store(path)


def test_no_digest_is_taken_for_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(xxhash, "xxh3_64_intdigest", lambda data: 0)
    assert array_digest(np.zeros(3, np.uint16)) == 1


def test_a_link_is_removed_and_not_what_it_points_to(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "there")
    remove(tmp_path / "link")
    assert not (tmp_path / "link").is_symlink()
    assert (tmp_path / "there" / "file").exists()


def test_words_outside_the_vocabulary_are_found(path: Path) -> None:
    group = zarr.open_group(path, mode="r+")
    group["conv4"].attrs.update({"words": 5})
    assert "holds word 10, which is not below K = 5" in "\n".join(verify(path).problems)


def test_left_temporary_files_are_swept(path: Path) -> None:
    left = [left_behind(path / "conv4/words/c/0/0/0"), left_behind(path / "zarr.json")]
    assert verify(path).sound
    sweep_leftovers(path)
    assert not any(file.exists() for file in left)
    assert verify(path).sound


def test_creation_is_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("bowstore.words.store.arrays.Arrays.create", fail)
        with pytest.raises(OSError, match="No space left"):
            begin(tmp_path / "s")
    assert list(tmp_path.iterdir()) == []
    begin(tmp_path / "s")


def test_repair_waits_for_no_one(path: Path) -> None:
    report = verify(path)
    busy = r"word store .*words\.zarr is in use by process \d+ on .*; wait for it"
    with store_lock(path), pytest.raises(BusyError, match=busy):
        discard_damaged(path, report)
    assert discard_damaged(path, report) == 0


def test_digest_depends_on_words_not_on_chunks(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bowstore.words.store.layer.CHUNK_STEP_ROWS", 33)
    finish(begin(tmp_path / "other"), some_words())
    assert digest(tmp_path / "other") == digest(path)
    changed = some_words()
    changed[5, 0, 0] = (changed[5, 0, 0] + 1) % K
    finish(begin(tmp_path / "changed"), changed)
    assert digest(tmp_path / "changed") != digest(path)


def test_join_is_the_identity_for_the_same_data_set(path: Path) -> None:
    assert np.array_equal(join_rows([open_store(path)], Keys(KEYS)), np.arange(N))


def test_join_by_key_finds_every_row(path: Path) -> None:
    store, order = open_store(path), np.random.default_rng(3).permutation(N)[:50]
    rows = join_rows([store], Keys([KEYS[i] for i in order], fingerprint="other"))
    assert np.array_equal(rows, order)
    assert rows.dtype == np.int64


def test_join_refuses_missing_and_duplicate_keys(path: Path, tmp_path: Path) -> None:
    names = [*KEYS[:10], *[f"new{i}" for i in range(8)]]
    message = "8 of 18 keys of the shards are missing from word store .* new0, new1, new2, new3, new4; encode"
    with pytest.raises(MismatchError, match=message):
        join_rows([open_store(path)], Keys(names, fingerprint="other"))
    twice = [*KEYS[:-2], KEYS[0], KEYS[1]]
    finish(begin(tmp_path / "twice", Keys(twice)), some_words())
    with pytest.raises(
        MismatchError, match=r"2 of 68 keys .* more than once in word store .* img0000, img0001; encode"
    ):
        join_rows([open_store(tmp_path / "twice")], Keys(twice[:-2], fingerprint="other"))
    assert "2 keys occur more than once, for example in rows 0, 1, 68, 69" in "\n".join(
        verify(tmp_path / "twice").problems
    )


def test_verify_joins_with_the_shards(path: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    @dataclass
    class Index(Keys):
        place: str = "shards"

        def __len__(self) -> int:
            return len(self.names)

    monkeypatch.setattr("bowstore.words.store.verify.open_index", lambda shards, storage: Index(KEYS[::-1]))
    assert verify(path, tmp_path).sound
    monkeypatch.setattr(
        "bowstore.words.store.verify.open_index", lambda shards, storage: Index([*KEYS[7:], "new0", "new1"])
    )
    missing, extra = verify(path, tmp_path).problems
    assert "2 of 65 keys" in missing
    assert "new0, new1" in missing
    assert "7 of the store's 70 keys" in extra
    assert "rows 0, 1, 2, 3, 4;" in extra


def test_store_needs_neither_faiss_nor_networks() -> None:
    code = (
        "import sys, bowstore.words.store.store; "
        "print([m for m in ('faiss', 'torch', 'nvidia.dali', 'bowstore.models') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_length_and_hashes(path: Path) -> None:
    store = Store(path)
    assert np.array_equal(store.read_array("key_hash"), Keys(KEYS).key_hash)
    assert store.fingerprint == "f" * 32
