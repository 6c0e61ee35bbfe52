"""predictions.jsonl: what evaluate.py keeps of every question, and predictions that another model made.

A line of predictions.jsonl is what metrics.prediction returns, with masks as COCO's run lengths: scoring needs nothing
else.

A line of --predictions is one of
    {"id": "mine-3", "text": "<think>…</think><answer>{…}</answer>"}              a completion, as our prompts ask for it
    {"id": "mine-3", "bbox": [30, 40, 90, 95], "points": [[50, 60], [70, 80]]}    x1, y1, x2, y2; x, y of each point
with ids of the data set (python data.py PATH shows one), in the frame that --frame names: pixels of the image file,
norm1000 (0 to 1000 along each side), or model (as --crm resizes images). If no line has points, none were asked for:
their metrics are left out, and a line with a good box is no refusal. The same holds for boxes. A question without a line
is a refusal.
"""

import json
from pathlib import Path

import numpy as np
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from data import MAX_PIXELS, MIN_PIXELS, Frame, model_size
from extras.several import add_siblings
from metrics import prediction
from runtime.cli import print0
from runtime.files import read_text, write_whole
from runtime.pretrained import remembered_frame

FORM = {"text": str, "bbox": list, "points": list}  # of a line of --predictions


def read_predictions(folder: str | Path) -> list[dict]:
    path = Path(folder) / "predictions.jsonl"
    if not path.is_file():
        raise ValueError(
            f"{folder}: no predictions.jsonl in there; evaluate.py --out {folder} makes it"
        )
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    if not rows or "completions" not in rows[0]:
        raise ValueError(f"{path}: empty, or of an older version; run the evaluation again")
    return add_siblings(rows)


def finished(out: Path) -> list[dict]:
    """The predictions in an --out folder, of this run and of interrupted ones. A line that a kill cut off is
    removed, so that its question is asked again."""
    if (out / "predictions.jsonl").exists():
        return read_predictions(out)
    rows = []
    for path in sorted(out.glob("part-*.jsonl")):
        text = path.read_text()
        whole = text[: text.rfind("\n") + 1]
        if whole != text:
            write_whole(path, whole)
        rows += [json.loads(line) for line in whole.splitlines()]
    return rows


def in_order(rows: list[dict], n: int, out: Path) -> list[dict]:
    """The rows by index; ValueError unless they are those of questions 0 to n - 1, each once."""
    rows = sorted(rows, key=lambda row: row["index"])
    indexes = [row["index"] for row in rows]
    if indexes != list(range(n)):
        missing, extra = len(set(range(n)) - set(indexes)), len(indexes) - len(set(indexes))
        raise ValueError(
            f"--out {out}: {missing} of {n} questions are missing, {extra} are there twice; remove "
            "part-*.jsonl in it and run again"
        )
    return rows


def shown(p: dict) -> dict:
    """The kept completion, or the first one if none can be used."""
    return p["completions"][p["kept"] or 0]


def encode_mask(mask: np.ndarray) -> dict:
    """(H, W) bool -> COCO's run lengths by column, {"size": [H, W], "counts": [outside, inside, …]}."""
    flat = mask.flatten(order="F")
    ends = np.flatnonzero(np.diff(flat)) + 1
    counts = np.diff([0, *ends, len(flat)]).tolist()
    return {"size": list(mask.shape), "counts": [0, *counts] if flat[0] else counts}


def decode_mask(rle: dict) -> np.ndarray:
    """The inverse of encode_mask."""
    inside = np.arange(len(rle["counts"])) % 2 == 1
    return np.repeat(inside, rle["counts"]).reshape(rle["size"], order="F")


# ---------------------------------------------------------------- of another model


def read_given(path: str) -> tuple[dict[str, dict], list[str]]:
    """--predictions -> {id: line}, and what was asked for: "bbox", "points" or both. ValueError names a line
    that does not have the form described above."""
    given, asked = {}, set()
    for number, line in enumerate(
        read_text(path).split("\n"), 1
    ):  # splitlines() would split texts, too
        if not line.strip():
            continue
        where = f"--predictions {path}, line {number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            raise ValueError(f"{where}: not JSON") from None
        row = row if isinstance(row, dict) else {}
        parts = {key for key, kind in FORM.items() if row.get(key) is not None}
        if (
            type(row.get("id")) not in (str, int)
            or not parts
            or not all(isinstance(row[key], FORM[key]) for key in parts)
        ):
            raise ValueError(
                f"{where}: an object with id (text or number) and with text (text), bbox (list) "
                "or points (list) is needed"
            )
        if str(row["id"]) in given:
            raise ValueError(f"{where}: id {row['id']!r} has an earlier line; one line per id")
        given[str(row["id"])] = row
        asked |= {"bbox", "points"} if "text" in parts else parts
    if not given:
        raise ValueError(f"--predictions {path}: no line in it")
    return given, sorted(asked)


def model_sizes(cfg) -> tuple[str, int, int]:
    """resize, min_pixels and max_pixels of data.model_size, as load_crm(cfg.crm) has them."""
    try:
        largest = Qwen2VLImageProcessorPil.from_pretrained(cfg.crm).size["longest_edge"]
    except (OSError, ValueError):
        raise ValueError(
            f"--crm {cfg.crm}: --frame model needs its preprocessor_config.json"
        ) from None
    saved = remembered_frame(cfg.crm)
    return (
        cfg.resize or saved.get("resize", "aspect"),
        cfg.min_pixels or saved.get("min_pixels", MIN_PIXELS),
        cfg.max_pixels or saved.get("max_pixels", min(MAX_PIXELS, largest)),
    )


def from_file(cfg, samples) -> list[dict]:
    """Another model's predictions, one for each sample, in order. ValueError, one line, for ids that the data
    does not have and for a wrong frame."""
    where, ids = f"--predictions {cfg.predictions}", samples.ids()
    given, asked = read_given(cfg.predictions)
    if unknown := list(given.keys() - set(ids)):
        raise ValueError(
            f"{where}: {len(unknown)} of {len(given)} ids are not in --data {cfg.data}, split "
            f"{cfg.split}, the first: {min(unknown)!r}; those there look like {ids[0]!r}"
        )
    sizes = model_sizes(cfg) if cfg.frame == "model" else None
    rows, boxes, outside, fractions = [], 0, 0, 0
    for i, name in enumerate(ids):
        sample, row = samples[i], given.get(name, {"text": ""})
        size = sample.image.size
        if sizes:
            frame = Frame(size, model_size(size, *sizes))
        else:
            frame = Frame(size, size if cfg.frame == "pixels" else (1000, 1000))
        text = row.get("text")
        if text is None:  # written as a completion, so that there is one parser
            fields = {"bbox": row.get("bbox")}
            fields |= {f"points_{n}": point for n, point in enumerate(row.get("points") or [], 1)}
            text = f"<answer>{json.dumps(fields)}</answer>"
        p = prediction(sample, i, [text], frame) | {"asked": asked}
        (completion,) = p["completions"]
        if name not in given:
            completion["problem"] = "no prediction"
        elif len(asked) == 1:  # what was not asked for cannot be missing
            completion["problem"] = "" if completion[asked[0]] else f"{asked[0]} malformed"
        if completion["bbox"]:
            boxes += 1
            outside += any(v > 1.02 * side for v, side in zip(completion["bbox"][2:], size))
            fractions += cfg.frame == "pixels" and max(completion["bbox"]) <= 1
        rows.append(p)
    if outside > boxes / 2:
        raise ValueError(
            f"{where}: {outside} of {boxes} boxes leave their image, so --frame {cfg.frame} is "
            "wrong; give the frame they were written in"
        )
    if boxes and fractions == boxes:
        raise ValueError(
            f"{where}: the boxes look like fractions of the image; give pixels, or thousandths and --frame norm1000"
        )
    print0(
        f"{len(ids) - len(given)} of {len(ids)} questions have no prediction (refusals), "
        f"{outside} boxes leave their image"
    )
    return add_siblings(rows)


if __name__ == "__main__":
    print(__doc__)
