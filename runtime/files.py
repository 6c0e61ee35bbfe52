"""Files: what comes from others is read as data only, and a kill while writing leaves the old file
or the new one.
"""

import errno
import json
import os
from pathlib import Path
from pickle import UnpicklingError
from textwrap import shorten
from typing import Any

import safetensors.torch
import torch

UNREADABLE = (  # what torch.load raises on garbage, found by fuzzing
    UnpicklingError,
    RuntimeError,
    EOFError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    AssertionError,
    OverflowError,
    OSError,
)

# What file systems answer that cannot fsync a folder: network, FUSE and some overlay ones.
NO_FSYNC_OF_FOLDERS = (
    errno.EINVAL,
    errno.ENOTSUP,
    errno.EOPNOTSUPP,
    errno.ENOSYS,
    errno.EBADF,
    errno.EISDIR,
    errno.EACCES,
    errno.EPERM,
)


def read_torch(file: str | Path, device: str | torch.device = "cpu", mmap: bool = False) -> Any:
    """What torch.save wrote: plain tensors and containers. Nothing in the file is run.

    With mmap the tensors stay on disk until they are used, and the ranks of a machine share the
    memory. Raises ValueError, which names the file, and OSError where there is none.
    """
    open(file, "rb").close()  # a missing file is an OSError of its own
    try:
        return torch.load(str(file), map_location=device, weights_only=True, mmap=mmap)
    except UNREADABLE as error:
        kind = type(error).__name__
        raise ValueError(f"{file}: not a torch file of plain tensors ({kind})") from error


def read_text(path: str | Path) -> str:
    """The text of a UTF-8 file, without the byte order mark that some editors put first.

    Raises ValueError, which names the file, where it is not UTF-8.
    """
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text ({error})") from None


def read_jsonl(path: Path) -> list[dict]:
    """One JSON object per line; an empty list where there is no file.

    A last line without its newline was torn by a kill and is left out. Raises ValueError, which
    names the line, for anything else that is no JSON object.
    """
    if not path.exists():
        return []
    # Not splitlines(): it also cuts at U+2028 and others, which JSON allows inside a string.
    lines = read_text(path).split("\n")
    finished = lines[:-1]
    return [parse_object(line, f"{path}, line {n}") for n, line in enumerate(finished, 1)]


def parse_object(text: str, where: str | Path) -> dict:
    """A JSON object. Raises ValueError, which begins with `where`, if the text is none."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: not JSON ({error})") from None
    if not isinstance(value, dict):
        raise ValueError(f"{where}: not a JSON object")
    return value


def write_whole(path: Path, text: str) -> None:
    """Write under a temporary name, then rename: a reader sees the old file or the new one, never a
    part.
    """
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    to_disk(temporary)
    temporary.replace(path)


def to_disk(path: Path) -> None:
    """fsync a file or a folder.

    A folder on a file system that cannot do it is left to that file system.
    """
    is_folder = path.is_dir()
    try:
        _fsync(path)
    except OSError as error:
        if not is_folder or error.errno not in NO_FSYNC_OF_FOLDERS:
            raise


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def read_safetensors(file: str | Path) -> dict[str, torch.Tensor]:
    """{name: tensor} of a safetensors file.

    Raises ValueError, which names the file, if it is none.
    """
    try:
        return safetensors.torch.load_file(file)
    except safetensors.SafetensorError as error:
        raise ValueError(f"{file}: not a safetensors file: {error}") from error


def load_weights(
    model: torch.nn.Module, weights: dict[str, torch.Tensor], source: str | Path
) -> None:
    """Copy {name: tensor} into the model.

    Raises ValueError, which names source and the keys that are missing, unexpected or of another
    shape.
    """
    named = {str(name): tensor for name, tensor in weights.items()}
    try:
        model.load_state_dict(named)
    except RuntimeError as error:
        reason = shorten(str(error), 400)
        raise ValueError(f"{source}: its keys do not fit the model: {reason}") from error
