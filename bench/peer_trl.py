"""The same work by TRL's GRPOTrainer, in an environment of its own (make bench-trl).

    build/trl/bin/python -m bench.peer_trl --crm demo/crm --steps 4 --out build/peer.json

Same checkpoint, prompts, images (already resized, so the processor leaves them as they are), group
size, temperature, token limit, dtype, reward, KL coefficient with a reference, and AdamW on all
weights or on LoRA matrices. --micro is its per-device batch, and the rest is gradient accumulation,
so that its cheapest setting can be chosen. It samples with transformers' generate. With vLLM, which
needs a GPU, it is faster.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from extras.engines import export, reward, rows, trl_dataset

# Qwen's chat with one image and one text, as crm.CHAT writes it
TEMPLATE = (
    "{% for m in messages %}"
    "{% if loop.first %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ m.role }}\n"
    "{% if m.content is string %}{{ m.content }}{% else %}{% for part in m.content %}"
    "{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %}{{ part.text }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def allow_torchvision_on_cpu_torch() -> torch.library.Library | None:
    """Declares the two operators that torchvision's import needs, where torch is CPU-only.

    torchvision's published wheel looks for compiled operators that such a torch does not load. The
    library is returned because the registration lives as long as the reference to it."""
    if torch.version.cuda:
        return None
    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return library


def processor(path: str) -> Any:
    """Returns what TRL needs and a CRM's folder lacks: tokenizer, image and video processor and
    chat template in one."""
    from transformers import (
        AutoTokenizer,
        Qwen2_5_VLProcessor,
        Qwen2VLImageProcessor,
        Qwen2VLVideoProcessor,
    )

    images = Qwen2VLImageProcessor.from_pretrained(path, min_pixels=28 * 28, max_pixels=10**8)
    tokenizer = AutoTokenizer.from_pretrained(path, padding_side="left")
    return Qwen2_5_VLProcessor(images, tokenizer, Qwen2VLVideoProcessor(), chat_template=TEMPLATE)


def grpo_config(args: argparse.Namespace, folder: str) -> Any:
    """Returns TRL's configuration of the same step."""
    import trl

    has_gpu = torch.cuda.is_available()
    generation = None
    if args.force_length:
        generation = {"min_new_tokens": args.max_new_tokens}
    return trl.GRPOConfig(
        output_dir=folder,
        per_device_train_batch_size=args.micro,
        gradient_accumulation_steps=args.prompts * args.group // args.micro,
        num_generations=args.group,
        max_completion_length=args.max_new_tokens,
        temperature=1.0,
        beta=0.01,
        learning_rate=1e-6,
        lr_scheduler_type="constant",
        max_steps=args.steps,
        loss_type="grpo",
        delta=3.0,
        shuffle_dataset=False,
        use_cpu=not has_gpu,
        bf16=has_gpu,
        gradient_checkpointing=args.checkpointing,
        report_to=[],
        save_strategy="no",
        logging_steps=1,
        disable_tqdm=True,
        model_init_kwargs={"dtype": dtype_here()},  # of the reference model, which it loads itself
        generation_kwargs=generation,
    )


def dtype_here() -> torch.dtype:
    return torch.bfloat16 if torch.cuda.is_available() else torch.float32


def clock() -> Any:
    """Returns a callback of transformers' trainer that keeps the seconds of each step."""
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        def __init__(self) -> None:
            self.seconds: list[float] = []
            self.start = 0.0

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.start = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self.seconds.append(time.perf_counter() - self.start)

    return Clock()


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Trains a few steps. Returns what bench/__main__.py reads."""
    import trl
    from peft import LoraConfig
    from transformers import Qwen2_5_VLForConditionalGeneration

    from crm import LORA_TARGETS
    from data import load_prompt, load_samples
    from runtime.parallel import peak_memory

    # as ours, since the sequence has a new length at every token
    torch.backends.cuda.enable_cudnn_sdp(False)
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(args.crm, dtype=dtype_here())
    examples = load_samples(args.data)[: args.steps * args.prompts]
    lora = None
    if args.lora_rank > 0:
        alpha = 2 * args.lora_rank
        lora = LoraConfig(r=args.lora_rank, lora_alpha=alpha, target_modules=LORA_TARGETS)
    steps = clock()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "train.parquet"
        export(file, rows(examples, load_prompt(args.prompt), "train", args.resize))
        trainer = trl.GRPOTrainer(
            model=model,
            reward_funcs=reward,
            args=grpo_config(args, folder),
            train_dataset=trl_dataset(file),
            processing_class=processor(args.crm),
            callbacks=[steps],
            peft_config=lora,
        )
        trainer.train()
    logs = [row for row in trainer.state.log_history if "reward" in row]
    return {
        "trl": trl.__version__,
        "micro": args.micro,
        "seconds": steps.seconds,
        "peak_memory_gb": peak_memory(model.device),
        "length": [row["completions/mean_length"] for row in logs],
        "reward": [row["reward"] for row in logs],
        "kl": [row.get("kl") for row in logs],
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--crm", default="demo/crm")
    parser.add_argument("--data", default="demo/data")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--group", type=int, default=8)
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument(
        "--force-length", action="store_true", help="no completion ends before the limit"
    )
    parser.add_argument("--micro", type=int, default=64)
    parser.add_argument("--resize", default=f"aspect:{224 * 224}", help="of the embedded model")
    parser.add_argument("--prompt", default="reasoning")
    parser.add_argument("--lora-rank", type=int, default=0)
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--out", default="build/peer.json")
    args = parser.parse_args()
    library = allow_torchvision_on_cpu_torch()
    result = run(args)
    del library  # until here torchvision's operators are declared
    Path(args.out).write_text(json.dumps(result) + "\n", encoding="utf-8")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
