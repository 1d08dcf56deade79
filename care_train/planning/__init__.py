"""`care-train plan`: a run's memory from its configuration alone.

Nothing is loaded: the architecture is built on the meta device. Each formula stands in one
function, whose docstring names its source; `bench.plan` compares them with measured memory.
"""
