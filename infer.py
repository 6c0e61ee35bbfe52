"""One image and one question -> reasoning, box, two key points, mask.

    python infer.py --image demo/images/abdomen_ct.png \\
        --query "Where on this CT slice is the organ on the left that turns blood into urine?"
    python infer.py --image x.png --query "…" --completions 8   # keep what most others agree with
    python infer.py --image x.png --query "…" --abstain 0.5     # may answer that it is not sure
    python infer.py --image x.png --query "…" --crm zzzyzh/MedReasoner-Soft-7B \\
                    --asm MedSAM2_latest.pt --resize square:840

Writes mask.png (0 and 255, the image's own size), overlay.png and result.json into --out. All
coordinates printed and written are in the image frame: pixels of the image as given. Exit status:
0 done; 2 bad input, one line says what is wrong and nothing is written; 3 no usable completion,
result.json says why. DICOM and NIfTI: python -m extras.scans takes the same flags.

Read next: evaluate.py, which does this for a whole split.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from asm import ASM, load_asm, overlay, segment_regions
from crm import CRM, Prompt, load_crm
from data import TAUGHT, Sizes, clip_to, load_image, to_image
from metrics import medoid, regions_of
from runtime.cli import exit_on, flag, parse_args, use_embedded
from runtime.files import parse_object, read_text
from runtime.images import is_scan
from runtime.parallel import Ranks
from runtime.registry import find
from sampling import default_temperature, sample

OUTPUTS = ("mask.png", "overlay.png", "result.json")
AFTERWARDS = {  # flag: what it does with an answer, (cfg, crm, asm, image, *answer) -> answer
    "zoom": "extras.zoom.look_again",
    "abstain": "extras.confidence.judge",
}
FOR_SCANS = "python -m extras.scans takes it, with the flags of this script"


@dataclass
class Config:
    image: str = flag("required", "an image file")
    query: str = flag("required", "the question, in plain words")
    out: str = flag("out", "folder for mask.png, overlay.png and result.json")
    # models
    crm: str | None = flag(None, "Qwen2.5-VL or Qwen3-VL, folder or hub name")
    asm: str | None = flag(None, "segmenter: a folder, MedSAM2_latest.pt, or see asm.SEGMENTERS")
    prompt: str | None = flag(
        None, "reasoning, direct, boxes, a text file with {query}, or the text itself"
    )
    resize: str | None = flag(None, "aspect, aspect:MAX_PIXELS or square:SIDE")
    coordinates: str | None = flag(None, "see data.COORDINATES", ("pixels", "norm1000"))
    dtype: str = flag(
        "auto", "compute type; auto is bfloat16 on CUDA", ("auto", "float32", "bfloat16")
    )
    multimask: bool = flag(False, "request three masks and keep the best, as the release does")
    # completions
    completions: int = flag(1, "the one whose box agrees most with the others is kept", low=1)
    temperature: float | None = flag(
        None, "of sampling (default: 0, the most likely token, for one completion, else 1)", low=0
    )
    max_new_tokens: int = flag(512, "longest completion in tokens", low=1)
    seed: int = flag(0, "seed of every random choice", low=0)
    zoom: float | None = flag(None, "look again this much closer, and keep what agrees", above=1)
    abstain: float | None = flag(None, "not sure below this confidence", low=0, high=1)


def load_models(cfg: Any) -> tuple[CRM, ASM]:
    """Returns the CRM and the ASM of a Config, the embedded ones where none is given."""
    use_embedded(cfg, {"crm": TAUGHT["crm"], "asm": TAUGHT["asm"]})
    ranks = Ranks.start()
    dtype = ranks.dtype(cfg.dtype)
    crm = load_crm(cfg.crm, ranks.device, dtype, cfg.prompt, cfg.resize, cfg.coordinates)
    return crm, load_asm(cfg.asm, ranks.device, multimask=cfg.multimask)


def answer(
    crm: CRM,
    prompt: Prompt,
    completions: int,
    max_new_tokens: int,
    temperature: float,
    seed: int,
) -> tuple[dict[str, Any], list[dict[str, Any]], int | None]:
    """Samples completions of one prompt.

    Returns keys of result.json, the completions with box and points in the image frame, and the
    index of the kept one, or None where none is usable. FloatingPointError where logits are not
    finite."""
    (group,) = sample(crm, [prompt], completions, max_new_tokens, temperature, seed)
    answers = [crm.answer_format.parse(text) for text in group.texts]
    found = []
    for text, parsed in zip(group.texts, answers):
        completion = {"problem": parsed.problem, "text": text, "reasoning": parsed.think}
        completion |= placed_inside(parsed.bbox, parsed.points, prompt.sizes)
        if crm.answer_format.several:
            regions = [placed_inside(*region, prompt.sizes) for region in parsed.regions]
            completion["regions"] = regions
        found.append(completion)
    kept, agreement = medoid(answers)
    result = {
        "completions": completions,
        "agreement": agreement,
        "texts": group.texts,
        "problem": answers[kept or 0].problem,
    }
    return result, found, kept


def placed_inside(bbox: Any, points: Any, sizes: Sizes) -> dict[str, Any]:
    """Returns a box and points of the model frame in the image frame, at most one image size
    outside of the image. None stays None."""
    placed = {"bbox": None, "points": None}
    if bbox is not None:
        placed["bbox"] = clip_to(sizes.image, to_image(bbox, sizes))
    if points is not None:
        placed["points"] = clip_to(sizes.image, to_image(points, sizes))
    return placed


def ground(
    cfg: Config, image: Image.Image, crm: CRM, asm: ASM, describe: str = ""
) -> tuple[int, dict[str, Any], np.ndarray | None]:
    """Answers --query about an image, prints the answer and writes OUTPUTS into --out.

    describe: what is printed about the image besides its size. Returns the exit status (0 or 3),
    what result.json has, and the mask (H, W) bool, or None without one."""
    out = Path(cfg.out)
    with exit_on(ValueError, OSError):
        prompt = crm.encode_question(image, cfg.query)
        claim_folder(out)
    size = f"{image.width}x{image.height} pixels; model frame {prompt.sizes.model}"
    print(f"image      {cfg.image}, {size}" + (f"; {describe}" if describe else ""))
    print(f"models     CRM {cfg.crm}, ASM {cfg.asm}, on {crm.device}", flush=True)

    # 1. the clinical reasoning module answers
    temperature = default_temperature(cfg.temperature, cfg.completions)
    with exit_on(ValueError, FloatingPointError):
        answered = answer(crm, prompt, cfg.completions, cfg.max_new_tokens, temperature, cfg.seed)
        for name, entry in AFTERWARDS.items():
            if getattr(cfg, name) is not None:
                answered = find(entry)(cfg, crm, asm, image, *answered)
    found, completions, kept = answered
    result = {
        "image": cfg.image,
        "size": image.size,
        "query": cfg.query,
        "crm": cfg.crm,
        "asm": cfg.asm,
        **found,
    }
    for name in ("mask.png", "overlay.png"):  # of an earlier question
        (out / name).unlink(missing_ok=True)
    if kept is None:
        write_result(out, result)
        if not result["problem"]:  # a good answer that points to nothing
            print(f"answer     {result.get('said', 'nothing here')}; see {out}")
            return 0, result, None
        count = cfg.completions
        print(f"no usable completion of {count}: {result['problem']}; see {out}", file=sys.stderr)
        return 3, result, None

    # 2. the anatomical segmentation module draws, in the image frame
    completion = completions[kept]
    mask, scores = segment_regions(asm, np.asarray(image), regions_of(completion))
    Image.fromarray(np.uint8(mask) * 255).save(out / "mask.png")
    picture = overlay(image, mask, completion["bbox"], completion["points"])
    picture.save(out / "overlay.png")
    result |= completion
    result["mask_score"] = min(scores)
    result["mask_pixels"] = int(mask.sum())
    write_result(out, result)
    print_answer(result, mask)
    print(f"pictures   {out / 'overlay.png'}  {out / 'mask.png'}  numbers {out / 'result.json'}")
    return 0, result, mask


def print_answer(result: dict[str, Any], mask: np.ndarray) -> None:
    reasoning = (result["reasoning"] or "(none)").strip()
    problem = f"  ({result['problem']})" if result["problem"] else ""
    share = 100 * mask.mean()
    print(f"reasoning  {reasoning}")
    print(f"box        {rounded(result['bbox'])}{problem}")
    print(f"points     {rounded(result['points'])}")
    print(f"mask       {share:.1f} % of the image, predicted quality {result['mask_score']:.2f}")
    if result["agreement"] is not None:
        others = f"mean IoU with the other boxes of {result['completions']} completions"
        print(f"agreement  {result['agreement']:.2f} {others}")


def rounded(xy: Any) -> list[float] | None:
    """Returns coordinates for printing: flat, one decimal."""
    if xy is None:
        return None
    return [round(value, 1) for value in np.ravel(xy).tolist()]


def write_result(folder: Path, result: dict[str, Any]) -> None:
    (folder / "result.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def claim_folder(out: Path) -> None:
    """Makes --out. ValueError where it holds a mask or a picture that is not from this script."""
    file = out / "result.json"
    ours = False
    if file.exists():
        ours = {"query", "crm", "texts"} <= parse_object(read_text(file), file).keys()
    there = [name for name in OUTPUTS if (out / name).exists()]
    if there and not ours:
        raise ValueError(
            f"--out {out}: has a {there[0]} that was not written here; give another --out"
        )
    out.mkdir(parents=True, exist_ok=True)


def main(cfg: Config) -> int:
    """Returns the exit status: 0 or 3. Bad input raises SystemExit(2)."""
    with exit_on(ValueError, OSError):  # bad input ends here, before anything is written
        if not cfg.query.strip():
            raise ValueError("--query is empty: ask a question about the image")
        if is_scan(Path(cfg.image)):
            raise ValueError(f"--image {cfg.image} is DICOM or NIfTI, or a folder: {FOR_SCANS}")
        try:
            image = load_image(cfg.image)
        except ValueError as error:
            raise ValueError(f"--image {cfg.image} {error}") from None
        crm, asm = load_models(cfg)
    status, _, _ = ground(cfg, image, crm, asm)
    return status


# flags of former versions, and what to use now
MOVED = {
    "samples": "it is called --completions",
    "max_pixels": "give --resize aspect:PIXELS",
    "min_pixels": "a checkpoint remembers it",
    **dict.fromkeys(("slice", "plane", "frame", "series", "window"), FOR_SCANS),
}


if __name__ == "__main__":
    sys.exit(main(parse_args(Config, __doc__, moved=MOVED)))
