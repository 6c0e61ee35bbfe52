"""The segmenter: loading, refusing, prompting, drawing, and agreement with sam2's own predictor."""

import numpy as np
import pytest
import safetensors.torch
import torch
import yaml
from conftest import Script
from PIL import Image

import asm as asm_module
from asm import (
    ASM,
    MEDSAM2,
    SAM2_CONFIG,
    SEGMENTERS,
    build_model,
    load_asm,
    overlay,
    prompt_tokens,
    read_config,
)
from data import load_samples
from demo.make.asm import (
    HERE,
    PARITY,
    PREPARED,
    PREPARED_SIDE,
    PROMPT_KINDS,
    dice,
    parity_case,
    parity_prompts,
    predictor_answers,
    save_asm,
    tiny_config,
)
from extras.sam1 import MedSAM, SAMMed2D, build_sam, released_name
from runtime.pictures import OVERLAY_SIDE

BOXES = np.array([[10, 5, 60, 40], [30, 20, 90, 50], [100, 10, 180, 55]], dtype=float)
POINTS = np.array([[[20, 20], [40, 30]], [[50, 30], [70, 40]], [[120, 30], [150, 40]]], dtype=float)


def noise_image(height=61, width=203):
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """The models are so small that on busy cores a second thread is only waited for."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def tiny():
    torch.manual_seed(0)
    config = tiny_config(image_size=64, width=8)
    return ASM(build_model(config, "test"), config)


@pytest.fixture(scope="module")
def demo_asm():
    return load_asm(HERE / "asm", "cpu")


@pytest.fixture
def folder(tiny, tmp_path):
    save_asm(tiny, tmp_path / "asm")
    return tmp_path / "asm"


def rewrite(folder, change):
    weights = safetensors.torch.load_file(folder / "model.safetensors")
    change(weights)
    safetensors.torch.save_file(weights, folder / "model.safetensors")


# ---------------------------------------------------------------- loading


def test_a_saved_folder_gives_the_same_logits_and_masks_bit_for_bit(tiny, folder):
    again = load_asm(folder, "cpu")
    case = noise_image(), BOXES, POINTS
    for saved, loaded in zip(tiny.logits(*case), again.logits(*case)):
        assert torch.equal(saved, loaded)
    for saved, loaded in zip(tiny.segment(*case), again.segment(*case)):
        assert (saved == loaded).all()


def test_a_float16_folder_is_half_the_size_and_loads_as_float32(tiny, folder, tmp_path):
    save_asm(tiny, tmp_path / "half", torch.float16)
    sizes = [(place / "model.safetensors").stat().st_size for place in (tmp_path / "half", folder)]
    assert sizes[0] < 0.55 * sizes[1]
    half = load_asm(tmp_path / "half", "cpu")
    assert {p.dtype for p in half.model.parameters()} == {torch.float32}
    gap = (half.logits(noise_image(), BOXES)[0] - tiny.logits(noise_image(), BOXES)[0]).abs().max()
    assert 0 < gap < 0.05


def test_a_medsam2_checkpoint_loads_at_512_and_segments(tmp_path):
    # 39M parameters: the one test that builds the released architecture
    config = read_config(SAM2_CONFIG)
    torch.manual_seed(0)
    weights = build_model(config, "test").state_dict()
    file = tmp_path / "MedSAM2_latest.pt"
    torch.save({"model": {name: tensor.half() for name, tensor in weights.items()}}, file)
    asm = load_asm(str(file), "cpu")
    assert asm.model.image_size == MEDSAM2["image_size"] == 512
    assert asm.model.sam_mask_decoder.dynamic_multimask_via_stability  # as sam2's build_sam2 has it
    assert torch.equal(asm.model.no_mem_embed, weights["no_mem_embed"].half().float())
    masks, scores = asm.segment(noise_image(), BOXES, POINTS)
    assert masks.shape == (3, 61, 203) and np.isfinite(scores).all()
    assert asm.logits(noise_image(), BOXES)[0].shape == (3, 128, 128)


def test_image_size_overrides_the_folders_own(folder):
    assert load_asm(folder, "cpu", image_size=96).logits(noise_image(), BOXES)[0].shape == (
        3,
        24,
        24,
    )
    with pytest.raises(ValueError, match="image_size: a multiple of 32 .* not 100"):
        load_asm(folder, "cpu", image_size=100)


def test_multimask_reaches_the_model(folder):
    assert (
        load_asm(folder, "cpu", multimask=True).multimask and not load_asm(folder, "cpu").multimask
    )


def test_a_large_image_is_shrunk_with_antialiasing(tiny, monkeypatch):
    """Pillow's bilinear filter is antialiased, too; it is the oracle, a channel at a time in float."""
    seen, image = [], noise_image(190, 260)
    monkeypatch.setattr(asm_module, "image_features", lambda model, pixels: seen.append(pixels))
    tiny.encode(image)
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    for c in range(3):
        small = Image.fromarray(image[..., c].astype(np.float32)).resize(
            (64, 64), Image.Resampling.BILINEAR
        )
        assert (
            np.abs(seen[0][0, c].numpy() - (np.asarray(small) / 255 - mean[c]) / std[c]).max()
            < 1e-3
        )


def test_a_loaded_model_is_frozen(folder):
    asm = load_asm(folder, "cpu")
    assert not asm.model.training and not any(p.requires_grad for p in asm.model.parameters())
    with torch.enable_grad():
        assert not asm.logits(noise_image(), BOXES)[0].requires_grad


# ---------------------------------------------------------------- refusing to load


@pytest.mark.parametrize(
    "change, told",
    [
        (lambda w: w.pop("no_mem_embed"), r'asm: .* Missing .*"no_mem_embed"'),
        (lambda w: w.update(stranger=torch.zeros(1)), r'asm: .* Unexpected .*"stranger"'),
        (
            lambda w: w.update(no_mem_embed=torch.zeros(1, 1, 3)),
            r"asm: .* size mismatch for no_mem_embed",
        ),
        (
            lambda w: [w.pop(key) for key in sorted(w)[:50]],
            r'asm: .* Missing .*"image_encoder.*\[\.\.\.\]$',
        ),
    ],
)
def test_weights_that_do_not_fit_are_refused_by_key(folder, change, told):
    rewrite(folder, change)
    with pytest.raises(ValueError, match=told) as refusal:
        load_asm(folder, "cpu")
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"garbage",
        b"PK\x03\x04 garbage",
        b"\x80\x02garbage",
        b"0.garbage",
        b"\x8c\x01\xe9.",
        bytes(range(256)) * 9,
    ],
)
def test_a_garbage_file_is_refused_by_name(tmp_path, content):
    (tmp_path / "garbage.pt").write_bytes(content)
    with pytest.raises(
        ValueError, match="garbage.pt: not a torch file of plain tensors"
    ) as refusal:
        load_asm(tmp_path / "garbage.pt", "cpu")
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    "held, told",
    [
        ([1, 2], "start with one of"),
        ({"state": {}}, "medsam: sam-med2d:"),
        ({"model": 3}, "as in MedSAM2_latest.pt"),
    ],
)
def test_a_torch_file_without_a_state_dict_is_refused(tmp_path, held, told):
    torch.save(held, tmp_path / "other.pt")
    with pytest.raises(ValueError, match='other.pt: {"model": state_dict} is needed.*' + told):
        load_asm(tmp_path / "other.pt", "cpu")


class Payload:
    def __reduce__(self):
        return print, ("unpickled",)


def test_a_pickle_that_calls_something_is_refused_and_not_run(tmp_path, capsys):
    torch.save({"model": Payload()}, tmp_path / "evil.pt")
    with pytest.raises(ValueError, match="evil.pt: not a torch file of plain tensors"):
        load_asm(tmp_path / "evil.pt", "cpu")
    assert "unpickled" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "content, told",
    [
        (
            "model: {_target_: builtins.print, x: called}",
            "_target_: builtins.print` is no part of SAM 2",
        ),
        (
            "model: {_target_: sam2.modeling.sam2_base.SAM2Base, x: [{_target_: os.getcwd}]}",
            "os.getcwd",
        ),
        ("model: {_target_: sam2.modeling.sam2_base.SAM2Base}", "no SAM 2 can be built"),
        ("[1, 2]", "no `model:` section"),
        ("", "no `model:` section"),
        ("model: ${nowhere}", "not a model's yaml"),
        ("a: [", "not a model's yaml"),
    ],
)
def test_a_config_that_is_not_sam2s_is_refused_and_calls_nothing(folder, content, told, capsys):
    (folder / "config.yaml").write_text(content)
    with pytest.raises(ValueError, match="asm.*: .*" + told.replace("$", r"\$")) as refusal:
        load_asm(folder, "cpu")
    assert "\n" not in str(refusal.value) and capsys.readouterr().out == ""


@pytest.mark.parametrize(
    "value",
    [
        r"\${oc.create:{_target_:builtins.print,_args_:[called]}}",
        r"\\\${oc.create:{_target_:builtins.print,_args_:[called]}}",
        {"deep": [r"\${oc.create:{_target_:builtins.print,_args_:[called]}}"]},
        {b"key": {"_target_": "builtins.print", "_args_": ["called"]}},
        [{"_target_": "builtins.print", "_args_": ["called"]}],
    ],
)
def test_a_reference_cannot_hide_a_call_from_the_check(folder, value, capsys):
    """hydra resolves references once more when it builds, after the names were checked."""
    config = yaml.safe_load((folder / "config.yaml").read_text())
    config["model"]["image_encoder"]["hidden"] = value
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(
        ValueError, match="asm.*: `_target_: .* is no part of SAM 2 and was not called"
    ) as refusal:
        load_asm(folder, "cpu")
    assert "\n" not in str(refusal.value) and capsys.readouterr().out == ""


def test_what_is_not_there_is_named(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere: no such ASM"):
        load_asm(tmp_path / "nowhere", "cpu")
    (folder / "model.safetensors").write_bytes(b"garbage")
    with pytest.raises(ValueError, match="model.safetensors: not a safetensors file"):
        load_asm(folder, "cpu")
    (folder / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="asm/model.safetensors"):
        load_asm(folder, "cpu")
    (folder / "config.yaml").unlink()
    with pytest.raises(FileNotFoundError, match="asm/config.yaml"):
        load_asm(folder, "cpu")


# ---------------------------------------------------------------- a segmenter of one's own


class Otsu:
    """What is brighter than Otsu's threshold, inside the box: the smallest segmenter."""

    def segment(self, image, boxes=None, points=None):
        grey = image.mean(2)
        below = [grey <= level for level in range(255)]
        spread = [
            b.mean() * (1 - b.mean()) * (grey[b].mean() - grey[~b].mean()) ** 2
            if 0 < b.mean() < 1
            else 0
            for b in below
        ]
        masks = np.repeat(
            [~below[int(np.argmax(spread))]], len(points if boxes is None else boxes), 0
        )
        return masks, np.ones(len(masks), np.float32)


def test_a_segmenter_of_ones_own_is_one_entry_in_the_registry(monkeypatch):
    monkeypatch.setitem(SEGMENTERS, "otsu", lambda path, device, **options: Otsu())
    image = np.full((40, 50, 3), 30, np.uint8)
    image[10:20, 15:35] = 200
    masks, scores = load_asm("otsu", "cpu").segment(image, boxes=[[10, 5, 40, 25]])
    assert (
        masks.shape == (1, 40, 50)
        and np.array_equal(masks[0], image[..., 0] == 200)
        and len(scores) == 1
    )


def test_a_loader_gets_the_rest_of_the_spec_the_device_and_the_options(monkeypatch):
    monkeypatch.setitem(SEGMENTERS, "mine:", lambda *args, **options: (args, options))
    assert load_asm("mine:a:b.pt", "cuda", multimask=True, image_size=64) == (
        ("a:b.pt", "cuda"),
        {"multimask": True, "image_size": 64},
    )


def test_an_unknown_spec_is_one_line_that_names_what_there_is(monkeypatch):
    for spec in ("otsu", "sam:x.pth", "medsam", "nowhere/asm"):
        with pytest.raises(
            FileNotFoundError, match=f"^{spec}: no such ASM; .*config.yaml.*medsam: sam-med2d:"
        ) as refusal:
            load_asm(spec, "cpu")
        assert "\n" not in str(refusal.value)


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
""")
    script = Script(tmp_path / "check.py")
    said = script.communicate()
    assert script.returncode == 0, said


# ---------------------------------------------------------------- segmenting


@pytest.mark.parametrize("boxes, points", [(BOXES, POINTS), (BOXES, None), (None, POINTS)])
@pytest.mark.parametrize("multimask", [False, True])
def test_many_prompts_at_once_are_as_one_by_one(demo_asm, boxes, points, multimask):
    asm = ASM(demo_asm.model, demo_asm.config, multimask)
    image = parity_case(False)[1].repeat(2, 1)
    logits, scores = asm.logits(image, boxes, points)
    masks, _ = asm.segment(image, boxes, points)
    for i in range(3):
        one = [None if prompts is None else prompts[i : i + 1] for prompts in (boxes, points)]
        torch.testing.assert_close(asm.logits(image, *one)[0][0], logits[i], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(asm.logits(image, *one)[1][0], scores[i], atol=1e-5, rtol=1e-5)
        assert (asm.segment(image, *one)[0][0] == masks[i]).all()


@pytest.mark.parametrize("size", [(61, 203), (203, 61), (64, 64), (1, 17), (700, 900)])
def test_masks_have_the_images_own_size(tiny, size):
    masks, scores = tiny.segment(noise_image(*size), boxes=[[0, 0, size[1], size[0]]])
    assert masks.shape == (1, *size) and masks.dtype == bool
    assert scores.shape == (1,) and scores.dtype == np.float32


def test_an_image_is_encoded_once_for_all_that_is_asked_of_it(tiny):
    calls, image = [], 255 - noise_image()
    handle = tiny.model.image_encoder.register_forward_hook(lambda *_: calls.append(1))
    first, _ = tiny.segment(image, BOXES, POINTS)
    again, _ = tiny.segment(image.copy(), BOXES, POINTS)
    tiny.segment(image, BOXES[:1])
    assert len(calls) == 1 and np.array_equal(first, again)
    image[0, 0] ^= 255  # another image, even if it is the same array
    tiny.segment(image, BOXES, POINTS)
    handle.remove()
    assert len(calls) == 2


def test_the_same_read_only_array_is_not_compared_again(tiny, monkeypatch):
    image = np.asarray(Image.fromarray(255 - noise_image(70, 90)))
    assert not image.flags.writeable
    first, _ = tiny.segment(image, BOXES)
    monkeypatch.setattr(np, "array_equal", lambda *_: pytest.fail("the pixels were compared"))
    tiny.encode = lambda _: pytest.fail("the image was encoded again")
    try:
        assert (tiny.segment(image, BOXES)[0] == first).all()
    finally:
        del tiny.encode


def test_nothing_is_remembered_between_images(tiny):
    first = tiny.logits(noise_image(), BOXES)[0]
    tiny.segment(255 - noise_image(80, 80), BOXES, POINTS)
    assert torch.equal(first, tiny.logits(noise_image(), BOXES)[0])


def test_views_lists_and_whole_numbers_are_taken_as_they_are(tiny):
    mirrored = noise_image()[:, ::-1]
    frozen = np.ascontiguousarray(mirrored)
    frozen.flags.writeable = False
    expected = tiny.logits(frozen, BOXES)[0]
    assert torch.equal(tiny.logits(mirrored, BOXES.astype(int).tolist())[0], expected)


def test_prompts_scale_with_the_image(demo_asm):
    sample = load_samples(HERE / "data", "test")[0]
    twice = sample.image.resize([2 * side for side in sample.image.size], Image.Resampling.BICUBIC)
    small = demo_asm.segment(np.array(sample.image), [sample.bbox], [sample.points])[0][0]
    bbox, points = np.multiply(sample.bbox, 2), np.multiply(sample.points, 2)
    large = demo_asm.segment(np.array(twice), [bbox], [points])[0][0]
    assert dice(small, large[::2, ::2]) > 0.9


def test_any_number_of_points_may_stand_beside_a_box(tiny):
    image = noise_image()
    for count in (1, 2, 3):
        points = np.concatenate([POINTS, POINTS[:, :1]], 1)[:, :count]
        coords, labels = prompt_tokens(torch.tensor(BOXES), torch.tensor(points), (61, 203), 100)
        assert coords.shape == (3, 2 + count, 2) and labels.tolist() == [[2, 3] + count * [1]] * 3
        assert coords[:, 2:].numpy() == pytest.approx(points / [203, 61] * 100)
        masks, scores = tiny.segment(image, BOXES, points)
        assert masks.shape == (3, 61, 203) and scores.shape == (3,)


@pytest.mark.parametrize(
    "image, told",
    [
        (noise_image()[..., 0], r"uint8 \(61, 203\)"),
        (noise_image().astype(float), "float64"),
        (noise_image()[..., :2], r"\(61, 203, 2\)"),
        (np.zeros((0, 5, 3), np.uint8), r"\(0, 5, 3\)"),
        (Image.new("RGB", (9, 9)), "Image"),
        (np.zeros((2, 9, 9, 3), np.uint8), r"\(2, 9, 9, 3\)"),
    ],
)
def test_anything_but_a_uint8_rgb_array_is_refused(tiny, image, told):
    with pytest.raises(ValueError, match="image: a uint8 RGB array .*" + told):
        tiny.segment(image, BOXES)


@pytest.mark.parametrize(
    "prompts, told",
    [
        ({}, "both None"),
        ({"boxes": BOXES[0]}, r"boxes: numbers \(n, 4\) are needed, not float64 \(4,\)"),
        ({"boxes": BOXES[:, :3]}, r"boxes: .* \(3, 3\)"),
        ({"boxes": 3}, "boxes: "),
        ({"boxes": []}, "boxes: "),
        ({"points": POINTS[0]}, r"points: numbers \(n, m, 2\) .* float64 \(2, 2\)"),
        ({"boxes": BOXES[:0]}, r"boxes: .* \(0, 4\)"),
        ({"boxes": BOXES, "points": POINTS[:2]}, "3 boxes but 2 sets of points"),
        ({"boxes": [[0, 0, np.nan, 9]]}, "boxes: every coordinate must be finite"),
        ({"points": [[[0, np.inf]]]}, "points: every .* finite"),
        ({"boxes": [[0, 0, 9, 1e300]]}, "boxes: every .* finite"),
        ({"boxes": 3, "points": POINTS}, "boxes: numbers"),
        ({"points": POINTS[:, :0]}, r"points: .* \(3, 0, 2\)"),
        ({"boxes": [["a", "b", "c", "d"]]}, "boxes: numbers"),
        ({"boxes": BOXES > 0}, "boxes: numbers .* bool"),
    ],
)
def test_prompts_of_another_shape_are_refused(tiny, prompts, told):
    with pytest.raises(ValueError, match=told):
        tiny.segment(noise_image(), **prompts)


# ---------------------------------------------------------------- agreement with sam2's own predictor


@pytest.fixture(scope="module")
def predictor_says():
    """The recorded answers, and, where torchvision imports, those of the predictor itself."""
    sources = [dict(np.load(PARITY))]
    try:
        sources.append(predictor_answers())
    except (ImportError, RuntimeError):  # no torchvision, or one that was built for another torch
        pass
    return sources


@pytest.mark.parametrize("multimask", [False, True])
@pytest.mark.parametrize("kind", PROMPT_KINDS)
def test_sam2s_own_predictor_gives_the_same_answer(predictor_says, kind, multimask):
    asm, image = parity_case(multimask)
    logits, scores = asm.logits(image, **parity_prompts(kind))
    masks, _ = asm.segment(image, **parity_prompts(kind))
    for says in predictor_says:
        name = f"{kind}/{multimask}/"
        np.testing.assert_allclose(logits[0], says[name + "logits"], atol=2e-4)
        np.testing.assert_allclose(scores[0], says[name + "score"], atol=1e-5)
        assert masks[0].any() and (masks[0] != says[name + "mask"]).mean() < 1e-3


# ---------------------------------------------------------------- the demo's segmenter


def test_the_demo_segmenter_finds_what_it_is_shown(demo_asm):
    samples = load_samples(HERE / "data", "test")
    picked = [samples[int(i)] for i in np.random.default_rng(0).permutation(len(samples))[:60]]
    found = [
        dice(demo_asm.segment(np.array(s.image), [s.bbox], [s.points])[0][0], s.mask)
        for s in picked
    ]
    assert np.mean(found) >= 0.85


def test_the_demo_segmenter_is_small(demo_asm):
    assert sum(file.stat().st_size for file in (HERE / "asm").iterdir()) < 8e6
    assert sum(p.numel() for p in demo_asm.model.parameters()) < 4e6


# ---------------------------------------------------------------- MedSAM, SAM-Med2D

FAMILIES = ("medsam", "sam-med2d")
SMALL = dict(
    hidden_size=24,
    num_hidden_layers=3,
    num_attention_heads=2,
    global_attn_indexes=[1],
    window_size=3,
)


def released_layout(size, width, depth, heads, whole, window, adapters):
    """Name -> shape of every weight of a released SAM: image_encoder, prompt_encoder, mask_decoder."""
    side, D, shapes = size // 16, 256, {}

    def put(name, *shape, bias=None):
        shapes[f"{name}.weight"] = shape
        if bias is not None:
            shapes[f"{name}.bias"] = (bias,)

    shapes["image_encoder.pos_embed"] = (1, side, side, width)
    put("image_encoder.patch_embed.proj", width, 3, 16, 16, bias=width)
    for i in range(depth):
        block, reach = f"image_encoder.blocks.{i}.", side if i in whole else window
        for norm in ("norm1", "norm2") + ("Adapter.norm",) * adapters:
            put(block + norm, width, bias=width)
        put(block + "attn.qkv", 3 * width, width, bias=3 * width)
        put(block + "attn.proj", width, width, bias=width)
        for axis in "hw":
            shapes[f"{block}attn.rel_pos_{axis}"] = (2 * reach - 1, width // heads)
        put(block + "mlp.lin1", 4 * width, width, bias=4 * width)
        put(block + "mlp.lin2", width, 4 * width, bias=width)
        if adapters:
            put(block + "Adapter.channel.0", width // 4, width)
            put(block + "Adapter.channel.2", width, width // 4)
            put(block + "Adapter.spatial.0", width, width, 3, 3)
            put(block + "Adapter.spatial.2", width, width, 4, 4)
    put("image_encoder.neck.0", D, width, 1, 1)
    put("image_encoder.neck.1", D, bias=D)
    put("image_encoder.neck.2", D, D, 3, 3)
    put("image_encoder.neck.3", D, bias=D)
    shapes["prompt_encoder.pe_layer.positional_encoding_gaussian_matrix"] = (2, D // 2)
    for name in (
        *(f"point_embeddings.{i}" for i in range(4)),
        "not_a_point_embed",
        "no_mask_embed",
    ):
        put(f"prompt_encoder.{name}", 1, D)
    for i, shape in (
        (0, (4, 1, 2, 2)),
        (1, (4,)),
        (3, (16, 4, 2, 2)),
        (4, (16,)),
        (6, (D, 16, 1, 1)),
    ):
        put(f"prompt_encoder.mask_downscaling.{i}", *shape, bias=shape[0])
    for i in range(2):
        layer = f"mask_decoder.transformer.layers.{i}."
        for name, inner in (
            ("self_attn", D),
            ("cross_attn_token_to_image", D // 2),
            ("cross_attn_image_to_token", D // 2),
        ):
            for part in "qkv":
                put(f"{layer}{name}.{part}_proj", inner, D, bias=inner)
            put(f"{layer}{name}.out_proj", D, inner, bias=D)
        for norm in range(1, 5):
            put(f"{layer}norm{norm}", D, bias=D)
        put(layer + "mlp.lin1", 2048, D, bias=2048)
        put(layer + "mlp.lin2", D, 2048, bias=D)
    last = "mask_decoder.transformer.final_attn_token_to_image."
    for part in "qkv":
        put(f"{last}{part}_proj", D // 2, D, bias=D // 2)
    put(f"{last}out_proj", D, D // 2, bias=D)
    put("mask_decoder.transformer.norm_final_attn", D, bias=D)
    put("mask_decoder.iou_token", 1, D)
    put("mask_decoder.mask_tokens", 4, D)
    put("mask_decoder.output_upscaling.0", D, D // 4, 2, 2, bias=D // 4)
    put("mask_decoder.output_upscaling.1", D // 4, bias=D // 4)
    put("mask_decoder.output_upscaling.3", D // 4, D // 8, 2, 2, bias=D // 8)
    for head, out in (
        *((f"output_hypernetworks_mlps.{i}", D // 8) for i in range(4)),
        ("iou_prediction_head", 4),
    ):
        for i, (rows, columns) in enumerate(((D, D), (D, D), (out, D))):
            put(f"mask_decoder.{head}.layers.{i}", rows, columns, bias=rows)
    return shapes


class SlowSAM:
    """The first SAM in float64 from its released weights, one window, one head, one prompt at a time."""

    def __init__(self, weights, heads, whole, window):
        self.w = {name: tensor.double() for name, tensor in weights.items()}
        self.heads, self.whole, self.window = heads, whole, window

    def linear(self, name, x):
        return x @ self.w[f"{name}.weight"].T + self.w.get(f"{name}.bias", 0)

    def norm(self, name, x, eps):
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + eps).sqrt()
        return x * self.w[f"{name}.weight"] + self.w[f"{name}.bias"]

    def window_attention(self, name, x):
        H, W, C = x.shape
        qkv, d, out = self.linear(f"{name}.qkv", x), C // self.heads, torch.zeros_like(x)
        for head in range(self.heads):
            q, k, v = (
                qkv[..., part * C + head * d : part * C + (head + 1) * d] for part in range(3)
            )
            for y in range(H):
                for z in range(W):
                    score = (k @ q[y, z]) / d**0.5
                    score += (self.w[f"{name}.rel_pos_h"][y - torch.arange(H) + H - 1] @ q[y, z])[
                        :, None
                    ]
                    score += self.w[f"{name}.rel_pos_w"][z - torch.arange(W) + W - 1] @ q[y, z]
                    share = score.flatten().softmax(0).reshape(H, W)
                    out[y, z, head * d : (head + 1) * d] = torch.einsum("hw,hwc->c", share, v)
        return self.linear(f"{name}.proj", out)

    def encode(self, pixels):
        conv, w = torch.nn.functional.conv2d, self.w
        x = conv(
            pixels.double(),
            w["image_encoder.patch_embed.proj.weight"],
            w["image_encoder.patch_embed.proj.bias"],
            stride=16,
        )[0].permute(1, 2, 0)
        x = x + w["image_encoder.pos_embed"][0]
        S = len(x)
        for i in range(sum(name.endswith("attn.qkv.weight") for name in w)):
            block = f"image_encoder.blocks.{i}"
            normed, side = (
                self.norm(f"{block}.norm1", x, 1e-6),
                S if i in self.whole else self.window,
            )
            padded = torch.zeros(
                -(-S // side) * side, -(-S // side) * side, x.shape[-1], dtype=x.dtype
            )
            padded[:S, :S] = normed
            for y in range(0, S, side):
                for z in range(0, S, side):
                    padded[y : y + side, z : z + side] = self.window_attention(
                        f"{block}.attn", padded[y : y + side, z : z + side].clone()
                    )
            x = x + padded[:S, :S]
            normed = self.norm(f"{block}.norm2", x, 1e-6)
            added = self.linear(
                f"{block}.mlp.lin2",
                torch.nn.functional.gelu(self.linear(f"{block}.mlp.lin1", normed)),
            )
            if f"{block}.Adapter.norm.weight" in w:
                gate = self.linear(
                    f"{block}.Adapter.channel.2",
                    self.linear(f"{block}.Adapter.channel.0", normed.mean((0, 1))).relu(),
                ).sigmoid()
                maps = conv(
                    (normed * gate).permute(2, 0, 1)[None],
                    w[f"{block}.Adapter.spatial.0.weight"],
                    stride=2,
                    padding=1,
                ).relu()
                maps = torch.nn.functional.conv_transpose2d(
                    maps, w[f"{block}.Adapter.spatial.2.weight"], stride=2, padding=1
                ).relu()
                added = added + self.norm(
                    f"{block}.Adapter.norm", normed + maps[0].permute(1, 2, 0), 1e-5
                )
            x = x + added
        x = self.norm(
            "image_encoder.neck.1", x @ w["image_encoder.neck.0.weight"][:, :, 0, 0].T, 1e-6
        )
        x = conv(x.permute(2, 0, 1)[None], w["image_encoder.neck.2.weight"], padding=1)[0].permute(
            1, 2, 0
        )
        return self.norm("image_encoder.neck.3", x, 1e-6)  # (h, w, 256)

    def place(self, xy):
        """Coordinates in [0, 1] -> sines and cosines."""
        angle = (
            2
            * np.pi
            * (
                (2 * xy.double() - 1)
                @ self.w["prompt_encoder.pe_layer.positional_encoding_gaussian_matrix"]
            )
        )
        return torch.cat([angle.sin(), angle.cos()], -1)

    def attend(self, name, q, k, v):
        q, k, v = (self.linear(f"{name}.{part}_proj", x) for part, x in zip("qkv", (q, k, v)))
        d = q.shape[1] // 8
        heads = [
            (q[:, i : i + d] @ k[:, i : i + d].T / d**0.5).softmax(-1) @ v[:, i : i + d]
            for i in range(0, 8 * d, d)
        ]
        return self.linear(f"{name}.out_proj", torch.cat(heads, 1))

    def mlp(self, name, x):
        for i in range(3):
            x = self.linear(f"{name}.layers.{i}", x)
            x = x.relu() if i < 2 else x
        return x

    def decode(self, features, box, points, size):
        """One prompt -> logits (4, h, w) and scores (4): first the single mask, then the three."""
        w, prompt = self.w, []
        for xy, kind in [(xy, 1) for xy in points] + [(xy, 2 + i) for i, xy in enumerate(box)]:
            prompt.append(
                self.place((torch.as_tensor(xy) + 0.5) / size)
                + w[f"prompt_encoder.point_embeddings.{kind}.weight"][0]
            )
        if not len(box):
            prompt.append(w["prompt_encoder.not_a_point_embed.weight"][0])
        tokens = torch.cat(
            [
                w["mask_decoder.iou_token.weight"],
                w["mask_decoder.mask_tokens.weight"],
                torch.stack(prompt),
            ]
        )
        S = len(features)
        grid = (torch.arange(S) + 0.5) / S
        where = self.place(
            torch.stack([grid.expand(S, S), grid[:, None].expand(S, S)], -1)
        ).reshape(S * S, -1)
        image, q = (
            (features + w["prompt_encoder.no_mask_embed.weight"][0]).reshape(S * S, -1),
            tokens,
        )
        for i in range(2):
            layer = f"mask_decoder.transformer.layers.{i}"
            q = (
                self.attend(f"{layer}.self_attn", q, q, q)
                if i == 0
                else q + self.attend(f"{layer}.self_attn", q + tokens, q + tokens, q)
            )
            q = self.norm(f"{layer}.norm1", q, 1e-5)
            q = self.norm(
                f"{layer}.norm2",
                q
                + self.attend(
                    f"{layer}.cross_attn_token_to_image", q + tokens, image + where, image
                ),
                1e-5,
            )
            q = self.norm(
                f"{layer}.norm3",
                q + self.linear(f"{layer}.mlp.lin2", self.linear(f"{layer}.mlp.lin1", q).relu()),
                1e-5,
            )
            image = self.norm(
                f"{layer}.norm4",
                image
                + self.attend(f"{layer}.cross_attn_image_to_token", image + where, q + tokens, q),
                1e-5,
            )
        q = self.norm(
            "mask_decoder.transformer.norm_final_attn",
            q
            + self.attend(
                "mask_decoder.transformer.final_attn_token_to_image",
                q + tokens,
                image + where,
                image,
            ),
            1e-5,
        )
        up, gelu = torch.nn.functional.conv_transpose2d, torch.nn.functional.gelu
        x = up(
            image.reshape(1, S, S, -1).permute(0, 3, 1, 2),
            w["mask_decoder.output_upscaling.0.weight"],
            w["mask_decoder.output_upscaling.0.bias"],
            stride=2,
        )
        x = gelu(self.norm("mask_decoder.output_upscaling.1", x.permute(0, 2, 3, 1), 1e-6)).permute(
            0, 3, 1, 2
        )
        x = gelu(
            up(
                x,
                w["mask_decoder.output_upscaling.3.weight"],
                w["mask_decoder.output_upscaling.3.bias"],
                stride=2,
            )
        )[0]
        masks = [
            torch.einsum(
                "c,chw->hw", self.mlp(f"mask_decoder.output_hypernetworks_mlps.{i}", q[1 + i]), x
            )
            for i in range(4)
        ]
        return torch.stack(masks), self.mlp("mask_decoder.iou_prediction_head", q[0])


def small_sam(family, tmp_path, monkeypatch):
    """A small random model of the family as its released file; load_asm then builds the small one."""
    monkeypatch.setattr("extras.sam1.build_sam", lambda f: build_sam(f, 128, **SMALL))
    shapes = released_layout(128, 24, 3, 2, [1], 3, family == "sam-med2d")
    generator = torch.Generator().manual_seed(0)
    weights = {
        name: torch.randn(shape, generator=generator) / max(1, np.prod(shape[1:])) ** 0.5
        for name, shape in shapes.items()
    }
    torch.save({"model": weights} if family == "sam-med2d" else weights, tmp_path / "released.pth")
    return f"{family}:{tmp_path / 'released.pth'}", weights


@pytest.mark.parametrize("family, size", [("medsam", 1024), ("sam-med2d", 256)])
def test_the_released_layout_is_this_one_key_by_key(family, size):
    with torch.device("meta"):
        own = {
            released_name(key): tuple(tensor.shape)
            for key, tensor in build_sam(family).state_dict().items()
        }
    assert own == released_layout(size, 768, 12, 12, [2, 5, 8, 11], 14, family == "sam-med2d")


@pytest.mark.parametrize("family", FAMILIES)
def test_the_decoders_layer_norms_have_sams_epsilon(family):
    with torch.device("meta"):
        decoder = build_sam(family).mask_decoder.transformer
    assert {
        module.eps for module in decoder.modules() if isinstance(module, torch.nn.LayerNorm)
    } == {1e-5}


@pytest.mark.parametrize("boxes, points", [(BOXES, POINTS), (BOXES, None), (None, POINTS)])
@pytest.mark.parametrize("multimask", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_first_sam_gives_what_its_equations_give(
    family, boxes, points, multimask, tmp_path, monkeypatch
):
    spec, weights = small_sam(family, tmp_path, monkeypatch)
    asm, image = load_asm(spec, "cpu", multimask), noise_image()
    slow = SlowSAM(weights, 2, [1], 3)
    features = slow.encode(asm.prepare(image))
    logits, scores = asm.logits(image, boxes, points)
    scale = np.array(image.shape[1::-1]) / 128
    for i in range(3):
        all_four, quality = slow.decode(
            features,
            () if boxes is None else boxes[i].reshape(2, 2) / scale,
            () if points is None else points[i] / scale,
            128,
        )
        best = 1 + quality[1:].argmax() if multimask or family == "sam-med2d" else 0
        torch.testing.assert_close(logits[i].double(), all_four[best], atol=1e-4, rtol=1e-3)
        torch.testing.assert_close(scores[i].double(), quality[best], atol=1e-4, rtol=1e-3)


def test_images_are_prepared_as_scikit_image_and_opencv_do():
    """The fixture is what demo.make.asm --prepared wrote where those two are installed."""
    told, model = np.load(PREPARED), build_sam("medsam", PREPARED_SIDE, **SMALL)
    for name in ("wide", "small", "flat"):
        image = told[f"{name}/image"]
        assert np.array_equal(
            MedSAM(model, {}).prepare(image)[0].permute(1, 2, 0).numpy(),
            told[f"{name}/medsam"].astype(np.float32),
        )
        nearest = (told[f"{name}/sam-med2d"] - np.array([123.675, 116.28, 103.53])) / [
            58.395,
            57.12,
            57.375,
        ]
        found = SAMMed2D(model, {}).prepare(image)[0].permute(1, 2, 0).numpy()
        np.testing.assert_allclose(found, nearest, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_first_sams_masks_have_the_images_size_and_are_made_its_way(
    family, tmp_path, monkeypatch
):
    asm = load_asm(small_sam(family, tmp_path, monkeypatch)[0], "cpu")
    masks, scores = asm.segment(noise_image(), BOXES, POINTS)
    assert (
        masks.shape == (3, 61, 203)
        and masks.dtype == bool
        and 0 < masks.mean() < 1
        and scores.shape == (3,)
    )
    low = asm.logits(noise_image(), BOXES, POINTS)[0][:, None]
    grow = dict(mode="bilinear", align_corners=False)
    full = (
        torch.nn.functional.interpolate(low.sigmoid(), (61, 203), **grow) - 0.5
        if family == "medsam"
        else torch.nn.functional.interpolate(
            torch.nn.functional.interpolate(low, (128, 128), **grow), (61, 203), **grow
        )
    )
    assert np.array_equal(masks, (full[:, 0] > 0).numpy())


def test_a_folder_in_the_layout_of_transformers_loads_and_gives_the_same(tmp_path, monkeypatch):
    spec, _ = small_sam("medsam", tmp_path, monkeypatch)
    asm = load_asm(spec, "cpu")
    asm.model.save_pretrained(tmp_path / "hf")
    again = load_asm(f"medsam:{tmp_path / 'hf'}", "cpu")
    assert torch.equal(again.logits(noise_image(), BOXES)[0], asm.logits(noise_image(), BOXES)[0])
    (tmp_path / "hf/model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="hf/model.safetensors"):
        load_asm(f"medsam:{tmp_path / 'hf'}", "cpu")


def test_one_familys_file_is_refused_as_anothers(tmp_path, monkeypatch, folder):
    for family, other, told in (
        ("medsam", "sam-med2d", "Missing .*mlp.channel"),
        ("sam-med2d", "medsam", "Unexpected .*Adapter"),
    ):
        spec, _ = small_sam(family, tmp_path, monkeypatch)
        with pytest.raises(
            ValueError, match=f"released.pth: its keys do not fit the model: .*{told}"
        ):
            load_asm(spec.replace(family, other, 1), "cpu")
    small_sam("medsam", tmp_path, monkeypatch)
    with pytest.raises(ValueError, match="start with one of: medsam:"):
        load_asm(tmp_path / "released.pth", "cpu")
    with pytest.raises(ValueError, match="image_size: medsam has one size"):
        load_asm(f"medsam:{tmp_path / 'released.pth'}", "cpu", image_size=512)
    for family in FAMILIES:
        with pytest.raises(ValueError, match="asm: its keys do not fit the model: .* Missing"):
            load_asm(f"{family}:{folder}", "cpu")
    with pytest.raises(FileNotFoundError, match="x.pth: no such ASM"):
        load_asm("medsam:x.pth", "cpu")


# ---------------------------------------------------------------- overlay


@pytest.mark.parametrize(
    "size, shown",
    [
        ((112, 80), (448, 320)),
        ((448, 300), (448, 300)),
        ((30, 60), (224, 448)),
        ((1500, 900), (1500, 900)),
    ],
)
def test_an_overlay_is_at_least_448_pixels_long_and_keeps_the_ratio(size, shown):
    picture = overlay(
        Image.new("L", size, 90), np.ones(size[::-1], bool), (5, 5, 20, 20), ((8, 8), (15, 15))
    )
    assert picture.size == shown and picture.mode == "RGB" and max(picture.size) >= OVERLAY_SIDE


def test_an_overlay_colours_the_mask_the_box_and_the_points_and_nothing_else():
    grey = np.full((448, 448, 3), 120, np.uint8)
    mask = np.zeros((448, 448), bool)
    mask[100:200, 100:200] = True
    picture = np.asarray(
        overlay(grey, mask, (250, 250, 350, 350), ((120, 400), (200, 400)))
    ).astype(int)
    colour = np.ptp(picture, axis=2)
    assert (
        colour[150, 150] > 20 and colour[100:103, 150].max() > colour[150, 150]
    )  # tinted, outlined
    assert colour[246:254, 300].max() > 100 and colour[300, 300] == 0  # only the box's edge
    assert colour[400, 120] > 100 and colour[400, 200] > 100  # two points
    assert (picture[400, 120] != picture[400, 200]).any()  # told apart
    assert (picture[20:80, 20:430] == 120).all()


def centre_of(colours):
    """Centre (x, y) of a bool picture, in continuous pixel coordinates."""
    ys, xs = np.nonzero(colours)
    return xs.mean() + 0.5, ys.mean() + 0.5


def test_an_overlay_draws_a_point_at_the_centre_of_its_pixel():
    black = np.zeros((56, 56, 3), np.uint8)  # shown eight times as large
    for x, y in ((10, 20), (40.5, 30.25)):
        lit = np.asarray(overlay(black, points=[(x, y)])).max(2) > 60
        assert centre_of(lit) == pytest.approx((8 * (x + 0.5), 8 * (y + 0.5)), abs=0.6)


def test_an_overlay_draws_a_box_on_its_edges_and_the_mask_on_its_pixels():
    black, mask = np.zeros((56, 56, 3), np.uint8), np.zeros((56, 56), bool)
    mask[30:40, 12:24] = True  # its tight box is 12, 30, 24, 40
    lit = np.asarray(overlay(black, mask)).max(2) > 40
    rows, columns = lit.any(1).nonzero()[0], lit.any(0).nonzero()[0]
    assert (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1) == pytest.approx(
        (96, 240, 192, 320), abs=1
    )
    lit = np.asarray(overlay(black, bbox=(12, 30, 24, 40))).max(2) > 128
    for across, low, high in ((lit[280], 96, 192), (lit[:, 144], 240, 320)):
        line = across.nonzero()[0]  # two edges, each as wide on either side of its place
        sides = line[line < line.mean()], line[line > line.mean()]
        assert [side.mean() + 0.5 for side in sides] == pytest.approx([low, high], abs=0.6)


def test_an_overlay_draws_every_point_and_repeats_the_colours():
    black = np.zeros((448, 448, 3), np.uint8)
    picture = np.asarray(overlay(black, points=[(50, 50), (150, 50), (250, 50), (350, 50)])).astype(
        int
    )
    colours = [picture[50, x] for x in (50, 150, 250, 350)]
    assert np.array_equal(colours[0], colours[2]) and np.array_equal(colours[1], colours[3])
    assert (colours[0] != colours[1]).any()


def test_an_overlay_of_nothing_is_the_picture():
    grey = noise_image(300, 448)
    assert (np.asarray(overlay(Image.fromarray(grey))).astype(int) - grey).mean() < 1


def test_an_overlay_refuses_a_mask_of_another_size():
    with pytest.raises(ValueError, match=r"mask: \(10, 20\) is not .* \(20, 10\)"):
        overlay(Image.new("RGB", (10, 20)), np.ones((10, 20), bool))


def test_an_overlay_draws_boxes_that_leave_the_picture_or_are_upside_down():
    overlay(Image.new("RGB", (50, 40)), None, (60, 30, -10, 10), ((-5, 3), (70, 90)))
