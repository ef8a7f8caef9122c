"""Exit codes of the command line."""

from typing import Final

DONE: Final = 0
FAILED: Final = 1
WRONG_USAGE: Final = 2
TOO_MANY_ERRORS: Final = 3
TOO_MANY_FLAGGED: Final = 4

# What each code means; docs/formats.md shows these sentences.
EXIT_CODES: Final[dict[int, str]] = {
    DONE: "Done.",
    FAILED: "The command failed, or nothing was scored; stderr says why. Also after SIGTERM.",
    WRONG_USAGE: "A flag or setting is wrong; nothing was started.",
    TOO_MANY_ERRORS: "The audit is finished; its share of errors is above `--max-error-rate`. Or `score` could not "
    "score some of the images.",
    TOO_MANY_FLAGGED: "The audit is finished; its flagged share is above `--fail-if-flag-rate-above`.",
}
