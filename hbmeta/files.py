"""Saved files: tensors and a JSON header in one safetensors file, and atomic writing of any file.

A file is written beside its destination and renamed into place, so a reader sees the old file or
the new one and never half of one. Nothing here runs code from a file: no pickle.

The safetensors metadata of a file by `write_tensors` hold

    format    "hbmeta"
    version   the version of this layout, an integer as text
    header    the caller's header as JSON, finite numbers only
    sha256    of the header and of every tensor's name, type, shape and bytes

The checksum is there because safetensors checks only that sizes add up: one flipped bit in a weight
would otherwise be read as a slightly different weight.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import re
import secrets
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from hbmeta.errors import DataError, FileError

__all__ = ["FORMAT", "JSON", "VERSION", "atomic", "read_tensors", "write_tensors", "write_text"]

FORMAT = "hbmeta"
VERSION = 1

JSON: TypeAlias = "bool | int | float | str | Sequence[JSON] | Mapping[str, JSON] | None"

_DTYPES = frozenset(
    {torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64}
    | {torch.float16, torch.bfloat16, torch.float32, torch.float64}
)
# safetensors refuses to read a file whose header, our metadata included, is longer than 100 MB.
_LONGEST_HEADER = 50_000_000


@contextlib.contextmanager
def atomic(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Let a writer that wants a path (netCDF, PNG, ...) write a file all at once or not at all.

    Missing folders are made. A symbolic link keeps pointing to the file that is replaced. When the
    block raises, the file at `path` stays as it was and the temporary file is removed.

    Args:
        path: the file to write or to replace.

    Yields:
        A path in the same folder with the same suffix, where the block has to write one file.

    Raises:
        FileError: `path` is a folder or a device, or the block raised an OSError (no space, no
            permission), or it wrote nothing.

    Example:
        with atomic("results/radon.png") as temporary:
            figure.savefig(temporary)
    """
    destination = Path(os.path.realpath(path))
    if destination.exists() and not destination.is_file():
        found = "a folder" if destination.is_dir() else "something that is not a regular file"
        raise FileError(str(path), needed="the path of a file", found=found, do="Name a file.")
    temporary = destination.with_name(f".{secrets.token_hex(8)}{destination.suffix}")
    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with temporary.open("rb+") as written:
            os.fsync(written.fileno())
        os.replace(temporary, destination)
    except FileError:
        raise
    except OSError as error:
        raise FileError(
            str(path),
            needed="a place to write to",
            found=f"{error}",
            do="Check the folder, its permissions and the free space.",
        ) from error
    finally:
        # After the renaming there is nothing left to remove.
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write `text` as UTF-8 with Unix line ends, atomically.

    Args:
        path: the file to write or to replace; missing folders are made.
        text: what the file will hold.

    Raises:
        FileError: the file cannot be written.
    """
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")


def write_tensors(
    path: str | os.PathLike[str], tensors: Mapping[str, Tensor], header: Mapping[str, JSON]
) -> None:
    """Write tensors and a header to one safetensors file, atomically.

    Args:
        path: the file to write or to replace; missing folders are made.
        tensors: real or Boolean dense tensors by name, of any shape and on any device. They may be
            views and may share memory; each is stored in full and none is changed.
        header: what JSON can hold: text keys, finite numbers, lists; tuples come back as lists.

    Raises:
        DataError: a tensor or the header cannot be stored; nothing was written.
        FileError: the file cannot be written; an older file stays as it was.
    """
    text = _dump(path, header)
    stored = {name: _plain(path, name, tensor) for name, tensor in tensors.items()}
    metadata = {
        "format": FORMAT,
        "version": str(VERSION),
        "header": text,
        "sha256": _checksum(stored, text),
    }
    with atomic(path) as temporary:
        temporary.write_bytes(save(stored, metadata))


def read_tensors(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what `write_tensors` wrote.

    Args:
        path: a file written by `write_tensors`.

    Returns:
        The tensors by name, on the CPU and independent of the file, and the header.

    Raises:
        FileError: the file is missing, is a folder, is truncated or corrupt, is no file of hbmeta,
            or was written by a newer version of it.
    """
    try:
        if not os.path.exists(path):
            raise _unreadable(path, "no such file", "Check the path.")
        if not os.path.isfile(path):
            raise _unreadable(path, "a folder or a device", "Name the file itself.")
        with safe_open(os.fspath(path), framework="pt", device="cpu") as opened:
            text, checksum = _unpack(path, opened.metadata() or {})
            header = _load(text)
            # Windows on the file: summed as the bytes lie there, then copied to outlive it.
            windows = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
            if _checksum(windows, text) != checksum:
                raise ValueError("its contents do not match its checksum")
            tensors = {name: window.clone() for name, window in windows.items()}
    except (OSError, SafetensorError, ValueError, RecursionError) as error:
        if isinstance(error, FileError):
            raise
        raise _unreadable(path, f"a damaged or foreign file ({error})") from error
    return tensors, header


def _unreadable(
    path: str | os.PathLike[str], found: str, do: str = "Copy the file anew, or save it again."
) -> FileError:
    return FileError(os.fspath(path), needed="a file saved by hbmeta", found=found, do=do)


def _unpack(path: str | os.PathLike[str], metadata: Mapping[str, str]) -> tuple[str, str]:
    """The header as text and the checksum, once format and version are known to be ours."""
    if metadata.get("format") != FORMAT:
        found = "a safetensors file of another program"
        raise _unreadable(path, found, "Name a file that hbmeta saved.")
    version = metadata.get("version", "")
    if not re.fullmatch("[1-9][0-9]{0,8}", version):
        raise _unreadable(path, f"a damaged file (version {version!r})")
    if int(version) > VERSION:
        found = f"version {version} of the layout, newer than {VERSION}"
        raise _unreadable(path, found, "Upgrade hbmeta.")
    if "header" not in metadata or "sha256" not in metadata:
        raise _unreadable(path, "a damaged file (no header or no checksum)")
    return metadata["header"], metadata["sha256"]


def _dump(path: str | os.PathLike[str], header: Mapping[str, JSON]) -> str:
    try:
        text = json.dumps(dict(header), allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise DataError(
            os.fspath(path),
            needed="a header that JSON can hold, with finite numbers",
            found=f"{error}",
            do="Store arrays and non-finite numbers as tensors.",
        ) from error
    if len(text) > _LONGEST_HEADER:
        raise DataError(
            os.fspath(path),
            needed=f"a header of at most {_LONGEST_HEADER:,} characters",
            found=f"{len(text):,}",
            do="Store long lists as tensors.",
        )
    return text


def _load(text: str) -> dict[str, Any]:
    header = json.loads(text, parse_float=_finite, parse_constant=_finite)
    if not isinstance(header, dict):
        raise ValueError("the header is not a JSON object")
    return header


def _finite(text: str) -> float:
    number = float(text)  # parses NaN, Infinity and 1e999 too
    if not math.isfinite(number):
        raise ValueError(f"the header holds the non-finite number {text}")
    return number


def _plain(path: str | os.PathLike[str], name: str, tensor: Tensor) -> Tensor:
    """A dense copy on the CPU with memory of its own, which is what safetensors can store."""
    if not isinstance(tensor, Tensor):
        found = f"{name!r} of type {type(tensor).__name__}"
    elif tensor.layout != torch.strided or tensor.dtype not in _DTYPES:
        found = f"{name!r} of type {tensor.dtype} and layout {tensor.layout}"
    elif name == "__metadata__":
        found = "the name '__metadata__', which safetensors keeps for itself"
    else:
        return tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
    raise DataError(
        os.fspath(path),
        needed="dense tensors of Booleans, integers or floating-point numbers",
        found=found,
        do="Convert it to such a tensor, or put it into the header.",
    )


def _checksum(tensors: Mapping[str, Tensor], text: str) -> str:
    digest = hashlib.sha256(text.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(repr((name, str(tensor.dtype), tuple(tensor.shape))).encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
