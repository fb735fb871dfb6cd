"""Whether two workspaces hold the same: metrics of their runs, results, words and weights, to the last digit.

    python tools/compare_runs.py OLD NEW [--json]

For a change that should change nothing: make the same runs before and after it on one machine (two `bowstore demo`,
for example) and compare their folders. What measures time, and dates, versions and devices, may differ. Whatever lies
in one of the two alone counts as a difference. The exit code is 1 if anything differs.
"""

import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import click
from safetensors.torch import load_file

from bowstore.errors import BowstoreError, UsageError
from bowstore.files import read_json
from bowstore.models.weights import content_digest
from bowstore.runs import EVAL_FOLDER, METRICS_FILE
from bowstore.words.store.schema import FORMAT
from bowstore.words.store.verify import digest

_OF_TIME = ("seconds", "_seconds", "_per_second", "_s")  # ends of names of figures that no two runs share
_OF_RESULT = ("protocol", "protocol_version", "metrics", "details", "inputs")


class Compared(NamedTuple):
    """One file or store that may be in both folders.

    Attributes:
        kind: metrics, result, words or weights.
        path: below the folder.
        values: how many values were compared.
        difference: the first one, for people; empty if all are equal.
    """

    kind: str
    path: str
    values: int
    difference: str


def compare(old: Path, new: Path) -> list[Compared]:
    """Compare all that both folders hold, in the order of kinds and paths.

    Raises:
        UsageError: a folder holds nothing that can be compared.
        BowstoreError: a file or store that cannot be read.
    """
    both = _found(old), _found(new)
    for folder, found in zip((old, new), both, strict=True):
        if not found:
            raise UsageError(f"{folder} holds no {METRICS_FILE}, results, word store or weights; name a workspace")
    return [
        _compare(kind, path, both[0].get((kind, path)), both[1].get((kind, path)))
        for kind, path in sorted(both[0].keys() | both[1].keys())
    ]


def _found(folder: Path) -> dict[tuple[str, str], dict[str, Any]]:
    """Values by their names, of everything below a folder that can be compared."""
    return {
        (kind, (path.parent if kind == "words" else path).relative_to(folder).as_posix()): dict(_leaves(values))
        for pattern, kind, read in (
            (METRICS_FILE, "metrics", _metrics),
            (f"{EVAL_FOLDER}/*.json", "result", _result),
            ("zarr.json", "words", _words),
            ("*.safetensors", "weights", _weights),
        )
        for path in folder.rglob(pattern)
        if (values := read(path))
    }


def _metrics(path: Path) -> dict[str, Any]:
    lines = map(json.loads, path.read_text().splitlines())
    return {f"step {line.pop('step')}": line for line in lines}


def _result(path: Path) -> dict[str, Any]:
    values = read_json(path)
    return {name: values[name] for name in _OF_RESULT if name in values}


def _words(path: Path) -> dict[str, Any]:
    is_store = read_json(path).get("attributes", {}).get("format") == FORMAT
    return {"digest": digest(path.parent)} if is_store else {}


def _weights(path: Path) -> dict[str, Any]:
    return {name: content_digest(tensor) for name, tensor in load_file(path).items()}


def _leaves(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Each plain value that is not of time, with its place, in the order of the file."""
    if isinstance(value, list):
        value = dict(enumerate(value))
    if not isinstance(value, Mapping):
        yield name, value
        return
    for key, inner in value.items():
        if not str(key).endswith(_OF_TIME):
            yield from _leaves(inner, f"{name} {key}".lstrip())


def _compare(kind: str, path: str, old: dict[str, Any] | None, new: dict[str, Any] | None) -> Compared:
    if old is None or new is None:
        return Compared(kind, path, 0, f"only in {'NEW' if old is None else 'OLD'}")
    for name in [*old, *(name for name in new if name not in old)]:
        # As text, because nan equals nan here, and 1 is not 1.0.
        values = [json.dumps(side[name]) if name in side else "nothing" for side in (old, new)]
        if values[0] != values[1]:
            return Compared(kind, path, len(old), f"{name}: {values[0]} became {values[1]}")
    return Compared(kind, path, len(old), "")


@click.command()
@click.argument("old", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("new", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print the comparison as JSON alone.")
def main(old: Path, new: Path, as_json: bool) -> None:
    """Say whether the folders OLD and NEW hold the same runs, results and words."""
    try:
        rows = compare(old, new)
    except BowstoreError as error:
        click.echo(f"Error: {error}", err=True)
        sys.exit(error.exit_code)
    width = max(len(row.path) for row in rows)
    lines = [
        f"{row.kind:<8} {row.path:<{width}}  {row.values:>6}  {row.difference or 'equal'}".rstrip() for row in rows
    ]
    click.echo(json.dumps([row._asdict() for row in rows], indent=2) if as_json else "\n".join(lines))
    sys.exit(any(row.difference for row in rows))


if __name__ == "__main__":
    main()
