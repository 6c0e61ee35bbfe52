"""Registries: visible dicts {name: "module.function"} through which optional code is reached.

A registry names a function by a string, so that nothing is imported until it is needed, and so that
the module may be absent. Readers of data sets and of scans are in runtime/readers.py.
"""

from importlib import import_module
from typing import Any


def find(entry: str) -> Any:
    """The function or object that an entry such as "extras.coco.read" names.

    Raises ValueError, one line, where its module, a package that the module imports, or the name is
    missing.
    """
    module_name, _, name = entry.rpartition(".")
    try:
        module = import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is not None and f"{module_name}.".startswith(f"{error.name}."):
            raise ValueError(f"{entry}: there is no module {error.name} here") from None
        raise ValueError(f"{entry}: needs the package {error.name}, which is missing") from None
    if not hasattr(module, name):
        raise ValueError(f"{entry}: the module {module_name} has no {name}")
    return getattr(module, name)
