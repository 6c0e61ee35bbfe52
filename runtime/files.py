"""Files: read what a stranger may give as data only; write so that a kill leaves the old file or the new."""

import json
import os
from pathlib import Path
from pickle import UnpicklingError
from textwrap import shorten

import safetensors.torch
import torch

UNREADABLE = (
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
)  # what torch.load raises on garbage, found by fuzzing


def read_torch(file: str | Path, device="cpu", mmap: bool = False):
    """What torch.save wrote, plain tensors and containers; nothing in it is run. ValueError names the file.
    mmap: tensors stay on disk until they are used, and the ranks of a machine share the memory."""
    open(file, "rb").close()  # a missing file is an OSError of its own
    try:
        return torch.load(str(file), map_location=device, weights_only=True, mmap=mmap)
    except UNREADABLE as error:
        raise ValueError(
            f"{file}: not a torch file of plain tensors ({type(error).__name__})"
        ) from error


def read_text(path: str | Path) -> str:
    """UTF-8; ValueError names a file that is not."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text ({error})") from None


def read_jsonl(path: Path) -> list[dict]:
    """One JSON object per line, [] where there is no file. A last line torn by a kill is left out; ValueError
    names the line of anything else."""
    lines = read_text(path).splitlines(keepends=True) if path.exists() else []
    rows = []
    for number, line in enumerate(lines, 1):
        if line.endswith("\n"):
            rows.append(parse_object(line, f"{path}, line {number}"))
    return rows


def parse_object(text: str, where) -> dict:
    """A JSON object; ValueError says where there is none."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: not JSON ({error})") from None
    if not isinstance(value, dict):
        raise ValueError(f"{where}: not a JSON object")
    return value


def write_whole(path: Path, text: str) -> None:
    """Written under a temporary name, then renamed: whoever reads sees the old file or the new one, whole."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    to_disk(temporary)
    temporary.replace(path)


def to_disk(path: Path) -> None:
    """fsync of a file or folder."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def read_safetensors(file: str | Path) -> dict[str, torch.Tensor]:
    """{name: tensor}; ValueError names a file that is not one."""
    try:
        return safetensors.torch.load_file(file)
    except safetensors.SafetensorError as error:
        raise ValueError(f"{file}: not a safetensors file: {error}") from error


def load_weights(model: torch.nn.Module, weights: dict, source: str | Path) -> None:
    """Copy {name: tensor} into the model. ValueError names the keys that are missing, unexpected or misshapen."""
    try:
        model.load_state_dict({str(name): tensor for name, tensor in weights.items()})
    except RuntimeError as error:
        raise ValueError(
            f"{source}: its keys do not fit the model: {shorten(str(error), 400)}"
        ) from error
