"""Measures any OpenAI-compatible endpoint from outside: imports nothing of the engine."""
