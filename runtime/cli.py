"""The command line: one --flag per field of a Config, @files of flags, one-line errors.

@dataclass
class Config:
    steps: int = flag(100, "optimizer steps", low=1)

config = parse_args(Config, __doc__)
"""

import argparse
import dataclasses
import difflib
import io
import math
import os
import re
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, get_args

ROOT = Path(__file__).parents[1]


def flag(
    default: Any,
    help: str,
    choices: Sequence[str] | None = None,
    bare: str | None = None,
    low: float | None = None,
    high: float | None = None,
    above: float | None = None,
    off: float | None = None,
) -> Any:
    """Returns one field of a Config: its default ("required" if it has none) and what --help says.

    choices    the values that it may have
    bare       the value when the flag is given without one
    low, high  bounds of a number, both allowed themselves
    above      a lower bound that is not allowed itself
    off        a number outside the bounds that is allowed all the same and switches something off
    """
    rule = {
        "help": help,
        "choices": choices,
        "bare": bare,
        "low": low,
        "high": high,
        "above": above,
        "off": off,
    }
    return dataclasses.field(default=default, metadata=rule)


# ---------------------------------------------------------------- from words to a Config


class Parser(argparse.ArgumentParser):
    """argparse with errors of one line, printed by the first rank, and with comments in @files."""

    def error(self, message: str) -> None:
        if is_first_process():
            print("error:", one_line(message), file=sys.stderr, flush=True)
        raise SystemExit(2)

    def convert_arg_line_to_args(self, line: str) -> list[str]:
        try:
            return shlex.split(line, comments=True)
        except ValueError as error:
            self.error(f"a line of an @file, {line}: {error}")


def parse_args(
    config_class: type,
    doc: str,
    argv: Sequence[str] | None = None,
    recipe: str | None = None,
    moved: Mapping[str, str] | None = None,
) -> Any:
    """Returns a Config from the command line. @FILE is a file of flags in which # starts a comment.

    recipe  a file of flags that is read first where --crm is not given. Flags given by hand win,
            and --mode by hand drops the recipe's --coefficients.
    moved   {name of a former flag: what to use now}, for the error message.
    An unknown flag, a wrong value or one outside its bounds ends the program with one line and
    status 2.
    """
    show_every_character()
    parser = Parser(
        description=doc,
        fromfile_prefix_chars="@",
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    fields = dataclasses.fields(config_class)
    for field in fields:
        _add_argument(parser, field)
    names = [field.name for field in fields]
    words = list(sys.argv[1:] if argv is None else argv)
    given = _flags_in(parser, words, names, moved or {})
    values = given
    if recipe is not None and given.get("crm") is None:
        values = _flags_in(parser, [f"@{ROOT / recipe}"], names, {}) | given
        print0(f"flags of {recipe} are used; flags given here win")
        if "mode" in given and "coefficients" not in given and values.pop("coefficients", ""):
            print0(f"--mode is given, so the --coefficients of {recipe} are not used")
    config = config_class(**values)
    if recipe is not None and "crm" in given and not any(word.startswith("@") for word in words):
        print0(f"{recipe} is not read, because --crm was given; --lr is {config.lr:g}")
    for field in fields:
        value = getattr(config, field.name)
        if value == "required":
            parser.error(f"{dashed(field.name)} is required")
        problem = _out_of_bounds(value, field.metadata)
        if problem:
            parser.error(f"{dashed(field.name)} {problem}")
    return config


def use_embedded(config: Any, defaults: Mapping[str, Path]) -> None:
    """Fills in the fields of a Config that were not given (None), and prints a line for each."""
    for name, path in defaults.items():
        if getattr(config, name) is None:
            shown = path.relative_to(ROOT) if path.is_relative_to(ROOT) else path
            print0(f"no {dashed(name)} given: {shown} is used")
            setattr(config, name, str(path))


def _flags_in(
    parser: Parser, words: list[str], names: list[str], moved: Mapping[str, str]
) -> dict[str, Any]:
    """Returns {name: value} of the flags in some words and in their @files. names: of all flags."""
    try:
        given, unknown = parser.parse_known_args(words)
    except (ValueError, RecursionError) as error:  # a name with a zero byte is a ValueError
        reason = type(error).__name__
        parser.error(
            f"an @file is not UTF-8 text, or it names itself or an impossible file ({reason})"
        )
    if unknown:
        parser.error(_explain(unknown[0], names, moved))
    return vars(given)


def _explain(word: str, names: list[str], moved: Mapping[str, str]) -> str:
    """Returns one line about a word of the command line that is no flag."""
    word = word.partition("=")[0]
    name = word.lstrip("-").replace("-", "_")
    if name in moved:
        return f"{word} has moved: {moved[name]}"
    near = difflib.get_close_matches(name, names, 1)
    if near:
        return f"unknown flag {word}: did you mean {dashed(near[0])}?"
    return f"unknown flag {word}: see --help"


def _add_argument(parser: Parser, field: dataclasses.Field) -> None:
    """Adds a field of a Config to the parser, which leaves it out where it is not given."""
    rule = field.metadata
    optional = [kind for kind in get_args(field.type) if kind is not type(None)]
    kind = optional[0] if type(None) in get_args(field.type) else field.type  # int | None -> int
    several = get_args(kind)  # tuple[str, str] -> (str, str)
    shown = "" if field.default in (None, "", "required") else f" ({field.default})"
    options: dict[str, Any] = {
        "default": argparse.SUPPRESS,
        "help": rule["help"].replace("%", "%%") + shown,
    }
    if kind is bool:
        options["action"] = argparse.BooleanOptionalAction
    else:
        options["type"] = several[0] if several else kind
        options["choices"] = rule["choices"]
        if not rule["choices"]:
            options["metavar"] = options["type"].__name__
    if several:
        options["nargs"] = len(several)
    if rule["bare"]:
        options["nargs"] = "?"
        options["const"] = rule["bare"]
    parser.add_argument(dashed(field.name), **options)


def _out_of_bounds(value: Any, rule: Mapping[str, Any]) -> str:
    """Returns what is wrong with a number by the bounds of its flag; "" if nothing is."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return ""
    if not math.isfinite(value):
        return f"{value}: must be a finite number"
    if rule["off"] is not None and value == rule["off"]:
        return ""
    bound = ""
    if rule["low"] is not None and value < rule["low"]:
        bound = f"at least {rule['low']}"
    if rule["above"] is not None and value <= rule["above"]:
        bound = f"greater than {rule['above']}"
    if rule["high"] is not None and value > rule["high"]:
        bound = f"at most {rule['high']}"
    if bound and rule["off"] is not None:
        bound = f"{rule['off']} or {bound}"
    return f"{value}: must be {bound}" if bound else ""


def dashed(name: str) -> str:
    """Returns the flag of a field: max_new_tokens -> --max-new-tokens."""
    return "--" + name.replace("_", "-")


def matcher(name: str, pattern: str) -> Callable[[str], re.Match | None]:
    """Returns re.search for the regular expression of a flag. ValueError where it is none."""
    try:
        return re.compile(pattern).search
    except re.error as error:
        raise ValueError(f"{dashed(name)} {pattern}: not a regular expression ({error})") from None


# ---------------------------------------------------------------- output


def is_first_process() -> bool:
    """Returns whether this is the first of torchrun's processes, or the only one."""
    return int(os.environ.get("RANK", 0)) == 0


def show_every_character() -> None:
    """Makes the terminal show a sign that it lacks (≥ in ASCII) as an escape, not as an error."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def print0(*words: Any) -> None:
    """Prints on the first rank only."""
    if is_first_process():
        print(*words, flush=True)


@contextmanager
def exit_on(*errors: type[Exception]) -> Iterator[None]:
    """Inside, bad input ends the program with one line and status 2.

    errors: ValueError, whose text says file, key and fix, and OSError while a script sets up; only
    BadRow later, when any other error is a bug of ours."""
    try:
        yield
    except errors as error:
        print("error:", one_line(str(error)), file=sys.stderr, flush=True)
        raise SystemExit(2) from None
    except KeyboardInterrupt:  # outside a training run, which saves what is done
        print("interrupted", file=sys.stderr, flush=True)
        raise SystemExit(130) from None


def one_line(message: str) -> str:
    """Returns a message as one line. Where it begins with a file that a flag named, as Python's own
    messages are made to, the flag is put before it."""
    text = " ".join(message.split())
    text = re.sub(r"^\[Errno \d+\] (.*): '([^']*)'$", r"\2: \1", text)
    for word, value in zip(sys.argv, sys.argv[1:]):
        if word.startswith("--") and text.startswith(f"{value}: "):
            return f"{word} {text}"
    return text
