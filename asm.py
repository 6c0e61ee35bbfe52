"""Anatomical Segmentation Module: a frozen promptable segmenter turns an image, boxes and points into masks.

    asm = load_asm("demo/asm", "cpu")                # a folder of ours: config.yaml and model.safetensors
    asm = load_asm("MedSAM2_latest.pt", "cuda")      # a released checkpoint: {"model": state_dict}
    asm = load_asm("medsam:medsam_vit_b.pth", "cuda")           # or a folder in the layout of transformers
    asm = load_asm("sam-med2d:sam-med2d_b.pth", "cuda")
    masks, scores = asm.segment(image, boxes=[[40, 30, 90, 80]], points=[[[60, 50], [75, 60]]])
    overlay(image, masks[0], (40, 30, 90, 80), ((60, 50), (75, 60))).save("overlay.png")

The network is SAM 2.1 (arXiv 2408.00714) from the `sam2` package; MedSAM2 (arXiv 2504.03600) is its hiera_t
fine-tuned at 512 px. The package's own predictor needs torchvision and knows feature maps of 1024 px only, so
preparing image and prompts is written out here; test_asm.py holds it against that predictor. MedSAM
(arXiv 2304.12306) and SAM-Med2D (2308.16184) are the first SAM (2304.02643), from transformers; each prepares
images its own way.

Differences from the paper's released code:
1. The image side is the checkpoint's own, 512 for MedSAM2 (released: 1024; `image_size=1024` gives that).
2. A box with two points is an unambiguous prompt, so one mask is asked for (released: three, keeping the one
   of best predicted score; `multimask=True` gives that).
3. Images are RGB (the released demo feeds BGR).
"""
import re
from pathlib import Path

import hydra.errors
import hydra.utils
import numpy as np
import omegaconf
import safetensors.torch
import sam2
import torch
import torch.nn.functional as F
import yaml
from einops import rearrange
from PIL import Image, ImageChops, ImageDraw, ImageFilter
from scipy import ndimage
from torch import nn
from transformers import SamConfig, SamModel

from runtime.files import read_torch

SAM2_CONFIG = Path(sam2.__file__).parent / "configs/sam2.1/sam2.1_hiera_t.yaml"
# MedSAM2's side, and what sam2's own build_sam2 adds: a single mask with a shaky edge yields to the three
MEDSAM2 = {"image_size": 512, "sam_mask_decoder_extra_args": {
    "dynamic_multimask_via_stability": True, "dynamic_multimask_stability_delta": 0.05,
    "dynamic_multimask_stability_thresh": 0.98}}
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, as SAM 2 was trained
BOX_LABELS, POINT_LABEL = (2, 3), (1,)  # the prompt encoder's names: two corners, a click on the target
OVERLAY_SIDE = 448  # pictures with a shorter long side are enlarged to it
MASK_COLOUR, BOX_COLOUR, POINT_COLOURS = (20, 220, 190), (255, 196, 61), ((255, 82, 119), (176, 116, 255))


def normalise(pixels):
    """RGB (..., 3, H, W) in [0, 1] -> zero mean and unit deviation over ImageNet."""
    return (pixels - pixels.new_tensor(MEAN)[:, None, None]) / pixels.new_tensor(STD)[:, None, None]


def pixels_from_image(image, size):
    """(H, W, 3) uint8 RGB -> (3, size, size) float32: squashed to a square (antialiased), normalised. What
    torchvision's ToTensor, Resize and Normalize do."""
    pixels = torch.from_numpy(np.array(image, order="C")).permute(2, 0, 1)[None].float() / 255
    return normalise(F.interpolate(pixels, (size, size), mode="bilinear", antialias=True)[0])


def prompt_tokens(boxes, points, image_hw, size):
    """Boxes (n, 4) and points (n, m, 2), image frame, either may be None -> coordinates (n, k, 2) in the
    network's square and labels (n, k). A box is two corners and stands before the clicks: k is 2, m or 2 + m."""
    given = [] if boxes is None else [(rearrange(boxes, "n (k c) -> n k c", c=2), BOX_LABELS)]
    given += [] if points is None else [(points, POINT_LABEL * points.shape[1])]
    coords = torch.cat([xy for xy, _ in given], 1) / torch.tensor(image_hw[::-1], dtype=torch.float32) * size
    return coords, torch.tensor([label for _, labels in given for label in labels]).expand(len(coords), -1)


def image_features(model, pixels):
    """(B, 3, S, S) -> embedding (B, D, S/16, S/16), finer maps [(B, D/8, S/4, S/4), (B, D/4, S/8, S/8)]."""
    *finer, embedding = model.forward_image(pixels)["backbone_fpn"][-model.num_feature_levels:]
    if model.directly_add_no_mem_embed:  # a still image is a first frame: nothing remembered
        embedding = embedding + model.no_mem_embed.view(1, -1, 1, 1)
    return embedding, finer


def _checked_prompts(name, value, shape):
    """None, or a float32 tensor (n, *shape) of finite numbers, n (and an "m" in shape) at least 1."""
    if value is None:
        return None
    array = np.asarray(value)
    if array.dtype.kind not in "iuf" or array.ndim != len(shape) + 1 or array.size == 0 or \
            any(want not in ("m", side) for want, side in zip(shape, array.shape[1:])):
        wanted = ", ".join(map(str, shape))
        raise ValueError(f"{name}: numbers (n, {wanted}) are needed, not {array.dtype} {array.shape}")
    if not np.isfinite(array).all():
        raise ValueError(f"{name}: every coordinate must be finite")
    return torch.tensor(array, dtype=torch.float32)


class ASM:
    """A frozen SAM 2 and the configuration that built it. Keeps the features of the last image: a question's
    answers, and its box and points apart, are drawn on the same one."""

    def __init__(self, model, config, multimask=False):
        self.model, self.config, self.multimask = model.eval().requires_grad_(False), config, multimask
        self.last = None, None              # image, its features
        self.size = self.image_size()

    def image_size(self):
        return self.model.image_size

    def prepare(self, image):
        """(H, W, 3) uint8 -> (1, 3, S, S)."""
        return pixels_from_image(image, self.size)[None]

    def encode(self, pixels):
        return image_features(self.model, pixels)

    def decode(self, features, coords, labels):
        """Of `encode` and `prompt_tokens` -> logits (n, m, h, w), predicted IoU (n, m); m: 1 or, with
        multimask, 3."""
        embedding, finer = features
        sparse, dense = self.model.sam_prompt_encoder(points=(coords, labels), boxes=None, masks=None)
        return self.model.sam_mask_decoder(
            image_embeddings=embedding, image_pe=self.model.sam_prompt_encoder.get_dense_pe(),
            repeat_image=True, sparse_prompt_embeddings=sparse, dense_prompt_embeddings=dense,
            high_res_features=finer, multimask_output=self.multimask)[:2]

    def enlarge(self, logits, image_hw):
        """One mask's logits (h, w) -> (H, W) bool."""
        return F.interpolate(logits[None, None], image_hw, mode="bilinear")[0, 0] > 0

    @torch.no_grad()
    def logits(self, image, boxes=None, points=None):
        """Mask logits (n, S/4, S/4) of the squashed image and predicted IoU (n,), on the model's device.
        Arguments and errors as in `segment`."""
        found = f"{image.dtype} {image.shape}" if isinstance(image, np.ndarray) else type(image).__name__
        if not found.startswith("uint8") or image.shape[2:] != (3,) or not image.size:
            raise ValueError(f"image: a uint8 RGB array (H, W, 3) is needed, not {found}; "
                             'np.asarray(picture.convert("RGB")) makes one of any PIL picture')
        boxes, points = _checked_prompts("boxes", boxes, (4,)), _checked_prompts("points", points, ("m", 2))
        if boxes is None and points is None:
            raise ValueError("boxes and points are both None: the segmenter needs at least one of them")
        if boxes is not None and points is not None and len(boxes) != len(points):
            raise ValueError(f"{len(boxes)} boxes but {len(points)} sets of points: one of each per mask")
        device = self.model.device
        coords, labels = (x.to(device) for x in prompt_tokens(boxes, points, image.shape[:2], self.size))
        if not np.array_equal(image, self.last[0]):
            self.last = image.copy(), self.encode(self.prepare(image).to(device))
        logits, scores = self.decode(self.last[1], coords, labels)
        best = scores.argmax(1, keepdim=True)  # (n, 1)
        return logits.take_along_dim(best[..., None, None], 1)[:, 0], scores.take_along_dim(best, 1)[:, 0]

    def segment(self, image, boxes=None, points=None):
        """One mask per prompt; the image is encoded once for all of them.

        image   (H, W, 3) uint8, RGB
        boxes   (n, 4) numbers, x1 y1 x2 y2, image frame; or None
        points  (n, m, 2) numbers, m times (x, y) on the target, image frame; or None, but not both
        ->      masks (n, H, W) bool; scores (n,) float32, the network's own guess of each mask's IoU
        ValueError for any other image or prompt.
        """
        logits, scores = self.logits(image, boxes, points)
        # one by one: the n masks of a large scan in float are gigabytes
        masks = [self.enlarge(low, image.shape[:2]) for low in logits]
        return torch.stack(masks).cpu().numpy(), scores.cpu().numpy()


class MedSAM(ASM):
    """The first SAM as MedSAM uses it: 1024 px, contrast stretched, probabilities enlarged. It was trained
    with boxes alone; points go through SAM's own prompt encoder."""

    def image_size(self):
        return self.model.config.vision_config.image_size

    def prepare(self, image):
        """Cubic splines after a Gaussian against aliasing, to whole grey values, stretched to [0, 1]: what
        skimage.transform.resize(image, (S, S), order=3, preserve_range=True, anti_aliasing=True) does."""
        shrink = np.array([side / self.size for side in image.shape[:2]] + [1.0])
        smooth = ndimage.gaussian_filter(image.astype(float), np.maximum(0, (shrink - 1) / 2), mode="mirror")
        resized = ndimage.zoom(smooth, 1 / shrink, order=3, mode="mirror", grid_mode=True)
        grey = torch.from_numpy(resized.clip(image.min(), image.max()).astype(np.uint8)).float()
        return rearrange((grey - grey.min()) / (grey.max() - grey.min()).clamp(1e-8), "h w c -> 1 c h w")

    def encode(self, pixels):
        return self.model.get_image_embeddings(pixels)

    def decode(self, features, coords, labels):
        corner = labels[0] > 1
        answer = self.model(image_embeddings=features, multimask_output=self.multimask,
                            input_boxes=coords[:, corner].reshape(1, -1, 4) if corner.any() else None,
                            input_points=coords[None, :, ~corner] if not corner.all() else None)
        return answer.pred_masks[0], answer.iou_scores[0]

    def enlarge(self, logits, image_hw):
        return F.interpolate(logits.sigmoid()[None, None], image_hw, mode="bilinear")[0, 0] > 0.5


class SAMMed2D(MedSAM):
    """The first SAM at 256 px, an adapter in every block; of three masks the one of best predicted IoU."""

    def prepare(self, image):
        rows, columns = (np.minimum(np.arange(self.size) * (1 / (self.size / side)), side - 1).astype(int)
                         for side in image.shape[:2])               # nearest as OpenCV has it
        return normalise(torch.from_numpy(image[rows][:, columns]).permute(2, 0, 1)[None].float() / 255)

    def enlarge(self, logits, image_hw):
        square = F.interpolate(logits[None, None], (self.size, self.size), mode="bilinear")
        return F.interpolate(square, image_hw, mode="bilinear")[0, 0] > 0


class MLPWithAdapter(nn.Module):
    """SAM-Med2D: beside a block's MLP a gate over the channels and two convolutions, residual, normed."""

    def __init__(self, mlp, width):
        super().__init__()
        self.mlp = mlp
        self.channel = nn.Sequential(nn.Linear(width, width // 4, bias=False), nn.ReLU(),
                                     nn.Linear(width // 4, width, bias=False), nn.Sigmoid())
        self.spatial = nn.Sequential(
            nn.Conv2d(width, width, 3, stride=2, padding=1, bias=False), nn.ReLU(),
            nn.ConvTranspose2d(width, width, 4, stride=2, padding=1, bias=False), nn.ReLU())
        self.norm = nn.LayerNorm(width)

    def forward(self, x):                   # (B, H, W, C)
        maps = rearrange(x, "b h w c -> b c h w")
        gate = rearrange(self.channel(x.mean((1, 2))), "b c -> b c 1 1")
        return self.mlp(x) + self.norm(rearrange(maps + self.spatial(gate * maps), "b c h w -> b h w c"))


SAM_FAMILIES = {"medsam": (MedSAM, 1024), "sam-med2d": (SAMMed2D, 256)}
# transformers' name of a weight -> the released one, substituted in this order
RELEASED_NAMES = [(re.compile(pattern), name) for pattern, name in (
    (r".*shared.*", "prompt_encoder.pe_layer.positional_encoding_gaussian_matrix"),
    (r"\.point_embed\.", ".point_embeddings."), (r"vision_encoder", "image_encoder"),
    (r"encoder\.layers", "encoder.blocks"), (r"projection", "proj"),
    (r"mlp\.mlp", "mlp"), (r"mlp\.(channel|spatial|norm)", r"Adapter.\1"),
    (r"neck\.conv1", "neck.0"), (r"neck\.layer_norm1", "neck.1"), (r"neck\.conv2", "neck.2"),
    (r"neck\.layer_norm2", "neck.3"), (r"mask_embed\.conv1", "mask_downscaling.0"),
    (r"mask_embed\.layer_norm1", "mask_downscaling.1"), (r"mask_embed\.conv2", "mask_downscaling.3"),
    (r"mask_embed\.layer_norm2", "mask_downscaling.4"), (r"mask_embed\.conv3", "mask_downscaling.6"),
    (r"upscale_conv1", "output_upscaling.0"), (r"upscale_layer_norm", "output_upscaling.1"),
    (r"upscale_conv2", "output_upscaling.3"), (r"(mlps\.\d|head)\.layers\.0", r"\1.layers.1"),
    (r"proj_in", "layers.0"), (r"(mlps\.\d|head)\.proj_out", r"\1.layers.2"), (r"layer_norm", "norm"))]


def released_name(key):
    for pattern, name in RELEASED_NAMES:
        key = pattern.sub(name, key)
    return key


def build_sam(family, image_size=None, **vision):
    """Untrained first SAM, ViT-B; vision: other sizes, fields of transformers' SamVisionConfig."""
    size = image_size or SAM_FAMILIES[family][1]
    model = SamModel(SamConfig(
        vision_config={"image_size": size, **vision},
        prompt_encoder_config={"image_size": size, "image_embedding_size": size // 16},
        mask_decoder_config={"layer_norm_eps": 1e-5}))              # SAM's own; transformers' default is 1e-6
    if family == "sam-med2d":
        for layer in model.vision_encoder.layers:
            layer.mlp = MLPWithAdapter(layer.mlp, model.config.vision_config.hidden_size)
    return model


def load_sam(family, path, device, multimask):
    """MedSAM or SAM-Med2D from a released file, or from a folder of transformers. Errors as in load_asm."""
    if path.is_dir():
        weights, name = _read_safetensors(path / "model.safetensors"), str
        weights["prompt_encoder.shared_embedding.positional_embedding"] = weights.get(
            "shared_image_embedding.positional_embedding")          # one tensor with two names, stored once
    else:
        weights, name = _read_torch(path), released_name
        weights = weights["model"] if isinstance(weights.get("model"), dict) else weights
    load_weights(model := build_sam(family), weights, path, name)
    return SAM_FAMILIES[family][0](model.to(device), {"family": family}, multimask or family == "sam-med2d")


def read_config(file):
    """A yaml shaped like sam2's own -> plain dict, references resolved. ValueError names the file."""
    try:
        config = omegaconf.OmegaConf.to_container(omegaconf.OmegaConf.load(file), resolve=True)
    except (yaml.YAMLError, UnicodeDecodeError, omegaconf.errors.OmegaConfBaseException) as error:
        raise ValueError(f"{file}: not a model's yaml: {str(error).splitlines()[0]}") from error
    if not isinstance(config, dict) or not isinstance(config.get("model"), dict):
        raise ValueError(f"{file}: no `model:` section, which sam2's own {SAM2_CONFIG.name} has")
    return config


def _targets(node):
    """The name of everything that instantiating a configuration calls."""
    own = {str(node["_target_"])} if isinstance(node, dict) and "_target_" in node else set()
    inner = node.values() if isinstance(node, dict) else node if isinstance(node, list) else ()
    return own.union(*map(_targets, inner))


def build_model(config, source):
    """Untrained SAM 2 from a configuration. ValueError names `source`, where it came from."""
    # to build is to call whatever the yaml names, so only what sam2's own yaml names may be called
    strange = _targets(config) - _targets(read_config(SAM2_CONFIG))
    if strange:
        raise ValueError(f"{source}: `_target_: {min(strange)}` is no part of SAM 2 and was not called")
    try:
        return hydra.utils.instantiate(config["model"])
    except hydra.errors.InstantiationException as error:
        raise ValueError(f"{source}: no SAM 2 can be built: {str(error).splitlines()[0]}") from error


def load_weights(model, weights, source, name=str):
    """Copy {name: tensor} into the model, cast to its float32; name: of the model's own key, that in the
    weights. ValueError names the source and the first keys missing, unexpected or of another shape."""
    own = model.state_dict()
    wanted = {name(key): tensor for key, tensor in own.items()}
    reshaped = {key for key in wanted.keys() & weights.keys() if np.shape(weights[key]) != wanted[key].shape}
    problems = {"missing": wanted.keys() - weights.keys(), "unexpected": weights.keys() - wanted.keys(),
                "of another shape": reshaped}
    told = [f"{len(names)} {what} ({', '.join(sorted(map(str, names))[:3])}{', ...' * (len(names) > 3)})"
            for what, names in problems.items() if names]
    if told:
        raise ValueError(f"{source}: its keys do not fit the model: {'; '.join(told)}")
    model.load_state_dict({key: weights[name(key)] for key in own})


def _read_safetensors(file):
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such file")
    try:
        return safetensors.torch.load_file(file)
    except safetensors.SafetensorError as error:
        raise ValueError(f"{file}: not a safetensors file: {error}") from error


def _read_folder(folder):
    if not (folder / "config.yaml").is_file():
        raise FileNotFoundError(f"{folder / 'config.yaml'}: no such file; an ASM folder has config.yaml, "
                                "model.safetensors")
    return read_config(folder / "config.yaml"), _read_safetensors(folder / "model.safetensors")


def _read_torch(file):
    held = read_torch(file)
    if not isinstance(held, dict):
        raise ValueError(f'{file}: {{"model": state_dict}} is needed, not {type(held).__name__}')
    return held


def _read_checkpoint(file):
    held = _read_torch(file)
    if not isinstance(held.get("model"), dict):
        raise ValueError(f'{file}: {{"model": state_dict}} is needed, as in MedSAM2_latest.pt, not a dict of '
                         f"{list(held)[:3]}; MedSAM and SAM-Med2D are medsam:FILE and sam-med2d:FILE")
    config = read_config(SAM2_CONFIG)
    config["model"] |= MEDSAM2
    return config, held["model"]


def load_asm(spec, device, multimask=False, image_size=None):
    """A frozen ASM from a folder of ours (`save_asm`), a file {"model": state_dict} of sam2.1 hiera_t,
    medsam:FILE or sam-med2d:FILE in the released layouts, or medsam:FOLDER in that of transformers.

    multimask   ask for three masks and keep the one of best predicted score (SAM-Med2D always does)
    image_size  side of the network's square, a multiple of 32; None for the model's own. Of SAM 2 only
    FileNotFoundError or ValueError, one line naming the file and the key, where no such model is.
    """
    family, path = re.fullmatch(f"(?:({'|'.join(SAM_FAMILIES)}):)?(.*)", str(spec), re.DOTALL).groups()
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such ASM; give a folder of ours, a MedSAM2 file, medsam:FILE "
                                "or sam-med2d:FILE")
    if family and image_size:
        raise ValueError(f"image_size: the position embeddings of {family} have one size")
    if family:
        return load_sam(family, path, device, multimask)
    config, weights = _read_folder(path) if path.is_dir() else _read_checkpoint(path)
    if image_size is not None and (image_size < 32 or image_size % 32):
        raise ValueError(f"image_size: a multiple of 32 is needed, not {image_size}")
    config["model"] |= {"image_size": image_size} if image_size else {}
    model = build_model(config, path)
    load_weights(model, weights, path)
    return ASM(model.to(device), config, multimask)


def save_asm(asm, folder, dtype=torch.float32):
    """Write what `load_asm(folder, device)` reads: config.yaml and model.safetensors. float16 halves the file
    and rounds the weights; loading always gives float32."""
    (folder := Path(folder)).mkdir(parents=True, exist_ok=True)
    omegaconf.OmegaConf.save(omegaconf.OmegaConf.create(asm.config), folder / "config.yaml")
    weights = {name: tensor.to("cpu", dtype).contiguous() for name, tensor in asm.model.state_dict().items()}
    safetensors.torch.save_file(weights, folder / "model.safetensors")


def overlay(image, mask=None, bbox=None, points=None):
    """The picture with mask (tint, outline), box and two key points drawn in; any of the three may be None.

    image   PIL image or (H, W, 3) uint8 array
    mask    (H, W) bool, else ValueError; bbox (x1, y1, x2, y2), points ((x, y), (x, y)): image frame
    ->      PIL RGB image; one with a long side below 448 px is enlarged to that, so that the lines are crisp
    """
    picture = (image if isinstance(image, Image.Image) else Image.fromarray(image)).convert("RGB")
    size = [max(1, round(side * max(1.0, OVERLAY_SIDE / max(picture.size)))) for side in picture.size]
    finer = 2 if max(size) <= 1024 else 1  # PIL draws hard edges: draw at twice the size, then shrink
    canvas = picture.resize([finer * side for side in size], Image.Resampling.BICUBIC)
    line = finer * max(2, round(max(size) / 280))
    if mask is not None:
        if np.shape(mask) != picture.size[::-1]:
            raise ValueError(f"mask: {np.shape(mask)} is not the image's size, {picture.size[::-1]}")
        inside = Image.fromarray(np.asarray(mask, dtype=bool).astype(np.uint8) * 255)
        inside = inside.resize(canvas.size, Image.Resampling.BILINEAR).point(lambda grey: 255 * (grey > 127))
        contour = ImageChops.subtract(inside, inside.filter(ImageFilter.MinFilter(line // 2 * 2 + 1)))
        tint = inside.point(lambda grey: grey * 36 // 100)
        canvas.paste(MASK_COLOUR, mask=ImageChops.lighter(tint, contour))
    draw, factor = ImageDraw.Draw(canvas), np.array(canvas.size) / picture.size  # image frame -> canvas
    if bbox is not None:
        (x1, y1), (x2, y2) = np.sort(np.reshape(bbox, (2, 2)), axis=0) * factor
        # the dark halo keeps the line readable on bright tissue
        for grow, width, colour in ((line, 2 * line, "#141414"), (line / 2, line, BOX_COLOUR)):
            draw.rectangle((x1 - grow, y1 - grow, x2 + grow, y2 + grow), outline=colour, width=width)
    for point, colour in zip([] if points is None else points, POINT_COLOURS):
        x, y = (np.array(point, dtype=float) + 0.5) * factor  # a point names a pixel: its centre
        for radius, fill in ((3.2 * line, "#141414"), (2.7 * line, "white"), (1.9 * line, colour)):
            draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=fill)
    return canvas.resize(size, Image.Resampling.LANCZOS)
