"""The taught model that comes with the repository answers what README and the pages ask."""

import json
import re
import shlex

import numpy as np
import pytest
from PIL import Image

import infer
from data import EMBEDDED, TAUGHT, Example
from demo.make.check_crm import named_right
from demo.make.example import true_example
from rewards import box_iou
from runtime.cli import ROOT

PICTURES = ROOT / "demo/images"


def suggested() -> list[tuple[str, str]]:
    """Returns (picture, question) of the table beside the pictures, which the page shows."""
    table = (PICTURES / "README.md").read_text(encoding="utf-8")
    return re.findall(r"^\| (\w+\.png) \| (.+?) \|", table, re.MULTILINE)


def written() -> list[tuple[str, str]]:
    """Returns (picture, question) of every infer.py command in the repository's texts."""
    files = [ROOT / "README.md", ROOT / "Makefile", *ROOT.glob("*.py")]
    for folder in ("extras", "demo", "learn"):
        files += [*(ROOT / folder).glob("**/*.md"), *(ROOT / folder).glob("**/*.py")]
    found = []
    for file in files:
        text = file.read_text(encoding="utf-8")
        text = re.sub(r"\\+\n", " ", text)  # a command goes on behind a backslash
        for image, rest in re.findall(r"--image demo/images/(\w+\.png)([^\n]*)", text):
            question = re.search(r'--query "([^"]+)"', rest)
            if question is not None and question.group(1) not in ("...", "…"):
                found.append((image, question.group(1)))
    return sorted(set(found))


def ask(picture: str, question: str, out, capsys) -> tuple[dict, Example]:
    """Asks the model that infer.py uses by default. Returns result.json and the truth."""
    words = f"--image {PICTURES / picture} --query {shlex.quote(question)} --out {out}"
    cfg = infer.parse_args(infer.Config, infer.__doc__, shlex.split(words))
    assert infer.main(cfg) == 0
    assert "no --crm given: demo/crm_grpo is used" in capsys.readouterr().out
    result = json.loads((out / "result.json").read_text(encoding="utf-8"))
    return result, true_example(question, result["size"])


def is_right(result: dict, truth: Example) -> bool:
    """Whether the box fits and both points are inside the target."""
    height, width = truth.mask.shape
    inside = []
    for x, y in result["points"]:
        column = min(max(int(x), 0), width - 1)
        row = min(max(int(y), 0), height - 1)
        inside.append(bool(truth.mask[row, column]))
    return box_iou(tuple(result["bbox"]), truth.bbox) >= 0.3 and all(inside)


def test_training_starts_from_the_base_and_questions_are_put_to_the_taught_model():
    assert EMBEDDED["crm"] == ROOT / "demo/crm"
    assert TAUGHT["crm"] == ROOT / "demo/crm_grpo"
    for name in ("asm", "data"):
        assert TAUGHT[name] == EMBEDDED[name]


def test_some_commands_are_written_and_ask_what_the_table_asks():
    assert len(written()) >= 2
    assert len(suggested()) == 10
    assert set(written()) <= set(suggested())


@pytest.mark.parametrize("picture, question", written())
def test_an_example_that_is_written_is_answered_right(picture, question, tmp_path, capsys):
    result, truth = ask(picture, question, tmp_path, capsys)
    assert named_right(result["reasoning"], truth)
    assert is_right(result, truth)
    mask = np.asarray(Image.open(tmp_path / "mask.png")) > 127
    dice = 2 * (mask & truth.mask).sum() / (mask.sum() + truth.mask.sum())
    assert dice >= 0.5


@pytest.mark.parametrize("picture, question", suggested())
def test_what_the_page_suggests_is_answered_right(picture, question, tmp_path, capsys):
    result, truth = ask(picture, question, tmp_path, capsys)
    assert named_right(result["reasoning"], truth)
    assert is_right(result, truth)
