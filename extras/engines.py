"""The same reward and the same data on verl, EasyR1, TRL and ms-swift, for when one machine is not
enough.

    python -m extras.engines --data U-MRG-14K --split train --out train.parquet \\
                             --resize square:840
    python -m extras.engines --data U-MRG-14K --out qwen3.parquet --family qwen3_vl

One file serves all four engines. It is no data set of ours, because prompts are filled in. Images
are resized as for the model (give its own --family and --resize), so that an engine's processor
leaves their size alone, and box and points are in the model frame, of --coordinates. Tags in a
question that an engine would read as an image or as a special token get a space: "< image>",
"< |im_end|>".

Each engine needs its own environment, with this checkout under the same absolute path on every
node. The term mask_dice is not there, because no engine carries masks.

verl 0.9
    sh recipes/verl_soft_7b.sh

EasyR1
    python -m verl.trainer.main config=examples/config.yaml \\
        data.train_files=train.parquet data.prompt_key=problem data.answer_key=ground_truth \\
        data.format_prompt=null data.min_pixels=3136 data.max_pixels=12845056 \\
        worker.reward.reward_function=$PWD/extras/engines.py:easyr1

TRL
    from extras.engines import reward, trl_dataset
    args = GRPOConfig(beta=0.01, delta=3.0, loss_type="grpo", num_generations=16,
                      use_bias_correction_kl=False)
    GRPOTrainer(MODEL, reward, train_dataset=trl_dataset("train.parquet"), args=args)

ms-swift
    swift rlhf --rlhf_type grpo --model MODEL --external_plugins extras/engines.py \\
        --reward_funcs medreasoner_soft --dataset train.parquet --columns '{"prompt": "messages"}'
"""

import io
import json
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # engines load this file by its path

import rewards
from rewards import MODES, Terms, total_reward
from runtime.cli import exit_on, flag, parse_args, print0, use_embedded

if TYPE_CHECKING:  # torch and datasets are not imported by the workers that compute rewards
    from datasets import Dataset

    from data import Example

# EasyR1 reads these two: the function gets one completion per call
REWARD_NAME = "medreasoner"
REWARD_TYPE = "sequential"
TAG = re.compile(r"<(?=(image|video|audio)>|\|)")  # what an engine does not read as text
ROW_GROUP = 64  # rows that a reader has in memory at once
MOVED = {"max_pixels": "give --resize aspect:PIXELS"}


# ---------------------------------------------------------------- one reward, in four call shapes


def score(
    text: str,
    ground_truth: str,
    mode: str = "soft",
    coefficients: dict[str, float] | None = None,
    official: bool = False,
) -> tuple[float, Terms]:
    """Returns the reward of one completion, and its terms.

    ground_truth  JSON {"bbox_2d": [4], "point_2d": [[2], [2]], "size": [width, height]}, in a model
                  frame of that size; without "size", as in U-MRG, of the 840 x 840 canvas
    mode          see rewards.MODES
    coefficients  {term: coefficient}, as --coefficients of train_grpo.py
    official      compute the terms as the released code does, see extras/official_rewards.py
    ValueError where the mode or a term is unknown."""
    truth = json.loads(ground_truth)
    box = truth["bbox_2d"]
    points = truth["point_2d"]
    if official:
        from extras import official_rewards

        terms = official_rewards.reward_terms(text, box, points)
    else:
        size = truth.get("size", truth.get("frame"))  # older exports say "frame"
        terms = rewards.reward_terms(text, box, points, size)
    return total_reward(terms, mode, coefficients), terms


def compute_score(
    data_source: str,
    solution_str: str,
    ground_truth: str,
    extra_info: dict[str, Any] | None = None,
    **options: Any,
) -> dict[str, float]:
    """Returns what verl wants of one completion. options: mode, coefficients, official."""
    total, terms = score(solution_str, ground_truth, **options)
    return {"score": total, **terms}


def easyr1(reward_input: dict[str, Any], **options: Any) -> dict[str, float]:
    """Returns what EasyR1 wants of one completion. options: mode, coefficients, official."""
    total, terms = score(reward_input["response"], reward_input["ground_truth"], **options)
    return {"overall": total, **terms}


def reward(
    completions: Sequence[str | list[dict[str, str]]],
    ground_truth: Sequence[str],
    mode: str = "soft",
    coefficients: dict[str, float] | None = None,
    official: bool = False,
    **_: Any,
) -> list[float]:
    """Returns the rewards of a batch, for TRL and ms-swift.

    completions: texts, or conversations [{"role", "content"}] that end with the completion."""
    values = []
    for completion, truth in zip(completions, ground_truth, strict=True):
        text = completion
        if not isinstance(completion, str):
            text = completion[-1]["content"]
        total, _ = score(text, truth, mode, coefficients, official)
        values.append(total)
    return values


try:
    from swift.rewards import ORM, orms
except ImportError:
    pass
else:  # this file runs under ms-swift, which now knows medreasoner_MODE for each mode

    class MedReasoner(ORM):
        """A reward of ms-swift."""

        def __init__(self, args: Any = None, mode: str = "soft", **options: Any) -> None:
            super().__init__(args, **options)
            self.mode = mode

        def __call__(
            self, completions: Sequence[str], ground_truth: Sequence[str], **_: Any
        ) -> list[float]:
            return reward(completions, ground_truth, self.mode)

    for name in MODES:
        orms[f"medreasoner_{name}"] = partial(MedReasoner, mode=name)


# ---------------------------------------------------------------- the data


def rows(
    examples: "Sequence[Example]",
    template: str,
    split: str,
    resize: str,
    coordinates: str = "pixels",
    stride: int = 28,
) -> Iterator[dict[str, Any]]:
    """Yields one dict per example, with the columns of every engine and the resized image as PNG.

    template: of the prompt, see data.load_prompt; resize, stride: see data.model_size; coordinates:
    of data.COORDINATES. BadRow where an example cannot be used."""
    from PIL import Image

    from data import Sizes, fill_prompt, model_size, to_model

    for index in range(len(examples)):
        example = examples[index]
        size = model_size(example.image.size, resize, stride=stride)
        sizes = Sizes(example.image.size, (1000, 1000) if coordinates == "norm1000" else size)
        resized = example.image.resize(size, Image.Resampling.BICUBIC)
        png = io.BytesIO()
        resized.save(png, "PNG")
        truth = {
            "bbox_2d": to_model(example.bbox, sizes),
            "point_2d": to_model(example.points, sizes),
            "size": sizes.model,
        }
        ground_truth = json.dumps(truth)
        text = TAG.sub("< ", fill_prompt(template, example.query, coordinates))
        about = {
            "index": index,
            "split": split,
            "question": example.query,
            "id": example.id,
            "supercategory": example.supercategory,
            "category": example.category,
        }
        yield {
            # verl, ms-swift; an engine that finds a file of a name in "path" would read that
            "images": [{"bytes": png.getvalue(), "path": ""}],
            "prompt": [{"role": "user", "content": "<image>" + text}],
            "data_source": REWARD_NAME,
            "reward_model": {"style": "rule", "ground_truth": ground_truth},
            "extra_info": about,
            # EasyR1
            "problem": "<image>" + text,
            "ground_truth": ground_truth,
            # TRL, which adds the image itself
            "trl_prompt": [{"role": "user", "content": text}],
        }


def export(file: Path, source: Iterable[dict[str, Any]]) -> int:
    """Writes what `rows` yields. Returns how many rows there are.

    Where it fails there is no file."""
    import pyarrow as pa
    from pyarrow.parquet import ParquetWriter

    left = iter(source)
    table = pa.Table.from_pylist(list(islice(left, ROW_GROUP)))
    temporary = file.with_name(file.name + ".tmp")
    file.parent.mkdir(parents=True, exist_ok=True)
    count = 0
    try:
        with ParquetWriter(temporary, table.schema) as writer:
            while table.num_rows > 0:
                writer.write_table(table)
                count += table.num_rows
                table = pa.Table.from_pylist(list(islice(left, ROW_GROUP)), table.schema)
        temporary.replace(file)
    finally:
        temporary.unlink(missing_ok=True)
    return count


def trl_dataset(file: str | Path) -> "Dataset":
    """Returns an exported file as TRL's train_dataset. Images are decoded when asked for."""
    from datasets import Dataset, Image, List

    columns = ["trl_prompt", "images", "ground_truth"]
    data = Dataset.from_parquet(str(file)).select_columns(columns)
    return data.rename_column("trl_prompt", "prompt").cast_column("images", List(Image()))


# ---------------------------------------------------------------- the command


@dataclass
class Config:
    data: str | None = flag(None, "folder or .parquet file, see data.py")
    split: str = flag("train", "split of --data")
    out: str = flag("required", "the .parquet file to write")
    prompt: str = flag(
        "reasoning", "reasoning, direct, a text file with {query}, or the text itself"
    )
    family: str = flag("qwen2_5_vl", "model_type in the model's config.json, see crm.FAMILIES")
    resize: str = flag("aspect", "aspect, aspect:MAX_PIXELS or square:SIDE")
    coordinates: str | None = flag(
        None, "see data.COORDINATES (default: as the family was taught)", ("pixels", "norm1000")
    )
    skip_bad_rows: bool = flag(False, "leave out rows that cannot be used, and count them")


def main(cfg: Config) -> None:
    from data import EMBEDDED, answer_format_of, load_prompt, load_samples
    from runtime.pretrained import FAMILIES

    use_embedded(cfg, {"data": EMBEDDED["data"]})
    file = Path(cfg.out)
    with exit_on(ValueError, OSError):
        if file.suffix != ".parquet":
            raise ValueError(f"--out {file}: give a name in .parquet")
        if file.exists():
            raise ValueError(f"--out {file}: is there already")
        if cfg.family not in FAMILIES:
            raise ValueError(f"--family {cfg.family}: not one of {', '.join(FAMILIES)}")
        family = FAMILIES[cfg.family]
        coordinates = cfg.coordinates or family.coordinates
        template = load_prompt(cfg.prompt)
        if answer_format_of(template).several:
            raise ValueError(
                f"--prompt {cfg.prompt}: the reward here is of one box; several train with "
                "train_grpo.py"
            )
        examples = load_samples(cfg.data, cfg.split, cfg.skip_bad_rows)
        source = rows(examples, template, cfg.split, cfg.resize, coordinates, family.stride)
        count = export(file, source)
    print0(f"{count} questions -> {file}")


if __name__ == "__main__":
    main(parse_args(Config, __doc__, moved=MOVED))
