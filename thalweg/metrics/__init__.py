"""Counters and histograms in Prometheus form, fed with plain values by the server."""
