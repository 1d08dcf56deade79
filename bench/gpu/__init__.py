"""Check and measure `care_kernels` on a GPU: `python -m bench.gpu`."""
