"""What is configured: the model's config.json -> ModelConfig, and engine options. No torch."""
