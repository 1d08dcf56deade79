"""One call each that puts these losses into other people's trainers.

    care_kernels.integrations.trl            TRL's GRPOTrainer
    care_kernels.integrations.transformers   a model trained by transformers' Trainer
    care_kernels.integrations.verl           verl's actor

Nothing here is imported by `import care_kernels`; each module needs what it is named after, but
for `verl`, which needs torch alone.
"""
