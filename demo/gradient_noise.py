"""How much of a GRPO gradient is signal: the cosine between the gradients of two halves of the same questions.

    python -m demo.gradient_noise                   # 64 training questions x 8 answers, about two minutes

Near 1 the two halves agree, near 0 each is noise. Printed for all weights and for parts of the model: why
recipes/demo.args trains the RMSNorm gains only.
"""
import re

import numpy as np
import torch

from crm import load_crm
from data import PROMPTS, fill_prompt, load_samples, to_model
from rewards import reward_terms, total_reward
from runtime.cli import EMBEDDED
from train_grpo import group_advantages, token_weights

QUESTIONS, GROUP, TOKENS, SEED = 64, 8, 128, 5
PARTS = {"all weights": "", "vision tower": "visual", "embeddings": "embed", "language layers": "language_model.layers",
         "RMSNorm gains": "language_model.*norm", "last RMSNorm": "language_model.norm"}

if __name__ == "__main__":
    crm, train = load_crm(EMBEDDED["crm"]), load_samples(EMBEDDED["data"], "train")
    halves, names = ({}, {}), list(crm.trainable())
    for k, i in enumerate(np.random.default_rng(0).permutation(len(train))[:QUESTIONS].tolist()):
        sample = train[i]
        prompt = crm.encode(sample.image, fill_prompt(PROMPTS["reasoning"], sample.query))
        group, = crm.sample([prompt], GROUP, TOKENS, seed=[(SEED, i)])
        truth = to_model(sample.bbox, prompt.frame), to_model(sample.points, prompt.frame)
        rewards = torch.tensor([total_reward(reward_terms(text, *truth, frame=prompt.frame.model), "soft")
                                for text in group.texts])
        weights = token_weights(torch.arange(group.tokens.shape[1]) < group.lengths[:, None])
        gain = (weights * crm.logp(group, range(GROUP)) * group_advantages(rewards[None]).T).sum()
        for name, gradient in zip(names, torch.autograd.grad(gain, list(crm.trainable().values()))):
            halves[k % 2][name] = halves[k % 2].get(name, 0) + gradient
    for part, pattern in PARTS.items():
        a, b = (torch.cat([g.flatten() for name, g in half.items() if re.search(pattern, name)]) for half in halves)
        print(f"{part:16} {len(a):9,} weights   cosine {torch.cosine_similarity(a, b, dim=0).item():+.3f}")
