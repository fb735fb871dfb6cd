import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from servers import serve
from shard_sets import write_words
from teacher_sets import IMAGES, write_shards, write_teacher
from word_stores import held, make_store, small_chunks

from bowstore.cli.common import Group
from bowstore.cli.gallery import words as words_command
from bowstore.config import StorageConfig
from bowstore.data.index import open_index
from bowstore.errors import CorruptError, MismatchError, MissingError
from bowstore.report.config import Wish
from bowstore.report.page import WordsReport, write_words_page
from bowstore.report.words import choose_words, collect, count_words, strongest_neighbours
from bowstore.words.store.join import rows_of
from bowstore.words.store.layer import Layer
from bowstore.words.store.store import open_store
from bowstore.words.store.writer import StoreWriter


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(Group("bowstore", commands={"words": words_command}), ["words", *map(str, arguments)])


# What is shown is what the store says


def test_every_example_holds_its_word_at_that_cell(store: Path, report: WordsReport) -> None:
    opened = open_store(store)
    assert [layer.layer.name for layer in report.layers] == ["block1", "block3"]
    for layer in report.layers:
        nearest = layer.layer.read_nearest()
        for word in layer.words.values():
            assert len(word.examples) == min(8, word.images)
            for place, example in enumerate(word.examples):
                assert opened.words(example.key, layer.layer.name)[example.cell] == word.word
                assert opened.row(example.key) == nearest.row_Kn[word.word, place]
            distances = [example.distance for example in word.examples]
            assert distances == sorted(distances)


def test_counts_of_the_words(store: Path, report: WordsReport) -> None:
    for layer in report.layers:
        words = open_store(store).load_words(layer.layer.name)
        for word in layer.words.values():
            there = words == word.word
            assert (word.images, word.cells) == (there.any(axis=(1, 2)).sum(), there.sum())
            assert word.share == pytest.approx(there.mean())


def test_galleries(store: Path, report: WordsReport) -> None:
    for layer in report.layers:
        held_NK = held(open_store(store), layer.layer.name)
        images = held_NK.sum(axis=0)
        random, most, least = layer.galleries
        by_use = sorted(range(len(images)), key=lambda word: (images[word], word))
        falling = sorted(range(len(images)), key=lambda word: (-images[word], word))
        assert list(least.words) == [word for word in by_use if images[word]][:5]
        assert list(most.words) == falling[:5]
        assert len(random.words) == len(set(random.words)) == 5
        assert list(layer.words) == list(dict.fromkeys([*random.words, *most.words, *least.words]))


def test_random_words_depend_on_the_seed_alone_and_are_used() -> None:
    frequency = np.tile([3, 0, 1, 7], 50)
    drawn = {seed: choose_words(frequency, Wish(seed=seed))[0].words for seed in (0, 1)}
    assert drawn[0] == choose_words(frequency, Wish(seed=0))[0].words
    assert drawn[0] != drawn[1]
    assert (frequency[list(drawn[0])] > 0).all()
    assert set(drawn[0]) < set(choose_words(frequency, Wish(per_gallery=30))[0].words)
    few = choose_words(np.array([0, 4, 0, 2]), Wish())
    assert [gallery.words for gallery in few] == [(1, 3), (1, 3), (3, 1)]


def test_usage_is_what_plain_counting_gives(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = open_store(store)
    words = opened.load_words("block3").reshape(IMAGES, -1)
    monkeypatch.setattr(Layer, "read_words", None)  # all words at once are not asked for
    shown = [7, 3, 23]
    usage = count_words(opened.layer("block3"), shown)
    assert np.array_equal(usage.count_K, np.bincount(words.ravel(), minlength=24))
    assert np.array_equal(usage.distinct, np.bincount([len(set(row)) for row in words.tolist()], minlength=17))
    held_NK = np.stack([(words == k).any(axis=1) for k in range(24)], axis=1).astype(np.int64)
    assert np.array_equal(usage.common_SK, (held_NK.T @ held_NK)[shown])


def test_neighbours_are_those_of_a_dense_computation(store: Path, shards: Path) -> None:
    opened = open_store(store)
    held_NK = held(opened, "block3").astype(float)
    (layer,) = collect(opened, open_index(shards), Wish(layer="block3", words=tuple(range(24))))
    some = 0
    for word in range(24):
        expected = []
        for other in range(24):
            common = (held_NK[:, word] * held_NK[:, other]).sum()
            if other == word or common < 3:
                continue
            chance = held_NK[:, word].mean() * held_NK[:, other].mean()
            value = math.log(common / IMAGES / chance) / -math.log(common / IMAGES)
            if value > 0:
                expected.append((value, common, other, common / IMAGES / chance))
        expected.sort(key=lambda bond: (-bond[0], -bond[1], bond[2]))
        found = layer.words[word].neighbours
        assert [bond.word for bond in found] == [other for _, _, other, _ in expected[:6]]
        assert [bond.npmi for bond in found] == pytest.approx([value for value, *_ in expected[:6]])
        assert [bond.lift for bond in found] == pytest.approx([lift for *_, lift in expected[:6]])
        assert [bond.common for bond in found] == [common for _, common, *_ in expected[:6]]
        for bond in found:
            assert bond.example is not None
            assert bond.images == held_NK[:, bond.word].sum()
            assert opened.words(bond.example.key, "block3")[bond.example.cell] == bond.word
        some += len(found)
    assert some > 24


def test_words_in_every_image_are_bound_to_nothing(tmp_path: Path, shards: Path) -> None:
    path = write_words(tmp_path / "words.zarr", np.tile(np.uint16([[0, 1], [1, 2]]), (40, 1, 1)), words=4)
    layer = open_store(path).layer()
    usage = count_words(layer, [0, 3])
    assert usage.common_SK.tolist() == [[40, 40, 40, 0], [0, 0, 0, 0]]
    assert strongest_neighbours(usage.common_SK[0], np.array([40, 40, 40, 0]), 0, 40) == ()
    with pytest.raises(CorruptError, match=r"layer 'block3' of word store"):  # its view is not recorded
        collect(open_store(path), open_index(shards), Wish())


# Other shards


def test_images_that_the_shards_lack_are_left_out_and_counted(store: Path, tmp_path: Path) -> None:
    fewer = write_shards(tmp_path / "fewer", 60)
    opened, index = open_store(store), open_index(fewer)
    report = write_words_page(store, fewer, tmp_path / "words.html", Wish(layer="block3", per_gallery=5))
    (layer,) = report.layers
    looked_up = {
        row
        for word in {*layer.words, *(n.word for w in layer.words.values() for n in w.neighbours)}
        for row in opened.layer("block3").read_nearest().row_Kn[word].tolist()
        if row >= 0
    }
    missing = {row for row in looked_up if row >= 60}
    assert missing
    assert (layer.looked_up, layer.missing) == (len(looked_up), len(missing))
    for word in layer.words.values():
        kept = [row for row in opened.layer("block3").read_nearest().row_Kn[word.word].tolist() if 0 <= row < 60]
        assert [opened.row(example.key) for example in word.examples] == kept[:8]
        assert [index.key(example.index_row) for example in word.examples] == [e.key for e in word.examples]
    line = f"{layer.missing} of the {layer.looked_up} images that lie nearest are not in these shards"
    assert line in report.file.read_text()
    assert f"block3: {layer.missing} of {layer.looked_up} images are not in {fewer} and were left out" in report.text()


def test_other_shards_are_told(store: Path, shards: Path, tmp_path: Path, report: WordsReport) -> None:
    assert not report.other_shards
    assert "not the shards that were encoded" not in report.text() + report.file.read_text()
    others = write_shards(tmp_path / "others", IMAGES, seed=1)  # other images under the same keys
    with pytest.raises(MismatchError, match=r"\d+ of \d+ images of the shards are not those .*--reencoded"):
        write_words_page(store, others, tmp_path / "words.html", Wish(layer="block3", per_gallery=2))
    wish = Wish(layer="block3", per_gallery=2, reencoded=True)
    joined = write_words_page(store, others, tmp_path / "words.html", wish)
    assert joined.layers[0].missing == 0
    assert joined.as_dict()["other_shards"] is True
    assert f"{others} are not the shards that were encoded: images were found by their keys" in joined.text()
    assert "others are not the shards that were encoded" in joined.file.read_text()


def test_rows_of_shards_in_another_order(store: Path, tmp_path: Path, shards: Path) -> None:
    opened, index = open_store(store), open_index(shards)
    others = open_index(write_shards(tmp_path / "more", 200))
    rows, hashes = np.array([95, 0, 41]), opened.read_array("key_hash")
    assert rows_of(hashes[rows], index.key_hash).tolist() == [95, 0, 41]
    assert [others.key(row) for row in rows_of(hashes[rows], others.key_hash)] == [index.key(row) for row in rows]
    assert rows_of(hashes[:0], others.key_hash).tolist() == []


def test_a_store_and_shards_on_a_server(store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    there = tmp_path / "there"
    shutil.copytree(store, there / "words.zarr")
    write_shards(there / "train", IMAGES)
    with serve(there) as server:
        report = write_words_page(
            Path(f"{server.url}/words.zarr"),
            Path(f"{server.url}/train?signature=secret"),
            tmp_path / "words.html",
            Wish(layer="block3", words=(1,)),
            StorageConfig(cache=tmp_path / "cache"),
        )
    html = report.file.read_text()
    assert "Visual words of words.zarr" in html
    assert report.store == f"{server.url}/words.zarr"
    assert "secret" not in html + json.dumps(report.as_dict())


# The command


def test_the_command_writes_and_tells(store: Path, shards: Path, tmp_path: Path) -> None:
    out = tmp_path / "page.html"
    result = invoke(store, "--shards", shards, "--out", out, "--layer", "block1", "--words", 2, "--examples", 3)
    assert result.exit_code == 0
    assert re.match(rf"{re.escape(str(out))}: [2-6] words of block1 \(\d\.\d MB\)", result.stdout)
    assert "thumbnails: " in result.stderr
    assert out.read_bytes().startswith(b"<!DOCTYPE html>")


def test_json(store: Path, shards: Path, tmp_path: Path) -> None:
    out = tmp_path / "page.html"
    result = invoke(store, "--shards", shards, "--out", out, "--word", 3, "--layer", "block3", "--json")
    value = json.loads(result.stdout)
    assert (value["file"], value["bytes"], value["images"]) == (str(out), out.stat().st_size, IMAGES)
    (layer,) = value["layers"]
    assert (layer["layer"], layer["K"], layer["images_missing"]) == ("block3", 24, 0)
    (word,) = layer["words"]
    assert word["word"] == 3
    assert set(word["examples"][0]) == {"key", "cell", "distance"}
    assert set(word["neighbours"][0]) == {"word", "images", "common", "lift", "npmi", "example"}
    assert word["neighbours"][0]["example"].keys() == word["examples"][0].keys()


def test_the_workspace_says_where_things_are(
    store: Path, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bowstore.yaml").write_text(f"store: {store}\nshards: {shards}\n")
    result = invoke("--layer", "block3", "--words", 1)
    assert result.exit_code == 0
    assert (tmp_path / "words.html").exists()


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--word", 24, "--layer", "block3"], 2, r"word 24 is not below K = 24 of layer 'block3'; name words from 0 "),
        (["--word", 12], 2, r"word 12 is not below K = 10 of layer 'block1'; .* or one layer with --layer"),
        (["--layer", "conv4"], 1, r"word store .* has no layer 'conv4'; its layers: block1, block3"),
        (["--out", "gone/words.html"], 1, r"no folder gone to write words\.html into; make it, or name another file"),
        (["--out", "."], 2, r"\. is a folder; name the file to write, for example words\.html"),
        (["--out", "s3://bucket/words.html"], 2, r"s3://bucket/words\.html is on another machine; write the page into"),
        (["--shards", "gone"], 1, r"no folder gone; name the one that holds the shards"),
        (["--examples", 17], 2, r"Invalid value for '--examples'"),
    ],
)
def test_what_cannot_be_shown(
    store: Path, shards: Path, arguments: list[object], code: int, message: str, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    result = invoke(store, "--shards", shards, *arguments)
    assert result.exit_code == code
    last = result.stderr.strip().splitlines()[-1]
    assert re.search(f"^Error: {message}", last), last
    assert list(tmp_path.iterdir()) == []


def test_no_store(tmp_path: Path, shards: Path) -> None:
    with pytest.raises(MissingError, match=r"no word store .*gone; `bowstore encode"):
        write_words_page(tmp_path / "gone", shards, tmp_path / "words.html", Wish())


def test_shards_of_other_images(store: Path, tmp_path: Path) -> None:
    other = write_shards(tmp_path / "other", 30, prefix="other")
    message = r"none of the \d+ images nearest .* is in shards .*other \(30 images; word store .* has 96\); name the sh"
    with pytest.raises(MissingError, match=message):
        write_words_page(store, other, tmp_path / "words.html", Wish())
    assert not (tmp_path / "words.html").exists()


def test_an_incomplete_store(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    small_chunks(monkeypatch)
    teacher, path, out = write_teacher(tmp_path / "t.safetensors"), tmp_path / "words.zarr", tmp_path / "words.html"
    with monkeypatch.context() as patch:
        patch.setattr(StoreWriter, "write_chunk", interrupted)
        with pytest.raises(KeyboardInterrupt):
            make_store(path, shards, teacher, layers=("block1",), num_words=(10,))
    with pytest.raises(MismatchError, match=r"layer 'block1' .* is not complete: 0 of 5 chunks are written"):
        write_words_page(path, shards, out, Wish())
    make_store(path, shards, teacher, layers=("block3",), num_words=(24,))
    report = write_words_page(path, shards, out, Wish(per_gallery=2))  # the complete layer alone
    assert [layer.layer.name for layer in report.layers] == ["block3"]
    assert "not complete, left out: block1" in capsys.readouterr().err
    with pytest.raises(MismatchError, match=r"layer 'block1' .* is not complete"):
        write_words_page(path, shards, out, Wish(layer="block1"))


def interrupted(*_: object) -> None:
    raise KeyboardInterrupt


def test_a_damaged_chunk_leaves_the_old_page(store: Path, shards: Path, tmp_path: Path) -> None:
    copy, out = tmp_path / "words.zarr", tmp_path / "words.html"
    shutil.copytree(store, copy)
    (copy / "block3/words/c/2/0/0").unlink()
    out.write_text("the old page. Made by bowstore 0.1.0")
    with pytest.raises(CorruptError, match=r"chunk block3/words/c/2/0/0 \(rows 40-59\)"):
        write_words_page(copy, shards, out, Wish(layer="block3"))
    assert out.read_text() == "the old page. Made by bowstore 0.1.0"
    assert {path.name for path in tmp_path.iterdir()} == {"words.zarr", "words.html"}


def test_help_and_the_package_load_nothing_heavy() -> None:
    code = (
        "import sys, bowstore.report, bowstore.cli.gallery;"
        "print([m for m in ('torch', 'numpy', 'matplotlib', 'jinja2', 'zarr', 'pydantic') if m in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert found.stdout.strip() == "[]"
