"""RESULTS.md and curves.png, from paper/results/*.json, notes.md and questions.md."""

import json
import sys
from pathlib import Path

import numpy as np

from extras.intervals import paired_bootstrap
from paper.experiments import GRPO, RUNS, SEEN, TABLES

HERE = Path(__file__).parent
METRICS = {
    "iou": "IoU",
    "pdice": "pDice",
    "named": "named right",
    "iou_named": "IoU, named right",
    "iou_several": "IoU, of several",
    "iou_any": "IoU, any sibling",
    "iou_luck": "IoU, by luck",
    "dice_points": "Dice, points",
    "dice_box": "Dice, box",
    "dice_both": "Dice, box and points",
    "refused": "refusals",
    "formed": "well formed",
}
CURVES = {"box_iou": "term box_iou while training", "entropy": "entropy per token, nats"}
GIVEN = {
    "dice_points": "points",
    "dice_box": "box",
    "dice_one": "box, 1 point",
    "dice_both": "box, 2 points",
}
QUESTIONS = (  # question, run, run that may be better, metric, on which super-categories
    ("Does GRPO on soft rewards improve on its start?", "start", "soft", "iou", "all"),
    ("Does it name the target more often?", "start", "soft", "named", "all"),
    ("Does RL beat SFT on the same questions?", "sft", "soft", "iou", "all"),
    (
        "And SFT that sees five times as many (about the same seconds)?",
        "sft-x5",
        "soft",
        "iou",
        "all",
    ),
    (
        "Trained on some super-categories, does RL beat SFT on these?",
        "sft-ood",
        "soft-ood",
        "iou",
        "inside",
    ),
    (
        "And on the super-categories neither saw in this training?",
        "sft-ood",
        "soft-ood",
        "iou",
        "outside",
    ),
    ("Does RL without them improve on its start there?", "start", "soft-ood", "iou", "outside"),
    ("Soft or hard rewards: is hard better?", "soft", "hard", "iou", "all"),
    (
        "Is base (binary terms, the repaired baseline) better than soft?",
        "soft",
        "base",
        "iou",
        "all",
    ),
    ("Does the mask's Dice as a fifth term help the box?", "soft", "mask_dice", "iou", "all"),
    ("Does it help the mask?", "soft", "mask_dice", "dice_both", "all"),
    (
        "Do the format terms teach the format (both blocks well formed)?",
        "careless-no-formats",
        "careless-soft",
        "formed",
        "all",
    ),
    ("And the box?", "careless-no-formats", "careless-soft", "iou", "all"),
    (
        "Is the format better than at the careless start without them, too?",
        "careless",
        "careless-no-formats",
        "formed",
        "all",
    ),
    ("Is it better without think_format?", "soft", "no-think_format", "iou", "all"),
    ("Is it better without answer_format?", "soft", "no-answer_format", "iou", "all"),
    ("Is it better without box_iou?", "soft", "pdice", "iou", "all"),
    ("Is it better without point_dice?", "soft", "iou", "iou", "all"),
    ("Does the point term teach points (pDice)?", "iou", "soft", "pdice", "all"),
    (
        "Is it better without the division by the group's standard deviation?",
        "soft",
        "norm-none",
        "iou",
        "all",
    ),
    ("Is it better without a KL term?", "soft", "no-kl", "iou", "all"),
    (
        "Is the short prompt worse than the one the warm start knows (start, untrained)?",
        "start-direct",
        "start",
        "iou",
        "all",
    ),
)


class Result:
    """The seeds of one run. A metric has one value per question, the mean over the seeds."""

    def __init__(self, files: list[Path]):
        self.seeds = [json.loads(path.read_text()) for path in files]
        self.questions = [{row["id"]: row for row in seed["questions"]} for seed in self.seeds]

    def values(
        self, key: str, chosen=lambda row: True, seeds: int | None = None
    ) -> dict[str, float]:
        first = self.questions[0]
        # a seed may not name a target, another may
        known = {
            q: [seed[q][key] for seed in self.questions[:seeds] if seed[q].get(key) is not None]
            for q in sorted(first)
            if chosen(first[q])
        }
        return {q: float(np.mean(values)) for q, values in known.items() if values}

    def by_seed(self, key: str) -> list[float]:
        """The mean over questions, one number per seed."""
        return [100 * np.mean([row[key] for row in seed.values()]) for seed in self.questions]


def compared(
    a: Result, b: Result, key: str, chosen=lambda row: True
) -> tuple[float, float, float] | None:
    """What b adds to a over the seeds that both have, percent, and the ends of its 95 % paired
    bootstrap interval over the questions."""
    both = min(len(a.seeds), len(b.seeds))
    one = a.values(key, chosen, both)
    two = b.values(key, chosen, both)
    common = sorted(one.keys() & two.keys())
    return (
        tuple(100 * v for v in paired_bootstrap([one[q] for q in common], [two[q] for q in common]))
        if common
        else None
    )


def difference(a: Result, b: Result, key: str, chosen=lambda row: True) -> str:
    return (
        "{:+.1f} [{:+.1f}, {:+.1f}]".format(*found)
        if (found := compared(a, b, key, chosen))
        else "–"
    )


def verdict(question: str, a: Result, b: Result, key: str = "iou", chosen=lambda row: True) -> str:
    """Whether b is better than a. Yes or no only where the interval excludes 0 and all of several
    seeds agree: the interval is over questions and does not cover the chance of training."""
    change, low, high = compared(a, b, key, chosen)
    by_seed = []
    for one, two in zip(a.questions, b.questions):
        used = [q for q in one if chosen(one[q]) and None not in (one[q][key], two[q][key])]
        by_seed.append(100 * np.mean([two[q][key] - one[q][key] for q in used]))
    if len(by_seed) < 2:
        word = "One seed only"
    elif low > 0 and min(by_seed) > 0:
        word = "Yes"
    elif high < 0 and max(by_seed) < 0:
        word = "No, it is worse"
    else:
        word = "Not shown"
    return (
        f"- {question} **{word}**: {change:+.1f} [{low:+.1f}, {high:+.1f}]; by seed "
        + ", ".join(f"{v:+.1f}" for v in by_seed)
        + "."
    )


def mean(result: Result, key: str, chosen=lambda row: True) -> str:
    values = list(result.values(key, chosen).values())
    return f"{100 * np.mean(values):.1f}" if values else "–"


def within(result: Result, one: str, two: str) -> str:
    """What one column of a run adds to another, over the same questions."""
    before, after = ([v for _, v in sorted(result.values(key).items())] for key in (one, two))
    if not after:
        return "–"
    return "{:+.1f} [{:+.1f}, {:+.1f}]".format(*(100 * v for v in paired_bootstrap(before, after)))


def plain_words(results: dict[str, Result], inside, outside) -> list[str]:
    """The questions this was run for, each answered by the interval of one paired difference in
    IoU."""
    places = {"all": lambda row: True, "inside": inside, "outside": outside}
    lines = [
        "## In plain words",
        "",
        "Box IoU of sampled completions unless said otherwise; the second named minus the first.",
        "",
    ]
    for question, a, b, key, where in QUESTIONS:
        if a in results and b in results and results[a].values(key) and results[b].values(key):
            lines.append(verdict(question, results[a], results[b], key, places[where]))
    if "soft" in results and results["soft"].values("dice_one"):
        first = within(results["soft"], "dice_box", "dice_one")
        second = within(results["soft"], "dice_one", "dice_both")
        lines.append(
            "- Points beside the box, Dice of the mask after soft rewards: "
            f"the first adds {first}, the second {second}."
        )
    names = ("start", "sft", "soft", "hard", "start-direct", "soft-direct")
    refused = [f"{name} {mean(results[name], 'refused')} %" for name in names if name in results]
    lines += [f"- Refusals (completions with a problem): {', '.join(refused)}.", ""]
    return [*lines, *(HERE / "notes.md").read_text().splitlines(), ""]


def picture(results: dict[str, Result], path: Path) -> None:
    """How training went: one line per run, the mean of its seeds and of the last five steps."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    shown = {
        title: [name for name in names if name in results and RUNS[name].script == GRPO]
        for title, names in TABLES.items()
    }
    shown = {title: names for title, names in shown.items() if len(names) > 1} or {
        "": ["soft"] * ("soft" in results)
    }
    figure, axes = plt.subplots(
        len(CURVES),
        len(shown),
        figsize=(1 + 3.5 * len(shown), 6),
        sharex=True,
        sharey="row",
        squeeze=False,
    )
    for column, (title, names) in zip(axes.T, shown.items()):
        column[0].set_title(title, fontsize=9)
        for axis, key in zip(column, CURVES):
            for name in names:
                y = np.mean([seed["curves"][key] for seed in results[name].seeds], 0)
                y = [y[max(0, i - 4) : i + 1].mean() for i in range(len(y))]
                axis.plot(
                    range(1, len(y) + 1), y, label=name, color="black" if name == "soft" else None
                )
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
    """RESULTS.md."""
    start = results["start"]
    seeds = [seed for r in results.values() for seed in r.seeds]
    dates = sorted({seed["date"] for seed in seeds})
    minutes = sum(s or 0 for seed in seeds for s in seed["seconds"]) / 60
    inside = lambda row: row["supercategory"] in SEEN.split("|")
    outside = lambda row: not inside(row)
    lines = [
        "# The paper's experiments, rerun",
        "",
        f"{len(results)} of {len(RUNS)} runs, {len(seeds)} with all seeds, {minutes:.0f} minutes in "
        f"all, {dates[0]} to {dates[-1]}; {len(start.questions[0])} held-out questions, four sampled "
        "completions each. Percent; in brackets 95 % paired bootstrap intervals over the questions, "
        "whose completions and seeds are averaged first; beside them the seeds' own means. Made by "
        "`python -m paper`; the exact commands are at the end.",
        "",
        *plain_words(results, inside, outside),
    ]
    for title, names in TABLES.items():
        names = [name for name in names if name in results]
        if len(names) > 1:
            lines += [f"## {title}", "", *experiments_table(results, names)]
    lines += [
        "## Curves",
        "",
        "Each GRPO run while it trains: the mean of its seeds and of the last five steps. All runs see "
        "the same questions in the same order, so the lines rise and fall together.",
        "",
        "![curves](pictures/curves.png)",
        "",
    ]
    if ood := [
        name for name in ("sft", "sft-x5", "sft-ood", "soft", "soft-ood") if name in results
    ]:
        head = ["run", "on these", "on the other super-categories"]
        rows = [
            [name, *(difference(start, results[name], "iou", where) for where in (inside, outside))]
            for name in ood
        ]
        lines += [
            "## Out of distribution (Table 6)",
            "",
            f"The -ood runs train on {SEEN.replace('|', ', ')} only. What training adds to the start's "
            "IoU.",
            "",
            *markdown(head, rows),
        ]
    shown = [name for name in ("start", "sft", "sft-x5", "soft") if name in results]
    lines += [
        "## Unseen wordings",
        "",
        "IoU where the question is worded as in training, where it is not, and what training adds to "
        "each.",
        "",
        *wordings_table(results, shown),
        "## What the segmenter is given",
        "",
        "Dice of the mask of one completion per question, the voted one.",
        "",
        *segmenter_table(results, shown),
        *(HERE / "questions.md").read_text().splitlines(),
        "",
        "## Commands",
        "",
        "Of each run's first seed, with the seconds each took.",
        "",
        "```sh",
    ]
    for r in results.values():
        first = r.seeds[0]
        lines += [
            command + ("    # made before" if s is None else f"    # {s:.0f} s")
            for command, s in zip(first["commands"], first["seconds"])
        ]
    return "\n".join([*lines, "```", ""])


def experiments_table(results: dict[str, Result], names: list[str]) -> list[str]:
    """Some runs beside each other, compared with the first. A metric that none has is left out."""
    base = results[names[0]]
    metrics = {
        key: title
        for key, title in METRICS.items()
        if any(results[name].values(key) for name in names)
    }
    rows = []
    for name in names:
        r = results[name]
        rows.append(
            [
                name,
                str(len(r.seeds)),
                *(mean(r, key) for key in metrics),
                "" if r is base else difference(base, r, "iou"),
                ", ".join(f"{v:.1f}" for v in r.by_seed("iou")),
            ]
        )
    return markdown(
        ["run", "seeds", *metrics.values(), f"IoU against {names[0]}", "IoU by seed"], rows
    )


def wordings_table(results: dict[str, Result], names: list[str]) -> list[str]:
    seen = lambda row: row["wording"] == "seen"
    unseen = lambda row: row["wording"] == "unseen"
    rows = []
    for name in names:
        r = results[name]
        gains = (
            ["", ""]
            if name == "start"
            else [difference(results["start"], r, "iou", chosen) for chosen in (seen, unseen)]
        )
        rows.append([name, mean(r, "iou", seen), mean(r, "iou", unseen), *gains])
    return markdown(["run", "seen", "unseen", "gain, seen", "gain, unseen"], rows)


def segmenter_table(results: dict[str, Result], names: list[str]) -> list[str]:
    head = ["run", *GIVEN.values(), "the box instead of points", "points beside the box"]
    return markdown(
        head,
        [
            [
                name,
                *(mean(results[name], key) for key in GIVEN),
                within(results[name], "dice_points", "dice_box"),
                within(results[name], "dice_box", "dice_both"),
            ]
            for name in names
        ],
    )
