"""Tensor parallelism: several processes run one model, led by the one that the caller is in.

The leader alone schedules, drafts and chooses tokens. It tells the others what it submits, which
drafts each pass verifies and which rows it keeps; each runs the same pass on its share of the
model, so that all hold the same tokens at every layer.
"""
