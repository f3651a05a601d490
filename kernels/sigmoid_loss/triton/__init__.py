"""The Triton kernels and the host code that launches them. Importing the package imports no Triton."""
