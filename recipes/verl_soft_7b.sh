#!/bin/sh
# recipes/soft_7b.args on verl 0.9, on 64 GPUs of 80 GB. verl needs an environment of its own:
#   pip install "verl[vllm]==0.9.1"
# Start Ray over all nodes first (ray start --head; on the others ray start --address HOST:6379).
# Then, from the root of this repository, which every node has under the same path, once:
#   python -m extras.engines --data U-MRG-14K --split train --out train.parquet --resize square:840
#   python -m extras.engines --data U-MRG-14K --split test --out test.parquet --resize square:840
#   sh recipes/verl_soft_7b.sh            # flags given here win, as in: ... trainer.nnodes=1
# And back:
#   python -m verl.model_merger merge --backend fsdp \
#       --local_dir runs/verl_soft_7b/global_step_480/actor --target_dir merged
#   python evaluate.py --crm merged --data U-MRG-14K --resize square:840
# `# --lr` names our flag. `make test-verl` checks all names against verl's own configuration. This
# recipe has not run on GPUs.
set -e
set -- \
    actor_rollout_ref.model.path=lingshu-medical-mllm/Lingshu-7B        `# --crm` \
    data.train_files="$PWD/train.parquet"                               `# --data` \
    data.val_files="$PWD/test.parquet" \
    reward.custom_reward_function.path="$PWD/extras/engines.py" \
    reward.custom_reward_function.name=compute_score \
    +reward.custom_reward_function.reward_kwargs.mode=soft              `# --mode` \
    algorithm.adv_estimator=grpo \
    algorithm.norm_adv_by_std_in_grpo=True                              `# --norm group` \
    algorithm.use_kl_in_reward=False \
    trainer.total_training_steps=480                                    `# --steps` \
    trainer.total_epochs=100 \
    data.train_batch_size=128                                           `# --prompts` \
    actor_rollout_ref.rollout.n=16                                      `# --group` \
    actor_rollout_ref.actor.ppo_mini_batch_size=64                      `# --minibatches 2` \
    actor_rollout_ref.actor.ppo_epochs=1                                `# --inner-epochs` \
    data.max_response_length=2048                                       `# --max-new-tokens` \
    data.max_prompt_length=2048         `# 900 image tokens and the text; ours never cuts` \
    actor_rollout_ref.rollout.temperature=1.0                           `# --temperature` \
    actor_rollout_ref.actor.optim.lr=1e-6                               `# --lr` \
    actor_rollout_ref.actor.optim.lr_scheduler_type=constant            `# --schedule` \
    actor_rollout_ref.actor.optim.lr_warmup_steps=0                     `# --warmup` \
    actor_rollout_ref.actor.optim.weight_decay=0.01                     `# --weight-decay` \
    actor_rollout_ref.actor.optim.clip_grad=1.0         `# MAX_GRAD_NORM of runtime/optim.py` \
    actor_rollout_ref.actor.loss_agg_mode=seq-mean-token-mean           `# --agg sequence` \
    actor_rollout_ref.actor.clip_ratio_low=0.2                          `# --clip-low` \
    actor_rollout_ref.actor.clip_ratio_high=0.2                         `# --clip-high` \
    actor_rollout_ref.actor.clip_ratio_c=3.0                            `# --dual-clip` \
    actor_rollout_ref.actor.use_kl_loss=True \
    actor_rollout_ref.actor.kl_loss_coef=0.01                           `# --kl-coef` \
    actor_rollout_ref.actor.kl_loss_type=low_var_kl                     `# --kl k3` \
    actor_rollout_ref.actor.entropy_coeff=0                             `# --entropy-coef` \
    actor_rollout_ref.actor.freeze_vision_tower=False                   `# --trainable` \
    actor_rollout_ref.model.enable_gradient_checkpointing=True          `# --checkpointing` \
    actor_rollout_ref.actor.use_dynamic_bsz=True \
    actor_rollout_ref.actor.ppo_max_token_len_per_gpu=16384             `# --pack-tokens` \
    actor_rollout_ref.rollout.name=vllm \
    actor_rollout_ref.rollout.tensor_model_parallel_size=1 \
    trainer.nnodes=8 \
    trainer.n_gpus_per_node=8 \
    trainer.default_local_dir=runs/verl_soft_7b                         `# --out` \
    trainer.rollout_data_dir=runs/verl_soft_7b/rollouts \
    trainer.save_freq=100                                               `# --save-every` \
    trainer.test_freq=50                                                `# --eval-every` \
    'trainer.logger=[console]'                                          `# --track` \
    "$@"
exec ${VERL:-python3 -m verl.trainer.main_ppo} "$@"
