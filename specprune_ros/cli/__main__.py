"""`python -m specprune_ros.cli`: the command where no console script is installed."""

from specprune_ros.cli import main

raise SystemExit(main())
