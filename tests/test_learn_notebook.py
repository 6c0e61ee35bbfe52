"""learn/one_step.ipynb: it is what learn/one_step.py says, it runs, and its numbers are those of
the loop of train_grpo.py."""

import contextlib
import io
import json
import sys
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

import train_grpo
from learn import notebook
from learn.notebook import NOTEBOOK, SCRIPT, Cell, read_cells, run_cell, run_cells
from learn.show import Html, coloured
from runtime.cli import ROOT
from runtime.files import read_jsonl
from runtime.optim import Optimizer
from runtime.run import Run

CELLS = read_cells(SCRIPT.read_text(encoding="utf-8"))
COMMITTED = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
REBUILD = "make it again: python -m learn.notebook"
MOST_BYTES = 1_500_000
MOST_SECONDS = 120  # on two cores


@pytest.fixture(scope="module")
def executed() -> SimpleNamespace:
    """The cells, run from top to bottom: what they define, their outputs and their seconds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        patch.setattr(sys, "path", [*sys.path])
        patch.setattr(Run, "curves", lambda *_: None)  # it takes longer than the step
        start = time.perf_counter()
        outputs, names = run_cells(CELLS)
        seconds = time.perf_counter() - start
    torch.set_printoptions(profile="default")
    return SimpleNamespace(outputs=outputs, seconds=seconds, **names)


@pytest.fixture(scope="module")
def looped(executed, tmp_path_factory) -> SimpleNamespace:
    """What train_grpo.py computes with the notebook's settings: the arguments and the result of
    grpo_loss and the norm of the gradient, one of each update, and the row of its log."""
    folder = tmp_path_factory.mktemp("loop") / "run"
    losses = []
    norms = []
    true_loss = train_grpo.grpo_loss
    true_step = Optimizer.step

    def watched_loss(logp, old_logp, ref_logp, advantages, weights, **options):
        loss, stats = true_loss(logp, old_logp, ref_logp, advantages, weights, **options)
        seen = SimpleNamespace(
            logp=logp.detach().clone(),
            old_logp=old_logp,
            ref_logp=ref_logp,
            advantages=advantages,
            weights=weights,
            loss=loss.item(),
            stats=stats,
        )
        losses.append(seen)
        return loss, stats

    def watched_step(optimizer, lr):
        norms.append(true_step(optimizer, lr))
        return norms[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_grpo, "grpo_loss", watched_loss)
        patch.setattr(Optimizer, "step", watched_step)
        patch.setattr(Run, "curves", lambda *_: None)
        train_grpo.main(replace(executed.cfg, out=str(folder)))
    (row,) = read_jsonl(folder / "metrics.jsonl")
    (texts,) = read_jsonl(folder / "best_and_worst.jsonl")
    return SimpleNamespace(updates=losses, norms=norms, row=row, texts=texts)


# ---------------------------------------------------------------- the loop's numbers


def assert_equal(one, other):
    torch.testing.assert_close(torch.as_tensor(one), torch.as_tensor(other), atol=1e-6, rtol=0)


def test_the_loop_samples_and_rewards_the_same_completions(executed, looped):
    best = int(executed.rewards.argmax())
    worst = int(executed.rewards.argmin())
    assert looped.texts["best"]["text"] == executed.group.texts[best]
    assert looped.texts["worst"]["text"] == executed.group.texts[worst]
    assert looped.row["tokens"] == sum(executed.lengths)
    for name, value in executed.terms[best].items():
        assert looped.texts["best"][name] == value


def test_advantages_weights_and_log_probabilities_are_those_of_the_loop(executed, looped):
    first, second = looped.updates
    for update in (first, second):
        assert_equal(executed.advantages, update.advantages)
        assert_equal(executed.by_hand, update.advantages)
        assert_equal(executed.weights, update.weights)
        assert_equal(executed.old_logp, update.old_logp)
        assert_equal(executed.ref_logp, update.ref_logp)
    assert_equal(executed.logp.detach(), first.logp)
    assert_equal(executed.logp_2.detach(), second.logp)


def test_ratio_loss_kl_and_gradient_of_both_updates_are_those_of_the_loop(executed, looped):
    first, second = looped.updates
    mask = executed.mask
    assert_equal(executed.rho[mask], (second.logp - second.old_logp).exp()[mask])
    assert_equal(executed.loss.item(), first.loss)
    assert_equal(executed.loss_2.item(), second.loss)
    for ours, theirs in ((executed.stats, first.stats), (executed.stats_2, second.stats)):
        for name, value in ours.items():
            assert_equal(value, theirs[name])
    assert_equal([executed.grad_norm, executed.grad_norm_2], looped.norms)
    for name, value in executed.ours.items():
        assert_equal(value, looped.row[name])
        assert_equal(executed.row[name], looped.row[name])


def test_the_loss_by_hand_is_the_loss(executed):
    distances = executed.distances
    by_hand = (executed.weights * (executed.cfg.kl_coef * distances - executed.gain)).sum()
    assert_equal(by_hand, executed.loss_2.detach())
    assert executed.term == pytest.approx(executed.terms[executed.best]["box_iou"])


def test_the_example_shows_what_the_text_talks_about(executed):
    assert executed.gaps[executed.cfg.seed] > 0.02  # four rewards that differ
    assert abs(executed.loss.item()) < 1e-5  # its value tells nothing
    assert executed.grad_norm > 1e-3
    assert executed.stats_2["clip_frac"] > 0  # some tokens have moved enough
    assert executed.stats_2["kl"] > 0
    assert executed.answers[executed.best].bbox is not None
    asked_for = executed.weights * executed.advantages[:, None] * executed.change
    assert asked_for.sum() > 0  # the step went where the loss wanted
    alone = executed.alone
    torch.testing.assert_close(alone, executed.logp.detach(), atol=1e-4, rtol=0)


# ---------------------------------------------------------------- the file


def test_it_runs_in_under_two_minutes(executed):
    assert executed.seconds < MOST_SECONDS


def test_the_notebook_is_made_of_the_script():
    sources = []
    for cell in COMMITTED["cells"]:
        sources.append(Cell(cell["cell_type"] == "code", "".join(cell["source"])))
    assert sources == CELLS, REBUILD


def test_the_committed_outputs_are_of_todays_weights():
    assert COMMITTED["metadata"]["weights"] == notebook.fingerprint(), REBUILD


def test_every_output_is_committed_and_the_file_is_small(executed):
    assert NOTEBOOK.stat().st_size < MOST_BYTES
    pictures = 0
    for cell, outputs in zip(COMMITTED["cells"], executed.outputs):
        kinds = [sorted(output.get("data", "text")) for output in outputs]
        written = [sorted(output.get("data", "text")) for output in cell.get("outputs", [])]
        assert written == kinds, REBUILD
        pictures += sum("image/png" in kind for kind in kinds)
    assert pictures >= 6
    assert "text/html" in NOTEBOOK.read_text(encoding="utf-8")


def test_no_output_has_a_path_of_the_machine_that_made_it():
    text = json.dumps(COMMITTED)
    for part in (str(ROOT), "/tmp/", "/home/"):
        assert part not in text


def test_each_section_ends_with_a_question():
    sections: list[str] = []
    for cell in CELLS:
        if not cell.is_code:
            if cell.source.startswith("## "):
                sections.append("")
            if sections:
                sections[-1] += cell.source
    assert len(sections) == 11
    for section in sections:
        _, _, question = section.partition("**Think about it.**")
        assert "?" in question


def test_cells_are_short():
    for cell in CELLS:
        if cell.is_code:
            assert len(cell.source.splitlines()) <= 25, cell.source[:60]


# ---------------------------------------------------------------- how a notebook is made


def test_a_script_becomes_cells():
    script = (
        '"""Not in it."""\n\n# %% [markdown]\n# # Title\n#\n# text\n\n# %%\nx = 1\n\n\n# %%\nx\n'
    )
    expected = [Cell(False, "# Title\n\ntext"), Cell(True, "x = 1"), Cell(True, "x")]
    assert read_cells(script) == expected


def test_a_cell_prints_and_has_the_value_of_its_last_line():
    names = {}
    assert run_cell("x = 2\nprint(x)", names) == ("2\n", None)
    assert run_cell("print('a')\nx + 1", names) == ("a\n", 3)
    assert run_cell("", names) == ("", None)
    with pytest.raises(ZeroDivisionError), contextlib.redirect_stdout(io.StringIO()):
        run_cell("x / 0", names)


def test_outputs_are_pictures_html_or_text():
    picture = Image.new("RGB", (2, 2))
    assert list(notebook.looks(picture)) == ["image/png", "text/plain"]
    assert notebook.looks(Html("<b>a</b>"))["text/html"] == ["<b>a</b>"]
    assert notebook.looks([1])["text/plain"] == ["[1]"]


def test_likelier_tokens_are_green_and_tags_in_a_completion_stay_text():
    (html,) = [coloured(["c"], [["<b>", "x"]], torch.tensor([[0.5, -2.0]])).source]
    assert (
        '<span style="background: rgba(0, 135, 70, 0.38)" title="+0.500">&lt;b&gt;</span>' in html
    )
    assert '<span style="background: rgba(200, 40, 40, 0.75)" title="-2.000">x</span>' in html
