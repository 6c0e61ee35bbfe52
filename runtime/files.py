"""Reading what a stranger may give: text and torch files, as data only."""
from pathlib import Path
from pickle import UnpicklingError

import torch

UNREADABLE = (UnpicklingError, RuntimeError, EOFError, ValueError, LookupError, TypeError, AttributeError,
              AssertionError, OverflowError, OSError)    # what torch.load says of garbage, by fuzzing it


def read_torch(file, device="cpu"):
    """What torch.save wrote, plain tensors and containers; nothing in it is run. ValueError names it."""
    with open(file, "rb") as opened:                # a missing file is an OSError of its own
        try:
            return torch.load(opened, map_location=device, weights_only=True)
        except UNREADABLE as error:
            raise ValueError(f"{file}: no torch file of plain tensors ({type(error).__name__})") from error


def read_text(path: str | Path) -> str:
    """UTF-8; ValueError names a file that is not."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text ({error})") from None
