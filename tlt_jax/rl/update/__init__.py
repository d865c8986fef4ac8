"""From rewards to new weights."""
