import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bowstore.errors import CorruptError
from bowstore.words.store.nearest import NearestImages, NearestSearch, joined, load_nearest, save_nearest


def plain(words: np.ndarray, distance: np.ndarray, k: int, kept: int) -> list[list[tuple[float, int, int]]]:
    """The same by a plain loop: (distance, row, cell) of each word."""
    found: list[dict[int, tuple[float, int, int]]] = [{} for _ in range(k)]
    for row in range(len(words)):
        for cell in range(words.shape[1]):
            here = (float(distance[row, cell]), row, cell)
            word = int(words[row, cell])
            found[word][row] = min(found[word].get(row, here), (here[0], row, cell), key=lambda f: (f[0], f[2]))
    return [sorted(each.values())[:kept] for each in found]


def as_lists(nearest: NearestImages) -> list[list[tuple[float, int, int]]]:
    return [
        [(float(d), int(r), int(c)) for d, r, c in zip(*each, strict=True) if r >= 0]
        for each in zip(nearest.distance_Kn, nearest.row_Kn, nearest.cell_Kn, strict=True)
    ]


@given(seed=st.integers(0, 10**6), k=st.integers(1, 6), kept=st.integers(1, 4), batch=st.integers(1, 9))
@settings(max_examples=60, deadline=None)
def test_equals_a_plain_search_whatever_the_order(seed: int, k: int, kept: int, batch: int) -> None:
    rng = np.random.default_rng(seed)
    words = rng.integers(0, k, (17, 5)).astype(np.uint16)
    distance = rng.integers(0, 6, (17, 5)).astype(np.float32)  # many ties
    expected = plain(words, distance, k, kept)
    forward, backward = NearestSearch(k, kept), NearestSearch(k, kept)
    for start in range(0, 17, batch):
        rows = np.arange(start, min(start + batch, 17))
        forward.add_batch(rows, words[rows], distance[rows])
    for row in rng.permutation(17):
        backward.add_batch(np.array([row]), words[[row]], distance[[row]])
    backward.merge(forward.result())  # the same again changes nothing
    assert as_lists(forward.result()) == as_lists(backward.result()) == expected


def test_parts_of_several_processes_make_the_whole(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    words, distance = rng.integers(0, 4, (40, 6)).astype(np.uint16), rng.random((40, 6)).astype(np.float32)
    whole, merged = NearestSearch(4), NearestSearch(4)
    whole.add_batch(np.arange(40), words, distance)
    for part in (slice(0, 15), slice(10, 40)):  # with an overlap, as of a chunk that was encoded twice
        one = NearestSearch(4)
        one.add_batch(np.arange(40)[part], words[part], distance[part])
        save_nearest(tmp_path / f"{part.start}.npz", one.result())
    for path in sorted(tmp_path.glob("*.npz")):
        merged.merge(load_nearest(path))
    for one_array, other in zip(whole.result(), merged.result(), strict=True):
        assert np.array_equal(one_array, other, equal_nan=True)


@given(seed=st.integers(0, 10**6), k=st.integers(1, 4), kept=st.integers(1, 3))
@settings(max_examples=40, deadline=None)
def test_what_ranks_return_is_all_that_is_needed(seed: int, k: int, kept: int) -> None:
    """Units in any order, all made twice, of which the first result counts."""
    rng = np.random.default_rng(seed)
    words = rng.integers(0, k, (24, 5)).astype(np.uint16)
    distance = rng.integers(0, 6, (24, 5)).astype(np.float32)
    ranks, whole = [NearestSearch(k, kept) for _ in range(3)], NearestSearch(k, kept)
    made: set[int] = set()
    for unit in [*rng.permutation(8).tolist(), *range(8)]:
        rows = np.arange(3 * unit, 3 * unit + 3)
        search = ranks[rng.integers(3)]
        parts = [search.add_batch(rows[:2], words[rows[:2]], distance[rows[:2]])]
        parts.append(search.add_batch(rows[2:], words[rows[2:]], distance[rows[2:]]))
        if unit not in made:
            whole.add(joined(parts))
        made.add(unit)
    assert as_lists(whole.result()) == plain(words, distance, k, kept)


def test_words_of_no_image_have_none() -> None:
    nearest = NearestSearch(3, kept=2).result()
    assert (nearest.row_Kn == -1).all()
    assert np.isnan(nearest.distance_Kn).all()


def test_a_damaged_file_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "n.npz"
    save_nearest(path, NearestSearch(3).result())
    whole = path.read_bytes()
    for damaged in (b"", b"no archive", whole[: len(whole) // 2]):
        path.write_bytes(damaged)
        with pytest.raises(CorruptError, match=re.escape(f"{path} cannot be read (") + ".*run the same command again"):
            load_nearest(path)
