"""learn/README.md and learn/FAILURES.md: what they quote, link and tell to run is there."""

import re
import shlex

import pytest

import train_grpo
from learn import changes
from runtime.cli import ROOT, dashed, parse_args
from runtime.stats import WARNINGS

LEARN = ROOT / "learn"
FAILURES = (LEARN / "FAILURES.md").read_text(encoding="utf-8")
README = (LEARN / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```sh\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
COMMANDS = [line for block in BLOCKS for line in block.splitlines()]


@pytest.mark.parametrize("page", [FAILURES, README], ids=["FAILURES", "README"])
def test_every_link_and_module_of_a_page_is_there(page):
    for target in re.findall(r"\]\(([^)#]+)\)", page):
        assert (LEARN / target).resolve().exists(), target
    for module in re.findall(r"python -m ([\w.]+)", page):
        file = ROOT / module.replace(".", "/")
        assert file.with_suffix(".py").is_file() or (file / "__main__.py").is_file(), module


def test_quoted_warnings_are_those_of_the_code():
    page = " ".join(FAILURES.split())
    quoted = set(page.split('"')[1::2])
    sentences = quoted & {sentence for sentence, _ in WARNINGS}
    assert len(sentences) == 4
    assert quoted - sentences == {"sampled/named"}  # of metrics.jsonl


def test_each_failure_has_its_cause_its_warning_and_a_date():
    sections = re.split(r"^## ", FAILURES, flags=re.MULTILINE)[1:]
    assert len(sections) == 5
    for section in sections:
        for part in ("What was done", "What happened", "Why", "Warning"):
            assert f"**{part}.**" in section
        assert re.search(r"\(2026-\d\d-\d\d", section)


def test_flags_on_the_pages_exist():
    known = {dashed(name) for name in train_grpo.Config.__dataclass_fields__}
    known |= {"--hint", "--write", "--help"}
    for page in (FAILURES, README):
        assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", page)) <= known


def test_the_afternoons_runs_parse_and_its_patch_is_there(tmp_path):
    patched = set()
    for command in COMMANDS:
        words = shlex.split(command)
        if words[:3] == ["python", "-m", "learn.changes"] and "--write" not in words:
            assert words[3] in changes.PATCHES
            patched.add(changes.PATCHES[words[3]].use)
        if words[:2] == ["python", "train_grpo.py"]:
            flags = " ".join(words[2:])
            if any(use in flags for use in patched):
                continue  # tests/test_changes.py runs the patch with its flags
            parse_args(train_grpo.Config, "", words[2:], recipe=train_grpo.RECIPE)
    assert patched


# ---------------------------------------------------------------- the picture
