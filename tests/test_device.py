"""Everything runs where the model is. A pretended GPU is a device whose tensors hold host memory
but reject tensors of the host, as CUDA's do. On it the scripts do what they do on a CPU. What a
real GPU adds, other kernels, is not tested here."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import noise_image
from test_sam1 import small_sam
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

import evaluate
import infer
import sampling
import scoring
import train_grpo
import train_sft
from asm import load_asm
from bench import parity
from runtime import parallel, pretrained
from runtime.cli import parse_args
from runtime.run import Run

GPU = torch.device("meta")  # a device that autograd knows on every machine
# CUDA takes a host's indices as well
MAY_MEET = ("_to_copy", "copy_", "index", "index_put", "index_put_", "_index_put_impl_")
TENSOR = torch.tensor  # as torch makes one

# ---------------------------------------------------------------- the pretended GPU


class OnGPU(torch.Tensor):
    """A tensor on the pretended GPU. inner: the tensor of the host that holds its numbers."""

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> "OnGPU":
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            dtype=inner.dtype,
            device=GPU,
            storage_offset=inner.storage_offset(),
        )
        made.inner = inner
        return made

    @classmethod
    def __torch_dispatch__(cls, op, types, args=(), kwargs=None):
        return dispatch(op, args, kwargs or {})

    def __getitem__(self, at):
        return super().__getitem__(index_of_tensors(at))

    def __setitem__(self, at, value):
        if not isinstance(value, torch.Tensor):
            value = OnGPU(TENSOR(value, dtype=self.dtype))
        super().__setitem__(index_of_tensors(at), value)

    def tolist(self):
        return self.inner.tolist()

    def numpy(self):
        raise TypeError("a GPU's memory is no numpy array")

    __array__ = numpy


class PretendedGPU(TorchDispatchMode):
    """Inside, calls without a tensor, such as torch.zeros(3, device=GPU), are pretended as well."""

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        return dispatch(op, args, kwargs or {})


def each(function, value):
    """Returns function(value), or of everything in a list or a tuple."""
    if isinstance(value, list | tuple):
        return type(value)(each(function, item) for item in value)
    return function(value)


def dispatch(op, args, kwargs):
    """Runs an operator on the host. RuntimeError where tensors of both devices meet, as on CUDA."""
    name = op.overloadpacket.__name__
    values = []
    each(values.append, [*args, *kwargs.values()])
    tensors = [value for value in values if isinstance(value, torch.Tensor)]
    on_gpu = [tensor for tensor in tensors if isinstance(tensor, OnGPU)]
    on_host = [tensor for tensor in tensors if not isinstance(tensor, OnGPU)]
    for tensor in on_host:
        assert tensor.device != GPU, f"{op}: the pretence has a hole"
    # a single number of the host may meet a tensor of the GPU
    shapes_on_host = [tuple(tensor.shape) for tensor in on_host if tensor.dim() > 0]
    if on_gpu and shapes_on_host and name not in MAY_MEET:
        raise RuntimeError(f"{op}: tensors of the GPU and of the host, {shapes_on_host}")
    if name == "_fused_sdp_choice":
        return 0  # the kernel of attention that every device has

    goes_to_gpu = len(on_gpu) > 0
    if kwargs.get("device") is not None:
        goes_to_gpu = torch.device(kwargs["device"]) == GPU

    def unwrap(value):
        return value.inner if isinstance(value, OnGPU) else value

    arguments = {key: each(unwrap, value) for key, value in kwargs.items()}
    if kwargs.get("device") is not None:
        arguments["device"] = torch.device("cpu")
    result = op(*each(unwrap, args), **arguments)

    known = {id(tensor.inner): tensor for tensor in on_gpu}

    def wrap(value):
        if id(value) in known:  # an operator in place returns the tensor that it was given
            return known[id(value)]
        if goes_to_gpu and isinstance(value, torch.Tensor):
            return OnGPU(value)
        return value

    return each(wrap, result)


def index_of_tensors(at):
    """Returns an index whose lists are tensors. Torch would make them behind the pretence."""
    if isinstance(at, tuple):
        return tuple(index_of_tensors(part) for part in at)
    if isinstance(at, list | range):
        return TENSOR(list(at))
    return at


def pretended_tensor(data, *, dtype=None, device=None):
    """torch.tensor and torch.as_tensor: numbers are made on the host and then moved."""

    def number_of(value):
        return value.item() if isinstance(value, OnGPU) else value

    made = TENSOR(each(number_of, data), dtype=dtype)
    if device is None:
        return made
    return made.to(device)


@pytest.fixture
def gpu(monkeypatch):
    """Inside, ranks live on the pretended GPU. Files are loaded on the host, as in reality."""

    def on_host(load):
        def loaded(*args, **options):
            with _disable_current_modes(), monkeypatch.context() as real:
                real.setattr(torch, "tensor", TENSOR)
                return load(*args, **options)

        return loaded

    monkeypatch.setattr(torch, "tensor", pretended_tensor)
    monkeypatch.setattr(torch, "as_tensor", pretended_tensor)
    monkeypatch.setitem(scoring.LOGITS_AT_ONCE, GPU.type, 2**21)
    monkeypatch.setitem(sampling.ROOM, GPU.type, 128)
    monkeypatch.setitem(sampling.CHECK_EVERY, GPU.type, 8)

    # a tensor of a class of its own, which the pretence cannot wrap: the mask that it stands for
    def lower_right_mask(T, S):
        return torch.ones(T, S, dtype=torch.bool, device=GPU).tril(S - T)

    monkeypatch.setattr(scoring, "causal_lower_right", lower_right_mask)

    def move_and_tie(self, device):
        torch.nn.Module.to(self, device)
        self.tie_weights()  # moving to the pretended GPU unties them
        return self

    for family in pretrained.FAMILIES.values():
        load = on_host(family.model.from_pretrained)
        monkeypatch.setattr(family.model, "from_pretrained", load)
        monkeypatch.setattr(family.model, "to", move_and_tie)

    def start(cls):
        return cls(device=GPU)

    monkeypatch.setattr(parallel.Ranks, "start", classmethod(start))
    with PretendedGPU():
        yield


def test_the_pretended_gpu_rejects_what_cuda_rejects(gpu):
    a = torch.ones(3, device=GPU)
    b = torch.ones(3)
    assert (a + 1).device == GPU
    assert (a + 1).tolist() == [2, 2, 2]
    assert (a.cpu() + b).device.type == "cpu"
    assert a[0].item() == 1
    assert (a * TENSOR(2.0)).tolist() == [2, 2, 2]  # a single number of the host is fine
    for wrong in (
        lambda: a + b,
        lambda: torch.cat([a, b]),
        lambda: torch.where(a > 0, a, b),
        lambda: a.numpy(),
    ):
        with pytest.raises((RuntimeError, TypeError)):
            wrong()


# ---------------------------------------------------------------- the scripts

GRPO = "@recipes/demo.args --steps 1 "
RUNS = {
    "grpo_mask_dice": (
        train_grpo,
        GRPO + "--prompts 1 --group 2 --max-new-tokens 100 --coefficients mask_dice=1 "
        "--eval-every -1",
    ),
    "grpo_bfloat16": (
        train_grpo,
        GRPO + "--prompts 2 --group 2 --max-new-tokens 12 --coefficients box_iou=1 "
        "--minibatches 2 --inner-epochs 2 --resample 1 --checkpointing --dtype bfloat16 "
        "--entropy-coef 0.01 --eval-limit 1",
    ),
    "grpo_lora": (
        train_grpo,
        GRPO + "--prompts 1 --group 3 --max-new-tokens 90 --lora-rank 4 --trainable q_proj|v_proj "
        "--kl-coef 0 --agg token --ratio sequence --norm batch --pack-tokens 300 --offload "
        "--eval-every -1",
    ),
    "sft": (train_sft, "--steps 2 --batch 2 --lr 1e-6 --eval-limit 1 --max-new-tokens 12"),
    "evaluate": (evaluate, "--limit 1 --completions 2 --max-new-tokens 100"),
    "grpo_qwen3": (
        train_grpo,
        GRPO + "--crm QWEN3 --prompts 2 --group 2 --max-new-tokens 12 --coefficients box_iou=1 "
        "--entropy-coef 0.1 --minibatches 2 --checkpointing --eval-limit 1",
    ),
    "evaluate_qwen3": (
        evaluate,
        "--crm QWEN3 --asm none --limit 1 --completions 2 --max-new-tokens 12",
    ),
    "infer": (infer, "--image demo/images/fundus.png --query where --completions 2"),
}


def outcome(script, flags: str, folder: Path) -> list[dict]:
    """Returns everything that a run wrote down, but for its seconds, its memory and its folder."""
    argv = [*flags.split(), "--out", str(folder)]
    script.main(parse_args(script.Config, "", argv=argv))
    of_machine = ("seconds", "tokens_per_second", "peak_memory")
    rows = []
    for path in sorted(folder.glob("*.json*")):
        if path.name == "config.json":
            continue
        texts = [path.read_text()]
        if path.suffix == ".jsonl":
            texts = path.read_text().splitlines()
        for text in texts:
            row = {}
            for key, value in json.loads(text).items():
                if not key.startswith(of_machine) and str(folder) not in str(value):
                    row[key] = value
            rows.append(row)
    return rows


def are_close(a, b) -> bool:
    """Whether two values of JSON are equal but for the last digits of numbers."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(are_close(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(are_close, a, b))
    if isinstance(a, float):
        return a == pytest.approx(b, rel=1e-4, abs=1e-5)
    return a == b


@pytest.mark.parametrize("name", RUNS)
def test_a_script_does_on_the_gpu_what_it_does_on_the_host(
    name, qwen3, tmp_path, monkeypatch, request
):
    monkeypatch.setattr(Run, "curves", lambda *_: None)  # it takes longer than all the rest
    script, flags = RUNS[name]
    flags = flags.replace("QWEN3", str(qwen3))
    on_host = outcome(script, flags, tmp_path / "host")
    request.getfixturevalue("gpu")
    on_gpu = outcome(script, flags, tmp_path / "gpu")
    assert len(on_host) == len(on_gpu) > 0
    if "bfloat16" not in flags:  # there the kernels' rounding decides what is sampled
        for a, b in zip(on_host, on_gpu):
            assert are_close(a, b), (a, b)


@pytest.mark.parametrize("family", ["medsam", "sam-med2d"])
def test_the_first_sams_do_on_the_gpu_what_they_do_on_the_host(
    family, tmp_path, monkeypatch, request
):
    spec, _ = small_sam(family, tmp_path, monkeypatch)
    image = noise_image(201, 120)
    asked = np.asarray(image), [[20.0, 10.0, 150.0, 50.0]], [[[60.0, 30.0], [100.0, 40.0]]]
    masks, scores = load_asm(spec, "cpu").segment(*asked)
    request.getfixturevalue("gpu")
    masks_on_gpu, scores_on_gpu = load_asm(spec, GPU).segment(*asked)
    assert (masks_on_gpu == masks).mean() > 0.999
    assert abs(scores_on_gpu - scores).max() < 1e-4


def test_the_parity_check_runs_where_the_model_is(gpu, monkeypatch):
    monkeypatch.setattr(parity, "P", 1)
    monkeypatch.setattr(parity, "G", 2)
    monkeypatch.setattr(parity, "T", 6)
    table = parity.parity("demo/crm", GPU)
    checked = 0
    for name, row in table.items():
        if name.startswith("float32") and "passed" in row:
            assert row["passed"], table
            checked += 1
    assert checked > 0
