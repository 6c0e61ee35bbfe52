"""What a checkpoint can do before and after GRPO: greedy answers on a split, asked by name and as the data asks.

    python -m demo.check_crm                             # demo/crm on demo/data's test split
    python -m demo.check_crm --crm runs/demo/step_000100

By name: the data's question with the target's own name for the clue. For each group of samples: n, the box IoU and pDice
(image frame; an answer that cannot be parsed scores 0), parse rate, and how often the trace names the right target
(extra_info.names of the data), each with its 95 % bootstrap interval over the samples.
"""
import argparse
import random

import numpy as np

from crm import load_crm
from data import PROMPTS, fill_prompt, load_samples, to_image
from demo.wordings import OPENERS, PICTURES, SEEN, WORDS
from rewards import box_iou, parse_answer, point_dice

LESIONS = ("retinal fluid", "aneurysm", "brain tumour", "melanoma", "breast mass", "lung nodule", "liver tumour", "polyp",
           "haematoma", "kidney cyst", "pneumonia", "consolidation")
KEYS = ("iou", "pdice", "parse", "named")


def target_name(sample) -> str:
    """How the trace calls the target: "the kidney on the left"."""
    return WORDS[sample.category].name.format(side="left" if "left" in sample.query else "right")


def named_question(sample, rng) -> str:
    """A question with an opener seen in training that names the target."""
    return rng.choice(OPENERS[:SEEN]).format(clue=target_name(sample), picture=PICTURES[sample.extra["modality"]])


def ask(sample, how: str, rng) -> str:
    """how: "data" the data's own question, "named" a question with the target's name, "name" the name alone."""
    return {"data": lambda: sample.query, "named": lambda: named_question(sample, rng),
            "name": lambda: target_name(sample)}[how]()


def complete(crm, prompts, max_new_tokens=128):
    """The greedy completion of each prompt."""
    return [group.texts[0] for group in crm.sample(prompts, 1, max_new_tokens, 0.0)]


def score_split(crm, samples, template, how, batch=16) -> list[dict]:
    """One row per sample: KEYS, its category, whether its wording is one of training."""
    rng, rows = random.Random(0), []
    for at in range(0, len(samples), batch):
        part = [samples[i] for i in range(at, min(at + batch, len(samples)))]
        prompts = [crm.encode(s.image, fill_prompt(template, ask(s, how, rng))) for s in part]
        for sample, prompt, text in zip(part, prompts, complete(crm, prompts)):
            answer = parse_answer(text)
            box, points = ((to_image(xy, prompt.frame) if xy else None) for xy in (answer.bbox, answer.points))
            rows.append({"iou": box_iou(box, sample.bbox) if box else 0.0,
                         "pdice": point_dice(points, sample.points) if points else 0.0,
                         "parse": float(not answer.problem),
                         "named": float(any(name in (answer.think or "").lower() for name in sample.extra.get("names", ()))),
                         "category": sample.category, "seen": not sample.extra.get("unseen_wording"), "text": text,
                         "source": sample.extra["image_source"].split()[0]})
    return rows


def interval(values, draws=10_000) -> str:
    values = np.asarray(values, float)
    means = values[np.random.default_rng(0).integers(0, len(values), (draws, len(values)))].mean(1)
    low, high = np.percentile(means, [2.5, 97.5])
    return f"{values.mean():.3f} [{low:.3f}, {high:.3f}]"


def check(crm, samples, template, how) -> str:
    """One line: greedy numbers over all and on lesions."""
    rows = score_split(crm, samples, template, how)
    lesions = [row for row in rows if row["category"] in LESIONS]
    means = ", ".join(f"{key} {np.mean([row[key] for row in rows]):.3f}" for key in KEYS)
    return f"{len(rows)} pictures, {means}; {len(lesions)} lesions, IoU {np.mean([row['iou'] for row in lesions]):.3f}"


def table(rows) -> None:
    """Print the groups of some rows."""
    groups = {"all": rows, "lesions": [row for row in rows if row["category"] in LESIONS],
              "seen wordings": [row for row in rows if row["seen"]],
              "unseen wordings": [row for row in rows if not row["seen"]],
              "named right": [row for row in rows if row["named"]],
              **{source: [row for row in rows if row["source"] == source] for source in ("MNI152", "pyradiomics")}}
    for name, group in groups.items():
        if group:
            print(f"  {name:16} n={len(group):4}  " +
                  "  ".join(f"{key} {interval([row[key] for row in group])}" for key in KEYS), flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--crm", default="demo/crm")
    parser.add_argument("--data", default="demo/data")
    parser.add_argument("--split", default="test")
    parser.add_argument("--prompt", default="reasoning", choices=list(PROMPTS))
    parser.add_argument("--limit", type=int, default=0, help="samples used (0: all)")
    parser.add_argument("--categories", action="store_true", help="IoU of each category, too")
    args = parser.parse_args()
    crm, samples = load_crm(args.crm), load_samples(args.data, args.split)
    samples = samples[:args.limit or None]
    for how, title in (("named", "asked by name"), ("data", "asked as the data asks")):
        rows = score_split(crm, samples, PROMPTS[args.prompt], how)
        print(title)
        table(rows)
        if args.categories:
            for category in sorted(WORDS):
                ious = [(row["iou"], row["named"]) for row in rows if row["category"] == category]
                print(f"    {category:18} IoU {np.mean([i for i, _ in ious]):.2f}  named {np.mean([n for _, n in ious]):.2f}")
