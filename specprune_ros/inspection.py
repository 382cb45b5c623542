"""The shipped layouts of rqt, RViz and Foxglove, for one's own robot. No ROS."""

from __future__ import annotations

import re

from specprune_ros.config import RobotConfig
from specprune_ros.recordings.topics import full_name

# What the shipped layouts are for.
CAMERAS = ('wrist', 'side', 'overhead')
FRAME = 'base_link'
LAYOUTS = {
    'rqt_gui': 'specprune.perspective',
    'rviz2': 'specprune.rviz',
    'foxglove_bridge': 'foxglove_layout.json',
}
_OWN_NAME = re.compile(r'(?<![\w/])/(?=(?:vla_node|action_streamer|token_cloud)/)')
_CAMERA_TOPIC = re.compile(rf'(/(?:overlay|points)/)({"|".join(CAMERAS)})\b')


def adapted(layout: str, robot: RobotConfig, namespace: str = '') -> str:
    """A shipped layout with a robot's camera names, its frame and the nodes' namespace.

    Panels of cameras that the robot lacks stay as they are, and empty.

    Args:
        layout: text of the file.
        robot: whose cameras, in their order, take the panels' places.
        namespace: of the nodes.
    """
    names = dict(zip(CAMERAS, robot.camera_names, strict=False))
    layout = _CAMERA_TOPIC.sub(lambda m: m[1] + names.get(m[2], m[2]), layout)
    layout = layout.replace(FRAME, robot.frame_id or FRAME)
    return _OWN_NAME.sub(full_name('', namespace), layout)
