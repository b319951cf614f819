"""A study: many runs of the other stages as one plan, with what is equal done once."""
