"""Checks what is written in learn/exercises/yours.py.

python -m learn.exercises [NUMBER] [--hint | --solution]
"""

import argparse
import inspect
import traceback
from collections.abc import Callable
from pathlib import Path
from textwrap import fill, indent
from typing import Any

from learn.exercises import yours
from learn.exercises.checks import EXERCISES, Case, Exercise, agree
from runtime.cli import ROOT, show_every_character

# what goes wrong inside a function that somebody is learning to write
MISTAKES = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    NameError,
    RuntimeError,
    TypeError,
    ValueError,
)


def check(exercise: Exercise, function: Callable) -> tuple[str, str]:
    """Returns "not started", "wrong" or "right", and of the first case that fails what it is."""
    for case in exercise.cases:
        try:
            got = exercise.call(function, *case.args)
            if agree(got, case.expected):
                continue
        except NotImplementedError:
            return "not started", ""
        except MISTAKES as error:
            got = described(error)
        return "wrong", failure(function, case, got)
    return "right", ""


def described(error: BaseException) -> str:
    """Says what was raised, and in which line of yours.py."""
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if frame.filename == yours.__file__]
    where = f" in line {lines[-1]}" if lines else ""
    return f"{type(error).__name__}{where}: {error}"


def failure(function: Callable, case: Case, got: Any) -> str:
    parts = [case.about]
    for name, value in zip(inspect.signature(function).parameters, case.args):
        parts.append(f"{name} = {shown(value)}")
    parts.append(f"expected {shown(case.expected)}")
    parts.append(f"got      {shown(got)}")
    return "\n".join(parts)


def shown(value: Any) -> str:
    text = str(value)
    return f"\n{text}" if "\n" in text else text


def solution(exercise: Exercise) -> str:
    """Returns the project's own function, with the place where it stands."""
    lines, first = inspect.getsourcelines(exercise.source)
    file = Path(inspect.getfile(exercise.source)).relative_to(ROOT)
    return f"# {file}, line {first}\n{''.join(lines)}"


def main(argv: list[str] | None = None) -> None:
    show_every_character()
    parser = argparse.ArgumentParser(prog="python -m learn.exercises", description=__doc__)
    parser.add_argument("number", nargs="?", type=int, choices=EXERCISES, help="only this one")
    parser.add_argument("--hint", action="store_true", help="a hint, instead of the check")
    parser.add_argument("--solution", action="store_true", help="the project's own function")
    args = parser.parse_args(argv)
    if (args.hint or args.solution) and args.number is None:
        parser.error("say of which exercise: python -m learn.exercises 4 --hint")
    for number in [args.number] if args.number else EXERCISES:
        exercise = EXERCISES[number]
        if args.hint:
            print(fill(exercise.hint, 100))
        elif args.solution:
            print(solution(exercise))
        else:
            verdict, details = check(exercise, getattr(yours, exercise.name))
            print(f"{number} {exercise.name:20} {verdict}")
            print(indent(details, "      ") + "\n" if details else "", end="")


if __name__ == "__main__":
    main()
