"""The physical cache: bytes of a row, bytes of the pools, the arena that holds them. Knows no tokens."""
