"""runtime/stats.py by hand: sums over micro-batches and ranks, warnings, the first step."""

import math

import pytest
import torch

from runtime.parallel import Ranks
from runtime.stats import WARNINGS, StepStats, check_first_step, spread, warnings_of


def test_micro_batches_add_up_and_extremes_do_not():
    stats = StepStats()
    stats.add(loss=torch.tensor(1.0), ratio_max=torch.tensor(1.5), ratio_min=torch.tensor(0.9))
    stats.add(loss=torch.tensor(2.0), ratio_max=torch.tensor(1.2), ratio_min=0.5)
    assert stats.total(Ranks()) == {"loss": 3.0, "ratio_max": 1.5, "ratio_min": 0.5}
    assert StepStats().total(Ranks()) == {}


def test_names_of_extremes_can_be_given():
    stats = StepStats(maxima=("height",), minima=("depth",))
    stats.add(height=1.0, depth=1.0, ratio_max=1.0)
    stats.add(height=3.0, depth=-3.0, ratio_max=1.0)
    assert stats.total(Ranks()) == {"height": 3.0, "depth": -3.0, "ratio_max": 2.0}


def test_ranks_add_up_as_micro_batches_do_also_where_one_measured_less():
    class OfTwo(Ranks):
        def gather(self, items):
            return [*items, {"loss": 0.5, "ratio_max": 4.0, "kl": 1.0}]

    stats = StepStats()
    stats.add(loss=1.0, ratio_max=2.0)
    assert stats.total(OfTwo()) == {"loss": 1.5, "ratio_max": 4.0, "kl": 1.0}
    assert stats.total(OfTwo()) == {"loss": 1.5, "ratio_max": 4.0, "kl": 1.0}  # a copy


def test_a_statistic_keeps_no_graph_and_no_rounding():
    weight = torch.tensor(1.0, requires_grad=True)
    stats = StepStats()
    stats.add(loss=weight * 16777216)
    stats.add(loss=weight * 1)
    assert stats.total(Ranks()) == {"loss": 16777217.0}  # which float32 cannot hold
    assert not stats.values["loss"].requires_grad


def test_the_spread_of_a_group_by_hand():
    found = spread(torch.tensor([1.0, 2.0, 3.0]), ["a", "b", "b"])
    assert found == {"reward_std": 1.0, "zero_std": 0.0, "identical": 0.5}
    same = spread(torch.tensor([0.1, 0.1]), ["a", "a"])
    assert same == {"reward_std": 0.0, "zero_std": 1.0, "identical": 1.0}


FINE = {
    "skipped": 0,
    "parse_ok": 0.9,
    "finished": 1.0,
    "zero_std": 0.1,
    "entropy": 0.5,
    "length": 80,
    "kl": 0.01,
    "logp_gap_mean": 1e-5,
    "sampled/parse_ok": 0.9,
    "grad_norm": 0.3,
    "box_iou": 0.4,
    "whole_image": 0.0,
    "think_format": 0.9,
}
WRONG = [
    ("skipped", 1, "--lr"),
    ("parse_ok", 0.0, "train_sft.py"),
    ("finished", 0.2, "--max-new"),
    ("zero_std", 0.95, "--temperature"),
    ("entropy", 0.01, "--kl-coef"),
    ("kl", 3.0, "--kl-coef"),
    ("sampled/parse_ok", 0.6, "--lr"),
    ("logp_gap_mean", 0.2, "--dtype"),
    ("grad_norm", 0.0, "--temperature"),
    ("box_iou", 0.1, "data.py"),
    ("whole_image", 0.6, "--mode"),
    ("think_format", 0.2, "--prompt"),
    ("length", 30, "--kl-coef"),
]


@pytest.mark.parametrize("key, value, flag", WRONG)
def test_a_warning_names_the_flag_that_helps(key, value, flag):
    (sentence,) = warnings_of(FINE | {key: value}, FINE)
    assert flag in sentence


def test_what_is_fine_or_not_measured_is_not_warned_of():
    assert warnings_of(FINE, FINE) == []
    assert warnings_of({"step": 3, "loss": 1.0}, {}) == []  # a row of SFT
    assert len(WRONG) == len(WARNINGS) - 2  # two need more numbers: tests/test_symptoms.py


# ---------------------------------------------------------------- the check of the first step

GOOD = {
    "loss": 0.1,
    "weight": 1.0,
    "logp_gap_sum": 1e-6,
    "logp_gap": 1e-5,
    "kl": 0.0,
    "ratio_max": 1.0,
    "ratio_min": 1.0,
}
# what a bfloat16 model gives whose packs, and so its matrix kernels, differ
ROUNDED = GOOD | {"logp_gap_sum": 0.003, "logp_gap": 0.3, "kl": 0.001}
FLOAT32, BFLOAT16 = torch.float32, torch.bfloat16


def check(totals, dtype=FLOAT32, updates=1, device_type="cpu", lengths=(3, 5)):
    check_first_step(totals, list(lengths), dtype, updates, device_type)


def test_a_first_step_as_it_should_be_passes():
    check(GOOD)
    check(GOOD, updates=4)
    check({"loss": 0.0, "weight": 1.0})  # no reference, nothing else measured
    check(ROUNDED, BFLOAT16)
    check(ROUNDED | {"ratio_max": 1.06, "ratio_min": 0.95}, BFLOAT16, updates=2)
    check(GOOD | {"logp_gap": 1e-3, "ratio_max": 1.001}, updates=2, device_type="cuda")


@pytest.mark.parametrize(
    "dtype, device_type", [(FLOAT32, "cpu"), (FLOAT32, "cuda"), (BFLOAT16, "cuda")]
)
@pytest.mark.parametrize("updates", [1, 2])
@pytest.mark.parametrize(
    "wrong, says",
    [
        ({"loss": math.nan}, "loss is not finite"),
        ({"loss": math.inf}, "loss is not finite"),
        ({"logp_gap_sum": 0.1}, "log-probabilities differ"),
        ({"logp_gap_sum": math.nan}, "log-probabilities differ"),
        ({"logp_gap": math.nan}, "log-probabilities differ"),
        ({"kl": 0.1}, "KL to a fresh reference"),
        ({"kl": -0.1}, "KL to a fresh reference"),
        ({"kl": math.nan}, "KL to a fresh reference"),
        ({"ratio_max": 50.0}, "first ratio is not 1"),
        ({"ratio_min": 0.01}, "first ratio is not 1"),
        ({"ratio_max": math.nan}, "first ratio is not 1"),
        ({"ratio_min": 0.0}, "first ratio is not 1"),
    ],
)
def test_what_is_wrong_in_any_type_ends_the_run(dtype, device_type, updates, wrong, says):
    with pytest.raises(RuntimeError, match=says):
        check(GOOD | wrong, dtype, updates, device_type)


@pytest.mark.parametrize(
    "wrong",
    [
        {"logp_gap": 2e-4},
        {"kl": 2e-4},
        {"ratio_max": 1.0001},
        {"ratio_min": 0.9999},
        {"logp_gap_sum": 2e-4},
    ],
)
@pytest.mark.parametrize("updates", [1, 2])
def test_in_float32_on_a_cpu_any_difference_is_a_bug(wrong, updates):
    with pytest.raises(RuntimeError, match="check of the first step"):
        check(GOOD | wrong, updates=updates)


@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16])
def test_with_one_update_the_ratio_is_1_in_every_type(dtype):
    with pytest.raises(RuntimeError, match="first ratio is not 1"):
        check(GOOD | {"ratio_max": 1.001}, dtype, updates=1, device_type="cuda")


def test_an_empty_completion_ends_the_run():
    with pytest.raises(RuntimeError, match="a completion is empty"):
        check(GOOD, lengths=(3, 0, 5))
