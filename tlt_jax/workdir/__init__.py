"""All that a run's directory holds."""
