"""What TRL, verl and EasyR1 call our flags: for the end of --help, and to answer an unknown flag."""

import difflib

FOREIGN_NAMES = {  # our flag: its names in TRL, verl and EasyR1; of a dotted name the last parts
    "crm": "model_name_or_path model.path model_path",
    "data": "dataset_name train_files",
    "out": "output_dir default_local_dir",
    "resume": "resume_from_checkpoint resume_mode",
    "steps": "max_steps total_training_steps num_train_epochs total_epochs",
    "prompts": "per_device_train_batch_size train_batch_size rollout_batch_size generation_batch_size",
    "batch": "per_device_train_batch_size train_batch_size global_batch_size",
    "micro_batch": "gradient_accumulation_steps ppo_micro_batch_size_per_gpu",
    "pack_tokens": "gradient_accumulation_steps ppo_micro_batch_size_per_gpu ppo_max_token_len_per_gpu",
    "group": "num_generations rollout.n",
    "inner_epochs": "num_iterations ppo_epochs",
    "minibatches": "steps_per_generation ppo_mini_batch_size global_batch_size",
    "max_new_tokens": "max_completion_length max_response_length",
    "lr": "learning_rate",
    "schedule": "lr_scheduler_type lr_warmup_style",
    "warmup": "warmup_steps lr_warmup_steps",
    "max_grad_norm": "grad_clip",
    "clip_low": "epsilon clip_ratio clip_ratio_low",
    "clip_high": "epsilon_high clip_ratio_high",
    "dual_clip": "delta clip_ratio_c clip_ratio_dual",
    "kl": "kl_loss_type kl_penalty",
    "kl_coef": "beta kl_loss_coef",
    "entropy_coef": "entropy_coeff",
    "agg": "loss_type loss_agg_mode loss_avg_mode",
    "norm": "scale_rewards norm_adv_by_std_in_grpo",
    "ratio": "importance_sampling_level",
    "mask_truncated": "mask_truncated_completions",
    "resample": "online_filtering filter_groups.enable",
    "weights": "reward_weights reward_funcs reward_function",
    "lora_rank": "lora_r lora.rank use_peft",
    "checkpointing": "gradient_checkpointing enable_gradient_checkpointing",
    "offload": "param_offload optimizer_offload offload_params offload_optimizer",
    "freeze_vision": "freeze_vision_tower freeze_vision_modules",
    "save_every": "save_steps save_freq",
    "eval_every": "eval_steps test_freq val_freq",
    "keep": "save_total_limit save_limit",
    "rollouts_every": "log_completions rollout_data_dir val_generations_to_log",
    "track": "report_to trainer.logger",
}


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def explain(word: str, names: list[str]) -> str:
    """One line about a word of the command line that is no flag of ours, with the flag that is meant."""
    name = word.partition("=")[0]
    parts = name.lstrip("-").replace("-", "_").split(".")
    spellings = {parts[-1], ".".join(parts[-2:])}
    ours = [n for n in names if n in spellings or spellings & set(FOREIGN_NAMES.get(n, "").split())]
    near = difflib.get_close_matches(parts[-1], names, 1)
    if ours:
        return f"unknown flag {name}: it is {flag(ours[0])} here"
    return f"unknown flag {name}: " + (f"did you mean {flag(near[0])}?" if near else "see --help")


def table(names) -> str:
    """The end of --help: the names of those of our flags that a script has."""
    rows = [
        f"  {flag(ours):20} {theirs}" for ours, theirs in FOREIGN_NAMES.items() if ours in names
    ]
    return "\n".join(["names in TRL, verl and EasyR1:", *rows])
