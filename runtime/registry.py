"""Functions named by a string and imported when they are needed: how the outer ring is reached."""

from importlib import import_module
from typing import Any


def find(entry: str) -> Any:
    """Returns what "package.module.name" names. ValueError where it is not there."""
    module, _, name = entry.rpartition(".")
    try:
        return getattr(import_module(module), name)
    except ModuleNotFoundError as error:
        if error.name is None or not module.startswith(error.name):
            raise  # a package that the module needs is missing, which is another matter
        raise ValueError(f"{entry} is not part of this copy: there is no {module}") from None
    except AttributeError:
        raise ValueError(f"{entry} is not part of this copy: {module} has no {name}") from None
