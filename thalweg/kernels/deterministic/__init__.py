"""Ops in which the bits of a row depend on nothing but the row (docs/decisions/005-deterministic-products.md).

Three rules. Every matrix product has a shape that the batch does not choose: 32 rows of any origin, zeros where there
are none. Sums over an axis that is not the last one are written as additions. Functions that torch computes with other
code at the end of a tensor (sigmoid, silu, softplus) are written with those that it does not (exp, log1p).
"""
