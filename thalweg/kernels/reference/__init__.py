"""Plain torch, one file per op, reading like the equations: the twin of every other backend."""
