"""Checkpoints on disk: parameter names as data, reading, loading, writing. Not the model that uses them."""
