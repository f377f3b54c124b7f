"""A simulated cloud: what EMP uses of the EC2 query API and of EFS, as strict as AWS, with data that is really there.

``errors`` the API's own · ``knobs`` latency, limits and faults, to be set from outside · ``records`` volumes,
attachments and instances · ``creating`` what a new volume must be · ``attaching`` who may have a volume ·
``describing`` answers and filters · ``cloud`` all of it as one state machine, without a socket and with its clock
handed in · ``query`` the wire format, from botocore's own model of the service · ``plane`` what really opens a volume
to a node · ``face`` HTTP · ``memory`` what outlives the process · ``dataplane`` one qemu-nbd per attachment ·
``config``, ``daemon`` and ``python -m emp.lab.cloud --config FILE``: all of it as a daemon of a lab · ``vpc`` subnets
and security groups.

EFS the same way, beside it: ``efs_records``, ``efs`` the state machine, ``efs_answers``, ``efs_wire`` its protocol,
``efs_plane``, ``efs_face``, ``ganesha`` one NFS server per mount target.

``docs/cloud.md`` lists every rule with its source, and what is assumed because no source says it.
"""
