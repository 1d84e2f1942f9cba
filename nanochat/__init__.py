"""nanochat: a chat model from nothing. Start at docs/tour.md."""

__version__ = "0.1.0"
