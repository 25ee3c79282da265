"""Which collectives a compiled train step runs, what the least would be, and what should not be there."""
