"""Entry point for `ray job submit --working-dir . -- python jobs/rescore.py ...`: see `clipflow-ray rescore`."""

import sys

from clipflow_ray.cli import main

if __name__ == "__main__":
    main(["rescore", *sys.argv[1:]])
