"""Entry point for `ray job submit --working-dir . -- python jobs/evaluate.py ...`: flags of `clipflow-ray evaluate`."""

import sys

from clipflow_ray.cli import main

if __name__ == "__main__":
    main(["evaluate", *sys.argv[1:]])
