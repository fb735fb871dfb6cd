"""What all commands share: the group that turns errors into one line, option types, and how a result is printed."""

import errno
import json
import sys
from pathlib import Path
from typing import Any

import click

from bowstore.errors import BowstoreError

PATH = click.Path(path_type=Path)
DEVICES = click.Choice(["auto", "cpu", "cuda"])


class Group(click.Group):
    """Turns errors that users can meet into one line and an exit code; `--debug` shows the traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; errors that users can meet end here."""
        try:
            return super().invoke(ctx)
        except BowstoreError as error:
            if ctx.params.get("debug"):
                raise
            _fail(str(error), error.exit_code)
        except OSError as error:
            if ctx.params.get("debug"):
                raise
            _fail(_os_error(error), 1)
        except ModuleNotFoundError as error:
            if error.name != "faiss" or ctx.params.get("debug"):
                raise
            _fail("FAISS is not installed; pip install 'bowstore[cpu]', or 'bowstore[gpu]' on a GPU machine", 1)
        except RuntimeError as error:
            if type(error).__name__ != "OutOfMemoryError" or ctx.params.get("debug"):
                raise
            _fail(f"the GPU's memory is full ({str(error).splitlines()[0]}); lower the batch", 1)
        except KeyboardInterrupt:
            _fail("interrupted; run the command again to go on", 130)


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
}


def emit(value: Any, text: str, as_json: bool) -> None:
    """One result on stdout: the table, or with --json the object alone."""
    click.echo(json.dumps(value, indent=2) if as_json else text)
