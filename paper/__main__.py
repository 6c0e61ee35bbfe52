"""The paper's experiments, each a row of a table, at the embedded scale or any other.

    python -m paper                 # all runs, three seeds each; skips what is done (make paper)
    python -m paper --quick         # one seed, fewer steps and questions: does everything work?
    python -m paper --only sft,soft # some runs
    python -m paper --report        # only RESULTS.md, from paper/results/*.json
    python -m paper --list          # the exact commands

A run trains with train_grpo.py or train_sft.py from the same warm start and is scored by evaluate.py: four
sampled answers to every held-out question. paper/results/NAME-SEED.json keeps the score of every question, the
commands and their seconds. Larger scale: --crm, --data, --asm, --flags "@recipes/lora_7b.args",
--torchrun "--nproc-per-node 8".
"""
import argparse
import json
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from evaluate import read_predictions, scores
from runtime.metrics import paired_bootstrap

HERE = Path(__file__).parent
RESULTS = HERE / "results"
SEEN = "Abdomen|Brain|Heart|Lung|Vessel|Neoplasm"   # super-categories trained on in the OOD experiment


@dataclass
class Experiment:
    """One row: how it is trained (None: not at all) and how it is asked."""
    script: str | None
    flags: str = ""
    ask: str = ""                                           # flags of evaluate.py
    longer: int = 1                                         # times --steps


GRPO, SFT = "train_grpo.py", "train_sft.py"
RUNS = {
    "start": Experiment(None),
    "start-direct": Experiment(None, ask="--prompt direct"),
    # Table 3: reward modes (iou and pdice are soft without the other term), and what the paper did not run:
    # format terms left out, weights halved and doubled
    **{mode: Experiment(GRPO, f"--mode {mode}") for mode in ("soft", "hard", "base", "iou", "pdice")},
    **{f"no-{term}": Experiment(GRPO, f"--weights {term}=0") for term in ("think_format", "answer_format")},
    **{f"{term}-x{factor}": Experiment(GRPO, f"--weights {term}={factor}")
       for term in ("box_iou", "point_dice") for factor in (0.5, 2)},
    "mask_dice": Experiment(GRPO, "--weights mask_dice=1"),
    # variants of the algorithm
    "norm-none": Experiment(GRPO, "--norm none"),
    "agg-token": Experiment(GRPO, "--agg token"),
    "agg-constant": Experiment(GRPO, "--agg constant"),
    "no-kl": Experiment(GRPO, "--kl-coef 0"),
    # SFT against RL on the same questions, in and out of distribution (Table 6)
    "sft": Experiment(SFT),
    "sft-x5": Experiment(SFT, longer=5),                    # about the seconds that GRPO takes
    "soft-ood": Experiment(GRPO, f"--only '{SEEN}'"),
    "sft-ood": Experiment(SFT, f"--only '{SEEN}'"),
    # Table 5: the short prompt
    "soft-direct": Experiment(GRPO, "--prompt direct", "--prompt direct"),
}
TABLES = {
    "Does training help, and which kind (Table 3)": ("start", "sft", "sft-x5", "soft", "hard", "base", "iou", "pdice",
                                                     "mask_dice"),
    "What each term is worth": ("soft", "no-think_format", "no-answer_format", "iou", "pdice"),
    "Sensitivity to weights": ("soft", "box_iou-x0.5", "box_iou-x2", "point_dice-x0.5", "point_dice-x2"),
    "Variants of GRPO": ("soft", "norm-none", "agg-token", "agg-constant", "no-kl"),
    "Prompts (Table 5)": ("start", "start-direct", "soft", "soft-direct"),
}
METRICS = {"iou": "IoU", "pdice": "pDice", "dice_points": "Dice, points", "dice_box": "Dice, box",
           "dice_both": "Dice, box and points", "refused": "refusals"}
CURVES = {"box_iou": "box IoU of training answers", "entropy": "entropy of a token, nats"}
GIVEN = {"dice_points": "points", "dice_box": "box", "dice_one": "box, 1 point", "dice_both": "box, 2 points"}


# ---------------------------------------------------------------- running

def commands(name: str, seed: int, args) -> list[list[str]]:
    """The exact commands of a run: training, if any, and the evaluation."""
    run, folder = RUNS[name], Path(args.work) / f"{name}-{seed}"
    launch = ["torchrun", *shlex.split(args.torchrun)] if args.torchrun else [sys.executable]
    models = ["--crm", args.crm, "--data", args.data]
    asm, limit = ["--asm", args.asm], ["--limit", str(args.limit)]
    todo, crm, steps = [], args.crm, run.longer * args.steps
    if run.script:
        flags = shlex.split(args.flags if run.script == GRPO else args.sft_flags)
        todo.append([*launch, run.script, *flags, *models, *(asm if run.script == GRPO else []),
                     "--seed", str(seed), "--steps", str(steps), "--eval-every", "-1",
                     "--out", str(folder), "--resume", "auto", *shlex.split(run.flags)])
        crm = str(folder / f"step_{steps:06d}")
    todo.append([*launch, "evaluate.py", "--crm", crm, "--data", args.data, *asm, *limit, "--samples", "4",
                 "--seed", str(seed), "--max-new-tokens", str(args.max_new_tokens), "--out", f"{folder}-eval",
                 *shlex.split(run.ask)])
    return todo


def execute(name: str, seed: int, args) -> None:
    """Train, evaluate, keep the result; a training that is done is not repeated."""
    todo, seconds = commands(name, seed, args), []
    for command in todo:
        start = time.perf_counter()
        out = Path(command[command.index("--out") + 1])
        if not (out / f"step_{RUNS[name].longer * args.steps:06d}").exists():
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        seconds.append(round(time.perf_counter() - start, 1))
    rows = [{"id": row["id"], "supercategory": row["supercategory"], "wording": row["wording"],
             **{key: value if value is None else round(value, 4) for key, value in scores(row).items()}}
            for row in read_predictions(out)]
    log = Path(args.work) / f"{name}-{seed}/metrics.jsonl"
    steps = [json.loads(line) for line in log.read_text().splitlines()] if RUNS[name].script == GRPO else []
    said = [shlex.join(["python" if c[0] == sys.executable else c[0], *c[1:]]) for c in todo]
    result = {"name": name, "seed": seed, "date": time.strftime("%Y-%m-%d"), "seconds": seconds,
              "commands": said, "curves": {key: [round(step[key], 4) for step in steps] for key in CURVES},
              "questions": rows}
    aside = args.results / f"{name}-{seed}.tmp"
    aside.write_text(json.dumps(result) + "\n")
    aside.replace(args.results / f"{name}-{seed}.json")
    iou = 100 * np.mean([row["iou"] for row in rows])
    print(f"{name}, seed {seed}: IoU {iou:.1f}, {sum(seconds):.0f} s", flush=True)


# ---------------------------------------------------------------- reporting

class Result:
    """The seeds of one run: for each metric a value a question, the mean over the seeds."""

    def __init__(self, files: list[Path]):
        self.seeds = [json.loads(path.read_text()) for path in files]
        self.questions = [{row["id"]: row for row in seed["questions"]} for seed in self.seeds]

    def values(self, key: str, chosen=lambda row: True) -> dict[str, float]:
        first = self.questions[0]
        return {q: float(np.mean([seed[q][key] for seed in self.questions])) for q in sorted(first)
                if chosen(first[q]) and first[q].get(key) is not None}

    def spread(self, key: str) -> list[float]:
        """The mean over questions, a number a seed."""
        return [100 * np.mean([row[key] for row in seed.values()]) for seed in self.questions]


def compared(a: Result, b: Result, key: str, chosen=lambda row: True) -> tuple[float, float, float] | None:
    """What b adds to a, percent, and the ends of its 95 % paired bootstrap interval over the questions."""
    one, two = a.values(key, chosen), b.values(key, chosen)
    common = sorted(one.keys() & two.keys())
    return tuple(100 * v for v in paired_bootstrap([one[q] for q in common], [two[q] for q in common])) \
        if common else None


def difference(a: Result, b: Result, key: str, chosen=lambda row: True) -> str:
    return "{:+.1f} [{:+.1f}, {:+.1f}]".format(*found) if (found := compared(a, b, key, chosen)) else "–"


def answer(question: str, a: Result, b: Result, key: str = "iou", chosen=lambda row: True) -> str:
    """Whether b is better than a. Yes or no only where the interval leaves out 0 and all of several seeds agree: the
    interval is over questions and does not know the chance of training."""
    change, low, high = compared(a, b, key, chosen)
    by_seed = [100 * np.mean([two[q][key] - one[q][key] for q in one if chosen(one[q]) and one[q][key] is not None])
               for one, two in zip(a.questions, b.questions)]
    word = "One seed only" if len(by_seed) < 2 else "Yes" if low > 0 and min(by_seed) > 0 else \
        "No, it is worse" if high < 0 and max(by_seed) < 0 else "Not shown"
    return f"- {question} **{word}**: {change:+.1f} [{low:+.1f}, {high:+.1f}]; by seed " + \
        ", ".join(f"{v:+.1f}" for v in by_seed) + "."


def mean(result: Result, key: str, chosen=lambda row: True) -> str:
    values = list(result.values(key, chosen).values())
    return f"{100 * np.mean(values):.1f}" if values else "–"


def within(result: Result, one: str, two: str) -> str:
    """What one column of a run adds to another, over the same questions."""
    return "{:+.1f} [{:+.1f}, {:+.1f}]".format(*(100 * v for v in paired_bootstrap(
        *([v for _, v in sorted(result.values(key).items())] for key in (one, two))))) if result.values(two) else "–"


def plain_words(results: dict[str, Result], inside, outside) -> list[str]:
    """The questions this was run for, each answered by the interval of one paired difference in IoU."""
    asked = [("Does GRPO on soft rewards improve on its start?", "start", "soft", "iou", None),
             ("Does RL beat SFT on the same questions?", "sft", "soft", "iou", None),
             ("And SFT that sees five times as many (about the same seconds)?", "sft-x5", "soft", "iou", None),
             ("Trained on some super-categories, does RL beat SFT on these?", "sft-ood", "soft-ood", "iou", inside),
             ("And on the super-categories neither saw in this training?", "sft-ood", "soft-ood", "iou", outside),
             ("Does RL without them improve on its start there?", "start", "soft-ood", "iou", outside),
             ("Soft or hard rewards: is hard better?", "soft", "hard", "iou", None),
             ("Is base (binary terms, the repaired baseline) better than soft?", "soft", "base", "iou", None),
             ("Does the mask's Dice as a fifth term help the box?", "soft", "mask_dice", "iou", None),
             ("Does it help the mask?", "soft", "mask_dice", "dice_both", None),
             ("Is it better without think_format?", "soft", "no-think_format", "iou", None),
             ("Is it better without answer_format?", "soft", "no-answer_format", "iou", None),
             ("Is it better without box_iou?", "soft", "pdice", "iou", None),
             ("Is it better without point_dice?", "soft", "iou", "iou", None),
             ("Does the point term teach points (pDice)?", "iou", "soft", "pdice", None),
             ("Is it better without the division by the group's standard deviation?", "soft", "norm-none", "iou", None),
             ("Is it better without a KL term?", "soft", "no-kl", "iou", None),
             ("Is the short prompt worse than the one the warm start knows (start, untrained)?", "start-direct", "start",
              "iou", None)]
    lines = ["## In plain words", "", "Box IoU of sampled answers unless said otherwise; the second named minus the first.", ""]
    for question, a, b, key, chosen in asked:
        if a in results and b in results:
            lines.append(answer(question, results[a], results[b], key, chosen or (lambda row: True)))
    if "soft" in results and results["soft"].values("dice_one"):
        one, two = (within(results["soft"], *keys) for keys in (("dice_box", "dice_one"), ("dice_one", "dice_both")))
        lines.append(f"- Points beside the box, Dice of the mask after soft rewards: the first adds {one}, the second {two}.")
    refused = ", ".join(f"{name} {mean(results[name], 'refused')} %" for name in ("start", "sft", "soft", "hard", "start-direct",
                                                                                "soft-direct") if name in results)
    notes = HERE / "notes.md"
    return [*lines, f"- Refusals (answers that cannot be read): {refused}.", "",
            *(notes.read_text().splitlines() if notes.exists() else []), ""]


def picture(results: dict[str, Result], path: Path) -> None:
    """How training went: a line a run, the mean of its seeds, each point the mean of the last five steps."""
    import matplotlib
    matplotlib.use("agg")
    import matplotlib.pyplot as plt
    figure, axes = plt.subplots(len(CURVES), len(TABLES), figsize=(15, 6), sharex=True, sharey="row")
    for column, (title, names) in zip(axes.T, TABLES.items()):
        column[0].set_title(title, fontsize=9)
        for axis, key in zip(column, CURVES):
            for name in (name for name in names if name in results and RUNS[name].script == GRPO):
                y = np.mean([seed["curves"][key] for seed in results[name].seeds], 0)
                y = [y[max(0, i - 4):i + 1].mean() for i in range(len(y))]
                axis.plot(range(1, len(y) + 1), y, label=name, color="black" if name == "soft" else None)
            axis.grid(alpha=0.25)
            axis.spines[["top", "right"]].set_visible(False)
        column[0].legend(frameon=False, fontsize=7)
        column[-1].set_xlabel("step")
    for axis, label in zip(axes[:, 0], CURVES.values()):
        axis.set_ylabel(label)
    figure.tight_layout()
    figure.savefig(path, dpi=90)


def markdown(head: list[str], rows: list[list[str]]) -> list[str]:
    return ["| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows)] + [""]


def read_results(folder: Path) -> dict[str, Result]:
    found = {name: sorted(folder.glob(f"{name}-[0-9].json")) for name in RUNS}
    results = {name: Result(files) for name, files in found.items() if files}
    if "start" not in results:
        sys.exit(f"{folder}: no start-0.json yet; python -m paper makes it")
    return results


def report(results: dict[str, Result]) -> str:
    start, seeds = results["start"], [seed for r in results.values() for seed in r.seeds]
    dates, minutes = sorted({seed["date"] for seed in seeds}), sum(sum(seed["seconds"]) for seed in seeds) / 60
    lines = ["# The paper's experiments, rerun", "",
             f"{len(results)} of {len(RUNS)} runs, {len(seeds)} with all seeds, {minutes:.0f} minutes in all, "
             f"{dates[0]} to {dates[-1]}; {len(start.questions[0])} held-out questions, four sampled answers each. "
             "Percent; in brackets 95 % paired bootstrap intervals over the questions, whose answers and seeds are "
             "averaged first; beside them the seeds' own means. Made by `python -m paper`; the exact commands are "
             "at the end.", ""]
    inside = lambda row: row["supercategory"] in SEEN.split("|")
    outside = lambda row: not inside(row)
    lines += plain_words(results, inside, outside)
    for title, names in TABLES.items():
        names = [name for name in names if name in results]
        if len(names) > 1:
            base = results[names[0]]
            rows = [[name, str(len(r.seeds)), *(mean(r, key) for key in METRICS),
                     "" if r is base else difference(base, r, "iou"),
                     ", ".join(f"{v:.1f}" for v in r.spread("iou"))] for name in names for r in [results[name]]]
            head = ["run", "seeds", *METRICS.values(), f"IoU against {names[0]}", "IoU by seed"]
            lines += [f"## {title}", "", *markdown(head, rows)]

    lines += ["## Curves", "", "Each GRPO run while it trains: the mean of its seeds and of the last five steps. All "
              "runs see the same questions in the same order, so the lines rise and fall together.", "", "![curves](curves.png)", ""]
    if ood := [name for name in ("sft", "sft-x5", "sft-ood", "soft", "soft-ood") if name in results]:
        lines += ["## Out of distribution (Table 6)", "",
                  f"The -ood runs train on {SEEN.replace('|', ', ')} only. What training adds to the start's IoU.", "",
                  *markdown(["run", "on these", "on the other super-categories"], [
                      [name, difference(start, results[name], "iou", inside),
                       difference(start, results[name], "iou", outside)] for name in ood])]
    shown = [name for name in ("start", "sft", "sft-x5", "soft") if name in results]
    worded = {wording: lambda row, wording=wording: row["wording"] == wording for wording in ("seen", "unseen")}
    lines += ["## Unseen wordings", "", "IoU where the question is worded as in training, where it is not, and what "
              "training adds to each.", "", *markdown(["run", *worded, *(f"gain, {w}" for w in worded)], [
                  [name, *(mean(results[name], "iou", chosen) for chosen in worded.values()),
                   *("" if name == "start" else difference(start, results[name], "iou", chosen)
                     for chosen in worded.values())] for name in shown])]
    lines += ["## What the segmenter is given", "", "Dice of the voted answer's mask.", "",
              *markdown(["run", *GIVEN.values(), "the box against nothing but points", "points beside the box"], [
                  [name, *(mean(results[name], key) for key in GIVEN), within(results[name], "dice_points", "dice_box"),
                   within(results[name], "dice_box", "dice_both")] for name in shown])]
    lines += ["## Commands", "", "Of each run's first seed, with the seconds each took.", "", "```sh"]
    for r in results.values():
        first = r.seeds[0]
        lines += [f"{command}    # {s:.0f} s" for command, s in zip(first["commands"], first["seconds"])]
    return "\n".join([*lines, "```", ""])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m paper", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--crm", default="demo/crm")
    parser.add_argument("--asm", default="demo/asm")
    parser.add_argument("--data", default="demo/data")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=40, help="of GRPO and of SFT, on the same questions")
    parser.add_argument("--flags", default="@recipes/demo.args --weights ''", help="of every GRPO run")
    parser.add_argument("--sft-flags", default="--batch 12 --lr 1e-4", help="of every SFT run")
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--limit", type=int, default=0, help="held-out questions (0: all)")
    parser.add_argument("--torchrun", default="", help="torchrun's flags; empty: one plain process")
    parser.add_argument("--work", default="runs/paper", help="folder of the runs themselves")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--only", default="", help="runs, separated by commas")
    parser.add_argument("--quick", action="store_true", help="one seed, 8 steps, 48 questions, into runs/paper-quick")
    parser.add_argument("--report", action="store_true", help="only write RESULTS.md")
    parser.add_argument("--list", action="store_true", help="only print the commands")
    args = parser.parse_args()
    if args.quick:
        args.seeds, args.steps, args.limit, args.work = 1, 8, 48, "runs/paper-quick"
        args.results = Path(args.work) / "results"
    names = args.only.split(",") if args.only else list(RUNS)
    if unknown := [name for name in names if name not in RUNS]:
        parser.error(f"--only {unknown[0]}: not one of {', '.join(RUNS)}")
    todo = [(name, seed) for seed in range(args.seeds) for name in names]
    if args.list:
        print("\n".join(shlex.join(command) for name, seed in todo for command in commands(name, seed, args)))
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
