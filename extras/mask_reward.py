"""The reward term mask_dice (train_grpo.py --weights mask_dice=1): how well the frozen segmenter's mask fits."""

import numpy as np

from data import BadRow, OneBox, to_image
from metrics import mask_dice, united_mask
from rewards import smooth_log


def mask_rewards(
    asm, sample, texts: list[str], frame, answers=OneBox, official: bool = False
) -> list[float]:
    """S_log(Dice) of the frozen segmenter's mask for each completion, of several boxes the masks united; 0 without a
    box. frame: of the completions. BadRow where the sample has no true mask."""
    if sample.mask is None:
        raise BadRow(
            f"sample {sample.id}: no mask, which the mask_dice reward needs; drop it from --weights"
        )
    pixels, rewards = np.asarray(sample.image), []
    for answer in (answers.read(text, official) for text in texts):
        parts = [
            (to_image(part.bbox, frame), part.points and to_image(part.points, frame))
            for part in answer.parts or [answer]
            if part.bbox
        ]
        mask, _ = united_mask(asm, pixels, parts)
        rewards.append(smooth_log(mask_dice(mask, sample.mask)) if parts else 0.0)
    return rewards
