"""Every fault that the nodes count: its code, number and meaning. One list for logs and messages.

Numbers are for messages and never change; 1xx configuration, 2xx inputs, 3xx inference, 4xx
pruning, 5xx commands, 6xx the system around the node.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Fault:
    """One kind of fault.

    Attributes:
        number: in messages (`fault_code`, `error_code`).
        meaning: what happened and what the node does about it.
    """

    number: int
    meaning: str


FAULTS: dict[str, Fault] = {
    # 1xx configuration
    'error': Fault(100, 'something failed that has no code of its own'),
    'config': Fault(101, 'a parameter is bad: the old value stays, or configure fails'),
    'checkpoint': Fault(102, 'model files are missing or broken: configure fails'),
    'dependency': Fault(103, 'a Python package is missing: configure fails'),
    'configure': Fault(104, 'configure failed unexpectedly: the node stays unconfigured'),
    'activate': Fault(105, 'activate failed: the node stays inactive'),
    'transition': Fault(106, 'a transition failed: the node becomes unconfigured'),
    'recording': Fault(107, 'a recording cannot be read'),
    # 2xx inputs: the message is refused or the query skipped, and the next good one serves
    'camera_missing': Fault(201, 'a camera never sent an image: no inference'),
    'camera_stale': Fault(202, 'the newest image of a camera is too old: no inference'),
    'camera_resized': Fault(203, 'a camera changed its image size: a new episode is needed'),
    'image_empty': Fault(209, 'an image without pixels'),
    'image_shape': Fault(204, 'an image whose size and data do not fit'),
    'image_encoding': Fault(205, 'an image encoding that is not for colour images'),
    'image_step': Fault(206, 'rows that are shorter than the image is wide'),
    'image_truncated': Fault(207, 'an image that ends early or cannot be decoded'),
    'image_color': Fault(208, 'a compressed image that does not decode to colours'),
    'joint_missing': Fault(211, 'no joint state, or one that lacks a joint'),
    'joint_stale': Fault(212, 'the newest joint state is too old'),
    'joint_width': Fault(213, 'a joint state whose names and positions differ in number'),
    'joint_not_finite': Fault(214, 'a joint position that is not finite'),
    'pose_missing': Fault(221, 'no end-effector pose'),
    'pose_stale': Fault(222, 'the newest end-effector pose is too old'),
    'pose_not_finite': Fault(223, 'an end-effector pose that is not finite'),
    'pose_quaternion': Fault(224, 'an orientation that is no rotation'),
    'pose_frame': Fault(225, 'an end-effector pose in another frame than the commands'),
    'instruction_missing': Fault(231, 'no instruction'),
    'instruction_empty': Fault(232, 'an empty instruction: the former one stays'),
    'instruction_too_long': Fault(233, 'an instruction that the model cannot take'),
    'instruction_refused': Fault(235, 'an instruction while another task runs, or none may'),
    'instruction_encoding': Fault(234, 'an instruction with characters that are none'),
    'action_names': Fault(236, 'an executed action of other elements than the robot has: ignored'),
    'action_not_finite': Fault(237, 'an executed action that is not finite: ignored'),
    'stamp_missing': Fault(241, 'a header stamp of 0: the time of receipt is taken'),
    # 3xx inference
    'inference': Fault(301, 'an inference raised: this query gives no chunk'),
    'late': Fault(302, 'a chunk came too late for its observation: it is discarded'),
    'hung': Fault(303, 'an inference outlived its deadline: stopped until ~/reset'),
    'out_of_memory': Fault(304, 'an inference ran out of memory: this query gives no chunk'),
    'action': Fault(305, 'the model gave an action that is not finite: no chunk'),
    # 4xx pruning
    'pruning': Fault(401, 'pruning failed: the query ran dense'),
    'guard': Fault(402, 'the pruning guard relaxed pruning'),
    # 5xx commands, in action_streamer and sim_node
    'chunk_not_finite': Fault(501, 'a chunk with NaN or infinity: refused whole'),
    'chunk_shape': Fault(502, 'a chunk of another width or horizon: refused whole'),
    'chunk_names': Fault(503, "a chunk whose names or units are not the robot's: refused whole"),
    'chunk_step_dt': Fault(504, 'a chunk of another control period: refused whole'),
    'chunk_space': Fault(505, 'a chunk of another action space or frame: refused whole'),
    'chunk_epoch': Fault(506, 'a chunk of another epoch: discarded'),
    'chunk_stale': Fault(507, 'a chunk whose observation is too old: discarded'),
    'chunk_stand_in': Fault(508, 'a chunk of random stand-in weights: never sent'),
    'chunk_dry_run': Fault(509, 'a chunk marked as not to be executed: never sent'),
    'chunk_stamp': Fault(510, 'a chunk stamped in the future: discarded'),
    'position_limit': Fault(511, 'a command beyond a position limit: refused or clamped'),
    'velocity_limit': Fault(512, 'a command beyond a velocity limit: refused or clamped'),
    'step_limit': Fault(513, 'a command too far from the one before: refused or clamped'),
    'initial_step': Fault(514, 'a first command too far from the measured state: refused'),
    'tracking_error': Fault(515, 'the arm does not follow its commands: disabled'),
    'starved': Fault(521, 'no chunk in time for the next control step: safety output'),
    'task_ended': Fault(
        522, 'the task ended or another began while commands went out: safety output'
    ),
    'command_width': Fault(531, 'a command with too few or too many numbers: ignored'),
    'command_not_finite': Fault(532, 'a command that is not finite: ignored'),
    # 6xx the system
    'clock_jump': Fault(601, 'the clock went backwards: buffers are dropped'),
    'peer_gone': Fault(602, 'the node at the other end is gone'),
    'subscriber_gone': Fault(603, 'nobody reads what is published'),
    'qos_incompatible': Fault(604, 'a peer whose quality of service does not match'),
    'e_stop': Fault(611, 'emergency stop'),
}


def number(code: str) -> int:
    """The number of a fault.

    Raises:
        KeyError: no such fault.
    """
    return FAULTS[code].number
