"""What several test files share: random tiny models, and how scripts are run.

No test needs a GPU or a network."""

import multiprocessing
import os
import runpy
import shlex
import socket
import sys
import tempfile
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).parents[1]))  # the scripts are not a package

import numpy as np
import pytest
import torch
from PIL import Image

from crm import CHAT, CRM, Prompt
from data import PROMPTS, fill_prompt
from demo.make.crm import tiny_crm
from runtime import run as run_module
from runtime.cli import ROOT
from runtime.pretrained import FAMILIES

TEXTS = [
    fill_prompt(PROMPTS["reasoning"], "{query}"),
    fill_prompt(PROMPTS["direct"], "{query}"),
    FAMILIES["qwen2_5_vl"].system + CHAT[0],
    *CHAT[1:],
    "What could the elongated shadow on the left be? 0 1 2 3 4 5 6 7 8 9",
] * 3


# ---------------------------------------------------------------- scripts in processes of their own

# importing torch and transformers takes seconds: once is enough, for the scripts and for this file
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    [
        "train_grpo",
        "train_sft",
        "infer",
        "evaluate",
        "runtime.pictures",
        "pyarrow.parquet",
        "demo.make.crm",
        "pytest",
    ]
)


class Script:
    """`python script.py flags` in a process that is forked from one that has imported everything.

    It has what subprocess.Popen has: pid, poll(), returncode, send_signal(), and communicate(),
    which returns (stdout, stderr).

    before  a function that the process calls first
    curves  whether curves.png is drawn, which takes as long as all the rest of a tiny run
    """

    def __init__(
        self,
        *command: str | Path,
        before: Callable[[], None] | None = None,
        curves: bool = False,
        **env: str,
    ):
        args = []
        for part in command:
            args += [str(part)] if isinstance(part, Path) else shlex.split(part)
        self.files = [Path(tempfile.mkstemp()[1]) for _ in range(2)]
        env = {"OMP_NUM_THREADS": "1"} | env
        self.process = FORKS.Process(
            target=run_script, args=(args, env, before, curves, self.files)
        )
        self.process.start()
        self.pid = self.process.pid

    @property
    def returncode(self) -> int | None:
        return self.process.exitcode

    def poll(self) -> int | None:
        return self.returncode

    def send_signal(self, number: int) -> None:
        with suppress(ProcessLookupError):  # it has just ended
            os.kill(self.pid, number)

    def communicate(self, timeout: float = 150) -> tuple[str, str]:
        self.process.join(timeout)
        if self.process.is_alive():
            self.process.kill()
            ends = [file.read_text()[-2000:] for file in self.files]
            raise TimeoutError(f"{timeout} s: {ends}")
        out = self.files[0].read_text(), self.files[1].read_text()
        for file in self.files:
            file.unlink()
        return out


def run_script(
    args: list[str],
    env: dict[str, str],
    before: Callable[[], None] | None,
    curves: bool,
    files: list[Path],
) -> None:
    """What a Script's process does. files: where its stdout and its stderr go."""
    for number, file in enumerate(files, 1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_APPEND), number)
    os.chdir(ROOT)
    os.environ.update(env)
    warnings.simplefilter("ignore")
    torch.set_num_threads(int(env["OMP_NUM_THREADS"]))
    if not curves:
        run_module.Run.curves = lambda *_: None
    if before is not None:
        before()
    is_module = args[0] == "-m"
    if is_module:
        sys.argv = args[1:]
        runpy.run_module(sys.argv[0], run_name="__main__")
    else:
        sys.argv = args
        runpy.run_path(sys.argv[0], run_name="__main__")


def ranks(
    processes: int,
    *command: str | Path,
    before: Callable[[], None] | None = None,
    node: int | None = None,
) -> list[Script]:
    """What torchrun starts, started here: one Script per rank. node: ranks on one machine."""
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
    scripts = []
    for rank in range(processes):
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank % node)}
        scripts.append(Script(*command, before=before, **env, **own))
    return scripts


# ---------------------------------------------------------------- models and images


# a mark: the test runs with a model of each family, that is its fixtures family, crm and prompts
both_families = pytest.mark.parametrize("family", FAMILIES, indirect=True, scope="session")


def random_crm(
    seed: int = 0,
    prompt: str | None = None,
    resize: str | None = None,
    family: str = "qwen2_5_vl",
    **training: object,
) -> CRM:
    """Returns a CRM of 0.3M float32 parameters, spread out so that its distributions are far from
    uniform. training: arguments of CRM.prepare_training, which is called where there are any.

    A Qwen3-VL has features of one inner vision layer, and its heads are larger than hidden / heads.
    """
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
        head_size=24 if family == "qwen3_vl" else 0,
        family=family,
        seed=seed,
        prompt=prompt,
        resize=resize,
    )
    with torch.no_grad():
        for parameter in crm.model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4)
    if training:
        crm.prepare_training(**training)
    return crm


def noise_image(width: int, height: int, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest test runs first: the other core does the rest meanwhile."""
    items.sort(key=lambda item: "a_minute_of_grpo" not in item.name)


@pytest.fixture(scope="session")
def family(request: pytest.FixtureRequest) -> str:
    return getattr(request, "param", "qwen2_5_vl")


@pytest.fixture(scope="session")
def crm(family: str) -> CRM:
    return random_crm(family=family)


@pytest.fixture(scope="session")
def qwen3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random tiny Qwen3-VL, beside the embedded demo/crm."""
    folder = tmp_path_factory.mktemp("qwen3") / "crm"
    random_crm(family="qwen3_vl").save(folder)
    return folder


@pytest.fixture(scope="session")
def prompts(crm: CRM) -> list[Prompt]:
    """Three prompts with different texts and image sizes."""
    asked = [
        ((112, 84), "reasoning", "What is it?"),
        ((61, 203), "direct", "Where is the long shadow?"),
        ((140, 140), "reasoning", "Which?"),
    ]
    encoded = []
    for seed, (size, kind, query) in enumerate(asked):
        text = fill_prompt(PROMPTS[kind], query, crm.coordinates)
        encoded.append(crm.encode(noise_image(*size, seed), text))
    return encoded
