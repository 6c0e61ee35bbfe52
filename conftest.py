"""What several test files share: a random tiny Qwen2.5-VL. Tests need neither a GPU nor the network."""
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import pytest
import torch
from PIL import Image

from crm import CHAT
from data import PROMPTS
from demo.make_crm import tiny_crm

TEXTS = [*PROMPTS.values(), *CHAT, "What could the elongated shadow on the left be? 0 1 2 3 4 5 6 7 8 9"] * 3


def random_crm(seed=0, **options):
    """0.3M parameters, float32, spread-out weights so that its distributions are far from uniform."""
    crm = tiny_crm(TEXTS, vocab_size=400, hidden=64, layers=2, heads=4, kv_heads=2, mlp=128, vision_hidden=64,
                   vision_layers=2, vision_heads=4, vision_mlp=128, seed=seed, **options)
    with torch.no_grad():
        for name, p in crm.model.named_parameters():
            if p.ndim > 1:
                p.mul_(4)
    if crm.frozen is not None:
        crm.frozen.load_state_dict(crm.model.state_dict())
    return crm


def noise_image(width, height, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8))


def pytest_collection_modifyitems(items):
    """The longest test first: the other core does the rest meanwhile."""
    items.sort(key=lambda item: "a_minute_of_grpo" not in item.name)


@pytest.fixture(scope="session")
def crm():
    return random_crm()


@pytest.fixture(scope="session")
def prompts(crm):
    """Three prompts with different texts and image sizes."""
    return [crm.encode(noise_image(*size, seed), PROMPTS[kind].replace("{query}", query))
            for seed, (size, kind, query) in enumerate([
                ((112, 84), "reasoning", "What is it?"), ((61, 203), "direct", "Where is the long shadow?"),
                ((140, 140), "reasoning", "Which?")])]
