"""Predicts times and memory of serving a V4 model on a machine that need not be here. No torch."""
