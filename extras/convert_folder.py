"""The folder that extras/convert.py writes, and what it reads: masks as grey values, JSON lists, parquet rows."""

import io
import json
import re
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
from PIL import Image

from extras.convert_words import split_side
from runtime.files import parse_object, read_text
from runtime.images import load_image


class Folder:
    """A data set being written: images/, masks/, rows of samples.jsonl, and faults {kind: [what]}."""

    def __init__(self, root: Path):
        self.root, self.rows, self.faults, self.sides = root, [], defaultdict(list), Counter()
        self.files = {"images": 0, "masks": 0}
        for kind in self.files:
            (root / kind).mkdir(parents=True)

    def fault(self, kind: str, what) -> None:
        self.faults[kind].append(str(what))

    def read(self, reader, source: Path | bytes, what: str, where):
        """What a reader makes of a file or its bytes; None, and a fault, where it is missing or wrong."""
        if isinstance(source, Path) and not source.is_file():
            return self.fault(f"missing {what}", where)
        try:
            return reader(source)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            return self.fault(f"wrong {what}", f"{where}: {error}")

    def path(self, kind: str, name: str, suffix: str) -> Path:
        self.files[kind] += 1  # the number keeps two names from becoming one
        return (
            self.root
            / kind
            / f"{self.files[kind]:06}-{re.sub(r'[^A-Za-z0-9_-]+', '_', name)[:100]}{suffix}"
        )

    def image(self, source: Path | bytes, name: str, where) -> dict | None:
        """{"image": file, "size": (W, H)} of a copy; None, and a fault, where it cannot be read."""
        image = self.read(load_image, source, "image", where)
        if image is None:
            return None
        file = self.path("images", name, source.suffix if isinstance(source, Path) else ".png")
        file.write_bytes(source.read_bytes() if isinstance(source, Path) else source)
        return {"image": file.name, "size": image.size}

    def target(self, mask: np.ndarray, image: dict, label: str, where, **fields) -> dict | None:
        """The fields of a sample of that (H, W) bool mask, which is written; None, and a fault, for a wrong mask."""
        W, H = image["size"]
        if mask.shape != (H, W) or not mask.any():
            wrong = (
                f"is {mask.shape[1]}x{mask.shape[0]}, its image {W}x{H}"
                if mask.any()
                else "is empty"
            )
            return self.fault("wrong mask", f"{where}: {wrong}")
        file = self.path("masks", f"{Path(image['image']).stem[7:]}-{label}", ".png")
        Image.fromarray(np.uint8(mask) * 255).save(file)
        if patient := split_side(label)[0]:
            half = "left" if np.nonzero(mask)[1].mean() < (W - 1) / 2 else "right"
            self.sides[f"patient's {patient}: {half} half of the image"] += 1
            fields["side"] = {"patient": patient, "image": half}
        return {"image": image["image"], "mask": file.name, "category": label, **fields}

    def add(self, fields: dict, **more) -> None:
        self.rows.append(fields | more)

    def finish(self) -> dict:
        """Write samples.jsonl and report.json."""
        samples = defaultdict(Counter)
        for row in self.rows:
            samples[row["split"]][row["kind"]] += 1
        report = {
            "samples": samples,
            **self.files,
            "sides": self.sides,
            "faults": {
                kind: {"count": len(names), "names": names}
                for kind, names in sorted(self.faults.items())
            },
        }
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in self.rows]
        (self.root / "samples.jsonl").write_text("".join(lines), encoding="utf-8")
        text = json.dumps(report, indent=1, ensure_ascii=False) + "\n"
        (self.root / "report.json").write_text(text, encoding="utf-8")
        return report


def greys(source: Path | bytes) -> np.ndarray:
    """(H, W) the grey values of a mask, as they are stored. ValueError where it has none."""
    load_image(source)  # refuses what is broken or hostile
    with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
        if image.mode.startswith(("I", "F")):
            raise ValueError(f"has more than 8 bits a pixel (mode {image.mode})")
        rgb = np.asarray(image.convert("RGB"))
    if (rgb != rgb[..., :1]).any():
        raise ValueError("is coloured, not grey")
    return rgb[..., 0]


def json_list(file: Path) -> list[dict]:
    """Objects in a JSON list; ValueError says where there is none."""
    values = parse_object(f'{{"": {read_text(file)}}}', file)[""]
    if not isinstance(values, list) or not all(isinstance(value, dict) for value in values):
        raise ValueError(f"{file}: not a JSON list of objects")
    return values


def bytes_in(value) -> bytes:
    return value.get("bytes") or b"" if isinstance(value, dict) else b""


def parquet_rows(file: Path, columns: set[str]):
    """Its rows, a few at a time in memory."""
    import pyarrow
    from pyarrow.parquet import ParquetFile

    try:
        opened = ParquetFile(file)
        if missing := columns - set(opened.schema_arrow.names):
            raise ValueError(f"{file}: column {', '.join(sorted(missing))} is missing")
        for batch in opened.iter_batches(16, columns=sorted(columns)):
            yield from batch.to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(
            f"{file}: not a readable parquet file ({str(error).splitlines()[0]})"
        ) from None
