"""Anatomical Segmentation Module: a frozen promptable segmenter turns an image, boxes and points into masks.

    asm = load_asm("demo/asm", "cpu")                           # a folder: config.yaml, model.safetensors
    asm = load_asm("MedSAM2_latest.pt", "cuda")                 # a released checkpoint: {"model": state_dict}
    asm = load_asm("medsam:medsam_vit_b.pth", "cuda")           # extras/sam1.py: MedSAM and SAM-Med2D
    masks, scores = asm.segment(image, boxes=[[40, 30, 90, 80]], points=[[[60, 50], [75, 60]]])
    overlay(image, masks[0], (40, 30, 90, 80), ((60, 50), (75, 60))).save("overlay.png")

The network is SAM 2.1 (arXiv 2408.00714) from the `sam2` package; MedSAM2 (arXiv 2504.03600) is its hiera_t
fine-tuned at 512 px. The package's own predictor needs torchvision and a 1024 px model, so images and prompts
are prepared here; tests/test_asm.py compares the two. Your own segmenter: SEGMENTERS. Read next: infer.py.

Differences from the paper's released code:
1. The image side is the checkpoint's own, 512 for MedSAM2 (released: 1024; `image_size=1024` gives that).
2. A box with two points is unambiguous, so one mask is requested (released: three, keeping the one with the
   best predicted score; `multimask=True` gives that).
3. Images are RGB (the released demo feeds BGR).
"""

from functools import partial
from pathlib import Path

import hydra
import numpy as np
import omegaconf
import sam2
import torch
import torch.nn.functional as F
import yaml
from einops import rearrange

from runtime.files import load_weights, read_safetensors, read_torch

SAM2_CONFIG = Path(sam2.__file__).parent / "configs/sam2.1/sam2.1_hiera_t.yaml"
# MedSAM2's side, and what sam2's build_sam2 adds: an unstable single mask gives way to the best of three
MEDSAM2 = {
    "image_size": 512,
    "sam_mask_decoder_extra_args": {
        "dynamic_multimask_via_stability": True,
        "dynamic_multimask_stability_delta": 0.05,
        "dynamic_multimask_stability_thresh": 0.98,
    },
}
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, as SAM 2 was trained
# the prompt encoder's labels: the two corners of a box, a click on the target, a click beside it
BOX_LABELS, POINT_LABEL, NEGATIVE_LABEL = (2, 3), (1,), (0,)


def normalise(pixels):
    """RGB (..., 3, H, W) in [0, 1] -> the same shape, shifted and scaled by ImageNet's mean and deviation."""
    return (pixels - pixels.new_tensor(MEAN)[:, None, None]) / pixels.new_tensor(STD)[:, None, None]


def image_features(model, pixels):
    """(B, 3, S, S) -> embedding (B, D, S/16, S/16), finer maps [(B, D/8, S/4, S/4), (B, D/4, S/8, S/8)]."""
    *finer, embedding = model.forward_image(pixels)["backbone_fpn"][-model.num_feature_levels :]
    if model.directly_add_no_mem_embed:  # a still image is a first frame: no memory yet
        embedding = embedding + model.no_mem_embed.view(1, -1, 1, 1)
    return embedding, finer


def prompt_tensor(name, value):
    """ "boxes", numbers (n, 4), or "points", numbers (n, m, 2) -> the same as float32. ValueError for anything
    else, for none at all (n or m is 0), and for numbers that are not finite."""
    ndim, last, shape = {"boxes": (2, 4, "(n, 4)"), "points": (3, 2, "(n, m, 2)")}[name]
    array = np.asarray(value)
    if (
        array.dtype.kind not in "iuf"
        or array.ndim != ndim
        or array.shape[-1] != last
        or array.size == 0
    ):
        raise ValueError(f"{name}: numbers {shape} are needed, not {array.dtype} {array.shape}")
    tensor = torch.tensor(array, dtype=torch.float32)
    if not tensor.isfinite().all():
        raise ValueError(f"{name}: every coordinate must be finite")
    return tensor


def prompt_tokens(boxes, points, image_hw, size, negative=0):
    """Boxes (n, 4) and points (n, m, 2), image frame, one may be None -> coordinates (n, k, 2) in the
    network's square and labels (n, k). A box is two corners, before the points: k is 2, m or 2 + m. The last `negative`
    points of a prompt are off the target."""
    if boxes is None and points is None:
        raise ValueError("boxes and points are both None: the segmenter needs at least one of them")
    coords, labels = [], []
    if boxes is not None:
        coords.append(
            rearrange(prompt_tensor("boxes", boxes), "n (corner xy) -> n corner xy", xy=2)
        )
        labels += BOX_LABELS
    if points is not None:
        coords.append(prompt_tensor("points", points))
        labels += POINT_LABEL * (coords[-1].shape[1] - negative) + NEGATIVE_LABEL * negative
    if len(coords[0]) != len(coords[-1]):
        raise ValueError(
            f"{len(boxes)} boxes but {len(points)} sets of points: give one of each per mask"
        )
    H, W = image_hw
    coords = torch.cat(coords, 1) / torch.tensor([W, H]) * size
    return coords, torch.tensor(labels).expand(len(coords), -1)


class ASM:
    """A frozen SAM 2 and the configuration that built it. It keeps the last image's features."""

    def __init__(self, model, config, multimask=False):
        self.model, self.config, self.multimask = (
            model.eval().requires_grad_(False),
            config,
            multimask,
        )
        self.last_image, self.last_features = None, None

    def encode(self, image):
        """(H, W, 3) uint8 -> features for `decode`. The image is squashed to a square (antialiased) and
        normalised, as torchvision's ToTensor, Resize and Normalize do."""
        pixels = (
            rearrange(torch.from_numpy(np.array(image, order="C")), "h w c -> 1 c h w").float()
            / 255
        )
        square = [self.model.image_size] * 2
        pixels = normalise(F.interpolate(pixels, square, mode="bilinear", antialias=True))
        return image_features(self.model, pixels.to(self.model.device))

    def decode(self, features, coords, labels):
        """Coordinates (n, k, 2) and labels (n, k) -> logits (n, c, S/4, S/4) and predicted IoU (n, c) of c
        candidates per prompt: 1, or 3 with multimask."""
        embedding, finer = features
        sparse, dense = self.model.sam_prompt_encoder(
            points=(coords, labels), boxes=None, masks=None
        )
        return self.model.sam_mask_decoder(
            image_embeddings=embedding,
            image_pe=self.model.sam_prompt_encoder.get_dense_pe(),
            repeat_image=True,
            sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=dense,
            high_res_features=finer,
            multimask_output=self.multimask,
        )[:2]

    def enlarge(self, logits, image_hw):
        """One mask's logits (S/4, S/4) -> (H, W) bool."""
        return F.interpolate(logits[None, None], image_hw, mode="bilinear")[0, 0] > 0

    def features(self, image):
        """`encode`, once per image. A read-only array (np.asarray of a PIL image is one) is recognised by
        identity; a writable one may have been changed in place, so its pixels are compared."""
        if image is not self.last_image and not np.array_equal(image, self.last_image):
            self.last_features = self.encode(image)
            self.last_image = image.copy() if image.flags.writeable else image
        return self.last_features

    @torch.no_grad()
    def logits(self, image, boxes=None, points=None, negative=0):
        """Mask logits (n, S/4, S/4) of the square image and predicted IoU (n,), on the model's device.
        Arguments and errors as in `segment`."""
        is_array = isinstance(image, np.ndarray)
        if not is_array or image.dtype != np.uint8 or image.shape[2:] != (3,) or image.size == 0:
            found = f"{image.dtype} {image.shape}" if is_array else type(image).__name__
            raise ValueError(
                f"image: a uint8 RGB array (H, W, 3) is needed, not {found}; "
                'np.asarray(picture.convert("RGB")) makes one from any PIL picture'
            )
        coords, labels = prompt_tokens(
            boxes, points, image.shape[:2], self.model.image_size, negative
        )
        device = self.model.device
        logits, scores = self.decode(self.features(image), coords.to(device), labels.to(device))
        best, rows = scores.argmax(1), torch.arange(len(scores), device=device)
        return logits[rows, best], scores[rows, best]

    def segment(self, image, boxes=None, points=None, negative=0):
        """One mask per prompt; the image is encoded once for all of them.
        image   (H, W, 3) uint8, RGB
        boxes   (n, 4) numbers, x1 y1 x2 y2, image frame; or None
        points  (n, m, 2) numbers, m times (x, y) on the target, image frame; or None, but not both
        negative  how many of the m, the last ones, are off the target
        ->      masks (n, H, W) bool; scores (n,) float32, the network's own estimate of each mask's IoU
        ValueError, one line, for any other image or prompt.
        """
        logits, scores = self.logits(image, boxes, points, negative)
        # one by one: n masks of a large scan in float32 would take gigabytes
        masks = [self.enlarge(low, image.shape[:2]) for low in logits]
        return torch.stack(masks).cpu().numpy(), scores.cpu().numpy()


def read_config(file):
    """A yaml with the structure of sam2's own -> dict, references resolved. ValueError names the file."""
    try:
        config = omegaconf.OmegaConf.to_container(omegaconf.OmegaConf.load(file), resolve=True)
    except (yaml.YAMLError, UnicodeDecodeError, omegaconf.errors.OmegaConfBaseException) as error:
        raise ValueError(f"{file}: not a model's yaml: {str(error).splitlines()[0]}") from error
    if not isinstance(config, dict) or not isinstance(config.get("model"), dict):
        raise ValueError(f"{file}: no `model:` section, which sam2's own {SAM2_CONFIG.name} has")
    return config


def called_names(node):
    """What building a configuration may call: every `_target_`, and every reference, because hydra resolves
    references after this check (`oc.create` makes a `_target_` out of a string)."""
    if isinstance(node, dict):
        own = {str(node["_target_"])} if "_target_" in node else set()
        return own.union(*map(called_names, node.values()))
    if isinstance(node, list):
        return set().union(*map(called_names, node))
    return {str(node)} if "${" in str(node) else set()


def build_model(config, source):
    """Untrained SAM 2 from a configuration. ValueError names `source`, where the configuration came from."""
    strange = called_names(config) - called_names(read_config(SAM2_CONFIG))
    if strange:
        raise ValueError(
            f"{source}: `_target_: {min(strange)}` is no part of SAM 2 and was not called"
        )
    try:
        return hydra.utils.instantiate(config["model"])
    except hydra.errors.InstantiationException as error:
        raise ValueError(
            f"{source}: no SAM 2 can be built: {str(error).splitlines()[0]}"
        ) from error


def load_sam2(path, device, multimask=False, image_size=None):
    """An ASM from a folder or a MedSAM2 checkpoint. Arguments, errors: see load_asm."""
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(
            f"{path}: no such ASM; give a folder with config.yaml and model.safetensors, "
            f"MedSAM2_latest.pt, or one of: {' '.join(SEGMENTERS)} (prefix of a path)"
        )
    if image_size is not None and (image_size < 32 or image_size % 32):
        raise ValueError(f"image_size: a multiple of 32 is needed, not {image_size}")
    if path.is_dir():
        config, weights = (
            read_config(path / "config.yaml"),
            read_safetensors(path / "model.safetensors"),
        )
    else:
        held = read_torch(path)
        weights = held.get("model") if isinstance(held, dict) else None
        if not isinstance(weights, dict):
            raise ValueError(
                f'{path}: {{"model": state_dict}} is needed, as in MedSAM2_latest.pt; others '
                f"start with one of: {' '.join(SEGMENTERS)}"
            )
        config = read_config(SAM2_CONFIG)
        config["model"] |= MEDSAM2
    if image_size is not None:
        config["model"]["image_size"] = image_size
    model = build_model(config, path)
    load_weights(model, weights, path)
    return ASM(model.to(device), config, multimask)


def load_first_sam(family, path, device, **options):
    from extras.sam1 import load_sam  # only when it is asked for

    return load_sam(family, path, device, **options)


# start of a spec -> loader(rest of the spec, device, multimask=, image_size=) -> any object with
# segment(image, boxes, points) -> (masks, scores), as in ASM. Any other spec is a SAM 2.
SEGMENTERS = {
    "medsam:": partial(load_first_sam, "medsam"),
    "sam-med2d:": partial(load_first_sam, "sam-med2d"),
}


def load_asm(spec, device, multimask=False, image_size=None):
    """A frozen segmenter from a spec: a folder with config.yaml and model.safetensors, a file
    {"model": state_dict} of sam2.1 hiera_t, or a prefix in SEGMENTERS with what belongs to it.
    multimask   request three masks and keep the one with the best predicted score (SAM-Med2D always does)
    image_size  side of the network's square, a multiple of 32; None for the model's own. SAM 2 only
    FileNotFoundError or ValueError, one line naming the file and the key, if there is no such model.
    """
    spec = str(spec)
    for prefix, load in SEGMENTERS.items():
        if spec.startswith(prefix):
            return load(
                spec.removeprefix(prefix), device, multimask=multimask, image_size=image_size
            )
    return load_sam2(spec, device, multimask, image_size)


def overlay(image, mask=None, bbox=None, points=None):
    """The picture with mask, box and key points drawn in, a PIL image; arguments as in runtime/pictures.py."""
    from runtime.pictures import draw  # only when it is asked for

    return draw(image, mask, bbox, points)
