"""How much of a GRPO gradient is signal: the cosine between the gradients of two halves of the same
questions.

    python -m demo.make.gradient_noise                   # 64 training questions x 8 completions,
                                                         about two minutes
    python -m demo.make.gradient_noise --crm FOLDER      # of another checkpoint

Near 1 the two halves agree, near 0 each is noise. Printed for all weights and for parts of the
model, with the mean over questions of the rewards' standard deviation in a group. A model that does
not look at the image has nothing to select on: of the tiny CRM of before 2026-11-24, which wrote
every category's mean place, all weights together gave 0.02."""

import argparse
import re

import numpy as np
import torch

from crm import load_crm
from data import PROMPTS, fill_prompt, load_samples, to_model
from rewards import reward_terms, total_reward
from sampling import sample as sample_groups
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


def roll_out(crm, prompt, seed):
    """One group of sampled completions."""
    return sample_groups(crm, [prompt], GROUP, TOKENS, seed=[seed])[0]


def log_probability(crm, group):
    """(G, T), differentiable."""
    return logp(crm, group, range(GROUP))


def gradient(crm, sample, seed):
    """The policy gradient of one question's group, a tensor per trainable parameter, and its
    rewards' std."""
    prompt = crm.encode(sample.image, fill_prompt(PROMPTS["reasoning"], sample.query))
    group = roll_out(crm, prompt, seed)
    truth = to_model(sample.bbox, prompt.frame), to_model(sample.points, prompt.frame)
    rewards = torch.tensor(
        [
            total_reward(reward_terms(text, *truth, frame=prompt.frame.model), "soft")
            for text in group.texts
        ]
    )
    weights = token_weights(torch.arange(group.tokens.shape[1]) < group.lengths[:, None])
    gain = (weights * log_probability(crm, group) * group_advantages(rewards[None]).T).sum()
    return torch.autograd.grad(gain, list(crm.trainable().values())), rewards.std().item()


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--crm", default="demo/crm")
    parser.add_argument("--data", default="demo/data")
    parser.add_argument("--questions", type=int, default=64)
    args = parser.parse_args()
    crm = load_crm(args.crm)
    train = load_samples(args.data, "train")
    halves = ({}, {})
    names = list(crm.trainable())
    spread = []
    for k, i in enumerate(
        np.random.default_rng(0).permutation(len(train))[: args.questions].tolist()
    ):
        gradients, std = gradient(crm, train[i], (SEED, i))
        spread.append(std)
        for name, g in zip(names, gradients):
            halves[k % 2][name] = halves[k % 2].get(name, 0) + g
    for part, pattern in PARTS.items():
        a, b = (
            torch.cat([g.flatten() for name, g in half.items() if re.search(pattern, name)])
            for half in halves
        )
        print(
            f"{part:16} {len(a):9,} weights   cosine {torch.cosine_similarity(a, b, dim=0).item():+.3f}"
        )
    print(
        f"standard deviation of a group's rewards, mean over {args.questions} questions: {np.mean(spread):.2f}"
    )


if __name__ == "__main__":
    main()
