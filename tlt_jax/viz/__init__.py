"""All that is looked at: plots, trees, timelines, the report."""
