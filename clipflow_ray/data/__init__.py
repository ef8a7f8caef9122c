"""Ray Data building blocks, shared by audit, train and evaluate."""
