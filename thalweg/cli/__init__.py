"""One file per verb. Verbs import what they need when they run."""
