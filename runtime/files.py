"""Reading what a stranger may give: text, yaml and weights, as data only."""
from pathlib import Path
from pickle import UnpicklingError
from textwrap import shorten

import omegaconf
import safetensors.torch
import torch
import yaml

UNREADABLE = (UnpicklingError, RuntimeError, EOFError, ValueError, LookupError, TypeError, AttributeError,
              AssertionError, OverflowError, OSError)    # what torch.load says of garbage, by fuzzing it


def read_torch(file, device="cpu"):
    """What torch.save wrote, plain tensors and containers; nothing in it is run. ValueError names it."""
    with open(file, "rb") as opened:                # a missing file is an OSError of its own
        try:
            return torch.load(opened, map_location=device, weights_only=True)
        except UNREADABLE as error:
            raise ValueError(f"{file}: no torch file of plain tensors ({type(error).__name__})") from error


def read_text(path: str | Path) -> str:
    """UTF-8; ValueError names a file that is not."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text ({error})") from None


def read_yaml(file: str | Path):
    """Plain containers, references resolved; ValueError names a file that is not yaml."""
    try:
        return omegaconf.OmegaConf.to_container(omegaconf.OmegaConf.load(file), resolve=True)
    except (yaml.YAMLError, UnicodeDecodeError, omegaconf.errors.OmegaConfBaseException) as error:
        raise ValueError(f"{file}: not a model's yaml: {str(error).splitlines()[0]}") from error


def targets(node) -> set[str]:
    """Every `_target_` in a configuration: the names that hydra would call to build it."""
    if isinstance(node, list):
        return set().union(*map(targets, node))
    if not isinstance(node, dict):
        return set()
    own = {str(node["_target_"])} if "_target_" in node else set()
    return own.union(*map(targets, node.values()))


def read_safetensors(file: str | Path) -> dict[str, torch.Tensor]:
    """{name: tensor}. FileNotFoundError or ValueError, one line naming the file."""
    try:
        return safetensors.torch.load_file(file)
    except safetensors.SafetensorError as error:
        raise ValueError(f"{file}: not a safetensors file: {error}") from error


def load_weights(model: torch.nn.Module, weights: dict, source: str | Path) -> None:
    """Copy {name: tensor} into the model, converted to its dtype. ValueError, one line, names the source and
    the keys that are missing, unexpected or of another shape."""
    try:
        model.load_state_dict({str(name): tensor for name, tensor in weights.items()})
    except RuntimeError as error:
        raise ValueError(f"{source}: its keys do not fit the model: {shorten(str(error), 400)}") from error
