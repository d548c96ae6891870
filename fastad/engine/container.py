"""The engine file: written whole or not at all, read checked or not at all.

It is a ZIP archive that any tool can list, and every byte of it is determined: members are stored
uncompressed, without timestamps or extra fields, ``manifest.json`` first and the others sorted by
name. The archive comment is the seal, SHA-256 over manifest.json and the central directory. The
manifest holds the SHA-256 of every other member; local headers and the end record follow from the
central directory and are compared with it. So no bit changes unnoticed and each is hashed once.
The seal finds damage; it is no signature and does not say who made the file. Manifest first and
seal last hold for every later format, so that an old reader can name a newer file.

The file is read, not mapped: where a read raises, a mapping of a file that is overwritten in place
or lies on failing storage kills the process, and OpenVINO and ONNX Runtime take ``bytes`` only.
Writer and reader share one file, longer than others: each relies on every byte of one layout.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import os
import re
import stat
import string
import struct
import zlib
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np
import pydantic
from numpy.typing import NDArray

from fastad.atomic import write_whole
from fastad.errors import EngineError, InputError
from fastad.spec import FORMAT_VERSION, Manifest, Member, from_json, to_json

MANIFEST = "manifest.json"
MODEL = "model.onnx"
WEIGHTS = "weights.safetensors"  # optional
IMAGES, MAPS, SCORES = "golden/images.npy", "golden/anomaly_map.npy", "golden/raw_score.npy"

MAX_FILE_BYTES = 2**32 - 1  # what ZIP holds without its 64-bit extension
MAX_MEMBER_BYTES = 2**31 - 1  # an ONNX file is a protobuf message, which ends here
MAX_MANIFEST_BYTES = 4 * 2**20
MAX_MEMBERS = 64  # besides the manifest
MAX_NAME_LENGTH = 128
_BLOCK_BYTES = 2**20  # read and hashed at a time: fits a level 2 cache

_SEGMENT = "[A-Za-z0-9_][A-Za-z0-9_.+-]*"  # no leading dot, so no ".."
_NAME = re.compile(f"{_SEGMENT}(?:/{_SEGMENT})*")
_NPY = re.compile(  # what NumPy writes for plain arrays, so that nothing evaluates a header
    rb"\x93NUMPY\x01\x00(..)\{'descr': '([^']{1,8})', 'fortran_order': False, "
    rb"'shape': \(([\d, ]{0,60})\), \} *\n",
    re.DOTALL,
)

_LOCAL, _LOCAL_MAGIC = struct.Struct("<4s5H3I2H"), b"PK\x03\x04"
_CENTRAL, _CENTRAL_MAGIC = struct.Struct("<4s6H3I5H2I"), b"PK\x01\x02"
_END, _END_MAGIC = struct.Struct("<4s4H2IH"), b"PK\x05\x06"
_MAX_DIRECTORY_BYTES = (MAX_MEMBERS + 1) * (_CENTRAL.size + MAX_NAME_LENGTH)
_MADE_BY, _ZIP_VERSION = 3 << 8 | 20, 20  # Unix, 2.0
_DATE = 0x21  # 1980-01-01, the first that ZIP knows
_FILE_MODE = (stat.S_IFREG | 0o644) << 16
_SEAL = b"fastad engine; SHA-256 of manifest and directory: "
_TAIL_BYTES = _END.size + len(_SEAL) + 64

_SIGNATURES = {  # first bytes of what gets passed by mistake
    b"\x08": "an ONNX graph or another protobuf",
    b"\x80": "a pickle",
    b"\x1f\x8b": "a gzip archive",
    b"\x89PNG": "a PNG image",
    b"\xff\xd8": "a JPEG image",
    b"PK\x05\x06": "an empty ZIP archive",
}


@dataclass(frozen=True, eq=False)
class Golden:
    """A few images at model size with what the exported model said of them, in PyTorch."""

    images: NDArray[np.uint8]  # [N, H, W, 3] RGB
    anomaly_map: NDArray[np.float32]  # [N, H, W] finite
    raw_score: NDArray[np.float32]  # [N] finite

    def members(self) -> dict[str, bytes]:
        """The three members of an engine file, in NumPy's own format without pickle."""
        return {
            IMAGES: _to_npy(self.images),
            MAPS: _to_npy(self.anomaly_map),
            SCORES: _to_npy(self.raw_score),
        }


def _to_npy(array: NDArray[Any]) -> bytes:
    file = BytesIO()
    np.lib.format.write_array(file, np.ascontiguousarray(array), version=(1, 0), allow_pickle=False)
    return file.getvalue()


def _from_npy(source: str, data: bytes, descr: str, shape: tuple[int, ...]) -> NDArray[Any]:
    """Read-only array over ``data`` of this dtype and shape; a first size of 0 allows any."""
    header = _NPY.match(data)
    if header is None or int.from_bytes(header[1], "little") + 10 != header.end():
        raise EngineError(f"{source}: expected a plain array in NumPy's format 1.0; export again")
    got_descr = header[2].decode("latin-1")
    got = tuple(map(int, re.findall(rb"\d+", header[3])))
    count = shape[:1] if shape[0] else got[:1]
    if got_descr != descr or got != count + shape[1:]:
        want = ", ".join(str(size or "N") for size in shape)
        raise EngineError(
            f"{source}: expected {descr} [{want}], got {got_descr} {list(got)}; export again"
        )
    dtype = np.dtype(descr)
    held, size = len(data) - header.end(), math.prod(got) * dtype.itemsize
    if held != size or size == 0:
        raise EngineError(f"{source}: {list(got)} takes {size} bytes, found {held}; export again")
    array = np.frombuffer(data, dtype, offset=header.end()).reshape(got)
    if not np.isfinite(array).all():
        raise EngineError(f"{source}: expected finite values; the exported model is broken")
    return array


def _read_golden(member: Callable[[str], bytes], size: tuple[int, int], source: str) -> Golden:
    """Golden arrays for model input ``size``; EngineError if they do not fit it or each other."""
    images = _from_npy(f"{source}: {IMAGES}", member(IMAGES), "|u1", (0, *size, 3))
    maps = _from_npy(f"{source}: {MAPS}", member(MAPS), "<f4", (len(images), *size))
    scores = _from_npy(f"{source}: {SCORES}", member(SCORES), "<f4", (len(images),))
    return Golden(images, maps, scores)


class _Entry(NamedTuple):
    """One member's place in the archive."""

    name: str
    crc: int
    size: int
    offset: int  # of its local header

    @property
    def data(self) -> int:
        """Offset of the first data byte."""
        return self.offset + _LOCAL.size + len(self.name)

    def local(self) -> bytes:
        """Local header; the data follows it."""
        rest = (self.crc, self.size, self.size, len(self.name), 0)
        return _LOCAL.pack(_LOCAL_MAGIC, _ZIP_VERSION, 0, 0, 0, _DATE, *rest) + self.name.encode()

    def central(self) -> bytes:
        """Record in the central directory."""
        start = (_CENTRAL_MAGIC, _MADE_BY, _ZIP_VERSION, 0, 0, 0, _DATE)
        rest = (self.crc, self.size, self.size, len(self.name), 0, 0, 0, 0, _FILE_MODE, self.offset)
        return _CENTRAL.pack(*start, *rest) + self.name.encode()


def _end(count: int, directory: bytes, offset: int, manifest: bytes) -> bytes:
    """End record and seal."""
    comment = _SEAL + hashlib.sha256(manifest + directory).hexdigest().encode()
    sizes = (count, count, len(directory), offset, len(comment))
    return _END.pack(_END_MAGIC, 0, 0, *sizes) + comment


def _pack(members: Mapping[str, bytes]) -> list[bytes]:
    """The archive in pieces; ``members`` starts with the manifest."""
    pieces, directory, offset = [], b"", 0
    for name, data in members.items():
        entry = _Entry(name, zlib.crc32(data), len(data), offset)
        pieces += [entry.local(), data]
        directory += entry.central()
        offset = entry.data + entry.size
    return [*pieces, directory, _end(len(members), directory, offset, members[MANIFEST])]


def _is_safe(name: str) -> bool:
    return len(name) <= MAX_NAME_LENGTH and _NAME.fullmatch(name) is not None


def _lacking(manifest: Manifest, names: Collection[str]) -> str:
    """What an engine with this manifest has to hold and ``names`` does not."""
    needed = (MODEL, IMAGES, MAPS, SCORES, *(variant.member for variant in manifest.variants))
    lacking = [name for name in dict.fromkeys(needed) if name not in names]
    return ", ".join(lacking if manifest.variants else ["variants in its manifest", *lacking])


def _as_path(path: str | os.PathLike[str]) -> Path:
    if not isinstance(path, str | os.PathLike) or isinstance(os.fspath(path), bytes):
        raise InputError(f"path: expected str or pathlib.Path, got {type(path).__name__}")
    if "\0" in os.fspath(path):
        raise InputError(f"path: {os.fspath(path)!r} contains a null byte; pass the path of a file")
    return Path(path)


def write_engine(
    path: str | os.PathLike[str], manifest: Manifest, members: Mapping[str, bytes]
) -> Path:
    """Write an engine file; equal arguments give equal bytes.

    It is written beside ``path``, flushed to the disk and renamed, so ``path`` holds the old file
    or the new one, never a part; a link is followed and stays one. Nothing else stays behind,
    whatever is raised; a process that is killed outright may leave a hidden ``.partial`` file.

    Args:
        path: The file to make or replace, by custom ``NAME.engine``, in a folder that exists.
        manifest: Its ``members`` are filled in here.
        members: All but the manifest: ``model.onnx``, what ``manifest.variants`` names,
            ``Golden.members()``, optional ``weights.safetensors``. Order does not matter.

    Returns:
        ``path``.

    Raises:
        InputError: the folder is missing, a member is missing, empty, too large or badly named,
            the golden arrays do not fit ``manifest.spec.input``, or the manifest is not JSON.
        EngineError: the file cannot be written: disk full, no permission.
    """
    target = _as_path(path)
    try:
        is_folder, has_folder = target.is_dir(), target.parent.is_dir()
    except OSError as error:
        raise EngineError(
            f"{target}: cannot be reached: {error.strerror or error}; check the path and the "
            "permissions of its folders"
        ) from error
    if is_folder:
        raise InputError(f"{target}: expected a path for an engine file, got a folder")
    if not has_folder:
        raise InputError(f"{target}: the folder {target.parent} does not exist; create it first")
    _check_contents(manifest, members)
    contents = {name: members[name] for name in sorted(members)}
    table = {
        name: Member(len(data), hashlib.sha256(data).hexdigest()) for name, data in contents.items()
    }
    text = _to_text(dataclasses.replace(manifest, members=table))
    pieces = _pack({MANIFEST: text, **contents})
    try:
        return write_whole(target, lambda file: file.writelines(pieces), durable=True)
    except EngineError as error:
        raise EngineError(
            f"{error}; nothing was changed, {sum(map(len, pieces)) / 1e6:.1f} MB and write "
            "permission are needed in its folder"
        ) from error


def _check_contents(manifest: Manifest, members: Mapping[str, bytes]) -> None:
    """Refuse before any work what a reader would refuse."""
    if manifest.format_version != FORMAT_VERSION:
        raise InputError(
            f"manifest: format_version is {manifest.format_version}, this fastad writes "
            f"{FORMAT_VERSION}; leave it at its default"
        )
    if lacking := _lacking(manifest, members):
        raise InputError(f"members: expected {lacking}, got {', '.join(members) or 'none'}")
    if len(members) > MAX_MEMBERS:
        raise InputError(f"members: expected at most {MAX_MEMBERS}, got {len(members)}")
    for name, data in members.items():
        if name == MANIFEST or not _is_safe(name):
            raise InputError(
                f"members: {name!r} is reserved or unsafe; use up to {MAX_NAME_LENGTH} of "
                "A-Z a-z 0-9 _ . + - with / between folders, each starting with A-Z a-z 0-9 _"
            )
        if not isinstance(data, bytes) or not 0 < len(data) <= MAX_MEMBER_BYTES:
            got = f"{type(data).__name__} of {len(data)}"
            raise InputError(f"members: {name}: expected 1 to {MAX_MEMBER_BYTES} bytes, got {got}")
    # room for the manifest and some 250 bytes of headers for each member
    room = MAX_FILE_BYTES - MAX_MANIFEST_BYTES - 2**16
    if (total := sum(map(len, members.values()))) > room:
        raise InputError(f"members: {total} bytes, at most {room} fit; leave out {WEIGHTS}")
    try:
        _read_golden(members.__getitem__, manifest.spec.input.size, "members")
    except EngineError as error:
        raise InputError(str(error)) from None


def _to_text(manifest: Manifest) -> bytes:
    """JSON of a manifest, known to read back."""
    text = to_json(manifest)
    try:
        same = to_json(from_json(Manifest, text, MANIFEST)) == text
    except EngineError as error:
        raise InputError(f"manifest: does not read back from JSON: {error}") from None
    if not same or len(text) > MAX_MANIFEST_BYTES:
        raise InputError(
            f"manifest: expected plain values and at most {MAX_MANIFEST_BYTES} bytes of JSON, got "
            f"{len(text)} bytes{'' if same else ' that change when read back'}"
        )
    return text.encode()


def read_engine(path: str | os.PathLike[str]) -> EngineFile:
    """Open an engine file after checking every byte of it; the contents decide, not the suffix.

    Checked are size limits, the archive's structure against the one layout this module writes,
    the seal, the format version, the manifest's schema and the SHA-256 of every member.

    Raises:
        InputError: ``path`` is not a path.
        EngineError: the file is missing, unreadable, something else, damaged, packed again by a
            ZIP tool, or written by a newer fastad.
    """
    return EngineFile(path)


@dataclass(frozen=True)
class _Version:
    """The one field of a manifest that every format has."""

    format_version: int


class EngineFile:
    """A checked engine file; it owns an open file, which ``close`` or ``with`` releases.

    What ``member`` and ``golden`` return owns its memory and outlives this object. One thread at
    a time.
    """

    path: Path
    manifest: Manifest

    def __init__(self, path: str | os.PathLike[str]):
        self.path = _as_path(path)
        try:
            found = self.path.stat()
            if not stat.S_ISREG(found.st_mode):  # opening a pipe would wait for its other end
                kind = "a folder" if stat.S_ISDIR(found.st_mode) else "a device or a pipe"
                raise EngineError(f"{self.path}: expected an engine file, got {kind}; pass a file")
            self._file = self.path.open("rb")
        except FileNotFoundError:
            raise EngineError(
                f"{self.path}: there is no such file; check the path or export a model to it"
            ) from None
        except OSError as error:
            raise EngineError(
                f"{self.path}: cannot be opened: {error.strerror or error}; "
                "check the path and its permissions"
            ) from error
        try:
            self._stat = os.fstat(self._file.fileno())
            self._entries = {entry.name: entry for entry in self._checked_entries()}
            for name, entry in self._entries.items():
                if name != MANIFEST and self._digest(entry) != self.manifest.members[name].sha256:
                    raise self._damaged(f"{name} is not what the manifest says")
        except BaseException:
            self._file.close()
            raise

    def member(self, name: str) -> bytes:
        """One member's bytes, such as ``model.onnx``.

        Raises:
            InputError: the engine has no such member (see ``manifest.members``), or is closed.
            EngineError: the file changed since it was checked, or cannot be read.
        """
        if self._file.closed:
            raise InputError(f"{self.path}: is closed; read members before that")
        if name not in self.manifest.members:
            held = ", ".join(self.manifest.members)
            raise InputError(f"{self.path}: expected one of {held}, got {name!r}")
        entry = self._entries[name]
        data = self._read(entry.data, entry.size)
        now = os.fstat(self._file.fileno())
        if (now.st_size, now.st_mtime_ns) != (self._stat.st_size, self._stat.st_mtime_ns):
            raise EngineError(
                f"{self.path}: was overwritten while open; open it again, and replace engines by "
                "renaming, not by copying over them"
            )
        return data

    def golden(self) -> Golden:
        """The golden images and outputs, read-only arrays.

        Raises:
            EngineError: they do not fit ``manifest.spec.input`` or each other.
        """
        return _read_golden(self.member, self.manifest.spec.input.size, str(self.path))

    def close(self) -> None:
        """Release the file; a second call does nothing."""
        self._file.close()

    def __enter__(self) -> EngineFile:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _damaged(self, what: str) -> EngineError:
        return EngineError(
            f"{self.path}: {what}; the file is damaged or was changed, copy it again from where "
            "it was made or export the model again"
        )

    def _read(self, offset: int, size: int) -> bytes:
        try:
            self._file.seek(offset)
            data = self._file.read(size)
        except OSError as error:
            raise self._damaged(f"cannot be read: {error.strerror or error}") from error
        if len(data) != size:
            raise self._damaged(f"ends after {offset + len(data)} bytes, {offset + size} expected")
        return data

    def _digest(self, entry: _Entry) -> str:
        """SHA-256 of a member, in constant memory."""
        digest = hashlib.sha256()
        for start in range(0, entry.size, _BLOCK_BYTES):
            size = min(_BLOCK_BYTES, entry.size - start)
            digest.update(self._read(entry.data + start, size))
        return digest.hexdigest()

    def _checked_entries(self) -> list[_Entry]:
        """Everything but the members' digests: structure, seal, manifest, which is set here."""
        size = self._stat.st_size
        head = self._read(0, min(size, 16))
        if not head.startswith(_LOCAL_MAGIC):
            raise EngineError(f"{self.path}: expected an engine file, got {_describe(head)}")
        if size > MAX_FILE_BYTES:
            raise self._damaged(f"has {size} bytes, an engine has at most {MAX_FILE_BYTES}")
        tail = self._read(max(0, size - _TAIL_BYTES), min(size, _TAIL_BYTES))
        if not tail.startswith(_END_MAGIC) or not tail.startswith(_SEAL, _END.size):
            raise self._unsealed()
        count, directory_size, offset = _END.unpack_from(tail)[4:7]
        if offset + directory_size != size - _TAIL_BYTES:
            raise self._damaged("its directory is not where it belongs")
        if count > MAX_MEMBERS + 1 or directory_size > _MAX_DIRECTORY_BYTES:
            raise self._damaged(f"has {count} members, an engine has at most {MAX_MEMBERS}")
        directory = self._read(offset, directory_size)
        entries = self._entries_of(directory, offset)
        manifest = self._read(entries[0].data, entries[0].size)
        if tail != _end(len(entries), directory, offset, manifest):
            raise self._damaged("its manifest or directory does not match its seal")
        for entry in entries:
            if self._read(entry.offset, entry.data - entry.offset) != entry.local():
                raise self._damaged(f"the header of {entry.name} differs from the directory")
        self.manifest = self._manifest_of(manifest)
        sizes = {name: member.size for name, member in self.manifest.members.items()}
        if sizes != {entry.name: entry.size for entry in entries[1:]}:
            raise self._damaged("its members are not those that the manifest lists")
        if lacking := _lacking(self.manifest, sizes):
            raise self._damaged(f"has no {lacking}")
        return entries

    def _entries_of(self, directory: bytes, end: int) -> list[_Entry]:
        """The members of a central directory that is exactly as this module writes it."""
        entries: list[_Entry] = []
        at = offset = 0
        while at < len(directory):
            if len(directory) - at < _CENTRAL.size:
                raise self._damaged("its directory is cut short")
            flags, method, _, _, crc, _, size, name_size = _CENTRAL.unpack_from(directory, at)[3:11]
            at += _CENTRAL.size
            name = directory[at : at + name_size].decode("latin-1")
            if method != 0 or flags & 1:
                kind = "compressed" if method else "encrypted"
                raise self._damaged(f"{name!r} is {kind}: the engine was unpacked and zipped again")
            if not _is_safe(name):
                raise self._damaged(f"{name!r} is no member name")
            limit = MAX_MEMBER_BYTES if entries else MAX_MANIFEST_BYTES
            if size > limit:
                raise self._damaged(f"{name} has {size} bytes, the limit is {limit}")
            entries.append(_Entry(name, crc, size, offset))
            at, offset = at + name_size, entries[-1].data + size
        names = [entry.name for entry in entries]
        if names[:1] != [MANIFEST] or len(set(names)) != len(names):
            raise self._damaged(f"expected {MANIFEST} first and no name twice, got {names}")
        if offset != end or directory != b"".join(entry.central() for entry in entries):
            raise self._damaged("its directory is not as fastad writes it: packed by a ZIP tool?")
        return entries

    def _manifest_of(self, text: bytes) -> Manifest:
        """The manifest; its version is looked at first, a newer one may have other fields."""
        try:
            version = pydantic.TypeAdapter(_Version).validate_json(text).format_version
        except pydantic.ValidationError:
            raise self._damaged(f"{MANIFEST} states no format_version") from None
        if version > FORMAT_VERSION:
            raise EngineError(
                f"{self.path}: written by a newer fastad (format {version}, this is "
                f"{FORMAT_VERSION}): upgrade fastad or export again"
            )
        if version != FORMAT_VERSION:
            raise EngineError(f"{self.path}: format {version} is not read any more; export again")
        return from_json(Manifest, text, f"{self.path}: {MANIFEST}")

    def _unsealed(self) -> EngineError:
        """Why a file that starts as a ZIP archive does not end as an engine."""
        size = self._stat.st_size
        block = self._read(max(0, size - 2**16), min(size, 2**16))
        at = block.rfind(_END_MAGIC)
        record = block[at : at + _END.size] if at >= 0 else b""
        if len(record) < _END.size or len(block) - at - _END.size != _END.unpack(record)[7]:
            return self._damaged("does not end as an engine does: cut short, or bytes were added")
        if MANIFEST.encode() in block[:at]:
            return self._damaged("has no seal: the engine was unpacked and zipped again")
        return EngineError(
            f"{self.path}: expected an engine file, got another ZIP archive (a PyTorch "
            "checkpoint?); export the model to make an engine"
        )


def _describe(head: bytes) -> str:
    """What a file that is not an engine seems to be, and the way out."""
    known = [kind for magic, kind in _SIGNATURES.items() if head.startswith(magic)]
    if not head:
        known = ["an empty file"]
    elif not known and not head.strip(string.printable.encode()):
        known = ["a text file"]
    found = known[0] if known else "something else"
    return f"{found} (starts with {head!r}); pass the .engine file that an export made"
