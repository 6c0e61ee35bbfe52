"""Readers: how a path becomes rows.

reader(path, split) -> (rows of that split, names of all splits), no image decoded. A row is a dict, which
data.py checks; coordinates are pixels of the upright image:
  query                                 the question
  image, mask                           a path, bytes, or a function that returns bytes; mask may be None
  bbox, points                          [x1, y1, x2, y2] and [[x, y], …], or None: taken from the mask
and where there is more to say than DEFAULTS does:
  where                                 "file, line 3": how messages call it
  id, supercategory, category, think    strings
  extra                                 a dict of whatever else the data has
  problem                               "" or what could not be read, as in "image: is missing"
To add a reader, write the function and name it in READERS, by the pattern of a path or of what is in a folder.
"""

from functools import partial
from importlib import import_module
from pathlib import Path

from runtime.files import parse_object, read_text

DEFAULTS = {
    "mask": None,
    "bbox": None,
    "points": None,
    "supercategory": "",
    "category": "",
    "think": "",
    "extra": {},
    "problem": "",
}


def read_folder(path: Path, split: str) -> tuple[list[dict], list[str]]:
    """samples.jsonl beside images/ and masks/, one object per line: image, query, and mask or bbox + points;
    optional id, split ("train" if missing), supercategory, category, think. Masks are 0/255 or 0/1, of their
    image's size; file names are relative to images/ and masks/. For DICOM and NIfTI, "scan": {"slice": 45} has keys of
    extras.scans.ScanConfig, and the mask may be NIfTI on the same grid."""
    file, rows, splits = path / "samples.jsonl" if path.is_dir() else path, [], set()
    text = read_text(file)
    if text.lstrip().startswith("["):
        raise ValueError(f"{file}: is a JSON array; one object per line is needed")
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        image, mask, problem = None, None, ""
        try:
            fields = parse_object(line, "text")
            splits.add(str(fields.get("split", "train")))
        except ValueError as error:  # of no known split: a bad row of every one
            fields, problem = {"split": split}, str(error)
        if fields.get("split", "train") != split:
            continue
        if missing := [key for key in ("image", "query") if key not in fields]:
            problem = (
                problem or f"{missing[0]}: is missing (keys here: {', '.join(fields) or 'none'})"
            )
        try:
            image = file_in(file.parent / "images", fields.get("image"))
            mask = file_in(file.parent / "masks", fields["mask"]) if fields.get("mask") else None
            if "scan" in fields:
                from extras.scans import png_bytes

                image = partial(png_bytes, image, fields["scan"])
                mask = mask and partial(png_bytes, mask, fields["scan"], mask=True)
        except (ValueError, OSError) as error:
            problem = problem or f"{'mask' if image else 'image'}: {error}"
        rows.append(
            {
                "where": f"{file}, line {number}",
                "problem": problem,
                "image": image,
                "mask": mask,
                "id": str(fields.get("id", f"{file.parent.name}-{number}")),
                "extra": fields,
                **{key: fields.get(key) for key in ("query", "bbox", "points")},
                **names_in(fields),
            }
        )
    return rows, sorted(splits)


def names_in(fields: dict) -> dict[str, str]:
    return {key: str(fields.get(key) or "") for key in ("supercategory", "category", "think")}


def file_in(folder: Path, name) -> Path:
    """The file of that name in the folder; ValueError if there is none or the name leads out of it."""
    if not isinstance(name, str):
        raise ValueError("is missing" if name is None else f"{name!r} is not a file name")
    file = folder / name
    if not file.resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"{name} is outside {folder}; put the file there")
    if not file.exists():
        doubled = name.startswith(f"{folder.name}/")
        raise ValueError(
            f"no such file: {file}" + (f'; leave out "{folder.name}/"' if doubled else "")
        )
    return file


def in_tools(module: str):
    """The reader `read` of a module in extras/, which is imported once a path needs it."""
    return lambda path, split: import_module(f"extras.{module}").read(path, split)


READERS = {
    "samples.jsonl": read_folder,
    "**/*.parquet": in_tools("umrg"),  # pattern of a file: its reader
    "**/*.json": in_tools("coco"),
}


def read_rows(path: Path, split: str | None) -> tuple[list[dict], list[str]]:
    """What the first reader that fits the path returns; split None: no rows, only the names of the splits.
    ValueError if no reader fits or the split has no row."""
    if not path.exists():
        raise ValueError(f"{path}: no such file or folder")
    for pattern, reader in READERS.items():
        if path.resolve().match(pattern) if path.is_file() else any(path.glob(pattern)):
            rows, splits = reader(path, split or "")
            if split is not None and not rows:
                raise ValueError(
                    f"{path}: no sample in split {split!r}; the splits there: "
                    f"{', '.join(splits) or 'none'} (training wants train and test; evaluate.py has --split)"
                )
            return [
                DEFAULTS | {"where": f"{path}, row {number}", "id": f"{path.stem}-{number}"} | row
                for number, row in enumerate(rows, 1)
            ], splits
    names = " nor ".join(pattern.removeprefix("**/") for pattern in READERS)
    raise ValueError(
        f"{path}: neither {names}{' in it' if path.is_dir() else ''}; see runtime/readers.py"
    )
