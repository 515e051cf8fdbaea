"""Triton twins of the operations in ``lowrank_optim.ops``: same names, same signatures, one a file."""
