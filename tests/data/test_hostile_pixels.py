"""Images whose header lies about their size reach the real train pipeline: it must never end the process.

An out-of-bounds window kills DALI 2.4's CPU decoder with SIGSEGV. The plan takes its windows from the index; here the
tar was changed after indexing, at equal sizes, so that they do not fit, and the index has the digest of the other
image, as if it had been made so. One process runs all cases one after the
other and names each before it begins, so that a death can be told from an error.
"""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from shard_sets import textured_image
from tar_files import (
    encode,
    with_jpeg_size,
    with_png_size,
    with_two_frames,
    with_webp_size,
    write_members,
    zip_bomb_png,
)

from bowstore.data.index import build_index, open_index
from bowstore.data.table import COLUMNS, INDEX_FILE, image_digest, read_header, write_table

MEMBER_BYTES = 150_000
HEIGHT, WIDTH = 300, 400  # as indexed, of all images

HONEST = encode(textured_image(1, HEIGHT, WIDTH), "JPEG").ljust(MEMBER_BYTES, b"\0")

PIXELS = textured_image(3, 48, 40)
JPEG, PROGRESSIVE = encode(PIXELS, "JPEG"), encode(PIXELS, "JPEG", progressive=True)
PNG, WEBP, LOSSLESS = encode(PIXELS, "PNG"), encode(PIXELS, "WEBP"), encode(PIXELS, "WEBP", lossless=True)
TURNED = Image.Exif()
TURNED[0x0112] = 6
WIDE = textured_image(3, 400, 300)  # the indexed size, turned

BATCH, REFUSED, EITHER = "batch", "refused", "batch refused"
CASES = {
    # Smaller and larger than the index says, in all formats.
    "small jpeg": (JPEG, BATCH),
    "small progressive jpeg": (PROGRESSIVE, BATCH),
    "small png": (PNG, BATCH),
    "small webp": (WEBP, BATCH),
    "small lossless webp": (LOSSLESS, BATCH),
    "one pixel": (encode(PIXELS[:1, :1], "JPEG"), BATCH),
    "large jpeg": (encode(textured_image(3, 900, 1200), "JPEG", quality=20), BATCH),
    # Rotation by EXIF: the index holds sizes as they lie in the file.
    "turned jpeg": (encode(WIDE, "JPEG", exif=TURNED), BATCH),
    "turned small jpeg": (encode(PIXELS, "JPEG", exif=TURNED), BATCH),
    "turned png": (encode(PIXELS, "PNG", exif=TURNED), BATCH),
    "turned webp": (encode(PIXELS, "WEBP", exif=TURNED), BATCH),
    # Headers that lie about what follows them.
    "jpeg with a smaller frame": (with_jpeg_size(JPEG, 8, 8), BATCH),
    "jpeg with a larger frame": (with_jpeg_size(JPEG, 3000, 4000), BATCH),
    "jpeg without height": (with_jpeg_size(JPEG, 0, 40), REFUSED),
    "jpeg bomb": (with_jpeg_size(JPEG, 60_000, 60_000), REFUSED),
    "jpeg with two frames, small first": (with_two_frames(JPEG, 8, 8), REFUSED),
    "jpeg with two frames, large first": (with_two_frames(JPEG, 480, 400), REFUSED),
    "progressive jpeg with two frames, small first": (with_two_frames(PROGRESSIVE, 8, 8), REFUSED),
    "progressive jpeg with two frames, large first": (with_two_frames(PROGRESSIVE, 480, 400), REFUSED),
    "jpeg with a frame behind its scan": (JPEG[:-2] + with_jpeg_size(JPEG, 480, 400)[2:], EITHER),
    "cut jpeg": (JPEG[:-100], EITHER),
    "png with a larger IHDR": (with_png_size(PNG, 300, 400), REFUSED),
    "png with a smaller IHDR": (with_png_size(PNG, 8, 8), REFUSED),
    "png without pixels": (with_png_size(PNG, 0, 0), REFUSED),
    "png bomb": (with_png_size(PNG, 60_000, 60_000), REFUSED),
    "png of too much data": (zip_bomb_png(), BATCH),
    "webp with a larger frame": (with_webp_size(WEBP, 300, 400), REFUSED),
    "webp with a smaller frame": (with_webp_size(WEBP, 8, 8), BATCH),
    "webp bomb": (with_webp_size(WEBP, 16_383, 16_383), REFUSED),
    "no image": (b"<html>", REFUSED),
}

RUN = """
import json, sys
from pathlib import Path
import numpy as np, torch
from bowstore.config import ViewConfig
from bowstore.data.index import open_index
from bowstore.data.pipeline import train_batches
from bowstore.data.plan import Schedule, plans
from bowstore.data.reader import ShardReader
from bowstore.errors import DataError

# (Without jitter, which compiles for seconds and never sees a window.)
plain = {name: 0 for name in ("brightness", "contrast", "saturation", "hue", "grey")}
view, device = ViewConfig(size=32, resize=None, **plain), torch.device("cpu")
for number, root in enumerate(sys.argv[1:]):
    print(f"\\n{Path(root).name} ", end="", flush=True)
    index = open_index(Path(root))
    steps = plans(Schedule(4, 4, number), index, view, start=0, stop=3)
    try:
        made = train_batches(ShardReader(index), view, steps, batch=4, device=device)
        batches = [batch.images_BCHW.clone() for batch in made]
        assert len(batches) == 3 and all(torch.isfinite(images).all() for images in batches)
        print(json.dumps("batch"), end="", flush=True)
    except DataError as error:
        print(json.dumps(f"refused {error}"), end="", flush=True)
"""


def make_set(root: Path, hostile: bytes) -> None:
    """Four images of the indexed size; then one of them is another, at the same place and length."""
    members = [(f"good/{number}.jpg", HONEST) for number in range(4)]
    write_members(root / "a.tar", members)
    build_index(root)
    members[2] = ("good/2.jpg", hostile.ljust(MEMBER_BYTES, b"\0"))
    write_members(root / "a.tar", members)
    index = open_index(root)
    columns = {name: np.asarray(getattr(index, name)).copy() for name in COLUMNS}
    columns["digest"][2] = image_digest(members[2][1])
    lengths = {name: len(column) for name, column in columns.items()}
    write_table(root / INDEX_FILE, read_header(root / INDEX_FILE).meta, lengths, lambda name: iter([columns[name]]))
    index = open_index(root)
    assert np.array_equal(index.height, [HEIGHT] * 4)
    assert np.array_equal(index.width, [WIDTH] * 4)


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What came out of each case."""
    root = tmp_path_factory.mktemp("hostile")
    folders = [root / name.replace(" ", "_") for name in CASES]
    for folder, (hostile, _) in zip(folders, CASES.values(), strict=True):
        make_set(folder, hostile)
    result = subprocess.run(
        [sys.executable, "-c", RUN, *map(str, folders)], capture_output=True, text=True, timeout=300, check=False
    )
    lines = [line.partition(" ") for line in result.stdout.splitlines() if line]
    found = {name.replace("_", " "): value for name, _, value in lines}
    last = lines[-1][0] if lines else "the imports"
    assert result.returncode == 0, f"{last} ended the process with {result.returncode}: {result.stderr[-500:]}"
    return {name: json.loads(value) for name, value in found.items()}


@pytest.mark.parametrize("case", CASES)
def test_hostile_images_end_in_a_batch_or_in_one_line(outcomes: dict[str, str], case: str) -> None:
    outcome, expected = outcomes[case], CASES[case][1]
    assert outcome.split()[0] in expected.split(), outcome
    if outcome != BATCH:
        assert "cannot be decoded" in outcome
        assert "\n" not in outcome
