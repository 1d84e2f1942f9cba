"""What the model is taught in conversations and tested on: one file a task; mixtures.py for training."""
