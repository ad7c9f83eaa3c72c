"""Saved files come back exactly, or not at all."""

import json
import math
import os
import re
import stat

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from hbmeta import files
from hbmeta.errors import DataError, FileError
from hbmeta.files import atomic, read_tensors, write_tensors, write_text

HEADER = {
    "strategy": "MAML",
    "settings": {"steps": 5, "step_size": 0.1, "first_order": False, "note": None},
    "ids": ["sin-07", 3, "θ"],
    "tiny": 5e-324,
    "big": 2**80,
}


def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "bool": torch.tensor([[True, False], [False, False]]),
        "int64": torch.tensor([-(2**63), 2**63 - 1, 0]),
        "float32": torch.randn(3, 1, 4, generator=generator),
        "float64": torch.randn(5, dtype=torch.float64, generator=generator),
        "float16": torch.randn(5, generator=generator).half(),
        "bfloat16": torch.randn(5, generator=generator).bfloat16(),
        "non-finite": torch.tensor([math.nan, math.inf, -math.inf, -0.0]),
        "scalar": torch.tensor(1.5),
        "empty": torch.zeros(0, 3),
        "φ.0": torch.ones(1),
    }


def assert_same(found, expected):
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert found[name].shape == tensor.shape
        # as bytes: NaN equals NaN, and −0 differs from 0
        flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
        assert torch.equal(found[name].reshape(-1).view(torch.uint8), flat)


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "fit.safetensors"
    write_tensors(path, {"θ": torch.arange(4.0), "mask": torch.tensor([True])}, {"steps": [1, 2]})
    return path


def rewrite(path, **changes):
    """Write the file again with other metadata; None removes an entry."""
    with safe_open(path, framework="pt") as opened:
        content = {name: opened.get_tensor(name).clone() for name in opened.keys()}  # noqa: SIM118
        metadata = opened.metadata() | changes
    kept = {key: value for key, value in metadata.items() if value is not None}
    save_file(content, path, metadata=kept or None)


# What comes back


def test_round_trip_is_exact(tmp_path):
    path = tmp_path / "fit.safetensors"
    write_tensors(path, tensors(), HEADER)
    found, header = read_tensors(path)
    assert_same(found, tensors())
    assert header == HEADER
    assert type(header["settings"]["steps"]) is int
    assert type(header["settings"]["first_order"]) is bool


def test_nothing_to_store_is_a_file_too(tmp_path):
    write_tensors(tmp_path / "fit", {}, {})
    assert read_tensors(tmp_path / "fit") == ({}, {})


def test_views_shared_memory_and_gradients(tmp_path):
    base = torch.arange(12.0).reshape(3, 4)
    views = {
        "base": base,
        "same": base,
        "transposed": base.T,
        "column": base[:, 1],
        "expanded": base[:1].expand(5, 4),
        "parameter": torch.nn.Parameter(base),
        "negated": torch.complex(base, base).conj().imag,
    }
    expected = {name: tensor.detach().resolve_neg().clone() for name, tensor in views.items()}
    write_tensors(tmp_path / "fit", views, {})
    found, _ = read_tensors(tmp_path / "fit")
    assert_same(found, expected)
    assert not any(tensor.requires_grad for tensor in found.values())
    found["base"].zero_()
    assert torch.equal(found["same"], base)


def test_what_was_read_does_not_hang_on_the_file(saved):
    found, _ = read_tensors(saved)
    found["θ"].add_(1.0)
    with saved.open("rb+") as stream:
        stream.truncate(10)
    assert found["θ"].tolist() == [1.0, 2.0, 3.0, 4.0]


def test_the_file_is_plain_safetensors(saved):
    with safe_open(saved, framework="pt") as opened:
        metadata = opened.metadata()
        assert set(opened.keys()) == {"θ", "mask"}
    assert metadata["format"] == "hbmeta"
    assert metadata["version"] == "1"
    assert json.loads(metadata["header"]) == {"steps": [1, 2]}


def test_the_order_of_the_tensors_does_not_matter(tmp_path):
    metadata = []
    for reverse in (False, True):
        write_tensors(tmp_path / "fit", dict(sorted(tensors().items(), reverse=reverse)), HEADER)
        with safe_open(tmp_path / "fit", framework="pt") as opened:
            metadata.append(opened.metadata())
    assert metadata[0] == metadata[1]


# What is refused on reading


def refused(path, *words):
    with pytest.raises(FileError) as caught:
        read_tensors(path)
    for word in (str(path), *words):
        assert word in str(caught.value)


def test_missing(tmp_path):
    refused(tmp_path / "none", "no such file")


def test_folder(tmp_path):
    refused(tmp_path, "a folder")


@pytest.mark.parametrize("content", [b"", b"{}", b"PK\x03\x04" * 50, b"\x80\x04.", b"\0" * 64])
def test_another_kind_of_file(tmp_path, content):
    path = tmp_path / "fit"
    path.write_bytes(content)
    refused(path)


def test_truncated_at_every_length(saved):
    content = saved.read_bytes()
    for length in range(len(content)):
        saved.write_bytes(content[:length])
        refused(saved, "damaged")


def test_longer_than_it_was(saved):
    saved.write_bytes(saved.read_bytes() + b"\0")
    refused(saved, "damaged")


@pytest.mark.parametrize("flip", [0x01, 0x02, 0x20, 0x80, 0xFF])
def test_any_flipped_byte(saved, flip):
    content = saved.read_bytes()
    for position in range(len(content)):
        damaged = bytearray(content)
        damaged[position] ^= flip
        saved.write_bytes(damaged)
        refused(saved)


def test_safetensors_of_another_program(tmp_path):
    save_file({"x": torch.ones(2)}, tmp_path / "none")
    refused(tmp_path / "none", "another program")
    save_file({"x": torch.ones(2)}, tmp_path / "other", metadata={"format": "pt"})
    refused(tmp_path / "other", "another program")


def test_newer_version(saved):
    rewrite(saved, version=str(files.VERSION + 1), header=None, sha256=None)
    refused(saved, "newer", "Upgrade hbmeta")


@pytest.mark.parametrize("version", [None, "", "0", "-1", "1.0", "one", " 1", "١", "9" * 5000])
def test_version_that_is_none(saved, version):
    rewrite(saved, version=version)
    refused(saved, "damaged", "version")


@pytest.mark.parametrize(
    "header",
    [
        None,
        "",
        "{",
        "[]",
        "null",
        '{"a": NaN}',
        '{"a": [-Infinity]}',
        '{"a": 1e999}',
        '{"a": ' + "9" * 5000 + "}",
        "[" * 100_000,
    ],
)
def test_corrupt_header(saved, header):
    rewrite(saved, header=header)
    refused(saved, "damaged")


@pytest.mark.parametrize("checksum", [None, "", "0" * 64])
def test_wrong_checksum(saved, checksum):
    rewrite(saved, sha256=checksum)
    refused(saved, "checksum")


# What is refused on writing


@pytest.mark.parametrize(
    "header",
    [
        {"a": math.nan},
        {"a": [math.inf]},
        {"a": torch.ones(1)},
        {"a": {1, 2}},
        {(1, 2): 3},
        {"a": "x" * (files._LONGEST_HEADER + 1)},
    ],
)
def test_header_that_json_cannot_hold(tmp_path, header):
    with pytest.raises(DataError, match="header"):
        write_tensors(tmp_path / "fit", {}, header)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("complex", torch.ones(2, dtype=torch.complex64)),
        ("sparse", torch.eye(2).to_sparse()),
        ("list", [1.0, 2.0]),
        ("__metadata__", torch.ones(2)),
    ],
)
def test_tensor_that_cannot_be_stored(tmp_path, name, value):
    with pytest.raises(DataError, match=name):
        write_tensors(tmp_path / "fit", {name: value}, {})
    assert os.listdir(tmp_path) == []


# Atomic writing


def test_writing_leaves_one_file_with_ordinary_permissions(saved):
    assert os.listdir(saved.parent) == [saved.name]
    plain = saved.parent / "plain"
    plain.write_text("")
    assert stat.S_IMODE(saved.stat().st_mode) == stat.S_IMODE(plain.stat().st_mode)


def test_text_is_utf8_with_unix_line_ends(tmp_path):
    path = tmp_path / "new" / "folder" / "note.md"
    write_text(path, "φ\n−1\n")
    assert path.read_bytes() == "φ\n−1\n".encode()
    write_text(str(path), "")
    assert path.read_bytes() == b""
    assert os.listdir(path.parent) == ["note.md"]


def test_the_temporary_path_is_a_neighbour_with_the_same_suffix(tmp_path):
    with atomic(tmp_path / "figure.png") as temporary:
        assert temporary.parent == tmp_path.resolve()
        assert temporary.suffix == ".png"
        temporary.write_bytes(b"1")
        assert not (tmp_path / "figure.png").exists()
    assert (tmp_path / "figure.png").read_bytes() == b"1"


@pytest.mark.parametrize("failure", [ValueError("no"), KeyboardInterrupt()])
def test_a_failure_keeps_the_old_file(tmp_path, failure):
    path = tmp_path / "note"
    path.write_text("old")

    def write_half():
        with atomic(path) as temporary:
            temporary.write_text("half")
            raise failure

    with pytest.raises(type(failure)):
        write_half()
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["note"]


def test_a_failing_rename_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "note"
    path.write_text("old")

    def fail(*_):
        raise OSError("no space left")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(FileError, match="no space left"):
        write_text(path, "new")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["note"]


def test_the_content_reaches_the_disk_before_the_name(tmp_path, monkeypatch):
    calls = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda file: (calls.append("fsync"), fsync(file)))
    monkeypatch.setattr(os, "replace", lambda *paths: (calls.append("replace"), replace(*paths)))
    write_text(tmp_path / "note", "new")
    assert calls == ["fsync", "replace"]


def test_a_link_keeps_pointing_to_the_file(tmp_path):
    (tmp_path / "file").write_text("old")
    (tmp_path / "link").symlink_to("file")
    write_text(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "file").read_text() == "new"


def test_places_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(FileError, match="a folder"):
        write_text(tmp_path, "")
    with pytest.raises(FileError, match="not a regular file"):
        write_text(os.devnull, "")
    with pytest.raises(FileError, match=re.escape(str(tmp_path / "file" / "below"))):
        write_text(tmp_path / "file" / "below", "")
    with pytest.raises(FileError, match="No such file"), atomic(tmp_path / "none"):
        pass  # a writer that wrote nothing
    assert os.listdir(tmp_path) == ["file"]
