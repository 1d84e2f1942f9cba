"""Generating text: `Engine` for everybody, `KVCache` for people who call the model themselves."""

from nanochat.engine.calculator import use_calculator
from nanochat.engine.engine import Completion, Engine
from nanochat.engine.kv_cache import KVCache
from nanochat.engine.sampling import Sampling

__all__ = ["Completion", "Engine", "KVCache", "Sampling", "use_calculator"]
