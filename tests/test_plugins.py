"""Registries, and what adds to them: entry points of installed packages, files and modules of a workspace."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from source_sets import tiny_image, write_file

from bowstore.cli import main
from bowstore.config import load_workspace
from bowstore.data.config import ShardsConfig
from bowstore.data.shards import make_shards
from bowstore.data.sources import KINDS, Kind
from bowstore.errors import CorruptError, UsageError
from bowstore.plugins import Named, Registry, plugins_in_use, use_plugins

SOURCE = """
from functools import partial
from bowstore.data.sources.base import Kind, ImageFile, Listing, Split, read_image
from bowstore.data.sources.folder import KIND as FOLDER  # imported, and so no second one

def list_splits(source, options):
    paths = sorted(source.glob("*.jpg"))
    images = [ImageFile(p.name, p.stem, n, p.stat().st_size, p.stat().st_mtime_ns) for n, p in enumerate(paths)]
    return Listing([Split("train", tuple(p.stem for p in paths), images)])

ONE_A_CLASS = Kind(
    name="NAME",
    expects="images, each a class of its own",
    example="bowstore shards images data/shards",
    recognise=lambda source: (source / "one-a-class.txt").is_file(),
    list_splits=list_splits,
    open=lambda source: partial(read_image, source),
)
"""


@pytest.fixture(autouse=True)
def no_plugins_left() -> Iterator[None]:
    yield
    use_plugins(Named((), ""))


def workspace(folder: Path, *plugins: str, **files: str) -> Path:
    """A workspace that names these plugins, with these files."""
    for name, text in files.items():
        (folder / f"{name}.py").write_text(text)
    (folder / "bowstore.yaml").write_text(f"plugins: [{', '.join(plugins)}]\n")
    return folder


def install(folder: Path, entry_point: str, module: str, monkeypatch: pytest.MonkeyPatch) -> Registry[Kind]:
    """Put a package with one entry point on the path, and return a registry that sees it."""
    (folder / "others.py").write_text(module)
    (folder / "others-1.0.dist-info").mkdir()
    (folder / "others-1.0.dist-info/METADATA").write_text("Metadata-Version: 2.1\nName: others\nVersion: 1.0\n")
    (folder / "others-1.0.dist-info/entry_points.txt").write_text(f"[tests.{folder.name}]\n{entry_point}\n")
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.delitem(sys.modules, "others", raising=False)
    own = {"folder": "bowstore.data.sources.folder:KIND"}
    return Registry("kind of source", f"tests.{folder.name}", Kind, own)


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def test_a_plugin_of_the_workspace_is_a_source_like_any_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(workspace(tmp_path, "mine.py", mine=SOURCE.replace("NAME", "one")))
    for name in ("a", "b", "c"):
        write_file(tmp_path / f"images/{name}.jpg", tiny_image(ord(name)))
    write_file(tmp_path / "images/one-a-class.txt", "")
    result = run("shards", "images", "out", "--source", "one", "--per-shard", 2, "--workers", 1)
    assert result.exit_code == 0, result.output
    assert "train: 3 of 3 images in 2 shards" in result.stdout
    assert "bowstore shards images data/shards" in run("data").stdout
    assert "webdataset|one]" in "".join(run("shards", "--help").output.split())
    # Two shards are written by two processes, which find the kind by its name; one that has no name finds it by itself.
    (report,) = make_shards(Path("images"), Path("twice"), ShardsConfig(per_shard=2, workers=2))
    assert report.written == 3
    # A workspace without plugins knows none of another's.
    (tmp_path / "other").mkdir()
    load_workspace(tmp_path / "other")
    assert "one" not in KINDS.names()


def test_an_installed_package_is_known_by_its_entry_point(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kinds = install(tmp_path, "two = others:ONE_A_CLASS", SOURCE.replace("NAME", "two"), monkeypatch)
    assert kinds.names() == ("folder", "two")
    assert "others" not in sys.modules, "names import nothing"
    assert kinds.get("two").expects == "images, each a class of its own"
    # Named once more, as a module, it is the same.
    use_plugins(Named(("others",), ""))
    assert kinds.names() == ("folder", "two")
    with pytest.raises(UsageError, match=r"^no kind of source 'folders'; did you mean 'folder'\? there are folder"):
        kinds.get("folders")


@pytest.mark.parametrize(
    ("entry_point", "module", "said"),
    [
        (
            "two = others:MISSING",
            "",
            r"the installed package others cannot be imported: .*no attribute 'MISSING'; c",
        ),
        ("two = others:KIND", "KIND = 1", r"kind of source 'two' of the installed package others is of type int; corr"),
        (
            "two = others:ONE_A_CLASS",
            SOURCE,
            r"kind of source 'two' of the installed package others is 'NAME'; correct",
        ),
        (
            "folder = others:ONE_A_CLASS",
            SOURCE.replace("NAME", "folder"),
            r"kind of source 'folder' comes twice, from bowstore itself and from the installed package others; ",
        ),
    ],
)
def test_an_entry_point_that_cannot_be_used(
    entry_point: str, module: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kinds = install(tmp_path, entry_point, module, monkeypatch)
    with pytest.raises(UsageError, match=said):
        kinds.get(entry_point.partition(" ")[0])


@pytest.mark.parametrize(
    ("plugins", "said"),
    [
        (["gone.py"], r"plugin gone\.py is not there \(/.*/gone\.py\); correct plugins: in the workspace file"),
        (["no.such.module"], r"plugin no\.such\.module is no module that is installed; install it, or name its file"),
        (["none.py"], r"plugin none\.py holds no source, task or protocol: give one of its module-level names a Kind"),
        (
            ["broken.py"],
            r"plugin broken\.py cannot be imported: .*broken\.py, line 2: ZeroDivisionError: div.*; correct",
        ),
        (["syntax.py"], r"plugin syntax\.py cannot be imported: .*syntax\.py, line 1: SyntaxError: "),
        (
            ["needs.py"],
            r"plugin needs\.py cannot be imported: .*needs\.py, line 1: ModuleNotFoundError: No module named",
        ),
        (["leaves.py"], r"plugin leaves\.py cannot be imported: .*leaves\.py, line 1: SystemExit: 3; correct it, or"),
        (
            ["a.py", "./a.py", "b.py"],
            r"kind of source 'same' comes twice, from plugin a\.py and from plugin b\.",
        ),
        (
            ["c.py"],
            r"kind of source 'voc' comes twice, from bowstore itself and from plugin c\.py; rename one,",
        ),
    ],
)
def test_a_plugin_that_cannot_be_used(plugins: list[str], said: str, tmp_path: Path) -> None:
    texts = {
        "none": "from bowstore.data.sources.base import Kind\n",
        "broken": "\n1 / 0\n",
        "syntax": "def :\n",
        "needs": "import no_such_module\n",
        "leaves": "raise SystemExit(3)\n",
        "a": SOURCE.replace("NAME", "same"),
        "b": SOURCE.replace("NAME", "same"),
        "c": SOURCE.replace("NAME", "voc"),
    }
    load_workspace(workspace(tmp_path, *plugins, **texts))  # reads, and imports nothing
    for _ in range(2):  # one that failed once is not half there
        with pytest.raises(UsageError, match=said):
            KINDS.names()


def test_a_broken_plugin_is_one_line_of_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(workspace(tmp_path, "broken.py", broken="1 / 0\n"))
    result = run("shards", tmp_path, "out")
    assert (result.exit_code, len(result.stderr.splitlines())) == (2, 1)
    assert result.stderr.startswith("Error: plugin broken.py cannot be imported: ")
    assert run("init", "other").exit_code == 0, "a command that needs no plugin runs"
    os.mkfifo(tmp_path / "pipe.py")
    use_plugins(Named(("pipe.py",), str(tmp_path)))
    with pytest.raises(CorruptError, match=r"pipe\.py is a named pipe and not a file"):
        KINDS.names()


def test_a_workspace_without_plugins_uses_none(tmp_path: Path) -> None:
    use_plugins(Named(("of_another.py",), str(tmp_path)))
    load_workspace(tmp_path)
    assert plugins_in_use() == Named((), str(tmp_path))
