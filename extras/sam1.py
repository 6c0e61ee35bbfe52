"""MedSAM and SAM-Med2D: two segmenters built on the first SAM, for the paper's comparison.

    asm = load_asm("medsam:medsam_vit_b.pth", "cuda")
    asm = load_asm("sam-med2d:sam-med2d_b.pth", "cuda")  # or a folder as transformers saves it

MedSAM (arXiv 2304.12306) and SAM-Med2D (arXiv 2308.16184) are fine-tuned from SAM (arXiv
2304.02643). Here SAM is the one in transformers. Each of the two prepares images and enlarges masks
in its own way. `segment`, its checks and the features of the last image come from asm.ASM.
"""

import re
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from scipy import ndimage
from torch import nn
from transformers import SamConfig, SamModel

from asm import ASM, BOX_LABELS, normalise
from runtime.files import load_weights, read_safetensors, read_torch

# Side of the square image, in pixels.
MEDSAM_SIDE = 1024
SAM_MED2D_SIDE = 256


class MedSAM(ASM):
    """SAM at 1024 px, contrast stretched, probabilities enlarged. It was trained with boxes alone.
    Points go through SAM's own prompt encoder."""

    def prepare(self, image: np.ndarray) -> torch.Tensor:
        """(H, W, 3) uint8 -> (1, 3, S, S) float32 in [0, 1], as MedSAM's own code prepares it:
        skimage.transform.resize(image, (S, S), order=3, preserve_range=True, anti_aliasing=True)
        to whole grey values, then the contrast stretched."""
        side = self.model.image_size
        height, width, _ = image.shape
        shrink = np.array([height / side, width / side, 1.0])
        blur = np.maximum(0, (shrink - 1) / 2)
        smooth = ndimage.gaussian_filter(image.astype(float), blur, mode="mirror")
        resized = ndimage.zoom(smooth, 1 / shrink, order=3, mode="mirror", grid_mode=True)
        whole = resized.clip(image.min(), image.max()).astype(np.uint8)
        grey = rearrange(torch.from_numpy(whole).float(), "h w c -> 1 c h w")
        contrast = (grey.max() - grey.min()).clamp(1e-8)
        return (grey - grey.min()) / contrast

    def encode(self, image: np.ndarray) -> torch.Tensor:
        """(H, W, 3) uint8 -> embedding (1, D, S/16, S/16)."""
        return self.model.get_image_embeddings(self.prepare(image).to(self.model.device))

    def decode(
        self, features: torch.Tensor, coords: torch.Tensor, labels: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As ASM.decode. transformers takes boxes and points apart, so they are parted again."""
        # Every prompt has its box's corners, if there are boxes, in the same columns.
        is_corner = labels[0] >= min(BOX_LABELS)
        boxes = None
        points = None
        clicks = None
        if is_corner.any():
            boxes = rearrange(coords[:, is_corner], "n corner xy -> 1 n (corner xy)")
        if not is_corner.all():
            points = coords[None, :, ~is_corner]
            clicks = labels[None, :, ~is_corner]
        out = self.model(
            image_embeddings=features,
            multimask_output=self.multimask,
            input_boxes=boxes,
            input_points=points,
            input_labels=clicks,
        )
        return out.pred_masks[0], out.iou_scores[0]

    def enlarge(self, logits: torch.Tensor, image_hw: tuple[int, int]) -> torch.Tensor:
        """One mask's logits (S/4, S/4) -> (H, W) bool. It is probabilities that are enlarged."""
        probability = logits.sigmoid()[None, None]
        return F.interpolate(probability, image_hw, mode="bilinear")[0, 0] > 0.5


class SAMMed2D(MedSAM):
    """SAM at 256 px with an adapter in every block. It gives three masks, of which the one with the
    best predicted IoU is kept."""

    def prepare(self, image: np.ndarray) -> torch.Tensor:
        """(H, W, 3) uint8 -> (1, 3, S, S) float32, normalised, the nearest pixels taken."""
        height, width, _ = image.shape
        rows = nearest_pixels(height, self.model.image_size)
        columns = nearest_pixels(width, self.model.image_size)
        square = torch.from_numpy(image[rows][:, columns])
        return normalise(rearrange(square, "h w c -> 1 c h w").float() / 255)

    def enlarge(self, logits: torch.Tensor, image_hw: tuple[int, int]) -> torch.Tensor:
        """One mask's logits (S/4, S/4) -> (H, W) bool, by way of the square (S, S)."""
        side = self.model.image_size
        square = F.interpolate(logits[None, None], (side, side), mode="bilinear")
        return F.interpolate(square, image_hw, mode="bilinear")[0, 0] > 0


def nearest_pixels(length: int, side: int) -> np.ndarray:
    """The `side` indices below `length` that OpenCV's INTER_NEAREST picks. It inverts the scale
    first, and the rounding of that decides between two neighbours."""
    scale = 1 / (side / length)
    return np.minimum(np.arange(side) * scale, length - 1).astype(int)


class MLPWithAdapter(nn.Module):
    """A block's MLP and SAM-Med2D's adapter, which is added to it: a gate over channels, two
    convolutions, a residual, a norm."""

    def __init__(self, mlp: nn.Module, width: int) -> None:
        super().__init__()
        self.mlp = mlp
        self.channel = nn.Sequential(
            nn.Linear(width, width // 4, bias=False),
            nn.ReLU(),
            nn.Linear(width // 4, width, bias=False),
            nn.Sigmoid(),
        )
        self.spatial = nn.Sequential(
            nn.Conv2d(width, width, 3, stride=2, padding=1, bias=False),
            nn.ReLU(),
            nn.ConvTranspose2d(width, width, 4, stride=2, padding=1, bias=False),
            nn.ReLU(),
        )
        self.norm = nn.LayerNorm(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, H, W, C) -> (B, H, W, C)."""
        maps = rearrange(x, "b h w c -> b c h w")
        gate = rearrange(self.channel(x.mean((1, 2))), "b c -> b c 1 1")
        added = rearrange(maps + self.spatial(gate * maps), "b c h w -> b h w c")
        return self.mlp(x) + self.norm(added)


# ---------------------------------------------------------------- names of weights

# What to replace in transformers' name of a weight, in this order, to get the released name.
RELEASED_NAMES = [
    (r".*shared.*", "prompt_encoder.pe_layer.positional_encoding_gaussian_matrix"),
    (r"\.point_embed\.", ".point_embeddings."),
    (r"vision_encoder", "image_encoder"),
    (r"encoder\.layers", "encoder.blocks"),
    (r"projection", "proj"),
    (r"mlp\.mlp", "mlp"),
    (r"mlp\.(channel|spatial|norm)", r"Adapter.\1"),
    (r"neck\.conv1", "neck.0"),
    (r"neck\.layer_norm1", "neck.1"),
    (r"neck\.conv2", "neck.2"),
    (r"neck\.layer_norm2", "neck.3"),
    (r"mask_embed\.conv1", "mask_downscaling.0"),
    (r"mask_embed\.layer_norm1", "mask_downscaling.1"),
    (r"mask_embed\.conv2", "mask_downscaling.3"),
    (r"mask_embed\.layer_norm2", "mask_downscaling.4"),
    (r"mask_embed\.conv3", "mask_downscaling.6"),
    (r"upscale_conv1", "output_upscaling.0"),
    (r"upscale_layer_norm", "output_upscaling.1"),
    (r"upscale_conv2", "output_upscaling.3"),
    (r"(mlps\.\d|head)\.layers\.0", r"\1.layers.1"),
    (r"proj_in", "layers.0"),
    (r"(mlps\.\d|head)\.proj_out", r"\1.layers.2"),
    (r"layer_norm", "norm"),
]
# One tensor that transformers holds under two names and stores once.
POSITIONS = (
    "shared_image_embedding.positional_embedding",
    "prompt_encoder.shared_embedding.positional_embedding",
)


def released_name(name: str) -> str:
    """The name of a weight in transformers -> its name in the released files."""
    for pattern, replacement in RELEASED_NAMES:
        name = re.sub(pattern, replacement, name)
    return name


# ---------------------------------------------------------------- loading


def build_sam(image_size: int, adapters: bool = False, **vision: int | list[int]) -> SamModel:
    """Untrained SAM, ViT-B.

    image_size  side of the square image
    adapters    whether every block has SAM-Med2D's adapter
    vision      other sizes, fields of transformers' SamVisionConfig
    """
    config = SamConfig(
        vision_config={"image_size": image_size, **vision},
        prompt_encoder_config={"image_size": image_size, "image_embedding_size": image_size // 16},
        # SAM's own; transformers' default is 1e-6
        mask_decoder_config={"layer_norm_eps": 1e-5},
    )
    model = SamModel(config)
    model.image_size = image_size  # where asm.ASM looks for it
    if adapters:
        width = config.vision_config.hidden_size
        for layer in model.vision_encoder.layers:
            layer.mlp = MLPWithAdapter(layer.mlp, width)
    return model


def read_released(file: Path, model: SamModel) -> dict[str, torch.Tensor]:
    """The weights in a released file under transformers' names. ValueError names the file."""
    content = read_torch(file)
    if not isinstance(content, dict):
        raise ValueError(f"{file}: a state_dict is needed, not {type(content).__name__}")
    released = content
    if isinstance(content.get("model"), dict):  # as in SAM-Med2D's
        released = content["model"]
    own_names = {released_name(name): name for name in model.state_dict()}
    weights = {}
    for name, tensor in released.items():
        weights[own_names.get(name, name)] = tensor
    return weights


def load_trained(model: SamModel, path: Path) -> None:
    """Fill a model from a released file or from a folder in the layout of transformers.
    ValueError or FileNotFoundError, one line naming the file and the keys that do not fit."""
    if path.is_dir():
        weights = read_safetensors(path / "model.safetensors")
    else:
        weights = read_released(path, model)
    stored = [weights[name] for name in POSITIONS if name in weights]
    if stored:
        for name in POSITIONS:
            weights[name] = stored[0]
    load_weights(model, weights, path)


def check_arguments(family: str, path: Path, image_size: int | None) -> None:
    """FileNotFoundError if there is no such path, ValueError for an image_size of one's own."""
    if not path.exists():
        raise FileNotFoundError(
            f"{path}: no such ASM; give the released file, or a folder of transformers"
        )
    if image_size is not None:
        raise ValueError(f"image_size: {family} has one size, that of its position embeddings")


def load_medsam(
    path: str | Path,
    device: str | torch.device,
    multimask: bool = False,
    image_size: int | None = None,
) -> MedSAM:
    """MedSAM, frozen.

    path        the released file, or a folder in the layout of transformers
    device      where the network runs
    multimask   request three masks and keep the one with the best predicted score
    image_size  None. MedSAM has one size.
    FileNotFoundError or ValueError, one line naming the file and the key, if there is no such
    model.
    """
    path = Path(path)
    check_arguments("medsam", path, image_size)
    model = build_sam(MEDSAM_SIDE)
    load_trained(model, path)
    return MedSAM(model.to(device), {"family": "medsam"}, multimask)


def load_sam_med2d(
    path: str | Path,
    device: str | torch.device,
    multimask: bool = False,
    image_size: int | None = None,
) -> SAMMed2D:
    """SAM-Med2D, frozen. Arguments and errors as in `load_medsam`, but multimask changes nothing:
    the released code always requests three masks, and so does this."""
    path = Path(path)
    check_arguments("sam-med2d", path, image_size)
    model = build_sam(SAM_MED2D_SIDE, adapters=True)
    load_trained(model, path)
    return SAMMed2D(model.to(device), {"family": "sam-med2d"}, multimask=True)
