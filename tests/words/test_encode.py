import errno
import os
import re
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from encoding import CPU, encode_in_process, run_encode
from growing import older_provenance, small_chunks_patch
from served import SERVER
from teacher_sets import IMAGES, load_teacher, write_shards, write_teacher

from bowstore.data import batches, pipeline
from bowstore.data.batches import bounded
from bowstore.data.index import open_index
from bowstore.data.pipeline import clean_batches
from bowstore.data.reader import ShardReader
from bowstore.errors import CorruptError, DataError, MismatchError, MissingError, UsageError
from bowstore.words.encode.report import EncodeReport
from bowstore.words.store.join import join_rows
from bowstore.words.store.store import Store, open_store
from bowstore.words.store.verify import digest, discard_damaged, verify
from bowstore.words.store.writer import StoreWriter


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory, teacher_file: Path, shards: Path) -> Path:
    """The store of an uninterrupted run, in five chunks; not to be changed."""
    path = tmp_path_factory.mktemp("clean") / "words.zarr"
    with small_chunks_patch():
        run_encode(teacher=teacher_file, shards=shards, store=path)
    return path


@pytest.fixture
def run(teacher_file: Path, shards: Path, tmp_path: Path, small_chunks: int) -> Any:
    def call(**values: Any) -> EncodeReport:
        paths = {"teacher": teacher_file, "shards": shards, "store": tmp_path / "words.zarr"}
        return run_encode(**{**paths, **values})

    return call


def test_words_are_the_nearest_centroids_of_each_image(clean: Path, teacher_file: Path, shards: Path) -> None:
    index, teacher, store = open_index(shards), load_teacher(teacher_file, ("block3",), CPU), open_store(clean)
    words, centroids = store.load_words(), torch.from_numpy(store.vocabulary())
    for rows, images in clean_batches(ShardReader(index), teacher.view, np.array([95, 3, 40]), batch=1, device=CPU):
        vectors = teacher.maps(images)["block3"][0].flatten(1).T
        expected = torch.cdist(vectors.double(), centroids.double()).argmin(dim=1)
        assert (words[rows[0]].reshape(-1) == expected.numpy()).mean() > 0.9  # but for rounding at near ties
    assert np.array_equal(join_rows([store], index), np.arange(IMAGES))
    assert verify(clean, shards).sound


def test_report(run: Any, shards: Path, clean: Path) -> None:
    report = run()
    (layer,) = report.layers
    assert (report.images, report.images_encoded, report.ranks) == (IMAGES, IMAGES, 1)
    assert (layer["words"], layer["grid"], layer["channels"]) == (24, (4, 4), 64)
    assert (layer["chunks"], layer["chunks_before"], layer["already_complete"]) == (5, 0, False)
    assert set(report.seconds) == {"sample", "k-means", "assign", "finish"}
    assert set(report.stages) == {"start", "teacher", "assign", "images", "write"}
    assert report.binds in report.stages
    assert 1 < layer["statistics"]["image_perplexity"] <= 16
    assert layer["statistics"]["unused_words"] == 0
    assert layer["vocabulary"]["sample_per_word"] == 256
    assert layer["vocabulary"]["sample"] == IMAGES * 16  # all there are
    assert layer["bytes_per_image"] > 8
    assert layer["vocabulary_bytes"] > 24 * 64 * 2
    assert report.warnings == []
    assert digest(report.store) == digest(clean)
    frequency = open_store(report.store).layer().read_array("document_frequency")
    words = open_store(report.store).load_words()
    assert frequency.tolist() == [int((words == k).any(axis=(1, 2)).sum()) for k in range(24)]


def test_attributes_say_where_the_words_come_from(clean: Path, teacher_file: Path) -> None:
    attributes = open_store(clean).layer("block3").attributes
    teacher = load_teacher(teacher_file, ("block3",), CPU)
    assert attributes["teacher"] == teacher.provenance("block3")
    assert attributes["view"]["size"] == 16
    assert attributes["vocabulary"]["seed"] == 0
    assert attributes["words"] == 24
    assert attributes["complete"] is True


@pytest.mark.parametrize("batch", [1, 7, 96])
def test_another_batch_size_moves_only_near_ties(
    run: Any, clean: Path, teacher_file: Path, shards: Path, batch: int
) -> None:
    store, expected = open_store(run(batch=batch, vocabulary=clean, num_words=()).store), open_store(clean)
    words, others = store.load_words(), expected.load_words()
    moved = np.argwhere(words != others)
    assert len(moved) < 1e-3 * words.size
    teacher, centres = load_teacher(teacher_file, ("block3",), CPU), expected.vocabulary().astype(np.float64)
    for row, i, j in moved:
        source, view = ShardReader(open_index(shards)), teacher.view
        ((_, images),) = clean_batches(source, view, np.array([row]), batch=1, device=CPU)
        vector = teacher.maps(images)["block3"][0, :, i, j].double().numpy()
        one, other = (((vector - centres[w[row, i, j]]) ** 2).sum() for w in (words, others))
        assert one == pytest.approx(other, rel=1e-4)


def test_batches_cut_for_large_images_fill_every_row(
    run: Any, clean: Path, shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = open_index(shards)
    lengths: list[int] = []

    def counted(source: Any, parts: Any) -> Any:
        for rows in bounded(source, parts):
            lengths.append(len(rows))
            yield rows

    monkeypatch.setattr(pipeline, "bounded", counted)
    monkeypatch.setattr(batches, "MAX_BATCH_PIXELS", 3 * int((index.height * index.width).max()))
    store = open_store(run(vocabulary=clean, num_words=()).store)
    assert max(lengths) == 3
    words, others = store.load_words(), open_store(clean).load_words()
    assert (words != others).mean() < 1e-3


def test_a_complete_layer_is_left_alone(run: Any) -> None:
    first = run()
    stamp = (first.store / "block3/words/c/0/0/0").stat().st_mtime_ns
    (first.store / "block3/nearest.npz").touch()  # as after a death right behind its completion
    again = run()
    assert "already complete" in again.text()
    (layer,) = again.layers
    assert (layer["already_complete"], layer["chunks_before"]) == (True, 5)
    assert layer["statistics"] == first.layers[0]["statistics"]
    assert (first.store / "block3/words/c/0/0/0").stat().st_mtime_ns == stamp
    assert not (first.store / "block3/nearest.npz").exists()


def test_another_layer_joins_the_store(run: Any, clean: Path) -> None:
    run()
    run(layers=("block1",), num_words=(10,))
    store = open_store(run().store)
    assert set(store.layers) == {"block1", "block3"}
    assert np.array_equal(store.load_words("block3"), open_store(clean).load_words())
    assert store.load_words("block1").shape == (IMAGES, 16, 16)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_words": (23,)}, "was made with K 24, now it is 23; use the same value, or encode into a new store"),
        ({"seed": 1}, "seed 0, now it is 1"),
        ({"iterations": 4}, "iterations 3, now it is 4"),
        ({"sample_per_word": 10}, "sample_per_word 256, now it is 10"),
    ],
)
def test_other_settings_are_refused(clean: Path, run: Any, values: dict[str, Any], message: str) -> None:
    with pytest.raises(MismatchError, match=re.escape(message)):
        run(store=clean, **values)


def test_another_teacher_view_or_data_set_is_refused(clean: Path, run: Any, tmp_path: Path) -> None:
    with pytest.raises(MismatchError, match=r"teacher weights [0-9a-f]{64}, now it is [0-9a-f]{64}"):
        run(store=clean, teacher=write_teacher(tmp_path / "other.safetensors", seed=1))
    view = {"size": 16, "resize": 18, "cutmix": False}
    with pytest.raises(MismatchError, match=r"clean view .*'resize': 16.* now it is .*'resize': 18"):
        run(store=clean, teacher=write_teacher(tmp_path / "view.safetensors", view=view))
    with pytest.raises(MismatchError, match=r"data set \w+ \(96 images\), but .* \(30 images\); encode into a new"):
        run(store=clean, shards=write_shards(tmp_path / "shards", 30))


def test_usage_errors_leave_nothing_behind(run: Any, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no layer 'conv4'; its layers are conv1, block1, block2, block3"):
        run(layers=("conv4",))
    with pytest.raises(UsageError, match=r"K = 1537 words .* 96 images give 1536 \(16 each\)"):
        run(num_words=(1537,))
    with pytest.raises(UsageError, match=r"--pca 65 is more than the 64 channels of layer 'block3'; choose at most 64"):
        run(pca=65)
    with pytest.raises(MissingError, match=r"no index in .*; run `bowstore index"):
        run(shards=tmp_path)
    assert not (tmp_path / "words.zarr").exists()


def test_features_that_are_not_finite_name_the_image(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from bowstore.words.encode.teacher import Teacher

    plain, calls = Teacher.maps, []

    def broken(self: Teacher, images_BCHW: torch.Tensor) -> dict[str, torch.Tensor]:
        maps = plain(self, images_BCHW)["block3"]
        calls.append(len(maps))
        if len(calls) == 3:
            maps[5, 0, 1, 2] = torch.nan
        return {"block3": maps}

    monkeypatch.setattr(Teacher, "maps", broken)
    monkeypatch.setattr("bowstore.words.encode.forward.compute_workers", lambda device: 1)
    message = r"layer 'block3' of the teacher gives NaN or infinity for 1 images of a batch, for example img0021; check"
    with pytest.raises(DataError, match=message):
        run()


def test_an_untrained_flat_teacher_is_refused(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from bowstore.words.encode.teacher import Teacher

    monkeypatch.setattr(Teacher, "maps", lambda self, images: {"block3": torch.ones(len(images), 64, 4, 4)})
    with pytest.raises(DataError, match="hold only 1 distinct ones, too few for K = 24"):
        run()


def test_a_collapsed_vocabulary_warns(
    run: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from bowstore.words.encode.teacher import Teacher

    def nearly_flat(self: Teacher, images: torch.Tensor) -> dict[str, torch.Tensor]:
        maps = torch.zeros(len(images), 64, 4, 4)
        maps[:, 0, 0, 0] = images.mean((1, 2, 3)) + 10
        return {"block3": maps}

    monkeypatch.setattr(Teacher, "maps", nearly_flat)
    report = run(num_words=(8,))
    assert any("the vocabulary has collapsed" in line and "fills 94 %" in line for line in report.warnings)
    assert "warning: the vocabulary has collapsed" in capsys.readouterr().err


def test_an_interrupted_run_goes_on_where_it_was(run: Any, clean: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, written = StoreWriter.write_chunk, []

    def failing(self: StoreWriter, layer: str, chunk: int, words: Any) -> None:
        if chunk == 3 and 3 not in written:
            written.append(3)
            raise KeyboardInterrupt
        written.append(chunk)
        plain(self, layer, chunk, words)

    monkeypatch.setattr(StoreWriter, "write_chunk", failing)
    with pytest.raises(KeyboardInterrupt), older_provenance():
        run()
    report = run()
    assert sorted(written) == [0, 1, 2, 3, 3, 4]  # chunk 3 alone was written again
    assert report.layers[0]["chunks_before"] >= 3
    assert "sample" not in report.seconds  # the vocabulary came from the store
    assert digest(report.store) == digest(clean)


def test_damaged_chunks_alone_are_encoded_again(run: Any, clean: Path, shards: Path) -> None:
    path = run().store
    (path / "block3/words/c/2/0/0").write_bytes(b"")
    report = verify(path, shards)
    assert report.damaged == {"block3": [2]}
    discard_damaged(path, report)
    assert run().layers[0]["chunks_before"] == 4
    assert digest(path) == digest(clean)


def test_a_chunk_damaged_before_the_end_stops_the_run(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = StoreWriter.write_chunk

    def damaging(self: StoreWriter, layer: str, chunk: int, words: Any) -> None:
        plain(self, layer, chunk, words)
        if chunk == 4:
            (self.path / layer / "words/c/1/0/0").unlink()

    monkeypatch.setattr(StoreWriter, "write_chunk", damaging)
    with pytest.raises(CorruptError, match=r"chunk block3/words/c/1/0/0 \(rows 20-39\) .* is missing"):
        run()


@pytest.mark.parametrize("at", [0, 3, 12, 20, 31])
def test_after_a_full_disk_the_store_goes_on(
    run: Any, clean: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    plain, calls = os.fsync, []

    def full(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) > at:
            raise OSError(errno.ENOSPC, "No space left on device")
        plain(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left on device"):  # for which the command line has a remedy
            run()
    assert not list(tmp_path.rglob(".*.tmp-*"))
    assert digest(run().store) == digest(clean)


def test_killed_again_and_again_it_ends_with_the_same_words(
    clean: Path, teacher_file: Path, shards: Path, tmp_path: Path
) -> None:
    path = tmp_path / "words.zarr"
    values = {"teacher": teacher_file, "shards": shards, "store": path}
    deaths = 0
    for renames in (2, 8, 18, 2, 3, 4, 10_000):  # in the store, the layer, its chunks and digests, at the end
        process = SERVER.Process(target=encode_in_process, args=(values, renames))
        process.start()
        process.join(300)
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
        deaths += 1
        if path.exists():
            assert not Store(path).layers
    assert deaths >= 4
    assert digest(path) == digest(clean)
    assert verify(path, shards).sound
    assert not [*tmp_path.rglob("*.tmp-*"), *tmp_path.rglob("nearest.npz")]


def test_the_vocabulary_of_another_store_is_reused(run: Any, clean: Path, tmp_path: Path) -> None:
    others = write_shards(tmp_path / "others", 30, seed=5, prefix="other")
    report = run(shards=others, vocabulary=clean, num_words=(), store=tmp_path / "others.zarr")
    store = open_store(report.store)
    assert np.array_equal(store.vocabulary(), open_store(clean).vocabulary())
    assert store.layer().attributes["vocabulary"]["taken_from"] == "words.zarr"
    assert "sample" not in report.seconds
    assert "k-means" not in report.seconds
    again = run(vocabulary=clean, num_words=(), store=tmp_path / "again.zarr")  # the same images
    assert np.array_equal(open_store(again.store).load_words(), open_store(clean).load_words())
    with pytest.raises(MismatchError, match=r"was made with K 24, now it is 23; --vocabulary needs the teacher and"):
        run(shards=others, vocabulary=clean, num_words=(23,), store=tmp_path / "x.zarr")
    other = write_teacher(tmp_path / "other.safetensors", seed=1)
    with pytest.raises(
        MismatchError, match=r"was made with teacher weights [0-9a-f]{64}, now it is .*; --vocabulary n"
    ):
        run(teacher=other, shards=others, vocabulary=clean, num_words=(), store=tmp_path / "x.zarr")
    with pytest.raises(MissingError, match=r"has no layer 'block2'; its layers: block3"):
        run(shards=others, vocabulary=clean, num_words=(), layers=("block2",), store=tmp_path / "x.zarr")
    with pytest.raises(MismatchError, match=r"was made with pca None, now it is 3; --vocabulary needs the teacher"):
        run(shards=others, vocabulary=clean, num_words=(), pca=3, store=tmp_path / "x.zarr")
    assert not (tmp_path / "x.zarr").exists()
    with pytest.raises(MismatchError, match=r"was made with vocabulary taken from words\.zarr, now it is None; use"):
        run(store=tmp_path / "again.zarr")
    with pytest.raises(UsageError, match=r"--store \. has no name of its own; name a folder in it, words\.zarr"):
        run(store=Path())


def test_pca_and_whitening_come_before_the_words(run: Any, teacher_file: Path, shards: Path, tmp_path: Path) -> None:
    report = run(pca=6, whiten=True)
    store, index = open_store(report.store), open_index(shards)
    assert store.vocabulary().shape == (24, 6)
    assert store.layer().attributes["projection"] == {"kind": "pca", "dimensions": 6, "whiten": True}
    matrix, offset = store.layer().read_projection() or (None, None)
    teacher = load_teacher(teacher_file, ("block3",), CPU)
    for rows, images in clean_batches(ShardReader(index), teacher.view, np.array([40]), batch=1, device=CPU):
        vectors = teacher.maps(images)["block3"][0].flatten(1).T.double().numpy() @ matrix.T + offset
        expected = ((vectors[:, None] - store.vocabulary()[None]) ** 2).sum(-1).argmin(1)
        assert (store.load_words()[rows[0]].ravel() == expected).mean() > 0.9  # but for rounding at near ties
    with pytest.raises(MismatchError, match=r"was made with pca 6, now it is None"):
        run()
    with pytest.raises(ValueError, match=r"whiten goes with pca; set pca to the layer's number of channels"):
        run(whiten=True, store=tmp_path / "x.zarr")


def test_a_border_is_left_out_of_words_and_vocabulary(run: Any, clean: Path, tmp_path: Path) -> None:
    store = open_store(run(border=1).store)
    assert store.load_words().shape == (IMAGES, 2, 2)
    assert store.layer().border == 1
    assert store.layer().attributes["vocabulary"]["sample"] == IMAGES * 4
    with pytest.raises(MismatchError, match=r"was made with border 1, now it is 0"):
        run()
    with pytest.raises(UsageError, match=r"--border 2 leaves nothing of the 4 x 4 map of layer 'block3'; .* most 1"):
        run(border=2, store=tmp_path / "x.zarr")


def test_a_teacher_in_bfloat16_gives_words_of_its_own(run: Any, clean: Path) -> None:
    store = open_store(run(precision="bfloat16").store)
    assert store.layer().attributes["teacher"]["precision"] == "bfloat16"
    assert not np.array_equal(store.load_words(), open_store(clean).load_words())
    with pytest.raises(MismatchError, match=r"was made with precision bfloat16, now it is float32"):
        run()


def test_k_is_one_for_all_layers_or_one_for_each(run: Any, tmp_path: Path) -> None:
    store = open_store(run(layers=("block2", "block3"), num_words=(9,)).store)
    assert [store.layer(name).num_words for name in store.layers] == [9, 9]
    with pytest.raises(UsageError, match=r"2 layers and 3 values of --K; give one for all, or one for each layer"):
        run(layers=("block2", "block3"), num_words=(1, 2, 3), store=tmp_path / "x.zarr")
    with pytest.raises(UsageError, match=r"the number of words of layer 'block3' is not known; give --K"):
        run(num_words=(), store=tmp_path / "x.zarr")
    with pytest.raises(UsageError, match=r"no layer was named; give --layer"):
        run(layers=(), store=tmp_path / "x.zarr")


def test_the_nearest_images_are_those_of_the_store(clean: Path, teacher_file: Path, shards: Path) -> None:
    index, store = open_index(shards), open_store(clean)
    nearest, words, centres = store.layer().read_nearest(), store.load_words(), store.vocabulary().astype(np.float64)
    assert nearest.row_Kn.shape == (24, 16)
    teacher = load_teacher(teacher_file, ("block3",), CPU)
    distance = np.empty((IMAGES, 16))
    for rows, images in clean_batches(ShardReader(index), teacher.view, np.arange(IMAGES), batch=8, device=CPU):
        vectors = teacher.maps(images)["block3"].flatten(2).transpose(1, 2).double().numpy()
        distance[rows] = np.linalg.norm(vectors - centres[words[rows].reshape(len(rows), -1)], axis=-1)
    flat = words.reshape(IMAGES, -1)
    for word in range(24):
        own = np.where(flat == word, distance, np.inf)
        expected = np.sort(own.min(1))[:16]
        rows = nearest.row_Kn[word][nearest.row_Kn[word] >= 0]
        assert (flat[rows, nearest.cell_Kn[word][: len(rows)]] == word).all()
        assert len(set(rows.tolist())) == len(rows) == min(16, int(np.isfinite(own.min(1)).sum()))
        assert np.allclose(nearest.distance_Kn[word][: len(rows)], expected[: len(rows)], rtol=1e-3)


def test_a_sample_larger_than_memory_is_refused(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bowstore.words.encode.sample.available_memory", lambda: 100_000)
    with pytest.raises(UsageError, match=r"the samples of block3 take 0.0 GB of memory, .* lower --sample-per-word"):
        run()


def test_an_interrupted_store_is_no_store_to_train_on(
    run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(StoreWriter, "write_chunk", failing)
        with pytest.raises(KeyboardInterrupt):
            run()
    with pytest.raises(MismatchError, match=r"is not complete: 0 of 5 chunks are written; run `bowstore encode` again"):
        open_store(tmp_path / "words.zarr")
