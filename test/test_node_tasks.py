"""Tasks of a real vla_node: every way to start, hold and end one, and what its clients hear."""

import time
from contextlib import contextmanager

import pytest

rclpy = pytest.importorskip('rclpy', reason='no ROS here: source one, or run scripts/test.sh')
pytest.importorskip('specprune_ros.msg', reason='messages are not built: run scripts/setup.sh')

from action_msgs.msg import GoalStatus  # noqa: E402
from action_msgs.srv import CancelGoal  # noqa: E402
from ros_world import CAMERAS, ros_domain  # noqa: E402
from std_msgs.msg import String  # noqa: E402
from std_srvs.srv import SetBool, Trigger  # noqa: E402
from task_world import FaultyProcess, TaskWorld  # noqa: E402

from specprune_ros.action import RunTask  # noqa: E402
from specprune_ros.ros import qos  # noqa: E402
from specprune_ros.ros.vla_model import fingerprint  # noqa: E402
from specprune_ros.srv import InferOnce, StartTask  # noqa: E402
from specprune_ros.tasks import EndReason, NodeState  # noqa: E402
from specprune_ros.types import Mode  # noqa: E402

# Robots' speed: all of it is slow.
pytestmark = [pytest.mark.ros, pytest.mark.slow, pytest.mark.timeout(120)]
ANSWER_LIMIT_S = 0.1  # within which services answer, whatever inference does
ABORTED, CANCELED = GoalStatus.STATUS_ABORTED, GoalStatus.STATUS_CANCELED
SUCCEEDED = GoalStatus.STATUS_SUCCEEDED


@pytest.fixture(autouse=True, scope='module')
def context():
    """One ROS domain for this file's tests and their processes."""
    with ros_domain(20):
        yield


@pytest.fixture(scope='module')
def shared():
    """An active node that all tests of this file share."""
    with FaultyProcess() as process:
        node = TaskWorld()
        node.activate()
        yield node
        assert process.process.poll() is None, process.output()
        assert 'Traceback' not in process.output().replace('ZeroDivisionError', '')
        node.destroy_node()


@pytest.fixture
def world(shared):
    """The node, idle and well."""
    shared.streams = {*CAMERAS, 'joints'}
    shared.behave('ok')
    shared.stop(False)
    assert shared.run(5.0, lambda: shared.trigger('reset').success)
    assert shared.reaches(NodeState.IDLE)
    shared.chunks.clear(), shared.reports.clear(), shared.feedback.clear()
    return shared


def in_flight(world, seconds: float = 0.3) -> None:
    """Begin a task of whose queries one is surely running."""
    world.behave(f'slow {seconds}')
    assert world.begin().accepted
    world.run(seconds / 2)


def silent(world, seconds: float = 0.5) -> bool:
    """Whether no chunk comes."""
    count = len(world.chunks)
    world.run(seconds)
    return len(world.chunks) == count


@contextmanager
def instructing(world):
    """Publishes instructions; a latched one would start a task again at the next activation."""
    publisher = world.create_publisher(String, 'vla_node/instruction', qos.LATCHED)
    yield lambda text: publisher.publish(String(data=text))
    world.destroy_publisher(publisher)


# Starting --------------------------------------------------------------------------------------


def test_nothing_is_published_without_a_task(world):
    assert silent(world)
    assert world.status.task_id == 0 or world.state is NodeState.IDLE


def test_chunks_carry_the_epoch_of_the_status(world):
    before = world.status.epoch
    assert world.begin('lift').accepted
    assert world.more_chunks(3)
    assert world.state is NodeState.RUNNING
    assert world.status.instruction == 'lift'
    epochs = {*(chunk.epoch for chunk in world.chunks), *(r.epoch for r in world.reports)}
    assert epochs == {world.status.epoch}
    assert world.status.epoch > before


@pytest.mark.parametrize(
    ('request_fields', 'words'),
    [
        ({'instruction': ' '}, 'must say a task'),
        ({'instruction': 'go', 'max_duration_s': -1.0}, 'max_duration_s = -1.0'),
        ({'instruction': 'go', 'max_duration_s': float('nan')}, 'max_duration_s = nan'),
    ],
)
def test_a_bad_goal_is_refused(world, request_fields, words):
    answer = world.call(StartTask, 'start_task', StartTask.Request(**request_fields))
    assert not answer.accepted
    assert answer.task_id == 0
    assert words in answer.message
    assert not world.send(**request_fields).accepted


def test_one_task_at_a_time(world):
    first = world.begin()
    assert first.accepted
    second = world.begin()
    assert not second.accepted
    assert f'task {first.task_id} runs' in second.message
    assert not world.send().accepted
    with instructing(world) as instruct:
        instruct('something else')
        assert world.run(5, lambda: world.faults.get('instruction_refused', 0) > 0)
    assert world.status.task_id == first.task_id


def test_an_instruction_is_a_task_without_end(world):
    with instructing(world) as instruct:
        instruct('sort the cups')
        assert world.reaches(NodeState.RUNNING)
        assert world.status.instruction == 'sort the cups'
        epoch = world.status.epoch
        instruct('sort the bowls')
        assert world.run(5, lambda: world.status.instruction == 'sort the bowls')
        assert world.status.epoch > epoch
        assert world.trigger('cancel_task').success
        assert world.reaches(NodeState.IDLE)


# Ending ----------------------------------------------------------------------------------------


def test_complete(world):
    handle = world.send(max_steps=5)
    world.streams.add('executed')
    status, result = world.outcome(handle)
    assert (status, result.termination_reason) == (SUCCEEDED, EndReason.COMPLETED)
    assert '5 control steps' in result.message
    assert result.error_code == 0


def test_timeout(world):
    handle = world.send(max_duration_s=0.5)
    start = time.monotonic()
    status, result = world.outcome(handle)
    print(f'a task of 0.5 s ended after {time.monotonic() - start:.2f} s')
    assert (status, result.termination_reason) == (ABORTED, EndReason.TIMEOUT)
    assert '0.5 s' in result.message


def test_stale_input(world):
    handle = world.send()
    assert world.more_chunks(2)
    world.streams.discard('side')
    start = time.monotonic()
    assert world.run(5, lambda: 'cameras/side' in world.status.waiting_for)
    print(f'a silent camera was named {time.monotonic() - start:.2f} s after its last image')
    status, result = world.outcome(handle)
    assert (status, result.termination_reason) == (ABORTED, EndReason.STALE_INPUT)
    assert 'cameras/side' in result.message
    assert result.error_code == 202
    assert any('cameras/side' in each.waiting_for for each in world.feedback)


def test_canceled_by_its_client(world):
    handle = world.send()
    assert world.more_chunks(2)
    status, result = world.ends(handle, handle.cancel_goal_async)
    assert (status, result.termination_reason) == (CANCELED, EndReason.CANCELED)
    assert result.message
    assert silent(world)


@pytest.mark.parametrize('service', ['cancel_task', 'reset'])
def test_canceled_by_a_service(world, service):
    handle = world.send()
    epoch = world.status.epoch
    status, result = world.ends(handle, lambda: world.trigger(service))
    assert (status, result.termination_reason) == (ABORTED, EndReason.CANCELED)
    assert result.message
    assert world.run(5, lambda: world.status.epoch > epoch)
    assert world.state is NodeState.IDLE


def test_emergency_stop_overrides_all(world):
    handle = world.send()
    assert world.more_chunks(1)
    status, result = world.ends(handle, world.stop)
    assert (status, result.termination_reason) == (ABORTED, EndReason.ESTOP)
    assert result.error_code == 611
    assert world.reaches(NodeState.STOPPED)
    assert silent(world)
    assert not world.begin().accepted
    assert 'e_stop is true' in world.trigger('reset').message
    world.stop(False)
    world.run(0.2)
    assert world.state is NodeState.STOPPED
    assert 'reset' in world.begin().message
    assert world.trigger('reset').success
    assert world.begin().accepted
    assert world.more_chunks(1)


def test_deactivated_and_the_task_is_not_resumed(world):
    handle = world.send()
    assert world.more_chunks(1)
    status, result = world.ends(handle, lambda: world.lifecycle.change('deactivate'))
    assert (status, result.termination_reason) == (ABORTED, EndReason.DEACTIVATED)
    assert 'activate it' in world.begin().message
    assert not world.send().accepted
    assert world.lifecycle.change('activate')
    assert world.reaches(NodeState.IDLE)
    assert silent(world)


# Cancel races ----------------------------------------------------------------------------------


def test_cancel_within_the_accept_window(world):
    """All goals are canceled before the client knows whether its own was accepted."""
    goal = world.goals.send_goal_async(RunTask.Goal(instruction='go'))
    everything = CancelGoal.Request()  # no id and no stamp: all goals
    world.call(CancelGoal, 'run_task/_action/cancel_goal', everything)
    assert world.run(5, goal.done)
    handle = goal.result()
    if world.state is NodeState.RUNNING:  # the cancel came first, so there was nothing to cancel
        world.ends(handle, handle.cancel_goal_async)
    else:
        assert world.outcome(handle)[0] == CANCELED
    assert silent(world)


def test_a_stale_cancel_never_stops_the_next_goal(world):
    first = world.send()
    world.ends(first, first.cancel_goal_async)
    second = world.send()
    assert second.accepted
    first.cancel_goal_async()
    world.run(0.3)
    assert world.state is NodeState.RUNNING
    assert world.more_chunks(2)


# In flight -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    'act',
    [
        'pause',
        'e_stop',
        *(
            pytest.param(act, marks=pytest.mark.slow)
            for act in ('cancel_task', 'reset', 'deactivate')
        ),
    ],
)
def test_what_is_in_flight_is_never_published(world, act):
    in_flight(world, 0.4)
    world.chunks.clear()
    if act == 'pause':
        assert world.switch('pause', True).success
    elif act == 'e_stop':
        world.stop()
        assert world.reaches(NodeState.STOPPED)
    elif act == 'deactivate':
        assert world.lifecycle.change('deactivate')
    else:
        assert world.trigger(act).success
    count = len(world.chunks)
    world.run(0.7)
    assert len(world.chunks) == count, 'a void chunk was published'
    if act == 'deactivate':
        assert world.lifecycle.change('activate')


def test_pause_and_go_on(world):
    assert world.begin().accepted
    assert world.more_chunks(2)
    epoch = world.status.epoch
    assert world.switch('pause', True).success
    assert world.reaches(NodeState.PAUSED)
    assert world.status.epoch > epoch
    assert silent(world)
    assert world.switch('pause', False).success
    assert world.more_chunks(2)
    assert world.chunks[-1].epoch == world.status.epoch


def test_nothing_to_pause(world):
    answer = world.switch('pause', True)
    assert not answer.success
    assert answer.message == 'no task runs'


def test_services_answer_while_an_inference_runs(world):
    """The executor never waits: with inferences of 0.4 s, under the deadline of 0.5 s."""
    for service, kind in {'pause': SetBool, 'cancel_task': Trigger}.items():
        world.call(kind, service)  # the client is known from now on
        in_flight(world, 0.4)
        request = SetBool.Request(data=True) if service == 'pause' else kind.Request()
        seconds = world.answer_s(world.ask(kind, service, request))
        print(f'{service} answered in {1e3 * seconds:.0f} ms while a 0.4 s inference runs')
        assert seconds < ANSWER_LIMIT_S
        world.trigger('cancel_task')


# Feedback and status ---------------------------------------------------------------------------


def test_feedback_says_how_it_goes(world):
    handle = world.send()
    world.streams.add('executed')
    world.run(1.5)
    world.ends(handle, handle.cancel_goal_async)
    assert 3 <= len(world.feedback) <= 10, 'a few times a second'
    last = world.feedback[-1]
    assert 0.8 < last.elapsed_s < 3.0
    assert last.chunks > 5
    assert last.actions_sent > 5
    assert last.queue_depth == 8, 'steps from elsewhere are of no chunk'
    assert 0 <= last.last_latency_s < 0.1
    assert last.token_keep_ratio == pytest.approx(0.5)
    assert last.mode == Mode.COARSE
    assert last.waiting_for == ''
    elapsed = [each.elapsed_s for each in world.feedback]
    assert elapsed == sorted(elapsed)


def test_status_is_a_heartbeat_and_latched(world):
    world.history.clear()
    world.run(2.0)
    assert 8 <= len(world.history) <= 14
    late = TaskWorld('late_world')
    start = time.monotonic()
    while not late.models and time.monotonic() - start < 5:
        rclpy.spin_once(late, timeout_sec=0.1)
    assert late.models[0].cameras == list(CAMERAS)
    assert late.models[0].horizon == 8
    assert late.models[0].stand_in
    late.destroy_node()


def test_fingerprint_tells_checkpoints_apart_and_reads_no_weights(tmp_path):
    def written(header: bytes, weights: bytes) -> str:
        data = len(header).to_bytes(8, 'little') + header + weights
        (tmp_path / 'model.safetensors').write_bytes(data)
        return fingerprint(tmp_path)

    assert fingerprint(tmp_path / 'none') == fingerprint(tmp_path) == ''
    first = written(b'{"a": 1}', bytes(100))
    assert len(first) == 64
    assert written(b'{"a": 1}', bytes(100)) == first
    assert written(b'{"a": 2}', bytes(100)) != first
    assert written(b'{"a": 1}', bytes(101)) != first
    assert written(b'{"a": 1}', b'x' * 100) == first, 'the weights themselves are not read'


# One inference on the side ---------------------------------------------------------------------


def test_infer_once_on_the_newest_images(world):
    assert 'instruction' in world.call(InferOnce, 'infer_once').message
    world.run(0.2)
    request = InferOnce.Request(instruction='what would you do')
    answer = world.call(InferOnce, 'infer_once', request)
    assert answer.success, answer.message
    assert answer.chunk.dry_run
    assert answer.report.mode_reason == 'what would you do'
    assert silent(world), 'it was published'
    assert world.state is NodeState.IDLE


def test_infer_once_on_given_images(world):
    images = [world.image() for _ in CAMERAS]
    request = InferOnce.Request(instruction='go', images=images, cameras=list(CAMERAS))
    assert world.call(InferOnce, 'infer_once', request).success
    request.images[0].encoding = 'mono7'
    answer = world.call(InferOnce, 'infer_once', request)
    assert not answer.success
    assert 'cameras/wrist.encoding' in answer.message


def test_infer_once_beside_a_task(world):
    assert world.begin('lift').accepted
    assert world.more_chunks(2)
    chunk_ids = {chunk.chunk_id for chunk in world.chunks}
    answer = world.call(InferOnce, 'infer_once')
    assert answer.success, answer.message
    assert answer.report.mode_reason == 'lift'
    assert world.more_chunks(3)
    assert answer.chunk.chunk_id not in {*chunk_ids, *(each.chunk_id for each in world.chunks)}


def test_infer_once_does_not_block_the_executor(world):
    world.call(Trigger, 'cancel_task')
    world.behave('slow 0.4')
    world.run(0.2)
    asked = world.ask(InferOnce, 'infer_once', InferOnce.Request(instruction='go'))
    world.run(0.1)
    seconds = world.answer_s(world.ask(Trigger, 'cancel_task'))
    assert seconds < ANSWER_LIMIT_S
    assert not asked.done()
    assert world.run(5, asked.done)
    assert asked.result().success


# Switches --------------------------------------------------------------------------------------


def test_dense_switch_is_live(world):
    assert world.begin().accepted
    assert world.more_chunks(2)
    assert world.switch('set_dense', True).success
    try:
        assert world.run(5, lambda: world.reports[-1].method == 'none')
        assert world.run(5, lambda: world.status.dense)
        assert world.set_parameter('pruning.alpha', 0.5)[0]
        world.run(0.3)
        assert world.reports[-1].method == 'none', 'a live parameter ended the bypass'
    finally:
        assert world.switch('set_dense', False).success
        assert world.set_parameter('pruning.alpha', 0.8)[0]
    assert world.run(5, lambda: world.reports[-1].method == 'specprune')


@pytest.mark.parametrize(
    ('name', 'good', 'bad'),
    [
        ('runtime.overlay_rate_hz', 2.0, -1.0),
        ('runtime.overlay_opacity', 0.2, 2.0),
        ('pruning.translation_threshold', 0.4, -1.0),
        ('pruning.similarity_threshold', 0.9, 1.5),
    ],
)
def test_live_parameters(world, name, good, bad):
    assert world.set_parameter(name, good) == (True, '')
    taken, reason = world.set_parameter(name, bad)
    assert not taken
    assert name in reason
    assert world.get_parameter_value(name) == good


@pytest.mark.parametrize('name', ['runtime.inference_deadline_s', 'runtime.dry_run'])
def test_limits_are_fixed_while_configured(world, name):
    before = world.get_parameter_value(name)
    taken, reason = world.set_parameter(name, 1.0 if name.endswith('_s') else False)
    assert not taken
    assert 'fixed' in reason
    assert world.get_parameter_value(name) == before
