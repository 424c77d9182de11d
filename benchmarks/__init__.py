"""What measures llava-weights and what else does the job, and the synthetic checkpoints for it, which tests use too."""
