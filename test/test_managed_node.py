"""What all lifecycle nodes share, in this process."""

import pytest

pytest.importorskip('rclpy', reason='rclpy is missing: run scripts/setup.sh')
pytest.importorskip('specprune_ros.msg', reason='messages are not built: run scripts/setup.sh')

from rclpy.clock import ClockType
from rclpy.lifecycle import node as rclpy_node
from rclpy.parameter import Parameter
from ros_world import ros_domain

from specprune_ros.ros.lifecycle import ERROR, SUCCESS, ManagedNode
from specprune_ros.ros.process import control_clock
from specprune_ros.ros.streamer_node import StreamerNode
from specprune_ros.ros.vla_node import VlaNode

pytestmark = pytest.mark.ros


class Still(ManagedNode):
    """Does nothing, and remembers faults."""

    def __init__(self, **kwargs):
        super().__init__('still', **kwargs)
        self.faults: list[str] = []

    def _set_up(self) -> None: ...

    def _start(self) -> None: ...

    def _halt(self) -> None: ...

    def _tear_down(self) -> None: ...

    def _fault(self, code: str, message: str, log: str = '') -> None:
        self.faults.append(code)


@pytest.fixture(autouse=True, scope='module')
def context():
    with ros_domain(43):
        yield


@pytest.fixture
def make():
    nodes = []

    def make_node(kind, *parameters):
        nodes.append(kind(parameter_overrides=[Parameter(n, value=v) for n, v in parameters]))
        return nodes[-1]

    yield make_node
    for node in nodes:
        node.destroy_node()


def raises(self, transition_id):
    raise RuntimeError('Transition is not registered')


def test_a_transition_that_does_not_fit_ends_no_process(make, monkeypatch):
    """Bug: on Humble and Jazzy it raised in the executor; rclpy there is as `raises`."""
    node = make(Still)
    with monkeypatch.context() as patch:
        older = '_LifecycleNodeMixin__change_state'
        patch.setattr(rclpy_node.LifecycleNodeMixin, older, raises)
        assert node.trigger_activate() is ERROR
    assert node.faults == ['transition']
    assert node.trigger_configure() is SUCCESS


@pytest.mark.parametrize('simulated', [False, True])
def test_the_control_loop_follows_simulated_time_or_one_that_nobody_sets_back(make, simulated):
    """Bug: a timer on the system's clock stood still while that caught up with itself."""
    node = make(Still, ('use_sim_time', simulated))
    wanted = ClockType.ROS_TIME if simulated else ClockType.STEADY_TIME
    assert control_clock(node).clock_type == wanted


ARM = (
    ('robot.action_names', ['a']), ('robot.action_space', 'joint_position'),
    ('robot.action_units', ['rad']), ('stream.output', 'joint_trajectory'),
    ('robot.translation_names', ['']), ('robot.rotation_names', ['']),
    ('robot.step_dt_s', 0.0317),
)  # fmt: skip


def test_the_streamers_loop_is_on_that_clock(make):
    node = make(StreamerNode, *ARM)
    assert node.trigger_configure() is SUCCESS
    assert node.trigger_activate() is SUCCESS
    loops = [timer for timer in node.timers if timer.timer_period_ns == 31_700_000]
    assert [timer.clock.clock_type for timer in loops] == [ClockType.STEADY_TIME]
    assert node.trigger_cleanup() is ERROR, 'not while it is active'
    assert node.trigger_deactivate() is SUCCESS


@pytest.mark.parametrize('topic', ['{foo}/b', '/a b', '~/{node'])
def test_a_topic_that_cannot_be_is_refused_at_configure(make, topic):
    """Bug: an unknown substitution was found at activate, and left a subscription behind."""
    node = make(VlaNode, ('robot.camera_names', ['side']), ('robot.camera_topics', [topic]))
    told = []
    node._fault = lambda code, message, log='': told.append((code, message))
    assert node.trigger_configure() is not SUCCESS
    assert told[0][0] == 'config'
    assert topic in told[0][1]
