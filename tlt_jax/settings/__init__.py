"""One description of every setting: meaning, unit, range, default, checks."""
