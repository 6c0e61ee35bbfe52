"""Sampling: G answers to each of P prompts, a token a step.

Image and prompt went through the model once; their keys and values are stored once, and all G rows of a prompt
attend to them in one product, and each row to its own answer's, under one softmax. Rows that ended leave the
batch. A step is written out over the model's own modules, so that LoRA-wrapped layers keep working, and what
it reads and writes are tensors only: on a GPU it can be captured as a CUDA graph and replayed, with no Python
between its several hundred small kernels (not yet measured on a GPU; on a CPU a recording of its kernels,
played again, draws the same answers).

Shapes: P prompts, G answers each, N = P*G rows laid out (p g), L longest prompt, T answer tokens,
V vocabulary, D hidden, h query heads, k key heads, r = h / k, d head size. After `compact`, P and G are what
is left of them.
"""
from collections.abc import Callable
from functools import partial

import torch
from einops import rearrange, repeat
from torch.nn.functional import pad
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import apply_rotary_pos_emb

GRAIN = 64              # on a GPU: lengths are rounded up to it, so that products are aligned and graphs few


def draw(logits, uniform, temperature: float):
    """One token a row by inverting the distribution function, and its log-probability; temperature 0 takes
    the likeliest. logits (n, V) float32, divided by the temperature; uniform (n,) float64 -> (n,), (n,)."""
    logp = logits.log_softmax(-1)
    if temperature == 0:
        token = logp.argmax(-1)
    else:
        cdf = logp.exp().cumsum(-1, dtype=torch.float64)
        # never one of probability 0
        token = torch.searchsorted(cdf, (uniform * cdf[:, -1])[:, None], right=True)[:, 0]
    return token, logp.gather(1, token[:, None])[:, 0]


def capture(step: Callable[[], None], pool) -> Callable[[], None]:
    """step as a CUDA graph: replaying it runs the same kernels on the same memory. Capturing runs nothing."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        step()
    return graph.replay


class Sampler:
    """The state of a batch of answers. For each layer, keys and values of the prompts (P, k, L, d) and of the
    answers so far (P, k, G, T, d); a bias hides the padding of shorter prompts and what is not yet written.

    With graphs, every tensor that a step touches has one place in memory for good (`put`), in this batch and
    the next; a graph serves one shape of the batch and `grain` tokens."""

    def __init__(self, crm, graphs: bool = False):
        self.crm, self.graphs, self.homes, self.key, self.L = crm, {} if graphs else None, {}, None, 0
        self.grain = GRAIN if graphs or crm.device.type == "cuda" else 1

    def put(self, name, x):
        """x, at the place of that name. Its first use has the largest x."""
        if self.graphs is None:
            return x
        home = self.homes.setdefault(name, torch.empty_like(x).flatten())
        return home[:x.numel()].view(x.shape).copy_(x)

    def start(self, hidden, kept, lengths, position, uniform, temperature: float) -> None:
        """Begin, and draw every row's first token.

        hidden (P, D) of each prompt's last token; kept, of each layer, keys and values (P, L, k, d); the
        prompts' lengths and next positions (P,); uniform (N, T) float64 in [0, 1)."""
        (N, T), (P, L) = uniform.shape, kept[0][0].shape[:2]
        key = P, N, T, temperature
        if key != self.key or L > self.L:                           # no place is large enough, no graph fits
            self.key, self.L = key, -(-L // self.grain) * self.grain
            self.homes.clear()
            if self.graphs is not None:
                self.graphs.clear()
                self.pool = torch.cuda.graph_pool_handle() if uniform.is_cuda else None
        self.shape, self.T, self.temperature = (P, N // P), T, temperature
        self.uniform = self.put("uniform", uniform)
        self.tokens = self.put("tokens", lengths.new_full((N, T), self.crm.end_ids[-1]))
        self.logp = self.put("logp", torch.zeros(N, T, device=uniform.device))
        self.lengths = self.put("lengths", lengths.new_zeros(N))
        self.done = self.put("done", lengths.new_zeros(N, dtype=torch.bool))
        self.t = self.put("t", lengths.new_zeros(1))                            # answer tokens in the cache
        self.rows = self.put("rows", torch.arange(N, device=uniform.device))    # those still in the batch
        self.token = self.put("token", lengths.new_zeros(N))                    # the last token of each
        self.position = self.put("position", position)
        self.layers = []
        for i, pair in enumerate(kept):
            prompt = [pad(rearrange(x, "p l k d -> p k l d"), (0, 0, 0, self.L - L)) for x in pair]
            own = [x.new_zeros(P, x.shape[1], N // P, T, x.shape[3]) for x in prompt]
            self.layers.append([self.put((i, name), x) for name, x in enumerate(prompt + own)])
        hides = torch.arange(self.L + T, device=lengths.device) >= lengths[:, None]
        bias = kept[0][0].new_zeros(hides.shape).masked_fill(hides, -torch.inf)
        self.bias = self.put("bias", rearrange(bias, "p l -> p 1 1 1 l"))
        self._write(repeat(hidden, "p d -> (p g) d", g=N // P))

    def compact(self) -> None:
        """Let finished rows go, as far as prompts with equally many rows allow, when that is a quarter of
        them."""
        P, G = self.shape
        live = ~self.done[self.rows].view(P, G)
        count = live.sum(1)
        p, g = int((count > 0).sum()), int(count.max())
        if self.graphs is not None:                                 # few shapes, so that there are few graphs
            p, g = (min(most, 1 << (n - 1).bit_length()) for n, most in ((p, P), (g, G)))
        if p * g > 0.75 * P * G:
            return
        prompts = count.argsort(descending=True, stable=True)[:p]
        columns = live[prompts].sort(dim=1, descending=True, stable=True).indices[:, :g]        # (p, g)
        stay = (prompts[:, None] * G + columns).flatten()
        self.shape, self.position = (p, g), self.put("position", self.position[prompts])
        self.rows, self.token = self.put("rows", self.rows[stay]), self.put("token", self.token[stay])
        self.bias = self.put("bias", self.bias[prompts])
        for i, layer in enumerate(self.layers):                     # a layer at a time: few are there twice
            own = [rearrange(x[prompts[:, None], :, columns], "p g k t d -> p k g t d") for x in layer[2:]]
            layer[:] = [self.put((i, name), x) for name, x in enumerate([x[prompts] for x in layer[:2]] + own)]

    def advance(self, t: int) -> None:
        """One more token a row, t - 1 of which are in the cache. With graphs, the first step of a shape runs
        as it is written, which readies libraries, the second is captured, and from then on it is replayed."""
        seen = min(self.T, -(-t // self.grain) * self.grain)
        if self.graphs is None:
            return self.step(seen)
        key, step = (self.shape, seen), partial(self.step, seen)
        if key not in self.graphs:
            self.graphs[key] = None
            return step()
        if self.graphs[key] is None:
            self.graphs[key] = capture(step, self.pool)
        self.graphs[key]()

    def step(self, seen: int) -> None:
        """Every row's last token through the model's own modules, and the next one drawn. How far it has come
        is in tensors only; seen: of how many answer tokens there is, at most, something to attend to."""
        model, (P, G), L = self.crm.model.model.language_model, self.shape, self.L
        self.bias.index_fill_(4, L + self.t, 0.0)
        x = model.embed_tokens(self.token)                                                      # (n, D)
        position = repeat(self.position + self.t, "p -> three (p g) 1", three=3, g=G)
        cos, sin = (c[:, 0] for c in model.rotary_emb(x, position))                             # (n, d)
        for layer, (keys, values, own_keys, own_values) in zip(model.layers, self.layers):
            attention, h, d = layer.self_attn, layer.input_layernorm(x), keys.shape[-1]
            q, key = apply_rotary_pos_emb(rearrange(attention.q_proj(h), "n (h d) -> n h d", d=d),
                                          rearrange(attention.k_proj(h), "n (k d) -> n k d", d=d), cos, sin)
            value = rearrange(attention.v_proj(h), "n (k d) -> n k d", d=d)
            for own, new in ((own_keys, key), (own_values, value)):
                own.index_copy_(3, self.t, rearrange(new, "(p g) k d -> p k g 1 d", p=P))
            q = rearrange(q * attention.scaling, "(p g) (k r) d -> p k g r d", p=P, k=keys.shape[1])
            scores = torch.cat([(q.flatten(2, 3) @ keys.mT).unflatten(2, (G, -1)),
                                q @ own_keys[..., :seen, :].mT], -1).add_(self.bias[..., :L + seen])
            weights = scores.softmax(-1, dtype=torch.float32).to(x.dtype)
            out = (weights[..., :L].flatten(2, 3) @ values).unflatten(2, (G, -1))
            out += weights[..., L:] @ own_values[..., :seen, :]
            x = x + attention.o_proj(rearrange(out, "p k g r d -> (p g) (k r d)"))
            x = x + layer.mlp(layer.post_attention_layernorm(x))
        self.t += 1
        self._write(model.norm(x))

    def _write(self, hidden) -> None:
        """Draw token t of every row in the batch; write it down unless the row has ended. hidden (n, D)."""
        at = self.rows, self.t
        token, logp = draw(self.crm.logits(hidden, self.temperature), self.uniform[at], self.temperature)
        ended = self.done[self.rows]
        self.tokens[at] = torch.where(ended, self.tokens[at], token)
        self.logp[at] = torch.where(ended, 0.0, logp)
        self.lengths[self.rows] += ~ended
        self.done[self.rows] = ended | torch.isin(token, self.crm.end)
        self.token.copy_(token)
