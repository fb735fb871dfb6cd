"""Which way a GPU decodes windows: a trial in a process of its own decides, and whatever comes of it is an answer.

What may happen on a GPU happens here to the trial's own program, which decodes on the CPU.
"""

import ctypes
import json
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from bowstore.data import gpu_decode, gpu_probe
from bowstore.data.gpu_decode import Decoding, Ended, asked, gpu_decoding, judged, kept_or_tried, tried
from bowstore.errors import BowstoreError
from bowstore.nvjpeg import nvjpeg_file

MACHINE = {
    "gpu": "NVIDIA H100 80GB HBM3", "driver": "580.65.06", "video": "there", "dali": "2.4.0", "nvimgcodec": "0.9.0",
    "nvjpeg": "13.3.2", "trial": "1",
}  # fmt: skip
NO_VIDEO = {**MACHINE, "video": "missing"}
CPU_TRIAL = [sys.executable, "-m", "bowstore.data.gpu_probe", "cpu"]

# What a trial prints before it comes to windows.
BEFORE = 'import os, signal, sys, time; print(\'{"engines": 7}\\n{"image": 0.5}\', flush=True); '
# The trial's own program, with a hardware decoder that dies, or gives other pixels.
HARDWARE = """
import os, signal, sys
from bowstore.data import gpu_probe
decoded, act = gpu_probe.decoded, {act!r}
def broken(encoded, windows, device, way, load):
    found = decoded(encoded, windows, device, way, load)
    if load and act == "die":
        os.kill(os.getpid(), signal.SIGSEGV)
    return [255 - image for image in found] if load else found
gpu_probe.decoded = broken
gpu_probe.hardware = lambda device: {{"engines": 7}}
gpu_probe.main(["cpu", *sys.argv[1:]])
"""
# The same, with a decoder that dies of windows.
DYING = """
import os, signal
from bowstore.data import gpu_probe
decoded = gpu_probe.decoded
gpu_probe.decoded = lambda *args: os.kill(os.getpid(), signal.SIGSEGV) if args[3] == "slice" else decoded(*args)
gpu_probe.main(["cpu"])
"""
ACTS = {
    "os.abort()": "ended with SIGABRT",
    "print('\\x1b[0;31m[ERROR] \\x1b[0mbad', file=sys.stderr); os.kill(os.getpid(), signal.SIGSEGV)":
        "ended with SIGSEGV ([ERROR] bad)",
    "sys.exit('nvImageCodec failure #8 (internal error)')": "failed (nvImageCodec failure #8 (internal error))",
}  # fmt: skip


def program(text: str) -> list[str]:
    return [sys.executable, "-c", text]


def test_a_real_trial_on_the_cpu_finds_both_ways_equal_to_pillow() -> None:
    ended = asked(CPU_TRIAL, 100)
    assert ended == Ended({"engines": 0, "lack": "there is no GPU", "cores": 0.0, "image": 0.0, "slice": 0.0}, "")
    assert judged(ended, MACHINE) == Decoding("slice", "", 0, "there is no GPU")


def test_a_real_trial_that_dies_of_windows_has_decoded_whole_images_before() -> None:
    ended = tried(program(DYING), 100)
    assert ended.answers["image"] == 0
    assert "slice" not in ended.answers
    assert ended.how == "ended with SIGSEGV"
    assert judged(ended, MACHINE).way == "image"


@pytest.mark.parametrize(("act", "how"), [
    ("die", "ended with SIGSEGV"), ("lie", "gave pixels that differ by 135.0 of 255 from Pillow's, bound 4"),
])  # fmt: skip
def test_a_hardware_decoder_that_fails_alone_is_done_without(act: str, how: str) -> None:
    found = judged(asked(program(HARDWARE.format(act=act)), 100), MACHINE)
    assert found == Decoding("slice", "", 0, f"a trial of it {how}")
    assert str(found) == f"windows alone; no hardware decoder (a trial of it {how})"


def test_a_decoder_that_fails_without_the_hardware_too_decodes_nothing() -> None:
    text = """import os, sys; print('{"cores": 0.5}', flush=True) if not sys.argv[1:] else 0; os.abort()"""
    with pytest.raises(BowstoreError, match=r"a trial of DALI .* ended with SIGABRT; "):
        judged(asked(program(text), 60), MACHINE)


@pytest.mark.parametrize(("act", "how"), ACTS.items())
def test_windows_that_bring_the_process_down_are_an_answer(act: str, how: str) -> None:
    found = judged(tried(program(BEFORE + act), 60), MACHINE)
    why = f"decoding windows alone {how} in a trial of DALI 2.4.0 with nvImageCodec 0.9.0"
    assert found == Decoding("image", why, 7, "")


def test_windows_that_hang_are_an_answer() -> None:
    ended = tried(program(BEFORE + "print('[WARN] slow', file=sys.stderr, flush=True); time.sleep(60)"), 3)
    assert ended == Ended({"engines": 7, "image": 0.5}, "gave no answer within 3 s ([WARN] slow)")
    assert judged(ended, MACHINE).way == "image"


def test_windows_with_other_pixels_are_an_answer() -> None:
    found = judged(Ended({"engines": 7, "image": 0.5, "slice": 40.0}, ""), MACHINE)
    assert found.way == "image"
    assert found.why == (
        "windows alone differ by 40.0 of 255 in a trial of DALI 2.4.0 with nvImageCodec 0.9.0, bound 2"
    )


def test_a_trial_sees_windows_of_another_place() -> None:
    encoded, places = gpu_probe.trials()
    right = gpu_probe.pillow(encoded, places)
    for shift in ([1, 0, 0, 0], [0, 1, 0, 0]):
        places_N4 = np.maximum(places - np.array(shift, np.int32), 0)
        assert gpu_probe.differences(gpu_probe.pillow(encoded, places_N4), right) > gpu_decode._WINDOW_LEVELS
    assert gpu_probe.differences([image[1:] for image in right[:1]], right[:1]) == 255


@pytest.mark.parametrize(
    ("nvjpeg", "way"), [([13, 3], "slice"), ([13, 2], "slice"), ([13, 1], "image"), ([12, 4], "image")]
)
def test_an_nvjpeg_that_leaves_windows_to_the_cpu_decodes_whole_images(nvjpeg: list[int], way: str) -> None:
    found = judged(Ended({"engines": 7, "nvjpeg": nvjpeg, "image": 0.5, "slice": 0.0}, ""), MACHINE)
    assert found.way == way
    assert ("at the edges of windows" in found.why) == (way == "image")


def test_the_installed_nvjpeg_tells_its_version() -> None:
    library = ctypes.CDLL(nvjpeg_file())
    assert gpu_probe._version(library) >= list(gpu_decode._SMOOTH_WINDOWS)


def test_a_crash_on_asking_for_the_hardware_costs_no_more_than_its_answer() -> None:
    text = """import os, sys; os.abort() if sys.argv[1:] else print('{"image": 0, "slice": 0}')"""
    found = judged(asked(program(text), 60), MACHINE)
    assert found == Decoding("slice", "", 0, "asking for it ended with SIGABRT")


def test_a_missing_video_library_is_told_with_its_cure() -> None:
    found = judged(Ended({"engines": 0, "lack": "nvJPEG's error 6", "image": 0.5, "slice": 0}, ""), NO_VIDEO)
    assert found.lack.startswith("libnvcuvid.so.1 is missing; in a container set NVIDIA_DRIVER_CAPABILITIES=")


def test_a_little_rounding_is_none() -> None:
    assert judged(Ended({"image": 1.5, "slice": 0.9, "engines": 7}, ""), MACHINE) == Decoding("slice", "", 7, "")


@pytest.mark.parametrize(("text", "what"), [
    ("import os; os.abort()", "ended with SIGABRT; "),
    ("import sys; sys.exit('CUDA allocation failed')", "failed (CUDA allocation failed); "),
    ("", "came to its end without decoding anything; "),
    ("print('{\"image\": 60.3}')", "gave pixels that differ by 60.3 of 255 from Pillow's, bound 4; "),
])  # fmt: skip
def test_where_nothing_is_decoded_one_line_says_what_to_do(text: str, what: str) -> None:
    with pytest.raises(BowstoreError) as raised:
        judged(tried(program(text), 60), MACHINE)
    assert str(raised.value) == (
        f"NVIDIA H100 80GB HBM3 cannot decode images: a trial of DALI 2.4.0 with nvImageCodec 0.9.0 {what}update the "
        f"driver (it is 580.65.06), install other versions of nvidia-dali and nvidia-nvimgcodec, or use --device cpu"
    )


def answering(tmp_path: Path, **answers: object) -> tuple[list[str], Path]:
    """A trial that answers so, and the file in which it notes each time that it is run."""
    count = tmp_path / "count"
    text = f"import sys, time; sys.argv[1:] or open({str(count)!r}, 'a').write('x'); time.sleep(0.2)"
    text += f"; print({json.dumps(answers)!r})"
    return [sys.executable, "-c", text], count


def test_an_answer_is_kept_for_a_machine_and_its_libraries(tmp_path: Path) -> None:
    place = tmp_path / "cache" / "decoders" / "a.json"
    command, count = answering(tmp_path, engines=7, image=0.5, slice=40.0)
    first = kept_or_tried(place, MACHINE, command)
    assert first.way == "image"
    assert kept_or_tried(place, MACHINE, command) == first
    assert count.read_text() == "x"
    kept_or_tried(place, {**MACHINE, "nvimgcodec": "0.9.1"}, command)
    assert count.read_text() == "xx"


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b'{"way": "slice"}', b"\0" * 50, "way", "engines", "machine"])
def test_a_damaged_answer_is_made_anew(tmp_path: Path, damage: bytes | str) -> None:
    place = tmp_path / "a.json"
    command, count = answering(tmp_path, engines=7, image=0.5, slice=0.5)
    first = kept_or_tried(place, MACHINE, command)
    if isinstance(damage, str):
        place.write_text(json.dumps({**json.loads(place.read_text()), damage: "other"}))
    else:
        place.write_bytes(damage)
    assert kept_or_tried(place, MACHINE, command) == first
    assert count.read_text() == "xx"
    assert kept_or_tried(place, MACHINE, command) == first
    assert count.read_text() == "xx"


def test_a_gpu_that_decodes_nothing_is_tried_again(tmp_path: Path) -> None:
    place = tmp_path / "a.json"
    command, count = answering(tmp_path, engines=0)
    for _ in range(2):
        with pytest.raises(BowstoreError, match="cannot decode images"):
            kept_or_tried(place, MACHINE, command)
    assert count.read_text() == "xx"
    assert not place.exists()


def test_of_several_ranks_one_tries_and_the_others_read(tmp_path: Path) -> None:
    place = tmp_path / "a.json"
    command, count = answering(tmp_path, engines=7, image=0.5, slice=0.5)
    found: list[Decoding] = []
    ranks = [
        threading.Thread(target=lambda: found.append(kept_or_tried(place, MACHINE, command, display=False)))
        for _ in range(3)
    ]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    assert found == [Decoding("slice", "", 7, "")] * 3
    assert count.read_text() == "x"


def test_a_cache_that_cannot_be_written_costs_a_trial_each_time(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    command, count = answering(tmp_path, engines=7, image=0.5, slice=0.5)
    assert kept_or_tried(tmp_path / "file" / "a.json", MACHINE, command).way == "slice"
    assert count.read_text() == "x"
    assert capsys.readouterr().err == (
        f"warning: {tmp_path / 'file'} cannot be written (File exists): the GPU's decoder is tried at each start\n"
    )


@pytest.mark.parametrize(("found", "line"), [
    (Decoding("slice", "", 7, ""), "windows alone; 7 hardware decoders"),
    (
        Decoding("image", "decoding windows alone ended with SIGSEGV in a trial of DALI", 0, "the GPU has none"),
        "whole images, then cut (decoding windows alone ended with SIGSEGV in a trial of DALI); no hardware decoder "
        "(the GPU has none)",
    ),
])  # fmt: skip
def test_one_line_says_how_a_gpu_decodes(
    found: Decoding, line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """At the seam: the GPU's name, and the trial."""
    monkeypatch.setenv("BOWSTORE_CACHE", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100")
    seen = []
    monkeypatch.setattr(gpu_decode, "kept_or_tried", lambda *args, **options: seen.append(args) or found)
    gpu_decoding.cache_clear()
    assert gpu_decoding(torch.device("cuda", 1)) == gpu_decoding(torch.device("cuda", 1)) == found
    gpu_decoding.cache_clear()
    ((place, machine, command),) = seen
    assert place.parent == tmp_path / "decoders"
    assert command[-1] == "1"
    assert machine["gpu"] == "NVIDIA A100"
    assert set(machine) == set(MACHINE)
    assert capsys.readouterr().err == f"decoding on NVIDIA A100: {line}\n"


@pytest.mark.parametrize(("engines", "name"), [(7, "hardware"), (0, "CUDA")])
def test_what_decodes_jpegs_goes_into_the_words_provenance(
    monkeypatch: pytest.MonkeyPatch, engines: int, name: str
) -> None:
    monkeypatch.setattr(gpu_decode, "gpu_decoding", lambda device: Decoding("slice", "", engines, ""))
    assert gpu_decode.jpeg_decoder(torch.device("cuda", 0)) == name
    assert gpu_decode.jpeg_decoder(torch.device("cpu")) == "CPU"
