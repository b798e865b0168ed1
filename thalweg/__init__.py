"""thalweg: a serving engine for DeepSeek-V4-family models at million-token context."""

__version__ = "0.1.0"
