"""The algorithm on plain tensors: numbers by hand, slow oracles, and that cutting a step changes nothing."""

import json
import math

import numpy as np
import pytest
import torch
from conftest import noise_image, random_crm

import crm as crm_module
import train_grpo
from crm import load_crm
from data import fill_prompt, load_samples
from runtime.files import read_jsonl
from runtime.optim import Optimizer
from runtime.parallel import Ranks
from runtime.run import learning_rate, sample_indices
from sampling import sample
from scoring import score
from train_grpo import Config, Rollout, group_advantages, grpo_loss, step_weights, token_weights

F = torch.float64

# ---------------------------------------------------------------- advantages


def test_advantages_by_hand():
    r = torch.tensor(
        [[1.0, 2.0, 3.0], [0.0, 0.0, 3.0]], dtype=F
    )  # means 2 and 1; stds 1 and sqrt(3)
    expected = torch.tensor([[-1, 0, 1], [-1 / 3**0.5, -1 / 3**0.5, 2 / 3**0.5]], dtype=F)
    torch.testing.assert_close(group_advantages(r, eps=0), expected)
    torch.testing.assert_close(
        group_advantages(r, "none"), torch.tensor([[-1, 0, 1], [-1, -1, 2]], dtype=F)
    )
    batch_std = torch.tensor([1, 2, 3, 0, 0, 3], dtype=F).std()
    torch.testing.assert_close(
        group_advantages(r, "batch", eps=0),
        torch.tensor([[-1, 0, 1], [-1, -1, 2]], dtype=F) / batch_std,
    )


@pytest.mark.parametrize("norm", ["group", "none", "batch"])
def test_a_group_of_equal_rewards_gets_exactly_zero(norm):
    r = torch.tensor(
        [[0.1] * 7, [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7]]
    )  # 0.1's mean is not 0.1 in float32
    A = group_advantages(r, norm)
    assert (A[0] == 0).all() and (A[1] != 0).any() and A.isfinite().all()


def test_group_advantages_ignore_the_scale_and_offset_of_rewards():
    r = torch.randn(4, 8, dtype=F)
    torch.testing.assert_close(
        group_advantages(5 * r + 3), group_advantages(r), atol=1e-5, rtol=1e-5
    )


# ---------------------------------------------------------------- weights

MASK = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1], [1, 0, 0, 0]]).bool()


def test_token_weights_by_hand():
    third = 1 / 3
    torch.testing.assert_close(
        token_weights(MASK, "sequence"),
        third * torch.tensor([[1 / 2, 1 / 2, 0, 0], [1 / 4] * 4, [1, 0, 0, 0]]),
    )
    torch.testing.assert_close(token_weights(MASK, "token"), MASK / 7)
    torch.testing.assert_close(token_weights(MASK, "constant", 10), MASK / 30)


def test_rows_without_tokens_count_as_no_answer_and_an_empty_step_is_no_nan():
    mask = torch.cat([MASK, torch.zeros(2, 4).bool()])
    for agg in ("sequence", "token", "constant"):
        torch.testing.assert_close(token_weights(mask, agg, 10)[:3], token_weights(MASK, agg, 10))
        assert (token_weights(torch.zeros(2, 4).bool(), agg, 10) == 0).all()


# ---------------------------------------------------------------- loss


def random_inputs(N=6, T=5, seed=0):
    g = torch.Generator().manual_seed(seed)
    logp, old, ref = (-torch.rand(N, T, generator=g, dtype=F) * 3 for _ in range(3))
    mask = torch.arange(T) < torch.randint(1, T + 1, (N, 1), generator=g)
    return (
        logp.requires_grad_(),
        old,
        ref,
        torch.randn(N, generator=g, dtype=F),
        token_weights(mask).to(F),
    )


def slow_loss(logp, old, ref, A, w, low, high, dual, beta, kl):
    """Token by token, with math and if."""
    total = 0.0
    for i in range(logp.shape[0]):
        for t in range(logp.shape[1]):
            if w[i, t] == 0:
                continue
            rho, a = math.exp(logp[i, t] - old[i, t]), A[i].item()
            gain = min(rho * a, min(max(rho, 1 - low), 1 + high) * a)
            if dual and a < 0:
                gain = max(gain, dual * a)
            d = (logp[i, t] - ref[i, t]).item()
            k = {"k1": d, "k2": d * d / 2, "k3": math.exp(-d) + d - 1}[kl]
            total += w[i, t].item() * (-gain + beta * k)
    return total


@pytest.mark.parametrize("kl", ["k1", "k2", "k3"])
@pytest.mark.parametrize("low, high, dual", [(0.2, 0.2, 3.0), (0.2, 0.28, 0.0), (0.1, 0.3, 1.5)])
def test_loss_equals_the_token_by_token_one(kl, low, high, dual):
    inputs = random_inputs()
    loss, stats = grpo_loss(*inputs, low, high, dual, 0.3, kl)
    assert loss.item() == pytest.approx(
        slow_loss(*(x.detach() for x in inputs), low, high, dual, 0.3, kl), abs=1e-12
    )
    assert all(not value.requires_grad for value in stats.values())


def test_on_policy_gradient_is_that_of_reinforce():
    logp, _, _, A, w = random_inputs()
    loss, stats = grpo_loss(logp, logp.detach(), None, A, w)
    loss.backward()
    torch.testing.assert_close(logp.grad, -w * A[:, None])
    assert stats["ratio_max"] == stats["ratio_min"] == 1 and stats["clip_frac"] == 0


def test_clipping_stops_the_gradient_only_where_it_should():
    logp = torch.log(torch.tensor([[1.5], [1.5], [0.5], [0.5], [5.0]], dtype=F)).requires_grad_()
    A = torch.tensor([1.0, -1.0, 1.0, -1.0, -1.0], dtype=F)
    weights = torch.ones(5, 1, dtype=F)
    loss, stats = grpo_loss(logp, torch.zeros(5, 1, dtype=F), None, A, weights)
    loss.backward()
    # risen good: clipped; risen bad: pushed down; fallen good: pushed up; fallen bad: clipped; far risen bad: dual clip
    assert [g != 0 for g in logp.grad[:, 0].tolist()] == [False, True, True, False, False]
    assert stats["clip_frac"] == 2


def test_kl_of_equal_policies_is_exactly_zero_and_k2_has_the_gradient_of_the_reverse_kl():
    logits, ref_logits = torch.randn(1, 5, dtype=F).requires_grad_(), torch.randn(1, 5, dtype=F)
    p, logp, ref = (
        logits.softmax(-1).detach()[0],
        logits.log_softmax(-1)[0],
        ref_logits.log_softmax(-1)[0],
    )
    gradient = {}
    for kl in ("k1", "k2", "k3"):
        same, stats = grpo_loss(
            logp[None],
            logp.detach()[None],
            logp.detach()[None],
            torch.zeros(1, dtype=F),
            p[None],
            kl_coef=1.0,
            kl=kl,
        )
        assert stats["kl"] == 0
        loss, _ = grpo_loss(
            logp[None],
            logp.detach()[None],
            ref[None],
            torch.zeros(1, dtype=F),
            p[None],
            kl_coef=1.0,
            kl=kl,
        )  # the weight is the probability: an expectation
        (gradient[kl],) = torch.autograd.grad(loss, logits, retain_graph=True)
    (exact,) = torch.autograd.grad(
        (logits.softmax(-1)[0] * (logp - ref)).sum(), logits, retain_graph=True
    )
    torch.testing.assert_close(gradient["k2"], exact)
    assert (gradient["k3"] - exact).abs().max() > 1e-3 and gradient["k1"].abs().max() < 1e-12


def test_what_lies_outside_the_mask_cannot_poison_the_loss():
    logp, old, ref, A, w = random_inputs()
    dirty = logp.detach().clone()
    dirty[w == 0] = -torch.inf
    dirty.requires_grad_()
    loss, _ = grpo_loss(dirty, old, ref, A, w)
    loss.backward()
    assert loss.item() == grpo_loss(logp, old, ref, A, w)[0].item() and dirty.grad.isfinite().all()


def test_cutting_a_step_into_micro_batches_changes_neither_loss_nor_gradient():
    logp, old, ref, A, w = random_inputs(N=8)
    whole, stats = grpo_loss(logp, old, ref, A, w)
    (gradient,) = torch.autograd.grad(whole, logp)
    pieces, parts = 0.0, []
    for rows in ([0], [1, 2, 3], [4, 5, 6, 7]):
        piece = logp.detach()[rows].requires_grad_()
        loss, s = grpo_loss(piece, old[rows], ref[rows], A[rows], w[rows])
        parts.append(torch.autograd.grad(loss, piece)[0])
        pieces += loss.item()
        stats = {k: stats[k] - s[k] if k in ("kl", "clip_frac") else stats[k] for k in stats}
    assert pieces == pytest.approx(whole.item(), abs=1e-12)
    torch.testing.assert_close(torch.cat(parts), gradient)
    assert stats["kl"].abs() < 1e-12 and stats["clip_frac"].abs() < 1e-12


def test_truncated_completions_can_be_left_out(crm, prompts):
    group = sample(crm, prompts[:1], 4, 6, seed=0)[0]
    group.finished[:] = torch.tensor([True, False, True, False])
    group.lengths[:] = torch.tensor([3, 6, 2, 6])
    for masked in (False, True):
        (w,) = step_weights([group], Config(max_new_tokens=6, mask_truncated=masked), Ranks())
        assert w.shape == group.tokens.shape and w.sum().item() == pytest.approx(1)
        assert (w[1].sum() == 0) == masked and w[0, 3:].sum() == 0


def test_a_ratio_per_sequence_is_that_of_a_loop_and_moves_all_tokens_of_a_completion_alike():
    """GSPO (arXiv 2507.18071): s_i is the geometric mean of a completion's ratios, and the loss a mean over completions."""
    torch.manual_seed(0)
    lengths, A = [3, 5, 1], torch.tensor([1.0, -0.5, 2.0], dtype=F)
    mask = torch.arange(5) < torch.tensor(lengths)[:, None]
    logp = torch.where(mask, -torch.rand(3, 5, dtype=F), 0.0).requires_grad_()
    old = torch.where(mask, logp.detach() + 0.3 * torch.randn(3, 5, dtype=F), 0.0)
    loss, stats = grpo_loss(
        logp, old, None, A, token_weights(mask).to(F), 0.1, 0.2, 0.0, ratio="sequence"
    )
    expected = 0.0
    for i, n in enumerate(lengths):
        s = ((logp[i, :n] - old[i, :n]).sum() / n).exp()
        expected = expected - torch.minimum(s * A[i], s.clamp(0.9, 1.2) * A[i]) / 3
    torch.testing.assert_close(loss, expected)
    ours, theirs = (torch.autograd.grad(x, logp, retain_graph=True)[0] for x in (loss, expected))
    torch.testing.assert_close(ours, theirs)
    assert ours[mask].any() and 0 < float(stats["clip_frac"]) < 1


def test_the_entropy_bonus_has_a_gradient_and_raises_the_entropy_of_a_group_of_equal_rewards():
    crm = random_crm()
    prompt = crm.encode(noise_image(56, 56), "x")
    (group,) = sample(crm, [prompt], 4, 6, seed=1)
    optimizer, means = Optimizer(crm.trainable()), []
    for _ in range(3):
        _, entropy = score(crm, [(group, [0, 1, 2, 3])], entropy_gradient=True)[0]
        means.append(entropy.mean().item())
        (-entropy.mean()).backward()
        assert optimizer.step(1e-3, 1.0) > 0
    assert means[0] < means[1] < means[2]
    assert not score(crm, [(group, [0])])[0][1].requires_grad


# ---------------------------------------------------------------- what a run shares


def test_prompts_of_a_step_are_a_pure_function_and_an_epoch_sees_everything_once():
    seen = [i for step in range(5) for i in sample_indices(20, 4, seed=1, step=step)]
    assert sorted(seen) == list(range(20))
    assert sample_indices(20, 4, 1, 3) == seen[12:16] and sample_indices(20, 4, 2, 3) != seen[12:16]
    assert len(sample_indices(3, 8, 0, 0)) == 8  # a step may span epochs


def test_learning_rates_by_hand():
    assert [learning_rate(s, 12, 1.0, 2, "linear") for s in (0, 1, 2, 7)] == [0.5, 1.0, 1.0, 0.5]
    assert learning_rate(7, 12, 2.0, 2, "cosine") == pytest.approx(1.0)
    assert learning_rate(999, 1000, 3.0, 0, "constant") == 3.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_offloaded_updates_are_the_same_updates(dtype):
    torch.manual_seed(0)
    start, runs = torch.randn(5, 3), []
    for offload in (False, True):
        p = torch.nn.Parameter(start.to(dtype, copy=True))
        optimizer = Optimizer({"p": p}, weight_decay=0.1, offload=offload)
        for step in range(5):
            (p.float() * torch.arange(3.0) * step).square().sum().backward()
            optimizer.step(1e-2, 1.0)
        runs.append((p.detach().clone(), optimizer._state()))
    (one, held), (two, other) = runs
    assert not torch.equal(one, start.to(dtype))
    torch.testing.assert_close(one, two)
    for key in held:
        torch.testing.assert_close(held[key], other[key])


def test_bfloat16_weights_move_at_a_learning_rate_that_rounds_away_without_masters():
    p = torch.nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    optimizer = Optimizer({"p": p}, weight_decay=0.0)
    for _ in range(5000):
        (p.float() * torch.tensor([1.0, -1.0, 1.0, -1.0])).sum().backward()
        optimizer.step(1e-6, 1.0)
    # 5000 steps of 1e-6: 0.995 and 1.005, on bfloat16's grid
    assert p.tolist() == [0.99609375, 1.0078125, 0.99609375, 1.0078125]


def test_master_weights_add_up_gradients_in_float32():
    p = torch.nn.Parameter(torch.ones(1, dtype=torch.bfloat16))
    optimizer = Optimizer({"p": p})
    for scale in [1.0] + [2**-10] * 1024:  # in bfloat16, 1 + 2^-10 = 1
        (p * scale).sum().backward()
    assert optimizer.sums[0].item() == pytest.approx(2.0)


def test_a_bfloat16_models_masters_are_moved_as_torchs_adamw_moves_float32_weights():
    torch.manual_seed(0)
    p = torch.nn.Parameter(torch.randn(4, 3, dtype=torch.bfloat16))
    slow = torch.nn.Parameter(p.detach().float())
    optimizer, adamw = (
        Optimizer({"p": p}, weight_decay=0.3),
        torch.optim.AdamW([slow], weight_decay=0.3),
    )
    for size in (100.0, 0.01, 10.0, 0.1):  # above the norm, and far below it
        for gradient in size * torch.randn(2, 4, 3):  # two backward passes
            (p * gradient.bfloat16()).sum().backward()
            (slow * gradient.bfloat16()).sum().backward()
        norm = torch.nn.utils.clip_grad_norm_([slow], 1.0)
        adamw.param_groups[0]["lr"] = 0.1
        adamw.step()
        adamw.zero_grad()
        assert optimizer.step(0.1, 1.0) == pytest.approx(norm.item(), rel=1e-5)
        torch.testing.assert_close(optimizer.masters[0].detach(), slow.detach(), atol=1e-5, rtol=0)
        assert torch.equal(p, optimizer.masters[0].bfloat16())


def test_a_resumed_bfloat16_model_starts_from_the_weights_that_were_saved(tmp_path):
    def fresh():
        p = torch.nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
        return p, Optimizer({"p": p})

    (p, optimizer), (again, resumed) = fresh(), fresh()
    p.sum().backward()
    optimizer.step(0.1, 1.0)
    optimizer.save(tmp_path, 1, 0)
    resumed.load(tmp_path, torch.load(tmp_path / "trainer.pt"))
    assert (
        torch.equal(again, p)
        and (p < 1).all()
        and torch.equal(resumed.masters[0], optimizer.masters[0])
    )


# ---------------------------------------------------------------- the loop


def count_letters(sample_, group, *_):
    """A reward that differs within a group, but not for every fourth sample."""
    rewards = [
        float(sum(text.encode()) % 5) if int(sample_.id) % 4 else 1.0 for text in group.texts
    ]
    return Rollout(
        **vars(group), sample=sample_, terms=[{} for _ in rewards], rewards=torch.tensor(rewards)
    )


def slow_training(cfg, samples):
    """The loop of train_grpo.py without ranks, packs or anything left out -> weights, AdamW, [(loss, kl, entropy)]."""
    crm, ref = load_crm(cfg.crm), load_crm(cfg.crm)
    adamw = torch.optim.AdamW(crm.model.parameters(), weight_decay=cfg.weight_decay)

    def rolled_out(step, place, attempt):
        index = sample_indices(len(samples), cfg.prompts, cfg.seed + 7919 * attempt, step)[place]
        prompt = crm.encode(samples[index].image, fill_prompt(crm.template, samples[index].query))
        seeds = [(cfg.seed, 0, step, place, index, attempt)]
        return count_letters(
            samples[index],
            *sample(crm, [prompt], cfg.group, cfg.max_new_tokens, cfg.temperature, seeds),
        )

    def scored(crm, groups):
        """One group at a time -> (N, T) log-probabilities and entropies."""
        pairs = [
            score(crm, [(group, range(cfg.group))], cfg.temperature, True)[0] for group in groups
        ]
        return (
            torch.cat(
                [torch.nn.functional.pad(x, (0, cfg.max_new_tokens - x.shape[1])) for x in side]
            )
            for side in zip(*pairs)
        )

    numbers = []
    for step in range(cfg.steps):
        groups = [rolled_out(step, place, 0) for place in range(cfg.prompts)]
        for attempt in range(1, cfg.resample + 1):
            groups = [
                rolled_out(step, place, attempt) if len(set(group.rewards.tolist())) == 1 else group
                for place, group in enumerate(groups)
            ]
        advantages = group_advantages(torch.stack([group.rewards for group in groups]), cfg.norm)
        with torch.no_grad():
            old, _ = scored(crm, groups)
            reference, _ = scored(ref, groups)
        lr = cfg.lr * (
            min(1, (step + 1) / cfg.warmup)
            if step < cfg.warmup
            else 1 - (step - cfg.warmup) / (cfg.steps - cfg.warmup)
        )  # --schedule linear
        sums, size = torch.zeros(4), cfg.prompts // cfg.minibatches
        for _ in range(cfg.inner_epochs):
            for start in range(0, cfg.prompts, size):
                part = groups[start : start + size]
                rows = slice(start * cfg.group, (start + size) * cfg.group)
                lengths = torch.cat(
                    [g.lengths * (g.finished | (not cfg.mask_truncated)) for g in part]
                )
                weights = token_weights(
                    torch.arange(cfg.max_new_tokens) < lengths[:, None], cfg.agg, cfg.max_new_tokens
                )
                logp, entropy = scored(crm, part)
                loss, stats = grpo_loss(
                    logp,
                    old[rows],
                    reference[rows] if cfg.kl_coef else None,
                    advantages[start : start + size].flatten(),
                    weights,
                    cfg.clip_low,
                    cfg.clip_high,
                    cfg.dual_clip,
                    cfg.kl_coef,
                    cfg.kl,
                    cfg.ratio,
                )
                bonus = (weights * entropy).sum()
                loss = loss - cfg.entropy_coef * (1 - step / cfg.steps) * bonus
                loss.backward()
                torch.nn.utils.clip_grad_norm_(crm.model.parameters(), cfg.max_grad_norm)
                adamw.param_groups[0]["lr"] = lr
                adamw.step()
                adamw.zero_grad()
                sums += torch.tensor(
                    [loss.item(), float(stats.get("kl", 0)), bonus.item(), weights.sum()]
                )
        numbers.append(
            [sums[0] / (cfg.inner_epochs * cfg.minibatches), sums[1] / sums[3], sums[2] / sums[3]]
        )
    return crm, adamw, torch.tensor(numbers)


@pytest.mark.parametrize(
    "flags",
    [
        dict(
            minibatches=2,
            inner_epochs=2,
            temperature=0.8,
            norm="none",
            agg="token",
            clip_low=0.02,
            clip_high=0.1,
            dual_clip=1.2,
            kl="k2",
            kl_coef=0.5,
            entropy_coef=0.2,
            warmup=1,
            max_grad_norm=0.5,
            seed=3,
        ),
        dict(
            minibatches=1,
            inner_epochs=2,
            norm="batch",
            agg="constant",
            ratio="sequence",
            clip_low=0.01,
            clip_high=0.03,
            kl_coef=0.0,
            mask_truncated=True,
            resample=2,
            max_grad_norm=1e6,
            seed=1,
        ),
    ],
    ids=["grpo", "variants"],
)
def test_the_script_trains_as_a_loop_without_any_cleverness_does(flags, tmp_path, monkeypatch):
    crm, folder = random_crm(), tmp_path / "data"
    words = sorted(set(crm.tokenizer.get_vocab()) - set(crm_module.BANNED))
    monkeypatch.setattr(
        crm_module, "END", (*crm_module.END, *words[40:100])
    )  # so that completions end at different times
    folder.mkdir()
    (folder / "images").mkdir()
    for i in range(12):
        noise_image(56 + 28 * (i % 2), 56, i).save(folder / f"images/{i}.png")
    (folder / "samples.jsonl").write_text(
        "".join(
            json.dumps(
                {
                    "id": str(i),
                    "image": f"{i}.png",
                    "query": f"What is {i}?",
                    "bbox": [1, 2, 30, 40],
                    "points": [[5, 5], [20, 20]],
                }
            )
            + "\n"
            for i in range(12)
        )
    )
    crm.save(tmp_path / "crm")
    cfg = Config(
        crm=str(tmp_path / "crm"),
        data=str(folder),
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
    monkeypatch.setattr(train_grpo, "reward", count_letters)
    train_grpo.main(cfg)
    slow, adamw, numbers = slow_training(cfg, load_samples(folder))
    rows = read_jsonl(tmp_path / "run/metrics.jsonl")
    torch.testing.assert_close(
        torch.tensor([[row["loss"], row.get("kl", 0.0), row["entropy"]] for row in rows]),
        numbers,
        atol=1e-4,
        rtol=1e-3,
    )
    start, end, slow_end = (
        dict(x.model.named_parameters())
        for x in (crm, load_crm(tmp_path / "run/step_000003"), slow)
    )
    moved, apart = (
        sum((end[name] - other[name]).square().sum().item() for name in end) ** 0.5
        for other in (start, slow_end)
    )
    assert moved > 1 and apart < 0.02 * moved


def test_grpo_teaches_a_random_model_a_new_habit():
    """The whole of it in ten lines: reward the share of one token among the completions; it must become the rule."""
    crm = random_crm()
    prompt, wanted = crm.encode(noise_image(56, 56), "x"), 300
    optimizer, share = Optimizer(crm.trainable()), []
    for step in range(60):
        (group,) = sample(crm, [prompt], 16, 8, seed=[(0, step)])
        rewards = (
            (
                (group.tokens == wanted)
                & (torch.arange(group.tokens.shape[1]) < group.lengths[:, None])
            )
            .float()
            .mean(1)
        )
        share.append(rewards.mean().item())
        weights = token_weights(torch.arange(group.tokens.shape[1]) < group.lengths[:, None])
        logp = score(crm, [(group, list(range(16)))])[0][0]
        grpo_loss(logp, logp.detach(), None, group_advantages(rewards[None])[0], weights)[
            0
        ].backward()
        optimizer.step(3e-3, 1.0)
    assert sum(share[:5]) / 5 < 0.1 and sum(share[-5:]) / 5 > 0.8


def test_a_gradient_that_is_not_finite_moves_nothing():
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = Optimizer({"w": weight})
    for bad in (float("nan"), float("inf")):
        (weight.sum() * bad).backward()
        assert (
            not np.isfinite(optimizer.step(0.1, 1.0))
            and torch.equal(weight, torch.ones(3))
            and weight.grad is None
        )
    weight.sum().backward()
    assert (
        optimizer.step(0.1, 1.0) == pytest.approx(3**0.5)
        and (weight < 1).all()
        and weight.isfinite().all()
    )
