"""The group for Diffie-Hellman that QEMU's ``tls-creds-x509`` finds beside a certificate as ``dh-params.pem``.

Without the file QEMU 10 makes a group of its own at each start of a server: 0.1 to 1.7 s in which its main loop stands
still, for something that no connection of ours uses, as TLS 1.3 with ECDSA agrees on its keys by elliptic curves.
"""

from __future__ import annotations

FILE = "dh-params.pem"

FFDHE2048 = b"""-----BEGIN DH PARAMETERS-----
MIIBCAKCAQEA//////////+t+FRYortKmq/cViAnPTzx2LnFg84tNpWp4TZBFGQz
+8yTnc4kmz75fS/jY2MMddj2gbICrsRhetPfHtXV/WVhJDP1H18GbtCFY2VVPe0a
87VXE15/V8k1mE8McODmi3fipona8+/och3xWKE2rec1MKzKT0g6eXq8CrGCsyT7
YdEIqUuyyOP7uWrat2DX9GgdT0Kj3jlN9K5W7edjcrsZCwenyO4KbXCeAvzhzffi
7MA0BM0oNC9hkXL+nOmFg/+OTxIy7vKBg8P+OxtMb61zO7X8vC7CIAXFjvGDfRaD
ssbzSibBsu/6iGtCOGEoXJf//////////wIBAg==
-----END DH PARAMETERS-----
"""
"""RFC 7919, appendix A.1"""
