"""The conversation on a terminal: its state (session) and its screen (terminal)."""
