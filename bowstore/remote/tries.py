"""What the protocols raise: which of it is worth another try, and what it means in one line."""

import errno
import random
import threading
from collections.abc import Callable, Iterator
from typing import TypeVar

from bowstore.config import StorageConfig
from bowstore.errors import BowstoreError, MissingError, TransferError, UsageError
from bowstore.remote.urls import protocol, shown

T = TypeVar("T")
_FIRST_WAIT_S, _LONGEST_WAIT_S = 0.5, 30.0
_NO_CONNECTION = {"ClientConnectorError", "EndpointConnectionError", "ConnectionRefusedError", "gaierror"}
# What S3 answers with status 400, by the status that it stands for.
_CODES = {"RequestTimeout": 408, "ExpiredToken": 401, "InvalidToken": 401, "TokenRefreshRequired": 401}


class Tries:
    """Counts failures in a row, waits longer after each, and says at the end what was wrong."""

    def __init__(self, url: str, storage: StorageConfig, stop: threading.Event, *, writing: bool = False) -> None:
        self._url, self._stop, self._storage, self._writing = url, stop, storage, writing
        self._failures = 0

    def run(self, action: Callable[[], T]) -> T:
        """What an action returns in the end; what it raises last, as what a user can meet."""
        while True:
            try:
                return action()
            except (BowstoreError, MemoryError):  # said already; and no other try has more
                raise
            except NotImplementedError as error:
                raise UsageError(f"{protocol(self._url)}:// cannot be written; s3://, gs:// and hf:// can") from error
            except Exception as error:  # every protocol has errors of its own
                if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):  # not the server's
                    raise
                self._failures += 1
                status = status_of(error)
                hopeless = status is not None and 400 <= status < 500 and status not in (408, 416, 429)
                wait_s = min(_FIRST_WAIT_S * 2 ** (self._failures - 1), _LONGEST_WAIT_S)
                wait_s *= random.uniform(0.5, 1.0)  # ranks that failed together do not come back together
                if hopeless or self._failures > self._storage.retries or self._stop.wait(wait_s):
                    raise self._final(error, status) from error

    def succeeded(self) -> None:
        """Forget the failures: the transfer got on."""
        self._failures = 0

    def _final(self, error: Exception, status: int | None) -> BowstoreError:
        url, tries = shown(self._url), "1 try" if self._failures == 1 else f"{self._failures} tries"
        names = {type(cause).__name__ for cause in _causes(error)}
        first = list(_causes(error))[-1]  # fsspec's own messages may hold the URL with its secrets
        reason = " ".join(str(first).split()).replace(self._url, url)[:200] or type(first).__name__
        if status == 404 and self._writing:
            return MissingError(f"{url} cannot be written: there is no such bucket (404); make it, or check the URL")
        if status == 404:
            return MissingError(f"{url} is not there (404); check the URL, and that all files were copied there")
        if status in (401, 403):
            what = "written" if self._writing else "read"
            return TransferError(f"{url} may not be {what} ({status}, {tries}); check the credentials and the policy")
        if status is not None:
            return TransferError(f"{url}: the server answers {status} ({tries}); try again later")
        if any("Timeout" in name for name in names):
            missing, patience_s = "answer" if self._writing else "byte", self._storage.timeout_s
            return TransferError(
                f"{url}: no {missing} for {patience_s:g} s ({tries}); try again later, or raise storage.timeout_s"
            )
        if names & _NO_CONNECTION:
            return TransferError(f"{url}: no connection ({reason}; {tries}); check the address and the network")
        return TransferError(
            f"{url}: the transfer broke off ({reason}; {tries}); run the command again to go on, or raise "
            f"storage.retries"
        )


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def status_of(error: BaseException) -> int | None:
    """HTTP status of an error, found the way each protocol says it; 404 and 403 also of plain Python errors."""
    for cause in _causes(error):
        answer = getattr(cause, "response", None)
        response = answer if isinstance(answer, dict) else {}
        parts, code = response.get("ResponseMetadata", {}), response.get("Error", {}).get("Code")
        if code in _CODES:
            return _CODES[code]
        # aiohttp calls its own complaints about a broken answer `code` 400; of gcsfs that is the server's.
        code = getattr(cause, "code", None) if type(cause).__module__.startswith("gcsfs") else None
        hub = getattr(answer, "status_code", None)
        for value in (getattr(cause, "status", None), code, parts.get("HTTPStatusCode"), hub):
            if isinstance(value, int) and 400 <= value < 600:
                return value
    causes = list(_causes(error))
    if any("Credentials" in type(cause).__name__ for cause in causes):
        return 401
    if isinstance(error, PermissionError):
        return 403
    # fsspec's http says "not found" of everything that goes wrong; the cause tells more.
    return 404 if all(isinstance(cause, (FileNotFoundError, LookupError)) for cause in causes) else None
