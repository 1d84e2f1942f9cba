"""Faster versions of the network's mathematics. Each is checked against plain PyTorch, which serves where none fits."""
