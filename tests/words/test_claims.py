"""Claims on parts of a job: one owner each, and heirs for the dead."""

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from served import SERVER

from bowstore.errors import BusyError
from bowstore.words.encode import claims
from bowstore.words.encode.claims import Board


@pytest.fixture
def board(tmp_path: Path) -> Any:
    with Board(tmp_path / "s") as board:
        yield board


def write_claim(board: Board, name: str, **owner: Any) -> Path:
    path = board.folder / name
    board.folder.mkdir(exist_ok=True)
    path.write_text(json.dumps({"host": "elsewhere", "pid": 1, "started": "1", "space": "other", **owner}))
    return path


def test_a_part_has_one_owner(board: Board, tmp_path: Path) -> None:
    assert board.claim("a@0")
    assert not board.claim("a@0")  # not even twice by the same process
    with Board(tmp_path / "s") as other:
        assert not other.claim("a@0")
        assert other.claim("a@10")
        assert other.others() == ["a@0"]
        assert f"process {os.getpid()} on " in str(other.owner("a@0"))
    board.release("a@0")
    assert board.claim("a@0")


def test_the_end_gives_everything_back(tmp_path: Path) -> None:
    with Board(tmp_path / "s") as board:
        board.claim("a@0")
        assert board.folder.is_dir()
    assert list(tmp_path.iterdir()) == []


def test_a_claim_of_a_process_that_is_gone_is_taken_over_at_once(board: Board) -> None:
    own = claims._myself()
    dead = write_claim(board, "a@0.0", **{**own, "started": "another one of that number"})
    assert board.owner("a@0") is None
    assert board.claim("a@0")
    assert board.holds("a@0")
    assert dead.exists()  # only its owner removes a claim
    assert (board.folder / "a@0.1").exists()


def _claim_and_sleep(store: Path) -> None:
    with Board(store) as board:
        assert board.claim("a@0")
        (store.parent / "claimed").touch()
        time.sleep(60)


def test_kill_9_leaves_nothing_to_wait_for(board: Board, tmp_path: Path) -> None:
    process = SERVER.Process(target=_claim_and_sleep, args=(tmp_path / "s",))
    process.start()
    while not (tmp_path / "claimed").exists():
        time.sleep(0.01)
    assert not board.claim("a@0")
    assert process.pid
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert board.claim("a@0")


def test_elsewhere_silence_is_death_and_a_touch_is_life(board: Board, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claims, "SILENT_SECONDS", 0.2)
    far = write_claim(board, "a@0.0")
    for _ in range(3):  # as long as it is touched, whatever its clock says
        os.utime(far, (time.time() - 10**6, os.stat(far).st_mtime + 1))
        assert not board.claim("a@0")
        time.sleep(0.15)
    time.sleep(0.2)
    assert board.claim("a@0")


def test_own_claims_are_touched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claims, "TOUCH_SECONDS", 0.05)
    with Board(tmp_path / "s") as board:
        board.claim("a@0")
        path = board.folder / "a@0.0"
        before = path.stat().st_mtime_ns
        time.sleep(0.3)
        assert path.stat().st_mtime_ns > before


def test_whoever_was_taken_for_dead_knows(board: Board) -> None:
    assert board.claim("a@0")
    write_claim(board, "a@0.1")
    assert not board.holds("a@0")
    assert not board.claim("a@0")


def test_two_heirs_cannot_both_win(board: Board, tmp_path: Path) -> None:
    write_claim(board, "a@0.0", **{**claims._myself(), "started": "gone"})
    with Board(tmp_path / "s") as other:
        assert [board.claim("a@0"), other.claim("a@0")] == [True, False]


def test_a_claim_without_content_is_not_dead_yet(board: Board) -> None:
    board.folder.mkdir()
    (board.folder / "a@0.0").touch()
    assert not board.claim("a@0")
    assert board.owner("a@0") == "another process"


def test_without_links_claims_work_too(board: Board, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    assert board.claim("a@0")
    with Board(tmp_path / "s") as other:
        assert not other.claim("a@0")


def test_one_process_leads(board: Board, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Board(tmp_path / "s") as other:
        message = r"word store .*s is in use by process \d+ on .*; wait for it to end"
        with board.lead("makes the vocabulary"), pytest.raises(BusyError, match=message), other.lead("x", wait=False):
            pass
        with other.lead("x", wait=False):
            pass
    assert capsys.readouterr().err == ""


def test_clear_leaves_what_is_held_and_what_is_of_use_to_others(board: Board, tmp_path: Path) -> None:
    board.claim("a@0")
    done, other = write_claim(board, "a@5.3"), write_claim(board, "ab@5.3")
    of_the_dead = write_claim(board, "ab@6.0", pid=2**22 + 1, space=claims._space())
    seen = board.folder / "seen.npz"
    seen.touch()
    with Board(tmp_path / "s") as another:
        assert another.claim("b@0")
        board.clear(lambda name: name.startswith("a@"))
        assert another.holds("b@0")
    assert board.holds("a@0")
    assert not done.exists()
    assert not of_the_dead.exists()
    assert other.exists()
    assert seen.exists()


def test_two_that_count_from_different_numbers_do_not_both_win(
    board: Board, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One looked before a claim was given back, and counts on from it; the other one looked after."""
    with Board(tmp_path / "s") as other:
        stale = write_claim(board, "a@0.0", **{**claims._myself(), "started": "gone"})
        plain = claims._make

        def give_back_then_make(path: Path) -> None:
            monkeypatch.setattr(claims, "_make", plain)
            stale.unlink()
            assert other.claim("a@0")  # makes a@0.0
            plain(path)  # makes a@0.1

        monkeypatch.setattr(claims, "_make", give_back_then_make)
        assert not board.claim("a@0")
        assert other.holds("a@0")


def test_after_the_end_nothing_is_claimed(tmp_path: Path) -> None:
    with Board(tmp_path / "s") as board:
        pass
    assert not board.claim("a@0")
    assert list(tmp_path.iterdir()) == []


def test_who_was_silent_does_not_lead_on(board: Board) -> None:
    with board.lead("makes the vocabulary"):
        board.check_lead()
        write_claim(board, "lead.7")
        with pytest.raises(BusyError, match=r"silent for more than 120 s, and another one leads the work"):
            board.check_lead()


def test_the_claim_of_a_machine_that_is_gone_is_watched_until_it_counts_as_dead(
    board: Board, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(claims, "SILENT_SECONDS", 0.4)
    write_claim(board, "a@0.0")
    board.wait_for_the_dead()
    assert "waiting 0 s for a sign of life of process 1 on elsewhere" in capsys.readouterr().err
