"""From action chunks to commands that may leave for a robot. No ROS, no torch.

```
chunk    chunk_checks -> queue (which row is due, blending)
                           |
arm      measured ---> player <-> motion (row -> displacement -> target), limits, grippers
                           |
orders   states, peer -> streamer -> targets.Command, or the one targets.Safety
```
"""
