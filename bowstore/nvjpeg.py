"""Which nvJPEG decodes: the one that was installed with DALI, whatever else in the process brings another."""

import ctypes
from functools import cache
from importlib.util import find_spec
from pathlib import Path


def nvjpeg_file() -> str:
    """The library that nvImageCodec is meant to load: that of the wheel beside it, or the system's."""
    spec = find_spec("nvidia")
    folders = spec.submodule_search_locations if spec and spec.submodule_search_locations else []
    for folder in folders:
        for place in ("cu13/lib/libnvjpeg.so.13", "nvjpeg/lib/libnvjpeg.so.12"):
            if (Path(folder) / place).exists():
                return str(Path(folder) / place)
    return "libnvjpeg.so.13"


@cache
def load_nvjpeg() -> ctypes.CDLL | None:
    """Load it, before another of its name is there; None where there is none.

    A process has one library of a name, the first that was loaded. A torchvision that was built on the machine may
    bring the system's nvJPEG, and one before 13.2 makes nvImageCodec decode windows of JPEGs elsewhere, with a
    warning for each (seen on an H100: encode's clean view at 13,600 images/s where the train view had 19,000).
    """
    try:
        return ctypes.CDLL(nvjpeg_file())
    except OSError:
        return None
