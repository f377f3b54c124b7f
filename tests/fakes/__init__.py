"""A pool for the controller's tests: values, a volume service in memory, agents that answer as agents do."""
