"""Asks any OpenAI-compatible endpoint questions with known answers, from outside: imports nothing of the engine."""
