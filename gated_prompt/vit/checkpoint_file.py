# SPDX-License-Identifier: Apache-2.0
"""Reads checkpoint files without running any code in them."""

from __future__ import annotations

import argparse
import collections
import errno
import hashlib
import os
import pickletools
import re
import stat
import zipfile
from collections.abc import Callable

import torch
from safetensors.torch import load_file
from torch import Tensor

_MAX_PICKLE = 100 << 20  # bytes; the pickle of a file with 100,000 tensors has about 20 MB
_MAX_FILE = 64 << 30


class CheckpointError(ValueError):
    """A checkpoint can't be read, or does not fit the model. Nothing was changed or run."""


class _Ignored:
    """A placeholder for numpy values of training states, which no backbone needs."""

    def __init__(self, *args):
        pass

    def __setstate__(self, state):
        pass


_STAND_INS = [(argparse.Namespace, "argparse.Namespace")] + [
    (_Ignored, f"numpy.{name}")
    for core in ("core", "_core")
    for name in ("dtype", "ndarray", f"{core}.multiarray.scalar", f"{core}.multiarray._reconstruct")
]
# The names that a pickle may use. They are fewer than torch's weights_only allows: a pickle could
# call torch.Tensor(n) or bytearray(n) to reserve any amount of memory.
_INERT = re.compile(
    "|".join(re.escape(name) for _, name in _STAND_INS)
    + r"|collections\.(OrderedDict|Counter)|_codecs\.encode|(builtins|__builtin__)\.set"
    r"|torch\._utils\._rebuild_(tensor|tensor_v2|parameter)|torch\.nn\.parameter\.Parameter"
    r"|torch\.(Size|device|(bfloat|float|complex|u?int)\d+|bool|serialization\._get_layout)"
    r"|torch\.(B?Float(16)?|Double|Half|Long|Int|Short|Char|Byte|Bool|Complex(Float|Double))Storage"
)


def read_checkpoint(path: str | os.PathLike, *, expect_sha256: str | None = None) -> dict:
    """Reads a torch.save or safetensors file without running anything in it.

    Tensors may be memory-mapped from the file: do not change it while they are in use. A torch.save
    file may contain only tensors, containers, `argparse.Namespace` and numpy values (numpy values
    are loaded as placeholders). The types that it uses and the sizes that it declares are checked
    before it is unpickled.

    Args:
        path: The file. Its content decides the format, except that a name ending in .safetensors
            decides for safetensors.
        expect_sha256: The SHA-256 that the file must have, in hexadecimal. Without it a flipped bit
            inside a tensor goes unnoticed.

    Returns:
        The saved dict, with tensors on the CPU.

    Raises:
        CheckpointError: the file is empty, truncated or not a checkpoint; it uses another type or
            function (the message lists them); it declares a size that it can't contain; it has
            another SHA-256.
        OSError: FileNotFoundError, IsADirectoryError, PermissionError with the path.
    """
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(
            f"read_checkpoint: path must be a str or PathLike, got {type(path).__name__}"
        )
    path = os.fspath(path)
    if expect_sha256 is not None and not re.fullmatch("[0-9a-fA-F]{64}", str(expect_sha256)):
        raise ValueError(
            f"read_checkpoint: expect_sha256 must be 64 hexadecimal digits, got {expect_sha256!r}"
        )
    who = f"read_checkpoint: {path!r}"
    status = os.stat(path)
    if stat.S_ISDIR(status.st_mode):
        raise IsADirectoryError(errno.EISDIR, "Is a directory; a checkpoint is one file", path)
    if not stat.S_ISREG(status.st_mode):
        raise CheckpointError(f"{who} is not a regular file")
    size = status.st_size
    if size == 0:
        raise CheckpointError(f"{who} is empty")
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if size > min(_MAX_FILE, 2 * memory):
        raise CheckpointError(
            f"{who} has {size} bytes; at most {_MAX_FILE} and twice the memory ({memory}) are read"
        )
    with open(path, "rb") as stream:
        head = stream.read(16)
        if expect_sha256 is not None:
            _check_sha256(who, stream, head, expect_sha256.lower())
        if head[8:9] == b"{" or path.endswith(".safetensors"):
            return _read(who, lambda: load_file(path))
        stream.seek(0)
        if is_zip := head.startswith(b"PK\x03\x04"):
            _check_zip(who, path, size)
        elif head.startswith(b"\x80"):  # torch older than 1.6, or a raw pickle
            _check_legacy(who, stream, size)
        else:
            raise CheckpointError(f"{who} is not a checkpoint, starts with {str(head)[1:]}")
    with torch.serialization.safe_globals(_STAND_INS):
        options = {"map_location": "cpu", "weights_only": True, "mmap": is_zip}
        loaded = _read(who, lambda: torch.load(path, **options))
    if not isinstance(loaded, dict):
        raise CheckpointError(f"{who} must hold a dict, got {type(loaded).__name__}")
    for entry in (loaded, *loaded.values()):
        for name, value in entry.items() if isinstance(entry, dict) else ():
            if isinstance(value, Tensor):
                wanted, held = value.numel() * value.element_size(), value.untyped_storage()
                if wanted > held.nbytes():
                    raise CheckpointError(
                        f"{who}: tensor {name!r} {list(value.shape)} declares {wanted} bytes, and "
                        f"the file holds {held.nbytes()} of them"
                    )
    return loaded


def _read(who: str, reader: Callable[[], dict]) -> dict:
    """Returns reader(). Turns any exception into a CheckpointError, as a damaged file can raise
    any."""
    try:
        return reader()
    except Exception as error:
        # cuts off the rest of torch's message, which advises to switch weights_only off
        reason = str(error).split("WeightsUnpickler error:")[-1].strip() or type(error).__name__
        reason = re.split(r"\n|Please use|[^.]*weights_only", reason)[0].strip()
    raise CheckpointError(f"{who} is truncated or damaged: {reason}")


def _check_sha256(who, stream, head, expected):
    digest = hashlib.sha256(head)
    while chunk := stream.read(1 << 20):
        digest.update(chunk)
    if digest.hexdigest() != expected:
        raise CheckpointError(f"{who}: SHA-256 must be {expected}, got {digest.hexdigest()}")


def _check_zip(who, path, size):
    """Checks the directory of a zip file, then its pickle. torch.save compresses nothing, so a
    compressed or overlapping record is a zip bomb."""
    try:
        with zipfile.ZipFile(path) as archive:
            records = archive.infolist()
            names = [record.filename for record in records]
            root = names[0].split("/")[0] if names else ""
            compressed = [r.filename for r in records if r.compress_type != zipfile.ZIP_STORED]
            total = sum(record.file_size for record in records)
            if f"{root}/constants.pkl" in names:
                fault = " is a TorchScript archive, which holds code"
            elif f"{root}/data.pkl" not in names:
                fault = " is a zip archive, not a torch.save file: it has no data.pkl"
            elif compressed:
                fault = f": record {compressed[0]!r} is compressed, which torch.save never writes"
            elif total > size:
                fault = f": its records declare {total} bytes, the file has {size}"
            elif len({name.lower() for name in names}) < len(names):  # torch ignores the case
                fault = ": two of its records have the same name"
            elif archive.getinfo(f"{root}/data.pkl").file_size > _MAX_PICKLE:
                fault = f": its pickle has more than {_MAX_PICKLE} bytes"
            else:
                with archive.open(f"{root}/data.pkl") as stream:
                    return _check_pickle(who, stream, size, ["TUPLE"])
    except CheckpointError:
        raise
    except Exception as error:  # zipfile can raise any on a damaged archive
        fault = f" is truncated or damaged: {error}"
    raise CheckpointError(who + fault)


def _check_legacy(who, stream, size):
    """Checks five pickles in a row: magic number, protocol, system, the object, storage names."""
    storage = ["NONE", "TUPLE"]  # None after the size: once the place of a view's parent
    if _check_pickle(who, stream, size, storage) != [torch.serialization.MAGIC_NUMBER]:
        raise CheckpointError(f"{who} is a raw pickle, not a torch.save file")
    for _ in range(4):
        _check_pickle(who, stream, size, storage)


def _check_pickle(who, stream, size, storage) -> list[int]:
    """Checks the globals that a pickle names and the sizes that it declares, without running it.

    A storage is a persistent id ('storage', type, key, location, elements, ...). The opcodes
    between `elements` and the id must be exactly those in `storage`, so that the number that is
    checked is the number that is used.

    Returns:
        The long integers in the pickle; the magic number of old files is one.
    """
    integer = ("BININT", "BININT1", "BININT2", "LONG1")
    names, longs, strings, elements = set(), [], [], 0
    recent = collections.deque(maxlen=1 + len(storage))
    try:
        for opcode, argument, _ in pickletools.genops(stream):
            code = opcode.name
            if code in ("GLOBAL", "INST"):
                names.add(argument.replace(" ", "."))
            elif code == "STACK_GLOBAL":
                names.add(".".join(strings[-2:]))
            elif code.startswith("EXT"):
                names.add(f"extension {argument}")
            elif code in ("PERSID", "BINPERSID"):
                (first, number), *rest = recent
                if first not in integer or [c for c, _ in rest] != storage or number < 0:
                    raise ValueError("a storage is not named as torch.save does")
                elements = max(elements, number)
            elif code == "LONG1":
                longs.append(argument)
            elif isinstance(argument, str):
                strings.append(argument)
            if "PUT" not in code and code != "MEMOIZE":
                recent.append((code, argument))
    except Exception as error:  # genops can raise any on a damaged pickle
        raise CheckpointError(f"{who} is truncated or damaged: {error}") from None
    if unsafe := sorted(name for name in names if not _INERT.fullmatch(name)):
        raise CheckpointError(
            f"{who} is refused: unpickling it would use {first_names(unsafe)}, which no weights "
            "need"
        )
    if elements > size:
        raise CheckpointError(
            f"{who}: a tensor declares {elements} elements, the file has {size} bytes"
        )
    return longs


def first_names(names) -> str:
    """The first five names, by repr, because names in a file may contain terminal escapes."""
    names = list(names)
    return ", ".join(repr(name) for name in names[:5]) + (", ..." if len(names) > 5 else "")
