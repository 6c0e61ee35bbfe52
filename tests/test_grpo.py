"""The algorithm on plain tensors: numbers by hand, slow versions, and that cutting a step changes
nothing. Then the loop of train_grpo.py against one without any cleverness."""

import json
import math
from functools import partialmethod

import numpy as np
import pytest
import torch
from conftest import noise_image, random_crm

import crm as crm_module
import train_grpo
from crm import CRM, Group, load_crm
from data import Example, Examples, evenly_spread, load_samples, load_splits
from runtime.files import read_jsonl
from runtime.optim import Optimizer
from runtime.parallel import Ranks
from runtime.run import Run, learning_rate, step_indices
from runtime.stats import StepStats
from sampling import sample
from scoring import Pack, logp, score
from train_grpo import (
    Config,
    Rollout,
    group_advantages,
    grpo_loss,
    step_row,
    token_weights,
    weigh_tokens,
)

DOUBLE = torch.float64

# ---------------------------------------------------------------- advantages


def test_advantages_by_hand():
    # means 2 and 1, standard deviations 1 and sqrt(3)
    rewards = torch.tensor([[1.0, 2.0, 3.0], [0.0, 0.0, 3.0]], dtype=DOUBLE)
    centred = torch.tensor([[-1.0, 0.0, 1.0], [-1.0, -1.0, 2.0]], dtype=DOUBLE)
    own_std = torch.tensor([[1.0], [3.0**0.5]], dtype=DOUBLE)
    torch.testing.assert_close(group_advantages(rewards, "group", eps=0), centred / own_std)
    torch.testing.assert_close(group_advantages(rewards, "none"), centred)
    batch_std = torch.tensor([1, 2, 3, 0, 0, 3], dtype=DOUBLE).std()
    torch.testing.assert_close(group_advantages(rewards, "batch", eps=0), centred / batch_std)


@pytest.mark.parametrize("norm", ["group", "none", "batch"])
def test_a_group_of_equal_rewards_gets_exactly_zero(norm):
    # the mean of seven times 0.1 is not 0.1 in float32
    rewards = torch.tensor([[0.1] * 7, [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7]])
    advantages = group_advantages(rewards, norm)
    assert (advantages[0] == 0).all()
    assert (advantages[1] != 0).any()
    assert advantages.isfinite().all()


def test_group_advantages_ignore_the_scale_and_offset_of_rewards():
    rewards = torch.randn(4, 8, dtype=DOUBLE, generator=torch.Generator().manual_seed(0))
    moved = group_advantages(5 * rewards + 3)
    torch.testing.assert_close(moved, group_advantages(rewards), atol=1e-5, rtol=1e-5)


# ---------------------------------------------------------------- weights of tokens

MASK = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1], [1, 0, 0, 0]]).bool()


def test_token_weights_by_hand():
    by_completion = torch.tensor([[1 / 2, 1 / 2, 0, 0], [1 / 4] * 4, [1, 0, 0, 0]]) / 3
    torch.testing.assert_close(token_weights(MASK, "sequence"), by_completion)
    torch.testing.assert_close(token_weights(MASK, "token"), MASK / 7)
    torch.testing.assert_close(token_weights(MASK, "constant", 10), MASK / 30)


@pytest.mark.parametrize("agg", ["sequence", "token", "constant"])
def test_rows_without_tokens_count_as_no_completion_and_an_empty_step_is_no_nan(agg):
    empty = torch.zeros(2, 4).bool()
    with_empty_rows = token_weights(torch.cat([MASK, empty]), agg, 10)
    torch.testing.assert_close(with_empty_rows[:3], token_weights(MASK, agg, 10))
    assert (with_empty_rows[3:] == 0).all()
    assert (token_weights(empty, agg, 10) == 0).all()


def test_tokens_of_a_step_are_weighed_over_all_groups_and_not_past_an_end(crm, prompts):
    groups = sample(crm, prompts[:2], 2, 6, seed=0)
    for group, lengths in zip(groups, ([3, 6], [2, 1])):
        group.lengths[:] = torch.tensor(lengths)
    weigh_tokens(groups, Config(group=2, max_new_tokens=6, agg="token"), Ranks())
    for group in groups:
        assert group.token_weights.shape == group.tokens.shape
        for row, length in zip(group.token_weights, group.lengths.tolist()):
            torch.testing.assert_close(row[:length], torch.full((length,), 1 / 12))
            assert (row[length:] == 0).all()


# ---------------------------------------------------------------- loss


def random_inputs(N=6, T=5, seed=0):
    """logp, old_logp, ref_logp, advantages and weights of the loss."""
    generator = torch.Generator().manual_seed(seed)

    def random_logp():
        return -3 * torch.rand(N, T, generator=generator, dtype=DOUBLE)

    logp = random_logp().requires_grad_()
    old_logp = random_logp()
    ref_logp = random_logp()
    lengths = torch.randint(1, T + 1, (N, 1), generator=generator)
    advantages = torch.randn(N, generator=generator, dtype=DOUBLE)
    weights = token_weights(torch.arange(T) < lengths).to(DOUBLE)
    return logp, old_logp, ref_logp, advantages, weights


def slow_loss(logp, old_logp, ref_logp, advantages, weights, low, high, dual, beta, kl):
    """The loss token by token, with math and if."""
    total = 0.0
    for i in range(logp.shape[0]):
        A = advantages[i].item()
        for t in range(logp.shape[1]):
            if weights[i, t] == 0:
                continue
            rho = math.exp(logp[i, t] - old_logp[i, t])
            clipped = min(max(rho, 1 - low), 1 + high)
            gain = min(rho * A, clipped * A)
            if dual and A < 0:
                gain = max(gain, dual * A)
            d = (logp[i, t] - ref_logp[i, t]).item()
            estimates = {"k1": d, "k2": d * d / 2, "k3": math.exp(-d) + d - 1}
            total += weights[i, t].item() * (-gain + beta * estimates[kl])
    return total


@pytest.mark.parametrize("kl", ["k1", "k2", "k3"])
@pytest.mark.parametrize("low, high, dual", [(0.2, 0.2, 3.0), (0.2, 0.28, 0.0), (0.1, 0.3, 1.5)])
def test_loss_equals_the_token_by_token_one(kl, low, high, dual):
    inputs = random_inputs()
    loss, stats = grpo_loss(*inputs, low, high, dual, 0.3, kl)
    detached = [tensor.detach() for tensor in inputs]
    assert loss.item() == pytest.approx(slow_loss(*detached, low, high, dual, 0.3, kl), abs=1e-12)
    assert not any(value.requires_grad for value in stats.values())


def test_on_policy_gradient_is_that_of_reinforce():
    logp, _, _, advantages, weights = random_inputs()
    loss, stats = grpo_loss(logp, logp.detach(), None, advantages, weights)
    loss.backward()
    torch.testing.assert_close(logp.grad, -weights * advantages[:, None])
    assert stats["ratio_max"] == 1
    assert stats["ratio_min"] == 1
    assert stats["clip_frac"] == 0


# ratios of five tokens to the policy that sampled, and the advantages of their completions
RATIOS = [1.5, 1.5, 0.5, 0.5, 5.0]
SIGNS = [1.0, -1.0, 1.0, -1.0, -1.0]


def loss_of_five_tokens(weights):
    logp = torch.log(torch.tensor(RATIOS, dtype=DOUBLE))[:, None].requires_grad_()
    advantages = torch.tensor(SIGNS, dtype=DOUBLE)
    loss, stats = grpo_loss(logp, torch.zeros_like(logp.detach()), None, advantages, weights)
    loss.backward()
    return logp.grad[:, 0], stats


def test_clipping_stops_the_gradient_only_where_it_should():
    gradient, stats = loss_of_five_tokens(torch.ones(5, 1, dtype=DOUBLE))
    moves = [
        False,  # it has risen and was good: clipped
        True,  # it has risen and was bad: it is pushed down
        True,  # it has fallen and was good: it is pushed up
        False,  # it has fallen and was bad: clipped
        False,  # it has risen far and was bad: the dual clip
    ]
    assert [value != 0 for value in gradient.tolist()] == moves
    assert stats["clip_frac"] == 2


def test_shares_clipped_low_and_high_by_hand():
    # a good token is clipped where its ratio is high, a bad one where it is low
    weights = torch.tensor([0.1, 0.2, 0.3, 0.15, 0.25], dtype=DOUBLE)[:, None]
    _, stats = loss_of_five_tokens(weights)
    assert stats["clip_high_frac"].item() == pytest.approx(0.1)
    assert stats["clip_low_frac"].item() == pytest.approx(0.15)
    assert stats["clip_frac"].item() == pytest.approx(0.25)


def test_kl_of_equal_policies_is_exactly_zero_and_k2_has_the_gradient_of_the_reverse_kl():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(1, 5, dtype=DOUBLE, generator=generator).requires_grad_()
    ref_logp = torch.randn(1, 5, dtype=DOUBLE, generator=generator).log_softmax(-1)
    logp = logits.log_softmax(-1)
    probabilities = logp.detach().exp()
    zero = torch.zeros(1, dtype=DOUBLE)

    def kl_loss(reference, kl):
        """The weight of each of the five tokens is its probability: an expectation."""
        return grpo_loss(logp, logp.detach(), reference, zero, probabilities, kl_coef=1.0, kl=kl)

    gradient = {}
    for kl in ("k1", "k2", "k3"):
        _, stats = kl_loss(logp.detach(), kl)
        assert stats["kl"] == 0
        loss, _ = kl_loss(ref_logp, kl)
        (gradient[kl],) = torch.autograd.grad(loss, logits, retain_graph=True)
    reverse_kl = (logits.softmax(-1) * (logp - ref_logp)).sum()
    (exact,) = torch.autograd.grad(reverse_kl, logits, retain_graph=True)
    torch.testing.assert_close(gradient["k2"], exact)
    assert (gradient["k3"] - exact).abs().max() > 1e-3
    assert gradient["k1"].abs().max() < 1e-12


def test_what_lies_outside_the_mask_cannot_poison_the_loss():
    logp, old_logp, ref_logp, advantages, weights = random_inputs()
    clean, _ = grpo_loss(
        logp, old_logp, ref_logp, advantages, weights, sampler_logp=old_logp, sampler_is=2.0
    )
    poisoned = []
    for tensor in (logp, old_logp, ref_logp):
        poisoned.append(tensor.detach().masked_fill(weights == 0, -torch.inf))
    poisoned[0].requires_grad_()
    loss, _ = grpo_loss(*poisoned, advantages, weights, sampler_logp=poisoned[1], sampler_is=2.0)
    loss.backward()
    assert loss.item() == clean.item()
    assert poisoned[0].grad.isfinite().all()


def test_cutting_a_step_into_micro_batches_changes_neither_loss_nor_gradient_nor_statistics():
    logp, old_logp, ref_logp, advantages, weights = random_inputs(N=8)
    sampler_logp = old_logp - 0.5
    options = {"sampler_is": 1.5}
    whole, stats_of_all = grpo_loss(
        logp, old_logp, ref_logp, advantages, weights, sampler_logp=sampler_logp, **options
    )
    (gradient,) = torch.autograd.grad(whole, logp)
    loss_of_parts = 0.0
    gradients = []
    stats = StepStats()
    for rows in ([0], [1, 2, 3], [4, 5, 6, 7]):
        part = logp.detach()[rows].requires_grad_()
        loss, measured = grpo_loss(
            part,
            old_logp[rows],
            ref_logp[rows],
            advantages[rows],
            weights[rows],
            sampler_logp=sampler_logp[rows],
            **options,
        )
        gradients.append(torch.autograd.grad(loss, part)[0])
        loss_of_parts += loss.item()
        stats.add(**measured)
    assert loss_of_parts == pytest.approx(whole.item(), abs=1e-12)
    torch.testing.assert_close(torch.cat(gradients), gradient)
    total = stats.total(Ranks())
    assert total.keys() == stats_of_all.keys()
    for name, value in stats_of_all.items():
        assert total[name] == pytest.approx(value.item(), abs=1e-12), name


def test_a_ratio_per_sequence_is_that_of_a_loop_and_moves_all_tokens_of_a_completion_alike():
    """GSPO (arXiv 2507.18071): s_i is the geometric mean of a completion's ratios, and the loss a
    mean over completions."""
    generator = torch.Generator().manual_seed(0)
    lengths = [3, 5, 1]
    advantages = torch.tensor([1.0, -0.5, 2.0], dtype=DOUBLE)
    mask = torch.arange(5) < torch.tensor(lengths)[:, None]
    logp = -torch.rand(3, 5, dtype=DOUBLE, generator=generator)
    logp = torch.where(mask, logp, 0.0).requires_grad_()
    noise = 0.3 * torch.randn(3, 5, dtype=DOUBLE, generator=generator)
    old_logp = torch.where(mask, logp.detach() + noise, 0.0)
    weights = token_weights(mask).to(DOUBLE)
    loss, stats = grpo_loss(
        logp, old_logp, None, advantages, weights, 0.1, 0.2, 0.0, ratio="sequence"
    )
    expected = 0.0
    for i, n in enumerate(lengths):
        s = ((logp[i, :n] - old_logp[i, :n]).sum() / n).exp()
        gain = torch.minimum(s * advantages[i], s.clamp(0.9, 1.2) * advantages[i])
        expected = expected - gain / 3
    torch.testing.assert_close(loss, expected)
    (ours,) = torch.autograd.grad(loss, logp, retain_graph=True)
    (slow,) = torch.autograd.grad(expected, logp)
    torch.testing.assert_close(ours, slow)
    assert ours[mask].any()
    assert 0 < float(stats["clip_frac"]) < 1


# ---------------------------------------------------------------- a sampler that is a little off


POLICY = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=DOUBLE)
SAMPLER = torch.tensor([0.2, 0.15, 0.4, 0.25], dtype=DOUBLE)  # what draws instead of the policy
EARNED = torch.tensor([1.0, -2.0, 0.5, 3.0], dtype=DOUBLE)  # the advantage of each token


def expected_gradient(logits, sampled_with, sampler_is):
    """The gradient of the loss of one token, in expectation over what the sampler draws. The weight
    of each token of the vocabulary is the probability that the sampler draws it, so nothing is
    random."""
    logp = logits.log_softmax(-1)
    loss, stats = grpo_loss(
        logp[:, None],
        logp.detach()[:, None],
        None,
        EARNED,
        sampled_with[:, None],
        sampler_logp=sampled_with.log()[:, None],
        sampler_is=sampler_is,
    )
    (gradient,) = torch.autograd.grad(loss, logits)
    return gradient, stats


def test_importance_weights_make_the_gradient_of_a_biased_sampler_the_unbiased_one():
    logits = POLICY.log().requires_grad_()
    reward = (logits.softmax(-1) * EARNED).sum()
    (of_reward,) = torch.autograd.grad(-reward, logits)
    unbiased, _ = expected_gradient(logits, POLICY, sampler_is=0.0)
    torch.testing.assert_close(unbiased, of_reward)

    biased, stats = expected_gradient(logits, SAMPLER, sampler_is=0.0)
    assert (biased - of_reward).abs().max() > 0.05
    assert "sampler_is_mean" not in stats

    # the largest weight, 0.4 / 0.25 = 1.6, is below the cap
    corrected, stats = expected_gradient(logits, SAMPLER, sampler_is=2.0)
    torch.testing.assert_close(corrected, of_reward)
    assert stats["sampler_is_mean"].item() == pytest.approx(1.0)
    assert stats["sampler_is_capped"].item() == 0.0


def test_importance_weights_are_capped_and_the_share_at_the_cap_is_known():
    logits = POLICY.log().requires_grad_()
    capped, stats = expected_gradient(logits, SAMPLER, sampler_is=1.5)
    weights = [0.5, 4 / 3, 0.75, 1.5]  # 0.1 / 0.2, 0.2 / 0.15, 0.3 / 0.4, and 1.6 capped
    shares = SAMPLER * torch.tensor(weights, dtype=DOUBLE)
    (expected,) = torch.autograd.grad(-(shares * EARNED * logits.log_softmax(-1)).sum(), logits)
    torch.testing.assert_close(capped, expected)
    assert stats["sampler_is_mean"].item() == pytest.approx(shares.sum().item())
    assert stats["sampler_is_capped"].item() == pytest.approx(0.25)


def test_the_correction_spares_the_kl_and_the_statistics_of_the_ratio():
    logp, old_logp, ref_logp, _, weights = random_inputs()
    nothing_earned = torch.zeros(len(logp), dtype=DOUBLE)
    inputs = (logp, old_logp, ref_logp, nothing_earned, weights)
    plain, stats = grpo_loss(*inputs)
    corrected, with_correction = grpo_loss(*inputs, sampler_logp=old_logp - 1, sampler_is=9.0)
    assert corrected.item() == plain.item()
    assert with_correction["sampler_is_mean"].item() == pytest.approx(math.e)
    for name, value in stats.items():
        assert with_correction[name] == value


# ---------------------------------------------------------------- entropy


def test_the_entropy_bonus_has_a_gradient_and_raises_the_entropy_of_a_group_of_equal_rewards():
    crm = random_crm()
    prompt = crm.encode(noise_image(56, 56), "x")
    (group,) = sample(crm, [prompt], 4, 6, seed=1)
    optimizer = Optimizer(crm.prepare_training())
    means = []
    for _ in range(3):
        ((_, entropy),) = score(crm, Pack([group], [[0, 1, 2, 3]]), entropy_gradient=True)
        means.append(entropy.mean().item())
        (-entropy.mean()).backward()
        assert optimizer.step(1e-3, 1.0) > 0
    assert means[0] < means[1] < means[2]
    ((_, entropy),) = score(crm, Pack([group], [[0]]))
    assert not entropy.requires_grad


# ---------------------------------------------------------------- what a run shares


def test_questions_of_a_step_are_a_pure_function_and_an_epoch_sees_each_of_them_once():
    seen = []
    for step in range(5):
        seen += step_indices(20, 4, seed=1, step=step)
    assert sorted(seen) == list(range(20))
    assert step_indices(20, 4, 1, 3) == seen[12:16]
    assert step_indices(20, 4, 2, 3) != seen[12:16]
    assert len(step_indices(3, 8, 0, 0)) == 8  # a step may span epochs


def test_learning_rates_by_hand():
    rates = [learning_rate(step, 12, 1.0, 2, "linear") for step in (0, 1, 2, 7)]
    assert rates == [0.5, 1.0, 1.0, 0.5]
    assert learning_rate(7, 12, 2.0, 2, "cosine") == pytest.approx(1.0)
    assert learning_rate(999, 1000, 3.0, 0, "constant") == 3.0


def test_evenly_spread_numbers_by_hand():
    assert evenly_spread(10, 4) == [0, 2, 5, 7]
    assert evenly_spread(4, 4) == [0, 1, 2, 3]
    assert evenly_spread(3, 8) == [0, 1, 2]
    assert evenly_spread(0, 4) == []


def test_eval_limit_takes_questions_of_all_categories_of_a_sorted_file(tmp_path):
    rows = []
    for split, count in (("train", 2), ("test", 12)):
        for i in range(count):
            rows.append({"split": split, "category": "abc"[3 * i // count]})
    write_data(tmp_path, rows)
    _, tests = load_splits(tmp_path, eval_limit=3)
    assert [example.category for example in tests] == ["a", "b", "c"]
    _, tests = load_splits(tmp_path)
    assert len(tests) == 12


# ---------------------------------------------------------------- AdamW on master weights


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_offloaded_updates_are_the_same_updates(dtype):
    start = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    ends = []
    for offload in (False, True):
        weight = torch.nn.Parameter(start.to(dtype, copy=True))
        optimizer = Optimizer({"weight": weight}, weight_decay=0.1, offload=offload)
        for step in range(5):
            (weight.float() * torch.arange(3.0) * step).square().sum().backward()
            optimizer.step(1e-2, 1.0)
        ends.append((weight.detach().clone(), optimizer._state()))
    (on_device, state), (offloaded, other_state) = ends
    assert not torch.equal(on_device, start.to(dtype))
    torch.testing.assert_close(on_device, offloaded)
    for quantity, tensors in state.items():
        torch.testing.assert_close(tensors, other_state[quantity])


def test_bfloat16_weights_move_at_a_learning_rate_that_rounds_away_without_masters():
    weight = torch.nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    optimizer = Optimizer({"weight": weight}, weight_decay=0.0)
    for _ in range(5000):
        (weight.float() * torch.tensor([1.0, -1.0, 1.0, -1.0])).sum().backward()
        optimizer.step(1e-6, 1.0)
    # 5000 steps of 1e-6: 0.995 and 1.005, on bfloat16's grid
    assert weight.tolist() == [0.99609375, 1.0078125, 0.99609375, 1.0078125]


def test_master_weights_add_up_gradients_in_float32():
    weight = torch.nn.Parameter(torch.ones(1, dtype=torch.bfloat16))
    optimizer = Optimizer({"weight": weight})
    for scale in [1.0] + [2**-10] * 1024:  # in bfloat16, 1 + 2^-10 = 1
        (weight * scale).sum().backward()
    assert optimizer.sums[0].item() == pytest.approx(2.0)


def test_a_bfloat16_models_masters_are_moved_as_torchs_adamw_moves_float32_weights():
    generator = torch.Generator().manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(4, 3, generator=generator).bfloat16())
    slow = torch.nn.Parameter(weight.detach().float())
    optimizer = Optimizer({"weight": weight}, weight_decay=0.3)
    adamw = torch.optim.AdamW([slow], lr=0.1, weight_decay=0.3)
    for size in (100.0, 0.01, 10.0, 0.1):  # above the norm, and far below it
        for gradient in size * torch.randn(2, 4, 3, generator=generator):  # two backward passes
            (weight * gradient.bfloat16()).sum().backward()
            (slow * gradient.bfloat16()).sum().backward()
        norm = torch.nn.utils.clip_grad_norm_([slow], 1.0)
        adamw.step()
        adamw.zero_grad()
        assert optimizer.step(0.1, 1.0) == pytest.approx(norm.item(), rel=1e-5)
        master = optimizer.masters[0].detach()
        torch.testing.assert_close(master, slow.detach(), atol=1e-5, rtol=0)
        assert torch.equal(weight, master.bfloat16())


def test_a_gradient_that_is_not_finite_moves_nothing():
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = Optimizer({"weight": weight})
    for bad in (math.nan, math.inf):
        (weight.sum() * bad).backward()
        assert not math.isfinite(optimizer.step(0.1, 1.0))
        assert torch.equal(weight, torch.ones(3))
        assert weight.grad is None
    weight.sum().backward()
    assert optimizer.step(0.1, 1.0) == pytest.approx(3**0.5)
    assert (weight < 1).all()
    assert weight.isfinite().all()


# ---------------------------------------------------------------- what is logged of a step


def record(length, finished, reward, box_iou):
    """What completion_records makes of a completion, or the most important of it."""
    return {
        "id": "a",
        "query": "Where?",
        "text": "…",
        "reward_std": 0.5,
        "zero_std": 0.0,
        "identical": 0.0,
        "reward": reward,
        "length": length,
        "parse_ok": 1.0,
        "finished": finished,
        "box_iou": box_iou,
    }


TOTALS = {
    "loss": 3.0,
    "weight": 2.0,  # of two updates, each of whose weights sum to 1
    "entropy": 1.0,
    "clip_low_frac": 0.5,
    "ratio_max": 1.25,
    "ratio_min": 0.75,
    "logp_gap": 0.01,
    "logp_gap_sum": 0.002,
}


def test_a_steps_row_by_hand():
    records = [
        record(length=4, finished=1.0, reward=1.0, box_iou=0.0),
        record(length=10, finished=0.0, reward=2.0, box_iou=1.0),
        record(length=7, finished=1.0, reward=6.0, box_iou=0.5),
    ]
    row = step_row(records, TOTALS, grad_norms=[1.0, math.inf], terms=["box_iou"])
    expected = {
        "reward": 3.0,
        "length": 7.0,
        "tokens": 21,
        "length_min": 4,
        "length_max": 10,
        "length_finished": 5.5,
        "finished": 2 / 3,
        "parse_ok": 1.0,
        "box_iou": 0.5,
        "box_iou/std": (1 / 6) ** 0.5,
        "reward_std": 0.5,
        "zero_std": 0.0,
        "identical": 0.0,
        "loss": 1.5,
        "entropy": 0.5,
        "clip_low_frac": 0.25,
        "ratio_max": 1.25,
        "ratio_min": 0.75,
        "logp_gap": 0.01,
        "logp_gap_mean": 0.001,
        "grad_norm": 1.0,
        "skipped": 1,
    }
    assert row == pytest.approx(expected)
    assert TOTALS["logp_gap_sum"] == 0.002  # the totals are left as they are


def test_a_step_without_a_finished_completion_has_no_length_of_finished_ones():
    row = step_row([record(9, 0.0, 1.0, 0.0)] * 2, TOTALS, grad_norms=[1.0], terms=["box_iou"])
    assert "length_finished" not in row
    assert row["length_min"] == 9
    assert row["length_max"] == 9
    json.dumps(row, allow_nan=False)


# ---------------------------------------------------------------- the loop


def write_data(folder, rows):
    """Makes a data set of small pictures in a folder. rows: of samples.jsonl, but for what all have
    in common."""
    (folder / "images").mkdir(parents=True)
    lines = []
    for i, row in enumerate(rows):
        noise_image(56 + 28 * (i % 2), 56, i).save(folder / f"images/{i}.png")
        usual = {
            "id": str(i),
            "image": f"{i}.png",
            "query": f"What is {i}?",
            "bbox": [1, 2, 30, 40],
            "points": [[5, 5], [20, 20]],
        }
        lines.append(json.dumps(usual | row) + "\n")
    (folder / "samples.jsonl").write_text("".join(lines))


def letter_terms(example: Example, group: Group, *_) -> list[dict[str, float]]:
    """Reward terms that differ within a group, but not for every fourth question."""
    if int(example.id) % 4 == 0:
        return [{"letters": 1.0} for _ in group.texts]
    return [{"letters": float(sum(text.encode()) % 5)} for text in group.texts]


class SlowLoop:
    """The loop of train_grpo.py without ranks, packs or anything left out."""

    def __init__(self, cfg: Config, examples: Examples, max_norm: float):
        self.cfg = cfg
        self.examples = examples
        self.max_norm = max_norm
        self.crm = load_crm(cfg.crm)
        self.reference = load_crm(cfg.crm)
        self.adamw = torch.optim.AdamW(self.crm.model.parameters(), weight_decay=cfg.weight_decay)

    def roll_out(self, step: int, place: int, attempt: int) -> Rollout:
        cfg = self.cfg
        order = cfg.seed + 7919 * attempt
        index = step_indices(len(self.examples), cfg.prompts, order, step)[place]
        example = self.examples[index]
        prompt = self.crm.encode_question(example.image, example.query)
        seeds = [(cfg.seed, 0, step, place, index, attempt)]
        (group,) = sample(self.crm, [prompt], cfg.group, cfg.max_new_tokens, cfg.temperature, seeds)
        terms = letter_terms(example, group)
        rewards = torch.tensor([term["letters"] for term in terms])
        return Rollout(**vars(group), example=example, terms=terms, rewards=rewards)

    def groups_of(self, step: int) -> list[Rollout]:
        groups = [self.roll_out(step, place, 0) for place in range(self.cfg.prompts)]
        for attempt in range(1, self.cfg.resample + 1):
            for place, group in enumerate(groups):
                if len(set(group.rewards.tolist())) == 1:
                    groups[place] = self.roll_out(step, place, attempt)
        return groups

    def scored(self, crm: CRM, groups: list[Group]) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probabilities and entropies, one group at a time, (N, max_new_tokens) each."""
        logps = []
        entropies = []
        for group in groups:
            pack = Pack([group], [list(range(self.cfg.group))])
            ((logp, entropy),) = score(crm, pack, self.cfg.temperature, True)
            logps.append(self.padded(logp))
            entropies.append(self.padded(entropy))
        return torch.cat(logps), torch.cat(entropies)

    def padded(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.pad(x, (0, self.cfg.max_new_tokens - x.shape[1]))

    def learning_rate(self, step: int) -> float:
        """--schedule linear, after the warm-up."""
        cfg = self.cfg
        if step < cfg.warmup:
            return cfg.lr * (step + 1) / cfg.warmup
        return cfg.lr * (1 - (step - cfg.warmup) / (cfg.steps - cfg.warmup))

    def update(self, loss: torch.Tensor, lr: float) -> None:
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.crm.model.parameters(), self.max_norm)
        self.adamw.param_groups[0]["lr"] = lr
        self.adamw.step()
        self.adamw.zero_grad()

    def step(self, step: int) -> list[float]:
        """Makes a step's updates. Returns its mean loss, KL and entropy."""
        cfg = self.cfg
        groups = self.groups_of(step)
        rewards = torch.stack([group.rewards for group in groups])
        advantages = group_advantages(rewards, cfg.norm)
        with torch.no_grad():
            old_logp, _ = self.scored(self.crm, groups)
            ref_logp, _ = self.scored(self.reference, groups)
        sampler_logp = torch.cat([self.padded(group.logp) for group in groups])
        entropy_coef = cfg.entropy_coef * (1 - step / cfg.steps)
        size = cfg.prompts // cfg.minibatches
        losses = []
        kl = 0.0
        entropy_sum = 0.0
        weight_sum = 0.0
        for _ in range(cfg.inner_epochs):
            for start in range(0, cfg.prompts, size):
                part = groups[start : start + size]
                rows = slice(start * cfg.group, (start + size) * cfg.group)
                lengths = torch.cat([group.lengths for group in part])
                mask = torch.arange(cfg.max_new_tokens) < lengths[:, None]
                weights = token_weights(mask, cfg.agg, cfg.max_new_tokens)
                logp, entropy = self.scored(self.crm, part)
                loss, stats = grpo_loss(
                    logp,
                    old_logp[rows],
                    ref_logp[rows] if cfg.kl_coef else None,
                    advantages[start : start + size].flatten(),
                    weights,
                    cfg.clip_low,
                    cfg.clip_high,
                    cfg.dual_clip,
                    cfg.kl_coef,
                    cfg.kl,
                    cfg.ratio,
                    sampler_logp[rows],
                    cfg.sampler_is,
                )
                mean_entropy = (weights * entropy).sum()
                loss = loss - entropy_coef * mean_entropy
                self.update(loss, self.learning_rate(step))
                losses.append(loss.item())
                kl += float(stats.get("kl", 0.0))
                entropy_sum += mean_entropy.item()
                weight_sum += weights.sum().item()
        return [float(np.mean(losses)), kl / weight_sum, entropy_sum / weight_sum]


GRPO = {
    "minibatches": 2,
    "inner_epochs": 2,
    "temperature": 0.8,
    "norm": "none",
    "agg": "token",
    "clip_low": 0.02,
    "clip_high": 0.1,
    "dual_clip": 1.2,
    "kl": "k2",
    "kl_coef": 0.5,
    "entropy_coef": 0.2,
    "warmup": 1,
    "seed": 3,
}
VARIANTS = {
    "minibatches": 1,
    "inner_epochs": 2,
    "norm": "batch",
    "agg": "constant",
    "ratio": "sequence",
    "clip_low": 0.01,
    "clip_high": 0.03,
    "kl_coef": 0.0,
    "sampler_is": 0.0,
    "resample": 2,
    "seed": 1,
}


@pytest.mark.parametrize(
    "flags, max_norm", [(GRPO, 0.5), (VARIANTS, 1e6)], ids=["grpo", "variants"]
)
def test_the_script_trains_as_a_loop_without_any_cleverness_does(
    flags, max_norm, tmp_path, monkeypatch
):
    crm = random_crm()
    # many tokens end a completion, so that completions end at different times
    words = sorted(set(crm.tokenizer.get_vocab()) - set(crm_module.BANNED))
    monkeypatch.setattr(crm_module, "END", (*crm_module.END, *words[40:100]))
    monkeypatch.setattr(train_grpo, "reward_group", letter_terms)
    monkeypatch.setattr(train_grpo, "total_reward", lambda terms, *_: terms["letters"])
    monkeypatch.setattr(Optimizer, "step", partialmethod(Optimizer.step, max_norm=max_norm))
    monkeypatch.setattr(Run, "curves", lambda *_: None)  # it takes longer than all the rest
    write_data(tmp_path / "data", [{}] * 12)
    crm.save(tmp_path / "crm")
    cfg = Config(
        crm=str(tmp_path / "crm"),
        data=str(tmp_path / "data"),
        out=str(tmp_path / "run"),
        steps=3,
        prompts=4,
        group=4,
        max_new_tokens=6,
        lr=3e-3,
        schedule="linear",
        weight_decay=0.5,
        eval_every=-1,
        pack_tokens=200,
        **flags,
    )
    train_grpo.main(cfg)

    slow = SlowLoop(cfg, load_samples(cfg.data), max_norm)
    expected = torch.tensor([slow.step(step) for step in range(cfg.steps)])
    numbers = []
    for row in read_jsonl(tmp_path / "run/metrics.jsonl"):
        numbers.append([row["loss"], row.get("kl", 0.0), row["entropy"]])
    torch.testing.assert_close(torch.tensor(numbers), expected, atol=1e-4, rtol=1e-3)

    end = load_crm(tmp_path / "run/step_000003")
    assert distance(end, crm) > 1
    assert distance(end, slow.crm) < 0.02 * distance(end, crm)


def distance(one: CRM, other: CRM) -> float:
    """Returns the Euclidean distance of all weights of two models."""
    weights = dict(other.model.named_parameters())
    squares = 0.0
    for name, parameter in one.model.named_parameters():
        squares += (parameter - weights[name]).square().sum().item()
    return squares**0.5


def test_grpo_teaches_a_random_model_a_new_habit():
    """All of it in ten lines. The share of one token among a completion's is rewarded, and it must
    become the rule."""
    crm = random_crm()
    prompt = crm.encode(noise_image(56, 56), "x")
    wanted = 300
    optimizer = Optimizer(crm.prepare_training())
    shares = []
    for step in range(60):
        (group,) = sample(crm, [prompt], 16, 8, seed=[(0, step)])
        mask = torch.arange(group.tokens.shape[1]) < group.lengths[:, None]
        rewards = ((group.tokens == wanted) & mask).float().mean(1)
        shares.append(rewards.mean().item())
        now = logp(crm, group, range(16))
        advantages = group_advantages(rewards[None])[0]
        loss, _ = grpo_loss(now, now.detach(), None, advantages, token_weights(mask))
        loss.backward()
        optimizer.step(3e-3, 1.0)
    assert sum(shares[:5]) / 5 < 0.1
    assert sum(shares[-5:]) / 5 > 0.8
