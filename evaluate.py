"""Score a split as the paper's tables do (arXiv 2508.08177, section 5), with counts and intervals.

    python evaluate.py --crm runs/demo/step_000080 --out eval/demo    # --samples 8: voting, pass@8
    torchrun --nproc-per-node 8 evaluate.py @recipes/eval_7b.args --data U-MRG-14K
    python evaluate.py --predictions gpt.jsonl --frame norm1000 --out eval/gpt    # of another model
    python evaluate.py --rescore eval/demo                            # the tables again, without any model
    python evaluate.py --compare eval/sft eval/grpo                   # paired differences
    python evaluate.py --oracle eval/demo --out eval/oracle           # whose loss it is, see extras/oracle.py

Writes predictions.jsonl (all that scoring needs), summary.json, table.md and examples.png into --out. An interrupted
evaluation resumes. Every number is a mean over questions with its 95 % bootstrap interval. A new metric is one line of
METRICS; --rescore computes it on old runs.

A refusal is a completion with a problem, so refusals are 1 - parse rate. What can still be read of it is scored (a good
box beside malformed points); what cannot be read scores 0. Coordinates are scored as they were written; they are
clipped only for the segmenter and the pictures.

A line of a file of --predictions (python -m extras.predictions; ids: python data.py PATH), or "text" for a completion:
    {"id": "mine-3", "bbox": [30, 40, 90, 95], "points": [[50, 60], [70, 80]]}

Differences from the paper: a true pDice beside its 2I/U; intervals; the mask from points, from the box and from both of
one and the same completion.
"""

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from asm import load_asm
from crm import load_crm
from data import BadRow, load_prompt, load_samples
from extras import tables
from extras.predictions import encode_mask, finished, from_file, in_order, read_predictions, shown
from extras.several import add_siblings
from metrics import QUESTION_METRICS, ask, iou, mask_dice, mean, parsed, pdice, united_mask
from runtime.cli import EMBEDDED, ModelConfig, exit_on, flag, parse_args, print0
from runtime.files import write_whole
from runtime.parallel import Ranks

# what the segmenter is given of a completion: whether the box, and how many points
GIVEN = {"points": (False, 2), "box": (True, 0), "one": (True, 1), "both": (True, 2)}


@dataclass
class Config(ModelConfig):
    data: str | None = flag(None, "folder or .parquet file, see data.py")
    asm: str | None = flag(None, "segmenter for the mask's Dice, or none")
    split: str = flag("test", "split of --data")
    limit: int = flag(0, "questions used (0: all)", low=0)
    out: str = flag("eval", "folder for predictions.jsonl, summary.json, table.md, examples.png")
    skip_bad_rows: bool = flag(False, "leave out rows that cannot be used, and count them")
    # instead of a model
    predictions: str | None = flag(None, "completions of another model, a .jsonl file, see above")
    frame: str = flag("pixels", "the frame of --predictions", ("pixels", "norm1000", "model"))
    rescore: str | None = flag(None, "an --out folder: compute its tables again")
    compare: tuple[str, str] | None = flag(None, "two --out folders: what the second changes")
    oracle: str | None = flag(
        None, "true prompts to masks, no CRM; of an --out folder: whose loss it is", bare="alone"
    )
    # completions
    samples: int = flag(1, "completions per question", low=1)
    temperature: float | None = flag(
        None,
        "of sampling; 0 takes the most likely token (default: 0 for one completion "
        "per question, else 1)",
        low=0,
    )
    max_new_tokens: int = flag(512, "longest completion in tokens", low=1)
    batch: int = flag(0, "questions encoded at once (0: 64 on CUDA, else 16)", low=0)


# ---------------------------------------------------------------- metrics and tables


def over_ious(p: dict, function, at_least: int = 1) -> float | None:
    """function of the completions' IoUs; None where no box was asked for, or of too few completions."""
    ious = [iou(p, completion) for completion in p["completions"]]
    return None if None in ious or len(ious) < at_least else float(function(ious))


METRICS = (
    QUESTION_METRICS
    | {  # name: (title, function of a line of predictions.jsonl; None where undefined)
        "iou50": (
            "IoU ≥ 0.5",
            lambda p: over_ious(p, lambda ious: np.mean([v >= 0.5 for v in ious])),
        ),
        "pdice_2iu": ("pDice (2I/U)", lambda p: mean(p, lambda p, c: pdice(p, c, published=True))),
        "dice_points": ("Dice, points", lambda p: p["dice"] and p["dice"]["points"]),
        "dice_box": ("Dice, box", lambda p: p["dice"] and p["dice"]["box"]),
        "dice_one": ("Dice, box and 1 point", lambda p: p["dice"] and p["dice"]["one"]),
        "dice_both": ("Dice, box and points", lambda p: p["dice"] and p["dice"]["both"]),
        "refused": ("refusals", lambda p: 1 - mean(p, parsed)),
        "voted": (
            "IoU, voted",
            lambda p: over_ious(p, lambda v: 0 if p["kept"] is None else v[p["kept"]], 2),
        ),
        "best": ("IoU, best of N", lambda p: over_ious(p, max, 2)),
        "pass": ("pass@N", lambda p: over_ious(p, lambda ious: max(ious) >= 0.5, 2)),
    }
)


def scores(p: dict) -> dict[str, float | None]:
    """Every metric of a line of predictions.jsonl."""
    return {key: metric(p) for key, (_, metric) in METRICS.items()}


# ---------------------------------------------------------------- predictions


def segment(asm, sample, completion: dict, kind: str) -> np.ndarray:
    """The mask from those parts of a completion that GIVEN[kind] names, (H, W) bool; empty if it has none. Of
    several boxes, the masks united."""
    use_box, n_points = GIVEN[kind]
    parts = [
        (part["bbox"] if use_box else None, (part["points"] or ())[:n_points])
        for part in completion.get("regions", [completion])
    ]
    return united_mask(asm, np.asarray(sample.image), parts)[0]


def add_masks(p: dict, sample, asm) -> dict:
    """Masks of the kept completion: the Dice of each kind in GIVEN, and the mask from its box and points."""
    p["dice"], p["mask"] = None, None
    p["truth"]["mask"] = None if sample.mask is None else encode_mask(sample.mask)
    if asm:
        masks = {kind: segment(asm, sample, shown(p), kind) for kind in GIVEN}
        p["mask"] = encode_mask(masks["both"]) if masks["both"].any() else None
        if sample.mask is not None:
            p["dice"] = {kind: mask_dice(mask, sample.mask) for kind, mask in masks.items()}
    return p


def from_model(cfg: Config, samples, asm, ranks: Ranks) -> list[dict]:
    """A CRM's predictions, one for each sample, in order; ValueError if some are missing or doubled. Each rank appends
    its own to a file in --out, so that an interruption loses one batch."""
    out = Path(cfg.out)
    # one rank looks at what an earlier run left, before any rank appends: all must partition the same list
    done = set(ranks.gather([row["index"] for row in finished(out)] if ranks.rank == 0 else []))
    todo = [i for i in range(len(samples)) if i not in done][ranks.rank :: ranks.world]
    if todo:
        crm = load_crm(
            cfg.crm,
            ranks.device,
            ranks.dtype(cfg.dtype),
            resize=cfg.resize,
            min_pixels=cfg.min_pixels,
            max_pixels=cfg.max_pixels,
            prompt=cfg.prompt,
        )
        temperature = float(cfg.samples > 1) if cfg.temperature is None else cfg.temperature
        answered = ask(
            crm,
            samples,
            todo,
            {"": (cfg.samples, temperature)},
            cfg.max_new_tokens,
            cfg.seed,
            cfg.batch,
        )
        with open(out / f"part-{ranks.rank}.jsonl", "a") as file:
            for _, sample, _, p in tqdm(
                answered, total=len(todo), disable=ranks.rank > 0, ncols=100
            ):
                file.write(json.dumps(add_masks(p, sample, asm)) + "\n")
                file.flush()
    ranks.wait()
    rows = add_siblings(in_order(finished(out), len(samples), out))
    ranks.wait()  # rank 0 removes the parts: not before all have read them
    return rows


def main(cfg: Config) -> None:
    with exit_on(ValueError, OSError):
        if cfg.frame != "pixels" and not cfg.predictions:
            raise ValueError(
                f"--frame {cfg.frame} is the frame of a file of --predictions: give that, or no --frame"
            )
        if cfg.compare:
            from extras.compare import compare

            return compare(*cfg.compare, METRICS)
        if cfg.rescore:
            return tables.report(read_predictions(cfg.rescore), METRICS, Path(cfg.rescore))
        ranks, out, start = Ranks.start(), Path(cfg.out), time.perf_counter()
        load_prompt(cfg.prompt or "reasoning")  # a wrong one is an error before anything is written
        if cfg.predictions and ranks.world > 1:
            raise ValueError(
                "--predictions needs no model: run it in one process, without torchrun"
            )
        samples = load_samples(cfg.data, cfg.split, cfg.skip_bad_rows)[: cfg.limit or None]
        samples.check()
        asm = None if cfg.asm == "none" else load_asm(cfg.asm, ranks.device)
        config, settings = out / "config.json", json.dumps(asdict(cfg), indent=2) + "\n"
        if config.exists() and config.read_text() != settings:
            raise ValueError(
                f"--out {out}: an evaluation with other flags is in there; give another --out"
            )
        if cfg.oracle:
            from extras.oracle import oracle

            return oracle(cfg, samples, asm, ranks)
        rows = cfg.predictions and [
            add_masks(p, samples[p["index"]], asm) for p in from_file(cfg, samples)
        ]
        ranks.wait()  # nobody writes before all have looked
        if ranks.rank == 0:
            out.mkdir(parents=True, exist_ok=True)
            write_whole(config, settings)
        rows = rows or from_model(cfg, samples, asm, ranks)
        if ranks.rank == 0:
            write_whole(out / "predictions.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
            for path in out.glob("part-*.jsonl"):
                path.unlink()
            tables.report(rows, METRICS, out)
            from extras.pictures import examples

            examples(rows, samples, out / "examples.png")
            print0(f"examples {out / 'examples.png'}, {time.perf_counter() - start:.0f} s in all")
        ranks.stop()


def needs(cfg: Config) -> list[str]:
    """Which embedded defaults a command line may fall back on."""
    model = cfg.frame == "model" if cfg.predictions else not cfg.oracle
    return (
        [] if cfg.rescore or cfg.compare else [name for name in EMBEDDED if name != "crm" or model]
    )


if __name__ == "__main__":
    with exit_on(BadRow):
        main(parse_args(Config, __doc__, embedded=needs))
