"""The command line: one --flag per field of a Config, @files of flags, embedded defaults, one-line errors."""
import argparse
import math
import os
import shlex
import sys
from contextlib import contextmanager
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import get_args

from rewards import MODES

ROOT = Path(__file__).parents[1]
EMBEDDED = {"crm": ROOT / "demo/crm", "asm": ROOT / "demo/asm", "data": ROOT / "demo/data"}


# ---------------------------------------------------------------- the flags that several scripts share

def flag(default, help: str, choices=None, bare=None, low=None, high=None, above=None, off=None):
    """One field of a Config: its default ("required" if it has none) and what --help says.

    choices      the values it may have
    bare         the value when the flag is given without one
    low, high    smallest and largest value, inclusive
    above        exclusive lower bound
    off          a value that is allowed outside the bounds and switches the feature off"""
    return field(default=default, metadata={"help": help, "choices": choices, "bare": bare, "low": low,
                                            "high": high, "above": above, "off": off})


@dataclass
class ModelConfig:
    """How a Qwen2.5-VL is loaded and prompted: infer, evaluate and both trainers."""
    crm: str | None = flag(None, "Qwen2.5-VL folder or hub name")
    prompt: str = flag("reasoning", "reasoning, direct, or a text file with {query}")
    # None: what the checkpoint was trained with; if it does not say, aspect and Qwen2.5-VL's usual limits
    resize: str | None = flag(None, "aspect, or square:SIDE (default: as the checkpoint, else aspect)")
    min_pixels: int | None = flag(None, "smallest image, model frame (default: as the checkpoint)", low=1)
    max_pixels: int | None = flag(None, "largest image, model frame (default: as the checkpoint)", low=1)
    dtype: str = flag("auto", "data type of the model: auto is bfloat16 on CUDA, float32 elsewhere",
                      ("auto", "float32", "bfloat16"))
    seed: int = flag(0, "seed of every random choice", low=0)


@dataclass
class RunConfig(ModelConfig):
    """What GRPO and SFT share. A subclass overrides a default by declaring the field again."""
    # data and run folder
    data: str | None = flag(None, "folder or .parquet file, see data.py")
    test_data: str | None = flag(None, "where the held-out split is, if not in --data")
    only: str = flag("", "train only on super-categories whose name matches this regular expression")
    skip_bad_rows: bool = flag(False, "skip rows that cannot be used, and count them")
    out: str = flag("runs/new", "run folder")
    resume: str = flag("no", "continue from the last checkpoint in --out; auto: if there is one",
                       ("no", "yes", "auto"), bare="yes")
    parallel: str = flag("ddp", "how torchrun's ranks share the model, see parallel.py", ("ddp", "fsdp"))
    timeout: float = flag(30.0, "minutes that a rank waits for the others", above=0)
    # optimization
    steps: int = flag(100, "optimizer steps", low=0)
    lr: float = flag(1e-6, "peak learning rate", above=0)
    schedule: str = flag("constant", "learning rate after warm-up", ("constant", "linear", "cosine"))
    weight_decay: float = flag(0.01, "AdamW's weight decay", low=0)
    max_grad_norm: float = flag(1.0, "gradients are clipped to this norm", above=0)
    lora_rank: int = flag(0, "train LoRA matrices of this rank instead of the whole model (0: whole)", low=0)
    freeze_vision: bool = flag(False, "do not train the vision tower")
    trainable: str = flag("", "train only parameters whose name matches this regular expression")
    checkpointing: bool = flag(False, "recompute activations in the backward pass to save memory")
    offload: bool = flag(False, "keep master weights, AdamW's moments and the reference in host memory")
    # reward: of training (GRPO) and of the held-out evaluation
    mode: str = flag("soft", "reward mode, see rewards.py", tuple(MODES))
    weights: str = flag("", "weights of reward terms, e.g. box_iou=2,mask_dice=1; adds terms to the mode")
    official: bool = flag(False, "compute rewards exactly as the released code does")
    max_new_tokens: int = flag(128, "longest completion in tokens (paper: 2048)", low=1)
    temperature: float = flag(1.0, "softmax temperature of sampling and scoring", above=0)
    # evaluation and checkpoints
    eval_every: int = flag(50, "steps between held-out evaluations (0: first and last only; -1: none)", low=-1)
    eval_answers: int = flag(4, "sampled completions per held-out question", low=1)
    eval_limit: int = flag(0, "number of held-out samples (0: all)", low=0)
    save_every: int = flag(100, "steps between checkpoints (0: only the last; -1: none)", low=-1)
    keep: int = flag(0, "newest checkpoints to keep, besides the best evaluated (0: all)", low=0)


# ---------------------------------------------------------------- the command line

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
    for f in fields(config_class):
        problem = out_of_range(getattr(config, f.name), f.metadata)
        if problem:
            parser.error(f"--{f.name.replace('_', '-')} {getattr(config, f.name)}: {problem}")
    for name in embedded(config):
        if getattr(config, name, "") is None:
            path = EMBEDDED[name]
            setattr(config, name, str(path))
            print0(f"no --{name} given: the embedded {path.relative_to(ROOT)}")
    return config_class(**vars(config))


def out_of_range(value, rule) -> str:
    """What is wrong with a number, by its flag's bounds; "" if nothing."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return ""
    if not math.isfinite(value):
        return "must be a finite number"
    low, high, above, off = (rule[key] for key in ("low", "high", "above", "off"))
    if value == off:
        return ""
    allowed = "" if off is None else f"{off} or "
    if low is not None and value < low:
        return f"must be {allowed}at least {low}"
    if above is not None and value <= above:
        return f"must be {allowed}greater than {above}"
    if high is not None and value > high:
        return f"must be {allowed}at most {high}"
    return ""


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
