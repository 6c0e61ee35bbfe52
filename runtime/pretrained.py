"""A Qwen2.5-VL as a folder and in memory: model, tokenizer, image processor, what a checkpoint of ours remembers."""

import json
from contextlib import contextmanager
from pathlib import Path

import safetensors
import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoTokenizer, Qwen2_5_VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from data import PROMPTS
from runtime.files import parse_object, read_text

UNLOADABLE = (
    OSError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    RuntimeError,
    safetensors.SafetensorError,
    StrictDataclassError,
)  # what from_pretrained raises on a broken folder, found by fuzzing
FEW_ROWS, LARGE = 64, 2**20  # rows of a product and weights of a layer, see FewRowsLinear
FRAME_TYPES = {"resize": str, "min_pixels": int, "max_pixels": int, "prompt": str}
FRAME_FILE = "frame.json"  # how a checkpoint's images were resized, and its prompt


class FewRowsLinear(torch.nn.Linear):
    """A linear layer of which a CPU takes a few rows as W x^T: in float32 that reads large weights up to four times as
    fast as x W^T, depending on the machine (bench/README.md). Whatever decodes token by token has few rows."""

    def forward(self, x):
        if x.dtype != torch.float32 or x.shape[:-1].numel() > FEW_ROWS:
            return super().forward(x)
        out = (self.weight @ x.mT).mT
        return out if self.bias is None else out + self.bias


def read_pretrained(path: str | Path, dtype, device="cpu"):
    """(model, tokenizer, image processor) of a folder or a hub name. ValueError, one line, names what is missing,
    torn, or no Qwen2.5-VL. On a CPU large linear layers become FewRowsLinear."""
    folder = Path(path)
    if checkpoints := sorted(folder.glob("step_*[0-9]")):
        raise ValueError(
            f"--crm {path}: is the folder of a run; give a checkpoint in it, such as {checkpoints[-1]}"
        )
    of_hub = (
        not str(path).startswith((".", "/", "~"))
        and str(path).count("/") <= 1
        and not folder.exists()
    )
    beside = (
        of_hub and folder.parent != Path() and folder.parent.exists()
    )  # runs/nope is meant as a folder
    if (beside or not of_hub) and not (folder / "config.json").is_file():
        why = f", nor looked for on the hub, as there is a folder {folder.parent}" if beside else ""
        raise ValueError(f"--crm {path}: no folder with a config.json there{why}")
    for file in folder.glob("*.json"):
        try:
            json.loads(read_text(file))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"--crm {file}: not JSON ({error})") from None

    def load(kind, **settings):
        try:
            return kind.from_pretrained(path, **settings)
        except UNLOADABLE as error:
            problem = (
                f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"
            )
            raise ValueError(f"--crm {path}: cannot be loaded ({problem})") from None

    if (kind := load(AutoConfig).model_type) != "qwen2_5_vl":
        raise ValueError(f"--crm {path}: its config.json says {kind!r}, not 'qwen2_5_vl'")
    model = load(Qwen2_5_VLForConditionalGeneration, dtype=dtype, attn_implementation="sdpa")
    if torch.device(device).type == "cpu":
        for module in model.modules():
            if type(module) is torch.nn.Linear and module.weight.numel() >= LARGE:
                module.__class__ = FewRowsLinear
    return model.to(device), load(AutoTokenizer), load(Qwen2VLImageProcessorPil)


def remembered_frame(path: str | Path) -> dict:
    """The resize, min_pixels, max_pixels and prompt that a checkpoint was trained with; {} where it does not say.
    ValueError where its frame.json says something else."""
    file = Path(path) / FRAME_FILE
    saved = parse_object(read_text(file), file) if file.is_file() else {}
    for key, value in saved.items():
        known = type(value) is FRAME_TYPES.get(key)
        if not known or (key == "prompt" and value not in PROMPTS and "{query}" not in value):
            raise ValueError(
                f"{file}: {key}: {value!r} is not what save writes there; mend or remove the file"
            )
    return saved


def write_pretrained(
    path: str | Path, model, tokenizer, image_processor, lora, frame: dict
) -> None:
    """The folder that read_pretrained reads. lora: the PEFT model around the model, or None; its matrices are merged
    into the weights, and kept beside them in adapter/. frame: for remembered_frame."""
    weights = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        if "lora_" not in name:
            weights[name.replace(".base_layer", "")] = p.detach()
    for name, layer in model.named_modules():
        if hasattr(layer, "get_delta_weight"):  # a linear layer with LoRA matrices
            weight, delta = (
                layer.base_layer.weight.detach(),
                layer.get_delta_weight("default").detach(),
            )
            weights[f"{name}.weight"] = (weight.float() + delta.float()).to(weight.dtype).cpu()
    model.generation_config.do_sample = True  # save_pretrained refuses a temperature without it
    model.save_pretrained(path, state_dict=weights)
    if lora:
        lora.save_pretrained(Path(path) / "adapter")
    tokenizer.save_pretrained(path)
    image_processor.save_pretrained(path)
    (Path(path) / FRAME_FILE).write_text(json.dumps(frame) + "\n")


@contextmanager
def on_device(model, device):
    """Inside, a model whose home is host memory is on the device. Without effect where there is none (None)."""
    tensors = [*model.parameters(), *model.buffers()] if model else []
    homes = [tensor.data for tensor in tensors]
    try:
        for tensor, home in zip(tensors, homes):
            tensor.data = home.to(device)
        yield
    finally:
        for tensor, home in zip(tensors, homes):
            tensor.data = home
