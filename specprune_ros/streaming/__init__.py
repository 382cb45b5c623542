"""From action chunks to commands that may leave for a robot. No ROS, no torch.

chunk -> queue (which row is due) -> blending at the seam -> guards -> target on the wire.
"""
