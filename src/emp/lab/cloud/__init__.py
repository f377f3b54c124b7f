"""The control plane of a simulated cloud: what EMP uses of the EC2 query API, as strict as AWS.

``errors`` the API's own · ``knobs`` latency, limits and faults, to be set from outside · ``records`` volumes,
attachments and instances · ``creating`` what a new volume must be · ``attaching`` who may have a volume ·
``describing`` answers and filters · ``cloud`` all of it as one state machine, without a socket and with its clock
handed in · ``query`` the wire format, from botocore's own model of the service · ``plane`` what really opens a volume
to a node · ``face`` HTTP.

``docs/cloud.md`` lists every rule with its source, and what is assumed because no source says it.
"""
