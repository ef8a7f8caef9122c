"""Speed benchmarks. Each measures two rates in turns and reports their ratio: rates alone depend on the machine."""
