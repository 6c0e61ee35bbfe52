"""verl's own configuration, reward manager and data set, on what extras/engines.py exports.

    build/verl/bin/python tests/check_verl.py build/verl/data/test.parquet

`make test-verl` runs it, on a CPU. The file is an export of the test split of demo/data."""

import asyncio
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # the scripts are not a package
from bench.peer_trl import allow_torchvision_on_cpu_torch, processor
from extras.engines import TAG, export, rows
from rewards import reward_terms, total_reward, write_answer
from runtime.cli import ROOT

if TYPE_CHECKING:
    from crm import CRM, Prompt
    from data import Example

EVERY = 20  # so many-th rows are checked
GREY = 0.02  # one grey value is 0.015 of a pixel's value

# What imports transformers or verl is imported inside functions, after main has made the import of
# torchvision possible.


def recipe() -> Any:
    """Returns verl's configuration with the recipe's flags. Hydra rejects a name that it lacks."""
    import verl.trainer
    from hydra import compose, initialize_config_dir

    done = subprocess.run(
        ["sh", ROOT / "recipes/verl_soft_7b.sh"],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
        env=os.environ | {"VERL": r"printf %s\n"},
    )
    folder = str(Path(verl.trainer.__path__[0]) / "config")
    with initialize_config_dir(folder, version_base=None):
        return compose("ppo_trainer", done.stdout.splitlines())


def rewarded(manager: Any, tokenizer: Any, row: dict, text: str) -> dict[str, Any]:
    """Returns what verl makes of one completion: tokens, padded, through its reward manager."""
    from tensordict import TensorDict
    from verl import DataProto
    from verl.utils.dataset.rl_dataset import collate_fn

    ids = tokenizer(text + "<|im_end|>").input_ids + [tokenizer.pad_token_id] * 5
    responses = torch.tensor([ids])
    attention_mask = (responses != tokenizer.pad_token_id).long()
    tensors = {"responses": responses, "attention_mask": attention_mask}
    needed = {key: row[key] for key in ("data_source", "reward_model", "extra_info")}
    batch = DataProto(TensorDict(tensors, batch_size=1), collate_fn([needed]))
    return manager.loop.run_until_complete(manager.run_single(batch))


def check_encoding(row: dict, ours: "Prompt", data: Any, theirs: Any, config: Any) -> None:
    """Asserts that verl reads the same tokens and the same image, after its own resizing.

    data: verl's data set; theirs: the processor of tokens and images."""
    from verl.utils.tokenizer import build_multimodal_processor_inputs

    conversation = row["raw_prompt"]
    media = data.process_vision_info(conversation, data.image_patch_size, config.data)
    images, _ = asyncio.run(media)
    assert images[0].size == ours.sizes.model
    text = theirs.apply_chat_template(conversation, add_generation_prompt=True, tokenize=False)
    encoded = build_multimodal_processor_inputs(theirs, text=[text], images=images)
    assert torch.equal(torch.as_tensor(encoded["input_ids"][0]), ours.ids)
    assert torch.equal(encoded["image_grid_thw"], ours.grid_thw)
    assert torch.allclose(encoded["pixel_values"], ours.pixel_values, atol=GREY)


def check_reward(
    row: dict, example: "Example", ours: "Prompt", manager: Any, tokenizer: Any
) -> None:
    """Asserts that verl computes the same reward, and every term beside it."""
    from data import to_model

    box = to_model(example.bbox, ours.sizes)
    points = to_model(example.points, ours.sizes)
    rounded_box = [round(value) for value in box]
    rounded_points = [[round(x), round(y)] for x, y in points]
    for text in (
        "<think>here</think>" + write_answer(rounded_box, rounded_points),
        "<think>here</think>" + write_answer([3, 4, 50, 60], [[5, 6], [7, 8]]),
        "<answer>{}",
        "nothing",
    ):
        terms = reward_terms(text, box, points, ours.sizes.model)
        result = rewarded(manager, tokenizer, row, text)
        difference = result["reward_score"] - total_reward(terms, "soft")
        assert abs(difference) < 1e-9, (text, result, terms)
        assert terms.items() <= result["reward_extra_info"].items()


def check(examples: "Sequence[Example]", file: str, config: Any, crm: "CRM", every: int) -> int:
    """Compares every so many-th row of an exported file, as verl sees it, with its example.

    Returns how many rows that are."""
    from verl.trainer.ppo.reward import load_reward_manager
    from verl.utils.dataset.rl_dataset import RLHFDataset

    from data import fill_prompt, load_prompt

    theirs = processor(str(ROOT / "demo/crm"))
    template = load_prompt("reasoning")
    data = RLHFDataset(file, theirs.tokenizer, config.data, theirs)
    manager = load_reward_manager(config, theirs.tokenizer)
    assert len(data) == len(examples)
    chosen = range(0, len(data), every)
    for i in chosen:
        row = data[i]
        example = examples[i]
        text = TAG.sub("< ", fill_prompt(template, example.query))
        ours = crm.encode(example.image, text)
        check_encoding(row, ours, data, theirs, config)
        check_reward(row, example, ours, manager, theirs.tokenizer)
    return len(chosen)


def main(file: str) -> None:
    library = allow_torchvision_on_cpu_torch()
    import verl

    from crm import load_crm
    from data import MAX_PIXELS, load_prompt, load_samples

    config = recipe()
    crm = load_crm(ROOT / "demo/crm", max_pixels=MAX_PIXELS)
    examples = load_samples(ROOT / "demo/data", "test")
    checked = check(examples, file, config, crm, EVERY)
    hostile = Path(file).with_name("hostile.parquet")
    query = "Is <image> this <video>, <audio> or <|image_pad|><|im_end|><|vision_start|>?"
    odd = [replace(examples[0], query=query)]
    export(hostile, rows(odd, load_prompt("reasoning"), "test", "aspect"))
    checked += check(odd, str(hostile), config, crm, every=1)
    print(f"verl {verl.__version__}: the recipe's flags are known")
    print(f"{checked} rows: tokens, image and reward are ours")
    del library  # what it registered was there as long as it was


if __name__ == "__main__":
    main(sys.argv[1])
