"""What a checkpoint can do, asked by name and as the data asks; with --after, what GRPO changed.

    python -m demo.make.check_crm                                   # demo/crm, test split, greedy
    python -m demo.make.check_crm --after runs/demo/step_000080     # before and after, also sampled

By name: the prompt is nothing but the target's name, and no reasoning is asked for, so it shows
what the model can see and read out. In a question: the data's question with the name for the clue.
Printed for all examples, lesions, wordings seen in training and unseen, and real images, each with
n and a 95 % bootstrap interval over the examples (paired, for a change):

  iou, pdice   of the box and of the key points, image frame; 0 where it cannot be parsed
  parse        share of the completions that could be parsed
  named        share of the traces that name the right target (extra_info.names of the data)
  both         IoU where the trace names the right target, else 0: a better format alone does not
               raise it

With --after it also prints how much of the gap between asking by name and asking as the data does
was closed.
"""

import argparse
import random
from collections.abc import Callable, Sequence

import numpy as np

from crm import CRM, load_crm
from data import PROMPTS, Example, Examples, Sizes, fill_prompt, load_samples, to_image
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
ROW_GROUPS: dict[str, Callable[[dict], bool]] = {  # name -> which rows are in it
    "all": lambda row: True,
    "lesions": lambda row: row["category"] in LESIONS,
    "seen wordings": lambda row: row["seen"],
    "unseen wordings": lambda row: not row["seen"],
    "MNI152": lambda row: row["source"] == "MNI152",
    "patients": lambda row: row["source"] == "pyradiomics",
}


# ---------------------------------------------------------------- asking


def target_name(example: Example) -> str:
    """Returns how the trace calls the target: "the kidney on the left"."""
    side = "left" if "left" in example.query else "right"
    return WORDS[example.category].name.format(side=side)


def named_question(example: Example, rng: random.Random) -> str:
    """Returns a question with an opener seen in training that names the target."""
    opener = rng.choice(OPENERS[:SEEN])
    picture = PICTURES[example.extra["modality"]]
    return opener.format(clue=target_name(example), picture=picture)


def question_of(example: Example, how: str, rng: random.Random) -> str:
    """Returns what is asked. how: "data" is the data's own question, "named" a question with the
    target's name, "name" the name alone."""
    if how == "data":
        return example.query
    if how == "named":
        return named_question(example, rng)
    return target_name(example)


# ---------------------------------------------------------------- scoring


def score_split(
    crm: CRM,
    examples: Examples,
    template: str,
    how: str,
    completions: int = 1,
    temperature: float = 0.0,
    batch: int = 16,
) -> list[dict]:
    """Returns one row per example: KEYS, each the mean over its completions, and what it is grouped
    by. how: see `question_of`."""
    rng = random.Random(0)
    rows = []
    for at in range(0, len(examples), batch):
        indexes = range(at, min(at + batch, len(examples)))
        chosen = [examples[i] for i in indexes]
        prompts = []
        for example in chosen:
            question = question_of(example, how, rng)
            prompts.append(
                crm.encode(example.image, fill_prompt(template, question, crm.coordinates))
            )
        seeds = [(0, 1, i) for i in indexes]
        groups = sample(crm, prompts, completions, 128, temperature, seeds)
        for example, group in zip(chosen, groups):
            scores = [score(text, example, group.prompt.sizes) for text in group.texts]
            row = dict(zip(KEYS, np.mean(scores, axis=0).tolist()))
            row["category"] = example.category
            row["seen"] = not example.extra.get("unseen_wording")
            row["source"] = example.extra["image_source"].split()[0]
            rows.append(row)
    return rows


def score(text: str, example: Example, sizes: Sizes) -> tuple[float, ...]:
    """Returns KEYS of one completion."""
    answer = parse_answer(text)
    iou = 0.0
    pdice = 0.0
    if answer.bbox is not None:
        iou = box_iou(to_image(answer.bbox, sizes), example.bbox)
    if answer.points is not None:
        pdice = point_dice(to_image(answer.points, sizes), example.points)
    parse = float(not answer.problem)
    named = float(named_right(answer.think, example))
    return iou, pdice, parse, named, iou * named


def named_right(trace: str | None, example: Example) -> bool:
    """Whether a trace names the example's target."""
    text = (trace or "").lower()
    return any(name in text for name in example.extra.get("names", ()))


def bootstrap(values: Sequence[float], draws: int = 10_000) -> np.ndarray:
    """Returns (draws,) means of a bootstrap over the values, always with the same draws."""
    found = np.asarray(values, float)
    picks = np.random.default_rng(0).integers(0, len(found), (draws, len(found)))
    return found[picks].mean(1)


def interval(values: Sequence[float], sign: str = "") -> str:
    """Returns "0.375 [0.300, 0.450]"."""
    low, high = np.percentile(bootstrap(values), [2.5, 97.5])
    return f"{np.mean(values):{sign}.3f} [{low:{sign}.3f}, {high:{sign}.3f}]"


def row_groups(rows: list[dict]) -> dict[str, list[int]]:
    """Returns the indices of the rows of each group; groups without a row are left out."""
    found = {}
    for name, holds in ROW_GROUPS.items():
        indices = [i for i, row in enumerate(rows) if holds(row)]
        if indices:
            found[name] = indices
    return found


def mean_of(rows: list[dict], key: str) -> float:
    return np.mean([row[key] for row in rows])


# ---------------------------------------------------------------- printing


def check(crm: CRM, examples: Examples, template: str, how: str) -> str:
    """Returns one line: greedy numbers over all and on lesions."""
    rows = score_split(crm, examples, template, how)
    lesions = [row for row in rows if row["category"] in LESIONS]
    means = ", ".join(f"{key} {mean_of(rows, key):.3f}" for key in KEYS)
    iou = mean_of(lesions, "iou")
    return f"{len(rows)} pictures, {means}; {len(lesions)} lesions, IoU {iou:.3f}"


def show(title: str, rows: list[dict]) -> None:
    """Prints the groups of some rows."""
    print(title)
    for name, indices in row_groups(rows).items():
        show_line(name, {key: interval([rows[i][key] for i in indices]) for key in KEYS}, indices)


def show_change(title: str, before: list[dict], after: list[dict]) -> None:
    """Prints what changed in each group of the same examples."""
    print(title)
    for name, indices in row_groups(after).items():
        cells = {}
        for key in KEYS:
            cells[key] = interval([after[i][key] - before[i][key] for i in indices], sign="+")
        show_line(name, cells, indices)


def show_line(name: str, cells: dict[str, str], indices: list[int]) -> None:
    words = "  ".join(f"{key} {cell}" for key, cell in cells.items())
    print(f"  {name:16} n={len(indices):4}  {words}", flush=True)


def show_categories(rows: list[dict]) -> None:
    for category in sorted({row["category"] for row in rows}):
        own = [row for row in rows if row["category"] == category]
        iou = mean_of(own, "iou")
        named = mean_of(own, "named")
        print(f"    {category:18} IoU {iou:.2f}  named {named:.2f}")


def gap_closed(named: list[dict], before: list[dict], after: list[dict]) -> str:
    """Returns (after - before) / (named - before) of the mean IoU in words, with the interval of a
    paired bootstrap."""
    by_name = bootstrap([row["iou"] for row in named])
    old = bootstrap([row["iou"] for row in before])
    new = bootstrap([row["iou"] for row in after])
    gap = np.mean(by_name - old)
    middle, low, high = np.percentile((new - old) / (by_name - old), [50, 2.5, 97.5])
    return (
        f"gap of {gap:.3f} IoU between asked by name and as the data asks; closed "
        f"{middle:.0%} [{low:.0%}, {high:.0%}]"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--crm", default="demo/crm")
    parser.add_argument("--after", nargs="*", default=[], help="checkpoints that GRPO made of it")
    parser.add_argument("--data", default="demo/data")
    parser.add_argument("--split", default="test")
    parser.add_argument("--prompt", default="reasoning", choices=list(PROMPTS))
    parser.add_argument("--limit", type=int, default=0, help="examples used (0: all)")
    parser.add_argument(
        "--completions", type=int, default=4, help="sampled per question, with --after"
    )
    parser.add_argument("--categories", action="store_true", help="a line for each category")
    args = parser.parse_args()
    crm = load_crm(args.crm)
    template = PROMPTS[args.prompt]
    examples = load_samples(args.data, args.split)
    if args.limit:
        examples = examples[: args.limit]

    named = score_split(crm, examples, SHORT, "name")
    in_question = score_split(crm, examples, template, "named")
    greedy = score_split(crm, examples, template, "data")
    for title, rows in (
        ("asked by name, greedy", named),
        ("named in a question, greedy", in_question),
        ("asked as the data asks, greedy", greedy),
    ):
        show(title, rows)
        if args.categories:
            show_categories(rows)
    if not args.after:
        return
    sampled = score_split(crm, examples, template, "data", args.completions, 1.0)
    show("asked as the data asks, sampled", sampled)
    for path in args.after:
        trained = load_crm(path)
        after = score_split(trained, examples, template, "data")
        after_sampled = score_split(trained, examples, template, "data", args.completions, 1.0)
        show_change(f"{path}: change of greedy completions", greedy, after)
        show_change(f"{path}: change of sampled completions", sampled, after_sampled)
        print(f"{path}: {gap_closed(named, greedy, after)}", flush=True)


if __name__ == "__main__":
    main()
