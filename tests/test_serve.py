"""tools/serve.py: its answers are infer.py's and the segmenter's, what it refuses, and the page in a browser."""
import base64
import io
import json
import threading
import time
from http.client import HTTPConnection
from urllib.parse import quote

import numpy as np
import pytest
from PIL import Image

import infer
from asm import load_asm
from browser import CHROMIUM, Browser
from rewards import box_iou
from runtime.cli import EMBEDDED, ROOT, parse_args
from runtime.images import load_image
from tools import serve

PICTURE = ROOT / "demo/images/chest_ct_patient.png"
QUESTION = "What could the dark air-filled field on the left of the chest represent?"
BOX, POINTS = [22.0, 43.0, 69.0, 98.0], [[40.0, 60.0], [45.0, 80.0]]


@pytest.fixture(scope="module")
def service():
    with serve.Service(parse_args(serve.Config, "", argv=["--port", "0", "--max-new-tokens", "96"])) as service:
        threading.Thread(target=service.serve_forever, args=(0.05,), daemon=True).start()
        yield service
        service.shutdown()


@pytest.fixture(scope="module")
def call(service):
    def call(path, body=b"", method="POST", **headers):
        """-> status, the answer. body: bytes, text, or what becomes JSON."""
        connection = HTTPConnection("127.0.0.1", service.server_port, timeout=120)
        body = body if isinstance(body, bytes | str) else json.dumps(body)
        connection.request(method, path, body, {key.replace("_", "-"): value for key, value in headers.items()})
        reply = connection.getresponse()
        text = reply.read()
        return reply.status, json.loads(text) if reply.headers["Content-Type"] == "application/json" else text
    return call


@pytest.fixture(scope="module")
def opened(call):
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
    assert infer.main(parse_args(infer.Config, "", argv=[
        "--image", str(PICTURE), "--query", QUESTION, "--out", str(tmp_path), "--samples", str(samples),
        "--max-new-tokens", "96"])) == 0
    wanted = json.loads((tmp_path / "result.json").read_text())
    status, answer = call("/ask", {"id": opened["id"], "query": QUESTION, "samples": samples})
    assert status == 200 and answer["crm_ms"] > 0 and answer["asm_ms"] > 0
    got = answer["result"] | {key: answer[key] for key in ("mask_score", "mask_pixels")}
    assert got.pop("image") == "chest.png" and wanted.pop("image") == str(PICTURE)
    assert got == wanted
    assert np.array_equal(decoded(answer["mask"]), np.asarray(Image.open(tmp_path / "mask.png")))
    assert [c["text"] for c in answer["completions"]] == wanted["texts"]
    assert answer["completions"][answer["kept"]]["bbox"] == wanted["bbox"]


@pytest.mark.parametrize("bbox, points", [(BOX, POINTS), (BOX, None), (None, POINTS), ([-50, -9, 500, 30], POINTS[:1])])
def test_a_segment_is_that_of_the_segmenter(call, opened, bbox, points):
    status, answer = call("/segment", {"id": opened["id"], "bbox": bbox, "points": points})
    masks, scores = load_asm(EMBEDDED["asm"], "cpu").segment(np.asarray(load_image(PICTURE)), bbox and [bbox],
                                                             points and [points])
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
    picture.paste((255, 0, 0), (0, 0, 1500, 750))                       # red at the top left, as stored
    exif = picture.getexif()
    exif[0x0112] = 6                                                    # shown: a quarter turn to the right
    picture.save(tmp_path / "turned.jpg", exif=exif)
    status, answer = call("/image?name=turned.jpg", (tmp_path / "turned.jpg").read_bytes())
    shown = decoded(answer["picture"])
    assert status == 200 and answer["size"] == [1500, 3000] and shown.shape == (1280, 640, 3)
    assert shown[100, 500, 0] > 200 and shown[100, 100, 0] < 50         # red is now at the top right
    status, answer = call("/segment", {"id": answer["id"], "bbox": [800, 10, 1400, 1400]})
    assert status == 200 and decoded(answer["mask"]).shape == (3000, 1500)


def test_only_the_latest_images_are_kept(call, service):
    files = [io.BytesIO() for _ in range(serve.KEPT + 1)]
    for i, file in enumerate(files):
        Image.new("RGB", (20, 20 + i)).save(file, "PNG")
    keys = [call("/image?name=a", file.getvalue())[1]["id"] for file in files]
    assert list(service.images) == keys[1:]
    status, answer = call("/segment", {"id": keys[0], "bbox": [1, 1, 9, 9]})
    assert status == 404 and "choose it again" in answer["error"]


@pytest.fixture
def kept(call):                                                         # after other tests, too
    return call("/image?name=chest.png", PICTURE.read_bytes())[1]["id"]


@pytest.mark.parametrize("name, body", [
    ("broken.png", PICTURE.read_bytes()[:4000]), ("text.png", b"no image"), ("empty.png", b""), ("x", b"\0" * 100),
    ("../../etc/passwd", b"x"), ("scan.dcm", b"x"), ("scan.nii.gz", b"x"), ("page.svg", b"<svg/>"),
    ("a\nb\0c.png", b"x")])
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


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize("host", ["evil.example", "evil.example:8000", "127.0.0.1.evil.example", "localhost.evil", "",
                                  "[::1", "10.0.0.1", "user@evil.example"])
@pytest.mark.parametrize("method, path", [("GET", "/"), ("GET", "/examples/fundus.png"), ("POST", "/segment")])
def test_a_foreign_host_is_refused(call, method, path, host):
    status, answer = call(path, method=method, Host=host)
    assert status == (400 if host == "[::1" else 403) and list(answer) == ["error"]


def test_only_pages_of_this_server_may_post(call, service, kept):
    segment, own = {"id": kept, "bbox": BOX}, f"127.0.0.1:{service.server_port}"
    others = "https://evil.example", "null", f"https://{own}", "http://127.0.0.1:1", f"http://{own}.evil.example"
    for origin in others:
        status, answer = call("/segment", segment, Origin=origin)
        assert status == 403 and "another site" in answer["error"], origin
    assert call("/segment", segment, Origin=f"http://{own}")[0] == 200
    assert call("/segment", segment)[0] == 200                          # curl sends none
    assert call("/segment", segment, Host="localhost:9000", Origin="http://localhost:9000")[0] == 200   # ssh -L 9000


def test_it_listens_on_this_machine_only(service):
    assert service.server_address[0] == "127.0.0.1"


def test_too_large_a_body_is_refused_unread(service):
    for path, size in (("/image", 20 * 2 ** 20 + 1), ("/ask", 2 ** 16 + 1), ("/segment", 10 ** 11)):
        connection = HTTPConnection("127.0.0.1", service.server_port, timeout=30)
        connection.putrequest("POST", path)
        connection.putheader("Content-Length", str(size))
        connection.endheaders()                                         # and no body: none is waited for
        reply = connection.getresponse()
        assert reply.status == 413 and f"{size:,}" in json.loads(reply.read())["error"]


@pytest.mark.parametrize("length", [None, "", "-1", "ten", "1e3", "9" * 5000])
def test_a_body_needs_its_length(service, length):
    connection = HTTPConnection("127.0.0.1", service.server_port, timeout=30)
    connection.putrequest("POST", "/ask")
    if length is not None:
        connection.putheader("Content-Length", length)
    connection.endheaders()
    assert connection.getresponse().status == 411


@pytest.mark.parametrize("change, told", [
    ({"query": ""}, "the question is empty"), ({"query": " \n"}, "the question is empty"),
    ({"query": None}, "the question"),
    ({"query": "x" * 2001}, "2000"), ({"query": ["x"]}, "the question"), ({"samples": 0}, "samples"),
    ({"samples": 9}, "samples"), ({"samples": "4"}, "samples"), ({"samples": True}, "samples"),
    ({"samples": 1.0}, "samples")])
def test_a_question_that_cannot_be_asked_is_one_line(call, kept, change, told):
    status, answer = call("/ask", {"id": kept, "query": QUESTION, "samples": 1} | change)
    assert status == 400 and told in answer["error"] and "\n" not in answer["error"]


@pytest.mark.parametrize("bbox, points", [
    (None, None), ([1, 2, 3], None), ("box", None), ([[1, 2, 3, 4]], None), ({"x": 1}, None), ([1, 2, 3, "4"], None),
    (BOX, [[1, 2, 3]]), (BOX, [1, 2]), (BOX, []), (BOX, [[1, 2], [3]]), ([1, 2, 3, 10 ** 40], None),
    ([1, 2, 3, 1e300], None),
    ([1, 2, 3, float("nan")], None), ([1, 2, 3, None], None), (False, None)])
def test_a_box_that_is_none_is_one_line(call, kept, bbox, points):
    status, answer = call("/segment", {"id": kept, "bbox": bbox, "points": points})
    assert status == 400 and list(answer) == ["error"] and "\n" not in answer["error"] and answer["error"]


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"null", b"\xff\xfe", b"[" * 60_000, b'{"id": }'])
@pytest.mark.parametrize("path", ["/ask", "/segment"])
def test_bad_json_is_one_line(call, path, body):
    status, answer = call(path, body)
    assert status == 400 and "not" in answer["error"] and "\n" not in answer["error"]


@pytest.mark.parametrize("body", [{}, {"id": "0"}, {"id": None}, {"id": ["x"]}, {"id": {}}])
@pytest.mark.parametrize("path", ["/ask", "/segment"])
def test_an_image_that_is_not_there_is_one_line(call, path, body):
    status, answer = call(path, body)
    assert status == 404 and "choose it again" in answer["error"]


@pytest.mark.parametrize("path", ["/x", "/examples/", "/examples/../README.md", "/examples/%2e%2e/README.md",
                                  "/examples/README.md", "/examples//fundus.png"])
def test_other_addresses_are_404(call, path):
    assert call(path, method="GET")[0] == 404 and call(path, b"{}")[0] == 404


def test_the_page_and_its_pictures(call):
    status, page = call("/", method="GET")
    assert status == 200 and b"{{DATA}}" not in page and b"fundus.png" in page and b"demo/crm" in page
    assert call("/examples/fundus.png", method="GET") == (200, (ROOT / "demo/images/fundus.png").read_bytes())


def test_a_model_whose_logits_are_not_finite_is_one_line(call, kept, monkeypatch):
    def fail(*_):
        raise FloatingPointError("the model's logits\nare not finite")
    monkeypatch.setattr(serve, "sample", fail)
    assert call("/ask", {"id": kept, "query": QUESTION}) == (500, {"error": "the model's logits are not finite"})


@pytest.mark.parametrize("flags, told", [("--crm ./nowhere --port 0", "nowhere"), ("--port 99999", "--port"),
                                         ("--port {}", "--port")])
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
  const file = new File([Uint8Array.from(atob("%s"), c => c.charCodeAt(0))], "chest.png"), data = new DataTransfer();
  data.items.add(file);
  document.dispatchEvent(new DragEvent("drop", { dataTransfer: data, cancelable: true }));
})()"""
SETTLED = "!running && drawn && document.querySelector('#go').textContent === 'Ask'"


@pytest.mark.skipif(not CHROMIUM, reason="no Chromium is installed (Debian: apt-get install chromium)")
def test_a_browser_uploads_asks_and_drags(service, tmp_path):
    address = f"http://127.0.0.1:{service.server_port}/"
    with Browser(1280, 900) as page:
        page.open(address)
        assert page.run("document.querySelector('#go').disabled")
        page.run(DROP % base64.b64encode(b"no image").decode())
        until(page, "!document.querySelector('#error').hidden")
        assert "chest.png is not an image" in page.run("document.querySelector('#error').textContent")
        page.run(DROP % base64.b64encode(PICTURE.read_bytes()).decode())
        until(page, "!document.querySelector('#stage').hidden")
        assert page.run("document.querySelector('#error').hidden")
        assert "131 × 131" in page.run("document.querySelector('#name').textContent")

        page.run(f"document.querySelector('#query').value = {json.dumps(QUESTION)}")
        page.click(*page.place("#samples label", 1))                            # four completions
        page.click(*page.place("#go"))
        until(page, SETTLED)
        assert page.run("document.querySelectorAll('#completions li').length") == 4
        boxed = page.run("answer.completions.filter(c => c.bbox).length")
        assert page.run("document.querySelectorAll('#view .other').length") == boxed - 1 >= 1
        assert page.run("document.querySelector('#reasoning').textContent === answer.result.reasoning.trim()")
        page.run("new Promise(done => setTimeout(done, 200))")
        page.picture(tmp_path / "wide.png")
        assert page.run("""(c => c.getContext("2d").getImageData(0, 0, c.width, c.height).data
            .some((v, i) => i % 4 === 3 && v === 255))(document.querySelector("#mask"))""")     # an outline is drawn

        before, asked = page.run("[bbox, points, drawn.mask]"), len(page.requests)
        page.run("points = [[50, 60], [70, 80]], sketch()")                     # whatever the model said
        (px, py), scale = page.place("#view .dot", 0), page.run("scale")
        drag(page, (px, py), (px + 10, py + 5), (px + 40, py + 30))
        until(page, SETTLED)
        after = page.run("[bbox, points, drawn.mask]")
        assert after[0] == before[0] and after[1][1] == [70, 80]
        assert np.array(after[1][0]) == pytest.approx(np.array([50 + 40 / scale, 60 + 30 / scale]), abs=0.06)
        new = [url for url in page.requests[asked:] if not url.startswith("data:")]
        assert new and set(new) == {address + "segment"}                        # only the segmenter ran
        assert "segmenter" in page.run("document.querySelector('#time').textContent")
        assert "moved by hand" in page.run("document.querySelector('#numbers').textContent")

        page.run("bbox = [30, 40, 70, 90], sketch()")
        corner = page.place("#view .grip", 0)                                   # the top left one
        drag(page, corner, (corner[0] - 5, corner[1] - 5), (corner[0] - 30, corner[1] - 20))
        until(page, SETTLED)
        box = page.run("bbox")
        assert np.array(box) == pytest.approx(np.array([30 - 30 / scale, 40 - 20 / scale, 70, 90]), abs=0.06)
        reply = page.run(f"post('/segment', {{ id: image.id, bbox: {box}, points }})")
        assert page.run("drawn.mask") == reply["mask"]                          # the mask of what is shown
        saved = page.run("""(a => { a.onclick(); return JSON.parse(decodeURIComponent(a.href.split("utf-8,")[1])) })(
                            document.querySelector("#save-result"))""")
        assert saved["bbox"] == box and saved["edited"] and saved["query"] == QUESTION and len(saved["texts"]) == 4
        assert saved["mask_pixels"] == (decoded(page.run("document.querySelector('#save-mask').href")) > 127).sum()

        page.run("document.querySelectorAll('#view .hit')[0].focus()")
        page.call("Input.dispatchKeyEvent", type="keyDown", key="ArrowRight")
        until(page, SETTLED)
        assert page.run("bbox[0]") == pytest.approx(box[0] + 1, abs=0.051)
        page.click(*page.place("#reset"))
        until(page, SETTLED)
        assert page.run("[bbox, points, drawn.mask]") == before

        page.run("bbox = [60, 60, 90, 90], points = [[70, 70], [80, 80]], sketch()")
        x, y = page.run("(b => [b.left, b.top])(document.querySelector('#view').getBoundingClientRect())")
        drag(page, (x + 12, y + 12), (x + 40, y + 40), (x + 10 * scale, y + 12 * scale))    # beside: a new box
        until(page, SETTLED)
        assert page.run("points") is None
        assert box_iou(page.run("bbox"), [12 / scale, 12 / scale, 10, 12]) > 0.95

        page.resize(390, 844)
        assert page.run("document.documentElement.scrollWidth") == 390
        page.picture(tmp_path / "narrow.png")
        page.click(*page.place("#examples button", 7))
        until(page, "image.name === 'fundus.png' && !answer")
        assert {url.split("?")[0] for url in page.requests if not url.startswith(("data:", address))} == set()
        refused = [e for e in page.errors if "400" not in str(e)]               # the broken image above
        assert not refused, refused
    assert all((tmp_path / name).stat().st_size > 20_000 for name in ("wide.png", "narrow.png"))
