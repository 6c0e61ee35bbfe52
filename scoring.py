"""Scoring: log-probabilities of given completions, differentiable, one prompt's group in one
sequence.

    logp(crm, group, rows=range(8))                    # (g, T)
    for pack in make_packs(groups, 8192):              # to bound the memory
        for logp, entropy in score(crm, pack): ...

A packed sequence is [prompt | completion 1 | … | completion g], one group after the other, so a
prompt and its image are computed once for all of its completions. Who attends to whom:

    a prompt's token       to its prompt so far                      causal
    a completion's token   to its prompt and its completion so far   causal_lower_right(T, L + T)

The completions of one prompt are one call of the attention kernel. Their keys are [prompt | own
tokens] with no padding in between, so a causal mask that is aligned at the lower right is all it
takes. Everything else in a transformer acts on each token by itself. Only the positions that
predict a completion's token go through the vocabulary projection and log_softmax, in float32, in
chunks. Nothing of shape (N, T, V) ever exists.

With --dtype float32 a GPU has no fused kernel for grouped heads, so the scores of a layer,
(g, h, T, L + T) float32, are in memory at once. Reckoned for a 7B with 28 heads, 16 completions of
2,048 tokens and a prompt of 1,000, that is 16 * 28 * 2048 * 3048 * 4 bytes = 11 GB. bfloat16, the
default there, needs none of it.

Read next: sampling.py, which draws completions with the same log-probabilities.

Shapes: g completions, T tokens in the longest, n tokens in all of them, L prompt tokens, S tokens
in the packed sequence, h query heads, k key heads, d head size, V vocabulary, D hidden.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

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
LOGITS_AT_ONCE = {"cpu": 2**21, "cuda": 2**26}  # on a CPU, what its cache holds


@dataclass
class Pack:
    """Some rows of some groups, which are scored in one sequence."""

    groups: list[Group] = field(default_factory=list)
    rows: list[list[int]] = field(default_factory=list)  # of each group
    tokens: int = 0  # of prompts and completions together

    def add(self, group: Group, row: int) -> None:
        """Adds a completion, and its prompt where that is new here."""
        if not self.groups or self.groups[-1] is not group:
            self.groups.append(group)
            self.rows.append([])
            self.tokens += len(group.prompt.ids)
        self.rows[-1].append(row)
        self.tokens += int(group.lengths[row])


# ---------------------------------------------------------------- attention in a packed sequence


@dataclass
class Span:
    """Where one prompt and its completions lie in a packed sequence."""

    prompt: slice
    tokens: torch.Tensor | None  # (g, T) index of each token; past a length, of the last one
    written: torch.Tensor | None  # (n,) where in tokens.flatten() the real tokens are


def lay_out(
    prompt_lengths: Sequence[int],
    completion_lengths: Sequence[Sequence[int]],
    device: str | torch.device,
) -> list[Span]:
    """Returns the Span of each prompt. completion_lengths: those of the prompt's completions."""
    spans = []
    end = 0
    for L, lengths_of_one in zip(prompt_lengths, completion_lengths):
        prompt = slice(end, end + L)
        end += L
        if len(lengths_of_one) == 0:
            spans.append(Span(prompt, None, None))
            continue
        lengths = torch.as_tensor(lengths_of_one)
        starts = end + lengths.cumsum(0) - lengths  # (g,)
        j = torch.arange(int(lengths.max()))  # (T,)
        tokens = starts[:, None] + torch.minimum(j, lengths[:, None] - 1)  # (g, T)
        written = (j < lengths[:, None]).flatten().nonzero()[:, 0]
        spans.append(Span(prompt, tokens.to(device), written.to(device)))
        end += int(lengths.sum())
    return spans


def packed_attention(
    module: torch.nn.Module,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    attention_mask: Any,
    scaling: float | None = None,
    spans: Sequence[Span] | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """What transformers calls in every layer: q (1, h, S, d), k and v (1, k, S, d), already rotated
    -> (1, S, h, d). spans are those of packed_forward; without them, attention is ordinary."""
    if spans is None:
        return sdpa_attention_forward(module, q, k, v, attention_mask, scaling=scaling, **options)
    out = []
    for span in spans:
        prompt_q = q[:, :, span.prompt]
        prompt_k = k[:, :, span.prompt]
        prompt_v = v[:, :, span.prompt]
        prompt = sdpa(prompt_q, prompt_k, prompt_v, is_causal=True, scale=scaling, enable_gqa=True)
        out.append(prompt[0].transpose(0, 1))  # (L, h, d)
        if span.tokens is None:
            continue
        g, T = span.tokens.shape
        L = prompt_k.shape[2]
        own_q = pick_rows(q, span.tokens)  # (g, h, T, d)
        own_k = pick_rows(k, span.tokens)  # (g, k, T, d)
        own_v = pick_rows(v, span.tokens)
        keys = torch.cat([prompt_k.expand(g, -1, -1, -1), own_k], dim=2)  # (g, k, L + T, d)
        values = torch.cat([prompt_v.expand(g, -1, -1, -1), own_v], dim=2)
        mask = causal_lower_right(T, L + T)
        own = sdpa(own_q, keys, values, attn_mask=mask, scale=scaling, enable_gqa=True)
        by_token = own.transpose(1, 2).flatten(0, 1)  # (g * T, h, d)
        out.append(by_token.index_select(0, span.written))
    return torch.cat(out)[None], None


def pick_rows(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """x (1, heads, S, d), index (g, T) -> (g, heads, T, d).

    The backward pass of index_select is twice as fast as that of x[index]."""
    picked = x[0].transpose(0, 1).index_select(0, index.flatten())  # (g * T, heads, d)
    return picked.unflatten(0, index.shape).transpose(1, 2)


AttentionInterface.register("packed", packed_attention)
AttentionMaskInterface.register("packed", sdpa_mask)


def packed_forward(
    crm: CRM, prompts: Sequence[Prompt], completions: Sequence[Sequence[torch.Tensor]]
) -> torch.Tensor:
    """[prompt | its completions], prompt after prompt, through the language model
    -> hidden states (S, D)."""
    model = crm.model.model.language_model
    model.set_attn_implementation("packed")  # every layer calls packed_attention above
    embedded = []
    positions = []
    features = crm.image_features(prompts)
    for prompt, of_image, own in zip(prompts, features, completions):
        x, where = crm.embed(prompt, of_image, own)
        embedded.append(x)
        positions.append(where)
    x = torch.cat(embedded)
    prompt_lengths = [len(prompt.ids) for prompt in prompts]
    completion_lengths = [[len(tokens) for tokens in own] for own in completions]
    spans = lay_out(prompt_lengths, completion_lengths, x.device)
    output = model(
        inputs_embeds=x[None],
        spans=spans,  # handed down to packed_attention
        position_ids=torch.cat(positions, dim=1)[:, None],
        use_cache=False,
        **crm.deepstack(prompts, features, [len(part) for part in embedded]),
    )
    return output.last_hidden_state[0]


# ---------------------------------------------------------------- log-probabilities


def score(
    crm: CRM, pack: Pack, temperature: float = 1.0, entropy_gradient: bool = False
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Returns (logp (g, T), entropy (g, T)) of each group in a pack; zero past each length.

    Log-probabilities are differentiable. The entropy is that of the next token's distribution, the
    sum of -p log p over the vocabulary; it has a gradient only where that is asked for."""
    return crm.run(_score, crm, pack, temperature, entropy_gradient)


def _score(
    crm: CRM, pack: Pack, temperature: float, entropy_gradient: bool
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    # transformers recomputes activations in train mode only
    crm.model.train(crm.checkpointing and torch.is_grad_enabled())
    completions = []
    predictors = []
    masks = []
    start = 0
    for group, rows in zip(pack.groups, pack.rows):
        L = len(group.prompt.ids)
        lengths = group.lengths[rows]
        n = int(lengths.sum())
        own = [group.tokens[row, :length] for row, length in zip(rows, lengths.tolist())]
        completions.append(own)
        mask = torch.arange(group.tokens.shape[1]) < lengths[:, None]  # (g, T)
        masks.append(mask.to(crm.device))
        predictors.append((start + predictors_of(L, mask)).to(crm.device))
        start += L + n
    prompts = [group.prompt for group in pack.groups]
    hidden = packed_forward(crm, prompts, completions)
    targets = torch.cat([tokens for own in completions for tokens in own])
    logp, entropy = token_logp(
        crm, hidden[torch.cat(predictors)], targets, temperature, entropy_gradient
    )
    sizes = [len(places) for places in predictors]
    scored = []
    for mask, own_logp, own_entropy in zip(masks, logp.split(sizes), entropy.split(sizes)):
        zeros = torch.zeros(mask.shape, device=crm.device)
        scored.append(
            (zeros.masked_scatter(mask, own_logp), zeros.masked_scatter(mask, own_entropy))
        )
    return scored


def predictors_of(L: int, mask: torch.Tensor) -> torch.Tensor:
    """Returns where in [prompt | completion 1 | …] the token before each completion token is, (n,).

    mask (g, T) is true for each written token. The token before predicts the next one:

        index       0 …  L-1    L     L+1    L+2    L+3
        token       prompt      a1    a2     b1     b2        completions a and b
        predictor               L-1   L      L-1    L+2

    A completion's first token is predicted by the prompt's last one."""
    place_in_completion = mask.nonzero()[:, 1]
    index = torch.arange(len(place_in_completion))  # of each token, after the prompt
    one_before = L + index - 1
    return torch.where(place_in_completion == 0, L - 1, one_before)


def token_logp(
    crm: CRM,
    hidden: torch.Tensor,
    targets: torch.Tensor,
    temperature: float,
    entropy_gradient: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """hidden (n, D), targets (n,) -> log-probability of each target and entropy of its
    distribution, (n,) each.

    Computed in chunks. Where n * V float32 logits are too many to keep for the backward pass, each
    chunk is computed again there."""

    def chunk(h: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logp = crm.logits(h, temperature).log_softmax(-1)  # (c, V) float32
        with torch.set_grad_enabled(entropy_gradient and torch.is_grad_enabled()):
            entropy = -torch.einsum("nv,nv->n", logp.exp(), logp)
        return logp.gather(1, target[:, None])[:, 0], entropy

    V = crm.model.config.text_config.vocab_size
    size = max(1, LOGITS_AT_ONCE[crm.device.type] // V)
    recompute = torch.is_grad_enabled() and len(hidden) * V > LOGITS_KEPT
    logp = []
    entropy = []
    for h, target in zip(hidden.split(size), targets.split(size)):
        if recompute:
            part = checkpoint(chunk, h, target, use_reentrant=False)
        else:
            part = chunk(h, target)
        logp.append(part[0])
        entropy.append(part[1])
    return torch.cat(logp), torch.cat(entropy)


def logp(crm: CRM, group: Group, rows: Sequence[int], temperature: float = 1.0) -> torch.Tensor:
    """Returns log-probabilities of the tokens of some rows of a group, (g, T): see `score`."""
    return score(crm, Pack([group], [list(rows)]), temperature)[0][0]


@torch.no_grad()
def all_logp(
    crm: CRM, groups: Sequence[Group], most_tokens: int, temperature: float
) -> list[torch.Tensor]:
    """Returns log-probabilities of all completions of each group, (G, T), without gradient."""
    found = [torch.zeros_like(group.logp) for group in groups]
    number = {id(group): i for i, group in enumerate(groups)}  # == would compare tensors
    for pack in make_packs(groups, most_tokens):
        for group, rows, (logp, _) in zip(pack.groups, pack.rows, score(crm, pack, temperature)):
            found[number[id(group)]][rows] = logp
    return found


# ---------------------------------------------------------------- groups and packs


def group_of(crm: CRM, prompt: Prompt, texts: Sequence[str]) -> Group:
    """Returns given completions as a group, each of them ended: for supervised training, and to
    score what somebody else wrote."""
    rows = []
    for text in texts:
        ids = crm.tokenizer(text, split_special_tokens=True).input_ids
        rows.append(torch.tensor([*ids, int(crm.end[0])], device=crm.device))
    tokens = pad_sequence(rows, batch_first=True, padding_value=int(crm.end[-1]))
    lengths = torch.tensor([len(row) for row in rows])
    return Group(
        prompt=prompt,
        tokens=tokens,
        lengths=lengths,
        logp=torch.zeros(tokens.shape, device=crm.device),
        finished=torch.ones(len(rows), dtype=torch.bool),
        texts=list(texts),
    )


def make_packs(groups: Sequence[Group], most_tokens: int) -> list[Pack]:
    """Returns all rows of some groups in packs of at most `most_tokens` tokens, or of one
    completion where a prompt with it is longer.

    A group that does not fit into what is left of a pack begins a new one. A group that fits into
    none is cut, and its prompt repeated. A completion is never cut."""
    packs: list[Pack] = []
    for group in groups:
        size = len(group.prompt.ids) + int(group.lengths.sum())
        if not packs or packs[-1].tokens + size > most_tokens:
            packs.append(Pack())
        for row, length in enumerate(group.lengths.tolist()):
            pack = packs[-1]
            is_full = pack.tokens + length > most_tokens
            if is_full and pack.tokens > 0:
                pack = Pack()
                packs.append(pack)
            pack.add(group, row)
    return packs
