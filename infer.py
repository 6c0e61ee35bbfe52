"""One image and one question -> reasoning, box, two key points, mask.

    python infer.py --image demo/images/brain_mr_axial.png \\
                    --query "What could the paired dark cavities represent?"
    python infer.py --image x.png --query "…" --samples 8    # eight answers, the one most others agree with
    python infer.py --image x.png --query "…" --crm zzzyzh/MedReasoner-Soft-7B \\
                    --asm MedSAM2_latest.pt --resize square:840

Writes mask.png (0/255, the image's own size), overlay.png and result.json into --out. Exit status: 0 done, 2
bad input (one line says what; nothing is written), 3 the model gave no usable answer (result.json says why).
All coordinates it prints and writes are in the image frame: pixels of the image as given.
"""
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from asm import load_asm, overlay
from crm import load_crm
from data import MAX_PIXELS, MIN_PIXELS, clip_to, fill_prompt, load_image, load_prompt, to_image
from rewards import parse_answer
from runtime.cli import exit_on, flag, parse_args
from runtime.metrics import medoid
from runtime.parallel import Ranks


@dataclass
class Config:
    image: str = flag("required", "any image Pillow reads")
    query: str = flag("required", "the question, in plain words")
    crm: str | None = flag(None, "Qwen2.5-VL folder or hub name")
    asm: str | None = flag(None, "segmenter: our folder, or MedSAM2_latest.pt")
    out: str = flag("out", "folder for mask.png, overlay.png and result.json")
    samples: int = flag(1, "answers; of several, the one whose box agrees most with the others is kept")
    temperature: float | None = flag(None, "0 takes the likeliest token (0 for one sample, 1 for several)")
    max_new_tokens: int = flag(512, "an answer's limit")
    seed: int = flag(0, "of the sampling")
    prompt: str = flag("reasoning", "reasoning, direct, or a text file with {query}")
    resize: str = flag("aspect", "aspect, or square:SIDE")
    min_pixels: int = flag(MIN_PIXELS, "smallest image, model frame")
    max_pixels: int = flag(MAX_PIXELS, "largest image, model frame")
    dtype: str = flag("auto", "of the model: auto is bfloat16 on CUDA, float32 elsewhere",
                      ("auto", "float32", "bfloat16"))
    multimask: bool = flag(False, "ask the segmenter for three masks and keep the best, "
                                  "as the released code does")


def main(cfg: Config) -> int:
    with exit_on(ValueError, OSError):
        if not cfg.query.strip():
            raise ValueError("--query is empty: ask a question about the image")
        try:
            image = load_image(cfg.image)
        except ValueError as error:
            raise ValueError(f"--image {cfg.image} {error}") from None
        template, ranks = load_prompt(cfg.prompt), Ranks.start()
        crm = load_crm(cfg.crm, ranks.device, ranks.dtype(cfg.dtype), resize=cfg.resize,
                       min_pixels=cfg.min_pixels, max_pixels=cfg.max_pixels)
        asm = load_asm(cfg.asm, ranks.device, multimask=cfg.multimask)
        prompt = crm.encode(image, fill_prompt(template, cfg.query))
        out = Path(cfg.out)
        out.mkdir(parents=True, exist_ok=True)

    # the clinical reasoning module answers
    temperature = float(cfg.samples > 1) if cfg.temperature is None else cfg.temperature
    group, = crm.sample([prompt], cfg.samples, cfg.max_new_tokens, temperature, cfg.seed)
    answers = [parse_answer(text) for text in group.texts]
    kept, agreement = medoid(answers)
    result = {"image": cfg.image, "size": list(image.size), "query": cfg.query, "crm": cfg.crm,
              "asm": cfg.asm, "samples": cfg.samples, "agreement": agreement, "texts": group.texts,
              "problem": answers[kept or 0].problem}
    if kept is None:
        (out / "result.json").write_text(json.dumps(result, indent=2) + "\n")
        print(f"no usable answer in {cfg.samples}: {answers[0].problem}; see {out / 'result.json'}",
              file=sys.stderr)
        return 3

    # the anatomical segmentation module draws
    answer, W, H = answers[kept], *image.size
    bbox = answer.bbox and clip_to(image.size, to_image(answer.bbox, prompt.frame))
    points = answer.points and clip_to(image.size, to_image(answer.points, prompt.frame))
    masks, scores = asm.segment(np.asarray(image), bbox and [bbox], points and [points])
    Image.fromarray(np.uint8(masks[0]) * 255).save(out / "mask.png")
    overlay(image, masks[0], bbox, points).save(out / "overlay.png")
    result |= {"reasoning": answer.think, "bbox": bbox, "points": points, "mask_score": float(scores[0]),
               "mask_pixels": int(masks[0].sum()), "text": group.texts[kept]}
    (out / "result.json").write_text(json.dumps(result, indent=2) + "\n")

    whole = lambda xy: None if xy is None else [round(v, 1) for v in np.ravel(xy).tolist()]
    print(f"reasoning  {(answer.think or '(none)').strip()}")
    print(f"box        {whole(bbox)}  of {W}x{H} pixels"
          + (f"  ({answer.problem})" if answer.problem else ""))
    print(f"points     {whole(points)}")
    print(f"mask       {100 * masks[0].mean():.1f} % of the image, predicted quality {scores[0]:.2f}")
    if agreement is not None:
        print(f"agreement  {agreement:.2f} mean IoU with the other boxes of {cfg.samples} answers")
    print(f"pictures   {out / 'overlay.png'}  {out / 'mask.png'}  numbers {out / 'result.json'}")
    return 0


if __name__ == "__main__":
    sys.exit(main(parse_args(Config, __doc__)))
