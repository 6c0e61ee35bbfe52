"""Score a split as the paper's tables do (arXiv 2508.08177, section 5), with counts and intervals.

    python evaluate.py --crm runs/demo/step_000080 --out eval/demo    # --samples 8: voting, pass@8
    torchrun --nproc-per-node 8 evaluate.py @recipes/eval_7b.args --data U-MRG-14K
    python evaluate.py --predictions gpt.jsonl --frame norm1000 --out eval/gpt    # answers made elsewhere
    python evaluate.py --rescore eval/demo                            # the tables again, without any model
    python evaluate.py --compare eval/sft eval/grpo                   # paired differences

Writes predictions.jsonl (all that scoring needs), summary.json, table.md and examples.png into --out; an
interrupted evaluation goes on where it stopped. Every number is a mean over questions with its 95 % bootstrap
interval. An answer that cannot be parsed is a refusal and scores 0 everywhere.

A line of --predictions: {"id": …, "text": "<answer>{…}</answer>"}, or {"id": …, "bbox": [4], "points":
[[2], [2]]}, in the frame that --frame states: pixels of the image file, norm1000 (0 to 1000 along each side),
or model.

Differences from the paper: a true pDice beside its 2I/U; intervals; the mask from points, from the box and
from both of one and the same answer.
"""
import json
import os
import time
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from asm import load_asm, overlay
from crm import load_crm
from data import (MAX_PIXELS, MIN_PIXELS, BadRow, Frame, clip_to, fill_prompt, load_prompt, load_samples,
                  model_size, to_image)
from rewards import Answer, box_iou, parse_answer, point_dice
from runtime.cli import EMBEDDED, exit_on, flag, parse_args, print0
from runtime.files import read_text
from runtime.metrics import medoid, paired_bootstrap
from runtime.parallel import Ranks

PROMPTED = ("points", "box", "one", "both")     # what of an answer the segmenter gets (one: box, one point)


@dataclass
class Config:
    # what
    crm: str | None = flag(None, "Qwen2.5-VL folder or hub name")
    data: str | None = flag(None, "folder or .parquet file, see data.py")
    asm: str | None = flag(None, "segmenter for the mask's Dice, or none")
    split: str = flag("test", "split of --data")
    limit: int = flag(0, "samples used (0: all)")
    out: str = flag("eval", "folder for predictions.jsonl, summary.json, table.md, examples.png")
    skip_bad_rows: bool = flag(False, "leave out rows that cannot be used, and count them")
    # instead of a model
    predictions: str | None = flag(None, "answers made elsewhere, a .jsonl file")
    frame: str = flag("pixels", "the frame of --predictions", ("pixels", "norm1000", "model"))
    rescore: str | None = flag(None, "an --out folder: its tables again")
    compare: tuple[str, str] | None = flag(None, "two --out folders: what the second changes")
    # answers
    samples: int = flag(1, "answers to a question")
    temperature: float | None = flag(None, "0 takes the likeliest token (0 for one sample, 1 for several)")
    max_new_tokens: int = flag(512, "an answer's limit")
    seed: int = flag(0, "of the sampling")
    batch: int = flag(16, "questions sampled at once")
    prompt: str = flag("reasoning", "reasoning, direct, or a text file with {query}")
    resize: str = flag("aspect", "aspect, or square:SIDE")
    min_pixels: int = flag(MIN_PIXELS, "smallest image, model frame")
    max_pixels: int = flag(MAX_PIXELS, "largest image, model frame")
    dtype: str = flag("auto", "of the model: auto is bfloat16 on CUDA, float32 elsewhere",
                      ("auto", "float32", "bfloat16"))


# ---------------------------------------------------------------- numbers from predictions, without any model

def scores(row: dict) -> dict[str, float | None]:
    """One line of predictions.jsonl -> its scores. Everything in the image frame.

    iou, iou50 (IoU >= 0.5), pdice, pdice_2iu (as published) and refused are means over the answers; voted is
    the IoU of the answer whose box agrees most with the others, pass and best what the luckiest reaches;
    dice_* is of the voted answer's mask, None where there is no true mask or no segmenter ran."""
    truth, answers = row["truth"], row["answers"]
    iou = [box_iou(a["bbox"], truth["bbox"]) if a["bbox"] else 0.0 for a in answers]
    pdice, published = ([point_dice(a["points"], truth["points"], official) if a["points"] else 0.0
                         for a in answers] for official in (False, True))
    mean = lambda values: sum(values) / len(values)
    dice = row["dice"] or {}
    return {"iou": mean(iou), "iou50": mean([v >= 0.5 for v in iou]), "pdice": mean(pdice),
            "pdice_2iu": mean(published), **{f"dice_{kind}": dice.get(kind) for kind in PROMPTED},
            "refused": mean([bool(a["problem"]) for a in answers]),
            "voted": iou[row["kept"]] if row["kept"] is not None else 0.0,
            "best": max(iou), "pass": float(max(iou) >= 0.5)}


COLUMNS = {"iou": "IoU", "iou50": "IoU ≥ 0.5", "pdice": "pDice", "pdice_2iu": "pDice (2I/U)",
           "dice_points": "Dice, points", "dice_box": "Dice, box",
           "dice_one": "Dice, box and 1 point", "dice_both": "Dice, box and points",
           "refused": "refusals", "voted": "IoU, voted", "best": "IoU, best of N", "pass": "pass@N"}


def interval(values, draws: int = 2000, seed: int = 0) -> dict | None:
    """Mean of some values and the ends of its 95 % percentile bootstrap interval; None is left out."""
    values = np.array([v for v in values if v is not None], dtype=float)
    if not len(values):
        return None
    picks = np.random.default_rng(seed).integers(0, len(values), (draws, len(values)))
    low, high = np.percentile(values[picks].mean(1), [2.5, 97.5])
    return {"mean": float(values.mean()), "low": float(low), "high": float(high), "n": len(values)}


def summarise(rows: list[dict]) -> dict:
    """{"all": …, "supercategory": {name: …}, "category": {…}, "wording": {…}} of {metric: interval}, and
    the reasons of refusals."""
    table, several = [scores(row) for row in rows], max(len(row["answers"]) for row in rows) > 1
    keys = [key for key in COLUMNS if several or key not in ("voted", "best", "pass")]

    def part(chosen):
        return {"n": len(chosen), **{key: interval([table[i][key] for i in chosen]) for key in keys}}

    summary = {"all": part(range(len(rows)))}
    for name in ("supercategory", "category", "wording"):
        groups = {}
        for i, row in enumerate(rows):
            if row.get(name):
                groups.setdefault(row[name], []).append(i)
        summary[name] = {group: part(groups[group]) for group in sorted(groups)}
    problems = Counter(a["problem"] for row in rows for a in row["answers"] if a["problem"])
    return {**summary, "refusals": dict(problems.most_common())}


def table(summary: dict) -> str:
    """The summary as Markdown, in percent."""
    keys = [k for k, v in summary["all"].items() if k != "n" and v]
    cell = lambda v: f"{100 * v['mean']:.1f} [{100 * v['low']:.1f}, {100 * v['high']:.1f}]" if v else "–"
    lines = ["| | n | " + " | ".join(COLUMNS[k] for k in keys) + " |", "|---" * (len(keys) + 2) + "|"]
    for title, groups in (("all", {"all": summary["all"]}), ("by super-category", summary["supercategory"]),
                          ("by category", summary["category"]), ("by wording", summary["wording"])):
        if title != "all" and groups:
            lines.append(f"| *{title}* |" + " |" * (len(keys) + 1))
        lines += [f"| {name} | {g['n']} | " + " | ".join(cell(g[k]) for k in keys) + " |"
                  for name, g in groups.items()]
    reasons = [f"- {count} × {reason}" for reason, count in summary["refusals"].items()]
    return "\n".join(["Percent, mean over questions [95 % bootstrap interval].", "", *lines, "",
                      "Refusals: " + ("none." if not reasons else ""), *reasons]) + "\n"


def read_predictions(folder: str) -> list[dict]:
    path = Path(folder) / "predictions.jsonl"
    if not path.is_file():
        raise ValueError(f"{folder}: no predictions.jsonl in there; evaluate.py --out {folder} makes it")
    return [json.loads(line) for line in path.read_text().splitlines()]


def write(folder: Path, name: str, text: str) -> None:
    aside = folder / (name + ".tmp")
    aside.write_text(text)
    aside.replace(folder / name)


def report(rows: list[dict], folder: Path) -> None:
    summary = summarise(rows)
    write(folder, "summary.json", json.dumps(summary, indent=1) + "\n")
    write(folder, "table.md", table(summary))
    print("\n".join(table(summary).split("| *by category*")[0].splitlines()))
    print(f"tables {folder / 'table.md'}, numbers {folder / 'summary.json'}")


def compare(one: str, two: str) -> None:
    """Paired differences of two evaluations of the same questions."""
    a, b = ({row["id"]: row for row in read_predictions(folder)} for folder in (one, two))
    if a.keys() != b.keys():
        only = sorted(a.keys() ^ b.keys())
        raise ValueError(f"--compare {one} {two}: {len(only)} questions are in only one, first {only[0]}")
    first, second = ([scores(row) for row in (side[key] for key in sorted(a))] for side in (a, b))
    print(f"{one} -> {two}, {len(a)} questions, percent [95 % paired bootstrap interval]")
    for key, name in COLUMNS.items():
        pairs = [(x[key], y[key]) for x, y in zip(first, second) if None not in (x[key], y[key])]
        if pairs:
            change, low, high = paired_bootstrap(*zip(*pairs))
            before, after = np.mean(pairs, 0)
            print(f"  {name:15} {100 * before:5.1f} -> {100 * after:5.1f}   {100 * change:+.1f} "
                  f"[{100 * low:+.1f}, {100 * high:+.1f}]")


# ---------------------------------------------------------------- predictions

def as_answer(text: str, bbox, points, problem: str, frame: Frame) -> dict:
    """One answer as predictions.jsonl keeps it, clipped to the image, in the image frame."""
    put = lambda xy: xy and np.asarray(clip_to(frame.image, to_image(xy, frame))).tolist()
    return {"text": text, "bbox": put(bbox), "points": put(points), "problem": problem}


def prediction(sample, index: int, answers: list[dict], asm) -> dict:
    """A line of predictions.jsonl: the question's truth, its answers, the voted one, its mask's Dice."""
    kept, _ = medoid([Answer(None, a["bbox"], a["points"], a["problem"]) for a in answers])
    dice = None
    if asm and sample.mask is not None:
        dice = {kind: 0.0 if kept is None else mask_dice(asm, sample, answers[kept], kind)
                for kind in PROMPTED}
    wording = {True: "unseen", False: "seen"}.get(sample.extra.get("unseen_wording"))
    return {"id": sample.id, "index": index, "size": sample.image.size, "wording": wording,
            "supercategory": sample.supercategory, "category": sample.category, "query": sample.query,
            "truth": {"bbox": sample.bbox, "points": sample.points}, "answers": answers, "kept": kept,
            "dice": dice}


def segment(asm, sample, answer: dict, kind: str):
    """The mask from what of an answer `kind` says, (H, W) bool; None if it has not what is asked for."""
    bbox = [answer["bbox"]] if answer["bbox"] and kind != "points" else None
    points = [answer["points"][:1 if kind == "one" else 2]] if answer["points"] and kind != "box" else None
    return asm.segment(np.asarray(sample.image), bbox, points)[0][0] if bbox or points else None


def mask_dice(asm, sample, answer: dict, kind: str) -> float:
    mask = segment(asm, sample, answer, kind)
    return 0.0 if mask is None else float(2 * (mask & sample.mask).sum() / (mask.sum() + sample.mask.sum()))


def from_model(cfg: Config, samples, asm, ranks: Ranks) -> None:
    """Answers of a CRM, appended batch by batch to a file of this rank: an interruption loses one batch."""
    template, out = load_prompt(cfg.prompt), Path(cfg.out)
    crm = load_crm(cfg.crm, ranks.device, ranks.dtype(cfg.dtype), resize=cfg.resize,
                   min_pixels=cfg.min_pixels, max_pixels=cfg.max_pixels)
    done = {row["index"] for row in parts(out)}
    todo = [i for i in range(len(samples)) if i not in done][ranks.rank::ranks.world]
    temperature = float(cfg.samples > 1) if cfg.temperature is None else cfg.temperature
    for start in tqdm(range(0, len(todo), cfg.batch), disable=ranks.rank > 0, ncols=100, unit="batch"):
        indexes = todo[start:start + cfg.batch]
        chosen = [samples[i] for i in indexes]
        prompts = [crm.encode(s.image, fill_prompt(template, s.query)) for s in chosen]
        groups = crm.sample(prompts, cfg.samples, cfg.max_new_tokens, temperature,
                            [(cfg.seed, 2, i) for i in indexes])
        rows = []
        for i, sample, group in zip(indexes, chosen, groups):
            parsed = [(text, parse_answer(text)) for text in group.texts]
            answers = [as_answer(text, a.bbox, a.points, a.problem, group.prompt.frame)
                       for text, a in parsed]
            rows.append(prediction(sample, i, answers, asm))
        with open(out / f"part-{ranks.rank}.jsonl", "a") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)


def parts(out: Path) -> list[dict]:
    """What earlier runs of this evaluation left; a line that a kill tore is done again."""
    rows = []
    for path in sorted(out.glob("part-*.jsonl")):
        lines = path.read_text().splitlines(keepends=True)
        if lines and not lines[-1].endswith("\n"):
            write(out, path.name, "".join(lines := lines[:-1]))
        rows += [json.loads(line) for line in lines]
    return rows


def from_file(cfg: Config, samples, asm) -> list[dict]:
    """Answers made elsewhere. Unknown or repeated ids and a wrong frame are errors, missing ids refusals."""
    given, where = {}, f"--predictions {cfg.predictions}"
    for number, line in enumerate(read_text(cfg.predictions).splitlines(), 1):
        try:
            row = json.loads(line)
            key = str(row["id"])
            if not isinstance(row.get("text"), str) and not {"bbox", "points"} & row.keys():
                raise ValueError
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise ValueError(f"{where}, line {number}: an object with id and text, bbox or points is "
                             "needed") from None
        if key in given:
            raise ValueError(f"{where}, line {number}: id {key} was there before; one line an id")
        given[key] = row
    known = {sample.id: (i, sample) for i, sample in enumerate(samples)}
    if unknown := [key for key in given if key not in known]:
        raise ValueError(f"{where}: {len(unknown)} of {len(given)} ids are not in --data {cfg.data}, split "
                         f"{cfg.split}, the first: {unknown[0]}")
    answers, boxes, outside = {}, 0, 0
    for key, (i, sample) in known.items():
        size, row = sample.image.size, given.get(key)
        frame = Frame(size, {"pixels": size, "norm1000": (1000, 1000)}.get(cfg.frame) or model_size(
            size, cfg.resize, cfg.min_pixels, cfg.max_pixels))
        if row is None:
            answers[i] = {"text": "", "bbox": None, "points": None, "problem": "no prediction"}
            continue
        text = row.get("text") or "<answer>" + json.dumps({"bbox": row.get("bbox"), **{
            f"points_{n + 1}": point for n, point in enumerate(row.get("points") or [])}}) + "</answer>"
        found = parse_answer(text)
        if found.bbox:
            boxes += 1
            outside += max(found.bbox[2] / frame.model[0], found.bbox[3] / frame.model[1]) > 1.02
        answers[i] = as_answer(text, found.bbox, found.points, found.problem, frame)
    if boxes and outside > boxes / 2:
        raise ValueError(f"{where}: {outside} of {boxes} boxes reach beyond their image, so --frame "
                         f"{cfg.frame} is wrong; give the frame they were written in")
    if outside:
        print0(f"{outside} of {boxes} boxes reach beyond their image and were clipped")
    if missing := len(known) - len(given):
        print0(f"{missing} of {len(known)} questions have no prediction: counted as refusals")
    return [prediction(samples[i], i, [answer], asm) for i, answer in tqdm(answers.items(), ncols=100)]


# ---------------------------------------------------------------- pictures

def examples(rows: list[dict], samples, asm, path: Path, each: int = 5) -> None:
    """The worst, median and best questions by IoU: predicted box, points and mask; dashed, the true box."""
    import matplotlib
    matplotlib.use("agg")
    import matplotlib.pyplot as plt
    order = sorted(rows, key=lambda row: (scores(row)["iou"], row["index"]))
    each, middle = min(each, len(order)), max(0, len(order) // 2 - each // 2)
    picks = {"worst": order[:each], "median": order[middle:middle + each], "best": order[::-1][:each]}
    figure, axes = plt.subplots(3, each, figsize=(3 * each, 10.2), squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for line, (title, chosen) in zip(axes, picks.items()):
        for axis, row in zip(line, chosen):
            sample, answer = samples[row["index"]], row["answers"][row["kept"] or 0]
            mask = segment(asm, sample, answer, "both") if asm else None
            picture = overlay(sample.image, mask, answer["bbox"], answer["points"])
            axis.imshow(picture, extent=(0, sample.image.width, sample.image.height, 0))
            x1, y1, x2, y2 = row["truth"]["bbox"]
            axis.add_patch(plt.Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, ls="--", lw=1.5, ec="white"))
            axis.set_title(f"{title}: {row['category']}, IoU {scores(row)['iou']:.2f}"
                           + (f"\n{answer['problem']}" if answer["problem"] else ""), fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=80)
    plt.close(figure)


# ---------------------------------------------------------------- main

def main(cfg: Config) -> None:
    with exit_on(ValueError, OSError):
        if cfg.compare:
            return compare(*cfg.compare)
        if cfg.rescore:
            return report(read_predictions(cfg.rescore), Path(cfg.rescore))
        ranks, out, start = Ranks.start(), Path(cfg.out), time.perf_counter()
        samples = load_samples(cfg.data, cfg.split, cfg.skip_bad_rows)[:cfg.limit or None]
        if cfg.skip_bad_rows and samples.skipped:
            print0(f"{cfg.data}, {cfg.split}: {len(samples.skipped)} bad rows left out, "
                f"the first: {samples.skipped[0]}")
        asm = None if cfg.asm == "none" else load_asm(cfg.asm, ranks.device)
        config = json.dumps(asdict(cfg), indent=2) + "\n"
        if (out / "config.json").exists() and (out / "config.json").read_text() != config:
            raise ValueError(f"--out {out}: an evaluation with other flags is in there; give another --out")
        if cfg.predictions:
            rows = from_file(cfg, samples, asm)
        ranks.gather([])                            # nobody writes before all have looked
        if ranks.rank == 0:
            out.mkdir(parents=True, exist_ok=True)
            (out / "config.json").write_text(config)
        ranks.gather([])
        if not cfg.predictions and not (out / "predictions.jsonl").exists():
            from_model(cfg, samples, asm, ranks)
            ranks.gather([])
            rows = sorted(parts(out), key=lambda row: row["index"])
        elif not cfg.predictions:
            rows = read_predictions(out)
        if ranks.rank == 0:
            write(out, "predictions.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
            for path in out.glob("part-*.jsonl"):
                os.remove(path)
            report(rows, out)
            examples(rows, samples, asm, out / "examples.png")
            print0(f"examples {out / 'examples.png'}, {time.perf_counter() - start:.0f} s in all")
        ranks.stop()


def needs(cfg: Config) -> list[str]:
    """Which embedded defaults a command line may fall back on."""
    if cfg.rescore or cfg.compare:
        return []
    return [name for name in EMBEDDED if name != "crm" or not cfg.predictions]


if __name__ == "__main__":
    with exit_on(BadRow):
        main(parse_args(Config, __doc__, embedded=needs))
