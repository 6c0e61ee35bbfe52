"""MedSAM and SAM-Med2D: two segmenters built on the first SAM, for the paper's comparison of segmenters.

    asm = load_asm("medsam:medsam_vit_b.pth", "cuda")           # or a folder in the layout of transformers
    asm = load_asm("sam-med2d:sam-med2d_b.pth", "cuda")

MedSAM (arXiv 2304.12306) and SAM-Med2D (2308.16184) are fine-tuned from SAM (2304.02643), here the one in
transformers; each prepares images in its own way. `segment`, its checks and its cache come from asm.ASM.
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

from asm import ASM, normalise
from runtime.files import load_weights, read_safetensors, read_torch


class MedSAM(ASM):
    """SAM at 1024 px, contrast stretched, probabilities enlarged. It was trained with boxes alone; points go
    through SAM's own prompt encoder."""

    def prepare(self, image):
        """(H, W, 3) uint8 -> (1, 3, S, S) float32 in [0, 1]: skimage.transform.resize(image, (S, S), order=3,
        preserve_range=True, anti_aliasing=True) to whole grey values, then the contrast stretched."""
        shrink = np.array([side / self.model.image_size for side in image.shape[:2]] + [1.0])
        smooth = ndimage.gaussian_filter(
            image.astype(float), np.maximum(0, (shrink - 1) / 2), mode="mirror"
        )
        resized = ndimage.zoom(smooth, 1 / shrink, order=3, mode="mirror", grid_mode=True)
        resized = resized.clip(image.min(), image.max()).astype(np.uint8)
        grey = rearrange(torch.from_numpy(resized).float(), "h w c -> 1 c h w")
        return (grey - grey.min()) / (grey.max() - grey.min()).clamp(1e-8)

    def encode(self, image):
        return self.model.get_image_embeddings(self.prepare(image).to(self.model.device))

    def decode(self, features, coords, labels):
        corner = labels[0] > 1  # the labels are the same for every prompt
        boxes = rearrange(coords[:, corner], "n c xy -> 1 n (c xy)") if corner.any() else None
        points, clicks = (None if corner.all() else x[None, :, ~corner] for x in (coords, labels))
        out = self.model(
            image_embeddings=features,
            multimask_output=self.multimask,
            input_boxes=boxes,
            input_points=points,
            input_labels=clicks,
        )
        return out.pred_masks[0], out.iou_scores[0]

    def enlarge(self, logits, image_hw):
        return F.interpolate(logits.sigmoid()[None, None], image_hw, mode="bilinear")[0, 0] > 0.5


class SAMMed2D(MedSAM):
    """SAM at 256 px with an adapter in every block. Three masks, of which the best predicted IoU is kept."""

    def prepare(self, image):
        """(H, W, 3) uint8 -> (1, 3, S, S) float32, normalised. Nearest neighbours as OpenCV picks them."""
        size = self.model.image_size
        rows, columns = (
            np.minimum(np.arange(size) * (1 / (size / side)), side - 1).astype(int)
            for side in image.shape[:2]
        )
        square = torch.from_numpy(image[rows][:, columns])
        return normalise(rearrange(square, "h w c -> 1 c h w").float() / 255)

    def enlarge(self, logits, image_hw):
        square = F.interpolate(logits[None, None], [self.model.image_size] * 2, mode="bilinear")
        return F.interpolate(square, image_hw, mode="bilinear")[0, 0] > 0


class MLPWithAdapter(nn.Module):
    """SAM-Med2D's adapter beside a block's MLP: a gate over channels, two convolutions, residual, norm."""

    def __init__(self, mlp, width):
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

    def forward(self, x):  # (B, H, W, C)
        maps = rearrange(x, "b h w c -> b c h w")
        gate = rearrange(self.channel(x.mean((1, 2))), "b c -> b c 1 1")
        added = rearrange(maps + self.spatial(gate * maps), "b c h w -> b h w c")
        return self.mlp(x) + self.norm(added)


SAM_FAMILIES = {"medsam": (MedSAM, 1024), "sam-med2d": (SAMMed2D, 256)}
# transformers' name of a weight -> the released one, substituted in this order
RELEASED_NAMES = [
    (re.compile(pattern), name)
    for pattern, name in (
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
    )
]
# one tensor that transformers holds under two names and stores once
POSITIONS = (
    "shared_image_embedding.positional_embedding",
    "prompt_encoder.shared_embedding.positional_embedding",
)


def released_name(key):
    """The name of a weight in transformers -> its name in the released files."""
    for pattern, name in RELEASED_NAMES:
        key = pattern.sub(name, key)
    return key


def build_sam(family, image_size=None, **vision):
    """Untrained SAM, ViT-B, of a key of SAM_FAMILIES. vision: other sizes, fields of SamVisionConfig."""
    size = image_size or SAM_FAMILIES[family][1]
    model = SamModel(
        SamConfig(
            vision_config={"image_size": size, **vision},
            prompt_encoder_config={"image_size": size, "image_embedding_size": size // 16},
            mask_decoder_config={"layer_norm_eps": 1e-5},
        )
    )  # SAM's own; transformers' default is 1e-6
    model.image_size = size  # where asm.ASM looks for it
    if family == "sam-med2d":
        for layer in model.vision_encoder.layers:
            layer.mlp = MLPWithAdapter(layer.mlp, model.config.vision_config.hidden_size)
    return model


def load_sam(family, path, device, multimask=False, image_size=None):
    """MedSAM or SAM-Med2D, frozen, from a released file or from a folder in the layout of transformers.
    FileNotFoundError or ValueError, one line naming the file and the key, if there is no such model."""
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(
            f"{path}: no such ASM; give the released file, or a folder of transformers"
        )
    if image_size is not None:
        raise ValueError(f"image_size: {family} has one size, that of its position embeddings")
    model = build_sam(family)
    if path.is_dir():
        weights = read_safetensors(path / "model.safetensors")
    else:
        held = read_torch(path)
        if not isinstance(held, dict):
            raise ValueError(f"{path}: a state_dict is needed, not {type(held).__name__}")
        released = held["model"] if isinstance(held.get("model"), dict) else held
        own_name = {released_name(key): key for key in model.state_dict()}
        weights = {own_name.get(name, name): tensor for name, tensor in released.items()}
    stored = [weights[name] for name in POSITIONS if name in weights]
    weights |= dict.fromkeys(POSITIONS, stored[0]) if stored else {}
    load_weights(model, weights, path)
    return SAM_FAMILIES[family][0](
        model.to(device), {"family": family}, multimask or family == "sam-med2d"
    )
