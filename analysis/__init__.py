"""Reads graphs and never edits them: what autograd keeps, for how long, and what a whole step peaks at."""
