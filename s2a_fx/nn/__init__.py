"""The modules that passes insert into a graph."""
