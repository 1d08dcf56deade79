"""Algorithm 1 as a trainer: DeepSpeed optimisation, rollouts, verifier, evaluation, reports."""

__version__ = "0.1.0"
