"""Faults of the file system, as a user meets them: one line with the path and the remedy."""

import errno
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from shard_sets import ShardMaker

from bowstore.cli import main
from bowstore.data.dali_errors import undecodable
from bowstore.errors import CorruptError
from bowstore.models.layouts import load_foreign, read_weights
from bowstore.progress import reader_is_gone
from bowstore.words.store import verify as words_verify
from bowstore.words.store.verify import VerifyReport


@pytest.mark.parametrize(
    ("number", "remedy"),
    [
        (errno.ENOTDIR, "a file lies where a folder is needed: name another path, or move the file away"),
        (errno.EISDIR, "a folder lies where a file is needed: name another path, or move the folder away"),
        (errno.EROFS, "name a path on a disk that can be written"),
        (errno.EACCES, "give yourself the permission, or name another path"),
        (errno.ENOSPC, "free some space and run the command again: it goes on where it stopped"),
    ],
)
def test_system_errors_say_what_to_do(monkeypatch: pytest.MonkeyPatch, number: int, remedy: str) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number), "/data/words")

    monkeypatch.setattr("bowstore.verify.verify_path", fail)
    result = CliRunner().invoke(main, ["verify", "x"])
    assert result.exit_code == 1
    assert result.stderr.startswith("Error: ")
    assert "(/data/words); " in result.stderr
    assert remedy in result.stderr
    assert result.stderr.count("\n") == 1


def test_a_store_below_a_file_says_so(make_shard_set: ShardMaker, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    where = ["--shards", str(make_shard_set(4).root), "--store", str(tmp_path / "file/x.zarr")]
    result = CliRunner().invoke(main, ["encode", "--teacher", "resnet18", "--layer", "conv4", "--K", "4", *where])
    assert result.exit_code == 1
    assert f"File exists ({tmp_path / 'file'}); move away what lies there, or name another path" in result.stderr


def test_repair_that_cannot_write_still_tells_the_damage(
    make_shard_set: ShardMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> int:
        raise OSError(errno.EROFS, "Read-only file system")

    (tmp_path / "zarr.json").touch()
    report = VerifyReport(problems=["chunk 1 is damaged"], damaged={"conv4": [1]})
    monkeypatch.setattr(words_verify, "verify", lambda *_, **__: report)
    monkeypatch.setattr(words_verify, "discard_damaged", fail)
    result = CliRunner().invoke(main, ["verify", str(tmp_path), "--repair"])
    assert result.exit_code == 1
    assert "chunk 1 is damaged" in result.output
    assert f"nothing was taken back: {tmp_path} cannot be written (Read-only file system)" in result.output


def test_shards_that_are_not_there_are_not_asked_to_be_indexed(tmp_path: Path) -> None:
    result = CliRunner().invoke(
        main, ["encode", "--teacher", "resnet18", "--shards", str(tmp_path / "nope"), "--layer", "conv4", "--K", "4"]
    )
    assert f"no folder {tmp_path / 'nope'}; name the one that holds the shards" in result.stderr


def test_messages_of_libraries_are_not_passed_on(tmp_path: Path) -> None:
    class Bytes:
        def read(self, rows: np.ndarray) -> list[np.ndarray]:
            return [np.frombuffer(b"no image", np.uint8) for _ in rows]

        def name(self, row: int) -> str:
            return f"image{row}"

    text = undecodable(Bytes(), np.arange(1))  # type: ignore[arg-type]
    assert text is not None
    assert text.startswith("image 'image0' cannot be decoded (no format that Pillow knows); remove it")
    (tmp_path / "rand.pth").write_bytes(np.random.default_rng(0).bytes(3000))
    with pytest.raises(CorruptError) as caught:
        load_foreign(torch.nn.Linear(1, 1), read_weights(tmp_path / "rand.pth"))  # type: ignore[arg-type]
    assert "weights_only" not in str(caught.value)


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["encode", "--seed", str(2**128)], f"'--seed': {2**128} is not in the range 0<=x<=4294967295"),
        (["shards", "a", "b", "--seed", "-1"], "'--seed': -1 is not in the range 0<=x<=4294967295"),
        (["words", "--seed", str(2**32)], "'--seed': 4294967296 is not in the range"),
        (["eval", "linear", "--batch", str(2**31)], "'--batch': 2147483648 is not in the range 1<=x<=1048576"),
        (["index", "x", "--workers", "9999999"], "'--workers': 9999999 is not in the range 1<=x<=1024"),
        (["bench", "loader", "--hw-load", "nan"], "'--hw-load': 'nan' is no finite number"),
        (
            ["eval", "voc07-lowshot", "--shots", "1,4,16"],
            "'--shots': '1,4,16' is no single number; give --shots once for each: --shots 1 --shots 4 --shots 16",
        ),
        (["bench", "loader", "--hw-load", "0, 1"], "give --hw-load once for each: --hw-load 0 --hw-load 1"),
        (["train", "--shards", ""], "'--shards': '' is empty (is a shell variable not set?)"),
        (["verify", ""], "'PATH': '' is empty"),
        (["eval", "linear", "--run", ""], "'--run': '' is empty"),
        (["encode", "--teacher", ""], "'--teacher' / '--arch': '' is empty"),
        (["demo", "--out", "~/demo"], "'--out': '~/demo' begins with ~, which only a shell expands"),
        (["train", "--shards", "caf\udce9"], r"'--shards': 'caf\udce9' is not UTF-8 text; rename what it names"),
        (["train", "--set", "name=\udce9"], r"'--set': 'name=\udce9' is not UTF-8 text"),
    ],
)
def test_values_out_of_bounds_are_usage_errors(command: list[str], message: str) -> None:
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 2
    assert result.stderr.splitlines()[-1].startswith("Error: Invalid value for ")
    assert message in result.stderr.splitlines()[-1]


def test_flags_reach_the_configuration_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("\U0001f600", "null", "1e5", "#x", "a: b", "'", "[1]", "caf\u00e9\t\\n"):
        result = CliRunner().invoke(main, ["train", "--config", "cifar10_rotnet_small", "--shards", f"images/{name}"])
        assert result.exit_code == 1
        problem = result.stderr.splitlines()[-1]
        assert problem == f"Error: no folder {' '.join(f'images/{name}'.split())}; name the one that holds the shards"


def test_append_names_the_way_that_took_its_place() -> None:
    result = CliRunner().invoke(main, ["encode", "--append", "--shards", "more"])
    assert result.exit_code == 2
    assert result.stderr == (
        "Error: stores do not grow by --append any more; give the new images a store of their own, under the same "
        "words (bowstore encode --vocabulary OLD --shards MORE --store NEW), and train on both (bowstore train "
        "--shards FIRST --shards MORE --store OLD --store NEW)\n"
    )
    assert "--append" not in CliRunner().invoke(main, ["encode", "--help"]).stdout


@pytest.mark.parametrize(
    "arguments",
    [
        ["--append"],
        ["--teacher", "gone.pt"],
        ["--teacher", "torchvision:resnet18", "--layer", "conv4"],
    ],
)
def test_mistakes_of_an_encode_are_met_beside_the_other_ranks(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """There they are told once (`test_a_refusal_is_told_once_on_each_machine_and_never_again`)."""
    met: list[str] = []

    @contextmanager
    def beside_others() -> Iterator[None]:
        try:
            yield
        except BaseException as error:
            met.append(type(error).__name__)
            raise

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("bowstore.train.distributed.beside_others", beside_others)
    result = CliRunner().invoke(main, ["encode", *arguments])
    assert result.exit_code in (1, 2)
    assert met in (["UsageError"], ["MissingError"])


def test_a_store_is_no_input_of_rotations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(main, ["train", "--config", "cifar10_rotnet_small", "--store", "words.zarr"])
    assert result.exit_code == 2
    assert "Error: --store: task rotation of cifar10_rotnet_small has none; leave it out" in result.stderr


@pytest.mark.parametrize(
    "command", [["encode", "--teacher", "resnet18"], ["train", "--config", "cifar10_rotnet_small"]]
)
def test_half_of_torchruns_variables_is_refused(
    command: list[str], make_shard_set: ShardMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(make_shard_set(4).root)
    monkeypatch.setenv("RANK", "3")
    result = CliRunner().invoke(main, [*command, "--shards", "."])
    assert result.exit_code == 2
    assert result.stderr == (
        "Error: RANK is set without WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE; start the command with torchrun, which "
        "sets them, or unset them\n"
    )


def test_results_on_a_terminal_of_another_encoding(tmp_path: Path) -> None:
    result = CliRunner(charset="latin-1").invoke(main, ["init", str(tmp_path / "\U0001f600")])
    assert result.exit_code == 0
    assert result.stdout.splitlines() == [f"{tmp_path}/\\U0001f600/bowstore.yaml"]


def test_a_reader_that_leaves_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(*_: object, **__: object) -> None:
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    monkeypatch.setattr("bowstore.workspace.init_workspace", gone)
    result = CliRunner().invoke(main, ["init"])
    assert (result.exit_code, result.output) == (1, "")


@pytest.mark.parametrize("name", ["stdout", "stderr"])
def test_a_pipe_that_breaks_elsewhere_is_told(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    pipes = {stream: os.pipe() for stream in ("stdout", "stderr")}
    with ExitStack() as stack:
        for stream, (_, end) in pipes.items():
            monkeypatch.setattr(sys, stream, stack.enter_context(os.fdopen(end, "w")))
        assert not reader_is_gone()
        os.close(pipes[name][0])
        assert reader_is_gone()
    monkeypatch.undo()
    os.close(next(reader for stream, (reader, _) in pipes.items() if stream != name))


def test_a_worker_s_broken_pipe_is_no_silent_end(monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(*_: object, **__: object) -> None:
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    monkeypatch.setattr("bowstore.workspace.init_workspace", gone)
    monkeypatch.setattr("bowstore.cli.common.reader_is_gone", lambda: False)
    result = CliRunner().invoke(main, ["init"])
    assert (result.exit_code, result.stderr) == (1, "Error: Broken pipe\n")


@pytest.mark.parametrize("closed", [[2], [0, 1, 2]])
def test_closed_streams_get_no_file_of_the_user_s(tmp_path: Path, closed: list[int]) -> None:
    """With descriptor 2 free, the next file opened would get it, and messages would be written into that file."""
    code = (
        f"import os, sys; [os.close(number) for number in {closed}]; sys.stderr = sys.__stderr__ = None; "
        "from bowstore.cli import main; from bowstore import workspace; "
        "workspace.init_workspace = lambda *_: [os.write(2, b'noise'), open('result', 'x'), os.open('other', 64)] "
        "and exit(os.open('.', 0)); main(['init'])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, check=False)
    assert done.returncode > 2, "the first number that a file gets"
    assert (done.stdout, done.stderr) == (b"", b"")
    assert sorted(path.name for path in tmp_path.iterdir() if path.stat().st_size == 0) == ["other", "result"]


def test_messages_that_cannot_be_written_end_no_work() -> None:
    code = "from bowstore.progress import say; [say('a'), say('b')]; print('done')"
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=full, check=False)
    assert (done.returncode, done.stdout) == (0, b"done\n")


def test_help_that_cannot_be_written_is_one_line() -> None:
    code = "from bowstore.cli import main; main(['--version'])"
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, "-c", code], stdout=full, stderr=subprocess.PIPE, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith(b"Error: the disk is full; free some space")
    assert done.stderr.count(b"\n") == 1
