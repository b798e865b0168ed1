"""The ops of a forward pass: signatures (ops), costs (spec), choice (registry), a folder per backend."""
