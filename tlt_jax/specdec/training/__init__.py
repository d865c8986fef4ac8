"""How a drafter learns: the loss, its unrolled steps, its pieces."""
