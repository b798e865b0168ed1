"""What prompts for any endpoint are made of: text that is on every machine, and facts to hide in it."""
