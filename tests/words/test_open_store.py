"""The store for other programs: `bowstore.open_store`, and reading it with plain Zarr from its documentation alone."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import xxhash
from encoding import run_encode
from teacher_sets import IMAGES

import bowstore
from bowstore.data.index import open_index
from bowstore.errors import MissingError, UsageError
from bowstore.words.store.schema import STORE_ARRAYS, Writer, layer_arrays
from bowstore.words.store.store import key_hash

PLAIN_READER = """
import json, sys
from pathlib import Path
import numpy as np, xxhash, zarr

root, key = sys.argv[1:]
group = zarr.open_group(root, mode="r")
about = dict(group.attrs)
assert (about["format"], about["format_version"]) == ("bowstore words", 3)
hashes = group["key_hash"][:]
row = int(np.flatnonzero(hashes == np.uint64(xxhash.xxh3_64_intdigest(key.encode())))[0])
answer = {"rows": about["dataset"]["images"], "layers": {}}
for name in about["layers"]:
    layer, attributes = group[name], dict(group[name].attrs)
    assert attributes["complete"]
    words, digests = layer["words"], layer["chunk_digest"][:]
    step = words.chunks[0]
    for chunk, digest in enumerate(digests):
        part = np.ascontiguousarray(words[chunk * step : (chunk + 1) * step], "<u2")
        assert xxhash.xxh3_64_intdigest(part.data) == digest
    vocabulary = np.ascontiguousarray(layer["vocabulary"][:], "<f4")
    assert f"{xxhash.xxh3_64_intdigest(vocabulary.data):016x}" == attributes["vocabulary_digest"]
    nearest = layer["nearest"][:]
    answer["layers"][name] = {
        "words": words[row].tolist(), "K": attributes["words"], "vocabulary": list(vocabulary.shape),
        "nearest": nearest[3, 0].tolist(), "holds": int(words[nearest[3, 0, 0]].ravel()[nearest[3, 0, 1]]),
        "document_frequency": layer["document_frequency"][:].tolist(), "projection": "projection" in layer,
    }
assert not [name for name in sys.modules if name.startswith("bowstore")]
print(json.dumps(answer))
"""


WRITTEN = {
    Writer.CREATION: ("with the store", "with the layer", "with the layer, only with --pca"),
    Writer.CHUNKS: ("chunk by chunk",),
    Writer.COUNT: ("last",),
    Writer.PASS: ("last",),
}


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory, teacher_file: Path, shards: Path) -> Path:
    path = tmp_path_factory.mktemp("open") / "words.zarr"
    run_encode(teacher=teacher_file, shards=shards, store=path, layers=("block2", "block3"), num_words=(12, 24), pca=5)
    return path


def test_the_page_and_the_table_say_the_same() -> None:
    page = (Path(__file__).parents[2] / "docs/store-format.md").read_text()
    rows = re.findall(r"^\| `([a-z_/<>]+)` \| \((.+?)\) \| (\w+) \| (\S+) \| (.+) \|$", page, re.MULTILINE)
    specs = STORE_ARRAYS | {f"<layer>/{name}": spec for name, spec in layer_arrays(projected=True).items()}
    plain = layer_arrays(projected=False)
    assert [row[0] for row in rows] == list(specs)
    for name, axes, dtype, fill, written in rows:
        spec = specs[name]
        assert axes.replace("16", "n").split(", ") == spec.axes.split()
        assert (dtype, float(fill)) == (spec.dtype, pytest.approx(spec.fill, nan_ok=True))
        assert written in WRITTEN[spec.writer]
        if name.startswith("<layer>"):
            assert ("only with --pca" in written) == (spec.name not in plain)


def test_words_and_bag_of_a_key(path: Path, shards: Path) -> None:
    store, index = bowstore.open_store(path), open_index(shards)
    words = store.load_words("block3")
    for row in (0, 17, IMAGES - 1):
        key = index.key(row)
        assert store.row(key) == row
        assert np.array_equal(store.words(key, "block3"), words[row])
        bag = store.bag(key, "block3")
        assert np.array_equal(
            np.repeat(bag.words_M, (bag.weights_M * 16).round().astype(int)), np.sort(words[row].ravel())
        )
        assert bag.weights_M.dtype == np.float32
        binary = store.bag(key, "block3", form="binary")
        assert np.array_equal(binary.words_M, np.unique(words[row]))
        assert np.allclose(binary.weights_M, 1 / len(binary.words_M))
    assert store.words(index.key(3), "block2").shape == (8, 8)


def test_iterate_and_vocabulary(path: Path, shards: Path) -> None:
    store = bowstore.open_store(str(path), "block3")
    found = list(store.iterate("block3"))
    assert [hash_ for hash_, _ in found] == [key_hash(key) for key in open_index(shards).keys()]
    assert np.array_equal(np.stack([words for _, words in found]), store.load_words("block3"))
    assert store.vocabulary("block3").shape == (24, 5)
    projection = store.layer("block3").read_projection()
    assert projection is not None
    assert [part.shape for part in projection] == [(5, 64), (5,)]
    assert len(store) == IMAGES


def test_what_is_not_there_is_one_line(path: Path, shards: Path) -> None:
    store = bowstore.open_store(path)
    with pytest.raises(MissingError, match=r"has no key 'no/such'; a key is the image's path in its shard without the"):
        store.words("no/such", "block3")
    with pytest.raises(UsageError, match=r"has 2 layers, name one; its layers: block2, block3"):
        store.words(open_index(shards).key(0))
    with pytest.raises(UsageError, match=r"form 'mean' of a bag is neither 'count' nor 'binary'"):
        store.bag(open_index(shards).key(0), "block3", form="mean")  # type: ignore[arg-type]
    with pytest.raises(MissingError, match=r"no word store .*none; `bowstore encode"):
        bowstore.open_store(path.with_name("none"))


def test_plain_zarr_reads_it_and_nothing_of_bowstore(path: Path, shards: Path, tmp_path: Path) -> None:
    import json

    key, store = open_index(shards).key(7), bowstore.open_store(path)
    script = tmp_path / "read.py"
    script.write_text(PLAIN_READER)
    done = subprocess.run([sys.executable, script, path, key], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert answer["rows"] == IMAGES
    for name in ("block2", "block3"):
        layer = answer["layers"][name]
        assert np.array_equal(np.array(layer["words"]), store.words(key, name))
        assert layer["K"] == store.layer(name).num_words
        assert layer["vocabulary"] == [layer["K"], 5]
        assert layer["holds"] == 3  # the cell nearest to word 3 holds word 3
        assert layer["document_frequency"] == store.layer(name).read_array("document_frequency").tolist()
        assert layer["projection"]


def test_import_is_light() -> None:
    code = "import sys, bowstore; print([m for m in ('torch', 'zarr', 'numpy') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


def test_key_hash_is_what_the_format_says() -> None:
    assert key_hash("n01440764/img_1") == xxhash.xxh3_64_intdigest(b"n01440764/img_1")
