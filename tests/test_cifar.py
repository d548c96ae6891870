from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from originals import (
    CIFAR_IMAGES,
    CIFAR_LABELS,
    IDX_IMAGES,
    IDX_LABELS,
    idx,
    old_string,
    pickled_batch,
    save_cifar,
    save_idx,
)

from fastad.errors import InputError
from fastad.training.cifar import ClassSetName, read_class_set


@pytest.mark.parametrize("form", ["python", "binary", "python-archive", "binary-archive"])
def test_cifar_reads_in_every_published_form(tmp_path: Path, form: str) -> None:
    found = read_class_set("cifar10", save_cifar(tmp_path, form))
    assert np.array_equal(found.train.images, CIFAR_IMAGES[:50])
    assert np.array_equal(found.test.images, CIFAR_IMAGES[50:])
    assert np.array_equal(found.train.labels, CIFAR_LABELS[:5].ravel())
    assert np.array_equal(found.test.labels, CIFAR_LABELS[5])


def test_cifar_reads_the_unpacked_folder_itself(tmp_path: Path) -> None:
    save_cifar(tmp_path, "python")
    found = read_class_set("cifar10", tmp_path / "cifar-10-batches-py")
    assert np.array_equal(found.test.images, CIFAR_IMAGES[50:])


@pytest.mark.filterwarnings("ignore:dtype")  # numpy of today on the flags of numpy 1.0
def test_test_batches_are_what_the_publishers_routine_reads() -> None:
    planes = CIFAR_IMAGES[:10].transpose(0, 3, 1, 2).reshape(10, 3072)
    batch = pickle.loads(pickled_batch(planes, CIFAR_LABELS[0]), encoding="bytes")
    assert set(batch) == {b"batch_label", b"labels", b"data", b"filenames"}
    assert np.array_equal(batch[b"data"], planes)
    assert batch[b"labels"] == CIFAR_LABELS[0].tolist()


@pytest.mark.parametrize("is_gz", [True, False], ids=["gz", "plain"])
@pytest.mark.parametrize("name", ["mnist", "fashion-mnist"])
def test_idx_sets_read_packed_and_unpacked(tmp_path: Path, name: ClassSetName, is_gz: bool) -> None:
    found = read_class_set(name, save_idx(tmp_path, is_gz))
    assert np.array_equal(found.train.images, IDX_IMAGES[:20])
    assert np.array_equal(found.test.labels, IDX_LABELS[20:])


class _Attack:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
        return os.mkdir, (str(self.target),)


def test_malicious_pickle_is_refused_and_not_executed(tmp_path: Path) -> None:
    root = save_cifar(tmp_path / "data", "python")
    target = tmp_path / "executed"
    attack = pickle.dumps(_Attack(target), protocol=2)
    (root / "cifar-10-batches-py/data_batch_3").write_bytes(attack)
    with pytest.raises(InputError, match=r"data_batch_3.*mkdir\); nothing in it was executed"):
        read_class_set("cifar10", root)
    assert not target.exists()
    pickle.loads(attack)  # the attack is real: an ordinary reader runs it
    assert target.exists()


@pytest.mark.parametrize(
    "name",
    ["builtins.eval", "numpy.load", "numpy.core.multiarray.fromfile", "_codecs.encode"],
)
def test_pickles_reach_nothing_but_the_three_names_of_the_format(tmp_path: Path, name: str) -> None:
    root = save_cifar(tmp_path, "python")
    module, _, attribute = name.rpartition(".")
    content = b"\x80\x02c" + f"{module}\n{attribute}\n".encode() + b"."
    (root / "cifar-10-batches-py/test_batch").write_bytes(content)
    with pytest.raises(InputError, match=f"asks for {name}"):
        read_class_set("cifar10", root)


PLANES = CIFAR_IMAGES[:10].transpose(0, 3, 1, 2).reshape(10, 3072)
GOOD_BATCH = pickled_batch(PLANES, CIFAR_LABELS[0])
BROKEN_BATCHES = {
    "cut": (GOOD_BATCH[:-3000], "nothing in it was executed"),
    "not a dictionary": (b"\x80\x02].", "dictionary with data and labels"),
    "labels missing": (b"\x80\x02}" + old_string(b"data") + b"Ns.", "dictionary with data"),
    "memory bomb": (b"\x80\x02Nr\xff\xff\xff\x7f.", "under number 2147483647"),
    "data no array": (
        b"\x80\x02}(" + old_string(b"data") + b"N" + old_string(b"labels") + b"]u.",
        "data as an array",
    ),
    "one label less": (pickled_batch(PLANES, CIFAR_LABELS[0][:9]), r"3072 bytes|bytes of pixels"),
    "label 10": (pickled_batch(PLANES, CIFAR_LABELS[0] + 1), "labels 0..9, got 10"),
    "wider pixels": (GOOD_BATCH.replace(old_string(b"u1"), old_string(b"u2")), "uint8"),
}


@pytest.mark.parametrize("case", BROKEN_BATCHES)
def test_broken_python_batches_are_refused(tmp_path: Path, case: str) -> None:
    content, message = BROKEN_BATCHES[case]
    root = save_cifar(tmp_path, "python")
    (root / "cifar-10-batches-py/data_batch_2").write_bytes(content)
    with pytest.raises(InputError, match=message):
        read_class_set("cifar10", root)


@pytest.mark.parametrize("content", [b"\0" * 5000, b"", b"\x0b" + b"\0" * 3072])
def test_broken_binary_batches_are_refused(tmp_path: Path, content: bytes) -> None:
    root = save_cifar(tmp_path, "binary")
    (root / "cifar-10-batches-bin/data_batch_2.bin").write_bytes(content)
    with pytest.raises(InputError, match=r"data_batch_2\.bin: expected (records|labels)"):
        read_class_set("cifar10", root)


def test_truncated_archive_is_refused(tmp_path: Path) -> None:
    archive = save_cifar(tmp_path, "python-archive") / "cifar-10-python.tar.gz"
    archive.write_bytes(archive.read_bytes()[:-9000])
    with pytest.raises(InputError, match=r"cifar-10-python\.tar\.gz: not readable"):
        read_class_set("cifar10", tmp_path)


BROKEN_IDX = {
    "truncated": (idx(IDX_IMAGES[:20])[:-1], "truncated, its header promises"),
    "too long": (idx(IDX_IMAGES[:20]) + b"\0", "too long"),
    "header cut": (idx(IDX_IMAGES[:20])[:9], "within the 16 bytes of its header"),
    "empty": (b"", "opens with nothing"),
    "labels for images": (idx(IDX_LABELS[:20]), "expected an idx file of 3-D"),
    "floats": (b"\0\0\x0d\x03" + idx(IDX_IMAGES[:20])[4:], "opens with 00000d03"),
    "no images": (idx(IDX_IMAGES[:0]), "at least one value"),
    "one image less": (idx(IDX_IMAGES[:19]), "expected 19 labels, one per image, got 20"),
}


@pytest.mark.parametrize("case", BROKEN_IDX)
def test_broken_idx_files_are_refused(tmp_path: Path, case: str) -> None:
    content, message = BROKEN_IDX[case]
    root = save_idx(tmp_path, is_gz=False)
    (root / "train-images-idx3-ubyte").write_bytes(content)
    with pytest.raises(InputError, match=message):
        read_class_set("mnist", root)


def test_truncated_gz_is_refused(tmp_path: Path) -> None:
    file = save_idx(tmp_path) / "train-images-idx3-ubyte.gz"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(InputError, match=r"train-images-idx3-ubyte\.gz: truncated"):
        read_class_set("mnist", tmp_path)


@pytest.mark.parametrize(
    ("name", "place", "source"),
    [
        ("cifar10", "cifar-10-batches-py", r"www\.cs\.toronto\.edu/~kriz/cifar\.html"),
        ("mnist", r"train-images-idx3-ubyte\.gz", r"yann\.lecun\.com/exdb/mnist"),
        ("fashion-mnist", r"t10k-labels-idx1-ubyte\.gz", r"zalandoresearch/fashion-mnist"),
    ],
)
def test_missing_originals_name_place_and_source(
    tmp_path: Path, name: ClassSetName, place: str, source: str
) -> None:
    with pytest.raises(InputError, match=rf"{tmp_path}.*{place}.*{source}"):
        read_class_set(name, tmp_path)


def test_one_missing_batch_is_named(tmp_path: Path) -> None:
    (save_cifar(tmp_path, "python") / "cifar-10-batches-py/data_batch_4").unlink()
    with pytest.raises(InputError, match=r"batches-py: expected data_batch_4 here.*kriz"):
        read_class_set("cifar10", tmp_path)
