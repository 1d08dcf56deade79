"""Triton kernels for one chunk of rows: `projection`, then `softmax`; `launch` is what they share.

Those of Eqs. 4 and 11 stand beside their torch code, in `care_kernels.rationale_distance` and
`care_kernels.region_weights`.
"""
