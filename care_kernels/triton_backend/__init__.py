"""Triton kernels for one chunk of rows: each file holds one step, its kernel and its launcher.

From a chunk of float32 logits:

- `row_statistics`: log-prob, normaliser, entropy and exact KL of each row.
- `logit_gradients`: the loss's derivative with respect to the raw logits.

Without ever holding float32 logits (the first choice, where `fused_projection.supports` says so):

- `fused_projection`: hidden x head, with each vocabulary tile's statistics read in the GEMM's
  epilogue.
- `tile_statistics`: those of each row, from its tiles.
- `exp_gradients`: the epilogue's exponentials turned into the derivative, in place.

Beside both:

- `row_objective`: Eqs. 12-13 of each row, with the derivative with respect to its log-prob.
- `region_weights`: Eq. 11, spans to token advantages.
- `rationale_distance`: Eq. 4, span means and their cosine distance.
- `transforms`: scale, softcap and temperature inside a kernel; expm1 and tanh.
- `launching`: what the launchers share: overlap checks and interpreter detection.
- `compile_cases`: every kernel at real shapes, to be compiled ahead of time without a GPU.
"""
