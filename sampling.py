"""Sampling: G completions of each prompt, one token per step, with the log-probability of every token.

    group, = sample(crm, [prompt], G=8, max_new_tokens=128, temperature=1.0, seed=0)

Each prompt and its image go through the model once; its keys and values are stored once, and all G rows attend to
them in one product. A decoding step is written out over the model's own modules, on tensors that stay in place: on a
GPU it is recorded as a CUDA graph and replayed, without Python between its several hundred kernels. Rows that have
ended leave the batch. What is sampled is softmax(logits / temperature) and nothing else; a checkpoint's own
generation_config (Qwen's has a temperature of 1e-6) is never used.

Read next: scoring.py computes the same log-probabilities, differentiably.

Shapes: P prompts, G completions each, N = P*G rows laid out (p g), L longest prompt, T completion tokens that the
caches have room for, V vocabulary, D hidden, k key heads, r query heads per key head, d head size. After rows have
left, n of N remain, P counts the prompts that still have rows, and G is the most rows of one.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from einops import rearrange, repeat
from torch.nn.functional import pad
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import apply_rotary_pos_emb

from crm import CRM, Group, Prompt

ROOM = {"cpu": 16, "cuda": 128}  # tokens by which the caches of the completions grow
CHECK_EVERY = {
    "cpu": 1,
    "cuda": 8,
}  # steps between two looks at which rows have ended: each look waits
LEAVE = {
    "cpu": 0.1,
    "cuda": 0.25,
}  # rows leave once this part of them has ended: each time is a copy
HOST_CACHE_BYTES = 4 * 2**30  # keys and values of the prompts sampled at once, on a CPU


@torch.no_grad()
def sample(
    crm: CRM,
    prompts: Sequence[Prompt],
    G: int,
    max_new_tokens: int = 512,
    temperature: float = 1.0,
    seed: int | Sequence[tuple[int, ...]] = 0,
    graphs: bool = True,
) -> list[Group]:
    """G completions of each prompt; temperature 0 takes the most likely token.

    seed: one number, or one tuple of numbers per prompt. Row g of a prompt draws from a stream of its own, so a
    completion depends neither on the other rows nor on how many prompts are sampled at once.
    graphs: on a GPU, replay the step as a CUDA graph. FloatingPointError where logits are not finite."""
    crm.model.eval()
    seeds = [(seed, i) for i in range(len(prompts))] if isinstance(seed, int) else list(seed)
    at_once, groups = prompts_at_once(crm, prompts, G, max_new_tokens), []
    for start in range(0, len(prompts), at_once):
        chunk = slice(start, start + at_once)
        uniform = [
            np.random.default_rng([*s, g]).random(max_new_tokens)
            for s in seeds[chunk]
            for g in range(G)
        ]
        batch = Batch(
            crm,
            prompts[chunk],
            G,
            np.stack(uniform),
            temperature,
            graphs and crm.device.type == "cuda",
        )
        for t in range(1, max_new_tokens):
            if t % CHECK_EVERY[crm.device.type] == 0:
                if batch.done.all():
                    break
                batch.drop_finished()
            batch.advance(t)
        groups += batch.groups(prompts[chunk], crm.tokenizer)
    return groups


def prompts_at_once(crm: CRM, prompts: Sequence[Prompt], G: int, max_new_tokens: int) -> int:
    """How many prompts' caches fit into half of the free memory, if every completion were of full length."""
    c, longest = crm.model.config.text_config, max((len(p.ids) for p in prompts), default=0)
    width = c.num_key_value_heads * c.hidden_size // c.num_attention_heads
    per_token = 2 * c.num_hidden_layers * width * crm.model.dtype.itemsize
    free = (
        torch.cuda.mem_get_info(crm.device)[0] // 2
        if crm.device.type == "cuda"
        else HOST_CACHE_BYTES
    )
    return max(1, int(free // (per_token * (longest + G * max_new_tokens))))


# ---------------------------------------------------------------- one decoding step


def draw(logits: torch.Tensor, uniform: torch.Tensor, temperature: float):
    """One token per row, by inverting the distribution function, and its log-probability.

    logits (n, V) float32, already divided by the temperature; uniform (n,) float64 in [0, 1)
    -> tokens (n,), logp (n,). Temperature 0 takes the most likely token. A token of probability 0 is never
    drawn. Logits that are not finite give a log-probability of nan."""
    logp = logits.log_softmax(-1)
    if temperature == 0:
        token = logp.argmax(-1)
    else:
        cdf = logp.exp().cumsum(-1, dtype=torch.float64)
        token = torch.searchsorted(cdf, (uniform * cdf[:, -1])[:, None], right=True)[:, 0]
        token = token.clamp(max=logits.shape[1] - 1)
    return token, logp.gather(1, token[:, None])[:, 0]


def scores_float32(q: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """q k^T in float32: (…, a, d), (…, b, d) -> (…, a, b). Qwen2.5's key biases make attention scores so large
    that bfloat16 rounds them by whole units; the fused kernels of scoring.py keep float32, too."""
    if q.is_cuda and q.dtype != torch.float32:
        product = torch.bmm(q.flatten(0, -3), keys.flatten(0, -3).mT, out_dtype=torch.float32)
        return product.unflatten(0, q.shape[:-2])
    return q.float() @ keys.float().mT


def attend_to(q, keys, values, bias, scale: float):
    """Attention to some of the keys, and the logsumexp of the scores, by which it is joined with that to the rest.
    q (…, a, d), keys and values (…, s, d), bias broadcastable to (…, a, s) -> (…, a, d), (…, a, 1), float32"""
    scores = torch.add(bias, scores_float32(q, keys), alpha=scale)
    weights = scores.softmax(-1)
    lse = (
        scores.amax(-1, keepdim=True) - weights.amax(-1, keepdim=True).log()
    )  # a weight is exp(score - lse)
    return (weights.to(q.dtype) @ values).float(), lse


class LayerCache:
    """One layer's keys and values: of the prompts (k, P, L, d), of the completions so far (k, n, T, d)."""

    def __init__(self, prompt_keys, prompt_values, n: int, room: int):
        k, _, _, d = prompt_keys.shape
        self.prompt_keys, self.prompt_values = prompt_keys, prompt_values
        self.own_keys, self.own_values = (prompt_keys.new_zeros(k, n, room, d) for _ in range(2))

    def grow(self, room: int) -> None:
        self.own_keys, self.own_values = (
            pad(x, (0, 0, 0, room)) for x in (self.own_keys, self.own_values)
        )

    def keep(self, prompts, rows) -> None:
        """Keep some of the P prompts and some of the n rows."""
        self.prompt_keys, self.prompt_values = (
            x[:, prompts] for x in (self.prompt_keys, self.prompt_values)
        )
        self.own_keys, self.own_values = (x[:, rows] for x in (self.own_keys, self.own_values))


class Batch:
    """The state of N = P*G rows while their completions are written.

    uniform: (N, max_new_tokens) float64 in [0, 1), what each row draws its tokens with."""

    def __init__(
        self,
        crm: CRM,
        prompts: Sequence[Prompt],
        G: int,
        uniform: np.ndarray,
        temperature: float,
        graphs,
    ):
        self.crm, self.temperature, self.graphs = crm, temperature, graphs
        device, (N, limit) = crm.device, uniform.shape
        # what is written, for all N rows
        self.uniform = torch.from_numpy(uniform).to(device)
        self.tokens = torch.full((N, limit), int(crm.end[-1]), device=device)
        self.logp = torch.zeros(N, limit, device=device)
        self.lengths = torch.zeros(N, dtype=torch.long, device=device)
        self.done = torch.zeros(N, dtype=torch.bool, device=device)
        # the n rows that are still in the batch
        self.t = torch.zeros(1, dtype=torch.long, device=device)  # completion tokens in the caches
        self.rows = torch.arange(N, device=device)  # (n,) which of the N, ascending
        self.place(self.rows // G)
        self.room = ROOM[device.type]
        hidden, caches = prefill(crm, prompts)
        lengths = torch.tensor([len(p.ids) for p in prompts], device=device)
        self.position = torch.stack([p.positions.max() + 1 for p in prompts])[
            self.prompt_of
        ]  # (n,)
        self.caches = [LayerCache(keys, values, N, self.room) for keys, values in caches]
        padding = torch.arange(caches[0][0].shape[2], device=device) >= lengths[:, None, None]
        self.padding = torch.zeros(padding.shape, device=device).masked_fill(
            padding, -torch.inf
        )  # (P, 1, L)
        self.future = torch.full((self.room,), -torch.inf, device=device)  # (T,)
        self.write(repeat(hidden, "p d -> (p g) d", g=G))

    def advance(self, t: int) -> None:
        """Token t of every row. The first step of a shape runs as it is written, which readies libraries; with
        graphs the second is recorded, and from then on replayed."""
        if t > self.caches[0].own_keys.shape[2]:
            self.replay, self.warm = None, False  # first, as in drop_finished
            for cache in self.caches:
                cache.grow(self.room)
            self.future = pad(self.future, (0, self.room), value=-torch.inf)
        if self.graphs and self.warm and self.replay is None:
            self.replay = record(self.step)
        (self.replay or self.step)()
        self.warm = True

    def step(self) -> None:
        """The newest token of every row goes through the model, and the next one is drawn. All that changes
        from step to step is in tensors that stay in place."""
        model = self.crm.model.model.language_model
        self.future.index_fill_(0, self.t, 0.0)
        x = model.embed_tokens(self.token)  # (n, D)
        cos, sin = (
            c[0] for c in model.rotary_emb(x, (self.position + self.t).expand(3, 1, -1))
        )  # (n, d)
        for layer, cache in zip(model.layers, self.caches):
            attention, h, d = layer.self_attn, layer.input_layernorm(x), cache.own_keys.shape[3]
            q, key, value = (
                projection(h).unflatten(-1, (-1, d))
                for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
            )  # (n, heads, d)
            q, key = apply_rotary_pos_emb(q, key, cos, sin)
            for own, new in ((cache.own_keys, key), (cache.own_values, value)):
                own.index_copy_(2, self.t, rearrange(new, "n k d -> k n 1 d"))
            q = rearrange(q, "n (k r) d -> k n r d", k=key.shape[1])
            x = x + attention.o_proj(
                rearrange(self.attend(q, cache, attention.scaling), "k n r d -> n (k r d)")
            )
            x = x + layer.mlp(layer.post_attention_layernorm(x))
        self.t += 1
        self.write(model.norm(x))

    def attend(self, q: torch.Tensor, cache: LayerCache, scale: float) -> torch.Tensor:
        """The newest token of every row attends to its prompt, in one product with the prompt's other rows, and to its
        own completion, whose share of their joint softmax is sigmoid(own_lse - prompt_lse). q (k, n, r, d) -> same."""
        P, r = cache.prompt_keys.shape[1], q.shape[2]
        by_prompt = rearrange(q.index_select(1, self.row_of), "k (p g) r d -> k p (g r) d", p=P)
        prompt, prompt_lse = (
            rearrange(x, "k p (g r) d -> k (p g) r d", r=r).index_select(1, self.slots)
            for x in attend_to(
                by_prompt, cache.prompt_keys, cache.prompt_values, self.padding, scale
            )
        )
        own, own_lse = attend_to(q, cache.own_keys, cache.own_values, self.future, scale)
        return prompt.lerp(own, torch.sigmoid(own_lse - prompt_lse)).to(q.dtype)

    def write(self, hidden: torch.Tensor) -> None:
        """Draw token t of every row in the batch; write it down unless the row has ended. hidden (n, D)."""
        at = self.rows, self.t
        token, logp = draw(
            self.crm.logits(hidden, self.temperature), self.uniform[at], self.temperature
        )
        ended = self.done[self.rows]
        self.tokens[at] = torch.where(ended, self.tokens[at], token)
        self.logp[at] = torch.where(ended, 0.0, logp)
        self.lengths[self.rows] += ~ended
        self.done[self.rows] = ended | torch.isin(token, self.crm.end)
        self.token.copy_(token)

    def drop_finished(self) -> None:
        """Take finished rows out of the batch once they are LEAVE of it, and prompts that have none left."""
        stay = (~self.done[self.rows]).nonzero()[:, 0]
        if len(stay) > (1 - LEAVE[stay.device.type]) * len(self.rows):
            return
        prompts, prompt_of = self.prompt_of[stay].unique(return_inverse=True)
        self.rows, self.position, self.padding = (
            self.rows[stay],
            self.position[stay],
            self.padding[prompts],
        )
        self.place(prompt_of)  # first, as it frees the memory of the step's CUDA graph
        for cache in self.caches:
            cache.keep(prompts, stay)

    def place(self, prompt_of: torch.Tensor) -> None:
        """prompt_of (n,) ascending: the prompt of each row. Rows attend to their prompt in a (P, G) rectangle of slots,
        G the most rows that a prompt has. An empty slot repeats the row before it, and nobody looks at it."""
        self.prompt_of, count = prompt_of, prompt_of.bincount()
        filled = (torch.arange(int(count.max()), device=count.device) < count[:, None]).flatten()
        self.slots = filled.nonzero()[:, 0]  # (n,) the slot of each row
        self.row_of = filled.cumsum(0) - 1  # (P*G,) the row in each slot
        self.token = self.tokens[self.rows, self.t]  # (n,) the newest of each
        self.replay, self.warm = (
            None,
            False,
        )  # the step's CUDA graph; whether its shape has run once

    def groups(self, prompts: Sequence[Prompt], tokenizer) -> list[Group]:
        """What was written, one Group per prompt."""
        lengths, done = self.lengths.cpu(), self.done.cpu()
        split = (
            rearrange(x, "(p g) ... -> p g ...", p=len(prompts))
            for x in (self.tokens, self.logp, lengths, done)
        )
        groups = []
        for prompt, tokens, logp, lengths, done in zip(prompts, *split):
            width = int(lengths.max())
            tokens, logp = tokens[:, :width].clone(), logp[:, :width].clone()
            if not logp.isfinite().all():
                said = tokenizer.decode(prompt.ids, skip_special_tokens=True)[:200]
                raise FloatingPointError(
                    f"logits are not finite, the weights or the image are broken: {said!r}"
                )
            # without the token that ends it; a special token anywhere else stays visible, and costs the format
            texts = [
                tokenizer.decode(row[: n - ended])
                for row, n, ended in zip(tokens, lengths, done.long())
            ]
            groups.append(Group(prompt, tokens, lengths, logp, done, texts))
        return groups


def prefill(crm: CRM, prompts: Sequence[Prompt]):
    """Each prompt once through the model -> the hidden state of its last token (P, D), and of every layer the
    keys and values (k, P, L, d), padded on the right."""
    hidden, layers = [], [([], []) for _ in crm.model.model.language_model.layers]
    for prompt, features in zip(prompts, crm.image_features(prompts)):
        x, positions = crm.embed(prompt, features)
        out = crm.model.model.language_model(
            inputs_embeds=x[None], position_ids=positions[:, None], use_cache=True
        )
        hidden.append(out.last_hidden_state[0, -1])
        for layer, cache in zip(layers, out.past_key_values.layers):
            for side, kept in zip(layer, (cache.keys, cache.values)):
                side.append(kept[0])  # (k, l, d)
    L = max(len(p.ids) for p in prompts)
    padded = [
        tuple(torch.stack([pad(x, (0, 0, 0, L - x.shape[1])) for x in side], 1) for side in layer)
        for layer in layers
    ]
    return torch.stack(hidden), padded


def record(step: Callable[[], None]) -> Callable[[], None]:
    """step as a CUDA graph: replaying it runs the same kernels on the same memory. Recording runs nothing."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay
