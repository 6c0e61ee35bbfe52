"""Everything runs where the model is: on a pretended GPU, whose tensors hold host memory but refuse to meet tensors of
the host, as CUDA's do, the scripts do what they do on a CPU. (What a real one adds, other kernels, is not tested.)"""

import json

import pytest
import torch
from test_asm import noise_image, small_sam
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

GPU = torch.device("meta")  # a device that autograd knows on every machine
MAY_MEET = {
    "_to_copy",
    "copy_",
    "index",
    "index_put",
    "index_put_",
    "_index_put_impl_",
}  # CUDA, too, takes a host's indices
FROM_NUMBERS = torch.tensor


class OnGPU(torch.Tensor):
    @staticmethod
    def __new__(cls, inner):
        out = torch.Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            dtype=inner.dtype,
            device=GPU,
            storage_offset=inner.storage_offset(),
        )
        out.inner = inner
        return out

    @classmethod
    def __torch_dispatch__(cls, op, types, args=(), kwargs=None):
        return dispatch(op, args, kwargs or {})

    def __getitem__(self, at):
        return super().__getitem__(numbers(at))

    def __setitem__(self, at, value):
        value = (
            value
            if isinstance(value, torch.Tensor)
            else OnGPU(FROM_NUMBERS(value, dtype=self.dtype))
        )
        super().__setitem__(numbers(at), value)

    def tolist(self):
        return self.inner.tolist()

    def numpy(self):
        raise TypeError("a GPU's memory is no numpy array")

    __array__ = numpy


class Pretended(TorchDispatchMode):
    """Also calls without a tensor: factories with device=GPU."""

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        return dispatch(op, args, kwargs or {})


def each(function, value):
    """function of a value, or of all in a list or tuple."""
    return (
        type(value)(each(function, v) for v in value)
        if isinstance(value, (list, tuple))
        else function(value)
    )


def dispatch(op, args, kwargs):
    name, values = op.overloadpacket.__name__, []
    each(values.append, [*args, *kwargs.values()])
    there = [t for t in values if isinstance(t, OnGPU)]
    here = [t for t in values if isinstance(t, torch.Tensor) and not isinstance(t, OnGPU)]
    assert all(t.device != GPU for t in here), f"{op}: the pretence has a hole"
    if there and name not in MAY_MEET and any(t.dim() for t in here):
        raise RuntimeError(
            f"{op}: tensors of the GPU and of the host, {[tuple(t.shape) for t in here]}"
        )
    if name == "_fused_sdp_choice":
        return 0  # the kernel for every device
    unwrap = lambda t: t.inner if isinstance(t, OnGPU) else t
    onto = torch.device(kwargs["device"]) == GPU if kwargs.get("device") else bool(there)
    inner = {
        k: torch.device("cpu") if k == "device" and v else each(unwrap, v)
        for k, v in kwargs.items()
    }
    out = op(*each(unwrap, args), **inner)
    known = {id(t.inner): t for t in there}  # in-place: the same tensor again
    wrap = lambda t: (
        known[id(t)] if id(t) in known else OnGPU(t) if onto and isinstance(t, torch.Tensor) else t
    )
    return each(wrap, out)


def numbers(at):
    """An index in which lists are tensors: torch would make them beside the pretence."""
    one = lambda i: FROM_NUMBERS(list(i)) if isinstance(i, (list, range)) else i
    return tuple(map(one, at)) if isinstance(at, tuple) else one(at)


def from_numbers(data, *, dtype=None, device=None):
    out = FROM_NUMBERS(each(lambda x: x.item() if isinstance(x, OnGPU) else x, data), dtype=dtype)
    return out if device is None else out.to(device)


@pytest.fixture
def gpu(monkeypatch):
    """Inside, ranks live on the pretended GPU. Loading happens on the host, as it does."""

    def on_host(load):
        def loaded(*args, **options):
            with _disable_current_modes(), monkeypatch.context() as m:
                m.setattr(torch, "tensor", FROM_NUMBERS)
                return load(*args, **options)

        return loaded

    monkeypatch.setattr(torch, "tensor", from_numbers)
    monkeypatch.setattr(torch, "as_tensor", from_numbers)
    for settings, value in (
        (scoring.LOGITS_CHUNK, 2**21),
        (sampling.ROOM, 128),
        (sampling.CHECK_EVERY, 8),
        (sampling.LEAVE, 0.25),
    ):
        monkeypatch.setitem(settings, GPU.type, value)
    # a tensor of a class of its own, which the pretence cannot wrap: the mask that it stands for
    monkeypatch.setattr(
        scoring,
        "causal_lower_right",
        lambda T, S: torch.ones(T, S, dtype=torch.bool, device=GPU).tril(S - T),
    )
    model = pretrained.Qwen2_5_VLForConditionalGeneration
    monkeypatch.setattr(model, "from_pretrained", on_host(model.from_pretrained))
    move = model.to
    monkeypatch.setattr(
        model, "to", lambda self, device: [move(self, device), self.tie_weights()][0]
    )  # it unties them here
    monkeypatch.setattr(parallel.Ranks, "start", classmethod(lambda cls, *_: cls(device=GPU)))
    with Pretended():
        yield


def test_the_pretence_refuses_what_cuda_refuses(gpu):
    a, b = torch.ones(3, device=GPU), torch.ones(3)
    assert (
        (a + 1).device == GPU
        and (a + 1).tolist() == [2, 2, 2]
        and (a.cpu() + b).device.type == "cpu"
    )
    assert a[0].item() == 1 and (a * FROM_NUMBERS(2.0)).tolist() == [
        2,
        2,
        2,
    ]  # a host's number is fine
    for wrong in (
        lambda: a + b,
        lambda: torch.cat([a, b]),
        lambda: torch.where(a > 0, a, b),
        lambda: a.numpy(),
    ):
        with pytest.raises((RuntimeError, TypeError)):
            wrong()


SMALL = "@recipes/demo.args --prompts 2 --group 3 --max-new-tokens 100"
RUNS = [
    (train_grpo, SMALL + " --weights mask_dice=1 --steps 1 --eval-limit 1 --eval-answers 2"),
    (
        train_grpo,
        SMALL
        + " --weights box_iou=1 --trainable . --minibatches 2 --inner-epochs 2 --resample 1 --checkpointing"
        " --dtype bfloat16 --entropy-coef 0.01 --steps 1 --eval-every -1",
    ),
    (
        train_grpo,
        SMALL
        + " --trainable lora --lora-rank 4 --kl-coef 0 --agg token --ratio sequence --norm batch --pack-tokens 300"
        " --steps 2 --eval-every -1",
    ),
    (
        train_sft,
        "--steps 2 --batch 4 --lr 1e-6 --eval-limit 1 --eval-answers 2 --max-new-tokens 100",
    ),
    (evaluate, "--limit 3 --samples 2 --max-new-tokens 100"),
    (infer, "--image demo/images/fundus.png --query where --samples 2"),
]


def outcome(script, flags, folder):
    """Everything a run wrote down, but for its seconds, its memory and its folder."""
    script.main(parse_args(script.Config, "", argv=[*flags.split(), "--out", str(folder)]))
    timed = ("seconds", "tokens_per_second", "peak_memory")
    rows = [
        json.loads(line)
        for path in sorted(folder.glob("*.json*"))
        if path.name != "config.json"
        for line in (
            path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]
        )
    ]
    return [
        {k: v for k, v in row.items() if not k.startswith(timed) and str(folder) not in str(v)}
        for row in rows
    ]


def close(a, b):
    """Equal but for the last digits of numbers."""
    if isinstance(a, (list, dict)):
        keys = range(max(len(a), len(b))) if isinstance(a, list) else a.keys() | b.keys()
        return all(close(a[k], b[k]) for k in keys)
    return a == pytest.approx(b, rel=1e-4, abs=1e-5) if isinstance(a, float) else a == b


@pytest.mark.parametrize("script, flags", RUNS, ids=[script.__name__ for script, _ in RUNS])
def test_a_script_does_on_the_gpu_what_it_does_on_the_host(script, flags, tmp_path, request):
    host = outcome(script, flags, tmp_path / "host")
    request.getfixturevalue("gpu")
    gpu = outcome(script, flags, tmp_path / "gpu")
    assert len(host) == len(gpu) > 0
    if "bfloat16" not in flags:  # there the kernels' rounding decides what is sampled
        for a, b in zip(host, gpu):
            assert close(a, b), (a, b)


@pytest.mark.parametrize("family", ["medsam", "sam-med2d"])
def test_the_first_sams_do_on_the_gpu_what_they_do_on_the_host(
    family, tmp_path, monkeypatch, request
):
    spec, _ = small_sam(family, tmp_path, monkeypatch)
    asked = noise_image(), [[20.0, 10.0, 150.0, 50.0]], [[[60.0, 30.0], [100.0, 40.0]]]
    masks, scores = load_asm(spec, "cpu").segment(*asked)
    request.getfixturevalue("gpu")
    on_gpu = load_asm(spec, GPU).segment(*asked)
    assert (on_gpu[0] == masks).mean() > 0.999 and abs(on_gpu[1] - scores).max() < 1e-4


def test_the_parity_check_runs_where_the_model_is(gpu, monkeypatch):
    for size, small in (("P", 2), ("G", 2), ("T", 12)):
        monkeypatch.setattr(parity, size, small)
    table = parity.parity("demo/crm", GPU)
    assert all(
        row["passed"]
        for name, row in table.items()
        if name.startswith("float32") and "passed" in row
    ), table
