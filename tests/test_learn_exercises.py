"""learn/exercises: what is not started, wrong and right, and whether the checks are right."""

import inspect
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from test_data import slow_keypoints
from test_grpo import slow_loss
from torch.nn.functional import scaled_dot_product_attention

from learn.exercises import __main__ as runner
from learn.exercises import yours
from learn.exercises.__main__ import check, main, solution
from learn.exercises.checks import EXERCISES, agree
from rewards import circle, lens_area
from runtime.cli import ROOT

BY_NAME = {exercise.name: exercise for exercise in EXERCISES.values()}


# ---------------------------------------------------------------- typical mistakes


def iou_with_inclusive_edges(a, b):
    width = max(0, min(a[2], b[2]) - max(a[0], b[0]) + 1)
    height = max(0, min(a[3], b[3]) - max(a[1], b[1]) + 1)
    areas = [(box[2] - box[0] + 1) * (box[3] - box[1] + 1) for box in (a, b)]
    return width * height / (sum(areas) - width * height)


def iou_of_negative_sides(a, b):
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (a, b)]
    return width * height / (sum(areas) - width * height)


def dice_over_the_union(p, g):
    (centre_p, r), (centre_g, s) = circle(p), circle(g)
    shared = lens_area(r, s, math.dist(centre_p, centre_g))
    return 2 * shared / (math.pi * r**2 + math.pi * s**2 - shared)


def dice_with_the_diameter_as_radius(p, g):
    r, s = math.dist(*p), math.dist(*g)
    shared = lens_area(r, s, math.dist(circle(p)[0], circle(g)[0]))
    return 2 * shared / (math.pi * r**2 + math.pi * s**2)


def points_without_a_border(mask):
    return points_by_depth(mask, lambda depth, away: away > np.median(away), border=False)


def points_farther_than_the_mean(mask):
    return points_by_depth(mask, lambda depth, away: away > away.mean())


def points_that_are_farthest(mask):
    return points_by_depth(mask, lambda depth, away: away == away.max())


def points_by_depth(mask, allowed, border=True):
    from scipy.ndimage import distance_transform_edt

    ys, xs = np.nonzero(mask)
    depth = distance_transform_edt(np.pad(mask, 1))[1:-1, 1:-1]
    if not border:
        depth = distance_transform_edt(mask)
    depth = depth[ys, xs]
    first = depth.argmax()
    away = np.hypot(xs - xs[first], ys - ys[first])
    far = allowed(depth, away)
    second = np.where(far, depth, -1).argmax() if far.any() else first
    return (xs[first], ys[first]), (xs[second], ys[second])


def advantages_over_the_batch(rewards, eps=1e-6):
    return (rewards - rewards.mean()) / (rewards.std() + eps)


def advantages_with_a_biased_deviation(rewards, eps=1e-6):
    centred = rewards - rewards.mean(1, keepdim=True)
    return centred / (rewards.std(1, keepdim=True, correction=0) + eps)


def advantages_of_rounding(rewards, eps=1e-6):
    centred = rewards - rewards.mean(1, keepdim=True)
    return centred / (rewards.std(1, keepdim=True) + eps)


def weights_of_tokens_always(mask, agg="sequence", max_tokens=None):
    return mask / mask.sum()


def weights_that_forget_the_number_of_completions(mask, agg="sequence", max_tokens=None):
    if agg == "sequence":
        return mask / mask.sum(1, keepdim=True)
    return mask / mask.sum() if agg == "token" else mask / (len(mask) * max_tokens)


def k1(logp, ref_logp):
    return logp - ref_logp


def k3_of_the_inverse(logp, ref_logp):
    x = logp - ref_logp
    return x.exp() - x - 1


def loss_that_clips_without_a_minimum(logp, old_logp, advantages, weights, clip=0.2):
    ratio = (logp - old_logp).exp().clamp(1 - clip, 1 + clip)
    return -(weights * ratio * advantages[:, None]).sum()


def loss_with_a_minimum_of_ratios(logp, old_logp, advantages, weights, clip=0.2):
    ratio = (logp - old_logp).exp()
    smaller = torch.minimum(ratio, ratio.clamp(1 - clip, 1 + clip))
    return -(weights * smaller * advantages[:, None]).sum()


def loss_without_a_sign(logp, old_logp, advantages, weights, clip=0.2):
    A = advantages[:, None]
    ratio = (logp - old_logp).exp()
    return (weights * torch.minimum(ratio * A, ratio.clamp(1 - clip, 1 + clip) * A)).sum()


def attention_to_everything_before(q, k, v, L, lengths):
    return scaled_dot_product_attention(q, k, v, is_causal=True)


def attention_without_the_prompt(q, k, v, L, lengths):
    parts = []
    for x in (slice(0, L), slice(L, L + lengths[0]), slice(L + lengths[0], None)):
        parts.append(scaled_dot_product_attention(q[:, x], k[:, x], v[:, x], is_causal=True))
    return torch.cat(parts, 1)


MISTAKES = {
    "box_iou": [iou_with_inclusive_edges, iou_of_negative_sides],
    "point_dice": [dice_over_the_union, dice_with_the_diameter_as_radius],
    "keypoints_from_mask": [
        points_without_a_border,
        points_farther_than_the_mean,
        points_that_are_farthest,
    ],
    "group_advantages": [
        advantages_over_the_batch,
        advantages_with_a_biased_deviation,
        advantages_of_rounding,
    ],
    "token_weights": [weights_of_tokens_always, weights_that_forget_the_number_of_completions],
    "k3": [k1, k3_of_the_inverse],
    "clipped_loss": [
        loss_that_clips_without_a_minimum,
        loss_with_a_minimum_of_ratios,
        loss_without_a_sign,
    ],
    "packed_attention": [attention_to_everything_before, attention_without_the_prompt],
}
EVERY_MISTAKE = [(name, mistake) for name, of_one in MISTAKES.items() for mistake in of_one]


@pytest.mark.parametrize(
    "name, mistake", EVERY_MISTAKE, ids=lambda value: getattr(value, "__name__", value)
)
def test_a_typical_mistake_is_wrong_with_its_case(name, mistake):
    verdict, details = check(BY_NAME[name], mistake)
    assert verdict == "wrong"
    for word in ("expected", "got", " = "):
        assert word in details


def test_every_exercise_has_a_mistake():
    assert MISTAKES.keys() == BY_NAME.keys()


# ---------------------------------------------------------------- right, and not started


@pytest.mark.parametrize("exercise", EXERCISES.values(), ids=lambda exercise: exercise.name)
def test_the_projects_own_function_is_right(exercise):
    assert check(exercise, exercise.own) == ("right", "")


@pytest.mark.parametrize("exercise", EXERCISES.values(), ids=lambda exercise: exercise.name)
def test_the_empty_file_is_not_started_and_says_what_is_asked(exercise):
    """Fails where the exercises are solved: git checkout learn/exercises/yours.py"""
    function = getattr(yours, exercise.name)
    assert check(exercise, function) == ("not started", "")
    names = set(inspect.signature(function).parameters)
    assert names <= set(inspect.signature(exercise.own).parameters)
    assert len(function.__doc__.split()) > 30


def masked_attention(q, k, v, L, lengths):
    """Another way than the project's: one dense mask."""
    S = q.shape[1]
    mask = torch.ones(S, S).tril().bool()
    mask[L + lengths[0] :, L : L + lengths[0]] = False
    return scaled_dot_product_attention(q, k, v, attn_mask=mask)


def looped_loss(logp, old_logp, advantages, weights, clip=0.2):
    """Another way than the project's: token by token."""
    loss = torch.zeros(())
    for i, t in weights.nonzero().tolist():
        ratio = (logp[i, t] - old_logp[i, t]).exp()
        gain = ratio * advantages[i]
        if advantages[i] > 0 and ratio > 1 + clip:
            gain = (1 + clip) * advantages[i]
        if advantages[i] < 0 and ratio < 1 - clip:
            gain = (1 - clip) * advantages[i]
        loss = loss - weights[i, t] * gain
    return loss


def test_another_way_to_write_it_is_right_as_well():
    assert check(BY_NAME["packed_attention"], masked_attention) == ("right", "")
    assert check(BY_NAME["clipped_loss"], looped_loss) == ("right", "")


# ---------------------------------------------------------------- the checks are the tests' oracles


def test_key_points_are_those_of_the_slow_definition():
    for case in BY_NAME["keypoints_from_mask"].cases:
        assert agree(slow_keypoints(*case.args), case.expected), case.about


def test_losses_are_those_of_the_token_by_token_one():
    for case in BY_NAME["clipped_loss"].cases:
        logp, old_logp, advantages, weights = case.args
        slow = slow_loss(logp, old_logp, logp, advantages, weights, 0.2, 0.2, 0.0, 0.0, "k3")
        assert agree(slow, case.expected[0]), case.about


def test_the_kl_is_that_of_probabilities():
    for case in BY_NAME["k3"].cases:
        ratio = (case.args[1] - case.args[0]).double().exp()
        assert agree(ratio - ratio.log() - 1, case.expected), case.about


def test_attention_is_that_under_one_dense_mask():
    for case in BY_NAME["packed_attention"].cases:
        assert agree(masked_attention(*case.args), case.expected), case.about


def test_results_agree_in_numbers_and_shape():
    assert agree(0.5, 0.5)
    assert agree(np.float32(0.5), 0.5)
    assert agree([[1, 2], [3, 4]], ((1, 2), (3, 4)))
    assert agree(torch.ones(2).requires_grad_(), [1.0, 1.0])
    for got in (None, 0.6, [0.5], float("nan")):
        assert not agree(got, 0.5)


# ---------------------------------------------------------------- python -m learn.exercises


def test_an_error_in_a_function_is_wrong_and_the_others_are_still_checked(monkeypatch, capsys):
    monkeypatch.setattr(yours, "box_iou", lambda a, b: a.area)
    monkeypatch.setattr(yours, "k3", lambda logp, ref_logp: None)
    monkeypatch.setattr(yours, "token_weights", BY_NAME["token_weights"].own)
    main([])
    said = capsys.readouterr().out
    assert "1 box_iou              wrong" in said
    assert "got      AttributeError: 'tuple' object has no attribute 'area'" in said
    assert "a = (0, 0, 10, 10)" in said
    assert "got      None" in said
    assert "5 token_weights        right" in said
    assert "8 packed_attention     not started" in said


def test_the_smallest_failing_case_is_shown(monkeypatch, capsys):
    monkeypatch.setattr(yours, "box_iou", iou_of_negative_sides)
    main(["1"])
    said = capsys.readouterr().out
    assert said == (
        "1 box_iou              wrong\n"
        "      apart in both directions\n"
        "      a = (0, 0, 10, 10)\n"
        "      b = (20, 20, 30, 30)\n"
        "      expected 0.0\n"
        "      got      1.0\n"
    )


@pytest.mark.parametrize("number", EXERCISES)
def test_a_hint_is_a_hint_and_the_solution_is_the_projects_function(number, capsys):
    main([str(number), "--hint"])
    hint = capsys.readouterr().out
    assert hint.strip()
    main([str(number), "--solution"])
    shown = capsys.readouterr().out
    source = EXERCISES[number].source
    assert inspect.getsource(source).rstrip() in shown
    file, _, line = shown.splitlines()[0].removeprefix("# ").partition(", line ")
    first = (ROOT / file).read_text(encoding="utf-8").splitlines()[int(line) - 1]
    assert first.startswith(f"def {source.__name__}(")
    assert solution(EXERCISES[number]) == shown.rstrip("\n") + "\n"


def test_a_hint_needs_a_number(capsys):
    with pytest.raises(SystemExit):
        main(["--hint"])
    assert "say of which exercise" in capsys.readouterr().err


def test_the_command_runs_and_the_runner_is_short():
    done = subprocess.run(
        [sys.executable, "-m", "learn.exercises"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) >= len(EXERCISES)
    assert len(inspect.getsource(runner).splitlines()) <= 100
