"""What to record of a robot that runs our nodes.

Enough to replay a run, to calibrate on it, to check it bit for bit, and to report a bug. No ROS:
launch/record.launch.py starts the recorder.
"""

from __future__ import annotations

from collections.abc import Collection

from specprune_ros.config import RobotConfig

# rosbag2's words for a subscription's quality of service. Best effort and volatile take from any
# publisher; the latched ones would lose what was said before the recorder came.
STREAM = {'history': 'keep_last', 'depth': 64, 'reliability': 'best_effort'}
RELIABLE = {'history': 'keep_last', 'depth': 64, 'reliability': 'reliable'}
LATCHED = {**RELIABLE, 'durability': 'transient_local'}
NODES = ('vla_node', 'action_streamer')  # whose parameters belong to a recording
OF_THE_ROBOT = {
    'joint_states': STREAM,
    'eef_pose': STREAM,
    'executed_action': RELIABLE,
    'e_stop': LATCHED,
    'vla_node/instruction': LATCHED,
    'vla_node/action_chunk': RELIABLE,
    'vla_node/pruning': RELIABLE,
    'vla_node/status': LATCHED,
    'vla_node/model_info': LATCHED,
    'action_streamer/status': LATCHED,
}
OF_THE_DOMAIN = {'/diagnostics': RELIABLE, '/rosout': RELIABLE, '/parameter_events': RELIABLE}


def full_name(name: str, namespace: str = '') -> str:
    """A topic or node name as others see it: absolute ones stay, others get the namespace."""
    if name.startswith('/'):
        return name
    return '/'.join(('', *filter(None, namespace.split('/')), name))


def camera_topics(robot: RobotConfig, namespace: str = '') -> dict[str, str]:
    """Camera -> the topic that vla_node reads, transport included."""
    suffix = {'raw': '', 'compressed': '/compressed'}
    transports = robot.per_camera('camera_transports')
    return {
        camera: full_name(topic, namespace) + suffix[transports[camera]]
        for camera, topic in robot.image_topics().items()
    }


def recorded_cameras(topics: Collection[str], robot: RobotConfig) -> dict[str, str]:
    """Camera -> the recorded topic that a robot's vla_node reads, as far as they can be told.

    In either transport, the configured one first; in any namespace, where only one topic ends so.

    Args:
        topics: that were recorded.
        robot: names the cameras.
    """
    found = {}
    names, configured = robot.image_topics(), camera_topics(robot)
    for camera, name in names.items():
        base = full_name(name)
        for wanted in dict.fromkeys((configured[camera], base, f'{base}/compressed')):
            anywhere = not name.startswith('/') and wanted not in topics
            fits = [one for one in topics if one == wanted or (anywhere and one.endswith(wanted))]
            if len(fits) == 1:
                found.setdefault(camera, fits[0])
    return found


def recorded_topics(robot: RobotConfig, namespace: str = '') -> dict[str, dict[str, object]]:
    """Topic -> quality of service to subscribe with, in rosbag2's words.

    Args:
        robot: names the cameras.
        namespace: of the nodes.
    """
    images = {full_name(topic, namespace) for topic in robot.image_topics().values()}
    infos = {f'{topic.rpartition("/")[0]}/camera_info' for topic in images}
    cameras = [*camera_topics(robot, namespace).values(), *sorted(infos)]
    own = {full_name(name, namespace): profile for name, profile in OF_THE_ROBOT.items()}
    return {**dict.fromkeys(cameras, STREAM), **own, **OF_THE_DOMAIN}
