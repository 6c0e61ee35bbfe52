"""Eight functions of this project without their bodies. Write them here, in any order.

    python -m learn.exercises                   # which are not started, wrong or right
    python -m learn.exercises 4                 # only the fourth
    python -m learn.exercises 4 --hint
    python -m learn.exercises 4 --solution      # the project's own function

They are the parts that GRPO for pointing is made of: two measures of where an answer points, the
key points of the truth, and then the algorithm itself. Any way to write them is right that computes
the same numbers. `git checkout learn/exercises/yours.py` brings the empty file back.
"""

import numpy as np
import torch

from rewards import circle, lens_area

__all__ = ["circle", "lens_area", "np", "torch"]  # you will want these

# ---------------------------------------------------------------- where an answer points


def box_iou(a: tuple, b: tuple) -> float:
    """1. Intersection over union of two boxes: the area that both share, divided by the area that
    they cover together.

    A box is (x1, y1, x2, y2): its left, upper, right and lower edge. Its area is
    (x2 - x1) (y2 - y1), and it is never 0 here. Boxes that are apart share nothing."""
    raise NotImplementedError


def point_dice(p: tuple, g: tuple) -> float:
    """2. How well two pairs of points agree. Each of p and g is ((x, y), (x, y)), two different
    points.

    The line between the two points of a pair is the diameter of a circle. Let A_p and A_g be the
    areas of the two circles, and I the area that both share. The result is 2 I / (A_p + A_g).

    `circle(p)` returns (centre, radius) of a pair's circle. `lens_area(r, s, d)` returns the area
    that two circles share whose radii are r and s, and whose centres are d apart."""
    raise NotImplementedError


def keypoints_from_mask(mask: np.ndarray) -> tuple:
    """3. Two points deep inside a region. mask: (H, W) bool, not empty. Returns ((x, y), (x, y)).

    The depth of a pixel of the region is its distance to the nearest pixel that is not of the
    region. What lies beyond the border of the image is not of the region.

    The first point is the deepest pixel. For the second, measure how far each pixel of the region
    is from the first point (the first point itself is one of them, at distance 0). Only pixels that
    are farther than the median of these distances are allowed. The second point is the deepest of
    them, or the first point again if there are none. Of equally deep pixels take the first in
    reading order: row by row, from left to right.

    `scipy.ndimage.distance_transform_edt` may help."""
    raise NotImplementedError


# ---------------------------------------------------------------- the algorithm


def group_advantages(rewards: torch.Tensor, eps: float = 1e-6) -> torch.Tensor:
    """4. rewards (P, G) of P questions with G completions each -> advantages (P, G).

    An advantage says how many standard deviations a reward is above the mean of its own question's
    rewards: (reward - mean) / (standard deviation + eps). The standard deviation is the unbiased
    one, which divides by G - 1. Where all rewards of a question are equal, its advantages are
    exactly 0, whatever rounding makes of the mean."""
    raise NotImplementedError


def token_weights(
    mask: torch.Tensor, agg: str = "sequence", max_tokens: int | None = None
) -> torch.Tensor:
    """5. How much each token counts in the loss. mask (N, T) is true where a completion has a token
    -> weights (N, T), 0 where there is none. Every completion has at least one token.

    agg="sequence"   every completion counts 1/N, which its tokens share equally
    agg="token"      every token counts the same, and all weights sum to 1
    agg="constant"   every token counts 1 / (N * max_tokens)"""
    raise NotImplementedError


def k3(logp: torch.Tensor, ref_logp: torch.Tensor) -> torch.Tensor:
    """6. An estimate of how far the policy is from the reference model, one for each token. All
    tensors have the same shape.

    With the probabilities pi = exp(logp) and pi_ref = exp(ref_logp) of a token it is
    pi_ref / pi - log(pi_ref / pi) - 1."""
    raise NotImplementedError


def clipped_loss(
    logp: torch.Tensor,
    old_logp: torch.Tensor,
    advantages: torch.Tensor,
    weights: torch.Tensor,
    clip: float = 0.2,
) -> torch.Tensor:
    """7. The loss of GRPO without its KL term, a tensor with one number. `backward` will be called
    on it, so that the gradient is checked as well.

    logp, old_logp, weights are (N, T), advantages are (N,). The ratio of a token is
    pi / pi_old = exp(logp - old_logp), and A is the advantage of its completion. The gain of a
    token is the smaller one of ratio * A and clip(ratio, 1 - clip, 1 + clip) * A. The loss is minus
    the sum of all gains, each times its weight."""
    raise NotImplementedError


def packed_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, L: int, lengths: tuple[int, int]
) -> torch.Tensor:
    """8. Attention in a sequence [prompt | completion a | completion b]. q, k, v are (h, S, d): h
    heads, S tokens, d numbers each. The first L tokens are the prompt's, then come lengths[0] and
    lengths[1] tokens of the two completions. Returns (h, S, d).

    A token attends to the tokens before it in the sequence and to itself, with one exception: a
    token of completion b does not see completion a. Attention is softmax(q k^T / sqrt(d)) v.

    `torch.nn.functional.scaled_dot_product_attention` may help."""
    raise NotImplementedError
