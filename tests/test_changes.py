"""The usual changes, each a small patch to a copy of the project: one file, at most ten inserted lines, and it works.

A change is replacements of text in one file; what is checked runs in the copy, where every other file is the project's own.
"""

import os
import sys
import textwrap
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
from conftest import Script

from runtime.cli import ROOT

MOST = 10  # inserted lines; for a segmenter, a reader and a metric: beyond the algorithm, marked # algorithm


@dataclass
class Change:
    what: str
    file: str  # "" where a flag is all it takes
    edits: list[tuple[str, str]]  # text -> new text
    check: str  # Python, run in the copy
    still_green: str = (
        ""  # tests of the changed file: arguments of pytest; none that starts a script, as
    )
    # conftest.py forks these off a process that imported the unchanged files


CHANGES = [
    Change(
        "a reward term",
        "rewards.py",
        [
            (
                """        **_base_terms(text""",
                """        "center_distance": center_distance(answer.bbox, gt_box) if answer.bbox else 0.0,
        **_base_terms(text""",
            ),
            (
                """def reward_terms(""",
                '''def center_distance(box: Box, gt: Box) -> float:
    """1 where the centres agree, falling to 0 at a distance of the true diagonal."""
    (x, y), (u, v) = (((b[0] + b[2]) / 2, (b[1] + b[3]) / 2) for b in (box, gt))
    return max(0.0, 1 - math.hypot(x - u, y - v) / max(EPS, math.hypot(*_size(gt))))


def reward_terms(''',
            ),
        ],
        """
        from rewards import reward_terms, total_reward
        from runtime.cli import parse_weights
        truth = (0, 0, 30, 40), ((5, 5), (20, 20))
        text = '<think>x</think><answer>{"bbox": [30, 0, 60, 40], "points_1": [5, 5], "points_2": [20, 20]}</answer>'
        terms = reward_terms(text, *truth)
        assert abs(terms["center_distance"] - 0.4) < 1e-9 and reward_terms("", *truth)["center_distance"] == 0
        more = total_reward(terms, "soft", parse_weights("center_distance=0.5")) - total_reward(terms, "soft")
        assert abs(more - 0.2) < 1e-9
        """,
        "test_rewards.py",
    ),
    Change(
        "a reward mode",
        "rewards.py",
        [
            (
                """    "iou": (""",
                """    "fast": ("answer_format", "box_iou"),
    "iou": (""",
            )
        ],
        """
        from rewards import reward_formula
        from runtime.cli import parse_args
        from train_grpo import Config
        assert parse_args(Config, "", argv=["--mode", "fast", "--crm", "x"]).mode == "fast"
        assert reward_formula("fast") == ("answer_format + box_iou", 2.0)
        """,
        "test_rewards.py",
    ),
    Change(
        "reward weights",
        "",
        [],
        """
        from rewards import reward_formula
        from runtime.cli import parse_weights
        weights = parse_weights("box_iou=2,point_align=0.5")
        assert reward_formula("soft", weights)[0] == "think_format + answer_format + 2 box_iou + point_dice + 0.5 point_align"
        """,
    ),
    Change(
        "Dr. GRPO and GSPO",
        "",
        [],
        """
        from runtime.cli import parse_args
        from train_grpo import Config
        dr = parse_args(Config, "", argv="--norm none --agg constant --kl-coef 0 --crm x".split())
        gspo = parse_args(Config, "", argv="--ratio sequence --clip-low 3e-4 --clip-high 4e-4 --kl-coef 0 --crm x".split())
        assert (dr.norm, dr.agg, gspo.ratio, gspo.clip_high) == ("none", "constant", "sequence", 4e-4)
        """,
    ),
    Change(
        "a KL estimator",
        "train_grpo.py",
        [
            ('("k1", "k2", "k3"))', '("k1", "k2", "k3", "abs"))'),
            ('"k2": 0.5 * x ** 2, ', '"k2": 0.5 * x ** 2, "abs": x.abs(), '),
        ],
        """
        import torch
        from train_grpo import grpo_loss
        logp, ref = torch.tensor([[-1.0, -2.0]]), torch.tensor([[-1.5, -1.0]])
        _, stats = grpo_loss(logp, logp, ref, torch.zeros(1), torch.full((1, 2), 0.5), kl="abs")
        assert abs(stats["kl"] - 0.75) < 1e-6
        """,
        "tests/test_grpo.py",
    ),
    Change(
        "another format of the answer",
        "rewards.py",
        [
            (
                """    lists = [", ".join(map(str, values)) for values in (bbox, *points)]
""",
                """    if len(points) == 2:
        box, p, q = (",".join(map(str, values)) for values in (bbox, *points))
        return f"<answer><box>{box}</box><p>{p}</p><p>{q}</p></answer>"
    lists = [", ".join(map(str, values)) for values in (bbox, *points)]
""",
            ),
            (
                """    fields = _load_object(body) or""",
                """    numbers = re.findall(r"<(?:box|p)>([-0-9.,]+)</(?:box|p)>", body)
    if len(numbers) == len(KEYS):
        body = json.dumps({key: [float(v) for v in text.split(",")] for key, text in zip(KEYS, numbers)})
    fields = _load_object(body) or""",
            ),
            ("import math\n", "import math\nimport re\n"),
        ],
        """
        from crm import load_crm
        from data import load_samples, target_text
        from rewards import parse_answer
        assert "<box>x1,y1,x2,y2</box>" in load_crm("demo/crm").template
        sample = load_samples("demo/data")[0]
        frame = load_crm("demo/crm").encode(sample.image, "x").frame
        text = target_text(sample, frame)
        assert "<p>" in text and parse_answer(text).problem == "" and len(parse_answer(text).points) == 2
        """,
    ),
    Change(
        "three key points",
        "rewards.py",
        [("KEY_POINTS = 2 ", "KEY_POINTS = 3 ")],
        """
        import numpy as np
        from crm import load_crm
        from data import PROMPTS, keypoints_from_mask
        from rewards import parse_answer, reward_terms, write_answer
        points = keypoints_from_mask(np.ones((20, 30), bool))
        text = "<think>x</think>" + write_answer((0, 0, 30, 20), points)
        assert len(points) == 3 and "points_3" in text and "points_3" in PROMPTS["direct"]
        assert "points_3" in load_crm("demo/crm").template
        assert len(parse_answer(text).points) == 3
        terms = reward_terms(text, (0, 0, 30, 20), points, frame=(30, 20))
        assert terms["point_dice"] == terms["point_align"] == terms["box_iou"] == 1
        """,
    ),
    Change(
        "a segmenter",
        "asm.py",
        [
            (
                """# start of a spec -> loader""",
                """class Otsu:
    def segment(self, image, boxes=None, points=None):
        grey, levels = image.mean(2), np.arange(1, 255)                                     # algorithm
        def spread(t):                                                                      # algorithm
            low, high = grey[grey < t], grey[grey >= t]                                     # algorithm
            return len(low) * len(high) * (low.mean() - high.mean()) ** 2 if len(low) and len(high) else 0  # algorithm
        mask = grey >= max(levels, key=spread)                                              # algorithm
        return np.stack([mask] * len(points if boxes is None else boxes)), np.ones(1)


# start of a spec -> loader""",
            ),
            (
                """SEGMENTERS = {
""",
                """SEGMENTERS = {
    "otsu": lambda path, device, **options: Otsu(),
""",
            ),
        ],
        """
        import numpy as np
        from asm import load_asm
        image = np.full((40, 50, 3), 30, np.uint8)
        image[10:20, 15:35] = 200
        masks, _ = load_asm("otsu", "cpu").segment(image, points=[[[20, 15], [30, 15]]])
        assert masks.shape == (1, 40, 50) and masks.sum() == 200
        """,
    ),
    Change(
        "a data format",
        "runtime/readers.py",
        [
            (
                """READERS = {""",
                """def read_names(path: Path, split: str) -> tuple[list[dict], list[str]]:
    files = sorted(path.glob("*_mask.png")) if split == "train" else []
    return [{"where": str(file), "id": file.stem, "problem": "", "image": file.with_name(file.name.replace("_mask", "")),
             "mask": file, "query": f"Where is the {file.stem[:-5]}?", "bbox": None, "points": None, "extra": {},
             **names_in({})} for file in files], ["train"]


READERS = {"*_mask.png": read_names} | {""",
            )
        ],
        """
        import tempfile
        from pathlib import Path
        from PIL import Image
        from data import load_samples
        folder = Path(tempfile.mkdtemp())
        mask = Image.new("L", (60, 40))
        mask.paste(255, (10, 5, 30, 25))
        mask.save(folder / "liver_mask.png")
        Image.new("RGB", (60, 40), "grey").save(folder / "liver.png")
        sample, = load_samples(folder)
        assert sample.query == "Where is the liver?" and sample.bbox == (10, 5, 30, 25)
        """,
    ),
    Change(
        "a metric of masks",
        "evaluate.py",
        [
            (
                """METRICS = QUESTION_METRICS | {""",
                """def boundary_f1(p: dict) -> float | None:
    from scipy.ndimage import binary_dilation as grow, binary_erosion as shrink
    if not (p["mask"] and p["truth"].get("mask")):
        return None
    a, b = (decode_mask(mask) for mask in (p["mask"], p["truth"]["mask"]))
    edges = [mask & ~shrink(mask) for mask in (a, b)]                                       # algorithm
    hit = [(e & grow(o, iterations=2)).sum() / max(1, e.sum()) for e, o in (edges, edges[::-1])]    # algorithm
    return 2 * hit[0] * hit[1] / max(1e-9, sum(hit))                                        # algorithm


METRICS = QUESTION_METRICS | {
    "boundary": ("boundary F1", boundary_f1),""",
            ),
            ("import encode_mask, ", "import decode_mask, encode_mask, "),
        ],
        """
        import numpy as np
        from evaluate import METRICS
        from extras.predictions import encode_mask
        mask = np.zeros((40, 50), bool)
        mask[10:20, 10:30] = True
        p = {"mask": encode_mask(mask), "truth": {"mask": encode_mask(mask)}}
        assert METRICS["boundary"][1](p) == 1 and METRICS["boundary"][1](p | {"mask": None}) is None
        """,
    ),
    Change(
        "an entropy bonus",
        "",
        [],
        """
        from runtime.cli import parse_args
        from train_grpo import Config
        assert parse_args(Config, "", argv="--entropy-coef 0.01 --crm x".split()).entropy_coef == 0.01
        """,
    ),
]


def inserted(change: Change) -> int:
    """New lines of a patch, without those marked as the algorithm itself."""
    old = [line for before, _ in change.edits for line in before.splitlines()]
    new = [line for _, after in change.edits for line in after.splitlines()]
    return sum(bool(line.strip()) and line not in old and "# algorithm" not in line for line in new)


def import_from(copy: Path):
    """Forget what was imported of the project, and import it from a copy."""
    sys.path = [
        str(copy),
        *(path for path in sys.path if Path(path or ".").resolve() not in (ROOT, ROOT / "tests")),
    ]
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None)
        if file and Path(file).is_relative_to(ROOT) and "site-packages" not in file:
            del sys.modules[name]
    os.chdir(copy)
    sys.dont_write_bytecode = True


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.what)
def test_a_usual_change_is_small_and_works(tmp_path, change):
    for entry in ROOT.iterdir():
        if entry.name not in (".git", "runs", "out", "build"):
            (tmp_path / entry.name).symlink_to(entry)
    if change.file:
        folder = change.file.split("/")[0]
        if "/" in change.file:  # a real folder of links, so that the file can be replaced
            (tmp_path / folder).unlink()
            (tmp_path / folder).mkdir()
            for entry in (ROOT / folder).iterdir():
                (tmp_path / folder / entry.name).symlink_to(entry)
        text = (ROOT / change.file).read_text()
        for old, new in change.edits:
            assert text.count(old) == 1, f"{change.file} has changed: {old!r}"
            text = text.replace(old, new)
        (tmp_path / change.file).unlink()
        (tmp_path / change.file).write_text(text)
    print(f"{change.what}: {inserted(change)} lines in {change.file or 'no file'}")
    assert inserted(change) <= MOST
    (tmp_path / "check.py").write_text(textwrap.dedent(change.check))
    commands = [[tmp_path / "check.py"]]
    if change.still_green:
        commands.append(["-m pytest -q -x -p no:cacheprovider", change.still_green])
    for command in commands:
        script = Script(*command, before=partial(import_from, tmp_path))
        said = script.communicate()
        assert script.returncode == 0, said
