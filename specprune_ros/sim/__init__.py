"""LIBERO's scenes as an environment, without ROS and without torch.

`tasks` names what can be done, `libero.LiberoEnv` runs one task, `expert` solves the tasks that a
model is trained on, `collect` writes its demonstrations as `dataset` says, and
`closed_loop.LiberoTask` puts a policy through a task. Only `libero` needs the simulator:
the extra `sim`, or scripts/setup_sim.sh.
"""
