"""See groups of completions learn: rollouts.jsonl of a training run as one HTML page.

    python -m extras.rollouts runs/demo          # writes runs/demo/rollouts.html

The page stands alone: pictures, styles and script are inside, it asks no network for anything. A line of rollouts.jsonl
is one group of one step: what metrics.prediction returns (boxes and points in the image frame), and of each completion
also its reward, advantage, terms, length and whether it finished. Groups of the split "test" are of the same prompts,
drawn with the same random numbers, at each step, so that only the weights differ; those of "train" are the step's own.
"""

import base64
import io
import json
import math
from argparse import RawDescriptionHelpFormatter
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

from data import clip_to, load_samples
from metrics import iou, prediction
from rewards import MODES, reward_formula
from runtime.cli import Parser, exit_on, parse_weights
from runtime.files import parse_object, read_jsonl, read_text, write_whole
from runtime.parallel import Ranks, unsharded
from runtime.step import spread

PAGE = Path(__file__).with_suffix(".html")
SIDE = {"test": 640, "train": 400}  # pixels of the longer side of a picture


# ---------------------------------------------------------------- while training: runtime/run.py


def fixed_prompts(samples, need_mask: bool, most: int = 4) -> list[int]:
    """Indexes of up to `most` samples, spread evenly; need_mask: only of those that have one."""
    usable = [i for i in range(len(samples)) if not need_mask or samples[i].mask is not None]
    n = min(most, len(usable))
    return [usable[len(usable) * k // n] for k in range(n)]


def group_rows(step: int, cfg, ranks: Ranks, crm, tests, roll_out, advantages, own) -> list[dict]:
    """One row per group: of the fixed held-out prompts, with the same random numbers at every step, and of the step's
    first two. Every rank takes part. roll_out, advantages: train_grpo's; own: this rank's (place, Rollout)."""
    fixed = fixed_prompts(tests, need_mask="mask_dice" in cfg.weights)
    places = list(range(len(fixed)))[ranks.rank :: ranks.world]
    with unsharded(crm):
        groups = roll_out(places, fixed, 0, split=tests)
    for group in groups:
        group.advantages = advantages(group.rewards[None], cfg.norm)[0]
    how = cfg.official, crm.answers
    rows = [group_row(step, "test", p, group, *how) for p, group in zip(places, groups)]
    rows += [group_row(step, "train", p, group, *how) for p, group in own if p < 2]
    return sorted(ranks.gather(rows), key=lambda row: (row["split"], row["index"]))


def group_row(step: int, split: str, place: int, rollout, official: bool, answers) -> dict:
    """A Rollout as a line of rollouts.jsonl. place: its number among the groups of its split."""
    row = prediction(rollout.sample, place, rollout.texts, rollout.prompt.frame, official, answers)
    columns = {
        "reward": rollout.rewards,
        "advantage": rollout.advantages,
        "length": rollout.lengths,
        "finished": rollout.finished,
    }
    for g, completion in enumerate(row["completions"]):
        completion |= {name: values[g].item() for name, values in columns.items()} | {
            "terms": rollout.terms[g]
        }
    return {"step": step, "split": split, **row}


# ---------------------------------------------------------------- afterwards: the page


def page(folder: Path, most_steps: int = 60) -> str:
    """rollouts.html of a run folder. ValueError, one line, where there is nothing to show."""
    file, config = folder / "rollouts.jsonl", folder / "config.json"
    rows, groups = read_jsonl(file), []
    if not rows:
        raise ValueError(
            f"{folder}: no rollouts.jsonl with a line in it; train_grpo.py writes it at each evaluation"
        )
    flags = parse_object(read_text(config), config)
    with written_by_training(config):
        weights, norm = parse_weights(flags["weights"]), flags["norm"]
        formula, _ = reward_formula(flags["mode"], weights)
        factors = dict.fromkeys(MODES[flags["mode"]], 1.0) | weights
        sources = {"test": flags["test_data"] or flags["data"], "train": flags["data"]}
    for number, row in enumerate(rows, 1):
        with written_by_training(f"{file}, line {number}"):
            groups.append(group(row, factors))
    steps = sorted({group["step"] for group in groups})
    kept = {
        steps[i]
        for i in np.linspace(0, len(steps) - 1, min(most_steps, len(steps))).round().astype(int)
    }
    groups = [group for group in groups if group["step"] in kept]
    data = {
        "run": folder.name,
        "formula": formula,
        "norm": norm,
        "steps": sorted(kept),
        "weights": {name: factor for name, factor in factors.items() if factor},
        "pictures": pictures(groups, sources),
        "groups": groups,
    }
    text = json.dumps(data, separators=(",", ":"), ensure_ascii=False)
    # inside <script>, "<" could end the script; as "\u003c" it is the same JSON, whatever a completion says
    return read_text(PAGE).replace("{{DATA}}", text.replace("<", "\\u003c"))


@contextmanager
def written_by_training(where):
    """A key that is missing or not what it should be, in a file of another program, becomes one line."""
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise ValueError(
            f"{where}: not as train_grpo.py writes it ({type(error).__name__}: {error}); give the folder "
            "of one of its runs"
        ) from None


def group(row: dict, factors: dict[str, float]) -> dict:
    """What the page shows of a line of rollouts.jsonl, numbers rounded."""
    completions, rewards = (
        row["completions"],
        torch.tensor([c["reward"] for c in row["completions"]]),
    )
    summary = {
        "mean": rewards.mean().item(),
        "best": max(iou(row, c) for c in completions),
        "parsed": sum(not c["problem"] for c in completions) / len(completions),
        **spread(rewards, [c["text"] for c in completions]),
    }
    kept = [
        {key: c[key] for key in ("text", "problem", "reward", "advantage", "length", "finished")}
        | {key: c[key] and clip_to(row["size"], c[key]) for key in ("bbox", "points")}
        | {"iou": iou(row, c)}
        | {"terms": {name: c["terms"][name] for name, factor in factors.items() if factor}}
        for c in completions
    ]
    shown = {key: row[key] for key in ("split", "index", "size", "query", "category", "truth")}
    return rounded(
        shown
        | {"step": int(row["step"]), "id": str(row["id"]), "summary": summary, "completions": kept}
    )


def rounded(value):
    """Floats anywhere in JSON to four decimals; None for what JSON does not have."""
    if isinstance(value, float):
        return round(value, 4) if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    return [rounded(item) for item in value] if isinstance(value, (list, tuple)) else value


def pictures(groups: list[dict], sources: dict[str, str]) -> dict[str, str]:
    """{"split/id": JPEG as a data URI} of every group's image; without its data there is none, and a line says so.
    sources: {split: its data set}."""
    found, missing = {}, ""
    for split, side in SIDE.items():
        wanted = {group["id"] for group in groups if group["split"] == split}
        try:
            samples = load_samples(sources[split], split) if wanted else []
            for i, name in enumerate(samples.ids() if wanted else []):
                if name in wanted:
                    found[f"{split}/{name}"] = data_uri(samples[i].image, side)
        except (OSError, ValueError) as error:
            missing = missing or str(error)
    if missing:
        print(f"some groups have no picture: {missing}")
    return found


def data_uri(image, side: int) -> str:
    small = image.copy()
    small.thumbnail((side, side))
    small.save(buffer := io.BytesIO(), format="JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def main(argv: list[str] | None = None) -> None:
    parser = Parser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="of a run of train_grpo.py")
    parser.add_argument(
        "--most-steps",
        type=int,
        default=60,
        help="of a longer run, as many steps, evenly spread (60)",
    )
    args = parser.parse_args(argv)
    if args.most_steps < 1:
        parser.error(f"--most-steps {args.most_steps}: must be at least 1")
    with exit_on(ValueError, OSError):
        out = args.folder / "rollouts.html"
        write_whole(out, page(args.folder, args.most_steps))
    print(f"{out}, {out.stat().st_size / 1e6:.1f} MB: open it in a browser")


if __name__ == "__main__":
    main()
