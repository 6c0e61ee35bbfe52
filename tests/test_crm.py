"""The sampler and the shared-prefix scorer against the slow, obvious version:
transformers' own forward, row by row."""
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration

import sampling
import scoring
from bench import parity
from bench.parity import naive_logp
from conftest import noise_image, random_crm
from crm import BANNED, END, load_crm
from data import PROMPTS
from runtime.optim import Optimizer


@pytest.mark.parametrize("temperature", [1.0, 0.7, 1.6])
def test_sampled_equals_scored_equals_naive_for_prompts_and_images_of_different_sizes(
        crm, prompts, temperature):
    groups = crm.sample(prompts, 4, 20, temperature, seed=1)
    together = crm.score([(group, range(4)) for group in groups], temperature)
    for group, (logp, _) in zip(groups, together):
        naive = naive_logp(crm, group, temperature)
        assert naive.std() > 0.3                        # far from uniform: the comparison means something
        for ours in (group.logp, crm.logp(group, range(4), temperature), logp):
            torch.testing.assert_close(ours, naive, atol=1e-5, rtol=0)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_every_gradient_of_the_packed_loss_equals_the_naive_one(prompts, checkpointing):
    crm = random_crm(checkpointing=checkpointing)
    group = crm.sample(prompts[:1], 4, 20, seed=2)[0]
    weight = torch.randn(group.logp.shape, generator=torch.Generator().manual_seed(0))
    (naive_logp(crm, group, 1.0) * weight).sum().backward()
    naive = {name: p.grad.clone() for name, p in crm.model.named_parameters()}
    crm.model.zero_grad()
    (crm.logp(group, range(4)) * weight).sum().backward()
    for name, p in crm.model.named_parameters():
        assert naive[name].abs().max() > 0, name                    # vision tower included
        torch.testing.assert_close(p.grad, naive[name], atol=1e-5 * naive[name].abs().max().item() + 1e-6,
                                   rtol=1e-3)


SWITCHES = [dict(attention=attention, share_vision=share, drop_finished=drop)
            for attention in ("rows", "dense") for share in (True, False) for drop in (True, False)]


@pytest.mark.parametrize("freeze_vision", [True, False])
@pytest.mark.parametrize("switches", SWITCHES, ids=lambda s: "-".join(map(str, s.values())))
def test_no_trick_changes_a_number(prompts, switches, freeze_vision):
    """Each combination of switches against transformers' forward, row by row: tokens, log-probs, all gradients."""
    crm = random_crm(freeze_vision=freeze_vision, reference=True, **switches)
    fresh = [replace(p, features=None) for p in prompts]
    groups = crm.sample(fresh, 3, 16, seed=2)
    for group, other in zip(groups, random_crm().sample(prompts, 3, 16, seed=2)):
        assert torch.equal(group.tokens, other.tokens) and torch.equal(group.lengths, other.lengths)
    weights = [torch.randn(g.logp.shape, generator=torch.Generator().manual_seed(i)) for i, g in enumerate(groups)]
    sum((naive_logp(crm, g, 1.0) * w).sum() for g, w in zip(groups, weights)).backward()
    naive = {name: p.grad.clone() for name, p in crm.model.named_parameters() if p.grad is not None}
    crm.model.zero_grad()
    with crm.reference():
        reference = [logp for (logp, _) in crm.score([(g, range(3)) for g in groups])]
    for budget in (10_000, 240, 1):                                     # one stream, several, a row each
        for stream in crm.packs(groups, budget):
            for (i, rows), (logp, _) in zip(stream, crm.score([(groups[i], rows) for i, rows in stream])):
                torch.testing.assert_close(logp, naive_logp(crm, groups[i], 1.0)[rows], atol=1e-5, rtol=0)
                torch.testing.assert_close(reference[i][rows], logp, atol=1e-5, rtol=0)
                (logp * weights[i][rows]).sum().backward(retain_graph=True)
        for name, p in crm.model.named_parameters():
            assert (p.grad is None) == (freeze_vision and "visual" in name), name
            if p.grad is not None:
                torch.testing.assert_close(p.grad, naive[name], rtol=1e-3,
                                           atol=1e-5 * naive[name].abs().max().item() + 1e-6)
        crm.model.zero_grad()


@pytest.mark.parametrize("drop_finished", [True, False])
def test_the_sampler_draws_what_a_loop_without_a_cache_draws(prompts, drop_finished):
    crm, seed = random_crm(drop_finished=drop_finished), 3
    crm.end = torch.arange(40, 100)                                     # so that rows end at different times
    groups = crm.sample(prompts, 6, 14, seed=seed)
    assert len({int(n) for g in groups for n in g.lengths}) > 3
    for i, (prompt, group) in enumerate(zip(prompts, groups)):
        for g in range(6):
            uniform, ids = np.random.default_rng([seed, i, g]).random(14), prompt.ids
            for t in range(14):
                logits = crm.model(
                    input_ids=ids[None], pixel_values=prompt.pixel_values, image_grid_thw=prompt.grid_thw,
                    mm_token_type_ids=(ids[None] == crm.image_id).int()).logits[0, -1]
                cdf = logits.masked_fill(~crm.allowed, -torch.inf).softmax(-1).cumsum(0, dtype=torch.float64)
                token = int((cdf <= uniform[t] * cdf[-1]).sum())
                assert token == group.tokens[g, t]
                ids = torch.cat([ids, torch.tensor([token])])
                if token in crm.end:
                    break
            assert group.lengths[g] == t + 1 and group.finished[g] == (token in crm.end)


class Tape(TorchDispatchMode):
    """What a CUDA graph is, on a CPU: the kernels that ran, played again on the same memory, without Python."""

    def __init__(self):
        super().__init__()
        self.calls, self.plays = [], 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        assert op.overloadpacket not in (torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero), "host waits"
        out = op(*args, **(kwargs or {}))
        self.calls.append((op, args, kwargs or {}, out))
        return out

    def play(self):
        self.plays += 1
        for op, args, kwargs, out in self.calls[:0] if self.plays == 1 else self.calls:     # recording ran them once
            for old, new in zip(tree_leaves(out), tree_leaves(op(*args, **kwargs))):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


def test_a_step_replayed_from_a_graph_draws_what_the_step_itself_draws(prompts, monkeypatch):
    tapes = []

    def capture(step, pool):
        tapes.append(Tape())
        with tapes[-1]:
            step()
        return tapes[-1].play

    monkeypatch.setattr(sampling, "capture", capture)
    monkeypatch.setattr(sampling, "GRAIN", 8)
    plain, coarse, graphs = random_crm(), random_crm(), random_crm()
    graphs.sampler, coarse.sampler = sampling.Sampler(graphs, graphs=True), sampling.Sampler(coarse)
    coarse.sampler.grain = 8                                            # as on a GPU without graphs
    plain.end = coarse.end = graphs.end = torch.arange(40, 80)
    captured = []
    for some, temperature, seed in ((prompts, 1.0, 0), (prompts, 1.0, 1), (prompts, 1.0, 0),    # the same memory,
                                    (prompts[1:], 1.0, 2), (prompts[1:], 0.7, 3)):              # other shapes
        played = sum(tape.plays for tape in tapes)
        for a, *others in zip(*(crm.sample(some, 6, 30, temperature, seed) for crm in (plain, coarse, graphs))):
            for b in others:
                assert torch.equal(a.tokens, b.tokens) and torch.equal(a.lengths, b.lengths)
                torch.testing.assert_close(a.logp, b.logp, atol=1e-5, rtol=0)
        assert sum(tape.plays for tape in tapes) > played + 10          # of 29 steps
        captured.append(len(tapes))
        for crm in (plain, coarse, graphs):                             # graphs see weights that change in place
            for p in crm.model.parameters():
                p.data += 0.003 * torch.randn(p.shape, generator=torch.Generator().manual_seed(seed))
    assert 3 < captured[0] and captured[2] < 2 * captured[0] and captured[4] > captured[2]     # few new ones, new ones


def test_cuda_graphs_without_a_cuda_device_are_refused():
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="needs a CUDA device"):
            random_crm(cuda_graphs=True)


def test_the_parity_check_finds_what_it_is_there_for(monkeypatch):
    """What a GPU user runs first, here on the CPU: it passes, and a scale that is off by a hundredth fails it."""
    monkeypatch.setattr(parity, "G", 4)
    table = parity.parity("demo/crm", torch.device("cpu"))
    ours = {name: row for name, row in table.items() if "transformers" not in name}
    assert len(ours) == 6 and all(row["passed"] for row in ours.values()), table
    assert table["bfloat16, rows"]["logp"] > 100 * table["float32, rows"]["logp"]
    attend = scoring.Tree.attend
    monkeypatch.setattr(parity, "T", 16)
    monkeypatch.setattr(scoring.Tree, "attend", lambda tree, q, k, v, scale: attend(tree, q, k, v, 1.01 * scale))
    table = parity.parity("demo/crm", torch.device("cpu"))
    assert not any(row["passed"] for name, row in table.items() if name in ours and "float32" in name), table


def test_a_frozen_vision_tower_runs_once_for_sampler_reference_and_policy(prompts, monkeypatch):
    for share, calls in ((True, 1), (False, 3)):
        crm, seen = random_crm(freeze_vision=True, reference=True, share_vision=share), []
        for model in (crm.model, crm.frozen):
            whole = model.model.get_image_features
            monkeypatch.setattr(model.model, "get_image_features",
                                lambda *a, whole=whole: seen.append(1) or whole(*a))
        group, = crm.sample([replace(prompts[0], features=None)], 2, 5)
        with crm.reference():
            crm.logp(group, [0, 1])
        crm.logp(group, [0, 1]).sum().backward()
        assert len(seen) == calls


def test_streams_hold_whole_groups_under_a_budget_and_cut_only_what_is_too_long(crm, prompts):
    groups = crm.sample(prompts, 4, 12, seed=1)
    size = [len(g.prompt.ids) + int(g.lengths.sum()) for g in groups]
    assert crm.packs(groups, sum(size)) == [[(0, [0, 1, 2, 3]), (1, [0, 1, 2, 3]), (2, [0, 1, 2, 3])]]
    assert [[i for i, _ in stream] for stream in crm.packs(groups, size[0] + size[1])] == [[0, 1], [2]]
    for budget in range(max(len(p.ids) for p in prompts) + 12, sum(size), 17):
        streams = crm.packs(groups, budget)
        assert sorted((i, row) for stream in streams for i, rows in stream for row in rows) == \
            [(i, row) for i in range(3) for row in range(4)]
        assert all(sum(len(groups[i].prompt.ids) + int(groups[i].lengths[rows].sum()) for i, rows in stream) <= budget
                   for stream in streams)
    assert crm.packs([], 100) == []


def test_a_group_cut_into_packs_scores_and_learns_as_a_whole_one(crm, prompts):
    group = crm.sample(prompts[:1], 6, 20, seed=3)[0]
    budget = len(group.prompt.ids) + 45
    packs = [rows for stream in crm.packs([group], budget) for _, rows in stream]
    assert len(packs) > 1 and sum(packs, []) == list(range(6))
    assert all(len(group.prompt.ids) + group.lengths[rows].sum() <= budget for rows in packs)
    assert crm.packs([group], 1) == [[(0, [i])] for i in range(6)]           # never drops a row
    whole = crm.logp(group, range(6))
    torch.testing.assert_close(torch.cat([crm.logp(group, rows) for rows in packs]), whole, atol=1e-5, rtol=0)


def test_entropy_is_that_of_the_distribution(crm, prompts):
    group = crm.sample(prompts[:1], 2, 6, seed=0)[0]
    (_, entropy), = crm.score([(group, [0, 1])])
    ids = torch.cat([group.prompt.ids, group.tokens[0, :0]])[None]
    logits = crm.model(
        input_ids=ids, pixel_values=group.prompt.pixel_values, image_grid_thw=group.prompt.grid_thw,
        mm_token_type_ids=(ids == crm.image_id).int()).logits[0, -1]
    logits[~crm.allowed] = -torch.inf
    expected = torch.distributions.Categorical(logits=logits).entropy()
    torch.testing.assert_close(entropy[:, 0], expected.expand(2), atol=1e-5, rtol=0)
    assert not entropy.requires_grad


def test_positions_equal_get_rope_index_and_answers_go_on_from_the_largest(crm, prompts):
    for prompt in prompts:
        ids = prompt.ids[None]
        positions, delta = crm.model.model.get_rope_index(ids, (ids == crm.image_id).int(), prompt.grid_thw)
        assert torch.equal(prompt.positions, positions[:, 0])
        assert prompt.positions.max() + 1 == len(prompt.ids) + delta.item()     # where generate goes on
        assert not torch.equal(prompt.positions[1], prompt.positions[0])        # really three axes


def test_answers_do_not_depend_on_the_batch_they_were_sampled_in(crm, prompts):
    seeds = [(5, i) for i in range(3)]
    together, alone = crm.sample(prompts, 4, 12, seed=seeds), [crm.sample([p], 4, 12, seed=[s])[0]
                                                               for p, s in zip(prompts, seeds)]
    for a, b in zip(together, alone):
        assert a.texts == b.texts
        torch.testing.assert_close(a.logp, b.logp, atol=1e-5, rtol=0)
    fewer = crm.sample(prompts, 2, 12, seed=seeds)
    assert [g.texts[:2] for g in together] == [g.texts for g in fewer]
    assert crm.sample(prompts, 4, 12, seed=6)[0].texts != together[0].texts


def test_sampler_passes_a_chi_square_test_against_softmax(crm, prompts):
    temperature, draws = 1.3, 4000
    group = crm.sample(prompts[:1], draws, 1, temperature, seed=4)[0]
    ids = prompts[0].ids[None]
    logits = crm.model(
        input_ids=ids, pixel_values=prompts[0].pixel_values, image_grid_thw=prompts[0].grid_thw,
        mm_token_type_ids=(ids == crm.image_id).int()).logits[0, -1].detach() / temperature
    logits[~crm.allowed] = -torch.inf
    expected = logits.softmax(-1) * draws
    counts = torch.bincount(group.tokens[:, 0], minlength=len(expected)).float()
    assert counts[expected == 0].sum() == 0
    common = expected >= 5
    expected = torch.cat([expected[common], expected[~common].sum()[None]])
    counts = torch.cat([counts[common], counts[~common].sum()[None]])
    chi2, df = ((counts - expected) ** 2 / expected).sum(), len(expected) - 1
    assert df >= 10
    assert abs(chi2 - df) < 4 * np.sqrt(2 * df)                     # four standard deviations either way


def test_temperature_zero_takes_the_likeliest_token(crm, prompts):
    group = crm.sample(prompts[:1], 2, 8, temperature=0)[0]
    assert group.texts[0] == group.texts[1]
    ids = torch.cat([prompts[0].ids, group.tokens[0, :3]])[None]
    logits = crm.model(
        input_ids=ids, pixel_values=prompts[0].pixel_values, image_grid_thw=prompts[0].grid_thw,
        mm_token_type_ids=(ids == crm.image_id).int()).logits[0, -1]
    assert logits.masked_fill(~crm.allowed, -torch.inf).argmax() == group.tokens[0, 3]


@pytest.mark.parametrize("end", END)
def test_either_end_token_ends_an_answer_and_is_its_last_token(crm, prompts, end, monkeypatch):
    end_id = crm.tokenizer.convert_tokens_to_ids(end)
    monkeypatch.setattr(sampling, "draw", lambda logits, uniform, temperature:
                        (torch.tensor([end_id, 300])[-len(logits):], torch.full((len(logits),), -1.0)))
    group = crm.sample(prompts[:1], 2, 5)[0]
    assert group.lengths.tolist() == [1, 5] and group.finished.tolist() == [True, False]
    assert group.tokens[0, 0] == end_id and group.logp[0].tolist() == [-1, 0, 0, 0, 0]
    assert end not in group.texts[0]


def test_a_checkpoints_generation_config_does_not_touch_sampling(crm, prompts):
    before = crm.sample(prompts[:1], 3, 8, seed=9)[0].tokens
    crm.model.generation_config.update(temperature=1e-6, repetition_penalty=1.05, top_k=1, do_sample=True)
    assert torch.equal(before, crm.sample(prompts[:1], 3, 8, seed=9)[0].tokens)


def test_vision_tokens_are_never_sampled_and_a_forced_one_scores_without_a_crash(crm, prompts):
    group = crm.sample(prompts[:1], 64, 8, temperature=50.0)[0]     # nearly uniform: every token is drawn
    banned = torch.tensor(crm.tokenizer.convert_tokens_to_ids(list(BANNED)))
    assert not torch.isin(group.tokens, banned).any()
    group.tokens[:2, 1] = crm.image_id
    logp = crm.logp(group, [0, 1, 2])
    assert logp.isfinite().all() and (logp[:2, 1] < -1e6).all() \
        and (logp[2, :int(group.lengths[2])] > -100).all()


def test_text_that_looks_like_a_special_token_stays_text(crm):
    plain = crm.encode(noise_image(56, 56), "a <|image_pad|> b <|im_end|>")
    assert (plain.ids == crm.image_id).sum() == 4                   # the image's own 2 x 2
    assert (plain.ids == crm.tokenizer.convert_tokens_to_ids("<|im_end|>")).sum() == 2  # the chat's own
    assert "<|image_pad|> b <|im_end|>" in crm.tokenizer.decode(plain.ids)


def test_the_image_is_resized_once_and_frames_carry_both_sizes(crm):
    prompt = crm.encode(noise_image(61, 203), "x")
    assert prompt.frame.image == (61, 203) and prompt.frame.model == (56, 196)
    assert prompt.grid_thw.tolist() == [[1, 14, 4]] and len(prompt.pixel_values) == 56
    assert (prompt.ids == crm.image_id).sum() == 14 and prompt.ids[prompt.image_at] == crm.image_id


def test_saved_folder_loads_with_from_pretrained_and_gives_the_same_numbers(crm, prompts, tmp_path):
    group = crm.sample(prompts[:1], 2, 10, seed=1)[0]
    crm.save(tmp_path / "crm")
    Qwen2_5_VLForConditionalGeneration.from_pretrained(tmp_path / "crm")
    assert AutoTokenizer.from_pretrained(tmp_path / "crm").convert_tokens_to_ids("<|im_end|>") \
        == crm.end_ids[0]
    again = load_crm(tmp_path / "crm")
    assert torch.equal(again.encode(noise_image(112, 84), "x").ids, crm.encode(noise_image(112, 84), "x").ids)
    torch.testing.assert_close(again.logp(group, [0, 1]), crm.logp(group, [0, 1]), atol=0, rtol=0)


@pytest.mark.parametrize("offload", [False, True])
def test_reference_stays_where_the_policy_started(offload):
    crm = random_crm(reference=True, offload=offload)
    prompt = crm.encode(noise_image(56, 56), "x")
    group = crm.sample([prompt], 2, 6)[0]
    start = crm.logp(group, [0, 1]).detach()
    with torch.no_grad():
        for p in crm.trainable().values():
            p.add_(0.01 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0)))
    with crm.reference():
        assert torch.equal(crm.logp(group, [0, 1]), start)
    assert (crm.logp(group, [0, 1]) - start).abs().max() > 1e-3


def test_without_a_reference_asking_for_one_is_an_error(crm):
    with pytest.raises(ValueError, match="reference=True"), crm.reference():
        pass


def test_lora_trains_only_its_matrices_and_switched_off_it_is_the_reference(tmp_path):
    crm, plain = random_crm(lora_rank=4), random_crm()
    names = crm.trainable()
    assert names and all("lora_" in name for name in names) and not any("visual" in name for name in names)
    prompt = crm.encode(noise_image(56, 56), "x")
    group = crm.sample([prompt], 2, 8, seed=1)[0]
    assert group.texts == plain.sample([prompt], 2, 8, seed=1)[0].texts     # a fresh adapter changes nothing
    with torch.no_grad():
        for p in names.values():
            p.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0)))
    moved, group = crm.logp(group, [0, 1]).detach(), group
    assert (moved - group.logp).abs().max() > 1e-3
    with crm.reference():
        torch.testing.assert_close(crm.logp(group, [0, 1]), group.logp, atol=1e-5, rtol=0)
    resampled = crm.sample([prompt], 2, 8, seed=1)[0]               # the decode step sees the adapter, too
    torch.testing.assert_close(crm.logp(resampled, [0, 1]).detach(), resampled.logp, atol=1e-5, rtol=0)
    crm.save(tmp_path / "merged")
    torch.testing.assert_close(load_crm(tmp_path / "merged").logp(group, [0, 1]), moved, atol=1e-5, rtol=0)


def test_lora_computes_in_the_models_type_and_trains_in_float32():
    crm = load_crm("demo/crm", dtype=torch.bfloat16, lora_rank=4)
    optimizer = Optimizer(crm.trainable())
    assert {p.dtype for p in optimizer.models} == {torch.bfloat16}
    assert {p.dtype for p in optimizer.masters} == {torch.float32}


def test_a_frozen_vision_tower_gets_no_gradient():
    crm = random_crm(freeze_vision=True)
    prompt = crm.encode(noise_image(56, 56), "x")
    crm.logp(crm.sample([prompt], 2, 6)[0], [0, 1]).sum().backward()
    assert all(p.grad is None for n, p in crm.model.named_parameters() if "visual" in n)
    assert all(p.grad is not None for n, p in crm.model.named_parameters() if "visual" not in n)


@pytest.mark.parametrize("make, says", [
    (lambda d: None, "no folder with a config.json"),
    (lambda d: (d / "config.json").write_text('{"model_type": "llama"}'), "'llama', not 'qwen2_5_vl'"),
    (lambda d: (d / "config.json").write_text('{"model_type": "qwen2_5_vl"}'), "cannot be loaded")])
def test_a_folder_that_is_no_qwen2_5_vl_is_named(tmp_path, make, says):
    make(tmp_path)
    with pytest.raises(ValueError, match=f"(?s){tmp_path}.*{says}"):
        load_crm(tmp_path)


def test_prompts_have_a_place_for_the_question():
    assert all("{query}" in text for text in PROMPTS.values())


@pytest.mark.filterwarnings("ignore")                                   # it would rather be compiled, on CUDA
def test_flex_attention_sees_what_the_dense_mask_sees(prompts, monkeypatch):
    from torch.nn.attention.flex_attention import flex_attention
    monkeypatch.setattr(attention, "_flex", lambda: flex_attention)
    groups = random_crm().sample(prompts, 3, 10, seed=1)
    with torch.no_grad():
        flex, dense = ([x for pair in random_crm(attention=kind).score([(g, range(3)) for g in groups]) for x in pair]
                       for kind in ("flex", "dense"))
        sampled = random_crm(attention="flex").sample(prompts, 3, 10, seed=1)
    for a, b in zip(flex, dense):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=0)
    assert all(torch.equal(a.tokens, b.tokens) for a, b in zip(groups, sampled))
