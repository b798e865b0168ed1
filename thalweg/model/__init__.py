"""The V4 forward pass, reading like the paper. Takes StepInputs and cache rows; knows no requests."""
