"""How sure is an answer? Four signals, a logistic fit that joins them, and what they are worth.

    python -m extras.confidence --crm runs/demo/step_000080 --out eval/sure --save
    python infer.py --crm runs/demo/step_000080 --abstain 0.5 --image x.png --query "…"

Several completions of one question are compared:

    agreement   mean IoU of each two of their boxes; a completion without a box agrees with none
    vote        the same of their masks, pixel by pixel: how many of the others cover a pixel that a
                mask covers, on average
    logp        mean log-probability of the numbers in the kept completion, given all before them
    mask_score  the segmenter's own estimate of the kept mask's IoU

The kept completion is the one whose box agrees most (metrics.medoid). A logistic regression on the
split --fit turns each signal, and all of them together, into the probability that the kept box has
an IoU of 0.5 or more. The split --split says what that is worth (extras/selective.py): the table
has the area under the risk-coverage curve, the coverage at a mean IoU of 0.5, the calibration
error, and what a threshold that answers --coverage of the questions of --fit answers here. With
--absent, a data set of extras/false_premise.py, it says how many questions about what is not there
are refused. Such a set may also be a folder of your own images: rows with a placeholder box and
points, and with "nothing_here": true and "kind": "absent scan".

Writes table.md, summary.json, curves.png, confidence.json and two evaluations, {split}/ and
{fit}/, into --out. `evaluate.py --rescore` takes these. With --save confidence.json is also written
into the folder of --crm, where infer.py --abstain and the page look for it.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

import evaluate
import metrics
from asm import load_asm, overlay, segment_regions
from crm import CRM, Prompt, load_crm
from data import TAUGHT, Example, Examples, load_samples
from extras import selective
from extras.false_premise import is_absent
from infer import answer
from rewards import Box, box_iou
from runtime.cli import exit_on, flag, parse_args, use_embedded
from runtime.files import parse_object, read_text, write_whole
from runtime.parallel import Ranks
from runtime.pretrained import file_of
from scoring import group_of, logp

SIGNALS = {  # name: what a low one means, for a person
    "agreement": "the completions point to different places (mean IoU of their boxes {:.2f})",
    "vote": "their masks share little ({:.2f} of a mask is covered by the others)",
    "logp": "the numbers of the box and the points are a guess (mean log-probability {:.2f})",
    "mask_score": "the segmenter sees no clear outline there (predicted quality {:.2f})",
}
NO_ANSWER = -1.0  # confidence where nothing is pointed to
HIT = 0.5  # IoU from which a box counts as right
RIDGE = 1.0  # penalty of the logistic fit on standardised signals
FIT_FILE = "confidence.json"
UNSURE = "unsure"  # folder in infer.py's --out for the picture of an answer that is not given
COMPARED = 8  # completions where --abstain is given and --completions is not


@dataclass
class Config:
    # models
    crm: str | None = flag(None, "Qwen2.5-VL folder or hub name")
    asm: str | None = flag(None, "segmenter, see asm.SEGMENTERS")
    dtype: str = flag(
        "auto", "compute type; auto is bfloat16 on CUDA", ("auto", "float32", "bfloat16")
    )
    # data
    data: str | None = flag(None, "folder or .parquet file, see data.py")
    split: str = flag("test", "split of --data that is measured")
    fit: str = flag("train", "split of --data that the logistic fit uses")
    absent: str | None = flag(None, "a data set of extras/false_premise.py, for its split --split")
    limit: int = flag(0, "questions of --split, the first ones (0: all)", low=0)
    fit_limit: int = flag(360, "questions of --fit, the first ones (0: all)", low=0)
    # completions
    completions: int = flag(8, "completions per question", low=2)
    max_new_tokens: int = flag(512, "longest completion in tokens", low=1)
    seed: int = flag(0, "seed of every random choice", low=0)
    # results
    coverage: float = flag(0.8, "share of --fit that a threshold answers", above=0, high=1)
    out: str = flag("eval/confidence", "folder for everything that is written")
    save: bool = flag(False, "also write confidence.json into the folder of --crm")


# ---------------------------------------------------------------- the signals


def agreement(boxes: Sequence[Box | None]) -> float | None:
    """Returns the mean IoU of each two of some completions' boxes; None of fewer than two. A
    completion without a box agrees with none."""
    if len(boxes) < 2:
        return None
    ious = []
    for a, b in combinations(boxes, 2):
        ious.append(0.0 if a is None or b is None else box_iou(a, b))
    return float(np.mean(ious))


def vote(masks: np.ndarray) -> float | None:
    """(G, H, W) bool -> of the pixels in the masks, the mean share of the other G - 1 masks that
    cover them, in [0, 1]; 0 without a pixel, None of fewer than two masks."""
    G = len(masks)
    if G < 2:
        return None
    votes = masks.sum(0)
    pixels = votes.sum()
    if pixels == 0:
        return 0.0
    return float((votes * (votes - 1)).sum() / (pixels * (G - 1)))


def is_number_token(pieces: Sequence[str]) -> list[bool]:
    """Whether each token has a digit of the answer's coordinates in it. The digits in "points_1"
    are no coordinates.

    pieces: the text of each token of a completion."""
    found = []
    key_ends = False  # the text so far ends with a key's "_", so a digit now belongs to the key
    text = ""
    for piece in pieces:
        in_answer = "<answer>" in text
        has_digit = any(character.isdigit() for character in piece)
        of_key = key_ends or "_" in piece
        found.append(in_answer and has_digit and not of_key)
        text += piece
        key_ends = text.endswith("_")
    return found


@torch.no_grad()
def number_logp(crm: CRM, prompt: Prompt, text: str) -> float | None:
    """Returns the mean log-probability, at temperature 1, of the numbers in a completion's answer,
    given the prompt and all that is written before them. None without a number."""
    group = group_of(crm, prompt, [text])
    pieces = [crm.tokenizer.decode([token]) for token in group.tokens[0].tolist()]
    chosen = torch.tensor(is_number_token(pieces), device=crm.device)
    if not chosen.any():
        return None
    return float(logp(crm, group, [0])[0][chosen].mean())


def measure(
    crm: CRM,
    asm: Any,
    image: Image.Image,
    prompt: Prompt,
    completions: Sequence[dict],
    kept: int | None,
) -> dict[str, float | None]:
    """Returns every signal of one question; {} where nothing is pointed to.

    completions: text, bbox and points of each, image frame. kept: index of the kept one."""
    if kept is None:
        return {}
    masks = []
    scores: list[float] = []
    pixels = np.asarray(image)
    for i, completion in enumerate(completions):
        mask, own_scores = segment_regions(asm, pixels, metrics.regions_of(completion))
        masks.append(mask)
        if i == kept:
            scores = own_scores
    return {
        "agreement": agreement([completion["bbox"] for completion in completions]),
        "vote": vote(np.stack(masks)),
        "logp": number_logp(crm, prompt, completions[kept]["text"]),
        "mask_score": min(scores),
    }


# ---------------------------------------------------------------- the fit


@dataclass(frozen=True)
class Fit:
    """A logistic regression: sigmoid(bias + sum of weight * (signal - mean) / std)."""

    names: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    weight: tuple[float, ...]
    bias: float

    def parts(self, signals: dict[str, float | None]) -> dict[str, float]:
        """Returns what each signal adds to the log-odds; a missing one counts as the mean."""
        found = {}
        for name, mean, std, weight in zip(self.names, self.mean, self.std, self.weight):
            value = signals.get(name)
            found[name] = 0.0 if value is None else weight * (value - mean) / std
        return found

    def confidence(self, signals: dict[str, float | None]) -> float:
        """Returns the probability of a hit, and NO_ANSWER where nothing is pointed to."""
        if not signals:
            return NO_ANSWER
        odds = self.bias + sum(self.parts(signals).values())
        return float(1 / (1 + np.exp(-np.clip(odds, -30, 30))))


def fit_logistic(
    rows: Sequence[dict[str, float | None]], hits: Sequence[bool], names: Sequence[str]
) -> Fit:
    """Fits the probability of a hit to some signals by Newton's method, with a ridge penalty on the
    weights. rows: `measure` of each question that has an answer; names: the signals to use.

    ValueError without a row."""
    if not rows:
        raise ValueError("no question of --fit has an answer with a box, so nothing can be fitted")
    table = np.array([[row.get(name) for name in names] for row in rows], dtype=float)  # None: nan
    known = np.isfinite(table)
    count = known.sum(0).clip(min=1)
    mean = np.where(known, table, 0.0).sum(0) / count
    centred = np.where(known, table - mean, 0.0)
    std = np.sqrt((centred**2).sum(0) / count)
    std[std == 0] = 1.0
    x = np.column_stack([np.ones(len(table)), centred / std])  # (n, 1 + signals)
    y = np.array(hits, dtype=float)
    # one made-up hit and one miss with average signals: the bias stays finite if all are hits
    average = np.eye(1, x.shape[1])
    x = np.concatenate([x, average, average])
    y = np.append(y, [1.0, 0.0])
    penalty = np.full(x.shape[1], RIDGE)
    penalty[0] = 0.0
    w = np.zeros(x.shape[1])
    for _ in range(50):
        p = 1 / (1 + np.exp(-(x @ w).clip(-30, 30)))
        gradient = x.T @ (y - p) - penalty * w
        hessian = (x.T * (p * (1 - p))) @ x + np.diag(penalty)
        step = np.linalg.solve(hessian, gradient)
        w += step
        if np.abs(step).max() < 1e-8:
            break
    return Fit(
        names=tuple(names),
        mean=tuple(mean.tolist()),
        std=tuple(std.tolist()),
        weight=tuple(w[1:].tolist()),
        bias=float(w[0]),
    )


def read_fit(crm: str | Path) -> Fit | None:
    """Returns the fit that a checkpoint has; None without one. ValueError where it is none."""
    file = file_of(crm, FIT_FILE)
    if file is None:
        return None
    fields = parse_object(read_text(file), file)
    try:
        return Fit(**fields["fits"]["all"])
    except (KeyError, TypeError):
        raise ValueError(
            f"{file}: fits.all is not what extras.confidence writes; run it with --save again"
        ) from None


# ---------------------------------------------------------------- one answer: infer.py, the page


def opinion(
    crm: CRM,
    asm: Any,
    fit: Fit | None,
    image: Image.Image,
    prompt: Prompt,
    completions: Sequence[dict],
    kept: int,
    least: float,
) -> dict[str, Any]:
    """Returns how sure an answer is: confidence, its signals, whether it is sure enough, and the
    reasons why not.

    Without a fit the confidence is the agreement of the boxes alone, and "fitted" is false."""
    signals = measure(crm, asm, image, prompt, completions, kept)
    if fit is None:
        value = signals["agreement"] or 0.0
        low = ["agreement"]
    else:
        value = fit.confidence(signals)
        parts = fit.parts(signals)
        low = sorted((name for name in parts if parts[name] < 0), key=parts.get)
    sure = value >= least
    reasons = []
    if not sure:
        for name in low:
            reasons.append(SIGNALS[name].format(signals[name]))
        if not reasons:
            reasons.append("few answers of this model are right, even where its signals are good")
    return {
        "confidence": value,
        "signals": signals,
        "sure": sure,
        "reasons": reasons,
        "fitted": fit is not None,
    }


def judge(
    cfg: Any,
    crm: CRM,
    asm: Any,
    image: Image.Image,
    found: dict[str, Any],
    completions: list[dict],
    kept: int | None,
) -> tuple[dict[str, Any], list[dict], int | None]:
    """What infer.py --abstain does after an answer: the arguments and results of infer.answer.

    Of one completion nothing can be compared, so COMPARED others are sampled and one of them is
    kept. Where the confidence is below --abstain no completion is kept, result.json has the reasons
    and the box under "unsure", and its mask and picture go to a folder of that name.
    ValueError with --zoom."""
    if "zoom" in found:
        raise ValueError("--abstain and --zoom: confidence is fitted to one look; give one of them")
    prompt = crm.encode_question(image, cfg.query)
    fit = read_fit(cfg.crm)
    if fit is None:
        print(f"confidence {cfg.crm} has no {FIT_FILE}, so the agreement of the boxes is used")
    if len(completions) == 1:
        found, completions, kept = answer(
            crm, prompt, COMPARED, cfg.max_new_tokens, temperature=1.0, seed=cfg.seed
        )
    if kept is None:
        return found, completions, kept
    said = opinion(crm, asm, fit, image, prompt, completions, kept, cfg.abstain)
    found["opinion"] = said
    print(f"confidence {said['confidence']:.2f}, at least {cfg.abstain:g} is asked for")
    apart = Path(cfg.out) / UNSURE
    if said["sure"]:
        for name in ("mask.png", "overlay.png"):  # of an earlier question
            (apart / name).unlink(missing_ok=True)
        return found, completions, kept
    reasons = "; ".join(said["reasons"])
    found["problem"] = ""
    found["said"] = f"not sure: {reasons}"
    found["unsure"] = completions[kept]
    draw_apart(asm, image, completions[kept], apart)
    return found, completions, None


def draw_apart(asm: Any, image: Image.Image, completion: dict, folder: Path) -> None:
    """Writes mask.png and overlay.png of an answer that is not given into a folder of their own."""
    folder.mkdir(exist_ok=True)
    mask, _ = segment_regions(asm, np.asarray(image), metrics.regions_of(completion))
    Image.fromarray(np.uint8(mask) * 255).save(folder / "mask.png")
    picture = overlay(image, mask, completion["bbox"], completion["points"])
    picture.save(folder / "overlay.png")


# ---------------------------------------------------------------- many answers


def add_signals(p: dict, example: Example, crm: CRM, asm: Any) -> None:
    """Adds to a prediction its "signals", and each of them by its name for the tables."""
    prompt = crm.prompt_of(example)
    p["signals"] = measure(crm, asm, example.image, prompt, p["completions"], p["kept"])
    p["agreement"] = p["signals"].get("agreement", 0.0)


def kept_iou(p: dict) -> float:
    """Returns the IoU of the kept completion; 0 without one, and where nothing is to be found."""
    if p["kept"] is None or is_absent(p):
        return 0.0
    return metrics.iou(p, metrics.shown(p)) or 0.0


def fit_all(rows: Sequence[dict]) -> dict[str, Fit]:
    """Returns a fit for each signal alone, and one for all of them. rows: predictions."""
    answered = [p for p in rows if p["signals"]]
    signals = [p["signals"] for p in answered]
    hits = [kept_iou(p) >= HIT for p in answered]
    fits = {name: fit_logistic(signals, hits, [name]) for name in SIGNALS}
    fits["all"] = fit_logistic(signals, hits, list(SIGNALS))
    return fits


def judged(fit: Fit, rows: Sequence[dict]) -> np.ndarray:
    """Returns the confidence in each prediction, (n,)."""
    return np.array([fit.confidence(p["signals"]) for p in rows])


def score_confidence(
    confidence: np.ndarray,
    rows: Sequence[dict],
    threshold: float,
    absent_confidence: np.ndarray | None = None,
    absent_rows: Sequence[dict] = (),
) -> dict[str, Any]:
    """Returns {name: Interval or None} of what a confidence (n,) is worth on some predictions.

    aurc, coverage_at_50, ece
    answered, iou_answered   at the threshold: share of the questions, mean IoU of those
    refused                  at the threshold: share of the questions about what is not there
    alarms_50, alarms_80     share of those that is answered where half, or 80 %, of the others is
    """
    iou = np.array([kept_iou(p) for p in rows])
    images = [p["image"] for p in rows]

    def mean_answered(confidence: np.ndarray, iou: np.ndarray) -> float:
        chosen = confidence >= max(threshold, 0.0)
        return float(iou[chosen].mean()) if chosen.any() else float("nan")

    def calibration(confidence: np.ndarray, iou: np.ndarray) -> float:
        return selective.calibration_error(confidence, iou >= HIT)

    def answered(confidence: np.ndarray) -> float:
        return selective.share_answered(confidence, threshold)

    both = (confidence, iou)
    found: dict[str, Any] = {
        "aurc": selective.bootstrap(selective.aurc, both, images),
        "coverage_at_50": selective.bootstrap(selective.coverage_at, both, images),
        "ece": selective.bootstrap(calibration, both, images),
        "answered": selective.bootstrap(answered, (confidence,), images),
        "iou_answered": selective.bootstrap(mean_answered, both, images),
    }
    if absent_confidence is None:
        return found

    absent_images = [p["image"] for p in absent_rows]
    everything = np.concatenate([confidence, absent_confidence])
    is_of_absent = np.arange(len(everything)) >= len(confidence)
    found["refused"] = selective.bootstrap(
        lambda values: 1 - answered(values), (absent_confidence,), absent_images
    )
    for share in (0.5, 0.8):

        def alarms(values: np.ndarray, absent: np.ndarray, share: float = share) -> float:
            return selective.false_alarms(values, absent, share)

        interval = selective.bootstrap(alarms, (everything, is_of_absent), images + absent_images)
        if interval is not None:  # few images without an answer make no interval
            interval = replace(interval, images=len(set(absent_images)))
        found[f"alarms_{100 * share:.0f}"] = interval
    return found


TITLES = {
    "aurc": "AURC ↓",
    "coverage_at_50": "coverage at mean IoU ≥ 0.5 ↑",
    "ece": "calibration error ↓",
    "answered": "answered",
    "iou_answered": "their IoU",
    "refused": "refused, nothing there ↑",
    "alarms_50": "false alarms at coverage 0.5 ↓",
    "alarms_80": "false alarms at coverage 0.8 ↓",
}


def bounds(rows: Sequence[dict]) -> dict[str, dict[str, Any]]:
    """Returns two lines for the table: a confidence that says nothing, and one that knows the true
    IoU. A question without an answer has none in either."""
    iou = np.array([kept_iou(p) for p in rows])
    images = [p["image"] for p in rows]
    answered = np.array([p["kept"] is not None for p in rows])
    found = {}
    for name, values in (("(none)", np.ones(len(iou))), ("(perfect)", iou)):
        columns = (np.where(answered, values, NO_ANSWER), iou)
        found[name] = {
            "aurc": selective.bootstrap(selective.aurc, columns, images),
            "coverage_at_50": selective.bootstrap(selective.coverage_at, columns, images),
        }
    return found


def table(results: dict[str, dict[str, Any]], note: str) -> str:
    """Returns Markdown: a line for each confidence. results: {its name: score_confidence of it}."""
    names = [name for name in TITLES if name in next(iter(results.values()))]
    head = " | ".join(TITLES[name] for name in names)
    lines = [note, "", f"| confidence | {head} |", "|---" * (len(names) + 1) + "|"]
    for title, found in results.items():
        cells = " | ".join(selective.shown(found.get(name)) for name in names)
        lines.append(f"| {title} | {cells} |")
    return "\n".join(lines) + "\n"


def draw_curves(confidences: dict[str, np.ndarray], rows: Sequence[dict], path: Path) -> None:
    """Draws risk over coverage of each confidence, and the reliability of the one named "all"."""
    from matplotlib.figure import Figure  # 50 MB, and only drawing needs them

    iou = np.array([kept_iou(p) for p in rows])
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    left = figure.add_subplot(1, 2, 1, title="risk and coverage", xlabel="share answered")
    left.set_ylabel("risk: mean of 1 - IoU")
    for name, confidence in confidences.items():
        coverage, risk = selective.risk_curve(confidence, iou)
        width = 2.5 if name == "all" else 1.2
        left.plot(coverage, risk, linewidth=width, label=name)
    images = [p["image"] for p in rows]
    for share in (0.25, 0.5, 0.75, 1.0):
        k = max(1, round(share * len(iou)))

        def risk_at(confidence: np.ndarray, iou: np.ndarray, k: int = k) -> float:
            risk = selective.risk_curve(confidence, iou)[1]
            return float(risk[min(k, len(risk)) - 1])

        found = selective.bootstrap(risk_at, (confidences["all"], iou), images)
        error = [[found.mean - found.low], [found.high - found.mean]]
        left.errorbar(k / len(iou), found.mean, np.abs(error), color="black", capsize=3)
    left.set_ylim(0, 1.02)
    left.legend(frameon=False, fontsize=8)
    left.grid(alpha=0.25)
    right = figure.add_subplot(1, 2, 2, title='calibration of "all"', xlabel="confidence")
    right.set_ylabel(f"share with an IoU of {HIT:g} or more")
    right.plot([0, 1], [0, 1], "--", color="grey", linewidth=1)
    answered = confidences["all"] >= 0
    if answered.any():
        bins = selective.reliability(confidences["all"][answered], (iou >= HIT)[answered])
        for said, was, count in bins:
            right.plot(said, was, "o", color="tab:blue", markersize=4 + 12 * count / len(iou))
    right.set_xlim(0, 1)
    right.set_ylim(-0.02, 1.02)
    right.grid(alpha=0.25)
    figure.savefig(path, dpi=110)


# ---------------------------------------------------------------- the command


@dataclass
class Part:
    """An evaluation in a folder of --out."""

    out: Path
    examples: Examples
    rows: list[dict]  # predictions with their signals

    @property
    def answerable(self) -> list[dict]:
        return [p for p in self.rows if not is_absent(p)]

    @property
    def absent(self) -> list[dict]:
        return [p for p in self.rows if is_absent(p)]


def ask_part(
    cfg: Config, crm: CRM, asm: Any, ranks: Ranks, data: str, split: str, limit: int, name: str
) -> Part:
    """Asks the questions of a split as evaluate.py does, in a folder of --out, and measures the
    signals. What is in the folder already is not asked again."""
    out = Path(cfg.out) / name
    examples = load_samples(data, split)
    if limit:
        examples = examples[:limit]
    examples.check()
    asked = evaluate.Config(
        crm=cfg.crm,
        asm=cfg.asm,
        dtype=cfg.dtype,
        data=data,
        split=split,
        limit=limit,
        completions=cfg.completions,
        temperature=1.0,
        max_new_tokens=cfg.max_new_tokens,
        seed=cfg.seed,
        out=str(out),
    )
    # the fit that --save writes changes no answer
    files = [file for file in evaluate.checkpoint_files(cfg.crm) if file.name != FIT_FILE]
    files += evaluate.segmenter_files(cfg.asm)
    config = asdict(asked) | {"fingerprint": evaluate.fingerprint(files, examples, crm.template)}
    evaluate.claim_folder(out, config, ranks)
    rows = evaluate.from_model(asked, crm, examples, asm, ranks)
    for p in tqdm(rows, desc=f"signals, {name}", ncols=100):
        if "signals" not in p:
            add_signals(p, examples[p["index"]], crm, asm)
    return Part(out, examples, rows)


def finish_part(part: Part, fit: Fit) -> None:
    """Writes an evaluation with the confidence in each answer, as evaluate.py writes one."""
    for p, value in zip(part.rows, judged(fit, part.rows).tolist()):
        p["confidence"] = max(value, 0.0)
    evaluate.write_results(part.rows, part.examples, part.out)
    for file in part.out.glob("part-*.jsonl"):
        file.unlink()


def check(cfg: Config) -> None:
    """ValueError for flags that do not go together."""
    if cfg.asm == "none":
        raise ValueError("--asm none: two of the signals are of masks; give a segmenter")
    if cfg.fit == cfg.split:
        raise ValueError(f"--fit {cfg.fit}: is also --split; measure on questions of another split")
    if cfg.save and not Path(cfg.crm).is_dir():
        raise ValueError(f"--save: --crm {cfg.crm} is no folder; copy {FIT_FILE} out of --out")


def run(cfg: Config) -> None:
    """Asks, fits, measures and writes everything into --out."""
    ranks = Ranks.start()
    use_embedded(cfg, TAUGHT)
    check(cfg)
    out = Path(cfg.out)
    asm = load_asm(cfg.asm, ranks.device)
    crm = load_crm(cfg.crm, ranks.device, ranks.dtype(cfg.dtype))
    models = (cfg, crm, asm, ranks)
    fitted = ask_part(*models, cfg.data, cfg.fit, cfg.fit_limit, cfg.fit)
    measured = ask_part(*models, cfg.data, cfg.split, cfg.limit, cfg.split)
    parts = [fitted, measured]
    absent_rows = measured.absent
    if cfg.absent is not None:
        parts.append(ask_part(*models, cfg.absent, cfg.split, cfg.limit, "absent"))
        absent_rows = absent_rows + parts[-1].absent
        if not parts[-1].absent:
            raise ValueError(f"--absent {cfg.absent}: no question in it is marked as absent")

    fits = fit_all(fitted.answerable)
    rows = measured.answerable
    results = {}
    for name, fit in fits.items():
        threshold = selective.threshold_at(judged(fit, fitted.answerable), cfg.coverage)
        if np.isnan(threshold):  # fewer have an answer at all: each of these is given
            threshold = 0.0
        of_absent = judged(fit, absent_rows) if absent_rows else None
        results[name] = score_confidence(judged(fit, rows), rows, threshold, of_absent, absent_rows)
    results |= bounds(rows)
    for part in parts:
        finish_part(part, fits["all"])
    save_fits(cfg, fits, len(fitted.answerable))
    note = (
        f"{len(rows)} questions of {cfg.split}, {cfg.completions} completions each, seed "
        f"{cfg.seed}; fitted on {len(fitted.answerable)} of {cfg.fit}, of which the thresholds "
        f"answer {100 * cfg.coverage:.0f} %; {len(absent_rows)} questions about what is not there. "
        "[95 % bootstrap interval over images]"
    )
    write_whole(out / "table.md", table(results, note))
    summary = {}
    for name, found in results.items():
        summary[name] = {key: value and asdict(value) for key, value in found.items()}
    write_whole(out / "summary.json", json.dumps(summary, indent=1) + "\n")
    draw_curves({name: judged(fit, rows) for name, fit in fits.items()}, rows, out / "curves.png")
    print(table(results, note).rstrip())
    print(f"table {out / 'table.md'}, picture {out / 'curves.png'}, fit {out / FIT_FILE}")


def save_fits(cfg: Config, fits: dict[str, Fit], questions: int) -> None:
    """Writes confidence.json into --out, and with --save beside the weights."""
    content = {
        "questions": questions,
        "completions": cfg.completions,
        "fits": {name: asdict(fit) for name, fit in fits.items()},
    }
    text = json.dumps(content, indent=1) + "\n"
    write_whole(Path(cfg.out) / FIT_FILE, text)
    if cfg.save:
        write_whole(Path(cfg.crm) / FIT_FILE, text)


def main(cfg: Config) -> None:
    with exit_on(ValueError, OSError, FloatingPointError):
        run(cfg)


if __name__ == "__main__":
    main(parse_args(Config, __doc__))
