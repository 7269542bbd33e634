"""The oracle: the same weights in JAX and in an independent PyTorch model, compared in causal order.

`ladder.compare` is the whole comparison: a candidate (`candidate.py`, our model), a
reference (`reference.py`, torchref) and the rungs (`rungs/`, one file each) give a
`results.Report`. `noise.py` says what counts as different.
"""
