"""extras/predictions.py: other models' completions, the frame they were written in, what is not
overwritten."""

import json
import weakref

import pytest
from conftest import noise_image
from hypothesis import given, settings
from hypothesis import strategies as st
from test_evaluate import BOX, PAIR, Few, few, run

import crm as crm_module
import metrics
from data import EMBEDDED, Sizes, load_samples, model_size, to_model
from extras import predictions
from extras.predictions import FRAMES, Resize, predictions_from, read_given, resize_of
from runtime.files import read_jsonl

SIX = "--limit 6 --asm none"


@pytest.fixture(scope="module")
def tests():
    """Six embedded questions, in a list: each is decoded once."""
    examples = load_samples(EMBEDDED["data"], "test")[:6]
    return Few(examples[i] for i in range(6))


def size_in(frame, size):
    if frame == "norm1000":
        return 1000, 1000
    if frame == "fractions":
        return 1, 1
    return size if frame == "pixels" else model_size(size)


def answers(examples, frame="pixels"):
    """Perfect lines, written in a frame."""
    lines = []
    for example in examples:
        sizes = Sizes(example.image.size, size_in(frame, example.image.size))
        bbox = to_model(example.bbox, sizes)
        lines.append({"id": example.id, "bbox": bbox, "points": to_model(example.points, sizes)})
    return lines


def write(tmp_path, lines):
    file = tmp_path / "p.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in lines))
    return file


def predicted(tmp_path, lines, *flags, check=0):
    """The command, in a process of its own -> (stdout, stderr)."""
    file = write(tmp_path, lines)
    return run("-m extras.predictions", file, SIX, "--out", tmp_path / "p", *flags, check=check)


def from_lines(tmp_path, *lines, examples=None, frame="pixels", crm=None, resize=None):
    """The predictions, in this process."""
    given_lines, asked = read_given(write(tmp_path, lines))
    if examples is None:
        examples = few()
    rows, _ = predictions_from(given_lines, asked, examples, frame, resize_of(crm, resize))
    return rows


def main_error(capsys, *words):
    """What the command prints in this process, where it ends with status 2."""
    with pytest.raises(SystemExit, match="2"):
        predictions.main([str(word) for word in words])
    error = capsys.readouterr().err
    assert error.startswith("error:")
    assert error.count("\n") == 1
    return error


# ---------------------------------------------------------------- the command


def test_perfect_predictions_are_perfect_in_the_frame_they_were_written_in(tmp_path, tests):
    for frame in FRAMES:
        rows = from_lines(tmp_path, *answers(tests, frame), examples=tests, frame=frame)
        for p in rows:
            assert metrics.scores(p)["iou"] == pytest.approx(1, abs=1e-6), frame
            assert metrics.scores(p)["pdice"] == pytest.approx(1, abs=1e-6), frame


def test_the_command_writes_what_an_evaluation_writes(tmp_path, tests):
    out, _ = predicted(tmp_path, answers(tests))
    names = {file.name for file in (tmp_path / "p").iterdir()}
    assert names == set(predictions.OUTPUTS)
    assert "| all | 6 | 100.0 [100.0, 100.0]" in out
    assert "0 of 6 questions have no prediction" in out
    assert "look like" not in out
    assert len(read_jsonl(tmp_path / "p/predictions.jsonl")) == 6
    # evaluate.py reads the folder
    said, _ = run("evaluate.py --compare", tmp_path / "p", tmp_path / "p")
    assert "100.0 -> 100.0" in said
    # and the same command may run again
    again, _ = predicted(tmp_path, answers(tests))
    assert "| all | 6 | 100.0 [100.0, 100.0]" in again


def test_missing_predictions_are_refusals_that_are_counted_and_reported(tmp_path, tests, capsys):
    file = write(tmp_path, answers(tests)[:4])
    predictions.main([str(file), *SIX.split(), "--out", str(tmp_path / "p")])
    summary = json.loads((tmp_path / "p/summary.json").read_text())
    assert "2 of 6 questions have no prediction" in capsys.readouterr().out
    assert summary["refusals"] == {"no prediction": 2}
    assert summary["all"]["iou"]["mean"] == pytest.approx(4 / 6)


def test_masks_are_drawn_from_predictions(tmp_path, tests, capsys):
    file = write(tmp_path, answers(tests))
    predictions.main([str(file), "--limit", "6", "--out", str(tmp_path / "p")])
    assert "no --asm given: demo/asm is used" in capsys.readouterr().out
    for row in read_jsonl(tmp_path / "p/predictions.jsonl"):
        assert row["dice"]["both"] > 0.5


IMPOSSIBLE = {
    "unknown id": (
        lambda lines: [*lines, dict(lines[0], id="nobody")],
        "'nobody'; those there look like 'test_00000'",
    ),
    "id repeated": (lambda lines: [*lines, lines[2]], "line 7: id"),
    "no id": (lambda lines: [{"bbox": [1, 2, 3, 4]}], "line 1: an object with id"),
    "no answer": (lambda lines: [{"id": "test_00000"}], "line 1: an object with id"),
    "points 5": (
        lambda lines: [*lines[:1], {"id": "x", "points": 5}],
        "line 2: an object with id",
    ),
    "text 5": (
        lambda lines: [{"id": "x", "text": 5, "bbox": [1, 2, 3, 4]}],
        "line 1: an object with id",
    ),
    "no object": (lambda lines: [[1, 2]], "line 1: not a JSON object"),
    "empty": (lambda lines: [], "p.jsonl: no line in it"),
    "fractions": (
        lambda lines: [{"id": "test_00000", "bbox": [0.1, 0.2, 0.9, 0.95]}],
        "look like fractions of the image; write them times 1000 and give --frame norm1000",
    ),
}


@pytest.mark.parametrize("name", IMPOSSIBLE)
def test_predictions_that_cannot_be_meant_are_one_line_and_nothing_is_written(
    tmp_path, tests, capsys, name
):
    change, says = IMPOSSIBLE[name]
    file = write(tmp_path, change(answers(tests)))
    assert says in main_error(capsys, file, *SIX.split(), "--out", tmp_path / "p")
    assert not (tmp_path / "p").exists()


@pytest.mark.parametrize(
    "flags, says",
    [
        ("--frame model --resize square:56", "--frame model is wrong"),
        ("--frame model --resize square:3", "--resize square:3"),
        ("--frame model --crm nowhere", "--crm nowhere"),
        ("--frame other", "--frame"),
        ("--data nowhere", "nowhere"),
        ("--split none", "no sample in split 'none'"),
        ("--limit -1", "--limit -1: must be at least 0"),
        ("--asm nowhere", "nowhere"),
        ("--crn demo/crm", "--crn"),
    ],
)
def test_flags_that_do_not_fit_are_one_line_and_nothing_is_written(
    tmp_path, tests, capsys, flags, says
):
    file = write(tmp_path, answers(tests))
    words = [file, *SIX.split(), "--out", tmp_path / "p", *flags.split()]
    assert says in main_error(capsys, *words)
    assert not (tmp_path / "p").exists()


def test_no_file_and_no_such_file_are_one_line(tmp_path, capsys):
    assert "FILE" in main_error(capsys, "--out", tmp_path / "p")
    assert "nowhere.jsonl" in main_error(capsys, "nowhere.jsonl", "--out", tmp_path / "p")
    assert not (tmp_path / "p").exists()


def test_the_example_that_the_help_prints_is_a_line_that_can_be_read(tmp_path, capsys):
    with pytest.raises(SystemExit, match="0"):
        predictions.main(["--help"])
    said = capsys.readouterr().out
    assert "python data.py PATH" in said
    examples = [line for line in said.splitlines() if line.strip().startswith('{"id": "mine-3"')]
    assert len(examples) == 2
    for example in examples:
        lines = [json.loads(example)]
        given_lines, asked = read_given(write(tmp_path, lines))
        assert asked == ["bbox", "points"]
        assert given_lines["mine-3"] == lines[0]


# ---------------------------------------------------------------- what is not overwritten


@pytest.mark.parametrize("name", predictions.OUTPUTS)
def test_the_file_itself_is_never_overwritten(tmp_path, tests, capsys, name):
    folder = tmp_path / "eval"
    folder.mkdir()
    text = "".join(json.dumps(row) + "\n" for row in answers(tests))
    (folder / name).write_text(text)
    (tmp_path / "link").symlink_to(folder)
    for out in (folder, tmp_path / "link", tmp_path / "eval/../eval"):
        error = main_error(capsys, folder / name, *SIX.split(), "--out", out)
        assert "would be overwritten; give another --out" in error
    assert (folder / name).read_text() == text
    assert len(list(folder.iterdir())) == 1


def test_a_file_that_is_beside_the_results_may_stay_there(tmp_path, tests):
    file = write(tmp_path, answers(tests))
    predictions.main([str(file), *SIX.split(), "--out", str(tmp_path)])
    assert (tmp_path / "table.md").exists()
    assert len(file.read_text().splitlines()) == 6


def test_another_evaluation_and_other_files_are_never_overwritten(tmp_path, tests, capsys):
    file = write(tmp_path, answers(tests))
    words = [file, *SIX.split(), "--out", tmp_path / "p"]
    predictions.main([str(word) for word in words])
    table = (tmp_path / "p/table.md").read_text()
    capsys.readouterr()
    assert "give another --out" in main_error(capsys, *words, "--frame", "norm1000")
    write(tmp_path, answers(tests)[:5])  # the same name, another content
    error = main_error(capsys, *words)
    assert "have changed since; give another --out" in error
    assert (tmp_path / "p/table.md").read_text() == table

    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/table.md").write_text("mine")
    error = main_error(capsys, file, *SIX.split(), "--out", tmp_path / "mine")
    assert "has a table.md that no evaluation here wrote" in error
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["table.md"]


# ---------------------------------------------------------------- which frame fits


def frame_line(lines, examples, frame):
    given_lines = {row["id"]: row for row in lines}
    parts = ["bbox", "points"]
    _, check = predictions_from(given_lines, parts, examples, frame, Resize())
    return check


@pytest.mark.parametrize("written", [*FRAMES, "fractions"])
@pytest.mark.parametrize("given_frame", FRAMES)
def test_the_frame_that_fits_is_named_when_it_is_not_the_given_one(tests, written, given_frame):
    check = frame_line(answers(tests, written), tests, given_frame)
    said = check.better_frame()
    if written == given_frame:
        assert said == ""
        return
    assert said.startswith(f"the boxes look like {written} (mean IoU 1.00), not like {given_frame}")
    advice = "norm1000" if written == "fractions" else written
    assert said.endswith(f"give --frame {advice}")
    assert "\n" not in said


def test_the_command_says_which_frame_fits(tmp_path, tests):
    out, _ = predicted(tmp_path, answers(tests), "--frame norm1000")
    assert out.splitlines()[-1].endswith("not like norm1000 (0.00): give --frame pixels")


def test_boxes_outside_of_their_images_end_the_command_with_the_frame_that_fits(
    tmp_path, tests, capsys
):
    file = write(tmp_path, answers(tests, "norm1000"))
    error = main_error(capsys, file, *SIX.split(), "--out", tmp_path / "p")
    assert "boxes leave their image, so --frame pixels is wrong" in error
    assert error.endswith("give --frame norm1000\n")
    assert not (tmp_path / "p").exists()


def test_a_model_that_is_merely_poor_is_not_told_to_change_its_frame(tests):
    lines = answers(tests)
    for i, row in enumerate(lines):
        x1, y1, x2, y2 = row["bbox"]
        shift = (x2 - x1) * (0.5 if i % 2 else -0.5)
        row["bbox"] = (x1 + shift, y1, x2 + shift, y2)
    assert frame_line(lines, tests, "pixels").better_frame() == ""
    assert frame_line([], tests, "pixels").better_frame() == ""


# ---------------------------------------------------------------- what a line may be

ODD = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda x: (
        st.lists(x, max_size=5)
        | st.dictionaries(st.sampled_from(["id", "bbox", "points", "a"]), x, max_size=3)
    ),
    max_leaves=8,
)


@given(st.dictionaries(st.sampled_from(["id", "text", "bbox", "points"]), ODD) | ODD)
@settings(max_examples=300, deadline=None)
def test_odd_types_give_one_line_or_a_refusal(tmp_path_factory, odd):
    if isinstance(odd, dict) and isinstance(odd.get("id"), str):
        odd["id"] = "q0"
    folder = tmp_path_factory.mktemp("odd")
    try:
        p = from_lines(folder, odd, {"id": "q1", "text": ""})[0]
    except ValueError as error:
        assert "p.jsonl" in str(error)
        assert "\n" not in str(error)
        return
    for value in metrics.scores(p | {"dice": None}).values():
        assert value is None or 0 <= value <= 2
    json.dumps(p)


def test_what_was_not_asked_for_is_no_refusal_and_has_no_score(tmp_path):
    good = {"id": "q0", "bbox": BOX}
    rows = from_lines(tmp_path, good, {"id": "q1", "bbox": [1, 2, "x", 4]})
    first, second = (metrics.scores(p | {"dice": None}) for p in rows)
    assert (first["iou"], first["refused"], first["iou_parsed"]) == (1, 0, 1)
    assert (second["iou"], second["refused"]) == (0, 1)
    assert first["pdice"] is second["pdice"] is None

    rows = from_lines(tmp_path, {"id": "q0", "points": PAIR})
    first, second = (metrics.scores(p | {"dice": None}) for p in rows)
    assert (first["pdice"], first["refused"]) == (1, 0)
    assert first["iou"] is first["iou50"] is None
    assert (second["pdice"], second["refused"]) == (0, 1)  # no line for it

    rows = from_lines(tmp_path, good, {"id": "q1", "bbox": BOX, "points": PAIR})
    first, second = (metrics.scores(p | {"dice": None}) for p in rows)
    assert (first["refused"], first["iou"], first["pdice"]) == (1, 1, 0)
    assert second["refused"] == 0


def test_a_text_is_read_as_a_completion_is(tmp_path):
    answer = '{"bbox": [10, 10, 20, 20], "points_1": [12, 12], "points_2": [18, 18]}'
    text = f"<think>a draft</think><answer>{answer}</answer>"
    p, _ = from_lines(tmp_path, {"id": "q0", "text": text, "bbox": [0, 0, 1, 1]})
    assert metrics.scores(p)["iou"] == 1
    assert p["completions"][0]["text"] == text


def test_text_with_unusual_line_separators_stays_one_line(tmp_path):
    file = tmp_path / "p.jsonl"
    file.write_text(json.dumps({"id": "q0", "text": "a\u2028b\x85c"}, ensure_ascii=False) + "\n")
    given_lines, _ = read_given(file)
    assert given_lines["q0"]["text"] == "a\u2028b\x85c"


def test_images_are_not_kept_while_predictions_are_read(tmp_path):
    class Lazy(Few):
        alive = 0
        most = 0

        def __getitem__(self, i):
            example = few(40)[i]
            self.alive += 1
            self.most = max(self.most, self.alive)
            weakref.finalize(example, self.forget)
            return example

        def forget(self):
            self.alive -= 1

    examples = Lazy(few(40))
    rows = from_lines(tmp_path, {"id": "q0", "text": ""}, examples=examples)
    assert len(rows) == 40
    assert examples.most <= 2


# ---------------------------------------------------------------- the model frame


def scaled_box(size, model):
    """BOX of an image as it is written in the model frame."""
    x = model[0] / size[0]
    y = model[1] / size[1]
    return [10 * x, 10 * y, 20 * x, 20 * y]


@pytest.mark.parametrize("size", [(400, 300), (61, 203)])
def test_the_model_frame_is_the_one_that_encode_uses(tmp_path, size):
    """Once 392x308 here and 252x168 in encode: the checkpoint's own limit was left out."""
    folder = str(EMBEDDED["crm"])
    prompt = crm_module.load_crm(folder).encode(noise_image(*size), "?")
    written = {"id": "q0", "bbox": scaled_box(size, prompt.sizes.model)}
    (p,) = from_lines(tmp_path, written, examples=few(1, size), frame="model", crm=folder)
    assert p["completions"][0]["bbox"] == pytest.approx(BOX)


@pytest.mark.parametrize("resize", [None, "aspect", "aspect:100000", "square:56"])
def test_the_model_frame_is_what_a_checkpoint_remembers_unless_a_flag_says_otherwise(
    tmp_path, resize
):
    folder = str(tmp_path / "crm")
    size = (400, 300)
    crm_module.load_crm(EMBEDDED["crm"], resize="square:168").save(folder)
    prompt = crm_module.load_crm(folder, resize=resize).encode(noise_image(*size), "?")
    written = {"id": "q0", "bbox": scaled_box(size, prompt.sizes.model)}
    examples = few(1, size)
    (p,) = from_lines(
        tmp_path, written, examples=examples, frame="model", crm=folder, resize=resize
    )
    assert p["completions"][0]["bbox"] == pytest.approx(BOX)
