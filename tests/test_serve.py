"""extras/serve.py: its answers are infer.py's and the segmenter's, what it rejects, and the page in
a browser."""

import base64
import gzip
import io
import json
import struct
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from http.client import HTTPConnection
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import pytest
from browser import CHROMIUM, Browser
from PIL import Image

import infer
from asm import load_asm
from data import EMBEDDED, load_image
from extras import scans, serve
from extras.scans import PLANES, ScanConfig, read_view
from rewards import box_iou
from runtime.cli import ROOT, parse_args

PICTURE = ROOT / "demo/images/chest_ct_patient.png"
QUESTION = "What could the dark air-filled field on the left of the chest represent?"
BOX = [22.0, 43.0, 69.0, 98.0]
POINTS = [[40.0, 60.0], [45.0, 80.0]]
EXTRAS = "pip install -r requirements-extras.txt"

Call = Callable[..., tuple[int, Any]]


@pytest.fixture(scope="module")
def service() -> Iterator[serve.Service]:
    argv = ["--port", "0", "--max-new-tokens", "96"]
    with serve.Service(parse_args(serve.Config, "", argv=argv)) as service:
        threading.Thread(target=service.serve_forever, args=(0.05,), daemon=True).start()
        yield service
        service.shutdown()


@pytest.fixture(scope="module")
def call(service: serve.Service) -> Call:
    def call(path: str, body: Any = b"", method: str = "POST", **headers: str) -> tuple[int, Any]:
        """Returns the status and the answer. body: bytes, text, or what becomes JSON."""
        connection = HTTPConnection("127.0.0.1", service.server_port, timeout=120)
        if not isinstance(body, bytes | str):
            body = json.dumps(body)
        named = {key.replace("_", "-"): value for key, value in headers.items()}
        connection.request(method, path, body, named)
        reply = connection.getresponse()
        content = reply.read()
        if reply.headers["Content-Type"] == "application/json":
            return reply.status, json.loads(content)
        return reply.status, content

    return call


@pytest.fixture
def opened(call: Call) -> dict[str, Any]:
    """chest.png, uploaded anew for each test, because only the latest files are kept."""
    status, answer = call("/image?name=chest.png", PICTURE.read_bytes())
    assert status == 200
    assert answer["name"] == "chest.png"
    return answer


def decoded(uri: str) -> np.ndarray:
    """Returns the pixels of a picture that the server sent."""
    kind, _, data = uri.partition(",")
    assert kind == "data:image/png;base64"
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))


def assert_is_one_line(answer: dict[str, Any], says: str = "") -> None:
    """Asserts that an answer is an error of one line, which says something."""
    assert list(answer) == ["error"]
    assert answer["error"]
    assert "\n" not in answer["error"]
    assert says in answer["error"]


# ---------------------------------------------------------------- the models


@pytest.mark.parametrize("completions", [1, 4])
def test_an_answer_is_that_of_infer(call, opened, tmp_path, completions):
    argv = ["--image", str(PICTURE), "--query", QUESTION, "--out", str(tmp_path)]
    argv += ["--completions", str(completions), "--max-new-tokens", "96"]
    assert infer.main(parse_args(infer.Config, "", argv=argv)) == 0
    wanted = json.loads((tmp_path / "result.json").read_text())
    request = {"id": opened["id"], "query": QUESTION, "completions": completions}
    status, answer = call("/ask", request)
    assert status == 200
    assert answer["crm_ms"] > 0
    assert answer["asm_ms"] > 0
    got = answer["result"]
    got["mask_score"] = answer["mask_score"]
    got["mask_pixels"] = answer["mask_pixels"]
    assert got.pop("image") == "chest.png"
    assert wanted.pop("image") == str(PICTURE)
    assert got == wanted
    assert np.array_equal(decoded(answer["mask"]), np.asarray(Image.open(tmp_path / "mask.png")))
    assert [found["text"] for found in answer["completions"]] == wanted["texts"]
    assert answer["completions"][answer["kept"]]["bbox"] == wanted["bbox"]


@pytest.mark.parametrize(
    "bbox, points", [(BOX, POINTS), (BOX, None), (None, POINTS), ([-50, -9, 500, 30], POINTS[:1])]
)
def test_a_segment_is_that_of_the_segmenter(call, opened, bbox, points):
    status, answer = call("/segment", {"id": opened["id"], "bbox": bbox, "points": points})
    boxes = None if bbox is None else [bbox]
    points_of_boxes = None if points is None else [points]
    asm = load_asm(EMBEDDED["asm"], "cpu")
    masks, scores = asm.segment(np.asarray(load_image(PICTURE)), boxes, points_of_boxes)
    assert status == 200
    assert np.array_equal(decoded(answer["mask"]) > 127, masks[0])
    assert answer["mask_score"] == pytest.approx(float(scores[0]), abs=1e-6)
    assert answer["mask_pixels"] == masks[0].sum()
    assert answer["asm_ms"] > 0


def test_the_page_is_told_how_sure_an_answer_is(service, call, opened, monkeypatch):
    request = {"id": opened["id"], "query": QUESTION, "completions": 4}
    monkeypatch.setattr(service, "fit", None)
    monkeypatch.setattr(service.cfg, "abstain", 1.0)
    _, unsure = call("/ask", request)
    assert not unsure["opinion"]["sure"]
    assert "different places" in unsure["opinion"]["reasons"][0]
    monkeypatch.setattr(service.cfg, "abstain", 0.0)
    _, sure = call("/ask", request)
    assert sure["opinion"]["sure"]
    assert sure["opinion"]["reasons"] == []
    assert sure["opinion"]["confidence"] == unsure["opinion"]["confidence"]
    _, of_one = call("/ask", request | {"completions": 1})
    assert of_one["opinion"] is None  # there is nothing to compare


def test_completions_that_cannot_be_read_have_no_mask(service, call, opened, monkeypatch):
    monkeypatch.setattr(service.cfg, "max_new_tokens", 3)
    status, answer = call("/ask", {"id": opened["id"], "query": QUESTION, "completions": 4})
    assert status == 200
    assert answer["kept"] is None
    assert "mask" not in answer
    assert answer["result"]["problem"] == "no answer block"
    assert len(answer["completions"]) == 4


def at_once(work: Callable[[int], Any], count: int) -> list[Any]:
    """Returns work(0), work(1), …, each from a thread of its own."""
    found: list[Any] = [None] * count

    def run(i: int) -> None:
        found[i] = work(i)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def test_requests_at_the_same_time_get_their_own_answers(call, opened):
    boxes = [[10 + 4 * i, 20, 60 + 4 * i, 90] for i in range(8)]

    def mask_of(i: int) -> str:
        return call("/segment", {"id": opened["id"], "bbox": boxes[i]})[1]["mask"]

    alone = [mask_of(i) for i in range(len(boxes))]
    assert at_once(mask_of, len(boxes)) == alone
    assert len(set(alone)) > 1


def test_a_page_is_not_made_for_several_boxes(capsys):
    cfg = parse_args(serve.Config, "", argv=["--port", "0", "--prompt", "boxes"])
    with pytest.raises(SystemExit, match="2"):
        serve.main(cfg)
    assert "the page shows one box" in capsys.readouterr().err


# ---------------------------------------------------------------- images


def test_a_picture_is_upright_and_scaled_and_the_frame_is_that_of_the_file(call, tmp_path):
    picture = Image.new("RGB", (3000, 1500))
    picture.paste((255, 0, 0), (0, 0, 1500, 750))  # red at the top left, as stored
    exif = picture.getexif()
    exif[0x0112] = 6  # shown: a quarter turn to the right
    picture.save(tmp_path / "turned.jpg", exif=exif)
    status, answer = call("/image?name=turned.jpg", (tmp_path / "turned.jpg").read_bytes())
    shown = decoded(answer["picture"])
    assert status == 200
    assert answer["size"] == [1500, 3000]
    assert shown.shape == (1280, 640, 3)
    assert shown[100, 500, 0] > 200  # red is now at the top right
    assert shown[100, 100, 0] < 50
    status, answer = call("/segment", {"id": answer["id"], "bbox": [800, 10, 1400, 1400]})
    assert status == 200
    assert decoded(answer["mask"]).shape == (3000, 1500)


ASCII, SHORT, RATIONAL, SIGNED_RATIONAL = 2, 3, 5, 10  # types of EXIF tags


def exif_of(tag: int, kind: int, count: int, value: bytes) -> bytes:
    """Returns EXIF data with one tag beside the orientation "a quarter turn to the right"."""
    values_at = 8 + 2 + 2 * 12 + 4
    orientation = struct.pack("<HHIHH", 0x0112, SHORT, 1, 6, 0)
    odd = struct.pack("<HHII", tag, kind, count, values_at)
    entries = sorted([orientation, odd], key=lambda entry: struct.unpack("<H", entry[:2]))
    header = b"II*\0" + struct.pack("<I", 8) + struct.pack("<H", len(entries))
    return b"Exif\0\0" + header + b"".join(entries) + struct.pack("<I", 0) + value


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize(
    "exif",
    [
        exif_of(0x011A, SIGNED_RATIONAL, 1, struct.pack("<ii", -1, 0)),
        exif_of(0x0128, ASCII, 4, b"two\0"),
        exif_of(0x0128, SIGNED_RATIONAL, 1, struct.pack("<ii", -1, 3)),
        exif_of(0x0131, RATIONAL, 2, struct.pack("<IIII", 1, 0, 0, 0)),
    ],
    ids=["rational (-1, 0)", "text in a number", "negative unit", "numbers in a text"],
)
def test_a_picture_with_an_odd_exif_tag_is_shown(call, kind, exif):
    buffer = io.BytesIO()
    Image.new("RGB", (40, 20), (200, 0, 0)).save(buffer, kind, exif=exif)
    status, answer = call("/image?name=odd", buffer.getvalue())
    assert status == 200
    assert answer["size"] == [20, 40]  # upright
    status, answer = call("/segment", {"id": answer["id"], "bbox": [2, 2, 15, 30]})
    assert status == 200


def test_only_the_latest_images_are_kept(call, service):
    contents = []
    for i in range(serve.KEPT + 1):
        buffer = io.BytesIO()
        Image.new("RGB", (20, 20 + i)).save(buffer, "PNG")
        contents.append(buffer.getvalue())
    keys = [call("/image?name=a", content)[1]["id"] for content in contents]
    assert list(service.files) == keys[1:]
    assert call("/image?name=a", contents[1])[1]["id"] == keys[1]
    assert list(service.files) == [*keys[2:], keys[1]]  # opened again, it is the latest
    status, answer = call("/segment", {"id": keys[0], "bbox": [1, 1, 9, 9]})
    assert status == 404
    assert_is_one_line(answer, "choose it again")


@pytest.mark.parametrize(
    "name, body",
    [
        ("broken.png", PICTURE.read_bytes()[:4000]),
        ("text.png", b"no image"),
        ("empty.png", b""),
        ("x", b"\0" * 100),
        ("../../etc/passwd", b"x"),
        ("scan.dcm", b"x"),
        ("scan.nii.gz", b"x"),
        ("page.svg", b"<svg/>"),
        ("a\nb\0c.png", b"x"),
    ],
)
def test_a_broken_image_is_one_line(call, name, body):
    status, answer = call("/image?name=" + quote(name, safe=""), body)
    assert status == 400
    assert_is_one_line(answer, name.split("\n")[0])
    assert "/tmp" not in answer["error"]


def test_an_image_that_is_too_thin_to_ask_about_is_one_line(call):
    buffer = io.BytesIO()
    Image.new("RGB", (4000, 15)).save(buffer, "PNG")
    status, answer = call("/image?name=thin.png", buffer.getvalue())
    assert status == 200
    status, answer = call("/ask", {"id": answer["id"], "query": QUESTION})
    assert status == 400
    assert_is_one_line(answer)


# ---------------------------------------------------------------- scans


def nifti(volumes: int = 1) -> bytes:
    """Returns a disc in each of 20 slices, larger from foot to head, with noise.

    Of several volumes each is brighter than the one before."""
    nibabel = pytest.importorskip("nibabel", reason=EXTRAS)
    x, y, z, volume = np.mgrid[:60, :50, :20, :volumes]
    noise = np.random.default_rng(0).integers(0, 90, x.shape)
    is_inside = (x - 20) ** 2 + (y - 25) ** 2 < (z + 3) ** 2
    values = np.int16(900 * is_inside + noise + 100 * volume)
    if volumes == 1:
        values = values[..., 0]
    image = nibabel.Nifti1Image(values, np.diag([-2, -2, 4, 1]))
    return gzip.compress(image.to_bytes(), 1)


@pytest.fixture
def scan(call: Call) -> dict[str, Any]:
    status, answer = call("/image?name=ct.nii.gz", nifti())
    assert status == 200
    assert answer["name"] == "ct.nii.gz"
    return answer


@pytest.fixture
def scan_file(tmp_path: Path) -> Path:
    file = tmp_path / "ct.nii.gz"
    file.write_bytes(nifti())
    return file


def test_a_scan_opens_at_its_middle_slice_and_says_what_there_is_to_choose(scan, scan_file):
    view = read_view(scan_file)
    assert np.array_equal(decoded(scan["picture"]), np.asarray(view.image))
    assert scan["size"] == [60, 50]
    assert scan["scan"] == {
        "shown": str(view),
        "slices": 20,
        "frames": 1,
        "one_plane": False,
        "levels": list(view.window),
        "choice": {"slice": "10", "plane": "axial", "window": "auto"},
    }


@pytest.mark.parametrize("plane", PLANES)
@pytest.mark.parametrize("window", ["auto", "bone", "300,50"])
def test_every_slice_is_shown_as_the_models_see_it(call, scan, scan_file, plane, window):
    for n in (0, 7, 19):
        choice = {"slice": n, "plane": plane, "window": window}
        status, answer = call("/view", {"id": scan["id"], "scan": choice})
        wanted = read_view(scan_file, ScanConfig(str(n), plane, window=window))
        assert status == 200
        assert np.array_equal(decoded(answer["picture"]), np.asarray(wanted.image))
        assert answer["scan"]["choice"] == choice | {"slice": str(n)}
        assert answer["size"] == list(wanted.image.size)
        assert answer["scan"]["shown"] == str(wanted)
        again = call("/view", {"id": scan["id"], "scan": answer["scan"]["choice"]})[1]
        assert again == answer


def test_a_question_is_asked_about_the_slice_that_is_shown(call, scan, scan_file, tmp_path):
    out = tmp_path / "out"
    argv = ["--image", str(scan_file), "--query", QUESTION, "--out", str(out)]
    argv += ["--max-new-tokens", "96", "--completions", "4"]
    argv += ["--slice", "17", "--plane", "coronal", "--window", "500,900"]
    assert scans.main(parse_args(scans.Config, "", argv=argv)) == 0
    wanted = json.loads((out / "result.json").read_text())
    shown = {"slice": 17, "plane": "coronal", "window": "500,900"}
    request = {"id": scan["id"], "scan": shown, "query": QUESTION, "completions": 4}
    status, answer = call("/ask", request)
    assert status == 200
    assert answer["result"]["texts"] == wanted["texts"]
    assert answer["result"]["scan"] == {"shown": wanted["scan"]["shown"]}
    assert answer["result"]["bbox"] == wanted["bbox"]
    assert answer["result"]["points"] == wanted["points"]
    assert np.array_equal(decoded(answer["mask"]), np.asarray(Image.open(out / "mask.png")))


def test_the_segmenter_sees_the_slice_that_is_shown(call, scan, scan_file):
    asm = load_asm(EMBEDDED["asm"], "cpu")
    box = [5, 10, 40, 45]
    for n in (4, 18):
        status, answer = call("/segment", {"id": scan["id"], "scan": {"slice": n}, "bbox": box})
        view = read_view(scan_file, ScanConfig(str(n)))
        masks, _ = asm.segment(np.asarray(view.image), [box])
        assert status == 200
        assert np.array_equal(decoded(answer["mask"]) > 127, masks[0])


def test_of_several_volumes_the_first_is_shown_first(call):
    status, four = call("/image?name=4d.nii.gz", nifti(volumes=3))
    assert status == 200
    assert four["scan"]["frames"] == 3
    assert four["scan"]["choice"]["frame"] == 0
    choice = four["scan"]["choice"] | {"frame": 2}
    later = call("/view", {"id": four["id"], "scan": choice})[1]
    level = four["scan"]["levels"][0]
    assert later["scan"]["levels"][0] == pytest.approx(level + 200, abs=9)


def test_dicom_files_are_shown(call):
    samples = pytest.importorskip("pydicom.data", reason=EXTRAS)

    def content(name: str) -> bytes:
        return Path(samples.get_testdata_file(name, download=False)).read_bytes()

    _, heart = call("/image?name=heart.dcm", content("examples_ybr_color.dcm"))  # a colour film
    assert heart["scan"] | {"shown": ""} == {
        "shown": "",
        "slices": 1,
        "frames": 30,
        "levels": None,
        "one_plane": True,
        "choice": {"slice": "0", "plane": "axial", "frame": 0, "window": "auto"},
    }
    status, last = call("/view", {"id": heart["id"], "scan": {"frame": 29}})
    assert status == 200
    assert last["picture"] != heart["picture"]
    _, ct = call("/image?name=IM0001", content("CT_small.dcm"))  # DICOM files often have no ending
    assert ct["size"] == [128, 128]
    assert ct["scan"]["slices"] == 1
    assert ct["scan"]["frames"] == 1


def test_files_that_are_read_at_the_same_time_leave_warnings_and_answers_as_they_are(call, scan):
    """warnings.catch_warnings in two threads at once can leave all warnings switched off."""
    before = list(warnings.filters)
    picture = PICTURE.read_bytes()
    volume = nifti()
    serve.read.cache_clear()

    def open_one(i: int) -> int:
        if i % 2 == 0:
            return call(f"/image?name=chest{i}.png", picture)[0]
        choice = {"slice": i, "window": f"{300 + i},50"}
        call(f"/image?name=ct{i}.nii.gz", volume)
        return call("/view", {"id": scan["id"], "scan": choice})[0]

    statuses = at_once(open_one, 8)
    assert set(statuses) <= {200, 404}  # 404: later files have taken its place
    assert warnings.filters == before


@pytest.mark.parametrize("path", ["/view", "/ask", "/segment"])
@pytest.mark.parametrize(
    "choice, says",
    [
        ({"slice": 20}, "has 20 slices: give --slice 0 to 19"),
        ({"slice": -1}, "0 to 19"),
        ({"slice": "x"}, "not x"),
        ({"slice": [3]}, "is not an object of text and numbers"),
        ({"slcie": 3}, "slcie"),
        (5, "is not an object"),
        ({"plane": "oblique"}, "--plane is one of"),
        ({"frame": 1}, "has 1 volumes"),
        ({"frame": True}, "is not an object"),
        ({"window": "40"}, "LEVEL,WIDTH"),
        ({"window": "40,-1"}, "LEVEL,WIDTH"),
        ({"window": "liver"}, "auto, soft, lung"),
        ({"series": "1"}, "no series"),
        ({"slice": float("nan")}, "not nan"),
        ({"slice": 10**400}, "0 to 19"),
    ],
)
def test_a_slice_that_is_not_there_is_one_line(call, scan, path, choice, says):
    request = {"id": scan["id"], "scan": choice, "query": QUESTION, "bbox": BOX}
    status, answer = call(path, request)
    assert status == 400
    assert_is_one_line(answer, says)
    assert "upload" not in answer["error"]
    assert "/tmp" not in answer["error"]


def test_a_picture_has_no_slices(call, opened):
    status, answer = call("/view", {"id": opened["id"], "scan": {"slice": 3}})
    assert status == 400
    assert_is_one_line(answer, "chest.png is neither DICOM nor NIfTI: leave out --slice")
    assert call("/view", {"id": opened["id"]})[1]["scan"] is None


# ---------------------------------------------------------------- what is rejected


@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "evil.example:8000",
        "127.0.0.1.evil.example",
        "localhost.evil",
        "",
        "[::1",
        "10.0.0.1",
        "user@evil.example",
    ],
)
@pytest.mark.parametrize(
    "method, path", [("GET", "/"), ("GET", "/examples/fundus.png"), ("POST", "/segment")]
)
def test_a_foreign_host_is_rejected(call, method, path, host):
    status, answer = call(path, method=method, Host=host)
    assert status == (400 if host == "[::1" else 403)
    assert_is_one_line(answer)


def test_only_pages_of_this_server_may_post(call, service, opened):
    segment = {"id": opened["id"], "bbox": BOX}
    own = f"127.0.0.1:{service.server_port}"
    for origin in (
        "https://evil.example",
        "null",
        f"https://{own}",
        "http://127.0.0.1:1",
        f"http://{own}.evil.example",
    ):
        status, answer = call("/segment", segment, Origin=origin)
        assert status == 403, origin
        assert_is_one_line(answer, "another site")
    assert call("/segment", segment, Origin=f"http://{own}")[0] == 200
    assert call("/segment", segment)[0] == 200  # curl sends none
    forwarded = {"Host": "localhost:9000", "Origin": "http://localhost:9000"}  # ssh -L 9000
    assert call("/segment", segment, **forwarded)[0] == 200


def test_it_listens_on_this_machine_only(service):
    assert service.server_address[0] == "127.0.0.1"


@pytest.mark.parametrize(
    "path, size", [("/image", 20 * 2**20 + 1), ("/ask", 2**16 + 1), ("/segment", 10**11)]
)
def test_too_large_a_body_is_rejected_unread(service, path, size):
    connection = HTTPConnection("127.0.0.1", service.server_port, timeout=30)
    connection.putrequest("POST", path)
    connection.putheader("Content-Length", str(size))
    connection.endheaders()  # and no body: none is waited for
    reply = connection.getresponse()
    answer = json.loads(reply.read())
    assert reply.status == 413
    assert_is_one_line(answer, f"{size:,}")
    assert "scale an image down" in answer["error"]
    assert "python -m extras.scans" in answer["error"]


@pytest.mark.parametrize("length", [None, "", "-1", "ten", "1e3", "9" * 5000])
def test_a_body_needs_its_length(service, length):
    connection = HTTPConnection("127.0.0.1", service.server_port, timeout=30)
    connection.putrequest("POST", "/ask")
    if length is not None:
        connection.putheader("Content-Length", length)
    connection.endheaders()
    assert connection.getresponse().status == 411


@pytest.mark.parametrize(
    "change, says",
    [
        ({"query": ""}, "the question is empty"),
        ({"query": " \n"}, "the question is empty"),
        ({"query": None}, "the question"),
        ({"query": "x" * 2001}, "2000"),
        ({"query": ["x"]}, "the question"),
        ({"completions": 0}, "completions"),
        ({"completions": 9}, "completions"),
        ({"completions": "4"}, "completions"),
        ({"completions": True}, "completions"),
        ({"completions": 1.0}, "completions"),
    ],
)
def test_a_question_that_cannot_be_asked_is_one_line(call, opened, change, says):
    request = {"id": opened["id"], "query": QUESTION, "completions": 1} | change
    status, answer = call("/ask", request)
    assert status == 400
    assert_is_one_line(answer, says)


def test_a_question_longer_than_the_models_context_is_one_line(service, call, opened, monkeypatch):
    monkeypatch.setattr(service.crm.model.config.text_config, "max_position_embeddings", 40)
    status, answer = call("/ask", {"id": opened["id"], "query": QUESTION})
    assert status == 400
    assert_is_one_line(answer, "the model reads 40")


@pytest.mark.parametrize(
    "bbox, points",
    [
        (None, None),
        ([1, 2, 3], None),
        ("box", None),
        ([[1, 2, 3, 4]], None),
        ({"x": 1}, None),
        ([1, 2, 3, "4"], None),
        (BOX, [[1, 2, 3]]),
        (BOX, [1, 2]),
        (BOX, []),
        (BOX, [[1, 2], [3]]),
        ([1, 2, 3, 10**40], None),
        ([1, 2, 3, 1e300], None),
        ([1, 2, 3, float("nan")], None),
        ([1, 2, 3, None], None),
        (False, None),
    ],
)
def test_a_box_that_is_none_is_one_line(call, opened, bbox, points):
    status, answer = call("/segment", {"id": opened["id"], "bbox": bbox, "points": points})
    assert status == 400
    assert_is_one_line(answer)


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b"null", b"\xff\xfe", b"[" * 60_000, b'{"id": }']
)
@pytest.mark.parametrize("path", ["/view", "/ask", "/segment"])
def test_bad_json_is_one_line(call, path, body):
    status, answer = call(path, body)
    assert status == 400
    assert_is_one_line(answer, "not")


@pytest.mark.parametrize("body", [{}, {"id": "0"}, {"id": None}, {"id": ["x"]}, {"id": {}}])
@pytest.mark.parametrize("path", ["/view", "/ask", "/segment"])
def test_an_image_that_is_not_there_is_one_line(call, path, body):
    status, answer = call(path, body)
    assert status == 404
    assert_is_one_line(answer, "choose it again")


@pytest.mark.parametrize(
    "path",
    [
        "/x",
        "/examples/",
        "/examples/../README.md",
        "/examples/%2e%2e/README.md",
        "/examples/README.md",
        "/examples//fundus.png",
    ],
)
def test_other_addresses_are_404(call, path):
    assert call(path, method="GET")[0] == 404
    assert call(path, b"{}")[0] == 404


def test_the_page_and_its_pictures(call):
    status, page = call("/", method="GET")
    assert status == 200
    assert b"{{DATA}}" not in page
    assert b"fundus.png" in page
    assert b"demo/crm" in page
    picture = (ROOT / "demo/images/fundus.png").read_bytes()
    assert call("/examples/fundus.png", method="GET") == (200, picture)


def test_a_model_whose_logits_are_not_finite_is_one_line(call, opened, monkeypatch):
    def fail(*_: Any) -> None:
        raise FloatingPointError("the model's logits\nare not finite")

    monkeypatch.setattr(infer, "sample", fail)
    status, answer = call("/ask", {"id": opened["id"], "query": QUESTION})
    assert status == 500
    assert answer == {"error": "the model's logits are not finite"}


def test_a_bug_of_ours_is_answered_and_the_server_goes_on(
    service, call, opened, monkeypatch, capsys
):
    def fail(*_: Any) -> None:
        raise KeyError("a bug")

    with monkeypatch.context() as broken:
        broken.setattr(service.asm, "segment", fail)
        status, answer = call("/segment", {"id": opened["id"], "bbox": BOX})
    assert status == 500
    assert_is_one_line(answer, "the server has a bug")
    assert "KeyError: 'a bug'" in capsys.readouterr().err
    assert call("/segment", {"id": opened["id"], "bbox": BOX})[0] == 200


@pytest.mark.parametrize(
    "flags, says",
    [("--crm ./nowhere --port 0", "nowhere"), ("--port 99999", "--port"), ("--port {}", "--port")],
)
def test_bad_flags_are_one_line_and_status_2(service, capsys, flags, says):
    argv = flags.format(service.server_port).split()
    with pytest.raises(SystemExit, match="2"):
        serve.main(parse_args(serve.Config, "", argv=argv))
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert said.count("\n") == 1
    assert says in said


# ---------------------------------------------------------------- in a browser

NO_CHROMIUM = "no Chromium is installed (Debian: apt-get install chromium)"
SETTLED = "!running && drawn && document.querySelector('#go').textContent === 'Ask'"
OUTLINE_IS_DRAWN = """(canvas => {
    const pixels = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
    return pixels.some((value, i) => i % 4 === 3 && value === 255);
})(document.querySelector("#mask"))"""
SAVED_RESULT = """(link => {
    link.onclick();
    return JSON.parse(decodeURIComponent(link.href.split("utf-8,")[1]));
})(document.querySelector("#save-result"))"""
CORNER_OF_VIEW = """(box => [box.left, box.top])(
    document.querySelector('#view').getBoundingClientRect())"""


def until(page: Browser, condition: str, seconds: float = 60) -> None:
    """Waits for a JavaScript expression to be true."""
    end = time.monotonic() + seconds
    while not page.run(condition):
        assert time.monotonic() < end, (condition, page.text("#error"), page.errors)
        time.sleep(0.05)


def drag(page: Browser, *places: Sequence[float]) -> None:
    """Presses at the first place, moves over all others and releases at the last."""
    page.move(*places[0])
    page.press(*places[0])
    for place in places[1:]:
        page.move(*place)
    page.release(*places[-1])


def drop(page: Browser, content: bytes, name: str) -> None:
    """Drops a file onto the page."""
    encoded = base64.b64encode(content).decode()
    page.run(f"""(() => {{
        const bytes = Uint8Array.from(atob("{encoded}"), c => c.charCodeAt(0));
        const data = new DataTransfer();
        data.items.add(new File([bytes], "{name}"));
        document.dispatchEvent(new DragEvent("drop", {{ dataTransfer: data, cancelable: true }}));
    }})()""")


def choose(page: Browser, selector: str, value: str) -> None:
    """Gives a control another value, as a person does."""
    page.run(f"""(control => {{
        control.value = {json.dumps(value)};
        control.onchange();
    }})(document.querySelector("{selector}"))""")


def fill_question(page: Browser) -> None:
    page.run(f"document.querySelector('#query').value = {json.dumps(QUESTION)}")


def asked_since(page: Browser, count: int) -> set[str]:
    """Returns the addresses that the page asked for after its first `count` requests."""
    return {url for url in page.requests[count:] if not url.startswith("data:")}


def assert_no_other_errors(page: Browser) -> None:
    """Asserts that nothing went wrong but the requests that were meant to be rejected."""
    others = [error for error in page.errors if "400" not in str(error)]
    assert others == []


@pytest.fixture
def page(service: serve.Service) -> Iterator[Browser]:
    """The page in a browser."""
    with Browser(1280, 900) as page:
        page.open(f"http://127.0.0.1:{service.server_port}/")
        yield page


@pytest.fixture
def answered(page: Browser) -> Browser:
    """The page, after a question about chest.png with four completions."""
    drop(page, PICTURE.read_bytes(), "chest.png")
    until(page, "!document.querySelector('#stage').hidden")
    fill_question(page)
    page.click(*page.place("#count label", 1))
    page.click(*page.place("#go"))
    until(page, SETTLED)
    return page


@pytest.mark.skipif(not CHROMIUM, reason=NO_CHROMIUM)
def test_a_browser_shows_what_is_wrong_with_a_file_and_then_a_file(page):
    assert page.run("document.querySelector('#go').disabled")
    drop(page, b"no image", "chest.png")
    until(page, "!document.querySelector('#error').hidden")
    assert "chest.png is not an image" in page.text("#error")
    drop(page, PICTURE.read_bytes(), "chest.png")
    until(page, "!document.querySelector('#stage').hidden")
    assert page.is_hidden("#error")
    assert "131 × 131" in page.text("#name")
    assert_no_other_errors(page)


@pytest.mark.skipif(not CHROMIUM, reason=NO_CHROMIUM)
def test_a_browser_asks_and_shows_every_completion(answered, tmp_path):
    page = answered
    assert page.run("document.querySelectorAll('#completions li').length") == 4
    boxes = page.run("answer.completions.filter(c => c.bbox).length")
    assert boxes >= 2
    assert page.run("document.querySelectorAll('#view .other').length") == boxes - 1
    assert page.text("#reasoning") == page.run("answer.result.reasoning.trim()")
    page.run("new Promise(done => setTimeout(done, 200))")
    page.picture(tmp_path / "wide.png")
    assert (tmp_path / "wide.png").stat().st_size > 20_000
    assert page.run(OUTLINE_IS_DRAWN)
    assert_no_other_errors(page)


@pytest.mark.skipif(not CHROMIUM, reason=NO_CHROMIUM)
def test_a_browser_greys_out_what_it_is_not_sure_of(answered, tmp_path):
    page = answered
    greyed = "document.body.classList.contains('unsure')"
    page.run("answer.opinion.sure = true, answer.opinion.reasons = [], take(answer.kept)")
    until(page, SETTLED)
    assert not page.run(greyed)
    assert "confidence" in page.text("#numbers")
    page.run("answer.opinion.sure = false, answer.opinion.reasons = ['a guess'], show()")
    assert page.run(greyed)
    assert "not sure: a guess" in page.text("#numbers")
    page.picture(tmp_path / "unsure.png")
    page.run("bbox = [30, 40, 70, 90], show()")  # what was drawn by hand is the reader's own
    assert not page.run(greyed)
    assert_no_other_errors(page)


@pytest.mark.skipif(not CHROMIUM, reason=NO_CHROMIUM)
def test_a_browser_drags_a_point_and_only_the_segmenter_runs(answered, service):
    page = answered
    box_before = page.run("bbox")
    requests_before = len(page.requests)
    page.run("points = [[50, 60], [70, 80]], sketch()")  # whatever the model said
    x, y = page.place("#view .dot", 0)
    scale = page.run("scale")
    drag(page, (x, y), (x + 10, y + 5), (x + 40, y + 30))
    until(page, SETTLED)
    assert page.run("bbox") == box_before
    moved, other = page.run("points")
    assert moved == pytest.approx([50 + 40 / scale, 60 + 30 / scale], abs=0.06)
    assert other == [70, 80]
    address = f"http://127.0.0.1:{service.server_port}/segment"
    assert asked_since(page, requests_before) == {address}
    assert "segmenter" in page.text("#time")
    assert "moved by hand" in page.text("#numbers")
    assert_no_other_errors(page)


@pytest.mark.skipif(not CHROMIUM, reason=NO_CHROMIUM)
def test_a_browser_drags_a_corner_and_saves_what_is_shown(answered):
    page = answered
    before = page.run("[bbox, points, drawn.mask]")
    page.run("bbox = [30, 40, 70, 90], sketch()")
    scale = page.run("scale")
    x, y = page.place("#view .grip", 0)  # the top left one
    drag(page, (x, y), (x - 5, y - 5), (x - 30, y - 20))
    until(page, SETTLED)
    box = page.run("bbox")
    assert box == pytest.approx([30 - 30 / scale, 40 - 20 / scale, 70, 90], abs=0.06)
    reply = page.run(f"post('/segment', {{ id: image.id, bbox: {box}, points }})")
    assert page.run("drawn.mask") == reply["mask"]  # the mask of what is shown
    saved = page.run(SAVED_RESULT)
    assert saved["bbox"] == box
    assert saved["edited"]
    assert saved["query"] == QUESTION
    assert len(saved["texts"]) == 4
    mask = decoded(page.run("document.querySelector('#save-mask').href"))
    assert saved["mask_pixels"] == (mask > 127).sum()

    page.run("document.querySelectorAll('#view .hit')[0].focus()")
    page.call("Input.dispatchKeyEvent", type="keyDown", key="ArrowRight")
    until(page, SETTLED)
    assert page.run("bbox[0]") == pytest.approx(box[0] + 1, abs=0.051)
    page.click(*page.place("#reset"))
    until(page, SETTLED)
    assert page.run("[bbox, points, drawn.mask]") == before
    assert_no_other_errors(page)


@pytest.mark.skipif(not CHROMIUM, reason=NO_CHROMIUM)
def test_a_browser_draws_a_new_box_beside_the_old_one(answered):
    page = answered
    page.run("bbox = [60, 60, 90, 90], points = [[70, 70], [80, 80]], sketch()")
    scale = page.run("scale")
    left, top = page.run(CORNER_OF_VIEW)
    start = (left + 12, top + 12)
    end = (left + 10 * scale, top + 12 * scale)
    drag(page, start, (left + 40, top + 40), end)
    until(page, SETTLED)
    assert page.run("points") is None
    assert box_iou(page.run("bbox"), [12 / scale, 12 / scale, 10, 12]) > 0.95
    assert_no_other_errors(page)


@pytest.mark.skipif(not CHROMIUM, reason=NO_CHROMIUM)
def test_the_page_fits_a_telephone_and_asks_nobody_else(answered, service, tmp_path):
    page = answered
    page.resize(390, 844)
    assert page.run("document.documentElement.scrollWidth") == 390
    page.picture(tmp_path / "narrow.png")
    assert (tmp_path / "narrow.png").stat().st_size > 20_000
    page.click(*page.place("#examples button", 7))
    until(page, "image.name === 'fundus.png' && !answer")
    own = f"http://127.0.0.1:{service.server_port}/"
    assert all(url.startswith(own) for url in asked_since(page, 0))
    assert_no_other_errors(page)


def shown(file: Path, **choice: Any) -> np.ndarray:
    """Returns the pixels of a slice, as the models see it."""
    return np.asarray(read_view(file, ScanConfig(**choice)).image)


@pytest.fixture
def scanned(page: Browser, scan_file: Path) -> Browser:
    """The page with a scan."""
    drop(page, scan_file.read_bytes(), "ct.nii.gz")
    until(page, "!document.querySelector('#scan').hidden")
    return page


@pytest.mark.skipif(not CHROMIUM, reason=NO_CHROMIUM)
def test_a_browser_moves_through_the_slices_of_a_scan(scanned, scan_file):
    page = scanned
    assert page.run("document.querySelector('#scan-slice').value") == "10"
    assert page.run("document.querySelector('#scan-frame').parentNode.hidden")
    assert "axial slice 10 of 20" in page.text("#name")
    requests_before = len(page.requests)
    page.run("document.querySelector('#scan-slice').focus()")
    for _ in range(4):
        for kind in ("rawKeyDown", "keyUp"):
            page.call(
                "Input.dispatchKeyEvent",
                type=kind,
                key="ArrowRight",
                code="ArrowRight",
                windowsVirtualKeyCode=39,
            )
    until(page, "!running && image.scan.choice.slice === '14'")
    assert page.run("document.querySelector('#scan-slice').value") == "14"
    assert page.text("#slice-of") == "14 of 20"
    assert np.array_equal(decoded(page.run("image.picture")), shown(scan_file, slice="14"))
    asked = {url.rsplit("/", 1)[1] for url in asked_since(page, requests_before)}
    assert asked == {"view"}  # no model ran
    assert_no_other_errors(page)


@pytest.mark.skipif(not CHROMIUM, reason=NO_CHROMIUM)
def test_a_browser_chooses_plane_and_window_of_a_scan(scanned, scan_file):
    page = scanned

    def assert_shown(value: str, **choice: Any) -> None:
        until(page, f"!running && Object.values(image.scan.choice).includes('{value}')")
        assert np.array_equal(decoded(page.run("image.picture")), shown(scan_file, **choice))

    choose(page, "#scan-plane", "coronal")
    assert_shown("coronal", slice="25", plane="coronal")
    choose(page, "#scan-window", "bone")
    assert_shown("bone", slice="25", plane="coronal", window="bone")
    choose(page, "#scan-window", "own")
    choose(page, "#scan-levels", "500,400")
    assert_shown("500,400", slice="25", plane="coronal", window="500,400")
    choose(page, "#scan-levels", "x")
    until(page, "!document.querySelector('#error').hidden")
    assert "LEVEL,WIDTH" in page.text("#error")
    assert_no_other_errors(page)


@pytest.mark.skipif(not CHROMIUM, reason=NO_CHROMIUM)
def test_a_browser_asks_about_a_slice_of_a_scan(scanned, tmp_path):
    page = scanned
    fill_question(page)
    page.click(*page.place("#go"))
    until(page, "answer && document.querySelector('#go').textContent === 'Ask'")
    assert page.run("answer.result.scan.shown === image.scan.shown")
    page.run("bbox = [5, 10, 40, 45], points = null, segment()")
    until(page, SETTLED)
    page.picture(tmp_path / "wide.png")
    page.resize(390, 844)
    assert page.run("document.documentElement.scrollWidth") == 390
    page.picture(tmp_path / "narrow.png", whole=True)
    page.run("""(slider => {
        slider.value = 3;
        slider.oninput({ target: slider });
    })(document.querySelector('#scan-slice'))""")
    until(page, "!running && image.scan.choice.slice === '3'")
    assert page.run("answer || drawn || bbox") is None  # these were of another slice
    drop(page, PICTURE.read_bytes(), "chest.png")
    until(page, "image.name === 'chest.png'")
    assert page.is_hidden("#scan")
    assert_no_other_errors(page)
