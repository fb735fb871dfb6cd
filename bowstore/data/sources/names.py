"""What names and first bytes tell: splits, images, and what systems leave behind in every folder."""

import os
import re
from collections.abc import Callable

# All but the last four are what Pillow reads; those are listed so that they end in quarantine and not unseen.
IMAGE_SUFFIXES = frozenset(
    ".jpg .jpeg .jpe .jfif .jif .mpo .png .apng .webp .bmp .dib .gif .tif .tiff .ppm .pgm .pbm .pnm"
    " .jp2 .j2k .j2c .jpc .jpf .jpx .avif .avifs .heic .heif .hif .jxl".split()
)
# Files of other kinds that lie beside images in great numbers; they are not opened to see what they are.
_OTHER_SUFFIXES = frozenset(
    ".txt .cls .json .jsonl .csv .tsv .xml .yaml .yml .md .rst .log .html .htm .pdf .py .ipynb .sh .m .db .ini"
    " .npy .npz .mat .h5 .hdf5 .pkl .pickle .pth .pt .pyd .safetensors .parquet .lmdb .md5 .sha256"
    " .zip .tar .gz .tgz .bz2 .xz .zst .7z .rar .mp4 .avi .mov .mkv .webm .mp3 .wav .flac"
    # What cameras call raw begins as a TIFF does, and the TIFF in it is a thumbnail.
    " .dng .cr2 .cr3 .crw .nef .nrw .arw .srf .sr2 .orf .rw2 .raf .pef .srw .erf .3fr .fff .iiq .kdc .dcr .mef .mos"
    " .mrw .rwl .x3f .gpr".split()
)
_WORD = re.compile(r"[a-z]+")
SIGNATURE_BYTES = 32
_SIGNATURES = (
    b"\xff\xd8\xff",
    b"\x89PNG\r\n\x1a\n",
    b"GIF87a",
    b"GIF89a",
    b"II*\0",
    b"MM\0*",
    b"\0\0\0\x0cjP  ",
    b"\xff\x4f\xff\x51",
    b"\0\0\0\x0cJXL ",
)
_BOX_BRANDS = (b"avif", b"avis", b"heic", b"heix", b"mif1")  # behind "ftyp"
_BMP_HEADER_BYTES = (12, 40, 52, 56, 64, 108, 124)
_SPLIT_WORDS = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "dev": "val",
    "test": "test",
    "testing": "test",
}
# Of Synology, QNAP, Windows, ext file systems and macOS. Names with a dot in front are hidden on all but Windows:
# .DS_Store, .git, ._* (where macOS keeps what other file systems cannot).
_SYSTEM_NAMES = frozenset(
    (
        "@eadir",
        "@recycle",
        "@recently-snapshot",
        "#recycle",
        "#snapshot",
        "$recycle.bin",
        "recycler",
        "system volume information",
        "lost+found",
        "__macosx",
        "thumbs.db",
        "desktop.ini",
    )
)


def splits_in(name: str) -> set[str]:
    """The splits that words in a name tell: train of train2017, imagenet-train-0000, Train_images."""
    return {split for word in _WORD.findall(name.lower()) if (split := split_of(word))}


def split_of(word: str) -> str | None:
    """The split that a word such as "Validation" names, or None."""
    return _SPLIT_WORDS.get(word.strip().lower())


def is_system(name: str) -> bool:
    """Whether a file or folder is hidden, or is one that systems make by themselves; it is then nobody's data."""
    return name.startswith(".") or name.casefold() in _SYSTEM_NAMES


def is_system_member(path: str) -> bool:
    """Whether a member of a tar is such a file, or lies in a folder that systems make by themselves.

    Hidden folders are read: whoever writes a tar chooses its names, and readers of WebDataset take them, too.
    """
    *folders, leaf = path.split("/")
    return is_system(leaf) or any(folder.casefold() in _SYSTEM_NAMES for folder in folders)


def has_image_suffix(name: str) -> bool:
    """Whether a name ends as those of images do, in any case."""
    return os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES


def is_image(name: str, first_bytes: Callable[[], bytes]) -> bool:
    """Whether a file is an image by its suffix or, where that tells nothing, by its first `SIGNATURE_BYTES`.

    So photo, photo.jpg?itok=1 and photo.0 are images if they begin as images do.
    """
    suffix = os.path.splitext(name)[1].lower()
    if suffix in IMAGE_SUFFIXES or suffix in _OTHER_SUFFIXES:
        return suffix in IMAGE_SUFFIXES
    start = first_bytes()
    return (
        start.startswith(_SIGNATURES)
        or (start[:4], start[8:12]) == (b"RIFF", b"WEBP")
        or (start[4:8] == b"ftyp" and start[8:12] in _BOX_BRANDS)
        or (start[:2] == b"BM" and int.from_bytes(start[14:18], "little") in _BMP_HEADER_BYTES)
        or (start[:1] == b"P" and start[1:2] in b"123456" and start[2:3].isspace())
    )
