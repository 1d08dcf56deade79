"""Algorithm 1 as a trainer: DeepSpeed optimisation, rollouts, verifier, evaluation, reports."""
