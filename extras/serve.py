"""A page on this machine: drop an image or a scan, ask, see reasoning, box, points and mask; drag them, and the mask follows.

    python -m extras.serve                                           # the embedded models, http://127.0.0.1:8000
    python -m extras.serve --crm runs/demo/step_000080 --port 8001

What the page (extras/serve.html) asks for, answered as JSON; boxes and points are in the image frame:
    POST /image?name=NAME   a picture, DICOM or NIfTI file -> its id, and what /view says of it
    POST /view              {"id", "scan"} -> name, size, picture (upright, at most SHOWN pixels), scan: null, or what
                            there is to choose from
    POST /ask               {"id", "scan", "query", "samples"} -> result (as infer.py's), completions, kept, mask,
                            milliseconds
    POST /segment           {"id", "scan", "bbox", "points"} -> mask, its score, size, milliseconds: the segmenter alone
"scan" is the slice and window, as in samples.jsonl: {"slice": 45, "window": "lung"}; without it, the middle slice.
What goes wrong is {"error": one line}. It listens on 127.0.0.1 only, and refuses a Host that is not this machine (a
foreign name made to resolve to it) and a POST from another site's page.
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
from urllib.parse import parse_qs, urlsplit

import numpy as np
import torch
from PIL import Image

from data import OneBox, fill_prompt, load_image
from extras.scan_files import SeveralFrames
from extras.scans import PLANES, WINDOWS, ScanConfig, read_view, scan_config
from infer import answer, load_models
from runtime.cli import ROOT, ModelConfig, exit_on, flag, parse_args
from runtime.files import parse_object, read_text

HOST, NAMES = "127.0.0.1", ("127.0.0.1", "localhost")
EXAMPLES, PAGE = ROOT / "demo/images", Path(__file__).with_suffix(".html")
LARGEST = {
    "/image": 20 * 2**20,
    "/view": 2**16,
    "/ask": 2**16,
    "/segment": 2**16,
}  # bytes of a body
KEPT, SHOWN, LONGEST = (
    4,
    1280,
    2000,
)  # files kept; pixels of a picture's side; characters of a question


@dataclass
class Config(ModelConfig):
    asm: str | None = flag(
        None, "segmenter: a folder, MedSAM2_latest.pt, or a spec of asm.SEGMENTERS"
    )
    port: int = flag(8000, "of this machine (0: any that is free)", low=0, high=65535)
    max_new_tokens: int = flag(512, "longest completion in tokens", low=1)
    multimask: bool = flag(
        False, "request three masks and keep the best, as the released code does"
    )


class Refused(ValueError):
    """An error whose status is not the usual 400."""

    def __init__(self, status: int, line: str):
        super().__init__(line)
        self.status = status


@lru_cache(KEPT)
def read(name: str, content: bytes, choice: tuple):
    """A file's (PIL image, pixels, View or None). choice: the values of a ScanConfig. ValueError, one line."""
    ending = re.search(r"(\.nii)?\.[a-z0-9]{1,8}$", name.lower())
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "upload" + (ending[0] if ending else ""))
        file.write_bytes(content)
        choice = ScanConfig(*choice)
        try:
            try:
                view = read_view(file, choice)
            except SeveralFrames:
                view = read_view(file, replace(choice, frame=0))
            image = view.image if view else load_image(file)
        except ValueError as error:
            raise ValueError(
                f"{name} {error}".replace(str(file), name).replace(file.name, name)
            ) from None
    return image, np.asarray(image), view


class Service(ThreadingHTTPServer):
    """The two models, used by one request at a time, and the latest files. ValueError: no port, no model."""

    def __init__(self, cfg: Config):
        try:
            super().__init__((HOST, cfg.port), Handler)
        except OSError as error:
            raise ValueError(f"--port {cfg.port}: {error.strerror}; take another") from None
        self.cfg, self.lock, self.files = cfg, Lock(), {}  # id: (name, content)
        self.crm, self.asm = load_models(cfg)
        if self.crm.answers is not OneBox:
            raise ValueError("--prompt multi: the page shows one box; infer.py takes several")

    def page(self) -> str:
        data = {
            "examples": re.findall(
                r"^\| (\w+\.png) \| (.+?) \|", read_text(EXAMPLES / "README.md"), re.MULTILINE
            ),
            "models": [str(path).removeprefix(f"{ROOT}/") for path in (self.cfg.crm, self.cfg.asm)],
            "largest": LARGEST["/image"],
            "longest": LONGEST,
            "planes": list(PLANES),
            "windows": list(WINDOWS),
        }
        return read_text(PAGE).replace(
            "{{DATA}}", json.dumps(data).replace("<", "\\u003c")
        )  # "<" ends a script

    def image(self, content: bytes, name: str) -> dict:
        read(name, content, astuple(ScanConfig()))  # one that is broken is not kept
        key = hashlib.blake2b(content + name.encode(), digest_size=8).hexdigest()
        with self.lock:
            others = [item for item in self.files.items() if item[0] != key]
            self.files = dict([*others, (key, (name, content))][-KEPT:])  # the latest last
        return self.view({"id": key})

    def find(self, request: dict):
        """name, PIL image, pixels, View or None"""
        if not (found := self.files.get(str(request.get("id")))):
            raise Refused(404, "this image is no longer kept here: choose it again")
        return found[0], *read(*found, astuple(scan_config(request.get("scan", {}))))

    def view(self, request: dict) -> dict:
        name, image, _, view = self.find(request)
        small = image.copy()
        small.thumbnail((SHOWN, SHOWN))
        scan = view and {
            "shown": str(view),
            "slices": view.slices,
            "frames": view.scan.frames,
            "levels": view.window,
            "one_plane": view.scan.shape[2] == 1,
            "choice": {
                key: value for key, value in asdict(view.choice).items() if value is not None
            },
        }
        return {
            "id": request["id"],
            "name": name,
            "size": image.size,
            "picture": png(small),
            "scan": scan,
        }

    def ask(self, request: dict) -> dict:
        (name, image, _, view), cfg = self.find(request), self.cfg
        query, samples = request.get("query"), request.get("samples", 1)
        if not isinstance(query, str) or not query.strip() or len(query) > LONGEST:
            raise ValueError(
                f"the question is empty or longer than {LONGEST} characters: ask about the image"
            )
        if type(samples) is not int or not 1 <= samples <= 8:
            raise ValueError(f"samples: {samples!r} is not a number from 1 to 8")
        with self.lock:
            start = perf_counter()
            prompt = self.crm.encode(image, fill_prompt(self.crm.template, query))
            result, completions, kept = answer(
                self.crm, prompt, samples, cfg.max_new_tokens, float(samples > 1), cfg.seed
            )
            crm_ms = 1000 * (perf_counter() - start)
        result |= {
            "image": name,
            "size": image.size,
            "query": query,
            "crm": cfg.crm,
            "asm": cfg.asm,
            **({"scan": {"shown": str(view)}} if view else {}),
            **completions[kept or 0],
        }
        mask = {} if kept is None else self.segment(request | completions[kept])
        return {
            "result": result,
            "completions": completions,
            "kept": kept,
            "crm_ms": crm_ms,
            **mask,
        }

    def segment(self, request: dict) -> dict:
        _, _, pixels, _ = self.find(request)
        boxes, points = (
            [xy] if (xy := request.get(key)) is not None else None for key in ("bbox", "points")
        )
        with self.lock:
            start = perf_counter()
            masks, scores = self.asm.segment(pixels, boxes, points)
            asm_ms = 1000 * (perf_counter() - start)
        return {
            "mask": png(Image.fromarray(np.uint8(masks[0]) * 255)),
            "mask_score": float(scores[0]),
            "mask_pixels": int(masks[0].sum()),
            "asm_ms": asm_ms,
        }


def png(image: Image.Image) -> str:
    image.save(buffer := io.BytesIO(), format="PNG", compress_level=1)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


class Handler(BaseHTTPRequestHandler):
    timeout = 60  # seconds of silence, then the connection ends

    def log_message(self, *_):
        pass

    def reply(self, method):
        """What `get` or `post` returns, a type and bytes, or what went wrong, in one line."""
        try:
            if urlsplit(f"//{self.headers['Host']}").hostname not in NAMES:
                raise Refused(403, f"this page is at http://{HOST}:{self.server.server_port} only")
            status, (kind, body) = 200, method(urlsplit(self.path))
        except (ValueError, FloatingPointError, torch.OutOfMemoryError) as error:
            status = getattr(error, "status", 400 if isinstance(error, ValueError) else 500)
            kind, body = (
                "application/json",
                json.dumps({"error": " ".join(str(error).split())}).encode(),
            )
        with suppress(ConnectionError):  # the page may have been closed
            self.send_response(status)
            for header in (
                ("Content-Type", kind),
                ("Content-Length", len(body)),
                ("Cache-Control", "no-store"),
                ("X-Content-Type-Options", "nosniff"),
                ("X-Frame-Options", "DENY"),
            ):
                self.send_header(*header)
            self.end_headers()
            self.wfile.write(body)

    def do_GET(self):
        self.reply(self.get)

    def do_POST(self):
        self.reply(self.post)

    def get(self, url):
        if url.path == "/":
            return "text/html; charset=utf-8", self.server.page().encode()
        if (name := url.path.removeprefix("/examples/")) in {
            file.name for file in EXAMPLES.glob("*.png")
        }:
            return "image/png", (EXAMPLES / name).read_bytes()
        raise Refused(404, f"{url.path}: there is no such page")

    def post(self, url):
        if self.headers.get("Origin", "none") not in (
            "none",
            f"http://{self.headers['Host']}",
        ):  # none: no browser
            raise Refused(403, "another site's page may not ask here")
        if not (largest := LARGEST.get(url.path)):
            raise Refused(404, f"{url.path}: there is no such page")
        if not re.fullmatch("[0-9]{1,12}", length := self.headers.get("Content-Length", "")):
            raise Refused(411, "Content-Length: the number of bytes is needed")
        if int(length) > largest:
            raise Refused(
                413,
                f"{int(length):,} bytes are over {largest:,}, the limit: scale an image down first; ask "
                "about a larger scan with infer.py",
            )
        body = self.rfile.read(int(length))
        if url.path == "/image":
            value = self.server.image(body, parse_qs(url.query).get("name", ["image"])[0])
        else:
            request = parse_object(body.decode("utf-8", "replace"), "the request")
            value = getattr(self.server, url.path[1:])(request)  # view, ask or segment
        return "application/json", json.dumps(value).encode()


def main(cfg: Config) -> None:
    with exit_on(ValueError, OSError):
        service = Service(cfg)
    print(f"open http://{HOST}:{service.server_port} in a browser; Ctrl-C ends it", flush=True)
    with suppress(KeyboardInterrupt), service:
        service.serve_forever()


if __name__ == "__main__":
    main(parse_args(Config, __doc__))
