"""The Clinical Reasoning Module: a Qwen2.5-VL that reads an image and a question and writes
<think>…</think><answer>…</answer>.

    crm = load_crm("demo/crm", device="cpu", dtype=torch.float32)
    prompt = crm.encode(image, text)                        # ids, pixels, positions, frames
    group, = crm.sample([prompt], G=8, max_new_tokens=128)  # G answers to one prompt, with their log-probs
    logp = crm.logp(group, rows=range(8))                   # the same numbers, differentiable

Any Qwen2.5-VL checkpoint loads (folder or hub name), LoRA-wrapped or not. The two ideas that make it fast:
  sampling   image and prompt are encoded once; their keys and values are stored once and attended to by
             all G rows
  scoring    [prompt | answer 1 | … | answer G] is one sequence under a tree mask: an answer's token sees
             the prompt and its own answer's earlier tokens, and its position goes on from the prompt's
What is scored is what was sampled: softmax(logits / T) over the vocabulary without the four vision tokens,
nothing else; a checkpoint's own generation_config (Qwen's has a temperature of 1e-6 and a repetition penalty)
is never used.

Shapes: P prompts, G answers each, N = P*G rows laid out (p g), L prompt tokens, T answer tokens,
V vocabulary, D hidden, k key heads, r query heads per key head, d head size.
"""
import copy
import re
from collections.abc import Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from einops import rearrange, repeat
from PIL import Image
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoTokenizer, DynamicCache, Qwen2_5_VLForConditionalGeneration
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import apply_rotary_pos_emb
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from data import MAX_PIXELS, MIN_PIXELS, Frame, model_size

# the chat format the checkpoints were trained on, around the image and the user's text
CHAT = ("<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<|vision_start|>",
        "<|vision_end|>", "<|im_end|>\n<|im_start|>assistant\n")
END = ("<|im_end|>", "<|endoftext|>")                                   # either one ends an answer
BANNED = ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>")   # in sampler and scorer
LORA_TARGETS = r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"
LOGIT_BUDGET = 2 ** 26                                                  # float32 logits alive at once: 256 MB


@dataclass
class Prompt:
    """One image and one text, encoded. Never truncated."""
    ids: torch.Tensor               # (L,) int64
    pixel_values: torch.Tensor      # (patches, features): an image has no batch axis in Qwen2.5-VL
    grid_thw: torch.Tensor          # (1, 3) patches in time, height, width
    positions: torch.Tensor         # (3, L) M-RoPE positions in time, height, width
    frame: Frame                    # the image's size in both frames
    image_at: int                   # index of the first image token in ids


@dataclass
class Group:
    """G answers to one prompt. Tokens include the ending token, if there is one, and nothing after it."""
    prompt: Prompt
    tokens: torch.Tensor            # (G, T) int64, padded
    lengths: torch.Tensor           # (G,) int64
    logp: torch.Tensor              # (G, T) float32, zero past each length
    finished: torch.Tensor          # (G,) bool: ended by itself
    texts: list[str]


def load_crm(path: str | Path, device="cpu", dtype=torch.float32, lora_rank: int = 0,
             lora_alpha: float | None = None, reference: bool = False, freeze_vision: bool = False,
             checkpointing: bool = False, resize: str = "aspect", min_pixels: int = MIN_PIXELS,
             max_pixels: int = MAX_PIXELS) -> "CRM":
    """A CRM from a folder or a hub name.

    lora_rank > 0 trains LoRA matrices (arXiv 2106.09685) on the language model's linear layers and nothing
    else; the reference policy is then the model with the adapter off. Otherwise `reference` keeps a frozen
    copy for it. freeze_vision leaves the vision tower and its merger as they are. resize, min_pixels,
    max_pixels: data.model_size.
    ValueError in one line when the checkpoint is not there or is not a Qwen2.5-VL."""
    if str(path).startswith((".", "/", "~")) or str(path).count("/") > 1 or Path(path).exists():
        if not (Path(path) / "config.json").is_file():      # not a hub name: say so before asking the hub
            raise ValueError(f"--crm {path}: no folder with a config.json there")
    try:
        config = AutoConfig.from_pretrained(path)
        if config.model_type != "qwen2_5_vl":
            raise ValueError(f"--crm {path}: its config.json says {config.model_type!r}, not 'qwen2_5_vl'")
        model = Qwen2_5_VLForConditionalGeneration.from_pretrained(path, dtype=dtype,
                                                                   attn_implementation="sdpa")
        tokenizer, processor = (AutoTokenizer.from_pretrained(path),
                                Qwen2VLImageProcessorPil.from_pretrained(path))
    except OSError as error:
        raise ValueError(f"--crm {path}: cannot be loaded ({str(error).splitlines()[0]})") from None
    return CRM(model.to(device), tokenizer, processor, lora_rank, lora_alpha, reference, freeze_vision,
               checkpointing, resize, min_pixels, max_pixels)


class CRM:
    """Model, tokenizer and image processor of one Qwen2.5-VL, and what a policy must do:
    encode, sample, score, save."""

    def __init__(self, model, tokenizer, image_processor, lora_rank=0, lora_alpha=None, reference=False,
                 freeze_vision=False, checkpointing=False, resize="aspect", min_pixels=MIN_PIXELS,
                 max_pixels=MAX_PIXELS):
        self.model, self.tokenizer, self.image_processor = model, tokenizer, image_processor
        self.resize, self.min_pixels = resize, min_pixels
        self.max_pixels = min(max_pixels, image_processor.size["longest_edge"])     # what the checkpoint was made for
        model_size((56, 56), resize, min_pixels, max_pixels)                # a wrong --resize is said now
        self.freeze_vision, self.checkpointing = freeze_vision or lora_rank > 0, checkpointing
        self.frozen = copy.deepcopy(model).eval().requires_grad_(False) \
            if reference and not lora_rank else None
        self.lora = None
        if lora_rank:
            from peft import LoraConfig, get_peft_model
            self.lora = get_peft_model(model, LoraConfig(r=lora_rank, lora_alpha=lora_alpha or 2 * lora_rank,
                                                         target_modules=LORA_TARGETS),
                                       autocast_adapter_dtype=True)
        if self.freeze_vision:
            model.model.visual.requires_grad_(False)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        to_id = tokenizer.convert_tokens_to_ids
        self.image_id, self.end_ids, banned = to_id("<|image_pad|>"), to_id(list(END)), to_id(list(BANNED))
        if None in (self.image_id, *self.end_ids, *banned):
            raise ValueError(f"{tokenizer.name_or_path}: the tokenizer lacks one of "
                             f"{', '.join(END + BANNED)}")
        device, V = self.device, model.config.text_config.vocab_size
        self.end = torch.tensor(self.end_ids, device=device)
        self.allowed = torch.ones(V, dtype=torch.bool, device=device)
        self.allowed[banned] = False

    @property
    def device(self) -> torch.device:
        return self.model.lm_head.weight.device

    def trainable(self, pattern: str = "") -> dict[str, torch.nn.Parameter]:
        """The parameters that train, by name: those not frozen whose name has a match."""
        try:
            matches = re.compile(pattern).search
        except re.error as error:
            raise ValueError(f"--trainable {pattern}: not a regular expression ({error})") from None
        for name, p in self.model.named_parameters():
            if p.requires_grad and not matches(name):
                p.requires_grad_(False)
        chosen = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        if not chosen:
            raise ValueError(f"--trainable {pattern}: no parameter has such a name")
        return chosen

    # ------------------------------------------------------------ encode

    def encode(self, image: Image.Image, prompt_text: str) -> Prompt:
        """image: RGB in the image frame, resized here, once, to the model frame.
        prompt_text: what the user says; text that looks like a special token stays text."""
        size = model_size(image.size, self.resize, self.min_pixels, self.max_pixels)
        pixels = self.image_processor(images=image.resize(size, Image.Resampling.BICUBIC), do_resize=False,
                                      return_tensors="pt")
        grid = pixels["image_grid_thw"].to(self.device)
        count = int(grid.prod()) // self.image_processor.merge_size ** 2
        before, between, after = (self.tokenizer(text).input_ids for text in CHAT)
        words = self.tokenizer(prompt_text, split_special_tokens=True).input_ids
        ids = torch.tensor(before + [self.image_id] * count + between + words + after, device=self.device)
        positions, _ = self.model.model.get_rope_index(ids[None], (ids[None] == self.image_id).int(), grid)
        return Prompt(ids, pixels["pixel_values"].to(self.device), grid, positions[:, 0],
                      Frame(image.size, size), len(before))

    def group(self, prompt: Prompt, texts: Sequence[str]) -> Group:
        """Given answers as a group (each ended),
        for supervised training and for scoring what others wrote."""
        rows = [self.tokenizer(text, split_special_tokens=True).input_ids + self.end_ids[:1]
                for text in texts]
        tokens = pad_sequence([torch.tensor(row, device=self.device) for row in rows], batch_first=True,
                              padding_value=self.end_ids[-1])
        lengths = torch.tensor([len(row) for row in rows], device=self.device)
        return Group(prompt, tokens, lengths, torch.zeros(tokens.shape, device=self.device), lengths > 0,
                     list(texts))

    def _embed(self, prompts: list[Prompt], tokens: list[torch.Tensor]) -> list[torch.Tensor]:
        """Input embeddings of [prompt | tokens], one (L + n, D) a prompt. Only a prompt's own image span
        takes image features, so an image token that somehow got into an answer is a word like any other."""
        with torch.no_grad() if self.freeze_vision else nullcontext():
            features = self.model.model.get_image_features(
                torch.cat([p.pixel_values for p in prompts]),
                torch.cat([p.grid_thw for p in prompts])).pooler_output
        rows, words = [], self.model.get_input_embeddings()
        for prompt, more, image in zip(prompts, tokens, features):
            x = words(torch.cat([prompt.ids, more]))
            a, b = prompt.image_at, prompt.image_at + len(image)
            rows.append(torch.cat([x[:a], image.to(x.dtype), x[b:]]))
        return rows

    # ------------------------------------------------------------ sample

    @torch.no_grad()
    def sample(self, prompts: Sequence[Prompt], G: int, max_new_tokens: int = 512, temperature: float = 1.0,
               seed: int | Sequence[tuple[int, ...]] = 0) -> list[Group]:
        """G answers to each prompt, drawn from softmax(logits / temperature);
        temperature 0 takes the likeliest token.

        seed: one number, or one tuple of numbers a prompt. Row g of a prompt draws from its own stream, so an
        answer depends neither on the other rows nor on the batch it was sampled in."""
        self.model.eval()
        P, T, device = len(prompts), max_new_tokens, self.device
        seeds = [(seed, i) for i in range(P)] if isinstance(seed, int) else seed
        uniform = np.stack([np.random.default_rng([*s, g]).random(T) for s in seeds for g in range(G)])
        uniform = torch.from_numpy(uniform).to(device)                          # (N, T) float64
        logits, position, cache = self._prefill(prompts, G, T)
        logits = repeat(logits, "p v -> (p g) v", g=G)
        tokens = torch.full((P * G, T), self.end_ids[-1], device=device)
        logp = torch.zeros(P * G, T, device=device)
        lengths = torch.zeros(P * G, dtype=torch.long, device=device)
        done = lengths > 0
        for t in range(T):
            token, token_logp = self._draw(logits, uniform[:, t], temperature)
            tokens[:, t] = torch.where(done, tokens[:, t], token)
            logp[:, t] = torch.where(done, 0.0, token_logp)
            lengths += ~done
            done = done | torch.isin(token, self.end)
            if t + 1 == T or done.all():
                break
            logits = self._decode(token, repeat(position + t, "p -> (p g)", g=G), cache, t)
        groups = []
        for prompt, *rows in zip(prompts, *(rearrange(x, "(p g) ... -> p g ...", g=G)
                                            for x in (tokens, lengths, logp, done))):
            toks, lens, lps, ended = rows
            width = int(lens.max())
            texts = [self.tokenizer.decode(row[:n], skip_special_tokens=True) for row, n in zip(toks, lens)]
            groups.append(Group(prompt, toks[:, :width], lens, lps[:, :width], ended, texts))
        return groups

    def _draw(self, logits, uniform, temperature):
        """One token a row by inverting the distribution function, and its log-probability.
        logits (N, V), uniform (N,)."""
        logp = self._log_probs(logits, temperature)
        if temperature == 0:
            token = logp.argmax(-1)
        else:
            cdf = logp.exp().cumsum(-1, dtype=torch.float64)
            # never of probability 0
            token = torch.searchsorted(cdf, (uniform * cdf[:, -1])[:, None], right=True)[:, 0]
        return token, logp.gather(1, token[:, None])[:, 0]

    def _log_probs(self, logits, temperature):
        """log softmax(logits / T) in float32 without the banned tokens. (n, V) -> (n, V)."""
        logits = logits.float() / (temperature or 1.0)
        return logits.masked_fill(~self.allowed, torch.finfo(torch.float32).min).log_softmax(-1)

    def _prefill(self, prompts, G, T):
        """Each prompt once through the model
        -> logits (P, V) of the first answer token, its position (P,), the cache.

        cache: for each layer, prompt keys and values (P, k, L, d), stored once a prompt, and empty ones of
        the answers (P, k, G, T, d); a bias (P, 1, 1, L) hides the padding of shorter prompts."""
        model, stacks, last = self.model.model.language_model, [], []
        for prompt in prompts:
            kv = DynamicCache(config=self.model.config.text_config)
            x, = self._embed([prompt], [prompt.ids[:0]])
            hidden = model(inputs_embeds=x[None], position_ids=prompt.positions[:, None], past_key_values=kv,
                           use_cache=True).last_hidden_state
            last.append(hidden[0, -1])
            stacks.append([(layer.keys[0], layer.values[0]) for layer in kv.layers])
        lengths = torch.tensor([len(p.ids) for p in prompts], device=self.device)
        L, cache = int(lengths.max()), []
        for layer in zip(*stacks):
            keys, values = (torch.stack([torch.nn.functional.pad(x, (0, 0, 0, L - x.shape[1])) for x in side])
                            for side in zip(*layer))
            own = (len(prompts), keys.shape[1], G, T, keys.shape[-1])
            cache.append((keys, values, keys.new_zeros(own), keys.new_zeros(own)))
        hide = torch.arange(L, device=self.device) >= lengths[:, None]
        bias = torch.zeros(hide.shape, device=self.device, dtype=last[0].dtype).masked_fill(hide, -torch.inf)
        position = torch.stack([p.positions.max() + 1 for p in prompts])
        return self.model.lm_head(torch.stack(last)), position, (cache, bias[:, None, None])

    def _decode(self, token, position, cache, t):
        """One token a row through the model's own modules.
        token, position (N,); t answer tokens came before -> (N, V)."""
        layers, bias = cache
        model = self.model.model.language_model
        x = model.embed_tokens(token)                                                           # (N, D)
        cos, sin = (c[:, 0] for c in model.rotary_emb(x, position.expand(3, -1)[..., None]))    # (N, d)
        for layer, (prompt_k, prompt_v, own_k, own_v) in zip(model.layers, layers):
            P, k, G, _, d = own_k.shape
            attention, h = layer.self_attn, layer.input_layernorm(x)
            q, key = apply_rotary_pos_emb(rearrange(attention.q_proj(h), "n (h d) -> n h d", d=d),
                                          rearrange(attention.k_proj(h), "n (k d) -> n k d", d=d), cos, sin)
            own_k[:, :, :, t] = rearrange(key, "(p g) k d -> p k g d", p=P)
            own_v[:, :, :, t] = rearrange(attention.v_proj(h), "(p g) (k d) -> p k g d", p=P, d=d)
            q = rearrange(q, "(p g) (k r) d -> p k g r d", p=P, k=k) * attention.scaling
            to_prompt = rearrange(q, "p k g r d -> p k (g r) d") @ prompt_k.mT + bias   # prompt keys, once
            to_own = q @ own_k[:, :, :, :t + 1].mT                                      # (P, k, G, r, t+1)
            scores = torch.cat([rearrange(to_prompt, "p k (g r) l -> p k g r l", g=G), to_own], -1)
            a, b = scores.softmax(-1, dtype=torch.float32).to(q.dtype).split([prompt_k.shape[2], t + 1], -1)
            out = rearrange(rearrange(a, "p k g r l -> p k (g r) l") @ prompt_v,
                            "p k (g r) d -> p k g r d", g=G)
            out = out + b @ own_v[:, :, :, :t + 1]
            x = x + attention.o_proj(rearrange(out, "p k g r d -> (p g) (k r d)"))
            x = x + layer.mlp(layer.post_attention_layernorm(x))
        return self.model.lm_head(model.norm(x))

    # ------------------------------------------------------------ score

    def logp(self, group: Group, rows: Sequence[int], temperature: float = 1.0) -> torch.Tensor:
        """Log-probabilities of the tokens of some rows of a group, (g, T),
        zero past each length; differentiable."""
        return self.score([(group, rows)], temperature)[0][0]

    def packs(self, group: Group, budget: int) -> list[list[int]]:
        """The rows of a group, cut so that [prompt | rows] has at most `budget` tokens
        (or one row, if that is more)."""
        packs, used = [], None
        for row, length in enumerate(group.lengths.tolist()):
            if used is None or used + length > budget:
                packs, used = packs + [[]], len(group.prompt.ids)
            packs[-1].append(row)
            used += length
        return packs

    def score(self, packs: Sequence[tuple[Group, Sequence[int]]], temperature: float = 1.0):
        """[(logp (g, T), entropy (g, T))] of a batch of packs,
        each some rows of one group in one sequence of S tokens.

        Entropy is that of the whole distribution, sum of -p log p, without gradient. Padding on the right, up
        to the longest pack, is seen by nothing."""
        # transformers checkpoints in train mode only
        self.model.train(self.checkpointing and torch.is_grad_enabled())
        device, streams, segments, positions, sources, keeps = self.device, [], [], [], [], []
        for group, rows in packs:
            rows, L = torch.as_tensor(list(rows), device=device), len(group.prompt.ids)
            keep = torch.arange(group.tokens.shape[1], device=device) < group.lengths[rows][:, None]  # (g, T)
            row, j = keep.nonzero(as_tuple=True)                      # of each answer token, in packing order
            streams.append(group.tokens[rows][keep])
            segments.append(torch.cat([row.new_zeros(L), row + 1]))   # 0 the prompt, 1.. the answers
            after = (group.prompt.positions.max() + 1 + j).expand(3, -1)
            positions.append(torch.cat([group.prompt.positions, after], 1))
            # who predicts it
            sources.append(torch.where(j == 0, L - 1, L - 1 + torch.arange(len(j), device=device)))
            keeps.append(keep)
        x = pad_sequence(self._embed([group.prompt for group, _ in packs], streams),
                         batch_first=True)                                      # (B, S, D)
        segment = pad_sequence(segments, batch_first=True, padding_value=-1)
        position = rearrange(pad_sequence([p.T for p in positions], batch_first=True),
                             "b s three -> three b s")
        # the tree, (B, 1, S, S)
        seen = (segment[:, None] == 0) | (segment[:, None] == segment[:, :, None])
        seen = (seen & torch.ones(seen.shape[1:], dtype=torch.bool, device=device).tril())[:, None]
        hidden = self.model.model.language_model(
            inputs_embeds=x, position_ids=position, use_cache=False,
            attention_mask=dict.fromkeys(self.model.config.text_config.layer_types, seen)).last_hidden_state
        hidden = torch.cat([h[source] for h, source in zip(hidden, sources)])   # answers only
        logp, entropy = self._token_logp(hidden, torch.cat(streams), temperature)
        sizes = [len(s) for s in streams]
        return [tuple(torch.zeros(keep.shape, device=device).masked_scatter(keep, values) for values in pair)
                for keep, *pair in zip(keeps, logp.split(sizes), entropy.split(sizes))]

    def _token_logp(self, hidden, targets, temperature):
        """Log-probability of each target and entropy of its distribution. hidden (n, D), targets (n,)
        -> (n,), (n,). In chunks, recomputed in backward: n x V float32 logits never exist at once."""
        def chunk(h, target):
            logp = self._log_probs(self.model.lm_head(h), temperature)
            with torch.no_grad():
                entropy = -(logp.exp() * logp).sum(-1)
            return logp.gather(1, target[:, None])[:, 0], entropy

        size = max(1, LOGIT_BUDGET // len(self.allowed))
        parts = [checkpoint(chunk, h, target, use_reentrant=False) if torch.is_grad_enabled() else
                 chunk(h, target) for h, target in zip(hidden.split(size), targets.split(size))]
        logp, entropy = (torch.cat(side) for side in zip(*parts))
        return logp, entropy

    # ------------------------------------------------------------ the reference policy, and saving

    @contextmanager
    def reference(self):
        """Inside, the model is the frozen reference policy:
        the adapter off (LoRA), or the copy made when loading."""
        if self.lora is None and self.frozen is None:
            raise ValueError("no reference policy was kept: load_crm(..., reference=True)")
        policy = self.model
        with torch.no_grad(), self.lora.disable_adapter() if self.lora else nullcontext():
            try:
                self.model = self.frozen or policy
                yield
            finally:
                self.model = policy

    def save(self, path: str | Path) -> None:
        """A folder that from_pretrained and any server loads as it is;
        LoRA matrices are merged into the weights."""
        model = copy.deepcopy(self.lora).merge_and_unload() if self.lora else self.model
        model.generation_config.do_sample = True        # save_pretrained refuses a temperature without it
        for part in (model, self.tokenizer, self.image_processor):
            part.save_pretrained(path)
