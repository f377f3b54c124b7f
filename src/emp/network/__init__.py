"""Addresses of EVMs on the wire: ``base`` says what a driver must do, ``l2`` does it on one segment."""
