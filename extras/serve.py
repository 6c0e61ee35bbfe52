"""A page on this machine: drop an image or a scan, ask, and see reasoning, box, points and mask.
Drag box or points, and the mask follows.

    python -m extras.serve                          # the embedded models, http://127.0.0.1:8000
    python -m extras.serve --crm runs/demo/step_000080 --port 8001

The page is extras/serve.html. What it asks for is answered as JSON. Boxes and points are in the
image frame.

    POST /image?name=NAME   the bytes of a picture, DICOM or NIfTI file -> what /view answers
    POST /view      {"id", "scan"} -> id, name, size, picture (upright, its longer side at most
                    SHOWN pixels), scan: null, or what there is to choose from
    POST /ask       {"id", "scan", "query", "completions": how many} -> result (as infer.py's),
                    completions (a list), kept, crm_ms, opinion, and what /segment answers
    POST /segment   {"id", "scan", "bbox", "points"} -> mask, mask_score, mask_pixels, asm_ms: the
                    segmenter alone

opinion: how sure the answer is (extras/confidence.py); null where there is one completion, or none
that can be used. The page greys out an answer below --abstain.

"id" is from /image. "scan" is the slice and the window, as in samples.jsonl: {"slice": 45,
"window": "lung"}; without it, the middle slice. What goes wrong is {"error": one line}.

The server listens on 127.0.0.1 only. It rejects a Host that is not this machine, which is a foreign
name made to resolve to it, and a POST from another site's page.
"""

import base64
import hashlib
import io
import json
import re
import tempfile
from contextlib import suppress
from dataclasses import asdict, astuple, dataclass, replace
from functools import lru_cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Lock
from time import perf_counter
from typing import Any
from urllib.parse import SplitResult, parse_qs, urlsplit

import numpy as np
import torch
from PIL import Image

from data import load_image
from extras.confidence import opinion, read_fit
from extras.scan_files import SeveralFrames
from extras.scans import PLANES, WINDOWS, ScanConfig, View, read_view, scan_config
from infer import answer, load_models
from runtime.cli import ROOT, exit_on, flag, parse_args
from runtime.files import parse_object, read_text

HOST = "127.0.0.1"
HOST_NAMES = ("127.0.0.1", "localhost")
PAGE = Path(__file__).with_suffix(".html")
EXAMPLES = ROOT / "demo/images"
LARGEST = {  # bytes of a request's body
    "/image": 20 * 2**20,
    "/view": 2**16,
    "/ask": 2**16,
    "/segment": 2**16,
}
KEPT = 4  # files that the server keeps, the latest ones
SHOWN = 1280  # pixels of the longer side of the picture that the page shows
LONGEST = 2000  # characters of a question
MOST = 8  # completions
SILENCE = 60  # seconds without a byte, after which a connection ends
MOVED = {
    "max_pixels": "give --resize aspect:PIXELS",
    "min_pixels": "a checkpoint remembers it",
}


@dataclass
class Config:
    # models
    crm: str | None = flag(None, "Qwen2.5-VL or Qwen3-VL, folder or hub name")
    asm: str | None = flag(None, "segmenter: a folder, MedSAM2_latest.pt, or see asm.SEGMENTERS")
    prompt: str | None = flag(
        None, "reasoning, direct, a text file with {query}, or the text itself"
    )
    resize: str | None = flag(None, "aspect, aspect:MAX_PIXELS or square:SIDE")
    coordinates: str | None = flag(None, "see data.COORDINATES", ("pixels", "norm1000"))
    dtype: str = flag(
        "auto", "type that computes; auto: bfloat16 on CUDA", ("auto", "float32", "bfloat16")
    )
    multimask: bool = flag(False, "request three masks and keep the best, as the release does")
    # completions
    max_new_tokens: int = flag(512, "longest completion in tokens", low=1)
    seed: int = flag(0, "seed of every random choice", low=0)
    abstain: float = flag(0.5, "confidence from which an answer is shown as one", low=0, high=1)
    # page
    port: int = flag(8000, "of this machine (0: any that is free)", low=0, high=65535)


class RequestError(ValueError):
    """An error of one line whose status is not the usual 400."""

    def __init__(self, status: int, line: str) -> None:
        super().__init__(line)
        self.status = status


# ---------------------------------------------------------------- files


@dataclass(frozen=True)
class Opened:
    """What the models see of a file. image and pixels are the same, in the image frame."""

    image: Image.Image  # RGB
    pixels: np.ndarray  # (H, W, 3) uint8
    view: View | None  # of a scan


@lru_cache(KEPT)
def read(name: str, content: bytes, choice: tuple) -> Opened:
    """Reads an uploaded file. choice: the values of a ScanConfig.

    ValueError, one line that begins with the name."""
    ending = re.search(r"(\.nii)?\.[a-z0-9]{1,8}$", name.lower())
    suffix = ending[0] if ending else ""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, f"upload{suffix}")
        file.write_bytes(content)
        try:
            view = read_scan(file, ScanConfig(*choice))
            image = load_image(file) if view is None else view.image
        except ValueError as error:
            line = f"{name} {error}"
            line = line.replace(str(file), name).replace(file.name, name)
            raise ValueError(line) from None
    return Opened(image, np.asarray(image), view)


def read_scan(file: Path, choice: ScanConfig) -> View | None:
    """Returns a slice of a scan, or None where the file is a picture.

    Of several frames or volumes the first is shown where none is chosen."""
    try:
        return read_view(file, choice)
    except SeveralFrames:
        return read_view(file, replace(choice, frame=0))


def png_uri(image: Image.Image) -> str:
    """Returns a picture as text that a page can show."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", compress_level=1)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


# ---------------------------------------------------------------- what the page asks for


class Service(ThreadingHTTPServer):
    """The two models and the latest files.

    Each request has a thread of its own, and the models answer one at a time. ValueError, one line,
    where the port is taken or a model cannot be used."""

    def __init__(self, cfg: Config) -> None:
        try:
            super().__init__((HOST, cfg.port), Handler)
        except OSError as error:
            raise ValueError(f"--port {cfg.port}: {error.strerror}; take another") from None
        self.cfg = cfg
        self.lock = Lock()
        self.files: dict[str, tuple[str, bytes]] = {}  # id: name, content
        self.crm, self.asm = load_models(cfg)
        self.fit = read_fit(cfg.crm)
        if self.crm.answer_format.several:
            raise ValueError(
                "the page shows one box, and this prompt asks for several: give --prompt "
                "reasoning, or ask with infer.py"
            )

    def page(self) -> str:
        """Returns the page, with what it needs to know of this server in it."""
        table = read_text(EXAMPLES / "README.md")
        data = {
            "examples": re.findall(r"^\| (\w+\.png) \| (.+?) \|", table, re.MULTILINE),
            "models": [short(self.cfg.crm), short(self.cfg.asm)],
            "largest": LARGEST["/image"],
            "longest": LONGEST,
            "planes": list(PLANES),
            "windows": list(WINDOWS),
        }
        text = json.dumps(data).replace("<", "\\u003c")  # "<" could end the script
        return read_text(PAGE).replace("{{DATA}}", text)

    def add_image(self, content: bytes, name: str) -> dict[str, Any]:
        """Keeps a file. Returns its view."""
        read(name, content, astuple(ScanConfig()))  # a file that is broken is not kept
        key = hashlib.blake2b(content + name.encode(), digest_size=8).hexdigest()
        with self.lock:
            kept = dict(self.files)
            kept.pop(key, None)
            kept[key] = (name, content)  # the latest is the last
            while len(kept) > KEPT:
                del kept[next(iter(kept))]
            self.files = kept
        return self.view({"id": key})

    def find(self, request: dict) -> tuple[str, Opened]:
        """Returns the name of the file that a request is about, and what is seen of it.

        RequestError where it is no longer kept, ValueError where "scan" chooses nothing."""
        found = self.files.get(str(request.get("id")))
        if found is None:
            raise RequestError(404, "this image is no longer kept here: choose it again")
        name, content = found
        choice = scan_config(request.get("scan", {}))
        return name, read(name, content, astuple(choice))

    def view(self, request: dict) -> dict[str, Any]:
        """Returns what the page shows of a file."""
        name, opened = self.find(request)
        small = opened.image.copy()
        small.thumbnail((SHOWN, SHOWN))
        scan = None if opened.view is None else what_can_be_chosen(opened.view)
        return {
            "id": request["id"],
            "name": name,
            "size": opened.image.size,
            "picture": png_uri(small),
            "scan": scan,
        }

    def ask(self, request: dict) -> dict[str, Any]:
        """Returns what infer.py would answer, and the mask of the completion that is kept."""
        name, opened = self.find(request)
        query = request.get("query")
        completions = request.get("completions", 1)
        if not isinstance(query, str) or not query.strip() or len(query) > LONGEST:
            raise ValueError(
                f"the question is empty or longer than {LONGEST} characters: ask about the image"
            )
        if type(completions) is not int or not 1 <= completions <= MOST:
            raise ValueError(f"completions: {completions!r} is not a number from 1 to {MOST}")
        temperature = 0.0 if completions == 1 else 1.0
        cfg = self.cfg
        with self.lock:
            start = perf_counter()
            prompt = self.crm.encode_question(opened.image, query)
            found, answers, kept = answer(
                self.crm, prompt, completions, cfg.max_new_tokens, temperature, cfg.seed
            )
            crm_ms = 1000 * (perf_counter() - start)
        result = found | {
            "image": name,
            "size": opened.image.size,
            "query": query,
            "crm": cfg.crm,
            "asm": cfg.asm,
        }
        if opened.view is not None:
            result["scan"] = {"shown": str(opened.view)}
        result |= answers[0 if kept is None else kept]
        reply = {"result": result, "completions": answers, "kept": kept, "crm_ms": crm_ms}
        reply["opinion"] = None
        if kept is not None and completions > 1:
            with self.lock:
                models = (self.crm, self.asm, self.fit)
                reply["opinion"] = opinion(
                    *models, opened.image, prompt, answers, kept, cfg.abstain
                )
        if kept is not None:
            reply |= self.segment(request | answers[kept])
        return reply

    def segment(self, request: dict) -> dict[str, Any]:
        """Returns the mask of a box, of points, or of both. ValueError where there is neither."""
        _, opened = self.find(request)
        box = request.get("bbox")
        points = request.get("points")
        boxes = None if box is None else [box]
        points_of_boxes = None if points is None else [points]
        with self.lock:
            start = perf_counter()
            masks, scores = self.asm.segment(opened.pixels, boxes, points_of_boxes)
            asm_ms = 1000 * (perf_counter() - start)
        mask = np.uint8(masks[0]) * 255
        return {
            "mask": png_uri(Image.fromarray(mask)),
            "mask_score": float(scores[0]),
            "mask_pixels": int(masks[0].sum()),
            "asm_ms": asm_ms,
        }

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Answers where a bug of ours ended a request. The traceback is printed here, and the page
        gets a line instead of a connection that ends."""
        super().handle_error(request, client_address)
        body = json.dumps({"error": "the server has a bug: its terminal says where"}).encode()
        head = (
            "HTTP/1.0 500 Internal Server Error\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(body)}\r\n\r\n"
        )
        with suppress(OSError):  # the page may have been closed
            request.sendall(head.encode() + body)


def what_can_be_chosen(view: View) -> dict[str, Any]:
    """Returns what the page says of a scan: what is shown, and how many slices and frames."""
    choice = {key: value for key, value in asdict(view.choice).items() if value is not None}
    return {
        "shown": str(view),
        "slices": view.slices,
        "frames": view.scan.frames,
        "levels": view.window,
        "one_plane": view.scan.shape[2] == 1,
        "choice": choice,
    }


def short(path: str) -> str:
    """Returns a path as it is seen from the root of this repository."""
    return path.removeprefix(f"{ROOT}/")


# ---------------------------------------------------------------- HTTP


class Handler(BaseHTTPRequestHandler):
    """One connection. Its `server` is the Service."""

    timeout = SILENCE

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        self.reply(self.get)

    def do_POST(self) -> None:
        self.reply(self.post)

    def reply(self, method: Any) -> None:
        """Sends what `get` or `post` returns, a type and bytes, or what went wrong, in one line."""
        try:
            self.check_host()
            kind, body = method(urlsplit(self.path))
            status = 200
        except RequestError as error:
            status = error.status
            kind, body = error_body(error)
        except ValueError as error:
            status = 400
            kind, body = error_body(error)
        except (FloatingPointError, torch.OutOfMemoryError) as error:
            status = 500
            kind, body = error_body(error)
        headers = {
            "Content-Type": kind,
            "Content-Length": str(len(body)),
            "Cache-Control": "no-store",
            "X-Content-Type-Options": "nosniff",
            "X-Frame-Options": "DENY",
        }
        with suppress(ConnectionError):  # the page may have been closed
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

    def check_host(self) -> None:
        if urlsplit(f"//{self.headers['Host']}").hostname not in HOST_NAMES:
            port = self.server.server_port
            raise RequestError(403, f"this page is at http://{HOST}:{port} only")

    def get(self, url: SplitResult) -> tuple[str, bytes]:
        """Returns the page, or one of its pictures."""
        if url.path == "/":
            return "text/html; charset=utf-8", self.server.page().encode()
        name = url.path.removeprefix("/examples/")
        if name in [file.name for file in EXAMPLES.glob("*.png")]:
            return "image/png", (EXAMPLES / name).read_bytes()
        raise RequestError(404, f"{url.path}: there is no such page")

    def post(self, url: SplitResult) -> tuple[str, bytes]:
        """Returns the answer to a request of the page."""
        self.check_origin()
        if url.path not in LARGEST:
            raise RequestError(404, f"{url.path}: there is no such page")
        body = self.body(LARGEST[url.path])
        if url.path == "/image":
            name = parse_qs(url.query).get("name", ["image"])[0]
            value = self.server.add_image(body, name)
        else:
            request = parse_object(body.decode("utf-8", "replace"), "the request")
            if url.path == "/view":
                value = self.server.view(request)
            elif url.path == "/ask":
                value = self.server.ask(request)
            else:
                value = self.server.segment(request)
        return "application/json", json.dumps(value).encode()

    def check_origin(self) -> None:
        """RequestError where a page of another site asks. What is no browser names no origin."""
        origin = self.headers.get("Origin")
        if origin is not None and origin != f"http://{self.headers['Host']}":
            raise RequestError(403, "another site's page may not ask here")

    def body(self, largest: int) -> bytes:
        """Returns the body of a request. RequestError, and nothing is read, if it is too large."""
        length = self.headers.get("Content-Length", "")
        if not re.fullmatch("[0-9]{1,12}", length):
            raise RequestError(411, "Content-Length: the number of bytes is needed")
        if int(length) > largest:
            raise RequestError(
                413,
                f"{int(length):,} bytes are over {largest:,}, the limit: scale an image down "
                "first; ask about a larger scan with python -m extras.scans",
            )
        return self.rfile.read(int(length))


def error_body(error: Exception) -> tuple[str, bytes]:
    """Returns the type and the bytes of an error's answer."""
    line = " ".join(str(error).split())
    return "application/json", json.dumps({"error": line}).encode()


# ---------------------------------------------------------------- the command


def main(cfg: Config) -> None:
    with exit_on(ValueError, OSError):
        service = Service(cfg)
    print(f"open http://{HOST}:{service.server_port} in a browser; Ctrl-C ends it", flush=True)
    with suppress(KeyboardInterrupt), service:
        service.serve_forever()


if __name__ == "__main__":
    main(parse_args(Config, __doc__, moved=MOVED))
