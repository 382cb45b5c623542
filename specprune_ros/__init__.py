"""specprune_ros: pruned Vision-Language-Action inference for ROS 2."""

import pkgutil

# The messages that rosidl generates live in an installed package of this same name; extending the
# path lets `specprune_ros.msg` be found beside a source checkout.
__path__ = pkgutil.extend_path(__path__, __name__)
__version__ = '0.1.0'
