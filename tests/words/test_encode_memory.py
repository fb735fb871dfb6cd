"""Memory of encoding does not grow with the images: neither features nor words are kept."""

import subprocess
import sys
from pathlib import Path

import pytest
from teacher_sets import write_shards

MEASURE = """
import sys, threading, time
from pathlib import Path

peak_kib = 0

def watch():  # private memory: pages of mapped shards are the kernel's, and it takes them back
    global peak_kib
    while True:
        fields = dict(line.split(":", 1) for line in open("/proc/self/status"))
        peak_kib = max(peak_kib, int(fields["RssAnon"].split()[0]))
        time.sleep(0.005)

threading.Thread(target=watch, daemon=True).start()
from encoding import run_encode
teacher, shards, store = map(Path, sys.argv[1:])
layer = dict(layers=("block1",), num_words=(16,), sample_per_word=64, iterations=1, batch=64)
run_encode(teacher=teacher, shards=shards, store=store, **layer)
print(peak_kib)
"""
FEATURES_KIB_PER_IMAGE = 16 * 16 * 16 * 4 / 1024


@pytest.mark.slow
def test_memory_stays_the_same_within_a_tenth(tmp_path: Path, teacher_file: Path) -> None:
    peaks_kib = []
    for images in (400, 8000):
        shards = write_shards(tmp_path / f"shards{images}", images)
        command = [sys.executable, "-c", MEASURE, teacher_file, shards, tmp_path / f"{images}.zarr"]
        done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent, check=True)
        peaks_kib.append(int(done.stdout))
    assert 7600 * FEATURES_KIB_PER_IMAGE > 0.2 * peaks_kib[0], "kept features would show"
    assert peaks_kib[1] < 1.1 * peaks_kib[0], peaks_kib
