"""Read U-MRG-14K, the paper's data set: the rows of its parquet files, see runtime/readers.py."""

import re
from functools import lru_cache, partial
from pathlib import Path

import pyarrow
from pyarrow.parquet import ParquetFile

from runtime.files import parse_object
from runtime.readers import names_in


def read(path: Path, split: str) -> tuple[list[dict], list[str]]:
    """The U-MRG schema in {split}*.parquet, or in one file of any name: prompt [{role, content: question}], images
    and masks [{bytes, path}] (one 0/255 image, may be missing), extra_info {id, supercategory, category},
    reward_model {ground_truth: JSON {"bbox_2d": [4], "point_2d": [[2], [2]]}}."""

    @lru_cache(maxsize=2)  # so many row groups are in memory with their images
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
                raise ValueError(
                    f"{file}: column {', '.join(sorted(missing))} is missing (U-MRG schema)"
                )
            records = opened.read(
                columns=sorted(columns & {"prompt", "reward_model", "extra_info"})
            ).to_pylist()
            places = [
                (group, offset)
                for group in range(opened.num_row_groups)
                for offset in range(opened.metadata.row_group(group).num_rows)
            ]
        except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
            raise ValueError(
                f"{file}: not a readable parquet file ({str(error).splitlines()[0]})"
            ) from None
        for number, (record, place) in enumerate(zip(records, places)):
            rows.append(
                umrg_row(record, f"{file}, row {number}", len(rows))
                | {
                    "image": partial(read_bytes, "images", file, *place),
                    "mask": partial(read_bytes, "masks", file, *place)
                    if "masks" in columns
                    else None,
                }
            )
    return rows, sorted({re.match("[A-Za-z0-9]*", file.name)[0] for file in files})


def umrg_row(record: dict, where: str, index: int) -> dict:
    truth, problem, extra = {}, "", record.get("extra_info")
    extra = extra if isinstance(extra, dict) else {}
    try:
        truth = parse_object(record["reward_model"]["ground_truth"], "reward_model.ground_truth")
    except (ValueError, TypeError, KeyError) as error:
        problem = (
            str(error)
            if isinstance(error, ValueError)
            else "reward_model: has no ground_truth string"
        )
    return {
        "where": where,
        "id": str(extra.get("id") or extra.get("index") or index),
        "problem": problem,
        "query": first(record["prompt"]).get("content"),
        "extra": extra,
        "bbox": truth.get("bbox_2d"),
        "points": truth.get("point_2d"),
        **names_in(extra),
    }


def first(values) -> dict:
    """The struct in a list of one, else {}."""
    return (
        values[0]
        if isinstance(values, list) and len(values) == 1 and isinstance(values[0], dict)
        else {}
    )
