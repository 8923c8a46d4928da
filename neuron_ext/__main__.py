"""``python -m neuron_ext``: see ``neuron_ext.cli``."""

from neuron_ext.cli import main

raise SystemExit(main())
