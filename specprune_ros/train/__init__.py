"""Behaviour cloning of a small model of the OpenVLA-OFT architecture, from simulated data.

`data` reads demonstrations and still scenes, `network` is the served model's own modules with a
batched forward, `losses` and `trainer` train it, `gate` says whether it looks at what it is told,
and `export` writes a checkpoint folder in OpenVLA-OFT's layout. Needs torch; no ROS, no simulator.
"""
