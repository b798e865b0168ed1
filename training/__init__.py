"""Makes the embedded model's files; not part of the installed package."""
