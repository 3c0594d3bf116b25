"""The loop: SFT warm-up, GRPO, checkpoints."""
