"""Files that appear complete or not at all."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import BinaryIO

import pytest

from fastad.atomic import PartialFile, check_target, write_whole
from fastad.errors import EngineError, InputError


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_writes_and_makes_the_folder(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "file"
    assert write_whole(path, lambda file: file.write(b"new")) == path
    assert path.read_bytes() == b"new"
    assert names(path.parent) == ["file"]


def test_readers_see_the_old_file_until_the_new_one_is_complete(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with PartialFile(path) as file:
        file.write(b"new")
        file.flush()
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new"
    assert names(tmp_path) == ["file"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError, EngineError])
def test_an_exception_keeps_the_old_file_and_comes_through(
    tmp_path: Path, error: type[BaseException]
) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pytest.raises(error), PartialFile(path) as file:
        file.write(b"half")
        raise error
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["file"]


def test_a_full_disk_is_an_engine_error_with_the_path(tmp_path: Path) -> None:
    def fill(_: BinaryIO) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(EngineError, match=r"file: cannot be written \(No space left"):
        write_whole(tmp_path / "file", fill)
    assert names(tmp_path) == []


def test_names_as_long_as_the_system_allows_are_fine(tmp_path: Path) -> None:
    write_whole(tmp_path / ("n" * 255), lambda file: file.write(b"x"))
    assert names(tmp_path) == ["n" * 255]


def test_a_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="expected the name of a file, it is a folder"):
        write_whole(tmp_path, lambda file: file.write(b"x"))


def test_a_link_is_followed_and_stays(tmp_path: Path) -> None:
    target, link = tmp_path / "target", tmp_path / "link"
    target.write_bytes(b"old")
    link.symlink_to(target)
    write_whole(link, lambda file: file.write(b"new"))
    assert link.is_symlink()
    assert target.read_bytes() == b"new"


def test_a_device_is_written_in_place() -> None:
    before = Path(os.devnull).stat()
    write_whole(Path(os.devnull), lambda file: file.write(b"x"), durable=True)
    after = Path(os.devnull).stat()
    assert (before.st_ino, before.st_mode) == (after.st_ino, after.st_mode)


def test_target_is_refused_before_the_work(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist; create it first"):
        check_target(tmp_path / "absent" / "a.engine")
    with pytest.raises(InputError, match="is a folder"):
        check_target(tmp_path)


def test_checking_a_target_leaves_nothing_and_keeps_what_is_there(tmp_path: Path) -> None:
    there = tmp_path / "a.engine"
    there.write_bytes(b"old")
    check_target(there)
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"old"]


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="needs a folder that nobody can write")
def test_a_folder_that_cannot_be_written_is_found_out_first() -> None:
    with pytest.raises(EngineError, match="cannot be written"):
        check_target(Path("/proc/a.engine"))
