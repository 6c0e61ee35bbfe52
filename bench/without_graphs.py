"""train_grpo.py without CUDA graphs, to measure what they save.

python -m bench.without_graphs FLAGS      # the flags of train_grpo.py
"""

from functools import partial

import sampling
import train_grpo
from runtime.cli import exit_on, parse_args
from runtime.readers import BadRow

if __name__ == "__main__":
    train_grpo.sample = partial(sampling.sample, graphs=False)
    with exit_on(BadRow):
        config = parse_args(
            train_grpo.Config,
            train_grpo.__doc__,
            recipe=train_grpo.RECIPE,
            moved=train_grpo.MOVED,
        )
        train_grpo.main(config)
