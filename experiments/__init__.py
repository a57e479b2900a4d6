"""When does Batch Renormalization help? One script a claim: ``python -m experiments``, ``make docs-experiments``."""
