"""Running EVMs on a node: ``base`` says what a hypervisor must do, ``qemu`` does it."""
