"""The segmenter: loading, what it rejects, prompts, masks, overlays, and agreement with sam2."""

from contextlib import suppress

import numpy as np
import pytest
import safetensors.torch
import torch
import yaml
from PIL import Image, ImageFilter

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
    segment_regions,
)
from data import load_samples
from demo.make.asm import (
    DEMO,
    PARITY,
    PROMPT_KINDS,
    parity_case,
    parity_prompts,
    predictor_answers,
    save_asm,
    tiny_config,
)
from metrics import mask_dice
from runtime.pictures import OVERLAY_SIDE

BOXES = np.array([[10, 5, 60, 40], [30, 20, 90, 50], [100, 10, 180, 55]], dtype=float)
POINTS = np.array([[[20, 20], [40, 30]], [[50, 30], [70, 40]], [[120, 30], [150, 40]]], dtype=float)
PREFIXES = " ".join(SEGMENTERS)


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
    return load_asm(DEMO / "asm", "cpu")


@pytest.fixture
def folder(tiny, tmp_path):
    save_asm(tiny, tmp_path / "asm")
    return tmp_path / "asm"


def rewrite(folder, change):
    weights = safetensors.torch.load_file(folder / "model.safetensors")
    change(weights)
    safetensors.torch.save_file(weights, folder / "model.safetensors")


def is_one_line(raised):
    return "\n" not in str(raised.value)


# ---------------------------------------------------------------- loading


def test_a_saved_folder_gives_the_same_logits_and_masks_bit_for_bit(tiny, folder):
    loaded = load_asm(folder, "cpu")
    case = noise_image(), BOXES, POINTS
    saved_logits, saved_scores = tiny.logits(*case)
    logits, scores = loaded.logits(*case)
    assert torch.equal(saved_logits, logits)
    assert torch.equal(saved_scores, scores)
    saved_masks, saved_scores = tiny.segment(*case)
    masks, scores = loaded.segment(*case)
    assert np.array_equal(saved_masks, masks)
    assert np.array_equal(saved_scores, scores)


def test_a_float16_folder_is_half_the_size_and_loads_as_float32(tiny, folder, tmp_path):
    save_asm(tiny, tmp_path / "half", torch.float16)
    half_size = (tmp_path / "half/model.safetensors").stat().st_size
    full_size = (folder / "model.safetensors").stat().st_size
    assert half_size < 0.55 * full_size
    half = load_asm(tmp_path / "half", "cpu")
    assert {weight.dtype for weight in half.model.parameters()} == {torch.float32}
    rounded, _ = half.logits(noise_image(), BOXES)
    exact, _ = tiny.logits(noise_image(), BOXES)
    gap = (rounded - exact).abs().max()
    assert 0 < gap < 0.05


def test_a_medsam2_checkpoint_loads_at_512_and_segments(tmp_path):
    # 39M parameters: the one test that builds the released architecture
    torch.manual_seed(0)
    weights = build_model(read_config(SAM2_CONFIG), "test").state_dict()
    released = {name: tensor.half() for name, tensor in weights.items()}
    file = tmp_path / "MedSAM2_latest.pt"
    torch.save({"model": released}, file)
    asm = load_asm(str(file), "cpu")
    assert asm.model.image_size == MEDSAM2["image_size"] == 512
    assert asm.model.sam_mask_decoder.dynamic_multimask_via_stability  # as sam2's build_sam2 has it
    assert torch.equal(asm.model.no_mem_embed, released["no_mem_embed"].float())
    masks, scores = asm.segment(noise_image(), BOXES, POINTS)
    assert masks.shape == (3, 61, 203)
    assert np.isfinite(scores).all()
    logits, _ = asm.logits(noise_image(), BOXES)
    assert logits.shape == (3, 128, 128)


def test_image_size_overrides_the_folders_own(folder):
    asm = load_asm(folder, "cpu", image_size=96)
    logits, _ = asm.logits(noise_image(), BOXES)
    assert logits.shape == (3, 24, 24)


@pytest.mark.parametrize("image_size", [100, 0, 16, -32])
def test_an_image_size_that_is_no_multiple_of_32_is_rejected(folder, image_size):
    with pytest.raises(ValueError, match=f"image_size: a multiple of 32 .* not {image_size}"):
        load_asm(folder, "cpu", image_size=image_size)


def test_multimask_reaches_the_model(folder):
    assert load_asm(folder, "cpu", multimask=True).multimask
    assert not load_asm(folder, "cpu").multimask


def test_a_large_image_is_shrunk_with_antialiasing(tiny, monkeypatch):
    """Pillow's bilinear filter is also antialiased. It is the oracle, a channel at a time, in
    float."""
    seen = []
    image = noise_image(190, 260)
    monkeypatch.setattr(asm_module, "image_features", lambda model, pixels: seen.append(pixels))
    tiny.encode(image)
    mean = (0.485, 0.456, 0.406)
    deviation = (0.229, 0.224, 0.225)
    for channel in range(3):
        picture = Image.fromarray(image[..., channel].astype(np.float32))
        small = np.asarray(picture.resize((64, 64), Image.Resampling.BILINEAR))
        expected = (small / 255 - mean[channel]) / deviation[channel]
        assert np.abs(seen[0][0, channel].numpy() - expected).max() < 1e-3


def test_a_loaded_model_is_frozen(folder):
    asm = load_asm(folder, "cpu")
    assert not asm.model.training
    assert not any(weight.requires_grad for weight in asm.model.parameters())
    with torch.enable_grad():
        logits, _ = asm.logits(noise_image(), BOXES)
    assert not logits.requires_grad


# ---------------------------------------------------------------- what is not loaded


def remove_one(weights):
    weights.pop("no_mem_embed")


def remove_fifty(weights):
    for key in sorted(weights)[:50]:
        weights.pop(key)


def add_one(weights):
    weights["unknown"] = torch.zeros(1)


def reshape_one(weights):
    weights["no_mem_embed"] = torch.zeros(1, 1, 3)


@pytest.mark.parametrize(
    "change, message",
    [
        (remove_one, r'asm: .* Missing .*"no_mem_embed"'),
        (add_one, r'asm: .* Unexpected .*"unknown"'),
        (reshape_one, r"asm: .* size mismatch for no_mem_embed"),
        (remove_fifty, r'asm: .* Missing .*"image_encoder.*\[\.\.\.\]$'),
    ],
)
def test_weights_that_do_not_fit_are_rejected_by_key(folder, change, message):
    rewrite(folder, change)
    with pytest.raises(ValueError, match=message) as raised:
        load_asm(folder, "cpu")
    assert is_one_line(raised)


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
def test_a_garbage_file_is_rejected_by_name(tmp_path, content):
    file = tmp_path / "garbage.pt"
    file.write_bytes(content)
    with pytest.raises(ValueError, match="garbage.pt: not a torch file of plain tensors") as raised:
        load_asm(file, "cpu")
    assert is_one_line(raised)


@pytest.mark.parametrize(
    "content, message",
    [
        ([1, 2], "start with one of"),
        ({"state": {}}, PREFIXES),
        ({"model": 3}, "as in MedSAM2_latest.pt"),
    ],
)
def test_a_torch_file_without_a_state_dict_is_rejected(tmp_path, content, message):
    torch.save(content, tmp_path / "other.pt")
    expected = 'other.pt: {"model": state_dict} is needed.*' + message
    with pytest.raises(ValueError, match=expected):
        load_asm(tmp_path / "other.pt", "cpu")


class Payload:
    def __reduce__(self):
        return print, ("unpickled",)


def test_a_pickle_that_calls_something_is_rejected_and_not_run(tmp_path, capsys):
    torch.save({"model": Payload()}, tmp_path / "evil.pt")
    with pytest.raises(ValueError, match="evil.pt: not a torch file of plain tensors"):
        load_asm(tmp_path / "evil.pt", "cpu")
    assert "unpickled" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "content, message",
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
def test_a_config_that_is_not_sam2s_is_rejected_and_calls_nothing(folder, content, message, capsys):
    (folder / "config.yaml").write_text(content)
    with pytest.raises(ValueError, match="asm.*: .*" + message) as raised:
        load_asm(folder, "cpu")
    assert is_one_line(raised)
    assert capsys.readouterr().out == ""


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
    message = "asm.*: `_target_: .* is no part of SAM 2 and was not called"
    with pytest.raises(ValueError, match=message) as raised:
        load_asm(folder, "cpu")
    assert is_one_line(raised)
    assert capsys.readouterr().out == ""


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


def spread_at(grey, level):
    """The variance between what is at most as bright as a level and what is brighter."""
    is_below = grey <= level
    share = is_below.mean()
    if share in (0, 1):
        return 0
    gap = grey[is_below].mean() - grey[~is_below].mean()
    return share * (1 - share) * gap**2


class Otsu:
    """What is brighter than Otsu's threshold, once for each prompt: the smallest segmenter."""

    def segment(self, image, boxes=None, points=None):
        grey = image.mean(2)
        threshold = np.argmax([spread_at(grey, level) for level in range(255)])
        count = len(points if boxes is None else boxes)
        masks = np.repeat([grey > threshold], count, axis=0)
        return masks, np.ones(count, np.float32)


def load_otsu(path, device, multimask, image_size):
    """What SEGMENTERS names in the next test."""
    return Otsu()


def load_nothing(*args, **options):
    """What SEGMENTERS names in the test after that: the arguments."""
    return args, options


def test_a_segmenter_of_ones_own_is_one_entry_in_the_registry(monkeypatch):
    monkeypatch.setitem(SEGMENTERS, "otsu", "test_asm.load_otsu")
    image = np.full((40, 50, 3), 30, np.uint8)
    image[10:20, 15:35] = 200
    masks, scores = load_asm("otsu", "cpu").segment(image, boxes=[[10, 5, 40, 25]])
    assert masks.shape == (1, 40, 50)
    assert np.array_equal(masks[0], image[..., 0] == 200)
    assert len(scores) == 1


def test_a_loader_gets_the_rest_of_the_spec_the_device_and_the_options(monkeypatch):
    monkeypatch.setitem(SEGMENTERS, "mine:", "test_asm.load_nothing")
    args, options = load_asm("mine:a:b.pt", "cuda", multimask=True, image_size=64)
    assert args == ("a:b.pt", "cuda")
    assert options == {"multimask": True, "image_size": 64}


@pytest.mark.parametrize("entry", ["nowhere.load", "test_asm.nothing"])
def test_an_entry_whose_function_is_not_there_is_one_line_that_names_it(monkeypatch, entry):
    monkeypatch.setitem(SEGMENTERS, "mine:", entry)
    with pytest.raises(ValueError, match=entry) as raised:
        load_asm("mine:a", "cpu")
    assert is_one_line(raised)


@pytest.mark.parametrize("spec", ["otsu", "sam:x.pth", "medsam", "nowhere/asm"])
def test_an_unknown_spec_is_one_line_that_names_what_there_is(spec):
    message = f"^{spec}: no such ASM; .*config.yaml.*{PREFIXES}"
    with pytest.raises(FileNotFoundError, match=message) as raised:
        load_asm(spec, "cpu")
    assert is_one_line(raised)


# ---------------------------------------------------------------- segmenting


@pytest.mark.parametrize("boxes, points", [(BOXES, POINTS), (BOXES, None), (None, POINTS)])
@pytest.mark.parametrize("multimask", [False, True])
def test_many_prompts_at_once_are_as_one_by_one(demo_asm, boxes, points, multimask):
    asm = ASM(demo_asm.model, demo_asm.config, multimask)
    _, picture = parity_case(False)
    image = picture.repeat(2, 1)
    logits, scores = asm.logits(image, boxes, points)
    masks, _ = asm.segment(image, boxes, points)
    for i in range(3):
        box = None if boxes is None else boxes[i : i + 1]
        pair = None if points is None else points[i : i + 1]
        own_logits, own_scores = asm.logits(image, box, pair)
        own_masks, _ = asm.segment(image, box, pair)
        torch.testing.assert_close(own_logits[0], logits[i], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(own_scores[0], scores[i], atol=1e-5, rtol=1e-5)
        assert np.array_equal(own_masks[0], masks[i])


@pytest.mark.parametrize("size", [(61, 203), (203, 61), (64, 64), (1, 17), (700, 900)])
def test_masks_have_the_images_own_size(tiny, size):
    height, width = size
    masks, scores = tiny.segment(noise_image(height, width), boxes=[[0, 0, width, height]])
    assert masks.shape == (1, height, width)
    assert masks.dtype == bool
    assert scores.shape == (1,)
    assert scores.dtype == np.float32


def test_an_image_is_encoded_once_for_all_that_is_asked_of_it(tiny):
    calls = []
    image = 255 - noise_image()
    handle = tiny.model.image_encoder.register_forward_hook(lambda *_: calls.append(1))
    first, _ = tiny.segment(image, BOXES, POINTS)
    second, _ = tiny.segment(image.copy(), BOXES, POINTS)
    tiny.segment(image, BOXES[:1])
    assert len(calls) == 1
    assert np.array_equal(first, second)
    image[0, 0] ^= 255  # another image, even if it is the same array
    tiny.segment(image, BOXES, POINTS)
    handle.remove()
    assert len(calls) == 2


def test_the_same_read_only_array_is_not_compared_again(tiny, monkeypatch):
    image = np.asarray(Image.fromarray(255 - noise_image(70, 90)))
    assert not image.flags.writeable
    first, _ = tiny.segment(image, BOXES)
    with monkeypatch.context() as patch:
        patch.setattr(np, "array_equal", lambda *_: pytest.fail("the pixels were compared"))
        patch.setattr(tiny, "encode", lambda _: pytest.fail("the image was encoded again"))
        second, _ = tiny.segment(image, BOXES)
    assert np.array_equal(first, second)


def test_nothing_of_one_image_is_left_in_the_next(tiny):
    before, _ = tiny.logits(noise_image(), BOXES)
    tiny.segment(255 - noise_image(80, 80), BOXES, POINTS)
    after, _ = tiny.logits(noise_image(), BOXES)
    assert torch.equal(before, after)


def test_views_lists_and_whole_numbers_are_taken_as_they_are(tiny):
    mirrored = noise_image()[:, ::-1]
    frozen = np.ascontiguousarray(mirrored)
    frozen.flags.writeable = False
    expected, _ = tiny.logits(frozen, BOXES)
    found, _ = tiny.logits(mirrored, BOXES.astype(int).tolist())
    assert torch.equal(found, expected)


def test_prompts_scale_with_the_image(demo_asm):
    example = load_samples(DEMO / "data", "test")[0]
    width, height = example.image.size
    twice = example.image.resize((2 * width, 2 * height), Image.Resampling.BICUBIC)
    small, _ = demo_asm.segment(np.array(example.image), [example.bbox], [example.points])
    bbox = np.multiply(example.bbox, 2)
    points = np.multiply(example.points, 2)
    large, _ = demo_asm.segment(np.array(twice), [bbox], [points])
    assert mask_dice(small[0], large[0, ::2, ::2]) > 0.9


@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_box_may_have_any_number_of_points(tiny, count):
    points = np.concatenate([POINTS, POINTS[:, :1]], 1)[:, :count]
    coords, labels = prompt_tokens(torch.tensor(BOXES), torch.tensor(points), (61, 203), 100)
    assert coords.shape == (3, 2 + count, 2)
    assert labels.tolist() == [[2, 3] + count * [1]] * 3
    assert coords[:, 2:].numpy() == pytest.approx(points / [203, 61] * 100)
    masks, scores = tiny.segment(noise_image(), BOXES, points)
    assert masks.shape == (3, 61, 203)
    assert scores.shape == (3,)


def test_a_box_becomes_its_corners_in_the_networks_square():
    coords, labels = prompt_tokens([[50, 10, 100, 40]], None, (80, 200), 64)
    assert coords.tolist() == [[[16, 8], [32, 32]]]
    assert labels.tolist() == [[2, 3]]


def test_each_point_has_the_label_it_was_given():
    labels = [[1, 0], [0, 0], [1, 1]]
    coords, tokens = prompt_tokens(BOXES, POINTS, (61, 203), 100, labels)
    assert tokens.tolist() == [[2, 3, 1, 0], [2, 3, 0, 0], [2, 3, 1, 1]]
    without, _ = prompt_tokens(BOXES, POINTS, (61, 203), 100)
    assert torch.equal(coords, without)
    _, tokens = prompt_tokens(None, POINTS, (61, 203), 100, labels)
    assert tokens.tolist() == labels


def test_labels_of_ones_change_nothing_and_a_zero_changes_its_own_mask_only(demo_asm):
    _, picture = parity_case(False)
    image = picture.repeat(2, 1)
    unlabelled, _ = demo_asm.logits(image, BOXES, POINTS)
    ones, _ = demo_asm.logits(image, BOXES, POINTS, np.ones((3, 2)))
    assert torch.equal(unlabelled, ones)
    mixed, _ = demo_asm.logits(image, BOXES, POINTS, labels=[[1, 1], [1, 0], [1, 1]])
    torch.testing.assert_close(mixed[[0, 2]], unlabelled[[0, 2]], atol=1e-4, rtol=1e-4)
    assert (mixed[1] - unlabelled[1]).abs().max() > 0.1


@pytest.mark.parametrize(
    "image, message",
    [
        (noise_image()[..., 0], r"uint8 \(61, 203\)"),
        (noise_image().astype(float), "float64"),
        (noise_image()[..., :2], r"\(61, 203, 2\)"),
        (np.zeros((0, 5, 3), np.uint8), r"\(0, 5, 3\)"),
        (Image.new("RGB", (9, 9)), "Image"),
        (np.zeros((2, 9, 9, 3), np.uint8), r"\(2, 9, 9, 3\)"),
    ],
)
def test_anything_but_a_uint8_rgb_array_is_rejected(tiny, image, message):
    with pytest.raises(ValueError, match="image: a uint8 RGB array .*" + message) as raised:
        tiny.segment(image, BOXES)
    assert is_one_line(raised)


@pytest.mark.parametrize(
    "prompts, message",
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
        ({"points": [[[1, 2]], [[1, 2], [3, 4]]]}, "points: numbers .* unequal lengths"),
        ({"boxes": BOXES, "labels": [[1], [1], [1]]}, "labels: they belong to points"),
        ({"points": POINTS, "labels": [1, 1]}, r"labels: .* \(3, 2\), is needed, not \(2,\)"),
        ({"points": POINTS, "labels": np.ones((3, 1))}, r"labels: .* not \(3, 1\)"),
        ({"points": POINTS, "labels": [[1, 2]] * 3}, "labels: 1 is on the target, 0 off it"),
        ({"points": POINTS, "labels": [[1, -1]] * 3}, "labels: 1 is on the target"),
        ({"points": POINTS, "labels": [["a", "b"]] * 3}, "labels: numbers"),
    ],
)
def test_prompts_that_are_no_prompts_are_rejected(tiny, prompts, message):
    with pytest.raises(ValueError, match=message) as raised:
        tiny.segment(noise_image(), **prompts)
    assert is_one_line(raised)


# ---------------------------------------------------------------- the regions of an answer


class BoxFiller:
    """A segmenter that fills a box, marks the pixels of points, and writes down what it was
    asked."""

    def __init__(self):
        self.asked = []

    def segment(self, image, boxes=None, points=None):
        self.asked.append((boxes, points))
        mask = np.zeros(image.shape[:2], bool)
        if boxes is not None:
            x1, y1, x2, y2 = (max(0, int(value)) for value in boxes[0])
            mask[y1:y2, x1:x2] = True
        if points is not None:
            for x, y in points[0]:
                mask[int(y), int(x)] = True
        return mask[None], np.array([len(self.asked) / 4], np.float32)


def test_the_masks_of_regions_are_united_and_each_has_a_score():
    image = np.zeros((20, 30, 3), np.uint8)
    asm = BoxFiller()
    left = (2, 3, 6, 9)
    right = (20, 10, 25, 12)
    point = (15, 15)
    mask, scores = segment_regions(asm, image, [(left, None), (right, None), (None, (point,))])
    expected = np.zeros((20, 30), bool)
    expected[3:9, 2:6] = True
    expected[10:12, 20:25] = True
    expected[15, 15] = True
    assert mask.dtype == bool
    assert np.array_equal(mask, expected)
    assert scores == [0.25, 0.5, 0.75]
    assert asm.asked == [([left], None), ([right], None), (None, [(point,)])]


def test_a_region_of_nothing_is_left_out():
    image = np.zeros((20, 30, 3), np.uint8)
    asm = BoxFiller()
    mask, scores = segment_regions(asm, image, [(None, None), (None, ())])
    assert mask.shape == (20, 30)
    assert not mask.any()
    assert scores == []
    assert asm.asked == []


def test_coordinates_far_outside_are_clipped_to_one_image_size_around_the_image():
    image = np.zeros((20, 30, 3), np.uint8)
    asm = BoxFiller()
    box = (-1e6, 4, 1e6, 8)
    mask, _ = segment_regions(asm, image, [(box, None)])
    assert asm.asked == [([(-30, 4, 60, 8)], None)]
    assert mask[4:8].all()
    assert mask.sum() == 4 * 30


def test_one_region_is_what_the_segmenter_says_of_it(demo_asm):
    example = load_samples(DEMO / "data", "test")[0]
    image = np.asarray(example.image)
    masks, scores = demo_asm.segment(image, [example.bbox], [example.points])
    mask, region_scores = segment_regions(demo_asm, image, [(example.bbox, example.points)])
    assert np.array_equal(mask, masks[0])
    assert region_scores == pytest.approx(scores.tolist())


# ---------------------------------------------------------------- agreement with sam2's predictor


@pytest.fixture(scope="module")
def predictor_says():
    """The recorded answers, and, where torchvision imports, those of the predictor itself."""
    sources = [dict(np.load(PARITY))]
    # no torchvision, or one that was built for another torch
    with suppress(ImportError, RuntimeError):
        sources.append(predictor_answers())
    return sources


@pytest.mark.parametrize("multimask", [False, True])
@pytest.mark.parametrize("kind", PROMPT_KINDS)
def test_sam2s_own_predictor_gives_the_same_answer(predictor_says, kind, multimask):
    asm, image = parity_case(multimask)
    logits, scores = asm.logits(image, **parity_prompts(kind))
    masks, _ = asm.segment(image, **parity_prompts(kind))
    assert masks[0].any()
    name = f"{kind}/{multimask}"
    for answers in predictor_says:
        np.testing.assert_allclose(logits[0], answers[f"{name}/logits"], atol=2e-4)
        np.testing.assert_allclose(scores[0], answers[f"{name}/score"], atol=1e-5)
        assert (masks[0] != answers[f"{name}/mask"]).mean() < 1e-3


# ---------------------------------------------------------------- the demo's segmenter


def test_the_demo_segmenter_finds_what_it_is_shown(demo_asm):
    examples = load_samples(DEMO / "data", "test")
    picked = np.random.default_rng(0).permutation(len(examples))[:60]
    dices = []
    for index in picked:
        example = examples[int(index)]
        masks, _ = demo_asm.segment(np.array(example.image), [example.bbox], [example.points])
        dices.append(mask_dice(masks[0], example.mask))
    assert np.mean(dices) >= 0.85


def test_the_demo_segmenter_is_small(demo_asm):
    assert sum(file.stat().st_size for file in (DEMO / "asm").iterdir()) < 8e6
    assert sum(weight.numel() for weight in demo_asm.model.parameters()) < 4e6


# ---------------------------------------------------------------- overlay


@pytest.mark.parametrize(
    "size, shown_size",
    [
        ((112, 80), (448, 320)),
        ((448, 300), (448, 300)),
        ((30, 60), (224, 448)),
        ((1500, 900), (1500, 900)),
    ],
)
def test_an_overlay_is_at_least_448_pixels_long_and_keeps_the_ratio(size, shown_size):
    width, height = size
    mask = np.ones((height, width), bool)
    picture = overlay(Image.new("L", size, 90), mask, (5, 5, 20, 20), ((8, 8), (15, 15)))
    assert picture.size == shown_size
    assert picture.mode == "RGB"
    assert max(picture.size) >= OVERLAY_SIDE


def test_an_overlay_colours_the_mask_the_box_and_the_points_and_nothing_else():
    grey = np.full((448, 448, 3), 120, np.uint8)
    mask = np.zeros((448, 448), bool)
    mask[100:200, 100:200] = True
    shown = overlay(grey, mask, (250, 250, 350, 350), ((120, 400), (200, 400)))
    picture = np.asarray(shown).astype(int)
    colour = np.ptp(picture, axis=2)
    assert colour[150, 150] > 20  # tinted
    assert colour[100:103, 150].max() > colour[150, 150]  # outlined
    assert colour[246:254, 300].max() > 100  # the box's edge
    assert colour[300, 300] == 0  # and nothing inside it
    assert colour[400, 120] > 100
    assert colour[400, 200] > 100
    assert (picture[400, 120] != picture[400, 200]).any()  # two points, told apart
    assert (picture[20:80, 20:430] == 120).all()


def centre_of(is_lit):
    """Centre (x, y) of a bool picture, in continuous pixel coordinates."""
    ys, xs = np.nonzero(is_lit)
    return xs.mean() + 0.5, ys.mean() + 0.5


@pytest.mark.parametrize("x, y", [(10, 20), (40.5, 30.25)])
def test_an_overlay_draws_a_point_at_the_centre_of_its_pixel(x, y):
    black = np.zeros((56, 56, 3), np.uint8)  # shown eight times as large
    is_lit = np.asarray(overlay(black, points=[(x, y)])).max(2) > 60
    assert centre_of(is_lit) == pytest.approx((8 * (x + 0.5), 8 * (y + 0.5)), abs=0.6)


def test_an_overlay_draws_the_mask_on_its_pixels():
    black = np.zeros((56, 56, 3), np.uint8)
    mask = np.zeros((56, 56), bool)
    mask[30:40, 12:24] = True
    is_lit = np.asarray(overlay(black, mask)).max(2) > 40
    rows = is_lit.any(1).nonzero()[0]
    columns = is_lit.any(0).nonzero()[0]
    box = (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)
    assert box == pytest.approx((96, 240, 192, 320), abs=1)  # eight times 12, 30, 24, 40


def edges_of(line):
    """The middles of the two edges of a box that a line of pixels (bool) crosses."""
    places = line.nonzero()[0]
    low = places[places < places.mean()]
    high = places[places > places.mean()]
    return low.mean() + 0.5, high.mean() + 0.5


def test_an_overlay_draws_a_box_on_its_edges():
    black = np.zeros((56, 56, 3), np.uint8)
    is_lit = np.asarray(overlay(black, bbox=(12, 30, 24, 40))).max(2) > 128
    assert edges_of(is_lit[280]) == pytest.approx((96, 192), abs=0.6)
    assert edges_of(is_lit[:, 144]) == pytest.approx((240, 320), abs=0.6)


def test_an_overlay_draws_every_point_and_repeats_the_colours():
    black = np.zeros((448, 448, 3), np.uint8)
    shown = overlay(black, points=[(50, 50), (150, 50), (250, 50), (350, 50)])
    picture = np.asarray(shown).astype(int)
    colours = [picture[50, x] for x in (50, 150, 250, 350)]
    assert np.array_equal(colours[0], colours[2])
    assert np.array_equal(colours[1], colours[3])
    assert (colours[0] != colours[1]).any()


def test_an_overlay_of_nothing_is_the_picture():
    blurred = Image.fromarray(noise_image(300, 448)).filter(ImageFilter.GaussianBlur(8))
    shown = np.asarray(overlay(blurred)).astype(int)
    assert np.abs(shown - np.asarray(blurred)).max() <= 1


def test_an_overlay_rejects_a_mask_of_another_size():
    with pytest.raises(ValueError, match=r"mask: \(10, 20\) is not .* \(20, 10\)"):
        overlay(Image.new("RGB", (10, 20)), np.ones((10, 20), bool))


def test_an_overlay_draws_boxes_that_leave_the_picture_or_are_upside_down():
    plain = Image.new("RGB", (50, 40))
    shown = overlay(plain, None, (60, 30, -10, 10), ((-5, 3), (70, 90)))
    assert shown.size == (448, 358)
    # the box's edges above and below are in sight, those at its sides are not
    is_lit = np.asarray(shown).max(2) > 128
    assert edges_of(is_lit[:, 224]) == pytest.approx((10 * 8.96, 30 * 8.96), abs=1)
