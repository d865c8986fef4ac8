"""Who chooses the strategy of a decode call."""
