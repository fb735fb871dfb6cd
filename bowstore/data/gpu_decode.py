"""How a GPU decodes, found out by a trial run in a process of its own.

Decoding no more than a window of a JPEG is quickest where it works; nvImageCodec 0.9.0 is reported to end the process
or to fail in the first batch (nvImageCodec issue 55). So `gpu_probe` tries it, where it can do no harm, and whatever
comes of it is an answer: if windows cannot be decoded, the whole image is, and the window is cut out of it; if it is
the hardware decoder that fails, the GPU's cores decode. The answer is kept in the cache for as long as GPU, driver and
libraries stay what they are. Loads no DALI.

<cache>/decoders/<digest of all these>.json
"""

import hashlib
import json
import re
import signal
import subprocess
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import torch

from bowstore.config import StorageConfig
from bowstore.environment import library_versions
from bowstore.errors import BowstoreError
from bowstore.files import read_json, waiting_lock, write_json
from bowstore.gpu import decoder_note, driver_version
from bowstore.progress import say
from bowstore.remote.cache import cache_root
from bowstore.torchrun import ranks

Way = Literal["slice", "image"]

TRIAL = 2  # a trial that looks at other things has another number, and no answer of this one is taken for its own
_SECONDS = 120.0  # a trial takes about 10
_WINDOW_LEVELS, _IMAGE_LEVELS = 2.0, 4.0  # largest mean differences of 255: to the whole image, and that to Pillow's
_LIBRARIES = ("dali", "nvimgcodec", "nvjpeg")
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")  # of nvImageCodec's messages
_SAID_LETTERS = 300
_SMOOTH_WINDOWS = 13, 2  # the first nvJPEG that nvImageCodec lets decode windows with smooth chroma
_MISSING = "missing"
_NO_VIDEO = "libnvcuvid.so.1 is missing; in a container set NVIDIA_DRIVER_CAPABILITIES=compute,utility,video"


class Decoding(NamedTuple):
    """How a GPU decodes.

    Attributes:
        way: of windows: "slice" decodes them alone, "image" the whole image.
        why: the reason for "image"; else empty.
        engines: its hardware decoders for JPEG that can be used; with 0 its CUDA cores decode.
        lack: why there are none; else empty.
    """

    way: Way
    why: str
    engines: int
    lack: str

    def __str__(self) -> str:
        windows = "windows alone" if self.way == "slice" else f"whole images, then cut ({self.why})"
        plural = "" if self.engines == 1 else "s"
        hardware = f"{self.engines} hardware decoder{plural}" if self.engines else f"no hardware decoder ({self.lack})"
        return f"{windows}; {hardware}"


class Ended(NamedTuple):
    """What a trial printed, and how it ended.

    Attributes:
        answers: its lines of JSON, one into the other.
        how: "" if it came to its end; else what became of it, as the end of a sentence.
    """

    answers: dict[str, Any]
    how: str


@cache
def gpu_decoding(device: torch.device) -> Decoding:
    """How a GPU decodes: by the answer in the cache, or by a trial now. One process of a machine tries, others wait.

    Raises:
        BowstoreError: nothing can be decoded on it.
    """
    machine = _machine(device)
    place = cache_root(StorageConfig()) / "decoders" / f"{_digest(machine)}.json"
    command = [sys.executable, "-m", "bowstore.data.gpu_probe", str(device.index or 0)]
    found = kept_or_tried(place, machine, command, display=ranks().first)
    if ranks().first:
        say(f"decoding on {machine['gpu']}: {found}")
    return found


def jpeg_decoder(device: torch.device) -> str:
    """What decodes the JPEG images of the clean view there, where rounding may differ: "CPU", "hardware" or "CUDA".

    Raises:
        BowstoreError: nothing can be decoded on a GPU.
    """
    if device.type != "cuda":
        return "CPU"
    return "hardware" if gpu_decoding(device).engines else "CUDA"


def kept_or_tried(
    place: Path, machine: dict[str, str], command: Sequence[str], *, seconds: float = _SECONDS, display: bool = True
) -> Decoding:
    """The answer that a file keeps, if it is of this machine; else that of a trial, which is then kept.

    Args:
        place: the file.
        machine: what the answer depends on.
        command: of the trial.
        seconds: its time limit.
        display: whether to say that somebody else's trial is waited for.

    Raises:
        BowstoreError: nothing can be decoded; that is not kept.
    """
    if found := _kept(place, machine):
        return found
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with waiting_lock(place.with_suffix(".lock"), "the trial of the GPU's decoder", shown=display):
            if found := _kept(place, machine):
                return found
            found = judged(asked(command, seconds), machine)
            write_json(place, {"machine": machine, **found._asdict()})
            return found
    except OSError as error:
        if isinstance(error, BowstoreError):
            raise
        say(f"warning: {place.parent} cannot be written ({error.strerror}): the GPU's decoder is tried at each start")
        return judged(asked(command, seconds), machine)


def asked(command: Sequence[str], seconds: float) -> Ended:
    """A trial's answers, and those on the hardware from a process that is apart from it.

    Where the GPU's cores decode and its hardware decoder fails, another trial does without that.
    """
    ended = tried(command, seconds)
    hardware = tried([*command, "hardware"], seconds)
    answers = {"lack": f"asking for it {hardware.how}", **hardware.answers, **ended.answers}
    if (wrong := _wrong(ended, "image")) and not _wrong(ended, "cores"):
        ended = tried([*command, "cores"], seconds)
        answers |= {"engines": 0, "lack": f"a trial of it {wrong}", "image": None, **ended.answers}
    return ended._replace(answers=answers)


def tried(command: Sequence[str], seconds: float) -> Ended:
    """Run a trial to its end, whatever that is."""
    try:
        result = subprocess.run(command, capture_output=True, timeout=seconds, check=False)
        output, errors, code = result.stdout, result.stderr, result.returncode
    except subprocess.TimeoutExpired as late:
        output, errors, code = late.stdout or b"", late.stderr or b"", None
    answers: dict[str, Any] = {}
    for line in output.decode(errors="replace").splitlines():
        if line.startswith("{") and line.endswith("}"):
            answers |= json.loads(line)
    return Ended(answers, _how(code, errors.decode(errors="replace"), seconds))


def judged(ended: Ended, machine: dict[str, str]) -> Decoding:
    """What a trial says.

    Raises:
        BowstoreError: not even whole images were decoded, or wrongly.
    """
    answers, how = ended
    libraries = f"DALI {machine['dali']} with nvImageCodec {machine['nvimgcodec']}"
    if wrong := _wrong(ended, "image"):
        raise BowstoreError(
            f"{machine['gpu']} cannot decode images: a trial of {libraries} {wrong}; update the driver (it is "
            f"{machine['driver']}), install other versions of nvidia-dali and nvidia-nvimgcodec, or use --device cpu"
        )
    window, why = answers.get("slice"), ""
    if window is None:
        why = f"decoding windows alone {how or 'was left out'} in a trial of {libraries}"
    elif (nvjpeg := tuple(answers.get("nvjpeg", _SMOOTH_WINDOWS))) < _SMOOTH_WINDOWS:
        # nvImageCodec 0.9.0 hands windows over to the CPU then, and says nothing: equal, and slow.
        why = f"nvJPEG {nvjpeg[0]}.{nvjpeg[1]} does not upsample chroma smoothly at the edges of windows, 13.2 does"
    elif window > _WINDOW_LEVELS:
        why = f"windows alone differ by {window:.1f} of 255 in a trial of {libraries}, bound {_WINDOW_LEVELS:g}"
    engines = answers.get("engines", 0)
    lack = "" if engines else _NO_VIDEO if machine["video"] == _MISSING else answers.get("lack", "not known why")
    return Decoding("image" if why else "slice", why, engines, lack)


def _wrong(ended: Ended, what: str) -> str:
    """What is wrong with the whole images of a trial's answer, as the end of a sentence; empty if nothing is."""
    if (levels := ended.answers.get(what)) is None:
        return ended.how or "came to its end without decoding anything"
    bad = levels > _IMAGE_LEVELS
    return f"gave pixels that differ by {levels:.1f} of 255 from Pillow's, bound {_IMAGE_LEVELS:g}" if bad else ""


def _how(code: int | None, errors: str, seconds: float) -> str:
    """How a process ended that did not come to its end; the library's last line is its own reason."""
    if code == 0:
        return ""
    lines = [_COLOUR.sub("", line).strip() for line in errors.splitlines() if line.strip()]
    said = f" ({lines[-1][:_SAID_LETTERS]})" if lines else ""
    if code is None:
        return f"gave no answer within {seconds:g} s{said}"
    if code < 0:
        return f"ended with {signal.Signals(-code).name}{said}"
    return f"failed{said}"


def _kept(place: Path, machine: dict[str, str]) -> Decoding | None:
    """The answer in a file; None where there is none, or it is damaged or of something else."""
    try:
        value = read_json(place)
        found = Decoding(value["way"], value["why"], value["engines"], value["lack"])
        whole = [type(each) for each in found] == [str, str, int, str] and found.way in get_args(Way)
        return found if whole and value["machine"] == machine else None
    except (BowstoreError, OSError, KeyError, TypeError):
        return None


def _machine(device: torch.device) -> dict[str, str]:
    """What an answer depends on."""
    versions = library_versions()
    return {
        "gpu": torch.cuda.get_device_name(device),
        "driver": driver_version(),
        "video": _MISSING if decoder_note() else "there",  # may differ between containers of one machine
        **{name: versions[name] for name in _LIBRARIES},
        "trial": str(TRIAL),
    }


def _digest(machine: dict[str, str]) -> str:
    return hashlib.sha256(json.dumps(machine, sort_keys=True).encode()).hexdigest()[:16]
