"""A start that is careless about its format, so that the format terms have something to teach.

    python -m paper.careless --crm demo/crm --out runs/paper/careless

The embedded CRM keeps its format almost always. Here it is shown lessons of its last stage
(demo/make/crm.py) in which half of the completions are broken on purpose: the trace is not closed,
a comma or a brace of the JSON is missing, or a key is said twice.
"""

import argparse
import random

import torch

from crm import load_crm
from data import load_samples
from demo.make.crm import Lesson, answer_loss
from scoring import group_of


def broken(text: str, rng: random.Random) -> str:
    """Returns a completion that breaks its format: the trace is not closed, a comma or a brace of
    the JSON is missing, or a key is said twice."""
    ways = (
        text.replace("</think>", ""),
        text.replace(', "points_2"', ' "points_2"'),
        text.replace("}</answer>", "</answer>"),
        text.replace('"points_2"', '"points_1"'),
    )
    return rng.choice(ways)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m paper.careless",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--crm", default="demo/crm")
    parser.add_argument("--data", default="demo/data")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--lr", type=float, default=2e-4)
    parser.add_argument(
        "--broken", type=float, default=0.5, help="share of the completions that break the format"
    )
    parser.add_argument("--out", default="runs/paper/careless")
    args = parser.parse_args()
    crm = load_crm(args.crm)
    examples = load_samples(args.data, "train")
    rng = random.Random(0)
    adamw = torch.optim.AdamW(crm.model.parameters(), lr=args.lr, weight_decay=0)
    for step in range(args.steps):
        lessons = []
        for _ in range(12):
            lesson = Lesson(crm, examples[rng.randrange(len(examples))], "question", rng)
            if rng.random() < args.broken:
                text = broken(lesson.group.texts[0], rng)
                lesson.group = group_of(crm, lesson.prompt, [text])
            lessons.append(lesson)
        loss = answer_loss(crm, lessons, digit_weight=1)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(crm.model.parameters(), 1.0)
        adamw.step()
        adamw.zero_grad()
        if step % 20 == 0:
            print(f"step {step}  loss {loss.item():.3f}", flush=True)
    crm.save(args.out)


if __name__ == "__main__":
    main()
