"""The segmenter: loading, refusing, prompting, drawing, and agreement with sam2's own predictor."""
import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image

from asm import ASM, MEDSAM2, OVERLAY_SIDE, SAM2_CONFIG, build_model, load_asm, overlay, read_config, save_asm
from data import load_samples
from demo.make_asm import (HERE, PARITY, PROMPT_KINDS, dice, parity_case, parity_prompts, predictor_answers,
                           tiny_config)

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
    assert asm.model.sam_mask_decoder.dynamic_multimask_via_stability        # as sam2's build_sam2 has it
    assert torch.equal(asm.model.no_mem_embed, weights["no_mem_embed"].half().float())
    masks, scores = asm.segment(noise_image(), BOXES, POINTS)
    assert masks.shape == (3, 61, 203) and np.isfinite(scores).all()
    assert asm.logits(noise_image(), BOXES)[0].shape == (3, 128, 128)


def test_image_size_overrides_the_folders_own(folder):
    assert load_asm(folder, "cpu", image_size=96).logits(noise_image(), BOXES)[0].shape == (3, 24, 24)
    with pytest.raises(ValueError, match="image_size: a multiple of 32 .* not 100"):
        load_asm(folder, "cpu", image_size=100)


def test_a_loaded_model_is_frozen(folder):
    asm = load_asm(folder, "cpu")
    assert not asm.model.training and not any(p.requires_grad for p in asm.model.parameters())
    with torch.enable_grad():
        assert not asm.logits(noise_image(), BOXES)[0].requires_grad


# ---------------------------------------------------------------- refusing to load

@pytest.mark.parametrize("change, told", [
    (lambda w: w.pop("no_mem_embed"), r"asm: .* 1 missing \(no_mem_embed\)"),
    (lambda w: w.update(stranger=torch.zeros(1)), r"asm: .* 1 unexpected \(stranger\)"),
    (lambda w: w.update(no_mem_embed=torch.zeros(1, 1, 3)), r"asm: .* 1 of another shape \(no_mem_embed\)"),
    (lambda w: [w.pop(key) for key in sorted(w)[:5]], r"asm: .* 5 missing \(image_encoder.*, \.\.\.\)"),
])
def test_weights_that_do_not_fit_are_refused_by_key(folder, change, told):
    rewrite(folder, change)
    with pytest.raises(ValueError, match=told) as refusal:
        load_asm(folder, "cpu")
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("content", [b"", b"garbage", b"PK\x03\x04 garbage", b"\x80\x02garbage",
                                     b"0.garbage", b"\x8c\x01\xe9.", bytes(range(256)) * 9])
def test_a_garbage_file_is_refused_by_name(tmp_path, content):
    (tmp_path / "garbage.pt").write_bytes(content)
    with pytest.raises(ValueError, match="garbage.pt: no torch file of plain tensors") as refusal:
        load_asm(tmp_path / "garbage.pt", "cpu")
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("held, told", [([1, 2], "not list"), ({"state": {}}, r"not a dict of \['state'\]"),
                                        ({"model": 3}, r"not a dict of \['model'\]")])
def test_a_torch_file_without_a_state_dict_is_refused(tmp_path, held, told):
    torch.save(held, tmp_path / "other.pt")
    with pytest.raises(ValueError, match='other.pt: {"model": state_dict} is needed.*' + told):
        load_asm(tmp_path / "other.pt", "cpu")


class Payload:
    def __reduce__(self):
        return print, ("unpickled",)


def test_a_pickle_that_calls_something_is_refused_and_not_run(tmp_path, capsys):
    torch.save({"model": Payload()}, tmp_path / "evil.pt")
    with pytest.raises(ValueError, match="evil.pt: no torch file of plain tensors"):
        load_asm(tmp_path / "evil.pt", "cpu")
    assert "unpickled" not in capsys.readouterr().out


@pytest.mark.parametrize("yaml, told", [
    ("model: {_target_: builtins.print, x: called}", "_target_: builtins.print` is no part of SAM 2"),
    ("model: {_target_: sam2.modeling.sam2_base.SAM2Base, x: [{_target_: os.getcwd}]}", "os.getcwd"),
    ("model: {_target_: sam2.modeling.sam2_base.SAM2Base}", "no SAM 2 can be built"),
    ("[1, 2]", "no `model:` section"), ("", "no `model:` section"),
    ("model: ${nowhere}", "not a model's yaml"), ("a: [", "not a model's yaml"),
])
def test_a_config_that_is_not_sam2s_is_refused_and_calls_nothing(folder, yaml, told, capsys):
    (folder / "config.yaml").write_text(yaml)
    with pytest.raises(ValueError, match="asm.*: .*" + told.replace("$", r"\$")) as refusal:
        load_asm(folder, "cpu")
    assert "\n" not in str(refusal.value) and capsys.readouterr().out == ""


def test_what_is_not_there_is_named(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere: no such ASM"):
        load_asm(tmp_path / "nowhere", "cpu")
    (folder / "model.safetensors").write_bytes(b"garbage")
    with pytest.raises(ValueError, match="model.safetensors: not a safetensors file"):
        load_asm(folder, "cpu")
    (folder / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="model.safetensors: no such file"):
        load_asm(folder, "cpu")
    for spec in ("medsam:x.pth", "sam-med2d:x.pth"):
        with pytest.raises(ValueError, match=f"{spec}: .* not supported yet"):
            load_asm(spec, "cpu")


# ---------------------------------------------------------------- segmenting

@pytest.mark.parametrize("boxes, points", [(BOXES, POINTS), (BOXES, None), (None, POINTS)])
@pytest.mark.parametrize("multimask", [False, True])
def test_many_prompts_at_once_are_as_one_by_one(demo_asm, boxes, points, multimask):
    asm = ASM(demo_asm.model, demo_asm.config, multimask)
    image = parity_case(False)[1].repeat(2, 1)
    logits, scores = asm.logits(image, boxes, points)
    masks, _ = asm.segment(image, boxes, points)
    for i in range(3):
        one = [None if prompts is None else prompts[i:i + 1] for prompts in (boxes, points)]
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
    image[0, 0] ^= 255                                      # another image, even if it is the same array
    tiny.segment(image, BOXES, POINTS)
    handle.remove()
    assert len(calls) == 2


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


@pytest.mark.parametrize("image, told", [
    (noise_image()[..., 0], r"uint8 \(61, 203\)"), (noise_image().astype(float), "float64"),
    (noise_image()[..., :2], r"\(61, 203, 2\)"), (np.zeros((0, 5, 3), np.uint8), r"\(0, 5, 3\)"),
    (Image.new("RGB", (9, 9)), "Image"), (np.zeros((2, 9, 9, 3), np.uint8), r"\(2, 9, 9, 3\)"),
])
def test_anything_but_a_uint8_rgb_array_is_refused(tiny, image, told):
    with pytest.raises(ValueError, match="image: a uint8 RGB array .*" + told):
        tiny.segment(image, BOXES)


@pytest.mark.parametrize("prompts, told", [
    ({}, "both None"), ({"boxes": BOXES[0]}, r"boxes: numbers \(n, 4\) are needed, not float64 \(4,\)"),
    ({"boxes": BOXES[:, :3]}, r"boxes: .* \(3, 3\)"), ({"boxes": 3}, "boxes: "), ({"boxes": []}, "boxes: "),
    ({"points": POINTS[0]}, r"points: numbers \(n, 2, 2\) .* float64 \(2, 2\)"),
    ({"boxes": BOXES[:0]}, r"boxes: .* \(0, 4\)"),
    ({"boxes": BOXES, "points": POINTS[:2]}, "3 boxes but 2 pairs of points"),
    ({"boxes": [[0, 0, np.nan, 9]]}, "boxes: every coordinate must be finite"),
    ({"boxes": [["a", "b", "c", "d"]]}, "boxes: numbers"), ({"boxes": BOXES > 0}, "boxes: numbers .* bool"),
])
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
    except (ImportError, RuntimeError):             # no torchvision, or one that was built for another torch
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
    found = [dice(demo_asm.segment(np.array(s.image), [s.bbox], [s.points])[0][0], s.mask) for s in picked]
    assert np.mean(found) >= 0.85


def test_the_demo_segmenter_is_small(demo_asm):
    assert sum(file.stat().st_size for file in (HERE / "asm").iterdir()) < 8e6
    assert sum(p.numel() for p in demo_asm.model.parameters()) < 4e6


# ---------------------------------------------------------------- overlay

@pytest.mark.parametrize("size, shown", [((112, 80), (448, 320)), ((448, 300), (448, 300)),
                                         ((30, 60), (224, 448)), ((1500, 900), (1500, 900))])
def test_an_overlay_is_at_least_448_pixels_long_and_keeps_the_ratio(size, shown):
    picture = overlay(Image.new("L", size, 90), np.ones(size[::-1], bool), (5, 5, 20, 20), ((8, 8), (15, 15)))
    assert picture.size == shown and picture.mode == "RGB" and max(picture.size) >= OVERLAY_SIDE


def test_an_overlay_colours_the_mask_the_box_and_the_points_and_nothing_else():
    grey = np.full((448, 448, 3), 120, np.uint8)
    mask = np.zeros((448, 448), bool)
    mask[100:200, 100:200] = True
    picture = np.asarray(overlay(grey, mask, (250, 250, 350, 350), ((120, 400), (200, 400)))).astype(int)
    colour = np.ptp(picture, axis=2)
    assert colour[150, 150] > 20 and colour[100:103, 150].max() > colour[150, 150]  # tinted, outlined
    assert colour[246:254, 300].max() > 100 and colour[300, 300] == 0  # only the box's edge
    assert colour[400, 120] > 100 and colour[400, 200] > 100  # two points
    assert (picture[400, 120] != picture[400, 200]).any()  # told apart
    assert (picture[20:80, 20:430] == 120).all()


def test_an_overlay_of_nothing_is_the_picture():
    grey = noise_image(300, 448)
    assert (np.asarray(overlay(Image.fromarray(grey))).astype(int) - grey).mean() < 1


def test_an_overlay_refuses_a_mask_of_another_size():
    with pytest.raises(ValueError, match=r"mask: \(10, 20\) is not .* \(20, 10\)"):
        overlay(Image.new("RGB", (10, 20)), np.ones((10, 20), bool))


def test_an_overlay_draws_boxes_that_leave_the_picture_or_are_upside_down():
    overlay(Image.new("RGB", (50, 40)), None, (60, 30, -10, 10), ((-5, 3), (70, 90)))
