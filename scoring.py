"""Scoring: the log-probabilities of given completions, differentiable, one prompt's group in one sequence.

    logp(crm, group, rows=range(8))             # (g, T)
    for pack in make_packs(groups, 8192):       # some rows of some groups at a time, to bound the memory
        for logp, entropy in score(crm, pack): ...

A packed sequence is [prompt | completion 1 | … | completion g], group after group, so a prompt and its image
are computed once for all of its completions. Who attends to whom:

    a prompt's token       to its prompt so far                      causal
    a completion's token   to its prompt and its completion so far   causal_lower_right(T, L + T)

The completions of one prompt are one call of the attention kernel: their keys are [prompt | own tokens] without
padding in between, so the causal mask, aligned at the lower right, is all it takes. Everything else in a
transformer acts on each token by itself. Only the positions that predict a completion's token go through the
vocabulary projection and log_softmax, in float32, in chunks. Nothing of shape (N, T, V) ever exists.

Read next: train_grpo.py.

Shapes: g completions, T tokens in the longest, n tokens in all of them, L prompt tokens, S tokens in the packed
sequence, h query heads, k key heads, d head size, V vocabulary, D hidden.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention as sdpa
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from crm import CRM, Group, Prompt

LOGITS_KEPT = 2**26  # float32 logits kept for the backward pass: 256 MB
LOGITS_CHUNK = {"cpu": 2**21, "cuda": 2**26}  # computed at once: on a CPU, what its cache holds

Pack = list[tuple[Group, list[int]]]  # some rows of some groups


# ---------------------------------------------------------------- attention in a packed sequence


@dataclass
class Span:
    """Where one prompt and its completions lie in a packed sequence."""

    prompt: slice
    tokens: (
        torch.Tensor | None
    )  # (g, T) index of each completion token; past a length: of the last one
    real: (
        torch.Tensor | None
    )  # (n,) index of the real tokens in tokens.flatten(), in sequence order


def lay_out(
    prompt_lengths: Sequence[int], completion_lengths: Sequence[Sequence[int]], device
) -> list[Span]:
    spans, end = [], 0
    for L, lengths in zip(prompt_lengths, completion_lengths):
        prompt, end = slice(end, end + L), end + L
        if not len(lengths):
            spans.append(Span(prompt, None, None))
            continue
        lengths = torch.as_tensor(lengths)
        starts = end + lengths.cumsum(0) - lengths
        j = torch.arange(int(lengths.max()))  # (T,)
        tokens = starts[:, None] + torch.minimum(j, lengths[:, None] - 1)  # (g, T)
        real = (j < lengths[:, None]).flatten().nonzero()[:, 0]
        spans.append(Span(prompt, tokens.to(device), real.to(device)))
        end += int(lengths.sum())
    return spans


def packed_attention(module, q, k, v, attention_mask, scaling=None, **options):
    """What transformers calls in every layer: q (1, h, S, d), k, v (1, k, S, d), already rotated
    -> (1, S, h, d). attention_mask is our list of Spans; anything else is ordinary attention."""
    if not isinstance(attention_mask, list):
        return sdpa_attention_forward(module, q, k, v, attention_mask, scaling=scaling, **options)
    out = []
    for span in attention_mask:
        q_prompt, k_prompt, v_prompt = (x[:, :, span.prompt] for x in (q, k, v))
        prompt = sdpa(q_prompt, k_prompt, v_prompt, is_causal=True, scale=scaling, enable_gqa=True)
        out.append(prompt[0].transpose(0, 1))  # (L, h, d)
        if span.tokens is not None:
            own_q, own_k, own_v = (pick_rows(x, span.tokens) for x in (q, k, v))  # (g, heads, T, d)
            (g, T), L = span.tokens.shape, k_prompt.shape[2]
            keys, values = (
                torch.cat([x.expand(g, -1, -1, -1), own], dim=2)  # (g, k, L + T, d)
                for x, own in ((k_prompt, own_k), (v_prompt, own_v))
            )
            own = sdpa(
                own_q,
                keys,
                values,
                attn_mask=causal_lower_right(T, L + T),
                scale=scaling,
                enable_gqa=True,
            )  # (g, h, T, d)
            out.append(own.transpose(1, 2).flatten(0, 1).index_select(0, span.real))
    return torch.cat(out)[None], None


def pick_rows(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """(1, heads, S, d), index (g, T) -> (g, heads, T, d); index_select's backward is twice as fast as x[index]'s."""
    return (
        x[0]
        .transpose(0, 1)
        .index_select(0, index.flatten())
        .unflatten(0, index.shape)
        .transpose(1, 2)
    )


AttentionInterface.register("packed", packed_attention)
AttentionMaskInterface.register("packed", sdpa_mask)


def packed_forward(
    crm: CRM, prompts: Sequence[Prompt], completions: Sequence[Sequence[torch.Tensor]]
):
    """[prompt | its completions], prompt after prompt, through the language model -> hidden states (S, D)."""
    model = crm.model.model.language_model
    model.set_attn_implementation("packed")  # every attention layer calls packed_attention above
    parts = [crm.embed(*each) for each in zip(prompts, crm.image_features(prompts), completions)]
    x, positions = torch.cat([x for x, _ in parts]), torch.cat([p for _, p in parts], dim=1)
    spans = lay_out(
        [len(p.ids) for p in prompts], [[len(c) for c in own] for own in completions], x.device
    )
    mask = dict.fromkeys(model.config.layer_types, spans)
    return model(
        inputs_embeds=x[None], attention_mask=mask, position_ids=positions[:, None], use_cache=False
    ).last_hidden_state[0]


# ---------------------------------------------------------------- log-probabilities


def score(crm: CRM, pack: Pack, temperature: float = 1.0, entropy_gradient: bool = False):
    """[(logp (g, T), entropy (g, T))] of a pack's completions, zero past each length; differentiable.
    entropy: that of the whole distribution, sum of -p log p; without gradient unless asked for."""
    return crm.run(_score, crm, pack, temperature, entropy_gradient)


def _score(crm, pack, temperature, entropy_gradient):
    crm.model.train(
        crm.checkpointing and torch.is_grad_enabled()
    )  # transformers checkpoints in train mode only
    completions, predictors, masks, start = [], [], [], 0
    for group, rows in pack:
        lengths, L = group.lengths[list(rows)], len(group.prompt.ids)
        completions.append([group.tokens[row, :n] for row, n in zip(rows, lengths.tolist())])
        mask = torch.arange(group.tokens.shape[1]) < lengths[:, None]  # (g, T)
        j, n = mask.nonzero()[:, 1], int(lengths.sum())  # each token's place in its completion
        # the token before predicts the next; a completion's first is predicted by the prompt's last
        before = start + L - 1 + torch.where(j == 0, 0, torch.arange(n))
        predictors.append(before.to(crm.device))
        masks.append(mask.to(crm.device))
        start += L + n
    hidden = packed_forward(crm, [group.prompt for group, _ in pack], completions)
    targets = torch.cat([tokens for own in completions for tokens in own])
    logp, entropy = token_logp(
        crm, hidden[torch.cat(predictors)], targets, temperature, entropy_gradient
    )
    sizes = [len(x) for x in predictors]
    return [
        tuple(torch.zeros(mask.shape, device=crm.device).masked_scatter(mask, x) for x in pair)
        for mask, *pair in zip(masks, logp.split(sizes), entropy.split(sizes))
    ]


def token_logp(crm: CRM, hidden, targets, temperature: float, entropy_gradient: bool = False):
    """hidden (n, D), targets (n,) -> log-probability of each target and entropy of its distribution, (n,) each.
    In chunks, which are recomputed in the backward pass where n x V float32 logits are too many to keep."""

    def chunk(h, target):
        logp = crm.logits(h, temperature).log_softmax(-1)  # (c, V) float32
        with torch.set_grad_enabled(entropy_gradient and torch.is_grad_enabled()):
            entropy = -torch.einsum("nv,nv->n", logp.exp(), logp)
        return logp.gather(1, target[:, None])[:, 0], entropy

    V = crm.model.config.text_config.vocab_size
    size = max(1, LOGITS_CHUNK[crm.device.type] // V)
    recompute = torch.is_grad_enabled() and len(hidden) * V > LOGITS_KEPT
    parts = [
        checkpoint(chunk, *part, use_reentrant=False) if recompute else chunk(*part)
        for part in zip(hidden.split(size), targets.split(size))
    ]
    logp, entropy = zip(*parts)
    return torch.cat(logp), torch.cat(entropy)


def logp(crm: CRM, group: Group, rows: Sequence[int], temperature: float = 1.0) -> torch.Tensor:
    """Log-probabilities of the tokens of some rows of a group, (g, T): see `score`."""
    return score(crm, [(group, list(rows))], temperature)[0][0]


@torch.no_grad()
def all_logp(
    crm: CRM, groups: Sequence[Group], pack_tokens: int, temperature: float
) -> list[torch.Tensor]:
    """Log-probabilities of all completions of some groups, (G, T) each, without gradient."""
    out = {id(group): torch.zeros_like(group.logp) for group in groups}
    for pack in make_packs(groups, pack_tokens):
        for (group, rows), (logp, _) in zip(pack, score(crm, pack, temperature)):
            out[id(group)][rows] = logp
    return list(out.values())


# ---------------------------------------------------------------- groups and packs


def group_of(crm: CRM, prompt: Prompt, texts: Sequence[str]) -> Group:
    """Given completions as a group, each of them ended: for supervised training, and to score others' texts."""
    rows = [
        torch.tensor(
            crm.tokenizer(text, split_special_tokens=True).input_ids + [int(crm.end[0])],
            device=crm.device,
        )
        for text in texts
    ]
    tokens = pad_sequence(rows, batch_first=True, padding_value=int(crm.end[-1]))
    lengths = torch.tensor([len(row) for row in rows])
    return Group(
        prompt,
        tokens,
        lengths,
        torch.zeros(tokens.shape, device=crm.device),
        lengths > 0,
        list(texts),
    )


def make_packs(groups: Sequence[Group], most_tokens: int) -> list[Pack]:
    """All rows of some groups, in packs of at most `most_tokens` tokens. A group that does not fit into what is left
    begins a new pack; one that fits into none is cut, and its prompt repeated. A completion is never cut."""
    packs, used = [], most_tokens
    for group in groups:
        prompt, lengths = len(group.prompt.ids), group.lengths.tolist()
        begin = used + prompt + sum(lengths) > most_tokens
        for row, length in enumerate(lengths):
            if begin or used + length > most_tokens:
                packs.append([])
                used, begin = 0, False
            if not packs[-1] or packs[-1][-1][0] is not group:
                packs[-1].append((group, []))
                used += prompt
            packs[-1][-1][1].append(row)
            used += length
    return packs
