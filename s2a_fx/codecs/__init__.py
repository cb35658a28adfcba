"""How a saved tensor is coded into packed bits and decoded in the backward; one file a codec.

A codec is a small frozen object. `encode` gives the tensors to keep, `decode` takes them back, `nbytes` counts them.
"""
