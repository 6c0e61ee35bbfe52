"""Attention in a tree: many answers to one prompt, computed together.

Scoring runs over a stream: packs laid end to end, each [prompt | answer 1 | … | answer g]. An answer's token
sees its prompt and the earlier tokens of its own answer; a prompt sees itself; packs do not see each other.
Three ways to compute the same numbers, picked by name:

    dense   one S x S mask over the whole stream: slow, obvious, the oracle in the tests
    rows    prompts attend causally, then every answer to [its prompt | itself]: little more than is needed
    flex    FlexAttention with a block mask, compiled: for CUDA, not yet measured

sampling.py keeps the same tree as a cache: a prompt's keys and values once, its answers' beside them.

Shapes: S tokens in the stream, B packs, L longest prompt, N answers, T longest answer, h query heads, k key
heads, r = h / k, d head size.
"""
from collections.abc import Sequence
from functools import lru_cache

import torch
from einops import rearrange, repeat
from torch.nn.functional import scaled_dot_product_attention as sdpa
from torch.nn.utils.rnn import pad_sequence
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

KINDS = ("rows", "dense", "flex")
BATCHES = 4             # of answers of similar length, so that little is padding


def take(x, where):
    """x[where] along the first axis, of which backward is twice as fast."""
    return x.index_select(0, where.flatten()).unflatten(0, where.shape)


class Tree:
    """Who sees whom in a stream.

    packs: for each pack the length of its prompt and of its answers. like: a tensor of the stream's device
    and type. r: query heads a key head. keep: collect the prompts' keys and values of every layer,
    (B, L, k, d) each, in self.kept."""

    def __init__(self, packs: Sequence[tuple[int, Sequence[int]]], kind: str, like, r: int, keep=False):
        prompts, answers, owner, at, device = [], [], [], 0, like.device
        for b, (length, others) in enumerate(packs):
            prompts.append(torch.arange(at, at := at + length))
            for n in others:
                answers.append(torch.arange(at, at := at + n))
                owner.append(b)
        self.size, self.kind, self.kept = at, kind, [] if keep else None
        if kind == "rows" or keep:
            self._rows(prompts, answers, owner, like, r)
        if kind != "rows":
            self.pack, self.segment = torch.zeros(2, at, dtype=torch.long)  # segment 0 is the prompt
            for b, where in [*enumerate(prompts), *zip(owner, answers)]:
                self.pack[where] = b
            for i, where in enumerate(answers):
                self.segment[where] = i + 1
            self.pack, self.segment = self.pack.to(device), self.segment.to(device)
            i = torch.arange(at, device=device)
            self.mask = self._see(i[:, None], i) if kind == "dense" else _block_mask(self._see, at, device)

    def _see(self, query, key):
        same = (self.segment[key] == 0) | (self.segment[key] == self.segment[query])
        return same & (self.pack[key] == self.pack[query]) & (key <= query)

    def _rows(self, prompts, answers, owner, like, r):
        """Where in the stream each prompt (B, L) is and, in a few batches of similar length, each answer
        (n, T), padded with 0; the bias (n, 1, r T, L + T) that hides all but its prompt and itself."""
        device, L, width = like.device, max(map(len, prompts)), torch.tensor([len(p) for p in prompts])
        owner = torch.tensor(owner)
        self.prompts, self.answers = pad_sequence(prompts, True).to(device), []
        place, end = [b * L + torch.arange(len(p)) for b, p in enumerate(prompts)], len(prompts) * L
        order = sorted(range(len(answers)), key=lambda i: len(answers[i]))
        size = -(-len(order) // BATCHES) or 1
        for some in (order[i:i + size] for i in range(0, len(order), size)):
            where = pad_sequence([answers[i] for i in some], True)
            T = where.shape[1]
            i, j = torch.arange(T)[:, None], torch.arange(L + T)
            seen = (j < width[owner[some], None, None]) | (j >= L) & (j - L <= i)           # (n, T, L + T)
            # CUDA's kernels would copy, each time, a bias whose rows are no multiple of 8
            bias = like.new_zeros(len(some), 1, r * T, -(-(L + T) // 8) * 8)[..., :L + T]
            bias.masked_fill_(~seen.repeat(1, r, 1)[:, None].to(device), -torch.inf)
            self.answers.append((where.to(device), owner[some].to(device), bias))
            place += [end + n * T + torch.arange(len(answers[i])) for n, i in enumerate(some)]
            end += where.numel()
        self.back = torch.empty(self.size, dtype=torch.long)    # stream -> (B L + n T + …): undoes the gather
        self.back[torch.cat(prompts + [answers[i] for i in order])] = torch.cat(place)
        self.back = self.back.to(device)

    def attend(self, q, k, v, scale: float):
        """q (1, h, S, d), k and v (1, k, S, d), rotated -> (1, S, h, d)."""
        if self.kept is not None:
            self.kept.append(tuple(x[0].transpose(0, 1)[self.prompts] for x in (k, v)))
        if self.kind == "flex":                                 # whose own scale is the same, and a constant
            return _flex()(q, k, v, block_mask=self.mask, enable_gqa=True).transpose(1, 2)
        r = q.shape[1] // k.shape[1]
        if self.kind == "dense":
            k, v = (x.repeat_interleave(r, 1) for x in (k, v))
            return sdpa(q, k, v, attn_mask=self.mask, scale=scale).transpose(1, 2)
        q, k, v = (x[0].transpose(0, 1) for x in (q, k, v))                                 # (S, heads, d)
        q_prompt, k_prompt, v_prompt = (take(x, self.prompts) for x in (q, k, v))           # (B, L, heads, d)
        heads_first = "b l k d -> b k l d"
        out = sdpa(rearrange(q_prompt, heads_first), repeat(k_prompt, "b l k d -> b (k r) l d", r=r),
                   repeat(v_prompt, "b l k d -> b (k r) l d", r=r), is_causal=True, scale=scale)
        out = [rearrange(out, "b h l d -> (b l) h d")]          # padding sits on the right: causal is enough
        for where, owner, bias in self.answers:
            keys, values = (rearrange(torch.cat([take(p, owner), take(x, where)], 1), heads_first)
                            for p, x in ((k_prompt, k), (v_prompt, v)))                     # (n, k, L + T, d)
            own = sdpa(rearrange(take(q, where), "n t (k r) d -> n k (r t) d", r=r), keys, values,
                       attn_mask=bias, scale=scale)                             # key heads not copied r times
            out.append(rearrange(own, "n k (r t) d -> (n t) (k r) d", r=r))
        return take(torch.cat(out), self.back)[None]


@lru_cache(1)
def _flex():
    from torch.nn.attention.flex_attention import flex_attention
    return torch.compile(flex_attention, dynamic=True)


def _block_mask(see, size, device):
    from torch.nn.attention.flex_attention import create_block_mask
    return create_block_mask(lambda _, __, query, key: see(query, key), None, None, size, size, device=device)


def tree_attention(module, query, key, value, attention_mask, scaling=None, **options):
    """What transformers calls in every attention layer; attention_mask is a Tree, or what sdpa takes."""
    if isinstance(attention_mask, Tree):
        return attention_mask.attend(query, key, value, scaling), None
    return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **options)


AttentionInterface.register("tree", tree_attention)
AttentionMaskInterface.register("tree", sdpa_mask)
