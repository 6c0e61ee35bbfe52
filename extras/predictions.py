"""Score the completions of another model, as evaluate.py scores those of a CRM.

    python -m extras.predictions gpt.jsonl --data U-MRG-14K --frame norm1000 --out eval/gpt

A line of the file is one of
    {"id": "mine-3", "text": "<think>…</think><answer>{…}</answer>"}
    {"id": "mine-3", "bbox": [30, 40, 90, 95], "points": [[50, 60], [70, 80]]}
A text is a completion as our prompts ask for it. A box is x1, y1, x2, y2, and a point is x, y. The
ids are those of the data set; python data.py PATH shows one.

--frame names what the coordinates were written in:
    pixels     pixels of the image file
    norm1000   0 to 1000 along each side of the image
    model      pixels of the image as --crm resizes it
The boxes are read in each of these frames, and as fractions of the image, and are compared with the
true boxes. Where another frame fits clearly better than the given one, a line says which.

If no line has points, none were asked for. Their metrics are left out then, and a line with a good
box is no refusal. The same holds for boxes. A question without a line is a refusal.

Writes predictions.jsonl, summary.json, table.md and examples.png into --out. evaluate.py --rescore
and --compare take that folder.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from asm import load_asm
from data import (
    EMBEDDED,
    MAX_PIXELS,
    MIN_PIXELS,
    STRIDE,
    Example,
    Examples,
    Sizes,
    load_samples,
    model_size,
    to_image,
)
from evaluate import add_masks, claim_folder, fingerprint, write_results
from metrics import FEW, paired_interval, prediction
from rewards import Box, box_iou, parse_answer
from runtime.cli import Parser, exit_on, print0, show_every_character, use_embedded
from runtime.files import parse_object, read_text
from runtime.parallel import Ranks
from runtime.pretrained import read_settings

KINDS = {"text": str, "bbox": list, "points": list}  # of the values of a line
FRAMES = ("pixels", "norm1000", "model")
FRACTIONS = "fractions"  # 0 to 1 along each side: tried, but not read
BETTER = 0.05  # mean IoU by which another frame must fit better to be named
OUTSIDE = 1.02  # a box leaves its image from this share of the image's side on
NO_PREDICTION = "no prediction"  # the problem of a question without a line
OUTPUTS = ("config.json", "predictions.jsonl", "summary.json", "table.md", "examples.png")

# ---------------------------------------------------------------- the file


def read_given(path: str | Path) -> tuple[dict[str, dict], list[str]]:
    """Returns {id: line}, and what was asked for: "bbox", "points" or both.

    ValueError names a line that is not as the text at the top of this file says."""
    given: dict[str, dict] = {}
    asked: set[str] = set()
    # not splitlines(): it also cuts at separators that JSON allows inside of a string
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        row = parse_object(line, where)
        name = row.get("id")
        parts = {key for key in KINDS if row.get(key) is not None}
        if type(name) not in (str, int) or not has_kinds(row, parts):
            raise ValueError(
                f"{where}: an object with id (text or number) and with text (text), bbox (list) "
                "or points (list) is needed"
            )
        if str(name) in given:
            raise ValueError(f"{where}: id {name!r} has an earlier line; one line per id")
        given[str(name)] = row
        asked |= {"bbox", "points"} if "text" in parts else parts
    if not given:
        raise ValueError(f"{path}: no line in it")
    return given, sorted(asked)


def has_kinds(row: dict, parts: set[str]) -> bool:
    """Whether a line has at least one of the KINDS, and each of them with its type."""
    if not parts:
        return False
    return all(isinstance(row[key], KINDS[key]) for key in parts)


def check_ids(given: Mapping[str, dict], ids: Sequence[str], args: argparse.Namespace) -> None:
    """ValueError where a line is about a question that the data does not have."""
    unknown = given.keys() - set(ids)
    if unknown:
        raise ValueError(
            f"{args.file}: {len(unknown)} of {len(given)} ids are not in --data {args.data}, split "
            f"{args.split}, the first: {min(unknown)!r}; those there look like {ids[0]!r}"
        )


def completion_text(row: dict | None) -> str:
    """Returns a line as a completion, so that there is one parser; "" for no line."""
    if row is None:
        return ""
    if row.get("text") is not None:
        return row["text"]
    fields = {"bbox": row.get("bbox")}
    for number, point in enumerate(row.get("points") or [], 1):
        fields[f"points_{number}"] = point
    return f"<answer>{json.dumps(fields)}</answer>"


# ---------------------------------------------------------------- the frame


@dataclass(frozen=True)
class Resize:
    """How a checkpoint resizes images, see data.model_size."""

    resize: str = "aspect"
    min_pixels: int = MIN_PIXELS
    max_pixels: int = MAX_PIXELS
    stride: int = STRIDE


def resize_of(crm: str | None, resize: str | None) -> Resize:
    """Returns how load_crm(crm, resize=resize) resizes images; as any CRM does where there is
    none."""
    if crm is None:
        return Resize(resize or "aspect")
    try:
        processor = Qwen2VLImageProcessorPil.from_pretrained(crm)
    except (OSError, ValueError):
        raise ValueError(f"--crm {crm}: --frame model needs its preprocessor_config.json") from None
    stride = processor.patch_size * processor.merge_size
    settings = read_settings(crm)
    largest = min(MAX_PIXELS, processor.size["longest_edge"])
    return Resize(
        resize or settings.get("resize", "aspect"),
        settings.get("min_pixels", MIN_PIXELS),
        settings.get("max_pixels", largest),
        stride,
    )


def sizes_in(frame: str, size: tuple[int, int], resize: Resize) -> Sizes:
    """Returns an image's size in pixels, and in a frame in which coordinates may be written."""
    if frame == "norm1000":
        return Sizes(size, (1000, 1000))
    if frame == FRACTIONS:
        return Sizes(size, (1, 1))
    if frame == "model":
        limits = resize.min_pixels, resize.max_pixels
        return Sizes(size, model_size(size, resize.resize, *limits, resize.stride))
    return Sizes(size, size)


class FrameCheck:
    """How well the boxes of a file fit the true ones, in each frame they may be written in."""

    def __init__(self, frame: str, resize: Resize):
        self.frame = frame
        self.resize = resize
        self.ious: dict[str, list[float]] = {name: [] for name in (*FRAMES, FRACTIONS)}
        self.images: list[str] = []  # what image each box is about
        self.outside = 0  # boxes that leave their image
        self.fractions = 0  # boxes that would be less than a pixel

    def add(self, box: Box, example: Example, image: str) -> None:
        """Counts a box, as it was written. image: which image the question is about."""
        size = example.image.size
        for name, ious in self.ious.items():
            placed = to_image(box, sizes_in(name, size, self.resize))
            ious.append(box_iou(placed, example.bbox))
        self.images.append(image)
        _, _, right, bottom = to_image(box, sizes_in(self.frame, size, self.resize))
        if right > OUTSIDE * size[0] or bottom > OUTSIDE * size[1]:
            self.outside += 1
        if max(box) <= 1:
            self.fractions += 1

    def better_frame(self) -> str:
        """Returns one line about a frame that fits clearly better than the given one; "" where
        there is none."""
        if not self.images:
            return ""
        means = {name: sum(ious) / len(ious) for name, ious in self.ious.items()}
        best = max(means, key=means.get)
        gain = paired_interval(self.ious[self.frame], self.ious[best], self.images)
        by_chance = gain.images >= FEW and gain.low <= 0
        if gain.mean < BETTER or by_chance:
            return ""
        fix = f"give --frame {best}"
        if best == FRACTIONS:
            fix = "write them times 1000 and give --frame norm1000"
        return (
            f"the boxes look like {best} (mean IoU {means[best]:.2f}), not like {self.frame} "
            f"({means[self.frame]:.2f}): {fix}"
        )

    def reject_impossible(self, file: str) -> None:
        """ValueError where most boxes cannot be in the given frame."""
        boxes = len(self.images)
        better = self.better_frame()
        if self.fractions > boxes / 2:
            raise ValueError(
                f"{file}: the boxes look like fractions of the image; write them times 1000 and "
                "give --frame norm1000"
            )
        if self.outside > boxes / 2:
            raise ValueError(
                f"{file}: {self.outside} of {boxes} boxes leave their image, so --frame "
                f"{self.frame} is wrong; {better or 'give the frame they were written in'}"
            )


# ---------------------------------------------------------------- the predictions


def predictions_from(
    given: Mapping[str, dict],
    asked: Sequence[str],
    examples: Examples,
    frame: str,
    resize: Resize,
) -> tuple[list[dict], FrameCheck]:
    """Returns a prediction (see metrics.prediction) for each example, in order, and how the boxes
    fit. One image at a time is in memory."""
    check = FrameCheck(frame, resize)
    rows = []
    for i, name in enumerate(examples.ids()):
        example = examples[i]
        text = completion_text(given.get(name))
        p = prediction(example, i, [text], sizes_in(frame, example.image.size, resize))
        p["asked"] = list(asked)
        (completion,) = p["completions"]
        if name not in given:
            completion["problem"] = NO_PREDICTION
        elif len(asked) == 1:  # what was not asked for cannot be missing
            (part,) = asked
            completion["problem"] = f"{part} malformed" if completion[part] is None else ""
        written = parse_answer(text).bbox
        if written is not None:
            check.add(written, example, p["image"])
        rows.append(p)
    return rows, check


# ---------------------------------------------------------------- the command


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    show_every_character()
    parser = Parser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        fromfile_prefix_chars="@",
        allow_abbrev=False,
    )
    parser.add_argument("file", metavar="FILE", help="completions, one JSON object per line")
    parser.add_argument("--data", help="folder or .parquet file, see data.py")
    parser.add_argument("--split", default="test", help="split of --data (test)")
    parser.add_argument("--limit", type=int, default=0, help="questions, the first ones (0: all)")
    parser.add_argument(
        "--skip-bad-rows", action="store_true", help="leave out rows that cannot be used"
    )
    parser.add_argument(
        "--frame", choices=FRAMES, default="pixels", help="of the coordinates (pixels)"
    )
    parser.add_argument("--crm", help="of --frame model: the checkpoint that resizes images")
    parser.add_argument(
        "--resize", help="of --frame model: aspect, aspect:MAX_PIXELS or square:SIDE"
    )
    parser.add_argument("--asm", help="segmenter for the mask's Dice, or none")
    parser.add_argument("--out", default="eval", help="folder for what is written (eval)")
    args = parser.parse_args(argv)
    if args.limit < 0:
        parser.error(f"--limit {args.limit}: must be at least 0")
    return args


def check_out(out: Path, file: Path) -> None:
    """ValueError where the file itself would be overwritten."""
    if file.resolve() in [(out / name).resolve() for name in OUTPUTS]:
        raise ValueError(f"--out {out}: {file} would be overwritten; give another --out")


def score_file(args: argparse.Namespace) -> None:
    """Scores a file and writes everything into --out. ValueError where something does not fit;
    nothing is written then."""
    ranks = Ranks.start()
    out = Path(args.out)
    check_out(out, Path(args.file))
    given, asked = read_given(args.file)
    defaults = {"data": EMBEDDED["data"], "asm": EMBEDDED["asm"]}
    if args.frame == "model":
        defaults["crm"] = EMBEDDED["crm"]
    use_embedded(args, defaults)
    examples = load_samples(args.data, args.split, args.skip_bad_rows)
    if args.limit > 0:
        examples = examples[: args.limit]
    examples.check()
    check_ids(given, examples.ids(), args)

    resize = resize_of(args.crm, args.resize)
    rows, check = predictions_from(given, asked, examples, args.frame, resize)
    check.reject_impossible(args.file)
    missing = len(examples) - len(given)
    print0(
        f"{missing} of {len(examples)} questions have no prediction (refusals), {check.outside} "
        "boxes leave their image"
    )
    asm = None
    if args.asm != "none":
        asm = load_asm(args.asm, ranks.device)
    config = vars(args) | {"fingerprint": fingerprint([Path(args.file)], examples)}
    claim_folder(out, config, ranks)
    for row in tqdm(rows, ncols=100):
        add_masks(row, examples[row["index"]], asm)
    write_results(rows, examples, out)
    better = check.better_frame()
    if better:
        print0(better)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    with exit_on(ValueError, OSError):
        score_file(args)


if __name__ == "__main__":
    main()
