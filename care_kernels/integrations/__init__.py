"""One call each that puts these losses into TRL's GRPOTrainer, transformers' Trainer, verl's actor.

Nothing here is imported by `import care_kernels`; each module needs what it is named after, but
for `verl`, which needs torch alone.
"""
