"""MuonAdamW: Muon for the matrices, AdamW for the rest; one process or many, state sharded over ranks."""

from nanochat.optim.sharded import MuonAdamW

__all__ = ["MuonAdamW"]
