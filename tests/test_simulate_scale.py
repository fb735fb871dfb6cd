"""The model of many ranks: what it counts, by hand, and what docs/scale.md says of it."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner
from simulate_scale import CELL_BYTES, CELLS, IMAGES, KEPT_IMAGES, MEASURED, RANKS, RATE, K, main, near, predict

PAGE = Path(__file__).parents[1] / "docs/scale.md"


def test_the_page_has_the_table_of_the_measured_constants() -> None:
    result = CliRunner().invoke(main, [], catch_exceptions=False)
    costs, *table = result.stdout.splitlines()
    assert costs.startswith(f"message_s {MEASURED.message_s:.2g}, ")
    assert len(table) == 2 + len(IMAGES) * len(RANKS)
    assert "\n".join(table) in PAGE.read_text()


def test_a_pass_by_hand() -> None:
    """One unit a batch: 5 blocks of 3072 images, the last of them a batch and a half."""
    images, ranks = 4 * 3072 + 384, 64
    found = predict(images, ranks, RATE, MEASURED)
    assert found["units"] == 4 * 12 + 2
    seen = images / ranks * CELLS / K
    assert seen < KEPT_IMAGES
    assert found["megabytes"] == pytest.approx(images * CELLS * (2 + CELL_BYTES) / 1e6), "every cell is sent"
    assert found["messages"] == 50 * (4 + 1) + 50 * (3 + 1) + 50
    assert found["encode_s"] == pytest.approx(images / (64 * RATE))
    assert found["share"] == pytest.approx(found["rank_0_s"] / found["encode_s"])


def test_few_cells_are_sent_of_many() -> None:
    assert near(10) == 10
    assert near(1000) == pytest.approx(1.5 * 16 * (1 + 4.135), rel=1e-3)


def test_measuring_gives_a_time_for_everything() -> None:
    result = CliRunner().invoke(main, ["--measure", "--images", "10000", "--json"], catch_exceptions=False)
    report = json.loads(result.stdout)
    assert all(0 < seconds < 10 for seconds in report["costs"].values())
    assert [row["ranks"] for row in report["passes"]] == list(RANKS)
