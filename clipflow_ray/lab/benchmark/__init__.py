"""Speed as ratios of two things measured in one run, interleaved: the only performance figures this project quotes."""
