"""Score a split as the paper's tables do (arXiv 2508.08177, section 5), with counts and intervals.

    python evaluate.py --crm runs/demo/step_000080 --out eval/demo
    torchrun --nproc-per-node 8 evaluate.py @recipes/eval_7b.args --data U-MRG-14K
    python evaluate.py --completions 8 …               # voting and pass@8
    python evaluate.py --rescore eval/demo             # the tables again, without any model
    python evaluate.py --compare eval/sft eval/grpo    # paired differences

Writes predictions.jsonl (all that scoring needs), summary.json, table.md and examples.png into
--out. An interrupted evaluation goes on where it stopped. What is measured is in metrics.py.

A refusal is a completion with a problem, so the share of refusals is 1 - the parse rate.
Coordinates are scored as they were written; they are clipped only for the segmenter and the
pictures.

Differences from the paper: a true pDice is reported with its 2I/U, numbers have intervals, and
masks are drawn from the points, the box, and both, of the same completion.
"""

import hashlib
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

import metrics
from asm import ASM, load_asm, overlay, segment_regions
from crm import CRM, Group, load_crm
from data import TAUGHT, BadRow, Example, Examples, clip_to, load_samples
from rewards import PIXEL_TERMS, total_reward
from runtime.cli import exit_on, flag, parse_args, print0, use_embedded
from runtime.files import parse_object, read_jsonl, read_text, write_whole
from runtime.parallel import Ranks
from runtime.pictures import Picture, grid
from runtime.pretrained import file_of
from runtime.run import Run
from sampling import EVALUATION, default_temperature, sample

EVAL_COMPLETIONS = 4  # per held-out question while training, sampled as in training
CHANGE_NOTHING = ("out", "batch", "rescore", "compare")  # flags that no result depends on
EXAMPLES_SHOWN = 12  # questions in examples.png
# what the segmenter is given of a completion: whether the box, and how many points
GIVEN = {"points": (False, 2), "box": (True, 0), "one": (True, 1), "both": (True, 2)}


@dataclass
class Config:
    # model
    crm: str | None = flag(None, "Qwen2.5-VL or Qwen3-VL, folder or hub name")
    asm: str | None = flag(None, "segmenter for the mask's Dice, or none")
    prompt: str | None = flag(
        None, "reasoning, direct, boxes, a text file with {query}, or the text itself"
    )
    resize: str | None = flag(None, "aspect, aspect:MAX_PIXELS or square:SIDE")
    coordinates: str | None = flag(None, "see data.COORDINATES", ("pixels", "norm1000"))
    dtype: str = flag(
        "auto", "compute type; auto is bfloat16 on CUDA", ("auto", "float32", "bfloat16")
    )
    # data
    data: str | None = flag(None, "folder or .parquet file, see data.py")
    split: str = flag("test", "split of --data")
    limit: int = flag(0, "questions, the first ones (0: all)", low=0)
    skip_bad_rows: bool = flag(False, "leave out rows that cannot be used, and count them")
    # completions
    completions: int = flag(1, "completions per question", low=1)
    temperature: float | None = flag(
        None, "of sampling (default: 0, the most likely token, for one completion, else 1)", low=0
    )
    max_new_tokens: int = flag(512, "longest completion in tokens", low=1)
    batch: int = flag(0, "questions encoded at once (0: 64 on CUDA, else 16)", low=0)
    seed: int = flag(0, "seed of every random choice", low=0)
    # results
    out: str = flag("eval", "folder for predictions.jsonl, summary.json, table.md, examples.png")
    rescore: str | None = flag(None, "an --out folder: compute its tables again")
    compare: tuple[str, str] | None = flag(None, "two --out folders: what the second changes")


# ---------------------------------------------------------------- asking the model


def ask(
    crm: CRM,
    examples: Examples,
    indexes: Sequence[int],
    kinds: dict[str, tuple[int, float]],
    max_new_tokens: int,
    seed: int,
    batch: int = 0,
) -> Iterator[tuple[str, Example, Group, dict]]:
    """Puts questions to the CRM. Yields (kind, example, group, prediction) for each of them and for
    each kind.

    kinds  {name: (completions per question, temperature)}; temperature 0 takes the most likely
           token. A prompt is encoded once for all kinds
    batch  questions encoded at once; 0: 64 on CUDA, else 16"""
    if batch == 0:
        batch = 64 if crm.device.type == "cuda" else 16
    for start in range(0, len(indexes), batch):
        part = indexes[start : start + batch]
        chosen = [examples[i] for i in part]
        prompts = [crm.prompt_of(example) for example in chosen]
        for kind, (completions, temperature) in kinds.items():
            seeds = [(seed, EVALUATION, i) for i in part]
            groups = sample(crm, prompts, completions, max_new_tokens, temperature, seeds)
            if start == 0:
                crm.check_coordinates(chosen, groups)
            for i, example, group in zip(part, chosen, groups):
                sizes = group.prompt.sizes
                p = metrics.prediction(example, i, group.texts, sizes, crm.answer_format)
                yield kind, example, group, p


# ---------------------------------------------------------------- while training


def held_out(
    crm: CRM,
    examples: Examples,
    kinds: dict[str, tuple[int, float]],
    mode: str,
    coefficients: dict[str, float],
    ranks: Ranks,
    max_new_tokens: int = 512,
) -> list[dict]:
    """Returns one row per kind and question, in that order: kind, index, id, image, wording, the
    scores of metrics.HELD_OUT and of the answer format, and the mean reward (model frame, without
    terms that need pixels).

    kinds: see `ask`. Every rank asks its share; all get all rows."""
    no_pixels = dict.fromkeys(PIXEL_TERMS, 0.0)  # the segmenter is not asked here
    own = range(len(examples))[ranks.rank :: ranks.world]
    order = list(kinds)
    rows = []
    for kind, example, group, p in ask(crm, examples, own, kinds, max_new_tokens, seed=0):
        rewards = []
        for text in group.texts:
            terms = crm.answer_format.reward_terms(text, example, group.prompt.sizes)
            rewards.append(total_reward(no_pixels | terms, mode, coefficients | no_pixels))
        row = {key: p[key] for key in ("index", "id", "image", "wording")}
        row |= metrics.scores(p, metrics.HELD_OUT | crm.answer_format.metrics)
        row["reward"] = sum(rewards) / len(rewards)
        rows.append({"kind": kind, **row})
    rows = ranks.gather(rows)
    return sorted(rows, key=lambda row: (order.index(row["kind"]), row["index"]))


def held_out_means(rows: list[dict]) -> dict[str, float]:
    """Returns {"sampled/iou": …} over the rows of `held_out`, without scores that no row has."""
    values: dict[str, list[float]] = {}
    for row in rows:
        for name in metrics.score_names(rows):
            if row[name] is not None:
                values.setdefault(f"{row['kind']}/{name}", []).append(row[name])
    return {name: sum(scores) / len(scores) for name, scores in values.items()}


def log_held_out(
    run: Run,
    crm: CRM,
    examples: Examples,
    cfg: Any,
    coefficients: dict[str, float],
    step: int,
    greedy: bool,
) -> dict[str, float]:
    """Evaluates held-out questions, sampled as in training and, if asked, greedy. Writes a row for
    each to held_out.jsonl, prints the means and returns them.

    cfg: the Config of a trainer."""
    kinds = {"sampled": (EVAL_COMPLETIONS, cfg.temperature)}
    if greedy:
        kinds["greedy"] = (1, 0.0)
    with crm.gathered():
        rows = held_out(crm, examples, kinds, cfg.mode, coefficients, run.ranks, cfg.max_new_tokens)
    run.log("held_out", *({"step": step, **row} for row in rows))
    means = held_out_means(rows)
    run.remember(means)
    shown = ", ".join(f"{name} {value:.3f}" for name, value in means.items())
    print0(f"step {step}, held out: {shown}")
    return means


# ---------------------------------------------------------------- masks of a completion


def segment_part(asm: ASM, example: Example, completion: dict, given: str) -> np.ndarray:
    """Returns the mask from those parts of a completion that GIVEN names, (H, W) bool; empty where
    it has none of them."""
    use_box, points_used = GIVEN[given]
    regions = []
    for bbox, points in metrics.regions_of(completion):
        given_box = bbox if use_box else None
        given_points = None
        if points is not None and points_used > 0:
            given_points = points[:points_used]
        regions.append((given_box, given_points))
    return segment_regions(asm, np.asarray(example.image), regions)[0]


def add_masks(p: dict, example: Example, asm: ASM | None) -> dict:
    """Adds to a prediction the masks of its kept completion: the Dice of each kind in GIVEN, and
    the mask from box and points as run lengths. Returns the prediction."""
    p["dice"] = None
    p["mask"] = None
    p["truth"]["mask"] = None
    if example.mask is not None:
        p["truth"]["mask"] = metrics.encode_mask(example.mask)
    if asm is None:
        return p
    masks = {given: segment_part(asm, example, metrics.shown(p), given) for given in GIVEN}
    if masks["both"].any():
        p["mask"] = metrics.encode_mask(masks["both"])
    if example.mask is not None:
        p["dice"] = {k: metrics.mask_dice(mask, example.mask) for k, mask in masks.items()}
    return p


# ---------------------------------------------------------------- predictions of a CRM


def from_model(
    cfg: Config, crm: CRM, examples: Examples, asm: ASM | None, ranks: Ranks
) -> list[dict]:
    """Returns the CRM's predictions, one for each example, in order.

    Each rank appends its own to a file in --out, so that an interruption loses one batch at most.
    ValueError where some are missing or there twice."""
    out = Path(cfg.out)
    # one rank looks at what an earlier run left before any rank appends to it
    found = finished(out) if ranks.is_main else []
    done = set(ranks.gather([row["index"] for row in found]))
    left = [i for i in range(len(examples)) if i not in done]
    own = left[ranks.rank :: ranks.world]
    if own:
        temperature = default_temperature(cfg.temperature, cfg.completions)
        kinds = {"only": (cfg.completions, temperature)}
        answered = ask(crm, examples, own, kinds, cfg.max_new_tokens, cfg.seed, cfg.batch)
        bar = tqdm(answered, total=len(own), disable=not ranks.is_main, ncols=100)
        with open(out / f"part-{ranks.rank}.jsonl", "a", encoding="utf-8") as file:
            for _, example, _, p in bar:
                file.write(json.dumps(add_masks(p, example, asm)) + "\n")
                file.flush()
    ranks.wait()
    rows = in_order(finished(out), len(examples), out)
    ranks.wait()  # the main rank removes the parts, but not before all have read them
    return rows


def finished(out: Path) -> list[dict]:
    """Returns the predictions in an --out folder, of this run and of interrupted ones.

    A line that a kill cut off is removed, so that its question is asked again."""
    if (out / "predictions.jsonl").exists():
        return metrics.read_predictions(out)
    rows = []
    for path in sorted(out.glob("part-*.jsonl")):
        text = read_text(path)
        complete = text[: text.rfind("\n") + 1]
        if complete != text:
            write_whole(path, complete)
        rows += read_jsonl(path)
    return rows


def in_order(rows: list[dict], n: int, out: Path) -> list[dict]:
    """Returns the rows by index. ValueError unless they are questions 0 to n - 1, each once."""
    rows = sorted(rows, key=lambda row: row["index"])
    indexes = [row["index"] for row in rows]
    if indexes != list(range(n)):
        missing = len(set(range(n)) - set(indexes))
        extra = len(indexes) - len(set(indexes))
        raise ValueError(
            f"--out {out}: {missing} of {n} questions are missing, {extra} are there twice; remove "
            "part-*.jsonl in it and run again"
        )
    return rows


def checkpoint_files(crm: str) -> list[Path]:
    """Returns the files of a checkpoint, a folder or a hub name: weights, tokenizer, settings."""
    config = file_of(crm, "config.json")
    if config is None:
        return []
    return [file for file in sorted(config.parent.iterdir()) if file.is_file()]


def fingerprint(files: Sequence[Path], examples: Examples, prompt: str = "") -> str:
    """Returns a digest of files, of the data and of the prompt's text: other weights, questions,
    images, masks or words under the same name are another evaluation."""
    digest = hashlib.blake2b(prompt.encode(), digest_size=12)
    for file in files:
        add_file(digest, file)
    for row in examples.rows:
        keys = ("id", "query", "bbox", "points", "supercategory", "category", "extra")
        parts = [row[key] for key in keys]
        digest.update(json.dumps(parts, default=str).encode())
        for source in (row["image"], row["mask"]):
            if isinstance(source, Path):
                add_file(digest, source)
            elif callable(source):  # of a parquet file or a scan
                digest.update(source() or b"")
            elif source is not None:
                digest.update(source)
    return digest.hexdigest()


def segmenter_files(spec: str) -> list[Path]:
    """Returns the files of a segmenter, whose spec may have a prefix; none where it is "none"."""
    path = Path(spec if Path(spec).exists() else spec.partition(":")[2])
    if path.is_file():
        return [path]
    return [file for file in sorted(path.glob("*")) if spec != "none" and file.is_file()]


def add_file(digest: Any, file: Path) -> None:
    """Adds a file's content to a digest of hashlib."""
    with open(file, "rb") as opened:
        digest.update(hashlib.file_digest(opened, "blake2b").digest())


def claim_folder(out: Path, config: dict[str, Any], ranks: Ranks) -> None:
    """Writes config.json into --out. Arguments and errors as in `check_folder`."""
    check_folder(out, config, ranks)
    if ranks.is_main:
        out.mkdir(parents=True, exist_ok=True)
        write_whole(out / "config.json", json.dumps(config, indent=2) + "\n")
    ranks.wait()


def check_folder(out: Path, config: dict[str, Any], ranks: Ranks) -> None:
    """ValueError where --out holds something else: files that no evaluation wrote, or an evaluation
    with other flags, weights or data.

    config: the flags and a "fingerprint"; only that of the main rank counts."""
    problem = ""
    if ranks.is_main:
        problem = why_not_ours(out, config)
    problems = [text for text in ranks.gather([problem]) if text]
    if problems:
        raise ValueError(f"--out {out}: {problems[0]}")


def why_not_ours(out: Path, config: dict[str, Any]) -> str:
    """Returns why an evaluation with this config may not write into a folder; "" if it may."""
    file = out / "config.json"
    if not file.exists():
        ours = ["predictions.jsonl", "summary.json", "table.md", "examples.png"]
        for file in [*(out / name for name in ours), *out.glob("part-*.jsonl")]:
            if file.exists():
                return f"has a {file.name} that no evaluation here wrote; give another --out"
        return ""
    earlier = parse_object(read_text(file), file)
    if earlier.get("fingerprint") is None:
        return "its config.json is not that of an evaluation; give another --out"
    for name, value in json.loads(json.dumps(config)).items():
        if earlier.get(name) == value or name in CHANGE_NOTHING:
            continue
        if name == "fingerprint":
            return "the weights or the data have changed since; give another --out"
        return "an evaluation with other flags is in there; give another --out"
    return ""


# ---------------------------------------------------------------- examples.png


def draw_examples(rows: list[dict], examples: Examples, path: Path) -> None:
    """Draws different questions from the worst to the best IoU: box, points and mask of the kept
    completion, the true box and the true mask."""

    def score(row: dict) -> tuple[float, int]:
        return metrics.iou(row, metrics.shown(row)) or 0.0, row["index"]

    ordered = sorted(rows, key=score)
    picks = np.unique(np.linspace(0, len(ordered) - 1, EXAMPLES_SHOWN).round().astype(int))
    pictures = []
    for pick in picks:
        p = ordered[pick]
        pictures.append(picture_of(p, examples[p["index"]]))
    grid(path, pictures)


def picture_of(p: dict, example: Example) -> Picture:
    """Returns one question's picture, with what the completion said and what is true."""
    completion = metrics.shown(p)
    size = example.image.size
    bbox = completion["bbox"] and clip_to(size, completion["bbox"])
    points = completion["points"] and clip_to(size, completion["points"])
    mask = None if p["mask"] is None else metrics.decode_mask(p["mask"])
    said = completion["problem"]
    if not said and "bbox" in p["asked"]:
        said = f"IoU {metrics.iou(p, completion):.2f}"
    about = [part for part in (p["category"] or p["id"], said) if part]
    return Picture(
        image=overlay(example.image, mask, bbox, points),
        size=size,
        title=p["query"],
        caption=", ".join(about),
        true_box=p["truth"]["bbox"],
        true_mask=example.mask,
    )


# ---------------------------------------------------------------- the run


def main(cfg: Config) -> None:
    with exit_on(ValueError, OSError):
        if cfg.compare is not None:
            print_comparison(*cfg.compare)
        elif cfg.rescore is not None:
            metrics.report(metrics.read_predictions(cfg.rescore), Path(cfg.rescore))
        else:
            evaluate(cfg)


def print_comparison(one: str, two: str) -> None:
    before = metrics.read_predictions(one)
    after = metrics.read_predictions(two)
    try:
        lines = metrics.compare(before, after)
    except ValueError as error:
        raise ValueError(f"--compare {one} {two}: {error}") from None
    interval = "95 % paired bootstrap interval"
    print(f"{one} -> {two}, {len(before)} questions, percent [{interval}]")
    print("\n".join(lines))


def evaluate(cfg: Config) -> None:
    """Asks, scores, and writes everything into --out."""
    start = time.perf_counter()
    ranks = Ranks.start()
    use_embedded(cfg, TAUGHT)
    out = Path(cfg.out)
    examples = load_samples(cfg.data, cfg.split, cfg.skip_bad_rows)
    if cfg.limit:
        examples = examples[: cfg.limit]
    examples.check()
    asm = None
    if cfg.asm != "none":
        asm = load_asm(cfg.asm, ranks.device)
    # before anything is written: a checkpoint that does not load must not claim the folder
    dtype = ranks.dtype(cfg.dtype)
    crm = load_crm(cfg.crm, ranks.device, dtype, cfg.prompt, cfg.resize, cfg.coordinates)
    config = asdict(cfg)
    if ranks.is_main:
        files = checkpoint_files(cfg.crm) + segmenter_files(cfg.asm)
        config["fingerprint"] = fingerprint(files, examples, crm.template)
    claim_folder(out, config, ranks)
    rows = from_model(cfg, crm, examples, asm, ranks)
    if ranks.is_main:
        write_results(rows, examples, out)
        for path in out.glob("part-*.jsonl"):
            path.unlink()
        seconds = time.perf_counter() - start
        print0(f"examples {out / 'examples.png'}, {seconds:.0f} s in all")
    ranks.stop()


def write_results(rows: list[dict], examples: Examples, out: Path) -> None:
    """Writes predictions.jsonl, the tables and examples.png."""
    write_whole(out / "predictions.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    metrics.report(rows, out)
    draw_examples(rows, examples, out / "examples.png")


# flags of former versions, and what to use now
MOVED = {
    "samples": "it is called --completions",
    "predictions": "python -m extras.predictions FILE scores the completions of another model",
    "frame": "python -m extras.predictions takes it",
    "oracle": "python -m extras.oracle says whose loss it is",
    "max_pixels": "give --resize aspect:PIXELS",
    "min_pixels": "a checkpoint remembers it",
}


if __name__ == "__main__":
    with exit_on(BadRow, FloatingPointError):
        main(parse_args(Config, __doc__, moved=MOVED))
