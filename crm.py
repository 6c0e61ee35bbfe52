"""The Clinical Reasoning Module: a Qwen2.5-VL that reads an image and a question and writes
<think>…</think><answer>…</answer>.

    crm = load_crm("demo/crm", device="cpu", dtype=torch.float32)
    prompt = crm.encode(image, text)        # token ids, pixels, positions, the image's two frames
    with crm.reference(): ...               # inside, the weights are those of the reference model
    crm.save("runs/mine/step_000100")       # a folder that from_pretrained loads

Any Qwen2.5-VL checkpoint loads, from a folder or by its hub name. What trains: all weights, all but the vision
tower, LoRA matrices, or what a regular expression names. The reference model is frozen: a copy of the start, or
the same weights with the LoRA matrices switched off.

Read next: sampling.py draws completions from a CRM, scoring.py computes their log-probabilities.

Shapes: L prompt tokens, G completions per prompt, T completion tokens, S tokens in a sequence, V vocabulary,
D hidden.
"""

import copy
from collections.abc import Callable, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image

from data import MAX_PIXELS, MIN_PIXELS, PROMPTS, Frame, answers_of, load_prompt, model_size
from runtime.cli import matcher
from runtime.pretrained import on_device, read_pretrained, remembered_frame, write_pretrained

# the chat format that the checkpoints were trained on, around the image and the user's text
CHAT = (
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<|vision_start|>",
    "<|vision_end|>",
    "<|im_end|>\n<|im_start|>assistant\n",
)
END = ("<|im_end|>", "<|endoftext|>")  # either one ends a completion
# never sampled, never scored: an image token in a completion would crash the next forward pass
BANNED = ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>")
LORA_TARGETS = r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"


@dataclass
class Prompt:
    """One image and one text, encoded. Never truncated."""

    ids: torch.Tensor  # (L,) int64
    pixel_values: torch.Tensor  # (patches, features): an image has no batch axis in Qwen2.5-VL
    grid_thw: torch.Tensor  # (1, 3) patches in time, height, width
    positions: torch.Tensor  # (3, L) M-RoPE positions in time, height, width
    frame: Frame  # the image's size in both frames
    image_start: int  # index of the first image token in ids
    features: torch.Tensor | None = None  # (image tokens, D), kept when the vision tower is frozen


@dataclass
class Group:
    """G completions of one prompt. A completion includes the token that ends it, if any, and nothing after."""

    prompt: Prompt
    tokens: torch.Tensor  # (G, T) int64, padded
    lengths: torch.Tensor  # (G,) int64, on the CPU
    logp: torch.Tensor  # (G, T) float32, as sampled; zero past each length
    finished: torch.Tensor  # (G,) bool, on the CPU: ended by itself
    texts: list[str]


def load_crm(path: str | Path, device="cpu", dtype=torch.float32, **options) -> "CRM":
    """A CRM from a folder or a hub name; options are those of the class, and where they are None what the checkpoint
    remembers. ValueError, one line, where there is no Qwen2.5-VL."""
    load_prompt(
        options.get("prompt") or "reasoning"
    )  # a wrong --prompt is an error now, not after minutes
    options |= {
        key: value for key, value in remembered_frame(path).items() if options.get(key) is None
    }
    return CRM(*read_pretrained(path, dtype, device), **options)


class CRM:
    """Model, tokenizer and image processor of one Qwen2.5-VL.

    lora_rank      above 0: train LoRA matrices (arXiv 2106.09685) on the language model's linear layers only
    reference      keep a frozen copy as the reference model (LoRA needs none: it switches the matrices off)
    freeze_vision  do not train the vision tower and its merger
    checkpointing  recompute activations in the backward pass
    offload        keep the reference model's copy in host memory between its uses
    resize, min_pixels, max_pixels   how images become the model frame, see data.model_size; None: what the
                   checkpoint was trained with, else "aspect" and the usual limits
    prompt         see data.load_prompt; None: what the checkpoint was trained with, else the reasoning prompt"""

    def __init__(
        self,
        model,
        tokenizer,
        image_processor,
        lora_rank: int = 0,
        lora_alpha: float | None = None,
        reference: bool = False,
        freeze_vision: bool = False,
        checkpointing: bool = False,
        resize: str | None = None,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        prompt: str | None = None,
        offload: bool = False,
    ):
        self.model, self.tokenizer, self.image_processor = model, tokenizer, image_processor
        self.template = load_prompt(prompt or "reasoning")
        self.answers = answers_of(self.template)  # how its answers are read, rewarded and imitated
        self.resize, self.min_pixels = resize or "aspect", min_pixels or MIN_PIXELS
        # unless told otherwise, no larger than what the checkpoint was made for
        self.max_pixels = max_pixels or min(MAX_PIXELS, image_processor.size["longest_edge"])
        model_size(
            (56, 56), self.resize, self.min_pixels, self.max_pixels
        )  # a wrong --resize is an error now
        self.freeze_vision, self.checkpointing = freeze_vision or lora_rank > 0, checkpointing

        self.ref_model = self.lora = None
        if reference and not lora_rank:
            self.ref_model = copy.deepcopy(model).eval().requires_grad_(False)
        self.offloaded = self.ref_model.cpu() if offload and self.ref_model else None
        if lora_rank:
            from peft import LoraConfig, get_peft_model

            settings = LoraConfig(
                r=lora_rank, lora_alpha=lora_alpha or 2 * lora_rank, target_modules=LORA_TARGETS
            )
            # in the model's type: the optimizer keeps the float32 copy
            self.lora = get_peft_model(model, settings, autocast_adapter_dtype=False)
        if self.freeze_vision:
            model.model.visual.requires_grad_(False)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        self.root, self.ref_root = None, None  # set by runtime.fsdp.shard

        to_id = tokenizer.convert_tokens_to_ids
        self.image_id, end, banned = to_id("<|image_pad|>"), to_id(list(END)), to_id(list(BANNED))
        if None in (self.image_id, *end, *banned):
            raise ValueError(
                f"{tokenizer.name_or_path}: the tokenizer lacks one of {', '.join(END + BANNED)}"
            )
        self.end, self.banned = (torch.tensor(ids, device=self.device) for ids in (end, banned))

    @property
    def device(self) -> torch.device:
        return self.model.lm_head.weight.device

    def trainable(self, pattern: str = "") -> dict[str, torch.nn.Parameter]:
        """The parameters that train, by name. A pattern freezes those whose name has no match of it."""
        matches = matcher("trainable", pattern)
        for name, p in self.model.named_parameters():
            if p.requires_grad and not matches(name):
                p.requires_grad_(False)
        chosen = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        self.freeze_vision = not any(p.requires_grad for p in self.model.model.visual.parameters())
        if not chosen:
            raise ValueError(f"--trainable {pattern}: no parameter has such a name")
        return chosen

    def run(self, function: Callable, *args):
        """function(*args), which uses the weights: through the module whose hooks gather them where they are
        sharded over ranks (runtime.fsdp.shard), else plainly."""
        return function(*args) if self.root is None else self.root(function, *args)

    # ------------------------------------------------------------ from image and text to what the model reads

    def encode(self, image: Image.Image, prompt_text: str) -> Prompt:
        """image: RGB in the image frame; resized here, once, to the model frame. Text that looks like a special
        token stays text."""
        size = model_size(image.size, self.resize, self.min_pixels, self.max_pixels)
        resized = image.resize(size, Image.Resampling.BICUBIC)
        pixels = self.image_processor(images=resized, do_resize=False, return_tensors="pt")
        grid = pixels["image_grid_thw"].to(self.device)
        image_tokens = int(grid.prod()) // self.image_processor.merge_size**2
        before, between, after = (self.tokenizer(text).input_ids for text in CHAT)
        words = self.tokenizer(prompt_text, split_special_tokens=True).input_ids
        ids = torch.tensor(
            before + [self.image_id] * image_tokens + between + words + after, device=self.device
        )
        is_image = (ids[None] == self.image_id).int()
        positions, _ = self.model.model.get_rope_index(ids[None], is_image, grid)
        frame = Frame(image.size, size)
        return Prompt(
            ids, pixels["pixel_values"].to(self.device), grid, positions[:, 0], frame, len(before)
        )

    def image_features(self, prompts: Sequence[Prompt]) -> list[torch.Tensor]:
        """What the vision tower makes of each prompt's image, (image tokens, D). Those of a frozen tower are
        computed once and kept with the prompt: sampler, reference and policy share them."""
        missing = [p for p in prompts if p.features is None] if self.freeze_vision else prompts
        if missing:
            with torch.no_grad() if self.freeze_vision else nullcontext():
                features = self.model.model.get_image_features(
                    torch.cat([p.pixel_values for p in missing]),
                    torch.cat([p.grid_thw for p in missing]),
                ).pooler_output
            if not self.freeze_vision:
                return features
            for prompt, kept in zip(missing, features):
                prompt.features = kept
        return [p.features for p in prompts]

    def embed(
        self, prompt: Prompt, features: torch.Tensor, completions: Sequence[torch.Tensor] = ()
    ):
        """[prompt | completion 1 | … | completion g] -> embeddings (S, D), positions (3, S).

        Every completion's positions continue from the prompt's. Features go into the prompt's own image span."""
        x = self.model.get_input_embeddings()(torch.cat([prompt.ids, *completions]))
        start, end = prompt.image_start, prompt.image_start + len(features)
        x = torch.cat([x[:start], features.to(x.dtype), x[end:]])
        first = prompt.positions.max() + 1
        steps = [torch.arange(len(tokens), device=x.device).expand(3, -1) for tokens in completions]
        return x, torch.cat([prompt.positions, *(first + step for step in steps)], dim=1)

    def logits(self, hidden: torch.Tensor, temperature: float) -> torch.Tensor:
        """hidden (n, D) -> float32 logits / temperature (n, V), without the banned tokens: the one definition of the
        distribution that is sampled and scored."""
        logits = self.model.lm_head(hidden).float()
        if temperature not in (0, 1):
            logits = logits / temperature
        return logits.index_fill_(1, self.banned, torch.finfo(torch.float32).min)

    # ------------------------------------------------------------ the reference model, and saving

    @contextmanager
    def reference(self):
        """Inside, without gradient, the weights are those of the reference model."""
        if self.lora is None and self.ref_model is None:
            raise ValueError("no reference model was kept: load_crm(..., reference=True)")
        policy = self.model, self.root
        switched_off = self.lora.disable_adapter() if self.lora else nullcontext()
        with torch.no_grad(), switched_off, on_device(self.offloaded, self.device):
            try:
                if self.ref_model:
                    self.model, self.root = self.ref_model, self.ref_root
                yield
            finally:
                self.model, self.root = policy

    def save(self, path: str | Path) -> None:
        """A folder that from_pretrained and any server loads as it is. LoRA matrices are merged into its weights,
        and kept beside them, exact, in adapter/."""
        # so that a server's own resizing, and load_crm's, give the frame that this model was trained in
        self.image_processor.size = {
            "shortest_edge": self.min_pixels,
            "longest_edge": self.max_pixels,
        }
        write_pretrained(
            path, self.model, self.tokenizer, self.image_processor, self.lora, self.frame()
        )

    def frame(self) -> dict:
        """What a checkpoint remembers (see remembered_frame); the prompt by its name where it has one."""
        prompt = next(
            (name for name, template in PROMPTS.items() if template == self.template), self.template
        )
        return {
            "resize": self.resize,
            "min_pixels": self.min_pixels,
            "max_pixels": self.max_pixels,
            "prompt": prompt,
        }
