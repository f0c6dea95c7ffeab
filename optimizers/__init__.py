"""Optimisers that torch.optim lacks, one per file."""
