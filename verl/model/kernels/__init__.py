"""Triton kernels of the modules of the same names, imported only on a GPU or by Triton's interpreter."""
