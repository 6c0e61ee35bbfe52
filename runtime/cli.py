"""The command line: one --flag per field of a Config, @files of flags, embedded defaults, one-line errors."""
import argparse
import os
import shlex
import sys
from contextlib import contextmanager
from dataclasses import MISSING, field, fields
from pathlib import Path
from typing import get_args

ROOT = Path(__file__).parents[1]
EMBEDDED = {"crm": ROOT / "demo/crm", "asm": ROOT / "demo/asm", "data": ROOT / "demo/data"}


AT_LEAST = {"save_every": -1} | \
    dict.fromkeys(("seed", "dry_run", "kl_coef", "temperature", "lora_rank"), 0) | \
    dict.fromkeys(("max_new_tokens", "minibatches", "micro_batch", "inner_epochs", "eval_answers", "samples",
                   "pack_tokens", "batch"), 1)


# ---------------------------------------------------------------- command line

def flag(default, help: str, choices=None, bare=None):
    """One field of a Config: its default, what --help says, the values it may have, and the one that the bare
    flag stands for, if it may stand bare."""
    return field(default=default, metadata={"help": help, "choices": choices, "bare": bare})


def parse_args(config_class, doc: str, recipe: str | None = None, argv: list[str] | None = None,
               embedded=lambda config: EMBEDDED):
    """A Config from the command line: one --flag a field,
    `@FILE` for a file of flags (one a line, # comments).

    An unknown flag, a wrong value or an unknown choice ends the program with status 2.
    Where --crm, --asm or --data are fields and not given, the embedded default is taken,
    its recipe's flags with it, and that is said. embedded: which of them a parsed Config needs."""
    parser = argparse.ArgumentParser(description=doc, fromfile_prefix_chars="@", allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    def words(line):
        try:
            return shlex.split(line, comments=True)
        except ValueError as error:
            parser.error(f"a line of an @file, {line}: {error}")

    parser.convert_arg_line_to_args = words
    for f in fields(config_class):
        kind = next(iter(get_args(f.type)), f.type)                          # float | None -> float
        several = get_args(kind)                                             # tuple[str, str] -> two of str
        kind = several[0] if several else kind
        required = f.default is MISSING or f.default == "required"
        how = {"action": argparse.BooleanOptionalAction} if kind is bool else \
              {"type": kind, "choices": f.metadata["choices"], "const": f.metadata["bare"],
               "nargs": "?" if f.metadata["bare"] else len(several) or None,
               "metavar": None if f.metadata["choices"] else kind.__name__}
        parser.add_argument(
            "--" + f.name.replace("_", "-"), default=None if required else f.default, required=required,
            help=f.metadata["help"] + ("" if required or f.default is None else f" ({f.default})"), **how)
    argv = sys.argv[1:] if argv is None else argv
    try:
        config = parser.parse_args(argv)
    except (ValueError, RecursionError) as error:
        parser.error(f"an @file is not UTF-8 text, or names itself ({type(error).__name__})")
    if recipe and config.crm is None:
        config = parser.parse_args([f"@{ROOT / recipe}", *argv])
        print0(f"no --crm given: the embedded tiny model, with {recipe} (flags given here win)")
    for name, low in AT_LEAST.items():
        if (value := getattr(config, name, None)) is not None and value < low:
            parser.error(f"--{name.replace('_', '-')} {value}: at least {low}")
    for name in embedded(config):
        if getattr(config, name, "") is None:
            path = EMBEDDED[name]
            setattr(config, name, str(path))
            print0(f"no --{name} given: the embedded {path.relative_to(ROOT)}")
    return config_class(**vars(config))


def print0(*words) -> None:
    """Print on the first rank only."""
    if int(os.environ.get("RANK", 0)) == 0:
        print(*words, flush=True)


@contextmanager
def exit_on(*errors: type[Exception]):
    """Bad input ends the program with one line and status 2:
    ValueError (whose text says file, key and fix) and files that cannot be opened while setting up;
    only BadRow later, when any other error is a bug of ours."""
    try:
        yield
    except errors as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        raise SystemExit(2) from None
