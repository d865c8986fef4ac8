"""Files that models come in: weights, configurations, tokenizers."""
