"""The usual changes to this project, each a flag or a patch of at most ten lines.

    python -m learn.changes               # their names
    python -m learn.changes rloo cispo    # makes changes in the files of this checkout
    python -m learn.changes --write       # writes learn/CHANGES.md, where they can be read

A patch adds an option and leaves everything else as it is, so several may be combined. It names a
piece of text that stands in its file exactly once, and what to write there instead.
tests/test_changes.py makes each of them in a copy, checks its numbers by hand, and runs the tests
of the changed files with all of them at once. CHANGES.md is made of what is written here.
"""

import argparse
import difflib
from dataclasses import dataclass
from pathlib import Path

from runtime.cli import ROOT, exit_on
from runtime.files import write_whole

PAGE = ROOT / "learn/CHANGES.md"


@dataclass(frozen=True)
class Flags:
    """A change that needs flags only."""

    title: str
    flags: str
    why: str
    paper: str = ""


@dataclass(frozen=True)
class Edit:
    """A replacement of a text that stands in its file once."""

    before: str
    after: str
    new: str  # what stands in the file afterwards, and not before


@dataclass(frozen=True)
class Patch:
    """A change to one file."""

    name: str
    title: str
    file: str
    edits: tuple[Edit, ...]
    why: str
    equation: str
    use: str  # how the change is switched on
    paper: str = ""


def instead(before: str, after: str) -> Edit:
    return Edit(before, after, after)


def above(line: str, new: str) -> Edit:
    return Edit(f"{line}\n", f"{new}{line}\n", new)


def below(line: str, new: str) -> Edit:
    return Edit(f"{line}\n", f"{line}\n{new}", new)


FLAGS = [
    Flags(
        "Dr. GRPO",
        "--norm none --agg constant --kl-coef 0",
        "Neither long completions nor groups of nearly equal rewards count more than others.",
        "arXiv 2503.20783",
    ),
    Flags(
        "DAPO",
        "--agg token --clip-high 0.28 --resample 3 --kl-coef 0",
        "Rare tokens may rise further, and groups of equal rewards do not waste a step.",
        "arXiv 2503.14476",
    ),
    Flags(
        "GSPO",
        "--ratio sequence --clip-low 3e-4 --clip-high 4e-4 --kl-coef 0",
        "A reward is for a whole completion, so the trust region is for whole completions as well.",
        "arXiv 2507.18071",
    ),
    Flags(
        "An entropy bonus",
        "--entropy-coef 0.01",
        "Completions of one question stay different from each other for longer.",
    ),
    Flags(
        "A reward that looks at the mask",
        "--coefficients mask_dice=1",
        "The segmenter is asked during training, so boxes that it likes are rewarded.",
    ),
    Flags(
        "Coefficients of reward terms",
        "--coefficients box_iou=2,point_align=0.5",
        "A term counts more or less, and a term that the mode lacks is added.",
    ),
    Flags(
        "Your own prompt",
        "--prompt my.txt",
        "A text file with {query} in it; a checkpoint remembers the prompt.",
    ),
    Flags(
        "A frozen vision tower",
        '--trainable "language_model|lm_head"',
        "An image is encoded once per step for sampling and for every update.",
    ),
    Flags(
        "LoRA",
        "--lora-rank 64",
        "The optimizer's state is small, and the reference model needs no memory of its own.",
        "arXiv 2106.09685",
    ),
]


# ---------------------------------------------------------------- advantages

RLOO = Patch(
    name="rloo",
    title="RLOO: the baseline is the mean of the other completions",
    file="train_grpo.py",
    edits=(
        instead('"group", "none"', '"group", "loo", "none"'),
        above(
            '    std = rewards.std() if norm == "batch" else rewards.std(1, keepdim=True)',
            """\
    if norm == "loo":  # r - mean of the others = (r - mean of all) G / (G - 1)
        G = rewards.shape[1]
        return centred * G / (G - 1)
""",
        ),
    ),
    why="A baseline that does not contain the completion itself leaves the gradient unbiased.",
    equation="A_i = r_i - 1 / (G - 1) sum_{j != i} r_j",
    use="--norm loo --minibatches 1 --dual-clip 0",
    paper="arXiv 2402.14740",
)

MAXRL = Patch(
    name="maxrl",
    title="MaxRL: divide by the mean reward",
    file="train_grpo.py",
    edits=(
        instead('"batch"))', '"batch", "mean"))'),
        below(
            "    centred = torch.where(all_equal, 0.0, centred)",
            """\
    if norm == "mean":
        return centred / (rewards.mean(1, keepdim=True) + eps)
""",
        ),
    ),
    why=(
        "It follows the gradient of log p(success) instead of p(success), so hard questions count "
        "more. The paper's rewards are 0 or 1; here they only have to be 0 or more."
    ),
    equation="A_i = (r_i - mean(r)) / (mean(r) + eps)",
    use="--norm mean",
    paper="arXiv 2602.02710",
)

GDPO = Patch(
    name="gdpo",
    title="GDPO: an advantage of each reward term",
    file="train_grpo.py",
    edits=(
        instead(
            '"std of which rewards divides", (',
            '"std of which rewards divides", ("terms", ',
        ),
        above(
            "def token_weights(",
            '''\
def gdpo_advantages(terms: torch.Tensor, coefficients: Sequence[float]) -> torch.Tensor:
    """Reward terms (K, P, G) -> advantages (P, G): a term by its group, their sum by the step."""
    total = sum(c * group_advantages(of_term) for c, of_term in zip(coefficients, terms))
    return (total - total.mean()) / (total.std() + 1e-6)


''',
        ),
        below(
            "        advantages = group_advantages(rewards, cfg.norm).to(ranks.device)  # (P, G)",
            """\
        if cfg.norm == "terms":
            factors = dict.fromkeys(MODES[cfg.mode], 1.0) | coefficients
            own_terms = [[[t[name] for t in group.terms] for name in factors] for group in batch]
            terms = torch.tensor(ranks.gather(own_terms)).transpose(0, 1)  # (K, P, G)
            advantages = gdpo_advantages(terms, list(factors.values())).to(ranks.device)
""",
        ),
    ),
    why="Every term moves the policy, also one that varies little beside the others.",
    equation=(
        "S_i = sum_k c_k (r_ki - mean(r_k)) / std(r_k)          over the group\n"
        "A_i = (S_i - mean(S)) / (std(S) + eps)                 over the step"
    ),
    use="--norm terms",
    paper="arXiv 2601.05242",
)


# ---------------------------------------------------------------- rewards and tokens that count

MASK_TRUNCATED = Patch(
    name="mask-truncated",
    title="Completions that were cut at the limit do not train",
    file="train_grpo.py",
    edits=(
        below(
            "    # advantages and loss",
            """\
    mask_truncated: bool = flag(False, "completions that --max-new-tokens cut do not train")
""",
        ),
        above(
            "    lengths = torch.tensor(ranks.gather(own_lengths))  # (N,) of all ranks",
            """\
    if cfg.mask_truncated:
        finished = [ended for group in minibatch for ended in group.finished.tolist()]
        own_lengths = [length * ended for length, ended in zip(own_lengths, finished)]
""",
        ),
    ),
    why="A completion that was cut earns little for its length, however good its reasoning was.",
    equation="w_t = 0 for every token of a completion without an end",
    use="--mask-truncated",
    paper="arXiv 2503.14476, section 3.4, overlong filtering",
)

OVERLONG = Patch(
    name="overlong",
    title="A soft penalty for long completions",
    file="train_grpo.py",
    edits=(
        below(
            "    # reward",
            """\
    overlong: int = flag(0, "last tokens of the limit in which a reward falls by up to 1", low=0)
""",
        ),
        above(
            "def roll_out(",
            '''\
def overlong_penalty(length: int, limit: int, buffer: int) -> float:
    """0 up to limit - buffer tokens, from there falling linearly to -1 at the limit."""
    return min(0.0, (limit - buffer - length) / buffer)


''',
        ),
        above(
            "        if not all(map(math.isfinite, totals)):",
            """\
        if cfg.overlong > 0:
            for g, length in enumerate(group.lengths.tolist()):
                terms[g]["overlong"] = overlong_penalty(length, cfg.max_new_tokens, cfg.overlong)
                totals[g] += terms[g]["overlong"]
""",
        ),
    ),
    why="The model hears that it gets too long before it is cut. The penalty is logged as a term.",
    equation="R(n) = min(0, (L_max - L_cache - n) / L_cache)         n tokens, L_max the limit",
    use="--overlong 32",
    paper="arXiv 2503.14476, section 3.4, equation 13",
)

TOP_ENTROPY = Patch(
    name="top-entropy",
    title="Only tokens of high entropy train",
    file="train_grpo.py",
    edits=(
        below(
            "    # advantages and loss",
            """\
    top_entropy: float = flag(1.0, "share of tokens that train: the least certain", above=0, high=1)
""",
        ),
        above(
            "        losses = []",
            """\
        bound = -math.inf
        if cfg.top_entropy < 1:
            written = []
            for group, rows, (_, h) in zip(pack.groups, pack.rows, scored):
                written += [h[i, :n] for i, n in enumerate(group.lengths[rows].tolist())]
            bound = torch.cat(written).quantile(1 - cfg.top_entropy)
""",
        ),
        instead(
            """\
                weights,
                clip_low=cfg.clip_low,
""",
            """\
                weights * (entropy >= bound),
                clip_low=cfg.clip_low,
""",
        ),
    ),
    why=(
        "Most tokens are certain; the few where the model decides carry the gradient that matters. "
        "The quantile is that of the tokens scored at once (--pack-tokens)."
    ),
    equation="L = - sum_t w_t [H_t >= quantile_{1 - share}(H)] min(rho A, clip(rho) A)",
    use="--top-entropy 0.2 --kl-coef 0",
    paper="arXiv 2506.01939",
)


# ---------------------------------------------------------------- the loss

CISPO = Patch(
    name="cispo",
    title="CISPO: the ratio is a clipped constant weight",
    file="train_grpo.py",
    edits=(
        above(
            "    # updates",
            """\
    cispo: bool = flag(False, "the clipped ratio weighs log pi, without a gradient of its own")
""",
        ),
        below(
            "    sampler_is: float = 0.0,",
            """\
    cispo: bool = False,
""",
        ),
        above(
            "    is_clipped = clipped * A < rho * A",
            """\
    if cispo:
        gain = clipped.detach() * A * torch.where(mask, logp, zero)
""",
        ),
        below(
            "                ratio=cfg.ratio,",
            """\
                cispo=cfg.cispo,
""",
        ),
    ),
    why="A rare token that has risen beyond the bound keeps its gradient instead of losing it.",
    equation="L = - sum_t w_t sg(clip(rho, 1 - c, 1 + c')) A log pi(t)       sg: no gradient",
    use="--cispo --agg token --clip-low 1 --clip-high 4 --kl-coef 0",
    paper="arXiv 2506.13585",
)

SAPO = Patch(
    name="sapo",
    title="SAPO: a soft gate in place of the clip",
    file="train_grpo.py",
    edits=(
        above(
            "    # updates",
            """\
    sapo: bool = flag(False, "a sigmoid of the ratio in place of the clip")
""",
        ),
        below(
            "    sampler_is: float = 0.0,",
            """\
    sapo: bool = False,
""",
        ),
        above(
            "    is_clipped = clipped * A < rho * A",
            """\
    if sapo:
        tau = torch.where(A > 0, 1.0, 1.05)
        gain = 4 / tau * torch.sigmoid(tau * (rho - 1)) * A
""",
        ),
        below(
            "                ratio=cfg.ratio,",
            """\
                sapo=cfg.sapo,
""",
        ),
    ),
    why="The gradient fades as the ratio leaves 1 instead of stopping, and sooner where A < 0.",
    equation=(
        "L = - sum_t w_t (4 / tau) sigmoid(tau (rho - 1)) A\n"
        "tau = 1 where A > 0, otherwise 1.05; at rho = 1 the gradient is that of rho A"
    ),
    use="--sapo --kl-coef 0",
    paper="arXiv 2511.20347",
)

KL_TIMES_RATIO = Patch(
    name="kl-times-ratio",
    title="An unbiased gradient of the KL: k3 times the ratio",
    file="train_grpo.py",
    edits=(
        above(
            "    # updates",
            """\
    kl_times_ratio: bool = flag(False, "multiply the KL's estimate by pi/pi_old")
""",
        ),
        below(
            "    sampler_is: float = 0.0,",
            """\
    kl_times_ratio: bool = False,
""",
        ),
        above(
            '        stats["kl"] = (weights * estimate).sum()',
            """\
        if kl_times_ratio:
            estimate = rho * estimate
""",
        ),
        below(
            "                kl=cfg.kl,",
            """\
                kl_times_ratio=cfg.kl_times_ratio,
""",
        ),
    ),
    why="Tokens come from pi_old, and k3 alone has another gradient than the KL that it estimates.",
    equation="K = pi/pi_old (pi_ref/pi - log(pi_ref/pi) - 1)",
    use="--kl-times-ratio",
    paper="arXiv 2512.02556 (DeepSeek-V3.2), section 3.1",
)

KL_ABS = Patch(
    name="kl-abs",
    title="Another estimator of the KL",
    file="train_grpo.py",
    edits=(
        instead('("k1", "k2", "k3"))', '("k1", "k2", "k3", "abs"))'),
        above(
            '        elif kl == "k2":',
            """\
        elif kl == "abs":
            estimate = x.abs()
""",
        ),
    ),
    why="It shows where the estimators are. This one pulls equally hard at any distance.",
    equation="K = |log(pi_ref/pi)|",
    use="--kl abs",
)


# ---------------------------------------------------------------- reward terms and modes

REWARD_TERM = Patch(
    name="reward-term",
    title="A reward term",
    file="rewards.py",
    edits=(
        below(
            '        "answer_format": ANSWER_FORMAT_SCORES[answer.problem],',
            """\
        "centre_distance": centre_distance(answer.bbox, gt_box),
""",
        ),
        above(
            "def box_gates(box: Box, gt_box: Box, gt_points: Points) -> tuple[float, float]:",
            '''\
def centre_distance(box: Box | None, gt_box: Box) -> float:
    """1 where the centres agree, falling to 0 at a distance of the true diagonal."""
    if box is None:
        return 0.0
    dx = (box[0] + box[2] - gt_box[0] - gt_box[2]) / 2
    dy = (box[1] + box[3] - gt_box[1] - gt_box[3]) / 2
    return max(0.0, 1 - math.hypot(dx, dy) / box_diagonal(gt_box))


''',
        ),
    ),
    why="A term with another shape: far from the target IoU is 0, and this one still has a slope.",
    equation="max(0, 1 - |centre - centre*| / diagonal*)",
    use="--coefficients centre_distance=0.5",
)

REWARD_MODE = Patch(
    name="reward-mode",
    title="A reward mode",
    file="rewards.py",
    edits=(
        above(
            '    "iou": ("think_format", "answer_format", "box_iou"),',
            """\
    "fast": ("answer_format", "box_iou"),
""",
        ),
    ),
    why="A set of terms under a name of its own.",
    equation="r = answer_format + box_iou",
    use="--mode fast",
)


# ---------------------------------------------------------------- data, answers, masks, metrics

ANSWER_KEY = Patch(
    name="answer-format",
    title="Another format of the answer",
    file="data.py",
    edits=(
        above(
            "ONE_BOX = AnswerFormat(",
            """\
def our_key(text: str) -> str:
    return text.replace('"bbox_2d"', '"bbox"')


QWENS_KEY = AnswerFormat(
    prompt=PROMPTS["reasoning"].replace('"bbox"', '"bbox_2d"'),
    parse=lambda text: parse_answer(our_key(text)),
    reward_terms=lambda text, *truth: box_and_points_terms(our_key(text), *truth),
    target_text=lambda *truth: target_text(*truth).replace('"bbox"', '"bbox_2d"'),
    truth=box_and_points,
)
""",
        ),
        below(
            '    "bbox": "data.ONE_BOX",',
            """\
    "bbox_2d": "data.QWENS_KEY",
""",
        ),
    ),
    why="Qwen2.5-VL writes boxes under this key by itself, so GRPO finds rewards sooner.",
    equation='{"bbox_2d": [x1, y1, x2, y2], "points_1": [x, y], "points_2": [x, y]}',
    use="--prompt bbox_2d",
)

READER = Patch(
    name="data-format",
    title="A format of data",
    file="runtime/readers.py",
    edits=(
        above(
            '    "samples.jsonl": "runtime.readers.read_folder",',
            """\
    "*_mask.png": "runtime.readers.read_names",
""",
        ),
        above(
            "def read_folder(path: Path, split: str) -> tuple[list[Row], list[str]]:",
            '''\
def read_names(path: Path, split: str) -> tuple[list[Row], list[str]]:
    """liver.png and liver_mask.png: the file's name is what the question asks for."""
    rows = []
    for mask in files_in(path, "*_mask.png"):
        name = mask.stem.removesuffix("_mask")
        image = mask.with_name(f"{name}.png")
        rows.append({"query": f"Where is the {name}?", "image": image, "mask": mask})
    return (rows if split == "train" else []), ["train"]


''',
        ),
    ),
    why="A reader says where image, mask and question are; everything after that is shared.",
    equation="",
    use="--data FOLDER",
)

SEGMENTER = Patch(
    name="segmenter",
    title="A segmenter",
    file="asm.py",
    edits=(
        below(
            "SEGMENTERS = {",
            """\
    "brighter": "asm.Brighter",
""",
        ),
        above(
            "def load_asm(",
            '''\
class Brighter:
    """Every pixel that is brighter than the mean of its image, whatever box and points say."""

    def __init__(self, path: str, device: str, multimask: bool, image_size: int | None) -> None:
        pass

    def segment(self, image, boxes=None, points=None, labels=None):
        count = len(points if boxes is None else boxes)
        grey = image.mean(2)
        return np.stack([grey > grey.mean()] * count), np.ones(count)


''',
        ),
    ),
    why="A baseline that a learned segmenter has to beat; your own model goes in the same place.",
    equation="",
    use="--asm brighter",
)

METRIC = Patch(
    name="metric",
    title="A metric of masks",
    file="metrics.py",
    edits=(
        above(
            "HELD_OUT: dict[str, Metric] = {  # what training logs of held-out questions",
            '''\
def mask_iou(p: dict) -> float | None:
    """IoU of the mask from box and points; 0 where there is none, None without a true one."""
    if not p["truth"].get("mask"):
        return None
    if not p["mask"]:
        return 0.0
    mask = decode_mask(p["mask"])
    truth = decode_mask(p["truth"]["mask"])
    return float((mask & truth).sum() / (mask | truth).sum())


''',
        ),
        above(
            '    "dice_points": ("Dice, points", lambda p: mask_score(p, "points")),',
            """\
    "mask_iou": ("IoU, mask", mask_iou),
""",
        ),
    ),
    why="Old evaluations get it as well, as their masks are in predictions.jsonl.",
    equation="|M and T| / |M or T|",
    use="python evaluate.py --rescore eval/demo",
)

PATCHES = {
    patch.name: patch
    for patch in (
        RLOO,
        MAXRL,
        GDPO,
        CISPO,
        SAPO,
        KL_TIMES_RATIO,
        KL_ABS,
        TOP_ENTROPY,
        MASK_TRUNCATED,
        OVERLONG,
        REWARD_TERM,
        REWARD_MODE,
        ANSWER_KEY,
        READER,
        SEGMENTER,
        METRIC,
    )
}


# ---------------------------------------------------------------- making a change


def patched(text: str, patch: Patch) -> str:
    """Returns a file's text with a patch. ValueError where it does not fit."""
    for edit in patch.edits:
        if edit.new in text:
            raise ValueError(f"{patch.file}: {patch.name} has been made in it already")
        if text.count(edit.before) != 1:
            place = edit.before.strip()
            raise ValueError(f"{patch.file}: has changed where {patch.name} belongs, at {place!r}")
        text = text.replace(edit.before, edit.after)
    return text


def apply(patch: Patch, root: Path = ROOT) -> None:
    """Makes a change in a checkout of this project."""
    path = root / patch.file
    write_whole(path, patched(path.read_text(encoding="utf-8"), patch))


def inserted_lines(patch: Patch) -> list[str]:
    """Returns the lines of a patch that are new, without blank ones."""
    text = (ROOT / patch.file).read_text(encoding="utf-8")
    new = patched(text, patch).splitlines()
    added = [line[2:] for line in difflib.ndiff(text.splitlines(), new) if line.startswith("+ ")]
    return [line for line in added if line.strip()]


# ---------------------------------------------------------------- CHANGES.md

HEAD = """\
# The usual changes

Made by `python -m learn.changes --write` from `learn/changes.py`. `tests/test_changes.py` makes
each patch in a copy and checks its numbers.

`python -m learn.changes NAME` makes a change in this checkout. `git diff` shows it, and
`git checkout FILE` takes it back. Each patch adds an option and leaves the rest as it is, so
several can be made one after the other.

## Flags

| change | flags | why | paper |
|---|---|---|---|
"""


def page() -> str:
    """Returns the text of CHANGES.md."""
    text = HEAD
    for change in FLAGS:
        flags = change.flags.replace("|", "\\|")
        text += f"| {change.title} | `{flags}` | {change.why} | {change.paper} |\n"
    text += "\n## Patches\n"
    for patch in PATCHES.values():
        text += section(patch)
    return text


def section(patch: Patch) -> str:
    """Returns the part of CHANGES.md that shows a patch."""
    parts = [f"\n### {patch.title}", patch.why]
    if patch.paper:
        parts.append(f"Source: {patch.paper}.")
    if patch.equation:
        parts.append(f"```text\n{patch.equation}\n```")
    parts.append(f"`python -m learn.changes {patch.name}`, then `{patch.use}`")
    parts.append(f"```diff\n{difference(patch)}```")
    return "\n\n".join(parts) + "\n"


def difference(patch: Patch) -> str:
    """Returns the lines of a file before and after a patch, as `diff -u` does, without their
    numbers, which change with every other line of the file."""
    before = (ROOT / patch.file).read_text(encoding="utf-8")
    after = patched(before, patch)
    lines = difflib.unified_diff(
        before.splitlines(keepends=True),
        after.splitlines(keepends=True),
        fromfile=patch.file,
        tofile=patch.file,
        n=1,
    )
    shown = ["@@\n" if line.startswith("@@") else line for line in lines]
    return "".join(shown)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Make usual changes in this checkout.")
    parser.add_argument("names", nargs="*", help="which changes; none: list them")
    parser.add_argument("--write", action="store_true", help="write learn/CHANGES.md")
    args = parser.parse_args(argv)
    for name in args.names:
        if name not in PATCHES:
            raise ValueError(f"{name}: no such change; known: {', '.join(PATCHES)}")
    if args.write:
        write_whole(PAGE, page())
        print(f"{PAGE.relative_to(ROOT)} is written")
    elif not args.names:
        for patch in PATCHES.values():
            print(f"{patch.name:16} {patch.file:20} {patch.title}")
        print("python -m learn.changes NAME makes a change; learn/CHANGES.md shows them all")
    for name in args.names:
        patch = PATCHES[name]
        apply(patch)
        print(f"{patch.file} is changed: {patch.use}")


if __name__ == "__main__":
    with exit_on(ValueError, OSError):
        main()
