"""What several test files share: a random tiny Qwen2.5-VL, and how scripts are run. No GPU, no network."""

import multiprocessing
import os
import runpy
import shlex
import socket
import sys
import tempfile
import warnings
from contextlib import suppress
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).parents[1]))  # the scripts are not a package

import numpy as np
import pytest
import torch
from PIL import Image

from crm import CHAT
from data import PROMPTS
from demo.make.crm import tiny_crm
from extras import pictures
from runtime.cli import ROOT

TEXTS = [
    PROMPTS["reasoning"],
    PROMPTS["direct"],
    *CHAT,
    "What could the elongated shadow on the left be? 0 1 2 3 4 5 6 7 8 9",
] * 3


# importing torch and transformers takes seconds: once is enough, for the scripts and for what this file imports
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    [
        "train_grpo",
        "train_sft",
        "infer",
        "evaluate",
        "extras.pictures",
        "pyarrow.parquet",
        "demo.make.crm",
        "pytest",
    ]
)


class Script:
    """`python script.py flags` in a process of its own, forked from one that has imported everything already.
    As subprocess.Popen: pid, poll(), returncode, send_signal(), communicate() -> (stdout, stderr).
    before: a function that the process calls first. curves: draw curves.png, which takes as long as all the rest of a
    run as small as those of the tests."""

    def __init__(self, *command, before=None, curves=False, **env):
        args = []
        for part in command:
            args += [str(part)] if isinstance(part, Path) else shlex.split(part)
        self.files = [Path(tempfile.mkstemp()[1]) for _ in range(2)]
        env = {"OMP_NUM_THREADS": "1"} | env
        self.process = FORKS.Process(target=_script, args=(args, env, before, curves, self.files))
        self.process.start()
        self.pid = self.process.pid

    returncode = property(lambda self: self.process.exitcode)

    def poll(self):
        return self.returncode

    def send_signal(self, number):
        with suppress(ProcessLookupError):  # it has just ended
            os.kill(self.pid, number)

    def communicate(self, timeout=150):
        self.process.join(timeout)
        if self.process.is_alive():
            self.process.kill()
            raise TimeoutError(f"{timeout} s: {[file.read_text()[-2000:] for file in self.files]}")
        out = tuple(file.read_text() for file in self.files)
        for file in self.files:
            file.unlink()
        return out


def _script(args, env, before, curves, files):
    for number, file in enumerate(files, 1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_APPEND), number)
    os.chdir(ROOT)
    os.environ.update(env)
    warnings.simplefilter("ignore")
    torch.set_num_threads(int(env["OMP_NUM_THREADS"]))
    if not curves:
        pictures.curves = lambda *_: None
    if before:
        before()
    module = args[0] == "-m"
    sys.argv = args[module:]
    (runpy.run_module if module else runpy.run_path)(sys.argv[0], run_name="__main__")


def ranks(processes, *command, before=None, node=None):
    """What torchrun starts, started here: one Script per rank. node: how many of them are on one machine."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    node = node or processes
    env = {
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": port,
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(node),
    }
    return [
        Script(*command, before=before, **env, RANK=str(r), LOCAL_RANK=str(r % node))
        for r in range(processes)
    ]


def random_crm(seed=0, **options):
    """0.3M parameters, float32, spread-out weights so that its distributions are far from uniform."""
    crm = tiny_crm(
        TEXTS,
        vocab_size=400,
        hidden=64,
        layers=2,
        heads=4,
        kv_heads=2,
        mlp=128,
        vision_hidden=64,
        vision_layers=2,
        vision_heads=4,
        vision_mlp=128,
        seed=seed,
        **options,
    )
    with torch.no_grad():
        for name, p in crm.model.named_parameters():
            if p.ndim > 1:
                p.mul_(4)
    if crm.ref_model is not None:
        crm.ref_model.load_state_dict(crm.model.state_dict())
    return crm


def noise_image(width, height, seed=0):
    return Image.fromarray(
        np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)
    )


def pytest_collection_modifyitems(items):
    """The longest test first: the other core does the rest meanwhile."""
    items.sort(key=lambda item: "a_minute_of_grpo" not in item.name)


@pytest.fixture(scope="session")
def crm():
    return random_crm()


@pytest.fixture(scope="session")
def prompts(crm):
    """Three prompts with different texts and image sizes."""
    return [
        crm.encode(noise_image(*size, seed), PROMPTS[kind].replace("{query}", query))
        for seed, (size, kind, query) in enumerate(
            [
                ((112, 84), "reasoning", "What is it?"),
                ((61, 203), "direct", "Where is the long shadow?"),
                ((140, 140), "reasoning", "Which?"),
            ]
        )
    ]
