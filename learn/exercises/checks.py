"""What the eight exercises are checked with: hand numbers first, from small to large, then random
inputs, for which the project's own function says what is right. tests/test_learn_exercises.py
compares these with the slow versions that the tests have.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from data import keypoints_from_mask
from rewards import box_iou, point_dice
from scoring import lay_out, packed_attention
from train_grpo import group_advantages, grpo_loss, token_weights


@dataclass(frozen=True)
class Case:
    """One call of a function."""

    about: str
    args: tuple
    expected: Any


@dataclass(frozen=True)
class Exercise:
    name: str
    hint: str
    own: Callable  # the project's function, with the exercise's arguments
    source: Callable  # what --solution shows
    cases: list[Case]  # the smaller ones first
    call: Callable = lambda function, *args: function(*args)  # returns what is compared


def agree(got: Any, expected: Any) -> bool:
    """Whether two results are the same numbers in the same shape."""
    if got is None:
        return False
    if isinstance(expected, tuple):
        return len(got) == len(expected) and all(map(agree, got, expected))
    got = torch.as_tensor(got, dtype=torch.float64)
    expected = torch.as_tensor(expected, dtype=torch.float64)
    return got.shape == expected.shape and torch.allclose(got, expected, rtol=1e-4, atol=1e-6)


# ---------------------------------------------------------------- ours, as the exercises call it


def own_k3(logp: torch.Tensor, ref_logp: torch.Tensor) -> torch.Tensor:
    """The KL that grpo_loss measures, one token after the other."""
    one = torch.ones(1, 1)
    found = torch.zeros_like(logp)
    for place, token in enumerate(logp.flatten()):
        pi = token.reshape(1, 1)
        pi_ref = ref_logp.flatten()[place].reshape(1, 1)
        _, stats = grpo_loss(pi, pi, pi_ref, torch.zeros(1), one)
        found.view(-1)[place] = stats["kl"]
    return found


def own_clipped_loss(
    logp: torch.Tensor,
    old_logp: torch.Tensor,
    advantages: torch.Tensor,
    weights: torch.Tensor,
    clip: float = 0.2,
) -> torch.Tensor:
    loss, _ = grpo_loss(logp, old_logp, None, advantages, weights, clip, clip, dual_clip=0)
    return loss


def own_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, L: int, lengths: tuple[int, int]
) -> torch.Tensor:
    spans = lay_out([L], [lengths], "cpu")
    out, _ = packed_attention(None, q[None], k[None], v[None], None, spans=spans)
    return out[0].transpose(0, 1)


def loss_and_slope(function: Callable, logp: torch.Tensor, *args: Any) -> tuple:
    """Returns a loss and its gradient with respect to logp."""
    logp = logp.clone().requires_grad_()
    loss = function(logp, *args) + 0 * logp.sum()  # a clipped token may not depend on logp at all
    (slope,) = torch.autograd.grad(loss, logp)
    return loss.detach(), slope


# ---------------------------------------------------------------- cases


def mask_of(*rows: str) -> np.ndarray:
    """Returns a mask from a picture of it: "#" is inside."""
    return np.array([[letter == "#" for letter in row] for row in rows])


def random_mask(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).random((7, 9)) < 0.7


def random_numbers(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def compared(about: str, own: Callable, *args: Any) -> Case:
    """Returns a case whose result is that of the project's function."""
    return Case(about, args, own(*args))


def one_token(about: str, ratio: float, A: float, loss: float, slope: float) -> Case:
    """Returns a case of clipped_loss with one token, whose weight is 1."""
    logp = torch.tensor([[math.log(ratio)]])
    args = (logp, torch.zeros(1, 1), torch.tensor([A]), torch.ones(1, 1))
    return Case(about, args, (loss, [[slope]]))


def many_tokens() -> tuple:
    """Returns logp, old_logp, advantages and weights of three completions."""
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1], [1, 0, 0, 0]]).bool()
    logp = random_numbers(0, 3, 4) - 2
    old_logp = logp + 0.3 * random_numbers(1, 3, 4)
    return logp, old_logp, random_numbers(2, 3), token_weights(mask)


def values_seen(v: list[float], L: int, lengths: tuple[int, int]) -> tuple:
    """Returns inputs of attention in which every token likes all others alike, so that attention is
    the mean of the values that it may see."""
    values = torch.tensor(v)[None, :, None]
    zeros = torch.zeros_like(values)
    return zeros, zeros, values, L, lengths


SQUARE = (0, 0, 10, 10)
UNIT_CIRCLE = ((-1, 0), (1, 0))
ROWS = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1], [1, 0, 0, 0]]).bool()
LENS = (
    9 * math.atan2(4, 3) + 16 * math.atan2(3, 4) - 12
)  # of radii 3 and 4 whose centres are 5 apart

BOXES = [
    Case("a box and itself", (SQUARE, SQUARE), 1.0),
    Case("50 shared, 150 covered", (SQUARE, (5, 0, 15, 10)), 50 / 150),
    Case("one inside the other: 20 of 100", (SQUARE, (2, 2, 7, 6)), 20 / 100),
    Case("they touch", (SQUARE, (10, 0, 20, 10)), 0.0),
    Case("apart in both directions", (SQUARE, (20, 20, 30, 30)), 0.0),
    Case("apart in one direction", (SQUARE, (2, 20, 8, 30)), 0.0),
]
PAIRS = [
    Case("a pair and itself", (UNIT_CIRCLE, UNIT_CIRCLE), 1.0),
    Case("far apart", (UNIT_CIRCLE, ((9, 0), (11, 0))), 0.0),
    Case("radius 1 inside radius 3: 2 pi / 10 pi", (((0, 0), (2, 0)), ((-2, 0), (4, 0))), 0.2),
    Case(
        "unit circles, centres 1 apart: they share 2 pi/3 - sqrt(3)/2",
        (UNIT_CIRCLE, ((0, 0), (2, 0))),
        (2 * math.pi / 3 - math.sqrt(3) / 2) / math.pi,
    ),
    Case(
        "radii 3 and 4, centres 5 apart",
        (((-3, 0), (3, 0)), ((1, 0), (9, 0))),
        2 * LENS / (25 * math.pi),
    ),
]
MASKS = [
    Case("one pixel: both points are there", (mask_of("...", "..#"),), ((2, 1), (2, 1))),
    Case(
        "a square: its corners are farther than the median, 1",
        (mask_of(".....", ".###.", ".###.", ".###.", "....."),),
        ((2, 2), (1, 1)),
    ),
    Case("up to the border, which is an edge", (mask_of("###", "###", "###"),), ((1, 1), (0, 0))),
    Case("a row: all are equally deep", (mask_of("#####"),), ((0, 0), (3, 0))),
    *[compared(f"random mask {seed}", keypoints_from_mask, random_mask(seed)) for seed in range(5)],
]
REWARDS = [
    Case("mean 2, deviation 1", (torch.tensor([[1.0, 2.0, 3.0]]),), [[-1.0, 0.0, 1.0]]),
    Case(
        "two questions: each has its own mean and deviation",
        (torch.tensor([[1.0, 2.0, 3.0], [0.0, 0.0, 3.0]]),),
        [[-1.0, 0.0, 1.0], [-(3**-0.5), -(3**-0.5), 2 * 3**-0.5]],
    ),
    Case("all equal: exactly 0", (torch.tensor([[0.1] * 7]),), [[0.0] * 7]),
    compared("random rewards", group_advantages, random_numbers(0, 3, 8)),
]
WEIGHTS = [
    Case("one completion of two tokens", (torch.tensor([[True, True]]),), [[0.5, 0.5]]),
    Case(
        "three completions, each a third",
        (ROWS, "sequence"),
        [[1 / 6, 1 / 6, 0, 0], [1 / 12] * 4, [1 / 3, 0, 0, 0]],
    ),
    Case("seven tokens, each a seventh", (ROWS, "token"), (ROWS / 7).tolist()),
    Case("1 / (3 x 10)", (ROWS, "constant", 10), (ROWS / 30).tolist()),
]
KL = [
    Case("equal models", (torch.tensor([-1.0]), torch.tensor([-1.0])), [0.0]),
    Case(
        "pi 1/2, pi_ref 1/4: 1/2 + ln 2 - 1",
        (torch.tensor([0.5]).log(), torch.tensor([0.25]).log()),
        [0.5 + math.log(2) - 1],
    ),
    Case(
        "pi 1/4, pi_ref 1/2: 2 - ln 2 - 1",
        (torch.tensor([0.25]).log(), torch.tensor([0.5]).log()),
        [2 - math.log(2) - 1],
    ),
    compared("random tokens", own_k3, random_numbers(0, 2, 3) - 3, random_numbers(1, 2, 3) - 3),
]
LOSSES = [
    one_token("nothing has changed yet", 1.0, 1.0, loss=-1.0, slope=-1.0),
    one_token("risen and good: clipped at 1.2", 1.5, 1.0, loss=-1.2, slope=0.0),
    one_token("risen and bad: it is pushed down", 1.5, -1.0, loss=1.5, slope=1.5),
    one_token("fallen and good: it is pushed up", 0.5, 1.0, loss=-0.5, slope=-0.5),
    one_token("fallen and bad: clipped at 0.8", 0.5, -1.0, loss=0.8, slope=0.0),
    Case(
        "three completions of different lengths",
        many_tokens(),
        loss_and_slope(own_clipped_loss, *many_tokens()),
    ),
]
SEQUENCES = [
    Case(
        "one token each: means of 1, of 1 and 3, of 1 and 5",
        values_seen([1.0, 3.0, 5.0], 1, (1, 1)),
        [[[1.0], [2.0], [3.0]]],
    ),
    Case(
        "a prompt of two tokens, completions of two and one",
        values_seen([1.0, 2.0, 3.0, 4.0, 5.0], 2, (2, 1)),
        [[[1.0], [1.5], [2.0], [2.5], [8 / 3]]],
    ),
    compared(
        "two heads, random numbers",
        own_attention,
        random_numbers(0, 2, 8, 4),
        random_numbers(1, 2, 8, 4),
        random_numbers(2, 2, 8, 4),
        3,
        (2, 3),
    ),
]

EXERCISES = {
    1: Exercise(
        "box_iou",
        "The shared part is a box as well: from the larger of the left edges to the smaller of the "
        "right edges. Its width is negative where the boxes are apart. Make that 0 before you "
        "multiply.",
        box_iou,
        box_iou,
        BOXES,
    ),
    2: Exercise(
        "point_dice",
        "The area of a circle is pi r^2. math.dist gives the distance of two centres. The two "
        "areas are added as they are: what both share counts twice, which is why I does as well.",
        point_dice,
        point_dice,
        PAIRS,
    ),
    3: Exercise(
        "keypoints_from_mask",
        "distance_transform_edt(np.pad(mask, 1))[1:-1, 1:-1] is the depth of every pixel. "
        "np.nonzero(mask) lists the pixels in reading order, and argmax takes the first of equal "
        "values.",
        keypoints_from_mask,
        keypoints_from_mask,
        MASKS,
    ),
    4: Exercise(
        "group_advantages",
        "rewards.mean(1, keepdim=True) has the shape (P, 1). Seven times 0.1 has a mean that is "
        "not 0.1 in float32, so compare the largest and the smallest reward of a question.",
        group_advantages,
        group_advantages,
        REWARDS,
    ),
    5: Exercise(
        "token_weights",
        "mask.float() can be divided. mask.sum(1, keepdim=True) is the length of each completion.",
        token_weights,
        token_weights,
        WEIGHTS,
    ),
    6: Exercise(
        "k3",
        "log(pi_ref / pi) is a difference of the two arguments. Call it x.",
        own_k3,
        grpo_loss,
        KL,
    ),
    7: Exercise(
        "clipped_loss",
        "advantages[:, None] fits the tokens. torch.minimum compares two tensors number by number, "
        "after each has been multiplied by A: which of them is smaller depends on A's sign.",
        own_clipped_loss,
        grpo_loss,
        LOSSES,
        loss_and_slope,
    ),
    8: Exercise(
        "packed_attention",
        "Build a mask (S, S) that is true where row i may see column j: a lower triangle, with one "
        "rectangle set to False. Or call attention three times, once for each part.",
        own_attention,
        packed_attention,
        SEQUENCES,
    ),
}
