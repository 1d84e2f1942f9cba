"""Faster versions of the network's mathematics, each checked against the plain PyTorch lines."""
