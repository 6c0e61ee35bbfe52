"""MedSAM and SAM-Med2D: their released layout, their equations, their images, their masks."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import Script
from test_asm import BOXES, POINTS, is_one_line, noise_image

from asm import load_asm
from demo.make.asm import DEMO, PREPARED, PREPARED_SIDE
from extras.sam1 import (
    MEDSAM_SIDE,
    SAM_MED2D_SIDE,
    MedSAM,
    SAMMed2D,
    build_sam,
    released_name,
)

SIDES = {"medsam": MEDSAM_SIDE, "sam-med2d": SAM_MED2D_SIDE}
HAS_ADAPTERS = {"medsam": False, "sam-med2d": True}
SMALL_SIDE = 128
SMALL = dict(
    hidden_size=24,
    num_hidden_layers=3,
    num_attention_heads=2,
    global_attn_indexes=[1],
    window_size=3,
)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """The models are so small that on busy cores a second thread is only waited for."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# ---------------------------------------------------------------- the released layout


class Layout:
    """Name -> shape of every weight of a released SAM, in `shapes`."""

    def __init__(self):
        self.shapes = {}

    def add(self, name, *shape):
        self.shapes[name] = shape

    def weight(self, name, *shape):
        self.add(f"{name}.weight", *shape)

    def linear(self, name, out, *inner):
        """A weight (out, *inner) and a bias (out,)."""
        self.add(f"{name}.weight", out, *inner)
        self.add(f"{name}.bias", out)

    def norm(self, name, width):
        self.linear(name, width)

    def transposed(self, name, inner, out):
        """A transposed convolution of 2 by 2."""
        self.add(f"{name}.weight", inner, out, 2, 2)
        self.add(f"{name}.bias", out)

    def attention(self, name, width, inner):
        for part in "qkv":
            self.linear(f"{name}.{part}_proj", inner, width)
        self.linear(f"{name}.out_proj", width, inner)

    def mlp(self, name, width, out):
        self.linear(f"{name}.layers.0", width, width)
        self.linear(f"{name}.layers.1", width, width)
        self.linear(f"{name}.layers.2", out, width)


def image_encoder_layout(layout, side, width, depth, heads, global_blocks, window, has_adapters):
    D = 256
    layout.add("image_encoder.pos_embed", 1, side, side, width)
    layout.linear("image_encoder.patch_embed.proj", width, 3, 16, 16)
    for i in range(depth):
        block = f"image_encoder.blocks.{i}"
        reach = side if i in global_blocks else window
        layout.norm(f"{block}.norm1", width)
        layout.norm(f"{block}.norm2", width)
        layout.linear(f"{block}.attn.qkv", 3 * width, width)
        layout.linear(f"{block}.attn.proj", width, width)
        layout.add(f"{block}.attn.rel_pos_h", 2 * reach - 1, width // heads)
        layout.add(f"{block}.attn.rel_pos_w", 2 * reach - 1, width // heads)
        layout.linear(f"{block}.mlp.lin1", 4 * width, width)
        layout.linear(f"{block}.mlp.lin2", width, 4 * width)
        if has_adapters:
            layout.norm(f"{block}.Adapter.norm", width)
            layout.weight(f"{block}.Adapter.channel.0", width // 4, width)
            layout.weight(f"{block}.Adapter.channel.2", width, width // 4)
            layout.weight(f"{block}.Adapter.spatial.0", width, width, 3, 3)
            layout.weight(f"{block}.Adapter.spatial.2", width, width, 4, 4)
    layout.weight("image_encoder.neck.0", D, width, 1, 1)
    layout.norm("image_encoder.neck.1", D)
    layout.weight("image_encoder.neck.2", D, D, 3, 3)
    layout.norm("image_encoder.neck.3", D)


def prompt_encoder_layout(layout):
    D = 256
    layout.add("prompt_encoder.pe_layer.positional_encoding_gaussian_matrix", 2, D // 2)
    for i in range(4):
        layout.weight(f"prompt_encoder.point_embeddings.{i}", 1, D)
    layout.weight("prompt_encoder.not_a_point_embed", 1, D)
    layout.weight("prompt_encoder.no_mask_embed", 1, D)
    layout.linear("prompt_encoder.mask_downscaling.0", 4, 1, 2, 2)
    layout.norm("prompt_encoder.mask_downscaling.1", 4)
    layout.linear("prompt_encoder.mask_downscaling.3", 16, 4, 2, 2)
    layout.norm("prompt_encoder.mask_downscaling.4", 16)
    layout.linear("prompt_encoder.mask_downscaling.6", D, 16, 1, 1)


def mask_decoder_layout(layout):
    D = 256
    for i in range(2):
        layer = f"mask_decoder.transformer.layers.{i}"
        layout.attention(f"{layer}.self_attn", D, D)
        layout.attention(f"{layer}.cross_attn_token_to_image", D, D // 2)
        layout.attention(f"{layer}.cross_attn_image_to_token", D, D // 2)
        for number in (1, 2, 3, 4):
            layout.norm(f"{layer}.norm{number}", D)
        layout.linear(f"{layer}.mlp.lin1", 2048, D)
        layout.linear(f"{layer}.mlp.lin2", D, 2048)
    layout.attention("mask_decoder.transformer.final_attn_token_to_image", D, D // 2)
    layout.norm("mask_decoder.transformer.norm_final_attn", D)
    layout.weight("mask_decoder.iou_token", 1, D)
    layout.weight("mask_decoder.mask_tokens", 4, D)
    layout.transposed("mask_decoder.output_upscaling.0", D, D // 4)
    layout.norm("mask_decoder.output_upscaling.1", D // 4)
    layout.transposed("mask_decoder.output_upscaling.3", D // 4, D // 8)
    for i in range(4):
        layout.mlp(f"mask_decoder.output_hypernetworks_mlps.{i}", D, D // 8)
    layout.mlp("mask_decoder.iou_prediction_head", D, 4)


def released_layout(size, width, depth, heads, global_blocks, window, has_adapters):
    """Name -> shape of every weight of a released SAM."""
    layout = Layout()
    image_encoder_layout(
        layout, size // 16, width, depth, heads, global_blocks, window, has_adapters
    )
    prompt_encoder_layout(layout)
    mask_decoder_layout(layout)
    return layout.shapes


def random_weights(has_adapters):
    """A small SAM's weights, random, under their released names."""
    generator = torch.Generator().manual_seed(0)
    weights = {}
    for name, shape in released_layout(SMALL_SIDE, 24, 3, 2, [1], 3, has_adapters).items():
        fan_in = max(1, np.prod(shape[1:]))
        weights[name] = torch.randn(shape, generator=generator) / fan_in**0.5
    return weights


def small_sam(family, tmp_path, monkeypatch):
    """The spec of a small random model of the family, saved as its released file is, and the
    weights in it. load_asm builds the small one from here on."""

    def build_small(image_size, adapters=False):
        return build_sam(SMALL_SIDE, adapters, **SMALL)

    monkeypatch.setattr("extras.sam1.build_sam", build_small)
    weights = random_weights(HAS_ADAPTERS[family])
    file = tmp_path / "released.pth"
    torch.save({"model": weights} if family == "sam-med2d" else weights, file)
    return f"{family}:{file}", weights


@pytest.mark.parametrize("family", SIDES)
def test_the_released_layout_is_this_one_key_by_key(family):
    size = SIDES[family]
    with torch.device("meta"):
        model = build_sam(size, HAS_ADAPTERS[family])
    found = {}
    for name, tensor in model.state_dict().items():
        found[released_name(name)] = tuple(tensor.shape)
    expected = released_layout(size, 768, 12, 12, [2, 5, 8, 11], 14, HAS_ADAPTERS[family])
    assert found == expected


@pytest.mark.parametrize("family", SIDES)
def test_the_decoders_layer_norms_have_sams_epsilon(family):
    with torch.device("meta"):
        decoder = build_sam(SIDES[family], HAS_ADAPTERS[family]).mask_decoder.transformer
    norms = [module for module in decoder.modules() if isinstance(module, torch.nn.LayerNorm)]
    assert {norm.eps for norm in norms} == {1e-5}


# ---------------------------------------------------------------- the equations, slowly


class SlowSAM:
    """The first SAM in float64 from its released weights: one window, one head, one prompt at a
    time."""

    def __init__(self, weights, heads, global_blocks, window):
        self.w = {name: tensor.double() for name, tensor in weights.items()}
        self.heads = heads
        self.global_blocks = global_blocks
        self.window = window

    def linear(self, name, x):
        return x @ self.w[f"{name}.weight"].T + self.w.get(f"{name}.bias", 0)

    def norm(self, name, x, eps):
        centred = x - x.mean(-1, keepdim=True)
        deviation = (x.var(-1, unbiased=False, keepdim=True) + eps).sqrt()
        return centred / deviation * self.w[f"{name}.weight"] + self.w[f"{name}.bias"]

    def transposed(self, name, x):
        """A transposed convolution of 2 by 2: (1, C, h, w) -> (1, C', 2 h, 2 w)."""
        weight = self.w[f"{name}.weight"]
        return F.conv_transpose2d(x, weight, self.w[f"{name}.bias"], stride=2)

    # image encoder

    def window_attention(self, name, x):
        """Attention with relative positions inside one window (H, W, C)."""
        H, W, C = x.shape
        d = C // self.heads
        query, key, value = self.linear(f"{name}.qkv", x).split(C, dim=-1)
        by_row = self.w[f"{name}.rel_pos_h"]
        by_column = self.w[f"{name}.rel_pos_w"]
        out = torch.zeros_like(x)
        for head in range(self.heads):
            channels = slice(head * d, (head + 1) * d)
            q = query[..., channels]
            k = key[..., channels]
            v = value[..., channels]
            for row in range(H):
                for column in range(W):
                    own = q[row, column]
                    score = (k @ own) / d**0.5
                    score = score + (by_row[row - torch.arange(H) + H - 1] @ own)[:, None]
                    score = score + by_column[column - torch.arange(W) + W - 1] @ own
                    share = score.flatten().softmax(0).reshape(H, W)
                    out[row, column, channels] = torch.einsum("hw,hwc->c", share, v)
        return self.linear(f"{name}.proj", out)

    def attention(self, name, x, side):
        """Attention in windows of side x side over a map (S, S, C), padded with zeros."""
        S, _, C = x.shape
        padded_side = -(-S // side) * side
        padded = torch.zeros(padded_side, padded_side, C, dtype=x.dtype)
        padded[:S, :S] = x
        for top in range(0, S, side):
            for left in range(0, S, side):
                rows = slice(top, top + side)
                columns = slice(left, left + side)
                padded[rows, columns] = self.window_attention(name, padded[rows, columns].clone())
        return padded[:S, :S]

    def adapter(self, name, x):
        """SAM-Med2D's adapter, of a map (S, S, C)."""
        squeezed = self.linear(f"{name}.channel.0", x.mean((0, 1))).relu()
        gate = self.linear(f"{name}.channel.2", squeezed).sigmoid()
        gated = (x * gate).permute(2, 0, 1)[None]
        down = self.w[f"{name}.spatial.0.weight"]
        up = self.w[f"{name}.spatial.2.weight"]
        maps = F.conv2d(gated, down, stride=2, padding=1).relu()
        maps = F.conv_transpose2d(maps, up, stride=2, padding=1).relu()
        return self.norm(f"{name}.norm", x + maps[0].permute(1, 2, 0), 1e-5)

    def block(self, i, x):
        name = f"image_encoder.blocks.{i}"
        side = len(x) if i in self.global_blocks else self.window
        x = x + self.attention(f"{name}.attn", self.norm(f"{name}.norm1", x, 1e-6), side)
        normed = self.norm(f"{name}.norm2", x, 1e-6)
        hidden = F.gelu(self.linear(f"{name}.mlp.lin1", normed))
        added = self.linear(f"{name}.mlp.lin2", hidden)
        if f"{name}.Adapter.norm.weight" in self.w:
            added = added + self.adapter(f"{name}.Adapter", normed)
        return x + added

    def encode(self, pixels):
        """(1, 3, S, S) -> (S/16, S/16, 256)."""
        patch = "image_encoder.patch_embed.proj"
        weight = self.w[f"{patch}.weight"]
        x = F.conv2d(pixels.double(), weight, self.w[f"{patch}.bias"], stride=16)
        x = x[0].permute(1, 2, 0) + self.w["image_encoder.pos_embed"][0]
        depth = sum(name.endswith("attn.qkv.weight") for name in self.w)
        for i in range(depth):
            x = self.block(i, x)
        x = x @ self.w["image_encoder.neck.0.weight"][:, :, 0, 0].T
        x = self.norm("image_encoder.neck.1", x, 1e-6)
        x = x.permute(2, 0, 1)[None]
        x = F.conv2d(x, self.w["image_encoder.neck.2.weight"], padding=1)[0]
        return self.norm("image_encoder.neck.3", x.permute(1, 2, 0), 1e-6)

    # prompts

    def place(self, xy):
        """Coordinates in [0, 1] -> sines and cosines."""
        frequencies = self.w["prompt_encoder.pe_layer.positional_encoding_gaussian_matrix"]
        angle = 2 * np.pi * ((2 * xy.double() - 1) @ frequencies)
        return torch.cat([angle.sin(), angle.cos()], -1)

    def prompt(self, box, points, size):
        """Tokens (k, 256) of one prompt: points, then a box's two corners, or a filler."""
        kinds = [1] * len(points) + [2, 3][: len(box)]
        tokens = []
        for xy, kind in zip([*points, *box], kinds, strict=True):
            place = self.place((torch.as_tensor(xy) + 0.5) / size)
            tokens.append(place + self.w[f"prompt_encoder.point_embeddings.{kind}.weight"][0])
        if len(box) == 0:
            tokens.append(self.w["prompt_encoder.not_a_point_embed.weight"][0])
        return torch.stack(tokens)

    def grid_places(self, side):
        """Places of the cells of a map, (side * side, 256)."""
        axis = (torch.arange(side) + 0.5) / side
        xy = torch.stack([axis.expand(side, side), axis[:, None].expand(side, side)], -1)
        return self.place(xy).reshape(side * side, -1)

    # mask decoder

    def attend(self, name, query, key, value):
        q = self.linear(f"{name}.q_proj", query)
        k = self.linear(f"{name}.k_proj", key)
        v = self.linear(f"{name}.v_proj", value)
        d = q.shape[1] // 8
        heads = []
        for start in range(0, 8 * d, d):
            channels = slice(start, start + d)
            share = (q[:, channels] @ k[:, channels].T / d**0.5).softmax(-1)
            heads.append(share @ v[:, channels])
        return self.linear(f"{name}.out_proj", torch.cat(heads, 1))

    def mlp(self, name, x):
        x = self.linear(f"{name}.layers.0", x).relu()
        x = self.linear(f"{name}.layers.1", x).relu()
        return self.linear(f"{name}.layers.2", x)

    def two_way(self, i, q, tokens, image, where):
        """One layer: the tokens look at themselves, at the image, and the image at them."""
        name = f"mask_decoder.transformer.layers.{i}"
        if i == 0:
            q = self.attend(f"{name}.self_attn", q, q, q)
        else:
            q = q + self.attend(f"{name}.self_attn", q + tokens, q + tokens, q)
        q = self.norm(f"{name}.norm1", q, 1e-5)
        looked = self.attend(f"{name}.cross_attn_token_to_image", q + tokens, image + where, image)
        q = self.norm(f"{name}.norm2", q + looked, 1e-5)
        hidden = self.linear(f"{name}.mlp.lin1", q).relu()
        q = self.norm(f"{name}.norm3", q + self.linear(f"{name}.mlp.lin2", hidden), 1e-5)
        seen = self.attend(f"{name}.cross_attn_image_to_token", image + where, q + tokens, q)
        image = self.norm(f"{name}.norm4", image + seen, 1e-5)
        return q, image

    def upscale(self, image, side):
        """(side * side, 256) -> (32, 4 side, 4 side)."""
        name = "mask_decoder.output_upscaling"
        x = self.transposed(f"{name}.0", image.reshape(1, side, side, -1).permute(0, 3, 1, 2))
        x = self.norm(f"{name}.1", x.permute(0, 2, 3, 1), 1e-6)
        x = F.gelu(x).permute(0, 3, 1, 2)
        return F.gelu(self.transposed(f"{name}.3", x))[0]

    def decode(self, features, box, points, size):
        """One prompt -> logits (4, h, w) and scores (4): first the single mask, then the three."""
        tokens = torch.cat(
            [
                self.w["mask_decoder.iou_token.weight"],
                self.w["mask_decoder.mask_tokens.weight"],
                self.prompt(box, points, size),
            ]
        )
        side = len(features)
        where = self.grid_places(side)
        image = features + self.w["prompt_encoder.no_mask_embed.weight"][0]
        image = image.reshape(side * side, -1)
        q = tokens
        for i in range(2):
            q, image = self.two_way(i, q, tokens, image, where)
        final = "mask_decoder.transformer.final_attn_token_to_image"
        looked = self.attend(final, q + tokens, image + where, image)
        q = self.norm("mask_decoder.transformer.norm_final_attn", q + looked, 1e-5)
        maps = self.upscale(image, side)
        masks = []
        for i in range(4):
            weights = self.mlp(f"mask_decoder.output_hypernetworks_mlps.{i}", q[1 + i])
            masks.append(torch.einsum("c,chw->hw", weights, maps))
        return torch.stack(masks), self.mlp("mask_decoder.iou_prediction_head", q[0])


@pytest.mark.parametrize("boxes, points", [(BOXES, POINTS), (BOXES, None), (None, POINTS)])
@pytest.mark.parametrize("multimask", [False, True])
@pytest.mark.parametrize("family", SIDES)
def test_the_first_sam_gives_what_its_equations_give(
    family, boxes, points, multimask, tmp_path, monkeypatch
):
    spec, weights = small_sam(family, tmp_path, monkeypatch)
    asm = load_asm(spec, "cpu", multimask)
    image = noise_image()
    height, width, _ = image.shape
    scale = np.array([width, height]) / SMALL_SIDE
    slow = SlowSAM(weights, 2, [1], 3)
    features = slow.encode(asm.prepare(image))
    logits, scores = asm.logits(image, boxes, points)
    for i in range(3):
        box = () if boxes is None else boxes[i].reshape(2, 2) / scale
        pair = () if points is None else points[i] / scale
        all_four, quality = slow.decode(features, box, pair, SMALL_SIDE)
        best = 0
        if multimask or family == "sam-med2d":
            best = 1 + quality[1:].argmax()
        torch.testing.assert_close(logits[i].double(), all_four[best], atol=1e-4, rtol=1e-3)
        torch.testing.assert_close(scores[i].double(), quality[best], atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("boxes", [BOXES, None])
@pytest.mark.parametrize("family", SIDES)
def test_a_point_off_the_target_changes_its_own_mask_only(family, boxes, tmp_path, monkeypatch):
    spec, _ = small_sam(family, tmp_path, monkeypatch)
    asm = load_asm(spec, "cpu")
    unlabelled, _ = asm.logits(noise_image(), boxes, POINTS)
    mixed, _ = asm.logits(noise_image(), boxes, POINTS, labels=[[1, 1], [1, 0], [1, 1]])
    torch.testing.assert_close(mixed[[0, 2]], unlabelled[[0, 2]], atol=2e-5, rtol=0)
    assert (mixed[1] - unlabelled[1]).abs().max() > 2e-4  # little: the weights are random


# ---------------------------------------------------------------- images and masks


@pytest.mark.parametrize("name", ["wide", "small", "flat"])
def test_images_are_prepared_as_scikit_image_and_opencv_do(name):
    """The fixture is what demo.make.asm --prepared wrote where those two are installed."""
    recorded = np.load(PREPARED)
    image = recorded[f"{name}/image"]
    model = build_sam(PREPARED_SIDE, **SMALL)
    contrast = MedSAM(model, {}).prepare(image)[0].permute(1, 2, 0).numpy()
    assert np.array_equal(contrast, recorded[f"{name}/medsam"].astype(np.float32))
    nearest = SAMMed2D(model, {}).prepare(image)[0].permute(1, 2, 0).numpy()
    mean = np.array([123.675, 116.28, 103.53])
    deviation = np.array([58.395, 57.12, 57.375])
    expected = (recorded[f"{name}/sam-med2d"] - mean) / deviation
    np.testing.assert_allclose(nearest, expected, atol=1e-5)


def bilinear(maps, size):
    return F.interpolate(maps, size, mode="bilinear", align_corners=False)


@pytest.mark.parametrize("family", SIDES)
def test_the_first_sams_masks_have_the_images_size_and_are_made_its_way(
    family, tmp_path, monkeypatch
):
    spec, _ = small_sam(family, tmp_path, monkeypatch)
    asm = load_asm(spec, "cpu")
    masks, scores = asm.segment(noise_image(), BOXES, POINTS)
    assert masks.shape == (3, 61, 203)
    assert masks.dtype == bool
    assert 0 < masks.mean() < 1
    assert scores.shape == (3,)
    logits, _ = asm.logits(noise_image(), BOXES, POINTS)
    low = logits[:, None]
    if family == "medsam":
        expected = bilinear(low.sigmoid(), (61, 203)) > 0.5
    else:
        expected = bilinear(bilinear(low, (SMALL_SIDE, SMALL_SIDE)), (61, 203)) > 0
    assert np.array_equal(masks, expected[:, 0].numpy())


# ---------------------------------------------------------------- loading


def test_a_folder_in_the_layout_of_transformers_loads_and_gives_the_same(tmp_path, monkeypatch):
    spec, _ = small_sam("medsam", tmp_path, monkeypatch)
    asm = load_asm(spec, "cpu")
    asm.model.save_pretrained(tmp_path / "hf")
    again = load_asm(f"medsam:{tmp_path / 'hf'}", "cpu")
    saved, _ = asm.logits(noise_image(), BOXES)
    loaded, _ = again.logits(noise_image(), BOXES)
    assert torch.equal(loaded, saved)
    (tmp_path / "hf/model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="hf/model.safetensors"):
        load_asm(f"medsam:{tmp_path / 'hf'}", "cpu")


@pytest.mark.parametrize(
    "family, other, message",
    [
        ("medsam", "sam-med2d", "Missing .*mlp.channel"),
        ("sam-med2d", "medsam", "Unexpected .*Adapter"),
    ],
)
def test_one_familys_file_is_rejected_as_anothers(family, other, message, tmp_path, monkeypatch):
    spec, _ = small_sam(family, tmp_path, monkeypatch)
    expected = f"released.pth: its keys do not fit the model: .*{message}"
    with pytest.raises(ValueError, match=expected) as raised:
        load_asm(spec.replace(family, other, 1), "cpu")
    assert is_one_line(raised)


@pytest.mark.parametrize("family", SIDES)
def test_a_sam2_folder_is_rejected_as_a_first_sam(family, tmp_path, monkeypatch):
    small_sam(family, tmp_path, monkeypatch)
    with pytest.raises(ValueError, match="asm: its keys do not fit the model: .* Missing"):
        load_asm(f"{family}:{DEMO / 'asm'}", "cpu")


def test_a_released_file_without_its_prefix_is_told_the_prefixes(tmp_path, monkeypatch):
    small_sam("medsam", tmp_path, monkeypatch)
    with pytest.raises(ValueError, match="start with one of: medsam: sam-med2d:"):
        load_asm(tmp_path / "released.pth", "cpu")


@pytest.mark.parametrize("family", SIDES)
def test_an_image_size_of_ones_own_is_rejected(family, tmp_path, monkeypatch):
    spec, _ = small_sam(family, tmp_path, monkeypatch)
    with pytest.raises(ValueError, match=f"image_size: {family} has one size"):
        load_asm(spec, "cpu", image_size=512)


@pytest.mark.parametrize("family", SIDES)
def test_what_is_not_there_and_what_is_no_state_dict_is_named(family, tmp_path, monkeypatch):
    small_sam(family, tmp_path, monkeypatch)
    with pytest.raises(FileNotFoundError, match="x.pth: no such ASM"):
        load_asm(f"{family}:x.pth", "cpu")
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(ValueError, match="list.pth: a state_dict is needed, not list"):
        load_asm(f"{family}:{tmp_path / 'list.pth'}", "cpu")


def test_the_first_sam_is_imported_only_when_it_is_asked_for(tmp_path):
    (tmp_path / "check.py").write_text("""
import sys
from asm import load_asm
load_asm("demo/asm", "cpu")
assert "extras.sam1" not in sys.modules
try:
    load_asm("medsam:nowhere", "cpu")
except FileNotFoundError:
    assert "extras.sam1" in sys.modules
else:
    raise AssertionError("nowhere is not there")
""")
    script = Script(tmp_path / "check.py")
    said = script.communicate()
    assert script.returncode == 0, said
