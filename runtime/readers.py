"""Readers: how a path becomes rows.

reader(path, split) -> (rows of that split, names of all splits), no image decoded. A row is a dict, which
data.py checks; coordinates are pixels of the upright image:
  where                                 "file, line 3": how messages call it
  id, supercategory, category, think    strings; "" where there is none, but for the id
  query                                 the question
  image, mask                           a path, bytes, or a function that returns bytes; mask may be None
  bbox, points                          [x1, y1, x2, y2] and [[x, y], …], or None: taken from the mask
  extra                                 a dict of whatever else the data has
  problem                               "" or what could not be read, as in "image: is missing"
To add a reader, write the function and name it in READERS, by the pattern of a path or of what is in a folder.
"""
import re
from functools import lru_cache, partial
from pathlib import Path

from runtime.files import parse_object, read_text


def read_folder(path: Path, split: str) -> tuple[list[dict], list[str]]:
    """samples.jsonl beside images/ and masks/, one object per line: image, query, and mask or bbox + points;
    optional id, split ("train" if missing), supercategory, category, think. Masks are 0/255 or 0/1, of their
    image's size; file names are relative to images/ and masks/. For DICOM and NIfTI, "scan": {"slice": 45} has keys of
    tools.volumes.ScanConfig, and the mask may be NIfTI on the same grid."""
    file, rows, splits = path / "samples.jsonl" if path.is_dir() else path, [], set()
    for number, line in enumerate(read_text(file).splitlines(), 1):
        if not line.strip():
            continue
        image, mask, problem = None, None, ""
        try:
            fields = parse_object(line, "text")
            splits.add(str(fields.get("split", "train")))
        except ValueError as error:                 # of no known split: a bad row of every one
            fields, problem = {"split": split}, str(error)
        if fields.get("split", "train") != split:
            continue
        if missing := [key for key in ("image", "query") if key not in fields]:
            problem = problem or f"{missing[0]}: is missing (keys here: {', '.join(fields) or 'none'})"
        try:
            image = file_in(file.parent / "images", fields.get("image"))
            mask = file_in(file.parent / "masks", fields["mask"]) if fields.get("mask") else None
            if "scan" in fields:
                from tools.volumes import png_bytes
                image = partial(png_bytes, image, fields["scan"])
                mask = mask and partial(png_bytes, mask, fields["scan"], mask=True)
        except (ValueError, OSError) as error:
            problem = problem or f"{'mask' if image else 'image'}: {error}"
        rows.append({"where": f"{file}, line {number}", "problem": problem, "image": image, "mask": mask,
                     "id": str(fields.get("id", f"{file.parent.name}-{number}")), "extra": fields,
                     **{key: fields.get(key) for key in ("query", "bbox", "points")}, **names_in(fields)})
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
        raise ValueError(f"no such file: {file}" + (f'; leave out "{folder.name}/"' if doubled else ""))
    return file


def read_parquet(path: Path, split: str) -> tuple[list[dict], list[str]]:
    """The U-MRG schema in {split}*.parquet, or in one file of any name: prompt [{role, content: question}], images
    and masks [{bytes, path}] (one 0/255 image, may be missing), extra_info {id, supercategory, category},
    reward_model {ground_truth: JSON {"bbox_2d": [4], "point_2d": [[2], [2]]}}."""
    import pyarrow
    from pyarrow.parquet import ParquetFile

    @lru_cache(maxsize=2)                       # so many row groups are in memory with their images
    def read_media(file: Path, group: int):
        return ParquetFile(file).read_row_group(group, columns=["images", "masks"])

    def read_bytes(column: str, file: Path, group: int, offset: int) -> bytes | None:
        return first(read_media(file, group)[column][offset].as_py()).get("bytes")

    files = [path] if path.is_file() else sorted(path.glob("**/*.parquet"))
    rows = []
    for file in files:
        if path.is_dir() and not file.name.startswith(split or "/"):
            continue
        try:
            opened = ParquetFile(file)
            columns = set(opened.schema_arrow.names)
            if missing := {"prompt", "images", "reward_model"} - columns:
                raise ValueError(f"{file}: column {', '.join(sorted(missing))} is missing (U-MRG schema)")
            records = opened.read(columns=sorted(columns & {"prompt", "reward_model", "extra_info"})).to_pylist()
            places = [(group, offset) for group in range(opened.num_row_groups)
                      for offset in range(opened.metadata.row_group(group).num_rows)]
        except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
            raise ValueError(f"{file}: not a readable parquet file ({str(error).splitlines()[0]})") from None
        for number, (record, place) in enumerate(zip(records, places)):
            rows.append(umrg_row(record, f"{file}, row {number}", len(rows)) |
                        {"image": partial(read_bytes, "images", file, *place),
                         "mask": partial(read_bytes, "masks", file, *place) if "masks" in columns else None})
    return rows, sorted({re.match("[A-Za-z0-9]*", file.name)[0] for file in files})


def umrg_row(record: dict, where: str, index: int) -> dict:
    truth, problem, extra = {}, "", record.get("extra_info")
    extra = extra if isinstance(extra, dict) else {}
    try:
        truth = parse_object(record["reward_model"]["ground_truth"], "reward_model.ground_truth")
    except (ValueError, TypeError, KeyError) as error:
        problem = str(error) if isinstance(error, ValueError) else "reward_model: has no ground_truth string"
    return {"where": where, "id": str(extra.get("id") or extra.get("index") or index), "problem": problem,
            "query": first(record["prompt"]).get("content"), "extra": extra,
            "bbox": truth.get("bbox_2d"), "points": truth.get("point_2d"), **names_in(extra)}


def first(values) -> dict:
    """The struct in a list of one, else {}."""
    return values[0] if isinstance(values, list) and len(values) == 1 and isinstance(values[0], dict) else {}


def read_coco(path: Path, split: str) -> tuple[list[dict], list[str]]:
    """COCO's json files, see tools/coco.py."""
    from tools.coco import read
    return read(path, split)


READERS = {"samples.jsonl": read_folder, "**/*.parquet": read_parquet,      # pattern of a file: its reader
           "**/*.json": read_coco}


def read_rows(path: Path, split: str | None) -> tuple[list[dict], list[str]]:
    """What the first reader that fits the path returns; split None: no rows, only the names of the splits.
    ValueError if no reader fits or the split has no row."""
    if not path.exists():
        raise ValueError(f"{path}: no such file or folder")
    for pattern, reader in READERS.items():
        if path.resolve().match(pattern) if path.is_file() else any(path.glob(pattern)):
            rows, splits = reader(path, split or "")
            if split is not None and not rows:
                raise ValueError(f"{path}: no sample in split {split!r}; the splits there: "
                                 f"{', '.join(splits) or 'none'} (training wants train and test; evaluate.py has --split)")
            return rows, splits
    names = " nor ".join(pattern.removeprefix("**/") for pattern in READERS)
    raise ValueError(f"{path}: neither {names}{' in it' if path.is_dir() else ''}; see runtime/readers.py")
