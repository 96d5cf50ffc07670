"""Triton kernels of the modules of the same names; imported only where there is a GPU, or for the interpreter."""
