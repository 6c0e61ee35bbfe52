"""Sampling: G completions of each prompt, one token per step, with the log-probability of every
token.

    group, = sample(crm, [prompt], G=8, max_new_tokens=128, temperature=1.0, seed=0)

Each prompt and its image go through the model once. Its keys and values are stored once, and all G
rows attend to them in one product. A decoding step is written out over the model's own modules, on
tensors that stay in place: on a GPU it is recorded as a CUDA graph and replayed, without Python
between its several hundred kernels. A row that has ended is computed along with the others until
all have ended, and nothing of that is kept.

What is sampled is softmax(logits / temperature) and nothing else. A checkpoint's own
generation_config (Qwen's has a temperature of 1e-6) is never used.

Shapes: P prompts, G completions each, N = P * G rows laid out (p g), L longest prompt, T completion
tokens that the caches have room for, V vocabulary, D hidden, k key heads, r query heads per key
head, d head size.

This is the last file of the reading path. infer.py and evaluate.py use what it returns.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from einops import rearrange, repeat
from torch.nn.functional import pad
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import apply_rotary_pos_emb

from crm import CRM, Group, Prompt

ROOM = {"cpu": 16, "cuda": 128}  # the caches of the completions grow by so many tokens
CHECK_EVERY = {"cpu": 1, "cuda": 8}  # steps between checks that all has ended; a GPU waits for one
TRAINING, EVALUATION = 0, 1  # second number of a seed, so that the two never draw the same
HOST_CACHE_BYTES = 4 * 2**30  # keys and values of the prompts that are sampled at once on a CPU


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
    """Returns G completions of each prompt. Temperature 0 takes the most likely token.

    seed    one number, or one tuple of numbers per prompt. Row g of a prompt draws from a random
            stream of its own, so a completion depends neither on the other rows nor on how many
            prompts are sampled at once
    graphs  on a GPU, replay the decoding step as a CUDA graph
    FloatingPointError where logits are not finite."""
    crm.model.eval()
    seeds = seed
    if isinstance(seed, int):
        seeds = [(seed, i) for i in range(len(prompts))]
    at_once = prompts_at_once(crm, prompts, G, max_new_tokens)
    groups = []
    for start in range(0, len(prompts), at_once):
        chunk = prompts[start : start + at_once]
        uniform = random_streams(seeds[start : start + at_once], G, max_new_tokens)
        groups += sample_chunk(crm, chunk, G, uniform, temperature, graphs)
    return groups


def sample_chunk(
    crm: CRM,
    prompts: Sequence[Prompt],
    G: int,
    uniform: np.ndarray,
    temperature: float,
    graphs: bool,
) -> list[Group]:
    """Returns the groups of some prompts, whose caches fit into memory together."""
    batch = Batch(crm, prompts, G, uniform, temperature, graphs)
    batch.begin()
    max_new_tokens = uniform.shape[1]
    for t in range(1, max_new_tokens):
        is_time_to_look = t % CHECK_EVERY[crm.device.type] == 0
        if is_time_to_look and batch.done.all():
            break
        batch.advance(t)
    return batch.groups()


def default_temperature(temperature: float | None, completions: int) -> float:
    """Returns --temperature, or its default: 0 (the most likely token) for one completion, else
    1."""
    if temperature is not None:
        return temperature
    return 0.0 if completions == 1 else 1.0


def random_streams(seeds: Sequence[tuple[int, ...]], G: int, max_new_tokens: int) -> np.ndarray:
    """Returns numbers in [0, 1) from which each row draws its tokens, (N, max_new_tokens)."""
    rows = []
    for seed in seeds:
        for g in range(G):
            rows.append(np.random.default_rng([*seed, g]).random(max_new_tokens))
    return np.stack(rows)


def prompts_at_once(crm: CRM, prompts: Sequence[Prompt], G: int, max_new_tokens: int) -> int:
    """Returns how many prompts' caches fit into half of a GPU's free memory, or into
    HOST_CACHE_BYTES on a CPU, if every completion has its full length."""
    config = crm.model.config.text_config
    head_size = crm.model.model.language_model.layers[0].self_attn.head_dim
    width = config.num_key_value_heads * head_size
    bytes_per_token = 2 * config.num_hidden_layers * width * crm.model.dtype.itemsize
    longest = max((len(prompt.ids) for prompt in prompts), default=0)
    room = HOST_CACHE_BYTES
    if crm.device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(crm.device)
        # what PyTorch has taken from the driver and does not use is free as well
        free += torch.cuda.memory_reserved(crm.device) - torch.cuda.memory_allocated(crm.device)
        room = free // 2
    return max(1, int(room // (bytes_per_token * (longest + G * max_new_tokens))))


# ---------------------------------------------------------------- drawing a token


def draw(
    logits: torch.Tensor, uniform: torch.Tensor, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns one token per row, by inverting the distribution function, and its log-probability.

    logits (n, V) float32, already divided by the temperature; uniform (n,) float64 in [0, 1)
    -> tokens (n,), logp (n,). Temperature 0 takes the most likely token. A token of probability 0
    is never drawn. Logits that are not finite give a log-probability of nan."""
    logp = logits.log_softmax(-1)
    if temperature == 0:
        token = logp.argmax(-1)
    else:
        cdf = logp.exp().cumsum(-1, dtype=torch.float64)
        target = (uniform * cdf[:, -1])[:, None]
        token = torch.searchsorted(cdf, target, right=True)[:, 0]
        token = token.clamp(max=logits.shape[1] - 1)
    return token, logp.gather(1, token[:, None])[:, 0]


# ---------------------------------------------------------------- attention to cached keys


def scores_float32(q: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """q k^T in float32: (…, a, d), (…, b, d) -> (…, a, b).

    Qwen2.5's key biases make attention scores so large that bfloat16 rounds them by whole units.
    The fused kernels that scoring.py uses keep float32 as well."""
    if q.is_cuda and q.dtype != torch.float32:
        left = q.flatten(0, -3)
        right = keys.flatten(0, -3).mT
        product = torch.bmm(left, right, out_dtype=torch.float32)
        return product.unflatten(0, q.shape[:-2])
    return q.float() @ keys.float().mT


def partial_attention(
    q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, bias: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention to some of the keys, and the logsumexp of its scores, by which `joint_attention`
    joins it with attention to the rest.

    q (…, a, d), keys and values (…, s, d), bias broadcastable to (…, a, s)
    -> (…, a, d), (…, a, 1), both float32"""
    scores = torch.add(bias, scores_float32(q, keys), alpha=scale)
    weights = scores.softmax(-1)
    # A weight is exp(score - logsumexp), so the largest score less the log of the largest weight is
    # the logsumexp. torch.logsumexp would compute all those exponentials a second time.
    lse = scores.amax(-1, keepdim=True) - weights.amax(-1, keepdim=True).log()
    return (weights.to(q.dtype) @ values).float(), lse


class LayerCache:
    """One layer's keys and values: of the prompts (k, P, L, d), of the completions (k, N, T, d)."""

    def __init__(self, prompt_keys: torch.Tensor, prompt_values: torch.Tensor, N: int, room: int):
        k, _, _, d = prompt_keys.shape
        self.prompt_keys = prompt_keys
        self.prompt_values = prompt_values
        self.own_keys = prompt_keys.new_zeros(k, N, room, d)
        self.own_values = prompt_keys.new_zeros(k, N, room, d)

    def grow(self, room: int) -> None:
        self.own_keys = pad(self.own_keys, (0, 0, 0, room))
        self.own_values = pad(self.own_values, (0, 0, 0, room))


# ---------------------------------------------------------------- the rows of some prompts


class Batch:
    """N = P * G rows while their completions are written.

    uniform: (N, max_new_tokens) float64 in [0, 1), from which each row draws its tokens."""

    def __init__(
        self,
        crm: CRM,
        prompts: Sequence[Prompt],
        G: int,
        uniform: np.ndarray,
        temperature: float,
        graphs: bool,
    ):
        self.crm = crm
        self.prompts = prompts
        self.G = G
        self.temperature = temperature
        device = crm.device
        N, max_new_tokens = uniform.shape

        # what is written
        self.uniform = torch.from_numpy(uniform).to(device)
        self.tokens = torch.full((N, max_new_tokens), int(crm.end[-1]), device=device)
        self.logp = torch.zeros(N, max_new_tokens, device=device)
        self.lengths = torch.zeros(N, dtype=torch.long, device=device)
        self.done = torch.zeros(N, dtype=torch.bool, device=device)

        # where the rows are
        # completion tokens in the caches: on the device, so that a CUDA graph can count them up
        self.t = torch.zeros(1, dtype=torch.long, device=device)
        self.token = self.tokens[:, 0].clone()  # (N,) the newest of each row
        after_prompt = torch.stack([prompt.positions.max() + 1 for prompt in prompts])
        self.position = repeat(after_prompt, "p -> (p g)", g=G)  # of each row's first token

        # what they attend to: 0 where a key may be seen, -inf where not
        lengths = torch.tensor([len(prompt.ids) for prompt in prompts], device=device)
        L = int(lengths.max())
        is_padding = torch.arange(L, device=device) >= lengths[:, None, None]  # (P, 1, L)
        zeros = torch.zeros(is_padding.shape, device=device)
        self.prompt_bias = zeros.masked_fill(is_padding, -torch.inf)
        self.room = ROOM[device.type]
        self.own_bias = torch.full((self.room,), -torch.inf, device=device)  # (T,)
        self.caches: list[LayerCache] = []

        # the decoding step as a CUDA graph
        self.graphs = graphs and device.type == "cuda"
        self.replay: Callable[[], None] | None = None
        self.has_run = False  # since the caches have their present shape

    def begin(self) -> None:
        """Reads the prompts and draws the first token of every row."""
        hidden, caches = prefill(self.crm, self.prompts)
        N = len(self.token)
        for keys, values in caches:
            self.caches.append(LayerCache(keys, values, N, self.room))
        self.draw_next(repeat(hidden, "p d -> (p g) d", g=self.G))

    def advance(self, t: int) -> None:
        """Writes token t of every row.

        The first step of a shape runs as it is written, which makes libraries ready. With graphs
        the second one is recorded, and replayed from then on."""
        if t > len(self.own_bias):
            # a graph keeps the memory of the old caches: it goes before they are copied
            self.replay = None
            self.has_run = False
            for cache in self.caches:
                cache.grow(self.room)
            self.own_bias = pad(self.own_bias, (0, self.room), value=-torch.inf)
        if self.graphs and self.has_run and self.replay is None:
            self.replay = capture(self.step)
        if self.replay is not None:
            self.replay()
        else:
            self.step()
        self.has_run = True

    def step(self) -> None:
        """The newest token of every row goes through the model, and the next one is drawn.

        All that changes from step to step is in tensors that stay in place, so that a CUDA graph
        can replay it."""
        model = self.crm.model.model.language_model
        self.own_bias.index_fill_(0, self.t, 0.0)  # the newest token is there to be seen
        x = model.embed_tokens(self.token)  # (N, D)
        positions = (self.position + self.t).expand(3, 1, -1)
        cos, sin = model.rotary_emb(x, positions)
        rotation = cos[0], sin[0]  # (N, d) each
        for layer, cache in zip(model.layers, self.caches):
            x = x + self.layer_attention(layer.self_attn, layer.input_layernorm(x), rotation, cache)
            x = x + layer.mlp(layer.post_attention_layernorm(x))
        self.t += 1
        self.draw_next(model.norm(x))

    def layer_attention(
        self,
        module: torch.nn.Module,
        h: torch.Tensor,
        rotation: tuple[torch.Tensor, torch.Tensor],
        cache: LayerCache,
    ) -> torch.Tensor:
        """One layer's attention of the newest token of every row, whose key and value it stores.
        h (N, D) -> (N, D)."""
        d = cache.own_keys.shape[3]
        q = module.q_proj(h).unflatten(-1, (-1, d))  # (N, heads, d)
        key = module.k_proj(h).unflatten(-1, (-1, d))
        value = module.v_proj(h).unflatten(-1, (-1, d))
        q, key = apply_rotary_pos_emb(*self.crm.norm_heads(module, q, key), *rotation)
        cache.own_keys.index_copy_(2, self.t, rearrange(key, "n k d -> k n 1 d"))
        cache.own_values.index_copy_(2, self.t, rearrange(value, "n k d -> k n 1 d"))
        q = rearrange(q, "n (k r) d -> k n r d", k=key.shape[1])
        out = self.joint_attention(q, cache, module.scaling)
        return module.o_proj(rearrange(out, "k n r d -> n (k r d)"))

    def joint_attention(self, q: torch.Tensor, cache: LayerCache, scale: float) -> torch.Tensor:
        """The newest token of every row attends to its prompt, in one product with the prompt's
        other rows, and to its own completion. Their shares of the joint softmax follow from the two
        logsumexps. q (k, N, r, d) -> (k, N, r, d)."""
        by_prompt = rearrange(q, "k (p g) r d -> k p (g r) d", g=self.G)
        prompt, prompt_lse = partial_attention(
            by_prompt, cache.prompt_keys, cache.prompt_values, self.prompt_bias, scale
        )
        prompt = rearrange(prompt, "k p (g r) d -> k (p g) r d", g=self.G)
        prompt_lse = rearrange(prompt_lse, "k p (g r) 1 -> k (p g) r 1", g=self.G)
        own, own_lse = partial_attention(q, cache.own_keys, cache.own_values, self.own_bias, scale)
        share_of_own = torch.sigmoid(own_lse - prompt_lse)
        return prompt.lerp(own, share_of_own).to(q.dtype)

    def draw_next(self, hidden: torch.Tensor) -> None:
        """Draws token t of every row, and writes it down where the row has not ended.
        hidden (N, D)."""
        logits = self.crm.logits(hidden, self.temperature)
        uniform = self.uniform.index_select(1, self.t)[:, 0]
        token, logp = draw(logits, uniform, self.temperature)
        column = self.tokens.index_select(1, self.t)[:, 0]
        token = torch.where(self.done, column, token)  # after its end a row is padded
        logp = torch.where(self.done, 0.0, logp)
        self.tokens.index_copy_(1, self.t, token[:, None])
        self.logp.index_copy_(1, self.t, logp[:, None])
        self.lengths += ~self.done
        self.done |= torch.isin(token, self.crm.end)
        self.token.copy_(token)

    def groups(self) -> list[Group]:
        """Returns what was written, one Group per prompt. FloatingPointError where a
        log-probability is not finite."""
        lengths = rearrange(self.lengths.cpu(), "(p g) -> p g", g=self.G)
        done = rearrange(self.done.cpu(), "(p g) -> p g", g=self.G)
        tokens = rearrange(self.tokens, "(p g) t -> p g t", g=self.G)
        logp = rearrange(self.logp, "(p g) t -> p g t", g=self.G)
        groups = []
        for p, prompt in enumerate(self.prompts):
            longest = int(lengths[p].max())
            group = Group(
                prompt=prompt,
                tokens=tokens[p, :, :longest].clone(),
                lengths=lengths[p],
                logp=logp[p, :, :longest].clone(),
                finished=done[p],
                texts=[],
            )
            check_finite(group, self.crm.tokenizer)
            group.texts = decoded(group, self.crm.tokenizer)
            groups.append(group)
        return groups


def check_finite(group: Group, tokenizer: Any) -> None:
    """FloatingPointError where a log-probability is not finite. It names the question."""
    if not group.logp.isfinite().all():
        question = tokenizer.decode(group.prompt.ids, skip_special_tokens=True)[:200]
        raise FloatingPointError(
            f"logits are not finite, the weights or the image are broken: {question!r}"
        )


def decoded(group: Group, tokenizer: Any) -> list[str]:
    """Returns the texts of a group, without the token that ends each. A special token anywhere else
    stays visible, and costs the format."""
    texts = []
    for row, length, finished in zip(group.tokens, group.lengths, group.finished):
        end = int(length) - int(finished)
        texts.append(tokenizer.decode(row[:end]))
    return texts


def prefill(
    crm: CRM, prompts: Sequence[Prompt]
) -> tuple[torch.Tensor, list[tuple[torch.Tensor, torch.Tensor]]]:
    """Reads each prompt once.

    Returns the hidden state of its last token, (P, D), and the keys and values of every layer,
    (k, P, L, d) each, padded on the right."""
    model = crm.model.model.language_model
    L = max(len(prompt.ids) for prompt in prompts)
    hidden = []
    keys: list[list[torch.Tensor]] = [[] for _ in model.layers]
    values: list[list[torch.Tensor]] = [[] for _ in model.layers]
    for prompt, features in zip(prompts, crm.image_features(prompts)):
        x, positions = crm.embed(prompt, features)
        options = crm.deepstack([prompt], [features], [len(x)])
        where = positions[:, None]
        out = model(inputs_embeds=x[None], position_ids=where, use_cache=True, **options)
        hidden.append(out.last_hidden_state[0, -1])
        padding = (0, 0, 0, L - len(x))
        for i, cache in enumerate(out.past_key_values.layers):
            keys[i].append(pad(cache.keys[0], padding))  # (k, L, d)
            values[i].append(pad(cache.values[0], padding))
    caches = []
    for layer_keys, layer_values in zip(keys, values):
        caches.append((torch.stack(layer_keys, 1), torch.stack(layer_values, 1)))
    return torch.stack(hidden), caches


def capture(step: Callable[[], None]) -> Callable[[], None]:
    """Returns the step as a CUDA graph. Replaying it runs the same kernels on the same memory.
    Recording runs nothing."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay
