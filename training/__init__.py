"""How the built-in reader's weights are made: its first circuit, its training and its scores.

Not part of the installed package: run it from a checkout, see `scripts/train_reader`.
"""
