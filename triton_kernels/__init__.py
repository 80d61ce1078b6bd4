"""Triton kernels and their launchers: tensors in, tensors out.

They import nothing of the package above them.
"""
