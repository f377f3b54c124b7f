"""Whether the EBS driver's suite runs against AWS too. ``docs/cloud.md`` says what that takes."""

from __future__ import annotations

import os

import boto3


def _why_not_aws() -> str | None:
    if os.environ.get("EMP_TEST_AWS") != "1":
        return "EMP_TEST_AWS is not 1"
    if os.geteuid() == 0:
        return "root's tests have no network: run as an ordinary user"
    if len(os.environ.get("EMP_TEST_AWS_INSTANCES", "").split(",")) != 2 or not os.environ.get("EMP_TEST_AWS_ZONE"):
        return "EMP_TEST_AWS_ZONE and the two ids of EMP_TEST_AWS_INSTANCES are not given"
    if boto3.Session().get_credentials() is None:
        return "boto3 finds no credentials"
    return None


WHY_NOT_AWS = _why_not_aws()
"""asked once, before a test hides the machine's own credentials"""
