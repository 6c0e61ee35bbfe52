"""One image and one question -> reasoning, box, two key points, mask.

    python infer.py --image demo/images/brain_mr_axial.png --query "What are the paired dark cavities?"
    python infer.py --image x.png --query "…" --samples 8       # keep the one that most others agree with
    python infer.py --image x.png --query "…" --crm zzzyzh/MedReasoner-Soft-7B \\
                    --asm MedSAM2_latest.pt --resize square:840

Writes mask.png (0 and 255, the image's own size), overlay.png and result.json into --out; for DICOM and NIfTI also a mask
on the scan's own grid, and millimetres (extras/scans.py). All other coordinates printed and written are in the image
frame: pixels of the image as given. Exit status: 0 done, 2 bad input (one line says what is wrong, nothing is written),
3 no usable completion (result.json says why).
Read next: rewards.py parses completions, data.py has the two frames, evaluate.py does this for a whole split.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from asm import load_asm, overlay
from crm import load_crm
from data import clip_to, fill_prompt, load_image, to_image
from extras.scans import ScanConfig, read_view
from metrics import medoid, united_mask
from runtime.cli import ModelConfig, exit_on, flag, parse_args
from runtime.parallel import Ranks
from sampling import sample


@dataclass
class Config(ModelConfig, ScanConfig):
    image: str = flag("required", "an image, DICOM file, folder with one DICOM series, or NIfTI")
    query: str = flag("required", "the question, in plain words")
    asm: str | None = flag(
        None, "segmenter: a folder, MedSAM2_latest.pt, or a spec of asm.SEGMENTERS"
    )
    out: str = flag("out", "folder for mask.png, overlay.png and result.json")
    samples: int = flag(
        1, "completions; the one whose box agrees most with the others is kept", low=1
    )
    temperature: float | None = flag(
        None, "0: most likely token (default: 0 for one sample, else 1)", low=0
    )
    max_new_tokens: int = flag(512, "longest completion in tokens", low=1)
    multimask: bool = flag(
        False, "request three masks and keep the best, as the released code does"
    )


def in_image_frame(xy, frame):
    """A box or points, model frame -> image frame, at most one image size outside; None stays None."""
    return None if xy is None else clip_to(frame.image, to_image(xy, frame))


def load_models(cfg):
    """The CRM and the ASM of a Config."""
    ranks = Ranks.start()
    crm = load_crm(
        cfg.crm,
        ranks.device,
        ranks.dtype(cfg.dtype),
        resize=cfg.resize,
        min_pixels=cfg.min_pixels,
        max_pixels=cfg.max_pixels,
        prompt=cfg.prompt,
    )
    return crm, load_asm(cfg.asm, ranks.device, multimask=cfg.multimask)


def answer(crm, prompt, samples: int, max_new_tokens: int, temperature: float, seed: int):
    """Sample completions of one prompt, box and points in the image frame -> keys of result.json, the completions, and
    the index of the kept one, or None if none is usable. Of several boxes, regions has each with its points."""
    (group,) = sample(crm, [prompt], samples, max_new_tokens, temperature, seed)
    answers = [crm.answers.read(text) for text in group.texts]

    def placed(one) -> dict:
        return {
            "bbox": in_image_frame(one.bbox, prompt.frame),
            "points": in_image_frame(one.points, prompt.frame),
        }

    completions = [
        {
            "problem": one.problem,
            "text": text,
            "reasoning": one.think,
            **placed(one),
            **({"regions": [placed(part) for part in one.parts]} if one.parts else {}),
        }
        for text, one in zip(group.texts, answers)
    ]
    kept, agreement = medoid(answers)
    return (
        {
            "samples": samples,
            "agreement": agreement,
            "texts": group.texts,
            "problem": answers[kept or 0].problem,
        },
        completions,
        kept,
    )


def rounded(xy) -> list[float] | None:
    """Coordinates for printing: flat, one decimal."""
    return None if xy is None else [round(v, 1) for v in np.ravel(xy).tolist()]


def main(cfg: Config) -> int:
    """The exit status: 0 or 3. Bad input raises SystemExit(2)."""
    # 1. set up: bad input ends here, before anything is written
    with exit_on(ValueError, OSError):
        if not cfg.query.strip():
            raise ValueError("--query is empty: ask a question about the image")
        try:
            view = read_view(cfg.image, cfg)
            image = view.image if view else load_image(cfg.image)
        except ValueError as error:
            raise ValueError(f"--image {cfg.image} {error}") from None
        crm, asm = load_models(cfg)
        prompt = crm.encode(image, fill_prompt(crm.template, cfg.query))
        out = Path(cfg.out)
        out.mkdir(parents=True, exist_ok=True)
    print(
        f"image      {cfg.image}, {image.width}x{image.height} pixels; model frame {prompt.frame.model}",
        f"; {view}" if view else "",
        sep="",
    )
    print(f"models     CRM {cfg.crm}, ASM {cfg.asm}, on {crm.device}", flush=True)

    # 2. the clinical reasoning module answers
    temperature = float(cfg.samples > 1) if cfg.temperature is None else cfg.temperature
    with exit_on(FloatingPointError):
        result, completions, kept = answer(
            crm, prompt, cfg.samples, cfg.max_new_tokens, temperature, cfg.seed
        )
    result = {
        "image": cfg.image,
        "size": image.size,
        "query": cfg.query,
        "crm": cfg.crm,
        "asm": cfg.asm,
    } | result
    for earlier in ("mask.png", "overlay.png", "mask.nii.gz", "mask.dcm"):  # of another question
        (out / earlier).unlink(missing_ok=True)
    if kept is None:
        (out / "result.json").write_text(json.dumps(result, indent=2) + "\n")
        print(
            f"no usable completion of {cfg.samples}: {result['problem']}; see {out}",
            file=sys.stderr,
        )
        return 3

    # 3. the anatomical segmentation module draws, in the image frame
    one = completions[kept]
    bbox, points = one["bbox"], one["points"]
    parts = [(part["bbox"], part["points"]) for part in one.get("regions", [one])]
    mask, scores = united_mask(asm, np.asarray(image), parts)
    Image.fromarray(np.uint8(mask) * 255).save(out / "mask.png")
    overlay(image, mask, bbox, points).save(out / "overlay.png")
    result |= one | {"mask_score": min(scores), "mask_pixels": int(mask.sum())}
    result |= view.write(mask, bbox, points, out) if view else {}
    (out / "result.json").write_text(json.dumps(result, indent=2) + "\n")
    print(f"reasoning  {(one['reasoning'] or '(none)').strip()}")
    print(f"box        {rounded(bbox)}" + (f"  ({one['problem']})" if one["problem"] else ""))
    print(f"points     {rounded(points)}")
    print(f"mask       {100 * mask.mean():.1f} % of the image, predicted quality {min(scores):.2f}")
    if result["agreement"] is not None:
        print(
            f"agreement  {result['agreement']:.2f} mean IoU with the other boxes of {cfg.samples} completions"
        )
    if view:
        print(f"scan's mask {result['scan']['mask']}")
    print(f"pictures   {out / 'overlay.png'}  {out / 'mask.png'}  numbers {out / 'result.json'}")
    return 0


if __name__ == "__main__":
    sys.exit(main(parse_args(Config, __doc__)))
