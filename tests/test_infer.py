"""infer.py: coordinate frames, voting, exit status, what is written and what is not.

A fixed sampler and an Otsu threshold stand in for the two models, so that every number is known."""

import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from test_asm import Otsu

import asm
import infer
from crm import CRM, Group, Prompt
from extras.boxes import write_boxes
from runtime.cli import ROOT, parse_args

W, H = 300, 200  # of the image
SIDE = 112  # of the model frame, so x and y scale differently
LEFT, RIGHT, TOP, BOTTOM = 120, 240, 100, 150  # of what is bright in the image
X, Y = W / SIDE, H / SIDE  # pixels of the image per pixel of the model frame
KEY_POINTS = ((30, 30), (60, 40))
BOX = (10, 10, 50, 50)


def completion(
    bbox: Sequence[float],
    points: Sequence[Sequence[float]] = KEY_POINTS,
    think: str = "a bright disc",
) -> str:
    """Returns the text of a completion, in pixels of the model frame. The box may be malformed."""
    first, second = points
    fields = {"bbox": list(bbox), "points_1": list(first), "points_2": list(second)}
    return f"<think>{think}</think><answer>{json.dumps(fields)}</answer>"


def in_image(box: Sequence[float]) -> list[float]:
    """Returns a box of the model frame in the image frame."""
    x1, y1, x2, y2 = box
    return [x1 * X, y1 * Y, x2 * X, y2 * Y]


class Recorder(Otsu):
    """An Otsu threshold that writes down what it was asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[np.ndarray, Any, Any]] = []

    def segment(
        self, image: np.ndarray, boxes: Any = None, points: Any = None, **options: Any
    ) -> tuple[np.ndarray, np.ndarray]:
        self.asked.append((image, boxes, points))
        return super().segment(image, boxes, points)


RECORDER = Recorder()
LOADED: list[dict[str, Any]] = []  # the options with which RECORDER was loaded


def load_recorder(path: str, device: Any, **options: Any) -> Recorder:
    """An entry of asm.SEGMENTERS."""
    LOADED.append(options)
    return RECORDER


@dataclass
class Drawn:
    """What the sampler was asked for."""

    prompt: Prompt
    completions: int
    max_new_tokens: int
    temperature: float
    seed: int


@dataclass
class Outcome:
    """What a call of infer.py did."""

    status: int
    result: dict[str, Any]
    out: str  # what was printed
    err: str
    asked: list[tuple[np.ndarray, Any, Any]]  # of the segmenter
    drawn: Drawn  # of the sampler


class Asker:
    """Runs infer.py about one image, with completions that are given."""

    def __init__(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
    ) -> None:
        self.image = folder / "image.png"
        self.out = folder / "out"
        self.monkeypatch = monkeypatch
        self.capsys = capsys
        picture = np.full((H, W, 3), 20, np.uint8)
        picture[TOP:BOTTOM, LEFT:RIGHT] = 220
        Image.fromarray(picture).save(self.image)

    def __call__(self, texts: list[str] | Exception, flags: str = "") -> Outcome:
        drawn = []

        def sample(
            crm: CRM,
            prompts: list[Prompt],
            G: int,
            max_new_tokens: int,
            temperature: float,
            seed: int,
        ) -> list[Group]:
            drawn.append(Drawn(prompts[0], G, max_new_tokens, temperature, seed))
            if isinstance(texts, Exception):
                raise texts
            empty = torch.zeros(G, 0)
            lengths = torch.zeros(G).long()
            finished = torch.ones(G).bool()
            return [Group(prompts[0], empty.long(), lengths, empty, finished, texts)]

        self.monkeypatch.setattr(infer, "sample", sample)
        RECORDER.asked = []
        count = 1 if isinstance(texts, Exception) else len(texts)
        argv = ["--image", str(self.image), "--query", "What is bright?", "--asm", "recorder:"]
        argv += ["--out", str(self.out), "--resize", f"square:{SIDE}"]
        argv += ["--completions", str(count), *shlex.split(flags)]
        self.capsys.readouterr()
        status = infer.main(parse_args(infer.Config, "", argv=argv, moved=infer.MOVED))
        result = json.loads((self.out / "result.json").read_text())
        said = self.capsys.readouterr()
        return Outcome(status, result, said.out, said.err, RECORDER.asked, drawn[0])

    def rejected(self, texts: list[str] | Exception, flags: str = "") -> str:
        """Returns the one line of a call that ends with status 2."""
        with pytest.raises(SystemExit) as exit_info:
            self(texts, flags)
        error = self.capsys.readouterr().err
        assert exit_info.value.code == 2
        assert error.startswith("error: ")
        assert error.count("\n") == 1
        return error


@pytest.fixture
def ask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> Asker:
    monkeypatch.setitem(asm.SEGMENTERS, "recorder:", "test_infer.load_recorder")
    LOADED.clear()
    return Asker(tmp_path, monkeypatch, capsys)


# ---------------------------------------------------------------- frames


def test_box_and_points_are_scaled_from_the_model_frame_to_the_image_frame(ask):
    got = ask([completion((42, 56, 84, 84), ((56, 28), (70, 63)))])
    box = [112.5, 100, 225, 150]
    points = np.array([[56.5 * X - 0.5, 28.5 * Y - 0.5], [70.5 * X - 0.5, 63.5 * Y - 0.5]])
    assert got.status == 0
    assert got.result["size"] == [W, H]
    assert got.result["bbox"] == pytest.approx(box)
    assert np.array(got.result["points"]) == pytest.approx(points)
    image, boxes, clicks = got.asked[0]
    assert image.shape == (H, W, 3)
    assert np.array(boxes) == pytest.approx(np.array([box]))
    assert np.array(clicks) == pytest.approx(points[None])
    assert "[112.5, 100.0, 225.0, 150.0]" in got.out
    assert f"{W}x{H} pixels" in got.out


def test_mask_and_overlay_show_the_answer_on_the_image_as_given(ask):
    got = ask([completion((42, 50, 95, 90))])
    mask = np.asarray(Image.open(ask.out / "mask.png"))
    wanted = np.zeros((H, W), np.uint8)
    wanted[TOP:BOTTOM, LEFT:RIGHT] = 255
    assert np.array_equal(mask, wanted)
    assert got.result["mask_pixels"] == (BOTTOM - TOP) * (RIGHT - LEFT)
    overlay = np.asarray(Image.open(ask.out / "overlay.png").convert("RGB")).astype(int)
    assert overlay.shape == (299, 448, 3)
    x1, y1, x2, y2 = (np.array(got.result["bbox"]) * 448 / W).round().astype(int)
    middle_x = (x1 + x2) // 2
    middle_y = (y1 + y2) // 2
    for x, y in ((x1, middle_y), (x2, middle_y), (middle_x, y1), (middle_x, y2)):
        near = overlay[y - 1 : y + 2, x - 1 : x + 2]
        assert np.ptp(near, axis=-1).max() > 100, (x, y)  # the box's yellow
    assert np.ptp(overlay[187, 240]) > 20  # tinted inside the mask
    assert np.ptp(overlay[20, 20]) < 5


def test_a_wild_box_stays_within_one_image_size_of_the_image(ask):
    got = ask([completion((-1e9, -1e9, 1e9, 1e9), ((1e12, 5), (5, -1e12)))])
    assert got.result["bbox"] == [-W, -H, 2 * W, 2 * H]
    assert got.result["points"][0][0] == 2 * W
    assert got.result["points"][1][1] == -H


def test_the_prompt_holds_question_and_image_in_the_model_frame(ask):
    square = ask([completion(BOX)], "--prompt direct").drawn.prompt
    assert square.sizes.image == (W, H)
    assert square.sizes.model == (SIDE, SIDE)
    aspect = ask([completion(BOX)], "--prompt reasoning --resize aspect").drawn.prompt
    assert len(square.ids) < len(aspect.ids)
    assert aspect.sizes.model != (SIDE, SIDE)


def test_the_question_is_in_the_prompt(ask):
    plain = ask([completion(BOX)]).drawn.prompt
    longer = "--query 'Where is the large bright structure on the left?'"
    other = ask([completion(BOX)], longer).drawn.prompt
    assert len(other.ids) > len(plain.ids)


def test_a_limit_of_pixels_bounds_the_model_frame(ask):
    areas = []
    for limit in (4000, 40_000):
        prompt = ask([completion(BOX)], f"--resize aspect:{limit}").drawn.prompt
        width, height = prompt.sizes.model
        areas.append(width * height)
    assert areas[0] <= 4000 < areas[1] <= 40_000


# ---------------------------------------------------------------- completions


def test_the_completion_that_agrees_most_with_the_others_is_kept(ask):
    texts = [
        completion((0, 0, 20, 20), think="alone"),
        completion((40, 40, 80, 80), think="in the middle"),
        "garbage",
        completion((44, 40, 84, 80), think="to the right"),
        completion((36, 40, 76, 80), think="to the left"),
    ]
    got = ask(texts)
    assert got.status == 0
    assert got.result["reasoning"] == "in the middle"
    assert got.result["text"] == texts[1]
    assert got.result["bbox"] == pytest.approx(in_image((40, 40, 80, 80)))
    shifted = 36 / 44  # IoU of two boxes of 40 px, 4 px apart
    assert got.result["agreement"] == pytest.approx((0 + shifted + shifted) / 3)
    assert got.result["texts"] == texts
    assert got.result["completions"] == 5
    assert got.result["problem"] == ""
    assert len(got.asked) == 1
    assert "in the middle" in got.out
    assert "agreement  0.55" in got.out
    assert "5 completions" in got.out


def test_one_completion_has_no_agreement(ask):
    got = ask([completion(BOX)])
    assert got.result["agreement"] is None
    assert "agreement" not in got.out


def test_points_alone_are_enough(ask):
    got = ask([completion((50, 10, 10, 50))])  # x2 < x1: the box is malformed
    _, boxes, points = got.asked[-1]
    assert got.status == 0
    assert got.result["bbox"] is None
    assert boxes is None
    assert len(points) == 1
    assert got.result["problem"] == "box malformed"
    assert "box malformed" in got.out


def test_a_box_beats_points(ask):
    only_points = completion((50, 10, 10, 50))
    only_box = '<think>x</think><answer>{"bbox": [10, 10, 50, 50], "points_1": 3, "points_2": 4}'
    only_box += "</answer>"
    got = ask([only_points, only_box])
    _, boxes, points = got.asked[-1]
    assert got.status == 0
    assert got.result["points"] is None
    assert points is None
    assert len(boxes) == 1
    assert got.result["text"] == only_box


@pytest.mark.parametrize(
    "flags, count, max_new_tokens, temperature, seed",
    [
        ("", 1, 512, 0.0, 0),
        ("", 3, 512, 1.0, 0),
        ("--temperature 0.7 --seed 5 --max-new-tokens 9", 1, 9, 0.7, 5),
        ("--temperature 0", 3, 512, 0.0, 0),
    ],
)
def test_one_completion_is_the_most_likely_one_and_several_are_sampled(
    ask, flags, count, max_new_tokens, temperature, seed
):
    drawn = ask([completion(BOX)] * count, flags).drawn
    assert drawn.completions == count
    assert drawn.max_new_tokens == max_new_tokens
    assert drawn.temperature == temperature
    assert drawn.seed == seed


def test_several_boxes_become_one_mask(ask):
    boxes = [(42, 56, 56, 84), (70, 56, 84, 84)]
    text = write_boxes([(box, ((50, 60), (52, 70))) for box in boxes])
    got = ask([text], "--prompt boxes")
    assert got.status == 0
    assert len(got.result["regions"]) == 2
    assert len(got.asked) == 2
    regions = got.result["regions"]
    first = regions[0]["bbox"]
    second = regions[1]["bbox"]
    assert len(regions) == 2
    assert first == pytest.approx(in_image(boxes[0]))
    assert second == pytest.approx(in_image(boxes[1]))
    assert got.result["bbox"] == [*first[:2], *second[2:]]
    assert got.result["points"] is None


# ---------------------------------------------------------------- what is printed and written


def test_the_models_in_use_are_printed_and_written(ask):
    got = ask([completion(BOX)], "--multimask")
    crm = str(ROOT / "demo/crm_grpo")
    assert got.result["crm"] == crm
    assert got.result["asm"] == "recorder:"
    assert got.result["query"] == "What is bright?"
    assert "no --crm given: demo/crm_grpo is used" in got.out
    assert f"CRM {crm}, ASM recorder:" in got.out
    ask([completion(BOX)])
    assert [options["multimask"] for options in LOADED] == [True, False]


def test_without_a_usable_completion_the_status_is_3_and_only_the_reason_is_written(ask):
    ask([completion(BOX)])
    assert (ask.out / "mask.png").exists()
    texts = ["no answer here", "<answer>{}</answer>"]
    got = ask(texts)
    assert got.status == 3
    assert got.asked == []
    assert got.result["problem"] == "no answer block"
    assert got.result["texts"] == texts
    assert [file.name for file in ask.out.iterdir()] == ["result.json"]  # no earlier mask is left
    assert "no usable completion of 2: no answer block" in got.err
    assert "mask" not in got.out


def test_another_question_overwrites_the_files_of_the_last_one(ask):
    first = ask([completion(BOX)]).result
    second = ask([completion((20, 20, 90, 90))]).result
    assert first["bbox"] != second["bbox"]
    names = sorted(file.name for file in ask.out.iterdir())
    assert names == ["mask.png", "overlay.png", "result.json"]


@pytest.mark.parametrize("name", ["mask.png", "overlay.png", "result.json"])
def test_a_file_that_was_not_written_here_is_left_alone(ask, name):
    ask.out.mkdir()
    file = ask.out / name
    file.write_text('{"query": "of another program"}')
    error = ask.rejected([completion(BOX)])
    assert f"has a {name} that was not written here" in error
    assert file.read_text() == '{"query": "of another program"}'
    assert [path.name for path in ask.out.iterdir()] == [name]


def test_other_files_in_the_folder_are_left_alone(ask):
    ask.out.mkdir()
    (ask.out / "notes.txt").write_text("mine")
    ask([completion(BOX)])
    ask(["garbage"])
    assert (ask.out / "notes.txt").read_text() == "mine"


# ---------------------------------------------------------------- bad input


def test_a_model_whose_logits_are_not_finite_is_one_line(ask):
    error = ask.rejected(FloatingPointError("the model's logits are not finite"))
    assert error == "error: the model's logits are not finite\n"
    assert list(ask.out.iterdir()) == []


def test_a_prompt_longer_than_the_models_context_is_one_line(ask):
    question = "Where is the bright structure? " * 3000
    error = ask.rejected([completion(BOX)], f"--query '{question}'")
    assert "the prompt has" in error
    assert "the model reads" in error
    assert not ask.out.exists()


@pytest.mark.parametrize(
    "flags, says",
    [
        ("--image none.png", "--image none.png does not exist"),
        ("--query ' '", "--query is empty"),
        ("--asm otsu", "otsu: no such ASM"),
        ("--prompt nowhere", "--prompt nowhere"),
        ("--resize square:5", "square:5"),
        ("--crm ./nowhere", "nowhere"),
        ("--out {image}", "image.png"),
        ("--image {folder}", "python -m extras.scans takes it"),
        ("--slice 3", "--slice has moved: python -m extras.scans takes it"),
        ("--samples 3", "--samples has moved: it is called --completions"),
        ("--max-pixels 9", "--max-pixels has moved: give --resize aspect:PIXELS"),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_sampled_or_written(ask, tmp_path, flags, says):
    flags = flags.format(image=ask.image, folder=tmp_path)
    assert says in ask.rejected([completion(BOX)], flags)
    assert [file.name for file in tmp_path.iterdir()] == ["image.png"]
