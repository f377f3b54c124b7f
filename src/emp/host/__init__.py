"""The node's operating system, one function per external command or kernel verb.

``run`` external commands · ``processes`` who runs here, by pid and start time · ``netlink`` links and bridge ports ·
``tap`` tap devices. Failures are ``CommandFailed`` (what was asked, the code, what the system said) or
``MissingDependency``; nothing here knows what an EVM is.
"""
