"""Keeps a checkpoint as the taught model that comes with the repository, in half precision.

python -m demo.make.taught runs/demo/step_000080     # -> demo/crm_grpo
"""

import argparse

from crm import load_crm
from data import TAUGHT
from runtime.cli import exit_on


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", help="a step_* folder of a run")
    parser.add_argument("--out", default=str(TAUGHT["crm"]))
    args = parser.parse_args()
    with exit_on(ValueError, OSError):
        crm = load_crm(args.checkpoint)
    crm.model.half()  # on disk only: load_crm casts to what is asked for
    crm.save(args.out)
    print(f"-> {args.out}")


if __name__ == "__main__":
    main()
