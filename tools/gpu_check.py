"""One program that says whether a GPU does the job, and how fast.

    python tools/gpu_check.py --out check                   all of it, a quarter of an hour on an H100
    python tools/gpu_check.py --out check --minutes 9       what nine minutes hold, the most valuable first
    python tools/gpu_check.py --out check --sections assign,kmeans
    python tools/gpu_check.py --out check --dry-run         every section at toy size, on the CPU
    python tools/gpu_check.py --out check --table           the table of what is in check/ already

Every section runs in a process of its own with a time limit: one that crashes, hangs or raises is a result, with its
output in OUT/SECTION.log, and the others go on. Each figure is a line of OUT/results.jsonl as soon as it is there.
docs/gpu.md says what each section proves, and what to do if it fails. The exit code is 1 if anything failed or missed
its bound.
"""

import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

from gpu_plan import SECTIONS, Scale, Section, limit_seconds, plan
from gpu_process import MISSING
from gpu_results import TABLE, Results, failures, latest, read_lines, table

_HERE = Path(__file__).resolve()
_PROBE_SECONDS = 180
_RESERVE_SECONDS = 5  # of the time there is, for the table
_LAST_BYTES = 4000


def main(arguments: Sequence[str] | None = None, sections: Sequence[Section] = SECTIONS) -> int:
    """Parse, run what is asked for, print the table; the exit code."""
    options = _parse(arguments, sections)
    chosen = [section for section in sections if not options.sections or section.name in options.sections]
    if options.list:
        for section in chosen:
            print(f"{section.name:11}{section.full:5.0f} s  {section.proves}")
        return 0
    if not options.table:
        try:
            _check(options, chosen)
        except KeyboardInterrupt:
            print("interrupted; what has run is in the table", file=sys.stderr)
    if not options.out.joinpath("results.jsonl").exists():
        _usage(f"{options.out} holds no results.jsonl; run without --table first")
    lines = latest(read_lines(options.out))
    text = table(lines)
    (options.out / TABLE).write_text(text, encoding="utf-8")
    print(text, end="")
    return 1 if failures(lines) else 0


def _parse(arguments: Sequence[str] | None, sections: Sequence[Section]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("gpu-check"), help="folder of the results")
    parser.add_argument("--minutes", type=float, help="time there is; the least valuable is shortened, then dropped")
    parser.add_argument("--sections", type=lambda text: text.split(","), help="only these, for example assign,kmeans")
    parser.add_argument("--photographs", type=Path, help="folder or tar of JPEGs to decode, load and encode "
                        "[default: those of --data, or made-up ones]")  # fmt: skip
    parser.add_argument("--data", type=Path, help="folder or tar of train/CLASS and val/CLASS to train on in short, "
                        "for example Imagenette")  # fmt: skip
    scratch = Path(tempfile.gettempdir()) / f"bowstore-gpu-check-{os.getuid()}"
    parser.add_argument("--scratch", type=Path, default=scratch,
                        help="compiled kernels, shards, stores; kept for the next call "
                        "[default: %(default)s]")  # fmt: skip
    parser.add_argument("--dry-run", action="store_true", help="toy sizes on the CPU: does every section run")
    parser.add_argument("--list", action="store_true", help="print the sections and what they prove")
    parser.add_argument("--table", action="store_true", help="print the table of what is in --out")
    options = parser.parse_args(arguments)
    unknown = set(options.sections or ()) - {section.name for section in sections}
    if unknown:
        known = ", ".join(section.name for section in sections)
        parser.error(f"no section {', '.join(sorted(unknown))}; there are {known}")
    if options.minutes is not None and not options.minutes > 0:
        parser.error(f"--minutes {options.minutes:g} is no time; give a number above 0")
    for name in ("photographs", "data", "out", "scratch"):
        path = getattr(options, name)
        if path and not path.exists() and name in ("photographs", "data"):
            parser.error(f"--{name} {path} is not there")
        setattr(options, name, path and path.resolve())  # a section may work in a folder of its own
    return options


def _usage(message: str) -> NoReturn:
    print(f"gpu_check: {message}", file=sys.stderr)
    raise SystemExit(2)


def _check(options: argparse.Namespace, sections: Sequence[Section]) -> None:
    """Run the sections, the most valuable first."""
    begun = time.monotonic()
    seconds = 60 * options.minutes - _RESERVE_SECONDS if options.minutes else None
    options.out.mkdir(parents=True, exist_ok=True)
    options.scratch.mkdir(parents=True, exist_ok=True)
    run = time.strftime("%Y-%m-%d %H:%M:%S")
    results = Results(options.out, run, options.dry_run, _probe(options))
    left = list(_there(sections, options, results))
    if options.dry_run:
        with ThreadPoolExecutor(min(2, len(os.sched_getaffinity(0)))) as pool:
            list(pool.map(lambda section: _run(section, "toy", limit_seconds(section, "toy"), options, results), left))
        return
    _say_plan(left, seconds)
    while left:
        room = None if seconds is None else seconds - (time.monotonic() - begun)
        section, scale = plan(left, room)[0]
        del left[0]
        if scale is None:
            why = f"it takes {section.short:.0f} s, and {max(0.0, room or 0):.0f} s are left"
            results.section(section.name, "dropped", why)
            _say(f"{section.name}: dropped, {why}")
            continue
        limit = limit_seconds(section, scale)
        _run(section, scale, limit if room is None else min(limit, room), options, results)


def _there(sections: Sequence[Section], options: argparse.Namespace, results: Results) -> Sequence[Section]:
    """The sections whose modules and data are there; the others are skipped by name."""
    kept = []
    for section in sections:
        missing = [f"no {name}" for name in section.needs if not _installed(name)]
        if section.on_data and not options.data and not options.dry_run:
            missing.append("no --data")
        if missing:
            results.section(section.name, "skipped", ", ".join(missing))
            _say(f"{section.name}: skipped, {', '.join(missing)}")
        else:
            kept.append(section)
    return kept


def _installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def _say_plan(sections: Sequence[Section], seconds: float | None) -> None:
    planned = plan(sections, seconds)
    short = [section.name for section, scale in planned if scale == "short"]
    dropped = [section.name for section, scale in planned if scale is None]
    total = sum(section.short if scale == "short" else section.full for section, scale in planned if scale)
    told = [f"{len(planned) - len(dropped)} of {len(planned)} sections, about {total / 60:.0f} minutes"]
    told += [f"shortened: {', '.join(short)}"] if short else []
    told += [f"dropped: {', '.join(dropped)}"] if dropped else []
    _say("; ".join(told))


def _probe(options: argparse.Namespace) -> dict[str, Any]:
    """Device, versions and command, found in a process of its own: this one never touches a GPU."""
    command = [sys.executable, str(_HERE.with_name("gpu_process.py")), "probe", "cpu" if options.dry_run else "cuda"]
    try:
        answer = subprocess.run(
            command, env=_environment(options), capture_output=True, text=True, timeout=_PROBE_SECONDS
        )
    except subprocess.TimeoutExpired:
        _usage(f"torch and the driver did not answer within {_PROBE_SECONDS} s; see whether nvidia-smi does")
    if answer.returncode:
        _usage((answer.stderr.strip() or "the probe says nothing").splitlines()[-1])
    print(answer.stderr, end="", file=sys.stderr)  # who else holds the GPU's memory
    about: dict[str, Any] = json.loads(answer.stdout.splitlines()[-1])
    return {**about, "command": f"python tools/gpu_check.py {shlex.join(sys.argv[1:])}"}


def _environment(options: argparse.Namespace) -> dict[str, str]:
    """This tree before what is installed, and caches that a second call finds again, outside the tree."""
    paths = [str(_HERE.parents[1]), str(_HERE.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    caches = {
        "TRITON_CACHE_DIR": str(options.scratch / "triton"),
        "TORCHINDUCTOR_CACHE_DIR": str(options.scratch / "inductor"),
    }
    found = {**caches, **os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"}
    # In a dry run two sections share the cores.
    return found | ({"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"} if options.dry_run else {})


def _run(section: Section, scale: Scale, limit: float, options: argparse.Namespace, results: Results) -> None:
    """Run one section to its end or to its limit, and record which it was."""
    _say(f"{section.name}: {section.proves} ({scale}, at most {limit:.0f} s)")
    log, begun = options.out / f"{section.name}.log", time.monotonic()
    order = {
        "section": section.name, "room": section.room, "scale": scale, "limit": limit, "out": str(options.out),
        "run": results.run, "about": results.about, "scratch": str(options.scratch),
        "photographs": str(options.photographs or ""), "data": str(options.data or ""),
    }  # fmt: skip
    command = [sys.executable, str(_HERE.with_name("gpu_process.py")), json.dumps(order)]
    with log.open("wb") as stream:
        process = subprocess.Popen(
            command, stdout=stream, stderr=subprocess.STDOUT, env=_environment(options), start_new_session=True
        )
        try:
            code = process.wait(limit)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            _end(process)
    status, why = _ending(code, limit, log)
    if status == "hung" and limit < limit_seconds(section, scale):
        status, why = "cut short", f"the time was over after {limit:.0f} s; what it found is above"
    seconds = time.monotonic() - begun
    results.section(section.name, status, why, seconds=seconds, scale=scale, log=log.name)
    _say(f"{section.name}: {status} in {seconds:.0f} s{', ' + why if why else ''}")


def _end(process: "subprocess.Popen[bytes]") -> None:
    """End a section's process and all that it started."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()


def _ending(code: int | None, limit: float, log: Path) -> tuple[str, str]:
    """How a section ended, and why."""
    if code is None:
        return "hung", f"not done within {limit:.0f} s; {log.name} says where"
    if code < 0:
        return "crashed", f"{signal.Signals(-code).name}; {log.name} says where"
    if code:
        with log.open("rb") as stream:
            stream.seek(max(0, log.stat().st_size - _LAST_BYTES))
            lines = [line for line in stream.read().decode(errors="replace").splitlines() if line.strip()]
        if code == MISSING:
            return "skipped", lines[-1]
        return "failed", f"{lines[-1][:200] if lines else f'exit code {code}'}; see {log.name}"
    return "passed", ""


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def _stop(number: int, frame: Any) -> NoReturn:
    raise KeyboardInterrupt


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _stop)
    raise SystemExit(main())
