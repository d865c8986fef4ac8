"""The rollout engine: requests in, completions out."""
