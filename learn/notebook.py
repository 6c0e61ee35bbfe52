"""Makes learn/one_step.ipynb from learn/one_step.py, and runs it.

    python -m learn.notebook        # about a quarter of a minute on one core

The script is the source, and the notebook is made of it, so the two cannot drift apart. In the
script "# %% [markdown]" begins a cell of text, whose lines are comments, and "# %%" a cell of code.
Whatever stands above the first of them is not in the notebook.

A notebook is a JSON file of cells and what they printed. Cells are run here by `exec`, in one
process, so neither a kernel nor another package is needed. What the value of a cell's last line
looks like follows Jupyter's own rule: it is asked for a picture, then for HTML, then for its repr.
"""

import ast
import base64
import hashlib
import io
import json
import sys
from contextlib import redirect_stdout
from dataclasses import dataclass
from typing import Any

from data import EMBEDDED
from runtime.cli import ROOT, show_every_character
from runtime.files import write_whole

SCRIPT = ROOT / "learn/one_step.py"
NOTEBOOK = ROOT / "learn/one_step.ipynb"
WEIGHTS = EMBEDDED["crm"] / "model.safetensors"
TEXT_MARK = "# %% [markdown]"
CODE_MARK = "# %%"

Names = dict[str, Any]  # what the cells have defined


@dataclass(frozen=True)
class Cell:
    """A piece of the script. The source of a text cell is Markdown."""

    is_code: bool
    source: str


def read_cells(script: str) -> list[Cell]:
    """Returns the cells of a script."""
    cells = []
    is_code = False
    lines: list[str] | None = None  # None above the first mark
    for line in [*script.splitlines(), CODE_MARK]:  # a last mark ends the last cell
        if line not in (TEXT_MARK, CODE_MARK):
            if lines is not None:
                lines.append(line)
            continue
        if lines is not None:
            cells.append(Cell(is_code, source_of(lines, is_code)))
        is_code = line == CODE_MARK
        lines = []
    return cells


def source_of(lines: list[str], is_code: bool) -> str:
    if not is_code:
        lines = [line.removeprefix("#").removeprefix(" ") for line in lines]
    return "\n".join(lines).strip("\n")


# ---------------------------------------------------------------- run


def run_cell(source: str, names: Names) -> tuple[str, Any]:
    """Runs a cell of code. Returns what it prints, and the value of its last line, or None where
    that is not an expression."""
    body = ast.parse(source).body
    last = None
    if body and isinstance(body[-1], ast.Expr):
        last = ast.Expression(body.pop().value)
    printed = io.StringIO()
    value = None
    with redirect_stdout(printed):
        exec(compile(ast.Module(body, []), SCRIPT.name, "exec"), names)
        if last is not None:
            value = eval(compile(last, SCRIPT.name, "eval"), names)
    return printed.getvalue(), value


def run_cells(cells: list[Cell]) -> tuple[list[list[dict]], Names]:
    """Runs the cells one after the other. Returns the outputs of each as a notebook has them, and
    what the cells have defined."""
    names: Names = {"__name__": "one_step"}
    outputs = []
    count = 0
    for cell in cells:
        if not cell.is_code:
            outputs.append([])
            continue
        count += 1
        printed, value = run_cell(cell.source, names)
        outputs.append(outputs_of(printed, value, count))
    return outputs, names


def outputs_of(printed: str, value: Any, count: int) -> list[dict]:
    outputs = []
    if printed:
        stream = {"output_type": "stream", "name": "stdout", "text": split(printed)}
        outputs.append(stream)
    if value is not None:
        result = {
            "output_type": "execute_result",
            "execution_count": count,
            "metadata": {},
            "data": looks(value),
        }
        outputs.append(result)
    return outputs


def looks(value: Any) -> dict[str, Any]:
    """Returns what a value looks like, by the type of each form."""
    if hasattr(value, "_repr_png_"):
        png = base64.b64encode(value._repr_png_()).decode("ascii")
        return {"image/png": png, "text/plain": ["a picture"]}
    if hasattr(value, "_repr_html_"):
        return {"text/html": split(value._repr_html_()), "text/plain": ["coloured text"]}
    return {"text/plain": split(repr(value))}


# ---------------------------------------------------------------- the file


def notebook(cells: list[Cell], outputs: list[list[dict]]) -> dict[str, Any]:
    """Returns a notebook in Jupyter's format, version 4.5."""
    parts = []
    count = 0
    for number, (cell, of_cell) in enumerate(zip(cells, outputs), 1):
        part = {"id": f"cell-{number}", "metadata": {}, "source": split(cell.source)}
        if cell.is_code:
            count += 1
            part |= {"cell_type": "code", "execution_count": count, "outputs": of_cell}
        else:
            part |= {"cell_type": "markdown"}
        parts.append(part)
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    metadata = {
        "kernelspec": kernel,
        "language_info": {"name": "python"},
        "weights": fingerprint(),
    }
    return {"cells": parts, "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}


def split(text: str) -> list[str]:
    """Returns the lines of a text with their ends, as a notebook keeps them."""
    return text.splitlines(keepends=True)


def fingerprint() -> str:
    """Says which weights the outputs were made with."""
    return hashlib.sha256(WEIGHTS.read_bytes()).hexdigest()


def main() -> None:
    show_every_character()
    if sys.argv[1:]:
        print("error: python -m learn.notebook takes no arguments", file=sys.stderr)
        raise SystemExit(2)
    cells = read_cells(SCRIPT.read_text(encoding="utf-8"))
    outputs, _ = run_cells(cells)
    text = json.dumps(notebook(cells, outputs), indent=1, ensure_ascii=False, sort_keys=True)
    write_whole(NOTEBOOK, text + "\n")
    print(f"{NOTEBOOK.relative_to(ROOT)} is written, {len(text) / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
