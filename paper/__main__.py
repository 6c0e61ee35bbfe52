"""The paper's experiments, each a row of a table, at the embedded scale or any other.

    python -m paper                 # all runs, three seeds each; skips what is done (make paper)
    python -m paper --quick         # one seed, fewer steps and questions: does everything work?
    python -m paper --only sft,soft # some runs
    python -m paper --report        # only RESULTS.md, from paper/results/*.json
    python -m paper --list          # the exact commands

A run (paper/experiments.py) trains with train_grpo.py or train_sft.py from the same warm start and
is scored by evaluate.py: four sampled completions per held-out question.
paper/results/NAME-SEED.json keeps the scores of every question, the commands and their seconds.
Larger scale: --crm, --data, --asm, --flags "@recipes/lora_7b.args", --torchrun "--nproc-per-node
8"."""

import argparse
import json
import shlex
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from evaluate import scores
from extras.predictions import read_predictions
from metrics import mean
from paper.experiments import GRPO, RUNS, commands
from paper.report import CURVES, picture, read_results, report
from rewards import parse_answer
from runtime.files import write_whole

HERE = Path(__file__).parent
RESULTS = HERE / "results"


def well_formed(p: dict, completion: dict) -> bool:
    """Both blocks are there and could be read."""
    return not completion["problem"] and parse_answer(completion["text"]).think is not None


def execute(name: str, seed: int, args) -> None:
    """Train, evaluate, keep the result. A training run that is done is not repeated; its seconds
    are None, then."""
    todo = commands(name, seed, args)
    seconds = []
    for command in todo:
        start = time.perf_counter()
        out = Path(command[command.index("--out") + 1])
        last = (
            "frame.json"
            if "paper.careless" in command
            else f"step_{RUNS[name].longer * args.steps:06d}"
        )
        if (out / last).exists():
            seconds.append(None)  # made before
            continue
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        seconds.append(round(time.perf_counter() - start, 1))
    rows = [
        {
            "id": row["id"],
            "supercategory": row["supercategory"],
            "wording": row["wording"],
            "formed": round(mean(row, well_formed), 4),
            **{
                key: value if value is None else round(value, 4)
                for key, value in scores(row).items()
            },
        }
        for row in read_predictions(out)
    ]
    log = Path(args.work) / f"{name}-{seed}/metrics.jsonl"
    steps = (
        [json.loads(line) for line in log.read_text().splitlines()]
        if RUNS[name].script == GRPO
        else []
    )
    shown = [shlex.join(["python" if c[0] == sys.executable else c[0], *c[1:]]) for c in todo]
    result = {
        "name": name,
        "seed": seed,
        "date": time.strftime("%Y-%m-%d"),
        "seconds": seconds,
        "commands": shown,
        "curves": {key: [round(step[key], 4) for step in steps] for key in CURVES},
        "questions": rows,
    }
    write_whole(args.results / f"{name}-{seed}.json", json.dumps(result) + "\n")
    iou = 100 * np.mean([row["iou"] for row in rows])
    print(f"{name}, seed {seed}: IoU {iou:.1f}, {sum(s or 0 for s in seconds):.0f} s", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        prog="python -m paper",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--crm", default="demo/crm")
    parser.add_argument("--asm", default="demo/asm")
    parser.add_argument("--data", default="demo/data")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument(
        "--steps", type=int, default=40, help="of GRPO and of SFT, on the same questions"
    )
    parser.add_argument("--flags", default="@recipes/demo.args", help="of every GRPO run")
    parser.add_argument("--sft-flags", default="--batch 12 --lr 1e-4", help="of every SFT run")
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--limit", type=int, default=0, help="held-out questions (0: all)")
    parser.add_argument("--torchrun", default="", help="torchrun's flags; empty: one plain process")
    parser.add_argument("--work", default="runs/paper", help="folder of the runs themselves")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--only", default="", help="runs, separated by commas")
    parser.add_argument("--quick", action="store_true", help="one seed, 8 steps, 48 questions")
    parser.add_argument("--report", action="store_true", help="only write RESULTS.md")
    parser.add_argument("--list", action="store_true", help="only print the commands")
    args = parser.parse_args()
    if args.quick:
        args.seeds = 1
        args.steps = 8
        args.limit = 48
        args.work = "runs/paper-quick"
        args.results = Path(args.work) / "results"
    names = args.only.split(",") if args.only else list(RUNS)
    if unknown := [name for name in names if name not in RUNS]:
        parser.error(f"--only {unknown[0]}: not one of {', '.join(RUNS)}")
    todo = [(name, seed) for seed in range(args.seeds) for name in names]
    if args.list:
        print(
            "\n".join(
                shlex.join(command) for name, seed in todo for command in commands(name, seed, args)
            )
        )
        sys.exit()
    args.results.mkdir(parents=True, exist_ok=True)
    for name, seed in [] if args.report else todo:
        if not (args.results / f"{name}-{seed}.json").exists():
            execute(name, seed, args)
    results = read_results(args.results)
    path = (HERE if args.results == RESULTS else args.results) / "RESULTS.md"
    picture(results, path.with_name("curves.png"))
    path.write_text(report(results))
    print(f"-> {path}")
