"""The command line: what is read, what is rejected, and in which words."""

import io
import shlex
import subprocess
import sys
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import pytest

import evaluate
import infer
import train_grpo
import train_sft
from extras import engines, serve
from runtime.cli import ROOT, dashed, exit_on, flag, matcher, parse_args, use_embedded

DOC = "100 % of it."


@dataclass
class Config:
    crm: str | None = flag(None, "Qwen2.5-VL folder or hub name")
    data: str | None = flag(None, "folder or .parquet file")
    asm: str | None = flag(None, "segmenter")
    group: int = flag(8, "completions per prompt", low=2)
    lr: float = flag(1e-6, "peak learning rate", above=0)
    clip_low: float = flag(0.2, "1 - this is the ratio's lower bound", above=0, high=1)
    dual_clip: float = flag(3.0, "bound for bad completions (0: none)", low=1, off=0)
    kl_coef: float = flag(0.01, "beta", low=0)
    mode: str = flag("soft", "reward mode", ("soft", "hard", "pdice"))
    coefficients: str = flag("", "of reward terms")
    lora_rank: int = flag(0, "of LoRA matrices", low=0)
    offload: bool = flag(False, "optimizer state lives in host memory")
    save_every: int = flag(100, "steps between checkpoints", low=-1)
    resume: str = flag("no", "go on", ("no", "yes", "auto"), bare="yes")
    pair: tuple[str, str] | None = flag(None, "two folders")


@dataclass
class WithImage:
    image: str = flag("required", "image file, of any size")
    crm: str | None = flag(None, "Qwen2.5-VL folder or hub name")


def parsed(flags: str, config_class: type = Config, **options: Any) -> Any:
    return parse_args(config_class, DOC, argv=shlex.split(flags), **options)


def rejected(
    capsys: pytest.CaptureFixture, flags: str, config_class: type = Config, **options: Any
) -> str:
    """Returns the one line on stderr with which parse_args ends the program, status 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit_info:
        parsed(flags, config_class, **options)
    lines = capsys.readouterr().err.splitlines()
    assert exit_info.value.code == 2
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: ")
    return lines[0]


# ---------------------------------------------------------------- flags


def test_every_field_is_a_flag():
    config = parsed("--crm x --lr 1e-3 --no-offload --pair a b --resume --group 4 --asm=y")
    assert config.crm == "x"
    assert config.lr == 1e-3
    assert config.offload is False
    assert config.pair == ["a", "b"]
    assert config.resume == "yes"
    assert config.group == 4
    assert config.asm == "y"


def test_what_is_not_given_has_its_default():
    assert parsed("") == Config()
    assert parsed("--resume auto").resume == "auto"
    assert parsed("--offload").offload is True


@pytest.mark.parametrize(
    "flags, says",
    [
        ("--lr 0", "--lr 0.0: must be greater than 0"),
        ("--lr=-1", "--lr -1.0: must be greater than 0"),
        ("--group 1", "--group 1: must be at least 2"),
        ("--kl-coef=-0.1", "--kl-coef -0.1: must be at least 0"),
        ("--clip-low 1.5", "--clip-low 1.5: must be at most 1"),
        ("--clip-low 0", "--clip-low 0.0: must be greater than 0"),
        ("--dual-clip 0.5", "--dual-clip 0.5: must be 0 or at least 1"),
        ("--save-every=-2", "--save-every -2: must be at least -1"),
    ],
)
def test_a_number_out_of_bounds_is_rejected_with_its_flag_and_its_bound(capsys, flags, says):
    assert says in rejected(capsys, flags)


def test_the_values_at_the_bounds_are_allowed():
    config = parsed("--dual-clip 0 --clip-low 1 --kl-coef 0 --save-every=-1 --group 2")
    assert config.dual_clip == 0
    assert config.clip_low == 1
    assert config.kl_coef == 0
    assert config.save_every == -1
    assert config.group == 2


@pytest.mark.parametrize("name", [field.name for field in fields(Config) if field.type is float])
@pytest.mark.parametrize("value", ["nan", "inf", "1e999"])
def test_no_number_may_be_nan_or_infinite(capsys, name, value):
    assert "must be a finite number" in rejected(capsys, f"{dashed(name)} {value}")


@pytest.mark.parametrize(
    "flags, says",
    [
        ("--lora-rnak 4", "unknown flag --lora-rnak: did you mean --lora-rank?"),
        ("--lora_rank 4", "unknown flag --lora_rank: did you mean --lora-rank?"),
        ("--lora-rnak=4", "unknown flag --lora-rnak: did you mean --lora-rank?"),
        ("--grou 4", "unknown flag --grou: did you mean --group?"),
        ("--xyzzy 1", "unknown flag --xyzzy: see --help"),
        ("something", "unknown flag something: see --help"),
        ("--num_generations 8", "unknown flag --num_generations: see --help"),
        ("--group x", "--group: invalid int value: 'x'"),
        ("--mode sine", "invalid choice: 'sine'"),
        ("--crm", "--crm: expected one argument"),
        ("@nowhere.args", "error: nowhere.args: No such file"),
    ],
)
def test_an_unknown_flag_is_one_line_with_the_flag_that_is_near(capsys, flags, says):
    assert says in rejected(capsys, flags)


def test_a_flag_that_has_moved_says_where_it_is(capsys):
    moved = {"frame_rate": "it is called --lr"}
    line = rejected(capsys, "--frame-rate 3", moved=moved)
    assert line == "error: --frame-rate has moved: it is called --lr"
    assert rejected(capsys, "--frame_rate=3", moved=moved).startswith("error: --frame_rate has")


@pytest.mark.parametrize("script", [train_grpo, train_sft, evaluate, infer, engines, serve])
def test_each_script_says_where_each_moved_flag_is_and_has_none_of_them(capsys, script):
    names = {field.name for field in fields(script.Config)}
    assert script.MOVED
    for name, where in script.MOVED.items():
        assert name not in names
        line = rejected(capsys, dashed(name), script.Config, moved=script.MOVED)
        assert line == f"error: {dashed(name)} has moved: {where}"


def test_a_missing_flag_is_named_after_what_is_unknown(capsys):
    assert rejected(capsys, "", WithImage) == "error: --image is required"
    assert "did you mean --image?" in rejected(capsys, "--imag x.png", WithImage)
    assert parsed("--image x.png --crm c", WithImage).image == "x.png"


def test_only_the_first_rank_says_what_is_wrong(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SystemExit, match="2"):
        parsed("--lr 0")
    assert capsys.readouterr() == ("", "")


def test_a_pattern_that_is_no_regular_expression_is_one_line():
    assert matcher("trainable", "lm_head")("model.lm_head.weight")
    assert not matcher("trainable", "visual")("model.lm_head.weight")
    with pytest.raises(ValueError, match=r"--trainable \(: not a regular expression"):
        matcher("trainable", "(")


# ---------------------------------------------------------------- --help


def test_help_shows_every_flag_with_its_default(capsys):
    with pytest.raises(SystemExit) as exit_info:
        parsed("--help")
    said = capsys.readouterr().out
    assert exit_info.value.code == 0
    assert DOC in said
    assert "completions per prompt (8)" in said
    assert "Qwen2.5-VL folder or hub name (" not in said
    for field in fields(Config):
        assert dashed(field.name) in said


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
@pytest.mark.parametrize("script", [train_grpo, infer, evaluate, serve])
def test_help_shows_a_character_that_the_terminal_lacks_as_an_escape(monkeypatch, encoding, script):
    terminal = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr(sys, "stdout", terminal)
    with pytest.raises(SystemExit) as exit_info:
        parse_args(script.Config, f"{script.__doc__} ≥ …", argv=["--help"])
    terminal.flush()
    said = terminal.buffer.getvalue().decode(encoding)
    assert exit_info.value.code == 0
    assert "--max-new-tokens" in said
    assert ("\\u2265" in said) == (encoding != "utf-8")


def test_an_error_on_an_ascii_terminal_is_one_line():
    code = "import sys; from runtime.cli import exit_on, parse_args, show_every_character\n"
    code += "show_every_character()\n"
    code += "with exit_on(ValueError): raise ValueError('≥ is not a number')"
    environment = {"PYTHONIOENCODING": "ascii"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True)
    assert done.returncode == 2
    assert done.stderr == b"error: \\u2265 is not a number\n"


# ---------------------------------------------------------------- @files and the recipe


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    lines = [
        "# the embedded recipe",
        "--lr 3e-2   # of gains",
        "--coefficients box_iou=3",
        "--group 4",
    ]
    file = tmp_path / "demo.args"
    file.write_text("\n".join(lines) + "\n")
    return file


def test_a_file_of_flags_has_comments_and_the_last_flag_wins(recipe):
    assert parsed(f"@{recipe} --crm x --group 6").group == 6
    config = parsed(f"--lr 1 @{recipe} --crm x")
    assert config.lr == 3e-2
    assert config.coefficients == "box_iou=3"


@pytest.mark.parametrize("content", [b"\xff\xfe--lr", b"--lr '1", b"@{0}"])
def test_a_broken_file_of_flags_is_one_line(capsys, tmp_path, content):
    file = tmp_path / "x.args"
    file.write_bytes(content.replace(b"{0}", str(file).encode()))
    line = rejected(capsys, f"@{file}")
    assert "@file" in line


def test_the_recipe_is_read_without_a_crm_and_flags_by_hand_win(recipe, capsys):
    config = parsed("--group 8", recipe=recipe)
    assert config.group == 8
    assert config.lr == 3e-2
    assert config.coefficients == "box_iou=3"
    assert capsys.readouterr().out == f"flags of {recipe} are used; flags given here win\n"
    assert parsed("--crm x", recipe=recipe).coefficients == ""


def test_with_a_crm_a_line_says_that_the_recipe_is_not_read(recipe, capsys):
    parsed("--crm x", recipe=recipe)
    line = f"{recipe} is not read, because --crm was given; --lr is 1e-06\n"
    assert capsys.readouterr().out == line
    parsed(f"@{recipe} --crm x", recipe=recipe)
    parsed("--crm x")
    assert capsys.readouterr().out == ""


def test_a_mode_by_hand_drops_the_coefficients_of_the_recipe_only(recipe, capsys):
    assert parsed("--mode pdice", recipe=recipe).coefficients == ""
    assert "--mode is given, so the --coefficients of" in capsys.readouterr().out
    by_hand = parsed("--mode pdice --coefficients box_iou=2", recipe=recipe)
    assert by_hand.coefficients == "box_iou=2"
    file_by_hand = parsed(f"@{recipe} --mode pdice --crm x")
    assert file_by_hand.coefficients == "box_iou=3"
    assert parsed("--mode soft", recipe=recipe).lr == 3e-2


@pytest.mark.parametrize("file", sorted((ROOT / "recipes").glob("*.args")), ids=lambda f: f.name)
def test_every_recipe_has_only_flags_that_its_script_knows(file):
    script = train_grpo
    if file.name == "sft_7b.args":
        script = train_sft
    elif "evaluate.py" in file.read_text():
        script = evaluate
    config = parsed(f"@{file} --crm x", script.Config)
    assert config.out != script.Config().out


# ---------------------------------------------------------------- embedded defaults


def test_an_embedded_default_is_taken_where_none_is_given_and_printed(capsys):
    config = parsed("--crm x")
    use_embedded(config, {"crm": ROOT / "demo/crm", "data": ROOT / "demo/data"})
    assert config.crm == "x"
    assert config.data == str(ROOT / "demo/data")
    assert config.asm is None
    assert capsys.readouterr().out == "no --data given: demo/data is used\n"


# ---------------------------------------------------------------- errors


@pytest.mark.parametrize(
    "error, says",
    [
        (
            FileNotFoundError(2, "No such file or directory", "p.jsonl"),
            "error: --predictions p.jsonl: No such file or directory\n",
        ),
        (
            ValueError("mine: no such file or folder"),
            "error: --data mine: no such file or folder\n",
        ),
        (PermissionError(13, "Permission denied", "/x"), "error: /x: Permission denied\n"),
        (ValueError("x.png: broken\nin two lines"), "error: x.png: broken in two lines\n"),
    ],
)
def test_bad_input_is_one_line_with_the_flag_that_named_a_file(capsys, monkeypatch, error, says):
    command = "evaluate.py --predictions p.jsonl --data mine"
    monkeypatch.setattr("sys.argv", command.split())
    with pytest.raises(SystemExit, match="2"), exit_on(ValueError, OSError):
        raise error
    assert capsys.readouterr().err == says


def test_a_bug_of_ours_stays_one():
    with pytest.raises(KeyError), exit_on(ValueError):
        raise KeyError("x")


def test_ctrl_c_outside_a_run_is_one_word_and_status_130(capsys):
    with pytest.raises(SystemExit, match="130"), exit_on(ValueError):
        raise KeyboardInterrupt
    assert capsys.readouterr().err == "interrupted\n"


# ---------------------------------------------------------------- commands that moved


@pytest.mark.parametrize(
    "module, says",
    [
        ("tools.volumes", "use python -m extras.scans"),
        ("tools.oracle", "use python -m extras.oracle"),
        ("tools.predictions", "use python -m extras.predictions"),
        ("tools.rollouts", "use python -m extras.rollouts"),
        ("tools.serve", "use python -m extras.serve"),
        ("tools.convert", "use python -m extras.convert"),
        ("tools.engines", "use python -m extras.engines"),
        ("tools.nothing", "use python -m extras.NAME"),
        ("tools", "use python -m extras.NAME"),
    ],
)
def test_a_command_of_tools_says_where_it_is_now(module, says):
    command = [sys.executable, "-m", module, "--out", "x", "-m"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == f"error: tools/ is extras/ now: {says}\n"


def test_a_program_may_import_tools():
    command = [sys.executable, "-c", "import tools", "-m", "tools.serve"]
    assert subprocess.run(command, cwd=ROOT, capture_output=True).returncode == 0
