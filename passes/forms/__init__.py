"""What `CompressActivations` puts in the place of a node: a file for each kind of operator, how it is found and how replaced."""
