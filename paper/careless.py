"""A start that is careless about its format, so that the format terms have something to teach.

    python -m paper.careless --crm demo/crm --out runs/paper/careless

The embedded CRM breaks its format in one completion of twenty. Here a short continuation of its
last stage (demo/make/crm.py, stage f) has half of the completions broken on purpose: the trace is
not closed, a comma or a brace of the JSON is missing, or a key is said twice.
"""

import argparse
from dataclasses import replace

from crm import load_crm
from data import load_samples
from demo.make.crm import HABITS, Heads, Stage, run_stage


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m paper.careless",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--crm", default="demo/crm")
    parser.add_argument("--data", default="demo/data")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument(
        "--broken", type=float, default=0.5, help="share of the completions that break the format"
    )
    parser.add_argument("--out", default="runs/paper/careless")
    args = parser.parse_args()
    HABITS["f"] = replace(HABITS["f"], broken=args.broken)
    crm = load_crm(args.crm)
    heads = Heads(crm.model.config.text_config.hidden_size)
    stage = Stage("f", args.steps, batch=12, lr=2e-4, dense_weight=0)
    examples = load_samples(args.data, "train")
    run_stage(stage, crm, heads, examples, seed=0, work=f"{args.out}-stages")
    crm.save(args.out)


if __name__ == "__main__":
    main()
