"""The engine file: any damage, mix-up or failed write ends in one clear error."""

from __future__ import annotations

import errno
import io
import json
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastad.engine import container
from fastad.engine.container import Golden, read_engine, write_engine
from fastad.errors import EngineError, InputError
from fastad.spec import InputSpec, Manifest, ModelSpec, Variant, to_json

H, W = 3, 2
INFINITE = InputSpec((H, W), mean=(0.0, 0.0, float("inf")))
ONNX = b"\x08\x09 a graph"
MANIFEST = Manifest(
    spec=ModelSpec("fake", InputSpec((H, W)), {"layers": [1, 2]}, ("bottle", "Nuß")),
    variants=(Variant("model.onnx", "float32", ()), Variant("model.int8.onnx", "int8", ())),
    calibration=None,
    provenance={"torch": "2.9"},
)


def golden(n: int = 2) -> Golden:
    rng = np.random.default_rng(0)
    return Golden(
        rng.integers(0, 256, (n, H, W, 3), np.uint8),
        rng.random((n, H, W), np.float32),
        rng.random(n, np.float32),
    )


def members(changes: Mapping[str, bytes | None] = MappingProxyType({})) -> dict[str, bytes]:
    """Members of a small engine after ``changes``; None drops a member."""
    contents: dict[str, bytes | None] = {
        "weights.safetensors": b"weights",
        "model.onnx": ONNX,
        "model.int8.onnx": b"\x08\x09 another",
        **golden().members(),
    }
    contents.update(changes)
    return {name: data for name, data in contents.items() if data is not None}


def packed(manifest: bytes, contents: dict[str, bytes]) -> bytes:
    """A sealed archive around any manifest: what a hostile or a newer writer could make."""
    return b"".join(container._pack({"manifest.json": manifest, **contents}))


def manifest_json(contents: dict[str, bytes], **changes: Any) -> bytes:
    """The manifest that belongs to ``contents``, then changed at the top level."""
    table = {
        name: container.Member(len(data), container.hashlib.sha256(data).hexdigest())
        for name, data in contents.items()
    }
    return json.dumps(json.loads(to_json(replace(MANIFEST, members=table))) | changes).encode()


@pytest.fixture(scope="module")
def engine_bytes(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("engine") / "small.engine"
    return write_engine(path, MANIFEST, members()).read_bytes()


@pytest.fixture
def refused(tmp_path: Path) -> Callable[[bytes], str]:
    """Writes bytes, expects ``read_engine`` to refuse them and gives its message."""

    def read(data: bytes) -> str:
        path = tmp_path / "x.engine"
        path.write_bytes(data)
        with pytest.raises(EngineError) as caught:
            read_engine(path)
        assert str(path) in str(caught.value)
        return str(caught.value)

    return read


def test_reads_back_what_was_written(tmp_path: Path) -> None:
    path = tmp_path / "x.engine"
    assert write_engine(str(path), MANIFEST, members()) == path
    with read_engine(path) as engine:
        assert {name: engine.member(name) for name in engine.manifest.members} == members()
        assert replace(engine.manifest, members={}) == MANIFEST
        for name, array in vars(golden()).items():
            np.testing.assert_array_equal(getattr(engine.golden(), name), array, strict=True)


def test_equal_arguments_give_equal_bytes(tmp_path: Path) -> None:
    one = write_engine(tmp_path / "1.engine", MANIFEST, members())
    shuffled = dict(reversed(members().items()))
    two = write_engine(tmp_path / "2.engine", MANIFEST, shuffled)
    assert one.read_bytes() == two.read_bytes()


def test_any_zip_tool_lists_and_tests_it(engine_bytes: bytes) -> None:
    with zipfile.ZipFile(io.BytesIO(engine_bytes)) as archive:
        assert archive.testzip() is None
        assert archive.namelist() == ["manifest.json", *sorted(members())]
        assert {info.compress_type for info in archive.infolist()} == {zipfile.ZIP_STORED}
        assert archive.read("model.onnx") == ONNX


def test_another_suffix_is_no_obstacle(tmp_path: Path, engine_bytes: bytes) -> None:
    path = tmp_path / "renamed.zip"
    path.write_bytes(engine_bytes)
    with read_engine(path) as engine:
        assert engine.member("model.onnx") == ONNX


def test_optional_weights_may_be_left_out(tmp_path: Path) -> None:
    path = write_engine(tmp_path / "x.engine", MANIFEST, members({"weights.safetensors": None}))
    with read_engine(path) as engine:
        assert "weights.safetensors" not in engine.manifest.members
        with pytest.raises(InputError, match=r"expected one of .*model\.onnx.*got 'weights"):
            engine.member("weights.safetensors")


def test_members_outlive_the_file_and_closing_is_final(tmp_path: Path) -> None:
    engine = read_engine(write_engine(tmp_path / "x.engine", MANIFEST, members()))
    arrays, model = engine.golden(), engine.member("model.onnx")
    engine.close()
    engine.close()
    assert model == ONNX and arrays.images.shape == (2, H, W, 3)
    with pytest.raises(InputError, match="is closed"):
        engine.golden()


def test_notices_an_overwrite_while_open(tmp_path: Path) -> None:
    path = write_engine(tmp_path / "x.engine", MANIFEST, members())
    with read_engine(path) as engine:
        path.write_bytes(path.read_bytes() + b"more")
        with pytest.raises(EngineError, match="overwritten while open"):
            engine.member("model.onnx")


def test_notices_a_cut_while_open(tmp_path: Path) -> None:
    contents = members({"model.onnx": bytes(10**5)})  # more than a file object buffers
    path = write_engine(tmp_path / "x.engine", MANIFEST, contents)
    with read_engine(path) as engine:
        os.truncate(path, 10**5)
        with pytest.raises(EngineError, match="ends after 100000 bytes, 1"):
            engine.member("model.onnx")


def test_keeps_serving_the_old_file_while_it_is_replaced(tmp_path: Path) -> None:
    path = write_engine(tmp_path / "x.engine", MANIFEST, members())
    with read_engine(path) as engine:
        write_engine(path, MANIFEST, members({"model.onnx": b"new"}))
        assert engine.member("model.onnx") == ONNX


# Damage


@pytest.mark.parametrize("bit", range(8))
def test_refuses_every_flipped_bit(tmp_path: Path, engine_bytes: bytes, bit: int) -> None:
    path = tmp_path / "x.engine"
    path.write_bytes(engine_bytes)
    accepted = []
    with path.open("r+b", buffering=0) as file:
        for at, byte in enumerate(engine_bytes):
            file.seek(at)
            file.write(bytes([byte ^ 1 << bit]))
            try:
                read_engine(path).close()
                accepted.append(at)
            except EngineError:
                pass
            file.seek(at)
            file.write(bytes([byte]))
    assert accepted == []
    read_engine(path).close()  # every byte is restored, so nothing above was refused for another


def test_refuses_every_truncation(tmp_path: Path, engine_bytes: bytes) -> None:
    path = tmp_path / "x.engine"
    path.write_bytes(engine_bytes)
    accepted = []
    for size in reversed(range(len(engine_bytes))):
        os.truncate(path, size)
        try:
            read_engine(path).close()
            accepted.append(size)
        except EngineError:
            pass
    assert accepted == []


@pytest.mark.parametrize("garbage", [b"\0", b"PK", b"PK\x05\x06", b"\n", bytes(70_000)])
@pytest.mark.parametrize("leading", [True, False])
def test_refuses_added_bytes(
    refused: Callable[[bytes], str], engine_bytes: bytes, garbage: bytes, leading: bool
) -> None:
    refused(garbage + engine_bytes if leading else engine_bytes + garbage)


def test_refuses_two_engines_in_one_file(
    refused: Callable[[bytes], str], engine_bytes: bytes
) -> None:
    assert "damaged" in refused(engine_bytes + engine_bytes)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_random_mutations_raise_engine_errors_only(
    tmp_path_factory: pytest.TempPathFactory, engine_bytes: bytes, data: st.DataObject
) -> None:
    start = data.draw(st.integers(0, len(engine_bytes)))
    end = data.draw(st.integers(start, min(len(engine_bytes), start + 300)))
    new = data.draw(st.binary(max_size=300) | st.just(engine_bytes[end:start:-1]))
    mutated = engine_bytes[:start] + new + engine_bytes[end:]
    path = tmp_path_factory.getbasetemp() / "mutated.engine"
    path.write_bytes(mutated)
    if mutated == engine_bytes:
        read_engine(path).close()
    else:
        with pytest.raises(EngineError):
            read_engine(path)


@settings(max_examples=100, deadline=None)
@given(
    manifest=st.binary(max_size=200)
    | st.recursive(
        st.none() | st.integers() | st.text(), lambda inner: st.dictionaries(st.text(), inner)
    ).map(lambda value: json.dumps(value).encode())
)
def test_sealed_nonsense_raises_engine_errors_only(
    tmp_path_factory: pytest.TempPathFactory, manifest: bytes
) -> None:
    path = tmp_path_factory.getbasetemp() / "nonsense.engine"
    path.write_bytes(packed(manifest, members()))
    with pytest.raises(EngineError):
        read_engine(path)


# Something else


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "an empty file"),
        (b"image size: 256\n", "a text file"),
        (ONNX, "an ONNX graph"),
        (b"\x80\x04\x95", "a pickle"),
        (b"\x89PNG\r\n\x1a\n", "a PNG image"),
        (bytes(100), "something else"),
        (b"PK\x03\x04", "cut short"),
    ],
    ids=["empty", "text", "onnx", "pickle", "image", "zeros", "magic only"],
)
def test_names_what_came_instead(
    refused: Callable[[bytes], str], data: bytes, message: str
) -> None:
    assert message in refused(data)


def rezipped(data: bytes, compression: int, comment: bytes = b"") -> bytes:
    """What unpacking and zipping again makes of an engine."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(out, "w", compression) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
        new.comment = comment
    return out.getvalue()


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_says_when_an_engine_was_zipped_again(
    refused: Callable[[bytes], str], engine_bytes: bytes, compression: int
) -> None:
    assert "unpacked and zipped again" in refused(rezipped(engine_bytes, compression))


def test_says_when_members_are_compressed(
    refused: Callable[[bytes], str], engine_bytes: bytes
) -> None:
    # tools that update an archive in place keep its comment
    comment = engine_bytes[engine_bytes.rindex(container._SEAL) :]
    message = refused(rezipped(engine_bytes, zipfile.ZIP_DEFLATED, comment))
    assert "'manifest.json' is compressed: the engine was unpacked and zipped again" in message


def test_names_another_zip_archive(refused: Callable[[bytes], str]) -> None:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80")
    assert "another ZIP archive" in refused(out.getvalue())


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r"none\.engine: there is no such file; check the path"):
        read_engine(tmp_path / "none.engine")


def test_folder(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="expected an engine file, got a folder"):
        read_engine(tmp_path)


def test_pipe_does_not_hang(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "x.engine")
    with pytest.raises(EngineError, match="a device or a pipe"):
        read_engine(tmp_path / "x.engine")


def test_path_through_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(EngineError, match=r"cannot be opened: Not a directory"):
        read_engine(tmp_path / "file" / "x.engine")


@pytest.mark.parametrize("path", [b"x.engine", 3, None, "a\0b"])
def test_not_a_path(path: Any) -> None:
    with pytest.raises(InputError, match="path: "):
        read_engine(path)


def test_sparse_giant_is_refused_at_once(tmp_path: Path, engine_bytes: bytes) -> None:
    path = tmp_path / "x.engine"
    path.write_bytes(engine_bytes)
    os.truncate(path, container.MAX_FILE_BYTES + 1)
    with pytest.raises(EngineError, match="has 4294967296 bytes, an engine has at most"):
        read_engine(path)


def test_failing_storage_is_an_engine_error(
    tmp_path: Path, engine_bytes: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x.engine"
    path.write_bytes(engine_bytes)

    class Failing(io.BufferedReader):
        def read(self, size: int | None = -1, /) -> bytes:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    opened: list[Failing] = []

    def fail(self: Path, mode: str) -> Failing:
        opened.append(Failing(io.FileIO(self)))
        return opened[-1]

    monkeypatch.setattr(Path, "open", fail)
    with pytest.raises(EngineError, match="cannot be read: Input/output error"):
        read_engine(path)
    assert opened[0].closed


# Sealed and wrong: what only a hostile or another writer makes


def test_newer_format_is_named_before_its_unknown_fields(refused: Callable[[bytes], str]) -> None:
    contents = members()
    newer = manifest_json(contents, format_version=2, novelty={"a": 1})
    message = refused(packed(newer, contents))
    assert "written by a newer fastad (format 2, this is 1): upgrade fastad" in message


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format_version": 0}, "format 0 is not read any more"),
        ({"format_version": "new"}, "states no format_version"),
        ({"novelty": 1}, "novelty"),
        ({"spec": {}}, r"spec\.method"),
        ({"variants": []}, "no variants"),
        ({"variants": [{"member": "b.onnx", "precision": "", "parity": []}]}, r"no b\.onnx"),
        ({"members": {}}, "not those that the manifest lists"),
        ({"members": {"model.onnx": {"size": 10, "sha256": ""}}}, "not those that the manifest"),
    ],
    ids=[
        "format 0", "format text", "extra field", "empty spec", "no variants", "variant missing",
        "no members", "few members",
    ],
)  # fmt: skip
def test_sealed_manifest_is_still_checked(
    refused: Callable[[bytes], str], changes: dict[str, Any], message: str
) -> None:
    contents = members()
    text = refused(packed(manifest_json(contents, **changes), contents))
    assert container.re.search(message, text)


def test_refuses_a_member_beyond_the_manifest(refused: Callable[[bytes], str]) -> None:
    contents = members()
    message = refused(packed(manifest_json(contents), contents | {"more": b"1"}))
    assert "not those that the manifest lists" in message


def test_refuses_a_member_with_another_digest(refused: Callable[[bytes], str]) -> None:
    other = members({"model.onnx": bytes(len(ONNX))})
    assert "model.onnx is not what the manifest says" in refused(
        packed(manifest_json(members()), other)
    )


@pytest.mark.parametrize("name", ["model.onnx", container.IMAGES])
def test_refuses_an_engine_without_a_required_member(
    refused: Callable[[bytes], str], name: str
) -> None:
    contents = members({name: None})
    assert f"has no {name}" in refused(packed(manifest_json(contents), contents))


UNSAFE = ["../x", "/x", "a/../x", "C:x", "a\\x", ".x", "a//x", "x/", "x\n", "", "n" * 129, "naïve"]


@pytest.mark.parametrize("name", UNSAFE)
def test_refuses_unsafe_names_when_reading(refused: Callable[[bytes], str], name: str) -> None:
    entry = container._Entry("x" * len(name.encode()), 0, 1, 0)
    contents = members()
    data = packed(manifest_json(contents), contents | {entry.name: b"1"})
    data = data.replace(entry.local()[30:] + b"1", name.encode() + b"1")
    raw = resealed(data, lambda directory: directory[: -len(entry.name) or None] + name.encode())
    assert "is no member name" in refused(raw)


def resealed(data: bytes, change: Callable[[bytes], bytes]) -> bytes:
    """An archive whose central directory was changed, with a seal that fits it."""
    tail = len(data) - container._TAIL_BYTES
    count, size, offset = container._END.unpack_from(data, tail)[4:7]
    directory = change(data[offset : offset + size])
    _, _, *_, manifest_size = container._CENTRAL.unpack_from(data, offset)[:10]
    start = container._LOCAL.size + len("manifest.json")
    manifest = data[start : start + manifest_size]
    return data[:offset] + directory + container._end(count, directory, offset, manifest)


@pytest.mark.parametrize(
    ("at", "value", "message"),
    [
        (8, 1, "'manifest.json' is encrypted"),
        (10, 8, "'manifest.json' is compressed"),
        (12, 1, "not as fastad writes it"),  # time
        (27, 0xFF, "manifest.json has 42"),  # top byte of the size: declares 4 GB
        (30, 1, "not as fastad writes it"),  # extra field
        (42, 1, "not as fastad writes it"),  # offset
    ],
    ids=["encrypted", "compressed", "time", "declared size", "extra field", "offset"],
)
def test_refuses_directories_it_would_not_write(
    refused: Callable[[bytes], str], engine_bytes: bytes, at: int, value: int, message: str
) -> None:
    def change(directory: bytes) -> bytes:
        return directory[:at] + bytes([value]) + directory[at + 1 :]

    assert message in refused(resealed(engine_bytes, change))


def test_refuses_too_many_members(refused: Callable[[bytes], str]) -> None:
    many = {f"extra{i}": b"1" for i in range(container.MAX_MEMBERS + 1)}
    assert "66 members, an engine has at most 64" in refused(packed(manifest_json(many), many))


def test_refuses_a_name_twice(refused: Callable[[bytes], str]) -> None:
    contents = members() | {"twin_a": b"1", "twin_b": b"1"}
    data = packed(manifest_json(contents), contents).replace(b"twin_b", b"twin_a")
    assert "no name twice" in refused(resealed(data, bytes))


def test_refuses_an_engine_that_does_not_start_with_its_manifest(
    refused: Callable[[bytes], str],
) -> None:
    contents = members()
    data = b"".join(container._pack({"model.onnx": ONNX, "manifest.json": manifest_json(contents)}))
    assert "expected manifest.json first" in refused(data)


# Golden arrays


def npy(array: np.ndarray[Any, Any], **settings: Any) -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array(file, array, **settings)
    return file.getvalue()


BROKEN_GOLDEN = [
    (container.IMAGES, npy(np.zeros((2, H, W, 3), np.int8)), r"expected \|u1 .*got \|i1"),
    (container.IMAGES, npy(np.zeros((2, W, H, 3), np.uint8)), r"\[N, 3, 2, 3\], got .*2, 2, 3, 3"),
    (container.IMAGES, npy(np.zeros((0, H, W, 3), np.uint8)), "takes 0 bytes"),
    (container.IMAGES, npy(np.zeros((3, H, W, 3), np.uint8)), r"anomaly_map.npy: expected .*\[3"),
    (container.IMAGES, npy(np.array(None), version=(1, 0)), r"got \|O \[\]"),
    (container.IMAGES, golden().members()[container.IMAGES][:-1], "takes 36 bytes, found 35"),
    (container.IMAGES, b"\x93NUMPY", "plain array"),
    (container.IMAGES, npy(np.zeros((2, H, W, 3), np.uint8), version=(2, 0)), "format 1.0"),
    (container.MAPS, npy(np.zeros((2, H, W), np.float64)), "expected <f4 .*got <f8"),
    (container.MAPS, npy(np.full((2, H, W), np.nan, np.float32)), "finite"),
    (container.MAPS, npy(np.asfortranarray(np.zeros((2, H, W), np.float32))), "plain array"),
    (container.SCORES, npy(np.zeros((2, 1), np.float32)), r"\[2\], got <f4 \[2, 1\]"),
    (container.SCORES, npy(np.zeros(1, np.float32)), r"\[2\], got <f4 \[1\]"),
    (
        container.SCORES,
        npy(np.zeros(2, np.float32)).replace(b"(2,)", b"(" + b"9" * 20 + b",)"),
        r"expected <f4 \[2\]|plain array",
    ),
]
GOLDEN_IDS = [
    "dtype", "H and W swapped", "no images", "N differs", "object", "cut", "header cut",
    "version 2", "float64", "nan", "fortran", "rank", "few scores", "giant header",
]  # fmt: skip


@pytest.mark.parametrize(("name", "data", "message"), BROKEN_GOLDEN, ids=GOLDEN_IDS)
def test_refuses_broken_golden_arrays_when_reading(
    tmp_path: Path, name: str, data: bytes, message: str
) -> None:
    contents = members({name: data})
    path = tmp_path / "x.engine"
    path.write_bytes(packed(manifest_json(contents), contents))
    with read_engine(path) as engine, pytest.raises(EngineError, match=message):
        engine.golden()


@pytest.mark.parametrize(("name", "data", "message"), BROKEN_GOLDEN, ids=GOLDEN_IDS)
def test_refuses_broken_golden_arrays_when_writing(
    tmp_path: Path, name: str, data: bytes, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        write_engine(tmp_path / "x.engine", MANIFEST, members({name: data}))
    assert list(tmp_path.iterdir()) == []


@settings(max_examples=200, deadline=None)
@given(header=st.binary(max_size=120), body=st.binary(max_size=40))
def test_random_npy_headers_raise_engine_errors_only(header: bytes, body: bytes) -> None:
    data = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + body
    with pytest.raises(EngineError):
        container._from_npy("x", data, "|u1", (0, H, W, 3))


# Writing


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model.onnx": None}, "expected model.onnx, got weights"),
        ({"model.int8.onnx": None}, "expected model.int8.onnx, got"),
        ({container.SCORES: None}, "expected golden/raw_score.npy"),
        ({"model.onnx": b""}, "model.onnx: expected 1 to .* got bytes of 0"),
        ({"model.onnx": bytearray(b"x")}, "got bytearray of 1"),
        ({"manifest.json": b"{}"}, "'manifest.json' is reserved"),
        ({f"n{i}": b"1" for i in range(60)}, "at most 64, got 66"),
    ],
    ids=["no model", "no variant", "no golden", "empty", "bytearray", "manifest", "many"],
)
def test_refuses_members_that_make_no_engine(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        write_engine(tmp_path / "x.engine", MANIFEST, members(changes))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", UNSAFE)
def test_refuses_unsafe_names_when_writing(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match="is reserved or unsafe"):
        write_engine(tmp_path / "x.engine", MANIFEST, members() | {name: b"1"})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"variants": ()}, "expected variants in its manifest"),
        ({"format_version": 2}, "format_version is 2, this fastad writes 1"),
        ({"spec": replace(MANIFEST.spec, config={"a": float("nan")})}, "nan; use finite numbers"),
        ({"spec": replace(MANIFEST.spec, input=INFINITE)}, "inf; use finite numbers"),
        ({"spec": replace(MANIFEST.spec, config={"a": object()})}, "use .* plain values"),
        ({"spec": replace(MANIFEST.spec, categories=("\ud800",))}, "does not read back"),
        ({"provenance": {"a": "x" * 2**22}}, "at most 4194304 bytes of JSON"),
    ],
    ids=["no variants", "format", "nan", "infinity", "object", "lone surrogate", "giant"],
)
def test_refuses_a_manifest_that_would_not_read_back(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        write_engine(tmp_path / "x.engine", replace(MANIFEST, **changes), members())
    assert list(tmp_path.iterdir()) == []


def test_refuses_more_than_a_zip_archive_holds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    room = sum(map(len, members().values())) - 1
    monkeypatch.setattr(container, "MAX_FILE_BYTES", room + container.MAX_MANIFEST_BYTES + 2**16)
    with pytest.raises(InputError, match=f"at most {room} fit; leave out weights"):
        write_engine(tmp_path / "x.engine", MANIFEST, members())


def test_refuses_a_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no does not exist; create it first"):
        write_engine(tmp_path / "no" / "x.engine", MANIFEST, members())


def test_refuses_to_replace_a_folder(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="got a folder"):
        write_engine(tmp_path, MANIFEST, members())


class HalfFull(io.FileIO):
    """A file on a disk that fills up after 100 bytes."""

    def write(self, data: Any, /) -> int:
        if self.tell() + len(data) > 100:
            super().write(data[: max(0, 100 - self.tell())])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return super().write(data) or 0


@pytest.mark.parametrize("exists", [True, False])
def test_full_disk_leaves_the_old_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exists: bool
) -> None:
    path = tmp_path / "x.engine"
    if exists:
        path.write_bytes(b"old")
    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", lambda self, mode: HalfFull(self, mode.replace("b", "")))
        with pytest.raises(EngineError, match=r"x.engine: cannot be written \(No space left .*MB"):
            write_engine(path, MANIFEST, members())
    assert [p.read_bytes() for p in tmp_path.iterdir()] == [b"old"] * exists


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, MemoryError])
@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_interruption_leaves_the_old_file_and_passes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, error: type[BaseException]
) -> None:
    path = tmp_path / "x.engine"
    path.write_bytes(b"old")

    def interrupt(*_: object) -> None:
        assert len(list(tmp_path.iterdir())) == 2  # the partial file is there to be removed
        raise error

    monkeypatch.setattr(*((os, "fsync") if step == "fsync" else (Path, "replace")), interrupt)
    with pytest.raises(error):
        write_engine(path, MANIFEST, members())
    assert [p.read_bytes() for p in tmp_path.iterdir()] == [b"old"]


def test_a_link_stays_and_its_target_is_replaced(tmp_path: Path) -> None:
    target, link = tmp_path / "v1.engine", tmp_path / "current.engine"
    target.write_bytes(b"old")
    link.symlink_to(target.name)
    write_engine(link, MANIFEST, members())
    assert link.is_symlink()
    with read_engine(target) as engine:
        assert engine.member("model.onnx") == members()["model.onnx"]


def test_real_file_size_limit_leaves_nothing(tmp_path: Path) -> None:
    code = (
        "import resource, sys; from tests.test_container import *\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (500, 500))\n"
        "try: write_engine(sys.argv[1], MANIFEST, members())\n"
        "except EngineError as error: print(error)\n"
    )
    path = tmp_path / "x.engine"
    root = Path(__file__).parents[1]
    ran = subprocess.run(
        [sys.executable, "-c", code, str(path)], cwd=root, capture_output=True, text=True
    )
    assert f"{path}: cannot be written (File too large" in ran.stdout, ran.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def foreign_folder() -> Iterator[Path]:
    """A folder that this process may enter and not write; root becomes nobody meanwhile."""
    root = os.geteuid() == 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "locked").mkdir(mode=0o700 if root else 0o000)
        folder.chmod(0o555)
        if root:
            os.seteuid(65534)
        try:
            yield folder
        finally:
            if root:
                os.seteuid(0)
            folder.chmod(0o700)


def test_folder_without_write_permission(foreign_folder: Path) -> None:
    with pytest.raises(
        EngineError, match=r"x\.engine: cannot be written \(Permission denied\).*noth"
    ):
        write_engine(foreign_folder / "x.engine", MANIFEST, members())
    assert [path.name for path in foreign_folder.iterdir()] == ["locked"]


def test_folder_without_search_permission(foreign_folder: Path) -> None:
    path = foreign_folder / "locked" / "x.engine"
    with pytest.raises(EngineError, match=r"x\.engine: cannot be (reached: |written \()Permission"):
        write_engine(path, MANIFEST, members())
    with pytest.raises(EngineError, match=r"x\.engine: cannot be opened: Permission denied"):
        read_engine(path)


def test_name_that_is_too_long(tmp_path: Path) -> None:
    path = tmp_path / ("x" * 300)
    with pytest.raises(EngineError, match=r"cannot be .*: File name too long"):
        write_engine(path, MANIFEST, members())
    with pytest.raises(EngineError, match="cannot be opened: File name too long"):
        read_engine(path)
    assert list(tmp_path.iterdir()) == []


def test_file_gets_the_usual_permissions(tmp_path: Path) -> None:
    old = os.umask(0o022)
    try:
        path = write_engine(tmp_path / "x.engine", MANIFEST, members())
    finally:
        os.umask(old)
    assert path.stat().st_mode & 0o777 == 0o644
