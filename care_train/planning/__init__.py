"""`care-train plan`: memory and time of a run, from its configuration alone.

Nothing is loaded: the architecture is built on the meta device. Each formula stands in one
function, whose docstring names its source.
"""
