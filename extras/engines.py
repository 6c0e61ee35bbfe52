"""The same reward and the same data on verl, EasyR1, TRL and ms-swift, for when one machine is not enough.

    python -m extras.engines --data U-MRG-14K --split train --out train.parquet --resize square:840

One file for all four; it is no data set of ours, its prompts are filled in. Images come in the model frame (give the
model's own --resize and --max-pixels): an engine's processor leaves their size alone, and box and points are pixels of
it. Tags in a question that an engine would read as an image or a special token get a space: "< image>", "< |im_end|>".
Each engine needs its own environment, with this checkout under the same absolute path on every node. mask_dice is
not there: no engine carries masks.

verl 0.9   sh recipes/verl_soft_7b.sh
EasyR1     python -m verl.trainer.main config=examples/config.yaml data.train_files=train.parquet \\
               data.prompt_key=problem data.answer_key=ground_truth data.format_prompt=null data.min_pixels=3136 \\
               data.max_pixels=12845056 worker.reward.reward_function=$PWD/extras/engines.py:easyr1
TRL        GRPOTrainer(MODEL, reward, train_dataset=trl_dataset("train.parquet"), args=GRPOConfig(beta=0.01, delta=3.0,
               loss_type="grpo", num_generations=16, use_bias_correction_kl=False))     # from extras.engines import …
ms-swift   swift rlhf --rlhf_type grpo --model MODEL --external_plugins extras/engines.py \\
               --reward_funcs medreasoner_soft --dataset train.parquet --columns '{"prompt": "messages"}'
"""

import io
import json
import re
import sys
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # engines load this file by its path
from rewards import MODES, reward_terms, total_reward
from runtime.cli import exit_on, flag, parse_args, print0

REWARD_NAME, REWARD_TYPE = (
    "medreasoner",
    "sequential",
)  # EasyR1 reads these: one completion per call
TAG = re.compile(r"<(?=(image|video|audio)>|\|)")


def score(
    text: str,
    ground_truth: str,
    mode: str = "soft",
    weights: dict | None = None,
    official: bool = False,
):
    """(reward, terms) of one completion. ground_truth: JSON {"bbox_2d": [4], "point_2d": [[2], [2]], "frame": [w, h]},
    in pixels of that frame; without "frame", as in U-MRG, of the 840 canvas. ValueError: unknown mode or term."""
    truth = json.loads(ground_truth)
    terms = reward_terms(text, truth["bbox_2d"], truth["point_2d"], official, truth.get("frame"))
    return total_reward(terms, mode, dict(weights or {})), terms


def compute_score(
    data_source, solution_str, ground_truth, extra_info=None, **options
) -> dict[str, float]:
    """verl. options, here and below: mode, weights, official."""
    total, terms = score(solution_str, ground_truth, **options)
    return {"score": total, **terms}


def easyr1(reward_input: dict, **options) -> dict[str, float]:
    total, terms = score(reward_input["response"], reward_input["ground_truth"], **options)
    return {"overall": total, **terms}


def reward(
    completions, ground_truth, mode="soft", weights=None, official=False, **_
) -> list[float]:
    """TRL and ms-swift, a batch: completions are strings, or [{"role", "content"}] each."""
    texts = [
        completion if isinstance(completion, str) else completion[-1]["content"]
        for completion in completions
    ]
    return [
        score(text, truth, mode, weights, official)[0]
        for text, truth in zip(texts, ground_truth, strict=True)
    ]


try:
    from swift.rewards import ORM, orms
except ImportError:
    pass
else:  # under ms-swift: --reward_funcs medreasoner_MODE

    class MedReasoner(ORM):
        def __init__(self, args=None, mode="soft", **options):
            super().__init__(args, **options)
            self.mode = mode

        def __call__(self, completions, ground_truth, **_):
            return reward(completions, ground_truth, self.mode)

    orms.update({f"medreasoner_{mode}": partial(MedReasoner, mode=mode) for mode in MODES})


def rows(samples, template: str, split: str, resize: str, max_pixels: int):
    """One dict per sample with the columns of every engine, the image as PNG in the model frame. BadRow."""
    from PIL import Image

    from data import MIN_PIXELS, Frame, fill_prompt, model_size, to_model

    for index in range(len(samples)):
        sample, png = samples[index], io.BytesIO()
        frame = Frame(
            sample.image.size, model_size(sample.image.size, resize, MIN_PIXELS, max_pixels)
        )
        sample.image.resize(frame.model, Image.Resampling.BICUBIC).save(png, "PNG")
        truth = json.dumps(
            {
                "bbox_2d": to_model(sample.bbox, frame),
                "point_2d": to_model(sample.points, frame),
                "frame": frame.model,
            }
        )
        text = TAG.sub("< ", fill_prompt(template, sample.query))
        names = {
            "id": sample.id,
            "supercategory": sample.supercategory,
            "category": sample.category,
        }
        yield {
            "images": [{"bytes": png.getvalue(), "path": ""}],  # verl, ms-swift:
            "prompt": [{"role": "user", "content": "<image>" + text}],
            "data_source": REWARD_NAME,
            "reward_model": {"style": "rule", "ground_truth": truth},
            "extra_info": {"index": index, "split": split, "question": sample.query, **names},
            "problem": "<image>" + text,
            "ground_truth": truth,  # EasyR1
            "trl_prompt": [{"role": "user", "content": text}],
        }  # TRL adds the image itself


def export(file: Path, source) -> int:
    """Write what `rows` yields -> how many. The file appears whole or not at all."""
    import pyarrow as pa
    from pyarrow.parquet import ParquetWriter

    def some():  # a row group: what a reader has in memory at once
        return list(islice(source, 64))

    table, temporary, count = pa.Table.from_pylist(some()), file.with_name(file.name + ".tmp"), 0
    file.parent.mkdir(parents=True, exist_ok=True)
    try:
        with ParquetWriter(temporary, table.schema) as writer:
            while table.num_rows:
                writer.write_table(table)
                count += table.num_rows
                table = pa.Table.from_pylist(some(), table.schema)
        temporary.replace(file)
    finally:
        temporary.unlink(missing_ok=True)
    return count


def trl_dataset(file: str | Path):
    """An exported file as TRL's train_dataset; images are decoded when asked for."""
    from datasets import Dataset, Image, List

    data = Dataset.from_parquet(str(file)).select_columns(["trl_prompt", "images", "ground_truth"])
    return data.rename_column("trl_prompt", "prompt").cast_column("images", List(Image()))


@dataclass
class Config:
    data: str | None = flag(None, "folder or .parquet file, see data.py")
    split: str = flag("train", "split of --data")
    out: str = flag("required", "the .parquet file to write")
    prompt: str = flag("reasoning", "reasoning, direct, or a text file with {query}")
    resize: str = flag("aspect", "aspect, or square:SIDE")
    max_pixels: int = flag(840 * 840, "largest image, model frame", low=56 * 56)
    skip_bad_rows: bool = flag(False, "leave out rows that cannot be used, and count them")


def main(cfg: Config) -> None:
    from data import OneBox, answers_of, load_prompt, load_samples

    file = Path(cfg.out)
    with exit_on(ValueError, OSError):
        if file.suffix != ".parquet" or file.exists():
            raise ValueError(
                f"--out {file}: {'is there already' if file.exists() else 'give a name in .parquet'}"
            )
        template = load_prompt(cfg.prompt)
        if answers_of(template) is not OneBox:
            raise ValueError(
                f"--prompt {cfg.prompt}: the reward here is of one box; several train with train_grpo.py"
            )
        samples = load_samples(cfg.data, cfg.split, cfg.skip_bad_rows)
        count = export(file, rows(samples, template, cfg.split, cfg.resize, cfg.max_pixels))
    print0(f"{count} questions -> {file}")


if __name__ == "__main__":
    main(parse_args(Config, __doc__, embedded=lambda config: ["data"]))
