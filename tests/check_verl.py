"""verl's own configuration, reward manager and data set, on what extras/engines.py exports (make test-verl; CPU).

build/verl/bin/python tests/check_verl.py build/verl/data/test.parquet      # an export of demo/data's test split
"""

import asyncio
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from bench.peer_trl import allow_torchvision_on_cpu_torch, processor

library = allow_torchvision_on_cpu_torch()
import torch
import verl.trainer
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from tensordict import TensorDict
from verl import DataProto
from verl.trainer.ppo.reward import load_reward_manager
from verl.utils.dataset.rl_dataset import RLHFDataset, collate_fn
from verl.utils.tokenizer import build_multimodal_processor_inputs

from crm import load_crm
from data import MAX_PIXELS, fill_prompt, load_prompt, load_samples, to_model
from extras.engines import TAG, export, rows
from rewards import reward_terms, total_reward, write_answer
from runtime.cli import ROOT


def recipe() -> OmegaConf:
    """verl's configuration with the recipe's flags; hydra refuses a name that it does not have."""
    flags = subprocess.run(
        ["sh", ROOT / "recipes/verl_soft_7b.sh"],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
        env=os.environ | {"VERL": r"printf %s\n"},
    ).stdout.splitlines()
    with initialize_config_dir(str(Path(verl.trainer.__path__[0]) / "config"), version_base=None):
        return compose("ppo_trainer", flags)


def rewarded(manager, tokenizer, row: dict, text: str) -> dict:
    """What verl makes of one completion: tokens, padded, through its reward manager."""
    ids = torch.tensor(tokenizer(text + "<|im_end|>").input_ids + [tokenizer.pad_token_id] * 5)[
        None
    ]
    tensors = TensorDict(
        {"responses": ids, "attention_mask": (ids != tokenizer.pad_token_id).long()}, batch_size=1
    )
    columns = collate_fn([{key: row[key] for key in ("data_source", "reward_model", "extra_info")}])
    return manager.loop.run_until_complete(manager.run_single(DataProto(tensors, columns)))


def check(samples, file: str, config, crm, every: int) -> int:
    """Every so many-th row of an exported file, as verl sees it, against the samples it was made of."""
    theirs, template = processor(str(ROOT / "demo/crm")), load_prompt("reasoning")
    data = RLHFDataset(file, theirs.tokenizer, config.data, theirs)
    manager = load_reward_manager(config, theirs.tokenizer)
    assert len(data) == len(samples)
    for i in range(0, len(data), every):
        row, sample = data[i], samples[i]
        ours = crm.encode(sample.image, TAG.sub("< ", fill_prompt(template, sample.query)))

        # the same tokens and the same image as ours, after verl's own resizing
        images, _ = asyncio.run(
            data.process_vision_info(row["raw_prompt"], data.image_patch_size, config.data)
        )
        assert images[0].size == ours.frame.model
        text = theirs.apply_chat_template(
            row["raw_prompt"], add_generation_prompt=True, tokenize=False
        )
        encoded = build_multimodal_processor_inputs(theirs, text=[text], images=images)
        assert torch.equal(torch.as_tensor(encoded["input_ids"][0]), ours.ids)
        assert torch.equal(encoded["image_grid_thw"], ours.grid_thw)
        assert torch.allclose(
            encoded["pixel_values"], ours.pixel_values, atol=0.02
        )  # one grey value is 0.015

        # the same reward, and every term beside it
        box, points = (to_model(xy, ours.frame) for xy in (sample.bbox, sample.points))
        for text in (
            "<think>here</think>"
            + write_answer([round(v) for v in box], [map(round, p) for p in points]),
            "<think>here</think>" + write_answer([3, 4, 50, 60], [[5, 6], [7, 8]]),
            "<answer>{}",
            "nothing",
        ):
            terms = reward_terms(text, box, points, frame=ours.frame.model)
            result = rewarded(manager, theirs.tokenizer, row, text)
            assert abs(result["reward_score"] - total_reward(terms, "soft")) < 1e-9, (
                text,
                result,
                terms,
            )
            assert terms.items() <= result["reward_extra_info"].items()
    return len(range(0, len(data), every))


def main(file: str) -> None:
    config, crm = recipe(), load_crm(ROOT / "demo/crm", max_pixels=MAX_PIXELS)
    samples = load_samples(ROOT / "demo/data", "test")
    checked = check(samples, file, config, crm, every=20)
    hostile = Path(file).with_name("hostile.parquet")
    query = "Is <image> this <video>, <audio> or <|image_pad|><|im_end|><|vision_start|>?"
    samples = [replace(samples[0], query=query)]
    export(hostile, rows(samples, load_prompt("reasoning"), "test", "aspect", MAX_PIXELS))
    checked += check(samples, str(hostile), config, crm, every=1)
    print(
        f"verl {verl.__version__}: the recipe's flags are known; {checked} rows: tokens, image and reward are ours"
    )


if __name__ == "__main__":
    main(sys.argv[1])
