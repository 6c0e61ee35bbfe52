"""The packed forward against slow, obvious versions: transformers' own forward, completion by
completion, and one packed sequence under a dense mask. Values and every gradient."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from conftest import both_families, random_crm
from oracles import dense_score, gradients_of, naive_logp, next_logits

import scoring
from crm import BANNED, END
from sampling import sample
from scoring import Pack, all_logp, group_of, logp, make_packs, predictors_of, score


def random_weights(groups):
    return [
        torch.randn(g.logp.shape, generator=torch.Generator().manual_seed(i))
        for i, g in enumerate(groups)
    ]


def assert_same_gradients(gradients, expected):
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        largest = expected[name].abs().max().item()
        assert largest > 0, name
        torch.testing.assert_close(
            gradient, expected[name], atol=1e-5 * largest + 1e-6, rtol=1e-3, msg=name
        )


@both_families
@pytest.mark.parametrize("temperature", [1.0, 0.7, 1.6])
def test_sampled_equals_scored_equals_naive_for_prompts_and_images_of_different_sizes(
    crm, prompts, temperature
):
    groups = sample(crm, prompts, 4, 20, temperature, seed=1)
    together = score(crm, Pack(groups, [list(range(4))] * 3), temperature)
    for group, (packed, _) in zip(groups, together):
        naive = naive_logp(crm, group, temperature)
        assert naive.std() > 0.3  # far from uniform: the comparison means something
        for ours in (group.logp, logp(crm, group, range(4), temperature), packed):
            torch.testing.assert_close(ours, naive, atol=1e-5, rtol=0)


@both_families
@pytest.mark.parametrize("checkpointing", [False, True])
def test_every_gradient_of_the_packed_loss_equals_the_naive_one(family, prompts, checkpointing):
    crm = random_crm(family=family, checkpointing=checkpointing)
    (group,) = sample(crm, prompts[:1], 4, 20, seed=2)
    (weights,) = random_weights([group])
    naive = gradients_of(crm, (naive_logp(crm, group, 1.0) * weights).sum())
    assert naive.keys() == dict(crm.model.named_parameters()).keys()  # vision tower included
    assert_same_gradients(gradients_of(crm, (logp(crm, group, range(4)) * weights).sum()), naive)


@both_families
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_a_pack_of_several_prompts_equals_one_sequence_under_a_dense_mask(
    family, prompts, temperature
):
    crm = random_crm(family=family)
    groups = sample(crm, prompts, 3, 10, seed=2)
    groups[1].lengths[:] = torch.tensor([1, 7, 4])
    pack = Pack([groups[2], groups[0], groups[1]], [[2, 0], [1], [0, 1, 2]])
    weights = random_weights(groups)
    weights = [weights[2][[2, 0]], weights[0][[1]], weights[1]]
    dense = dense_score(crm, pack, temperature)
    packed = [logp_of_group for logp_of_group, _ in score(crm, pack, temperature)]
    for ours, slow in zip(packed, dense, strict=True):
        torch.testing.assert_close(ours, slow, atol=1e-5, rtol=0)
    expected = gradients_of(crm, sum((x * w).sum() for x, w in zip(dense, weights)))
    assert_same_gradients(
        gradients_of(crm, sum((x * w).sum() for x, w in zip(packed, weights))), expected
    )


@both_families
@pytest.mark.parametrize("freeze_vision", [True, False])
def test_no_size_of_the_packs_changes_a_number(family, prompts, freeze_vision):
    """Log-probabilities of policy and reference, and all gradients, against transformers."""
    trainable = "language_model|lm_head" if freeze_vision else ""
    crm = random_crm(family=family, trainable=trainable, reference=True)
    groups = sample(crm, [replace(p, features=None) for p in prompts], 3, 16, seed=2)
    weights = random_weights(groups)
    naive = [naive_logp(crm, group, 1.0) for group in groups]
    expected = gradients_of(crm, sum((x * w).sum() for x, w in zip(naive, weights)))
    assert freeze_vision != any("visual" in name for name in expected)
    with crm.reference():
        reference = all_logp(crm, groups, 240, 1.0)
    for ours, slow in zip(reference, naive, strict=True):
        torch.testing.assert_close(ours, slow, atol=1e-5, rtol=0)
    place = {id(group): i for i, group in enumerate(groups)}
    for budget in (10_000, 240, 1):  # one pack, several, one row each
        loss = 0.0
        for pack in make_packs(groups, budget):
            scored = score(crm, pack)
            for group, rows, (ours, _) in zip(pack.groups, pack.rows, scored, strict=True):
                i = place[id(group)]
                torch.testing.assert_close(ours, naive[i][rows], atol=1e-5, rtol=0)
                loss = loss + (ours * weights[i][rows]).sum()
        assert_same_gradients(gradients_of(crm, loss), expected)


def test_logits_that_are_recomputed_in_chunks_change_no_gradient(prompts, monkeypatch):
    crm = random_crm()
    (group,) = sample(crm, prompts[:1], 3, 12, seed=2)
    (weights,) = random_weights([group])

    def both():
        ((ours, entropy),) = score(crm, Pack([group], [[0, 1, 2]]), 1.0, entropy_gradient=True)
        return gradients_of(crm, (ours * weights).sum() + entropy.sum())

    whole = both()
    monkeypatch.setattr(scoring, "LOGITS_KEPT", 1)
    monkeypatch.setitem(scoring.LOGITS_AT_ONCE, "cpu", 5 * crm.model.config.text_config.vocab_size)
    assert_same_gradients(both(), whole)


@both_families
def test_a_frozen_vision_tower_runs_once_for_sampler_reference_and_policy(
    family, prompts, monkeypatch
):
    for trainable, calls in (("language_model|lm_head", 1), ("", 3)):
        crm = random_crm(family=family, trainable=trainable, reference=True)
        seen = []

        def counted(*inputs, tower, seen=seen):
            seen.append(1)
            return tower(*inputs)

        for model in (crm.model, crm.ref_model):
            tower = model.model.get_image_features
            monkeypatch.setattr(model.model, "get_image_features", partial(counted, tower=tower))
        (group,) = sample(crm, [replace(prompts[0], features=None)], 2, 5)
        with crm.reference():
            logp(crm, group, [0, 1])
        logp(crm, group, [0, 1]).sum().backward()
        assert len(seen) == calls


def test_packs_hold_whole_groups_under_a_budget_and_cut_only_what_is_too_long(crm, prompts):
    groups = sample(crm, prompts, 4, 12, seed=1)
    place = {id(group): i for i, group in enumerate(groups)}
    size = [len(g.prompt.ids) + int(g.lengths.sum()) for g in groups]

    def packs(budget):
        found = []
        for pack in make_packs(groups, budget):
            numbers = [place[id(group)] for group in pack.groups]
            found.append(list(zip(numbers, pack.rows, strict=True)))
        return found

    assert packs(sum(size)) == [[(0, [0, 1, 2, 3]), (1, [0, 1, 2, 3]), (2, [0, 1, 2, 3])]]
    assert [[i for i, _ in pack] for pack in packs(size[0] + size[1])] == [[0, 1], [2]]
    for budget in range(max(len(p.ids) for p in prompts) + 12, sum(size), 17):
        assert [(i, row) for pack in packs(budget) for i, rows in pack for row in rows] == [
            (i, row) for i in range(3) for row in range(4)
        ]
        for pack in make_packs(groups, budget):
            sizes = []
            for group, rows in zip(pack.groups, pack.rows):
                sizes.append(len(group.prompt.ids) + int(group.lengths[rows].sum()))
            assert pack.tokens == sum(sizes) <= budget
    assert make_packs([], 100) == []


def test_a_group_cut_into_packs_scores_as_a_whole_one(crm, prompts):
    (group,) = sample(crm, prompts[:1], 6, 20, seed=3)
    budget = len(group.prompt.ids) + 45
    parts = [rows for pack in make_packs([group], budget) for rows in pack.rows]
    assert len(parts) > 1
    assert [row for rows in parts for row in rows] == list(range(6))
    assert all(len(group.prompt.ids) + group.lengths[rows].sum() <= budget for rows in parts)
    one_by_one = [rows for pack in make_packs([group], 1) for rows in pack.rows]
    assert one_by_one == [[i] for i in range(6)]
    whole = logp(crm, group, range(6))
    torch.testing.assert_close(
        torch.cat([logp(crm, group, rows) for rows in parts]), whole, atol=1e-5, rtol=0
    )


def test_all_log_probabilities_come_back_in_the_order_of_the_groups_and_without_gradient(
    crm, prompts
):
    groups = sample(crm, prompts, 3, 12, 0.7, seed=1)
    for budget in (10_000, 150):
        for group, ours in zip(groups, all_logp(crm, groups, budget, 0.7), strict=True):
            assert not ours.requires_grad
            torch.testing.assert_close(ours, group.logp, atol=1e-5, rtol=0)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_entropy_is_that_of_the_distribution_and_has_its_gradient_where_asked_for(
    prompts, temperature
):
    crm = random_crm()
    (group,) = sample(crm, prompts[:1], 2, 6, seed=0)
    group.lengths[:] = torch.tensor([6, 3])
    ((_, entropy),) = score(crm, Pack([group], [[0, 1]]), temperature)
    assert not entropy.requires_grad and (entropy[1, 3:] == 0).all()
    ((_, with_gradient),) = score(crm, Pack([group], [[0, 1]]), temperature, entropy_gradient=True)
    slow = []
    for row, n in ((0, 6), (1, 3)):
        for t in range(n):
            logits = next_logits(
                crm, group.prompt, torch.cat([group.prompt.ids, group.tokens[row, :t]]), temperature
            )
            p = logits.softmax(-1)
            slow.append(-(p * p.clamp(min=1e-30).log()).sum())
    for ours in (entropy, with_gradient):
        torch.testing.assert_close(
            torch.cat([ours[0], ours[1, :3]]), torch.stack(slow), atol=1e-5, rtol=0
        )
    assert_same_gradients(gradients_of(crm, with_gradient.sum()), gradients_of(crm, sum(slow)))


def test_log_probabilities_of_a_bfloat16_model_are_computed_in_float32():
    crm = random_crm()
    crm.model.bfloat16()
    hidden = torch.randn(9, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    targets = torch.arange(40, 49)
    slow = (
        (crm.model.lm_head(hidden).double() / 0.7)
        .index_fill(1, crm.banned, -torch.inf)
        .log_softmax(-1)
    )
    ours, entropy = scoring.token_logp(crm, hidden, targets, 0.7)
    torch.testing.assert_close(
        ours.double(), slow.gather(1, targets[:, None])[:, 0], atol=1e-5, rtol=0
    )
    torch.testing.assert_close(
        entropy.double(), -(slow.exp() * slow.clamp(min=-1e6)).sum(-1), atol=1e-5, rtol=0
    )


def test_the_token_before_predicts_the_next_one():
    """Prompt 0 1 2, completions of 2, 1 and 3 tokens at 3 4, 5 and 6 7 8."""
    mask = torch.tensor([[1, 1, 0], [1, 0, 0], [1, 1, 1]]).bool()
    assert predictors_of(3, mask).tolist() == [2, 3, 2, 2, 6, 7]


@both_families
def test_a_forced_vision_token_scores_without_a_crash(crm, prompts):
    (group,) = sample(crm, prompts[:1], 3, 8)
    for token in crm.tokenizer.convert_tokens_to_ids(list(BANNED)):
        group.tokens[:2, 1] = token
        ours = logp(crm, group, [0, 1, 2])
        assert ours.isfinite().all() and (ours[:2, 1] < -1e6).all()
        assert (ours[2, : int(group.lengths[2])] > -100).all()


def test_scoring_leaves_the_sampler_as_it_was(prompts):
    crm = random_crm(checkpointing=True)
    before = sample(crm, prompts, 3, 10, seed=1)
    logp(crm, before[0], [0, 1]).sum().backward()
    for a, b in zip(before, sample(crm, prompts, 3, 10, seed=1)):
        assert torch.equal(a.tokens, b.tokens) and torch.equal(a.logp, b.logp)


def test_given_texts_become_a_group_of_ended_completions(crm, prompts):
    texts = ["a", "two words", "text that says <|im_end|> and <|image_pad|>"]
    group = group_of(crm, prompts[0], texts)
    (end,) = crm.tokenizer.convert_tokens_to_ids(END[:1])
    for text, tokens, n in zip(texts, group.tokens, group.lengths.tolist()):
        assert (
            tokens[n - 1] == end
            and (tokens[:n] == end).sum() == 1
            and not torch.isin(tokens, crm.banned).any()
        )
        assert crm.tokenizer.decode(tokens[: n - 1]) == text
    assert group.finished.all() and group.texts == texts
    torch.testing.assert_close(
        logp(crm, group, range(3)), naive_logp(crm, group, 1.0), atol=1e-5, rtol=0
    )
