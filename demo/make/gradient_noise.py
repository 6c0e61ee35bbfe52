"""How much of a GRPO gradient is signal: the cosine between the gradients of two halves of the same
questions.

    python -m demo.make.gradient_noise                # 64 training questions x 8 completions, 2 min
    python -m demo.make.gradient_noise --crm FOLDER   # of another checkpoint

Near 1 the two halves agree, near 0 each is noise. Printed for all weights and for parts of the
model, with the mean over questions of the rewards' standard deviation in a group. A model that does
not look at the image has nothing to select on: the tiny CRM of before 2026-11-24, which wrote every
category's mean place, had 0.02 over all weights together.
"""

import argparse
import re

import numpy as np
import torch

from crm import CRM, load_crm
from data import Example, load_samples
from rewards import total_reward
from sampling import sample
from scoring import logp
from train_grpo import group_advantages, token_weights

GROUP = 8
TOKENS = 128
SEED = 5
PARTS = {
    "all weights": "",
    "vision tower": "visual",
    "embeddings": "embed",
    "language layers": "language_model.layers",
    "RMSNorm gains": "language_model.*norm",
}


def gradient(
    crm: CRM, example: Example, seed: tuple[int, ...], parameters: list[torch.nn.Parameter]
) -> tuple[tuple[torch.Tensor, ...], float]:
    """Returns the policy gradient of one question's group, a tensor per parameter, and the standard
    deviation of its rewards."""
    prompt = crm.prompt_of(example)
    group = sample(crm, [prompt], GROUP, TOKENS, seed=[seed])[0]
    totals = []
    for text in group.texts:
        terms = crm.answer_format.reward_terms(text, example, prompt.sizes)
        totals.append(total_reward(terms, "soft"))
    rewards = torch.tensor(totals)
    mask = torch.arange(group.tokens.shape[1]) < group.lengths[:, None]
    weights = token_weights(mask)
    advantages = group_advantages(rewards[None])[0]  # (G,)
    gain = (weights * logp(crm, group, range(GROUP)) * advantages[:, None]).sum()
    return torch.autograd.grad(gain, parameters), rewards.std().item()


def part_of(gradients: dict[str, torch.Tensor], pattern: str) -> torch.Tensor:
    """Returns the gradient of the parameters whose name has a match, flat."""
    found = [g.flatten() for name, g in gradients.items() if re.search(pattern, name)]
    return torch.cat(found)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--crm", default="demo/crm")
    parser.add_argument("--data", default="demo/data")
    parser.add_argument("--questions", type=int, default=64)
    args = parser.parse_args()
    crm = load_crm(args.crm, prompt="reasoning")
    parameters = crm.prepare_training()
    train = load_samples(args.data, "train")
    halves: list[dict[str, torch.Tensor]] = [{}, {}]
    spread = []
    order = np.random.default_rng(0).permutation(len(train))
    for k, i in enumerate(order[: args.questions].tolist()):
        gradients, std = gradient(crm, train[i], (SEED, i), list(parameters.values()))
        spread.append(std)
        half = halves[k % 2]
        for name, g in zip(parameters, gradients):
            half[name] = half.get(name, 0) + g
    for part, pattern in PARTS.items():
        one = part_of(halves[0], pattern)
        other = part_of(halves[1], pattern)
        cosine = torch.cosine_similarity(one, other, dim=0).item()
        print(f"{part:16} {len(one):9,} weights   cosine {cosine:+.3f}")
    print(
        f"standard deviation of a group's rewards, mean over {args.questions} questions: "
        f"{np.mean(spread):.2f}"
    )


if __name__ == "__main__":
    main()
