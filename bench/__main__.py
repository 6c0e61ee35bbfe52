"""How long a step of GRPO takes, by phase, switch and size, and beside TRL's GRPOTrainer.

    python -m bench                       # phases of a step, each optimization switched off
    python -m bench --peer trl            # the same work by TRL, alternately (make bench-trl)
    python -m bench --peer trl --growth   # step time over group size and prompt length, a picture
    python -m bench --scaling             # the same step in one and in two processes
    python -m bench --roofline            # what a step reaches of this machine's product and copy
    python -m bench --parity              # is each way to compute here the slow one on the CPU?

--random-model builds a size of bench/random_model.py with random weights, whose completions never
end early (TRL's are kept from it). wide runs on a CPU: one prompt x 16 completions of 512 tokens,
all weights. 3b, 7b and Qwen3-VL's sizes need a GPU (make bench-gpu): LoRA, 8 prompts x 16
completions of 256 tokens. All are at 840 x 840 px (Qwen3-VL at 832 x 832), unless --flags say
otherwise. --flags go to both sides, --ours to ours. --parity without a model looks at the embedded
one and at a tiny Qwen3-VL.

Every measurement is a process of its own: a few steps of train_grpo.py (or of bench/peer_trl.py) on
the embedded model, all weights trained, KL 0.01 to a reference, one update per step. The first step
is warm-up. In a comparison the two take turns, so that what else the machine does falls on both.
TRL samples with transformers' generate, not with vLLM. Results go to bench/results/*.json with the
command, the machine and the date.
"""

import argparse
import json
import os
import platform
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
from matplotlib.figure import Figure
from transformers import AutoConfig

from bench.memory import count, mergers
from bench.parity import parity
from bench.random_model import SIZES
from crm import load_crm
from data import PROMPTS, load_samples
from runtime.cli import parse_args
from runtime.files import read_jsonl
from train_grpo import Config

RESULTS = Path(__file__).parent / "results"
EMBEDDED = "demo/crm"
OURS = (
    "@recipes/demo.args --prompts 8 --group 8 --coefficients '' --trainable '' --lr 1e-6 "
    "--minibatches 1 --kl-coef 0.01 --warmup 0 --eval-every -1 --save-every -1 --data demo/data"
)
SQUARE = "--resize square:840 --group 16 "
LORA = "--group 16 --max-new-tokens 256 --lora-rank 64 --checkpointing"
AT_SIZE = {  # --flags of a random model
    "wide": SQUARE + "--max-new-tokens 512 --prompts 1",
    "3b": f"--resize square:840 {LORA}",
    "7b": f"--resize square:840 {LORA}",
    "qwen3-2b": f"--resize square:832 {LORA}",
    "qwen3-4b": f"--resize square:832 {LORA}",
    "qwen3-8b": f"--resize square:832 {LORA}",
}
OFF = {  # optimizations, switched off
    "one group per pack": "--pack-tokens 900",
    "no completion shares its prompt when scored": "--pack-tokens 1",
}
WITHOUT_GRAPHS = "no CUDA graphs"
TORCHRUN = ("-m", "torch.distributed.run", "--nproc-per-node", "2")
SHOWN = {"ours": "this project", "trl": "TRL"}
Row = dict[str, Any]  # medians of a measurement


# ---------------------------------------------------------------- measurements


def measure(*command: str, **env: str) -> None:
    """Runs a command. RuntimeError with the end of what it printed if it fails."""
    done = subprocess.run(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=os.environ | env
    )
    if done.returncode != 0:
        said = done.stderr.strip()[-2000:]
        raise RuntimeError(f"{shlex.join(command)}: status {done.returncode}\n{said}")


def our_command(flags: str, args: argparse.Namespace, out: str, graphs: bool = True) -> list[str]:
    """Returns the words after `python` of a few steps of ours."""
    script = ["train_grpo.py"]
    if args.no_graphs or not graphs:
        script = ["-m", "bench.without_graphs"]
    return [*script, *our_flags(flags, args), "--out", out]


def our_flags(flags: str, args: argparse.Namespace) -> list[str]:
    """Returns the flags of train_grpo.py."""
    words = shlex.split(f"{OURS} {args.flags} {args.ours} {flags}")
    return [*words, "--crm", args.crm, "--steps", str(args.steps)]


def ours(
    flags: str,
    args: argparse.Namespace,
    launch: Sequence[str] = (),
    graphs: bool = True,
    **env: str,
) -> Row:
    """Measures a few steps of train_grpo.py. launch: what starts several processes."""
    with tempfile.TemporaryDirectory() as folder:
        out = f"{folder}/run"
        measure(sys.executable, *launch, *our_command(flags, args, out, graphs), **env)
        return medians(read_jsonl(Path(out) / "metrics.jsonl"))


def medians(rows: list[Row]) -> Row:
    """Returns medians over all steps but the first: seconds, those of each phase, length, tokens
    per second; and the peak memory."""
    counted = rows[1:]
    phases = [key for key in rows[0] if key.startswith("seconds/")]
    found = {}
    for key in ("seconds", *phases, "length", "tokens_per_second"):
        found[key] = median(row[key] for row in counted)
    found["peak_memory_gb"] = max(row["peak_memory_gb"] for row in counted)
    return found


def trl(flags: str, args: argparse.Namespace) -> Row:
    """Measures the same of bench/peer_trl.py, in its own environment."""
    command = [args.peer_python, "-m", "bench.peer_trl", "--crm", args.crm]
    command += ["--steps", str(args.steps), *shlex.split(args.flags), *shlex.split(flags)]
    if args.random_model:
        command.append("--force-length")
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "peer.json"
        measure(*command, "--out", str(out))
        row = json.loads(out.read_text(encoding="utf-8"))
    return {
        "micro": row["micro"],
        "seconds": median(row["seconds"][1:]),
        "length": median(row["length"][1:]),
        "peak_memory_gb": row["peak_memory_gb"],
        "trl": row["trl"],
    }


def fastest_trl(flags: str, args: argparse.Namespace, sizes: Sequence[int]) -> Row:
    """Measures TRL at its fastest batch size. One at which it fails, for want of memory, say, is
    left out."""
    tried = []
    for micro in sizes:
        try:
            tried.append(trl(f"{flags} --micro {micro}", args))
        except RuntimeError as error:
            problem = str(error).splitlines()[-1]
            print(f"TRL, {micro} completions at once: {problem}", flush=True)
    return min(tried, key=lambda row: row["seconds"])


def result_name(name: str, args: argparse.Namespace) -> str:
    """Returns the name of a result's file."""
    if args.random_model:
        name += f"_{args.random_model}"
    if args.no_graphs:
        name += "_no_graphs"
    return name


def record(name: str, result: Any, args: argparse.Namespace) -> None:
    """Writes a result, with the command, the machine and the date."""
    RESULTS.mkdir(exist_ok=True)
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    about = {
        "command": "python -m bench " + shlex.join(sys.argv[1:]),
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{os.cpu_count()} x {platform.machine()}, {gpu}",
        "torch": torch.__version__,
        "result": result,
    }
    file = RESULTS / f"{result_name(name, args)}.json"
    file.write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
    print(f"-> {file}")


# ---------------------------------------------------------------- --roofline


def fastest(work: Callable[[], Any], times: int = 10) -> float:
    """Returns the seconds of the fastest of several runs."""
    seconds = []
    for _ in range(times):
        start = time.perf_counter()
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def machine() -> dict[str, float]:
    """Returns what this machine reaches: operations per second of a large product, bytes per second
    of a copy."""
    device = "cpu"
    dtype = torch.float32
    side = 2048
    cells = 2**26
    if torch.cuda.is_available():
        device = "cuda"
        dtype = torch.bfloat16
        side = 8192
        cells = 2**30
    a, b = torch.randn(2, side, side, device=device, dtype=dtype)
    source, target = torch.zeros(2, cells, device=device, dtype=dtype)
    return {
        "flops": 2 * side**3 / fastest(lambda: a @ b),
        "bytes": 2 * source.nbytes / fastest(lambda: target.copy_(source)),
    }


def roofline(args: argparse.Namespace) -> None:
    """Prints the useful work of a step's phases over what the machine could do in the same time.

    A forward is 2 operations per weight and token, a backward 4, or 2 through frozen weights. Every
    prompt counts once, a frozen vision tower once per step, the vocabulary projection for
    completion tokens only. Recomputation and attention's own products do not count. Decoding reads
    all weights once per token, and the keys and values of every row."""
    cfg = parse_args(Config, "", argv=our_flags("", args))
    dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    crm = load_crm(args.crm, dtype=dtype, resize=cfg.resize)
    examples = load_samples(cfg.data)
    prompts = [crm.prompt_of(examples[i]) for i in range(16)]
    text_tokens = cfg.prompts * mean(len(prompt.ids) for prompt in prompts)
    patches = cfg.prompts * mean(len(prompt.pixel_values) for prompt in prompts)
    step = ours("", args)
    top = machine()
    written = cfg.prompts * cfg.group * step["length"]

    work = step_work(crm.model, text_tokens, patches, written, cfg.lora_rank > 0)
    read = decoding_bytes(crm.model, cfg, text_tokens, written, step["length"], dtype.itemsize)
    floor = sum(work.values()) / top["flops"]
    print(
        f"matrix product {top['flops'] / 1e9:.0f} GFLOP/s, copy {top['bytes'] / 1e9:.1f} GB/s; "
        f"{step['seconds']:.2f} s per step"
    )
    phases = {}
    for phase, flops in work.items():
        seconds = step[f"seconds/{phase}"]
        share = flops / seconds / top["flops"]
        phases[phase] = {"flop": flops, "of_matrix_product": share}
        print(
            f"{phase:10} {flops / 1e9:8.0f} GFLOP  {seconds:.2f} s  {share:.0%} of the matrix "
            "product"
        )
    of_copy = read / step["seconds/sample"] / top["bytes"]
    print(f"sampling reads {read / 1e9:.1f} GB: {of_copy:.0%} of the copy")
    print(f"the matrix products alone would take {floor:.2f} s")
    result = {
        "machine": top,
        "step": step,
        "floor_seconds": floor,
        "phases": phases,
        "decode_of_copy": of_copy,
    }
    record("roofline", result, args)


def step_work(
    model: torch.nn.Module, text_tokens: float, patches: float, written: float, has_lora: bool
) -> dict[str, float]:
    """Returns the operations of each phase, see `roofline`. written: tokens of all completions."""
    visual = model.model.visual
    body = count(model.model.language_model.layers)
    words = 2 * (body * (text_tokens + written) + count(model.lm_head) * written)
    of_tokens = sum(count(merger) for merger in mergers(model)) * patches / 4
    vision = 2 * (count(visual.blocks) * patches + of_tokens)
    if has_lora:
        return {"sample": words + vision, "reference": words, "update": 2 * words}
    return {
        "sample": words + vision,
        "reference": words + vision,
        "update": 3 * words + 3 * vision,
    }


def decoding_bytes(
    model: torch.nn.Module,
    cfg: Config,
    text_tokens: float,
    written: float,
    length: float,
    width: int,
) -> float:
    """Returns the bytes that decoding reads in a step. width: bytes per weight."""
    text = model.config.text_config
    head_size = model.model.language_model.layers[0].self_attn.head_dim
    per_token = 2 * text.num_hidden_layers * text.num_key_value_heads * head_size * width
    weights = (count(model.model.language_model.layers) + count(model.lm_head)) * width
    of_steps = cfg.max_new_tokens * (weights + per_token * text_tokens)
    return of_steps + per_token * written * length / 2


# ---------------------------------------------------------------- switches, parity, TRL, processes


def switches(args: argparse.Namespace) -> None:
    """Measures a step, and the same with each optimization switched off."""
    tried = {"all on": ""} | OFF
    if args.random_model:
        del tried["one group per pack"]  # no group of such a size is so small
    if torch.cuda.is_available():
        tried[WITHOUT_GRAPHS] = ""
    table = {}
    for name, flags in tried.items():
        try:
            table[name] = ours(flags, args, graphs=name != WITHOUT_GRAPHS)
        except RuntimeError as error:
            print(f"{name} fails: {error}", flush=True)
    print(f"{'':40} step s  sample  reference  update  tokens/s  GB")
    for name, row in table.items():
        print(
            f"{name:40} {row['seconds']:6.2f}  {row['seconds/sample']:6.2f}  "
            f"{row['seconds/reference']:9.2f}  {row['seconds/update']:6.2f}  "
            f"{row['tokens_per_second']:8.0f}  {row['peak_memory_gb']:.2f}"
        )
    record("switches", table, args)


def check_parity(args: argparse.Namespace) -> int:
    """Prints how far each way to compute is from the slow one on the CPU. Returns the exit status:
    1 where one is too far."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    models = [args.crm]
    if args.crm == EMBEDDED and not args.random_model:
        models.append(made("qwen3-tiny"))
    table = {}
    for path in models:
        kind = AutoConfig.from_pretrained(path).model_type
        table |= {f"{kind}, {name}": row for name, row in parity(path, device).items()}
    print(f"{'relative error of':36} log-prob.  gradient   sampled  equal completions")
    all_passed = True
    for name, row in table.items():
        line = f"{name:36} {parity_text(row)}"
        if not row.get("passed", True):
            line += "  <- failed"
            all_passed = False
        print(line)
    record("parity", table, args)
    return 0 if all_passed else 1


def parity_text(row: Row) -> str:
    """Returns a row of bench/parity.py in words."""
    if "problem" in row:
        return row["problem"]
    if "mean gap" in row:
        gap = row["mean gap"]
        return f"mean gap between sampled and scored log-probabilities {gap:.4f} nats"
    text = f"{row['logp']:9.1e} {row['gradient']:9.1e} {row['sampled']:9.1e}"
    if "equal completions" in row:
        text += f"  {row['equal completions']:17.2f}"
    return text


def pairs(args: argparse.Namespace) -> None:
    """Measures ours and TRL's in turns."""
    micro = args.micro[0]
    if len(args.micro) > 1:
        micro = fastest_trl("", args, args.micro)["micro"]
    rows = []
    for i in range(args.pairs):
        own = ours("", args)
        peer = trl(f"--micro {micro}", args)
        speed = peer["seconds"] / own["seconds"]
        memory = own["peak_memory_gb"] / peer["peak_memory_gb"]
        rows.append({"ours": own, "trl": peer, "speed": speed, "memory": memory})
        print(
            f"pair {i + 1}: ours {own['seconds']:.2f} s {own['peak_memory_gb']:.2f} GB, "
            f"TRL {peer['trl']} {peer['seconds']:.2f} s {peer['peak_memory_gb']:.2f} GB: "
            f"{speed:.2f} x the speed, {memory:.2f} x the memory",
            flush=True,
        )
    speeds = middle_and_range([row["speed"] for row in rows])
    memories = middle_and_range([row["memory"] for row in rows])
    print(f"median of {len(rows)}: {speeds} x the speed, {memories} x the memory")
    record(f"trl_batch_{micro}", rows, args)


def middle_and_range(values: list[float]) -> str:
    """Returns "2.80 [2.70, 3.00]", the median and the smallest and the largest value."""
    return f"{median(values):.2f} [{min(values):.2f}, {max(values):.2f}]"


def scaling(args: argparse.Namespace) -> None:
    """Measures one process against two, each with one thread: the same prompts, completions and
    numbers."""
    rows = []
    for i in range(args.pairs):
        row = {"one": ours("", args, OMP_NUM_THREADS="1")}
        for kind in ("ddp", "fsdp"):
            row[kind] = ours(f"--parallel {kind}", args, TORCHRUN, OMP_NUM_THREADS="1")
        rows.append(row)
        seconds = ", ".join(f"{kind} {found['seconds']:.2f} s" for kind, found in row.items())
        print(f"round {i + 1}: {seconds}", flush=True)
    for kind in ("ddp", "fsdp"):
        gain = median(row["one"]["seconds"] / row[kind]["seconds"] for row in rows)
        efficiency = 100 * gain / 2
        print(
            f"two processes, {kind}: {gain:.2f} x the speed of one, {efficiency:.0f} % efficiency"
        )
    record("scaling", rows, args)


# ---------------------------------------------------------------- --growth


def prompt_file(length: int, folder: str, args: argparse.Namespace) -> str:
    """Writes the reasoning prompt with filler, so that prompt and image together have about this
    many tokens. Returns the file."""
    tokenizer = load_crm(args.crm).tokenizer
    text = PROMPTS["reasoning"]
    while len(tokenizer(text).input_ids) + 90 < length:
        text += " The image may be of any modality."
    path = Path(folder) / f"{length}.txt"
    path.write_text(text, encoding="utf-8")
    return str(path)


def growth(args: argparse.Namespace) -> None:
    """Measures a step over group sizes and over prompt lengths."""
    result: dict[str, dict[int, dict[str, Row]]] = {"group": {}, "prompt": {}}
    for G in (4, 8, 16, 32):
        flags = f"--group {G}"
        result["group"][G] = measured(flags, f"{flags} --pack-tokens 2048", G, args)
    with tempfile.TemporaryDirectory() as folder:
        for length in (150, 500, 1000, 2000):
            flags = f"--prompt {prompt_file(length, folder, args)}"
            pack = f"{flags} --pack-tokens {2048 + length}"
            result["prompt"][length] = measured(flags, pack, length, args)
    record("growth", result, args)
    draw_growth(result)


def measured(flags: str, our_flags: str, x: int, args: argparse.Namespace) -> dict[str, Row]:
    """Returns a point of --growth: ours, and TRL's with --peer, at 16 or 64 completions at once,
    whichever is faster."""
    found = {"ours": ours(our_flags, args)}
    if args.peer:
        sizes = [micro for micro in (16, 64) if micro <= 8 * x]
        found["trl"] = fastest_trl(flags, args, sizes)
    seconds = ", ".join(f"{who} {row['seconds']:.2f} s" for who, row in found.items())
    print(f"{flags}: {seconds}", flush=True)
    return found


def draw_growth(result: dict[str, dict[int, dict[str, Row]]]) -> None:
    """Draws growth.png."""
    figure = Figure(figsize=(9, 3.6))
    axes = figure.subplots(1, 2)
    labels = {"group": "completions per prompt, G", "prompt": "prompt tokens, about"}
    for axis, (name, label) in zip(axes, labels.items()):
        for who, title in SHOWN.items():
            points = [(x, rows[who]["seconds"]) for x, rows in result[name].items() if who in rows]
            if points:
                axis.plot(*zip(*points), "o-", label=title)
        axis.set_xlabel(label)
        axis.set_ylabel("seconds per step")
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(RESULTS / "growth.png", dpi=110)


# ---------------------------------------------------------------- the command


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--crm", default=EMBEDDED)
    parser.add_argument(
        "--random-model", choices=SIZES, help="a random model instead of --crm, in build/"
    )
    parser.add_argument("--flags", help="flags of every run, ours and TRL's")
    parser.add_argument("--ours", default="", help="flags of our runs only")
    parser.add_argument("--no-graphs", action="store_true", help="ours without CUDA graphs")
    parser.add_argument(
        "--steps", type=int, default=3, help="per measurement; the first is not counted"
    )
    parser.add_argument("--peer", nargs="?", const="trl", choices=["trl"], help="TRL beside ours")
    parser.add_argument("--peer-python", default="build/trl/bin/python")
    parser.add_argument(
        "--micro",
        type=int,
        nargs="+",
        default=[64],
        help="completions that TRL takes at once; of several the fastest is compared",
    )
    parser.add_argument("--pairs", type=int, default=5, help="how often a comparison is repeated")
    parser.add_argument("--scaling", action="store_true", help="one and two processes")
    parser.add_argument(
        "--roofline", action="store_true", help="against this machine's product and copy"
    )
    parser.add_argument("--growth", action="store_true", help="over group size and prompt length")
    parser.add_argument("--parity", action="store_true", help="against the slow forward on the CPU")
    args = parser.parse_args(argv)
    if args.peer and not Path(args.peer_python).exists():
        parser.error(f"--peer-python {args.peer_python}: not there; make bench-trl makes it")
    if args.flags is None:
        args.flags = AT_SIZE.get(args.random_model, "")
    if args.random_model:
        args.crm = f"build/random-{args.random_model}"
        args.ours = f"--pack-tokens 10240 {args.ours}"
    return args


def made(size: str) -> str:
    """Returns the folder of a random model, which is made where it is not there."""
    folder = f"build/random-{size}"
    if not Path(folder).exists():
        measure(sys.executable, "-m", "bench.random_model", size, "--out", folder)
    return folder


def main() -> int:
    args = parse()
    if args.random_model:
        made(args.random_model)
    if args.parity:
        return check_parity(args)
    if args.scaling:
        scaling(args)
    elif args.roofline:
        roofline(args)
    elif args.growth:
        growth(args)
    elif args.peer:
        pairs(args)
    else:
        switches(args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
