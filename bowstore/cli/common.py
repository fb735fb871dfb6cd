"""What all commands share: the group that turns errors into one line, option types, and how a result is printed."""

import errno
import json
import os
import signal
import sys
from math import isfinite
from pathlib import Path
from typing import Any, NoReturn

import click

from bowstore.errors import BowstoreError, is_machine_error
from bowstore.limits import MAX_SEED, MAX_THREADS, path_problem, text_problem
from bowstore.plugins import Registry
from bowstore.progress import reader_is_gone


class _Text(click.types.StringParamType):
    """Text that can be used and recorded; an empty one would silently stand for the default."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Check one value."""
        if problem := text_problem(str(value)):
            self.fail(f"{value!r} {problem}", param, ctx)
        return str(value)


class _FilePath(click.Path):
    """A path that can be used and recorded; an empty one would silently stand for the current directory."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Check one value."""
        if problem := path_problem(str(value)):
            self.fail(f"{str(value)!r} {problem}", param, ctx)
        return super().convert(value, param, ctx)


def _one(value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
    """A value that is no list: options that take several numbers are given once for each."""
    if param and param.multiple and isinstance(value, str) and "," in value:
        flag = param.opts[-1]
        each = " ".join(f"{flag} {part.strip()}" for part in value.split(",")[:3])
        raise click.BadParameter(f"{value!r} is no single number; give {flag} once for each: {each}", ctx, param)
    return value


class Whole(click.IntRange):
    """A whole number within bounds."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Check one value."""
        return int(super().convert(_one(value, param, ctx), param, ctx))


class Number(click.FloatRange):
    """A finite number within bounds; click's own range lets nan through."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Check one value."""
        number = float(super().convert(_one(value, param, ctx), param, ctx))
        return number if isfinite(number) else self.fail(f"{value!r} is no finite number", param, ctx)


class Setting(click.Choice[str]):
    """auto, true or false, as a configuration has them."""

    def __init__(self) -> None:
        super().__init__(["auto", "true", "false"])

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Check one value; true and false become booleans."""
        chosen = super().convert(value, param, ctx)
        return {"true": True, "false": False}.get(chosen, chosen)


class Registered(click.types.StringParamType):
    """A name in a registry, plugins of the workspace included, which is read when the option is used or shown."""

    name = "name"

    def __init__(self, registry: Registry[Any]) -> None:
        self._registry = registry

    def _choice(self) -> click.Choice[str]:
        from bowstore.config import load_workspace

        load_workspace()
        return click.Choice(self._registry.names())

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Check one value."""
        return self._choice().convert(value, param, ctx)

    def get_metavar(self, *args: Any, **kwargs: Any) -> str | None:
        """The names, for --help."""
        return self._choice().get_metavar(*args, **kwargs)


TEXT = _Text()
PATH = _FilePath(path_type=Path)
SEED = click.IntRange(0, MAX_SEED)
THREADS = click.IntRange(1, MAX_THREADS)


class Group(click.Group):
    """Turns errors that users can meet into one line and an exit code; `--debug` shows the traceback."""

    def main(self, *args: Any, **kwargs: Any) -> Any:
        """Parse and run; what cannot be printed of --help and --version ends here."""
        _open_closed_streams()
        try:
            return super().main(*args, **kwargs)
        except OSError as error:
            _fail(_os_error(error), 1)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; errors that users can meet end here."""
        try:
            return super().invoke(ctx)
        except BowstoreError as error:
            if ctx.params.get("debug"):
                raise
            _fail(str(error), error.exit_code)
        except OSError as error:
            # click ends quietly when nobody reads on.
            if (error.errno == errno.EPIPE and reader_is_gone()) or ctx.params.get("debug"):
                raise
            _fail(_os_error(error), 1)
        except ModuleNotFoundError as error:
            if error.name != "faiss" or ctx.params.get("debug"):
                raise
            _fail("FAISS is not installed; pip install 'bowstore[cpu]', or 'bowstore[gpu]' on a GPU machine", 1)
        except (RuntimeError, MemoryError) as error:
            if not is_machine_error(error) or ctx.params.get("debug"):
                raise
            whose = "GPU's" if type(error).__name__ == "OutOfMemoryError" else "machine's"
            first = (str(error) or type(error).__name__).splitlines()[0]
            _fail(f"the {whose} memory is full ({first}); lower the batch, or end what else uses it", 1)
        except KeyboardInterrupt as error:
            _fail(str(error) or "interrupted; the same command goes on from what is finished", 130)


def _open_closed_streams() -> None:
    """Open /dev/null in the place of standard streams that the caller closed.

    The next file to be opened would get their number, and what C libraries print would be written into it.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:  # the lowest free number is this one
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    # Python has None there, which `print` takes for stdout.
    sys.stderr = sys.stderr or open(os.devnull, "w")


def _fail(message: str, code: int) -> None:
    click.echo(f"Error: {' '.join(message.split())}", err=True)
    sys.exit(code)


def _os_error(error: OSError) -> str:
    where = f" ({error.filename})" if error.filename else ""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"the disk is full{where}; free some space and run the command again: it goes on where it stopped"
    return f"{error.strerror or error}{where}{_REMEDIES.get(error.errno or 0, '')}"


_REMEDIES = {
    errno.ENOENT: "; check the path: it, or a folder above it, is not there",
    errno.ENOTDIR: "; a file lies where a folder is needed: name another path, or move the file away",
    errno.EEXIST: "; move away what lies there, or name another path",
    errno.EISDIR: "; a folder lies where a file is needed: name another path, or move the folder away",
    errno.EROFS: "; name a path on a disk that can be written",
    errno.EACCES: "; give yourself the permission, or name another path",
    errno.EPERM: "; give yourself the permission, or name another path",
    errno.EMFILE: "; too many files are open at once: raise the limit with ulimit -n",
    errno.EIO: "; the disk or the network behind it fails: check it, then run the command again",
    errno.ESTALE: "; the network file system lost the file: mount it anew, then run the command again",
}


def emit(value: Any, text: str, as_json: bool) -> None:
    """One result on stdout: the table, or with --json the object alone."""
    shown = json.dumps(value, indent=2) if as_json else text
    try:
        click.echo(shown)
    except UnicodeEncodeError as error:  # a terminal of another encoding shows what it lacks as escapes
        click.echo(shown.encode(error.encoding, "backslashreplace"))


def interrupt_on_sigterm() -> None:
    """SIGTERM ends a command as Ctrl-C does: what is half written is removed, and locks are freed."""
    signal.signal(signal.SIGTERM, _interrupted)


def _interrupted(_number: int, _frame: object) -> NoReturn:
    # torchrun sends it to all when one has ended, which we may know before
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise KeyboardInterrupt
