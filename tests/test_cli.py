"""The command line: what is read, what is refused, and in which words."""

import re
import shlex
from dataclasses import dataclass, fields

import pytest

from extras.foreign_names import FOREIGN_NAMES
from runtime.cli import ROOT, ModelConfig, RunConfig, exit_on, flag, parse_args


@dataclass
class Config(RunConfig):
    asm: str | None = flag(None, "segmenter")
    group: int = flag(8, "completions per prompt", low=2)
    clip_low: float = flag(0.2, "1 - this is the ratio's lower bound", above=0, high=1)
    dual_clip: float = flag(3.0, "bound for bad completions (0: none)", low=1, off=0)
    kl_coef: float = flag(0.01, "beta", low=0)
    pair: tuple[str, str] | None = flag(None, "two folders")


@dataclass
class WithImage(ModelConfig):
    image: str = flag("required", "image file, of any size")


def parsed(flags, config_class=Config, recipe=None, **options):
    return parse_args(config_class, "100 % of it.", recipe, shlex.split(flags), **options)


def refused(capsys, flags, config_class=Config):
    """The one line on stderr with which parse_args ends the program, status 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit_:
        parsed(flags, config_class)
    lines = capsys.readouterr().err.splitlines()
    assert exit_.value.code == 2 and len(lines) == 1 and lines[0].startswith("error: "), lines
    return lines[0]


def test_every_field_is_a_flag_and_a_subclass_overrides_defaults():
    config = parsed("--crm x --data y --lr 1e-3 --no-offload --pair a b --resume --min-pixels 784")
    assert (config.lr, config.offload, config.pair, config.resume) == (
        1e-3,
        False,
        ["a", "b"],
        "yes",
    )
    assert config.min_pixels == 784 and config.resize is None and config.max_pixels is None

    @dataclass
    class Other(RunConfig):
        lr: float = flag(5e-6, "peak learning rate", above=0)

    other = parsed("--crm x --data y", Other)
    assert other.lr == 5e-6 and other.steps == RunConfig().steps
    assert [f.name for f in fields(Other)] == [f.name for f in fields(RunConfig)]


@pytest.mark.parametrize(
    "flags, says",
    [
        ("--lr 0", "--lr 0.0: must be greater than 0"),
        ("--lr=-1", "--lr -1.0: must be greater than 0"),
        ("--group 1", "--group 1: must be at least 2"),
        ("--kl-coef=-0.1", "--kl-coef -0.1: must be at least 0"),
        ("--clip-low 1.5", "--clip-low 1.5: must be at most 1"),
        ("--clip-low 0", "must be greater than 0"),
        ("--dual-clip 0.5", "--dual-clip 0.5: must be 0 or at least 1"),
        ("--keep=-1", "--keep -1: must be at least 0"),
        ("--save-every=-2", "must be at least -1"),
        ("--max-new-tokens 0", "must be at least 1"),
        ("--seed=-1", "at least 0"),
        ("--temperature 0", "must be greater than 0"),
        ("--timeout 0", "must be greater than 0"),
        ("--max-pixels 0", "at least 1"),
    ],
)
def test_numbers_out_of_bounds_are_refused_by_name_and_bound(capsys, flags, says):
    assert says in refused(capsys, flags)


def test_the_values_at_the_bounds_are_allowed():
    config = parsed(
        "--crm x --data y --dual-clip 0 --clip-low 1 --kl-coef 0 --keep 0 --save-every=-1 --group 2"
    )
    assert (config.dual_clip, config.clip_low, config.kl_coef, config.save_every) == (0, 1, 0, -1)


@pytest.mark.parametrize("name", [f.name for f in fields(Config) if f.type is float])
@pytest.mark.parametrize("value", ["nan", "inf", "1e999"])
def test_no_number_may_be_nan_or_infinite(capsys, name, value):
    assert "must be a finite number" in refused(capsys, f"--{name.replace('_', '-')} {value}")


@pytest.mark.parametrize(
    "flags, says",
    [
        ("--num_generations 8", "unknown flag --num_generations: it is --group here"),
        ("--num-generations=8", "unknown flag --num-generations: it is --group here"),
        ("--beta 0.04", "it is --kl-coef here"),
        ("--learning_rate 1e-6", "it is --lr here"),
        ("actor_rollout_ref.rollout.n=16", "it is --group here"),
        ("--worker.actor.optim.lr 1e-6", "it is --lr here"),
        ("actor_rollout_ref.actor.kl_loss_coef=0.01", "it is --kl-coef here"),
        ("--lora_rank 4", "unknown flag --lora_rank: it is --lora-rank here"),
        ("--kl_coef 0", "it is --kl-coef here"),
        ("--lora-rnak 4", "unknown flag --lora-rnak: did you mean --lora-rank?"),
        ("--xyzzy 1", "see --help"),
        ("something", "unknown flag something: see --help"),
        ("--group x", "--group: invalid int value: 'x'"),
        ("--schedule sine", "invalid choice: 'sine'"),
        ("--crm", "--crm: expected one argument"),
        ("@nowhere.args", "error: nowhere.args: No such file"),
    ],
)
def test_an_unknown_flag_is_one_line_with_the_flag_that_is_meant(capsys, flags, says):
    assert says in refused(capsys, flags)


def test_what_is_required_and_missing_is_named_after_what_is_unknown(capsys):
    assert refused(capsys, "", WithImage) == "error: --image is required"
    assert "did you mean --image?" in refused(capsys, "--imag x.png", WithImage)
    assert parsed("--image x.png --crm c", WithImage).image == "x.png"


def test_only_the_first_rank_says_what_is_wrong(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SystemExit, match="2"):
        parsed("--lr 0")
    assert capsys.readouterr() == ("", "")


def test_help_shows_every_flag_and_the_names_of_other_trainers(capsys):
    with pytest.raises(SystemExit) as exit_:
        parsed("--help")
    said = capsys.readouterr().out
    assert exit_.value.code == 0 and "100 % of it." in said
    assert all("--" + f.name.replace("_", "-") in said for f in fields(Config))
    assert (
        re.search(r"--group +num_generations rollout\.n", said) and "ppo_epochs" not in said
    )  # no such flag here


def test_the_names_of_other_trainers_lead_to_flags_that_exist():
    source = "".join(
        (ROOT / file).read_text() for file in ("runtime/cli.py", "train_grpo.py", "train_sft.py")
    )
    assert [name for name in FOREIGN_NAMES if not re.search(rf"^    {name}: ", source, re.M)] == []


# ---------------------------------------------------------------- @files, the recipe, embedded defaults


@pytest.fixture
def recipe(tmp_path):
    file = tmp_path / "demo.args"
    file.write_text(
        "# the embedded recipe\n--lr 3e-2   # of gains\n--weights box_iou=3\n--group 4\n"
    )
    return file


def test_a_file_of_flags_has_comments_and_the_last_flag_wins(recipe):
    assert parsed(f"@{recipe} --crm x --data y --group 6").group == 6
    config = parsed(f"--lr 1 @{recipe} --crm x --data y")
    assert (config.lr, config.weights) == (3e-2, "box_iou=3")


@pytest.mark.parametrize("content", [b"\xff\xfe--lr", b"--lr '1", b"@{0}"])
def test_a_broken_file_of_flags_is_one_line(capsys, tmp_path, content):
    file = tmp_path / "x.args"
    file.write_bytes(content.replace(b"{0}", str(file).encode()))
    refused(capsys, f"@{file}")


def test_the_embedded_recipe_is_read_without_a_crm_and_flags_by_hand_win(recipe, capsys):
    config = parsed("--group 8", recipe=recipe)
    assert (config.group, config.lr, config.weights) == (8, 3e-2, "box_iou=3")
    assert config.crm == str(ROOT / "demo/crm") and config.data == str(ROOT / "demo/data")
    said = capsys.readouterr().out
    assert (
        said.count("no --crm given") == 1
        and f"demo/crm, with {recipe} (flags given here win)" in said
    )
    assert parsed("--crm x --data y", recipe=recipe).weights == ""


def test_with_a_crm_a_line_says_that_the_recipe_is_not_read_unless_a_file_of_flags_is_given(
    recipe, capsys
):
    parsed("--crm x --data y --asm z", recipe=recipe)
    assert capsys.readouterr().out == f"{recipe} not read, because --crm was given; --lr is 1e-06\n"
    parsed(f"@{recipe} --crm x --data y --asm z", recipe=recipe)
    parsed("--crm x --data y --asm z")
    assert capsys.readouterr().out == ""


def test_a_mode_by_hand_drops_the_weights_of_the_recipe_only(recipe, capsys):
    assert parsed("--mode pdice", recipe=recipe).weights == ""
    assert "--mode given: the --weights of" in capsys.readouterr().out
    assert parsed("--mode pdice --weights box_iou=2", recipe=recipe).weights == "box_iou=2"
    assert (
        parsed(f"@{recipe} --mode pdice --crm x --data y").weights == "box_iou=3"
    )  # a file given by hand
    assert parsed("--mode soft", recipe=recipe).lr == 3e-2


def test_an_embedded_default_that_is_not_needed_is_neither_taken_nor_printed(capsys):
    config = parsed(
        "--crm x", embedded=lambda config: ["data"] + ["asm"] * ("mask" in config.weights)
    )
    assert config.asm is None and "--asm" not in capsys.readouterr().out


def test_bad_input_is_one_line_and_status_2_with_the_flag_that_named_a_file(capsys, monkeypatch):
    with pytest.raises(SystemExit, match="2"), exit_on(ValueError):
        raise ValueError("x.png: broken\nin two lines")
    assert capsys.readouterr().err == "error: x.png: broken in two lines\n"
    for error, says in (
        (
            FileNotFoundError(2, "No such file or directory", "p.jsonl"),
            "error: --predictions p.jsonl: No such file or directory\n",
        ),
        (
            ValueError("mine: no such file or folder"),
            "error: --data mine: no such file or folder\n",
        ),
        (PermissionError(13, "Permission denied", "/x"), "error: /x: Permission denied\n"),
    ):
        monkeypatch.setattr("sys.argv", "evaluate.py --predictions p.jsonl --data mine".split())
        with pytest.raises(SystemExit, match="2"), exit_on(ValueError, OSError):
            raise error
        assert capsys.readouterr().err == says
    with pytest.raises(KeyError), exit_on(ValueError):  # a bug of ours stays one
        raise KeyError("x")


def test_ctrl_c_outside_a_run_is_one_word_and_status_130(capsys):
    with pytest.raises(SystemExit, match="130"), exit_on(ValueError):
        raise KeyboardInterrupt
    assert capsys.readouterr().err == "interrupted\n"
