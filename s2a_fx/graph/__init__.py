"""The graph of a model: how it is captured, what its nodes compute, and how it is edited."""
