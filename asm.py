"""Anatomical Segmentation Module: a frozen promptable segmenter turns boxes and points into masks.

    asm = load_asm("demo/asm", "cpu")                  # a folder: config.yaml, model.safetensors
    asm = load_asm("MedSAM2_latest.pt", "cuda")        # a released file, {"model": state_dict}
    asm = load_asm("medsam:medsam_vit_b.pth", "cuda")  # MedSAM and SAM-Med2D: extras/sam1.py
    box = [40, 30, 90, 80]
    points = [[60, 50], [75, 60]]
    masks, scores = asm.segment(image, boxes=[box], points=[points])
    overlay(image, masks[0], box, points).save("overlay.png")

The network is SAM 2.1 (arXiv 2408.00714) from the `sam2` package. MedSAM2 (arXiv 2504.03600) is its
hiera_t, fine-tuned at 512 px. The package's own predictor needs torchvision and a 1024 px model, so
images and prompts are prepared here. tests/test_asm.py compares the two.

Coordinates arrive in the image frame. `prompt_tokens` makes the third conversion of this project,
after data.to_model and data.to_image: from the image frame to the network's square, whose side is
the same for every image. Masks are enlarged from that square back to the image's own size.

Differences from the paper's released code:
1. The image side is the checkpoint's own, 512 for MedSAM2. The released code has 1024, which
   `image_size=1024` gives.
2. A box with two points is unambiguous, so one mask is requested. The released code requests three
   and keeps the one with the best predicted score, which `multimask=True` gives.
3. Images are RGB. The released demo feeds BGR.

Your own segmenter is one line in SEGMENTERS. Read next: infer.py, which asks a question about a
picture and draws the answer with this module.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path

import hydra
import numpy as np
import omegaconf
import sam2
import torch
import torch.nn.functional as F
import yaml
from einops import rearrange
from numpy.typing import ArrayLike

from data import clip_to
from runtime.files import load_weights, read_safetensors, read_torch
from runtime.pictures import overlay
from runtime.registry import find

# What other files use. `overlay` is here because whoever makes a mask wants to see it.
__all__ = ["ASM", "SEGMENTERS", "load_asm", "overlay", "segment_regions"]

# Start of a spec -> function (path, device, multimask, image_size) that returns an ASM, or any
# object with segment(image, boxes, points) -> (masks, scores). The path is the rest of the spec.
# A spec that starts with none of these is a SAM 2.
SEGMENTERS = {
    "medsam:": "extras.sam1.load_medsam",
    "sam-med2d:": "extras.sam1.load_sam_med2d",
}

SAM2_CONFIG = Path(sam2.__file__).parent / "configs/sam2.1/sam2.1_hiera_t.yaml"
# MedSAM2's side, and what sam2's build_sam2 adds: an unstable single mask gives way to the best of
# three.
MEDSAM2 = {
    "image_size": 512,
    "sam_mask_decoder_extra_args": {
        "dynamic_multimask_via_stability": True,
        "dynamic_multimask_stability_delta": 0.05,
        "dynamic_multimask_stability_thresh": 0.98,
    },
}
# ImageNet's mean and deviation, as SAM 2 was trained.
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
# An encoded image: its embedding (B, D, S/16, S/16) and finer maps [(B, D/8, S/4, S/4),
# (B, D/4, S/8, S/8)].
Features = tuple[torch.Tensor, list[torch.Tensor]]
# The prompt encoder's labels: the two corners of a box, a click on the target, a click off it.
BOX_LABELS = (2, 3)
ON_TARGET = 1
OFF_TARGET = 0


# ---------------------------------------------------------------- image


def check_image(image: np.ndarray) -> None:
    """ValueError, one line, for anything but a uint8 RGB array (H, W, 3) with a pixel or more."""
    is_array = isinstance(image, np.ndarray)
    if is_array and image.dtype == np.uint8 and image.shape[2:] == (3,) and image.size > 0:
        return
    found = type(image).__name__
    if is_array:
        found = f"{image.dtype} {image.shape}"
    raise ValueError(
        f"image: a uint8 RGB array (H, W, 3) is needed, not {found}; "
        'np.asarray(picture.convert("RGB")) makes one from any PIL picture'
    )


def normalise(pixels: torch.Tensor) -> torch.Tensor:
    """RGB (..., 3, H, W) in [0, 1] -> the same shape, shifted and scaled by MEAN and STD."""
    mean = pixels.new_tensor(MEAN)[:, None, None]
    std = pixels.new_tensor(STD)[:, None, None]
    return (pixels - mean) / std


def image_features(model: torch.nn.Module, pixels: torch.Tensor) -> Features:
    """Run SAM 2's image encoder.

    pixels  (B, 3, S, S), normalised
    ->      the embedding and the finer maps, see Features
    """
    levels = model.forward_image(pixels)["backbone_fpn"][-model.num_feature_levels :]
    finer = levels[:-1]
    embedding = levels[-1]
    if model.directly_add_no_mem_embed:  # a still image is a first frame: no memory yet
        embedding = embedding + model.no_mem_embed.view(1, -1, 1, 1)
    return embedding, finer


# ---------------------------------------------------------------- prompts


def numeric_array(name: str, value: ArrayLike, shape: str) -> np.ndarray:
    """Numbers as an array. ValueError for anything else, with the argument's name and the shape."""
    try:
        array = np.asarray(value)
    except ValueError as error:
        raise ValueError(
            f"{name}: numbers {shape} are needed, not lists of unequal lengths"
        ) from error
    if array.dtype.kind not in "iuf":
        raise ValueError(f"{name}: numbers {shape} are needed, not {array.dtype} {array.shape}")
    return array


def coordinates(name: str, value: ArrayLike, ndim: int, last: int, shape: str) -> torch.Tensor:
    """Coordinates as float32, of a shape with `ndim` axes of which the last has `last` entries.
    ValueError for anything else, for none at all, and for numbers that are not finite."""
    array = numeric_array(name, value, shape)
    if array.ndim != ndim or array.shape[-1] != last or array.size == 0:
        raise ValueError(f"{name}: numbers {shape} are needed, not {array.dtype} {array.shape}")
    tensor = torch.tensor(array, dtype=torch.float32)
    if not tensor.isfinite().all():
        raise ValueError(f"{name}: every coordinate must be finite")
    return tensor


def box_corners(boxes: ArrayLike) -> torch.Tensor:
    """Boxes (n, 4) -> their upper left and lower right corners (n, 2, 2)."""
    tensor = coordinates("boxes", boxes, 2, 4, "(n, 4)")
    return rearrange(tensor, "n (corner xy) -> n corner xy", xy=2)


def point_labels(labels: ArrayLike | None, points: torch.Tensor) -> torch.Tensor:
    """One label for each of the points (n, m, 2): (n, m) int64, ON_TARGET everywhere if labels is
    None. ValueError for labels of another shape and for values other than ON_TARGET, OFF_TARGET."""
    n, m, _ = points.shape
    if labels is None:
        return torch.full((n, m), ON_TARGET)
    array = numeric_array("labels", labels, "(n, m)")
    if array.shape != (n, m):
        raise ValueError(f"labels: one for each point, {(n, m)}, is needed, not {array.shape}")
    if not np.isin(array, (ON_TARGET, OFF_TARGET)).all():
        raise ValueError(f"labels: {ON_TARGET} is on the target, {OFF_TARGET} off it; no others")
    return torch.tensor(array, dtype=torch.int64)


def prompt_tokens(
    boxes: ArrayLike | None,
    points: ArrayLike | None,
    image_hw: tuple[int, int],
    side: int,
    labels: ArrayLike | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What the prompt encoder takes. A box becomes its two corners, before the points.

    boxes     (n, 4), image frame; or None
    points    (n, m, 2), image frame; or None, but not both
    image_hw  height and width of the image
    side      S, of the network's square
    labels    (n, m), 1 for a point on the target, 0 for one off it; None for all 1
    ->        coordinates (n, k, 2) float32 in the network's square, x / W * S and y / H * S;
              their labels (n, k) int64. k is 2, m or 2 + m.
    """
    if boxes is None and points is None:
        raise ValueError("boxes and points are both None: the segmenter needs at least one of them")
    if points is None and labels is not None:
        raise ValueError("labels: they belong to points, and there are none")
    coordinate_parts = []
    label_parts = []
    if boxes is not None:
        corners = box_corners(boxes)
        coordinate_parts.append(corners)
        label_parts.append(torch.tensor(BOX_LABELS).expand(len(corners), -1))
    if points is not None:
        clicks = coordinates("points", points, 3, 2, "(n, m, 2)")
        coordinate_parts.append(clicks)
        label_parts.append(point_labels(labels, clicks))
    if len(coordinate_parts[0]) != len(coordinate_parts[-1]):
        raise ValueError(
            f"{len(boxes)} boxes but {len(points)} sets of points: give one of each per mask"
        )
    height, width = image_hw
    in_image = torch.cat(coordinate_parts, dim=1)
    in_square = in_image / torch.tensor([width, height]) * side
    return in_square, torch.cat(label_parts, dim=1)


# ---------------------------------------------------------------- the segmenter


class ASM:
    """A frozen SAM 2 and the configuration that built it. It keeps the last image's features."""

    def __init__(self, model: torch.nn.Module, config: dict, multimask: bool = False) -> None:
        self.model = model.eval().requires_grad_(False)
        self.config = config
        self.multimask = multimask
        self.last_image = None
        self.last_features = None

    def encode(self, image: np.ndarray) -> Features:
        """(H, W, 3) uint8 -> features for `decode`. The image is squashed to a square, antialiased,
        and normalised, as torchvision's ToTensor, Resize and Normalize do."""
        contiguous = np.array(image, order="C")
        pixels = rearrange(torch.from_numpy(contiguous), "h w c -> 1 c h w").float() / 255
        square = (self.model.image_size, self.model.image_size)
        pixels = F.interpolate(pixels, square, mode="bilinear", antialias=True)
        return image_features(self.model, normalise(pixels).to(self.model.device))

    def decode(
        self,
        features: Features,
        coords: torch.Tensor,
        labels: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Candidate masks of each prompt.

        features  what `encode` returns
        coords    (n, k, 2), in the network's square
        labels    (n, k)
        ->        logits (n, c, S/4, S/4) and predicted IoU (n, c) of c candidates per prompt:
                  1, or 3 with multimask
        """
        embedding, finer = features
        sparse, dense = self.model.sam_prompt_encoder(
            points=(coords, labels), boxes=None, masks=None
        )
        logits, scores, _, _ = self.model.sam_mask_decoder(
            image_embeddings=embedding,
            image_pe=self.model.sam_prompt_encoder.get_dense_pe(),
            repeat_image=True,
            sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=dense,
            high_res_features=finer,
            multimask_output=self.multimask,
        )
        return logits, scores

    def enlarge(self, logits: torch.Tensor, image_hw: tuple[int, int]) -> torch.Tensor:
        """One mask's logits (S/4, S/4) -> (H, W) bool."""
        return F.interpolate(logits[None, None], image_hw, mode="bilinear")[0, 0] > 0

    def is_last_image(self, image: np.ndarray) -> bool:
        """Whether these pixels were encoded last. A read-only array is recognised by identity, and
        np.asarray of a PIL image is one. A writable array may have been changed in place since, so
        its pixels are compared."""
        if image is self.last_image:
            return True
        return np.array_equal(image, self.last_image)

    def features(self, image: np.ndarray) -> Features:
        """`encode`, once per image, however many prompts are asked of it one after the other."""
        if not self.is_last_image(image):
            self.last_features = self.encode(image)
            self.last_image = image.copy() if image.flags.writeable else image
        return self.last_features

    @torch.no_grad()
    def logits(
        self,
        image: np.ndarray,
        boxes: ArrayLike | None = None,
        points: ArrayLike | None = None,
        labels: ArrayLike | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Each prompt's best mask, before it is enlarged. Arguments and errors as in `segment`.

        ->  logits (n, S/4, S/4) of the square image; predicted IoU (n,); on the model's device
        """
        check_image(image)
        image_hw = image.shape[:2]
        coords, kinds = prompt_tokens(boxes, points, image_hw, self.model.image_size, labels)
        device = self.model.device
        logits, scores = self.decode(self.features(image), coords.to(device), kinds.to(device))
        best = scores.argmax(dim=1)
        rows = torch.arange(len(scores), device=device)
        return logits[rows, best], scores[rows, best]

    def segment(
        self,
        image: np.ndarray,
        boxes: ArrayLike | None = None,
        points: ArrayLike | None = None,
        labels: ArrayLike | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """One mask per prompt. The image is encoded once for all of them.

        image   (H, W, 3) uint8, RGB
        boxes   (n, 4) numbers, x1 y1 x2 y2, image frame; or None
        points  (n, m, 2) numbers, m times (x, y), image frame; or None, but not both
        labels  (n, m) numbers, 1 for a point on the target, 0 for one off it; None for all 1
        ->      masks (n, H, W) bool; scores (n,) float32, the network's own estimate of each
                mask's IoU
        ValueError, one line, for any other image or prompt.
        """
        logits, scores = self.logits(image, boxes, points, labels)
        # One by one: n masks of a large scan in float32 would take gigabytes.
        masks = [self.enlarge(mask_logits, image.shape[:2]) for mask_logits in logits]
        return torch.stack(masks).cpu().numpy(), scores.cpu().numpy()


def segment_regions(
    asm: ASM,
    image: np.ndarray,
    regions: Iterable[tuple[Sequence | None, Sequence | None]],
) -> tuple[np.ndarray, list[float]]:
    """The masks of an answer's regions, united.

    asm      an ASM, or any object with its `segment`
    image    (H, W, 3) uint8, RGB
    regions  (bbox, points) each: x1 y1 x2 y2 and a list of (x, y), image frame; either may be None,
             and a region without both is left out
    ->       mask (H, W) bool; the segmenter's own score of each region that has something
    Coordinates are clipped, because no segmenter was trained on boxes far outside their image.
    """
    height, width = image.shape[:2]
    mask = np.zeros((height, width), dtype=bool)
    scores = []
    for bbox, points in regions:
        if not bbox and not points:
            continue
        boxes = [clip_to((width, height), bbox)] if bbox else None
        point_sets = [clip_to((width, height), points)] if points else None
        region_masks, region_scores = asm.segment(image, boxes, point_sets)
        mask |= region_masks[0]
        scores.append(float(region_scores[0]))
    return mask, scores


# ---------------------------------------------------------------- what a configuration may call
#
# A yaml tells hydra which classes to call (`_target_`). So a yaml from the internet could name any
# function of Python. Before anything is built, each of its names is looked up in the yaml of the
# sam2 package. A name that is not there is an error, and nothing is called.


def called_names(node: object) -> set[str]:
    """Everything that building a configuration, or a part of it, may call.

    That is every `_target_`, and every text with a reference in it: hydra resolves references after
    this check, and `oc.create` makes a `_target_` out of a string."""
    names = set()
    if isinstance(node, dict):
        if "_target_" in node:
            names.add(str(node["_target_"]))
        for value in node.values():
            names |= called_names(value)
    elif isinstance(node, list):
        for value in node:
            names |= called_names(value)
    elif "${" in str(node):
        names.add(str(node))
    return names


def check_called_names(config: dict, source: str | Path) -> None:
    """ValueError if a configuration calls what sam2's own does not. `source` is its file."""
    allowed = called_names(read_config(SAM2_CONFIG))
    unknown = called_names(config) - allowed
    if unknown:
        raise ValueError(
            f"{source}: `_target_: {min(unknown)}` is no part of SAM 2 and was not called"
        )


# ---------------------------------------------------------------- loading


def read_config(file: str | Path) -> dict:
    """A yaml with the structure of sam2's own, references resolved. ValueError names the file."""
    try:
        config = omegaconf.OmegaConf.to_container(omegaconf.OmegaConf.load(file), resolve=True)
    except (yaml.YAMLError, UnicodeDecodeError, omegaconf.errors.OmegaConfBaseException) as error:
        problem = str(error).splitlines()[0]
        raise ValueError(f"{file}: not a model's yaml: {problem}") from error
    if not isinstance(config, dict) or not isinstance(config.get("model"), dict):
        raise ValueError(f"{file}: no `model:` section, which sam2's own {SAM2_CONFIG.name} has")
    return config


def build_model(config: dict, source: str | Path) -> torch.nn.Module:
    """Untrained SAM 2 from a configuration. ValueError names `source`, where that came from."""
    check_called_names(config, source)
    try:
        return hydra.utils.instantiate(config["model"])
    except hydra.errors.InstantiationException as error:
        problem = str(error).splitlines()[0]
        raise ValueError(f"{source}: no SAM 2 can be built: {problem}") from error


def read_checkpoint(file: Path) -> dict[str, torch.Tensor]:
    """The state_dict in a released file {"model": state_dict}. ValueError names the file."""
    content = read_torch(file)
    weights = content.get("model") if isinstance(content, dict) else None
    if not isinstance(weights, dict):
        raise ValueError(
            f'{file}: {{"model": state_dict}} is needed, as in MedSAM2_latest.pt; others '
            f"start with one of: {' '.join(SEGMENTERS)}"
        )
    return weights


def load_sam2(
    path: str | Path,
    device: str | torch.device,
    multimask: bool = False,
    image_size: int | None = None,
) -> ASM:
    """A SAM 2 from a folder or a MedSAM2 checkpoint. Arguments and errors as in `load_asm`."""
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(
            f"{path}: no such ASM; give a folder with config.yaml and model.safetensors, "
            f"MedSAM2_latest.pt, or one of: {' '.join(SEGMENTERS)} (prefix of a path)"
        )
    if image_size is not None and (image_size < 32 or image_size % 32 != 0):
        raise ValueError(f"image_size: a multiple of 32 is needed, not {image_size}")
    if path.is_dir():
        config = read_config(path / "config.yaml")
        weights = read_safetensors(path / "model.safetensors")
    else:
        weights = read_checkpoint(path)
        config = read_config(SAM2_CONFIG)
        config["model"] |= MEDSAM2
    if image_size is not None:
        config["model"]["image_size"] = image_size
    model = build_model(config, path)
    load_weights(model, weights, path)
    return ASM(model.to(device), config, multimask)


def load_asm(
    spec: str | Path,
    device: str | torch.device,
    multimask: bool = False,
    image_size: int | None = None,
) -> ASM:
    """A frozen segmenter.

    spec        a folder with config.yaml and model.safetensors; a file {"model": state_dict} of
                sam2.1 hiera_t; or a prefix in SEGMENTERS with what belongs to it
    device      where the network runs
    multimask   request three masks and keep the one with the best predicted score (SAM-Med2D
                always does)
    image_size  side of the network's square, a multiple of 32; None for the model's own. MedSAM
                and SAM-Med2D have one size
    ->          an ASM, or what the function in SEGMENTERS returns
    FileNotFoundError or ValueError, one line naming the file and the key, if there is no such
    model.
    """
    spec = str(spec)
    for prefix, entry in SEGMENTERS.items():
        if spec.startswith(prefix):
            load = find(entry)
            path = spec.removeprefix(prefix)
            return load(path, device, multimask=multimask, image_size=image_size)
    return load_sam2(spec, device, multimask, image_size)
