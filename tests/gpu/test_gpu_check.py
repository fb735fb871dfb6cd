"""tools/gpu_check.py: what fits the time, what becomes of a section that fails, and every section at toy size."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

import gpu_check
import gpu_photographs
import pytest
import torch
from gpu_plan import SECTIONS, Section, limit_seconds, plan
from gpu_process import Check
from gpu_results import BOUNDS, Results, failures, latest, read_lines, table
from section_imports import needed, only

from bowstore.benchmarks.rounds import interleaved

TOOL = Path(gpu_check.__file__)
ROOMS = """
import os, time

def good(check):
    os.chdir("/")
    check.figure("loader images/s", 7100, 6900, 7300, unit="images/s")
    check.claim("it holds", True, "as it should")

def slow(check):
    check.figure("before", 1)
    time.sleep(60)

def dead(check):
    check.figure("before", 2)
    os.abort()

def wrong(check):
    raise ValueError("three is no even number")

def lacking(check):
    import no_such_library.part

def false(check):
    check.claim("it holds", False, "it does not")
"""


def section(name: str, full: float = 10, short: float = 5, **more: Any) -> Section:
    return Section(name, f"{name} proves", full, short, room="rooms_for_a_test", **more)


def scales(sections: list[Section], seconds: float | None) -> list[str | None]:
    return [scale for _, scale in plan(sections, seconds)]


def test_what_fits_the_time() -> None:
    three = [section("a"), section("b"), section("c", 20, 8)]
    assert scales(three, None) == scales(three, 40) == ["full", "full", "full"]
    assert scales(three, 39) == ["full", "full", "short"]  # the least valuable is shortened first
    assert scales(three, 24) == ["full", "short", "short"]
    assert scales(three, 18) == ["short", "short", "short"]
    assert scales(three, 17) == ["full", "short", None]  # then dropped, and what is over goes to the most valuable
    assert scales(three, 9) == ["short", None, None]
    assert scales(three, 4) == [None, None, None]
    assert scales([section("a", 50, 40), section("b", 5, 5)], 30) == [None, "full"]


def test_the_plan_of_a_real_check() -> None:
    names = [each.name for each in SECTIONS]
    assert len(set(names)) == len(names)
    first_of_dali = next(place for place, each in enumerate(SECTIONS) if "nvidia.dali" in each.needs)
    assert all("nvidia.dali" in each.needs for each in SECTIONS[first_of_dali:]), "DALI comes last"
    nine = plan(SECTIONS, 9 * 60)
    assert [each.section.name for each in nine if each.scale][:5] == ["machine", "kernels", "words", "assign", "kmeans"]
    assert sum(each.section.full if each.scale == "full" else each.section.short for each in nine if each.scale) <= 540
    assert all(0 < each.short <= each.full < limit_seconds(each, "full") for each in SECTIONS)


def lines_of(out: Path) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = {}
    for line in read_lines(out):
        found.setdefault(line["section"], []).append(line)
    return found


@pytest.fixture
def rooms(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with sections of all fates, and no probe, which would load torch."""
    folder = tmp_path / "rooms"
    folder.mkdir()
    (folder / "rooms_for_a_test.py").write_text(ROOMS)
    monkeypatch.setenv("PYTHONPATH", str(folder))
    about = {"device": "NVIDIA H100", "versions": {"torch": "2"}, "command": "c"}
    monkeypatch.setattr(gpu_check, "_probe", lambda options: about)
    monkeypatch.setattr(gpu_check, "limit_seconds", lambda section, scale: 6 if section.name == "slow" else 60)
    return tmp_path / "out"


def test_sections_that_crash_hang_or_raise_are_results_and_the_others_go_on(
    rooms: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(rooms.parent)
    absent = section("absent", needs=("no_such_module", "nvidia.no_such_module"))
    data = section("data", on_data=True)
    sections = [section(name) for name in ("wrong", "dead", "slow", "good", "lacking", "false")] + [absent, data]
    code = gpu_check.main(["--out", rooms.name, "--dry-run", "--scratch", str(rooms / "scratch")], sections[:-1])
    assert code == 1
    found = lines_of(rooms)
    ends = {name: (own[-1]["status"], own[-1]["why"]) for name, own in found.items()}
    assert ends == {
        "wrong": ("failed", "ValueError: three is no even number; see wrong.log"),
        "dead": ("crashed", "SIGABRT; dead.log says where"),
        "slow": ("hung", "not done within 6 s; slow.log says where"),
        "good": ("passed", ""),
        "lacking": ("skipped", "no no_such_library"),
        "false": ("passed", ""),
        "absent": ("skipped", "no no_such_module, no nvidia.no_such_module"),
    }
    assert found["slow"][0]["median"] == 1, "what a section found before is kept"
    assert found["dead"][0]["median"] == 2
    assert 'rooms_for_a_test.py", line 11 in slow' in (rooms / "slow.log").read_text()
    assert "Aborted" in (rooms / "dead.log").read_text()
    text = (rooms / "table.txt").read_text()
    assert capsys.readouterr().out == text
    assert "dry run on the CPU at toy size: figures mean nothing" in text
    assert "\n4 failures\n" in text
    assert "absent     skipped: no no_such_module" in text


def test_time_decides_what_runs(rooms: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sections = [section("good", 2, 1), section("false", 900, 800), section("data", on_data=True)]
    arguments = ["--out", str(rooms), "--minutes", "1", "--scratch", str(rooms / "scratch")]
    assert gpu_check.main(arguments, sections) == 0
    ends = {name: own[-1] for name, own in lines_of(rooms).items()}
    assert [ends[name]["status"] for name in ("good", "false", "data")] == ["passed", "dropped", "skipped"]
    assert ends["false"]["why"].startswith("it takes 800 s, and ")
    assert ends["data"]["why"] == "no --data"
    said = capsys.readouterr().err
    assert "1 of 2 sections, about 0 minutes; dropped: false\n" in said
    figure = lines_of(rooms)["good"][0]
    assert (figure["n"], figure["median"], figure["met"], figure["bound"]) == (3, 7100, True, ">= 7000")


def test_a_section_that_the_time_ran_out_on_has_not_hung(rooms: Path) -> None:
    arguments = ["--out", str(rooms), "--minutes", "0.2", "--scratch", str(rooms / "scratch")]
    with patch.object(gpu_check, "limit_seconds", lambda section, scale: 60):
        assert gpu_check.main(arguments, [section("slow", 7, 6)]) == 0
    (figure, end) = lines_of(rooms)["slow"]
    assert (figure["median"], end["status"]) == (1, "cut short")
    assert end["why"] == "the time was over after 7 s; what it found is above"


def test_wrong_arguments(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, message in (
        (["--sections", "assing"], "no section assing; there are machine, kernels, words, assign,"),
        (["--minutes", "0"], "--minutes 0 is no time; give a number above 0"),
        (["--data", "nowhere"], "--data nowhere is not there"),
        (["--table", "--out", str(tmp_path)], f"{tmp_path} holds no results.jsonl; run without --table first"),
    ):
        with pytest.raises(SystemExit) as raised:
            gpu_check.main(arguments)
        assert raised.value.code == 2
        assert message in capsys.readouterr().err
    assert gpu_check.main(["--list", "--sections", "assign,kmeans"]) == 0
    assert capsys.readouterr().out.splitlines()[0] == "assign        20 s  images/s of assignment against cuBLAS"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_in_one_line(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(TOOL), "--out", str(tmp_path / "out")], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 2
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith(
        "gpu_check: device cuda was asked for, but there is no NVIDIA driver (libcuda.so.1); install"
    )
    assert line.endswith("or leave it out with --dry-run")


def results(folder: Path, device: str = "NVIDIA H100 80GB", *, run: str = "1", toy: bool = False) -> Results:
    return Results(folder, run, toy, {"device": device, "versions": {"torch": "2.11"}, "command": "python x"})


def test_bounds_of_an_h100_are_not_asked_of_others(tmp_path: Path) -> None:
    for device, toy in (("NVIDIA H100 80GB HBM3", False), ("NVIDIA L4", False), ("cpu", True)):
        found = results(tmp_path, device, toy=toy)
        found.figure("loader", "loader images/s", [100, 300, 200])
        found.figure("step", "over the teacher in the loop", [1.3])
    assert [line["met"] for line in read_lines(tmp_path)] == [False, True, None, True, None, None]
    assert BOUNDS["k-means s, 25 iterations"].met(60)
    assert not BOUNDS["k-means s, 25 iterations"].met(61)


def test_the_table_shows_the_last_run_of_each_section(tmp_path: Path) -> None:
    for run, toy, name, status in (
        ("1", False, "a", "failed"),
        ("2", False, "a", "passed"),
        ("2", False, "b", "crashed"),
        ("3", False, "b", "dropped"),
        ("4", True, "c", "passed"),
    ):
        if status != "dropped":
            results(tmp_path, run=run, toy=toy).figure(name, f"of {run}", [float(run), 4.0])
        results(tmp_path, run=run, toy=toy).section(name, status, "why", seconds=3.0)
    with (tmp_path / "results.jsonl").open("a") as file:
        file.write('{"cut off')
    lines = latest(read_lines(tmp_path))
    assert [(line["section"], line["run"]) for line in lines] == [("a", "2"), ("a", "2"), ("b", "2"), ("b", "2")]
    assert failures(lines) == ["b crashed (why)"]
    text = table(lines)
    assert "2: NVIDIA H100 80GB\n  torch 2.11\n  python x\n" in text
    row = next(line for line in text.splitlines() if "of 2" in line and line.startswith("a"))
    assert row.split() == ["a", "of", "2", "3", "2", "66.7%"]
    assert "b          CRASHED in 3 s: why" in text
    assert text.endswith("1 failures\n  b crashed (why)\n")


def test_timings_are_recorded_before_their_rates_are(tmp_path: Path) -> None:
    check = Check("step", "full", "cpu", results(tmp_path), tmp_path)
    calls: list[int] = []

    def dying() -> None:
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("killed")

    ways = {"fine": lambda: None, "dying": dying}
    with check.heard(), pytest.raises(RuntimeError, match="killed"):
        interleaved("bench", ways, 3, check.device)
    lines = latest(read_lines(tmp_path))
    assert [(line["figure"], line["n"], line["unit"]) for line in lines] == [("dying", 1, "s"), ("fine", 2, "s")]
    check.figure("fine", 70, 80, 90, unit="images/s")
    assert [(line["figure"], line["median"]) for line in latest(read_lines(tmp_path))][1:] == [("fine", 80)]


@pytest.mark.parametrize("name", [each.name for each in SECTIONS])
def test_every_section_at_toy_size(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In this process, which has loaded torch and DALI already; `--dry-run` gives each its own."""
    from importlib import import_module

    added = [os.environ["PYTHONPATH"]] if "PYTHONPATH" in os.environ else []  # libraries may lie there
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(TOOL.parent), str(TOOL.parents[1]), *added]))
    (tmp_path / "scratch").mkdir()
    found = results(tmp_path, "cpu", toy=True)
    own = next(each for each in SECTIONS if each.name == name)
    if lacking := [needed for needed in own.needs if not gpu_check._installed(needed)]:
        pytest.skip(f"no {', '.join(lacking)}")
    room = import_module(own.room)
    there = {*own.needs, *(["numcodecs"] if "zarr" in own.needs else [])}
    with only(there) as imported:
        getattr(room, name)(Check(name, "toy", "cpu", found, tmp_path / "scratch"))
    assert imported | needed(own.room) <= there, "a section that is not skipped finds what it imports"
    lines = read_lines(tmp_path)
    assert lines, "a section records something"
    assert {line["section"] for line in lines} == {name}
    assert failures(lines) == []


def test_shards_that_a_section_left_unfinished_are_finished_by_the_next(tmp_path: Path) -> None:
    check = Check("graph", "toy", "cpu", results(tmp_path, "cpu", toy=True), tmp_path)
    with (
        patch.object(gpu_photographs, "make_shards", side_effect=[KeyboardInterrupt]),
        pytest.raises(KeyboardInterrupt),
    ):
        gpu_photographs.photographs(check)
    (folder,) = tmp_path.glob("photographs-*")
    (folder / "shards/train").mkdir(parents=True)
    assert len(gpu_photographs.photographs(check)) == 24


def test_a_dry_run(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(TOOL), "--dry-run", "--out", str(tmp_path / "out"), "--sections", "head",
         "--scratch", str(tmp_path / "scratch")],
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "loss as in the dense form" in done.stdout
    assert done.stdout.endswith("no failures\n")
    assert json.loads((tmp_path / "out/results.jsonl").read_text().splitlines()[0])["toy"] is True
