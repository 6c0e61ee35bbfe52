"""The paper's experiments: what is trained, how it is evaluated, in which table it stands.

To add one, add a line to RUNS, and its name to TABLES.
"""

import shlex
import sys
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path

# super-categories that the out-of-distribution runs are trained on
SEEN = "Abdomen|Brain|Heart|Lung|Vessel|Neoplasm"
GRPO = "train_grpo.py"
SFT = "train_sft.py"


@dataclass(frozen=True)
class Experiment:
    """One row of a table: how it is trained (None: not at all) and how it is evaluated."""

    script: str | None
    flags: str = ""
    ask: str = ""  # flags of evaluate.py
    longer: int = 1  # times --steps
    careless: bool = False  # starts from the model of paper/careless.py
    early: bool = False  # starts from --early, a base that names its target wrong more often
    seen_only: bool = False  # trains on the super-categories in SEEN, see paper/subset.py


RUNS = {
    "start": Experiment(None),
    "start-direct": Experiment(None, ask="--prompt direct"),
    # Table 3: reward modes (iou and pdice are soft without the other term)
    "soft": Experiment(GRPO, "--mode soft"),
    "hard": Experiment(GRPO, "--mode hard"),
    "base": Experiment(GRPO, "--mode base"),
    "iou": Experiment(GRPO, "--mode iou"),
    "pdice": Experiment(GRPO, "--mode pdice"),
    # what the paper did not run: format terms left out, coefficients halved and doubled, the mask
    "no-think_format": Experiment(GRPO, "--coefficients think_format=0"),
    "no-answer_format": Experiment(GRPO, "--coefficients answer_format=0"),
    "box_iou-x0.5": Experiment(GRPO, "--coefficients box_iou=0.5"),
    "box_iou-x2": Experiment(GRPO, "--coefficients box_iou=2"),
    "point_dice-x0.5": Experiment(GRPO, "--coefficients point_dice=0.5"),
    "point_dice-x2": Experiment(GRPO, "--coefficients point_dice=2"),
    "mask_dice": Experiment(GRPO, "--coefficients mask_dice=1"),
    # the format terms, from a start that breaks its format in 40 of 100 completions
    "careless": Experiment(None, careless=True),
    "careless-soft": Experiment(GRPO, careless=True),
    "careless-no-formats": Experiment(
        GRPO, "--coefficients think_format=0,answer_format=0", careless=True
    ),
    # variants of the algorithm
    "norm-none": Experiment(GRPO, "--norm none"),
    "agg-token": Experiment(GRPO, "--agg token"),
    "agg-constant": Experiment(GRPO, "--agg constant"),
    "no-kl": Experiment(GRPO, "--kl-coef 0"),
    # SFT against RL on the same questions, in and out of distribution (Table 6)
    # SFT without traces is shown what GRPO's reward knows, SFT with them the right words as well
    "sft": Experiment(SFT),
    "sft-answers": Experiment(SFT, "--no-think"),
    "sft-x5": Experiment(SFT, "--lr 4e-4", longer=5),  # about the seconds that GRPO takes
    "soft-ood": Experiment(GRPO, seen_only=True),
    "sft-ood": Experiment(SFT, seen_only=True),
    # Table 5: the prompt that asks for no reasoning; its completions are half as long
    "soft-direct": Experiment(GRPO, "--prompt direct", "--prompt direct", longer=2),
    # does reasoning pay where the names are mostly wrong?
    "early": Experiment(None, early=True),
    "early-soft": Experiment(GRPO, early=True),
}
TABLES = {
    "Does training help, and which kind (Table 3)": (
        "start",
        "sft",
        "sft-answers",
        "sft-x5",
        "soft",
        "hard",
        "base",
        "iou",
        "pdice",
        "mask_dice",
    ),
    "What each term is worth": ("soft", "no-think_format", "no-answer_format", "iou", "pdice"),
    "What the format terms are worth": ("careless", "careless-soft", "careless-no-formats"),
    "Sensitivity to coefficients": (
        "soft",
        "box_iou-x0.5",
        "box_iou-x2",
        "point_dice-x0.5",
        "point_dice-x2",
    ),
    "Variants of GRPO": ("soft", "norm-none", "agg-token", "agg-constant", "no-kl"),
    "Prompts (Table 5)": ("start", "start-direct", "soft", "soft-direct"),
    "A base whose names are mostly wrong": ("early", "early-soft"),
}


@dataclass(frozen=True)
class Command:
    """A command of a run."""

    words: list[str]
    out: Path  # folder that it writes
    last_file: str | None = None  # in that folder; None: it is always run, and resumes by itself

    @property
    def is_done(self) -> bool:
        return self.last_file is not None and (self.out / self.last_file).exists()


def commands(name: str, seed: int, args: Namespace) -> list[Command]:
    """Returns the commands of a run: what it starts from, training if any, and the evaluation."""
    run = RUNS[name]
    folder = Path(args.work) / f"{name}-{seed}"
    crm = args.crm
    data = args.data
    todo = []
    if run.careless:
        crm = f"{args.work}/careless"
        todo.append(careless_command(crm, args))
    if run.early:
        crm = args.early
    if run.seen_only:
        data = f"{args.work}/seen"
        todo.append(subset_command(data, args))
    if run.script is not None:
        todo.append(training_command(run, seed, crm, data, folder, args))
        crm = str(folder / step_folder(run, args))
    todo.append(evaluation_command(run, seed, crm, folder, args))
    return todo


def step_folder(run: Experiment, args: Namespace) -> str:
    """Returns the name of a run's last checkpoint."""
    return f"step_{run.longer * args.steps:06d}"


def launched(script: str, args: Namespace) -> list[str]:
    """Returns the words that start a script: torchrun, where its flags were given, or Python."""
    if args.torchrun:
        return ["torchrun", *shlex.split(args.torchrun), script]
    return [sys.executable, script]


def careless_command(out: str, args: Namespace) -> Command:
    words = [sys.executable, "-m", "paper.careless", "--crm", args.crm, "--data", args.data]
    return Command([*words, "--out", out], Path(out), "settings.json")


def subset_command(out: str, args: Namespace) -> Command:
    words = [sys.executable, "-m", "paper.subset", "--data", args.data, "--supercategories", SEEN]
    return Command([*words, "--out", out], Path(out), "train.parquet")


def training_command(
    run: Experiment, seed: int, crm: str, data: str, folder: Path, args: Namespace
) -> Command:
    words = launched(run.script, args)
    words += shlex.split(args.flags if run.script == GRPO else args.sft_flags)
    words += ["--crm", crm, "--data", data]
    if run.script == GRPO:
        words += ["--asm", args.asm]
    words += ["--seed", str(seed), "--steps", str(run.longer * args.steps), "--eval-every", "-1"]
    words += ["--out", str(folder), "--resume", "auto", *shlex.split(run.flags)]
    return Command(words, folder, step_folder(run, args))


def evaluation_command(
    run: Experiment, seed: int, crm: str, folder: Path, args: Namespace
) -> Command:
    words = launched("evaluate.py", args)
    words += ["--crm", crm, "--data", args.data, "--asm", args.asm, "--limit", str(args.limit)]
    words += ["--completions", "4", "--seed", str(seed)]
    out = f"{folder}-eval"
    words += ["--max-new-tokens", str(args.max_new_tokens), "--out", out, *shlex.split(run.ask)]
    return Command(words, Path(out))
