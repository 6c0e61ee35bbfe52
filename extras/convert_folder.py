"""The folder that extras/convert.py writes, and how it reads what others wrote: masks as grey
values, JSON lists, parquet rows."""

import io
import json
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from extras.convert_words import split_side
from runtime.files import read_text
from runtime.images import load_image

NUMBER_DIGITS = 6  # of the number that begins a file's name
NAME_LENGTH = 100  # characters of a name that are kept in a file's name
ROWS_IN_MEMORY = 16  # of a parquet file, with their images
SAFE = {"newline": "\n", "encoding": "utf-8"}  # the same bytes on every machine


class Folder:
    """A data set while it is written.

    root    the folder, with images/ and masks/ in it
    rows    of samples.jsonl
    faults  {kind: what has it}
    sides   how often a side of the patient is in which half of the image
    files   how many images and masks there are
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.rows: list[dict] = []
        self.faults: dict[str, list[str]] = defaultdict(list)
        self.sides: Counter[str] = Counter()
        self.files = {"images": 0, "masks": 0}
        for kind in self.files:
            (root / kind).mkdir(parents=True)

    def add_fault(self, kind: str, what: object) -> None:
        self.faults[kind].append(str(what))

    def read(
        self, reader: Callable[[Any], Any], source: Path | bytes, what: str, where: object
    ) -> Any:
        """Returns what a reader makes of a file or its bytes.

        None, and a fault, where the file is missing or wrong."""
        if isinstance(source, Path) and not source.is_file():
            self.add_fault(f"missing {what}", where)
            return None
        try:
            return reader(source)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            self.add_fault(f"wrong {what}", f"{where}: {error}")
            return None

    def new_file(self, kind: str, name: str, suffix: str) -> Path:
        """Returns the path of the next image or mask. Its number keeps names apart."""
        self.files[kind] += 1
        number = str(self.files[kind]).zfill(NUMBER_DIGITS)
        safe_name = re.sub(r"[^A-Za-z0-9_-]+", "_", name)[:NAME_LENGTH]
        return self.root / kind / f"{number}-{safe_name}{suffix}"

    def add_image(self, source: Path | bytes, name: str, where: object) -> dict | None:
        """Copies an image. Returns {"image": file name, "size": (width, height)}.

        None, and a fault, where it cannot be read. Size is that of the upright image."""
        image = self.read(load_image, source, "image", where)
        if image is None:
            return None
        if isinstance(source, Path):
            content = source.read_bytes()
            suffix = source.suffix
        else:
            content = source
            suffix = ".png"
        file = self.new_file("images", name, suffix)
        file.write_bytes(content)
        return {"image": file.name, "size": image.size}

    def add_target(
        self, mask: np.ndarray, image: dict, label: str, where: object, **facts: Any
    ) -> dict | None:
        """Writes a mask. Returns the keys of a row about it, without a question.

        mask: (H, W) bool, image frame; image: what add_image returned; facts: more keys of the row.
        None, and a fault, where the mask is empty or not as large as its image."""
        width, height = image["size"]
        if not mask.any():
            self.add_fault("wrong mask", f"{where}: is empty")
            return None
        if mask.shape != (height, width):
            size = f"{mask.shape[1]}x{mask.shape[0]}"
            self.add_fault("wrong mask", f"{where}: is {size}, its image {width}x{height}")
            return None
        image_name = Path(image["image"]).stem[NUMBER_DIGITS + 1 :]
        file = self.new_file("masks", f"{image_name}-{label}", ".png")
        Image.fromarray(np.uint8(mask) * 255).save(file)
        side, _ = split_side(label)
        if side:
            _, columns = np.nonzero(mask)
            half = "left" if columns.mean() < (width - 1) / 2 else "right"
            self.sides[f"patient's {side}: {half} half of the image"] += 1
            facts["side"] = {"patient": side, "image": half}
        return {"image": image["image"], "mask": file.name, "category": label, **facts}

    def add_row(self, target: dict, **more: Any) -> None:
        """Adds a row of samples.jsonl. target: what add_target returned; more: the other keys."""
        self.rows.append(target | more)

    def counts(self) -> dict[str, Counter[str]]:
        """Returns how many rows there are, {split: {kind: count}}."""
        found: dict[str, Counter[str]] = defaultdict(Counter)
        for row in self.rows:
            found[row["split"]][row["kind"]] += 1
        return found

    def finish(self) -> None:
        """Writes samples.jsonl and report.json."""
        # Only ASCII: some programs also end a line at characters such as U+2028.
        lines = [json.dumps(row) + "\n" for row in self.rows]
        (self.root / "samples.jsonl").write_text("".join(lines), **SAFE)
        faults = {}
        for kind, names in sorted(self.faults.items()):
            faults[kind] = {"count": len(names), "names": names}
        report = {"samples": self.counts(), **self.files, "sides": self.sides, "faults": faults}
        text = json.dumps(report, indent=1, ensure_ascii=False) + "\n"
        # JSON's escape for what UTF-8 cannot hold, half of a surrogate pair, is Python's as well
        (self.root / "report.json").write_text(text, errors="backslashreplace", **SAFE)


# ---------------------------------------------------------------- reading


def greys(source: Path | bytes) -> np.ndarray:
    """Returns the grey values (H, W) uint8 of a mask, as they are stored.

    ValueError where it is coloured or transparent, has more than 8 bits, or cannot be read."""
    load_image(source)  # raises ValueError for what is broken or hostile
    file = io.BytesIO(source) if isinstance(source, bytes) else source
    with Image.open(file) as image:
        if image.mode.startswith(("I", "F")):
            raise ValueError(f"has more than 8 bits a pixel (mode {image.mode})")
        if image.has_transparency_data:
            alpha = image.convert("RGBA").getchannel("A")
            if alpha.getextrema() != (255, 255):
                raise ValueError("has transparent pixels; save it as grey")
        rgb = np.asarray(image.convert("RGB"))
    if (rgb != rgb[..., :1]).any():
        raise ValueError("is coloured, not grey")
    return rgb[..., 0]


def json_list(file: Path) -> list[dict]:
    """Returns the objects in a JSON list. ValueError, one line, where a file has no such list."""
    text = read_text(file)
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}: not JSON ({error})") from None
    if not isinstance(values, list) or not all(isinstance(value, dict) for value in values):
        raise ValueError(f"{file}: not a JSON list of objects")
    return values


def bytes_in(struct: Any) -> bytes:
    """Returns the bytes of a parquet file's image {bytes, path}, b"" where there are none."""
    if not isinstance(struct, dict):
        return b""
    return struct.get("bytes") or b""


def parquet_rows(file: Path, columns: set[str]) -> Iterator[dict]:
    """Yields the rows of a parquet file. ValueError, one line, where a column is missing."""
    import pyarrow
    from pyarrow.parquet import ParquetFile

    try:
        opened = ParquetFile(file)
        missing = columns - set(opened.schema_arrow.names)
        if missing:
            raise ValueError(f"{file}: column {', '.join(sorted(missing))} is missing")
        for batch in opened.iter_batches(ROWS_IN_MEMORY, columns=sorted(columns)):
            yield from batch.to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{file}: not a readable parquet file ({reason})") from None
