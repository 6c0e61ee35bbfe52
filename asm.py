"""Anatomical Segmentation Module: a frozen promptable segmenter turns an image, boxes and points into masks.

    asm = load_asm("demo/asm", "cpu")                # a folder of ours: config.yaml and model.safetensors
    asm = load_asm("MedSAM2_latest.pt", "cuda")      # a released checkpoint: {"model": state_dict}
    masks, scores = asm.segment(image, boxes=[[40, 30, 90, 80]], points=[[[60, 50], [75, 60]]])
    overlay(image, masks[0], (40, 30, 90, 80), ((60, 50), (75, 60))).save("overlay.png")

The network is SAM 2.1 (arXiv 2408.00714) from the `sam2` package; MedSAM2 (arXiv 2504.03600) is its hiera_t
fine-tuned at 512 px. The package's own predictor needs torchvision and knows feature maps of 1024 px only, so
preparing image and prompts is written out here; test_asm.py holds it against that predictor.

Differences from the paper's released code:
1. The image side is the checkpoint's own, 512 for MedSAM2 (released: 1024; `image_size=1024` gives that).
2. A box with two points is an unambiguous prompt, so one mask is asked for (released: three, keeping the one
   of best predicted score; `multimask=True` gives that).
3. Images are RGB (the released demo feeds BGR).
"""
import pickle
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
from PIL import Image, ImageChops, ImageDraw, ImageFilter

SAM2_CONFIG = Path(sam2.__file__).parent / "configs/sam2.1/sam2.1_hiera_t.yaml"
# MedSAM2's side, and what sam2's own build_sam2 adds: a single mask with a shaky edge yields to the three
MEDSAM2 = {"image_size": 512, "sam_mask_decoder_extra_args": {
    "dynamic_multimask_via_stability": True, "dynamic_multimask_stability_delta": 0.05,
    "dynamic_multimask_stability_thresh": 0.98}}
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, as SAM 2 was trained
BOX_LABELS, POINT_LABELS = (2, 3), (1, 1)  # the prompt encoder's names: two corners, two clicks on the target
UNREADABLE = (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, LookupError, TypeError,
              AttributeError, AssertionError, OverflowError)  # what torch.load says of garbage, by fuzzing it
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
    """Boxes (n, 4) and points (n, 2, 2), image frame, either may be None -> coordinates (n, k, 2) in the
    network's square and labels (n, k). A box is two corners and stands before the clicks; k is 2 or 4."""
    given = [(xy.reshape(-1, 2, 2), labels) for xy, labels in ((boxes, BOX_LABELS), (points, POINT_LABELS))
             if xy is not None]
    coords = torch.cat([xy for xy, _ in given], 1) / torch.tensor(image_hw[::-1], dtype=torch.float32) * size
    return coords, torch.tensor([label for _, labels in given for label in labels]).expand(len(coords), -1)


def image_features(model, pixels):
    """(B, 3, S, S) -> embedding (B, D, S/16, S/16), finer maps [(B, D/8, S/4, S/4), (B, D/4, S/8, S/8)]."""
    *finer, embedding = model.forward_image(pixels)["backbone_fpn"][-model.num_feature_levels:]
    if model.directly_add_no_mem_embed:  # a still image is a first frame: nothing remembered
        embedding = embedding + model.no_mem_embed.view(1, -1, 1, 1)
    return embedding, finer


def _checked_prompts(name, value, shape):
    """None, or a float32 tensor (n, *shape) of finite numbers, n at least 1."""
    if value is None:
        return None
    array = np.asarray(value)
    if array.dtype.kind not in "iuf" or array.shape[1:] != shape or array.size == 0:
        wanted = str(shape).strip("(,)")
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

    @torch.no_grad()
    def logits(self, image, boxes=None, points=None):
        """Mask logits (n, S/4, S/4) of the squashed image and predicted IoU (n,), on the model's device.
        Arguments and errors as in `segment`."""
        found = f"{image.dtype} {image.shape}" if isinstance(image, np.ndarray) else type(image).__name__
        if not found.startswith("uint8") or image.shape[2:] != (3,) or not image.size:
            raise ValueError(f"image: a uint8 RGB array (H, W, 3) is needed, not {found}; "
                             'np.asarray(picture.convert("RGB")) makes one of any PIL picture')
        boxes, points = _checked_prompts("boxes", boxes, (4,)), _checked_prompts("points", points, (2, 2))
        if boxes is None and points is None:
            raise ValueError("boxes and points are both None: the segmenter needs at least one of them")
        if boxes is not None and points is not None and len(boxes) != len(points):
            raise ValueError(f"{len(boxes)} boxes but {len(points)} pairs of points: one of each per mask")
        model, size, device = self.model, self.model.image_size, self.model.device
        coords, labels = (x.to(device) for x in prompt_tokens(boxes, points, image.shape[:2], size))
        if not np.array_equal(image, self.last[0]):
            self.last = image.copy(), image_features(model, pixels_from_image(image, size)[None].to(device))
        embedding, finer = self.last[1]
        sparse, dense = model.sam_prompt_encoder(points=(coords, labels), boxes=None, masks=None)
        logits, scores, _, _ = model.sam_mask_decoder(  # (n, m, S/4, S/4), (n, m); m: 1 or, with multimask, 3
            image_embeddings=embedding, image_pe=model.sam_prompt_encoder.get_dense_pe(), repeat_image=True,
            sparse_prompt_embeddings=sparse, dense_prompt_embeddings=dense, high_res_features=finer,
            multimask_output=self.multimask)
        best = scores.argmax(1, keepdim=True)  # (n, 1)
        return logits.take_along_dim(best[..., None, None], 1)[:, 0], scores.take_along_dim(best, 1)[:, 0]

    def segment(self, image, boxes=None, points=None):
        """One mask per prompt; the image is encoded once for all of them.

        image   (H, W, 3) uint8, RGB
        boxes   (n, 4) numbers, x1 y1 x2 y2, image frame; or None
        points  (n, 2, 2) numbers, two (x, y) on the target, image frame; or None, but not both
        ->      masks (n, H, W) bool; scores (n,) float32, the network's own guess of each mask's IoU
        ValueError for any other image or prompt.
        """
        logits, scores = self.logits(image, boxes, points)
        # one by one: the n masks of a large scan in float are gigabytes
        masks = [F.interpolate(low[None, None], image.shape[:2], mode="bilinear")[0, 0] > 0 for low in logits]
        return torch.stack(masks).cpu().numpy(), scores.cpu().numpy()


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


def load_weights(model, weights, source):
    """Copy {name: tensor} into the model, cast to its float32. ValueError names the source and the first keys
    that are missing, unexpected or of another shape."""
    wanted = model.state_dict()
    reshaped = {key for key in wanted.keys() & weights.keys() if np.shape(weights[key]) != wanted[key].shape}
    problems = {"missing": wanted.keys() - weights.keys(), "unexpected": weights.keys() - wanted.keys(),
                "of another shape": reshaped}
    told = [f"{len(names)} {what} ({', '.join(sorted(map(str, names))[:3])}{', ...' * (len(names) > 3)})"
            for what, names in problems.items() if names]
    if told:
        raise ValueError(f"{source}: its keys do not fit the model: {'; '.join(told)}")
    model.load_state_dict(weights)


def _read_folder(folder):
    for file in (folder / "config.yaml", weights_file := folder / "model.safetensors"):
        if not file.is_file():
            raise FileNotFoundError(f"{file}: no such file; an ASM folder has config.yaml, model.safetensors")
    try:
        return read_config(folder / "config.yaml"), safetensors.torch.load_file(weights_file)
    except safetensors.SafetensorError as error:
        raise ValueError(f"{weights_file}: not a safetensors file: {error}") from error


def _read_checkpoint(file):
    try:
        held = torch.load(file, map_location="cpu", weights_only=True)
    except UNREADABLE as error:
        raise ValueError(f"{file}: no torch file of plain tensors ({type(error).__name__})") from error
    if not isinstance(held, dict) or not isinstance(held.get("model"), dict):
        found = f"a dict of {list(held)[:3]}" if isinstance(held, dict) else type(held).__name__
        raise ValueError(f'{file}: {{"model": state_dict}} is needed, as in MedSAM2_latest.pt, not {found}')
    config = read_config(SAM2_CONFIG)
    config["model"] |= MEDSAM2
    return config, held["model"]


def load_asm(spec, device, multimask=False, image_size=None):
    """A frozen ASM from a folder of ours (`save_asm`) or a file {"model": state_dict} of sam2.1 hiera_t.

    multimask   ask for three masks and keep the one of best predicted score
    image_size  side of the network's square, a multiple of 32; None for the model's own
    FileNotFoundError or ValueError, one line naming the file and the key, where no such model is.
    """
    if str(spec).startswith(("medsam:", "sam-med2d:")):
        raise ValueError(f"{spec}: MedSAM and SAM-Med2D are not supported yet; give a MedSAM2 file")
    path = Path(spec)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such ASM; give a folder of ours or a MedSAM2 file")
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
