"""Evaluation: bits per byte, CORE, and chat tasks."""
