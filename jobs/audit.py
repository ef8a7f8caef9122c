"""Entry point for `ray job submit --working-dir . -- python jobs/audit.py ...`: the flags of `clipflow-ray audit`."""

import sys

from clipflow_ray.cli import main

if __name__ == "__main__":
    main(["audit", *sys.argv[1:]])
