"""infer.py: frames, voting, exit status, what is written and what is not. A fixed sampler and an Otsu threshold stand
in for the two models, so that every number is known."""

import json
import shlex

import numpy as np
import pytest
import torch
from PIL import Image
from test_asm import Otsu

import asm
import infer
from crm import Group
from extras.boxes import write_boxes
from runtime.cli import ROOT, parse_args

W, H = 300, 200  # of the image; the model frame is a square of 112, so x and y scale differently


def completion(bbox, points=((30, 30), (60, 40)), think="a bright disc"):
    (x1, y1), (x2, y2) = points
    return (
        f'<think>{think}</think><answer>{{"bbox": {list(bbox)}, "points_1": [{x1}, {y1}], '
        f'"points_2": [{x2}, {y2}]}}</answer>'
    )


class Recorder(Otsu):
    """An Otsu threshold that writes down what it was asked."""

    def __init__(self, asked):
        self.asked = asked

    def segment(self, image, boxes=None, points=None):
        self.asked.append((image, boxes, points))
        return super().segment(image, boxes, points)


@pytest.fixture
def ask(tmp_path, monkeypatch, capsys):
    """ask(texts, flags) -> status, result.json, what was printed, what the segmenter was asked, what was sampled."""
    picture = np.full((H, W, 3), 20, np.uint8)
    picture[100:150, 120:240] = 220  # x 120 to 240, y 100 to 150
    Image.fromarray(picture).save(tmp_path / "image.png")
    asked, drawn, loaded = [], [], []

    def load(path, device, **options):
        loaded.append(options)
        return Recorder(asked)

    monkeypatch.setitem(asm.SEGMENTERS, "recorder", load)

    def run(texts, flags=""):
        def sample(crm, prompts, G, max_new_tokens, temperature, seed):
            drawn.append((prompts, G, max_new_tokens, temperature, seed))
            if isinstance(texts, Exception):
                raise texts
            empty = torch.zeros(G, 0)
            return [
                Group(
                    prompts[0],
                    empty.long(),
                    torch.zeros(G).long(),
                    empty,
                    torch.ones(G).bool(),
                    texts,
                )
            ]

        monkeypatch.setattr(infer, "sample", sample)
        count = 1 if isinstance(texts, Exception) else len(texts)
        argv = [
            "--image",
            str(tmp_path / "image.png"),
            "--query",
            "What is bright?",
            "--asm",
            "recorder",
            "--out",
            str(tmp_path / "out"),
            "--resize",
            "square:112",
            "--samples",
            str(count),
            *shlex.split(flags),
        ]
        capsys.readouterr()
        status = infer.main(parse_args(infer.Config, "", argv=argv))
        result = json.loads((tmp_path / "out/result.json").read_text())
        return status, result, capsys.readouterr(), asked, drawn, loaded

    run.out = tmp_path / "out"
    return run


def test_box_and_points_are_scaled_from_the_model_frame_to_the_image_frame(ask):
    status, result, said, asked, _, _ = ask([completion((42, 56, 84, 84), ((56, 28), (70, 63)))])
    box = [42 * W / 112, 56 * H / 112, 84 * W / 112, 84 * H / 112]  # 112.5, 100, 225, 150
    points = [
        [56.5 * W / 112 - 0.5, 28.5 * H / 112 - 0.5],
        [70.5 * W / 112 - 0.5, 63.5 * H / 112 - 0.5],
    ]
    assert status == 0 and result["size"] == [W, H]
    assert result["bbox"] == pytest.approx(box) and np.array(result["points"]) == pytest.approx(
        np.array(points)
    )
    image, boxes, clicks = asked[0]
    assert (
        image.shape == (H, W, 3)
        and boxes == [pytest.approx(box)]
        and np.array(clicks) == pytest.approx(np.array([points]))
    )
    assert "[112.5, 100.0, 225.0, 150.0]" in said.out and f"{W}x{H} pixels" in said.out


def test_mask_and_overlay_show_the_answer_on_the_image_as_given(ask):
    _, result, _, _, _, _ = ask([completion((42, 50, 95, 90))])
    mask = np.asarray(Image.open(ask.out / "mask.png"))
    wanted = np.zeros((H, W), np.uint8)
    wanted[100:150, 120:240] = 255
    assert np.array_equal(mask, wanted) and result["mask_pixels"] == 50 * 120
    picture = np.asarray(Image.open(ask.out / "overlay.png").convert("RGB")).astype(int)
    assert picture.shape == (299, 448, 3)
    x1, y1, x2, y2 = (np.array(result["bbox"]) * 448 / W).round().astype(int)
    for x, y in (
        (x1, (y1 + y2) // 2),
        (x2, (y1 + y2) // 2),
        ((x1 + x2) // 2, y1),
        ((x1 + x2) // 2, y2),
    ):
        assert np.ptp(picture[y - 1 : y + 2, x - 1 : x + 2], axis=-1).max() > 100, (
            x,
            y,
        )  # the box's yellow
    assert np.ptp(picture[187, 240]) > 20 and np.ptp(picture[20, 20]) < 5  # tinted inside the mask


def test_the_completion_that_agrees_most_with_the_others_is_kept(ask):
    texts = [
        completion((0, 0, 20, 20), think="alone"),
        completion((40, 40, 80, 80), think="in the middle"),
        "garbage",
        completion((44, 40, 84, 80), think="to the right"),
        completion((36, 40, 76, 80), think="to the left"),
    ]
    status, result, said, asked, _, _ = ask(texts)
    assert status == 0 and result["reasoning"] == "in the middle" and result["text"] == texts[1]
    assert result["bbox"] == pytest.approx([40 * W / 112, 40 * H / 112, 80 * W / 112, 80 * H / 112])
    beside = 36 / 44  # IoU of two 40 px boxes, 4 px apart
    assert result["agreement"] == pytest.approx((0 + beside + beside) / 3)
    assert result["texts"] == texts and result["problem"] == "" and len(asked) == 1
    assert (
        "in the middle" in said.out
        and "agreement  0.55" in said.out
        and "5 completions" in said.out
    )


def test_one_completion_has_no_agreement(ask):
    _, result, said, _, _, _ = ask([completion((10, 10, 50, 50))])
    assert result["agreement"] is None and "agreement" not in said.out


def test_a_box_beats_points_and_points_alone_are_enough(ask):
    only_points = completion((50, 10, 10, 50))  # x2 < x1: the box is malformed
    status, result, said, asked, _, _ = ask([only_points])
    assert (
        status == 0 and result["bbox"] is None and asked[-1][1] is None and len(asked[-1][2]) == 1
    )
    assert result["problem"] and result["problem"] in said.out
    only_box = (
        '<think>x</think><answer>{"bbox": [10, 10, 50, 50], "points_1": 3, "points_2": 4}</answer>'
    )
    status, result, _, asked, _, _ = ask([only_points, only_box])
    assert (
        status == 0 and result["points"] is None and asked[-1][2] is None and len(asked[-1][1]) == 1
    )
    assert result["text"] == only_box


def test_a_wild_box_stays_within_one_image_size_of_the_image(ask):
    _, result, _, _, _, _ = ask([completion((-1e9, -1e9, 1e9, 1e9), ((1e12, 5), (5, -1e12)))])
    assert result["bbox"] == [-W, -H, 2 * W, 2 * H]
    assert result["points"][0][0] == 2 * W and result["points"][1][1] == -H


def test_without_a_usable_completion_the_status_is_3_and_only_the_reason_is_written(ask):
    ask([completion((10, 10, 50, 50))])
    assert (ask.out / "mask.png").exists()
    status, result, said, asked, _, _ = ask(["no answer here", "<answer>{}</answer>"])
    assert status == 3 and len(asked) == 1 and result["problem"] == "no answer block"
    assert result["texts"] == ["no answer here", "<answer>{}</answer>"]
    assert [file.name for file in ask.out.iterdir()] == ["result.json"]  # no earlier mask is left
    assert "no usable completion of 2: no answer block" in said.err and "mask" not in said.out


@pytest.mark.parametrize(
    "flags, count, drawn",
    [
        ("", 1, (1, 512, 0.0, 0)),
        ("", 3, (3, 512, 1.0, 0)),
        ("--temperature 0.7 --seed 5 --max-new-tokens 9", 1, (1, 9, 0.7, 5)),
        ("--temperature 0", 3, (3, 512, 0.0, 0)),
    ],
)
def test_one_completion_is_the_most_likely_one_and_several_are_sampled(ask, flags, count, drawn):
    assert ask([completion((10, 10, 50, 50))] * count, flags)[4][0][1:] == drawn


def test_the_prompt_holds_question_and_image_in_the_model_frame(ask):
    (prompt,), *_ = ask([completion((10, 10, 50, 50))], "--prompt direct")[4][0]
    assert prompt.frame.image == (W, H) and prompt.frame.model == (112, 112)
    (other,), *_ = ask([completion((10, 10, 50, 50))], "--prompt reasoning --resize aspect")[4][1]
    assert len(prompt.ids) < len(other.ids) and other.frame.model != (112, 112)


def test_the_question_is_in_the_prompt(ask):
    (plain,), *_ = ask([completion((10, 10, 50, 50))])[4][0]
    (other,), *_ = ask(
        [completion((10, 10, 50, 50))], "--query 'Where is the large bright structure on the left?'"
    )[4][1]
    assert len(other.ids) > len(plain.ids) and plain.ids.tolist() != other.ids.tolist()


def test_the_pixel_limits_bound_the_model_frame(ask):
    flags = (
        "--resize aspect --max-pixels 3200 --min-pixels 3000",
        "--resize aspect --min-pixels 100000 --max-pixels 200000",
    )
    areas = [
        np.prod(ask([completion((10, 10, 50, 50))], flag)[4][-1][0][0].frame.model)
        for flag in flags
    ]
    assert areas[0] <= 3200 and 100_000 <= areas[1] <= 200_000


def test_the_models_in_use_are_printed_and_written(ask):
    _, result, said, _, _, loaded = ask([completion((10, 10, 50, 50))], "--multimask")
    crm = str(ROOT / "demo/crm")
    assert (
        result["crm"] == crm
        and result["asm"] == "recorder"
        and result["query"] == "What is bright?"
    )
    assert f"CRM {crm}, ASM recorder" in said.out and loaded[-1]["multimask"] is True
    assert ask([completion((10, 10, 50, 50))])[5][-1]["multimask"] is False


def test_a_model_whose_logits_are_not_finite_is_one_line(ask, capsys):
    with pytest.raises(SystemExit) as exit_:
        ask(FloatingPointError("the model's logits are not finite"))
    assert (
        exit_.value.code == 2
        and capsys.readouterr().err == "error: the model's logits are not finite\n"
    )
    assert list(ask.out.iterdir()) == []


@pytest.mark.parametrize(
    "flags, told",
    [
        ("--image none.png", "--image none.png does not exist"),
        ("--query ' '", "--query is empty"),
        ("--asm otsu", "otsu: no such ASM"),
        ("--prompt nowhere", "--prompt nowhere"),
        ("--resize square:5", "square:5"),
        ("--crm ./nowhere", "nowhere"),
        ("--out {image}", "image.png"),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_sampled_or_written(
    ask, tmp_path, capsys, flags, told
):
    texts = [completion((10, 10, 50, 50))]
    with pytest.raises(SystemExit) as exit_:
        ask(texts, flags.format(image=tmp_path / "image.png"))
    error = capsys.readouterr().err
    assert (
        exit_.value.code == 2
        and error.startswith("error: ")
        and error.count("\n") == 1
        and told in error
    )
    assert [file.name for file in tmp_path.iterdir()] == ["image.png"]


def test_several_boxes_become_one_mask(ask):
    boxes = [(42, 56, 56, 84), (70, 56, 84, 84)]
    text = write_boxes([(box, ((50, 60), (52, 70))) for box in boxes])
    status, result, _, asked, _, _ = ask([text], "--prompt multi")
    assert status == 0 and len(result["regions"]) == len(asked) == 2
    first, second = (region["bbox"] for region in result["regions"])
    assert result["bbox"] == [*first[:2], *second[2:]] and result["points"] is None
    assert first[0] == pytest.approx(42 * W / 112)
