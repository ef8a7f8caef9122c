"""Entry point for `ray job submit --working-dir . -- python jobs/calibrate.py ...`: see `clipflow-ray calibrate`."""

import sys

from clipflow_ray.cli import main

if __name__ == "__main__":
    main(["calibrate", *sys.argv[1:]])
