"""Entry point for `ray job submit --working-dir . -- python jobs/train.py ...`: the flags of `clipflow-ray train`."""

import sys

from clipflow_ray.cli import main

if __name__ == "__main__":
    main(["train", *sys.argv[1:]])
