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
import json
import re
from collections.abc import Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from PIL import Image
from safetensors import SafetensorError
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoTokenizer, Qwen2_5_VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from scoring import KINDS, Tree
from data import MAX_PIXELS, MIN_PIXELS, Frame, model_size
from runtime.files import read_text
from runtime.parallel import directly
from sampling import Sampler

# the chat format the checkpoints were trained on, around the image and the user's text
CHAT = ("<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<|vision_start|>",
        "<|vision_end|>", "<|im_end|>\n<|im_start|>assistant\n")
END = ("<|im_end|>", "<|endoftext|>")                                   # either one ends an answer
BANNED = ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>")   # in sampler and scorer
UNLOADABLE = (OSError, ValueError, LookupError, TypeError, AttributeError, RuntimeError, SafetensorError)
LORA_TARGETS = r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"
BANNED_LOGIT = torch.finfo(torch.float32).min
LOGITS_KEPT = 2 ** 26                       # float32 logits kept for backward: 256 MB
LOGITS_CHUNK = {"cpu": 2 ** 21, "cuda": 2 ** 26}        # and made at once: on a CPU, what its cache holds


@dataclass
class Prompt:
    """One image and one text, encoded. Never truncated."""
    ids: torch.Tensor               # (L,) int64
    pixel_values: torch.Tensor      # (patches, features): an image has no batch axis in Qwen2.5-VL
    grid_thw: torch.Tensor          # (1, 3) patches in time, height, width
    positions: torch.Tensor         # (3, L) M-RoPE positions in time, height, width
    frame: Frame                    # the image's size in both frames
    image_at: int                   # index of the first image token in ids
    features: torch.Tensor | None = None    # (image tokens, D), kept when the vision tower is frozen


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
             max_pixels: int = MAX_PIXELS, **tricks) -> "CRM":
    """A CRM from a folder or a hub name.

    lora_rank > 0 trains LoRA matrices (arXiv 2106.09685) on the language model's linear layers and nothing
    else; the reference policy is then the model with the adapter off. Otherwise `reference` keeps a frozen
    copy for it. freeze_vision leaves the vision tower and its merger as they are. resize, min_pixels,
    max_pixels: data.model_size. tricks: those of the class.
    ValueError in one line when the checkpoint is not there or is not a Qwen2.5-VL."""
    if str(path).startswith((".", "/", "~")) or str(path).count("/") > 1 or Path(path).exists():
        if not (Path(path) / "config.json").is_file():      # not a hub name: say so before asking the hub
            raise ValueError(f"--crm {path}: no folder with a config.json there")
    for file in Path(path).glob("*.json"):                                  # a torn file is named
        try:
            json.loads(read_text(file))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"--crm {file}: not JSON ({error})") from None

    def load(kind, **options):
        try:
            return kind.from_pretrained(path, **options)
        except UNLOADABLE as error:
            problem = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
            raise ValueError(f"--crm {path}: cannot be loaded ({problem})") from None

    if (kind := load(AutoConfig).model_type) != "qwen2_5_vl":
        raise ValueError(f"--crm {path}: its config.json says {kind!r}, not 'qwen2_5_vl'")
    model = load(Qwen2_5_VLForConditionalGeneration, dtype=dtype, attn_implementation="sdpa")
    tokenizer, processor = load(AutoTokenizer), load(Qwen2VLImageProcessorPil)
    return CRM(model.to(device), tokenizer, processor, lora_rank, lora_alpha, reference, freeze_vision,
               checkpointing, resize, min_pixels, max_pixels, **tricks)


class CRM:
    """Model, tokenizer and image processor of one Qwen2.5-VL, and what a policy must do:
    encode, sample, score, save.

    Each trick has an off position, the slow and obvious way to the same numbers: attention "dense"
    (attention.py), share_vision, drop_finished and cuda_graphs False. offload: the reference policy's copy
    stays in host memory between its uses."""

    def __init__(self, model, tokenizer, image_processor, lora_rank=0, lora_alpha=None, reference=False,
                 freeze_vision=False, checkpointing=False, resize="aspect", min_pixels=MIN_PIXELS,
                 max_pixels=MAX_PIXELS, attention="rows", share_vision=True, drop_finished=True,
                 offload=False, cuda_graphs=False):
        if attention not in KINDS:
            raise ValueError(f"attention {attention}: one of {', '.join(KINDS)}")
        self.model, self.tokenizer, self.image_processor = model, tokenizer, image_processor
        self.attention, self.share_vision, self.drop_finished = attention, share_vision, drop_finished
        model.model.language_model.set_attn_implementation("tree")
        self.resize, self.min_pixels = resize, min_pixels
        # no larger than what the checkpoint was made for
        self.max_pixels = min(max_pixels, image_processor.size["longest_edge"])
        model_size((56, 56), resize, min_pixels, max_pixels)                # a wrong --resize is said now
        self.freeze_vision, self.checkpointing = freeze_vision or lora_rank > 0, checkpointing
        self.frozen = copy.deepcopy(model).eval().requires_grad_(False) \
            if reference and not lora_rank else None
        self.visiting = []                                  # an offloaded reference's tensors and their home
        if offload and self.frozen:
            self.frozen.cpu()
            self.visiting = [(t, t.data) for t in (*self.frozen.parameters(), *self.frozen.buffers())]
        self.lora, self.engine = None, directly             # parallel.spread puts DDP or FSDP there
        if lora_rank:
            from peft import LoraConfig, get_peft_model
            self.lora = get_peft_model(model, LoraConfig(r=lora_rank, lora_alpha=lora_alpha or 2 * lora_rank,
                                                         target_modules=LORA_TARGETS),
                                       autocast_adapter_dtype=False)    # parallel.Optimizer has the float32
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
        if cuda_graphs and device.type != "cuda":
            raise ValueError(f"--cuda-graphs needs a CUDA device; this is {device.type}")
        self.sampler = Sampler(self, graphs=True) if cuda_graphs else None      # else a fresh one each time
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
        self.freeze_vision = not any(p.requires_grad for p in self.model.model.visual.parameters())
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

    def _features(self, prompts: Sequence[Prompt]) -> list[torch.Tensor]:
        """Image features, (n, D) a prompt. Of a frozen vision tower they are computed once and kept with
        the prompt: sampler, reference and policy share them."""
        missing = [p for p in prompts if p.features is None]
        if not self.freeze_vision or not self.share_vision:
            missing = prompts
        if missing:
            with torch.no_grad() if self.freeze_vision else nullcontext():
                fresh = self.model.model.get_image_features(
                    torch.cat([p.pixel_values for p in missing]),
                    torch.cat([p.grid_thw for p in missing])).pooler_output
            if missing is prompts:
                return fresh
            for prompt, features in zip(missing, fresh):
                prompt.features = features
        return [p.features for p in prompts]

    def _stream(self, prompts: Sequence[Prompt], answers: Sequence[list[torch.Tensor]], keep: bool = False):
        """[prompt | answer 1 | … | answer g] of each prompt, end to end, through the language model
        -> hidden states (S, D), the tree. Only a prompt's own image span takes image features, so an image
        token that somehow got into an answer is a word like any other."""
        words, config = self.model.get_input_embeddings(), self.model.config.text_config
        rows, positions = [], []
        for prompt, own, image in zip(prompts, answers, self._features(prompts)):
            x = words(torch.cat([prompt.ids, *own]))
            a, b = prompt.image_at, prompt.image_at + len(image)
            rows += x[:a], image.to(x.dtype), x[b:]
            after = [torch.arange(len(tokens), device=self.device) for tokens in own]
            positions += [prompt.positions, *((prompt.positions.max() + 1 + j).expand(3, -1) for j in after)]
        tree = Tree([(len(p.ids), [len(tokens) for tokens in own]) for p, own in zip(prompts, answers)],
                    self.attention, rows[0], config.num_attention_heads // config.num_key_value_heads, keep)
        mask = dict.fromkeys(config.layer_types, tree)
        out = self.model.model.language_model(inputs_embeds=torch.cat(rows)[None], attention_mask=mask,
                                              position_ids=torch.cat(positions, 1)[:, None], use_cache=False)
        return out.last_hidden_state[0], tree

    # ------------------------------------------------------------ sample

    @torch.no_grad()
    def sample(self, prompts: Sequence[Prompt], G: int, max_new_tokens: int = 512, temperature: float = 1.0,
               seed: int | Sequence[tuple[int, ...]] = 0) -> list[Group]:
        """G answers to each prompt, drawn from softmax(logits / temperature);
        temperature 0 takes the likeliest token.

        seed: one number, or one tuple of numbers a prompt. Row g of a prompt draws from its own stream, so an
        answer depends neither on the other rows nor on the batch it was sampled in."""
        self.model.eval()
        P, T = len(prompts), max_new_tokens
        seeds = [(seed, i) for i in range(P)] if isinstance(seed, int) else seed
        uniform = np.stack([np.random.default_rng([*s, g]).random(T) for s in seeds for g in range(G)])
        batch = self.sampler or Sampler(self)
        batch.start(*self._prefill(prompts), torch.from_numpy(uniform).to(self.device), temperature)
        look = 1 if self.device.type == "cpu" else 8                            # tokens between host syncs
        for t in range(1, T):
            if t % look == 0:
                if batch.done.all():
                    break
                if self.drop_finished:
                    batch.compact()
            batch.advance(t)
        groups = []
        for prompt, *rows in zip(prompts, *(rearrange(x, "(p g) ... -> p g ...", g=G)
                                            for x in (batch.tokens, batch.lengths, batch.logp, batch.done))):
            toks, lens, lps, ended = (x.clone() for x in rows)      # the sampler's memory is used again
            width = int(lens.max())
            texts = [self.tokenizer.decode(row[:n], skip_special_tokens=True) for row, n in zip(toks, lens)]
            groups.append(Group(prompt, toks[:, :width], lens, lps[:, :width], ended, texts))
        return groups

    def logits(self, hidden, temperature):
        """Logits / T in float32, those of the banned tokens so low that their probability is 0.
        (n, D) -> (n, V)."""
        logits = self.model.lm_head(hidden).float() / (temperature or 1.0)
        return logits.masked_fill(~self.allowed, BANNED_LOGIT)

    def _prefill(self, prompts):
        """Each prompt once through the model -> its last hidden state (P, D); of each layer keys and values
        (P, L, k, d); the prompts' lengths and next positions (P,)."""
        hidden, tree = self._stream(prompts, [[]] * len(prompts), keep=True)
        lengths = torch.tensor([len(p.ids) for p in prompts], device=self.device)
        position = torch.stack([p.positions.max() + 1 for p in prompts])
        return hidden[lengths.cumsum(0) - 1], tree.kept, lengths, position

    # ------------------------------------------------------------ score

    def logp(self, group: Group, rows: Sequence[int], temperature: float = 1.0) -> torch.Tensor:
        """Log-probabilities of the tokens of some rows of a group, (g, T),
        zero past each length; differentiable."""
        return self.score([(group, rows)], temperature)[0][0]

    def packs(self, groups: Sequence[Group], budget: int) -> list[list[tuple[int, list[int]]]]:
        """All rows of some groups as streams of at most `budget` tokens: of each its [(group's index, rows)].
        A group that does not fit into what is left begins a new stream; only one that fits into none is cut,
        and its prompt repeated. A single row is never cut."""
        streams, used = [[]], 0
        for i, group in enumerate(groups):
            lengths, prompt = group.lengths.tolist(), len(group.prompt.ids)
            fresh = used + prompt + sum(lengths) > budget
            for row, length in enumerate(lengths):
                if streams[-1] and (fresh if row == 0 else used + length > budget):
                    streams.append([])
                if row == 0 or not streams[-1]:
                    used = prompt + (used if streams[-1] else 0)
                    streams[-1].append((i, []))
                streams[-1][-1][1].append(row)
                used += length
        return [stream for stream in streams if stream]

    def score(self, packs: Sequence[tuple[Group, Sequence[int]]], temperature: float = 1.0):
        """[(logp (g, T), entropy (g, T))] of some packs, each some rows of one group, in one stream.

        Entropy is that of the whole distribution, sum of -p log p, without gradient."""
        return self.engine(self._score, packs, temperature)

    def _score(self, packs, temperature):
        # transformers checkpoints in train mode only
        self.model.train(self.checkpointing and torch.is_grad_enabled())
        answers, sources, keeps, at = [], [], [], 0
        for group, rows in packs:
            rows, L = torch.as_tensor(list(rows), device=self.device), len(group.prompt.ids)
            lengths = group.lengths[rows]
            keep = torch.arange(group.tokens.shape[1], device=self.device) < lengths[:, None]       # (g, T)
            answers.append([tokens[:n] for tokens, n in zip(group.tokens[rows], lengths.tolist())])
            j = keep.nonzero()[:, 1]                                    # place in its answer, in stream order
            before = at + L - 1 + torch.arange(len(j), device=self.device)
            sources.append(torch.where(j == 0, at + L - 1, before))     # who predicts it
            keeps.append(keep)
            at += L + len(j)
        hidden, _ = self._stream([group.prompt for group, _ in packs], answers)
        logp, entropy = self._token_logp(hidden[torch.cat(sources)], torch.cat(sum(answers, [])), temperature)
        sizes = [len(source) for source in sources]
        return [tuple(torch.zeros(keep.shape, device=self.device).masked_scatter(keep, x) for x in pair)
                for keep, *pair in zip(keeps, logp.split(sizes), entropy.split(sizes))]

    def _token_logp(self, hidden, targets, temperature):
        """Log-probability of each target and entropy of its distribution. hidden (n, D), targets (n,)
        -> (n,), (n,). In chunks; recomputed in backward where n x V float32 logits are too many to keep."""
        def chunk(h, target):
            logits = self.logits(h, temperature)
            total = logits.logsumexp(-1)
            with torch.no_grad():                                   # sum of -p log p, log p = logit - total
                p = (logits - total[:, None]).exp()
                entropy = total - torch.einsum("nv,nv->n", p, logits)
            return logits.gather(1, target[:, None])[:, 0] - total, entropy

        size = max(1, LOGITS_CHUNK[self.device.type] // len(self.allowed))
        again = torch.is_grad_enabled() and hidden.shape[0] * len(self.allowed) > LOGITS_KEPT
        parts = [checkpoint(chunk, h, target, use_reentrant=False) if again else chunk(h, target)
                 for h, target in zip(hidden.split(size), targets.split(size))]
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
                for tensor, home in self.visiting:
                    tensor.data = home.to(self.device)
                self.model = self.frozen or policy
                yield
            finally:
                self.model = policy
                for tensor, home in self.visiting:
                    tensor.data = home

    def save(self, path: str | Path) -> None:
        """A folder that from_pretrained and any server loads as it is;
        LoRA matrices are merged into the weights."""
        model = copy.deepcopy(self.lora).merge_and_unload() if self.lora else self.model
        model.generation_config.do_sample = True        # save_pretrained refuses a temperature without it
        # FSDP's own state_dict() would cut the gathered weights again
        model.save_pretrained(path, state_dict={name: p.detach() for name, p in
                                                model.named_parameters(remove_duplicate=False)})
        for part in (self.tokenizer, self.image_processor):
            part.save_pretrained(path)
