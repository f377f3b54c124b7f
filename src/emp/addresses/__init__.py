"""Which node a cloud sends an EVM's addresses to: ``base`` says what a driver must do, ``ec2`` does it in a VPC."""
