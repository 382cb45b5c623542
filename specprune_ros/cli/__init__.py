"""The `specprune` command."""

from __future__ import annotations

import argparse
import sys

from specprune_ros import __version__
from specprune_ros.cli import (
    ablate,
    bench,
    calibrate,
    collect,
    eval,
    explain,
    info,
    replay,
    run,
    train,
    verify,
)
from specprune_ros.errors import SpecPruneError
from specprune_ros.loading import COMMANDS as INSTALL

COMMANDS = {
    'run': run,
    'explain': explain,
    'replay': replay,
    'bench': bench,
    'ablate': ablate,
    'calibrate': calibrate,
    'collect': collect,
    'train': train,
    'eval': eval,
    'info': info,
    'verify': verify,
}


def main(argv: list[str] | None = None) -> int:
    """Parse the command line and run one command.

    Returns:
        0; 2 when the user can mend what went wrong (the message says what); 130 on Ctrl-C.
    """
    parser = argparse.ArgumentParser(
        prog='specprune', description='Pruned Vision-Language-Action inference.'
    )
    parser.add_argument('--version', action='version', version=f'specprune {__version__}')
    commands = parser.add_subparsers(dest='command', required=True)
    for name, module in COMMANDS.items():
        summary = module.__doc__.splitlines()[0]
        sub = commands.add_parser(name, help=summary, description=module.__doc__)
        module.add_arguments(sub)
        sub.set_defaults(run=module.run)
    arguments = parser.parse_args(argv)
    try:
        return arguments.run(arguments)
    except ModuleNotFoundError as error:
        package = (error.name or '').partition('.')[0]
        command = INSTALL.get(package, f'pip install {package}')
        print(f'specprune {arguments.command}: {error}: {command}', file=sys.stderr)
        return 2
    except SpecPruneError as error:
        print(f'specprune {arguments.command}: {error}', file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
