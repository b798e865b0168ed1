"""Requests to tokens: scheduler, batch, runner, sampler, and their thread. `runtime` puts it together."""
