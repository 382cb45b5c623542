"""`python -m specprune_ros.bench`: the bench where no console script is installed."""

import sys

from specprune_ros.cli import main

raise SystemExit(main(['bench', *sys.argv[1:]]))
