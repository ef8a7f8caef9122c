"""`python -m clipflow_ray`: the command line."""

from clipflow_ray.cli import main

if __name__ == "__main__":
    main()
