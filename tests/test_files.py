"""Names, links and locks: what bowstore writes over, what it sweeps, and what it leaves alone."""

import errno
import fcntl
import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
from left_behind import age, left_behind

from bowstore import files
from bowstore.errors import BowstoreError, BusyError
from bowstore.files import (
    atomic_file,
    exclusive_lock,
    is_leftover,
    leftovers,
    open_end,
    sweep_temporary,
    temporary_path,
    waiting_lock,
    write_json,
)

PRECIOUS = b"three years of work"


@pytest.fixture
def thesis(tmp_path: Path) -> Path:
    path = tmp_path / "home" / "thesis.docx"
    path.parent.mkdir()
    path.write_bytes(PRECIOUS)
    return path


def test_a_user_s_file_that_looks_like_a_leftover_stays(tmp_path: Path) -> None:
    dead = left_behind(tmp_path / "a.tar")
    mine = [
        ".notes.tmp-12",
        ".a.tar.tmp-old",
        ".a.tar.tmp-999999999",
        dead.name[:-1] + ("0" if dead.name[-1] != "0" else "1"),  # all but the digest that proves it
        dead.name.replace(".a.tar", ".b.tar"),
        dead.name + "~",
    ]
    for name in mine:
        (tmp_path / name).write_bytes(PRECIOUS)
    folder = left_behind(tmp_path / "store")
    folder.unlink()
    folder.mkdir()  # of a store on its way, which its own lock's holder clears
    assert leftovers(tmp_path / "a.tar") == [dead]
    assert sweep_temporary(tmp_path) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*mine, folder.name])


def test_what_the_living_and_other_machines_write_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alive = left_behind(tmp_path / "alive", process=os.getppid())
    with monkeypatch.context() as patch:
        patch.setattr(files, "_machine", lambda: "0123abcd")
        there, silent = left_behind(tmp_path / "there"), left_behind(tmp_path / "silent")
    age(silent, 7 * 24 * 3600 + 60)
    age(there, 6 * 24 * 3600)
    assert sweep_temporary(tmp_path) == 1
    assert sorted(tmp_path.iterdir()) == sorted([alive, there])


def test_a_process_number_that_is_used_again_does_not_keep_a_leftover(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started = files._started
    with monkeypatch.context() as patch:
        patch.setattr(files, "_started", lambda pid: (started(pid) or 0) - 1)  # before the process of that number
        old = left_behind(tmp_path / "a", process=os.getppid())
    assert is_leftover(old)
    monkeypatch.setattr(files, "_started", lambda pid: None)  # a kernel that does not tell
    assert not is_leftover(old)
    assert is_leftover(left_behind(tmp_path / "a"))


def test_leftovers_of_a_name_are_its_own(tmp_path: Path) -> None:
    name = "a[0-9]*.tar"  # no pattern
    mine, other = left_behind(tmp_path / name), left_behind(tmp_path / "a3.tar")
    assert leftovers(tmp_path / name) == [mine]
    assert leftovers(tmp_path / "a3.tar") == [other]
    own = temporary_path(tmp_path / name)
    own.touch()
    assert leftovers(tmp_path / name) == [mine]
    assert leftovers(tmp_path / name, own=True) == sorted([mine, own])


def test_a_link_under_a_temporary_name_is_no_leftover(tmp_path: Path, thesis: Path) -> None:
    dead = left_behind(tmp_path / "a.tar")
    dead.unlink()
    dead.symlink_to(thesis)
    assert not is_leftover(dead)
    assert sweep_temporary(tmp_path) == 0


@pytest.mark.parametrize("name", ["x" * 255, "é" * 127])
def test_a_file_with_the_longest_name_can_be_written(tmp_path: Path, name: str) -> None:
    write_json(tmp_path / name, [1])
    assert [path.name for path in tmp_path.iterdir()] == [name]
    dead = left_behind(tmp_path / name)
    assert leftovers(tmp_path / name) == [dead]


def test_temporary_names_cannot_be_foreseen(tmp_path: Path, thesis: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert temporary_path(tmp_path / "a") != temporary_path(tmp_path / "a")
    known = temporary_path(tmp_path / "a")
    known.symlink_to(thesis)
    monkeypatch.setattr(files, "temporary_path", lambda path: known)
    with pytest.raises(FileExistsError), atomic_file(tmp_path / "a") as file:
        file.write(b"x")
    assert thesis.read_bytes() == PRECIOUS
    assert known.is_symlink()


def test_a_link_under_the_final_name_is_replaced_not_followed(tmp_path: Path, thesis: Path) -> None:
    (tmp_path / "a.json").symlink_to(thesis)
    write_json(tmp_path / "a.json", 1)
    assert (tmp_path / "a.json").read_text() == "1\n"
    assert not (tmp_path / "a.json").is_symlink()
    assert thesis.read_bytes() == PRECIOUS


def test_an_error_names_the_file_that_was_wanted(tmp_path: Path) -> None:
    (tmp_path / "a.json").mkdir()
    with pytest.raises(IsADirectoryError) as caught:
        write_json(tmp_path / "a.json", 1)
    assert caught.value.filename == str(tmp_path / "a.json")
    with pytest.raises(FileNotFoundError) as missing:
        write_json(tmp_path / "nowhere" / "b.json", 1)
    assert missing.value.filename == str(tmp_path / "nowhere" / "b.json")
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def symbolic(path: Path, target: Path) -> None:
    path.symlink_to(target)


def hard(path: Path, target: Path) -> None:
    path.hardlink_to(target)


@pytest.mark.parametrize(
    ("link", "opened"), [(symbolic, lambda path: exclusive_lock(path, "it")), (symbolic, open_end), (hard, open_end)]
)
def test_locks_and_logs_write_through_no_link(
    tmp_path: Path, thesis: Path, link: Callable[[Path, Path], None], opened: Callable[[Path], object]
) -> None:
    link(tmp_path / "it", thesis)
    kind = "a link" if link is symbolic else "a file with 2 names"
    with pytest.raises(BowstoreError, match=rf"it is {kind}, and bowstore writes there; move it away, or name"):
        with opened(tmp_path / "it"):  # type: ignore[attr-defined]
            pass
    assert thesis.read_bytes() == PRECIOUS


@pytest.mark.parametrize("content", [PRECIOUS, b"", b"process 1 on a machine"])
def test_a_lock_with_a_second_name_is_locked_and_left_as_it_is(tmp_path: Path, content: bytes) -> None:
    """A copy that `cp -al` made of shards, a store or a run shares the file with the original."""
    other, path = tmp_path / "other", tmp_path / ".lock"
    other.write_bytes(content)
    path.hardlink_to(other)
    with exclusive_lock(path, "it"):
        with pytest.raises(BusyError, match="it is in use by "), exclusive_lock(path, "it"):
            pass
    assert other.read_bytes() == content


@pytest.mark.skipif(os.geteuid() != 0, reason="only root makes files of other users")
def test_a_lock_file_that_may_only_be_read_is_a_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a folder of a group, the lock file is whose process came first."""
    monkeypatch.chdir(tmp_path)  # above it lie folders that only root may enter
    tmp_path.chmod(0o777)
    path, nobody = Path(".lock"), 65534
    path.write_bytes(b"process 1 on a machine")
    os.seteuid(nobody)
    try:
        with exclusive_lock(path, "it"), pytest.raises(BusyError, match="process 1"), exclusive_lock(path, "it"):
            pass
    finally:
        os.seteuid(0)
    assert path.read_bytes() == b"process 1 on a machine"


def test_a_dangling_link_makes_no_file(tmp_path: Path) -> None:
    (tmp_path / ".lock").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(BowstoreError, match="is a link"), exclusive_lock(tmp_path / ".lock", "it"):
        pass
    assert not (tmp_path / "elsewhere").exists()


@pytest.mark.parametrize("opened", [lambda path: exclusive_lock(path, "it"), open_end])
def test_a_pipe_at_the_place_of_a_lock_is_told_at_once(tmp_path: Path, opened: Callable[[Path], object]) -> None:
    os.mkfifo(tmp_path / ".lock")
    with pytest.raises(BowstoreError, match=r"\.lock is no plain file"):
        with opened(tmp_path / ".lock"):  # type: ignore[attr-defined]
            pass


def test_a_lock_says_who_holds_it(tmp_path: Path) -> None:
    path, myself = tmp_path / "new" / ".lock", f"process {os.getpid()} on {socket.gethostname()}"
    for _ in range(2):
        with exclusive_lock(path, "the folder"):
            assert path.read_text() == myself
            with (
                pytest.raises(BusyError, match=rf"^the folder is in use by {myself}; wait for it to end"),
                exclusive_lock(path, "the folder"),
            ):
                pass
        path.write_text("process 123456789 on a machine with a long name")


def test_a_lock_file_of_somebody_else_is_locked_and_left_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / ".lock"
    path.write_bytes(PRECIOUS)
    with exclusive_lock(path, "it"):
        assert path.read_bytes() == PRECIOUS
        with pytest.raises(BusyError, match="in use by another process"), exclusive_lock(path, "it"):
            pass
    assert path.read_bytes() == PRECIOUS


@pytest.mark.parametrize(("number", "named"), [(errno.ENOSPC, True), (errno.EFBIG, True), (errno.ECONNRESET, False)])
def test_what_did_not_fit_is_named_and_errors_of_others_are_not(tmp_path: Path, number: int, named: bool) -> None:
    with pytest.raises(OSError, match=os.strerror(number)) as caught, atomic_file(tmp_path / "final"):
        raise OSError(number, os.strerror(number))
    assert caught.value.filename == (str(tmp_path / "final") if named else None)
    assert not list(tmp_path.iterdir())


def test_a_lock_on_a_full_disk_is_a_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwrite", full)
    with exclusive_lock(tmp_path / ".lock", "it"):  # room is made under such a lock
        pass


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS])
def test_a_file_system_without_locks_is_told_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], number: int
) -> None:
    def flock(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    monkeypatch.setattr(files, "_WITHOUT_LOCKS", set())
    done = []
    for lock in (exclusive_lock, waiting_lock):
        with lock(tmp_path / ".lock", "it"):
            done.append(lock)
    assert len(done) == 2
    assert capsys.readouterr().err == (
        f"warning: the file system of {tmp_path} has no locks ({os.strerror(number)}); see to it that no other process "
        "writes there at the same time\n"
    )


def test_other_errors_of_locks_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(*_: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(OSError, match="Input/output error"), exclusive_lock(tmp_path / ".lock", "it"):
        pass
