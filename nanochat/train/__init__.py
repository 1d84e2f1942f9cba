"""Training: one loop for every stage, its hooks, its log, and what survives a stop."""
