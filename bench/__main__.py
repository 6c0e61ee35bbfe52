"""How long a step of GRPO takes, by phase, switch and size, and beside TRL's GRPOTrainer.

    python -m bench                    # phases of a step, and each optimization switched off (make
                                       bench)
    python -m bench --peer trl         # the same work by TRL, alternately, in build/trl (make
                                       bench-trl)
    python -m bench --peer trl --growth            # step time over group size and prompt length, a
                                                   picture
    python -m bench --scaling          # the same step in one and in two processes of one thread
                                       each
    python -m bench --roofline         # how much of this machine's own matrix product and copy a
                                       step reaches
    python -m bench --parity           # how far each way to compute here is from the slow one on
                                       the CPU

--random-model builds a size of bench/random_model.py with random weights, whose completions never
end early (TRL's are kept from it). wide runs on a CPU: one prompt x 16 completions of 512 tokens,
all weights. 3b and 7b need a GPU (make bench-gpu): LoRA, 8 prompts x 16 completions of 256 tokens.
All at 840 x 840 px, unless --flags say otherwise. --flags go to both sides, --ours to ours.

Every measurement is a process of its own: a few steps of train_grpo.py (or of bench/peer_trl.py) on
the embedded model, all weights trained, KL 0.01 to a reference, one update per step; the first step
is warm-up. In a comparison the two take turns, so that what else the machine does falls on both.
TRL samples with transformers' generate, not with vLLM. Results go to bench/results/*.json with the
command, the machine and the date."""

import argparse
import json
import os
import platform
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import mean, median

import torch

from bench.parity import parity
from bench.random_model import SIZES
from crm import load_crm
from data import PROMPTS, fill_prompt, load_samples
from runtime.cli import parse_args
from train_grpo import Config

RESULTS = Path(__file__).parent / "results"
OURS = (
    "--prompts 8 --group 8 --weights '' --trainable '' --lr 1e-6 --minibatches 1 --kl-coef 0.01 "
    "--warmup 0 --eval-every -1 --data demo/data"
)
SQUARE = "--resize square:840 --max-pixels 705600 --group 16 "
AT_SIZE = {
    "3b": SQUARE + "--max-new-tokens 256 --lora-rank 64 --checkpointing",
    "wide": SQUARE + "--max-new-tokens 512 --prompts 1",
}
AT_SIZE["7b"] = AT_SIZE["3b"]
OFF = {
    "one group per pack": "--pack-tokens 900",
    "no completion shares its prompt when scored": "--pack-tokens 1",
}


def machine() -> dict:
    """What this machine reaches: operations per second of a large product, bytes per second of a
    copy."""
    cuda = torch.cuda.is_available()
    device, dtype = ("cuda", torch.bfloat16) if cuda else ("cpu", torch.float32)
    n, cells = (8192, 2**30) if cuda else (2048, 2**26)
    a, b = torch.randn(2, n, n, device=device, dtype=dtype)
    source, target = torch.zeros(2, cells, device=device, dtype=dtype)

    def fastest(work, times=10):
        seconds = []
        for _ in range(times):
            start = time.perf_counter()
            work()
            if cuda:
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - start)
        return min(seconds)

    return {
        "flops": 2 * n**3 / fastest(lambda: a @ b),
        "bytes": 2 * source.nbytes / fastest(lambda: target.copy_(source)),
    }


def roofline(args) -> None:
    """Useful work of a step's phases over what the machine could do in the same time.

    A forward is 2 operations per weight and token, a backward 4, or 2 through frozen weights; every
    prompt counts once, a frozen vision tower once per step, the vocabulary projection for
    completion tokens only, recomputation and attention's own products not at all. Decoding reads
    all weights once per token, and the keys and values of every row."""
    cfg = parse_args(
        Config,
        "",
        argv=[
            "@recipes/demo.args",
            "--crm",
            args.crm,
            *shlex.split(OURS),
            *shlex.split(args.flags),
        ],
    )
    dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    crm = load_crm(args.crm, dtype=dtype, resize=cfg.resize, max_pixels=cfg.max_pixels)
    train = load_samples(cfg.data)
    prompts = [
        crm.encode(train[i].image, fill_prompt(crm.template, train[i].query)) for i in range(16)
    ]
    step = ours("", args)
    top = machine()
    c = crm.model.config.text_config
    count = lambda module: sum(p.numel() for p in module.parameters())
    visual = crm.model.model.visual
    body, head, tower, merger = map(
        count,
        (crm.model.model.language_model.layers, crm.model.lm_head, visual.blocks, visual.merger),
    )
    text = cfg.prompts * mean(len(p.ids) for p in prompts)
    patches = cfg.prompts * mean(len(p.pixel_values) for p in prompts)
    written = cfg.prompts * cfg.group * step["length"]
    width = dtype.itemsize
    words = 2 * (body * (text + written) + head * written)
    vision = 2 * (tower * patches + merger * patches / 4)
    lora = cfg.lora_rank > 0
    work = {
        "sample": words + vision,
        "reference": words + vision * (not lora),
        "update": (2 if lora else 3) * words + 3 * vision * (not lora),
    }
    head_size = c.hidden_size // c.num_attention_heads
    per_token = 2 * c.num_hidden_layers * c.num_key_value_heads * head_size * width
    read = (
        cfg.max_new_tokens * ((body + head) * width + per_token * text)
        + per_token * written * step["length"] / 2
    )
    print(
        f"matrix product {top['flops'] / 1e9:.0f} GFLOP/s, copy {top['bytes'] / 1e9:.1f} GB/s; "
        f"{step['seconds']:.2f} s per step"
    )
    floor = sum(work.values()) / top["flops"]
    result = {"machine": top, "step": step, "floor_seconds": floor, "phases": {}}
    for phase, flops in work.items():
        rate = flops / step[f"seconds/{phase}"]
        result["phases"][phase] = {"flop": flops, "of_matrix_product": rate / top["flops"]}
        print(
            f"{phase:10} {flops / 1e9:8.0f} GFLOP  {step[f'seconds/{phase}']:.2f} s  "
            f"{rate / top['flops']:.0%} of the matrix product"
        )
    result["decode_of_copy"] = read / step["seconds/sample"] / top["bytes"]
    print(
        f"sampling reads {read / 1e9:.1f} GB: {result['decode_of_copy']:.0%} of the copy\n"
        f"the matrix products alone would take {floor:.2f} s"
    )
    record("roofline", result, args)


def measure(*command, **env) -> None:
    """Run a command. RuntimeError with the end of what it printed if it fails."""
    done = subprocess.run(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=os.environ | env
    )
    if done.returncode:
        raise RuntimeError(
            f"{shlex.join(command)}: status {done.returncode}\n{done.stderr.strip()[-2000:]}"
        )


def ours(flags: str, args, launch: tuple = (), **env) -> dict:
    """A few steps of train_grpo.py -> medians over all but the first: seconds, phases; peak
    memory."""
    with tempfile.TemporaryDirectory() as folder:
        flags = shlex.split(f"{OURS} {args.flags} {args.ours} {flags}")
        measure(
            sys.executable,
            *launch,
            "train_grpo.py",
            "@recipes/demo.args",
            "--crm",
            args.crm,
            *flags,
            "--steps",
            str(args.steps),
            "--out",
            f"{folder}/run",
            "--save-every",
            "-1",
            **env,
        )
        rows = [json.loads(line) for line in open(f"{folder}/run/metrics.jsonl")][1:]
    keys = [
        "seconds",
        *(k for k in rows[0] if k.startswith("seconds/")),
        "length",
        "tokens_per_second",
    ]
    return {key: median(row[key] for row in rows) for key in keys} | {
        "peak_memory_gb": max(row["peak_memory_gb"] for row in rows)
    }


def trl(flags: str, args) -> dict:
    """The same of bench/peer_trl.py, in its own environment."""
    with tempfile.TemporaryDirectory() as folder:
        measure(
            args.peer_python,
            "-m",
            "bench.peer_trl",
            "--crm",
            args.crm,
            "--steps",
            str(args.steps),
            "--out",
            f"{folder}/peer.json",
            *shlex.split(args.flags),
            *shlex.split(flags),
            *(["--force-length"] if args.random_model else []),
        )
        row = json.loads(Path(f"{folder}/peer.json").read_text())
    return {
        "micro": row["micro"],
        "seconds": median(row["seconds"][1:]),
        "length": median(row["length"][1:]),
        "peak_memory_gb": row["peak_memory_gb"],
        "trl": row["trl"],
    }


def fastest_trl(flags: str, args, pieces) -> dict:
    """TRL at its fastest batch size; one at which it fails, for want of memory, say, is left
    out."""
    tried = []
    for micro in pieces:
        try:
            tried.append(trl(f"{flags} --micro {micro}", args))
        except RuntimeError as error:
            print(f"TRL, {micro} completions at once: {str(error).splitlines()[-1]}", flush=True)
    return min(tried, key=lambda row: row["seconds"])


def record(name: str, result, args) -> None:
    RESULTS.mkdir(exist_ok=True)
    name += f"_{args.random_model}" if args.random_model else ""
    name += "_no_graphs" if "--no-cuda-graphs" in args.ours else ""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    about = {
        "command": "python -m bench " + shlex.join(sys.argv[1:]),
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{os.cpu_count()} x {platform.machine()}, {gpu}",
        "torch": torch.__version__,
    }
    (RESULTS / f"{name}.json").write_text(json.dumps({**about, "result": result}, indent=1) + "\n")
    print(f"-> {RESULTS / name}.json")


def switches(args) -> None:
    tried = {"all on": ""} | OFF
    table = {}
    if args.random_model:
        del tried["one group per pack"]  # no group of such a size is so small
    if torch.cuda.is_available():
        tried |= {"no CUDA graphs": "--no-cuda-graphs"}
    for name, flags in tried.items():
        try:
            table[name] = ours(flags, args)
        except RuntimeError as error:
            print(f"{name} fails: {error}", flush=True)
    print(f"{'':40} step s  sample  reference  update  tokens/s  GB")
    for name, r in table.items():
        print(
            f"{name:40} {r['seconds']:6.2f}  {r['seconds/sample']:6.2f}  {r['seconds/reference']:9.2f}  "
            f"{r['seconds/update']:6.2f}  {r['tokens_per_second']:8.0f}  {r['peak_memory_gb']:.2f}"
        )
    record("switches", table, args)


def close(args) -> None:
    table = parity(args.crm, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    print(f"{'relative error of':28} log-prob.  gradient   sampled  equal completions")
    for name, row in table.items():
        if "problem" in row:
            text = row["problem"]
        elif "mean gap" in row:
            text = (
                f"mean gap between sampled and scored log-probabilities {row['mean gap']:.4f} nats"
            )
        else:
            text = f"{row['logp']:9.1e} {row['gradient']:9.1e} {row['sampled']:9.1e}"
            if "equal completions" in row:
                text += f"  {row['equal completions']:17.2f}"
        print(f"{name:28} {text}" + ("" if row.get("passed", True) else "  <- failed"))
    record("parity", table, args)
    sys.exit(not all(row.get("passed", True) for row in table.values()))


def pairs(args) -> None:
    rows = []
    micro = args.micro[0]
    if len(args.micro) > 1:
        micro = fastest_trl("", args, args.micro)["micro"]
    for i in range(args.pairs):
        a = ours("", args)
        b = trl(f"--micro {micro}", args)
        rows.append(
            {
                "ours": a,
                "trl": b,
                "speed": b["seconds"] / a["seconds"],
                "memory": a["peak_memory_gb"] / b["peak_memory_gb"],
            }
        )
        print(
            f"pair {i + 1}: ours {a['seconds']:.2f} s {a['peak_memory_gb']:.2f} GB, "
            f"TRL {b['trl']} {b['seconds']:.2f} s {b['peak_memory_gb']:.2f} GB: "
            f"{rows[-1]['speed']:.2f} x the speed, {rows[-1]['memory']:.2f} x the memory",
            flush=True,
        )
    speed, memory = (sorted(row[key] for row in rows) for key in ("speed", "memory"))
    print(
        f"median of {len(rows)}: {median(speed):.2f} x the speed [{speed[0]:.2f}, {speed[-1]:.2f}], "
        f"{median(memory):.2f} x the memory [{memory[0]:.2f}, {memory[-1]:.2f}]"
    )
    record(f"trl_batch_{micro}", rows, args)


def scaling(args) -> None:
    """One process against two, each with one thread: the same prompts, completions and numbers."""
    rows = []
    for i in range(args.pairs):
        row = {"one": ours("", args, OMP_NUM_THREADS="1")}
        for kind in ("ddp", "fsdp"):
            torchrun = "-m", "torch.distributed.run", "--nproc-per-node", "2"
            row[kind] = ours(f"--parallel {kind}", args, torchrun, OMP_NUM_THREADS="1")
        rows.append(row)
        seconds = ", ".join(f"{kind} {r['seconds']:.2f} s" for kind, r in row.items())
        print(f"round {i + 1}: {seconds}", flush=True)
    for kind in ("ddp", "fsdp"):
        gain = median(row["one"]["seconds"] / row[kind]["seconds"] for row in rows)
        print(
            f"two processes, {kind}: {gain:.2f} x the speed of one, {100 * gain / 2:.0f} % efficiency"
        )
    record("scaling", rows, args)


def prompt_file(length: int, folder: str, args) -> str:
    """The reasoning prompt with filler, so that prompt and image together have about this many
    tokens."""
    tokenizer = load_crm(args.crm).tokenizer
    text = PROMPTS["reasoning"]
    while len(tokenizer(text).input_ids) + 90 < length:
        text += " The image may be of any modality."
    path = Path(folder) / f"{length}.txt"
    path.write_text(text)
    return str(path)


def growth(args) -> None:
    result = {"group": {}, "prompt": {}}
    with tempfile.TemporaryDirectory() as folder:
        work = [("group", G, f"--group {G}") for G in (4, 8, 16, 32)] + [
            ("prompt", L, f"--prompt {prompt_file(L, folder, args)}")
            for L in (150, 500, 1000, 2000)
        ]
        for axis, x, flags in work:
            result[axis][x] = {
                "ours": ours(flags + f" --pack-tokens {2048 + x * (axis == 'prompt')}", args)
            }
            if args.peer:  # 16 or 64 completions at once, whichever is faster
                pieces = [micro for micro in (16, 64) if micro <= 8 * x]
                result[axis][x]["trl"] = fastest_trl(flags, args, pieces)
            print(
                axis,
                x,
                {who: round(r["seconds"], 2) for who, r in result[axis][x].items()},
                flush=True,
            )
    record("growth", result, args)
    picture(result)


def picture(result: dict) -> None:
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6))
    labels = {"group": "completions per prompt, G", "prompt": "prompt tokens, about"}
    for axis, (name, label) in zip(axes, labels.items()):
        for who in ("ours", "trl"):
            points = [(x, r[who]["seconds"]) for x, r in result[name].items() if who in r]
            if points:
                axis.plot(*zip(*points), "o-", label={"ours": "this project", "trl": "TRL"}[who])
        axis.set_xlabel(label)
        axis.set_ylabel("seconds per step")
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(RESULTS / "growth.png", dpi=110)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        prog="python -m bench",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--crm", default="demo/crm")
    parser.add_argument(
        "--random-model", choices=SIZES, help="a random model instead of --crm, in build/"
    )
    parser.add_argument("--flags", help="flags of every run, ours and TRL's")
    parser.add_argument(
        "--ours", default="", help="flags of our runs only, e.g. --ours=--no-cuda-graphs"
    )
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
    args = parser.parse_args()
    if args.peer and not Path(args.peer_python).exists():
        parser.error(f"--peer-python {args.peer_python}: not there; make bench-trl makes it")
    if args.flags is None:
        args.flags = AT_SIZE.get(args.random_model, "")
    if args.random_model:
        args.crm = f"build/random-{args.random_model}"
        args.ours = "--pack-tokens 10240 " + args.ours
        if not Path(args.crm).exists():
            measure(
                sys.executable, "-m", "bench.random_model", args.random_model, "--out", args.crm
            )
    if args.parity:
        close(args)
    elif args.scaling:
        scaling(args)
    elif args.roofline:
        roofline(args)
    elif args.growth:
        growth(args)
    elif args.peer:
        pairs(args)
    else:
        switches(args)
