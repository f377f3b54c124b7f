"""Proof that a node is off: ``base`` says what a driver must do, one module per driver."""
