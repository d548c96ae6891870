"""Files that appear complete or not at all, whatever happens, and where caches of them lie."""

from __future__ import annotations

import contextlib
import os
import secrets
import sys
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

from fastad.errors import EngineError, InputError


class PartialFile:
    """A file written beside its final name; leaving ``with`` renames it, an exception removes it.

    A link is followed, and its target replaced. A device or a pipe, such as ``/dev/null``, cannot
    be replaced and is written in place.

    Args:
        path: The file to make or replace.
        durable: Wait for the disk before and after the rename, so that a power cut costs nothing.

    Raises:
        EngineError: on entering or leaving, the folder cannot be made or written, or the disk is
            full.
    """

    def __init__(self, path: Path, *, durable: bool = False) -> None:
        self.path = path
        self.durable = durable
        self._beside: Path | None = None
        self._file: BinaryIO

    def __enter__(self) -> BinaryIO:
        try:
            if self.path.is_dir():
                raise EngineError(f"{self.path}: expected the name of a file, it is a folder")
            if self.path.exists() and not self.path.is_file():
                self._file = self.path.open("wb")
                return self._file
            self._target = self.path.resolve()
            self._target.parent.mkdir(parents=True, exist_ok=True)
            self._beside = self._target.with_name(f".{secrets.token_hex(8)}.partial")
            self._file = self._beside.open("xb")
        except OSError as error:
            raise unwritable(self.path, error) from error
        return self._file

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if self.durable and kind is None and self._beside:  # devices refuse to be flushed
                self._file.flush()
                os.fsync(self._file.fileno())
            self._file.close()
            if kind is None and self._beside:
                self._beside.replace(self._target)
                if self.durable:
                    _flush_folder(self._target.parent)
        except OSError as failure:
            if kind is None:  # else the first error says more
                raise unwritable(self.path, failure) from failure
        finally:
            with contextlib.suppress(OSError):
                self._file.close()
            if self._beside:
                with contextlib.suppress(OSError):
                    self._beside.unlink(missing_ok=True)


def _flush_folder(folder: Path) -> None:
    """Have a rename on the disk too; file systems that cannot flush a folder do without."""
    if os.name != "posix":
        return
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def write_whole(path: Path, write: Callable[[BinaryIO], object], *, durable: bool = False) -> Path:
    """Let ``write`` fill a `PartialFile`; returns ``path``.

    Raises:
        EngineError: as in `PartialFile`.
    """
    with PartialFile(path, durable=durable) as file:
        try:
            write(file)
        except OSError as error:
            raise unwritable(path, error) from error
    return path


def check_target(path: Path) -> None:
    """Refuse a file that could not be written in the end, before the work that fills it.

    Raises:
        InputError: the folder does not exist, or the name is a folder's.
        EngineError: the folder cannot be written.
    """
    if not path.parent.is_dir():
        raise InputError(f"out: the folder {path.parent} does not exist; create it first")
    if path.is_dir():
        raise InputError(f"out: expected the name of a file, {path} is a folder")
    if path.exists() and not path.is_file():
        return  # a device or a pipe
    beside = path.resolve().with_name(f".{secrets.token_hex(8)}.partial")
    try:
        beside.touch(exist_ok=False)
        beside.unlink()
    except OSError as error:
        raise unwritable(path, error) from error


def user_cache(part: str) -> Path | None:
    """This user's folder for what can be made again; None where there is no place for one.

    Below ``$XDG_CACHE_HOME`` or ``~/.cache``, on Windows below ``%LOCALAPPDATA%``. It may not
    exist yet.

    >>> user_cache("openvino").name
    'openvino'
    """
    given = os.environ.get("LOCALAPPDATA" if sys.platform == "win32" else "XDG_CACHE_HOME", "")
    if Path(given).is_absolute():  # the XDG rule: anything else counts as unset
        return Path(given) / "fastad" / part
    try:
        return Path.home() / ".cache" / "fastad" / part
    except RuntimeError:
        return None


def unwritable(target: object, error: OSError) -> EngineError:
    """What an operating system's refusal to write means to the user."""
    reason = error.strerror or error
    return EngineError(f"{target}: cannot be written ({reason}); free some space or choose another")
