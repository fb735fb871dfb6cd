"""Files that people give as weights: each is told for what it is, and none is ever loaded as code."""

import gzip
import io
import os
import pickle
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from bowstore.config import ModelConfig
from bowstore.errors import BowstoreError, CorruptError, DataError, UsageError
from bowstore.models.backbone import Backbone
from bowstore.models.layouts import load_foreign, read_weights
from bowstore.models.registry import build_backbone
from bowstore.models.weights import weights_sha256

ARCH = "wrn-10-1"
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 102502400\n"


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    torch.manual_seed(1)
    return build_backbone(ModelConfig(arch=ARCH))


@pytest.fixture(scope="module")
def saved(backbone: Backbone) -> bytes:
    buffer = io.BytesIO()
    torch.save(backbone.state_dict(), buffer)
    return buffer.getvalue()


def zipped(**members: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in members.items():
            archive.writestr(name.replace("__", "/"), data)
    return buffer.getvalue()


def tarred() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        archive.addfile(tarfile.TarInfo("model.pth"))
    return buffer.getvalue()


def numpy_file(array: Any = None, **arrays: Any) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, **arrays) if arrays else np.save(buffer, array)
    return buffer.getvalue()


def torch_file(value: Any, **how: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer, **how)
    return buffer.getvalue()


def script() -> bytes:
    with torch.no_grad():
        traced = torch.jit.trace(nn.Linear(2, 2), torch.ones(1, 2))  # type: ignore[no-untyped-call]
    buffer = io.BytesIO()
    torch.jit.save(traced, buffer)
    return buffer.getvalue()


MODULE = nn.Sequential(nn.Linear(2, 2))
CODE = r"more than tensors .*: torch\.nn\.modules\.container\.Sequential\), which is never loaded; save its state dict"
KINDS: dict[str, tuple[Callable[[], bytes], str]] = {
    "TorchScript": (script, "is no weights file: it is a TorchScript program, which is never run; save the state dict"),
    "git-lfs": (lambda: POINTER.encode(), "it is a pointer of git-lfs and not the file itself; run `git lfs pull`"),
    "git-annex": (lambda: b"/annex/objects/MD5E-s1--0.pth\n", "it is a pointer of git-annex .* run `git annex get`"),
    "web page": (lambda: b"\n<!DOCTYPE html>\n<html>Sign in</html>", r"it is a web page .* take its download link"),
    "error page": (lambda: b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>', "it is a web page"),
    "error": (lambda: b'{"message": "Not Found"}', "it is JSON text, such as a configuration or a server's error"),
    "index": (lambda: b'{"metadata": {}, "weight_map": {"a": "model-1.safetensors"}}', "network's several files"),
    "text": (lambda: b"hello\n", r"it is text \('hello'\), not weights"),
    "other text": (lambda: "Zugriff verweigert: für Gäste".encode() + b"\n", r"it is text \('Zugriff .*'\), not"),
    "gzip": (lambda: gzip.compress(b"weights"), r"it is compressed with gzip; unpack it first \(gunzip\)"),
    "zstd": (lambda: b"\x28\xb5\x2f\xfd" + bytes(40), r"it is compressed with zstd; unpack it first"),
    "zip": (lambda: zipped(**{"model.pth": b"w"}), r"it is a zip archive of other files \(model\.pth\)"),
    "tar": (tarred, "it is a tar archive; unpack it first"),
    "npy": (lambda: numpy_file(np.ones(3)), "it is one array of NumPy"),
    "npz": (lambda: numpy_file(a=np.ones(3)), "it is an archive of NumPy arrays; convert it"),
    "pickle": (lambda: pickle.dumps({"a": np.ones(3)}), "it is a pickle of Python objects, which is never loaded"),
    "text pickle": (lambda: pickle.dumps({"a": np.ones(3)}, protocol=0), "it is a pickle of Python objects"),
    "Keras h5": (lambda: b"\x89HDF\r\n\x1a\n" + bytes(90), "it is an HDF5 file, as Keras writes; convert it"),
    "Keras": (lambda: zipped(**{"config.json": b"{}", "model.weights.h5": b""}), "it is a network of Keras"),
    "export": (lambda: zipped(a__archive_format=b"pt2", a__data__w=b""), "it is a program of torch.export"),
    "ONNX": (lambda: b"\x08\x07\x12\x07pytorch\x1a\x052.1.0" + bytes(90), "it is a network of ONNX or TensorFlow"),
    "TensorFlow Lite": (lambda: b"\x1c\0\0\0TFL3" + bytes(90), "it is a network of TensorFlow Lite"),
    "Flax": (lambda: b"\x81\xa6params\x82" + bytes(90), "it is a msgpack file of Flax"),
    "GGUF": (lambda: b"GGUF\3" + bytes(90), "it is a GGUF file"),
    "empty": (lambda: b"", r"is empty \(0 bytes\): its download or copy did not happen; fetch it again"),
    "module": (lambda: torch_file(MODULE), CODE),
    "nested module": (lambda: torch_file({"epoch": 1, "model": MODULE}), CODE),
    "old module": (lambda: torch_file(MODULE, _use_new_zipfile_serialization=False), CODE),
    "arrays": (lambda: torch_file({"a": np.ones(3)}), r"holds more than tensors .* could run code: numpy\."),
    "protocol": (
        lambda: torch_file({"a": torch.ones(2)}, pickle_protocol=4),
        "pickle protocol that PyTorch reads only as code; 2 is",
    ),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("kind", KINDS)
def test_other_files_are_told_for_what_they_are(kind: str, backbone: Backbone, tmp_path: Path) -> None:
    make, told = KINDS[kind]
    data = make()
    for name in ("w.pth", "w.safetensors"):
        path = tmp_path / name
        path.write_bytes(data)
        with pytest.raises(DataError, match=told) as caught:
            load_foreign(backbone, read_weights(path))
        assert not isinstance(caught.value, CorruptError)
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)
        assert "weights_only" not in str(caught.value)


def test_weights_under_any_name_are_loaded(backbone: Backbone, saved: bytes, tmp_path: Path) -> None:
    state = backbone.state_dict()
    digest = weights_sha256(state)
    save_file({name: tensor.clone() for name, tensor in state.items()}, tmp_path / "model.bin")
    (tmp_path / "model.safetensors").write_bytes(saved)
    (tmp_path / "old.tar").write_bytes(torch_file(state, _use_new_zipfile_serialization=False))
    (tmp_path / "old.safetensors").write_bytes((tmp_path / "old.tar").read_bytes())
    for path in sorted(tmp_path.iterdir()):
        other = build_backbone(ModelConfig(arch=ARCH))
        load_foreign(other, read_weights(path))
        assert weights_sha256(other.state_dict()) == digest


def wrapped(state: dict[str, Tensor], prefix: str, shift: float = 0.0) -> dict[str, Tensor]:
    return {f"{prefix}{name}": t + shift if t.is_floating_point() else t for name, t in state.items()}


def test_what_training_wraps_around_names_is_taken_off(backbone: Backbone, tmp_path: Path) -> None:
    state, digest, path = backbone.state_dict(), weights_sha256(backbone.state_dict()), tmp_path / "w.pth"
    inside = {name.replace("block1.", "block1._checkpoint_wrapped_module."): t for name, t in state.items()}
    for content in (
        {"state_dict": wrapped(state, "module.")},
        {"model": wrapped(state, "module._orig_mod.")},
        wrapped(inside, "_fsdp_wrapped_module."),
        {"state_dict": wrapped(state, "module.", 1), "state_dict_ema": wrapped(state, "module.")},
        {"model": wrapped(state, "", 1), "ema": {"decay": 0.99, "module": state}},
        {"n_averaged": torch.tensor(3), **wrapped(state, "module.")},  # torch.optim.swa_utils
    ):
        torch.save(content, path)
        other = build_backbone(ModelConfig(arch=ARCH))
        load_foreign(other, read_weights(path))
        assert weights_sha256(other.state_dict()) == digest


def test_damaged_weights_are_told_so(backbone: Backbone, saved: bytes, tmp_path: Path) -> None:
    path, old = tmp_path / "w.pth", torch_file(backbone.state_dict(), _use_new_zipfile_serialization=False)
    flipped = bytearray(saved)
    flipped[saved.index(backbone.state_dict()["stages.conv1.weight"].numpy().tobytes())] ^= 1
    for data, told in (
        (bytes(flipped), r"\(archive/data/\d+ differs from its checksum\); fetch it again"),
        (
            saved[:5000],
            r"damaged, cut off, or no file of torch\.save \(its end is missing or damaged\); fetch it again",
        ),
        (old[:100], r"\(it ends too early\)"),
        (np.random.default_rng(0).bytes(4000), r"\(nothing in it can be unpickled\)"),
    ):
        path.write_bytes(data)
        with pytest.raises(CorruptError, match=told) as caught:
            load_foreign(backbone, read_weights(path))
        assert "weights_only" not in str(caught.value)
    save_file({"a": torch.ones(9)}, tmp_path / "w.safetensors")
    os.truncate(tmp_path / "w.safetensors", 70)
    with pytest.raises(CorruptError, match=r"damaged or cut off \(.*\); fetch it again"):
        load_foreign(backbone, read_weights(tmp_path / "w.safetensors"))


def test_what_is_no_file(backbone: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    with pytest.raises(UsageError, match=r"weights .*model is a folder; name a file$"):
        load_foreign(backbone, read_weights(folder))
    (folder / "model.safetensors").touch()
    with pytest.raises(UsageError, match=r"is a folder; name a file in it: model\.safetensors"):
        load_foreign(backbone, read_weights(folder))
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UsageError, match="is a pipe, socket or device; name a file"):
        load_foreign(backbone, read_weights(tmp_path / "pipe"))
    path = tmp_path / "w.pth"
    torch.save(backbone.state_dict(), path)

    def refused(*_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "open", refused)
    with pytest.raises(PermissionError) as caught:
        load_foreign(backbone, read_weights(path))
    assert not isinstance(caught.value, BowstoreError)  # the machine's, not the file's
