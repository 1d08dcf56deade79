"""Triton kernels for one chunk of rows.

- `projection`: hidden x head; the GEMM's epilogue reads each row's softmax statistics from the
  float32 products, so that no float32 logits are ever stored.
- `softmax`: each row's statistics from its tiles', and the epilogue's exponentials turned into the
  loss's derivative, in place.
- `launch`: what these share: interpreter detection, the logits' transform in a kernel.

The kernels of Eqs. 4 and 11 stand beside their torch code, in `care_kernels.rationale_distance` and
`care_kernels.region_weights`.
"""
