"""A vision-language model as a folder and in memory: model, tokenizer, image processor, settings.

The folder is what `from_pretrained` and any server loads. `settings.json` beside it is ours: how a
checkpoint's images were resized, and its prompt.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoTokenizer
from transformers import Qwen2_5_VLForConditionalGeneration as Qwen2_5_VL
from transformers import Qwen3VLForConditionalGeneration as Qwen3VL
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.utils import cached_file

from runtime.checkpoint import checkpoints
from runtime.files import parse_object, read_text


@dataclass(frozen=True)
class Family:
    """What is different from one family of models to the next."""

    model: type[torch.nn.Module]
    system: str  # with which it was trained to begin every prompt
    stride: int  # pixels along a visual token
    coordinates: str  # that it was taught to write, see data.COORDINATES
    deepstack: bool  # see CRM.deepstack
    norms_heads: bool  # see CRM.norm_heads


SYSTEM = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
FAMILIES = {  # by the model_type in config.json
    "qwen2_5_vl": Family(Qwen2_5_VL, SYSTEM, 28, "pixels", deepstack=False, norms_heads=False),
    "qwen3_vl": Family(Qwen3VL, "", 32, "norm1000", deepstack=True, norms_heads=True),
}
LOADING_ERRORS = (  # what from_pretrained raises on a broken folder, found by trying many
    OSError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    RuntimeError,
    safetensors.SafetensorError,
    StrictDataclassError,
)
SETTINGS_FILES = ("settings.json", "frame.json")  # the second is the name of older checkpoints
SETTINGS_TYPES = {
    "resize": str,
    "min_pixels": int,
    "max_pixels": int,
    "coordinates": str,
    "prompt": str,
    "answers": str,
}
# files of a checkpoint that neither model nor tokenizer nor image processor writes
SIDE_FILES = ("chat_template.json", "chat_template.jinja", "video_preprocessor_config.json")


def read_pretrained(
    path: str | Path, dtype: torch.dtype, device: str | torch.device = "cpu"
) -> tuple[torch.nn.Module, Any, Any]:
    """Returns (model, tokenizer, image processor) of a folder or a hub name.

    ValueError, one line, says what is missing or torn, or that this is none of the FAMILIES."""
    check_folder(path)
    kind = _load(AutoConfig, path).model_type
    if kind not in FAMILIES:
        raise ValueError(
            f"--crm {path}: its config.json says {kind!r}, not one of {', '.join(FAMILIES)}; for "
            "Qwen3.5 and later python -m extras.engines exports data and reward to verl"
        )
    model = _load(FAMILIES[kind].model, path, dtype=dtype, attn_implementation="sdpa")
    return model.to(device), _load(AutoTokenizer, path), _load(Qwen2VLImageProcessorPil, path)


def check_folder(path: str | Path) -> None:
    """ValueError for a path that is no checkpoint, before anything looks for it on the hub."""
    folder = Path(path)
    of_run = list(checkpoints(folder).values())
    if of_run:
        raise ValueError(
            f"--crm {path}: is the folder of a run; give a checkpoint in it, such as {of_run[-1]}"
        )
    if not (folder / "config.json").is_file():
        looks_like_a_path = str(path).startswith((".", "/", "~")) or str(path).count("/") > 1
        if folder.exists() or looks_like_a_path:
            raise ValueError(f"--crm {path}: no folder with a config.json there")
        if folder.parent != Path() and folder.parent.exists():  # runs/nope is meant as a folder
            raise ValueError(
                f"--crm {path}: no folder with a config.json there, nor looked for on the hub, as "
                f"there is a folder {folder.parent}"
            )
    for file in folder.glob("*.json"):
        try:
            json.loads(read_text(file))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"--crm {file}: not JSON ({error})") from None


def _load(kind: Any, path: str | Path, **options: Any) -> Any:
    """Returns kind.from_pretrained(path). ValueError, one line, for whatever it raises."""
    try:
        return kind.from_pretrained(path, **options)
    except LOADING_ERRORS as error:
        lines = str(error).strip().splitlines() or ["no message"]
        problem = f"{type(error).__name__}: {lines[0]}"
        raise ValueError(f"--crm {path}: cannot be loaded ({problem})") from None


def file_of(path: str | Path, name: str) -> Path | None:
    """Returns a file of a checkpoint, which may be a folder or a hub name; None without one."""
    if Path(path).exists():
        file = Path(path) / name
        return file if file.is_file() else None
    try:
        found = cached_file(path, name, _raise_exceptions_for_missing_entries=False)
    except (OSError, ValueError):
        return None
    return Path(found) if found else None


def read_side_files(path: str | Path) -> dict[str, bytes]:
    """Returns {name: content} of the SIDE_FILES that a checkpoint has."""
    found = {}
    for name in SIDE_FILES:
        file = file_of(path, name)
        if file is not None:
            found[name] = file.read_bytes()
    return found


def settings_file(path: str | Path) -> Path | None:
    """Returns the settings.json of a checkpoint, or frame.json of an older one; None without."""
    for name in SETTINGS_FILES:
        file = file_of(path, name)
        if file is not None:
            return file
    return None


def read_settings(path: str | Path) -> dict[str, Any]:
    """Returns the resize, min_pixels, max_pixels and prompt that a checkpoint was trained with.

    {} where it does not say. ValueError where its settings.json says something else."""
    file = settings_file(path)
    if file is None:
        return {}
    settings = parse_object(read_text(file), file)
    for key, value in settings.items():
        if type(value) is not SETTINGS_TYPES.get(key):
            raise ValueError(
                f"{file}: {key}: {value!r} is not what save writes there; correct or remove the "
                "file"
            )
    return settings


def write_pretrained(
    path: str | Path,
    model: torch.nn.Module,
    tokenizer: Any,
    image_processor: Any,
    settings: Mapping[str, Any],
    lora: Any = None,
    side_files: Mapping[str, bytes] | None = None,
) -> None:
    """Writes the folder that `read_pretrained` and `read_settings` read.

    lora: the PEFT model around the model, or None. Its matrices are merged into the weights, and
    kept beside them, exact, in adapter/."""
    folder = Path(path)
    model.generation_config.do_sample = True  # save_pretrained rejects a temperature without it
    model.save_pretrained(folder, state_dict=merged_weights(model))
    if lora is not None:
        lora.save_pretrained(folder / "adapter")
    tokenizer.save_pretrained(folder)
    image_processor.save_pretrained(folder)
    for name, content in (side_files or {}).items():
        if not (folder / name).exists():
            (folder / name).write_bytes(content)
    (folder / SETTINGS_FILES[0]).write_text(json.dumps(dict(settings)) + "\n", encoding="utf-8")


def merged_weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Returns {name: weight} as without LoRA, its matrices added to the weights they belong to."""
    weights = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if "lora_" not in name:
            weights[name.replace(".base_layer", "")] = parameter.detach()
    for name, layer in model.named_modules():
        if hasattr(layer, "get_delta_weight"):  # PEFT's linear layer with LoRA matrices
            weight = layer.base_layer.weight.detach()
            delta = layer.get_delta_weight("default").detach()
            merged = weight.float() + delta.float()
            weights[f"{name}.weight"] = merged.to(weight.dtype).cpu()
    return weights


@contextmanager
def on_device(model: torch.nn.Module | None, device: torch.device) -> Iterator[None]:
    """Inside, a model whose home is host memory is on the device. None: there is no such model."""
    tensors = [*model.parameters(), *model.buffers()] if model is not None else []
    homes = [tensor.data for tensor in tensors]
    try:
        for tensor, home in zip(tensors, homes):
            tensor.data = home.to(device)
        yield
    finally:
        for tensor, home in zip(tensors, homes):
            tensor.data = home
