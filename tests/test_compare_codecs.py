"""tools/compare_codecs.py: sizes, rates and noticed damage of a tiny store; the packing that it compares with."""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import codec_candidates
import numpy as np
import pytest
from click.testing import CliRunner, Result
from numpy.typing import NDArray
from shard_sets import write_words

TOOL = Path(__file__).parents[1] / "tools" / "compare_codecs.py"
N, GRID, K = 600, (3, 5), 300
CODECS = ("none_crc32c", "packed", "delta_zstd1", "transposed_zstd1", "none")


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    specification = importlib.util.spec_from_file_location("compare_codecs", TOOL)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    sys.modules["compare_codecs"] = module  # dataclasses look their module up there
    specification.loader.exec_module(module)
    module.EDGE_BYTES, module.INNER_BITS = 4, 20  # a few seconds
    return module


def some_words(seed: int = 0) -> NDArray[np.uint16]:
    return np.random.default_rng(seed).integers(0, K, (N, *GRID)).astype(np.uint16)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_words(tmp_path_factory.mktemp("codecs") / "words.zarr", some_words(), words=K)


def run(tool: ModuleType, store: Path, *arguments: str) -> Result:
    return CliRunner().invoke(tool.main, [str(store), "--rounds", "2", "--tile-mb", "0.1", *arguments])


@pytest.fixture(scope="module")
def value(tool: ModuleType, store: Path) -> dict[str, Any]:
    result = run(tool, store, "--json", *(part for name in CODECS for part in ("--codec", name)))
    assert result.exit_code == 0, result.output
    parsed: dict[str, Any] = json.loads(result.stdout)
    return parsed


def test_json_holds_every_codec_with_size_and_rates(tool: ModuleType, value: dict[str, Any]) -> None:
    rows = {row["codec"]: row for row in value["codecs"] if row["chunk_rows"] == N}
    assert list(rows) == ["zstd1", tool.CHOSEN, *CODECS]
    assert [(row["codec"], row["chunk_rows"]) for row in value["codecs"][len(rows) :]] == [
        (tool.CHOSEN, 256),
        (tool.CHOSEN, 16384),
    ]
    assert {"images": N, "grid": [*GRID], "words": K, "bits_per_word": 9, "rounds": 2}.items() <= value.items()
    assert 8.1 < value["entropy_bits_per_word"] < np.log2(K)
    # 15 words of 16 bits, and of 9, with 4 bytes of crc32c a chunk.
    assert rows["none"]["bytes_per_image"] == 30
    assert rows["none_crc32c"]["bytes_per_image"] == pytest.approx(30 + 4 / N)
    assert rows["packed"]["bytes_per_image"] == pytest.approx((N * 15 * 9 / 8 + 4) / N)
    for row in value["codecs"]:
        assert all(len(row[figure]) == 2 and min(row[figure]) > 0 for figure in tool.FIGURES)
    assert rows["zstd1"]["read_ratios_over_zstd1"] == [1, 1]


def test_damage_is_noticed_where_something_guards_and_only_there(value: dict[str, Any]) -> None:
    for row in value["codecs"]:
        damage = row["damage"]
        assert damage["truncated"] == {"error": 6}
        assert damage["emptied"] == {"error": 1}
        assert row["notices_damage"] == ("silent" not in damage["flipped"]) == (row["codec"] != "none")
    (unguarded,) = (row["damage"]["flipped"] for row in value["codecs"] if row["codec"] == "none")
    assert list(unguarded) == ["silent"]


def test_table_has_a_row_for_every_codec(tool: ModuleType, store: Path) -> None:
    result = run(tool, store, "--codec", "none", "--rows", "256")
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    head, rows = lines[0], [line for line in lines[2:] if line.startswith("|")]
    assert [row.split(" | ")[0] for row in rows] == [
        "| zstd 1, checksum",
        f"| {tool.CANDIDATES[tool.CHOSEN].title}",
        "| no compression, no checksum",
        f"| {tool.CANDIDATES[tool.CHOSEN].title}",
    ]
    assert all(row.count("|") == head.count("|") for row in rows)
    assert "| **no**: not " in rows[2]
    assert lines[-1].startswith("256 images, 3x5 maps, K = 300: 30 bytes an image as uint16, 16.9 packed to 9 bits, ")


def test_a_store_that_is_not_there_is_one_line(tool: ModuleType, tmp_path: Path) -> None:
    result = run(tool, tmp_path / "none.zarr")
    assert result.exit_code == 1
    assert result.stderr.startswith("Error: no word store ")
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize("bits", [1, 7, 9, 11, 15, 16])
def test_packing_keeps_every_word_lowest_bit_first(tool: ModuleType, bits: int) -> None:
    words = np.random.default_rng(bits).integers(0, 1 << bits, 1001).astype(np.uint16)
    packed = codec_candidates.pack(words, bits)
    plain = np.unpackbits(words.view(np.uint8).reshape(-1, 2), axis=1, bitorder="little")[:, :bits]
    assert np.array_equal(packed, np.packbits(plain.reshape(-1), bitorder="little"))
    assert np.array_equal(codec_candidates.unpack(packed, bits, len(words)), words)
    with pytest.raises(ValueError, match="bytes do not hold 1002 words"):
        codec_candidates.unpack(packed[:-1], bits, len(words) + 1)


def test_delta_stays_within_an_image(tool: ModuleType) -> None:
    words = some_words(1)
    deltas = codec_candidates._delta(words)
    assert np.array_equal(deltas[:, 0, 0], words[:, 0, 0])
    assert np.array_equal(deltas[:, 1, 0], words[:, 1, 0] - words[:, 0, -1])
    assert np.array_equal(codec_candidates._undo_delta(deltas), words)
