"""`token_cloud`: what pruning kept, as coloured points in the cameras' optical frames.

Reads vla_node's pruning reports and, per camera, an aligned depth image and its camera_info.
Nothing is computed while nobody looks. One PointCloud2 has one frame, so each camera has its own.
"""

from __future__ import annotations

import array
import sys
from collections import deque
from functools import partial

from diagnostic_msgs.msg import DiagnosticArray
from rcl_interfaces.msg import ParameterDescriptor
from rclpy.node import Node
from sensor_msgs.msg import CameraInfo, Image, PointCloud2, PointField

from specprune_ros.cloud import POINT, Camera, depth_from, token_points
from specprune_ros.errors import ConfigError, ObservationError, SpecPruneError
from specprune_ros.health import Health
from specprune_ros.msg import PruningDiagnostics
from specprune_ros.ros import conversions, diagnostics, qos
from specprune_ros.ros.process import shut_down_rclpy, spin_process
from specprune_ros.types import PruneReport

NS = 1_000_000_000
DEPTHS_KEPT = 32  # per camera: a second of them, as long as a query may take
DATATYPES = {'x': PointField.FLOAT32, 'y': PointField.FLOAT32, 'z': PointField.FLOAT32,
             'rgb': PointField.UINT32}  # fmt: skip
PARAMETERS = {
    'camera_names': ([''], 'cameras with depth, by their names in vla_node'),
    'depth_topics': ([''], 'their depth images; empty: cameras/<name>/depth/image_raw'),
    'camera_info_topics': ([''], 'of the depth images; empty: camera_info beside each'),
    'per_pixel': (False, 'a point per depth pixel instead of one per patch centre'),
    'show_pruned': (False, 'pruned patches, dark, as well'),
    'max_stamp_difference_s': (0.2, 'greatest distance of a depth image from its report'),
}


class CloudNode(Node):
    """Publishes ~/points/<camera>.

    Raises:
        ConfigError: no camera is named, or topics are not as many.
    """

    def __init__(self):
        super().__init__('token_cloud')
        for name, (default, text) in PARAMETERS.items():
            self.declare_parameter(name, default, ParameterDescriptor(description=text))
        self._health = Health()
        self._infos: dict[str, Camera] = {}
        self._depths: dict[str, deque[Image]] = {}
        self._sinks: dict[str, object] = {}
        topics = self._depth_topics()
        for camera, (depth, info) in topics.items():
            self._depths[camera] = deque(maxlen=DEPTHS_KEPT)
            self._sinks[camera] = self.create_publisher(
                PointCloud2, f'~/points/{camera}', qos.RELIABLE
            )
            on_depth, on_info = partial(self._on_depth, camera), partial(self._on_info, camera)
            self.create_subscription(Image, depth, on_depth, qos.SENSOR)
            self.create_subscription(CameraInfo, info, on_info, qos.SENSOR)
        self.create_subscription(
            PruningDiagnostics, 'vla_node/pruning', self._on_report, qos.REPORTS
        )
        self._diagnostics = self.create_publisher(DiagnosticArray, '/diagnostics', qos.DIAGNOSTICS)
        self.create_timer(diagnostics.PERIOD_S, self._publish_diagnostics)
        self.get_logger().info(f'cameras {", ".join(topics)}')

    def shut_down(self) -> bool:
        """No threads of its own."""
        return True

    def _value(self, name: str):
        return self.get_parameter(name).value

    def _depth_topics(self) -> dict[str, tuple[str, str]]:
        """Camera -> topics of its depth image and camera_info."""
        cameras, depths, infos = (
            [text for text in self._value(name) if text]
            for name in ('camera_names', 'depth_topics', 'camera_info_topics')
        )
        if not cameras:
            raise ConfigError('camera_names', cameras, 'names no camera')
        depths = depths or [f'cameras/{name}/depth/image_raw' for name in cameras]
        infos = infos or [f'{topic.rpartition("/")[0]}/camera_info' for topic in depths]
        for name, given in (('depth_topics', depths), ('camera_info_topics', infos)):
            if len(given) != len(cameras):
                raise ConfigError(name, given, f'must be as many as camera_names, {len(cameras)}')
        return dict(zip(cameras, zip(depths, infos, strict=True), strict=True))

    def _on_depth(self, camera: str, msg: Image) -> None:
        self._depths[camera].append(msg)

    def _on_info(self, camera: str, msg: CameraInfo) -> None:
        k = msg.k
        self._infos[camera] = Camera(k[0], k[4], k[2], k[5], msg.width, msg.height)

    def _on_report(self, msg: PruningDiagnostics) -> None:
        report = None
        for camera, sink in self._sinks.items():
            if sink.get_subscription_count() == 0:
                continue
            report = report or conversions.report_from_msg(msg)
            try:
                sink.publish(self._cloud(camera, report))
            except ObservationError as error:
                self._fault(error)

    def _cloud(self, camera: str, report: PruneReport) -> PointCloud2:
        """One camera's points.

        Raises:
            ObservationError: the report has no such camera, or depth or calibration is missing.
        """
        if camera not in report.cameras:
            raise ObservationError(
                'camera_missing', 'camera_names', camera, f'vla_node has {report.cameras}'
            )
        image = self._depth_near(camera, report.stamp_ns)
        if camera not in self._infos:
            raise ObservationError(
                'camera_missing', f'{camera}.camera_info', None, 'nothing came yet'
            )
        depth_m = depth_from(
            image.encoding, image.height, image.width, image.step, image.data,
            big_endian=bool(image.is_bigendian),
        )  # fmt: skip
        points = token_points(
            report, camera, depth_m, self._infos[camera],
            per_pixel=self._value('per_pixel'), show_pruned=self._value('show_pruned'),
        )  # fmt: skip
        return cloud_to_msg(points, image.header)

    def _depth_near(self, camera: str, stamp_ns: int) -> Image:
        """The depth image of the time that the report speaks of.

        Raises:
            ObservationError: there is none.
        """

        def distance_s(msg: Image) -> float:
            return abs(conversions.to_ns(msg.header.stamp) - stamp_ns) / NS

        if not self._depths[camera]:
            raise ObservationError('camera_missing', f'{camera}.depth', None, 'nothing came yet')
        nearest = min(self._depths[camera], key=distance_s)
        limit = self._value('max_stamp_difference_s')
        if distance_s(nearest) > limit:
            got = f'{distance_s(nearest):.3f} s off'
            raise ObservationError('camera_stale', f'{camera}.depth', got, f'limit {limit:g} s')
        return nearest

    def _fault(self, error: SpecPruneError) -> None:
        if self._health.fault(error.code, str(error)):
            self.get_logger().warning(str(error))

    def _publish_diagnostics(self) -> None:
        status = diagnostics.fault_status(diagnostics.node_name(self), self._health)
        now_ns = self.get_clock().now().nanoseconds
        self._diagnostics.publish(diagnostics.array(now_ns, '', [status]))


def cloud_to_msg(points, header) -> PointCloud2:
    """[n] POINT -> message; the array is the message's own layout, so it goes in as it is."""
    msg = PointCloud2(header=header, height=1, width=len(points), is_dense=True)
    msg.fields = [
        PointField(name=name, offset=POINT.fields[name][1], datatype=DATATYPES[name], count=1)
        for name in POINT.names
    ]
    msg.point_step, msg.row_step = POINT.itemsize, POINT.itemsize * len(points)
    msg.data = array.array('B', points.tobytes())
    return msg


def main(args: list[str] | None = None) -> int:
    """Process entry point; 2 when a parameter is bad."""
    try:
        return spin_process(lambda _: CloudNode(), args)
    except ConfigError as error:
        print(error, file=sys.stderr)
        shut_down_rclpy()
        return 2


if __name__ == '__main__':
    raise SystemExit(main())
