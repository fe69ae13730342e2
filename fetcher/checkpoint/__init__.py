"""Weights files: readers that run nothing, canonical names, facts, tensors on demand."""
