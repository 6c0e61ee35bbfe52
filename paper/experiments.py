"""The paper's experiments: what is trained, how it is evaluated, in which table it stands. A new
one is one line of RUNS, and its name in TABLES."""

import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

SEEN = (
    "Abdomen|Brain|Heart|Lung|Vessel|Neoplasm"  # super-categories trained on in the OOD experiment
)


@dataclass
class Experiment:
    """One row: how it is trained (None: not at all) and how it is evaluated."""

    script: str | None
    flags: str = ""
    ask: str = ""  # flags of evaluate.py
    longer: int = 1  # times --steps
    careless: bool = False  # starts from the model of paper/careless.py


GRPO = "train_grpo.py"
SFT = "train_sft.py"
RUNS = {
    "start": Experiment(None),
    "start-direct": Experiment(None, ask="--prompt direct"),
    # Table 3: reward modes (iou and pdice are soft without the other term), and what the paper did
    # not run: format terms left out, weights halved and doubled
    **{
        mode: Experiment(GRPO, f"--mode {mode}")
        for mode in ("soft", "hard", "base", "iou", "pdice")
    },
    **{
        f"no-{term}": Experiment(GRPO, f"--weights {term}=0")
        for term in ("think_format", "answer_format")
    },
    **{
        f"{term}-x{factor}": Experiment(GRPO, f"--weights {term}={factor}")
        for term in ("box_iou", "point_dice")
        for factor in (0.5, 2)
    },
    "mask_dice": Experiment(GRPO, "--weights mask_dice=1"),
    # the format terms, from a start that breaks its format in 40 of 100 completions
    "careless": Experiment(None, careless=True),
    "careless-soft": Experiment(GRPO, careless=True),
    "careless-no-formats": Experiment(
        GRPO, "--weights think_format=0,answer_format=0", careless=True
    ),
    # variants of the algorithm
    "norm-none": Experiment(GRPO, "--norm none"),
    "agg-token": Experiment(GRPO, "--agg token"),
    "agg-constant": Experiment(GRPO, "--agg constant"),
    "no-kl": Experiment(GRPO, "--kl-coef 0"),
    # SFT against RL on the same questions, in and out of distribution (Table 6)
    "sft": Experiment(SFT),
    "sft-x5": Experiment(SFT, "--lr 4e-4", longer=5),  # about the seconds that GRPO takes
    "soft-ood": Experiment(GRPO, f"--only '{SEEN}'"),
    "sft-ood": Experiment(SFT, f"--only '{SEEN}'"),
    # Table 5: the short prompt
    "soft-direct": Experiment(GRPO, "--prompt direct", "--prompt direct"),
}
TABLES = {
    "Does training help, and which kind (Table 3)": (
        "start",
        "sft",
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
    "Sensitivity to weights": (
        "soft",
        "box_iou-x0.5",
        "box_iou-x2",
        "point_dice-x0.5",
        "point_dice-x2",
    ),
    "Variants of GRPO": ("soft", "norm-none", "agg-token", "agg-constant", "no-kl"),
    "Prompts (Table 5)": ("start", "start-direct", "soft", "soft-direct"),
}


def commands(name: str, seed: int, args) -> list[list[str]]:
    """The exact commands of a run: training, if any, and the evaluation."""
    run = RUNS[name]
    folder = Path(args.work) / f"{name}-{seed}"
    launch = ["torchrun", *shlex.split(args.torchrun)] if args.torchrun else [sys.executable]
    crm = args.crm
    todo = []
    steps = run.longer * args.steps
    if run.careless:
        crm = f"{args.work}/careless"
        todo.append(
            [
                sys.executable,
                "-m",
                "paper.careless",
                "--crm",
                args.crm,
                "--data",
                args.data,
                "--out",
                crm,
            ]
        )
    models = ["--crm", crm, "--data", args.data]
    asm = ["--asm", args.asm]
    limit = ["--limit", str(args.limit)]
    if run.script:
        flags = shlex.split(args.flags if run.script == GRPO else args.sft_flags)
        todo.append(
            [
                *launch,
                run.script,
                *flags,
                *models,
                *(asm if run.script == GRPO else []),
                "--seed",
                str(seed),
                "--steps",
                str(steps),
                "--eval-every",
                "-1",
                "--out",
                str(folder),
                "--resume",
                "auto",
                *shlex.split(run.flags),
            ]
        )
        crm = str(folder / f"step_{steps:06d}")
    todo.append(
        [
            *launch,
            "evaluate.py",
            "--crm",
            crm,
            "--data",
            args.data,
            *asm,
            *limit,
            "--samples",
            "4",
            "--seed",
            str(seed),
            "--max-new-tokens",
            str(args.max_new_tokens),
            "--out",
            f"{folder}-eval",
            *shlex.split(run.ask),
        ]
    )
    return todo
