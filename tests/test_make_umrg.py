"""Building a data set: what is dropped, whose words, which split; against an endpoint that
misbehaves."""

import json
import re
import threading
import time
from argparse import Namespace
from collections.abc import Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data import box_from_mask, load_samples
from paper.make_umrg import clean, find, main, parse, split_of
from paper.umrg_words import Facts, Item, problem, template


def picture(
    folder: Path, name: str, box: tuple[int, int, int, int] = (10, 12, 40, 50), seed: int = 0
) -> np.ndarray:
    """Writes an image of 90 x 70 with a bright rectangle, and its mask, which is returned."""
    pixels = np.random.default_rng(seed).integers(0, 60, (70, 90), dtype=np.uint8)
    mask = np.zeros((70, 90), bool)
    x1, y1, x2, y2 = box
    mask[y1:y2, x1:x2] = True
    pixels[mask] = 200
    for kind, array in (("images", pixels), ("masks", mask.astype(np.uint8) * 255)):
        (folder / kind).mkdir(parents=True, exist_ok=True)
        Image.fromarray(array).save(folder / kind / f"{name}.png")
    return mask


@pytest.fixture
def scans(tmp_path):
    for i in range(12):
        picture(tmp_path, f"scan{i:02}", seed=i)
    return tmp_path


def arguments(folder: Path, *more: object) -> Namespace:
    """The command line for the images and masks in a folder."""
    words = ["--images", folder / "images", "--masks", folder / "masks"]
    words += ["--out", folder / "out", "--cache", folder / "cache"]
    return parse([str(word) for word in (*words, *more)])


def build(folder: Path, *more: object) -> dict:
    """Builds a data set. Returns its report.json."""
    main(arguments(folder, *more))
    return json.loads((folder / "out/report.json").read_text())


def test_a_mask_turns_with_the_exif_orientation_of_its_image(tmp_path):
    """An image stored on its side, its mask stored the same way: both are read upright."""
    mask = picture(tmp_path, "photo")
    upside_down = Image.Exif()
    upside_down[0x0112] = 3
    path = tmp_path / "images/photo.png"
    Image.open(path).save(path, exif=upside_down)
    items = find(tmp_path / "images", tmp_path / "masks", None)
    kept, dropped = clean(items, arguments(tmp_path))
    assert not dropped
    assert kept[0].facts.box == box_from_mask(mask[::-1, ::-1])


def table(folder: Path, lines: list[tuple[str, ...]]) -> tuple[str, Path]:
    """Writes a CSV of image, mask, category, supercategory, modality, patient. Returns the flag
    that names it."""
    rows = ["image,mask,category,supercategory,modality,patient"]
    rows += [",".join(line) for line in lines]
    file = folder / "meta.csv"
    file.write_text("\n".join(rows) + "\n")
    return "--table", file


def test_templates_make_a_data_set_that_loads_with_patients_in_one_split_only(scans):
    lines = [
        (f"scan{i:02}.png", f"scan{i:02}.png", "left kidney", "Abdomen", "CT", f"p{i // 2}")
        for i in range(12)
    ]
    report = build(scans, *table(scans, lines), "--test-share", 0.5)
    train = load_samples(scans / "out", "train")
    test = load_samples(scans / "out", "test")
    assert len(train) == report["train"]
    assert len(test) == report["test"]
    assert len(train) + len(test) == 12
    assert report["words"] == {"template": 12}
    train_patients = {example.extra["patient"] for example in train}
    test_patients = {example.extra["patient"] for example in test}
    assert train_patients
    assert test_patients
    assert not train_patients & test_patients
    for example in train:
        assert example.bbox == box_from_mask(example.mask)
        assert example.category == "left kidney"
        assert example.supercategory == "Abdomen"
        assert "kidney" not in example.query.lower()
        assert example.think


def test_what_cannot_be_used_is_dropped_with_its_reason(scans):
    picture(scans, "tiny", box=(5, 5, 6, 6))
    picture(scans, "whole", box=(0, 0, 90, 70))
    picture(scans, "empty", box=(5, 5, 5, 5))
    picture(scans, "broken")
    (scans / "images/broken.png").write_text("not a picture")
    picture(scans, "bigger")
    Image.new("L", (30, 30), 255).save(scans / "masks/bigger.png")
    picture(scans, "twin", seed=0)  # scan00 again
    report = build(scans)
    reasons = {d["mask"]: d["reason"] for d in report["dropped"]}
    assert set(reasons) == {
        f"{n}.png" for n in ("tiny", "whole", "empty", "broken", "bigger", "twin")
    }
    assert "covers 0.02 %" in reasons["tiny.png"]
    assert "covers 100.00 %" in reasons["whole.png"]
    assert reasons["empty.png"] == "the mask is empty"
    assert "not an image" in reasons["broken.png"]
    assert reasons["bigger.png"] == "the mask is 30x30, the image 90x70"
    assert "there before" in reasons["twin.png"]


def test_masks_find_their_image_and_category_by_name_and_pieces_can_be_left_out(scans):
    mask = picture(scans, "scan00_x")
    (scans / "images/scan00_x.png").unlink()
    mask[60:66, 70:80] = True
    Image.fromarray(mask.astype(np.uint8) * 255).save(scans / "masks/scan00_liver_lobe.png")
    Image.fromarray(mask).save(scans / "masks/scan02_rib_9_000.png")
    items = {item.mask.name: item for item in find(scans / "images", scans / "masks", None)}
    # the mask's own count is no part of it
    assert items["scan02_rib_9_000.png"].category == "rib 9"
    assert items["scan00_liver_lobe.png"].image.name == "scan00.png"
    assert items["scan00_liver_lobe.png"].category == "liver lobe"
    assert items["scan01.png"].category == "target"
    for flag, box in (([], (10, 12, 80, 66)), (["--largest"], (10, 12, 40, 50))):
        args = parse(["--images", "i", "--masks", "m", "--out", "o", *flag])
        kept, _ = clean([items["scan00_liver_lobe.png"]], args)
        assert kept[0].facts.box == box


def item(category: str = "left kidney", horizontal: str = "left") -> Item:
    """An item of which nothing but words is needed."""
    facts = Facts(
        size=(90, 70),
        box=(10, 12, 40, 50),
        points=((20, 20), (30, 40)),
        area=0.05,
        horizontal=horizontal,
        vertical="upper",
        tone="dark",
        shape="rounded",
        digest="",
        mask=b"",
    )
    return Item(None, None, category, facts=facts)


@pytest.mark.parametrize(
    "answer, says",
    [
        (None, "JSON object"),
        ({"question": "", "think": "x"}, "JSON object"),
        ({"question": 3, "think": "x"}, "JSON"),
        ({"question": "Where is the left kidney?", "think": "x"}, "must not name"),
        ({"question": "Which of the Kidneys is ill?", "think": "x"}, "must not name"),
        (
            {"question": "What filters blood?", "think": "It is on the right side of the image."},
            "not on the right",
        ),
        ({"question": "What filters blood?" * 40, "think": "x"}, "one or two sentences"),
        ({"question": "What <b>filters</b> blood?", "think": "x"}, "without tags"),
        (
            {
                "question": "What filters blood?",
                "think": "The kidney, on the left side of the image.",
            },
            "",
        ),
    ],
)
def test_unusable_words_are_sent_back_with_the_reason(answer, says):
    found = problem(answer, item())
    assert says in found
    assert bool(found) == bool(says)


def test_template_words_pass_the_same_checks(scans):
    for horizontal in ("left", "centre", "right"):
        for i in range(40):
            it = item(horizontal=horizontal)
            it.image = scans / f"a{i}.png"
            it.mask = scans / f"a{i}.png"
            assert problem(template(it), it) == ""


def test_a_split_does_not_change_when_data_are_added(scans):
    some = [Item(scans / f"{i}.png", scans / f"{i}.png", "x") for i in range(400)]
    share = sum(split_of(i, 0.2) == "test" for i in some) / 400
    assert 0.14 < share < 0.26  # binomial, three standard deviations
    assert split_of(Item(scans / "7.png", scans / "other.png", "y"), 0.2) == split_of(some[7], 0.2)


def test_the_review_page_escapes_and_its_decisions_are_read_back(scans):
    evil = '"><script>alert(1)</script>'
    lines = [
        ("scan00.png", "scan00.png", f"'{evil}'", "A", "CT", ""),
        ("scan01.png", "scan01.png", "b", "A", "CT", ""),
    ]
    build(scans, *table(scans, lines), "--review", scans / "r.html")
    page = (scans / "r.html").read_text()
    assert "<script>alert" not in page
    assert "&lt;script&gt;" in page
    assert re.findall('data-id="([^"]*)"', page) == ["scan00", "scan01"]
    assert not re.findall(r'(?:src|href)="(?!data:)', page)  # nothing from elsewhere
    (scans / "d.json").write_text(json.dumps({"scan00": "reject", "scan01": "accept"}))
    report = build(scans, *table(scans, lines), "--decisions", scans / "d.json")
    assert report["train"] + report["test"] == 1
    for text, says in (
        ('{"nobody": "reject"}', "1 ids are not in"),
        ("[1]", "not an object"),
        ("x", "d.json"),
    ):
        (scans / "d.json").write_text(text)
        with pytest.raises(ValueError, match=says):
            build(scans, *table(scans, lines), "--decisions", scans / "d.json")


@pytest.mark.parametrize(
    "text, says",
    [
        ("image,mask\n", "column category is missing"),
        ("image,mask,category\na.png,b.png,\n", "line 2: no category"),
        ("image,mask,category\na.png,b.png,c\n", "nothing usable"),
    ],
)
def test_a_bad_table_is_named_and_nothing_written(scans, text, says):
    (scans / "meta.csv").write_text(text)
    with pytest.raises(ValueError, match=says):
        build(scans, "--table", scans / "meta.csv")
    assert not (scans / "out").exists()


# ---------------------------------------------------------------- an endpoint that misbehaves


GOOD = {
    "question": "What cleans the blood?",
    "think": "It shows as a bright shape on the left side of the image.",
}


class Endpoint(ThreadingHTTPServer):
    """Answers by script: a status, a delay, or a text; after the script GOOD for ever."""

    def __init__(self, script: Sequence[object] = ()):
        super().__init__(("127.0.0.1", 0), Handler)
        self.script = list(script)
        self.asked = []
        threading.Thread(target=self.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server_port}/v1"


class Handler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.server.asked.append(body["messages"])
        step = self.server.script.pop(0) if self.server.script else json.dumps(GOOD)
        if isinstance(step, float):
            time.sleep(step)
            step = "too late"
        status = 200
        text = step
        if isinstance(step, int):
            status = step
            text = ""
        reply = {
            "id": "1",
            "object": "chat.completion",
            "created": 0,
            "model": "m",
            "usage": {"prompt_tokens": 100, "completion_tokens": 20, "total_tokens": 120},
            "choices": [
                {
                    "index": 0,
                    "finish_reason": "stop",
                    "message": {"role": "assistant", "content": text},
                }
            ],
        }
        data = json.dumps(reply if status == 200 else {"error": {"message": "no"}}).encode()
        try:
            self.send_response(status)
            self.send_header("content-type", "application/json")
            self.send_header("retry-after-ms", "1")
            self.send_header("content-length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)
        except BrokenPipeError:
            pass  # the client did not wait

    def log_message(self, *_: object) -> None:
        """Says nothing."""


@pytest.fixture
def one(tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret-key")
    picture(tmp_path, "scan00")
    return tmp_path, *table(tmp_path, [("scan00.png", "scan00.png", "kidney", "Abdomen", "CT", "")])


def ask(one: tuple, server: Endpoint, *more: object) -> dict:
    """Builds a data set of one image with words of an endpoint. Returns its report."""
    folder, *flags = one
    flags += ["--base-url", server.url, "--model", "m", "--timeout", 0.5, "--price-in", 10]
    return build(folder, *flags, *more)


def test_errors_bad_json_and_named_targets_are_survived_and_nothing_is_asked_twice(one, capsys):
    description = json.dumps({"description": "bean", "formats": ["a"]})
    named = json.dumps({"question": "Where is the kidney?", "think": "x"})
    fenced = "```json\n" + json.dumps(GOOD) + "\n```"
    server = Endpoint([500, 429, 1.0, description, "no json at all {", named, fenced])
    report = ask(one, server)
    assert report["words"] == {"language model": 1}
    assert len(server.asked) == 7
    assert "must not name the target" in server.asked[-1][-1]["content"]  # told why
    cost = "4 replies, 0 from the cache, 400 tokens in, 80 out, 0.00 in money"
    assert cost in capsys.readouterr().out
    split = "train" if report["train"] else "test"
    assert load_samples(one[0] / "out", split)[0].query == GOOD["question"]
    assert ask(one, server)["words"] == {"language model": 1}
    assert len(server.asked) == 7
    for file in one[0].rglob("*"):
        assert not file.is_file() or "secret-key" not in file.read_text(errors="ignore")


def test_after_tries_unusable_answers_the_template_steps_in_and_is_counted(one):
    server = Endpoint(["{}"] + ["nonsense"] * 9)
    assert ask(one, server)["words"] == {"template": 1}
    assert len(server.asked) == 4


def test_an_endpoint_that_stays_down_ends_the_run_in_one_line_and_writes_nothing(one):
    server = Endpoint([500] * 50)
    with pytest.raises(ValueError, match="--base-url .* the same command resumes"):
        ask(one, server, "--retries", 2)
    assert len(server.asked) == 3
    assert not (one[0] / "out").exists()


def test_without_key_or_model_it_says_so(one, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY")
    with pytest.raises(ValueError, match="set OPENAI_API_KEY"):
        ask(one, Endpoint())
    with pytest.raises(SystemExit):
        parse(["--images", "i", "--masks", "m", "--out", "o", "--base-url", "http://x"])
