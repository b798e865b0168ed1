"""Text and tokens: tokenizer, chat encoding, parsing answers back. The only place that makes control tokens."""
