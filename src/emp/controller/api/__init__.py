"""The controller's REST API: one module per noun, each a function that makes a router over ``Services``."""
