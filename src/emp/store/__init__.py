"""The controller's records: an etcd-shaped store (``base``), its drivers, and typed records on top (``records``)."""
