"""extras/serve.py: its answers are infer.py's and the segmenter's, what it refuses, and the page in a browser."""

import base64
import gzip
import io
import json
import threading
import time
from http.client import HTTPConnection
from urllib.parse import quote

import numpy as np
import pytest
from browser import CHROMIUM, Browser
from PIL import Image

import infer
from asm import load_asm
from extras import serve
from extras.scans import PLANES, ScanConfig, read_view
from rewards import box_iou
from runtime.cli import EMBEDDED, ROOT, parse_args
from runtime.images import load_image

PICTURE = ROOT / "demo/images/chest_ct_patient.png"
QUESTION = "What could the dark air-filled field on the left of the chest represent?"
BOX, POINTS = [22.0, 43.0, 69.0, 98.0], [[40.0, 60.0], [45.0, 80.0]]


@pytest.fixture(scope="module")
def service():
    with serve.Service(
        parse_args(serve.Config, "", argv=["--port", "0", "--max-new-tokens", "96"])
    ) as service:
        threading.Thread(target=service.serve_forever, args=(0.05,), daemon=True).start()
        yield service
        service.shutdown()


@pytest.fixture(scope="module")
def call(service):
    def call(path, body=b"", method="POST", **headers):
        """-> status, the answer. body: bytes, text, or what becomes JSON."""
        connection = HTTPConnection("127.0.0.1", service.server_port, timeout=120)
        body = body if isinstance(body, bytes | str) else json.dumps(body)
        connection.request(
            method, path, body, {key.replace("_", "-"): value for key, value in headers.items()}
        )
        reply = connection.getresponse()
        text = reply.read()
        return reply.status, json.loads(text) if reply.headers[
            "Content-Type"
        ] == "application/json" else text

    return call


@pytest.fixture
def opened(call):
    """chest.png, uploaded anew for each test: only the latest files are kept, whatever test uploaded them."""
    status, answer = call("/image?name=chest.png", PICTURE.read_bytes())
    assert status == 200 and answer["name"] == "chest.png"
    return answer


def decoded(uri):
    kind, _, data = uri.partition(",")
    assert kind == "data:image/png;base64"
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))


# ---------------------------------------------------------------- the models


@pytest.mark.parametrize("samples", [1, 4])
def test_an_answer_is_that_of_infer(call, opened, tmp_path, samples):
    assert (
        infer.main(
            parse_args(
                infer.Config,
                "",
                argv=[
                    "--image",
                    str(PICTURE),
                    "--query",
                    QUESTION,
                    "--out",
                    str(tmp_path),
                    "--samples",
                    str(samples),
                    "--max-new-tokens",
                    "96",
                ],
            )
        )
        == 0
    )
    wanted = json.loads((tmp_path / "result.json").read_text())
    status, answer = call("/ask", {"id": opened["id"], "query": QUESTION, "samples": samples})
    assert status == 200 and answer["crm_ms"] > 0 and answer["asm_ms"] > 0
    got = answer["result"] | {key: answer[key] for key in ("mask_score", "mask_pixels")}
    assert got.pop("image") == "chest.png" and wanted.pop("image") == str(PICTURE)
    assert got == wanted
    assert np.array_equal(decoded(answer["mask"]), np.asarray(Image.open(tmp_path / "mask.png")))
    assert [c["text"] for c in answer["completions"]] == wanted["texts"]
    assert answer["completions"][answer["kept"]]["bbox"] == wanted["bbox"]


@pytest.mark.parametrize(
    "bbox, points", [(BOX, POINTS), (BOX, None), (None, POINTS), ([-50, -9, 500, 30], POINTS[:1])]
)
def test_a_segment_is_that_of_the_segmenter(call, opened, bbox, points):
    status, answer = call("/segment", {"id": opened["id"], "bbox": bbox, "points": points})
    masks, scores = load_asm(EMBEDDED["asm"], "cpu").segment(
        np.asarray(load_image(PICTURE)), bbox and [bbox], points and [points]
    )
    assert status == 200 and np.array_equal(decoded(answer["mask"]) > 127, masks[0])
    assert answer["mask_score"] == pytest.approx(float(scores[0]), abs=1e-6)
    assert answer["mask_pixels"] == masks[0].sum() and answer["asm_ms"] > 0


def test_completions_that_cannot_be_read_have_no_mask(service, call, opened, monkeypatch):
    monkeypatch.setattr(service.cfg, "max_new_tokens", 3)
    status, answer = call("/ask", {"id": opened["id"], "query": QUESTION, "samples": 4})
    assert status == 200 and answer["kept"] is None and "mask" not in answer
    assert answer["result"]["problem"] == "no answer block" and len(answer["completions"]) == 4


def test_requests_at_the_same_time_get_their_own_answers(call, opened):
    boxes = [[10 + 4 * i, 20, 60 + 4 * i, 90] for i in range(8)]
    alone = [call("/segment", {"id": opened["id"], "bbox": box})[1]["mask"] for box in boxes]
    together = [None] * len(boxes)

    def ask(i):
        together[i] = call("/segment", {"id": opened["id"], "bbox": boxes[i]})[1]["mask"]

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(len(boxes))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert together == alone


# ---------------------------------------------------------------- images


def test_a_picture_is_upright_and_scaled_and_the_frame_is_that_of_the_file(call, tmp_path):
    picture = Image.new("RGB", (3000, 1500))
    picture.paste((255, 0, 0), (0, 0, 1500, 750))  # red at the top left, as stored
    exif = picture.getexif()
    exif[0x0112] = 6  # shown: a quarter turn to the right
    picture.save(tmp_path / "turned.jpg", exif=exif)
    status, answer = call("/image?name=turned.jpg", (tmp_path / "turned.jpg").read_bytes())
    shown = decoded(answer["picture"])
    assert status == 200 and answer["size"] == [1500, 3000] and shown.shape == (1280, 640, 3)
    assert shown[100, 500, 0] > 200 and shown[100, 100, 0] < 50  # red is now at the top right
    status, answer = call("/segment", {"id": answer["id"], "bbox": [800, 10, 1400, 1400]})
    assert status == 200 and decoded(answer["mask"]).shape == (3000, 1500)


def test_only_the_latest_images_are_kept(call, service):
    files = [io.BytesIO() for _ in range(serve.KEPT + 1)]
    for i, file in enumerate(files):
        Image.new("RGB", (20, 20 + i)).save(file, "PNG")
    keys = [call("/image?name=a", file.getvalue())[1]["id"] for file in files]
    assert list(service.files) == keys[1:]
    assert call("/image?name=a", files[1].getvalue())[1]["id"] == keys[1]
    assert list(service.files) == keys[2:] + keys[1:2]  # opened once more, it is the latest
    status, answer = call("/segment", {"id": keys[0], "bbox": [1, 1, 9, 9]})
    assert status == 404 and "choose it again" in answer["error"]


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
    assert status == 400 and list(answer) == ["error"] and "\n" not in answer["error"]
    assert name.split("\n")[0] in answer["error"] and "/tmp" not in answer["error"]


def test_an_image_that_is_too_thin_to_ask_about_is_one_line(call):
    Image.new("RGB", (4000, 15)).save(file := io.BytesIO(), "PNG")
    status, answer = call("/image?name=thin.png", file.getvalue())
    assert status == 200
    status, answer = call("/ask", {"id": answer["id"], "query": QUESTION})
    assert status == 400 and "\n" not in answer["error"] and answer["error"]


# ---------------------------------------------------------------- scans


def nifti(volumes: int = 1) -> bytes:
    """A disc in each of 20 slices, larger from foot to head, and noise; of several volumes each is brighter."""
    nib = pytest.importorskip("nibabel", reason="pip install -r requirements-extras.txt")
    x, y, z, v = np.mgrid[:60, :50, :20, :volumes]
    values = 900 * ((x - 20) ** 2 + (y - 25) ** 2 < (z + 3) ** 2) + np.random.default_rng(
        0
    ).integers(0, 90, x.shape)
    values = np.int16(values + 100 * v)
    image = nib.Nifti1Image(values if volumes > 1 else values[..., 0], np.diag([-2, -2, 4, 1]))
    return gzip.compress(image.to_bytes(), 1)


@pytest.fixture
def scan(call):
    status, answer = call("/image?name=ct.nii.gz", nifti())
    assert status == 200 and answer["name"] == "ct.nii.gz"
    return answer


@pytest.fixture
def scan_file(tmp_path):
    (tmp_path / "ct.nii.gz").write_bytes(nifti())
    return tmp_path / "ct.nii.gz"


def test_a_scan_opens_at_its_middle_slice_and_says_what_there_is_to_choose(scan, scan_file):
    assert np.array_equal(
        decoded(scan["picture"]), np.asarray(read_view(scan_file).image)
    ) and scan["size"] == [60, 50]
    assert scan["scan"] == {
        "shown": str(read_view(scan_file)),
        "slices": 20,
        "frames": 1,
        "one_plane": False,
        "levels": list(read_view(scan_file).window),
        "choice": {"slice": "10", "plane": "axial", "window": "auto"},
    }


@pytest.mark.parametrize("plane", PLANES)
@pytest.mark.parametrize("window", ["auto", "bone", "300,50"])
def test_every_slice_is_shown_as_infer_sees_it(call, scan, scan_file, plane, window):
    for n in (0, 7, 19):
        status, answer = call(
            "/view", {"id": scan["id"], "scan": {"slice": n, "plane": plane, "window": window}}
        )
        wanted = read_view(scan_file, ScanConfig(str(n), plane, window=window))
        assert status == 200 and np.array_equal(
            decoded(answer["picture"]), np.asarray(wanted.image)
        )
        assert answer["scan"]["choice"] == {"slice": str(n), "plane": plane, "window": window}
        assert answer["size"] == list(wanted.image.size) and answer["scan"]["shown"] == str(wanted)
        assert call("/view", {"id": scan["id"], "scan": answer["scan"]["choice"]})[1] == answer


def test_a_question_is_asked_about_the_slice_that_is_shown(call, scan, scan_file, tmp_path):
    infer.main(
        parse_args(
            infer.Config,
            "",
            argv=[
                "--image",
                str(scan_file),
                "--query",
                QUESTION,
                "--out",
                str(tmp_path / "out"),
                "--max-new-tokens",
                "96",
                "--slice",
                "17",
                "--plane",
                "coronal",
                "--window",
                "500,900",
                "--samples",
                "4",
            ],
        )
    )
    wanted = json.loads((tmp_path / "out/result.json").read_text())
    shown = {"slice": 17, "plane": "coronal", "window": "500,900"}
    status, answer = call(
        "/ask", {"id": scan["id"], "scan": shown, "query": QUESTION, "samples": 4}
    )
    assert status == 200 and answer["result"]["texts"] == wanted["texts"]
    assert answer["result"]["scan"] == {"shown": wanted["scan"]["shown"]}
    if "bbox" in wanted:
        assert [answer["result"][key] for key in ("bbox", "points")] == [
            wanted[key] for key in ("bbox", "points")
        ]
        assert np.array_equal(
            decoded(answer["mask"]), np.asarray(Image.open(tmp_path / "out/mask.png"))
        )


def test_the_segmenter_sees_the_slice_that_is_shown(call, scan, scan_file):
    asm = load_asm(EMBEDDED["asm"], "cpu")
    for n in (4, 18):
        status, answer = call(
            "/segment", {"id": scan["id"], "scan": {"slice": n}, "bbox": [5, 10, 40, 45]}
        )
        masks, _ = asm.segment(
            np.asarray(read_view(scan_file, ScanConfig(str(n))).image), [[5, 10, 40, 45]]
        )
        assert status == 200 and np.array_equal(decoded(answer["mask"]) > 127, masks[0])


def test_of_several_volumes_or_frames_the_first_is_shown_first(call):
    status, four = call("/image?name=4d.nii.gz", nifti(volumes=3))
    assert status == 200 and four["scan"]["frames"] == 3 and four["scan"]["choice"]["frame"] == 0
    later = call("/view", {"id": four["id"], "scan": four["scan"]["choice"] | {"frame": 2}})[1]
    assert later["scan"]["levels"][0] == pytest.approx(four["scan"]["levels"][0] + 200, abs=9)
    data = pytest.importorskip("pydicom.data", reason="pip install -r requirements-extras.txt")
    heart, ct = (
        open(data.get_testdata_file(name, download=False), "rb").read()
        for name in ("examples_ybr_color.dcm", "CT_small.dcm")
    )
    heart = call("/image?name=heart.dcm", heart)[1]  # a colour film
    assert heart["scan"] | {"shown": ""} == {
        "shown": "",
        "slices": 1,
        "frames": 30,
        "levels": None,
        "one_plane": True,
        "choice": {"slice": "0", "plane": "axial", "frame": 0, "window": "auto"},
    }
    status, last = call("/view", {"id": heart["id"], "scan": {"frame": 29}})
    assert status == 200 and last["picture"] != heart["picture"]
    ct = call("/image?name=IM0001", ct)[1]  # DICOM files often have no ending
    assert ct["size"] == [128, 128] and (ct["scan"]["slices"], ct["scan"]["frames"]) == (1, 1)


@pytest.mark.parametrize("path", ["/view", "/ask", "/segment"])
@pytest.mark.parametrize(
    "choice, told",
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
def test_a_slice_that_is_not_there_is_one_line(call, scan, path, choice, told):
    status, answer = call(path, {"id": scan["id"], "scan": choice, "query": QUESTION, "bbox": BOX})
    assert status == 400 and told in answer["error"] and "\n" not in answer["error"]
    assert "upload" not in answer["error"] and "/tmp" not in answer["error"]


def test_a_picture_has_no_slices(call, opened):
    status, answer = call("/view", {"id": opened["id"], "scan": {"slice": 3}})
    assert (
        status == 400
        and "chest.png is neither DICOM nor NIfTI: leave out --slice" in answer["error"]
    )
    assert call("/view", {"id": opened["id"]})[1]["scan"] is None


# ---------------------------------------------------------------- what is refused


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
def test_a_foreign_host_is_refused(call, method, path, host):
    status, answer = call(path, method=method, Host=host)
    assert status == (400 if host == "[::1" else 403) and list(answer) == ["error"]


def test_only_pages_of_this_server_may_post(call, service, opened):
    segment, own = {"id": opened["id"], "bbox": BOX}, f"127.0.0.1:{service.server_port}"
    others = (
        "https://evil.example",
        "null",
        f"https://{own}",
        "http://127.0.0.1:1",
        f"http://{own}.evil.example",
    )
    for origin in others:
        status, answer = call("/segment", segment, Origin=origin)
        assert status == 403 and "another site" in answer["error"], origin
    assert call("/segment", segment, Origin=f"http://{own}")[0] == 200
    assert call("/segment", segment)[0] == 200  # curl sends none
    assert (
        call("/segment", segment, Host="localhost:9000", Origin="http://localhost:9000")[0] == 200
    )  # ssh -L 9000


def test_it_listens_on_this_machine_only(service):
    assert service.server_address[0] == "127.0.0.1"


def test_too_large_a_body_is_refused_unread(service):
    for path, size in (("/image", 20 * 2**20 + 1), ("/ask", 2**16 + 1), ("/segment", 10**11)):
        connection = HTTPConnection("127.0.0.1", service.server_port, timeout=30)
        connection.putrequest("POST", path)
        connection.putheader("Content-Length", str(size))
        connection.endheaders()  # and no body: none is waited for
        reply = connection.getresponse()
        said = json.loads(reply.read())["error"]
        assert (
            reply.status == 413
            and f"{size:,}" in said
            and "scale an image down" in said
            and "infer.py" in said
        )


@pytest.mark.parametrize("length", [None, "", "-1", "ten", "1e3", "9" * 5000])
def test_a_body_needs_its_length(service, length):
    connection = HTTPConnection("127.0.0.1", service.server_port, timeout=30)
    connection.putrequest("POST", "/ask")
    if length is not None:
        connection.putheader("Content-Length", length)
    connection.endheaders()
    assert connection.getresponse().status == 411


@pytest.mark.parametrize(
    "change, told",
    [
        ({"query": ""}, "the question is empty"),
        ({"query": " \n"}, "the question is empty"),
        ({"query": None}, "the question"),
        ({"query": "x" * 2001}, "2000"),
        ({"query": ["x"]}, "the question"),
        ({"samples": 0}, "samples"),
        ({"samples": 9}, "samples"),
        ({"samples": "4"}, "samples"),
        ({"samples": True}, "samples"),
        ({"samples": 1.0}, "samples"),
    ],
)
def test_a_question_that_cannot_be_asked_is_one_line(call, opened, change, told):
    status, answer = call("/ask", {"id": opened["id"], "query": QUESTION, "samples": 1} | change)
    assert status == 400 and told in answer["error"] and "\n" not in answer["error"]


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
    assert (
        status == 400
        and list(answer) == ["error"]
        and "\n" not in answer["error"]
        and answer["error"]
    )


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b"null", b"\xff\xfe", b"[" * 60_000, b'{"id": }']
)
@pytest.mark.parametrize("path", ["/view", "/ask", "/segment"])
def test_bad_json_is_one_line(call, path, body):
    status, answer = call(path, body)
    assert status == 400 and "not" in answer["error"] and "\n" not in answer["error"]


@pytest.mark.parametrize("body", [{}, {"id": "0"}, {"id": None}, {"id": ["x"]}, {"id": {}}])
@pytest.mark.parametrize("path", ["/view", "/ask", "/segment"])
def test_an_image_that_is_not_there_is_one_line(call, path, body):
    status, answer = call(path, body)
    assert status == 404 and "choose it again" in answer["error"]


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
    assert call(path, method="GET")[0] == 404 and call(path, b"{}")[0] == 404


def test_the_page_and_its_pictures(call):
    status, page = call("/", method="GET")
    assert (
        status == 200 and b"{{DATA}}" not in page and b"fundus.png" in page and b"demo/crm" in page
    )
    assert call("/examples/fundus.png", method="GET") == (
        200,
        (ROOT / "demo/images/fundus.png").read_bytes(),
    )


def test_a_model_whose_logits_are_not_finite_is_one_line(call, opened, monkeypatch):
    def fail(*_):
        raise FloatingPointError("the model's logits\nare not finite")

    monkeypatch.setattr(infer, "sample", fail)
    status, answer = call("/ask", {"id": opened["id"], "query": QUESTION})
    assert status == 500 and answer == {"error": "the model's logits are not finite"}


@pytest.mark.parametrize(
    "flags, told",
    [("--crm ./nowhere --port 0", "nowhere"), ("--port 99999", "--port"), ("--port {}", "--port")],
)
def test_bad_flags_are_one_line_and_status_2(service, capsys, flags, told):
    with pytest.raises(SystemExit, match="2"):
        serve.main(parse_args(serve.Config, "", argv=flags.format(service.server_port).split()))
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1 and told in said


# ---------------------------------------------------------------- in a browser


def until(page, condition, seconds=60):
    end = time.monotonic() + seconds
    while not page.run(condition):
        said = page.run("document.querySelector('#error').textContent")
        assert time.monotonic() < end, (condition, said, page.errors)
        time.sleep(0.05)


def drag(page, start, *way):
    page.move(*start)
    page.move(*start, "mousePressed")
    for place in way:
        page.move(*place)
    page.move(*way[-1], "mouseReleased")


DROP = """(async () => {
  const file = new File([Uint8Array.from(atob("%s"), c => c.charCodeAt(0))], "%s"), data = new DataTransfer();
  data.items.add(file);
  document.dispatchEvent(new DragEvent("drop", { dataTransfer: data, cancelable: true }));
})()"""


def drop(content: bytes, name: str) -> str:
    return DROP % (base64.b64encode(content).decode(), name)


SETTLED = "!running && drawn && document.querySelector('#go').textContent === 'Ask'"


@pytest.mark.skipif(
    not CHROMIUM, reason="no Chromium is installed (Debian: apt-get install chromium)"
)
def test_a_browser_uploads_asks_and_drags(service, tmp_path):
    address = f"http://127.0.0.1:{service.server_port}/"
    with Browser(1280, 900) as page:
        page.open(address)
        assert page.run("document.querySelector('#go').disabled")
        page.run(drop(b"no image", "chest.png"))
        until(page, "!document.querySelector('#error').hidden")
        assert "chest.png is not an image" in page.run(
            "document.querySelector('#error').textContent"
        )
        page.run(drop(PICTURE.read_bytes(), "chest.png"))
        until(page, "!document.querySelector('#stage').hidden")
        assert page.run("document.querySelector('#error').hidden")
        assert "131 × 131" in page.run("document.querySelector('#name').textContent")

        page.run(f"document.querySelector('#query').value = {json.dumps(QUESTION)}")
        page.click(*page.place("#samples label", 1))  # four completions
        page.click(*page.place("#go"))
        until(page, SETTLED)
        assert page.run("document.querySelectorAll('#completions li').length") == 4
        boxed = page.run("answer.completions.filter(c => c.bbox).length")
        assert page.run("document.querySelectorAll('#view .other').length") == boxed - 1 >= 1
        assert page.run(
            "document.querySelector('#reasoning').textContent === answer.result.reasoning.trim()"
        )
        page.run("new Promise(done => setTimeout(done, 200))")
        page.picture(tmp_path / "wide.png")
        assert (
            page.run("""(c => c.getContext("2d").getImageData(0, 0, c.width, c.height).data
            .some((v, i) => i % 4 === 3 && v === 255))(document.querySelector("#mask"))""")
        )  # an outline is drawn

        before, asked = page.run("[bbox, points, drawn.mask]"), len(page.requests)
        page.run("points = [[50, 60], [70, 80]], sketch()")  # whatever the model said
        (px, py), scale = page.place("#view .dot", 0), page.run("scale")
        drag(page, (px, py), (px + 10, py + 5), (px + 40, py + 30))
        until(page, SETTLED)
        after = page.run("[bbox, points, drawn.mask]")
        assert after[0] == before[0] and after[1][1] == [70, 80]
        assert np.array(after[1][0]) == pytest.approx(
            np.array([50 + 40 / scale, 60 + 30 / scale]), abs=0.06
        )
        new = [url for url in page.requests[asked:] if not url.startswith("data:")]
        assert new and set(new) == {address + "segment"}  # only the segmenter ran
        assert "segmenter" in page.run("document.querySelector('#time').textContent")
        assert "moved by hand" in page.run("document.querySelector('#numbers').textContent")

        page.run("bbox = [30, 40, 70, 90], sketch()")
        corner = page.place("#view .grip", 0)  # the top left one
        drag(page, corner, (corner[0] - 5, corner[1] - 5), (corner[0] - 30, corner[1] - 20))
        until(page, SETTLED)
        box = page.run("bbox")
        assert np.array(box) == pytest.approx(
            np.array([30 - 30 / scale, 40 - 20 / scale, 70, 90]), abs=0.06
        )
        reply = page.run(f"post('/segment', {{ id: image.id, bbox: {box}, points }})")
        assert page.run("drawn.mask") == reply["mask"]  # the mask of what is shown
        saved = page.run("""(a => { a.onclick(); return JSON.parse(decodeURIComponent(a.href.split("utf-8,")[1])) })(
                            document.querySelector("#save-result"))""")
        assert (
            saved["bbox"] == box
            and saved["edited"]
            and saved["query"] == QUESTION
            and len(saved["texts"]) == 4
        )
        assert (
            saved["mask_pixels"]
            == (decoded(page.run("document.querySelector('#save-mask').href")) > 127).sum()
        )

        page.run("document.querySelectorAll('#view .hit')[0].focus()")
        page.call("Input.dispatchKeyEvent", type="keyDown", key="ArrowRight")
        until(page, SETTLED)
        assert page.run("bbox[0]") == pytest.approx(box[0] + 1, abs=0.051)
        page.click(*page.place("#reset"))
        until(page, SETTLED)
        assert page.run("[bbox, points, drawn.mask]") == before

        page.run("bbox = [60, 60, 90, 90], points = [[70, 70], [80, 80]], sketch()")
        x, y = page.run(
            "(b => [b.left, b.top])(document.querySelector('#view').getBoundingClientRect())"
        )
        drag(
            page, (x + 12, y + 12), (x + 40, y + 40), (x + 10 * scale, y + 12 * scale)
        )  # beside: a new box
        until(page, SETTLED)
        assert page.run("points") is None
        assert box_iou(page.run("bbox"), [12 / scale, 12 / scale, 10, 12]) > 0.95

        page.resize(390, 844)
        assert page.run("document.documentElement.scrollWidth") == 390
        page.picture(tmp_path / "narrow.png")
        page.click(*page.place("#examples button", 7))
        until(page, "image.name === 'fundus.png' && !answer")
        assert {
            url.split("?")[0] for url in page.requests if not url.startswith(("data:", address))
        } == set()
        refused = [e for e in page.errors if "400" not in str(e)]  # the broken image above
        assert not refused, refused
    assert all((tmp_path / name).stat().st_size > 20_000 for name in ("wide.png", "narrow.png"))


@pytest.mark.skipif(
    not CHROMIUM, reason="no Chromium is installed (Debian: apt-get install chromium)"
)
def test_a_browser_moves_through_a_scan_and_asks_about_a_slice(service, scan_file, tmp_path):
    def view(**choice):
        return np.asarray(read_view(scan_file, ScanConfig(**choice)).image)

    with Browser(1280, 900) as page:
        page.open(f"http://127.0.0.1:{service.server_port}/")
        page.run(drop(scan_file.read_bytes(), "ct.nii.gz"))
        until(page, "!document.querySelector('#scan').hidden")
        assert page.run("document.querySelector('#scan-slice').value") == "10"
        assert page.run("document.querySelector('#scan-frame').parentNode.hidden")
        assert "axial slice 10 of 20" in page.run("document.querySelector('#name').textContent")

        asked = len(page.requests)
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
        assert page.run("document.querySelector('#slice-of').textContent") == "14 of 20"
        assert np.array_equal(decoded(page.run("image.picture")), view(slice="14"))
        new = {
            url.rsplit("/", 1)[1] for url in page.requests[asked:] if not url.startswith("data:")
        }
        assert new == {"view"}  # no model ran

        for element, value, choice in (
            ("plane", "coronal", dict(slice="25", plane="coronal")),
            ("window", "bone", dict(slice="25", plane="coronal", window="bone")),
            ("levels", "500,400", dict(slice="25", plane="coronal", window="500,400")),
        ):
            if element == "levels":
                page.run(
                    "(w => { w.value = 'own'; w.onchange() })(document.querySelector('#scan-window'))"
                )
            page.run(
                f"(e => {{ e.value = '{value}'; e.onchange() }})(document.querySelector('#scan-{element}'))"
            )
            until(page, f"!running && Object.values(image.scan.choice).includes('{value}')")
            assert np.array_equal(decoded(page.run("image.picture")), view(**choice)), element
        page.run("(e => { e.value = 'x'; e.onchange() })(document.querySelector('#scan-levels'))")
        until(page, "!document.querySelector('#error').hidden")
        assert "LEVEL,WIDTH" in page.run("document.querySelector('#error').textContent")

        page.run(
            "(e => { e.value = 'axial'; e.onchange() })(document.querySelector('#scan-plane'))"
        )
        page.run(
            "(e => { e.value = 'auto'; e.onchange() })(document.querySelector('#scan-window'))"
        )
        until(
            page,
            "!running && image.scan.choice.plane === 'axial' && image.scan.choice.window === 'auto'",
        )
        page.run(f"document.querySelector('#query').value = {json.dumps(QUESTION)}")
        page.click(*page.place("#go"))
        until(page, "answer && document.querySelector('#go').textContent === 'Ask'")
        assert page.run("answer.result.scan.shown === image.scan.shown")
        page.run("bbox = [5, 10, 40, 45], points = null, segment()")
        until(page, SETTLED)
        page.picture(tmp_path / "wide.png")
        page.resize(390, 844)
        assert page.run("document.documentElement.scrollWidth") == 390
        page.picture(tmp_path / "narrow.png", whole=True)

        page.run(
            "(e => { e.value = 3; e.oninput({ target: e }) })(document.querySelector('#scan-slice'))"
        )
        until(page, "!running && image.scan.choice.slice === '3'")
        assert page.run("answer || drawn || bbox") is None  # of another slice
        page.run(drop(PICTURE.read_bytes(), "chest.png"))
        until(page, "image.name === 'chest.png'")
        assert page.run("document.querySelector('#scan').hidden")
        refused = [e for e in page.errors if "400" not in str(e)]  # the window above
        assert not refused, refused
