"""Volumes of EVMs: ``base`` says what a driver must do, one module per driver."""
