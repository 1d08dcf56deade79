"""Triton kernels for one chunk of rows.

- `projection`: hidden x head; the GEMM's epilogue reads each row's softmax statistics from the
  float32 products, so that no float32 logits are ever stored.
- `softmax`: the epilogue's exponentials turned into the loss's derivative, in place.
- `objective`: Eqs. 12-13 of each row, with the derivative with respect to its log-prob.
- `region_weights`: Eq. 11, spans to token advantages.
- `rationale_distance`: Eq. 4, span means and their cosine distance.
- `launch`: what these share: checks, interpreter detection, the logits' transform in a kernel.
"""
