"""Damage to a checkpoint or an exported network is found before anything is made of it, and nothing is lost."""

import errno
import io
import json
import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bowstore import runs
from bowstore.config import ModelConfig, dump
from bowstore.errors import CorruptError, MismatchError, TrainingError
from bowstore.models import saved
from bowstore.models.registry import build_backbone
from bowstore.models.saved import (
    checkpoint_bytes,
    load_backbone,
    load_checkpoint,
    network_of,
    newest_checkpoint,
    save_backbone,
)
from bowstore.models.weights import content_digest
from bowstore.train import loop
from bowstore.train.checkpoint import Checkpoints, prune, save_checkpoint
from bowstore.train.config import TrainConfig

Make = Callable[..., TrainConfig]
SMALL = {"arch": "wrn-10-1", "strides": (2, 2, 1)}


def small_state(step: int = 5) -> dict[str, Any]:
    """The parts of a checkpoint, of a network of a few numbers."""
    draw = torch.Generator().manual_seed(step)
    return {
        "step": step,
        "config": {"name": "small", "optim": {"lr": 0.1, "milestones": [1, 2]}, "student": None},
        "inputs": {"shards": "0" * 32},
        "backbone": {f"layer{n}.weight": torch.randn(5, 7, generator=draw) for n in range(4)},
        "head": {"gamma": torch.tensor(1.0), "batches": torch.tensor(3)},
        "optimizer": {
            "state": {0: {"momentum_buffer": torch.randn(5, 7, generator=draw)}},
            "param_groups": [{"lr": 1}],
        },
    }


def write_checkpoints(run: Path, *steps: int) -> list[Path]:
    run.mkdir(parents=True, exist_ok=True)
    return [save_checkpoint(run, small_state(step)) for step in steps]


def flipped(data: bytes, bit: int) -> bytes:
    copy = bytearray(data)
    copy[bit // 8] ^= 1 << bit % 8
    return bytes(copy)


def write_export(path: Path) -> Path:
    network = network_of({"name": "small", "task": "rotation", "model": SMALL}, "test")
    save_backbone(path, network.fresh(), network)
    return path


# --- digests


def test_a_flipped_bit_of_a_checkpoint_is_found_or_changes_nothing(tmp_path: Path) -> None:
    """Anywhere in the file: in weights, in what is pickled, in the archive's own records."""
    data, path = bytes(checkpoint_bytes(small_state())), tmp_path / "step-000000005.pt"
    path.write_bytes(data)
    whole = content_digest(load_checkpoint(path))
    found = 0
    for bit in np.random.default_rng(0).choice(8 * len(data), 300, replace=False).tolist():
        path.write_bytes(flipped(data, bit))
        try:
            state = load_checkpoint(path)
        except (CorruptError, MismatchError):
            found += 1
        else:
            assert content_digest(state) == whole, f"bit {bit}"
    assert found > 100


def test_every_flipped_bit_of_a_weight_is_found(tmp_path: Path) -> None:
    state, path = small_state(), tmp_path / "step-000000005.pt"
    data = bytes(checkpoint_bytes(state))
    first = data.index(state["backbone"]["layer1.weight"].numpy().tobytes())
    for bit in range(8 * first, 8 * first + 32):
        path.write_bytes(flipped(data, bit))
        with pytest.raises(
            CorruptError, match=r"not a whole bowstore checkpoint \(.*data/\d+.* differs from its check"
        ):
            load_checkpoint(path)


@pytest.mark.parametrize("part", ["backbone", "head", "optimizer", "step", "config", "inputs", "version"])
def test_a_checkpoint_that_holds_something_else_than_was_saved_is_refused(tmp_path: Path, part: str) -> None:
    """Whatever wrote it: the archive's own checksums are right here."""
    state = torch.load(io.BytesIO(checkpoint_bytes(small_state())), weights_only=True)
    assert state["digest"] == content_digest({k: v for k, v in state.items() if k != "digest"})
    other = {"version": 1, **small_state(6), "step": 7, "config": {"name": "other"}, "inputs": {"shards": "1"}}
    other["head"] = {"gamma": torch.tensor(1.5), "batches": torch.tensor(3)}
    torch.save({**state, part: other[part]}, tmp_path / "other.pt")
    with pytest.raises(CorruptError, match=rf"differs from the digest {state['digest']} that was recorded in it"):
        load_checkpoint(tmp_path / "other.pt")


def test_a_digest_is_of_content_and_not_of_its_form() -> None:
    tensor = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    value = {"a": tensor, "b": [1, 2.5, "x", None, True], 3: (torch.zeros(0), torch.tensor(True))}
    same = {3: value[3], "b": value["b"], "a": tensor.contiguous(memory_format=torch.channels_last)}  # type: ignore[index]
    assert content_digest(value) == content_digest(same)
    others = [
        {**value, "a": tensor.double()}, {**value, "a": tensor.reshape(3, 2, 4, 4)}, {**value, "c": None},
        {**value, "b": (1, 2.5, "x", None, True)}, {**value, "b": [1, 2.5, "x", None, 1]}, {**value, "a": -tensor},
        {**value, "b": [1, 2.5, "x"]}, {**value, "b": [1.0, 2.5, "x", None, True]},
    ]  # fmt: skip
    digests = [content_digest(other) for other in others]
    assert len({content_digest(value), *digests}) == len(others) + 1
    with pytest.raises(TypeError, match="a set has no digest"):
        content_digest({"a": {1, 2}})


def test_a_checkpoint_of_before_digests_is_loaded_with_a_line_and_its_archive_checked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "step-000000005.pt"
    torch.save({"version": 1, **small_state()}, path)
    data = path.read_bytes()
    assert torch.equal(load_checkpoint(path)["backbone"]["layer1.weight"], small_state()["backbone"]["layer1.weight"])
    assert capsys.readouterr().err.splitlines() == [
        f"{path} was written before checkpoints had a digest: no more than its archive's own checksums was checked; "
        f"the next checkpoint has one"
    ]
    first = data.index(small_state()["backbone"]["layer1.weight"].numpy().tobytes())
    path.write_bytes(flipped(data, 8 * first + 3))
    with pytest.raises(CorruptError, match="differs from its checksum"):
        load_checkpoint(path)


def test_a_flipped_bit_of_an_export_is_found_or_changes_nothing(tmp_path: Path) -> None:
    path = write_export(tmp_path / "backbone.safetensors")
    data = path.read_bytes()
    tensors, network = saved.load_export(path)
    whole, header = content_digest([tensors, dump(network)]), 8 * (8 + int.from_bytes(data[:8], "little"))
    draw = np.random.default_rng(0)
    bits = [*draw.choice(header, 60, replace=False).tolist(), *draw.integers(header, 8 * len(data), 60).tolist()]
    for bit in bits:
        path.write_bytes(flipped(data, bit))
        try:
            found = saved.load_export(path)
        except (CorruptError, MismatchError):
            pass
        else:
            assert bit < header
            assert content_digest([found[0], dump(found[1])]) == whole, f"bit {bit}"


def test_an_export_of_before_digests_is_loaded_with_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_export(tmp_path / "backbone.safetensors")
    tensors, network = saved.load_export(path)
    path.write_bytes(saved.safetensors.torch.save(tensors, metadata={"bowstore": json.dumps(dump(network))}))
    assert capsys.readouterr().err == ""
    assert load_backbone(path).saved.name == "small"
    line = f"{path} was written before exported networks had a digest: its weights were not checked"
    assert capsys.readouterr().err.splitlines() == [line]


# --- what is no checkpoint, or not all of one


@pytest.mark.parametrize("part", ["step", "config", "inputs", "backbone", "head", "optimizer", "digest"])
def test_a_checkpoint_that_lacks_a_part_is_damaged(tmp_path: Path, part: str) -> None:
    state = torch.load(io.BytesIO(checkpoint_bytes(small_state())), weights_only=True)
    del state[part]
    torch.save(state, tmp_path / "part.pt")
    lost = "its digest" if part == "digest" else part
    with pytest.raises(CorruptError, match=rf"part\.pt is not a whole bowstore checkpoint \(it lacks {lost}\)"):
        load_checkpoint(tmp_path / "part.pt")


@pytest.mark.parametrize("version", [3, 99, "2", None, 2.5, torch.zeros(2)])
def test_a_checkpoint_of_another_version_stops_the_run(tmp_path: Path, version: Any) -> None:
    run = tmp_path
    write_checkpoints(run, 5, 10)
    content = {**small_state(10), "version": version}
    for state in (content, {**content, "digest": content_digest(content)}):
        torch.save(state, run / "checkpoints" / "step-000000010.pt")
        with pytest.raises(
            MismatchError, match=r"step-000000010\.pt has checkpoint format .*, this bowstore reads 1 a"
        ):
            newest_checkpoint(run)


def test_files_of_other_kinds_are_called_by_their_names(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "ran",))

    torch.save({"version": 1, "x": Evil()}, tmp_path / "evil.pt")
    torch.save({"weight": torch.zeros(3)}, tmp_path / "foreign.pt")
    torch.save({"weight": torch.zeros(3)}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    (tmp_path / "pointer.pt").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n")
    (tmp_path / "pointer.safetensors").write_bytes((tmp_path / "pointer.pt").read_bytes())
    (tmp_path / "text.pt").write_bytes(b"<html>not found</html>")
    with zipfile.ZipFile(tmp_path / "program.pt", "w") as archive:
        for name in ("data.pkl", "code/__torch__.py", "constants.pkl"):
            archive.writestr(f"program/{name}", b"x")
    expected = {
        "evil.pt": r"evil.pt is not a whole bowstore checkpoint \(Python objects that could run code: getattr\)",
        "foreign.pt": r"foreign.pt is no checkpoint of bowstore; weights of other codebases go with an architecture",
        "old.pt": r"old.pt is no checkpoint of bowstore; weights of other codebases go with an architecture",
        "pointer.pt": r"it is a pointer of git-lfs and not the file itself; run `git lfs pull`",
        "pointer.safetensors": r"it is a pointer of git-lfs and not the file itself; run `git lfs pull`",
        "text.pt": r"text.pt is no checkpoint of bowstore: it is a web page",
        "program.pt": r"it is a TorchScript program, which is never run; save the state dict of its module alone",
    }
    for name, pattern in expected.items():
        with pytest.raises((CorruptError, MismatchError), match=pattern) as error:
            load_backbone(tmp_path / name)
        assert "weights_only" not in str(error.value)
        assert "torch.load" not in str(error.value)
    assert not (tmp_path / "ran").exists()


def test_an_export_is_known_by_its_bytes(tmp_path: Path) -> None:
    path = write_export(tmp_path / "backbone.safetensors")
    path.rename(tmp_path / "teacher.bin")
    assert load_backbone(tmp_path / "teacher.bin").saved.name == "small"
    config = json.loads(TrainConfig(name="small", task="words", model=ModelConfig(**SMALL)).model_dump_json())  # type: ignore[arg-type]
    state = {**small_state(), "config": config, "backbone": build_backbone(ModelConfig(**SMALL)).state_dict()}  # type: ignore[arg-type]
    (tmp_path / "step.safetensors").write_bytes(checkpoint_bytes(state))
    assert load_backbone(tmp_path / "step.safetensors").saved.name == "small"


# --- the newest sound one


def test_damaged_checkpoints_are_named_and_passed_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = write_checkpoints(tmp_path, 5, 10, 15, 20)
    paths[3].write_bytes(paths[3].read_bytes()[:1000])
    paths[2].write_bytes(b"")
    state = newest_checkpoint(tmp_path)
    assert state is not None
    assert state["step"] == 10
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition(" (")[0] for line in lines] == [
        f"warning: {path} is not a whole bowstore checkpoint" for path in (paths[3], paths[2])
    ]
    assert all(line.endswith("; trying the one before") for line in lines)


def test_a_run_of_damaged_checkpoints_is_refused(make_config: Make, tmp_path: Path) -> None:
    config = make_config("rotation")
    run = tmp_path / "runs" / config.name
    for path in write_checkpoints(run, 1, 2):
        path.write_bytes(flipped(path.read_bytes(), 8 * 500))
    (run / "config.yaml").write_text(json.dumps(json.loads(config.model_dump_json())))
    before = {path: path.read_bytes() for path in runs.checkpoints(run)}
    with pytest.raises(
        CorruptError,
        match=r"no checkpoint of .* is sound, and there are 2 \(the last tried: .*step-000000001.*\); restore one fr",
    ):
        loop.train(config, tmp_path / "runs")
    assert {path: path.read_bytes() for path in runs.checkpoints(run)} == before


@pytest.mark.parametrize(
    "error",
    [
        PermissionError(errno.EACCES, "Permission denied"),
        OSError(errno.EIO, "Input/output error"),
        OSError(errno.ESTALE, "Stale file handle"),
        OSError(errno.EMFILE, "Too many open files"),
        MemoryError(),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried to allocate"
        ),
    ],
)
def test_an_error_of_the_machine_stops_the_run_and_costs_no_checkpoint(
    make_config: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    config = make_config("rotation", optim={"epochs": 1, "milestones": []})
    run = tmp_path / "runs" / config.name
    write_checkpoints(run, 1, 2)
    (run / "config.yaml").write_text(json.dumps(json.loads(config.model_dump_json())))
    before = {path: path.read_bytes() for path in runs.checkpoints(run)}

    def fail(*args: Any, **kwargs: Any) -> Any:
        raise error

    where: tuple[Any, str] = (torch, "load") if isinstance(error, RuntimeError) else (Path, "read_bytes")
    with monkeypatch.context() as patch:
        patch.setattr(*where, fail)
        with pytest.raises(type(error)) as raised:
            newest_checkpoint(run)
        assert raised.value is error
        with pytest.raises(type(error)):
            loop.train(config, tmp_path / "runs")
    assert {path: path.read_bytes() for path in runs.checkpoints(run)} == before


def test_a_folder_of_checkpoints_that_cannot_be_listed_stops_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_checkpoints(tmp_path, 5)

    def refuse(path: Path) -> list[str]:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(runs.os, "listdir", refuse)
    with pytest.raises(PermissionError):
        newest_checkpoint(tmp_path)


def test_a_checkpoint_under_the_name_of_another_step_is_passed_over(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old, new = write_checkpoints(tmp_path, 5, 10)
    new.write_bytes(old.read_bytes())
    assert newest_checkpoint(tmp_path)["step"] == 5  # type: ignore[index]
    assert "step-000000010.pt holds step 5: it was renamed, or copied over another one" in capsys.readouterr().err


@pytest.mark.parametrize(("make", "kind"), [(os.mkdir, "a folder"), (os.mkfifo, "a pipe, socket or device")])
def test_what_is_no_file_stops_the_run(tmp_path: Path, make: Callable[[Path], None], kind: str) -> None:
    write_checkpoints(tmp_path, 5)
    make(tmp_path / "checkpoints" / "step-000000010.pt")
    with pytest.raises(MismatchError, match=rf"step-000000010\.pt is {kind} and not a file; move it away, or restore"):
        newest_checkpoint(tmp_path)


# --- what is kept


def test_a_checkpoint_that_was_passed_over_is_set_aside_and_never_deleted(
    make_config: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = make_config("rotation", runtime={"keep_checkpoints": 1})
    run = tmp_path / "runs" / config.name
    loop.train(make_config("rotation"), tmp_path / "whole")
    (run / "checkpoints").mkdir(parents=True)
    sound = tmp_path / "whole" / config.name / "checkpoints" / "step-000000010.pt"
    for step, data in ((10, sound.read_bytes()), (11, b"damaged"), (12, b"damaged too")):
        (run / "checkpoints" / f"step-{step:09d}.pt").write_bytes(data)
    (run / "config.yaml").write_text(json.dumps(json.loads(config.model_dump_json())))
    loop.train(config, tmp_path / "runs")
    assert {path.name: path.read_bytes() for path in (run / "checkpoints").iterdir() if path.suffix != ".pt"} == {
        "step-000000011.pt.damaged": b"damaged",
        "step-000000012.pt.damaged": b"damaged too",
    }
    assert [path.name for path in runs.checkpoints(run)] == ["step-000000012.pt"]
    assert "step-000000011.pt is no checkpoint of bowstore: it is text" in capsys.readouterr().err


def test_a_second_damaged_checkpoint_of_a_step_gets_another_name(tmp_path: Path) -> None:
    for data in (b"one", b"two"):
        write_checkpoints(tmp_path, 4, 5)[1].write_bytes(data)
        Checkpoints(tmp_path, keep=2, start=4, writes=False)
        assert [path.name for path in runs.checkpoints(tmp_path)] == ["step-000000005.pt", "step-000000004.pt"]
        Checkpoints(tmp_path, keep=2, start=4, writes=True)
    folder = tmp_path / "checkpoints"
    assert (folder / "step-000000005.pt.damaged").read_bytes() == b"one"
    assert (folder / "step-000000005.pt.damaged-2").read_bytes() == b"two"
    assert [path.name for path in runs.checkpoints(tmp_path)] == ["step-000000004.pt"]


def test_old_checkpoints_go_once_the_newest_is_proved(tmp_path: Path) -> None:
    def steps() -> list[int]:
        return sorted(int(path.stem.partition("-")[2]) for path in (tmp_path / "checkpoints").iterdir())

    kept = Checkpoints(tmp_path, keep=1, start=None, writes=True)
    kept.save(small_state(100))
    kept.proved()
    kept.save(small_state(200))
    assert (steps(), kept.unproven) == ([100, 200], True)
    kept.proved()
    assert (steps(), kept.unproven) == ([200], False)
    write_checkpoints(tmp_path, 300, 400)
    prune(tmp_path, keep=2)
    assert steps() == [300, 400]


# --- divergence


@pytest.mark.parametrize(("task", "rate", "save", "log"), [
    ("words", 1e38, 1, 1), ("words", 1e38, 1, 100), ("rotation", 1e38, 2, 3), ("words", 1e10, 1, 1),
    ("rotation", 1e5, 100, 1),
])  # fmt: skip
def test_the_resume_that_a_diverged_run_advises_works(
    make_config: Make, tmp_path: Path, task: str, rate: float, save: int, log: int
) -> None:
    """A rate so high that the next step's loss, gradients or statistics are not finite, though the weights are."""
    runtime = {"checkpoint_every_steps": save, "log_every_steps": log}
    config = make_config(task, optim={"lr": rate}, runtime=runtime)
    with pytest.raises(TrainingError, match=r"not finite|the loss is (nan|inf|\d)") as error:
        loop.train(config, tmp_path / "runs")
    assert f"at learning rate {rate:g}; lower optim.lr and run again with --resume to begin anew" in str(error.value)
    run = tmp_path / "runs" / config.name
    assert newest_checkpoint(run) is None
    assert loop.train(make_config(task, runtime=runtime), tmp_path / "runs", resume=True).steps == 12
    loop.train(make_config(task, name="whole"), tmp_path / "runs")
    final, whole = newest_checkpoint(run), newest_checkpoint(tmp_path / "runs" / "whole")
    assert final is not None
    assert whole is not None
    assert content_digest([final["backbone"], final["head"]]) == content_digest([whole["backbone"], whole["head"]])


def test_a_checkpoint_that_fails_at_a_lower_rate_too_is_set_aside(tmp_path: Path) -> None:
    """Found sound by the step after it, and bad all the same: each advised --resume goes further back."""
    write_checkpoints(tmp_path, 3, 4)
    for start, advised in ((4, "to go on from step-000000003.pt"), (3, "to begin anew")):
        kept = Checkpoints(tmp_path, keep=2, start=start, slower=True, writes=True)
        kept.proved()
        name = f"step-00000000{start}.pt"
        assert kept.diverged() == f"{advised} ({name} leads here again: it is now {name}.diverged)"
    write_checkpoints(tmp_path, 4)
    for slower, saved_since in ((False, False), (True, True)):
        kept = Checkpoints(tmp_path, keep=2, start=4, slower=slower, writes=True)
        kept.proved()
        if saved_since:
            kept.save(small_state(5))
            kept.proved()
        assert kept.diverged() == f"to go on from step-00000000{5 if saved_since else 4}.pt"
    kept = Checkpoints(tmp_path, keep=2, start=5, writes=True)
    kept.diverged()
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == [
        "step-000000003.pt.diverged", "step-000000004.pt", "step-000000004.pt.diverged", "step-000000005.pt.diverged",
    ]  # fmt: skip


@pytest.mark.parametrize("save", [1, 3])
def test_a_rate_too_high_in_a_second_sitting_loses_no_good_checkpoint(
    make_config: Make, tmp_path: Path, save: int
) -> None:
    config = make_config(optim={"epochs": 1, "milestones": []}, runtime={"keep_checkpoints": 1})
    loop.train(config, tmp_path / "runs")
    run = tmp_path / "runs" / config.name
    (good,) = runs.checkpoints(run)
    before = good.read_bytes()
    runtime = {"checkpoint_every_steps": save, "keep_checkpoints": 1}
    for _ in range(2):
        with pytest.raises(TrainingError, match=r"--resume to go on from step-000000004\.pt"):
            loop.train(make_config(optim={"epochs": 3, "lr": 1e38}, runtime=runtime), tmp_path / "runs", resume=True)
        assert runs.checkpoints(run) == [good]
        assert good.read_bytes() == before
    assert loop.train(make_config(optim={"epochs": 3}), tmp_path / "runs", resume=True).steps == 12


@pytest.mark.parametrize("what", ["weights", "momenta"])
def test_what_is_not_finite_is_never_saved(
    make_config: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    original, count = loop.train_step, 0

    def step(model: torch.nn.Module, optimizer: torch.optim.Optimizer, *args: Any, **kwargs: Any) -> Any:
        nonlocal count
        count += 1
        scalars = original(model, optimizer, *args, **kwargs)
        if count == 10:  # the loss of this step was finite, and a checkpoint is due
            parameter = next(iter(model.parameters()))
            values = parameter.data if what == "weights" else optimizer.state[parameter]["momentum_buffer"]
            values[0, 0, 0, 0] = float("inf")
        return scalars

    monkeypatch.setattr(loop, "train_step", step)
    with pytest.raises(TrainingError, match=r"^the weights are not finite by step 10 .*go on from step-000000005\.pt"):
        loop.train(make_config("rotation"), tmp_path / "runs")
    assert [path.name for path in runs.checkpoints(tmp_path / "runs" / "rotation-run")] == ["step-000000005.pt"]
