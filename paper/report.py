"""RESULTS.md and curves.png, from paper/results/*.json, notes.md and questions.md."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from metrics import Interval, paired_interval
from paper.experiments import GRPO, RUNS, SEEN, TABLES

HERE = Path(__file__).parent
Chosen = Callable[[dict], bool]  # whether a question's row counts
METRICS = {
    "iou": "IoU",
    "pdice": "pDice",
    "named": "named right",
    "iou_named": "IoU, named right",
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
SINCE_RENAMED = {  # flags in the commands of older results -> what they are called now
    "--samples": "`--completions`",
    "--weights": "`--coefficients`",
    "--only": "a data set of its own, see `python -m paper.subset --help`",
}


def everywhere(row: dict) -> bool:
    return True


def inside(row: dict) -> bool:
    """Whether the out-of-distribution runs were trained on a question's super-category."""
    return row["supercategory"] in SEEN.split("|")


def outside(row: dict) -> bool:
    return not inside(row)


def is_seen_wording(row: dict) -> bool:
    return row["wording"] == "seen"


def is_unseen_wording(row: dict) -> bool:
    return row["wording"] == "unseen"


@dataclass(frozen=True)
class Question:
    """Something that the experiments answer: is the run `after` better than the run `before`?"""

    text: str
    before: str
    after: str
    metric: str = "iou"
    chosen: Chosen = everywhere


QUESTIONS = (
    Question("Does GRPO on soft rewards improve on its start?", "start", "soft"),
    Question("Does it name the target more often?", "start", "soft", "named"),
    Question("Does it point better where it names the target?", "start", "soft", "iou_named"),
    Question("Does it point better with its key points?", "start", "soft", "pdice"),
    Question("Does RL beat SFT on the same boxes and points?", "sft-answers", "soft"),
    Question("Does RL beat SFT that is shown true traces as well?", "sft", "soft"),
    Question(
        "And SFT that sees five times as many (about the same seconds)?",
        "sft-x5",
        "soft",
    ),
    Question(
        "Trained on some super-categories, does RL beat SFT on these?",
        "sft-ood",
        "soft-ood",
        chosen=inside,
    ),
    Question(
        "And on the super-categories neither saw in this training?",
        "sft-ood",
        "soft-ood",
        chosen=outside,
    ),
    Question(
        "Does RL without them improve on its start there?", "start", "soft-ood", chosen=outside
    ),
    Question("Soft or hard rewards: is hard better?", "soft", "hard"),
    Question("Is base (binary terms, the repaired baseline) better than soft?", "soft", "base"),
    Question("Does the mask's Dice as a fifth term help the box?", "soft", "mask_dice"),
    Question("Does it help the mask?", "soft", "mask_dice", "dice_both"),
    Question(
        "Do the format terms teach the format (both blocks well formed)?",
        "careless-no-formats",
        "careless-soft",
        "formed",
    ),
    Question("And the box?", "careless-no-formats", "careless-soft"),
    Question(
        "Is the format better than at the careless start even without them?",
        "careless",
        "careless-no-formats",
        "formed",
    ),
    Question("Is it better without think_format?", "soft", "no-think_format"),
    Question("Is it better without answer_format?", "soft", "no-answer_format"),
    Question("Is it better without box_iou?", "soft", "pdice"),
    Question("Is it better without point_dice?", "soft", "iou"),
    Question("Does the point term teach points (pDice)?", "iou", "soft", "pdice"),
    Question(
        "Is it better without the division by the group's standard deviation?",
        "soft",
        "norm-none",
    ),
    Question("Is it better without a KL term?", "soft", "no-kl"),
    Question(
        "Is the short prompt worse than the one the warm start knows (start, untrained)?",
        "start-direct",
        "start",
    ),
    Question("After GRPO with as many sampled tokens, does reasoning pay?", "soft-direct", "soft"),
    Question(
        "Where names are mostly wrong, does GRPO make them right?", "early", "early-soft", "named"
    ),
    Question("Does it point better there?", "early", "early-soft"),
)


# ---------------------------------------------------------------- one run


class Result:
    """The seeds of one run. A metric has one value per question, the mean over the seeds."""

    def __init__(self, files: list[Path]):
        self.seeds = [json.loads(path.read_text(encoding="utf-8")) for path in files]
        self.questions: list[dict[str, dict]] = []  # of each seed, by id
        for seed in self.seeds:
            self.questions.append({row["id"]: row for row in seed["questions"]})

    def values(
        self, metric: str, chosen: Chosen = everywhere, seeds: int | None = None
    ) -> dict[str, float]:
        """Returns the value of each question, by id, over the first `seeds` seeds (None: all).

        A question is left out where no seed defines the metric: a completion of one seed may name
        its target when another seed's does not."""
        found = {}
        for name, row in sorted(self.questions[0].items()):
            values = [seed[name].get(metric) for seed in self.questions[:seeds]]
            defined = [value for value in values if value is not None]
            if chosen(row) and defined:
                found[name] = float(np.mean(defined))
        return found

    def by_seed(self, metric: str) -> list[float]:
        """Returns the mean over questions of each seed, in percent."""
        means = []
        for questions in self.questions:
            means.append(100 * np.mean([row[metric] for row in questions.values()]))
        return means

    def images(self, names: list[str]) -> list[str]:
        """Returns what image each question is about; older results do not say, and have one
        question per image."""
        return [self.questions[0][name].get("image", name) for name in names]

    def mean(self, metric: str, chosen: Chosen = everywhere) -> str:
        """Returns a mean in percent as text."""
        values = list(self.values(metric, chosen).values())
        return f"{100 * np.mean(values):.1f}" if values else "–"


def read_results(folder: Path) -> dict[str, Result]:
    """Returns the results in a folder by the name of the run. ValueError without those of the
    start, with which everything is compared."""
    results = {}
    for name in RUNS:
        files = sorted(folder.glob(f"{name}-[0-9].json"))
        if files:
            results[name] = Result(files)
    if "start" not in results:
        raise ValueError(f"{folder}: no start-0.json yet; python -m paper makes it")
    return results


# ---------------------------------------------------------------- two runs


def paired(
    before: Result,
    after: Result,
    metric: str,
    other_metric: str | None = None,
    chosen: Chosen = everywhere,
) -> Interval | None:
    """Returns what `after` adds to `before` over the seeds that both have, and its 95 % paired
    bootstrap interval. other_metric: that of `after`, where it is another one."""
    seeds = min(len(before.seeds), len(after.seeds))
    old = before.values(metric, chosen, seeds)
    new = after.values(other_metric or metric, chosen, seeds)
    common = sorted(old.keys() & new.keys())
    old_values = [old[name] for name in common]
    new_values = [new[name] for name in common]
    return paired_interval(old_values, new_values, before.images(common))


def in_percent(found: Interval | None) -> str:
    """Returns "+2.0 [+1.0, +3.0]", and a dash where there is nothing."""
    if found is None:
        return "–"
    return f"{100 * found.mean:+.1f} [{100 * found.low:+.1f}, {100 * found.high:+.1f}]"


def difference(
    before: Result, after: Result, metric: str = "iou", chosen: Chosen = everywhere
) -> str:
    return in_percent(paired(before, after, metric, chosen=chosen))


def within(result: Result, metric: str, other_metric: str) -> str:
    """Returns what one column of a run adds to another, over the same questions."""
    return in_percent(paired(result, result, metric, other_metric))


def change_by_seed(question: Question, before: Result, after: Result) -> list[float]:
    """Returns the mean change of each seed that both runs have, in percent."""
    changes = []
    for old, new in zip(before.questions, after.questions):
        pairs = []
        for name, row in old.items():
            values = row[question.metric], new[name][question.metric]
            if question.chosen(row) and None not in values:
                pairs.append(values)
        changes.append(100 * np.mean([b - a for a, b in pairs]))
    return changes


def verdict(question: Question, before: Result, after: Result) -> str:
    """Returns a line that answers a question.

    It says yes or no only where the interval excludes 0 and all of several seeds agree: the
    interval is over questions, and does not cover the chance of training."""
    found = paired(before, after, question.metric, chosen=question.chosen)
    changes = change_by_seed(question, before, after)
    if len(changes) < 2:
        word = "One seed only"
    elif found.low > 0 and min(changes) > 0:
        word = "Yes"
    elif found.high < 0 and max(changes) < 0:
        word = "No, it is worse"
    else:
        word = "Not shown"
    by_seed = ", ".join(f"{change:+.1f}" for change in changes)
    return f"- {question.text} **{word}**: {in_percent(found)}; by seed {by_seed}."


# ---------------------------------------------------------------- the report


def report(results: dict[str, Result]) -> str:
    """Returns RESULTS.md."""
    shown = [name for name in ("start", "sft-answers", "sft", "sft-x5", "soft") if name in results]
    lines = [
        "# The paper's experiments, rerun",
        "",
        summary(results),
        "",
        *plain_words(results),
        *tables(results),
        "## Curves",
        "",
        "Each GRPO run while it trains: the mean of its seeds and of the last five steps. All runs "
        "see the same questions in the same order, so the lines rise and fall together.",
        "",
        "![curves](curves.png)",
        "",
        *out_of_distribution(results),
        "## Unseen wordings",
        "",
        "IoU where the question is worded as in training, where it is not, and what training adds "
        "to each.",
        "",
        *wordings_table(results, shown),
        "## What the segmenter is given",
        "",
        "Dice of the mask of one completion per question, the voted one.",
        "",
        *segmenter_table(results, shown),
        *(HERE / "questions.md").read_text(encoding="utf-8").splitlines(),
        "",
        *commands_run(results),
    ]
    return "\n".join(lines)


def summary(results: dict[str, Result]) -> str:
    seeds = [seed for result in results.values() for seed in result.seeds]
    dates = sorted({seed["date"] for seed in seeds})
    minutes = sum(seconds or 0 for seed in seeds for seconds in seed["seconds"]) / 60
    questions = len(results["start"].questions[0])
    return (
        f"{len(results)} of {len(RUNS)} runs, {len(seeds)} with all seeds, {minutes:.0f} minutes "
        f"in all, {dates[0]} to {dates[-1]}; {questions} held-out questions, four sampled "
        "completions each. Percent; in brackets 95 % paired bootstrap intervals over the "
        "questions, whose completions and seeds are averaged first; beside them the seeds' own "
        "means. Made by `python -m paper`; the exact commands are at the end."
    )


def plain_words(results: dict[str, Result]) -> list[str]:
    """Returns the questions that this was run for, each with its answer."""
    lines = [
        "## In plain words",
        "",
        "Box IoU of sampled completions unless said otherwise; the second named minus the first.",
        "",
    ]
    for question in QUESTIONS:
        if question.before not in results or question.after not in results:
            continue
        before = results[question.before]
        after = results[question.after]
        if before.values(question.metric) and after.values(question.metric):
            lines.append(verdict(question, before, after))
    soft = results.get("soft")
    if soft is not None and soft.values("dice_one"):
        first = within(soft, "dice_box", "dice_one")
        second = within(soft, "dice_one", "dice_both")
        lines.append(
            "- Points beside the box, Dice of the mask after soft rewards: "
            f"the first adds {first}, the second {second}."
        )
    refused = []
    for name in ("start", "sft", "soft", "hard", "start-direct", "soft-direct"):
        if name in results:
            refused.append(f"{name} {results[name].mean('refused')} %")
    lines += [f"- Refusals (completions with a problem): {', '.join(refused)}.", ""]
    notes = (HERE / "notes.md").read_text(encoding="utf-8").splitlines()
    return [*lines, *notes, ""]


def tables(results: dict[str, Result]) -> list[str]:
    lines = []
    for title, names in TABLES.items():
        there = [name for name in names if name in results]
        if len(there) > 1:
            lines += [f"## {title}", "", *experiments_table(results, there)]
    return lines


def markdown(head: list[str], rows: list[list[str]]) -> list[str]:
    lines = [head, ["---"] * len(head), *rows]
    return ["| " + " | ".join(line) + " |" for line in lines] + [""]


def experiments_table(results: dict[str, Result], names: list[str]) -> list[str]:
    """Returns some runs beside each other, compared with the first. A metric that none has is left
    out."""
    base = results[names[0]]
    metrics = {}
    for metric, title in METRICS.items():
        if any(results[name].values(metric) for name in names):
            metrics[metric] = title
    rows = []
    for name in names:
        result = results[name]
        row = [name, str(len(result.seeds))]
        row += [result.mean(metric) for metric in metrics]
        row.append("" if result is base else difference(base, result))
        row.append(", ".join(f"{value:.1f}" for value in result.by_seed("iou")))
        rows.append(row)
    head = ["run", "seeds", *metrics.values(), f"IoU against {names[0]}", "IoU by seed"]
    return markdown(head, rows)


def out_of_distribution(results: dict[str, Result]) -> list[str]:
    names = ("sft-answers", "sft", "sft-x5", "sft-ood", "soft", "soft-ood")
    rows = []
    for name in names:
        if name in results:
            result = results[name]
            on_these = difference(results["start"], result, chosen=inside)
            elsewhere = difference(results["start"], result, chosen=outside)
            rows.append([name, on_these, elsewhere])
    if not rows:
        return []
    return [
        "## Out of distribution (Table 6)",
        "",
        f"The -ood runs train on {SEEN.replace('|', ', ')} only. What training adds to the start's "
        "IoU.",
        "",
        *markdown(["run", "on these", "on the other super-categories"], rows),
    ]


def wordings_table(results: dict[str, Result], names: list[str]) -> list[str]:
    wordings = (is_seen_wording, is_unseen_wording)
    rows = []
    for name in names:
        result = results[name]
        gains = ["", ""]
        if name != "start":
            gains = [difference(results["start"], result, "iou", chosen) for chosen in wordings]
        means = [result.mean("iou", chosen) for chosen in wordings]
        rows.append([name, *means, *gains])
    return markdown(["run", "seen", "unseen", "gain, seen", "gain, unseen"], rows)


def segmenter_table(results: dict[str, Result], names: list[str]) -> list[str]:
    rows = []
    for name in names:
        result = results[name]
        means = [result.mean(metric) for metric in GIVEN]
        box_instead = within(result, "dice_points", "dice_box")
        points_beside = within(result, "dice_box", "dice_both")
        rows.append([name, *means, box_instead, points_beside])
    head = ["run", *GIVEN.values(), "the box instead of points", "points beside the box"]
    return markdown(head, rows)


def commands_run(results: dict[str, Result]) -> list[str]:
    """Returns the commands of each run's first seed, with the seconds that each took."""
    commands = []
    for result in results.values():
        first = result.seeds[0]
        for command, seconds in zip(first["commands"], first["seconds"]):
            took = "made before" if seconds is None else f"{seconds:.0f} s"
            commands.append(f"{command}    # {took}")
    renamed = []
    for flag, now in SINCE_RENAMED.items():
        if any(f" {flag} " in command for command in commands):
            renamed.append(f"`{flag}` is {now}")
    lines = ["## Commands", "", "Of each run's first seed, with the seconds each took.", ""]
    if renamed:
        lines += [f"They are as they were run. Since then {'; '.join(renamed)}.", ""]
    return [*lines, "```sh", *commands, "```", ""]


# ---------------------------------------------------------------- curves.png


def picture(results: dict[str, Result], path: Path) -> None:
    """Draws how training went: one line per run, the mean of its seeds and of the last five
    steps."""
    shown = {}
    for title, names in TABLES.items():
        trained = [name for name in names if name in results and RUNS[name].script == GRPO]
        if len(trained) > 1:
            shown[title] = trained
    if not shown:
        shown[""] = ["soft"] if "soft" in results else []
    figure = Figure(figsize=(1 + 3.5 * len(shown), 6))
    axes = figure.subplots(len(CURVES), len(shown), sharex=True, sharey="row", squeeze=False)
    for column, (title, names) in zip(axes.T, shown.items()):
        column[0].set_title(title, fontsize=9)
        for axis, metric in zip(column, CURVES):
            for name in names:
                draw_curve(axis, name, results[name], metric)
            axis.grid(alpha=0.25)
            axis.spines[["top", "right"]].set_visible(False)
        if names:
            column[0].legend(frameon=False, fontsize=7)
        column[-1].set_xlabel("step")
    for axis, label in zip(axes[:, 0], CURVES.values()):
        axis.set_ylabel(label)
    figure.tight_layout()
    figure.savefig(path, dpi=90)


def draw_curve(axis: Axes, name: str, result: Result, metric: str) -> None:
    values = np.mean([seed["curves"][metric] for seed in result.seeds], axis=0)
    smooth = [values[max(0, i - 4) : i + 1].mean() for i in range(len(values))]
    colour = "black" if name == "soft" else None
    axis.plot(range(1, len(smooth) + 1), smooth, label=name, color=colour)
