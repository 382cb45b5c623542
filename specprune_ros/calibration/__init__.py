"""Pruning parameters from a user's own recording; `specprune calibrate` is the command.

`thresholds` and `noise` need no model, only what was executed and seen; `layers` and `budget` read
the attention scores that `scan` records in one dense pass per query. `proposal` joins them to
parameters and `evidence` draws what they rest on. No published method does this.
"""
