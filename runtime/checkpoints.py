"""Checkpoint folders, step_000100 and so on: a folder of that name is complete, whatever was killed when."""
import shutil
from pathlib import Path

from runtime.cli import print0
from runtime.files import read_torch, to_disk


def checkpoints(run: Path) -> dict[int, Path]:
    """{step: folder} of a run, oldest first."""
    return {step: folder for step, folder in sorted((int(folder.name[5:]), folder)
                                                    for folder in run.glob("step_*[0-9]"))}


def newest_checkpoint(run: Path) -> tuple[Path | None, dict | None]:
    """(folder, its trainer.pt) of the newest checkpoint that can be read; broken ones are printed."""
    for folder in reversed(checkpoints(run).values()):
        try:
            return folder, read_torch(folder / "trainer.pt", mmap=True)
        except (OSError, ValueError) as error:
            print0(f"{folder}: cannot be read ({error}); the one before it is used")
    return None, None


def temporary_name(folder: Path) -> Path:
    """Where a checkpoint is written before `put_in_place` gives it its name."""
    return folder.with_suffix(".tmp")


def put_in_place(folder: Path) -> None:
    temporary = temporary_name(folder)
    for path in [*temporary.rglob("*"), temporary]:
        to_disk(path)
    remove(folder)
    temporary.rename(folder)
    to_disk(folder.parent)


def remove(folder: Path) -> None:
    """Renamed first: half of a checkpoint never has a checkpoint's name."""
    if folder.exists():
        shutil.rmtree(folder.rename(folder.with_suffix(".old")))


def remove_leftovers(run: Path) -> None:
    """What a kill while saving or removing left."""
    for folder in [*run.glob("step_*.tmp"), *run.glob("step_*.old")]:
        shutil.rmtree(folder)


def remove_all_but(run: Path, newest: int, scores: dict[int, float]) -> None:
    """Keep the newest ones and, of those that have a score ({step: score}), the best."""
    saved = checkpoints(run)
    best = max((step for step in saved if step in scores), key=scores.get, default=None)
    for step in list(saved)[:-newest]:
        if step != best:
            remove(saved[step])
