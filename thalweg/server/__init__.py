"""HTTP in front of an engine: fields, streams, errors, usage. Computes nothing."""
