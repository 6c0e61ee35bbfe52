"""The command line: one --flag per field of a Config, @files of flags, embedded defaults, one-line errors."""

import argparse
import math
import os
import re
import shlex
import sys
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import get_args

from rewards import MODES, reward_formula

ROOT = Path(__file__).parents[1]
TRACKERS = ("tensorboard", "wandb", "trackio", "swanlab")
EMBEDDED = {"crm": ROOT / "demo/crm", "asm": ROOT / "demo/asm", "data": ROOT / "demo/data"}


# ---------------------------------------------------------------- the flags that several scripts share


def flag(default, help: str, choices=None, bare=None, low=None, high=None, above=None, off=None):
    """One field of a Config: its default ("required" if it has none) and what --help says.

    choices: the values it may have; bare: the value when the flag stands alone; low, high: bounds, inclusive;
    above: a lower bound, exclusive; off: a value outside the bounds that is allowed, and switches it off."""
    return field(
        default=default,
        metadata={
            "help": help,
            "choices": choices,
            "bare": bare,
            "low": low,
            "high": high,
            "above": above,
            "off": off,
        },
    )


@dataclass
class ModelConfig:
    """How a Qwen2.5-VL is loaded and prompted: infer, evaluate and both trainers."""

    crm: str | None = flag(None, "Qwen2.5-VL folder or hub name")
    # None: what the checkpoint was trained with; if it does not say, reasoning, aspect and Qwen2.5-VL's usual limits
    prompt: str | None = flag(
        None,
        "reasoning, direct, multi (several boxes), a text file with {query} or the text itself; "
        'one with "boxes" in quotes asks for several (default: as the checkpoint, else reasoning)',
    )
    resize: str | None = flag(
        None, "aspect, or square:SIDE (default: as the checkpoint, else aspect)"
    )
    min_pixels: int | None = flag(
        None, "smallest image, model frame (default: as the checkpoint)", low=1
    )
    max_pixels: int | None = flag(
        None, "largest image, model frame (default: as the checkpoint)", low=1
    )
    dtype: str = flag(
        "auto",
        "data type of the model: auto is bfloat16 on CUDA, float32 elsewhere",
        ("auto", "float32", "bfloat16"),
    )
    seed: int = flag(0, "seed of every random choice", low=0)


@dataclass
class RunConfig(ModelConfig):
    """What GRPO and SFT share. A subclass overrides a default by declaring the field again."""

    # data and run folder
    data: str | None = flag(None, "folder or .parquet file, see data.py")
    test_data: str | None = flag(None, "where the held-out split is, if not in --data")
    only: str = flag(
        "", "train only on super-categories whose name matches this regular expression"
    )
    skip_bad_rows: bool = flag(False, "skip rows that cannot be used, and count them")
    out: str = flag("runs/new", "run folder")
    resume: str = flag(
        "no",
        "continue from the last checkpoint in --out; auto: if there is one",
        ("no", "yes", "auto"),
        bare="yes",
    )
    parallel: str = flag(
        "ddp", "how torchrun's ranks share the model, see runtime/parallel.py", ("ddp", "fsdp")
    )
    track: str | None = flag(
        None, "send the rows of metrics.jsonl to a tracker, too, see extras/track.py", TRACKERS
    )
    timeout: float = flag(30.0, "minutes that a rank waits for the others", above=0)
    # optimization
    steps: int = flag(100, "optimizer steps", low=1)
    lr: float = flag(1e-6, "peak learning rate", above=0)
    schedule: str = flag(
        "constant", "learning rate after warm-up", ("constant", "linear", "cosine")
    )
    weight_decay: float = flag(0.01, "AdamW's weight decay", low=0)
    max_grad_norm: float = flag(1.0, "gradients are clipped to this norm", above=0)
    lora_rank: int = flag(
        0, "train LoRA matrices of this rank instead of the whole model (0: whole)", low=0
    )
    freeze_vision: bool = flag(False, "do not train the vision tower")
    trainable: str = flag("", "train only parameters whose name matches this regular expression")
    checkpointing: bool = flag(False, "recompute activations in the backward pass to save memory")
    offload: bool = flag(
        False, "keep master weights, AdamW's moments and the reference in host memory"
    )
    # reward: of training (GRPO) and of the held-out evaluation
    mode: str = flag("soft", "reward mode, see rewards.py", tuple(MODES))
    weights: str = flag(
        "", "weights of reward terms, e.g. box_iou=2,mask_dice=1; adds terms to the mode"
    )
    official: bool = flag(False, "compute rewards exactly as the released code does")
    max_new_tokens: int = flag(128, "longest completion in tokens (paper: 2048)", low=1)
    temperature: float = flag(1.0, "softmax temperature of sampling and scoring", above=0)
    # evaluation and checkpoints
    eval_every: int = flag(
        50, "steps between held-out evaluations (0: first and last; -1: none)", low=-1
    )
    eval_answers: int = flag(4, "sampled completions per held-out question", low=1)
    eval_limit: int = flag(0, "number of held-out samples (0: all)", low=0)
    save_every: int = flag(100, "steps between checkpoints (0: only the last; -1: none)", low=-1)
    keep: int = flag(0, "newest checkpoints to keep, besides the best evaluated (0: all)", low=0)


# ---------------------------------------------------------------- the command line


class Parser(argparse.ArgumentParser):
    """argparse, whose errors are one line on the first rank."""

    def error(self, message):
        if int(os.environ.get("RANK", 0)) == 0:
            print("error:", one_line(message), file=sys.stderr, flush=True)
        raise SystemExit(2)

    def convert_arg_line_to_args(self, line):
        try:
            return shlex.split(line, comments=True)
        except ValueError as error:
            self.error(f"a line of an @file, {line}: {error}")

    def given(self, argv: list[str], names: list[str]) -> dict:
        """{field: value} of the flags in argv and in its @files. names: the fields of the Config."""
        try:
            given, unknown = self.parse_known_args(argv)
        except (ValueError, RecursionError) as error:
            self.error(f"an @file is not UTF-8 text, or names itself ({type(error).__name__})")
        if unknown:
            from extras.foreign_names import explain

            self.error(explain(unknown[0], names))
        return vars(given)


def parse_args(
    config_class,
    doc: str,
    recipe: str | None = None,
    argv: list[str] | None = None,
    embedded=lambda config: EMBEDDED,
):
    """A Config from the command line: one --flag per field, `@FILE` for a file of flags (# starts a comment).

    An unknown flag, a wrong value or one outside its bounds ends the program with one line and status 2.
    Where --crm is not given, `recipe` is read first: flags given by hand win, and --mode by hand drops its
    --weights. Where --crm, --asm or --data are fields and not given, the embedded ones are used,
    and that is printed. embedded: the names among these that a Config needs."""
    names = [f.name for f in fields(config_class)]
    argv = sys.argv[1:] if argv is None else argv
    parser = Parser(
        description=doc,
        fromfile_prefix_chars="@",
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    if {"-h", "--help"} & set(argv):
        from extras.foreign_names import table

        parser.epilog = table(names)
    for f in fields(config_class):
        add_flag(parser, f)
    values = given = parser.given(argv, names)
    if recipe and given.get("crm") is None:
        values = parser.given([f"@{ROOT / recipe}"], names) | given
        if "mode" in given and "weights" not in given and values.pop("weights", ""):
            print0(f"--mode given: the --weights of {recipe} are not used")
    config = config_class(**values)
    if recipe and "crm" in given and not any(word.startswith("@") for word in argv):
        print0(f"{recipe} not read, because --crm was given; --lr is {config.lr:g}")
    for f in fields(config):
        value = getattr(config, f.name)
        problem = "is required" if value == "required" else out_of_range(value, f.metadata)
        if problem:
            parser.error(f"{dashed(f.name)} {problem}")
    for name in embedded(config):
        if getattr(config, name, "") is None:
            read = f", with {recipe} (flags given here win)" if recipe and name == "crm" else ""
            print0(
                f"no {dashed(name)} given: the embedded {EMBEDDED[name].relative_to(ROOT)}{read}"
            )
            setattr(config, name, str(EMBEDDED[name]))
    return config


def add_flag(parser: Parser, f) -> None:
    """One field of a Config as an argument, which the parser leaves out where it is not given."""
    kind = next(iter(get_args(f.type)), f.type)  # float | None -> float
    several = get_args(kind)  # tuple[str, str] -> two of str
    kind = several[0] if several else kind
    rule = f.metadata
    if kind is bool:
        how = {"action": argparse.BooleanOptionalAction}
    else:
        how = {
            "type": kind,
            "choices": rule["choices"],
            "const": rule["bare"],
            "nargs": "?" if rule["bare"] else len(several) or None,
            "metavar": None if rule["choices"] else kind.__name__,
        }
    shown = "" if f.default in (None, "", "required") else f" ({f.default})"
    how["help"] = rule["help"].replace("%", "%%") + shown
    parser.add_argument(dashed(f.name), default=argparse.SUPPRESS, **how)


def parse_weights(text: str) -> dict[str, float]:
    """--weights "box_iou=2,mask_dice=1" -> {term: weight}; ValueError names an unknown term or a bad number."""
    try:
        pairs = [item.split("=") for item in text.split(",") if item]
        weights = {name.strip(): float(value) for name, value in pairs}
    except ValueError:
        raise ValueError(f"--weights {text}: give term=number, separated by commas") from None
    reward_formula("soft", weights)
    return weights


def matcher(name: str, pattern: str):
    """re.search for the regular expression that a flag gives; ValueError where it is none."""
    try:
        return re.compile(pattern).search
    except re.error as error:
        raise ValueError(f"{dashed(name)} {pattern}: not a regular expression ({error})") from None


def dashed(name: str) -> str:
    return "--" + name.replace("_", "-")


def out_of_range(value, rule) -> str:
    """What is wrong with a number, by its flag's bounds; "" if nothing is."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return ""
    if not math.isfinite(value):
        return f"{value}: must be a finite number"
    low, high, above, off = (rule[key] for key in ("low", "high", "above", "off"))
    if off is not None and value == off:
        return ""
    for broken, bound in (
        (low is not None and value < low, f"at least {low}"),
        (above is not None and value <= above, f"greater than {above}"),
        (high is not None and value > high, f"at most {high}"),
    ):
        if broken:
            return f"{value}: must be " + (bound if off is None else f"{off} or {bound}")
    return ""


# ---------------------------------------------------------------- output


def print0(*words) -> None:
    """Print on the first rank only."""
    if int(os.environ.get("RANK", 0)) == 0:
        print(*words, flush=True)


@contextmanager
def exit_on(*errors: type[Exception]):
    """Bad input ends the program with one line and status 2. errors: ValueError (whose text says file, key
    and fix) and OSError while setting up; only BadRow later, when any other error is a bug of ours."""
    try:
        yield
    except errors as error:
        print("error:", one_line(str(error)), file=sys.stderr, flush=True)
        raise SystemExit(2) from None
    except KeyboardInterrupt:  # outside a run, which finishes its step and saves
        print("interrupted", file=sys.stderr, flush=True)
        raise SystemExit(130) from None


def one_line(message: str) -> str:
    """A message as one line. One that begins with a file, as Python's own are made to, gets the flag that named it."""
    text = re.sub(r"^\[Errno \d+\] (.*): '([^']*)'$", r"\2: \1", " ".join(message.split()))
    flags = [
        word
        for word, value in zip(sys.argv, sys.argv[1:])
        if word.startswith("--") and text.startswith(f"{value}: ")
    ]
    return " ".join([*flags[:1], text])
