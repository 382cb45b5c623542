"""Parameters: what is accepted, what is refused by name, and the files that ship."""

import dataclasses
import math
import pickle
import typing
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from specprune_ros.config import AXES, PolicyConfig, PruneConfig, RobotConfig
from specprune_ros.config_files import (
    default_config,
    find_config,
    from_mapping,
    load_config,
    parameter_names,
    write_parameter_file,
)
from specprune_ros.errors import ConfigError
from specprune_ros.shipped import PREFIX, own_params, shipped_names

CONFIG = Path(__file__).parent.parent / 'config'
SHIPPED = sorted(
    path.relative_to(CONFIG).as_posix()
    for path in CONFIG.rglob('*.yaml')
    if path.parent.name != 'train'  # not of a policy: test_train.py reads those
)
NAN, INF = float('nan'), float('inf')


@dataclasses.dataclass(frozen=True)
class Field:
    """One parameter, as the config classes declare it."""

    name: str
    kind: type
    many: bool
    meta: typing.Mapping

    def value(self, element: object) -> object:
        """The element, in a list where the parameter is one."""
        return [element] if self.many else element

    def __repr__(self) -> str:
        return self.name


def all_fields() -> list[Field]:
    fields = []
    for axis, cls in AXES.items():
        hints = typing.get_type_hints(cls)
        for spec in dataclasses.fields(cls):
            hint = hints[spec.name]
            many = typing.get_origin(hint) is tuple
            kind = typing.get_args(hint)[0] if many else hint
            fields.append(Field(f'{axis}.{spec.name}', kind, many, spec.metadata))
    return fields


FIELDS = all_fields()
RANGED = [f for f in FIELDS if (f.meta['low'], f.meta['high']) != (None, None)]
FLOATS = [f for f in FIELDS if f.kind is float]
CHOICES = [f for f in FIELDS if f.meta['choices']]


def lookup(config: PolicyConfig, name: str) -> object:
    axis, _, key = name.partition('.')
    return getattr(getattr(config, axis), key)


def refusal(name: str, value: object) -> str:
    """The message with which a value is refused; it must name the parameter."""
    with pytest.raises(ConfigError) as caught:
        from_mapping({name: value})
    assert caught.value.field == name
    assert str(caught.value).startswith(f'{name} = ')
    return str(caught.value)


# Declarations ----------------------------------------------------------------------------------


@pytest.mark.parametrize('field', FIELDS, ids=repr)
def test_every_parameter_says_what_it_means(field):
    assert len(field.meta['doc'].split()) >= 2
    assert field.kind in (str, int, float, bool)
    default = lookup(PolicyConfig(), field.name)
    assert lookup(from_mapping({field.name: default}), field.name) == default


def test_parameter_names_are_all_of_them():
    assert parameter_names() == [field.name for field in FIELDS]
    assert len(RANGED) > 20
    assert len(CHOICES) > 5


# Values ----------------------------------------------------------------------------------------

WRONG_TYPES = {
    str: (1, 1.5, True, None),
    int: ('1', 1.5, True, None),
    float: ('0.5', True, None),
    bool: (0, 1, 'yes', None),
}


@pytest.mark.parametrize(
    ('field', 'value'),
    [(field, value) for field in FIELDS for value in WRONG_TYPES[field.kind]],
    ids=repr,
)
def test_wrong_type(field, value):
    assert repr(value) in refusal(field.name, field.value(value))


@pytest.mark.parametrize('field', FIELDS, ids=repr)
def test_list_for_a_single_value_and_the_reverse(field):
    default = lookup(PolicyConfig(), field.name)
    if field.many:
        refusal(field.name, default[0] if default else 'one')
    else:
        refusal(field.name, [default])


@given(st.sampled_from(RANGED), st.floats(1e-6, 1e6))
def test_outside_its_range_a_value_is_refused_and_both_bounds_are_accepted(field, excess):
    for bound, sign in ((field.meta['low'], -1), (field.meta['high'], 1)):
        if bound is None:
            continue
        bound = field.kind(bound)
        config = from_mapping({field.name: field.value(bound)})
        assert lookup(config, field.name) == ((bound,) if field.many else bound)
        over = math.ceil(excess) if field.kind is int else max(excess, abs(bound) * 1e-9)
        value = bound + sign * over
        message = refusal(field.name, field.value(value))
        assert repr(value) in message
        assert f'{bound:g}' in message


@pytest.mark.parametrize('field', FLOATS, ids=repr)
def test_not_a_number(field):
    assert 'nan' in refusal(field.name, field.value(NAN))


@pytest.mark.parametrize(
    'name', ['robot.translation_scale', 'robot.rotation_scale', 'pruning.rank_slope']
)
def test_infinite_scale(name):
    """Bug: accepted, and then 0 * infinity is NaN (or every motion 0) in the first query."""
    assert 'inf' in refusal(name, INF)


@pytest.mark.parametrize('field', CHOICES, ids=repr)
def test_choices(field):
    for choice in field.meta['choices']:
        config = from_mapping({field.name: field.value(choice)})
        assert lookup(config, field.name) == ((choice,) if field.many else choice)
    wrong = 'nonsense' if field.kind is str else 7
    message = refusal(field.name, field.value(wrong))
    assert repr(wrong) in message
    assert all(str(choice) in message for choice in field.meta['choices'])


@pytest.mark.parametrize('field', FLOATS, ids=repr)
def test_whole_numbers_stand_for_floats(field):
    low, high = field.meta['low'], field.meta['high']
    whole = max(math.ceil(low), 1) if low is not None else 1
    assert high is None or whole <= high
    got = lookup(from_mapping({field.name: field.value(whole)}), field.name)
    element = got[0] if field.many else got
    assert type(element) is float
    assert element == whole


@pytest.mark.parametrize(
    ('name', 'value', 'told'),
    [
        ('robot.camera_names', ['wrist', 'wrist'], 'twice'),
        ('robot.camera_names', [''], 'at least one'),
        ('robot.camera_names', ['wrist/left'], 'wrist/left'),
        ('robot.camera_names', ['1st'], '1st'),
        ('robot.camera_transports', ['raw', 'raw'], '1 or 3'),
        ('robot.joint_names', ['a', 'b', 'a'], 'twice'),
        ('robot.action_names', ['x', 'x'], 'twice'),
        ('robot.action_names', [''], 'at least one'),
        ('robot.action_units', ['m', 'rad'], '1 or 7'),
        ('robot.action_min', [-1.0, -1.0], '1 or 7'),
        ('robot.action_max', [1.0] * 8, '1 or 7'),
        ('pruning.global_layers', [''], 'needs a layer'),
        ('pruning.global_layers', [32, 15], 'ascend'),
        ('pruning.prune_layers', [10, 10], 'once'),
    ],
)
def test_lists_that_do_not_fit(name, value, told):
    assert told in refusal(name, value)


def test_lower_limit_above_the_upper():
    """Bug: accepted, and then every action is the upper limit."""
    with pytest.raises(ConfigError, match=r'robot\.action_m'):
        RobotConfig(action_min=(0.5,), action_max=(-0.5,))


@pytest.mark.parametrize('name', ['robot.joint_names', 'pruning.prune_layers'])
def test_a_list_of_one_empty_string_is_an_empty_list(name):
    """ROS parameter files cannot hold an empty list."""
    assert lookup(from_mapping({name: ['']}), name) == ()
    assert lookup(from_mapping({name: []}), name) == ()


def test_one_for_all_or_one_each():
    robot = RobotConfig(action_min=(-2.0,), camera_transports=('raw', 'compressed', 'raw'))
    assert robot.per_action('action_min') == (-2.0,) * 7
    assert robot.per_camera('camera_transports') == {
        'wrist': 'raw',
        'side': 'compressed',
        'overhead': 'raw',
    }
    each = RobotConfig(action_min=tuple(range(-7, 0)))
    assert each.per_action('action_min') == tuple(range(-7, 0))


@pytest.mark.parametrize(
    ('rate_hz', 'horizon', 'step_dt_s', 'period_s'),
    [(0.0, 8, 0.05, 0.2), (0.0, 25, 0.04, 0.52), (0.0, 1, 0.1, 0.1), (2.5, 8, 0.05, 0.4)],
)
def test_queries_come_twice_per_chunk_unless_a_rate_is_set(rate_hz, horizon, step_dt_s, period_s):
    """Bug: at 2.5 Hz, the default, chunks of 0.4 s ended before the next one came."""
    config = from_mapping({
        'robot.horizon': horizon, 'robot.step_dt_s': step_dt_s, 'runtime.query_rate_hz': rate_hz,
    })  # fmt: skip
    assert config.query_period_s == pytest.approx(period_s)


@pytest.mark.parametrize('rate_hz', [1e-320, 0.049])
def test_a_rate_of_hardly_any_query_is_refused(rate_hz):
    assert 'runtime.query_rate_hz' in refusal('runtime.query_rate_hz', rate_hz)


# Names -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ('wrong', 'right'),
    [
        ('pruning.alfa', 'pruning.alpha'),
        ('prunning.alpha', 'pruning.alpha'),
        ('robot.camera_name', 'robot.camera_names'),
        ('runtime.query_rate', 'runtime.query_rate_hz'),
        ('model.devise', 'model.device'),
    ],
)
def test_unknown_name_proposes_the_nearest(wrong, right):
    message = refusal(wrong, 0.5)
    assert 'unknown' in message
    assert f"'{right}'" in message


@given(st.sampled_from(FIELDS), st.integers(0, 99))
def test_a_letter_too_few_proposes_a_name_that_exists(field, at):
    at %= len(field.name)
    typo = field.name[:at] + field.name[at + 1 :]
    message = refusal(typo, 1)
    assert 'did you mean' in message
    assert message.split("'")[-2] in parameter_names()


@pytest.mark.parametrize('name', ['', 'zzz', 'pruning', '17'])
def test_name_unlike_any_other(name):
    with pytest.raises(ConfigError, match='unknown parameter'):
        from_mapping({name: 1})


def test_base_holds_where_nothing_is_said():
    base = from_mapping({'pruning.alpha': 0.6, 'model.seed': 3})
    config = from_mapping({'pruning.alpha': 0.7}, base)
    assert (config.pruning.alpha, config.model.seed) == (0.7, 3)
    assert base.pruning.alpha == 0.6


# Files that ship -------------------------------------------------------------------------------


def flat(tree: dict, prefix: str = '') -> dict[str, object]:
    values = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            values |= flat(value, f'{prefix}{key}.')
        else:
            values[f'{prefix}{key}'] = tuple(value) if isinstance(value, list) else value
    return values


def bare_booleans(text: str) -> list[str]:
    """List elements that YAML 1.1, as ROS reads it, takes for booleans."""
    found, todo = [], [yaml.compose(text)]
    while todo:
        node = todo.pop()
        if isinstance(node, yaml.MappingNode):
            todo += [child for _, child in node.value]
        elif isinstance(node, yaml.SequenceNode):
            todo += node.value
            plain = [n.value for n in node.value if isinstance(n, yaml.ScalarNode) and not n.style]
            found += [v for v in plain if v.lower() in ('y', 'n', 'yes', 'no', 'on', 'off')]
    return found


def test_robots_models_and_methods_ship():
    assert 'node.yaml' in SHIPPED
    assert {name.split('/')[0] for name in SHIPPED if '/' in name} == {
        'robots',
        'models',
        'pruning',
    }


@pytest.mark.parametrize('name', SHIPPED)
def test_shipped_file_loads_and_takes_effect(name):
    tree = yaml.safe_load((CONFIG / name).read_text())
    for reference in (name, name.removesuffix('.yaml'), CONFIG / name):
        config = load_config([reference])
        for key, value in flat(tree['/**']['ros__parameters']).items():
            expected = () if value == ('',) else value  # how ROS writes an empty list
            assert lookup(config, key) == expected


def test_all_shipped_robots_and_methods_fit_together():
    robots, models, methods = (
        [name for name in SHIPPED if name.startswith(axis)]
        for axis in ('robots', 'models', 'pruning')
    )
    for robot in robots:
        for model in models:
            for method in methods:
                config = load_config([robot, model, method, 'node'])
                assert len(config.robot.action_names) in (7, 14)
                moves = 'y' in config.robot.action_names
                assert bool(config.robot.translation_names) == moves


def test_shipped_pruning_is_the_default():
    assert load_config(['pruning/specprune']).pruning == PruneConfig()


@pytest.mark.parametrize('name', SHIPPED)
def test_shipped_file_quotes_what_ros_reads_as_boolean(name):
    assert bare_booleans((CONFIG / name).read_text()) == []


@pytest.mark.parametrize(
    ('text', 'found'),
    [
        ("a: {b: [x, y, 'y', On]}", ['y', 'On']),
        ('a:\n  b:\n    - no\n    - "off"\n', ['no']),
        ("a: ['x', z, yaw]", []),
    ],
)
def test_bare_booleans_are_found(text, found):
    assert bare_booleans(text) == found


STRINGS = st.one_of(st.sampled_from(['y', 'N', 'on', 'Off', 'no', '1', '']), st.text())


@given(st.lists(STRINGS, min_size=1), STRINGS)
def test_a_written_file_is_read_back_and_quotes_its_strings(tmp_path_factory, names, text):
    path = tmp_path_factory.mktemp('written') / 'params.yaml'
    written = {'robot': {'action_names': names}, 'pruning': {'method': text, 'alpha': 0.5}}
    write_parameter_file(path, {'/**': written})
    assert yaml.safe_load(path.read_text()) == {'/**': {'ros__parameters': written}}
    assert bare_booleans(path.read_text()) == []


@pytest.mark.parametrize('name', shipped_names())
def test_a_shipped_checkpoints_parameters_can_be_read_by_ros(name):
    text = own_params(f'{PREFIX}{name}').read_text()
    assert bare_booleans(text) == []


def test_what_ships_is_launched_as_it_was_trained():
    """The demo reads the robot and model files, `checkpoint:=shipped/..` the folder's own."""
    files = ['robots/libero_small', 'models/libero_small']
    ours, own = load_config(files), load_config([own_params('shipped/libero_small')])
    assert ours.robot == own.robot
    assert ours.pruning == own.pruning
    assert dataclasses.replace(ours.model, checkpoint='') == own.model


# Files in general ------------------------------------------------------------------------------


def write(path: Path, parameters: dict, node: str = '/**') -> Path:
    path.write_text(yaml.safe_dump({node: {'ros__parameters': parameters}}))
    return path


def test_later_files_outrank_earlier_ones_and_overrides_all(tmp_path):
    first = write(tmp_path / 'a.yaml', {'pruning': {'alpha': 0.3, 'budget': 'fixed'}})
    second = write(tmp_path / 'b.yaml', {'pruning': {'alpha': 0.4}, 'model': {'seed': 5}})
    config = load_config([first, second])
    assert (config.pruning.alpha, config.pruning.budget, config.model.seed) == (0.4, 'fixed', 5)
    assert load_config([second, first]).pruning.alpha == 0.3
    config = load_config([first, second], {'pruning.alpha': 0.5, 'model.seed': 6})
    assert (config.pruning.alpha, config.pruning.budget, config.model.seed) == (0.5, 'fixed', 6)


@pytest.mark.parametrize('node', ['/**', 'vla_node', '/arm/vla_node'])
def test_any_node_name_will_do(tmp_path, node):
    path = write(tmp_path / 'a.yaml', {'pruning': {'alpha': 0.3}}, node)
    assert load_config([path]).pruning.alpha == 0.3


def test_flat_names_in_a_file(tmp_path):
    path = write(tmp_path / 'a.yaml', {'pruning.alpha': 0.3, 'robot.joint_names': ['']})
    config = load_config([path])
    assert (config.pruning.alpha, config.robot.joint_names) == (0.3, ())


def test_second_section_is_not_dropped_in_silence(tmp_path):
    """Bug: only the first section was read, `vla_node: ...` after `/**: ...` had no effect."""
    path = tmp_path / 'a.yaml'
    sections = {'/**': {'ros__parameters': {'pruning': {'alpha': 0.3}}}}
    sections['vla_node'] = {'ros__parameters': {'pruning': {'k_global': 7}}}
    path.write_text(yaml.safe_dump(sections, sort_keys=False))
    config = load_config([path])
    assert (config.pruning.alpha, config.pruning.k_global) == (0.3, 7)


@pytest.mark.parametrize(
    'text',
    ['', '[]', 'a: 1', '3', 'just words', '/**: {}', '/**: {ros__parameters: 3}', '{}',
     '/**: [ros__parameters]', '/**:\n  ros__parameters:\n'],
)  # fmt: skip
def test_file_that_holds_no_parameters(tmp_path, text):
    path = tmp_path / 'odd.yaml'
    path.write_text(text)
    with pytest.raises(ConfigError, match='ros__parameters') as caught:
        load_config([path])
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    'data',
    [b'/**: [', b'a: b: c', b'\t- x', b'/**: {ros__parameters: {model: {name: 2024-13-45}}}',
     b'\x89MCAP0\r\n', b'\xff\xfe\xfa', b'a: !!python/object:os.system {}', b'a: \x00'],
)  # fmt: skip
def test_file_that_is_not_yaml(tmp_path, data):
    """Bug: other encodings and impossible dates ended in UnicodeDecodeError and ValueError."""
    path = tmp_path / 'bad.yaml'
    path.write_bytes(data)
    with pytest.raises(ConfigError) as caught:
        load_config([path])
    assert str(path) in str(caught.value)


def test_missing_file_says_where_it_looked(tmp_path):
    for name in (tmp_path / 'none.yaml', 'robots/none', tmp_path):
        with pytest.raises(ConfigError, match='no such file') as caught:
            load_config([name])
        assert str(name) in str(caught.value)
        assert str(CONFIG.resolve()) in str(caught.value)


def test_a_given_path_outranks_what_ships(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    mine = write(tmp_path / 'node.yaml', {'runtime': {'query_rate_hz': 9.0}})
    assert find_config('node.yaml').resolve() == mine.resolve()
    assert find_config('node').resolve() == (CONFIG / 'node.yaml').resolve()


def test_bad_value_in_a_file_is_refused_by_name(tmp_path):
    path = write(tmp_path / 'a.yaml', {'pruning': {'alpha': 'much'}})
    with pytest.raises(ConfigError, match=r"pruning\.alpha = 'much'"):
        load_config([path])


def test_an_error_reaches_another_process_as_it_is():
    """Bug: a worker's ConfigError could not be made anew, and showed as a broken pool."""
    error = ConfigError('pruning.alpha', 50.0, 'must be at most 2')
    other = pickle.loads(pickle.dumps(error))
    assert (type(other), str(other), other.code) == (ConfigError, str(error), 'config')
    assert other.field == 'pruning.alpha'


@pytest.mark.parametrize(
    'given', [[], ['pruning.alpha', 'model.threads', 'robot.camera_topics', 'use_sim_time']]
)
def test_what_ships_runs_where_neither_robot_nor_model_is_named(given):
    config = default_config(given)
    assert config.model.checkpoint == 'shipped/libero_small'
    assert config.robot.camera_names == ('wrist', 'side', 'overhead')
    assert config.runtime.dry_run


@pytest.mark.parametrize(
    'name',
    [
        'model.name', 'model.checkpoint', 'robot.camera_names', 'robot.joint_names',
        'robot.action_names',
    ],
)  # fmt: skip
def test_a_robot_or_model_of_one_s_own_begins_from_the_plain_defaults(name):
    assert default_config(['pruning.alpha', name]) == PolicyConfig()
