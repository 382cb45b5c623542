"""What ships beside the nodes: layouts for rqt, RViz and Foxglove, and the SROS2 policy."""

import ast
import json
import re
import time
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
import yaml

from specprune_ros.config_files import from_mapping, load_config
from specprune_ros.inspection import CAMERAS, FRAME, LAYOUTS, adapted
from specprune_ros.recordings.topics import camera_topics, full_name, recorded_topics

ROOT = Path(__file__).resolve().parent.parent
INSPECT = ROOT / 'config' / 'inspect'
POLICY = ET.parse(ROOT / 'config' / 'security' / 'policy.xml').getroot()
SOURCES = '\n'.join(path.read_text() for path in sorted((ROOT / 'specprune_ros').rglob('*.py')))
OWN = ('/vla_node/', '/action_streamer/', '/token_cloud/')
ROBOT = load_config(['robots/libero_franka_3cam']).robot


def profile(node: str) -> ET.Element:
    return POLICY.find(f".//profile[@node='{node}']")


def allowed(node: str, kind: str) -> set[str]:
    """Full names that a node may publish, subscribe, reply, request or execute."""
    path = {'publish': 'topics', 'subscribe': 'topics', 'execute': 'actions'}.get(kind, 'services')
    groups = profile(node).findall(f"{path}[@{kind}='ALLOW']")
    names = [item.text for group in groups for item in group]
    return {full_name(name.replace('~', node, 1)) for name in names}


OFFERED = {
    name
    for node in ('vla_node', 'action_streamer', 'token_cloud')
    for kind in ('publish', 'subscribe', 'reply')
    for name in allowed(node, kind)
}


def message_fields(topic: str) -> set[str]:
    """Field names of the message on one of our topics."""
    file = {'/vla_node/pruning': 'PruningDiagnostics'}[topic]
    text = (ROOT / 'msg' / f'{file}.msg').read_text()
    return set(re.findall(r'^[\w/]+(?:\[\])?\s+([a-z_]\w*)', text, re.MULTILINE))


def check_name(name: str) -> None:
    """A topic, service, or a topic's field in Foxglove's or rqt_plot's notation."""
    topic = next((known for known in OFFERED if name == known), None)
    if topic is None and name.startswith('/vla_node/pruning'):
        field = re.split(r'[.\[]', name.removeprefix('/vla_node/pruning')[1:])[0]
        assert field in message_fields('/vla_node/pruning'), name
        return
    assert topic is not None, f'{name} is no name of a node'


def strings(tree: object) -> list[str]:
    """All strings of a tree, keys too."""
    if isinstance(tree, dict):
        return [text for key, value in tree.items() for text in (*strings(key), *strings(value))]
    if isinstance(tree, (list, tuple)):
        return [text for value in tree for text in strings(value)]
    return [tree] if isinstance(tree, str) else []


# Layouts -----------------------------------------------------------------------------------------


def foxglove() -> dict:
    return json.loads((INSPECT / LAYOUTS['foxglove_bridge']).read_text())


def panels_shown(node: object, configs: dict) -> list[str]:
    """Panels of a layout tree, those in tabs too."""
    if isinstance(node, str):
        tabs = configs[node].get('tabs', [])
        return [node, *(p for tab in tabs for p in panels_shown(tab['layout'], configs))]
    assert node['direction'] in ('row', 'column')
    assert 0 < node['splitPercentage'] < 100
    return [p for side in ('first', 'second') for p in panels_shown(node[side], configs)]


def test_foxglove_shows_every_panel_once():
    layout = foxglove()
    shown = panels_shown(layout['layout'], layout['configById'])
    assert sorted(shown) == sorted(layout['configById'])


def test_foxglove_names_what_the_nodes_offer():
    names = [text for text in strings(foxglove()) if text.startswith('/')]
    for name in names:
        if name not in ('/diagnostics', '/rosout'):
            check_name(name)
    assert {f'/vla_node/overlay/{camera}' for camera in CAMERAS} <= {*names}


def test_foxglove_requests_have_the_fields_of_their_services():
    fields = {
        '/vla_node/start_task': set(
            re.findall(
                r'^\w+ +(\w+)', (ROOT / 'srv/StartTask.srv').read_text().split('---')[0], re.M
            )
        )
    }
    for name, config in foxglove()['configById'].items():
        if name.startswith('CallService!'):
            request = json.loads(config['requestPayload'])
            assert {*request} <= fields.get(config['serviceName'], {'data'})
            # Nothing that somebody clicks by mistake may start motion.
            assert 'enable' not in config['serviceName'] or request == {'data': False}


def perspective() -> dict:
    return json.loads((INSPECT / LAYOUTS['rqt_gui']).read_text())


def test_rqt_opens_its_plugins_with_our_topics():
    manager = perspective()['groups']['pluginmanager']
    running = ast.literal_eval(manager['keys']['running-plugins']['repr'])
    opened = {
        f'plugin__{name.replace("/", "__")}__{number}'
        for name, numbers in running.items()
        for number in numbers
    }
    assert {*manager['groups']} <= opened, 'settings of a plugin that is not opened'
    for settings in manager['groups'].values():
        for value in settings['groups']['plugin']['keys'].values():
            assert value['type'] == 'repr'
            for name in strings(ast.literal_eval(value['repr'])):
                check_name(name)


def test_rviz_shows_our_topics():
    manager = yaml.safe_load((INSPECT / LAYOUTS['rviz2']).read_text())['Visualization Manager']
    topics = [d['Topic']['Value'] for d in manager['Displays'] if 'Topic' in d]
    assert len(topics) == 2 * len(CAMERAS)
    for topic in topics:
        check_name(topic)
    assert manager['Global Options']['Fixed Frame'] == FRAME


@pytest.mark.parametrize('layout', LAYOUTS.values())
def test_layouts_follow_robot_and_namespace(layout):
    text = (INSPECT / layout).read_text()
    robot = load_config(['robots/libero_franka']).robot
    mine = adapted(text, robot, 'arm')
    for node in OWN:
        assert mine.count(f'/arm{node}') == text.count(node)
    assert mine.count('/overlay/agentview') == text.count('/overlay/wrist') > 0
    assert mine.count('/overlay/wrist') == text.count('/overlay/side') > 0
    assert FRAME not in mine
    assert len(mine.splitlines()) == len(text.splitlines())
    same = from_mapping({'robot.camera_names': list(CAMERAS), 'robot.frame_id': FRAME}).robot
    assert adapted(text, same) == text


# What is recorded --------------------------------------------------------------------------------


def test_recorded_topics_of_a_robot():
    robot = from_mapping(
        {
            'robot.camera_names': ['wrist', 'side'],
            'robot.camera_topics': ['/cam1/color/image_raw', 'side_camera/image'],
            'robot.camera_transports': ['compressed', 'raw'],
        }
    ).robot
    assert camera_topics(robot, 'arm') == {
        'wrist': '/cam1/color/image_raw/compressed',
        'side': '/arm/side_camera/image',
    }
    topics = recorded_topics(robot, '/arm')
    assert {'/cam1/color/camera_info', '/arm/side_camera/camera_info'} <= {*topics}
    assert topics['/arm/side_camera/image']['reliability'] == 'best_effort'
    assert topics['/arm/vla_node/status']['durability'] == 'transient_local'
    assert '/arm/vla_node/instruction' in topics
    assert '/diagnostics' in topics
    assert not [name for name in topics if '//' in name]


def test_what_is_recorded_exists():
    sent = OFFERED | {*camera_topics(ROBOT).values(), '/rosout', '/parameter_events'}
    for name in recorded_topics(ROBOT):
        assert name in sent or name.endswith('/camera_info'), name


# SROS2 -------------------------------------------------------------------------------------------


def test_policy_has_the_structure_of_sros2():
    assert (POLICY.tag, POLICY.attrib) == ('policy', {'version': '0.2.0'})
    (enclaves,) = POLICY
    kinds = {
        'topics': ('topic', {'publish', 'subscribe'}),
        'services': ('service', {'reply', 'request'}),
        'actions': ('action', {'call', 'execute'}),
    }
    for enclave in enclaves:
        assert (enclave.tag, {*enclave.attrib}) == ('enclave', {'path'})
        (profiles,) = enclave
        (node,) = profiles
        assert (profiles.tag, node.tag, {*node.attrib}) == ('profiles', 'profile', {'ns', 'node'})
        assert enclave.get('path') == f'/specprune/{node.get("node")}'
        for group in node:
            item, attributes = kinds[group.tag]
            assert len(group.attrib) == 1
            assert {*group.attrib} <= attributes
            assert {*group.attrib.values()} == {'ALLOW'}
            assert {entry.tag for entry in group} == {item}
            names = [entry.text for entry in group]
            assert names == sorted(set(names))


STANDARD = re.compile(
    r'/(clock|rosout|parameter_events)$|_parameters|get_parameter|type_description|'
    r'get_available|_state$|transition'
)


def test_policy_names_nothing_that_the_code_does_not():
    for entry in POLICY.iter():
        name = entry.text.strip() if entry.tag in ('topic', 'service', 'action') else ''
        if not name or STANDARD.search(name):
            continue
        for camera in CAMERAS:  # f'~/overlay/{name}', f'cameras/{name}/image_raw'
            name = re.sub(rf'/{camera}\b.*', '/{', name)
        assert name.removeprefix('~/') in SOURCES, name


def test_only_the_streamer_may_command_the_robot():
    commands = {'/joint_trajectory', '/delta_twist_cmds', '/pose_command', '/gripper_command'}
    for node in ('vla_node', 'replay_node', 'token_cloud', 'parameter_snapshot'):
        assert not commands & allowed(node, 'publish')
    assert commands <= allowed('action_streamer', 'publish')


@pytest.mark.ros
@pytest.mark.slow
@pytest.mark.parametrize(
    ('module', 'node', 'parameters'),
    [
        ('vla_node', 'vla_node', {}),
        ('streamer_node', 'action_streamer', {}),
        ('replay_node', 'replay_node', {'recording': str(ROOT / 'test/data/pick_place')}),
        ('cloud_node', 'token_cloud', {'camera_names': list(CAMERAS)}),
    ],
)
def test_the_policy_allows_all_that_a_node_does(module, node, parameters):
    rclpy = pytest.importorskip('rclpy', reason='no ROS here')
    pytest.importorskip('specprune_ros.msg', reason='messages are not built')
    import ros_world

    with ros_world.ros_domain(29):
        eye = rclpy.create_node('eye')
        shipped = ['--params-file', str(ROOT / 'config/robots/libero_franka_3cam.yaml')]
        parameters = {'use_sim_time': True, **parameters}
        with ros_world.NodeProcess(module, parameters, *shipped) as process:
            if module in ('vla_node', 'streamer_node'):
                world = ros_world.World(target=node)
                world.lifecycle.wait(40.0)
                assert world.lifecycle.change('configure'), process.output()
                assert world.lifecycle.change('activate'), process.output()
                world.destroy_node()
            used = graph_of(eye, node)
            eye.destroy_node()
            process.stop()
    assert used['publish'] - allowed(node, 'publish') == set()
    assert used['subscribe'] - allowed(node, 'subscribe') == set()
    assert used['reply'] - allowed(node, 'reply') == set()
    assert used['execute'] == allowed(node, 'execute')
    assert len(used['publish']) >= 3


def graph_of(eye, node: str) -> dict[str, set[str]]:
    """What a node is seen to do once no more comes; the parts of an action are the action."""
    asked = {
        'publish': eye.get_publisher_names_and_types_by_node,
        'subscribe': eye.get_subscriber_names_and_types_by_node,
        'reply': eye.get_service_names_and_types_by_node,
    }
    used, before, end = {}, None, time.monotonic() + 20.0
    while (used != before or not used.get('publish')) and time.monotonic() < end:
        before = used
        time.sleep(1.0)
        try:
            used = {kind: {name for name, _ in ask(node, '/')} for kind, ask in asked.items()}
        except Exception:  # rclpy's NodeNameNonExistentError, private in Humble
            continue
    hidden = {name for names in used.values() for name in names if '/_action/' in name}
    used = {kind: names - hidden for kind, names in used.items()}
    return {**used, 'execute': {name.partition('/_action/')[0] for name in hidden}}
