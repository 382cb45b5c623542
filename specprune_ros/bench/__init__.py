"""Measurements; no ROS, and nothing but torch, transformers and NumPy."""
