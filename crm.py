"""The Clinical Reasoning Module: a Qwen-VL that reads an image and a question and writes
<think>…</think><answer>…</answer>.

    crm = load_crm("demo/crm", device="cpu", dtype=torch.float32)
    prompt = crm.encode(image, text)                # token ids, pixels, positions, both sizes
    parameters = crm.prepare_training(reference=True)       # what trains, by name
    with crm.reference(): ...                       # inside, the weights are the reference model's
    crm.save("runs/mine/step_000100")               # a folder that from_pretrained loads

Any checkpoint of FAMILIES loads, from a folder or by its hub name. All weights train, or LoRA
matrices on the language model's linear layers, or those whose name a regular expression finds. The
reference model is frozen. It is a copy of the weights that training starts from, or, with LoRA, the
same weights with the matrices switched off.

Read next: scoring.py computes log-probabilities of given completions.

Shapes: L prompt tokens, G completions per prompt, T completion tokens, S tokens in a sequence,
V vocabulary, D hidden.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch.nn.functional import pad

from data import (
    ANSWER_FORMATS,
    COORDINATES,
    MAX_PIXELS,
    MIN_PIXELS,
    PROMPTS,
    BadRow,
    Example,
    Sizes,
    answer_format_of,
    fill_prompt,
    load_prompt,
    model_size,
    to_image,
)
from rewards import box_iou
from runtime.cli import matcher, print0
from runtime.parallel import Ranks
from runtime.pretrained import (
    FAMILIES,
    check_folder,
    on_device,
    read_pretrained,
    read_settings,
    read_side_files,
    settings_file,
    write_pretrained,
)

# the chat format that the checkpoints were trained on, around the image and the user's text; what a
# family's system prompt says stands before it
CHAT = (
    "<|im_start|>user\n<|vision_start|>",
    "<|vision_end|>",
    "<|im_end|>\n<|im_start|>assistant\n",
)
END = ("<|im_end|>", "<|endoftext|>")  # either one ends a completion
# Never sampled, never scored: an image token in a completion would crash the next forward pass.
# CRM.banned has the ids past the tokenizer's last one as well.
BANNED = ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>")
LORA_TARGETS = r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"


@dataclass
class Prompt:
    """One image and one text, encoded. A prompt is never truncated."""

    ids: torch.Tensor  # (L,) int64
    pixel_values: torch.Tensor  # (patches, features): an image has no batch axis in Qwen2.5-VL
    grid_thw: torch.Tensor  # (1, 3) patches in time, height, width
    positions: torch.Tensor  # (3, L) M-RoPE positions in time, height, width
    sizes: Sizes  # of the image, in both frames
    image_start: int  # index of the first image token in ids
    features: torch.Tensor | None = None  # see image_features; kept where the tower is frozen


@dataclass
class Group:
    """G completions of one prompt. A completion includes the token that ends it, if there is one,
    and nothing after that."""

    prompt: Prompt
    tokens: torch.Tensor  # (G, T) int64, padded
    lengths: torch.Tensor  # (G,) int64, on the CPU
    logp: torch.Tensor  # (G, T) float32, as sampled; zero past each length
    finished: torch.Tensor  # (G,) bool, on the CPU: ended by itself
    texts: list[str]


def load_crm(
    path: str | Path,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    prompt: str | None = None,
    resize: str | None = None,
    coordinates: str | None = None,
    min_pixels: int | None = None,
    max_pixels: int | None = None,
) -> "CRM":
    """Returns a CRM from a folder or a hub name.

    The other arguments are those of CRM. Where one is None, what the checkpoint remembers is taken.
    ValueError, one line, where there is no such model, or it was trained in other coordinates."""
    if prompt is not None:
        load_prompt(prompt)  # a wrong --prompt is an error now, not after minutes of loading
    given = {
        "prompt": prompt,
        "resize": resize,
        "coordinates": coordinates,
        "min_pixels": min_pixels,
        "max_pixels": max_pixels,
    }
    check_folder(path)
    settings = read_settings(path)
    check_remembered(path, settings)
    if coordinates not in (None, settings.get("coordinates", coordinates)):
        remembered = settings["coordinates"]
        raise ValueError(f"--coordinates {coordinates}: {path} was trained in {remembered}")
    settings.pop("answers", None)  # the prompt says it; only a resume compares it
    for key, value in given.items():
        if value is not None:
            settings[key] = value
    model, tokenizer, image_processor = read_pretrained(path, dtype, device)
    crm = CRM(model, tokenizer, image_processor, **settings)
    crm.side_files = read_side_files(path)
    print0(f"CRM: {model.config.model_type}, coordinates {crm.coordinates}")
    return crm


def check_remembered(path: str | Path, settings: dict[str, Any]) -> None:
    """ValueError, which names the file, for a prompt or a resize that no CRM has. settings: what
    the checkpoint remembers."""
    try:
        load_prompt(settings.get("prompt", "reasoning"))
        model_size((56, 56), settings.get("resize", "aspect"), stride=1)
        if settings.get("coordinates", "pixels") not in COORDINATES:
            raise ValueError(f"coordinates are one of {', '.join(COORDINATES)}")
    except ValueError as error:
        file = settings_file(path)
        raise ValueError(f"{file}: correct or remove the file: {error}") from None


class CRM:
    """Model, tokenizer and image processor of one checkpoint.

    prompt   see data.load_prompt; None is the reasoning prompt
    resize   how images become the model frame, see data.model_size; None is "aspect"
    coordinates   of data.COORDINATES; None is what the family was taught
    min_pixels, max_pixels   limits of the model frame; None are the usual ones, and at most what
                             the checkpoint was made for
    """

    def __init__(
        self,
        model: torch.nn.Module,
        tokenizer: Any,
        image_processor: Any,
        prompt: str | None = None,
        resize: str | None = None,
        coordinates: str | None = None,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
    ):
        self.model = model
        self.tokenizer = tokenizer
        self.image_processor = image_processor
        self.family = FAMILIES[model.config.model_type]
        self.coordinates = coordinates or self.family.coordinates
        self.side_files: dict[str, bytes] = {}  # of the checkpoint, see runtime/pretrained.py

        # how a question is put and how an answer is read
        self.template = load_prompt(prompt or "reasoning")
        self.answer_format = answer_format_of(self.template)

        # how an image is resized
        self.resize = resize or "aspect"
        self.min_pixels = min_pixels or MIN_PIXELS
        self.max_pixels = max_pixels or min(MAX_PIXELS, image_processor.size["longest_edge"])
        if self.resize.startswith("aspect:"):
            self.frames((56, 56))  # a wrong number is an error now
            self.max_pixels = int(self.resize.removeprefix("aspect:"))
            self.min_pixels = min(self.min_pixels, self.max_pixels)
            self.resize = "aspect"
        self.frames((56, 56))
        # so that a server that loads what `save` writes resizes to the same frame
        image_processor.size = {"shortest_edge": self.min_pixels, "longest_edge": self.max_pixels}

        # what trains; see prepare_training
        self.lora: Any = None  # the PEFT model around self.model
        self.ref_model: torch.nn.Module | None = None  # a frozen copy of the start
        self.has_reference = False
        self.offload_reference = False
        self.sharded: Any = None  # runtime.fsdp.Sharded of self.model, with --parallel fsdp
        self.ref_sharded: Any = None
        self.vision_is_frozen = False
        self.checkpointing = False
        self.compute_dtype = model.lm_head.weight.dtype

        self.image_id = tokenizer.convert_tokens_to_ids("<|image_pad|>")
        end = tokenizer.convert_tokens_to_ids(list(END))
        banned = tokenizer.convert_tokens_to_ids(list(BANNED))
        if None in (self.image_id, *end, *banned):
            names = ", ".join(END + BANNED)
            raise ValueError(f"{tokenizer.name_or_path}: the tokenizer lacks one of {names}")
        # the vocabulary is padded: ids past the tokenizer's last one mean nothing
        vocabulary = model.config.text_config.vocab_size
        banned += range(len(tokenizer), vocabulary)
        self.end = torch.tensor(end, device=self.device)
        self.banned = torch.tensor(banned, device=self.device)

    @property
    def device(self) -> torch.device:
        return self.model.lm_head.weight.device

    # ------------------------------------------------------------ from image and text to tokens

    def encode_question(self, image: Image.Image, query: str) -> Prompt:
        """Puts a question into the prompt's template, and encodes it with its image."""
        return self.encode(image, fill_prompt(self.template, query, self.coordinates))

    def frames(self, size: tuple[int, int]) -> dict[str, Sizes]:
        """Returns the sizes of an image of some (width, height) by the COORDINATES of a model."""
        stride = self.family.stride
        resized = model_size(size, self.resize, self.min_pixels, self.max_pixels, stride)
        return {"pixels": Sizes(size, resized), "norm1000": Sizes(size, (1000, 1000))}

    def prompt_of(self, example: Example) -> Prompt:
        """Returns an example as the model reads it. BadRow where it is too long for the model."""
        try:
            return self.encode_question(example.image, example.query)
        except ValueError as error:
            raise BadRow(f"{example.id}: {error}") from None

    def check_coordinates(self, examples: Sequence[Example], groups: Sequence[Group]) -> None:
        """Prints a line where boxes fit far better once they are read in other coordinates."""
        fits = dict.fromkeys(COORDINATES, 0.0)  # mean IoU
        for example, group in zip(examples, groups):
            boxes = [self.answer_format.parse(text).bbox for text in group.texts]
            for name, sizes in self.frames(example.image.size).items():
                ious = [box_iou(to_image(box, sizes), example.bbox) for box in boxes if box]
                fits[name] += sum(ious) / len(boxes) / len(groups)
        best = max(fits, key=fits.get)
        own = self.coordinates
        if fits[best] > fits[own] + 0.1:
            print0(
                f"boxes look like {best} (mean IoU {fits[best]:.2f}), not like {own} (mean IoU "
                f"{fits[own]:.2f}): give --coordinates {best}"
            )

    def encode(self, image: Image.Image, prompt_text: str) -> Prompt:
        """Encodes an RGB image in the image frame and a text as a Prompt.

        The image is resized here, once, to the model frame. Text that looks like a special token
        stays text. ValueError where the prompt is longer than the model's context."""
        frames = self.frames(image.size)
        size = frames["pixels"].model
        resized = image.resize(size, Image.Resampling.BICUBIC)
        pixels = self.image_processor(images=resized, do_resize=False, return_tensors="pt")
        grid = pixels["image_grid_thw"].to(self.device)
        image_tokens = int(grid.prod()) // self.image_processor.merge_size**2

        opening, middle, closing = CHAT
        before = self.tokenizer(self.family.system + opening).input_ids
        between = self.tokenizer(middle).input_ids
        after = self.tokenizer(closing).input_ids
        words = self.tokenizer(prompt_text, split_special_tokens=True).input_ids
        image_ids = [self.image_id] * image_tokens
        ids = torch.tensor(before + image_ids + between + words + after, device=self.device)
        context = self.model.config.text_config.max_position_embeddings
        if len(ids) >= context:
            raise ValueError(
                f"the prompt has {len(ids):,} tokens, {image_tokens:,} of them of the image, and "
                f"the model reads {context:,}; ask a shorter question or give a smaller --resize"
            )
        is_image = (ids[None] == self.image_id).int()
        positions, _ = self.model.model.get_rope_index(ids[None], is_image, grid)
        return Prompt(
            ids=ids,
            pixel_values=pixels["pixel_values"].to(self.device),
            grid_thw=grid,
            positions=positions[:, 0],
            sizes=frames[self.coordinates],
            image_start=len(before),
        )

    def image_features(self, prompts: Sequence[Prompt]) -> list[torch.Tensor]:
        """Returns what the vision tower makes of each prompt's image, (1 + K, image tokens, D). The
        first takes the image tokens' place; for the other K see `deepstack`.

        A frozen tower's features are computed once and kept in `prompt.features`, where sampler,
        reference and policy find them."""
        if not self.vision_is_frozen:
            return self._vision_tower(prompts)
        missing = [prompt for prompt in prompts if prompt.features is None]
        if missing:
            with torch.no_grad():
                features = self._vision_tower(missing)
            for prompt, of_image in zip(missing, features):
                prompt.features = of_image
        return [prompt.features for prompt in prompts]

    def _vision_tower(self, prompts: Sequence[Prompt]) -> list[torch.Tensor]:
        pixels = torch.cat([prompt.pixel_values for prompt in prompts])
        grids = torch.cat([prompt.grid_thw for prompt in prompts])
        found = self.model.model.get_image_features(pixels, grids)
        deep = found.deepstack_features if self.family.deepstack else []
        return [torch.stack(of_image) for of_image in zip(found.pooler_output, *deep)]

    def deepstack(
        self, prompts: Sequence[Prompt], features: Sequence[torch.Tensor], lengths: Sequence[int]
    ) -> dict[str, Any]:
        """Returns keywords by which Qwen3-VL's language model adds K vision layers' features to
        its image tokens, after its first K layers. lengths: of prompts with completions."""
        if not self.family.deepstack:
            return {}
        is_image = [prompt.ids == self.image_id for prompt in prompts]
        places = [pad(mask, (0, n - len(mask))) for mask, n in zip(is_image, lengths)]
        added = torch.cat([of_image[1:] for of_image in features], dim=1)  # (K, image tokens, D)
        return {"visual_pos_masks": torch.cat(places)[None], "deepstack_visual_embeds": added}

    def norm_heads(
        self, module: torch.nn.Module, q: torch.Tensor, key: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Qwen3-VL normalises every head's query and key (n, heads, d), before their rotation."""
        if self.family.norms_heads:
            q = module.q_norm(q)
            key = module.k_norm(key)
        return q, key

    def embed(
        self,
        prompt: Prompt,
        features: torch.Tensor,
        completions: Sequence[torch.Tensor] = (),
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """[prompt | completion 1 | … | completion g] -> embeddings (S, D), positions (3, S).

        features[0] replaces the embeddings of the prompt's image tokens. Positions of
        every completion continue from the prompt's."""
        words = self.model.get_input_embeddings()(torch.cat([prompt.ids, *completions]))
        start = prompt.image_start
        end = start + features.shape[1]
        x = torch.cat([words[:start], features[0].to(words.dtype), words[end:]])

        next_position = prompt.positions.max() + 1
        positions = [prompt.positions]
        for tokens in completions:
            steps = torch.arange(len(tokens), device=x.device)
            positions.append((next_position + steps).expand(3, -1))
        return x, torch.cat(positions, dim=1)

    def logits(self, hidden: torch.Tensor, temperature: float) -> torch.Tensor:
        """hidden (n, D) -> float32 logits / temperature (n, V), without the banned tokens.

        This is the one definition of the distribution that is sampled and scored. Products are in
        the model's type; bfloat16 results are widened to float32."""
        logits = self.model.lm_head(hidden).float()
        if temperature not in (0, 1):
            logits = logits / temperature
        return logits.index_fill_(1, self.banned, torch.finfo(torch.float32).min)

    # ------------------------------------------------------------ what trains

    def prepare_training(
        self,
        trainable: str = "",
        lora_rank: int = 0,
        lora_alpha: float | None = None,
        reference: bool = False,
        checkpointing: bool = False,
        offload: bool = False,
        ranks: Ranks | None = None,
    ) -> dict[str, torch.nn.Parameter]:
        """Makes the model ready for training. Called once. Returns what trains, by name.

        trainable      a regular expression: parameters whose name has no match are frozen
        lora_rank      above 0, LoRA matrices (arXiv 2106.09685) on the language model's linear
                       layers train, and nothing else does
        reference      keep the start as the frozen reference model
        checkpointing  compute activations again in the backward pass
        offload        keep the reference model's copy in host memory between its uses
        ranks          shard the model over these ranks (FSDP2); None: every rank has all of it
        """
        self.has_reference = reference
        if lora_rank > 0:
            if ranks is not None and ranks.world > 1:
                raise ValueError(
                    "--parallel fsdp shards whole models, and LoRA matrices are small: use "
                    "--parallel ddp"
                )
            self._add_lora(lora_rank, lora_alpha or 2 * lora_rank)
        elif reference:
            self.ref_model = copy.deepcopy(self.model).eval().requires_grad_(False)
            self.offload_reference = offload
            if offload:
                self.ref_model.cpu()
        self._freeze_all_but(trainable)
        self.checkpointing = checkpointing
        if checkpointing:
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
        if ranks is not None and ranks.world > 1:
            if offload:
                raise ValueError("--offload works with --parallel ddp, not with fsdp")
            # the shards are AdamW's master weights, so they are float32; compute_dtype computes
            self.sharded = self._shard(self.model.float(), ranks)
            if self.ref_model is not None:
                self.ref_sharded = self._shard(self.ref_model, ranks)
        named = self.model.named_parameters()
        return {name: parameter for name, parameter in named if parameter.requires_grad}

    def _add_lora(self, rank: int, alpha: float) -> None:
        from peft import LoraConfig, get_peft_model

        config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=LORA_TARGETS)
        # the matrices are in the model's type: the optimizer keeps the float32 copy
        self.lora = get_peft_model(self.model, config, autocast_adapter_dtype=False)

    def _freeze_all_but(self, pattern: str) -> None:
        matches = matcher("trainable", pattern)
        for name, parameter in self.model.named_parameters():
            if not matches(name):
                parameter.requires_grad_(False)
        if not any(parameter.requires_grad for parameter in self.model.parameters()):
            raise ValueError(f"--trainable {pattern}: no parameter that trains has such a name")
        vision_tower = self.model.model.visual.parameters()
        self.vision_is_frozen = not any(parameter.requires_grad for parameter in vision_tower)

    def _shard(self, model: torch.nn.Module, ranks: Ranks) -> Any:
        from runtime.fsdp import Sharded  # FSDP takes 45 MB of memory, and most runs do without

        parts = [*model.model.visual.blocks, *model.model.language_model.layers]
        return Sharded(model, parts, ranks, self.compute_dtype)

    def what_trains(self) -> str:
        """Returns one line about what trains, what is frozen, and what the reference model is."""
        parameters = list(self.model.parameters())
        total = sum(parameter.numel() for parameter in parameters)
        trains = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
        which = ""
        if self.lora is not None:
            which = ", LoRA matrices in the language model"
        vision = "is frozen" if self.vision_is_frozen else "trains as well"
        reference = "none"
        if self.has_reference and self.lora is not None:
            reference = "the same model with its LoRA matrices switched off"
        elif self.ref_model is not None:
            reference = "a frozen copy of the start"
        return (
            f"{trains:,} of {total:,} weights train{which}; the vision tower {vision}; "
            f"reference model: {reference}"
        )

    # ------------------------------------------------------------ weights on several ranks

    @property
    def is_sharded(self) -> bool:
        return self.sharded is not None

    def run(self, function: Callable, *args: Any) -> Any:
        """Returns function(*args), which uses the weights.

        Where they are sharded over ranks, it is called inside FSDP's forward, whose hooks gather
        each layer while it computes."""
        if self.sharded is None:
            return function(*args)
        return self.sharded.run(function, *args)

    def gathered(self) -> AbstractContextManager:
        """Inside, every rank holds all weights of the model, so that it samples, and scores without
        gradient, without waiting for another. All ranks enter and leave together. Nothing happens
        where the model is not sharded."""
        if self.sharded is None:
            return nullcontext()
        return self.sharded.gathered()

    # ------------------------------------------------------------ the reference model, and saving

    @contextmanager
    def reference(self) -> Iterator[None]:
        """Inside, without gradient, `self.model` is the reference model.

        With LoRA it is the same model with its matrices switched off. ValueError where no reference
        was kept."""
        if self.lora is not None:
            with torch.no_grad(), self._lora_switched_off():
                yield
            return
        if self.ref_model is None:
            raise ValueError("no reference model was kept: prepare_training(reference=True)")
        policy = self.model, self.sharded
        offloaded = self.ref_model if self.offload_reference else None
        with torch.no_grad(), on_device(offloaded, self.device):
            self.model, self.sharded = self.ref_model, self.ref_sharded
            try:
                yield
            finally:
                self.model, self.sharded = policy

    @contextmanager
    def _lora_switched_off(self) -> Iterator[None]:
        # PEFT lets every matrix train again when it switches them on: what was frozen stays so
        parameters = list(self.model.parameters())
        trains = [parameter.requires_grad for parameter in parameters]
        try:
            with self.lora.disable_adapter():
                yield
        finally:
            for parameter, required in zip(parameters, trains):
                parameter.requires_grad_(required)

    def save(self, path: str | Path) -> None:
        """Writes a folder that from_pretrained and any server loads as it is. LoRA matrices are
        merged into its weights and kept beside them, exact, in adapter/."""
        write_pretrained(
            path,
            self.model,
            self.tokenizer,
            self.image_processor,
            self.settings(),
            self.lora,
            self.side_files,
        )

    def settings(self) -> dict[str, Any]:
        """Returns what a checkpoint remembers: how images are resized, the prompt, by its name
        where it has one, and which entry of data.ANSWER_FORMATS rewarded its answers."""
        prompt = self.template
        for name, template in PROMPTS.items():
            if template == self.template:
                prompt = name
        return {
            "resize": self.resize,
            "min_pixels": self.min_pixels,
            "max_pixels": self.max_pixels,
            "coordinates": self.coordinates,
            "prompt": prompt,
            "answers": ANSWER_FORMATS[self.answer_format.key],
        }

    def check_settings(self, checkpoint: str | Path) -> None:
        """ValueError where a checkpoint was trained with other settings than these. A file that
        --prompt or --crm names may have changed since."""
        changed = []
        for key, value in read_settings(checkpoint).items():
            now = self.settings()[key]
            if now != value:
                changed.append(f"{key} was {value!r}, is {now!r}")
        if changed:
            problems = "; ".join(changed)
            raise ValueError(f"--resume: {problems}: restore what {checkpoint} was trained with")
