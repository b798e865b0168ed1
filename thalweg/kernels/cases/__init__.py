"""Inputs of ops, at named shapes: `checks` holds small ones with edges, `workloads` those that a served model meets."""
