"""What a checkpoint can do, asked by name and as the data asks; with --after, what GRPO changed and
how much of the gap it closed.

    python -m demo.make.check_crm                                        # demo/crm on demo/data's
                                                                         test split, greedy
    python -m demo.make.check_crm --after runs/demo/step_000080          # greedy and sampled,
                                                                         before and after

By name: the prompt is nothing but the target's name, and no reasoning is asked for, so it shows
what the model can see and read out; in a question: the data's question with the name for the clue.
Printed for all samples, lesions, wordings seen in training and unseen, and real images, each with n
and a 95 % bootstrap interval over the samples (paired, for a change):

  iou, pdice   of the box and of the key points, image frame; a completion that cannot be parsed
               scores 0
  parse        part of the completions that could be parsed
  named        part of the traces that name the right target (extra_info.names of the data)
  both         IoU where the trace names the right target, else 0: what a better format alone does
               not raise
"""

import argparse
import random

import numpy as np

from crm import load_crm
from data import PROMPTS, fill_prompt, load_samples, to_image
from demo.make.wordings import OPENERS, PICTURES, SEEN, WORDS
from rewards import box_iou, parse_answer, point_dice
from sampling import sample

SHORT = "{query}\nAnswer: "  # asks for no reasoning
LESIONS = (
    "retinal fluid",
    "aneurysm",
    "brain tumour",
    "melanoma",
    "breast mass",
    "lung nodule",
    "liver tumour",
    "polyp",
    "haematoma",
    "kidney cyst",
    "pneumonia",
    "consolidation",
)
KEYS = ("iou", "pdice", "parse", "named", "both")


# ---------------------------------------------------------------- asking


def target_name(sample) -> str:
    """How the trace calls the target: "the kidney on the left"."""
    return WORDS[sample.category].name.format(side="left" if "left" in sample.query else "right")


def named_question(sample, rng) -> str:
    """A question with an opener seen in training that names the target."""
    return rng.choice(OPENERS[:SEEN]).format(
        clue=target_name(sample), picture=PICTURES[sample.extra["modality"]]
    )


def ask(sample, how: str, rng) -> str:
    """how: "data" the data's own question, "named" a question with the target's name, "name" the
    name alone."""
    return {
        "data": lambda: sample.query,
        "named": lambda: named_question(sample, rng),
        "name": lambda: target_name(sample),
    }[how]()


def complete(crm, prompts, answers, temperature, seeds, max_new_tokens=128):
    """The texts of some completions to each prompt."""
    return [
        group.texts for group in sample(crm, prompts, answers, max_new_tokens, temperature, seeds)
    ]


# ---------------------------------------------------------------- scoring


def score_split(crm, samples, template, how, answers=1, temperature=0.0, batch=16) -> list[dict]:
    """One row per sample: KEYS, each the mean over its completions, and what it is grouped by."""
    rng = random.Random(0)
    rows = []
    for at in range(0, len(samples), batch):
        part = [samples[i] for i in range(at, min(at + batch, len(samples)))]
        prompts = [crm.encode(s.image, fill_prompt(template, ask(s, how, rng))) for s in part]
        seeds = [(0, 1, at + k) for k in range(len(part))]
        for sample, prompt, texts in zip(
            part, prompts, complete(crm, prompts, answers, temperature, seeds)
        ):
            scores = [score(text, sample, prompt.frame) for text in texts]
            rows.append(
                {
                    **dict(zip(KEYS, np.mean(scores, 0).tolist())),
                    "category": sample.category,
                    "seen": not sample.extra.get("unseen_wording"),
                    "source": sample.extra["image_source"].split()[0],
                }
            )
    return rows


def score(text, sample, frame) -> tuple:
    """KEYS of one completion."""
    answer = parse_answer(text)
    box, points = ((to_image(xy, frame) if xy else None) for xy in (answer.bbox, answer.points))
    iou = box_iou(box, sample.bbox) if box else 0.0
    named = float(
        any(name in (answer.think or "").lower() for name in sample.extra.get("names", ()))
    )
    return (
        iou,
        point_dice(points, sample.points) if points else 0.0,
        float(not answer.problem),
        named,
        iou * named,
    )


def bootstrap(values, draws=10_000) -> np.ndarray:
    """(draws,) means of a bootstrap over the first axis, always the same draws."""
    values = np.asarray(values, float)
    return values[np.random.default_rng(0).integers(0, len(values), (draws, len(values)))].mean(1)


def interval(values, sign="") -> str:
    low, high = np.percentile(bootstrap(values), [2.5, 97.5])
    return f"{np.mean(values):{sign}.3f} [{low:{sign}.3f}, {high:{sign}.3f}]"


def groups(rows) -> dict[str, list[int]]:
    """Name of a group -> the indices of its rows; the empty ones left out."""
    where = {
        "all": lambda row: True,
        "lesions": lambda row: row["category"] in LESIONS,
        "seen wordings": lambda row: row["seen"],
        "unseen wordings": lambda row: not row["seen"],
        "MNI152": lambda row: row["source"] == "MNI152",
        "patients": lambda row: row["source"] == "pyradiomics",
    }
    found = {name: [i for i, row in enumerate(rows) if holds(row)] for name, holds in where.items()}
    return {name: indices for name, indices in found.items() if indices}


# ---------------------------------------------------------------- printing


def check(crm, samples, template, how) -> str:
    """One line: greedy numbers over all and on lesions."""
    rows = score_split(crm, samples, template, how)
    lesions = [row for row in rows if row["category"] in LESIONS]
    means = ", ".join(f"{key} {np.mean([row[key] for row in rows]):.3f}" for key in KEYS)
    return f"{len(rows)} pictures, {means}; {len(lesions)} lesions, IoU {np.mean([row['iou'] for row in lesions]):.3f}"


def show(title, rows, before=None) -> None:
    """Print the groups of some rows; given those before, what changed."""
    print(title)
    for name, indices in groups(rows).items():
        cells = [
            interval(
                [rows[i][key] - (before[i][key] if before else 0) for i in indices],
                "+" if before else "",
            )
            for key in KEYS
        ]
        print(
            f"  {name:16} n={len(indices):4}  "
            + "  ".join(f"{key} {cell}" for key, cell in zip(KEYS, cells)),
            flush=True,
        )


def show_categories(rows) -> None:
    for category in sorted({row["category"] for row in rows}):
        own = [row for row in rows if row["category"] == category]
        print(
            f"    {category:18} IoU {np.mean([row['iou'] for row in own]):.2f}  "
            f"named {np.mean([row['named'] for row in own]):.2f}"
        )


def gap_closed(named, before, after) -> str:
    """(after - before) / (named - before) of the mean IoU, with the interval of a paired
    bootstrap."""
    named, before, after = (
        bootstrap([row["iou"] for row in rows]) for rows in (named, before, after)
    )
    closed = np.percentile((after - before) / (named - before), [50, 2.5, 97.5])
    return (
        f"gap of {np.mean(named - before):.3f} IoU between asked by name and as the data asks; closed "
        + "{:.0%} [{:.0%}, {:.0%}]".format(*closed)
    )


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--crm", default="demo/crm")
    parser.add_argument("--after", nargs="*", default=[], help="checkpoints that GRPO made of it")
    parser.add_argument("--data", default="demo/data")
    parser.add_argument("--split", default="test")
    parser.add_argument("--prompt", default="reasoning", choices=list(PROMPTS))
    parser.add_argument("--limit", type=int, default=0, help="samples used (0: all)")
    parser.add_argument(
        "--answers", type=int, default=4, help="sampled completions per question, with --after"
    )
    parser.add_argument("--categories", action="store_true", help="each category, too")
    args = parser.parse_args()
    crm = load_crm(args.crm)
    template = PROMPTS[args.prompt]
    samples = load_samples(args.data, args.split)[: args.limit or None]
    named, in_question, greedy = (
        score_split(crm, samples, *how)
        for how in ((SHORT, "name"), (template, "named"), (template, "data"))
    )
    for title, rows in (
        ("asked by name, greedy", named),
        ("named in a question, greedy", in_question),
        ("asked as the data asks, greedy", greedy),
    ):
        show(title, rows)
        if args.categories:
            show_categories(rows)
    if args.after:
        sampled = score_split(crm, samples, template, "data", args.answers, 1.0)
        show("asked as the data asks, sampled", sampled)
    for path in args.after:
        crm = load_crm(path)
        after = score_split(crm, samples, template, "data")
        show(f"{path}: change of greedy completions", after, greedy)
        show(
            f"{path}: change of sampled completions",
            score_split(crm, samples, template, "data", args.answers, 1.0),
            sampled,
        )
        print(f"{path}: {gap_closed(named, greedy, after)}", flush=True)


if __name__ == "__main__":
    main()
