"""What a checkpoint is: a folder step_000100 of a run. One with that name is always complete.

    step_000100/
        config.json, model.safetensors, ...     the model, as from_pretrained loads it
        optimizer/*.safetensors                 AdamW's weights and moments, see runtime/optim.py
        trainer.json                            {"step": 100, "parts": 4}, files per quantity there

A checkpoint is written as step_000100.tmp and then renamed. It is renamed to step_000100.old before
it is deleted. So a kill at any moment leaves no half of one under a checkpoint's name.
Weights are safetensors and the rest is JSON. Nothing is unpickled, so that a folder from elsewhere
is only data.
"""

import errno
import json
import re
import shutil
from pathlib import Path

from safetensors import SafetensorError, safe_open

from runtime.cli import print0
from runtime.files import parse_object, read_text, to_disk

RECORD = "trainer.json"
# The disk is full or broken. Any other error of fsync means that the file system has no fsync.
LOST_WRITE = (errno.EIO, errno.ENOSPC, errno.EDQUOT)


def path_of(run_folder: Path, step: int) -> Path:
    """Where the checkpoint after `step` steps is."""
    return run_folder / f"step_{step:06d}"


def temporary_of(checkpoint: Path) -> Path:
    """Where a checkpoint is written before it has its name."""
    return checkpoint.with_suffix(".tmp")


def checkpoints(run_folder: Path) -> dict[int, Path]:
    """{step: folder} of all checkpoints, oldest first, intact or not. Other names, such as
    step_best1, are left alone."""
    found = {}
    for folder in run_folder.glob("step_*"):
        match = re.fullmatch(r"step_(\d+)", folder.name)
        if match and folder.is_dir():
            found[int(match[1])] = folder
    return dict(sorted(found.items()))


def read_record(checkpoint: Path) -> dict:
    """Returns trainer.json of an intact checkpoint: {"step", "parts"}. OSError or ValueError, which
    name the file, where one is missing or torn."""
    file = checkpoint / RECORD
    record = parse_object(read_text(file), file)
    for key in ("step", "parts"):
        if type(record.get(key)) is not int:
            raise ValueError(f"{file}: {key} is not a whole number there")
    weights = sorted(checkpoint.rglob("*.safetensors"))
    for path in weights:
        try:
            # opening one reads its header and compares it with the size of the file
            with safe_open(path, framework="pt"):
                pass
        except SafetensorError as error:
            raise ValueError(f"{path}: not a complete safetensors file ({error})") from None
    parts = list((checkpoint / "optimizer").glob("masters.*.safetensors"))
    if len(parts) != record["parts"]:
        raise ValueError(f"{checkpoint / 'optimizer'}: {len(parts)} of {record['parts']} parts")
    return record


def write_record(checkpoint: Path, step: int, parts: int) -> None:
    """Writes trainer.json. parts: of how many files each quantity in optimizer/ consists."""
    (checkpoint / RECORD).write_text(json.dumps({"step": step, "parts": parts}) + "\n")


def problem_of(checkpoint: Path) -> str:
    """Why a checkpoint cannot be read, "" if it can."""
    try:
        read_record(checkpoint)
    except (OSError, ValueError) as error:
        return str(error)
    return ""


def newest(run_folder: Path) -> Path | None:
    """The newest checkpoint that can be read, None if there is none. Those that cannot be read are
    named."""
    for checkpoint in reversed(checkpoints(run_folder).values()):
        problem = problem_of(checkpoint)
        if not problem:
            return checkpoint
        print0(f"{checkpoint}: cannot be read ({problem}); the one before it is used")
    return None


def publish(checkpoint: Path) -> None:
    """Gives what was written under the temporary name its own. First everything is on the disk, so
    that also after a power cut a checkpoint's name means a complete checkpoint."""
    temporary = temporary_of(checkpoint)
    for path in [*temporary.rglob("*"), temporary]:
        flush(path)
    remove(checkpoint)
    temporary.rename(checkpoint)
    flush(checkpoint.parent)


def flush(path: Path) -> None:
    """fsync of a file or folder. Some file systems have none for folders, and then there is nothing
    to wait for."""
    try:
        to_disk(path)
    except OSError as error:
        if not path.is_dir() or error.errno in LOST_WRITE:
            raise


def remove(checkpoint: Path) -> None:
    """Deletes a checkpoint, if there is one."""
    if checkpoint.exists():
        old = checkpoint.with_suffix(".old")
        shutil.rmtree(old, ignore_errors=True)
        shutil.rmtree(checkpoint.rename(old))


def remove_leftovers(run_folder: Path) -> None:
    """Deletes what a kill left under temporary names."""
    for leftover in [*run_folder.glob("step_*.tmp"), *run_folder.glob("step_*.old")]:
        shutil.rmtree(leftover)


def keep_newest(run_folder: Path, keep: int, saved: Path, scores: dict[int, float]) -> None:
    """Deletes checkpoints until `keep` are left, besides the one with the best score.

    saved: the checkpoint that was just written, which always stays. scores: {step: score} of the
    steps that were evaluated. Only checkpoints that can be read count. A torn one is neither
    counted nor deleted."""
    intact = {}
    for step, checkpoint in checkpoints(run_folder).items():
        if checkpoint == saved or not problem_of(checkpoint):
            intact[step] = checkpoint
    scored_steps = [step for step in intact if step in scores]
    best_step = max(scored_steps, key=scores.get, default=None)
    for step in list(intact)[:-keep]:
        if step != best_step and intact[step] != saved:
            remove(intact[step])
