"""The paper's experiments, each a row of a table, at the embedded scale or any other.

    python -m paper                 # all runs, three seeds each; skips what is done (make paper)
    python -m paper --quick         # one seed, fewer steps and questions: does everything work?
    python -m paper --only sft,soft # some runs
    python -m paper --report        # only RESULTS.md, from paper/results/*.json
    python -m paper --list          # the exact commands

A run (paper/experiments.py) trains with train_grpo.py or train_sft.py from the same warm start and
is scored by evaluate.py: four sampled completions per held-out question.
paper/results/NAME-SEED.json keeps the scores of every question, the commands and their seconds. A
larger scale is a matter of flags: --crm, --data, --asm, --flags "@recipes/lora_7b.args" and
--torchrun "--nproc-per-node 8".
"""

import argparse
import json
import shlex
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from metrics import mean, read_predictions, scores
from paper.experiments import GRPO, RUNS, Command, commands
from paper.report import CURVES, picture, read_results, report
from rewards import parse_answer
from runtime.cli import exit_on
from runtime.files import read_jsonl, write_whole

HERE = Path(__file__).parent
RESULTS = HERE / "results"


def well_formed(p: dict, completion: dict) -> bool:
    """Whether both blocks of a completion are there and could be read."""
    return not completion["problem"] and parse_answer(completion["text"]).think is not None


def execute(name: str, seed: int, args: argparse.Namespace) -> None:
    """Trains, evaluates, and keeps the result. What is done is not repeated; its seconds are
    None."""
    todo = commands(name, seed, args)
    seconds = [run(command) for command in todo]
    curves = {key: [] for key in CURVES}
    if RUNS[name].script == GRPO:
        steps = read_jsonl(Path(args.work) / f"{name}-{seed}/metrics.jsonl")
        curves = {key: [round(step[key], 4) for step in steps] for key in CURVES}
    questions = [question_row(p) for p in read_predictions(todo[-1].out)]
    result = {
        "name": name,
        "seed": seed,
        "date": time.strftime("%Y-%m-%d"),
        "seconds": seconds,
        "commands": [shown(command) for command in todo],
        "curves": curves,
        "questions": questions,
    }
    write_whole(args.results / f"{name}-{seed}.json", json.dumps(result) + "\n")
    iou = 100 * np.mean([row["iou"] for row in questions])
    total = sum(value or 0 for value in seconds)
    print(f"{name}, seed {seed}: IoU {iou:.1f}, {total:.0f} s", flush=True)


def run(command: Command) -> float | None:
    """Runs a command. Returns its seconds, None where that was done before."""
    if command.is_done:
        return None
    start = time.perf_counter()
    subprocess.run(command.words, check=True, stdout=subprocess.DEVNULL)
    return round(time.perf_counter() - start, 1)


def shown(command: Command) -> str:
    """Returns a command as it is written in a shell."""
    first, *others = command.words
    if first == sys.executable:
        first = "python"
    return shlex.join([first, *others])


def question_row(p: dict) -> dict:
    """Returns what a result keeps of a prediction: what the question is about, and its scores."""
    row = {key: p[key] for key in ("id", "image", "supercategory", "wording")}
    row["formed"] = round(mean(p, well_formed), 4)
    for name, value in scores(p).items():
        row[name] = None if value is None else round(value, 4)
    return row


def parse() -> argparse.Namespace:
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
        "--steps", type=int, default=80, help="of GRPO and of SFT, on the same questions"
    )
    parser.add_argument(
        "--early",
        default="build/crm/c_500",
        help="a base whose names are mostly wrong; demo.make.crm leaves this one",
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
    args.names = args.only.split(",") if args.only else list(RUNS)
    for name in args.names:
        if name not in RUNS:
            parser.error(f"--only {name}: not one of {', '.join(RUNS)}")
    return args


def write_report(folder: Path) -> None:
    """Writes RESULTS.md and curves.png from the results in a folder: beside them, and those of the
    project itself into paper/."""
    with exit_on(ValueError):
        results = read_results(folder)
    out = HERE if folder == RESULTS else folder
    picture(results, out / "curves.png")
    write_whole(out / "RESULTS.md", report(results))
    print(f"-> {out / 'RESULTS.md'}")


def main() -> None:
    args = parse()
    todo = [(name, seed) for seed in range(args.seeds) for name in args.names]
    if args.list:
        for name, seed in todo:
            for command in commands(name, seed, args):
                print(shown(command))
        return
    args.results.mkdir(parents=True, exist_ok=True)
    if not args.report:
        for name, seed in todo:
            if not (args.results / f"{name}-{seed}.json").exists():
                execute(name, seed, args)
    write_report(args.results)


if __name__ == "__main__":
    main()
