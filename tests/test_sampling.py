"""The sampler against a loop without a cache, and everything that must not change what it draws."""

import numpy as np
import pytest
import torch
from conftest import both_families, random_crm
from oracles import next_logits
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import sampling
from crm import BANNED, END, load_crm
from data import load_samples
from sampling import sample
from scoring import logp


def assert_same_completions(groups, others):
    for a, b in zip(groups, others, strict=True):
        assert torch.equal(a.tokens, b.tokens) and torch.equal(a.lengths, b.lengths)
        assert torch.equal(a.finished, b.finished) and a.texts == b.texts
        torch.testing.assert_close(a.logp, b.logp, atol=1e-5, rtol=0)


@pytest.fixture
def short(family):
    """A model whose completions end at different times: an eighth of the vocabulary ends one."""
    crm = random_crm(family=family)
    crm.end = torch.arange(40, 90)
    return crm


@both_families
def test_the_sampler_draws_what_a_loop_without_a_cache_draws(short, prompts):
    groups = sample(short, prompts, 6, 14, seed=3)
    assert len({int(n) for g in groups for n in g.lengths}) > 3
    for i, (prompt, group) in enumerate(zip(prompts, groups)):
        for g in range(6):
            uniform, ids = np.random.default_rng([3, i, g]).random(14), prompt.ids
            for t in range(14):
                cdf = next_logits(short, prompt, ids).softmax(-1).cumsum(0, dtype=torch.float64)
                token = int((cdf <= uniform[t] * cdf[-1]).sum())
                assert token == group.tokens[g, t]
                ids = torch.cat([ids, torch.tensor([token])])
                if token in short.end:
                    break
            assert group.lengths[g] == t + 1 and group.finished[g] == (token in short.end)


@pytest.mark.parametrize("room, check_every", [(1, 1), (4, 1), (4, 5), (64, 3), (64, 100)])
def test_neither_how_caches_grow_nor_when_one_looks_changes_a_completion(
    short, prompts, monkeypatch, room, check_every
):
    expected = sample(short, prompts, 6, 30, 0.9, seed=4)
    monkeypatch.setitem(sampling.ROOM, "cpu", room)
    monkeypatch.setitem(sampling.CHECK_EVERY, "cpu", check_every)
    assert_same_completions(sample(short, prompts, 6, 30, 0.9, seed=4), expected)


def test_nothing_is_computed_once_all_rows_have_ended(short, prompts, monkeypatch):
    steps = []
    step = sampling.Batch.step

    def counted(batch):
        assert not batch.done.all()
        steps.append(1)
        step(batch)

    monkeypatch.setattr(sampling.Batch, "step", counted)
    groups = sample(short, prompts, 6, 300, seed=3)
    longest = max(int(group.lengths.max()) for group in groups)
    assert len(steps) == longest - 1 < 299  # the first token is drawn from the prompt


@pytest.mark.parametrize("size", [1.0, 300.0])
def test_attention_to_two_parts_is_that_to_all_keys_under_one_softmax(size):
    """Also where scores are large, and where one part outweighs the other by hundreds of nats."""
    torch.manual_seed(0)
    q = torch.randint(-3, 4, (2, 5, 3, 8)).float()  # whole numbers are exact in float32
    keys = torch.randint(-3, 4, (2, 5, 9, 8)).float()
    values = torch.randint(-3, 4, (2, 5, 9, 8)).float()
    keys[0, :, :4] += 10
    bias = torch.zeros(5, 1, 9)
    bias[1, 0, 2:4] = bias[3, 0, 7:] = -torch.inf  # padding, and the future
    expected = (size * (q @ keys.mT) + bias).softmax(-1) @ values
    one, one_lse = sampling.partial_attention(
        q, keys[:, :, :4], values[:, :, :4], bias[..., :4], size
    )
    two, two_lse = sampling.partial_attention(
        q, keys[:, :, 4:], values[:, :, 4:], bias[..., 4:], size
    )
    torch.testing.assert_close(
        one.lerp(two, torch.sigmoid(two_lse - one_lse)), expected, atol=2e-5, rtol=1e-4
    )
    whole, lse = sampling.partial_attention(q, keys, values, bias, size)
    torch.testing.assert_close(whole, expected, atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(lse, torch.logaddexp(one_lse, two_lse), atol=1e-5, rtol=1e-6)


@pytest.mark.parametrize("at_once", [1, 2])
def test_prompts_sampled_in_chunks_give_the_same_completions(short, prompts, monkeypatch, at_once):
    expected = sample(short, prompts, 4, 12, seed=5)
    monkeypatch.setattr(sampling, "prompts_at_once", lambda *_: at_once)
    assert_same_completions(sample(short, prompts, 4, 12, seed=5), expected)


@both_families
def test_as_many_prompts_are_sampled_at_once_as_their_caches_fit(family, crm, prompts, monkeypatch):
    head_size = {"qwen2_5_vl": 16, "qwen3_vl": 24}[family]
    keys = 2 * 2 * 2 * head_size * 4  # two sides, two layers, two key heads, four bytes
    size = (max(len(p.ids) for p in prompts) + 4 * 12) * keys
    for fit in (1, 2, 3):
        monkeypatch.setattr(sampling, "HOST_CACHE_BYTES", fit * size + 1)
        assert sampling.prompts_at_once(crm, prompts, 4, 12) == fit
    monkeypatch.setattr(sampling, "HOST_CACHE_BYTES", 1)
    assert sampling.prompts_at_once(crm, prompts, 4, 12) == 1  # never none
    assert sample(crm, [], 4, 12) == []


class Tape(TorchDispatchMode):
    """What a CUDA graph is, on a CPU: the kernels that ran, replayed on the same memory."""

    def __init__(self):
        super().__init__()
        self.calls, self.plays = [], 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        waits = torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero
        assert op.overloadpacket not in waits, "the host waits"
        out = op(*args, **(kwargs or {}))
        self.calls.append((op, args, kwargs or {}, out))
        return out

    def play(self):
        self.plays += 1
        if self.plays == 1:
            return  # here, recording has run the kernels once
        for op, args, kwargs, out in self.calls:
            for old, new in zip(tree_leaves(out), tree_leaves(op(*args, **kwargs))):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


@both_families
def test_a_step_replayed_from_a_graph_draws_what_the_step_itself_draws(short, prompts, monkeypatch):
    tapes = []
    cases = [(prompts, 1.0, 0), (prompts[1:], 0.7, 2)]
    plain = [sample(short, some, 6, 40, temperature, seed) for some, temperature, seed in cases]

    def capture(step):
        tapes.append(Tape())
        with tapes[-1]:
            step()
        return tapes[-1].play

    class WithGraphs(sampling.Batch):  # as on a GPU
        def begin(self):
            self.graphs = True
            super().begin()

    monkeypatch.setattr(sampling, "capture", capture)
    monkeypatch.setattr(sampling, "Batch", WithGraphs)
    monkeypatch.setitem(sampling.CHECK_EVERY, "cpu", 8)
    monkeypatch.setitem(sampling.ROOM, "cpu", 20)  # so that caches grow under a graph
    for (some, temperature, seed), expected in zip(cases, plain, strict=True):
        tapes.clear()
        assert_same_completions(sample(short, some, 6, 40, temperature, seed), expected)
        assert 2 <= len(tapes) <= 8  # one per shape
        assert sum(tape.plays for tape in tapes) >= max(int(g.lengths.max()) for g in expected) - 12


@both_families
def test_completions_do_not_depend_on_the_batch_they_were_sampled_in(crm, prompts):
    seeds = [(5, i) for i in range(3)]
    together = sample(crm, prompts, 4, 12, seed=seeds)
    alone = [sample(crm, [p], 4, 12, seed=[s])[0] for p, s in zip(prompts, seeds)]
    assert_same_completions(together, alone)
    fewer = sample(crm, prompts, 2, 12, seed=seeds)
    assert [g.texts[:2] for g in together] == [g.texts for g in fewer]
    assert sample(crm, prompts, 4, 12, seed=6)[0].texts != together[0].texts


def test_rows_of_a_group_and_prompts_of_a_batch_draw_differently(crm, prompts):
    one, two = sample(crm, [prompts[0], prompts[0]], 8, 12, seed=1)
    assert len({*one.texts, *two.texts}) == 16


def test_sampler_passes_a_chi_square_test_against_softmax(crm, prompts):
    temperature, draws = 0.4, 4000  # 1 would be told from it
    (group,) = sample(crm, prompts[:1], draws, 1, temperature, seed=4)
    expected = (
        next_logits(crm, prompts[0], prompts[0].ids, temperature).detach().softmax(-1) * draws
    )
    counts = torch.bincount(group.tokens[:, 0], minlength=len(expected)).float()
    assert counts[expected == 0].sum() == 0
    common = expected >= 5
    expected = torch.cat([expected[common], expected[~common].sum()[None]])
    counts = torch.cat([counts[common], counts[~common].sum()[None]])
    chi2, df = ((counts - expected) ** 2 / expected).sum(), len(expected) - 1
    assert df >= 10
    assert abs(chi2 - df) < 4 * np.sqrt(2 * df)  # four standard deviations either way


def test_temperature_zero_takes_the_likeliest_token(crm, prompts):
    (group,) = sample(crm, prompts[:1], 2, 8, temperature=0)
    assert group.texts[0] == group.texts[1]
    ids = torch.cat([prompts[0].ids, group.tokens[0, :3]])
    assert next_logits(crm, prompts[0], ids).argmax() == group.tokens[0, 3]


def test_a_token_of_probability_zero_is_never_drawn():
    logits = torch.tensor([[-torch.inf, 0.0, -torch.inf, 0.0, -torch.inf]]).expand(4, -1)
    uniform = torch.tensor([0.0, 0.5 - 1e-12, 0.5, 1 - 1e-16], dtype=torch.float64)
    token, chosen = sampling.draw(logits, uniform, 1.0)
    assert token.tolist() == [1, 1, 3, 3]
    torch.testing.assert_close(chosen, torch.full((4,), 0.5).log())


@pytest.mark.parametrize("end", END)
def test_either_end_token_ends_a_completion_and_is_its_last_token(crm, prompts, end, monkeypatch):
    end_id = crm.tokenizer.convert_tokens_to_ids(end)
    monkeypatch.setattr(
        sampling,
        "draw",
        lambda logits, uniform, temperature: (
            torch.tensor([end_id, 300])[-len(logits) :],
            torch.full((len(logits),), -1.0),
        ),
    )
    (group,) = sample(crm, prompts[:1], 2, 5)
    assert group.lengths.tolist() == [1, 5] and group.finished.tolist() == [True, False]
    assert group.tokens[0, 0] == end_id and group.logp[0].tolist() == [-1, 0, 0, 0, 0]
    assert group.texts[0] == "" and group.texts[1] == crm.tokenizer.decode([300] * 5)


def test_a_special_token_inside_a_completion_stays_visible_in_its_text(crm, prompts, monkeypatch):
    start, end = crm.tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    tokens = iter([300, start, 301, end])
    monkeypatch.setattr(
        sampling,
        "draw",
        lambda logits, uniform, temperature: (
            torch.full((len(logits),), next(tokens)),
            torch.full((len(logits),), -1.0),
        ),
    )
    (group,) = sample(crm, prompts[:1], 1, 8)
    words = crm.tokenizer.decode([300]), crm.tokenizer.decode([301])
    assert group.texts == ["<|im_start|>".join(words)] and group.lengths.tolist() == [4]


def test_a_checkpoints_generation_config_does_not_touch_sampling(prompts):
    crm = random_crm()
    before = sample(crm, prompts[:1], 3, 8, seed=9)[0].tokens
    crm.model.generation_config.update(
        temperature=1e-6, repetition_penalty=1.05, top_k=1, do_sample=True
    )
    assert torch.equal(before, sample(crm, prompts[:1], 3, 8, seed=9)[0].tokens)


@both_families
def test_vision_tokens_are_never_sampled(crm, prompts):
    (group,) = sample(
        crm, prompts[:1], 64, 8, temperature=50.0
    )  # nearly uniform: every token is drawn
    banned = torch.tensor(crm.tokenizer.convert_tokens_to_ids(list(BANNED)))
    assert not torch.isin(group.tokens, banned).any() and len(group.tokens.unique()) > 100


@pytest.mark.parametrize("temperature", [1.0, 0.0])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_weights_that_are_not_finite_end_in_one_error(prompts, bad, temperature):
    crm = random_crm()
    crm.model.model.language_model.layers[0].mlp.down_proj.weight.data[0, 0] = bad
    with pytest.raises(FloatingPointError, match="not finite"):
        sample(crm, prompts, 2, 8, temperature)


def test_large_key_biases_in_bfloat16_do_not_part_sampler_and_scorer(monkeypatch):
    """Qwen2.5's key biases have norms of several hundred: bfloat16 scores are then off by units."""
    crm = load_crm("demo/crm", dtype=torch.bfloat16)
    examples = load_samples("demo/data")
    for layer in (
        crm.model.model.language_model.layers[0],
        crm.model.model.language_model.layers[-1],
    ):
        for projection, bias in ((layer.self_attn.k_proj, 100.0), (layer.self_attn.q_proj, 5.0)):
            projection.bias.data.unflatten(0, (-1, layer.self_attn.head_dim))[:, :4] += bias
    prompts = [crm.prompt_of(examples[i]) for i in range(8)]  # of fewer the mean varies by CPU

    def mean_gap():
        groups = sample(crm, prompts, 4, 40, seed=0)
        gaps = [(logp(crm, group, range(4)) - group.logp).abs().sum() for group in groups]
        return float(sum(gaps) / sum(group.lengths.sum() for group in groups))

    with torch.no_grad():
        float32 = mean_gap()
        assert float32 < 0.01
        monkeypatch.setattr(sampling, "scores_float32", lambda q, keys: (q @ keys.mT).float())
        assert mean_gap() > 2 * float32  # so the biases are large enough to show it
