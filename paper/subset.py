"""Writes a data set of the training rows of some super-categories.

    python -m paper.subset --data demo/data --supercategories "Brain|Eye" --out runs/paper/seen

It is what train_grpo.py and train_sft.py are given to train on a part of a data set. The rows are
copied as they are; --data is a folder with train*.parquet in the U-MRG schema.
"""

import argparse
import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from runtime.cli import exit_on


def read_split(folder: Path, split: str) -> pa.Table:
    """Returns all rows of a split. ValueError where the folder has no such files."""
    files = sorted(folder.glob(f"{split}*.parquet"))
    if not files:
        raise ValueError(f"--data {folder}: no {split}*.parquet in there")
    return pa.concat_tables([pq.read_table(file) for file in files])


def of_supercategories(table: pa.Table, pattern: str) -> pa.Table:
    """Returns the rows whose super-category has a match of a regular expression. ValueError where
    there is none."""
    chosen = []
    for extra in table["extra_info"].to_pylist():
        chosen.append(re.search(pattern, extra["supercategory"]) is not None)
    if not any(chosen):
        raise ValueError(f"--supercategories {pattern}: no row has such a super-category")
    return table.filter(pa.array(chosen))


def write_split(table: pa.Table, folder: Path, split: str) -> None:
    """Writes a split. The file appears complete or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f"{split}.parquet.tmp"
    pq.write_table(table, temporary, compression="zstd", row_group_size=256)
    temporary.replace(folder / f"{split}.parquet")


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m paper.subset",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--data", type=Path, default=Path("demo/data"))
    parser.add_argument("--supercategories", required=True, help="a regular expression")
    parser.add_argument("--out", type=Path, required=True, help="folder for train.parquet")
    args = parser.parse_args()
    with exit_on(ValueError, OSError):
        table = read_split(args.data, "train")
        part = of_supercategories(table, args.supercategories)
        write_split(part, args.out, "train")
    print(f"{len(part)} of {len(table)} rows -> {args.out / 'train.parquet'}")


if __name__ == "__main__":
    main()
