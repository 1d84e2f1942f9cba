"""The stages, one script each: python -m scripts.NAME."""
